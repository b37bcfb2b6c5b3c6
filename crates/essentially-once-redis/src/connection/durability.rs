//! Whether acknowledged writes survive a crash of the server.

use std::collections::HashMap;

use essentially_once::{Error, backend::Durability};

use crate::{connection::link::Link, error::read_failed};

/// Reads the server's current settings.
///
/// # Errors
/// [`Error::Unavailable`], also while fewer replicas are connected than `min_replicas` requires;
/// [`Error::Failed`].
pub(crate) async fn durability(link: &Link) -> Result<Durability, Error> {
    let mut command = redis::cmd("CONFIG");
    command.arg("GET").arg(&[
        "appendonly",
        "appendfsync",
        "no-appendfsync-on-rewrite",
        "maxmemory",
        "maxmemory-policy",
    ]);
    let settings: HashMap<String, String> = match ask(link, &command, "read settings").await? {
        Ok(settings) => settings,
        Err(refusal) => {
            return Ok(Durability::Unknown(format!(
                "{} does not show its settings ({refusal}): grant the user `config|get`, or make sure yourself that it runs \
                 with `appendonly yes` and `appendfsync always`",
                link.server
            )));
        }
    };
    let mut missing = shortcomings(&settings);
    if let Some(min) = link.server.options.min_replicas {
        let mut command = redis::cmd("INFO");
        command.arg("replication");
        let info: String = match ask(link, &command, "count replicas").await? {
            Ok(info) => info,
            Err(refusal) => {
                return Ok(Durability::Unknown(format!(
                    "{} does not show its replicas ({refusal}): grant the user `info`",
                    link.server
                )));
            }
        };
        let connected = connected_replicas(&info);
        if connected < min.replicas {
            let why = format!(
                "{connected} replicas are connected, and `min_replicas` requires {}: connect more",
                min.replicas
            );
            // A replica can come back. A setting stays as it is.
            if missing.is_empty() {
                return Err(Error::unavailable(link.server.on("count replicas"), why));
            }
            missing.push(why);
        }
    }
    match missing.is_empty() {
        true => Ok(Durability::Durable),
        false => Ok(Durability::Volatile(format!("{}: {}", link.server, missing.join("; ")))),
    }
}

/// The inner error is a refusal that other settings of the server would lift.
async fn ask<T: redis::FromRedisValue>(
    link: &Link,
    command: &redis::Cmd,
    action: &str,
) -> Result<Result<T, redis::RedisError>, Error> {
    let mut connection = link.connection().await?;
    match command.query_async(&mut connection).await {
        Ok(answer) => Ok(Ok(answer)),
        // Some cloud providers do not offer the command at all.
        Err(error) if matches!(error.code(), Some("NOPERM" | "ERR")) => Ok(Err(error)),
        Err(error) => {
            link.check(&error);
            Err(read_failed(link.server.on(action), error))
        }
    }
}

/// What is missing for durability, each with the setting to change and its value.
fn shortcomings(settings: &HashMap<String, String>) -> Vec<String> {
    let setting = |name: &str| settings.get(name).map_or("unknown", String::as_str);
    let mut missing = Vec::new();
    match (setting("appendonly"), setting("appendfsync")) {
        ("yes", "always") => {}
        ("yes", fsync) => missing.push(format!(
            "appendfsync is {fsync}, so a crash loses a second or more of acknowledged writes: set `appendfsync always`"
        )),
        (appendonly, _) => missing.push(format!(
            "appendonly is {appendonly}, so a crash loses everything since the last snapshot: set `appendonly yes` and \
             `appendfsync always`"
        )),
    }
    if setting("no-appendfsync-on-rewrite") == "yes" {
        missing.push(
            "no-appendfsync-on-rewrite is yes, so nothing is synced while the append-only file is rewritten: set \
             `no-appendfsync-on-rewrite no`"
                .into(),
        );
    }
    let policy = setting("maxmemory-policy");
    if setting("maxmemory") != "0" && policy.starts_with("allkeys-") {
        missing.push(format!(
            "maxmemory-policy is {policy}, which evicts positions and logs: set `maxmemory-policy noeviction` or one of `volatile-*`"
        ));
    }
    missing
}

fn connected_replicas(info: &str) -> u32 {
    info.lines()
        .find_map(|line| line.strip_prefix("connected_slaves:")?.trim().parse().ok())
        .unwrap_or(0)
}
