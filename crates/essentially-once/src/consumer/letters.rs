//! Dead letters in the loop: parking records, and trying letters again.

use std::{
    collections::HashMap,
    mem,
    time::{Duration, SystemTime},
};

use bytes::Bytes;

use super::{
    call::{Cut, Interrupted, flush, handle, reset},
    failure::{Failure, RecordFailure, not_the_backends},
    run::Done,
    session::Session,
};
use crate::{
    Error, Handler, HandlerError, HandlerErrorKind, OffsetStore, Record, Revision, Transaction, Tried,
    letters::{DeadLetter, DeadLetters, trusted_key},
    rt::Instant,
};

/// How long records have to arrive in a session after one that a letter has ended.
const RECORDS_FIRST: Duration = Duration::from_millis(100);

/// How many keys one page of counts holds.
const KEYS_PER_PAGE: usize = 10_000;

/// How a consumer keeps dead letters. See
/// [`Consumer::dead_letters`](super::Consumer::dead_letters).
///
/// ```
/// # use essentially_once::consumer::DeadLetterOptions;
/// # use std::time::Duration;
/// let options = DeadLetterOptions::new().retry_after(Duration::from_secs(60)).limit(10_000);
/// ```
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DeadLetterOptions {
    retry_after: Option<Duration>,
    longest_retry_after: Duration,
    limit: u64,
}

impl DeadLetterOptions {
    /// Letters wait for an operator, and a consumer keeps up to 100,000.
    pub fn new() -> Self {
        Self {
            retry_after: None,
            longest_retry_after: Duration::from_secs(60 * 60),
            limit: 100_000,
        }
    }

    /// Tries the first letter of each key again after this time, which must not be zero. The pause
    /// then doubles with each failure, up to [`longest_retry_after`](Self::longest_retry_after).
    /// When the letter succeeds, the next one of its key follows at once. Letters of other keys,
    /// and the log, do not wait for it.
    ///
    /// A letter that the handler [rejects](HandlerError::reject), or that cannot be decoded, waits
    /// for an operator.
    #[must_use]
    pub fn retry_after(mut self, pause: Duration) -> Self {
        self.retry_after = Some(pause);
        self
    }

    /// The longest pause between two tries of a letter. The default is one hour.
    #[must_use]
    pub fn longest_retry_after(mut self, pause: Duration) -> Self {
        self.longest_retry_after = pause;
        self
    }

    /// The most letters of this consumer. The run ends with [`Error::Failed`] before a record that
    /// would be one more.
    #[must_use]
    pub fn limit(mut self, letters: u64) -> Self {
        self.limit = letters;
        self
    }

    pub(super) fn check(&self) -> Result<(), Error> {
        let invalid = |setting, reason: &str| {
            Err(Error::InvalidSetting {
                setting,
                reason: reason.into(),
            })
        };
        match self.retry_after {
            Some(Duration::ZERO) => invalid(
                "retry_after",
                "it is 0 s and must be longer; leave it unset for no retry",
            ),
            Some(first) if first > self.longest_retry_after => {
                invalid("retry_after", "it must not exceed `longest_retry_after`")
            }
            _ => Ok(()),
        }
    }

    /// When to try a letter again that failed at `now`.
    fn due(&self, letter: &DeadLetter, now: SystemTime) -> Option<SystemTime> {
        let before = match letter.due {
            // The pause that the last failure chose. An operator's retry begins anew.
            Some(due) if letter.tries > 0 => due.duration_since(letter.last_failed_at).unwrap_or_default(),
            _ => Duration::ZERO,
        };
        let pause = before.saturating_mul(2).max(self.retry_after.unwrap_or_default());
        // Without `retry_after`, only a schedule that another instance began goes on.
        (!pause.is_zero()).then(|| now.checked_add(pause.min(self.longest_retry_after)))?
    }
}

impl Default for DeadLetterOptions {
    fn default() -> Self {
        Self::new()
    }
}

/// What a session knows about the consumer's letters at its position's revision. Whoever adds or
/// removes letters commits, so an instance whose knowledge is out of date is fenced.
#[derive(Default)]
pub(super) struct Parked {
    /// The revision of the position at which this was true; `None` if it never was.
    revision: Option<Revision>,
    /// The number of letters of each key.
    keys: HashMap<Bytes, u64>,
    total: u64,
    /// When the first letter is due.
    pub(super) due: Option<SystemTime>,
    /// The key and the due time of each letter parked in the open transaction.
    staged: Vec<(Option<Bytes>, Option<SystemTime>)>,
}

impl Parked {
    async fn load(letters: &mut dyn DeadLetters) -> Result<Self, Error> {
        let mut keys = HashMap::new();
        let total = letters.total().await?;
        let mut after: Option<Bytes> = None;
        if total > 0 {
            loop {
                let page = letters.counts(after.as_deref(), KEYS_PER_PAGE).await?;
                let is_last = page.len() < KEYS_PER_PAGE;
                after = page.last().map(|(key, _)| key.clone());
                keys.extend(page);
                if is_last {
                    break;
                }
            }
        }
        let due = letters.first_due().await?.and_then(|letter| letter.due);
        Ok(Self {
            keys,
            total,
            due,
            ..Self::default()
        })
    }

    /// Whether earlier records of this record's key are letters.
    pub(super) fn holds(&self, record: &Record) -> bool {
        !self.keys.is_empty() && trusted_key(record).is_some_and(|key| self.keys.contains_key(key))
    }

    pub(super) fn total(&self) -> u64 {
        self.total
    }

    /// Forgets what was parked in a transaction that was not committed.
    pub(super) fn discard(&mut self) {
        self.staged.clear();
    }

    /// Applies what was parked in a transaction, now that it is committed.
    pub(super) fn commit(&mut self, revision: Revision) {
        for (key, due) in mem::take(&mut self.staged) {
            self.total += 1;
            if let Some(key) = key {
                *self.keys.entry(key).or_default() += 1;
            }
            if let Some(due) = due {
                self.due = Some(self.due.map_or(due, |first| first.min(due)));
            }
        }
        self.revision = Some(revision);
    }

    fn remove(&mut self, letter: &DeadLetter) {
        self.total = self.total.saturating_sub(1);
        if let Some(key) = letter.key()
            && let Some(count) = self.keys.get_mut(key)
        {
            *count -= 1;
            if *count == 0 {
                self.keys.remove(key);
            }
        }
    }
}

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
    /// Loads what the store knows about the letters. Must follow the position: if another instance
    /// commits in between, this one is fenced.
    pub(super) async fn load_parked(&mut self) -> Result<(), Failure> {
        if !S::Tx::KEEPS_DEAD_LETTERS {
            return Ok(());
        }
        self.parked = mem::take(&mut self.run.parked);
        self.parked.discard();
        // The session before may have known, and nothing has changed since.
        if self.parked.revision == Some(self.place.revision) {
            return Ok(());
        }
        let mut tx = self.begin().await?;
        self.parked = self.or_stop(Parked::load(letters_of(&mut tx)?)).await?;
        self.parked.revision = Some(self.place.revision);
        self.telemetry.dead_letters.set(self.parked.total() as f64);
        self.end(tx).await
    }

    /// When the first letter is due.
    pub(super) async fn first_due(&self) -> Result<Option<SystemTime>, Failure> {
        // A transaction may see what its handle read last, and the position is never older than the
        // call.
        self.or_stop(self.store.position(self.id)).await?;
        let mut tx = self.begin().await?;
        let first = self.or_stop(letters_of(&mut tx)?.first_due()).await?;
        self.end(tx).await?;
        Ok(first.and_then(|letter| letter.due))
    }

    /// Fails if the consumer has letters, for a delivery that neither tries them nor keeps their
    /// keys in order.
    pub(super) async fn refuse_letters(&mut self) -> Result<(), Failure> {
        if !S::Tx::KEEPS_DEAD_LETTERS || self.run.no_letters_at == Some(self.place.revision) {
            return Ok(());
        }
        let mut tx = self.begin().await?;
        let total = self.or_stop(letters_of(&mut tx)?.total()).await?;
        self.end(tx).await?;
        match total {
            0 => {
                self.run.no_letters_at = Some(self.place.revision);
                Ok(())
            }
            _ => Err(Failure::Backend(Error::failed(
                format!("run consumer {} of log {}", self.id, self.log.id()),
                format!(
                    "it has {total} dead letters, and only essentially-once handles them and keeps their keys in order; \
                     handle or discard them with that delivery first"
                ),
            ))),
        }
    }

    /// The letter of a record whose last try failed.
    pub(super) fn letter(
        &self,
        record: &Record,
        tried: &Tried,
        last_reason: &str,
        kind: HandlerErrorKind,
    ) -> DeadLetter {
        let mut letter = DeadLetter::new(record.clone(), tried.tries(), tried.first_reason(), self.now);
        letter.set_last_reason(last_reason);
        letter.due = self.due(&letter, kind);
        letter
    }

    fn due(&self, letter: &DeadLetter, kind: HandlerErrorKind) -> Option<SystemTime> {
        if kind != HandlerErrorKind::Retry || letter.record.malformed.is_some() {
            return None;
        }
        let options = self.settings.letters.clone().unwrap_or_default();
        options.due(letter, self.now)
    }

    /// When to try letters next. A verdict on a record is carried out first, and after a letter
    /// that ended a session, records have a moment to arrive.
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

    /// Tries the letters of one key. Returns `false` if none was due.
    pub(super) async fn try_due_letters<H: Handler<S::Tx>>(&mut self, handler: &mut H) -> Result<bool, Failure> {
        // Until the letters are tried without ending the session.
        self.run.records_first = true;
        let tried = self.try_letters(handler).await?;
        self.run.records_first = false;
        Ok(tried)
    }

    /// Parks a record behind the letters of its key.
    pub(super) async fn park_behind(
        &mut self,
        letters: Option<&mut dyn DeadLetters>,
        record: &Record,
    ) -> Result<(), Failure> {
        let reason = "not tried, because earlier records of its key are dead letters";
        let letter = DeadLetter::new(record.clone(), 0, reason, self.now);
        self.park(letters, letter).await
    }

    /// Parks a record. Nothing is refused because of what another instance has parked since.
    pub(super) async fn park(
        &mut self,
        letters: Option<&mut dyn DeadLetters>,
        letter: DeadLetter,
    ) -> Result<(), Failure> {
        let letters = letters.ok_or_else(|| Failure::Backend(keeps_none()))?;
        if let Some(reason) = self.refusal(letters, &letter).await? {
            self.check_current().await?;
            let action = format!(
                "set the record at {} of log {} aside",
                letter.record.offset,
                self.log.id()
            );
            return Err(Failure::Backend(Error::failed(action, reason)));
        }
        self.within_grace(letters.park(&letter)).await?;
        self.parked.staged.push((letter.key().cloned(), letter.due));
        Ok(())
    }

    /// Why a record cannot become a letter, if it cannot.
    async fn refusal(&self, letters: &mut dyn DeadLetters, letter: &DeadLetter) -> Result<Option<String>, Failure> {
        let limit = self.settings.letters.clone().unwrap_or_default().limit;
        let total = self.parked.total + self.parked.staged.len() as u64;
        if total >= limit {
            return Ok(Some(format!(
                "consumer {} has {total} dead letters, and {limit} is its limit; retry or discard some, or raise \
                 `DeadLetterOptions::limit`",
                self.id
            )));
        }
        let stored = self.within_grace(letters.letter(letter.record.offset)).await?;
        Ok(stored.map(|_| {
            format!(
                "consumer {} has a dead letter at that offset, of an earlier log of the same name; retry or discard it \
                 first",
                self.id
            )
        }))
    }

    /// Tries the letters of the key whose letter is due first, each before the next, until one
    /// fails or the batch is full.
    /// Returns `false` if no letter was due.
    async fn try_letters<H: Handler<S::Tx>>(&mut self, handler: &mut H) -> Result<bool, Failure> {
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
        let first = self.or_stop(letters_of(&mut tx)?.first_due()).await?;
        self.parked.due = first.as_ref().and_then(|letter| letter.due);
        let Some(first) = first.filter(|_| self.letters_due().is_some_and(|due| due <= self.now)) else {
            self.end(tx).await?;
            return Ok(Attempt::NothingDue);
        };
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
        match self.commit_unmoved(tx, done).await {
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
                letter.set_due(Some(self.cut_off.unwrap_or(self.now)));
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
                following = self.used(letters_of_used(tx)?.head(&key)).await?;
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
    async fn note_failure(&mut self, mut letter: DeadLetter, error: HandlerError) -> Result<(), Failure> {
        let error = not_the_backends(error, letter.record.offset)?;
        if error.kind == HandlerErrorKind::Fatal {
            return Err(Failure::Record(Box::new(RecordFailure {
                tried: Tried::new(letter.record.offset, &error.to_string()),
                record: letter.record,
                error,
                revision: self.place.revision,
                is_first: true,
                is_next: false,
                fatal_outcome: "fatal error in a dead letter, which stays as it was",
            })));
        }
        // The try may have taken long.
        self.now = SystemTime::now();
        let due = self.due(&letter, error.kind);
        let last_reason = letter.last_reason.clone();
        letter.failed_again(&error.to_string(), self.now, due);
        let first = match self.commit_letter(&letter).await {
            // A store that is nearly full may have no room for a longer reason.
            Err(Failure::Backend(Error::Failed { .. } | Error::TooLarge { .. })) => {
                letter.set_last_reason(&last_reason);
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
        self.commit_unmoved(tx, Done::default()).await?;
        Ok(first)
    }

    /// Rolls a transaction back. An error concerns only the rollback, since the backend discards
    /// the transaction in any case.
    async fn end(&self, tx: S::Tx) -> Result<(), Failure> {
        if let Err(error) = self.unless_stopped(tx.rollback()).await? {
            tracing::debug!(%error, "rollback failed; the backend discards the transaction on its own");
        }
        Ok(())
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

fn letters_of<Tx: Transaction>(tx: &mut Tx) -> Result<&mut dyn DeadLetters, Failure> {
    tx.dead_letters().ok_or_else(|| Failure::Backend(keeps_none()))
}

fn letters_of_used<Tx: Transaction>(tx: &mut Tx) -> Result<&mut dyn DeadLetters, Obstacle> {
    tx.dead_letters().ok_or_else(|| Obstacle::Transaction(keeps_none()))
}

fn keeps_none() -> Error {
    Error::failed("use dead letters", "the store's transaction keeps none")
}
