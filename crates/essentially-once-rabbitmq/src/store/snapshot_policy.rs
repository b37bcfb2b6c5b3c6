//! Decides when to write a snapshot. Retention works by length and ignores snapshots, so they must
//! stay ahead of it.

use std::{
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use essentially_once::Error;
use tokio::sync::{Mutex, OwnedMutexGuard};

use super::{
    image::Image,
    scope::{Scope, nothing_done},
    snapshots::Snapshots,
    state::SharedFold,
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

/// Keeps snapshots ahead of retention, for one reader of the changelog.
pub(super) struct SnapshotPolicy {
    scope: Arc<Scope>,
    snapshots: Arc<Snapshots>,
    fold: SharedFold,
    /// Bytes read, from the snapshot on.
    read: u64,
    cover: Arc<Cover>,
    /// Locked while a snapshot is written. Holds the stream for the next one, if known.
    target: Arc<Mutex<Option<usize>>>,
}

/// What snapshots cover, in terms of [`SnapshotPolicy::read`].
#[derive(Default)]
struct Cover {
    complete: AtomicU64,
    tried: AtomicU64,
}

impl SnapshotPolicy {
    /// The next snapshot goes to the stream `target`.
    pub(super) fn new(scope: &Arc<Scope>, snapshots: &Arc<Snapshots>, fold: &SharedFold, target: usize) -> Self {
        Self {
            scope: Arc::clone(scope),
            snapshots: Arc::clone(snapshots),
            fold: fold.clone(),
            read: 0,
            cover: Arc::default(),
            target: Arc::new(Mutex::new(Some(target))),
        }
    }

    /// Counts a message that was read.
    pub(super) fn count(&mut self, bytes: usize) {
        self.read += bytes as u64 + OVERHEAD;
    }

    /// Whether this many bytes may be published before there is a newer snapshot.
    pub(super) fn has_room(&self, bytes: usize) -> bool {
        let covered = self.cover.complete.load(Ordering::Relaxed);
        self.read + bytes as u64 + OVERHEAD <= covered + UNCOVERED
    }

    /// Makes sure that retention cannot remove entries that no snapshot covers.
    pub(super) async fn make_room(&self, bytes: usize) -> Result<(), Error> {
        if self.has_room(bytes) {
            return Ok(());
        }
        let target = Arc::clone(&self.target).lock_owned().await;
        // A snapshot that was in progress may have made room.
        if self.has_room(bytes) {
            return Ok(());
        }
        self.write(target).await.map_err(nothing_done)
    }

    pub(super) async fn write_now(&self) -> Result<(), Error> {
        let target = Arc::clone(&self.target).lock_owned().await;
        self.write(target).await.map_err(nothing_done)
    }

    /// Writes a snapshot in the background if enough was read since the last one.
    pub(super) fn write_if_due(&self) {
        let complete = self.cover.complete.load(Ordering::Relaxed);
        let last = complete.max(self.cover.tried.load(Ordering::Relaxed));
        // A large state is written less often, so that snapshots do not take more than commits.
        let size = self.fold.read().size() as u64;
        let due = self.scope.limits.snapshot_after.max(size).min(UNCOVERED / 2);
        if self.read - last < due {
            return;
        }
        if let Ok(target) = Arc::clone(&self.target).try_lock_owned() {
            let (stream, writing) = (self.scope.stream.clone(), self.write(target));
            tokio::spawn(async move {
                if let Err(error) = writing.await {
                    tracing::warn!(stream, %error, "could not write a snapshot; it will be tried again");
                }
            });
        }
    }

    /// Writes the current fold.
    fn write(&self, mut target: OwnedMutexGuard<Option<usize>>) -> impl Future<Output = Result<(), Error>> + use<> {
        let (fold, mark) = (self.fold.clone(), self.read);
        let action = self.scope.on("write a snapshot of");
        let (snapshots, cover) = (Arc::clone(&self.snapshots), Arc::clone(&self.cover));
        cover.tried.store(mark, Ordering::Relaxed);
        async move {
            // A large state takes a while to copy, so this must not block the runtime. The copy may
            // include later entries, which does no harm.
            let copied = tokio::task::spawn_blocking(move || {
                let copy = fold.read().clone();
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
