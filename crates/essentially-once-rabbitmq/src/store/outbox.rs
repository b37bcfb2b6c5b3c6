//! Records sent by commits. They are part of the commit's entry, so they exist if and only if it
//! applies.

use std::{
    collections::{HashMap, HashSet},
    fmt,
    sync::Arc,
};

use async_trait::async_trait;
use essentially_once::{
    Error, Log, NewRecord, Offset, Record,
    backend::{Bounds, Durability, LogId, LogReader},
};

use super::{
    changelog::Changelog,
    entry::{Entry, Parsed, parse},
    rule::{Fold, Token, Verdict},
    scope::Scope,
};
use crate::{
    connection::{Connection, deliveries::Delivered, stream, tail::Tail},
    log::reader::RabbitReader,
};

/// The records sent by a consumer's commits: those of one outbox
/// ([`RabbitStore::sent_to`](super::RabbitStore::sent_to)), or all
/// ([`RabbitStore::sent`](super::RabbitStore::sent)).
///
/// - They are kept in the consumer's changelog as long as it keeps its entries: the last 512 MiB,
///   which marks, state and dead letters share with the records. The store does not know how far
///   its readers are, so it does not wait for them. A reader that is further behind gets
///   [`Error::Truncated`]: if it missed a record, and also if it was open while 512 MiB passed that
///   it did not read. In the second case a new reader goes on. Watch the lag of a relay, or let
///   [`RabbitStore::guard_outbox`](super::RabbitStore::guard_outbox) refuse commits before a relay
///   can miss a record.
/// - Each outbox belongs to one consumer. Two consumers that send to outboxes of the same name have
///   two, with a producer each.
/// - Offsets are those of the changelog's messages, with the index of the record in the commit. The
///   offsets of an outbox have gaps, its [origins](essentially_once::Origin) have none.
/// - Numbers are as durable as commits; see [`RabbitStore`](super::RabbitStore). If a power cut
///   takes back commits that a relay has read, later records get the same numbers, and consumers
///   would drop them as duplicates. In most cases, the relay
///   [stops](essentially_once::relay::Relay#a-restored-outbox) before the first of them. After you
///   restore a broker's data, give the records from [`bounds`](Log::bounds)`().end` on [a new
///   producer](essentially_once::relay::Relay::new_producer_from).
/// - Appending fails: only commits send.
/// - To open a reader, the handle reads the consumer's state, as the store does.
#[derive(Clone)]
pub struct RabbitSent {
    changelog: Arc<Changelog>,
    pub(super) id: LogId,
    /// `None` for the records of all outboxes.
    outbox: Option<Arc<str>>,
}

impl RabbitSent {
    pub(super) fn new(changelog: Arc<Changelog>, id: LogId, outbox: Option<&str>) -> Self {
        let outbox = outbox.map(Arc::from);
        Self { changelog, id, outbox }
    }

    /// Which entries from `start` up to the base's offset apply.
    ///
    /// A reader that has not seen all entries cannot apply the rule. But each entry names the one
    /// that it builds on, and the base knows the last one that applies. So those that apply are
    /// found backwards.
    async fn applied(&self, connection: &Arc<Connection>, start: u64, base: &Fold<()>) -> Result<HashSet<u64>, Error> {
        let scope = &self.changelog.scope;
        let mut links = Links::default();
        let mut next = start;
        if next < base.offset {
            let mut tail = self.tail(connection, start).await?;
            while next < base.offset {
                for delivered in scope.within_limit(tail.next(usize::MAX)).await? {
                    next = delivered.offset + 1;
                    if let Parsed::Entry(Entry::Commit(commit)) = parse(delivered.body.into()) {
                        links.add(delivered.offset, commit.token, commit.parent);
                    }
                }
            }
        }
        Ok(links.back_from(base.token, base.offset))
    }

    async fn tail(&self, connection: &Arc<Connection>, start: u64) -> Result<Tail, Error> {
        let scope = &self.changelog.scope;
        Tail::open(&scope.server, connection, &scope.stream, start)
            .await
            .map_err(|error| scope.read_error(error))
    }
}

/// Entries, each with the one that it builds on.
#[derive(Default)]
struct Links {
    entries: HashMap<Token, (u64, Token)>,
}

impl Links {
    fn add(&mut self, offset: u64, token: Token, parent: Token) {
        // Of an entry published twice, only the first can apply.
        self.entries.entry(token).or_insert((offset, parent));
    }

    /// The offset of the last entry, and of all entries that it builds on.
    fn back_from(&self, last: Token, end: u64) -> HashSet<u64> {
        let mut applied = HashSet::new();
        let (mut token, mut before) = (last, end);
        // Only downwards, so that the loop ends whatever the entries contain.
        while let Some((offset, parent)) = self.entries.get(&token)
            && *offset < before
        {
            applied.insert(*offset);
            (token, before) = (*parent, *offset);
        }
        applied
    }
}

/// Judges entries as a reader reaches them.
struct Judge {
    scope: Arc<Scope>,
    log: LogId,
    /// Skips the records of other outboxes.
    outbox: Option<Arc<str>>,
    /// Those entries before the base that apply.
    applied: HashSet<u64>,
    fold: Fold<()>,
    /// The end of the records read so far.
    next: Offset,
}

impl Judge {
    fn records(&mut self, delivered: Delivered) -> Result<Vec<Record>, Error> {
        let offset = delivered.offset;
        let commit = match parse(delivered.body.into()) {
            Parsed::Entry(Entry::Commit(commit)) => commit,
            Parsed::Unreadable(why) => return Err(self.scope.unreadable(offset, why)),
            // The base counts everything before its offset already.
            Parsed::Entry(Entry::Mark(_)) | Parsed::Foreign => return Ok(vec![]),
        };
        let (commit, change) = commit.replace(());
        let applies = if offset < self.fold.offset {
            self.applied.contains(&offset)
        } else {
            let verdict = self.fold.apply(offset, commit);
            verdict.map_err(|missing| self.scope.missing(offset, missing))? == Verdict::Applied
        };
        let Some(sent) = change.sent.filter(|_| applies) else {
            return Ok(vec![]);
        };
        let outbox = self.outbox.as_deref();
        let Some((before, end)) = sent.ends(offset, outbox) else {
            return Ok(vec![]);
        };
        if before > self.next {
            return Err(Error::Truncated {
                log: self.log.clone(),
                requested: self.next,
                earliest: Offset::new(offset, 0),
            });
        }
        self.next = end;
        let records = sent.records(offset, outbox);
        records.map_err(|why| Error::failed(self.scope.on("read"), why))
    }
}

#[async_trait]
impl Log for RabbitSent {
    fn id(&self) -> &LogId {
        &self.id
    }

    /// Always fails: only commits send.
    async fn append(&self, records: &[NewRecord]) -> Result<Option<Offset>, Error> {
        if records.is_empty() {
            return Ok(None);
        }
        Err(Error::failed(
            self.changelog.scope.on("append to the records sent by"),
            "only its commits send; use `Outbox::send` in its handler",
        ))
    }

    async fn read(&self, from: Offset) -> Result<Box<dyn LogReader>, Error> {
        let (scope, log) = (&self.changelog.scope, self.id.clone());
        let (base, end) = self.changelog.base(self.outbox.as_deref()).await?;
        // A reader that starts too early learns it from the entries.
        Bounds {
            earliest: Offset::ZERO,
            end,
        }
        .check(&log, from)?;
        let connection = Arc::new(scope.server.open_connection().await?);
        let start = match from == end {
            true => base.offset,
            false => {
                let first = stream::bounds(&scope.server, &connection, &scope.stream).await?.first;
                // The last record is gone, so no entry would tell what the reader missed.
                if end.hi() < first {
                    return Err(Error::Truncated {
                        log,
                        requested: from,
                        earliest: end,
                    });
                }
                from.hi().max(first)
            }
        };
        let mut judge = Judge {
            scope: Arc::clone(scope),
            log: log.clone(),
            outbox: self.outbox.clone(),
            applied: self.applied(&connection, start, &base).await?,
            fold: base,
            next: from,
        };
        let tail = self.tail(&connection, start).await?;
        let records = move |delivered| judge.records(delivered);
        Ok(Box::new(RabbitReader::new(log, tail, from, records)))
    }

    async fn bounds(&self) -> Result<Bounds, Error> {
        let scope = &self.changelog.scope;
        let (_, end) = self.changelog.base(self.outbox.as_deref()).await?;
        let asking = &scope.server.asking;
        let connection = asking.connection().await?;
        let range = stream::bounds(&scope.server, &connection, &scope.stream).await;
        let first = asking.used(&connection, range).await?.first;
        Ok(Bounds {
            earliest: Offset::new(first, 0).min(end),
            end,
        })
    }

    async fn durability(&self) -> Result<Durability, Error> {
        Ok(Durability::Durable)
    }
}

impl fmt::Debug for RabbitSent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RabbitSent")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::{super::rule::Commit, *};

    /// Entries of two writers that sometimes read the other's entries and sometimes republish an
    /// older one. Also returns the folds and the offsets that apply.
    fn history(steps: &[(bool, u8)]) -> (Vec<Commit<()>>, Vec<Fold<()>>, HashSet<u64>) {
        let mut entries: Vec<Commit<()>> = Vec::new();
        let (mut folds, mut applied) = (vec![Fold::<()>::default()], HashSet::new());
        let mut known = [0, 0];
        for (writer, act) in steps {
            let writer = usize::from(*writer);
            let entry = match act {
                0..=2 if !entries.is_empty() => entries[entries.len() * usize::from(*act) / 3].clone(),
                3..=5 => {
                    known[writer] = entries.len();
                    continue;
                }
                _ => {
                    let fold = &folds[known[writer]];
                    Commit {
                        token: entries.len() as Token + 1,
                        parent: fold.token,
                        expected: fold.revision,
                        revision: fold.revision.next_count(),
                        log: LogId::new("orders").expect("name"),
                        next: Offset::ZERO,
                        owner: None,
                        note: essentially_once::backend::Note::default(),
                        journal: None,
                        change: (),
                    }
                }
            };
            let mut fold = folds[entries.len()].clone();
            let offset = entries.len() as u64;
            if fold.apply(offset, entry.clone()) == Ok(Verdict::Applied) {
                applied.insert(offset);
            }
            entries.push(entry);
            folds.push(fold);
        }
        (entries, folds, applied)
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn those_that_apply_are_found_backwards(steps in vec((any::<bool>(), 0u8..12), 1..40)) {
            let (entries, folds, applied) = history(&steps);
            for (end, fold) in folds.iter().enumerate() {
                for start in 0..=end {
                    let mut links = Links::default();
                    for (offset, entry) in entries.iter().enumerate().take(end).skip(start) {
                        links.add(offset as u64, entry.token, entry.parent);
                    }
                    let expected: HashSet<u64> = (start as u64..end as u64).filter(|at| applied.contains(at)).collect();
                    let found = links.back_from(fold.token, end as u64);
                    // A copy of an entry that applied before the start looks like it. Only a
                    // foreign program writes one.
                    let is_copy = |at: u64| {
                        let token = entries[at as usize].token;
                        entries.iter().position(|entry| entry.token == token) < Some(start)
                    };
                    let unexpected: Vec<_> = found.difference(&expected).filter(|at| !is_copy(**at)).collect();
                    prop_assert!(unexpected.is_empty() && expected.is_subset(&found), "{start}..{end}: {found:?}, not {expected:?}");
                }
            }
        }
    }
}
