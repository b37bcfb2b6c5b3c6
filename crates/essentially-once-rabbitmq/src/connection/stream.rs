//! Declares a stream and asks what it holds.

use std::{collections::BTreeMap, time::Duration};

use essentially_once::Error;
use lapin::{
    options::{BasicAckOptions, BasicQosOptions, QueueDeclareOptions},
    types::{AMQPValue, FieldTable},
};
use tokio::time::timeout;

use super::{
    Channel, Connection,
    deliveries::{Delivered, Deliveries, attach},
    server::Server,
};
use crate::error::is_not_found;

/// How many messages of the last chunk are requested at a time. RabbitMQ 3 sends the whole chunk
/// regardless.
const STEP: u16 = 64;

/// The argument that limits a stream's length in bytes.
pub(crate) const MAX_LENGTH: &str = "x-max-length-bytes";

/// The argument that limits the size of its segments.
pub(crate) const MAX_SEGMENT: &str = "x-stream-max-segment-size-bytes";

/// The offsets that a stream holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Range {
    /// The offset of the first message; `end` if there is none.
    pub(crate) first: u64,
    /// One past the offset of the last message.
    pub(crate) end: u64,
}

/// A stream's first and last messages.
#[derive(Debug)]
pub(crate) struct Ends {
    pub(crate) first: Delivered,
    pub(crate) last: Delivered,
}

impl Range {
    /// The range of a stream with these ends.
    pub(crate) fn of(ends: Option<&Ends>) -> Self {
        ends.map_or(Self { first: 0, end: 0 }, |ends| Self {
            first: ends.first.offset,
            end: ends.last.offset + 1,
        })
    }
}

impl Ends {
    /// The bytes of the larger one.
    pub(crate) fn size(&self) -> usize {
        self.first.size().max(self.last.size())
    }
}

/// Creates the stream unless it exists with the same arguments: those given, and the replicas of
/// the options.
pub(crate) async fn declare(
    server: &Server,
    connection: &Connection,
    name: &str,
    arguments: FieldTable,
) -> Result<(), Error> {
    let mut wanted: BTreeMap<_, _> = arguments.inner().clone();
    wanted.insert("x-queue-type".into(), AMQPValue::LongString("stream".into()));
    if let Some(replicas) = server.options.replicas {
        wanted.insert("x-initial-cluster-size".into(), AMQPValue::LongInt(replicas.into()));
    }
    let options = QueueDeclareOptions::durable();
    ask_for(server, connection, name, options, wanted.into()).await
}

/// The arguments for retention by length. The broker removes whole segments, so small ones make it
/// exact.
pub(crate) fn retention(length: i64, segment: i64) -> FieldTable {
    let mut arguments = FieldTable::default();
    arguments.insert(MAX_LENGTH.into(), AMQPValue::LongLongInt(length));
    arguments.insert(MAX_SEGMENT.into(), AMQPValue::LongLongInt(segment));
    arguments
}

/// Fails unless a queue of that name exists.
pub(crate) async fn require(server: &Server, connection: &Connection, name: &str) -> Result<(), Error> {
    let options = QueueDeclareOptions::default().passive();
    ask_for(server, connection, name, options, FieldTable::default()).await
}

/// Whether a queue of that name exists.
pub(crate) async fn exists(server: &Server, connection: &Connection, name: &str) -> Result<bool, Error> {
    let asking = async {
        let channel = connection.create_channel().await?;
        let options = QueueDeclareOptions::default().passive();
        match channel.queue_declare(name.into(), options, FieldTable::default()).await {
            Err(error) if is_not_found(&error) => Ok(false),
            declared => declared.map(|_| true),
        }
    };
    server.reply(|| format!("look for stream {name}"), asking).await
}

async fn ask_for(
    server: &Server,
    connection: &Connection,
    name: &str,
    options: QueueDeclareOptions,
    arguments: FieldTable,
) -> Result<(), Error> {
    let verb = if options.passive { "look for" } else { "declare" };
    let action = || format!("{verb} stream {name}");
    // The broker closes the channel if the answer is no.
    let declared = server.reply(action, async {
        let channel = connection.create_channel().await?;
        channel.queue_declare(name.into(), options, arguments).await
    });
    declared.await.map(drop)
}

/// The offsets that the stream holds now, as far as the asked replica knows.
pub(crate) async fn bounds(server: &Server, connection: &Connection, name: &str) -> Result<Range, Error> {
    Ok(Range::of(ends(server, connection, name).await?.as_ref()))
}

/// The stream's first and last messages; `None` if it never held any.
///
/// AMQP has no request for them. We attach at the first and at the last chunk, and take what the
/// broker sends. If retention has left only the last segment, and that segment is still empty, the
/// broker reports no offset. That is an error until there is another message.
pub(crate) async fn ends(server: &Server, connection: &Connection, name: &str) -> Result<Option<Ends>, Error> {
    let mut is_emptied = false;
    let asking = async {
        loop {
            let mut probe = Probe::attach(server, connection, name).await?;
            let (first, last) = (
                probe.first.take_ready(server, name)?,
                probe.last.take_ready(server, name)?,
            );
            let (is_empty, first) = (first.is_empty() && last.is_empty(), first.into_iter().next());
            let last = probe.newest(last).await?;
            let count = probe.count().await?;
            probe.close().await;
            match first.zip(last) {
                Some((first, last)) => return Ok(Some(Ends { first, last })),
                None if is_empty && count == 0 => return Ok(None),
                // A consumer of RabbitMQ 3.10 that attaches while others publish may never be sent
                // anything.
                None => is_emptied = is_empty,
            }
        }
    };
    match timeout(server.timeout, asking).await {
        Ok(ends) => ends,
        Err(_) => Err(Error::unavailable(
            server.on(action(name)),
            match is_emptied {
                true => {
                    "retention has removed every message, and the broker reports no offset until there is another one"
                }
                false => "the broker did not send the first and last message in time",
            },
        )),
    }
}

/// Three consumers on one channel: at the first chunk, at the last chunk, and after it.
struct Probe<'a> {
    server: &'a Server,
    name: &'a str,
    channel: Channel,
    first: Deliveries,
    last: Deliveries,
    next: Deliveries,
}

impl<'a> Probe<'a> {
    /// Returns once the broker has sent all that it sends on its own.
    ///
    /// To detect that, we need a request that is answered afterwards. To attach the third consumer,
    /// the broker asks the stream's process. Before it answers, that process has told the channel
    /// that the other two consumers have something to read. The first request after that is
    /// answered when the third is attached, and the second when the channel has also read and sent.
    async fn attach(server: &'a Server, connection: &Connection, name: &'a str) -> Result<Self, Error> {
        let attaching = async {
            let channel = connection.create_channel().await?;
            let first = attach(&channel, name, AMQPValue::LongString("first".into()), 1).await?;
            let last = attach(&channel, name, AMQPValue::LongString("last".into()), STEP).await?;
            let next = attach(&channel, name, AMQPValue::LongString("next".into()), 1).await?;
            answered(&channel).await?;
            answered(&channel).await?;
            Ok((channel, first, last, next))
        };
        let (channel, first, last, next) = server.reply(|| action(name), attaching).await?;
        Ok(Self {
            server,
            name,
            channel,
            first,
            last,
            next,
        })
    }

    /// The newest message, given the first ones of the last chunk.
    async fn newest(&mut self, mut fetched: Vec<Delivered>) -> Result<Option<Delivered>, Error> {
        let (mut newest, mut published_since) = (None, None);
        while let Some(delivered) = fetched.pop() {
            let (tag, offset, full) = (delivered.tag, delivered.offset, fetched.len() + 1 >= STEP.into());
            newest = Some(delivered);
            if published_since.is_none() {
                published_since = self
                    .next
                    .take_ready(self.server, self.name)?
                    .first()
                    .map(|next| next.offset);
            }
            // Messages published since we attached need not be taken: others may publish as fast as
            // we read.
            if !full || published_since.is_some_and(|since| since <= offset + 1) {
                break;
            }
            // The broker may have stopped within the chunk.
            let asking = async {
                self.channel.basic_ack(tag, BasicAckOptions { multiple: true }).await?;
                answered(&self.channel).await
            };
            self.server.reply(|| action(self.name), asking).await?;
            fetched = self.last.take_ready(self.server, self.name)?;
        }
        Ok(newest)
    }

    /// The number of messages according to the broker's statistics.
    async fn count(&self) -> Result<u32, Error> {
        let options = QueueDeclareOptions::default().passive();
        let declaring = self
            .channel
            .queue_declare(self.name.into(), options, FieldTable::default());
        let declared = self.server.reply(|| action(self.name), declaring).await?;
        Ok(declared.message_count())
    }

    async fn close(self) {
        let _ = timeout(Duration::from_secs(1), self.channel.close(200, "OK".into())).await;
    }
}

fn action(name: &str) -> String {
    format!("read bounds of stream {name}")
}

/// Returns when the channel has answered all earlier requests.
async fn answered(channel: &Channel) -> lapin::Result<()> {
    channel.basic_qos(1, BasicQosOptions::default()).await
}
