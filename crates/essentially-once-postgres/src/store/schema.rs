//! Creates and migrates this crate's tables, in a schema of their own.

use std::sync::Arc;

use essentially_once::Error;

use crate::{
    connection::{Pool, Session},
    error::Fault,
};

/// Each entry migrates a schema from the version of its index to the next one. `{s}` is replaced by
/// the schema.
const MIGRATIONS: &[&str] = &[
    // A u64 is stored as the bigint with the same bits. Names compare by their bytes. `next` is one
    // past the last record ever appended, and `earliest` is the first that retention left.
    "CREATE TABLE {s}.logs (
         id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
         name text COLLATE \"C\" NOT NULL UNIQUE,
         incarnation text COLLATE \"C\" NOT NULL,
         next bigint NOT NULL DEFAULT 0,
         earliest bigint NOT NULL DEFAULT 0,
         keep_records bigint,
         keep_age_ms bigint,
         sender text COLLATE \"C\"
     );
     CREATE TABLE {s}.records (
         log bigint NOT NULL,
         \"offset\" bigint NOT NULL,
         appended_at timestamptz NOT NULL DEFAULT date_trunc('milliseconds', clock_timestamp()),
         key bytea,
         headers bytea,
         payload bytea NOT NULL,
         producer text COLLATE \"C\",
         sequence bigint,
         PRIMARY KEY (log, \"offset\")
     );
     CREATE TABLE {s}.consumers (
         consumer text COLLATE \"C\" PRIMARY KEY,
         log text COLLATE \"C\" NOT NULL,
         incarnation text COLLATE \"C\",
         next_hi bigint NOT NULL,
         next_lo bigint NOT NULL,
         epoch bigint NOT NULL,
         count bigint NOT NULL,
         owner text COLLATE \"C\",
         note bytea,
         journal bytea
     );
     CREATE TABLE {s}.pulses (
         consumer text COLLATE \"C\" PRIMARY KEY,
         beats bigint NOT NULL
     );
     CREATE TABLE {s}.windows (
         consumer text COLLATE \"C\",
         producer text COLLATE \"C\",
         bits bytea NOT NULL,
         PRIMARY KEY (consumer, producer)
     );
     CREATE TABLE {s}.state (
         consumer text COLLATE \"C\",
         key bytea,
         value bytea NOT NULL,
         PRIMARY KEY (consumer, key)
     );
     CREATE TABLE {s}.letters (
         consumer text COLLATE \"C\",
         place bytea,
         offset_hi bigint NOT NULL,
         offset_lo bigint NOT NULL,
         appended_at bigint NOT NULL,
         key bytea,
         headers bytea,
         payload bytea NOT NULL,
         producer text COLLATE \"C\",
         sequence bigint,
         malformed bytea,
         tries bigint NOT NULL,
         first_reason bytea NOT NULL,
         last_reason bytea NOT NULL,
         parked_at bigint NOT NULL,
         last_failed_at bigint NOT NULL,
         due_at bigint,
         version bigint NOT NULL,
         edit bytea,
         PRIMARY KEY (consumer, place)
     );
     CREATE INDEX letters_by_key ON {s}.letters (consumer, substring(key FROM 1 FOR 1024), place)
         WHERE key IS NOT NULL AND malformed IS NULL;
     CREATE INDEX letters_by_due ON {s}.letters (consumer, due_at, place) WHERE due_at IS NOT NULL;",
];

/// What the schema holds.
enum Found {
    Nothing,
    /// Tables, but not those of this crate.
    OthersTables,
    Version(i64),
}

/// Migrates the schema in one transaction. Several processes may do this concurrently. With
/// [`existing`](crate::PgOptions::existing) it only checks the version.
pub(crate) async fn open(pool: &Arc<Pool>) -> Result<(), Error> {
    let schema = &pool.options.schema;
    let action = || pool.on(format!("open schema {schema}"));
    let mut session = pool.take(action).await?;
    let known = MIGRATIONS.len() as i64;
    let failed = |fault: Fault| fault.of_read(action());
    let found = pool.within(look(&mut session, schema)).await.map_err(failed)?;
    match found {
        Found::Version(version) if version == known => return Ok(()),
        found => check(&found, schema, pool.options.existing, action)?,
    }
    // Its answer may be lost after the server committed, which the next attempt finds.
    pool.within(session.batch("BEGIN")).await.map_err(failed)?;
    let migrated = async {
        // Another process may be migrating the schema.
        let lock = "SELECT pg_advisory_xact_lock(hashtextextended($1, 0))";
        let name = format!("essentially_once schema {schema}");
        pool.within(session.query_own(lock, &[&name])).await.map_err(failed)?;
        let found = pool.within(look(&mut session, schema)).await.map_err(failed)?;
        check(&found, schema, false, action)?;
        let version = match found {
            Found::Version(version) => usize::try_from(version).unwrap_or(0),
            _ => 0,
        };
        pool.within(migrate(&mut session, schema, version))
            .await
            .map_err(failed)
    }
    .await;
    match &migrated {
        Ok(()) => pool.within(session.batch("COMMIT")).await.map_err(failed)?,
        // The error is the one to report. A session that does not answer is closed.
        Err(_) => drop(pool.within(session.batch("ROLLBACK")).await),
    }
    migrated
}

async fn migrate(session: &mut Session, schema: &str, version: usize) -> Result<(), Fault> {
    if version == 0 {
        // `IF NOT EXISTS` needs the right to create one even if it exists.
        let count = "SELECT count(*) FROM pg_catalog.pg_namespace WHERE nspname = $1";
        if session.query_own(count, &[&schema]).await?[0].get::<_, i64>(0) == 0 {
            session.batch("CREATE SCHEMA {s}").await?;
        }
        let meta = "CREATE TABLE {s}.meta (name text COLLATE \"C\" PRIMARY KEY, value bigint NOT NULL)";
        session.batch(meta).await?;
    }
    for migration in &MIGRATIONS[version.min(MIGRATIONS.len())..] {
        session.batch(migration).await?;
    }
    let put = format!(
        "INSERT INTO {{s}}.meta (name, value) VALUES ('schema', {}) ON CONFLICT (name) DO UPDATE SET value = excluded.value",
        MIGRATIONS.len()
    );
    session.batch(&put).await
}

async fn look(session: &mut Session, schema: &str) -> Result<Found, Fault> {
    let tables = "SELECT count(*), count(*) FILTER (WHERE relname = 'meta') \
         FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = relnamespace \
         WHERE nspname = $1 AND relkind IN ('r', 'v', 'm', 'p', 'f')";
    let row = session.query_own(tables, &[&schema]).await?;
    let (tables, metas): (i64, i64) = (row[0].get(0), row[0].get(1));
    if metas == 0 {
        return Ok(if tables == 0 {
            Found::Nothing
        } else {
            Found::OthersTables
        });
    }
    // Somebody else's table of that name may have other columns.
    let is_ours = "SELECT count(*) FROM pg_catalog.pg_attribute a JOIN pg_catalog.pg_class c ON c.oid = attrelid \
         JOIN pg_catalog.pg_namespace n ON n.oid = relnamespace \
         WHERE nspname = $1 AND relname = 'meta' AND attname IN ('name', 'value')";
    let columns: i64 = session.query_own(is_ours, &[&schema]).await?[0].get(0);
    if columns != 2 {
        return Ok(Found::OthersTables);
    }
    let version = "SELECT value::bigint FROM {s}.meta WHERE name = 'schema'";
    let rows = session.query_own(version, &[]).await?;
    Ok(rows
        .first()
        .map_or(Found::OthersTables, |row| Found::Version(row.get(0))))
}

fn check(found: &Found, schema: &str, must_exist: bool, action: impl Fn() -> String) -> Result<(), Error> {
    let known = MIGRATIONS.len() as i64;
    let reason = match found {
        Found::Version(version) if !(1..=known).contains(version) => format!(
            "the schema has version {version}, but this program supports versions up to {known}; use a newer \
             essentially-once-postgres, or another schema"
        ),
        Found::Version(version) if must_exist && *version < known => format!(
            "the schema has version {version}, and this program would have to migrate it to {known}; upgrade the services \
             that use it first"
        ),
        Found::OthersTables => {
            format!("schema {schema} holds tables that are not of this crate; choose another `schema`")
        }
        Found::Nothing if must_exist => {
            "the schema does not exist or is empty; check the database in the URL, and the `schema`".into()
        }
        _ => return Ok(()),
    };
    Err(Error::failed(action(), reason))
}
