//! The store against private servers: what it commits, refuses, and says when the server fails.

use std::{
    error::Error as _,
    future::Future,
    pin::Pin,
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

use essentially_once::{
    Advance, ConsumerId, Durability, Error, KeyValue, LogId, Offset, OffsetStore, ProducerId, Source, Transaction,
    Window,
};
use essentially_once_redis::{
    Redis, RedisOptions, RedisStore, RedisTx,
    redis::{Cmd, cmd},
};
use essentially_once_testkit::{Suite, Violation};
use test_servers::{Cut, Proxy, RedisServer, redis_server};

type Outcome = Result<(), Source>;
type Case = fn() -> Pin<Box<dyn Future<Output = Outcome>>>;

macro_rules! cases {
    ($($case:ident),+ $(,)?) => {
        [$((stringify!($case), (|| Box::pin($case())) as Case)),+]
    };
}

fn main() -> ExitCode {
    let cases = cases![
        what_is_committed_is_there,
        windows_are_replaced_and_forgotten,
        large_numbers_round_trip,
        a_stale_revision_is_fenced,
        one_of_two_racing_stores_wins,
        a_missing_position_has_revision_0,
        another_log_is_refused,
        an_incarnation_is_filled_in,
        a_transaction_reads_its_own_writes,
        a_transaction_that_is_dropped_leaves_nothing,
        consumers_and_prefixes_are_apart,
        keys_of_another_type_are_refused,
        garbage_in_our_hashes_is_an_error,
        sizes_are_limited,
        commands_run_in_the_same_step,
        a_fenced_commit_runs_no_command,
        the_wrong_type_is_found_before_the_first_write,
        a_number_that_is_none_is_found_before_the_first_write,
        what_the_transaction_itself_writes_is_not_checked,
        counting_together_is_counting_one_by_one,
        sums_that_overflow_are_counted_one_by_one,
        a_first_command_that_fails_applies_nothing,
        a_later_command_that_fails_blocks_the_consumer,
        a_first_commit_applied_in_part_can_be_resolved,
        other_instances_are_fenced_after_a_partial_commit,
        unfit_commands_are_refused_at_once,
        keys_of_stores_are_refused,
        subcommands_are_known,
        queries_read_now,
        a_full_server_applies_nothing,
        a_request_that_is_lost_did_nothing,
        a_reply_that_is_lost_is_found_out,
        a_late_commit_is_fenced,
        what_was_acknowledged_survives_kills,
        a_forgotten_script_is_sent_again,
        settings_that_lose_data_are_named,
        a_server_that_hides_its_settings_is_unknown,
        missing_permissions_are_named,
        a_permission_missing_for_a_later_command_applies_nothing,
        replicas_that_are_missing_leave_it_open,
        large_transactions_are_taken,
        resp3_is_spoken,
        passwords_are_never_shown,
    ];
    let missing = redis_server().err();
    let mut suite = Suite::new();
    for (name, case) in cases {
        suite = match &missing {
            Some(why) => suite.ignored(name, why),
            None => suite.test(name, move || run(case)),
        };
    }
    suite.run()
}

fn run(case: Case) -> Result<(), Violation> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| Violation::new(error.to_string()))?;
    let limit = Duration::from_secs(100);
    let result = runtime.block_on(async { tokio::time::timeout(limit, case()).await });
    runtime.shutdown_timeout(Duration::from_secs(1));
    match result {
        Ok(result) => result.map_err(|error| Violation::new(error.to_string())),
        Err(_) => Err(Violation::new(format!("still waiting after {limit:?}"))),
    }
}

/// A server and a store on it.
struct Stage {
    server: RedisServer,
    store: RedisStore,
    consumer: ConsumerId,
}

impl Stage {
    async fn start() -> Result<Self, Source> {
        Self::with(RedisOptions::new()).await
    }

    async fn with(options: RedisOptions) -> Result<Self, Source> {
        let server = RedisServer::durable().start()?;
        let store = options.connect(&server.url()).await?.store();
        Ok(Self {
            server,
            store,
            consumer: ConsumerId::new("c")?,
        })
    }

    async fn begin(&self) -> Result<RedisTx, Error> {
        self.store.begin(&self.consumer).await
    }

    /// Commits what `stage` stages, and says what came of it.
    async fn commit(&self, expected: u64, commands: impl IntoIterator<Item = Cmd>) -> Result<(), Error> {
        let mut tx = self.begin().await?;
        for command in commands {
            tx.command(command).await?;
        }
        tx.commit(advance(expected, expected + 1)).await
    }

    /// The revision that is stored.
    async fn revision(&self) -> Result<u64, Error> {
        let position = self.store.position(&self.consumer).await?;
        Ok(position.map_or(0, |position| position.revision))
    }

    async fn value(&self, key: &str) -> Result<Option<String>, Error> {
        let value = self.begin().await?.get(key.as_bytes()).await?;
        Ok(value.map(|value| String::from_utf8_lossy(&value).into_owned()))
    }

    fn ask(&self, command: &str) -> Result<String, Source> {
        let words: Vec<&str> = command.split(' ').collect();
        Ok(match self.server.command(&words)? {
            test_servers::Reply::Nil => "nil".into(),
            test_servers::Reply::Int(number) => number.to_string(),
            test_servers::Reply::Text(text) => text,
            test_servers::Reply::List(list) => list.iter().map(|reply| reply.text()).collect::<Vec<_>>().join(" "),
        })
    }

    async fn through(&self, proxy: &Proxy) -> Result<RedisStore, Error> {
        let url = format!("redis://127.0.0.1:{}", proxy.port());
        Ok(RedisOptions::new()
            .timeout(Duration::from_secs(5))
            .connect(&url)
            .await?
            .store())
    }
}

fn advance(expected_revision: u64, next: u64) -> Advance {
    Advance {
        log: log("orders#a1"),
        next: Offset::new(next, 7),
        expected_revision,
        windows: vec![],
        forgotten: vec![],
    }
}

fn log(id: &str) -> LogId {
    let (name, incarnation) = id.split_once('#').unwrap_or((id, ""));
    let log = LogId::new(name).expect("a log's name");
    match incarnation {
        "" => log,
        incarnation => log.with_incarnation(incarnation).expect("an incarnation"),
    }
}

fn command(text: &str) -> Cmd {
    let mut command = Cmd::new();
    for word in text.split(' ') {
        command.arg(word);
    }
    command
}

fn producer(name: &str) -> ProducerId {
    ProducerId::new(name).expect("a producer's name")
}

/// The error with its causes.
#[track_caller]
fn told<T>(result: Result<T, Error>) -> String {
    let Err(error) = result else { panic!("it did not fail") };
    let mut text = format!("{error:?} {error}");
    let mut cause = error.source();
    while let Some(error) = cause {
        text += &format!(" {error:?} {error}");
        cause = error.source();
    }
    text
}

macro_rules! assert_error {
    ($result:expr, $kind:pat, $($text:expr),*) => {{
        let result = $result;
        assert!(matches!(&result, Err($kind)), "{result:?}");
        let _text = told(result);
        $(assert!(_text.contains($text), "{:?} is missing in {_text}", $text);)*
    }};
}

// What is committed -----------------------------------------------------------------------------------------------------

async fn what_is_committed_is_there() -> Outcome {
    let stage = Stage::start().await?;
    assert_eq!(stage.store.position(&stage.consumer).await?, None);
    let mut tx = stage.begin().await?;
    tx.put(b"a", b"1").await?;
    tx.put(b"b", b"\0\xff\r\n").await?;
    tx.put(b"", b"").await?;
    tx.commit(Advance {
        windows: vec![(producer("p"), Window::new(5))],
        ..advance(0, 3)
    })
    .await?;
    let again = Redis::connect(&stage.server.url()).await?.store();
    let position = again.position(&stage.consumer).await?.expect("a position");
    assert_eq!(position.log, log("orders#a1"));
    assert_eq!(position.next, Offset::new(3, 7));
    assert_eq!(position.revision, 1);
    assert_eq!(position.windows, [(producer("p"), Window::new(5))]);
    let mut tx = again.begin(&stage.consumer).await?;
    assert_eq!(tx.get(b"a").await?.as_deref(), Some(&b"1"[..]));
    assert_eq!(tx.get(b"b").await?.as_deref(), Some(&b"\0\xff\r\n"[..]));
    assert_eq!(tx.get(b"").await?.as_deref(), Some(&b""[..]));
    tx.delete(b"a").await?;
    tx.commit(advance(1, 2)).await?;
    assert_eq!(stage.value("a").await?, None);
    assert_eq!(stage.value("").await?.as_deref(), Some(""));
    let position = again.position(&stage.consumer).await?.expect("a position");
    assert_eq!(
        (position.next, position.revision),
        (Offset::new(2, 7), 2),
        "a seek goes back"
    );
    Ok(())
}

async fn windows_are_replaced_and_forgotten() -> Outcome {
    let stage = Stage::start().await?;
    let many = (0..5_000)
        .map(|number| (producer(&format!("p{number}")), Window::new(number)))
        .collect();
    stage
        .begin()
        .await?
        .commit(Advance {
            windows: many,
            ..advance(0, 1)
        })
        .await?;
    let change = Advance {
        windows: vec![(producer("p1"), Window::new(9)), (producer("new"), Window::new(8))],
        forgotten: (10..5_000).map(|number| producer(&format!("p{number}"))).collect(),
        ..advance(1, 2)
    };
    stage.begin().await?.commit(change).await?;
    let windows = stage
        .store
        .position(&stage.consumer)
        .await?
        .expect("a position")
        .windows;
    assert_eq!(windows.len(), 11);
    for (name, window) in [("p0", 0), ("p1", 9), ("p9", 9), ("new", 8)] {
        assert!(windows.contains(&(producer(name), Window::new(window))), "{name}");
    }
    Ok(())
}

async fn large_numbers_round_trip() -> Outcome {
    let stage = Stage::start().await?;
    stage.commit(0, []).await?;
    // Lua's numbers would lose the last digits.
    let revision = (1_u64 << 53) + 1;
    stage.ask(&format!("HSET essentially-once:{{c}}:position revision {revision}"))?;
    let largest = Advance {
        next: Offset::new(u64::MAX, u64::MAX),
        ..advance(revision, 0)
    };
    assert_error!(
        stage.begin().await?.commit(advance(revision - 1, 0)).await,
        Error::Fenced { .. },
    );
    stage.begin().await?.commit(largest).await?;
    let position = stage.store.position(&stage.consumer).await?.expect("a position");
    assert_eq!(
        (position.next, position.revision),
        (Offset::new(u64::MAX, u64::MAX), revision + 1)
    );
    Ok(())
}

async fn a_stale_revision_is_fenced() -> Outcome {
    let stage = Stage::start().await?;
    stage.commit(0, []).await?;
    stage.commit(1, []).await?;
    for stale in [0, 1, 3, u64::MAX] {
        let mut tx = stage.begin().await?;
        tx.put(b"a", b"1").await?;
        let windows = vec![(producer("p"), Window::new(5))];
        let result = tx
            .commit(Advance {
                windows,
                ..advance(stale, 9)
            })
            .await;
        assert!(
            matches!(&result, Err(Error::Fenced { expected, .. }) if *expected == stale),
            "{result:?}"
        );
    }
    let position = stage.store.position(&stage.consumer).await?.expect("a position");
    assert_eq!(
        (position.revision, position.windows.len(), position.next),
        (2, 0, Offset::new(2, 7))
    );
    assert_eq!(stage.value("a").await?, None);
    Ok(())
}

async fn one_of_two_racing_stores_wins() -> Outcome {
    let stage = Arc::new(Stage::start().await?);
    let mut racers = tokio::task::JoinSet::new();
    for _ in 0..2 {
        let (stage, redis) = (Arc::clone(&stage), Redis::connect(&stage.server.url()).await?);
        racers.spawn(async move {
            let mut won = 0;
            let store = redis.store();
            for round in 0..300 {
                let mut tx = store.begin(&stage.consumer).await?;
                tx.command(command("INCR won")).await?;
                match tx.commit(advance(round, round)).await {
                    Ok(()) => won += 1,
                    Err(Error::Fenced { .. }) => {}
                    Err(error) => return Err(error),
                }
                while stage.revision().await? <= round {
                    tokio::task::yield_now().await;
                }
            }
            Ok(won)
        });
    }
    let mut won = 0;
    while let Some(racer) = racers.join_next().await {
        won += racer??;
    }
    assert_eq!(
        (won, stage.revision().await?, stage.ask("GET won")?.as_str()),
        (300, 300, "300")
    );
    Ok(())
}

async fn a_missing_position_has_revision_0() -> Outcome {
    let stage = Stage::start().await?;
    assert_error!(stage.commit(1, [command("SET a 1")]).await, Error::Fenced { .. },);
    assert_eq!(stage.ask("DBSIZE")?, "0");
    Ok(())
}

async fn another_log_is_refused() -> Outcome {
    let stage = Stage::start().await?;
    stage.commit(0, []).await?;
    for other in ["invoices#a1", "orders#b2", "invoices"] {
        let mut tx = stage.begin().await?;
        tx.put(b"a", b"1").await?;
        match tx
            .commit(Advance {
                log: log(other),
                ..advance(1, 9)
            })
            .await
        {
            Err(Error::WrongLog { stored, given, .. }) => assert_eq!((stored, given), (log("orders#a1"), log(other))),
            result => panic!("{other}: {result:?}"),
        }
    }
    assert_eq!(stage.value("a").await?, None);
    assert_eq!(stage.revision().await?, 1);
    stage
        .begin()
        .await?
        .commit(Advance {
            log: log("orders"),
            ..advance(1, 9)
        })
        .await?;
    let position = stage.store.position(&stage.consumer).await?.expect("a position");
    assert_eq!(position.log, log("orders#a1"), "what is known stays");
    Ok(())
}

async fn an_incarnation_is_filled_in() -> Outcome {
    let stage = Stage::start().await?;
    stage
        .begin()
        .await?
        .commit(Advance {
            log: log("orders"),
            ..advance(0, 1)
        })
        .await?;
    assert_eq!(
        stage.store.position(&stage.consumer).await?.expect("a position").log,
        log("orders")
    );
    stage.commit(1, []).await?;
    assert_eq!(
        stage.store.position(&stage.consumer).await?.expect("a position").log,
        log("orders#a1")
    );
    Ok(())
}

async fn a_transaction_reads_its_own_writes() -> Outcome {
    let stage = Stage::start().await?;
    let mut tx = stage.begin().await?;
    tx.put(b"a", b"1").await?;
    tx.put(b"b", b"1").await?;
    tx.commit(advance(0, 1)).await?;
    let mut tx = stage.begin().await?;
    assert_eq!(tx.get(b"a").await?.as_deref(), Some(&b"1"[..]));
    tx.put(b"a", b"2").await?;
    assert_eq!(tx.get(b"a").await?.as_deref(), Some(&b"2"[..]));
    tx.delete(b"a").await?;
    assert_eq!(tx.get(b"a").await?, None);
    tx.delete(b"b").await?;
    tx.put(b"b", b"3").await?;
    tx.put(b"c", b"4").await?;
    tx.delete(b"c").await?;
    assert_eq!(tx.get(b"c").await?, None);
    assert_eq!(stage.value("a").await?.as_deref(), Some("1"), "others do not see it");
    tx.commit(advance(1, 2)).await?;
    assert_eq!(stage.value("a").await?, None);
    assert_eq!(stage.value("b").await?.as_deref(), Some("3"));
    assert_eq!(stage.value("c").await?, None);
    Ok(())
}

async fn a_transaction_that_is_dropped_leaves_nothing() -> Outcome {
    let stage = Stage::start().await?;
    let mut tx = stage.begin().await?;
    tx.put(b"a", b"1").await?;
    tx.command(command("SET x 1")).await?;
    drop(tx);
    let mut tx = stage.begin().await?;
    tx.command(command("SET x 1")).await?;
    tx.rollback().await?;
    assert_eq!(stage.ask("DBSIZE")?, "0");
    Ok(())
}

async fn consumers_and_prefixes_are_apart() -> Outcome {
    let stage = Stage::start().await?;
    let other_prefix = RedisOptions::new()
        .prefix("other")
        .connect(&stage.server.url())
        .await?
        .store();
    let mut tx = stage.begin().await?;
    tx.put(b"a", b"1").await?;
    tx.commit(advance(0, 1)).await?;
    for (store, consumer) in [(&stage.store, "d"), (&stage.store, "c:d"), (&other_prefix, "c")] {
        let consumer = ConsumerId::new(consumer)?;
        assert_eq!(store.position(&consumer).await?, None);
        assert_eq!(store.begin(&consumer).await?.get(b"a").await?, None);
    }
    Ok(())
}

async fn keys_of_another_type_are_refused() -> Outcome {
    for kind in ["position", "windows", "state"] {
        let stage = Stage::start().await?;
        let key = format!("essentially-once:{{c}}:{kind}");
        stage.ask(&format!("SET {key} 1"))?;
        let mut tx = stage.begin().await?;
        tx.command(command("SET x 1")).await?;
        tx.put(b"a", b"1").await?;
        let windows = vec![(producer("p"), Window::new(5))];
        let result = tx
            .commit(Advance {
                windows,
                ..advance(0, 1)
            })
            .await;
        assert_error!(result, Error::Failed { .. }, &key, "WRONGTYPE", "another type");
        assert_eq!(stage.ask("DBSIZE")?, "1", "{kind}: nothing was applied");
        if kind == "state" {
            assert_error!(stage.value("a").await, Error::Failed { .. }, &key, "WRONGTYPE");
        } else {
            assert_error!(stage.revision().await, Error::Failed { .. }, "WRONGTYPE", "consumer c");
        }
    }
    Ok(())
}

async fn garbage_in_our_hashes_is_an_error() -> Outcome {
    let stage = Stage::start().await?;
    let key = "essentially-once:{c}:position";
    for (fields, about) in [
        ("x y", "\"log\" is missing"),
        ("log orders revision 1", "\"next\" is missing"),
        ("log orders next 1", "\"revision\" is missing"),
        ("log orders next -- revision 1", "--"),
        ("log orders next 1 revision -1", "invalid digit"),
        ("log {} next 1 revision 1", "name"),
    ] {
        stage.ask(&format!("DEL {key}"))?;
        stage.ask(&format!("HSET {key} {fields}"))?;
        assert_error!(stage.revision().await, Error::Failed { .. }, key, about);
    }
    stage.ask(&format!("HSET {key} log orders next 1 revision 1"))?;
    assert_eq!(stage.revision().await?, 1);
    stage.ask("HSET essentially-once:{c}:windows p garbage")?;
    assert_error!(
        stage.revision().await,
        Error::Failed { .. },
        "essentially-once:{c}:windows"
    );
    stage
        .server
        .command(&[&b"HSET"[..], key.as_bytes(), b"log", b"\xff\xfe"])?;
    assert_error!(stage.revision().await, Error::Failed { .. }, "utf-8");
    // A commit finds another log there, whose name cannot be told.
    assert_error!(stage.commit(1, []).await, Error::Failed { .. }, "name");
    Ok(())
}

async fn sizes_are_limited() -> Outcome {
    let stage = Stage::with(RedisOptions::new().record_limit(100)).await?;
    let mut tx = stage.begin().await?;
    let (fits, too_large) = ([b'x'; 100], [b'x'; 101]);
    assert_error!(
        tx.put(&too_large, b"").await,
        Error::TooLarge {
            what: "key",
            size: 101,
            limit: 100
        },
    );
    assert_error!(tx.put(b"a", &too_large).await, Error::TooLarge { what: "value", .. },);
    tx.put(&fits, &fits).await?;
    tx.commit(advance(0, 1)).await?;
    assert_eq!(stage.ask("HLEN essentially-once:{c}:state")?, "1");
    Ok(())
}

// Native commands -------------------------------------------------------------------------------------------------------

async fn commands_run_in_the_same_step() -> Outcome {
    let stage = Stage::start().await?;
    let all = [
        "HINCRBY freight Brazil 32",
        "HINCRBY freight Brazil 10",
        "RPUSH list a b c d e f g h i",
        "RPUSH list j",
        "DEL list2",
        "SADD set a",
        "SADD set b",
        "INCR count",
        "XADD stream * field value",
        "ZUNIONSTORE zset 1 set",
        "PUBLISH channel message",
        "EXPIRE set 100",
    ];
    stage.commit(0, all.map(command)).await?;
    assert_eq!(stage.ask("HGET freight Brazil")?, "42");
    assert_eq!(stage.ask("LRANGE list 0 -1")?, "a b c d e f g h i j");
    assert_eq!(stage.ask("SCARD set")?, "2");
    assert_eq!(stage.ask("GET count")?, "1");
    assert_eq!(stage.ask("XLEN stream")?, "1");
    assert_eq!(stage.ask("ZCARD zset")?, "2");
    assert_eq!(stage.revision().await?, 1);
    Ok(())
}

async fn a_fenced_commit_runs_no_command() -> Outcome {
    let stage = Stage::start().await?;
    stage.commit(0, []).await?;
    assert_error!(stage.commit(0, [command("SET a 1")]).await, Error::Fenced { .. },);
    assert_eq!(stage.ask("EXISTS a")?, "0");
    Ok(())
}

async fn the_wrong_type_is_found_before_the_first_write() -> Outcome {
    let stage = Stage::start().await?;
    stage.ask("SET text 1")?;
    stage.ask("RPUSH list 1")?;
    let wrong = [
        "HSET text a 1",
        "HINCRBY list a 1",
        "RPUSH text a",
        "LMOVE empty text LEFT RIGHT",
        "SADD text a",
        "SMOVE empty text a",
        "ZADD text 1 a",
        "INCR list",
        "APPEND list a",
        "PFADD list a",
        "XADD text * a b",
        "XGROUP CREATE text group $ MKSTREAM",
    ];
    for wrong in wrong {
        let result = stage.commit(0, ["SET before 1", wrong].map(command)).await;
        let key = if wrong.contains("text") { "(text)" } else { "(list)" };
        assert_error!(result, Error::Failed { .. }, key, "WRONGTYPE");
        assert_eq!(stage.ask("EXISTS before")?, "0", "{wrong}");
    }
    assert_eq!(stage.revision().await?, 0);
    Ok(())
}

async fn a_number_that_is_none_is_found_before_the_first_write() -> Outcome {
    let stage = Stage::start().await?;
    stage.ask("HSET hash text abc zero 0 number -12 padded 012 float 1.5 empty1 1")?;
    stage.ask("SET text 0x10")?;
    for wrong in [
        "HINCRBY hash text 1",
        "HINCRBY hash padded 1",
        "HINCRBY hash float 1",
        "INCR text",
        "DECRBY text 2",
    ] {
        let result = stage.commit(0, ["SET before 1", wrong].map(command)).await;
        assert_error!(result, Error::Failed { .. }, "holds no integer");
        assert_eq!(stage.ask("EXISTS before")?, "0", "{wrong}");
    }
    for wrong in [
        "HINCRBY hash zero one",
        "INCRBY new 1.5",
        "DECRBY new 99999999999999999999",
    ] {
        assert_error!(
            stage.commit(0, [command(wrong)]).await,
            Error::Failed { .. },
            "not an integer"
        );
    }
    let fine = [
        "HINCRBY hash zero 1",
        "HINCRBY hash number 1",
        "HINCRBY hash new 1",
        "INCR new",
        "HINCRBY hash zero 1",
    ];
    stage.commit(0, fine.map(command)).await?;
    assert_eq!(stage.ask("HMGET hash zero number new")?, "2 -11 1");
    // Many fields are read in pieces.
    stage.ask("HSET hash 2500 abc")?;
    let many = (0..3_000).map(|field| command(&format!("HINCRBY hash {field} 1")));
    assert_error!(
        stage.commit(1, many).await,
        Error::Failed { .. },
        "\"2500\" in \"hash\""
    );
    assert_eq!(stage.ask("HEXISTS hash 0")?, "0");
    Ok(())
}

async fn what_the_transaction_itself_writes_is_not_checked() -> Outcome {
    let stage = Stage::start().await?;
    for key in ["a", "b", "c", "d"] {
        stage.ask(&format!("SET {key} text"))?;
    }
    let commands = [
        "DEL a",
        "HSET a f 1",
        "SET b 1",
        "INCR b",
        "RENAME c e",
        "SADD c x",
        "GETDEL d",
        "LPUSH d x",
        "HSET h f 1",
        "HINCRBY h f 1",
    ];
    stage.commit(0, commands.map(command)).await?;
    assert_eq!(stage.ask("GET b")?, "2");
    Ok(())
}

async fn counting_together_is_counting_one_by_one() -> Outcome {
    let stage = Stage::start().await?;
    let kinds = [
        "HINCRBY h f 1",
        "HINCRBY h f -20",
        "HINCRBY h g 300",
        "hincrby h f 7",
        "HSET h f 5",
        "DEL h",
        "INCRBY n 2",
        "INCRBY n -30",
        "INCR n",
        "DECRBY n 4",
        "SET n 6",
        "HINCRBY i f 8",
        "RENAME h i",
        "HDEL h f",
        "HINCRBY h f 0",
        "COPY h i REPLACE",
        "SET h:f 1",
    ];
    let state = || Ok::<_, Source>((stage.ask("HGETALL h")?, stage.ask("HGETALL i")?, stage.ask("GET n")?));
    let mut random = fastrand::Rng::with_seed(7);
    let mut revision = 0;
    for _ in 0..300 {
        let commands: Vec<&str> = (0..random.usize(1..25))
            .map(|_| kinds[random.usize(..kinds.len())])
            .collect();
        stage.ask("DEL h i n")?;
        stage.ask("HSET h f 100 g 0")?;
        if commands.iter().any(|command| stage.ask(command).is_err()) {
            continue;
        }
        let expected = state()?;
        stage.ask("DEL h i n")?;
        stage.ask("HSET h f 100 g 0")?;
        stage
            .commit(revision, commands.iter().map(|text| command(text)))
            .await?;
        revision += 1;
        assert_eq!(state()?, expected, "{commands:?}");
    }
    assert!(revision > 100, "{revision}");
    stage.ask("CONFIG RESETSTAT")?;
    let counting = (0..100).map(|number| command(&format!("HINCRBY h field{} 1", number % 10)));
    stage.commit(revision, counting).await?;
    let stats = stage.ask("INFO commandstats")?;
    assert!(stats.contains("cmdstat_hincrby:calls=10,"), "{stats}");
    Ok(())
}

async fn sums_that_overflow_are_counted_one_by_one() -> Outcome {
    let stage = Stage::start().await?;
    stage.ask("HSET h f -9000000000000000000")?;
    let large = ["HINCRBY h f 9000000000000000000", "HINCRBY h f 9000000000000000000"];
    stage.commit(0, large.map(command)).await?;
    assert_eq!(stage.ask("HGET h f")?, "9000000000000000000");
    Ok(())
}

async fn a_first_command_that_fails_applies_nothing() -> Outcome {
    let stage = Stage::start().await?;
    stage.ask("RPUSH list a")?;
    let result = stage.commit(0, ["LSET list 5 x", "SET a 1"].map(command)).await;
    assert_error!(result, Error::Failed { .. }, "LSET list", "index out of range");
    assert_eq!((stage.revision().await?, stage.ask("EXISTS a")?.as_str()), (0, "0"));
    stage.commit(0, [command("SET a 1")]).await?;
    Ok(())
}

async fn a_later_command_that_fails_blocks_the_consumer() -> Outcome {
    let stage = Stage::start().await?;
    stage.ask("RPUSH list a")?;
    stage.ask("XADD stream 5-1 a b")?;
    stage.commit(0, []).await?;
    for (round, failing) in ["LSET list 5 secret", "XADD stream 1-1 a secret"]
        .into_iter()
        .enumerate()
    {
        let revision = 1 + round as u64;
        let mut tx = stage.begin().await?;
        tx.put(b"state", b"1").await?;
        for text in ["SET a 1", "INCR count", failing, "SET b 1"] {
            tx.command(command(text)).await?;
        }
        let text = told(tx.commit(advance(revision, 9)).await);
        for part in [
            "PartiallyApplied",
            "2 commands were applied",
            &failing[..9],
            "resolve_partial",
            "consumer c",
        ] {
            assert!(text.contains(part), "{part:?} is missing in {text}");
        }
        assert!(!text.contains("secret"), "{text}");
        assert_eq!(stage.ask("MGET a b")?, "1 ");
        // It stays, for everybody and across a restart.
        stage.server.restart()?;
        stage.revision().await.expect_err("the connection is gone");
        let other = Redis::connect(&stage.server.url()).await?.store();
        for expected in [revision, revision + 1] {
            let result = other.begin(&stage.consumer).await?.commit(advance(expected, 9)).await;
            assert_error!(result, Error::PartiallyApplied { .. }, "2 commands were applied");
        }
        assert_error!(
            other.position(&stage.consumer).await,
            Error::PartiallyApplied { .. },
            "2 commands were applied"
        );
        other.resolve_partial(&stage.consumer).await?;
        assert_error!(
            other.resolve_partial(&stage.consumer).await,
            Error::Failed { .. },
            "none is applied in part"
        );
        let position = other.position(&stage.consumer).await?.expect("a position");
        assert_eq!(
            (position.revision, position.next),
            (revision + 1, Offset::new(1, 7)),
            "it did not move"
        );
        let state = other.begin(&stage.consumer).await?.get(b"state").await?;
        assert_eq!(state, None);
    }
    stage.commit(3, [command("SET a 2")]).await?;
    Ok(())
}

async fn a_first_commit_applied_in_part_can_be_resolved() -> Outcome {
    let stage = Stage::start().await?;
    stage.ask("RPUSH list a")?;
    let result = stage.commit(0, ["SET a 1", "LSET list 5 x"].map(command)).await;
    assert_error!(result, Error::PartiallyApplied { .. }, "LSET list");
    assert_error!(stage.commit(0, []).await, Error::PartiallyApplied { .. },);
    stage.store.resolve_partial(&stage.consumer).await?;
    assert_eq!(stage.store.position(&stage.consumer).await?, None);
    stage.commit(0, []).await?;
    Ok(())
}

async fn other_instances_are_fenced_after_a_partial_commit() -> Outcome {
    let stage = Stage::start().await?;
    stage.ask("RPUSH list a")?;
    stage.commit(0, []).await?;
    let mut overtaken = stage.begin().await?;
    overtaken.command(command("SET overtaken 1")).await?;
    let result = stage.commit(1, ["SET a 1", "LSET list 5 x"].map(command)).await;
    assert_error!(result, Error::PartiallyApplied { .. },);
    stage.store.resolve_partial(&stage.consumer).await?;
    assert_error!(overtaken.commit(advance(1, 9)).await, Error::Fenced { .. },);
    assert_eq!(stage.ask("EXISTS overtaken")?, "0");
    Ok(())
}

async fn unfit_commands_are_refused_at_once() -> Outcome {
    let stage = Stage::start().await?;
    let mut tx = stage.begin().await?;
    for (unfit, why) in [
        ("NOSUCH a", "no such command"),
        ("HSET a", "too few or too many"),
        ("INCR a b", "too few or too many"),
        ("XGROUP", "writes nothing"),
        ("XGROUP NOSUCH a", "no such command"),
        ("GET a", "use `query`"),
        ("SELECT 1", "writes nothing"),
        ("FLUSHALL", "names no key"),
        ("FLUSHDB", "names no key"),
        ("SWAPDB 0 1", "names no key"),
        ("BLPOP a 0", "may wait"),
        ("XREADGROUP GROUP g c STREAMS s >", "may wait"),
        ("MULTI", "atomic step"),
        ("EVAL return 0", "atomic step"),
        ("SUBSCRIBE a", "atomic step"),
        ("CONFIG SET maxmemory 1", "atomic step"),
        ("MIGRATE h 1 k 0 1", "atomic step"),
        ("SHUTDOWN", "atomic step"),
    ] {
        assert_error!(
            tx.command(command(unfit)).await,
            Error::Failed { .. },
            why,
            unfit.split(' ').next().unwrap_or_default()
        );
    }
    assert_error!(tx.command(Cmd::new()).await, Error::Failed { .. }, "empty");
    let mut long = cmd("RPUSH");
    long.arg("list").arg(vec![1; 7_000]);
    assert_error!(tx.command(long).await, Error::Failed { .. }, "split it");
    tx.command(command("SET fine 1")).await?;
    tx.commit(advance(0, 1)).await?;
    assert_eq!(stage.ask("GET fine")?, "1");
    Ok(())
}

async fn keys_of_stores_are_refused() -> Outcome {
    let stage = Stage::start().await?;
    let mut tx = stage.begin().await?;
    for kind in ["position", "windows", "state"] {
        for consumer in ["c", "another"] {
            let key = format!("essentially-once:{{{consumer}}}:{kind}");
            for touching in [
                format!("HSET {key} a b"),
                format!("DEL x {key}"),
                format!("RENAME x {key}"),
                format!("ZUNIONSTORE {key} 1 x"),
            ] {
                assert_error!(
                    tx.command(command(&touching)).await,
                    Error::Failed { .. },
                    "belongs to a store"
                );
            }
        }
    }
    tx.command(command("SET essentially-once:{c}:mine 1")).await?;
    Ok(())
}

async fn subcommands_are_known() -> Outcome {
    let stage = Stage::start().await?;
    stage
        .commit(
            0,
            [
                "xgroup create stream group $ mkstream",
                "XGROUP CREATECONSUMER stream group me",
            ]
            .map(command),
        )
        .await?;
    let consumers = stage.server.command(&["XINFO", "CONSUMERS", "stream", "group"])?;
    assert_eq!(consumers.list().len(), 1);
    Ok(())
}

async fn queries_read_now() -> Outcome {
    let stage = Stage::start().await?;
    stage.ask("SET a 5")?;
    let mut tx = stage.begin().await?;
    tx.command(command("SET a 6")).await?;
    assert_eq!(tx.query::<i64>(command("GET a")).await?, 5);
    assert_eq!(tx.query::<Option<i64>>(command("GET b")).await?, None);
    assert_eq!(tx.query::<String>(command("OBJECT ENCODING a")).await?, "int");
    for (unfit, why) in [
        ("SET a 1", "not a reading command"),
        ("XREAD BLOCK 0 STREAMS a 0", "may wait"),
        ("GET", "too few"),
    ] {
        assert_error!(tx.query::<i64>(command(unfit)).await, Error::Failed { .. }, why);
    }
    assert_error!(
        tx.query::<i64>(command("LLEN a")).await,
        Error::Failed { .. },
        "WRONGTYPE"
    );
    stage.ask("SET text abc")?;
    assert_error!(
        tx.query::<i64>(command("GET text")).await,
        Error::Failed { .. },
        "run GET"
    );
    assert_eq!(
        tx.query::<i64>(command("GET a")).await?,
        5,
        "the connection is still good"
    );
    assert_eq!((tx.hash_tag().as_str(), tx.consumer()), ("{c}", &stage.consumer));
    Ok(())
}

// Servers in trouble ----------------------------------------------------------------------------------------------------

async fn a_full_server_applies_nothing() -> Outcome {
    let stage = Stage::start().await?;
    stage.commit(0, [command("SET x 1")]).await?;
    stage.ask("CONFIG SET maxmemory 100kb")?;
    let full: [&[&str]; 3] = [&[], &["INCR count"], &["INCR count", "RPUSH list a"]];
    for commands in full {
        let mut tx = stage.begin().await?;
        tx.put(b"a", b"1").await?;
        for text in commands {
            tx.command(command(text)).await?;
        }
        let windows = vec![(producer("p"), Window::new(5))];
        let result = tx
            .commit(Advance {
                windows,
                ..advance(1, 2)
            })
            .await;
        assert_error!(result, Error::Unavailable { .. }, "OOM", "maxmemory");
        assert_eq!((stage.revision().await?, stage.ask("DBSIZE")?.as_str()), (1, "2"));
    }
    assert_error!(stage.commit(1, []).await, Error::Unavailable { .. }, "OOM");
    // One that begins by freeing memory goes through as a whole.
    stage.commit(1, ["DEL x", "RPUSH list a"].map(command)).await?;
    stage.ask("CONFIG SET maxmemory 0")?;
    stage.commit(2, [command("INCR count")]).await?;
    assert_eq!((stage.revision().await?, stage.ask("LLEN list")?.as_str()), (3, "1"));
    Ok(())
}

async fn a_request_that_is_lost_did_nothing() -> Outcome {
    cut(Cut::BeforeRequest, 1).await
}

async fn a_reply_that_is_lost_is_found_out() -> Outcome {
    cut(Cut::BeforeReply, 2).await
}

async fn cut(moment: Cut, revision: u64) -> Outcome {
    let stage = Stage::start().await?;
    let proxy = Proxy::start(stage.server.port())?;
    let store = stage.through(&proxy).await?;
    store.begin(&stage.consumer).await?.commit(advance(0, 1)).await?;
    proxy.cut_at(b"EVALSHA", moment);
    let mut tx = store.begin(&stage.consumer).await?;
    tx.put(b"a", b"1").await?;
    assert_error!(
        tx.commit(advance(1, 2)).await,
        Error::Indeterminate { .. },
        "commit",
        "consumer c"
    );
    assert!(proxy.wait_fired(1, Duration::from_secs(10)));
    let position = store.position(&stage.consumer).await?.expect("a position");
    assert_eq!((position.revision, position.next), (revision, Offset::new(revision, 7)));
    assert_eq!(stage.value("a").await?.is_some(), revision == 2);
    store.begin(&stage.consumer).await?.commit(advance(revision, 5)).await?;
    Ok(())
}

async fn a_late_commit_is_fenced() -> Outcome {
    let stage = Stage::start().await?;
    let proxy = Proxy::start(stage.server.port())?;
    let url = format!("redis://127.0.0.1:{}", proxy.port());
    let slow = RedisOptions::new()
        .timeout(Duration::from_millis(300))
        .connect(&url)
        .await?
        .store();
    slow.begin(&stage.consumer).await?.commit(advance(0, 1)).await?;
    let mut late = slow.begin(&stage.consumer).await?;
    late.command(command("SET late 1")).await?;
    proxy.hold(true);
    assert_error!(late.commit(advance(1, 2)).await, Error::Indeterminate { .. },);
    stage.commit(1, [command("SET other 1")]).await?;
    proxy.hold(false);
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!((stage.revision().await?, stage.ask("EXISTS late")?.as_str()), (2, "0"));
    assert_eq!(
        slow.position(&stage.consumer).await?.map(|position| position.revision),
        Some(2)
    );
    Ok(())
}

async fn what_was_acknowledged_survives_kills() -> Outcome {
    let stage = Arc::new(Stage::start().await?);
    let (mut acknowledged, mut kills) = (0, 0);
    let deadline = Instant::now() + Duration::from_secs(30);
    while kills < 5 && Instant::now() < deadline {
        let server = Arc::clone(&stage);
        let killer = tokio::task::spawn_blocking(move || {
            std::thread::sleep(Duration::from_millis(30));
            server.server.restart().map_err(|error| error.to_string())
        });
        loop {
            let mut tx = stage.begin().await?;
            tx.put(b"count", (acknowledged + 1).to_string().as_bytes()).await?;
            let result = match tx.command(command("INCR count")).await {
                Ok(()) => tx.commit(advance(acknowledged, acknowledged + 1)).await,
                Err(error) => Err(error),
            };
            match result {
                Ok(()) => acknowledged += 1,
                Err(error) if error.is_transient() => break,
                Err(error) => return Err(error.into()),
            }
        }
        killer.await??;
        kills += 1;
        let stored = loop {
            match stage.revision().await {
                Ok(stored) => break stored,
                Err(Error::Unavailable { .. }) if Instant::now() < deadline => tokio::task::yield_now().await,
                Err(error) => return Err(error.into()),
            }
        };
        assert!(
            stored == acknowledged || stored == acknowledged + 1,
            "{stored} of {acknowledged}"
        );
        assert_eq!(stage.ask("GET count")?, stored.to_string(), "all or nothing");
        assert_eq!(stage.value("count").await?, Some(stored.to_string()));
        acknowledged = stored;
    }
    assert!(kills == 5 && acknowledged > 5, "{acknowledged} commits");
    Ok(())
}

async fn a_forgotten_script_is_sent_again() -> Outcome {
    let stage = Stage::start().await?;
    for revision in 0..3 {
        stage.ask("SCRIPT FLUSH")?;
        stage.commit(revision, [command("INCR count")]).await?;
    }
    stage.server.restart()?;
    stage.revision().await.expect_err("the connection is gone");
    stage.commit(3, [command("INCR count")]).await?;
    assert_eq!(stage.ask("GET count")?, "4");
    Ok(())
}

// Set-up ----------------------------------------------------------------------------------------------------------------

async fn settings_that_lose_data_are_named() -> Outcome {
    let stage = Stage::start().await?;
    assert_eq!(stage.store.durability().await?, Durability::Durable);
    for (settings, undo, named) in [
        ("appendfsync everysec", "appendfsync always", "set `appendfsync always`"),
        ("appendfsync no", "appendfsync always", "set `appendfsync always`"),
        (
            "no-appendfsync-on-rewrite yes",
            "no-appendfsync-on-rewrite no",
            "set `no-appendfsync-on-rewrite no`",
        ),
        (
            "maxmemory 1gb maxmemory-policy allkeys-lru",
            "maxmemory 0 maxmemory-policy noeviction",
            "`maxmemory-policy noeviction`",
        ),
        ("appendonly no", "appendonly yes", "set `appendonly yes`"),
    ] {
        stage.ask(&format!("CONFIG SET {settings}"))?;
        match stage.store.durability().await? {
            Durability::Volatile(why) => assert!(
                why.contains(named) && why.matches("set `").count() == 1,
                "{settings}: {why}"
            ),
            other => panic!("{settings}: {other:?}"),
        }
        stage.ask(&format!("CONFIG SET {undo}"))?;
    }
    stage.ask("CONFIG SET maxmemory 1gb maxmemory-policy volatile-lru")?;
    assert_eq!(stage.store.durability().await?, Durability::Durable);
    stage.ask("CONFIG SET maxmemory-policy allkeys-random appendfsync no")?;
    let replicated = RedisOptions::new()
        .min_replicas(2, Duration::from_millis(10))
        .connect(&stage.server.url())
        .await?;
    match replicated.store().durability().await? {
        Durability::Volatile(why) => {
            for part in [
                "appendfsync is no",
                "allkeys-random",
                "0 replicas are connected, and `min_replicas` asks for 2",
            ] {
                assert!(why.contains(part), "{why}");
            }
        }
        other => panic!("{other:?}"),
    }
    Ok(())
}

/// A store that signs in as a user with these rights.
async fn signed_in(stage: &Stage, rights: &str) -> Result<RedisStore, Source> {
    stage.ask(&format!("ACL SETUSER app reset on >hunter2 ~* &* {rights}"))?;
    let url = format!("redis://app:hunter2@127.0.0.1:{}", stage.server.port());
    Ok(Redis::connect(&url).await?.store())
}

async fn a_server_that_hides_its_settings_is_unknown() -> Outcome {
    let stage = Stage::start().await?;
    let store = signed_in(&stage, "+@all -config").await?;
    match store.durability().await? {
        Durability::Unknown(why) => assert!(why.contains("grant") && why.contains("config|get"), "{why}"),
        other => panic!("{other:?}"),
    }
    let store = signed_in(&stage, "+@all -config +config|get").await?;
    assert_eq!(store.durability().await?, Durability::Durable);
    Ok(())
}

async fn missing_permissions_are_named() -> Outcome {
    let stage = Stage::start().await?;
    let store = signed_in(&stage, "+@all -evalsha").await?;
    assert_error!(
        store.begin(&stage.consumer).await?.commit(advance(0, 1)).await,
        Error::Failed { .. },
        "evalsha",
        "ACL SETUSER"
    );
    let store = signed_in(&stage, "+@all -hgetall").await?;
    assert_error!(
        store.position(&stage.consumer).await,
        Error::Failed { .. },
        "HGETALL",
        "can't run this command"
    );
    let store = signed_in(&stage, "+@all -hget").await?;
    assert_error!(
        store.begin(&stage.consumer).await?.get(b"a").await,
        Error::Failed { .. },
        "hget",
        "ACL SETUSER"
    );
    let store = signed_in(&stage, "+@all -command").await?;
    let mut tx = store.begin(&stage.consumer).await?;
    assert_error!(
        tx.command(command("SET a 1")).await,
        Error::Failed { .. },
        "grant the user `command|info`"
    );
    // What the documentation asks for is enough.
    let store = signed_in(
        &stage,
        "+evalsha +eval +hget +hgetall +hmget +hset +hdel +incr +command|info +info +config|get",
    )
    .await?;
    let mut tx = store.begin(&stage.consumer).await?;
    tx.put(b"a", b"1").await?;
    tx.command(command("INCR count")).await?;
    tx.commit(advance(0, 1)).await?;
    assert_eq!(
        store.position(&stage.consumer).await?.map(|position| position.revision),
        Some(1)
    );
    let mut tx = store.begin(&stage.consumer).await?;
    assert_eq!(tx.get(b"a").await?.as_deref(), Some(&b"1"[..]));
    tx.delete(b"a").await?;
    tx.commit(advance(1, 2)).await?;
    Ok(())
}

async fn a_permission_missing_for_a_later_command_applies_nothing() -> Outcome {
    let stage = Stage::start().await?;
    stage.commit(0, []).await?;
    for (rights, named) in [
        ("-rpush", "RPUSH"),
        ("-hset", "HSET"),
        ("-hdel", "HDEL"),
        ("resetkeys ~essentially-once:*", "one of the keys"),
    ] {
        let store = signed_in(&stage, &format!("+@all {rights}")).await?;
        let mut tx = store.begin(&stage.consumer).await?;
        tx.delete(b"a").await?;
        tx.command(command("INCR count")).await?;
        tx.command(command("RPUSH list a")).await?;
        assert_error!(
            tx.commit(advance(1, 2)).await,
            Error::Failed { .. },
            "ACL SETUSER",
            named
        );
        assert_eq!(
            (stage.ask("DBSIZE")?.as_str(), stage.revision().await?),
            ("1", 1),
            "{rights}"
        );
    }
    Ok(())
}

async fn replicas_that_are_missing_leave_it_open() -> Outcome {
    let options = RedisOptions::new().min_replicas(1, Duration::from_millis(100));
    let stage = Stage::with(options.clone()).await?;
    assert_error!(
        stage.commit(0, [command("INCR count")]).await,
        Error::Indeterminate { .. },
        "only 0 of 1 replicas"
    );
    assert_eq!((stage.revision().await?, stage.ask("GET count")?.as_str()), (1, "1"));
    assert_error!(stage.commit(0, [command("INCR count")]).await, Error::Fenced { .. },);
    stage.ask("SCRIPT FLUSH")?;
    let replica = RedisServer::durable().replica_of(&stage.server).start()?;
    let deadline = Instant::now() + Duration::from_secs(60);
    let mut revision = 1;
    // Until it has caught up.
    while let Err(error) = stage.commit(revision, [command("INCR count")]).await {
        assert!(
            matches!(error, Error::Indeterminate { .. }) && Instant::now() < deadline,
            "{error}"
        );
        revision += 1;
    }
    assert_eq!(stage.store.durability().await?, Durability::Durable);
    assert_eq!(replica.command(&["GET", "count"])?.text(), (revision + 1).to_string());
    Ok(())
}

async fn large_transactions_are_taken() -> Outcome {
    let stage = Stage::start().await?;
    let mut tx = stage.begin().await?;
    for number in 0..20_000_u32 {
        tx.put(&number.to_be_bytes(), b"value").await?;
        tx.delete(format!("not there {number}").as_bytes()).await?;
    }
    for number in 0..5_000 {
        tx.command(command(&format!("HINCRBY hash {} {number}", number % 100)))
            .await?;
        tx.command(command(&format!("SET key{number} {number}"))).await?;
    }
    tx.put(b"large", &vec![7; 1_000_000]).await?;
    tx.command(cmd("SET").arg("large").arg(vec![8_u8; 1_000_000]).take())
        .await?;
    tx.command(cmd("RPUSH").arg("list").arg(vec![1; 6_998]).take()).await?;
    tx.commit(advance(0, 1)).await?;
    assert_eq!(stage.ask("HLEN essentially-once:{c}:state")?, "20001");
    assert_eq!(stage.ask("HSTRLEN essentially-once:{c}:state large")?, "1000000");
    assert_eq!(stage.ask("STRLEN large")?, "1000000");
    assert_eq!(stage.ask("LLEN list")?, "6998");
    assert_eq!(
        stage.ask("HGET hash 99")?,
        (0..5_000).filter(|number| number % 100 == 99).sum::<u32>().to_string()
    );
    assert_eq!(stage.ask("DBSIZE")?, "5005");
    let mut tx = stage.begin().await?;
    for number in 0..20_000_u32 {
        tx.delete(&number.to_be_bytes()).await?;
    }
    tx.commit(advance(1, 2)).await?;
    assert_eq!(stage.ask("HLEN essentially-once:{c}:state")?, "1");
    Ok(())
}

async fn resp3_is_spoken() -> Outcome {
    let stage = Stage::start().await?;
    stage.ask("RPUSH list a")?;
    let store = Redis::connect(&format!("{}/?protocol=resp3", stage.server.url()))
        .await?
        .store();
    let mut tx = store.begin(&stage.consumer).await?;
    tx.put(b"a", b"1").await?;
    tx.command(command("INCR count")).await?;
    let windows = vec![(producer("p"), Window::new(5))];
    tx.commit(Advance {
        windows,
        ..advance(0, 1)
    })
    .await?;
    assert_eq!(
        store
            .position(&stage.consumer)
            .await?
            .expect("a position")
            .windows
            .len(),
        1
    );
    assert_eq!(store.durability().await?, Durability::Durable);
    assert_error!(
        store.begin(&stage.consumer).await?.commit(advance(0, 1)).await,
        Error::Fenced { .. },
    );
    let mut tx = store.begin(&stage.consumer).await?;
    assert_eq!(tx.get(b"a").await?.as_deref(), Some(&b"1"[..]));
    tx.command(command("INCR count")).await?;
    tx.command(command("LSET list 5 x")).await?;
    assert_error!(
        tx.commit(advance(1, 2)).await,
        Error::PartiallyApplied { .. },
        "LSET list"
    );
    Ok(())
}

async fn passwords_are_never_shown() -> Outcome {
    let stage = Stage::start().await?;
    let port = stage.server.port();
    stage.ask("ACL SETUSER app reset on >hunter2 ~* &* +@all")?;
    let good = Redis::connect(&format!("redis://app:hunter2@127.0.0.1:{port}")).await?;
    let store = good.store();
    let tx = store.begin(&stage.consumer).await?;
    let mut texts = vec![format!("{good:?} {store:?} {tx:?}")];
    for url in [
        format!("redis://app:hunter2-wrong@127.0.0.1:{port}"),
        "redis://app:hunter2@no-such-host.invalid:6379".into(),
        "redis://app:hunter2@127.0.0.1:1".into(),
        "redis://app:hunter2@127.0.0.1:port".into(),
        "http://app:hunter2@127.0.0.1".into(),
    ] {
        texts.push(told(Redis::connect(&url).await));
    }
    stage.server.kill()?;
    texts.push(told(tx.commit(advance(0, 1)).await));
    texts.push(told(store.position(&stage.consumer).await));
    texts.push(told(store.durability().await));
    for text in texts {
        assert!(!text.contains("hunter2"), "{text}");
    }
    Ok(())
}
