//! Asking again, for what no event reports: a server that comes up, a broker's own bookkeeping, another process.

use std::{future::Future, time::Duration};

use essentially_once::Error;
use tokio::time::{Instant, sleep};

/// What takes longer is stuck, also on a machine with other work to do.
const LIMIT: Duration = Duration::from_secs(120);

/// How soon to ask again.
const PAUSE: Duration = Duration::from_millis(10);

/// Repeats what fails in passing until it is done.
///
/// # Errors
/// What does not pass by itself, and what has not passed after two minutes.
pub async fn insist<T, F>(ask: impl FnMut() -> F) -> Result<T, Error>
where
    F: Future<Output = Result<T, Error>>,
{
    Ok(insist_and_count(ask).await?.0)
}

/// The same, and what failed on the way.
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

/// Asks until the answer is `Ok`. Until then it says what there is instead.
///
/// # Errors
/// What the question fails with, and the last answer if it is still not the right one after two minutes.
pub async fn eventually<T, F>(mut ask: impl FnMut() -> F) -> Result<T, crate::Error>
where
    F: Future<Output = Result<Result<T, String>, crate::Error>>,
{
    let given_up = Instant::now() + LIMIT;
    loop {
        match ask().await? {
            Ok(answer) => return Ok(answer),
            Err(instead) if Instant::now() >= given_up => {
                return Err(format!("after {LIMIT:?} there is still: {instead}").into());
            }
            Err(_) => sleep(PAUSE).await,
        }
    }
}
