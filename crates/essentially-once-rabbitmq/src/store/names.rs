//! Names of the store's streams: `<prefix>.<consumer>.<kind>`, with every dot of the prefix
//! doubled.
//!
//! A consumer's name begins with a letter or digit, so the first odd run of dots ends with the dot
//! after the prefix. Without the doubling, prefix `shop` with consumer `eu.billing` would share
//! streams with prefix `shop.eu` and consumer `billing`, as it did up to version 0.1.

use essentially_once::{ConsumerId, Error, backend::LogId};

/// The longest name of a stream, in bytes. A queue name may have 255 bytes, but RabbitMQ puts the
/// names of virtual host and stream and a number of 19 digits into one name of that length.
const NAME_MAX: usize = 255 - "_".len() * 2 - 19;

/// The end of the names of outboxes.
const OUTBOX: &str = ".outbox";

/// What a name is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    Changelog,
    SnapshotsA,
    SnapshotsB,
    /// Not a stream: the name of the log of sent records in positions.
    Sent,
}

impl Kind {
    const ALL: [Self; 4] = [Self::Changelog, Self::SnapshotsA, Self::SnapshotsB, Self::Sent];

    const fn suffix(self) -> &'static str {
        match self {
            Self::Changelog => ".changelog",
            Self::SnapshotsA => ".snapshots.a",
            Self::SnapshotsB => ".snapshots.b",
            Self::Sent => ".sent",
        }
    }
}

/// Checks a prefix by the rule for names.
pub(crate) fn check_prefix(prefix: &str) -> Result<(), Error> {
    match LogId::new(prefix) {
        Err(Error::InvalidName { reason, .. }) => Err(Error::InvalidSetting {
            setting: "prefix",
            reason,
        }),
        checked => checked.map(drop),
    }
}

/// Checks that the names of the consumer's streams are not too long.
pub(super) fn check_length(prefix: &str, vhost: &str, consumer: &ConsumerId) -> Result<(), Error> {
    let length = name(prefix, consumer, Kind::SnapshotsA).len();
    let most = most_bytes(vhost);
    if length <= most {
        return Ok(());
    }
    Err(Error::InvalidSetting {
        setting: "prefix",
        reason: format!(
            "together with the consumer's name {consumer} it makes stream names of {length} bytes (a dot in the prefix counts \
             twice), and RabbitMQ takes {most} in the virtual host {vhost}; choose a shorter prefix"
        ),
    })
}

/// The longest name of a stream in that virtual host, in bytes.
pub(crate) fn most_bytes(vhost: &str) -> usize {
    NAME_MAX.saturating_sub(vhost.len())
}

pub(super) fn name(prefix: &str, consumer: &ConsumerId, kind: Kind) -> String {
    format!("{}.{consumer}{}", prefix.replace('.', ".."), kind.suffix())
}

/// The name of the changelog in version 0.1, if it differs.
pub(super) fn old_changelog(prefix: &str, consumer: &ConsumerId) -> Option<String> {
    let old = || format!("{prefix}.{consumer}{}", Kind::Changelog.suffix());
    prefix.contains('.').then(old)
}

/// The name of an outbox in positions: `<prefix>.<consumer>/<outbox>.outbox`, with every dot of the
/// prefix and every slash before the outbox doubled. It is not a stream.
pub(super) fn outbox(prefix: &str, consumer: &ConsumerId, outbox: &str) -> String {
    let before = format!("{}.{consumer}", prefix.replace('.', ".."));
    format!("{}/{outbox}{OUTBOX}", before.replace('/', "//"))
}

/// The prefix and consumer of a name, if it is one of ours.
pub(crate) fn owner(name: &str) -> Option<(String, ConsumerId)> {
    if let Some((prefix, consumer, _)) = parse(name) {
        return Some((prefix, consumer));
    }
    parse_outbox(name).map(|(prefix, consumer, _)| (prefix, consumer))
}

/// The prefix, consumer and outbox of an outbox's name in positions.
pub(super) fn parse_outbox(name: &str) -> Option<(String, ConsumerId, String)> {
    let (before, outbox) = cut(name.strip_suffix(OUTBOX)?, '/')?;
    LogId::new(outbox).ok()?;
    let (prefix, consumer) = cut(&before, '.')?;
    Some((prefix, ConsumerId::new(consumer).ok()?, outbox.into()))
}

/// The prefix, consumer and kind of a stream's name or of the log of all sent records.
pub(crate) fn parse(name: &str) -> Option<(String, ConsumerId, Kind)> {
    let kind = Kind::ALL.into_iter().find(|kind| name.ends_with(kind.suffix()))?;
    let (prefix, consumer) = cut(name.strip_suffix(kind.suffix())?, '.')?;
    Some((prefix, ConsumerId::new(consumer).ok()?, kind))
}

/// Cuts the text after the first run of marks with an odd length. What follows begins with another
/// character, so the run's last mark is the separator, and all marks before it are doubled.
fn cut(text: &str, mark: char) -> Option<(String, &str)> {
    let mut at = 0;
    loop {
        at += text[at..].find(mark)?;
        let marks = text[at..].chars().take_while(|char| *char == mark).count();
        at += marks;
        if marks % 2 == 1 {
            let doubled = String::from_iter([mark, mark]);
            return Some((text[..at - 1].replace(&doubled, &mark.to_string()), &text[at..]));
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Names with few letters, so that many pairs collide. Some look like the suffixes.
    fn text() -> impl Strategy<Value = String> {
        "[ab](\\.{1,3}|[ab]|\\.changelog|\\.snapshots|\\.sent){0,5}"
    }

    fn slashed() -> impl Strategy<Value = String> {
        "[ab]([./]{1,3}|[ab]|\\.outbox|\\.sent){0,6}"
    }

    fn kind() -> impl Strategy<Value = Kind> {
        prop::sample::select(&Kind::ALL[..])
    }

    fn consumer(text: &str) -> ConsumerId {
        ConsumerId::new(text).expect("a valid name")
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 4_096, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn names_parse_back(prefix in text(), id in text(), kind in kind()) {
            prop_assert!(check_prefix(&prefix).is_ok());
            let joined = name(&prefix, &consumer(&id), kind);
            prop_assert_eq!(parse(&joined), Some((prefix, consumer(&id), kind)));
        }

        /// All ways to cut the same text in two.
        #[test]
        fn distinct_inputs_have_distinct_names(whole in text(), kinds in (kind(), kind())) {
            let cuts: Vec<_> = whole
                .match_indices('.')
                .filter_map(|(at, _)| Some((whole[..at].to_owned(), ConsumerId::new(&whole[at + 1..]).ok()?)))
                .collect();
            for one in &cuts {
                for other in &cuts {
                    let names = (name(&one.0, &one.1, kinds.0), name(&other.0, &other.1, kinds.1));
                    prop_assert_eq!(names.0 == names.1, one == other && kinds.0 == kinds.1, "{:?}", names);
                }
            }
        }

        #[test]
        fn arbitrary_text_never_panics(text in ".{0,30}(\\.changelog|\\.sent|/a\\.outbox)?") {
            let _ = owner(&text);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 4_096, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn outboxes_have_names_of_their_own(texts in (slashed(), slashed(), slashed()), others in (slashed(), slashed(), slashed()), kind in kind()) {
            let joined = |(prefix, id, label): &(String, String, String)| outbox(prefix, &consumer(id), label);
            prop_assert_eq!(owner(&joined(&texts)), Some((texts.0.clone(), consumer(&texts.1))));
            prop_assert_eq!(joined(&texts) == joined(&others), texts == others);
            prop_assert!(joined(&texts) != name(&others.0, &consumer(&others.1), kind));
        }

        /// All ways to cut the same text in three.
        #[test]
        fn no_two_outboxes_share_a_name(whole in slashed()) {
            let mut cuts = Vec::new();
            for (dot, _) in whole.match_indices('.') {
                for (slash, _) in whole.match_indices('/').filter(|(slash, _)| *slash > dot) {
                    let parts = (&whole[..dot], ConsumerId::new(&whole[dot + 1..slash]), &whole[slash + 1..]);
                    if let (prefix, Ok(consumer), label) = parts && LogId::new(label).is_ok() {
                        cuts.push((prefix, consumer, label));
                    }
                }
            }
            let names: Vec<_> = cuts.iter().map(|(prefix, consumer, label)| outbox(prefix, consumer, label)).collect();
            for (at, joined) in names.iter().enumerate() {
                prop_assert!(!names[..at].contains(joined), "{} twice", joined);
            }
        }
    }

    #[test]
    fn an_outbox_has_a_readable_name() {
        assert_eq!(
            outbox("shop", &consumer("shipping"), "billing"),
            "shop.shipping/billing.outbox"
        );
        assert_eq!(
            owner("shop.shipping/billing.outbox"),
            Some(("shop".into(), consumer("shipping")))
        );
        assert_eq!(owner("shop.shipping.sent"), Some(("shop".into(), consumer("shipping"))));
        for foreign in [
            "billing.outbox",
            "shop.shipping.outbox",
            "shop/billing.outbox",
            "shop.shipping/.outbox",
        ] {
            assert_eq!(owner(foreign), None, "{foreign}");
        }
    }

    #[test]
    fn a_prefix_without_dots_keeps_its_names() {
        assert_eq!(
            name("shop", &consumer("eu.billing"), Kind::Changelog),
            "shop.eu.billing.changelog"
        );
        assert_eq!(
            name("shop.eu", &consumer("billing"), Kind::SnapshotsB),
            "shop..eu.billing.snapshots.b"
        );
        assert_eq!(old_changelog("shop", &consumer("billing")), None);
        assert_eq!(
            old_changelog("shop.eu", &consumer("billing")).as_deref(),
            Some("shop.eu.billing.changelog")
        );
    }

    #[test]
    fn a_prefix_obeys_the_rule_for_names() {
        for bad in ["", "a b", ".a", "naïve", "a\n"] {
            let error = check_prefix(bad).expect_err(bad);
            assert!(
                matches!(error, Error::InvalidSetting { setting: "prefix", .. }),
                "{error:?}"
            );
        }
        let (long, id) = ("a.".repeat(73), consumer("a"));
        assert!(check_prefix(&long).is_ok() && check_length(&long, "/", &id).is_ok());
        assert!(check_length(&long, "shop", &id).is_err(), "the virtual host counts");
        let id = consumer("aa");
        assert!(
            check_length(&long, "/", &id).is_err(),
            "the dots of the prefix count twice"
        );
    }
}
