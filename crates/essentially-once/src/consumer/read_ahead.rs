//! Reads ahead of the handler, in a task of its own.

use std::{
    collections::VecDeque,
    mem,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    vec,
};

use tokio::sync::Notify;
use tracing::Instrument;

use crate::{Error, LogReader, Offset, Record, backend::FetchBudget, rt};

/// A fetch of this many records is always short enough.
const LEAST_QUARTER: usize = 1_024;

/// Where a batch must end.
#[derive(Clone, Copy)]
pub(super) enum Split {
    /// Around the record at this offset, which comes alone.
    Alone(Offset),
    /// Behind the record at this offset.
    After(Offset),
}

/// Records that were read but not yet taken. Dropping this ends the reading.
pub(super) struct ReadAhead {
    buffer: Arc<Buffer>,
    task: rt::JoinHandle<()>,
    /// Every record from here on is still to be taken.
    from: Offset,
    /// Whether the reading task was woken and has not run yet.
    woken: bool,
}

struct Buffer {
    state: Mutex<State>,
    max_records: usize,
    max_bytes: usize,
    filled: Notify,
    drained: Notify,
}

#[derive(Default)]
struct State {
    /// As they were fetched, so that records are moved once. None is empty.
    fetches: VecDeque<vec::IntoIter<Record>>,
    count: usize,
    bytes: usize,
    /// Why the reading ended. Returned after the records before it are taken.
    ended: Option<Error>,
}

impl ReadAhead {
    /// Reads from `from` on, where the reader is.
    pub(super) fn spawn(reader: Box<dyn LogReader>, from: Offset, max_records: usize, max_bytes: usize) -> Self {
        let buffer = Arc::new(Buffer {
            state: Mutex::default(),
            max_records,
            max_bytes,
            filled: Notify::new(),
            drained: Notify::new(),
        });
        let task = rt::spawn(fill(Arc::clone(&buffer), reader).in_current_span());
        Self {
            buffer,
            task,
            from,
            woken: false,
        }
    }

    /// Waits for records and takes those that have arrived, up to `max` and to the split.
    /// Cancel-safe.
    pub(super) async fn take(&mut self, max: usize, split: Option<Split>) -> Result<Vec<Record>, Error> {
        if mem::take(&mut self.woken) {
            // A task that was just woken runs next on this thread, and no other thread steals it.
            // Yielding lets it read.
            rt::yield_now().await;
        }
        loop {
            if let Some(taken) = self.buffer.take(max, split, &mut self.woken) {
                if let Ok([.., last]) = taken.as_deref() {
                    self.from = last.offset.successor();
                }
                return taken;
            }
            self.buffer.filled.notified().await;
        }
    }
}

impl ReadAhead {
    /// Puts all records back that were taken since `from`.
    pub(super) fn put_back(&mut self, from: Offset, records: Vec<Record>) {
        self.from = from;
        let mut state = self.buffer.lock();
        state.add(&records);
        if !records.is_empty() {
            state.fetches.push_front(records.into_iter());
        }
        self.buffer.filled.notify_one();
    }

    /// Whether every record from this offset on is still to be taken.
    pub(super) fn is_at(&self, offset: Offset) -> bool {
        self.from == offset
    }

    /// Ends the reading and waits until the reader is dropped.
    pub(super) async fn end(mut self) {
        self.task.abort();
        let _ = (&mut self.task).await;
    }
}

impl Drop for ReadAhead {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Buffer {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self, max: usize, split: Option<Split>, woken: &mut bool) -> Option<Result<Vec<Record>, Error>> {
        let mut state = self.lock();
        if state.count == 0 {
            return state.ended.take().map(Err);
        }
        // The current batch and the waiting records share the bytes.
        let bytes = self.max_bytes / 2;
        let mut count = if state.bytes <= bytes {
            max.min(state.count)
        } else {
            let mut budget = FetchBudget::of(bytes);
            let fitting = state.records().take(max);
            fitting.take_while(|record| budget.admits(record.size())).count()
        };
        let up_to = |is_before: &dyn Fn(Offset) -> bool| {
            let taken = state.records().take(count);
            taken.take_while(|record| is_before(record.offset)).count()
        };
        match split {
            Some(Split::Alone(alone)) => {
                let before = up_to(&|offset| offset < alone);
                if state.records().nth(before).is_some_and(|record| record.offset == alone) {
                    count = before.max(1);
                }
            }
            Some(Split::After(last)) => count = up_to(&|offset| offset <= last).max(1),
            None => {}
        }
        let was_full = !self.has_room(&state);
        let taken = state.take(count);
        if was_full && self.has_room(&state) {
            self.drained.notify_one();
            *woken = true;
        }
        Some(Ok(taken))
    }

    /// Whether the buffer is half empty. Refilling at half fetches many records at a time and
    /// seldom wakes the tasks.
    fn has_room(&self, state: &State) -> bool {
        state.count <= self.max_records / 2 && state.bytes <= self.max_bytes / 2
    }

    /// How many records to fetch: as many as fit by the average size of the waiting records. Of a
    /// large buffer at most a quarter, so that the first records arrive while the next are read.
    async fn room(&self) -> usize {
        loop {
            {
                let state = self.lock();
                if self.has_room(&state) {
                    let records = self.max_records - state.count;
                    let average = state.bytes.checked_div(state.count).unwrap_or(0).max(1);
                    let fitting = records.min((self.max_bytes - state.bytes) / average);
                    return fitting.min((self.max_records / 4).max(LEAST_QUARTER)).max(1);
                }
            }
            self.drained.notified().await;
        }
    }

    fn push(&self, records: Vec<Record>) {
        let mut state = self.lock();
        state.add(&records);
        if !records.is_empty() {
            state.fetches.push_back(records.into_iter());
        }
        self.filled.notify_one();
    }

    fn end(&self, error: Error) {
        self.lock().ended.get_or_insert(error);
        self.filled.notify_one();
    }
}

impl State {
    fn records(&self) -> impl Iterator<Item = &Record> {
        self.fetches.iter().flat_map(vec::IntoIter::as_slice)
    }

    /// Counts records that are added.
    fn add(&mut self, records: &[Record]) {
        self.count += records.len();
        self.bytes += records.iter().map(Record::size).sum::<usize>();
    }

    /// Takes the first records, of which there are at least `count`.
    fn take(&mut self, count: usize) -> Vec<Record> {
        let mut taken = Vec::with_capacity(count);
        while taken.len() < count
            && let Some(mut fetch) = self.fetches.pop_front()
        {
            taken.extend(fetch.by_ref().take(count - taken.len()));
            if fetch.len() > 0 {
                self.fetches.push_front(fetch);
            }
        }
        self.count -= taken.len();
        self.bytes -= taken.iter().map(Record::size).sum::<usize>();
        taken
    }
}

/// Ends the reading if the reader panics. The consumer would otherwise wait forever.
struct EndOnDrop(Arc<Buffer>);

impl Drop for EndOnDrop {
    fn drop(&mut self) {
        self.0.end(Error::unavailable("read ahead", "the reader panicked"));
    }
}

async fn fill(buffer: Arc<Buffer>, mut reader: Box<dyn LogReader>) {
    let buffer = EndOnDrop(buffer);
    loop {
        let room = buffer.0.room().await;
        match reader.next(room).await {
            Ok(records) => buffer.0.push(records),
            Err(error) => return buffer.0.end(error),
        }
    }
}
