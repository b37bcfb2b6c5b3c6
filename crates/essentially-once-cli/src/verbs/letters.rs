//! `dead-letters`: the records that a consumer has set aside.

use std::{
    ffi::OsStr,
    fs,
    io::{self, Read as _, Write as _},
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

use essentially_once::{NewRecord, Offset, backend::DeadLetter, consumer::dead_letters::LetterFilter};
use serde::Serialize;
use serde_json::json;

use crate::{
    arguments::{Change, Letters, Which},
    failure::Failure,
    output::{done, full, headers, is_wanted, json as print_json, line, pairs, short, table, time},
    session::Session,
    store::Store,
};

/// How many letters to read at once.
const PAGE: usize = 1_000;

#[derive(Serialize)]
struct Letter {
    offset: String,
    key: Option<String>,
    tries: u32,
    first_reason: String,
    last_reason: String,
    parked_at: String,
    last_failed_at: String,
    state: String,
    origin: Option<String>,
    headers: Vec<(String, String)>,
    payload: String,
    malformed: Option<String>,
    edited_by: Option<String>,
}

pub(crate) async fn letters(session: &Session<'_>, verb: &Letters) -> Result<(), Failure> {
    let store = session.open_store().await?;
    // A mistyped name would otherwise look like a consumer without letters.
    session.position(&*store).await?;
    match verb {
        Letters::List { filter, after, limit } => list(session, &*store, &filter.to_library(), *after, *limit).await,
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
    let letters = store.letters(session.consumer()?, filter, after, limit).await?;
    if session.cli.json {
        return letters.iter().try_for_each(|letter| print_json(&described(letter)));
    }
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
        ("first reason", first_reason),
        ("last reason", last_reason),
    ];
    let optional = [
        ("key", key),
        ("origin", origin),
        ("malformed", malformed),
        ("edited by", edited_by),
    ];
    rows.extend(optional.into_iter().filter_map(|(name, value)| Some((name, value?))));
    rows.extend(
        headers
            .into_iter()
            .map(|(name, value)| ("header", format!("{name}: {value}"))),
    );
    rows.push(("payload", payload));
    pairs(&rows)
}

async fn retry(session: &Session<'_>, store: &dyn Store, which: &Which, change: &Change) -> Result<(), Failure> {
    let (consumer, by) = (session.consumer()?, change.operator());
    if let Some(offset) = which.offset {
        existing(session, store, offset).await?;
        if !is_wanted(session, change, &format!("retry the letter at {offset}"), 1)? {
            return Ok(());
        }
        store.retry(consumer, offset, &by).await?;
        let text = format!("the letter at {offset} is due; the running consumer tries it next");
        return done(session, &text, &json!({ "retried": 1 }));
    }
    let filter = which.selected()?;
    let count = selected(session, store, &filter).await?;
    let what = format!("retry {}, each key's first one first", letters_of(count));
    if !is_wanted(session, change, &what, count)? {
        return Ok(());
    }
    let retried = store.retry_all(consumer, &filter, &by).await?;
    let text = format!("{retried} letters are due now; those behind them follow as they succeed");
    done(session, &text, &json!({ "retried": retried }))
}

async fn discard(session: &Session<'_>, store: &dyn Store, which: &Which, change: &Change) -> Result<(), Failure> {
    let (consumer, by) = (session.consumer()?, change.operator());
    if let Some(offset) = which.offset {
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
    let filter = which.selected()?;
    let count = selected(session, store, &filter).await?;
    let what = format!("discard {} for good, without their effects", letters_of(count));
    if !is_wanted(session, change, &what, count)? {
        return Ok(());
    }
    let discarded = store.discard_all(consumer, &filter, &by).await?;
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

/// How many letters the filter selects; none is an error.
async fn selected(session: &Session<'_>, store: &dyn Store, filter: &LetterFilter) -> Result<u64, Failure> {
    let (mut after, mut count) = (None, 0);
    loop {
        let page = store.letters(session.consumer()?, filter, after, PAGE).await?;
        count += page.len() as u64;
        match page.last() {
            Some(last) if page.len() == PAGE => after = Some(last.record.offset),
            _ => break,
        }
    }
    match count {
        0 => Err(Failure::refused("no letter meets all conditions; nothing was changed")),
        count => Ok(count),
    }
}

fn letters_of(count: u64) -> String {
    match count {
        1 => "1 letter".into(),
        count => format!("{count} letters"),
    }
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
        key: letter.key().map(|key| full(key)),
        tries: letter.tries,
        first_reason: full(letter.first_reason.as_bytes()),
        last_reason: full(letter.last_reason.as_bytes()),
        parked_at: time(letter.parked_at),
        last_failed_at: never(letter.last_failed_at),
        state: state(letter),
        origin: record.origin.as_ref().map(ToString::to_string),
        headers: headers(record),
        payload: full(&record.payload),
        malformed: record.malformed.as_deref().map(str::to_owned),
        edited_by: letter.edit.as_ref().map(|edit| match &*edit.reason {
            "" => format!("{} at {}", edit.by, time(edit.at)),
            reason => format!("{} at {}, because of {reason:?}", edit.by, time(edit.at)),
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
        true => Ok(io::stdout().write_all(bytes)?),
        false => fs::write(file, bytes)
            .map_err(|error| Failure::refused(format!("cannot write the payload to {}: {error}", file.display()))),
    }
}
