//! The store. It keeps positions, windows and state, and a transaction changes all three together.

mod letters;
mod native;
mod outbox;
pub(crate) mod schema;
mod state;
mod statements;
mod tx;

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use essentially_once::{
    ConsumerId, Error, Offset, OffsetStore, ReadState,
    backend::{Durability, Owner, Position, Pulse, Revision, Snapshot},
};
use tokio::time::{self, Instant};
use tokio_postgres::Row;

pub use self::tx::PgTx;
use self::{state::Memory, statements::unsigned};
use crate::{
    connection::{Param, Pool, durability},
    log::sending::Outboxes,
};

/// How often to look whether another process has committed.
const POLL: Duration = Duration::from_millis(50);

/// Positions and state in a PostgreSQL database. See [`Pg::store`](crate::Pg::store).
#[derive(Clone, Debug)]
pub struct PgStore {
    pool: Arc<Pool>,
    outboxes: Arc<Outboxes>,
    memory: Arc<Memory>,
}

impl PgStore {
    pub(crate) fn new(pool: Arc<Pool>) -> Self {
        Self {
            memory: Arc::new(Memory::new(pool.options.state_memory)),
            pool,
            outboxes: Arc::default(),
        }
    }

    /// Runs a statement that only reads.
    async fn read(
        &self,
        sql: &'static str,
        action: impl Fn() -> String,
        params: &[Param<'_>],
    ) -> Result<Vec<Row>, Error> {
        let action = || self.pool.on(action());
        let mut session = self.pool.take(action).await?;
        let rows = self.pool.within(session.query_own(sql, params)).await;
        rows.map_err(|fault| fault.of_read(action()))
    }

    /// Runs a statement whose effect is only a hint, so that it does not matter if it is in doubt.
    async fn hint(&self, sql: &'static str, action: impl Fn() -> String, params: &[Param<'_>]) -> Result<(), Error> {
        let action = || self.pool.on(action());
        let mut session = self.pool.take(action).await?;
        let changed = self.pool.within(session.execute_own(sql, params)).await;
        changed.map(drop).map_err(|fault| fault.of_read(action()))
    }
}

#[async_trait]
impl OffsetStore for PgStore {
    type Tx = PgTx;

    async fn position(&self, consumer: &ConsumerId) -> Result<Option<Position>, Error> {
        let action = || format!("read position of consumer {consumer}");
        let rows = self.read(statements::POSITION, action, &[&consumer.as_str()]).await?;
        statements::position(&rows, || self.pool.on(action()))
    }

    async fn begin(&self, consumer: &ConsumerId) -> Result<PgTx, Error> {
        let action = || self.pool.on(format!("begin a transaction of consumer {consumer}"));
        let session = self.pool.take(action).await?;
        let (pool, memory) = (Arc::clone(&self.pool), Arc::clone(&self.memory));
        let outboxes = Arc::clone(&self.outboxes);
        Ok(PgTx::new(session, pool, consumer.clone(), memory, outboxes))
    }

    async fn durability(&self) -> Result<Durability, Error> {
        durability(&self.pool).await
    }

    async fn consumers(&self) -> Result<Option<Vec<ConsumerId>>, Error> {
        let action = || "list the consumers".into();
        let rows = self.read(statements::CONSUMERS, action, &[]).await?;
        let consumers: Result<_, _> = rows.iter().map(|row| ConsumerId::new(row.get::<_, &str>(0))).collect();
        consumers
            .map(Some)
            .map_err(|error| Error::failed(self.pool.on(action()), error))
    }

    async fn pulse(&self, consumer: &ConsumerId) -> Result<Pulse, Error> {
        let action = || format!("read pulse of consumer {consumer}");
        let rows = self.read(statements::PULSE, action, &[&consumer.as_str()]).await?;
        let pulse = rows.first().map(pulse_of).transpose();
        let pulse = pulse.map_err(|error| Error::failed(self.pool.on(action()), error))?;
        Ok(pulse.unwrap_or_default())
    }

    /// Looks every 50 ms.
    async fn watch(&self, consumer: &ConsumerId, seen: &Pulse, interval: Duration) -> Result<Pulse, Error> {
        let begun = Instant::now();
        loop {
            let pulse = self.pulse(consumer).await?;
            let left = interval.saturating_sub(begun.elapsed());
            if pulse != *seen || left.is_zero() {
                return Ok(pulse);
            }
            time::sleep(left.min(POLL)).await;
        }
    }

    async fn beat(&self, consumer: &ConsumerId, owner: Owner) -> Result<(), Error> {
        let action = || format!("beat for consumer {consumer}");
        let owner = owner.to_string();
        self.hint(statements::BEAT, action, &[&consumer.as_str(), &owner]).await
    }

    async fn release(&self, consumer: &ConsumerId, owner: Owner) -> Result<(), Error> {
        let action = || format!("give up the position of consumer {consumer}");
        let owner = owner.to_string();
        self.hint(statements::RELEASE, action, &[&consumer.as_str(), &owner])
            .await
    }
}

fn pulse_of(row: &Row) -> Result<Pulse, essentially_once::backend::Source> {
    let mut pulse = Pulse::default();
    pulse.next = Offset::new(unsigned(row, 0)?, unsigned(row, 1)?);
    pulse.revision = Revision::new(unsigned(row, 2)?, unsigned(row, 3)?);
    pulse.owner = row
        .try_get::<_, Option<&str>>(4)?
        .map(str::parse::<Owner>)
        .transpose()?;
    pulse.beats = row.try_get::<_, Option<i64>>(5)?.unwrap_or_default() as u64;
    Ok(pulse)
}

#[async_trait]
impl ReadState for PgStore {
    /// One transaction reads both, and sees one commit.
    async fn read_state(&self, consumer: &ConsumerId, keys: &[&[u8]]) -> Result<Snapshot, Error> {
        let action = || self.pool.on(format!("read state of consumer {consumer}"));
        let name = consumer.as_str();
        let mut session = self.pool.take(action).await?;
        let read = async {
            session.begin("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")?;
            let position = session.query_own(statements::POSITION, &[&name]).await?;
            let values = session.query_own(statements::GET_VALUES, &[&name, &keys]).await?;
            session.rollback().await?;
            Ok((position, values))
        };
        let (position, values) = self.pool.within(read).await.map_err(|fault| fault.of_read(action()))?;
        let values = values
            .iter()
            .map(|row| row.get::<_, Option<&[u8]>>(0).map(Bytes::copy_from_slice));
        Ok(Snapshot::new(
            statements::position(&position, action)?,
            values.collect(),
        ))
    }
}
