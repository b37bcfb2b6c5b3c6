//! Private servers for tests: each in a temporary folder, on free ports of 127.0.0.1, to be killed, frozen and started again
//! at will, and cut off by a [`Proxy`]. They block, and so can be used under any runtime or none.
//!
//! Nothing is left behind, even if the process that owns a server is killed: see `folder.rs`.

use std::{env, path::PathBuf};

mod folder;
mod port;
mod process;
mod proxy;
mod rabbitmq;
mod redis;

pub use proxy::{Cut, Proxy};
pub use rabbitmq::{RabbitCluster, RabbitNode};
pub use redis::{RedisBuilder, RedisCluster, RedisSentinel, RedisServer, Reply};

/// What went wrong, on what, in words.
pub type Error = Box<dyn std::error::Error + Send + Sync>;

/// The `redis-server` (or Valkey) to run: the value of `ESSENTIALLY_ONCE_REDIS_SERVER`, which `cargo xtask test` sets.
///
/// # Errors
/// The reason to show for tests that cannot be run without it.
pub fn redis_server() -> Result<PathBuf, String> {
    program("ESSENTIALLY_ONCE_REDIS_SERVER", "redis-server")
}

/// The `rabbitmq-server` to run: the value of `ESSENTIALLY_ONCE_RABBITMQ_SERVER`, which `cargo xtask test` sets. `rabbitmqctl` stands
/// beside it.
///
/// # Errors
/// The reason to show for tests that cannot be run without it.
pub fn rabbitmq_server() -> Result<PathBuf, String> {
    program("ESSENTIALLY_ONCE_RABBITMQ_SERVER", "rabbitmq-server")
}

fn program(variable: &str, name: &str) -> Result<PathBuf, String> {
    match env::var_os(variable) {
        Some(path) if !path.is_empty() => Ok(path.into()),
        _ => Err(format!(
            "needs {name}: run `cargo xtask test`, or set {variable} to its path"
        )),
    }
}
