//! Keeping what is needed: retention works by length and knows nothing of snapshots, so snapshots must keep ahead of it.

use std::sync::{
    Arc, PoisonError,
    atomic::{AtomicU64, Ordering},
};

use essentially_once::Error;
use tokio::sync::OwnedMutexGuard;

use super::{
    changelog::{Changelog, Replica, nothing_done},
    snapshot::Image,
};

const MIB: u64 = 1024 * 1024;

/// What the broker keeps at least, but for a segment. It is never told which entries are not needed any more, so it must
/// be certain that those of the last `LENGTH` bytes suffice: see [`UNCOVERED`].
pub(super) const LENGTH: u64 = 512 * MIB;
pub(super) const SEGMENT: u64 = 16 * MIB;

/// How much may follow the newest snapshot. Beyond it nothing is published before there is a newer one. Between this and `LENGTH`
/// is room for what other writers publish in the meantime: ten of the largest entries.
const UNCOVERED: u64 = 128 * MIB;

/// More than a message takes in the stream besides its body: a chunk of its own, names, properties.
pub(super) const OVERHEAD: u64 = 1024;

/// What snapshots cover, in terms of [`Replica::read`].
#[derive(Default)]
pub(super) struct Cover {
    complete: AtomicU64,
    tried: AtomicU64,
}

impl Replica {
    /// Whether so much may be published before there is a newer snapshot.
    pub(super) fn has_room(&self, bytes: usize) -> bool {
        let covered = self.cover.complete.load(Ordering::Relaxed);
        self.read + bytes as u64 + OVERHEAD <= covered + UNCOVERED
    }
}

impl Changelog {
    /// Sees to it that retention cannot remove what no snapshot covers.
    pub(super) async fn make_room(&self, replica: &mut Replica, bytes: usize) -> Result<(), Error> {
        if replica.has_room(bytes) {
            return Ok(());
        }
        let target = Arc::clone(&replica.target).lock_owned().await;
        // One that was under way may have done it.
        if replica.has_room(bytes) {
            return Ok(());
        }
        self.snapshot(replica, target).await.map_err(nothing_done)
    }

    pub(super) async fn snapshot_now(&self) -> Result<(), Error> {
        let mut slot = self.replica().await?;
        let replica = self.loaded(&mut slot).await?;
        let target = Arc::clone(&replica.target).lock_owned().await;
        self.snapshot(replica, target).await.map_err(nothing_done)
    }

    pub(super) fn snapshot_if_due(&self, replica: &Replica) {
        let cover = &replica.cover;
        let last = cover
            .complete
            .load(Ordering::Relaxed)
            .max(cover.tried.load(Ordering::Relaxed));
        // A large state is written less often, so that snapshots do not take more than commits do.
        let due = self
            .limits
            .snapshot_after
            .max(self.fold().state.size() as u64)
            .min(UNCOVERED / 2);
        if replica.read - last < due {
            return;
        }
        if let Ok(target) = Arc::clone(&replica.target).try_lock_owned() {
            let (stream, snapshot) = (self.stream.clone(), self.snapshot(replica, target));
            tokio::spawn(async move {
                if let Err(error) = snapshot.await {
                    tracing::warn!(stream, %error, "no snapshot was written; it will be tried again");
                }
            });
        }
    }

    /// Writes what is folded now.
    fn snapshot(
        &self,
        replica: &Replica,
        mut target: OwnedMutexGuard<Option<usize>>,
    ) -> impl Future<Output = Result<(), Error>> + use<> {
        let (fold, mark) = (Arc::clone(&self.fold), replica.read);
        let action = self.on("write a snapshot of");
        let (snapshots, cover) = (Arc::clone(&self.snapshots), Arc::clone(&replica.cover));
        cover.tried.store(mark, Ordering::Relaxed);
        async move {
            // Not on the runtime's threads: a large state takes a while. What is read meanwhile may be in it, which
            // does no harm.
            let copied = tokio::task::spawn_blocking(move || {
                let copy = fold.read().unwrap_or_else(PoisonError::into_inner).clone();
                Image::new(&copy)
            });
            let image = copied.await.map_err(|error| Error::unavailable(action, error))?;
            // Taken, so that after a failure the next one looks again: another process may have written in the meantime.
            let stream = match target.take() {
                Some(stream) => stream,
                None => snapshots.find().await?.map_or(0, |found| 1 - found.stream),
            };
            snapshots.write(stream, &image).await?;
            tracing::debug!(offset = image.offset, bytes = image.size(), "wrote a snapshot");
            cover.complete.store(mark, Ordering::Relaxed);
            *target = Some(1 - stream);
            Ok(())
        }
    }
}
