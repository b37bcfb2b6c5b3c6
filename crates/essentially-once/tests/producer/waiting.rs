//! Back-pressure, `flush` and `close`.

use std::{
    future::Future,
    pin::{Pin, pin},
    task::{Context, Poll, Waker},
};

use super::*;

/// Whether the future is ready, without a wait.
fn poll<F: Future>(future: Pin<&mut F>) -> Poll<F::Output> {
    future.poll(&mut Context::from_waker(Waker::noop()))
}

/// A producer whose first append is held and has the record `1`, of one byte.
async fn held(setting: impl FnOnce(Producer) -> Producer) -> (Memory, Faulty, Sender) {
    let memory = Memory::new();
    let log = Faulty::new(&memory, [Act::Obey.held(), Act::Obey.held()]);
    let sender = setting(producer(&log)).start().unwrap();
    send(&sender, "1").await;
    log.called(1).await;
    (memory, log, sender)
}

#[tokio::test(start_paused = true)]
async fn send_waits_while_the_queue_is_full_and_goes_on_when_records_are_confirmed() {
    for (setting, room) in [
        ((|producer| producer.queue_records(3)) as fn(Producer) -> Producer, 2),
        (|producer| producer.queue_bytes(4), 3),
    ] {
        let (memory, log, sender) = held(setting).await;
        send_all(&sender, 2, room + 1).await;
        let mut waiting = pin!(sender.send(NewRecord::new("w")));
        assert!(poll(waiting.as_mut()).is_pending());
        idle().await;
        assert!(poll(waiting.as_mut()).is_pending(), "records in flight count too");
        assert_eq!(sender.report().waiting.count(), room + 1);
        log.release();
        soon(waiting).await.unwrap();
        log.release();
        soon(sender.close()).await;
        let mut expected = numbers(1, room + 1);
        expected.push("w".into());
        assert_eq!(handled(&memory).await, expected);
    }
}

#[tokio::test(start_paused = true)]
async fn a_dropped_send_has_queued_nothing() {
    let (memory, log, sender) = held(|producer| producer.queue_records(1)).await;
    {
        let mut dropped = pin!(sender.send(NewRecord::new("dropped")));
        assert!(poll(dropped.as_mut()).is_pending());
        log.release();
        idle().await;
        // There is room by now, which the future has not seen.
    }
    let sent = send(&sender, "2").await;
    assert_eq!(sent.origin().sequence, 2);
    log.release();
    soon(sender.close()).await;
    assert_eq!(handled(&memory).await, ["1", "2"]);
}

#[tokio::test(start_paused = true)]
async fn a_record_larger_than_the_queue_waits_until_the_queue_is_empty() {
    let (memory, log, sender) = held(|producer| producer.queue_bytes(10)).await;
    let mut large = pin!(sender.send(NewRecord::new("L".repeat(50))));
    assert!(poll(large.as_mut()).is_pending());
    log.release();
    soon(large).await.unwrap();
    let mut next = pin!(sender.send(NewRecord::new("3")));
    assert!(poll(next.as_mut()).is_pending());
    log.release();
    soon(next).await.unwrap();
    soon(sender.close()).await;
    assert_eq!(handled(&memory).await, ["1", &"L".repeat(50), "3"]);
}

#[tokio::test(start_paused = true)]
async fn flush_waits_for_what_was_queued_before_it_and_for_nothing_else() {
    let log = Faulty::new(&Memory::new(), [(); 3].map(|()| Act::Obey.held()));
    let sender = producer(&log).start().unwrap();
    send(&sender, "1").await;
    log.called(1).await;
    let bad = send(&sender, "bad").await;
    let mut flush = pin!(sender.flush());
    let mut dropped = Box::pin(sender.flush());
    assert!(poll(flush.as_mut()).is_pending());
    assert!(poll(dropped.as_mut()).is_pending());
    drop(dropped);
    log.release();
    // The second append has the record that fails, and the third one has the record behind it.
    assert_eq!(log.called(2).await, [2]);
    send(&sender, "3").await;
    assert!(poll(flush.as_mut()).is_pending());
    log.release();
    let report = soon(flush).await;
    assert_eq!((report.confirmed, report.failed.count()), (1, 1), "{report}");
    assert_eq!(report.failed.ranges(), [2..=2]);
    assert_eq!(report.waiting.ranges(), [3..=3]);
    assert_eq!(fate(&soon(bad).await), Fate::Refused);
    log.release();
    assert_eq!(soon(sender.flush()).await.confirmed, 2);
    assert_eq!(
        soon(sender.flush()).await.waiting.count(),
        0,
        "an empty queue is flushed at once"
    );
}

#[tokio::test(start_paused = true)]
async fn close_confirms_what_is_queued_refuses_the_rest_and_lets_go_of_the_log() {
    let (memory, log, sender) = held(|producer| producer.unordered(2).queue_records(2)).await;
    send(&sender, "2").await;
    let mut waiting = pin!(sender.send(NewRecord::new("waits for room")));
    assert!(poll(waiting.as_mut()).is_pending());
    let mut close = pin!(sender.close());
    assert!(poll(close.as_mut()).is_pending());
    let error = soon(waiting).await.unwrap_err().to_string();
    assert!(error.contains("the producer is closed"), "{error}");
    assert!(sender.send(NewRecord::new("late")).await.is_err());
    idle().await;
    assert!(poll(close.as_mut()).is_pending(), "both appends are held");
    log.release();
    log.release();
    let report = soon(close).await;
    assert_eq!(report.to_string(), "2 confirmed, 0 failed, 0 in doubt, 0 waiting");
    assert_eq!(soon(sender.close()).await, report, "a second call returns the same");
    assert_eq!(log.handles(), 1, "only this test holds the log");
    assert_eq!(handled(&memory).await, ["1", "2"]);
}

#[tokio::test(start_paused = true)]
async fn a_close_that_takes_too_long_can_be_left_to_the_background() {
    let (memory, log, sender) = held(|producer| producer).await;
    send_all(&sender, 2, 5).await;
    let limit = Duration::from_secs(1);
    assert!(tokio::time::timeout(limit, sender.close()).await.is_err());
    let report = sender.report();
    assert_eq!(report.waiting.ranges(), [1..=5], "{report}");
    assert!(sender.send(NewRecord::new("6")).await.is_err());
    log.release();
    log.release();
    assert_eq!(soon(sender.close()).await.confirmed, 5);
    assert_eq!(handled(&memory).await, numbers(1, 5));
}

#[tokio::test]
async fn a_setting_out_of_its_bounds_is_refused_by_name() {
    let s = Duration::from_secs;
    let log = Faulty::new(&Memory::new(), []);
    for (producer, setting) in [
        (producer(&log).unordered(0), "unordered"),
        (producer(&log).unordered(1_025), "unordered"),
        (producer(&log).max_batch(0), "max_batch"),
        (producer(&log).max_batch(1_025), "max_batch"),
        (producer(&log).max_batch_bytes(0), "max_batch_bytes"),
        (producer(&log).queue_records(0), "queue_records"),
        (producer(&log).queue_records(usize::MAX), "queue_records"),
        (producer(&log).queue_bytes(0), "queue_bytes"),
        (producer(&log).queue_bytes(usize::MAX), "queue_bytes"),
        (producer(&log).min_backoff(s(11)), "min_backoff"),
        (producer(&log).give_up_after(s(0)), "give_up_after"),
    ] {
        match producer.start() {
            Err(Error::InvalidSetting { setting: named, .. }) => assert_eq!(named, setting),
            other => panic!("{setting}: {other:?}"),
        }
    }
    let largest = producer(&log)
        .unordered(1_024)
        .max_batch(1_024)
        .max_batch_bytes(usize::MAX)
        .queue_records(u32::MAX as usize)
        .queue_bytes(u32::MAX as usize)
        .max_backoff(Duration::MAX)
        .give_up_after(Duration::MAX);
    let sender = largest.start().unwrap();
    soon(send(&sender, "1").await).await.unwrap();
    assert_eq!(soon(sender.close()).await.confirmed, 1);
}
