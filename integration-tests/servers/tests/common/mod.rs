//! A process that owns servers and is then killed. It is this test program, started again with a
//! variable that selects this role.

use std::{
    env, fs,
    io::{BufRead as _, BufReader},
    net::TcpStream,
    path::Path,
    process::{Child, Command, ExitCode, Stdio},
    thread,
    time::{Duration, Instant},
};

use libtest_mimic::{Arguments, Trial};
use test_servers::Error;

const VARIABLE: &str = "TEST_SERVERS_VICTIM";

pub(crate) type Done = Result<(), Error>;
pub(crate) type Test = (&'static str, fn() -> Done);

/// Runs the tests. Without the server they show as ignored, with the reason.
pub(crate) fn run(tests: impl IntoIterator<Item = Test>, server: &Result<std::path::PathBuf, String>) -> ExitCode {
    let trials = tests.into_iter().map(|(name, test)| match server {
        Ok(_) => Trial::test(name, move || test().map_err(Into::into)),
        Err(why) => Trial::test(name, || Ok(())).with_kind(why).with_ignored_flag(true),
    });
    libtest_mimic::run(&Arguments::from_args(), trials.collect()).exit_code()
}

/// What a server must not leave behind.
pub(crate) struct Owned {
    pub(crate) pid: u32,
    pub(crate) ports: Vec<u16>,
    pub(crate) folder: String,
}

impl Owned {
    fn is_left(&self) -> bool {
        // The ports are checked separately, because threads of a dead process may still hold them.
        let answers = |port: &u16| TcpStream::connect(("127.0.0.1", *port)).is_ok();
        self.is_alive() || Path::new(&self.folder).exists() || self.ports.iter().any(answers)
    }

    /// Whether its process runs. A zombie does not count.
    fn is_alive(&self) -> bool {
        let pid = self.pid.to_string();
        let signal = Command::new("sh")
            .args(["-c", "kill -s 0 \"$0\" 2>/dev/null", &pid])
            .status();
        let dead = fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| stat.contains(") Z "));
        signal.is_ok_and(|status| status.success()) && !dead
    }
}

/// The process, and the servers that it owns.
pub(crate) struct Victim {
    child: Child,
    pub(crate) servers: Vec<Owned>,
}

impl Victim {
    /// Starts the process, and waits until it has started `servers` servers.
    pub(crate) fn start(servers: usize) -> Result<Self, Error> {
        let mut child = Command::new(env::current_exe()?)
            .env(VARIABLE, servers.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let lines = BufReader::new(child.stdout.take().ok_or("no output")?).lines();
        let mut victim = Self {
            child,
            servers: Vec::new(),
        };
        for line in lines.take(servers) {
            let line = line?;
            let (pid, rest) = line.split_once(' ').ok_or("the victim wrote too little")?;
            let (ports, folder) = rest.split_once(' ').ok_or("the victim wrote too little")?;
            let ports = ports.split(',').map(str::parse).collect::<Result<_, _>>()?;
            victim.servers.push(Owned {
                pid: pid.parse()?,
                ports,
                folder: folder.to_owned(),
            });
        }
        assert_eq!(victim.servers.len(), servers, "the victim could not start its servers");
        Ok(victim)
    }

    /// Kills the process, and waits until no trace of its servers is left.
    pub(crate) fn kill(mut self) -> Done {
        assert!(
            self.servers
                .iter()
                .all(|server| server.is_alive() && Path::new(&server.folder).exists())
        );
        self.child.kill()?;
        self.child.wait()?;
        let deadline = Instant::now() + Duration::from_secs(60);
        for server in &self.servers {
            while server.is_left() {
                let Owned { pid, ports, folder } = server;
                assert!(
                    Instant::now() < deadline,
                    "left behind: process {pid}, ports {ports:?} or {folder}"
                );
                thread::sleep(Duration::from_millis(10));
            }
        }
        Ok(())
    }
}

/// In the victim process: starts servers, reports them, and waits. Returns `None` in other
/// processes.
#[expect(clippy::print_stdout, reason = "the parent reads it")]
pub(crate) fn victim<S>(start: fn() -> Result<S, Error>, owned: fn(&S) -> Owned) -> Option<ExitCode> {
    let count: usize = env::var(VARIABLE).ok()?.parse().ok()?;
    let mut servers = Vec::new();
    for _ in 0..count {
        let server = start().expect("a server starts");
        let Owned { pid, ports, folder } = owned(&server);
        let ports: Vec<String> = ports.iter().map(u16::to_string).collect();
        println!("{pid} {} {folder}", ports.join(","));
        servers.push(server);
    }
    // Until the process is killed or its parent ends.
    let _ = std::io::stdin().read_line(&mut String::new());
    Some(ExitCode::SUCCESS)
}
