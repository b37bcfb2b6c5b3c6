//! The files of a server before its first start.

use std::{
    ffi::OsString,
    fs,
    os::unix::fs::{PermissionsExt as _, chown, symlink},
    path::{Path, PathBuf},
    sync::OnceLock,
};

use super::PostgresBuilder;
use crate::{Error, folder::Folder, owner::Owner, process::Process};

/// The user as whom the server runs, unless that is ourselves.
pub(super) fn owner() -> Result<Option<Owner>, Error> {
    Owner::instead_of_root("postgres")
}

/// Writes the configuration into the server's folder, creates its data unless that exists, and
/// returns the data folder.
pub(super) fn create(builder: &PostgresBuilder, bin: &Path, folder: &Folder) -> Result<PathBuf, Error> {
    write(folder, "pg_hba.conf", &builder.access_rules())?;
    if let Some(tls) = &builder.tls {
        write(folder, "server.crt", &tls.certificate)?;
        write(folder, "server.key", &tls.key)?;
        write(folder, "authority.crt", &tls.authority)?;
    }
    let data = match &builder.data {
        // The server runs in another folder.
        Some(given) => std::path::absolute(given)?,
        None => folder.path().join("data"),
    };
    if builder.data.is_some() {
        // The janitor looks there for what a killed server leaves.
        symlink(&data, folder.path().join("data"))?;
    }
    if data.join("PG_VERSION").exists() {
        return Ok(data);
    }
    fs::create_dir_all(&data).map_err(|error| format!("cannot create {}: {error}", data.display()))?;
    give(folder, &data, 0o700)?;
    if let Some(primary) = &builder.primary {
        let mut arguments = [
            "--no-sync",
            "--checkpoint=fast",
            "--write-recovery-conf",
            "-U",
            "postgres",
        ]
        .map(OsString::from)
        .to_vec();
        arguments.extend([
            "-D".into(),
            data.clone().into(),
            "-h".into(),
            primary.socket.clone().into(),
        ]);
        arguments.extend(["-p".into(), primary.port.to_string().into()]);
        Process::run(folder, &bin.join("pg_basebackup"), &arguments)?;
    } else {
        let content = template(bin)?.join(".");
        Process::run(
            folder,
            Path::new("cp"),
            &["-R".into(), content.into(), data.clone().into()],
        )?;
    }
    Ok(data)
}

/// A data folder to copy, because creating one takes a second.
fn template(bin: &Path) -> Result<PathBuf, Error> {
    // It is never dropped, and its janitor removes it when this process ends.
    static TEMPLATE: OnceLock<Result<Folder, String>> = OnceLock::new();
    let template = TEMPLATE.get_or_init(|| initialize(bin).map_err(|error| error.to_string()));
    Ok(template.as_ref().map_err(String::as_str)?.path().join("data"))
}

fn initialize(bin: &Path) -> Result<Folder, Error> {
    let folder = Folder::owned_by(owner()?, "postgres-template")?;
    let arguments = [
        "-D",
        "data",
        "-U",
        "postgres",
        "--auth=trust",
        "-E",
        "UTF8",
        "--locale=C",
        "--no-sync",
    ];
    Process::run(&folder, &bin.join("initdb"), &arguments.map(OsString::from))?;
    Ok(folder)
}

/// Writes a file that only the server's user may read, as it requires of a key.
fn write(folder: &Folder, name: &str, text: &str) -> Result<(), Error> {
    let path = folder.path().join(name);
    fs::write(&path, text)?;
    give(folder, &path, 0o600)
}

fn give(folder: &Folder, path: &Path, mode: u32) -> Result<(), Error> {
    if let Some(owner) = folder.owner() {
        owner.check_reach(path)?;
        chown(path, Some(owner.user), Some(owner.group))?;
    }
    fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
    Ok(())
}
