//! Ties a worker process to its parent.

use std::{
    io::{self, Read as _, Write as _},
    process,
    sync::mpsc,
    thread,
};

use crate::Failure;

/// Ties the worker to its parent.
///
/// The worker reports each line that it shipped or rejected on stdout. After every `length` lines
/// it waits for a byte on stdin. So a kill meant for a line falls near it, however slow the parent
/// is. When stdin ends, the parent is gone, and the worker ends too.
pub(crate) struct Leash {
    length: u64,
    handled: u64,
    slack: mpsc::Receiver<()>,
}

impl Leash {
    /// Ties this process to its parent, with `length` lines between two waits.
    pub(crate) fn attach(length: u64) -> Self {
        let (give, slack) = mpsc::channel();
        thread::spawn(move || {
            let mut byte = [0];
            while io::stdin().read_exact(&mut byte).is_ok() && give.send(()).is_ok() {}
            process::exit(1);
        });
        Self {
            length: length.max(1),
            handled: 0,
            slack,
        }
    }

    /// Reports a line that was shipped or rejected to the parent.
    pub(crate) fn reached(&mut self, line: u32) -> Result<(), Failure> {
        writeln!(io::stdout(), "{line}")?;
        self.handled += 1;
        if self.handled.is_multiple_of(self.length) {
            self.slack.recv()?;
        }
        Ok(())
    }
}
