//! Dead letters in a transaction: what it stages, and what it sees.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use async_trait::async_trait;
use bytes::Bytes;
use essentially_once::{
    Error, Offset,
    backend::{DeadLetter, DeadLetters, check_size},
};

use super::{
    letter::Letter,
    letter_index::{Letters, LettersChange},
    tx::RabbitTx,
};

/// Changes of letters that a transaction has staged.
#[derive(Default)]
pub(super) struct StagedLetters {
    /// The stored letters at and after this offset are removed.
    removed_from: Option<Offset>,
    /// Stored letters before that offset that are removed.
    removed: BTreeSet<Offset>,
    /// Letters that are new, or replace stored ones.
    parked: Letters,
    /// Those of them that only replace the status of the stored letter.
    updated: BTreeSet<Offset>,
    /// The bytes that all of this takes in an entry.
    bytes: usize,
    /// The size of the stored letters that are removed or replaced.
    hidden: usize,
}

impl StagedLetters {
    /// The bytes that all changes take in an entry.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// By how much the changes make the state grow.
    pub(super) fn growth(&self) -> isize {
        self.parked.size() as isize - self.hidden as isize
    }

    pub(super) fn into_change(self) -> LettersChange {
        let mut change = LettersChange {
            removed_from: self.removed_from,
            removed: self.removed.into_iter().collect(),
            ..LettersChange::default()
        };
        for letter in self.parked.after(None) {
            match self.updated.contains(&letter.offset) {
                true => change.updated.push((letter.offset, letter.status.clone())),
                false => change.parked.push(Arc::clone(letter)),
            }
        }
        change
    }

    fn candidate(&self, letter: &DeadLetter, stored: &Letters) -> Candidate {
        let letter = Letter::new(letter);
        let replaced = stored.get(letter.offset).filter(|_| !self.is_cut(letter.offset));
        match replaced {
            Some(replaced) if replaced.has_record_of(&letter) => Candidate {
                letter: replaced.with(letter.status),
                is_update: true,
            },
            _ => Candidate {
                letter,
                is_update: false,
            },
        }
    }

    fn park(&mut self, candidate: Candidate, stored: &Letters) {
        let offset = candidate.letter.offset;
        self.hide(offset, stored);
        self.unstage(offset);
        self.bytes += candidate.bytes();
        if candidate.is_update {
            self.updated.insert(offset);
        }
        self.parked.insert(Arc::new(candidate.letter));
    }

    fn remove(&mut self, offset: Offset, stored: &Letters) -> bool {
        let existed = self.over(stored).get(offset).is_some();
        self.hide(offset, stored);
        self.unstage(offset);
        if stored.get(offset).is_some() && !self.is_cut(offset) {
            self.removed.insert(offset);
            self.bytes += OFFSET;
        }
        existed
    }

    fn remove_from(&mut self, offset: Offset, stored: &Letters) -> u64 {
        let removed: Vec<_> = self.over(stored).from(offset).map(|letter| letter.offset).collect();
        for at in &removed {
            self.hide(*at, stored);
            self.unstage(*at);
        }
        // Without stored letters there is nothing to remove, and the entry need not mention them.
        if stored.from(offset).next().is_some() {
            self.bytes -= OFFSET * self.removed.split_off(&offset).len();
            self.bytes += self.removed_from.map_or(OFFSET, |_| 0);
            self.removed_from = Some(self.removed_from.map_or(offset, |from| from.min(offset)));
        }
        removed.len() as u64
    }

    /// Counts the stored letter as hidden unless it is already.
    fn hide(&mut self, offset: Offset, stored: &Letters) {
        if let Some(letter) = stored.get(offset).filter(|_| !self.hides(offset)) {
            self.hidden += letter.size();
        }
    }

    /// Forgets what was staged for this one offset.
    fn unstage(&mut self, offset: Offset) {
        self.bytes -= self.bytes_at(offset);
        self.removed.remove(&offset);
        self.updated.remove(&offset);
        self.parked.remove(offset);
    }

    /// The bytes that the change at this one offset takes in an entry.
    fn bytes_at(&self, offset: Offset) -> usize {
        match self.parked.get(offset) {
            Some(letter) => entry_size(letter, self.updated.contains(&offset)),
            None if self.removed.contains(&offset) => OFFSET,
            None => 0,
        }
    }

    /// Whether the stored letter at that offset, if there is one, is removed or replaced.
    fn hides(&self, offset: Offset) -> bool {
        self.is_cut(offset) || self.removed.contains(&offset) || self.parked.get(offset).is_some()
    }

    fn is_cut(&self, offset: Offset) -> bool {
        self.removed_from.is_some_and(|from| offset >= from)
    }

    fn over<'a>(&'a self, stored: &'a Letters) -> View<'a> {
        View { stored, staged: self }
    }
}

/// The letters as a transaction sees them.
#[derive(Clone, Copy)]
struct View<'a> {
    stored: &'a Letters,
    staged: &'a StagedLetters,
}

impl<'a> View<'a> {
    fn get(self, offset: Offset) -> Option<&'a Arc<Letter>> {
        let staged = self.staged.parked.get(offset);
        staged.or_else(|| self.stored.get(offset).filter(|_| !self.staged.hides(offset)))
    }

    /// The letters at and after an offset, in no order.
    fn from(self, offset: Offset) -> impl Iterator<Item = &'a Arc<Letter>> {
        let stored = self.stored.from(offset).filter(move |letter| self.shows(letter));
        stored.chain(self.staged.parked.from(offset))
    }

    fn head(self, key: &[u8]) -> Option<&'a Arc<Letter>> {
        let stored = self.stored.of_key(key).find(|offset| !self.staged.hides(*offset));
        let staged = self.staged.parked.of_key(key).next();
        self.get(stored.into_iter().chain(staged).min()?)
    }

    fn first_due(self) -> Option<&'a Arc<Letter>> {
        let stored = self.stored.due().find(|(_, offset)| !self.staged.hides(*offset));
        let staged = self.staged.parked.due().next();
        let (_, offset) = stored.into_iter().chain(staged).min()?;
        self.get(offset)
    }

    fn list(self, after: Option<Offset>, limit: usize) -> Vec<&'a Arc<Letter>> {
        let stored = self.stored.after(after).filter(|letter| self.shows(letter));
        let staged = self.staged.parked.after(after);
        let mut letters: Vec<_> = stored.take(limit).chain(staged.take(limit)).collect();
        letters.sort_unstable_by_key(|letter| letter.offset);
        letters.truncate(limit);
        letters
    }

    fn counts(self, after: Option<&[u8]>, limit: usize) -> Vec<(Bytes, u64)> {
        let mut hidden = BTreeMap::<&[u8], usize>::new();
        for key in self.hidden().filter_map(|letter| letter.key.as_ref()) {
            *hidden.entry(key).or_default() += 1;
        }
        let shown = |(key, count): (&'a Bytes, usize)| {
            let count = count - hidden.get(&key[..]).copied().unwrap_or(0);
            (count > 0).then_some((key, count))
        };
        let stored = self.stored.keys_after(after).filter_map(shown);
        let staged = self.staged.parked.keys_after(after);
        let mut counts = BTreeMap::<&Bytes, u64>::new();
        for (key, count) in stored.take(limit).chain(staged.take(limit)) {
            *counts.entry(key).or_default() += count as u64;
        }
        let counts = counts.into_iter().take(limit);
        counts.map(|(key, count)| (key.clone(), count)).collect()
    }

    fn total(self) -> u64 {
        (self.stored.len() - self.hidden().count() + self.staged.parked.len()) as u64
    }

    /// The stored letters that are removed or replaced.
    fn hidden(self) -> impl Iterator<Item = &'a Arc<Letter>> {
        let staged = self.staged;
        let parked = staged.parked.after(None).map(|letter| letter.offset);
        let single = staged.removed.iter().copied().chain(parked);
        let single = single.filter(move |offset| !staged.is_cut(*offset));
        let cut = staged.removed_from.map(|from| self.stored.from(from));
        single
            .filter_map(move |offset| self.stored.get(offset))
            .chain(cut.into_iter().flatten())
    }

    fn shows(self, stored: &Letter) -> bool {
        !self.staged.hides(stored.offset)
    }
}

/// A letter that could be staged.
struct Candidate {
    letter: Letter,
    /// Whether the stored letter has the same record, so that only its status is replaced.
    is_update: bool,
}

impl Candidate {
    fn bytes(&self) -> usize {
        entry_size(&self.letter, self.is_update)
    }
}

/// The bytes of an offset in an entry.
const OFFSET: usize = 16;

/// The bytes of a letter in an entry.
fn entry_size(letter: &Letter, is_update: bool) -> usize {
    match is_update {
        true => OFFSET + letter.status.encoded_len(),
        false => letter.encoded_len(),
    }
}

impl RabbitTx {
    /// What `read` finds among the letters that this transaction sees.
    fn with_letters<T>(&self, read: impl FnOnce(View<'_>) -> T) -> T {
        let fold = self.changelog.fold.read();
        read(self.staged.letters.over(&fold.state.letters))
    }

    fn stage_letter(&mut self, letter: &DeadLetter) -> Result<(), Error> {
        let scope = &self.changelog.scope;
        let fold = self.changelog.fold.read();
        let stored = &fold.state.letters;
        let candidate = self.staged.letters.candidate(letter, stored);
        if !candidate.is_update {
            check_size("dead letter", letter.size(), scope.letter_limit())?;
        }
        let offset = candidate.letter.offset;
        let staged = self.staged_bytes() - self.staged.letters.bytes_at(offset) + candidate.bytes();
        scope.check_staged_size(staged)?;
        let replaced = self
            .staged
            .letters
            .over(stored)
            .get(offset)
            .map_or(0, |letter| letter.size());
        let before = fold.size().saturating_add_signed(self.state_growth());
        let after = (before + candidate.letter.size()).saturating_sub(replaced);
        scope.check_state_size(before, after)?;
        self.staged.letters.park(candidate, stored);
        Ok(())
    }

    /// Decodes letters that were found.
    fn decoded(&mut self, found: impl IntoIterator<Item = Arc<Letter>>) -> Result<Vec<DeadLetter>, Error> {
        let decode = |letter: Arc<Letter>| {
            letter.read().map_err(|why| {
                let action = self.changelog.scope.on("read dead letters of");
                Error::failed(action, format!("the letter at {} is damaged: {why}", letter.offset))
            })
        };
        let decoded: Result<_, _> = found.into_iter().map(decode).collect();
        decoded.map_err(|error| self.remember(error))
    }

    fn decoded_one(&mut self, found: Option<Arc<Letter>>) -> Result<Option<DeadLetter>, Error> {
        Ok(self.decoded(found)?.pop())
    }
}

/// Nothing leaves this process before the commit. Every read is answered from memory.
#[async_trait]
impl DeadLetters for RabbitTx {
    async fn park(&mut self, letter: &DeadLetter) -> Result<(), Error> {
        self.stage_letter(letter).map_err(|error| self.remember(error))
    }

    async fn remove(&mut self, offset: Offset) -> Result<bool, Error> {
        let fold = self.changelog.fold.read();
        Ok(self.staged.letters.remove(offset, &fold.state.letters))
    }

    async fn remove_from(&mut self, offset: Offset) -> Result<u64, Error> {
        let fold = self.changelog.fold.read();
        Ok(self.staged.letters.remove_from(offset, &fold.state.letters))
    }

    async fn letter(&mut self, offset: Offset) -> Result<Option<DeadLetter>, Error> {
        let found = self.with_letters(|letters| letters.get(offset).cloned());
        self.decoded_one(found)
    }

    async fn head(&mut self, key: &[u8]) -> Result<Option<DeadLetter>, Error> {
        let found = self.with_letters(|letters| letters.head(key).cloned());
        self.decoded_one(found)
    }

    async fn first_due(&mut self) -> Result<Option<DeadLetter>, Error> {
        let found = self.with_letters(|letters| letters.first_due().cloned());
        self.decoded_one(found)
    }

    async fn list(&mut self, after: Option<Offset>, limit: usize) -> Result<Vec<DeadLetter>, Error> {
        let found = self.with_letters(|letters| letters.list(after, limit).into_iter().cloned().collect::<Vec<_>>());
        self.decoded(found)
    }

    async fn counts(&mut self, after: Option<&[u8]>, limit: usize) -> Result<Vec<(Bytes, u64)>, Error> {
        Ok(self.with_letters(|letters| letters.counts(after, limit)))
    }

    async fn total(&mut self) -> Result<u64, Error> {
        Ok(self.with_letters(|letters| letters.total()))
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use proptest::{collection::vec, prelude::*};

    use super::{super::letter::tests::dead_letter, *};

    /// Letters without indexes.
    type Naive = BTreeMap<Offset, DeadLetter>;

    #[derive(Clone, Debug)]
    enum Step {
        Park(Box<DeadLetter>),
        /// Parks the letter that is there with another due time.
        Retry(Offset, Option<u64>),
        Remove(Offset),
        RemoveFrom(Offset),
    }

    fn offset() -> impl Strategy<Value = Offset> {
        (0u64..2, 0u64..6).prop_map(|(hi, lo)| Offset::new(hi, lo))
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => dead_letter().prop_map(|letter| Step::Park(Box::new(letter))),
            2 => (offset(), proptest::option::of(0u64..4)).prop_map(|(offset, due)| Step::Retry(offset, due)),
            2 => offset().prop_map(Step::Remove),
            1 => offset().prop_map(Step::RemoveFrom),
        ]
    }

    /// Returns the results of the step as staged and as expected.
    fn take(step: &Step, staged: &mut StagedLetters, stored: &Letters, naive: &mut Naive) -> (u64, u64) {
        let mut park = |staged: &mut StagedLetters, letter: DeadLetter| {
            let candidate = staged.candidate(&letter, stored);
            staged.park(candidate, stored);
            naive.insert(letter.record.offset, letter);
        };
        match step {
            Step::Park(letter) => park(staged, (**letter).clone()),
            Step::Retry(offset, due) => {
                let found = staged.over(stored).get(*offset).map(|letter| letter.read());
                if let Some(mut letter) = found.transpose().expect("decodes") {
                    letter.due = due.map(|due| UNIX_EPOCH + Duration::from_millis(due));
                    letter.version += u64::from(letter.version < u64::MAX);
                    park(staged, letter);
                }
            }
            Step::Remove(offset) => {
                let existed = naive.remove(offset).is_some();
                return (staged.remove(*offset, stored).into(), existed.into());
            }
            Step::RemoveFrom(offset) => {
                let removed = naive.split_off(offset).len() as u64;
                return (staged.remove_from(*offset, stored), removed);
            }
        }
        (0, 0)
    }

    fn read<'a>(letters: impl IntoIterator<Item = &'a Arc<Letter>>) -> Vec<DeadLetter> {
        let letters = letters.into_iter();
        letters.map(|letter| letter.read().expect("decodes")).collect()
    }

    fn assert_agrees(view: View<'_>, naive: &Naive) {
        let all: Vec<_> = naive.values().cloned().collect();
        assert_eq!(read(view.list(None, usize::MAX)), all);
        assert_eq!(view.total(), all.len() as u64);
        let mut by_key = BTreeMap::<Bytes, Vec<DeadLetter>>::new();
        for letter in &all {
            if let Some(key) = letter.key() {
                by_key.entry(key.clone()).or_default().push(letter.clone());
            }
        }
        for key in [&b""[..], &[0], &[1], &[2]] {
            let expected = by_key.get(key).map(|letters| letters[0].clone());
            assert_eq!(read(view.head(key)), Vec::from_iter(expected), "{key:?}");
            for limit in 0..3 {
                let after = by_key.iter().filter(|(other, _)| &other[..] > key);
                let counts = after.map(|(key, letters)| (key.clone(), letters.len() as u64));
                assert_eq!(view.counts(Some(key), limit), Vec::from_iter(counts.take(limit)));
            }
        }
        let counts = by_key.iter().map(|(key, letters)| (key.clone(), letters.len() as u64));
        assert_eq!(view.counts(None, usize::MAX), Vec::from_iter(counts));
        let due = all.iter().filter(|letter| letter.due.is_some());
        let first = due.min_by_key(|letter| (letter.due, letter.record.offset));
        assert_eq!(read(view.first_due()), Vec::from_iter(first.cloned()));
        for after in [Offset::ZERO, Offset::new(0, 3), Offset::new(1, 2)] {
            let expected = all.iter().filter(|letter| letter.record.offset > after);
            assert_eq!(
                read(view.list(Some(after), 2)),
                Vec::from_iter(expected.take(2).cloned())
            );
            assert_eq!(read(view.get(after)), Vec::from_iter(naive.get(&after).cloned()));
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// Each inner list is a transaction.
        #[test]
        fn transactions_see_and_make_what_a_plain_map_has(transactions in vec(vec(step(), 1..8), 1..5)) {
            let (mut stored, mut naive) = (Letters::default(), Naive::new());
            for steps in transactions {
                let mut staged = StagedLetters::default();
                for step in steps {
                    let (found, expected) = take(&step, &mut staged, &stored, &mut naive);
                    prop_assert_eq!(found, expected, "{:?}", step);
                    assert_agrees(staged.over(&stored), &naive);
                }
                let (bytes, size) = (staged.bytes(), stored.size().saturating_add_signed(staged.growth()));
                let change = staged.into_change();
                prop_assert_eq!(stored.size_after(&change), size);
                let mut encoded = Vec::new();
                change.encode(&mut encoded);
                // The flag and the counts are there in any case.
                prop_assert_eq!(encoded.len(), bytes + 13);
                stored.apply(change);
                prop_assert_eq!(stored.size(), size);
                let nothing = StagedLetters::default();
                assert_agrees(nothing.over(&stored), &naive);
            }
            // Nothing stays in an index.
            stored.apply(LettersChange { removed_from: Some(Offset::ZERO), ..LettersChange::default() });
            prop_assert_eq!(stored, Letters::default());
        }
    }

    #[test]
    fn another_try_of_a_letter_does_not_repeat_its_record() {
        let mut stored = Letters::default();
        let record = essentially_once::Record::new(7.into(), UNIX_EPOCH, vec![0; 1_000]);
        let mut letter = DeadLetter::new(record, 1, "no", UNIX_EPOCH);
        stored.insert(Arc::new(Letter::new(&letter)));
        letter.tries += 1;
        let mut staged = StagedLetters::default();
        staged.park(staged.candidate(&letter, &stored), &stored);
        assert!(staged.bytes() < 100, "{} bytes", staged.bytes());
        letter.record.payload = "another".into();
        staged.park(staged.candidate(&letter, &stored), &stored);
        let change = staged.into_change();
        assert_eq!((change.updated.len(), change.parked.len()), (0, 1));
    }

    #[test]
    fn removing_what_does_not_exist_changes_nothing() {
        let (mut staged, stored) = (StagedLetters::default(), Letters::default());
        assert!(!staged.remove(1.into(), &stored));
        assert_eq!(staged.remove_from(Offset::ZERO, &stored), 0);
        assert!(staged.into_change().is_empty());
    }
}
