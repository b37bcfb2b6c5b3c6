//! Counts what happened to the orders, and shows it.

use std::collections::HashSet;

use essentially_once::Offset;
use serde::Serialize;

use crate::{
    Failure,
    backend::{Backend, read_all},
    delivery::Delivery,
    letters::{self, Letter},
    order::Format,
    shipping,
    shop::Shipments,
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
    /// Lines that were not shipped because they are invalid. Under essentially-once, these are the
    /// dead letters, some of which may wait behind an invalid line with the same id.
    pub(crate) rejected: u64,
    pub(crate) kills: u64,
    pub(crate) seconds: f64,
    pub(crate) dead_letters: Vec<Letter>,
    /// Shipments and rejected lines, doubles included.
    #[serde(skip)]
    effects: u64,
}

impl Tally {
    fn new(delivery: Delivery, log: &[Offset], shipments: &Shipments, rejected: &HashSet<Offset>) -> Self {
        let mut tally = Self {
            delivery,
            orders: log.len() as u64,
            shipped_once: 0,
            shipped_more: 0,
            never_shipped: 0,
            rejected: 0,
            kills: 0,
            seconds: 0.0,
            dead_letters: Vec::new(),
            effects: shipments.values().sum::<u64>() + rejected.len() as u64,
        };
        for offset in log {
            match shipments.get(&offset.to_string()) {
                Some(1) => tally.shipped_once += 1,
                Some(_) => tally.shipped_more += 1,
                None if rejected.contains(offset) => tally.rejected += 1,
                None => tally.never_shipped += 1,
            }
        }
        tally
    }

    /// Whether each line was shipped once or is a dead letter, but not both, and whether there are
    /// no other shipments and letters.
    pub(crate) fn each_took_effect_once(&self) -> bool {
        self.shipped_once + self.rejected == self.orders && self.effects == self.orders
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

/// Counts in the log, in the shop and among the dead letters, as stored on disk.
///
/// The other deliveries keep nothing of an invalid line. So it counts as rejected also if
/// at-most-once lost it to a kill, which makes no difference.
pub(crate) async fn count(
    backend: &Backend,
    delivery: Delivery,
    format: Format,
    kills: u64,
    seconds: f64,
) -> Result<Tally, Failure> {
    let records = read_all(&*backend.open_log().await?).await?;
    let log: Vec<Offset> = records.iter().map(|record| record.offset).collect();
    let letters = backend.letters().await?;
    let rejected = match delivery {
        Delivery::EssentiallyOnce => letters.iter().map(|letter| letter.record.offset).collect(),
        Delivery::AtLeastOnce | Delivery::AtMostOnce => {
            let invalid = records
                .iter()
                .filter(|record| format.parse(&shipping::text(record)).is_err());
            invalid.map(|record| record.offset).collect()
        }
    };
    let shipments = backend.shipments(&log).await?;
    Ok(Tally {
        kills,
        seconds: (seconds * 1_000.0).round() / 1_000.0,
        dead_letters: letters.into_iter().map(Letter::from).collect(),
        ..Tally::new(delivery, &log, &shipments, &rejected)
    })
}

/// One line per delivery and one for the mended orders, below a heading. Then the dead letters.
pub(crate) fn table(tallies: &[Tally], mended: Option<&Mended>) -> String {
    let mut table = String::from(
        "delivery          orders  shipped once  shipped twice or more  never shipped  rejected  kills  seconds\n",
    );
    let rows = tallies.iter().map(|tally| (tally.delivery.to_string(), tally));
    for (name, tally) in rows.chain(mended.map(|mended| ("  then mended".to_owned(), &mended.tally))) {
        table += &format!(
            "{name:16}{:>8}{:>14}{:>23}{:>15}{:>10}{:>7}{:>9.2}\n",
            tally.orders,
            tally.shipped_once,
            tally.shipped_more,
            tally.never_shipped,
            tally.rejected,
            tally.kills,
            tally.seconds
        );
    }
    for tally in tallies.iter().filter(|tally| !tally.dead_letters.is_empty()) {
        let letters = &tally.dead_letters;
        table += &format!(
            "\nDead letters of {}: {}\n{}",
            tally.delivery,
            letters.len(),
            letters::few(letters)
        );
        table += &match mended {
            None => "`--mend` retries them with a parser that accepts an unquoted comma before a space.\n".to_owned(),
            Some(Mended { tally, .. }) => {
                let left = &tally.dead_letters;
                let shipped = letters.len().saturating_sub(left.len());
                let few = letters::few(left);
                format!(
                    "Retried with a mended parser: {shipped} shipped, {} left\n{few}",
                    left.len()
                )
            }
        };
    }
    table
}

/// One object with a list `deliveries`, and with `mended` if dead letters were retried.
pub(crate) fn json(tallies: &[Tally], mended: Option<&Mended>) -> Result<String, Failure> {
    #[derive(Serialize)]
    struct Report<'a> {
        deliveries: &'a [Tally],
        #[serde(skip_serializing_if = "Option::is_none")]
        mended: Option<&'a Mended>,
    }
    let mut json = serde_json::to_string(&Report {
        deliveries: tallies,
        mended,
    })?;
    json.push('\n');
    Ok(json)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether three lines at these offsets, with these shipments and letters, took effect once.
    fn once(shipments: &[(u64, u64)], letters: &[u64]) -> bool {
        let log = [1, 2, 3].map(Offset::from);
        let shipments = shipments
            .iter()
            .map(|(offset, times)| (Offset::from(*offset).to_string(), *times));
        let letters = letters.iter().map(|offset| Offset::from(*offset));
        Tally::new(
            Delivery::EssentiallyOnce,
            &log,
            &shipments.collect(),
            &letters.collect(),
        )
        .each_took_effect_once()
    }

    #[test]
    fn each_line_must_be_shipped_once_or_be_a_letter() {
        assert!(once(&[(1, 1), (2, 1)], &[3]));
        assert!(once(&[(1, 1), (2, 1), (3, 1)], &[]));
        assert!(once(&[], &[1, 2, 3]));
        assert!(!once(&[(1, 1), (2, 1)], &[]), "lost");
        assert!(!once(&[(1, 1), (2, 2)], &[3]), "doubled");
        assert!(!once(&[(1, 1), (2, 2)], &[]), "one lost, one doubled");
        assert!(
            !once(&[(1, 1), (2, 1), (3, 1)], &[3]),
            "shipped, and a letter all the same"
        );
        assert!(
            !once(&[(1, 1), (2, 1)], &[2]),
            "shipped in place of the letter that was lost"
        );
        assert!(!once(&[(1, 1), (2, 1)], &[3, 4]), "a letter of no line");
        assert!(!once(&[(1, 1), (2, 1), (4, 1)], &[3]), "a shipment of no line");
    }
}
