//! A single node.

use std::{
    ffi::OsString,
    fs,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, TcpStream},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use rustix::process::Signal;

use super::{epmd::Epmd, home::without_plugins};
use crate::{
    Error,
    folder::Folder,
    port::Port,
    process::{Process, START_LIMIT, address_in_use, wait_until},
};

/// Long, because a node killed in a cluster may have to wait for the others.
pub(super) const LIMIT: Duration = Duration::from_secs(120);

/// The exit codes of `rabbitmqctl` when it did not reach the node (Erlang gives a connection 7 s)
/// or the node took too long: `EX_UNAVAILABLE` and `EX_TEMPFAIL`.
const NO_ANSWER: [i32; 2] = [69, 75];

/// Erlang code that waits up to a minute for the replicas of all streams, and returns the names of
/// the streams that are down. It waits on the node, because each `rabbitmqctl` takes a second to
/// begin.
const STREAMS_DOWN: &str = "
    Streams = [Queue || Vhost <- rabbit_vhost:list_names(),
        Queue <- rabbit_amqqueue:list(Vhost) ++ rabbit_amqqueue:list_down(Vhost),
        amqqueue:get_type(Queue) =:= rabbit_stream_queue],
    IsUp = fun(Queue) ->
        #{name := Id} = amqqueue:get_type_state(Queue),
        case {rabbit_amqqueue:lookup(amqqueue:get_name(Queue)), rabbit_stream_coordinator:local_pid(Id)} of
            {{ok, _}, {ok, Replica}} -> is_process_alive(Replica);
            _ -> false
        end
    end,
    Wait = fun Again(Left) ->
        case [amqqueue:get_name(Queue) || Queue <- Streams, not IsUp(Queue)] of
            Down when Down =:= []; Left =:= 0 -> Down;
            _ -> timer:sleep(50), Again(Left - 1)
        end
    end,
    Wait(1200).
";

/// A private node with its data, cookie and log in a temporary folder. It can be killed and started
/// again while other threads use it. Dropping it removes the node, its `epmd` and its folder.
pub struct RabbitNode {
    // Declared before the folder, so that it ends before the folder is removed.
    process: Mutex<Option<Process>>,
    folder: Folder,
    port: Port,
    distribution_port: Port,
    tls_port: Option<Port>,
    variables: Vec<(&'static str, OsString)>,
    program: PathBuf,
    name: String,
    epmd: Arc<Epmd>,
    /// Whether it is part of a cluster. While other nodes are down, its streams are down too.
    has_peers: bool,
}

impl RabbitNode {
    /// Starts a node without plugins, and returns when it answers.
    ///
    /// # Errors
    /// If `ESSENTIALLY_ONCE_RABBITMQ_SERVER` is not set, or if the node ended or did not answer
    /// within two minutes. The error then holds the end of its log.
    pub fn start() -> Result<Self, Error> {
        Self::start_with("")
    }

    /// [Starts](Self::start) a node with additional lines in its `rabbitmq.conf`.
    ///
    /// # Errors
    /// As for [`start`](Self::start).
    pub fn start_with(settings: &str) -> Result<Self, Error> {
        Self::start_as(|node| node.configure(&[], settings))
    }

    /// [Starts](Self::start) a node that also serves TLS with this certificate and key (PEM), and
    /// accepts client certificates signed by the authority. `settings` are additional lines in its
    /// `rabbitmq.conf`.
    ///
    /// # Errors
    /// As for [`start`](Self::start).
    pub fn start_tls(certificate: &str, key: &str, authority: &str, settings: &str) -> Result<Self, Error> {
        Self::start_as(|node| {
            let port = node.tls_port.insert(Port::claim()?).number();
            let mut tls = format!("listeners.ssl.1 = 127.0.0.1:{port}\nssl_options.verify = verify_peer\n{settings}\n");
            for (option, pem) in [("certfile", certificate), ("keyfile", key), ("cacertfile", authority)] {
                let path = node.folder().join(option);
                fs::write(&path, pem)?;
                tls += &format!("ssl_options.{option} = {}\n", path.display());
            }
            node.configure(&[], &tls)
        })
    }

    fn start_as(configure: impl Fn(&mut Self) -> Result<(), Error>) -> Result<Self, Error> {
        let mut tries = 0..20;
        loop {
            tries.next();
            let started = Epmd::start()
                .and_then(|epmd| Self::new(&Arc::new(epmd)))
                .and_then(|mut node| {
                    configure(&mut node)?;
                    node.restart()?;
                    Ok(node)
                });
            match started {
                Err(error) if address_in_use(&error) && !tries.is_empty() => {}
                done => return done,
            }
        }
    }

    /// Creates a node that is not started yet.
    pub(super) fn new(epmd: &Arc<Epmd>) -> Result<Self, Error> {
        let (folder, port, distribution_port) = (Folder::new("rabbitmq")?, Port::claim()?, Port::claim()?);
        let program = without_plugins(&crate::rabbitmq_server()?, folder.path())?;
        let path = folder.path().to_owned();
        let name = format!("test{}@localhost", port.number());
        let variables = vec![
            ("HOME", path.clone().into()), // the folder of the cookie
            ("ERL_EPMD_PORT", epmd.port.number().to_string().into()),
            ("RABBITMQ_NODENAME", name.clone().into()),
            ("RABBITMQ_NODE_IP_ADDRESS", "127.0.0.1".into()),
            ("RABBITMQ_NODE_PORT", port.number().to_string().into()),
            ("RABBITMQ_DIST_PORT", distribution_port.number().to_string().into()),
            ("RABBITMQ_MNESIA_BASE", path.join("data").into()),
            ("RABBITMQ_SCHEMA_DIR", path.join("schema").into()),
            ("RABBITMQ_LOG_BASE", path.join("log").into()),
            ("RABBITMQ_LOGS", "-".into()),
            ("RABBITMQ_PID_FILE", path.join("pid").into()),
            ("RABBITMQ_CONF_ENV_FILE", path.join("env.conf").into()),
            ("RABBITMQ_CONFIG_FILE", path.join("rabbitmq.conf").into()),
            ("RABBITMQ_ADVANCED_CONFIG_FILE", path.join("advanced.config").into()),
            ("RABBITMQ_ENABLED_PLUGINS_FILE", path.join("enabled_plugins").into()),
            // The script becomes the node instead of starting it as a child.
            ("RUNNING_UNDER_SYSTEMD", "true".into()),
            // Saves resources, both on small machines and among the nodes of this one.
            (
                "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS",
                "+S 1:1 +sbwt none +sbwtdcpu none +sbwtdio none -start_epmd false \
                 -kernel inet_dist_use_interface {127,0,0,1}"
                    .into(),
            ),
        ];
        let process = Mutex::new(None);
        Ok(Self {
            process,
            folder,
            port,
            distribution_port,
            tls_port: None,
            variables,
            program,
            name,
            epmd: Arc::clone(epmd),
            has_peers: false,
        })
    }

    /// Writes the files that a node reads at its start. `peers` are the names of all nodes of its
    /// cluster.
    pub(super) fn configure(&mut self, peers: &[String], settings: &str) -> Result<(), Error> {
        self.has_peers = !peers.is_empty();
        let mut config = format!("loopback_users = none\ndisk_free_limit.absolute = 1MB\n{settings}\n");
        if !peers.is_empty() {
            config += "cluster_formation.peer_discovery_backend = classic_config\n";
        }
        for (index, peer) in peers.iter().enumerate() {
            config += &format!("cluster_formation.classic_config.nodes.{} = {peer}\n", index + 1);
        }
        let folder = self.folder();
        fs::write(folder.join("rabbitmq.conf"), config)?;
        fs::write(folder.join("env.conf"), "")?;
        fs::write(folder.join("advanced.config"), "[].\n")?;
        fs::write(folder.join("enabled_plugins"), "[].\n")?;
        let cookie = folder.join(".erlang.cookie");
        fs::write(&cookie, &self.epmd.cookie)?;
        // Erlang requires these permissions.
        fs::set_permissions(&cookie, fs::Permissions::from_mode(0o400))?;
        Ok(())
    }

    /// The AMQP port of 127.0.0.1. It stays the same.
    pub fn port(&self) -> u16 {
        self.port.number()
    }

    /// `amqp://guest:guest@127.0.0.1:<port>/%2f`.
    pub fn url(&self) -> String {
        format!("amqp://guest:guest@127.0.0.1:{}/%2f", self.port())
    }

    /// `amqps://guest:guest@127.0.0.1:<port>/%2f`, if it was started with [TLS](Self::start_tls).
    pub fn tls_url(&self) -> Option<String> {
        let port = self.tls_port.as_ref()?;
        Some(format!("amqps://guest:guest@127.0.0.1:{}/%2f", port.number()))
    }

    /// The port that other nodes and `rabbitmqctl` connect to. It stays the same.
    pub fn distribution_port(&self) -> u16 {
        self.distribution_port.number()
    }

    /// The port of the `epmd` that it is registered with.
    pub fn epmd_port(&self) -> u16 {
        self.epmd.port.number()
    }

    /// The node's name, as `rabbitmqctl` takes it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The folder with its data, its configuration and its log `server.log`.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The process id while the node runs.
    pub fn pid(&self) -> Option<u32> {
        self.process().as_ref().map(Process::id)
    }

    /// Kills it with `SIGKILL`, and returns when it is gone.
    ///
    /// RabbitMQ 3.10 loses all streams if it is killed in the second after its very first stream
    /// was declared, because it writes the register of stream coordinators late. So this waits
    /// until the register is written.
    ///
    /// # Errors
    /// If the process cannot be waited for.
    pub fn kill(&self) -> Result<(), Error> {
        self.wait_registered()?;
        self.end(Signal::KILL)
    }

    /// Ends it with `SIGTERM`, as a service manager would, and returns when it is gone.
    ///
    /// # Errors
    /// If the process cannot be waited for.
    pub fn stop(&self) -> Result<(), Error> {
        self.end(Signal::TERM)
    }

    fn end(&self, signal: Signal) -> Result<(), Error> {
        self.process().take().map_or(Ok(()), |process| process.end(signal))
    }

    /// Starts it again on the same folder and ports, and returns when it and all its streams
    /// answer. If it is running, it is [killed](Self::kill) first.
    ///
    /// In a cluster it does not wait for the streams, because they need more than half of the
    /// nodes.
    ///
    /// # Errors
    /// As for [`start`](Self::start), or if a stream does not answer within two minutes.
    pub fn restart(&self) -> Result<(), Error> {
        self.wait_registered()?;
        let mut running = self.process();
        if let Some(process) = running.take() {
            process.end(Signal::KILL)?;
        }
        let mut process = Process::spawn(&self.folder, &self.program, &[], &self.variables)?;
        let what = format!("{} on port {}", self.program.display(), self.port());
        process.wait_ready(&what, LIMIT, || greets(self.port()))?;
        *running = Some(process);
        drop(running);
        self.wait_streams()
    }

    /// A node answers before its streams do, and only the node knows its streams.
    fn wait_streams(&self) -> Result<(), Error> {
        if self.has_peers || !self.has_streams() {
            return Ok(());
        }
        let what = format!("all streams of {} answer", self.name);
        wait_until(&what, LIMIT, || match self.ctl(&["eval", STREAMS_DOWN])?.trim() {
            "[]" => Ok(true),
            down => Err(format!("these streams are down: {down}").into()),
        })
    }

    fn has_streams(&self) -> bool {
        let streams = self.folder().join("data").join(&self.name).join("stream");
        fs::read_dir(streams).is_ok_and(|mut streams| streams.next().is_some())
    }

    fn wait_registered(&self) -> Result<(), Error> {
        const COORDINATOR: &[u8] = b"rabbit_stream_coordinator";
        let data = self.folder().join("data").join(&self.name);
        let register = data.join("coordination").join(&self.name).join("names.dets");
        if !self.has_streams() || self.pid().is_none() {
            return Ok(());
        }
        wait_until("the register names the stream coordinator", START_LIMIT, || {
            Ok(fs::read(&register)?
                .windows(COORDINATOR.len())
                .any(|name| name == COORDINATOR))
        })
    }

    /// Stops its process with `SIGSTOP`. Connections stay open, but the node does not answer.
    ///
    /// # Panics
    /// If it still runs after half a minute.
    pub fn freeze(&self) {
        if let Some(process) = self.process().as_ref() {
            process.freeze();
        }
    }

    /// Resumes a frozen node.
    pub fn thaw(&self) {
        if let Some(process) = self.process().as_ref() {
            process.thaw();
        }
    }

    /// Runs `rabbitmqctl` for this node, and returns its output. This takes a second or more.
    ///
    /// A node that runs but does not answer in time, for example on a busy machine, is asked again
    /// for up to two minutes. So a command that is not idempotent may run twice.
    ///
    /// # Errors
    /// If the command failed, with its output.
    pub fn ctl(&self, arguments: &[&str]) -> Result<String, Error> {
        let deadline = Instant::now() + LIMIT;
        loop {
            match self.ctl_once(arguments) {
                Err(Refusal { passes: true, .. }) if self.pid().is_some() && Instant::now() < deadline => {}
                done => return done.map_err(|refusal| refusal.error),
            }
        }
    }

    fn ctl_once(&self, arguments: &[&str]) -> Result<String, Refusal> {
        let program = self.program.with_file_name("rabbitmqctl");
        let mut command = Command::new(&program);
        command
            .args(arguments)
            .envs(self.variables.iter().cloned())
            .current_dir(self.folder());
        let output = command.output().map_err(|error| Refusal {
            error: format!("cannot start {}: {error}", program.display()).into(),
            passes: false,
        })?;
        let written = String::from_utf8_lossy(&output.stdout).into_owned();
        if output.status.success() {
            return Ok(written);
        }
        let errors = String::from_utf8_lossy(&output.stderr);
        let error = format!(
            "rabbitmqctl {} on {}: {written}{errors}",
            arguments.join(" "),
            self.name
        );
        Err(Refusal {
            error: error.into(),
            passes: output.status.code().is_some_and(|code| NO_ANSWER.contains(&code)),
        })
    }

    fn process(&self) -> MutexGuard<'_, Option<Process>> {
        // A panic elsewhere leaves either a process or none. Both states are consistent.
        self.process.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why `rabbitmqctl` failed.
struct Refusal {
    error: Error,
    /// The node did not answer, so the next attempt may succeed.
    passes: bool,
}

/// Whether an AMQP server answers the protocol header with its first frame.
fn greets(port: u16) -> Result<(), Error> {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
    stream.set_read_timeout(Some(START_LIMIT))?;
    stream.write_all(b"AMQP\0\0\x09\x01")?;
    let mut kind = [0];
    stream.read_exact(&mut kind)?;
    if kind == [1] {
        Ok(())
    } else {
        Err("it does not speak AMQP 0-9-1".into())
    }
}
