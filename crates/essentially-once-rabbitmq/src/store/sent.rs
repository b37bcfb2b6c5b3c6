//! Records that are sent by a commit: they are a part of its entry, and so are there if and only if it applies.

use std::{
    collections::{HashMap, HashSet},
    fmt,
    sync::Arc,
};

use async_trait::async_trait;
use essentially_once::{
    ConsumerId, Error, Log, NewRecord, Offset, Record,
    backend::{Bounds, Durability, LogId, LogReader},
};

use super::{
    RabbitStore, RabbitTx,
    changelog::Changelog,
    entry::{Entry, Parsed, parse},
    fold::{Change, Fold, Token, Verdict},
    names::{self, Kind},
};
use crate::{
    connection::Connection,
    packed,
    reader::RabbitReader,
    stream,
    tail::{Delivered, Tail},
};

impl RabbitTx {
    /// Sends a record if this transaction commits: it then is in the log [`RabbitStore::sent`] of this consumer, in the order of commits and
    /// calls. Nobody ever sees a record of a transaction that did not commit, or that lost to another.
    ///
    /// # Errors
    /// [`Error::TooLarge`] for a record over [`record_limit`](crate::RabbitOptions::record_limit), and for one that no longer fits
    /// the transaction, see [`RabbitStore`]. The transaction stays as it was.
    pub fn send(&mut self, record: NewRecord) -> Result<(), Error> {
        record.check_size(self.changelog.value_limit())?;
        let staged = self.staged + packed::size_bound(&record);
        self.changelog.check_entry_size(staged)?;
        self.staged = staged;
        self.sent.push(record);
        Ok(())
    }
}

impl RabbitStore {
    /// What the commits of a consumer have [sent](RabbitTx::send), as a log for other consumers.
    ///
    /// # Errors
    /// [`Error::InvalidSetting`] and [`Error::InvalidName`] if prefix and consumer make no name for it.
    pub fn sent(&self, consumer: &ConsumerId) -> Result<RabbitSent, Error> {
        let name = names::name(&self.server.options.prefix, consumer, Kind::Sent);
        Ok(RabbitSent {
            changelog: self.changelog(consumer)?,
            id: LogId::new(name)?,
        })
    }
}

/// The records that a consumer's commits have sent; see [`RabbitStore::sent`].
///
/// - They are kept in the consumer's changelog, so long as that keeps its entries: the last 512 MiB of it. A reader that is further behind is told
///   [`Error::Truncated`] if it has missed a record.
/// - Offsets are those of the changelog's messages, with the record's place in the commit.
/// - Appending fails: only commits send.
/// - To open a reader, this handle reads the consumer's state, as the store does.
#[derive(Clone)]
pub struct RabbitSent {
    changelog: Arc<Changelog>,
    id: LogId,
}

impl RabbitSent {
    /// Which of the entries from `start` up to the base's offset apply.
    ///
    /// A reader that has not seen all entries cannot judge one by the rule. But each names the entry that it builds on, and the base knows
    /// the last that applies: so those that apply are found backwards.
    async fn applied(
        &self,
        connection: &Arc<Connection>,
        start: u64,
        base: &Fold<Nothing>,
    ) -> Result<HashSet<u64>, Error> {
        let changelog = &self.changelog;
        let mut links = Links::default();
        let mut next = start;
        if next < base.offset {
            let mut tail = self.tail(connection, start).await?;
            while next < base.offset {
                for delivered in changelog.within_limit(tail.next(usize::MAX)).await? {
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
        let changelog = &self.changelog;
        Tail::open(&changelog.server, connection, &changelog.stream, start)
            .await
            .map_err(|error| changelog.read_error(error))
    }
}

/// Entries, and which one each builds on.
#[derive(Default)]
struct Links {
    entries: HashMap<Token, (u64, Token)>,
}

impl Links {
    fn add(&mut self, offset: u64, token: Token, parent: Token) {
        // Of one that came twice, only the first can apply.
        self.entries.entry(token).or_insert((offset, parent));
    }

    /// The offsets of those that the last one builds on, and its own.
    fn back_from(&self, last: Token, end: u64) -> HashSet<u64> {
        let mut applied = HashSet::new();
        let (mut token, mut before) = (last, end);
        // Downwards, so that it ends whatever the entries say.
        while let Some((offset, parent)) = self.entries.get(&token)
            && *offset < before
        {
            applied.insert(*offset);
            (token, before) = (*parent, *offset);
        }
        applied
    }
}

/// A reader needs to know which entries apply, and not what they add up to.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Nothing;

impl Change for Nothing {
    type State = Self;

    fn apply(self, _: u64, _: &mut Self) {}
}

/// Judges the entries that a reader comes by.
struct Judge {
    changelog: Arc<Changelog>,
    log: LogId,
    /// Of those before the base, the ones that apply.
    applied: HashSet<u64>,
    fold: Fold<Nothing>,
    /// Up to where the records were read.
    next: Offset,
}

impl Judge {
    fn records(&mut self, delivered: Delivered) -> Result<Vec<Record>, Error> {
        let offset = delivered.offset;
        let commit = match parse(delivered.body.into()) {
            Parsed::Entry(Entry::Commit(commit)) => commit,
            Parsed::Unreadable(why) => return Err(self.changelog.unreadable(offset, why)),
            // Offsets before the base's are not counted again.
            Parsed::Entry(Entry::Mark(_)) | Parsed::Foreign => return Ok(vec![]),
        };
        let (commit, change) = commit.replace(Nothing);
        let applies = if offset < self.fold.offset {
            self.applied.contains(&offset)
        } else {
            let verdict = self.fold.apply(offset, commit);
            verdict.map_err(|missing| self.changelog.missing(offset, missing))? == Verdict::Applied
        };
        let Some(sent) = change.sent.filter(|_| applies) else {
            return Ok(vec![]);
        };
        if sent.before > self.next {
            return Err(Error::Truncated {
                log: self.log.clone(),
                requested: self.next,
                earliest: Offset::new(offset, 0),
            });
        }
        self.next = Offset::new(offset, packed::count(&sent.packed));
        packed::decode(offset, &sent.packed).map_err(|why| Error::failed(self.changelog.on("read"), why))
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
            self.changelog.on("append to what was sent by"),
            "only its commits send: use `RabbitTx::send` in its handler",
        ))
    }

    async fn read(&self, from: Offset) -> Result<Box<dyn LogReader>, Error> {
        let (changelog, log) = (&self.changelog, self.id.clone());
        let (base, end) = changelog.base().await?;
        if from > end {
            let requested = from;
            return Err(Error::OutOfRange { log, requested, end });
        }
        let connection = Arc::new(changelog.server.open_connection().await?);
        let start = match from == end {
            true => base.offset,
            false => {
                let first = stream::bounds(&changelog.server, &connection, &changelog.stream)
                    .await?
                    .first;
                from.hi().max(first)
            }
        };
        let mut judge = Judge {
            changelog: Arc::clone(changelog),
            log: log.clone(),
            applied: self.applied(&connection, start, &base).await?,
            fold: base,
            next: from,
        };
        let tail = self.tail(&connection, start).await?;
        let records = move |delivered| judge.records(delivered);
        Ok(Box::new(RabbitReader::new(log, tail, from, records)))
    }

    async fn bounds(&self) -> Result<Bounds, Error> {
        let changelog = &self.changelog;
        let (_, end) = changelog.base().await?;
        let asking = &changelog.server.asking;
        let connection = asking.connection(&changelog.server).await?;
        let range = stream::bounds(&changelog.server, &connection, &changelog.stream).await;
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

    use super::{super::fold::Commit, *};

    /// Entries as two writers make them that now and then read what the other wrote, and republish an older one, and which of them apply.
    fn history(steps: &[(bool, u8)]) -> (Vec<Commit<Nothing>>, Vec<Fold<Nothing>>, HashSet<u64>) {
        let mut entries: Vec<Commit<Nothing>> = Vec::new();
        let (mut folds, mut applied) = (vec![Fold::<Nothing>::default()], HashSet::new());
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
                        passed: None,
                        change: Nothing,
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
                    // A copy of one that applied before the start looks like it; nobody but a stranger makes such.
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
