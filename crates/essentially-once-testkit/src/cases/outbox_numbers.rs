//! Cases for the origins of records that a commit sends, [O3](essentially_once::Outbox#contract).

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use essentially_once::{
    Consumer, Epoch, Error, KeyValue, Log, NewRecord, Offset, OffsetStore, Origin, ProducerId, Record, async_trait,
    backend::Transaction,
    relay::{Destination, Relay},
};
use tokio::{
    sync::Barrier,
    task::{JoinSet, yield_now},
};

use super::{
    common::{consumer, payloads, soon},
    outbox::{Sender, all, found, open, outbox},
    restart::{once_ready, up},
};
use crate::{
    harness::{Backend, Harness, Support},
    ledger::{Ledger, read_ledger},
    violation::{CaseResult, Violation, ensure},
};

/// Checks that the origins of the records continue those up to `last`. Returns the last one.
pub(crate) fn continued(when: &str, last: Option<&Origin>, records: &[Record]) -> Result<Origin, Violation> {
    let mut last = last.cloned();
    for record in records {
        let Some(origin) = &record.origin else {
            return Err(Violation::new(format!("{when}: a record has no origin")));
        };
        ensure!(
            origin.numbering.epoch() == Epoch::STABLE,
            "{when}: a record has the origin {origin}, and its epoch is not the stable one"
        );
        if let Some(last) = &last {
            ensure!(
                origin.numbering == last.numbering,
                "{when}: after the origin {last}, a record has the origin {origin} of another producer"
            );
            ensure!(
                origin.sequence > last.sequence,
                "{when}: after the origin {last}, a record has the origin {origin}, which is no higher"
            );
        }
        last = Some(origin.clone());
    }
    last.ok_or_else(|| Violation::new(format!("{when}: the outbox is empty")))
}

/// O3: the numbers of an outbox rise within and across commits, handles and, where they share it,
/// consumers. Each outbox has its own producer.
pub(super) async fn o3_each_outbox_numbers_its_records<H: Harness>(harness: &H, backend: &H::Backend) -> CaseResult {
    let names = ["a", "b"].map(|name| backend.outbox_name(name));
    let second = match harness.capabilities().shared_outboxes {
        Support::Yes => "billing",
        Support::No(_) => "shipping",
    };
    let sender = async |consumer| Sender::open(backend, consumer).await;
    let senders = [
        sender("shipping").await?,
        sender(second).await?,
        sender("shipping").await?,
    ];
    for commit in 0..9 {
        // The third handle belongs to the consumer of the first.
        let sender = &senders[commit % 3];
        let record = |n: usize| NewRecord::new(format!("{commit}.{n}"));
        let (a, b) = (&*names[0], &*names[1]);
        sender
            .commit(&[(a, record(0)), (b, record(1)), (a, record(2)), (b, record(3))])
            .await?;
    }
    let mut last = Vec::new();
    for name in ["a", "b"] {
        let records = found(backend, name).await?;
        ensure!(records.len() == 18, "outbox {name} has {} of 18 records", records.len());
        last.push(continued(&format!("in outbox {name}"), None, &records)?);
    }
    ensure!(
        last[0].numbering.producer() != last[1].numbering.producer(),
        "two outboxes have the same producer, {}",
        last[0].numbering.producer()
    );
    Ok(())
}

/// O3: a number is never used again, even if retention has removed the record that had it.
pub(super) async fn o3_numbers_rise_after_truncation<H: Harness>(harness: &H, backend: &H::Backend) -> CaseResult {
    let sender = Sender::open(backend, "shipping").await?;
    let mut last = None;
    for n in 0..3 {
        last = Some(one_more(backend, &sender, n, "at first", last.as_ref()).await?);
    }
    if let Some(newest) = found(backend, "a").await?.last() {
        truncated(backend, newest.offset).await?;
    }
    for n in 3..5 {
        last = Some(one_more(backend, &sender, n, "after truncation", last.as_ref()).await?);
    }
    if harness.capabilities().truncate_all == Support::Yes {
        let end = open(backend, "a").await?.bounds().await?.end;
        truncated(backend, end).await?;
        for n in 5..7 {
            last = Some(one_more(backend, &sender, n, "after every record was removed", last.as_ref()).await?);
        }
    }
    Ok(())
}

/// O3: a number is never used again, even if [`Log::remove_before`] has removed the record that had
/// it.
pub(super) async fn o3_numbers_rise_after_records_were_removed<H: Harness>(_: &H, backend: &H::Backend) -> CaseResult {
    let sender = Sender::open(backend, "shipping").await?;
    let mut last = None;
    for round in 0..3u64 {
        for n in 0..3 {
            let when = format!("after everything was removed {round} times");
            last = Some(one_more(backend, &sender, 3 * round + n, &when, last.as_ref()).await?);
        }
        let outbox = open(backend, "a").await?;
        let end = outbox.bounds().await?.end;
        let removed = outbox.remove_before(end).await?;
        let earliest = outbox.bounds().await?.earliest;
        ensure!(
            (removed, earliest) == (3, end),
            "round {round}: of 3 records before {end}, {removed} were removed, and the earliest is at {earliest}"
        );
    }
    Ok(())
}

/// Lets retention remove records of the outbox.
async fn truncated<B: Backend>(backend: &B, before: Offset) -> CaseResult {
    let earliest = open(backend, "a").await?.bounds().await?.earliest;
    backend.truncate("a", before).await?;
    let now = open(backend, "a").await?.bounds().await?.earliest;
    ensure!(
        now > earliest,
        "the harness was to remove the records before {before}, but the earliest record is still at {earliest}"
    );
    Ok(())
}

/// Sends record `n`, and checks that its origin continues those up to `last`.
async fn one_more<B: Backend>(
    backend: &B,
    sender: &Sender<B::Store>,
    n: u64,
    when: &str,
    last: Option<&Origin>,
) -> Result<Origin, Violation> {
    let record = NewRecord::new(n.to_string());
    once_ready(|| async { sender.commit(&[(&backend.outbox_name("a"), record.clone())]).await }).await?;
    let records = once_ready(|| all(backend, "a")).await?;
    let newest = &records[records.len().saturating_sub(1)..];
    ensure!(
        payloads(newest) == [n.to_string()],
        "{when}: the newest record is {:?}, not {n}",
        payloads(newest)
    );
    continued(when, last, newest)
}

/// O3: a restart changes neither the producer nor the epoch, and no number is used again. In one
/// round no record is left to continue from.
pub(super) async fn o3_numbers_rise_after_a_restart<H: Harness>(harness: &H, backend: &H::Backend) -> CaseResult {
    let empties = harness.capabilities().truncate_all == Support::Yes;
    let mut last = None;
    for round in 0..3u64 {
        let sender = up(|| Sender::open(backend, "shipping")).await?;
        for n in 0..2 {
            let when = format!("after {round} restarts");
            last = Some(one_more(backend, &sender, 2 * round + n, &when, last.as_ref()).await?);
        }
        if empties && round == 1 {
            let end = open(backend, "a").await?.bounds().await?.end;
            backend.truncate("a", end).await?;
        }
        backend.restart().await?;
    }
    Ok(())
}

/// O2 and O3: consumers commit at the same time. No number occurs twice, the numbers have the order
/// of the log, and so have the commits.
pub(super) async fn o3_concurrent_senders_share_no_number<H: Harness>(_: &H, backend: &H::Backend) -> CaseResult {
    const ROUNDS: usize = 10;
    // An odd number, so that a commit held back until the next one leaves its round.
    const SENDERS: usize = 5;
    let barrier = Arc::new(Barrier::new(SENDERS));
    let mut sending = JoinSet::new();
    for number in 0..SENDERS {
        let sender = Sender::open(backend, &format!("sender-{number}")).await?;
        let (name, barrier) = (backend.outbox_name("a"), Arc::clone(&barrier));
        sending.spawn(async move {
            for round in 0..ROUNDS {
                barrier.wait().await;
                // Databases may refuse concurrent commits of different consumers.
                while sender.next().await? == (round as u64).into() {
                    // Some commit long after they send, so that commits overtake each other.
                    let pause = 5 * ((number + round) % SENDERS);
                    match send_two(&sender, &name, &format!("{round} {number}"), pause).await {
                        Err(error) if !error.is_transient() => return Err(error),
                        _ => yield_now().await,
                    }
                }
            }
            Ok(())
        });
    }
    while let Some(sent) = soon("concurrent commits", sending.join_next()).await? {
        sent.map_err(|error| Violation::new(format!("a sender panicked: {error}")))??;
    }
    let records = found(backend, "a").await?;
    continued("in the order of the log", None, &records)?;
    let found = payloads(&records);
    let mut sorted = found.clone();
    sorted.sort();
    let expected: Vec<_> = (0..ROUNDS)
        .flat_map(|round| (0..SENDERS).flat_map(move |sender| (0..2).map(move |n| format!("{round} {sender} {n}"))))
        .collect();
    ensure!(
        sorted == expected,
        "{} records were sent, and the outbox has {}: {found:?}",
        expected.len(),
        found.len()
    );
    let round_of = |payload: &String| payload.split(' ').next().map(str::to_owned);
    let rounds: Vec<_> = found.iter().map(round_of).collect();
    ensure!(
        rounds.is_sorted(),
        "records of a later commit come before those of an earlier one: {found:?}"
    );
    for sender in 0..SENDERS {
        let is_own = |payload: &&String| payload.split(' ').nth(1) == Some(&sender.to_string());
        let own: Vec<_> = found.iter().filter(is_own).collect();
        ensure!(own.is_sorted(), "the records of one consumer are out of order: {own:?}");
    }
    Ok(())
}

/// Sends two records in a commit, and lets others go on for a while before it.
async fn send_two<S: OffsetStore<Tx: KeyValue>>(
    sender: &Sender<S>,
    name: &str,
    payload: &str,
    pause: usize,
) -> Result<(), Error> {
    let (mut tx, advance) = sender.begin().await?;
    for n in 0..2 {
        let record = NewRecord::new(format!("{payload} {n}"));
        outbox(&mut tx)?.send(name, record).await?;
    }
    for _ in 0..pause {
        yield_now().await;
    }
    tx.commit(advance).await
}

/// [`send`](essentially_once::Outbox::send): an origin is refused, and so is a name that no log can
/// have. The rest of the transaction is committed.
pub(super) async fn o3_a_record_with_an_origin_is_refused<H: Harness>(_: &H, backend: &H::Backend) -> CaseResult {
    let sender = Sender::open(backend, "shipping").await?;
    let name = backend.outbox_name("a");
    let (mut tx, advance) = sender.begin().await?;
    tx.put(b"n", b"1").await?;
    outbox(&mut tx)?.send(&name, NewRecord::new("1")).await?;
    let foreign = Origin::new(ProducerId::new("web")?, Epoch::new(7), 9);
    let result = outbox(&mut tx)?
        .send(&name, NewRecord::new("foreign").origin(foreign))
        .await;
    ensure!(
        matches!(result, Err(Error::Failed { .. })),
        "sending a record with an origin returned {result:?}"
    );
    for wrong in ["", "two words"] {
        let result = outbox(&mut tx)?.send(wrong, NewRecord::new("lost")).await;
        ensure!(
            matches!(result, Err(Error::InvalidName { .. })),
            "sending to {wrong:?} returned {result:?}"
        );
    }
    outbox(&mut tx)?.send(&name, NewRecord::new("2")).await?;
    tx.commit(advance).await?;
    let records = found(backend, "a").await?;
    ensure!(
        payloads(&records) == ["1", "2"],
        "a transaction with a refused record sent {:?}",
        payloads(&records)
    );
    continued("after a refusal", None, &records)?;
    Ok(())
}

/// A log whose appends take effect, while every second reply is lost.
struct Lossy {
    log: Arc<dyn Log>,
    appends: AtomicUsize,
}

#[async_trait]
impl Destination for Lossy {
    async fn send(&self, records: &[NewRecord]) -> Result<(), Error> {
        self.log.append(records).await?;
        match self.appends.fetch_add(1, Ordering::SeqCst) % 2 {
            0 => Err(Error::indeterminate("append", "the case dropped the reply")),
            _ => Ok(()),
        }
    }
}

/// O3: two outboxes, a relay of each that loses replies, one log, and its consumer, which handles
/// each record once and in order.
pub(super) async fn o3_a_consumer_behind_a_relay_handles_each_record_once<H: Harness>(
    _: &H,
    backend: &H::Backend,
) -> CaseResult {
    let bus = backend.log("bus").await?;
    let names = ["a", "b"].map(|name| backend.outbox_name(name));
    for n in 0..8 {
        // A new handle each time, as after a restart of the service.
        let sender = Sender::open(backend, "shipping").await?;
        let record = |name: &str| NewRecord::new("").key(format!("{name}{n}"));
        sender
            .commit(&[(&names[0], record("a")), (&names[1], record("b"))])
            .await?;
        if n % 4 != 3 {
            continue;
        }
        for name in ["a", "b"] {
            let lossy = Lossy {
                log: Arc::clone(&bus),
                appends: AtomicUsize::default(),
            };
            let (outbox, store) = (open(backend, name).await?, backend.store().await?);
            let relay = Consumer::at_least_once(consumer(&format!("relay-{name}")), outbox, store, Relay::to(lossy))
                .max_batch(3)
                .min_backoff(Duration::ZERO)
                .max_backoff(Duration::ZERO);
            soon("the relay", relay.run_until_caught_up()).await??;
        }
    }
    let billing = consumer("billing");
    let handling = Consumer::essentially_once(billing.clone(), bus, backend.store().await?, Ledger).accept_volatile();
    let report = soon("the consumer", handling.run_until_caught_up()).await??;
    ensure!(
        report.duplicates > 0,
        "the relay doubled nothing, so the case proves nothing"
    );
    let applied = read_ledger(&backend.store().await?, &billing).await?;
    for name in ["a", "b"] {
        let keys = applied.iter().filter_map(|applied| applied.key.as_deref());
        let keys = keys.map(|key| String::from_utf8_lossy(key).into_owned());
        let handled: Vec<_> = keys.filter(|key| key.starts_with(name)).collect();
        let expected: Vec<_> = (0..8).map(|n| format!("{name}{n}")).collect();
        ensure!(
            handled == expected,
            "of {expected:?}, the consumer behind the relay handled {handled:?}"
        );
    }
    Ok(())
}
