//! What the tests with faults share: cases, records that are sent until they are there, a handler that can be watched, and the verdict.

#![allow(dead_code, reason = "each target uses a part of it")]

use std::{collections::BTreeSet, future::Future, pin::Pin, process::ExitCode, time::Duration};

use essentially_once::{
    CancellationToken, ConsumerId, Epoch, Error, Handler, HandlerError, KeyValue, Log, NewRecord, OffsetStore, Origin,
    ProducerId, Record, async_trait, backend::Source,
};
use essentially_once_testkit::{Check, Expectation, Suite, read_ledger, read_log};
use tokio::sync::watch;

/// How long anything may take; only what is stuck takes so long.
pub(crate) const LIMIT: Duration = Duration::from_secs(120);

pub(crate) type Outcome = Result<(), Source>;
pub(crate) type Case = fn() -> Pin<Box<dyn Future<Output = Outcome>>>;

macro_rules! cases {
    ($($case:ident),+ $(,)?) => {
        [$((stringify!($case), (|| Box::pin($case())) as $crate::common::Case)),+]
    };
}
pub(crate) use cases;

/// Runs each case as a test; without a server, each is ignored with the reason.
pub(crate) fn run(cases: impl IntoIterator<Item = (&'static str, Case)>) -> ExitCode {
    let missing = test_servers::redis_server().err();
    let mut suite = Suite::new();
    for (name, case) in cases {
        suite = match &missing {
            Some(why) => suite.ignored(name, why),
            None => suite.async_test(name, 2 * LIMIT, case),
        };
    }
    suite.run()
}

/// Ends the case unless the condition holds.
macro_rules! ensure {
    ($condition:expr, $($finding:tt)+) => {
        if !$condition {
            return Err(format!($($finding)+).into());
        }
    };
}
pub(crate) use ensure;

/// Under the name that the cases use.
pub(crate) use test_servers::insist;

/// The message of that number, with one of three keys.
pub(crate) fn message(number: u64) -> NewRecord {
    let producer = ProducerId::new("web").expect("a name");
    NewRecord::new(format!("message {number};"))
        .key((number % 3).to_string())
        .origin(Origin::new(producer, Epoch::STABLE, number))
}

/// Appends the messages of these numbers one by one; what is in doubt is sent again.
pub(crate) async fn send(log: &dyn Log, numbers: std::ops::Range<u64>) -> Result<(), Error> {
    for number in numbers {
        let records = [message(number)];
        insist(|| log.append(&records)).await?;
    }
    Ok(())
}

/// Sends until it is told to stop; returns how many messages, and how many appends failed on the way.
pub(crate) async fn send_until(log: impl Log, stop: CancellationToken) -> Result<(u64, usize), Error> {
    let (mut sent, mut failed) = (0, 0);
    while !stop.is_cancelled() {
        let records = [message(sent), message(sent + 1)];
        let (_, failures) = test_servers::insist_and_count(|| log.append(&records)).await?;
        sent += 2;
        failed += failures.len();
    }
    Ok((sent, failed))
}

/// Judges what a consumer that wrote a ledger made of a log which must hold the first `messages` messages.
pub(crate) async fn judge<S>(log: &dyn Log, store: &S, consumer: &ConsumerId, messages: u64) -> Outcome
where
    S: OffsetStore<Tx: KeyValue>,
{
    let records = read_log(log).await?;
    let sent: BTreeSet<u64> = records.iter().filter_map(sequence).collect();
    ensure!(
        sent.iter().copied().eq(0..messages),
        "the log holds {sent:?} of {messages} messages"
    );
    agree(&records, store, consumer).await
}

/// Judges a consumer by the records that the log has.
pub(crate) async fn agree<S>(records: &[Record], store: &S, consumer: &ConsumerId) -> Outcome
where
    S: OffsetStore<Tx: KeyValue>,
{
    let applied = read_ledger(store, consumer).await?;
    let position = store.position(consumer).await?;
    let check = Check::new(records, &applied).position(position.as_ref()).drained();
    Ok(check.findings().judge(Expectation::EssentiallyOnce)?)
}

fn sequence(record: &Record) -> Option<u64> {
    record.origin.as_ref().map(|origin| origin.sequence)
}

/// What a handler has seen.
#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct Seen {
    /// So many messages, those dropped as duplicates among them; called again for one of them, it does not count up.
    pub(crate) handled: u64,
    /// How often its consumer went back to the stored position.
    pub(crate) resets: u64,
}

/// Tells what the handler in it sees.
pub(crate) struct Watched<H> {
    inner: H,
    seen: watch::Sender<Seen>,
}

impl<H> Watched<H> {
    pub(crate) fn new(inner: H) -> (Self, watch::Receiver<Seen>) {
        let (seen, watching) = watch::channel(Seen::default());
        (Self { inner, seen }, watching)
    }
}

#[async_trait]
impl<Tx: Send, H: Handler<Tx>> Handler<Tx> for Watched<H> {
    async fn handle(&mut self, record: &Record, tx: &mut Tx) -> Result<(), HandlerError> {
        self.inner.handle(record, tx).await?;
        let reached = sequence(record).map_or(0, |sequence| sequence + 1);
        self.seen.send_modify(|seen| seen.handled = seen.handled.max(reached));
        Ok(())
    }

    async fn reset(&mut self) {
        self.inner.reset().await;
        self.seen.send_modify(|seen| seen.resets += 1);
    }
}

/// Waits until the handler has seen enough.
pub(crate) async fn until(seen: &mut watch::Receiver<Seen>, enough: impl FnMut(&Seen) -> bool) -> Result<Seen, Source> {
    let waiting = tokio::time::timeout(LIMIT, seen.wait_for(enough)).await;
    match waiting {
        Ok(seen) => Ok(*seen.map_err(|_| "the consumer ended early")?),
        Err(_) => Err("the consumer does not get on".into()),
    }
}
