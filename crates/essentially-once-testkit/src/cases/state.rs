//! Cases for the portable state, [S6 and S7](essentially_once::OffsetStore#contract).

use essentially_once::{
    Error, KeyValue, OffsetStore,
    backend::{Revision, Transaction},
};

use super::{
    common::{advance, consumer},
    store::{commit, position, value},
};
use crate::{
    harness::{Backend, Harness},
    violation::{CaseResult, ensure},
};

/// [S6](essentially_once::OffsetStore#contract): puts, overwrites, deletes, and values stored
/// before the transaction.
pub(super) async fn s6_a_transaction_reads_its_own_writes<H: Harness>(_: &H, backend: &H::Backend) -> CaseResult {
    let (store, log) = (backend.store().await?, backend.log("orders").await?);
    let shipping = consumer("shipping");
    commit(&store, &shipping, &*log, &[(b"old", Some(b"1"))], 1).await?;
    let mut tx = store.begin(&shipping).await?;
    type Step<'a> = (&'a str, &'a [u8], Option<&'a [u8]>);
    let steps: [Step<'_>; 6] = [
        ("a put of a new key", b"new", Some(b"2")),
        ("an overwrite of its own put", b"new", Some(b"3")),
        ("an overwrite of a stored key", b"old", Some(b"4")),
        ("a delete of a stored key", b"old", None),
        ("a put after its own delete", b"old", Some(b"5")),
        ("a delete of its own put", b"new", None),
    ];
    let before = tx.get(b"old").await?;
    ensure!(before.as_deref() == Some(b"1"), "a stored key reads as {before:?}");
    for (step, key, value) in steps {
        match value {
            Some(value) => tx.put(key, value).await?,
            None => tx.delete(key).await?,
        }
        let found = tx.get(key).await?;
        ensure!(found.as_deref() == value, "after {step}, get returned {found:?}");
    }
    tx.rollback().await?;
    Ok(())
}

/// [S6](essentially_once::OffsetStore#contract): binary and empty keys and values, keys that are
/// prefixes of others, and large values.
pub(super) async fn s6_keys_and_values_are_kept_to_the_byte<H: Harness>(
    harness: &H,
    backend: &H::Backend,
) -> CaseResult {
    let limit = harness.capabilities().value_limit.unwrap_or(usize::MAX);
    let (store, log) = (backend.store().await?, backend.log("orders").await?);
    let shipping = consumer("shipping");
    let every_byte: Vec<u8> = (0..=255).collect();
    let large = vec![0xA5; limit.min(256 * 1024)];
    let pairs: Vec<(&[u8], &[u8])> = vec![
        (b"", b"an empty key"),
        (b"empty value", b""),
        (b"k", b"1"),
        (b"k\0", b"2"),
        (b"k\xFF", b"3"),
        (b"k\xFE", b"4"),
        (b"K", b"5"),
        (&every_byte, &every_byte),
        (b"large", &large),
    ];
    let writes: Vec<_> = pairs.iter().map(|(key, value)| (*key, Some(*value))).collect();
    commit(&store, &shipping, &*log, &writes, 1).await?;
    let other = backend.store().await?;
    for (key, expected) in pairs {
        let found = value(&other, &shipping, key).await?;
        ensure!(
            found.as_deref() == Some(expected),
            "key {:?} holds {:?} bytes, expected {}",
            String::from_utf8_lossy(key),
            found.map(|found| found.len()),
            expected.len()
        );
    }
    Ok(())
}

/// [`KeyValue`]: every backend accepts keys of up to 1,024 bytes and values of up to 64 KiB, with
/// any bytes, including empty ones.
pub(super) async fn s6_every_key_and_value_of_the_guaranteed_sizes_is_taken<H: Harness>(
    _: &H,
    backend: &H::Backend,
) -> CaseResult {
    const KEY: usize = 1_024;
    const VALUE: usize = 64 * 1024;
    let (store, log) = (backend.store().await?, backend.log("orders").await?);
    let shipping = consumer("shipping");
    let key = |length: usize, last: u8| {
        let mut key: Vec<u8> = (0..length).map(|n| n as u8).collect();
        key.extend([last]);
        key
    };
    let mut keys = vec![Vec::new()];
    for length in [254, 255, 256, 511, 767, KEY - 1] {
        // Two that differ only in their last byte.
        keys.extend([key(length, 0), key(length, 255)]);
    }
    let values: Vec<Vec<u8>> = [VALUE, 0, 1, VALUE - 1, 255, 256, 32_768]
        .map(|length| (0..length).map(|n| (n % 251) as u8).collect())
        .into();
    let pairs: Vec<_> = keys.iter().zip(values.iter().cycle()).collect();
    // In several commits, because a commit may have a limit of its own.
    for (n, (key, value)) in (1u64..).zip(&pairs) {
        let written = commit(&store, &shipping, &*log, &[(key, Some(value))], n).await;
        ensure!(
            written.is_ok(),
            "a key of {} bytes with a value of {} bytes: {written:?}",
            key.len(),
            value.len()
        );
    }
    let other = backend.store().await?;
    for (key, expected) in pairs {
        let found = value(&other, &shipping, key).await?;
        ensure!(
            found.as_ref() == Some(expected),
            "a key of {} bytes was given a value of {} bytes and holds {:?} bytes",
            key.len(),
            expected.len(),
            found.map(|found| found.len())
        );
    }
    Ok(())
}

/// [S6](essentially_once::OffsetStore#contract), `put`: a key of the maximum size is kept. A longer
/// one is refused and stages nothing.
pub(super) async fn s6_a_key_over_the_limit_is_refused_and_stages_nothing<H: Harness>(
    harness: &H,
    backend: &H::Backend,
) -> CaseResult {
    let limit = harness.capabilities().key_limit.unwrap_or_default();
    let (store, log) = (backend.store().await?, backend.log("orders").await?);
    let shipping = consumer("shipping");
    let (largest, longer) = (vec![b'k'; limit], vec![b'k'; limit + 1]);
    let mut tx = store.begin(&shipping).await?;
    tx.put(b"staged", b"1").await?;
    tx.put(&largest, b"2").await?;
    let result = tx.put(&longer, b"3").await;
    ensure!(
        matches!(&result, Err(Error::TooLarge { limit: reported, .. }) if *reported == limit),
        "a put of a key over the limit of {limit} bytes: {result:?}"
    );
    tx.commit(advance(None, &*log, 1)).await?;
    for (key, expected) in [(&b"staged"[..], b"1"), (&largest, b"2")] {
        let found = value(&store, &shipping, key).await?;
        ensure!(
            found.as_deref() == Some(expected),
            "after a refused put, a key of {} bytes holds {found:?}",
            key.len()
        );
    }
    Ok(())
}

/// [S6](essentially_once::OffsetStore#contract), `put`: a value of the maximum size is kept. A
/// larger one is refused, and the transaction then reads and commits the state without it.
pub(super) async fn s6_a_value_over_the_limit_is_refused_and_stages_nothing<H: Harness>(
    harness: &H,
    backend: &H::Backend,
) -> CaseResult {
    let limit = harness.capabilities().value_limit.unwrap_or_default();
    let (store, log) = (backend.store().await?, backend.log("orders").await?);
    let shipping = consumer("shipping");
    let largest = vec![b'x'; limit];
    commit(
        &store,
        &shipping,
        &*log,
        &[(b"old", Some(b"1")), (b"largest", Some(&largest))],
        1,
    )
    .await?;
    let mut tx = store.begin(&shipping).await?;
    tx.put(b"staged", b"2").await?;
    for key in [&b"old"[..], b"staged", b"new"] {
        let before = tx.get(key).await?;
        let result = tx.put(key, &vec![b'x'; limit + 1]).await;
        ensure!(
            matches!(&result, Err(Error::TooLarge { limit: reported, .. }) if *reported == limit),
            "a put of a value over the limit of {limit} bytes: {result:?}"
        );
        let after = tx.get(key).await?;
        ensure!(
            after == before,
            "a refused put left {} bytes where {} were stored",
            after.map_or(0, |value| value.len()),
            before.map_or(0, |value| value.len())
        );
    }
    let before = position(&store, &shipping).await?;
    tx.commit(advance(Some(&before), &*log, 2)).await?;
    let expected = [
        ("old", Some(&b"1"[..])),
        ("largest", Some(&largest)),
        ("staged", Some(b"2")),
        ("new", None),
    ];
    for (key, expected) in expected {
        let found = value(&backend.store().await?, &shipping, key.as_bytes()).await?;
        ensure!(
            found.as_deref() == expected,
            "after refused puts, {key} has {:?} bytes, expected {:?}",
            found.map(|found| found.len()),
            expected.map(<[u8]>::len)
        );
    }
    Ok(())
}

/// [S7](essentially_once::OffsetStore#contract): equal keys, and consumer names of which one is a
/// prefix of another.
pub(super) async fn s7_consumers_do_not_see_each_others_state<H: Harness>(_: &H, backend: &H::Backend) -> CaseResult {
    let (store, log) = (backend.store().await?, backend.log("orders").await?);
    let names = ["shipping", "shipping-2", "shipping:k", "Shipping"].map(consumer);
    for (n, name) in (1u8..).zip(&names) {
        let found = value(&store, name, b"k").await?;
        ensure!(found.is_none(), "{name} found {found:?} before it wrote");
        ensure!(
            store.position(name).await?.is_none(),
            "{name} has a position before it committed"
        );
        commit(&store, name, &*log, &[(b"k", Some(&[n]))], n.into()).await?;
    }
    for (n, name) in (1u8..).zip(&names) {
        let found = (value(&store, name, b"k").await?, position(&store, name).await?.next);
        ensure!(
            found == (Some(vec![n]), u64::from(n).into()),
            "{name} found {found:?}, but it wrote {n}"
        );
    }
    // If a backend joins names and keys, these are the other consumers' keys.
    for key in [&b"-2k"[..], b":kk", b"k:k"] {
        let found = value(&store, &names[0], key).await?;
        ensure!(
            found.is_none(),
            "{} found {found:?} under {:?}, which it never wrote",
            names[0],
            String::from_utf8_lossy(key)
        );
    }
    Ok(())
}

/// [S7](essentially_once::OffsetStore#contract): many consumers on one store.
pub(super) async fn s7_many_consumers_keep_their_positions<H: Harness>(
    harness: &H,
    backend: &H::Backend,
) -> CaseResult {
    let consumers = harness.capabilities().many_consumers;
    let (store, log) = (backend.store().await?, backend.log("orders").await?);
    for n in 0..consumers {
        let name = consumer(&format!("consumer-{n}"));
        store.begin(&name).await?.commit(advance(None, &*log, n)).await?;
    }
    for n in 0..consumers {
        let name = consumer(&format!("consumer-{n}"));
        let found = position(&store, &name).await?;
        ensure!(
            (found.next, found.revision) == (n.into(), Revision::NONE.next_epoch()),
            "{name} committed {n}, but its position is {found:?}"
        );
    }
    Ok(())
}
