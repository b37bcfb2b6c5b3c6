//! A reader of the changelog that folds what it reads, from the newest snapshot on.

use std::{mem, sync::Arc, time::Duration};

use essentially_once::Error;
use tokio::time::{Instant, sleep, sleep_until};

use super::{
    entry::{Entry, Parsed, parse},
    guard::Guards,
    names,
    rule::{Fold, Token, Verdict, is_wish},
    scope::Scope,
    snapshot_policy::{LENGTH, SEGMENT, SnapshotPolicy},
    snapshots::Snapshots,
    state::{SharedFold, State},
};
use crate::connection::{
    Connection,
    deliveries::Delivered,
    stream::{self, Range, retention},
    tail::{BEHIND, Tail},
};

/// How long to wait for the commit of a handle that wishes to make one.
const TURN: Duration = Duration::from_millis(100);

pub(super) struct Replica {
    scope: Arc<Scope>,
    fold: SharedFold,
    guards: Arc<Guards>,
    tail: Tail,
    pub(super) policy: SnapshotPolicy,
    /// Whether the fold holds what this handle's last `position` or `commit` returned, and no
    /// transaction has begun since.
    pub(super) fresh: bool,
    /// Whether another handle wishes to commit.
    is_wished: bool,
}

impl Replica {
    /// Reads the newest snapshot and the entries after it into `shared`.
    pub(super) async fn load(
        scope: &Arc<Scope>,
        snapshots: &Arc<Snapshots>,
        shared: &SharedFold,
        guards: &Arc<Guards>,
    ) -> Result<Self, Error> {
        let (server, stream) = (&scope.server, &scope.stream);
        // Not a shared connection: a missing snapshot stream is an error on it.
        let connection = Arc::new(server.open_connection().await?);
        refuse_old_name(scope, &connection).await?;
        let arguments = retention(LENGTH as i64, SEGMENT as i64);
        stream::declare(server, &connection, stream, arguments).await?;
        let deadline = Instant::now() + server.timeout;
        let (range, size, target, mut fold) = loop {
            let ends = stream::ends(server, &connection, stream).await?;
            let (range, size) = (Range::of(ends.as_ref()), ends.map_or(0, |ends| ends.size()));
            let found = snapshots.newest(&connection, range.first).await?;
            // A snapshot never goes to the stream that holds the newest one.
            let target = found.as_ref().map_or(0, |found| 1 - found.stream);
            let fold = found.map(|found| found.fold).unwrap_or_default();
            match check_reach(scope, &fold, range) {
                // A lagging replica has lost nothing.
                Err(_) if Instant::now() < deadline => sleep(BEHIND).await,
                checked => break checked.map(|()| (range, size, target, fold))?,
            }
        };
        let action = || format!("read stream {stream}");
        let channel = server.reading.channel(action).await?;
        let connection = Arc::clone(&channel.0);
        let attached = Tail::attach(server, channel, stream, fold.offset, size).await;
        let mut replica = Self {
            scope: Arc::clone(scope),
            fold: shared.clone(),
            guards: Arc::clone(guards),
            tail: server.reading.used(&connection, attached).await?,
            policy: SnapshotPolicy::new(scope, snapshots, shared, target),
            fresh: false,
            is_wished: false,
        };
        guards.begin(&fold);
        while fold.offset < range.end {
            let next = replica.tail.next(usize::MAX);
            let read = scope.within_limit(async { next.await.map_err(|error| scope.read_error(error)) });
            for delivered in read.await? {
                let (offset, bytes) = (delivered.offset, delivered.body.len());
                replica.policy.count(bytes);
                take(scope, &mut fold, delivered, 0)?;
                guards.count(&fold, offset, bytes);
            }
        }
        guards.have_read(&fold);
        *shared.write() = fold;
        Ok(replica)
    }

    /// Waits for entries and folds them.
    pub(super) async fn follow(&mut self) -> Result<(), Error> {
        let delivered = self
            .tail
            .follow(usize::MAX)
            .await
            .map_err(|error| self.scope.read_error(error))?;
        self.take_all(delivered, 0)?;
        Ok(())
    }

    /// Folds the entries that have arrived, without waiting for more.
    pub(super) async fn read_ready(&mut self) -> Result<(), Error> {
        // A bound, since others may publish as fast as we read.
        const ROUNDS: usize = 8;
        for _ in 0..ROUNDS {
            let delivered = self.tail.ready().await.map_err(|error| self.scope.read_error(error))?;
            if delivered.is_empty() {
                break;
            }
            self.take_all(delivered, 0)?;
        }
        // The next use may be far away.
        self.tail.settle().await
    }

    /// Reads up to the entry with that token, and the messages that arrived with it.
    pub(super) async fn read_until(&mut self, token: Token) -> Result<Verdict, Error> {
        let scope = Arc::clone(&self.scope);
        let reading = async {
            loop {
                let delivered = self
                    .tail
                    .next(usize::MAX)
                    .await
                    .map_err(|error| scope.read_error(error))?;
                if let Some(verdict) = self.take_all(delivered, token)? {
                    return Ok(verdict);
                }
            }
        };
        let verdict = scope.within_limit(reading).await?;
        // The next use may be far away. If this fails, the next call notices.
        let _ = self.tail.settle().await;
        Ok(verdict)
    }

    /// If another handle wishes to commit, waits a little until it has done so.
    pub(super) async fn give_way(&mut self) -> Result<(), Error> {
        if !mem::take(&mut self.is_wished) {
            return Ok(());
        }
        let (revision, deadline) = (self.fold.read().revision, Instant::now() + TURN);
        while self.fold.read().revision == revision {
            tokio::select! {
                followed = self.follow() => followed?,
                () = sleep_until(deadline) => break,
            }
        }
        Ok(())
    }

    /// Ends it after an error. Nothing new opens a channel on its connection.
    pub(super) async fn discard(self) {
        self.scope.server.reading.forget(&self.tail.connection).await;
    }

    /// Folds messages. Returns the verdict on the one with that token, if it is among them.
    fn take_all(&mut self, delivered: Vec<Delivered>, token: Token) -> Result<Option<Verdict>, Error> {
        let mut own = None;
        {
            let mut fold = self.fold.write();
            for delivered in delivered {
                let (offset, bytes) = (delivered.offset, delivered.body.len());
                self.policy.count(bytes);
                let taken = take(&self.scope, &mut fold, delivered, token)?;
                match taken {
                    Taken::Own(verdict) => own = Some(verdict),
                    Taken::Wish => self.is_wished = true,
                    Taken::Other => {}
                }
                self.guards.count(&fold, offset, bytes);
            }
        }
        self.fold.notify();
        Ok(own)
    }
}

/// What a folded message was.
enum Taken {
    /// The one with the token that was looked for.
    Own(Verdict),
    /// Another handle's wish to commit.
    Wish,
    Other,
}

/// Folds a message.
fn take(scope: &Scope, fold: &mut Fold<State>, delivered: Delivered, token: Token) -> Result<Taken, Error> {
    let offset = delivered.offset;
    match parse(delivered.body.into()) {
        Parsed::Entry(Entry::Mark(found)) => {
            fold.mark(offset, found);
            Ok(match found {
                _ if found == token => Taken::Own(Verdict::Applied),
                _ if is_wish(found) => Taken::Wish,
                _ => Taken::Other,
            })
        }
        Parsed::Entry(Entry::Commit(commit)) => {
            let found = commit.token;
            let verdict = fold
                .apply(offset, commit)
                .map_err(|missing| scope.missing(offset, missing))?;
            Ok(match found == token {
                true => Taken::Own(verdict),
                false => Taken::Other,
            })
        }
        Parsed::Foreign => {
            tracing::warn!(
                stream = scope.stream,
                offset,
                "ignored a message that is not an entry of this crate"
            );
            fold.pass(offset);
            Ok(Taken::Other)
        }
        Parsed::Unreadable(why) => Err(scope.unreadable(offset, why)),
    }
}

/// A stream under the name that version 0.1 would have used may hold this consumer's position,
/// or belong to another consumer.
async fn refuse_old_name(scope: &Scope, connection: &Connection) -> Result<(), Error> {
    let (prefix, consumer) = (&scope.server.options.prefix, &scope.consumer);
    let Some(old) = names::old_changelog(prefix, consumer) else {
        return Ok(());
    };
    if !stream::exists(&scope.server, connection, &old).await? {
        return Ok(());
    }
    let open = match names::parse(&old) {
        Some((prefix, consumer, _)) => {
            format!("open it as consumer {consumer} with prefix {prefix}, which is the same stream")
        }
        None => "read it with version 0.1".into(),
    };
    Err(Error::failed(
        scope.on("read"),
        format!(
            "stream {old} exists: version 0.1 kept consumer {consumer} with prefix {prefix} under that name; {open}, or delete it \
                 if it is not needed, or choose another prefix if another consumer uses it"
        ),
    ))
}

fn check_reach(scope: &Scope, fold: &Fold<State>, range: Range) -> Result<(), Error> {
    let (at, first, end) = (fold.offset, range.first, range.end);
    let source = if at == 0 {
        "no snapshot is complete".into()
    } else {
        format!("the newest snapshot ends at {at}")
    };
    if at < first {
        return Err(scope.lost(format!(
            "{source}, and the changelog begins at {first}; a policy may shorten it, or a snapshot is damaged"
        )));
    }
    if at > end {
        return Err(scope.lost(format!(
            "{source}, and the changelog ends at {end}; it was created again, or the broker lost its tail"
        )));
    }
    Ok(())
}
