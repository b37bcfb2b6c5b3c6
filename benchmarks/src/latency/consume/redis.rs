use std::time::Duration;

use essentially_once::async_trait;
use essentially_once_redis::Redis;
use test_servers::RedisServer;

use super::{Run, Sides, append_to};
use crate::{
    PAYLOAD, Result,
    latency::{BATCH, timing::number},
    redis::{self, Count, connect},
};

/// How long the server holds back its reply, in milliseconds. The loop by hand then looks whether
/// it is to end.
const BLOCK: usize = 100;

/// A private server that syncs each write to disk before it acknowledges it.
pub(super) struct Server(RedisServer);

impl Server {
    pub(super) fn start() -> Result<Self> {
        Ok(Self(RedisServer::durable().start()?))
    }
}

#[async_trait(?Send)]
impl Sides for Server {
    async fn by_hand(&self, name: &str, run: Run) -> Result<Vec<Duration>> {
        let url = self.0.url();
        let log = Redis::connect(&url).await?.log(name).await?;
        let mut connection = connect(&url).await?;
        let (stream, state) = (name.to_owned(), format!("{name}:state"));
        let Run { arrivals, stop, .. } = run.clone();
        let consuming = tokio::spawn(async move {
            redis::consume_by_hand(&mut connection, &stream, &state, BATCH, 1, Some(BLOCK), |entries| {
                arrivals.note(entries.iter().map(|(_, payload)| number(payload)));
                !stop.is_cancelled()
            })
            .await
        });
        run.append(append_to(log), consuming).await
    }

    async fn ours(&self, name: &str, run: Run) -> Result<Vec<Duration>> {
        let url = self.0.url();
        let log = Redis::connect(&url).await?.log(name).await?;
        let consumer = Redis::connect(&url).await?;
        let count = Count::new(format!("{name}:state"), 1, PAYLOAD.len());
        run.consume(name, append_to(log), consumer.log(name).await?, consumer.store(), count)
            .await
    }
}
