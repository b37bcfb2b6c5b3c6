//! The user that a server runs as.

use std::{fs, os::unix::fs::MetadataExt as _, path::Path, process::Command};

use rustix::process::geteuid;

use crate::Error;

/// A user other than ourselves.
#[derive(Clone, Copy)]
pub(crate) struct Owner {
    pub(crate) user: u32,
    pub(crate) group: u32,
}

impl Owner {
    /// The user of this name if we are root, for servers that refuse to run as root. Otherwise a
    /// server runs as ourselves.
    pub(crate) fn instead_of_root(name: &str) -> Result<Option<Self>, Error> {
        if !geteuid().is_root() {
            return Ok(None);
        }
        let id = |kind| {
            let output = Command::new("id").args([kind, name]).output()?;
            let id = String::from_utf8_lossy(&output.stdout).trim().parse();
            let missing = format!("the server does not run as root, and this machine has no user `{name}`");
            id.map_err(|_| Error::from(missing))
        };
        Ok(Some(Self {
            user: id("-u")?,
            group: id("-g")?,
        }))
    }

    /// Refuses a path whose parents the user cannot enter, which a server reports less clearly.
    pub(crate) fn check_reach(self, path: &Path) -> Result<(), Error> {
        for parent in path.ancestors().skip(1).filter(|parent| parent.has_root()) {
            let found = fs::metadata(parent)?;
            let bit = match (found.uid() == self.user, found.gid() == self.group) {
                (true, _) => 0o100,
                (false, true) => 0o010,
                (false, false) => 0o001,
            };
            if found.mode() & bit == 0 {
                let user = self.user;
                return Err(format!(
                    "user {user}, as whom the server runs, may not enter {}: choose another TMPDIR or data folder",
                    parent.display()
                )
                .into());
            }
        }
        Ok(())
    }
}
