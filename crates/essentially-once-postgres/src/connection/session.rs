//! One connection to the server. Requests can be sent before earlier ones have been answered.

use std::{
    collections::{HashMap, VecDeque},
    future::{Future, poll_fn},
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    task::{Context, Poll, Waker},
    time::Duration,
};

use bytes::{BufMut as _, Bytes, BytesMut};
use tokio::{
    runtime::{Handle, Id},
    task::AbortHandle,
    time::{self, Instant},
};
use tokio_postgres::{
    AsyncMessage, Client, Connection, Row, Socket, Statement,
    tls::TlsStream,
    types::{Format, IsNull, ToSql, Type, to_sql_checked},
};

use crate::error::Fault;

/// The most statements that a session keeps prepared.
const MOST_STATEMENTS: usize = 500;

/// The most requests that a session leaves unanswered.
const MOST_UNANSWERED: usize = 1_000;

/// A session that was idle for this long must answer before it is used. Routers drop idle
/// connections, some of them silently.
const CHECK_AFTER: Duration = Duration::from_secs(1);

/// How long to wait for that answer before connecting again.
const CHECK_LIMIT: Duration = Duration::from_secs(1);

/// A parameter of a statement.
pub(crate) type Param<'a> = &'a (dyn ToSql + Sync);

/// What a request is for, to explain its failure.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Part {
    /// `BEGIN`.
    Begin,
    /// SQL of the handler.
    Native,
    /// The check of the revision, and the new position.
    Fence,
    /// State, windows and other changes of this crate.
    Staged,
    /// The records for the outbox at this place.
    Send(usize),
    /// `COMMIT`.
    Commit,
}

type Reply = Pin<Box<dyn Future<Output = Result<u64, tokio_postgres::Error>> + Send>>;

/// A connection, with the statements that were prepared on it.
pub(crate) struct Session {
    client: Arc<Client>,
    schema: Arc<str>,
    statements: HashMap<Box<str>, Statement>,
    stale: Stale,
    /// The value of `stale` for which the statements were prepared.
    prepared_for: u64,
    /// The requests that were sent and not answered, oldest first.
    unanswered: VecDeque<(Part, Reply)>,
    /// Whether a call was given up before its answer, or left the connection in an unknown state.
    is_spoilt: bool,
    is_in_transaction: bool,
    runtime: Option<Id>,
    used: Instant,
    /// What the server said when it ended the connection while it owed no answer.
    farewell: Arc<Mutex<Option<tokio_postgres::Error>>>,
    _driver: Driver,
}

/// Counts how often a session of a pool found that a prepared statement no longer fits. Each
/// session then prepares its statements again. Otherwise each would fail once.
pub(crate) type Stale = Arc<AtomicU64>;

/// Ends the task that drives a connection. It could otherwise wait forever for a silent server, and
/// the server keeps a transaction open until the connection is closed.
struct Driver(AbortHandle);

impl Drop for Driver {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Session {
    /// Drives the connection on this runtime, and hands its messages to `heard`.
    pub(crate) fn new<S>(
        client: Client,
        mut connection: Connection<Socket, S>,
        schema: Arc<str>,
        stale: Stale,
        heard: impl Fn(AsyncMessage) + Send + 'static,
    ) -> Self
    where
        S: TlsStream + Unpin + Send + 'static,
    {
        let farewell = Arc::<Mutex<_>>::default();
        let said = Arc::clone(&farewell);
        let driver = tokio::spawn(async move {
            while let Some(message) = poll_fn(|context| connection.poll_message(context)).await {
                match message {
                    Ok(message) => heard(message),
                    Err(error) => {
                        tracing::debug!(%error, "a connection to PostgreSQL was lost");
                        // Before the requests find the connection closed.
                        *said.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                        break;
                    }
                }
            }
        });
        Self {
            client: Arc::new(client),
            schema,
            statements: HashMap::new(),
            prepared_for: stale.load(Relaxed),
            stale,
            unanswered: VecDeque::new(),
            is_spoilt: false,
            is_in_transaction: false,
            runtime: this_runtime(),
            used: Instant::now(),
            farewell,
            _driver: Driver(driver.abort_handle()),
        }
    }

    /// Whether another call may use it: no request is unanswered, and no transaction is open.
    pub(crate) fn is_reusable(&self) -> bool {
        !self.is_spoilt && !self.is_in_transaction && self.unanswered.is_empty() && !self.client.is_closed()
    }

    /// Whether it can take a request. Another runtime may be blocked while this one waits.
    pub(crate) async fn is_good(&mut self) -> bool {
        if !self.is_reusable() || self.runtime != this_runtime() {
            return false;
        }
        if self.used.elapsed() >= CHECK_AFTER {
            let answer = time::timeout(CHECK_LIMIT, self.client.check_connection()).await;
            if !matches!(answer, Ok(Ok(()))) {
                return false;
            }
            self.used = Instant::now();
        }
        true
    }

    /// Whether the connection is closed.
    pub(crate) fn is_closed(&self) -> bool {
        self.client.is_closed()
    }

    /// Whether `BEGIN` was sent, and neither `COMMIT` nor `ROLLBACK` was answered.
    pub(crate) fn is_in_transaction(&self) -> bool {
        self.is_in_transaction
    }

    /// Prepares a statement of this crate, with the schema in place of `{s}`, or returns the one
    /// that was prepared before.
    pub(crate) async fn own(&mut self, sql: &'static str) -> Result<Statement, Fault> {
        if let Some(statement) = self.prepared(sql) {
            return Ok(statement);
        }
        let text = sql.replace("{s}", &self.schema);
        self.prepare(sql, &text).await
    }

    /// Prepares a statement of the handler, or returns the one that was prepared before.
    pub(crate) async fn native(&mut self, sql: &str) -> Result<Statement, Fault> {
        if let Some(statement) = self.prepared(sql) {
            return Ok(statement);
        }
        self.prepare(sql, sql).await
    }

    fn prepared(&mut self, sql: &str) -> Option<Statement> {
        let stale = self.stale.load(Relaxed);
        if self.prepared_for != stale {
            self.prepared_for = stale;
            self.statements.clear();
        }
        self.statements.get(sql).cloned()
    }

    async fn prepare(&mut self, name: &str, sql: &str) -> Result<Statement, Fault> {
        let client = Arc::clone(&self.client);
        let statement = self.answered(client.prepare(sql)).await?;
        if self.statements.len() >= MOST_STATEMENTS {
            self.statements.clear();
        }
        self.statements.insert(name.into(), statement.clone());
        Ok(statement)
    }

    /// Runs a statement after those that are not answered yet, and returns its rows.
    pub(crate) async fn query(&mut self, statement: &Statement, params: &[Param<'_>]) -> Result<Vec<Row>, Fault> {
        let values = Encoded::all(statement, params).map_err(Fault::Parameter)?;
        let values: Vec<Param<'_>> = values.iter().map(|value| value as Param<'_>).collect();
        let client = Arc::clone(&self.client);
        self.answered(client.query(statement, &values)).await
    }

    /// Runs a statement after those that are not answered yet, and returns how many rows it
    /// changed.
    pub(crate) async fn execute(&mut self, statement: &Statement, params: &[Param<'_>]) -> Result<u64, Fault> {
        let values = Encoded::all(statement, params).map_err(Fault::Parameter)?;
        let client = Arc::clone(&self.client);
        self.answered(client.execute_raw(statement, values)).await
    }

    /// Runs a statement of this crate, and returns its rows.
    pub(crate) async fn query_own(&mut self, sql: &'static str, params: &[Param<'_>]) -> Result<Vec<Row>, Fault> {
        let statement = self.own(sql).await?;
        self.query(&statement, params).await
    }

    /// Runs a statement of this crate, and returns how many rows it changed.
    pub(crate) async fn execute_own(&mut self, sql: &'static str, params: &[Param<'_>]) -> Result<u64, Fault> {
        let statement = self.own(sql).await?;
        self.execute(&statement, params).await
    }

    /// Runs statements without parameters, with the schema in place of `{s}`.
    pub(crate) async fn batch(&mut self, sql: &str) -> Result<(), Fault> {
        let client = Arc::clone(&self.client);
        let text = sql.replace("{s}", &self.schema);
        self.answered(client.batch_execute(&text)).await
    }

    /// Waits for a request and those before it. If this future is dropped, the session is not used
    /// again.
    async fn answered<T>(
        &mut self,
        request: impl Future<Output = Result<T, tokio_postgres::Error>>,
    ) -> Result<T, Fault> {
        let was_spoilt = std::mem::replace(&mut self.is_spoilt, true);
        // An answer that nobody takes keeps the connection from reading the next one.
        let (earlier, answer) = tokio::join!(self.settle(), request);
        self.is_spoilt = was_spoilt;
        self.used = Instant::now();
        earlier?;
        answer.map_err(|error| self.fault(None, error))
    }

    /// Begins a transaction. The request goes out with the next one.
    pub(crate) fn begin(&mut self, sql: &'static str) -> Result<(), Fault> {
        self.is_in_transaction = true;
        self.send_simple(Part::Begin, sql)
    }

    /// Sends a statement and leaves its answer to [`settle`](Self::settle). The parameters are
    /// encoded at once.
    pub(crate) async fn send(&mut self, part: Part, statement: &Statement, params: &[Param<'_>]) -> Result<(), Fault> {
        let values = Encoded::all(statement, params).map_err(Fault::Parameter)?;
        let (client, statement) = (Arc::clone(&self.client), statement.clone());
        let launched = self.launch(
            part,
            Box::pin(async move { client.execute_raw(&statement, values).await }),
        );
        // A statement before it may have failed first, which is the reason.
        if launched.is_err() || (self.unanswered.len() >= MOST_UNANSWERED && part == Part::Native) {
            self.wait().await?;
        }
        launched
    }

    /// Sends `COMMIT`. Whoever does so must not have missed a failure of [`send`](Self::send).
    pub(crate) fn commit(&mut self) -> Result<(), Fault> {
        self.send_simple(Part::Commit, "COMMIT")
    }

    fn send_simple(&mut self, part: Part, sql: &'static str) -> Result<(), Fault> {
        let client = Arc::clone(&self.client);
        let request = async move { client.batch_execute(sql).await.map(|()| 0) };
        self.launch(part, Box::pin(request))
    }

    /// The first poll of a request hands it to the connection.
    fn launch(&mut self, part: Part, mut reply: Reply) -> Result<(), Fault> {
        match reply.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(Err(error)) => Err(self.fault(Some(part), error)),
            Poll::Ready(Ok(_)) => Ok(()),
            Poll::Pending => {
                self.unanswered.push_back((part, reply));
                Ok(())
            }
        }
    }

    /// Waits for the requests that were sent. If this future is dropped, the session is not used
    /// again.
    pub(crate) async fn wait(&mut self) -> Result<(), Fault> {
        let was_spoilt = std::mem::replace(&mut self.is_spoilt, true);
        let settled = self.settle().await;
        self.is_spoilt = was_spoilt;
        self.used = Instant::now();
        settled
    }

    /// Waits for all answers, and returns the first failure: the later ones follow from it.
    async fn settle(&mut self) -> Result<(), Fault> {
        let mut first = Ok(());
        while let Some((part, reply)) = self.unanswered.front_mut() {
            let (part, answer) = (*part, reply.as_mut().await);
            self.unanswered.pop_front();
            match answer {
                Err(error) if first.is_ok() => first = Err(self.fault(Some(part), error)),
                Ok(_) if part == Part::Commit => self.is_in_transaction = false,
                _ => {}
            }
        }
        first
    }

    /// Rolls the transaction back, so that the session can be used again.
    pub(crate) async fn rollback(&mut self) -> Result<(), Fault> {
        if !self.is_in_transaction {
            return Ok(());
        }
        // What failed before no longer matters.
        let settled = self.wait().await;
        if let Err(fault) = settled
            && fault.ends_the_session()
        {
            return Err(fault);
        }
        self.batch("ROLLBACK").await?;
        self.is_in_transaction = false;
        Ok(())
    }

    /// Explains a closed connection by what the server said when it owed no answer. A request that
    /// came later was not sent, since a request in progress would have got that as its answer.
    fn fault(&mut self, part: Option<Part>, error: tokio_postgres::Error) -> Fault {
        let farewell = || self.farewell.lock().unwrap_or_else(PoisonError::into_inner).take();
        let said = error.is_closed().then(farewell).flatten();
        let error = said.filter(|said| said.as_db_error().is_some()).unwrap_or(error);
        let fault = Fault::Postgres { part, error };
        if fault.ends_the_session() {
            self.is_spoilt = true;
        }
        if fault.is_stale() {
            self.stale.fetch_add(1, Relaxed);
        }
        fault
    }
}

/// The runtime of the calling task.
fn this_runtime() -> Option<Id> {
    Handle::try_current().ok().map(|runtime| runtime.id())
}

/// A parameter in the form in which it is sent. The caller's value need not outlive the call.
#[derive(Debug)]
struct Encoded(Option<Bytes>, Format);

impl Encoded {
    fn all(statement: &Statement, params: &[Param<'_>]) -> Result<Vec<Self>, String> {
        let types = statement.params();
        if types.len() != params.len() {
            return Err(format!(
                "the statement has {} parameters, and {} values were given",
                types.len(),
                params.len()
            ));
        }
        let mut buffer = BytesMut::new();
        let encode = |(place, (param, kind)): (usize, (&Param<'_>, &Type))| {
            let is_null = param.to_sql_checked(kind, &mut buffer);
            let is_null = is_null.map_err(|error| format!("the value of ${}: {error}", place + 1))?;
            let value = buffer.split().freeze();
            let value = match is_null {
                IsNull::Yes => None,
                IsNull::No => Some(value),
            };
            Ok(Self(value, param.encode_format(kind)))
        };
        params.iter().zip(types).enumerate().map(encode).collect()
    }
}

impl ToSql for Encoded {
    fn to_sql(&self, _: &Type, out: &mut BytesMut) -> Result<IsNull, Box<dyn std::error::Error + Sync + Send>> {
        match &self.0 {
            None => Ok(IsNull::Yes),
            Some(bytes) => {
                out.put_slice(bytes);
                Ok(IsNull::No)
            }
        }
    }

    fn accepts(_: &Type) -> bool {
        true
    }

    fn encode_format(&self, _: &Type) -> Format {
        self.1
    }

    to_sql_checked!();
}
