//! A topic after compaction. The broker of the tests does not compact, so a batch arrives with the
//! holes that compaction leaves: without its first record, one in between and the last.

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    time::{SystemTime, UNIX_EPOCH},
};

use essentially_once::{
    Consumer, ConsumerId, KeyValue as _, Log as _, NewRecord, Offset, Record,
    backend::Source,
    handler_fn,
    memory::{Memory, MemoryTx},
};

use crate::support::{LIMIT, Outcome, Stage, ensure, payloads, records, soon};

pub(crate) async fn what_was_compacted_is_not_read_and_not_waited_for() -> Outcome {
    let stage = Stage::start().await?;
    let log = stage.kafka.log("orders").await?;
    let port = stage.server.port();
    tokio::task::spawn_blocking(move || produce(port, "orders", &[(1, "b"), (3, "d")], 5)).await??;
    // The end is directly after the last record, and two more offsets follow it.
    let bounds = log.bounds().await?;
    ensure!(bounds.end == 4.into(), "{bounds:?}");
    let (store, id) = (Memory::new().store(), ConsumerId::new("shipping")?);
    for (handled, appended) in [(2, "g"), (1, "h"), (1, "i")] {
        let ship = handler_fn(|order: &Record, tx: &mut MemoryTx| {
            Box::pin(async move { Ok(tx.put(&order.payload, b"").await?) })
        });
        let consumer = Consumer::essentially_once(id.clone(), log.clone(), store.clone(), ship).accept_volatile();
        let report = soon(consumer.run_until_caught_up()).await??;
        ensure!(report.handled == handled, "{report}");
        log.append(&[NewRecord::new(appended)]).await?;
    }
    let expected = [(1, "b"), (3, "d"), (6, "g"), (7, "h"), (8, "i")];
    for from in 0..=8 {
        let found = records(&log, Offset::from(from)).await?;
        let left = expected.iter().filter(|(offset, _)| *offset >= from);
        let (offsets, texts): (Vec<Offset>, Vec<&str>) =
            left.map(|(offset, text)| (Offset::from(*offset), *text)).unzip();
        ensure!(
            found.iter().map(|record| record.offset).eq(offsets) && payloads(&found) == texts,
            "from {from}: {found:?}"
        );
    }
    Ok(())
}

/// Sends a batch of records at these places in it, which takes the offsets up to `last`. No client
/// library can leave holes.
fn produce(port: u16, topic: &str, records: &[(u8, &str)], last: u8) -> Outcome {
    let mut request = vec![0, 0, 0, 3, 0, 0, 0, 1, 0xFF, 0xFF]; // Produce, version 3, number 1, no client id
    request.extend([0xFF, 0xFF, 0xFF, 0xFF]); // no transaction, acks=all
    request.extend(30_000_i32.to_be_bytes());
    request.extend(1_i32.to_be_bytes());
    request.extend(i16::try_from(topic.len())?.to_be_bytes());
    request.extend(topic.as_bytes());
    request.extend([1_i32.to_be_bytes(), 0_i32.to_be_bytes()].concat());
    let batch = batch(records, last)?;
    request.extend(length(&batch)?);
    request.extend(batch);

    let mut broker = TcpStream::connect(("127.0.0.1", port))?;
    broker.set_read_timeout(Some(LIMIT))?;
    broker.write_all(&length(&request)?)?;
    broker.write_all(&request)?;
    let mut size = [0; 4];
    broker.read_exact(&mut size)?;
    let mut reply = vec![0; usize::try_from(i32::from_be_bytes(size))?];
    broker.read_exact(&mut reply)?;
    // After the number of the request and one topic with one partition.
    let code = &reply[4 + 4 + 2 + topic.len() + 4 + 4..][..2];
    ensure!(code == [0, 0], "the broker refused the batch: {reply:?}");
    Ok(())
}

/// A batch in the format of Kafka 0.11 and later, version 2.
fn batch(records: &[(u8, &str)], last: u8) -> Result<Vec<u8>, Source> {
    let mut covered = Vec::new();
    covered.extend(0_i16.to_be_bytes()); // attributes
    covered.extend(i32::from(last).to_be_bytes());
    // The broker removes records of another age.
    let now = i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis())?;
    covered.extend([now.to_be_bytes(), now.to_be_bytes()].concat());
    covered.extend([0xFF; 8 + 2 + 4]); // no producer
    covered.extend(i32::try_from(records.len())?.to_be_bytes());
    for (place, payload) in records {
        let mut record = vec![0, 0, varint(*place)?]; // attributes, time
        record.push(1); // no key
        record.push(varint(u8::try_from(payload.len())?)?);
        record.extend(payload.as_bytes());
        record.push(0); // headers
        covered.push(varint(u8::try_from(record.len())?)?);
        covered.extend(record);
    }
    let mut batch = vec![0; 8]; // the first offset, which the broker sets
    batch.extend(i32::try_from(4 + 1 + 4 + covered.len())?.to_be_bytes());
    batch.extend([0xFF, 0xFF, 0xFF, 0xFF, 2]); // no leader epoch, version 2
    batch.extend(crc32c(&covered).to_be_bytes());
    batch.extend(covered);
    Ok(batch)
}

fn length(bytes: &[u8]) -> Result<[u8; 4], Source> {
    Ok(i32::try_from(bytes.len())?.to_be_bytes())
}

/// A number in zigzag encoding that fits one byte.
fn varint(number: u8) -> Result<u8, Source> {
    match number {
        0..64 => Ok(number * 2),
        _ => Err("it needs more than one byte".into()),
    }
}

/// CRC-32C (RFC 3720, appendix B.4), bit by bit.
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| match crc & 1 {
            0 => crc >> 1,
            _ => crc >> 1 ^ 0x82F6_3B78,
        })
    })
}
