//! Why no number of confirmations makes two sides certain, and why an order does not need it.
//!
//! ```text
//! cargo run -p two-generals         # a random seed
//! cargo run -p two-generals -- 7    # the messages of an earlier run
//! ```
//!
//! Two generals win only if both attack, and their messengers may be caught. Whoever sends the last
//! message never learns whether it arrived (Akkoyunlu, Ekanadham and Huber, 1975). A shop that
//! sends orders has the same messengers, and an easier task: nobody has to act at the same time.
#![expect(clippy::print_stdout, reason = "an example shows what it does")]

use std::{
    env,
    process::ExitCode,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use essentially_once::{
    Consumer, ConsumerId, Epoch, Error, KeyValue, Log, NewRecord, OffsetStore, Origin, ProducerId, Record,
    consumer::OnFailure,
    handler_fn,
    memory::{Memory, MemoryLog, MemoryTx},
    relay::{Destination, Relay},
    signed::{Keys, Signed, Signer},
};

/// One message in five is lost.
const LOSS: f64 = 0.2;
/// Of those that get through, one in ten is altered.
const ALTERED: f64 = 0.1;
const BATTLES: u32 = 100_000;
const ORDERS: u32 = 1_000;

fn main() -> ExitCode {
    let arguments: Vec<_> = env::args_os().skip(1).collect();
    let seed = match arguments.as_slice() {
        [] => Some(fastrand::u64(..1_000_000)),
        [seed] => seed.to_str().and_then(|seed| seed.parse().ok()),
        _ => None,
    };
    let Some(seed) = seed else {
        eprintln!("two-generals: {arguments:?} is not a seed: give one whole number, or nothing");
        return ExitCode::from(2);
    };
    println!("seed {seed}; one message in five is lost\n");
    let mut rng = fastrand::Rng::with_seed(seed);
    generals(&mut rng);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
    let completed = runtime
        .map_err(|error| Error::failed("start the runtime", error))
        .and_then(|runtime| runtime.block_on(orders(rng)));
    match completed {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

/// Fights battles with ever more confirmations.
fn generals(rng: &mut fastrand::Rng) {
    println!("Two generals agree on an attack, each message confirming the one before:\n");
    println!("confirmations  both attack    none attacks   one attacks alone");
    for confirmations in 0..=7 {
        let (mut both, mut alone) = (0, 0);
        for _ in 0..BATTLES {
            match attack(confirmations, || rng.f64() >= LOSS) {
                (true, true) => both += 1,
                (false, false) => {}
                _ => alone += 1,
            }
        }
        let percent = |battles: u32| f64::from(battles) * 100.0 / f64::from(BATTLES);
        println!(
            "{confirmations:>13}{:>11.1} %{:>14.1} %{:>18.1} %",
            percent(both),
            percent(BATTLES - both - alone),
            percent(alone)
        );
    }
    println!(
        "\nThe last messenger can always be the one that is caught, and then one general attacks alone. Another\n\
         confirmation only makes another message the last one.\n"
    );
}

/// Which of the generals attack: those whom every message that they wait for has reached. The first
/// general sends the plan, and each of them confirms what arrives, up to the number of
/// confirmations.
fn attack(confirmations: u32, mut arrives: impl FnMut() -> bool) -> (bool, bool) {
    let messages = confirmations + 1;
    let lost = (1..=messages).find(|_| !arrives());
    // Odd messages go to the second general. After a lost message none is sent.
    let missed = |is_second: bool| {
        let lost = lost.unwrap_or(messages + 1);
        (lost..=messages).any(|message| (message % 2 == 1) == is_second)
    };
    (!missed(false), !missed(true))
}

/// Sends orders with the same messengers. Returns whether each was shipped once.
async fn orders(mut rng: fastrand::Rng) -> Result<bool, Error> {
    println!("A shop sends {ORDERS} orders. Some messengers are not caught, but altered what they carry:\n");
    let (shop, shipping) = (Memory::new(), Memory::new());
    let outbox = shop.log("outbox")?;
    let name = ProducerId::new("shop")?;
    let numbered = |number: u32| {
        let origin = Origin::new(name.clone(), Epoch::STABLE, number.into());
        NewRecord::new(number.to_string()).origin(origin)
    };
    outbox.append(&(1..=ORDERS).map(numbered).collect::<Vec<_>>()).await?;
    let bus = shipping.log("orders")?;
    let mut secret = [0; 32];
    rng.fill(&mut secret);
    let signer = Signer::new("orders", Keys::new("1", secret)?)?;

    let toll = Arc::default();
    let messenger = Messenger {
        bus: bus.clone(),
        signer: signer.clone(),
        rng: Mutex::new(rng),
        toll: Arc::clone(&toll),
    };
    let relay = Consumer::at_least_once(ConsumerId::new("relay")?, outbox, shop.store(), Relay::to(messenger));
    relay
        .max_batch(1)
        .min_backoff(Duration::from_micros(100))
        .run_until_caught_up()
        .await?;

    let ship = handler_fn(|order: &Record, tx: &mut MemoryTx| {
        Box::pin(async move {
            let times = times(tx.get(&order.payload).await?);
            tx.put(&order.payload, &[times + 1]).await?;
            Ok(())
        })
    });
    let id = ConsumerId::new("shipping")?;
    let report = Consumer::essentially_once(id.clone(), Signed::new(bus, signer), shipping.store(), ship)
        .on_failure(OnFailure::Skip)
        .accept_volatile()
        .run_until_caught_up()
        .await?;

    let mut shipped = shipping.store().begin(&id).await?;
    let mut once = 0;
    let mut wrong = Vec::new();
    for number in 1..=ORDERS {
        match times(shipped.get(number.to_string().as_bytes()).await?) {
            1 => once += 1,
            times => wrong.push(format!("order {number}, {times} times")),
        }
    }
    if !wrong.is_empty() {
        let few = &wrong[..wrong.len().min(10)];
        eprintln!("two-generals: {} orders were not shipped once: {few:?}", wrong.len());
    }
    let Toll {
        sent,
        caught,
        altered,
        unanswered,
    } = *toll.lock().unwrap_or_else(PoisonError::into_inner);
    println!(
        "{sent:>6} messages sent: {caught} lost, {altered} altered, and {unanswered} of which the answer was lost"
    );
    println!("{:>6} altered messages refused, by their signatures", report.failed);
    println!(
        "{:>6} messages dropped that had come before, by their numbers",
        report.duplicates
    );
    println!("{once:>6} orders shipped once\n");
    println!(
        "The shop knows no better than a general whether its last message arrived. It sends each one again until an\n\
         answer comes, and a message that comes twice is shipped once. Nobody has to be certain: it only has to be\n\
         completed."
    );
    Ok(once == ORDERS)
}

fn times(value: Option<impl AsRef<[u8]>>) -> u8 {
    value.and_then(|value| value.as_ref().first().copied()).unwrap_or(0)
}

/// What happened on the way.
#[derive(Clone, Copy, Default)]
struct Toll {
    sent: u32,
    caught: u32,
    altered: u32,
    unanswered: u32,
}

/// Carries messages to the bus, and answers back.
struct Messenger {
    bus: MemoryLog,
    signer: Signer,
    rng: Mutex<fastrand::Rng>,
    toll: Arc<Mutex<Toll>>,
}

#[async_trait]
impl Destination for Messenger {
    async fn send(&self, records: &[NewRecord]) -> Result<(), Error> {
        for record in records {
            let mut message = self.signer.sign(record.clone())?;
            let is_answered = match self.meet(&mut message) {
                Meeting::Caught => false,
                Meeting::Through { is_answered } => {
                    self.bus.append(&[message]).await?;
                    is_answered
                }
            };
            if !is_answered {
                return Err(Error::indeterminate("send an order", "no answer came"));
            }
        }
        Ok(())
    }
}

enum Meeting {
    /// The message never arrives.
    Caught,
    Through {
        /// Whether the answer arrives.
        is_answered: bool,
    },
}

impl Messenger {
    /// Lets the messenger meet the enemy, there and back. An enemy who alters a message catches the
    /// answer too, or the shop would believe that the order has arrived.
    fn meet(&self, message: &mut NewRecord) -> Meeting {
        let mut rng = self.rng.lock().unwrap_or_else(PoisonError::into_inner);
        let mut toll = self.toll.lock().unwrap_or_else(PoisonError::into_inner);
        toll.sent += 1;
        if rng.f64() < LOSS {
            toll.caught += 1;
            return Meeting::Caught;
        }
        if rng.f64() < ALTERED {
            toll.altered += 1;
            message.payload = format!("{}0", String::from_utf8_lossy(&message.payload)).into();
            return Meeting::Through { is_answered: false };
        }
        let is_answered = rng.f64() >= LOSS;
        toll.unanswered += u32::from(!is_answered);
        Meeting::Through { is_answered }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The outcome if the message with this number, counted from 1, is lost.
    fn lost(confirmations: u32, lost: u32) -> (bool, bool) {
        let mut message = 0;
        attack(confirmations, || {
            message += 1;
            message != lost
        })
    }

    #[test]
    fn a_general_is_alone_exactly_if_the_last_message_is_lost() {
        for confirmations in 0..6 {
            let last = confirmations + 1;
            assert_eq!(lost(confirmations, 0), (true, true));
            for message in 1..last {
                assert_eq!(lost(confirmations, message), (false, false), "{message} of {last}");
            }
            let (first, second) = lost(confirmations, last);
            assert_ne!(first, second, "{last} messages");
        }
    }

    #[tokio::test]
    async fn every_order_is_shipped_once() {
        for seed in 0..3 {
            assert!(
                orders(fastrand::Rng::with_seed(seed)).await.expect("it completes"),
                "{seed}"
            );
        }
    }
}
