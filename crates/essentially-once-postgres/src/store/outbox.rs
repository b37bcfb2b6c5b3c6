//! Sends records with a transaction's commit.

use std::sync::Arc;

use async_trait::async_trait;
use essentially_once::{Error, NewRecord, Outbox, backend::check_unnumbered};

use super::tx::PgTx;

#[async_trait]
impl Outbox for PgTx {
    async fn send(&mut self, log: &str, record: NewRecord) -> Result<(), Error> {
        self.check_usable("send a record")?;
        check_unnumbered(log, &record)?;
        record.check_size(self.record_limit())?;
        if !self.outgoing.is_open(log) {
            let pool = Arc::clone(&self.pool);
            self.outgoing.open(&pool, log).await.map_err(|error| match error {
                Error::InvalidName { .. } => error,
                error => self.fail_with(error),
            })?;
        }
        self.outgoing.send(log, record);
        Ok(())
    }
}
