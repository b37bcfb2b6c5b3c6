//! Follows a stream from an offset on.

use std::{collections::VecDeque, future::poll_fn, sync::Arc, task::Poll, time::Duration};

use essentially_once::{
    Error, Offset,
    backend::{Bounds, LogId},
};
use lapin::{options::BasicAckOptions, types::AMQPValue};
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::{
    Channel, Connection,
    deliveries::{Delivered, Deliveries, attach, looking},
    server::Server,
    stream::{Ends, Range, ends},
};

/// About how many bytes one [`Tail::next`] returns at most.
const FETCH_BYTES: usize = 1024 * 1024;

/// How many bytes the broker may send ahead, as far as a number of messages can express them. If
/// messages suddenly grow, the prefetch of the smaller ones applies for a moment.
const AHEAD_BYTES: usize = 8 * 1024 * 1024;

/// How long a stream may be quiet before the reader asks the broker whether that is right. Doubles
/// from the first to the last.
const QUIET: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(32));

/// How long a call waits at least before it asks the broker. Nobody may have read for a long time.
const GRACE: Duration = Duration::from_millis(200);

/// The pause before asking a lagging replica again.
pub(crate) const BEHIND: Duration = Duration::from_millis(100);

/// A reader of a stream, on its own channel. It ends at the first error.
pub(crate) struct Tail {
    server: Arc<Server>,
    stream: String,
    /// The next offset to yield.
    next: u64,
    pub(crate) connection: Arc<Connection>,
    channel: Channel,
    deliveries: Deliveries,
    prefetch: u16,
    /// Taken from the consumer and not yielded yet.
    pending: VecDeque<Delivered>,
    /// Whether the broker was asked about the hole before the first of those.
    hole_is_known: bool,
    /// Taken and not acknowledged. The broker sends `prefetch` minus these.
    unacked: u16,
    last_tag: u64,
    /// The size of messages, as a moving average.
    size: usize,
    quiet: Duration,
    ask_at: Instant,
}

impl Tail {
    /// Reads from this offset, which must be between the first message and the end.
    pub(crate) async fn open(
        server: &Arc<Server>,
        connection: &Arc<Connection>,
        stream: &str,
        from: u64,
    ) -> Result<Self, Error> {
        let choose = |ends: Option<&Ends>| standing(stream, ends, from).map(|()| from);
        Self::open_if(server, connection, stream, choose).await
    }

    /// Reads from the offset that `choose` returns, given what the stream holds.
    pub(crate) async fn open_if(
        server: &Arc<Server>,
        connection: &Arc<Connection>,
        stream: &str,
        choose: impl Fn(Option<&Ends>) -> Result<u64, Error>,
    ) -> Result<Self, Error> {
        let (ends, next) = unless_behind(server, connection, stream, choose).await?;
        let size = ends.map_or(0, |ends| ends.size());
        let channel = server.reply(|| action(stream), connection.create_channel()).await?;
        Self::attach(server, (Arc::clone(connection), channel), stream, next, size).await
    }

    /// Reads messages of about `size` bytes from an offset that the stream was just seen to hold or
    /// to end at.
    pub(crate) async fn attach(
        server: &Arc<Server>,
        (connection, channel): (Arc<Connection>, Channel),
        stream: &str,
        next: u64,
        size: usize,
    ) -> Result<Self, Error> {
        let prefetch = prefetch_for(size, server.options.prefetch);
        let deliveries = consume(server, &channel, stream, next, prefetch).await?;
        Ok(Self {
            server: Arc::clone(server),
            stream: stream.into(),
            next,
            connection,
            channel,
            deliveries,
            prefetch,
            pending: VecDeque::new(),
            hole_is_known: false,
            unacked: 0,
            last_tag: 0,
            size,
            quiet: QUIET.0,
            ask_at: Instant::now() + QUIET.0,
        })
    }

    /// Waits for messages and returns the next ones: `max` and about a megabyte at most, unless a
    /// single one is larger.
    ///
    /// Dropping the call neither loses nor repeats messages. Between taking and returning them it
    /// only awaits calls that leave them in `pending`.
    pub(crate) async fn next(&mut self, max: usize) -> Result<Vec<Delivered>, Error> {
        self.ask_at = self.ask_at.max(Instant::now() + GRACE);
        self.follow(max).await
    }

    /// As [`next`](Self::next), for a caller that has read recently.
    pub(crate) async fn follow(&mut self, max: usize) -> Result<Vec<Delivered>, Error> {
        self.adapt().await?;
        self.acknowledge().await?;
        while self.pending.is_empty() {
            self.fill(max.max(1)).await?;
        }
        self.take(max).await
    }

    /// The messages that have arrived. It waits only to ask the broker why the stream has been
    /// quiet for long.
    pub(crate) async fn ready(&mut self) -> Result<Vec<Delivered>, Error> {
        self.adapt().await?;
        self.acknowledge().await?;
        if self.pending.is_empty() {
            let limits = (usize::MAX, FETCH_BYTES);
            let (server, stream) = (&*self.server, &*self.stream);
            let polled = self
                .deliveries
                .poll_into(&mut self.pending, limits, server, stream, &mut looking());
            match polled {
                Poll::Ready(filled) => {
                    filled?;
                    self.note_arrival();
                }
                Poll::Pending if Instant::now() >= self.ask_at => self.ask_why_quiet().await?,
                Poll::Pending => {}
            }
        }
        match self.pending.is_empty() {
            true => Ok(vec![]),
            false => self.take(usize::MAX).await,
        }
    }

    /// Takes some of the pending messages, up to a hole.
    async fn take(&mut self, max: usize) -> Result<Vec<Delivered>, Error> {
        self.check_hole().await?;
        let mut wanted = self.pending[0].offset;
        let mut dense = 0;
        while self
            .pending
            .get(dense)
            .is_some_and(|delivered| delivered.offset == wanted)
            && dense < max.max(1)
        {
            wanted += 1;
            dense += 1;
        }
        let taken: Vec<_> = self.pending.drain(..dense).collect();
        self.next = wanted;
        self.hole_is_known = false;
        Ok(taken)
    }

    /// Takes the messages that have arrived, or waits for some.
    async fn fill(&mut self, max: usize) -> Result<(), Error> {
        let (pending, deliveries) = (&mut self.pending, &mut self.deliveries);
        let (server, stream) = (&*self.server, &*self.stream);
        let limits = (max, FETCH_BYTES);
        let filling = poll_fn(|context| deliveries.poll_into(pending, limits, server, stream, context));
        let Ok(filled) = timeout_at(self.ask_at, filling).await else {
            return self.ask_why_quiet().await;
        };
        filled?;
        self.note_arrival();
        Ok(())
    }

    /// Records the messages that have just arrived.
    fn note_arrival(&mut self) {
        for delivered in &self.pending {
            self.unacked += 1;
            self.last_tag = delivered.tag;
            // Messages that grow fill the memory, so their size counts sooner.
            let weight = if delivered.size() > self.size { 2 } else { 16 };
            self.size = (self.size * (weight - 1) + delivered.size()).div_ceil(weight);
        }
        // The broker begins at the first message of a chunk, which may be an earlier one.
        let next = self.next;
        self.pending.retain(|delivered| delivered.offset >= next);
        self.quiet = QUIET.0;
        self.ask_at = Instant::now() + self.quiet;
    }

    /// The stream is quiet. It may be at its end, retention may have removed the next message, or
    /// the consumer may hang.
    async fn ask_why_quiet(&mut self) -> Result<(), Error> {
        self.settle().await?;
        let (stream, next) = (&self.stream, self.next);
        let stands = |ends: Option<&Ends>| standing(stream, ends, next);
        let (ends, ()) = unless_behind(&self.server, &self.connection, stream, stands).await?;
        if ends.is_some_and(|ends| ends.last.offset >= self.next) {
            self.attach_again(self.prefetch).await?;
        }
        self.quiet = (self.quiet * 2).min(QUIET.1);
        self.ask_at = Instant::now() + self.quiet;
        Ok(())
    }

    /// Offsets may have holes, so only the broker knows whether retention made this one.
    async fn check_hole(&mut self) -> Result<(), Error> {
        if self.pending[0].offset > self.next && !self.hole_is_known {
            let ends = ends(&self.server, &self.connection, &self.stream).await?;
            standing(&self.stream, ends.as_ref(), self.next)?;
            self.hole_is_known = true;
        }
        Ok(())
    }

    /// Lets the broker send more once half of the prefetch has arrived.
    async fn acknowledge(&mut self) -> Result<(), Error> {
        if self.unacked <= self.prefetch / 2 {
            return Ok(());
        }
        match self.settle().await {
            // The deliveries end with the broker's reason for closing the channel.
            Err(_) if !self.channel.status().connected() => Ok(()),
            settled => settled,
        }
    }

    /// Acknowledges all messages taken. A caller about to wait must do so: the broker closes a
    /// channel on which a delivery stays open for half an hour (`consumer_timeout`).
    pub(crate) async fn settle(&mut self) -> Result<(), Error> {
        if self.unacked == 0 {
            return Ok(());
        }
        // Reset first: the first poll hands the request over, and it must not be made twice.
        self.unacked = 0;
        let acked = self
            .channel
            .basic_ack(self.last_tag, BasicAckOptions { multiple: true });
        self.server.reply(|| action(&self.stream), acked).await
    }

    /// A consumer's prefetch counts messages and cannot change. A consumer whose prefetch is far
    /// off for the size of the messages is replaced.
    async fn adapt(&mut self) -> Result<(), Error> {
        let fits = prefetch_for(self.size, self.server.options.prefetch);
        match better_prefetch(self.prefetch, fits) {
            Some(fits) if self.pending.is_empty() => self.attach_again(fits).await,
            _ => Ok(()),
        }
    }

    async fn attach_again(&mut self, prefetch: u16) -> Result<(), Error> {
        let creating = self.connection.create_channel();
        let channel = self.server.reply(|| action(&self.stream), creating).await?;
        self.deliveries = consume(&self.server, &channel, &self.stream, self.next, prefetch).await?;
        let old = std::mem::replace(&mut self.channel, channel);
        self.prefetch = prefetch;
        self.unacked = 0;
        let _ = timeout(Duration::from_secs(1), old.close(200, "OK".into())).await;
        Ok(())
    }
}

/// What `judge` makes of the stream's ends.
///
/// In a cluster, a replica may lag, and one that was just started shows nothing at first. An offset
/// past the end is therefore an error only if it stays so for the timeout.
async fn unless_behind<T>(
    server: &Server,
    connection: &Connection,
    stream: &str,
    judge: impl Fn(Option<&Ends>) -> Result<T, Error>,
) -> Result<(Option<Ends>, T), Error> {
    believed(server.timeout, || ends(server, connection, stream), judge).await
}

async fn believed<T, F>(
    limit: Duration,
    mut ask: impl FnMut() -> F,
    judge: impl Fn(Option<&Ends>) -> Result<T, Error>,
) -> Result<(Option<Ends>, T), Error>
where
    F: Future<Output = Result<Option<Ends>, Error>>,
{
    let deadline = Instant::now() + limit;
    loop {
        let ends = ask().await?;
        match judge(ends.as_ref()) {
            Err(Error::OutOfRange { .. }) if Instant::now() < deadline => sleep(BEHIND).await,
            judged => return judged.map(|judged| (ends, judged)),
        }
    }
}

async fn consume(
    server: &Server,
    channel: &Channel,
    stream: &str,
    next: u64,
    prefetch: u16,
) -> Result<Deliveries, Error> {
    let offset = i64::try_from(next).unwrap_or(i64::MAX);
    let attaching = attach(channel, stream, AMQPValue::LongLongInt(offset), prefetch);
    server.reply(|| action(stream), attaching).await
}

fn action(stream: &str) -> String {
    format!("read stream {stream}")
}

/// The prefetch for messages of this size.
fn prefetch_for(size: usize, most: u16) -> u16 {
    let fits = AHEAD_BYTES / size.max(1);
    u16::try_from(fits).unwrap_or(u16::MAX).clamp(1, most)
}

/// The prefetch that fits, if it is at least twice or at most half of the current one.
fn better_prefetch(is: u16, fits: u16) -> Option<u16> {
    (is >= fits.saturating_mul(2) || fits >= is.saturating_mul(2)).then_some(fits)
}

/// Whether the stream holds `next`, or ends there.
fn standing(stream: &str, ends: Option<&Ends>, next: u64) -> Result<(), Error> {
    let Range { first, end } = Range::of(ends);
    if (first..=end).contains(&next) {
        return Ok(());
    }
    let bounds = Bounds {
        earliest: Offset::new(first, 0),
        end: Offset::new(end, 0),
    };
    match LogId::new(stream) {
        Ok(log) => bounds.check(&log, Offset::new(next, 0)),
        Err(_) => Err(Error::failed(
            format!("read stream {stream} at {next}"),
            format!("it holds offsets from {first} up to {end}"),
        )),
    }
}

#[cfg(test)]
mod tests {
    use lapin::BasicProperties;

    use super::*;

    fn ends_of(first: u64, last: u64) -> Ends {
        let message = |offset| Delivered {
            offset,
            properties: BasicProperties::default(),
            body: vec![],
            tag: 0,
        };
        Ends {
            first: message(first),
            last: message(last),
        }
    }

    #[test]
    fn a_prefetch_shrinks_with_large_messages_and_grows_back() {
        const MIB: usize = 1024 * 1024;
        for most in [8, 100] {
            for (size, fits) in [(2 * MIB, 4), (8 * MIB, 1), (100 * MIB, 1)] {
                assert_eq!(better_prefetch(most, prefetch_for(size, most)), Some(fits));
                assert_eq!(better_prefetch(fits, prefetch_for(size, most)), None);
                assert_eq!(better_prefetch(fits, prefetch_for(100, most)), Some(most));
            }
        }
        assert_eq!(better_prefetch(8, prefetch_for(3 * MIB / 2, 8)), None, "close enough");
    }

    /// The result of a reader at 5 if the broker answers like this and repeats the last answer.
    /// Also returns how often the broker was asked.
    async fn read_at_5(answers: &[Option<(u64, u64)>]) -> (Result<(), Error>, usize) {
        let mut asked = 0;
        let ask = || {
            let answer = answers[asked.min(answers.len() - 1)];
            asked += 1;
            async move { Ok(answer.map(|(first, last)| ends_of(first, last))) }
        };
        let judge = |ends: Option<&Ends>| standing("orders", ends, 5);
        let judged = believed(3 * BEHIND, ask, judge).await;
        (judged.map(|(_, ())| ()), asked)
    }

    #[tokio::test]
    async fn that_a_reader_is_past_the_end_is_believed_if_it_lasts() {
        let (late, asked) = read_at_5(&[None, Some((0, 3)), Some((0, 9))]).await;
        assert!(late.is_ok() && asked == 3, "{late:?} after {asked}");
        for lasting in [None, Some((0, 3))] {
            let (lost, asked) = read_at_5(&[lasting]).await;
            assert!(
                matches!(lost, Err(Error::OutOfRange { .. })) && asked > 2,
                "{lost:?} after {asked}"
            );
        }
        let (truncated, asked) = read_at_5(&[Some((6, 9))]).await;
        assert!(
            matches!(truncated, Err(Error::Truncated { .. })) && asked == 1,
            "{truncated:?} after {asked}"
        );
    }
}
