//! How operators' functions commit, in the name of the consumer.

use std::time::Duration;

use async_trait::async_trait;

use crate::{
    Advance, ConsumerId, Error, OffsetStore, Operator, Position, Transaction,
    consumer::OperatorAction,
    rt::{self, Instant},
};

/// For how long a change is tried if a running instance keeps committing first.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);

/// A change that leaves the position where it is.
#[async_trait]
pub(super) trait Change<Tx>: Sync {
    /// Whether it continues the operator's last change, which took several commits.
    fn continues(&self) -> bool {
        false
    }

    /// Stages the change, and says what to write into the journal; `None` if nothing is left to
    /// change. It may also change the advance, which moves nothing so far.
    async fn stage(
        &self,
        tx: &mut Tx,
        position: &Position,
        advance: &mut Advance,
    ) -> Result<Option<OperatorAction>, Error>;
}

/// Commits a change, with the position where it is. A new epoch fences every instance whose
/// knowledge is thereby out of date.
///
/// The position is read after the transaction began, since a store that locks then keeps a busy
/// instance from committing in between, and before everything else, since that must not be older.
pub(super) async fn change<S: OffsetStore>(
    consumer: &ConsumerId,
    store: &S,
    change: &dyn Change<S::Tx>,
    by: &Operator,
    patience: Duration,
) -> Result<Option<OperatorAction>, Error> {
    let started = Instant::now();
    loop {
        let mut tx = store.begin(consumer).await?;
        let Some(position) = store.position(consumer).await? else {
            tx.rollback().await?;
            return Err(no_position(consumer));
        };
        let mut advance = unmoved(&position);
        let action = match change.stage(&mut tx, &position, &mut advance).await {
            Ok(Some(action)) => action,
            nothing => {
                tx.rollback().await?;
                return nothing;
            }
        };
        advance.journal = Some(match change.continues() {
            true => position.journal.continued(by, action),
            false => position.journal.with(by, action),
        });
        match tx.commit(advance).await {
            Err(Error::Fenced { .. }) if started.elapsed() < patience => rt::yield_now().await,
            committed => {
                committed?;
                tracing::info!(%consumer, by = by.name(), ?action, "changed by hand");
                return Ok(Some(action));
            }
        }
    }
}

/// Finds out whether a change would be refused, without making it.
pub(super) async fn try_out<S: OffsetStore>(
    consumer: &ConsumerId,
    store: &S,
    change: &dyn Change<S::Tx>,
) -> Result<(), Error> {
    let mut tx = store.begin(consumer).await?;
    let tried = match store.position(consumer).await? {
        Some(position) => change
            .stage(&mut tx, &position, &mut unmoved(&position))
            .await
            .map(|_| ()),
        None => Err(no_position(consumer)),
    };
    tx.rollback().await?;
    tried
}

fn no_position(consumer: &ConsumerId) -> Error {
    Error::failed(
        format!("change consumer {consumer} by hand"),
        "it has no position, so it never ran with this store; check its name",
    )
}

/// An advance that changes nothing but the revision.
pub(super) fn unmoved(position: &Position) -> Advance {
    let expected = position.revision;
    let mut advance = Advance::new(position.log.clone(), position.next, expected, expected.fresh_epoch());
    advance.owner = position.owner;
    advance.note = position.note.clone();
    advance
}
