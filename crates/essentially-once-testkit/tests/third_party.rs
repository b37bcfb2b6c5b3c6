//! A crate outside this workspace tests its own backend with only a harness and a main function.

use std::{
    env, fs,
    path::Path,
    process::{Command, Output},
};

/// How the crate's manifest refers to this workspace's crates.
const RELATIVE: &str = "../../../";
const CASE: &str = "mine::s2_a_stale_revision_is_fenced";
/// The longest that the conformance test may be, without the harness.
const MOST_LINES: usize = 10;

#[test]
fn a_crate_from_outside_proves_its_backend_and_learns_that_it_is_broken() {
    let folder = tempfile::tempdir().expect("folder");
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let crates = here.parent().expect("the folder of the crates");
    copy(&here.join("tests/third-party"), folder.path());
    fs::copy(crates.join("../Cargo.lock"), folder.path().join("Cargo.lock")).expect("copy");
    let manifest = folder.path().join("Cargo.toml");
    let text = fs::read_to_string(&manifest).expect("read");
    assert!(text.contains(RELATIVE), "{text}");
    let absolute = format!("{}/", crates.display()).replace('\\', "/");
    fs::write(&manifest, text.replace(RELATIVE, &absolute)).expect("write");

    let main = fs::read_to_string(folder.path().join("tests/conformance.rs")).expect("read");
    assert!(main.lines().count() <= MOST_LINES, "{main}");

    let (sound, stdout) = conformance(folder.path(), false);
    assert!(sound.status.success(), "{}", shown(&sound));
    assert!(has_line(&stdout, CASE, "... ok"), "{}", shown(&sound));

    let (broken, stdout) = conformance(folder.path(), true);
    assert!(!broken.status.success(), "{}", shown(&broken));
    assert!(has_line(&stdout, CASE, "... FAILED"), "{}", shown(&broken));
    assert!(has_line(&stdout, "mine::l4_", "... ok"), "{}", shown(&broken));
}

/// Copies the manifest and the sources that it builds. A stray lock file or build output stays
/// behind.
fn copy(from: &Path, to: &Path) {
    let mut folders = vec!["src".into(), "tests".into()];
    fs::copy(from.join("Cargo.toml"), to.join("Cargo.toml")).expect("copy");
    while let Some(folder) = folders.pop() {
        fs::create_dir_all(to.join(&folder)).expect("create");
        for entry in fs::read_dir(from.join(&folder)).expect("list") {
            let entry = entry.expect("entry");
            let name = Path::new(&folder).join(entry.file_name());
            match entry.file_type().expect("type").is_dir() {
                true => folders.push(name),
                false => drop(fs::copy(entry.path(), to.join(&name)).expect("copy")),
            }
        }
    }
}

/// Runs the crate's tests. They share this test's build output, so their dependencies are already
/// built.
fn conformance(folder: &Path, broken: bool) -> (Output, String) {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR"))
        .parent()
        .expect("the target folder");
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command
        .args(["test", "--offline", "--test", "conformance"])
        .current_dir(folder)
        .env("CARGO_TARGET_DIR", target)
        .env_remove("BROKEN");
    if !cfg!(debug_assertions) {
        command.arg("--release");
    }
    if broken {
        command.env("BROKEN", "1");
    }
    let output = command.output().expect("cargo");
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    (output, stdout)
}

fn has_line(text: &str, name: &str, end: &str) -> bool {
    text.lines()
        .any(|line| line.contains(name) && line.trim_end().ends_with(end))
}

fn shown(output: &Output) -> String {
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    format!("{}\n{}", text(&output.stdout), text(&output.stderr))
}
