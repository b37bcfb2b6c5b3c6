//! The shop's table in a PostgreSQL database.

use std::{str::FromStr as _, time::Duration};

use async_trait::async_trait;
use essentially_once::{ConsumerId, Error, HandlerError, NewRecord, Outbox as _};
use essentially_once_postgres::{
    PgTx,
    tokio_postgres::{
        Client, Config, NoTls, Statement,
        config::{Host, SslMode, TargetSessionAttrs},
    },
};

use super::{Shipment, Shop};
use crate::{
    Failure,
    settings::{OUTBOX, Settings},
};

/// In the transaction that commits the position. The insert goes out without waiting for an answer,
/// and the commit fails if it does.
#[async_trait]
impl Shop for PgTx {
    async fn ship(&mut self, Shipment { number, order }: &Shipment<'_>) -> Result<(), HandlerError> {
        let (insert, number, id) = (insert(self.consumer()), i64::from(*number), text(&order.id));
        let queued = self.queue(&insert, &[&number, &id, &order.freight]).await;
        queued.map_err(HandlerError::fatal)
    }

    async fn report(&mut self, record: NewRecord) -> Result<(), HandlerError> {
        Ok(self.send(OUTBOX, record).await?)
    }
}

/// The shop's own connection, on which every statement commits on its own, independently of the
/// position.
pub(crate) struct PostgresShop {
    client: Client,
    insert: Statement,
}

#[async_trait]
impl Shop for PostgresShop {
    async fn ship(&mut self, Shipment { number, order }: &Shipment<'_>) -> Result<(), HandlerError> {
        let (number, id) = (i64::from(*number), text(&order.id));
        let inserted = self.client.execute(&self.insert, &[&number, &id, &order.freight]).await;
        inserted
            .map(|_| ())
            .map_err(|error| HandlerError::fatal(Error::failed("write a shipment", error)))
    }

    async fn report(&mut self, _: NewRecord) -> Result<(), HandlerError> {
        Ok(())
    }
}

impl PostgresShop {
    pub(crate) async fn connect(url: &str, consumer: &ConsumerId) -> Result<Self, Failure> {
        let client = connect(url).await?;
        let insert = client.prepare(&insert(consumer)).await;
        Ok(Self {
            insert: insert.map_err(|error| Error::failed("prepare to write shipments", error))?,
            client,
        })
    }
}

/// Opens a connection, and drives it on this runtime.
pub(crate) async fn connect(url: &str) -> Result<Client, Error> {
    const LIMIT: Duration = Duration::from_secs(10);
    let invalid = |reason: &str| Error::InvalidSetting {
        setting: "PostgreSQL URL",
        reason: format!("{reason}; expected postgres://user:password@host:port/database"),
    };
    // The library's own message may quote the password.
    let mut config = Config::from_str(url).map_err(|_| invalid("it cannot be parsed"))?;
    if config.get_ssl_mode() == SslMode::Require {
        return Err(invalid("this program's own connections do not use TLS"));
    }
    config
        .connect_timeout(LIMIT)
        .target_session_attrs(TargetSessionAttrs::ReadWrite);
    let connected = config.connect(NoTls).await;
    let action = format!("connect to PostgreSQL {}", hosts(&config));
    let (client, connection) = connected.map_err(|error| Error::unavailable(action, error))?;
    // An error also fails the statement that waits for its answer.
    tokio::spawn(connection);
    Ok(client)
}

fn hosts(config: &Config) -> String {
    let hosts = config.get_hosts().iter().zip(config.get_ports());
    let hosts = hosts.map(|(host, port)| match host {
        Host::Tcp(host) => format!("{host}:{port}"),
        #[cfg(unix)]
        Host::Unix(path) => path.display().to_string(),
    });
    hosts.collect::<Vec<_>>().join(",")
}

/// The schema of the shop's table. The library's tables are in another one, [`Settings::schema`].
fn schema(consumer: &ConsumerId) -> String {
    consumer.to_string().replace('-', "_")
}

/// The table has no unique constraint, which would hide doubled shipments.
pub(super) async fn create_table(url: &str, consumer: &ConsumerId) -> Result<(), Failure> {
    let schema = schema(consumer);
    let create = format!(
        "CREATE SCHEMA {schema};
         CREATE TABLE {schema}.shipments (
             place bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
             order_number bigint NOT NULL,
             order_id text NOT NULL,
             freight double precision NOT NULL
         )"
    );
    let created = connect(url).await?.batch_execute(&create).await;
    Ok(created.map_err(|error| Error::failed("create the table of shipments", error))?)
}

fn insert(consumer: &ConsumerId) -> String {
    let schema = schema(consumer);
    format!("INSERT INTO {schema}.shipments (order_number, order_id, freight) VALUES ($1, $2, $3)")
}

/// PostgreSQL's text cannot hold a zero character.
fn text(id: &str) -> String {
    id.replace('\0', "\u{fffd}")
}

/// The numbers of the shipped orders, in the order of the shipments.
pub(super) async fn list(url: &str, consumer: &ConsumerId) -> Result<Vec<u32>, Failure> {
    let select = format!("SELECT order_number FROM {}.shipments ORDER BY place", schema(consumer));
    let rows = connect(url).await?.query(&select, &[]).await;
    let rows = rows.map_err(|error| Error::failed("read the shipments", error))?;
    rows.iter()
        .map(|row| Ok(u32::try_from(row.get::<_, i64>(0))?))
        .collect()
}

/// Deletes everything of a run.
pub(super) async fn remove(url: &str, settings: &Settings) -> Result<(), Failure> {
    let schemas = [schema(&settings.shipping()?), settings.schema()].join(", ");
    let drop = format!("DROP SCHEMA IF EXISTS {schemas} CASCADE");
    let dropped = connect(url).await?.batch_execute(&drop).await;
    Ok(dropped.map_err(|error| Error::failed("drop the schemas of this run", error))?)
}
