//! TLS, users, databases and sockets, and no secret in any text.

#[path = "../common/mod.rs"]
mod common;
mod secrets;

use std::{fs, path::PathBuf, process::ExitCode, time::Duration};

use essentially_once::{Consumer, ConsumerId, Error, Log as _, Offset, backend::Source};
use essentially_once_redis::{Redis, RedisOptions};
use essentially_once_testkit::Ledger;
use tempfile::TempDir;
use test_servers::{Pair, RedisBuilder, RedisServer};
use tokio::time::timeout;

use common::{LIMIT, Outcome, cases, ensure, judge, run_cases, send};
use secrets::no_secret_is_ever_shown;

const MESSAGES: u64 = 10;

fn main() -> ExitCode {
    run_cases(
        missing(),
        LIMIT,
        cases![
            clients_with_a_certificate_are_served,
            clients_without_a_certificate_are_refused,
            another_authority_is_not_trusted,
            a_server_without_tls_is_an_error,
            user_database_and_resp3_over_tls,
            a_socket_is_served,
            a_dropped_reader_closes_its_connection,
            no_secret_is_ever_shown,
        ],
    )
}

/// Why no server with TLS can start here. Any other failure is one of the cases.
fn missing() -> Option<String> {
    let program = match test_servers::redis_server() {
        Ok(program) => program,
        Err(why) => return Some(why),
    };
    let started = Authority::new().and_then(|keys| keys.server()?.start());
    let error = started.err()?.to_string();
    let lacks_tls = error.contains("Failed finding TLS support") || error.contains("Bad directive");
    lacks_tls.then(|| format!("{} was built without TLS", program.display()))
}

/// A certificate authority, and the files for a server.
struct Authority {
    keys: test_servers::Authority,
    folder: TempDir,
}

impl Authority {
    fn new() -> Result<Self, Source> {
        Ok(Self {
            keys: test_servers::Authority::new(&["127.0.0.1", "localhost"])?,
            folder: TempDir::new()?,
        })
    }

    /// A server with TLS.
    fn server(&self) -> Result<RedisBuilder, Source> {
        let file = |name: &str, text: &str| {
            let path: PathBuf = self.folder.path().join(name);
            fs::write(&path, text)?;
            Ok::<_, Source>(path)
        };
        let certificate = file("server.pem", &self.keys.server.certificate)?;
        let key = file("server.key", &self.keys.server.key)?;
        let root = file("root.pem", &self.keys.root)?;
        Ok(RedisServer::durable().tls(&certificate, &key, &root))
    }

    fn trusted(&self) -> RedisOptions {
        RedisOptions::new().add_root_certificate(self.keys.root.as_str())
    }
}

fn tls_url(server: &RedisServer) -> Result<String, Source> {
    server.tls_url().ok_or_else(|| "the server has no TLS".into())
}

/// Appends, consumes and judges.
async fn works(redis: &Redis) -> Outcome {
    let (log, store, id) = (redis.log("orders").await?, redis.store(), ConsumerId::new("shipping")?);
    send(&log, 0..MESSAGES).await?;
    let consumer = Consumer::essentially_once(id.clone(), log.clone(), store.clone(), Ledger).max_batch(3);
    let report = consumer.run_until_caught_up().await?;
    ensure!(report.handled == MESSAGES && report.restarts == 0, "{report}");
    judge(&log, &store, &id, MESSAGES).await
}

/// The text of a refusal.
async fn refusal(options: RedisOptions, url: &str) -> Result<String, Source> {
    match options.timeout(Duration::from_secs(5)).connect(url).await {
        Err(error @ (Error::Unavailable { .. } | Error::Failed { .. } | Error::InvalidSetting { .. })) => {
            Ok(error.to_string())
        }
        other => Err(format!("it should be refused: {other:?}").into()),
    }
}

async fn clients_with_a_certificate_are_served() -> Outcome {
    let authority = Authority::new()?;
    let server = authority
        .server()?
        .with(&[("tls-auth-clients", "yes"), ("port", "0")])
        .start()?;
    let Pair { certificate, key } = &authority.keys.client;
    let options = authority
        .trusted()
        .client_certificate(certificate.as_str())
        .client_key(key.as_str());
    works(&options.connect(&tls_url(&server)?).await?).await
}

async fn clients_without_a_certificate_are_refused() -> Outcome {
    let authority = Authority::new()?;
    let server = authority.server()?.with(&[("tls-auth-clients", "yes")]).start()?;
    let text = refusal(authority.trusted(), &tls_url(&server)?).await?;
    ensure!(text.contains("127.0.0.1"), "{text}");
    let stranger = Authority::new()?.keys.client;
    let options = authority
        .trusted()
        .client_certificate(stranger.certificate)
        .client_key(stranger.key);
    refusal(options, &tls_url(&server)?).await?;
    Ok(())
}

async fn another_authority_is_not_trusted() -> Outcome {
    let authority = Authority::new()?;
    let server = authority.server()?.start()?;
    let url = tls_url(&server)?;
    for options in [RedisOptions::new(), Authority::new()?.trusted()] {
        let text = refusal(options, &url).await?;
        ensure!(text.contains("certificate") && text.contains("127.0.0.1"), "{text}");
        ensure!(!text.contains("temporarily"), "trying again does not help: {text}");
    }
    let garbage = RedisOptions::new().add_root_certificate("garbage");
    let text = refusal(garbage, &url).await?;
    ensure!(text.contains("no certificate in PEM format"), "{text}");
    works(
        &authority
            .trusted()
            .connect(&url.replace("127.0.0.1", "localhost"))
            .await?,
    )
    .await
}

async fn a_server_without_tls_is_an_error() -> Outcome {
    let authority = Authority::new()?;
    let server = authority.server()?.start()?;
    let text = refusal(authority.trusted(), &server.url().replace("redis:", "rediss:")).await?;
    ensure!(text.contains("127.0.0.1") && text.contains("use redis://"), "{text}");
    let text = refusal(RedisOptions::new(), &tls_url(&server)?.replace("rediss:", "redis:")).await?;
    ensure!(text.contains("127.0.0.1") && text.contains("use rediss://"), "{text}");
    // Certificates require a URL with TLS.
    let plain = authority.trusted().connect(&server.url()).await;
    ensure!(matches!(plain, Err(Error::InvalidSetting { .. })), "{plain:?}");
    Ok(())
}

async fn user_database_and_resp3_over_tls() -> Outcome {
    let authority = Authority::new()?;
    let server = authority.server()?.start()?;
    server.command(&["ACL", "SETUSER", "default", "off"])?;
    server.command(&["ACL", "SETUSER", "shop", "on", ">secret", "~*", "&*", "+@all"])?;
    let url = tls_url(&server)?.replace("127.0.0.1", "shop:secret@127.0.0.1");
    let redis = authority.trusted().connect(&format!("{url}/2?protocol=resp3")).await?;
    works(&redis).await?;
    let keyspace = server.command(&["INFO", "keyspace"])?;
    ensure!(
        keyspace.line("db2").is_some() && keyspace.line("db0").is_none(),
        "{keyspace:?}"
    );
    let connected = redis.log("orders").await?;
    let clients = server.command(&["CLIENT", "LIST"])?;
    drop(connected);
    let ours = clients.text().lines().filter(|line| line.contains("user=shop"));
    ensure!(
        ours.clone().count() > 0 && ours.clone().all(|line| line.contains("resp=3")),
        "{clients:?}"
    );
    let text = refusal(authority.trusted(), &url.replace("secret", "other")).await?;
    ensure!(
        text.contains("WRONGPASS") && text.contains("check the URL's user and password"),
        "{text}"
    );
    Ok(())
}

async fn a_dropped_reader_closes_its_connection() -> Outcome {
    let authority = Authority::new()?;
    let server = authority.server()?.start()?;
    let log = authority
        .trusted()
        .connect(&tls_url(&server)?)
        .await?
        .log("orders")
        .await?;
    let mut reader = log.read(Offset::ZERO).await?;
    let waiting = timeout(Duration::from_millis(200), reader.next(1)).await;
    ensure!(waiting.is_err(), "{waiting:?}");
    // Only the reader is blocked, and the server would hold back its reply for two seconds.
    let blocked = || -> Result<bool, Source> {
        let info = server.command(&["INFO", "clients"])?;
        Ok(info.line("blocked_clients") == Some("1"))
    };
    ensure!(blocked()?, "the reader does not wait");
    drop(reader);
    let closed = timeout(Duration::from_secs(1), async {
        while blocked()? {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok::<_, Source>(())
    });
    closed.await?
}

async fn a_socket_is_served() -> Outcome {
    let server = RedisServer::durable().with(&[("port", "0")]).start()?;
    let socket = server.socket().display().to_string();
    works(&Redis::connect(&format!("redis+unix://{socket}")).await?).await?;
    works_on_database_3(&server, &socket).await?;
    let missing = refusal(RedisOptions::new(), "redis+unix:///nowhere/redis.sock").await?;
    ensure!(missing.contains("/nowhere/redis.sock"), "{missing}");
    Ok(())
}

async fn works_on_database_3(server: &RedisServer, socket: &str) -> Outcome {
    works(&Redis::connect(&format!("unix://{socket}?db=3&protocol=resp3")).await?).await?;
    let keyspace = server.command(&["INFO", "keyspace"])?;
    ensure!(keyspace.line("db3").is_some(), "{keyspace:?}");
    Ok(())
}
