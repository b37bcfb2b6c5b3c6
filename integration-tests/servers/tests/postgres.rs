//! PostgreSQL servers start, die, freeze, restart with their data, and leave nothing behind.

use std::{
    env, fs,
    path::Path,
    process::{Command, ExitCode},
    thread,
    time::{Duration, Instant},
};

use common::{Done, Owned, Test, Victim};
use test_servers::{Authority, Error, PostgresServer, postgres_bin};

mod common;

const TESTS: [Test; 13] = [
    ("what_was_committed_survives_a_kill", survives_a_kill),
    ("a_kill_of_the_first_process_alone_is_survived", first_process_killed),
    ("stop_ends_it_even_while_frozen", stop_while_frozen),
    ("a_frozen_server_answers_when_thawed", frozen),
    ("servers_started_at_once_do_not_collide", many_at_once),
    ("nothing_is_left_when_the_owner_is_killed", owner_killed),
    ("a_replica_follows_and_is_promoted", replica),
    ("a_database_is_separate", database),
    ("a_password_is_needed_where_one_is_set", password),
    ("administration_works_whatever_the_rules_forbid", administration),
    ("tls_is_served_and_verified", tls),
    ("a_data_folder_stays_and_is_used_again", data_folder),
    ("a_failed_start_shows_the_log", failed_start),
];

fn main() -> ExitCode {
    // Frozen, because processes that stand still do not notice that their parent is gone.
    let start = || PostgresServer::start().inspect(PostgresServer::freeze);
    let owned = |server: &PostgresServer| Owned {
        pid: server.pid().unwrap_or(0),
        ports: vec![server.port()],
        folder: server.folder().display().to_string(),
    };
    common::victim(start, owned).unwrap_or_else(|| common::run(TESTS, &postgres_bin()))
}

fn survives_a_kill() -> Done {
    let server = PostgresServer::start()?;
    server.run_sql("CREATE TABLE t (n int); INSERT INTO t VALUES (1)")?;
    let first = server.pid();
    server.kill()?;
    assert_eq!(server.pid(), None);
    assert_eq!(processes_in(server.folder()), 0, "children survive");
    assert!(server.run_sql("SELECT 1").is_err(), "a killed server answered");
    server.restart()?;
    assert_ne!(server.pid(), first);
    assert_eq!(server.run_sql("SELECT n FROM t")?, "1\n");
    server.restart()?; // while it runs
    assert_eq!(server.run_sql("SELECT n FROM t")?, "1\n");
    server.freeze();
    let folder = server.folder().to_owned();
    drop(server);
    assert!(!folder.exists(), "{} is left behind", folder.display());
    assert_eq!(processes_in(&folder), 0, "children are left behind");
    Ok(())
}

fn first_process_killed() -> Done {
    let server = PostgresServer::start()?;
    server.run_sql("CREATE TABLE t (n int)")?;
    thread::scope(|scope| {
        // Never pauses, so it does not notice that its parent is gone.
        scope.spawn(|| server.run_sql(&until_go("")));
        wait_until_it_waits(&server)?;
        let pid = server.pid().ok_or("it does not run")?.to_string();
        assert!(Command::new("kill").args(["-KILL", &pid]).status()?.success());
        let restart = scope.spawn(|| server.restart());
        let log = server.folder().join("server.log");
        let refused = wait_for("the rest is in the way", || {
            Ok(fs::read_to_string(&log)?.contains("still in use"))
        });
        go(&server)?;
        refused?;
        restart.join().expect("no panic")?;
        assert_eq!(server.run_sql("SELECT count(*) FROM t")?, "0\n");
        Ok(())
    })
}

fn stop_while_frozen() -> Done {
    let server = PostgresServer::start()?;
    server.freeze();
    server.stop()?;
    assert_eq!(server.pid(), None);
    Ok(())
}

fn frozen() -> Done {
    let server = PostgresServer::start()?;
    thread::scope(|scope| {
        // On a connection that is open already, so its own process must stand still.
        let answer = scope.spawn(|| server.run_sql(&until_go("PERFORM pg_sleep(0.01);")));
        wait_until_it_waits(&server)?;
        server.freeze();
        go(&server)?;
        thread::sleep(Duration::from_millis(100)); // no event reports that nothing happens
        assert!(!answer.is_finished(), "a frozen server answered");
        server.thaw();
        answer.join().expect("no panic")?;
        assert_eq!(server.run_sql("SELECT 1")?, "1\n");
        Ok(())
    })
}

fn many_at_once() -> Done {
    // Three processes. The victims' servers start while this process starts its own.
    let victims = [(); 2].map(|()| thread::spawn(|| Victim::start(1)));
    let servers = [PostgresServer::start()?, PostgresServer::start()?];
    let mut ports: Vec<u16> = servers.iter().map(PostgresServer::port).collect();
    for victim in victims {
        let victim = victim.join().expect("no panic")?;
        ports.extend(victim.servers.iter().flat_map(|server| &server.ports));
        victim.kill()?;
    }
    ports.sort_unstable();
    ports.dedup();
    assert_eq!(ports.len(), 4, "a port was given twice");
    Ok(())
}

fn owner_killed() -> Done {
    let victim = Victim::start(1)?;
    let folder = victim.servers[0].folder.clone();
    assert!(processes_in(Path::new(&folder)) > 3, "its children are not found");
    victim.kill()?;
    let deadline = Instant::now() + Duration::from_secs(60);
    while processes_in(Path::new(&folder)) > 0 {
        assert!(Instant::now() < deadline, "children are left behind");
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

fn replica() -> Done {
    let primary = PostgresServer::start()?;
    primary.run_sql("CREATE TABLE t (n int); INSERT INTO t VALUES (1)")?;
    let replica = PostgresServer::builder().replica_of(&primary).start()?;
    assert_eq!(replica.run_sql("SELECT n FROM t")?, "1\n");
    let refused = replica.run_sql("INSERT INTO t VALUES (2)");
    assert!(refused.is_err_and(|error| error.to_string().contains("read-only")));
    primary.run_sql("INSERT INTO t VALUES (2)")?;
    wait_for("the replica follows", || {
        Ok(replica.run_sql("SELECT max(n) FROM t")? == "2\n")
    })?;
    primary.kill()?;
    replica.promote()?;
    replica.run_sql("INSERT INTO t VALUES (3)")?;
    assert_eq!(replica.run_sql("SELECT count(*) FROM t")?, "3\n");
    assert!(replica.promote().is_err(), "a primary was promoted");
    Ok(())
}

fn database() -> Done {
    let server = PostgresServer::start()?;
    let url = server.create_database("a \"shop\"")?;
    server.run_sql_in("a \"shop\"", "CREATE TABLE t (n int)")?;
    assert_eq!(psql(&url, "SELECT count(*) FROM t")?, "0\n");
    assert!(psql(&server.url(), "SELECT count(*) FROM t").is_err());
    assert!(server.create_database("a \"shop\"").is_err(), "created twice");
    Ok(())
}

fn password() -> Done {
    let server = PostgresServer::builder().password("it's@1").start()?;
    assert_eq!(psql(&server.url(), "SELECT 1")?, "1\n");
    for wrong in ["postgres:wrong@", "postgres@"] {
        let url = format!("postgres://{wrong}127.0.0.1:{}/postgres", server.port());
        assert!(psql(&url, "SELECT 1").is_err(), "{wrong} was let in");
    }
    server.restart()?;
    assert_eq!(psql(&server.url(), "SELECT 1")?, "1\n");
    Ok(())
}

fn administration() -> Done {
    let server = PostgresServer::builder()
        .access("host all all all reject")
        .with(&[("max_connections", "17")])
        .start()?;
    assert!(psql(&server.url(), "SELECT 1").is_err());
    assert_eq!(server.run_sql("SHOW max_connections")?, "17\n");
    assert!(server.socket().exists());
    Ok(())
}

fn tls() -> Done {
    let keys = Authority::new(&["127.0.0.1"])?;
    let server = PostgresServer::builder()
        .tls(&keys.server.certificate, &keys.server.key, &keys.root)
        .access("hostnossl all all all reject")
        .start()?;
    let root = server.folder().join("root.crt");
    fs::write(&root, &keys.root)?;
    let url = |mode: &str| format!("{}?sslmode={mode}&sslrootcert={}", server.url(), root.display());
    let encrypted = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()";
    assert_eq!(psql(&url("verify-full"), encrypted)?, "t\n");
    assert!(psql(&url("disable"), encrypted).is_err(), "let in without TLS");
    fs::write(&root, Authority::new(&["127.0.0.1"])?.root)?;
    assert!(
        psql(&url("verify-full"), encrypted).is_err(),
        "a stranger's certificate"
    );
    Ok(())
}

fn data_folder() -> Done {
    let parent = PostgresServer::start()?; // its folder is one that the server can reach
    let data = parent.folder().join("given");
    let builder = PostgresServer::builder().data(&data);
    builder.start()?.run_sql("CREATE TABLE t (n int)")?;
    assert!(data.join("PG_VERSION").exists());
    assert_eq!(builder.start()?.run_sql("SELECT count(*) FROM t")?, "0\n");
    Ok(())
}

fn failed_start() -> Done {
    let Err(error) = PostgresServer::builder().with(&[("no_such_setting", "1")]).start() else {
        return Err("started with a setting that does not exist".into());
    };
    assert!(error.to_string().contains("no_such_setting"), "{error}");
    let Err(error) = PostgresServer::builder().tls("no certificate", "no key", "").start() else {
        return Err("started without a certificate".into());
    };
    assert!(error.to_string().contains("server.crt"), "{error}");
    Ok(())
}

/// Runs SQL over TCP.
fn psql(url: &str, sql: &str) -> Result<String, Error> {
    let output = Command::new(postgres_bin()?.join("psql"))
        .args(["-X", "-w", "-A", "-t", "-c", sql, url])
        .current_dir(env::temp_dir())
        .output()?;
    if output.status.success() {
        return Ok(String::from_utf8(output.stdout)?);
    }
    Err(String::from_utf8_lossy(&output.stderr).into())
}

/// SQL that repeats a statement until [`go`].
fn until_go(statement: &str) -> String {
    format!("DO $$ BEGIN WHILE (pg_stat_file('go', true)).size IS NULL LOOP {statement} END LOOP; END $$")
}

fn wait_until_it_waits(server: &PostgresServer) -> Done {
    let waiting = "SELECT count(*) FROM pg_stat_activity \
         WHERE state = 'active' AND pid <> pg_backend_pid() AND query LIKE 'DO %'";
    wait_for("the statement runs", || Ok(server.run_sql(waiting)? == "1\n"))
}

fn go(server: &PostgresServer) -> Done {
    Ok(fs::write(server.folder().join("data/go"), "")?)
}

fn wait_for(what: &str, mut check: impl FnMut() -> Result<bool, Error>) -> Done {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !check()? {
        assert!(Instant::now() < deadline, "not within a minute: {what}");
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// How many processes work in a server's folder, or did before it was moved away and removed.
fn processes_in(folder: &Path) -> usize {
    let folder = folder.display().to_string();
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let places = processes.filter_map(|process| fs::read_link(process.path().join("cwd")).ok());
    places
        .filter(|place| place.to_string_lossy().starts_with(&folder))
        .count()
}
