//! Runs the consumers of one plan. Starts another one when a consumer dies or freezes, and an
//! operator when one is called, until all are done.

use std::{
    future::{Future, poll_fn},
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use essentially_once::Error;
use tokio::time::{Sleep, sleep};

use super::{
    control::{Event, Faults, OPERATION_LIMIT, Process},
    letters::Verb,
};
use crate::violation::Violation;

/// A consumer's run until it has caught up.
pub(super) type Running<'a> = Pin<Box<dyn Future<Output = Result<(), Error>> + Send + 'a>>;

/// Runs until all consumers and operators have ended. `patience` limits how long a consumer stays
/// frozen or slow, because another one may need a lock that it holds.
pub(super) async fn drive<'a>(
    faults: &Faults,
    patience: Option<Duration>,
    start: impl Fn(Process) -> Running<'a>,
    call: impl Fn(Process, Verb) -> Running<'a>,
) -> Result<(), Violation> {
    let mut driver = Driver {
        faults,
        patience,
        start,
        call,
        processes: Vec::new(),
    };
    driver.start();
    poll_fn(|context| driver.poll(context)).await
}

struct Driver<'d, 'a, F, C> {
    faults: &'d Faults,
    patience: Option<Duration>,
    start: F,
    call: C,
    /// Indexed by process number.
    processes: Vec<Slot<'a>>,
}

struct Slot<'a> {
    /// `None` once it is done or dead.
    running: Option<Running<'a>>,
    /// Frozen until that process is done.
    waits_for: Option<usize>,
    /// When it resumes in any case.
    alarm: Option<Pin<Box<Sleep>>>,
}

impl<'a, F, C> Driver<'_, 'a, F, C>
where
    F: Fn(Process) -> Running<'a>,
    C: Fn(Process, Verb) -> Running<'a>,
{
    fn start(&mut self) -> usize {
        let consumer = (self.start)(self.faults.process());
        self.add(consumer)
    }

    fn add(&mut self, running: Running<'a>) -> usize {
        self.processes.push(Slot {
            running: Some(running),
            waits_for: None,
            alarm: None,
        });
        self.processes.len() - 1
    }

    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Violation>> {
        loop {
            while let Some(event) = self.faults.next_event(context.waker()) {
                self.on_event(event)?;
            }
            let mut is_idle = true;
            for number in 0..self.processes.len() {
                is_idle &= !self.is_woken_by_alarm(number, context);
                is_idle &= !self.is_finished(number, context)?;
                // The others must never see a moment at which a dead process still holds its
                // transaction.
                if self.faults.has_events() {
                    is_idle = false;
                    break;
                }
            }
            if self.processes.iter().all(|slot| slot.running.is_none()) {
                return Poll::Ready(Ok(()));
            }
            if is_idle {
                return Poll::Pending;
            }
        }
    }

    fn on_event(&mut self, event: Event) -> Result<(), Violation> {
        match event {
            Event::Crashed(number) => {
                self.processes[number].running = None;
                let successor = self.start();
                for slot in &mut self.processes {
                    if slot.waits_for == Some(number) {
                        slot.waits_for = Some(successor);
                    }
                }
            }
            Event::Frozen(number) => {
                let successor = self.start();
                self.processes[number].waits_for = Some(successor);
                self.set_alarm(number);
            }
            Event::Called(number, verb) => {
                let operator = (self.call)(self.faults.process(), verb);
                self.processes[number].waits_for = Some(self.add(operator));
                self.set_alarm(number);
            }
            Event::Slowed(number) => {
                self.start();
                self.set_alarm(number);
            }
            Event::Runaway => {
                return Err(Violation::new(format!(
                    "the consumers have not caught up after {OPERATION_LIMIT} operations"
                )));
            }
        }
        self.tell_of_race();
        Ok(())
    }

    /// Runs the process if it can run. Returns whether it has ended.
    fn is_finished(&mut self, number: usize, context: &mut Context<'_>) -> Result<bool, Violation> {
        let slot = &mut self.processes[number];
        let Some(running) = slot.running.as_mut().filter(|_| slot.waits_for.is_none()) else {
            return Ok(false);
        };
        let Poll::Ready(result) = running.as_mut().poll(context) else {
            return Ok(false);
        };
        slot.running = None;
        result.map_err(|error| Violation::new(format!("consumer {number} gave up: {error}")))?;
        for sleeper in 0..self.processes.len() {
            if self.processes[sleeper].waits_for == Some(number) {
                self.wake(sleeper);
            }
        }
        self.tell_of_race();
        Ok(true)
    }

    fn set_alarm(&mut self, number: usize) {
        self.processes[number].alarm = self.patience.map(|patience| Box::pin(sleep(patience)));
    }

    fn is_woken_by_alarm(&mut self, number: usize, context: &mut Context<'_>) -> bool {
        let alarm = self.processes[number].alarm.as_mut();
        let rings = alarm.is_some_and(|alarm| alarm.as_mut().poll(context).is_ready());
        if rings {
            self.wake(number);
            self.tell_of_race();
        }
        rings
    }

    fn wake(&mut self, number: usize) {
        self.processes[number].alarm = None;
        self.processes[number].waits_for = None;
        self.faults.wake(number);
    }

    fn tell_of_race(&self) {
        let runs = |slot: &&Slot<'_>| slot.running.is_some() && slot.waits_for.is_none();
        self.faults.set_race(self.processes.iter().filter(runs).count() > 1);
    }
}
