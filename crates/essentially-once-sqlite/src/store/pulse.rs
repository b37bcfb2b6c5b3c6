//! Lets a standby see whether a position's owner is alive, without waiting for the owner.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use essentially_once::{
    ConsumerId, Error, Offset,
    backend::{Owner, Pulse, Revision},
};
use rusqlite::{Connection, OptionalExtension};

use super::statements::unsigned;
use crate::error::is_busy;

/// A held lock counts as a beat at most this often, however often a standby looks.
const BEAT: Duration = Duration::from_millis(20);

/// A held lock counts as a beat from this look without a commit on. Before, it may be held by
/// ordinary batches of another consumer, whose commits just miss the looks.
const LOOKS_WITHOUT_COMMIT: u32 = 3;

/// A connection that asks for the write lock to see whether it is free, and never writes.
pub(crate) struct Observer {
    connection: Connection,
    looks: HashMap<ConsumerId, Look>,
}

/// The result of the last look at a consumer.
struct Look {
    at: Instant,
    version: i64,
    /// How many looks in a row found no commit and the lock held.
    still: u32,
    /// How often a held lock has counted as a beat.
    held: u64,
}

/// A pulse whose owner is not parsed yet.
pub(crate) struct Seen {
    next: Offset,
    revision: Revision,
    owner: Option<String>,
    beats: u64,
}

impl Observer {
    pub(crate) fn new(connection: Connection) -> Self {
        Self {
            connection,
            looks: HashMap::new(),
        }
    }

    /// Returns a number that changes with each commit to the file by another connection.
    pub(crate) fn data_version(&self) -> rusqlite::Result<i64> {
        self.connection
            .prepare_cached("PRAGMA main.data_version")?
            .query_row([], |row| row.get(0))
    }

    /// Reads the signs of life of the consumer's owner. `is_held` says that a transaction of this
    /// process holds the lock.
    pub(crate) fn look(&mut self, consumer: &ConsumerId, is_held: bool) -> rusqlite::Result<Option<Seen>> {
        let version = self.data_version()?;
        let seen = self
            .connection
            .prepare_cached(
                "SELECT next_hi, next_lo, epoch, count, owner, beats FROM main.essentially_once_consumers \
                 WHERE consumer = ?1",
            )?
            .query_row([consumer.as_str()], |row| {
                Ok(Seen {
                    next: Offset::new(unsigned(row, 0)?, unsigned(row, 1)?),
                    revision: Revision::new(unsigned(row, 2)?, unsigned(row, 3)?),
                    owner: row.get(4)?,
                    beats: unsigned(row, 5)?,
                })
            })
            .optional()?;
        let Some(mut seen) = seen else {
            return Ok(None);
        };
        let now = Instant::now();
        let Some(last) = self.looks.get_mut(consumer) else {
            let look = Look {
                at: now,
                version,
                still: 0,
                held: 0,
            };
            self.looks.insert(consumer.clone(), look);
            return Ok(Some(seen));
        };
        if last.version != version {
            (last.version, last.at, last.still) = (version, now, 0);
        } else if now - last.at >= BEAT {
            last.at = now;
            // One transaction holds the lock. Whoever owns it, no other instance could commit
            // meanwhile.
            last.still = match is_held || is_locked(&self.connection)? {
                true => last.still.saturating_add(1),
                false => 0,
            };
            if last.still >= LOOKS_WITHOUT_COMMIT {
                last.held = last.held.wrapping_add(1);
            }
        }
        seen.beats = seen.beats.wrapping_add(last.held);
        Ok(Some(seen))
    }
}

impl Seen {
    pub(crate) fn pulse(self) -> Result<Pulse, Error> {
        let mut pulse = Pulse::default();
        pulse.next = self.next;
        pulse.revision = self.revision;
        pulse.owner = self.owner.as_deref().map(str::parse::<Owner>).transpose()?;
        pulse.beats = self.beats;
        Ok(pulse)
    }
}

/// Whether a transaction holds the write lock. The only way to know is to take it, briefly and
/// without writing.
fn is_locked(connection: &Connection) -> rusqlite::Result<bool> {
    match connection.execute_batch("BEGIN IMMEDIATE") {
        Ok(()) => connection.execute_batch("ROLLBACK").map(|()| false),
        Err(error) if is_busy(&error) => Ok(true),
        Err(error) => Err(error),
    }
}
