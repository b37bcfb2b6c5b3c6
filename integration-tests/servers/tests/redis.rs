//! Redis servers start, die, freeze, restart with their data, and leave nothing behind.

use std::{
    net::TcpStream,
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use common::{Done, Owned, Test, Victim};
use test_servers::{RedisCluster, RedisSentinel, RedisServer, Reply, redis_server};

mod common;

const TESTS: [Test; 10] = [
    ("what_was_acknowledged_survives_a_kill", survives_a_kill),
    ("stop_ends_it_even_while_frozen", stop_while_frozen),
    ("a_frozen_server_answers_when_thawed", frozen),
    ("servers_started_at_once_do_not_collide", many_at_once),
    ("nothing_is_left_when_the_owner_is_killed", owner_killed),
    ("administration_works_whatever_the_default_user_may", administration),
    ("a_failed_start_shows_the_log", failed_start),
    ("a_certificate_that_is_missing_is_named", tls),
    ("a_cluster_of_three_serves_all_slots", cluster),
    ("a_sentinel_promotes_the_replica", sentinel),
];

fn main() -> ExitCode {
    let start = || RedisServer::durable().start();
    let owned = |server: &RedisServer| Owned {
        pid: server.pid().unwrap_or(0),
        ports: vec![server.port()],
        folder: server.folder().display().to_string(),
    };
    common::victim(start, owned).unwrap_or_else(|| common::run(TESTS, &redis_server()))
}

fn survives_a_kill() -> Done {
    let server = RedisServer::durable().start()?;
    server.command(&["SET", "key", "value"])?;
    let first = server.pid();
    server.kill()?;
    assert_eq!(server.pid(), None);
    assert!(server.command(&["PING"]).is_err(), "a killed server answered");
    server.restart()?;
    assert_ne!(server.pid(), first);
    assert_eq!(server.command(&["GET", "key"])?.text(), "value");
    server.restart()?; // while it runs
    assert_eq!(server.command(&["GET", "key"])?.text(), "value");
    assert_eq!(server.command(&["GET", "none"])?, Reply::Nil);
    let folder = server.folder().to_owned();
    drop(server);
    assert!(!folder.exists(), "{} is left behind", folder.display());
    Ok(())
}

fn stop_while_frozen() -> Done {
    let server = RedisServer::durable().start()?;
    server.freeze();
    server.stop()?;
    assert_eq!(server.pid(), None);
    Ok(())
}

fn frozen() -> Done {
    let server = RedisServer::durable().start()?;
    server.freeze();
    thread::scope(|scope| {
        let answer = scope.spawn(|| server.command(&["PING"]));
        thread::sleep(Duration::from_millis(100)); // no event reports that nothing happens
        assert!(!answer.is_finished(), "a frozen server answered");
        server.thaw();
        assert_eq!(answer.join().expect("no panic")?.text(), "PONG");
        Ok(())
    })
}

fn many_at_once() -> Done {
    // Three processes. The victims' servers start while this process starts its own.
    let victims = [(); 2].map(|()| thread::spawn(|| Victim::start(4)));
    let servers = (0..4)
        .map(|_| RedisServer::durable().start())
        .collect::<Result<Vec<_>, _>>()?;
    let mut ports: Vec<u16> = servers.iter().map(RedisServer::port).collect();
    for victim in victims {
        let victim = victim.join().expect("no panic")?;
        ports.extend(victim.servers.iter().flat_map(|server| &server.ports));
        victim.kill()?;
    }
    ports.sort_unstable();
    ports.dedup();
    assert_eq!(ports.len(), 12, "a port was given twice");
    Ok(())
}

fn owner_killed() -> Done {
    Victim::start(1)?.kill()
}

fn administration() -> Done {
    let server = RedisServer::durable().with(&[("requirepass", "secret")]).start()?;
    assert!(
        server
            .command(&["XADD", "key", "*", "field", "value"])?
            .text()
            .contains('-')
    );
    server.command(&["ACL", "SETUSER", "default", "off"])?;
    server.command(&["CONFIG", "SET", "maxmemory", "100mb"])?;
    assert!(TcpStream::connect(("127.0.0.1", server.port())).is_ok());
    assert!(server.socket().exists() && server.url().contains(&server.port().to_string()));
    Ok(())
}

fn failed_start() -> Done {
    let Err(error) = RedisServer::durable().with(&[("no-such-directive", "1")]).start() else {
        return Err("started with a directive that does not exist".into());
    };
    assert!(error.to_string().contains("no-such-directive"), "{error}");
    Ok(())
}

fn tls() -> Done {
    let files = std::env::temp_dir().join("none.pem");
    let Err(error) = RedisServer::durable().tls(&files, &files, &files).start() else {
        return Err("started with a certificate that does not exist".into());
    };
    assert!(error.to_string().contains("none.pem"), "{error}");
    Ok(())
}

fn cluster() -> Done {
    let cluster = RedisCluster::start(3)?;
    assert_eq!(cluster.nodes().len(), 3);
    for node in cluster.nodes() {
        let info = node.command(&["CLUSTER", "INFO"])?;
        assert_eq!(info.line("cluster_slots_ok"), Some("16384"));
    }
    // `b` is in slot 3300, which belongs to the first node.
    assert_eq!(cluster.nodes()[0].command(&["SET", "b", "1"])?.text(), "OK");
    let moved = cluster.nodes()[1].command(&["SET", "b", "1"]);
    assert!(moved.is_err_and(|error| error.to_string().contains("MOVED 3300")));
    Ok(())
}

fn sentinel() -> Done {
    let master = RedisServer::durable().start()?;
    let replica = RedisServer::durable().replica_of(&master).start()?;
    master.command(&["SET", "key", "value"])?;
    assert_eq!(
        master.command(&["WAIT", "1", "60000"])?,
        Reply::Int(1),
        "the replica does not follow"
    );
    assert_eq!(replica.command(&["GET", "key"])?.text(), "value");
    let sentinel = RedisSentinel::start("shop", &master)?;
    assert_eq!(sentinel.master_port()?, master.port());
    master.kill()?;
    let deadline = Instant::now() + Duration::from_secs(60);
    while sentinel.master_port()? != replica.port() {
        assert!(Instant::now() < deadline, "the replica was not promoted");
        thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}
