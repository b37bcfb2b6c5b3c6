//! The harness of the core's in-memory backend: the shortest harness there is.

use std::sync::Arc;

use essentially_once::{
    Error, Log, Offset, async_trait,
    backend::Source,
    memory::{Memory, MemoryStore, SIZE_LIMIT},
};

use crate::harness::{Backend, Capabilities, Harness, StateReader, Support};

/// Starts a [`Memory`] for each case.
#[derive(Clone, Copy, Debug, Default)]
pub struct MemoryHarness;

#[async_trait]
impl Harness for MemoryHarness {
    type Backend = Memory;

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            restart: Support::No("the in-memory backend ends with its process"),
            recreate: Support::No("the in-memory backend does not delete logs"),
            malformed: Support::No("the in-memory backend stores records, which need no decoding"),
            damage_letter: Support::No("the in-memory backend stores letters, which need no decoding"),
            foreign: Support::No("other programs cannot reach the in-memory backend"),
            tail: Support::Yes,
            delete: Support::No("the in-memory backend does not delete logs"),
            delete_record: Support::No("the in-memory backend deletes only from the front"),
            remove_before: Support::Yes,
            refuse: Support::No("the in-memory backend refuses records only for their size"),
            wire: Support::No("the in-memory backend uses no network"),
            native: Support::No("the in-memory backend has no native data"),
            read_state: Support::Yes,
            consumers: Support::Yes,
            beats: Support::Yes,
            commits_are_cheap: Support::Yes,
            outbox: Support::Yes,
            shared_outboxes: Support::Yes,
            truncate: Support::Yes,
            truncate_all: Support::Yes,
            key_limit: Some(SIZE_LIMIT),
            record_limit: Some(SIZE_LIMIT),
            value_limit: Some(SIZE_LIMIT),
            ..Capabilities::minimal()
        }
    }

    async fn start(&self, _: &str) -> Result<Memory, Source> {
        Ok(Memory::new())
    }
}

#[async_trait]
impl Backend for Memory {
    type Store = MemoryStore;

    async fn log(&self, name: &str) -> Result<Arc<dyn Log>, Error> {
        Ok(Arc::new(self.log(name)?))
    }

    async fn store(&self) -> Result<MemoryStore, Error> {
        Ok(self.store())
    }

    async fn state_reader(&self) -> Result<StateReader<MemoryStore>, Source> {
        Ok(Arc::new(self.store()))
    }

    async fn outbox(&self, log: &str) -> Result<Arc<dyn Log>, Error> {
        Ok(Arc::new(self.log(log)?))
    }

    async fn truncate(&self, log: &str, before: Offset) -> Result<(), Source> {
        self.log(log)?.truncate(before);
        Ok(())
    }
}
