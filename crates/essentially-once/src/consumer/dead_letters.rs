//! Dead letters for operators: what a consumer has set aside, and what becomes of it.
//!
//! A consumer with [`Consumer::dead_letters`](super::Consumer::dead_letters) sets a record that it
//! cannot handle aside, in the commit that moves its position past the record. No crash can lose
//! the record or handle it twice. Later records of its key are set aside behind it, so that each
//! key keeps its order. Records of other keys, and records without a key, do not wait.
//!
//! The running consumer tries letters again: when [`retry`] or [`retry_all`] asks for it, or on its
//! own after [`retry_after`](super::DeadLetterOptions::retry_after). These functions need no
//! handler, and no consumer needs to run.
//!
//! Every change is committed in the name of the consumer, together with an entry in its
//! [journal](crate::backend::Position::journal) that says who made it. A running instance then goes
//! back to its stored position and goes on from there.
//!
//! ```
//! use essentially_once::consumer::dead_letters::{self, LetterFilter};
//! use essentially_once::consumer::{DeadLetterOptions, Operator};
//! use essentially_once::memory::{Memory, MemoryTx};
//! use essentially_once::{Consumer, ConsumerId, HandlerError, Log, NewRecord, Record, handler_fn};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), essentially_once::Error> {
//! let memory = Memory::new();
//! let (log, store) = (memory.log("orders")?, memory.store());
//! log.append(&[
//!     NewRecord::new("garbage").key("Chile"),
//!     NewRecord::new("10248").key("Chile"), // waits behind the garbage
//!     NewRecord::new("10249").key("Brazil"),
//! ])
//! .await?;
//!
//! let shipping = ConsumerId::new("shipping")?;
//! let run = || {
//!     let ship = handler_fn(|record: &Record, _: &mut MemoryTx| {
//!         Box::pin(async move {
//!             let order = std::str::from_utf8(&record.payload)?;
//!             order.parse::<u64>().map_err(HandlerError::reject)?;
//!             Ok(())
//!         })
//!     });
//!     Consumer::essentially_once(shipping.clone(), log.clone(), store.clone(), ship)
//!         .dead_letters(DeadLetterOptions::new())
//!         .accept_volatile()
//!         .run_until_caught_up()
//! };
//! let report = run().await?;
//! assert_eq!((report.handled, report.parked), (1, 2));
//!
//! let unreadable = LetterFilter::all().reason("invalid digit");
//! let letters = dead_letters::find(&shipping, &store, &unreadable, None, 100).await?;
//! assert_eq!(letters.len(), 1);
//!
//! let ann = Operator::new("ann").because("a typing error");
//! let mut mended = NewRecord::from(&letters[0].record);
//! mended.payload = "10247".into();
//! dead_letters::edit(&shipping, &store, &letters[0], &mended, &ann).await?;
//! let report = run().await?; // the next one of the key follows at once
//! assert_eq!(report.handled, 2);
//! assert!(dead_letters::list(&shipping, &store, None, 100).await?.is_empty());
//! # Ok(())
//! # }
//! ```

use std::collections::{HashMap, HashSet};

pub use super::letter_filter::LetterFilter;
use super::{
    letter_sweeps::{DiscardAll, RetryAll, plan, sweep},
    letter_verbs::{Discard, EditLetter, Retry},
    verbs::{PATIENCE, change, try_out},
};
use crate::{
    ConsumerId, Error, NewRecord, Offset, OffsetStore, Operator, Transaction,
    letters::{DeadLetter, DeadLetters},
};

/// How many letters to read at once in search of others.
const SEARCHED_AT_ONCE: usize = 100;

/// The consumer's letters after an offset, or from the first one on, at most `limit`, in the order
/// of their offsets. For the next page, give the offset of the last.
///
/// # Errors
/// [`Error::Unavailable`], [`Error::Failed`].
pub async fn list<S>(
    consumer: &ConsumerId,
    store: &S,
    after: Option<Offset>,
    limit: usize,
) -> Result<Vec<DeadLetter>, Error>
where
    S: OffsetStore,
    S::Tx: DeadLetters,
{
    let mut tx = begin(consumer, store).await?;
    let letters = tx.list(after, limit).await?;
    tx.rollback().await?;
    Ok(letters)
}

/// The consumer's letters after an offset, or from the first one on, that the filter selects, at
/// most `limit`, in the order of their offsets. It reads letters until that many are found.
///
/// # Errors
/// As for [`list`].
pub async fn find<S>(
    consumer: &ConsumerId,
    store: &S,
    filter: &LetterFilter,
    mut after: Option<Offset>,
    limit: usize,
) -> Result<Vec<DeadLetter>, Error>
where
    S: OffsetStore,
    S::Tx: DeadLetters,
{
    let mut tx = begin(consumer, store).await?;
    let mut found = Vec::new();
    while found.len() < limit {
        let page = tx.list(after, SEARCHED_AT_ONCE).await?;
        let Some(last) = page.last() else { break };
        after = Some(last.record.offset);
        let wanted = limit - found.len();
        found.extend(page.into_iter().filter(|letter| filter.matches(letter)).take(wanted));
    }
    tx.rollback().await?;
    Ok(found)
}

/// The letter at an offset, or `None`.
///
/// # Errors
/// [`Error::Unavailable`], [`Error::Failed`].
pub async fn get<S>(consumer: &ConsumerId, store: &S, offset: Offset) -> Result<Option<DeadLetter>, Error>
where
    S: OffsetStore,
    S::Tx: DeadLetters,
{
    let mut tx = begin(consumer, store).await?;
    let letter = tx.letter(offset).await?;
    tx.rollback().await?;
    Ok(letter)
}

/// Makes a letter due now, so that the running consumer, or the next one that runs, tries it again.
///
/// # Errors
/// - [`Error::Failed`] if the consumer has no such letter, if the letter is due already, or if an
///   earlier letter of its key must be handled or discarded first. The error names that letter.
///   Nothing changes.
/// - [`Error::Fenced`] if a running instance kept committing first for 30 seconds.
/// - The backend's own errors. [`Error::Indeterminate`] if the outcome is not known.
pub async fn retry<S>(consumer: &ConsumerId, store: &S, offset: Offset, by: &Operator) -> Result<(), Error>
where
    S: OffsetStore,
    S::Tx: DeadLetters,
{
    let retry = Retry { consumer, offset };
    change(consumer, store, &retry, by, PATIENCE).await.map(|_| ())
}

/// Finds out whether [`retry`] would be refused, without making the letter due.
///
/// # Errors
/// As for [`retry`], except that it never fails with [`Error::Fenced`].
pub async fn plan_retry<S>(consumer: &ConsumerId, store: &S, offset: Offset) -> Result<(), Error>
where
    S: OffsetStore,
    S::Tx: DeadLetters,
{
    try_out(consumer, store, &Retry { consumer, offset }).await
}

/// Makes every letter due now that the filter selects and that comes first for its key, and every
/// such letter without a key. The letters behind them follow as they succeed. Returns the number of
/// letters made due; those that this function or [`retry`] made due before, and that were not tried
/// since, do not count.
///
/// It reads every letter, and commits once per 500 letters that change, or more often next to a
/// busy instance or if they are large. If it fails, some letters may be due.
///
/// # Errors
/// As for [`retry`], except that it is no error if there are no letters.
pub async fn retry_all<S>(consumer: &ConsumerId, store: &S, filter: &LetterFilter, by: &Operator) -> Result<u64, Error>
where
    S: OffsetStore,
    S::Tx: DeadLetters,
{
    let seen = HashSet::new();
    sweep(consumer, store, RetryAll { filter, seen }, by).await
}

/// What [`retry_all`] or [`discard_all`] would change.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct LetterPlan {
    /// How many letters it would change.
    pub letters: u64,
    /// Selects these letters and no other, as long as they do not change. With this filter, the
    /// function does what the plan says, or less.
    pub filter: LetterFilter,
}

impl LetterPlan {
    fn new(filter: &LetterFilter, versions: HashMap<Offset, u64>) -> Self {
        Self {
            letters: versions.len() as u64,
            filter: filter.clone().unchanged(versions),
        }
    }
}

/// Finds out which letters [`retry_all`] would make due, without doing it. It reads every letter,
/// and takes 24 bytes of memory and more for each that it selects.
///
/// # Errors
/// [`Error::Unavailable`], [`Error::Failed`].
pub async fn plan_retry_all<S>(consumer: &ConsumerId, store: &S, filter: &LetterFilter) -> Result<LetterPlan, Error>
where
    S: OffsetStore,
    S::Tx: DeadLetters,
{
    let seen = HashSet::new();
    let versions = plan(consumer, store, RetryAll { filter, seen }).await?;
    Ok(LetterPlan::new(filter, versions))
}

/// Finds out which letters [`discard_all`] would remove, without doing it. It reads every letter,
/// and takes 24 bytes of memory and more for each that it selects.
///
/// # Errors
/// [`Error::Unavailable`], [`Error::Failed`].
pub async fn plan_discard_all<S>(consumer: &ConsumerId, store: &S, filter: &LetterFilter) -> Result<LetterPlan, Error>
where
    S: OffsetStore,
    S::Tx: DeadLetters,
{
    let pages_end = Offset::ZERO;
    let versions = plan(consumer, store, DiscardAll { filter, pages_end }).await?;
    Ok(LetterPlan::new(filter, versions))
}

/// Removes a letter for good, without its effects. The next letter of its key is due at once.
///
/// `letter` is the letter as the operator saw it. If it has changed since, nothing is removed.
///
/// # Errors
/// - [`Error::Failed`] if the consumer has no such letter, or if the letter has changed.
/// - As for [`retry`] otherwise.
pub async fn discard<S>(consumer: &ConsumerId, store: &S, letter: &DeadLetter, by: &Operator) -> Result<(), Error>
where
    S: OffsetStore,
    S::Tx: DeadLetters,
{
    let discard = Discard { consumer, seen: letter };
    change(consumer, store, &discard, by, PATIENCE).await?;
    tracing::warn!(%consumer, offset = %letter.record.offset, "discarded a dead letter by hand");
    Ok(())
}

/// Removes every letter for good that the filter selects, without its effects. Returns the number
/// of letters removed.
///
/// If the first letter of a key is removed and the next one stays, that one is due at once. A
/// letter that changes after this function has read it stays. So does one that a running instance
/// sets aside after this function has passed its place.
///
/// It reads every letter, and commits once per 500 letters that go, or more often next to a busy
/// instance or if they are large. If it fails, some letters may be gone. The
/// [journal](crate::backend::Position::journal) has one entry for the whole call.
///
/// # Errors
/// As for [`retry_all`].
pub async fn discard_all<S>(
    consumer: &ConsumerId,
    store: &S,
    filter: &LetterFilter,
    by: &Operator,
) -> Result<u64, Error>
where
    S: OffsetStore,
    S::Tx: DeadLetters,
{
    let pages_end = Offset::ZERO;
    let removed = sweep(consumer, store, DiscardAll { filter, pages_end }, by).await?;
    if removed > 0 {
        tracing::warn!(%consumer, letters = removed, "discarded dead letters by hand");
    }
    Ok(removed)
}

/// Replaces the record of a letter, and makes the letter due if it comes first for its key. The
/// letter keeps its [original record](DeadLetter::edit) and who changed it, until it is handled.
///
/// Key and origin must stay, unless the letter is malformed: those of a malformed entry cannot be
/// trusted, so `new` says what they are, or that there are none. Its origin is then marked as seen,
/// and the letter takes its place among those of its key. Records of that key that follow it in the
/// log may have been handled before it.
///
/// `letter` is the letter as the operator saw it. If it has changed since, nothing is changed.
///
/// # Errors
/// - [`Error::Failed`] if the consumer has no such letter, if the letter has changed, if the new
///   record is the same or may not be so, or if a record with the new origin was seen before.
/// - [`Error::TooLarge`] if the store cannot hold the letter with both records.
/// - As for [`retry`] otherwise.
pub async fn edit<S>(
    consumer: &ConsumerId,
    store: &S,
    letter: &DeadLetter,
    new: &NewRecord,
    by: &Operator,
) -> Result<(), Error>
where
    S: OffsetStore,
    S::Tx: DeadLetters,
{
    let seen = letter;
    let edit = EditLetter {
        consumer,
        by,
        seen,
        new,
    };
    change(consumer, store, &edit, by, PATIENCE).await.map(|_| ())
}

/// Finds out whether [`edit`] would be refused, without changing the letter.
///
/// # Errors
/// As for [`edit`], except that it never fails with [`Error::Fenced`].
pub async fn plan_edit<S>(consumer: &ConsumerId, store: &S, letter: &DeadLetter, new: &NewRecord) -> Result<(), Error>
where
    S: OffsetStore,
    S::Tx: DeadLetters,
{
    let by = &Operator::new("nobody");
    let seen = letter;
    let edit = EditLetter {
        consumer,
        by,
        seen,
        new,
    };
    try_out(consumer, store, &edit).await
}

/// A transaction that sees every commit acknowledged before the call. It may otherwise see only
/// what its handle read last.
async fn begin<S: OffsetStore>(consumer: &ConsumerId, store: &S) -> Result<S::Tx, Error> {
    store.position(consumer).await?;
    store.begin(consumer).await
}
