//! Cases for dead letters, [D1 to D4](essentially_once::backend::DeadLetters#contract).

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use essentially_once::{
    ConsumerId, Error, KeyValue, Log, NewRecord, Offset, OffsetStore, Origin, Record,
    backend::{DeadLetter, DeadLetters, Transaction},
    consumer::Operator,
    memory::Memory,
};

use super::{
    common::{advance, consumer},
    compare,
    restart::{once_ready, up},
    store::{numbering, value},
};
use crate::{
    harness::{Backend, Harness, Support},
    violation::{CaseResult, Violation, ensure},
};

/// Whether the store keeps letters, which its transaction states.
pub(super) fn support<H: Harness>() -> Support {
    match <<H::Backend as Backend>::Store as OffsetStore>::Tx::KEEPS_DEAD_LETTERS {
        true => Support::Yes,
        false => Support::No("the store's transaction keeps no dead letters"),
    }
}

pub(super) fn letters<Tx: Transaction>(tx: &mut Tx) -> Result<&mut dyn DeadLetters, Violation> {
    tx.dead_letters()
        .ok_or_else(|| Violation::new("KEEPS_DEAD_LETTERS is true, but `dead_letters` returned None"))
}

pub(super) fn time(millis: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_millis(1_795_000_000_000 + millis)
}

/// A letter of a record at an offset with a key.
pub(super) fn letter(offset: impl Into<Offset>, key: Option<&[u8]>) -> DeadLetter {
    let offset = offset.into();
    let mut record = Record::new(offset, time(1), format!("payload of {offset}"));
    record.key = key.map(Bytes::copy_from_slice);
    DeadLetter::new(record, 1, "a reason", time(2))
}

/// Parks and removes letters in one commit, which moves the position by nothing.
pub(super) async fn commit<S: OffsetStore>(
    store: &S,
    consumer: &ConsumerId,
    log: &dyn Log,
    parked: &[DeadLetter],
    removed: &[Offset],
) -> CaseResult {
    let position = store.position(consumer).await?;
    let next = position.as_ref().map_or(Offset::ZERO, |position| position.next);
    let mut tx = store.begin(consumer).await?;
    for letter in parked {
        letters(&mut tx)?.park(letter).await?;
    }
    for offset in removed {
        letters(&mut tx)?.remove(*offset).await?;
    }
    Ok(tx.commit(advance(position.as_ref(), log, next)).await?)
}

/// All letters as a new transaction sees them.
pub(super) async fn all<S: OffsetStore>(store: &S, consumer: &ConsumerId) -> Result<Vec<DeadLetter>, Error> {
    let mut tx = store.begin(consumer).await?;
    let all = match tx.dead_letters() {
        Some(letters) => letters.list(None, 1_000).await?,
        None => Vec::new(),
    };
    tx.rollback().await?;
    Ok(all)
}

pub(super) fn offsets(letters: &[DeadLetter]) -> Vec<Offset> {
    letters.iter().map(|letter| letter.record.offset).collect()
}

pub(super) fn differs(found: &DeadLetter, expected: &DeadLetter) -> Option<String> {
    let fields = |letter: &DeadLetter| {
        format!(
            "{} tries, {:?}, {:?}, parked {:?}, failed {:?}, due {:?}, version {}, edited {:?}",
            letter.tries,
            letter.first_reason,
            letter.last_reason,
            letter.parked_at,
            letter.last_failed_at,
            letter.due,
            letter.version,
            letter.edit.as_ref().map(|edit| (&edit.by, &edit.reason, edit.at)),
        )
    };
    let edit = |letter: &DeadLetter| letter.edit.as_ref().map(|edit| edit.original.clone());
    let originals = match (edit(found), edit(expected)) {
        (Some(found), Some(expected)) => {
            compare::record(&found, &expected).map(|how| format!("of the original, {how}"))
        }
        (None, Some(_)) => Some("its edit is missing".into()),
        _ => None,
    };
    compare::record(&found.record, &expected.record)
        .or(originals)
        .or_else(|| (found != expected).then(|| format!("{}, not {}", fields(found), fields(expected))))
}

/// [D1](essentially_once::backend::DeadLetters#contract): parking and removing take effect together
/// with the position and the state, and not before.
pub(super) async fn d1_letters_are_applied_with_the_commit<H: Harness>(_: &H, backend: &H::Backend) -> CaseResult {
    let (store, log) = (backend.store().await?, backend.log("orders").await?);
    let (other, shipping) = (backend.store().await?, consumer("shipping"));
    for (n, expected) in [(1u64, vec![Offset::from(1)]), (2, vec![])] {
        let position = store.position(&shipping).await?;
        let mut tx = store.begin(&shipping).await?;
        tx.put(b"n", &n.to_be_bytes()).await?;
        match n {
            1 => letters(&mut tx)?.park(&letter(1, Some(b"a"))).await?,
            _ => {
                let existed = letters(&mut tx)?.remove(1.into()).await?;
                ensure!(existed, "`remove` did not find the letter");
            }
        }
        tx.commit(advance(position.as_ref(), &*log, n)).await?;
        // First, since a transaction may see what its handle read last.
        let next = other.position(&shipping).await?.map(|position| position.next);
        let found = (
            next,
            offsets(&all(&other, &shipping).await?),
            value(&other, &shipping, b"n").await?,
        );
        ensure!(
            found == (Some(n.into()), expected, Some(n.to_be_bytes().to_vec())),
            "after commit {n}: {found:?}"
        );
    }
    Ok(())
}

/// [D1](essentially_once::backend::DeadLetters#contract): a stale commit parks and removes nothing,
/// and neither does a transaction that is dropped or rolled back.
pub(super) async fn d1_what_is_not_committed_leaves_no_trace<H: Harness>(_: &H, backend: &H::Backend) -> CaseResult {
    let (store, log) = (backend.store().await?, backend.log("orders").await?);
    let shipping = consumer("shipping");
    let first = advance(None, &*log, 1);
    let mut tx = store.begin(&shipping).await?;
    letters(&mut tx)?.park(&letter(1, Some(b"a"))).await?;
    tx.commit(first.clone()).await?;
    for ending in ["stale", "rolled back", "dropped"] {
        let mut tx = store.begin(&shipping).await?;
        letters(&mut tx)?.park(&letter(2, Some(b"a"))).await?;
        letters(&mut tx)?.remove(1.into()).await?;
        match ending {
            "stale" => {
                let result = tx.commit(first.clone()).await;
                let is_fenced = matches!(result, Err(Error::Fenced { .. }));
                ensure!(is_fenced, "a stale commit returned {result:?}");
            }
            "rolled back" => tx.rollback().await?,
            _ => drop(tx),
        }
        let found = offsets(&all(&store, &shipping).await?);
        ensure!(
            found == [1.into()],
            "a transaction that was {ending} changed the letters to {found:?}"
        );
    }
    Ok(())
}

/// Chooses steps, the same at every run.
struct Choices(u64);

impl Choices {
    fn below(&mut self, bound: u64) -> u64 {
        // Xorshift64 (Marsaglia, "Xorshift RNGs", 2003).
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

/// [D1](essentially_once::backend::DeadLetters#contract) and D3: after every step of a random
/// history, every read within the transaction agrees with the in-memory backend.
pub(super) async fn d1_every_read_agrees_with_the_reference<H: Harness>(_: &H, backend: &H::Backend) -> CaseResult {
    const KEYS: [Option<&[u8]>; 4] = [None, Some(b""), Some(b"a"), Some(b"b")];
    let (store, log) = (backend.store().await?, backend.log("orders").await?);
    let (shipping, reference) = (consumer("shipping"), Memory::new().store());
    let mut choices = Choices(0x9E37_79B9_7F4A_7C15);
    for _ in 0..12 {
        let position = store.position(&shipping).await?;
        let (mut tx, mut expected) = (store.begin(&shipping).await?, reference.begin(&shipping).await?);
        let expected_position = reference.position(&shipping).await?;
        for step in 0..8 {
            let offset = Offset::new(choices.below(2), choices.below(8));
            let did = match choices.below(8) {
                0 => format!(
                    "remove_from({offset}) returned {} of {}",
                    letters(&mut tx)?.remove_from(offset).await?,
                    expected.remove_from(offset).await?
                ),
                1 | 2 => format!(
                    "remove({offset}) returned {} instead of {}",
                    letters(&mut tx)?.remove(offset).await?,
                    expected.remove(offset).await?
                ),
                _ => {
                    // A letter keeps its key.
                    let key = match expected.letter(offset).await? {
                        Some(stored) => stored.record.key,
                        None => KEYS[choices.below(4) as usize].map(Bytes::from_static),
                    };
                    let mut letter = letter(offset, key.as_deref());
                    letter.due = [None, Some(time(choices.below(3)))][choices.below(2) as usize];
                    letter.version = choices.below(9);
                    letters(&mut tx)?.park(&letter).await?;
                    expected.park(&letter).await?;
                    format!("park({offset}, key {key:?})")
                }
            };
            let words: Vec<&str> = did.split(' ').collect();
            if let [_, "returned", found, .., wanted] = words[..] {
                ensure!(found == wanted, "step {step}: {did}");
            }
            let after = Some(Offset::new(choices.below(2), choices.below(8)));
            let limit = 1 + choices.below(5) as usize;
            let found = letters(&mut tx)?;
            for (what, found, wanted) in [
                (
                    "all letters",
                    found.list(None, 100).await?,
                    expected.list(None, 100).await?,
                ),
                (
                    "a page",
                    found.list(after, limit).await?,
                    expected.list(after, limit).await?,
                ),
                (
                    "the letter",
                    found.letter(offset).await?.into_iter().collect(),
                    expected.letter(offset).await?.into_iter().collect::<Vec<_>>(),
                ),
                (
                    "the head of `a`",
                    found.head(b"a").await?.into_iter().collect(),
                    expected.head(b"a").await?.into_iter().collect::<Vec<_>>(),
                ),
                (
                    "the first due",
                    found.first_due().await?.into_iter().collect(),
                    expected.first_due().await?.into_iter().collect::<Vec<_>>(),
                ),
            ] {
                ensure!(
                    offsets(&found) == offsets(&wanted),
                    "step {step}, {did}: {what}: {:?}, not {:?}",
                    offsets(&found),
                    offsets(&wanted)
                );
                let mut pairs = found.iter().zip(&wanted);
                if let Some(how) = pairs.find_map(|(found, wanted)| differs(found, wanted)) {
                    return Err(Violation::new(format!("step {step}, {did}: {what}: {how}")));
                }
            }
            let key = [None, Some(&b""[..]), Some(b"a")][choices.below(3) as usize];
            let counts = (found.counts(key, limit).await?, expected.counts(key, limit).await?);
            ensure!(
                counts.0 == counts.1,
                "step {step}, {did}: counts after {key:?}: {counts:?}"
            );
            let totals = (found.total().await?, expected.total().await?);
            ensure!(totals.0 == totals.1, "step {step}, {did}: totals {totals:?}");
        }
        if choices.below(4) == 0 {
            tx.rollback().await?;
            expected.rollback().await?;
            continue;
        }
        tx.commit(advance(position.as_ref(), &*log, 1)).await?;
        expected.commit(advance(expected_position.as_ref(), &*log, 1)).await?;
    }
    Ok(())
}

/// [D2](essentially_once::backend::DeadLetters#contract): every field comes back, from another
/// handle.
pub(super) async fn d2_a_letter_comes_back_as_it_was_parked<H: Harness>(_: &H, backend: &H::Backend) -> CaseResult {
    let (store, log) = (backend.store().await?, backend.log("orders").await?);
    let shipping = consumer("shipping");
    let mut parked = vec![
        letter(1, None),
        letter(2, Some(b"")),
        letter(3, Some(&[0, 255, 128, b'\n', b'"'])),
        letter(4, Some(b"headers")),
        letter(5, Some(b"origin")),
        letter(6, Some(b"malformed")),
        letter(7, Some(b"times")),
        letter(Offset::new(1_795_000_000_000, 3), Some(b"reasons")),
        letter(Offset::new(u64::MAX, u64::MAX - 1), Some(b"the end")),
    ];
    parked[0].record.payload = Bytes::from_static(&[0, 255, 254, b'\r', 0]);
    parked[1].record.payload = Bytes::new();
    parked[3].record.headers = vec![
        ("b".into(), Bytes::from_static(b"2")),
        ("a".into(), Bytes::new()),
        ("b".into(), Bytes::from_static(&[255, 0])),
        (String::new(), Bytes::from_static(b"no name")),
    ];
    parked[4].record.origin = Some(Origin::of(numbering("web#18446744073709551615"), u64::MAX));
    parked[5].record.malformed = Some(Arc::from("the headers are cut short: \u{1F4A5}"));
    parked[5].record.origin = Some(Origin::of(numbering("web"), 0));
    parked[6].record.appended_at = UNIX_EPOCH;
    parked[6].parked_at = time(123);
    parked[6].last_failed_at = time(456);
    parked[6].due = Some(time(789));
    parked[7].tries = u32::MAX;
    parked[7].version = u64::MAX;
    parked[7].first_reason = String::new();
    parked[7].last_reason = "ü".repeat(DeadLetter::REASON_LIMIT / 2);
    // The letter is edited, and then fails again.
    let mut edited = letter(8, Some(b"before"));
    edited.record.headers.clone_from(&parked[3].record.headers);
    edited.record.origin = Some(Origin::of(numbering("web#7"), 1));
    edited.record.malformed = Some(Arc::from("größer"));
    parked.insert(7, edited.clone());
    commit(&store, &shipping, &*log, &parked, &[]).await?;
    edited.edit(
        NewRecord::new("after").key("after"),
        &Operator::new("ann").because("größer"),
    );
    commit(&store, &shipping, &*log, std::slice::from_ref(&edited), &[]).await?;
    edited.tries += 1;
    commit(&store, &shipping, &*log, std::slice::from_ref(&edited), &[]).await?;
    parked[7] = edited;
    let fresh = backend.store().await?;
    let found = all(&fresh, &shipping).await?;
    ensure!(
        offsets(&found) == offsets(&parked),
        "parked {:?}, found {:?}",
        offsets(&parked),
        offsets(&found)
    );
    for (found, parked) in found.iter().zip(&parked) {
        if let Some(how) = differs(found, parked) {
            let offset = parked.record.offset;
            return Err(Violation::new(format!("the letter at {offset}: {how}")));
        }
    }
    let mut tx = fresh.begin(&shipping).await?;
    for (key, expected) in [("before", None), ("after", Some(8.into()))] {
        let head = letters(&mut tx)?.head(key.as_bytes()).await?;
        let head = head.map(|letter| letter.record.offset);
        ensure!(
            head == expected,
            "after an edit of the key, the head of {key} is {head:?}"
        );
    }
    Ok(())
}

/// [D2](essentially_once::backend::DeadLetters#contract): the largest record that the log takes can
/// be parked, with the longest reasons.
pub(super) async fn d2_the_largest_record_can_be_parked<H: Harness>(harness: &H, backend: &H::Backend) -> CaseResult {
    let limit = harness.capabilities().record_limit.unwrap_or_default();
    let (store, log) = (backend.store().await?, backend.log("orders").await?);
    let shipping = consumer("shipping");
    let reason = "r".repeat(DeadLetter::REASON_LIMIT);
    let record = Record::new(1.into(), time(1), vec![b'x'; limit]);
    let largest = [DeadLetter::new(record, 1, &reason, time(2))];
    commit(&store, &shipping, &*log, &largest, &[]).await?;
    let found = all(&store, &shipping).await?;
    ensure!(found == largest, "{} letters came back, or changed", found.len());
    Ok(())
}

/// [D2](essentially_once::backend::DeadLetters#contract): letters are as durable as the position.
pub(super) async fn d2_letters_survive_a_restart<H: Harness>(_: &H, backend: &H::Backend) -> CaseResult {
    let (store, log) = (backend.store().await?, backend.log("orders").await?);
    let shipping = consumer("shipping");
    for n in 1..=5u64 {
        let removed = Offset::from(n.saturating_sub(3));
        commit(&store, &shipping, &*log, &[letter(n, Some(b"a"))], &[removed]).await?;
    }
    backend.restart().await?;
    let store = up(|| backend.store()).await?;
    let found = offsets(&once_ready(|| all(&store, &shipping)).await?);
    ensure!(found == [3, 4, 5].map(Offset::from), "after a restart: {found:?}");
    Ok(())
}

/// [D3](essentially_once::backend::DeadLetters#contract): keys that look alike are different, and
/// letters without a key or with one that cannot be trusted have none.
pub(super) async fn d3_keys_are_compared_to_the_byte<H: Harness>(_: &H, backend: &H::Backend) -> CaseResult {
    let (store, log) = (backend.store().await?, backend.log("orders").await?);
    let shipping = consumer("shipping");
    let long = [b'k'; 1_000];
    let mut other_end = long;
    other_end[999] = b'l';
    let mut keys: Vec<&[u8]> = vec![b"", &[0], &[0, 0], b"a", b"A", b"a ", "ä".as_bytes(), &[255], &[255, 0]];
    keys.extend([&long[..], &other_end, &long[..999]]);
    keys.sort_unstable();
    let mut parked = Vec::new();
    for (n, key) in (1..).zip(&keys) {
        let mut malformed = letter(10 * n - 1, Some(key));
        malformed.record.malformed = Some("unreadable".into());
        parked.push(malformed);
        parked.extend([0, 1].map(|more| letter(10 * n + more, Some(key))));
        parked.push(letter(10 * n + 2, None));
    }
    commit(&store, &shipping, &*log, &parked, &[]).await?;
    let mut tx = store.begin(&shipping).await?;
    let found = letters(&mut tx)?;
    for (n, key) in (1u64..).zip(&keys) {
        let head = found.head(key).await?.map(|head| head.record.offset);
        ensure!(
            head == Some((10 * n).into()),
            "the head of {key:?} is {head:?}, not {}",
            10 * n
        );
    }
    let head = found.head(b"absent").await?;
    ensure!(head.is_none(), "an absent key has a head: {head:?}");
    let mut counts = Vec::new();
    loop {
        let after = counts.last().map(|(key, _): &(Bytes, u64)| key.clone());
        let page = found.counts(after.as_deref(), 5).await?;
        ensure!(page.len() <= 5, "a page of 5 keys has {}", page.len());
        match page.is_empty() {
            true => break,
            false => counts.extend(page),
        }
    }
    let expected: Vec<_> = keys.iter().map(|key| (Bytes::copy_from_slice(key), 2)).collect();
    ensure!(counts == expected, "counts {counts:?}, not {expected:?}");
    let total = found.total().await?;
    ensure!(total == 4 * keys.len() as u64, "{total} letters in all");
    tx.rollback().await?;
    Ok(())
}

/// [D4](essentially_once::backend::DeadLetters#contract): letters of one consumer are no other's.
pub(super) async fn d4_consumers_do_not_see_each_others_letters<H: Harness>(_: &H, backend: &H::Backend) -> CaseResult {
    let (store, log) = (backend.store().await?, backend.log("orders").await?);
    let names = ["shipping", "Shipping", "shipping-", "shipping-2", "s"].map(consumer);
    for (n, name) in (1u64..).zip(&names) {
        let parked = [7, 10 + n].map(|offset| letter(offset, Some(b"a")));
        commit(&store, name, &*log, &parked, &[]).await?;
    }
    let position = store.position(&names[0]).await?;
    let mut tx = store.begin(&names[0]).await?;
    let removed = letters(&mut tx)?.remove_from(Offset::ZERO).await?;
    ensure!(removed == 2, "removed {removed} letters of 2");
    tx.commit(advance(position.as_ref(), &*log, 0)).await?;
    for (n, name) in (1u64..).zip(&names) {
        let found = offsets(&all(&store, name).await?);
        let expected = match n {
            1 => vec![],
            _ => vec![7.into(), (10 + n).into()],
        };
        ensure!(found == expected, "{name} has {found:?}, not {expected:?}");
    }
    Ok(())
}
