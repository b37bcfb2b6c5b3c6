//! Polling, for changes that no event reports: a server that comes up, a broker's own bookkeeping,
//! another process.

use std::{future::Future, time::Duration};

use essentially_once::Error;
use tokio::time::{Instant, sleep};

/// Longer means stuck, even on a busy machine.
const LIMIT: Duration = Duration::from_secs(120);

/// The pause between two attempts.
const PAUSE: Duration = Duration::from_millis(10);

/// Retries an operation while it fails with transient errors.
///
/// # Errors
/// Any other error, and a transient one that persists for two minutes.
pub async fn insist<T, F>(ask: impl FnMut() -> F) -> Result<T, Error>
where
    F: Future<Output = Result<T, Error>>,
{
    Ok(insist_and_count(ask).await?.0)
}

/// Like [`insist`], and also returns the errors on the way.
///
/// # Errors
/// As for [`insist`].
pub async fn insist_and_count<T, F>(mut ask: impl FnMut() -> F) -> Result<(T, Vec<Error>), Error>
where
    F: Future<Output = Result<T, Error>>,
{
    let given_up = Instant::now() + LIMIT;
    let mut failures = Vec::new();
    loop {
        match ask().await {
            Ok(done) => return Ok((done, failures)),
            Err(error) if error.is_transient() && Instant::now() < given_up => failures.push(error),
            Err(error) => return Err(error),
        }
        sleep(PAUSE).await;
    }
}

/// Polls until the answer is `Ok`. An `Err` answer holds the current state.
///
/// # Errors
/// An error of the question, and the last answer if it is still `Err` after two minutes.
pub async fn eventually<T, F>(mut ask: impl FnMut() -> F) -> Result<T, crate::Error>
where
    F: Future<Output = Result<Result<T, String>, crate::Error>>,
{
    let given_up = Instant::now() + LIMIT;
    loop {
        match ask().await? {
            Ok(answer) => return Ok(answer),
            Err(instead) if Instant::now() >= given_up => {
                return Err(format!("not reached after {LIMIT:?}, the last answer is: {instead}").into());
            }
            Err(_) => sleep(PAUSE).await,
        }
    }
}
