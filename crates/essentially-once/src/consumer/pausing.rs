//! Pausing a consumer by hand.

use async_trait::async_trait;

use super::{
    failure::Failure,
    session::Session,
    verbs::{Change, PATIENCE, change},
};
use crate::{
    Advance, ConsumerId, Error, OffsetStore, Operator, Position, Pulse, consumer::OperatorAction,
    journal::JournalEntry, note::InHand,
};

/// Pauses a consumer: all its instances stop handling records and dead letters until [`resume`],
/// also those that start later. A running instance rolls back what it has not committed, and waits.
/// Under at-least-once it has nothing to roll back, and handles what it had in hand again later. On
/// a store that locks, such as SQLite, this waits for the transaction of a running instance first.
///
/// A [`run_until_caught_up`](super::Consumer::run_until_caught_up) of a paused consumer fails. The
/// other operators' functions work on a paused consumer too, and nothing commits in between.
///
/// # Errors
/// - [`Error::Failed`] if the consumer has no position, or is paused already.
/// - [`Error::Fenced`] if a running instance kept committing first for 30 seconds.
/// - The backend's own errors. [`Error::Indeterminate`] if the outcome is not known.
///
/// # Examples
/// ```
/// use essentially_once::consumer::{Operator, pause, resume};
/// # use essentially_once::memory::{Memory, MemoryTx};
/// # use essentially_once::{Consumer, ConsumerId, Log, NewRecord, Record, handler_fn};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), essentially_once::Error> {
/// # let memory = Memory::new();
/// # let (log, store) = (memory.log("orders")?, memory.store());
/// # log.append(&[NewRecord::new("10248")]).await?;
/// # let shipping = ConsumerId::new("shipping")?;
/// # let run = || {
/// #     let ship = handler_fn(|_: &Record, _: &mut MemoryTx| Box::pin(async { Ok(()) }));
/// #     Consumer::essentially_once(shipping.clone(), log.clone(), store.clone(), ship)
/// #         .accept_volatile()
/// #         .run_until_caught_up()
/// # };
/// # run().await?;
/// let ann = Operator::new("ann").because("the carrier's service is down");
/// pause(&shipping, &store, &ann).await?;
/// assert!(run().await.is_err_and(|error| error.to_string().contains("carrier")));
/// resume(&shipping, &store, &ann).await?;
/// run().await?;
/// # Ok(())
/// # }
/// ```
pub async fn pause<S: OffsetStore>(consumer: &ConsumerId, store: &S, by: &Operator) -> Result<(), Error> {
    let pause = Pausing {
        consumer,
        action: OperatorAction::Pause,
    };
    change(consumer, store, &pause, by, PATIENCE).await.map(|_| ())
}

/// Lets a paused consumer continue at its position.
///
/// # Errors
/// [`Error::Failed`] if the consumer is not paused, and as for [`pause`] otherwise.
pub async fn resume<S: OffsetStore>(consumer: &ConsumerId, store: &S, by: &Operator) -> Result<(), Error> {
    let resume = Pausing {
        consumer,
        action: OperatorAction::Resume,
    };
    change(consumer, store, &resume, by, PATIENCE).await.map(|_| ())
}

/// Pauses or resumes.
struct Pausing<'a> {
    consumer: &'a ConsumerId,
    action: OperatorAction,
}

#[async_trait]
impl<Tx: Send> Change<Tx> for Pausing<'_> {
    async fn stage(
        &self,
        _: &mut Tx,
        position: &Position,
        advance: &mut Advance,
    ) -> Result<Option<OperatorAction>, Error> {
        match (self.action, position.journal.paused()) {
            (OperatorAction::Pause, Some(paused)) => Err(Error::failed(
                format!("pause consumer {}", self.consumer),
                format!("it is paused already, {}", by_whom(paused)),
            )),
            (OperatorAction::Resume, None) => Err(Error::failed(
                format!("resume consumer {}", self.consumer),
                "it is not paused",
            )),
            (action, _) => {
                if action == OperatorAction::Resume {
                    // What the records died of may be mended.
                    advance.note = advance.note.with_in_hand(InHand::default());
                }
                Ok(Some(action))
            }
        }
    }
}

impl<S: OffsetStore> Session<'_, S> {
    /// Waits while the consumer is paused at this position. A run that is to catch up fails.
    pub(super) async fn wait_while_paused(
        &mut self,
        position: &Position,
        paused: &JournalEntry,
        is_catching_up: bool,
    ) -> Result<(), Failure> {
        self.run.end_reading().await;
        if is_catching_up {
            return Err(Failure::Backend(Error::failed(
                format!("run consumer {} of log {}", self.id, self.log.id()),
                format!("it is paused, {}; `resume` it first", by_whom(paused)),
            )));
        }
        tracing::warn!(
            by = paused.by,
            reason = paused.reason,
            "this consumer is paused; waiting"
        );
        self.heart.rest();
        let _paused = self.telemetry.pause();
        self.run.last_sign = None;
        let mut pulse = Pulse::new(Some(position), 0);
        while pulse.revision == position.revision {
            pulse = self.unless_stopped(self.watch(&pulse)).await?;
        }
        self.heart.work();
        Ok(())
    }
}

fn by_whom(entry: &JournalEntry) -> String {
    match &*entry.reason {
        "" => format!("by {:?}", entry.by),
        // A message is one line, whatever the operator typed.
        reason => format!("by {:?}: {}", entry.by, reason.replace(char::is_control, " ")),
    }
}
