//! What operators' functions stage: changes of dead letters.

use std::time::SystemTime;

use async_trait::async_trait;

use super::verbs::Change;
use crate::{
    Advance, ConsumerId, Error, NewRecord, Offset, Operator, Position, Record,
    consumer::OperatorAction,
    letters::{DeadLetter, DeadLetters},
    note::InHand,
    window::Windows,
};

/// When a letter is due that an operator retries: at once, even by a clock that is behind.
pub(super) const NOW: SystemTime = SystemTime::UNIX_EPOCH;

/// Makes a letter due now.
pub(super) struct Retry<'a> {
    pub(super) consumer: &'a ConsumerId,
    pub(super) offset: Offset,
}

/// Removes a letter.
pub(super) struct Discard<'a> {
    pub(super) consumer: &'a ConsumerId,
    /// The letter as the operator saw it.
    pub(super) seen: &'a DeadLetter,
}

/// Replaces the record of a letter, and makes the letter due if it comes first for its key.
pub(super) struct EditLetter<'a> {
    pub(super) consumer: &'a ConsumerId,
    pub(super) by: &'a Operator,
    /// The letter as the operator saw it.
    pub(super) seen: &'a DeadLetter,
    pub(super) new: &'a NewRecord,
}

#[async_trait]
impl<Tx: DeadLetters> Change<Tx> for Retry<'_> {
    async fn stage(&self, tx: &mut Tx, _: &Position, advance: &mut Advance) -> Result<Option<OperatorAction>, Error> {
        let offset = self.offset;
        let refused = |reason| Err(Error::failed(on("retry", offset, self.consumer), reason));
        let Some(letter) = tx.letter(offset).await? else {
            return refused(no_such_letter());
        };
        if let Some(head) = head_of(tx, &letter).await?
            && head.record.offset != offset
        {
            let first = head.record.offset;
            return refused(format!(
                "the letter at {first} of the same key comes first; retry or discard that one"
            ));
        }
        if letter.unreadable {
            return refused(unreadable(&letter));
        }
        if letter.due == Some(NOW) {
            return refused("it is due already; a running consumer tries it next".into());
        }
        make_due(tx, letter).await?;
        clear_mark(advance, offset);
        let letters = 1;
        Ok(Some(OperatorAction::Retry { first: offset, letters }))
    }
}

#[async_trait]
impl<Tx: DeadLetters> Change<Tx> for Discard<'_> {
    async fn stage(&self, tx: &mut Tx, _: &Position, _: &mut Advance) -> Result<Option<OperatorAction>, Error> {
        let stored = unchanged(tx, self.seen, "discard", self.consumer).await?;
        let offset = stored.record.offset;
        let head = head_of(tx, &stored).await?;
        let was_first = head.is_some_and(|head| head.record.offset == offset);
        if !tx.remove(offset).await? {
            return Err(Error::failed(on("discard", offset, self.consumer), no_such_letter()));
        }
        if was_first
            && let Some(next) = head_of(tx, &stored).await?
            && !next.unreadable
        {
            make_due(tx, next).await?;
        }
        let letters = 1;
        Ok(Some(OperatorAction::Discard { first: offset, letters }))
    }
}

#[async_trait]
impl<Tx: DeadLetters> Change<Tx> for EditLetter<'_> {
    async fn stage(
        &self,
        tx: &mut Tx,
        position: &Position,
        advance: &mut Advance,
    ) -> Result<Option<OperatorAction>, Error> {
        let mut letter = unchanged(tx, self.seen, "edit", self.consumer).await?;
        let offset = letter.record.offset;
        let refused = |reason: &str| Err(Error::failed(on("edit", offset, self.consumer), reason));
        if letter.unreadable {
            return refused(&unreadable(&letter));
        }
        let was_malformed = letter.record.malformed.is_some();
        let NewRecord {
            key,
            headers,
            payload,
            origin,
        } = self.new;
        let is_same = (key, origin) == (&letter.record.key, &letter.record.origin);
        if !was_malformed && !is_same {
            return refused(
                "its key and origin must stay, since the order of its key and the consumer's windows rest on them; make \
                 the new record `NewRecord::from` the letter's",
            );
        }
        if !was_malformed && (headers, payload) == (&letter.record.headers, &letter.record.payload) {
            return refused("the record is the same; `retry` the letter instead");
        }
        letter.edit(self.new.clone(), self.by);
        if was_malformed {
            let mut windows = Windows::new(position.windows.clone());
            match admission(&letter.record, &windows) {
                Admission::New => windows.mark(&letter.record, SystemTime::now()),
                Admission::Seen => {
                    return refused("a record with that origin was handled or set aside already; `discard` this one");
                }
                Admission::TooOld => {
                    return refused(
                        "that origin is too old to tell whether a record with it was handled; find that out, then state \
                         no origin, or `discard` this one",
                    );
                }
            }
            (advance.windows, advance.forgotten) = windows.take_changes();
        }
        join_key(tx, letter).await?;
        clear_mark(advance, offset);
        Ok(Some(OperatorAction::Edit(offset)))
    }
}

/// What the windows say about a record that was malformed until now.
pub(super) enum Admission {
    /// No record with its origin was seen.
    New,
    /// A record with its origin was handled or set aside.
    Seen,
    /// Its origin is older than the producer's window, which no longer tells.
    TooOld,
}

pub(super) fn admission(record: &Record, windows: &Windows) -> Admission {
    match &record.origin {
        Some(origin) if windows.is_below(origin) => Admission::TooOld,
        Some(origin) if windows.is_seen(origin) => Admission::Seen,
        _ => Admission::New,
    }
}

/// Stores a letter whose record has changed: due now if it comes first for its key, and otherwise
/// behind the others.
pub(super) async fn join_key(tx: &mut (impl DeadLetters + ?Sized), mut letter: DeadLetter) -> Result<(), Error> {
    let head = match letter.key() {
        Some(key) => tx.head(key).await?,
        None => None,
    };
    let offset = letter.record.offset;
    letter.set_due(match &head {
        Some(head) if head.record.offset < offset => None,
        _ => Some(NOW),
    });
    tx.park(&letter).await?;
    if let Some(mut next) = head
        && next.record.offset > offset
        && next.due.is_some()
    {
        next.set_due(None);
        tx.park(&next).await?;
    }
    Ok(())
}

/// Makes the deaths of the letter at `offset` count from zero, since its record or its handler may
/// be mended.
pub(super) fn clear_mark(advance: &mut Advance, offset: Offset) {
    let in_hand = advance.note.in_hand();
    if in_hand.letter.is_some_and(|mark| mark.offset == offset) {
        advance.note = advance.note.with_in_hand(InHand {
            letter: None,
            ..in_hand
        });
    }
}

pub(super) async fn make_due<Tx: DeadLetters>(tx: &mut Tx, mut letter: DeadLetter) -> Result<(), Error> {
    letter.set_due(Some(NOW));
    tx.park(&letter).await
}

/// The first letter of the key of this one.
pub(super) async fn head_of<Tx: DeadLetters>(tx: &mut Tx, letter: &DeadLetter) -> Result<Option<DeadLetter>, Error> {
    match letter.key() {
        Some(key) => tx.head(key).await,
        None => Ok(None),
    }
}

/// The stored letter, if it is as the operator saw it.
async fn unchanged<Tx: DeadLetters>(
    tx: &mut Tx,
    seen: &DeadLetter,
    verb: &str,
    consumer: &ConsumerId,
) -> Result<DeadLetter, Error> {
    let offset = seen.record.offset;
    let refused = |reason| Error::failed(on(verb, offset, consumer), reason);
    let stored = tx.letter(offset).await?.ok_or_else(|| refused(no_such_letter()))?;
    match stored == *seen {
        true => Ok(stored),
        false => Err(refused("it has changed since; look at it again".into())),
    }
}

fn on(verb: &str, offset: Offset, consumer: &ConsumerId) -> String {
    format!("{verb} the dead letter at {offset} of consumer {consumer}")
}

fn unreadable(letter: &DeadLetter) -> String {
    format!(
        "the store cannot read it ({}); run a program that can, `seek` back to it, or `discard` it",
        letter.last_reason
    )
}

fn no_such_letter() -> String {
    "there is no such letter; it may have been handled or discarded".into()
}
