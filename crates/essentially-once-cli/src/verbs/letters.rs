//! `dead-letters`: the records that a consumer has set aside.

use std::{
    ffi::OsStr,
    fs,
    io::{self, Read as _, Write as _},
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

use essentially_once::{
    Error, NewRecord, Offset,
    backend::DeadLetter,
    consumer::dead_letters::{LetterFilter, LetterPlan},
};
use serde::Serialize;
use serde_json::json;

use crate::{
    arguments::{Change, Letters, Selected, Which},
    failure::Failure,
    output::{
        Data, counted, done, full, headers, is_wanted, json as print_json, line, pairs, printed, short, table, time,
    },
    session::Session,
    store::Store,
};

/// How many letters to read at once.
const PAGE: usize = 1_000;

/// How many letters a table shows by default.
const SHOWN: usize = 20;

#[derive(Serialize)]
struct Letter {
    offset: String,
    key: Option<Data>,
    tries: u32,
    first_reason: String,
    last_reason: String,
    parked_at: String,
    last_failed_at: String,
    state: String,
    origin: Option<String>,
    headers: Vec<(String, Data)>,
    payload: Data,
    malformed: Option<String>,
    edited_by: Option<String>,
}

pub(crate) async fn letters(session: &Session<'_>, verb: &Letters) -> Result<(), Failure> {
    let store = session.open_store().await?;
    // A mistyped name would otherwise look like a consumer without letters.
    session.position(&*store).await?;
    match verb {
        Letters::List { filter, after, limit } => {
            let limit = limit.unwrap_or(if session.cli.json { usize::MAX } else { SHOWN });
            list(session, &*store, &filter.to_library(), *after, limit).await
        }
        Letters::Show { offset, payload } => show(session, &*store, *offset, payload.as_deref()).await,
        Letters::Retry { which, change } => retry(session, &*store, which, change).await,
        Letters::Discard { which, change } => discard(session, &*store, which, change).await,
        Letters::Edit {
            offset,
            payload,
            payload_file,
            key,
            change,
        } => {
            let payload = match (payload, payload_file) {
                (Some(text), _) => text.as_encoded_bytes().to_vec(),
                (None, Some(file)) => read(file)?,
                (None, None) => return Err(Failure::usage("give `--payload TEXT` or `--payload-file FILE`")),
            };
            edit(session, &*store, *offset, payload, key.as_deref(), change).await
        }
    }
}

async fn list(
    session: &Session<'_>,
    store: &dyn Store,
    filter: &LetterFilter,
    after: Option<Offset>,
    limit: usize,
) -> Result<(), Failure> {
    if session.cli.json {
        return list_json(session, store, filter, after, limit).await;
    }
    let letters = store.letters(session.consumer()?, filter, after, limit).await?;
    if letters.is_empty() {
        return line("no letters");
    }
    let rows = letters.iter().map(|letter| {
        vec![
            letter.record.offset.to_string(),
            letter.key().map(|key| short(key)).unwrap_or_default(),
            letter.tries.to_string(),
            time(letter.parked_at),
            state(letter),
            short(letter.last_reason.as_bytes()),
        ]
    });
    table(&["offset", "key", "tries", "set aside", "state", "reason"], rows)?;
    match letters.last() {
        Some(last) if letters.len() == limit => line(&format!(
            "There may be more: go on with `--after {}`.",
            last.record.offset
        )),
        _ => Ok(()),
    }
}

/// One page after the other, since there may be more letters than fit into memory.
async fn list_json(
    session: &Session<'_>,
    store: &dyn Store,
    filter: &LetterFilter,
    mut after: Option<Offset>,
    limit: usize,
) -> Result<(), Failure> {
    let mut left = limit;
    while left > 0 {
        let page = store
            .letters(session.consumer()?, filter, after, left.min(PAGE))
            .await?;
        let Some(last) = page.last() else { break };
        after = Some(last.record.offset);
        left -= page.len();
        page.iter().try_for_each(|letter| print_json(&described(letter)))?;
    }
    Ok(())
}

async fn show(session: &Session<'_>, store: &dyn Store, offset: Offset, payload: Option<&Path>) -> Result<(), Failure> {
    let letter = existing(session, store, offset).await?;
    if let Some(file) = payload {
        return write(file, &letter.record.payload);
    }
    let described = described(&letter);
    if session.cli.json {
        return print_json(&described);
    }
    let Letter {
        offset,
        key,
        tries,
        first_reason,
        last_reason,
        parked_at,
        last_failed_at,
        state,
        origin,
        headers,
        payload,
        malformed,
        edited_by,
    } = described;
    let mut rows = vec![
        ("offset", offset),
        ("state", state),
        ("tries", tries.to_string()),
        ("set aside", parked_at),
        ("last failure", last_failed_at),
        ("first reason", printed(&first_reason)),
        ("last reason", printed(&last_reason)),
    ];
    let optional = [
        ("key", key.map(|key| full(&key.0))),
        ("origin", origin),
        ("malformed", malformed.map(|why| printed(&why))),
        ("edited by", edited_by.map(|by| printed(&by))),
    ];
    rows.extend(optional.into_iter().filter_map(|(name, value)| Some((name, value?))));
    rows.extend(
        headers
            .into_iter()
            .map(|(name, value)| ("header", format!("{}: {}", printed(&name), full(&value.0)))),
    );
    rows.push(("payload", full(&payload.0)));
    pairs(&rows)
}

async fn retry(session: &Session<'_>, store: &dyn Store, which: &Which, change: &Change) -> Result<(), Failure> {
    let (consumer, by) = (session.consumer()?, change.operator());
    let filter = match which.selected()? {
        Selected::One(offset) => {
            existing(session, store, offset).await?;
            store.plan_retry(consumer, offset).await?;
            if !is_wanted(session, change, &format!("retry the letter at {offset}"), 1)? {
                return Ok(());
            }
            store.retry(consumer, offset, &by).await?;
            let text = format!("the letter at {offset} is due; the running consumer tries it next");
            return done(session, &text, &json!({ "retried": 1 }));
        }
        Selected::Many(filter) => filter,
    };
    let plan = store.plan_retry_all(consumer, &filter).await?;
    if plan.letters == 0 {
        return Err(Failure::refused(
            "no letter meets all conditions and can be retried; one that is due already, or waits behind another one of \
             its key, cannot",
        ));
    }
    let first = if plan.letters == 1 {
        "the first one of its key"
    } else {
        "each the first one of its key"
    };
    let what = format!("retry {}, {first}", letters_of(plan.letters));
    if !is_wanted(session, change, &what, plan.letters)? {
        return Ok(());
    }
    let retried = match store.retry_all(consumer, &plan.filter, &by).await {
        Ok(retried) => retried,
        Err(error) => {
            let left = store.plan_retry_all(consumer, &plan.filter).await;
            return Err(incomplete(error, "retried", plan.letters, left));
        }
    };
    let are = if retried == 1 { "is" } else { "are" };
    let text = format!(
        "{} {are} due now; those behind follow as they succeed",
        letters_of(retried)
    );
    done(session, &text, &json!({ "retried": retried }))
}

async fn discard(session: &Session<'_>, store: &dyn Store, which: &Which, change: &Change) -> Result<(), Failure> {
    let (consumer, by) = (session.consumer()?, change.operator());
    let filter = match which.selected()? {
        Selected::One(offset) => {
            let letter = existing(session, store, offset).await?;
            let what = format!("discard the letter at {offset} for good, without its effects");
            if !is_wanted(session, change, &what, 1)? {
                return Ok(());
            }
            store.discard(consumer, &letter, &by).await?;
            return done(
                session,
                &format!("discarded the letter at {offset}"),
                &json!({ "discarded": 1 }),
            );
        }
        Selected::Many(filter) => filter,
    };
    let plan = store.plan_discard_all(consumer, &filter).await?;
    if plan.letters == 0 {
        return Err(Failure::refused("no letter meets all conditions; nothing was changed"));
    }
    let their = if plan.letters == 1 { "its" } else { "their" };
    let what = format!("discard {} for good, without {their} effects", letters_of(plan.letters));
    if !is_wanted(session, change, &what, plan.letters)? {
        return Ok(());
    }
    let discarded = match store.discard_all(consumer, &plan.filter, &by).await {
        Ok(discarded) => discarded,
        Err(error) => {
            let left = store.plan_discard_all(consumer, &plan.filter).await;
            return Err(incomplete(error, "discarded", plan.letters, left));
        }
    };
    done(
        session,
        &format!("discarded {}", letters_of(discarded)),
        &json!({ "discarded": discarded }),
    )
}

async fn edit(
    session: &Session<'_>,
    store: &dyn Store,
    offset: Offset,
    payload: Vec<u8>,
    key: Option<&OsStr>,
    change: &Change,
) -> Result<(), Failure> {
    let letter = existing(session, store, offset).await?;
    let mut new = NewRecord::from(&letter.record);
    new.payload = payload.into();
    match (letter.record.malformed.is_some(), key) {
        (true, key) => {
            // Nothing that the broken entry says of itself can be trusted.
            new.origin = None;
            new.key = key.map(|key| key.as_encoded_bytes().to_vec().into());
        }
        (false, Some(_)) => return Err(Failure::refused("the key of this letter must stay: leave `--key` out")),
        (false, None) => {}
    }
    store.plan_edit(session.consumer()?, &letter, &new).await?;
    let what = format!(
        "replace the payload of the letter at {offset}, {} by {}",
        short(&letter.record.payload),
        short(&new.payload)
    );
    if !is_wanted(session, change, &what, 1)? {
        return Ok(());
    }
    store
        .edit(session.consumer()?, &letter, &new, &change.operator())
        .await?;
    let text = format!("edited the letter at {offset}; the running consumer tries it in its turn");
    done(session, &text, &json!({ "edited": offset.to_string() }))
}

async fn existing(session: &Session<'_>, store: &dyn Store, offset: Offset) -> Result<DeadLetter, Failure> {
    let consumer = session.consumer()?;
    store.letter(consumer, offset).await?.ok_or_else(|| {
        Failure::refused(format!(
            "consumer {consumer} has no dead letter at {offset}; it may have been handled or discarded"
        ))
    })
}

/// Says how much was done before an error.
fn incomplete(error: Error, verb: &str, planned: u64, left: Result<LetterPlan, Error>) -> Failure {
    let all = letters_of(planned);
    match left {
        Ok(left) if left.letters == planned => error.into(),
        Ok(left) => {
            let changed = planned - left.letters;
            let were = if changed == 1 { "was" } else { "were" };
            Failure::refused(format!("{changed} of {all} {were} {verb} before it failed: {error}"))
        }
        Err(_) => Failure::refused(format!("some of {all} may have been {verb} before it failed: {error}")),
    }
}

fn letters_of(count: u64) -> String {
    counted(count, "letter", "letters")
}

fn state(letter: &DeadLetter) -> String {
    match letter.due {
        _ if letter.unreadable => "unreadable".into(),
        Some(due) if due <= SystemTime::now() => "due".into(),
        Some(due) => format!("due at {}", time(due)),
        None if letter.tries == 0 => "behind another".into(),
        None => "waits".into(),
    }
}

fn described(letter: &DeadLetter) -> Letter {
    let record = &letter.record;
    let never = |at: SystemTime| if at == UNIX_EPOCH { "never".into() } else { time(at) };
    Letter {
        offset: record.offset.to_string(),
        key: letter.key().cloned().map(Data),
        tries: letter.tries,
        first_reason: letter.first_reason.clone(),
        last_reason: letter.last_reason.clone(),
        parked_at: time(letter.parked_at),
        last_failed_at: never(letter.last_failed_at),
        state: state(letter),
        origin: record.origin.as_ref().map(ToString::to_string),
        headers: headers(record),
        payload: Data(record.payload.clone()),
        malformed: record.malformed.as_deref().map(str::to_owned),
        edited_by: letter.edit.as_ref().map(|edit| match &*edit.reason {
            "" => format!("{} at {}", edit.by, time(edit.at)),
            reason => format!("{} at {}: {reason}", edit.by, time(edit.at)),
        }),
    }
}

fn read(file: &Path) -> Result<Vec<u8>, Failure> {
    let read = match file.as_os_str() == "-" {
        true => {
            let mut bytes = Vec::new();
            io::stdin().lock().read_to_end(&mut bytes).map(|_| bytes)
        }
        false => fs::read(file),
    };
    read.map_err(|error| Failure::refused(format!("cannot read the payload from {}: {error}", file.display())))
}

fn write(file: &Path, bytes: &[u8]) -> Result<(), Failure> {
    match file.as_os_str() == "-" {
        true => {
            let mut out = io::stdout();
            Ok(out.write_all(bytes).and_then(|()| out.flush())?)
        }
        false => fs::write(file, bytes)
            .map_err(|error| Failure::refused(format!("cannot write the payload to {}: {error}", file.display()))),
    }
}
