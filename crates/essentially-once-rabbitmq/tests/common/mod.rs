//! What the fault tests share: cases, records that are sent until they are stored, an observable
//! handler, and the verdict.

#![allow(dead_code, unused_imports, reason = "every test target uses only a part of it")]

use std::{
    collections::BTreeSet,
    process::ExitCode,
    sync::{Arc, OnceLock},
    time::Duration,
};

use essentially_once::{
    CancellationToken, Consumer, ConsumerId, Error, Handler, HandlerError, Log, OffsetStore as _, Record, async_trait,
    backend::Source, consumer::Report,
};
use essentially_once_rabbitmq::{Rabbit, RabbitLog, RabbitOptions, RabbitStore};
use essentially_once_testkit::{Check, Expectation, Ledger, read_ledger, read_log};
use test_servers::{Case, RabbitNode, ledger::sequence, run_cases};
use tokio::{
    sync::watch,
    task::JoinHandle,
    time::{sleep, timeout},
};

pub(crate) use test_servers::{
    Outcome, cases, ensure, insist,
    ledger::{Seen, message, send},
};

/// How long anything may take. Only a stuck task takes this long.
pub(crate) const LIMIT: Duration = Duration::from_secs(200);

/// How long a client waits for the broker. It may take that long to detect a fault.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// The pause between two appends of a background sender, so that consumers keep up with it on a
/// small machine.
const PAUSE: Duration = Duration::from_millis(20);

/// Runs each case as a test. Without a server, each is ignored with the reason.
pub(crate) fn run(cases: impl IntoIterator<Item = (&'static str, Case)>) -> ExitCode {
    run_cases(test_servers::rabbitmq_server().err(), LIMIT, cases)
}

/// The node of all cases that do not harm it. Its janitor ends it with this process.
pub(crate) fn shared_node() -> Result<Arc<RabbitNode>, Source> {
    static NODE: OnceLock<Result<Arc<RabbitNode>, String>> = OnceLock::new();
    let start = || RabbitNode::start().map(Arc::new).map_err(|error| error.to_string());
    Ok(tokio::task::block_in_place(|| NODE.get_or_init(start)).clone()?)
}

/// A unique name.
pub(crate) fn fresh(name: &str) -> String {
    format!("{name}-{:08x}", fastrand::u32(..))
}

pub(crate) fn url(port: u16) -> String {
    format!("amqp://guest:guest@127.0.0.1:{port}/%2f?heartbeat=2")
}

pub(crate) fn options() -> RabbitOptions {
    RabbitOptions::new().timeout(PATIENCE)
}

/// A background sender.
pub(crate) struct Sending {
    task: JoinHandle<Result<usize, Error>>,
    stop: CancellationToken,
    sent: watch::Receiver<u64>,
}

impl Sending {
    /// Sends two messages at a time, with a short pause.
    pub(crate) fn start(log: RabbitLog) -> Self {
        let (stop, (sent, watching)) = (CancellationToken::new(), watch::channel(0));
        let stopped = stop.clone();
        let task = tokio::spawn(async move {
            let mut failed = 0;
            while !stopped.is_cancelled() {
                let next = *sent.borrow();
                let records = [message(next), message(next + 1)];
                let (_, failures) = test_servers::insist_and_count(|| log.append(&records)).await?;
                failed += failures.len();
                sent.send_replace(next + 2);
                sleep(PAUSE).await;
            }
            Ok(failed)
        });
        Self {
            task,
            stop,
            sent: watching,
        }
    }

    /// The number of confirmed messages.
    pub(crate) fn sent(&self) -> u64 {
        *self.sent.borrow()
    }

    /// Waits until this many more are confirmed.
    pub(crate) async fn sends(&mut self, more: u64) -> Outcome {
        let enough = self.sent() + more;
        match timeout(LIMIT, self.sent.wait_for(|sent| *sent >= enough)).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) => Err("the sender ended early".into()),
            Err(_) => Err(format!("the sender is stuck before {enough} messages").into()),
        }
    }

    /// Returns how many messages were sent, and how many appends failed on the way.
    pub(crate) async fn stop(self) -> Result<(u64, usize), Source> {
        self.stop.cancel();
        let failed = timeout(LIMIT, self.task).await???;
        let sent = *self.sent.borrow();
        Ok((sent, failed))
    }
}

/// A [`Ledger`] that can be observed and paused.
struct Watched {
    seen: watch::Sender<Seen>,
    held: watch::Receiver<bool>,
}

#[async_trait]
impl<Tx: Send> Handler<Tx> for Watched
where
    Ledger: Handler<Tx>,
{
    async fn handle(&mut self, record: &Record, tx: &mut Tx) -> Result<(), HandlerError> {
        // If it fails, nobody is left to pause it.
        let _ = self.held.wait_for(|held| !held).await;
        Ledger.handle(record, tx).await?;
        let reached = sequence(record).map_or(0, |sequence| sequence + 1);
        self.seen.send_modify(|seen| seen.handled = seen.handled.max(reached));
        Ok(())
    }

    async fn reset(&mut self) {
        self.seen.send_modify(|seen| seen.resets += 1);
    }
}

/// A background consumer that keeps a ledger.
pub(crate) struct Running {
    task: JoinHandle<Result<Report, Error>>,
    stop: CancellationToken,
    seen: watch::Receiver<Seen>,
    held: watch::Sender<bool>,
}

impl Running {
    pub(crate) fn start(id: &ConsumerId, log: RabbitLog, store: RabbitStore) -> Self {
        let (seen, watching) = watch::channel(Seen::default());
        let (hold, held) = watch::channel(false);
        let stop = CancellationToken::new();
        let consumer = Consumer::essentially_once(id.clone(), log, store, Watched { seen, held })
            .max_batch(4)
            .min_backoff(Duration::from_millis(10))
            .max_backoff(Duration::from_millis(500));
        let task = tokio::spawn(consumer.run_until(stop.clone()));
        Self {
            task,
            stop,
            seen: watching,
            held: hold,
        }
    }

    /// Whether it waits at the next record.
    pub(crate) fn hold(&self, hold: bool) {
        self.held.send_replace(hold);
    }

    pub(crate) fn seen(&self) -> Seen {
        *self.seen.borrow()
    }

    async fn until(&mut self, enough: impl Fn(&Seen) -> bool) -> Outcome {
        let waiting = timeout(LIMIT, self.seen.wait_for(|seen| enough(seen))).await;
        match waiting.map(|seen| seen.is_ok()) {
            Ok(true) => return Ok(()),
            Ok(false) => {}
            Err(_) => return Err(format!("the consumer is stuck: {:?}", self.seen()).into()),
        }
        match timeout(LIMIT, &mut self.task).await?? {
            Ok(report) => Err(format!("the consumer ended early: {report}").into()),
            Err(error) => Err(format!("the consumer ended early: {error}").into()),
        }
    }

    pub(crate) async fn handles(&mut self, messages: u64) -> Outcome {
        self.until(|seen| seen.handled >= messages).await
    }

    /// Waits until it has handled this many more.
    pub(crate) async fn goes_on(&mut self, more: u64) -> Outcome {
        let enough = self.seen().handled + more;
        self.handles(enough).await
    }

    /// Waits until it has gone back to the stored position this often in total.
    pub(crate) async fn resets(&mut self, times: u64) -> Outcome {
        self.until(|seen| seen.resets >= times).await
    }

    pub(crate) async fn stop(self) -> Result<Report, Source> {
        self.stop.cancel();
        Ok(timeout(LIMIT, self.task).await???)
    }

    /// The error that it ends with on its own.
    pub(crate) async fn fails(self) -> Result<Error, Source> {
        match timeout(LIMIT, self.task)
            .await
            .map_err(|_| "the consumer did not end")??
        {
            Err(error) => Ok(error),
            Ok(report) => Err(format!("it ended without an error: {report}").into()),
        }
    }
}

/// Has the consumer handle the remaining records, and judges the result for a log that must hold
/// the first `messages` messages. Uses connections of its own, as another process would.
pub(crate) async fn judge(rabbit: &Rabbit, log: &str, consumer: &ConsumerId, messages: u64) -> Outcome {
    let log = insist(|| rabbit.log(log)).await?;
    let store = rabbit.store();
    let rest = Consumer::essentially_once(consumer.clone(), log.clone(), store.clone(), Ledger);
    timeout(LIMIT, rest.run_until_caught_up()).await??;
    let records = insist(|| read_log(&log)).await?;
    let sent: BTreeSet<u64> = records.iter().filter_map(sequence).collect();
    let missing: Vec<u64> = (0..messages).filter(|number| !sent.contains(number)).collect();
    let last = sent.last();
    ensure!(
        missing.is_empty() && sent.len() as u64 == messages,
        "the log lacks {missing:?} of {messages} messages, and its last is {last:?}"
    );
    agree(&records, &store, consumer).await
}

/// Judges a consumer by the records in the log. A node that has just come back may fail at first.
pub(crate) async fn agree(records: &[Record], store: &RabbitStore, consumer: &ConsumerId) -> Outcome {
    let applied = insist(|| read_ledger(store, consumer)).await?;
    let position = insist(|| store.position(consumer)).await?;
    let check = Check::new(records, &applied).position(position.as_ref()).drained();
    Ok(check.findings().judge(Expectation::EssentiallyOnce)?)
}
