//! Crash tests of sound handlers pass, and those of handlers with planted mistakes name them.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "tests")]

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use bytes::Bytes;
use essentially_once::{
    Consumer, ConsumerId, Error, Handler, HandlerError, KeyValue, Log, NewRecord, Outbox, ReadState, Record,
    async_trait, handler_fn,
    memory::{Memory, MemoryTx},
};
use essentially_once_testkit::{
    CrashFindings, CrashTest, CrashTx, Mistake, Probe, crash_test, faults::Plan, memory::MemoryHarness,
};

const TOTAL: &[u8] = b"total";

fn orders() -> Vec<NewRecord> {
    let orders = ["Brazil", "Chile", "Brazil", "Peru", "Chile"];
    orders.map(|country| NewRecord::new(country).key(country)).to_vec()
}

async fn number<Tx: KeyValue>(tx: &mut Tx, key: &[u8]) -> Result<u64, HandlerError> {
    let value = tx.get(key).await?;
    Ok(value.map_or(Ok(0), |value| String::from_utf8_lossy(&value).parse())?)
}

/// Counts orders by country, and tells others about each.
struct Sound;

#[async_trait]
impl<Tx: KeyValue + Outbox> Handler<Tx> for Sound {
    async fn handle(&mut self, order: &Record, tx: &mut Tx) -> Result<(), HandlerError> {
        let count = number(tx, &order.payload).await? + 1;
        tx.put(&order.payload, count.to_string().as_bytes()).await?;
        let sent = NewRecord::new(count.to_string()).key(order.payload.clone());
        tx.send("counts", sent).await?;
        Ok(())
    }
}

/// Keeps the total in memory, and resets it or not.
struct Cached {
    total: Option<u64>,
    resets: bool,
}

#[async_trait]
impl<Tx: KeyValue> Handler<Tx> for Cached {
    async fn handle(&mut self, _: &Record, tx: &mut Tx) -> Result<(), HandlerError> {
        let before = match self.total {
            Some(total) => total,
            None => number(tx, TOTAL).await?,
        };
        self.total = Some(before + 1);
        tx.put(TOTAL, (before + 1).to_string().as_bytes()).await?;
        Ok(())
    }

    async fn reset(&mut self) {
        if self.resets {
            self.total = None;
        }
    }
}

/// Gathers orders and writes them in `flush`.
#[derive(Default)]
struct Gathering {
    gathered: Vec<Bytes>,
    resets: bool,
}

#[async_trait]
impl<Tx: KeyValue> Handler<Tx> for Gathering {
    async fn handle(&mut self, order: &Record, _: &mut Tx) -> Result<(), HandlerError> {
        self.gathered.push(order.payload.clone());
        Ok(())
    }

    async fn flush(&mut self, tx: &mut Tx) -> Result<(), HandlerError> {
        for order in self.gathered.drain(..) {
            let count = number(tx, &order).await? + 1;
            tx.put(&order, count.to_string().as_bytes()).await?;
        }
        Ok(())
    }

    async fn reset(&mut self) {
        if self.resets {
            self.gathered.clear();
        }
    }
}

/// Writes the state like a sound handler, and sends mail outside the transaction.
struct Mailing(Probe);

#[async_trait]
impl<Tx: KeyValue> Handler<Tx> for Mailing {
    async fn handle(&mut self, order: &Record, tx: &mut Tx) -> Result<(), HandlerError> {
        tx.put(&order.payload, b"mailed").await?;
        self.0.call("POST /mail");
        Ok(())
    }
}

/// What the test found, which must be these mistakes and no other.
async fn mistakes(test: CrashTest, expected: &[Mistake]) -> CrashFindings {
    let found = test.run().await.unwrap_err();
    println!("{found}\n");
    let mut mistakes: Vec<_> = found.findings.iter().map(|finding| finding.mistake).collect();
    mistakes.dedup();
    assert_eq!(mistakes, expected, "{found}");
    found
}

fn says(found: &CrashFindings, parts: &[&str]) {
    let text = found.to_string();
    for part in parts {
        assert!(text.contains(part), "{part:?} is missing: {text}");
    }
}

#[tokio::test]
async fn a_sound_handler_passes_every_single_fault_and_many_pairs() -> Result<(), CrashFindings> {
    let started = Instant::now();
    let report = crash_test(|_| Sound, orders()).await?;
    println!("{report}, of {} pairs, in {:?}", report.pairs, started.elapsed());
    assert!(
        report.explored.operations > 20 && report.explored.plans > 1_000,
        "{report}"
    );
    Ok(())
}

#[tokio::test]
async fn every_pair_of_a_short_run_is_tried() -> Result<(), CrashFindings> {
    let test = CrashTest::new(|_| Sound)
        .records(orders().into_iter().take(1))
        .limit(100_000);
    let report = test.run().await?;
    let singles = report.explored.operations * 6;
    assert_eq!(report.explored.plans, 1 + singles + report.pairs, "{report}");
    assert_eq!(report.seed, None);
    Ok(())
}

#[tokio::test]
async fn handlers_with_and_without_reset_pass_if_they_keep_nothing() -> Result<(), CrashFindings> {
    crash_test(
        |_| Cached {
            total: None,
            resets: true,
        },
        orders(),
    )
    .await?;
    let gathering = |_: &Probe| Gathering {
        resets: true,
        ..Gathering::default()
    };
    crash_test(gathering, orders()).await?;
    // A closure has no `reset`.
    let last = |_: &Probe| {
        handler_fn(|order: &Record, tx: &mut CrashTx| {
            Box::pin(async move {
                tx.put(b"last", &order.payload).await?;
                Ok(())
            })
        })
    };
    crash_test(last, orders()).await?;
    Ok(())
}

#[tokio::test]
async fn a_call_outside_the_transaction_is_named() {
    let test = CrashTest::new(|probe| Mailing(probe.clone())).records(orders());
    let found = mistakes(test, &[Mistake::EffectRepeated]).await;
    assert_eq!(found.findings.len(), 5, "one for each record: {found}");
    assert!(found.findings.iter().all(|finding| finding.plan.faults().len() == 1));
    says(
        &found,
        &[
            "effect outside the transaction: a call was repeated",
            "POST /mail for record 3: expected 1 call, found 2 calls",
            "CrashTest::idempotent",
        ],
    );
}

#[tokio::test]
async fn an_idempotent_call_is_accepted_and_other_calls_are_not() -> Result<(), CrashFindings> {
    let test = |accepted: &str| {
        let test = CrashTest::new(|probe| Mailing(probe.clone())).records(orders());
        test.idempotent(accepted)
    };
    test("POST /mail").run().await?;
    mistakes(test("POST"), &[Mistake::EffectRepeated]).await;
    Ok(())
}

#[tokio::test]
async fn a_call_that_is_noted_before_it_is_made_is_lost() {
    /// Notes in another database that the mail is sent, and then sends it.
    struct Noting {
        probe: Probe,
        noted: Arc<Mutex<BTreeMap<String, ()>>>,
    }
    #[async_trait]
    impl Handler<CrashTx> for Noting {
        async fn handle(&mut self, order: &Record, tx: &mut CrashTx) -> Result<(), HandlerError> {
            let is_new = self
                .noted
                .lock()
                .unwrap()
                .insert(order.offset.to_string(), ())
                .is_none();
            tx.put(&order.payload, b"mailed").await?;
            if is_new {
                self.probe.call("POST /mail");
            }
            Ok(())
        }
    }
    let noted: Arc<Mutex<BTreeMap<String, ()>>> = Arc::default();
    let reset = Arc::clone(&noted);
    let make = move |probe: &Probe| Noting {
        probe: probe.clone(),
        noted: Arc::clone(&noted),
    };
    let test = CrashTest::new(make)
        .records(orders())
        .before_each(move || reset.lock().unwrap().clear())
        .idempotent("POST /mail");
    let found = mistakes(test, &[Mistake::EffectLost]).await;
    says(&found, &["POST /mail for record 0: expected 1 call, found 0 calls"]);
}

#[tokio::test]
async fn a_cache_that_is_not_reset_is_named() {
    let test = CrashTest::new(|_| Cached {
        total: None,
        resets: false,
    })
    .records(orders());
    let found = mistakes(test, &[Mistake::KeptInMemory]).await;
    assert_eq!(found.findings[0].plan.faults().len(), 1, "{found}");
    says(
        &found,
        &[
            "kept something in memory across a rollback",
            "key \"total\": expected \"5\", found \"6\"",
            "Handler::reset",
        ],
    );
}

#[tokio::test]
async fn records_that_are_gathered_and_not_reset_are_named() {
    let test = CrashTest::new(|_| Gathering::default()).records(orders());
    let found = mistakes(test, &[Mistake::KeptInMemory]).await;
    says(&found, &["key \"Brazil\": expected \"2\", found \"3\""]);
}

/// Takes a number from a counter outside the transaction, such as another consumer's state.
struct Numbering(Arc<AtomicU64>);

#[async_trait]
impl<Tx: KeyValue> Handler<Tx> for Numbering {
    async fn handle(&mut self, order: &Record, tx: &mut Tx) -> Result<(), HandlerError> {
        let number = self.0.fetch_add(1, Ordering::Relaxed);
        let key = format!("invoice of order {}", order.offset);
        tx.put(key.as_bytes(), number.to_string().as_bytes()).await?;
        Ok(())
    }
}

#[tokio::test]
async fn a_number_from_outside_the_transaction_is_named() {
    let counter: Arc<AtomicU64> = Arc::default();
    let reset = Arc::clone(&counter);
    let test = CrashTest::new(move |_| Numbering(Arc::clone(&counter)))
        .records(orders())
        .before_each(move || reset.store(0, Ordering::Relaxed));
    let found = mistakes(test, &[Mistake::OutsideTransaction]).await;
    assert_eq!(found.findings[0].plan.faults().len(), 1, "{found}");
    says(
        &found,
        &["uses something outside its transaction", "key \"invoice of order"],
    );
}

#[tokio::test]
async fn a_result_that_differs_from_run_to_run_is_named() {
    let counter: Arc<AtomicU64> = Arc::default();
    let test = CrashTest::new(move |_| Numbering(Arc::clone(&counter))).records(orders());
    let found = mistakes(test, &[Mistake::NotRepeatable]).await;
    says(
        &found,
        &[
            "two runs without faults differ",
            "expected \"0\", found \"5\"",
            "before_each",
        ],
    );
}

/// Reads the price from the state of another consumer, which has a store of its own.
struct Pricing(Memory);

#[async_trait]
impl<Tx: KeyValue> Handler<Tx> for Pricing {
    async fn handle(&mut self, order: &Record, tx: &mut Tx) -> Result<(), HandlerError> {
        let prices = self
            .0
            .store()
            .read_state(&ConsumerId::new("prices")?, &[b"price"])
            .await?;
        let price = prices.values[0].clone().unwrap_or_else(|| "none".into());
        tx.put(format!("price of {}", order.offset).as_bytes(), &price).await?;
        Ok(())
    }
}

/// Lets the other consumer raise the price.
async fn raise_price(memory: Memory) -> Result<(), Error> {
    let (id, log) = (ConsumerId::new("prices")?, memory.log("prices")?);
    log.append(&[NewRecord::new("high")]).await?;
    let set = handler_fn(|price: &Record, tx: &mut MemoryTx| {
        Box::pin(async move {
            tx.put(b"price", &price.payload).await?;
            Ok(())
        })
    });
    let consumer = Consumer::essentially_once(id, log, memory.store(), set).accept_volatile();
    consumer.run_until_caught_up().await.map(drop)
}

#[tokio::test]
async fn another_consumers_state_is_named_when_that_consumer_acts() -> Result<(), CrashFindings> {
    let memory: Arc<Mutex<Memory>> = Arc::default();
    let (reset, other) = (Arc::clone(&memory), Arc::clone(&memory));
    let test = CrashTest::new(move |_| Pricing(memory.lock().unwrap().clone()))
        .records(orders())
        .before_each(move || *reset.lock().unwrap() = Memory::new())
        .meanwhile(move || {
            let memory = other.lock().unwrap().clone();
            async move { raise_price(memory).await.unwrap() }
        });
    let found = mistakes(test, &[Mistake::OutsideTransaction]).await;
    says(
        &found,
        &[
            "key \"price of 0\": expected \"high\", found \"none\"",
            "when the other program acted before operation",
        ],
    );
    // A handler that does not look is not blamed for what the other program does.
    let memory = Memory::new();
    let test = CrashTest::new(|_| Sound)
        .records(orders())
        .limit(300)
        .meanwhile(move || {
            let memory = memory.clone();
            async move { raise_price(memory).await.unwrap() }
        });
    test.run().await?;
    Ok(())
}

#[tokio::test]
async fn a_result_that_depends_on_batches_is_named() {
    #[derive(Default)]
    struct Batches;
    #[async_trait]
    impl<Tx: KeyValue> Handler<Tx> for Batches {
        async fn handle(&mut self, _: &Record, _: &mut Tx) -> Result<(), HandlerError> {
            Ok(())
        }

        async fn flush(&mut self, tx: &mut Tx) -> Result<(), HandlerError> {
            let batches = number(tx, b"batches").await? + 1;
            tx.put(b"batches", batches.to_string().as_bytes()).await?;
            Ok(())
        }
    }
    let found = mistakes(
        CrashTest::new(|_| Batches).records(orders()),
        &[Mistake::DependsOnBatches],
    )
    .await;
    says(&found, &["key \"batches\": expected \"3\", found \"5\""]);
}

#[tokio::test]
async fn a_handler_that_takes_an_outage_for_a_bad_record_is_named() {
    struct Rejecting;
    #[async_trait]
    impl<Tx: KeyValue> Handler<Tx> for Rejecting {
        async fn handle(&mut self, order: &Record, tx: &mut Tx) -> Result<(), HandlerError> {
            // The text alone hides that the backend failed.
            let put = tx.put(&order.payload, b"seen").await;
            put.map_err(|error| HandlerError::reject(error.to_string()))
        }
    }
    let test = CrashTest::new(|_| Rejecting).records(orders());
    let found = mistakes(test, &[Mistake::Stopped]).await;
    says(&found, &["the consumer stopped", "gave up", "is Put by consumer 0"]);
}

#[tokio::test]
async fn a_handler_that_ignores_an_error_is_protected_by_the_transaction() -> Result<(), CrashFindings> {
    struct Careless;
    #[async_trait]
    impl<Tx: KeyValue> Handler<Tx> for Careless {
        async fn handle(&mut self, order: &Record, tx: &mut Tx) -> Result<(), HandlerError> {
            let count = number(tx, &order.payload).await.unwrap_or(0) + 1;
            let _ = tx.put(&order.payload, count.to_string().as_bytes()).await;
            Ok(())
        }
    }
    crash_test(|_| Careless, orders()).await?;
    Ok(())
}

/// Rejects orders from Chile.
struct Picky;

#[async_trait]
impl<Tx: KeyValue> Handler<Tx> for Picky {
    async fn handle(&mut self, order: &Record, tx: &mut Tx) -> Result<(), HandlerError> {
        if &*order.payload == b"Chile" {
            return Err(HandlerError::reject("no orders from Chile"));
        }
        let count = number(tx, TOTAL).await? + 1;
        tx.put(TOTAL, count.to_string().as_bytes()).await?;
        Ok(())
    }
}

#[tokio::test]
async fn rejected_records_are_compared_as_dead_letters() -> Result<(), CrashFindings> {
    let report = CrashTest::new(|_| Picky).records(orders()).limit(3_000).run().await?;
    assert!(report.explored.faults > 1_000, "{report}");

    /// Rejects the first order that it sees of each run.
    struct First(Arc<AtomicU64>);
    #[async_trait]
    impl<Tx: KeyValue> Handler<Tx> for First {
        async fn handle(&mut self, order: &Record, tx: &mut Tx) -> Result<(), HandlerError> {
            if self.0.fetch_add(1, Ordering::Relaxed) == 2 {
                return Err(HandlerError::reject("the third call"));
            }
            tx.put(&order.payload, b"seen").await?;
            Ok(())
        }
    }
    let calls: Arc<AtomicU64> = Arc::default();
    let reset = Arc::clone(&calls);
    let test = CrashTest::new(move |_| First(Arc::clone(&calls)))
        .records(orders())
        .max_batch(1)
        .before_each(move || reset.store(0, Ordering::Relaxed));
    let found = mistakes(test, &[Mistake::OutsideTransaction]).await;
    says(&found, &["dead letter of record"]);
    Ok(())
}

/// Fails at every record, in one of three ways.
#[derive(Clone, Copy)]
enum Failing {
    Rejects,
    Fails,
    Panics,
}

#[async_trait]
impl<Tx: KeyValue> Handler<Tx> for Failing {
    async fn handle(&mut self, _: &Record, _: &mut Tx) -> Result<(), HandlerError> {
        match self {
            Self::Rejects => Err(HandlerError::reject("no such country")),
            Self::Fails => Err(HandlerError::retry("no such country")),
            Self::Panics => panic!("no such country"),
        }
    }
}

#[tokio::test]
async fn a_handler_that_fails_at_every_record_is_named() {
    for failing in [Failing::Rejects, Failing::Fails, Failing::Panics] {
        let test = CrashTest::new(move |_| failing).records(orders());
        let found = mistakes(test, &[Mistake::NothingHandled]).await;
        let text = found.to_string();
        assert!(
            text.contains("the first error was") && text.contains("no such country"),
            "{text}"
        );
        assert_eq!(found.explored.plans, 1, "no fault was tried");
    }
}

/// Counts in a field that it never loads.
struct Forgetful(u64);

#[async_trait]
impl<Tx: KeyValue> Handler<Tx> for Forgetful {
    async fn handle(&mut self, _: &Record, tx: &mut Tx) -> Result<(), HandlerError> {
        self.0 += 1;
        tx.put(TOTAL, self.0.to_string().as_bytes()).await?;
        Ok(())
    }
}

#[tokio::test]
async fn a_field_that_is_never_loaded_is_among_the_causes() {
    let test = CrashTest::new(|_| Forgetful(0)).records(orders());
    let found = mistakes(test, &[Mistake::KeptInMemory, Mistake::OutsideTransaction]).await;
    assert!(found.to_string().contains("begins again after a restart"), "{found}");
}

#[tokio::test]
async fn a_limit_of_no_plans_is_refused() {
    let test = CrashTest::new(|_| Sound).records(orders()).limit(0);
    let found = mistakes(test, &[Mistake::Stopped]).await;
    says(&found, &["the limit is 0"]);
}

#[tokio::test]
async fn a_test_without_anything_to_compare_fails() {
    let idle = |_: &Probe| handler_fn(|_: &Record, _: &mut CrashTx| Box::pin(async { Ok(()) }));
    mistakes(CrashTest::new(idle).records(orders()), &[Mistake::NothingToCompare]).await;
    let empty = mistakes(CrashTest::new(|_| Sound), &[Mistake::NothingToCompare]).await;
    assert!(empty.to_string().contains("there are no records"), "{empty}");
    // The handler writes, but the test cannot know where.
    let native = CrashTest::native(MemoryHarness, |_| Sound).records(orders());
    mistakes(native, &[Mistake::NothingToCompare]).await;
}

#[tokio::test]
async fn a_misspelled_name_beside_correct_ones_is_named() {
    let test = || CrashTest::native(MemoryHarness, |_| Sound).records(orders());
    let test_of = |key: &'static str, outbox: &str| test().key("Brazil").outbox("counts").key(key).outbox(outbox);
    let found = mistakes(test_of("brazil", "counts"), &[Mistake::NothingToCompare]).await;
    says(&found, &["without a value or record: key \"brazil\""]);
    let found = mistakes(test_of("Brazil", "count"), &[Mistake::NothingToCompare]).await;
    says(&found, &["without a value or record: outbox count"]);
}

#[tokio::test]
async fn native_handlers_are_compared_by_what_the_test_names() -> Result<(), CrashFindings> {
    /// Works with this transaction only.
    struct Native(Cached);
    #[async_trait]
    impl Handler<MemoryTx> for Native {
        async fn handle(&mut self, order: &Record, tx: &mut MemoryTx) -> Result<(), HandlerError> {
            tx.send("seen", NewRecord::new(order.payload.clone())).await?;
            self.0.handle(order, tx).await
        }

        async fn reset(&mut self) {
            Handler::<MemoryTx>::reset(&mut self.0).await;
        }
    }
    let test = |resets| {
        let make = move |_: &Probe| Native(Cached { total: None, resets });
        CrashTest::native(MemoryHarness, make).records(orders()).seed(1)
    };
    let report = test(true).key(TOTAL).outbox("seen").run().await?;
    assert_eq!((report.explored.plans, report.seed), (61, Some(1)), "{report}");
    test(false).outbox("seen").run().await?;
    mistakes(test(false).key(TOTAL), &[Mistake::KeptInMemory]).await;
    let observed = test(false).observe(async |memory: &Memory| {
        let state = memory
            .store()
            .read_state(&ConsumerId::new("crash-test")?, &[TOTAL])
            .await?;
        Ok(vec![("the total".into(), format!("{:?}", state.values))])
    });
    let found = mistakes(observed, &[Mistake::KeptInMemory]).await;
    says(&found, &["the total: expected [Some(b\"5\")], found [Some(b\"6\")]"]);
    Ok(())
}

#[tokio::test]
async fn equal_seeds_find_the_same_and_a_plan_repeats_a_finding() -> Result<(), CrashFindings> {
    let test = || {
        CrashTest::new(|_| Cached {
            total: None,
            resets: false,
        })
        .records(orders())
    };
    let sampled = |seed| test().limit(40).seed(seed);
    let found = mistakes(sampled(7), &[Mistake::KeptInMemory]).await;
    let again = mistakes(sampled(7), &[Mistake::KeptInMemory]).await;
    assert_eq!(found.to_string(), again.to_string());
    says(&found, &["seed 7", "41 plans"]);

    let plan = found.findings[0].plan.clone();
    let repeated = mistakes(test().only(plan.clone()), &[Mistake::KeptInMemory]).await;
    assert_eq!(repeated.findings, found.findings);
    assert_eq!(repeated.explored.plans, 2);
    // The same handler passes under a plan without faults.
    test().only(Plan::none()).run().await?;
    // A plan that strikes nothing is no proof.
    let late = mistakes(test().only("1000:crash-after".parse().unwrap()), &[Mistake::Stopped]).await;
    says(&late, &["the fault at operation 1000 did not strike"]);

    let report = CrashTest::new(|_| Sound)
        .records(orders())
        .limit(500)
        .seed(3)
        .run()
        .await?;
    assert_eq!((report.explored.plans, report.seed), (501, Some(3)), "{report}");
    Ok(())
}

#[tokio::test]
async fn a_panic_of_make_handler_reaches_the_test() {
    let test = CrashTest::new(|_| -> Sound { panic!("no handler today") }).records(orders());
    let ended = tokio::spawn(test.run()).await.unwrap_err();
    let panic = ended.into_panic();
    assert_eq!(panic.downcast_ref::<&str>(), Some(&"no handler today"));
}
