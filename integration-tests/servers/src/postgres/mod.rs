//! PostgreSQL.

mod builder;
mod data;
mod server;

pub use builder::PostgresBuilder;
pub use server::PostgresServer;
