use std::time::Duration;

use essentially_once::async_trait;
use tempfile::TempDir;
use test_servers::KafkaServer;
use tokio::task::spawn_blocking;

use super::{Run, Sides, append_to, sqlite::counting};
use crate::{
    Result,
    kafka::{self, batch},
    latency::{BATCH, timing::number},
    sqlite,
};

/// How long the loop by hand waits for a record. It then looks whether it is to end.
const WAIT: Duration = Duration::from_millis(100);

/// A private broker, and a folder for the SQLite files.
pub(super) struct Broker {
    broker: kafka::Broker,
    folder: TempDir,
}

impl Broker {
    pub(super) fn start(folder: TempDir) -> Result<Self> {
        Ok(Self {
            broker: kafka::Broker(KafkaServer::start()?),
            folder,
        })
    }
}

#[async_trait(?Send)]
impl Sides for Broker {
    async fn by_hand(&self, name: &str, run: Run) -> Result<Vec<Duration>> {
        let log = self.broker.log(name).await?;
        let mut database = sqlite::open_by_hand(&self.folder.path().join(name), 1)?;
        let reader = self.broker.reader(name)?;
        let Run { arrivals, stop, .. } = run.clone();
        let consuming = spawn_blocking(move || {
            let mut handled = 0;
            while !stop.is_cancelled() {
                let mut numbers = Vec::new();
                let see = |payload: &[u8]| numbers.push(number(payload));
                // Waits for the first record only.
                let Some((next, count)) = batch(&reader, BATCH, (WAIT, Duration::ZERO), see)? else {
                    continue;
                };
                sqlite::count_by_hand(&mut database, handled..handled + count, 1, next)?;
                arrivals.note(numbers);
                handled += count;
            }
            Ok(())
        });
        run.append(append_to(log), consuming).await
    }

    async fn ours(&self, name: &str, run: Run) -> Result<Vec<Duration>> {
        let (log, consumer) = (self.broker.log(name).await?, self.broker.log(name).await?);
        let (store, count) = counting(&self.folder.path().join(name)).await?;
        run.consume(name, append_to(log), consumer, store, count).await
    }
}
