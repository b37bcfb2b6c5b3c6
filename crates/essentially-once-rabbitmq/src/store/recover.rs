//! Loads a handle's state: the newest snapshot and the entries after it.

use std::sync::Arc;

use essentially_once::Error;
use tokio::{
    sync::Mutex,
    time::{Instant, sleep},
};

use super::{
    changelog::{Changelog, Replica},
    cover::{LENGTH, OVERHEAD, SEGMENT},
    fold::Fold,
    names,
    snapshots::retention,
    state::State,
};
use crate::{
    connection::Connection,
    stream::{self, Range},
    tail::{BEHIND, Tail},
};

impl Changelog {
    /// Reads the newest snapshot and the entries after it.
    pub(super) async fn load(&self) -> Result<Replica, Error> {
        // Not a shared connection: a missing snapshot stream is an error on it.
        let connection = Arc::new(self.server.open_connection().await?);
        self.refuse_old_name(&connection).await?;
        let arguments = retention(LENGTH as i64, SEGMENT as i64);
        stream::declare(&self.server, &connection, &self.stream, arguments).await?;
        let deadline = Instant::now() + self.server.options.timeout;
        let (range, size, target, mut fold) = loop {
            let ends = stream::ends(&self.server, &connection, &self.stream).await?;
            let (range, size) = (Range::of(ends.as_ref()), ends.map_or(0, |ends| ends.size()));
            let found = self.snapshots.newest(&connection, range.first).await?;
            // A snapshot never goes to the stream that holds the newest one.
            let target = found.as_ref().map_or(0, |found| 1 - found.stream);
            let fold = found.map(|found| found.fold).unwrap_or_default();
            match self.check_reach(&fold, range) {
                // A lagging replica has lost nothing.
                Err(_) if Instant::now() < deadline => sleep(BEHIND).await,
                checked => break checked.map(|()| (range, size, target, fold))?,
            }
        };
        let channel = self.server.reading.channel(&self.server, || self.reading()).await?;
        let connection = Arc::clone(&channel.0);
        let attached = Tail::attach(&self.server, channel, &self.stream, fold.offset, size).await;
        let tail = self.server.reading.used(&connection, attached).await?;
        let mut replica = Replica {
            tail,
            fresh: false,
            read: 0,
            cover: Arc::default(),
            target: Arc::new(Mutex::new(Some(target))),
        };
        while fold.offset < range.end {
            let next = async {
                replica
                    .tail
                    .next(usize::MAX)
                    .await
                    .map_err(|error| self.read_error(error))
            };
            for delivered in self.within_limit(next).await? {
                replica.read += delivered.body.len() as u64 + OVERHEAD;
                self.take(&mut fold, delivered, 0)?;
            }
        }
        *self.fold_mut() = fold;
        Ok(replica)
    }

    /// A stream under the name that version 0.1 would have used may hold this consumer's position,
    /// or belong to another consumer.
    async fn refuse_old_name(&self, connection: &Connection) -> Result<(), Error> {
        let (prefix, consumer) = (&self.server.options.prefix, &self.consumer);
        let Some(old) = names::old_changelog(prefix, consumer) else {
            return Ok(());
        };
        if !stream::exists(&self.server, connection, &old).await? {
            return Ok(());
        }
        let open = match names::parse(&old) {
            Some((prefix, consumer, _)) => {
                format!("open it as consumer {consumer} with prefix {prefix}, which is the same stream")
            }
            None => "read it with version 0.1".into(),
        };
        Err(Error::failed(
            self.on("read"),
            format!(
                "stream {old} exists: version 0.1 kept consumer {consumer} with prefix {prefix} under that name; {open}, or delete it \
                 if it is not needed, or choose another prefix if another consumer uses it"
            ),
        ))
    }

    fn check_reach(&self, fold: &Fold<State>, range: Range) -> Result<(), Error> {
        let (at, first, end) = (fold.offset, range.first, range.end);
        let source = if at == 0 {
            "no snapshot is complete".into()
        } else {
            format!("the newest snapshot ends at {at}")
        };
        if at < first {
            return Err(self.lost(format!(
                "{source}, and the changelog begins at {first}; a policy may shorten it, or a snapshot is damaged"
            )));
        }
        if at > end {
            return Err(self.lost(format!(
                "{source}, and the changelog ends at {end}; it was created again, or the broker lost its tail"
            )));
        }
        Ok(())
    }
}
