use std::time::UNIX_EPOCH;

use essentially_once::{
    Epoch, NewRecord, ProducerId,
    backend::{LogId, Revision},
    memory::Memory,
};

use super::*;

/// A log of these keys, with a producer's sequence where it is not 0.
fn log(records: &[(&'static str, u64)]) -> Vec<Record> {
    let producer = ProducerId::new("p").unwrap();
    (0u64..)
        .zip(records)
        .map(|(offset, (key, sequence))| {
            let mut record = Record::new(offset.into(), UNIX_EPOCH, "");
            record.key = Some(Bytes::from_static(key.as_bytes()));
            record.origin = (*sequence > 0).then(|| Origin::new(producer.clone(), Epoch::STABLE, *sequence));
            record
        })
        .collect()
}

fn applied(records: &[Record], offsets: &[usize]) -> Vec<Applied> {
    offsets.iter().map(|offset| Applied::from(&records[*offset])).collect()
}

fn position(next: u64) -> Position {
    let log = LogId::new("orders").unwrap();
    Position::new(log, next.into(), Revision::NONE.next_epoch())
}

fn offsets<const N: usize>(offsets: [u64; N]) -> Vec<Offset> {
    offsets.map(Offset::from).into()
}

#[test]
fn each_record_once_in_order_is_nothing_found() {
    let records = log(&[("a", 1), ("b", 0), ("a", 1), ("a", 0)]);
    let done = applied(&records, &[0, 1, 3]);
    let position = position(4);
    let findings = Check::new(&records, &done)
        .position(Some(&position))
        .drained()
        .findings();
    assert!(findings.is_empty(), "{findings}");
    assert_eq!(findings.to_string(), "nothing found");
    findings.judge(Expectation::EssentiallyOnce).unwrap();
}

#[test]
fn lost_is_what_the_position_passed_and_all_the_rest_once_drained() {
    let records = log(&[("a", 0), ("b", 0), ("a", 7), ("a", 7), ("b", 0)]);
    let done = applied(&records, &[0]);
    let position = position(2);
    let check = Check::new(&records, &done);
    assert!(
        check.findings().is_empty(),
        "the check does not know that the consumer is done"
    );
    let findings = check.position(Some(&position)).findings();
    assert_eq!(findings.lost, offsets([1]));
    assert_eq!(findings.position_beyond_state, offsets([1]));
    let findings = check.position(Some(&position)).drained().findings();
    assert_eq!(
        findings.lost,
        offsets([1, 2, 4]),
        "the two copies at 2 and 3 are one message"
    );
    assert_eq!(findings.position_beyond_state, offsets([1]));
    findings.judge(Expectation::AtMostOnce).unwrap();
    for expectation in [Expectation::AtLeastOnce, Expectation::EssentiallyOnce] {
        let violation = findings.judge(expectation).unwrap_err().to_string();
        assert!(violation.contains("lost: 1, 2, 4"), "{violation}");
    }
}

#[test]
fn doubled_is_a_record_twice_or_two_copies_of_one_message() {
    let records = log(&[("a", 5), ("b", 0), ("a", 5)]);
    let done = applied(&records, &[0, 1, 1, 1, 2]);
    let findings = Check::new(&records, &done).drained().findings();
    assert_eq!(
        findings.doubled,
        [
            Doubled {
                offset: 0.into(),
                times: 2,
                copies: offsets([0, 2])
            },
            Doubled {
                offset: 1.into(),
                times: 3,
                copies: offsets([1])
            },
        ]
    );
    assert_eq!(findings.to_string(), "doubled: 0 (2x, as 0, 2), 1 (3x)");
    findings.judge(Expectation::AtLeastOnce).unwrap();
    findings.judge(Expectation::AtMostOnce).unwrap_err();
    findings.judge(Expectation::EssentiallyOnce).unwrap_err();
}

#[test]
fn the_second_copy_alone_is_not_lost_and_not_doubled() {
    let records = log(&[("a", 5), ("a", 5)]);
    let done = applied(&records, &[1]);
    assert!(Check::new(&records, &done).drained().findings().is_empty());
}

#[test]
fn reordered_is_within_a_key_and_by_the_first_application() {
    let records = log(&[("a", 0), ("b", 0), ("a", 0), ("b", 0)]);
    let across_keys = applied(&records, &[1, 3, 0, 2]);
    assert!(Check::new(&records, &across_keys).drained().findings().is_empty());
    let again = applied(&records, &[0, 1, 2, 3, 0]);
    assert!(Check::new(&records, &again).findings().reordered.is_empty());
    let done = applied(&records, &[2, 0, 1, 3]);
    let findings = Check::new(&records, &done).drained().findings();
    assert_eq!(
        findings.reordered,
        [Reordered {
            offset: 0.into(),
            behind: 2.into()
        }]
    );
    findings.judge(Expectation::AtLeastOnce).unwrap();
    let violation = findings.judge(Expectation::EssentiallyOnce).unwrap_err();
    assert_eq!(violation.to_string(), "not essentially-once: reordered: 0 after 2");
}

#[test]
fn phantom_is_an_unknown_offset_or_a_wrong_key() {
    let records = log(&[("a", 0), ("b", 0)]);
    let mut done = applied(&records, &[0, 1]);
    done[1].key = Some(Bytes::from_static(b"a"));
    done.push(Applied {
        offset: 9.into(),
        key: None,
    });
    let findings = Check::new(&records, &done).findings();
    assert_eq!(findings.phantom, offsets([1, 9]));
    for expectation in [
        Expectation::EssentiallyOnce,
        Expectation::AtLeastOnce,
        Expectation::AtMostOnce,
    ] {
        findings.judge(expectation).unwrap_err();
    }
}

#[test]
fn state_beyond_the_position_breaks_essentially_once_only() {
    let records = log(&[("a", 0), ("b", 0), ("a", 0)]);
    let done = applied(&records, &[0, 1, 2]);
    let position = position(1);
    let findings = Check::new(&records, &done).position(Some(&position)).findings();
    assert_eq!(findings.state_beyond_position, offsets([1, 2]));
    findings.judge(Expectation::AtLeastOnce).unwrap();
    findings.judge(Expectation::AtMostOnce).unwrap();
    findings.judge(Expectation::EssentiallyOnce).unwrap_err();
    let findings = Check::new(&records, &done).position(None).findings();
    assert_eq!(
        findings.state_beyond_position,
        offsets([0, 1, 2]),
        "the consumer has no position"
    );
}

#[test]
fn malformed_records_need_not_be_applied() {
    let mut records = log(&[("a", 0), ("a", 0)]);
    records[0].malformed = Some("cut short".into());
    let done = applied(&records, &[1]);
    assert!(Check::new(&records, &done).drained().findings().is_empty());
}

#[test]
fn long_lists_say_how_many_more_there_are() {
    let records = log(&[("a", 0); 12]);
    let findings = Check::new(&records, &[]).drained().findings();
    assert_eq!(findings.to_string(), "lost: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more");
}

#[tokio::test]
async fn a_log_is_read_between_its_bounds() {
    let log = Memory::new().log("orders").unwrap();
    assert!(read_log(&log).await.unwrap().is_empty());
    let new: Vec<NewRecord> = (0..2_500).map(|n| NewRecord::new(n.to_string())).collect();
    log.append(&new).await.unwrap();
    log.truncate(Offset::from(3));
    let records = read_log(&log).await.unwrap();
    assert_eq!(records.len(), 2_497);
    assert_eq!(records[0].offset, Offset::from(3));
}
