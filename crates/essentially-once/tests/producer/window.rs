//! How many appends are in flight, and how far their sequences reach.

use essentially_once::backend::Window;

use super::*;

#[tokio::test(start_paused = true)]
async fn one_append_is_in_flight_by_default_and_the_next_one_has_all_that_queued_up() {
    let memory = Memory::new();
    let log = Faulty::new(&memory, [Act::Lose(0).held()]);
    let sender = producer(&log).start().unwrap();
    send(&sender, "1").await;
    assert_eq!(log.called(1).await, [1]);
    let sent = send_all(&sender, 2, 500).await;
    idle().await;
    assert_eq!(log.calls().len(), 1, "the first append is not answered");
    log.release();
    assert!(fates(sent).await.iter().all(|fate| *fate == Fate::Confirmed));
    let all: Vec<u64> = (2..=500).collect();
    assert_eq!(log.calls(), [vec![1], vec![1], all]);
    assert_eq!(log.most_in_flight(), 1);
}

#[tokio::test(start_paused = true)]
async fn unordered_has_as_many_appends_in_flight_as_allowed() {
    let memory = Memory::new();
    let log = Faulty::new(&memory, [(); 5].map(|()| Act::Obey.held()));
    let sender = producer(&log).unordered(3).start().unwrap();
    for n in 1..=5 {
        send(&sender, n.to_string()).await;
        idle().await;
    }
    assert_eq!(log.calls(), [[1], [2], [3]]);
    for _ in 0..5 {
        log.release();
    }
    let report = soon(sender.close()).await;
    assert_eq!((report.confirmed, log.most_in_flight()), (5, 3));
}

#[tokio::test(start_paused = true)]
async fn unordered_appends_span_no_more_than_the_window_of_the_consumers() {
    let memory = Memory::new();
    // The first record fails while the others pass it.
    let log = Faulty::new(&memory, [Act::Lose(0).held()]);
    let sender = producer(&log).unordered(4).max_batch(100).start().unwrap();
    send(&sender, "1").await;
    assert_eq!(log.called(1).await, [1]);
    let sent = send_all(&sender, 2, 4_000).await;
    idle().await;
    let highest = log.calls().into_iter().flatten().max();
    assert_eq!(highest, Some(Window::SIZE), "the span is the window");
    assert_eq!(sender.report().confirmed, Window::SIZE - 1);
    log.release();
    assert!(fates(sent).await.iter().all(|fate| *fate == Fate::Confirmed));
    soon(sender.close()).await;
    let mut handled = handled(&memory).await;
    handled.sort_by_key(|payload| payload.parse::<u64>().unwrap());
    assert_eq!(handled, numbers(1, 4_000), "no record was taken for a duplicate");
}

#[tokio::test(start_paused = true)]
async fn appends_that_waited_for_the_window_go_on_together_also_while_the_producer_closes() {
    for closes in [false, true] {
        let memory = Memory::new();
        let script = [Act::Obey.held()]
            .into_iter()
            .chain(vec![Act::Obey; 1_023])
            .chain([(); 2].map(|()| Act::Obey.held()));
        let log = Faulty::new(&memory, script);
        let sender = producer(&log).unordered(2).max_batch(1).start().unwrap();
        send_all(&sender, 1, 2_000).await;
        idle().await;
        assert_eq!(log.calls().len(), 1_024, "the second lane waits for the first one");
        let close = tokio::spawn({
            let sender = sender.clone();
            async move {
                if closes {
                    sender.close().await
                } else {
                    sender.flush().await
                }
            }
        });
        idle().await;
        log.release();
        assert_eq!(
            (log.called(1_025).await, log.called(1_026).await),
            (vec![1_025], vec![1_026])
        );
        log.release();
        log.release();
        assert_eq!(soon(close).await.unwrap().confirmed, 2_000);
    }
}

#[tokio::test(start_paused = true)]
async fn a_refused_record_leaves_the_window_to_the_others() {
    let memory = Memory::new();
    let log = Faulty::new(&memory, []);
    let sender = producer(&log).unordered(2).start().unwrap();
    let bad = send(&sender, "bad").await;
    let sent = send_all(&sender, 2, 3_000).await;
    assert_eq!(fate(&soon(bad).await), Fate::Refused);
    assert!(fates(sent).await.iter().all(|fate| *fate == Fate::Confirmed));
}

#[tokio::test(start_paused = true)]
async fn a_batch_is_bounded_in_records_and_bytes() {
    for (producer_of, expected) in [
        (
            (|log| producer(log).max_batch(2)) as fn(&Faulty) -> Producer,
            vec![2usize, 2, 2],
        ),
        (|log| producer(log).max_batch_bytes(40), vec![4, 2]),
        (|log| producer(log).max_batch_bytes(39), vec![3, 3]),
        // A single record may exceed the limit.
        (|log| producer(log).max_batch_bytes(1), vec![1; 6]),
        // The window is divided among the appends in flight.
        (|log| producer(log).unordered(512), vec![2, 2, 2]),
    ] {
        let memory = Memory::new();
        let log = Faulty::new(&memory, []);
        let sender = producer_of(&log).start().unwrap();
        for _ in 0..6 {
            // Ten bytes. No task of the producer runs meanwhile.
            send(&sender, "0123456789").await;
        }
        soon(sender.close()).await;
        let mut sizes: Vec<usize> = log.calls().iter().map(Vec::len).collect();
        sizes.sort_by_key(|size| std::cmp::Reverse(*size));
        assert_eq!(sizes, expected);
    }
}
