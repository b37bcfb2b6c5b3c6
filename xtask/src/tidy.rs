//! Small checks of what people forget.

mod exports;
mod manifests;
mod markdown;
mod width;

use std::{
    fs,
    path::{Path, PathBuf},
};

/// The source of the crate root whose exports are counted.
const CORE: &str = "crates/essentially-once/src/lib.rs";

/// The page whose rows name the tests that show them.
const GUARANTEES: &str = "docs/guarantees.md";

/// Checks the repository at `root`, and returns its faults, one sentence each.
pub(crate) fn check(root: &Path) -> Vec<String> {
    let mut complaints = Vec::new();
    let files = files(root);
    let mut texts = Vec::new();
    for path in &files {
        let Some(kind) = kind(path) else { continue };
        match fs::read_to_string(path) {
            Ok(text) => texts.push((path.as_path(), kind, text)),
            Err(error) => complaints.push(format!("cannot read {}: {error}", path.display())),
        }
    }
    let text = |name: &str| {
        let path = root.join(name);
        let found = texts.iter().find(|(other, ..)| *other == path);
        found.map_or("", |(_, _, text)| text.as_str())
    };

    let version = manifests::workspace_version(text("Cargo.toml"));
    complaints.extend(markdown::missing_version(text("CHANGELOG.md"), version));
    complaints.extend(markdown::missing_rows(text("README.md"), manifests::adapters(&files)));
    complaints.extend(exports::fault(text(CORE)).map(|fault| format!("{CORE}: {fault}")));

    let sources: Vec<&str> = texts
        .iter()
        .filter(|(_, kind, _)| *kind == "rs")
        .map(|(.., text)| text.as_str())
        .collect();
    let untested = markdown::missing_tests(text(GUARANTEES), &sources);
    complaints.extend(untested.iter().map(|fault| format!("{GUARANTEES}: {fault}")));

    let mut wide = Vec::new();
    for (path, kind, text) in &texts {
        let shown = path.strip_prefix(root).unwrap_or(path).display();
        let faults = match *kind {
            "toml" if path.ends_with("Cargo.toml") => {
                manifests::faults(text, |name| path.with_file_name(name).exists())
            }
            "rs" => leftovers(text),
            "md" => markdown::dead_links(path, text),
            _ => Vec::new(),
        };
        complaints.extend(faults.iter().map(|fault| format!("{shown}: {fault}")));
        wide.extend(width::wide_lines(kind, text).map(|line| format!("{shown}:{line}")));
    }
    complaints.extend(width::fault(&wide));
    complaints
}

/// The extension of a file whose text is checked.
fn kind(path: &Path) -> Option<&str> {
    let extension = path.extension()?.to_str()?;
    ["lua", "md", "rs", "toml"].contains(&extension).then_some(extension)
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

/// Notes to oneself.
fn leftovers(source: &str) -> Vec<String> {
    // Assembled here, so that this file does not report itself.
    const WORDS: [&str; 2] = [concat!("FIX", "ME"), concat!("to", "do!")];
    let lines = (1..).zip(source.lines());
    lines
        .filter_map(|(line, text)| {
            let word = WORDS.into_iter().find(|word| text.contains(word))?;
            Some(format!("line {line} has a leftover {word}"))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leftovers_are_reported_with_their_line() {
        let source = concat!("fn f() {\n    to", "do!()\n}\n// FIX", "ME later\n");
        let found = leftovers(source);
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(
            found[0].starts_with("line 2 ") && found[1].starts_with("line 4 "),
            "{found:?}"
        );
    }

    #[test]
    fn every_check_reports_its_planted_fault() -> std::io::Result<()> {
        let root = tempfile::tempdir()?;
        let write = |name: &str, text: &str| {
            let path = root.path().join(name);
            fs::create_dir_all(path.parent().unwrap_or(root.path()))?;
            fs::write(path, text)
        };
        let exports: Vec<String> = (0..99).map(|n| format!("pub mod m{n};\n")).collect();
        let wide = format!("// {}\n", "word ".repeat(21));
        write("Cargo.toml", "[workspace]\n[workspace.package]\nversion = \"1.2.3\"\n")?;
        write("CHANGELOG.md", "## 1.2.2\n")?;
        write("README.md", "[dead](nowhere.md)\n")?;
        write(CORE, &exports.concat())?;
        write(
            "crates/essentially-once-x/Cargo.toml",
            "[package]\nname = \"essentially-once-x\"\n",
        )?;
        write(
            "crates/essentially-once-x/src/lib.rs",
            &format!("{wide}// {}\n", concat!("FIX", "ME")),
        )?;
        let complaints = check(root.path());
        for fault in [
            "no heading for version 1.2.3",
            "no table row names essentially-once-x",
            "the root exports 99 names",
            "does not inherit",
            "has no description",
            "has no README.md",
            "has no [package.metadata.docs.rs]",
            "has a leftover",
            "leads nowhere",
            "wider than 100 columns: 1;",
        ] {
            let found = complaints.iter().filter(|complaint| complaint.contains(fault));
            assert_eq!(found.count(), 1, "{fault}: {complaints:#?}");
        }
        assert_eq!(complaints.len(), 10, "{complaints:#?}");
        Ok(())
    }
}
