//! JSON on its way through a consumer.

use essentially_once::{
    KeyValue,
    consumer::{DeadLetterOptions, FailedRecord, OnFailure, Report, dead_letters},
    json::{self, DecodeError},
};
use serde::{Deserialize, Serialize};

use super::{
    letters::{letters, parked},
    *,
};

#[derive(Serialize, Deserialize)]
struct Order {
    number: u64,
    country: String,
}

fn order(number: u64, country: &str) -> NewRecord {
    let country = country.to_owned();
    NewRecord::json(&Order { number, country }).unwrap()
}

/// Appends each order's number and its record's key to a list under the country.
async fn run(backend: &Backend, on_failure: fn(&FailedRecord<'_>) -> OnFailure) -> Result<Report, Error> {
    let handler = json::handler_fn(|order: Order, record: &Record, tx: &mut ScriptedTx| {
        Box::pin(async move {
            let key = record.key.as_deref().unwrap_or(b"-");
            let before = tx.get(order.country.as_bytes()).await?.unwrap_or_default();
            let list = [&before[..], order.number.to_string().as_bytes(), key, b" "].concat();
            tx.put(order.country.as_bytes(), &list).await?;
            Ok(())
        })
    });
    Consumer::essentially_once(shipping(), backend.log(), backend.store(), handler)
        .dead_letters(DeadLetterOptions::new())
        .on_failure_with(on_failure)
        .run_until_caught_up()
        .await
}

#[tokio::test]
async fn values_reach_the_handler_and_others_become_dead_letters_that_can_be_mended() {
    let backend = Backend::new(0, Script::default()).await;
    let records = [
        order(1, "France").key("a"),
        NewRecord::new("{\"number\": 2,\n \"country\": 4111}").key("b"),
        NewRecord::new("3,France").header("content-type", "text/csv"),
        order(4, "France"),
    ];
    backend.memory_log().append(&records).await.unwrap();
    let park = |_: &FailedRecord<'_>| OnFailure::DeadLetter;
    let report = run(&backend, park).await.unwrap();
    assert_eq!((report.handled, report.parked), (2, 2), "{report}");
    assert_eq!(parked(&backend).await, [1, 2]);
    let found = letters(&backend).await;
    let expected = "Order: a value is missing, unknown, or of another type at line 2, column 16";
    assert!(found[0].last_reason.ends_with(expected), "{}", found[0].last_reason);
    assert!(
        found[1].last_reason.contains("\"text/csv\""),
        "{}",
        found[1].last_reason
    );
    assert_eq!((found[0].tries, found[1].tries), (1, 1), "a retry cannot help");

    let store = backend.memory.store();
    let mended = order(2, "France").key("b");
    dead_letters::edit(&shipping(), &store, &found[0], &mended, &ann())
        .await
        .unwrap();
    run(&backend, park).await.unwrap();
    assert_eq!(parked(&backend).await, [2]);
    let mut tx = store.begin(&shipping()).await.unwrap();
    assert_eq!(tx.get(b"France").await.unwrap().unwrap(), "1a 4- 2b ");
}

#[tokio::test]
async fn a_policy_can_tell_why_a_payload_was_not_decoded() {
    let backend = Backend::new(0, Script::default()).await;
    let records = [
        NewRecord::new("1").header("content-type", "text/csv"),
        order(2, "France"),
    ];
    backend.memory_log().append(&records).await.unwrap();
    let report = run(&backend, |failed| match failed.error.cause().downcast_ref() {
        Some(DecodeError::ContentType { .. }) => OnFailure::Skip,
        _ => OnFailure::Stop,
    });
    let report = report.await.unwrap();
    assert_eq!((report.handled, report.parked), (1, 0), "{report}");
    backend.memory_log().append(&[NewRecord::new("{")]).await.unwrap();
    let error = run(&backend, |_| OnFailure::Stop).await.unwrap_err();
    assert!(matches!(error, Error::Unhandled { .. }), "{error}");
}
