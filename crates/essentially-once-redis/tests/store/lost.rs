//! A position that vanishes under a running consumer.

use std::sync::Arc;

use essentially_once::{
    Consumer, Error, Handler, HandlerError, KeyValue as _, Log as _, NewRecord, Record, StartAt, async_trait,
    memory::Memory,
};
use essentially_once_redis::RedisTx;

use crate::support::{Outcome, Stage};

/// Counts each record under its payload, and has the server lose something at record 70.
struct Count {
    stage: Arc<Stage>,
    loses: &'static str,
}

#[async_trait]
impl Handler<RedisTx> for Count {
    async fn handle(&mut self, record: &Record, tx: &mut RedisTx) -> Result<(), HandlerError> {
        if record.payload == "70" {
            self.stage.ask(self.loses).map_err(HandlerError::fatal)?;
        }
        let count = tx.get(&record.payload).await?.map_or(0, |count| count[0]);
        tx.put(&record.payload, &[count + 1]).await?;
        Ok(())
    }
}

pub(crate) async fn a_position_that_is_deleted_stops_a_running_consumer() -> Outcome {
    for (loses, start_at) in [
        ("FLUSHALL", StartAt::Latest),
        ("FLUSHALL", StartAt::Earliest),
        ("DEL essentially-once:{c}:position", StartAt::Earliest),
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
        // With `Latest`, a first run decides where that is.
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
            "{loses}, {start_at:?}: {result:?}"
        );
        let mut tx = stage.begin().await?;
        for n in 1..=200 {
            let count = tx.get(n.to_string().as_bytes()).await?.map_or(0, |count| count[0]);
            assert!(count <= 1, "{loses}, {start_at:?}: record {n} counts {count} times");
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
