//! What was measured, round by round, in a file that a later run continues.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{ErrorKind, Write as _},
    path::Path,
    time::Duration,
};

use serde::{Deserialize, Serialize};

use crate::{Result, contest::Row};

/// One row of one contest.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct Cell {
    pub(crate) contest: String,
    pub(crate) row: String,
    pub(crate) batch: usize,
    /// Rows with other numbers of records are others.
    pub(crate) records: u64,
}

impl Cell {
    pub(crate) fn new(contest: &str, row: &Row) -> Self {
        Self {
            contest: contest.into(),
            row: row.label.clone(),
            batch: row.batch.size(),
            records: row.records,
        }
    }
}

/// The times of both sides, in seconds.
#[derive(Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Round {
    by_hand: f64,
    ours: f64,
}

impl Round {
    pub(crate) fn new(by_hand: Duration, ours: Duration) -> Self {
        Self {
            by_hand: by_hand.as_secs_f64(),
            ours: ours.as_secs_f64(),
        }
    }
}

/// Medians of a cell's rounds.
pub(crate) struct Summary {
    /// Records per second.
    pub(crate) by_hand: f64,
    /// Records per second.
    pub(crate) ours: f64,
    /// Ours / by hand, round by round.
    pub(crate) ratio: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
}

#[derive(Serialize, Deserialize)]
struct Line {
    #[serde(flatten)]
    cell: Cell,
    #[serde(flatten)]
    round: Round,
}

#[derive(Default)]
pub(crate) struct Results {
    cells: BTreeMap<Cell, Vec<Round>>,
    file: Option<File>,
}

impl Results {
    /// Reads the file, if there is one, and adds to it from now on.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let mut results = Self::read(path)?;
        let file = File::options().create(true).append(true).open(path);
        results.file = Some(file.map_err(|error| format!("cannot write {}: {error}", path.display()))?);
        Ok(results)
    }

    /// Reads the file. A missing one holds nothing.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let text = match fs::read_to_string(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => String::new(),
            text => text.map_err(|error| format!("cannot read {}: {error}", path.display()))?,
        };
        let mut results = Self::default();
        for (number, line) in text.lines().enumerate() {
            let line: Line = serde_json::from_str(line)
                .map_err(|error| format!("{}:{} is no result: {error}", path.display(), number + 1))?;
            results.cells.entry(line.cell).or_default().push(line.round);
        }
        Ok(results)
    }

    pub(crate) fn rounds(&self, cell: &Cell) -> &[Round] {
        self.cells.get(cell).map_or(&[], |rounds| rounds)
    }

    pub(crate) fn cells(&self) -> impl Iterator<Item = &Cell> {
        self.cells.keys()
    }

    pub(crate) fn add(&mut self, cell: &Cell, round: Round) -> Result<()> {
        if let Some(file) = &mut self.file {
            let line = Line {
                cell: cell.clone(),
                round,
            };
            let mut line = serde_json::to_string(&line)?;
            line.push('\n');
            file.write_all(line.as_bytes())?;
        }
        self.cells.entry(cell.clone()).or_default().push(round);
        Ok(())
    }

    /// # Panics
    /// If the cell has no rounds.
    pub(crate) fn summary(&self, cell: &Cell) -> Summary {
        let rounds = self.rounds(cell);
        let sorted = |value: &dyn Fn(&Round) -> f64| {
            let mut values: Vec<f64> = rounds.iter().map(value).collect();
            values.sort_by(f64::total_cmp);
            values
        };
        let median = |values: &[f64]| values[values.len() / 2];
        let rate = |seconds: &dyn Fn(&Round) -> f64| median(&sorted(&|round| cell.records as f64 / seconds(round)));
        let ratios = sorted(&|round| round.by_hand / round.ours);
        Summary {
            by_hand: rate(&|round| round.by_hand),
            ours: rate(&|round| round.ours),
            ratio: median(&ratios),
            min: ratios[0],
            max: ratios[ratios.len() - 1],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::Batch;

    fn cell() -> Cell {
        let row = Row {
            label: "batch 10".into(),
            records: 1_000,
            batch: Batch::Records(10),
            payload: b"x",
        };
        Cell::new("SQLite", &row)
    }

    #[test]
    fn a_later_run_goes_on_where_the_file_ends() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("rounds.jsonl");
        for seconds in [2, 1, 4] {
            let mut results = Results::open(&path)?;
            let (by_hand, ours) = (Duration::from_secs(seconds), Duration::from_secs(1));
            results.add(&cell(), Round::new(by_hand, ours))?;
        }
        let results = Results::read(&path)?;
        assert_eq!(results.rounds(&cell()).len(), 3);
        let summary = results.summary(&cell());
        assert_eq!((summary.min, summary.ratio, summary.max), (1.0, 2.0, 4.0));
        assert_eq!((summary.by_hand, summary.ours), (500.0, 1_000.0));
        Ok(())
    }

    #[test]
    fn a_file_that_holds_something_else_is_refused_by_line() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("rounds.jsonl");
        let mut results = Results::open(&path)?;
        results.add(&cell(), Round::new(Duration::from_secs(1), Duration::from_secs(1)))?;
        drop(results);
        fs::write(&path, fs::read_to_string(&path)? + "{}\n")?;
        let refused = Results::open(&path).err().map(|error| error.to_string());
        assert!(refused.is_some_and(|error| error.contains("rounds.jsonl:2 is no result")));
        Ok(())
    }
}
