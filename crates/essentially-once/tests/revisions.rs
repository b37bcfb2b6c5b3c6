//! Revisions under a model checker: two sessions, an operator, and a store that loses everything.
//! Commits overlap, arrive late, in any order, or never.
//!
//! A commit must apply only to the state that its handler saw. The model uses the consumer's own
//! [`Revision`], and each mutant breaks one rule for choosing revisions.

#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

use essentially_once::backend::Revision;
use stateright::{Checker, HasDiscoveries, Model, Property};

const HOLDS: &str = "a commit applies only to the state that its handler saw";

/// The rules for choosing revisions.
#[derive(Clone, Copy)]
struct Rules {
    /// The revision of a session's first commit, given how many epochs were drawn before.
    first: fn(Revision, u8) -> Revision,
    /// The revision of a change made by hand.
    by_hand: fn(Revision, u8) -> Revision,
    /// Whether a session may send its second commit before the first is answered.
    overlaps_early: bool,
}

impl Rules {
    const SOUND: Self = Self {
        first: fresh_epoch,
        by_hand: fresh_epoch,
        overlaps_early: false,
    };
}

/// An epoch that was never drawn before, like a random one.
fn fresh_epoch(_: Revision, drawn: u8) -> Revision {
    Revision::new(u64::from(drawn) + 1, 1)
}

/// Names a state by the commit that made it. 0 is the initial state.
type State = u8;

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct Commit {
    session: usize,
    /// The state that its handler saw: the loaded state, or that of the previous commit.
    saw: State,
    makes: State,
    expected: Revision,
    revision: Revision,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
struct World {
    state: State,
    revision: Revision,
    sessions: [Option<Session>; 2],
    under_way: Vec<Commit>,
    commits: u8,
    /// How many epochs were drawn.
    drawn: u8,
    /// Whether the store has lost the position and the state.
    has_lost: bool,
    /// A commit applied to a state that its handler did not see.
    broken: bool,
    applied: u8,
}

/// What a session believes.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct Session {
    state: State,
    revision: Revision,
    /// Its unanswered commits.
    waits_for: Vec<State>,
    has_sent: bool,
    has_answer: bool,
}

#[derive(Clone, PartialEq, Eq, Debug)]
enum Action {
    /// A new session begins, or an old one gives up and begins again.
    Load(usize),
    Send(usize),
    /// A commit arrives, and so does its answer.
    Arrive(usize),
    /// A commit arrives, and its answer is lost.
    ArriveUnanswered(usize),
    Vanish(usize),
    ByHand,
    /// Position and state are deleted and rebuilt from nothing. Happens once.
    Lose,
}

/// The most commits of a run. Two of them can overlap.
const COMMITS: u8 = 5;

impl Model for Rules {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        vec![World::default()]
    }

    fn actions(&self, world: &World, actions: &mut Vec<Action>) {
        for (index, session) in world.sessions.iter().enumerate() {
            actions.push(Action::Load(index));
            let Some(session) = session else { continue };
            let may_overlap = self.overlaps_early || session.has_answer;
            let most = if may_overlap { 2 } else { 1 };
            if world.commits < COMMITS && session.waits_for.len() < most {
                actions.push(Action::Send(index));
            }
        }
        for index in 0..world.under_way.len() {
            actions.extend([
                Action::Arrive(index),
                Action::ArriveUnanswered(index),
                Action::Vanish(index),
            ]);
        }
        if world.commits < COMMITS {
            actions.push(Action::ByHand);
        }
        if !world.has_lost && world.applied > 0 {
            actions.push(Action::Lose);
        }
    }

    fn next_state(&self, world: &World, action: Action) -> Option<World> {
        let mut world = world.clone();
        match action {
            Action::Load(index) => {
                let fresh = Session {
                    state: world.state,
                    revision: world.revision,
                    waits_for: Vec::new(),
                    has_sent: false,
                    has_answer: false,
                };
                if world.sessions[index].as_ref() == Some(&fresh) {
                    return None;
                }
                world.sessions[index] = Some(fresh);
            }
            Action::Send(index) => {
                world.commits += 1;
                let makes = world.commits;
                let session = world.sessions[index].as_mut()?;
                let expected = session.revision;
                let revision = match session.has_sent {
                    false => (self.first)(expected, world.drawn),
                    true => expected.next_count(),
                };
                world.drawn += u8::from(!session.has_sent);
                world.under_way.push(Commit {
                    session: index,
                    saw: session.state,
                    makes,
                    expected,
                    revision,
                });
                (session.state, session.revision) = (makes, revision);
                session.waits_for.push(makes);
                session.has_sent = true;
            }
            Action::Arrive(index) => {
                let commit = world.under_way.remove(index);
                let applied = apply(&mut world, &commit);
                // The answer goes to the session that sent the commit, if it still waits. A fenced
                // session begins again.
                let waiting = world.sessions[commit.session].as_mut();
                if let Some(session) = waiting.filter(|session| session.waits_for.contains(&commit.makes)) {
                    session.waits_for.retain(|state| *state != commit.makes);
                    session.has_answer = true;
                    if !applied {
                        world.sessions[commit.session] = None;
                    }
                }
            }
            Action::ArriveUnanswered(index) => {
                let commit = world.under_way.remove(index);
                apply(&mut world, &commit);
            }
            Action::Vanish(index) => drop(world.under_way.remove(index)),
            Action::ByHand => {
                world.commits += 1;
                let (saw, makes, expected) = (world.state, world.commits, world.revision);
                let by_hand = Commit {
                    session: 0,
                    saw,
                    makes,
                    expected,
                    revision: (self.by_hand)(expected, world.drawn),
                };
                world.drawn += 1;
                apply(&mut world, &by_hand);
            }
            Action::Lose => {
                world.has_lost = true;
                (world.state, world.revision) = (0, Revision::NONE);
            }
        }
        Some(world)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::<Self>::always(HOLDS, |_, world| !world.broken),
            Property::<Self>::sometimes("four commits apply", |_, world| world.applied == 4),
        ]
    }

    fn within_boundary(&self, world: &World) -> bool {
        world.under_way.len() <= 3
    }
}

/// Applies a commit as every store does (S2). Returns whether it applied.
fn apply(world: &mut World, commit: &Commit) -> bool {
    let applies = commit.expected == world.revision;
    if applies {
        world.broken |= commit.saw != world.state;
        world.applied += 1;
        (world.state, world.revision) = (commit.makes, commit.revision);
    }
    applies
}

#[test]
fn a_commit_applies_only_to_the_state_that_its_handler_saw() {
    let checker = Rules::SOUND.checker().threads(2).spawn_bfs().join();
    checker.assert_properties();
    assert!(
        checker.unique_state_count() > 10_000,
        "{} states",
        checker.unique_state_count()
    );
}

fn found(rules: Rules) {
    let checker = rules
        .checker()
        .threads(2)
        .finish_when(HasDiscoveries::AllOf([HOLDS].into()))
        .spawn_bfs()
        .join();
    assert!(
        checker.discovery(HOLDS).is_some(),
        "the checker did not find the violation"
    );
}

#[test]
fn mutant_a_plain_counter() {
    found(Rules {
        first: |revision, _| revision.next_count(),
        by_hand: |revision, _| revision.next_count(),
        ..Rules::SOUND
    });
}

#[test]
fn mutant_a_session_goes_on_counting_in_the_epoch_of_another() {
    found(Rules {
        first: |revision, _| revision.next_count(),
        ..Rules::SOUND
    });
}

#[test]
fn mutant_a_change_by_hand_opens_no_epoch() {
    found(Rules {
        by_hand: |revision, _| revision.next_count(),
        ..Rules::SOUND
    });
}

/// Nothing else supplies the revision that the second commit expects, so it need not wait for the
/// first one's answer.
#[test]
fn a_session_may_overlap_commits_from_its_first_on() {
    let rules = Rules {
        overlaps_early: true,
        ..Rules::SOUND
    };
    rules.checker().threads(2).spawn_bfs().join().assert_properties();
}

#[test]
fn mutant_a_session_overlaps_commits_in_epochs_that_count_up() {
    found(Rules {
        first: |revision, _| revision.next_epoch(),
        overlaps_early: true,
        ..Rules::SOUND
    });
}

/// After a loss the same numbers repeat, and an old session finds the one that it expects.
#[test]
fn mutant_epochs_count_up() {
    found(Rules {
        first: |revision, _| revision.next_epoch(),
        by_hand: |revision, _| revision.next_epoch(),
        ..Rules::SOUND
    });
}
