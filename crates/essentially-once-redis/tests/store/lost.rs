//! A position that vanishes while its consumer runs.

use std::sync::Arc;

use essentially_once::{
    Consumer, Error, Handler, HandlerError, KeyValue as _, Log as _, NewRecord, Record, StartAt, async_trait,
    memory::Memory,
};
use essentially_once_redis::{Redis, RedisTx};

use crate::support::{Outcome, Stage};

/// Counts each record under its payload, and makes the server lose data at record 70.
struct Count {
    stage: Arc<Stage>,
    /// The command that loses the data.
    loses: &'static [&'static str],
}

#[async_trait]
impl Handler<RedisTx> for Count {
    async fn handle(&mut self, record: &Record, tx: &mut RedisTx) -> Result<(), HandlerError> {
        if record.payload == "70" {
            self.stage
                .server
                .command(self.loses)
                .map_err(|error| HandlerError::fatal(error.to_string()))?;
        }
        let count = tx.get(&record.payload).await?.map_or(0, |count| count[0]);
        tx.put(&record.payload, &[count + 1]).await?;
        Ok(())
    }
}

pub(crate) async fn a_position_that_is_deleted_stops_a_running_consumer() -> Outcome {
    for (loses, start_at) in [
        (&["FLUSHALL"][..], StartAt::Latest),
        (&["FLUSHALL"], StartAt::Earliest),
        (&["DEL", "essentially-once:{c}:position"], StartAt::Earliest),
    ] {
        let stage = Arc::new(Stage::start().await?);
        let log = Memory::new().log("orders")?;
        let handler = Count {
            stage: Arc::clone(&stage),
            loses,
        };
        let consumer = || {
            let (id, store) = (stage.consumer.clone(), stage.store.clone());
            (id, log.clone(), store)
        };
        // With `Latest`, a first run fixes the start.
        let (id, reading, store) = consumer();
        Consumer::essentially_once(id, reading, store, Nothing)
            .accept_volatile()
            .start_at(start_at)
            .run_until_caught_up()
            .await?;
        let records: Vec<NewRecord> = (1..=200).map(|n| NewRecord::new(n.to_string())).collect();
        log.append(&records).await?;
        let (id, reading, store) = consumer();
        let result = Consumer::essentially_once(id, reading, store, handler)
            .accept_volatile()
            .start_at(start_at)
            .max_batch(10)
            .run_until_caught_up()
            .await;
        assert!(
            matches!(result, Err(Error::PositionLost { found: None, .. })),
            "{loses:?}, {start_at:?}: {result:?}"
        );
        let mut tx = stage.begin().await?;
        for n in 1..=200 {
            let count = tx.get(n.to_string().as_bytes()).await?.map_or(0, |count| count[0]);
            assert!(count <= 1, "{loses:?}, {start_at:?}: record {n} counts {count} times");
        }
    }
    Ok(())
}

struct Nothing;

#[async_trait]
impl Handler<RedisTx> for Nothing {
    async fn handle(&mut self, _: &Record, _: &mut RedisTx) -> Result<(), HandlerError> {
        Ok(())
    }
}

/// Deletes the position and records 41 to 69. The consumer has passed record 60 last.
const DELETES: &str = "
    local entries = redis.call('XRANGE', 'orders', '-', '+')
    for i = 41, 69 do redis.call('XDEL', 'orders', entries[i][1]) end
    return redis.call('DEL', 'essentially-once:{c}:position')";

/// A deleted record does not show that the log went back. Going on would repeat the records before
/// it.
pub(crate) async fn a_deleted_record_does_not_excuse_a_lost_position() -> Outcome {
    let stage = Arc::new(Stage::start().await?);
    let log = Redis::connect(&stage.server.url()).await?.log("orders").await?;
    let records: Vec<NewRecord> = (1..=200).map(|n| NewRecord::new(n.to_string())).collect();
    log.append(&records).await?;
    let handler = Count {
        stage: Arc::clone(&stage),
        loses: &["EVAL", DELETES, "0"],
    };
    let result = Consumer::essentially_once(stage.consumer.clone(), log, stage.store.clone(), handler)
        .max_batch(10)
        .run_until_caught_up()
        .await;
    assert!(
        matches!(result, Err(Error::PositionLost { found: None, .. })),
        "{result:?}"
    );
    let mut tx = stage.begin().await?;
    for n in 1..=200 {
        let count = tx.get(n.to_string().as_bytes()).await?.map_or(0, |count| count[0]);
        assert!(count <= 1, "record {n} counts {count} times");
    }
    Ok(())
}
