//! Users who may do less than all.

use std::time::Duration;

use essentially_once::{
    ConsumerId, Error, Log as _, NewRecord, OffsetStore as _, Outbox as _,
    backend::{DeadLetter, DeadLetters as _, Owner, Transaction as _},
};
use essentially_once_postgres::{LogOptions, Pg, PgOptions, Retention};
use test_servers::PostgresServer;

use crate::common::{Outcome, advance, assert_error, ensure, numbered, payloads, records};

/// A server with a user who may only log in, and that user's URL.
fn server() -> Result<(PostgresServer, String), test_servers::Error> {
    let server = PostgresServer::start()?;
    server.run_sql("CREATE ROLE shop LOGIN")?;
    let url = server.url().replace("postgres@", "shop@");
    Ok((server, url))
}

pub(crate) async fn a_user_without_rights_learns_what_to_grant() -> Outcome {
    let (server, url) = server()?;
    let admin = Pg::connect(&server.url()).await?;
    admin.log("orders").await?;
    assert_error!(
        Pg::connect(&url).await,
        Error::Failed { .. },
        "permission denied for schema essentially_once",
        "grant the user access: ",
        "USAGE on the schema",
        "SELECT, INSERT, UPDATE and DELETE on its tables"
    );
    // The rest works until it needs the right.
    server.run_sql(
        "GRANT USAGE ON SCHEMA essentially_once TO shop; GRANT SELECT ON ALL TABLES IN SCHEMA essentially_once TO shop",
    )?;
    let orders = Pg::connect(&url).await?.log("orders").await?;
    ensure!(records(&orders).await?.is_empty(), "it has no records");
    assert_error!(
        orders.append(&numbered(0..1)).await,
        Error::Failed { .. },
        "permission denied for table",
        "grant the user access"
    );
    Ok(())
}

pub(crate) async fn a_user_who_may_not_create_learns_what_to_grant() -> Outcome {
    let (_server, url) = server()?;
    assert_error!(
        Pg::connect(&url).await,
        Error::Failed { .. },
        "permission denied for database postgres",
        "CREATE on the database"
    );
    Ok(())
}

pub(crate) async fn the_documented_rights_are_enough() -> Outcome {
    let (server, url) = server()?;
    Pg::connect(&server.url()).await?;
    server.run_sql(
        "GRANT USAGE ON SCHEMA essentially_once TO shop;
         GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA essentially_once TO shop",
    )?;
    let pg = PgOptions::new().existing().connect(&url).await?;
    let (store, id) = (pg.store(), ConsumerId::new("shipping")?);
    let keep = LogOptions::new().retention(Retention::new().max_records(3));
    let orders = pg.log_with("orders", keep).await?;
    orders.append(&numbered(0..5)).await?;
    orders.trim().await?;
    // The append may still be trimming, and then some of the two records are counted there.
    orders.remove_before(4.into()).await?;
    ensure!(orders.bounds().await?.earliest == 4.into(), "not removed");
    let owner = Owner::draw();
    let mut tx = store.begin(&id).await?;
    tx.send("out", NewRecord::new("sent")).await?;
    let read = records(&orders).await?;
    tx.park(&DeadLetter::new(
        read[0].clone(),
        1,
        "no reason",
        std::time::SystemTime::now(),
    ))
    .await?;
    let mut first = advance(0, 5);
    first.owner = Some(owner);
    tx.commit(first).await?;
    store.beat(&id, owner).await?;
    store.release(&id, owner).await?;
    ensure!(store.consumers().await? == Some(vec![id.clone()]), "it has a position");
    let mut tx = store.begin(&id).await?;
    ensure!(tx.remove(4.into()).await?, "the letter is there");
    tx.commit(advance(1, 5)).await?;
    ensure!(payloads(&records(&pg.log("out").await?).await?) == ["sent"], "not sent");
    ensure!(
        store.watch(&id, &Default::default(), Duration::ZERO).await?.beats == 1,
        "no beat"
    );
    Ok(())
}

/// An administrator may have created it for the user.
pub(crate) async fn an_empty_schema_of_the_user_is_used() -> Outcome {
    let (server, url) = server()?;
    server.run_sql("CREATE SCHEMA essentially_once AUTHORIZATION shop")?;
    let orders = Pg::connect(&url).await?.log("orders").await?;
    orders.append(&numbered(0..1)).await?;
    Ok(())
}
