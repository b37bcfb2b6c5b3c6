//! Two instances of a consumer, one of which stands by.

use std::time::{Duration, Instant};

use essentially_once::{
    CancellationToken, Consumer, ConsumerId, Error, Handler, HandlerError, KeyValue as _, Log as _, NewRecord, Record,
    async_trait, consumer::Report,
};
use essentially_once_rabbitmq::{RabbitLog, RabbitStore, RabbitTx};
use tokio::{
    sync::watch,
    task::JoinHandle,
    time::{sleep, timeout},
};

use crate::common::{LIMIT, Outcome, ensure, fresh, options, shared_node, url};

/// A standby considers an owner silent after this long without a sign of life.
const STANDBY_AFTER: Duration = Duration::from_secs(2);

/// Counts the records it handles. The record `long` takes much longer than that.
struct Slow(watch::Sender<u32>);

#[async_trait]
impl Handler<RabbitTx> for Slow {
    async fn handle(&mut self, record: &Record, tx: &mut RabbitTx) -> Result<(), HandlerError> {
        self.0.send_modify(|begun| *begun += 1);
        if record.payload == "long" {
            sleep(4 * STANDBY_AFTER).await;
        }
        tx.put(&record.payload, b"done").await?;
        Ok(())
    }
}

type Instance = (
    CancellationToken,
    watch::Receiver<u32>,
    JoinHandle<Result<Report, Error>>,
);

fn start(id: &ConsumerId, log: RabbitLog, store: RabbitStore) -> Instance {
    let (stop, (begun, watching)) = (CancellationToken::new(), watch::channel(0));
    let consumer = Consumer::essentially_once(id.clone(), log, store, Slow(begun)).standby_after(STANDBY_AFTER);
    let task = tokio::spawn(consumer.run_until(stop.clone()));
    (stop, watching, task)
}

async fn reaches(begun: &mut watch::Receiver<u32>, count: u32) -> Outcome {
    let waiting = timeout(LIMIT, begun.wait_for(|begun| *begun >= count)).await;
    waiting.map_err(|_| format!("{count} records are not handled"))??;
    Ok(())
}

pub(crate) async fn a_standby_waits_while_the_owner_beats_and_goes_on_when_it_stops() -> Outcome {
    let (node, name) = (shared_node()?, fresh("standby"));
    let (rabbit, id) = (options().connect(&url(node.port())).await?, ConsumerId::new(&name)?);
    let log = rabbit.log(&name).await?;
    log.append(&[NewRecord::new("first")]).await?;
    let (stop, mut begun, owner) = start(&id, log.clone(), rabbit.store());
    reaches(&mut begun, 1).await?;
    // The standby starts after the owner's commit, and finds a long record waiting.
    log.append(&[NewRecord::new("long")]).await?;
    reaches(&mut begun, 2).await?;
    let (_, mut others, standby) = start(&id, log.clone(), rabbit.store());
    log.append(&[NewRecord::new("next")]).await?;
    reaches(&mut begun, 3).await?;
    ensure!(*others.borrow() == 0, "the standby took over from an owner that beats");

    stop.cancel();
    let report = timeout(LIMIT, owner).await???;
    ensure!(report.handled == 3 && report.fenced == 0, "{report}");
    log.append(&[NewRecord::new("last")]).await?;
    let released = Instant::now();
    reaches(&mut others, 1).await?;
    // Silence would take longer: the standby has seen seconds between commits.
    let took = released.elapsed();
    ensure!(took < STANDBY_AFTER, "it took over after {took:?}");
    standby.abort();
    Ok(())
}
