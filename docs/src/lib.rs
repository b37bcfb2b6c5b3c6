//! Compiles the code of every Markdown page: `cargo test -p docs --doc`.

macro_rules! pages {
    ($($name:ident: $path:literal,)+) => {$(
        #[cfg(doctest)]
        #[doc = include_str!(concat!("../../", $path))]
        pub struct $name;
    )+};
}

pages! {
    Readme: "README.md",
    Backends: "docs/backends.md",
    Benchmarks: "docs/benchmarks.md",
    Failures: "docs/failures.md",
    Guarantees: "docs/guarantees.md",
    Operating: "docs/operating.md",
    Operations: "docs/operations.md",
    Sending: "docs/sending.md",
    Examples: "examples/README.md",
    Cli: "crates/essentially-once-cli/README.md",
    Core: "crates/essentially-once/README.md",
    Kafka: "crates/essentially-once-kafka/README.md",
    Postgres: "crates/essentially-once-postgres/README.md",
    Rabbitmq: "crates/essentially-once-rabbitmq/README.md",
    Redis: "crates/essentially-once-redis/README.md",
    Sqlite: "crates/essentially-once-sqlite/README.md",
    Testkit: "crates/essentially-once-testkit/README.md",
}

#[cfg(test)]
mod tests {
    #[test]
    fn alerts_name_metrics_that_exist() {
        let alerts = include_str!("../alerts.yml");
        let source = include_str!("../../crates/essentially-once/src/consumer/report.rs");
        let words = alerts.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        let metrics: Vec<_> = words.filter(|word| word.starts_with("essentially_once_")).collect();
        assert!(metrics.len() >= 7, "{metrics:?}");
        for metric in metrics {
            assert!(
                source.contains(&format!("\"{metric}\"")),
                "no metric is called {metric}"
            );
        }
    }
}
