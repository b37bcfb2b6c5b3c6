//! What signatures detect, on the in-memory log.

use proptest::{collection::vec, option, prelude::*};

use super::*;
use crate::{
    Epoch, Origin, ProducerId,
    memory::{Memory, MemoryLog, SIZE_LIMIT},
};

/// The result of a future that never waits, as those of the memory backend.
fn now<T>(future: impl Future<Output = T>) -> T {
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    match std::pin::pin!(future).poll(&mut context) {
        std::task::Poll::Ready(done) => done,
        std::task::Poll::Pending => panic!("it waits"),
    }
}

fn memory_log() -> MemoryLog {
    Memory::new().log("orders").expect("name")
}

fn first_key() -> Keys {
    Keys::new("2026-11", [7; 32]).expect("a key")
}

fn second_key() -> Keys {
    Keys::new("2026-12", [8; 32]).expect("a key")
}

fn signer(keys: Keys) -> Signer {
    Signer::new("orders", keys).expect("name")
}

fn origin(sequence: u64) -> Origin {
    Origin::new(ProducerId::new("web").expect("name"), Epoch::new(3), sequence)
}

fn record() -> NewRecord {
    NewRecord::new("payload")
        .key("key")
        .header("b", "1")
        .header("a", "")
        .origin(origin(9))
}

/// What a log with this signer yields for a record that its backend holds.
fn read_as(signer: Signer, unsigned_below: Offset, stored: NewRecord) -> Record {
    let log = memory_log();
    now(log.append(&[stored])).expect("append");
    let signed = Signed::new(log, signer).unsigned_below(unsigned_below);
    let mut reader = now(signed.read(Offset::ZERO)).expect("read");
    now(reader.next(1)).expect("next").remove(0)
}

fn read(stored: NewRecord) -> Record {
    read_as(signer(first_key()), Offset::ZERO, stored)
}

/// Why a log with the first key refuses what its backend holds.
fn reason(stored: NewRecord) -> String {
    let malformed = read(stored).malformed.expect("refused");
    malformed.strip_prefix(REFUSED).expect("by the wrapper").to_owned()
}

fn signed(record: NewRecord) -> NewRecord {
    signer(first_key()).sign(record).expect("signs")
}

/// Records whose texts are ASCII, so that a text with a flipped low bit is a text.
fn any_record() -> impl Strategy<Value = NewRecord> {
    let bytes = || vec(any::<u8>(), 0..20);
    let epoch = prop_oneof![Just(0), any::<u64>()];
    let origin = ("[a-z0-9][a-zA-Z0-9._:/@+=-]{0,20}", epoch, any::<u64>());
    (option::of(bytes()), vec(("[ -~]{0,9}", bytes()), 0..4), bytes(), origin).prop_map(
        |(key, headers, payload, (producer, epoch, sequence))| {
            let mut record = NewRecord::new(payload);
            record.key = key.map(Into::into);
            record.headers = headers.into_iter().map(|(name, value)| (name, value.into())).collect();
            let producer = ProducerId::new(producer).expect("a valid name");
            record.origin(Origin::new(producer, Epoch::new(epoch), sequence))
        },
    )
}

/// The bytes with one bit flipped, unless there are none.
fn flipped(bytes: &[u8], at: usize) -> Option<Vec<u8>> {
    let mut flipped = bytes.to_vec();
    let byte = flipped.get_mut(at / 8 % bytes.len().max(1))?;
    *byte ^= 1 << (at % 8);
    Some(flipped)
}

/// A text with one low bit flipped.
fn flipped_text(text: &str, at: usize) -> Option<String> {
    let at = at / 8 * 8 + at % 7;
    Some(String::from_utf8(flipped(text.as_bytes(), at)?).expect("ASCII stays ASCII"))
}

/// The origins that differ from this one in a bit.
fn flipped_origins(origin: &Origin, at: usize) -> Vec<Origin> {
    let (producer, epoch) = (origin.numbering.producer(), origin.numbering.epoch().get());
    let bit = 1 << (at % 64);
    let mut origins = vec![
        Origin::new(producer.clone(), Epoch::new(epoch ^ bit), origin.sequence),
        Origin::new(producer.clone(), Epoch::new(epoch), origin.sequence ^ bit),
    ];
    // Many flips break the rule for names, and no log can yield those.
    let name = flipped_text(producer.as_str(), at).and_then(|name| ProducerId::new(name).ok());
    origins.extend(name.map(|name| Origin::new(name, Epoch::new(epoch), origin.sequence)));
    origins
}

/// The signed record with one bit flipped in one of its parts, for each part.
fn with_flipped_bits(signed: &NewRecord, at: usize) -> Vec<NewRecord> {
    let with = |change: &dyn Fn(&mut NewRecord)| {
        let mut altered = signed.clone();
        change(&mut altered);
        altered
    };
    let mut altered = Vec::new();
    if let Some(payload) = flipped(&signed.payload, at) {
        altered.push(with(&|record| record.payload = payload.clone().into()));
    }
    if let Some(key) = signed.key.as_ref().and_then(|key| flipped(key, at)) {
        altered.push(with(&|record| record.key = Some(key.clone().into())));
    }
    // The last header is the signature.
    for (place, (name, value)) in signed.headers.iter().enumerate() {
        if let Some(name) = flipped_text(name, at) {
            altered.push(with(&|record| record.headers[place].0.clone_from(&name)));
        }
        if let Some(value) = flipped(value, at) {
            altered.push(with(&|record| record.headers[place].1 = value.clone().into()));
        }
    }
    for origin in signed.origin.iter().flat_map(|origin| flipped_origins(origin, at)) {
        altered.push(with(&|record| record.origin = Some(origin.clone())));
    }
    altered
}

/// The signed record with parts exchanged, moved, added and removed.
fn with_other_structure(signed: &NewRecord) -> Vec<NewRecord> {
    let mut altered = Vec::new();
    let mut push = |change: &dyn Fn(&mut NewRecord)| {
        let mut record = signed.clone();
        change(&mut record);
        if record != *signed {
            altered.push(record);
        }
    };
    push(&|record| {
        record.key = match &record.key {
            None => Some("".into()),
            Some(_) => None,
        }
    });
    push(&|record| record.origin = None);
    push(&|record| record.headers.insert(0, ("".into(), "".into())));
    push(&|record| {
        let last = record.headers.last().expect("the signature").clone();
        record.headers.push(last);
    });
    let headers = signed.headers.len() - 1;
    for place in 0..headers {
        push(&|record| drop(record.headers.remove(place)));
        // The last byte of a name becomes the first one of the value.
        push(&|record| {
            let (name, value) = &mut record.headers[place];
            if let Some(moved) = name.pop() {
                *value = [moved.to_string().as_bytes(), value].concat().into();
            }
        });
    }
    for place in 1..headers {
        push(&|record| record.headers.swap(place - 1, place));
    }
    // The last byte of the key becomes the first one of the payload.
    push(&|record| {
        if let Some((last, key)) = record.key.clone().as_deref().and_then(<[u8]>::split_last) {
            record.payload = [&[*last][..], &record.payload].concat().into();
            record.key = Some(key.to_vec().into());
        }
    });
    altered
}

fn content(record: &Record) -> NewRecord {
    NewRecord::from(record)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_signed_record_is_yielded_as_it_was_appended(new in any_record()) {
        let log = memory_log();
        let wrapped = Signed::new(log, signer(first_key()));
        now(wrapped.append(std::slice::from_ref(&new))).expect("append");
        let records = now(now(wrapped.read(Offset::ZERO)).expect("read").next(1)).expect("next");
        prop_assert_eq!(&records[0].malformed, &None);
        prop_assert_eq!(content(&records[0]), new);
    }

    #[test]
    fn a_flipped_bit_in_any_part_is_detected_and_the_record_stays_as_it_was(new in any_record(), at in any::<usize>()) {
        for altered in with_flipped_bits(&signed(new), at) {
            let record = read(altered.clone());
            prop_assert!(record.malformed.is_some(), "not detected: {:?}", altered);
            prop_assert_eq!(content(&record), altered);
        }
    }

    #[test]
    fn exchanged_moved_added_and_removed_parts_are_detected(new in any_record()) {
        for altered in with_other_structure(&signed(new)) {
            let record = read(altered.clone());
            prop_assert!(record.malformed.is_some(), "not detected: {:?}", altered);
            prop_assert_eq!(content(&record), altered);
        }
    }

    #[test]
    fn a_record_of_another_audience_is_refused(new in any_record()) {
        let other = Signer::new("payments", first_key()).expect("name");
        prop_assert!(reason(other.sign(new).expect("signs")).contains("another audience than \"orders\""));
    }

    #[test]
    fn arbitrary_signatures_are_refused_without_a_panic(value in "(1|2|12):[a-z:.]{0,8}:?[0-9a-f]{0,70}", raw in vec(any::<u8>(), 0..90)) {
        for value in [value.into_bytes(), raw] {
            reason(record().header(SIGNATURE_HEADER, value));
        }
    }
}

/// Computed by another program: Python's `hmac` over the bytes of the module's documentation.
#[test]
fn the_format_is_what_it_was() {
    let plain = NewRecord::new("").origin(Origin::new(ProducerId::new("web").expect("name"), Epoch::STABLE, 9));
    for (record, mac) in [
        (
            record(),
            "0b0bae003348c13247b98a4e4dd2ce9d4e2fe39083044893dc587c9b24130e20",
        ),
        (
            plain,
            "4f0e3186bee79166da81205cd82cd88bab8bf97476a8ba3c76dffd5739175473",
        ),
    ] {
        let (name, value) = signed(record).headers.pop().expect("a signature");
        assert_eq!(name, "eo-signature");
        assert_eq!(value, format!("1:2026-11:{mac}"));
    }
    assert_eq!(REFUSED, "signature refused: ", "dead letters keep it");
}

#[test]
fn a_record_that_cannot_be_signed_is_refused_before_anything_is_appended() {
    let log = Signed::new(memory_log(), signer(first_key()));
    for (bad, reason) in [
        (NewRecord::new("x"), "no origin"),
        (
            record().header(SIGNATURE_HEADER, "mine"),
            "header `eo-signature`, which is the signature's",
        ),
    ] {
        let error = now(log.append(&[record(), bad])).expect_err("refused").to_string();
        assert!(
            error.contains("sign record 2 of 2 for log orders") && error.contains(reason),
            "{error}"
        );
        assert_eq!(now(log.count_from(Offset::ZERO)).expect("counts"), Some(0));
    }
    assert_eq!(now(log.append(&[])).expect("nothing to do"), None);
    let error = signer(first_key()).sign(NewRecord::new("x")).expect_err("refused");
    assert!(
        error.to_string().contains("sign a record for orders: it has no origin"),
        "{error}"
    );
}

/// The documentation says by how much.
#[test]
fn the_signature_counts_towards_the_record_limit() {
    let log = Signed::new(memory_log(), signer(first_key()));
    let of = |size: usize| NewRecord::new(vec![0; size]).origin(origin(1));
    let largest = SIZE_LIMIT - 79 - "2026-11".len();
    now(log.append(&[of(largest)])).expect("fits");
    let error = now(log.append(&[of(1), of(largest + 1)])).expect_err("too large");
    assert!(
        matches!(error, Error::TooLarge { what: "record", size, limit } if size == limit + 1),
        "{error}"
    );
    assert_eq!(now(log.count_from(Offset::ZERO)).expect("counts"), Some(1));
}

#[test]
fn keys_are_replaced_without_a_refused_record() {
    let both = |signing: Keys, id: &str, byte: u8| signing.accept(id, [byte; 32]).expect("another key");
    let steps = [
        first_key(),
        both(first_key(), "2026-12", 8),
        both(second_key(), "2026-11", 7),
        second_key(),
    ];
    // At any time, some processes are one step behind.
    for pair in steps.windows(2) {
        for (sender, consumer) in [(0, 1), (1, 0), (0, 0), (1, 1)] {
            let stored = signer(pair[sender].clone()).sign(record()).expect("signs");
            let is_old = stored.headers[2].1.starts_with(b"1:2026-11");
            let read = read_as(signer(pair[consumer].clone()), Offset::ZERO, stored);
            // Records of the old key are gone when the key is.
            let is_late = is_old && pair[consumer].find("2026-11").is_none();
            assert_eq!(read.malformed.is_some(), is_late, "{pair:?} {sender} {consumer}");
        }
    }
    let signing: Vec<_> = steps
        .iter()
        .map(|keys| &signer(keys.clone()).sign(record()).expect("signs").headers[2].1[2..9] == b"2026-12")
        .collect();
    assert_eq!(signing, [false, false, true, true], "the first key signs");
}

#[test]
fn reasons_say_what_is_wrong_with_a_signature() {
    let with = |signature: &str| record().header(SIGNATURE_HEADER, signature.to_owned());
    let mac = "0".repeat(64);
    let invalid = "is not `1:<key id>:<64 hexadecimal digits>`";
    for (stored, expected) in [
        (record(), "no header `eo-signature`"),
        (signed(record()).header(SIGNATURE_HEADER, "x"), "more than one header"),
        (with(""), invalid),
        (with("1:2026-11"), invalid),
        (with(&format!("1:2026-11:{}", &mac[2..])), invalid),
        (with(&format!("1:2026-11:{mac}00")), invalid),
        (with(&format!("1:a\nb:{mac}")), invalid),
        (with(&format!("01:2026-11:{mac}")), "version 01"),
        (with(&format!("2:2026-11:{mac}")), "version 2 of the header"),
        (with(&format!("1:2026-12:{mac}")), "the key \"2026-12\" is unknown"),
        (with(&format!("1:2026-11:{mac}")), "the record was changed"),
        (
            NewRecord {
                origin: None,
                ..signed(record())
            },
            "no origin",
        ),
    ] {
        let reason = reason(stored);
        assert!(reason.contains(expected), "{reason}");
    }
    let mut stored = signed(record());
    let signature = String::from_utf8(stored.headers[2].1.to_vec()).expect("text");
    stored.headers[2].1 = signature.to_uppercase().into();
    assert!(reason(stored).contains(invalid), "a signature has one spelling");
}

/// Somebody may give one secret two ids.
#[test]
fn the_id_of_the_key_is_signed_too() {
    let twice = first_key().accept("2026-12", [7; 32]).expect("another id");
    let mut stored = signed(record());
    let signature = String::from_utf8(stored.headers[2].1.to_vec()).expect("text");
    stored.headers[2].1 = signature.replace("2026-11", "2026-12").into();
    let read = read_as(signer(twice), Offset::ZERO, stored);
    assert!(read.malformed.is_some_and(|reason| reason.contains("was changed")));
}

#[test]
fn records_without_a_signature_are_accepted_below_the_offset_only() {
    let log = memory_log();
    let mut altered = signed(record());
    altered.payload = "altered".into();
    now(log.append(&[NewRecord::new("old"), altered, record(), record(), signed(record())])).expect("append");
    let wrapped = Signed::new(log, signer(first_key())).unsigned_below(3.into());
    let records = now(now(wrapped.read(Offset::ZERO)).expect("read").next(9)).expect("next");
    let refused: Vec<_> = records.iter().map(|record| record.malformed.is_some()).collect();
    assert_eq!(refused, [false, true, false, true, false]);
    assert_eq!(records[0].payload, "old");

    // A letter that was refused before the offset was raised.
    let raised = wrapped.clone().unsigned_below(4.into());
    assert_eq!(wrapped.decode(&records[3]), None);
    assert_eq!(
        raised.decode(&records[3]).map(|record| content(&record)),
        Some(self::record())
    );
    assert_eq!(raised.decode(&records[1]), None);
}

#[test]
fn a_refused_record_is_decoded_once_its_key_is_there() {
    let refused = read(signer(second_key()).sign(record()).expect("signs"));
    assert!(refused.malformed.is_some());
    let of = |keys| Signed::new(memory_log(), signer(keys));
    assert_eq!(of(first_key()).decode(&refused), None);
    let decoded = of(first_key().accept("2026-12", [8; 32]).expect("a key")).decode(&refused);
    let decoded = decoded.expect("its key is there");
    assert_eq!((content(&decoded), decoded.offset), (record(), refused.offset));
    assert_eq!(decoded.malformed, None);
    assert_eq!(of(second_key()).decode(&decoded), None, "it is not malformed");
}

#[test]
fn neither_debug_nor_errors_show_a_key() {
    let log = Signed::new(memory_log(), signer(first_key()));
    assert_eq!(
        format!("{:?}", log.verifier),
        "Verifier { signer: Signer { audience: \"orders\", keys: Keys { signing: \"2026-11\", accepted: [] } }, \
         unsigned_below: Offset(0) }"
    );
    let secret = "c29e".repeat(16);
    for (id, key) in [
        (secret.as_str(), "2026-11"),
        ("", &secret),
        ("a:b", &secret),
        ("a", &secret[..31]),
    ] {
        let error = Keys::new(id, key).expect_err("refused").to_string();
        assert!(error.starts_with("signing key: the "), "{error}");
        assert!(!error.contains("c29e"), "{error}");
    }
    Keys::new("a", &secret[..32]).expect("long enough");
    let error = first_key().accept("2026-11", [8; 32]).expect_err("twice");
    assert!(error.to_string().contains("two keys have the id"), "{error}");
    assert!(Signer::new("a b", first_key()).is_err());
}
