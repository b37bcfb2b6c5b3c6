//! RabbitMQ.

mod cluster;
mod epmd;
mod node;

pub use cluster::RabbitCluster;
pub use node::RabbitNode;
