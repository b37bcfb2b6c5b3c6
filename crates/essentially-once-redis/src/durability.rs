//! Whether what the server acknowledges survives its crash.

use std::collections::HashMap;

use essentially_once::{Error, backend::Durability};

use crate::{error::read_failed, server::Link};

/// Asks the server how it is set up now.
///
/// # Errors
/// [`Error::Unavailable`], also while fewer replicas are connected than are waited for;
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
                "{} does not tell its settings ({refusal}): grant the user `config|get`, or see to `appendonly yes` and \
                 `appendfsync always` yourself",
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
                    "{} does not tell its replicas ({refusal}): grant the user `info`",
                    link.server
                )));
            }
        };
        let connected = connected_replicas(&info);
        if connected < min.replicas {
            let why = format!(
                "{connected} replicas are connected, and `min_replicas` asks for {}: connect more",
                min.replicas
            );
            // A replica that is away comes back; only a setting stays as it is.
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

/// The inner error is a refusal that another set-up of the server would lift.
async fn ask<T: redis::FromRedisValue>(
    link: &Link,
    command: &redis::Cmd,
    action: &str,
) -> Result<Result<T, redis::RedisError>, Error> {
    let mut connection = link.connection().await?;
    match command.query_async(&mut connection).await {
        Ok(answer) => Ok(Ok(answer)),
        // Servers of cloud providers have no such command at all.
        Err(error) if matches!(error.code(), Some("NOPERM" | "ERR")) => Ok(Err(error)),
        Err(error) => {
            link.check(&error);
            Err(read_failed(link.server.on(action), error))
        }
    }
}

/// What is missing, each with the setting and the value that it must have.
fn shortcomings(settings: &HashMap<String, String>) -> Vec<String> {
    let setting = |name: &str| settings.get(name).map_or("unknown", String::as_str);
    let mut missing = Vec::new();
    match (setting("appendonly"), setting("appendfsync")) {
        ("yes", "always") => {}
        ("yes", fsync) => missing.push(format!(
            "appendfsync is {fsync}, so that a crash loses a second or more of what was acknowledged: set `appendfsync always`"
        )),
        (appendonly, _) => missing.push(format!(
            "appendonly is {appendonly}, so that a crash loses what came after the last snapshot: set `appendonly yes` and \
             `appendfsync always`"
        )),
    }
    if setting("no-appendfsync-on-rewrite") == "yes" {
        missing.push(
            "no-appendfsync-on-rewrite is yes, so that nothing is synced while the file is rewritten: set \
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
