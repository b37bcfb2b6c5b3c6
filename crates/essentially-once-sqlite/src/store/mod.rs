//! The store. It keeps positions, windows and state, and a transaction changes all three together.

pub(crate) mod authorizer;
mod letters;
mod outbox;
pub(crate) mod pulse;
pub(crate) mod schema;
mod statements;
mod tx;

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use essentially_once::{
    ConsumerId, Error, OffsetStore, ReadState,
    backend::{Durability, Owner, Position, Pulse, Snapshot, Window},
};
use rusqlite::{Connection, OptionalExtension};
use tokio::time::{self, Instant};

use self::statements::{StoredPosition, bytes_of_first, position_row, read_position, stored_position};
pub use self::tx::SqliteTx;
use crate::{
    connection::{Connections, open},
    error::classify,
    log::sending::Outboxes,
};

/// How often to check whether another process wrote to the file.
const POLL: Duration = Duration::from_millis(10);

/// How long to pause after a commit of another consumer.
const NOT_OURS: Duration = Duration::from_millis(2);

/// How long a beat tries to get the write lock, and how often. The next beat is due a little later.
const BEAT_WITHIN: Duration = Duration::from_millis(200);
const BEAT_AGAIN: Duration = Duration::from_millis(5);

/// Long enough to mean never, and short enough to add to an instant.
const NEVER: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// Positions and state in a SQLite file. See [`Sqlite::store`](crate::Sqlite::store).
#[derive(Clone, Debug)]
pub struct SqliteStore {
    connections: Arc<Connections>,
    outboxes: Arc<Outboxes>,
}

impl SqliteStore {
    pub(crate) fn new(connections: Arc<Connections>) -> Self {
        Self {
            connections,
            outboxes: Arc::default(),
        }
    }

    fn decode(&self, stored: Option<StoredPosition>, action: impl Fn() -> String) -> Result<Option<Position>, Error> {
        let Some((row, windows)) = stored else {
            return Ok(None);
        };
        let decoded = row.position().and_then(|mut position| {
            for (numbering, window) in windows {
                position.windows.push((numbering.parse()?, Window::decode(&window)?));
            }
            Ok(position)
        });
        decoded
            .map(Some)
            .map_err(|error| Error::failed(self.connections.on(action()), error))
    }
}

#[async_trait]
impl OffsetStore for SqliteStore {
    type Tx = SqliteTx;

    async fn position(&self, consumer: &ConsumerId) -> Result<Option<Position>, Error> {
        let action = || format!("read position of consumer {consumer}");
        let stored = self
            .connections
            .read(action, |connection| read_position(connection, consumer))
            .await?;
        self.decode(stored, action)
    }

    async fn begin(&self, consumer: &ConsumerId) -> Result<SqliteTx, Error> {
        let tx = self
            .connections
            .begin_for_store(|| format!("begin a transaction of consumer {consumer}"))
            .await?;
        let (connections, outboxes) = (Arc::clone(&self.connections), Arc::clone(&self.outboxes));
        Ok(SqliteTx::new(tx, connections, consumer.clone(), outboxes))
    }

    async fn durability(&self) -> Result<Durability, Error> {
        self.connections
            .read(|| "read durability".into(), open::durability)
            .await
    }

    async fn consumers(&self) -> Result<Option<Vec<ConsumerId>>, Error> {
        let action = || "list the consumers".into();
        let names = self.connections.read(action, statements::consumer_names).await?;
        let consumers: Result<_, _> = names.into_iter().map(ConsumerId::new).collect();
        consumers
            .map(Some)
            .map_err(|error| Error::failed(self.connections.on(action()), error))
    }

    /// A write lock that one transaction holds counts as a beat, because an owner that handles a
    /// record for long holds it and cannot write one.
    async fn pulse(&self, consumer: &ConsumerId) -> Result<Pulse, Error> {
        let action = || format!("read pulse of consumer {consumer}");
        let is_held = self.connections.file.holder().is_some();
        let seen = self
            .connections
            .observe(action, |observer| observer.look(consumer, is_held))
            .await?;
        let pulse = seen.map(|seen| seen.pulse()).transpose();
        let pulse = pulse.map_err(|error| Error::failed(self.connections.on(action()), error))?;
        Ok(pulse.unwrap_or_default())
    }

    async fn watch(&self, consumer: &ConsumerId, seen: &Pulse, interval: Duration) -> Result<Pulse, Error> {
        let action = || format!("watch consumer {consumer}");
        let until = Instant::now() + interval.min(NEVER);
        let mut commits = self.connections.file.commits.subscribe();
        loop {
            // The version must be read before the pulse, so that a commit after the pulse changes
            // it.
            let version = self
                .connections
                .observe(action, |observer| observer.data_version())
                .await?;
            let pulse = self.pulse(consumer).await?;
            if pulse != *seen || Instant::now() >= until {
                return Ok(pulse);
            }
            loop {
                let poll = until.min(Instant::now() + POLL);
                // The sender outlives this call, so `Ok` always means a commit.
                let committed = time::timeout_at(poll, commits.changed()).await.is_ok();
                if committed
                    || Instant::now() >= until
                    || self
                        .connections
                        .observe(action, |observer| observer.data_version())
                        .await?
                        != version
                {
                    break;
                }
            }
            if Instant::now() < until && self.pulse(consumer).await? == *seen {
                time::sleep_until(until.min(Instant::now() + NOT_OURS)).await;
            }
        }
    }

    /// Writes as soon as the write lock is free, and gives up after a while. A lock that one
    /// transaction holds all that time is itself a sign of life. A lock that many transactions hold
    /// in turn is free between them.
    async fn beat(&self, consumer: &ConsumerId, owner: Owner) -> Result<(), Error> {
        let action = || format!("beat for consumer {consumer}");
        let given_up = Instant::now() + BEAT_WITHIN;
        let mut tx = loop {
            match self.connections.try_begin(action)? {
                Some(tx) => break tx,
                None if Instant::now() >= given_up => return Ok(()),
                None => time::sleep(BEAT_AGAIN).await,
            }
        };
        let owner = owner.to_string();
        tx.run_internal(statements::BEAT, |statement| {
            statement.execute((consumer.as_str(), &owner))
        })
        .map_err(|error| classify(self.connections.on(action()), error))?;
        tx.commit(|| self.connections.on(action()))
    }

    async fn release(&self, consumer: &ConsumerId, owner: Owner) -> Result<(), Error> {
        let action = || format!("give up the position of consumer {consumer}");
        let owner = owner.to_string();
        // An owner that was overtaken writes nothing, so it must not wait for the write lock.
        let stored = self
            .connections
            .read(action, |connection| position_row(connection, consumer))
            .await?;
        if stored.is_none_or(|row| row.owner.as_deref() != Some(&*owner)) {
            return Ok(());
        }
        let mut tx = self.connections.begin(action).await?;
        tx.run_internal(statements::RELEASE, |statement| {
            statement.execute((consumer.as_str(), &owner))
        })
        .map_err(|error| classify(self.connections.on(action()), error))?;
        tx.commit(|| self.connections.on(action()))
    }
}

#[async_trait]
impl ReadState for SqliteStore {
    async fn read_state(&self, consumer: &ConsumerId, keys: &[&[u8]]) -> Result<Snapshot, Error> {
        let action = || format!("read state of consumer {consumer}");
        let read = |connection: &Connection| {
            let snapshot = connection.unchecked_transaction()?;
            let position = stored_position(&snapshot, consumer)?;
            let mut value = snapshot.prepare_cached(statements::GET_VALUE)?;
            let values = keys.iter().map(|key| {
                let value = value.query_row((consumer.as_str(), *key), bytes_of_first);
                value.optional()
            });
            Ok((position, values.collect::<rusqlite::Result<Vec<_>>>()?))
        };
        let (position, values) = self.connections.read(action, read).await?;
        Ok(Snapshot::new(self.decode(position, action)?, values))
    }
}
