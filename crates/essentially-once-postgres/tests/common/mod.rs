//! Helpers for the tests: cases, a server with a handle, and what is asked of both.

#![allow(
    dead_code,
    unused_imports,
    unused_macros,
    reason = "each target uses only some of it"
)]

pub(crate) mod backend;

use std::{
    future::Future,
    process::ExitCode,
    time::{Duration, Instant, SystemTime},
};

use essentially_once::{
    ConsumerId, Error, KeyValue as _, Log, NewRecord, OffsetStore as _, Record,
    backend::{Advance, LogId, Revision, Source},
};
use essentially_once_postgres::{
    Pg, PgLog, PgOptions, PgStore, PgTx, postgres_error,
    tokio_postgres::{self, Client, NoTls},
};
use test_servers::PostgresServer;

pub(crate) use test_servers::{
    Case, LIMIT, Outcome, cases, ensure,
    ledger::{Seen, Watched, agree, judge, message, send, send_until, until},
};

/// Runs each case as a test. Without a server, every case is ignored, with the reason.
pub(crate) fn run(cases: impl IntoIterator<Item = (&'static str, Case)>) -> ExitCode {
    test_servers::run_cases(test_servers::postgres_bin().err(), LIMIT, cases)
}

/// Checks the kind of an error, and that its text contains these parts.
macro_rules! assert_error {
    ($result:expr, $kind:pat, $($text:expr),* $(,)?) => {{
        let result = $result;
        assert!(matches!(&result, Err($kind)), "{result:?}");
        let _text = $crate::common::text_of(&result);
        $(assert!(_text.contains($text), "{:?} is missing in {_text}", $text);)*
    }};
}
pub(crate) use assert_error;

/// What an error shows.
#[track_caller]
pub(crate) fn text_of<T>(result: &Result<T, Error>) -> String {
    let Err(error) = result else { panic!("it did not fail") };
    error.to_string()
}

/// Everything that an error and its causes can show.
pub(crate) fn all_text_of(error: &Error) -> String {
    let mut text = format!("{error} {error:?} {error:#?}");
    let mut cause = error.cause().map(|cause| cause as &dyn std::error::Error);
    while let Some(error) = cause {
        text += &format!(" {error} {error:?}");
        cause = error.source();
    }
    text
}

/// The code with which the server refused.
pub(crate) fn code_of<T>(result: &Result<T, Error>) -> Option<&str> {
    let error = result.as_ref().err().and_then(postgres_error)?;
    error.code().map(|code| code.code())
}

/// A server and a handle to it.
pub(crate) struct Stage {
    pub(crate) server: PostgresServer,
    pub(crate) pg: Pg,
    pub(crate) store: PgStore,
    pub(crate) consumer: ConsumerId,
}

impl Stage {
    pub(crate) async fn start() -> Result<Self, Source> {
        Self::with(PgOptions::new(), &[]).await
    }

    pub(crate) async fn with(options: PgOptions, settings: &[(&str, &str)]) -> Result<Self, Source> {
        let server = PostgresServer::builder().with(settings).start()?;
        // The options may have limits that are too short for it on a busy machine.
        Pg::connect(&server.url()).await?;
        let pg = options.connect(&server.url()).await?;
        Ok(Self {
            store: pg.store(),
            pg,
            server,
            consumer: ConsumerId::new("shipping")?,
        })
    }

    /// Runs SQL as an administrator.
    pub(crate) fn sql(&self, sql: &str) -> Result<String, Source> {
        Ok(self.server.run_sql(sql)?.trim().to_owned())
    }

    /// Another handle, as another process would have.
    pub(crate) async fn other(&self) -> Result<Pg, Error> {
        Pg::connect(&self.server.url()).await
    }

    pub(crate) async fn begin(&self) -> Result<PgTx, Error> {
        self.store.begin(&self.consumer).await
    }

    /// The number of commits.
    pub(crate) async fn commits(&self) -> Result<u64, Error> {
        let position = self.store.position(&self.consumer).await?;
        Ok(position.map_or(0, |position| position.revision.count()))
    }

    /// The stored value of a key.
    pub(crate) async fn value(&self, key: &str) -> Result<Option<String>, Error> {
        let value = self.begin().await?.get(key.as_bytes()).await?;
        Ok(value.map(|value| String::from_utf8_lossy(&value).into_owned()))
    }

    /// A connection of a program that does not use this crate.
    pub(crate) async fn client(&self) -> Result<Client, Source> {
        client(&self.server.url()).await
    }

    pub(crate) async fn watch_readers(&self) -> Result<Readers, Source> {
        Ok(Readers(self.client().await?))
    }

    /// Waits until this many statements wait for a lock.
    pub(crate) async fn until_locked(&self, waiting: i64) -> Outcome {
        let sql = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND state = 'active'";
        self.until_count(sql, waiting).await
    }

    /// Waits until a query that counts answers with this number.
    pub(crate) async fn until_count(&self, sql: &str, wanted: i64) -> Outcome {
        let client = self.client().await?;
        let asked = test_servers::eventually(async || {
            let count: i64 = client.query_one(sql, &[]).await?.get(0);
            Ok(if count == wanted {
                Ok(())
            } else {
                Err(format!("{count} instead of {wanted}: {sql}"))
            })
        });
        asked.await
    }
}

/// Sees from outside when readers wait for records.
pub(crate) struct Readers(Client);

impl Readers {
    /// The server's time.
    pub(crate) async fn time(&self) -> Result<SystemTime, Source> {
        Ok(self.0.query_one("SELECT clock_timestamp()", &[]).await?.get(0))
    }

    /// Waits until a reader has found no records after `since`, and waits for some. Before it does,
    /// it asks where the log ends.
    pub(crate) async fn until_one_waits(&self, since: SystemTime) -> Outcome {
        let looked = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'essentially-once'
             AND state = 'idle' AND query LIKE 'SELECT next, earliest%' AND state_change > $1";
        let asked = test_servers::eventually(async || {
            let count: i64 = self.0.query_one(looked, &[&since]).await?.get(0);
            Ok(if count > 0 {
                Ok(())
            } else {
                Err("no reader waits for records".into())
            })
        });
        asked.await
    }
}

/// Connects without this crate.
pub(crate) async fn client(url: &str) -> Result<Client, Source> {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await?;
    // It ends with the client, or with the server.
    tokio::spawn(async move { drop(connection.await) });
    Ok(client)
}

/// A commit after this many, which moves the position of log `orders`.
pub(crate) fn advance(commits: u64, next: u64) -> Advance {
    let orders = LogId::new("orders").expect("a name");
    let (expected, made) = (Revision::new(0, commits), Revision::new(0, commits + 1));
    Advance::new(orders, next.into(), expected, made)
}

/// Reads every record of a log.
pub(crate) async fn records(log: &PgLog) -> Result<Vec<Record>, Source> {
    Ok(essentially_once_testkit::read_log(log).await?)
}

pub(crate) fn payloads(records: &[Record]) -> Vec<String> {
    let text = |record: &Record| String::from_utf8_lossy(&record.payload).into_owned();
    records.iter().map(text).collect()
}

pub(crate) fn numbered(range: std::ops::Range<usize>) -> Vec<NewRecord> {
    range.map(|n| NewRecord::new(n.to_string())).collect()
}

/// Fails after a minute.
pub(crate) async fn soon<T>(future: impl Future<Output = T>) -> Result<T, Source> {
    let waiting = tokio::time::timeout(Duration::from_secs(60), future).await;
    waiting.map_err(|_| "it takes more than a minute".into())
}

/// The times that several rounds took.
pub(crate) struct Times(Vec<Duration>);

impl Times {
    pub(crate) fn new() -> Self {
        Self(Vec::new())
    }

    pub(crate) fn since(&mut self, begun: Instant) {
        self.0.push(begun.elapsed());
    }

    /// The time that this share of the rounds did not exceed.
    pub(crate) fn quantile(&self, share: f64) -> Duration {
        let mut times = self.0.clone();
        times.sort_unstable();
        let place = (times.len() as f64 * share).ceil() as usize;
        times[place.clamp(1, times.len()) - 1]
    }
}

/// Numbers that look random and are the same in each run.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// A number less than this one.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        // SplitMix64.
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (mixed ^ (mixed >> 31)) % end
    }
}
