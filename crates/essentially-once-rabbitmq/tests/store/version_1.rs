//! Streams written in version 1 of the formats are read as they were meant. See `tests/fixtures`.

use essentially_once::{
    Consumer, ConsumerId, Epoch, Handler, HandlerError, KeyValue as _, Log, NewRecord, OffsetStore as _, Origin,
    Outbox as _, ProducerId, Record, async_trait,
    backend::{Revision, Window},
};
use essentially_once_rabbitmq::RabbitTx;
use essentially_once_testkit::{Violation, read_log};

use crate::{
    Tests,
    fixture::{copy, messages},
    support::{Place, get, log, shipping},
};

const FIXTURE: &str = include_str!("../fixtures/version-1.txt");

pub(crate) fn add(tests: &mut Tests) {
    tests.add("version_1::records_of_plain_and_packed_logs_are_read", logs);
    tests.add("version_1::a_consumer_goes_on_from_its_changelog", changelog);
    tests.add("version_1::a_consumer_goes_on_from_its_snapshot", snapshot);
    tests.add("version_1::a_late_commit_is_still_late", late);
}

/// The order of that number, as in the fixture.
fn order(number: u64) -> NewRecord {
    let producer = ["web", "app"][(number % 2) as usize];
    let record = NewRecord::new(format!("order {number}")).key(format!("key-{}", number % 3));
    match number {
        4 => record,
        _ => record
            .origin(Origin::new(
                ProducerId::new(producer).expect("name"),
                Epoch::STABLE,
                number / 2,
            ))
            .header("b", format!("{number}"))
            .header("a", "first by name, second in order"),
    }
}

fn assert_are_orders(records: &[Record], count: u64) {
    assert_eq!(records.len() as u64, count);
    for (number, record) in (0..).zip(records) {
        let expected = order(number);
        assert_eq!(record.malformed, None);
        assert_eq!(
            (&record.payload, &record.key, &record.headers, &record.origin),
            (&expected.payload, &expected.key, &expected.headers, &expected.origin)
        );
    }
}

async fn logs() -> Result<(), Violation> {
    let place = Place::new();
    let (rabbit, stranger) = (place.rabbit().await?, place.stranger().await);
    for (stream, count) in [("orders", 16), ("orders-packed", 8), ("orders-compressed", 8)] {
        let name = format!("{}-{stream}", place.prefix);
        let log = rabbit.log(&name).await?;
        copy(FIXTURE, &stranger, stream, &name).await;
        assert_are_orders(&read_log(&log).await?, count);
    }
    Ok(())
}

/// The expected state of `shipping`.
async fn assert_is_shipping(place: &Place) -> Result<(), Violation> {
    let store = place.store().await?;
    let position = store.position(&shipping()).await?.expect("some");
    assert_eq!(
        (position.log, position.next.to_string(), position.revision),
        (log("orders"), "15-1".into(), Revision::new(0, 7))
    );
    let mut windows = position.windows;
    windows.sort_by(|(one, _), (other, _)| one.cmp(other));
    let [(app, app_window), (web, web_window)] = &windows[..] else {
        panic!("{windows:?}");
    };
    assert_eq!((app.to_string().as_str(), web.to_string().as_str()), ("app", "web"));
    for sequence in 0..10 {
        // All of `app` was forgotten except 6 and 7, which came later. Order 4, which would be 2 of
        // `web`, has no origin.
        assert_eq!(app_window.is_seen(sequence), [6, 7].contains(&sequence), "{sequence}");
        let expected = sequence < 8 && sequence != 2;
        assert_eq!(web_window.is_seen(sequence), expected, "{sequence}");
    }
    for (key, value) in [
        ("key-0", Some("\u{6}")),
        ("key-1", Some("\u{1}")),
        ("key-2", Some("\u{5}")),
        ("last", Some("order 15")),
        ("key-3", None),
    ] {
        assert_eq!(get(&store, key).await?.as_deref(), value, "{key}");
    }
    Ok(())
}

/// Lets a newer version handle the rest of the log.
struct Put;

#[async_trait]
impl Handler<RabbitTx> for Put {
    async fn handle(&mut self, record: &Record, tx: &mut RabbitTx) -> Result<(), HandlerError> {
        tx.put(b"last", &record.payload).await?;
        tx.send("billing", NewRecord::new(record.payload.clone())).await?;
        Ok(())
    }
}

async fn changelog() -> Result<(), Violation> {
    let place = Place::new();
    let (rabbit, stranger) = (place.rabbit().await?, place.stranger().await);
    stranger.declare_changelog(&place.changelog()).await;
    copy(FIXTURE, &stranger, "shop.shipping.changelog", &place.changelog()).await;
    assert_is_shipping(&place).await?;
    let sent = rabbit.store().sent(&shipping())?;
    let payloads = |records: Vec<Record>| -> Vec<_> { records.into_iter().map(|record| record.payload).collect() };
    let expected = ["order 0", "order 3", "order 6", "order 9", "order 12", "order 15"];
    let records = read_log(&sent).await?;
    assert!(records.iter().all(|record| record.key.as_deref() == Some(b"key-0")));
    assert_eq!(payloads(records), expected);

    // The position names the log, so its name must be that one. No other test uses it on this node.
    let orders = rabbit.log("orders").await?;
    copy(FIXTURE, &stranger, "orders", "orders").await;
    orders.append(&[order(15), order(16)]).await?;
    let consumer = Consumer::essentially_once(shipping(), orders, rabbit.store(), Put);
    let report = consumer.run_until_caught_up().await?;
    assert_eq!((report.handled, report.duplicates), (1, 1), "{report}");
    assert_eq!(get(&place.store().await?, "last").await?.as_deref(), Some("order 16"));
    let all = payloads(read_log(&sent).await?);
    assert_eq!(
        (&all[..6], &all[6..]),
        (&expected.map(Into::into)[..], &["order 16".into()][..])
    );
    Ok(())
}

async fn snapshot() -> Result<(), Violation> {
    let place = Place::new();
    let stranger = place.stranger().await;
    stranger.declare_changelog(&place.changelog()).await;
    stranger.declare_snapshots(&place.snapshots('a')).await;
    copy(FIXTURE, &stranger, "shop.shipping.snapshots.a", &place.snapshots('a')).await;
    // The entries that the snapshot covers are missing, so only the snapshot has their state.
    for (offset, message) in messages(FIXTURE, "shop.shipping.changelog").into_iter().enumerate() {
        let body = if offset < 7 { b"covered" } else { &message.body[..] };
        stranger.publish(&place.changelog(), body).await;
    }
    assert_is_shipping(&place).await
}

async fn late() -> Result<(), Violation> {
    let place = Place::new();
    let (stranger, billing) = (place.stranger().await, ConsumerId::new("billing")?);
    let changelog = format!("{}.billing.changelog", place.prefix);
    stranger.declare_changelog(&changelog).await;
    copy(FIXTURE, &stranger, "shop.billing.changelog", &changelog).await;
    let store = place.store().await?;
    let position = store.position(&billing).await?.expect("some");
    assert_eq!(position.log, log("invoices").with_incarnation("a1")?);
    assert_eq!((position.next, position.revision), (3.into(), Revision::new(0, 1)));
    assert_eq!(position.windows, [("web".parse()?, Window::new(7))]);
    let winner = store.begin(&billing).await?.get(b"winner").await?;
    assert_eq!(winner.as_deref(), Some(&b"one"[..]));
    Ok(())
}
