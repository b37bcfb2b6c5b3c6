//! Dead letters in the loop: parking records, and trying letters again.

use std::{
    collections::HashMap,
    mem,
    time::{Duration, SystemTime},
};

use bytes::Bytes;

use super::{
    call::{Cut, Interrupted, flush, handle, reset},
    failure::{Failure, RecordFailure},
    run::Done,
    session::Session,
};
use crate::{
    Error, Handler, HandlerError, HandlerErrorKind, OffsetStore, Record, Revision, Transaction,
    letters::{DeadLetter, DeadLetters, trusted_key},
    rt::Instant,
};

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
        // As long as the letter has been failing: its age then doubles from try to try.
        let age = now.duration_since(letter.parked_at).unwrap_or_default();
        let pause = age.max(self.retry_after?).min(self.longest_retry_after);
        now.checked_add(pause)
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

    pub(super) fn is_due(&self, now: SystemTime) -> bool {
        self.due.is_some_and(|due| due <= now)
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
enum Tried {
    Committed,
    /// Something failed behind this many letters, which may succeed without it.
    Apart(usize),
    Failed(Box<DeadLetter>, HandlerError),
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

    /// The letter of a record whose last try failed.
    pub(super) fn letter(&self, record: &Record, tries: u32, reason: &str) -> DeadLetter {
        let mut letter = DeadLetter::new(record.clone(), tries, reason, self.now);
        letter.due = self.due(&letter, HandlerErrorKind::Retry);
        letter
    }

    fn due(&self, letter: &DeadLetter, kind: HandlerErrorKind) -> Option<SystemTime> {
        let options = self.settings.letters.as_ref();
        let options = options.filter(|_| kind == HandlerErrorKind::Retry && letter.record.malformed.is_none());
        options.and_then(|options| options.due(letter, self.now))
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

    /// Parks a record.
    pub(super) async fn park(
        &mut self,
        letters: Option<&mut dyn DeadLetters>,
        letter: DeadLetter,
    ) -> Result<(), Failure> {
        let offset = letter.record.offset;
        let refused = |reason: String| {
            let action = format!("set the record at {offset} of log {} aside", self.log.id());
            Failure::Backend(Error::failed(action, reason))
        };
        let limit = self.settings.letters.clone().unwrap_or_default().limit;
        let total = self.parked.total + self.parked.staged.len() as u64;
        if total >= limit {
            return Err(refused(format!(
                "consumer {} has {total} dead letters, and {limit} is its limit; retry or discard some, or raise \
                 `DeadLetterOptions::limit`",
                self.id
            )));
        }
        let letters = letters.ok_or_else(|| Failure::Backend(keeps_none()))?;
        if self.or_stop(letters.letter(offset)).await?.is_some() {
            return Err(refused(format!(
                "consumer {} has a dead letter at that offset, of an earlier log of the same name; retry or discard it \
                 first",
                self.id
            )));
        }
        self.or_stop(letters.park(&letter)).await?;
        self.parked.staged.push((letter.key().cloned(), letter.due));
        Ok(())
    }

    /// Tries the letters of the key whose letter is due first, each before the next, until one
    /// fails or the batch is full.
    pub(super) async fn try_letters<H: Handler<S::Tx>>(&mut self, handler: &mut H) -> Result<(), Failure> {
        self.now = SystemTime::now();
        let mut limit = self.settings.max_batch;
        loop {
            match self.try_letters_up_to(handler, limit).await? {
                Tried::Committed => return Ok(()),
                Tried::Apart(fewer) => {
                    reset(handler).await;
                    limit = fewer;
                }
                Tried::Failed(letter, error) => {
                    reset(handler).await;
                    return self.note_failure(*letter, error).await;
                }
            }
        }
    }

    async fn try_letters_up_to<H: Handler<S::Tx>>(&mut self, handler: &mut H, limit: usize) -> Result<Tried, Failure> {
        let started = Instant::now();
        let mut tx = self.begin().await?;
        let first = self.or_stop(letters_of(&mut tx)?.first_due()).await?;
        self.parked.due = first.as_ref().and_then(|letter| letter.due);
        let Some(mut letter) = first.filter(|_| self.parked.is_due(self.now)) else {
            self.end(tx).await?;
            return Ok(Tried::Committed);
        };
        let mut handled = Vec::new();
        loop {
            match handle(self, handler, &letter.record, &mut tx, Cut::AfterGrace).await {
                Ok(()) => {}
                Err(Interrupted::Stopped) => return Err(Failure::Stopped),
                Err(Interrupted::Failed(error)) => {
                    self.end(tx).await?;
                    return Ok(match handled.len() {
                        0 => Tried::Failed(Box::new(letter), error),
                        before => Tried::Apart(before),
                    });
                }
            }
            self.or_stop(letters_of(&mut tx)?.remove(letter.record.offset)).await?;
            let next = match letter.key() {
                Some(key) => self.or_stop(letters_of(&mut tx)?.head(key)).await?,
                None => None,
            };
            handled.push(letter);
            let Some(mut next) = next else { break };
            let is_full = handled.len() >= limit || started.elapsed() > self.settings.batch_time_limit;
            if is_full || self.stop.is_cancelled() {
                // The letters of this key go on where they stop.
                next.set_due(Some(self.now));
                self.or_stop(letters_of(&mut tx)?.park(&next)).await?;
                break;
            }
            letter = next;
        }
        match flush(self, handler, &mut tx, Cut::AfterGrace).await {
            Ok(()) => {}
            Err(Interrupted::Stopped) => return Err(Failure::Stopped),
            Err(Interrupted::Failed(error)) => {
                self.end(tx).await?;
                return Ok(blame(handled, error));
            }
        }
        let first = self.or_stop(letters_of(&mut tx)?.first_due()).await?;
        let done = Done {
            handled: handled.len() as u64,
            ..Done::default()
        };
        match self.commit_at(tx, self.place.next, self.place.passed, done).await {
            Ok(()) => {
                for letter in &handled {
                    tracing::info!(offset = %letter.record.offset, tries = letter.tries, "handled a dead letter");
                    self.parked.remove(letter);
                }
                self.parked.due = first.and_then(|letter| letter.due);
                self.count(done, &[]);
                Ok(Tried::Committed)
            }
            Err(error @ (Error::Failed { .. } | Error::TooLarge { .. })) => {
                Ok(blame(handled, self.blame_for_commit(error).await?))
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Commits that a letter failed once more.
    async fn note_failure(&mut self, mut letter: DeadLetter, error: HandlerError) -> Result<(), Failure> {
        let failed = RecordFailure {
            record: letter.record.clone(),
            error,
            revision: self.place.revision,
            is_first: true,
            is_next: false,
            fatal_outcome: "fatal error in a dead letter, which stays as it was",
        };
        let failed = match failed.classify() {
            Failure::Record(failed) if failed.error.kind != HandlerErrorKind::Fatal => failed,
            failure => return Err(failure),
        };
        let due = self.due(&letter, failed.error.kind);
        letter.failed_again(&failed.error.to_string(), self.now, due);
        let mut tx = self.begin().await?;
        self.or_stop(letters_of(&mut tx)?.park(&letter)).await?;
        let first = self.or_stop(letters_of(&mut tx)?.first_due()).await?;
        self.commit_at(tx, self.place.next, self.place.passed, Done::default())
            .await?;
        self.parked.due = first.and_then(|letter| letter.due);
        tracing::warn!(
            offset = %letter.record.offset, tries = letter.tries, error = %failed.error, ?due,
            "a dead letter failed again"
        );
        Ok(())
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

/// Blames the only letter of a transaction, or takes the letters apart to find the culprit.
fn blame(mut handled: Vec<DeadLetter>, error: HandlerError) -> Tried {
    match (handled.pop(), handled.is_empty()) {
        (Some(letter), true) => Tried::Failed(Box::new(letter), error),
        _ => Tried::Apart(1),
    }
}

fn letters_of<Tx: Transaction>(tx: &mut Tx) -> Result<&mut dyn DeadLetters, Failure> {
    tx.dead_letters().ok_or_else(|| Failure::Backend(keeps_none()))
}

fn keeps_none() -> Error {
    Error::failed("use dead letters", "the store's transaction keeps none")
}
