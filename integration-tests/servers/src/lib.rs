//! Private servers for tests: each in a temporary folder, on free ports of 127.0.0.1, to be killed, frozen and started again
//! at will, and cut off by a [`Proxy`]. They block, and so can be used under any runtime or none.
//!
//! Nothing is left behind, even if the process that owns a server is killed: see `folder.rs`.

use std::{env, path::PathBuf};

mod asking;
mod authority;
mod folder;
mod port;
mod process;
mod rabbitmq;
mod redis;

pub use asking::{eventually, insist, insist_and_count};
pub use authority::{Authority, Pair};
/// The kit's own, under the names that these tests have always used.
pub use essentially_once_testkit::{Cut, Proxy};
pub use rabbitmq::{RabbitCluster, RabbitNode};
pub use redis::{RedisBuilder, RedisCluster, RedisSentinel, RedisServer, Reply};

/// What went wrong, on what, in words.
pub type Error = Box<dyn std::error::Error + Send + Sync>;

/// The `redis-server` (or Valkey) to run: the value of `ESSENTIALLY_ONCE_REDIS_SERVER`, which `cargo xtask test` sets.
///
/// # Errors
/// The reason to show for tests that cannot be run without it.
pub fn redis_server() -> Result<PathBuf, String> {
    const VARIABLE: &str = "ESSENTIALLY_ONCE_REDIS_SERVER";
    let missing = || format!("needs redis-server: run `cargo xtask test`, or set {VARIABLE} to its path");
    program(VARIABLE).ok_or_else(missing)
}

/// The `rabbitmq-server` to run, with `rabbitmqctl` beside it: the value of `ESSENTIALLY_ONCE_RABBITMQ_SERVER`, which `cargo xtask test`
/// sets.
///
/// # Errors
/// The reason to show for tests that cannot be run without it.
pub fn rabbitmq_server() -> Result<PathBuf, String> {
    const VARIABLE: &str = "ESSENTIALLY_ONCE_RABBITMQ_SERVER";
    program(VARIABLE)
        .ok_or_else(|| format!("needs rabbitmq-server: run `cargo xtask test`, or set {VARIABLE} to its path"))
}

fn program(variable: &str) -> Option<PathBuf> {
    let path = env::var_os(variable).filter(|path| !path.is_empty());
    path.map(PathBuf::from)
}
