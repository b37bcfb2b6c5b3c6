//! Comparisons that name the differing field, because two records printed side by side hide it.

use std::fmt::Debug;

use bytes::Bytes;
use essentially_once::{
    NewRecord, Record,
    backend::{Journal, Numbering, Position, Window},
};

/// Longer texts are cut. Printing a value of a megabyte helps nobody.
const SHOWN_CHARS: usize = 120;

/// How the record read differs from the one appended: `its key is None, not Some(b"")`.
pub(super) fn from_appended(read: &Record, appended: &NewRecord) -> Option<String> {
    first([
        field("key", &read.key, &appended.key),
        headers(&read.headers, &appended.headers),
        bytes("payload", &read.payload, &appended.payload),
        field("origin", &read.origin, &appended.origin),
    ])
}

/// How two reads of one record differ.
pub(super) fn record(found: &Record, expected: &Record) -> Option<String> {
    first([
        field("offset", &found.offset, &expected.offset),
        field("key", &found.key, &expected.key),
        headers(&found.headers, &expected.headers),
        bytes("payload", &found.payload, &expected.payload),
        field("time of append", &found.appended_at, &expected.appended_at),
        field("origin", &found.origin, &expected.origin),
        field("mark as malformed", &found.malformed, &expected.malformed),
    ])
}

/// How two reads of several records differ, and at which record.
pub(super) fn records(found: &[Record], expected: &[Record]) -> Option<String> {
    let mut differing = found.iter().zip(expected).enumerate();
    let differing = differing.find_map(|(number, (found, expected))| {
        record(found, expected).map(|how| format!("record {number} at {}: {how}", expected.offset))
    });
    differing.or_else(|| field("number of records", &found.len(), &expected.len()))
}

/// How a position differs from another one. The order of windows does not count.
pub(super) fn position(found: &Position, expected: &Position) -> Option<String> {
    first([
        field("log", &found.log, &expected.log),
        field("next offset", &found.next, &expected.next),
        field("revision", &found.revision, &expected.revision),
        field("owner", &found.owner, &expected.owner),
        field("note", &found.note, &expected.note),
        journal(&found.journal, &expected.journal),
        windows(&found.windows, &expected.windows),
    ])
}

/// How two journals differ, and at which entry.
pub(super) fn journal(found: &Journal, expected: &Journal) -> Option<String> {
    let (found, expected) = (found.entries(), expected.entries());
    let mut pairs = found.iter().zip(expected).enumerate();
    let differing = pairs.find_map(|(number, (a, b))| field(&format!("entry {number} of the journal"), a, b));
    differing.or_else(|| field("number of entries in the journal", &found.len(), &expected.len()))
}

/// How two sets of windows differ, regardless of their order.
pub(super) fn windows(found: &[(Numbering, Window)], expected: &[(Numbering, Window)]) -> Option<String> {
    let missing =
        expected.iter().find_map(
            |(numbering, window)| match found.iter().find(|(name, _)| name == numbering) {
                None => Some(format!("its window of {numbering} is missing")),
                Some((_, other)) => field(&format!("window of {numbering}"), other, window),
            },
        );
    missing.or_else(|| {
        let known = |numbering| expected.iter().any(|(name, _)| name == numbering);
        let more = found.iter().find(|(numbering, _)| !known(numbering));
        more.map(|(numbering, _)| format!("its window of {numbering} is one too many"))
    })
}

fn headers(found: &[(String, Bytes)], expected: &[(String, Bytes)]) -> Option<String> {
    let mut differing = found.iter().zip(expected).enumerate();
    let differing = differing.find_map(|(number, ((name, value), (expected_name, expected_value)))| {
        field(&format!("header {number}"), name, expected_name)
            .or_else(|| bytes(&format!("value of header {number}"), value, expected_value))
    });
    differing.or_else(|| field("number of headers", &found.len(), &expected.len()))
}

fn bytes(name: &str, found: &Bytes, expected: &Bytes) -> Option<String> {
    match found.len() == expected.len() {
        true => field(name, found, expected),
        false => {
            field(name, found, expected).map(|how| format!("{how}, {} bytes, not {}", found.len(), expected.len()))
        }
    }
}

fn field<T: PartialEq + Debug>(name: &str, found: &T, expected: &T) -> Option<String> {
    (found != expected).then(|| format!("its {name} is {}, not {}", shown(found), shown(expected)))
}

fn shown(value: &impl Debug) -> String {
    let text = format!("{value:?}");
    match text.char_indices().nth(SHOWN_CHARS) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

fn first<const N: usize>(differences: [Option<String>; N]) -> Option<String> {
    differences.into_iter().flatten().next()
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use essentially_once::{
        Offset,
        backend::{LogId, Owner, Revision},
    };

    use super::*;

    #[test]
    fn the_field_that_differs_is_named() {
        let one = Record::new(Offset::ZERO, UNIX_EPOCH, "same");
        assert_eq!(record(&one, &one), None);
        let mut other = one.clone();
        other.appended_at += Duration::from_millis(1);
        let how = record(&other, &one).expect("they differ");
        assert!(how.starts_with("its time of append is "), "{how}");
        other = one.clone();
        other.headers.push(("h".into(), "v".into()));
        assert_eq!(
            record(&other, &one).as_deref(),
            Some("its number of headers is 1, not 0")
        );
        let how = records(&[one.clone(), other], &[one.clone(), one]).expect("they differ");
        assert_eq!(how, "record 1 at 0: its number of headers is 1, not 0");
    }

    #[test]
    fn positions_are_compared_field_by_field_and_windows_in_any_order() {
        let log = LogId::new("orders").expect("a name");
        let mut one = Position::new(log, 1.into(), Revision::new(1, 1));
        let window = |name: &str, n| (name.parse::<Numbering>().expect("a numbering"), Window::new(n));
        one.windows = vec![window("a", 1), window("b", 2)];
        let mut other = one.clone();
        other.windows.reverse();
        assert_eq!(position(&other, &one), None);
        other.windows.pop();
        assert_eq!(position(&other, &one).as_deref(), Some("its window of a is missing"));
        assert_eq!(
            position(&one, &other).as_deref(),
            Some("its window of a is one too many")
        );
        other.owner = Some(Owner::new(7));
        let how = position(&other, &one).expect("they differ");
        assert!(how.starts_with("its owner is Some("), "{how}");
    }
}
