//! Crash tests of handlers on a live RabbitMQ.

mod common;

use std::{process::ExitCode, sync::Arc};

use essentially_once::{
    ConsumerId, Error, Handler, HandlerError, KeyValue as _, Log, NewRecord, Outbox as _, Record, async_trait,
    backend::Source,
};
use essentially_once_rabbitmq::{Rabbit, RabbitStore, RabbitTx};
use essentially_once_testkit::{Backend, Capabilities, CrashTest, Harness, Ledger, Mistake, Probe};

use crate::common::{Outcome, cases, ensure, fresh, options, shared_node};

const TOTAL: &[u8] = b"total";

/// How many plans a test runs. Each takes about a second.
const PLANS: usize = 20;

fn main() -> ExitCode {
    common::run(cases![
        a_portable_handler_passes,
        a_handler_that_sends_passes,
        a_total_that_is_not_reset_is_found,
        a_call_outside_the_transaction_is_found,
    ])
}

/// Each run has streams of its own on one broker.
struct NewStreams;

struct Shop {
    url: String,
    prefix: String,
}

#[async_trait]
impl Harness for NewStreams {
    type Backend = Shop;

    fn capabilities(&self) -> Capabilities {
        Capabilities::minimal()
    }

    async fn start(&self, _: &str) -> Result<Shop, Source> {
        let node = tokio::task::spawn_blocking(shared_node).await??;
        Ok(Shop {
            url: node.url(),
            prefix: fresh("crash"),
        })
    }
}

impl Shop {
    async fn rabbit(&self) -> Result<Rabbit, Error> {
        options().prefix(&self.prefix).connect(&self.url).await
    }
}

#[async_trait]
impl Backend for Shop {
    type Store = RabbitStore;

    async fn log(&self, name: &str) -> Result<Arc<dyn Log>, Error> {
        let name = format!("{}-{name}", self.prefix);
        Ok(Arc::new(self.rabbit().await?.log(&name).await?))
    }

    async fn store(&self) -> Result<RabbitStore, Error> {
        Ok(self.rabbit().await?.store())
    }

    async fn outbox(&self, log: &str) -> Result<Arc<dyn Log>, Error> {
        let consumer = ConsumerId::new("crash-test")?;
        Ok(Arc::new(self.store().await?.sent_to(&consumer, log)?))
    }
}

/// Sends each order on with the running total. It keeps the total in memory, and resets it or not.
struct Totals {
    total: Option<u64>,
    resets: bool,
}

#[async_trait]
impl Handler<RabbitTx> for Totals {
    async fn handle(&mut self, order: &Record, tx: &mut RabbitTx) -> Result<(), HandlerError> {
        let before = match (self.total, tx.get(TOTAL).await?) {
            (Some(total), _) => total,
            (None, Some(total)) => std::str::from_utf8(&total)?.parse()?,
            (None, None) => 0,
        };
        let total = (before + 1).to_string();
        self.total = Some(before + 1);
        tx.put(TOTAL, total.as_bytes()).await?;
        tx.send("billing", NewRecord::new(total).key(order.payload.clone()))
            .await?;
        Ok(())
    }

    async fn reset(&mut self) {
        if self.resets {
            self.total = None;
        }
    }
}

/// Counts, and sends mail outside the transaction.
struct Mail(Probe);

#[async_trait]
impl Handler<RabbitTx> for Mail {
    async fn handle(&mut self, _: &Record, tx: &mut RabbitTx) -> Result<(), HandlerError> {
        tx.put(TOTAL, b"mailed").await?;
        self.0.call("POST /mail");
        Ok(())
    }
}

fn test(resets: bool) -> CrashTest<NewStreams> {
    CrashTest::native(NewStreams, move |_| Totals { total: None, resets })
        .records(orders())
        .limit(PLANS)
        .key(TOTAL)
        .outbox("billing")
}

fn orders() -> [NewRecord; 3] {
    ["Brazil", "Chile", "Brazil"].map(NewRecord::new)
}

async fn a_portable_handler_passes() -> Outcome {
    let test = CrashTest::on(NewStreams, |_| Ledger).limit(PLANS);
    test.records(orders()).run().await?;
    Ok(())
}

async fn a_handler_that_sends_passes() -> Outcome {
    test(true).run().await?;
    Ok(())
}

async fn a_total_that_is_not_reset_is_found() -> Outcome {
    finds(test(false), Mistake::KeptInMemory).await
}

async fn a_call_outside_the_transaction_is_found() -> Outcome {
    let test = CrashTest::native(NewStreams, |probe| Mail(probe.clone()));
    let test = test.records(orders()).limit(PLANS).key(TOTAL);
    finds(test, Mistake::EffectRepeated).await
}

async fn finds(test: CrashTest<NewStreams>, mistake: Mistake) -> Outcome {
    let found = test.seed(3).run().await.err().ok_or("nothing was found")?;
    let only = found.findings.iter().all(|finding| finding.mistake == mistake);
    ensure!(only, "{found}");
    Ok(())
}
