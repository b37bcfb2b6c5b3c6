//! Connections: finding the server, connecting, and using a connection again.

mod address;
mod durability;
mod pool;
mod session;
#[cfg(feature = "tls")]
mod tls;

pub(crate) use self::{
    durability::{durability, settings},
    pool::{Lease, Pool},
    session::{Param, Part, Session},
};
