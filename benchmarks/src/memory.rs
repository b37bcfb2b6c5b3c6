//! How much memory a process needs that drains a large log.

use std::{
    env, fs,
    process::{Command, ExitCode, Stdio},
};

use clap::{Args, ValueEnum as _};
use essentially_once::{Consumer, ConsumerId};
use essentially_once_postgres::Pg;
use essentially_once_redis::Redis;
use essentially_once_sqlite::Sqlite;
use tempfile::TempDir;

use crate::{
    Result,
    backends::{Backend, Host, Inside, Kind, Writes, fill},
    postgres::runtime,
};

#[derive(Args)]
pub(crate) struct MemoryArguments {
    /// What holds log and store.
    #[arg(default_value = "sqlite")]
    backend: Kind,
    /// How many records of 100 bytes the log has.
    #[arg(long, default_value_t = 10_000_000)]
    records: u64,
    /// Exit with status 1 if the process had more than this at its peak, in MiB.
    #[arg(long, default_value_t = 100.0)]
    limit: f64,
}

/// The process that drains the log. The command line of this program starts it.
#[derive(Args)]
pub(crate) struct Drain {
    backend: Kind,
    address: String,
}

pub(crate) fn measure(arguments: &MemoryArguments, folder: &TempDir) -> Result<ExitCode> {
    let MemoryArguments {
        backend,
        records,
        limit,
    } = *arguments;
    let host = Host::start(backend, folder, "memory.db")?;
    runtime()?.block_on(async {
        match backend {
            Kind::Sqlite => prepare::<Sqlite>(&host, records).await,
            Kind::Redis => prepare::<Redis>(&host, records).await,
            Kind::Postgres => prepare::<Pg>(&host, records).await,
        }
    })?;
    let backend = backend.to_possible_value().ok_or("no such backend")?;
    let output = Command::new(env::current_exe()?)
        .args(["drain", backend.get_name(), &host.address()])
        .stderr(Stdio::inherit())
        .output()?;
    if !output.status.success() {
        return Err(format!("the process ended with {}", output.status).into());
    }
    let output = String::from_utf8(output.stdout)?;
    let (handled, peak) = output.split_once(' ').ok_or("the process printed something else")?;
    if handled.parse::<u64>()? != records {
        return Err(format!("handled {handled} of {records} records: the measurement is invalid").into());
    }
    let peak = peak.trim().parse::<f64>()? / 1_024.0;
    println!("draining {records} records of 100 bytes took {peak:.1} MiB at its peak");
    Ok(match peak > limit {
        true => {
            println!("this is above the limit of {limit} MiB");
            ExitCode::FAILURE
        }
        false => ExitCode::SUCCESS,
    })
}

async fn prepare<B: Backend>(host: &Host, records: u64) -> Result<()> {
    let mut client = B::connect(&host.address()).await?;
    let log = B::open(&host.address()).await?.log("bench").await?;
    fill(&*log, records).await?;
    B::settle(&mut client).await
}

/// Drains the log, and prints the number of records and the peak in KiB.
pub(crate) fn drain(drain: &Drain) -> Result<()> {
    let handled = runtime()?.block_on(async {
        match drain.backend {
            Kind::Sqlite => drain_log::<Sqlite>(&drain.address).await,
            Kind::Redis => drain_log::<Redis>(&drain.address).await,
            Kind::Postgres => drain_log::<Pg>(&drain.address).await,
        }
    })?;
    println!("{handled} {}", peak(&fs::read_to_string("/proc/self/status")?)?);
    Ok(())
}

async fn drain_log<B: Backend>(address: &str) -> Result<u64> {
    let backend = B::open(address).await?;
    let count = Inside::<B>::new(Writes::Batch);
    let (id, log) = (ConsumerId::new("bench")?, backend.log("bench").await?);
    let consumer = Consumer::essentially_once(id, log, backend.store(), count);
    Ok(tokio::spawn(consumer.run_until_caught_up()).await??.handled)
}

/// The largest size of a process in memory so far, in KiB.
fn peak(status: &str) -> Result<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let number = line.and_then(|line| line.trim().strip_suffix(" kB"));
    let number = number.ok_or("the system does not say how much memory a process had at its peak")?;
    Ok(number.parse()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_peak_is_the_high_water_mark() -> Result<()> {
        let status = "Name:\tbenchmarks\nVmPeak:\t  300000 kB\nVmHWM:\t   12345 kB\nVmRSS:\t     999 kB\n";
        assert_eq!(peak(status)?, 12_345);
        assert!(peak("Name:\tbenchmarks\n").is_err());
        Ok(())
    }
}
