//! Appends within a transaction that commits more than records: that of a handler, or one on a
//! connection of the user. Each record gets an origin, of the log's sender and with its offset as
//! the sequence.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
};

use essentially_once::{
    Epoch, Error, NewRecord, Offset,
    backend::{Durability, LogId, Numbering, new_producer},
};
use rusqlite::{Connection, TransactionState};

use super::{
    catalog::find_or_create,
    retention::now_millis,
    table::{Batch, Table, explain_insert},
};
use crate::{
    connection::{
        Connections, WriteTx,
        lock::lock,
        open::{durability, full_fsync},
    },
    error::{classify, classify_with_lock, classify_without_lock},
};

/// The cache drops all tables when it reaches this number. Otherwise handlers that send to ever new
/// logs would fill the memory.
const MOST: usize = 256;

/// The tables of the logs that the transactions of one store send to. They hold the text of their
/// statements, which would otherwise be built once per transaction.
#[derive(Debug, Default)]
pub(crate) struct Outboxes {
    tables: Mutex<HashMap<Box<str>, Arc<Table>>>,
}

impl Outboxes {
    fn known(&self, name: &str) -> Option<Arc<Table>> {
        lock(&self.tables).get(name).map(Arc::clone)
    }

    /// Opens a log in a write transaction, and creates it if it is missing.
    fn open(
        &self,
        connections: &Arc<Connections>,
        connection: &Connection,
        name: &str,
        action: impl Fn() -> String,
    ) -> Result<Sending, Error> {
        let failed = |error| classify(action(), error);
        if let Some(table) = self.known(name)
            && let Some(batch) = table.number(connection, failed)?
        {
            return Ok(Sending::new(table, batch));
        }
        // The log is new, was recreated, or was created in a transaction that was rolled back.
        let found = find_or_create(connection, name).map_err(failed)?;
        let id = LogId::new(name)?.with_incarnation(&found.incarnation)?;
        let table = Arc::new(Table::new(Arc::clone(connections), id, found.id));
        let Some(batch) = table.number(connection, failed)? else {
            return Err(table.gone(action()));
        };
        let mut tables = lock(&self.tables);
        if tables.len() >= MOST {
            tables.clear();
        }
        tables.insert(name.into(), Arc::clone(&table));
        Ok(Sending::new(table, batch))
    }
}

/// A log to which a transaction sends, and what it has sent.
#[derive(Debug)]
struct Sending {
    table: Arc<Table>,
    batch: Batch,
    /// The number of records that were sent before the batch.
    earlier: u64,
}

impl Sending {
    fn new(table: Arc<Table>, batch: Batch) -> Self {
        Self {
            table,
            batch,
            earlier: 0,
        }
    }

    fn sent(&self) -> u64 {
        self.earlier + self.batch.added()
    }
}

/// The logs to which one transaction sends. They are few, so searching them is faster than hashing.
#[derive(Debug)]
pub(crate) struct Outgoing {
    outboxes: Arc<Outboxes>,
    logs: Vec<Sending>,
    /// Logs whose records a rollback to a savepoint may have removed, and the number of records
    /// that were sent to them.
    in_doubt: Vec<(Arc<Table>, u64)>,
}

impl Outgoing {
    pub(crate) fn new(outboxes: Arc<Outboxes>) -> Self {
        Self {
            outboxes,
            logs: Vec::new(),
            in_doubt: Vec::new(),
        }
    }

    /// Whether the next record for the log of that name needs no look at the log.
    pub(crate) fn is_open(&self, name: &str) -> bool {
        self.place(name).is_some()
    }

    fn place(&self, name: &str) -> Option<usize> {
        self.logs.iter().position(|sending| sending.table.id.name() == name)
    }

    /// Inserts a record. `action` becomes the action of an error.
    pub(crate) fn send(
        &mut self,
        tx: &mut WriteTx,
        connections: &Arc<Connections>,
        name: &str,
        record: &NewRecord,
        action: impl Fn() -> String,
    ) -> Result<(), Error> {
        let place = match self.place(name) {
            Some(place) => place,
            None => {
                let sending = self.outboxes.open(connections, tx.connection(), name, &action)?;
                self.logs.push(sending);
                self.logs.len() - 1
            }
        };
        let Sending { table, batch, .. } = &mut self.logs[place];
        batch.check_room(1, &action)?;
        tx.run_internal(table.insert_sql(), |statement| {
            batch.insert(statement, now_millis(), record)
        })
        .map_err(|error| explain_insert(&action, error, classify))
    }

    /// Forgets where the logs end, because a rollback to a savepoint may have removed records, or a
    /// log that was new.
    pub(crate) fn look_again(&mut self) {
        for sending in self.logs.drain(..) {
            let (sent, table) = (sending.sent(), sending.table);
            match self.in_doubt.iter_mut().find(|(known, _)| known.id == table.id) {
                Some((_, earlier)) => *earlier += sent,
                None => self.in_doubt.push((table, sent)),
            }
        }
    }

    /// Stores where the logs end, before the commit.
    pub(crate) fn finish(&mut self, connection: &Connection) -> rusqlite::Result<()> {
        for (table, sent) in self.in_doubt.drain(..) {
            let sending = self.logs.iter_mut().find(|sending| sending.table.id == table.id);
            if let Some(sending) = sending {
                sending.earlier += sent;
            } else if let Some(status) = table.status(connection)? {
                let mut sending = Sending::new(table, Batch::new(status));
                sending.earlier = sent;
                self.logs.push(sending);
            }
        }
        let now = now_millis();
        self.logs.iter().try_for_each(|sending| {
            let (table, batch) = (&sending.table, &sending.batch);
            table.finish(connection, batch, sending.sent(), now)
        })
    }

    /// Wakes the readers of this process, after the commit.
    pub(crate) fn wake_readers(&self) {
        for Sending { table, .. } in &self.logs {
            table.wake.send_replace(());
        }
    }
}

impl Table {
    /// Begins a batch of numbered records, and draws the log's sender if it has none. Returns
    /// `None` if the log was deleted or recreated.
    fn number(
        &self,
        connection: &Connection,
        failed: impl Fn(rusqlite::Error) -> Error,
    ) -> Result<Option<Batch>, Error> {
        let Some(status) = self.status(connection).map_err(&failed)? else {
            return Ok(None);
        };
        let sender = match &status.sender {
            Some(sender) => sender.clone(),
            None => {
                let sender = Numbering::new(new_producer(self.id.name())?, Epoch::STABLE).to_string();
                self.set_sender(connection, &sender).map_err(failed)?;
                sender
            }
        };
        Ok(Some(Batch::numbered(status, sender)))
    }

    /// Appends numbered records in a transaction of the user, all of them or none.
    pub(super) fn append_in(&self, theirs: &Connection, records: &[NewRecord]) -> Result<Offset, Error> {
        let action = || {
            self.connections
                .on(format!("append to log {} in your transaction", self.id))
        };
        let classify = match theirs.transaction_state(Some("main")) {
            Ok(TransactionState::Write) => classify_with_lock,
            _ => classify_without_lock,
        };
        let failed = |error| classify(action(), error);
        let run = |sql| theirs.prepare_cached(sql)?.execute([]);
        self.check_connection(theirs, action)?;
        run("SAVEPOINT essentially_once_append").map_err(failed)?;
        let appended = self.append_numbered(theirs, records, action, classify);
        if appended.is_err() {
            // It fails only if SQLite has rolled back the whole transaction.
            let _ = run("ROLLBACK TO essentially_once_append");
        }
        let released = run("RELEASE essentially_once_append").map_err(failed);
        appended.and_then(|last| released.map(|_| last))
    }

    fn append_numbered(
        &self,
        theirs: &Connection,
        records: &[NewRecord],
        action: impl Fn() -> String,
        classify: fn(String, rusqlite::Error) -> Error,
    ) -> Result<Offset, Error> {
        let failed = |error| classify(action(), error);
        // Takes the write lock before the first read. A transaction that has read cannot get the
        // lock any more once another one has committed.
        theirs
            .prepare_cached("UPDATE main.essentially_once_logs SET next = next WHERE name = ?1")
            .and_then(|mut lock| lock.execute([self.id.name()]))
            .map_err(failed)?;
        let Some(batch) = self.number(theirs, failed)? else {
            return Err(self.gone(action()));
        };
        let end = self.insert(theirs, batch, records, action, classify)?;
        Ok((end - 1).into())
    }

    /// Refuses a connection on which an append would go elsewhere, or could be lost.
    fn check_connection(&self, theirs: &Connection, action: impl Fn() -> String) -> Result<(), Error> {
        let ours = self.connections.path.display();
        match theirs.path() {
            Some("") => {
                let cause = format!("the connection's main database is in memory or temporary; open {ours} with it");
                return Err(Error::failed(action(), cause));
            }
            Some(path) if !self.connections.file.is_at(path) => {
                let cause = format!("the connection's main database is another file, {path}; open {ours} with it");
                return Err(Error::failed(action(), cause));
            }
            // A path that is not UTF-8 is not shown. The log's incarnation is compared in any case.
            _ => {}
        }
        if theirs.is_autocommit() {
            let cause = "SQLite rolled the transaction back after an earlier error (OR ROLLBACK, RAISE(ROLLBACK), a \
                         full disk); begin a new one";
            return Err(Error::failed(action(), cause));
        }
        let failed = |error| classify(action(), error);
        if cfg!(target_os = "macos") && !full_fsync(theirs).map_err(failed)? {
            let cause = "on macOS, a power failure could take back the commit and use the record's number again; run \
                         `PRAGMA fullfsync = 1` on the connection";
            return Err(Error::failed(action(), cause));
        }
        match durability(theirs).map_err(failed)? {
            // Someone may have passed on a record before a power failure takes it back, and the
            // next record would have the same origin.
            Durability::Volatile(why) => Err(Error::failed(
                action(),
                format!("a power failure could take back the commit and use the record's number again: {why}"),
            )),
            _ => Ok(()),
        }
    }
}
