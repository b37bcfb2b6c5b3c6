//! Kills the server at random while senders and consumers run.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use essentially_once::{CancellationToken, Consumer, ConsumerId, backend::Source, consumer::EssentiallyOnce};
use essentially_once_postgres::{Pg, PgStore};
use essentially_once_testkit::Ledger;
use test_servers::PostgresServer;
use tokio::{task::block_in_place, time::sleep};

use crate::common::{LIMIT, Outcome, Random, ensure, judge, send_until};

const KILLS: usize = 12;
/// The longest time from a start to the next kill.
const LONGEST_LIFE: Duration = Duration::from_millis(400);
const SEED: &str = "ESSENTIALLY_ONCE_SEED";

pub(crate) async fn two_consumers_and_a_sender_survive_random_kills() -> Outcome {
    let seed = match std::env::var(SEED) {
        Ok(seed) => seed.parse()?,
        Err(_) => SystemTime::now().duration_since(UNIX_EPOCH)?.as_micros() as u64,
    };
    eprintln!("repeat the moments of the kills with {SEED}={seed}");
    let outcome = soak(&mut Random::new(seed)).await;
    outcome.map_err(|error| format!("{error}; seed {seed}").into())
}

async fn soak(random: &mut Random) -> Outcome {
    let server = PostgresServer::start()?;
    let consumer = ConsumerId::new("shipping")?;
    let stop = CancellationToken::new();
    let mut running = Vec::new();
    for _ in 0..2 {
        running.push(tokio::spawn(build(&server, &consumer).await?.run_until(stop.clone())));
    }
    let killed = CancellationToken::new();
    let log = Pg::connect(&server.url()).await?.log("orders").await?;
    let sending = tokio::spawn(send_until(log, killed.clone()));
    let started = Instant::now();
    for kill in 0..KILLS {
        sleep(LONGEST_LIFE.mul_f64(random.below(1_000) as f64 / 1_000.0)).await;
        block_in_place(|| {
            if kill % 3 == 0 {
                // As a service manager does it.
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
    let rest = build(&server, &consumer).await?.run_until_caught_up().await?;
    let pg = Pg::connect(&server.url()).await?;
    judge(&pg.log("orders").await?, &pg.store(), &consumer, messages).await?;
    eprintln!(
        "{messages} messages, {handled} handled under fire, {doubts} appends in doubt or refused, {restarts} restarts, then {rest}"
    );
    ensure!(
        doubts > 0 && handled > 0 && restarts > KILLS as u64,
        "the kills hit nobody"
    );
    Ok(())
}

async fn build(
    server: &PostgresServer,
    consumer: &ConsumerId,
) -> Result<Consumer<PgStore, Ledger, EssentiallyOnce>, Source> {
    let pg = Pg::connect(&server.url()).await?;
    let log = pg.log("orders").await?;
    Ok(Consumer::essentially_once(consumer.clone(), log, pg.store(), Ledger)
        .max_batch(5)
        .min_backoff(Duration::from_millis(1))
        .max_backoff(Duration::from_millis(20))
        .standby_after(Duration::ZERO))
}
