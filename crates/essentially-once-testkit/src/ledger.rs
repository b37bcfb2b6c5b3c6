//! Handlers that journal the records they are called with, so that a check can read them back.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::{Buf, BufMut, Bytes};
use essentially_once::{
    ConsumerId, Error, Handler, HandlerError, KeyValue, OffsetStore, Record, async_trait, backend::Transaction,
};

use crate::checker::Applied;

/// The block being written. Full blocks move to their own keys.
const OPEN_BLOCK: &[u8] = b"ledger";
/// The most records in a block, so that the cost of a record does not grow with the run.
const BLOCK_RECORDS: u32 = 256;
/// The size at which a block is full, even if it holds few records.
const BLOCK_BYTES: usize = 32 * 1024;
/// The key length that encodes "no key".
const NO_KEY: u32 = u32::MAX;

/// A handler for any store. It journals the offset and key of each record in the consumer's state,
/// in the order of application.
///
/// It makes one `get` and one `put` per record, and one more `put` per 256 records. It uses the
/// keys `ledger` and `ledger/<n>`. Read the journal back with [`read_ledger`].
#[derive(Clone, Copy, Debug, Default)]
pub struct Ledger;

#[async_trait]
impl<Tx: KeyValue> Handler<Tx> for Ledger {
    async fn handle(&mut self, record: &Record, tx: &mut Tx) -> Result<(), HandlerError> {
        let mut block = match tx.get(OPEN_BLOCK).await? {
            Some(bytes) => Block::decode(bytes)?,
            None => Block::default(),
        };
        if block.is_full() {
            tx.put(&full_block(block.number), &block.encode()).await?;
            block = Block {
                number: block.number + 1,
                ..Block::default()
            };
        }
        block.push(&Applied::from(record))?;
        tx.put(OPEN_BLOCK, &block.encode()).await?;
        Ok(())
    }
}

/// Returns what [`Ledger`] wrote for a consumer, in the order of application.
///
/// # Errors
/// Those of the store, and [`Error::Failed`] if the state was not written by a ledger.
pub async fn read_ledger<S>(store: &S, consumer: &ConsumerId) -> Result<Vec<Applied>, Error>
where
    S: OffsetStore<Tx: KeyValue>,
{
    let mut tx = store.begin(consumer).await?;
    let mut applied = Vec::new();
    if let Some(open) = tx.get(OPEN_BLOCK).await? {
        let open = Block::decode(open)?;
        for number in 0..open.number {
            let full = tx.get(&full_block(number)).await?;
            let full = full.ok_or_else(|| damaged(format!("block {number} is missing")))?;
            Block::decode(full)?.read(&mut applied)?;
        }
        open.read(&mut applied)?;
    }
    tx.rollback().await?;
    Ok(applied)
}

/// A handler without a transaction that journals in this process's memory. Clones share the
/// journal.
#[derive(Clone, Debug, Default)]
pub struct MemoryLedger {
    applied: Arc<Mutex<Vec<Applied>>>,
}

impl MemoryLedger {
    /// Creates an empty ledger.
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns the records handled so far, in the order of application.
    pub fn applied(&self) -> Vec<Applied> {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Applied>> {
        self.applied.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl Handler<()> for MemoryLedger {
    async fn handle(&mut self, record: &Record, (): &mut ()) -> Result<(), HandlerError> {
        self.lock().push(Applied::from(record));
        Ok(())
    }
}

/// Numbers are big-endian: block number, record count, then each record's offset, key length and
/// key.
#[derive(Default)]
struct Block {
    number: u64,
    count: u32,
    entries: Vec<u8>,
}

impl Block {
    fn decode(mut bytes: Bytes) -> Result<Self, Error> {
        let header = bytes
            .try_get_u64()
            .and_then(|number| Ok((number, bytes.try_get_u32()?)));
        let (number, count) = header.map_err(damaged)?;
        Ok(Self {
            number,
            count,
            entries: bytes.into(),
        })
    }

    fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(12 + self.entries.len());
        bytes.put_u64(self.number);
        bytes.put_u32(self.count);
        bytes.put_slice(&self.entries);
        bytes
    }

    fn is_full(&self) -> bool {
        self.count >= BLOCK_RECORDS || self.entries.len() >= BLOCK_BYTES
    }

    fn push(&mut self, applied: &Applied) -> Result<(), Error> {
        self.count += 1;
        self.entries.put_u64(applied.offset.hi());
        self.entries.put_u64(applied.offset.lo());
        match &applied.key {
            Some(key) => {
                let length = u32::try_from(key.len()).ok().filter(|length| *length != NO_KEY);
                self.entries
                    .put_u32(length.ok_or_else(|| damaged("a key has 4 GiB or more"))?);
                self.entries.put_slice(key);
            }
            None => self.entries.put_u32(NO_KEY),
        }
        Ok(())
    }

    fn read(self, applied: &mut Vec<Applied>) -> Result<(), Error> {
        let mut entries = Bytes::from(self.entries);
        for _ in 0..self.count {
            applied.push(read_entry(&mut entries)?);
        }
        match entries.len() {
            0 => Ok(()),
            more => Err(damaged(format!(
                "block {} has {more} bytes after its last record",
                self.number
            ))),
        }
    }
}

fn read_entry(entries: &mut Bytes) -> Result<Applied, Error> {
    let hi = entries.try_get_u64().map_err(damaged)?;
    let lo = entries.try_get_u64().map_err(damaged)?;
    let key = match entries.try_get_u32().map_err(damaged)? {
        NO_KEY => None,
        length if length as usize <= entries.len() => Some(entries.split_to(length as usize)),
        _ => return Err(damaged("a key is cut short")),
    };
    Ok(Applied {
        offset: essentially_once::Offset::new(hi, lo),
        key,
    })
}

fn full_block(number: u64) -> Vec<u8> {
    format!("ledger/{number}").into_bytes()
}

fn damaged(reason: impl Into<essentially_once::backend::Source>) -> Error {
    Error::failed("read the ledger: the state was not written by `Ledger`", reason)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::time::UNIX_EPOCH;

    use essentially_once::{
        Offset,
        backend::{Advance, LogId, Revision},
        memory::Memory,
    };

    use super::*;

    #[tokio::test]
    async fn thousands_of_records_are_read_back_in_order() {
        let (store, consumer) = (Memory::new().store(), ConsumerId::new("ledger").unwrap());
        assert!(read_ledger(&store, &consumer).await.unwrap().is_empty());
        let records: Vec<Record> = (0..3_000u64)
            .map(|n| {
                let mut record = Record::new(Offset::new(n / 7, n), UNIX_EPOCH, "");
                record.key = (n % 3 > 0).then(|| vec![b'k'; (n % 301) as usize].into());
                record
            })
            .collect();
        let mut tx = store.begin(&consumer).await.unwrap();
        for record in &records {
            Ledger.handle(record, &mut tx).await.unwrap();
        }
        let open = tx.get(OPEN_BLOCK).await.unwrap().unwrap();
        assert!(open.len() < 2 * BLOCK_BYTES, "blocks are bounded: {}", open.len());
        let first = Revision::NONE.next_epoch();
        let log = LogId::new("orders").unwrap();
        tx.commit(Advance::new(log, Offset::ZERO, Revision::NONE, first))
            .await
            .unwrap();
        let expected: Vec<Applied> = records.iter().map(Applied::from).collect();
        assert!(read_ledger(&store, &consumer).await.unwrap() == expected);
    }

    #[test]
    fn foreign_state_is_refused_without_a_panic() {
        assert!(Block::decode(Bytes::from_static(b"short")).is_err());
        let mut block = Block::default();
        block
            .push(&Applied {
                offset: 1.into(),
                key: Some("abc".into()),
            })
            .unwrap();
        let whole = block.encode();
        for cut in 12..whole.len() {
            let block = Block::decode(Bytes::copy_from_slice(&whole[..cut])).unwrap();
            assert!(block.read(&mut Vec::new()).is_err(), "cut at {cut}");
        }
    }
}
