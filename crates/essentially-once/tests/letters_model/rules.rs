//! The rules for dead letters, and the mistakes that one can make with each of them.

use stateright::{Model, Property};

use super::world::{Change, Counts, END, Instance, Letter, Look, Offset, Place, Then, Tx, WaitsFor, World, entry};

pub(super) const ONCE: &str = "no record takes effect twice, or as a copy, or after an operator gave it up";
pub(super) const NOTHING_LOST: &str = "each passed record was handled or given up, or is a letter or a copy";
pub(super) const IN_ORDER: &str = "no record takes effect after a later one of its key";
pub(super) const NEVER_BOTH: &str = "no record is a letter that is not passed, was handled, or was given up";
pub(super) const DRAINS: &str = "of each key, the first letter does not wait for a letter, and the others do";
pub(super) const AS_SEEN: &str = "an operator discards only a letter that has not changed since he saw it";
pub(super) const DONE: &str = "each record or its copy is handled";

#[derive(Clone, Copy)]
pub(super) struct Rules {
    pub(super) mistake: Option<Mistake>,
    pub(super) operator: Operator,
    pub(super) begins: fn() -> World,
    /// The most records of one transaction.
    pub(super) batch: u8,
    /// Whether a commit may arrive after its instance gave up waiting for the reply.
    pub(super) has_late_commits: bool,
    /// Whether all instances are alike whose position is stale. The store refuses their
    /// transactions, whatever these hold.
    pub(super) stale_ones_are_alike: bool,
}

impl Rules {
    pub(super) const SOUND: Self = Self {
        mistake: None,
        operator: Operator::ABSENT,
        begins: World::default,
        batch: 2,
        has_late_commits: true,
        stale_ones_are_alike: true,
    };
}

/// What the operator does.
#[derive(Clone, Copy)]
pub(super) struct Operator {
    pub(super) changes_letters: bool,
    pub(super) skips: bool,
    /// The most seeks of a run.
    pub(super) seeks: u8,
}

impl Operator {
    pub(super) const ABSENT: Self = Self {
        changes_letters: false,
        skips: false,
        seeks: 0,
    };
}

/// A rule broken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Mistake {
    ParksOutsideTheTransaction,
    ParksAfterTheMove,
    LetsRecordsOvertakeLetters,
    ParksDuplicates,
    CountsLettersBeforeThePosition,
    KeepsCountsOfAnotherPosition,
    MarksWhatWasRolledBack,
    RemovesBeforeHandling,
    RemovesAfterHandling,
    DropsLettersAsDuplicates,
    MarksLettersOnlyWhenHandled,
    HandlesAndLeavesTheNextWaiting,
    RetriesTheLetterAsSeen,
    DiscardsWhateverIsThere,
    DiscardsByVersionAlone,
    DiscardsWithoutARevision,
    DiscardsAndLeavesTheNextWaiting,
    SeeksAndKeepsLetters,
    SeeksAndKeepsWindows,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Action {
    LoadPosition(usize),
    LoadCounts(usize),
    /// Handles the next record, parks it behind letters, or drops it as a duplicate.
    Take(usize),
    /// The last try of the next record fails. Its letter waits for this.
    Fail(usize, WaitsFor),
    /// A try fails, in the handler or in its flush. What it did is rolled back, and a commit that
    /// leaves the position where it is counts it.
    CountTry(usize),
    /// Handles a due letter.
    Try(usize, Offset, Room),
    /// A due letter fails, and then waits for this.
    FailAgain(usize, Offset, WaitsFor),
    /// The commit arrives, and so does its reply.
    Commit(usize),
    /// The instance does not wait for the reply any longer.
    GiveUp(usize),
    ArriveLate,
    Crash(usize),
    /// The operator reads a letter.
    Look(Offset),
    /// The operator discards the letter that he has read.
    Discard,
    Retry(Offset),
    SeekBack(Offset),
    Skip,
}

/// How many letters of a key fit one transaction.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Room {
    ForOne,
    ForAll,
}

/// What a failed record or letter waits for: its policy decides.
const AFTER_FAILURE: [WaitsFor; 2] = [WaitsFor::Due, WaitsFor::Operator];

impl Model for Rules {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        vec![(self.begins)()]
    }

    fn actions(&self, world: &World, actions: &mut Vec<Action>) {
        for (index, instance) in world.instances.iter().enumerate() {
            self.actions_of(index, instance, world, actions);
        }
        if world.late.is_some() {
            actions.push(Action::ArriveLate);
        }
        if self.operator.changes_letters {
            actions.extend(world.look.map(|_| Action::Discard));
            for (offset, letter) in world.letters() {
                if world.look.is_none() {
                    actions.push(Action::Look(offset));
                }
                if letter.waits_for != WaitsFor::Due {
                    actions.push(Action::Retry(offset));
                }
            }
        }
        if world.seeks < self.operator.seeks {
            actions.extend((0..world.next).map(Action::SeekBack));
        }
        if self.operator.skips && world.next < END {
            actions.push(Action::Skip);
        }
    }

    fn next_state(&self, world: &World, action: Action) -> Option<World> {
        let mut world = world.clone();
        match action {
            Action::LoadPosition(index) => {
                world.instances[index].place = Some(Place {
                    next: world.next,
                    seen: world.seen,
                    is_current: true,
                });
            }
            Action::LoadCounts(index) => {
                let of_key = world.counts();
                let instance = &mut world.instances[index];
                let are_current = instance.place.is_none_or(|place| place.is_current);
                instance.counts = Some(Counts { of_key, are_current });
            }
            Action::Take(index) => self.take(&mut world, index)?,
            Action::Fail(index, waits_for) => self.fail(&mut world, index, waits_for)?,
            Action::CountTry(index) => self.count_try(&mut world.instances[index])?,
            Action::Try(index, offset, room) => self.try_letter(&mut world, index, offset, room)?,
            Action::FailAgain(index, offset, waits_for) => {
                let letter = world.letter(offset)?.now_waits_for(waits_for);
                let instance = &mut world.instances[index];
                let mut tx = Tx::at(instance.place?.next);
                tx.change(offset, Change::Replace(letter));
                instance.tx = Some(tx);
            }
            Action::Commit(index) => {
                let tx = world.instances[index].tx?;
                if world.instances[index].place?.is_current {
                    world.apply(&tx);
                    world.instances[index].committed(&tx);
                } else {
                    self.end_session(&mut world.instances[index]);
                }
            }
            Action::GiveUp(index) => {
                let instance = &mut world.instances[index];
                let is_current = instance.place?.is_current;
                world.late = instance.tx.filter(|_| is_current);
                self.end_session(instance);
            }
            Action::ArriveLate => {
                let tx = world.late?;
                world.apply(&tx);
            }
            Action::Crash(index) => world.instances[index] = Instance::default(),
            Action::Look(offset) => {
                world.look = Some(Look {
                    offset,
                    letter: world.letter(offset)?,
                    has_changed_since: false,
                });
            }
            Action::Discard => self.discard(&mut world)?,
            Action::Retry(offset) => self.retry(&mut world, offset)?,
            Action::SeekBack(to) => self.seek_back(&mut world, to),
            Action::Skip => skip(&mut world),
        }
        self.forget_what_does_not_matter(&mut world);
        Some(world)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::<Self>::always(ONCE, |_, world| world.is_handled_once()),
            Property::<Self>::always(NOTHING_LOST, |_, world| world.has_lost_nothing()),
            Property::<Self>::always(IN_ORDER, |_, world| world.is_in_order()),
            Property::<Self>::always(NEVER_BOTH, |_, world| world.has_letters_only_of_open_records()),
            Property::<Self>::always(DRAINS, |_, world| world.has_only_first_letters_due()),
            Property::<Self>::always(AS_SEEN, |_, world| !world.was_discarded_unseen),
            Property::<Self>::sometimes(DONE, |_, world| world.is_done()),
        ]
    }
}

impl Rules {
    fn actions_of(&self, index: usize, instance: &Instance, world: &World, actions: &mut Vec<Action>) {
        if *instance != Instance::default() {
            actions.push(Action::Crash(index));
        }
        let Some(place) = instance.place else {
            actions.push(match instance.counts {
                None if self.mistake == Some(Mistake::CountsLettersBeforeThePosition) => Action::LoadCounts(index),
                _ => Action::LoadPosition(index),
            });
            return;
        };
        if instance.counts.is_none() {
            actions.push(Action::LoadCounts(index));
            return;
        }
        if let Some(tx) = instance.tx {
            actions.push(Action::Commit(index));
            if self.has_late_commits && world.late.is_none() {
                actions.push(Action::GiveUp(index));
            }
            if let Some(taken) = tx.batch {
                actions.push(Action::CountTry(index));
                if taken < self.batch && tx.next < END {
                    actions.push(Action::Take(index));
                }
            }
            return;
        }
        if place.next < END {
            actions.extend([Action::Take(index), Action::CountTry(index)]);
            actions.extend(AFTER_FAILURE.map(|waits_for| Action::Fail(index, waits_for)));
        }
        for (offset, letter) in world.letters() {
            if letter.waits_for == WaitsFor::Due {
                actions.push(Action::Try(index, offset, Room::ForOne));
                if self.batch > 1 {
                    actions.push(Action::Try(index, offset, Room::ForAll));
                }
                actions.extend(AFTER_FAILURE.map(|waits_for| Action::FailAgain(index, offset, waits_for)));
            }
        }
    }

    fn take(&self, world: &mut World, index: usize) -> Option<()> {
        let instance = &world.instances[index];
        let mut tx = instance.tx.unwrap_or(Tx::at(instance.place?.next));
        match self.destiny(instance, &tx) {
            Destiny::Handle => {
                tx.handle(tx.next);
                tx.marks |= entry(tx.next).origin;
            }
            Destiny::Drop => {}
            Destiny::ParkBehind => self.park(world, &mut tx, WaitsFor::Key),
        }
        tx.next += 1;
        tx.batch = Some(tx.batch.unwrap_or(0) + 1);
        world.instances[index].tx = Some(tx);
        Some(())
    }

    fn fail(&self, world: &mut World, index: usize, waits_for: WaitsFor) -> Option<()> {
        let instance = &world.instances[index];
        let mut tx = Tx::at(instance.place?.next);
        if self.destiny(instance, &tx) != Destiny::Handle {
            return None;
        }
        self.park(world, &mut tx, waits_for);
        tx.next += 1;
        world.instances[index].tx = Some(tx);
        Some(())
    }

    fn count_try(&self, instance: &mut Instance) -> Option<()> {
        let mut tx = Tx::at(instance.place?.next);
        if self.mistake == Some(Mistake::MarksWhatWasRolledBack) {
            tx.marks = instance.tx.map_or(0, |rolled_back| rolled_back.marks);
        }
        instance.tx = Some(tx);
        Some(())
    }

    /// What becomes of the record that the transaction comes to next.
    fn destiny(&self, instance: &Instance, tx: &Tx) -> Destiny {
        let entry = entry(tx.next);
        let seen = instance.place.map_or(0, |place| place.seen) | tx.marks;
        let is_duplicate = seen & entry.origin != 0;
        let has_letters = instance.counts.is_some_and(|counts| counts.of_key[entry.key] > 0);
        match (is_duplicate, has_letters, self.mistake) {
            (true, true, Some(Mistake::ParksDuplicates)) => Destiny::ParkBehind,
            (true, _, _) => Destiny::Drop,
            (false, true, Some(Mistake::LetsRecordsOvertakeLetters)) => Destiny::Handle,
            (false, true, _) => Destiny::ParkBehind,
            (false, false, _) => Destiny::Handle,
        }
    }

    /// Parks the next record.
    fn park(&self, world: &mut World, tx: &mut Tx, waits_for: WaitsFor) {
        let offset = tx.next;
        let letter = Letter {
            waits_for,
            version: 1,
            parked_at: world.seeks,
        };
        match self.mistake {
            Some(Mistake::ParksOutsideTheTransaction) => world.set_letter(offset, Some(letter)),
            Some(Mistake::ParksAfterTheMove) => tx.then = Some((offset, Then::Park(letter))),
            _ => tx.change(offset, Change::Park(letter)),
        }
        if self.mistake != Some(Mistake::MarksLettersOnlyWhenHandled) {
            tx.marks |= entry(offset).origin;
        }
    }

    /// Handles a letter, and the next ones of its key if there is room.
    fn try_letter(&self, world: &mut World, index: usize, offset: Offset, room: Room) -> Option<()> {
        let place = world.instances[index].place?;
        let mut tx = Tx::at(place.next);
        let mut is_full = false;
        for (offset, letter) in world.letters_of_key(offset).filter(|(other, _)| *other >= offset) {
            if is_full {
                if self.mistake != Some(Mistake::HandlesAndLeavesTheNextWaiting) {
                    tx.change(offset, Change::Replace(letter.now_waits_for(WaitsFor::Due)));
                }
                break;
            }
            let origin = entry(offset).origin;
            match self.mistake {
                Some(Mistake::RemovesBeforeHandling) => {
                    tx.change(offset, Change::Remove);
                    tx.then = Some((offset, Then::Handle));
                }
                Some(Mistake::RemovesAfterHandling) => {
                    tx.handle(offset);
                    tx.then = Some((offset, Then::Remove));
                }
                Some(Mistake::DropsLettersAsDuplicates) if place.seen & origin != 0 => {
                    tx.change(offset, Change::Remove);
                }
                mistake => {
                    tx.handle(offset);
                    tx.change(offset, Change::Remove);
                    if mistake == Some(Mistake::MarksLettersOnlyWhenHandled) {
                        tx.marks |= origin;
                    }
                }
            }
            is_full = room == Room::ForOne || tx.then.is_some();
        }
        world.instances[index].tx = Some(tx);
        Some(())
    }

    fn discard(&self, world: &mut World) -> Option<()> {
        let look = world.look?;
        let stored = world.letter(look.offset);
        let may_go = match self.mistake {
            Some(Mistake::DiscardsWhateverIsThere) => stored.is_some(),
            Some(Mistake::DiscardsByVersionAlone) => stored.is_some_and(|stored| stored.version == look.letter.version),
            _ => stored == Some(look.letter),
        };
        if may_go {
            if self.mistake != Some(Mistake::DiscardsWithoutARevision) {
                world.open_revision();
            }
            world.was_discarded_unseen |= look.has_changed_since;
            let was_first = world.letters_of_key(look.offset).next().map(|(first, _)| first) == Some(look.offset);
            world.set_letter(look.offset, None);
            world.give_up(look.offset);
            let next = world.letters_of_key(look.offset).next();
            if let Some((next, letter)) = next.filter(|_| was_first)
                && self.mistake != Some(Mistake::DiscardsAndLeavesTheNextWaiting)
            {
                world.set_letter(next, Some(letter.now_waits_for(WaitsFor::Due)));
            }
        }
        world.look = None;
        Some(())
    }

    fn retry(&self, world: &mut World, offset: Offset) -> Option<()> {
        let (offset, letter) = match self.mistake {
            Some(Mistake::RetriesTheLetterAsSeen) => world.look.map(|look| (look.offset, look.letter))?,
            _ => (offset, world.letter(offset)?),
        };
        let first = world.letters_of_key(offset).next();
        if first.is_some_and(|(first, _)| first < offset) {
            return None;
        }
        world.open_revision();
        world.set_letter(offset, Some(letter.now_waits_for(WaitsFor::Due)));
        Some(())
    }

    fn seek_back(&self, world: &mut World, to: Offset) {
        world.open_revision();
        world.seek_back(to);
        if self.mistake != Some(Mistake::SeeksAndKeepsLetters) {
            (to..END).for_each(|offset| world.set_letter(offset, None));
        }
        if self.mistake != Some(Mistake::SeeksAndKeepsWindows) {
            world.seen = 0;
        }
    }

    fn end_session(&self, instance: &mut Instance) {
        (instance.place, instance.tx) = (None, None);
        if self.mistake == Some(Mistake::CountsLettersBeforeThePosition) {
            instance.counts = None;
        }
    }

    /// Makes states equal that differ only in what can make no difference.
    fn forget_what_does_not_matter(&self, world: &mut World) {
        world.forget_versions_not_looked_at();
        for instance in &mut world.instances {
            if self.stale_ones_are_alike {
                instance.forget_what_is_stale();
            }
            if instance.place.is_none() && !self.keeps_stale_counts() {
                instance.counts = instance.counts.filter(|counts| counts.are_current);
            }
        }
        // One instance is like the other.
        world.instances.sort_unstable();
    }

    fn keeps_stale_counts(&self) -> bool {
        matches!(
            self.mistake,
            Some(Mistake::KeepsCountsOfAnotherPosition | Mistake::CountsLettersBeforeThePosition)
        )
    }
}

/// The origin counts as seen, so that the record is dropped if it is sent again.
fn skip(world: &mut World) {
    let offset = world.next;
    let origin = entry(offset).origin;
    world.open_revision();
    if world.seen & origin == 0 {
        world.give_up(offset);
    }
    world.seen |= origin;
    world.next += 1;
}

#[derive(PartialEq, Eq)]
enum Destiny {
    Handle,
    Drop,
    ParkBehind,
}
