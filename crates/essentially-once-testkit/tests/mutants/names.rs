//! Changes names as defects do.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};

/// Where the defects cut a name.
const CUT: usize = 63;

pub(crate) fn without_case(name: &str) -> String {
    name.to_ascii_lowercase()
}

pub(crate) fn cut(name: &str) -> String {
    name.chars().take(CUT).collect()
}

pub(crate) fn without_separators(name: &str) -> String {
    name.replace(|c: char| !c.is_ascii_alphanumeric(), "_")
}

/// A digest that is good enough for the few names of a case.
pub(crate) fn digest(bytes: &[u8]) -> String {
    let half = |salt: u8| {
        let mut hasher = DefaultHasher::new();
        (salt, bytes).hash(&mut hasher);
        hasher.finish()
    };
    format!("{:016x}{:016x}", half(1), half(2))
}
