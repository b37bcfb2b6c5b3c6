//! RabbitMQ.

mod cluster;
mod epmd;
mod home;
mod node;

pub use cluster::RabbitCluster;
pub use node::RabbitNode;
