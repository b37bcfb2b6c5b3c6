//! Each record is handled once, whatever happens to appends and replies.

use proptest::prelude::*;

use super::*;

/// A run of a producer: what its appends do, and what is sent.
#[derive(Clone, Debug)]
struct Plan {
    script: Vec<(Act, u8)>,
    /// The payload's beginning, and how many turns of other tasks come before the record.
    records: Vec<(&'static str, u8)>,
    depth: usize,
    max_batch: usize,
    queue_records: usize,
    give_up_after: Option<Duration>,
}

fn plans() -> impl Strategy<Value = Plan> {
    let act = prop_oneof![
        3 => Just(Act::Obey),
        3 => (0..12usize).prop_map(Act::Lose),
        2 => (0..12usize, 0..30u8).prop_map(|(n, turns)| Act::Late(n, turns)),
        2 => Just(Act::Unavailable),
    ];
    let act = prop_oneof![
        3 => act.clone(),
        1 => (1..150u64, act).prop_map(|(time, act)| Act::Slow(time, Box::new(act))),
    ];
    let record = prop_oneof![12 => Just("good"), 1 => Just("bad"), 1 => Just("large")];
    let give_up_after = prop_oneof![
        2 => Just(None),
        1 => (1..200u64).prop_map(|ms| Some(Duration::from_millis(ms))),
    ];
    (
        prop::collection::vec((act, 0..6u8), 0..40),
        prop::collection::vec((record, 0..6u8), 1..120),
        prop_oneof![Just(1usize), 2..5usize],
        1..12usize,
        1..40usize,
        give_up_after,
    )
        .prop_map(
            |(script, records, depth, max_batch, queue_records, give_up_after)| Plan {
                script,
                records,
                depth,
                max_batch,
                queue_records,
                give_up_after,
            },
        )
}

async fn run(plan: Plan) {
    let memory = Memory::new();
    let log = Faulty::with_turns(&memory, plan.script);
    let mut producer = producer(&log)
        .unordered(plan.depth)
        .max_batch(plan.max_batch)
        .queue_records(plan.queue_records);
    if let Some(time) = plan.give_up_after {
        producer = producer.give_up_after(time);
    }
    let sender = producer.start().unwrap();
    let mut sent = Vec::new();
    for (index, (begin, turns)) in plan.records.iter().enumerate() {
        for _ in 0..*turns {
            tokio::task::yield_now().await;
        }
        let padding = if *begin == "large" { LARGEST } else { 0 };
        sent.push(send(&sender, format!("{begin}-{index:0padding$}")).await);
    }
    let report = soon(sender.close()).await;
    let fates = fates(sent).await;
    log.settle().await;
    let handled = handled(&memory).await;

    let mut confirmed = Vec::new();
    for (index, ((begin, _), fate)) in plan.records.iter().zip(&fates).enumerate() {
        let is_of_record = |payload: &&String| {
            let number = payload.rsplit('-').next().unwrap();
            number.parse::<usize>().unwrap() == index
        };
        let times = handled.iter().filter(is_of_record).count();
        match fate {
            Fate::Confirmed => {
                assert_eq!(times, 1, "confirmed record {index} was handled {times} times");
                confirmed.extend(handled.iter().position(|payload| is_of_record(&payload)));
            }
            Fate::InDoubt => assert!(times <= 1, "record {index} in doubt was handled {times} times"),
            _ => assert_eq!(times, 0, "failed record {index} was handled"),
        }
        match *begin {
            "good" if plan.give_up_after.is_none() => assert_eq!(*fate, Fate::Confirmed, "record {index}"),
            "good" => assert!(!matches!(fate, Fate::Refused | Fate::TooLarge), "record {index}"),
            "bad" => assert_ne!(*fate, Fate::TooLarge, "record {index}"),
            _ => assert_ne!(*fate, Fate::Refused, "record {index}"),
        }
    }
    if plan.depth == 1 {
        assert!(confirmed.is_sorted(), "handled out of order: {handled:?}");
    }
    assert!(log.most_in_flight() <= plan.depth);
    let count = |wanted: &[Fate]| fates.iter().filter(|fate| wanted.contains(fate)).count() as u64;
    assert_eq!(report.confirmed, count(&[Fate::Confirmed]), "{report}");
    assert_eq!(report.in_doubt.count(), count(&[Fate::InDoubt]), "{report}");
    let failed = [Fate::Refused, Fate::TooLarge, Fate::Unavailable];
    assert_eq!(report.failed.count(), count(&failed), "{report}");
    assert_eq!(report.waiting.count(), 0, "{report}");
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_record_is_handled_once_in_spite_of_lost_replies_and_faults(plan in plans()) {
        tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .unwrap()
            .block_on(run(plan));
    }
}

#[tokio::test(start_paused = true)]
async fn batches_as_large_as_the_window_are_appended_again_without_loss() {
    for prefix in [0, 1, 700, 1_024] {
        let memory = Memory::new();
        let script = [Act::Obey.held(), Act::Lose(1_024), Act::Lose(prefix), Act::Lose(prefix)];
        let log = Faulty::new(&memory, script);
        let sender = producer(&log).start().unwrap();
        send(&sender, "0").await;
        log.called(1).await;
        let sent = send_all(&sender, 1, 3_000).await;
        log.release();
        assert_eq!(
            log.called(2).await.len(),
            1_024,
            "all that has queued up, within the window"
        );
        assert!(fates(sent).await.iter().all(|fate| *fate == Fate::Confirmed));
        assert_eq!(handled(&memory).await, numbers(0, 3_000), "prefix {prefix}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn many_senders_on_many_threads_lose_and_double_nothing() {
    const SENDERS: u64 = 8;
    const RECORDS: u64 = 1_000;
    for depth in [1, 4] {
        let memory = Memory::new();
        let script = (0..200).map(|n| match n % 4 {
            0 => (Act::Lose(n), 3),
            1 => (Act::Unavailable, 0),
            2 => (Act::Late(n, 100), 1),
            _ => (Act::Obey, 2),
        });
        let log = Faulty::with_turns(&memory, script);
        let sender = producer(&log)
            .unordered(depth)
            .queue_records(100)
            .min_backoff(Duration::ZERO)
            .max_backoff(Duration::from_millis(1))
            .start()
            .unwrap();
        let mut tasks = tokio::task::JoinSet::new();
        for task in 0..SENDERS {
            let sender = sender.clone();
            tasks.spawn(async move {
                let mut sent = Vec::new();
                for n in 0..RECORDS {
                    sent.push(send(&sender, (task * RECORDS + n).to_string()).await);
                }
                fates(sent).await
            });
        }
        // Time is not paused here.
        let limit = Duration::from_secs(60);
        while let Some(fates) = tokio::time::timeout(limit, tasks.join_next()).await.expect("in time") {
            assert!(fates.unwrap().iter().all(|fate| *fate == Fate::Confirmed));
        }
        let report = soon(sender.close()).await;
        assert_eq!(report.confirmed, SENDERS * RECORDS);
        assert!(log.most_in_flight() <= depth);
        log.settle().await;
        let mut handled = handled(&memory).await;
        if depth == 1 {
            // Each sender's records in its order.
            handled.sort_by_key(|payload| payload.parse::<u64>().unwrap() / RECORDS);
        } else {
            handled.sort_by_key(|payload| payload.parse::<u64>().unwrap());
        }
        assert_eq!(handled, numbers(0, SENDERS * RECORDS - 1), "depth {depth}");
    }
}
