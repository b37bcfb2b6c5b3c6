use std::{future::poll_fn, ops::Range, sync::Arc, time::Duration};

use essentially_once::async_trait;
use essentially_once_postgres::{
    Pg,
    tokio_postgres::{self, AsyncMessage, Client, NoTls},
};
use test_servers::PostgresServer;
use tokio::{runtime::Handle, sync::Notify};

use super::{Run, Sides, append_to};
use crate::{
    PAYLOAD, Result,
    latency::{
        BATCH,
        timing::{number, payload},
    },
    postgres::{self, ByHand, Count, Write, connect},
};

/// A private server that syncs each commit to disk.
pub(super) struct Server(PostgresServer);

impl Server {
    pub(super) fn start() -> Result<Self> {
        Ok(Self(PostgresServer::start()?))
    }
}

#[async_trait(?Send)]
impl Sides for Server {
    async fn by_hand(&self, name: &str, run: Run) -> Result<Vec<Duration>> {
        let (url, table) = (self.0.url(), postgres::table(name));
        let client = connect(&url).await?;
        client.batch_execute(&postgres::create_log(&table)).await?;
        let mut counting = ByHand::start(&url, &table, 1).await?;
        let read = client.prepare(&postgres::read_log(&table)).await?;
        let (listener, rang) = listen(&url, &table).await?;
        let Run { arrivals, stop, load } = run.clone();
        let consuming = tokio::spawn(async move {
            let _listener = listener;
            while !stop.is_cancelled() {
                let rows = client.query(&read, &[&counting.next, &(BATCH as i64)]).await?;
                if rows.is_empty() {
                    tokio::select! {
                        () = rang.notified() => {}
                        () = stop.cancelled() => {}
                    }
                    continue;
                }
                counting.count(rows.len()).await?;
                arrivals.note(rows.iter().map(|row| number(row.get(1))));
            }
            counting.finish(load.records() as u64).await
        });
        run.append(append(connect(&url).await?, &table).await?, consuming).await
    }

    async fn ours(&self, name: &str, run: Run) -> Result<Vec<Duration>> {
        let url = self.0.url();
        let log = Pg::connect(&url).await?.log(name).await?;
        let consumer = Pg::connect(&url).await?;
        let count = Count::create(
            &connect(&url).await?,
            &postgres::table(name),
            1,
            PAYLOAD.len(),
            Write::Gather,
        )
        .await?;
        run.consume(name, append_to(log), consumer.log(name).await?, consumer.store(), count)
            .await
    }
}

/// Appends and notifies in one statement, which is a transaction of its own. The library's append
/// does not serve here, because it notifies after its commit.
async fn append(client: Client, table: &str) -> Result<impl FnMut(Range<usize>) -> Result<()> + use<>> {
    let sql = format!(
        "WITH added AS (INSERT INTO {table}_log SELECT * FROM unnest($1::bigint[], $2::bytea[]))
         SELECT pg_notify('{table}', '')"
    );
    let insert = client.prepare(&sql).await?;
    let runtime = Handle::current();
    Ok(move |numbers: Range<usize>| {
        let payloads: Vec<_> = numbers.clone().map(payload).collect();
        let payloads: Vec<&[u8]> = payloads.iter().map(|payload| &payload[..]).collect();
        let places: Vec<i64> = numbers.map(|number| number as i64).collect();
        runtime.block_on(client.execute(&insert, &[&places, &payloads]))?;
        Ok(())
    })
}

/// A connection, and what it wakes at each notification of the channel.
async fn listen(url: &str, channel: &str) -> Result<(Client, Arc<Notify>)> {
    let (client, mut connection) = tokio_postgres::connect(url, NoTls).await?;
    let rang = Arc::new(Notify::new());
    let bell = Arc::clone(&rang);
    tokio::spawn(async move {
        while let Some(Ok(message)) = poll_fn(|context| connection.poll_message(context)).await {
            if let AsyncMessage::Notification(_) = message {
                bell.notify_one();
            }
        }
    });
    client.batch_execute(&format!("LISTEN {channel}")).await?;
    Ok((client, rang))
}
