//! Connections shared by many, with a channel for each. Opening a connection costs the broker more
//! than a message does.

use std::sync::Arc;

use essentially_once::Error;
use lapin::ErrorKind;
use tokio::sync::{Mutex, MutexGuard};

use super::{Channel, Connection, endpoint::Endpoint};

/// Connections for one purpose. There is more than one only if the broker allows no more channels
/// on the others.
pub(crate) struct Connections {
    endpoint: Arc<Endpoint>,
    connections: Mutex<Vec<Arc<Connection>>>,
}

impl Connections {
    pub(crate) fn new(endpoint: Arc<Endpoint>) -> Self {
        Self {
            endpoint,
            connections: Mutex::default(),
        }
    }

    /// Opens a channel. Also returns its connection.
    pub(crate) async fn channel(&self, action: impl Fn() -> String) -> Result<(Arc<Connection>, Channel), Error> {
        let mut connections = self.alive().await?;
        for connection in connections.iter() {
            let created = self.endpoint.reply(&action, async {
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
        let connection = Arc::new(self.endpoint.open_connection().await?);
        let channel = self.endpoint.reply(&action, connection.create_channel()).await?;
        connections.push(Arc::clone(&connection));
        Ok((connection, channel))
    }

    /// A connection for a few short-lived channels.
    pub(crate) async fn connection(&self) -> Result<Arc<Connection>, Error> {
        let mut connections = self.alive().await?;
        if let Some(connection) = connections.first() {
            return Ok(Arc::clone(connection));
        }
        let connection = Arc::new(self.endpoint.open_connection().await?);
        connections.push(Arc::clone(&connection));
        Ok(connection)
    }

    async fn alive(&self) -> Result<MutexGuard<'_, Vec<Arc<Connection>>>, Error> {
        let mut connections = self.endpoint.in_turn(self.connections.lock()).await?;
        connections.retain(|connection| connection.status().connected());
        Ok(connections)
    }

    /// Returns the result of using the connection, and forgets the connection after an error. lapin
    /// keeps handing out channel numbers that the broker has closed, and they never work again.
    pub(crate) async fn used<T>(&self, connection: &Arc<Connection>, result: Result<T, Error>) -> Result<T, Error> {
        if result.is_err() {
            self.forget(connection).await;
        }
        result
    }

    /// Opens no more channels on that connection. Those who use one of its channels notice the
    /// error themselves.
    pub(crate) async fn forget(&self, broken: &Arc<Connection>) {
        let mut connections = self.connections.lock().await;
        connections.retain(|connection| !Arc::ptr_eq(connection, broken));
    }
}
