//! TLS.

use std::time::Duration;

use essentially_once::{Consumer, ConsumerId, Error, backend::Source};
use essentially_once_postgres::{Pg, PgOptions};
use essentially_once_testkit::Ledger;
use test_servers::{Authority, Pair, PostgresBuilder, PostgresServer};

use crate::common::{Outcome, assert_error, ensure, judge, send};

const MESSAGES: u64 = 10;

/// Only connections with TLS.
const TLS_ONLY: &str = "hostnossl all all 127.0.0.1/32 reject";

pub(crate) fn authority() -> Result<Authority, Source> {
    Authority::new(&["127.0.0.1", "localhost"])
}

pub(crate) fn with_tls(authority: &Authority) -> PostgresBuilder {
    let Pair { certificate, key } = &authority.server;
    PostgresServer::builder().tls(certificate, key, &authority.root)
}

pub(crate) fn trusting(authority: &Authority) -> PgOptions {
    PgOptions::new()
        .timeout(Duration::from_secs(20))
        .add_root_certificate(authority.root.as_str())
}

pub(crate) fn tls_url(server: &PostgresServer) -> String {
    server.url() + "?sslmode=require"
}

/// Appends, consumes and judges.
async fn works(pg: &Pg) -> Outcome {
    let (log, store, id) = (pg.log("orders").await?, pg.store(), ConsumerId::new("shipping")?);
    send(&log, 0..MESSAGES).await?;
    let consumer = Consumer::essentially_once(id.clone(), log.clone(), store.clone(), Ledger).max_batch(3);
    let report = consumer.run_until_caught_up().await?;
    ensure!(report.handled == MESSAGES && report.restarts == 0, "{report}");
    judge(&log, &store, &id, MESSAGES).await
}

pub(crate) async fn clients_are_served_and_encrypted() -> Outcome {
    let authority = authority()?;
    let server = with_tls(&authority).access(TLS_ONLY).start()?;
    let pg = trusting(&authority).connect(&tls_url(&server)).await?;
    works(&pg).await?;
    let plain = "SELECT count(*), count(*) FILTER (WHERE NOT ssl) FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) \
         WHERE application_name = 'essentially-once'";
    let found = server.run_sql(plain)?;
    let (all, plain) = found.trim().split_once('|').ok_or("no columns")?;
    // Reading and notifications have a session of their own.
    ensure!(
        all.parse::<u32>()? >= 2 && plain == "0",
        "{all} sessions, {plain} plain"
    );
    let named = tls_url(&server).replace("127.0.0.1", "localhost");
    trusting(&authority).without_system_roots().connect(&named).await?;
    // Certificates require a URL with TLS.
    assert_error!(
        trusting(&authority).connect(&server.url()).await,
        Error::InvalidSetting { .. },
        "sslmode=require"
    );
    Ok(())
}

pub(crate) async fn a_server_that_requires_tls_says_what_to_add() -> Outcome {
    let authority = authority()?;
    let only = "hostssl all all 127.0.0.1/32 trust\nhost all all all reject";
    for rules in [TLS_ONLY, only] {
        let server = with_tls(&authority).access(rules).start()?;
        assert_error!(
            Pg::connect(&server.url()).await,
            Error::Failed { .. },
            "127.0.0.1",
            "add ?sslmode=require to the URL"
        );
    }
    Ok(())
}

pub(crate) async fn a_server_without_tls_says_what_to_remove() -> Outcome {
    let server = PostgresServer::start()?;
    assert_error!(
        Pg::connect(&tls_url(&server)).await,
        Error::Failed { .. },
        "does not support TLS",
        "remove `sslmode=require`"
    );
    Ok(())
}

pub(crate) async fn another_authority_is_not_trusted() -> Outcome {
    let (ours, others) = (authority()?, authority()?);
    let server = with_tls(&ours).start()?;
    for options in [PgOptions::new(), trusting(&others)] {
        assert_error!(
            options.connect(&tls_url(&server)).await,
            Error::Failed { .. },
            "127.0.0.1",
            "certificate",
            "add_root_certificate"
        );
    }
    assert_error!(
        PgOptions::new()
            .add_root_certificate("garbage")
            .connect(&tls_url(&server))
            .await,
        Error::InvalidSetting {
            setting: "add_root_certificate",
            ..
        },
        "no certificate in PEM format"
    );
    Ok(())
}

pub(crate) async fn a_certificate_for_another_name_is_not_trusted() -> Outcome {
    let authority = Authority::new(&["db.example"])?;
    let server = with_tls(&authority).start()?;
    assert_error!(
        trusting(&authority).connect(&tls_url(&server)).await,
        Error::Failed { .. },
        "certificate",
        "use the host name in that certificate"
    );
    Ok(())
}

pub(crate) async fn clients_without_a_certificate_are_refused() -> Outcome {
    let (authority, others) = (authority()?, authority()?);
    let rule = format!("hostssl all all 127.0.0.1/32 trust clientcert=verify-ca\n{TLS_ONLY}");
    let server = with_tls(&authority).access(&rule).start()?;
    let with = |Pair { certificate, key }: &Pair| {
        let options = trusting(&authority).client_certificate(certificate.as_str());
        options.client_key(key.as_str())
    };
    works(&with(&authority.client).connect(&tls_url(&server)).await?).await?;
    assert_error!(
        trusting(&authority).connect(&tls_url(&server)).await,
        Error::Failed { .. },
        "client certificate"
    );
    assert_error!(
        with(&others.client).connect(&tls_url(&server)).await,
        Error::Failed { .. },
        "`client_certificate`"
    );
    let mismatched = trusting(&authority)
        .client_certificate(authority.client.certificate.as_str())
        .client_key(others.client.key.as_str());
    assert_error!(
        mismatched.connect(&tls_url(&server)).await,
        Error::InvalidSetting {
            setting: "client_certificate",
            ..
        },
        "`client_key`"
    );
    Ok(())
}
