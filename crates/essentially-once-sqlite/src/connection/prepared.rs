//! A connection and the statements prepared on it. This is the only unsafe code in the workspace.
//!
//! The statement cache of `rusqlite` takes a statement out and puts it back at each use. That costs
//! two hashes, an allocation and a list insertion, as much as a small `UPDATE` itself, so a
//! hand-written loop that holds its statements would be faster. Safe Rust cannot express a
//! [`Statement`] stored next to the [`Connection`] it borrows from.

#![allow(
    unsafe_code,
    reason = "a connection and its statements in one place; see each SAFETY"
)]

use std::{collections::HashMap, ops::Deref, ptr::NonNull};

use rusqlite::{Connection, Statement, types::Null};

/// The cache drops all statements when it reaches this number. Otherwise SQL with values in its
/// text would fill the memory.
const MOST: usize = 256;

/// A connection and its prepared statements. A handler's statements are kept apart, so that its SQL
/// never finds one of this crate.
pub(crate) struct Prepared {
    // `drop` empties both before it frees the connection that they borrow from.
    native: Statements,
    internal: Statements,
    /// Owned: created by `Box::leak` in `new`, freed in `drop`, and not moved or freed in between.
    connection: NonNull<Connection>,
}

#[derive(Default)]
struct Statements {
    statements: Vec<(Box<str>, Statement<'static>)>,
    /// The index in `statements` of each SQL text.
    places: HashMap<Box<str>, usize>,
    /// The statement that ran last. The same few run in the same order, so guessing the next one
    /// avoids most lookups.
    last: usize,
}

// SAFETY: a `Connection` is `Send`. A `Statement` is not, but only because it borrows a connection,
// which is not `Sync`. Here both always move together, and no statement leaves this struct. Both
// are reached through one owner: shared access exposes only the connection, and `Prepared` is not
// `Sync`. At most one thread at a time therefore uses either.
unsafe impl Send for Prepared {}

impl Prepared {
    pub(crate) fn new(connection: Connection) -> Self {
        Self {
            native: Statements::default(),
            internal: Statements::default(),
            connection: NonNull::from(Box::leak(Box::new(connection))),
        }
    }

    /// Runs a handler's statement. The first call for a SQL text invokes `before_prepare` and
    /// prepares the statement. Its parameters are unbound afterwards.
    pub(crate) fn run_native<T>(
        &mut self,
        sql: &str,
        before_prepare: impl FnOnce(),
        run: impl FnOnce(&mut Statement<'_>) -> rusqlite::Result<T>,
    ) -> rusqlite::Result<T> {
        // SAFETY: as in `run_internal`.
        self.native
            .run(unsafe { self.connection.as_ref() }, sql, before_prepare, run)
    }

    /// Runs a statement of this crate, which the first call prepares. Its parameters are unbound
    /// afterwards.
    pub(crate) fn run_internal<T>(
        &mut self,
        sql: &str,
        run: impl FnOnce(&mut Statement<'_>) -> rusqlite::Result<T>,
    ) -> rusqlite::Result<T> {
        // SAFETY: the pointer is valid until `drop`, which drops all statements first. No caller
        // sees a statement with this lifetime, because `run` must accept any lifetime.
        self.internal.run(unsafe { self.connection.as_ref() }, sql, || (), run)
    }
}

impl Statements {
    fn run<T>(
        &mut self,
        connection: &'static Connection,
        sql: &str,
        before_prepare: impl FnOnce(),
        run: impl FnOnce(&mut Statement<'_>) -> rusqlite::Result<T>,
    ) -> rusqlite::Result<T> {
        self.last = self.place(connection, sql, before_prepare)?;
        let statement = Unbound(&mut self.statements[self.last].1);
        run(&mut *statement.0)
    }

    /// Returns the index of the statement, and prepares it if it is new.
    fn place(
        &mut self,
        connection: &'static Connection,
        sql: &str,
        before_prepare: impl FnOnce(),
    ) -> rusqlite::Result<usize> {
        let next = (self.last + 1) % self.statements.len().max(1);
        for guess in [next, self.last] {
            if self.statements.get(guess).is_some_and(|(known, _)| **known == *sql) {
                return Ok(guess);
            }
        }
        if let Some(place) = self.places.get(sql) {
            return Ok(*place);
        }
        if self.statements.len() >= MOST {
            self.places.clear();
            self.statements.clear();
        }
        before_prepare();
        let place = self.statements.len();
        self.statements.push((sql.into(), connection.prepare(sql)?));
        self.places.insert(sql.into(), place);
        Ok(place)
    }
}

/// Unbinds the parameters on drop, even if a handler's closure panics, so that the next execution
/// does not see the old values. Dropping the rows of a statement resets it.
struct Unbound<'a>(&'a mut Statement<'static>);

impl Drop for Unbound<'_> {
    fn drop(&mut self) {
        // After `clear_bindings`, SQLite prepares many statements again, such as those with
        // `ORDER BY`.
        for parameter in 1..=self.0.parameter_count() {
            // Fails only for a parameter that does not exist.
            let _ = self.0.raw_bind_parameter(parameter, Null);
        }
    }
}

impl Deref for Prepared {
    type Target = Connection;

    fn deref(&self) -> &Connection {
        // SAFETY: valid until `drop`, and only borrowed as shared.
        unsafe { self.connection.as_ref() }
    }
}

impl Drop for Prepared {
    fn drop(&mut self) {
        self.native.statements.clear();
        self.internal.statements.clear();
        // SAFETY: created by `Box::leak` in `new` and freed only here, when nothing borrows from it
        // any more.
        drop(unsafe { Box::from_raw(self.connection.as_ptr()) });
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use rusqlite::{OptionalExtension as _, StatementStatus};

    use super::*;

    fn prepared() -> Prepared {
        let connection = Connection::open_in_memory().expect("open");
        connection.execute_batch("CREATE TABLE t (x)").expect("table");
        Prepared::new(connection)
    }

    #[test]
    fn statements_go_with_their_connection_from_thread_to_thread() {
        let mut prepared = prepared();
        let insert = "INSERT INTO t VALUES (?1)";
        prepared
            .run_native(insert, || (), |statement| statement.execute([1]))
            .expect("insert");
        let mut prepared = std::thread::spawn(move || {
            prepared
                .run_native(insert, || (), |statement| statement.execute([2]))
                .expect("insert");
            prepared
        })
        .join()
        .expect("thread");
        prepared
            .run_native(insert, || (), |statement| statement.execute([3]))
            .expect("insert");
        let sum: i64 = prepared
            .query_row("SELECT sum(x) FROM t", [], |row| row.get(0))
            .expect("sum");
        assert_eq!(sum, 6);
    }

    #[test]
    fn a_statement_outlives_a_change_of_schema_and_a_failure() {
        let mut prepared = prepared();
        prepared.execute_batch("CREATE UNIQUE INDEX i ON t (x)").expect("index");
        let insert = "INSERT INTO t VALUES (?1)";
        prepared
            .run_native(insert, || (), |statement| statement.execute([1]))
            .expect("insert");
        assert!(
            prepared
                .run_native(insert, || (), |statement| statement.execute([1]))
                .is_err()
        );
        prepared
            .execute_batch("DROP INDEX i; ALTER TABLE t ADD COLUMN y DEFAULT 0")
            .expect("schema");
        assert!(
            prepared
                .run_native(insert, || (), |statement| statement.execute([1]))
                .is_err(),
            "one value for two columns"
        );
        let insert = "INSERT INTO t (x) VALUES (?1)";
        prepared
            .run_native(insert, || (), |statement| statement.execute([1]))
            .expect("insert");
    }

    #[test]
    fn nothing_stays_bound_or_running_after_a_panic() {
        let mut prepared = prepared();
        prepared.execute_batch("INSERT INTO t VALUES (1), (2)").expect("rows");
        let select = "SELECT :a, :b FROM t";
        let panicked = catch_unwind(AssertUnwindSafe(|| {
            prepared.run_native(
                select,
                || (),
                |statement| -> rusqlite::Result<()> {
                    let mut rows = statement.query(&[(":a", "old"), (":b", "old")])?;
                    rows.next()?;
                    panic!("a handler's closure");
                },
            )
        }));
        assert!(panicked.is_err());
        // SQLite refuses to drop a table while a statement reads it.
        prepared
            .execute_batch("CREATE TABLE u AS SELECT * FROM t; DROP TABLE t; ALTER TABLE u RENAME TO t")
            .expect("no statement is running");
        let found: (String, Option<String>) = prepared
            .run_native(
                select,
                || (),
                |statement| statement.query_row(&[(":a", "new")], |row| Ok((row.get(0)?, row.get(1)?))),
            )
            .expect("select");
        assert_eq!(found, ("new".into(), None));
    }

    #[test]
    fn a_statement_is_prepared_once() {
        let mut prepared = prepared();
        prepared
            .execute_batch("CREATE TABLE u (a, b, PRIMARY KEY (a, b))")
            .expect("table");
        let select = "SELECT b FROM u WHERE a = ?1 AND b > ?2 ORDER BY b";
        for value in 0..5_u8 {
            prepared
                .run_internal(select, |statement| {
                    statement.query_row(("a", [value]), |_| Ok(())).optional()
                })
                .expect("select");
        }
        let again = prepared.run_internal(select, |statement| Ok(statement.get_status(StatementStatus::RePrepare)));
        assert_eq!(again, Ok(0));
    }

    #[test]
    fn distinct_sql_texts_do_not_fill_the_memory() {
        let mut prepared = prepared();
        for n in 0..3 * MOST {
            prepared
                .run_native(
                    &format!("INSERT INTO t VALUES ({n})"),
                    || (),
                    |statement| statement.execute([]),
                )
                .expect("insert");
            assert!(prepared.native.statements.len() <= MOST);
        }
    }
}
