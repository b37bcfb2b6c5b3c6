//! A Redis cluster.

use super::RedisServer;
use crate::{
    Error,
    process::{START_LIMIT, wait_until},
};

const SLOTS: usize = 16_384;

/// A cluster of masters that together serve all slots.
pub struct RedisCluster {
    nodes: Vec<RedisServer>,
}

impl RedisCluster {
    /// Starts `nodes` durable nodes, and returns when each of them reports a complete cluster.
    ///
    /// # Errors
    /// If a node cannot start (it needs Redis 7 or Valkey), or if they do not find each other
    /// within a minute.
    pub fn start(nodes: usize) -> Result<Self, Error> {
        let nodes = (0..nodes)
            .map(|_| RedisServer::durable().cluster().start())
            .collect::<Result<Vec<_>, _>>()?;
        for (index, node) in nodes.iter().enumerate() {
            let slots = index * SLOTS / nodes.len()..(index + 1) * SLOTS / nodes.len();
            let (first, last) = (slots.start.to_string(), (slots.end - 1).to_string());
            // Set explicitly, because nodes with equal epochs would first have to resolve them.
            node.command(&["CLUSTER", "SET-CONFIG-EPOCH", &(index + 1).to_string()])?;
            node.command(&["CLUSTER", "ADDSLOTSRANGE", &first, &last])?;
        }
        // Every node meets every other. Learning about a node from a third one takes seconds.
        for (index, node) in nodes.iter().enumerate() {
            for other in &nodes[index + 1..] {
                let (port, bus) = (other.port().to_string(), other.bus_port().to_string());
                node.command(&["CLUSTER", "MEET", "127.0.0.1", &port, &bus])?;
            }
        }
        let cluster = Self { nodes };
        wait_until(
            "every node of the Redis cluster says cluster_state:ok",
            START_LIMIT,
            || cluster.is_ok(),
        )?;
        Ok(cluster)
    }

    /// The nodes, in the order of their slots.
    pub fn nodes(&self) -> &[RedisServer] {
        &self.nodes
    }

    /// Whether every node knows all others and sees all slots served.
    ///
    /// # Errors
    /// If a node does not answer.
    pub fn is_ok(&self) -> Result<bool, Error> {
        let size = self.nodes.len().to_string();
        for node in &self.nodes {
            let info = node.command(&["CLUSTER", "INFO"])?;
            if info.line("cluster_state") != Some("ok") || info.line("cluster_known_nodes") != Some(&size) {
                return Ok(false);
            }
        }
        Ok(true)
    }
}
