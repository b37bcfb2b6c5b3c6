//! What the tests of this folder share: backends in private places, and workers that are processes of their own.
//!
//! A test program with `harness = false` calls [`worker::main`] first: it starts itself again as its workers.

mod counter;
mod place;
mod store;
pub mod worker;

pub use crate::{
    place::{Address, Backend, Place},
    store::Store,
};
