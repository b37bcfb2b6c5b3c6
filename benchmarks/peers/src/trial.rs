//! One run of a contestant: starts its processes, disturbs them, and counts the records.

use std::{
    fs::File,
    io::{BufRead, BufReader},
    os::unix::process::ExitStatusExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    thread::sleep,
    time::{Duration, Instant, SystemTime},
};

use rustix::process::{Pid, Signal, kill_process};

use crate::{
    Load, Result,
    contestants::Contestant,
    judge::{self, Judge},
    places::Place,
};

/// A contestant on fresh servers.
pub(crate) struct Trial<'a> {
    program: PathBuf,
    way: &'a str,
    bus: Place,
    store: Option<Place>,
    judge: Box<dyn Judge>,
    errors: PathBuf,
}

/// The result of a run whose workers were disturbed.
pub(crate) struct Outcome {
    pub(crate) p50: Duration,
    pub(crate) p99: Duration,
    pub(crate) lost: u64,
    pub(crate) doubled: u64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Disturbance {
    /// One worker, which is killed and started again.
    Kill,
    /// Two workers, one of which is frozen for longer than the other waits for it.
    Freeze,
}

/// How long nothing may be counted before the rest is given up as lost.
const GIVE_UP: Duration = Duration::from_secs(60);

/// How long to watch for effects of instances that others have replaced.
const AFTERMATH: Duration = Duration::from_secs(3);

impl<'a> Trial<'a> {
    /// Starts servers. Programs are in `programs`, and write their errors to `errors`.
    pub(crate) fn start(contestant: &'a Contestant, programs: &Path, errors: PathBuf) -> Result<Self> {
        let bus = Place::start(contestant.bus)?;
        let store = match contestant.store == contestant.bus {
            true => None,
            false => Some(Place::start(contestant.store)?),
        };
        let trial = Self {
            program: programs.join(contestant.program),
            way: contestant.way,
            judge: judge::open(store.as_ref().unwrap_or(&bus))?,
            bus,
            store,
            errors,
        };
        trial.finish(trial.run(&["prepare"])?)?;
        Ok(trial)
    }

    fn run(&self, arguments: &[&str]) -> Result<Program> {
        let mut command = Command::new(&self.program);
        command
            .args(arguments)
            .args(["--bus", &self.bus.url, "--way", self.way]);
        if let Some(store) = &self.store {
            command.args(["--store", &store.url]);
        }
        let errors = File::options().create(true).append(true).open(&self.errors)?;
        let child = command.stdout(Stdio::piped()).stderr(errors).spawn();
        let child = child.map_err(|error| format!("{} does not start: {error}", self.program.display()))?;
        Ok(Program(child))
    }

    fn finish(&self, mut program: Program) -> Result<()> {
        self.check(program.0.wait()?)
    }

    fn check(&self, status: ExitStatus) -> Result<()> {
        if status.success() {
            return Ok(());
        }
        let (program, errors) = (self.program.display(), self.errors.display());
        Err(format!("{program} ended with {status}: see {errors}").into())
    }

    fn send(&self, records: u64, per_second: Option<u64>) -> Result<Program> {
        let (records, rate) = (records.to_string(), per_second.unwrap_or_default().to_string());
        let mut arguments = vec!["send", "--records", &records];
        if per_second.is_some() {
            arguments.extend(["--per-second", &rate]);
        }
        self.run(&arguments)
    }

    fn work(&self, instance: &str, alone: bool, load: &Load, pause: u64) -> Result<Program> {
        let (batch, pause, patience) = (load.batch.to_string(), pause.to_string(), load.patience.to_string());
        let mut arguments = vec![
            "work",
            "--instance",
            instance,
            "--batch",
            &batch,
            "--pause",
            &pause,
            "--patience",
            &patience,
        ];
        if alone {
            arguments.push("--alone");
        }
        let mut worker = self.run(&arguments)?;
        // It prints nothing that matters, and must not wait until somebody reads it.
        worker.0.stdout = None;
        Ok(worker)
    }

    /// How many records per second an undisturbed worker counts, if they wait for it.
    pub(crate) fn drain(&mut self, load: &Load) -> Result<f64> {
        self.finish(self.send(load.records, None)?)?;
        let mut worker = self.work("a", true, load, 0)?;
        let (mut first, mut quiet) = (None, Instant::now());
        let mut last = 0;
        loop {
            let counted = self.judge.counted()?;
            let now = Instant::now();
            if counted > last {
                (last, quiet) = (counted, now);
            }
            match first {
                None if counted > 0 => first = Some((now, counted)),
                Some((began, at)) if counted >= load.records || began.elapsed() >= load.time => {
                    return Ok((counted - at) as f64 / began.elapsed().as_secs_f64());
                }
                _ if quiet.elapsed() > GIVE_UP => return Err("the worker counts nothing".into()),
                _ => {}
            }
            if let Some(status) = worker.0.try_wait()? {
                self.check(status)?;
                return Err(format!("{} ended", self.program.display()).into());
            }
            sleep(Duration::from_millis(1));
        }
    }

    /// Sends at a steady rate while workers are disturbed, and counts each record.
    pub(crate) fn disturb(&mut self, load: &Load, disturbance: Disturbance) -> Result<Outcome> {
        let names: &[&str] = match disturbance {
            Disturbance::Kill => &["a"],
            Disturbance::Freeze => &["a", "b"],
        };
        let start = |name: &str| self.work(name, names.len() == 1, load, load.pause);
        let mut workers = names.iter().map(|name| start(name)).collect::<Result<Vec<_>>>()?;
        let records = load.per_second * load.time.as_secs();
        let mut sender = self.send(records, Some(load.per_second))?;
        let started = started(&mut sender)?;
        let mut watch = Watch::new(started, load.per_second, records);
        let mut plan = Plan::new(disturbance, load);
        let (mut sent, mut ended) = (false, 0);
        while !watch.is_over(sent) {
            watch.look(&mut *self.judge)?;
            plan.act(&workers, started);
            for (worker, name) in workers.iter_mut().zip(names) {
                // Whatever supervises a service starts it again.
                if let Some(status) = worker.0.try_wait()? {
                    ended += u32::from(status.signal().is_none());
                    *worker = self.work(name, names.len() == 1, load, load.pause)?;
                }
            }
            if !sent && let Some(status) = sender.0.try_wait()? {
                sent = true;
                self.check(status)?;
            }
            sleep(Duration::from_millis(1));
        }
        if plan.left > 0 {
            return Err(format!("{} disturbances were not over after all records", plan.left).into());
        }
        if ended > 0 {
            eprintln!(
                "{} ended {ended} times by itself: see {}",
                self.program.display(),
                self.errors.display()
            );
        }
        for worker in &workers {
            worker.signal(Signal::CONT);
        }
        sleep(AFTERMATH);
        let tally = self.judge.tally()?;
        Ok(watch.outcome(records - tally.counted, tally.doubled))
    }
}

/// When the sender's first record was due.
fn started(sender: &mut Program) -> Result<SystemTime> {
    let output = sender.0.stdout.take().ok_or("the sender has no output")?;
    let mut line = String::new();
    BufReader::new(output).read_line(&mut line)?;
    let micros = line.trim().parse().map_err(|_| "the sender did not start")?;
    Ok(SystemTime::UNIX_EPOCH + Duration::from_micros(micros))
}

/// A process that is killed when it is dropped.
struct Program(Child);

impl Program {
    fn signal(&self, signal: Signal) {
        // It may have just ended.
        let _ = kill_process(Pid::from_child(&self.0), signal);
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What is done to the workers, and when.
struct Plan {
    disturbance: Disturbance,
    /// Since the first record.
    next: Duration,
    left: u32,
    frozen: Option<usize>,
    freeze: Duration,
    between: Duration,
    random: fastrand::Rng,
    turn: usize,
}

impl Plan {
    fn new(disturbance: Disturbance, load: &Load) -> Self {
        let (left, freeze) = match disturbance {
            Disturbance::Kill => (load.kills, Duration::ZERO),
            Disturbance::Freeze => (load.freezes, Duration::from_millis(load.patience * 3)),
        };
        let mut plan = Self {
            disturbance,
            next: Duration::ZERO,
            left,
            frozen: None,
            freeze,
            between: (load.time / left.max(1)).saturating_sub(freeze),
            random: fastrand::Rng::with_seed(load.seed),
            turn: 0,
        };
        plan.next = plan.pause();
        plan
    }

    /// Half to the whole of the time that each disturbance has.
    fn pause(&mut self) -> Duration {
        self.between.mul_f64(0.5 + 0.5 * self.random.f64())
    }

    fn act(&mut self, workers: &[Program], started: SystemTime) {
        if started.elapsed().unwrap_or_default() < self.next {
            return;
        }
        let pause = self.pause();
        if let Some(frozen) = self.frozen.take() {
            workers[frozen].signal(Signal::CONT);
            self.next += pause;
            return;
        }
        if self.left == 0 {
            return;
        }
        self.left -= 1;
        match self.disturbance {
            Disturbance::Kill => {
                workers[0].signal(Signal::KILL);
                self.next += pause;
            }
            Disturbance::Freeze => {
                // In turn, because only one of the two may be active.
                let victim = self.turn % workers.len();
                self.turn += 1;
                workers[victim].signal(Signal::STOP);
                self.frozen = Some(victim);
                self.next += self.freeze;
            }
        }
    }
}

/// Sees when each record is counted.
struct Watch {
    started: SystemTime,
    per_second: u64,
    latencies: Vec<Option<Duration>>,
    /// All records before this one were seen.
    first: usize,
    seen: usize,
    last: Instant,
}

impl Watch {
    fn new(started: SystemTime, per_second: u64, records: u64) -> Self {
        Self {
            started,
            per_second,
            latencies: vec![None; records as usize],
            first: 0,
            seen: 0,
            last: Instant::now(),
        }
    }

    fn look(&mut self, judge: &mut dyn Judge) -> Result<()> {
        let since = self.started.elapsed().unwrap_or_default();
        let sent = (since.as_secs_f64() * self.per_second as f64) as usize + 1;
        let until = sent.min(self.latencies.len());
        if self.first == until {
            return Ok(());
        }
        let counted = judge.counted_of(self.first as u64, until as u64)?;
        let now = self.started.elapsed().unwrap_or_default();
        for number in counted {
            let due = Duration::from_micros(number * 1_000_000 / self.per_second);
            let latency = &mut self.latencies[number as usize];
            if latency.is_none() {
                *latency = Some(now.saturating_sub(due));
                self.seen += 1;
                self.last = Instant::now();
            }
        }
        while self.latencies.get(self.first).is_some_and(Option::is_some) {
            self.first += 1;
        }
        Ok(())
    }

    fn is_over(&self, sent: bool) -> bool {
        sent && (self.seen == self.latencies.len() || self.last.elapsed() > GIVE_UP)
    }

    fn outcome(self, lost: u64, doubled: u64) -> Outcome {
        // A lost record waits without end.
        let mut latencies: Vec<Duration> = self.latencies.iter().map(|l| l.unwrap_or(Duration::MAX)).collect();
        latencies.sort();
        let quantile = |part: f64| latencies[((latencies.len() - 1) as f64 * part) as usize];
        Outcome {
            p50: quantile(0.5),
            p99: quantile(0.99),
            lost,
            doubled,
        }
    }
}
