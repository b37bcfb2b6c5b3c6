//! Runs one delivery: starts the processes, kills each of them again and again, and stops them once
//! everything has arrived.

use std::{
    sync::{
        atomic::{AtomicU64, Ordering},
        mpsc::{self, Receiver, RecvTimeoutError, Sender},
    },
    thread,
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};

use super::{
    customers,
    life::{End, Life, Report, Task},
    plan::{Plan, total},
};
use crate::{
    Failure,
    delivery::Delivery,
    input::{FIRST_LINE, Input},
    order::Format,
    processes::{Role, Until},
    settings::Settings,
};

/// The file from which the order service takes the orders.
const INPUT: &str = "orders.csv";

/// One delivery's way through all orders: its processes race against the kills of a plan.
pub(crate) struct Race<'a> {
    /// What the processes share, and where they keep it.
    pub(crate) settings: &'a Settings,
    /// The orders to place.
    pub(crate) input: &'a Input,
    /// When processes are killed, and what goes wrong on the bus.
    pub(crate) plan: &'a Plan,
}

/// What happened in a run.
#[derive(Default)]
pub(crate) struct Toll {
    pub(crate) kills: AtomicU64,
    pub(crate) lost: AtomicU64,
    pub(crate) altered: AtomicU64,
}

/// What the supervisor of a process gets to know.
#[derive(Clone, Copy)]
pub(super) enum Event {
    Reported(Report),
    /// The process has ended, and has reported everything.
    Ended,
    /// No further records come from the process before this one.
    Complete,
    /// Another supervisor failed.
    GiveUp,
}

impl Race<'_> {
    /// Runs all processes, with the kills of the plan, until every record has arrived.
    pub(crate) fn run(&self) -> Result<(Toll, Duration), Failure> {
        customers::write(&self.settings.file(INPUT), &self.input.lines)?;
        crate::runtime()?.block_on(self.settings.create_shop())?;
        self.supervise(self.input.format, self.plan)
    }

    /// Runs all processes again, with a mended parser and no kills. The customers have placed all
    /// their orders.
    pub(crate) fn mend(&self) -> Result<Duration, Failure> {
        let mended = Format {
            mended: true,
            ..self.input.format
        };
        let (_, time) = self.supervise(mended, &Plan::default())?;
        Ok(time)
    }

    fn supervise(&self, format: Format, plan: &Plan) -> Result<(Toll, Duration), Failure> {
        let delivery = self.settings.delivery;
        let settings = Settings {
            format,
            ..self.settings.clone()
        };
        let roles = Role::of(delivery);
        let (senders, receivers): (Vec<_>, Vec<_>) = roles.iter().map(|_| mpsc::channel()).unzip();
        let bar = bar(delivery, roles, self.input.lines.len());
        let toll = Toll::default();
        let started = Instant::now();
        thread::scope(|scope| -> Result<(), Failure> {
            let watches = receivers.into_iter().enumerate().map(|(index, events)| {
                let mut supervisor = Supervisor {
                    role: roles[index],
                    settings: &settings,
                    plan,
                    toll: &toll,
                    bar: &bar,
                    own: senders[index].clone(),
                    // The last one reports to the first one, which waits for it.
                    next: senders[(index + 1) % senders.len()].clone(),
                    events,
                    watched: Watched::default(),
                    reports_back: delivery == Delivery::EssentiallyOnce,
                };
                let mut alarm = Alarm(senders.clone());
                scope.spawn(move || {
                    let outcome = supervisor.run();
                    if outcome.is_ok() {
                        alarm.0.clear();
                    }
                    outcome
                })
            });
            let watches: Vec<_> = watches.collect();
            let outcomes = watches
                .into_iter()
                .map(|watch| watch.join().unwrap_or_else(|_| Err("the rig panicked".into())));
            let mut errors: Vec<Failure> = outcomes.filter_map(Result::err).collect();
            // The others only say that they gave up.
            errors.sort_by_key(|error| error.is::<GaveUp>());
            errors.into_iter().next().map_or(Ok(()), Err)
        })?;
        bar.finish();
        Ok((toll, started.elapsed()))
    }
}

/// Lets all supervisors give up when it is dropped, so that none waits for one that panicked.
struct Alarm(Vec<Sender<Event>>);

impl Drop for Alarm {
    fn drop(&mut self) {
        for one in &self.0 {
            // A supervisor that is done no longer listens.
            let _ = one.send(Event::GiveUp);
        }
    }
}

/// Starts one process again and again, and kills it.
struct Supervisor<'a> {
    role: Role,
    settings: &'a Settings,
    plan: &'a Plan,
    toll: &'a Toll,
    bar: &'a ProgressBar,
    /// Its own channel, for the process.
    own: Sender<Event>,
    /// That of the process to which this one sends.
    next: Sender<Event>,
    events: Receiver<Event>,
    watched: Watched,
    /// Whether the order service waits for reports.
    reports_back: bool,
}

/// What the supervisor knows.
#[derive(Default)]
struct Watched {
    placed: u64,
    handled: u64,
    /// No further records arrive.
    is_complete: bool,
    has_ended: bool,
    /// Reports since the process was last given slack.
    unanswered: u64,
}

impl Supervisor<'_> {
    fn run(&mut self) -> Result<(), Failure> {
        for kill in self.plan.kills(self.role) {
            let life = self.start(Until::Stopped)?;
            let mut life = self.follow(life, |watched| {
                watched.is_complete || watched.placed + watched.handled >= kill.after
            })?;
            // A process that had to wait meanwhile would always be killed at the same place.
            life.give_slack();
            thread::sleep(kill.delay);
            self.kill(life)?;
        }
        if !self.watched.is_complete {
            let life = self.start(Until::Stopped)?;
            let mut life = self.follow(life, |watched| watched.is_complete)?;
            if !life.is_running()? {
                return Err(self.ended_early(life));
            }
            life.stop();
            self.end(life)?;
        }
        let life = self.start(Until::CaughtUp)?;
        self.end(life)?;
        // One that gave up no longer listens.
        let _ = self.next.send(Event::Complete);
        Ok(())
    }

    fn start(&mut self, until: Until) -> Result<Life, Failure> {
        let task = Task {
            role: self.role,
            until,
            settings: self.settings.clone(),
            faults: self.plan.faults(self.role),
            leash: self.leash(),
            input: self.settings.file(INPUT),
        };
        self.watched.has_ended = false;
        self.watched.unanswered = 0;
        Life::start(&task, self.own.clone())
    }

    /// How many orders the process may be ahead of its supervisor: more than it handles within a
    /// kill's delay. An odd number keeps its waits from coinciding with the ends of batches.
    fn leash(&self) -> u64 {
        2 * self.settings.max_batch as u64 + 101
    }

    /// Listens to a process until something is the case. A process that ends before is a failure.
    fn follow(&mut self, mut life: Life, is_reached: impl Fn(&Watched) -> bool) -> Result<Life, Failure> {
        while !is_reached(&self.watched) {
            if self.watched.has_ended {
                return Err(self.ended_early(life));
            }
            self.listen(&mut life)?;
        }
        Ok(life)
    }

    fn listen(&mut self, life: &mut Life) -> Result<(), Failure> {
        const LONGEST_SILENCE: Duration = Duration::from_secs(120);
        let event = match self.events.recv_timeout(LONGEST_SILENCE) {
            Ok(event) => event,
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                return Err(format!("the {} hangs: it made no progress for two minutes", self.role.name()).into());
            }
        };
        if self.notice(event)? {
            life.give_slack();
        }
        Ok(())
    }

    /// Takes an event into account. Returns whether the process waits for slack.
    fn notice(&mut self, event: Event) -> Result<bool, Failure> {
        match event {
            Event::Ended => self.watched.has_ended = true,
            Event::Complete => self.watched.is_complete = true,
            Event::GiveUp => return Err(GaveUp.into()),
            Event::Reported(report) => return Ok(self.take(report)),
        }
        Ok(false)
    }

    /// Takes a report into account. Returns whether the process waits for slack.
    fn take(&mut self, report: Report) -> bool {
        let leash = self.leash();
        let watched = &mut self.watched;
        let (progress, number) = match report {
            Report::Placed(number) => (&mut watched.placed, number),
            Report::Handled(number) => (&mut watched.handled, number),
            Report::AllPlaced => {
                // The process of the order service does not end by itself, so its relay learns from
                // here that all orders are in the outbox.
                let _ = self.next.send(Event::Complete);
                watched.is_complete |= !self.reports_back;
                return false;
            }
            Report::Lost => {
                self.toll.lost.fetch_add(1, Ordering::Relaxed);
                return false;
            }
            Report::Altered => {
                self.toll.altered.fetch_add(1, Ordering::Relaxed);
                return false;
            }
        };
        let reached = u64::from(number + 1 - FIRST_LINE);
        self.bar.inc(reached.saturating_sub(*progress));
        *progress = reached.max(*progress);
        watched.unanswered += 1;
        watched.unanswered.is_multiple_of(leash)
    }

    fn kill(&mut self, mut life: Life) -> Result<(), Failure> {
        // Another program may kill it too, and that kill is not in the plan.
        if !life.is_running()? {
            return Err(self.ended_early(life));
        }
        life.kill();
        let end = life.wait()?;
        self.settle()?;
        // A killed process has no exit code and writes nothing to stderr.
        if end.status.code().is_some() || !end.words.is_empty() {
            return Err(self.failed(&end));
        }
        let kills = self.toll.kills.fetch_add(1, Ordering::Relaxed) + 1;
        self.bar.set_message(format!("{kills} kills"));
        Ok(())
    }

    /// Waits for a process that ends on its own.
    fn end(&mut self, mut life: Life) -> Result<(), Failure> {
        while !self.watched.has_ended {
            self.listen(&mut life)?;
        }
        let end = life.wait()?;
        match end.status.success() {
            true => Ok(()),
            false => Err(self.failed(&end)),
        }
    }

    /// Takes into account what a dead process reported.
    fn settle(&mut self) -> Result<(), Failure> {
        while let Ok(event) = self.events.try_recv() {
            self.notice(event)?;
        }
        Ok(())
    }

    fn ended_early(&self, life: Life) -> Failure {
        life.wait().map_or_else(|error| error, |end| self.failed(&end))
    }

    fn failed(&self, end: &End) -> Failure {
        let (role, delivery) = (self.role.name(), self.settings.delivery);
        let failed = format!("the {role} of {delivery} ended on its own, {}", end.status);
        match end.words.trim_end() {
            "" => format!("{failed}, and wrote nothing to stderr"),
            words => format!("{failed}: {}", words.strip_prefix("orders: ").unwrap_or(words)),
        }
        .into()
    }
}

/// A supervisor stopped because another one failed.
#[derive(Debug)]
struct GaveUp;

impl std::fmt::Display for GaveUp {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("another process failed")
    }
}

impl std::error::Error for GaveUp {}

fn bar(delivery: Delivery, roles: &[Role], orders: usize) -> ProgressBar {
    let style = ProgressStyle::with_template("{prefix:16} {bar:40} {percent:>3} % {msg}");
    let steps = roles.iter().map(|role| total(*role, delivery, orders)).sum();
    ProgressBar::new(steps)
        .with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        .with_prefix(delivery.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_supervisor_that_panics_lets_the_others_give_up() {
        let (sender, events) = mpsc::channel();
        let panics = thread::spawn(move || {
            let _alarm = Alarm(vec![sender]);
            panic!("as a supervisor that has a bug");
        });
        assert!(panics.join().is_err());
        assert!(matches!(events.recv(), Ok(Event::GiveUp)));
    }
}
