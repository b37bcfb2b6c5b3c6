//! The test rig: starts the four processes and kills them, loses replies on the bus, and alters
//! what is sent over it. A real system has none of this.

mod customers;
mod leash;
mod life;
mod messenger;
mod plan;
mod race;

pub(crate) use self::{
    leash::Leash,
    life::{Task, run_process},
    messenger::Messenger,
    plan::{Fault, FaultKind, Plan},
    race::{Race, Toll},
};
