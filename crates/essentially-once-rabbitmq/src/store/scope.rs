//! One consumer's part of the store: its stream, its limits, and the errors about them.

use std::{future::Future, sync::Arc};

use essentially_once::{
    ConsumerId, Error,
    backend::{DeadLetter, LogId, Revision, check_size},
};

use super::{
    names::{self, Kind},
    rule::Missing,
    snapshot_policy::{LENGTH, SEGMENT},
};
use crate::connection::server::Server;

const MIB: usize = 1024 * 1024;

/// The largest state. The streams of the snapshots have room for a few of this size.
const STATE_MAX: usize = 256 * MIB;

/// The most bytes of changelog between two snapshots.
const SNAPSHOT_AFTER_MAX: u64 = 64 * MIB as u64;

/// What an entry takes besides staged changes if few producers are read at a time. If it takes
/// more, the commit fails.
const HEAD: usize = 1024;

/// The most bytes of changelog behind a record that a relay has not passed on. Commits that do not
/// send to its outbox may take half as much again. The rest up to the changelog's length is room
/// for entries of other writers, and for marks, which are not refused.
const UNRELAYED_MAX: u64 = 256 * MIB as u64;

const UNRELAYED_MIN: u64 = MIB as u64;

/// The largest entry. The changelog's retention relies on it.
const ENTRY_MAX: usize = 32 * MIB;

/// What an entry may take besides its largest value.
const BESIDE_VALUE: usize = 64 * 1024;

/// Limits of one handle, in bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    value: usize,
    entry: usize,
    pub(super) state: usize,
    pub(super) snapshot_after: u64,
    pub(super) unrelayed: u64,
}

impl Limits {
    pub(super) fn new(record_limit: usize) -> Self {
        let value = record_limit.min(ENTRY_MAX - BESIDE_VALUE);
        Self {
            value,
            entry: (value + BESIDE_VALUE).max(8 * MIB),
            state: STATE_MAX,
            snapshot_after: 8 * MIB as u64,
            unrelayed: UNRELAYED_MAX,
        }
    }

    pub(super) fn check(&self) -> Result<(), Error> {
        let (setting, reason) = if self.state > STATE_MAX {
            ("state_limit", format!("it must be at most {STATE_MAX} bytes"))
        } else if self.snapshot_after > SNAPSHOT_AFTER_MAX {
            (
                "snapshot_after",
                format!("it must be at most {SNAPSHOT_AFTER_MAX} bytes"),
            )
        } else if !(UNRELAYED_MIN..=UNRELAYED_MAX).contains(&self.unrelayed) {
            (
                "unrelayed_limit",
                format!("it must be from {UNRELAYED_MIN} to {UNRELAYED_MAX} bytes"),
            )
        } else {
            return Ok(());
        };
        Err(Error::InvalidSetting { setting, reason })
    }
}

/// A consumer, its changelog stream, and the limits of the handle.
pub(super) struct Scope {
    pub(super) server: Arc<Server>,
    pub(super) consumer: ConsumerId,
    pub(super) stream: String,
    pub(super) limits: Limits,
}

impl Scope {
    pub(super) fn new(server: &Arc<Server>, consumer: &ConsumerId, limits: Limits) -> Self {
        Self {
            server: Arc::clone(server),
            consumer: consumer.clone(),
            stream: names::name(&server.options.prefix, consumer, Kind::Changelog),
            limits,
        }
    }

    /// Names the action, the consumer, the stream and the broker.
    pub(super) fn on(&self, verb: &str) -> String {
        self.server
            .on(format!("{verb} consumer {} in stream {}", self.consumer, self.stream))
    }

    /// Waits for entries that were published, within the time limit.
    pub(super) async fn within_limit<T>(&self, reading: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
        let limit = self.server.timeout;
        tokio::time::timeout(limit, reading).await.unwrap_or_else(|_| {
            Err(Error::unavailable(
                self.on("read"),
                format!("the published entry did not come back within {limit:?}"),
            ))
        })
    }

    /// The name of an outbox of this consumer in positions.
    pub(super) fn outbox(&self, outbox: &str) -> Result<LogId, Error> {
        LogId::new(outbox)?;
        let name = names::outbox(&self.server.options.prefix, &self.consumer, outbox);
        LogId::new(name).map_err(|error| match error {
            Error::InvalidName { kind, reason, .. } => Error::InvalidName {
                kind,
                name: outbox.chars().take(60).collect(),
                reason: format!(
                    "together with the prefix and the name of consumer {}, {reason}; choose a shorter name",
                    self.consumer
                ),
            },
            error => error,
        })
    }

    /// The largest key, value or record that a commit can hold.
    pub(super) fn value_limit(&self) -> usize {
        self.limits.value.min(self.server.message_limit())
    }

    /// The largest record of a letter, with its reasons.
    pub(super) fn letter_limit(&self) -> usize {
        self.value_limit().saturating_add(2 * DeadLetter::REASON_LIMIT)
    }

    /// The largest entry that this broker takes, as far as known.
    pub(super) fn entry_limit(&self) -> usize {
        self.limits.entry.min(self.server.message_limit())
    }

    /// Refuses to stage more than a commit can hold.
    pub(super) fn check_staged_size(&self, staged: usize) -> Result<(), Error> {
        check_size("transaction", staged + HEAD, self.entry_limit())
    }

    /// Refuses to let the state grow beyond its limit.
    pub(super) fn check_state_size(&self, before: usize, after: usize) -> Result<(), Error> {
        match self.limits.state {
            limit if after > limit && after > before => Err(Error::failed(
                self.on("change the state of"),
                format!(
                    "it would take about {after} bytes of memory, over the limit of {limit} \
                     (`RabbitStore::state_limit`); delete keys and dead letters that are not needed, or keep the state in a database \
                     with a store of its own"
                ),
            )),
            _ => Ok(()),
        }
    }

    pub(super) fn entry_too_large(&self, size: usize, limit: usize) -> Error {
        let raise = match limit < self.limits.entry {
            true => "raise `max_message_size` of the broker",
            false => "raise `record_limit` if the broker takes larger messages",
        };
        Error::failed(
            self.on("commit of"),
            format!(
                "its changes, dead letters and sent records take {size} bytes, and a commit can hold {limit}; handle fewer records \
                 at a time (the consumer's `max_batch`), or {raise}; nothing was published"
            ),
        )
    }

    pub(super) fn fenced(&self, expected: Revision) -> Error {
        Error::Fenced {
            consumer: self.consumer.clone(),
            expected,
        }
    }

    pub(super) fn wrong_log(&self, stored: LogId, given: LogId) -> Error {
        Error::WrongLog {
            consumer: self.consumer.clone(),
            stored,
            given,
        }
    }

    pub(super) fn unreadable(&self, offset: u64, why: &str) -> Error {
        Error::failed(
            self.on("read"),
            format!("the entry at offset {offset} cannot be read: {why}; ignoring it could lose a commit"),
        )
    }

    pub(super) fn missing(&self, offset: u64, missing: Missing) -> Error {
        self.lost(format!("at offset {offset}, {missing}"))
    }

    pub(super) fn lost(&self, what: String) -> Error {
        Error::failed(
            self.on("read"),
            format!("state lost: {what}; restore the streams, or start over with another consumer name"),
        )
    }

    pub(super) fn read_error(&self, error: Error) -> Error {
        match error {
            // The next call starts from a newer snapshot.
            Error::Truncated { .. } => Error::unavailable(self.on("read"), error),
            Error::OutOfRange { end, .. } => self.lost(format!(
                "the changelog ends at {end}, before an entry that was read; it was created again, or the broker lost \
                 its tail"
            )),
            error => error,
        }
    }
}

/// An entry in doubt here changes neither state nor position.
pub(super) fn nothing_done(error: Error) -> Error {
    match error {
        Error::Indeterminate { action, cause } => Error::Unavailable { action, cause },
        error => error,
    }
}

const _: () = assert!(UNRELAYED_MAX + UNRELAYED_MAX / 2 + 3 * ENTRY_MAX as u64 + SEGMENT <= LENGTH);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_out_of_bounds_are_refused() {
        let limits = Limits::new(usize::MAX);
        assert!(limits.check().is_ok());
        let state = Limits {
            state: STATE_MAX + 1,
            ..limits
        };
        let snapshots = Limits {
            snapshot_after: SNAPSHOT_AFTER_MAX + 1,
            ..limits
        };
        let [less, more] = [UNRELAYED_MIN - 1, UNRELAYED_MAX + 1].map(|unrelayed| Limits { unrelayed, ..limits });
        for (limits, wrong) in [
            (state, "state_limit"),
            (snapshots, "snapshot_after"),
            (less, "unrelayed_limit"),
            (more, "unrelayed_limit"),
        ] {
            let refused = limits.check();
            assert!(
                matches!(refused, Err(Error::InvalidSetting { setting, .. }) if setting == wrong),
                "{refused:?}"
            );
        }
    }
}
