//! Cases that only a RabbitMQ log has: other clients, retention by segments, alarms, cut and silent
//! connections.

mod connections;
mod reading;
mod records;
mod refusals;

use std::{
    future::Future,
    pin::Pin,
    process::ExitCode,
    sync::{Arc, OnceLock},
    time::Duration,
};

use essentially_once::{Error, Log, Record};
use essentially_once_rabbitmq::{LogOptions, RabbitLog, RabbitOptions};
use essentially_once_testkit::Suite;
use lapin::{Channel, Connection, ConnectionProperties, options::ConfirmSelectOptions};
use test_servers::{Proxy, RabbitNode};

/// How long a test may take. Only a stuck test takes this long.
const LIMIT: Duration = Duration::from_secs(100);

type Test = fn(Arc<RabbitNode>) -> Pin<Box<dyn Future<Output = Outcome>>>;
type Outcome = Result<(), Box<dyn std::error::Error + Send + Sync>>;

fn main() -> ExitCode {
    let tests: [(&str, Test); 16] = [
        ("messages_of_other_clients_are_records", |node| {
            Box::pin(records::others(node))
        }),
        ("other_clients_can_read_records", |node| {
            Box::pin(records::readable(node))
        }),
        ("many_and_large_headers_come_back", |node| {
            Box::pin(records::headers(node))
        }),
        ("a_stream_keeps_no_nested_headers", |node| {
            Box::pin(records::nested(node))
        }),
        ("a_fetch_and_what_is_sent_ahead_are_bounded_in_bytes", |node| {
            Box::pin(reading::bounded(node))
        }),
        ("plain_and_packed_records_mix", |node| Box::pin(records::mixed(node))),
        ("a_slow_reader_learns_that_retention_overtook_it", |node| {
            Box::pin(reading::overtaken(node))
        }),
        ("a_stream_that_retention_emptied_says_so", |node| {
            Box::pin(reading::emptied(node))
        }),
        ("another_declaration_is_refused_by_name", |node| {
            Box::pin(refusals::mismatch(node))
        }),
        ("a_queue_that_is_no_stream_is_refused", |node| {
            Box::pin(refusals::no_stream(node))
        }),
        ("the_longest_name_is_taken_and_a_longer_one_refused", |node| {
            Box::pin(refusals::longest_name(node))
        }),
        ("a_refused_message_is_not_taken_for_stored", |node| {
            Box::pin(refusals::nack(node))
        }),
        ("a_refused_password_is_not_shown", |node| {
            Box::pin(refusals::refused(node))
        }),
        ("a_cut_amid_an_append_leaves_doubt_and_the_next_works", |node| {
            Box::pin(connections::cut(node))
        }),
        ("a_silent_connection_is_noticed", |node| {
            Box::pin(connections::silent(node))
        }),
        ("an_alarm_holds_up_appends_and_no_reads", |_| {
            Box::pin(connections::alarm())
        }),
    ];
    static NODE: OnceLock<Result<Arc<RabbitNode>, String>> = OnceLock::new();
    let mut suite = Suite::new();
    for (name, test) in tests {
        suite = match test_servers::rabbitmq_server() {
            Err(why) => suite.ignored(name, &why),
            Ok(_) => suite.async_test(name, LIMIT, move || async move {
                let start = || RabbitNode::start().map(Arc::new).map_err(|error| error.to_string());
                let node = tokio::task::block_in_place(|| NODE.get_or_init(start));
                test(node.clone()?).await
            }),
        };
    }
    suite.run()
}

fn fresh(name: &str) -> String {
    format!("{name}-{:08x}", fastrand::u32(..))
}

async fn plain_client(node: &RabbitNode) -> Result<(Connection, Channel), lapin::Error> {
    let connection = Connection::connect(&node.url(), ConnectionProperties::default()).await?;
    let channel = connection.create_channel().await?;
    channel.confirm_select(ConfirmSelectOptions::default()).await?;
    Ok((connection, channel))
}

async fn read(log: &dyn Log, count: usize) -> Result<Vec<Record>, Error> {
    let mut reader = log.read(log.bounds().await?.earliest).await?;
    let mut records = Vec::new();
    while records.len() < count {
        records.extend(reader.next(count - records.len()).await?);
    }
    Ok(records)
}

fn header<'a>(record: &'a Record, name: &str) -> &'a [u8] {
    record.header(name).map_or(b"none", |value| &value[..])
}

fn through(proxy: &Proxy) -> String {
    format!("amqp://guest:guest@127.0.0.1:{}/%2f", proxy.port())
}

/// A handle that considers the broker stuck after three seconds.
async fn impatient(url: String, log: &str) -> Result<RabbitLog, Error> {
    let options = RabbitOptions::new().timeout(Duration::from_secs(3));
    options
        .connect(&url)
        .await?
        .log_with(log, LogOptions::new().existing())
        .await
}
