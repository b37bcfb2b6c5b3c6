//! The stores of all backends as one type.

use async_trait::async_trait;
use essentially_once::{
    ConsumerId, Error, Log, NewRecord, Offset, OffsetStore, Record, StartAt,
    backend::{DeadLetter, DeadLetters, Durability, Position, Pulse},
    consumer::{
        Operator, SeekPlan,
        dead_letters::{self, LetterFilter, LetterPlan},
        pause, plan_seek, plan_skip, resume, seek_as_planned,
    },
    skip,
};

/// The functions for operators, on a store whose transactions have any type.
#[async_trait]
pub(crate) trait Store: Send + Sync {
    async fn consumers(&self) -> Result<Option<Vec<ConsumerId>>, Error>;
    /// The position. Unlike the function of the library, it creates nothing.
    async fn position(&self, consumer: &ConsumerId) -> Result<Option<Position>, Error>;
    async fn durability(&self) -> Result<Durability, Error>;
    async fn pause(&self, consumer: &ConsumerId, by: &Operator) -> Result<(), Error>;
    async fn resume(&self, consumer: &ConsumerId, by: &Operator) -> Result<(), Error>;
    async fn plan_skip(&self, consumer: &ConsumerId, log: &dyn Log, offset: Offset) -> Result<Record, Error>;
    async fn skip(&self, consumer: &ConsumerId, log: &dyn Log, offset: Offset, by: &Operator) -> Result<Offset, Error>;
    async fn plan_seek(&self, consumer: &ConsumerId, log: &dyn Log, to: StartAt) -> Result<SeekPlan, Error>;
    async fn seek(&self, consumer: &ConsumerId, log: &dyn Log, plan: &SeekPlan, by: &Operator)
    -> Result<Offset, Error>;
    async fn letters(
        &self,
        consumer: &ConsumerId,
        filter: &LetterFilter,
        after: Option<Offset>,
        limit: usize,
    ) -> Result<Vec<DeadLetter>, Error>;
    async fn letter(&self, consumer: &ConsumerId, offset: Offset) -> Result<Option<DeadLetter>, Error>;
    async fn plan_retry(&self, consumer: &ConsumerId, offset: Offset) -> Result<(), Error>;
    async fn retry(&self, consumer: &ConsumerId, offset: Offset, by: &Operator) -> Result<(), Error>;
    async fn plan_retry_all(&self, consumer: &ConsumerId, filter: &LetterFilter) -> Result<LetterPlan, Error>;
    async fn retry_all(&self, consumer: &ConsumerId, filter: &LetterFilter, by: &Operator) -> Result<u64, Error>;
    async fn discard(&self, consumer: &ConsumerId, letter: &DeadLetter, by: &Operator) -> Result<(), Error>;
    async fn plan_discard_all(&self, consumer: &ConsumerId, filter: &LetterFilter) -> Result<LetterPlan, Error>;
    async fn discard_all(&self, consumer: &ConsumerId, filter: &LetterFilter, by: &Operator) -> Result<u64, Error>;
    async fn plan_edit(&self, consumer: &ConsumerId, letter: &DeadLetter, new: &NewRecord) -> Result<(), Error>;
    async fn edit(
        &self,
        consumer: &ConsumerId,
        letter: &DeadLetter,
        new: &NewRecord,
        by: &Operator,
    ) -> Result<(), Error>;
}

#[async_trait]
impl<S> Store for S
where
    S: OffsetStore,
    S::Tx: DeadLetters,
{
    async fn consumers(&self) -> Result<Option<Vec<ConsumerId>>, Error> {
        OffsetStore::consumers(self).await
    }

    async fn position(&self, consumer: &ConsumerId) -> Result<Option<Position>, Error> {
        match self.pulse(consumer).await? {
            pulse if pulse == Pulse::default() => Ok(None),
            _ => OffsetStore::position(self, consumer).await,
        }
    }

    async fn durability(&self) -> Result<Durability, Error> {
        OffsetStore::durability(self).await
    }

    async fn pause(&self, consumer: &ConsumerId, by: &Operator) -> Result<(), Error> {
        pause(consumer, self, by).await
    }

    async fn resume(&self, consumer: &ConsumerId, by: &Operator) -> Result<(), Error> {
        resume(consumer, self, by).await
    }

    async fn plan_skip(&self, consumer: &ConsumerId, log: &dyn Log, offset: Offset) -> Result<Record, Error> {
        plan_skip(consumer, log, self, offset).await
    }

    async fn skip(&self, consumer: &ConsumerId, log: &dyn Log, offset: Offset, by: &Operator) -> Result<Offset, Error> {
        skip(consumer, log, self, offset, by).await
    }

    async fn plan_seek(&self, consumer: &ConsumerId, log: &dyn Log, to: StartAt) -> Result<SeekPlan, Error> {
        plan_seek(consumer, log, self, to).await
    }

    async fn seek(
        &self,
        consumer: &ConsumerId,
        log: &dyn Log,
        plan: &SeekPlan,
        by: &Operator,
    ) -> Result<Offset, Error> {
        seek_as_planned(consumer, log, self, plan, by).await
    }

    async fn letters(
        &self,
        consumer: &ConsumerId,
        filter: &LetterFilter,
        after: Option<Offset>,
        limit: usize,
    ) -> Result<Vec<DeadLetter>, Error> {
        dead_letters::find(consumer, self, filter, after, limit).await
    }

    async fn letter(&self, consumer: &ConsumerId, offset: Offset) -> Result<Option<DeadLetter>, Error> {
        dead_letters::get(consumer, self, offset).await
    }

    async fn plan_retry(&self, consumer: &ConsumerId, offset: Offset) -> Result<(), Error> {
        dead_letters::plan_retry(consumer, self, offset).await
    }

    async fn retry(&self, consumer: &ConsumerId, offset: Offset, by: &Operator) -> Result<(), Error> {
        dead_letters::retry(consumer, self, offset, by).await
    }

    async fn plan_retry_all(&self, consumer: &ConsumerId, filter: &LetterFilter) -> Result<LetterPlan, Error> {
        dead_letters::plan_retry_all(consumer, self, filter).await
    }

    async fn retry_all(&self, consumer: &ConsumerId, filter: &LetterFilter, by: &Operator) -> Result<u64, Error> {
        dead_letters::retry_all(consumer, self, filter, by).await
    }

    async fn discard(&self, consumer: &ConsumerId, letter: &DeadLetter, by: &Operator) -> Result<(), Error> {
        dead_letters::discard(consumer, self, letter, by).await
    }

    async fn plan_discard_all(&self, consumer: &ConsumerId, filter: &LetterFilter) -> Result<LetterPlan, Error> {
        dead_letters::plan_discard_all(consumer, self, filter).await
    }

    async fn discard_all(&self, consumer: &ConsumerId, filter: &LetterFilter, by: &Operator) -> Result<u64, Error> {
        dead_letters::discard_all(consumer, self, filter, by).await
    }

    async fn plan_edit(&self, consumer: &ConsumerId, letter: &DeadLetter, new: &NewRecord) -> Result<(), Error> {
        dead_letters::plan_edit(consumer, self, letter, new).await
    }

    async fn edit(
        &self,
        consumer: &ConsumerId,
        letter: &DeadLetter,
        new: &NewRecord,
        by: &Operator,
    ) -> Result<(), Error> {
        dead_letters::edit(consumer, self, letter, new, by).await
    }
}
