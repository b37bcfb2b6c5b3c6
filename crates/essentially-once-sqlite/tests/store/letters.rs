//! Dead letters in a file: readable and searchable with SQL, and fast when there are many.

use std::time::{Duration, Instant, UNIX_EPOCH};

use essentially_once::{
    Consumer, Error, Handler, HandlerError, Log, NewRecord, OffsetStore, Record, async_trait,
    backend::{DeadLetter, DeadLetters, Transaction},
    consumer::{
        DeadLetterOptions, Operator,
        dead_letters::{self, LetterFilter},
    },
};
use essentially_once_sqlite::{SqliteOptions, SqliteTx, rusqlite::Connection};

use super::{advance, open, shipping};

/// Rejects payloads that begin with `bad`.
struct Ship;

#[async_trait]
impl Handler<SqliteTx> for Ship {
    async fn handle(&mut self, order: &Record, tx: &mut SqliteTx) -> Result<(), HandlerError> {
        if order.payload.starts_with(b"bad") {
            return Err(HandlerError::reject("no such country"));
        }
        tx.execute("INSERT INTO shipments VALUES (?1)", [&order.payload[..]])?;
        Ok(())
    }
}

#[tokio::test]
async fn a_letter_is_a_row_with_documented_columns() {
    let (folder, sqlite, store) = open().await;
    let user = Connection::open(folder.path().join("a.db")).expect("the user's connection");
    user.execute_batch("CREATE TABLE shipments (payload)").expect("table");
    let orders = sqlite.log("orders").await.expect("log");
    let records = ["bad 1", "2", "bad 3"].map(|payload| NewRecord::new(payload).key("Chile"));
    orders.append(&records).await.expect("append");
    let run = || {
        Consumer::essentially_once(shipping(), orders.clone(), store.clone(), Ship)
            .dead_letters(DeadLetterOptions::new())
            .run_until_caught_up()
    };
    let report = run().await.expect("run");
    assert_eq!((report.handled, report.parked), (0, 3), "{report}");
    let rows: Vec<(i64, String, String, i64, String)> = user
        .prepare(
            "SELECT offset_lo, CAST(key AS TEXT), CAST(payload AS TEXT), tries, last_reason
             FROM essentially_once_letters WHERE consumer = 'shipping' ORDER BY offset_lo",
        )
        .expect("the documented columns")
        .query_map([], |row| {
            Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?, row.get(4)?))
        })
        .expect("query")
        .collect::<Result<_, _>>()
        .expect("rows");
    assert_eq!(
        rows[0],
        (0, "Chile".into(), "bad 1".into(), 1, "no such country".into())
    );
    assert_eq!((rows[1].0, rows[1].3), (1, 0));

    let letters = dead_letters::list(&shipping(), &store, None, 10).await.expect("list");
    dead_letters::discard(&shipping(), &store, &letters[0], &Operator::new("test"))
        .await
        .expect("discard");
    let report = run().await.expect("run");
    assert_eq!((report.handled, report.failed), (1, 0), "{report}");
    let left = dead_letters::list(&shipping(), &store, None, 10).await.expect("list");
    assert_eq!(left.len(), 1);
    let shipped: i64 = user
        .query_row("SELECT count(*) FROM shipments", [], |row| row.get(0))
        .expect("count");
    assert_eq!(shipped, 1);
}

#[tokio::test]
async fn a_handler_cannot_change_letters() {
    let (_folder, _, store) = open().await;
    let mut tx = store.begin(&shipping()).await.expect("begin");
    for sql in [
        "DELETE FROM essentially_once_letters",
        "UPDATE essentially_once_letters SET due_at = 0",
        "DROP TABLE essentially_once_letters",
    ] {
        assert!(tx.execute(sql, []).is_err(), "{sql}");
    }
}

#[tokio::test]
async fn a_letter_that_cannot_be_read_says_what_is_wrong_with_its_row() {
    let (folder, _, store) = open().await;
    let tx = store.begin(&shipping()).await.expect("begin");
    tx.commit(advance(9, 0)).await.expect("a position");
    let user = Connection::open(folder.path().join("a.db")).expect("the user's connection");
    user.execute_batch(
        "INSERT INTO essentially_once_letters
             SELECT 'shipping', unhex(printf('%032x', value)), 0, value, 0, x'61', NULL, x'', NULL, NULL, NULL,
                 1, 'why', 'why', 0, 0, NULL, 1, x''
             FROM json_each('[1, 2, 3, 4, 5]')",
    )
    .expect("letters");
    for (offset, damage, why) in [
        (1, "headers = x'FF'", "headers"),
        (2, "edit = x'FF'", "its edit has a version"),
        (3, "producer = 'no numbering#', sequence = 1", "no numbering#"),
        (4, "key = 7", "name: key"),
    ] {
        let sql = format!("UPDATE essentially_once_letters SET {damage} WHERE offset_lo = {offset}");
        assert_eq!(user.execute(&sql, []).expect("damage"), 1);
        let letter = dead_letters::get(&shipping(), &store, offset.into())
            .await
            .expect("get");
        let letter = letter.expect("a letter");
        assert!(letter.unreadable);
        assert_eq!(letter.key().is_some(), offset != 4);
        let reason = &letter.last_reason;
        assert!(
            reason.contains("its row cannot be read") && reason.contains(why),
            "{reason}"
        );
    }
    let letters = dead_letters::list(&shipping(), &store, None, 10).await.expect("list");
    let unreadable: Vec<_> = letters.iter().map(|letter| letter.unreadable).collect();
    assert_eq!(unreadable, [true, true, true, true, false]);
    // A key that is not one holds up nothing, and neither does that of a malformed record.
    let damage =
        "UPDATE essentially_once_letters SET malformed = 'why', headers = x'FF', key = x'62' WHERE offset_lo = 1";
    user.execute(damage, []).expect("damage");
    user.execute(
        "UPDATE essentially_once_letters SET key = x'62' WHERE offset_lo = 5",
        [],
    )
    .expect("another key");
    user.execute("UPDATE essentially_once_letters SET key = 'a' WHERE offset_lo = 3", [])
        .expect("damage");
    let mut tx = store.begin(&shipping()).await.expect("begin");
    assert_eq!(
        tx.counts(None, 10).await.expect("counts"),
        [("a".into(), 1), ("b".into(), 1)]
    );
    tx.rollback().await.expect("rollback");
    let (all, test) = (LetterFilter::all(), Operator::new("test"));
    assert_eq!(
        dead_letters::retry_all(&shipping(), &store, &all, &test)
            .await
            .expect("retry"),
        1
    );
    let discarded = dead_letters::discard_all(&shipping(), &store, &all, &test).await;
    assert_eq!(discarded.expect("discard"), 5);
    let left = dead_letters::list(&shipping(), &store, None, 10).await;
    assert!(left.expect("list").is_empty());
}

#[tokio::test]
async fn a_letter_that_cannot_be_read_and_changed_meanwhile_is_not_discarded() {
    let (folder, _, store) = open().await;
    let tx = store.begin(&shipping()).await.expect("begin");
    tx.commit(advance(9, 0)).await.expect("a position");
    let user = Connection::open(folder.path().join("a.db")).expect("the user's connection");
    user.execute_batch(
        "INSERT INTO essentially_once_letters VALUES
             ('shipping', unhex(printf('%032x', 7)), 0, 7, 0, NULL, x'FF', x'', NULL, NULL, NULL, 1, '', '', 0, 0, NULL, 1, x'')",
    )
    .expect("a row with unknown headers");
    let seen = dead_letters::get(&shipping(), &store, 7.into())
        .await
        .expect("get")
        .expect("a letter");
    user.execute("UPDATE essentially_once_letters SET version = 2", [])
        .expect("a newer program edits it");
    let refused = dead_letters::discard(&shipping(), &store, &seen, &Operator::new("test")).await;
    assert!(refused.is_err_and(|error| error.to_string().contains("changed since")));
}

#[tokio::test]
async fn a_letter_over_a_limit_that_was_lowered_can_be_tried_again() {
    let (folder, _, store) = open().await;
    let record = Record::new(1.into(), UNIX_EPOCH, vec![b'x'; 10_000]);
    let mut letter = DeadLetter::new(record, 1, "why", UNIX_EPOCH);
    let mut tx = store.begin(&shipping()).await.expect("begin");
    tx.park(&letter).await.expect("park");
    tx.commit(advance(1, 0)).await.expect("commit");
    let options = SqliteOptions::new().record_limit(1_000);
    let store = options.open(folder.path().join("a.db")).await.expect("open").store();
    letter.due = Some(UNIX_EPOCH);
    let mut tx = store.begin(&shipping()).await.expect("begin");
    tx.park(&letter).await.expect("the same record");
    letter.record.payload = vec![b'y'; 10_000].into();
    let refused = tx.park(&letter).await;
    assert!(matches!(refused, Err(Error::TooLarge { .. })), "{refused:?}");
    letter.record.offset = 2.into();
    let refused = tx.park(&letter).await;
    assert!(matches!(refused, Err(Error::TooLarge { .. })), "{refused:?}");
}

/// Each read uses an index, so that a million letters do not slow a consumer down.
#[tokio::test]
async fn reads_of_letters_do_not_scan_the_others() {
    let (folder, _, store) = open().await;
    let user = Connection::open(folder.path().join("a.db")).expect("the user's connection");
    user.execute_batch(
        "WITH RECURSIVE n(n) AS (SELECT 0 UNION ALL SELECT n + 1 FROM n WHERE n < 99999)
         INSERT INTO essentially_once_letters
             SELECT 'shipping', unhex(printf('%032X', n)), 0, n, 0, CAST(n / 2 AS BLOB), NULL, x'00', NULL, NULL, NULL, 1, '', '', 0, 0,
                 CASE n % 10 WHEN 0 THEN n END, 1, x'' FROM n",
    )
    .expect("many letters");
    let mut tx = store.begin(&shipping()).await.expect("begin");
    let started = Instant::now();
    for n in 0..200u64 {
        let offset = (n * 499).into();
        assert!(tx.letter(offset).await.expect("letter").is_some());
        assert_eq!(tx.list(Some(offset), 3).await.expect("list").len(), 3);
        assert!(tx.first_due().await.expect("due").is_some());
    }
    let took = started.elapsed();
    // A scan of 100,000 rows takes about 10 ms, and 600 of them 6 s.
    assert!(took < Duration::from_secs(3), "600 reads took {took:?}");
    tx.rollback().await.expect("rollback");
}
