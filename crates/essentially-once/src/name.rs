//! Names of consumers, producers and logs: validated once, cheap to clone.

use std::{fmt, str::FromStr, sync::Arc};

use crate::Error;

const MAX_BYTES: usize = 200;

/// One rule for all names, so that a name valid on one backend is valid on every other: it can stand in a table row, a
/// Redis key, a queue name and a metric label without escaping.
fn validate(kind: &'static str, name: &str) -> Result<Arc<str>, Error> {
    let invalid = |reason: String| Error::InvalidName {
        kind,
        name: name.chars().take(60).collect(),
        reason,
    };
    if name.is_empty() {
        return Err(invalid("it is empty".into()));
    }
    if name.len() > MAX_BYTES {
        return Err(invalid(format!(
            "it has {} bytes, the limit is {MAX_BYTES}",
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
        /// 1 to 200 bytes: ASCII letters, digits and `. _ - : / @ + =`, beginning with a letter or digit.
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $type(Arc<str>);

        impl $type {
            /// Checks and wraps `name`.
            ///
            /// # Errors
            /// [`Error::InvalidName`] with the rule that was broken.
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
    /// Names a consumer: whoever runs under the same name shares one [`Position`](crate::Position).
    ConsumerId,
    "consumer"
);
name!(
    /// Names a producer, whose records are numbered so that a record sent twice is handled once.
    ProducerId,
    "producer"
);

/// Identifies a log: its name, and where the backend can tell, which incarnation of that name it is.
///
/// A log that was deleted and created again has the same name and another incarnation, so that a position in the old one
/// is never mistaken for a position in the new one.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct LogId {
    name: Arc<str>,
    incarnation: Option<Arc<str>>,
}

impl LogId {
    /// A log of a backend that cannot tell incarnations apart. The name obeys the rule of [`ConsumerId`].
    ///
    /// # Errors
    /// [`Error::InvalidName`] with the rule that was broken.
    pub fn new(name: impl AsRef<str>) -> Result<Self, Error> {
        Ok(Self {
            name: validate("log", name.as_ref())?,
            incarnation: None,
        })
    }

    /// The same log with its incarnation: text that the backend draws anew when it creates the log.
    ///
    /// # Errors
    /// [`Error::InvalidName`] with the rule that was broken.
    pub fn with_incarnation(self, incarnation: impl AsRef<str>) -> Result<Self, Error> {
        Ok(Self {
            incarnation: Some(validate("log incarnation", incarnation.as_ref())?),
            ..self
        })
    }

    /// The log's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Which creation of that name this is, if the backend can tell.
    pub fn incarnation(&self) -> Option<&str> {
        self.incarnation.as_deref()
    }

    /// Whether both are the same log: equal names, and equal incarnations where both are known.
    ///
    /// ```
    /// # use essentially_once::LogId;
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
