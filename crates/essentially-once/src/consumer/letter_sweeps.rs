//! Changes of many letters, in commits that stay small.

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;

use super::{
    dead_letters::list,
    letter_filter::LetterFilter,
    letter_verbs::{NOW, clear_mark, head_of, make_due},
    verbs::{Change, PATIENCE, change},
};
use crate::{
    Advance, ConsumerId, Error, Offset, OffsetStore, Operator, Position,
    consumer::OperatorAction,
    letters::{DeadLetter, DeadLetters},
};

/// For how long many letters are changed at once, before fewer are tried.
const PATIENCE_FOR_MANY: Duration = Duration::from_millis(300);

/// How many letters are read at once.
const PAGE: usize = 100;

/// The most letters that one commit changes, but for those of one page.
const AT_ONCE: usize = 500;

/// From how many bytes on no further page is added to what one commit changes.
const BYTES_AT_ONCE: usize = 1024 * 1024;

/// A change of the letters that it selects.
#[async_trait]
pub(super) trait Sweep<Tx>: Sync {
    /// Keeps the letters of a page that are to change.
    fn select(&mut self, page: &mut Vec<DeadLetter>);

    /// Puts the selected letters of some pages into the order in which to change them. `last` is
    /// the last letter of the last page.
    fn arrange(&mut self, letters: &mut [DeadLetter], last: Offset) {
        let _ = (letters, last);
    }

    /// Stages the change of some of these letters, and says what was done; `None` if nothing is
    /// left to change.
    async fn stage(
        &self,
        tx: &mut Tx,
        letters: &[DeadLetter],
        advance: &mut Advance,
    ) -> Result<Option<OperatorAction>, Error>;
}

/// Goes through all letters, and commits the changes of some pages at once, or of fewer letters if
/// that fails. Returns the number of letters changed.
pub(super) async fn sweep<S>(
    consumer: &ConsumerId,
    store: &S,
    mut sweep: impl Sweep<S::Tx>,
    by: &Operator,
) -> Result<u64, Error>
where
    S: OffsetStore,
    S::Tx: DeadLetters,
{
    let (mut after, mut total, mut at_once) = (None, 0, AT_ONCE);
    while let Some((selected, last)) = selected(consumer, store, &mut sweep, after).await? {
        after = Some(last);
        let mut left = &selected[..];
        while !left.is_empty() {
            let (letters, others) = left.split_at(at_once.min(left.len()));
            let patience = if letters.len() > 1 { PATIENCE_FOR_MANY } else { PATIENCE };
            let part = Part {
                sweep: &sweep,
                letters,
                continues: total > 0,
            };
            match change(consumer, store, &part, by, patience).await {
                // A busy instance commits while this one still looks at the letters. Or they are
                // too large for one transaction.
                Err(Error::Fenced { .. } | Error::TooLarge { .. }) if letters.len() > 1 => at_once = letters.len() / 2,
                changed => {
                    if let Some(OperatorAction::Retry { letters, .. } | OperatorAction::Discard { letters, .. }) =
                        changed?
                    {
                        total += letters;
                    }
                    left = others;
                }
            }
        }
        // The instance may be less busy by now.
        at_once = AT_ONCE.min(2 * at_once);
    }
    Ok(total)
}

/// Finds out which letters a sweep would change, without changing them.
pub(super) async fn plan<S>(
    consumer: &ConsumerId,
    store: &S,
    mut sweep: impl Sweep<S::Tx>,
) -> Result<HashMap<Offset, u64>, Error>
where
    S: OffsetStore,
    S::Tx: DeadLetters,
{
    let (mut after, mut versions) = (None, HashMap::new());
    loop {
        let mut page = list(consumer, store, after, PAGE).await?;
        let Some(last) = page.last() else { return Ok(versions) };
        after = Some(last.record.offset);
        sweep.select(&mut page);
        versions.extend(page.iter().map(|letter| (letter.record.offset, letter.version)));
    }
}

/// The letters to change on the next pages, and the last letter of these pages; `None` after the
/// last page.
async fn selected<S>(
    consumer: &ConsumerId,
    store: &S,
    sweep: &mut impl Sweep<S::Tx>,
    after: Option<Offset>,
) -> Result<Option<(Vec<DeadLetter>, Offset)>, Error>
where
    S: OffsetStore,
    S::Tx: DeadLetters,
{
    let (mut selected, mut bytes, mut last) = (Vec::new(), 0, after);
    while selected.len() + PAGE <= AT_ONCE && bytes < BYTES_AT_ONCE {
        let mut page = list(consumer, store, last, PAGE).await?;
        let Some(letter) = page.last() else { break };
        last = Some(letter.record.offset);
        sweep.select(&mut page);
        bytes += page.iter().map(DeadLetter::size).sum::<usize>();
        selected.append(&mut page);
    }
    match last {
        Some(end) if last != after => {
            sweep.arrange(&mut selected, end);
            Ok(Some((selected, end)))
        }
        _ => Ok(None),
    }
}

/// What one commit changes.
struct Part<'a, W> {
    sweep: &'a W,
    letters: &'a [DeadLetter],
    continues: bool,
}

#[async_trait]
impl<Tx: DeadLetters, W: Sweep<Tx>> Change<Tx> for Part<'_, W> {
    fn continues(&self) -> bool {
        self.continues
    }

    async fn stage(&self, tx: &mut Tx, _: &Position, advance: &mut Advance) -> Result<Option<OperatorAction>, Error> {
        self.sweep.stage(tx, self.letters, advance).await
    }
}

/// Makes the letters due now that come first for their key.
pub(super) struct RetryAll<'a> {
    pub(super) filter: &'a LetterFilter,
    /// The keys of the letters so far.
    pub(super) seen: HashSet<Bytes>,
}

#[async_trait]
impl<Tx: DeadLetters> Sweep<Tx> for RetryAll<'_> {
    fn select(&mut self, page: &mut Vec<DeadLetter>) {
        page.retain(|letter| {
            let is_first = letter.key().is_none_or(|key| self.seen.insert(key.clone()));
            is_first && letter.due != Some(NOW) && !letter.unreadable && self.filter.matches(letter)
        });
    }

    async fn stage(
        &self,
        tx: &mut Tx,
        letters: &[DeadLetter],
        advance: &mut Advance,
    ) -> Result<Option<OperatorAction>, Error> {
        let mut due: Option<(Offset, u64)> = None;
        for seen in letters {
            let offset = seen.record.offset;
            // The consumer may have handled it since.
            let Some(letter) = tx.letter(offset).await? else {
                continue;
            };
            let head = head_of(tx, &letter).await?;
            if !letter.unreadable && head.is_none_or(|head| head.record.offset == offset) {
                make_due(tx, letter).await?;
                clear_mark(advance, offset);
                due = Some(due.map_or((offset, 1), |(first, letters)| (first, letters + 1)));
            }
        }
        Ok(due.map(|(first, letters)| OperatorAction::Retry { first, letters }))
    }
}

/// Removes the letters.
pub(super) struct DiscardAll<'a> {
    pub(super) filter: &'a LetterFilter,
    /// The last letter of the pages in hand.
    pub(super) pages_end: Offset,
}

#[async_trait]
impl<Tx: DeadLetters> Sweep<Tx> for DiscardAll<'_> {
    fn select(&mut self, page: &mut Vec<DeadLetter>) {
        page.retain(|letter| self.filter.matches(letter));
    }

    /// The last letter comes first, so that no commit makes a letter due that a later commit of the
    /// same pages removes.
    fn arrange(&mut self, letters: &mut [DeadLetter], last: Offset) {
        self.pages_end = last;
        letters.reverse();
    }

    async fn stage(
        &self,
        tx: &mut Tx,
        letters: &[DeadLetter],
        _: &mut Advance,
    ) -> Result<Option<OperatorAction>, Error> {
        let mut heads: HashMap<&Bytes, DeadLetter> = HashMap::new();
        let mut removed = HashSet::new();
        for seen in letters {
            let offset = seen.record.offset;
            if tx.letter(offset).await?.as_ref() != Some(seen) {
                continue;
            }
            if let Some(key) = seen.key()
                && !heads.contains_key(key)
                && let Some(head) = tx.head(key).await?
            {
                heads.insert(key, head);
            }
            if tx.remove(offset).await? {
                removed.insert(offset);
            }
        }
        for (key, head) in heads {
            if removed.contains(&head.record.offset)
                && let Some(mut next) = tx.head(key).await?
                && !next.unreadable
            {
                // A later page removes this letter. Until then it is due when the first one was:
                // the consumer does not try it earlier, and tries it if this call ends too soon.
                let is_to_go = next.record.offset > self.pages_end && self.filter.matches(&next);
                let due = if is_to_go { head.due } else { Some(NOW) };
                if next.due != due {
                    next.set_due(due);
                    tx.park(&next).await?;
                }
            }
        }
        let first = removed.iter().min().copied();
        let letters = removed.len() as u64;
        Ok(first.map(|first| OperatorAction::Discard { first, letters }))
    }
}
