//! Records that a transaction sends.

use async_trait::async_trait;

use crate::{Error, NewRecord, ProducerId, backend::unique};

/// Sends records with a commit: a service that changes its state and must tell others about it does
/// both in one transaction.
///
/// The records go to a log of the same backend as the store, which is called an outbox, because a
/// [`Relay`](crate::relay::Relay) takes them on from there. Each backend documents how it opens an
/// outbox for reading.
///
/// # Contract
/// - **O1** The commit appends the records together with its state and its position, or none of
///   them. A transaction that is fenced, dropped or rolled back sends nothing.
/// - **O2** A log has the records of one transaction in the order in which they were sent, and
///   those of an earlier commit before those of a later one.
/// - **O3** The commit gives each record an [`Origin`](crate::Origin). Its producer belongs to this
///   one outbox, its epoch is the stable one, and its sequence is greater than that of every record
///   before it, including those removed since. What passes the record on keeps the origin, so that
///   consumers recognize a copy, whichever way it came.
/// - **O4** No reader sees a record before the commit is made.
/// - **O5** Consumers share an outbox, unless the backend documents that each consumer has outboxes
///   of its own. Sending to an outbox that does not exist creates it.
///
/// Send to a few fixed outboxes, and let the relay's [route](crate::relay::Relay::routed) tell
/// records apart. An outbox for each customer would leave each of them in the position of every
/// receiver forever, since the producer of an outbox is never forgotten.
///
/// # Examples
/// ```
/// use essentially_once::memory::{Memory, MemoryTx};
/// use essentially_once::{Consumer, ConsumerId, KeyValue, Log, NewRecord, Outbox, Record, handler_fn};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), essentially_once::Error> {
/// let memory = Memory::new();
/// let orders = memory.log("orders")?;
/// orders.append(&[NewRecord::new("10248")]).await?;
///
/// let ship = handler_fn(|order: &Record, tx: &mut MemoryTx| {
///     Box::pin(async move {
///         tx.put(&order.payload, b"packed").await?;
///         tx.send("shipping-outbox", NewRecord::new("packed").key(order.payload.clone())).await?;
///         Ok(())
///     })
/// });
/// Consumer::essentially_once(ConsumerId::new("shipping")?, orders, memory.store(), ship)
///     .accept_volatile()
///     .run_until_caught_up()
///     .await?;
/// assert_eq!(memory.log("shipping-outbox")?.bounds().await?.end, 1.into());
/// # Ok(())
/// # }
/// ```
#[async_trait]
pub trait Outbox: Send {
    /// Stages a record for the log with this name.
    ///
    /// # Errors
    /// - [`Error::InvalidName`] if no log can have this name.
    /// - [`Error::TooLarge`] if the log cannot hold the record.
    /// - [`Error::Failed`] if the record has an origin, since the commit gives it one, or if the
    ///   log is of another kind than an outbox.
    ///
    /// After these, nothing is staged, and the transaction can go on. After
    /// [`Error::Unavailable`] and any other error of the backend, it can only be rolled back.
    async fn send(&mut self, log: &str, record: NewRecord) -> Result<(), Error>;
}

/// Refuses a record that already has an origin, which the commit would replace.
///
/// # Errors
/// [`Error::Failed`].
pub fn check_unnumbered(log: &str, record: &NewRecord) -> Result<(), Error> {
    match &record.origin {
        None => Ok(()),
        Some(origin) => Err(Error::failed(
            format!("send a record to {log}"),
            format!(
                "it already has the origin {origin}, but the commit assigns one; remove the origin, or pass the record \
                 on with a `Relay`"
            ),
        )),
    }
}

/// Draws the producer of a new outbox. The name of the log is a part of it, for people; the rest is
/// random, so that no two outboxes have the same.
pub fn new_producer(log: &str) -> Result<ProducerId, Error> {
    named(log, unique())
}

/// The producer of an outbox: a name for people, and a number that makes it differ from all others.
pub(crate) fn named(name: &str, number: u128) -> Result<ProducerId, Error> {
    let name = &name[..name.floor_char_boundary(160)];
    ProducerId::new(format!("{name}@{number:032x}"))
}
