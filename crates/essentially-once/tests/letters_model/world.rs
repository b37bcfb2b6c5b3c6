//! What the model is about: a log, a store, the instances of a consumer, and an operator.

use std::array;

pub(super) type Offset = u8;

/// A record of the log. Its offset is its place there.
pub(super) struct Entry {
    pub(super) key: usize,
    pub(super) origin: u8,
}

pub(super) const KEYS: usize = 2;
pub(super) const RECORDS: usize = 4;
pub(super) const END: Offset = RECORDS as Offset;

/// The last record is a [copy](copy_of) of the first one.
pub(super) const LOG: [Entry; RECORDS] = [
    Entry { key: 0, origin: 0b001 },
    Entry { key: 1, origin: 0b010 },
    Entry { key: 0, origin: 0b100 },
    Entry { key: 0, origin: 0b001 },
];

/// The other record with the same origin.
fn copy_of(offset: Offset) -> Option<Offset> {
    match offset {
        0 => Some(3),
        3 => Some(0),
        _ => None,
    }
}

pub(super) fn entry(offset: Offset) -> &'static Entry {
    &LOG[usize::from(offset)]
}

/// A dead letter. The record is the one at its offset.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(super) struct Letter {
    pub(super) waits_for: WaitsFor,
    pub(super) version: u8,
    /// Stands for the time: how often the operator had sought when the record was parked.
    pub(super) parked_at: u8,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(super) enum WaitsFor {
    /// An earlier letter of its key.
    Key,
    /// Its due time, which may come at any moment.
    Due,
    Operator,
}

impl Letter {
    /// The letter after a change.
    pub(super) fn now_waits_for(self, waits_for: WaitsFor) -> Self {
        Self {
            waits_for,
            // The operator looks at version 1, and then only a change of it matters.
            version: 2,
            ..self
        }
    }
}

/// What became of a record since the operator last sought back over it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub(super) enum Fate {
    #[default]
    Open,
    Handled,
    /// The operator discarded or skipped it.
    GivenUp,
}

/// The store and everybody who changes it, and notes about what must not happen.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
pub(super) struct World {
    pub(super) next: Offset,
    /// The origins in the windows.
    pub(super) seen: u8,
    letters: [Option<Letter>; RECORDS],
    fates: [Fate; RECORDS],
    pub(super) instances: [Instance; 2],
    /// A commit whose instance gave up waiting. It arrives late or never.
    pub(super) late: Option<Tx>,
    pub(super) look: Option<Look>,
    pub(super) seeks: u8,
    /// The operator sought to a place between the record that was sent twice and its copy, so both
    /// may take effect.
    is_copy_apart: bool,
    took_effect_twice: bool,
    was_overtaken: bool,
    pub(super) was_discarded_unseen: bool,
}

/// An instance of the consumer, and what it believes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub(super) struct Instance {
    pub(super) place: Option<Place>,
    pub(super) counts: Option<Counts>,
    pub(super) tx: Option<Tx>,
}

/// A position as an instance loaded it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(super) struct Place {
    pub(super) next: Offset,
    pub(super) seen: u8,
    /// Whether the stored position still has this revision.
    pub(super) is_current: bool,
}

/// How many letters each key has, as an instance loaded it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(super) struct Counts {
    pub(super) of_key: [u8; KEYS],
    /// Whether the stored position still has the revision for which they were loaded.
    pub(super) are_current: bool,
}

/// A transaction that is open or under way.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(super) struct Tx {
    pub(super) next: Offset,
    /// The origins to mark as seen.
    pub(super) marks: u8,
    pub(super) effects: [bool; RECORDS],
    pub(super) letters: [Option<Change>; RECORDS],
    /// How many records were taken from the log, if more may follow.
    pub(super) batch: Option<u8>,
    /// What a mistaken instance does in a transaction of its own after this one.
    pub(super) then: Option<(Offset, Then)>,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(super) enum Change {
    Park(Letter),
    Replace(Letter),
    Remove,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(super) enum Then {
    Park(Letter),
    Remove,
    Handle,
}

impl Tx {
    /// A transaction that does nothing and leaves the position where it is.
    pub(super) fn at(next: Offset) -> Self {
        Self {
            next,
            marks: 0,
            effects: [false; RECORDS],
            letters: [None; RECORDS],
            batch: None,
            then: None,
        }
    }

    pub(super) fn handle(&mut self, offset: Offset) {
        self.effects[usize::from(offset)] = true;
    }

    pub(super) fn change(&mut self, offset: Offset, change: Change) {
        self.letters[usize::from(offset)] = Some(change);
    }

    /// What a mistaken instance does next.
    fn following(&self) -> Option<Self> {
        let (offset, then) = self.then?;
        let mut tx = Self::at(self.next);
        match then {
            Then::Park(letter) => tx.change(offset, Change::Park(letter)),
            Then::Remove => tx.change(offset, Change::Remove),
            Then::Handle => tx.handle(offset),
        }
        Some(tx)
    }
}

/// A letter as the operator saw it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) struct Look {
    pub(super) offset: Offset,
    pub(super) letter: Letter,
    pub(super) has_changed_since: bool,
}

impl World {
    /// The first records are passed, and those of the first key are letters. The first one is due.
    pub(super) fn parked() -> Self {
        let letter = |waits_for| {
            Some(Letter {
                waits_for,
                version: 1,
                parked_at: 0,
            })
        };
        Self {
            next: 3,
            seen: 0b111,
            letters: [letter(WaitsFor::Due), None, letter(WaitsFor::Key), None],
            fates: [Fate::Open, Fate::Handled, Fate::Open, Fate::Open],
            ..Self::default()
        }
    }

    pub(super) fn letter(&self, offset: Offset) -> Option<Letter> {
        self.letters[usize::from(offset)]
    }

    /// All letters, in the order of their offsets.
    pub(super) fn letters(&self) -> impl Iterator<Item = (Offset, Letter)> {
        (0..END).filter_map(|offset| Some((offset, self.letter(offset)?)))
    }

    /// The letters of the key of this record.
    pub(super) fn letters_of_key(&self, offset: Offset) -> impl Iterator<Item = (Offset, Letter)> {
        let key = entry(offset).key;
        self.letters().filter(move |(offset, _)| entry(*offset).key == key)
    }

    pub(super) fn counts(&self) -> [u8; KEYS] {
        array::from_fn(|key| self.letters().filter(|(offset, _)| entry(*offset).key == key).count() as u8)
    }

    pub(super) fn set_letter(&mut self, offset: Offset, letter: Option<Letter>) {
        self.letters[usize::from(offset)] = letter;
        if let Some(look) = self.look.as_mut().filter(|look| look.offset == offset) {
            look.has_changed_since = true;
        }
    }

    /// Only the letter that the operator has read is compared, so every other one counts as new.
    pub(super) fn forget_versions_not_looked_at(&mut self) {
        let looked_at = self.look.map(|look| look.offset);
        for (offset, letter) in (0..END).zip(&mut self.letters) {
            if let Some(letter) = letter.as_mut().filter(|_| looked_at != Some(offset)) {
                (letter.version, letter.parked_at) = (1, 0);
            }
        }
    }

    fn fate(&self, offset: Offset) -> Fate {
        self.fates[usize::from(offset)]
    }

    pub(super) fn give_up(&mut self, offset: Offset) {
        self.fates[usize::from(offset)] = Fate::GivenUp;
    }

    /// The copy of this record, if they count as one.
    fn live_copy_of(&self, offset: Offset) -> Option<Offset> {
        copy_of(offset).filter(|_| !self.is_copy_apart)
    }

    /// The records from here on are read again.
    pub(super) fn seek_back(&mut self, to: Offset) {
        self.next = to;
        self.seeks += 1;
        self.is_copy_apart = to > 0;
        for fate in &mut self.fates[usize::from(to)..] {
            *fate = Fate::Open;
        }
    }

    /// Applies a commit that is based on the stored position. Every other one is now stale.
    pub(super) fn apply(&mut self, tx: &Tx) {
        self.open_revision();
        for offset in 0..END {
            if tx.effects[usize::from(offset)] {
                self.take_effect(offset);
            }
            match tx.letters[usize::from(offset)] {
                None => {}
                Some(Change::Park(letter) | Change::Replace(letter)) => self.set_letter(offset, Some(letter)),
                Some(Change::Remove) => self.set_letter(offset, None),
            }
        }
        self.next = tx.next;
        self.seen |= tx.marks;
    }

    /// Makes everything stale that is based on the stored position.
    pub(super) fn open_revision(&mut self) {
        self.late = None;
        for instance in &mut self.instances {
            if let Some(place) = &mut instance.place {
                place.is_current = false;
            }
            if let Some(counts) = &mut instance.counts {
                counts.are_current = false;
            }
        }
    }

    fn take_effect(&mut self, offset: Offset) {
        let is_open = |record: Offset| self.fate(record) == Fate::Open;
        let copy = self.live_copy_of(offset);
        self.took_effect_twice |= !is_open(offset) || !copy.is_none_or(is_open);
        self.was_overtaken |=
            (offset + 1..END).any(|later| entry(later).key == entry(offset).key && self.fate(later) == Fate::Handled);
        self.fates[usize::from(offset)] = Fate::Handled;
    }

    pub(super) fn is_handled_once(&self) -> bool {
        !self.took_effect_twice
    }

    pub(super) fn is_in_order(&self) -> bool {
        !self.was_overtaken
    }

    pub(super) fn has_lost_nothing(&self) -> bool {
        let is_known = |offset: Offset| self.fate(offset) != Fate::Open || self.letter(offset).is_some();
        (0..self.next).all(|offset| is_known(offset) || self.live_copy_of(offset).is_some_and(is_known))
    }

    pub(super) fn has_letters_only_of_open_records(&self) -> bool {
        self.letters()
            .all(|(offset, _)| offset < self.next && self.fate(offset) == Fate::Open)
    }

    pub(super) fn has_only_first_letters_due(&self) -> bool {
        self.letters().all(|(offset, letter)| {
            let is_first = self.letters_of_key(offset).next() == Some((offset, letter));
            is_first == (letter.waits_for != WaitsFor::Key)
        })
    }

    /// Whether each record or its copy is handled.
    pub(super) fn is_done(&self) -> bool {
        let is_handled = |offset: Offset| self.fate(offset) == Fate::Handled;
        self.next == END && (0..END).all(|offset| is_handled(offset) || copy_of(offset).is_some_and(is_handled))
    }
}

impl Instance {
    /// Applies its own commit to what it believes.
    pub(super) fn committed(&mut self, tx: &Tx) {
        let Some(place) = &mut self.place else { return };
        *place = Place {
            next: tx.next,
            seen: place.seen | tx.marks,
            is_current: true,
        };
        if let Some(counts) = &mut self.counts {
            for (change, entry) in tx.letters.iter().zip(&LOG) {
                let count = &mut counts.of_key[entry.key];
                match change {
                    Some(Change::Park(_)) => *count += 1,
                    Some(Change::Remove) => *count = count.saturating_sub(1),
                    Some(Change::Replace(_)) | None => {}
                }
            }
            counts.are_current = true;
        }
        self.tx = tx.following();
    }

    /// Forgets what it believes if that is stale, but not what it does next.
    pub(super) fn forget_what_is_stale(&mut self) {
        let Some(place) = self.place.as_mut().filter(|place| !place.is_current) else {
            return;
        };
        (place.next, place.seen) = (0, 0);
        if let Some(counts) = &mut self.counts {
            counts.of_key = [0; KEYS];
        }
        self.tx = self.tx.map(|_| Tx::at(0));
    }
}
