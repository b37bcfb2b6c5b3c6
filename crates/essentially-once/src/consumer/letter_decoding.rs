//! Letters of entries that could not be decoded when they were set aside.

use std::panic::{AssertUnwindSafe, catch_unwind};

use super::{
    failure::Failure,
    letter_verbs::{Admission, admission, join_key},
    letters::{Parked, letters_of},
    run::Done,
    session::Session,
};
use crate::{Error, HandlerError, OffsetStore, Record, letters::DeadLetter};

/// What became of a malformed letter.
pub(super) enum Decoded {
    /// It still is malformed, or never was.
    Not,
    /// It is a letter like any other from now on, or was dropped.
    Yes,
    /// It could be decoded, but cannot be handled.
    Failed(HandlerError),
}

impl<S: OffsetStore> Session<'_, S> {
    /// Decodes a malformed letter again. If that succeeds, its key and origin count from now on: it
    /// joins the letters of its key, or is dropped as a duplicate.
    pub(super) async fn decode_letter(&mut self, letter: &DeadLetter) -> Result<Decoded, Failure> {
        let Some(record) = self.decode(&letter.record) else {
            return Ok(Decoded::Not);
        };
        let offset = letter.record.offset;
        let mut tx = self.begin().await?;
        let letters = letters_of(&mut tx)?;
        let mut done = Done::default();
        match admission(&record, &self.windows) {
            Admission::New => {
                tracing::info!(%offset, "a dead letter can be decoded now");
                let mut decoded = letter.clone();
                decoded.record = record.clone();
                match self.or_stop(join_key(letters, decoded)).await {
                    Err(Failure::Backend(error @ (Error::Failed { .. } | Error::TooLarge { .. }))) => {
                        self.end(tx).await?;
                        return Ok(Decoded::Failed(HandlerError::reject(error)));
                    }
                    joined => joined?,
                }
                // Last, since a later commit of this session would store the mark of a letter that
                // could not join.
                self.windows.mark(&record, self.now);
            }
            Admission::Seen => {
                tracing::warn!(%offset, "a dead letter can be decoded now, and is a duplicate; dropping it");
                self.or_stop(letters.remove(offset)).await?;
                done.duplicates = 1;
            }
            Admission::TooOld => {
                self.end(tx).await?;
                return Ok(Decoded::Failed(HandlerError::reject(
                    "it can be decoded now, but its origin is too old to tell whether a copy of it was handled; find \
                     that out, then `edit` it without an origin, or `discard` it",
                )));
            }
        }
        let parked = self.or_stop(Parked::load(letters)).await?;
        let note = self.place.note.with_in_hand(self.in_hand_after_letters());
        self.commit_marks(tx, note, done).await?;
        self.parked.replace(parked);
        self.run.letter_commits += 1;
        self.count(done, &[]);
        Ok(Decoded::Yes)
    }

    /// A panic of the log's decoder means that it still cannot decode the record.
    fn decode(&self, malformed: &Record) -> Option<Record> {
        malformed.malformed.as_ref()?;
        let decoded = catch_unwind(AssertUnwindSafe(|| self.log.decode(malformed))).unwrap_or_else(|_| {
            tracing::error!(offset = %malformed.offset, "the log panicked when it decoded a dead letter");
            None
        });
        decoded.filter(|record| record.offset == malformed.offset && record.malformed.is_none())
    }
}
