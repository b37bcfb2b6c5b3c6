//! The rule that decides which entries of a changelog apply. The safety of this store rests on it.
//!
//! Every reader sees the entries in the same order, and decides on each by the entries before it
//! and nothing else. So all readers decide alike, whether they start at the first entry or at a
//! snapshot, and the first entry of a revision wins.

use essentially_once::{
    Offset,
    backend::{Journal, LogId, Note, Owner, Revision},
};

/// A number that a writer draws for each of its entries, to recognize it.
pub(super) type Token = u128;

/// An entry that moves a position.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(super) struct Commit<C> {
    pub(super) token: Token,
    /// The token of the entry that it builds on; 0 for the first.
    pub(super) parent: Token,
    /// The revision that it builds on.
    pub(super) expected: Revision,
    /// The revision that it makes.
    pub(super) revision: Revision,
    pub(super) log: LogId,
    pub(super) next: Offset,
    pub(super) owner: Option<Owner>,
    pub(super) note: Note,
    /// Replaces the journal; `None` keeps it.
    pub(super) journal: Option<Journal>,
    pub(super) change: C,
}

impl<C> Commit<C> {
    /// The same commit with another change. Also returns the old change.
    pub(super) fn replace<D>(self, change: D) -> (Commit<D>, C) {
        let commit = Commit {
            token: self.token,
            parent: self.parent,
            expected: self.expected,
            revision: self.revision,
            log: self.log,
            next: self.next,
            owner: self.owner,
            note: self.note,
            journal: self.journal,
            change,
        };
        (commit, self.change)
    }
}

/// What a commit does to the state. Generic, so that the model checker can run the rule on a small
/// state.
pub(super) trait Change {
    type State;

    /// Applies the entry at `offset` of the changelog.
    fn apply(self, offset: u64, state: &mut Self::State);
}

/// For readers that need to know which entries apply, but not the state that they make.
impl Change for () {
    type State = ();

    fn apply(self, _: u64, (): &mut ()) {}
}

/// What became of an entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Verdict {
    /// It came first.
    Applied,
    /// Another entry made that revision before it.
    Late,
    /// The position belongs to another log.
    OtherLog,
}

/// An entry builds on one that is missing: the changelog lost some.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the entry that makes revision {found} builds on one that is missing; the position has revision {current}")]
pub(super) struct Missing {
    current: Revision,
    found: Revision,
}

/// All entries up to one offset, folded.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
pub(super) struct Fold<S> {
    /// The offset in the changelog to continue at.
    pub(super) offset: u64,
    /// The revision of the last applied commit.
    pub(super) revision: Revision,
    /// The token of the last applied commit.
    pub(super) token: Token,
    /// The position; `None` before the first commit.
    pub(super) place: Option<(LogId, Offset)>,
    pub(super) owner: Option<Owner>,
    /// One past the offset of the owner's last beat since that commit; 0 if there was none. Not in
    /// snapshots.
    pub(super) beats: u64,
    pub(super) note: Note,
    pub(super) journal: Journal,
    pub(super) state: S,
}

/// A hint of a position's owner, encoded in the token of a mark.
///
/// Every version reads and skips marks, so that processes of all versions run side by side. Those
/// before 0.2 do not see the hints.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Hint {
    /// The owner lives.
    Beat,
    /// The owner gives the position up.
    Release,
}

impl Hint {
    /// The owner's number for a beat, and its complement for a release.
    pub(super) fn token(self, owner: Owner) -> Token {
        match self {
            Self::Beat => owner.get(),
            Self::Release => !owner.get(),
        }
    }
}

/// The upper half of the token of a [wish](wish_token).
const WISH: u64 = u64::from_be_bytes(*b"let me  ");

/// A token for the mark of a handle that is about to commit, and whose last commit came too late. A
/// handle that commits all the time waits a little when it reads such a mark. No rule depends on
/// it.
pub(super) fn wish_token(random: Token) -> Token {
    Token::from(WISH) << 64 | random & Token::from(u64::MAX)
}

pub(super) fn is_wish(token: Token) -> bool {
    token >> 64 == Token::from(WISH)
}

impl<S> Fold<S> {
    /// Judges the entry at that offset, and applies it if it won.
    pub(super) fn apply<C: Change<State = S>>(&mut self, offset: u64, commit: Commit<C>) -> Result<Verdict, Missing> {
        let verdict = self.judge(&commit)?;
        self.offset = offset + 1;
        if verdict == Verdict::Applied {
            self.revision = commit.revision;
            self.token = commit.token;
            self.place = Some((self.known_log(commit.log), commit.next));
            (self.owner, self.note, self.beats) = (commit.owner, commit.note, 0);
            if let Some(journal) = commit.journal {
                self.journal = journal;
            }
            commit.change.apply(offset, &mut self.state);
        }
        Ok(verdict)
    }

    /// Skips a message that does not concern the position.
    pub(super) fn pass(&mut self, offset: u64) {
        self.offset = offset + 1;
    }

    /// Skips a mark. It may be a [`Hint`] of the owner; those of others have no effect.
    pub(super) fn mark(&mut self, offset: u64, token: Token) {
        self.pass(offset);
        let Some(owner) = self.owner else { return };
        if token == Hint::Beat.token(owner) {
            self.beats = self.offset;
        } else if token == Hint::Release.token(owner) {
            (self.owner, self.beats) = (None, 0);
        }
    }

    fn judge<C>(&self, commit: &Commit<C>) -> Result<Verdict, Missing> {
        if commit.expected < self.revision || commit.revision <= self.revision {
            return Ok(Verdict::Late);
        }
        // The writer had read the entry before it.
        if commit.expected > self.revision || commit.parent != self.token {
            return Err(Missing {
                current: self.revision,
                found: commit.revision,
            });
        }
        Ok(if self.is_same_log(&commit.log) {
            Verdict::Applied
        } else {
            Verdict::OtherLog
        })
    }

    /// The same fold without the state.
    pub(super) fn without_state(&self) -> Fold<()> {
        Fold {
            offset: self.offset,
            revision: self.revision,
            token: self.token,
            place: self.place.clone(),
            owner: self.owner,
            beats: self.beats,
            note: self.note.clone(),
            journal: self.journal.clone(),
            state: (),
        }
    }

    fn is_same_log(&self, log: &LogId) -> bool {
        self.place.as_ref().is_none_or(|(stored, _)| stored.is_same_log(log))
    }

    /// A known incarnation stays.
    fn known_log(&mut self, log: LogId) -> LogId {
        match self.place.take() {
            Some((stored, _)) if log.incarnation().is_none() => stored,
            _ => log,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Push(u8);

    impl Change for Push {
        type State = Vec<u8>;

        fn apply(self, _: u64, state: &mut Vec<u8>) {
            state.push(self.0);
        }
    }

    fn log(incarnation: Option<&str>) -> LogId {
        let log = LogId::new("orders").expect("name");
        match incarnation {
            Some(incarnation) => log.with_incarnation(incarnation).expect("name"),
            None => log,
        }
    }

    fn entry(token: Token, parent: Token, count: u64, log: LogId) -> Commit<Push> {
        let change = Push(token as u8);
        Commit {
            token,
            parent,
            expected: Revision::new(0, count - 1),
            revision: Revision::new(0, count),
            log,
            next: Offset::ZERO,
            owner: Some(Owner::new(token)),
            note: Note::default(),
            journal: None,
            change,
        }
    }

    #[test]
    fn the_first_entry_of_a_revision_applies_and_no_other() {
        let mut fold = Fold::default();
        for (offset, token, parent, revision, verdict) in [
            (0, 1, 0, 1, Verdict::Applied),
            (1, 2, 0, 1, Verdict::Late),
            (5, 3, 1, 2, Verdict::Applied),
            (6, 3, 1, 2, Verdict::Late),
        ] {
            assert_eq!(
                fold.apply(offset, entry(token, parent, revision, log(None))),
                Ok(verdict)
            );
            assert_eq!(fold.offset, offset + 1);
        }
        assert_eq!(
            (fold.state, fold.revision, fold.token),
            (vec![1, 3], Revision::new(0, 2), 3)
        );
        assert_eq!(fold.owner, Some(Owner::new(3)));
    }

    #[test]
    fn an_entry_of_an_epoch_that_is_over_is_late() {
        let mut fold = Fold::default();
        let first = Revision::NONE.next_epoch();
        for (token, parent, expected, revision, verdict) in [
            (1, 0, Revision::NONE, first, Verdict::Applied),
            (2, 1, first, first.next_epoch(), Verdict::Applied),
            (3, 1, first, first.next_count(), Verdict::Late),
            (4, 0, Revision::NONE, Revision::new(0, 1), Verdict::Late),
        ] {
            let mut commit = entry(token, parent, 1, log(None));
            (commit.expected, commit.revision) = (expected, revision);
            assert_eq!(fold.apply(token as u64, commit), Ok(verdict), "entry {token}");
        }
    }

    #[test]
    fn only_the_owners_hints_count_and_they_touch_nothing_else() {
        let (owner, other) = (Owner::new(1), Owner::new(7));
        let mut fold = Fold::default();
        fold.mark(0, Hint::Beat.token(owner));
        assert_eq!((fold.beats, fold.owner), (0, None), "there is no position");
        assert_eq!(fold.apply(1, entry(1, 0, 1, log(None))), Ok(Verdict::Applied));
        let committed = fold.clone();
        for token in [Hint::Beat.token(other), Hint::Release.token(other), 99] {
            fold.mark(2, token);
            assert_eq!(
                fold,
                Fold {
                    offset: 3,
                    ..committed.clone()
                }
            );
        }
        for beat in 3..6 {
            fold.mark(beat, Hint::Beat.token(owner));
            let beaten = Fold {
                offset: beat + 1,
                beats: beat + 1,
                ..committed.clone()
            };
            assert_eq!(fold, beaten);
        }
        fold.mark(6, Hint::Release.token(owner));
        let released = Fold {
            offset: 7,
            owner: None,
            ..committed
        };
        assert_eq!(fold, released);
        fold.mark(7, Hint::Beat.token(owner));
        assert_eq!((fold.beats, fold.owner), (0, None), "it was given up");
        assert_eq!(
            fold.apply(8, entry(2, 1, 2, log(None))),
            Ok(Verdict::Applied),
            "it fences nobody"
        );
        assert_eq!(fold.owner, Some(Owner::new(2)));
    }

    #[test]
    fn a_wish_is_a_mark_that_changes_nothing() {
        let token = wish_token(Token::MAX);
        assert!(is_wish(token) && !is_wish(Token::MAX) && !is_wish(7));
        assert_ne!(token, wish_token(7));
        let mut fold = Fold::default();
        assert_eq!(fold.apply(0, entry(1, 0, 1, log(None))), Ok(Verdict::Applied));
        let committed = fold.clone();
        fold.mark(1, token);
        assert_eq!(fold, Fold { offset: 2, ..committed });
    }

    #[test]
    fn only_a_commit_that_applies_replaces_the_journal() {
        use essentially_once::consumer::{Operator, OperatorAction};

        let journal = |name| Journal::default().with(&Operator::new(name), OperatorAction::Pause);
        let mut fold = Fold::default();
        for (token, parent, revision, given, expected) in [
            (1, 0, 1, None, Journal::default()),
            (2, 1, 2, Some("ann"), journal("ann")),
            (3, 2, 3, None, journal("ann")),
            (4, 1, 2, Some("late"), journal("ann")),
            (5, 3, 4, Some("bob"), journal("bob")),
        ] {
            let mut commit = entry(token, parent, revision, log(None));
            commit.journal = given.map(journal);
            fold.apply(token as u64, commit).expect("nothing is missing");
            let who = |journal: &Journal| journal.paused().map(|entry| entry.by.clone());
            assert_eq!(who(&fold.journal), who(&expected), "entry {token}");
        }
    }

    #[test]
    fn a_missing_entry_is_seen() {
        let mut fold = Fold::default();
        assert!(
            fold.apply(0, entry(2, 1, 2, log(None))).is_err(),
            "the first is missing"
        );
        assert!(
            fold.apply(0, entry(2, 1, 1, log(None))).is_err(),
            "another one was the first"
        );
        assert!(fold.apply(0, entry(2, 1, u64::MAX, log(None))).is_err());
        assert_eq!(fold, Fold::default());
    }

    #[test]
    fn an_entry_of_another_log_does_not_apply_and_a_known_incarnation_stays() {
        let mut fold = Fold::default();
        let mut apply = |token, parent, revision, incarnation| {
            fold.apply(token as u64, entry(token, parent, revision, log(incarnation)))
                .expect("nothing is missing")
        };
        assert_eq!(apply(1, 0, 1, Some("a")), Verdict::Applied);
        assert_eq!(apply(2, 1, 2, Some("b")), Verdict::OtherLog);
        assert_eq!(apply(3, 1, 2, None), Verdict::Applied);
        assert_eq!(apply(4, 3, 3, Some("b")), Verdict::OtherLog);
        assert_eq!(fold.place.expect("a position").0.incarnation(), Some("a"));
        assert_eq!(fold.state, [1, 3]);
    }
}
