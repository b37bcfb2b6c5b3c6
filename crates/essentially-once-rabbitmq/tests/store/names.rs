//! No two consumers share a stream, and a stream under an old name is not ignored.

use essentially_once::{ConsumerId, Error, OffsetStore as _, backend::Transaction as _};
use essentially_once_rabbitmq::{Rabbit, RabbitOptions};
use essentially_once_testkit::Violation;

use crate::{
    Tests,
    support::{Place, advance},
};

pub(crate) fn add(tests: &mut Tests) {
    tests.add("names::a_dot_in_the_prefix_is_not_one_in_the_consumer", distinct);
    tests.add("names::a_changelog_under_its_old_name_is_refused", old);
    tests.add("names::a_log_cannot_take_the_name_of_a_stream_of_the_store", log);
}

/// A handle whose prefix is that of the place followed by `behind`.
async fn rabbit(place: &Place, behind: &str) -> Result<Rabbit, Error> {
    let prefix = format!("{}{behind}", place.prefix);
    RabbitOptions::new()
        .prefix(prefix)
        .timeout(place.timeout)
        .connect(&place.url)
        .await
}

async fn distinct() -> Result<(), Violation> {
    let place = Place::new();
    let (billing, eu_billing) = (ConsumerId::new("billing")?, ConsumerId::new("eu.billing")?);
    let store = rabbit(&place, ".eu").await?.store();
    store.begin(&billing).await?.commit(advance(7, 0)).await?;
    assert_eq!(rabbit(&place, "").await?.store().position(&eu_billing).await?, None);
    let stranger = place.stranger().await;
    assert!(stranger.sees(&format!("{}..eu.billing.changelog", place.prefix)).await);
    Ok(())
}

async fn old() -> Result<(), Violation> {
    let place = Place::new();
    let (billing, eu_billing) = (ConsumerId::new("billing")?, ConsumerId::new("eu.billing")?);
    // The stream of version 0.1 for prefix `<prefix>.eu` and consumer `billing`.
    let same = rabbit(&place, "").await?.store();
    same.begin(&eu_billing).await?.commit(advance(7, 0)).await?;
    let store = rabbit(&place, ".eu").await?.store();
    for _ in 0..2 {
        let error = store.position(&billing).await.expect_err("it is ignored");
        assert!(matches!(error, Error::Failed { .. }), "{error}");
        for word in [
            format!("stream {}.eu.billing.changelog exists", place.prefix),
            format!("open it as consumer eu.billing with prefix {}, which", place.prefix),
        ] {
            assert!(error.to_string().contains(&word), "{error}");
        }
    }
    let stranger = place.stranger().await;
    assert!(!stranger.sees(&format!("{}..eu.billing.changelog", place.prefix)).await);
    // Another consumer of that prefix is not affected.
    assert_eq!(store.position(&ConsumerId::new("shipping")?).await?, None);
    Ok(())
}

async fn log() -> Result<(), Violation> {
    let place = Place::new();
    let rabbit = rabbit(&place, ".eu").await?;
    for kind in ["changelog", "snapshots.a", "snapshots.b", "sent"] {
        let name = format!("{}..eu.billing.{kind}", place.prefix);
        let refused = rabbit.log(&name).await.map(drop).expect_err("it is taken");
        assert!(
            matches!(&refused, Error::InvalidName { kind: "log", reason, .. } if reason.contains("consumer billing")),
            "{refused}"
        );
    }
    rabbit.log(&format!("{}..eu.billing.orders", place.prefix)).await?;
    Ok(())
}
