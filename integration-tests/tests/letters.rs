//! Dead letters with real processes: two instances, some of whose records fail, are killed again
//! and again while an operator retries, edits and discards letters. In the end every record was
//! handled once, in order within its key, or discarded.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    env, fs, io,
    path::PathBuf,
    process::{Child, Command, ExitCode, Stdio},
    time::Duration,
};

use essentially_once::{
    CancellationToken, Consumer, ConsumerId, Error, Handler, HandlerError, KeyValue, Log, NewRecord, OffsetStore,
    Record, async_trait,
    backend::{DeadLetters, Source, Transaction},
    consumer::{
        DeadLetterOptions, Operator,
        dead_letters::{self, LetterFilter},
    },
};
use essentially_once_postgres::Pg;
use essentially_once_rabbitmq::Rabbit;
use essentially_once_redis::Redis;
use essentially_once_sqlite::Sqlite;
use essentially_once_testkit::Suite;
use integration_tests::{Address, Backend};
use serde::{Deserialize, Serialize};
use test_servers::insist;

const RECORDS: u64 = 10_000;
const KEYS: u64 = 100;
const KILLS: usize = 20;

/// How long a test may take.
const LIMIT: Duration = Duration::from_secs(240);

const LOG: &str = "orders";
const VARIABLE: &str = "ESSENTIALLY_ONCE_TEST_LETTERS";

fn main() -> ExitCode {
    if let Ok(work) = env::var(VARIABLE) {
        return match consume(&work) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("worker {}: {error}", std::process::id());
                ExitCode::FAILURE
            }
        };
    }
    let mut suite = Suite::new();
    for (log, store) in Backend::alone() {
        let name = format!("{}::letters_lose_double_and_reorder_nothing", log.name());
        suite = match log.missing().or(store.missing()) {
            Some(why) => suite.ignored(&name, &why),
            None => suite.async_test(&name, LIMIT, move || run(log, store)),
        };
    }
    suite.run()
}

/// What a worker does.
#[derive(Serialize, Deserialize)]
struct Work {
    log: Address,
    store: Address,
    /// A file that exists once poison records can be handled.
    mended: PathBuf,
}

/// One in a hundred records is poison until the handler is mended, and one in a hundred fails until
/// its third try.
fn payload(n: u64) -> String {
    match n % 100 {
        13 => format!("{n} poison"),
        57 => format!("{n} third"),
        _ => n.to_string(),
    }
}

fn number(payload: &[u8]) -> Result<u64, HandlerError> {
    let text = str::from_utf8(payload)?;
    Ok(text.split(' ').next().unwrap_or(text).parse()?)
}

/// Appends each record's number to a list under its key, in the state.
struct Lists {
    mended: PathBuf,
    tries: HashMap<u64, u32>,
}

#[async_trait]
impl<Tx: KeyValue> Handler<Tx> for Lists {
    async fn handle(&mut self, record: &Record, tx: &mut Tx) -> Result<(), HandlerError> {
        let n = number(&record.payload)?;
        let tries = self.tries.entry(n).or_default();
        *tries += 1;
        if record.payload.ends_with(b"poison") && !self.mended.exists() {
            return Err(HandlerError::reject("poison"));
        }
        if record.payload.ends_with(b"third") && *tries < 3 {
            return Err(HandlerError::retry("not yet"));
        }
        let key = record.key.clone().unwrap_or_default();
        let before = tx.get(&key).await?.unwrap_or_default();
        tx.put(&key, &[&before[..], format!("{n} ").as_bytes()].concat())
            .await?;
        Ok(())
    }
}

const NO_STORE: &str = "Kafka keeps no dead letters";

fn consume(work: &str) -> Result<(), Source> {
    // The parent holds the other end of stdin. When the parent ends, this process ends too.
    std::thread::spawn(|| {
        let _ = io::copy(&mut io::stdin(), &mut io::sink());
        std::process::exit(1);
    });
    let work: Work = serde_json::from_str(work)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let log = insist(|| work.log.log(LOG)).await?;
        match &work.store {
            Address::Sqlite(path) => consume_into(insist(|| Sqlite::open(path)).await?.store(), log, work.mended).await,
            Address::Postgres(url) => consume_into(insist(|| Pg::connect(url)).await?.store(), log, work.mended).await,
            Address::Redis(url) => consume_into(insist(|| Redis::connect(url)).await?.store(), log, work.mended).await,
            Address::Rabbitmq(url) | Address::RabbitmqPacked(url) => {
                consume_into(insist(|| Rabbit::connect(url)).await?.store(), log, work.mended).await
            }
            Address::Kafka(_) => Err(NO_STORE.into()),
        }
    })
}

async fn consume_into<S>(store: S, log: impl Log + 'static, mended: PathBuf) -> Result<(), Source>
where
    S: OffsetStore<Tx: KeyValue + DeadLetters>,
{
    let tries = HashMap::new();
    let consumer = Consumer::essentially_once(shipping()?, log, store, Lists { mended, tries })
        .max_batch(20)
        .retries(1)
        .min_backoff(Duration::from_millis(1))
        .max_backoff(Duration::from_millis(20))
        .standby_after(Duration::from_millis(300))
        .dead_letters(DeadLetterOptions::new().retry_after(Duration::from_millis(30)));
    consumer.run_until(CancellationToken::new()).await?;
    Ok(())
}

fn shipping() -> Result<ConsumerId, Error> {
    ConsumerId::new("shipping")
}

/// A process that consumes. Dropping it kills it.
struct Worker(Child);

impl Worker {
    fn start(work: &Work) -> Result<Self, Source> {
        let worker = Command::new(env::current_exe()?)
            .env(VARIABLE, serde_json::to_string(work)?)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()?;
        Ok(Self(worker))
    }

    fn check(&mut self) -> Result<(), Source> {
        match self.0.try_wait()? {
            Some(status) => Err(format!("a worker ended on its own: {status}").into()),
            None => Ok(()),
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

async fn run(log: Backend, store: Backend) -> Result<(), Source> {
    let start = move || {
        let place = log.start()?;
        let other = if log == store { None } else { Some(store.start()?) };
        Ok::<_, Source>((place, other))
    };
    let (place, other) = tokio::task::spawn_blocking(start).await??;
    let folder = tempfile::tempdir()?;
    let work = Work {
        log: place.address(),
        store: other.as_ref().unwrap_or(&place).address(),
        mended: folder.path().join("mended"),
    };
    match &work.store {
        Address::Sqlite(path) => judge(&work, Sqlite::open(path).await?.store()).await,
        Address::Postgres(url) => judge(&work, Pg::connect(url).await?.store()).await,
        Address::Redis(url) => judge(&work, Redis::connect(url).await?.store()).await,
        Address::Rabbitmq(url) | Address::RabbitmqPacked(url) => {
            judge(&work, Rabbit::connect(url).await?.store()).await
        }
        Address::Kafka(_) => Err(NO_STORE.into()),
    }
}

async fn judge<S>(work: &Work, store: S) -> Result<(), Source>
where
    S: OffsetStore<Tx: KeyValue + DeadLetters>,
{
    let log = insist(|| work.log.log(LOG)).await?;
    let records: Vec<_> = (0..RECORDS)
        .map(|n| NewRecord::new(payload(n)).key((n % KEYS).to_string()))
        .collect();
    for chunk in records.chunks(500) {
        log.append(chunk).await?;
    }
    let discarded = disturb(work, &store).await?;
    fs::write(&work.mended, "")?;
    drain(work, &store, &*log).await?;

    let mut tx = store.begin(&shipping()?).await?;
    let mut wrong = BTreeMap::new();
    for key in 0..KEYS {
        let list = tx.get(key.to_string().as_bytes()).await?.unwrap_or_default();
        let found: Vec<u64> = str::from_utf8(&list)?
            .split_whitespace()
            .map(str::parse)
            .collect::<Result<_, _>>()?;
        let of_key = (0..RECORDS).filter(|n| n % KEYS == key);
        let expected: Vec<u64> = of_key.filter(|n| !discarded.contains(n)).collect();
        if found != expected {
            wrong.insert(key, (found, expected));
        }
    }
    tx.rollback().await?;
    match wrong.is_empty() {
        true => Ok(()),
        false => Err(format!("lists found and expected, by key: {wrong:?}").into()),
    }
}

/// Kills workers while an operator retries, edits and discards. Returns the discarded records.
async fn disturb<S>(work: &Work, store: &S) -> Result<BTreeSet<u64>, Source>
where
    S: OffsetStore<Tx: KeyValue + DeadLetters>,
{
    let shipping = shipping()?;
    let by = Operator::new("operator").because("it disturbs");
    let poison = LetterFilter::all().reason("poison");
    let (mut discarded, mut edits) = (BTreeSet::new(), 0);
    let mut workers = [Worker::start(work)?, Worker::start(work)?];
    for kill in 0..KILLS {
        // Until some letters exist, there is nothing to disturb.
        while store.position(&shipping).await?.is_none() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        tokio::time::sleep(Duration::from_millis(fastrand::u64(50..250))).await;
        if kill % 3 == 0 {
            dead_letters::retry_all(&shipping, store, &LetterFilter::all(), &by).await?;
        } else if let Some(letter) = dead_letters::find(&shipping, store, &poison, None, 1).await?.pop() {
            let n = number(&letter.record.payload).map_err(|error| error.to_string())?;
            let mut edited = NewRecord::from(&letter.record);
            edited.payload = format!("{n} edited").into();
            let changed = match kill % 3 {
                1 => dead_letters::discard(&shipping, store, &letter, &by).await,
                _ => dead_letters::edit(&shipping, store, &letter, &edited, &by).await,
            };
            match changed {
                Ok(()) if kill % 3 == 1 => drop(discarded.insert(n)),
                Ok(()) => edits += 1,
                // The worker tried it in the meantime.
                Err(error) if error.to_string().contains("changed since") => {}
                Err(error) => return Err(error.into()),
            }
        }
        let killed = &mut workers[fastrand::usize(..2)];
        killed.check()?;
        *killed = Worker::start(work)?;
    }
    eprintln!(
        "{} of {RECORDS} records were discarded, {edits} edited, and {KILLS} workers killed",
        discarded.len()
    );
    Ok(discarded)
}

/// Retries with a mended handler until no letter is left and the log is read.
async fn drain<S>(work: &Work, store: &S, log: &dyn Log) -> Result<(), Source>
where
    S: OffsetStore<Tx: KeyValue + DeadLetters>,
{
    let shipping = shipping()?;
    let by = Operator::new("operator").because("the handler is mended");
    let mut worker = Worker::start(work)?;
    loop {
        worker.check()?;
        dead_letters::retry_all(&shipping, store, &LetterFilter::all(), &by).await?;
        let letters = dead_letters::list(&shipping, store, None, 1).await?;
        let next = store.position(&shipping).await?.map(|position| position.next);
        if letters.is_empty() && next >= Some(log.bounds().await?.end) {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
