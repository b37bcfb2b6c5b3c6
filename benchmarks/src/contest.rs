//! Two sides that do the same work, alternately in one process.

use std::time::Duration;

use essentially_once::NewRecord;

use crate::{
    Result,
    batch::{Batch, DEFAULTS},
    results::{Cell, Results, Round},
};

/// One measured row of the table.
pub(crate) struct Row {
    pub(crate) label: String,
    /// Chosen so that a round takes about a second.
    pub(crate) records: u64,
    pub(crate) batch: Batch,
    /// What each record holds.
    pub(crate) payload: &'static [u8],
}

impl Row {
    /// The records, as the library appends them.
    pub(crate) fn fill(&self) -> Vec<NewRecord> {
        vec![NewRecord::new(self.payload); self.records as usize]
    }
}

/// The same work on both sides. Each name is used once.
pub(crate) trait Contest {
    /// The rows: one per batch size, or others.
    fn rows(&self, rules: &Rules<'_>) -> Vec<Row>;

    /// The loop that a user writes without a library.
    fn by_hand(&self, name: &str, row: &Row) -> Result<Duration>;

    /// The same work through the library.
    fn ours(&self, name: &str, row: &Row) -> Result<Duration>;
}

/// One row per batch size, with as many records as the backend handles in about a second.
pub(crate) fn by_batch(rules: &Rules<'_>, records: impl Fn(usize) -> u64) -> Vec<Row> {
    let row = |batch: &Batch| Row {
        label: match batch {
            Batch::Records(records) => format!("batch {records}"),
            Batch::Defaults => DEFAULTS.into(),
        },
        records: records(batch.size()),
        batch: *batch,
        payload: rules.payload,
    };
    rules.batches.iter().map(row).collect()
}

/// Runs both sides. The first one finds a quieter disk, so it is another one in each round.
pub(crate) fn in_turn<T>(
    round: usize,
    by_hand: impl FnOnce() -> Result<T>,
    ours: impl FnOnce() -> Result<T>,
) -> Result<(T, T)> {
    if round.is_multiple_of(2) {
        let by_hand = by_hand()?;
        Ok((by_hand, ours()?))
    } else {
        let ours = ours()?;
        Ok((by_hand()?, ours))
    }
}

/// How a contest is measured.
pub(crate) struct Rules<'a> {
    pub(crate) rounds: u32,
    pub(crate) batches: &'a [Batch],
    pub(crate) payload: &'static [u8],
    /// By how much to divide the number of records.
    pub(crate) divisor: u64,
}

/// Measures a contest and prints its table. Rounds that `results` holds are not run again. Returns
/// the lowest median ratio.
pub(crate) fn measure(name: &str, contest: &dyn Contest, rules: &Rules<'_>, results: &mut Results) -> Result<f64> {
    println!("{name}");
    println!();
    println!("| | rounds | by hand, records/s | ours, records/s | ratio, median | min | max |");
    println!("|---|---:|---:|---:|---:|---:|---:|");
    let mut worst = f64::INFINITY;
    for (number, mut row) in contest.rows(rules).into_iter().enumerate() {
        row.records = (row.records / rules.divisor).max(row.batch.size() as u64);
        let cell = Cell::new(name, &row);
        for round in results.rounds(&cell).len()..rules.rounds as usize {
            let by_hand = || contest.by_hand(&format!("hand-{number}-{round}"), &row);
            let ours = || contest.ours(&format!("ours-{number}-{round}"), &row);
            let (by_hand, ours) = in_turn(round, by_hand, ours)?;
            results.add(&cell, Round::new(by_hand, ours))?;
        }
        let summary = results.summary(&cell);
        worst = worst.min(summary.ratio);
        println!(
            "| {} | {} | {:.0} | {:.0} | {:.2} | {:.2} | {:.2} |",
            row.label,
            results.rounds(&cell).len(),
            summary.by_hand,
            summary.ours,
            summary.ratio,
            summary.min,
            summary.max,
        );
    }
    println!();
    Ok(worst)
}
