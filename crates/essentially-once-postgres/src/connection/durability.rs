//! Whether acknowledged commits survive a crash of the server.

use std::{collections::HashMap, sync::Arc};

use essentially_once::{Error, backend::Durability};

use super::Pool;

const SETTINGS: &str = "SELECT name, setting FROM pg_catalog.pg_settings \
     WHERE name IN ('fsync', 'full_page_writes', 'synchronous_commit', 'synchronous_standby_names')";

/// The settings that decide about durability, by name.
pub(crate) async fn settings(pool: &Arc<Pool>) -> Result<HashMap<String, String>, Error> {
    let action = || pool.on("read settings");
    let mut session = pool.take(action).await?;
    let rows = pool.within(session.query_own(SETTINGS, &[])).await;
    let rows = rows.map_err(|fault| fault.of_read(action()))?;
    Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
}

/// Reads the server's current settings.
///
/// # Errors
/// [`Error::Unavailable`], [`Error::Failed`].
pub(crate) async fn durability(pool: &Arc<Pool>) -> Result<Durability, Error> {
    Ok(judge(&settings(pool).await?))
}

fn judge(settings: &HashMap<String, String>) -> Durability {
    let is = |name: &str, value: &str| settings.get(name).is_some_and(|setting| setting == value);
    let mut missing = Vec::new();
    if is("fsync", "off") {
        missing.push("the server does not sync its files; set `fsync = on`");
    }
    if is("full_page_writes", "off") {
        missing.push("a power failure can tear a page; set `full_page_writes = on`");
    }
    if is("synchronous_commit", "off") {
        missing.push("commits return before they are on the disk; set `synchronous_commit = on`");
    }
    match (missing.is_empty(), settings.contains_key("fsync")) {
        (true, true) => Durability::Durable,
        (true, false) => Durability::Unknown("the server does not show its setting `fsync`".into()),
        (false, _) => Durability::Volatile(missing.join(", and ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_setting_that_loses_commits_is_named() {
        let with = |changes: &[(&str, &str)]| {
            let sound = [
                ("fsync", "on"),
                ("full_page_writes", "on"),
                ("synchronous_commit", "on"),
            ];
            let all = sound.iter().chain(changes);
            judge(
                &all.map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
                    .collect(),
            )
        };
        assert_eq!(with(&[]), Durability::Durable);
        assert_eq!(with(&[("synchronous_commit", "remote_apply")]), Durability::Durable);
        for name in ["fsync", "full_page_writes", "synchronous_commit"] {
            match with(&[(name, "off")]) {
                Durability::Volatile(why) => assert!(why.contains(&format!("`{name} = on`")), "{why}"),
                other => panic!("{name}: {other:?}"),
            }
        }
        assert!(matches!(judge(&HashMap::new()), Durability::Unknown(_)));
    }
}
