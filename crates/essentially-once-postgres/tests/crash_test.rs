//! Crash tests of handlers on a live PostgreSQL.

mod common;

use std::{process::ExitCode, sync::Arc};

use essentially_once::{Error, Handler, HandlerError, Log, NewRecord, Record, async_trait, backend::Source};
use essentially_once_postgres::{Pg, PgStore, PgTx};
use essentially_once_testkit::{Backend, Capabilities, CrashTest, Harness, Ledger, Mistake, Probe};
use test_servers::PostgresServer;
use tokio::sync::OnceCell;

use crate::common::{Outcome, cases, ensure};

const TABLE: &str = "CREATE TABLE shipped (place text PRIMARY KEY, total text NOT NULL)";

/// How many plans a test runs. Each has a database.
const PLANS: usize = 20;

fn main() -> ExitCode {
    common::run(cases![
        a_portable_handler_passes,
        a_handler_with_sql_passes,
        a_handler_that_queues_its_sql_passes,
        a_total_that_is_not_reset_is_found,
        a_call_outside_the_transaction_is_found,
    ])
}

/// Each run begins with a new database.
#[derive(Default)]
struct NewDatabase {
    server: OnceCell<PostgresServer>,
    count: std::sync::atomic::AtomicUsize,
}

struct Shop {
    pg: Pg,
    url: String,
}

#[async_trait]
impl Harness for NewDatabase {
    type Backend = Shop;

    fn capabilities(&self) -> Capabilities {
        Capabilities::minimal()
    }

    async fn start(&self, _: &str) -> Result<Shop, Source> {
        let server = self.server.get_or_try_init(async || PostgresServer::start()).await?;
        let number = self.count.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        let name = format!("shop-{number}");
        let url = server.create_database(&name)?;
        server.run_sql_in(&name, TABLE)?;
        let pg = Pg::connect(&url).await?;
        Ok(Shop { pg, url })
    }
}

#[async_trait]
impl Backend for Shop {
    type Store = PgStore;

    async fn log(&self, name: &str) -> Result<Arc<dyn Log>, Error> {
        Ok(Arc::new(self.pg.log(name).await?))
    }

    async fn store(&self) -> Result<PgStore, Error> {
        Ok(self.pg.store())
    }
}

/// What is compared after each run.
async fn shipments(shop: &Shop) -> Result<Vec<(String, String)>, Source> {
    let client = common::client(&shop.url).await?;
    let rows = client.query("SELECT place, total FROM shipped", &[]).await?;
    Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
}

/// Writes the running total beside each order. It keeps the total in memory, and resets it or not.
struct Totals {
    total: Option<i64>,
    resets: bool,
    queues: bool,
}

#[async_trait]
impl Handler<PgTx> for Totals {
    async fn handle(&mut self, order: &Record, tx: &mut PgTx) -> Result<(), HandlerError> {
        let before = match self.total {
            Some(total) => total,
            None => tx.query("SELECT count(*) FROM shipped", &[]).await?[0].get(0),
        };
        self.total = Some(before + 1);
        let (place, total) = (order.offset.to_string(), (before + 1).to_string());
        const INSERT: &str = "INSERT INTO shipped (place, total) VALUES ($1, $2)";
        match self.queues {
            true => tx.queue(INSERT, &[&place, &total]).await?,
            false => drop(tx.execute(INSERT, &[&place, &total]).await?),
        }
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
impl Handler<PgTx> for Mail {
    async fn handle(&mut self, order: &Record, tx: &mut PgTx) -> Result<(), HandlerError> {
        let place = order.offset.to_string();
        tx.execute("INSERT INTO shipped (place, total) VALUES ($1, 'mailed')", &[&place])
            .await?;
        self.0.call("POST /mail");
        Ok(())
    }
}

fn test(resets: bool, queues: bool) -> CrashTest<NewDatabase> {
    let totals = move |_: &_| Totals {
        total: None,
        resets,
        queues,
    };
    CrashTest::native(NewDatabase::default(), totals)
        .records(orders())
        .limit(PLANS)
        .observe(shipments)
}

fn orders() -> [NewRecord; 3] {
    ["Brazil", "Chile", "Brazil"].map(NewRecord::new)
}

async fn a_portable_handler_passes() -> Outcome {
    let test = CrashTest::on(NewDatabase::default(), |_| Ledger).limit(PLANS);
    test.records(orders()).run().await?;
    Ok(())
}

async fn a_handler_with_sql_passes() -> Outcome {
    test(true, false).run().await?;
    Ok(())
}

async fn a_handler_that_queues_its_sql_passes() -> Outcome {
    test(true, true).run().await?;
    Ok(())
}

async fn a_total_that_is_not_reset_is_found() -> Outcome {
    finds(test(false, false), Mistake::KeptInMemory).await
}

async fn a_call_outside_the_transaction_is_found() -> Outcome {
    let test = CrashTest::native(NewDatabase::default(), |probe| Mail(probe.clone()));
    let test = test.records(orders()).limit(PLANS).observe(shipments);
    finds(test, Mistake::EffectRepeated).await
}

async fn finds(test: CrashTest<NewDatabase>, mistake: Mistake) -> Outcome {
    let found = test.seed(3).run().await.err().ok_or("nothing was found")?;
    let only = found.findings.iter().all(|finding| finding.mistake == mistake);
    ensure!(only, "{found}");
    Ok(())
}
