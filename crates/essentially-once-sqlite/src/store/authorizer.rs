//! Keeps a handler's SQL from ending its transaction and from changing this crate's tables.
//!
//! SQLite calls the authorizer when it prepares a statement. A prepared statement therefore carries
//! the rights of the code that prepared it, and [`Prepared`] keeps a handler's statements apart
//! from those of this crate.
//!
//! The authorizer does not see everything. SQLite does not pass it the new name of a renamed table
//! or the parent of a foreign key, so this module first searches the text of a new statement for
//! the crate's prefix.

use std::sync::{
    Arc,
    atomic::{AtomicU8, Ordering},
};

use rusqlite::{
    Connection, Statement,
    hooks::{AuthAction, AuthContext, Authorization},
};

use crate::{connection::prepared::Prepared, store::schema::PREFIX};

/// A handler's SQL is running.
const NATIVE: u8 = 1;
/// The SQL contains this crate's prefix.
const NAMES_US: u8 = 2;
/// The SQL contains the word REFERENCES.
const REFERENCES: u8 = 4;
/// The SQL drops a table, so SQLite itself deletes the table's row in `sqlite_sequence`.
const DROPS: u8 = 8;
/// The SQL alters a table, so SQLite itself may rename the table's row in `sqlite_sequence`.
const ALTERS: u8 = 16;

/// Informs the authorizer whose SQL is being prepared, and what its text contains.
#[derive(Clone, Default)]
pub(crate) struct Guard {
    state: Arc<AtomicU8>,
}

impl Guard {
    /// Installs the authorizer. Call it once, because setting an authorizer expires all prepared
    /// statements.
    pub(crate) fn install(&self, connection: &mut Connection) -> rusqlite::Result<()> {
        let state = Arc::clone(&self.state);
        connection.authorizer(Some(move |context: AuthContext<'_>| {
            let known = state.load(Ordering::Relaxed);
            if known & NATIVE == 0 {
                return Authorization::Allow;
            }
            if is_denied(&context.action, known) {
                return Authorization::Deny;
            }
            match context.action {
                AuthAction::DropTable { .. } | AuthAction::DropTempTable { .. } => {
                    state.store(known | DROPS, Ordering::Relaxed);
                }
                AuthAction::AlterTable { .. } => state.store(known | ALTERS, Ordering::Relaxed),
                _ => {}
            }
            Authorization::Allow
        }))
    }

    /// Runs a handler's SQL under the authorizer's restrictions. They also hold while the statement
    /// runs, because a schema change makes SQLite prepare it again.
    pub(crate) fn run<T>(
        &self,
        connection: &mut Prepared,
        sql: &str,
        run: impl FnOnce(&mut Statement<'_>) -> rusqlite::Result<T>,
    ) -> rusqlite::Result<T> {
        let on_guard = OnGuard::new(&self.state);
        // The text is searched only before the first preparation. A cached statement has passed
        // already.
        connection.run_native(sql, || on_guard.know(text_of(sql)), run)
    }
}

/// Lifts the restrictions on drop, even if a handler's closure panics.
struct OnGuard<'a>(&'a AtomicU8);

impl<'a> OnGuard<'a> {
    fn new(state: &'a AtomicU8) -> Self {
        state.store(NATIVE, Ordering::Relaxed);
        Self(state)
    }

    fn know(&self, text: u8) {
        self.0.store(NATIVE | text, Ordering::Relaxed);
    }
}

impl Drop for OnGuard<'_> {
    fn drop(&mut self) {
        self.0.store(0, Ordering::Relaxed);
    }
}

/// Searches the text. Quotes in a SQL name are doubled and there are no other escapes, so a name
/// appears literally.
fn text_of(sql: &str) -> u8 {
    let contains = |word: &str| {
        sql.as_bytes()
            .windows(word.len())
            .any(|part| part.eq_ignore_ascii_case(word.as_bytes()))
    };
    let mut text = 0;
    if contains(stem()) {
        text |= NAMES_US;
        if contains("references") {
            text |= REFERENCES;
        }
    }
    text
}

/// Pragmas that take an argument but set nothing, or nothing that outlives the transaction.
const HARMLESS_PRAGMAS: &[&str] = &[
    "defer_foreign_keys",
    "foreign_key_check",
    "foreign_key_list",
    "index_info",
    "index_list",
    "index_xinfo",
    "integrity_check",
    "quick_check",
    "table_info",
    "table_list",
    "table_xinfo",
];

/// Functions that load code or settings into the connection. SQLite disables them by default.
const DANGEROUS_FUNCTIONS: &[&str] = &["fts3_tokenizer", "load_extension"];

/// A virtual table that exposes the file's pages, if SQLite was built with it.
const PAGES: &str = "sqlite_dbpage";

const SEQUENCES: &str = "sqlite_sequence";

/// Judges every action. Unknown actions are denied.
fn is_denied(action: &AuthAction<'_>, known: u8) -> bool {
    match *action {
        AuthAction::Select
        | AuthAction::Read { .. }
        | AuthAction::Recursive
        | AuthAction::Savepoint { .. }
        // Neither changes a table's content.
        | AuthAction::Analyze { .. }
        | AuthAction::Reindex { .. } => false,

        AuthAction::Transaction { .. } | AuthAction::Attach { .. } | AuthAction::Detach { .. } => true,

        AuthAction::Pragma {
            pragma_name,
            pragma_value,
        } => is_pragma_denied(pragma_name, pragma_value),

        AuthAction::Function { function_name } => is_one_of(function_name, DANGEROUS_FUNCTIONS),

        AuthAction::Insert { table_name } => is_ours(table_name) || is_one_of(table_name, &[SEQUENCES, PAGES]),
        AuthAction::Update { table_name, .. } => {
            is_ours(table_name)
                || is_one_of(table_name, &[PAGES])
                || (known & ALTERS == 0 && is_one_of(table_name, &[SEQUENCES]))
        }
        AuthAction::Delete { table_name } => {
            is_ours(table_name)
                || is_one_of(table_name, &[PAGES])
                || (known & DROPS == 0 && is_one_of(table_name, &[SEQUENCES]))
        }

        // Only the text shows the parent of a foreign key, which would keep this crate from
        // deleting rows.
        AuthAction::CreateTable { table_name } | AuthAction::CreateTempTable { table_name } => {
            is_ours(table_name) || known & REFERENCES != 0
        }
        // Only the text shows a table's new name, or a foreign key of a new column.
        AuthAction::AlterTable { table_name, .. } => is_ours(table_name) || known & NAMES_US != 0,
        // Its shadow tables take its name: `essentially_once` would create `essentially_once_data`.
        AuthAction::CreateVtable { table_name, .. } => is_ours(table_name) || table_name.eq_ignore_ascii_case(stem()),

        AuthAction::DropTable { table_name: name }
        | AuthAction::DropTempTable { table_name: name }
        | AuthAction::DropVtable { table_name: name, .. }
        | AuthAction::CreateView { view_name: name }
        | AuthAction::CreateTempView { view_name: name }
        | AuthAction::DropView { view_name: name }
        | AuthAction::DropTempView { view_name: name } => is_ours(name),

        // Tables and indexes share a namespace, so an index could block the name of a future table.
        AuthAction::CreateIndex {
            index_name: name,
            table_name,
        }
        | AuthAction::CreateTempIndex {
            index_name: name,
            table_name,
        }
        | AuthAction::DropIndex {
            index_name: name,
            table_name,
        }
        | AuthAction::DropTempIndex {
            index_name: name,
            table_name,
        }
        | AuthAction::CreateTrigger {
            trigger_name: name,
            table_name,
        }
        | AuthAction::CreateTempTrigger {
            trigger_name: name,
            table_name,
        }
        | AuthAction::DropTrigger {
            trigger_name: name,
            table_name,
        }
        | AuthAction::DropTempTrigger {
            trigger_name: name,
            table_name,
        } => is_ours(name) || is_ours(table_name),

        AuthAction::Unknown { .. } => true,
        // An action that a later version of rusqlite adds.
        _ => true,
    }
}

fn is_pragma_denied(name: &str, value: Option<&str>) -> bool {
    // A checkpoint fails within a transaction as if the file were locked, with or without an
    // argument.
    is_one_of(name, &["wal_checkpoint"]) || (value.is_some() && !is_one_of(name, HARMLESS_PRAGMAS))
}

fn is_one_of(name: &str, names: &[&str]) -> bool {
    names.iter().any(|one| name.eq_ignore_ascii_case(one))
}

fn is_ours(name: &str) -> bool {
    name.as_bytes()
        .get(..PREFIX.len())
        .is_some_and(|start| start.eq_ignore_ascii_case(PREFIX.as_bytes()))
}

/// The prefix without its last underscore.
fn stem() -> &'static str {
    PREFIX.trim_end_matches('_')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guarded() -> (Guard, Prepared) {
        let mut connection = Connection::open_in_memory().expect("open");
        connection
            .execute_batch(
                "CREATE TABLE t (x UNIQUE);
                 CREATE TABLE mine (id INTEGER PRIMARY KEY AUTOINCREMENT, x);
                 INSERT INTO mine (x) VALUES (1);
                 CREATE TABLE essentially_once_state (x);
                 CREATE TABLE essentially_once_logs (id INTEGER PRIMARY KEY AUTOINCREMENT, x);
                 CREATE INDEX essentially_once_i ON essentially_once_logs (x);
                 CREATE TRIGGER essentially_once_r AFTER INSERT ON essentially_once_logs BEGIN SELECT 1; END;
                 CREATE VIEW essentially_once_v AS SELECT 1;
                 CREATE VIRTUAL TABLE searched USING fts5(x);
                 CREATE TEMP TABLE scratch (x);
                 CREATE TABLE counts (x);
                 CREATE TRIGGER insert_counts AFTER INSERT ON counts
                     BEGIN INSERT INTO sqlite_sequence VALUES ('x', 1); END;
                 CREATE TRIGGER delete_counts AFTER DELETE ON counts
                     BEGIN UPDATE sqlite_sequence SET seq = 0; END;
                 CREATE VIEW through AS SELECT 1;
                 CREATE TRIGGER insert_through INSTEAD OF INSERT ON through
                     BEGIN DELETE FROM essentially_once_state; END;
                 CREATE TABLE cascades (x PRIMARY KEY);
                 CREATE TABLE cascaded (x REFERENCES cascades ON DELETE CASCADE);
                 CREATE TRIGGER delete_cascaded AFTER DELETE ON cascaded
                     BEGIN DELETE FROM essentially_once_state; END;
                 INSERT INTO essentially_once_logs (x) VALUES (1);
                 BEGIN",
            )
            .expect("schema");
        let guard = Guard::default();
        guard.install(&mut connection).expect("install");
        (guard, Prepared::new(connection))
    }

    #[test]
    fn a_handlers_sql_cannot_end_the_transaction_or_reach_outside() {
        let (guard, mut connection) = guarded();
        for sql in [
            "COMMIT",
            "  commit  ",
            "END",
            "ROLLBACK",
            "BEGIN",
            "/*essentially-once*/ COMMIT",
            "ATTACH 'other.db' AS other",
            "DETACH main",
            "VACUUM INTO 'copy.db'",
            "PRAGMA synchronous = OFF",
            "PRAGMA journal_mode(DELETE)",
            "PRAGMA writable_schema = ON",
            "PRAGMA user_version = 3",
            "INSERT INTO t VALUES (9); COMMIT",
            "INSERT INTO essentially_once_state VALUES (1)",
            "/*essentially-once*/ INSERT INTO essentially_once_state VALUES (1)",
            "UPDATE Essentially_Once_State SET x = 1",
            "DELETE FROM main.essentially_once_state",
            "DROP TABLE essentially_once_state",
            "ALTER TABLE essentially_once_state ADD COLUMN y",
            "CREATE INDEX i ON essentially_once_state (x)",
            "CREATE TRIGGER r AFTER INSERT ON essentially_once_state BEGIN SELECT 1; END",
            "CREATE TEMP TRIGGER r AFTER INSERT ON essentially_once_state BEGIN SELECT 1; END",
            "CREATE TEMP TABLE essentially_once_windows (x)",
            "PRAGMA wal_checkpoint",
            "PRAGMA main.wal_checkpoint(TRUNCATE)",
            "EXPLAIN COMMIT",
            "REPLACE INTO essentially_once_state VALUES (1)",
            "WITH one AS (SELECT 1) INSERT INTO essentially_once_state SELECT * FROM one",
            "SELECT load_extension('other.so')",
            "SELECT fts3_tokenizer('simple', x'00')",
            // Names that belong to this crate.
            "CREATE TABLE essentially_once_log_7 (x)",
            "CREATE TABLE [Essentially_Once_Log_7] AS SELECT 1",
            "CREATE VIEW essentially_once_log_7 AS SELECT 1",
            "CREATE TEMP VIEW essentially_once_logs2 AS SELECT 1",
            "CREATE UNIQUE INDEX essentially_once_log_7 ON mine (x)",
            "CREATE INDEX temp.essentially_once_log_7 ON scratch (x)",
            "CREATE TRIGGER essentially_once_r2 AFTER INSERT ON mine BEGIN SELECT 1; END",
            "CREATE TEMP TRIGGER essentially_once_r2 AFTER INSERT ON mine BEGIN SELECT 1; END",
            "CREATE VIRTUAL TABLE essentially_once_log_7 USING fts5(x)",
            "CREATE VIRTUAL TABLE essentially_once USING fts5(x)",
            "CREATE VIRTUAL TABLE Essentially_Once USING rtree(id, a, b)",
            "CREATE VIRTUAL TABLE temp.essentially_once USING fts5(x)",
            "ALTER TABLE mine RENAME TO essentially_once_log_2",
            "ALTER TABLE mine RENAME TO 'Essentially_Once_log_2'",
            "ALTER TABLE mine/**/RENAME/**/TO[essentially_once_log_2]",
            "ALTER TABLE searched RENAME TO essentially_once",
            "ALTER TABLE searched RENAME TO essentially_once_log_7",
            // This crate's objects.
            "ALTER TABLE essentially_once_state RENAME TO mine2",
            "ALTER TABLE essentially_once_state RENAME COLUMN x TO y",
            "ALTER TABLE essentially_once_logs DROP COLUMN x",
            "DROP INDEX essentially_once_i",
            "DROP TRIGGER essentially_once_r",
            "DROP VIEW essentially_once_v",
            // Foreign keys that would keep this crate from deleting rows.
            "CREATE TABLE child (x REFERENCES essentially_once_state (x))",
            "CREATE TABLE child (x, FOREIGN KEY (x) references \"Essentially_Once_State\" (x))",
            "CREATE TABLE IF NOT EXISTS child (x REFERENCES[essentially_once_log_9](\"offset\"))",
            "CREATE TEMP TABLE child (x REFERENCES essentially_once_state (x))",
            "ALTER TABLE mine ADD COLUMN y REFERENCES essentially_once_state (x)",
            // The AUTOINCREMENT counters.
            "INSERT INTO sqlite_sequence VALUES ('essentially_once_logs', 9)",
            "UPDATE sqlite_sequence SET seq = 0",
            "UPDATE main.SQLite_Sequence SET seq = 0 WHERE name = 'essentially_once_logs'",
            "DELETE FROM sqlite_sequence",
            "DELETE FROM sqlite_sequence WHERE name = 'mine'",
            "DROP TABLE mine; DELETE FROM sqlite_sequence",
            "DROP TABLE sqlite_sequence",
            "ALTER TABLE sqlite_sequence RENAME TO mine2",
            "CREATE INDEX i ON sqlite_sequence (seq)",
            "CREATE TRIGGER r AFTER UPDATE ON sqlite_sequence BEGIN SELECT 1; END",
            "INSERT INTO counts VALUES (1)",
            "DELETE FROM counts",
            "INSERT INTO through DEFAULT VALUES",
            "DELETE FROM cascades",
            // The schema table.
            "UPDATE sqlite_master SET sql = 'x'",
            "DELETE FROM sqlite_schema",
            "INSERT INTO sqlite_temp_master VALUES (1, 2, 3, 4, 5)",
        ] {
            // Twice, because a denied statement must not be found in the cache.
            for _ in 0..2 {
                let result = guard.run(&mut connection, sql, |statement| {
                    statement.query([])?.next().map(|_| ())
                });
                assert!(result.is_err(), "{sql}");
                assert!(!connection.is_autocommit(), "{sql}");
            }
        }
        let schema: i64 = connection
            .query_row(
                "SELECT count(*) FROM (SELECT name FROM sqlite_master UNION ALL SELECT name FROM sqlite_temp_master)
                 WHERE name LIKE 'essentially_once%'",
                [],
                |row| row.get(0),
            )
            .expect("count");
        assert_eq!(schema, 5, "only the objects from the setup");
    }

    #[test]
    fn an_allowed_statement_stays_allowed_after_a_schema_change() {
        let (guard, mut connection) = guarded();
        let add = "CREATE TABLE IF NOT EXISTS copy AS SELECT x FROM essentially_once_state";
        let alter = "ALTER TABLE t RENAME TO t";
        let insert = "INSERT INTO mine (x) VALUES (2)";
        for round in 0..3 {
            for sql in [add, insert] {
                guard
                    .run(&mut connection, sql, |statement| statement.execute([]))
                    .expect(sql);
            }
            let error = guard
                .run(&mut connection, alter, |statement| statement.execute([]))
                .expect_err("its own name")
                .to_string();
            assert!(!error.contains("not authorized"), "{error}");
            connection
                .execute_batch(&format!("CREATE TABLE other_{round} (x)"))
                .expect("schema");
        }
    }

    /// A trigger made by other code fires within a handler's statement.
    #[test]
    fn a_prepared_statement_is_denied_once_a_trigger_takes_it_to_our_tables() {
        let (guard, mut connection) = guarded();
        let insert = "INSERT INTO mine (x) VALUES (2)";
        let run = |connection: &mut Prepared| guard.run(connection, insert, |statement| statement.execute([]));
        run(&mut connection).expect("no trigger yet");
        connection
            .execute_batch("CREATE TRIGGER r AFTER INSERT ON mine BEGIN DELETE FROM essentially_once_state; END")
            .expect("trigger");
        for _ in 0..2 {
            assert!(run(&mut connection).is_err());
        }
        connection.execute_batch("DROP TRIGGER r").expect("drop");
        run(&mut connection).expect("allowed again");
    }

    #[test]
    fn a_handler_does_not_find_cached_internal_statements() {
        let (guard, mut connection) = guarded();
        let sql = "/*essentially-once*/ INSERT INTO essentially_once_state VALUES (1)";
        connection.run_internal(sql, |_| Ok(())).expect("internal");
        for sql in [sql.to_owned(), format!(" \n{sql} ")] {
            assert!(
                guard
                    .run(&mut connection, &sql, |statement| statement.execute([]))
                    .is_err()
            );
        }
        connection
            .run_internal(sql, |statement| statement.execute([]))
            .expect("this crate may run it");
    }

    #[test]
    fn ordinary_sql_is_allowed() {
        let (guard, mut connection) = guarded();
        for sql in [
            "INSERT INTO t VALUES (1) RETURNING x",
            "CREATE TABLE u (x)",
            "CREATE INDEX i ON u (x)",
            "ALTER TABLE u ADD COLUMN y",
            "SAVEPOINT s",
            "ROLLBACK TO s",
            "RELEASE s",
            "PRAGMA table_info(t)",
            "PRAGMA user_version",
            "PRAGMA defer_foreign_keys = ON",
            "SELECT * FROM essentially_once_state",
            "DROP TABLE IF EXISTS u",
            // AUTOINCREMENT: SQLite itself writes sqlite_sequence.
            "CREATE TABLE a (id INTEGER PRIMARY KEY AUTOINCREMENT, x UNIQUE, y REFERENCES t (x))",
            "INSERT INTO a (x) VALUES (1), (2)",
            "SELECT seq FROM sqlite_sequence WHERE name = 'a'",
            "ALTER TABLE a RENAME TO b",
            "ALTER TABLE b RENAME COLUMN x TO z",
            "ALTER TABLE b ADD COLUMN w DEFAULT 0",
            "ALTER TABLE b DROP COLUMN w",
            "INSERT INTO b (z) VALUES (1) ON CONFLICT (z) DO UPDATE SET z = 5",
            "REPLACE INTO b (z) VALUES (5)",
            "UPDATE b SET z = z + 1 RETURNING z",
            "CREATE TRIGGER r AFTER INSERT ON b BEGIN UPDATE t SET x = new.z; DELETE FROM t; END",
            "INSERT INTO b (z) VALUES (9)",
            "DROP TRIGGER r",
            "CREATE UNIQUE INDEX bi ON b (z) WHERE z > 1",
            "REINDEX b",
            "DROP INDEX bi",
            "DELETE FROM b",
            "DROP TABLE b",
            "SELECT seq FROM sqlite_sequence",
            "ALTER TABLE mine RENAME TO yours",
            "DROP TABLE yours",
            // Reading this crate's tables, in any way.
            "CREATE VIEW v AS SELECT x FROM essentially_once_state",
            "SELECT * FROM v",
            "CREATE TABLE copied AS SELECT * FROM essentially_once_state",
            "INSERT INTO t SELECT x FROM essentially_once_state",
            "CREATE TRIGGER r AFTER INSERT ON t BEGIN SELECT count(*) FROM essentially_once_state; END",
            "INSERT INTO t VALUES ('essentially_once_state references')",
            "CREATE TABLE \"references\" (x)",
            "DROP VIEW v",
            "WITH RECURSIVE n (x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n WHERE x < 5) SELECT sum(x) FROM n",
            "WITH n AS (SELECT 7) INSERT INTO t SELECT * FROM n",
            "SELECT json_extract('{\"a\":1}', '$.a'), max(x) OVER () FROM t",
            "SELECT name FROM pragma_table_info('t')",
            "SELECT name FROM sqlite_schema",
            "PRAGMA foreign_key_check",
            "EXPLAIN QUERY PLAN SELECT * FROM t",
            "ANALYZE",
            "ANALYZE t",
            "SELECT * FROM sqlite_stat1",
            // Temporary objects.
            "CREATE TEMP TABLE heap (id INTEGER PRIMARY KEY AUTOINCREMENT, x)",
            "INSERT INTO heap (x) VALUES (1)",
            "CREATE INDEX temp.heap_i ON heap (x)",
            "CREATE TEMP VIEW w AS SELECT * FROM heap",
            "CREATE TEMP TRIGGER s AFTER INSERT ON t BEGIN INSERT INTO heap (x) VALUES (2); END",
            "INSERT INTO t VALUES (77)",
            "DROP TRIGGER s",
            "DROP VIEW w",
            "DROP INDEX heap_i",
            "ALTER TABLE heap RENAME TO heaped",
            "DROP TABLE heaped",
            // Virtual tables.
            "CREATE VIRTUAL TABLE texts USING fts5(body)",
            "INSERT INTO texts VALUES ('what we sell')",
            "SELECT * FROM texts WHERE texts MATCH 'sell'",
            "INSERT INTO texts (texts) VALUES ('optimize')",
            "ALTER TABLE texts RENAME TO words",
            "DELETE FROM words",
            "DROP TABLE words",
            "CREATE VIRTUAL TABLE essentially USING fts4(body)",
            "DROP TABLE essentially",
            "CREATE VIRTUAL TABLE places USING rtree(id, low, high)",
            "INSERT INTO places VALUES (1, 0.5, 1.5)",
            "SELECT id FROM places WHERE low < 1",
            "DROP TABLE places",
        ] {
            let result = guard.run(&mut connection, sql, |statement| {
                let mut rows = statement.query([])?;
                while rows.next()?.is_some() {}
                Ok(())
            });
            assert!(result.is_ok(), "{sql}: {result:?}");
        }
        assert!(!connection.is_autocommit());
        connection.execute_batch("COMMIT").expect("this crate may COMMIT again");
    }

    #[test]
    fn a_panic_in_a_row_closure_lifts_the_restrictions() {
        let (guard, mut connection) = guarded();
        let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            guard.run(&mut connection, "SELECT 1", |_| -> rusqlite::Result<()> {
                panic!("row")
            })
        }));
        assert!(caught.is_err());
        connection.execute_batch("COMMIT").expect("this crate may COMMIT");
    }
}
