//! Kills the server at random while a sender and consumers run.

use std::time::{Duration, Instant};

use essentially_once::{CancellationToken, Consumer, ConsumerId, Error, consumer::EssentiallyOnce};
use essentially_once_testkit::Ledger;
use tokio::{task::block_in_place, time::sleep};

use crate::{
    Backend, LIMIT, Outcome, Server as _, ensure,
    ledger::{judge, send_until},
};

const SEED: &str = "ESSENTIALLY_ONCE_SEED";

/// Restarts the server `kills` times, at most `longest_life` after it has come back, while two
/// consumers and a sender run. Every third time it is stopped and not killed.
///
/// # Errors
/// The first finding, with the seed that repeats the moments.
pub async fn kill_at_random<B: Backend>(kills: u32, longest_life: Duration) -> Outcome {
    let seed = match std::env::var(SEED) {
        Ok(seed) => seed.parse()?,
        Err(_) => fastrand::u64(..),
    };
    eprintln!("repeat the moments of the kills with {SEED}={seed}");
    let outcome = kill::<B>(kills, longest_life, &mut fastrand::Rng::with_seed(seed)).await;
    outcome.map_err(|error| format!("{error}; seed {seed}").into())
}

async fn kill<B: Backend>(kills: u32, longest_life: Duration, random: &mut fastrand::Rng) -> Outcome {
    let server = B::start()?;
    let consumer = ConsumerId::new("shipping")?;
    let stop = CancellationToken::new();
    let mut running = Vec::new();
    for _ in 0..2 {
        running.push(tokio::spawn(
            build::<B>(&server, &consumer).await?.run_until(stop.clone()),
        ));
    }
    let killed = CancellationToken::new();
    let log = B::connect(&server.url(), None).await?.log("orders").await?;
    let sending = tokio::spawn(send_until(log, killed.clone()));
    let started = Instant::now();
    for kill in 0..kills {
        sleep(longest_life.mul_f32(random.f32())).await;
        block_in_place(|| {
            if kill % 3 == 0 {
                server.stop()?;
            }
            server.restart()
        })?;
        ensure!(
            started.elapsed() < LIMIT,
            "the server does not come back quickly enough"
        );
    }
    killed.cancel();
    let (messages, doubts) = sending.await??;
    stop.cancel();
    let (mut restarts, mut handled) = (0, 0);
    for consumer in running {
        let report = consumer.await??;
        restarts += report.restarts;
        handled += report.handled;
    }
    let rest = build::<B>(&server, &consumer).await?.run_until_caught_up().await?;
    let backend = B::connect(&server.url(), None).await?;
    judge(&backend.log("orders").await?, &backend.store(), &consumer, messages).await?;
    eprintln!(
        "{messages} messages, {handled} handled under fire, {doubts} appends in doubt or refused, {restarts} restarts, then {rest}"
    );
    ensure!(
        doubts > 0 && handled > 0 && restarts > u64::from(kills),
        "the kills hit nobody"
    );
    Ok(())
}

async fn build<B: Backend>(
    server: &B::Server,
    consumer: &ConsumerId,
) -> Result<Consumer<B::Store, Ledger, EssentiallyOnce>, Error> {
    let backend = B::connect(&server.url(), None).await?;
    let log = backend.log("orders").await?;
    Ok(
        Consumer::essentially_once(consumer.clone(), log, backend.store(), Ledger)
            .max_batch(5)
            .min_backoff(Duration::from_millis(1))
            .max_backoff(Duration::from_millis(20))
            .standby_after(Duration::ZERO),
    )
}
