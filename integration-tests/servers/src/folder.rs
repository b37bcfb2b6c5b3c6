//! Folders and servers that are removed with their owner, however it ends.

use std::{
    env,
    io::{BufRead as _, BufReader},
    os::unix::{fs::chown, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use crate::{Error, owner::Owner};

/// Makes the folder, prints its path, and waits until its standard input ends, which means that the
/// owner closed it or died. Then it kills the process group noted in the folder, with children that
/// left the group, and removes the folder. It first moves the folder away, so that a server about
/// to start can no longer note its group, and does not start.
///
/// A killed PostgreSQL leaves a piece of shared memory, which it notes in its data folder. If that
/// folder outlives this one, another server may use it by now, so the noted process must be dead.
const JANITOR: &str = r#"
trap '' HUP INT TERM PIPE
folder=$(mktemp -d "$1/$2.XXXXXX") || exit 1
echo "$folder"
read -r line
mv "$folder" "$folder.gone"
folder=$folder.gone
if read -r group <"$folder/group"; then
    kill -s STOP -- "-$group"
    for stat in /proc/[0-9]*/stat; do
        read -r line <"$stat" || continue
        set -- ${line##*) }
        [ "$2" != "$group" ] || kill -s KILL "${line%% *}"
    done
    kill -s KILL -- "-$group"
fi
notes=$folder/data/postmaster.pid
if read -r first <"$notes" && { [ "$first" = "$group" ] || ! kill -s 0 "$first"; }; then
    memory=$(sed -n 7p "$notes")
    ipcrm -m "${memory##* }"
fi
rm -rf "$folder" || { sleep 1; rm -rf "$folder"; }
"#;

/// A temporary folder. A janitor process removes it when this value is dropped or its process dies.
pub(crate) struct Folder {
    path: PathBuf,
    owner: Option<Owner>,
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
            // Out of reach of signals to the test's group, such as Ctrl-C or a runner's SIGKILL.
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
                "cannot make a folder in {}: set TMPDIR to another folder",
                parent.display()
            )
            .into());
        }
        Ok(Self {
            path,
            owner: None,
            janitor,
        })
    }

    /// A folder of another user, as whom its server runs. `None` means ourselves.
    pub(crate) fn owned_by(owner: Option<Owner>, name: &str) -> Result<Self, Error> {
        let mut folder = Self::new(name)?;
        if let Some(owner) = owner {
            owner.check_reach(&folder.path)?;
            chown(&folder.path, Some(owner.user), Some(owner.group))?;
        }
        folder.owner = owner;
        Ok(folder)
    }

    /// The user as whom its server runs, unless that is ourselves.
    pub(crate) fn owner(&self) -> Option<Owner> {
        self.owner
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The file in which a server notes its process group, so that the janitor can kill it.
    pub(crate) fn group(&self) -> PathBuf {
        self.path.join("group")
    }

    /// The file that receives the server's output.
    pub(crate) fn log(&self) -> PathBuf {
        self.path.join("server.log")
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        drop(self.janitor.stdin.take());
        // An error cannot be reported here. The janitor cleans up as far as it can.
        let _ = self.janitor.wait();
    }
}
