//! Manifests inherit the workspace's lints. Published crates have what a registry shows.

use std::path::{Path, PathBuf};

/// The faults of a `Cargo.toml`. `exists` says whether a file is next to it.
pub(super) fn faults(manifest: &str, exists: impl Fn(&str) -> bool) -> Vec<String> {
    let mut faults = Vec::new();
    if !is_member(manifest) {
        return faults;
    }
    if value(manifest, "[lints]", "workspace") != Some("true") {
        faults.push("does not inherit the workspace's lints ([lints] workspace = true)".into());
    }
    if value(manifest, "[package]", "publish") == Some("false") {
        return faults;
    }
    if value(manifest, "[package]", "description").is_none_or(str::is_empty) {
        faults.push("has no description, which a published crate needs".into());
    }
    if !exists("README.md") {
        faults.push("has no README.md next to it, which a published crate needs".into());
    }
    if !has_table(manifest, "[package.metadata.docs.rs]") {
        faults.push("has no [package.metadata.docs.rs], which a published crate needs".into());
    }
    faults
}

/// The version that all members inherit.
pub(super) fn workspace_version(manifest: &str) -> Option<&str> {
    value(manifest, "[workspace.package]", "version")
}

/// The names of the adapter crates. The test kit and the program share their prefix but are none.
pub(super) fn adapters(files: &[PathBuf]) -> impl Iterator<Item = &str> {
    files
        .iter()
        .filter(|path| path.ends_with("Cargo.toml"))
        .filter_map(|path| path.parent().and_then(Path::file_name)?.to_str())
        .filter(|name| {
            name.starts_with("essentially-once-")
                && !["essentially-once-testkit", "essentially-once-cli"].contains(name)
        })
}

/// Packages are members unless they open their own workspace.
fn is_member(manifest: &str) -> bool {
    has_table(manifest, "[package]") && !has_table(manifest, "[workspace]")
}

fn has_table(manifest: &str, table: &str) -> bool {
    manifest.lines().any(|line| line.trim() == table)
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

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "\
[package]
name = \"a\"
description = \"Counts.\"
[package.metadata.docs.rs]
all-features = true
[lints]
workspace = true
";

    #[test]
    fn a_published_crate_needs_what_a_registry_shows() {
        assert_eq!(faults(GOOD, |_| true), [""; 0]);
        let planted = [
            (GOOD.replace("description", "descriptive"), "has no description"),
            (GOOD.replace("docs.rs", "docs"), "has no [package.metadata.docs.rs]"),
            (GOOD.replace("workspace = true", ""), "does not inherit"),
        ];
        for (manifest, fault) in planted {
            let found = faults(&manifest, |_| true);
            assert!(found.len() == 1 && found[0].contains(fault), "{fault}: {found:?}");
        }
        let found = faults(GOOD, |name| name != "README.md");
        assert!(found.len() == 1 && found[0].contains("has no README.md"), "{found:?}");
    }

    #[test]
    fn a_private_crate_needs_only_the_lints() {
        let private = "[package]\nname = \"a\"\npublish = false\n";
        let found = faults(private, |_| false);
        assert!(found.len() == 1 && found[0].contains("lints"), "{found:?}");
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
    fn packages_of_other_workspaces_are_not_members() {
        assert!(is_member("[package]\nname = \"a\""));
        assert!(!is_member("[package]\nname = \"a\"\n[workspace]"));
        assert!(!is_member("[workspace]\nmembers = []"));
    }
}
