//! Erlang's name service.

use std::{
    ffi::OsString,
    net::{Ipv4Addr, TcpStream},
    path::Path,
};

use crate::{
    Error,
    folder::Folder,
    port::Port,
    process::{Process, START_LIMIT},
};

/// Tells nodes where the others listen. It is private, because the machine's own may not run, and
/// would be left behind.
pub(super) struct Epmd {
    // Declared before the folder, so that it ends before the folder is removed.
    _process: Process,
    _folder: Folder,
    pub(super) port: Port,
    /// The secret that its nodes share.
    pub(super) cookie: String,
}

impl Epmd {
    pub(super) fn start() -> Result<Self, Error> {
        let (folder, port) = (Folder::new("epmd")?, Port::claim()?);
        let number = port.number();
        let arguments = ["-address", "127.0.0.1", "-port", &number.to_string()].map(OsString::from);
        let mut process = Process::spawn(&folder, Path::new("epmd"), &arguments, &[])?;
        process.wait_ready("epmd, a part of Erlang,", START_LIMIT, || {
            TcpStream::connect((Ipv4Addr::LOCALHOST, number))?;
            Ok(())
        })?;
        let cookie = (0..20).map(|_| fastrand::alphanumeric()).collect();
        Ok(Self {
            _process: process,
            _folder: folder,
            port,
            cookie,
        })
    }
}
