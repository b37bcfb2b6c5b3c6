use std::{mem, time::Duration};

use async_trait::async_trait;

use super::{
    call::{Cut, Interrupted, flush, grace_is_over, handle},
    failure::{Failure, RecordFailure, not_the_backends},
    policy::{Sentence, Verdict},
    run::Done,
    session::Session,
};
use crate::{
    Error, Handler, HandlerError, HandlerErrorKind, Offset, OffsetStore, Record, Transaction, Tried,
    letters::DeadLetters, rt::Instant,
};

/// The order of handling and committing: one of [`EssentiallyOnce`], [`AtLeastOnce`] and
/// [`AtMostOnce`].
#[async_trait]
pub trait Delivery<S: OffsetStore>: sealed::Sealed + Send + 'static {
    /// What a handler writes to.
    type Tx: Send;

    #[doc(hidden)]
    const NAME: &'static str;

    #[doc(hidden)]
    const NEEDS_DURABILITY: bool;

    /// Whether it may handle a record again, and therefore keeps dead letters.
    #[doc(hidden)]
    const RETRIES: bool;

    /// Tries the letters of one key that are due. Returns `false` if none is.
    #[doc(hidden)]
    async fn deliver_letters<H: Handler<Self::Tx>>(
        session: &mut Session<'_, S>,
        handler: &mut H,
    ) -> Result<bool, Failure> {
        let _ = (session, handler);
        Ok(false)
    }

    /// Returns how many of the records were passed: fewer than all if the batch ran out of time.
    #[doc(hidden)]
    async fn deliver<H: Handler<Self::Tx>>(
        session: &mut Session<'_, S>,
        handler: &mut H,
        batch: &[Record],
    ) -> Result<usize, Failure>;
}

/// A delivery that may try a record again: [`EssentiallyOnce`] or [`AtLeastOnce`].
pub trait Retrying: sealed::Sealed {}

impl Retrying for EssentiallyOnce {}
impl Retrying for AtLeastOnce {}

mod sealed {
    pub trait Sealed {}
    impl Sealed for super::EssentiallyOnce {}
    impl Sealed for super::AtLeastOnce {}
    impl Sealed for super::AtMostOnce {}
}

/// Commits the effects and the offset together.
#[derive(Debug)]
pub enum EssentiallyOnce {}

/// Commits the offset after the effects.
#[derive(Debug)]
pub enum AtLeastOnce {}

/// Commits the offset before the effects.
#[derive(Debug)]
pub enum AtMostOnce {}

const NOTHING_MOVED: &str = "fatal error; nothing of its batch was committed";

#[async_trait]
impl<S: OffsetStore> Delivery<S> for EssentiallyOnce {
    type Tx = S::Tx;

    const NAME: &'static str = "essentially-once";
    const NEEDS_DURABILITY: bool = true;
    const RETRIES: bool = true;

    async fn deliver_letters<H: Handler<Self::Tx>>(
        session: &mut Session<'_, S>,
        handler: &mut H,
    ) -> Result<bool, Failure> {
        session.try_letters(handler).await
    }

    async fn deliver<H: Handler<Self::Tx>>(
        session: &mut Session<'_, S>,
        handler: &mut H,
        batch: &[Record],
    ) -> Result<usize, Failure> {
        let mut tx = session.begin().await?;
        let (done, passed, mut failed) =
            handle_each(session, handler, batch, &mut tx, S::Tx::dead_letters, Cut::AfterGrace).await;
        if failed.is_none() && done.handled > 0 {
            failed = match flush(session, handler, &mut tx, Cut::AfterGrace).await {
                Ok(()) => None,
                Err(Interrupted::Failed(error)) => Some(batch_failure(session, passed, error)),
                Err(Interrupted::Stopped) => Some(Failure::Stopped),
            };
        }
        match failed {
            None => {}
            // Dropping the transaction rolls it back.
            Some(Failure::Stopped) => return Err(Failure::Stopped),
            Some(failed) => {
                session.parked.discard();
                let rolled_back = session.unless_stopped(tx.rollback()).await;
                if let Ok(Err(error)) = &rolled_back {
                    tracing::warn!(%error, "rollback failed; the backend discards the transaction on its own");
                }
                // A fatal error concerns the handler, so it counts even if another instance has
                // handled the record or the run is stopped.
                if !failed.is_fatal() {
                    let _ = rolled_back?;
                    session.check_current().await?;
                }
                let failed = match failed {
                    // The handler may have swallowed an error of the transaction, which then keeps
                    // no letter either. The records before it commit without it.
                    Failure::Backend(error @ (Error::Failed { .. } | Error::TooLarge { .. })) if done.handled > 0 => {
                        let error = session.blame_for_commit(error).await?;
                        let last = passed.last().map_or(Offset::ZERO, |last| last.offset);
                        Failure::Batch(last, error)
                    }
                    failed => failed,
                };
                return Err(session.commit_try(failed).await?);
            }
        }
        let Some(last) = passed.last() else {
            return Ok(0);
        };
        match session.commit(tx, last, done).await {
            Ok(()) => {
                session.count(done, passed);
                Ok(passed.len())
            }
            Err(error @ (Error::Failed { .. } | Error::TooLarge { .. }))
                // Letters that do not fit one commit may fit several.
                if done.handled > 0 || (done.parked > 0 && passed.len() > 1) =>
            {
                let error = session.blame_for_commit(error).await?;
                let failed = batch_failure(session, passed, error);
                Err(session.commit_try(failed).await?)
            }
            Err(error) => Err(error.into()),
        }
    }
}

#[async_trait]
impl<S: OffsetStore> Delivery<S> for AtLeastOnce {
    type Tx = ();

    const NAME: &'static str = "at-least-once";
    const NEEDS_DURABILITY: bool = false;
    const RETRIES: bool = true;

    async fn deliver_letters<H: Handler<Self::Tx>>(
        session: &mut Session<'_, S>,
        handler: &mut H,
    ) -> Result<bool, Failure> {
        session.try_letter_at_least_once(handler).await
    }

    async fn deliver<H: Handler<Self::Tx>>(
        session: &mut Session<'_, S>,
        handler: &mut H,
        batch: &[Record],
    ) -> Result<usize, Failure> {
        let (mut done, passed, failed) = handle_each(session, handler, batch, &mut (), |()| None, Cut::Never).await;
        if done.handled > 0
            && let Err(Interrupted::Failed(error)) = flush(session, handler, &mut (), Cut::Never).await
        {
            let failed = batch_failure(session, passed, error);
            if !failed.is_fatal() {
                session.check_current().await?;
            }
            return Err(session.commit_try(failed).await?);
        }
        let passed_over = Done {
            parked: mem::take(&mut done.parked),
            failed: mem::take(&mut done.failed),
            ..Done::default()
        };
        session.count(done, passed);
        let is_fatal = failed.as_ref().is_some_and(Failure::is_fatal);
        if let Some(last) = passed.last() {
            let committed = commit_what_was_done(session, last, passed_over).await;
            match committed {
                Err(error) if is_fatal => {
                    tracing::warn!(?error, "could not commit the records handled before a fatal error")
                }
                committed => committed?,
            }
        } else if failed.is_some() && !is_fatal {
            session.check_current().await?;
        }
        match failed {
            None => Ok(passed.len()),
            // The records before the failed one are committed, so that they are not handled again
            // because of it. That has stored its tries too.
            Some(Failure::Record(failed)) if !passed.is_empty() => Err(Failure::Record(Box::new(RecordFailure {
                is_next: true,
                revision: session.place.revision,
                ..*failed
            }))),
            Some(failed) => Err(session.commit_try(failed).await?),
        }
    }
}

/// Commits the offset after `last`. The handled records would otherwise be handled again, so a stop
/// leaves time to commit.
async fn commit_what_was_done<S: OffsetStore>(
    session: &mut Session<'_, S>,
    last: &Record,
    passed_over: Done,
) -> Result<(), Failure> {
    let mut tx = tokio::select! {
        biased;
        tx = session.store.begin(session.id) => tx?,
        () = grace_is_over(session.stop, session.settings.stop_grace) => return Err(Failure::Stopped),
    };
    if let Some(letter) = session.to_park.take() {
        session.park(tx.dead_letters(), letter).await?;
    }
    session.commit(tx, last, passed_over).await?;
    session.count(passed_over, &[]);
    Ok(())
}

/// Handles the batch up to a failure, a stop, or the end of its time. Returns the counts, the
/// records that were passed, and the failure.
async fn handle_each<'b, S, Tx, H>(
    session: &mut Session<'_, S>,
    handler: &mut H,
    batch: &'b [Record],
    tx: &mut Tx,
    letters: fn(&mut Tx) -> Option<&mut dyn DeadLetters>,
    cut: Cut,
) -> (Done, &'b [Record], Option<Failure>)
where
    S: OffsetStore,
    Tx: Send,
    H: Handler<Tx>,
{
    let mut done = Done::default();
    let mut limit = TimeLimit::begin(batch_time(session));
    for (index, record) in batch.iter().enumerate() {
        if index > 0 && (session.stop.is_cancelled() || limit.is_up(index)) {
            return (done, &batch[..index], None);
        }
        let letter = match session.verdict_on(record).map(|verdict| &verdict.sentence) {
            Some(Sentence::Skip) => {
                session.mark_passed(record);
                done.failed += 1;
                continue;
            }
            Some(Sentence::Park {
                tried,
                last_reason,
                kind,
            }) => Some(session.letter(record, tried, last_reason, *kind)),
            None if is_duplicate(session, record) => {
                session.drop_duplicate(record);
                done.duplicates += 1;
                continue;
            }
            None => session.parked.holds(record).then(|| session.letter_behind(record)),
        };
        if let Some(letter) = letter {
            let Some(letters) = letters(tx) else {
                // The commit that follows the effects parks it, and nothing else.
                if index > 0 {
                    return (done, &batch[..index], None);
                }
                session.mark_passed(record);
                session.to_park = Some(letter);
                done.parked += 1;
                return (done, &batch[..1], None);
            };
            match session.park(Some(letters), letter).await {
                Ok(()) => {}
                // It may fit a commit of its own, and the records before it do not depend on it.
                Err(Failure::Refused(_)) if index > 0 => return (done, &batch[..index], None),
                Err(failure) => return (done, &batch[..index], Some(failure)),
            }
            session.mark_passed(record);
            done.parked += 1;
            continue;
        }
        match handle(session, handler, record, tx, cut).await {
            Ok(()) => {
                session.windows.mark(record, session.now);
                done.handled += 1;
            }
            Err(Interrupted::Stopped) => return (done, &batch[..index], Some(Failure::Stopped)),
            Err(Interrupted::Failed(error)) => {
                let failure = record_failure(session, record, error, index == 0);
                return (done, &batch[..index], Some(failure));
            }
        }
    }
    (done, batch, None)
}

/// How long handling a batch may take, if the commit takes as long as the last one. A twentieth of
/// the limit remains for handing a lock over to the next one that waits. A slow commit takes at
/// most half of the limit, so that its batch is worth it.
fn batch_time<S>(session: &Session<'_, S>) -> Duration {
    let limit = session.settings.batch_time_limit;
    limit - limit / 20 - session.commit_time.min(limit / 2)
}

/// How many fast records pass between two looks at the clock. A look takes about as long as a
/// handler that does little.
const FAST_RECORDS: usize = 8;

/// How long a batch may take from now on.
struct TimeLimit {
    started: Instant,
    limit: Duration,
    /// The number of passed records at which to look at the clock next.
    next_look: usize,
}

impl TimeLimit {
    fn begin(limit: Duration) -> Self {
        Self {
            started: Instant::now(),
            limit,
            next_look: 1,
        }
    }

    /// Whether one more record would take longer than there is time, if it takes the average time
    /// of the `passed` records before it, which are at least one. In half of the time another
    /// record always fits, however many came before.
    fn is_up(&mut self, passed: usize) -> bool {
        if passed < self.next_look {
            return false;
        }
        let (elapsed, limit) = (self.started.elapsed().as_nanos(), self.limit.as_nanos());
        let allowed = limit.saturating_mul(passed as u128);
        // The next fast records take less than a sixteenth of the limit.
        if elapsed.saturating_mul(16 * FAST_RECORDS as u128) < allowed {
            self.next_look = passed + FAST_RECORDS;
        }
        elapsed > limit / 2 && elapsed.saturating_mul(passed as u128 + 1) > allowed
    }
}

impl<S: OffsetStore> Session<'_, S> {
    /// Whether the handler gets the record.
    pub(super) fn reaches_handler(&self, record: &Record) -> bool {
        self.verdict_on(record).is_none() && !is_duplicate(self, record) && !self.parked.holds(record)
    }

    /// What to do with the record, if its last try failed at this revision. After any other commit,
    /// it may succeed, because it may have failed because of what that commit has changed.
    fn verdict_on(&self, record: &Record) -> Option<&Verdict> {
        let verdict = self.run.verdict.as_ref()?;
        let counts = (verdict.offset, verdict.revision) == (record.offset, self.place.revision);
        counts.then_some(verdict)
    }

    /// Marks the origin of a record that is passed without its effects. A malformed record may be
    /// the broken copy of one that is sent again intact.
    fn mark_passed(&mut self, record: &Record) {
        if record.malformed.is_none() {
            self.windows.mark(record, self.now);
        }
    }
}

/// Whether the record was handled before. A malformed record never counts as handled, whatever its
/// origin says: it may be the broken copy of a record that is sent again intact.
fn is_duplicate<S>(session: &Session<'_, S>, record: &Record) -> bool {
    let origin = record.origin.as_ref().filter(|_| record.malformed.is_none());
    origin.is_some_and(|origin| session.windows.is_seen(origin))
}

/// The failure of these records as a batch: of the only record, or of one that is still to be
/// found.
fn batch_failure<S: OffsetStore>(session: &mut Session<'_, S>, passed: &[Record], error: HandlerError) -> Failure {
    match passed {
        [] => Failure::Batch(Offset::ZERO, error),
        [first, .., last] if error.kind != HandlerErrorKind::Fatal => not_the_backends(error, first.offset)
            .map_or_else(Failure::Backend, |error| Failure::Batch(last.offset, error)),
        [first, ..] => record_failure(session, first, error, true),
    }
}

/// The failure of a record, or of the backend if that is to blame.
fn record_failure<S: OffsetStore>(
    session: &mut Session<'_, S>,
    record: &Record,
    error: HandlerError,
    is_first: bool,
) -> Failure {
    let error = match not_the_backends(error, record.offset) {
        Ok(error) => error,
        Err(error) => return Failure::Backend(error),
    };
    Failure::Record(Box::new(RecordFailure {
        record: record.clone(),
        tried: session.tried_again(record.offset, &error),
        error,
        revision: session.place.revision,
        is_first,
        is_next: is_first,
        deaths: 0,
        fatal_outcome: NOTHING_MOVED,
    }))
}

#[async_trait]
impl<S: OffsetStore> Delivery<S> for AtMostOnce {
    type Tx = ();

    const NAME: &'static str = "at-most-once";
    const NEEDS_DURABILITY: bool = false;
    const RETRIES: bool = false;

    async fn deliver<H: Handler<Self::Tx>>(
        session: &mut Session<'_, S>,
        handler: &mut H,
        batch: &[Record],
    ) -> Result<usize, Failure> {
        let Some(last) = batch.last() else {
            return Ok(0);
        };
        let mut fresh = Vec::with_capacity(batch.len());
        for record in batch {
            if is_duplicate(session, record) {
                session.drop_duplicate(record);
                continue;
            }
            // A malformed record marks nothing, so that its sender can send it again intact.
            if record.malformed.is_none() {
                session.windows.mark(record, session.now);
            }
            fresh.push(record);
        }
        let tx = session.begin().await?;
        let duplicates = (batch.len() - fresh.len()) as u64;
        let in_doubt = Done {
            duplicates,
            failed: fresh.len() as u64,
            ..Done::default()
        };
        session.commit(tx, last, in_doubt).await?;
        let (done, fatal) = handle_committed(session, handler, &fresh).await;
        session.count(Done { duplicates, ..done }, batch);
        fatal.map_or(Ok(batch.len()), |fatal| Err(Failure::Record(Box::new(fatal))))
    }
}

/// Handles records whose offset is already committed. Returns the counts, and the fatal failure if
/// one occurred.
async fn handle_committed<S: OffsetStore, H: Handler<()>>(
    session: &mut Session<'_, S>,
    handler: &mut H,
    records: &[&Record],
) -> (Done, Option<RecordFailure>) {
    let mut done = Done::default();
    let revision = session.place.revision;
    let fatal_failure = |record: &Record, error: HandlerError, fatal_outcome| RecordFailure {
        record: record.clone(),
        tried: Tried::new(record.offset, &error.to_string()),
        error,
        revision,
        is_first: true,
        is_next: false,
        deaths: 0,
        fatal_outcome,
    };
    let mut fatal = None;
    let mut stopped: Option<Instant> = None;
    for (index, record) in records.iter().enumerate() {
        let unhandled = (records.len() - index) as u64;
        if session.stop.is_cancelled()
            && stopped.get_or_insert_with(Instant::now).elapsed() >= session.settings.stop_grace
        {
            tracing::warn!(
                unhandled,
                "the run was stopped and its grace period is over; passing over records, since their offset is committed"
            );
            done.failed += unhandled;
            break;
        }
        let error = match handle(session, handler, record, &mut (), Cut::Never).await {
            Err(Interrupted::Failed(error)) => error,
            _ => {
                done.handled += 1;
                continue;
            }
        };
        tracing::warn!(offset = %record.offset, %error, "passing over a failed record; at-most-once does not try again");
        if error.kind == HandlerErrorKind::Fatal {
            tracing::warn!(
                unhandled = unhandled - 1,
                "passing over the records after a fatal error, since their offset is committed"
            );
            done.failed += unhandled;
            let outcome =
                "fatal error; the position is past this record and the rest of its batch, which were not handled";
            fatal = Some(fatal_failure(record, error, outcome));
            break;
        }
        done.failed += 1;
    }
    if done.handled > 0
        && let Err(Interrupted::Failed(error)) = flush(session, handler, &mut (), Cut::Never).await
    {
        let unwritten = mem::take(&mut done.handled);
        done.failed += unwritten;
        tracing::warn!(unwritten, %error, "passing over a batch that failed to flush; at-most-once does not try again");
        if let (HandlerErrorKind::Fatal, None, Some(last)) = (error.kind, &fatal, records.last()) {
            let outcome = "fatal error after the batch that ends with this record; the position is past it";
            fatal = Some(fatal_failure(last, error, outcome));
        }
    }
    (done, fatal)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_millis(128);

    #[tokio::test(start_paused = true)]
    async fn slow_records_after_fast_ones_are_noticed_at_the_next_look() {
        let mut limit = TimeLimit::begin(LIMIT);
        assert!(!limit.is_up(1));
        tokio::time::advance(2 * LIMIT).await;
        assert!((2..=FAST_RECORDS).all(|passed| !limit.is_up(passed)));
        assert!(limit.is_up(FAST_RECORDS + 1));
    }

    #[tokio::test(start_paused = true)]
    async fn each_slow_record_is_followed_by_a_look() {
        let mut limit = TimeLimit::begin(LIMIT);
        for passed in 1..4 {
            tokio::time::advance(LIMIT / 64).await;
            assert!(!limit.is_up(passed));
        }
        tokio::time::advance(LIMIT).await;
        assert!(limit.is_up(4));
    }
}
