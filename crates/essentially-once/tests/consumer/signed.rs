//! Signed records on their way through a consumer: refused ones, and what keys change about them.

use std::sync::atomic::Ordering;

use essentially_once::{
    Epoch, Origin,
    backend::Durability,
    consumer::{DeadLetterOptions, Report},
    signed::{Keys, SIGNATURE_HEADER, Signed, Signer},
};

use super::{
    letters::{effects, letters, parked, poisoned, retry_all},
    letters_decoded::sealed,
    *,
};

fn old() -> Keys {
    Keys::new("old", [7; 32]).unwrap()
}

fn new() -> Keys {
    Keys::new("new", [8; 32]).unwrap()
}

fn both() -> Keys {
    new().accept("old", [7; 32]).unwrap()
}

fn signer(keys: Keys) -> Signer {
    Signer::new("orders", keys).unwrap()
}

fn origin(sequence: u64) -> Origin {
    Origin::new(ProducerId::new("web").unwrap(), Epoch::STABLE, sequence)
}

/// A record whose payload is its number.
fn record(key: &'static str, number: u64) -> NewRecord {
    NewRecord::new(number.to_string()).key(key).origin(origin(number))
}

async fn run(backend: &Backend, log: impl Log + 'static) -> Result<Report, Error> {
    Consumer::essentially_once(shipping(), log, backend.store(), poisoned(backend, &[]))
        .dead_letters(DeadLetterOptions::new())
        .accept_volatile()
        .run_until_caught_up()
        .await
}

async fn run_with(backend: &Backend, keys: Keys) -> Result<Report, Error> {
    run(backend, Signed::new(backend.memory_log(), signer(keys))).await
}

#[tokio::test]
async fn a_letter_that_was_refused_is_verified_again_with_the_keys_of_now() {
    let backend = Backend::new(0, Script::default()).await;
    let sign = |keys: Keys, record| signer(keys).sign(record).unwrap();
    let mut altered = sign(old(), record("b", 2));
    altered.payload = "9".into();
    let records = [
        sign(old(), record("a", 0)),
        sign(new(), record("a", 1)),
        altered.clone(),
        sign(old(), record("a", 3)),
        sign(new(), record("c", 4)),
        sign(old(), record("a", 1)), // sent again
    ];
    backend.memory_log().append(&records).await.unwrap();
    run_with(&backend, old()).await.unwrap();
    assert_eq!(parked(&backend).await, [1, 2, 4]);
    assert_eq!(effects(&backend).await["a"], "0 3 1 ");

    assert_eq!(retry_all(&backend).await, 3);
    run_with(&backend, old()).await.unwrap();
    assert_eq!(parked(&backend).await, [1, 2, 4], "the key is still unknown");

    retry_all(&backend).await;
    let report = run_with(&backend, both()).await.unwrap();
    assert_eq!(report.duplicates, 1, "a copy of the one at 1 was handled");
    let effects = effects(&backend).await;
    assert_eq!((&*effects["a"], &*effects["b"], &*effects["c"]), ("0 3 1 ", "", "4 "));
    let [letter] = <[_; 1]>::try_from(letters(&backend).await).unwrap();
    assert_eq!(NewRecord::from(&letter.record), altered);
    assert!(
        letter.last_reason.contains("the record was changed"),
        "{}",
        letter.last_reason
    );
}

#[tokio::test]
async fn an_entry_that_the_wrapped_log_decodes_late_is_verified_then() {
    let backend = Backend::new(0, Script::default()).await;
    let sealed = sealed(&backend, |record| {
        let number = std::str::from_utf8(&record.payload).unwrap().parse().unwrap();
        record.origin = Some(origin(number));
    });
    let log = Signed::new(sealed.clone(), signer(old()));
    log.append(&[
        record("b", 1).header("sealed", "b"),
        record("c", 2).header("sealed", "c"),
    ])
    .await
    .unwrap();
    // Refused once the wrapped log can decode it: it was signed for another key than `c`.
    let altered = signer(old()).sign(record("b", 3).header("sealed", "c")).unwrap();
    backend.memory_log().append(&[altered]).await.unwrap();
    // Accepted with a signature only, although the wrapped log decodes it.
    backend
        .memory_log()
        .append(&[record("c", 4).header("sealed", "c")])
        .await
        .unwrap();
    run(&backend, log.clone()).await.unwrap();
    assert_eq!(parked(&backend).await, [0, 1, 2, 3]);
    for letter in letters(&backend).await {
        assert_eq!(
            letter.record.malformed.as_deref(),
            Some("no key"),
            "it passes unchanged"
        );
        assert!(letter.record.header(SIGNATURE_HEADER).is_some() || letter.record.payload == "4");
    }
    sealed.has_key.store(true, Ordering::Relaxed);
    retry_all(&backend).await;
    run(&backend, log).await.unwrap();
    assert_eq!(parked(&backend).await, [2, 3]);
    let effects = effects(&backend).await;
    assert_eq!((&*effects["b"], &*effects["c"]), ("1 ", "2 "));
}

#[tokio::test]
async fn a_log_gets_signatures_while_its_consumers_go_on() {
    let backend = Backend::new(3, Script::default()).await;
    let bare = backend.memory_log();
    run(&backend, bare.clone()).await.unwrap();
    let log = Signed::new(bare.clone(), signer(old())).unsigned_below(Offset::MAX);
    bare.append(&[record("a", 3)]).await.unwrap();
    run(&backend, log.clone()).await.unwrap();
    log.append(&[record("a", 4)]).await.unwrap();
    run(&backend, log.clone()).await.unwrap();
    let log = log.unsigned_below(bare.bounds().await.unwrap().end);
    run(&backend, log.clone()).await.unwrap();
    log.append(&[record("a", 5)]).await.unwrap();
    bare.append(&[record("a", 6)]).await.unwrap();
    run(&backend, log).await.unwrap();
    let effects = effects(&backend).await;
    assert_eq!((&*effects["-"], &*effects["a"]), ("0 1 2 ", "3 4 5 "));
    assert_eq!(
        parked(&backend).await,
        [6],
        "nobody may leave the signature out any more"
    );
}

#[tokio::test]
async fn a_key_can_be_removed_once_a_record_of_the_new_one_was_handled() {
    let backend = Backend::new(0, Script::default()).await;
    let append = async |keys, number| {
        let log = Signed::new(backend.memory_log(), signer(keys));
        log.append(&[record("a", number)]).await.unwrap();
    };
    append(old(), 0).await;
    run_with(&backend, old()).await.unwrap();
    let error = run_with(&backend, new()).await.unwrap_err();
    assert!(matches!(error, Error::LogChanged { .. }), "{error}");
    append(both(), 1).await;
    run_with(&backend, both()).await.unwrap();
    append(new(), 2).await;
    run_with(&backend, new()).await.unwrap();
    assert_eq!(effects(&backend).await["a"], "0 1 2 ");
}

#[tokio::test]
async fn all_else_is_passed_on_to_the_wrapped_log() {
    let backend = Backend::new(5, Script::default()).await;
    backend.deleted.store(2, Ordering::SeqCst);
    let bare = backend.log();
    let log = Signed::new(backend.log(), signer(old()));
    assert_eq!(log.id(), bare.id());
    assert_eq!(log.bounds().await.unwrap(), bare.bounds().await.unwrap());
    assert_eq!(log.readable_end().await.unwrap(), 3.into());
    assert_eq!(log.durability().await.unwrap(), Durability::Durable);
    let log = Signed::new(backend.memory_log(), signer(old()));
    assert_eq!(log.count_from(1.into()).await.unwrap(), Some(4));
    assert!(matches!(log.durability().await.unwrap(), Durability::Volatile(_)));
    assert!(matches!(log.read(6.into()).await, Err(Error::OutOfRange { .. })));
}
