//! TLS and passwords.

use std::time::Duration;

use essentially_once::{Error, Log as _, NewRecord, Offset, backend::Source};
use essentially_once_kafka::{Appends, Kafka, KafkaOptions, LogOptions};
use test_servers::Authority;

use crate::{
    front::{Front, Rules, tls},
    support::{Outcome, PATIENCE, Stage, assert_error, ensure, payloads, records},
};

/// A client that is refused tries again until then. A busy machine refuses it within that time.
const IMPATIENT: Duration = Duration::from_secs(3);

fn authority() -> Result<Authority, Source> {
    Authority::new(&["127.0.0.1", "localhost"])
}

fn trusting(authority: &Authority) -> KafkaOptions {
    KafkaOptions::new()
        .timeout(PATIENCE)
        .setting("ssl.ca.pem", authority.root.as_str())
}

/// A port with TLS before the broker. Clients show a certificate too if they must.
async fn with_tls(stage: &Stage, authority: &Authority, clients_too: bool) -> Result<Front, Source> {
    let rules = Rules {
        tls: Some(tls(authority, clients_too)?),
        user: None,
    };
    Front::start(stage.server.port(), rules).await
}

/// Appends in both ways, and reads.
async fn works(kafka: &Kafka) -> Outcome {
    for (name, appends) in [("a", Appends::Pipelined), ("b", Appends::Transactional)] {
        let log = kafka.log_with(name, LogOptions::new().appends(appends)).await?;
        log.append(&["1", "2", "3"].map(NewRecord::new)).await?;
        let found = payloads(&records(&log, Offset::ZERO).await?);
        ensure!(found == ["1", "2", "3"], "{appends:?}: {found:?}");
    }
    Ok(())
}

pub(crate) async fn clients_are_served_over_tls() -> Outcome {
    let (stage, authority) = (Stage::start().await?, authority()?);
    let front = with_tls(&stage, &authority, false).await?;
    let url = |host: &str| format!("kafkas://{host}:{}", front.port);
    trusting(&authority).connect(&url("localhost")).await?;
    works(&trusting(&authority).connect(&url("127.0.0.1")).await?).await
}

pub(crate) async fn a_client_shows_its_certificate() -> Outcome {
    let (stage, authority) = (Stage::start().await?, authority()?);
    let front = with_tls(&stage, &authority, true).await?;
    let url = format!("kafkas://127.0.0.1:{}", front.port);
    let showing = trusting(&authority)
        .setting("ssl.certificate.pem", authority.client.certificate.as_str())
        .setting("ssl.key.pem", authority.client.key.as_str());
    works(&showing.connect(&url).await?).await?;
    let without = trusting(&authority).timeout(IMPATIENT).connect(&url).await;
    // The broker says so after the client takes the connection for open.
    assert_error!(
        without,
        Error::Unavailable { .. },
        "certificate required",
        "ssl.certificate.location"
    );
    Ok(())
}

pub(crate) async fn a_broker_of_an_unknown_authority_or_name_is_refused() -> Outcome {
    let (stage, known, unknown) = (Stage::start().await?, authority()?, authority()?);
    let elsewhere = Authority::new(&["elsewhere.example"])?;
    for (authority, trusted) in [(&unknown, &known), (&elsewhere, &elsewhere)] {
        let front = with_tls(&stage, authority, false).await?;
        let url = format!("kafkas://127.0.0.1:{}", front.port);
        assert_error!(
            trusting(trusted).timeout(IMPATIENT).connect(&url).await,
            Error::Failed { .. },
            "certificate verify failed",
            "ssl.ca.location"
        );
    }
    Ok(())
}

pub(crate) async fn a_password_is_checked_and_never_shown() -> Outcome {
    let authority = authority()?;
    for tls in [None, Some(tls(&authority, false)?)] {
        let scheme = if tls.is_some() { "kafkas" } else { "kafka" };
        let user = Some(("shop", "se@cret"));
        let stage = Stage::start().await?;
        let front = Front::start(stage.server.port(), Rules { tls, user }).await?;
        let url = |user: &str| format!("{scheme}://{user}127.0.0.1:{}", front.port);
        works(&trusting(&authority).connect(&url("shop:se%40cret@")).await?).await?;
        let impatient = trusting(&authority).timeout(IMPATIENT);
        for (user, text) in [
            ("shop:hunter2@", "check the URL's user and password"),
            ("shop:hunter2@", "Invalid username or password"),
            ("", "user:password@"),
        ] {
            let Err(error) = impatient.clone().connect(&url(user)).await else {
                return Err(format!("{user} is accepted").into());
            };
            let shown = format!("{error} {error:?}");
            ensure!(shown.contains(text) && !shown.contains("hunter2"), "{shown}");
        }
        let other = impatient.setting("sasl.mechanism", "SCRAM-SHA-256");
        assert_error!(
            other.connect(&url("shop:se%40cret@")).await,
            Error::Failed { .. },
            "SCRAM-SHA-256",
            "sasl.mechanism"
        );
    }
    Ok(())
}

pub(crate) async fn a_port_with_tls_and_one_without_are_told_apart() -> Outcome {
    let (stage, authority) = (Stage::start().await?, authority()?);
    let front = with_tls(&stage, &authority, false).await?;
    let impatient = || trusting(&authority).timeout(IMPATIENT);
    assert_error!(
        impatient().connect(&format!("kafka://127.0.0.1:{}", front.port)).await,
        Error::Unavailable { .. },
        "kafkas://"
    );
    assert_error!(
        impatient()
            .connect(&stage.server.url().replace("kafka:", "kafkas:"))
            .await,
        Error::Unavailable { .. },
        "kafka://"
    );
    Ok(())
}
