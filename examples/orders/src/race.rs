//! Runs one delivery: writes the log, starts workers and kills them until the log is drained, then
//! counts. Retries dead letters with a mended parser.

use std::{
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    process::{Child, ChildStdout, Command, Stdio},
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use essentially_once::{Log, NewRecord};
use indicatif::{ProgressBar, ProgressStyle};

use crate::{
    Failure,
    backend::Backend,
    delivery::Delivery,
    input::Input,
    order::{self, Format},
    plan::Kill,
    tally::{self, Mended, Tally},
    worker,
};

/// The lines before the first order.
const HEADER_LINES: usize = 1;

pub(crate) struct Race<'a> {
    pub(crate) delivery: Delivery,
    pub(crate) backend: Backend,
    pub(crate) input: &'a Input,
    pub(crate) kills: &'a [Kill],
    pub(crate) max_batch: u32,
}

impl Race<'_> {
    pub(crate) fn run(&self) -> Result<Tally, Failure> {
        let runtime = crate::runtime()?;
        runtime.block_on(self.write_log())?;
        let bar = self.bar();
        let started = Instant::now();
        let kills = self.kill_until_drained(&bar)?;
        let seconds = started.elapsed().as_secs_f64();
        bar.finish();
        let tally = runtime.block_on(self.count(kills, seconds))?;
        match self.input.lines.len() {
            lines if lines as u64 == tally.orders => Ok(tally),
            lines => Err(format!("{}: the log holds {} of {lines} orders", self.delivery, tally.orders).into()),
        }
    }

    /// Retries every dead letter, with a worker that has a mended parser.
    pub(crate) fn mend(&self) -> Result<Mended, Failure> {
        let runtime = crate::runtime()?;
        let started = Instant::now();
        let retried = runtime.block_on(self.backend.retry_letters())?;
        let mended = Format {
            mended: true,
            ..self.input.format
        };
        self.one_life(mended, None, &ProgressBar::hidden())?;
        let seconds = started.elapsed().as_secs_f64();
        let tally = runtime.block_on(self.count(0, seconds))?;
        Ok(Mended { retried, tally })
    }

    async fn count(&self, kills: u64, seconds: f64) -> Result<Tally, Failure> {
        tally::count(&self.backend, self.delivery, self.input.format, kills, seconds).await
    }

    async fn write_log(&self) -> Result<(), Failure> {
        const CHUNK: usize = 1_000;
        let log = self.backend.open_log().await?;
        self.backend.create_shop()?;
        for (chunk, lines) in self.input.lines.chunks(CHUNK).enumerate() {
            let first = chunk * CHUNK + HEADER_LINES + 1;
            let records: Vec<NewRecord> = lines
                .iter()
                .zip(first..)
                .map(|(line, number)| record(line, number))
                .collect();
            log.append(&records).await?;
        }
        Ok(())
    }

    /// Returns how many workers were killed. Each planned kill is tried a few times, and the last
    /// worker is never killed, so this ends.
    fn kill_until_drained(&self, bar: &ProgressBar) -> Result<u64, Failure> {
        const TRIES: usize = 3;
        const AT_ONCE: Kill = Kill {
            after_line: 0,
            delay: Duration::ZERO,
        };
        let format = self.input.format;
        let mut killed = 0;
        for kill in self.kills {
            // If a worker finishes before its kill, its successor is killed at its start instead.
            for kill in [*kill].into_iter().chain([AT_ONCE; TRIES]) {
                if let End::Killed = self.one_life(format, Some(kill), bar)? {
                    killed += 1;
                    bar.set_message(format!("{killed} kills"));
                    break;
                }
            }
        }
        self.one_life(format, None, bar)?;
        Ok(killed)
    }

    fn one_life(&self, format: Format, kill: Option<Kill>, bar: &ProgressBar) -> Result<End, Failure> {
        let mut worker = self.start_worker(format)?;
        let alive = match kill {
            Some(kill) => self.follow(&mut worker, kill.after_line, bar)?,
            None => self.follow(&mut worker, usize::MAX, bar)?,
        };
        if let (true, Some(kill)) = (alive, kill) {
            // A worker that had to wait meanwhile would always be killed at the same place.
            worker.give_slack();
            thread::sleep(kill.delay);
            // An error means that the worker just ended on its own. Its status shows it.
            let _ = worker.process.kill();
        }
        let mut words = String::new();
        if let Some(mut stderr) = worker.process.stderr.take() {
            stderr.read_to_string(&mut words)?;
        }
        let status = worker.process.wait()?;
        // A killed worker writes nothing to stderr.
        match (status.success(), alive && words.is_empty()) {
            (true, _) => Ok(End::Drained),
            (false, true) => Ok(End::Killed),
            (false, false) => Err(format!(
                "the {} worker ended on its own, {status}: {}",
                self.delivery,
                words.trim_end()
            )
            .into()),
        }
    }

    /// Reads the worker's reports until it is past `line`. Returns `false` if the worker ended
    /// before.
    fn follow(&self, worker: &mut Worker, line: usize, bar: &ProgressBar) -> Result<bool, Failure> {
        const LONGEST_SILENCE: Duration = Duration::from_secs(60);
        let mut reached = 0;
        for handled in 1.. {
            if reached >= line {
                break;
            }
            let reported = match worker.lines.recv_timeout(LONGEST_SILENCE) {
                Ok(reported) => reported?,
                Err(RecvTimeoutError::Disconnected) => return Ok(false),
                Err(RecvTimeoutError::Timeout) => {
                    return Err(format!("the {} worker hangs: it made no progress for a minute", self.delivery).into());
                }
            };
            reached = reported.parse::<usize>()?.saturating_sub(HEADER_LINES);
            bar.set_position(reached as u64);
            if handled % self.leash() == 0 {
                worker.give_slack();
            }
        }
        Ok(true)
    }

    fn start_worker(&self, format: Format) -> Result<Worker, Failure> {
        let mut process = Command::new(std::env::current_exe()?)
            .arg("worker")
            .arg(&self.backend.database)
            .arg(self.backend.consumer.as_str())
            .arg(self.delivery.to_string())
            .args([format.fields, format.freight].map(|number| number.to_string()))
            .arg(format.mended.to_string())
            .arg(self.max_batch.to_string())
            .arg(self.leash().to_string())
            .env(worker::LOG_VARIABLE, self.backend.log.secret())
            .env(worker::STORE_VARIABLE, self.backend.store.secret())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| format!("cannot start the worker: {error}"))?;
        let stdout = process.stdout.take().ok_or("the worker has no stdout")?;
        Ok(Worker {
            process,
            lines: listen(stdout),
        })
    }

    /// How many lines the worker may be ahead of its parent: more than it handles within a kill's
    /// delay. An odd number keeps the worker's waits from coinciding with the ends of batches.
    fn leash(&self) -> u64 {
        2 * u64::from(self.max_batch) + 101
    }

    fn bar(&self) -> ProgressBar {
        let style = ProgressStyle::with_template("{prefix:16} {bar:40} {pos}/{len} {msg}");
        ProgressBar::new(self.input.lines.len() as u64)
            .with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
            .with_prefix(self.delivery.to_string())
    }
}

enum End {
    Drained,
    Killed,
}

struct Worker {
    process: Child,
    lines: mpsc::Receiver<io::Result<String>>,
}

impl Worker {
    /// Lets the worker continue for the length of its leash.
    fn give_slack(&mut self) {
        if let Some(stdin) = &mut self.process.stdin {
            // An error means that the worker just ended. It then sends no more lines.
            let _ = stdin.write_all(b".");
        }
    }
}

/// An error here must not leave the worker behind.
impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Reads on a separate thread, so that waiting for the next line can time out.
fn listen(stdout: ChildStdout) -> mpsc::Receiver<io::Result<String>> {
    let (sender, lines) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(stdout).lines() {
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    lines
}

fn record(line: &str, number: usize) -> NewRecord {
    let record = NewRecord::new(line.to_owned()).header("line", number.to_string());
    match order::key(line) {
        Some(key) => record.key(key),
        None => record,
    }
}
