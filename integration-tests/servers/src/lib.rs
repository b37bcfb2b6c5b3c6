//! Private servers for tests. Each has a temporary folder and free ports of 127.0.0.1. Tests can
//! kill, freeze and restart it at will, and cut its connections with a [`Proxy`]. The calls block,
//! so they work under any runtime or none.
//!
//! The adapters' tests also share what they do with a server: see [`kills`], [`cuts`] and
//! [`ledger`].
//!
//! Nothing is left behind, even if the process that owns a server is killed. See `folder.rs`.

use std::{env, path::PathBuf};

mod asking;
mod authority;
mod backend;
mod case;
pub mod cuts;
mod folder;
mod kafka;
pub mod kills;
pub mod ledger;
mod owner;
mod port;
mod postgres;
mod process;
mod processes;
mod rabbitmq;
mod redis;
mod stopped;

pub use asking::{eventually, insist, insist_and_count};
pub use authority::{Authority, Pair};
pub use backend::{Backend, Server};
pub use case::{Case, LIMIT, Outcome, add_cases, run_cases};
/// The kit's own proxy, re-exported for these tests.
pub use essentially_once_testkit::{Cut, Proxy};
pub use kafka::KafkaServer;
pub use postgres::{PostgresBuilder, PostgresServer};
pub use rabbitmq::{RabbitCluster, RabbitNode};
pub use redis::{RedisBuilder, RedisCluster, RedisSentinel, RedisServer, Reply};
pub use stopped::wait_until_stopped;

/// What failed, and on what.
pub type Error = Box<dyn std::error::Error + Send + Sync>;

/// The `redis-server` (or Valkey) to run: the value of `ESSENTIALLY_ONCE_REDIS_SERVER`, which
/// `cargo xtask test` sets.
///
/// # Errors
/// The reason to show for tests that cannot run without it.
pub fn redis_server() -> Result<PathBuf, String> {
    const VARIABLE: &str = "ESSENTIALLY_ONCE_REDIS_SERVER";
    let missing = || format!("needs redis-server: run `cargo xtask test`, or set {VARIABLE} to its path");
    program(VARIABLE).ok_or_else(missing)
}

/// The `rabbitmq-server` to run, with `rabbitmqctl` in the same folder: the value of
/// `ESSENTIALLY_ONCE_RABBITMQ_SERVER`, which `cargo xtask test` sets.
///
/// # Errors
/// The reason to show for tests that cannot run without it.
pub fn rabbitmq_server() -> Result<PathBuf, String> {
    const VARIABLE: &str = "ESSENTIALLY_ONCE_RABBITMQ_SERVER";
    program(VARIABLE)
        .ok_or_else(|| format!("needs rabbitmq-server: run `cargo xtask test`, or set {VARIABLE} to its path"))
}

/// The `noida-db` to run, as a broker that speaks Kafka's protocol: the value of
/// `ESSENTIALLY_ONCE_KAFKA_SERVER`, which `cargo xtask test` sets.
///
/// # Errors
/// The reason to show for tests that cannot run without it.
pub fn kafka_server() -> Result<PathBuf, String> {
    const VARIABLE: &str = "ESSENTIALLY_ONCE_KAFKA_SERVER";
    let missing = || format!("needs noida-db: run `cargo xtask test`, or set {VARIABLE} to its path");
    program(VARIABLE).ok_or_else(missing)
}

/// The folder of the `postgres` to run, with `initdb`, `psql` and `pg_basebackup`: the value of
/// `ESSENTIALLY_ONCE_POSTGRES_BIN`, which `cargo xtask test` sets.
///
/// # Errors
/// The reason to show for tests that cannot run without it.
pub fn postgres_bin() -> Result<PathBuf, String> {
    const VARIABLE: &str = "ESSENTIALLY_ONCE_POSTGRES_BIN";
    let missing = || format!("needs PostgreSQL: run `cargo xtask test`, or set {VARIABLE} to the folder of `postgres`");
    program(VARIABLE).ok_or_else(missing)
}

fn program(variable: &str) -> Option<PathBuf> {
    let path = env::var_os(variable).filter(|path| !path.is_empty());
    path.map(PathBuf::from)
}
