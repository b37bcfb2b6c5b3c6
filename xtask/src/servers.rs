//! Finds the servers that tests need. Installs missing ones if that works without a password.

use std::{
    env,
    ffi::OsString,
    path::PathBuf,
    process::{Command, Stdio},
};

use clap::ValueEnum;

use crate::say;

/// A server that tests start privately, from its program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Server {
    /// `redis-server`, or Valkey's.
    Redis,
    /// `rabbitmq-server`, with `rabbitmqctl` in the same folder.
    Rabbitmq,
}

struct Facts {
    name: &'static str,
    program: &'static str,
    /// Names the program to the tests. If the user sets it, nothing is searched.
    variable: &'static str,
    /// Searched before `PATH`, where a package may put something else under the program's name.
    first: &'static [&'static str],
    /// Searched after `PATH`, because an ordinary user's often lacks `sbin`.
    folders: &'static [&'static str],
    debian: &'static str,
    brew: &'static str,
}

impl Server {
    fn facts(self) -> Facts {
        match self {
            Self::Redis => Facts {
                name: "redis",
                program: "redis-server",
                variable: "ESSENTIALLY_ONCE_REDIS_SERVER",
                first: &[],
                folders: &["/usr/bin", "/usr/sbin", "/usr/local/bin", "/opt/homebrew/bin"],
                debian: "redis-server",
                brew: "redis",
            },
            Self::Rabbitmq => Facts {
                name: "rabbitmq",
                program: "rabbitmq-server",
                variable: "ESSENTIALLY_ONCE_RABBITMQ_SERVER",
                // Debian's `sbin` has a wrapper that changes the user.
                first: &["/usr/lib/rabbitmq/bin"],
                folders: &[
                    "/usr/local/sbin",
                    "/opt/homebrew/sbin",
                    "/usr/local/opt/rabbitmq/sbin",
                    "/opt/homebrew/opt/rabbitmq/sbin",
                ],
                debian: "rabbitmq-server",
                brew: "rabbitmq",
            },
        }
    }
}

/// Returns the variables that name all servers to the tests. The variable of a skipped server is
/// empty.
///
/// # Errors
/// Which server is missing, and what to do.
pub(crate) fn variables(without: &[Server]) -> Result<Vec<(&'static str, OsString)>, String> {
    let servers = Server::value_variants().iter();
    servers
        .map(|server| {
            let facts = server.facts();
            let path = match without.contains(server) {
                true => OsString::new(),
                false => find_or_install(&facts)?.into(),
            };
            Ok((facts.variable, path))
        })
        .collect()
}

fn find_or_install(server: &Facts) -> Result<PathBuf, String> {
    let (program, variable) = (server.program, server.variable);
    if let Some(given) = env::var_os(variable).filter(|given| !given.is_empty()) {
        let path = PathBuf::from(given);
        return match path.is_file() {
            // Tests run in other folders.
            true => std::path::absolute(&path).map_err(|error| format!("{variable}={}: {error}", path.display())),
            false => Err(format!("{variable}={}: the file does not exist", path.display())),
        };
    }
    if let Some(path) = find(server) {
        return Ok(path);
    }
    let why = match install(server) {
        Ok(()) => match find(server) {
            Some(path) => return Ok(path),
            None => format!("the package {} was installed, but has no {program}", server.debian),
        },
        Err(why) => why,
    };
    Err(format!(
        "the tests need {program}, which is not installed: {why}\n  \
         Debian, Ubuntu:  sudo apt-get install {debian}\n  \
         macOS:           brew install {brew}\n  \
         elsewhere:       set {variable} to its path\n  \
         or do without:   cargo xtask test --without {name}  (its cases then show as ignored)",
        debian = server.debian,
        brew = server.brew,
        name = server.name,
    ))
}

fn find(server: &Facts) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let first = server.first.iter().map(PathBuf::from);
    let usual = server.folders.iter().map(PathBuf::from);
    // An empty or relative entry of PATH would mean another folder for each test.
    let path = env::split_paths(&path).filter(|folder| folder.is_absolute());
    first
        .chain(path)
        .chain(usual)
        .map(|folder| folder.join(server.program))
        .find(|path| path.is_file())
}

/// Installs the Debian package, as root or where `sudo` needs no password.
fn install(server: &Facts) -> Result<(), String> {
    if !succeeds(&["apt-get", "--version"]) {
        return Err("it cannot be installed, because this machine has no apt-get".into());
    }
    let sudo: &[&str] = if is_root() {
        &[]
    } else if succeeds(&["sudo", "-n", "true"]) {
        &["sudo", "-n"]
    } else {
        return Err("installing it needs root, or sudo without a password".into());
    };
    // In two steps. Most machines have package lists, and refreshing them takes longer than the
    // installation.
    let install = ["apt-get", "install", "-y", "--no-install-recommends", server.debian];
    if apt(sudo, &install) || apt(sudo, &["apt-get", "update"]) && apt(sudo, &install) {
        Ok(())
    } else {
        Err("apt-get could not install it, as shown above".into())
    }
}

fn apt(sudo: &[&str], command: &[&str]) -> bool {
    // Through `env`, because sudo does not pass variables on. The frontend setting keeps apt from
    // asking questions.
    let words = [sudo, &["env", "DEBIAN_FRONTEND=noninteractive"], command].concat();
    say(&words.join(" "));
    Command::new(words[0])
        .args(&words[1..])
        .status()
        .is_ok_and(|status| status.success())
}

fn is_root() -> bool {
    let id = Command::new("id").arg("-u").output();
    id.is_ok_and(|output| output.stdout.trim_ascii() == b"0")
}

fn succeeds(words: &[&str]) -> bool {
    let mut command = Command::new(words[0]);
    command
        .args(&words[1..])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn variants_have_the_names_that_are_told() {
        for server in Server::value_variants() {
            let value = server.to_possible_value().expect("no variant is hidden");
            assert_eq!(value.get_name(), server.facts().name);
        }
    }

    #[test]
    fn without_a_server_its_variable_is_empty() {
        let variables = variables(Server::value_variants()).expect("no server is needed");
        assert_eq!(variables.len(), Server::value_variants().len());
        assert!(variables.iter().all(|(_, path)| path.is_empty()));
    }

    #[test]
    fn usual_folders_are_absolute() {
        for server in Server::value_variants() {
            let facts = server.facts();
            let folders = [facts.first, facts.folders].concat();
            assert!(folders.iter().all(|folder| Path::new(folder).is_absolute()));
        }
    }
}
