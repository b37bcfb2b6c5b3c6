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
pub(crate) struct Authorizer {
    state: Arc<AtomicU8>,
}

impl Authorizer {
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
        let restricted = Restricted::new(&self.state);
        // The text is searched only before the first preparation. A cached statement has passed
        // already.
        connection.run_native(sql, || restricted.know(text_of(sql)), run)
    }
}

/// Lifts the restrictions on drop, even if a handler's closure panics.
struct Restricted<'a>(&'a AtomicU8);

impl<'a> Restricted<'a> {
    fn new(state: &'a AtomicU8) -> Self {
        state.store(NATIVE, Ordering::Relaxed);
        Self(state)
    }

    fn know(&self, text: u8) {
        self.0.store(NATIVE | text, Ordering::Relaxed);
    }
}

impl Drop for Restricted<'_> {
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
mod tests;
