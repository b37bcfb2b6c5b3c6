//! Crash tests of handlers on a live Redis.

mod common;

use std::{process::ExitCode, sync::Arc};

use essentially_once::{Error, Handler, HandlerError, Log, NewRecord, Record, async_trait, backend::Source};
use essentially_once_redis::{Redis, RedisStore, RedisTx, redis::Cmd};
use essentially_once_testkit::{Backend, Capabilities, CrashTest, Harness, Ledger, Mistake, Probe};
use test_servers::RedisServer;

use crate::common::{Outcome, cases, ensure};

/// Where the handlers write. In a cluster, the braces keep it on the node of the position.
const SHIPPED: &str = "{crash-test}:shipped";

/// How many plans a test runs. Each starts a server.
const PLANS: usize = 20;

fn main() -> ExitCode {
    common::run(cases![
        a_portable_handler_passes,
        a_handler_of_redis_commands_passes,
        a_total_that_is_not_reset_is_found,
        a_call_outside_the_transaction_is_found,
    ])
}

/// Each run begins with a new server.
struct NewServer;

struct Shop(RedisServer);

#[async_trait]
impl Harness for NewServer {
    type Backend = Shop;

    fn capabilities(&self) -> Capabilities {
        Capabilities::minimal()
    }

    async fn start(&self, _: &str) -> Result<Shop, Source> {
        Ok(Shop(RedisServer::durable().start()?))
    }
}

#[async_trait]
impl Backend for Shop {
    type Store = RedisStore;

    async fn log(&self, name: &str) -> Result<Arc<dyn Log>, Error> {
        Ok(Arc::new(Redis::connect(&self.0.url()).await?.log(name).await?))
    }

    async fn store(&self) -> Result<RedisStore, Error> {
        Ok(Redis::connect(&self.0.url()).await?.store())
    }
}

/// What is compared after each run.
async fn shipments(shop: &Shop) -> Result<Vec<(String, String)>, Source> {
    let shipped = shop.0.command(&["HGETALL", SHIPPED])?;
    let (pairs, _) = shipped.list().as_chunks::<2>();
    let pairs = pairs
        .iter()
        .map(|[order, total]| (order.text().into(), total.text().into()));
    Ok(pairs.collect())
}

/// Writes the running total beside each order. It keeps the total in memory, and resets it or not.
struct Totals {
    total: Option<u64>,
    resets: bool,
}

#[async_trait]
impl Handler<RedisTx> for Totals {
    async fn handle(&mut self, order: &Record, tx: &mut RedisTx) -> Result<(), HandlerError> {
        let before = match self.total {
            Some(total) => total,
            None => tx.query(Cmd::hlen(SHIPPED)).await?,
        };
        self.total = Some(before + 1);
        tx.command(Cmd::hset(SHIPPED, order.offset.to_string(), before + 1))
            .await?;
        Ok(())
    }

    async fn reset(&mut self) {
        if self.resets {
            self.total = None;
        }
    }
}

/// Ships, and sends mail outside the transaction.
struct Mail(Probe);

#[async_trait]
impl Handler<RedisTx> for Mail {
    async fn handle(&mut self, order: &Record, tx: &mut RedisTx) -> Result<(), HandlerError> {
        tx.command(Cmd::hset(SHIPPED, order.offset.to_string(), "mailed"))
            .await?;
        self.0.call("POST /mail");
        Ok(())
    }
}

fn test(resets: bool) -> CrashTest<NewServer> {
    CrashTest::native(NewServer, move |_| Totals { total: None, resets })
        .records(orders())
        .limit(PLANS)
        .observe(shipments)
}

fn orders() -> [NewRecord; 3] {
    ["Brazil", "Chile", "Brazil"].map(NewRecord::new)
}

async fn a_portable_handler_passes() -> Outcome {
    let test = CrashTest::on(NewServer, |_| Ledger).limit(PLANS);
    test.records(orders()).run().await?;
    Ok(())
}

async fn a_handler_of_redis_commands_passes() -> Outcome {
    test(true).run().await?;
    Ok(())
}

async fn a_total_that_is_not_reset_is_found() -> Outcome {
    finds(test(false), Mistake::KeptInMemory).await
}

async fn a_call_outside_the_transaction_is_found() -> Outcome {
    let test = CrashTest::native(NewServer, |probe| Mail(probe.clone()));
    let test = test.records(orders()).limit(PLANS).observe(shipments);
    finds(test, Mistake::EffectRepeated).await
}

async fn finds(test: CrashTest<NewServer>, mistake: Mistake) -> Outcome {
    let found = test.seed(3).run().await.err().ok_or("nothing was found")?;
    let only = found.findings.iter().all(|finding| finding.mistake == mistake);
    ensure!(only, "{found}");
    Ok(())
}
