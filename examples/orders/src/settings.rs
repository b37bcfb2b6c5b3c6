//! Where everything is kept and what it is called.

use std::{fmt, path::PathBuf, sync::Arc};

use essentially_once::{
    ConsumerId, Error, Log, Record,
    signed::{Keys, Signed, Signer},
};
use essentially_once_sqlite::Sqlite;
use serde::{Deserialize, Serialize};

use crate::{Failure, bus::Bus, delivery::Delivery, order::Format, place::Place};

/// The settings that all four processes share.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Settings {
    pub(crate) delivery: Delivery,
    /// Other programs and earlier runs use the same servers, so all names there contain this one.
    pub(crate) run: String,
    pub(crate) bus: Bus,
    /// Where the shipping service keeps its shipments, its position and its outbox.
    pub(crate) store: Place,
    /// The folder of the SQLite files. Each service has one, and so does a bus on SQLite.
    pub(crate) folder: PathBuf,
    /// The file of the keys that sign what is sent over the bus.
    pub(crate) keys: PathBuf,
    pub(crate) format: Format,
    /// The most records that one commit covers.
    pub(crate) max_batch: usize,
}

/// A log on the bus.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Topic {
    /// From the order service to the shipping service.
    Orders,
    /// From the shipping service to the order service.
    Progress,
}

impl Topic {
    pub(crate) const ALL: [Self; 2] = [Self::Orders, Self::Progress];
}

impl fmt::Display for Topic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Orders => "orders",
            Self::Progress => "progress",
        })
    }
}

/// The outbox of either service.
pub(crate) const OUTBOX: &str = "outbox";

impl Settings {
    /// Opens a log of the bus without signatures, and creates it if it is missing.
    pub(crate) async fn bus(&self, topic: Topic) -> Result<Arc<dyn Log>, Error> {
        self.bus.open(topic, self).await
    }

    /// Signs what is appended to a log of the bus, and verifies what is read.
    pub(crate) fn signed<L: Log>(&self, topic: Topic, bus: L) -> Result<Signed<L>, Error> {
        let keys = Keys::from_file(&self.keys)?;
        Ok(Signed::new(bus, Signer::new(topic.to_string(), keys)?))
    }

    /// Opens the file of the order service, and creates it if it is missing.
    pub(crate) async fn order_database(&self) -> Result<Sqlite, Error> {
        Sqlite::open(self.file("orders.db")).await
    }

    /// Opens the file of a shipping service on SQLite, and creates it if it is missing.
    pub(crate) async fn shipping_database(&self) -> Result<Sqlite, Error> {
        Sqlite::open(self.file("shipping.db")).await
    }

    /// Opens the schema of this run in a PostgreSQL database, and creates it if it is missing.
    #[cfg(feature = "postgres")]
    pub(crate) async fn postgres(&self, url: &str) -> Result<essentially_once_postgres::Pg, Error> {
        let options = essentially_once_postgres::PgOptions::new().schema(self.schema());
        options.connect(url).await
    }

    #[cfg(feature = "postgres")]
    pub(crate) fn schema(&self) -> String {
        format!("orders_{}", self.run.replace('-', "_"))
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// A name that no other run uses for its consumer.
    pub(crate) fn consumer(&self, name: &str) -> Result<ConsumerId, Error> {
        ConsumerId::new(format!("{name}-{}", self.run))
    }

    pub(crate) fn shipping(&self) -> Result<ConsumerId, Error> {
        self.consumer("shipping")
    }

    pub(crate) fn shipping_relay(&self) -> Result<ConsumerId, Error> {
        self.consumer("shipping-relay")
    }

    /// The name of a log of the bus on a broker that other runs share.
    #[cfg(any(feature = "kafka", feature = "rabbitmq"))]
    pub(crate) fn bus_name(&self, topic: Topic) -> String {
        format!("{}.{topic}", self.run)
    }
}

/// Reads all records that the log holds now.
pub(crate) async fn read_all(log: &dyn Log) -> Result<Vec<Record>, Failure> {
    const AT_A_TIME: usize = 1_000;
    let bounds = log.bounds().await?;
    let (mut records, mut next) = (Vec::<Record>::new(), bounds.earliest);
    if next < bounds.end {
        let mut reader = log.read(next).await?;
        while next < bounds.end {
            records.extend(reader.next(AT_A_TIME).await?);
            next = records.last().map_or(bounds.end, |last| last.offset.successor());
        }
    }
    Ok(records)
}
