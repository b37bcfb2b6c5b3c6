//! The records of one append.

use std::{collections::VecDeque, mem, sync::Arc, time::Duration};

use super::queue::{Queue, Receipt, TASK_ENDED, doubtful};
use crate::{Error, Log, NewRecord, error::Source, rt};

/// Records that a lane has taken, in order. Dropping this says of those that are left that they
/// were not confirmed.
pub(super) struct Batch {
    queue: Arc<Queue>,
    records: Vec<NewRecord>,
    /// Those of the last records. The records before them were given up.
    receipts: VecDeque<Receipt>,
    /// Whether some of the records may be in the log: a reply was lost, or is awaited.
    in_doubt: bool,
    /// Why the records must be appended again.
    last_error: Option<Arc<Error>>,
}

impl Batch {
    pub(super) const fn new(queue: Arc<Queue>, records: Vec<NewRecord>, receipts: VecDeque<Receipt>) -> Self {
        Self {
            queue,
            records,
            receipts,
            in_doubt: false,
            last_error: None,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.receipts.len()
    }

    /// Appends once. Returns `None` if all records were given up before the log answered.
    pub(super) async fn append(&mut self, log: &dyn Log) -> Option<Result<(), Error>> {
        // An append that is begun leaves doubt, so records whose time is over are given up before.
        let cause = not_confirmed(self.last_error.as_ref());
        self.queue.give_up_due(&mut self.receipts, self.in_doubt, cause);
        self.records.drain(..self.records.len() - self.receipts.len());
        // A definite failure says nothing about the appends before it.
        let was_in_doubt = mem::replace(&mut self.in_doubt, true);
        let append = log.append(&self.records);
        let no_answer = || "the log has not answered".into();
        let result = self
            .queue
            .giving_up(&mut self.receipts, true, no_answer, append)
            .await?;
        self.in_doubt = was_in_doubt || matches!(result, Err(Error::Indeterminate { .. }));
        Some(result.map(drop))
    }

    /// Waits before the records are appended again. Gives up on those whose time is over meanwhile.
    pub(super) async fn pause(&mut self, pause: Duration, error: Error) {
        self.last_error = Some(Arc::new(error));
        let cause = not_confirmed(self.last_error.as_ref());
        let pause = rt::sleep(pause);
        self.queue
            .giving_up(&mut self.receipts, self.in_doubt, cause, pause)
            .await;
    }

    pub(super) fn confirm(mut self) {
        let receipts = mem::take(&mut self.receipts);
        self.queue
            .resolve(receipts.into_iter().map(|receipt| (receipt, Ok(()))));
    }

    /// What to append instead of a batch that the log has refused: its first half, then its second
    /// half. A record that was refused alone fails with the error.
    pub(super) fn refused(mut self, error: Error) -> Option<(Self, Option<Self>)> {
        if self.records.len() > 1 {
            let rest = self.split_off(self.len().div_ceil(2));
            return Some((self, rest));
        }
        if let Some(receipt) = self.receipts.pop_front() {
            let error = match self.in_doubt {
                true => Error::indeterminate(self.queue.action(receipt.sequence), error),
                false => error,
            };
            self.queue.resolve([(receipt, Err(error))]);
        }
        None
    }

    fn split_off(&mut self, at: usize) -> Option<Self> {
        let given_up = self.records.len() - self.receipts.len();
        let rest = Self {
            queue: Arc::clone(&self.queue),
            records: self.records.split_off(given_up + at),
            receipts: self.receipts.split_off(at),
            in_doubt: self.in_doubt,
            last_error: self.last_error.clone(),
        };
        (rest.len() > 0).then_some(rest)
    }
}

/// Why records whose time is over were not confirmed.
fn not_confirmed(last_error: Option<&Arc<Error>>) -> impl Fn() -> Source {
    move || match last_error {
        Some(error) => Arc::clone(error).into(),
        None => "it waited behind other records".into(),
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        let left = mem::take(&mut self.receipts);
        let (queue, in_doubt) = (&self.queue, self.in_doubt);
        queue.resolve(left.into_iter().map(|receipt| {
            let error = doubtful(queue.action(receipt.sequence), in_doubt, TASK_ENDED.into());
            (receipt, Err(error))
        }));
    }
}
