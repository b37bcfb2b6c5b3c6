//! Sends records with a transaction's commit.

use async_trait::async_trait;
use essentially_once::{
    Error, NewRecord, Outbox,
    backend::{LogId, check_unnumbered},
};

use super::tx::SqliteTx;

#[async_trait]
impl Outbox for SqliteTx {
    async fn send(&mut self, log: &str, record: NewRecord) -> Result<(), Error> {
        self.check_usable("send a record")?;
        check_unnumbered(log, &record)?;
        record.check_size(self.record_limit())?;
        if !self.has_sent_to(log) {
            LogId::new(log)?;
        }
        self.append(log, &record)
    }
}
