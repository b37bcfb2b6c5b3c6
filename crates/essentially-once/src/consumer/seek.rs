//! Moves a position by hand.

use std::{collections::VecDeque, time::Duration};

use crate::{
    Advance, ConsumerId, Error, Log, LogReader, Offset, OffsetStore, Record, Revision, Transaction,
    letters::DeadLetters, passed::Passed, rt,
};

/// How long to wait for records that existed a moment ago.
const READ_LIMIT: Duration = Duration::from_secs(10);

/// How many letters or records to read at once.
const PAGE: usize = 100;

/// Where a consumer without a position begins. The consumer commits this place before it handles
/// the first record, so that the decision is made only once.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum StartAt {
    /// At the earliest record that the log still holds.
    #[default]
    Earliest,
    /// After the last record that the log holds at that moment.
    Latest,
    /// At this offset.
    Offset(Offset),
}

/// Moves a consumer's position to another place in its log and returns the new offset. For an
/// operator who wants to handle records again, or to continue after [`Error::Truncated`],
/// [`Error::OutOfRange`] or [`Error::LogChanged`].
///
/// Going back forgets all producers, so that their records are not dropped as duplicates when they
/// are handled again. If a record was sent twice, once before and once after the new place, the
/// consumer then handles both copies.
///
/// Going back also removes the consumer's [dead letters](super::dead_letters) at and after the new
/// place, since their records are handled again. It is refused if the log no longer holds some of
/// those records. To find that out, it reads the log from the new place to the last letter.
///
/// A running instance of the consumer is fenced, and continues from the new position.
///
/// # Errors
/// - [`Error::Truncated`] or [`Error::OutOfRange`] if the log does not hold the new place.
/// - [`Error::WrongLog`] if the position belongs to another log.
/// - [`Error::Failed`] if it would remove dead letters whose records are gone. Nothing changes.
/// - [`Error::Fenced`] if a running instance committed in the meantime. Try again.
/// - The backend's own errors.
///
/// # Examples
/// ```
/// use essentially_once::memory::Memory;
/// use essentially_once::{ConsumerId, Log, NewRecord, Offset, StartAt, seek};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), essentially_once::Error> {
/// let memory = Memory::new();
/// let (log, store) = (memory.log("orders")?, memory.store());
/// log.append(&[NewRecord::new("10248"), NewRecord::new("10249")]).await?;
///
/// let shipping = ConsumerId::new("shipping")?;
/// let next = seek(&shipping, &log, &store, StartAt::Latest).await?; // ignore the backlog
/// assert_eq!(next, Offset::from(2));
/// let next = seek(&shipping, &log, &store, StartAt::Offset(1.into())).await?; // but handle 10249
/// assert_eq!(next, Offset::from(1));
/// # Ok(())
/// # }
/// ```
pub async fn seek<S: OffsetStore>(
    consumer: &ConsumerId,
    log: &dyn Log,
    store: &S,
    to: StartAt,
) -> Result<Offset, Error> {
    let next = resolve(log, to).await?;
    log.read(next).await?;
    let end = log.readable_end().await?;
    let mut tx = store.begin(consumer).await?;
    // A store that locks keeps a busy instance from committing from here on.
    let position = store.position(consumer).await?;
    let expected = position.as_ref().map_or(Revision::NONE, |position| position.revision);
    // A new epoch, so that a commit in progress cannot apply after this one. The owner stays, so
    // that a running instance continues.
    let mut advance = Advance::new(log.id().clone(), next, expected, expected.fresh_epoch());
    let mut letters_removed = 0;
    if let Some(position) = position {
        advance.owner = position.owner;
        if next < position.next {
            advance.forgotten = position.windows.into_iter().map(|(numbering, _)| numbering).collect();
            // Their records are handled again, so trying the letters too would handle them twice.
            if let Some(letters) = tx.dead_letters() {
                if let Some(lost) = first_lost(letters, log, next, end).await? {
                    tx.rollback().await?;
                    return Err(Error::failed(
                        format!("move consumer {consumer} back to {next} of log {}", log.id()),
                        format!(
                            "this removes the dead letters from there on, and the log no longer holds the record of \
                             the one at {lost}; handle or discard that letter first"
                        ),
                    ));
                }
                letters_removed = letters.remove_from(next).await?;
            }
        }
    }
    tx.commit(advance).await?;
    tracing::info!(%consumer, log = %log.id(), %next, letters_removed, "moved the position by hand");
    Ok(next)
}

/// The first letter from `next` on whose record the log does not hold any more.
async fn first_lost(
    letters: &mut dyn DeadLetters,
    log: &dyn Log,
    next: Offset,
    end: Offset,
) -> Result<Option<Offset>, Error> {
    let mut after = next;
    let mut page = match letters.letter(next).await? {
        Some(letter) => vec![letter],
        None => letters.list(Some(after), PAGE).await?,
    };
    if page.is_empty() {
        return Ok(None);
    }
    let mut records = Records {
        reader: log.read(next).await?,
        read: VecDeque::new(),
        end,
    };
    loop {
        for letter in &page {
            after = letter.record.offset;
            let is_same = |record: &Record| {
                // A later version may decode a malformed record.
                letter.record.malformed.is_some() || Passed::new(&letter.record).is(record)
            };
            if !records.at(after).await?.is_some_and(|record| is_same(&record)) {
                return Ok(Some(after));
            }
        }
        page = letters.list(Some(after), PAGE).await?;
        if page.is_empty() {
            return Ok(None);
        }
    }
}

/// The records of a log, in order.
struct Records {
    reader: Box<dyn LogReader>,
    read: VecDeque<Record>,
    /// No record is at or after this offset.
    end: Offset,
}

impl Records {
    /// The record at an offset, after those at lower offsets were asked for.
    async fn at(&mut self, offset: Offset) -> Result<Option<Record>, Error> {
        while offset < self.end {
            match self.read.pop_front() {
                Some(record) if record.offset < offset => {}
                Some(record) if record.offset == offset => return Ok(Some(record)),
                Some(later) => {
                    self.read.push_front(later);
                    return Ok(None);
                }
                // If the last records are deleted at this moment, none may ever arrive.
                None => match rt::within(Some(READ_LIMIT), self.reader.next(PAGE)).await {
                    Some(records) => self.read = records?.into(),
                    None => return Ok(None),
                },
            }
        }
        Ok(None)
    }
}

/// The offset that `at` stands for.
pub(super) async fn resolve(log: &dyn Log, at: StartAt) -> Result<Offset, Error> {
    Ok(match at {
        StartAt::Earliest => log.bounds().await?.earliest,
        StartAt::Latest => log.bounds().await?.end,
        StartAt::Offset(offset) => offset,
    })
}
