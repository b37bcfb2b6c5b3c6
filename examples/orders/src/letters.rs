//! The lines that essentially-once has set aside: its dead letters.

use essentially_once::{
    ConsumerId, Error, OffsetStore,
    backend::{DeadLetter, DeadLetters},
    consumer::{Operator, dead_letters},
};
use serde::Serialize;

use crate::{Failure, place::Place, settings::Settings, shipping};

/// The dead letters of both services.
pub(crate) struct Letters {
    /// Lines that the shipping service could not read, and those that wait behind one.
    pub(crate) rejected: Vec<DeadLetter>,
    /// Records that were altered on the bus.
    pub(crate) altered: Vec<DeadLetter>,
    /// Anything else that the order service set aside. There should be none.
    pub(crate) unexpected: Vec<DeadLetter>,
}

impl Letters {
    /// What does not follow from the records on the bus, of which `altered_on_bus` were altered.
    pub(crate) fn violations(&self, altered_on_bus: u64) -> Vec<String> {
        let mut violations = Vec::new();
        let altered = self.altered.len() as u64;
        if altered != altered_on_bus {
            violations.push(format!(
                "{altered_on_bus} records were altered on the bus, and {altered} of them were set aside"
            ));
        }
        for letter in self.unexpected.iter().take(10) {
            violations.push(format!(
                "the order service set a report aside, at offset {}: {}",
                letter.record.offset, letter.last_reason
            ));
        }
        violations
    }
}

impl Settings {
    /// Reads all dead letters, in the order of the logs.
    pub(crate) async fn letters(&self) -> Result<Letters, Failure> {
        let shipping = self.shipping()?;
        let of_shipping = match &self.store {
            Place::Sqlite => list_all(&shipping, &self.shipping_database().await?.store()).await?,
            #[cfg(feature = "postgres")]
            Place::Postgres(url) => list_all(&shipping, &self.postgres(url).await?.store()).await?,
            #[cfg(feature = "redis")]
            Place::Redis(url) => {
                let redis = essentially_once_redis::Redis::connect(url).await?;
                list_all(&shipping, &redis.store()).await?
            }
            #[cfg(feature = "rabbitmq")]
            Place::Rabbitmq(url) => {
                let rabbit = essentially_once_rabbitmq::Rabbit::connect(url).await?;
                list_all(&shipping, &rabbit.store()).await?
            }
        };
        let orders = self.consumer("orders")?;
        let of_orders = list_all(&orders, &self.order_database().await?.store()).await?;
        let (mut altered, rejected): (Vec<_>, Vec<_>) = of_shipping.into_iter().partition(is_altered);
        let (more, unexpected): (Vec<_>, Vec<_>) = of_orders.into_iter().partition(is_altered);
        altered.extend(more);
        Ok(Letters {
            rejected,
            altered,
            unexpected,
        })
    }

    /// Lets the next shipping service try each of these letters again. Returns how many it tries
    /// first. Letters that wait behind one of these follow it.
    pub(crate) async fn retry(&self, letters: &[DeadLetter]) -> Result<u64, Error> {
        let shipping = self.shipping()?;
        match &self.store {
            Place::Sqlite => retry_each(&shipping, &self.shipping_database().await?.store(), letters).await,
            #[cfg(feature = "postgres")]
            Place::Postgres(url) => retry_each(&shipping, &self.postgres(url).await?.store(), letters).await,
            #[cfg(feature = "redis")]
            Place::Redis(url) => {
                let redis = essentially_once_redis::Redis::connect(url).await?;
                retry_each(&shipping, &redis.store(), letters).await
            }
            #[cfg(feature = "rabbitmq")]
            Place::Rabbitmq(url) => {
                let rabbit = essentially_once_rabbitmq::Rabbit::connect(url).await?;
                retry_each(&shipping, &rabbit.store(), letters).await
            }
        }
    }
}

/// The log of the bus yields a record as malformed if its signature is missing or wrong.
fn is_altered(letter: &DeadLetter) -> bool {
    letter.record.malformed.is_some()
}

async fn retry_each<S>(consumer: &ConsumerId, store: &S, letters: &[DeadLetter]) -> Result<u64, Error>
where
    S: OffsetStore<Tx: DeadLetters>,
{
    let by = Operator::new("orders --mend").because("the parser is mended");
    let mut retried = 0;
    // Those that were never tried wait behind another one.
    for letter in letters.iter().filter(|letter| letter.tries > 0) {
        dead_letters::retry(consumer, store, letter.record.offset, &by).await?;
        retried += 1;
    }
    Ok(retried)
}

async fn list_all<S>(consumer: &ConsumerId, store: &S) -> Result<Vec<DeadLetter>, Error>
where
    S: OffsetStore<Tx: DeadLetters>,
{
    const AT_A_TIME: usize = 1_000;
    let mut letters = Vec::<DeadLetter>::new();
    loop {
        let after = letters.last().map(|last| last.record.offset);
        let page = dead_letters::list(consumer, store, after, AT_A_TIME).await?;
        let is_last = page.len() < AT_A_TIME;
        letters.extend(page);
        if is_last {
            return Ok(letters);
        }
    }
}

/// A dead letter as the program shows it.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub(crate) struct Letter {
    pub(crate) offset: String,
    pub(crate) line: Option<u32>,
    pub(crate) text: String,
    pub(crate) reason: String,
}

impl From<DeadLetter> for Letter {
    fn from(letter: DeadLetter) -> Self {
        Self {
            offset: letter.record.offset.to_string(),
            line: shipping::order_number(&letter.record),
            text: shipping::text(&letter.record).into_owned(),
            reason: letter.last_reason,
        }
    }
}
