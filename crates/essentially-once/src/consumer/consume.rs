//! The loop of a session: from loading the stored position to the first failure.

use std::{
    future::{pending, ready},
    mem,
    pin::pin,
    time::{Duration, SystemTime},
};

use super::{
    deaths::Suspicion,
    delivery::Delivery,
    failure::Failure,
    load::Source,
    read_ahead::{ReadAhead, Split},
    resume::compare,
    session::Session,
};
use crate::{
    Durability, Error, Handler, Offset, OffsetStore, Pulse, Record,
    rt::{self, Instant},
};

/// How often a consumer that waits for records checks whether its position was moved by hand.
const WATCH_EVERY: Duration = Duration::from_secs(1);

/// How often a consumer that waits for the last records of its run checks whether they still exist.
const LOOK_FOR_END_EVERY: Duration = Duration::from_millis(100);

impl<S: OffsetStore> Session<'_, S> {
    /// Runs until `stop`, or until the position reaches `until`. An `until` that is still `None` is
    /// set to the log's end.
    pub(super) async fn run<H: Handler<D::Tx>, D: Delivery<S>>(
        mut self,
        handler: &mut H,
        until: Option<&mut Option<Offset>>,
    ) -> Result<(), Failure> {
        self.heart.work();
        if D::NEEDS_DURABILITY && !self.settings.accept_volatile {
            self.check_durability().await?;
        }
        let until = match until {
            Some(Some(until)) => Some(*until),
            Some(unset) => Some(*unset.insert(self.or_stop(self.log.readable_end()).await?)),
            None => None,
        };
        let Some(source) = self.load(until).await? else {
            return Ok(());
        };
        if !D::RETRIES {
            self.run.suspicion = Suspicion::default();
        }
        let mut ahead = match source {
            Source::ReadAhead(ahead) => ahead,
            Source::Reader(reader) => ReadAhead::spawn(
                reader,
                self.place.next,
                self.settings
                    .read_ahead_records
                    .unwrap_or_else(|| self.settings.max_batch.saturating_mul(16).max(8_192)),
                self.settings.read_ahead_bytes,
            ),
        };
        let result = self.run_on::<H, D>(handler, &mut ahead, until).await;
        match &result {
            // The next session begins where this one failed.
            Err(Failure::Record(_) | Failure::Batch(..)) if ahead.is_at(self.place.next) => {
                self.run.ahead = Some((self.place.revision, ahead));
            }
            _ => ahead.end().await,
        }
        self.run.parked = mem::take(&mut self.parked);
        result
    }

    async fn run_on<H: Handler<D::Tx>, D: Delivery<S>>(
        &mut self,
        handler: &mut H,
        ahead: &mut ReadAhead,
        mut until: Option<Offset>,
    ) -> Result<(), Failure> {
        self.drop_stale_verdict();
        match D::RETRIES {
            true => self.load_parked().await?,
            false => self.refuse_letters().await?,
        }
        if until.is_some_and(|until| self.place.next >= until) {
            self.deliver_all_letters::<H, D>(handler).await?;
            // Without a read, nothing else would detect a replaced log.
            return self
                .or_stop(compare(&**self.log, self.id, self.place.note.passed()))
                .await;
        }
        self.consume::<H, D>(handler, ahead, &mut until).await
    }

    async fn consume<H: Handler<D::Tx>, D: Delivery<S>>(
        &mut self,
        handler: &mut H,
        ahead: &mut ReadAhead,
        until: &mut Option<Offset>,
    ) -> Result<(), Failure> {
        let yields = rt::has_one_thread();
        // Records taken but not handled within the time limit of the previous batch.
        let mut left = Vec::new();
        while until.is_none_or(|until| self.place.next < until) {
            let mut batch = match left.is_empty() {
                true => match self.next_batch(ahead, until).await {
                    Ok(Some(batch)) => batch,
                    Ok(None) => break,
                    Err(failure) => return Err(self.explain_truncated(failure).await),
                },
                false => mem::take(&mut left),
            };
            if self.stop.is_cancelled() {
                return Err(Failure::Stopped);
            }
            self.now = SystemTime::now();
            if self.letters_due().is_some_and(|due| due <= self.now) {
                self.deliver_letters::<H, D>(handler).await?;
            }
            if batch.is_empty() {
                // The log may wait for a thread to read on.
                if yields {
                    rt::yield_now().await;
                }
                continue;
            }
            self.look_for_silent().await?;
            self.count_behind().await?;
            self.telemetry.waits(batch.first(), self.now);
            // From here on, retention may remove a record that was already tried, which must be
            // reported.
            self.run.started_at = None;
            self.split_off_unpassable(&mut batch, &mut left)?;
            let taken = match &batch[..] {
                _ if !D::RETRIES => Ok(()),
                [record] if self.reaches_handler(record) => self.take_in_hand(record).await,
                _ => {
                    self.pass_in_hand();
                    self.claim().await
                }
            };
            let delivered = match taken {
                Ok(()) => D::deliver(self, handler, &batch).await,
                Err(failure) => Err(failure),
            };
            let passed = match delivered {
                Ok(passed) => passed,
                Err(failure) => {
                    left.splice(..0, batch);
                    left.retain(|record| record.offset >= self.place.next);
                    ahead.put_back(self.place.next, left);
                    return Err(failure);
                }
            };
            self.run.records_first = false;
            if passed < batch.len() {
                left.splice(..0, batch.drain(passed..));
            }
            // A backend may never make the loop wait, and would then starve the other tasks of a
            // runtime with one thread.
            if yields {
                rt::yield_now().await;
            }
        }
        self.telemetry.waits(None, self.now);
        self.deliver_all_letters::<H, D>(handler).await
    }

    /// Tries the letters that are due by now until none is. A letter that fails is due later.
    async fn deliver_all_letters<H: Handler<D::Tx>, D: Delivery<S>>(&mut self, handler: &mut H) -> Result<(), Failure> {
        // It would hold the letters up, and no record is handled before they are done.
        self.run.verdict = None;
        let now = SystemTime::now();
        self.cut_off = Some(now);
        while self.letters_due().is_some_and(|due| due <= now) {
            if self.stop.is_cancelled() {
                return Err(Failure::Stopped);
            }
            // The clock may have been set back meanwhile.
            if !self.deliver_letters::<H, D>(handler).await? {
                break;
            }
        }
        Ok(())
    }

    /// Tries letters that are due. Returns `false` if none is.
    async fn deliver_letters<H: Handler<D::Tx>, D: Delivery<S>>(&mut self, handler: &mut H) -> Result<bool, Failure> {
        let tried = D::deliver_letters(self, handler).await;
        self.run.records_first = tried.is_err();
        tried
    }

    /// Drops a verdict on a record that was passed or may have been tried again since.
    fn drop_stale_verdict(&mut self) {
        let (revision, next) = (self.place.revision, self.place.next);
        self.run
            .verdict
            .take_if(|verdict| verdict.revision != revision || verdict.offset < next);
    }

    /// The greatest offset has no successor, so no position can come after a record there. The
    /// records before it are handled first.
    fn split_off_unpassable(&self, batch: &mut Vec<Record>, left: &mut Vec<Record>) -> Result<(), Failure> {
        match batch.len() {
            0 => {}
            _ if batch.last().is_none_or(|last| last.offset < Offset::MAX) => {}
            1 => {
                return Err(Failure::Backend(Error::failed(
                    format!("pass the record at {} of log {}", Offset::MAX, self.log.id()),
                    "this is the greatest offset, so no position can come after it; remove the record and append it to \
                     another log",
                )));
            }
            len => left.extend(batch.drain(len - 1..)),
        }
        Ok(())
    }

    /// Where the next batch must end: behind a record with a verdict, or around one that failed.
    fn split(&self) -> Option<Split> {
        match &self.run.verdict {
            Some(verdict) => Some(Split::After(verdict.offset)),
            None => self.tried.as_ref().map(|tried| Split::Alone(tried.offset())),
        }
    }

    /// Waits for records, or for a letter to be due, and then returns no records. Returns `None` if
    /// none is left before `until`.
    async fn next_batch(
        &mut self,
        ahead: &mut ReadAhead,
        until: &mut Option<Offset>,
    ) -> Result<Option<Vec<Record>>, Failure> {
        let is_apart = self.apart_until.is_some_and(|until| self.place.next <= until);
        let is_suspicious = self.run.suspicion.suspects_records();
        let max = if is_apart || is_suspicious {
            1
        } else {
            self.settings.max_batch
        };
        let mut taking = pin!(ahead.take(max, self.split()));
        // Records that have already arrived need neither a timer nor a look at the position.
        tokio::select! {
            biased;
            () = self.stop.cancelled() => return Err(Failure::Stopped),
            batch = &mut taking => return Ok(Some(batch?)),
            () = ready(()) => {}
        }
        self.heart.rest();
        // Silence means nothing while the consumer waits for records.
        self.run.last_sign = None;
        self.telemetry.waits(None, self.now);
        let mut pulse = Pulse {
            next: self.place.next,
            revision: self.place.revision,
            owner: Some(self.owner),
            beats: 0,
        };
        let batch = loop {
            tokio::select! {
                biased;
                () = self.stop.cancelled() => return Err(Failure::Stopped),
                batch = &mut taking => break batch?,
                seen = self.watch(&pulse), if until.is_none() => {
                    pulse = seen;
                    // The pulse may only be late, so the position itself decides.
                    if pulse.revision != self.place.revision {
                        self.check_current().await?;
                    }
                }
                () = sleep_until(self.letters_due()) => break Vec::new(),
                () = rt::sleep(LOOK_FOR_END_EVERY), if until.is_some() => {
                    let end = self.or_stop(self.log.readable_end()).await?;
                    if self.place.next >= *until.insert(until.map_or(end, |until| until.min(end))) {
                        return Ok(None);
                    }
                }
            }
        };
        self.heart.work();
        self.run.last_sign = Some(Instant::now());
        Ok(Some(batch))
    }

    /// Waits for a change of the position. A consumer that only waits ignores errors of the store.
    pub(super) async fn watch(&self, seen: &Pulse) -> Pulse {
        match self.store.watch(self.id, seen, WATCH_EVERY).await {
            Ok(pulse) => pulse,
            Err(error) => {
                tracing::debug!(%error, "could not watch the position");
                rt::sleep(WATCH_EVERY).await;
                *seen
            }
        }
    }

    async fn check_durability(&self) -> Result<(), Failure> {
        let parts = [
            (
                format!("log {}", self.log.id()),
                self.or_stop(self.log.durability()).await?,
            ),
            (
                format!("store of consumer {}", self.id),
                self.or_stop(self.store.durability()).await?,
            ),
        ];
        for (what, durability) in parts {
            match durability {
                Durability::Durable => {}
                Durability::Volatile(why) => return Err(Error::Volatile { what, why }.into()),
                Durability::Unknown(why) => tracing::warn!(%what, %why, "cannot find out whether this is durable"),
            }
        }
        Ok(())
    }
}

/// Waits for a time of the wall clock, and looks at the clock now and then in case it is set.
async fn sleep_until(time: Option<SystemTime>) {
    let Some(time) = time else { return pending().await };
    while let Ok(left) = time.duration_since(SystemTime::now()) {
        rt::sleep(left.clamp(Duration::from_millis(1), WATCH_EVERY)).await;
    }
}
