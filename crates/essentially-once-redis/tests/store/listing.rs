//! The list of consumers.

use essentially_once::{
    ConsumerId, Error, NewRecord, OffsetStore, Outbox as _,
    backend::{Source, Transaction},
};
use essentially_once_redis::{RedisOptions, RedisStore};

use crate::support::{Outcome, Stage, advance, assert_error, text_of};

async fn commit(store: &RedisStore, consumer: &str) -> Result<(), Error> {
    let tx = store.begin(&ConsumerId::new(consumer)?).await?;
    tx.commit(advance(0, 1)).await
}

async fn names(store: &RedisStore) -> Result<Vec<String>, Source> {
    let consumers = store.consumers().await?.ok_or("it does not list them")?;
    Ok(consumers.iter().map(ToString::to_string).collect())
}

pub(crate) async fn consumers_are_found_among_many_other_keys() -> Outcome {
    let stage = Stage::start().await?;
    let fill = "for i = 1, 30000 do redis.call('SET', 'key' .. i, i) end";
    stage.server.command(&["EVAL", fill, "0"])?;
    assert_eq!(names(&stage.store).await?, [""; 0]);
    let mut expected: Vec<_> = (0..300).map(|n| format!("c{n}:position")).collect();
    for consumer in &expected {
        commit(&stage.store, consumer).await?;
    }
    expected.sort_unstable();
    assert_eq!(names(&stage.store).await?, expected);
    // The key of this outbox's numbers ends like that of a position.
    let mut tx = stage.store.begin(&ConsumerId::new("sender")?).await?;
    tx.send("out", NewRecord::new("1")).await?;
    tx.commit(advance(0, 1)).await?;
    stage.ask("HSET essentially-once:{y}:outbox:x{y}:position next 1")?;
    expected.push("sender".into());
    assert_eq!(names(&stage.store).await?, expected);
    Ok(())
}

pub(crate) async fn a_prefix_is_not_a_pattern() -> Outcome {
    let stage = Stage::start().await?;
    for (prefix, consumer) in [
        ("shop", "a"),
        ("shop:eu", "b"),
        ("shop*", "c"),
        ("sho?", "d"),
        ("sho[p]", "e"),
        (r"sho\p", "f"),
    ] {
        let store = RedisOptions::new().prefix(prefix);
        let store = store.connect(&stage.server.url()).await?.store();
        commit(&store, consumer).await?;
        assert_eq!(names(&store).await?, [consumer], "{prefix}");
    }
    assert_eq!(names(&stage.store).await?, [""; 0]);
    Ok(())
}

pub(crate) async fn a_name_that_no_consumer_can_have_is_an_error_that_names_it() -> Outcome {
    let stage = Stage::start().await?;
    commit(&stage.store, "c").await?;
    stage.ask("HSET essentially-once:{not+a,name}:position next 1")?;
    assert_error!(
        stage.store.consumers().await,
        Error::Failed { .. },
        "not+a,name",
        "SCAN"
    );
    Ok(())
}

pub(crate) async fn the_documented_permissions_are_enough() -> Outcome {
    let stage = Stage::start().await?;
    commit(&stage.store, "c").await?;
    let store = crate::setup::signed_in(&stage, "+scan").await?;
    assert_eq!(names(&store).await?, ["c"]);
    let store = crate::setup::signed_in(&stage, "+@all -scan").await?;
    assert_error!(store.consumers().await, Error::Failed { .. }, "ACL SETUSER", "scan");
    Ok(())
}
