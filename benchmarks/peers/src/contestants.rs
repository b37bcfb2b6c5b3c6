//! Who takes part, and what each promises.

use crate::places::Backend::{self, Kafka, Postgres, Rabbitmq, Redis, Sqlite};

pub(crate) struct Contestant {
    pub(crate) name: &'static str,
    /// The folder of the workspace that builds the program.
    pub(crate) folder: &'static str,
    pub(crate) program: &'static str,
    pub(crate) way: &'static str,
    pub(crate) bus: Backend,
    pub(crate) store: Backend,
    /// What holds when a worker stops or freezes, by what its documentation or code says.
    pub(crate) promise: &'static str,
}

const fn peer(
    name: &'static str,
    folder: &'static str,
    program: &'static str,
    backend: Backend,
    promise: &'static str,
) -> Contestant {
    Contestant {
        name,
        folder,
        program,
        way: "",
        bus: backend,
        store: backend,
        promise,
    }
}

const fn by_hand(name: &'static str, way: &'static str, backend: Backend, promise: &'static str) -> Contestant {
    Contestant {
        way,
        ..peer(name, ".", "by_hand", backend, promise)
    }
}

const fn ours(bus: Backend, store: Backend) -> Contestant {
    Contestant {
        store,
        ..peer("this library", ".", OURS, bus, "atomic, fenced")
    }
}

/// This library's program.
pub(crate) const OURS: &str = "ours";

const FIRST: &str = "by hand: the position, then each record";
const SEPARATELY: &str = "by hand: each record, then the position";
const TOGETHER: &str = "by hand: position in the transaction";

pub(crate) const ALL: &[Contestant] = &[
    by_hand(FIRST, "first", Redis, "at most once"),
    by_hand("by hand: consumer group", "group", Redis, "at least once"),
    by_hand(SEPARATELY, "separately", Redis, "at least once"),
    by_hand(TOGETHER, "together", Redis, "atomic, not fenced"),
    peer(
        "RustStream, `.pipeline().atomic()`",
        ".",
        "redis_ruststream",
        Redis,
        "atomic, not fenced",
    ),
    peer("SeaStreamer", ".", "redis_sea_streamer", Redis, "at least once"),
    peer("omniqueue", ".", "redis_omniqueue", Redis, "at least once"),
    ours(Redis, Redis),
    by_hand(SEPARATELY, "separately", Sqlite, "at least once"),
    by_hand(TOGETHER, "together", Sqlite, "atomic, not fenced"),
    peer(
        "RustStream, `.transactional()`",
        "sqlx-0.9",
        "sqlite_ruststream",
        Sqlite,
        "atomic, fenced by a lease",
    ),
    peer("apalis", "sqlx-0.9", "sqlite_apalis", Sqlite, "at least once"),
    ours(Sqlite, Sqlite),
    by_hand(SEPARATELY, "separately", Postgres, "at least once"),
    by_hand(TOGETHER, "together", Postgres, "atomic, not fenced"),
    peer(
        "eventcore",
        "sqlx-0.8",
        "postgres_eventcore",
        Postgres,
        "atomic, advisory lock",
    ),
    peer(
        "pgmq, delete in the transaction",
        "sqlx-0.8",
        "postgres_pgmq",
        Postgres,
        "atomic, fenced by the delete",
    ),
    peer("awa", "sqlx-0.8", "postgres_awa", Postgres, "at least once"),
    peer(
        "durare",
        "sqlx-0.8",
        "postgres_durare",
        Postgres,
        "atomic, no take-over of others' work",
    ),
    ours(Postgres, Postgres),
    ours(Rabbitmq, Sqlite),
    ours(Kafka, Postgres),
    ours(Redis, Sqlite),
];

impl Contestant {
    /// The backend, or the bus and the store.
    pub(crate) fn backends(&self) -> String {
        if self.bus == self.store {
            return self.bus.name().into();
        }
        format!("{} to {}", self.bus.name(), self.store.name())
    }
}
