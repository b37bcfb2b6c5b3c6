//! The rule under a model checker: every order of events of two writers, a network that delays and
//! loses messages, crashes, snapshots and retention, with the same [`Fold`] that the store uses.
//!
//! The mutants show that the checker finds mistakes: each breaks one thing, and each must be found.

mod mutants;

use std::collections::HashSet;

use essentially_once::{
    Offset,
    backend::{LogId, Owner, Revision},
};
use stateright::{Checker, Model, Property};

use super::rule::{Change, Commit, Fold, Hint, Missing, Token, Verdict};

/// A state that lists the applied changes in order.
type Applied = Vec<Push>;

/// A change, with the number that its writer gave it from its fold, as to a sent record.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Push {
    id: u8,
    number: u8,
}

impl Change for Push {
    type State = Applied;

    fn apply(self, _: u64, state: &mut Applied) {
        state.push(self);
    }
}

type Entry = Commit<Push>;
type Apply = fn(&mut Fold<Applied>, u64, Entry) -> Result<Verdict, Missing>;

/// The system, and how it may be broken.
struct System {
    apply: Apply,
    /// Added to the offset that a snapshot claims.
    snapshot_shift: u64,
    /// Whether a confirm alone counts as success.
    trusts_confirms: bool,
    /// Whether retention also removes entries that no complete snapshot covers.
    trims_at_will: bool,
    /// Whether a reader overtaken by retention continues at the stream's new beginning.
    jumps: bool,
    /// Whether a writer gives numbers by the entries that it has published, not by its fold.
    counts_tries: bool,
    publishes: u8,
    snapshots: u8,
    crashes: u8,
    releases: u8,
}

impl System {
    fn sound() -> Self {
        Self {
            apply: Fold::apply,
            snapshot_shift: 0,
            trusts_confirms: false,
            trims_at_will: false,
            jumps: false,
            counts_tries: false,
            publishes: 3,
            snapshots: 2,
            crashes: 1,
            releases: 0,
        }
    }
}

/// An entry of the changelog.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
#[expect(
    clippy::large_enum_variant,
    reason = "a model has few entries, and nearly all are commits"
)]
enum Item {
    Commit(Entry),
    Mark(Token),
}

impl Item {
    fn token(&self) -> Token {
        match self {
            Self::Commit(commit) => commit.token,
            Self::Mark(token) => *token,
        }
    }

    /// Lets a reader read it.
    fn read(self, apply: Apply, fold: &mut Fold<Applied>, offset: u64) -> Result<Option<Verdict>, Missing> {
        match self {
            Self::Commit(commit) => apply(fold, offset, commit).map(Some),
            Self::Mark(token) => {
                fold.mark(offset, token);
                Ok(None)
            }
        }
    }
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
struct World {
    /// The changelog. Entries before `first` were removed, and are kept here for comparison.
    entries: Vec<Item>,
    first: usize,
    /// Published, and not yet in the changelog.
    under_way: Vec<Item>,
    writers: [Writer; 2],
    /// Taken, and not yet complete.
    begun: Vec<Fold<Applied>>,
    /// The newest complete snapshot. Older ones are useless.
    newest: Fold<Applied>,
    /// The commits that writers reported.
    acknowledged: Vec<u8>,
    /// A recovery found something missing.
    lost: bool,
    published: u8,
    snapshots: u8,
    crashes: u8,
    releases: u8,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
struct Writer {
    fold: Option<Fold<Applied>>,
    /// The entry that it waits for.
    own: Option<Token>,
    /// Whether a commit of its session was acknowledged.
    has_committed: bool,
    /// How many entries it published, where they are counted.
    tries: u8,
}

#[derive(Clone, PartialEq, Eq, Debug)]
enum Action {
    Recover(usize),
    Publish(usize),
    /// It gives the position up, whether or not it owns it.
    Release(usize),
    Read(usize),
    /// The timeout has passed: indeterminate.
    GiveUp(usize),
    Crash(usize),
    BeginSnapshot(usize),
    /// An entry arrives, in any order.
    Land(usize),
    /// An entry never arrives.
    Vanish(usize),
    CompleteSnapshot(usize),
    AbandonSnapshot(usize),
    /// Retention removes the first entry.
    Trim,
}

impl World {
    /// The fold of a reader that starts with this fold and reads to the end.
    fn read_on(&self, apply: Apply, mut fold: Fold<Applied>) -> Option<Fold<Applied>> {
        let unread = self.entries.get(fold.offset as usize..)?;
        for (offset, entry) in (fold.offset..).zip(unread) {
            entry.clone().read(apply, &mut fold, offset).ok()?;
        }
        Some(fold)
    }

    /// The revisions of the applied entries, as their writers chose them.
    fn applied(&self, apply: Apply) -> Vec<Revision> {
        let mut fold = Fold::default();
        let mut applied = Vec::new();
        for (offset, entry) in (0..).zip(&self.entries) {
            let verdict = entry.clone().read(apply, &mut fold, offset);
            if let Item::Commit(commit) = entry
                && verdict == Ok(Some(Verdict::Applied))
            {
                applied.push(commit.revision);
            }
        }
        applied
    }

    /// The fold of a reader that saw everything.
    fn truth(&self, apply: Apply) -> Option<Fold<Applied>> {
        self.read_on(apply, Fold::default())
    }
}

impl Model for System {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        vec![World::default()]
    }

    fn actions(&self, world: &World, actions: &mut Vec<Action>) {
        for (index, writer) in world.writers.iter().enumerate() {
            let Some(fold) = &writer.fold else {
                actions.push(Action::Recover(index));
                continue;
            };
            if writer.own.is_none() && world.published < self.publishes {
                actions.push(Action::Publish(index));
            }
            if writer.own.is_some() {
                actions.push(Action::GiveUp(index));
            }
            if world.releases < self.releases {
                actions.push(Action::Release(index));
            }
            if fold.offset < world.entries.len() as u64 {
                actions.push(Action::Read(index));
            }
            if world.crashes < self.crashes {
                actions.push(Action::Crash(index));
            }
            if world.snapshots < self.snapshots && fold.revision > Revision::NONE {
                actions.push(Action::BeginSnapshot(index));
            }
        }
        for index in 0..world.under_way.len() {
            actions.extend([Action::Land(index), Action::Vanish(index)]);
        }
        for index in 0..world.begun.len() {
            actions.extend([Action::CompleteSnapshot(index), Action::AbandonSnapshot(index)]);
        }
        let covered = world.newest.offset.max(if self.trims_at_will {
            world.entries.len() as u64
        } else {
            0
        });
        if (world.first as u64) < covered {
            actions.push(Action::Trim);
        }
    }

    fn next_state(&self, world: &World, action: Action) -> Option<World> {
        let mut world = world.clone();
        match action {
            Action::Recover(index) => {
                let fold = world.newest.clone();
                if fold.offset < world.first as u64 || fold.offset > world.entries.len() as u64 {
                    world.lost = true;
                } else {
                    world.writers[index].fold = Some(fold);
                }
            }
            Action::Publish(index) => {
                world.published += 1;
                let token = Token::from(world.published);
                let writer = &mut world.writers[index];
                let fold = writer.fold.as_ref()?;
                let number = match self.counts_tries {
                    false => fold.state.len() as u8,
                    true => writer.tries,
                };
                writer.tries += u8::from(self.counts_tries);
                // As the core chooses them: a new session opens an epoch.
                let revision = match writer.has_committed {
                    false => fold.revision.next_epoch(),
                    true => fold.revision.next_count(),
                };
                world.under_way.push(Item::Commit(Commit {
                    token,
                    parent: fold.token,
                    expected: fold.revision,
                    revision,
                    log: LogId::new("orders").ok()?,
                    next: Offset::ZERO,
                    owner: Some(owner(index)),
                    note: essentially_once::backend::Note::default(),
                    journal: None,
                    change: Push {
                        id: world.published,
                        number,
                    },
                }));
                writer.own = Some(token);
            }
            Action::Release(index) => {
                world.releases += 1;
                world.under_way.push(Item::Mark(Hint::Release.token(owner(index))));
            }
            Action::Read(index) => self.read(&mut world, index),
            Action::GiveUp(index) => {
                let writer = &mut world.writers[index];
                (writer.own, writer.has_committed) = (None, false);
            }
            Action::Crash(index) => {
                world.crashes += 1;
                world.writers[index] = Writer::default();
            }
            Action::BeginSnapshot(index) => {
                world.snapshots += 1;
                let mut fold = world.writers[index].fold.clone()?;
                fold.offset += self.snapshot_shift;
                world.begun.push(fold);
                world.begun.sort_by_key(|fold| fold.offset);
            }
            Action::Land(index) => {
                let entry = world.under_way.remove(index);
                if self.trusts_confirms {
                    let waits = |writer: &&mut Writer| writer.own == Some(entry.token());
                    if let Item::Commit(commit) = &entry
                        && let Some(writer) = world.writers.iter_mut().find(waits)
                    {
                        (writer.own, writer.has_committed) = (None, true);
                        world.acknowledged.push(commit.change.id);
                    }
                }
                world.entries.push(entry);
            }
            Action::Vanish(index) => drop(world.under_way.remove(index)),
            Action::CompleteSnapshot(index) => {
                let fold = world.begun.remove(index);
                if fold.offset > world.newest.offset {
                    world.newest = fold;
                }
            }
            Action::AbandonSnapshot(index) => drop(world.begun.remove(index)),
            Action::Trim => world.first += 1,
        }
        Some(world)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::<Self>::always("at most one entry of a revision applies", |system, world| {
                let revisions = world.applied(system.apply);
                revisions.iter().collect::<HashSet<_>>().len() == revisions.len()
            }),
            Property::<Self>::always(
                "a reader from the newest snapshot agrees with one from the first entry",
                |system, world| {
                    let is_lost = world.newest.offset < world.first as u64;
                    !is_lost && world.read_on(system.apply, world.newest.clone()) == world.truth(system.apply)
                },
            ),
            Property::<Self>::always("a writer knows a part of the truth", |system, world| {
                world.truth(system.apply).is_some_and(|truth| {
                    world
                        .writers
                        .iter()
                        .flat_map(|writer| &writer.fold)
                        .all(|fold| truth.state.starts_with(&fold.state))
                })
            }),
            Property::<Self>::always("what was acknowledged is applied, once", |system, world| {
                world.truth(system.apply).is_some_and(|truth| {
                    let times = |entry: &u8| truth.state.iter().filter(|applied| applied.id == *entry).count();
                    world.acknowledged.iter().all(|entry| times(entry) == 1)
                })
            }),
            Property::<Self>::always("the numbers of sent records rise by one", |system, world| {
                world.truth(system.apply).is_some_and(|truth| {
                    let numbers = truth.state.iter().map(|applied| usize::from(applied.number));
                    numbers.eq(0..truth.state.len())
                })
            }),
            Property::<Self>::always("nothing is lost", |_, world| !world.lost),
            Property::<Self>::sometimes("a position is given up", |system, world| {
                system.releases == 0
                    || world
                        .truth(system.apply)
                        .is_some_and(|fold| fold.place.is_some() && fold.owner.is_none())
            }),
            Property::<Self>::sometimes("two commits are acknowledged", |_, world| world.acknowledged.len() == 2),
            Property::<Self>::sometimes("a commit of one who gave up applies", |system, world| {
                let idle = world.writers.iter().all(|writer| writer.own.is_none()) && world.under_way.is_empty();
                idle && world.acknowledged.is_empty()
                    && world
                        .truth(system.apply)
                        .is_some_and(|fold| fold.revision > Revision::NONE)
            }),
            Property::<Self>::sometimes("a writer goes on after retention", |_, world| {
                world.first > 0
                    && world
                        .writers
                        .iter()
                        .flat_map(|writer| &writer.fold)
                        .any(|fold| fold.state.len() > 1)
            }),
        ]
    }
}

impl System {
    fn read(&self, world: &mut World, index: usize) {
        let writer = &mut world.writers[index];
        let Some(fold) = &mut writer.fold else { return };
        let mut offset = fold.offset as usize;
        if offset < world.first {
            if !self.jumps {
                // As the store does at a hole: forget the fold and recover.
                *writer = Writer::default();
                return;
            }
            offset = world.first;
        }
        let Some(entry) = world.entries.get(offset).cloned() else {
            return;
        };
        let (token, pushed) = match &entry {
            Item::Commit(commit) => (commit.token, Some(commit.change.id)),
            Item::Mark(token) => (*token, None),
        };
        match entry.read(self.apply, fold, offset as u64) {
            Ok(verdict) if writer.own == Some(token) => {
                writer.own = None;
                writer.has_committed = verdict == Some(Verdict::Applied);
                world.acknowledged.extend(pushed.filter(|_| writer.has_committed));
            }
            Ok(_) => {}
            Err(_) => {
                *writer = Writer::default();
                world.lost = true;
            }
        }
    }
}

/// The owner by whose number a writer commits. No token equals it.
fn owner(writer: usize) -> Owner {
    Owner::new(1_000 + writer as u128)
}

#[test]
fn the_rule_holds_in_every_order_of_events() {
    for (publishes, snapshots, crashes, releases) in [(3, 1, 1, 0), (2, 2, 2, 0), (2, 1, 1, 1)] {
        let checker = System {
            publishes,
            snapshots,
            crashes,
            releases,
            ..System::sound()
        }
        .checker()
        .threads(2)
        .spawn_bfs()
        .join();
        checker.assert_properties();
        assert!(
            checker.unique_state_count() > 20_000,
            "{} states",
            checker.unique_state_count()
        );
    }
}
