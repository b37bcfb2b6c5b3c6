//! Shared by the tests in this folder: private backends, and workers in separate processes.
//!
//! A test program with `harness = false` must call [`worker::main`] first, because it starts itself
//! again for its workers.

mod counter;
mod place;
mod store;
mod work;
pub mod worker;

pub use crate::{
    place::{Address, Backend, Place},
    store::Store,
};
