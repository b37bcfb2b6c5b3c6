//! `skip` and `seek`.

use essentially_once::{Error, Offset, StartAt, consumer::SeekPlan};
use serde_json::json;

use crate::{
    arguments::Change,
    failure::Failure,
    output::{brief, done, is_wanted},
    session::Session,
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
    let plan = store.plan_seek(consumer, &*log, to).await?;
    let what = format!(
        "move consumer {consumer} from {} to {}: {}",
        plan.from.unwrap_or(position.next),
        plan.to,
        effects(&plan)
    );
    // A log that cannot count may hold any number of records.
    let records = plan.records.unwrap_or(u64::MAX);
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

/// What moving would do, after "this would".
fn effects(plan: &SeekPlan) -> String {
    let records = match plan.records {
        Some(1) => "1 record".into(),
        Some(records) => format!("about {records} records"),
        None => "the records in between".into(),
    };
    let mut effects = match plan.from {
        Some(from) if plan.to < from => format!("handle {records} again"),
        Some(from) if plan.to > from => format!("pass {records} without handling them"),
        _ => "leave it where it is".into(),
    };
    if plan.letters_removed > 0 {
        effects += &format!(
            ", and remove {} dead letters, whose records are handled again",
            plan.letters_removed
        );
    }
    effects
}
