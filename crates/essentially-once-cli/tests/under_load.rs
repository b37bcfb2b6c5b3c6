//! Each verb against a running consumer under load, on every store: it takes effect, and loses,
//! doubles or reorders nothing. Prints how long each call and each effect took.

#![expect(clippy::print_stdout, reason = "shown if a test fails, and with --nocapture")]

use std::{
    collections::BTreeMap,
    process::{Command, ExitCode, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use essentially_once::{
    CancellationToken, Consumer, ConsumerId, Error, Handler, HandlerError, KeyValue, Log, NewRecord, OffsetStore,
    Outbox as _, Record, async_trait,
    backend::{DeadLetters, Source},
    consumer::DeadLetterOptions,
    handler_fn,
    relay::Relay,
};
use essentially_once_kafka::{Kafka, LogOptions};
use essentially_once_postgres::Pg;
use essentially_once_rabbitmq::{Rabbit, RabbitTx};
use essentially_once_redis::Redis;
use essentially_once_sqlite::Sqlite;
use essentially_once_testkit::Suite;
use serde_json::Value;
use test_servers::{KafkaServer, PostgresServer, RabbitNode, RedisServer};
use tokio::{sync::watch, time::MissedTickBehavior};

/// How long to wait for an effect. On an idle machine, each comes within two seconds.
const SOON: Duration = Duration::from_secs(30);

/// How long a test may take.
const LIMIT: Duration = Duration::from_secs(240);

/// The time between two records, each of which is a commit.
const INTERVAL: Duration = Duration::from_millis(1);

/// The most orders that wait, on a machine that is too slow for the interval.
const BACKLOG: u64 = 1_000;

const KEYS: u64 = 10;
const SHIPPING: &str = "shipping";

/// Orders that are poison until the handler is mended.
const POISON: [u64; 4] = [100, 200, 300, 400];

fn main() -> ExitCode {
    let suite = Suite::new().async_test("sqlite::every_verb_takes_effect", LIMIT, sqlite);
    let name = "postgres::every_verb_takes_effect";
    let suite = match test_servers::postgres_bin() {
        Ok(_) => suite.async_test(name, LIMIT, postgres),
        Err(why) => suite.ignored(name, &why),
    };
    let name = "redis::every_verb_takes_effect";
    let suite = match test_servers::redis_server() {
        Ok(_) => suite.async_test(name, LIMIT, redis),
        Err(why) => suite.ignored(name, &why),
    };
    let name = "rabbitmq::every_verb_takes_effect";
    let suite = match test_servers::rabbitmq_server() {
        Ok(_) => suite.async_test(name, LIMIT, rabbitmq),
        Err(why) => suite.ignored(name, &why),
    };
    let name = "rabbitmq::looking_creates_nothing_and_shows_outboxes";
    let suite = match test_servers::rabbitmq_server() {
        Ok(_) => suite.async_test(name, LIMIT, rabbitmq_streams),
        Err(why) => suite.ignored(name, &why),
    };
    let name = "kafka_to_sqlite::every_verb_takes_effect";
    let suite = match test_servers::kafka_server() {
        Ok(_) => suite.async_test(name, LIMIT, kafka_to_sqlite),
        Err(why) => suite.ignored(name, &why),
    };
    suite.run()
}

async fn sqlite() -> Result<(), Source> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("shop.db");
    let sqlite = Sqlite::open(&path).await?;
    let log = sqlite.log("orders").await?;
    let url = format!("sqlite:{}", path.display());
    every_verb(log, sqlite.store(), Verbs::on(url), true).await
}

async fn postgres() -> Result<(), Source> {
    let server = PostgresServer::start()?;
    let pg = Pg::connect(&server.url()).await?;
    let log = pg.log("orders").await?;
    every_verb(log, pg.store(), Verbs::on(server.url()), true).await
}

async fn redis() -> Result<(), Source> {
    let server = RedisServer::durable().start()?;
    let redis = Redis::connect(&server.url()).await?;
    let log = redis.log("orders").await?;
    every_verb(log, redis.store(), Verbs::on(server.url()), true).await
}

async fn rabbitmq() -> Result<(), Source> {
    let node = RabbitNode::start()?;
    let rabbit = Rabbit::connect(&node.url()).await?;
    let log = rabbit.log("orders").await?;
    every_verb(log, rabbit.store(), Verbs::on(node.url()), false).await
}

async fn kafka_to_sqlite() -> Result<(), Source> {
    let (server, folder) = (KafkaServer::start()?, tempfile::tempdir()?);
    // Otherwise a single broker is not durable.
    let options = LogOptions::new().topic_setting("flush.messages", "1");
    let log = Kafka::connect(&server.url()).await?.log_with("orders", options).await?;
    let path = folder.path().join("shop.db");
    let verbs = Verbs {
        log: server.url(),
        store: format!("sqlite:{}", path.display()),
    };
    every_verb(log, Sqlite::open(&path).await?.store(), verbs, true).await
}

/// The store declares a stream for a consumer that commits, and an outbox is no stream.
async fn rabbitmq_streams() -> Result<(), Source> {
    let node = RabbitNode::start()?;
    let rabbit = Rabbit::connect(&node.url()).await?;
    let (orders, bus) = (rabbit.log("orders").await?, rabbit.log("bus").await?);
    orders.append(&[NewRecord::new("10248")]).await?;
    let (shipping, relay, store) = (ConsumerId::new(SHIPPING)?, ConsumerId::new("relay")?, rabbit.store());
    let send = handler_fn(|order: &Record, tx: &mut RabbitTx| {
        Box::pin(async move {
            tx.send("events", NewRecord::new(order.payload.clone())).await?;
            Ok(())
        })
    });
    let consumer = Consumer::essentially_once(shipping.clone(), orders, store.clone(), send);
    consumer.run_until_caught_up().await?;
    let outbox = store.sent_to(&shipping, "events")?;
    let relay = Consumer::at_least_once(relay, outbox, store, Relay::to(bus));
    relay.run_until_caught_up().await?;
    let looking = move || {
        let url = node.url();
        let verbs = Verbs::on(url.clone());
        let status = verbs.lines(&["relay", "status", "--consumer", "relay", "--log", &url]);
        assert_eq!((&status[0]["lag"], &status[0]["next"]), (&0.into(), &status[0]["end"]));
        for arguments in [&["positions", "shiping"][..], &["pause", "--consumer", "shiping"]] {
            let refused = verbs.call(arguments);
            assert_eq!(refused.status.code(), Some(1), "{arguments:?}");
        }
        let streams = node.ctl(&["list_queues", "name"])?;
        assert!(
            streams.contains("shipping") && !streams.contains("shiping"),
            "{streams}"
        );
        Ok(())
    };
    tokio::task::spawn_blocking(looking).await?
}

/// Notes each order under its key, in the order in which they are handled.
struct Ship {
    is_mended: Arc<AtomicBool>,
    /// The latest order.
    latest: watch::Sender<u64>,
}

#[async_trait]
impl<Tx: KeyValue> Handler<Tx> for Ship {
    async fn handle(&mut self, order: &Record, tx: &mut Tx) -> Result<(), HandlerError> {
        let number: u64 = str::from_utf8(&order.payload)?.parse().map_err(HandlerError::reject)?;
        self.latest.send_modify(|latest| *latest = number.max(*latest));
        if POISON.contains(&number) && !self.is_mended.load(Ordering::Relaxed) {
            return Err(HandlerError::reject("poison"));
        }
        let key = (number % KEYS).to_string();
        let mut handled = tx.get(key.as_bytes()).await?.unwrap_or_default().to_vec();
        handled.extend_from_slice(format!("{number} ").as_bytes());
        tx.put(key.as_bytes(), &handled).await?;
        Ok(())
    }
}

async fn every_verb<L, S>(log: L, store: S, verbs: Verbs, can_list: bool) -> Result<(), Source>
where
    L: Log + Clone + 'static,
    S: OffsetStore + Clone,
    S::Tx: KeyValue + DeadLetters,
{
    let (is_mended, stop) = (Arc::new(AtomicBool::new(false)), CancellationToken::new());
    let (latest, mut handled) = watch::channel(0);
    let ship = Ship {
        is_mended: Arc::clone(&is_mended),
        latest,
    };
    let id = ConsumerId::new(SHIPPING)?;
    let consumer = Consumer::essentially_once(id.clone(), log.clone(), store.clone(), ship)
        .dead_letters(DeadLetterOptions::new())
        // A commit for each record.
        .max_batch(1);
    let consumer = tokio::spawn(consumer.run_until(stop.clone()));
    let (load, ended) = (log.clone(), CancellationToken::new());
    let until = ended.clone();
    let load = tokio::spawn(async move {
        let (mut appended, mut pace) = (0, tokio::time::interval(INTERVAL));
        pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let next = async {
                pace.tick().await;
                handled.wait_for(|latest| appended < latest + BACKLOG).await.is_ok()
            };
            // A consumer that has ended takes no more, and its error is found later.
            if until.run_until_cancelled(next).await != Some(true) {
                return Ok::<u64, Error>(appended);
            }
            let record = NewRecord::new(appended.to_string()).key((appended % KEYS).to_string());
            load.append(&[record]).await?;
            appended += 1;
        }
    });
    let verbs = tokio::task::spawn_blocking(move || verbs.all(&is_mended, can_list));
    let skipped = verbs.await?;
    ended.cancel();
    let appended = load.await??;

    test_servers::eventually(async || {
        let position = store.position(&id).await?.ok_or("no position")?;
        let lag = log.count_from(position.next).await?;
        Ok(
            match position.next >= log.bounds().await?.end && lag.is_none_or(|lag| lag == 0) {
                true => Ok(()),
                false => Err(format!("{lag:?} records left at {}", position.next)),
            },
        )
    })
    .await?;
    stop.cancel();
    consumer.await??;

    let mut expected: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
    // The last poison order is discarded.
    for number in (0..appended).filter(|number| !skipped.contains(number) && *number != POISON[3]) {
        expected.entry(number % KEYS).or_default().push(number);
    }
    let mut tx = store.begin(&id).await?;
    for (key, expected) in expected {
        let handled = tx.get(key.to_string().as_bytes()).await?.unwrap_or_default();
        let handled = String::from_utf8(handled.into())?;
        let handled: Vec<u64> = handled
            .split_whitespace()
            .map(|number| number.parse().expect("number"))
            .collect();
        assert_eq!(handled, expected, "key {key}");
    }
    Ok(())
}

/// The order that a letter or a record holds.
fn order_of(shown: &Value) -> Option<u64> {
    shown["payload"].as_str()?.parse().ok()
}

/// Calls the program.
struct Verbs {
    log: String,
    store: String,
}

impl Verbs {
    /// For a log and a store on the same backend.
    fn on(url: String) -> Self {
        Self {
            log: url.clone(),
            store: url,
        }
    }

    /// Calls each verb, and waits for its effect. Returns the orders that were skipped.
    fn all(&self, is_mended: &AtomicBool, can_list: bool) -> Vec<u64> {
        self.soon("the consumer has a position", || {
            self.call(&["positions", SHIPPING]).status.success()
        });
        self.soon("the poison orders are set aside", || {
            self.letters().iter().any(|letter| order_of(letter) == Some(POISON[3]))
        });
        self.lines(&["doctor"]);
        assert!(self.status()["next"].is_string());
        self.lines(&["lag"]);
        self.lines(&["relay", "status"]);
        match can_list {
            true => assert_eq!(self.lines(&["positions"])[0]["consumer"], SHIPPING),
            false => {
                let refused = self.call(&["positions"]);
                assert_eq!(refused.status.code(), Some(2));
                assert_eq!(self.lines(&["positions", SHIPPING]).len(), 1);
            }
        }
        assert_eq!(self.lines(&["tail", "-n", "3"]).len(), 3);

        self.lines(&["pause"]);
        let (mut next, mut still) = (self.next(), 0);
        self.soon("the consumer pauses", || {
            let now = self.next();
            still = if now == next { still + 1 } else { 0 };
            next = now;
            still == 2
        });
        let (offset, skipped) = self.next_order();
        self.lines(&["skip", &offset]);
        let after = self.next();
        self.lines(&["seek", &after, "--yes"]);
        assert_eq!(self.next(), after);
        self.lines(&["resume"]);
        self.soon("the consumer resumes", || self.next() != after);

        // In vain, since the handler is not mended yet.
        self.lines(&["dead-letters", "retry", "--all", "--yes"]);
        self.soon("the first letter is tried again", || {
            let letters = self.letters();
            letters[0]["tries"].as_u64() >= Some(2) && letters[0]["state"] != "due"
        });
        is_mended.store(true, Ordering::Relaxed);
        let letter = |number: u64| {
            let letters = self.letters();
            let found = letters.iter().find(|letter| order_of(letter) == Some(number));
            found.expect("a letter")["offset"].as_str().expect("text").to_owned()
        };
        let [first, .., last] = POISON;
        self.lines(&["dead-letters", "show", &letter(first)]);
        self.lines(&["dead-letters", "edit", &letter(last), "--payload", "400 broken"]);
        self.lines(&["dead-letters", "retry", &letter(first)]);
        self.soon("the first letter is handled", || {
            self.letters().iter().all(|letter| order_of(letter) != Some(first))
        });
        let broken = || {
            let letters = self.letters();
            letters.iter().find(|letter| letter["payload"] == "400 broken").cloned()
        };
        // Until then it is behind the letters before it.
        self.soon("the edited letter was tried", || {
            broken().is_some_and(|letter| letter["tries"].as_u64() >= Some(1) && letter["state"] != "due")
        });
        let broken = broken().expect("still there")["offset"]
            .as_str()
            .expect("text")
            .to_owned();
        self.lines(&["dead-letters", "discard", &broken]);
        self.soon("all letters are handled", || self.letters().is_empty());
        let journal = self.lines(&["journal"]);
        assert_eq!(journal.len(), 8, "{journal:?}");
        vec![skipped]
    }

    fn status(&self) -> Value {
        self.lines(&["status"]).remove(0)
    }

    fn next(&self) -> String {
        self.status()["next"].as_str().expect("text").to_owned()
    }

    fn letters(&self) -> Vec<Value> {
        // Orders of the same key pile up behind the poison.
        self.lines(&["dead-letters", "list", "--limit", "100000"])
    }

    /// The order that the paused consumer would handle next, and its offset.
    fn next_order(&self) -> (String, u64) {
        let next = self.status()["next_record"].as_str().expect("a record").to_owned();
        let record = &self.lines(&["tail", "--from", &next, "-n", "1"])[0];
        assert_eq!(record["offset"], next);
        (next, order_of(record).expect("a number"))
    }

    /// Waits for an effect of the last call.
    fn soon(&self, what: &str, mut is_done: impl FnMut() -> bool) {
        let started = Instant::now();
        while !is_done() {
            assert!(started.elapsed() < SOON, "{what}: not within {SOON:?}");
        }
        let took = started.elapsed();
        println!("{what} after {took:?}");
    }

    /// The lines of JSON of a call that must succeed.
    fn lines(&self, arguments: &[&str]) -> Vec<Value> {
        let called = self.call(&[arguments, &["--json"]].concat());
        let error = String::from_utf8_lossy(&called.stderr);
        assert_eq!(called.status.code(), Some(0), "{arguments:?}: {error}");
        let output = String::from_utf8(called.stdout).expect("UTF-8");
        output
            .lines()
            .map(|line| serde_json::from_str(line).expect("JSON"))
            .collect()
    }

    fn call(&self, arguments: &[&str]) -> std::process::Output {
        let started = Instant::now();
        let output = Command::new(env!("CARGO_BIN_EXE_essentially-once"))
            .args(arguments)
            .env("ESSENTIALLY_ONCE_LOG", format!("{}#orders", self.log))
            .env("ESSENTIALLY_ONCE_STORE", &self.store)
            .env("ESSENTIALLY_ONCE_CONSUMER", SHIPPING)
            .stdin(Stdio::null())
            .output()
            .expect("start");
        println!("{:?} for {}", started.elapsed(), arguments.join(" "));
        output
    }
}
