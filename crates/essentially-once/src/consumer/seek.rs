//! Moves a position by hand.

use std::{collections::VecDeque, time::Duration};

use crate::{
    Advance, ConsumerId, Error, Log, LogReader, Offset, OffsetStore, Operator, Position, Record, Revision, Transaction,
    consumer::OperatorAction, letters::DeadLetters, passed::Passed, rt,
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
/// [`plan_seek`](super::plan_seek) says beforehand how many records and letters that concerns.
///
/// A running instance of the consumer is fenced, and continues from the new position. A consumer
/// that never ran gets its first position, so check its name.
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
/// use essentially_once::consumer::Operator;
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
/// let ann = Operator::new("ann");
/// let next = seek(&shipping, &log, &store, StartAt::Latest, &ann).await?; // ignore the backlog
/// assert_eq!(next, Offset::from(2));
/// let second = StartAt::Offset(1.into()); // but handle 10249
/// let next = seek(&shipping, &log, &store, second, &ann).await?;
/// assert_eq!(next, Offset::from(1));
/// # Ok(())
/// # }
/// ```
pub async fn seek<S: OffsetStore>(
    consumer: &ConsumerId,
    log: &dyn Log,
    store: &S,
    to: StartAt,
    by: &Operator,
) -> Result<Offset, Error> {
    move_to(consumer, log, store, to, None, by).await
}

/// Does what [`plan_seek`](super::plan_seek) has said, unless the consumer has committed since.
/// [`pause`](super::pause) a consumer that commits all the time.
///
/// # Errors
/// As for [`seek`], and [`Error::Fenced`] if the consumer has committed since the plan was made.
/// Nothing changes.
pub async fn seek_as_planned<S: OffsetStore>(
    consumer: &ConsumerId,
    log: &dyn Log,
    store: &S,
    plan: &SeekPlan,
    by: &Operator,
) -> Result<Offset, Error> {
    let to = StartAt::Offset(plan.to);
    move_to(consumer, log, store, to, Some(plan.revision), by).await
}

/// Moves the position, if it still has the planned revision.
async fn move_to<S: OffsetStore>(
    consumer: &ConsumerId,
    log: &dyn Log,
    store: &S,
    to: StartAt,
    planned: Option<Revision>,
    by: &Operator,
) -> Result<Offset, Error> {
    let target = Target::find(log, to).await?;
    let mut tx = store.begin(consumer).await?;
    // A store that locks keeps a busy instance from committing from here on.
    let position = store.position(consumer).await?;
    let expected = position.as_ref().map_or(Revision::NONE, |position| position.revision);
    if let Some(planned) = planned
        && planned != expected
    {
        tx.rollback().await?;
        return Err(Error::Fenced {
            consumer: consumer.clone(),
            expected: planned,
        });
    }
    // A new epoch, so that a commit in progress cannot apply after this one. The owner stays, so
    // that a running instance continues.
    let mut advance = Advance::new(log.id().clone(), target.next, expected, expected.fresh_epoch());
    let mut letters_removed = 0;
    if let Some(position) = &position {
        check_log(position, consumer, log)?;
        advance.owner = position.owner;
        if target.next < position.next {
            let forgotten = position.windows.iter().map(|(numbering, _)| numbering.clone());
            advance.forgotten = forgotten.collect();
            letters_removed = match target.remove_letters(&mut tx, consumer, log).await {
                Ok(removed) => removed,
                Err(error) => {
                    tx.rollback().await?;
                    return Err(error);
                }
            };
        }
    }
    let next = target.next;
    let action = OperatorAction::Seek {
        from: position.as_ref().map_or(Offset::ZERO, |position| position.next),
        to: next,
        letters_removed,
    };
    let journal = position.map(|position| position.journal).unwrap_or_default();
    advance.journal = Some(journal.with(by, action));
    tx.commit(advance).await?;
    tracing::info!(%consumer, log = %log.id(), %next, letters_removed, by = by.name(), "moved the position by hand");
    Ok(next)
}

/// What a [`seek`] would do; see [`plan_seek`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct SeekPlan {
    /// Where the position is; `None` if the consumer has none.
    pub from: Option<Offset>,
    /// Where it would be.
    pub to: Offset,
    /// About how many records lie between the two: they would be handled again if `to` is before
    /// `from`, and never if it is after. 0 if there is no position, and `None` if the log cannot
    /// count them.
    pub records: Option<u64>,
    /// How many dead letters it would remove.
    pub letters_removed: u64,
    /// The revision of the position that it is based on.
    pub revision: Revision,
}

/// Finds out what [`seek`] would do, without doing it. [`seek_as_planned`](super::seek_as_planned)
/// then does that and nothing else.
///
/// # Errors
/// As for [`seek`], except that it never fails with [`Error::Fenced`].
///
/// # Examples
/// ```
/// # use essentially_once::memory::Memory;
/// # use essentially_once::{ConsumerId, Log, NewRecord};
/// use essentially_once::consumer::{Operator, plan_seek};
/// use essentially_once::{StartAt, seek};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), essentially_once::Error> {
/// # let memory = Memory::new();
/// # let (log, store) = (memory.log("orders")?, memory.store());
/// # log.append(&[NewRecord::new("10248"), NewRecord::new("10249")]).await?;
/// # let shipping = ConsumerId::new("shipping")?;
/// # let ann = Operator::new("ann");
/// # seek(&shipping, &log, &store, StartAt::Latest, &ann).await?;
/// let plan = plan_seek(&shipping, &log, &store, StartAt::Earliest).await?;
/// assert_eq!((plan.records, plan.letters_removed), (Some(2), 0)); // it would repeat two
/// # Ok(())
/// # }
/// ```
pub async fn plan_seek<S: OffsetStore>(
    consumer: &ConsumerId,
    log: &dyn Log,
    store: &S,
    to: StartAt,
) -> Result<SeekPlan, Error> {
    let target = Target::find(log, to).await?;
    let mut tx = store.begin(consumer).await?;
    let position = store.position(consumer).await?;
    let from = position.as_ref().map(|position| position.next);
    let revision = position.as_ref().map_or(Revision::NONE, |position| position.revision);
    if let Some(position) = position {
        check_log(&position, consumer, log)?;
    }
    let goes_back = from.is_some_and(|from| target.next < from);
    let letters_removed = match goes_back {
        true => target.remove_letters(&mut tx, consumer, log).await,
        false => Ok(0),
    };
    tx.rollback().await?;
    let letters_removed = letters_removed?;
    let records = match from {
        Some(from) => {
            let (behind, ahead) = (log.count_from(from).await?, log.count_from(target.next).await?);
            behind.zip(ahead).map(|(behind, ahead)| behind.abs_diff(ahead))
        }
        None => Some(0),
    };
    Ok(SeekPlan {
        from,
        to: target.next,
        records,
        letters_removed,
        revision,
    })
}

/// Fails if the position belongs to another log.
fn check_log(position: &Position, consumer: &ConsumerId, log: &dyn Log) -> Result<(), Error> {
    match position.log.is_same_log(log.id()) {
        true => Ok(()),
        false => Err(Error::WrongLog {
            consumer: consumer.clone(),
            stored: position.log.clone(),
            given: log.id().clone(),
        }),
    }
}

/// Where a position is to go.
struct Target {
    next: Offset,
    /// No record is at or after this offset.
    end: Offset,
}

impl Target {
    /// Fails if the log does not hold the place.
    async fn find(log: &dyn Log, to: StartAt) -> Result<Self, Error> {
        let next = resolve(log, to).await?;
        log.read(next).await?;
        let end = log.readable_end().await?;
        Ok(Self { next, end })
    }

    /// Removes the letters from there on. Their records are handled again, so trying the letters
    /// too would handle them twice.
    async fn remove_letters<Tx: Transaction>(
        &self,
        tx: &mut Tx,
        consumer: &ConsumerId,
        log: &dyn Log,
    ) -> Result<u64, Error> {
        let Some(letters) = tx.dead_letters() else {
            return Ok(0);
        };
        if let Some(lost) = first_lost(letters, log, self.next, self.end).await? {
            return Err(Error::failed(
                format!("move consumer {consumer} back to {} of log {}", self.next, log.id()),
                format!(
                    "this removes the dead letters from there on, and the log no longer holds the record of the one at \
                     {lost}; handle or discard that letter first"
                ),
            ));
        }
        letters.remove_from(self.next).await
    }
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
                letter.unreadable || letter.original().malformed.is_some() || Passed::new(letter.original()).is(record)
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
