//! The row of each log.

use std::sync::Arc;

use essentially_once::{
    Epoch, Error,
    backend::{LogId, Numbering, new_producer, unique},
};
use tokio_postgres::Row;

use super::retention::{RetentionColumns, from_columns};
use crate::{
    connection::{Param, Pool, Session},
    error::Fault,
};

const FIND: &str = "SELECT id, incarnation, keep_records, keep_age_ms, sender FROM {s}.logs WHERE name = $1";

const CREATE: &str = "INSERT INTO {s}.logs (name, incarnation) VALUES ($1, $2) ON CONFLICT (name) DO NOTHING";

const SET_RETENTION: &str = "UPDATE {s}.logs SET keep_records = $2, keep_age_ms = $3 WHERE id = $1";

const SET_SENDER: &str = "UPDATE {s}.logs SET sender = $2 WHERE id = $1 AND sender IS NULL";

const NAMES: &str = "SELECT name FROM {s}.logs ORDER BY name LIMIT 21";

/// The number of logs that an error lists.
const NAMED: usize = 20;

/// What the row of a log says.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) id: LogId,
    pub(super) row: i64,
    retention: RetentionColumns,
    has_sender: bool,
}

impl Found {
    fn of(name: &str, row: &Row) -> Result<Self, Error> {
        Ok(Self {
            id: LogId::from_parts(name, Some(row.get(1)))?,
            row: row.get(0),
            retention: (row.get(2), row.get(3)),
            has_sender: row.get::<_, Option<&str>>(4).is_some(),
        })
    }
}

/// How to open a log.
#[derive(Clone, Copy, Default)]
pub(super) struct Wanted {
    pub(super) must_exist: bool,
    pub(super) retention: Option<RetentionColumns>,
    /// Whether transactions send to it.
    pub(super) as_outbox: bool,
}

/// Finds or creates a log.
pub(super) async fn open(pool: &Arc<Pool>, name: &str, wanted: Wanted) -> Result<Found, Error> {
    LogId::new(name)?;
    let action = || pool.on(format!("open log {name}"));
    let failed = |fault: Fault| fault.of_read(action());
    let mut session = pool.take(action).await?;
    if !wanted.must_exist {
        // Most logs exist.
        let found = pool.within(session.query_own(FIND, &[&name])).await.map_err(failed)?;
        if found.is_empty() {
            let incarnation = format!("{:016x}", unique() as u64);
            let created = pool.within(session.execute_own(CREATE, &[&name, &incarnation])).await;
            created.map_err(failed)?;
        }
    }
    let rows = pool.within(session.query_own(FIND, &[&name])).await.map_err(failed)?;
    let Some(row) = rows.first() else {
        let names = pool.within(names(&mut session)).await.map_err(failed)?;
        return Err(Error::failed(action(), no_such_log(&names)));
    };
    let found = Found::of(name, row)?;
    if let Some(wanted) = wanted.retention
        && wanted != found.retention
    {
        let (before, after) = (from_columns(found.retention), from_columns(wanted));
        tracing::warn!(
            log = name,
            ?before,
            ?after,
            "changing which records the log keeps, for all processes"
        );
        let params: [Param<'_>; 3] = [&found.row, &wanted.0, &wanted.1];
        pool.within(session.execute_own(SET_RETENTION, &params))
            .await
            .map_err(failed)?;
    }
    if wanted.as_outbox && !found.has_sender {
        let sender = Numbering::new(new_producer(name)?, Epoch::STABLE).to_string();
        let params: [Param<'_>; 2] = [&found.row, &sender];
        pool.within(session.execute_own(SET_SENDER, &params))
            .await
            .map_err(failed)?;
    }
    Ok(found)
}

async fn names(session: &mut Session) -> Result<Vec<String>, Fault> {
    let rows = session.query_own(NAMES, &[]).await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// Explains that no log has the wanted name.
fn no_such_log(names: &[String]) -> String {
    if names.is_empty() {
        return "no log has that name, and the schema holds no other log; check the URL and the schema, or open the log \
                without `existing()` to create it"
            .into();
    }
    let rest = if names.len() > NAMED { " and others" } else { "" };
    let names = names[..names.len().min(NAMED)].join(", ");
    format!(
        "no log has that name; the schema holds {names}{rest}; check the name, or open the log without `existing()` to \
         create it"
    )
}
