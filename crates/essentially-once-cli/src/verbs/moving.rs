//! `skip` and `seek`.

use std::fmt;

use essentially_once::{Error, Log, Offset, StartAt, consumer::SeekPlan};
use serde_json::json;

use crate::{
    arguments::Change,
    failure::Failure,
    output::{brief, counted, done, is_wanted},
    session::Session,
    verbs::status::count_between,
};

pub(crate) async fn skip(session: &Session<'_>, offset: Offset, change: &Change) -> Result<(), Failure> {
    let store = session.open_store().await?;
    let position = session.position(&*store).await?;
    let log = session.open_log(Some(&position)).await?;
    let consumer = session.consumer()?;
    let record = store.plan_skip(consumer, &*log, offset).await?;
    let what = format!(
        "pass the record at {offset} for consumer {consumer}, without its effects: {}",
        brief(&record)
    );
    if !is_wanted(session, change, &what, 1)? {
        return Ok(());
    }
    let next = store.skip(consumer, &*log, offset, &change.operator()).await?;
    let text = format!("passed the record at {offset}; consumer {consumer} continues at {next}");
    done(
        session,
        &text,
        &json!({ "skipped": offset.to_string(), "next": next.to_string() }),
    )
}

pub(crate) async fn seek(session: &Session<'_>, to: StartAt, change: &Change) -> Result<(), Failure> {
    let store = session.open_store().await?;
    let position = session.position(&*store).await?;
    let log = session.open_log(Some(&position)).await?;
    let consumer = session.consumer()?;
    let plan = store.plan_seek(consumer, &*log, to).await.map_err(Failure::of_place)?;
    let from = plan.from.unwrap_or(position.next);
    let between = Between::count(session, &*log, &plan, from).await;
    let what = match from == plan.to {
        // The note of the position goes, which repairs `Error::LogChanged`.
        true => {
            format!("set the position of consumer {consumer} to {from} again, and forget which record it passed last")
        }
        false => format!(
            "move consumer {consumer} from {from} to {}: {}",
            plan.to,
            effects(&plan, from, between)
        ),
    };
    let records = between.at_most();
    if !is_wanted(session, change, &what, records.saturating_add(plan.letters_removed))? {
        return Ok(());
    }
    let next = match store.seek(consumer, &*log, &plan, &change.operator()).await {
        Err(Error::Fenced { .. }) => {
            return Err(Failure::refused(format!(
                "consumer {consumer} has committed meanwhile; nothing was changed: `pause` it first, and `resume` it \
                 afterwards"
            )));
        }
        sought => sought?,
    };
    let text = format!("consumer {consumer} continues at {next}");
    let value = json!({ "from": plan.from.map(|from| from.to_string()), "next": next.to_string(), "letters_removed": plan.letters_removed });
    done(session, &text, &value)
}

/// How many records are between two places.
#[derive(Clone, Copy)]
enum Between {
    Exactly(u64),
    About(u64),
    MoreThan(u64),
    Unknown,
}

impl Between {
    /// A log that cannot count is read.
    async fn count(session: &Session<'_>, log: &dyn Log, plan: &SeekPlan, from: Offset) -> Self {
        match plan.records {
            Some(records) if session.log.is_file() => Self::Exactly(records),
            Some(records) => Self::About(records),
            None => match count_between(log, from, plan.to).await {
                Some((records, false)) => Self::Exactly(records),
                Some((records, true)) => Self::MoreThan(records),
                None => Self::Unknown,
            },
        }
    }

    const fn at_most(self) -> u64 {
        match self {
            Self::Exactly(records) | Self::About(records) => records,
            Self::MoreThan(_) | Self::Unknown => u64::MAX,
        }
    }
}

impl fmt::Display for Between {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Exactly(records) => f.write_str(&counted(records, "record", "records")),
            Self::About(records) => write!(f, "about {}", counted(records, "record", "records")),
            Self::MoreThan(records) => write!(f, "more than {records} records"),
            Self::Unknown => f.write_str("the records in between"),
        }
    }
}

/// What moving would do, after "this would".
fn effects(plan: &SeekPlan, from: Offset, between: Between) -> String {
    let mut effects = match between {
        Between::Exactly(0) => "no record is in between".into(),
        between if plan.to < from => format!("handle {between} again"),
        Between::Exactly(1) => "pass 1 record without handling it".into(),
        between => format!("pass {between} without handling them"),
    };
    if plan.letters_removed > 0 {
        let letters = counted(plan.letters_removed, "dead letter", "dead letters");
        let whose = if plan.letters_removed == 1 {
            "whose record is"
        } else {
            "whose records are"
        };
        effects += &format!(", and remove {letters}, {whose} handled again");
    }
    effects
}
