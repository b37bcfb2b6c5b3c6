//! Connections that are cut while a sender and a consumer work.

use essentially_once::{ConsumerId, backend::Source};
use test_servers::{Cut, Proxy};
use tokio::task::block_in_place;

use crate::common::{LIMIT, Outcome, Running, Sending, ensure, fresh, judge, options, shared_node, url};

const ROUNDS: usize = 3;

pub(crate) async fn connections_cut_amid_appends_and_commits() -> Outcome {
    let (node, name) = (shared_node()?, fresh("cuts"));
    let consumer = ConsumerId::new(&name)?;
    let (to_send, to_consume) = (Proxy::start(node.port())?, Proxy::start(node.port())?);
    let log = options().connect(&url(to_send.port())).await?.log(&name).await?;
    let mut sending = Sending::start(log);
    let rabbit = options().connect(&url(to_consume.port())).await?;
    let mut running = Running::start(&consumer, rabbit.log(&name).await?, rabbit.store());
    running.goes_on(20).await?;
    for _ in 0..ROUNDS {
        for cut in [Cut::BeforeRequest, Cut::BeforeReply] {
            let soon = sending.sent() + 10;
            fire(&to_send, &format!("message {soon};"), cut)?;
            sending.sends(10).await?;
            // A name that only commits contain: the ledger's key.
            let resets = running.seen().resets;
            fire(&to_consume, "ledger", cut)?;
            running.resets(resets + 1).await?;
            running.goes_on(10).await?;
        }
        // Cut wherever they are.
        let resets = running.seen().resets;
        to_send.cut();
        to_consume.cut();
        running.resets(resets + 1).await?;
        sending.sends(10).await?;
        running.goes_on(10).await?;
    }
    let (messages, failed) = sending.stop().await?;
    let report = running.stop().await?;
    ensure!(failed >= 2 * ROUNDS, "only {failed} appends failed");
    ensure!(report.duplicates > 0, "no record was sent twice: {report}");
    // Not through the proxies.
    judge(&options().connect(&url(node.port())).await?, &name, &consumer, messages).await
}

/// Cuts the connection on which the text is sent next, and returns after the cut.
fn fire(proxy: &Proxy, text: &str, cut: Cut) -> Result<(), Source> {
    let fired = proxy.fired();
    proxy.cut_at(text.as_bytes(), cut);
    match block_in_place(|| proxy.wait_fired(fired + 1, LIMIT)) {
        true => Ok(()),
        false => Err(format!("{text:?} was never sent").into()),
    }
}
