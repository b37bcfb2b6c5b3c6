//! Records and letters whose process died while it handled them, which leaves no error behind.
//!
//! A run that takes the position over from one that did not release it handles as many records
//! alone as a batch holds, and commits before each of them that it has it in hand. If the next run
//! takes over in the same way and finds the same one in hand, it counts one more session.

use super::{
    failure::{Failure, RecordFailure},
    run::Done,
    session::Session,
};
use crate::{
    HandlerError, Offset, OffsetStore, Record,
    note::{InHand, Mark},
};

/// What a run does after it has taken the position over.
#[derive(Default)]
pub(super) struct Suspicion {
    /// How many more records are handled alone, and how many more letters. Each has its own, or
    /// letters that fail would use up those of a record that kills.
    records_left: usize,
    letters_left: usize,
    /// The record and the letter that this run had in hand last, and how often the stored mark
    /// counts this run for it. It lives, so that was too often.
    record: Option<(Offset, u32)>,
    letter: Option<(Offset, u32)>,
}

impl Suspicion {
    pub(super) const fn suspects_records(&self) -> bool {
        self.records_left > 0
    }

    pub(super) const fn suspects_letters(&self) -> bool {
        self.letters_left > 0
    }
}

impl<S: OffsetStore> Session<'_, S> {
    /// The owner before this run did not release the position, so its process may have died.
    pub(super) fn suspect_records(&mut self) {
        let suspicion = &mut self.run.suspicion;
        (suspicion.records_left, suspicion.letters_left) = (self.settings.max_batch, self.settings.max_batch);
    }

    /// Commits that the next record is in hand, if it is suspected. Fails if it was in hand in too
    /// many sessions in a row.
    pub(super) async fn take_in_hand(&mut self, record: &Record) -> Result<(), Failure> {
        if !self.run.suspicion.suspects_records() {
            return self.claim().await;
        }
        let (next, stored) = (self.place.next, self.place.note.in_hand());
        let Some(mark) = self.mark(stored.record, self.run.suspicion.record, next) else {
            return Ok(());
        };
        if let Some(error) = self.too_many(mark) {
            return Err(Failure::Record(Box::new(RecordFailure {
                record: record.clone(),
                tried: self.tried_again(record.offset, &error),
                error,
                revision: self.place.revision,
                is_first: true,
                is_next: true,
                deaths: mark.sessions - 1,
                fatal_outcome: "",
            })));
        }
        let record = Some(mark);
        self.commit_in_hand(InHand { record, ..stored }).await?;
        self.run.suspicion.record = Some((next, 1));
        self.run.suspicion.records_left -= 1;
        Ok(())
    }

    /// The same for a letter, which is to be tried next. Returns its failure instead.
    pub(super) async fn take_letter_in_hand(&mut self, offset: Offset) -> Result<Option<HandlerError>, Failure> {
        if !self.run.suspicion.suspects_letters() {
            return self.claim().await.map(|()| None);
        }
        let stored = self.place.note.in_hand();
        let Some(mark) = self.mark(stored.letter, self.run.suspicion.letter, offset) else {
            return Ok(None);
        };
        if let Some(error) = self.too_many(mark) {
            return Ok(Some(error));
        }
        let letter = Some(mark);
        self.commit_in_hand(InHand { letter, ..stored }).await?;
        self.run.suspicion.letter = Some((offset, 1));
        self.run.suspicion.letters_left -= 1;
        Ok(None)
    }

    /// Before it handles anything, a run shows with a commit that the position is its own, so that
    /// the next run sees that this one did not release it.
    pub(super) async fn claim(&mut self) -> Result<(), Failure> {
        if self.run.is_owner() || self.settings.standby_after.is_zero() {
            return Ok(());
        }
        let tx = self.begin().await?;
        Ok(self.commit_unmoved(tx, Done::default()).await?)
    }

    /// A record that its handler does not get is passed without a mark.
    pub(super) fn pass_in_hand(&mut self) {
        let left = &mut self.run.suspicion.records_left;
        *left = left.saturating_sub(1);
    }

    /// The marks for a commit that passes records.
    pub(super) fn in_hand_after_records(&self) -> InHand {
        InHand {
            record: None,
            ..self.place.note.in_hand()
        }
    }

    /// The marks for a commit that says what became of a letter.
    pub(super) fn in_hand_after_letters(&self) -> InHand {
        InHand {
            letter: None,
            ..self.place.note.in_hand()
        }
    }

    /// The mark to store; `None` if this run has stored it.
    fn mark(&self, stored: Option<Mark>, own: Option<(Offset, u32)>, offset: Offset) -> Option<Mark> {
        let stored = stored.filter(|mark| mark.offset == offset);
        if stored.is_some_and(|mark| mark.by == self.owner) {
            return None;
        }
        let own = own.filter(|(at, _)| *at == offset).map_or(0, |(_, times)| times);
        let before = stored.map_or(0, |mark| mark.sessions.saturating_sub(own));
        Some(Mark {
            offset,
            sessions: before.saturating_add(1),
            by: self.owner,
        })
    }

    fn too_many(&self, mark: Mark) -> Option<HandlerError> {
        let deaths = mark.sessions - 1;
        (deaths >= self.settings.max_deaths).then(|| {
            HandlerError::reject(format!(
                "{deaths} instances in a row died, or were killed, while they handled it"
            ))
        })
    }

    async fn commit_in_hand(&mut self, in_hand: InHand) -> Result<(), Failure> {
        let tx = self.begin().await?;
        let note = self.place.note.with_in_hand(in_hand);
        Ok(self.commit_at(tx, self.place.next, note, Done::default()).await?)
    }
}
