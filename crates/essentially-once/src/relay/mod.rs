//! Moving records from one log to others.

mod comparison;
mod new_producers;

use std::fmt;

use async_trait::async_trait;

use self::{comparison::Comparison, new_producers::NewProducers};
use crate::{Error, Handler, HandlerError, Log, NewRecord, Offset, Record};

/// Where a [`Relay`] sends records: a [`Log`], or something that can only be written to, such as a
/// queue, an exchange or a webhook.
///
/// What is no log drops no duplicates. Its receivers get a record at least once.
#[async_trait]
pub trait Destination: Send + Sync {
    /// Sends the records in order, and returns when all of them are stored durably.
    ///
    /// # Errors
    /// As for [`Log::append`]. After [`Error::Indeterminate`], the relay sends the records again.
    async fn send(&self, records: &[NewRecord]) -> Result<(), Error>;

    /// The log that the records go to, if it can be read, so that the relay can compare what it
    /// sends with what the log holds. The default returns `None`.
    fn log(&self) -> Option<&dyn Log> {
        None
    }
}

#[async_trait]
impl<L: Log> Destination for L {
    async fn send(&self, records: &[NewRecord]) -> Result<(), Error> {
        self.append(records).await.map(drop)
    }

    fn log(&self) -> Option<&dyn Log> {
        Some(self)
    }
}

/// Chooses the destination of a record by its index.
type Route = Box<dyn Fn(&Record) -> Option<usize> + Send + Sync>;

/// A handler that sends records on as they are, with key, headers and
/// [origin](crate::Origin), to be run under at-least-once.
///
/// It sends a batch with one append for each destination, and the consumer commits its offset
/// afterwards. After a crash or a lost reply it sends the batch again, with the same origins, so
/// that consumers of the destination drop what arrives twice. Several relays of one name, and a
/// relay that was frozen and wakes up, do no more harm than that.
///
/// A destination that is away holds the relay up. One that fails for good ends the run, with the
/// offset of the record that it refused alone. A record that is too large for it is
/// [rejected](HandlerError::reject), so that the relay stops before that record. A destination that
/// never answers holds up even a stop, so give it a timeout.
///
/// # Parking a record
/// By default, the relay stops at a record that is too large. Mend the destination, and start the
/// relay again. With [`Consumer::dead_letters`](crate::Consumer::dead_letters), that is with
/// [`OnFailure::DeadLetter`](crate::consumer::OnFailure::DeadLetter), the relay parks the record
/// and goes on. A parked record is not sent. It stays in the relay's store with the reason, and
/// later records of its key wait behind it. [`dead_letters::retry`] sends them, once the
/// destination accepts the record.
///
/// Consumers take a record for a duplicate if it is more than
/// [`Window::SIZE`](crate::backend::Window::SIZE) numbers behind another one of its producer. So a
/// retry fails if the relay has sent that many more to the destination, or finds them there, and
/// the letter stays. Put its content into the outbox again, as a new record, and
/// [discard](crate::consumer::dead_letters::discard) the letter.
///
/// [`dead_letters::retry`]: crate::consumer::dead_letters::retry
///
/// # A restored outbox
/// An outbox that was restored from an older copy gives numbers to new records that it had given to
/// others, and receivers would drop the new ones as duplicates. So before a relay sends the first
/// records of an outbox, and again after each failure, it reads back in the destination to the
/// lowest number that it is about to send. If the destination holds the same record, the relay
/// sends it again. If it holds another record under that number, the run ends, with the offset of
/// the record. Then either
///
/// - give the records from that offset on a new producer, with
///   [`new_producer_from`](Self::new_producer_from), or
/// - if what the outbox holds was sent before, move the relay past it with
///   [`seek`](crate::consumer::seek).
///
/// The relay reads the last 1,024 records of the destination, and more only if it finds records of
/// this outbox among them that are all newer. It cannot compare with a destination that is no
/// [`Log`], that it may not read, or whose log does not implement [`Log::tail`], and finds nothing
/// if more than 1,024 records of others came after those of the outbox, or if retention removed
/// them. So draw a new producer *before* you start anything on restored data. The documentation of
/// each adapter says how.
///
/// # Cycles
/// Logs that relays connect in a circle are not supported. A record that comes back to a relay that
/// has passed it is dropped as a duplicate, as long as the relay's window reaches back to it.
///
/// # Report
/// The consumer's report and metrics are the relay's: how many records it has moved (`handled`),
/// how many wait, and for how long.
///
/// # Examples
/// ```
/// use essentially_once::memory::Memory;
/// use essentially_once::relay::Relay;
/// use essentially_once::{Consumer, ConsumerId, Epoch, Log, NewRecord, Origin, ProducerId};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), essentially_once::Error> {
/// let memory = Memory::new();
/// let (outbox, bus) = (memory.log("outbox")?, memory.log("bus")?);
/// let orders = ProducerId::new("orders")?;
/// let record = NewRecord::new("10248").origin(Origin::new(orders, Epoch::STABLE, 1));
/// outbox.append(&[record]).await?;
///
/// let relay = Relay::to(bus.clone());
/// let report = Consumer::at_least_once(ConsumerId::new("relay")?, outbox, memory.store(), relay)
///     .run_until_caught_up() // or `run`, until it is stopped
///     .await?;
/// assert_eq!(report.handled, 1);
/// assert_eq!(bus.bounds().await?.end, 1.into());
/// # Ok(())
/// # }
/// ```
pub struct Relay<D> {
    destinations: Vec<D>,
    route: Route,
    sends_anonymous: bool,
    /// The records of the current batch, by destination.
    gathered: Vec<Vec<NewRecord>>,
    /// The destination to send to first: the one that failed last, so that the others do not get
    /// the batch again for as long as it does.
    first: usize,
    /// What the destinations hold, as far as it matters.
    comparisons: Vec<Comparison>,
    /// Whether a comparison has just found a conflict in a batch. The consumer then tries the
    /// records alone, which needs no second look.
    has_conflict: bool,
    new_producers: NewProducers,
}

impl<D: Destination> Relay<D> {
    /// Sends every record to one destination.
    pub fn to(destination: D) -> Self {
        Self::routed(vec![destination], |_| Some(0))
    }

    /// Sends each record to the destination whose index `route` returns, and leaves out those for
    /// which it returns `None`. An index that does not exist rejects the record.
    ///
    /// Change routes only when the relay has caught up and was stopped. A batch whose outcome is
    /// not known is sent again by the new routes, so another destination may get records a second
    /// time, or too late for its consumers to tell them from duplicates.
    pub fn routed(destinations: Vec<D>, route: impl Fn(&Record) -> Option<usize> + Send + Sync + 'static) -> Self {
        Self {
            gathered: destinations.iter().map(|_| Vec::new()).collect(),
            comparisons: destinations.iter().map(|_| Comparison::default()).collect(),
            destinations,
            route: Box::new(route),
            sends_anonymous: false,
            first: 0,
            has_conflict: false,
            new_producers: NewProducers::default(),
        }
    }

    /// Also sends records that have no origin. Consumers cannot recognize copies of them, so they
    /// handle such a record again if the relay sends it again.
    ///
    /// By default the relay rejects them.
    #[must_use]
    pub fn send_without_origin(mut self) -> Self {
        self.sends_anonymous = true;
        self
    }

    /// Gives the records at or after `offset` of the outbox another producer on their way, so that
    /// receivers do not take them for the records that had their numbers before the outbox was
    /// [restored](Self#a-restored-outbox).
    ///
    /// The new producer is computed from the old one and the offset. So the relay sends a record
    /// with the same origin each time, also after a crash. Keep the call in the program for as long
    /// as the outbox has that producer. After another restore, add a second call with a higher
    /// offset. Each record gets its producer from the highest offset that is not above its own.
    ///
    /// Records with a [fresh](crate::Epoch::fresh) epoch keep their origin.
    #[must_use]
    pub fn new_producer_from(mut self, offset: Offset) -> Self {
        self.new_producers.add(offset);
        self
    }
}

#[async_trait]
impl<D: Destination> Handler<()> for Relay<D> {
    async fn handle(&mut self, record: &Record, (): &mut ()) -> Result<(), HandlerError> {
        let Some(index) = (self.route)(record) else {
            return Ok(());
        };
        if record.origin.is_none() && !self.sends_anonymous {
            return Err(HandlerError::reject(
                "it has no origin, so consumers could not recognize a copy of it; append it with one, or call \
                 `Relay::send_without_origin`",
            ));
        }
        let count = self.destinations.len();
        let gathered = self.gathered.get_mut(index).ok_or_else(|| {
            HandlerError::reject(format!(
                "its route is destination {index}, and the relay has {count} of them"
            ))
        })?;
        let mut outgoing = NewRecord::from(record);
        if let Some(origin) = &mut outgoing.origin {
            self.new_producers.apply(record.offset, origin)?;
        }
        gathered.push(outgoing);
        Ok(())
    }

    async fn flush(&mut self, (): &mut ()) -> Result<(), HandlerError> {
        let records: usize = self.gathered.iter().map(Vec::len).sum();
        let count = self.destinations.len();
        for index in (0..count).map(|n| (self.first + n) % count) {
            let gathered = &mut self.gathered[index];
            if gathered.is_empty() {
                continue;
            }
            let (destination, comparison) = (&self.destinations[index], &mut self.comparisons[index]);
            if let Some(log) = destination.log() {
                comparison.look(log, gathered).await?;
                if let Err(conflict) = comparison.check(log.id(), gathered) {
                    self.has_conflict = records > 1;
                    // One of several is to blame. The consumer then tries each of them alone.
                    return Err(match self.has_conflict || conflict.is_late() {
                        true => HandlerError::reject(conflict),
                        false => HandlerError::fatal(conflict),
                    });
                }
            }
            if let Err(error) = destination.send(gathered).await {
                self.first = index;
                return Err(match error {
                    Error::TooLarge { .. } => HandlerError::reject(error),
                    // One of several may be to blame. The consumer then tries each of them alone.
                    Error::Failed { .. } if records > 1 => HandlerError::reject(error),
                    // No policy for records applies to a destination in trouble.
                    Error::Failed { .. } => HandlerError::fatal(error),
                    error => error.into(),
                });
            }
            comparison.sent(gathered);
            gathered.clear();
        }
        Ok(())
    }

    async fn reset(&mut self) {
        self.gathered.iter_mut().for_each(Vec::clear);
        match std::mem::take(&mut self.has_conflict) {
            true => self.comparisons.iter_mut().for_each(Comparison::go_back),
            false => self.comparisons.fill_with(Comparison::default),
        }
    }
}

impl<D> fmt::Debug for Relay<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Relay")
            .field("destinations", &self.destinations.len())
            .field("sends_anonymous", &self.sends_anonymous)
            .finish_non_exhaustive()
    }
}
