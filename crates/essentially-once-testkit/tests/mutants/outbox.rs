//! The model's outboxes, which are logs. A commit appends to them under the same lock under which
//! it changes the state and the position.

use std::{
    collections::HashMap,
    mem,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use essentially_once::{
    ConsumerId, Epoch, Error, NewRecord, Offset, Origin, Outbox, ProducerId, Record, async_trait,
    backend::{LogId, Numbering, check_unnumbered, new_producer},
};
use tokio::time::sleep;

use crate::{
    defect::Defect,
    log::LogState,
    model::{RECORD_LIMIT, Shared, State},
    store::Handle,
    transaction::ModelTx,
};

/// How late the records of a commit arrive that is acknowledged without them.
const LATE: Duration = Duration::from_millis(30);
/// The log whose numbers all outboxes share, where they do.
const COUNTER: &str = "counter";

/// A record, and the outbox that it goes to.
#[derive(Clone)]
pub(crate) struct Sent {
    log: String,
    record: NewRecord,
    /// The number that a defect gives it when it is staged.
    number: Option<u64>,
}

/// What an outbox knows of its numbers.
#[derive(Default)]
pub(crate) struct Numbers {
    producer: Option<ProducerId>,
    /// The next number. Defects keep several, by consumer or commit.
    next: HashMap<String, u64>,
    restarts: u64,
    /// The first consumer that sent, where a defect accepts no other.
    first_consumer: Option<ConsumerId>,
    /// The records of the commit before, where a defect holds them back.
    held_back: Vec<Sent>,
}

impl Numbers {
    pub(crate) fn restart(&mut self, defect: Defect, records: u64) {
        self.restarts += 1;
        match defect {
            Defect::NumbersStartOverAtRestart => self.start_over(),
            Defect::NumbersRecountedAtRestart => drop(self.next.insert(String::new(), records)),
            Defect::ProducerRedrawnAtRestart => self.forget_producer(),
            _ => {}
        }
    }

    pub(crate) fn start_over(&mut self) {
        self.next.clear();
    }

    pub(crate) fn forget_producer(&mut self) {
        self.producer = None;
    }
}

/// Who sends.
struct Source {
    shared: Arc<Shared>,
    handle: Arc<Handle>,
    consumer: ConsumerId,
}

impl Source {
    fn of(tx: &ModelTx) -> Self {
        Self {
            shared: Arc::clone(&tx.shared),
            handle: Arc::clone(&tx.handle),
            consumer: tx.consumer.clone(),
        }
    }

    /// Appends the records to their outboxes.
    fn write(&self, state: &mut State, mut sent: Vec<Sent>) -> Result<(), Error> {
        let (shared, defect) = (&self.shared, self.shared.defect);
        if defect == Defect::LaterCommitOvertakesSent {
            sent = overtaking(shared, state, sent)?;
        }
        for one in sent {
            let name = match defect {
                Defect::OutboxPerConsumer => format!("{}-{}", one.log, self.consumer),
                _ => one.log.clone(),
            };
            let commits = state.store.commits;
            let shared_number = match defect {
                Defect::OutboxesShareACounter => Some(self.number(state.log(shared, COUNTER)?, &one, commits)),
                _ => None,
            };
            let log = state.log(shared, &name)?;
            let first = log.numbers.first_consumer.get_or_insert_with(|| self.consumer.clone());
            if defect == Defect::OutboxOfItsFirstConsumer && *first != self.consumer {
                continue;
            }
            let number = shared_number.unwrap_or_else(|| self.number(log, &one, commits));
            let origin = self.origin(log, &one, commits, number)?;
            let mut record = Record::new(Offset::ZERO, SystemTime::now(), one.record.payload);
            if defect != Defect::SentKeysLost {
                record.key = one.record.key;
            }
            if defect != Defect::SentHeadersLost {
                record.headers = one.record.headers;
            }
            record.origin = origin;
            log.write(shared, record);
        }
        Ok(())
    }

    /// Takes the number of a record.
    fn number(&self, log: &mut LogState, one: &Sent, commits: u64) -> u64 {
        let defect = self.shared.defect;
        let counter = match defect {
            Defect::NumberedByTheConsumer => self.consumer.to_string(),
            Defect::NumberedByTheCommit => commits.to_string(),
            _ => String::new(),
        };
        let mut of_handle = lock(&self.handle.numbers);
        let next = match defect {
            Defect::NumberedByTheHandle => of_handle.entry(one.log.clone()).or_default(),
            _ => log.numbers.next.entry(counter).or_default(),
        };
        let last = log.entries.last().and_then(|last| last.origin.as_ref());
        let number = match defect {
            Defect::NumberedAtSend | Defect::NumberedFromASequence => one.number.unwrap_or(*next),
            Defect::OneNumberPerCommit => commits,
            Defect::NumberedByTheRetained => log.entries.len() as u64,
            Defect::NumberedAfterTheLastRecord => last.map_or(0, |last| last.sequence + 1),
            _ => *next,
        };
        *next = (*next).max(number + 1);
        if defect == Defect::SentNumbersHaveGaps {
            *next += commits % 5 * 10;
        }
        number
    }

    fn origin(&self, log: &mut LogState, one: &Sent, commits: u64, number: u64) -> Result<Option<Origin>, Error> {
        let numbers = &mut log.numbers;
        let producer = match (&numbers.producer, self.shared.defect) {
            (_, Defect::SentWithoutOrigin) => return Ok(None),
            (_, Defect::OriginOfTheRecordKept) if one.record.origin.is_some() => return Ok(one.record.origin.clone()),
            (_, Defect::ProducerSharedByOutboxes) => ProducerId::new("outbox")?,
            (_, Defect::ProducerPerConsumer) => ProducerId::new(format!("{}@{}", one.log, self.consumer))?,
            (Some(producer), _) => producer.clone(),
            (None, _) => numbers.producer.insert(new_producer(&one.log)?).clone(),
        };
        let epoch = match self.shared.defect {
            Defect::FreshEpochPerCommit => Epoch::new(commits + 1),
            Defect::FreshEpochAtRestart => Epoch::new(numbers.restarts),
            Defect::OutboxEpochNotStable => Epoch::new(7),
            _ => Epoch::STABLE,
        };
        Ok(Some(Origin::of(Numbering::new(producer, epoch), number)))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Holds the records of every other commit back until after the next one.
fn overtaking(shared: &Shared, state: &mut State, sent: Vec<Sent>) -> Result<Vec<Sent>, Error> {
    let mut by_log: HashMap<String, Vec<Sent>> = HashMap::new();
    for one in sent {
        by_log.entry(one.log.clone()).or_default().push(one);
    }
    let mut now = Vec::new();
    for (log, own) in by_log {
        let held_back = &mut state.log(shared, &log)?.numbers.held_back;
        match held_back.is_empty() {
            true => *held_back = own,
            false => {
                now.extend(own);
                now.append(held_back);
            }
        }
    }
    Ok(now)
}

/// Appends what a transaction sends, as part of its commit.
pub(crate) fn commit(tx: &ModelTx, state: &mut State) -> Result<(), Error> {
    let (source, mut sent) = (Source::of(tx), tx.sent.clone());
    let mut unsent = lock(&tx.handle.unsent);
    match tx.shared.defect {
        Defect::SentNotCommitted | Defect::SentAtOnce => sent.clear(),
        Defect::OnlyTheLastIsSent => drop(sent.drain(..sent.len().saturating_sub(1))),
        Defect::SentTwice => sent = sent.iter().flat_map(|one| [one.clone(), one.clone()]).collect(),
        Defect::SentWithTheNextCommit => mem::swap(&mut sent, &mut unsent),
        Defect::UncommittedStaysBuffered => drop(sent.splice(0..0, unsent.drain(..))),
        Defect::SentInReverse => sent.reverse(),
        Defect::SentGroupedByKey => sent.sort_by(|a, b| a.record.key.cmp(&b.record.key)),
        Defect::SentToTheLastLog => {
            if let Some(last) = sent.last().map(|last| last.log.clone()) {
                sent.iter_mut().for_each(|one| one.log.clone_from(&last));
            }
        }
        Defect::SentAfterTheReply => {
            tokio::spawn(async move {
                sleep(LATE).await;
                source.write(&mut source.shared.state(), sent)
            });
            return Ok(());
        }
        _ => {}
    }
    source.write(state, sent)
}

/// Called for a transaction that is not committed. It sends its records if it is broken that way.
pub(crate) fn not_committed(tx: &ModelTx, state: &mut State, sends: Defect) {
    send_if(tx, state, sends);
    if tx.shared.is(Defect::UncommittedStaysBuffered) {
        lock(&tx.handle.unsent).extend(tx.sent.iter().cloned());
    }
}

/// Called for a commit whose reply was lost.
pub(crate) fn reply_lost(tx: &ModelTx, state: &mut State) {
    if tx.shared.is(Defect::LostReplyTakesNumbersBack) {
        for one in &tx.sent {
            let next = state.logs.get_mut(&one.log).map(|log| &mut log.numbers.next);
            if let Some(next) = next.and_then(|next| next.get_mut("")) {
                *next = next.saturating_sub(1);
            }
        }
    }
}

/// Appends the records outside the commit, if the transaction is broken that way.
pub(crate) fn send_if(tx: &ModelTx, state: &mut State, sends: Defect) {
    if tx.shared.is(sends) {
        // A name that no log can have was refused when the record was staged.
        let _ = Source::of(tx).write(state, tx.sent.clone());
    }
}

impl ModelTx {
    fn check_sent(&self, state: &State, log: &str, record: &NewRecord) -> Result<(), Error> {
        let defect = self.shared.defect;
        match LogId::new(log) {
            Err(_) if defect == Defect::BadLogNameIsAFailure => return Err(Error::failed("send", "no such log")),
            checked => drop(checked?),
        }
        match defect {
            Defect::OriginOfTheRecordKept | Defect::OriginOfTheRecordReplaced => {}
            Defect::UnknownOutboxRefused if !state.logs.contains_key(log) => {
                return Err(Error::failed("send", "no such log"));
            }
            _ => check_unnumbered(log, record)?,
        }
        let mut measured = record.clone();
        match defect {
            Defect::NoSentLimit => measured = NewRecord::default(),
            Defect::SentSizedByThePayload => (measured.key, measured.headers) = (None, Vec::new()),
            Defect::SentLimitIsExclusive => measured = measured.header("x", ""),
            _ => {}
        }
        measured.check_size(RECORD_LIMIT)
    }

    /// The number of a record that a defect numbers when it is staged.
    fn number_at_send(&self, state: &mut State, log: &str) -> Result<Option<u64>, Error> {
        let next = state
            .log(&self.shared, log)?
            .numbers
            .next
            .entry(String::new())
            .or_default();
        Ok(match self.shared.defect {
            Defect::NumberedAtSend => {
                let staged = self.sent.iter().filter(|sent| sent.log == log);
                Some(*next + staged.count() as u64)
            }
            Defect::NumberedFromASequence => {
                *next += 1;
                Some(*next - 1)
            }
            _ => None,
        })
    }
}

#[async_trait]
impl Outbox for ModelTx {
    async fn send(&mut self, log: &str, mut record: NewRecord) -> Result<(), Error> {
        let defect = self.shared.defect;
        let checked = self.check_sent(&*self.connected()?, log, &record);
        match (&checked, defect) {
            (Ok(()), _) => {}
            (Err(_), Defect::RefusedSendStaged) if LogId::new(log).is_ok() => {
                record.origin = None;
                record.payload.truncate(RECORD_LIMIT);
            }
            (Err(_), Defect::RefusedSendDropsTheStaged) => {
                self.sent.clear();
                return checked;
            }
            (Err(_), defect) => {
                self.is_spoiled |= defect == Defect::RefusedSendEndsTheTransaction;
                return checked;
            }
        }
        let number = match defect {
            Defect::NumberedAtSend | Defect::NumberedFromASequence => {
                self.number_at_send(&mut *self.connected()?, log)?
            }
            _ => None,
        };
        let sent = Sent {
            log: log.to_owned(),
            record,
            number,
        };
        if defect == Defect::SentAtOnce {
            Source::of(self).write(&mut *self.connected()?, vec![sent.clone()])?;
        }
        self.sent.push(sent);
        checked
    }
}
