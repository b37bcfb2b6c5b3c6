//! Prints what the verbs found, for people or for programs.

use std::{
    io::{self, BufRead as _, IsTerminal as _, Write as _},
    time::SystemTime,
};

use bytes::Bytes;
use comfy_table::{Table, presets};
use essentially_once::Record;
use jiff::Timestamp;
use serde::{Serialize, Serializer, ser::SerializeMap as _};

use crate::{arguments::Change, failure::Failure, session::Session};

/// How much of a payload or reason a table shows.
const WIDTH: usize = 60;

/// Prints a line.
pub(crate) fn line(text: &str) -> Result<(), Failure> {
    Ok(writeln!(io::stdout(), "{text}")?)
}

/// Prints a value as JSON, in one line.
pub(crate) fn json(value: &impl Serialize) -> Result<(), Failure> {
    let text = serde_json::to_string(value).map_err(|error| Failure::refused(format!("cannot print JSON: {error}")))?;
    line(&text)
}

/// Prints rows below their headings.
pub(crate) fn table(headings: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> Result<(), Failure> {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_header(headings);
    for row in rows {
        table.add_row(row);
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    line(table.trim_fmt().trim_end())
}

/// Prints names and values, one pair per line.
pub(crate) fn pairs(pairs: &[(&str, String)]) -> Result<(), Failure> {
    let width = pairs.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    for (name, value) in pairs {
        line(format!("{name:width$}  {value}").trim_end())?;
    }
    Ok(())
}

/// A number with its noun.
pub(crate) fn counted(count: u64, one: &str, several: &str) -> String {
    match count {
        1 => format!("1 {one}"),
        count => format!("{count} {several}"),
    }
}

/// A time in UTC (RFC 3339), to the millisecond.
pub(crate) fn time(time: SystemTime) -> String {
    Timestamp::try_from(time).map_or_else(|_| "a time out of range".into(), |time| format!("{time:.3}"))
}

/// Bytes as text if they are text, and otherwise as an escaped string, cut to one line.
pub(crate) fn short(bytes: &[u8]) -> String {
    let text = full(bytes);
    match text.char_indices().nth(WIDTH) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

/// Text in one line, with escapes for what cannot be printed.
pub(crate) fn printed(text: &str) -> String {
    full(text.as_bytes())
}

/// Bytes in one line, with escapes for what cannot be printed.
pub(crate) fn full(bytes: &[u8]) -> String {
    match str::from_utf8(bytes) {
        Ok(text) => text.chars().flat_map(printable).collect(),
        Err(_) => bytes.escape_ascii().to_string(),
    }
}

/// Bytes in JSON: a string if they are UTF-8, and otherwise `{"hex": ".."}`.
pub(crate) struct Data(pub(crate) Bytes);

impl Serialize for Data {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match str::from_utf8(&self.0) {
            Ok(text) => serializer.serialize_str(text),
            Err(_) => {
                let mut map = serializer.serialize_map(Some(1))?;
                map.serialize_entry("hex", &base16ct::lower::encode_string(&self.0))?;
                map.end()
            }
        }
    }
}

/// The headers of a record.
pub(crate) fn headers(record: &Record) -> Vec<(String, Data)> {
    let headers = record.headers.iter();
    headers
        .map(|(name, value)| (name.clone(), Data(value.clone())))
        .collect()
}

/// A record in one line: its key, if it has one, its payload, and what is wrong with it.
pub(crate) fn brief(record: &Record) -> String {
    let key = record.key.as_deref().map(|key| format!("[{}] ", short(key)));
    let malformed = record.malformed.as_deref().map(printed);
    let malformed = malformed.map(|why| format!(" (malformed: {why})"));
    let (key, malformed) = (key.unwrap_or_default(), malformed.unwrap_or_default());
    format!("{key}{}{malformed}", short(&record.payload))
}

/// Control characters could change the terminal.
fn printable(character: char) -> impl Iterator<Item = char> {
    let escaped = character.is_control().then(|| character.escape_default());
    let plain = escaped.is_none().then_some(character);
    escaped.into_iter().flatten().chain(plain)
}

/// Whether to make a change. Asks first if it concerns more than one record or letter. With
/// `--dry-run`, shows it and returns false.
pub(crate) fn is_wanted(session: &Session<'_>, change: &Change, what: &str, records: u64) -> Result<bool, Failure> {
    if change.dry_run {
        match session.cli.json {
            true => json(&serde_json::json!({ "dry_run": what }))?,
            false => line(&format!("would {what}"))?,
        }
        return Ok(false);
    }
    if change.yes || records <= 1 {
        return announce(session, what).map(|()| true);
    }
    if !io::stdin().is_terminal() {
        return Err(Failure::refused(format!(
            "this would {what}, and nobody can be asked; add `--yes` if that is right"
        )));
    }
    let mut out = io::stderr().lock();
    let mut answer = String::new();
    write!(out, "This will {what}. Go on? [y/N] ")
        .and_then(|()| out.flush())
        .and_then(|()| io::stdin().lock().read_line(&mut answer))
        .map_err(|error| Failure::refused(format!("cannot ask: {error}; nothing was changed")))?;
    match answer.trim() {
        "y" | "Y" | "yes" => announce(session, what).map(|()| true),
        _ => Err(Failure::refused("nothing was changed")),
    }
}

/// A change is not made if nobody can read of it.
fn announce(session: &Session<'_>, what: &str) -> Result<(), Failure> {
    let printed = match session.cli.json {
        true => json(&serde_json::json!({ "begins": what })),
        false => line(&format!("going to {what}")),
    };
    printed.map_err(|failure| match failure {
        Failure::ClosedOutput => Failure::refused("the output was closed; nothing was changed"),
        failure => failure,
    })
}

/// Reports a change that was made.
pub(crate) fn done(session: &Session<'_>, text: &str, value: &impl Serialize) -> Result<(), Failure> {
    let printed = match session.cli.json {
        true => json(value),
        false => line(text),
    };
    match printed {
        Err(Failure::ClosedOutput) => Err(Failure::refused(format!("{text}; the output was closed"))),
        printed => printed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_reaches_the_terminal_raw() {
        assert_eq!(full("na\u{ef}ve \u{1b}[2J\n".as_bytes()), "na\u{ef}ve \\u{1b}[2J\\n");
        assert_eq!(full(b"\xff\x00a"), "\\xff\\x00a");
        assert_eq!(short("x".repeat(70).as_bytes()).len(), WIDTH + 3);
    }
}
