//! Records that the log refuses.

use essentially_once::{Epoch, Origin};

use super::*;

fn too_large() -> String {
    "x".repeat(LARGEST + 1)
}

/// Sends all payloads in one batch, behind a held append.
async fn in_one_batch(log: &Faulty, sender: &Sender, payloads: &[String]) -> Vec<Sent> {
    send(sender, "first").await;
    log.called(1).await;
    let mut sent = Vec::new();
    for payload in payloads {
        sent.push(send(sender, payload.clone()).await);
    }
    log.release();
    assert_eq!(log.called(2).await.len(), payloads.len(), "one batch");
    sent
}

#[tokio::test(start_paused = true)]
async fn a_refused_record_fails_alone_with_its_error_and_reorders_no_other() {
    for (culprit, expected) in [("bad".to_owned(), Fate::Refused), (too_large(), Fate::TooLarge)] {
        for place in 0..9 {
            let memory = Memory::new();
            let log = Faulty::new(&memory, [Act::Obey.held()]);
            let sender = producer(&log).start().unwrap();
            let mut payloads = numbers(0, 8);
            payloads[place].clone_from(&culprit);
            let sent = in_one_batch(&log, &sender, &payloads).await;
            let later = send(&sender, "later").await;
            let mut results = fates(sent).await;
            assert_eq!(results.remove(place), expected, "place {place}");
            assert_eq!(results, [Fate::Confirmed; 8], "place {place}");
            soon(later).await.unwrap();
            payloads.remove(place);
            payloads.insert(0, "first".into());
            payloads.push("later".into());
            assert_eq!(handled(&memory).await, payloads, "place {place}");
            assert_eq!(log.most_in_flight(), 1);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn several_refused_records_fail_each_with_its_own_error() {
    let memory = Memory::new();
    let log = Faulty::new(&memory, [Act::Obey.held()]);
    let sender = producer(&log).start().unwrap();
    let payloads = ["a", "bad", "bad", "b", &too_large(), "c", "bad"].map(String::from);
    let sent = in_one_batch(&log, &sender, &payloads).await;
    let expected = [
        Fate::Confirmed,
        Fate::Refused,
        Fate::Refused,
        Fate::Confirmed,
        Fate::TooLarge,
        Fate::Confirmed,
        Fate::Refused,
    ];
    assert_eq!(fates(sent).await, expected);
    assert_eq!(handled(&memory).await, ["first", "a", "b", "c"]);
    let report = soon(sender.close()).await;
    assert_eq!(
        report.to_string(),
        "4 confirmed, 4 failed (3-4, 6, 8), 0 in doubt, 0 waiting"
    );
}

#[tokio::test(start_paused = true)]
async fn a_part_of_a_refused_batch_is_appended_again_before_the_part_behind_it() {
    let memory = Memory::new();
    let script = [Act::Obey.held(), Act::Refuse, Act::Lose(1), Act::Unavailable];
    let log = Faulty::new(&memory, script);
    let sender = producer(&log).start().unwrap();
    let sent = in_one_batch(&log, &sender, &numbers(1, 4)).await;
    assert_eq!(fates(sent).await, [Fate::Confirmed; 4]);
    let calls = [
        vec![1],
        vec![2, 3, 4, 5],
        vec![2, 3],
        vec![2, 3],
        vec![2, 3],
        vec![4, 5],
    ];
    assert_eq!(log.calls(), calls);
    assert_eq!(handled(&memory).await, ["first", "1", "2", "3", "4"]);
}

#[tokio::test(start_paused = true)]
async fn a_refusal_after_a_lost_reply_leaves_the_record_in_doubt() {
    // What was lost may have been appended, whatever the log says of the next try.
    for (before, expected) in [
        (Act::Lose(9), Fate::InDoubt),
        (Act::Lose(0), Fate::InDoubt),
        (Act::Unavailable, Fate::Refused),
    ] {
        for between in [None, Some(Act::Unavailable)] {
            let memory = Memory::new();
            let script = [before.clone()].into_iter().chain(between).chain([Act::Refuse]);
            let log = Faulty::new(&memory, script);
            let sender = producer(&log).start().unwrap();
            let error = soon(send(&sender, "1").await).await.unwrap_err();
            assert_eq!(fate(&Err(error)), expected, "{before:?}");
            let report = soon(sender.close()).await;
            let in_doubt = u64::from(expected == Fate::InDoubt);
            assert_eq!(
                (report.in_doubt.count(), report.failed.count()),
                (in_doubt, 1 - in_doubt)
            );
        }
    }
}

#[tokio::test(start_paused = true)]
async fn doubt_about_a_batch_is_doubt_about_its_parts() {
    let memory = Memory::new();
    let log = Faulty::new(&memory, [Act::Obey.held(), Act::Lose(1)]);
    let sender = producer(&log).start().unwrap();
    let payloads = ["a", "b", "bad", "c"].map(String::from);
    let sent = in_one_batch(&log, &sender, &payloads).await;
    let expected = [Fate::Confirmed, Fate::Confirmed, Fate::InDoubt, Fate::Confirmed];
    assert_eq!(fates(sent).await, expected);
    assert_eq!(handled(&memory).await, ["first", "a", "b", "c"]);
}

#[tokio::test(start_paused = true)]
async fn an_error_names_the_record_the_log_and_the_cause() {
    let memory = Memory::new();
    let log = Faulty::new(&memory, [Act::Lose(0), Act::Refuse]);
    let sender = producer(&log).start().unwrap();
    let sent = send(&sender, "1").await;
    let origin = sent.origin().clone();
    assert_eq!(&origin.numbering, sender.numbering());
    assert_eq!((origin.numbering.producer().as_str(), origin.sequence), ("web", 1));
    let error = sent.await.unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "send record {origin} to log orders: the outcome is unknown, it may or may not have happened: append to \
             orders: scripted"
        )
    );
    assert!(error.cause().is_some_and(|cause| cause.is::<Error>()));
}

#[tokio::test(start_paused = true)]
async fn a_record_with_an_origin_is_refused_and_uses_up_no_number() {
    let memory = Memory::new();
    let log = Faulty::new(&memory, []);
    let sender = producer(&log).start().unwrap();
    let numbered = NewRecord::new("1").origin(Origin::of(sender.numbering().clone(), 1));
    let error = sender.send(numbered).await.unwrap_err().to_string();
    assert!(error.contains("already has the origin web#"), "{error}");
    let sent = send(&sender, "1").await;
    assert_eq!(sent.origin().sequence, 1);
    sent.await.unwrap();
}

#[tokio::test]
async fn each_producer_has_its_own_epoch() {
    let memory = Memory::new();
    let log = Faulty::new(&memory, []);
    let numberings = [(); 2].map(|()| producer(&log).numbering().clone());
    assert_ne!(numberings[0], numberings[1]);
    assert!(numberings.iter().all(|numbering| numbering.epoch() != Epoch::STABLE));
    for _ in 0..2 {
        let sender = producer(&log).start().unwrap();
        send_all(&sender, 1, 10).await;
        soon(sender.close()).await;
    }
    let twice: Vec<String> = [numbers(1, 10), numbers(1, 10)].concat();
    assert_eq!(handled(&memory).await, twice, "a restarted producer loses nothing");
}
