//! What was done to records, in the order of the commits that did it.
//!
//! Handlers note each record that they handle in the consumer's state, and operators note what they
//! do in the transaction that does it. So the order of both is known, whatever replies were lost.

use bytes::Bytes;
use essentially_once::{
    ConsumerId, Error, Handler, HandlerError, KeyValue, Offset, OffsetStore, Record, async_trait,
    backend::{Advance, DeadLetter, DeadLetters, Durability, Position, Transaction},
    consumer::OperatorAction,
};

/// Where the history is in the consumer's state.
const HISTORY: &[u8] = b"history";

/// Something that took effect.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Done {
    /// A handler handled this record, with this payload.
    Handled(Offset, String),
    /// An operator removed this letter.
    Discarded(Offset),
    /// An operator added to the payload of this letter.
    Edited(Offset),
    /// An operator moved the position past this record.
    Skipped(Offset),
    /// An operator moved the position.
    Moved { from: Offset, to: Offset },
}

/// Notes each record that it handles.
pub(super) struct Chronicler;

#[async_trait]
impl<Tx: KeyValue> Handler<Tx> for Chronicler {
    async fn handle(&mut self, record: &Record, tx: &mut Tx) -> Result<(), HandlerError> {
        let payload = String::from_utf8_lossy(&record.payload).into_owned();
        Ok(note(tx, &Done::Handled(record.offset, payload)).await?)
    }
}

/// What was noted for a consumer.
pub(super) async fn read<S>(store: &S, consumer: &ConsumerId) -> Result<Vec<Done>, Error>
where
    S: OffsetStore<Tx: KeyValue>,
{
    let mut tx = store.begin(consumer).await?;
    let text = text(&mut tx).await?;
    tx.rollback().await?;
    text.lines().map(Done::decode).collect()
}

async fn note(tx: &mut impl KeyValue, done: &Done) -> Result<(), Error> {
    let line = format!("{}{}\n", text(tx).await?, done.encode());
    tx.put(HISTORY, line.as_bytes()).await
}

async fn text(tx: &mut impl KeyValue) -> Result<String, Error> {
    let bytes = tx.get(HISTORY).await?.unwrap_or_default();
    String::from_utf8(bytes.into()).map_err(|error| Error::failed("read the history", error))
}

impl Done {
    /// What an action did; `None` if it did nothing to records, or removed letters.
    fn of(action: OperatorAction) -> Option<Self> {
        match action {
            OperatorAction::Edit(offset) => Some(Self::Edited(offset)),
            OperatorAction::Skip(offset) => Some(Self::Skipped(offset)),
            OperatorAction::Seek { from, to, .. } => Some(Self::Moved { from, to }),
            _ => None,
        }
    }

    fn encode(&self) -> String {
        match self {
            Self::Handled(offset, payload) => format!("handled {offset} {payload}"),
            Self::Discarded(offset) => format!("discarded {offset}"),
            Self::Edited(offset) => format!("edited {offset}"),
            Self::Skipped(offset) => format!("skipped {offset}"),
            Self::Moved { from, to } => format!("moved {from} {to}"),
        }
    }

    fn decode(line: &str) -> Result<Self, Error> {
        let parse = || {
            let mut words = line.splitn(3, ' ');
            let (name, offset) = (words.next()?, words.next()?.parse().ok()?);
            Some(match (name, words.next()) {
                ("handled", Some(payload)) => Self::Handled(offset, payload.into()),
                ("discarded", None) => Self::Discarded(offset),
                ("edited", None) => Self::Edited(offset),
                ("skipped", None) => Self::Skipped(offset),
                ("moved", Some(to)) => Self::Moved {
                    from: offset,
                    to: to.parse().ok()?,
                },
                _ => return None,
            })
        };
        parse().ok_or_else(|| Error::failed("read the history", format!("{line:?} is not a line of it")))
    }
}

/// The store of an operator, which notes what the operator does.
pub(super) struct NotingStore<S>(pub(super) S);

/// A transaction of a [`NotingStore`].
pub(super) struct NotingTx<T> {
    inner: T,
    /// The letters that it removed one by one.
    removed: Vec<Offset>,
}

#[async_trait]
impl<S: OffsetStore<Tx: KeyValue>> OffsetStore for NotingStore<S> {
    type Tx = NotingTx<S::Tx>;

    async fn position(&self, consumer: &ConsumerId) -> Result<Option<Position>, Error> {
        self.0.position(consumer).await
    }

    async fn begin(&self, consumer: &ConsumerId) -> Result<Self::Tx, Error> {
        Ok(NotingTx {
            inner: self.0.begin(consumer).await?,
            removed: Vec::new(),
        })
    }

    async fn durability(&self) -> Result<Durability, Error> {
        self.0.durability().await
    }

    async fn consumers(&self) -> Result<Option<Vec<ConsumerId>>, Error> {
        self.0.consumers().await
    }
}

#[async_trait]
impl<T: Transaction + KeyValue> Transaction for NotingTx<T> {
    const KEEPS_DEAD_LETTERS: bool = T::KEEPS_DEAD_LETTERS;

    fn dead_letters(&mut self) -> Option<&mut dyn DeadLetters> {
        self.inner.dead_letters()
    }

    async fn commit(mut self, advance: Advance) -> Result<(), Error> {
        let newest = advance.journal.as_ref().and_then(|journal| journal.entries().last());
        for offset in std::mem::take(&mut self.removed) {
            note(&mut self.inner, &Done::Discarded(offset)).await?;
        }
        if let Some(done) = newest.and_then(|entry| Done::of(entry.action)) {
            note(&mut self.inner, &done).await?;
        }
        self.inner.commit(advance).await
    }

    async fn rollback(self) -> Result<(), Error> {
        self.inner.rollback().await
    }
}

#[async_trait]
impl<T: DeadLetters> DeadLetters for NotingTx<T> {
    async fn park(&mut self, letter: &DeadLetter) -> Result<(), Error> {
        self.inner.park(letter).await
    }

    async fn remove(&mut self, offset: Offset) -> Result<bool, Error> {
        let existed = self.inner.remove(offset).await?;
        if existed {
            self.removed.push(offset);
        }
        Ok(existed)
    }

    async fn remove_from(&mut self, offset: Offset) -> Result<u64, Error> {
        self.inner.remove_from(offset).await
    }

    async fn letter(&mut self, offset: Offset) -> Result<Option<DeadLetter>, Error> {
        self.inner.letter(offset).await
    }

    async fn head(&mut self, key: &[u8]) -> Result<Option<DeadLetter>, Error> {
        self.inner.head(key).await
    }

    async fn first_due(&mut self) -> Result<Option<DeadLetter>, Error> {
        self.inner.first_due().await
    }

    async fn list(&mut self, after: Option<Offset>, limit: usize) -> Result<Vec<DeadLetter>, Error> {
        self.inner.list(after, limit).await
    }

    async fn counts(&mut self, after: Option<&[u8]>, limit: usize) -> Result<Vec<(Bytes, u64)>, Error> {
        self.inner.counts(after, limit).await
    }

    async fn total(&mut self) -> Result<u64, Error> {
        self.inner.total().await
    }
}
