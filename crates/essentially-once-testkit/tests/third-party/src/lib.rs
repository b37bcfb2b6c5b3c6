//! A log and a store in this process's memory.

mod log;
mod store;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use essentially_once::{Error, backend::{Durability, LogId}};

pub use crate::{
    log::MineLog,
    store::{MineStore, MineTx},
};

#[derive(Clone)]
pub struct Mine {
    logs: Arc<Mutex<HashMap<String, MineLog>>>,
    store: MineStore,
}

impl Mine {
    /// `fences` is false for a backend that is broken on purpose.
    pub fn new(fences: bool) -> Self {
        Self {
            logs: Arc::default(),
            store: MineStore::new(fences),
        }
    }

    pub fn log(&self, name: &str) -> Result<MineLog, Error> {
        let id = LogId::new(name)?;
        let mut logs = lock(&self.logs);
        Ok(logs.entry(name.to_owned()).or_insert_with(|| MineLog::new(id)).clone())
    }

    pub fn store(&self) -> MineStore {
        self.store.clone()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn volatile() -> Durability {
    Durability::Volatile("the data is in this process's memory".into())
}
