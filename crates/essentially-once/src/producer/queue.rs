//! The records of a producer that are neither confirmed nor failed.

use std::{
    collections::{BTreeSet, VecDeque},
    mem,
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::sync::{Notify, Semaphore, oneshot};

use super::{
    batch::Batch,
    report::{Report, Telemetry},
    sender::Sent,
    settings::Settings,
};
use crate::{Error, LogId, NewRecord, Numbering, Origin, Window, error::Source, rt};

/// Connects the senders with the lanes, which append.
pub(super) struct Queue {
    pub(super) numbering: Numbering,
    pub(super) log: LogId,
    pub(super) telemetry: Telemetry,
    max_batch: usize,
    max_batch_bytes: usize,
    max_bytes: usize,
    give_up_after: Option<Duration>,
    state: Mutex<State>,
    /// Room for records, and for their bytes.
    records: Semaphore,
    bytes: Semaphore,
    /// Wakes idle lanes: a record was queued, the window moved, or the queue was closed.
    filled: Notify,
    /// Wakes whoever flushes or closes.
    resolved: Notify,
}

struct State {
    waiting: VecDeque<Waiting>,
    /// The sequences that lanes have taken and that are not resolved. While lanes run, at most
    /// [`Window::SIZE`], since no lane takes a record beyond that span.
    in_flight: BTreeSet<u64>,
    next_sequence: u64,
    is_closed: bool,
    lanes: usize,
    report: Report,
}

struct Waiting {
    record: NewRecord,
    receipt: Receipt,
}

/// What the producer owes the sender of one record.
pub(super) struct Receipt {
    pub(super) sequence: u64,
    /// How many permits for bytes the record holds.
    bytes: usize,
    deadline: Option<rt::Instant>,
    reply: oneshot::Sender<Result<(), Error>>,
}

impl Queue {
    pub(super) fn new(numbering: Numbering, log: LogId, settings: &Settings) -> Self {
        let state = State {
            waiting: VecDeque::new(),
            in_flight: BTreeSet::new(),
            next_sequence: 1,
            is_closed: false,
            lanes: settings.depth,
            report: Report::default(),
        };
        Self {
            telemetry: Telemetry::new(&numbering, &log),
            numbering,
            log,
            max_batch: settings.max_batch(),
            max_batch_bytes: settings.max_batch_bytes,
            max_bytes: settings.queue_bytes,
            give_up_after: settings.give_up_after,
            state: Mutex::new(state),
            records: Semaphore::new(settings.queue_records),
            bytes: Semaphore::new(settings.queue_bytes),
            filled: Notify::new(),
            resolved: Notify::new(),
        }
    }

    /// A panic while the lock is held leaves no partial change, so poisoning is ignored.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for room, then numbers the record and queues it. Nothing is awaited after that.
    pub(super) async fn push(&self, record: NewRecord) -> Result<Sent, Error> {
        if let Some(origin) = &record.origin {
            return Err(self.refusal(format!(
                "the record already has the origin {origin}; send it without an origin, or append it to the log yourself"
            )));
        }
        let closed = || self.refusal("the producer is closed; start another one".into());
        // A record that is larger than the queue waits until the queue is empty.
        let bytes = record.size().min(self.max_bytes);
        let permits = u32::try_from(bytes).unwrap_or(u32::MAX);
        let slot = self.records.acquire().await.map_err(|_| closed())?;
        let room = self.bytes.acquire_many(permits).await.map_err(|_| closed())?;

        let (reply, result) = oneshot::channel();
        let origin = {
            let mut state = self.lock();
            if state.is_closed {
                return Err(closed());
            }
            let sequence = state.next_sequence;
            state.next_sequence += 1;
            let origin = Origin::of(self.numbering.clone(), sequence);
            let now = rt::Instant::now();
            let receipt = Receipt {
                sequence,
                bytes,
                deadline: self.give_up_after.and_then(|limit| now.checked_add(limit)),
                reply,
            };
            let record = record.origin(origin.clone());
            state.waiting.push_back(Waiting { record, receipt });
            self.telemetry.queued();
            origin
        };
        // `resolve` returns the permits.
        slot.forget();
        room.forget();
        self.filled.notify_waiters();
        Ok(Sent::new(origin, result))
    }

    /// Waits for records and takes as many as one append may have. Returns `None` once the queue is
    /// closed and empty.
    pub(super) async fn next_batch(self: &Arc<Self>) -> Option<Batch> {
        loop {
            let filled = self.filled.notified();
            let (taken, is_over) = {
                let mut state = self.lock();
                let taken = state.take(self.max_batch, self.max_batch_bytes);
                (taken, state.is_closed && state.waiting.is_empty())
            };
            match taken {
                Some((records, receipts)) => return Some(Batch::new(Arc::clone(self), records, receipts)),
                None if is_over => return None,
                None => filled.await,
            }
        }
    }

    /// The result of `future`. Gives up on the records whose time is over meanwhile, and returns
    /// `None` once none is left.
    pub(super) async fn giving_up<T>(
        &self,
        receipts: &mut VecDeque<Receipt>,
        in_doubt: bool,
        cause: impl Fn() -> Source,
        future: impl Future<Output = T>,
    ) -> Option<T> {
        let mut future = pin!(future);
        loop {
            let left = receipts.front()?.time_left();
            if let Some(result) = rt::within(left, &mut future).await {
                return Some(result);
            }
            self.give_up_due(receipts, in_doubt, &cause);
        }
    }

    /// Gives up on the records whose time is over.
    pub(super) fn give_up_due(&self, receipts: &mut VecDeque<Receipt>, in_doubt: bool, cause: impl Fn() -> Source) {
        let mut due = Vec::new();
        while let Some(receipt) = receipts.pop_front_if(|receipt| receipt.is_due()) {
            due.push(receipt);
        }
        let limit = self.give_up_after.unwrap_or_default();
        self.resolve(due.into_iter().map(|receipt| {
            let action = format!("{} within {limit:?}", self.action(receipt.sequence));
            (receipt, Err(doubtful(action, in_doubt, cause())))
        }));
    }

    /// Tells the senders what became of their records, and makes room for others.
    pub(super) fn resolve(&self, resolved: impl IntoIterator<Item = (Receipt, Result<(), Error>)>) {
        let resolved: Vec<_> = resolved.into_iter().collect();
        if resolved.is_empty() {
            return;
        }
        {
            let mut state = self.lock();
            for (receipt, result) in &resolved {
                state.in_flight.remove(&receipt.sequence);
                state.report.count(receipt.sequence, result);
            }
        }
        let (records, mut bytes) = (resolved.len(), 0);
        let (mut unheard, mut first_unheard) = (0_u64, None);
        for (receipt, result) in resolved {
            self.telemetry.resolved(&result);
            bytes += receipt.bytes;
            if let Err(Err(error)) = receipt.reply.send(result) {
                unheard += 1;
                first_unheard.get_or_insert(error);
            }
        }
        if let Some(error) = first_unheard {
            tracing::warn!(records = unheard, first_error = %error, log = %self.log, "records were not confirmed, and nobody awaits their results");
        }
        self.records.add_permits(records);
        self.bytes.add_permits(bytes);
        self.resolved.notify_waiters();
        self.filled.notify_waiters();
    }

    /// Waits until everything that was queued before is resolved.
    pub(super) async fn flush(&self) -> Report {
        let end = self.lock().next_sequence;
        self.wait_until(|state| state.lowest_unresolved() >= end).await
    }

    /// Refuses further records. The lanes end once the queue is empty.
    pub(super) fn close(&self) {
        self.lock().is_closed = true;
        self.records.close();
        self.bytes.close();
        self.filled.notify_waiters();
    }

    /// Waits until all lanes have ended.
    pub(super) async fn ended(&self) -> Report {
        self.wait_until(|state| state.lanes == 0).await
    }

    async fn wait_until(&self, condition: impl Fn(&State) -> bool) -> Report {
        loop {
            let resolved = self.resolved.notified();
            {
                let state = self.lock();
                if condition(&state) {
                    return state.report();
                }
            }
            resolved.await;
        }
    }

    pub(super) fn report(&self) -> Report {
        self.lock().report()
    }

    /// Counts a lane that has ended. If it was the last one and has left records behind, its
    /// runtime has ended or the log has panicked.
    pub(super) fn lane_ended(&self) {
        let left = {
            let mut state = self.lock();
            if state.lanes > 1 {
                state.lanes -= 1;
                return;
            }
            // In one step, so that no record is queued that nobody will take.
            state.is_closed = true;
            let left = mem::take(&mut state.waiting);
            // They are unresolved until they are reported.
            state
                .in_flight
                .extend(left.iter().map(|waiting| waiting.receipt.sequence));
            left
        };
        // Whoever waits for room is refused.
        self.records.close();
        self.bytes.close();
        self.resolve(left.into_iter().map(|waiting| {
            let error = doubtful(self.action(waiting.receipt.sequence), false, TASK_ENDED.into());
            (waiting.receipt, Err(error))
        }));
        self.lock().lanes = 0;
        self.resolved.notify_waiters();
    }

    /// What a record's error says that was attempted.
    pub(super) fn action(&self, sequence: u64) -> String {
        format!("send record {}:{sequence} to log {}", self.numbering, self.log)
    }

    fn refusal(&self, cause: String) -> Error {
        Error::failed(format!("send a record to log {}", self.log), cause)
    }
}

/// Why records are left behind by a lane that did not end by itself.
pub(super) const TASK_ENDED: &str = "the producer's task ended, with its runtime or by a panic in the log";

/// The error for a record that was not confirmed and may be sent again.
pub(super) fn doubtful(action: String, in_doubt: bool, cause: Source) -> Error {
    if in_doubt {
        Error::indeterminate(action, cause)
    } else {
        Error::unavailable(action, cause)
    }
}

impl State {
    /// The next records, if there are any and the window has room for them.
    fn take(&mut self, max_records: usize, max_bytes: usize) -> Option<(Vec<NewRecord>, VecDeque<Receipt>)> {
        let lowest = self.lowest_unresolved();
        let mut bytes = 0_usize;
        let (mut records, mut receipts) = (Vec::new(), VecDeque::new());
        while let Some(waiting) = self.waiting.pop_front_if(|waiting| {
            bytes = bytes.saturating_add(waiting.record.size());
            let fits = records.is_empty() || (records.len() < max_records && bytes <= max_bytes);
            // Consumers take a record for a duplicate if it is further than the window behind
            // another one, so nothing is appended further ahead of a record that may have to be
            // appended again.
            fits && waiting.receipt.sequence - lowest < Window::SIZE
        }) {
            self.in_flight.insert(waiting.receipt.sequence);
            records.push(waiting.record);
            receipts.push_back(waiting.receipt);
        }
        (!records.is_empty()).then_some((records, receipts))
    }

    fn lowest_unresolved(&self) -> u64 {
        let first_waiting = self.waiting.front().map(|waiting| waiting.receipt.sequence);
        let first_in_flight = self.in_flight.first().copied();
        first_in_flight.or(first_waiting).unwrap_or(self.next_sequence)
    }

    fn report(&self) -> Report {
        let mut report = self.report.clone();
        let waiting = self.waiting.iter().map(|waiting| waiting.receipt.sequence);
        for sequence in self.in_flight.iter().copied().chain(waiting) {
            report.waiting.add(sequence);
        }
        report
    }
}

impl Receipt {
    fn is_due(&self) -> bool {
        self.time_left() == Some(Duration::ZERO)
    }

    fn time_left(&self) -> Option<Duration> {
        let deadline = self.deadline?;
        Some(deadline.saturating_duration_since(rt::Instant::now()))
    }
}
