//! Cases for sending with a commit, [O1, O2, O4 and O5](essentially_once::Outbox#contract).

use std::sync::{Arc, atomic::Ordering};

use essentially_once::{
    ConsumerId, Error, KeyValue, Log, NewRecord, Offset, OffsetStore, Outbox, Record,
    backend::{Advance, Transaction},
};
use tokio::time::timeout;

use super::{
    common::{QUIET, advance, consumer, payloads, soon},
    compare,
    outbox_numbers::continued,
    restart::{up, while_restarting},
    store::{position, value},
};
use crate::{
    harness::{Backend, Harness},
    violation::{CaseResult, Violation, ensure},
};

/// A consumer that sends, on handles of its own. Each commit moves its position by one.
pub(super) struct Sender<S> {
    store: S,
    log: Arc<dyn Log>,
    consumer: ConsumerId,
}

impl<S: OffsetStore<Tx: KeyValue>> Sender<S> {
    pub(super) async fn open(backend: &impl Backend<Store = S>, name: &str) -> Result<Self, Error> {
        Ok(Self {
            store: backend.store().await?,
            log: backend.log("orders").await?,
            consumer: consumer(name),
        })
    }

    /// Begins a transaction, and returns what to commit it with.
    pub(super) async fn begin(&self) -> Result<(S::Tx, Advance), Error> {
        let position = self.store.position(&self.consumer).await?;
        let next = position.as_ref().map_or(Offset::ZERO, |position| position.next);
        let advance = advance(position.as_ref(), &*self.log, next.successor());
        Ok((self.store.begin(&self.consumer).await?, advance))
    }

    /// Sends the records in one commit, each to the outbox of that name.
    pub(super) async fn commit(&self, sent: &[(&str, NewRecord)]) -> Result<(), Error> {
        let (mut tx, advance) = self.begin().await?;
        for (name, record) in sent {
            outbox(&mut tx)?.send(name, record.clone()).await?;
        }
        tx.commit(advance).await
    }

    /// The next offset of the stored position.
    pub(super) async fn next(&self) -> Result<Offset, Error> {
        let position = self.store.position(&self.consumer).await?;
        Ok(position.map_or(Offset::ZERO, |position| position.next))
    }
}

pub(crate) fn outbox<Tx: Transaction>(tx: &mut Tx) -> Result<&mut dyn Outbox, Error> {
    tx.outbox().ok_or_else(|| {
        Error::failed(
            "send",
            "the harness claims outboxes, but `Transaction::outbox` returned None",
        )
    })
}

/// Opens an outbox to which the consumer `shipping` sends.
pub(super) async fn open<B: Backend>(backend: &B, name: &str) -> Result<Arc<dyn Log>, Error> {
    backend.outbox_of(&consumer("shipping"), name).await
}

/// All its records, as a new handle reads them.
pub(super) async fn all<B: Backend>(backend: &B, name: &str) -> Result<Vec<Record>, Error> {
    read_all(&*open(backend, name).await?).await
}

async fn read_all(outbox: &dyn Log) -> Result<Vec<Record>, Error> {
    let (earliest, end) = (outbox.bounds().await?.earliest, outbox.readable_end().await?);
    let mut found: Vec<Record> = Vec::new();
    if earliest < end {
        let mut reader = outbox.read(earliest).await?;
        while found.last().is_none_or(|last| last.offset.successor() < end) {
            found.extend(reader.next(1_000).await?);
        }
    }
    Ok(found)
}

pub(super) async fn found<B: Backend>(backend: &B, name: &str) -> Result<Vec<Record>, Violation> {
    found_of(backend, &consumer("shipping"), name).await
}

/// The records of an outbox to which this consumer sends.
pub(crate) async fn found_of<B: Backend>(
    backend: &B,
    consumer: &ConsumerId,
    name: &str,
) -> Result<Vec<Record>, Violation> {
    let reading = async { read_all(&*backend.outbox_of(consumer, name).await?).await };
    Ok(soon(&format!("the records of outbox {name}"), reading).await??)
}

/// O1: the records, the state and the position of a commit are there together, for another handle
/// as well, as soon as the commit is acknowledged.
pub(super) async fn o1_records_are_sent_with_the_commit<H: Harness>(_: &H, backend: &H::Backend) -> CaseResult {
    let (sender, other) = (Sender::open(backend, "shipping").await?, backend.store().await?);
    let (name, mut expected) = (backend.outbox_name("a"), Vec::new());
    for n in 1..=4u64 {
        let (mut tx, advance) = sender.begin().await?;
        tx.put(b"n", &n.to_be_bytes()).await?;
        // One of the commits sends nothing.
        for record in 0..n % 4 {
            expected.push(format!("{n}.{record}"));
            let record = NewRecord::new(format!("{n}.{record}"));
            outbox(&mut tx)?.send(&name, record).await?;
        }
        tx.commit(advance).await?;
        let next = position(&other, &sender.consumer).await?.next;
        let state = value(&other, &sender.consumer, b"n").await?;
        let sent = payloads(&found(backend, "a").await?);
        ensure!(
            (next, &state, &sent) == (n.into(), &Some(n.to_be_bytes().to_vec()), &expected),
            "after commit {n}: the position is {next}, the state is {state:?}, and the outbox has {sent:?}, not \
             {expected:?}"
        );
    }
    Ok(())
}

/// O1: a stale commit sends nothing, nor does one for another log, nor a transaction that is
/// dropped or rolled back. Nothing of it appears with a later commit of the same handle.
pub(super) async fn o1_what_is_not_committed_sends_nothing<H: Harness>(_: &H, backend: &H::Backend) -> CaseResult {
    let (sender, other) = (Sender::open(backend, "shipping").await?, backend.log("other").await?);
    let name = backend.outbox_name("a");
    let (tx, stale) = sender.begin().await?;
    tx.rollback().await?;
    sender.commit(&[(&name, NewRecord::new("1"))]).await?;
    for ending in ["stale", "for another log", "rolled back", "dropped"] {
        let (mut tx, mut advance) = sender.begin().await?;
        outbox(&mut tx)?.send(&name, NewRecord::new(ending)).await?;
        let is_refused = match ending {
            "stale" => matches!(tx.commit(stale.clone()).await, Err(Error::Fenced { .. })),
            "for another log" => {
                advance.log = other.id().clone();
                matches!(tx.commit(advance).await, Err(Error::WrongLog { .. }))
            }
            "rolled back" => tx.rollback().await.is_ok(),
            _ => {
                drop(tx);
                true
            }
        };
        ensure!(is_refused, "a transaction that was {ending} was not refused as such");
        let sent = payloads(&found(backend, "a").await?);
        ensure!(
            sent == ["1"],
            "a transaction that was {ending} sent something: {sent:?}"
        );
    }
    sender.commit(&[(&name, NewRecord::new("2"))]).await?;
    let sent = payloads(&found(backend, "a").await?);
    ensure!(
        sent == ["1", "2"],
        "a commit sent what was not committed before: {sent:?}"
    );
    Ok(())
}

/// O1: while the backend restarts, the outbox has a record for each step of the position.
pub(super) async fn o1_a_restart_never_parts_records_from_the_position<H: Harness>(
    harness: &H,
    backend: &H::Backend,
) -> CaseResult {
    let name = &backend.outbox_name("a");
    while_restarting(harness, backend, async |stop, progress| {
        let mut sender = up(|| Sender::open(backend, "shipping")).await?;
        while !stop.load(Ordering::SeqCst) {
            if let Err(error) = send_next(&sender, name).await {
                sender = up(|| Sender::open(backend, "shipping")).await?;
                agree(backend, &format!("after {error}")).await?;
            }
            progress.fetch_add(1, Ordering::SeqCst);
            tokio::task::yield_now().await;
        }
        Ok(())
    })
    .await?;
    // An idle restart: everything was acknowledged.
    agree(backend, "before the last restart").await?;
    backend.restart().await?;
    agree(backend, "after the last restart").await
}

/// Sends the number of the position.
pub(super) async fn send_next<S: OffsetStore<Tx: KeyValue>>(sender: &Sender<S>, name: &str) -> Result<(), Error> {
    let next = sender.next().await?;
    sender.commit(&[(name, NewRecord::new(next.to_string()))]).await
}

/// The outbox has exactly one record for each offset below the position.
pub(super) async fn agree<B: Backend>(backend: &B, when: &str) -> CaseResult {
    // Another restart may come at any time, so each try opens new handles.
    let position = async || up(async || Sender::open(backend, "shipping").await?.next().await).await;
    let mut next = position().await?;
    let records = loop {
        let records = up(|| all(backend, "a")).await?;
        // A commit whose reply was lost may arrive in between.
        match position().await? {
            same if same == next => break records,
            later => next = later,
        }
    };
    let sent = payloads(&records);
    let expected: Vec<_> = (0..next.lo()).map(|n| Offset::from(n).to_string()).collect();
    ensure!(
        sent == expected,
        "{when}: the position is {next}, but the outbox has {} records, and the last are {:?}",
        sent.len(),
        &sent[sent.len().saturating_sub(3)..]
    );
    match records.is_empty() {
        true => Ok(()),
        false => continued(when, None, &records).map(drop),
    }
}

/// O2: records of one transaction to two outboxes, with several keys, and of several commits.
pub(super) async fn o2_records_keep_their_order<H: Harness>(_: &H, backend: &H::Backend) -> CaseResult {
    let sender = Sender::open(backend, "shipping").await?;
    let names = ["a", "b"].map(|name| backend.outbox_name(name));
    let mut expected = [Vec::new(), Vec::new()];
    for commit in 0..4 {
        let mut sent = Vec::new();
        for n in 0..9 {
            let payload = format!("{commit}.{n}");
            let record = NewRecord::new(payload.clone());
            let record = match n % 3 {
                0 => record.key("z"),
                1 => record.key("a"),
                _ => record,
            };
            // a, a, b, b, a, ...
            let to = n / 2 % 2;
            expected[to].push(payload);
            sent.push((&*names[to], record));
        }
        sender.commit(&sent).await?;
    }
    for (name, expected) in ["a", "b"].iter().zip(expected) {
        let sent = payloads(&found(backend, name).await?);
        ensure!(sent == expected, "sent {expected:?} to outbox {name}, found {sent:?}");
    }
    Ok(())
}

/// O2: key, headers and payload to the byte.
pub(super) async fn o2_a_record_comes_back_as_it_was_sent<H: Harness>(_: &H, backend: &H::Backend) -> CaseResult {
    let sender = Sender::open(backend, "shipping").await?;
    let every_byte: Vec<u8> = (0..=255).collect();
    let records = [
        NewRecord::new(""),
        NewRecord::new("empty key").key(""),
        NewRecord::new(every_byte.clone()).key(every_byte.clone()),
        NewRecord::new("headers")
            .key("k")
            .header("z", "1")
            .header("a", every_byte)
            .header("z", "")
            .header("naïve ☃", "2"),
    ];
    let name = backend.outbox_name("a");
    for batch in records.chunks(2) {
        let sent: Vec<_> = batch.iter().map(|record| (&*name, record.clone())).collect();
        sender.commit(&sent).await?;
    }
    let found = found(backend, "a").await?;
    ensure!(
        found.len() == records.len(),
        "sent {} records, found {}",
        records.len(),
        found.len()
    );
    for (n, (mut found, sent)) in found.into_iter().zip(&records).enumerate() {
        // The commit gives it one.
        found.origin = None;
        let differing = compare::from_appended(&found, sent);
        ensure!(
            differing.is_none() && found.malformed.is_none(),
            "record {n} did not come back as it was sent: {}",
            differing.unwrap_or_else(|| "it is called malformed".into())
        );
    }
    Ok(())
}

/// [`send`](Outbox::send): a record of exactly the limit is sent. A larger one is refused with the
/// limit, and the rest of the transaction is committed.
pub(super) async fn o2_a_record_over_the_limit_is_refused_and_stages_nothing<H: Harness>(
    harness: &H,
    backend: &H::Backend,
) -> CaseResult {
    let Some(limit) = harness.capabilities().record_limit else {
        return Err(Violation::new("the harness states no record limit"));
    };
    let sender = Sender::open(backend, "shipping").await?;
    let name = backend.outbox_name("a");
    let (mut tx, advance) = sender.begin().await?;
    tx.put(b"n", b"1").await?;
    outbox(&mut tx)?.send(&name, NewRecord::new("before")).await?;
    for over in [
        NewRecord::new(vec![b'x'; limit + 1]),
        NewRecord::new(vec![b'x'; limit - 5]).key("123").header("456", ""),
    ] {
        let size = over.size();
        let result = outbox(&mut tx)?.send(&name, over).await;
        ensure!(
            matches!(&result, Err(Error::TooLarge { limit: named, .. }) if *named == limit),
            "sending {size} bytes, where the limit is {limit}, returned {result:?}"
        );
    }
    let largest = NewRecord::new(vec![b'x'; limit - 6]).key("123").header("456", "");
    let result = outbox(&mut tx)?.send(&name, largest).await;
    ensure!(
        result.is_ok(),
        "sending {limit} bytes, where the limit is {limit}, returned {result:?}"
    );
    outbox(&mut tx)?.send(&name, NewRecord::new("after")).await?;
    tx.commit(advance).await?;
    let sizes: Vec<_> = found(backend, "a")
        .await?
        .iter()
        .map(|record| record.payload.len())
        .collect();
    ensure!(
        sizes == [6, limit - 6, 5],
        "a transaction with refused records sent payloads of {sizes:?} bytes"
    );
    let state = value(&sender.store, &sender.consumer, b"n").await?;
    ensure!(
        state.as_deref() == Some(b"1"),
        "a transaction with refused records left n = {state:?}"
    );
    Ok(())
}

/// O4: a waiting reader and a new one see nothing of an open transaction. The commit wakes the
/// waiting one, which then also finds the position.
pub(super) async fn o4_no_reader_sees_a_record_before_its_commit<H: Harness>(
    _: &H,
    backend: &H::Backend,
) -> CaseResult {
    let (sender, other) = (
        Sender::open(backend, "shipping").await?,
        Sender::open(backend, "shipping").await?,
    );
    let name = backend.outbox_name("a");
    sender.commit(&[(&name, NewRecord::new("0"))]).await?;
    let reading = open(backend, "a").await?;
    let mut reader = reading.read(reading.bounds().await?.earliest).await?;
    let first = payloads(&soon("the first record", reader.next(10)).await??);
    ensure!(first == ["0"], "after one commit, a reader finds {first:?}");
    for n in 1..=3u64 {
        // Opened before the transaction, which may hold a lock that opening needs.
        let others = open(backend, "a").await?;
        let (mut tx, advance) = sender.begin().await?;
        outbox(&mut tx)?.send(&name, NewRecord::new(n.to_string())).await?;
        if let Ok(early) = timeout(QUIET, reader.next(10)).await {
            return Err(Violation::new(format!(
                "before its commit, a waiting reader sees record {n}: {early:?}"
            )));
        }
        let early = payloads(&soon("the records of the outbox", read_all(&*others)).await??);
        ensure!(
            early.len() as u64 == n,
            "before the commit of record {n}, a new reader sees {early:?}"
        );
        // The reader comes first, so that it waits when the commit is made.
        let (seen, committed) = tokio::join!(
            biased;
            async {
                let seen = soon(&format!("record {n}"), reader.next(10)).await??;
                Ok::<_, Violation>((payloads(&seen), other.next().await?))
            },
            tx.commit(advance),
        );
        committed?;
        let (seen, next) = seen?;
        ensure!(
            seen == [n.to_string()],
            "after the commit of record {n}, a reader sees {seen:?}"
        );
        ensure!(
            next == (n + 1).into(),
            "a reader saw record {n} before its commit: the position was {next}"
        );
    }
    Ok(())
}

/// O5: two consumers, on handles of their own, send to the same outboxes. The first record creates
/// an outbox.
pub(super) async fn o5_consumers_share_an_outbox<H: Harness>(_: &H, backend: &H::Backend) -> CaseResult {
    let senders = [
        Sender::open(backend, "shipping").await?,
        Sender::open(backend, "billing").await?,
    ];
    let names = ["a", "b"].map(|name| backend.outbox_name(name));
    let mut expected = Vec::new();
    for n in 0..6 {
        let payload = format!("{n} by {}", senders[n % 2].consumer);
        let record = || NewRecord::new(payload.clone());
        senders[n % 2]
            .commit(&[(&names[0], record()), (&names[1], record())])
            .await?;
        expected.push(payload);
    }
    for name in ["a", "b"] {
        let sent = payloads(&found(backend, name).await?);
        ensure!(
            sent == expected,
            "two consumers sent {expected:?} to outbox {name}, found {sent:?}"
        );
    }
    Ok(())
}
