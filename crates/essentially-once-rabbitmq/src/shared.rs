//! Connections that many share, with a channel for each: to open one costs the broker more than a message does.

use std::sync::Arc;

use essentially_once::Error;
use lapin::ErrorKind;
use tokio::sync::{Mutex, MutexGuard};

use crate::{
    connection::{Channel, Connection},
    server::Server,
};

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
        let mut connections = self.alive(server).await?;
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

    /// A connection for a few channels that are soon closed again.
    pub(crate) async fn connection(&self, server: &Server) -> Result<Arc<Connection>, Error> {
        let mut connections = self.alive(server).await?;
        if let Some(connection) = connections.first() {
            return Ok(Arc::clone(connection));
        }
        let connection = Arc::new(server.open_connection().await?);
        connections.push(Arc::clone(&connection));
        Ok(connection)
    }

    async fn alive(&self, server: &Server) -> Result<MutexGuard<'_, Vec<Arc<Connection>>>, Error> {
        let mut connections = server.in_turn(self.connections.lock()).await?;
        connections.retain(|connection| connection.status().connected());
        Ok(connections)
    }

    /// Passes on what came of using the connection, and forgets it after an error: the client library never again lets the number of a channel
    /// be used that the broker has closed, though it gives it away again after two thousand others.
    pub(crate) async fn used<T>(&self, connection: &Arc<Connection>, came: Result<T, Error>) -> Result<T, Error> {
        if came.is_err() {
            self.forget(connection).await;
        }
        came
    }

    /// Gives no more channels of that connection away. Those who have one notice by themselves what is wrong with it.
    pub(crate) async fn forget(&self, broken: &Arc<Connection>) {
        let mut connections = self.connections.lock().await;
        connections.retain(|connection| !Arc::ptr_eq(connection, broken));
    }
}
