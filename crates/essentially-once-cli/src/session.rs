//! What one call of the program works on.

use std::sync::Arc;

use essentially_once::{ConsumerId, Error, Log, backend::Position};

use crate::{
    arguments::Cli,
    backend::{Address, Backend, NO_STORE},
    failure::Failure,
    store::Store,
};

pub(crate) struct Session<'a> {
    pub(crate) cli: &'a Cli,
    /// Where the log is.
    pub(crate) log: Address,
    /// Where the positions are.
    pub(crate) store: Address,
}

impl<'a> Session<'a> {
    pub(crate) fn new(cli: &'a Cli) -> Result<Self, Failure> {
        let log = cli.log.as_deref().map(|url| Address::parse(url, "--log")).transpose()?;
        let store = cli
            .store
            .as_deref()
            .map(|url| Address::parse(url, "--store"))
            .transpose()?;
        if store.as_ref().is_some_and(|store| store.log.is_some()) {
            return Err(Failure::usage(
                "--store: a store has no log, so leave the `#` and what follows out",
            ));
        }
        if store.as_ref().is_some_and(|store| !store.is_store()) {
            return Err(Failure::usage(format!("--store: {NO_STORE}")));
        }
        let (log, store) = match (log, store) {
            (Some(log), Some(store)) => (log, store),
            (Some(log), None) => (log.clone(), log),
            (None, Some(store)) => (store.clone(), store),
            (None, None) => {
                return Err(Failure::usage(
                    "no backend is named: give `--store URL` or `--log URL`, or set ESSENTIALLY_ONCE_STORE or \
                     ESSENTIALLY_ONCE_LOG",
                ));
            }
        };
        Ok(Self { cli, log, store })
    }

    pub(crate) fn consumer(&self) -> Result<&'a ConsumerId, Failure> {
        let named = self.cli.consumer.as_ref();
        named.ok_or_else(|| {
            Failure::usage("no consumer is named: give `--consumer NAME`, or set ESSENTIALLY_ONCE_CONSUMER")
        })
    }

    pub(crate) async fn open_store(&self) -> Result<Box<dyn Store>, Failure> {
        if !self.store.is_store() {
            return Err(Failure::usage(NO_STORE));
        }
        self.open(&self.store).await?.store()
    }

    pub(crate) async fn open(&self, address: &Address) -> Result<Backend, Failure> {
        // A prefix is the store's. The log may be on a backend that has none.
        let needs_prefix = *address == self.store || address.has_prefix();
        address.open(self.cli.prefix.as_deref().filter(|_| needs_prefix)).await
    }

    /// The position of the consumer, which must have one.
    pub(crate) async fn position(&self, store: &dyn Store) -> Result<Position, Failure> {
        let consumer = self.consumer()?;
        if let Some(position) = store.position(consumer).await? {
            return Ok(position);
        }
        let known = store.consumers().await?;
        let known = match known.as_deref() {
            None => "check its name".into(),
            Some([]) => "no consumer has one there".into(),
            Some(known) => {
                let names: Vec<_> = known.iter().take(10).map(ConsumerId::as_str).collect();
                let more = if known.len() > names.len() { ", ..." } else { "" };
                format!("these have one: {}{more}", names.join(", "))
            }
        };
        Err(Failure::refused(format!(
            "consumer {consumer} has no position in {}, so it never ran with this store; {known}",
            self.store.shown()
        )))
    }

    /// The log that is named, or else the one that the consumer reads.
    pub(crate) async fn open_log(&self, position: Option<&Position>) -> Result<Arc<dyn Log>, Failure> {
        let name = match (&self.log.log, position) {
            (Some(name), _) => name,
            (None, Some(position)) => position.log.name(),
            (None, None) => {
                return Err(Failure::usage(
                    "no log is named: append `#` and its name to the URL of `--log`, or name a consumer that reads it",
                ));
            }
        };
        let log = self.open(&self.log).await?.log(name).await?;
        match (self.consumer(), position) {
            (Ok(consumer), Some(position)) if !position.log.is_same_log(log.id()) => Err(Error::WrongLog {
                consumer: consumer.clone(),
                stored: position.log.clone(),
                given: log.id().clone(),
            }
            .into()),
            _ => Ok(log),
        }
    }
}
