//! For adapter authors: the types that the traits use, and the code that every backend would
//! otherwise repeat.
//!
//! [`Log`](crate::Log) and [`OffsetStore`](crate::OffsetStore) state the contracts,
//! [`memory`](crate::memory) is the reference implementation, and `essentially-once-testkit` tests
//! an implementation.
//!
//! - A log reports its [`Bounds`] and checks a reader's start with [`Bounds::check`].
//! - A [`FetchBudget`] limits a fetch, so that a reader holds about a megabyte regardless of the
//!   size of the records. A [`FetchBuffer`] holds the bytes of its records in one allocation.
//! - [`Advance::check`] decides whether a commit applies.
//! - [`check_size`] refuses oversized records, keys and values.
//! - [`unique`] draws the random part of tokens and incarnations.
//! - [`ByteReader`] decodes stored bytes without copying them, and [`NumberingCache`] parses a
//!   producer's name once for a run of its records. [`encode_headers`] and [`decode_headers`] are
//!   for stores that keep all headers of a record in one column.

mod byte_reader;
mod current_run;
mod fetch_budget;
mod fetch_buffer;
mod headers;
mod numbering_cache;
mod retention;
mod unique;

pub(crate) use self::current_run::within_run;
pub use self::{
    byte_reader::{ByteReader, CutShort},
    current_run::current_run,
    fetch_budget::FetchBudget,
    fetch_buffer::FetchBuffer,
    headers::{decode_headers, encode_headers},
    numbering_cache::NumberingCache,
    retention::Retention,
    unique::unique,
};
use crate::Error;
pub use crate::{
    error::Source,
    journal::Journal,
    letters::{DeadLetter, DeadLetters, Edit},
    log::{Bounds, Durability, LogReader},
    name::{LogId, Numbering},
    note::{Note, Tried},
    outbox::{check_unnumbered, new_producer},
    record::Header,
    revision::{Owner, Revision},
    store::{Advance, Position, Pulse, Snapshot, Transaction},
    window::Window,
};

/// Refuses a size over `limit` bytes. `what` is the name for the error: `"record"`, `"key"` or
/// `"value"`.
///
/// # Errors
/// [`Error::TooLarge`].
pub const fn check_size(what: &'static str, size: usize, limit: usize) -> Result<(), Error> {
    if size > limit {
        return Err(Error::TooLarge { what, size, limit });
    }
    Ok(())
}

/// Refuses a key or a value over `limit` bytes, as [`KeyValue::put`](crate::KeyValue::put) must.
///
/// # Errors
/// [`Error::TooLarge`].
pub fn check_entry_size(key: &[u8], value: &[u8], limit: usize) -> Result<(), Error> {
    check_size("key", key.len(), limit)?;
    check_size("value", value.len(), limit)
}
