//! A handler that is tested without a database: `cargo test -p unit-test-a-handler`.
//!
//! The handler writes through the portable [`KeyValue`], so the tests hand it a transaction in
//! memory.

use essentially_once::{Handler, HandlerError, KeyValue, Record, async_trait};

/// Counts orders by country.
pub struct CountByCountry;

#[async_trait]
impl<Tx: KeyValue> Handler<Tx> for CountByCountry {
    async fn handle(&mut self, order: &Record, tx: &mut Tx) -> Result<(), HandlerError> {
        if order.payload.is_empty() {
            return Err(HandlerError::reject("the order names no country"));
        }
        let before: u64 = match tx.get(&order.payload).await? {
            Some(count) => std::str::from_utf8(&count)?.parse()?,
            None => 0,
        };
        tx.put(&order.payload, (before + 1).to_string().as_bytes()).await?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use essentially_once::{
        Consumer, ConsumerId, Error, Log, NewRecord, Offset, OffsetStore, ReadState, consumer::HandlerErrorKind,
        memory::Memory,
    };
    use essentially_once_testkit::{CrashFindings, crash_test};

    use super::*;

    fn order(country: &'static str) -> Record {
        Record::new(Offset::ZERO, SystemTime::now(), country)
    }

    /// The direct way: one call of the handler, and a transaction that reads its own writes.
    #[tokio::test]
    async fn an_order_counts_for_its_country() -> Result<(), Error> {
        let mut tx = Memory::new().store().begin(&ConsumerId::new("test")?).await?;
        for _ in 0..2 {
            let handled = CountByCountry.handle(&order("Brazil"), &mut tx).await;
            handled.expect("the order is good");
        }
        assert_eq!(tx.get(b"Brazil").await?.as_deref(), Some(&b"2"[..]));
        Ok(())
    }

    #[tokio::test]
    async fn an_order_without_a_country_is_rejected() -> Result<(), Error> {
        let mut tx = Memory::new().store().begin(&ConsumerId::new("test")?).await?;
        let error = CountByCountry
            .handle(&order(""), &mut tx)
            .await
            .expect_err("no country");
        assert_eq!(error.kind(), HandlerErrorKind::Reject);
        Ok(())
    }

    /// With a crash, a lost reply or a second instance at each step, and at each pair of steps.
    #[tokio::test]
    async fn nothing_is_lost_or_counted_twice_whatever_fails() -> Result<(), CrashFindings> {
        crash_test(
            |_| CountByCountry,
            ["Brazil", "", "Chile", "Brazil"].map(NewRecord::new),
        )
        .await?;
        Ok(())
    }

    /// Through the loop: what is committed when the second order is bad.
    #[tokio::test]
    async fn a_rejected_order_stops_the_consumer_before_it() -> Result<(), Error> {
        let memory = Memory::new();
        let (id, log, store) = (ConsumerId::new("count")?, memory.log("orders")?, memory.store());
        log.append(&["Brazil", "", "Chile"].map(NewRecord::new)).await?;
        let consumer = Consumer::essentially_once(id.clone(), log, store.clone(), CountByCountry);
        let ended = consumer.accept_volatile().run_until_caught_up().await;
        let Err(Error::Unhandled { offset, .. }) = ended else {
            panic!("{ended:?}");
        };
        assert_eq!(offset, Offset::from(1));
        let state = store.read_state(&id, &[b"Brazil", b"Chile"]).await?;
        assert_eq!(state.values, [Some("1".into()), None]);
        assert_eq!(state.position.map(|position| position.next), Some(offset));
        Ok(())
    }
}
