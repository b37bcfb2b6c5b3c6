//! Ties a process to its parent.

use std::{
    io::{self, BufRead as _, Read as _, Write as _},
    process,
    sync::{Arc, Mutex, PoisonError, mpsc},
    thread,
};

use async_trait::async_trait;
use essentially_once::{CancellationToken, Handler, HandlerError, Record};

use super::life::{Report, SLACK, STOP, Task};
use crate::{Failure, shipping};

/// Ties the process to its parent.
///
/// The process reports each order that it has handled. After every `length` orders it waits for the
/// parent. So a kill meant for an order falls near it, however slow the parent is. When stdin ends,
/// the parent is gone, and the process ends too.
#[derive(Clone)]
pub(crate) struct Leash {
    reports: Arc<Mutex<Reports>>,
    stopped: CancellationToken,
}

struct Reports {
    length: u64,
    handled: u64,
    slack: mpsc::Receiver<()>,
}

impl Leash {
    /// Reads from the parent what this process is to do, and ties it to the parent.
    pub(crate) fn attach() -> Result<(Self, Task), Failure> {
        let mut stdin = io::stdin().lock();
        let mut line = String::new();
        stdin.read_line(&mut line)?;
        let task: Task =
            serde_json::from_str(&line).map_err(|error| format!("this is no task of a process: {error}"))?;
        drop(stdin);
        let (give, slack) = mpsc::channel();
        let stopped = CancellationToken::new();
        let stop = stopped.clone();
        thread::spawn(move || {
            let mut byte = [0];
            while io::stdin().read_exact(&mut byte).is_ok() {
                match byte[0] {
                    SLACK => drop(give.send(())),
                    STOP => stop.cancel(),
                    _ => break,
                }
            }
            process::exit(1);
        });
        let reports = Reports {
            length: task.leash.max(1),
            handled: 0,
            slack,
        };
        let reports = Arc::new(Mutex::new(reports));
        Ok((Self { reports, stopped }, task))
    }

    /// Cancelled when the parent stops this process.
    pub(crate) fn stopped(&self) -> &CancellationToken {
        &self.stopped
    }

    /// Tells the parent something.
    pub(crate) fn report(&self, report: Report) -> Result<(), Failure> {
        let mut reports = self.reports.lock().unwrap_or_else(PoisonError::into_inner);
        writeln!(io::stdout(), "{report}")?;
        if let Report::Placed(_) | Report::Handled(_) = report {
            reports.handled += 1;
            if reports.handled.is_multiple_of(reports.length) {
                reports.slack.recv()?;
            }
        }
        Ok(())
    }

    /// Reports each record that the handler has handled or refused.
    pub(crate) fn hold<H>(&self, handler: H) -> Held<H> {
        let leash = self.clone();
        Held { handler, leash }
    }
}

/// A handler of a process that is tied to its parent.
pub(crate) struct Held<H> {
    handler: H,
    leash: Leash,
}

#[async_trait]
impl<Tx: Send, H: Handler<Tx>> Handler<Tx> for Held<H> {
    async fn handle(&mut self, record: &Record, tx: &mut Tx) -> Result<(), HandlerError> {
        let outcome = self.handler.handle(record, tx).await;
        if let Some(number) = shipping::order_number(record) {
            self.leash
                .report(Report::Handled(number))
                .map_err(HandlerError::fatal)?;
        }
        outcome
    }

    async fn flush(&mut self, tx: &mut Tx) -> Result<(), HandlerError> {
        self.handler.flush(tx).await
    }

    async fn reset(&mut self) {
        self.handler.reset().await;
    }
}
