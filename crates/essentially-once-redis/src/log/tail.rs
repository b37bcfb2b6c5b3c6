//! Where the last entries of a stream begin.

use essentially_once::{Error, Offset};
use redis::Value;

use crate::{
    error::read_failed,
    log::{
        codec::parse_id,
        extent::{self, Extent},
        stream::Stream,
    },
};

/// Entries that one script passes, so that it holds up the server for a few milliseconds at most.
const STEP: u64 = 1_000;

impl Stream {
    /// The offset of the `count`th last entry, or of the first one if there are fewer.
    pub(crate) async fn tail(&self, count: u64) -> Result<Offset, Error> {
        const VERB: &str = "find the last records of";
        let (mut from, mut before, mut left) = (None, "+".to_owned(), count);
        loop {
            let answer = self
                .ask(&extent::ask_tail(&self.key, &self.kept, &before, left.min(STEP)))
                .await?;
            let answer = answer.map_err(|error| read_failed(self.on(VERB), error))?;
            let parts = match answer {
                Value::Array(parts) => <[Value; 3]>::try_from(parts).ok(),
                _ => None,
            };
            let Some([state, first, Value::Int(found)]) = parts else {
                return Err(self.not_understood(VERB));
            };
            let extent = Extent::parse(&state).map_err(|()| self.not_understood(VERB))?;
            let extent = self.require(extent, VERB)?;
            if let Value::BulkString(id) = first {
                from = Some(parse_id(&id).ok_or_else(|| self.not_understood(VERB))?);
                before = format!("({}", String::from_utf8_lossy(&id));
            }
            let found = u64::try_from(found).unwrap_or(0);
            left = left.saturating_sub(found);
            if left == 0 || found < STEP {
                return Ok(from.unwrap_or(extent.bounds().end));
            }
        }
    }
}
