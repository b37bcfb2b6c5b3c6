//! Records that a transaction sends. They are staged in this process, and the commit appends them.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use essentially_once::{Error, NewRecord};

use super::{
    append::{Columns, SEND},
    catalog::{self, Wanted},
};
use crate::{
    connection::{Part, Pool, Session},
    error::Fault,
};

/// The most logs that a store remembers. Services send to a few.
const MOST: usize = 1_000;

/// The bytes of one statement, more or less.
const STATEMENT_BYTES: usize = 32 * 1024 * 1024;

/// The logs to which the transactions of a store have sent.
#[derive(Debug, Default)]
pub(crate) struct Outboxes {
    known: Mutex<HashMap<Box<str>, Outbox>>,
}

#[derive(Clone, Debug)]
struct Outbox {
    row: i64,
    incarnation: Arc<str>,
}

impl Outboxes {
    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<Box<str>, Outbox>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A log to which a transaction sends, and what it sends.
#[derive(Debug)]
struct Sending {
    name: Box<str>,
    outbox: Outbox,
    records: Vec<NewRecord>,
}

/// The logs to which one transaction sends. They are few, so searching them is faster than hashing.
#[derive(Debug)]
pub(crate) struct Outgoing {
    outboxes: Arc<Outboxes>,
    logs: Vec<Sending>,
}

impl Outgoing {
    pub(crate) fn new(outboxes: Arc<Outboxes>) -> Self {
        Self {
            outboxes,
            logs: Vec::new(),
        }
    }

    /// Whether this transaction has sent to the log.
    pub(crate) fn is_open(&self, name: &str) -> bool {
        self.logs.iter().any(|sending| *sending.name == *name)
    }

    /// Finds the log, or creates it, in a session of its own: nobody else must wait for this
    /// transaction to create it.
    pub(crate) async fn open(&mut self, pool: &Arc<Pool>, name: &str) -> Result<(), Error> {
        let known = self.outboxes.lock().get(name).cloned();
        let outbox = match known {
            Some(outbox) => outbox,
            None => {
                let wanted = Wanted {
                    as_outbox: true,
                    ..Wanted::default()
                };
                let found = catalog::open(pool, name, wanted).await?;
                let outbox = Outbox {
                    row: found.row,
                    incarnation: found.id.incarnation().unwrap_or_default().into(),
                };
                let mut known = self.outboxes.lock();
                if known.len() >= MOST {
                    known.clear();
                }
                known.insert(name.into(), outbox.clone());
                outbox
            }
        };
        self.logs.push(Sending {
            name: name.into(),
            outbox,
            records: Vec::new(),
        });
        Ok(())
    }

    /// Stages a record for a log that is open.
    pub(crate) fn send(&mut self, name: &str, record: NewRecord) {
        if let Some(sending) = self.logs.iter_mut().find(|sending| *sending.name == *name) {
            sending.records.push(record);
        }
    }

    /// Sends the statements that append the records. All transactions lock the rows of the logs in
    /// the same order.
    pub(crate) async fn send_all(&mut self, session: &mut Session) -> Result<(), Fault> {
        self.logs.sort_unstable_by_key(|sending| sending.outbox.row);
        for (place, sending) in self.logs.iter().enumerate() {
            let mut rest = &sending.records[..];
            while !rest.is_empty() {
                let mut bytes = 0;
                let fits = rest.iter().take_while(|record| {
                    bytes += record.size();
                    bytes <= STATEMENT_BYTES
                });
                let (now, later) = rest.split_at(fits.count().max(1));
                rest = later;
                let (columns, incarnation) = (Columns::of(now), &*sending.outbox.incarnation);
                let [row, incarnation, count, keys, headers, payloads, ..] =
                    columns.params(&sending.outbox.row, &incarnation);
                let statement = session.own(SEND).await?;
                let params = [row, incarnation, count, keys, headers, payloads];
                session.send(Part::Send(place), &statement, &params).await?;
            }
        }
        Ok(())
    }

    /// Wakes the readers of the logs.
    pub(crate) fn committed(&self, pool: &Arc<Pool>) {
        if !self.logs.is_empty() {
            pool.bell.ring(pool, self.logs.iter().map(|sending| sending.outbox.row));
        }
    }

    /// Forgets a log that no longer exists, and returns its name.
    pub(crate) fn forget(&self, place: usize) -> &str {
        let Some(sending) = self.logs.get(place) else {
            return "of an outbox";
        };
        self.outboxes.lock().remove(&sending.name);
        &sending.name
    }
}
