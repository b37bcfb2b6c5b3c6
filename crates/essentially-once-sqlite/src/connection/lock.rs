//! Locks without poisoning.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Ignores poisoning: no panic leaves a partial change behind the locks of this crate.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
