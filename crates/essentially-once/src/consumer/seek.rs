//! Moving a position by hand.

use super::StartAt;
use crate::{Advance, ConsumerId, Error, Log, Offset, OffsetStore, Revision, Transaction};

/// Moves a consumer's position to another place in its log, for an operator who knows why: to handle records again, or to
/// go on after [`Error::Truncated`], [`Error::OutOfRange`] or [`Error::LogChanged`]. Returns where it stands now.
///
/// Going back forgets all producers, since their records must not be dropped as duplicates when they are handled again. A record
/// that was sent twice, once before and once behind the new place, is then handled again as well.
/// A running instance of the consumer is fenced, and goes on from the new position.
///
/// # Errors
/// [`Error::Truncated`] or [`Error::OutOfRange`] if the log holds no such place; [`Error::WrongLog`] if the position belongs to
/// another log; [`Error::Fenced`] if a running instance committed meanwhile: try again. The backend's own errors.
pub async fn seek<S: OffsetStore>(
    consumer: &ConsumerId,
    log: &dyn Log,
    store: &S,
    to: StartAt,
) -> Result<Offset, Error> {
    let position = store.position(consumer).await?;
    let next = resolve(log, to).await?;
    log.read(next).await?;
    let expected = position.as_ref().map_or(Revision::NONE, |position| position.revision);
    // A new epoch, so that nothing that is still under way applies behind it. The owner stays the running instance.
    let mut advance = Advance::new(log.id().clone(), next, expected, expected.fresh_epoch());
    if let Some(position) = position {
        advance.owner = position.owner;
        if next < position.next {
            advance.forgotten = position.windows.into_iter().map(|(numbering, _)| numbering).collect();
        }
    }
    store.begin(consumer).await?.commit(advance).await?;
    tracing::info!(%consumer, log = %log.id(), %next, "moved the position by hand");
    Ok(next)
}

/// The offset that is meant.
pub(super) async fn resolve(log: &dyn Log, at: StartAt) -> Result<Offset, Error> {
    Ok(match at {
        StartAt::Earliest => log.bounds().await?.earliest,
        StartAt::Latest => log.bounds().await?.end,
        StartAt::Offset(offset) => offset,
    })
}
