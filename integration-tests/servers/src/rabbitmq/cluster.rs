//! A cluster of several nodes.

use std::{sync::Arc, thread};

use super::{
    epmd::Epmd,
    node::{LIMIT, RabbitNode},
};
use crate::Error;

/// Nodes that share queues, streams and users.
pub struct RabbitCluster {
    nodes: Vec<RabbitNode>,
}

impl RabbitCluster {
    /// Starts `nodes` nodes at once, and returns when all of them run as one cluster.
    ///
    /// # Errors
    /// As for [`RabbitNode::start`], or if the nodes do not find each other within two minutes.
    pub fn start(nodes: usize) -> Result<Self, Error> {
        let epmd = Arc::new(Epmd::start()?);
        let mut nodes = (0..nodes)
            .map(|_| RabbitNode::new(&epmd))
            .collect::<Result<Vec<_>, _>>()?;
        let names: Vec<String> = nodes.iter().map(|node| node.name().to_owned()).collect();
        for node in &mut nodes {
            node.configure(&names, "")?;
        }
        thread::scope(|scope| {
            let starts: Vec<_> = nodes.iter().map(|node| scope.spawn(|| node.restart())).collect();
            let mut starts = starts.into_iter().map(|start| start.join());
            starts.try_for_each(|start| start.unwrap_or_else(|_| Err("starting a node panicked".into())))
        })?;
        let cluster = Self { nodes };
        cluster.wait_complete()?;
        Ok(cluster)
    }

    /// The nodes.
    pub fn nodes(&self) -> &[RabbitNode] {
        &self.nodes
    }

    /// Waits until the first node sees all others run.
    ///
    /// # Errors
    /// If the first node does not answer, or does not see the others within two minutes.
    pub fn wait_complete(&self) -> Result<(), Error> {
        if let Some(first) = self.nodes.first() {
            let limit = LIMIT.as_secs().to_string();
            first.ctl(&["await_online_nodes", &self.nodes.len().to_string(), "--timeout", &limit])?;
        }
        Ok(())
    }
}
