//! What a handler's SQL may do, and what it may not.

use super::*;

fn restricted() -> (Authorizer, Prepared) {
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
    let authorizer = Authorizer::default();
    authorizer.install(&mut connection).expect("install");
    (authorizer, Prepared::new(connection))
}

#[test]
fn a_handlers_sql_cannot_end_the_transaction_or_reach_outside() {
    let (authorizer, mut connection) = restricted();
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
            let result = authorizer.run(&mut connection, sql, |statement| {
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
    let (authorizer, mut connection) = restricted();
    let add = "CREATE TABLE IF NOT EXISTS copy AS SELECT x FROM essentially_once_state";
    let alter = "ALTER TABLE t RENAME TO t";
    let insert = "INSERT INTO mine (x) VALUES (2)";
    for round in 0..3 {
        for sql in [add, insert] {
            authorizer
                .run(&mut connection, sql, |statement| statement.execute([]))
                .expect(sql);
        }
        let error = authorizer
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
    let (authorizer, mut connection) = restricted();
    let insert = "INSERT INTO mine (x) VALUES (2)";
    let run = |connection: &mut Prepared| authorizer.run(connection, insert, |statement| statement.execute([]));
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
    let (authorizer, mut connection) = restricted();
    let sql = "/*essentially-once*/ INSERT INTO essentially_once_state VALUES (1)";
    connection.run_internal(sql, |_| Ok(())).expect("internal");
    for sql in [sql.to_owned(), format!(" \n{sql} ")] {
        assert!(
            authorizer
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
    let (authorizer, mut connection) = restricted();
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
        let result = authorizer.run(&mut connection, sql, |statement| {
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
    let (authorizer, mut connection) = restricted();
    let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        authorizer.run(&mut connection, "SELECT 1", |_| -> rusqlite::Result<()> {
            panic!("row")
        })
    }));
    assert!(caught.is_err());
    connection.execute_batch("COMMIT").expect("this crate may COMMIT");
}
