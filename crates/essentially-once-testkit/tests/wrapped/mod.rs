//! The in-memory backend in wrappers that inject no faults. They must change nothing that a
//! contract covers.

use std::sync::Arc;

use essentially_once::{
    Error, Log, Offset, async_trait,
    backend::Source,
    memory::{Memory, MemoryStore},
};
use essentially_once_testkit::{
    Backend, Capabilities, Harness, StateReader, Support,
    faults::{Faults, FaultyLog, FaultyStore, Plan},
    memory::MemoryHarness,
};

/// The harness of the wrapped backend.
pub(crate) struct Wrapped;

#[async_trait]
impl Harness for Wrapped {
    type Backend = WrappedMemory;

    fn capabilities(&self) -> Capabilities {
        let mut capabilities = MemoryHarness.capabilities();
        capabilities.commits_are_cheap = Support::No("the wrappers limit a run to fewer operations");
        capabilities
    }

    async fn start(&self, _: &str) -> Result<WrappedMemory, Source> {
        Ok(WrappedMemory {
            memory: Memory::new(),
            faults: Faults::new(Plan::none()),
        })
    }
}

pub(crate) struct WrappedMemory {
    memory: Memory,
    faults: Faults,
}

#[async_trait]
impl Backend for WrappedMemory {
    type Store = FaultyStore<MemoryStore>;

    async fn log(&self, name: &str) -> Result<Arc<dyn Log>, Error> {
        Ok(Arc::new(FaultyLog::new(self.memory.log(name)?, &self.faults.process())))
    }

    async fn store(&self) -> Result<Self::Store, Error> {
        Ok(FaultyStore::new(self.memory.store(), &self.faults.process()))
    }

    async fn state_reader(&self) -> Result<StateReader<Self::Store>, Source> {
        Ok(Arc::new(self.store().await?))
    }

    async fn outbox(&self, log: &str) -> Result<Arc<dyn Log>, Error> {
        Backend::log(self, log).await
    }

    async fn truncate(&self, log: &str, before: Offset) -> Result<(), Source> {
        self.memory.log(log)?.truncate(before);
        Ok(())
    }
}
