//! What the option to keep dead letters costs a record that is handled: instructions and
//! allocations per record, on the in-memory backend, counted by Valgrind.

use std::{env, path::Path, process::Command};

use essentially_once::{
    Consumer, ConsumerId, Log as _, NewRecord, Record,
    consumer::DeadLetterOptions,
    handler_fn,
    memory::{Memory, MemoryTx},
};

use crate::Result;

/// Two runs that differ only in their number of records leave out the start and the end.
const RECORDS: (u64, u64) = (20_000, 120_000);

/// What a run under Valgrind does.
#[derive(Clone, Copy, clap::Args)]
pub(crate) struct HealthyArguments {
    #[arg(long, hide = true)]
    records: Option<u64>,
    #[arg(long, hide = true)]
    keeps_letters: bool,
}

pub(crate) fn measure(arguments: HealthyArguments, folder: &Path) -> Result<()> {
    if let Some(records) = arguments.records {
        return consume(records, arguments.keeps_letters);
    }
    println!("in-memory backend, the default batch of 100, a handler that does nothing; per record");
    println!("| | without dead letters | with | ratio |");
    println!("|---|---:|---:|---:|");
    for (what, tool, before) in [
        ("instructions", "callgrind", "Collected :"),
        ("allocations", "dhat", "bytes in"),
    ] {
        let count = |keeps_letters| -> Result<f64> {
            let total = |records| count(folder, tool, before, records, keeps_letters);
            let more = total(RECORDS.1)? as f64 - total(RECORDS.0)? as f64;
            Ok(more / (RECORDS.1 - RECORDS.0) as f64)
        };
        let (without, with) = (count(false)?, count(true)?);
        println!("| {what} | {without:.2} | {with:.2} | {:.3} |", with / without);
    }
    Ok(())
}

/// Runs this program under a tool of Valgrind, and returns the number that follows `before` in its
/// summary.
fn count(folder: &Path, tool: &str, before: &str, records: u64, keeps_letters: bool) -> Result<u64> {
    let mut command = Command::new("valgrind");
    command
        .arg(format!("--tool={tool}"))
        .arg(format!("--{tool}-out-file={}", folder.join(tool).display()))
        .arg(env::current_exe()?)
        .args(["healthy", "--records", &records.to_string()]);
    if keeps_letters {
        command.arg("--keeps-letters");
    }
    let output = command
        .output()
        .map_err(|error| format!("cannot run valgrind, which this needs: {error}"))?;
    let summary = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        return Err(format!("valgrind failed: {summary}").into());
    }
    let number = summary.split_once(before).map(|(_, after)| after.trim_start());
    let digits = number.and_then(|number| number.split_whitespace().next());
    let digits: String = digits
        .unwrap_or_default()
        .chars()
        .filter(char::is_ascii_digit)
        .collect();
    digits
        .parse()
        .map_err(|_| format!("no number after {before:?} in the summary of {tool}: {summary}").into())
}

fn consume(records: u64, keeps_letters: bool) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let memory = Memory::new();
        let log = memory.log("orders")?;
        let records: Vec<_> = (0..records)
            .map(|n| NewRecord::new("x").key((n % 1_000).to_string()))
            .collect();
        log.append(&records).await?;
        let handler = handler_fn(|_: &Record, _: &mut MemoryTx| Box::pin(async { Ok(()) }));
        let consumer =
            Consumer::essentially_once(ConsumerId::new("shipping")?, log, memory.store(), handler).accept_volatile();
        let consumer = match keeps_letters {
            true => consumer.dead_letters(DeadLetterOptions::new()),
            false => consumer,
        };
        let report = consumer.run_until_caught_up().await?;
        match report.handled == records.len() as u64 {
            true => Ok(()),
            false => Err(report.to_string().into()),
        }
    })
}
