//! Decides when to write a snapshot. Retention works by length and ignores snapshots, so they must
//! stay ahead of it.

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

/// The bytes that the broker keeps at least, except for a segment. It does not know which entries
/// are still needed, so the last `LENGTH` bytes must always suffice; see [`UNCOVERED`].
pub(super) const LENGTH: u64 = 512 * MIB;
pub(super) const SEGMENT: u64 = 16 * MIB;

/// How much may follow the newest snapshot. Beyond it, nothing is published before there is a newer
/// one. The difference to `LENGTH` is room for entries that other writers publish in the meantime:
/// ten of the largest.
const UNCOVERED: u64 = 128 * MIB;

/// More than a message takes in the stream besides its body: its own chunk, names, properties.
pub(super) const OVERHEAD: u64 = 1024;

/// What snapshots cover, in terms of [`Replica::read`].
#[derive(Default)]
pub(super) struct Cover {
    complete: AtomicU64,
    tried: AtomicU64,
}

impl Replica {
    /// Whether this many bytes may be published before there is a newer snapshot.
    pub(super) fn has_room(&self, bytes: usize) -> bool {
        let covered = self.cover.complete.load(Ordering::Relaxed);
        self.read + bytes as u64 + OVERHEAD <= covered + UNCOVERED
    }
}

impl Changelog {
    /// Makes sure that retention cannot remove entries that no snapshot covers.
    pub(super) async fn make_room(&self, replica: &mut Replica, bytes: usize) -> Result<(), Error> {
        if replica.has_room(bytes) {
            return Ok(());
        }
        let target = Arc::clone(&replica.target).lock_owned().await;
        // A snapshot that was in progress may have made room.
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
        // A large state is written less often, so that snapshots do not take more than commits.
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
                    tracing::warn!(stream, %error, "could not write a snapshot; it will be tried again");
                }
            });
        }
    }

    /// Writes the current fold.
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
            // A large state takes a while to copy, so this must not block the runtime. The copy may
            // include later entries, which does no harm.
            let copied = tokio::task::spawn_blocking(move || {
                let copy = fold.read().unwrap_or_else(PoisonError::into_inner).clone();
                Image::new(&copy)
            });
            let image = copied.await.map_err(|error| Error::unavailable(action, error))?;
            // Taken, so that the next snapshot after a failure looks again. Another process may
            // have written one in the meantime.
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
