//! A lane has at most one append in flight.

use std::sync::Arc;

use super::{batch::Batch, queue::Queue, settings::Settings};
use crate::{Error, Log, backoff::Backoff};

/// Takes one batch after the other and appends it until the log has confirmed or refused it.
pub(super) struct Lane {
    log: Arc<dyn Log>,
    backoff: Backoff,
    /// Dropped behind the log, so that a closed producer no longer holds it.
    end: End,
}

/// Reports the end of the lane, also if its runtime ends or the log panics.
struct End(Arc<Queue>);

impl Drop for End {
    fn drop(&mut self) {
        self.0.lane_ended();
    }
}

impl Lane {
    pub(super) fn new(log: Arc<dyn Log>, queue: Arc<Queue>, settings: &Settings) -> Self {
        Self {
            log,
            backoff: settings.backoff,
            end: End(queue),
        }
    }

    pub(super) async fn run(self) {
        while let Some(batch) = self.end.0.next_batch().await {
            self.send(batch).await;
        }
    }

    /// Bisects a batch that is refused, so that only the culprits fail. The parts are appended in
    /// order, each one after the one before it is confirmed or has failed.
    async fn send(&self, batch: Batch) {
        let mut parts = vec![batch];
        while let Some(mut part) = parts.pop() {
            match self.append(&mut part).await {
                Some(Ok(())) => part.confirm(),
                Some(Err(error)) => {
                    if let Some((first, second)) = part.refused(error) {
                        parts.extend(second);
                        parts.push(first);
                    }
                }
                None => {}
            }
        }
    }

    /// Appends until the log confirms or refuses. A failed append may have appended any prefix, so
    /// the whole batch is appended again. Returns `None` if all its records were given up.
    async fn append(&self, batch: &mut Batch) -> Option<Result<(), Error>> {
        let mut pauses = self.backoff.pauses();
        loop {
            let error = match batch.append(&*self.log).await? {
                Err(error @ (Error::Indeterminate { .. } | Error::Unavailable { .. })) => error,
                result => return Some(result),
            };
            let pause = pauses.next().unwrap_or_default();
            let records = batch.len();
            tracing::warn!(%error, records, ?pause, "appending the same records again");
            batch.pause(pause, error).await;
            self.end.0.telemetry.resent(batch.len());
        }
    }
}
