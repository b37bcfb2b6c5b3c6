//! Connections that break in the middle of a commit or append, and a silent network.

use std::{sync::Arc, time::Duration};

use essentially_once::{
    Consumer, ConsumerId, Error, Handler, HandlerError, KeyValue, Log, Offset, OffsetStore as _, Record, async_trait,
    backend::{Advance, Revision, Source, Transaction as _},
    consumer::Report,
};
use essentially_once_testkit::{Ledger, read_log};

use crate::{
    Backend, Cut, LIMIT, Outcome, Proxy, Server as _, ensure, eventually, insist, insist_and_count,
    ledger::{Watched, judge, message, send, until},
};

const MESSAGES: u64 = 12;

/// A server, a handle through the proxy, and a direct one.
struct Stage<B: Backend> {
    proxy: Arc<Proxy>,
    through: B,
    around: B,
    _server: B::Server,
}

impl<B: Backend> Stage<B> {
    async fn start(timeout: Duration) -> Result<Self, Source> {
        let server = B::start()?;
        let proxy = Arc::new(Proxy::start(server.port())?);
        let url = B::url(proxy.port());
        let around = B::connect(&server.url(), None).await?;
        let through = insist(|| B::connect(&url, Some(timeout))).await?;
        let stage = Self {
            through,
            around,
            proxy,
            _server: server,
        };
        // The server knows the statements or the script from now on, so a commit is one request.
        stage
            .consume(stage.log("first").await?, &ConsumerId::new("first")?, 1, None)
            .await?;
        Ok(stage)
    }

    /// A log with all messages, some of them sent twice.
    async fn log(&self, name: &str) -> Result<B::Log, Error> {
        let log = self.around.log(name).await?;
        send(&log, 0..MESSAGES / 2).await?;
        log.append(&[message(2), message(1)]).await?;
        send(&log, MESSAGES / 2..MESSAGES).await?;
        Ok(log)
    }

    /// Runs a consumer through the proxy, which cuts the commit with this number, and judges the
    /// result.
    async fn consume(
        &self,
        log: B::Log,
        consumer: &ConsumerId,
        max_batch: usize,
        cut: Option<(u64, Cut)>,
    ) -> Result<Report, Source> {
        let store = self.through.store();
        let reading = insist(|| self.through.log(log.id().name())).await?;
        let handler = CutAt {
            proxy: Arc::clone(&self.proxy),
            bytes: B::COMMIT,
            cut,
            commits: 0,
        };
        // The first commit stores the position alone, without a call of the handler.
        handler.arm();
        let report = Consumer::essentially_once(consumer.clone(), reading, store, handler)
            .max_batch(max_batch)
            .min_backoff(Duration::from_millis(1))
            .max_backoff(Duration::from_millis(20))
            .run_until_caught_up()
            .await?;
        judge(&log, &self.around.store(), consumer, MESSAGES).await?;
        Ok(report)
    }
}

/// Writes a ledger, and cuts the connection at the commit with this number.
struct CutAt {
    proxy: Arc<Proxy>,
    /// What only a commit sends.
    bytes: &'static [u8],
    cut: Option<(u64, Cut)>,
    commits: u64,
}

impl CutAt {
    fn arm(&self) {
        if let Some((nth, cut)) = self.cut
            && nth == self.commits
        {
            self.proxy.cut_at(self.bytes, cut);
        }
    }
}

#[async_trait]
impl<Tx: KeyValue> Handler<Tx> for CutAt {
    async fn handle(&mut self, record: &Record, tx: &mut Tx) -> Result<(), HandlerError> {
        Ledger.handle(record, tx).await
    }

    async fn flush(&mut self, _: &mut Tx) -> Result<(), HandlerError> {
        self.commits += 1;
        self.arm();
        Ok(())
    }
}

/// Does one run per commit, until a run has fewer commits.
///
/// # Errors
/// The first finding.
pub async fn cut_every_commit<B: Backend>(cut: Cut, max_batch: usize) -> Outcome {
    let stage = Stage::<B>::start(LIMIT).await?;
    let mut fenced = 0;
    for nth in 0.. {
        let name = format!("{nth}-{max_batch}");
        let log = stage.log(&name).await?;
        let consumed = stage
            .consume(log, &ConsumerId::new(&name)?, max_batch, Some((nth, cut)))
            .await;
        let report = consumed.map_err(|error| format!("{cut:?}, commit {nth}: {error}"))?;
        if report.restarts == 0 {
            ensure!(nth > MESSAGES / max_batch as u64, "there were only {nth} commits");
            return Ok(());
        }
        ensure!(
            stage.proxy.wait_fired(nth as usize + 1, LIMIT),
            "commit {nth} was not cut"
        );
        // A commit whose reply was lost counts too.
        ensure!(
            report.handled == MESSAGES && report.restarts == 1 + report.fenced,
            "{cut:?}, commit {nth}: {report}"
        );
        fenced += report.fenced;
        // If an adapter repeated it, the first one would fence the second each time.
        ensure!(
            B::COMMITS_LATE && cut == Cut::BeforeReply && fenced <= 2 + nth / 2 || fenced == 0,
            "{fenced} of {nth} were fenced"
        );
    }
    Ok(())
}

/// Cuts every append once. The log then has each message `times` times, and the consumer handles it
/// once.
///
/// # Errors
/// The first finding.
pub async fn cut_every_append<B: Backend>(cut: Cut, times: usize) -> Outcome {
    let stage = Stage::<B>::start(LIMIT).await?;
    let log = stage.through.log("orders").await?;
    for number in 0..MESSAGES {
        let records = [message(number)];
        stage.proxy.cut_at(&B::in_request(&records[0].payload), cut);
        let (_, failures) = insist_and_count(|| log.append(&records)).await?;
        ensure!(
            matches!(failures[..], [Error::Indeterminate { .. }]),
            "{cut:?}, message {number}: {failures:?}"
        );
    }
    ensure!(stage.proxy.fired() == MESSAGES as usize, "{} cuts", stage.proxy.fired());
    let records = read_log(&log).await?;
    let count = |number: u64| {
        records
            .iter()
            .filter(|record| record.payload == message(number).payload)
            .count()
    };
    let counts: Vec<usize> = (0..MESSAGES).map(count).collect();
    ensure!(counts.iter().all(|count| *count == times), "{cut:?}: {counts:?}");
    let consumer = ConsumerId::new("shipping")?;
    let report = stage.consume(log, &consumer, 5, None).await?;
    ensure!(
        (report.handled, report.duplicates) == (MESSAGES, MESSAGES * (times as u64 - 1)),
        "{report}"
    );
    Ok(())
}

/// Writes a ledger, and silences the network at its third call.
struct Silencing(Arc<Proxy>, u64);

#[async_trait]
impl<Tx: KeyValue> Handler<Tx> for Silencing {
    async fn handle(&mut self, record: &Record, tx: &mut Tx) -> Result<(), HandlerError> {
        Ledger.handle(record, tx).await?;
        self.1 += 1;
        if self.1 == 3 {
            self.0.hold(true);
        }
        Ok(())
    }
}

/// A consumer goes on after the network was silent in the middle of a batch.
///
/// # Errors
/// The first finding.
pub async fn a_consumer_outlasts_a_silent_network<B: Backend>(timeout: Duration) -> Outcome {
    let stage = Stage::<B>::start(timeout).await?;
    let (log, id) = (stage.log("orders").await?, ConsumerId::new("shipping")?);
    let (handler, mut seen) = Watched::new(Silencing(Arc::clone(&stage.proxy), 0));
    let consumer = Consumer::essentially_once(id.clone(), log.clone(), stage.through.store(), handler)
        .max_batch(2)
        .min_backoff(Duration::from_millis(1))
        .max_backoff(Duration::from_millis(20));
    let running = tokio::spawn(consumer.run_until_caught_up());
    // First the commit gets no reply, then the connection that reads the position.
    until(&mut seen, |seen| seen.resets == 2).await?;
    stage.proxy.hold(false);
    let report = running.await??;
    ensure!(report.restarts >= 2, "{report}");
    judge(&log, &stage.around.store(), &id, MESSAGES).await
}

/// A commit that the network holds back is in doubt, and fences when it arrives.
///
/// # Errors
/// The first finding.
pub async fn a_commit_held_back_is_in_doubt_and_fences_when_it_arrives<B: Backend>(timeout: Duration) -> Outcome {
    let stage = Stage::<B>::start(timeout).await?;
    let (log, id) = (stage.around.log("orders").await?, ConsumerId::new("shipping")?);
    let begin = async |store: &B::Store, id: &ConsumerId, value: &[u8]| {
        let mut tx = store.begin(id).await?;
        tx.put(b"key", value).await?;
        Ok::<_, Error>(tx)
    };
    let first = || {
        let (log, next) = (log.id().clone(), Offset::from(1));
        Advance::new(log, next, Revision::NONE, Revision::NONE.next_epoch())
    };
    let store = stage.through.store();
    // The server knows the statements or the script then.
    let warm = ConsumerId::new("warm")?;
    for consumer in [&warm, &id] {
        // Each may have a connection of its own.
        insist(|| store.position(consumer)).await?;
    }
    insist(|| async {
        match begin(&store, &warm, b"warm").await?.commit(first()).await {
            // The one before was made after all.
            Err(Error::Fenced { .. }) => Ok(()),
            committed => committed,
        }
    })
    .await?;
    let tx = insist(|| begin(&store, &id, b"held back")).await?;
    stage.proxy.hold(true);
    let held_back = tx.commit(first()).await;
    ensure!(matches!(held_back, Err(Error::Indeterminate { .. })), "{held_back:?}");
    let store = stage.around.store();
    ensure!(store.position(&id).await?.is_none(), "the proxy let it pass");
    stage.proxy.hold(false);
    let arrived = eventually(|| async {
        let position = store.position(&id).await?;
        Ok(position.map(drop).ok_or_else(|| "it has not arrived".into()))
    });
    arrived.await?;
    let next = begin(&store, &id, b"next").await?.commit(first()).await;
    ensure!(matches!(next, Err(Error::Fenced { .. })), "{next:?}");
    let value = store.begin(&id).await?.get(b"key").await?;
    ensure!(value.as_deref() == Some(b"held back"), "{value:?}");
    Ok(())
}

/// An append that the network holds back is in doubt, and arrives later.
///
/// # Errors
/// The first finding.
pub async fn an_append_held_back_is_in_doubt<B: Backend>(timeout: Duration) -> Outcome {
    let stage = Stage::<B>::start(timeout).await?;
    let log = insist(|| stage.through.log("orders")).await?;
    // The server knows the statement then.
    let warm = insist(|| stage.through.log("warm")).await?;
    let records = [message(0)];
    insist(|| warm.append(&records)).await?;
    stage.proxy.cut_at(b"message 0;", Cut::BeforeReply);
    stage.proxy.hold(true);
    let held_back = log.append(&records).await;
    ensure!(matches!(held_back, Err(Error::Indeterminate { .. })), "{held_back:?}");
    stage.proxy.hold(false);
    ensure!(stage.proxy.wait_fired(1, LIMIT), "it never arrived");
    send(&log, 0..MESSAGES).await?;
    stage.consume(log, &ConsumerId::new("shipping")?, 5, None).await?;
    Ok(())
}

/// A reader that hears nothing gives up.
///
/// # Errors
/// The first finding.
pub async fn a_reader_in_silence_gives_up<B: Backend>(timeout: Duration) -> Outcome {
    let stage = Stage::<B>::start(timeout).await?;
    let around = stage.around.log("orders").await?;
    let log = insist(|| stage.through.log("orders")).await?;
    let mut reader = insist(|| log.read(Offset::ZERO)).await?;
    send(&around, 0..1).await?;
    ensure!(reader.next(10).await?.len() == 1, "one record");
    stage.proxy.hold(true);
    let silence = tokio::time::timeout(LIMIT, reader.next(10)).await?;
    ensure!(matches!(silence, Err(Error::Unavailable { .. })), "{silence:?}");
    stage.proxy.hold(false);
    send(&around, 1..2).await?;
    let mut reader = insist(|| log.read(Offset::ZERO)).await?;
    ensure!(reader.next(10).await?.len() == 2, "two records");
    Ok(())
}
