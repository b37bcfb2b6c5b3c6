//! The beginning of a session: loading the stored position, and opening a reader there.

use std::mem;

use super::{
    failure::Failure,
    letters::Parked,
    policy::OnTruncated,
    read_ahead::ReadAhead,
    resume::resume,
    run::{Done, Seen, Unanswered},
    seek::{StartAt, resolve},
    session::{Place, Session},
    standby::Watched,
};
use crate::{Error, LogReader, Note, Offset, OffsetStore, Position, note::InHand, window::Windows};

/// How many times a new consumer tries to begin at the earliest record before it gives up the race
/// with retention.
const MAX_STARTS: usize = 10;

/// Where the records of a session come from.
pub(super) enum Source {
    Reader(Box<dyn LogReader>),
    /// What the last session has read ahead.
    ReadAhead(ReadAhead),
}

impl<S: OffsetStore> Session<'_, S> {
    /// Loads the stored position, and opens a reader there unless the last session has read ahead
    /// from there. Returns `None` if another instance has brought the position to `until`.
    pub(super) async fn load(&mut self, until: Option<Offset>) -> Result<Option<Source>, Failure> {
        let mut has_stood_by = false;
        let mut silent_since = None;
        loop {
            let stored = self.or_stop(self.store.position(self.id)).await?;
            self.check_not_lost(stored.as_ref()).await?;
            let Some(position) = stored else {
                (self.run.started_at, self.run.is_overtaken) = (None, false);
                return Ok(Some(Source::Reader(self.start().await?)));
            };
            if !position.log.is_same_log(self.log.id()) {
                return Err(Failure::Backend(Error::WrongLog {
                    consumer: self.id.clone(),
                    stored: position.log,
                    given: self.log.id().clone(),
                }));
            }
            self.run.seen = Some(Seen {
                revision: position.revision,
                next: position.next,
            });
            self.count_unanswered(&position);
            self.run.is_owner = position.owner == Some(self.owner);
            if let Some(paused) = position.journal.paused() {
                self.wait_while_paused(&position, paused, until.is_some()).await?;
                continue;
            }
            let has_other_owner = position.owner.is_some_and(|owner| owner != self.owner);
            if has_other_owner
                && !self.settings.standby_after.is_zero()
                && silent_since.take() != Some(position.revision)
            {
                if let Some(last_sign) = self.run.last_sign.take() {
                    // This instance was displaced although it was alive: it was silent for longer
                    // than a standby tolerates.
                    let silence = last_sign.elapsed();
                    self.run.silences.remember(silence, self.settings.standby_after);
                }
                has_stood_by = true;
                self.run.end_reading().await;
                match self.stand_by(&position, until).await? {
                    Watched::CaughtUp => return Ok(None),
                    Watched::Silent(revision) => silent_since = Some(revision),
                    Watched::Changed => {}
                }
                self.heart.work();
                continue;
            }
            if has_other_owner && !self.settings.standby_after.is_zero() {
                self.suspect_records();
            }
            self.go_to(position);
            let Place { revision, next, .. } = self.place;
            let left = self
                .run
                .ahead
                .take_if(|(at, ahead)| *at == revision && ahead.is_at(next));
            self.run.end_reading().await;
            return Ok(Some(match left {
                Some((_, ahead)) => Source::ReadAhead(ahead),
                None => Source::Reader(self.read_on(has_stood_by).await?),
            }));
        }
    }

    /// Makes the stored position the one to go on from.
    fn go_to(&mut self, position: Position) {
        let Position {
            next,
            revision,
            mut note,
            windows,
            owner,
            ..
        } = position;
        // Whoever released the position was alive.
        if owner.is_none() {
            note = note.with_in_hand(InHand::default());
        }
        tracing::debug!(%next, %revision, "loaded the position");
        self.place = Place {
            next,
            note,
            revision,
            is_epoch_open: false,
        };
        self.run.report.next = Some(next);
        // Tries that are stored outlive a restart. Those of a record behind others are stored with
        // the commit of the others.
        if let Some(stored) = self.place.note.tried() {
            // A record before that one may have failed since, behind others, and must be tried
            // alone.
            self.tried.take_if(|tried| tried.offset() >= stored.offset());
            self.tried.get_or_insert_with(|| stored.clone());
        }
        self.windows = Windows::new(windows);
    }

    /// Opens a reader at the position. An instance that stood by first takes ownership of the
    /// position, so that neither the former owner nor another standby handles the same records in
    /// vain.
    async fn read_on(&mut self, has_stood_by: bool) -> Result<Box<dyn LogReader>, Failure> {
        let next = self.place.next;
        if mem::take(&mut self.run.is_overtaken) && self.is_at_start() {
            return self.start().await;
        }
        let reader = match self
            .or_stop(resume(self.log, self.id, self.place.note.passed(), next))
            .await
        {
            Err(Failure::Backend(Error::Truncated { .. })) if self.is_at_start() => return self.start().await,
            Err(Failure::Backend(Error::Truncated { earliest, .. }))
                if self.settings.on_truncated == OnTruncated::SkipToEarliest =>
            {
                return self.skip_to(earliest).await;
            }
            Err(failure) => return Err(self.explain_truncated(failure).await),
            Ok(reader) => reader,
        };
        if has_stood_by {
            let tx = self.begin().await?;
            self.commit_unmoved(tx, Done::default()).await?;
        }
        Ok(reader)
    }

    /// Opens a reader at the earliest record, which is past the position, and commits that place.
    async fn skip_to(&mut self, mut earliest: Offset) -> Result<Box<dyn LogReader>, Failure> {
        let from = self.place.next;
        let mut tries = 1;
        let reader = loop {
            match self.or_stop(self.log.read(earliest)).await {
                // Retention goes on meanwhile.
                Err(Failure::Backend(Error::Truncated { earliest: later, .. }))
                    if later > earliest && tries < MAX_STARTS =>
                {
                    earliest = later;
                    tries += 1;
                }
                reader => break reader?,
            }
        };
        let tx = self.begin().await?;
        // Before the commit, whose reply may be lost.
        tracing::warn!(
            log = %self.log.id(), %from, to = %earliest,
            "retention removed records before they were handled; continuing at the earliest one"
        );
        let done = Done {
            jump: Some((from, earliest)),
            ..Done::default()
        };
        self.commit_at(tx, earliest, Note::default(), done).await?;
        self.count(done, &[]);
        Ok(reader)
    }

    /// Fails if the store lost commits that this run has seen, unless the log lost their records
    /// too.
    async fn check_not_lost(&mut self, stored: Option<&Position>) -> Result<(), Failure> {
        let Some(seen) = self.run.seen else {
            return Ok(());
        };
        let found = stored.map(|position| position.revision);
        if found.is_some_and(|found| !found.is_lost_since(seen.revision)) {
            return Ok(());
        }
        // Without a position, any other start would pass over records whose effects the store has
        // lost. Once the log has grown past the newest position that this run has seen, missing
        // records may also have been deleted.
        let can_go_on = found.is_some() || self.settings.start_at == StartAt::Earliest;
        let went_back_together = can_go_on && self.or_stop(self.log.bounds()).await?.end < seen.next;
        if !went_back_together {
            return Err(Failure::Backend(Error::PositionLost {
                consumer: self.id.clone(),
                seen: seen.revision,
                found,
            }));
        }
        tracing::warn!(
            seen = %seen.revision,
            found = ?found,
            "position and log went back together, as in a failover; continuing from the stored position"
        );
        self.run.parked = Parked::default();
        self.run.report.rewound += 1;
        self.telemetry.rewound.increment(1);
        Ok(())
    }

    /// Whether this is the first position of a new consumer that has not received a record yet.
    fn is_at_start(&self) -> bool {
        self.run.started_at == Some((self.place.revision, self.place.next))
    }

    /// Opens a reader at the configured start, and then commits that place as the first position.
    /// It begins again if retention overtakes the place meanwhile, or has overtaken the first
    /// position of a consumer that has not received a record yet.
    async fn start(&mut self) -> Result<Box<dyn LogReader>, Failure> {
        let mut starts = 1;
        let (next, reader) = loop {
            let next = self.or_stop(resolve(self.log, self.settings.start_at)).await?;
            match self.or_stop(self.log.read(next)).await {
                Err(Failure::Backend(error @ Error::Truncated { .. }))
                    if self.settings.start_at == StartAt::Earliest =>
                {
                    if starts == MAX_STARTS {
                        return Err(Failure::Backend(Error::unavailable(
                            "begin at the earliest record",
                            error,
                        )));
                    }
                    starts += 1;
                }
                Err(Failure::Backend(Error::Truncated { earliest, .. }))
                    if self.settings.on_truncated == OnTruncated::SkipToEarliest =>
                {
                    self.place.next = next;
                    return self.skip_to(earliest).await;
                }
                reader => break (next, reader?),
            }
        };
        if let Some((_, overtaken)) = self.run.started_at {
            if next <= overtaken {
                return Err(Failure::Backend(Error::unavailable(
                    format!("begin at the earliest record of log {}", self.log.id()),
                    format!("the log reports {next} as its earliest offset and as removed"),
                )));
            }
            tracing::warn!(%overtaken, %next, "retention overtook this new consumer before its first record; starting over");
        }
        let tx = self.begin().await?;
        self.commit_at(tx, next, Note::default(), Done::default()).await?;
        if self.settings.start_at == StartAt::Earliest {
            self.run.started_at = Some((self.place.revision, next));
        }
        Ok(reader)
    }

    /// A new consumer that retention overtakes before its first record starts over, because it
    /// asked for the earliest one. An instance that was displaced has lost nothing if another one
    /// has passed the records that are gone.
    pub(super) async fn explain_truncated(&mut self, failure: Failure) -> Failure {
        let Failure::Backend(error @ Error::Truncated { .. }) = failure else {
            return failure;
        };
        if self.is_at_start() {
            self.run.is_overtaken = true;
            return Failure::Backend(Error::unavailable("begin at the earliest record", error));
        }
        match self.or_stop(self.store.position(self.id)).await {
            Ok(Some(position)) if position.next > self.place.next => Failure::Backend(Error::Fenced {
                consumer: self.id.clone(),
                expected: self.place.revision,
            }),
            Ok(_) => Failure::Backend(error),
            Err(failure) => failure,
        }
    }

    /// Counts the commit whose reply was lost, if it made the stored position. If the position is
    /// still the one before that commit, the commit may yet arrive.
    fn count_unanswered(&mut self, position: &Position) {
        let unanswered = mem::take(&mut self.run.unanswered);
        for commit in unanswered {
            if commit.expected == position.revision {
                self.run.unanswered.push(commit);
            } else if (commit.revision, Some(self.owner)) == (position.revision, position.owner) {
                let Unanswered { revision, done, .. } = commit;
                tracing::debug!(%revision, "a commit whose reply was lost was applied");
                if done.failed > 0 {
                    let unhandled = done.failed;
                    tracing::warn!(
                        unhandled,
                        "passing over records: their offset is committed, and they were not handled"
                    );
                }
                self.run.report.commits += 1;
                self.telemetry.commits.increment(1);
                self.count(done, &[]);
            }
        }
    }
}
