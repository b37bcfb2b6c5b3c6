//! Schemas: those of others, those of other versions, and several in one database.

use std::time::Duration;

use essentially_once::{
    ConsumerId, Error, Log as _, NewRecord, OffsetStore as _, Outbox as _, backend::Transaction as _,
};
use essentially_once_postgres::{LogOptions, Pg, PgOptions};
use test_servers::PostgresServer;
use tokio::task::JoinSet;

use crate::common::{Outcome, advance, assert_error, ensure, numbered, payloads, records};

/// The number of tables in the schema of this crate.
const TABLES: &str = "SELECT count(*) FROM pg_tables WHERE schemaname = 'essentially_once'";

pub(crate) async fn a_newer_schema_is_refused() -> Outcome {
    let server = PostgresServer::start()?;
    Pg::connect(&server.url()).await?;
    server.run_sql("UPDATE essentially_once.meta SET value = 99")?;
    for options in [PgOptions::new(), PgOptions::new().existing()] {
        assert_error!(
            options.connect(&server.url()).await,
            Error::Failed { .. },
            "version 99",
            "use a newer"
        );
    }
    ensure!(
        server.run_sql("SELECT value FROM essentially_once.meta")?.trim() == "99",
        "it was changed"
    );
    Ok(())
}

pub(crate) async fn tables_of_someone_else_are_refused_and_kept() -> Outcome {
    let server = PostgresServer::start()?;
    for table in [
        "CREATE TABLE shop.orders (n int)",
        "CREATE VIEW shop.orders AS SELECT 1 AS n",
        "CREATE TABLE shop.meta (version int)",
        "CREATE TABLE shop.meta (name text, value bigint); INSERT INTO shop.meta VALUES ('other', 1)",
    ] {
        server.run_sql(&format!("CREATE SCHEMA shop; {table}"))?;
        for options in [PgOptions::new(), PgOptions::new().existing()] {
            assert_error!(
                options.schema("shop").connect(&server.url()).await,
                Error::Failed { .. },
                "schema shop",
                "choose another `schema`"
            );
        }
        let tables = server.run_sql("SELECT count(*) FROM pg_class WHERE relnamespace = 'shop'::regnamespace")?;
        ensure!(tables.trim() == "1", "{tables} tables: {table}");
        server.run_sql("DROP SCHEMA shop CASCADE")?;
    }
    Ok(())
}

pub(crate) async fn existing_refuses_an_empty_database_and_creates_nothing() -> Outcome {
    let server = PostgresServer::start()?;
    let existing = || PgOptions::new().existing();
    let url = server.url();
    assert_error!(
        existing().connect(&url).await,
        Error::Failed { .. },
        "does not exist or is empty",
        "check the database"
    );
    ensure!(server.run_sql(TABLES)?.trim() == "0", "it has created tables");
    Pg::connect(&url).await?;
    existing().connect(&url).await?.log("orders").await?;
    Ok(())
}

pub(crate) async fn a_log_that_must_exist_lists_the_others() -> Outcome {
    let server = PostgresServer::start()?;
    let pg = Pg::connect(&server.url()).await?;
    let existing = async || pg.log_with("ordesr", LogOptions::new().existing()).await;
    assert_error!(
        existing().await,
        Error::Failed { .. },
        "no log has that name, and the schema holds no other log",
        "existing()"
    );
    for name in ["orders", "letters"] {
        pg.log(name).await?;
    }
    assert_error!(
        existing().await,
        Error::Failed { .. },
        "the schema holds letters, orders;",
        "check the name"
    );
    for n in 0..30 {
        pg.log(&format!("log-{n:02}")).await?;
    }
    assert_error!(existing().await, Error::Failed { .. }, "log-18 and others");
    ensure!(
        server.run_sql("SELECT count(*) FROM essentially_once.logs")?.trim() == "32",
        "it was created"
    );
    Ok(())
}

/// Connects many times at once. Each process then appends, so that all must mean the same log.
async fn start_at_once(url: &str) -> Outcome {
    let mut processes = JoinSet::new();
    for n in 0..8 {
        let url = url.to_owned();
        processes.spawn(async move {
            let orders = Pg::connect(&url).await?.log("orders").await?;
            orders.append(&numbered(n..n + 1)).await
        });
    }
    while let Some(done) = processes.join_next().await {
        done??;
    }
    let orders = Pg::connect(url).await?.log("orders").await?;
    let mut found = payloads(&records(&orders).await?);
    found.sort();
    ensure!(found == (0..8).map(|n| n.to_string()).collect::<Vec<_>>(), "{found:?}");
    Ok(())
}

pub(crate) async fn processes_that_start_at_once_migrate_once() -> Outcome {
    let server = PostgresServer::start()?;
    for round in 0..3 {
        start_at_once(&server.create_database(&format!("shop-{round}"))?).await?;
    }
    Ok(())
}

/// A snapshot from before another's commit would hide its tables and its numbers.
pub(crate) async fn the_default_isolation_of_a_database_disturbs_nothing() -> Outcome {
    let server = PostgresServer::start()?;
    for level in ["repeatable read", "serializable"] {
        let url = server.create_database(level)?;
        server.run_sql(&format!(
            "ALTER DATABASE \"{level}\" SET default_transaction_isolation = '{level}'"
        ))?;
        start_at_once(&url).await?;
        let pg = Pg::connect(&url).await?;
        let mut appending = JoinSet::new();
        for _ in 0..4 {
            let orders = pg.log("orders").await?;
            appending.spawn(async move {
                for n in 0..50 {
                    orders.append(&numbered(n..n + 1)).await?;
                }
                Ok::<_, Error>(())
            });
        }
        while let Some(appended) = appending.join_next().await {
            appended??;
        }
    }
    Ok(())
}

pub(crate) async fn two_schemas_do_not_see_each_other() -> Outcome {
    let server = PostgresServer::start()?;
    let id = ConsumerId::new("shipping")?;
    let of = async |schema: &str| PgOptions::new().schema(schema).connect(&server.url()).await;
    let (a, b) = (of("a").await?, of("b").await?);
    let (log_a, log_b) = (a.log("orders").await?, b.log("orders").await?);
    log_a.append(&numbered(0..3)).await?;
    let mut tx = a.store().begin(&id).await?;
    tx.send("orders", NewRecord::new("sent")).await?;
    tx.commit(advance(0, 3)).await?;
    ensure!(records(&log_b).await?.is_empty(), "the other log has records");
    ensure!(
        b.store().position(&id).await?.is_none(),
        "the other store has a position"
    );
    ensure!(
        b.store().consumers().await? == Some(Vec::new()),
        "the other store has a consumer"
    );
    // A revision of the other schema fences nobody.
    b.store().begin(&id).await?.commit(advance(0, 1)).await?;
    log_b.append(&numbered(0..1)).await?;
    ensure!(payloads(&records(&log_a).await?) == ["0", "1", "2", "sent"], "mixed");
    let mut reader = log_b.read(1.into()).await?;
    let woken = tokio::time::timeout(Duration::from_millis(300), async {
        log_a.append(&numbered(0..1)).await?;
        reader.next(1).await
    });
    ensure!(woken.await.is_err(), "a reader got a record of the other schema");
    Ok(())
}
