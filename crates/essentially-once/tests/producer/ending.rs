//! Producers that end without `close`.

use super::*;

#[tokio::test(start_paused = true)]
async fn a_dropped_producer_goes_on_with_its_queue_and_lets_go_of_the_log() {
    let memory = Memory::new();
    let log = Faulty::new(&memory, [Act::Lose(1).held(), Act::Unavailable]);
    let sender = producer(&log).start().unwrap();
    let mut sent = send_all(&sender, 1, 1).await;
    log.called(1).await;
    sent.extend(send_all(&sender, 2, 9).await);
    let clone = sender.clone();
    drop(sender);
    sent.push(send(&clone, "10").await);
    drop(clone);
    log.release();
    assert_eq!(fates(sent).await, [Fate::Confirmed; 10]);
    assert_eq!(handled(&memory).await, numbers(1, 10));
    idle().await;
    assert_eq!(log.handles(), 1, "the task has ended");
}

#[tokio::test(start_paused = true)]
async fn a_dropped_result_changes_nothing() {
    let memory = Memory::new();
    let log = Faulty::new(&memory, [Act::Lose(0)]);
    let sender = producer(&log).start().unwrap();
    drop(send_all(&sender, 1, 9).await);
    assert_eq!(soon(sender.close()).await.confirmed, 9);
    assert_eq!(handled(&memory).await, numbers(1, 9));
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap()
        .block_on(future)
}

/// Runs until record `1` is in flight and `2` is queued behind it, and ends the runtime.
fn ended_with_its_runtime(act: Act) -> (Sender, Vec<Fate>) {
    let (sender, sent) = block_on(async {
        let log = Faulty::new(&Memory::new(), [act]);
        let sender = producer(&log).start().unwrap();
        let mut sent = send_all(&sender, 1, 1).await;
        log.called(1).await;
        idle().await;
        sent.extend(send_all(&sender, 2, 2).await);
        (sender, sent)
    });
    (sender, block_on(fates(sent)))
}

#[test]
fn records_that_are_left_when_the_runtime_ends_are_reported() {
    let (sender, fates) = ended_with_its_runtime(Act::Obey.held());
    assert_eq!(
        fates,
        [Fate::InDoubt, Fate::Unavailable],
        "the append in flight may get through"
    );
    let report = block_on(sender.close());
    assert_eq!(
        report.to_string(),
        "0 confirmed, 1 failed (2), 1 in doubt (1), 0 waiting"
    );
    assert!(block_on(sender.send(NewRecord::new("3"))).is_err());

    let (_, fates) = ended_with_its_runtime(Act::Lose(0));
    assert_eq!(fates, [Fate::InDoubt, Fate::Unavailable]);
    let (_, fates) = ended_with_its_runtime(Act::Unavailable);
    assert_eq!(fates, [Fate::Unavailable; 2], "nothing was appended");
}

#[tokio::test(start_paused = true)]
async fn a_panic_in_the_log_ends_the_producer_and_leaves_nobody_waiting() {
    let memory = Memory::new();
    let log = Faulty::new(&memory, [Act::Panic.held()]);
    let sender = producer(&log).queue_records(2).start().unwrap();
    let mut sent = send_all(&sender, 1, 1).await;
    log.called(1).await;
    sent.extend(send_all(&sender, 2, 2).await);
    let waits_for_room = tokio::spawn({
        let sender = sender.clone();
        async move { sender.send(NewRecord::new("3")).await }
    });
    idle().await;
    log.release();
    assert_eq!(fates(sent).await, [Fate::InDoubt, Fate::Unavailable]);
    assert!(waits_for_room.await.unwrap().is_err());
    assert!(sender.send(NewRecord::new("4")).await.is_err());
    assert_eq!(soon(sender.flush()).await.waiting.count(), 0);
    assert_eq!(soon(sender.close()).await.in_doubt.ranges(), [1..=1]);
}
