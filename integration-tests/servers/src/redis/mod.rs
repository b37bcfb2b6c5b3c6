//! Redis and Valkey.

mod builder;
mod cluster;
mod resp;
mod sentinel;
mod server;

pub use builder::RedisBuilder;
pub use cluster::RedisCluster;
pub use resp::Reply;
pub use sentinel::RedisSentinel;
pub use server::RedisServer;
