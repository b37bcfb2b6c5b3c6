//! Counts what happened to the orders, as stored on disk.

use std::collections::HashSet;

use essentially_once::{Log, Record};
use serde::Serialize;

use crate::{
    Failure,
    delivery::Delivery,
    input::FIRST_LINE,
    letters::Letter,
    order_service::OrderBook,
    settings::{Settings, Topic, read_all},
    shipping,
    shop::Shipments,
};

/// What happened to the orders of one run. Each is counted under its number, because an id may be
/// missing or used twice.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub(crate) struct Tally {
    pub(crate) delivery: Delivery,
    pub(crate) orders: u64,
    /// Orders that the order service has stored.
    pub(crate) placed: u64,
    /// Orders that the order service has marked as packing, shipped ones included. `None` without
    /// an outbox for the way back.
    pub(crate) packed: Option<u64>,
    pub(crate) shipped_once: u64,
    pub(crate) shipped_more: u64,
    pub(crate) never_shipped: u64,
    /// Orders that the order service has marked first as packing, then as shipped.
    pub(crate) confirmed: Option<u64>,
    /// Orders that were reported as shipped before `packing` arrived intact, and waited for it.
    pub(crate) early_reports: u64,
    /// Lines that were not shipped because they are invalid. Under essentially-once, these are the
    /// dead letters, some of which may wait behind an invalid line with the same id.
    pub(crate) rejected: u64,
    /// Records on the bus that were there before, because a relay sent them again.
    pub(crate) duplicates_on_bus: u64,
    /// Altered records that became dead letters. `None` without dead letters.
    pub(crate) tampered_rejected: Option<u64>,
    pub(crate) kills: u64,
    pub(crate) lost_replies: u64,
    pub(crate) seconds: f64,
    pub(crate) dead_letters: Vec<Letter>,
    /// Altered records on the bus.
    #[serde(skip)]
    altered_on_bus: u64,
    /// Dead letters that nobody expects.
    #[serde(skip)]
    unexpected: u64,
    /// Shipments and rejected lines, doubles included.
    #[serde(skip)]
    effects: u64,
}

impl Tally {
    fn new(delivery: Delivery, orders: u32, shipments: &Shipments, rejected: &HashSet<u32>) -> Self {
        let mut tally = Self {
            delivery,
            orders: u64::from(orders),
            placed: 0,
            packed: None,
            shipped_once: 0,
            shipped_more: 0,
            never_shipped: 0,
            confirmed: None,
            early_reports: 0,
            rejected: 0,
            duplicates_on_bus: 0,
            tampered_rejected: None,
            kills: 0,
            lost_replies: 0,
            seconds: 0.0,
            dead_letters: Vec::new(),
            altered_on_bus: 0,
            unexpected: 0,
            effects: shipments.values().sum::<u64>() + rejected.len() as u64,
        };
        for number in numbers(orders) {
            match shipments.get(&number) {
                Some(1) => tally.shipped_once += 1,
                Some(_) => tally.shipped_more += 1,
                None if rejected.contains(&number) => tally.rejected += 1,
                None => tally.never_shipped += 1,
            }
        }
        tally
    }

    /// Whether each line was shipped once or is a dead letter, but not both, whether there are no
    /// other shipments and letters, and whether the order service knows all of it.
    pub(crate) fn each_took_effect_once(&self) -> bool {
        self.placed == self.orders
            && self.shipped_once + self.rejected == self.orders
            && self.effects == self.orders
            && self.packed == Some(self.shipped_once)
            && self.confirmed == Some(self.shipped_once)
            && self.tampered_rejected == Some(self.altered_on_bus)
            && self.unexpected == 0
    }
}

/// What became of the dead letters after the parser was mended.
#[derive(Serialize)]
pub(crate) struct Mended {
    /// The letters made due. Those that waited behind them do not count.
    pub(crate) retried: u64,
    #[serde(flatten)]
    pub(crate) tally: Tally,
}

fn numbers(orders: u32) -> impl Iterator<Item = u32> {
    (FIRST_LINE..).take(orders as usize)
}

/// Counts in the databases of both services, on the bus and among the dead letters.
///
/// The other deliveries keep nothing of an invalid line. So it counts as rejected also if
/// at-most-once lost it to a kill, which makes no difference.
pub(crate) async fn count(settings: &Settings, orders: u32) -> Result<Tally, Failure> {
    let book = OrderBook::open(settings).await?;
    let mut bus = Bus::default();
    let mut announced = Vec::new();
    for topic in Topic::ALL {
        let records = bus.look(settings, topic).await?;
        if topic == Topic::Orders {
            announced = records;
        }
    }
    let letters = settings.letters().await?;
    let is_back = settings.delivery == Delivery::EssentiallyOnce;
    let rejected = match is_back {
        true => letters
            .rejected
            .iter()
            .filter_map(|letter| shipping::order_number(&letter.record))
            .collect(),
        false => {
            let format = settings.format;
            let intact = announced.iter().filter(|record| record.malformed.is_none());
            let invalid = intact.filter(|record| format.parse(&shipping::text(record)).is_err());
            invalid.filter_map(shipping::order_number).collect()
        }
    };
    let shipments = settings.shipments(&numbers(orders).collect::<Vec<_>>()).await?;
    let (placed, packing, shipped) = (book.count("placed")?, book.count("packing")?, book.count("shipped")?);
    Ok(Tally {
        placed: placed + packing + shipped,
        packed: is_back.then_some(packing + shipped),
        confirmed: is_back.then_some(shipped),
        early_reports: book.early()?,
        duplicates_on_bus: bus.duplicates,
        tampered_rejected: is_back.then_some(letters.altered.len() as u64),
        altered_on_bus: bus.altered,
        unexpected: letters.unexpected.len() as u64,
        dead_letters: letters.rejected.into_iter().map(Letter::from).collect(),
        ..Tally::new(settings.delivery, orders, &shipments, &rejected)
    })
}

/// What was found on the bus.
#[derive(Default)]
struct Bus {
    duplicates: u64,
    altered: u64,
}

impl Bus {
    /// Counts in a topic, and returns its records.
    async fn look(&mut self, settings: &Settings, topic: Topic) -> Result<Vec<Record>, Failure> {
        let log = settings.signed(topic, settings.bus(topic).await?)?;
        let records = read_all(&log as &dyn Log).await?;
        let mut seen = HashSet::new();
        for record in &records {
            match (&record.malformed, &record.origin) {
                (Some(_), _) => self.altered += 1,
                (None, Some(origin)) if !seen.insert(origin.clone()) => self.duplicates += 1,
                (None, _) => {}
            }
        }
        Ok(records)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether three lines with these shipments and letters took effect once.
    fn once(shipments: &[(u32, u64)], letters: &[u32]) -> bool {
        let tally = Tally::new(
            Delivery::EssentiallyOnce,
            3,
            &shipments.iter().copied().collect(),
            &letters.iter().copied().collect(),
        );
        Tally {
            placed: 3,
            packed: Some(tally.shipped_once),
            confirmed: Some(tally.shipped_once),
            tampered_rejected: Some(0),
            ..tally
        }
        .each_took_effect_once()
    }

    #[test]
    fn each_line_must_be_shipped_once_or_be_a_letter() {
        assert!(once(&[(2, 1), (3, 1)], &[4]));
        assert!(once(&[(2, 1), (3, 1), (4, 1)], &[]));
        assert!(once(&[], &[2, 3, 4]));
        assert!(!once(&[(2, 1), (3, 1)], &[]), "lost");
        assert!(!once(&[(2, 1), (3, 2)], &[4]), "doubled");
        assert!(!once(&[(2, 1), (3, 2)], &[]), "one lost, one doubled");
        assert!(
            !once(&[(2, 1), (3, 1), (4, 1)], &[4]),
            "shipped, and a letter all the same"
        );
        assert!(!once(&[(2, 1), (3, 1), (4, 1), (9, 1)], &[]), "shipped from nowhere");
    }

    #[test]
    fn the_order_service_must_know_all_of_it() {
        let tally = Tally {
            placed: 1,
            packed: Some(1),
            confirmed: Some(1),
            tampered_rejected: Some(2),
            altered_on_bus: 2,
            ..Tally::new(Delivery::EssentiallyOnce, 1, &[(2, 1)].into(), &HashSet::new())
        };
        assert!(tally.each_took_effect_once());
        for wrong in [
            Tally {
                placed: 0,
                ..tally.clone()
            },
            Tally {
                packed: Some(0),
                ..tally.clone()
            },
            Tally {
                confirmed: Some(0),
                ..tally.clone()
            },
            Tally {
                tampered_rejected: Some(1),
                ..tally.clone()
            },
            Tally { unexpected: 1, ..tally },
        ] {
            assert!(!wrong.each_took_effect_once(), "{wrong:?}");
        }
    }
}
