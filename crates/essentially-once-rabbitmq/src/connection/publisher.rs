//! Publishes to a stream, with confirms.

use std::{
    collections::VecDeque,
    future::Future,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Waker},
};

use bytes::Bytes;
use essentially_once::{Error, backend::check_size};
use lapin::{
    BasicProperties, Confirmation,
    options::{BasicPublishOptions, ConfirmSelectOptions},
    types::ShortString,
};
use tokio::{
    sync::Mutex,
    time::{error::Elapsed, timeout},
};

use super::{Channel, Connection, server::Server};
use crate::error::in_doubt;

/// How much may be published and not yet confirmed.
const IN_FLIGHT_MESSAGES: usize = 4_096;
const IN_FLIGHT_BYTES: usize = 8 * 1024 * 1024;

/// How errors about the broker's limit name a message.
const MESSAGE: &str = "message for RabbitMQ (`max_message_size`)";

/// A message to publish.
#[derive(Clone, Debug)]
pub(crate) struct Message {
    pub(crate) body: Bytes,
    pub(crate) properties: BasicProperties,
}

impl Message {
    /// A message without properties.
    pub(crate) fn new(body: Vec<u8>) -> Self {
        Self {
            body: body.into(),
            properties: BasicProperties::default(),
        }
    }
}

/// Publishes to one stream, on a connection that nothing reads from. The broker stops reading from
/// connections that publish while it is short of memory or disk.
pub(crate) struct Publisher {
    server: Arc<Server>,
    stream: String,
    /// Whether it uses a channel of [`Server::publishing`] instead of its own connection.
    is_sharing: bool,
    link: Mutex<Option<Arc<Link>>>,
}

struct Link {
    connection: Arc<Connection>,
    channel: Channel,
    /// Whether a call on this link failed or was dropped, so that its outcome is unknown. Such a
    /// link is not used again: lapin was seen to confirm messages on it that the broker had lost.
    spoilt: AtomicBool,
}

/// Spoils the link unless the call completes.
struct Call {
    link: Arc<Link>,
    is_done: bool,
}

impl Drop for Call {
    fn drop(&mut self) {
        if !self.is_done {
            self.link.spoilt.store(true, Ordering::Relaxed);
        }
    }
}

impl Publisher {
    pub(crate) fn new(server: Arc<Server>, stream: String) -> Self {
        Self {
            server,
            stream,
            is_sharing: false,
            link: Mutex::new(None),
        }
    }

    /// A publisher that publishes little and shares its connection with others.
    pub(crate) fn sharing(server: Arc<Server>, stream: String) -> Self {
        Self {
            is_sharing: true,
            ..Self::new(server, stream)
        }
    }

    /// Publishes the messages in order, and returns when each is confirmed: more than half of the
    /// stream's replicas have it.
    ///
    /// Nothing is published twice. Dropping the future leaves the outcome unknown.
    ///
    /// # Errors
    /// [`Error::Unavailable`], [`Error::Failed`] and [`Error::TooLarge`] if nothing was published.
    /// [`Error::Indeterminate`] if some messages may have been.
    pub(crate) async fn publish(&self, messages: Vec<Message>) -> Result<(), Error> {
        let sizes = || messages.iter().map(|message| message.body.len());
        let (Some(smallest), Some(largest)) = (sizes().min(), sizes().max()) else {
            return Ok(());
        };
        // Without this check, the messages before an oversized one would be stored, and stored
        // again by the next try.
        let limit = self.server.message_limit();
        check_size(MESSAGE, largest, limit)?;
        self.publish_all(messages, smallest).await
    }

    async fn publish_all(&self, messages: Vec<Message>, smallest: usize) -> Result<(), Error> {
        let mut slot = self.server.in_turn(self.link.lock()).await?;
        let link = self.link(&mut slot).await?;
        let mut call = Call {
            link: Arc::clone(&link),
            is_done: false,
        };
        let mut batch = Batch::new(self, link, smallest);
        for message in messages {
            batch.send(message).await?;
        }
        // Other calls may publish from here on. Their messages follow these.
        drop(slot);
        batch.finish().await?;
        call.is_done = true;
        Ok(())
    }

    async fn link(&self, slot: &mut Option<Arc<Link>>) -> Result<Arc<Link>, Error> {
        if let Some(link) = slot.as_ref()
            && !link.spoilt.load(Ordering::Relaxed)
            && link.connection.status().connected()
            && link.channel.status().connected()
        {
            return Ok(Arc::clone(link));
        }
        let (action, publishing) = (|| self.action(), &self.server.publishing);
        if let Some(broken) = slot.take() {
            publishing.forget(&broken.connection).await;
        }
        let (connection, channel) = match self.is_sharing {
            true => publishing.channel(action).await?,
            false => {
                let connection = self.server.open_connection().await?;
                let channel = self.server.reply(action, connection.create_channel()).await?;
                (Arc::new(connection), channel)
            }
        };
        let selecting = channel.confirm_select(ConfirmSelectOptions::default());
        let selected = self.server.reply(action, selecting).await;
        publishing.used(&connection, selected).await?;
        let link = Arc::new(Link {
            connection,
            channel,
            spoilt: AtomicBool::new(false),
        });
        Ok(Arc::clone(slot.insert(link)))
    }

    fn action(&self) -> String {
        format!("publish to stream {}", self.stream)
    }
}

/// A message that was published and is not yet confirmed.
type Publishing = Pin<Box<dyn Future<Output = lapin::Result<Confirmation>> + Send>>;

/// The messages of one call.
struct Batch<'a> {
    publisher: &'a Publisher,
    link: Arc<Link>,
    stream: ShortString,
    /// Bytes of the smallest message.
    smallest: usize,
    /// Messages not yet confirmed, with their sizes.
    in_flight: VecDeque<(Publishing, usize)>,
    in_flight_bytes: usize,
    stored: usize,
    returned: usize,
}

impl<'a> Batch<'a> {
    fn new(publisher: &'a Publisher, link: Arc<Link>, smallest: usize) -> Self {
        Self {
            publisher,
            link,
            smallest,
            stream: publisher.stream.as_str().into(),
            in_flight: VecDeque::new(),
            in_flight_bytes: 0,
            stored: 0,
            returned: 0,
        }
    }

    async fn send(&mut self, message: Message) -> Result<(), Error> {
        let size = message.body.len();
        while self.in_flight.len() >= IN_FLIGHT_MESSAGES
            || (self.in_flight_bytes + size > IN_FLIGHT_BYTES && !self.in_flight.is_empty())
        {
            self.confirm_one().await?;
        }
        let mut publishing = publish(Arc::clone(&self.link), self.stream.clone(), message);
        // The first poll queues the message after those before it. Waiting until it is on the wire,
        // as `basic_publish` does, would cost two thread switches and a system call per message.
        let published = publishing.as_mut().poll(&mut Context::from_waker(Waker::noop()));
        match published {
            Poll::Pending => {
                self.in_flight.push_back((publishing, size));
                self.in_flight_bytes += size;
                Ok(())
            }
            Poll::Ready(confirmed) => self.confirmed(Ok(confirmed)),
        }
    }

    async fn confirm_one(&mut self) -> Result<(), Error> {
        let Some((publishing, size)) = self.in_flight.pop_front() else {
            return Ok(());
        };
        self.in_flight_bytes -= size;
        let confirmed = timeout(self.publisher.server.timeout, publishing).await;
        self.confirmed(confirmed)
    }

    fn confirmed(&mut self, confirmed: Result<lapin::Result<Confirmation>, Elapsed>) -> Result<(), Error> {
        match self.known(confirmed)? {
            Confirmation::Ack(None) => self.stored += 1,
            // The broker acknowledged it because no queue takes it.
            Confirmation::Ack(Some(_)) => self.returned += 1,
            other => return Err(self.in_doubt(format!("the broker answered {} instead of a confirm", word(&other)))),
        }
        Ok(())
    }

    async fn finish(mut self) -> Result<(), Error> {
        while !self.in_flight.is_empty() {
            self.confirm_one().await?;
        }
        match (self.stored, self.returned) {
            (_, 0) => Ok(()),
            // A broker that has just started takes messages before its streams are up.
            (0, _) => Err(Error::unavailable(
                self.publisher.server.on(self.publisher.action()),
                "the stream does not exist; if the broker is not just starting, open the log again to declare it",
            )),
            _ => Err(self.in_doubt("the stream was deleted during the call".into())),
        }
    }

    /// The result, or an error if the fate of the messages is unknown.
    fn known<T>(&self, result: Result<lapin::Result<T>, Elapsed>) -> Result<T, Error> {
        match result {
            Ok(Ok(result)) => Ok(result),
            Ok(Err(error)) => {
                // If the broker closes a channel because of one message, the others on it are in
                // doubt. Only the limit of this node counts, since another call may have learned
                // the limit of another node.
                let limit = self.publisher.server.learn_message_limit(&error, &self.link.connection);
                if let Some(limit) = limit {
                    check_size(MESSAGE, self.smallest, limit)?;
                }
                Err(in_doubt(self.publisher.server.on(self.publisher.action()), error))
            }
            Err(_) => {
                let limit = self.publisher.server.timeout;
                let why = match self.link.connection.status().blocked() {
                    true => "the broker blocks publishers because it is short of memory or disk",
                    false => "the broker may be blocking publishers because of a memory or disk alarm",
                };
                Err(self.in_doubt(format!("no confirm within {limit:?}; {why}")))
            }
        }
    }

    fn in_doubt(&self, why: String) -> Error {
        Error::indeterminate(self.publisher.server.on(self.publisher.action()), why)
    }
}

fn publish(link: Arc<Link>, stream: ShortString, message: Message) -> Publishing {
    let options = BasicPublishOptions {
        mandatory: true,
        ..BasicPublishOptions::default()
    };
    Box::pin(async move {
        let Message { body, properties } = message;
        let channel = &link.channel;
        let published = channel.basic_publish(ShortString::default(), stream, options, &body, properties);
        published.await?.await
    })
}

fn word(confirmation: &Confirmation) -> &'static str {
    match confirmation {
        Confirmation::Ack(_) => "with an acknowledgement",
        Confirmation::Nack(_) => "with a refusal",
        Confirmation::NotRequested => "nothing",
    }
}
