//! The changelog names the version, the README the adapters, and links lead to files.

use std::path::Path;

/// Complains unless the changelog has a heading for the workspace's version.
pub(super) fn missing_version(changelog: &str, version: Option<&str>) -> Option<String> {
    match version {
        None => Some("Cargo.toml: [workspace.package] has no version".into()),
        Some(version) if has_version(changelog, version) => None,
        Some(version) => Some(format!("CHANGELOG.md: no heading for version {version}")),
    }
}

/// Complains about each adapter that no table row of the README names.
pub(super) fn missing_rows<'a>(readme: &str, adapters: impl Iterator<Item = &'a str>) -> impl Iterator<Item = String> {
    adapters
        .filter(|adapter| !names_in_table(readme, adapter))
        .map(|adapter| format!("README.md: no table row names {adapter}"))
}

/// Complains about each relative link of the file that leads nowhere.
pub(super) fn dead_links(file: &Path, markdown: &str) -> Vec<String> {
    links(markdown)
        .filter(|link| !exists(file, link))
        .map(|link| format!("the link {link} leads nowhere"))
        .collect()
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
}
