//! A connection together with the statements prepared on it: the only unsafe code of the workspace.
//!
//! `rusqlite` has a cache of its own, but takes a statement out and puts it back with two hashes, an allocation and a list
//! insertion each time, which costs as much as a small `UPDATE` itself: a loop written by hand, which holds its statements,
//! would be faster. Holding a [`Statement`] beside the [`Connection`] that it borrows from cannot be said in safe Rust.

#![allow(
    unsafe_code,
    reason = "a connection and its statements in one place; see each SAFETY"
)]

use std::{collections::HashMap, ops::Deref, ptr::NonNull};

use rusqlite::{Connection, Statement};

/// Beyond this many statements all are dropped: SQL with values in its text would otherwise fill the memory.
const MOST: usize = 256;

/// A connection, and statements on it that stay prepared. A handler's are kept apart, so that its SQL never finds one of ours.
pub(crate) struct Prepared {
    // Both are emptied before the connection that they borrow from is freed.
    native: Statements,
    internal: Statements,
    /// Owned: made by `Box::leak` in `new`, freed in `drop`, and never moved or freed between.
    connection: NonNull<Connection>,
}

#[derive(Default)]
struct Statements {
    statements: Vec<(Box<str>, Statement<'static>)>,
    /// Where in `statements` each SQL is.
    places: HashMap<Box<str>, usize>,
    /// The statement that ran last: the same few run in the same order, so what comes next is seldom searched for.
    last: usize,
}

// SAFETY: a `Connection` is `Send`. A `Statement` is not, only because it borrows a connection, which is not `Sync`; here both
// always move together, no statement leaves this struct, and both are reached through one owner: shared access gives out the
// connection alone, and `Prepared` is not `Sync`, so at most one thread uses either at a time.
unsafe impl Send for Prepared {}

impl Prepared {
    pub(crate) fn new(connection: Connection) -> Self {
        Self {
            native: Statements::default(),
            internal: Statements::default(),
            connection: NonNull::from(Box::leak(Box::new(connection))),
        }
    }

    /// Runs a handler's statement, prepared at the first call, and then after `before_prepare`. Its
    /// parameters are unbound afterwards.
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

    /// Runs a statement of this crate, prepared at the first call. Its parameters are unbound afterwards.
    pub(crate) fn run_internal<T>(
        &mut self,
        sql: &str,
        run: impl FnOnce(&mut Statement<'_>) -> rusqlite::Result<T>,
    ) -> rusqlite::Result<T> {
        // SAFETY: the pointer is valid until `drop`, which drops all statements first; no statement is seen outside with this
        // lifetime, since `run` takes one of a lifetime that it cannot name.
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

    /// Where the statement of that SQL is; prepared if it is not there yet.
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

/// Unbinds the parameters as it goes, also where a handler's closure panics: values that stayed bound
/// would be those of the next execution. The rows of a statement reset it as they are dropped.
struct Unbound<'a>(&'a mut Statement<'static>);

impl Drop for Unbound<'_> {
    fn drop(&mut self) {
        if self.0.parameter_count() > 0 {
            self.0.clear_bindings();
        }
    }
}

impl Deref for Prepared {
    type Target = Connection;

    fn deref(&self) -> &Connection {
        // SAFETY: valid until `drop`, and only ever borrowed shared.
        unsafe { self.connection.as_ref() }
    }
}

impl Drop for Prepared {
    fn drop(&mut self) {
        self.native.statements.clear();
        self.internal.statements.clear();
        // SAFETY: from `Box::leak` in `new`, freed here only, and nothing borrows from it any more.
        drop(unsafe { Box::from_raw(self.connection.as_ptr()) });
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

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
        // A table cannot be dropped while a statement reads it.
        prepared
            .execute_batch("CREATE TABLE u AS SELECT * FROM t; DROP TABLE t; ALTER TABLE u RENAME TO t")
            .expect("nothing runs");
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
    fn ever_new_sql_does_not_fill_the_memory() {
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
