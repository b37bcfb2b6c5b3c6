//! Counts what happened to the orders, as stored on disk.

use std::collections::{HashMap, HashSet};

use essentially_once::{Log, Record};
use serde::Serialize;

use crate::{
    Failure,
    delivery::Delivery,
    letters::Letter,
    order_service::{OrderBook, Status},
    settings::{Settings, Topic, read_all},
    shipping,
    violations::{Orders, Stored},
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
    /// What essentially-once does not allow. The other deliveries promise less.
    #[serde(skip)]
    pub(crate) violations: Vec<String>,
}

impl Tally {
    fn new(delivery: Delivery, orders: &Orders<'_>, shipments: &[u32], rejected: &HashSet<u32>) -> Self {
        let mut tally = Self {
            delivery,
            orders: orders.lines.len() as u64,
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
            violations: Vec::new(),
        };
        let mut times: HashMap<u32, u64> = HashMap::new();
        for number in shipments {
            *times.entry(*number).or_default() += 1;
        }
        for number in orders.numbers() {
            match times.get(&number) {
                Some(1) => tally.shipped_once += 1,
                Some(_) => tally.shipped_more += 1,
                None if rejected.contains(&number) => tally.rejected += 1,
                None => tally.never_shipped += 1,
            }
        }
        tally
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

/// Counts in the databases of both services, on the bus and among the dead letters.
///
/// The other deliveries keep nothing of an invalid line. So it counts as rejected also if
/// at-most-once lost it to a kill, which makes no difference.
pub(crate) async fn count(settings: &Settings, orders: &Orders<'_>) -> Result<Tally, Failure> {
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
    let (shipments, statuses) = (settings.shipments().await?, book.statuses()?);
    let with_status = |is_one: fn(&Option<Status>) -> bool| statuses.values().filter(|one| is_one(one)).count() as u64;
    let tally = |rejected: &HashSet<u32>| Tally {
        placed: statuses.len() as u64,
        duplicates_on_bus: bus.duplicates,
        ..Tally::new(settings.delivery, orders, &shipments, rejected)
    };
    if settings.delivery != Delivery::EssentiallyOnce {
        let intact = announced.iter().filter(|record| record.malformed.is_none());
        let invalid = intact.filter(|record| settings.format.parse(&shipping::text(record)).is_err());
        return Ok(tally(&invalid.filter_map(shipping::order_number).collect()));
    }
    let rejected: Vec<u32> = letters
        .rejected
        .iter()
        .filter_map(|letter| shipping::order_number(&letter.record))
        .collect();
    let found = orders.violations(&Stored {
        statuses: &statuses,
        shipments: &shipments,
        rejected: &rejected,
    });
    let mut violations: Vec<String> = found.iter().map(|one| orders.describe(one).to_string()).collect();
    violations.extend(letters.violations(bus.altered));
    Ok(Tally {
        packed: Some(with_status(Option::is_some)),
        confirmed: Some(with_status(|status| *status == Some(Status::Shipped))),
        early_reports: book.early()?,
        tampered_rejected: Some(letters.altered.len() as u64),
        violations,
        dead_letters: letters.rejected.into_iter().map(Letter::from).collect(),
        ..tally(&rejected.into_iter().collect())
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
