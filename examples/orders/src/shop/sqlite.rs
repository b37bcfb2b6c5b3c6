//! The shop's tables in the SQLite file.

use std::{path::Path, time::Duration};

use async_trait::async_trait;
use essentially_once::HandlerError;
use essentially_once_sqlite::{
    SqliteTx,
    rusqlite::{self, Connection, ToSql, params},
};

use super::effect::{Books, Effect, Shop};

/// In the transaction that commits the position.
#[async_trait]
impl Shop for SqliteTx {
    async fn write(&mut self, effect: &Effect<'_>) -> Result<(), HandlerError> {
        with_statement(effect, |sql, values| {
            self.execute(sql, values).map(|_| ()).map_err(HandlerError::fatal)
        })
    }
}

/// Immediately, independently of the position.
#[async_trait]
impl Shop for Connection {
    async fn write(&mut self, effect: &Effect<'_>) -> Result<(), HandlerError> {
        with_statement(effect, |sql, values| {
            let done = self.prepare_cached(sql).and_then(|mut insert| insert.execute(values));
            done.map(|_| ()).map_err(HandlerError::fatal)
        })
    }
}

fn with_statement<T>(effect: &Effect<'_>, run: impl FnOnce(&str, &[&dyn ToSql]) -> T) -> T {
    match effect {
        Effect::Shipped { offset, order } => run(
            "INSERT INTO shipments (log_offset, order_id, freight) VALUES (?1, ?2, ?3)",
            params![offset, order.id, order.freight],
        ),
        Effect::Rejected {
            offset,
            line,
            payload,
            reason,
        } => run(
            "INSERT INTO rejected (log_offset, line, payload, reason) VALUES (?1, ?2, ?3, ?4)",
            params![offset, line, payload, reason],
        ),
    }
}

/// The tables have no unique constraint, which would hide doubled effects.
pub(super) fn create_tables(path: &Path) -> rusqlite::Result<()> {
    Connection::open(path)?.execute_batch(
        "CREATE TABLE shipments (log_offset TEXT NOT NULL, order_id TEXT NOT NULL, freight REAL NOT NULL);
         CREATE TABLE rejected (log_offset TEXT NOT NULL, line INTEGER NOT NULL, payload TEXT NOT NULL, reason TEXT NOT NULL);",
    )
}

/// The shop's own connection, on which every statement commits on its own.
pub(crate) fn own_connection(path: &Path) -> rusqlite::Result<Connection> {
    let connection = Connection::open(path)?;
    // The consumer commits its position to the same file meanwhile.
    connection.busy_timeout(Duration::from_secs(10))?;
    // A write survives the death of its process without a sync. Here only processes die.
    connection.pragma_update(None, "synchronous", "NORMAL")?;
    Ok(connection)
}

pub(super) fn count(shop: &Connection) -> rusqlite::Result<Books> {
    let number = |sql: &str| shop.query_row(sql, [], |row| Ok(row.get::<_, i64>(0)? as u64));
    Ok(Books {
        shipped_once: number("SELECT count(*) FROM (SELECT 1 FROM shipments GROUP BY log_offset HAVING count(*) = 1)")?,
        shipped_more: number("SELECT count(*) FROM (SELECT 1 FROM shipments GROUP BY log_offset HAVING count(*) > 1)")?,
        rejected: number("SELECT count(DISTINCT log_offset) FROM rejected")?,
        effects: number("SELECT (SELECT count(*) FROM shipments) + (SELECT count(*) FROM rejected)")?,
    })
}
