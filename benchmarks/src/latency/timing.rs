//! What measurements of latency share: appends at a rate, the arrivals of their records, and the
//! table of percentiles.

use std::{
    ops::Range,
    sync::{Arc, Condvar, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use clap::Args;

use crate::{PAYLOAD, Result, contest::in_turn, median, spread};

/// How long to wait for a record.
const PATIENCE: Duration = Duration::from_secs(30);

/// How often each side appends.
#[derive(Clone, Copy, Args)]
pub(super) struct Load {
    /// How many records each side appends per second.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub(super) rate: u32,
    /// How long each side appends in each round.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=3_600))]
    pub(super) seconds: u32,
}

impl Load {
    /// The first records, which count for nothing: statements are prepared and connections opened.
    fn warm_up(self) -> usize {
        1 + self.rate as usize / 5
    }

    /// The number of records that a side appends.
    pub(super) fn records(self) -> usize {
        self.warm_up() + self.rate as usize * self.seconds as usize
    }

    /// Appends records by their numbers, and returns the sorted times from the return of each
    /// append to the arrival of its record. Up to `at_once` records that are due are appended
    /// together, so that the rate does not depend on how long an append takes.
    pub(super) fn measure(
        self,
        at_once: usize,
        arrivals: &Arrivals,
        mut append: impl FnMut(Range<usize>) -> Result<()>,
    ) -> Result<Vec<Duration>> {
        append(0..1)?;
        let mut appended = vec![Instant::now()];
        // The consumer has started when its first record arrives.
        arrivals.wait_for(1)?;
        let interval = Duration::from_secs(1) / self.rate;
        let begun = Instant::now();
        let records = self.records();
        while appended.len() < records {
            let next = appended.len();
            thread::sleep((begun + interval * next as u32).saturating_duration_since(Instant::now()));
            let due = (begun.elapsed().as_nanos() / interval.as_nanos()) as usize;
            let end = (due + 1).min(records).min(next.saturating_add(at_once)).max(next + 1);
            append(next..end)?;
            appended.resize(end, Instant::now());
        }
        self.check_rate(begun.elapsed())?;
        let arrived = arrivals.wait_for(records)?;
        let times = arrived.iter().zip(&appended).skip(self.warm_up());
        let times = times.map(|(arrival, append)| arrival.saturating_duration_since(*append));
        let mut times: Vec<_> = times.collect();
        times.sort();
        Ok(times)
    }

    /// Allows for a pause of the machine.
    fn check_rate(self, took: Duration) -> Result<()> {
        let planned = Duration::from_secs(1) / self.rate * self.records() as u32;
        if took <= planned.mul_f64(1.25) + Duration::from_secs(1) {
            return Ok(());
        }
        let rate = self.records() as f64 / took.as_secs_f64();
        Err(format!("only {rate:.0} records/s were appended: choose a lower rate").into())
    }
}

/// When each record first arrived.
#[derive(Clone)]
pub(super) struct Arrivals(Arc<(Mutex<Vec<Option<Instant>>>, Condvar)>);

impl Arrivals {
    pub(super) fn new(records: usize) -> Self {
        Self(Arc::new((Mutex::new(vec![None; records]), Condvar::new())))
    }

    pub(super) fn note(&self, numbers: impl IntoIterator<Item = usize>) {
        let now = Instant::now();
        let (times, changed) = &*self.0;
        let mut times = times.lock().unwrap_or_else(PoisonError::into_inner);
        for number in numbers {
            times[number].get_or_insert(now);
        }
        changed.notify_all();
    }

    /// Waits until that many records have arrived, in the order of their numbers.
    fn wait_for(&self, count: usize) -> Result<Vec<Instant>> {
        let (times, changed) = &*self.0;
        let times = times.lock().unwrap_or_else(PoisonError::into_inner);
        let is_missing = |times: &mut Vec<Option<Instant>>| times[..count].contains(&None);
        let waited = changed.wait_timeout_while(times, PATIENCE, is_missing);
        let (times, _) = waited.unwrap_or_else(PoisonError::into_inner);
        let arrived: Option<Vec<Instant>> = times[..count].iter().copied().collect();
        arrived.ok_or_else(|| "not every record arrived: the measurement is invalid".into())
    }
}

/// A payload that begins with the record's number.
pub(super) fn payload(number: usize) -> [u8; PAYLOAD.len()] {
    let mut payload = PAYLOAD;
    payload[..8].copy_from_slice(&(number as u64).to_be_bytes());
    payload
}

/// The number that [`payload`] has written.
pub(super) fn number(payload: &[u8]) -> usize {
    let mut number = [0; 8];
    number.copy_from_slice(&payload[..8]);
    u64::from_be_bytes(number) as usize
}

/// The percentiles that are shown, in thousandths.
const PERCENTILES: [usize; 3] = [500, 990, 999];

/// Where p99 is among them.
const P99: usize = 1;

/// Runs both sides in turn, and prints the medians of their percentiles over the rounds. The sides
/// return sorted times.
pub(super) fn compare(
    rounds: u32,
    by_hand: impl Fn(&str) -> Result<Vec<Duration>>,
    ours: impl Fn(&str) -> Result<Vec<Duration>>,
) -> Result<()> {
    println!(
        "medians over the rounds, in ms; the ratio is ours / by hand, of p99, round by round; below 1, ours is faster"
    );
    println!("| by hand, p50 | p99 | p99.9 | ours, p50 | p99 | p99.9 | ratio of p99, median | min | max |");
    println!("|---:|---:|---:|---:|---:|---:|---:|---:|---:|");
    let mut sides = [const { [const { Vec::new() }; PERCENTILES.len()] }; 2];
    let mut ratios = Vec::new();
    for round in 0..rounds {
        let by_hand = || by_hand(&format!("hand-{round}"));
        let ours = || ours(&format!("ours-{round}"));
        let (by_hand, ours) = in_turn(round as usize, by_hand, ours)?;
        let found = [by_hand, ours].map(|times| PERCENTILES.map(|per_mille| percentile(&times, per_mille)));
        ratios.push(found[1][P99] / found[0][P99]);
        for (figures, found) in sides.iter_mut().flatten().zip(found.as_flattened()) {
            figures.push(*found);
        }
    }
    let figures = sides
        .iter_mut()
        .flatten()
        .map(|figures| format!("{:.2}", median(figures)));
    let figures: Vec<String> = figures.collect();
    let (ratio, min, max) = spread(&mut ratios);
    println!("| {} | {ratio:.2} | {min:.2} | {max:.2} |", figures.join(" | "));
    Ok(())
}

/// In milliseconds, of sorted times.
fn percentile(times: &[Duration], per_mille: usize) -> f64 {
    times[(times.len() * per_mille).div_ceil(1_000) - 1].as_secs_f64() * 1_000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    const FAST: Load = Load {
        rate: 1_000,
        seconds: 1,
    };

    #[test]
    fn a_percentile_is_the_least_time_that_so_many_records_did_not_exceed() {
        let times: Vec<_> = (1..=1_000).map(Duration::from_millis).collect();
        assert_eq!(
            PERCENTILES.map(|per_mille| percentile(&times, per_mille)),
            [500.0, 990.0, 999.0]
        );
        let times: Vec<_> = (1..=10).map(Duration::from_millis).collect();
        assert_eq!(
            PERCENTILES.map(|per_mille| percentile(&times, per_mille)),
            [5.0, 10.0, 10.0]
        );
        assert_eq!(percentile(&times[..1], 500), 1.0);
    }

    #[test]
    fn each_record_is_appended_once_in_order_and_timed_after_the_warm_up() -> Result<()> {
        let arrivals = Arrivals::new(FAST.records());
        let mut next = 0;
        let times = FAST.measure(usize::MAX, &arrivals, |numbers| {
            assert_eq!(numbers.start, next);
            next = numbers.end;
            arrivals.note(numbers);
            Ok(())
        })?;
        assert_eq!((next, times.len()), (FAST.records(), 1_000));
        assert!(times.is_sorted());
        Ok(())
    }

    #[test]
    fn a_rate_that_was_not_reached_is_an_error() {
        assert!(FAST.check_rate(Duration::from_millis(2_400)).is_ok());
        let refused = FAST
            .check_rate(Duration::from_secs(3))
            .err()
            .map(|error| error.to_string());
        assert!(refused.is_some_and(|refused| refused.contains("lower rate")));
    }

    #[test]
    fn the_first_arrival_of_a_record_counts() -> Result<()> {
        let arrivals = Arrivals::new(2);
        arrivals.note([number(&payload(0))]);
        let first = arrivals.wait_for(1)?[0];
        arrivals.note([0, 1]);
        assert_eq!(arrivals.wait_for(2)?[0], first);
        Ok(())
    }
}
