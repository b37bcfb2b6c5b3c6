//! Whether acknowledged records survive a crash of brokers.

use std::collections::HashMap;

use essentially_once::{Error, backend::Durability};
use rdkafka::{
    admin::{AdminOptions, ResourceSpecifier},
    consumer::Consumer as _,
};

use super::Cluster;
use crate::error::{Fault, read_failed};

/// Reads the topic's settings and the number of replicas.
pub(crate) async fn durability(cluster: &Cluster, topic: &str, partition: i32) -> Result<Durability, Error> {
    let action = || cluster.on(format!("read durability of topic {topic}"));
    let name = topic.to_owned();
    let replicas = cluster.ask(move |client, timeout| {
        let metadata = client.fetch_metadata(Some(&name), timeout)?;
        let topic = metadata.topics().first();
        let partition = topic.and_then(|topic| topic.partitions().iter().find(|found| found.id() == partition));
        Ok(partition.map(|partition| partition.replicas().len()))
    });
    let replicas = replicas.await.map_err(|fault| read_failed(action(), fault))?;
    let admin = cluster.admin()?;
    let options = AdminOptions::new().request_timeout(Some(cluster.options.timeout));
    let described = admin
        .describe_configs([&ResourceSpecifier::Topic(topic)], &options)
        .await;
    let described =
        described.map_err(|error| read_failed(action(), Fault::new(error, admin.inner().context().complaint())))?;
    let settings = match described.into_iter().next() {
        Some(Ok(resource)) => resource
            .entries
            .into_iter()
            .map(|entry| (entry.name, entry.value))
            .collect(),
        Some(Err(code)) => {
            return Ok(Durability::Unknown(format!(
                "the topic's settings cannot be read ({code}); grant the user DescribeConfigs on topic {topic}"
            )));
        }
        None => HashMap::new(),
    };
    Ok(judge(replicas, &settings))
}

/// Kafka answers before a record is on a disk, unless `flush.messages` is 1. Otherwise a record is
/// safe only if there is another replica.
fn judge(replicas: Option<usize>, settings: &HashMap<String, Option<String>>) -> Durability {
    let setting = |name: &str| settings.get(name).and_then(Option::as_deref);
    let is_compacted = setting("cleanup.policy").is_some_and(|policy| policy.contains("compact"));
    if is_compacted {
        return Durability::Volatile(
            "the topic is compacted, which removes records that were not handled; set `cleanup.policy=delete`".into(),
        );
    }
    if setting("flush.messages") == Some("1") {
        return Durability::Durable;
    }
    let mut missing = Vec::new();
    let mut unknown = Vec::new();
    match replicas {
        Some(replicas) if replicas < 2 => missing.push(
            "the partition has one replica, whose broker answers before the record is on the disk; \
             have two or more, or set `flush.messages=1`",
        ),
        Some(_) => {}
        None => unknown.push("the number of replicas"),
    }
    match setting("min.insync.replicas").map(str::parse::<u32>) {
        Some(Ok(replicas)) if replicas < 2 => {
            missing.push("one replica is enough to acknowledge a record; set `min.insync.replicas=2`");
        }
        Some(Ok(_)) => {}
        _ => unknown.push("`min.insync.replicas`"),
    }
    match setting("unclean.leader.election.enable") {
        Some("true") => missing.push(
            "a replica that lacks acknowledged records can become the leader; set `unclean.leader.election.enable=false`",
        ),
        Some(_) => {}
        None => unknown.push("`unclean.leader.election.enable`"),
    }
    match (missing.is_empty(), unknown.is_empty()) {
        (true, true) => Durability::Durable,
        (true, false) => Durability::Unknown(format!("the broker does not show {}", unknown.join(" and "))),
        (false, _) => Durability::Volatile(missing.join(", and ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_setting_that_loses_records_is_named() {
        let with = |replicas, changes: &[(&str, &str)]| {
            let sound = [
                ("min.insync.replicas", "2"),
                ("unclean.leader.election.enable", "false"),
            ];
            let all = sound.iter().chain(changes);
            judge(
                replicas,
                &all.map(|(name, value)| ((*name).to_owned(), Some((*value).to_owned())))
                    .collect(),
            )
        };
        assert_eq!(with(Some(3), &[]), Durability::Durable);
        assert_eq!(with(Some(1), &[("flush.messages", "1")]), Durability::Durable);
        for (replicas, change, named) in [
            (1, ("a", "b"), "flush.messages=1"),
            (3, ("min.insync.replicas", "1"), "min.insync.replicas=2"),
            (
                3,
                ("unclean.leader.election.enable", "true"),
                "unclean.leader.election.enable=false",
            ),
            (3, ("cleanup.policy", "compact,delete"), "cleanup.policy=delete"),
        ] {
            match with(Some(replicas), &[change]) {
                Durability::Volatile(why) => assert!(why.contains(named), "{why}"),
                other => panic!("{change:?}: {other:?}"),
            }
        }
        for unknown in [with(None, &[]), judge(Some(3), &HashMap::new())] {
            assert!(matches!(unknown, Durability::Unknown(_)), "{unknown:?}");
        }
    }
}
