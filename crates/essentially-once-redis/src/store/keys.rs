//! The names of our keys.
//!
//! Every name consists of a prefix, a kind and an owner, and parses back into them:
//!
//! | key | purpose |
//! |---|---|
//! | `<prefix>:{<consumer>}:position`, `:windows`, `:state` | a consumer's hashes |
//! | `<prefix>:{<consumer>}:letters`, `:letters-by-offset`, `:letters-by-key`, `:letters-due` | its dead letters, and their indices |
//! | `<prefix>:{<tag>}:outbox:<stream>` | the numbers of an outbox; the tag is that of the stream's key, or the whole key |
//! | `<prefix>:retention:{<stream>}` | retention of a stream whose key has no braces |
//! | `<prefix>:retention:<stream>` | retention of a stream whose key has braces |
//! | `<prefix>:retention:}{<tag>}` | retention of the stream `{<tag>}`, whose key is all hash tag |
//!
//! A prefix contains no braces, so the prefix of a consumer's key ends at the first brace, and a
//! cluster computes the slot from `<consumer>`. A prefix contains no segment `retention` after its
//! first, so the prefix of a retention key ends at the first `:retention:`. No stream key begins
//! with `}`.

use std::fmt;

use essentially_once::{ConsumerId, Error};

const RETENTION: &str = "retention";
const OUTBOX: &str = "outbox:";

/// Refuses a prefix with which two keys could have one name.
pub(crate) fn check_prefix(prefix: &str) -> Result<(), Error> {
    let invalid = |reason: String| {
        Err(Error::InvalidSetting {
            setting: "prefix",
            reason: format!("{prefix:?} {reason}"),
        })
    };
    if prefix.is_empty() {
        return invalid("is empty".into());
    }
    if prefix.contains(['{', '}']) {
        return invalid("contains braces, which a cluster uses to compute slots: choose a prefix without them".into());
    }
    if prefix.split(':').skip(1).any(|segment| segment == RETENTION) {
        return invalid(format!(
            "contains the segment `{RETENTION}`, so its keys could equal those of another prefix: choose another prefix, and \
             rename the keys that exist ({prefix}:{{<consumer>}}:position, :windows and :state)"
        ));
    }
    Ok(())
}

/// The names of a consumer's keys.
#[derive(Debug)]
pub(crate) struct Keys {
    pub(crate) position: String,
    pub(crate) windows: String,
    pub(crate) state: String,
    pub(crate) letters: LetterKeys,
}

/// The pattern, for `SCAN`, of the keys of all positions with this prefix. Keys of outboxes can
/// match it too.
pub(crate) fn position_pattern(prefix: &str) -> String {
    let mut pattern = String::with_capacity(prefix.len() + 16);
    for c in prefix.chars() {
        if matches!(c, '*' | '?' | '[' | ']' | '\\') {
            pattern.push('\\');
        }
        pattern.push(c);
    }
    pattern + ":{*}:position"
}

/// The consumer whose position has this key; `None` if the key is of another kind.
///
/// # Errors
/// [`Error::InvalidName`] if no consumer can have that name.
pub(crate) fn consumer_of_position(prefix: &str, key: &[u8]) -> Option<Result<ConsumerId, Error>> {
    let rest = key.strip_prefix(prefix.as_bytes())?.strip_prefix(b":{")?;
    let end = rest.windows(2).position(|bytes| bytes == b"}:")?;
    let (name, kind) = (&rest[..end], &rest[end + 2..]);
    (kind == Kind::Position.name().as_bytes()).then(|| ConsumerId::new(String::from_utf8_lossy(name)))
}

/// The names of a consumer's keys for dead letters.
#[derive(Debug)]
pub(crate) struct LetterKeys {
    /// The letters: a hash.
    pub(crate) values: String,
    /// The indices: sorted sets.
    pub(crate) by_offset: String,
    pub(crate) by_key: String,
    pub(crate) due: String,
}

impl LetterKeys {
    /// The number of these keys.
    pub(crate) const COUNT: usize = 4;

    pub(crate) fn all(&self) -> [&str; Self::COUNT] {
        [&self.values, &self.by_offset, &self.by_key, &self.due]
    }

    /// For each key, a cheap reading command that fails if the key has another type.
    pub(crate) fn probes(&self) -> [(&'static str, &[u8]); Self::COUNT] {
        let [values, indices @ ..] = self.all().map(str::as_bytes);
        let [by_offset, by_key, due] = indices.map(|index| ("ZCARD", index));
        [("HLEN", values), by_offset, by_key, due]
    }
}

impl Keys {
    pub(crate) fn new(prefix: &str, consumer: &ConsumerId) -> Self {
        let key = |kind: Kind| format!("{prefix}:{{{consumer}}}:{kind}");
        Self {
            position: key(Kind::Position),
            windows: key(Kind::Windows),
            state: key(Kind::State),
            letters: LetterKeys {
                values: key(Kind::Letters),
                by_offset: key(Kind::LettersByOffset),
                by_key: key(Kind::LettersByKey),
                due: key(Kind::LettersDue),
            },
        }
    }
}

/// The name of the hash with the numbers of an outbox, in the same cluster slot as its stream.
pub(crate) fn outbox_numbers(prefix: &str, stream: &str) -> String {
    let tag = slot_part(stream);
    format!("{prefix}:{{{tag}}}:{OUTBOX}{stream}")
}

/// The part of a stream's key that the cluster hashes.
fn slot_part(stream: &str) -> &str {
    let tag = hash_tag(stream.as_bytes()).and_then(|tag| str::from_utf8(tag).ok());
    tag.unwrap_or(stream)
}

/// The part of a key from which a cluster computes the slot: the text between the first brace and
/// the next closing one. `None` if the cluster uses the whole key.
pub(crate) fn hash_tag(key: &[u8]) -> Option<&[u8]> {
    let open = key.iter().position(|byte| *byte == b'{')?;
    let rest = &key[open + 1..];
    let close = rest.iter().position(|byte| *byte == b'}')?;
    (close > 0).then(|| &rest[..close])
}

/// The hashes in which our retention records what it removed from a stream.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct RetentionKeys {
    pub(crate) now: Vec<u8>,
    /// The name that earlier versions used, if it differs. They used one name for the streams `s`
    /// and `{s}`. The incarnation in the hash shows which of them it belongs to.
    pub(crate) before: Option<Vec<u8>>,
}

impl RetentionKeys {
    /// Keys in the same cluster slot as the stream.
    pub(crate) fn new(prefix: &str, stream: &[u8]) -> Result<Self, Error> {
        let invalid = |reason: &str| Error::InvalidSetting {
            setting: "stream",
            reason: format!("{:?} {reason}", String::from_utf8_lossy(stream)),
        };
        let open = stream.iter().position(|byte| *byte == b'{');
        let close = stream.iter().position(|byte| *byte == b'}');
        let has_tag = match (open, close) {
            _ if stream.is_empty() => return Err(invalid("is empty")),
            (None, None) => false,
            (Some(open), Some(close)) if open + 1 < close => true,
            _ => {
                return Err(invalid(
                    "contains braces that do not form a hash tag; write one as in {shop}:orders",
                ));
            }
        };
        let key = |before: &[u8], after: &[u8]| [prefix.as_bytes(), b":retention:", before, stream, after].concat();
        Ok(match has_tag {
            false => Self {
                now: key(b"{", b"}"),
                before: None,
            },
            true if tag_of(stream).is_some() => Self {
                now: key(b"}", b""),
                before: Some(key(b"", b"")),
            },
            true => Self {
                now: key(b"", b""),
                before: None,
            },
        })
    }
}

/// A key with our prefix.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Ours {
    Consumer(ConsumerId, Kind),
    /// Holds the key of the stream.
    Outbox(String),
    /// Holds the key of the stream.
    Retention(Vec<u8>),
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Kind {
    Position,
    Windows,
    State,
    Letters,
    LettersByOffset,
    LettersByKey,
    LettersDue,
}

impl Kind {
    const ALL: [Self; 7] = [
        Self::Position,
        Self::Windows,
        Self::State,
        Self::Letters,
        Self::LettersByOffset,
        Self::LettersByKey,
        Self::LettersDue,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Position => "position",
            Self::Windows => "windows",
            Self::State => "state",
            Self::Letters => "letters",
            Self::LettersByOffset => "letters-by-offset",
            Self::LettersByKey => "letters-by-key",
            Self::LettersDue => "letters-due",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Ours {
    /// The purpose of a key; `None` if the key does not have this prefix.
    pub(crate) fn parse(prefix: &str, key: &[u8]) -> Option<Self> {
        let rest = key.strip_prefix(prefix.as_bytes())?.strip_prefix(b":")?;
        match rest.strip_prefix(b"retention:") {
            Some(rest) => stream_of(rest).map(|stream| Self::Retention(stream.to_vec())),
            None => Self::parse_consumer(str::from_utf8(rest).ok()?),
        }
    }

    fn parse_consumer(rest: &str) -> Option<Self> {
        let (consumer, kind) = rest.strip_prefix('{')?.split_once("}:")?;
        if let Some(stream) = kind.strip_prefix(OUTBOX) {
            return (slot_part(stream) == consumer).then(|| Self::Outbox(stream.into()));
        }
        let kind = Kind::ALL.into_iter().find(|known| known.name() == kind)?;
        Some(Self::Consumer(ConsumerId::new(consumer).ok()?, kind))
    }
}

/// The stream of a retention key, given what follows `retention:`.
fn stream_of(rest: &[u8]) -> Option<&[u8]> {
    match rest {
        [] => None,
        [b'}', stream @ ..] => tag_of(stream).map(|_| stream),
        _ => Some(tag_of(rest).unwrap_or(rest)),
    }
}

/// `s` of `{s}`.
fn tag_of(stream: &[u8]) -> Option<&[u8]> {
    let tag = stream.strip_prefix(b"{")?.strip_suffix(b"}")?;
    let plain = !tag.is_empty() && !tag.contains(&b'{') && !tag.contains(&b'}');
    plain.then_some(tag)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::{collection::vec, option, prelude::*, sample::select};

    use super::*;

    #[test]
    fn names_of_ordinary_settings_are_those_of_the_first_version() {
        let keys = Keys::new("essentially-once", &ConsumerId::new("billing").expect("a name"));
        assert_eq!(keys.position, "essentially-once:{billing}:position");
        assert_eq!(keys.windows, "essentially-once:{billing}:windows");
        assert_eq!(keys.state, "essentially-once:{billing}:state");
        assert_eq!(
            keys.letters.all(),
            ["letters", "letters-by-offset", "letters-by-key", "letters-due"]
                .map(|kind| format!("essentially-once:{{billing}}:{kind}"))
        );
        for (stream, now, before) in [
            ("orders", "p:retention:{orders}", None),
            ("{shop}:orders", "p:retention:{shop}:orders", None),
            ("a{b}c{d}", "p:retention:a{b}c{d}", None),
            ("{a}{b}", "p:retention:{a}{b}", None),
            ("{shop}", "p:retention:}{shop}", Some("p:retention:{shop}")),
        ] {
            let keys = RetentionKeys::new("p", stream.as_bytes()).expect("valid");
            assert_eq!(keys.now, now.as_bytes(), "{stream}");
            assert_eq!(keys.before.as_deref(), before.map(str::as_bytes), "{stream}");
        }
    }

    #[test]
    fn the_pattern_of_positions_takes_the_prefix_literally() {
        assert_eq!(position_pattern("shop:eu"), "shop:eu:{*}:position");
        assert_eq!(position_pattern(r"a*b?[c-d]\e^"), r"a\*b\?\[c-d\]\\e^:{*}:position");
    }

    #[test]
    fn a_position_names_its_consumer() {
        let of = |key: &str| consumer_of_position("p", key.as_bytes());
        for name in ["billing", "a:position", "a/b-1"] {
            let found = of(&format!("p:{{{name}}}:position"))
                .expect("a position")
                .expect("valid");
            assert_eq!(found.as_str(), name);
        }
        for other in [
            "p:{a}:state",
            "p:{a}:position:x",
            "q:{a}:position",
            "p:{y}:outbox:x{y}:position",
        ] {
            assert!(of(other).is_none(), "{other}");
        }
        for odd in ["p:{}:position", "p:{a b}:position", "p:{a}b}:position"] {
            assert!(of(odd).expect("a position").is_err(), "{odd}");
        }
        assert!(
            consumer_of_position("p", b"p:{\xff}:position")
                .expect("a position")
                .is_err()
        );
    }

    #[test]
    fn the_numbers_of_an_outbox_are_in_the_slot_of_its_stream() {
        for (stream, key) in [
            ("out", "p:{out}:outbox:out"),
            ("{shipping}:out", "p:{shipping}:outbox:{shipping}:out"),
            ("{shipping}", "p:{shipping}:outbox:{shipping}"),
        ] {
            assert_eq!(outbox_numbers("p", stream), key);
        }
    }

    #[test]
    fn streams_whose_braces_are_no_hash_tag_are_refused() {
        for odd in ["", "{", "}", "{}", "a{}b", "a}b", "}{", "a}b{c}", "}{c}"] {
            assert!(RetentionKeys::new("p", odd.as_bytes()).is_err(), "{odd:?}");
        }
    }

    #[test]
    fn prefixes_with_which_names_could_meet_are_refused() {
        for (prefix, reason) in [
            ("", "empty"),
            ("{shop}", "braces"),
            ("shop}", "braces"),
            (
                "shop:retention",
                "rename the keys that exist (shop:retention:{<consumer>}:position",
            ),
            ("shop:retention:eu", "segment `retention`"),
        ] {
            let error = check_prefix(prefix).expect_err(prefix).to_string();
            assert!(error.contains(reason), "{prefix:?}: {error}");
        }
        for prefix in ["shop", "retention", "shop:retention-2", "shop:eu", "shop:", "Läden"] {
            check_prefix(prefix).expect(prefix);
        }
    }

    fn text(pieces: &'static [&'static str], most: usize) -> impl Strategy<Value = String> {
        vec(select(pieces), 1..=most).prop_map(|pieces| pieces.concat())
    }

    fn prefix() -> impl Strategy<Value = String> {
        let pieces = &["a", "A", ":", "retention", ":retention"];
        text(pieces, 3).prop_filter("refused", |prefix| check_prefix(prefix).is_ok())
    }

    fn consumer() -> impl Strategy<Value = ConsumerId> {
        let pieces = &["a", "A", ":position", ":retention:"];
        text(pieces, 2).prop_filter_map("refused", |name| ConsumerId::new(name).ok())
    }

    fn stream() -> impl Strategy<Value = Vec<u8>> {
        let pieces = &[
            "a",
            "b",
            "{",
            "}",
            "{a}",
            ":",
            ":position",
            "}:state",
            "retention:",
            "\u{fc}",
        ];
        let streams = (text(pieces, 5), any::<bool>()).prop_map(|(text, is_text)| match is_text {
            true => text.into_bytes(),
            false => [text.as_bytes(), &[0xff]].concat(),
        });
        streams.prop_filter("refused", |stream| RetentionKeys::new("p", stream).is_ok())
    }

    fn named(prefix: &str, consumers: &[ConsumerId], streams: &[Vec<u8>], outboxes: &[String]) -> Vec<(Vec<u8>, Ours)> {
        let hashes = consumers.iter().flat_map(|consumer| {
            let keys = Keys::new(prefix, consumer);
            let of = |kind| Ours::Consumer(consumer.clone(), kind);
            [
                (keys.position.into_bytes(), of(Kind::Position)),
                (keys.windows.into_bytes(), of(Kind::Windows)),
                (keys.state.into_bytes(), of(Kind::State)),
                (keys.letters.values.into_bytes(), of(Kind::Letters)),
                (keys.letters.by_offset.into_bytes(), of(Kind::LettersByOffset)),
                (keys.letters.by_key.into_bytes(), of(Kind::LettersByKey)),
                (keys.letters.due.into_bytes(), of(Kind::LettersDue)),
            ]
        });
        let retention = streams.iter().map(|stream| {
            let keys = RetentionKeys::new(prefix, stream).expect("a stream");
            (keys.now, Ours::Retention(stream.clone()))
        });
        let numbers = outboxes.iter().map(|stream| {
            let key = outbox_numbers(prefix, stream).into_bytes();
            (key, Ours::Outbox(stream.clone()))
        });
        hashes.chain(retention).chain(numbers).collect()
    }

    /// The names of logs, some with a hash tag.
    fn outbox() -> impl Strategy<Value = String> {
        let pieces = &["a", ":outbox:", "outbox:a", ":position", ":retention:"];
        (consumer(), option::of(text(pieces, 2)), text(pieces, 2)).prop_map(|(tag, before, after)| match before {
            None => tag.to_string(),
            Some(before) => format!("{before}{{{tag}}}{after}"),
        })
    }

    /// The part of a key from which Redis Cluster computes the slot.
    fn hashed(key: &[u8]) -> &[u8] {
        let Some(open) = key.iter().position(|byte| *byte == b'{') else {
            return key;
        };
        let rest = &key[open + 1..];
        match rest.iter().position(|byte| *byte == b'}') {
            None | Some(0) => key,
            Some(close) => &rest[..close],
        }
    }

    proptest! {
        #[test]
        fn every_key_has_one_meaning(
            prefixes in vec(prefix(), 1..20),
            consumers in vec(consumer(), 1..20),
            streams in vec(stream(), 1..40),
            outboxes in vec(outbox(), 1..20),
        ) {
            let mut meaning = HashMap::new();
            for prefix in &prefixes {
                for (key, ours) in named(prefix, &consumers, &streams, &outboxes) {
                    let shown = String::from_utf8_lossy(&key).into_owned();
                    prop_assert_eq!(Ours::parse(prefix, &key), Some(ours.clone()), "{}", shown);
                    let tag = match &ours {
                        Ours::Consumer(consumer, _) => consumer.as_str().as_bytes(),
                        Ours::Outbox(stream) => hashed(stream.as_bytes()),
                        Ours::Retention(stream) => hashed(stream),
                    };
                    prop_assert_eq!(hashed(&key), tag, "{}", shown);
                    let this = (prefix.clone(), ours);
                    let first = meaning.entry(key).or_insert_with(|| this.clone());
                    prop_assert_eq!(&*first, &this, "{}", shown);
                }
            }
        }
    }

    #[test]
    fn other_keys_are_not_ours() {
        for key in [
            "p:{c}:mine",
            "p:{}:state",
            "p:{c}:state:x",
            "p:{c}:letters-",
            "p:{c}:outbox:d",
            "p:{c}:outbox:{d}:c",
            "p:{c}:outbox:",
            "q:{c}:state",
            "p:x:{c}:state",
            "p:retention",
            "p:retention:",
            "{c}:state",
        ] {
            assert_eq!(Ours::parse("p", key.as_bytes()), None, "{key}");
        }
    }
}
