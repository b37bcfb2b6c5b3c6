//! The pulse that a standby watches, and state read outside a transaction.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use essentially_once::{
    Error, KeyValue as _, OffsetStore as _, ReadState as _,
    backend::{Owner, Pulse, Revision, Source, Transaction as _, Window},
};

use crate::support::{Outcome, Stage, advance, assert_error, changed, command, numbering, revision, text_of};

const POSITION: &str = "essentially-once:{c}:position";

async fn commit_as(stage: &Stage, commits: u64, owner: Option<Owner>) -> Result<(), Error> {
    let advance = changed(advance(commits, commits + 1), |advance| advance.owner = owner);
    stage.begin().await?.commit(advance).await
}

pub(crate) async fn a_pulse_shows_commits_and_beats() -> Outcome {
    let stage = Stage::start().await?;
    let (store, id, owner) = (&stage.store, &stage.consumer, Owner::draw());
    assert_eq!(store.pulse(id).await?, Pulse::default());
    commit_as(&stage, 0, Some(owner)).await?;
    let mut last = store.pulse(id).await?;
    let position = store.position(id).await?.ok_or("no position")?;
    assert_eq!(last, Pulse::new(Some(&position), 0));
    assert_eq!((last.owner, last.revision), (Some(owner), revision(1)));
    for _ in 0..3 {
        store.beat(id, owner).await?;
        let watched = store.watch(id, &last, Duration::from_millis(1)).await?;
        assert_ne!(watched, last);
        let mut rest = watched;
        rest.beats = last.beats;
        assert_eq!(rest, last, "only the beats differ");
        last = watched;
    }
    commit_as(&stage, 1, Some(owner)).await?;
    let pulse = store.pulse(id).await?;
    assert_eq!((pulse.revision, pulse.next), (revision(2), advance(1, 2).next));
    Ok(())
}

pub(crate) async fn a_beat_of_someone_else_has_no_effect() -> Outcome {
    let stage = Stage::start().await?;
    let (store, id, owner, other) = (&stage.store, &stage.consumer, Owner::draw(), Owner::draw());
    store.beat(id, owner).await?;
    store.release(id, owner).await?;
    assert_eq!(stage.ask("DBSIZE")?, "0", "there is no position, and none is made");
    commit_as(&stage, 0, Some(owner)).await?;
    let (pulse, stored) = (store.pulse(id).await?, stage.ask(&format!("HGETALL {POSITION}"))?);
    store.beat(id, other).await?;
    store.release(id, other).await?;
    assert_eq!(store.pulse(id).await?, pulse);
    assert_eq!(stage.ask(&format!("HGETALL {POSITION}"))?, stored);
    // Nobody can beat for a position without an owner.
    commit_as(&stage, 1, None).await?;
    store.beat(id, owner).await?;
    assert_eq!(store.pulse(id).await?.beats, 0);
    Ok(())
}

pub(crate) async fn a_release_gives_up_the_position_and_fences_nobody() -> Outcome {
    let stage = Stage::start().await?;
    let (store, id, owner) = (&stage.store, &stage.consumer, Owner::draw());
    commit_as(&stage, 0, Some(owner)).await?;
    store.beat(id, owner).await?;
    let before = store.position(id).await?.ok_or("no position")?;
    store.release(id, owner).await?;
    let mut expected = before.clone();
    expected.owner = None;
    assert_eq!(store.position(id).await?, Some(expected));
    assert_eq!(store.pulse(id).await?.owner, None);
    // Release again, then beat too late.
    store.release(id, owner).await?;
    store.beat(id, owner).await?;
    assert_eq!(store.pulse(id).await?.owner, None);
    commit_as(&stage, 1, Some(owner)).await?;
    assert_eq!(store.pulse(id).await?.owner, Some(owner));
    Ok(())
}

pub(crate) async fn beats_survive_what_counts_them() -> Outcome {
    let stage = Stage::start().await?;
    let (store, id, owner) = (&stage.store, &stage.consumer, Owner::draw());
    commit_as(&stage, 0, Some(owner)).await?;
    for (stored, next) in [
        ("9007199254740990", "9007199254740991"),
        ("9007199254740991", "0"),
        ("x", "1"),
    ] {
        stage.ask(&format!("HSET {POSITION} beats {stored}"))?;
        store.beat(id, owner).await?;
        assert_eq!(stage.ask(&format!("HGET {POSITION} beats"))?, next);
    }
    // An invalid value that an operator wrote is an error.
    stage.ask(&format!("HSET {POSITION} beats many"))?;
    assert_error!(store.pulse(id).await, Error::Failed { .. }, "pulse of consumer c");
    // A position of an earlier version has none of these fields.
    stage.ask(&format!("DEL {POSITION}"))?;
    stage.ask(&format!(
        "HSET {POSITION} next 5-0 revision 3 log orders incarnation a1"
    ))?;
    let pulse = store.pulse(id).await?;
    assert_eq!(
        (pulse.revision, pulse.owner, pulse.beats),
        (Revision::new(0, 3), None, 0)
    );
    Ok(())
}

pub(crate) async fn a_blocked_consumer_has_no_pulse() -> Outcome {
    let stage = Stage::start().await?;
    stage.ask("SET a x")?;
    stage.commit(0, [command("INCRBY count 1")]).await?;
    let failing = ["INCRBY count 1", "LSET list 5 x"].map(command);
    stage.ask("RPUSH list a")?;
    assert_error!(stage.commit(1, failing).await, Error::PartiallyApplied { .. },);
    assert_error!(
        stage.store.pulse(&stage.consumer).await,
        Error::PartiallyApplied { .. },
        "LSET"
    );
    let read = stage.store.read_state(&stage.consumer, &[b"a"]).await;
    assert_error!(read, Error::PartiallyApplied { .. }, "LSET");
    Ok(())
}

pub(crate) async fn state_is_read_in_the_order_of_the_keys() -> Outcome {
    let stage = Stage::start().await?;
    let (store, id) = (&stage.store, &stage.consumer);
    let empty = store.read_state(id, &[b"a", b""]).await?;
    assert_eq!((empty.position, empty.values), (None, vec![None, None]));
    let keys: Vec<Vec<u8>> = (0..20_000_u32).map(|key| key.to_be_bytes().to_vec()).collect();
    let mut tx = stage.begin().await?;
    for key in keys.iter().step_by(2) {
        tx.put(key, key).await?;
    }
    tx.put(b"", b"\0\xff\r\n").await?;
    let windows = vec![(numbering("p#7"), Window::new(5))];
    tx.commit(changed(advance(0, 1), |advance| advance.windows = windows))
        .await?;
    // More keys than a script can pass to one command, and one key twice.
    let asked: Vec<&[u8]> = keys.iter().map(Vec::as_slice).chain([&b""[..], &keys[0]]).collect();
    let read = store.read_state(id, &asked).await?;
    assert_eq!(read.position, store.position(id).await?);
    assert_eq!(read.values.len(), asked.len());
    for (at, (key, value)) in keys.iter().zip(&read.values).enumerate() {
        assert_eq!(value.as_deref(), (at % 2 == 0).then_some(&key[..]), "{at}");
    }
    let rest: Vec<_> = read.values[20_000..].iter().map(|value| value.as_deref()).collect();
    assert_eq!(rest, [Some(&b"\0\xff\r\n"[..]), Some(&keys[0])]);
    stage.ask("DEL essentially-once:{c}:state")?;
    stage.ask("SET essentially-once:{c}:state x")?;
    assert_error!(
        store.read_state(id, &[b"a"]).await,
        Error::Failed { .. },
        "state of consumer c",
        "another type"
    );
    Ok(())
}

pub(crate) async fn state_and_position_are_of_one_commit() -> Outcome {
    let stage = Arc::new(Stage::start().await?);
    let done = Arc::new(AtomicBool::new(false));
    let reading = {
        let (stage, done) = (Arc::clone(&stage), Arc::clone(&done));
        tokio::spawn(async move {
            let (mut reads, mut last) = (0, 0);
            while !done.load(Ordering::Acquire) {
                let read = stage.store.read_state(&stage.consumer, &[b"a", b"b"]).await?;
                let revision = read.position.map_or(0, |position| position.revision.count());
                let expected = (revision > 0).then(|| revision.to_string());
                for value in &read.values {
                    let value = value.as_ref().map(|value| String::from_utf8_lossy(value).into_owned());
                    assert_eq!(value, expected, "at revision {revision}");
                }
                assert!(revision >= last, "{revision} after {last}");
                (reads, last) = (reads + 1, revision);
            }
            Ok::<_, Source>(reads)
        })
    };
    for commits in 0..300_u64 {
        let mut tx = stage.begin().await?;
        let value = (commits + 1).to_string();
        tx.put(b"a", value.as_bytes()).await?;
        tx.put(b"b", value.as_bytes()).await?;
        tx.commit(advance(commits, commits + 1)).await?;
        // Never older than the last acknowledged commit, even while a transaction is open.
        let open = stage.begin().await?;
        let read = stage.store.read_state(&stage.consumer, &[b"a"]).await?;
        assert_eq!(read.values[0].as_deref(), Some(value.as_bytes()));
        drop(open);
    }
    done.store(true, Ordering::Release);
    assert!(reading.await?? > 0, "nothing was read meanwhile");
    Ok(())
}
