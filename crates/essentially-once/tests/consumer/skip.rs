//! Skipping a record by hand.

use super::*;

fn produced(payload: &str, sequence: u64) -> NewRecord {
    let web = ProducerId::new("web").unwrap();
    NewRecord::new(payload.to_owned()).origin(essentially_once::Origin::new(
        web,
        essentially_once::Epoch::STABLE,
        sequence,
    ))
}

#[tokio::test]
async fn a_skipped_record_is_passed_and_dropped_if_it_is_sent_again() {
    let memory = Memory::new();
    let log = memory.log("orders").unwrap();
    log.append(&[produced("0", 0), produced("poison", 1), produced("2", 2)])
        .await
        .unwrap();
    let backend = Backend::of(memory, Script::default());
    let run = || {
        let mut handler = backend.counter();
        handler.poison = vec!["poison"];
        Consumer::essentially_once(shipping(), backend.log(), backend.store(), handler).run_until_caught_up()
    };
    let error = run().await.unwrap_err();
    assert!(error.to_string().contains("`skip` the record"), "{error}");
    let Error::Unhandled { offset, .. } = error else {
        panic!("{error}")
    };
    let before = backend.position(&shipping()).await.unwrap();
    let next = skip(&shipping(), &backend.log(), &backend.store(), offset, &ann())
        .await
        .unwrap();
    assert_eq!(next, 2.into());
    let after = backend.position(&shipping()).await.unwrap();
    assert!(
        after.revision.epoch() > before.revision.epoch(),
        "commits in progress are fenced"
    );
    assert_eq!(run().await.unwrap().handled, 1);
    log.append(&[produced("poison", 1)]).await.unwrap();
    let report = run().await.unwrap();
    assert_eq!((report.handled, report.duplicates), (0, 1));
}

#[tokio::test]
async fn a_malformed_record_that_is_skipped_marks_nothing() {
    let memory = Memory::new();
    let log = memory.log("orders").unwrap();
    log.append(&[produced("0", 0)]).await.unwrap();
    let mut backend = Backend::of(memory, Script::default());
    backend.malformed = Some(0.into());
    seek(&shipping(), &backend.log(), &backend.store(), StartAt::Earliest, &ann())
        .await
        .unwrap();
    skip(&shipping(), &backend.log(), &backend.store(), 0.into(), &ann())
        .await
        .unwrap();
    // A later version may decode the record, which then counts as another record.
    assert_eq!(backend.position(&shipping()).await.unwrap().note.passed_offset(), None);
    log.append(&[produced("0", 0)]).await.unwrap();
    let run = Consumer::essentially_once(shipping(), backend.log(), backend.store(), backend.counter());
    assert_eq!(run.run_until_caught_up().await.unwrap().handled, 1);
}

#[tokio::test]
async fn what_is_not_the_next_record_is_refused_and_named() {
    let backend = Backend::new(RECORDS, Script::default()).await;
    let skip_at = async |offset: u64| {
        let error = skip(&shipping(), &backend.log(), &backend.store(), offset.into(), &ann())
            .await
            .unwrap_err();
        error.to_string()
    };
    assert!(skip_at(0).await.contains("no position yet"), "{}", skip_at(0).await);
    seek(
        &shipping(),
        &backend.log(),
        &backend.store(),
        StartAt::Offset(3.into()),
        &ann(),
    )
    .await
    .unwrap();
    let before = backend.position(&shipping()).await;
    assert!(skip_at(2).await.contains("is past it, at 3"), "{}", skip_at(2).await);
    assert!(
        skip_at(5).await.contains("next record of the consumer is at 3"),
        "{}",
        skip_at(5).await
    );
    assert!(
        skip_at(RECORDS).await.contains("no such record"),
        "{}",
        skip_at(RECORDS).await
    );
    assert_eq!(backend.position(&shipping()).await, before, "nothing was moved");
}
