//! A failed read prevents the commit, even if the handler ignores the error.

use std::{sync::Arc, time::Duration};

use essentially_once::{
    Consumer, ConsumerId, Error, Handler, HandlerError, KeyValue, Log, NewRecord, OffsetStore, Record, async_trait,
    backend::{Source, Transaction},
};
use essentially_once_redis::{Redis, RedisStore, RedisTx};
use test_servers::{Cut, Proxy};

use crate::support::{Outcome, Stage, advance, assert_error, command, text_of};

const RECORDS: u64 = 20;

/// Treats an error as a missing count, and loses the connection at its tenth record.
struct Careless {
    proxy: Arc<Proxy>,
    cut: Cut,
    calls: u64,
}

#[async_trait]
impl Handler<RedisTx> for Careless {
    async fn handle(&mut self, _: &Record, tx: &mut RedisTx) -> Result<(), HandlerError> {
        self.calls += 1;
        if self.calls == 10 {
            self.proxy.cut_at(&get_request(tx.consumer()), self.cut);
        }
        let count = tx.get(b"count").await.ok().flatten();
        let count = count.map_or(Ok(0), |count| String::from_utf8_lossy(&count).parse::<u64>())?;
        tx.put(b"count", (count + 1).to_string().as_bytes()).await?;
        Ok(())
    }
}

pub(crate) async fn a_careless_handler_counts_every_record() -> Outcome {
    let stage = Stage::start().await?;
    let log = Redis::connect(&stage.server.url()).await?.log("orders").await?;
    for record in 0..RECORDS {
        log.append(&[NewRecord::new(record.to_string())]).await?;
    }
    let proxy = Arc::new(Proxy::start(stage.server.port())?);
    for (done, cut) in [Cut::BeforeRequest, Cut::BeforeReply].into_iter().enumerate() {
        let consumer = ConsumerId::new(format!("c{done}"))?;
        let handler = Careless {
            proxy: Arc::clone(&proxy),
            cut,
            calls: 0,
        };
        let report = Consumer::essentially_once(consumer.clone(), log.clone(), stage.through(&proxy).await?, handler)
            .max_batch(1)
            .min_backoff(Duration::from_millis(1))
            .max_backoff(Duration::from_millis(20))
            .run_until_caught_up()
            .await?;
        assert!(proxy.wait_fired(done + 1, Duration::from_secs(60)));
        let count = stage.store.begin(&consumer).await?.get(b"count").await?;
        assert_eq!(count.as_deref(), Some(RECORDS.to_string().as_bytes()), "{report}");
        assert_eq!((report.handled, report.restarts), (RECORDS, 1), "{report}");
    }
    Ok(())
}

/// Bytes that only a `get` of this consumer sends.
fn get_request(consumer: &ConsumerId) -> Vec<u8> {
    let key = format!("essentially-once:{{{consumer}}}:state");
    format!("$4\r\nHGET\r\n${}\r\n{key}\r\n", key.len()).into_bytes()
}

/// Breaks the connection at a request with this pattern, ignores the error, and expects the commit
/// to fail.
async fn cut_off(stage: &Stage, proxy: &Proxy, store: &RedisStore, read: Read) -> Result<(), Source> {
    let before = stage.revision().await?;
    let mut tx = store.begin(&stage.consumer).await?;
    tx.put(b"a", b"1").await?;
    proxy.cut_at(read.pattern(), Cut::BeforeRequest);
    let failed = read.run(&mut tx).await;
    assert_error!(failed, Error::Unavailable { .. },);
    // A later successful read does not make up for it.
    tx.get(b"another").await?;
    let result = tx.commit(advance(before, 9)).await;
    assert_error!(
        result,
        Error::Unavailable { .. },
        "commit",
        "consumer c",
        "nothing was applied, because an earlier read failed",
        read.named()
    );
    assert_eq!((stage.revision().await?, stage.value("a").await?), (before, None));
    Ok(())
}

#[derive(Clone, Copy)]
enum Read {
    Get,
    Query,
    CommandInfo,
    CommandKeys,
}

impl Read {
    fn pattern(self) -> &'static [u8] {
        match self {
            Self::Get => b"HGET",
            Self::Query => b"LLEN",
            Self::CommandInfo => b"INFO",
            Self::CommandKeys => b"GETKEYS",
        }
    }

    fn named(self) -> &'static str {
        match self {
            Self::Get => "get a key of",
            Self::Query => "run LLEN",
            Self::CommandInfo => "ask about command SET",
            Self::CommandKeys => "ask about command ZUNIONSTORE",
        }
    }

    async fn run(self, tx: &mut RedisTx) -> Result<(), Error> {
        match self {
            Self::Get => tx.get(b"key").await.map(drop),
            Self::Query => tx.query::<u64>(command("LLEN list")).await.map(drop),
            Self::CommandInfo => tx.command(command("SET x 1")).await,
            Self::CommandKeys => tx.command(command("ZUNIONSTORE to 1 from")).await,
        }
    }
}

pub(crate) async fn after_a_read_without_an_answer_nothing_is_committed() -> Outcome {
    let stage = Stage::start().await?;
    let proxy = Proxy::start(stage.server.port())?;
    let store = stage.through(&proxy).await?;
    let mut tx = store.begin(&stage.consumer).await?;
    // The server is asked once about each command name.
    tx.query::<u64>(command("LLEN list")).await?;
    cut_off(&stage, &proxy, &store, Read::Get).await?;
    cut_off(&stage, &proxy, &store, Read::Query).await?;
    cut_off(&stage, &proxy, &store, Read::CommandInfo).await?;
    tx.command(command("ZUNIONSTORE to 1 from")).await?;
    cut_off(&stage, &proxy, &store, Read::CommandKeys).await?;
    // The next transaction commits.
    store.begin(&stage.consumer).await?.commit(advance(0, 1)).await?;
    Ok(())
}

pub(crate) async fn after_a_refused_read_nothing_is_committed() -> Outcome {
    let stage = Stage::start().await?;
    stage.ask("SET list x")?;
    stage.ask("SET essentially-once:{c}:state x")?;
    for named in ["LLEN list", "LLEN", "get"] {
        let mut tx = stage.begin().await?;
        match named {
            "get" => assert_error!(tx.get(b"a").await, Error::Failed { .. }, "WRONGTYPE"),
            read => assert_error!(tx.query::<u64>(command(read)).await, Error::Failed { .. }, "LLEN"),
        }
        assert_error!(
            tx.commit(advance(0, 1)).await,
            Error::Failed { .. },
            "because an earlier read failed",
            named.split(' ').next().unwrap_or_default()
        );
        assert_eq!(stage.revision().await?, 0);
    }
    Ok(())
}

pub(crate) async fn after_a_refused_command_the_rest_is_committed() -> Outcome {
    let stage = Stage::start().await?;
    let mut tx = stage.begin().await?;
    assert_error!(tx.command(command("NOSUCH a")).await, Error::Failed { .. }, "NOSUCH");
    let large = vec![0; 17 * 1024 * 1024];
    assert_error!(tx.put(b"large", &large).await, Error::TooLarge { .. },);
    tx.put(b"a", b"1").await?;
    tx.commit(advance(0, 1)).await?;
    assert_eq!(stage.value("a").await?.as_deref(), Some("1"));
    Ok(())
}
