//! No message, event or debug output contains a password or private key.

use std::{
    fmt::{self, Write as _},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use essentially_once::{Consumer, ConsumerId, Error, Log as _, OffsetStore as _, backend::Source};
use essentially_once_redis::{LogOptions, RedisOptions, Retention, redis::Cmd};
use essentially_once_testkit::Ledger;
use test_servers::RedisServer;
use tracing::{Event, Metadata, Subscriber, field, span};

use crate::{
    Authority,
    common::{Outcome, ensure, message},
    tls_url,
};

const USER: &str = "intendant";
const SECRET: &str = "correct-horse-battery";

/// All text that was printed or logged.
#[derive(Clone, Default)]
struct Said(Arc<Mutex<String>>);

impl Said {
    fn note(&self, text: fmt::Arguments<'_>) {
        let mut said = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // A string takes everything.
        let _ = writeln!(said, "{text}");
    }

    fn show(&self, value: &impl fmt::Debug) {
        self.note(format_args!("{value:?} {value:#?}"));
    }

    fn failed<T>(&self, result: Result<T, Error>) -> Result<Error, Source> {
        let error = result.err().ok_or("it should have failed")?;
        self.note(format_args!("{error} {error:?} {error:#?}"));
        let mut cause = error.cause().map(|cause| cause as &dyn std::error::Error);
        while let Some(source) = cause {
            self.note(format_args!("{source} {source:?}"));
            cause = source.source();
        }
        Ok(error)
    }

    fn text(&self) -> String {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl field::Visit for &Said {
    fn record_debug(&mut self, field: &field::Field, value: &dyn fmt::Debug) {
        self.note(format_args!("{field}={value:?}"));
    }
}

impl Subscriber for Said {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn new_span(&self, span: &span::Attributes<'_>) -> span::Id {
        span.record(&mut &*self);
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, values: &span::Record<'_>) {
        values.record(&mut &*self);
    }

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn event(&self, event: &Event<'_>) {
        event.record(&mut &*self);
    }

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}

pub(crate) async fn no_secret_is_ever_shown() -> Outcome {
    let said = Said::default();
    // For the whole process, since the library's tasks run on other threads.
    tracing::subscriber::set_global_default(said.clone())?;
    let authority = Authority::new()?;
    let server = authority.server()?.start()?;
    server.command(&["ACL", "SETUSER", USER, "on", &format!(">{SECRET}"), "~*", "&*", "+@all"])?;
    connections_that_fail(&said, &authority, &server).await?;
    for name in [USER, SECRET] {
        ensure!(!said.text().contains(name), "{name} was shown: {}", said.text());
    }
    requests_that_fail(&said, &authority, &server).await?;
    let key: Vec<&str> = authority.keys.client.key.lines().collect();
    for secret in [SECRET, key[1]] {
        ensure!(!said.text().contains(secret), "{secret} was shown: {}", said.text());
    }
    // The recorded text covers the places where a secret could have appeared.
    for part in [
        "going back to the stored position",
        "authentication failed",
        "NOPERM",
        "RedisTx",
        "stopped by an error",
    ] {
        ensure!(said.text().contains(part), "nobody said {part:?}: {}", said.text());
    }
    Ok(())
}

async fn connections_that_fail(said: &Said, authority: &Authority, server: &RedisServer) -> Outcome {
    let (plain, tls) = (server.port(), tls_url(server)?);
    let tls = tls.trim_start_matches("rediss://");
    // No server listens on port 1, and 99999 is not a port.
    for url in [
        format!("redis://{USER}:{SECRET}2@127.0.0.1:{plain}"),
        format!("rediss://{USER}:{SECRET}@127.0.0.1:{plain}"),
        format!("rediss://{USER}:{SECRET}@{tls}"),
        format!("redis://{USER}:{SECRET}@127.0.0.1:1"),
        format!("redis://{USER}:{SECRET}@127.0.0.1:99999"),
        format!("redis://{USER}:{SECRET}@no-such-host.invalid"),
        format!("redis://{USER}:{SECRET}@127.0.0.1:{plain}/no-database"),
        format!("redis://{USER}:{SECRET}@127.0.0.1:{plain}/99"),
        format!("redis+unix:///nowhere?user={USER}&pass={SECRET}"),
        format!("http://{USER}:{SECRET}@127.0.0.1"),
        format!("{USER}:{SECRET}"),
    ] {
        let options = RedisOptions::new().timeout(Duration::from_secs(5));
        said.show(&options);
        said.failed(options.connect(&url).await)
            .map_err(|error| format!("{url}: {error}"))?;
    }
    let silent = format!("redis://{USER}:{SECRET}@127.0.0.1:1");
    let bad = format!("redis://{USER}:{SECRET}@:bad");
    for others in [&silent, &bad] {
        let nodes = RedisOptions::new().other_nodes([others]);
        let sentinels = RedisOptions::new().sentinel("shop", [others]);
        for options in [nodes, sentinels] {
            said.show(&options);
            said.failed(options.connect(&silent).await)?;
        }
    }
    let wrong = RedisOptions::new()
        .add_root_certificate(SECRET)
        .client_certificate(SECRET)
        .client_key(authority.keys.client.key.as_str());
    said.show(&wrong);
    said.failed(wrong.connect(&format!("rediss://{USER}:{SECRET}@{tls}")).await)?;
    Ok(())
}

async fn requests_that_fail(said: &Said, authority: &Authority, server: &RedisServer) -> Outcome {
    let client = &authority.keys.client;
    let options = authority
        .trusted()
        .client_certificate(client.certificate.as_str())
        .client_key(client.key.as_str());
    said.show(&options);
    let url = tls_url(server)?.replace("rediss://", &format!("rediss://{USER}:{SECRET}@"));
    let redis = options.timeout(Duration::from_secs(60)).connect(&url).await?;
    let kept = LogOptions::new().retention(Retention::new().max_records(5));
    said.show(&kept);
    let (log, store, id) = (
        redis.log_with("orders", kept).await?,
        redis.store(),
        ConsumerId::new("shipping")?,
    );
    log.append(&[message(1)]).await?;
    let mut tx = store.begin(&id).await?;
    tx.command(Cmd::hincr("freight", "Brazil", 32)).await?;
    said.note(format_args!("{redis:?} {log:?} {store:?} {tx:?}"));
    server.command(&["ACL", "SETUSER", USER, "-@write"])?;
    said.failed(log.append(&[message(2)]).await)?;
    said.failed(
        redis
            .log("another")
            .await
            .and_then(|_| Err::<(), _>(Error::failed("open", "with a warning"))),
    )?;
    let consumer = || Consumer::essentially_once(id.clone(), log.clone(), store.clone(), Ledger).restart_limit(2);
    said.failed(consumer().run().await)?;
    // Deleting the user closes its connections.
    server.command(&["ACL", "DELUSER", USER])?;
    said.failed(consumer().run().await)?;
    said.failed(log.append(&[message(2)]).await)?;
    server.kill()?;
    said.failed(consumer().run().await)?;
    said.failed(store.position(&id).await)?;
    Ok(())
}
