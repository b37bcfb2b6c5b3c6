//! Letters of entries that could not be decoded when they were set aside.

use super::{
    failure::Failure,
    letter_verbs::{admit, join_key},
    letters::{Parked, letters_of},
    run::Done,
    session::Session,
};
use crate::{OffsetStore, letters::DeadLetter};

impl<S: OffsetStore> Session<'_, S> {
    /// Decodes a malformed letter again. If that succeeds, its key and origin count from now on: it
    /// joins the letters of its key, or is dropped as a duplicate. Returns `false` if it is not
    /// malformed or still cannot be decoded.
    pub(super) async fn admit_if_decoded(&mut self, letter: &DeadLetter) -> Result<bool, Failure> {
        let offset = letter.record.offset;
        let is_malformed = letter.record.malformed.is_some();
        let decoded = is_malformed.then(|| self.log.decode(&letter.record)).flatten();
        let Some(record) = decoded.filter(|record| record.offset == offset && record.malformed.is_none()) else {
            return Ok(false);
        };
        let mut tx = self.begin().await?;
        let letters = letters_of(&mut tx)?;
        let mut done = Done::default();
        if admit(&record, &mut self.windows) {
            tracing::info!(%offset, "a dead letter can be decoded now");
            let mut decoded = letter.clone();
            decoded.record = record;
            self.or_stop(join_key(letters, decoded)).await?;
        } else {
            tracing::warn!(%offset, "a dead letter can be decoded now, and is a duplicate; dropping it");
            self.or_stop(letters.remove(offset)).await?;
            done.duplicates = 1;
        }
        let parked = self.or_stop(Parked::load(letters)).await?;
        let note = self.place.note.clone();
        self.commit_marks(tx, note, done).await?;
        self.parked.replace(parked);
        self.run.letter_commits += 1;
        self.count(done, &[]);
        Ok(true)
    }
}
