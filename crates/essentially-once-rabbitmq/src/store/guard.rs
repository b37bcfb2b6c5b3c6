//! Guards of outboxes: commits are refused before retention reaches a record that a relay has not
//! passed on.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use essentially_once::{
    ConsumerId, Error, Offset, OffsetStore,
    backend::{LogId, Position},
};

use super::{
    backlog::{Backlogs, Behind},
    entry::{Entry, Parsed, parse},
    rule::Fold,
    scope::Scope,
    snapshot_policy::{LENGTH, OVERHEAD},
    state::State,
};
use crate::connection::{stream, tail::Tail};

/// A relay's position is read again after this part of the limit.
const LOOKS: u64 = 8;

/// Reads a relay's position.
#[async_trait]
trait Positions: Send + Sync {
    async fn read(&self, relay: &ConsumerId) -> Result<Option<Position>, Error>;
}

#[async_trait]
impl<S: OffsetStore> Positions for S {
    async fn read(&self, relay: &ConsumerId) -> Result<Option<Position>, Error> {
        self.position(relay).await
    }
}

/// An outbox and a relay that passes its records on.
#[derive(Clone)]
pub(super) struct Guard {
    pub(super) consumer: ConsumerId,
    outbox: String,
    /// The log of the outbox, and that of all records of the consumer, whose offsets are the same.
    logs: [LogId; 2],
    relay: ConsumerId,
    positions: Arc<dyn Positions>,
}

impl Guard {
    pub(super) fn new(
        consumer: &ConsumerId,
        outbox: &str,
        logs: [LogId; 2],
        relay: ConsumerId,
        relays: impl OffsetStore,
    ) -> Self {
        Self {
            consumer: consumer.clone(),
            outbox: outbox.to_owned(),
            logs,
            relay,
            positions: Arc::new(relays),
        }
    }

    /// Up to where the relay has passed the records on.
    async fn passed(&self, limit: Duration) -> Result<Result<Offset, Error>, Error> {
        let reading = tokio::time::timeout(limit, self.positions.read(&self.relay)).await;
        let read = reading.unwrap_or_else(|_| {
            let action = format!("read the position of relay {}", self.relay);
            Err(Error::unavailable(action, format!("no answer within {limit:?}")))
        });
        let position = match read {
            Ok(Some(position)) => position,
            Ok(None) => return Ok(Ok(Offset::ZERO)),
            Err(error) => return Ok(Err(error)),
        };
        if self.logs.iter().any(|log| log.is_same_log(&position.log)) {
            return Ok(Ok(position.next));
        }
        Err(Error::WrongLog {
            consumer: self.relay.clone(),
            stored: position.log,
            given: self.logs[0].clone(),
        })
    }
}

/// The guards of one consumer's outboxes.
pub(super) struct Guards {
    guards: Vec<Guard>,
    seen: Mutex<Seen>,
}

struct Seen {
    backlogs: Backlogs,
    looks: Vec<Look>,
}

/// What is known about a relay.
#[derive(Clone, Copy, Default)]
struct Look {
    /// Up to where it had passed the records on.
    passed: Offset,
    /// The bytes counted when its position was last asked for; `None` if that was too long ago.
    at: Option<i64>,
}

/// What a commit does next about an outbox.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Step {
    Commit,
    /// Reads the relay's position.
    Look,
    /// Counts the bytes from the relay's position on.
    Measure,
    Refuse(u64),
}

/// `since_look` are the bytes since the relay's position was last asked for, `None` if it was not.
/// `has_looked` says whether it was asked for because of this commit.
fn decide(behind: Behind, since_look: Option<u64>, has_looked: bool, look_after: u64, limit: u64) -> Step {
    if !has_looked && since_look.is_none_or(|since| since >= look_after) {
        return Step::Look;
    }
    match behind {
        Behind::Nothing => Step::Commit,
        Behind::Bytes(bytes) if bytes <= limit => Step::Commit,
        // It may have moved.
        _ if !has_looked => Step::Look,
        Behind::AtLeast(bytes) if bytes <= limit => Step::Measure,
        Behind::Bytes(bytes) | Behind::AtLeast(bytes) => Step::Refuse(bytes),
    }
}

impl Guards {
    pub(super) fn new(guards: Vec<Guard>, limit: u64) -> Self {
        let outboxes = guards.iter().map(|guard| guard.outbox.clone());
        let seen = Seen {
            backlogs: Backlogs::new(outboxes, limit),
            looks: vec![Look::default(); guards.len()],
        };
        Self {
            guards,
            seen: Mutex::new(seen),
        }
    }

    /// The handle reads on from a snapshot.
    pub(super) fn begin(&self, fold: &Fold<State>) {
        let mut seen = self.seen();
        if !seen.backlogs.is_empty() && seen.backlogs.go_on_at(fold.offset, ends(fold)) {
            seen.forget_looks();
        }
    }

    /// The handle has read up to the end.
    pub(super) fn have_read(&self, fold: &Fold<State>) {
        let mut seen = self.seen();
        if !seen.backlogs.is_empty() && seen.backlogs.have_reached(fold.offset, ends(fold)) {
            seen.forget_looks();
        }
    }

    /// Counts a message, given the fold after it.
    pub(super) fn count(&self, fold: &Fold<State>, offset: u64, bytes: usize) {
        if !self.guards.is_empty() {
            self.seen().backlogs.count(offset, size(bytes), ends(fold));
        }
    }

    /// Refuses a commit if a relay is too far behind. `sends` tells whether it sends to an outbox.
    pub(super) async fn check(&self, scope: &Scope, sends: impl Fn(&str) -> bool) -> Result<(), Error> {
        for (index, guard) in self.guards.iter().enumerate() {
            let limit = match sends(&guard.outbox) {
                true => scope.limits.unrelayed,
                // It brings retention closer, too.
                false => scope.limits.unrelayed + scope.limits.unrelayed / 2,
            };
            self.check_one(scope, index, guard, limit).await?;
        }
        Ok(())
    }

    async fn check_one(&self, scope: &Scope, index: usize, guard: &Guard, limit: u64) -> Result<(), Error> {
        let (mut has_looked, mut failure) = (false, None);
        let look_after = scope.limits.unrelayed / LOOKS;
        loop {
            let (behind, passed, known, since_look) = {
                let Seen { backlogs, looks } = &*self.seen();
                let look = looks[index];
                let since_look = look.at.map(|at| (backlogs.bytes() - at).unsigned_abs());
                (
                    backlogs.behind(index, look.passed),
                    look.passed,
                    backlogs.known(index),
                    since_look,
                )
            };
            match decide(behind, since_look, has_looked, look_after, limit) {
                Step::Look => {
                    has_looked = true;
                    failure = self.look(scope, index, guard).await?;
                }
                Step::Measure => self.measure(scope, index, guard, passed, known).await?,
                Step::Refuse(bytes) => return Err(refused(scope, guard, bytes, limit, failure)),
                Step::Commit if has_looked => {
                    warn(scope, guard, behind, failure);
                    return Ok(());
                }
                Step::Commit => return Ok(()),
            }
        }
    }

    /// Reads the relay's position. Returns the error if that fails, and then keeps the older
    /// position: a relay goes forward, so it is on the safe side.
    async fn look(&self, scope: &Scope, index: usize, guard: &Guard) -> Result<Option<Error>, Error> {
        let passed = guard.passed(scope.server.timeout).await?;
        let mut seen = self.seen();
        let at = seen.backlogs.bytes();
        let look = &mut seen.looks[index];
        look.at = Some(at);
        Ok(match passed {
            Ok(passed) => {
                look.passed = passed;
                None
            }
            Err(error) => Some(error),
        })
    }

    /// Counts the bytes between the relay's position and the place from which on this handle knows
    /// them.
    async fn measure(
        &self,
        scope: &Scope,
        index: usize,
        guard: &Guard,
        passed: Offset,
        known: u64,
    ) -> Result<(), Error> {
        let (server, stream) = (&scope.server, &scope.stream);
        let connection = Arc::new(server.open_connection().await?);
        let first = stream::bounds(server, &connection, stream).await?.first;
        let mut earlier = self.seen().backlogs.earlier();
        let mut next = passed.hi().max(first);
        if next < known {
            let tail = Tail::open(server, &connection, stream, next).await;
            let mut tail = tail.map_err(|error| scope.read_error(error))?;
            while next < known {
                let reading = async { tail.next(usize::MAX).await.map_err(|error| scope.read_error(error)) };
                for delivered in scope.within_limit(reading).await? {
                    next = delivered.offset + 1;
                    if next > known {
                        break;
                    }
                    let bytes = size(delivered.body.len());
                    // An entry that does not apply looks like one that does. That only makes the
                    // backlog look longer.
                    let before = match parse(delivered.body.into()) {
                        Parsed::Entry(Entry::Commit(commit)) => {
                            let sent = commit.change.sent.as_ref();
                            sent.and_then(|sent| sent.ends(delivered.offset, Some(&guard.outbox)))
                        }
                        Parsed::Unreadable(why) => return Err(scope.unreadable(delivered.offset, why)),
                        Parsed::Entry(Entry::Mark(_)) | Parsed::Foreign => None,
                    };
                    earlier.count(bytes, before.map(|(before, _)| before));
                }
            }
        }
        match self.seen().backlogs.prepend(index, passed.hi(), known, &earlier) {
            true => Ok(()),
            false => Err(Error::unavailable(
                scope.on(&format!("measure outbox {} of", guard.outbox)),
                "the changelog was read again in the meantime",
            )),
        }
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Seen {
    /// The bytes at the last looks mean nothing any more.
    fn forget_looks(&mut self) {
        self.looks.iter_mut().for_each(|look| look.at = None);
    }
}

fn ends(fold: &Fold<State>) -> impl Fn(&str) -> Offset {
    |outbox| fold.state.outboxes.end(outbox)
}

/// More than a message takes in the stream.
fn size(body: usize) -> u64 {
    body as u64 + OVERHEAD
}

fn refused(scope: &Scope, guard: &Guard, bytes: u64, limit: u64, failure: Option<Error>) -> Error {
    let Guard { outbox, relay, .. } = guard;
    let older = failure.map_or_else(String::new, |error| {
        format!(". Its position could not be read, so an older one counts: {error}")
    });
    Error::unavailable(
        scope.on("commit of"),
        format!(
            "about {bytes} bytes of the changelog follow the first record of outbox {outbox} that relay {relay} has not \
             passed on, and the limit is {limit}, since the broker removes records that {LENGTH} bytes follow; nothing was \
             published. Start the relay, or mend its destination. Commits go on once it has caught up{older}"
        ),
    )
}

fn warn(scope: &Scope, guard: &Guard, behind: Behind, failure: Option<Error>) {
    let (consumer, outbox, relay) = (&scope.consumer, &guard.outbox, &guard.relay);
    let limit = scope.limits.unrelayed;
    let bytes = match behind {
        Behind::Nothing => 0,
        Behind::Bytes(bytes) | Behind::AtLeast(bytes) => bytes,
    };
    if let Some(error) = failure {
        tracing::warn!(
            %consumer, outbox, %relay, bytes, limit, %error,
            "could not read the position of a guarded outbox's relay; commits go on up to the limit from its last known position"
        );
    } else if bytes > limit / 2 {
        tracing::warn!(
            %consumer, outbox, %relay, bytes, limit,
            "the relay of a guarded outbox is far behind; commits are refused at the limit"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_commit_is_refused_only_after_a_look() {
        const LIMIT: u64 = 1_000;
        let decide = |behind, since, has_looked| decide(behind, since, has_looked, 125, LIMIT);
        for (behind, since, has_looked, step) in [
            // The first commit, and one long after the last look.
            (Behind::Nothing, None, false, Step::Look),
            (Behind::Bytes(1), Some(125), false, Step::Look),
            (Behind::Bytes(1), Some(124), false, Step::Commit),
            (Behind::Bytes(LIMIT), Some(0), false, Step::Commit),
            // The relay may have moved since.
            (Behind::Bytes(LIMIT + 1), Some(0), false, Step::Look),
            (Behind::AtLeast(0), Some(0), false, Step::Look),
            (Behind::AtLeast(LIMIT + 1), Some(0), false, Step::Look),
            (Behind::Nothing, Some(0), true, Step::Commit),
            (Behind::Bytes(LIMIT), Some(0), true, Step::Commit),
            (Behind::Bytes(LIMIT + 1), Some(0), true, Step::Refuse(LIMIT + 1)),
            (Behind::AtLeast(LIMIT), Some(0), true, Step::Measure),
            (Behind::AtLeast(LIMIT + 1), Some(0), true, Step::Refuse(LIMIT + 1)),
            // One look is enough, also a failed one.
            (Behind::Bytes(1), None, true, Step::Commit),
        ] {
            assert_eq!(
                decide(behind, since, has_looked),
                step,
                "{behind:?} {since:?} {has_looked}"
            );
        }
    }
}
