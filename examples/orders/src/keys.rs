//! The keys that sign what is sent over the bus.

use std::{
    fs::OpenOptions,
    io::Write as _,
    path::{Path, PathBuf},
};

use essentially_once::{Error, signed::Keys};

use crate::Failure;

/// Checks a file of keys.
pub(crate) fn check(path: &Path) -> Result<(), Error> {
    Keys::from_file(path).map(drop)
}

/// Writes a new key to a file that only its owner can read.
pub(crate) fn create(folder: &Path) -> Result<PathBuf, Failure> {
    let path = folder.join("signing-keys");
    let mut key = [0; 32];
    getrandom::fill(&mut key).map_err(|error| format!("cannot draw a key: {error}"))?;
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let text = format!("1 = {}\n", base16ct::lower::encode_string(&key));
    let written = options.open(&path).and_then(|mut file| file.write_all(text.as_bytes()));
    written.map_err(|error| format!("cannot write the keys to {}: {error}", path.display()))?;
    Ok(path)
}
