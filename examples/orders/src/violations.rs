//! What essentially-once rules out, with the orders that it happened to.

use std::{
    collections::{HashMap, HashSet},
    fmt,
};

use crate::{input::FIRST_LINE, order, order_service::Status};

/// The orders of a run, and what excuses one that was shipped late.
#[derive(Clone, Copy)]
pub(crate) struct Orders<'a> {
    /// The first line has the number [`FIRST_LINE`].
    pub(crate) lines: &'a [String],
    /// Orders that were altered on the bus. They arrive behind later ones, when the relay sends
    /// them again.
    pub(crate) altered: &'a HashSet<u32>,
    /// Dead letters that were retried. Only orders with the same id have waited for them.
    pub(crate) retried: &'a HashSet<u32>,
}

/// What both services have stored about the orders, each order under its number.
pub(crate) struct Stored<'a> {
    /// The orders of the order service. `None` if nothing was reported about one.
    pub(crate) statuses: &'a HashMap<u32, Option<Status>>,
    /// The shipped orders, in the order of the shipments.
    pub(crate) shipments: &'a [u32],
    /// The orders that the shipping service has set aside.
    pub(crate) rejected: &'a [u32],
}

/// One kind of violation.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Violation {
    what: &'static str,
    orders: Vec<u32>,
}

impl Orders<'_> {
    pub(crate) fn numbers(&self) -> impl Iterator<Item = u32> {
        (FIRST_LINE..).take(self.lines.len())
    }

    /// Compares what is stored with what should be. Empty if each order was placed, was either
    /// shipped once or set aside once, is known to the order service as it is, and was shipped in
    /// its turn.
    pub(crate) fn violations(&self, stored: &Stored<'_>) -> Vec<Violation> {
        let (shipped, rejected) = (times(stored.shipments), times(stored.rejected));
        let shipped = |number: &u32| shipped.get(number).copied().unwrap_or(0);
        let rejected = |number: &u32| rejected.get(number).copied().unwrap_or(0);
        let status = |number: &u32| stored.statuses.get(number).copied();
        let those = |is_one: &dyn Fn(&u32) -> bool| self.numbers().filter(is_one).collect::<Vec<_>>();
        let all: HashSet<u32> = self.numbers().collect();
        let mut unknown: Vec<u32> = [stored.shipments, stored.rejected].concat();
        unknown.extend(stored.statuses.keys());
        unknown.retain(|number| !all.contains(number));
        unknown.sort_unstable();
        unknown.dedup();
        let kinds = [
            ("lost by the order service", those(&|one| status(one).is_none())),
            (
                "lost: neither shipped nor set aside",
                those(&|one| shipped(one) + rejected(one) == 0),
            ),
            ("doubled: shipped more than once", those(&|one| shipped(one) > 1)),
            (
                "doubled: shipped, and set aside all the same",
                those(&|one| shipped(one) > 0 && rejected(one) > 0),
            ),
            ("doubled: set aside more than once", those(&|one| rejected(one) > 1)),
            (
                "in the wrong order: shipped behind a later order",
                self.late(stored.shipments),
            ),
            (
                "shipped, but not marked so by the order service",
                those(&|one| shipped(one) > 0 && status(one).is_some_and(|status| status != Some(Status::Shipped))),
            ),
            (
                "not shipped, but marked as packing or shipped by the order service",
                those(&|one| shipped(one) == 0 && status(one).is_some_and(|status| status.is_some())),
            ),
            ("unknown: not in the input", unknown),
        ];
        let kinds = kinds.into_iter().map(|(what, orders)| Violation { what, orders });
        kinds.filter(|kind| !kind.orders.is_empty()).collect()
    }

    /// The orders that were first shipped after a later one.
    fn late(&self, shipments: &[u32]) -> Vec<u32> {
        let mut seen = HashSet::new();
        let (mut latest, mut latest_of_key) = (0, HashMap::new());
        let mut late = Vec::new();
        for number in shipments.iter().filter(|number| seen.insert(**number)) {
            let before = match self.retried.is_empty() {
                true => latest,
                false => {
                    let of_key = latest_of_key.entry(self.key(*number)).or_insert(0);
                    let before = if self.retried.contains(number) { *of_key } else { latest };
                    *of_key = (*of_key).max(*number);
                    before
                }
            };
            if *number < before && !self.altered.contains(number) {
                late.push(*number);
            }
            latest = latest.max(*number);
        }
        late
    }

    fn key(&self, number: u32) -> Option<String> {
        order::key(self.line(number)?)
    }

    fn line(&self, number: u32) -> Option<&str> {
        let index = number.checked_sub(FIRST_LINE)?;
        self.lines.get(index as usize).map(String::as_str)
    }

    /// The violation in a line of text, which names up to ten orders by their ids.
    pub(crate) fn describe(&self, violation: &Violation) -> impl fmt::Display {
        const MOST: usize = 10;
        let Violation { what, orders } = violation;
        let named = orders.iter().take(MOST).map(|number| match self.key(*number) {
            // A terminal must not obey a control character of the file.
            Some(id) => format!("{} (line {number})", id.escape_debug()),
            None => format!("line {number}"),
        });
        let named: Vec<String> = named.collect();
        let more = match orders.len().saturating_sub(MOST) {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        let (count, are) = (orders.len(), if orders.len() == 1 { "order" } else { "orders" });
        format!("{count} {are} {what}: {}{more}", named.join(", "))
    }
}

fn times(numbers: &[u32]) -> HashMap<u32, u64> {
    let mut times = HashMap::new();
    for number in numbers {
        *times.entry(*number).or_default() += 1;
    }
    times
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Run {
        lines: Vec<String>,
        altered: HashSet<u32>,
        retried: HashSet<u32>,
        statuses: HashMap<u32, Option<Status>>,
        shipments: Vec<u32>,
        rejected: Vec<u32>,
    }

    /// Twelve orders, of which all were shipped but the last, which was set aside. Every other one
    /// has the id `even`.
    fn run() -> Run {
        let id = |number: u32| match number % 2 {
            0 => "even".to_owned(),
            _ => format!("id{number}"),
        };
        Run {
            lines: (2..14).map(|number| format!("{},1.00", id(number))).collect(),
            altered: HashSet::new(),
            retried: HashSet::new(),
            statuses: (2..14)
                .map(|number| (number, (number != 13).then_some(Status::Shipped)))
                .collect(),
            shipments: (2..13).collect(),
            rejected: vec![13],
        }
    }

    impl Run {
        fn found(&self) -> Vec<String> {
            let orders = Orders {
                lines: &self.lines,
                altered: &self.altered,
                retried: &self.retried,
            };
            let found = orders.violations(&Stored {
                statuses: &self.statuses,
                shipments: &self.shipments,
                rejected: &self.rejected,
            });
            found.iter().map(|one| orders.describe(one).to_string()).collect()
        }
    }

    #[test]
    fn a_run_as_it_should_be_has_no_violations() {
        assert_eq!(run().found(), [""; 0]);
    }

    #[test]
    fn each_kind_names_its_orders() {
        let found = |change: &dyn Fn(&mut Run)| {
            let mut run = run();
            change(&mut run);
            run.found()
        };
        assert_eq!(
            found(&|run| {
                run.statuses.remove(&13);
            }),
            ["1 order lost by the order service: id13 (line 13)"]
        );
        assert_eq!(
            found(&|run| run.rejected.clear()),
            ["1 order lost: neither shipped nor set aside: id13 (line 13)"]
        );
        assert_eq!(
            found(&|run| run.shipments.extend([3, 5, 5])),
            ["2 orders doubled: shipped more than once: id3 (line 3), id5 (line 5)"]
        );
        assert_eq!(
            found(&|run| run.rejected.push(3)),
            ["1 order doubled: shipped, and set aside all the same: id3 (line 3)"]
        );
        assert_eq!(
            found(&|run| run.rejected.push(13)),
            ["1 order doubled: set aside more than once: id13 (line 13)"]
        );
        assert_eq!(
            found(&|run| run.shipments.swap(3, 4)),
            ["1 order in the wrong order: shipped behind a later order: id5 (line 5)"]
        );
        assert_eq!(
            found(&|run| {
                run.statuses.insert(3, Some(Status::Packing));
            }),
            ["1 order shipped, but not marked so by the order service: id3 (line 3)"]
        );
        assert_eq!(
            found(&|run| {
                run.statuses.insert(13, Some(Status::Packing));
            }),
            ["1 order not shipped, but marked as packing or shipped by the order service: id13 (line 13)"]
        );
        assert_eq!(
            found(&|run| run.shipments.push(99)),
            ["1 order unknown: not in the input: line 99"]
        );
    }

    #[test]
    fn no_more_than_ten_orders_are_named() {
        let mut run = run();
        run.shipments.clear();
        run.statuses.values_mut().for_each(|status| *status = None);
        let found = run.found();
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!(found[0].matches("line").count(), 10, "{found:?}");
        assert!(
            found[0].starts_with("11 orders lost") && found[0].ends_with(" and 1 more"),
            "{found:?}"
        );
    }

    #[test]
    fn an_altered_order_may_be_late() {
        let mut run = run();
        run.shipments.swap(3, 4);
        run.altered.insert(5);
        assert_eq!(run.found(), [""; 0]);
    }

    #[test]
    fn a_retried_letter_may_be_late_but_not_behind_a_later_order_with_its_id() {
        let mut run = run();
        let mut ship_last = |number: u32| {
            run.shipments.retain(|one| *one != number);
            run.shipments.push(number);
            run.retried.insert(number);
            run.found()
        };
        assert_eq!(ship_last(3), [""; 0]);
        assert_eq!(
            ship_last(4),
            ["1 order in the wrong order: shipped behind a later order: even (line 4)"]
        );
    }
}
