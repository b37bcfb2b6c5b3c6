//! RabbitMQ streams under the conformance cases of the test kit: as log and store with one message
//! per record, and as a log that packs records.

use std::{
    process::ExitCode,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use essentially_once::{
    ConsumerId, Error, Log, NewRecord, Offset, async_trait,
    backend::{Bounds, Durability, LogId, LogReader, Source},
};
use essentially_once_rabbitmq::{LogOptions, Packing, Rabbit, RabbitLog, RabbitOptions, RabbitStore};
use essentially_once_testkit::{Backend, Capabilities, Cut, Harness, Proxy, Request, StateReader, Suite, Support};
use lapin::{
    BasicProperties, Channel, Connection, ConnectionProperties,
    options::{BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions, QueueDeleteOptions},
    types::{AMQPValue, FieldTable},
};
use test_servers::{RabbitNode, eventually};
use tokio::sync::OnceCell;

const RECORD_LIMIT: usize = 256 * 1024;

/// The consumer whose outboxes the cases read.
const SHIPPING: &str = "shipping";

/// These cases kill the broker, so each gets a broker of its own.
const RESTARTING: [&str; 9] = [
    "l1_appended_records_survive_a_restart",
    "l7_a_failed_append_reports_its_outcome",
    "s1_a_restart_never_parts_state_from_position",
    "s3_commits_survive_a_restart",
    "s3_a_commit_that_stages_nothing_survives_a_restart",
    "s5_position_resolves_an_unknown_outcome",
    "d2_letters_survive_a_restart",
    "o1_a_restart_never_parts_records_from_the_position",
    "o3_numbers_rise_after_a_restart",
];

/// This case applies retention to an outbox.
const TRUNCATING_OUTBOX: &str = "o3_numbers_rise_after_truncation";

fn main() -> ExitCode {
    let suite = Suite::new();
    if let Err(why) = test_servers::rabbitmq_server() {
        let suite = suite
            .missing::<RabbitHarness>("rabbitmq", &why)
            .missing::<RabbitHarness>("rabbitmq_packed", &why);
        return suite.run();
    }
    let shared = Arc::new(Mutex::new(None));
    let harness = |options, store| RabbitHarness {
        shared: Arc::clone(&shared),
        options,
        store,
    };
    let packed = LogOptions::new()
        .packed(Packing::new().max_bytes(64 * 1024))
        .compressed();
    suite
        .backend("rabbitmq", harness(LogOptions::new(), Support::Yes))
        .backend(
            "rabbitmq_packed",
            harness(packed, Support::No("it is the same store as under `rabbitmq`")),
        )
        .run()
}

struct RabbitHarness {
    /// Started by the first case that needs it, since that takes many seconds.
    shared: Arc<Mutex<Option<Arc<RabbitNode>>>>,
    options: LogOptions,
    store: Support,
}

#[async_trait]
impl Harness for RabbitHarness {
    type Backend = Streams;

    fn capabilities(&self) -> Capabilities {
        let mut capabilities = Capabilities::minimal();
        capabilities.store = self.store;
        capabilities.restart = Support::Yes;
        capabilities.restart_amid_transaction = Support::No("a transaction reads memory, which does not fail");
        capabilities.truncate = Support::Yes;
        capabilities.truncate_all = Support::No("a stream keeps its last segment");
        capabilities.recreate = Support::Yes;
        capabilities.delete = Support::No("a stream has no incarnation, so one of the same name is the same log");
        capabilities.delete_record = Support::No("a stream is removed from its front only");
        capabilities.remove_before = Support::No("a stream removes records only by its retention");
        capabilities.refuse = Support::No("a broker that is short of disk or memory refuses connections, not messages");
        capabilities.wire = Support::Yes;
        capabilities.native =
            Support::No("the only native operation is sending within a commit, which the cases for outboxes cover");
        capabilities.commits_are_cheap = Support::No("each commit is one message, confirmed and read back");
        capabilities.paced_rounds = 300;
        capabilities.log_name_bytes = 180;
        // Each has a stream, and a thousand of them take two minutes.
        capabilities.many_consumers = 200;
        capabilities.read_state = Support::Yes;
        capabilities.consumers = Support::No("AMQP has no command that lists streams");
        capabilities.beats = Support::Yes;
        capabilities.malformed = Support::Yes;
        capabilities.foreign = Support::Yes;
        capabilities.tail = Support::Yes;
        capabilities.damage_letter =
            Support::No("a letter is a part of an entry, and the store stops at one that it cannot read");
        capabilities.outbox = Support::Yes;
        capabilities.shared_outboxes = Support::No(
            "each consumer has a changelog and outboxes of its own; tests/store covers its concurrent handles",
        );
        capabilities.record_limit = Some(RECORD_LIMIT);
        capabilities.value_limit = Some(RECORD_LIMIT);
        // Each takes many seconds.
        capabilities.restarts = 2;
        // Each takes a second or two.
        capabilities.fault_plans = 12;
        capabilities
    }

    async fn start(&self, namespace: &str) -> Result<Streams, Source> {
        let shared = Arc::clone(&self.shared);
        let own = RESTARTING.contains(&namespace);
        let starting = tokio::task::spawn_blocking(move || match own {
            true => Ok(Arc::new(RabbitNode::start()?)),
            false => {
                let mut shared = shared.lock().unwrap_or_else(PoisonError::into_inner);
                if shared.is_none() {
                    *shared = Some(Arc::new(RabbitNode::start()?));
                }
                Ok::<_, Source>(Arc::clone(shared.as_ref().ok_or("started above")?))
            }
        });
        Ok(Streams {
            node: starting.await??,
            shared: OnceCell::new(),
            proxy: OnceCell::new(),
            case: namespace.to_owned(),
            // Short, so that names of 200 bytes fit into those of the store's streams, of which
            // RabbitMQ takes about 230 bytes.
            prefix: format!("{namespace:.6}-{:08x}-", fastrand::u32(..)),
            options: self.options.clone(),
        })
    }
}

struct Streams {
    node: Arc<RabbitNode>,
    /// Shared by all handles in the cases that open hundreds. In the others, handles meet only in
    /// the broker, as processes do.
    shared: OnceCell<Rabbit>,
    /// Started by the cases that cut connections. Handles opened later go through it.
    proxy: OnceCell<Proxy>,
    /// The requested namespace.
    case: String,
    prefix: String,
    options: LogOptions,
}

impl Streams {
    fn stream(&self, log: &str) -> String {
        format!("{}{log}", self.prefix)
    }

    /// Retention removes whole segments. The retention cases fill a segment with every message or
    /// two, and append them one at a time.
    fn truncates(&self) -> bool {
        let truncating = ["l5_below", "l5_retention_that", "l12_the_tail_is"];
        truncating.iter().any(|case| self.case.starts_with(case))
    }

    async fn open(&self, log: &str) -> Result<RabbitLog, Error> {
        let stream = self.stream(log);
        let options = match self.truncates() {
            true => {
                let declared = self.declare_tiny(&stream).await;
                declared.map_err(|error| Error::unavailable(format!("declare {stream}"), error))?;
                self.options.clone().existing()
            }
            false => self.options.clone(),
        };
        self.rabbit().await?.log_with(&stream, options).await
    }

    async fn rabbit(&self) -> Result<Rabbit, Error> {
        // A replica might lag this long before an offset is past the end.
        let timeout = if self.case.starts_with("l5_") { 3 } else { 10 };
        let options = RabbitOptions::new()
            .record_limit(RECORD_LIMIT)
            .timeout(Duration::from_secs(timeout))
            .prefix(&self.prefix);
        let mut url = self.node.url();
        if let Some(proxy) = self.proxy.get() {
            url = url.replace(&self.node.port().to_string(), &proxy.port().to_string());
        }
        match self.case.starts_with("faults_") {
            true => self.shared.get_or_try_init(|| options.connect(&url)).await.cloned(),
            false => options.connect(&url).await,
        }
    }

    /// With segments that a message or two fill. They are smaller than this crate allows.
    async fn declare_tiny(&self, stream: &str) -> Result<(), Source> {
        let mut arguments = FieldTable::default();
        arguments.insert("x-queue-type".into(), AMQPValue::LongString("stream".into()));
        arguments.insert("x-stream-max-segment-size-bytes".into(), AMQPValue::LongInt(200));
        let (_connection, channel) = self.as_someone_else().await?;
        channel
            .queue_declare(stream.into(), QueueDeclareOptions::durable(), arguments)
            .await?;
        Ok(())
    }

    /// The changelog of the consumer that the cases for outboxes use.
    fn changelog(&self) -> String {
        format!("{}.{SHIPPING}.changelog", self.prefix)
    }

    /// Fills segments of the changelog with messages that the store ignores. It declares its
    /// streams itself, with segments of a size that no test fills with records.
    async fn fill_segments(&self) -> Result<(), Source> {
        // One fills most of a segment, which has 16 MiB.
        let body = vec![0; 15 * 1024 * 1024];
        for _ in 0..5 {
            self.publish_to(&self.changelog(), &body, BasicProperties::default())
                .await?;
        }
        Ok(())
    }

    /// Sets the stream's policy.
    async fn set_policy(&self, stream: &str, policy: &str) -> Result<(), Source> {
        let pattern = format!("^{}$", stream.replace('.', "[.]"));
        self.ctl(&["set_policy", stream, &pattern, policy, "--apply-to", "queues"])
            .await?;
        Ok(())
    }

    /// Makes the stream keep as many bytes as its segments from `before` on have, and waits until
    /// `bounds` show it.
    async fn truncate_stream(&self, stream: &str, opened: &dyn Log, before: Offset) -> Result<(), Source> {
        let earliest = opened.bounds().await?.earliest;
        let segments = segments(&self.node, stream)?;
        // The segment with `before` begins at or before it.
        let begin = segments
            .iter()
            .map(|(first, _)| *first)
            .filter(|first| *first <= before.hi())
            .max();
        let kept: u64 = segments
            .iter()
            .filter(|(first, _)| Some(*first) >= begin)
            .map(|(_, size)| size)
            .sum();
        self.set_policy(stream, &format!(r#"{{"max-length-bytes": {kept}}}"#))
            .await?;
        self.truncated(opened, earliest).await
    }

    /// Waits until `bounds` show that retention has removed records.
    async fn truncated(&self, opened: &dyn Log, earliest: Offset) -> Result<(), Source> {
        // No event reports that retention has done its work.
        eventually(|| async {
            Ok(match opened.bounds().await?.earliest {
                same if same == earliest => Err(format!("the record at {earliest}")),
                _ => Ok(()),
            })
        })
        .await
    }

    /// What a client does that does not know this crate.
    async fn publish_to(&self, stream: &str, body: &[u8], properties: BasicProperties) -> Result<(), Source> {
        let (_connection, channel) = self.as_someone_else().await?;
        let options = BasicPublishOptions::default();
        let published = channel
            .basic_publish("".into(), stream.into(), options, body, properties)
            .await?;
        match published.await?.is_ack() {
            true => Ok(()),
            false => Err("the broker refused a message".into()),
        }
    }

    async fn as_someone_else(&self) -> Result<(Connection, Channel), Source> {
        let connection = Connection::connect(&self.node.url(), ConnectionProperties::default()).await?;
        let channel = connection.create_channel().await?;
        channel.confirm_select(ConfirmSelectOptions::default()).await?;
        Ok((connection, channel))
    }

    async fn ctl(&self, arguments: &[&str]) -> Result<String, Source> {
        let node = Arc::clone(&self.node);
        let arguments: Vec<_> = arguments.iter().map(ToString::to_string).collect();
        tokio::task::spawn_blocking(move || node.ctl(&arguments.iter().map(String::as_str).collect::<Vec<_>>())).await?
    }
}

#[async_trait]
impl Backend for Streams {
    type Store = RabbitStore;

    async fn log(&self, name: &str) -> Result<Arc<dyn Log>, Error> {
        let log = self.open(name).await?;
        match self.truncates() {
            true => Ok(Arc::new(OneByOne(log))),
            false => Ok(Arc::new(log)),
        }
    }

    async fn store(&self) -> Result<RabbitStore, Error> {
        Ok(self.rabbit().await?.store())
    }

    async fn state_reader(&self) -> Result<StateReader<RabbitStore>, Source> {
        Ok(Arc::new(self.store().await?))
    }

    async fn restart(&self) -> Result<(), Source> {
        if !RESTARTING.contains(&&*self.case) {
            return Err(format!(
                "{} would restart the broker of all cases: list it in RESTARTING",
                self.case
            )
            .into());
        }
        let node = Arc::clone(&self.node);
        tokio::task::spawn_blocking(move || node.restart()).await?
    }

    /// An outbox is a part of its consumer's changelog, of which a snapshot must cover the entries
    /// that retention removes. More than the records before `before` is removed there, since a
    /// whole segment is.
    async fn truncate(&self, log: &str, before: Offset) -> Result<(), Source> {
        if self.case != TRUNCATING_OUTBOX {
            return self
                .truncate_stream(&self.stream(log), &self.open(log).await?, before)
                .await;
        }
        let (store, consumer) = (self.store().await?, ConsumerId::new(SHIPPING)?);
        let outbox = store.sent_to(&consumer, log)?;
        let earliest = outbox.bounds().await?.earliest;
        self.fill_segments().await?;
        store.snapshot(&consumer).await?;
        // The last segment is not full, so it stays.
        self.set_policy(&self.changelog(), r#"{"max-length-bytes": 1}"#).await?;
        self.truncated(&outbox, earliest).await
    }

    async fn outbox_of(&self, consumer: &ConsumerId, log: &str) -> Result<Arc<dyn Log>, Error> {
        Ok(Arc::new(self.store().await?.sent_to(consumer, log)?))
    }

    async fn recreate(&self, log: &str) -> Result<(), Source> {
        let (_connection, channel) = self.as_someone_else().await?;
        channel
            .queue_delete(self.stream(log).into(), QueueDeleteOptions::default())
            .await?;
        self.open(log).await?;
        Ok(())
    }

    /// The bytes that publish a message: class, method and exchange, with the stream as routing
    /// key. In a changelog, only those of commits.
    async fn cut_next(&self, request: Request, cut: Cut) -> Result<(), Source> {
        let pattern = match request {
            Request::Append => {
                let stream = self.stream("orders");
                let mut pattern = vec![0, 60, 0, 40, 0, 0, 0, u8::try_from(stream.len())?];
                pattern.extend(stream.as_bytes());
                pattern
            }
            // The version of an entry that sends, and of any other.
            Request::Commit if self.case.starts_with("o1_") => b"eo-entry\x05\x01".to_vec(),
            Request::Commit => b"eo-entry\x02\x01".to_vec(),
        };
        let start = async || Proxy::start(self.node.port());
        self.proxy.get_or_try_init(start).await?.cut_at(&pattern, cut);
        Ok(())
    }

    fn cuts(&self) -> usize {
        self.proxy.get().map_or(0, Proxy::fired)
    }

    async fn append_malformed(&self, log: &str) -> Result<Vec<u8>, Source> {
        let body = b"\xFFpayload\0";
        let mut headers = FieldTable::default();
        headers.insert("essentially-once-sequence".into(), AMQPValue::LongString("many".into()));
        self.publish_to(
            &self.stream(log),
            body,
            BasicProperties::default().with_headers(headers),
        )
        .await?;
        Ok(body.into())
    }

    async fn append_foreign(&self, log: &str, payload: &[u8]) -> Result<(), Source> {
        self.publish_to(&self.stream(log), payload, BasicProperties::default())
            .await
    }
}

/// First offsets and sizes of a stream's segments.
fn segments(node: &RabbitNode, stream: &str) -> Result<Vec<(u64, u64)>, Source> {
    // The broker replaces some characters.
    let plain = |name: &str| name.replace(|char: char| !char.is_ascii_alphanumeric(), "_");
    let stream = plain(stream);
    let mut found = Vec::new();
    let mut folders = vec![node.folder().join("data")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder)? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|ending| ending == "segment")
                && path
                    .parent()
                    .is_some_and(|folder| plain(&folder.to_string_lossy()).contains(&stream))
            {
                let offset = path
                    .file_stem()
                    .map(|stem| stem.to_string_lossy().parse())
                    .ok_or("a segment has a name")??;
                found.push((offset, path.metadata()?.len()));
            }
        }
    }
    Ok(found)
}

/// Appends one record at a time. Each is confirmed before the next is sent, so that each is a chunk
/// of its own.
struct OneByOne(RabbitLog);

#[async_trait]
impl Log for OneByOne {
    fn id(&self) -> &LogId {
        self.0.id()
    }

    async fn append(&self, records: &[NewRecord]) -> Result<Option<Offset>, Error> {
        for record in records {
            self.0.append(std::slice::from_ref(record)).await?;
        }
        Ok(None)
    }

    async fn read(&self, from: Offset) -> Result<Box<dyn LogReader>, Error> {
        self.0.read(from).await
    }

    async fn bounds(&self) -> Result<Bounds, Error> {
        self.0.bounds().await
    }

    async fn tail(&self, count: u64) -> Result<Option<Offset>, Error> {
        self.0.tail(count).await
    }

    async fn durability(&self) -> Result<Durability, Error> {
        self.0.durability().await
    }
}
