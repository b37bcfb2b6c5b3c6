//! A counter in the store's own terms. It reveals an increment that runs twice. Writing a value
//! twice would not show.

use async_trait::async_trait;
use essentially_once::{Error, KeyValue};
use essentially_once_postgres::PgTx;
use essentially_once_rabbitmq::RabbitTx;
use essentially_once_redis::{RedisTx, redis::cmd};
use essentially_once_sqlite::SqliteTx;

/// The counter of the transaction's consumer.
#[async_trait]
pub(crate) trait Counter: Send {
    /// Adds one when the transaction commits.
    async fn increment(&mut self) -> Result<(), Error>;

    /// Returns the count.
    async fn count(&mut self) -> Result<u64, Error>;
}

pub(crate) const TABLE: &str = "CREATE TABLE IF NOT EXISTS counters (consumer TEXT PRIMARY KEY, n INTEGER NOT NULL)";

#[async_trait]
impl Counter for SqliteTx {
    async fn increment(&mut self) -> Result<(), Error> {
        let consumer = self.consumer().to_string();
        self.execute(TABLE, [])?;
        let sql = "INSERT INTO counters VALUES (?1, 1) ON CONFLICT (consumer) DO UPDATE SET n = n + 1";
        self.execute(sql, [consumer])?;
        Ok(())
    }

    async fn count(&mut self) -> Result<u64, Error> {
        let consumer = self.consumer().to_string();
        self.execute(TABLE, [])?;
        let count: Option<i64> = self.query_one("SELECT n FROM counters WHERE consumer = ?1", [consumer], |row| {
            row.get(0)
        })?;
        Ok(count.unwrap_or(0) as u64)
    }
}

/// A row of a table that [the server](crate::Backend::start) has from its start.
#[async_trait]
impl Counter for PgTx {
    async fn increment(&mut self) -> Result<(), Error> {
        let consumer = self.consumer().to_string();
        let sql = "INSERT INTO counters AS c VALUES ($1, 1) ON CONFLICT (consumer) DO UPDATE SET n = c.n + 1";
        self.queue(sql, &[&consumer]).await
    }

    async fn count(&mut self) -> Result<u64, Error> {
        let consumer = self.consumer().to_string();
        let sql = "SELECT n FROM counters WHERE consumer = $1";
        let row = self.query_opt(sql, &[&consumer]).await?;
        Ok(row.map_or(0, |row| row.get::<_, i32>(0)) as u64)
    }
}

#[async_trait]
impl Counter for RedisTx {
    async fn increment(&mut self) -> Result<(), Error> {
        let key = format!("{}:counter", self.hash_tag());
        self.command(cmd("INCR").arg(key).to_owned()).await
    }

    async fn count(&mut self) -> Result<u64, Error> {
        let key = format!("{}:counter", self.hash_tag());
        let count: Option<u64> = self.query(cmd("GET").arg(key).to_owned()).await?;
        Ok(count.unwrap_or(0))
    }
}

/// The store has no commands of its own, so the counter is a value in the state. The ledger next to
/// it reveals doubled records.
#[async_trait]
impl Counter for RabbitTx {
    async fn increment(&mut self) -> Result<(), Error> {
        let next = self.count().await? + 1;
        self.put(b"counter", &next.to_be_bytes()).await
    }

    async fn count(&mut self) -> Result<u64, Error> {
        match self.get(b"counter").await? {
            Some(value) => match value[..].try_into() {
                Ok(value) => Ok(u64::from_be_bytes(value)),
                Err(error) => Err(Error::failed("read the counter", error)),
            },
            None => Ok(0),
        }
    }
}
