//! Letters of entries that their log can decode only later.

use std::sync::atomic::AtomicBool;

use essentially_once::{
    Epoch, Origin,
    backend::{Bounds, Durability, LogId, LogReader},
    consumer::{DeadLetterOptions, EssentiallyOnce, dead_letters},
    memory::MemoryLog,
};

use super::{
    letters::{Lists, consumer, effects, keyed, letters, next, parked, poisoned, retry_all, wait_until},
    *,
};

/// A log with entries that it can only decode once it has a key.
#[derive(Clone)]
pub(super) struct Sealed {
    log: MemoryLog,
    pub(super) has_key: Arc<AtomicBool>,
    /// What it then finds.
    find: fn(&mut Record),
}

pub(super) fn sealed(backend: &Backend, find: fn(&mut Record)) -> Sealed {
    Sealed {
        log: backend.memory_log(),
        has_key: Arc::default(),
        find,
    }
}

impl Sealed {
    fn seal(mut record: Record) -> Record {
        if record.header("sealed").is_some() {
            record.malformed = Some("no key".into());
            (record.key, record.origin) = (None, None);
        }
        record
    }
}

#[essentially_once::async_trait]
impl Log for Sealed {
    fn id(&self) -> &LogId {
        self.log.id()
    }

    async fn append(&self, records: &[NewRecord]) -> Result<Option<Offset>, Error> {
        self.log.append(records).await
    }

    async fn read(&self, from: Offset) -> Result<Box<dyn LogReader>, Error> {
        Ok(Box::new(SealedReader(self.log.read(from).await?)))
    }

    async fn bounds(&self) -> Result<Bounds, Error> {
        self.log.bounds().await
    }

    fn decode(&self, malformed: &Record) -> Option<Record> {
        if !self.has_key.load(Ordering::Relaxed) {
            return None;
        }
        let mut record = malformed.clone();
        record.malformed = None;
        record.key = record.header("sealed").cloned();
        (self.find)(&mut record);
        Some(record)
    }

    async fn durability(&self) -> Result<Durability, Error> {
        self.log.durability().await
    }
}

fn sender() -> Origin {
    Origin::new(ProducerId::new("web").unwrap(), Epoch::STABLE, 7)
}

struct SealedReader(Box<dyn LogReader>);

#[essentially_once::async_trait]
impl LogReader for SealedReader {
    async fn next(&mut self, max: usize) -> Result<Vec<Record>, Error> {
        Ok(self.0.next(max).await?.into_iter().map(Sealed::seal).collect())
    }
}

/// A consumer of the sealed log that keeps letters.
fn reader(backend: &Backend, log: &Sealed, handler: Lists) -> Consumer<support::ScriptedStore, Lists, EssentiallyOnce> {
    Consumer::essentially_once(shipping(), log.clone(), backend.store(), handler)
        .dead_letters(DeadLetterOptions::new())
        .accept_volatile()
}

#[tokio::test]
async fn a_malformed_letter_is_decoded_again_when_it_is_tried() {
    let backend = keyed(Script::default()).await;
    consumer(&backend, poisoned(&backend, &["4"]))
        .run_until_caught_up()
        .await
        .unwrap();
    let log = sealed(&backend, |record| {
        record.origin = (record.payload == "twice").then(sender)
    });
    let more = [
        NewRecord::new("12").header("sealed", "a"),
        NewRecord::new("twice").header("sealed", "b"),
        NewRecord::new("twice").key("b").origin(sender()),
        NewRecord::new("15").header("sealed", "c"),
    ];
    log.append(&more).await.unwrap();
    let run = |poison: &[&'static str]| reader(&backend, &log, poisoned(&backend, poison)).run_until_caught_up();
    run(&[]).await.unwrap();
    assert_eq!(parked(&backend).await, [4, 8, 12, 13, 15]);
    assert_eq!(retry_all(&backend).await, 4);
    run(&["4"]).await.unwrap();
    assert_eq!(parked(&backend).await, [4, 8, 12, 13, 15], "it still has no key");
    log.has_key.store(true, Ordering::Relaxed);
    retry_all(&backend).await;
    let report = run(&["4"]).await.unwrap();
    assert_eq!(report.duplicates, 1, "an intact copy of the one at 13 was handled");
    assert_eq!(parked(&backend).await, [4, 8, 12], "the one at 12 waits behind its key");
    retry_all(&backend).await;
    run(&[]).await.unwrap();
    assert!(parked(&backend).await.is_empty());
    let effects = effects(&backend).await;
    assert_eq!((&*effects["a"], &*effects["c"]), ("0 2 4 8 12 ", "7 11 15 "));
    assert_eq!(effects["b"], "1 3 6 9 twice ");
}

fn numbered(sequence: u64) -> Origin {
    let mut origin = sender();
    origin.sequence = sequence;
    origin
}

/// A letter whose origin is below its producer's window may never have been handled, so nobody but
/// an operator may drop it.
#[tokio::test]
async fn a_decoded_letter_whose_origin_is_too_old_waits_for_an_operator() {
    let backend = keyed(Script::default()).await;
    let log = sealed(&backend, |record| record.origin = Some(numbered(0)));
    log.append(&[NewRecord::new("payment").header("sealed", "b").origin(numbered(0))])
        .await
        .unwrap();
    let more: Vec<_> = (1..=1_025)
        .map(|n| NewRecord::new("x").key("y").origin(numbered(n)))
        .collect();
    log.append(&more).await.unwrap();
    let run = || reader(&backend, &log, poisoned(&backend, &[])).run_until_caught_up();
    run().await.unwrap();
    assert_eq!(parked(&backend).await, [RECORDS]);
    log.has_key.store(true, Ordering::Relaxed);
    let store = backend.memory.store();
    retry_all(&backend).await;
    assert_eq!(run().await.unwrap().duplicates, 0);
    let letter = letters(&backend).await.remove(0);
    assert!(letter.last_reason.contains("too old"), "{}", letter.last_reason);
    assert_eq!(letter.due, None);
    // The operator cannot claim that origin either, but can decide to handle the record.
    let mended = NewRecord::new("payment").key("b");
    let claimed = mended.clone().origin(numbered(0));
    let error = dead_letters::edit(&shipping(), &store, &letter, &claimed, &ann())
        .await
        .unwrap_err();
    assert!(error.to_string().contains("too old"), "{error}");
    dead_letters::edit(&shipping(), &store, &letter, &mended, &ann())
        .await
        .unwrap();
    run().await.unwrap();
    assert_eq!(effects(&backend).await["b"], "1 3 6 9 payment ");
}

#[tokio::test]
async fn a_decoder_that_panics_stops_neither_the_letters_nor_the_log() {
    let backend = keyed(Script::default()).await;
    let log = sealed(&backend, |_| panic!("the decoder has a fault"));
    log.has_key.store(true, Ordering::Relaxed);
    log.append(&[NewRecord::new("12").header("sealed", "b")]).await.unwrap();
    let run = || reader(&backend, &log, poisoned(&backend, &[])).run_until_caught_up();
    run().await.unwrap();
    retry_all(&backend).await;
    log.append(&[NewRecord::new("13").key("b")]).await.unwrap();
    run().await.unwrap();
    assert_eq!(parked(&backend).await, [RECORDS]);
    assert_eq!(effects(&backend).await["b"], "1 3 6 9 13 ");
}

/// The running session must know at once that the key has a letter.
#[tokio::test]
async fn records_follow_a_letter_that_was_decoded_in_the_same_run() {
    let backend = keyed(Script::default()).await;
    let log = sealed(&backend, |record| {
        record.origin = (record.payload == "twice").then(sender)
    });
    log.append(&[NewRecord::new("12").header("sealed", "z")]).await.unwrap();
    let run = || reader(&backend, &log, poisoned(&backend, &["12"]));
    run().run_until_caught_up().await.unwrap();
    log.has_key.store(true, Ordering::Relaxed);
    let run = tokio::spawn(run().run());
    retry_all(&backend).await;
    let has_failed = async || letters(&backend).await[0].last_reason == "12 is poison";
    wait_until(&run, has_failed).await;
    log.append(&[NewRecord::new("13").key("z")]).await.unwrap();
    wait_until(&run, async || next(&backend).await == (RECORDS + 2).into()).await;
    assert_eq!(parked(&backend).await, [RECORDS, RECORDS + 1]);
    run.abort();
}

/// Only a letter that takes its place may mark its origin.
#[tokio::test]
async fn a_letter_that_is_too_large_once_it_is_decoded_is_no_duplicate_of_itself() {
    let backend = keyed(Script::default()).await;
    let log = sealed(&backend, |record| {
        record.payload = vec![b'x'; 17 * 1024 * 1024].into();
        record.origin = Some(sender());
    });
    log.append(&[NewRecord::new("12").header("sealed", "b")]).await.unwrap();
    let run = || reader(&backend, &log, poisoned(&backend, &[])).run_until_caught_up();
    run().await.unwrap();
    log.has_key.store(true, Ordering::Relaxed);
    for n in 13..15 {
        assert_eq!(retry_all(&backend).await, 1);
        // The commit of this record would store a mark.
        log.append(&[NewRecord::new(n.to_string()).key("c")]).await.unwrap();
        let report = run().await.unwrap();
        assert_eq!((report.handled, report.duplicates), (1, 0), "{report}");
        let letter = &letters(&backend).await[0];
        assert!(letter.last_reason.contains("over the limit"), "{}", letter.last_reason);
    }
}

/// Its pause is not measured from a failure long ago.
#[tokio::test]
async fn a_letter_that_waits_for_an_operator_still_does_after_it_failed_behind_another() {
    let backend = keyed(Script::default()).await;
    let log = sealed(&backend, |_| {});
    let more = [
        NewRecord::new("12").header("sealed", "z"),
        NewRecord::new("13").key("z"),
    ];
    log.append(&more).await.unwrap();
    let run = || {
        let handler = poisoned(&backend, &[]);
        handler.retried.lock().unwrap().push("13");
        reader(&backend, &log, handler).retries(0).run_until_caught_up()
    };
    run().await.unwrap();
    assert_eq!(parked(&backend).await, [12, 13]);
    log.has_key.store(true, Ordering::Relaxed);
    dead_letters::retry(&shipping(), &backend.memory.store(), 12.into(), &ann())
        .await
        .unwrap();
    run().await.unwrap();
    let left = &letters(&backend).await[0];
    assert_eq!((left.record.offset, left.due), (13.into(), None), "{left:?}");
}

#[tokio::test]
async fn a_copy_of_a_letter_that_was_decoded_is_a_duplicate() {
    let backend = keyed(Script::default()).await;
    let log = sealed(&backend, |record| record.origin = Some(sender()));
    log.append(&[NewRecord::new("payment").header("sealed", "b")])
        .await
        .unwrap();
    let run = || reader(&backend, &log, poisoned(&backend, &[])).run_until_caught_up();
    run().await.unwrap();
    log.has_key.store(true, Ordering::Relaxed);
    retry_all(&backend).await;
    run().await.unwrap();
    // The sender was in doubt.
    let copy = NewRecord::new("payment").key("b").origin(sender());
    log.append(&[copy]).await.unwrap();
    assert_eq!(run().await.unwrap().duplicates, 1);
    assert_eq!(effects(&backend).await["b"], "1 3 6 9 payment ");
}
