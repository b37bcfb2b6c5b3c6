//! Folders and servers that go away with their owner, however it ends.

use std::{
    env,
    io::{BufRead as _, BufReader},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use crate::Error;

/// Makes the folder, says where it is, and waits until its standard input ends: the owner closed it, or is gone. Then it kills the
/// process group that is entered in the folder, and removes the folder. It is moved away first, so that a server which is just
/// about to be started can no longer enter itself, and is not started.
const JANITOR: &str = r#"
trap '' HUP INT TERM PIPE
folder=$(mktemp -d "$1/$2.XXXXXX") || exit 1
echo "$folder"
read -r line
mv "$folder" "$folder.gone"
folder=$folder.gone
read -r group <"$folder/group" && kill -s KILL -- "-$group"
rm -rf "$folder" || { sleep 1; rm -rf "$folder"; }
"#;

/// A temporary folder that a janitor, a process of its own, removes when this value is dropped or its process dies.
pub(crate) struct Folder {
    path: PathBuf,
    janitor: Child,
}

impl Folder {
    pub(crate) fn new(name: &str) -> Result<Self, Error> {
        let parent = env::temp_dir();
        let mut janitor = Command::new("sh")
            .args(["-c", JANITOR, "janitor"])
            .arg(&parent)
            .arg(name)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            // Out of reach of what is sent to the test's group, such as Ctrl-C or a runner's SIGKILL.
            .process_group(0)
            .spawn()
            .map_err(|error| format!("cannot start `sh`, which cleans up after test servers: {error}"))?;
        let mut path = String::new();
        if let Some(stdout) = janitor.stdout.take() {
            BufReader::new(stdout).read_line(&mut path)?;
        }
        let path = PathBuf::from(path.trim_end_matches('\n'));
        if path.as_os_str().is_empty() {
            janitor.wait()?;
            return Err(format!(
                "cannot make a folder in {}: set TMPDIR to another one",
                parent.display()
            )
            .into());
        }
        Ok(Self { path, janitor })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Where a server enters its process group, so that the janitor can kill it.
    pub(crate) fn group(&self) -> PathBuf {
        self.path.join("group")
    }

    /// Where the server's output goes.
    pub(crate) fn log(&self) -> PathBuf {
        self.path.join("server.log")
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        drop(self.janitor.stdin.take());
        // There is nobody to tell; the janitor does what can be done.
        let _ = self.janitor.wait();
    }
}
