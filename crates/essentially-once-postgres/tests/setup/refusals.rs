//! Addresses and servers that cannot be used.

use std::{net::TcpListener, time::Duration};

use essentially_once::{Error, Log as _, OffsetStore as _, backend::Durability};
use essentially_once_postgres::{Pg, PgOptions};
use test_servers::{PostgresServer, insist};
use tokio::time::Instant;

use crate::common::{Outcome, all_text_of, assert_error, client, ensure, numbered, records, soon};

const SECRET: &str = "correct-horse-battery";

pub(crate) async fn a_wrong_password_is_named_and_never_shown() -> Outcome {
    let server = PostgresServer::builder().password(SECRET).start()?;
    Pg::connect(&server.url()).await?;
    for wrong in ["wrong-horse", ""] {
        let url = server.url().replace(SECRET, wrong);
        let refused = Pg::connect(&url).await;
        assert_error!(&refused, Error::Failed { .. }, "127.0.0.1", "user and password");
        let text = refused.err().map(|error| all_text_of(&error)).unwrap_or_default();
        ensure!(wrong.is_empty() || !text.contains(wrong), "{text}");
    }
    let without = format!("postgres://postgres@127.0.0.1:{}/postgres", server.port());
    assert_error!(
        Pg::connect(&without).await,
        Error::Failed { .. },
        "put a user and password into the URL"
    );
    Ok(())
}

pub(crate) async fn a_missing_database_is_named() -> Outcome {
    let server = PostgresServer::start()?;
    assert_error!(
        Pg::connect(&server.url_of("shop")).await,
        Error::Failed { .. },
        "\"shop\" does not exist",
        "check the database in the URL"
    );
    Ok(())
}

pub(crate) async fn a_mistyped_url_is_refused_before_anything_is_sent() -> Outcome {
    for url in [
        "",
        "shop",
        "postgre://postgres@127.0.0.1/shop",
        "mysql://postgres@127.0.0.1/shop",
        "postgres://postgres@127.0.0.1:99999/shop",
        "postgres://postgres@127.0.0.1/shop?sslmode=verify-full",
        "postgres:///shop",
    ] {
        assert_error!(Pg::connect(url).await, Error::InvalidSetting { .. }, "postgres://[user");
    }
    let options = PgOptions::new().lock_timeout(Duration::from_secs(60));
    assert_error!(
        options.connect("postgres://127.0.0.1:1/shop").await,
        Error::InvalidSetting { setting: "timeout", .. },
        "lock_timeout"
    );
    Ok(())
}

pub(crate) async fn a_port_where_nobody_listens_is_a_passing_error() -> Outcome {
    let refused = Pg::connect("postgres://postgres@127.0.0.1:1/shop").await;
    assert_error!(refused, Error::Unavailable { .. }, "127.0.0.1:1/shop", "refused");
    Ok(())
}

/// It accepts the connection and says nothing.
pub(crate) async fn a_server_that_never_answers_is_given_up() -> Outcome {
    let silent = TcpListener::bind("127.0.0.1:0")?;
    let url = format!("postgres://postgres@{}/shop", silent.local_addr()?);
    let options = PgOptions::new()
        .timeout(Duration::from_millis(300))
        .lock_timeout(Duration::from_millis(100));
    let begun = Instant::now();
    let refused = soon(options.connect(&url)).await?;
    ensure!(begun.elapsed() >= Duration::from_millis(300), "too early");
    assert_error!(refused, Error::Unavailable { .. }, "did not answer within 300ms");
    Ok(())
}

pub(crate) async fn a_standby_is_refused_for_now() -> Outcome {
    let primary = PostgresServer::start()?;
    Pg::connect(&primary.url()).await?.log("orders").await?;
    let replica = PostgresServer::builder().replica_of(&primary).start()?;
    assert_error!(
        Pg::connect(&replica.url()).await,
        Error::Unavailable { .. },
        "standby",
        "the address of the primary"
    );
    primary.kill()?;
    replica.promote()?;
    let orders = insist(async || Pg::connect(&replica.url()).await?.log("orders").await).await?;
    orders.append(&numbered(0..1)).await?;
    Ok(())
}

pub(crate) async fn of_several_hosts_the_primary_is_found() -> Outcome {
    let primary = PostgresServer::start()?;
    let replica = PostgresServer::builder().replica_of(&primary).start()?;
    let (first, second) = (replica.port(), primary.port());
    let url = format!("postgres://postgres@127.0.0.1:1,127.0.0.1:{first},127.0.0.1:{second}/postgres");
    let orders = Pg::connect(&url).await?.log("orders").await?;
    orders.append(&numbered(0..1)).await?;
    let same = Pg::connect(&primary.url()).await?.log("orders").await?;
    ensure!(records(&same).await?.len() == 1, "it was appended elsewhere");
    Ok(())
}

pub(crate) async fn another_encoding_is_refused() -> Outcome {
    let server = PostgresServer::start()?;
    for encoding in ["LATIN1", "SQL_ASCII"] {
        let create = format!("CREATE DATABASE \"{encoding}\" TEMPLATE template0 ENCODING '{encoding}' LOCALE 'C'");
        server.run_sql(&create)?;
        assert_error!(
            Pg::connect(&server.url_of(encoding)).await,
            Error::Failed { .. },
            encoding,
            "encoding UTF8"
        );
    }
    Ok(())
}

pub(crate) async fn a_server_without_room_for_connections_is_a_passing_error() -> Outcome {
    let settings = [
        ("max_connections", "6"),
        ("superuser_reserved_connections", "1"),
        ("max_wal_senders", "0"),
    ];
    let server = PostgresServer::builder().with(&settings).start()?;
    Pg::connect(&server.url()).await?;
    server.run_sql("CREATE ROLE shop LOGIN")?;
    let url = server.url().replace("postgres@", "shop@");
    let mut clients = Vec::new();
    while let Ok(client) = client(&url).await {
        clients.push(client);
        ensure!(clients.len() < 20, "the limit has no effect");
    }
    let refused = Pg::connect(&url).await;
    assert_error!(refused, Error::Unavailable { .. }, "connection");
    drop(clients);
    // Only the right to the schema is missing now.
    test_servers::eventually(async || {
        Ok(match Pg::connect(&url).await.map(drop) {
            Err(Error::Failed { .. }) => Ok(()),
            connected => Err(format!("{connected:?}")),
        })
    })
    .await
}

pub(crate) async fn settings_that_lose_data_are_named() -> Outcome {
    let server = PostgresServer::builder().with(&[("fsync", "off")]).start()?;
    let pg = Pg::connect(&server.url()).await?;
    let (log, store) = (pg.log("orders").await?, pg.store());
    for found in [log.durability().await?, store.durability().await?] {
        ensure!(
            matches!(&found, Durability::Volatile(why) if why.contains("`fsync = on`")),
            "{found:?}"
        );
    }
    // Each session sets this one for itself.
    let server = PostgresServer::builder()
        .with(&[("synchronous_commit", "off")])
        .start()?;
    let pg = Pg::connect(&server.url()).await?;
    let found = pg.store().durability().await?;
    ensure!(found == Durability::Durable, "{found:?}");
    let version = pg.version();
    ensure!(
        version.is_some_and(|version| version.starts_with("PostgreSQL 1")),
        "{version:?}"
    );
    ensure!(pg.synchronous_standby_names().await?.is_empty(), "there is no standby");
    let settings = [("synchronous_standby_names", "b,c"), ("synchronous_commit", "local")];
    let server = PostgresServer::builder().with(&settings).start()?;
    let names = Pg::connect(&server.url()).await?.synchronous_standby_names().await?;
    ensure!(names == "b,c", "{names}");
    Ok(())
}
