//! Messages, a sender that repeats failed appends, a handler that can be watched, and a judge of
//! the [`Ledger`](essentially_once_testkit::Ledger) that a consumer keeps.

use std::{collections::BTreeSet, ops::Range};

use essentially_once::{
    CancellationToken, ConsumerId, Epoch, Error, Handler, HandlerError, KeyValue, Log, NewRecord, OffsetStore, Origin,
    ProducerId, Record, async_trait, backend::Source,
};
use essentially_once_testkit::{Check, Expectation, read_ledger, read_log};
use tokio::sync::watch;

use crate::{LIMIT, Outcome, ensure, insist, insist_and_count};

/// The message with this number and one of three keys.
///
/// # Panics
/// Never: the name of its producer is valid.
pub fn message(number: u64) -> NewRecord {
    let producer = ProducerId::new("web").expect("a name");
    NewRecord::new(format!("message {number};"))
        .key((number % 3).to_string())
        .origin(Origin::new(producer, Epoch::STABLE, number))
}

/// Appends these messages one at a time, and repeats each append until it succeeds.
pub async fn send(log: &dyn Log, numbers: Range<u64>) -> Result<(), Error> {
    for number in numbers {
        let records = [message(number)];
        insist(|| log.append(&records)).await?;
    }
    Ok(())
}

/// Sends until it is cancelled. Returns the number of messages, and of failed appends.
pub async fn send_until(log: impl Log, stop: CancellationToken) -> Result<(u64, usize), Error> {
    let (mut sent, mut failed) = (0, 0);
    while !stop.is_cancelled() {
        let records = [message(sent), message(sent + 1)];
        let (_, failures) = insist_and_count(|| log.append(&records)).await?;
        sent += 2;
        failed += failures.len();
    }
    Ok((sent, failed))
}

/// Checks that the log holds the first `messages` messages, and judges a consumer's ledger of it.
pub async fn judge<S>(log: &dyn Log, store: &S, consumer: &ConsumerId, messages: u64) -> Outcome
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

/// Judges a consumer's ledger by the records of the log.
pub async fn agree<S>(records: &[Record], store: &S, consumer: &ConsumerId) -> Outcome
where
    S: OffsetStore<Tx: KeyValue>,
{
    let applied = read_ledger(store, consumer).await?;
    let position = store.position(consumer).await?;
    let check = Check::new(records, &applied).position(position.as_ref()).drained();
    Ok(check.findings().judge(Expectation::EssentiallyOnce)?)
}

/// The number of a message.
pub fn sequence(record: &Record) -> Option<u64> {
    record.origin.as_ref().map(|origin| origin.sequence)
}

/// The progress of a handler.
#[derive(Clone, Copy, Default, Debug)]
pub struct Seen {
    /// The number of messages handled, including dropped duplicates. Repeated calls for one message
    /// count once.
    pub handled: u64,
    /// How often the consumer went back to the stored position.
    pub resets: u64,
}

/// Wraps a handler, and publishes its progress.
pub struct Watched<H> {
    inner: H,
    seen: watch::Sender<Seen>,
}

impl<H> Watched<H> {
    /// The handler, and where to watch it.
    pub fn new(inner: H) -> (Self, watch::Receiver<Seen>) {
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

/// Waits until the handler's progress meets a condition.
pub async fn until(seen: &mut watch::Receiver<Seen>, enough: impl FnMut(&Seen) -> bool) -> Result<Seen, Source> {
    let waiting = tokio::time::timeout(LIMIT, seen.wait_for(enough)).await;
    match waiting {
        Ok(seen) => Ok(*seen.map_err(|_| "the consumer ended early")?),
        Err(_) => Err("the consumer makes no progress".into()),
    }
}
