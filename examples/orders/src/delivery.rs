//! The deliveries to compare.

use std::fmt;

use serde::{Deserialize, Serialize};

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[expect(
    clippy::enum_variant_names,
    reason = "the deliveries are only known by their full names"
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

/// Also used in the JSON and in the names of folders.
impl fmt::Display for Delivery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::AtMostOnce => "at-most-once",
            Self::AtLeastOnce => "at-least-once",
            Self::EssentiallyOnce => "essentially-once",
        })
    }
}
