use std::time::Duration;

use essentially_once::async_trait;
use essentially_once_rabbitmq::Rabbit;
use futures_util::{FutureExt as _, StreamExt as _};
use lapin::{Connection, ConnectionProperties, options::BasicAckOptions};
use tempfile::TempDir;
use test_servers::RabbitNode;

use super::{Run, Sides, append_to, sqlite::counting};
use crate::{
    Result,
    latency::{BATCH, timing::number},
    rabbitmq::{offset, subscribe},
    sqlite,
};

/// A private node, and a folder for the SQLite files.
pub(super) struct Node {
    node: RabbitNode,
    folder: TempDir,
}

impl Node {
    pub(super) fn start(folder: TempDir) -> Result<Self> {
        Ok(Self {
            node: RabbitNode::start()?,
            folder,
        })
    }
}

#[async_trait(?Send)]
impl Sides for Node {
    async fn by_hand(&self, name: &str, run: Run) -> Result<Vec<Duration>> {
        let log = Rabbit::connect(&self.node.url()).await?.log(name).await?;
        let mut database = sqlite::open_by_hand(&self.folder.path().join(name), 1)?;
        let connection = Connection::connect(&self.node.url(), ConnectionProperties::default()).await?;
        let mut consumer = subscribe(&connection, name).await?;
        let Run { arrivals, stop, .. } = run.clone();
        let consuming = tokio::spawn(async move {
            let _connection = connection;
            let mut handled = 0;
            loop {
                let first = tokio::select! {
                    first = consumer.next() => first.ok_or("the consumer ended")??,
                    () = stop.cancelled() => return Ok(()),
                };
                let mut deliveries = vec![first];
                while deliveries.len() < BATCH
                    && let Some(Some(delivery)) = consumer.next().now_or_never()
                {
                    deliveries.push(delivery?);
                }
                let last = &deliveries[deliveries.len() - 1];
                let end = handled + deliveries.len() as u64;
                sqlite::count_by_hand(&mut database, handled..end, 1, offset(last)? + 1)?;
                arrivals.note(deliveries.iter().map(|delivery| number(&delivery.data)));
                last.ack(BasicAckOptions { multiple: true }).await?;
                handled = end;
            }
        });
        run.append(append_to(log), consuming).await
    }

    async fn ours(&self, name: &str, run: Run) -> Result<Vec<Duration>> {
        let log = Rabbit::connect(&self.node.url()).await?.log(name).await?;
        let consumer = Rabbit::connect(&self.node.url()).await?.log(name).await?;
        let (store, count) = counting(&self.folder.path().join(name)).await?;
        run.consume(name, append_to(log), consumer, store, count).await
    }
}
