//! Keeps a handler's SQL from ending the transaction it runs in, and from our tables.
//!
//! SQLite asks the authorizer when a statement is prepared, so a statement that was prepared once must not be found by other
//! hands: a handler's statements are kept in [`Prepared`], internal ones in the cache of `rusqlite`.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use rusqlite::{
    Connection, Statement,
    hooks::{AuthAction, AuthContext, Authorization},
};

use crate::{prepared::Prepared, schema::PREFIX};

/// Says to the authorizer whether the SQL being prepared is a handler's.
#[derive(Clone, Default)]
pub(crate) struct Guard {
    native: Arc<AtomicBool>,
}

impl Guard {
    /// Installs the authorizer: once, since setting it expires all prepared statements.
    pub(crate) fn install(&self, connection: &mut Connection) -> rusqlite::Result<()> {
        let native = Arc::clone(&self.native);
        connection.authorizer(Some(move |context: AuthContext<'_>| {
            if native.load(Ordering::Relaxed) && is_denied(&context.action) {
                Authorization::Deny
            } else {
                Authorization::Allow
            }
        }))
    }

    /// Runs a handler's SQL with the authorizer on guard: also while it runs, since a change of schema prepares a statement again.
    pub(crate) fn run<T>(
        &self,
        connection: &mut Prepared,
        sql: &str,
        run: impl FnOnce(&mut Statement<'_>) -> rusqlite::Result<T>,
    ) -> rusqlite::Result<T> {
        let _on_guard = OnGuard::new(&self.native);
        connection.run_native(sql, run)
    }
}

/// Ends the guard even if a handler's closure panics.
struct OnGuard<'a>(&'a AtomicBool);

impl<'a> OnGuard<'a> {
    fn new(native: &'a AtomicBool) -> Self {
        native.store(true, Ordering::Relaxed);
        Self(native)
    }
}

impl Drop for OnGuard<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Relaxed);
    }
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

fn is_denied(action: &AuthAction<'_>) -> bool {
    match *action {
        AuthAction::Transaction { .. } | AuthAction::Attach { .. } | AuthAction::Detach { .. } => true,
        AuthAction::Pragma {
            pragma_name,
            pragma_value,
        } => {
            pragma_value.is_some()
                && !HARMLESS_PRAGMAS
                    .iter()
                    .any(|name| pragma_name.eq_ignore_ascii_case(name))
        }
        AuthAction::Insert { table_name: name }
        | AuthAction::Update { table_name: name, .. }
        | AuthAction::Delete { table_name: name }
        | AuthAction::CreateTable { table_name: name }
        | AuthAction::CreateTempTable { table_name: name }
        | AuthAction::CreateView { view_name: name }
        | AuthAction::CreateTempView { view_name: name }
        | AuthAction::CreateVtable { table_name: name, .. }
        | AuthAction::CreateIndex { table_name: name, .. }
        | AuthAction::CreateTempIndex { table_name: name, .. }
        | AuthAction::CreateTrigger { table_name: name, .. }
        | AuthAction::CreateTempTrigger { table_name: name, .. }
        | AuthAction::AlterTable { table_name: name, .. }
        | AuthAction::DropTable { table_name: name }
        | AuthAction::DropIndex { table_name: name, .. } => is_ours(name),
        _ => false,
    }
}

fn is_ours(table: &str) -> bool {
    table
        .as_bytes()
        .get(..PREFIX.len())
        .is_some_and(|start| start.eq_ignore_ascii_case(PREFIX.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guarded() -> (Guard, Prepared) {
        let mut connection = Connection::open_in_memory().expect("open");
        connection
            .execute_batch("CREATE TABLE t (x UNIQUE); CREATE TABLE essentially_once_state (x); BEGIN")
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
        ] {
            let result = guard.run(&mut connection, sql, |statement| {
                statement.query([])?.next().map(|_| ())
            });
            assert!(result.is_err(), "{sql}");
            assert!(!connection.is_autocommit(), "{sql}");
        }
    }

    #[test]
    fn statements_cached_by_internal_hands_are_not_found_by_a_handler() {
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
            .expect("runs for internal hands");
    }

    #[test]
    fn ordinary_sql_is_free() {
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
        ] {
            let result = guard.run(&mut connection, sql, |statement| {
                statement.query([])?.next().map(|_| ())
            });
            assert!(result.is_ok(), "{sql}: {result:?}");
        }
        assert!(!connection.is_autocommit());
        connection
            .execute_batch("COMMIT")
            .expect("internal COMMIT is free again");
    }

    #[test]
    fn a_panic_in_a_row_closure_ends_the_guard() {
        let (guard, mut connection) = guarded();
        let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            guard.run(&mut connection, "SELECT 1", |_| -> rusqlite::Result<()> {
                panic!("row")
            })
        }));
        assert!(caught.is_err());
        connection.execute_batch("COMMIT").expect("internal COMMIT is free");
    }
}
