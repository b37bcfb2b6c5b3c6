//! A log whose appends fail as a script says.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use essentially_once::{
    Error, Log, NewRecord, Offset, async_trait,
    backend::{Bounds, Durability, LogId, LogReader},
    memory::{Memory, MemoryLog},
};
use tokio::{
    sync::{Semaphore, watch},
    task::{JoinSet, yield_now},
};

/// The largest record that the log accepts, in bytes.
pub const LARGEST: usize = 64;

/// What an append does.
#[derive(Clone, Debug)]
pub enum Act {
    /// It does as the records say: a payload that begins with `bad` is refused, and so is one that
    /// is larger than [`LARGEST`].
    Obey,
    /// The first records are appended, and the reply is lost.
    Lose(usize),
    /// The reply is lost, and the first records are appended after as many turns of other tasks.
    Late(usize, u8),
    Unavailable,
    Refuse,
    Panic,
    /// It waits for [`Faulty::release`].
    Hold(Box<Act>),
    /// It takes as many milliseconds.
    Slow(u64, Box<Act>),
}

impl Act {
    pub fn held(self) -> Self {
        Self::Hold(Box::new(self))
    }
}

#[derive(Clone)]
pub struct Faulty(Arc<State>);

pub struct State {
    log: MemoryLog,
    script: Mutex<VecDeque<(Act, u8)>>,
    released: Semaphore,
    /// The sequences of each append, in the order of the calls.
    calls: watch::Sender<Vec<Vec<u64>>>,
    in_flight: AtomicUsize,
    most_in_flight: AtomicUsize,
    late: Mutex<JoinSet<()>>,
}

impl Faulty {
    pub fn new(memory: &Memory, script: impl IntoIterator<Item = Act>) -> Self {
        Self::with_turns(memory, script.into_iter().map(|act| (act, 0)))
    }

    /// Each append waits for as many turns of other tasks before it acts. Appends that the script
    /// does not mention obey.
    pub fn with_turns(memory: &Memory, script: impl IntoIterator<Item = (Act, u8)>) -> Self {
        Self(Arc::new(State {
            log: memory.log("orders").unwrap(),
            script: Mutex::new(script.into_iter().collect()),
            released: Semaphore::new(0),
            calls: watch::Sender::default(),
            in_flight: AtomicUsize::new(0),
            most_in_flight: AtomicUsize::new(0),
            late: Mutex::default(),
        }))
    }

    /// Lets one held append go on.
    pub fn release(&self) {
        self.0.released.add_permits(1);
    }

    /// Waits for the call with this number, from 1 on, and returns its sequences.
    pub async fn called(&self, number: usize) -> Vec<u64> {
        let mut calls = self.0.calls.subscribe();
        let calls = super::soon(calls.wait_for(|calls| calls.len() >= number))
            .await
            .unwrap();
        calls[number - 1].clone()
    }

    pub fn calls(&self) -> Vec<Vec<u64>> {
        self.0.calls.borrow().clone()
    }

    pub fn most_in_flight(&self) -> usize {
        self.0.most_in_flight.load(Ordering::SeqCst)
    }

    /// How many handles of the log exist.
    pub fn handles(&self) -> usize {
        Arc::strong_count(&self.0)
    }

    /// Waits until all late records have been appended.
    pub async fn settle(&self) {
        let mut late = std::mem::take(&mut *self.0.late.lock().unwrap());
        while let Some(appended) = late.join_next().await {
            appended.unwrap();
        }
    }

    async fn act(&self, mut act: Act, records: &[NewRecord]) -> Result<Option<Offset>, Error> {
        loop {
            act = match act {
                Act::Hold(next) => {
                    self.0.released.acquire().await.unwrap().forget();
                    *next
                }
                Act::Slow(time, next) => {
                    tokio::time::sleep(Duration::from_millis(time)).await;
                    *next
                }
                _ => break,
            }
        }
        let lost = || Err(Error::indeterminate("append to orders", "the reply is lost"));
        // No log appends a record that it refuses, or one behind it.
        let good = records.iter().position(|record| check(record).is_err());
        let prefix = |n: usize| &records[..n.min(good.unwrap_or(records.len()))];
        match act {
            Act::Obey | Act::Hold(_) | Act::Slow(..) => {
                for record in records {
                    check(record)?;
                }
                self.0.log.append(records).await
            }
            Act::Lose(n) => {
                self.0.log.append(prefix(n)).await?;
                lost()
            }
            Act::Late(n, turns) => {
                let (log, records) = (self.0.log.clone(), prefix(n).to_vec());
                self.0.late.lock().unwrap().spawn(async move {
                    for _ in 0..turns {
                        yield_now().await;
                    }
                    log.append(&records).await.unwrap();
                });
                lost()
            }
            Act::Unavailable => Err(Error::unavailable("append to orders", "scripted")),
            Act::Refuse => Err(Error::failed("append to orders", "scripted")),
            Act::Panic => panic!("scripted panic"),
        }
    }
}

fn check(record: &NewRecord) -> Result<(), Error> {
    record.check_size(LARGEST)?;
    if record.payload.starts_with(b"bad") {
        return Err(Error::failed("append to orders", "a bad record"));
    }
    Ok(())
}

/// Counts an append in flight, until it ends or is dropped.
struct InFlight<'a>(&'a State);

impl<'a> InFlight<'a> {
    fn begin(state: &'a State) -> Self {
        let in_flight = state.in_flight.fetch_add(1, Ordering::SeqCst) + 1;
        state.most_in_flight.fetch_max(in_flight, Ordering::SeqCst);
        Self(state)
    }
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::SeqCst);
    }
}

#[async_trait]
impl Log for Faulty {
    fn id(&self) -> &LogId {
        self.0.log.id()
    }

    async fn append(&self, records: &[NewRecord]) -> Result<Option<Offset>, Error> {
        let _in_flight = InFlight::begin(&self.0);
        let sequences = records.iter().map(|record| record.origin.as_ref().unwrap().sequence);
        self.0.calls.send_modify(|calls| calls.push(sequences.collect()));
        let step = self.0.script.lock().unwrap().pop_front();
        let (act, turns) = step.unwrap_or((Act::Obey, 0));
        for _ in 0..turns {
            yield_now().await;
        }
        self.act(act, records).await
    }

    async fn read(&self, from: Offset) -> Result<Box<dyn LogReader>, Error> {
        self.0.log.read(from).await
    }

    async fn bounds(&self) -> Result<Bounds, Error> {
        self.0.log.bounds().await
    }

    async fn durability(&self) -> Result<Durability, Error> {
        self.0.log.durability().await
    }
}
