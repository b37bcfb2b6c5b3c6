//! Fencing: the revision of a position, and its owner.

use std::{fmt, str::FromStr};

use crate::{Error, backend::unique};

/// The version of a position: an epoch, and a count of commits within it. Revisions are ordered,
/// and every commit raises the revision.
///
/// The core chooses both the expected and the next revision of a commit. A session's first commit,
/// and every change by hand, opens a [fresh epoch](Self::fresh_epoch). The session's other commits
/// count up. A plain counter is not enough: a commit that is still in progress when its session
/// gives up expects a number that another session may reach on its own. The commit would then apply
/// to a state that its handler never saw.
///
/// Displayed and parsed as `count` in epoch 0, which holds positions written before version 0.2,
/// and as `epoch.count` otherwise.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Revision {
    // The derived order compares the epoch first.
    epoch: u64,
    count: u64,
}

impl Revision {
    /// The revision of a consumer that has no position yet.
    pub const NONE: Self = Self::new(0, 0);

    /// The revision with this epoch and count.
    pub const fn new(epoch: u64, count: u64) -> Self {
        Self { epoch, count }
    }

    /// The number of the session, or of the change by hand, that set it.
    pub const fn epoch(self) -> u64 {
        self.epoch
    }

    /// The number of the commit within its epoch.
    pub const fn count(self) -> u64 {
        self.count
    }

    /// The next commit of the same session.
    #[must_use]
    pub const fn next_count(self) -> Self {
        match self.count.checked_add(1) {
            Some(count) => Self::new(self.epoch, count),
            None => self.next_epoch(),
        }
    }

    /// The first commit of another session, or a change by hand: a later epoch that nothing else
    /// opens.
    ///
    /// The upper half of the epoch counts up, and the lower half is random. Epochs that only count
    /// up would repeat after a position is deleted, or restored from an older copy, and then built
    /// again. An instance that was suspended meanwhile would then commit into a position that it
    /// never saw.
    #[must_use]
    pub fn fresh_epoch(self) -> Self {
        match u32::try_from(self.generation() + 1) {
            Ok(generation) => Self::new(u64::from(generation) << 32 | u64::from(unique() as u32), 1),
            // Only a store that was tampered with gets here, and that must not cause a panic.
            Err(_) => Self::new(u64::MAX, 1),
        }
    }

    /// How many epochs there have been, if all of them were [fresh](Self::fresh_epoch).
    const fn generation(self) -> u64 {
        self.epoch >> 32
    }

    /// Whether a position that was at `seen` and is now at this revision must have lost commits:
    /// this revision is earlier, or it is neither before nor after `seen`.
    pub(crate) fn is_lost_since(self, seen: Self) -> bool {
        self < seen || (self.generation() == seen.generation() && self.generation() > 0 && self.epoch != seen.epoch)
    }

    /// A later epoch that is always the same, for models and tests, which must be repeatable.
    /// Commits use [`fresh_epoch`](Self::fresh_epoch).
    #[must_use]
    pub const fn next_epoch(self) -> Self {
        // Only a store that was tampered with saturates, and that must not cause a panic.
        Self::new(self.epoch.saturating_add(1 << 32), 1)
    }
}

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.epoch {
            0 => write!(f, "{}", self.count),
            epoch => write!(f, "{epoch}.{}", self.count),
        }
    }
}

impl fmt::Debug for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Revision({self})")
    }
}

impl FromStr for Revision {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let number = |digits: &str| {
            digits.parse::<u64>().map_err(|error| Error::InvalidSetting {
                setting: "revision",
                reason: format!("{text:?} is not `count` or `epoch.count`: {error}"),
            })
        };
        match text.split_once('.') {
            Some((epoch, count)) => Ok(Self::new(number(epoch)?, number(count)?)),
            None => Ok(Self::new(0, number(text)?)),
        }
    }
}

/// A random token that one run of a consumer draws and writes with each commit, so that it
/// recognizes its own position.
///
/// The token decides nothing, because the [`Revision`] does the fencing. A fenced consumer that
/// finds its own token was overtaken by a change made by hand, not by another instance.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Owner(u128);

impl Owner {
    /// Draws a random token.
    pub fn draw() -> Self {
        Self(unique().max(1))
    }

    /// The token with this number.
    pub const fn new(number: u128) -> Self {
        Self(number)
    }

    /// The token as a number.
    pub const fn get(self) -> u128 {
        self.0
    }
}

/// 32 hexadecimal digits.
impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Debug for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Owner({self})")
    }
}

impl FromStr for Owner {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let is_hex = text.len() == 32 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        let parsed = u128::from_str_radix(text, 16).ok().filter(|_| is_hex);
        parsed.map(Self).ok_or_else(|| Error::InvalidSetting {
            setting: "owner",
            reason: format!("{text:?} is not 32 hexadecimal digits"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn revisions_rise_with_every_commit_and_round_trip_as_text() {
        let first = Revision::NONE.next_epoch();
        let revisions = [
            Revision::NONE,
            Revision::new(0, 70_000),
            first,
            first.next_count(),
            first.next_count().next_epoch(),
            Revision::new(u64::MAX, u64::MAX),
        ];
        assert!(revisions.is_sorted());
        for revision in revisions {
            assert_eq!(revision.to_string().parse::<Revision>().expect("round trip"), revision);
        }
        assert_eq!("17".parse::<Revision>().expect("an old one"), Revision::new(0, 17));
        for bad in ["", ".", "1.", ".1", "1.2.3", "-1", "x"] {
            assert!(bad.parse::<Revision>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn fresh_epochs_rise_and_are_never_opened_twice() {
        let first = Revision::NONE.fresh_epoch();
        let again = Revision::NONE.fresh_epoch();
        assert_ne!(first, again);
        for old in [Revision::NONE, Revision::new(0, 70_000), Revision::new(2, 17), first] {
            assert!(old.fresh_epoch() > old && !old.fresh_epoch().is_lost_since(old));
        }
        assert!(first.is_lost_since(first.next_count()) && !first.next_count().is_lost_since(first));
        assert!(
            first.is_lost_since(again) && again.is_lost_since(first),
            "two that were built from nothing"
        );
        assert!(Revision::new(u64::MAX, 3).fresh_epoch() >= Revision::new(u64::MAX, 1));
    }

    #[test]
    fn owners_round_trip_as_text() {
        for owner in [Owner::draw(), Owner::new(1), Owner::new(u128::MAX)] {
            assert_eq!(owner.to_string().parse::<Owner>().expect("round trip"), owner);
        }
        for bad in [
            "",
            "1",
            "+0000000000000000000000000000001",
            "é000000000000000000000000000000",
        ] {
            assert!(bad.parse::<Owner>().is_err(), "{bad:?}");
        }
        assert_ne!(Owner::draw(), Owner::draw());
    }
}
