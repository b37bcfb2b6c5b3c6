//! Runs the program as its user does, with log, store or both on a private Redis server.

use std::process::{Command, ExitCode, Output};

use essentially_once_testkit::{Suite, Violation};
use test_servers::{RedisServer, Reply};

fn main() -> ExitCode {
    let missing = test_servers::redis_server().err();
    let mut suite = Suite::new().test("a_password_is_never_told", a_password_is_never_told);
    for (name, log, store) in [
        ("log_on_redis", true, false),
        ("store_on_redis", false, true),
        ("both_on_redis", true, true),
    ] {
        suite = match &missing {
            Some(why) => suite.ignored(name, why),
            None => suite.test(name, move || kills_lose_and_double_nothing(log, store)),
        };
    }
    suite.run()
}

fn orders(arguments: &[&str]) -> Result<Output, Violation> {
    Command::new(env!("CARGO_BIN_EXE_orders"))
        .args(arguments)
        .output()
        .map_err(|error| Violation::new(format!("the program does not start: {error}")))
}

fn kills_lose_and_double_nothing(log: bool, store: bool) -> Result<(), Violation> {
    let violation = |finding: String| Violation::new(finding);
    let server = RedisServer::durable()
        .start()
        .map_err(|error| violation(error.to_string()))?;
    let url = server.url();
    let place = |on_redis| if on_redis { url.as_str() } else { "sqlite" };
    let arguments = ["--orders", "2000", "--kills", "20", "--seed", "1", "--json"];
    let places = ["--log", place(log), "--store", place(store)];
    let output = orders(&[&arguments[..], &places].concat())?;
    let told = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        return Err(violation(format!("{}: {told}", output.status)));
    }
    let report: serde_json::Value =
        serde_json::from_slice(&output.stdout).map_err(|error| violation(error.to_string()))?;
    let [at_most_once, at_least_once, essentially_once] =
        &report["deliveries"].as_array().cloned().unwrap_or_default()[..]
    else {
        return Err(violation(format!("not three deliveries: {report}")));
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
        if delivery["orders"] != 2_000 || delivery["kills"] != 20 {
            return Err(violation(format!("not 2,000 orders and 20 kills: {delivery}")));
        }
    }
    let left = server
        .command(&["DBSIZE"])
        .map_err(|error| violation(error.to_string()))?;
    match left {
        Reply::Int(0) => Ok(()),
        left => Err(violation(format!("keys are left on the server: {left:?}"))),
    }
}

fn a_password_is_never_told() -> Result<(), Violation> {
    const SECRET: &str = "s3cr3t-pa55";
    for url in [
        format!("redis://shop:{SECRET}@127.0.0.1:1/0"),
        format!("redis://shop:{SECRET}@127.0.0.1:notaport/0"),
        format!("rediss://:{SECRET}@127.0.0.1:1"),
        format!("postgres://shop:{SECRET}@127.0.0.1/shop"),
    ] {
        for option in ["--log", "--store"] {
            let output = orders(&["--orders", "5", option, &url])?;
            let told = String::from_utf8_lossy(&output.stderr);
            if output.status.success() || told.contains(SECRET) {
                return Err(Violation::new(format!("{option}: {}: {told}", output.status)));
            }
        }
    }
    Ok(())
}
