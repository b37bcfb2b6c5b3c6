//! Consumes until Ctrl-C, and answers a health check and Prometheus until then.
//!
//! ```text
//! cargo run -p graceful-shutdown                              # on a file in the temporary folder
//! cargo run -p graceful-shutdown -- shop.db 127.0.0.1:8080
//! curl -i http://127.0.0.1:8080/health                        # 200, or 503 with the reason
//! curl http://127.0.0.1:8080/metrics                          # for Prometheus
//! ```
//!
//! `docs/alerts.yml` has alerts on these metrics.
#![expect(clippy::print_stdout, reason = "an example shows what it does")]

use std::{
    env, io,
    path::PathBuf,
    pin::pin,
    process::ExitCode,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use essentially_once::{
    CancellationToken, Consumer, ConsumerId, Handler, HandlerError, KeyValue, Log, NewRecord, Record, async_trait,
};
use essentially_once_sqlite::Sqlite;
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    signal, time,
};

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// How long a record may wait before the consumer counts as stuck.
const PATIENCE: Duration = Duration::from_secs(60);

struct Ship;

#[async_trait]
impl<Tx: KeyValue> Handler<Tx> for Ship {
    async fn handle(&mut self, order: &Record, tx: &mut Tx) -> Result<(), HandlerError> {
        tx.put(b"last order", &order.payload).await?;
        println!("shipped order {}", order.payload.escape_ascii());
        Ok(())
    }
}

async fn run(path: PathBuf, address: &str) -> Result<(), Failure> {
    let metrics = PrometheusBuilder::new().install_recorder()?;
    let requests = TcpListener::bind(address)
        .await
        .map_err(|error| format!("cannot listen on {address}: {error}"))?;
    let sqlite = Sqlite::open(&path).await?;
    let orders = sqlite.log("orders").await?;
    println!(
        "consuming from {}; http://{address}/health and /metrics answer; Ctrl-C stops",
        path.display()
    );

    let stop = CancellationToken::new();
    let consumer = Consumer::essentially_once(ConsumerId::new("shipping")?, orders.clone(), sqlite.store(), Ship);
    let mut consumer = tokio::spawn(consumer.run_until(stop.clone()));
    let mut pressed = pin!(signal::ctrl_c()); // in a container, `signal::unix` with SIGTERM
    let mut every_second = time::interval(Duration::from_secs(1));
    let mut number = 0;
    let ended = loop {
        tokio::select! {
            ended = &mut consumer => break ended?, // by an error: nobody has stopped it
            pressed = &mut pressed => {
                pressed?;
                println!("stopping: the record in hand is finished, and what was handled is committed");
                stop.cancel();
                break consumer.await?;
            }
            Ok((connection, _)) = requests.accept() => drop(tokio::spawn(answer(connection, metrics.clone()))),
            _ = every_second.tick() => {
                metrics.run_upkeep(); // keeps the histograms small
                number += 1;
                orders.append(&[NewRecord::new(number.to_string())]).await?;
            }
        }
    };
    println!("{}", ended?);
    sqlite.close().await?;
    Ok(())
}

/// Answers one request. A service takes the HTTP server that it has.
async fn answer(mut connection: TcpStream, metrics: PrometheusHandle) -> io::Result<()> {
    let mut request = [0; 1024];
    let length = connection.read(&mut request).await?;
    let (status, text) = match request[..length].starts_with(b"GET /metrics ") {
        true => ("200 OK", metrics.render()),
        false => health(&metrics.render()),
    };
    let head = format!(
        "HTTP/1.1 {status}\r\ncontent-type: text/plain\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
        text.len()
    );
    connection.write_all(format!("{head}{text}").as_bytes()).await
}

fn health(metrics: &str) -> (&'static str, String) {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let oldest = gauge(metrics, "essentially_once_oldest_waiting_timestamp_seconds"); // 0: no record waits
    if gauge(metrics, "essentially_once_running") < 1.0 {
        ("503 Service Unavailable", "the consumer has ended\n".into())
    } else if oldest > 0.0 && now.as_secs_f64() - oldest > PATIENCE.as_secs_f64() {
        ("503 Service Unavailable", "a record has waited for too long\n".into())
    } else {
        ("200 OK", "the consumer runs\n".into())
    }
}

/// The value of a gauge, which only one consumer sets in this process; 0 if it does not exist.
fn gauge(metrics: &str, name: &str) -> f64 {
    let is_wanted = |line: &&str| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' ']));
    let value = metrics.lines().find(is_wanted).and_then(|line| line.rsplit(' ').next());
    value.and_then(|value| value.parse().ok()).unwrap_or(0.0)
}

#[tokio::main]
async fn main() -> ExitCode {
    let mut arguments = env::args().skip(1);
    let path = arguments.next().map(PathBuf::from);
    let path = path.unwrap_or_else(|| env::temp_dir().join("essentially-once-shutdown.db"));
    let address = arguments.next().unwrap_or_else(|| "127.0.0.1:8080".into());
    match run(path, &address).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("graceful-shutdown: {error}");
            ExitCode::FAILURE
        }
    }
}
