//! The four processes. Each runs one consumer, and any of them can be killed at any moment.

use std::time::Duration;

use essentially_once::{
    Consumer, ConsumerId, Handler, Log, OffsetStore, Outbox,
    backend::DeadLetters,
    consumer::{DeadLetterOptions, Delivery as ConsumerDelivery, OnFailure},
    relay::Relay,
};
use serde::{Deserialize, Serialize};

use crate::{
    Failure,
    delivery::Delivery,
    order_service::Follow,
    place::Place,
    rig::{Leash, Messenger, Task},
    settings::{OUTBOX, Settings, Topic},
    shipping::{InTransaction, OnItsOwn, Shipping},
    shop::{self, Shop},
};

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) enum Role {
    /// Takes orders, and follows what becomes of them.
    OrderService,
    /// Moves announcements from the order service's outbox to the bus.
    OrderRelay,
    /// Ships orders, and reports it.
    ShippingService,
    /// Moves reports from the shipping service's outbox to the bus.
    ShippingRelay,
}

impl Role {
    /// The processes that a delivery needs, in the direction of the records. Only
    /// essentially-once has an outbox for the way back.
    pub(crate) fn of(delivery: Delivery) -> &'static [Self] {
        match delivery {
            Delivery::EssentiallyOnce => &[
                Self::OrderService,
                Self::OrderRelay,
                Self::ShippingService,
                Self::ShippingRelay,
            ],
            Delivery::AtMostOnce | Delivery::AtLeastOnce => {
                &[Self::OrderService, Self::OrderRelay, Self::ShippingService]
            }
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::OrderService => "order service",
            Self::OrderRelay => "order relay",
            Self::ShippingService => "shipping service",
            Self::ShippingRelay => "shipping relay",
        }
    }
}

/// When a process ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) enum Until {
    /// When its parent stops it.
    Stopped,
    /// When it has handled everything that has arrived before it started.
    CaughtUp,
}

pub(crate) async fn run(task: Task, leash: Leash) -> Result<(), Failure> {
    let settings = &task.settings;
    let process = Process {
        until: task.until,
        settings,
        leash: leash.clone(),
    };
    match task.role {
        Role::OrderService => order_service(process).await,
        Role::OrderRelay => {
            let orders = settings.order_database().await?;
            let (outbox, store) = (orders.log(OUTBOX).await?, orders.store());
            let bus = Messenger::new(settings.bus(Topic::Orders).await?, task.faults, leash);
            let bus = settings.signed(Topic::Orders, bus)?;
            relay(process, settings.consumer("order-relay")?, outbox, bus, store).await
        }
        Role::ShippingService => shipping_service(process).await,
        Role::ShippingRelay => {
            let outbox = settings.shop_outbox().await?;
            let bus = Messenger::new(settings.bus(Topic::Progress).await?, task.faults, leash);
            let bus = settings.signed(Topic::Progress, bus)?;
            let id = settings.shipping_relay()?;
            match &settings.store {
                Place::Sqlite => relay(process, id, outbox, bus, settings.shipping_database().await?.store()).await,
                #[cfg(feature = "postgres")]
                Place::Postgres(url) => relay(process, id, outbox, bus, settings.postgres(url).await?.store()).await,
                #[cfg(feature = "redis")]
                Place::Redis(url) => {
                    let redis = essentially_once_redis::Redis::connect(url).await?;
                    relay(process, id, outbox, bus, redis.store()).await
                }
                #[cfg(feature = "rabbitmq")]
                Place::Rabbitmq(url) => {
                    let rabbit = essentially_once_rabbitmq::Rabbit::connect(url).await?;
                    relay(process, id, outbox, bus, rabbit.store()).await
                }
            }
        }
    }
}

/// Follows the progress of orders. The orders themselves come from the rig, in place of customers.
async fn order_service(process: Process<'_>) -> Result<(), Failure> {
    let settings = process.settings;
    if settings.delivery != Delivery::EssentiallyOnce {
        // Nothing is reported back.
        if process.until == Until::Stopped {
            process.leash.stopped().cancelled().await;
        }
        return Ok(());
    }
    let progress = settings.signed(Topic::Progress, settings.bus(Topic::Progress).await?)?;
    let store = settings.order_database().await?.store();
    let id = settings.consumer("orders")?;
    let follow = process.leash.hold(Follow);
    let consumer = Consumer::essentially_once(id, progress, store, follow).dead_letters(DeadLetterOptions::new());
    process.consume(consumer).await
}

async fn relay(
    process: Process<'_>,
    id: ConsumerId,
    outbox: impl Log + 'static,
    bus: impl Log + 'static,
    store: impl OffsetStore,
) -> Result<(), Failure> {
    let relay = process.leash.hold(Relay::to(bus));
    process.consume(Consumer::at_least_once(id, outbox, store, relay)).await
}

async fn shipping_service(process: Process<'_>) -> Result<(), Failure> {
    let settings = process.settings;
    match &settings.store {
        Place::Sqlite => {
            let store = settings.shipping_database().await?.store();
            let own_shop = async || Ok(shop::own_connection(&settings.file("shipping.db"))?);
            ship(process, store, own_shop).await
        }
        #[cfg(feature = "postgres")]
        Place::Postgres(url) => {
            let store = settings.postgres(url).await?.store();
            let own_shop = async || shop::PostgresShop::connect(url, &settings.shipping()?).await;
            ship(process, store, own_shop).await
        }
        #[cfg(feature = "redis")]
        Place::Redis(url) => {
            let store = essentially_once_redis::Redis::connect(url).await?.store();
            let own_shop = async || shop::RedisShop::connect(url, &settings.shipping()?).await;
            ship(process, store, own_shop).await
        }
        #[cfg(feature = "rabbitmq")]
        Place::Rabbitmq(url) => {
            let store = essentially_once_rabbitmq::Rabbit::connect(url).await?.store();
            let own_shop = async || shop::RabbitShop::connect(url, &settings.shipping()?).await;
            ship(process, store, own_shop).await
        }
    }
}

async fn ship<S, O>(
    process: Process<'_>,
    store: S,
    own_shop: impl AsyncFnOnce() -> Result<O, Failure>,
) -> Result<(), Failure>
where
    S: OffsetStore<Tx: Shop + Outbox + DeadLetters>,
    O: Shop,
{
    let Process { settings, leash, .. } = &process;
    let (id, format) = (settings.shipping()?, settings.format);
    let orders = settings.signed(Topic::Orders, settings.bus(Topic::Orders).await?)?;
    match settings.delivery {
        Delivery::EssentiallyOnce => {
            let shipping = leash.hold(Shipping {
                desk: InTransaction,
                format,
            });
            let consumer = Consumer::essentially_once(id, orders, store, shipping);
            process.consume(consumer.dead_letters(DeadLetterOptions::new())).await
        }
        Delivery::AtLeastOnce => {
            let shipping = leash.hold(Shipping {
                desk: OnItsOwn(own_shop().await?),
                format,
            });
            let consumer = Consumer::at_least_once(id, orders, store, shipping);
            process.consume(consumer.on_failure(OnFailure::Skip)).await
        }
        Delivery::AtMostOnce => {
            let shipping = leash.hold(Shipping {
                desk: OnItsOwn(own_shop().await?),
                format,
            });
            process
                .consume(Consumer::at_most_once(id, orders, store, shipping))
                .await
        }
    }
}

/// What a process needs to run its consumer.
struct Process<'a> {
    settings: &'a Settings,
    until: Until,
    leash: Leash,
}

impl Process<'_> {
    async fn consume<S, H, D>(&self, consumer: Consumer<S, H, D>) -> Result<(), Failure>
    where
        S: OffsetStore,
        H: Handler<D::Tx>,
        D: ConsumerDelivery<S>,
    {
        /// Limits the restarts, so that the process fails if a backend stays unavailable.
        const RESTARTS: u32 = 40;
        /// The bus loses one reply after another here, and is there again at once.
        const LONGEST_PAUSE: Duration = Duration::from_millis(250);
        /// The previous process is dead, as the rig has seen. Nobody needs to wait for it.
        const NO_STANDBY: Duration = Duration::ZERO;
        let consumer = consumer
            .max_batch(self.settings.max_batch)
            .restart_limit(RESTARTS)
            .max_backoff(LONGEST_PAUSE)
            .standby_after(NO_STANDBY);
        match self.until {
            Until::Stopped => consumer.run_until(self.leash.stopped().clone()).await?,
            Until::CaughtUp => consumer.run_until_caught_up().await?,
        };
        Ok(())
    }
}
