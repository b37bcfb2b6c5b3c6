//! Connections that many consumers of a store share, with a channel for each.

use std::sync::Arc;

use essentially_once::Error;
use lapin::{Channel, Connection, ErrorKind};
use tokio::sync::Mutex;

use crate::server::Server;

/// Connections for one purpose. There is more than one only where the broker allows no more channels on the others.
#[derive(Default)]
pub(crate) struct Shared {
    connections: Mutex<Vec<Arc<Connection>>>,
}

impl Shared {
    /// A channel, and the connection that it is on.
    pub(crate) async fn channel(
        &self,
        server: &Server,
        action: impl Fn() -> String,
    ) -> Result<(Arc<Connection>, Channel), Error> {
        let mut connections = self.connections.lock().await;
        connections.retain(|connection| connection.status().connected());
        for connection in connections.iter() {
            let created = server.reply(&action, async {
                match connection.create_channel().await {
                    Err(error) if matches!(error.kind(), ErrorKind::ChannelsLimitReached) => Ok(None),
                    created => created.map(Some),
                }
            });
            match created.await {
                Ok(Some(channel)) => return Ok((Arc::clone(connection), channel)),
                Ok(None) => {}
                Err(error) => {
                    let broken = Arc::clone(connection);
                    connections.retain(|connection| !Arc::ptr_eq(connection, &broken));
                    return Err(error);
                }
            }
        }
        let connection = Arc::new(server.open_connection().await?);
        let channel = server.reply(&action, connection.create_channel()).await?;
        connections.push(Arc::clone(&connection));
        Ok((connection, channel))
    }

    /// Gives no more channels of that connection away. Those who have one notice by themselves what is wrong with it.
    pub(crate) async fn forget(&self, broken: &Arc<Connection>) {
        let mut connections = self.connections.lock().await;
        connections.retain(|connection| !Arc::ptr_eq(connection, broken));
    }
}
