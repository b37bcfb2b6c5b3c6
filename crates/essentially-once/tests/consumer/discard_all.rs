//! Letters that operators discard by a filter.

use std::{pin::Pin, sync::atomic::AtomicU64, time::SystemTime};

use essentially_once::{
    backend::{Advance, DeadLetter, DeadLetters as _, Durability, Position, Transaction as _},
    consumer::{
        OperatorAction,
        dead_letters::{self, LetterFilter},
    },
    memory::MemoryStore,
};

use super::{
    letters::{consumer, effects, keyed, letters, next, parked, poisoned, wait_until},
    operators::actions,
    *,
};

fn discarded(first: u64, letters: u64) -> OperatorAction {
    let first = first.into();
    OperatorAction::Discard { first, letters }
}

async fn discard_all(backend: &Backend, filter: LetterFilter) -> u64 {
    dead_letters::discard_all(&shipping(), &backend.memory.store(), &filter, &ann())
        .await
        .unwrap()
}

#[tokio::test]
async fn discarding_by_a_filter_leaves_the_rest_of_a_key_in_order() {
    let backend = keyed(Script::default()).await;
    let run = async || {
        let run = consumer(&backend, poisoned(&backend, &[]));
        run.run_until_caught_up().await.unwrap()
    };
    let poison = consumer(&backend, poisoned(&backend, &["2", "3", "5"]));
    poison.run_until_caught_up().await.unwrap();
    assert_eq!(parked(&backend).await, [2, 3, 4, 5, 6, 8, 9]);
    let poison = || LetterFilter::all().reason("poison");
    assert_eq!(discard_all(&backend, poison().key("a")).await, 1);
    assert_eq!(parked(&backend).await, [3, 4, 5, 6, 8, 9]);
    let due: Vec<_> = letters(&backend).await.iter().map(|letter| letter.due).collect();
    assert_eq!(due, [None, Some(SystemTime::UNIX_EPOCH), None, None, None, None]);
    assert_eq!(run().await.handled, 2);
    assert_eq!(discard_all(&backend, poison()).await, 2);
    assert_eq!(run().await.handled, 2);
    let effects = effects(&backend).await;
    assert_eq!(
        (&*effects["a"], &*effects["b"], &*effects["-"]),
        ("0 4 8 ", "1 6 9 ", "10 ")
    );
    assert_eq!(actions(&backend).await, [discarded(2, 1), discarded(3, 2)]);
    // Nothing is left that matches, and no entry says so.
    assert_eq!(discard_all(&backend, LetterFilter::all()).await, 0);
    assert_eq!(actions(&backend).await.len(), 2);
}

#[tokio::test]
async fn discarding_a_whole_key_or_only_its_last_letters_makes_nothing_due() {
    let backend = keyed(Script::default()).await;
    let run = consumer(&backend, poisoned(&backend, &["2", "3"]));
    run.run_until_caught_up().await.unwrap();
    assert_eq!(parked(&backend).await, [2, 3, 4, 6, 8, 9]);
    assert_eq!(discard_all(&backend, LetterFilter::all().key("a")).await, 3);
    let before = letters(&backend).await;
    let behind = LetterFilter::all().reason("earlier records of its key");
    assert_eq!(discard_all(&backend, behind).await, 2);
    assert_eq!(
        letters(&backend).await,
        before[..1],
        "the first letter of `b` is as it was"
    );
    assert!(before[0].due.is_none());
    assert_eq!(actions(&backend).await, [discarded(2, 3), discarded(6, 2)]);
}

/// Letters of one key, at these offsets, with a position.
async fn many(letters: u64, due: Option<SystemTime>) -> MemoryStore {
    let memory = Memory::new();
    let (log, store) = (memory.log("orders").unwrap(), memory.store());
    seek(&shipping(), &log, &store, StartAt::Earliest, &ann())
        .await
        .unwrap();
    let position = store.position(&shipping()).await.unwrap().unwrap();
    let mut tx = store.begin(&shipping()).await.unwrap();
    for offset in 0..letters {
        let mut record = Record::new(offset.into(), SystemTime::UNIX_EPOCH, "x");
        record.key = Some("a".into());
        let mut letter = DeadLetter::new(record, 1, "poison", SystemTime::UNIX_EPOCH);
        letter.due = due.filter(|_| offset == 0);
        tx.park(&letter).await.unwrap();
    }
    let (expected, revision) = (position.revision, position.revision.next_count());
    let advance = Advance::new(position.log, position.next, expected, revision);
    tx.commit(advance).await.unwrap();
    store
}

type Meddle = Box<dyn Fn(u64, MemoryStore) -> Pin<Box<dyn Future<Output = ()> + Send>> + Send + Sync>;

/// Does something when a transaction begins, given how many have begun before.
struct Meddling {
    store: MemoryStore,
    begun: AtomicU64,
    meddle: Meddle,
}

impl Meddling {
    fn new(store: MemoryStore, meddle: Meddle) -> Self {
        let begun = AtomicU64::new(0);
        Self { store, begun, meddle }
    }
}

#[essentially_once::async_trait]
impl OffsetStore for Meddling {
    type Tx = MemoryTx;

    async fn position(&self, consumer: &ConsumerId) -> Result<Option<Position>, Error> {
        self.store.position(consumer).await
    }

    async fn begin(&self, consumer: &ConsumerId) -> Result<MemoryTx, Error> {
        (self.meddle)(self.begun.fetch_add(1, Ordering::SeqCst), self.store.clone()).await;
        self.store.begin(consumer).await
    }

    async fn durability(&self) -> Result<Durability, Error> {
        self.store.durability().await
    }
}

#[tokio::test]
async fn a_letter_that_changes_after_it_was_read_is_not_discarded() {
    let meddle: Meddle = Box::new(|begun, store| {
        Box::pin(async move {
            // The first page was read, and is about to go.
            if begun == 1 {
                let letter = dead_letters::get(&shipping(), &store, 40.into())
                    .await
                    .unwrap()
                    .unwrap();
                let mut new = NewRecord::from(&letter.record);
                new.payload = "y".into();
                dead_letters::edit(&shipping(), &store, &letter, &new, &ann())
                    .await
                    .unwrap();
            }
        })
    });
    let store = Meddling::new(many(150, None).await, meddle);
    let all = LetterFilter::all();
    let gone = dead_letters::discard_all(&shipping(), &store, &all, &ann()).await;
    assert_eq!(gone.unwrap(), 149);
    let left = dead_letters::list(&shipping(), &store.store, None, 10).await.unwrap();
    let [letter] = &left[..] else { panic!("{left:?}") };
    assert_eq!((letter.record.offset, &*letter.record.payload), (40.into(), &b"y"[..]));
    assert_eq!(letter.due, Some(SystemTime::UNIX_EPOCH), "it comes first now");
}

#[tokio::test]
async fn between_two_pages_the_next_letter_waits_as_long_as_the_first_one_did() {
    let later = SystemTime::now() + Duration::from_secs(3_600);
    for due in [None, Some(later)] {
        let seen = Arc::new(std::sync::Mutex::new(Vec::new()));
        let heads = Arc::clone(&seen);
        let meddle: Meddle = Box::new(move |_, store| {
            let heads = Arc::clone(&heads);
            Box::pin(async move {
                let first = dead_letters::list(&shipping(), &store, None, 1).await.unwrap();
                let first = first.first().map(|letter| (letter.record.offset.lo(), letter.due));
                heads.lock().unwrap().extend(first);
            })
        });
        let store = Meddling::new(many(1_100, due).await, meddle);
        let all = LetterFilter::all();
        let gone = dead_letters::discard_all(&shipping(), &store, &all, &ann())
            .await
            .unwrap();
        assert_eq!(gone, 1_100);
        let mut seen = std::mem::take(&mut *seen.lock().unwrap());
        seen.dedup();
        assert_eq!(seen, [(0, due), (500, due), (1_000, due)]);
        let position = store.position(&shipping()).await.unwrap().unwrap();
        let last = position.journal.entries().last().map(|entry| entry.action);
        assert_eq!((last, position.journal.entries().len()), (Some(discarded(0, 1_100)), 2));
    }
}

#[tokio::test]
async fn what_is_too_large_for_one_commit_is_discarded_in_several_and_is_one_entry() {
    let backend = keyed(Script::default()).await;
    let handler = poisoned(&backend, &["1", "2", "5", "7", "10"]);
    consumer(&backend, handler).run_until_caught_up().await.unwrap();
    backend.script.letters_per_commit.store(1, Ordering::SeqCst);
    let poison = LetterFilter::all().reason("poison");
    let gone = dead_letters::discard_all(&shipping(), &backend.store(), &poison, &ann()).await;
    assert_eq!(gone.unwrap(), 5);
    backend.script.letters_per_commit.store(0, Ordering::SeqCst);
    assert_eq!(actions(&backend).await, [discarded(1, 5)]);
    let run = consumer(&backend, poisoned(&backend, &[]));
    run.run_until_caught_up().await.unwrap();
    let effects = effects(&backend).await;
    assert_eq!(
        (&*effects["a"], &*effects["b"], &*effects["c"]),
        ("0 4 8 ", "3 6 9 ", "11 ")
    );
}

#[tokio::test]
async fn a_running_consumer_goes_on_after_its_letters_were_discarded() {
    let backend = keyed(Script::default()).await;
    let run = tokio::spawn(consumer(&backend, poisoned(&backend, &["2", "3"])).run());
    wait_until(&run, async || next(&backend).await == RECORDS.into()).await;
    let failed = LetterFilter::all().reason("poison");
    assert_eq!(discard_all(&backend, failed).await, 2);
    backend
        .memory_log()
        .append(&[NewRecord::new("12").key("a")])
        .await
        .unwrap();
    wait_until(&run, async || {
        parked(&backend).await.is_empty() && next(&backend).await == (RECORDS + 1).into()
    })
    .await;
    let effects = effects(&backend).await;
    assert_eq!((&*effects["a"], &*effects["b"]), ("0 4 8 12 ", "1 6 9 "));
    assert_eq!(actions(&backend).await, [discarded(2, 2)]);
    run.abort();
}

#[tokio::test]
async fn a_plan_covers_the_letters_that_were_there_and_have_not_changed() {
    let store = many(5, None).await;
    let all = LetterFilter::all();
    let plan = dead_letters::plan_discard_all(&shipping(), &store, &all).await.unwrap();
    assert_eq!(plan.letters, 5);
    let retry = dead_letters::plan_retry_all(&shipping(), &store, &all).await.unwrap();
    assert_eq!(retry.letters, 1, "the others wait behind it");
    dead_letters::plan_retry(&shipping(), &store, 0.into()).await.unwrap();
    let refused = dead_letters::plan_retry(&shipping(), &store, 1.into()).await;
    assert!(refused.unwrap_err().to_string().contains("comes first"));

    let letter = dead_letters::get(&shipping(), &store, 2.into()).await.unwrap().unwrap();
    let mut new = NewRecord::from(&letter.record);
    let same = dead_letters::plan_edit(&shipping(), &store, &letter, &new).await;
    assert!(same.unwrap_err().to_string().contains("the record is the same"));
    new.payload = "y".into();
    dead_letters::plan_edit(&shipping(), &store, &letter, &new)
        .await
        .unwrap();
    dead_letters::edit(&shipping(), &store, &letter, &new, &ann())
        .await
        .unwrap();
    assert_eq!(
        dead_letters::list(&shipping(), &store, None, 10).await.unwrap().len(),
        5,
        "plans change nothing"
    );

    let gone = dead_letters::discard_all(&shipping(), &store, &plan.filter, &ann()).await;
    assert_eq!(gone.unwrap(), 4);
    let left = dead_letters::list(&shipping(), &store, None, 10).await.unwrap();
    assert_eq!((left.len(), left[0].record.offset), (1, 2.into()));
}
