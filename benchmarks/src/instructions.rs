//! What the loop costs: instructions and allocations per record, on the in-memory backend, counted
//! by Valgrind.

use std::{env, path::Path, process::Command};

use clap::{Args, ValueEnum};
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
#[derive(Clone, Copy, Args)]
pub(crate) struct Work {
    records: u64,
    max_batch: usize,
    until: Until,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Until {
    /// Appends only.
    Appended,
    /// Appends and consumes.
    Handled,
    /// The same with the option to keep dead letters.
    HandledWithLetters,
}

/// The price of the option to keep dead letters.
pub(crate) fn healthy(folder: &Path) -> Result<()> {
    println!("in-memory backend, batches of 100, a handler that does nothing; per record");
    println!("| | without dead letters | with | ratio |");
    println!("|---|---:|---:|---:|");
    for counted in Counted::ALL {
        let without = per_record(folder, counted, 100, Until::Handled)?;
        let with = per_record(folder, counted, 100, Until::HandledWithLetters)?;
        println!(
            "| {} | {without:.2} | {with:.2} | {:.3} |",
            counted.what,
            with / without
        );
    }
    Ok(())
}

/// The loop without the appending.
pub(crate) fn core(folder: &Path, batches: &[usize]) -> Result<()> {
    println!("in-memory backend, a handler that does nothing; per record, without the append");
    println!("| records per commit | instructions | allocations |");
    println!("|---:|---:|---:|");
    for batch in batches {
        let [instructions, allocations] = Counted::ALL.map(|counted| {
            let handled = per_record(folder, counted, *batch, Until::Handled)?;
            Ok::<_, crate::Failure>(handled - per_record(folder, counted, *batch, Until::Appended)?)
        });
        println!("| {batch} | {:.0} | {:.2} |", instructions?, allocations?);
    }
    Ok(())
}

/// What a tool of Valgrind counts, and what is before the number in its summary.
#[derive(Clone, Copy)]
struct Counted {
    what: &'static str,
    tool: &'static str,
    before: &'static str,
}

impl Counted {
    const ALL: [Self; 2] = [
        Self {
            what: "instructions",
            tool: "callgrind",
            before: "Collected :",
        },
        Self {
            what: "allocations",
            tool: "dhat",
            before: "bytes in",
        },
    ];
}

fn per_record(folder: &Path, counted: Counted, batch: usize, until: Until) -> Result<f64> {
    let total = |records| {
        count(
            folder,
            counted,
            &Work {
                records,
                max_batch: batch,
                until,
            },
        )
    };
    let more = total(RECORDS.1)? as f64 - total(RECORDS.0)? as f64;
    Ok(more / (RECORDS.1 - RECORDS.0) as f64)
}

/// Runs this program under a tool of Valgrind.
fn count(folder: &Path, Counted { tool, before, .. }: Counted, work: &Work) -> Result<u64> {
    let until = work.until.to_possible_value().ok_or("no such work")?;
    let output = Command::new("valgrind")
        .arg(format!("--tool={tool}"))
        .arg(format!("--{tool}-out-file={}", folder.join(tool).display()))
        .arg(env::current_exe()?)
        .args([
            "counted",
            &work.records.to_string(),
            &work.max_batch.to_string(),
            until.get_name(),
        ])
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

/// What is counted.
pub(crate) fn work(work: &Work) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let memory = Memory::new();
        let log = memory.log("orders")?;
        let records: Vec<_> = (0..work.records)
            .map(|n| NewRecord::new("x").key((n % 1_000).to_string()))
            .collect();
        log.append(&records).await?;
        if work.until == Until::Appended {
            return Ok(());
        }
        let handler = handler_fn(|_: &Record, _: &mut MemoryTx| Box::pin(async { Ok(()) }));
        let consumer = Consumer::essentially_once(ConsumerId::new("shipping")?, log, memory.store(), handler)
            .max_batch(work.max_batch)
            .accept_volatile();
        let consumer = match work.until {
            Until::HandledWithLetters => consumer.dead_letters(DeadLetterOptions::new()),
            _ => consumer,
        };
        let report = consumer.run_until_caught_up().await?;
        match report.handled == work.records {
            true => Ok(()),
            false => Err(report.to_string().into()),
        }
    })
}
