//! SQL of handlers.

use std::time::Duration;

use essentially_once::Error;
use tokio::time;
use tokio_postgres::{Row, types::ToSql};

use super::tx::PgTx;
use crate::{connection::Part, error::Fault};

const VERB: &str = "run SQL";

impl PgTx {
    /// Runs a statement, and returns the number of rows that it changed.
    ///
    /// ```
    /// # use essentially_once::Error;
    /// # use essentially_once_postgres::PgTx;
    /// # async fn example(tx: &mut PgTx) -> Result<(), Error> {
    /// tx.execute("UPDATE freight SET shipped = shipped + 1 WHERE country = $1", &[&"Brazil"]).await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// Statements are prepared once per session and kept, so pass values as parameters instead of
    /// writing them into the text.
    ///
    /// # Errors
    /// [`Error::Failed`] for a mistake in the SQL, a value that does not fit, a violated
    /// constraint, more than one statement, or a statement that begins or ends a transaction.
    /// [`Error::Unavailable`] if the server cannot run it now, such as after a deadlock.
    /// [`postgres_error`](crate::postgres_error) returns the cause. The transaction can then only
    /// be rolled back.
    pub async fn execute(&mut self, sql: &str, params: &[&(dyn ToSql + Sync)]) -> Result<u64, Error> {
        self.begin_native(sql)?;
        let limit = self.native_limit();
        let run = async {
            let statement = self.session.native(sql).await?;
            self.session.execute(&statement, params).await
        };
        let changed = time::timeout(limit, run).await.unwrap_or(Err(Fault::Silent(limit)));
        changed.map_err(|fault| self.fail(VERB, fault))
    }

    /// Runs a statement, and returns its rows.
    ///
    /// ```
    /// # use essentially_once::Error;
    /// # use essentially_once_postgres::PgTx;
    /// # async fn example(tx: &mut PgTx) -> Result<(), Error> {
    /// let rows = tx.query("SELECT country FROM freight ORDER BY country", &[]).await?;
    /// let countries: Vec<&str> = rows.iter().map(|row| row.get(0)).collect();
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// Like [`execute`](Self::execute).
    pub async fn query(&mut self, sql: &str, params: &[&(dyn ToSql + Sync)]) -> Result<Vec<Row>, Error> {
        self.begin_native(sql)?;
        let limit = self.native_limit();
        let run = async {
            let statement = self.session.native(sql).await?;
            self.session.query(&statement, params).await
        };
        let rows = time::timeout(limit, run).await.unwrap_or(Err(Fault::Silent(limit)));
        rows.map_err(|fault| self.fail(VERB, fault))
    }

    /// Runs a statement, and returns its first row, or `None` if it has none.
    ///
    /// # Errors
    /// Like [`execute`](Self::execute).
    pub async fn query_opt(&mut self, sql: &str, params: &[&(dyn ToSql + Sync)]) -> Result<Option<Row>, Error> {
        Ok(self.query(sql, params).await?.into_iter().next())
    }

    /// Sends a statement without waiting for its answer. Statements run in the order in which they
    /// were queued or run. Each takes much less time than an awaited one.
    ///
    /// ```
    /// # use essentially_once::Error;
    /// # use essentially_once_postgres::PgTx;
    /// # async fn example(tx: &mut PgTx, countries: &[&str]) -> Result<(), Error> {
    /// for country in countries {
    ///     let sql = "INSERT INTO shipped VALUES ($1, 1) ON CONFLICT (country) DO UPDATE SET n = shipped.n + 1";
    ///     tx.queue(sql, &[country]).await?;
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// The call waits only where a session prepares the statement for the first time, and where
    /// 1,000 statements have no answer yet.
    ///
    /// # Errors
    /// Like [`execute`](Self::execute) for what is known before the server runs the statement. If
    /// it fails on the server, this call, the next one that waits, or the commit fails with its
    /// error.
    pub async fn queue(&mut self, sql: &str, params: &[&(dyn ToSql + Sync)]) -> Result<(), Error> {
        self.begin_native(sql)?;
        let limit = self.native_limit();
        let run = async {
            let statement = self.session.native(sql).await?;
            self.session.send(Part::Native, &statement, params).await
        };
        let sent = time::timeout(limit, run).await.unwrap_or(Err(Fault::Silent(limit)));
        sent.map_err(|fault| self.fail(VERB, fault))
    }

    fn begin_native(&mut self, sql: &str) -> Result<(), Error> {
        if controls_transaction(sql) {
            self.check_usable(VERB)?;
            let refused = Error::failed(
                self.action(VERB),
                "a handler cannot begin or end transactions, because its changes and the position must be committed together; \
                 savepoints are allowed",
            );
            return Err(self.fail_with(refused));
        }
        self.ready(VERB)
    }

    /// The server ends a statement after the `statement_timeout`, if it answers at all.
    fn native_limit(&self) -> Duration {
        self.pool.options.statement_timeout + self.pool.options.timeout
    }
}

/// Whether a statement would begin or end a transaction. A prepared statement is a single command,
/// and neither a function nor a procedure can end the transaction that it is called in.
fn controls_transaction(sql: &str) -> bool {
    let mut words = without_comments(sql);
    let first = next_word(&mut words);
    match &*first {
        "BEGIN" | "START" | "COMMIT" | "END" | "ABORT" => true,
        "PREPARE" => next_word(&mut words) == "TRANSACTION",
        "ROLLBACK" => {
            let mut next = next_word(&mut words);
            if matches!(&*next, "WORK" | "TRANSACTION") {
                next = next_word(&mut words);
            }
            next != "TO"
        }
        _ => false,
    }
}

/// Takes a word off the front.
fn next_word(rest: &mut &str) -> String {
    let sql = without_comments(rest);
    let end = sql
        .find(|c: char| !c.is_ascii_alphanumeric() && c != '_')
        .unwrap_or(sql.len());
    *rest = &sql[end..];
    sql[..end].to_ascii_uppercase()
}

/// Skips spaces, empty statements and comments, which may be nested.
fn without_comments(sql: &str) -> &str {
    let mut rest = sql;
    loop {
        rest = rest.trim_start_matches(|c: char| c.is_ascii_whitespace() || c == ';' || c == '\x0b');
        if let Some(comment) = rest.strip_prefix("--") {
            rest = comment.split_once(['\n', '\r']).map_or("", |(_, after)| after);
        } else if rest.starts_with("/*") {
            rest = after_comment(rest);
        } else {
            return rest;
        }
    }
}

fn after_comment(sql: &str) -> &str {
    let mut depth = 0;
    let mut place = 0;
    let bytes = sql.as_bytes();
    while place < bytes.len() {
        match &bytes[place..] {
            [b'/', b'*', ..] => (depth, place) = (depth + 1, place + 2),
            [b'*', b'/', ..] => {
                (depth, place) = (depth - 1, place + 2);
                if depth == 0 {
                    return &sql[place..];
                }
            }
            _ => place += 1,
        }
    }
    ""
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statements_that_control_the_transaction_are_recognized() {
        for sql in [
            "COMMIT",
            "commit;",
            "  ; Commit AND CHAIN",
            "/* a /* nested */ comment */ COMMIT",
            "-- a comment\n COMMIT",
            "-- a comment\r COMMIT",
            "END",
            "ABORT",
            "BEGIN",
            "START TRANSACTION",
            "ROLLBACK",
            "rollback work",
            "ROLLBACK /* to */ TRANSACTION",
            "ROLLBACK AND CHAIN",
            "ROLLBACK PREPARED 'x'",
            "COMMIT PREPARED 'x'",
            "PREPARE TRANSACTION 'x'",
            "PREPARE/**/TRANSACTION 'x'",
        ] {
            assert!(controls_transaction(sql), "{sql}");
        }
        for sql in [
            "",
            "SELECT 1 -- COMMIT",
            "/* COMMIT */ SELECT 1",
            "/* COMMIT",
            "-- COMMIT",
            "SAVEPOINT a",
            "RELEASE a",
            "ROLLBACK TO a",
            "rollback work to savepoint a",
            "PREPARE a AS SELECT 1",
            "committed",
            "é COMMIT",
        ] {
            assert!(!controls_transaction(sql), "{sql}");
        }
    }
}
