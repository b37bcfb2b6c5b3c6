//! One session: from loading the stored position to the first failure.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tokio_util::sync::CancellationToken;

use super::{Delivery, Report, Settings, read_ahead::ReadAhead, report::Telemetry, seek::resolve};
use crate::{
    Advance, ConsumerId, Durability, Error, Handler, HandlerError, Log, LogReader, Offset, OffsetStore, Position,
    Record, Transaction, rt, window::Windows,
};

/// How often a running consumer looks for producers to forget.
const FORGET_EVERY: Duration = Duration::from_secs(60 * 60);

/// Why a session ended early.
#[derive(Debug)]
pub enum Failure {
    Backend(Error),
    Record(FailedRecord),
}

/// A record that could not be handled.
#[derive(Debug)]
pub struct FailedRecord {
    pub(super) offset: Offset,
    pub(super) error: HandlerError,
    /// Whether everything before it is committed.
    pub(super) is_first: bool,
    /// What to say of it if the error is fatal.
    pub(super) fatal_outcome: &'static str,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Backend(error)
    }
}

/// What a session works with. All that it learns is dropped with it: only the stored position outlives a failure.
pub struct Session<'a, S> {
    pub(super) id: &'a ConsumerId,
    pub(super) log: &'a Arc<dyn Log>,
    pub(super) store: &'a S,
    pub(super) settings: &'a Settings,
    pub(super) stop: &'a CancellationToken,
    pub(super) telemetry: &'a Telemetry,
    pub(super) report: &'a mut Report,
    /// The record that failed last, to be handled in a batch of its own.
    pub(super) alone: Option<Offset>,
    pub(super) revision: u64,
    pub(super) next: Offset,
    pub(super) windows: Windows,
}

impl<S: OffsetStore> Session<'_, S> {
    /// Runs until `stop`, or until the position reaches `until`, which is set to the log's end if it is still `None`.
    pub(super) async fn run<H: Handler<D::Tx>, D: Delivery<S>>(
        mut self,
        handler: &mut H,
        until: Option<&mut Option<Offset>>,
    ) -> Result<(), Failure> {
        if D::NEEDS_DURABILITY && !self.settings.accept_volatile {
            self.check_durability().await?;
        }
        let until = match until {
            Some(Some(until)) => Some(*until),
            Some(unset) => Some(*unset.insert(self.log.bounds().await?.end)),
            None => None,
        };
        let mut ahead = ReadAhead::spawn(
            self.load().await?,
            self.settings
                .read_ahead_records
                .unwrap_or_else(|| self.settings.max_batch.saturating_mul(16).max(8_192)),
            self.settings.read_ahead_bytes,
        );
        let yields = rt::has_one_thread();
        let mut looked_for_unseen: Option<Instant> = None;
        while until.is_none_or(|until| self.next < until) {
            let batch = tokio::select! {
                biased;
                () = self.stop.cancelled() => break,
                batch = ahead.take(self.settings.max_batch, self.alone) => batch?,
            };
            D::deliver(&mut self, handler, &batch).await?;
            // A backend may never make the loop wait, and on a runtime of one thread other tasks want their turn.
            if yields {
                rt::yield_now().await;
            }
            if looked_for_unseen.is_none_or(|last| last.elapsed() > FORGET_EVERY) {
                looked_for_unseen = Some(Instant::now());
                self.forget_unseen(&batch).await?;
            }
        }
        Ok(())
    }

    async fn check_durability(&self) -> Result<(), Error> {
        let parts = [
            (format!("log {}", self.log.id()), self.log.durability().await?),
            (
                format!("the store of consumer {}", self.id),
                self.store.durability().await?,
            ),
        ];
        for (what, durability) in parts {
            match durability {
                Durability::Durable => {}
                Durability::Volatile(why) => return Err(Error::Volatile { what, why }),
                Durability::Unknown(why) => tracing::warn!(%what, %why, "durability is unknown"),
            }
        }
        Ok(())
    }

    /// Loads the stored position and opens a reader there.
    async fn load(&mut self) -> Result<Box<dyn LogReader>, Error> {
        let Some(position) = self.store.position(self.id).await? else {
            return self.load_first().await;
        };
        if !position.log.is_same_log(self.log.id()) {
            return Err(Error::WrongLog {
                consumer: self.id.clone(),
                stored: position.log,
                given: self.log.id().clone(),
            });
        }
        let Position {
            next,
            revision,
            windows,
            ..
        } = position;
        tracing::debug!(%next, revision, "loaded the position");
        self.next = next;
        self.revision = revision;
        self.windows = Windows::new(windows);
        self.report.next = Some(next);
        self.log.read(next).await
    }

    /// Opens a reader where the settings say, and then commits that place as the first position.
    async fn load_first(&mut self) -> Result<Box<dyn LogReader>, Error> {
        let next = resolve(self.log, self.settings.start_at).await?;
        let reader = self.log.read(next).await?;
        let tx = self.begin().await?;
        self.commit(tx, next).await?;
        Ok(reader)
    }

    async fn forget_unseen(&mut self, batch: &[Record]) -> Result<(), Error> {
        if let Some(last) = batch.last()
            && !self.windows.is_empty()
        {
            let bounds = self.log.bounds().await?;
            self.windows
                .forget_unseen(self.settings.forget_producers_after, last.appended_at, bounds);
        }
        Ok(())
    }

    pub(super) async fn begin(&self) -> Result<S::Tx, Error> {
        self.store.begin(self.id).await
    }

    /// Begins a transaction, unless the consumer is stopped while it waits for one.
    pub(super) async fn begin_unless_stopped(&self) -> Result<Option<S::Tx>, Error> {
        tokio::select! {
            biased;
            () = self.stop.cancelled() => Ok(None),
            tx = self.begin() => tx.map(Some),
        }
    }

    /// Fails if another instance committed since the position was loaded. What a handler said of a record then counts for
    /// nothing: it may have judged by the other's effects.
    pub(super) async fn check_current(&self) -> Result<(), Error> {
        let stored = self.store.position(self.id).await?;
        match stored.map_or(0, |position| position.revision) {
            revision if revision == self.revision => Ok(()),
            _ => Err(Error::Fenced {
                consumer: self.id.clone(),
                expected: self.revision,
            }),
        }
    }

    /// Drops a record that was seen before; says so, and aloud where it is not certain.
    pub(super) fn drop_duplicate(&mut self, record: &Record) {
        if self.windows.is_below(record) {
            tracing::warn!(
                offset = %record.offset,
                origin = ?record.origin,
                "dropped as a duplicate: more than a window below the highest sequence; a producer that numbers anew needs a new id"
            );
        } else {
            tracing::debug!(offset = %record.offset, origin = ?record.origin, "dropped a duplicate");
        }
        self.windows.mark(record);
    }

    pub(super) async fn commit(&mut self, tx: S::Tx, next: Offset) -> Result<(), Error> {
        let (windows, forgotten) = self.windows.take_changes();
        let advance = Advance {
            log: self.log.id().clone(),
            next,
            expected_revision: self.revision,
            windows,
            forgotten,
        };
        let started = Instant::now();
        tx.commit(advance).await?;
        self.revision += 1;
        self.next = next;
        self.report.next = Some(next);
        self.report.commits += 1;
        self.telemetry.committed(started.elapsed());
        tracing::trace!(%next, revision = self.revision, "committed");
        Ok(())
    }

    /// Counts what a batch came to.
    pub(super) fn count(&mut self, done: Done, batch: &[Record]) {
        self.report.handled += done.handled;
        self.report.duplicates += done.duplicates;
        self.report.failed += done.failed;
        self.telemetry.handled.increment(done.handled);
        self.telemetry.duplicates.increment(done.duplicates);
        self.telemetry.failed.increment(done.failed);
        if let Some(oldest) = batch.first() {
            self.telemetry.lag(oldest);
        }
    }
}

/// What a batch came to.
#[derive(Default)]
pub(super) struct Done {
    pub(super) handled: u64,
    pub(super) duplicates: u64,
    pub(super) failed: u64,
}
