//! A transaction: what a handler stages before its commit.

use std::{fmt, sync::Arc};

use async_trait::async_trait;
use bytes::Bytes;
use essentially_once::{
    ConsumerId, Error, KeyValue, Outbox,
    backend::{Advance, DeadLetters, Revision, Transaction, check_entry_size},
};

use super::{
    changelog::Changelog,
    letters::StagedLetters,
    sending::StagedRecords,
    state::{Writes, value_size},
};

/// What a handler stages. Nothing leaves this process before the commit, and nothing is locked.
///
/// After an error of its state, other than [`Error::TooLarge`], the transaction can only be rolled
/// back. A commit then fails with that error and applies nothing, even if the handler ignored it. A
/// record that [`send`](Outbox::send) refuses is not staged, and the transaction can go on.
pub struct RabbitTx {
    pub(super) changelog: Arc<Changelog>,
    /// The revision that it reads.
    based_on: Revision,
    pub(super) staged: Staged,
    /// By how much the writes make the state grow.
    growth: isize,
    /// About how many bytes of the commit's message the writes and the sent records take.
    pub(super) bytes: usize,
    /// The first error of an operation.
    failure: Option<String>,
}

/// What a commit applies.
#[derive(Default)]
pub(super) struct Staged {
    pub(super) writes: Writes,
    pub(super) letters: StagedLetters,
    pub(super) sent: StagedRecords,
}

impl RabbitTx {
    pub(super) fn new(changelog: Arc<Changelog>, based_on: Revision) -> Self {
        Self {
            changelog,
            based_on,
            staged: Staged::default(),
            growth: 0,
            bytes: 0,
            failure: None,
        }
    }

    /// The consumer whose transaction this is.
    pub fn consumer(&self) -> &ConsumerId {
        &self.changelog.scope.consumer
    }

    fn read(&self, key: &[u8]) -> Option<Bytes> {
        match self.staged.writes.get(key) {
            Some(staged) => staged.clone(),
            None => self.changelog.fold.read().state.get(key).cloned(),
        }
    }

    fn stage_put(&mut self, key: &[u8], value: &[u8]) -> Result<(), Error> {
        check_entry_size(key, value, self.changelog.scope.value_limit())?;
        let before = match self.staged.writes.get(key) {
            Some(write) => write_size(key, write.as_deref()),
            None => 0,
        };
        let bytes = self.bytes - before + write_size(key, Some(value));
        let letters = &self.staged.letters;
        self.changelog.scope.check_staged_size(bytes + letters.bytes())?;
        let stored = self.changelog.fold.read().size();
        let growth = self.growth + value_size(key, value) as isize - self.size_of(key);
        let (before, after) = (
            stored.saturating_add_signed(self.growth + letters.growth()),
            stored.saturating_add_signed(growth + letters.growth()),
        );
        self.changelog.scope.check_state_size(before, after)?;
        (self.growth, self.bytes) = (growth, bytes);
        self.staged
            .writes
            .insert(Bytes::copy_from_slice(key), Some(Bytes::copy_from_slice(value)));
        Ok(())
    }

    /// Keeps the transaction from committing without the failed operation. The handler may have
    /// ignored the error.
    pub(super) fn remember(&mut self, error: Error) -> Error {
        if !matches!(error, Error::TooLarge { .. }) {
            self.failure.get_or_insert_with(|| error.to_string());
        }
        error
    }

    /// About how many bytes of the commit's message everything staged takes.
    pub(super) fn staged_bytes(&self) -> usize {
        self.bytes + self.staged.letters.bytes()
    }

    /// By how much everything staged makes the state grow.
    pub(super) fn state_growth(&self) -> isize {
        self.growth + self.staged.letters.growth()
    }

    fn size_of(&self, key: &[u8]) -> isize {
        self.read(key).map_or(0, |value| value_size(key, &value)) as isize
    }
}

impl fmt::Debug for RabbitTx {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RabbitTx")
            .field("consumer", self.consumer())
            .finish_non_exhaustive()
    }
}

#[async_trait]
impl Transaction for RabbitTx {
    const KEEPS_DEAD_LETTERS: bool = true;

    async fn commit(self, advance: Advance) -> Result<(), Error> {
        let Self {
            changelog, based_on, ..
        } = self;
        if let Some(failure) = self.failure {
            return Err(Error::failed(
                changelog.scope.on("commit of"),
                format!("nothing was applied because an operation in the transaction failed: {failure}"),
            ));
        }
        // Before the commit takes the changelog, since the relay's position may take a while.
        let sent = &self.staged.sent;
        changelog
            .guards
            .check(&changelog.scope, |outbox| sent.are_for(outbox))
            .await?;
        changelog.commit(based_on, self.staged, advance).await
    }

    fn dead_letters(&mut self) -> Option<&mut dyn DeadLetters> {
        Some(self)
    }

    fn outbox(&mut self) -> Option<&mut dyn Outbox> {
        Some(self)
    }

    async fn rollback(self) -> Result<(), Error> {
        Ok(())
    }
}

#[async_trait]
impl KeyValue for RabbitTx {
    async fn get(&mut self, key: &[u8]) -> Result<Option<Bytes>, Error> {
        Ok(self.read(key))
    }

    async fn put(&mut self, key: &[u8], value: &[u8]) -> Result<(), Error> {
        self.stage_put(key, value).map_err(|error| self.remember(error))
    }

    async fn delete(&mut self, key: &[u8]) -> Result<(), Error> {
        self.growth -= self.size_of(key);
        let before = self.staged.writes.insert(Bytes::copy_from_slice(key), None);
        self.bytes += write_size(key, None);
        self.bytes -= before.map_or(0, |write| write_size(key, write.as_deref()));
        Ok(())
    }
}

/// The bytes of a write in an entry.
fn write_size(key: &[u8], value: Option<&[u8]>) -> usize {
    4 + key.len() + 1 + value.map_or(0, |value| 4 + value.len())
}
