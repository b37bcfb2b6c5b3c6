//! The shipping worker: a process that can be killed at any moment.

use std::{path::PathBuf, time::Duration};

use essentially_once::{
    Consumer, ConsumerId, OffsetStore,
    backend::DeadLetters,
    consumer::{DeadLetterOptions, OnFailure},
};

use crate::{
    Failure,
    backend::{Backend, Place},
    delivery::Delivery,
    leash::Leash,
    order::Format,
    shipping::{InTransaction, OnItsOwn, Shipping},
    shop::{self, Shop},
};

/// The settings that the parent passes to its worker.
#[derive(clap::Args)]
pub(crate) struct WorkerArgs {
    pub(crate) database: PathBuf,
    pub(crate) consumer: ConsumerId,
    pub(crate) delivery: Delivery,
    /// The number of fields in every line.
    pub(crate) fields: usize,
    /// The index of the freight field.
    pub(crate) freight: usize,
    /// Whether to accept a comma that should have been quoted.
    #[arg(action = clap::ArgAction::Set)]
    pub(crate) mended: bool,
    /// How many orders to take at a time.
    pub(crate) max_batch: usize,
    /// How many orders to handle before waiting for the parent.
    pub(crate) leash: u64,
    /// Passed in the environment. It may hold a password, and everyone can read a command line.
    #[arg(long, env = LOG_VARIABLE, hide_env_values = true)]
    pub(crate) log: String,
    #[arg(long, env = STORE_VARIABLE, hide_env_values = true)]
    pub(crate) store: String,
}

pub(crate) const LOG_VARIABLE: &str = "ORDERS_LOG";
pub(crate) const STORE_VARIABLE: &str = "ORDERS_STORE";

/// Ships all orders that the log holds, and those among the dead letters that are to be retried.
pub(crate) fn run(args: WorkerArgs) -> Result<(), Failure> {
    let leash = Leash::attach(args.leash);
    let backend = Backend {
        log: args.log.parse()?,
        store: args.store.parse()?,
        database: args.database.clone(),
        consumer: args.consumer.clone(),
    };
    crate::runtime()?.block_on(open_store(&args, &backend, leash))
}

async fn open_store(args: &WorkerArgs, backend: &Backend, leash: Leash) -> Result<(), Failure> {
    match &backend.store {
        Place::Sqlite => {
            let store = backend.sqlite().await?.store();
            let own_shop = async || Ok(shop::own_connection(&args.database)?);
            ship(args, backend, leash, store, own_shop).await
        }
        #[cfg(feature = "redis")]
        Place::Redis(url) => {
            let store = essentially_once_redis::Redis::connect(url).await?.store();
            let own_shop = async || shop::RedisShop::connect(url, &args.consumer).await;
            ship(args, backend, leash, store, own_shop).await
        }
        #[cfg(feature = "rabbitmq")]
        Place::Rabbitmq(url) => {
            let store = essentially_once_rabbitmq::Rabbit::connect(url).await?.store();
            let own_shop = async || shop::RabbitShop::connect(url, &args.consumer).await;
            ship(args, backend, leash, store, own_shop).await
        }
    }
}

async fn ship<S: OffsetStore<Tx: Shop + DeadLetters>, O: Shop>(
    args: &WorkerArgs,
    backend: &Backend,
    leash: Leash,
    store: S,
    own_shop: impl AsyncFnOnce() -> Result<O, Failure>,
) -> Result<(), Failure> {
    /// Limits the restarts, so that the worker fails if the database stays unavailable.
    const RESTARTS: u32 = 20;
    /// The previous worker is dead, as the parent has seen. Nobody needs to wait for it.
    const NO_STANDBY: Duration = Duration::ZERO;
    let log = backend.open_log().await?;
    let id = args.consumer.clone();
    let format = Format {
        fields: args.fields,
        freight: args.freight,
        mended: args.mended,
    };
    match args.delivery {
        Delivery::EssentiallyOnce => {
            let desk = InTransaction;
            Consumer::essentially_once(id, log, store, Shipping { desk, format, leash })
                .dead_letters(DeadLetterOptions::new())
                .max_batch(args.max_batch)
                .restart_limit(RESTARTS)
                .standby_after(NO_STANDBY)
                .run_until_caught_up()
                .await?;
        }
        Delivery::AtLeastOnce => {
            let desk = OnItsOwn(own_shop().await?);
            Consumer::at_least_once(id, log, store, Shipping { desk, format, leash })
                .on_failure(OnFailure::Skip)
                .max_batch(args.max_batch)
                .restart_limit(RESTARTS)
                .standby_after(NO_STANDBY)
                .run_until_caught_up()
                .await?;
        }
        Delivery::AtMostOnce => {
            let desk = OnItsOwn(own_shop().await?);
            Consumer::at_most_once(id, log, store, Shipping { desk, format, leash })
                .max_batch(args.max_batch)
                .restart_limit(RESTARTS)
                .standby_after(NO_STANDBY)
                .run_until_caught_up()
                .await?;
        }
    }
    Ok(())
}
