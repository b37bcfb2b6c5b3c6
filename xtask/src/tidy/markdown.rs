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

/// Complains about each test that a table of guarantees names and that no source defines. A name
/// with `*` stands for several tests, and the pairs of log and store build their names.
pub(super) fn missing_tests(guarantees: &str, sources: &[&str]) -> Vec<String> {
    let rows = guarantees.lines().filter(|line| line.starts_with("| "));
    let names = rows.flat_map(|row| row.split('`').skip(1).step_by(2));
    names
        .filter_map(|name| name.rsplit("::").next())
        .filter(|name| is_test_name(name) && !name.starts_with("log_"))
        .filter(|name| !sources.iter().any(|source| defines(source, name)))
        .map(|name| format!("no test is called {name}"))
        .collect()
}

/// As a function, or as the name under which a suite registers one.
fn defines(source: &str, test: &str) -> bool {
    source.contains(&format!("fn {test}")) || source.contains(&format!("{test}\""))
}

/// Settings and types have fewer words than a test's name, which is a sentence.
fn is_test_name(name: &str) -> bool {
    let is_word = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
    name.chars().all(is_word) && name.matches('_').count() >= 3
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

    #[test]
    fn a_guarantee_names_a_test_that_exists() {
        let sources = ["async fn a_late_writer_is_fenced() {}"];
        let row = |test: &str| format!("| Fenced | `forget_producers_after` | `store::{test}`, `faults_*` |");
        assert!(missing_tests(&row("a_late_writer_is_fenced"), &sources).is_empty());
        let missing = missing_tests(&row("a_late_writer_is_not_fenced"), &sources);
        assert_eq!(missing, ["no test is called a_late_writer_is_not_fenced"]);
    }
}
