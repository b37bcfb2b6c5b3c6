//! Helpers for the cases.

use std::time::Duration;

use essentially_once::{
    ConsumerId, Error, KeyValue, Offset, OffsetStore,
    backend::{Advance, LogId, Numbering, Revision, Source, Transaction},
};
use essentially_once_redis::{RedisOptions, RedisStore, RedisTx, redis::Cmd};
use test_servers::{Proxy, RedisServer};

pub(crate) type Outcome = Result<(), Source>;

/// A server and a store on it.
pub(crate) struct Stage {
    pub(crate) server: RedisServer,
    pub(crate) store: RedisStore,
    pub(crate) consumer: ConsumerId,
}

impl Stage {
    pub(crate) async fn start() -> Result<Self, Source> {
        Self::with(RedisOptions::new()).await
    }

    pub(crate) async fn with(options: RedisOptions) -> Result<Self, Source> {
        let server = RedisServer::durable().start()?;
        let store = options.connect(&server.url()).await?.store();
        Ok(Self {
            server,
            store,
            consumer: ConsumerId::new("c")?,
        })
    }

    pub(crate) async fn begin(&self) -> Result<RedisTx, Error> {
        self.store.begin(&self.consumer).await
    }

    /// Commits the changes that `stage` stages, and returns the result.
    pub(crate) async fn commit(&self, expected: u64, commands: impl IntoIterator<Item = Cmd>) -> Result<(), Error> {
        let mut tx = self.begin().await?;
        for command in commands {
            tx.command(command).await?;
        }
        tx.commit(advance(expected, expected + 1)).await
    }

    /// The count of the stored revision.
    pub(crate) async fn revision(&self) -> Result<u64, Error> {
        let position = self.store.position(&self.consumer).await?;
        Ok(position.map_or(0, |position| position.revision.count()))
    }

    pub(crate) async fn value(&self, key: &str) -> Result<Option<String>, Error> {
        let value = self.begin().await?.get(key.as_bytes()).await?;
        Ok(value.map(|value| String::from_utf8_lossy(&value).into_owned()))
    }

    pub(crate) fn ask(&self, command: &str) -> Result<String, Source> {
        let words: Vec<&str> = command.split(' ').collect();
        Ok(match self.server.command(&words)? {
            test_servers::Reply::Nil => "nil".into(),
            test_servers::Reply::Int(number) => number.to_string(),
            test_servers::Reply::Text(text) => text,
            test_servers::Reply::List(list) => list.iter().map(|reply| reply.text()).collect::<Vec<_>>().join(" "),
        })
    }

    pub(crate) async fn through(&self, proxy: &Proxy) -> Result<RedisStore, Error> {
        let url = format!("redis://127.0.0.1:{}", proxy.port());
        Ok(RedisOptions::new()
            .timeout(Duration::from_secs(60))
            .connect(&url)
            .await?
            .store())
    }
}

/// The revision after this many commits of one session.
pub(crate) fn revision(commits: u64) -> Revision {
    Revision::new(0, commits)
}

pub(crate) fn advance(commits: u64, next: u64) -> Advance {
    let (expected, made) = (revision(commits), revision(commits.saturating_add(1)));
    Advance::new(log("orders#a1"), Offset::new(next, 7), expected, made)
}

pub(crate) fn changed(mut advance: Advance, change: impl FnOnce(&mut Advance)) -> Advance {
    change(&mut advance);
    advance
}

pub(crate) fn log(id: &str) -> LogId {
    let (name, incarnation) = id.split_once('#').unwrap_or((id, ""));
    let log = LogId::new(name).expect("a log's name");
    match incarnation {
        "" => log,
        incarnation => log.with_incarnation(incarnation).expect("an incarnation"),
    }
}

pub(crate) fn command(text: &str) -> Cmd {
    let mut command = Cmd::new();
    for word in text.split(' ') {
        command.arg(word);
    }
    command
}

pub(crate) fn numbering(text: &str) -> Numbering {
    text.parse().expect("a numbering")
}

/// The error with its causes.
#[track_caller]
pub(crate) fn text_of<T>(result: Result<T, Error>) -> String {
    let Err(error) = result else { panic!("it did not fail") };
    let mut text = format!("{error:?} {error}");
    let mut cause = error.cause().map(|cause| cause as &dyn std::error::Error);
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
        let _text = text_of(result);
        $(assert!(_text.contains($text), "{:?} is missing in {_text}", $text);)*
    }};
}
pub(crate) use assert_error;
