//! Dead letters in the loop: what a session knows about them, and parking records.

use std::{
    collections::HashMap,
    mem,
    time::{Duration, SystemTime},
};

use bytes::Bytes;

use super::{failure::Failure, key_filter::KeyFilter, session::Session};
use crate::{
    Error, HandlerErrorKind, OffsetStore, Record, Revision, Transaction, Tried,
    letters::{DeadLetter, DeadLetters, trusted_key},
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
    pub(super) longest_retry_after: Duration,
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
    /// A letter that the handler [rejects](crate::HandlerError::reject), or that cannot be decoded,
    /// waits for an operator.
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
            // The pause that the last failure chose. After an operator's retry there is none.
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
    /// What may be among the keys.
    filter: KeyFilter,
    total: u64,
    /// When the first letter is due.
    pub(super) due: Option<SystemTime>,
    /// The key and the due time of each letter parked in the open transaction.
    staged: Vec<(Option<Bytes>, Option<SystemTime>)>,
}

impl Parked {
    pub(super) async fn load(letters: &mut dyn DeadLetters) -> Result<Self, Error> {
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
            filter: KeyFilter::of(keys.keys().map(|key| &key[..])),
            keys,
            total,
            due,
            ..Self::default()
        })
    }

    /// Whether earlier records of this record's key are letters.
    #[inline]
    pub(super) fn holds(&self, record: &Record) -> bool {
        let is_held = |key: &Bytes| self.filter.may_hold(key) && self.keys.contains_key(key);
        !self.keys.is_empty() && trusted_key(record).is_some_and(is_held)
    }

    pub(super) fn total(&self) -> u64 {
        self.total
    }

    /// Replaces everything by what is true at the same revision.
    pub(super) fn replace(&mut self, loaded: Self) {
        *self = Self {
            revision: self.revision,
            ..loaded
        };
    }

    /// Notes a letter of the open transaction.
    fn stage(&mut self, letter: &DeadLetter) {
        // The key of a record may share its memory with all records of a fetch.
        let key = letter.key().map(|key| Bytes::copy_from_slice(key));
        self.staged.push((key, letter.due));
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
                if !self.filter.has_room(self.keys.len() + 1) {
                    self.filter = KeyFilter::of(self.keys.keys().map(|key| &key[..]));
                }
                self.filter.insert(&key);
                *self.keys.entry(key).or_default() += 1;
            }
            if let Some(due) = due {
                self.due = Some(self.due.map_or(due, |first| first.min(due)));
            }
        }
        self.revision = Some(revision);
    }

    pub(super) fn remove(&mut self, letter: &DeadLetter) {
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
                    "it has {total} dead letters, which at-most-once neither tries nor keeps in the order of their keys; \
                     handle them with another delivery, or discard them"
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

    pub(super) fn due(&self, letter: &DeadLetter, kind: HandlerErrorKind) -> Option<SystemTime> {
        if kind != HandlerErrorKind::Retry || letter.record.malformed.is_some() {
            return None;
        }
        let options = self.settings.letters.clone().unwrap_or_default();
        options.due(letter, self.now)
    }

    /// The letter of a record that follows the letters of its key.
    pub(super) fn letter_behind(&self, record: &Record) -> DeadLetter {
        let reason = "not tried, because earlier records of its key are dead letters";
        DeadLetter::new(record.clone(), 0, reason, self.now)
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
            return Err(Failure::Refused(Error::failed(action, reason)));
        }
        self.within_grace(letters.park(&letter))
            .await
            .map_err(|failure| match failure {
                Failure::Backend(error @ Error::TooLarge { .. }) => Failure::Refused(error),
                failure => failure,
            })?;
        self.parked.stage(&letter);
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

    /// Rolls a transaction back. An error concerns only the rollback, since the backend discards
    /// the transaction in any case.
    pub(super) async fn end(&self, tx: S::Tx) -> Result<(), Failure> {
        if let Err(error) = self.unless_stopped(tx.rollback()).await? {
            tracing::debug!(%error, "rollback failed; the backend discards the transaction on its own");
        }
        Ok(())
    }
}

pub(super) fn letters_of<Tx: Transaction>(tx: &mut Tx) -> Result<&mut dyn DeadLetters, Failure> {
    tx.dead_letters().ok_or_else(|| Failure::Backend(keeps_none()))
}

pub(super) fn keeps_none() -> Error {
    Error::failed("use dead letters", "the store's transaction keeps none")
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use super::*;

    #[test]
    fn the_key_of_a_letter_does_not_keep_a_whole_fetch_in_memory() {
        let fetch = Bytes::from(vec![7; 1_000]);
        let mut record = Record::new(0.into(), UNIX_EPOCH, fetch.slice(8..));
        record.key = Some(fetch.slice(..8));
        let mut parked = Parked::default();
        parked.stage(&DeadLetter::new(record.clone(), 1, "no", UNIX_EPOCH));
        parked.commit(Revision::NONE.next_epoch());
        assert!(parked.holds(&record));
        drop(record);
        assert!(fetch.is_unique());
    }
}
