//! Counts what happened to the orders, and shows it.

use essentially_once::Offset;
use serde::Serialize;

use crate::{
    Failure,
    backend::{Backend, read_all},
    delivery::Delivery,
};

/// What happened to the orders of one run. Each is counted under its offset in the log, because an
/// id may be missing or used twice.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub(crate) struct Tally {
    pub(crate) delivery: Delivery,
    pub(crate) orders: u64,
    pub(crate) shipped_once: u64,
    pub(crate) shipped_more: u64,
    pub(crate) never_shipped: u64,
    pub(crate) rejected: u64,
    pub(crate) kills: u64,
    pub(crate) seconds: f64,
    /// Shipments and rejections, doubles included.
    #[serde(skip)]
    pub(crate) effects: u64,
}

impl Tally {
    /// Whether no order and no rejected line was lost or doubled.
    pub(crate) fn each_took_effect_once(&self) -> bool {
        self.shipped_once + self.rejected == self.orders && self.effects == self.orders
    }
}

/// Counts in the log and in the shop, as stored on disk.
pub(crate) async fn count(backend: &Backend, delivery: Delivery, kills: u64, seconds: f64) -> Result<Tally, Failure> {
    let records = read_all(&*backend.open_log().await?).await?;
    let orders = records.len() as u64;
    let offsets: Vec<Offset> = records.iter().map(|record| record.offset).collect();
    let books = backend.books(&offsets).await?;
    Ok(Tally {
        delivery,
        orders,
        shipped_once: books.shipped_once,
        shipped_more: books.shipped_more,
        never_shipped: orders.saturating_sub(books.shipped_once + books.shipped_more + books.rejected),
        rejected: books.rejected,
        kills,
        seconds: (seconds * 1_000.0).round() / 1_000.0,
        effects: books.effects,
    })
}

/// One line per delivery, below a heading.
pub(crate) fn table(tallies: &[Tally]) -> String {
    let mut table = String::from(
        "delivery          orders  shipped once  shipped twice or more  never shipped  rejected  kills  seconds\n",
    );
    for tally in tallies {
        table += &format!(
            "{:16}{:>8}{:>14}{:>23}{:>15}{:>10}{:>7}{:>9.2}\n",
            tally.delivery,
            tally.orders,
            tally.shipped_once,
            tally.shipped_more,
            tally.never_shipped,
            tally.rejected,
            tally.kills,
            tally.seconds
        );
    }
    table
}

/// One object with a list `deliveries`.
pub(crate) fn json(tallies: &[Tally]) -> Result<String, Failure> {
    #[derive(Serialize)]
    struct Report<'a> {
        deliveries: &'a [Tally],
    }
    let mut json = serde_json::to_string(&Report { deliveries: tallies })?;
    json.push('\n');
    Ok(json)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rejected_line_written_twice_is_doubled_too() {
        let tally = Tally {
            delivery: Delivery::EssentiallyOnce,
            orders: 10,
            shipped_once: 9,
            shipped_more: 0,
            never_shipped: 0,
            rejected: 1,
            kills: 0,
            seconds: 0.0,
            effects: 10,
        };
        assert!(tally.each_took_effect_once());
        assert!(
            !Tally {
                effects: 11,
                ..tally.clone()
            }
            .each_took_effect_once()
        );
        assert!(
            !Tally {
                shipped_once: 8,
                ..tally
            }
            .each_took_effect_once()
        );
    }
}
