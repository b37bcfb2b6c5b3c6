//! Dead letters in the loop: trying them again.

use std::time::{Duration, SystemTime};

use super::{
    call::{Cut, Interrupted, flush, handle, reset},
    failure::{Failure, RecordFailure, not_the_backends},
    letter_decoding::Decoded,
    letters::{keeps_none, letters_of},
    run::Done,
    session::Session,
};
use crate::{
    Error, Handler, HandlerError, HandlerErrorKind, OffsetStore, Transaction, Tried,
    letters::{DeadLetter, DeadLetters},
    rt::Instant,
};

/// How long records have to arrive in a session after one that a letter has ended.
const RECORDS_FIRST: Duration = Duration::from_millis(100);

/// How a transaction with letters went.
enum Attempt {
    NothingDue,
    Committed,
    /// Something failed behind this many letters, which may succeed without it.
    Apart(usize),
    Failed(Box<DeadLetter>, HandlerError),
}

/// Why a transaction with letters was not committed.
enum Obstacle {
    /// The handler failed at this letter.
    Letter(Box<DeadLetter>, HandlerError),
    /// The handler's `flush` failed.
    Flush(HandlerError),
    /// The transaction failed after the handler had used it, which may be the handler's fault.
    Transaction(Error),
    Stopped,
}

impl<S: OffsetStore> Session<'_, S> {
    /// When to try letters next. A verdict on a record is carried out first, since it only counts
    /// until the next commit. After a letter that ended a session, records have a moment to arrive.
    pub(super) fn letters_due(&self) -> Option<SystemTime> {
        let due = self.parked.due.filter(|_| self.run.verdict.is_none())?;
        let longest = self.settings.letters.clone().unwrap_or_default().longest_retry_after;
        // A clock that was ahead must not delay a letter for as long.
        let due = match SystemTime::now().checked_add(longest) {
            Some(latest) if due > latest => SystemTime::UNIX_EPOCH,
            _ => due,
        };
        let records_first = self.run.records_first && self.cut_off.is_none();
        let turn = records_first.then(|| self.began.checked_add(RECORDS_FIRST)).flatten();
        Some(turn.map_or(due, |turn| due.max(turn)))
    }

    /// Tries the letters of the key whose letter is due first, each before the next, until one
    /// fails or the batch is full. Returns `false` if no letter was due.
    pub(super) async fn try_letters<H: Handler<S::Tx>>(&mut self, handler: &mut H) -> Result<bool, Failure> {
        self.now = SystemTime::now();
        let mut limit = self.settings.max_batch;
        loop {
            match self.try_letters_up_to(handler, limit).await? {
                Attempt::NothingDue => return Ok(false),
                Attempt::Committed => return Ok(true),
                Attempt::Apart(fewer) => {
                    reset(handler).await;
                    limit = fewer;
                }
                Attempt::Failed(letter, error) => {
                    reset(handler).await;
                    return self.note_failure(*letter, error).await.map(|()| true);
                }
            }
        }
    }

    async fn try_letters_up_to<H: Handler<S::Tx>>(
        &mut self,
        handler: &mut H,
        limit: usize,
    ) -> Result<Attempt, Failure> {
        let mut tx = self.begin().await?;
        let Some(first) = self.first_due_now(&mut tx).await? else {
            self.end(tx).await?;
            return Ok(Attempt::NothingDue);
        };
        let is_alone = self.run.suspicion.suspects_letters();
        if is_alone || first.record.malformed.is_some() || !self.run.is_owner() {
            self.end(tx).await?;
            // First, since decoding may kill too.
            if let Some(error) = self.take_letter_in_hand(first.record.offset).await? {
                return Ok(Attempt::Failed(Box::new(first), error));
            }
            match self.decode_letter(&first).await? {
                Decoded::Not => {}
                Decoded::Yes => return Ok(Attempt::Committed),
                Decoded::Failed(error) => return Ok(Attempt::Failed(Box::new(first), error)),
            }
            tx = self.begin().await?;
        }
        let limit = if is_alone { 1 } else { limit };
        let mut handled = Vec::new();
        let due = match self.handle_letters(handler, &mut tx, first, limit, &mut handled).await {
            Ok(due) => due,
            // Dropping the transaction rolls it back.
            Err(Obstacle::Stopped) => return Err(Failure::Stopped),
            Err(Obstacle::Letter(letter, error)) => {
                self.end(tx).await?;
                return Ok(match handled.len() {
                    before if before > 0 && error.kind != HandlerErrorKind::Fatal => Attempt::Apart(before),
                    _ => Attempt::Failed(letter, error),
                });
            }
            Err(Obstacle::Flush(error)) => {
                self.end(tx).await?;
                return Ok(blame(handled, error));
            }
            Err(Obstacle::Transaction(error)) => {
                self.end(tx).await?;
                return self.blame_for_transaction(handled, error).await;
            }
        };
        let done = Done {
            handled: handled.len() as u64,
            ..Done::default()
        };
        match self.commit_letters(tx, done).await {
            Ok(()) => {
                for letter in &handled {
                    tracing::info!(offset = %letter.record.offset, tries = letter.tries, "handled a dead letter");
                    self.parked.remove(letter);
                }
                self.parked.due = due;
                self.run.letter_commits += 1;
                self.count(done, &[]);
                Ok(Attempt::Committed)
            }
            Err(error) => self.blame_for_transaction(handled, error).await,
        }
    }

    /// The letter that is due first, if it is due.
    pub(super) async fn first_due_now(&mut self, tx: &mut S::Tx) -> Result<Option<DeadLetter>, Failure> {
        let first = self.or_stop(letters_of(tx)?.first_due()).await?;
        self.parked.due = first.as_ref().and_then(|letter| letter.due);
        Ok(first.filter(|_| self.letters_due().is_some_and(|due| due <= self.now)))
    }

    /// Handles letters of one key and removes them, and flushes the handler. Returns when the first
    /// of the remaining letters is due.
    async fn handle_letters<H: Handler<S::Tx>>(
        &mut self,
        handler: &mut H,
        tx: &mut S::Tx,
        first: DeadLetter,
        limit: usize,
        handled: &mut Vec<DeadLetter>,
    ) -> Result<Option<SystemTime>, Obstacle> {
        let started = Instant::now();
        let mut following = Some(first);
        while let Some(mut letter) = following.take() {
            let is_full = handled.len() >= limit || started.elapsed() > self.settings.batch_time_limit;
            if !handled.is_empty() && (is_full || self.stop.is_cancelled()) {
                // The letters of this key go on where they stop, in turn with those of other keys.
                // The next pause of one that failed before is not measured from its last failure.
                let due = self.cut_off.unwrap_or(self.now);
                letter.set_due(Some(match letter.tries {
                    0 => due,
                    _ => due.min(letter.last_failed_at),
                }));
                self.used(letters_of_used(tx)?.park(&letter)).await?;
                break;
            }
            match handle(self, handler, &letter.record, tx, Cut::AfterGrace).await {
                Ok(()) => {}
                Err(Interrupted::Stopped) => return Err(Obstacle::Stopped),
                Err(Interrupted::Failed(error)) => return Err(Obstacle::Letter(Box::new(letter), error)),
            }
            let (offset, key) = (letter.record.offset, letter.key().cloned());
            handled.push(letter);
            self.used(letters_of_used(tx)?.remove(offset)).await?;
            if let Some(key) = key {
                let head = self.used(letters_of_used(tx)?.head(&key)).await?;
                following = head.filter(|letter| !letter.unreadable);
            }
        }
        match flush(self, handler, tx, Cut::AfterGrace).await {
            Ok(()) => {}
            Err(Interrupted::Stopped) => return Err(Obstacle::Stopped),
            Err(Interrupted::Failed(error)) => return Err(Obstacle::Flush(error)),
        }
        let first = self.used(letters_of_used(tx)?.first_due()).await?;
        Ok(first.and_then(|letter| letter.due))
    }

    /// The result of an action in a transaction that the handler has used.
    async fn used<T>(&self, action: impl Future<Output = Result<T, Error>>) -> Result<T, Obstacle> {
        match self.within_grace(action).await {
            Ok(done) => Ok(done),
            Err(Failure::Backend(error)) => Err(Obstacle::Transaction(error)),
            Err(_) => Err(Obstacle::Stopped),
        }
    }

    /// Decides whether these letters are to blame for an error of their transaction.
    async fn blame_for_transaction(&mut self, handled: Vec<DeadLetter>, error: Error) -> Result<Attempt, Failure> {
        match error {
            error @ (Error::Failed { .. } | Error::TooLarge { .. }) => {
                Ok(blame(handled, self.blame_for_commit(error).await?))
            }
            error => Err(error.into()),
        }
    }

    /// Commits that a letter failed once more.
    pub(super) async fn note_failure(&mut self, mut letter: DeadLetter, error: HandlerError) -> Result<(), Failure> {
        let error = not_the_backends(error, letter.record.offset)?;
        if error.kind == HandlerErrorKind::Fatal {
            return Err(Failure::Record(Box::new(RecordFailure {
                tried: Tried::new(letter.record.offset, &error.to_string()),
                record: letter.record,
                error,
                revision: self.place.revision,
                is_first: true,
                is_next: false,
                deaths: 0,
                fatal_outcome: "fatal error in a dead letter, which stays as it was",
            })));
        }
        // The try may have taken long.
        self.now = SystemTime::now();
        let due = self.due(&letter, error.kind);
        let before = letter.clone();
        letter.failed_again(&error.to_string(), self.now, due);
        let first = match self.commit_letter(&letter).await {
            // A store that is nearly full may have no room for longer reasons.
            Err(Failure::Backend(Error::Failed { .. } | Error::TooLarge { .. })) => {
                letter.take_reasons_of(before);
                self.commit_letter(&letter).await?
            }
            first => first?,
        };
        self.run.letter_commits += 1;
        self.parked.due = first.and_then(|letter| letter.due);
        tracing::warn!(
            offset = %letter.record.offset, tries = letter.tries, %error, ?due,
            "a dead letter failed again"
        );
        Ok(())
    }

    /// Commits a letter as it is now. Returns the letter that is due first.
    async fn commit_letter(&mut self, letter: &DeadLetter) -> Result<Option<DeadLetter>, Failure> {
        let mut tx = self.begin().await?;
        self.or_stop(letters_of(&mut tx)?.park(letter)).await?;
        let first = self.or_stop(letters_of(&mut tx)?.first_due()).await?;
        self.commit_letters(tx, Done::default()).await?;
        Ok(first)
    }

    /// Commits what became of letters. None is in hand any more.
    pub(super) async fn commit_letters(&mut self, tx: S::Tx, done: Done) -> Result<(), Error> {
        let note = self.place.note.with_in_hand(self.in_hand_after_letters());
        self.commit_at(tx, self.place.next, note, done).await
    }
}

/// Blames the only letter of a transaction, or takes the letters apart to find the culprit. A fatal
/// error ends the run at once.
fn blame(mut handled: Vec<DeadLetter>, error: HandlerError) -> Attempt {
    let before = handled.len().saturating_sub(1);
    match (handled.pop(), handled.is_empty()) {
        (Some(letter), is_only) if is_only || error.kind == HandlerErrorKind::Fatal => {
            Attempt::Failed(Box::new(letter), error)
        }
        (_, _) => Attempt::Apart(before.div_ceil(2)),
    }
}

fn letters_of_used<Tx: Transaction>(tx: &mut Tx) -> Result<&mut dyn DeadLetters, Obstacle> {
    tx.dead_letters().ok_or_else(|| Obstacle::Transaction(keeps_none()))
}
