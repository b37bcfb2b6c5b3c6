//! Trying letters again under at-least-once: the handler first, and then the commit.

use std::time::SystemTime;

use super::{
    call::{Cut, Interrupted, flush, handle, reset},
    failure::Failure,
    letter_decoding::Decoded,
    letter_verbs::NOW,
    letters::letters_of,
    run::Done,
    session::Session,
};
use crate::{Handler, OffsetStore};

impl<S: OffsetStore> Session<'_, S> {
    /// Tries the letter that is due first, and makes the next one of its key due. Returns `false`
    /// if none is due.
    pub(super) async fn try_letter_at_least_once<H: Handler<()>>(&mut self, handler: &mut H) -> Result<bool, Failure> {
        self.now = SystemTime::now();
        let mut tx = self.begin().await?;
        let first = self.first_due_now(&mut tx).await?;
        self.end(tx).await?;
        let Some(letter) = first else { return Ok(false) };
        let (offset, key) = (letter.record.offset, letter.key().cloned());
        let mut failed = self.take_letter_in_hand(offset).await?;
        if failed.is_none() {
            failed = match self.decode_letter(&letter).await? {
                Decoded::Not => None,
                Decoded::Yes => return Ok(true),
                Decoded::Failed(error) => Some(error),
            };
        }
        if failed.is_none() {
            let handled = match handle(self, handler, &letter.record, &mut (), Cut::Never).await {
                Ok(()) => flush(self, handler, &mut (), Cut::Never).await,
                interrupted => interrupted,
            };
            failed = match handled {
                Ok(()) => None,
                Err(Interrupted::Stopped) => return Err(Failure::Stopped),
                Err(Interrupted::Failed(error)) => Some(error),
            };
        }
        if let Some(error) = failed {
            reset(handler).await;
            return self.note_failure(letter, error).await.map(|()| true);
        }
        // It was handled, so a stop leaves time to commit that.
        let mut tx = self.within_grace(self.store.begin(self.id)).await?;
        let letters = letters_of(&mut tx)?;
        self.within_grace(letters.remove(offset)).await?;
        let next = match &key {
            Some(key) => self.within_grace(letters.head(key)).await?,
            None => None,
        };
        if let Some(mut next) = next.filter(|next| !next.unreadable) {
            next.set_due(Some(NOW));
            self.within_grace(letters.park(&next)).await?;
        }
        let first = self.within_grace(letters.first_due()).await?;
        let done = Done {
            handled: 1,
            ..Done::default()
        };
        self.commit_letters(tx, done).await?;
        tracing::info!(%offset, tries = letter.tries, "handled a dead letter");
        self.parked.remove(&letter);
        self.parked.due = first.and_then(|letter| letter.due);
        self.run.letter_commits += 1;
        self.count(done, &[]);
        Ok(true)
    }
}
