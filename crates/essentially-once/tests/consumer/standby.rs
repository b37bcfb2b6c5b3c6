//! Several instances of one consumer: one is active, and the others stand by. All times are
//! simulated.

use std::sync::{Mutex, atomic::AtomicU64};

use essentially_once::{
    consumer::Report,
    memory::{MemoryLog, MemoryStore},
};
use tokio::{task::JoinHandle, time::Instant};

use super::*;

/// State that the instances of one consumer share.
#[derive(Clone, Default)]
struct Shared {
    memory: Memory,
    calls: Arc<AtomicU64>,
    /// Which instance handled each record.
    by: Arc<Mutex<Vec<usize>>>,
}

struct Slow {
    shared: Shared,
    instance: usize,
    takes: Duration,
    /// The record that can never be handled.
    poison: Option<Offset>,
}

#[async_trait::async_trait]
impl Handler<MemoryTx> for Slow {
    async fn handle(&mut self, record: &Record, tx: &mut MemoryTx) -> Result<(), HandlerError> {
        self.shared.calls.fetch_add(1, Ordering::SeqCst);
        tokio::time::sleep(self.takes).await;
        if self.poison == Some(record.offset) {
            return Err(HandlerError::retry("poison"));
        }
        self.shared.by.lock().unwrap().push(self.instance);
        support::count_one(tx, &record.payload).await?;
        Ok(())
    }
}

impl Shared {
    fn log(&self) -> MemoryLog {
        self.memory.log("orders").unwrap()
    }

    fn store(&self) -> MemoryStore {
        self.memory.store()
    }

    async fn append(&self, records: std::ops::Range<u64>) {
        let records: Vec<_> = records.map(|n| NewRecord::new(n.to_string())).collect();
        self.log().append(&records).await.unwrap();
    }

    fn consumer(
        &self,
        instance: usize,
        takes: Duration,
    ) -> Consumer<MemoryStore, Slow, essentially_once::consumer::EssentiallyOnce> {
        let handler = Slow {
            shared: self.clone(),
            instance,
            takes,
            poison: None,
        };
        Consumer::essentially_once(shipping(), self.log(), self.store(), handler).accept_volatile()
    }

    fn calls(&self) -> u64 {
        self.calls.load(Ordering::SeqCst)
    }

    async fn next(&self) -> Offset {
        let position = self.store().position(&shipping()).await.unwrap();
        position.map_or(Offset::ZERO, |position| position.next)
    }

    /// Waits until the position has reached `next`.
    async fn reached(&self, next: u64) {
        while self.next().await < next.into() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    async fn assert_each_once(self, records: u64) {
        let backend = Backend::of(self.memory, Script::default());
        assert_eq!(backend.counts(&shipping(), records).await, vec![1; records as usize]);
    }
}

async fn end(runs: Vec<JoinHandle<Result<Report, Error>>>) -> Vec<Report> {
    let mut reports = Vec::new();
    for run in runs {
        reports.push(run.await.unwrap().unwrap());
    }
    reports
}

#[tokio::test(start_paused = true)]
async fn several_instances_are_about_as_fast_as_one_and_call_the_handler_about_as_often() {
    for (records, takes) in [(500, Duration::from_millis(5)), (20, Duration::from_secs(5))] {
        let mut alone = None;
        for instances in 1..=3 {
            let shared = Shared::default();
            shared.append(0..records).await;
            let started = Instant::now();
            let runs = (0..instances)
                .map(|instance| tokio::spawn(shared.consumer(instance, takes).run_until_caught_up()))
                .collect();
            end(runs).await;
            let (took, calls) = (started.elapsed(), shared.calls());
            let (time_alone, calls_alone) = *alone.get_or_insert((took, calls));
            assert!(
                took <= time_alone.mul_f64(1.3) && calls * 10 <= calls_alone * 12,
                "{instances} instances, {takes:?}: {took:?} and {calls} calls; one takes {time_alone:?} and {calls_alone}"
            );
            shared.assert_each_once(records).await;
        }
    }
}

/// A store without beats, like one that implements only the required methods.
struct Mute(MemoryStore);

#[async_trait::async_trait]
impl OffsetStore for Mute {
    type Tx = MemoryTx;

    async fn position(&self, consumer: &ConsumerId) -> Result<Option<essentially_once::backend::Position>, Error> {
        self.0.position(consumer).await
    }

    async fn begin(&self, consumer: &ConsumerId) -> Result<MemoryTx, Error> {
        self.0.begin(consumer).await
    }

    async fn durability(&self) -> Result<essentially_once::backend::Durability, Error> {
        self.0.durability().await
    }
}

#[tokio::test(start_paused = true)]
async fn instances_that_show_no_life_learn_patience_instead_of_displacing_each_other_forever() {
    let shared = Shared::default();
    shared.append(0..40).await;
    let takes = Duration::from_secs(5);
    let runs = (0..3)
        .map(|instance| tokio::spawn(shared.mute(instance, takes).run_until_caught_up()))
        .collect();
    end(runs).await;
    eprintln!("{} calls", shared.calls());
    assert!(shared.calls() <= 50, "{} calls for 40 records", shared.calls());
    shared.assert_each_once(40).await;
}

impl Shared {
    /// An instance on a store without beats.
    fn mute(
        &self,
        instance: usize,
        takes: Duration,
    ) -> Consumer<Mute, Slow, essentially_once::consumer::EssentiallyOnce> {
        let handler = Slow {
            shared: self.clone(),
            instance,
            takes,
            poison: None,
        };
        Consumer::essentially_once(shipping(), self.log(), Mute(self.store()), handler).accept_volatile()
    }
}

/// Does not poll the future while the gate is closed, as if its process were suspended.
async fn suspended<T>(future: impl Future<Output = T>, closed: tokio::sync::watch::Receiver<bool>) -> T {
    let mut future = std::pin::pin!(future);
    loop {
        let mut open = closed.clone();
        let _ = open.wait_for(|closed| !closed).await;
        let mut closing = closed.clone();
        tokio::select! {
            biased;
            _ = closing.wait_for(|closed| *closed) => {}
            result = &mut future => return result,
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_standby_that_was_suspended_has_not_seen_silence() {
    let shared = Shared::default();
    shared.append(0..3).await;
    let takes = Duration::from_millis(900);
    let active = tokio::spawn(shared.mute(0, takes).run_until_caught_up());
    shared.reached(1).await;
    let (gate, closed) = tokio::sync::watch::channel(false);
    let standby = tokio::spawn(suspended(shared.mute(1, takes).run_until_caught_up(), closed));
    tokio::time::sleep(Duration::from_millis(300)).await;
    // The standby is suspended from 0.3 s into the second record to 0.8 s into the third.
    gate.send_replace(true);
    tokio::time::sleep(Duration::from_millis(1_400)).await;
    gate.send_replace(false);
    end(vec![active, standby]).await;
    assert_eq!(*shared.by.lock().unwrap(), [0, 0, 0]);
}

#[tokio::test(start_paused = true)]
async fn of_several_standbys_one_takes_over() {
    let shared = Shared::default();
    shared.append(0..10).await;
    let takes = Duration::from_secs(5);
    let active = tokio::spawn(shared.consumer(0, takes).run());
    shared.reached(1).await;
    let standbys = (1..4)
        .map(|n| tokio::spawn(shared.consumer(n, takes).run_until_caught_up()))
        .collect();
    shared.reached(4).await;
    active.abort();
    end(standbys).await;
    // One extra call for the record that the first instance was handling.
    assert!(shared.calls() <= 11, "{} calls for 10 records", shared.calls());
    shared.assert_each_once(10).await;
}

#[tokio::test(start_paused = true)]
async fn an_instance_that_was_displaced_while_idle_does_not_take_the_idle_time_for_silence() {
    let shared = Shared::default();
    let takes = Duration::from_millis(5);
    shared.append(0..1).await;
    let first = tokio::spawn(shared.consumer(0, takes).run());
    shared.reached(1).await;
    tokio::time::sleep(Duration::from_secs(60 * 60)).await;
    // Another instance takes the position over and dies at once.
    let position = shared.store().position(&shipping()).await.unwrap().unwrap();
    let revision = position.revision.fresh_epoch();
    let mut advance = essentially_once::backend::Advance::new(position.log, position.next, position.revision, revision);
    advance.owner = Some(essentially_once::backend::Owner::draw());
    let tx = shared.store().begin(&shipping()).await.unwrap();
    essentially_once::backend::Transaction::commit(tx, advance)
        .await
        .unwrap();
    tokio::time::sleep(Duration::from_secs(2)).await;
    let gone = Instant::now();
    shared.append(1..2).await;
    shared.reached(2).await;
    assert!(gone.elapsed() < Duration::from_secs(3), "{:?}", gone.elapsed());
    first.abort();
}

/// Counts how often the position is loaded.
struct Asked(MemoryStore, Arc<AtomicU64>);

#[async_trait::async_trait]
impl OffsetStore for Asked {
    type Tx = MemoryTx;

    async fn position(&self, consumer: &ConsumerId) -> Result<Option<essentially_once::backend::Position>, Error> {
        self.1.fetch_add(1, Ordering::SeqCst);
        self.0.position(consumer).await
    }

    async fn begin(&self, consumer: &ConsumerId) -> Result<MemoryTx, Error> {
        self.0.begin(consumer).await
    }

    async fn durability(&self) -> Result<essentially_once::backend::Durability, Error> {
        self.0.durability().await
    }

    async fn pulse(&self, consumer: &ConsumerId) -> Result<essentially_once::backend::Pulse, Error> {
        self.0.pulse(consumer).await
    }
}

#[tokio::test(start_paused = true)]
async fn an_idle_instance_of_a_released_position_does_not_ask_for_it_at_every_look() {
    let shared = Shared::default();
    shared.append(0..3).await;
    // The end of the run releases the position.
    shared.consumer(0, Duration::ZERO).run_until_caught_up().await.unwrap();
    let asked = Arc::new(AtomicU64::new(0));
    let handler = Slow {
        shared: shared.clone(),
        instance: 1,
        takes: Duration::ZERO,
        poison: None,
    };
    let store = Asked(shared.store(), Arc::clone(&asked));
    let idle = tokio::spawn(
        Consumer::essentially_once(shipping(), shared.log(), store, handler)
            .accept_volatile()
            .run(),
    );
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(asked.load(Ordering::SeqCst), 1, "loaded once, at the start");
    idle.abort();
}

#[tokio::test(start_paused = true)]
async fn a_standby_takes_over_from_an_instance_that_is_gone() {
    for limit in [
        Duration::from_millis(200),
        Duration::from_secs(1),
        Duration::from_secs(8),
    ] {
        let shared = Shared::default();
        shared.append(0..1_000).await;
        let takes = Duration::from_millis(20);
        let active = tokio::spawn(shared.consumer(0, takes).standby_after(limit).run());
        shared.reached(5).await;
        let standby = tokio::spawn(shared.consumer(1, takes).standby_after(limit).run());
        shared.reached(200).await;
        active.abort();
        let gone = Instant::now();
        let next = shared.next().await.lo();
        shared.reached(next + 1).await;
        // The new instance commits its first batch within its own time limit.
        let batch = Duration::from_millis(120);
        let took = gone.elapsed();
        assert!(took > limit && took < limit + limit / 5 + batch, "{limit:?}: {took:?}");
        standby.abort();
    }
}

#[tokio::test(start_paused = true)]
async fn a_standby_takes_over_at_once_from_an_instance_that_is_stopped() {
    let shared = Shared::default();
    shared.append(0..1_000).await;
    let takes = Duration::from_millis(20);
    let stop = CancellationToken::new();
    let mut active = tokio::spawn(shared.consumer(0, takes).run_until(stop.clone()));
    shared.reached(5).await;
    // A rolling restart of three instances: a new one replaces each of them.
    let mut standbys: Vec<_> = (1..3).map(|n| tokio::spawn(shared.consumer(n, takes).run())).collect();
    shared.reached(100).await;
    stop.cancel();
    (&mut active).await.unwrap().unwrap();
    let stopped = Instant::now();
    let next = shared.next().await.lo();
    shared.reached(next + 1).await;
    assert!(
        stopped.elapsed() < Duration::from_millis(200),
        "{:?}",
        stopped.elapsed()
    );
    standbys.drain(..).for_each(|run| run.abort());
}

#[tokio::test(start_paused = true)]
async fn an_instance_that_retries_a_poison_record_stays_the_active_one() {
    let shared = Shared::default();
    shared.append(0..10).await;
    let consumer = |instance| {
        let handler = Slow {
            shared: shared.clone(),
            instance,
            takes: Duration::from_secs(2),
            poison: Some(3.into()),
        };
        Consumer::essentially_once(shipping(), shared.log(), shared.store(), handler)
            .accept_volatile()
            .retries(12)
    };
    let active = tokio::spawn(consumer(0).run());
    shared.reached(1).await;
    let standby = tokio::spawn(consumer(1).run());
    let error = active.await.unwrap().unwrap_err();
    assert!(matches!(error, Error::Unhandled { attempts: 13, .. }), "{error}");
    assert!(!shared.by.lock().unwrap().contains(&1), "the standby took over");
    // Now the standby takes over and ends in the same way.
    let error = standby.await.unwrap().unwrap_err();
    assert!(matches!(error, Error::Unhandled { attempts: 13, .. }), "{error}");
}

#[tokio::test(start_paused = true)]
async fn an_idle_hour_is_not_silence() {
    let shared = Shared::default();
    let takes = Duration::from_millis(5);
    let active = tokio::spawn(shared.consumer(0, takes).run());
    shared.append(0..1).await;
    shared.reached(1).await;
    let standby = tokio::spawn(shared.consumer(1, takes).run());
    for n in 1..10 {
        tokio::time::sleep(Duration::from_secs(60 * 60)).await;
        let appended = Instant::now();
        shared.append(n..n + 1).await;
        shared.reached(n + 1).await;
        assert!(
            appended.elapsed() < Duration::from_millis(50),
            "{:?}",
            appended.elapsed()
        );
    }
    assert_eq!(*shared.by.lock().unwrap(), [0; 10]);
    // The hour does not make the standby patient either.
    active.abort();
    let gone = Instant::now();
    shared.append(10..11).await;
    shared.reached(11).await;
    assert!(gone.elapsed() < Duration::from_millis(1_300), "{:?}", gone.elapsed());
    standby.abort();
}

#[tokio::test(start_paused = true)]
async fn a_lone_instance_whose_position_is_moved_by_hand_goes_on_from_there_at_once() {
    let shared = Shared::default();
    shared.append(0..10).await;
    let run = tokio::spawn(shared.consumer(0, Duration::from_millis(5)).run());
    shared.reached(10).await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    let moved = Instant::now();
    seek(
        &shipping(),
        &shared.log(),
        &shared.store(),
        StartAt::Offset(4.into()),
        &ann(),
    )
    .await
    .unwrap();
    shared.reached(10).await;
    assert!(moved.elapsed() < Duration::from_millis(100), "{:?}", moved.elapsed());
    // It also works in the middle of a batch.
    shared.append(10..100).await;
    shared.reached(30).await;
    let moved = Instant::now();
    let to = StartAt::Offset(90.into());
    while let Err(error) = seek(&shipping(), &shared.log(), &shared.store(), to, &ann()).await {
        assert!(matches!(error, Error::Fenced { .. }), "{error}");
    }
    shared.reached(100).await;
    assert!(moved.elapsed() < Duration::from_millis(300), "{:?}", moved.elapsed());
    run.abort();
}

#[tokio::test(start_paused = true)]
async fn without_patience_an_instance_takes_over_at_once() {
    let shared = Shared::default();
    shared.append(0..10).await;
    let active = tokio::spawn(shared.consumer(0, Duration::from_secs(5)).run());
    shared.reached(1).await;
    let started = Instant::now();
    let report = shared
        .consumer(1, Duration::ZERO)
        .standby_after(Duration::ZERO)
        .run_until_caught_up()
        .await
        .unwrap();
    assert_eq!((report.handled, started.elapsed()), (9, Duration::ZERO));
    active.abort();
}

#[tokio::test(start_paused = true)]
async fn an_instance_may_never_take_over() {
    let shared = Shared::default();
    shared.append(0..3).await;
    let stop = CancellationToken::new();
    let patient = shared
        .consumer(0, Duration::from_millis(5))
        .standby_after(Duration::MAX);
    let patient = tokio::spawn(patient.run_until(stop.clone()));
    shared.reached(3).await;
    let other = tokio::spawn(shared.consumer(1, Duration::ZERO).standby_after(Duration::ZERO).run());
    tokio::time::sleep(Duration::from_secs(1)).await;
    shared.append(3..6).await;
    shared.reached(6).await;
    other.abort();
    shared.append(6..9).await;
    tokio::time::sleep(Duration::from_secs(3_600)).await;
    assert_eq!(shared.next().await, 6.into());
    stop.cancel();
    patient.await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_standby_that_is_stopped_ends_at_once() {
    let shared = Shared::default();
    shared.append(0..10).await;
    let active = tokio::spawn(shared.consumer(0, Duration::from_secs(5)).run());
    shared.reached(1).await;
    let stop = CancellationToken::new();
    let standby = tokio::spawn(shared.consumer(1, Duration::ZERO).run_until(stop.clone()));
    tokio::time::sleep(Duration::from_secs(3)).await;
    let stopped = Instant::now();
    stop.cancel();
    let report = standby.await.unwrap().unwrap();
    assert_eq!((report.handled, stopped.elapsed()), (0, Duration::ZERO));
    active.abort();
}
