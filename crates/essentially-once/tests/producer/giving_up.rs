//! `give_up_after`.

use tokio::time::Instant;

use super::*;

const LIMIT: Duration = Duration::from_secs(30);

/// The clock of a timer ticks in milliseconds.
const TICK: Duration = Duration::from_millis(2);

#[tokio::test(start_paused = true)]
async fn a_record_is_given_up_at_its_time_with_the_last_error() {
    for (act, expected) in [
        (Act::Unavailable, Fate::Unavailable),
        (Act::Lose(0), Fate::InDoubt),
        (Act::Obey.held(), Fate::InDoubt),
    ] {
        let memory = Memory::new();
        let log = Faulty::new(&memory, vec![act.clone(); 1_000]);
        let sender = producer(&log).give_up_after(LIMIT).start().unwrap();
        let start = Instant::now();
        let error = soon(send(&sender, "1").await).await.unwrap_err();
        let took = start.elapsed();
        assert!((LIMIT..LIMIT + TICK).contains(&took), "{act:?}: {took:?}");
        let text = error.to_string();
        assert!(text.contains(":1 to log orders within 30s: "), "{text}");
        assert_eq!(fate(&Err(error)), expected, "{act:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn one_lost_reply_among_many_failures_leaves_doubt() {
    let memory = Memory::new();
    let script = [Act::Unavailable, Act::Lose(1)]
        .into_iter()
        .chain(vec![Act::Unavailable; 1_000]);
    let log = Faulty::new(&memory, script);
    let sender = producer(&log).give_up_after(LIMIT).start().unwrap();
    assert_eq!(fate(&soon(send(&sender, "1").await).await), Fate::InDoubt);
    assert_eq!(handled(&memory).await, ["1"]);
}

#[tokio::test(start_paused = true)]
async fn records_in_one_batch_are_given_up_each_at_its_own_time() {
    for (act, expected) in [
        (Act::Unavailable, Fate::Unavailable),
        (Act::Lose(0), Fate::InDoubt),
        (Act::Obey.held(), Fate::InDoubt),
    ] {
        let memory = Memory::new();
        let script = [Act::Obey.held()].into_iter().chain(vec![act.clone(); 1_000]);
        let log = Faulty::new(&memory, script);
        let sender = producer(&log).give_up_after(LIMIT).start().unwrap();
        send(&sender, "0").await;
        log.called(1).await;
        let start = Instant::now();
        let first = send(&sender, "1").await;
        tokio::time::sleep(LIMIT / 2).await;
        let second = send(&sender, "2").await;
        log.release();
        assert_eq!(log.called(2).await, [2, 3]);
        for (sent, limit) in [(first, LIMIT), (second, LIMIT + LIMIT / 2)] {
            assert_eq!(fate(&soon(sent).await), expected, "{act:?}");
            let took = start.elapsed();
            assert!((limit..limit + 2 * TICK).contains(&took), "{act:?}: {took:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_hanging_append_with_no_record_left_is_dropped_and_later_records_go_on() {
    let memory = Memory::new();
    let log = Faulty::new(&memory, [Act::Obey.held()]);
    let sender = producer(&log).give_up_after(LIMIT).start().unwrap();
    let hanging = send(&sender, "1").await;
    log.called(1).await;
    tokio::time::sleep(LIMIT / 2).await;
    let (start, later) = (Instant::now(), send(&sender, "2").await);
    assert_eq!(fate(&soon(hanging).await), Fate::InDoubt);
    soon(later).await.unwrap();
    assert!(start.elapsed() < LIMIT, "the second record had half of its time left");
    assert_eq!(log.most_in_flight(), 1);
    let report = soon(sender.close()).await;
    assert_eq!(report.to_string(), "1 confirmed, 0 failed, 1 in doubt (1), 0 waiting");
    assert_eq!(handled(&memory).await, ["2"]);
}

#[tokio::test(start_paused = true)]
async fn records_that_never_left_the_queue_are_given_up_too_and_are_not_in_doubt() {
    let memory = Memory::new();
    let log = Faulty::new(&memory, vec![Act::Lose(1); 1_000]);
    let sender = producer(&log).give_up_after(LIMIT).max_batch(1).start().unwrap();
    let start = Instant::now();
    let sent = send_all(&sender, 1, 3).await;
    assert_eq!(fates(sent).await, [Fate::InDoubt, Fate::Unavailable, Fate::Unavailable]);
    assert!(start.elapsed() < LIMIT + TICK);
    assert_eq!(soon(sender.close()).await.waiting.count(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_batch_that_loses_records_while_it_is_refused_names_no_wrong_culprit() {
    let memory = Memory::new();
    // The refusal of both arrives when the first record is given up.
    let log = Faulty::new(&memory, [Act::Obey.held(), Act::Refuse.held()]);
    let sender = producer(&log).give_up_after(LIMIT).start().unwrap();
    send(&sender, "0").await;
    log.called(1).await;
    let first = send(&sender, "1").await;
    tokio::time::sleep(LIMIT / 2).await;
    let second = send(&sender, "2").await;
    log.release();
    assert_eq!(log.called(2).await, [2, 3]);
    assert_eq!(fate(&soon(first).await), Fate::InDoubt);
    log.release();
    soon(second).await.unwrap();
    assert_eq!(log.called(3).await, [3]);
    assert_eq!(handled(&memory).await, ["0", "2"]);
}

#[tokio::test(start_paused = true)]
async fn a_part_that_waited_too_long_for_the_one_before_it_is_not_appended_and_not_in_doubt() {
    let memory = Memory::new();
    let script = [Act::Obey.held(), Act::Refuse]
        .into_iter()
        .chain(vec![Act::Lose(0); 1_000]);
    let log = Faulty::new(&memory, script);
    let sender = producer(&log).give_up_after(LIMIT).start().unwrap();
    send(&sender, "0").await;
    log.called(1).await;
    let sent = send_all(&sender, 1, 2).await;
    log.release();
    assert_eq!(fates(sent).await, [Fate::InDoubt, Fate::Unavailable]);
    soon(sender.close()).await;
    let calls = log.calls();
    assert_eq!(calls[1], [2, 3]);
    assert!(calls[2..].iter().all(|call| *call == [2]), "{calls:?}");
}

#[tokio::test(start_paused = true)]
async fn without_a_limit_a_record_is_sent_until_it_is_confirmed() {
    let memory = Memory::new();
    let log = Faulty::new(&memory, vec![Act::Unavailable; 5_000]);
    let sender = producer(&log).start().unwrap();
    let start = Instant::now();
    soon(send(&sender, "1").await).await.unwrap();
    let took = start.elapsed();
    let longest = Duration::from_secs(20) * 5_000;
    assert!(
        (longest / 3..longest).contains(&took),
        "pauses grow to ten seconds and jitter: {took:?}"
    );
}
