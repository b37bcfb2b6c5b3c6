//! What follows a failure: another try, or the end of the run.

use std::{sync::Arc, time::Duration};

use backon::ExponentialBackoff;

use super::{
    failure::Failure,
    policy::{FailedRecord, OnFailure, OnTruncated, Rule, Sentence, Verdict},
    report::Telemetry,
    run::Run,
    settings::Settings,
};
use crate::{ConsumerId, Error, HandlerError, HandlerErrorKind, Log, Offset, Tried, backoff::Backoff};

/// Decides after each failure between another try and the end of the run.
pub(super) struct Supervisor {
    id: ConsumerId,
    log: Arc<dyn Log>,
    retries: u32,
    restart_limit: Option<u32>,
    on_failure: Rule,
    on_truncated: OnTruncated,
    keeps_letters: bool,
    backoff: Backoff,
    pauses: ExponentialBackoff,
    restarts_without_commit: u32,
    /// The tries of the record that failed last.
    pub(super) culprit: Option<Tried>,
    /// Records up to this one are handled individually.
    pub(super) apart_until: Option<Offset>,
}

impl Supervisor {
    pub(super) fn new(id: &ConsumerId, log: &Arc<dyn Log>, settings: &Settings) -> Self {
        Self {
            id: id.clone(),
            log: Arc::clone(log),
            retries: settings.retries,
            restart_limit: settings.restart_limit,
            on_failure: settings.on_failure(),
            on_truncated: settings.on_truncated,
            keeps_letters: settings.letters.is_some(),
            backoff: settings.backoff,
            pauses: settings.backoff.pauses(),
            restarts_without_commit: 0,
            culprit: None,
            apart_until: None,
        }
    }

    /// Forgets the tries of a record that was passed.
    pub(super) fn forget_culprit_before(&mut self, next: Option<Offset>) {
        self.culprit
            .take_if(|culprit| next.is_some_and(|next| culprit.offset() < next));
    }

    pub(super) fn made_progress(&mut self) {
        self.pauses = self.backoff.pauses();
        self.restarts_without_commit = 0;
    }

    /// Returns the pause before the next try, `None` if the run was stopped, or the error that ends
    /// the run.
    pub(super) fn judge(
        &mut self,
        failure: Failure,
        telemetry: &Telemetry,
        run: &mut Run,
    ) -> Result<Option<Duration>, Error> {
        let (error, pauses) = match failure {
            Failure::Stopped => return Ok(None),
            Failure::Backend(error) if error.is_transient() => {
                if matches!(error, Error::Fenced { .. }) {
                    run.report.fenced += 1;
                    telemetry.fenced.increment(1);
                }
                (error, true)
            }
            // The next session skips the records that are gone.
            Failure::Backend(error @ Error::Truncated { .. }) if self.on_truncated == OnTruncated::SkipToEarliest => {
                (error, true)
            }
            Failure::Backend(error) | Failure::Refused(error) => return Err(error),
            Failure::Record(failed) => {
                let (offset, error) = (failed.record.offset, failed.error);
                let attempts = failed.tried.tries();
                self.culprit = Some(failed.tried.clone());
                // One on a later record would keep this one in a batch with others.
                run.verdict = None;
                let outcome = match error.kind {
                    _ if failed.deaths > 0 => Some(
                        "not handled, since instances died while they handled it; the consumer stops before this record. \
                         Find out why they died, then `skip` the record or run the consumer again",
                    ),
                    HandlerErrorKind::Fatal => {
                        return Err(self.unhandled(offset, failed.fatal_outcome, attempts, error));
                    }
                    HandlerErrorKind::Reject => {
                        Some("rejected; the consumer stops before this record. Fix the handler, or `skip` the record")
                    }
                    // A record behind others may have failed because of them, so it is always tried
                    // alone.
                    HandlerErrorKind::Retry if failed.is_first && attempts > self.retries => Some(
                        "not handled, and no retry is left; the consumer stops before this record. Fix the handler, or \
                         `skip` the record",
                    ),
                    _ => None,
                };
                if let Some(outcome) = outcome {
                    let choice = self.on_failure.choose(&FailedRecord {
                        record: &failed.record,
                        error: &error,
                        tries: attempts,
                        deaths: failed.deaths,
                    });
                    let sentence = match choice {
                        OnFailure::DeadLetter if self.keeps_letters => Ok((
                            Sentence::Park {
                                tried: failed.tried,
                                last_reason: error.to_string(),
                                kind: error.kind,
                            },
                            "set aside as a dead letter",
                        )),
                        OnFailure::DeadLetter => Err(
                            "its policy asks for a dead letter, but this consumer keeps none; call `dead_letters` when \
                             you build it",
                        ),
                        OnFailure::Skip if failed.deaths == 0 => Ok((Sentence::Skip, "skipped")),
                        // Nobody knows whether a record is to blame for deaths.
                        OnFailure::Skip | OnFailure::Stop => Err(outcome),
                    };
                    let (sentence, outcome) = match sentence {
                        Ok(sentence) => sentence,
                        // The records before it are committed first.
                        Err(_) if !failed.is_next => {
                            let error = self.unhandled(offset, "not handled", attempts, error);
                            return self.go_back(error, false, telemetry, run);
                        }
                        Err(outcome) => return Err(self.unhandled(offset, outcome, attempts, error)),
                    };
                    run.verdict = Some(Verdict {
                        offset,
                        revision: failed.revision,
                        sentence,
                        error: self.unhandled(offset, outcome, attempts, error),
                    });
                    return Ok(Some(Duration::ZERO));
                }
                let error = self.unhandled(offset, "not handled", attempts, error);
                // Uncommitted records before this one are committed first, without a pause, and
                // then this one is tried alone.
                (error, failed.is_next)
            }
            Failure::Batch(until, error) => {
                self.apart_until = Some(until);
                let outcome =
                    "this record or one before it made the batch fail; the consumer now tries each record alone";
                (self.unhandled(until, outcome, 1, error), false)
            }
        };
        self.go_back(error, pauses, telemetry, run)
    }

    /// Counts a restart, and returns the pause before it.
    fn go_back(
        &mut self,
        error: Error,
        pauses: bool,
        telemetry: &Telemetry,
        run: &mut Run,
    ) -> Result<Option<Duration>, Error> {
        self.restarts_without_commit += 1;
        if self
            .restart_limit
            .is_some_and(|limit| self.restarts_without_commit > limit)
        {
            return Err(error);
        }
        run.report.restarts += 1;
        telemetry.restarts.increment(1);
        let pause = if pauses {
            self.pauses.next().unwrap_or_default()
        } else {
            Duration::ZERO
        };
        tracing::warn!(%error, ?pause, "going back to the stored position");
        Ok(Some(pause))
    }

    fn unhandled(&self, offset: Offset, outcome: &'static str, attempts: u32, error: HandlerError) -> Error {
        Error::Unhandled {
            consumer: self.id.clone(),
            log: self.log.id().clone(),
            offset,
            outcome,
            attempts,
            cause: error.source,
        }
    }
}
