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
//! Every function commits in the name of the consumer. A running instance then goes back to its
//! stored position and goes on from there.
//!
//! ```
//! use essentially_once::consumer::{DeadLetterOptions, dead_letters};
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
//! let letters = dead_letters::list(&shipping, &store, None, 100).await?;
//! assert!(letters[0].last_reason.contains("invalid digit"));
//! dead_letters::discard(&shipping, &store, &letters[0]).await?;
//! let report = run().await?; // the next one of the key is tried at once
//! assert_eq!(report.handled, 1);
//! assert!(dead_letters::list(&shipping, &store, None, 100).await?.is_empty());
//! # Ok(())
//! # }
//! ```

use std::{
    collections::HashSet,
    time::{Duration, SystemTime},
};

use crate::{
    Advance, ConsumerId, Error, Offset, OffsetStore, Position, Transaction,
    letters::{DeadLetter, DeadLetters},
    rt::{self, Instant},
};

/// For how long a change is tried if a running instance keeps committing first.
const PATIENCE: Duration = Duration::from_secs(30);
/// The same for many letters at once, before fewer are tried.
const PATIENCE_FOR_MANY: Duration = Duration::from_millis(300);

/// When a letter is due that an operator retries: at once, even by a clock that is behind.
const NOW: SystemTime = SystemTime::UNIX_EPOCH;

/// How many letters one page of [`retry_all`] holds.
const PAGE: usize = 1_000;

/// The consumer's letters after an offset, or from the first one on, at most `limit`, in the order
/// of their offsets.
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
    // A transaction may see what its handle read last, and the position is never older than the
    // call.
    store.position(consumer).await?;
    let mut tx = store.begin(consumer).await?;
    let letters = tx.list(after, limit).await?;
    tx.rollback().await?;
    Ok(letters)
}

/// Makes a letter due now, so that the running consumer, or the next one that runs, tries it again.
///
/// # Errors
/// - [`Error::Failed`] if the consumer has no such letter, or if an earlier letter of its key must
///   be handled or discarded first. The error names that letter. Nothing changes.
/// - [`Error::Fenced`] if a running instance kept committing first for 30 seconds.
/// - The backend's own errors. [`Error::Indeterminate`] if the outcome is not known.
pub async fn retry<S>(consumer: &ConsumerId, store: &S, offset: Offset) -> Result<(), Error>
where
    S: OffsetStore,
    S::Tx: DeadLetters,
{
    change(consumer, store, Verb::Retry(offset), PATIENCE).await.map(|_| ())
}

/// Makes the first letter of every key due now, and every letter without a key. The letters behind
/// them follow as they succeed. Returns the number of letters made due; those that this function or
/// [`retry`] made due before, and that were not tried since, do not count.
///
/// It reads every letter, and commits once per thousand letters if some of them change, or more
/// often next to a busy instance. If it fails, some letters may be due.
///
/// # Errors
/// As for [`retry`], except that it is no error if there are no letters.
pub async fn retry_all<S>(consumer: &ConsumerId, store: &S) -> Result<u64, Error>
where
    S: OffsetStore,
    S::Tx: DeadLetters,
{
    let (mut after, mut total) = (None, 0);
    let mut seen = HashSet::new();
    loop {
        let page = list(consumer, store, after, PAGE).await?;
        let Some(last) = page.last() else { return Ok(total) };
        after = Some(last.record.offset);
        let heads = page
            .iter()
            .filter(|letter| letter.key().is_none_or(|key| seen.insert(key.clone())));
        let waiting = heads.filter(|letter| letter.due != Some(NOW));
        let offsets: Vec<_> = waiting.map(|letter| letter.record.offset).collect();
        let (mut left, mut at_once) = (&offsets[..], offsets.len());
        while !left.is_empty() {
            let (some, others) = left.split_at(at_once.clamp(1, left.len()));
            let patience = if some.len() > 1 { PATIENCE_FOR_MANY } else { PATIENCE };
            match change(consumer, store, Verb::RetryHeads(some), patience).await {
                // A busy instance commits while this one still looks at the letters.
                Err(Error::Fenced { .. }) if some.len() > 1 => at_once = some.len() / 2,
                due => (total, left) = (total + due?, others),
            }
        }
    }
}

/// Removes a letter for good, without its effects. The next letter of its key is due at once.
///
/// `letter` is the letter as the operator saw it. If it has changed since, nothing is removed.
///
/// # Errors
/// - [`Error::Failed`] if the consumer has no such letter, or if the letter has changed.
/// - As for [`retry`] otherwise.
pub async fn discard<S>(consumer: &ConsumerId, store: &S, letter: &DeadLetter) -> Result<(), Error>
where
    S: OffsetStore,
    S::Tx: DeadLetters,
{
    change(consumer, store, Verb::Discard(letter), PATIENCE).await?;
    tracing::warn!(%consumer, offset = %letter.record.offset, "discarded a dead letter by hand");
    Ok(())
}

/// A change to letters.
#[derive(Clone, Copy)]
enum Verb<'a> {
    Retry(Offset),
    /// Retries those of these letters that come first for their key.
    RetryHeads(&'a [Offset]),
    Discard(&'a DeadLetter),
}

impl Verb<'_> {
    /// Stages the change, and returns how many letters it is about.
    async fn stage<Tx: DeadLetters>(self, tx: &mut Tx, consumer: &ConsumerId) -> Result<u64, Error> {
        match self {
            Self::Retry(offset) => {
                let refused = |reason| Error::failed(on("retry", offset, consumer), reason);
                let letter = tx.letter(offset).await?.ok_or_else(|| refused(no_such_letter()))?;
                if let Some(head) = head_of(tx, &letter).await?
                    && head.record.offset != offset
                {
                    let first = head.record.offset;
                    return Err(refused(format!(
                        "the letter at {first} of the same key comes first; retry or discard that one"
                    )));
                }
                make_due(tx, letter).await?;
                Ok(1)
            }
            Self::RetryHeads(offsets) => {
                let mut due = 0;
                for &offset in offsets {
                    // The consumer may have handled it since.
                    let Some(letter) = tx.letter(offset).await? else {
                        continue;
                    };
                    let head = head_of(tx, &letter).await?;
                    if head.is_none_or(|head| head.record.offset == offset) {
                        make_due(tx, letter).await?;
                        due += 1;
                    }
                }
                Ok(due)
            }
            Self::Discard(seen) => {
                let offset = seen.record.offset;
                let refused = |reason| Error::failed(on("discard", offset, consumer), reason);
                let stored = tx.letter(offset).await?.ok_or_else(|| refused(no_such_letter()))?;
                if stored != *seen {
                    return Err(refused("it has changed since; look at it again".into()));
                }
                let head = head_of(tx, &stored).await?;
                let was_first = head.is_some_and(|head| head.record.offset == offset);
                tx.remove(offset).await?;
                if was_first && let Some(next) = head_of(tx, &stored).await? {
                    make_due(tx, next).await?;
                }
                Ok(1)
            }
        }
    }
}

async fn make_due<Tx: DeadLetters>(tx: &mut Tx, mut letter: DeadLetter) -> Result<(), Error> {
    letter.set_due(Some(NOW));
    tx.park(&letter).await
}

/// The first letter of the key of this one.
async fn head_of<Tx: DeadLetters>(tx: &mut Tx, letter: &DeadLetter) -> Result<Option<DeadLetter>, Error> {
    match letter.key() {
        Some(key) => tx.head(key).await,
        None => Ok(None),
    }
}

/// Commits a change, with the position where it is. A new epoch fences every instance whose
/// knowledge of the letters is thereby out of date.
///
/// The position is read after the transaction began, since a store that locks then keeps a busy
/// instance from committing in between, and before the letters, since they must not be older.
async fn change<S>(consumer: &ConsumerId, store: &S, verb: Verb<'_>, patience: Duration) -> Result<u64, Error>
where
    S: OffsetStore,
    S::Tx: DeadLetters,
{
    let started = Instant::now();
    loop {
        let mut tx = store.begin(consumer).await?;
        let Some(position) = store.position(consumer).await? else {
            tx.rollback().await?;
            return Err(Error::failed(
                format!("change dead letters of consumer {consumer}"),
                "the consumer has no position, and therefore no letters; check its name",
            ));
        };
        let staged = match verb.stage(&mut tx, consumer).await {
            Ok(staged) => staged,
            Err(error) => {
                tx.rollback().await?;
                return Err(error);
            }
        };
        match tx.commit(unmoved(position)).await {
            Err(Error::Fenced { .. }) if started.elapsed() < patience => rt::yield_now().await,
            committed => return committed.map(|()| staged),
        }
    }
}

pub(super) fn unmoved(position: Position) -> Advance {
    let expected = position.revision;
    let mut advance = Advance::new(position.log, position.next, expected, expected.fresh_epoch());
    advance.owner = position.owner;
    advance.note = position.note;
    advance
}

fn on(verb: &str, offset: Offset, consumer: &ConsumerId) -> String {
    format!("{verb} the dead letter at {offset} of consumer {consumer}")
}

fn no_such_letter() -> String {
    "there is no such letter; it may have been handled or discarded".into()
}
