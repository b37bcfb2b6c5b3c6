//! The model's dead letters. A letter is a value of the state under a reserved key, which names its
//! place in a list of all letters ever parked. It thereby shares the fate of the state.

use std::{
    collections::BTreeMap,
    time::{Duration, UNIX_EPOCH},
};

use bytes::Bytes;
use essentially_once::{
    ConsumerId, Error, Offset, async_trait,
    backend::{DeadLetter, DeadLetters, check_size},
};

use crate::{
    defect::Defect,
    model::{RECORD_LIMIT, State},
    names,
    store::{StoreState, state_key},
    transaction::{ModelTx, Staged},
};

const PREFIX: &[u8] = b"\xFFletter ";

/// How many bytes of a reason the cutting defect keeps.
const REASON_CUT: usize = 255;

/// A letter, and the number of restarts before it was parked.
#[derive(Clone)]
pub(crate) struct Parked {
    generation: u64,
    consumer: String,
    letter: DeadLetter,
}

fn reserved_key(offset: Offset) -> Bytes {
    [PREFIX, &offset.hi().to_be_bytes(), &offset.lo().to_be_bytes()]
        .concat()
        .into()
}

fn is_letter(key: &[u8]) -> bool {
    key.starts_with(PREFIX)
}

/// Drops what a defect does not commit.
pub(crate) fn committed(defect: Defect, staged: &mut Staged) {
    match defect {
        Defect::LettersNotCommitted => staged.retain(|key, _| !is_letter(key)),
        Defect::LetterRemovalsNotCommitted => staged.retain(|key, value| !is_letter(key) || value.is_some()),
        _ => {}
    }
}

/// The letters of a fenced commit, which a defect applies nevertheless.
pub(crate) fn only_letters(staged: &Staged) -> Staged {
    let letters = staged.iter().filter(|(key, _)| is_letter(key));
    letters.map(|(key, value)| (key.clone(), value.clone())).collect()
}

/// What a defect keeps of a letter.
fn kept(defect: Defect, letter: &DeadLetter) -> DeadLetter {
    let mut kept = letter.clone();
    match defect {
        Defect::LetterHeadersSorted => kept.record.headers.sort(),
        Defect::LetterTimesInSeconds => {
            let since = kept.parked_at.duration_since(UNIX_EPOCH).unwrap_or_default();
            kept.parked_at = UNIX_EPOCH + Duration::from_secs(since.as_secs());
        }
        Defect::LetterMarkLost => kept.record.malformed = None,
        Defect::LetterEditLost => kept.edit = None,
        Defect::LetterOriginalHeadersLost => {
            if let Some(edit) = &mut kept.edit {
                edit.original.headers.clear();
            }
        }
        Defect::LetterReasonsCut => kept.last_reason.truncate(REASON_CUT),
        _ => {}
    }
    kept
}

impl StoreState {
    /// Makes a letter unreadable for every reader.
    pub(crate) fn damage_letter(&mut self, consumer: &ConsumerId, offset: Offset) {
        for parked in &mut self.letters {
            let letter = &mut parked.letter;
            if parked.consumer == consumer.as_str() && letter.record.offset == offset {
                let due = letter.due;
                *letter = DeadLetter::damaged(offset, letter.key().cloned(), "it cannot be read", b"");
                letter.due = due;
            }
        }
    }
}

impl ModelTx {
    /// The letters as this transaction sees them.
    fn letters(&self) -> Result<BTreeMap<Offset, DeadLetter>, Error> {
        let defect = self.shared.defect;
        let state = self.connected()?;
        let (owner, _) = state_key(defect, &self.consumer, b"");
        let mut places: BTreeMap<&Bytes, &Bytes> = BTreeMap::new();
        for ((other, key), place) in &state.store.live.state {
            if is_letter(key) && (*other == owner || defect == Defect::LettersSharedBetweenConsumers) {
                places.insert(key, place);
            }
        }
        if defect != Defect::LettersReadWithoutTheStaged {
            for (key, place) in self.staged.iter().filter(|(key, _)| is_letter(key)) {
                match place {
                    Some(place) => places.insert(key, place),
                    None => places.remove(key),
                };
            }
        }
        let parked = places.values().map(|place| self.parked(&state, place));
        let mut found: Vec<Parked> = parked.collect();
        match defect {
            Defect::LettersLostAtRestart => found.retain(|parked| parked.generation == state.generation),
            Defect::RemovedLettersComeBackAtRestart if state.generation > 0 => {
                let all = state.store.letters.iter();
                found.extend(all.filter(|parked| parked.consumer == self.consumer.as_str()).cloned());
            }
            _ => {}
        }
        Ok(found
            .into_iter()
            .map(|parked| (parked.letter.record.offset, parked.letter))
            .collect())
    }

    fn parked(&self, state: &State, place: &Bytes) -> Parked {
        let place = place[..].try_into().map_or(0, u64::from_be_bytes);
        state.store.letters[place as usize].clone()
    }

    fn key_of<'a>(&self, letter: &'a DeadLetter) -> Option<&'a Bytes> {
        let key = match self.shared.defect {
            Defect::MalformedLettersHaveKeys => letter.record.key.as_ref(),
            _ => letter.key(),
        };
        key.filter(|key| self.shared.defect != Defect::EmptyLetterKeyIsNone || !key.is_empty())
    }

    fn is_same_key(&self, a: &[u8], b: &[u8]) -> bool {
        match self.shared.defect {
            Defect::LetterKeysIgnoreCase => a.eq_ignore_ascii_case(b),
            Defect::LetterKeysKeptAsDigests => names::digest(a) == names::digest(b),
            _ => a == b,
        }
    }

    /// Stages a change, or applies it at once where a defect demands it.
    fn stage(&mut self, offset: Offset, place: Option<Bytes>) -> Result<(), Error> {
        let key = reserved_key(offset);
        if self.shared.is(Defect::LettersAppliedAtOnce) {
            let staged = Staged::from([(key.clone(), place.clone())]);
            self.connected()?
                .store
                .write_state(&self.shared, &self.consumer, &staged);
        }
        self.staged.insert(key, place);
        Ok(())
    }
}

#[async_trait]
impl DeadLetters for ModelTx {
    async fn park(&mut self, letter: &DeadLetter) -> Result<(), Error> {
        let defect = self.shared.defect;
        let limit = match defect {
            Defect::LetterLimitIsTheRecordLimit => RECORD_LIMIT,
            _ => RECORD_LIMIT + 2 * DeadLetter::REASON_LIMIT,
        };
        check_size("dead letter", letter.size(), limit)?;
        let place = {
            let mut state = self.connected()?;
            let generation = state.generation;
            state.store.letters.push(Parked {
                generation,
                consumer: self.consumer.to_string(),
                letter: kept(defect, letter),
            });
            state.store.letters.len() as u64 - 1
        };
        self.stage(letter.record.offset, Some(Bytes::copy_from_slice(&place.to_be_bytes())))
    }

    async fn remove(&mut self, offset: Offset) -> Result<bool, Error> {
        let existed = self.letters()?.contains_key(&offset);
        self.stage(offset, None)?;
        Ok(existed)
    }

    async fn remove_from(&mut self, offset: Offset) -> Result<u64, Error> {
        let defect = self.shared.defect;
        let is_removed = |at: &Offset| *at > offset || (*at == offset && defect != Defect::RemoveFromIsExclusive);
        let removed: Vec<Offset> = self.letters()?.into_keys().filter(is_removed).collect();
        for at in &removed {
            self.stage(*at, None)?;
        }
        if defect == Defect::RemoveFromReachesOtherConsumers {
            self.connected()?.store.live.state.retain(|(_, key), _| !is_letter(key));
        }
        Ok(removed.len() as u64)
    }

    async fn letter(&mut self, offset: Offset) -> Result<Option<DeadLetter>, Error> {
        Ok(self.letters()?.remove(&offset))
    }

    async fn head(&mut self, key: &[u8]) -> Result<Option<DeadLetter>, Error> {
        let letters = self.letters()?.into_values();
        let is_head = |letter: &DeadLetter| !letter.unreadable || !self.shared.is(Defect::DamagedLetterIsNoHead);
        let mut of_key = letters
            .filter(is_head)
            .filter(|letter| self.key_of(letter).is_some_and(|other| self.is_same_key(other, key)));
        Ok(of_key.next())
    }

    async fn first_due(&mut self) -> Result<Option<DeadLetter>, Error> {
        let is_by_offset = self.shared.is(Defect::FirstDueIsTheLowestOffset);
        let tries_damaged = self.shared.is(Defect::DamagedLetterIsDue);
        let due = self.letters()?.into_values();
        let due = due.filter(|letter| letter.due.is_some() && (tries_damaged || !letter.unreadable));
        Ok(due.min_by_key(|letter| (letter.due.filter(|_| !is_by_offset), letter.record.offset)))
    }

    async fn list(&mut self, after: Option<Offset>, limit: usize) -> Result<Vec<DeadLetter>, Error> {
        let defect = self.shared.defect;
        let is_listed = |letter: &DeadLetter| {
            let offset = letter.record.offset;
            after.is_none_or(|after| offset > after || (offset == after && defect == Defect::ListRepeatsTheLast))
        };
        let mut letters: Vec<_> = self.letters()?.into_values().filter(is_listed).collect();
        if defect == Defect::LettersSortedAsSigned {
            letters.sort_by_key(|letter| (letter.record.offset.hi() as i64, letter.record.offset.lo() as i64));
        }
        match defect {
            Defect::MalformedLetterEndsTheList => {
                let first = letters.iter().position(|letter| letter.record.malformed.is_some());
                letters.truncate(first.map_or(limit, |first| first + 1));
            }
            Defect::DamagedLetterEndsTheList => {
                let first = letters.iter().position(|letter| letter.unreadable);
                letters.truncate(first.map_or(limit, |first| first + 1));
            }
            Defect::DamagedLetterFailsTheList if letters.iter().any(|letter| letter.unreadable) => {
                return Err(Error::failed("list dead letters", "one of them cannot be read"));
            }
            Defect::DamagedLetterNotListed => letters.retain(|letter| !letter.unreadable),
            _ => {}
        }
        letters.truncate(limit);
        Ok(letters)
    }

    async fn counts(&mut self, after: Option<&[u8]>, limit: usize) -> Result<Vec<(Bytes, u64)>, Error> {
        let mut counts = BTreeMap::<Bytes, u64>::new();
        let defect = self.shared.defect;
        let counts_all = defect != Defect::DamagedLetterNotCounted;
        let letters = self.letters()?;
        for letter in letters.values().filter(|letter| counts_all || !letter.unreadable) {
            if let Some(key) = self.key_of(letter) {
                *counts.entry(key.clone()).or_default() += 1;
            }
        }
        let after = counts
            .into_iter()
            .filter(|(key, _)| after.is_none_or(|after| **key > *after));
        Ok(after.take(limit).collect())
    }

    async fn total(&mut self) -> Result<u64, Error> {
        Ok(self.letters()?.len() as u64)
    }
}
