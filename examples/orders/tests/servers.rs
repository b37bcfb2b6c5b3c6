//! Runs the program as its users do, with the bus, the shipping service or both on a private
//! server.

use std::{
    process::{Command, ExitCode, Output},
    time::Duration,
};

use essentially_once_kafka::rdkafka::{
    ClientConfig,
    consumer::{BaseConsumer, Consumer as _},
};
use essentially_once_testkit::{Suite, Violation};
use test_servers::{Error, KafkaServer, PostgresServer, RabbitNode, RedisServer, Reply};

fn main() -> ExitCode {
    let mut suite = Suite::new().test(
        "errors_name_the_server_and_no_password",
        errors_name_the_server_and_no_password,
    );
    for (name, bus, store) in [("bus", true, false), ("store", false, true), ("both", true, true)] {
        suite = match test_servers::postgres_bin() {
            Err(why) => suite.ignored(&format!("{name}_on_postgres"), &why),
            Ok(_) => suite.test(&format!("{name}_on_postgres"), move || {
                kills_lose_and_double_nothing(PostgresServer::start(), bus, store, 2_000, 40)
            }),
        };
        suite = match test_servers::redis_server() {
            Err(why) => suite.ignored(&format!("{name}_on_redis"), &why),
            Ok(_) => suite.test(&format!("{name}_on_redis"), move || {
                kills_lose_and_double_nothing(RedisServer::durable().start(), bus, store, 2_000, 40)
            }),
        };
        suite = match test_servers::rabbitmq_server() {
            Err(why) => suite.ignored(&format!("{name}_on_rabbitmq"), &why),
            // A process takes longer to start there. With 40 kills this takes about a minute.
            Ok(_) => suite.test(&format!("{name}_on_rabbitmq"), move || {
                kills_lose_and_double_nothing(RabbitNode::start(), bus, store, 1_000, 40)
            }),
        };
    }
    suite = match test_servers::kafka_server() {
        Err(why) => suite.ignored("bus_on_kafka", &why),
        Ok(_) => suite.test("bus_on_kafka", || {
            kills_lose_and_double_nothing(KafkaServer::start(), true, false, 2_000, 40)
        }),
    };
    suite = match test_servers::postgres_bin() {
        Err(why) => suite.ignored("mend_on_postgres", &why),
        Ok(_) => suite.test("mend_on_postgres", || {
            a_mended_parser_ships_every_dead_letter_once(PostgresServer::start(), 20)
        }),
    };
    suite = match test_servers::redis_server() {
        Err(why) => suite.ignored("mend_on_redis", &why),
        Ok(_) => suite.test("mend_on_redis", || {
            a_mended_parser_ships_every_dead_letter_once(RedisServer::durable().start(), 20)
        }),
    };
    suite = match test_servers::rabbitmq_server() {
        Err(why) => suite.ignored("mend_on_rabbitmq", &why),
        Ok(_) => suite.test("mend_on_rabbitmq", || {
            a_mended_parser_ships_every_dead_letter_once(RabbitNode::start(), 8)
        }),
    };
    suite.run()
}

/// A server for the program's data.
trait Server {
    fn url(&self) -> String;

    /// The data left on it.
    fn left(&self) -> Result<String, Error>;
}

impl Server for PostgresServer {
    fn url(&self) -> String {
        self.url()
    }

    fn left(&self) -> Result<String, Error> {
        self.run_sql("SELECT nspname FROM pg_namespace WHERE nspname !~ '^(pg_.*|information_schema|public)$'")
    }
}

impl Server for RedisServer {
    fn url(&self) -> String {
        self.url()
    }

    fn left(&self) -> Result<String, Error> {
        match self.command(&["DBSIZE"])? {
            Reply::Int(0) => Ok(String::new()),
            keys => Ok(format!("{keys:?} keys")),
        }
    }
}

impl Server for RabbitNode {
    fn url(&self) -> String {
        self.url()
    }

    fn left(&self) -> Result<String, Error> {
        self.ctl(&["list_queues", "--silent", "name"])
    }
}

impl Server for KafkaServer {
    fn url(&self) -> String {
        self.url()
    }

    fn left(&self) -> Result<String, Error> {
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", format!("127.0.0.1:{}", self.port()));
        let client: BaseConsumer = config.create()?;
        let found = client.fetch_metadata(None, Duration::from_secs(60))?;
        let topics = found.topics().iter().map(|topic| topic.name());
        Ok(topics
            .filter(|topic| !topic.starts_with("__"))
            .collect::<Vec<_>>()
            .join(" "))
    }
}

fn orders(arguments: &[&str]) -> Result<Output, Violation> {
    Command::new(env!("CARGO_BIN_EXE_orders"))
        .args(arguments)
        .output()
        .map_err(|error| Violation::new(format!("the program cannot start: {error}")))
}

/// The JSON of a run that must succeed.
fn report(arguments: &[&str]) -> Result<serde_json::Value, Violation> {
    let output = orders(arguments)?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        return Err(Violation::new(format!("{}: {stderr}", output.status)));
    }
    serde_json::from_slice(&output.stdout).map_err(|error| Violation::new(error.to_string()))
}

fn kills_lose_and_double_nothing(
    server: Result<impl Server, Error>,
    bus: bool,
    store: bool,
    count: u64,
    kills: u64,
) -> Result<(), Violation> {
    let violation = |finding: String| Violation::new(finding);
    let server = server.map_err(|error| violation(error.to_string()))?;
    let url = server.url();
    let place = |on_server| if on_server { url.as_str() } else { "sqlite" };
    let (count_text, kills_text) = (count.to_string(), kills.to_string());
    let arguments = ["--orders", &count_text, "--kills", &kills_text, "--seed", "1", "--json"];
    let places = ["--bus", place(bus), "--store", place(store)];
    let report = report(&[&arguments[..], &places].concat())?;
    let [at_most_once, at_least_once, essentially_once] =
        &report["deliveries"].as_array().cloned().unwrap_or_default()[..]
    else {
        return Err(violation(format!(
            "the report does not have three deliveries: {report}"
        )));
    };
    for (delivery, name, expected) in [
        (at_most_once, "shipped_more", true),
        (at_most_once, "never_shipped", false),
        (at_least_once, "never_shipped", true),
        (at_least_once, "shipped_more", false),
        (essentially_once, "shipped_more", true),
        (essentially_once, "never_shipped", true),
    ] {
        if (delivery[name] == 0) != expected {
            return Err(violation(format!("{name} is {} in {delivery}", delivery[name])));
        }
    }
    for delivery in [at_most_once, at_least_once, essentially_once] {
        if delivery["orders"] != count || delivery["kills"] != kills {
            return Err(violation(format!("not {count} orders and {kills} kills: {delivery}")));
        }
    }
    let number = |name: &str| essentially_once[name].as_u64().unwrap_or_default();
    let shipped = number("shipped_once");
    if shipped + number("rejected") != count
        || number("packed") != shipped
        || number("confirmed") != shipped
        || number("tampered_rejected") < 10
        || number("lost_replies") < 10
        || number("duplicates_on_bus") < 20
    {
        return Err(violation(format!(
            "the order service does not know all: {essentially_once}"
        )));
    }
    check_that_nothing_is_left(&server)
}

/// The file of `cli.rs`, which says what is in it.
const UNQUOTED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/unquoted.csv");

fn a_mended_parser_ships_every_dead_letter_once(
    server: Result<impl Server, Error>,
    kills: u64,
) -> Result<(), Violation> {
    let server = server.map_err(|error| Violation::new(error.to_string()))?;
    let (url, kills_text) = (server.url(), kills.to_string());
    let arguments = [
        "--input",
        UNQUOTED,
        "--kills",
        &kills_text,
        "--seed",
        "1",
        "--json",
        "--mend",
        "--tamper",
        "0",
    ];
    let report = report(&[&arguments[..], &["--bus", &url, "--store", &url]].concat())?;
    let (raced, mended) = (&report["deliveries"][2], &report["mended"]);
    let letters = |run: &serde_json::Value| run["dead_letters"].as_array().map(Vec::len);
    let of_a_comma = raced["dead_letters"].as_array().into_iter().flatten().filter(|letter| {
        letter["reason"]
            .as_str()
            .is_some_and(|reason| reason.ends_with("but the header has 8"))
    });
    for (is_met, expected) in [
        (raced["kills"] == kills, "every kill"),
        (raced["shipped_once"] == 160, "160 lines shipped before"),
        (letters(raced) == Some(40), "40 dead letters"),
        (of_a_comma.count() == 40, "that each has its reason"),
        (mended["retried"] == 40, "40 retried"),
        (mended["shipped_once"] == 200, "200 lines shipped after"),
        (mended["confirmed"] == 200, "200 lines confirmed after"),
        (letters(mended) == Some(0), "no dead letter left"),
    ] {
        if !is_met {
            return Err(Violation::new(format!("expected {expected}: {report}")));
        }
    }
    check_that_nothing_is_left(&server)
}

fn check_that_nothing_is_left(server: &impl Server) -> Result<(), Violation> {
    let left = server.left().map_err(|error| Violation::new(error.to_string()))?;
    if left.is_empty() {
        Ok(())
    } else {
        Err(Violation::new(format!("left on the server: {left}")))
    }
}

fn errors_name_the_server_and_no_password() -> Result<(), Violation> {
    const SECRET: &str = "s3cr3t-pa55";
    for url in [
        format!("redis://shop:{SECRET}@127.0.0.1:1/0"),
        format!("redis://shop:{SECRET}@127.0.0.1:notaport/0"),
        format!("rediss://:{SECRET}@127.0.0.1:1"),
        format!("amqp://shop:{SECRET}@127.0.0.1:1/%2f"),
        format!("amqp://shop:{SECRET}@127.0.0.1:notaport"),
        format!("amqps://shop:{SECRET}@127.0.0.1:1"),
        format!("postgres://shop:{SECRET}@127.0.0.1:1/shop"),
        format!("postgres://shop:{SECRET}@127.0.0.1:notaport/shop"),
        format!("postgres://shop:{SECRET}@127.0.0.1/shop?sslmode=require"),
        format!("kafka://shop:{SECRET}@127.0.0.1:1"),
        format!("kafka://shop:{SECRET}@127.0.0.1:notaport"),
        format!("mysql://shop:{SECRET}@127.0.0.1/shop"),
    ] {
        for option in ["--bus", "--store"] {
            let output = orders(&["--orders", "5", option, &url])?;
            let stderr = String::from_utf8_lossy(&output.stderr);
            if output.status.success() || stderr.contains(SECRET) {
                return Err(Violation::new(format!("{option}: {}: {stderr}", output.status)));
            }
            let why = stderr.lines().find(|line| line.starts_with("orders: "));
            // Kafka is no store, whether it is there or not.
            let is_place = option == "--bus" || !url.starts_with("kafka:");
            if is_place && url.contains("127.0.0.1:1") && !why.is_some_and(|why| why.contains("127.0.0.1:1")) {
                return Err(Violation::new(format!(
                    "{option} {url}: the error does not name the server: {stderr}"
                )));
            }
        }
    }
    Ok(())
}
