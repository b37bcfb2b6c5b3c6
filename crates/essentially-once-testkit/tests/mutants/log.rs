//! The model's log. Offsets are sparse and begin high, so that no case can rely on counting them.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use essentially_once::{
    Epoch, Error, Log, NewRecord, Offset, Origin, ProducerId, Record, async_trait,
    backend::{Bounds, Durability, LogId, LogReader},
};

use essentially_once_testkit::{Cut, Request};

use crate::{
    defect::Defect,
    model::{RECORD_LIMIT, Shared, Stage, in_doubt},
    outbox::Numbers,
    reader::ModelReader,
};

/// How many records at most stay in memory under the defect that acknowledges too early.
const FLUSH_EVERY: usize = 32;
/// How long after a wake-up a defect drops further ones.
const DEBOUNCE: Duration = Duration::from_millis(1);
/// How far another machine's clock is ahead.
const AHEAD: Duration = Duration::from_millis(400);

pub(crate) fn origin(producer: &str, sequence: u64) -> Result<Origin, Error> {
    let producer = ProducerId::new(producer)?;
    Ok(Origin::new(producer, Epoch::STABLE, sequence))
}

/// The backend's data of one log.
pub(crate) struct LogState {
    pub(crate) incarnation: u64,
    pub(crate) entries: Vec<Record>,
    /// A record whose offset precedes visible records. Only a defect leaves such a hole.
    hole: Option<Record>,
    /// How many of the last entries a restart loses. 0 without a defect.
    volatile: usize,
    /// The number of records ever written.
    written: u64,
    earliest: Offset,
    end: Offset,
    /// How far offsets are ahead of the count, because they need not be dense.
    leaps: u64,
    /// The payload of a record to refuse, once.
    pub(crate) refuse: Option<Vec<u8>>,
    woken: Option<Instant>,
    /// The numbers of an outbox.
    pub(crate) numbers: Numbers,
}

impl LogState {
    pub(crate) fn new(incarnation: u64) -> Self {
        Self {
            incarnation,
            entries: Vec::new(),
            hole: None,
            volatile: 0,
            written: 0,
            earliest: Offset::ZERO,
            end: Offset::ZERO,
            leaps: 0,
            refuse: None,
            woken: None,
            numbers: Numbers::default(),
        }
    }

    /// The index of the first entry at or after `offset`.
    pub(crate) fn index(&self, offset: Offset) -> usize {
        self.entries.partition_point(|record| record.offset < offset)
    }

    /// Writes one record at the end, durably, and returns its offset.
    pub(crate) fn write(&mut self, shared: &Shared, mut record: Record) -> Offset {
        self.written += 1;
        let offset = Offset::new(7, 3 * self.written + self.leaps);
        record.offset = offset;
        let is_silent = shared.is(Defect::SentWakesNoReader) && record.origin.is_some();
        self.end = offset.successor();
        if shared.is(Defect::HoleFillsInLater) && self.written % 10 == 5 {
            self.fill_hole();
            self.hole = Some(record);
        } else {
            self.entries.push(record);
        }
        if shared.is(Defect::AppendAcknowledgedBeforeDurable) {
            self.volatile = (self.volatile + 1) % FLUSH_EVERY;
        }
        let is_early = self.woken.is_some_and(|woken| woken.elapsed() < DEBOUNCE);
        if !is_silent && (!is_early || !shared.is(Defect::WakeUpsDebounced)) {
            self.woken = Some(Instant::now());
            shared.changes.send_replace(());
        }
        offset
    }

    /// The index of the record to refuse, if any.
    fn take_refusal(&mut self, new: &[NewRecord]) -> Option<usize> {
        let payload = self.refuse.as_ref()?;
        let refused = new.iter().position(|record| record.payload == *payload)?;
        self.refuse = None;
        Some(refused)
    }

    /// Removes one record at any place. The end stays.
    pub(crate) fn delete(&mut self, shared: &Shared, offset: Offset) {
        self.entries.retain(|record| record.offset != offset);
        if self.entries.is_empty() && shared.is(Defect::EmptiedReadableEndIsTheEarliest) {
            self.earliest = self.end;
        }
    }

    fn readable_end(&self, shared: &Shared) -> Offset {
        match (shared.defect, self.entries.last()) {
            (Defect::ReadableEndIgnoresDeletes, _) => self.end,
            (Defect::ReadableEndIsTheLastRecord, Some(last)) => last.offset,
            (_, Some(last)) => last.offset.successor(),
            (Defect::EmptiedReadableEndIsTheEarliest, None) => self.earliest,
            (_, None) => Offset::ZERO,
        }
    }

    fn is_emptied(&self) -> bool {
        self.entries.is_empty() && self.end > Offset::ZERO
    }

    fn fill_hole(&mut self) {
        if let Some(record) = self.hole.take() {
            self.entries.insert(self.index(record.offset), record);
        }
    }

    /// A reader has moved past `offset`. A hole before it fills in now at the latest.
    pub(crate) fn passed(&mut self, offset: Offset) {
        if self.hole.as_ref().is_some_and(|hole| hole.offset < offset) {
            self.fill_hole();
        }
    }

    pub(crate) fn restart(&mut self, shared: &Shared) {
        self.entries.truncate(self.entries.len() - self.volatile);
        if shared.is(Defect::SentNotDurable) {
            self.entries.retain(|record| record.origin.is_none());
        }
        self.numbers.restart(shared.defect, self.entries.len() as u64);
        self.volatile = 0;
        if let Some(last) = self.entries.last() {
            self.end = last.offset.successor();
        } else {
            self.end = self.earliest;
        }
        match shared.defect {
            Defect::OffsetsRecountedAtRestart => self.written = self.entries.len() as u64,
            Defect::EndForgottenAtRestart if self.entries.is_empty() => {
                (self.earliest, self.end) = (Offset::ZERO, Offset::ZERO);
            }
            Defect::OffsetsLeapAfterRetention => self.leaps += 1_000,
            _ => {}
        }
        if shared.is(Defect::RestartReplaysTheTail)
            && let Some(last) = self.entries.last().cloned()
        {
            self.write(shared, last);
        }
    }

    pub(crate) fn truncate(&mut self, shared: &Shared, before: Offset) {
        let mut removed = self.index(before);
        if shared.is(Defect::RetentionRemovesTooMuch) {
            removed += 1;
        }
        if let Some(last) = self.entries.drain(..removed).next_back() {
            self.earliest = last.offset.successor();
        }
        match shared.defect {
            Defect::OffsetsStartOverWhenEmptied if self.entries.is_empty() => self.written = 0,
            Defect::NumbersStartOverWhenEmptied if self.entries.is_empty() => self.numbers.start_over(),
            Defect::ProducerRedrawnWhenEmptied if self.entries.is_empty() => self.numbers.forget_producer(),
            Defect::OffsetsLeapAfterRetention => self.leaps += 1_000,
            _ => {}
        }
        if shared.is(Defect::RetentionLosesAppendTimes) {
            for record in &mut self.entries {
                record.appended_at = UNIX_EPOCH;
            }
        }
    }

    /// Removes the records before `offset`. `kept` are the records that were to be kept when the
    /// removal began.
    fn remove_before(&mut self, shared: &Shared, id: &LogId, offset: Offset, kept: &[Record]) -> Result<u64, Error> {
        let (log, end) = (id.clone(), self.end);
        let past = Error::OutOfRange {
            log: log.clone(),
            requested: offset,
            end,
        };
        match shared.defect {
            _ if offset <= end => {}
            Defect::RemovalPastTheEndAccepted => {}
            Defect::RemovalPastTheEndEmptiesTheLog => {
                self.truncate(shared, end);
                return Err(past);
            }
            Defect::RemovalPastTheEndToldAsFailure => return Err(Error::failed("remove records", "no such record")),
            _ => return Err(past),
        }
        if offset < self.earliest && shared.is(Defect::RemovalBelowTheEarliestRefused) {
            return Err(Error::Truncated {
                log,
                requested: offset,
                earliest: self.earliest,
            });
        }
        let earliest = self.earliest;
        let removed = self.index(offset);
        let before = match shared.defect {
            Defect::RemovalTakesOneTooMany => self.entries.get(removed).map_or(offset, |kept| kept.offset.successor()),
            Defect::RemovalLeavesTheLast if removed > 0 => self.entries[removed - 1].offset,
            Defect::RemovalKeepsACount => {
                let surplus = self.entries.len().saturating_sub(kept.len());
                self.entries.get(surplus).map_or(end, |kept| kept.offset)
            }
            _ => offset,
        };
        self.truncate(shared, before);
        if shared.is(Defect::RemovalDropsAppendsMeanwhile) {
            self.entries = kept.to_vec();
        }
        Ok(match shared.defect {
            Defect::RemovalCountsOffsets => offset.lo().saturating_sub(earliest.lo()),
            _ => removed as u64,
        })
    }

    /// Returns the error of reading at `requested`, if there is one.
    pub(crate) fn check(&self, shared: &Shared, log: &LogId, requested: Offset) -> Result<(), Error> {
        let (log, earliest, end) = (log.clone(), self.earliest, self.end);
        let is_refused = shared.is(Defect::EmptiedLogRefusesItsEnd) && self.is_emptied() && requested == end;
        if requested < earliest || is_refused {
            return match shared.defect {
                Defect::TruncatedTellsNoEarliest => Err(Error::Truncated {
                    log,
                    requested,
                    earliest: requested,
                }),
                Defect::TruncatedToldAsFailure => Err(Error::failed("read", "the record is gone")),
                Defect::TruncationSilent | Defect::TruncationWaits => Ok(()),
                _ => Err(Error::Truncated {
                    log,
                    requested,
                    earliest,
                }),
            };
        }
        let is_past = match shared.defect {
            Defect::OffsetsComparedByLowPart => requested.lo() > end.lo(),
            Defect::EndCheckedLoosely => requested > end.successor(),
            _ => requested > end,
        };
        if is_past {
            return match shared.defect {
                Defect::OldOffsetTruncatedInNewLog => Err(Error::Truncated {
                    log,
                    requested,
                    earliest,
                }),
                Defect::PastEndToldAsFailure => Err(Error::failed("read", "no such record")),
                Defect::PastEndWaits | Defect::PastEndReadsTheLast | Defect::OldOffsetWaitsInNewLog => Ok(()),
                _ => Err(Error::OutOfRange { log, requested, end }),
            };
        }
        Ok(())
    }

    /// Where a reader opened at `from` begins.
    fn start(&self, shared: &Shared, from: Offset) -> Offset {
        let index = self.index(from);
        let is_exact = self.entries.get(index).is_some_and(|record| record.offset == from);
        let before = || index.checked_sub(1).map_or(from, |index| self.entries[index].offset);
        match shared.defect {
            Defect::ReaderStartsOneLate if is_exact => from.successor(),
            Defect::ReaderStartsOneEarly if is_exact => before(),
            Defect::ReaderStartsBeforeABetween if !is_exact => before(),
            Defect::PastEndReadsTheLast if from > self.end => before(),
            Defect::TruncationSilent => from.max(self.earliest),
            Defect::TruncationWaits if from < self.earliest => self.end,
            _ => from,
        }
    }
}

/// A handle of the log, as one process would have it.
pub(crate) struct ModelLog {
    pub(crate) shared: Arc<Shared>,
    pub(crate) id: LogId,
    pub(crate) key: String,
    pub(crate) incarnation: u64,
    pub(crate) generation: u64,
    /// Records that a defect delays from one append to the next.
    kept_back: Mutex<Vec<NewRecord>>,
    /// The place that all readers of the handle share under a defect.
    pub(crate) cursor: Arc<Mutex<Offset>>,
    opened: SystemTime,
    /// The number of appends refused for a record's size.
    refusals: AtomicUsize,
    /// Held by the current append, where appends take turns.
    turn: tokio::sync::Mutex<()>,
}

impl ModelLog {
    pub(crate) fn new(shared: Arc<Shared>, id: LogId, key: &str, incarnation: u64, generation: u64) -> Self {
        Self {
            shared,
            id,
            key: key.to_owned(),
            incarnation,
            generation,
            kept_back: Mutex::default(),
            cursor: Arc::default(),
            opened: SystemTime::now(),
            refusals: AtomicUsize::default(),
            turn: tokio::sync::Mutex::default(),
        }
    }

    /// Runs `work` on the log if the handle, the log and the connection still exist.
    fn with<T>(&self, work: impl FnOnce(&mut LogState) -> Result<T, Error>) -> Result<T, Error> {
        self.with_connection(self.generation, work)
    }

    fn with_connection<T>(
        &self,
        generation: u64,
        work: impl FnOnce(&mut LogState) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let mut state = self.shared.connected(generation)?;
        if self.shared.is(Defect::OldHandleCreatesTheLog) {
            let created = LogState::new(self.incarnation);
            state.logs.entry(self.key.clone()).or_insert(created);
        }
        match state.logs.get_mut(&self.key) {
            Some(log) if log.incarnation == self.incarnation || self.shared.is(Defect::OldHandleAppendsToNewLog) => {
                work(log)
            }
            _ => Err(Error::failed(format!("use log {}", self.id), "it was deleted")),
        }
    }

    fn check_sizes(&self, new: &[NewRecord]) -> Result<(), Error> {
        for record in new {
            let mut measured = record.clone();
            match self.shared.defect {
                Defect::NoRecordLimit => measured = NewRecord::default(),
                Defect::KeyNotMeasured => measured.key = None,
                Defect::HeadersNotMeasured => measured.headers.clear(),
                Defect::LimitIsExclusive => measured = measured.header("x", ""),
                _ => {}
            }
            measured.check_size(RECORD_LIMIT).map_err(|error| match error {
                _ if self.shared.is(Defect::RefusalNamesNoLimit) => Error::failed("append", error),
                error => error,
            })?;
        }
        Ok(())
    }

    fn entry(&self, new: &NewRecord) -> Record {
        let now = SystemTime::now();
        let appended_at = match self.shared.defect {
            Defect::AppendTimeOfTheHandle => self.opened,
            Defect::AppendTimeInSeconds => {
                let seconds = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
                UNIX_EPOCH + Duration::from_secs(seconds)
            }
            Defect::ClockOfTheServer => now + AHEAD,
            _ => now,
        };
        let mut record = Record::new(Offset::ZERO, appended_at, new.payload.clone());
        record.key.clone_from(&new.key);
        record.headers.clone_from(&new.headers);
        record.origin.clone_from(&new.origin);
        record
    }

    /// The batch as it is sent, changed by a defect.
    fn outgoing(&self, new: &[NewRecord]) -> Vec<NewRecord> {
        let mut outgoing = new.to_vec();
        let mut kept_back = self.kept_back.lock().unwrap_or_else(PoisonError::into_inner);
        if self.shared.is(Defect::BatchWrittenBackwards) {
            outgoing.reverse();
        } else if matches!(
            self.shared.defect,
            Defect::RefusedBatchStaysBuffered | Defect::RefusedTailComesLater
        ) {
            outgoing.splice(0..0, kept_back.drain(..));
        } else if self.shared.is(Defect::LaterBatchOvertakes) && kept_back.is_empty() {
            kept_back.append(&mut outgoing);
        } else if self.shared.is(Defect::LaterBatchOvertakes) {
            outgoing.append(&mut kept_back);
        }
        outgoing
    }

    /// The backend refuses one record of a batch. Without a defect, it refuses the whole batch.
    fn refused(&self, outgoing: &[NewRecord], refused: usize) -> Error {
        let full = Error::unavailable("append", "the disk is full");
        let (before, rest) = outgoing.split_at(refused);
        let write = |records: &[NewRecord]| {
            for record in records {
                // Writing to a deleted log has no effect.
                let _ = self.with(|log| Ok(log.write(&self.shared, self.entry(record))));
            }
        };
        match self.shared.defect {
            Defect::RefusedMiddleLeavesAPrefix => write(before),
            Defect::RefusedMiddleSkipped => {
                write(before);
                write(&rest[1..]);
                return in_doubt(full);
            }
            Defect::RefusedTailComesLater => {
                let mut kept_back = self.kept_back.lock().unwrap_or_else(PoisonError::into_inner);
                kept_back.extend_from_slice(rest);
            }
            Defect::RefusedMiddleInDoubt => {
                write(before);
                return in_doubt(full);
            }
            _ => {}
        }
        full
    }

    /// Applies the effect of a request or reply lost on the wire.
    fn lost(&self, cut: Cut, outgoing: &[NewRecord], last: Option<Offset>) -> Result<Option<Offset>, Error> {
        let lost = Error::unavailable("append", "the connection was cut");
        match (self.shared.defect, cut) {
            (Defect::LostRepliesLookedUp, Cut::BeforeReply) => Ok(last),
            (Defect::LostRepliesLookedUp, Cut::BeforeRequest) => Err(lost),
            (Defect::LostAppendReplyToldAsFailure, _) => Err(lost),
            (Defect::LostAppendRequestToldAsSuccess, Cut::BeforeRequest) => Ok(None),
            (Defect::AppendRetriedAfterLostReply, Cut::BeforeReply) => {
                for record in outgoing {
                    self.with(|log| Ok(log.write(&self.shared, self.entry(record))))?;
                }
                Ok(last)
            }
            _ => Err(in_doubt(lost)),
        }
    }
}

#[async_trait]
impl Log for ModelLog {
    fn id(&self) -> &LogId {
        &self.id
    }

    async fn append(&self, new: &[NewRecord]) -> Result<Option<Offset>, Error> {
        if let Err(error) = self.check_sizes(new) {
            if self.shared.is(Defect::PrefixAppendedBeforeRefusal) {
                self.with(|log| Ok(log.write(&self.shared, self.entry(&new[0]))))?;
            }
            if self.shared.is(Defect::RefusedBatchStaysBuffered) {
                let mut kept_back = self.kept_back.lock().unwrap_or_else(PoisonError::into_inner);
                kept_back.push(new[0].clone());
            }
            self.refusals.fetch_add(1, Ordering::SeqCst);
            return Err(error);
        }
        if new.is_empty() {
            return self.with(|log| match self.shared.defect {
                Defect::EmptyAppendTellsTheEnd => Ok(Some(log.end)),
                Defect::EmptyAppendAddsARecord => {
                    log.write(&self.shared, self.entry(&NewRecord::default()));
                    Ok(None)
                }
                _ => Ok(None),
            });
        }
        let _turn = match self.shared.defect {
            Defect::AppendsTakeTurns => Some(self.turn.lock().await),
            _ => None,
        };
        let refusals = self.refusals.load(Ordering::SeqCst);
        let has_refused = || self.refusals.load(Ordering::SeqCst) != refusals;
        self.shared.travel(self.generation, Stage::Request).await?;
        let cut = self.shared.cut(Request::Append);
        if cut == Some(Cut::BeforeRequest) {
            return self.lost(Cut::BeforeRequest, new, None);
        }
        if self.shared.is(Defect::RefusalDropsTheNeighbour) && has_refused() {
            return Ok(None);
        }
        if self.shared.is(Defect::OldHandleAppendsVanish) && self.with(|_| Ok(())).is_err() {
            return Ok(None);
        }
        let outgoing = self.outgoing(new);
        if let Some(refused) = self.with(|log| Ok(log.take_refusal(&outgoing)))? {
            return Err(self.refused(&outgoing, refused));
        }
        let (mut first, mut last, mut generation) = (None, None, self.generation);
        for new in &outgoing {
            match self.with_connection(generation, |log| Ok(log.write(&self.shared, self.entry(new)))) {
                Ok(offset) => {
                    first = first.or(Some(offset));
                    last = Some(offset);
                }
                Err(error) if first.is_none() => return Err(error),
                Err(_) if self.shared.is(Defect::ReconnectTearsBatch) => generation = self.shared.state().generation,
                Err(error) => return Err(in_doubt(error)),
            }
            let is_first = first == last;
            self.shared
                .pause(if is_first { Stage::Begun } else { Stage::Halfway })
                .await;
        }
        if self.shared.is(Defect::NeighbourToldTheRefusal) && has_refused() {
            return Err(Error::unavailable("append", "the channel was closed"));
        }
        if cut == Some(Cut::BeforeReply) {
            return self.lost(Cut::BeforeReply, &outgoing, last);
        }
        match self.shared.travel(self.generation, Stage::Reply).await {
            Err(error) if self.shared.is(Defect::LostAppendReplyToldAsFailure) => Err(error),
            Err(error) => Err(in_doubt(error)),
            Ok(()) if self.shared.is(Defect::AppendTellsTheFirst) => Ok(first),
            Ok(()) => Ok(last),
        }
    }

    async fn read(&self, from: Offset) -> Result<Box<dyn LogReader>, Error> {
        let (start, is_new) = self.with(|log| {
            log.check(&self.shared, &self.id, from)?;
            Ok((log.start(&self.shared, from), log.entries.is_empty()))
        })?;
        *self.cursor.lock().unwrap_or_else(PoisonError::into_inner) = start;
        Ok(Box::new(ModelReader::new(self, start, is_new)))
    }

    async fn bounds(&self) -> Result<Bounds, Error> {
        self.with(|log| {
            let (mut earliest, mut end) = (log.earliest, log.end);
            match (log.entries.first(), log.entries.last()) {
                (None, _) if self.shared.is(Defect::EmptyLogHasAnEnd) => end = end.successor(),
                (None, _) if self.shared.is(Defect::EndForgottenWhenEmptied) => {
                    (earliest, end) = (Offset::ZERO, Offset::ZERO);
                }
                (Some(first), _) if self.shared.is(Defect::EarliestIsBehindTheFirst) => {
                    earliest = first.offset.successor();
                }
                (Some(_), _) if self.shared.is(Defect::BoundsIgnoreRetention) => earliest = Offset::ZERO,
                (_, Some(last)) if self.shared.is(Defect::EndIsTheLastRecord) => end = last.offset,
                _ => {}
            }
            Ok(Bounds { earliest, end })
        })
    }

    async fn readable_end(&self) -> Result<Offset, Error> {
        self.with(|log| Ok(log.readable_end(&self.shared)))
    }

    async fn remove_before(&self, offset: Offset) -> Result<u64, Error> {
        self.shared.travel(self.generation, Stage::Request).await?;
        let kept = self.with(|log| Ok(log.entries[log.index(offset)..].to_vec()))?;
        self.shared.pause(Stage::Idle).await;
        let removed = self.with(|log| log.remove_before(&self.shared, &self.id, offset, &kept))?;
        self.shared.changes.send_replace(());
        Ok(removed)
    }

    async fn tail(&self, count: u64) -> Result<Option<Offset>, Error> {
        self.with(|log| {
            let held = log.entries.len() as u64;
            let count = match self.shared.defect {
                Defect::TailIsOneShort => count.saturating_sub(1),
                Defect::TailIsOneLong => count.saturating_add(1),
                Defect::TailIsAll if count > 0 => held,
                _ => count,
            };
            let entry = log.entries.get((held - count.min(held)) as usize);
            Ok(match self.shared.defect {
                Defect::TailIgnoresRetention if count >= held => Some(Offset::ZERO),
                Defect::TailIsUnknown => None,
                Defect::TailEmptyAfterRetention if log.earliest > Offset::ZERO => Some(log.end),
                Defect::TailBetweenRecords => {
                    let before = (held - count.min(held)).checked_sub(1);
                    let before = before.map(|place| log.entries[place as usize].offset.successor());
                    Some(before.unwrap_or(log.earliest))
                }
                _ => Some(entry.map_or(log.end, |entry| entry.offset)),
            })
        })
    }

    async fn durability(&self) -> Result<Durability, Error> {
        self.shared.durability([
            Defect::LogDurabilityFails,
            Defect::LogDurabilityWavers,
            Defect::LogVolatileWithoutReason,
        ])
    }
}
