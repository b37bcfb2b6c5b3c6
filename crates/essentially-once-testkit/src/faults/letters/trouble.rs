//! Handlers that cannot handle some records.

use std::{
    collections::HashMap,
    fmt,
    future::pending,
    panic::resume_unwind,
    str::FromStr,
    sync::{Arc, Mutex, PoisonError},
};

use essentially_once::{CancellationToken, Error, Handler, HandlerError, Offset, Record, async_trait};

use crate::faults::control::Process;

/// Why a handler in trouble fails.
pub(super) const TROUBLE: &str = "planned trouble";

/// What the handler does with a record.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub enum TroubleKind {
    /// It fails each time, in a way that another try may mend.
    Fails,
    /// It fails this many times, and then succeeds.
    FailsTimes(u32),
    /// It succeeds the first time, which may be rolled back, and fails each time after.
    FailsAgain,
    /// It rejects the record each time.
    Rejects,
    /// It panics each time.
    Panics,
    /// It never returns, until the time limit for a record is over.
    Hangs,
    /// The first time, it never returns, and the run is stopped.
    HangsUntilStopped,
    /// It does its work, and then its process dies, each time.
    Kills,
}

impl TroubleKind {
    /// All kinds. A handler that fails a few times fails up to three times, which is once more than
    /// before the record is set aside.
    pub const ALL: [Self; 10] = [
        Self::Fails,
        Self::FailsTimes(1),
        Self::FailsTimes(2),
        Self::FailsTimes(3),
        Self::FailsAgain,
        Self::Rejects,
        Self::Panics,
        Self::Hangs,
        Self::HangsUntilStopped,
        Self::Kills,
    ];
}

/// A record in trouble. As text: `record-2:rejects`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Trouble {
    /// The record's number in the log. The first one is 0.
    pub record: usize,
    /// What the handler does with it.
    pub kind: TroubleKind,
}

/// The troubles of a run. All its handlers share them.
#[derive(Clone, Default)]
pub(super) struct Troubles {
    shared: Arc<Mutex<HashMap<Offset, Met>>>,
}

struct Met {
    kind: TroubleKind,
    times: u32,
}

impl Troubles {
    pub(super) fn new(troubles: &[Trouble], records: &[Record]) -> Self {
        let met = |trouble: &Trouble| {
            let kind = trouble.kind;
            Some((records.get(trouble.record)?.offset, Met { kind, times: 0 }))
        };
        Self {
            shared: Arc::new(Mutex::new(troubles.iter().filter_map(met).collect())),
        }
    }

    pub(super) fn holds(&self, wanted: TroubleKind) -> bool {
        let met = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        met.values().any(|met| met.kind == wanted)
    }

    /// What to do with the record this time.
    fn meet(&self, offset: Offset) -> Option<TroubleKind> {
        let mut met = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        let met = met.get_mut(&offset)?;
        met.times += 1;
        let is_well = match met.kind {
            TroubleKind::FailsTimes(times) => met.times > times,
            TroubleKind::HangsUntilStopped => met.times > 1,
            TroubleKind::FailsAgain => met.times == 1,
            _ => false,
        };
        (!is_well).then_some(met.kind)
    }
}

/// A handler that gets into trouble before the one inside, or behind it.
pub(super) struct TroubledHandler<H> {
    pub(super) inner: H,
    pub(super) troubles: Troubles,
    pub(super) process: Process,
    /// Stops the run.
    pub(super) stop: CancellationToken,
}

#[async_trait]
impl<Tx: Send, H: Handler<Tx>> Handler<Tx> for TroubledHandler<H> {
    async fn handle(&mut self, record: &Record, tx: &mut Tx) -> Result<(), HandlerError> {
        let trouble = self.troubles.meet(record.offset);
        // What it did so far must be rolled back.
        self.inner.handle(record, tx).await?;
        match trouble {
            None => Ok(()),
            Some(TroubleKind::Fails | TroubleKind::FailsTimes(_) | TroubleKind::FailsAgain) => {
                Err(HandlerError::retry(TROUBLE))
            }
            Some(TroubleKind::Rejects) => Err(HandlerError::reject(TROUBLE)),
            // Unlike `panic!`, it prints nothing.
            Some(TroubleKind::Panics) => resume_unwind(Box::new("planned trouble")),
            Some(TroubleKind::Hangs) => pending().await,
            Some(TroubleKind::HangsUntilStopped) => {
                self.stop.cancel();
                pending().await
            }
            Some(TroubleKind::Kills) => self.process.die().await,
        }
    }
}

impl fmt::Display for TroubleKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fails => f.write_str("fails"),
            Self::FailsTimes(times) => write!(f, "fails-{times}"),
            Self::FailsAgain => f.write_str("fails-again"),
            Self::Rejects => f.write_str("rejects"),
            Self::Panics => f.write_str("panics"),
            Self::Hangs => f.write_str("hangs"),
            Self::HangsUntilStopped => f.write_str("hangs-until-stopped"),
            Self::Kills => f.write_str("kills"),
        }
    }
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "record-{}:{}", self.record, self.kind)
    }
}

impl FromStr for Trouble {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let parse = || {
            let (record, name) = text.trim().strip_prefix("record-")?.split_once(':')?;
            let kind = TroubleKind::ALL.into_iter().find(|kind| kind.to_string() == name);
            let times = name.strip_prefix("fails-").and_then(|times| times.parse().ok());
            Some(Self {
                record: record.parse().ok()?,
                kind: kind.or(times.map(TroubleKind::FailsTimes))?,
            })
        };
        parse().ok_or_else(|| Error::InvalidSetting {
            setting: "trouble",
            reason: format!(
                "{text:?} is not `record-<number>:<kind>`, such as `record-2:rejects`; records count from 0, kinds are {}",
                TroubleKind::ALL.map(|kind| kind.to_string()).join(", ")
            ),
        })
    }
}
