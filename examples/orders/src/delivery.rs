//! The deliveries that are compared.

use std::fmt;

use clap::ValueEnum;
use serde::Serialize;

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum, Serialize)]
#[expect(
    clippy::enum_variant_names,
    reason = "without its last word none of the names is known"
)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Delivery {
    AtMostOnce,
    AtLeastOnce,
    EssentiallyOnce,
}

impl Delivery {
    pub(crate) const ALL: [Self; 3] = [Self::AtMostOnce, Self::AtLeastOnce, Self::EssentiallyOnce];
}

/// The same text that the command line and the JSON use.
impl fmt::Display for Delivery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::AtMostOnce => "at-most-once",
            Self::AtLeastOnce => "at-least-once",
            Self::EssentiallyOnce => "essentially-once",
        })
    }
}
