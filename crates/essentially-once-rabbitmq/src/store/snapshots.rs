//! The two streams that hold snapshots, used in turns.
//!
//! A snapshot is never written to the stream that holds the newest one. Incomplete snapshots, say
//! of a process that crashes over and over, can therefore push only older snapshots out of their
//! stream.

use std::sync::Arc;

use essentially_once::{ConsumerId, Error};

use super::{
    image::{Added, Assembly, CHUNK, CHUNK_HEAD, Chunk, Image, Whole},
    names::{self, Kind},
    rule::Fold,
    state::State,
    wire::Decoded,
};
use crate::connection::{
    Connection,
    publisher::{Message, Publisher},
    server::Server,
    stream::{self, Range, retention},
    tail::Tail,
};

/// Room for a few snapshots of the largest state, since several processes may write at the same
/// time.
const LENGTH: i64 = 1024 * 1024 * 1024;
const SEGMENT: i64 = 64 * 1024 * 1024;

/// With smaller chunks, a snapshot would be mostly headers.
const LEAST_CHUNK: usize = 1024;

/// Chunks that are published before the first is confirmed.
const BATCH: usize = 8;

/// The snapshots of one consumer.
pub(super) struct Snapshots {
    server: Arc<Server>,
    streams: [String; 2],
}

/// A complete snapshot, and the stream that holds it.
pub(super) struct Found {
    pub(super) fold: Fold<State>,
    pub(super) stream: usize,
}

/// The content of a range of a snapshot stream.
#[derive(Default)]
struct Scan {
    /// The newest complete snapshot.
    newest: Option<Fold<State>>,
    /// The number of chunks of the longest snapshot of which any were seen.
    longest: u32,
    /// The highest changelog offset of any chunk.
    reach: u64,
    /// A newer snapshot that must be read alone: its id, its changelog offset, and where it begins.
    scattered: Option<(u128, u64, u64)>,
}

impl Scan {
    fn is_newer(&self, offset: u64) -> bool {
        self.newest.as_ref().is_none_or(|newest| offset > newest.offset)
    }
}

impl Snapshots {
    pub(super) fn new(server: &Arc<Server>, consumer: &ConsumerId) -> Self {
        let prefix = &server.options.prefix;
        Self {
            server: Arc::clone(server),
            streams: [Kind::SnapshotsA, Kind::SnapshotsB].map(|kind| names::name(prefix, consumer, kind)),
        }
    }

    /// The newest complete snapshot. One below `wanted` is returned only if neither stream has a
    /// newer one.
    pub(super) async fn newest(&self, connection: &Arc<Connection>, wanted: u64) -> Result<Option<Found>, Error> {
        let mut ends = Vec::new();
        for (stream, name) in self.streams.iter().enumerate() {
            let Some(range) = self.range(connection, name).await? else {
                continue;
            };
            let last = self
                .scan(
                    connection,
                    name,
                    range.end.saturating_sub(1).max(range.first),
                    range.end,
                )
                .await?;
            ends.push((last.reach, stream, range));
        }
        ends.sort_by_key(|(reach, ..)| std::cmp::Reverse(*reach));
        let mut newest: Option<Found> = None;
        for (reach, stream, range) in ends {
            // A snapshot may be large, so the other stream's is read only if needed.
            let suffices = |found: &Found| found.fold.offset >= wanted.max(reach);
            if newest.as_ref().is_some_and(suffices) {
                break;
            }
            if let Some(fold) = self.newest_in(connection, &self.streams[stream], range, wanted).await?
                && newest.as_ref().is_none_or(|newest| fold.offset > newest.fold.offset)
            {
                newest = Some(Found { fold, stream });
            }
        }
        Ok(newest)
    }

    /// As [`newest`](Self::newest), with any offset.
    pub(super) async fn find(&self) -> Result<Option<Found>, Error> {
        let connection = Arc::new(self.server.open_connection().await?);
        self.newest(&connection, 0).await
    }

    /// The range of the stream; `None` if it does not exist. If the broker is wrong about that,
    /// nothing is lost silently: the changelog is then complete, or its missing entries are
    /// detected.
    async fn range(&self, connection: &Connection, name: &str) -> Result<Option<Range>, Error> {
        match stream::require(&self.server, connection, name).await {
            Ok(()) => stream::bounds(&self.server, connection, name).await.map(Some),
            Err(Error::Failed { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Reads the stream's last message, and then from further and further back.
    async fn newest_in(
        &self,
        connection: &Arc<Connection>,
        name: &str,
        range: Range,
        wanted: u64,
    ) -> Result<Option<Fold<State>>, Error> {
        let mut back = 1;
        loop {
            let from = range.end.saturating_sub(back).max(range.first);
            let Scan { newest, longest, .. } = self.scan(connection, name, from, range.end).await?;
            if from == range.first || newest.as_ref().is_some_and(|fold| fold.offset >= wanted) {
                return Ok(newest);
            }
            back = (back * 4).max(u64::from(longest) + 1);
        }
    }

    async fn scan(&self, connection: &Arc<Connection>, name: &str, from: u64, end: u64) -> Result<Scan, Error> {
        let mut scan = Scan::default();
        if from == end {
            return Ok(scan);
        }
        self.scan_into(&mut scan, Assembly::default(), connection, name, from, end)
            .await?;
        if let Some((id, _, from)) = scan.scattered.take() {
            self.scan_into(&mut scan, Assembly::only(id), connection, name, from, end)
                .await?;
        }
        Ok(scan)
    }

    async fn scan_into(
        &self,
        scan: &mut Scan,
        mut assembly: Assembly,
        connection: &Arc<Connection>,
        name: &str,
        from: u64,
        end: u64,
    ) -> Result<(), Error> {
        let mut tail = Tail::open(&self.server, connection, name, from).await?;
        let mut next = from;
        while next < end {
            let limit = self.server.timeout;
            let delivered = tokio::time::timeout(limit, tail.next(usize::MAX))
                .await
                .unwrap_or_else(|_| {
                    let why = format!("no message arrived within {limit:?}");
                    Err(Error::unavailable(self.server.on(format!("read stream {name}")), why))
                })?;
            for delivered in delivered {
                next = delivered.offset + 1;
                let added = Chunk::decode(delivered.body.into()).map(|chunk| {
                    scan.longest = scan.longest.max(chunk.count);
                    scan.reach = scan.reach.max(chunk.offset);
                    assembly.add(delivered.offset, chunk)
                });
                let read = match added {
                    Ok(Added::Whole(whole)) if scan.is_newer(whole.offset) => self.read(whole).await?.map(Some),
                    Ok(Added::Scattered { id, offset, from }) if scan.is_newer(offset) => {
                        if scan.scattered.is_none_or(|(_, other, _)| offset > other) {
                            scan.scattered = Some((id, offset, from));
                        }
                        Ok(None)
                    }
                    Ok(_) => Ok(None),
                    Err(why) => Err(why),
                };
                match read {
                    Ok(Some(fold)) => {
                        scan.scattered.take_if(|(_, offset, _)| *offset <= fold.offset);
                        scan.newest = Some(fold);
                    }
                    Ok(None) => {}
                    // An older snapshot or the whole changelog is enough.
                    Err(why) => tracing::warn!(stream = name, offset = delivered.offset, why, "ignored a snapshot"),
                }
            }
        }
        Ok(())
    }

    /// A large snapshot takes a while to read, so this must not block the runtime.
    async fn read(&self, whole: Whole) -> Result<Decoded<Fold<State>>, Error> {
        let reading = tokio::task::spawn_blocking(move || whole.read()).await;
        reading.map_err(|error| Error::unavailable(self.server.on("read a snapshot"), error))
    }

    /// Writes a snapshot to that stream. It counts once the last chunk is confirmed. Most consumers
    /// never need these streams, so they are declared here.
    pub(super) async fn write(&self, stream: usize, image: &Image) -> Result<(), Error> {
        let name = &self.streams[stream];
        let connection = self.server.open_connection().await?;
        stream::declare(&self.server, &connection, name, retention(LENGTH, SEGMENT)).await?;
        // Not on a shared connection: commits would wait behind megabytes.
        let publisher = Publisher::new(Arc::clone(&self.server), name.clone());
        loop {
            let size = self.chunk_size();
            match publish_chunks(&publisher, image, size).await {
                // The broker has refused the first chunk and named its limit.
                Err(_) if self.chunk_size() < size => {}
                done => return done,
            }
        }
    }

    fn chunk_size(&self) -> usize {
        let room = self.server.message_limit().saturating_sub(CHUNK_HEAD);
        room.clamp(LEAST_CHUNK, CHUNK)
    }
}

async fn publish_chunks(publisher: &Publisher, image: &Image, size: usize) -> Result<(), Error> {
    let mut chunks = image.chunks(size).map(Message::new);
    loop {
        let batch: Vec<_> = chunks.by_ref().take(BATCH).collect();
        if batch.is_empty() {
            return Ok(());
        }
        publisher.publish(batch).await?;
    }
}

const _: () = assert!(CHUNK * BATCH <= 8 * 1024 * 1024);
