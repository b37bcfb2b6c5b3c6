/// Decides how many records one fetch returns: as many as fit into a number of bytes, but at least
/// one.
///
/// ```
/// # use essentially_once::backend::FetchBudget;
/// let mut budget = FetchBudget::of(100);
/// assert!(budget.admits(500)); // the first record always fits
/// assert!(!budget.admits(1));
/// ```
#[derive(Clone, Debug)]
pub struct FetchBudget {
    left: Option<usize>,
    bytes: usize,
}

impl FetchBudget {
    /// The default budget of a fetch in bytes: 1 MiB.
    pub const BYTES: usize = 1024 * 1024;

    /// A budget of [`BYTES`](Self::BYTES).
    pub const fn new() -> Self {
        Self::of(Self::BYTES)
    }

    /// A budget of `bytes` bytes.
    pub const fn of(bytes: usize) -> Self {
        Self { left: None, bytes }
    }

    /// Whether a record of this [size](crate::Record::size) still fits. If it does, it is counted.
    pub const fn admits(&mut self, size: usize) -> bool {
        let left = match self.left {
            None => self.bytes.saturating_sub(size),
            Some(left) if size <= left => left - size,
            Some(_) => return false,
        };
        self.left = Some(left);
        true
    }

    /// Whether only empty records would still fit.
    pub const fn is_spent(&self) -> bool {
        matches!(self.left, Some(0))
    }
}

impl Default for FetchBudget {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_record_always_fits_and_the_rest_by_their_size() {
        let mut budget = FetchBudget::of(10);
        assert!(budget.admits(4));
        assert!(!budget.admits(7));
        assert!(budget.admits(6));
        assert!(budget.is_spent());
        assert!(budget.admits(0));
        assert!(!budget.admits(1));

        let mut budget = FetchBudget::of(10);
        assert!(!budget.is_spent());
        assert!(budget.admits(11));
        assert!(!budget.admits(1));
    }
}
