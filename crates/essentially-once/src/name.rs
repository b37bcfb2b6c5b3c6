//! Names of consumers, producers and logs: validated once, cheap to clone.

use std::{fmt, str::FromStr, sync::Arc};

use crate::{Error, backend::unique};

const MAX_BYTES: usize = 200;

/// One rule for all names, so that a name that is valid on one backend is valid on all of them: in
/// a table row, a Redis key, a queue name and a metric label, without escaping.
pub(crate) fn validate(kind: &'static str, name: &str) -> Result<Arc<str>, Error> {
    let invalid = |reason: String| Error::InvalidName {
        kind,
        name: name.chars().take(60).collect(),
        reason,
    };
    if name.is_empty() {
        return Err(invalid("it is empty; use 1 to 200 bytes".into()));
    }
    if name.len() > MAX_BYTES {
        return Err(invalid(format!(
            "it has {} bytes, over the limit of {MAX_BYTES}",
            name.len()
        )));
    }
    if !name.starts_with(|c: char| c.is_ascii_alphanumeric()) {
        return Err(invalid("it must begin with an ASCII letter or digit".into()));
    }
    if let Some(bad) = name
        .chars()
        .find(|c| !(c.is_ascii_alphanumeric() || "._-:/@+=".contains(*c)))
    {
        return Err(invalid(format!(
            "{bad:?} is not allowed; use ASCII letters, digits and . _ - : / @ + ="
        )));
    }
    Ok(name.into())
}

macro_rules! name {
    ($(#[$doc:meta])* $type:ident, $kind:literal) => {
        $(#[$doc])*
        ///
        /// 1 to 200 bytes: ASCII letters, digits and `. _ - : / @ + =`, beginning with a letter or
        /// digit.
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $type(Arc<str>);

        impl $type {
            /// Checks and wraps `name`.
            ///
            /// # Errors
            /// [`Error::InvalidName`] with the broken rule.
            pub fn new(name: impl AsRef<str>) -> Result<Self, Error> {
                validate($kind, name.as_ref()).map(Self)
            }

            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $type {
            type Err = Error;

            fn from_str(name: &str) -> Result<Self, Error> {
                Self::new(name)
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({})", stringify!($type), self.0)
            }
        }
    };
}

name!(
    /// Names a consumer. All instances with the same name share one [`Position`](crate::Position).
    ConsumerId,
    "consumer"
);
name!(
    /// Names a producer. It numbers its records, so that consumers handle a record that it sends
    /// twice only once.
    ProducerId,
    "producer"
);

/// Which of a producer's numberings a sequence belongs to.
///
/// Consumers compare sequences only within one epoch. A producer that starts numbering again takes
/// a new epoch, so that none of its records is mistaken for an earlier one.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Epoch(u64);

impl Epoch {
    /// For a producer whose numbers are durable: an outbox, the lines of a file, a counter in a
    /// database. It continues its numbering after every restart, and consumers never forget the
    /// sequences that they saw of it.
    pub const STABLE: Self = Self(0);

    /// The epoch with this number. 0 is [`STABLE`](Self::STABLE).
    pub const fn new(number: u64) -> Self {
        Self(number)
    }

    /// A random epoch, for a producer that starts numbering from the beginning. Draw one per
    /// process and keep it.
    pub fn fresh() -> Self {
        Self((unique() as u64).max(1))
    }

    /// The epoch as a number.
    pub const fn get(self) -> u64 {
        self.0
    }
}

/// A producer and one of its [epochs](Epoch). Within it, every sequence names one record.
///
/// Displayed and parsed as `billing` in the stable epoch and as `billing#17` otherwise.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Numbering {
    producer: ProducerId,
    epoch: Epoch,
}

impl Numbering {
    /// The numbering of this producer and epoch.
    pub const fn new(producer: ProducerId, epoch: Epoch) -> Self {
        Self { producer, epoch }
    }

    /// The producer.
    pub const fn producer(&self) -> &ProducerId {
        &self.producer
    }

    /// The epoch of the producer's numbering.
    pub const fn epoch(&self) -> Epoch {
        self.epoch
    }
}

impl fmt::Display for Numbering {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.epoch {
            Epoch::STABLE => self.producer.fmt(f),
            Epoch(epoch) => write!(f, "{}#{epoch}", self.producer),
        }
    }
}

impl FromStr for Numbering {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let Some((producer, epoch)) = text.split_once('#') else {
            return Ok(Self::new(text.parse()?, Epoch::STABLE));
        };
        // Each numbering has one spelling, so this refuses `#0`, `#+1` and `#01`.
        let parsed = epoch
            .parse::<u64>()
            .ok()
            .filter(|number| *number != 0 && number.to_string() == epoch);
        match parsed {
            Some(number) => Ok(Self::new(producer.parse()?, Epoch(number))),
            None => Err(Error::InvalidName {
                kind: "producer",
                name: text.chars().take(60).collect(),
                reason: "the text after `#` is not an epoch; use a decimal number from 1 to 2^64 - 1".into(),
            }),
        }
    }
}

/// Identifies a log: its name, and its incarnation if the backend keeps one.
///
/// A log that was deleted and recreated has the same name and another incarnation, so that a
/// position in the old log is never mistaken for a position in the new one.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct LogId {
    name: Arc<str>,
    incarnation: Option<Arc<str>>,
}

impl LogId {
    /// A log of a backend that cannot distinguish incarnations. The name obeys the rule of
    /// [`ConsumerId`].
    ///
    /// # Errors
    /// [`Error::InvalidName`] with the broken rule.
    pub fn new(name: impl AsRef<str>) -> Result<Self, Error> {
        Ok(Self {
            name: validate("log", name.as_ref())?,
            incarnation: None,
        })
    }

    /// The same log with its incarnation: text that the backend draws at random when it creates the
    /// log.
    ///
    /// # Errors
    /// [`Error::InvalidName`] with the broken rule.
    pub fn with_incarnation(self, incarnation: impl AsRef<str>) -> Result<Self, Error> {
        Ok(Self {
            incarnation: Some(validate("log incarnation", incarnation.as_ref())?),
            ..self
        })
    }

    /// The log with this stored name and incarnation. An empty incarnation means none.
    ///
    /// # Errors
    /// [`Error::InvalidName`] with the broken rule.
    pub fn from_parts(name: impl AsRef<str>, incarnation: Option<&str>) -> Result<Self, Error> {
        let log = Self::new(name)?;
        match incarnation {
            None | Some("") => Ok(log),
            Some(incarnation) => log.with_incarnation(incarnation),
        }
    }

    /// The log's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The log's incarnation, if the backend keeps one.
    pub fn incarnation(&self) -> Option<&str> {
        self.incarnation.as_deref()
    }

    /// Whether both are the same log: their names are equal, and their incarnations are equal if
    /// both are known.
    ///
    /// ```
    /// # use essentially_once::backend::LogId;
    /// let first = LogId::new("orders")?.with_incarnation("a1")?;
    /// let again = LogId::new("orders")?.with_incarnation("b2")?;
    /// assert!(!first.is_same_log(&again));
    /// assert!(first.is_same_log(&LogId::new("orders")?));
    /// # Ok::<(), essentially_once::Error>(())
    /// ```
    pub fn is_same_log(&self, other: &Self) -> bool {
        self.name == other.name
            && match (&self.incarnation, &other.incarnation) {
                (Some(a), Some(b)) => a == b,
                _ => true,
            }
    }
}

/// `name`, or `name#incarnation`.
impl fmt::Display for LogId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)?;
        match &self.incarnation {
            Some(incarnation) => write!(f, "#{incarnation}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_numbering_has_one_spelling() {
        let producer = ProducerId::new("billing").expect("name");
        for (epoch, shown) in [
            (0, "billing"),
            (17, "billing#17"),
            (u64::MAX, "billing#18446744073709551615"),
        ] {
            let numbering = Numbering::new(producer.clone(), Epoch::new(epoch));
            assert_eq!(numbering.to_string(), shown);
            assert_eq!(shown.parse::<Numbering>().expect("parses"), numbering);
        }
        for bad in [
            "",
            "#1",
            "billing#",
            "billing#0",
            "billing#+1",
            "billing#01",
            "billing#1#2",
            "a b#1",
        ] {
            assert!(bad.parse::<Numbering>().is_err(), "{bad:?}");
        }
        assert_ne!(Epoch::fresh(), Epoch::STABLE);
    }

    #[test]
    fn odd_names_are_refused_with_the_rule_they_break() {
        let long = "x".repeat(201);
        for (name, reason) in [
            ("", "empty"),
            ("a b", "' ' is not allowed"),
            ("a\nb", "'\\n' is not allowed"),
            ("a'; DROP TABLE t; --", "'\\'' is not allowed"),
            ("{tag}", "begin with"),
            ("naïve", "'ï' is not allowed"),
            ("-rf", "begin with"),
            (long.as_str(), "201 bytes"),
        ] {
            let error = ConsumerId::new(name).expect_err(name).to_string();
            assert!(error.contains(reason), "{name:?}: {error}");
            assert!(LogId::new(name).is_err(), "{name:?}");
            assert!(!error.contains('\n'), "control characters are escaped: {error}");
        }
        assert!(ConsumerId::new("billing/eu-1:v2.a_b@x+y=z").is_ok());
    }
}
