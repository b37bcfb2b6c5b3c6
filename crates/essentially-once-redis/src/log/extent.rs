//! The extent of a stream at one moment, and whether a reader can continue from its place.

use essentially_once::{
    Error, Offset,
    backend::{Bounds, LogId},
};
use redis::{Cmd, Value};

use crate::{log::codec::parse_id, store::keys::RetentionKeys};

const EXTENT: &str = concat!(
    include_str!("incarnation.lua"),
    include_str!("extent.lua"),
    "return extent()"
);
const READ: &str = concat!(
    include_str!("incarnation.lua"),
    include_str!("extent.lua"),
    include_str!("read.lua")
);
const END: &str = concat!(
    include_str!("incarnation.lua"),
    include_str!("extent.lua"),
    include_str!("end.lua")
);

const TAIL: &str = concat!(
    include_str!("incarnation.lua"),
    include_str!("extent.lua"),
    include_str!("tail.lua")
);

/// Asks for an [`Extent`].
pub(crate) fn ask(stream: &[u8], retention: &RetentionKeys) -> Cmd {
    script(EXTENT, stream, retention)
}

/// Asks for an [`Extent`], for entries from an id on up to a number and a size, and whether more
/// entries follow.
pub(crate) fn read(stream: &[u8], retention: &RetentionKeys, from: &str, entries: usize, bytes: usize) -> Cmd {
    let mut read = script(READ, stream, retention);
    read.arg(from).arg(entries).arg(bytes);
    read
}

/// Asks for an [`Extent`] and the id of the last entry in the stream.
pub(crate) fn ask_end(stream: &[u8], retention: &RetentionKeys) -> Cmd {
    script(END, stream, retention)
}

/// Asks for an [`Extent`], for the first of the last entries up to an id, and for their number.
pub(crate) fn ask_tail(stream: &[u8], retention: &RetentionKeys, before: &str, entries: u64) -> Cmd {
    let mut tail = script(TAIL, stream, retention);
    tail.arg(before).arg(entries);
    tail
}

/// A read-only script. Unlike `MULTI`, it also runs while the server is out of memory, which must
/// not make a log unreadable.
fn script(source: &str, stream: &[u8], retention: &RetentionKeys) -> Cmd {
    let mut script = redis::cmd("EVAL_RO");
    script.arg(source).arg(2 + usize::from(retention.before.is_some()));
    script.arg(stream).arg(&retention.now).arg(&retention.before);
    script
}

/// A stream at one moment. The default never had an entry.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Extent {
    incarnation: Option<String>,
    /// The number of entries ever added.
    added: u64,
    /// The number of entries in the stream.
    length: u64,
    /// The first entry; meaningless in an empty stream.
    first: Offset,
    /// The highest id ever given.
    last: Offset,
    ours: Option<Removal>,
}

/// The last removal by our own retention.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Removal {
    /// The highest id it removed.
    mark: Offset,
    /// The number of entries ever removed, by anyone, after this removal.
    gone: u64,
}

impl Extent {
    /// Parses the script's answer: `Ok(None)` if there is no stream, `Err` if the answer has
    /// another form.
    pub(crate) fn parse(answer: &Value) -> Result<Option<Self>, ()> {
        let Value::Array(parts) = answer else { return Err(()) };
        let [incarnation, added, length, first, last, mark, gone] = &parts[..] else {
            return if parts.is_empty() { Ok(None) } else { Err(()) };
        };
        Ok(Some(Self {
            incarnation: text(incarnation).map(Into::into),
            added: number(added).ok_or(())?,
            length: number(length).ok_or(())?,
            first: id(first).ok_or(())?,
            last: id(last).ok_or(())?,
            ours: id(mark).zip(number(gone)).map(|(mark, gone)| Removal { mark, gone }),
        }))
    }

    pub(crate) fn incarnation(&self) -> Option<&str> {
        self.incarnation.as_deref()
    }

    pub(crate) fn bounds(&self) -> Bounds {
        let end = match self.last {
            Offset::ZERO => Offset::ZERO,
            last => last.successor(),
        };
        Bounds {
            earliest: if self.length == 0 { end } else { self.first },
            end,
        }
    }

    /// One past the last entry that a reader can still read, or whose removal it must report.
    /// `last` is the last entry in the stream. Ids after it that were skipped (`XSETID`) or deleted
    /// (`XDEL`) do not count.
    pub(crate) fn readable_end(&self, last: Option<Offset>) -> Offset {
        match (last, self.ours) {
            (Some(last), _) => last.successor(),
            (None, Some(ours)) if ours.gone == self.gone() => ours.mark.successor(),
            (None, _) if self.gone() == 0 => Offset::ZERO,
            (None, _) => self.bounds().end,
        }
    }

    /// The number of entries removed, by anyone and anywhere in the stream.
    fn gone(&self) -> u64 {
        self.added.saturating_sub(self.length)
    }

    /// Checks that a reader at `from` can read every entry ever added from there on.
    ///
    /// `passed` is the number of entries ever added before `from`, if the reader knows it.
    pub(crate) fn check(&self, log: &LogId, from: Offset, passed: Option<u64>) -> Result<(), Error> {
        let bounds = self.bounds();
        if log.incarnation().is_some() && log.incarnation() != self.incarnation() {
            return Err(Error::OutOfRange {
                log: log.clone(),
                requested: from,
                end: bounds.end,
            });
        }
        // Entries before `earliest` may all be ones that the reader has passed.
        let earliest = match self.has_lost(from, passed) {
            true => bounds.earliest,
            false => Offset::ZERO,
        };
        Bounds { earliest, ..bounds }.check(log, from)
    }

    /// Trimming only removes entries from the start. So as long as the stream starts at or before
    /// `from`, nothing after `from` is missing.
    fn has_lost(&self, from: Offset, passed: Option<u64>) -> bool {
        let gone = self.gone();
        let is_left_before = self.length > 0 && self.first <= from;
        if gone == 0 || is_left_before || from > self.last {
            return false;
        }
        match (passed, self.ours) {
            // More entries were removed than the reader has passed, so it has missed some.
            (Some(passed), _) => gone > passed,
            // Our own retention was the last to remove entries, and it recorded the highest id.
            (None, Some(ours)) if ours.gone == gone => from <= ours.mark,
            // Another program removed entries before `first`. Their ids are unknown.
            (None, _) => true,
        }
    }

    /// The number of entries ever added before `from`, if it can be known. `unread` is the number
    /// of entries from `from` on.
    pub(crate) fn passed(&self, from: Offset, unread: Option<u64>) -> Option<u64> {
        match unread {
            Some(unread) => Some(self.added.saturating_sub(unread)),
            None if self.length == 0 || self.first >= from => Some(self.gone()),
            None => None,
        }
    }
}

fn text(value: &Value) -> Option<&str> {
    match value {
        Value::BulkString(bytes) => str::from_utf8(bytes).ok(),
        _ => None,
    }
}

fn id(value: &Value) -> Option<Offset> {
    text(value).and_then(|text| parse_id(text.as_bytes()))
}

fn number(value: &Value) -> Option<u64> {
    match value {
        Value::Int(number) => u64::try_from(*number).ok(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log() -> LogId {
        LogId::new("orders")
            .expect("name")
            .with_incarnation("a1")
            .expect("incarnation")
    }

    /// Entries `1-0` to `10-0`, without those before `first`.
    fn trimmed(first: u64) -> Extent {
        Extent {
            incarnation: Some("a1".into()),
            added: 10,
            length: 11 - first,
            first: Offset::new(if first > 10 { 0 } else { first }, 0),
            last: Offset::new(10, 0),
            ours: None,
        }
    }

    fn truncated(extent: &Extent, from: Offset, passed: Option<u64>) -> bool {
        match extent.check(&log(), from, passed) {
            Ok(()) => false,
            Err(Error::Truncated {
                requested, earliest, ..
            }) => {
                assert_eq!((requested, earliest), (from, extent.bounds().earliest));
                true
            }
            Err(error) => panic!("{error}"),
        }
    }

    #[test]
    fn nothing_removed_nothing_lost() {
        for from in [Offset::ZERO, Offset::new(1, 0), Offset::new(5, 3), Offset::new(10, 1)] {
            assert!(!truncated(&trimmed(1), from, None), "{from}");
        }
    }

    #[test]
    fn a_removal_by_others_counts_as_loss_unless_what_came_before_is_left() {
        for (from, lost) in [
            (Offset::ZERO, true),
            (Offset::new(4, 1), true),
            (Offset::new(5, 0), false),
            (Offset::new(5, 1), false),
            (Offset::new(10, 1), false),
        ] {
            assert_eq!(truncated(&trimmed(5), from, None), lost, "{from}");
        }
        assert!(truncated(&trimmed(11), Offset::new(10, 0), None));
        assert!(!truncated(&trimmed(11), Offset::new(10, 1), None));
    }

    #[test]
    fn a_reader_that_counted_knows_better() {
        assert!(!truncated(&trimmed(5), Offset::new(4, 1), Some(4)));
        assert!(truncated(&trimmed(5), Offset::new(3, 1), Some(3)));
        assert!(!truncated(&trimmed(11), Offset::new(10, 1), Some(10)));
        assert!(truncated(&trimmed(11), Offset::new(9, 1), Some(9)));
    }

    #[test]
    fn our_own_retention_knows_what_it_removed_last() {
        let mut extent = trimmed(5);
        extent.ours = Some(Removal {
            mark: Offset::new(4, 0),
            gone: 4,
        });
        assert!(!truncated(&extent, Offset::new(4, 1), None));
        assert!(truncated(&extent, Offset::new(4, 0), None));
        // Another program removed more entries later.
        extent.ours = Some(Removal {
            mark: Offset::new(3, 0),
            gone: 3,
        });
        assert!(truncated(&extent, Offset::new(4, 1), None));
    }

    #[test]
    fn another_stream_and_a_lost_tail_are_out_of_range() {
        for (extent, from) in [
            (trimmed(1), Offset::new(10, 2)),
            (
                Extent {
                    incarnation: Some("b2".into()),
                    ..trimmed(1)
                },
                Offset::new(5, 0),
            ),
            (
                Extent {
                    incarnation: None,
                    ..trimmed(1)
                },
                Offset::new(5, 0),
            ),
        ] {
            let error = extent.check(&log(), from, None).expect_err("out of range");
            assert!(matches!(error, Error::OutOfRange { .. }), "{error}");
        }
        let unnamed = LogId::new("orders").expect("name");
        assert!(trimmed(1).check(&unnamed, Offset::new(5, 0), None).is_ok());
    }

    #[test]
    fn the_highest_id_does_not_overflow() {
        let highest = Offset::new(u64::MAX, u64::MAX);
        let extent = Extent {
            last: highest,
            ..trimmed(1)
        };
        for from in [highest, Offset::new(u64::MAX, 5)] {
            assert!(extent.check(&log(), from, None).is_ok());
        }
    }

    #[test]
    fn the_readable_end_is_behind_what_is_left_or_what_must_be_reported() {
        let (last, end) = (Offset::new(10, 0), Offset::new(10, 1));
        assert_eq!(trimmed(5).readable_end(Some(last)), end);
        assert_eq!(trimmed(5).readable_end(Some(Offset::new(8, 0))), Offset::new(8, 1));
        // A reader that has not read entries that others removed must report it.
        assert_eq!(trimmed(11).readable_end(None), end);
        let skipped_to = Offset::new(20, 0);
        let ours = Some(Removal { mark: last, gone: 10 });
        let ours = Extent {
            last: skipped_to,
            ours,
            ..trimmed(11)
        };
        assert_eq!(
            (ours.readable_end(None), ours.bounds().end),
            (end, skipped_to.successor())
        );
        let never_used = Extent {
            last: skipped_to,
            ..Extent::default()
        };
        assert_eq!(never_used.readable_end(None), Offset::ZERO);
    }

    #[test]
    fn what_was_passed_is_known_at_the_head_and_where_all_was_seen() {
        assert_eq!(trimmed(5).passed(Offset::new(5, 0), None), Some(4));
        assert_eq!(trimmed(5).passed(Offset::new(6, 0), None), None);
        assert_eq!(trimmed(5).passed(Offset::new(6, 0), Some(5)), Some(5));
    }
}
