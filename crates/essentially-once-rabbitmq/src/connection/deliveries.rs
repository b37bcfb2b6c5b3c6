//! The messages that the broker sends to a consumer of a stream.

use std::{
    collections::VecDeque,
    pin::Pin,
    task::{Context, Poll, Waker},
};

use essentially_once::Error;
use futures_core::Stream as _;
use lapin::{
    BasicProperties, Consumer,
    message::Delivery,
    options::{BasicConsumeOptions, BasicQosOptions},
    types::{AMQPValue, FieldTable},
};

use super::{Channel, endpoint::Endpoint};
use crate::error::not_done;

/// The header in which the broker reports a message's offset, and the argument by which a consumer
/// asks for one.
pub(crate) const OFFSET: &str = "x-stream-offset";

/// A message and its offset.
#[derive(Debug)]
pub(crate) struct Delivered {
    pub(crate) offset: u64,
    pub(crate) properties: BasicProperties,
    pub(crate) body: Vec<u8>,
    pub(crate) tag: u64,
}

/// The messages that the broker sends to a consumer.
#[derive(Debug)]
pub(crate) struct Deliveries {
    consumer: Consumer,
    /// How the consumer ended. lapin reports the end once and then stays silent.
    ended: Option<lapin::Result<()>>,
}

impl Deliveries {
    pub(crate) fn new(consumer: Consumer) -> Self {
        Self { consumer, ended: None }
    }

    /// The messages that have arrived, without waiting.
    pub(crate) fn take_ready(&mut self, server: &Endpoint, stream: &str) -> Result<Vec<Delivered>, Error> {
        let mut taken = VecDeque::new();
        let all = (usize::MAX, usize::MAX);
        match self.poll_into(&mut taken, all, server, stream, &mut looking()) {
            Poll::Ready(Err(error)) => Err(error),
            _ => Ok(taken.into()),
        }
    }

    /// Adds up to `max` messages, or about that many bytes. Ready if there are any.
    pub(super) fn poll_into(
        &mut self,
        taken: &mut VecDeque<Delivered>,
        (max, max_bytes): (usize, usize),
        server: &Endpoint,
        stream: &str,
        context: &mut Context<'_>,
    ) -> Poll<Result<(), Error>> {
        let mut bytes = 0;
        let action = || server.on(format!("read stream {stream}"));
        while self.ended.is_none() && taken.len() < max && bytes < max_bytes {
            let delivery = match Pin::new(&mut self.consumer).poll_next(context) {
                Poll::Ready(Some(Ok(delivery))) => delivery,
                Poll::Ready(Some(Err(error))) => {
                    self.ended = Some(Err(error));
                    break;
                }
                Poll::Ready(None) => {
                    self.ended = Some(Ok(()));
                    break;
                }
                Poll::Pending => break,
            };
            let Some(offset) = offset_of(&delivery) else {
                let why = "a message without an offset arrived, so the queue is not a stream; use the name of a stream";
                return Poll::Ready(Err(Error::failed(action(), why)));
            };
            let delivered = Delivered {
                offset,
                properties: delivery.properties,
                body: delivery.data,
                tag: delivery.delivery_tag,
            };
            bytes += delivered.size();
            taken.push_back(delivered);
        }
        match &self.ended {
            _ if !taken.is_empty() => Poll::Ready(Ok(())),
            None => Poll::Pending,
            Some(Err(error)) => Poll::Ready(Err(not_done(action(), error.clone()))),
            Some(Ok(())) => {
                let why = "the broker ended the consumer; the stream was deleted or moved, or its node stops";
                Poll::Ready(Err(Error::unavailable(action(), why)))
            }
        }
    }
}

/// For a poll that does not wait.
pub(super) fn looking() -> Context<'static> {
    Context::from_waker(Waker::noop())
}

fn offset_of(delivery: &Delivery) -> Option<u64> {
    match delivery.properties.headers().as_ref()?.inner().get(OFFSET)? {
        AMQPValue::LongLongInt(offset) => u64::try_from(*offset).ok(),
        _ => None,
    }
}

impl Delivered {
    /// The bytes of the message, with its headers.
    pub(crate) fn size(&self) -> usize {
        let value = |value: &AMQPValue| match value {
            AMQPValue::LongString(text) => text.len(),
            AMQPValue::ByteArray(bytes) => bytes.len(),
            _ => 8,
        };
        let headers = self.properties.headers().as_ref().map_or(0, |headers| {
            headers
                .into_iter()
                .map(|(name, held)| name.as_str().len() + value(held))
                .sum()
        });
        self.body.len() + headers
    }
}

/// Starts a consumer at that offset or place.
pub(crate) async fn attach(
    channel: &Channel,
    name: &str,
    offset: AMQPValue,
    prefetch: u16,
) -> lapin::Result<Deliveries> {
    channel.basic_qos(prefetch, BasicQosOptions::default()).await?;
    let mut arguments = FieldTable::default();
    arguments.insert(OFFSET.into(), offset);
    let options = BasicConsumeOptions::default();
    let consumer = channel
        .basic_consume(name.into(), "".into(), options, arguments)
        .await?;
    Ok(Deliveries::new(consumer))
}
