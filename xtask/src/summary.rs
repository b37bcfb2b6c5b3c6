//! Counts tests while they run, and summarizes them at the end.

use std::{
    ffi::OsString,
    fs,
    io::{BufRead, BufReader, Write},
    path::PathBuf,
    process::Stdio,
    time::{Duration, Instant},
};

use crate::{Done, Variables, command};

/// Names the file to which each case of a `Suite` appends its seconds and its name.
const TIMES: &str = "ESSENTIALLY_ONCE_TEST_TIMES";

/// How many of the slowest cases are shown.
const SLOWEST: usize = 20;

/// How many lines of what a failed test has printed are shown again.
const LINES: usize = 30;

/// Counts the results that test binaries print.
pub(crate) struct Summary {
    passed: u64,
    failed: u64,
    skipped: u64,
    /// Names of failed tests, and commands that failed.
    failures: Vec<String>,
    /// What failed tests have printed.
    details: Vec<Vec<String>>,
    /// Whether a line belongs to the last of them.
    is_in_detail: bool,
    times: PathBuf,
    /// The commands, and how long they took.
    commands: Vec<(String, Duration)>,
}

impl Summary {
    pub(crate) fn new() -> Self {
        let times = std::env::temp_dir().join(format!("essentially-once-test-times-{}", std::process::id()));
        Self {
            passed: 0,
            failed: 0,
            skipped: 0,
            failures: Vec::new(),
            details: Vec::new(),
            is_in_detail: false,
            times,
            commands: Vec::new(),
        }
    }

    /// The variables that make tests report their times.
    pub(crate) fn variables(&self) -> Vec<(&'static str, OsString)> {
        vec![(TIMES, self.times.clone().into())]
    }

    /// Runs cargo, passes its output on, and counts its tests.
    pub(crate) fn run(&mut self, arguments: &[&str], variables: &Variables) {
        self.run_and(arguments, variables, || {});
    }

    /// Does the same, and calls `begun` at the first line of the output.
    pub(crate) fn run_and(&mut self, arguments: &[&str], variables: &Variables, begun: impl FnOnce()) {
        let started = Instant::now();
        let status = command(arguments, variables)
            .stdout(Stdio::piped())
            .spawn()
            .and_then(|mut child| {
                if let Some(output) = child.stdout.take() {
                    self.read(BufReader::new(output), std::io::stdout(), begun);
                }
                child.wait()
            });
        let shown = format!("cargo {}", arguments.join(" "));
        self.commands.push((shown.clone(), started.elapsed()));
        match status {
            Ok(status) if status.success() => {}
            Ok(status) => self.failures.push(format!("`{shown}` failed: {status}")),
            Err(error) => self.failures.push(format!("`{shown}` cannot start: {error}")),
        }
    }

    /// Adds what another one has run.
    pub(crate) fn add(&mut self, other: Option<Self>) {
        match other {
            None => self.failures.push("what runs beside the tests has panicked".into()),
            Some(other) => {
                self.failures.extend(other.failures);
                self.commands.extend(other.commands);
            }
        }
    }

    /// Counts the lines of `output`, and passes them on.
    fn read(&mut self, mut output: impl BufRead, mut shown: impl Write, begun: impl FnOnce()) {
        let mut line = Vec::new();
        let mut begun = Some(begun);
        while output.read_until(b'\n', &mut line).is_ok_and(|read| read > 0) {
            if let Some(begun) = begun.take() {
                begun();
            }
            // A closed output is not a reason to stop.
            let _ = shown.write_all(&line);
            self.take(&String::from_utf8_lossy(&line));
            line.clear();
        }
    }

    /// Counts a line such as `test result: FAILED. 4 passed; 1 failed; 2 ignored; 0 measured; 0
    /// filtered out`, and notes a line such as `test store::late_writer_is_fenced ... FAILED`.
    fn take(&mut self, line: &str) {
        self.take_detail(line.trim_end());
        if let Some(result) = line.strip_prefix("test result: ") {
            let counts = result.split_once(". ").map_or("", |(_, counts)| counts);
            for count in counts.split("; ") {
                match count.trim().split_once(' ') {
                    Some((number, "passed")) => self.passed += number.parse::<u64>().unwrap_or(0),
                    Some((number, "failed")) => self.failed += number.parse::<u64>().unwrap_or(0),
                    Some((number, "ignored")) => self.skipped += number.parse::<u64>().unwrap_or(0),
                    _ => {}
                }
            }
        } else if let Some(test) = line.strip_prefix("test ")
            && let Some(name) = test.trim_end().strip_suffix("... FAILED")
        {
            self.failures.push(name.trim().to_owned());
        }
    }

    /// Keeps a block that begins with a line such as `---- store::late_writer_is_fenced ----` and
    /// ends where the failures are listed.
    fn take_detail(&mut self, line: &str) {
        if line.starts_with("---- ") && line.ends_with(" ----") {
            self.details.push(vec![line.to_owned()]);
            self.is_in_detail = true;
        } else if line == "failures:" || line.starts_with("test result: ") {
            self.is_in_detail = false;
        } else if self.is_in_detail
            && let Some(detail) = self.details.last_mut()
            && detail.len() < LINES
        {
            detail.push(line.to_owned());
        }
    }

    /// Shows the slowest cases, the failures and the counts.
    pub(crate) fn finish(self) -> Done {
        let mut times: Vec<(f64, String)> = fs::read_to_string(&self.times)
            .unwrap_or_default()
            .lines()
            .filter_map(|line| {
                let (seconds, name) = line.split_once(' ')?;
                Some((seconds.parse().ok()?, name.to_owned()))
            })
            .collect();
        // The file is only temporary.
        let _ = fs::remove_file(&self.times);
        times.sort_by(|(one, _), (other, _)| other.total_cmp(one));
        let mut out = std::io::stdout().lock();
        let mut show = |line: String| drop(writeln!(out, "{line}"));
        show(format!(
            "\nThe {} slowest cases of test suites, in seconds:",
            times.len().min(SLOWEST)
        ));
        for (seconds, name) in times.iter().take(SLOWEST) {
            show(format!("{seconds:8.1}  {name}"));
        }
        show("\nThe commands, in seconds:".into());
        for (shown, took) in &self.commands {
            show(format!("{:8}  {shown}", took.as_secs()));
        }
        if !self.failures.is_empty() {
            show("\nFailed:".into());
        }
        for failure in &self.failures {
            show(format!("  {failure}"));
        }
        for detail in &self.details {
            show(format!("\n{}", detail.join("\n").trim_end()));
        }
        let Self {
            passed,
            failed,
            skipped,
            ..
        } = self;
        show(format!("\n{passed} passed, {failed} failed, {skipped} skipped"));
        if self.failures.is_empty() { Ok(()) } else { Err(1) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_counted_and_failures_named() {
        let mut summary = Summary::new();
        let output = "running 3 tests\n\
             test a::works ... ok\n\
             test [why it is slow] b::fails   ... FAILED\n\
             failures:\n\
             ---- b::fails ----\n\
             expected 3, found 4\n\
             \n\
             failures:\n\
             \x20   b::fails\n\
             test result: FAILED. 4 passed; 1 failed; 2 ignored; 0 measured; 0 filtered out; finished in 0.00s\n\
             test result: ok. 6 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out\n";
        let mut shown = Vec::new();
        let mut begun = 0;
        summary.read(output.as_bytes(), &mut shown, || begun += 1);
        assert_eq!(begun, 1);
        assert_eq!(shown, output.as_bytes());
        assert_eq!((summary.passed, summary.failed, summary.skipped), (10, 1, 2));
        assert_eq!(summary.failures, ["[why it is slow] b::fails"]);
        assert_eq!(summary.details, [["---- b::fails ----", "expected 3, found 4", ""]]);
    }
}
