//! Data that earlier versions wrote. `fixtures/README.md` describes it.

use essentially_once::{
    Consumer, ConsumerId, Handler, HandlerError, KeyValue as _, OffsetStore as _, Record, async_trait,
    backend::{Note, Owner, Pulse, Revision, Source, Transaction as _},
    consumer::dead_letters,
};
use essentially_once_redis::{LogOptions, Redis, RedisTx, redis};

use crate::support::{Outcome, Stage};

const VERSION_1: &str = include_str!("../fixtures/version-1.redis");

/// The arguments of a line in `redis-cli`'s quoted form.
fn arguments(line: &str) -> Result<Vec<Vec<u8>>, Source> {
    let mut arguments = Vec::new();
    let mut characters = line.bytes();
    while let Some(byte) = characters.next() {
        if byte != b'"' {
            continue;
        }
        let mut argument = Vec::new();
        loop {
            match characters.next().ok_or("a quote is not closed")? {
                b'"' => break,
                b'\\' => match characters.next().ok_or("an escape is cut short")? {
                    b'x' => {
                        let digits = [characters.next(), characters.next()].map(Option::unwrap_or_default);
                        argument.push(u8::from_str_radix(std::str::from_utf8(&digits)?, 16)?);
                    }
                    b'n' => argument.push(b'\n'),
                    b'r' => argument.push(b'\r'),
                    b't' => argument.push(b'\t'),
                    b'a' => argument.push(7),
                    b'b' => argument.push(8),
                    other => argument.push(other),
                },
                other => argument.push(other),
            }
        }
        arguments.push(argument);
    }
    Ok(arguments)
}

async fn replay(stage: &Stage) -> Outcome {
    let client = redis::Client::open(stage.server.url())?;
    let mut connection = client.get_multiplexed_async_connection().await?;
    for line in VERSION_1.lines() {
        let mut arguments = arguments(line)?.into_iter();
        let mut command = redis::Cmd::new();
        for argument in arguments.by_ref() {
            command.arg(argument);
        }
        let _: redis::Value = command
            .query_async(&mut connection)
            .await
            .map_err(|error| format!("{line}: {error}"))?;
    }
    Ok(())
}

struct Count;

#[async_trait]
impl Handler<RedisTx> for Count {
    async fn handle(&mut self, _: &Record, tx: &mut RedisTx) -> Result<(), HandlerError> {
        tx.put(b"handled", b"1").await?;
        Ok(())
    }
}

pub(crate) async fn data_of_version_1_still_works() -> Outcome {
    let stage = Stage::start().await?;
    replay(&stage).await?;
    let redis = Redis::connect(&stage.server.url()).await?;
    for (log, stream, consumer, revision, handled, duplicates) in [
        ("orders", "orders", "billing", 5, 3, 2),
        ("shop-orders", "{shop}:orders", "shipping", 3, 10, 0),
        ("returns", "returns", "refunds", 3, 10, 0),
        ("whole", "{whole}", "whole", 3, 10, 0),
    ] {
        let consumer = ConsumerId::new(consumer)?;
        let store = redis.store();
        let position = store.position(&consumer).await?.ok_or("the position is ignored")?;
        assert_eq!(position.revision, Revision::new(0, revision), "{consumer}");
        assert_eq!(
            (position.owner, position.note.clone()),
            (None, Note::default()),
            "{consumer}"
        );
        // The position has neither an owner nor beats, and nobody can beat for it.
        store.beat(&consumer, Owner::draw()).await?;
        store.release(&consumer, Owner::draw()).await?;
        assert_eq!(
            store.pulse(&consumer).await?,
            Pulse::new(Some(&position), 0),
            "{consumer}"
        );
        assert_eq!(store.position(&consumer).await?, Some(position), "{consumer}");
        assert_eq!(dead_letters::list(&consumer, &store, None, 10).await?, [], "{consumer}");
        let log = redis.log_with(log, LogOptions::new().stream(stream)).await?;
        let report = Consumer::essentially_once(consumer.clone(), log, store.clone(), Count)
            .run_until_caught_up()
            .await?;
        assert_eq!(
            (report.handled, report.duplicates),
            (handled, duplicates),
            "{consumer}: {report}"
        );
        let position = store.position(&consumer).await?.ok_or("the position is gone")?;
        assert!(position.revision.epoch() > 0, "{consumer}");
        assert_eq!(position.owner, None, "{consumer} was not released");
        // A process of version 1 reads this as an integer, and so refuses it.
        let stored = stage.ask(&format!("HGET essentially-once:{{{consumer}}}:position revision"))?;
        assert!(stored.parse::<u64>().is_err(), "{stored}");
    }
    let mut tx = redis.store().begin(&ConsumerId::new("billing")?).await?;
    assert_eq!(
        tx.get(b"Brazil").await?.map(|count| count.to_vec()),
        Some(b"43".to_vec())
    );
    tx.rollback().await?;
    Ok(())
}
