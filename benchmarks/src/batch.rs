//! How many records a commit or an append covers.

use std::{fmt, str::FromStr};

use essentially_once::{Consumer, Handler, OffsetStore, consumer::Delivery};

/// The name of the library's default, as a batch size and as a row.
pub(crate) const DEFAULTS: &str = "defaults";

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Batch {
    Records(usize),
    /// The library decides. The loop by hand has batches of the same size.
    Defaults,
}

impl Batch {
    pub(crate) fn size(self) -> usize {
        match self {
            Self::Records(records) => records,
            // The default of `Consumer::max_batch`.
            Self::Defaults => 1_000,
        }
    }

    /// Sets the batch size of a consumer, unless the library decides.
    pub(crate) fn apply<S: OffsetStore, H: Handler<D::Tx>, D: Delivery<S>>(
        self,
        consumer: Consumer<S, H, D>,
    ) -> Consumer<S, H, D> {
        match self {
            Self::Records(records) => consumer.max_batch(records),
            Self::Defaults => consumer,
        }
    }
}

impl FromStr for Batch {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.parse() {
            _ if text == DEFAULTS => Ok(Self::Defaults),
            Ok(records) if records > 0 => Ok(Self::Records(records)),
            _ => Err(format!("a number of records above 0, or `{DEFAULTS}`")),
        }
    }
}

impl fmt::Display for Batch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Records(records) => write!(f, "{records}"),
            Self::Defaults => f.write_str(DEFAULTS),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_is_a_number_or_the_default() {
        for batch in [Batch::Records(1), Batch::Records(1_000), Batch::Defaults] {
            assert_eq!(batch.to_string().parse(), Ok(batch));
        }
        for other in ["0", "-1", "default", ""] {
            assert!(other.parse::<Batch>().is_err(), "{other}");
        }
    }
}
