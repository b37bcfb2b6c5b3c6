//! Operators who act while the consumer runs.

use std::{fmt, str::FromStr};

use essentially_once::{
    ConsumerId, Error, Log, NewRecord, Offset, OffsetStore, StartAt,
    backend::{DeadLetter, DeadLetters},
    consumer::{Operator, dead_letters, dead_letters::LetterFilter, pause, resume},
    seek, skip,
};

use super::trouble::TROUBLE;

/// What an operator does.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub enum Verb {
    /// Retries the first letter.
    Retry,
    /// Retries all letters.
    RetryAll,
    /// Discards the first letter.
    Discard,
    /// Discards the last letter, which may wait behind others of its key.
    DiscardLast,
    /// Discards all letters that failed, but not those behind them.
    DiscardAll,
    /// Edits the first letter.
    Edit,
    /// Edits the last letter.
    EditLast,
    /// Skips the next record of the log.
    Skip,
    /// Moves the position back by one record.
    SeekBack,
    /// Moves the position to the start of the log.
    SeekToStart,
    /// Pauses the consumer. If nothing resumes it before its run ends, the explorer does.
    Pause,
    /// Resumes the consumer.
    Resume,
}

impl Verb {
    /// All verbs.
    pub const ALL: [Self; 12] = [
        Self::Retry,
        Self::RetryAll,
        Self::Discard,
        Self::DiscardLast,
        Self::DiscardAll,
        Self::Edit,
        Self::EditLast,
        Self::Skip,
        Self::SeekBack,
        Self::SeekToStart,
        Self::Pause,
        Self::Resume,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Retry => "retry",
            Self::RetryAll => "retry-all",
            Self::Discard => "discard",
            Self::DiscardLast => "discard-last",
            Self::DiscardAll => "discard-all",
            Self::Edit => "edit",
            Self::EditLast => "edit-last",
            Self::Skip => "skip",
            Self::SeekBack => "seek-back",
            Self::SeekToStart => "seek-to-start",
            Self::Pause => "pause",
            Self::Resume => "resume",
        }
    }
}

/// One act of an operator. As text: `7:retry-all`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Call {
    /// The number of the operation before which the operator acts, counted like that of a
    /// [`Fault`](super::super::Fault). Its process waits for the operator.
    pub operation: usize,
    /// What the operator does.
    pub verb: Verb,
}

/// An operator's access to one consumer.
pub(super) struct Desk<'a, S> {
    pub(super) consumer: &'a ConsumerId,
    pub(super) log: &'a dyn Log,
    pub(super) store: &'a S,
    /// The offsets of all records.
    pub(super) offsets: &'a [Offset],
}

impl<S: OffsetStore<Tx: DeadLetters>> Desk<'_, S> {
    /// Acts. An error only means that it was refused, or that its outcome is not known.
    pub(super) async fn act(&self, verb: Verb) -> Result<(), Error> {
        let Self {
            consumer, log, store, ..
        } = *self;
        let by = Operator::new("explorer").because("a planned call");
        match verb {
            Verb::Retry => match self.letters().await?.first() {
                Some(first) => dead_letters::retry(consumer, store, first.record.offset, &by).await,
                None => Ok(()),
            },
            Verb::RetryAll => {
                let all = LetterFilter::all();
                dead_letters::retry_all(consumer, store, &all, &by).await.map(drop)
            }
            Verb::Discard => match self.letters().await?.first() {
                Some(first) => dead_letters::discard(consumer, store, first, &by).await,
                None => Ok(()),
            },
            Verb::DiscardLast => match self.letters().await?.last() {
                Some(last) => dead_letters::discard(consumer, store, last, &by).await,
                None => Ok(()),
            },
            Verb::DiscardAll => {
                let failed = LetterFilter::all().reason(TROUBLE);
                dead_letters::discard_all(consumer, store, &failed, &by).await.map(drop)
            }
            Verb::Edit => match self.letters().await?.first() {
                Some(first) => dead_letters::edit(consumer, store, first, &edited(first), &by).await,
                None => Ok(()),
            },
            Verb::EditLast => match self.letters().await?.last() {
                Some(last) => dead_letters::edit(consumer, store, last, &edited(last), &by).await,
                None => Ok(()),
            },
            Verb::Skip => {
                let next = self.next().await?;
                match self.offsets.iter().find(|offset| **offset >= next) {
                    Some(offset) => skip(consumer, log, store, *offset, &by).await.map(drop),
                    None => Ok(()),
                }
            }
            Verb::SeekBack => {
                let next = self.next().await?;
                match self.offsets.iter().rfind(|offset| **offset < next) {
                    Some(before) => seek(consumer, log, store, StartAt::Offset(*before), &by)
                        .await
                        .map(drop),
                    None => Ok(()),
                }
            }
            Verb::SeekToStart => seek(consumer, log, store, StartAt::Earliest, &by).await.map(drop),
            Verb::Pause => pause(consumer, store, &by).await,
            Verb::Resume => resume(consumer, store, &by).await,
        }
    }

    async fn letters(&self) -> Result<Vec<DeadLetter>, Error> {
        dead_letters::list(self.consumer, self.store, None, 100).await
    }

    async fn next(&self) -> Result<Offset, Error> {
        let position = self.store.position(self.consumer).await?;
        Ok(position.map_or(Offset::ZERO, |position| position.next))
    }
}

/// What an edit adds to the payload of a letter.
pub(super) const EDIT: &str = "+";

fn edited(letter: &DeadLetter) -> NewRecord {
    let mut new = NewRecord::from(&letter.record);
    new.payload = [&new.payload, EDIT.as_bytes()].concat().into();
    new
}

impl fmt::Display for Verb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.operation, self.verb)
    }
}

impl FromStr for Call {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let parse = || {
            let (operation, name) = text.trim().split_once(':')?;
            let verb = Verb::ALL.into_iter().find(|verb| verb.name() == name)?;
            let operation = operation.parse().ok().filter(|operation| *operation > 0)?;
            Some(Self { operation, verb })
        };
        parse().ok_or_else(|| Error::InvalidSetting {
            setting: "call",
            reason: format!(
                "{text:?} is not `<operation>:<verb>`, such as `7:retry-all`; operations count from 1, verbs are {}",
                Verb::ALL.map(Verb::name).join(", ")
            ),
        })
    }
}
