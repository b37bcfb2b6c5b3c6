//! Connections: finding the server, connecting, and replacing a connection in time.

mod address;
mod durability;
mod link;
mod live;
mod server;
#[cfg(feature = "tls")]
mod tls;

pub(crate) use self::{
    durability::durability,
    link::Link,
    live::{Connection, SharedConnection, this_runtime},
    server::Server,
};
