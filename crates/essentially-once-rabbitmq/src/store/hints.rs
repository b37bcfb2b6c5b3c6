//! Publishes the owner's hints: marks that no rule depends on.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use essentially_once::Error;

use super::{entry::encode_mark, rule::Token, scope::Scope};
use crate::connection::{
    self,
    publisher::{Message, Publisher},
};

pub(super) struct Hints {
    scope: Arc<Scope>,
    publisher: Arc<Publisher>,
    /// Whether a beat is in progress.
    is_beating: Arc<AtomicBool>,
}

/// A beat in progress.
pub(super) struct Beating(Arc<AtomicBool>);

impl Drop for Beating {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Relaxed);
    }
}

impl Hints {
    pub(super) fn new(scope: &Arc<Scope>, publisher: &Arc<Publisher>) -> Self {
        Self {
            scope: Arc::clone(scope),
            publisher: Arc::clone(publisher),
            is_beating: Arc::default(),
        }
    }

    /// Begins a beat, unless one is in progress.
    pub(super) fn begin_beat(&self) -> Option<Beating> {
        let is_beating = self.is_beating.swap(true, Ordering::Relaxed);
        (!is_beating).then(|| Beating(Arc::clone(&self.is_beating)))
    }

    /// Publishes a mark in a task of its own. Consumers drop calls that beat, which would spoil the
    /// channel for the next commit.
    pub(super) async fn publish(&self, token: Token, beating: Option<Beating>) -> Result<(), Error> {
        let (publisher, mark) = (Arc::clone(&self.publisher), Message::new(encode_mark(token)));
        let publishing = connection::spawn(async move {
            let _beating = beating;
            publisher.publish(vec![mark]).await
        });
        let failed = |error: io::Error| Error::unavailable(self.scope.on("write for"), error);
        let published = publishing.map_err(failed)?.await;
        published.map_err(|error| failed(io::Error::other(error)))?
    }
}
