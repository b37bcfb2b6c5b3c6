//! No message, event or debug output contains a password or private key.

use std::{
    fmt::{self, Write as _},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use essentially_once::{Consumer, ConsumerId, Error, Log as _, OffsetStore as _, backend::Source};
use essentially_once_postgres::{LogOptions, PgOptions, Retention};
use essentially_once_testkit::Ledger;
use test_servers::{Authority, PostgresServer};
use tracing::{Event, Metadata, Subscriber, field, span};

use crate::{
    common::{Outcome, all_text_of, ensure, message},
    tls::{authority, tls_url, trusting, with_tls},
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
        self.note(format_args!("{}", all_text_of(&error)));
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
    let authority = authority()?;
    let server = with_tls(&authority).password("of-the-administrator").start()?;
    server.run_sql(&format!("CREATE ROLE {USER} LOGIN SUPERUSER PASSWORD '{SECRET}'"))?;
    connections_that_fail(&said, &authority, &server).await?;
    requests_that_fail(&said, &authority, &server).await?;
    let key: Vec<&str> = authority.client.key.lines().collect();
    for secret in [SECRET, key[1]] {
        ensure!(!said.text().contains(secret), "{secret} was shown: {}", said.text());
    }
    // The recorded text covers the places where a secret could have appeared.
    for part in [
        "going back to the stored position",
        "authentication failed",
        "permission denied",
        "PgTx",
        "stopped by an error",
    ] {
        ensure!(said.text().contains(part), "nobody said {part:?}: {}", said.text());
    }
    Ok(())
}

async fn connections_that_fail(said: &Said, authority: &Authority, server: &PostgresServer) -> Outcome {
    let port = server.port();
    // No server listens on port 1, and 99999 is not a port.
    for url in [
        format!("postgres://{USER}:{SECRET}2@127.0.0.1:{port}/postgres"),
        format!("postgres://{USER}:{SECRET}@127.0.0.1:{port}/no-database"),
        format!("postgres://{USER}:{SECRET}@127.0.0.1:{port}/postgres?sslmode=require"),
        format!("postgres://{USER}:{SECRET}@127.0.0.1:1/postgres"),
        format!("postgres://{USER}:{SECRET}@127.0.0.1:99999/postgres"),
        format!("postgres://{USER}:{SECRET}@no-such-host.invalid/postgres"),
        format!("postgres://{USER}:{SECRET}@127.0.0.1:{port}/postgres?sslmode={SECRET}"),
        format!("postgres://{USER}:{SECRET}@127.0.0.1:{port}/postgres?{SECRET}=1"),
        format!("postgres:///postgres?host=/nowhere&user={USER}&password={SECRET}"),
        format!("postgres://127.0.0.1:{port}/postgres?user={USER}&password={SECRET}2"),
        format!("http://{USER}:{SECRET}@127.0.0.1"),
        format!("host=127.0.0.1 user={USER} password={SECRET}"),
        format!("{USER}:{SECRET}"),
    ] {
        let options = PgOptions::new().timeout(Duration::from_secs(20));
        said.show(&options);
        said.failed(options.connect(&url).await)
            .map_err(|error| format!("{url}: {error}"))?;
    }
    let wrong = PgOptions::new()
        .add_root_certificate(SECRET)
        .client_certificate(SECRET)
        .client_key(authority.client.key.as_str());
    said.show(&wrong);
    said.failed(wrong.connect(&tls_url(server)).await)?;
    Ok(())
}

async fn requests_that_fail(said: &Said, authority: &Authority, server: &PostgresServer) -> Outcome {
    let client = &authority.client;
    let options = trusting(authority)
        .client_certificate(client.certificate.as_str())
        .client_key(client.key.as_str());
    said.show(&options);
    let (port, id) = (server.port(), ConsumerId::new("shipping")?);
    let url = format!("postgres://{USER}:{SECRET}@127.0.0.1:{port}/postgres?sslmode=require");
    let pg = options.connect(&url).await?;
    let kept = LogOptions::new().retention(Retention::new().max_records(5));
    said.show(&kept);
    let (log, store) = (pg.log_with("orders", kept).await?, pg.store());
    log.append(&[message(1)]).await?;
    let mut tx = store.begin(&id).await?;
    tx.execute("SELECT 1", &[]).await?;
    said.note(format_args!("{pg:?} {log:?} {store:?} {tx:?}"));
    said.failed(tx.execute("nonsense", &[]).await)?;
    said.note(format_args!("{tx:?}"));
    server.run_sql(&format!(
        "ALTER ROLE {USER} NOSUPERUSER; REASSIGN OWNED BY {USER} TO postgres"
    ))?;
    said.failed(log.append(&[message(2)]).await)?;
    said.failed(pg.log("another").await)?;
    let consumer = || Consumer::essentially_once(id.clone(), log.clone(), store.clone(), Ledger).restart_limit(2);
    said.failed(consumer().run().await)?;
    server.run_sql(&format!(
        "ALTER ROLE {USER} NOLOGIN; SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{USER}'"
    ))?;
    said.failed(consumer().run().await)?;
    said.failed(log.append(&[message(2)]).await)?;
    server.kill()?;
    said.failed(consumer().run().await)?;
    said.failed(store.position(&id).await)?;
    Ok(())
}
