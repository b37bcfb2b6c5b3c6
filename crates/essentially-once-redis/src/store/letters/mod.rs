//! Dead letters: staged in memory, read through an overlay, and written by the commit.
//!
//! The hash of letters has a field for each offset. Three sorted sets are its indices: by offset,
//! by key, and by the time when a letter is due. A commit changes all four in one step.

mod codec;
mod staged;

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Bound,
};

use async_trait::async_trait;
use bytes::Bytes;
use essentially_once::{
    Error, Offset,
    backend::{DeadLetter, DeadLetters, check_size},
};
use redis::{Cmd, FromRedisValue, RedisResult, Value};

pub(crate) use self::staged::Letters;
use self::staged::{Change, Entry, Staged, due_order};
use crate::{
    error::{printable, read_failed},
    store::tx::RedisTx,
};

const LETTER: &str = include_str!("letter.lua");
const HEAD: &str = include_str!("head.lua");
const FIRST_DUE: &str = include_str!("first_due.lua");
const LIST: &str = include_str!("list.lua");
const COUNTS: &str = include_str!("counts.lua");

/// How many letters or keys one request returns.
const PAGE: usize = 1_000;

#[async_trait]
impl DeadLetters for RedisTx {
    async fn park(&mut self, letter: &DeadLetter) -> Result<(), Error> {
        let result = self.stage_letter(letter).await;
        self.noted(result)
    }

    async fn remove(&mut self, offset: Offset) -> Result<bool, Error> {
        let result = self.stage_removal(offset).await;
        self.noted(result)
    }

    async fn remove_from(&mut self, offset: Offset) -> Result<u64, Error> {
        let result = self.stage_removal_from(offset).await;
        self.noted(result)
    }

    async fn letter(&mut self, offset: Offset) -> Result<Option<DeadLetter>, Error> {
        let result = self.find_letter(offset).await;
        self.noted(result)
    }

    async fn head(&mut self, key: &[u8]) -> Result<Option<DeadLetter>, Error> {
        let result = self.find_head(key).await;
        self.noted(result)
    }

    async fn first_due(&mut self) -> Result<Option<DeadLetter>, Error> {
        let result = self.find_first_due().await;
        self.noted(result)
    }

    async fn list(&mut self, after: Option<Offset>, limit: usize) -> Result<Vec<DeadLetter>, Error> {
        let result = self.find_list(after, limit).await;
        self.noted(result)
    }

    async fn counts(&mut self, after: Option<&[u8]>, limit: usize) -> Result<Vec<(Bytes, u64)>, Error> {
        let result = self.find_counts(after, limit).await;
        self.noted(result)
    }

    async fn total(&mut self) -> Result<u64, Error> {
        let result = self.stored_count().await;
        let stored = self.noted(result)?;
        let changes = self.letters.staged.values();
        let change = |change: &Change| i64::from(change.after.is_some()) - i64::from(change.before.is_some());
        Ok(stored.saturating_add_signed(changes.map(change).sum()))
    }
}

impl RedisTx {
    fn letters_action(&self) -> String {
        self.action(&format!("use dead letters in {}", self.keys.letters.values))
    }

    /// Keeps the error of a read, so that the transaction cannot commit.
    fn noted<T>(&self, result: Result<T, Error>) -> Result<T, Error> {
        result.map_err(|error| match error {
            Error::TooLarge { .. } => error,
            error => self.remember(error),
        })
    }

    /// Runs a reading command, unless no letters are stored. The first of these also asks for their
    /// number.
    async fn ask_letters<T: FromRedisValue>(&mut self, command: &Cmd) -> Result<Option<T>, Error> {
        let answer = match self.letters.stored {
            Some(0) => return Ok(None),
            Some(_) => self.ask(command, || self.letters_action()).await?,
            None => {
                let mut pipeline = redis::pipe();
                pipeline
                    .ignore_errors()
                    .hlen(&self.keys.letters.values)
                    .zcard(&self.keys.letters.by_offset)
                    .add_command(command.clone());
                let mut connection = self.link.connection().await?;
                let answers: RedisResult<(RedisResult<u64>, RedisResult<u64>, RedisResult<Value>)> =
                    pipeline.query_async(&mut connection).await;
                let (values, places, answer) = answers
                    .and_then(|(values, places, answer)| Ok((values?, places?, answer?)))
                    .map_err(|error| {
                        self.link.check(&error);
                        read_failed(self.letters_action(), error)
                    })?;
                self.letters.stored = Some(values.max(places));
                answer
            }
        };
        let answer = redis::from_redis_value(answer);
        answer
            .map(Some)
            .map_err(|error| Error::failed(self.letters_action(), error))
    }

    async fn stored_count(&mut self) -> Result<u64, Error> {
        if let Some(stored) = self.letters.stored {
            return Ok(stored);
        }
        let mut command = redis::cmd("ZCARD");
        command.arg(&self.keys.letters.by_offset);
        let places: Option<u64> = self.ask_letters(&command).await?;
        Ok(self.letters.stored.or(places).unwrap_or_default())
    }

    fn unreadable(&self, what: &[u8], why: impl std::fmt::Display) -> Error {
        let what = printable(what);
        Error::failed(self.letters_action(), format!("{what:?} cannot be read: {why}"))
    }

    /// The stored letters of a reply: field, value, field, value.
    async fn decoded(&mut self, reply: Vec<Option<Vec<u8>>>) -> Result<Vec<DeadLetter>, Error> {
        let mut letters = Vec::with_capacity(reply.len() / 2);
        let mut parts = reply.into_iter();
        while let (Some(Some(field)), Some(value)) = (parts.next(), parts.next()) {
            let offset = codec::parse_field(&field).ok_or_else(|| self.unreadable(&field, "it is not an offset"))?;
            let stored = value.clone().unwrap_or_default();
            let decoded = value
                .ok_or_else(|| "the indices name it, but its value is missing".to_owned())
                .and_then(|value| codec::decode(offset, value));
            letters.push(match decoded {
                Ok(letter) => {
                    self.letters.see(&letter);
                    letter
                }
                Err(why) => {
                    let key = self.stored_entry(offset).await?.and_then(|entry| entry.key);
                    // It exists, even if the index by offset leaves it out.
                    self.letters.seen.insert(offset, Some(Entry { key: key.clone() }));
                    DeadLetter::damaged(offset, key, &format!("its value cannot be read: {why}"), &stored)
                }
            });
        }
        Ok(letters)
    }

    fn script(source: &str, keys: &[&str]) -> Cmd {
        let mut command = redis::cmd("EVAL");
        command.arg(source).arg(keys.len()).arg(keys);
        command
    }

    /// What the indices hold of the stored letter at an offset.
    async fn stored_entry(&mut self, offset: Offset) -> Result<Option<Entry>, Error> {
        if let Some(known) = self.letters.known(offset) {
            return Ok(known);
        }
        let [first, last] = codec::range_of(offset);
        let members = self.members(&first, &last, 1).await?;
        let entry = members.into_iter().next().map(|(_, entry)| entry);
        self.letters.seen.insert(offset, entry.clone());
        Ok(entry)
    }

    /// Members of the index by offset.
    async fn members(&mut self, first: &str, last: &str, limit: usize) -> Result<Vec<(Offset, Entry)>, Error> {
        let mut command = redis::cmd("ZRANGE");
        command.arg(&self.keys.letters.by_offset).arg(first).arg(last);
        command.arg(&["BYLEX", "LIMIT", "0"]).arg(limit);
        let members: Vec<Vec<u8>> = self.ask_letters(&command).await?.unwrap_or_default();
        members.iter().map(|member| self.member(member)).collect()
    }

    fn member(&self, member: &[u8]) -> Result<(Offset, Entry), Error> {
        let (offset, key) = codec::parse_member_by_offset(member)
            .ok_or_else(|| self.unreadable(member, "it is not an entry of the index by offset"))?;
        Ok((offset, Entry { key }))
    }

    async fn find_letter(&mut self, offset: Offset) -> Result<Option<DeadLetter>, Error> {
        match self.letters.staged.get(&offset) {
            Some(change) => Ok(change.letter().cloned()),
            None => self.stored_letter(offset).await,
        }
    }

    async fn stored_letter(&mut self, offset: Offset) -> Result<Option<DeadLetter>, Error> {
        if let Some(None) = self.letters.known(offset) {
            return Ok(None);
        }
        let (field, keys) = (codec::field(offset).into_bytes(), &self.keys.letters);
        let mut command = Self::script(LETTER, &[&keys.values, &keys.by_offset]);
        command.arg(&field).arg(&codec::range_of(offset));
        let found: (Option<Vec<u8>>, Option<Vec<u8>>) = self.ask_letters(&command).await?.unwrap_or_default();
        let (value, member) = found;
        let entry = member
            .map(|member| self.member(&member))
            .transpose()?
            .map(|(_, entry)| entry);
        if value.is_none() && entry.is_none() {
            self.letters.seen.insert(offset, None);
            return Ok(None);
        }
        if entry.is_some() {
            self.letters.seen.insert(offset, entry);
        }
        let letters = self.decoded(vec![Some(field), value]).await?;
        Ok(letters.into_iter().next())
    }

    /// The first stored letter of a key from an offset on.
    async fn stored_head(&mut self, key: &[u8], from: Offset) -> Result<Option<DeadLetter>, Error> {
        let prefix = codec::key_prefix(key);
        let keys = &self.keys.letters;
        let mut command = Self::script(HEAD, &[&keys.values, &keys.by_key]);
        command.arg([b"[", &codec::member_by_key(from, key)[..]].concat());
        // Offsets consist of digits, and this is the character after 9.
        command.arg([b"(", &prefix[..], b":"].concat());
        let found = self.ask_letters(&command).await?.unwrap_or_default();
        Ok(self.decoded(found).await?.into_iter().next())
    }

    async fn find_head(&mut self, key: &[u8]) -> Result<Option<DeadLetter>, Error> {
        let staged = self.letters.staged_head(key).cloned();
        let mut from = self.letters.heads.get(key).copied().unwrap_or(Offset::ZERO);
        let stored = loop {
            while self.letters.staged.contains_key(&from) && from != Offset::MAX {
                from = from.successor();
            }
            if staged.as_ref().is_some_and(|staged| staged.record.offset < from) {
                break None;
            }
            let Some(stored) = self.stored_head(key, from).await? else {
                from = Offset::MAX;
                break None;
            };
            from = stored.record.offset;
            if !self.letters.staged.contains_key(&from) {
                break Some(stored);
            }
            if from == Offset::MAX {
                break None;
            }
        };
        self.letters.heads.insert(Bytes::copy_from_slice(key), from);
        Ok(staged
            .into_iter()
            .chain(stored)
            .min_by_key(|letter| letter.record.offset))
    }

    async fn find_first_due(&mut self) -> Result<Option<DeadLetter>, Error> {
        // Almost always, the first one can be read.
        let (mut from, mut limit) = (0_u64, 1);
        let stored = loop {
            let keys = &self.keys.letters;
            let mut command = Self::script(FIRST_DUE, &[&keys.values, &keys.due]);
            command.arg(from).arg(limit);
            for (offset, _) in self.letters.staged.iter().filter(|(_, change)| change.before.is_some()) {
                command.arg(codec::field(*offset));
            }
            let found: (u64, Vec<Option<Vec<u8>>>) = self.ask_letters(&command).await?.unwrap_or_default();
            if found.1.is_empty() {
                break None;
            }
            if let Some(letter) = self.first_readable(found.1)? {
                break Some(letter);
            }
            (from, limit) = (found.0, PAGE);
        };
        let staged = self.letters.staged.values().filter_map(Change::letter);
        let staged = staged
            .filter(|letter| letter.due.is_some())
            .min_by_key(|letter| due_order(letter));
        Ok(stored.into_iter().chain(staged.cloned()).min_by_key(due_order))
    }

    fn first_readable(&mut self, reply: Vec<Option<Vec<u8>>>) -> Result<Option<DeadLetter>, Error> {
        let mut parts = reply.into_iter();
        while let (Some(Some(field)), Some(value)) = (parts.next(), parts.next()) {
            let offset = codec::parse_field(&field).ok_or_else(|| self.unreadable(&field, "it is not an offset"))?;
            if let Some(Ok(letter)) = value.map(|value| codec::decode(offset, value)) {
                self.letters.see(&letter);
                return Ok(Some(letter));
            }
        }
        Ok(None)
    }

    async fn find_list(&mut self, after: Option<Offset>, limit: usize) -> Result<Vec<DeadLetter>, Error> {
        let mut found = Vec::new();
        let mut after = after;
        while found.len() < limit {
            let keys = &self.keys.letters;
            let mut command = Self::script(LIST, &[&keys.values, &keys.by_offset]);
            command.arg(match after {
                // No key is in front of this character.
                Some(after) => format!("[{}!", codec::field(after)),
                None => "-".into(),
            });
            command.arg((limit - found.len()).min(PAGE));
            let page = self.ask_letters(&command).await?.unwrap_or_default();
            let page = self.decoded(page).await?;
            // The page shows the stored letters up to its last one, or all of them if it is empty.
            let last = page.last().map(|letter| letter.record.offset);
            let range = (
                after.map_or(Bound::Unbounded, Bound::Excluded),
                last.map_or(Bound::Unbounded, Bound::Included),
            );
            let mut merged: BTreeMap<Offset, DeadLetter> =
                page.into_iter().map(|letter| (letter.record.offset, letter)).collect();
            for (offset, change) in self.letters.staged.range(range) {
                match change.letter() {
                    Some(letter) => merged.insert(*offset, letter.clone()),
                    None => merged.remove(offset),
                };
            }
            found.extend(merged.into_values().take(limit - found.len()));
            match last {
                Some(last) => after = Some(last),
                None => break,
            }
        }
        Ok(found)
    }

    async fn find_counts(&mut self, after: Option<&[u8]>, limit: usize) -> Result<Vec<(Bytes, u64)>, Error> {
        let changed = self.letters.changed_counts();
        let mut counts = Vec::new();
        let mut after = after.map(Bytes::copy_from_slice);
        while counts.len() < limit {
            let mut command = Self::script(COUNTS, &[&self.keys.letters.by_key]);
            command.arg(match &after {
                Some(after) => [b"[", &codec::key_prefix(after)[..], b":"].concat(),
                None => b"-".to_vec(),
            });
            command.arg((limit - counts.len()).min(PAGE));
            let page: Vec<(Vec<u8>, u64)> = self.ask_letters(&command).await?.unwrap_or_default();
            let mut merged = BTreeMap::new();
            for (prefix, count) in page {
                let key = codec::parse_key_prefix(&prefix);
                let key = key.ok_or_else(|| self.unreadable(&prefix, "it is not an entry of the index by key"))?;
                merged.insert(key, count);
            }
            // The page shows the stored letters up to its last key, or all of them if it is empty.
            let last = merged.last_key_value().map(|(key, _)| key.clone());
            let range = (
                after.as_ref().map_or(Bound::Unbounded, Bound::Excluded),
                last.as_ref().map_or(Bound::Unbounded, Bound::Included),
            );
            for (key, by) in changed.range::<Bytes, _>(range) {
                let count = merged.entry(key.clone()).or_default();
                *count = count.saturating_add_signed(*by);
            }
            merged.retain(|_, count| *count > 0);
            counts.extend(merged.into_iter().take(limit - counts.len()));
            match last {
                Some(last) => after = Some(last),
                None => break,
            }
        }
        Ok(counts)
    }

    async fn stage_removal_from(&mut self, from: Offset) -> Result<u64, Error> {
        let mut all: BTreeSet<Offset> = self.letters.staged.range(from..).map(|(offset, _)| *offset).collect();
        let mut first = format!("[{}", codec::field(from));
        loop {
            let page = self.members(&first, "+", PAGE).await?;
            let Some((last, _)) = page.last() else { break };
            first = format!("[{}!", codec::field(*last));
            for (offset, entry) in page {
                all.insert(offset);
                self.letters.seen.insert(offset, Some(entry));
            }
        }
        let mut removed = 0;
        for offset in all {
            removed += u64::from(self.stage_removal(offset).await?);
        }
        Ok(removed)
    }

    async fn stage_removal(&mut self, offset: Offset) -> Result<bool, Error> {
        let before = self.stored_entry(offset).await?;
        let existed = match self.letters.staged.get(&offset) {
            Some(change) => change.after.is_some(),
            None => before.is_some(),
        };
        self.letters.set(offset, Change { before, after: None });
        Ok(existed)
    }

    async fn stage_letter(&mut self, letter: &DeadLetter) -> Result<(), Error> {
        let limit = self.link.server.options.record_limit + 2 * DeadLetter::REASON_LIMIT;
        let letter = codec::rounded(letter.clone());
        if let Err(too_large) = check_size("dead letter", letter.size(), limit) {
            // The limit may have been higher when it was parked, and its key must not wait for
            // that.
            let known = self.find_letter(letter.record.offset).await?;
            if !known.is_some_and(|known| known.has_record_of(&letter)) {
                return Err(too_large);
            }
        }
        let (offset, value) = (letter.record.offset, codec::encode(&letter));
        let member = letter.key().map_or(0, |key| codec::member_by_key(offset, key).len());
        let largest = value.len().max(member);
        let change = Change {
            before: self.stored_entry(offset).await?,
            after: Some(Staged { letter, value }),
        };
        self.check_room(change.size())?;
        self.link.check_value(largest)?;
        self.largest = self.largest.max(largest);
        self.letters.set(offset, change);
        Ok(())
    }
}
