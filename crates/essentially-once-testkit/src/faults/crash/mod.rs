//! Explores a user's handler: a fault at each operation, and at each pair of operations.

mod findings;
mod probe;
mod run;
mod search;

use std::{
    collections::BTreeSet,
    fmt,
    future::Future,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use bytes::Bytes;
use essentially_once::{Handler, NewRecord, OffsetStore, backend::Source, memory::MemoryTx};
use tokio::sync::oneshot;

pub use self::{
    findings::{CrashFinding, CrashFindings, CrashReport, Difference, Mistake},
    probe::Probe,
};
use self::{probe::Native, search::Search};
use super::{FaultyTx, Plan, control::Act};
use crate::{
    harness::{Backend, Harness},
    memory::MemoryHarness,
};

/// The most plans of a test in memory, which take a few seconds in a debug build.
const LIMIT: usize = 2_000;
/// The most plans of a test in real time.
const LIMIT_IN_REAL_TIME: usize = 60;

/// The transaction of a harness's store.
type TxOf<H> = <<<H as Harness>::Backend as Backend>::Store as OffsetStore>::Tx;

/// Makes the handler of a started instance.
type Make<T> = Arc<dyn Fn(&Probe) -> Box<dyn Handler<FaultyTx<T>>> + Send + Sync>;

/// Values that only the user can read from a backend, by name.
type Observed<'b> = Pin<Box<dyn Future<Output = Result<Vec<(String, String)>, Source>> + 'b>>;
type Observe<B> = Box<dyn for<'b> Fn(&'b B) -> Observed<'b> + Send + Sync>;

/// Tests that your handler loses and doubles nothing, whatever fails: [`CrashTest`] in one line.
///
/// ```
/// use essentially_once::{Handler, HandlerError, KeyValue, NewRecord, Record, async_trait};
/// use essentially_once_testkit::{CrashFindings, crash_test};
///
/// struct Count;
///
/// #[async_trait]
/// impl<Tx: KeyValue> Handler<Tx> for Count {
///     async fn handle(&mut self, order: &Record, tx: &mut Tx) -> Result<(), HandlerError> {
///         let before: u64 = match tx.get(&order.payload).await? {
///             Some(count) => std::str::from_utf8(&count)?.parse()?,
///             None => 0,
///         };
///         tx.put(&order.payload, (before + 1).to_string().as_bytes()).await?;
///         Ok(())
///     }
/// }
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), CrashFindings> {
/// crash_test(|_| Count, ["Brazil", "Chile", "Brazil"].map(NewRecord::new)).await?;
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// As for [`CrashTest::run`].
pub async fn crash_test<F, K>(
    make_handler: F,
    records: impl IntoIterator<Item = NewRecord>,
) -> Result<CrashReport, CrashFindings>
where
    F: Fn(&Probe) -> K + Send + Sync + 'static,
    K: Handler<FaultyTx<MemoryTx>> + 'static,
{
    CrashTest::new(make_handler).records(records).run().await
}

/// Runs your handler under essentially-once with a fault at every operation, and at every pair of
/// operations, and compares the results.
///
/// The first run is undisturbed. The others crash the consumer before or after an operation, lose a
/// reply, let an operation fail, or freeze the consumer while another instance takes over and
/// finishes. Each must lead to the same state, the same records in outboxes (as a receiver handles
/// them: without duplicates, in the order of each key) and the same dead letters. Calls that the
/// handler reports to its [`Probe`] must be made as often as in the undisturbed run.
///
/// `make_handler` is called for each started instance, as a restarted process would make its
/// handler. It gets the instance's probe.
///
/// A handler that rejects records is run with
/// [dead letters](essentially_once::Consumer::dead_letters), where the store keeps them.
///
/// # Which handlers
/// - [`new`](Self::new) and [`crash_test`] take a handler of any transaction with
///   [`KeyValue`](essentially_once::KeyValue), [`Outbox`](essentially_once::Outbox) or
///   [`Transaction`](essentially_once::backend::Transaction), such as
///   `impl<Tx: KeyValue + Outbox> Handler<Tx> for Ship`. It runs in memory. In a closure, the type
///   of the transaction is [`CrashTx`].
/// - [`on`](Self::on) runs such a handler on another store.
/// - [`native`](Self::native) takes a handler of one store's own transaction, such as
///   `impl Handler<SqliteTx> for Ship` or `Handler<MemoryTx>`. No fault strikes inside the handler,
///   but one can before and after each call. The test cannot see where such a handler writes: name
///   it with [`key`](Self::key), [`outbox`](Self::outbox) or [`observe`](Self::observe).
///
/// # How long it takes
/// In memory, time is paused, and a plan has the same result each time. The test runs up to 2,000
/// plans, which take one to five seconds for five records in a debug build. If more plans exist, it
/// runs the single faults first, and then a sample of the pairs. For all pairs, raise the
/// [`limit`](Self::limit). The time of a plan grows with the records, and so does the number of
/// plans, so give a few records that meet each branch of the handler. A handler that fails at every
/// record ends the test before the first fault, in real time after the pauses between its tries.
///
/// # What it cannot find
/// Calls that are not reported to the probe, and data outside the transaction that stays the same
/// in every run. Report the calls, and change the data with [`meanwhile`](Self::meanwhile).
pub struct CrashTest<H: Harness = MemoryHarness> {
    harness: H,
    make: Make<TxOf<H>>,
    records: Vec<NewRecord>,
    max_batch: usize,
    /// `None` for the default.
    limit: Option<usize>,
    seed: Option<u64>,
    only: Option<Plan>,
    idempotent: BTreeSet<String>,
    keys: BTreeSet<Bytes>,
    outboxes: BTreeSet<String>,
    observe: Option<Observe<H::Backend>>,
    before_each: Option<Box<dyn Fn() + Send + Sync>>,
    meanwhile: Option<Box<dyn Fn() -> Act + Send + Sync>>,
    is_real_time: bool,
}

/// The transaction of a handler in a crash test in memory.
pub type CrashTx = FaultyTx<MemoryTx>;

impl CrashTest {
    /// Creates a test of a handler of any transaction, in memory.
    pub fn new<K>(make_handler: impl Fn(&Probe) -> K + Send + Sync + 'static) -> Self
    where
        K: Handler<CrashTx> + 'static,
    {
        let mut test = Self::on(MemoryHarness, make_handler);
        test.is_real_time = false;
        test
    }
}

impl<H: Harness> CrashTest<H> {
    /// Creates a test of a handler of any transaction, on the store of this harness. It uses real
    /// time, and a random sample of 60 plans. Each plan starts a backend of its own, and the log is
    /// in memory.
    pub fn on<K>(harness: H, make_handler: impl Fn(&Probe) -> K + Send + Sync + 'static) -> Self
    where
        K: Handler<FaultyTx<TxOf<H>>> + 'static,
    {
        Self {
            harness,
            make: Arc::new(move |probe| Box::new(make_handler(probe))),
            records: Vec::new(),
            max_batch: 2,
            limit: None,
            seed: None,
            only: None,
            idempotent: BTreeSet::new(),
            keys: BTreeSet::new(),
            outboxes: BTreeSet::new(),
            observe: None,
            before_each: None,
            meanwhile: None,
            is_real_time: true,
        }
    }

    /// Like [`on`](Self::on), for a handler of the store's own transaction.
    pub fn native<K>(harness: H, make_handler: impl Fn(&Probe) -> K + Send + Sync + 'static) -> Self
    where
        K: Handler<TxOf<H>> + 'static,
    {
        Self::on(harness, move |probe| Native(make_handler(probe)))
    }

    /// Sets the records of the log. About five that meet each branch of the handler are enough.
    #[must_use]
    pub fn records(mut self, records: impl IntoIterator<Item = NewRecord>) -> Self {
        self.records = records.into_iter().collect();
        self
    }

    /// Sets the consumer's [`max_batch`](essentially_once::Consumer::max_batch) and its read-ahead.
    /// The default is 2.
    #[must_use]
    pub fn max_batch(mut self, records: usize) -> Self {
        self.max_batch = records;
        self
    }

    /// Sets how many plans to run at most. The default is 2,000, and 60 in real time. If more
    /// exist, a random sample is run, and the report names its seed. With 0, the test fails,
    /// because it would run no faults.
    #[must_use]
    pub fn limit(mut self, plans: usize) -> Self {
        self.limit = Some(plans);
        self
    }

    fn most_plans(&self) -> usize {
        let default = if self.is_real_time { LIMIT_IN_REAL_TIME } else { LIMIT };
        self.limit.unwrap_or(default)
    }

    /// Repeats a sample. The default is a new seed for each test.
    #[must_use]
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = Some(seed);
        self
    }

    /// Runs only this plan, after the undisturbed runs: to look into a finding. The test fails if a
    /// fault of the plan does not strike, because the run has become shorter.
    #[must_use]
    pub fn only(mut self, plan: Plan) -> Self {
        self.only = Some(plan);
        self
    }

    /// Accepts that calls of this name are repeated, because their receiver drops the copies. They
    /// must still not be lost.
    #[must_use]
    pub fn idempotent(mut self, call: impl Into<String>) -> Self {
        self.idempotent.insert(call.into());
        self
    }

    /// Compares the value of this key. Keys that a handler writes through
    /// [`KeyValue`](essentially_once::KeyValue) of its transaction are compared anyway, except with
    /// [`native`](Self::native). The test fails if the key has no value after the undisturbed run,
    /// since it is probably misspelled.
    #[must_use]
    pub fn key(mut self, key: impl Into<Bytes>) -> Self {
        self.keys.insert(key.into());
        self
    }

    /// Compares the records of this outbox. Outboxes that a handler sends to through
    /// [`Outbox`](essentially_once::Outbox) of its transaction are compared anyway, except with
    /// [`native`](Self::native). The test fails if the undisturbed run sends nothing to it.
    #[must_use]
    pub fn outbox(mut self, log: impl Into<String>) -> Self {
        self.outboxes.insert(log.into());
        self
    }

    /// Compares what only you can read, such as the rows of a table, as pairs of name and value. It
    /// is called after each run.
    #[must_use]
    pub fn observe<O>(mut self, observe: O) -> Self
    where
        O: AsyncFn(&H::Backend) -> Result<Vec<(String, String)>, Source> + Send + Sync + 'static,
    {
        let observe = Arc::new(observe);
        self.observe = Some(Box::new(move |backend| {
            let observe = Arc::clone(&observe);
            Box::pin(async move { observe(backend).await })
        }));
        self
    }

    /// Resets what outlives a run, such as the data of a fake that the handler uses. It is called
    /// before each run.
    #[must_use]
    pub fn before_each(mut self, reset: impl Fn() + Send + Sync + 'static) -> Self {
        self.before_each = Some(Box::new(reset));
        self
    }

    /// Lets another program act once in each run, for example on another consumer's state or on a
    /// second store. It acts before the first operation, and in further runs without faults before
    /// each later one. A handler whose result depends on that moment reads outside its transaction.
    #[must_use]
    pub fn meanwhile<A>(mut self, act: impl Fn() -> A + Send + Sync + 'static) -> Self
    where
        A: Future<Output = ()> + Send + 'static,
    {
        self.meanwhile = Some(Box::new(move || Box::pin(act())));
        self
    }

    /// Runs in real time, with a sample of plans, for a handler that does I/O. The default with
    /// [`on`](Self::on) and [`native`](Self::native).
    #[must_use]
    pub fn real_time(mut self) -> Self {
        self.is_real_time = true;
        self
    }

    /// Runs the test on a thread of its own, which has its own tokio runtime. If the future is
    /// dropped, the test ends after the current plan.
    ///
    /// # Errors
    /// The mistakes that were found. Pairs of faults are run only if no single fault shows a
    /// mistake.
    ///
    /// # Panics
    /// If the handler does so in a way that ends the consumer, or `make_handler` or a hook does.
    pub async fn run(self) -> Result<CrashReport, CrashFindings> {
        let is_cancelled = Cancelled(Arc::default());
        let cancelled = Arc::clone(&is_cancelled.0);
        let (sender, receiver) = oneshot::channel();
        let search = move || {
            let result = catch_unwind(AssertUnwindSafe(|| Search::new(&self, &cancelled)?.run()));
            // Fails only if the future was dropped, and nobody waits.
            let _ = sender.send(result);
        };
        if let Err(error) = thread::Builder::new().name("crash-test".into()).spawn(search) {
            return Err(search::failed(error.to_string()));
        }
        match receiver.await {
            Ok(Ok(result)) => result,
            Ok(Err(panic)) => resume_unwind(panic),
            Err(_) => Err(search::failed("the thread of the test ended without a result".into())),
        }
    }
}

impl<H: Harness + fmt::Debug> fmt::Debug for CrashTest<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CrashTest")
            .field("harness", &self.harness)
            .field("records", &self.records.len())
            .field("max_batch", &self.max_batch)
            .field("limit", &self.limit)
            .field("seed", &self.seed)
            .finish_non_exhaustive()
    }
}

/// Set when it is dropped.
struct Cancelled(Arc<AtomicBool>);

impl Drop for Cancelled {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
