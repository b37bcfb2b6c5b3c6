//! Small checks of what people forget.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// Returns one sentence for each fault below `root`.
pub(crate) fn complaints(root: &Path) -> Vec<String> {
    let files = files(root);
    let mut complaints = Vec::new();
    let mut read = |path: &Path| match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) => {
            complaints.push(format!("cannot read {}: {error}", path.display()));
            String::new()
        }
    };
    let workspace = read(&root.join("Cargo.toml"));
    let changelog = read(&root.join("CHANGELOG.md"));
    let readme = read(&root.join("README.md"));
    let texts: Vec<(PathBuf, String)> = files
        .iter()
        .filter(|path| {
            path.extension()
                .is_some_and(|ext| ext == "rs" || ext == "md" || ext == "toml")
        })
        .map(|path| (path.clone(), read(path)))
        .collect();

    match value(&workspace, "[workspace.package]", "version") {
        None => complaints.push("Cargo.toml: [workspace.package] has no version".into()),
        Some(version) if !has_version(&changelog, version) => {
            complaints.push(format!("CHANGELOG.md: no heading for version {version}"));
        }
        Some(_) => {}
    }
    for adapter in adapters(&files) {
        if !names_in_table(&readme, &adapter) {
            complaints.push(format!("README.md: no table row names {adapter}"));
        }
    }
    for (path, text) in &texts {
        let shown = path.strip_prefix(root).unwrap_or(path).display();
        match path.extension().and_then(|ext| ext.to_str()) {
            Some("toml") => {
                if is_member(path, text) && value(text, "[lints]", "workspace") != Some("true") {
                    complaints.push(format!(
                        "{shown}: does not inherit the workspace's lints ([lints] workspace = true)"
                    ));
                }
            }
            Some("rs") => {
                complaints.extend(leftovers(text).map(|(line, word)| format!("{shown}:{line}: {word} is left over")))
            }
            _ => complaints.extend(
                links(text)
                    .filter(|link| !exists(path, link))
                    .map(|link| format!("{shown}: the link {link} leads nowhere")),
            ),
        }
    }
    complaints
}

/// All files of the repository, except build output and the contents of hidden folders.
fn files(root: &Path) -> Vec<PathBuf> {
    let mut folders = vec![root.to_path_buf()];
    let mut files = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            let (path, name) = (entry.path(), entry.file_name());
            // A link to a folder could form a loop, so the type of the entry itself decides.
            let is_folder = entry.file_type().is_ok_and(|kind| kind.is_dir());
            if !is_folder {
                files.push(path);
            } else if name != "target" && !name.to_string_lossy().starts_with('.') {
                folders.push(path);
            }
        }
    }
    files.sort();
    files
}

/// Packages are members unless they open their own workspace.
fn is_member(path: &Path, manifest: &str) -> bool {
    path.ends_with("Cargo.toml")
        && manifest.lines().any(|line| line.trim() == "[package]")
        && !manifest.lines().any(|line| line.trim() == "[workspace]")
}

/// The names of the adapter crates. The test kit shares their prefix but is not an adapter.
fn adapters(files: &[PathBuf]) -> impl Iterator<Item = String> {
    files
        .iter()
        .filter(|path| path.ends_with("Cargo.toml"))
        .filter_map(|path| path.parent()?.file_name()?.to_str())
        .filter(|name| name.starts_with("essentially-once-") && *name != "essentially-once-testkit")
        .map(str::to_owned)
}

/// The value of `key` in a table of a TOML file, in the style of this repository: one `key = value`
/// per line.
fn value<'a>(toml: &'a str, table: &str, key: &str) -> Option<&'a str> {
    toml.lines()
        .map(str::trim)
        .skip_while(|line| *line != table)
        .skip(1)
        .take_while(|line| !line.starts_with('['))
        .find_map(|line| {
            let (name, value) = line.split_once('=')?;
            (name.trim() == key).then(|| value.trim().trim_matches('"'))
        })
}

fn has_version(changelog: &str, version: &str) -> bool {
    changelog.lines().filter(|line| line.starts_with("## ")).any(|line| {
        line.split(|c: char| c.is_whitespace() || "[]()".contains(c))
            .any(|word| word.trim_start_matches('v') == version)
    })
}

fn names_in_table(readme: &str, name: &str) -> bool {
    readme
        .lines()
        .filter(|line| line.trim_start().starts_with('|'))
        .any(|line| {
            line.split(|c: char| !(c.is_ascii_alphanumeric() || c == '-' || c == '_'))
                .any(|word| word == name)
        })
}

/// Notes to oneself, with their line numbers.
fn leftovers(source: &str) -> impl Iterator<Item = (usize, &'static str)> {
    // Assembled here, so that this file does not report itself.
    const WORDS: [&str; 2] = [concat!("FIX", "ME"), concat!("to", "do!")];
    source.lines().enumerate().filter_map(|(line, text)| {
        let word = WORDS.into_iter().find(|word| text.contains(word))?;
        Some((line + 1, word))
    })
}

/// The targets of inline links and link definitions outside code.
fn links(markdown: &str) -> impl Iterator<Item = &str> {
    let mut in_code = false;
    markdown
        .lines()
        .filter(move |line| {
            let fence = line.trim_start().starts_with("```");
            in_code ^= fence;
            !fence && !in_code
        })
        .flat_map(|line| {
            let definition = line
                .strip_prefix('[')
                .and_then(|rest| rest.split_once("]: "))
                .map(|(_, target)| target);
            // Every second piece between backticks is code.
            let inline = line
                .split('`')
                .step_by(2)
                .flat_map(|text| text.split("](").skip(1))
                .filter_map(|rest| rest.split(')').next());
            // A link whose text is code closes in the following piece, which begins with the
            // bracket.
            inline.chain(definition)
        })
        .filter_map(|target| target.split_whitespace().next())
}

/// Whether a relative link leads to a file. Other links are not checked.
fn exists(file: &Path, link: &str) -> bool {
    let target = link.split('#').next().unwrap_or(link);
    let elsewhere = target.is_empty() || target.contains("://") || target.starts_with("mailto:");
    elsewhere || file.parent().is_some_and(|folder| folder.join(target).exists())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_are_found_outside_of_code_only() {
        let markdown = "\
See [a](a.md#part), [`b`](b/c.md \"title\") and `[no](no.md)`.
```rust
let x = [y](z);
```
[d]: d.md
[web](https://example.org)";
        assert_eq!(
            links(markdown).collect::<Vec<_>>(),
            ["a.md#part", "b/c.md", "d.md", "https://example.org"]
        );
    }

    #[test]
    fn only_relative_links_must_exist() {
        let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md");
        for good in [
            "src/tidy.rs",
            "src/tidy.rs#l1",
            "#top",
            "https://example.org/x",
            "mailto:a@example.org",
        ] {
            assert!(exists(&here, good), "{good}");
        }
        assert!(!exists(&here, "src/nowhere.rs"));
    }

    #[test]
    fn a_version_needs_a_heading_of_its_own() {
        for good in ["## 0.1.0", "## [0.1.0] - 2026-11-23", "## v0.1.0 (soon)"] {
            assert!(has_version(good, "0.1.0"), "{good}");
        }
        for bad in ["", "0.1.0", "## 0.1.01", "## 10.1.0", "### 0.1.0"] {
            assert!(!has_version(bad, "0.1.0"), "{bad}");
        }
    }

    #[test]
    fn an_adapter_is_named_in_full_and_in_a_table() {
        let row = "| [`essentially-once-sqlite`](crates/essentially-once-sqlite) | one machine |";
        assert!(names_in_table(row, "essentially-once-sqlite"));
        assert!(!names_in_table(row, "essentially-once-sql"));
        assert!(!names_in_table("essentially-once-sqlite", "essentially-once-sqlite"));
    }

    #[test]
    fn values_are_read_from_their_own_table() {
        let toml = "[package]\nversion = \"1\"\n[lints]\nworkspace = true\n[x]\nworkspace = false\n";
        assert_eq!(value(toml, "[lints]", "workspace"), Some("true"));
        assert_eq!(value(toml, "[package]", "version"), Some("1"));
        assert_eq!(value(toml, "[package]", "workspace"), None);
        assert_eq!(value(toml, "[other]", "workspace"), None);
    }

    #[test]
    fn leftovers_are_told_with_their_line() {
        let source = concat!("fn f() {\n    to", "do!()\n}\n// FIX", "ME later\n");
        assert_eq!(leftovers(source).map(|(line, _)| line).collect::<Vec<_>>(), [2, 4]);
    }

    #[test]
    fn packages_of_other_workspaces_are_no_members() {
        let path = Path::new("benchmarks/peers/Cargo.toml");
        assert!(is_member(path, "[package]\nname = \"a\""));
        assert!(!is_member(path, "[package]\nname = \"a\"\n[workspace]"));
        assert!(!is_member(Path::new("rustfmt.toml"), "[package]"));
    }
}
