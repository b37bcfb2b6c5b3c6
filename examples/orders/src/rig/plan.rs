//! Chooses when processes are killed, and what happens to appends.

use std::{collections::HashSet, time::Duration};

use serde::{Deserialize, Serialize};

use crate::{delivery::Delivery, input::FIRST_LINE, processes::Role};

/// All that goes wrong in the run of one delivery.
#[derive(Default)]
pub(crate) struct Plan {
    kills: Vec<(Role, Kill)>,
    faults: Vec<(Role, Fault)>,
}

/// One kill: after the process has made so much progress, plus a short delay.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Kill {
    /// How many orders the process must have handled. 0 kills it while it starts.
    pub(super) after: u64,
    /// The delay varies, so that kills hit commits as well as writes.
    pub(super) delay: Duration,
}

/// What happens to the first append of a record about this order.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct Fault {
    pub(crate) order: u32,
    pub(crate) kind: FaultKind,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) enum FaultKind {
    /// The records are stored, and the reply is lost.
    LoseReply,
    /// One record is altered as well.
    Alter,
}

impl Plan {
    /// Draws a plan. The same arguments draw the same one.
    pub(crate) fn draw(delivery: Delivery, seed: u64, orders: usize, kills: usize, lose: usize, alter: usize) -> Self {
        let roles = Role::of(delivery);
        let mut rng = fastrand::Rng::with_seed(seed);
        let kills = roles.iter().enumerate().flat_map(|(index, role)| {
            // Those of each process, in turns.
            let count = (kills + roles.len() - 1 - index) / roles.len();
            let drawn = draw_kills(&mut rng, total(*role, delivery, orders), count);
            drawn.into_iter().map(|kill| (*role, kill)).collect::<Vec<_>>()
        });
        let kills = kills.collect();
        let relays: Vec<Role> = roles
            .iter()
            .copied()
            .filter(|role| matches!(role, Role::OrderRelay | Role::ShippingRelay))
            .collect();
        let kinds = [(FaultKind::LoseReply, lose), (FaultKind::Alter, alter)];
        let kinds = kinds.into_iter().flat_map(|(kind, count)| vec![kind; count]);
        let faults = kinds.enumerate().map(|(index, kind)| {
            let order = FIRST_LINE + rng.u32(..orders as u32);
            (relays[index % relays.len()], Fault { order, kind })
        });
        let faults = faults.collect();
        Self { kills, faults }
    }

    pub(super) fn kills(&self, role: Role) -> Vec<Kill> {
        of(role, &self.kills)
    }

    pub(super) fn faults(&self, role: Role) -> Vec<Fault> {
        of(role, &self.faults)
    }

    /// The orders that are altered on their way to the shipping service.
    pub(crate) fn altered(&self) -> HashSet<u32> {
        let faults = self.faults(Role::OrderRelay).into_iter();
        let altered = faults.filter(|fault| fault.kind == FaultKind::Alter);
        altered.map(|fault| fault.order).collect()
    }
}

fn of<T: Copy>(role: Role, all: &[(Role, T)]) -> Vec<T> {
    let those = all.iter().filter(|(owner, _)| *owner == role);
    those.map(|(_, one)| *one).collect()
}

/// How far the progress of a process goes. The order service places each order and, if anything is
/// reported back, follows it to its end.
pub(super) fn total(role: Role, delivery: Delivery, orders: usize) -> u64 {
    match (role, delivery) {
        (Role::OrderService, Delivery::EssentiallyOnce) => 2 * orders as u64,
        _ => orders as u64,
    }
}

/// Draws kills, spread over the work so that the process makes progress between them. It divides
/// the work into as many equal parts as there are kills, and draws one order in each. It leaves out
/// the last tenth, so that the process does not finish before the last kill.
fn draw_kills(rng: &mut fastrand::Rng, total: u64, kills: usize) -> Vec<Kill> {
    const LONGEST_DELAY_MICROS: u64 = 2_000;
    let reach = total - total / 10;
    let kills = kills as u64;
    (0..kills)
        .map(|kill| {
            let (from, to) = (kill * reach / kills, (kill + 1) * reach / kills);
            Kill {
                after: rng.u64(from..to.max(from + 1)),
                delay: Duration::from_micros(rng.u64(..=LONGEST_DELAY_MICROS)),
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(seed: u64, orders: usize, kills: usize) -> Plan {
        Plan::draw(Delivery::EssentiallyOnce, seed, orders, kills, 10, 10)
    }

    #[test]
    fn a_seed_repeats_the_plan() {
        assert_eq!(plan(7, 10_000, 40).kills, plan(7, 10_000, 40).kills);
        assert_ne!(plan(7, 10_000, 40).kills, plan(8, 10_000, 40).kills);
        assert_eq!(plan(7, 10_000, 40).faults, plan(7, 10_000, 40).faults);
    }

    #[test]
    fn kills_are_spread_over_all_processes_and_all_orders() {
        for delivery in Delivery::ALL {
            let plan = Plan::draw(delivery, 7, 10_000, 41, 0, 0);
            assert_eq!(plan.kills.len(), 41);
            for role in Role::of(delivery) {
                let kills = plan.kills(*role);
                let part = total(*role, delivery, 10_000) * 9 / 10;
                assert!(kills.len() >= 41 / Role::of(delivery).len());
                for (index, kill) in kills.iter().enumerate() {
                    let place = kill.after * kills.len() as u64 / part;
                    assert_eq!(place, index as u64, "{role:?}: {kills:?}");
                }
            }
        }
    }

    #[test]
    fn both_relays_get_faults_of_both_kinds() {
        let plan = plan(7, 10_000, 0);
        for role in [Role::OrderRelay, Role::ShippingRelay] {
            let faults = plan.faults(role);
            for kind in [FaultKind::LoseReply, FaultKind::Alter] {
                assert_eq!(faults.iter().filter(|fault| fault.kind == kind).count(), 5);
            }
        }
        let plan = Plan::draw(Delivery::AtLeastOnce, 7, 10_000, 0, 10, 10);
        assert_eq!(plan.faults(Role::OrderRelay).len(), 20);
    }

    #[test]
    fn more_kills_than_orders_fall_on_the_start() {
        let kills = plan(7, 5, 20).kills;
        assert_eq!(kills.len(), 20);
        assert!(kills.iter().all(|(_, kill)| kill.after < 10), "{kills:?}");
    }
}
