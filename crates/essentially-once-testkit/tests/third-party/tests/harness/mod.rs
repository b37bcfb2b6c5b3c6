use std::sync::Arc;

use essentially_once::{Error, Log, async_trait, backend::Source};
use essentially_once_testkit::{Backend, Capabilities, Harness};
use mine::{Mine, MineStore};

pub struct MineHarness;

#[async_trait]
impl Harness for MineHarness {
    type Backend = Started;

    fn capabilities(&self) -> Capabilities {
        Capabilities::minimal()
    }

    async fn start(&self, _: &str) -> Result<Started, Source> {
        Ok(Started(Mine::new(std::env::var_os("BROKEN").is_none())))
    }
}

pub struct Started(Mine);

#[async_trait]
impl Backend for Started {
    type Store = MineStore;

    async fn log(&self, name: &str) -> Result<Arc<dyn Log>, Error> {
        Ok(Arc::new(self.0.log(name)?))
    }

    async fn store(&self) -> Result<MineStore, Error> {
        Ok(self.0.store())
    }
}
