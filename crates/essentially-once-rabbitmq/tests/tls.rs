//! TLS with certificates that are trusted, missing, or another's, and no password in any text.

mod common;

use std::process::ExitCode;

use essentially_once::{ConsumerId, Error, backend::Source};
use essentially_once_rabbitmq::RabbitOptions;
use test_servers::{Pair, RabbitNode};
use tokio::{task::block_in_place, time::timeout};

use common::{LIMIT, Outcome, Running, cases, ensure, fresh, insist, judge, options, run, send};

const PASSWORD: &str = "correct-horse-battery";
const MESSAGES: u64 = 10;

fn main() -> ExitCode {
    run(cases![
        the_broker_must_have_a_trusted_certificate,
        a_certificate_can_be_demanded_of_clients,
    ])
}

/// An authority whose certificates name brokers by address, not by name.
struct Authority {
    keys: test_servers::Authority,
}

impl Authority {
    fn new() -> Result<Self, Source> {
        let keys = test_servers::Authority::new(&["127.0.0.1"])?;
        Ok(Self { keys })
    }

    fn trusted(&self) -> RabbitOptions {
        options().add_root_certificate(self.keys.root.as_str())
    }

    fn start(&self, settings: &str) -> Result<RabbitNode, Source> {
        let Pair { certificate, key } = &self.keys.server;
        block_in_place(|| RabbitNode::start_tls(certificate, key, &self.keys.root, settings))
    }
}

fn tls_url(node: &RabbitNode) -> Result<String, Source> {
    node.tls_url().ok_or_else(|| "the node has no TLS".into())
}

/// Appends, consumes and judges.
async fn works(options: RabbitOptions, url: &str) -> Outcome {
    let (name, rabbit) = (fresh("orders"), insist(|| options.clone().connect(url)).await?);
    let (log, consumer) = (rabbit.log(&name).await?, ConsumerId::new(&name)?);
    send(&log, 0..MESSAGES).await?;
    let mut running = Running::start(&consumer, log, rabbit.store());
    running.handles(MESSAGES).await?;
    running.stop().await?;
    judge(&rabbit, &name, &consumer, MESSAGES).await
}

/// The text of a refusal, which must be lasting and must not contain the password.
async fn refusal(options: RabbitOptions, url: &str) -> Result<String, Source> {
    let url = url.replace("guest:guest@", &format!("guest:{PASSWORD}@"));
    // If the broker hangs up, its reason may be lost on the way.
    match timeout(LIMIT, insist(|| options.clone().connect(&url))).await {
        Ok(Err(error @ Error::Failed { .. })) => {
            let mut said = format!("{error} {error:?} {options:?}");
            let mut cause = error.cause().map(|cause| cause as &dyn std::error::Error);
            while let Some(error) = cause {
                said += &format!("{error} {error:?}");
                cause = error.source();
            }
            ensure!(!said.contains(PASSWORD) && !said.contains("guest"), "{said}");
            Ok(error.to_string())
        }
        Ok(other) => Err(format!("it should be refused: {other:?}").into()),
        Err(_) => Err("it is tried forever".into()),
    }
}

/// A bad certificate is refused before anything is sent, and no secret is shown.
async fn refuses_setting(wrong: &str, options: RabbitOptions, url: &str) -> Outcome {
    let url = url.replace("guest:guest@", &format!("guest:{PASSWORD}@"));
    let refused = options.clone().connect(&url).await;
    let is_refused = matches!(&refused, Err(Error::InvalidSetting { setting, .. }) if *setting == wrong);
    let said = format!("{refused:?} {options:?}");
    ensure!(is_refused, "{said}");
    let secrets = [PASSWORD, "PRIVATE KEY", "garbage"];
    ensure!(!secrets.iter().any(|secret| said.contains(secret)), "{said}");
    Ok(())
}

async fn the_broker_must_have_a_trusted_certificate() -> Outcome {
    let authority = Authority::new()?;
    let node = authority.start("ssl_options.fail_if_no_peer_cert = false")?;
    let url = tls_url(&node)?;
    works(authority.trusted(), &url).await?;
    ensure!(
        rustls::crypto::CryptoProvider::get_default().is_none(),
        "the library installed a provider for the whole process"
    );
    for options in [options(), Authority::new()?.trusted()] {
        let text = refusal(options, &url).await?;
        ensure!(
            text.contains("root_certificate") && text.contains("127.0.0.1"),
            "{text}"
        );
    }
    let garbage = options().add_root_certificate("garbage");
    refuses_setting("add_root_certificate", garbage, &url).await?;
    // The certificate is trusted but names another host.
    let text = refusal(authority.trusted(), &url.replace("127.0.0.1", "localhost")).await?;
    ensure!(text.contains("name the broker in the URL"), "{text}");
    let plain = node.url().replace("amqp:", "amqps:");
    let text = refusal(authority.trusted(), &plain).await?;
    ensure!(text.contains("does not speak TLS"), "{text}");
    // TLS does not change the meaning of a wrong password.
    let text = refusal(authority.trusted(), &url).await?;
    ensure!(text.contains("check the URL's user, password"), "{text}");
    // Certificates require TLS.
    let plain = authority.trusted().connect(&node.url()).await;
    ensure!(matches!(plain, Err(Error::InvalidSetting { .. })), "{plain:?}");
    Ok(())
}

async fn a_certificate_can_be_demanded_of_clients() -> Outcome {
    let authority = Authority::new()?;
    let node = authority.start("ssl_options.fail_if_no_peer_cert = true")?;
    let url = tls_url(&node)?;
    let shows = |certificate: &str, key: &str| authority.trusted().client_certificate(certificate).client_key(key);
    let (client, stranger) = (&authority.keys.client, Authority::new()?.keys.client);
    works(shows(&client.certificate, &client.key), &url).await?;
    for options in [authority.trusted(), shows(&stranger.certificate, &stranger.key)] {
        let text = refusal(options, &url).await?;
        ensure!(
            text.contains("client_certificate") && text.contains("127.0.0.1"),
            "{text}"
        );
    }
    for (setting, options) in [
        ("client_certificate", shows(&client.certificate, &stranger.key)),
        ("client_key", shows(&client.certificate, "garbage")),
        ("client_certificate", shows("garbage", &client.key)),
        (
            "client_certificate",
            authority.trusted().client_certificate(client.certificate.as_str()),
        ),
        ("client_key", authority.trusted().client_key(client.key.as_str())),
    ] {
        refuses_setting(setting, options, &url).await?;
    }
    Ok(())
}
