//! Any store, for tests that work with all of them.

use std::{
    fs::{File, OpenOptions},
    io::Write as _,
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use essentially_once::{
    CancellationToken, Consumer, ConsumerId, Error, Handler, HandlerError, KeyValue, Log, OffsetStore, Record,
    backend::Position,
};
use essentially_once_postgres::Pg;
use essentially_once_rabbitmq::Rabbit;
use essentially_once_redis::Redis;
use essentially_once_sqlite::Sqlite;
use essentially_once_testkit::{Applied, Ledger, read_ledger};

use crate::{counter::Counter, place::Address, work::Work};

/// Any store.
#[async_trait]
pub trait Store: Send + Sync {
    /// The consumer's position.
    async fn position(&self, consumer: &ConsumerId) -> Result<Option<Position>, Error>;

    /// The consumer's ledger, in the order of application.
    async fn ledger(&self, consumer: &ConsumerId) -> Result<Vec<Applied>, Error>;

    /// How often the consumer's counter was incremented.
    async fn counter(&self, consumer: &ConsumerId) -> Result<u64, Error>;

    /// Consumes until it is stopped.
    async fn consume(self: Box<Self>, consumer: ConsumerId, log: Arc<dyn Log>, work: Work) -> Result<(), Error>;
}

impl Address {
    /// Opens the store.
    ///
    /// # Errors
    /// Those of the backend.
    pub async fn store(&self) -> Result<Box<dyn Store>, Error> {
        Ok(match self {
            Self::Sqlite(path) => Box::new(Of(Sqlite::open(path).await?.store())),
            Self::Postgres(url) => Box::new(Of(Pg::connect(url).await?.store())),
            Self::Redis(url) => Box::new(Of(Redis::connect(url).await?.store())),
            Self::Rabbitmq(url) | Self::RabbitmqPacked(url) => Box::new(Of(Rabbit::connect(url).await?.store())),
            Self::Kafka(_) => return Err(Error::failed("open a store", "Kafka keeps no state of a consumer")),
        })
    }
}

struct Of<S>(S);

#[async_trait]
impl<S: OffsetStore<Tx: KeyValue + Counter> + 'static> Store for Of<S> {
    async fn position(&self, consumer: &ConsumerId) -> Result<Option<Position>, Error> {
        self.0.position(consumer).await
    }

    async fn ledger(&self, consumer: &ConsumerId) -> Result<Vec<Applied>, Error> {
        read_ledger(&self.0, consumer).await
    }

    async fn counter(&self, consumer: &ConsumerId) -> Result<u64, Error> {
        self.0.begin(consumer).await?.count().await
    }

    async fn consume(self: Box<Self>, consumer: ConsumerId, log: Arc<dyn Log>, work: Work) -> Result<(), Error> {
        let (max_batch, standby_after) = (work.max_batch, work.standby_after);
        let calls = match &work.calls {
            Some(path) => Some(
                OpenOptions::new()
                    .append(true)
                    .create(true)
                    .open(path)
                    .map_err(|error| Error::failed(format!("open {}", path.display()), error))?,
            ),
            None => None,
        };
        let handler = Worker {
            work,
            handled: 0,
            calls,
        };
        let consumer = Consumer::essentially_once(consumer, log, self.0, handler)
            .max_batch(max_batch)
            .min_backoff(Duration::from_millis(5))
            .max_backoff(Duration::from_millis(200))
            .standby_after(standby_after);
        consumer.run_until(CancellationToken::new()).await?;
        Ok(())
    }
}

/// Increments the counter for each record, and journals the record in the ledger.
struct Worker {
    work: Work,
    handled: u64,
    calls: Option<File>,
}

#[async_trait]
impl<Tx: KeyValue + Counter> Handler<Tx> for Worker {
    async fn handle(&mut self, record: &Record, tx: &mut Tx) -> Result<(), HandlerError> {
        self.handled += 1;
        if let Some(calls) = &mut self.calls {
            calls.write_all(b".")?;
        }
        tx.increment().await?;
        let pause = match self.work.long_every {
            Some(every) if self.handled.is_multiple_of(every) => self.work.long_pause,
            _ => self.work.pause,
        };
        if pause > Duration::ZERO {
            tokio::time::sleep(pause).await;
        }
        Ledger.handle(record, tx).await
    }
}
