//! The commit: one run of `commit.lua`, with its arguments and its replies.

use std::{
    collections::BTreeMap,
    sync::{Arc, LazyLock},
};

use bytes::Bytes;
use essentially_once::{
    ConsumerId, Error,
    backend::{Advance, LogId},
};
use redis::{Arg, Cmd, RedisResult, Script, Value};

use crate::{
    connection::{Link, SharedConnection},
    error::{partially_applied, printable, refused, write_failed},
    options::MinReplicas,
    store::{
        keys::{Keys, LetterKeys},
        layout::{self, Fields, Items, Layout, List},
        letters::Letters,
        native::{Staged, Use},
        outbox::Outgoing,
    },
};

static SOURCE: LazyLock<String> = LazyLock::new(|| layout::prologue() + include_str!("commit.lua"));
static SCRIPT: LazyLock<Script> = LazyLock::new(|| Script::new(&SOURCE));

/// The most counters that one command reads.
const COUNTERS: usize = 1_000;

/// State to set (`Some`) or delete.
pub(crate) type State = BTreeMap<Vec<u8>, Option<Bytes>>;

/// The changes to apply in one step.
pub(crate) struct Commit {
    pub(crate) link: Arc<Link>,
    pub(crate) consumer: ConsumerId,
    pub(crate) keys: Arc<Keys>,
    pub(crate) state: State,
    pub(crate) staged: Staged,
    pub(crate) letters: Letters,
    pub(crate) outgoing: Outgoing,
    /// The size of the largest key, value or argument.
    pub(crate) largest: usize,
    pub(crate) advance: Advance,
}

impl Commit {
    pub(crate) async fn run(self) -> Result<(), Error> {
        let mut connection = self.link.connection().await?;
        // The limit was unknown when the values were staged without a connection.
        self.link.check_value(self.largest)?;
        let mut reply = self.send(&mut connection, "EVALSHA", SCRIPT.get_hash()).await;
        if matches!(&reply, Err(error) if error.code() == Some("NOSCRIPT")) {
            // After this reply the server has run nothing.
            reply = self.send(&mut connection, "EVAL", &SOURCE).await;
        }
        match reply {
            Ok((reply, replicas)) => {
                self.read(reply)?;
                self.check_replicas(replicas)
            }
            Err(error) => {
                self.link.check(&error);
                self.link.learn(&error, self.largest);
                Err(write_failed(self.action(), error))
            }
        }
    }

    /// Runs the script, and waits for replicas if `min_replicas` is set, in one round trip.
    async fn send(
        &self,
        connection: &mut SharedConnection,
        verb: &str,
        script: &str,
    ) -> RedisResult<(Value, Option<RedisResult<u32>>)> {
        let command = self.command(verb, script);
        let Some(min) = self.min_replicas() else {
            return Ok((command.query_async(connection).await?, None));
        };
        let mut pipeline = redis::pipe();
        pipeline.ignore_errors().add_command(command);
        min.wait(&mut pipeline);
        let (reply, replicas): (RedisResult<Value>, RedisResult<u32>) = pipeline.query_async(connection).await?;
        Ok((reply?, Some(replicas)))
    }

    fn min_replicas(&self) -> Option<MinReplicas> {
        self.link.server.options.min_replicas
    }

    fn command(&self, verb: &str, script: &str) -> Cmd {
        let Self {
            keys, staged, advance, ..
        } = self;
        let mut command = self.with_capacity(script);
        let letters = if self.letters.is_empty() { 0 } else { LetterKeys::COUNT };
        let keys_count = 3 + staged.keys.len() + letters + self.outgoing.keys().count();
        command.arg(verb).arg(script).arg(keys_count);
        command.arg(&keys.position).arg(&keys.windows).arg(&keys.state);
        for key in staged.keys.keys() {
            command.arg(&key[..]);
        }
        for key in &keys.letters.all()[..letters] {
            command.arg(key);
        }
        for key in self.outgoing.keys() {
            command.arg(key);
        }
        let owner = advance.owner.map(|owner| owner.to_string());
        // A new epoch, so that no commit in flight can follow a partially applied one.
        let partial_revision = advance.revision.next_epoch();
        let journal = advance.journal.as_ref();
        let journal = journal.map(|journal| [b"=", &journal.encode()[..]].concat());
        let mut layout = Layout::new(
            command,
            Fields {
                expected: advance.expected.to_string().as_bytes(),
                next_revision: advance.revision.to_string().as_bytes(),
                log_name: advance.log.name().as_bytes(),
                log_incarnation: advance.log.incarnation().unwrap_or_default().as_bytes(),
                offset: advance.next.to_string().as_bytes(),
                owner: owner.as_deref().unwrap_or_default().as_bytes(),
                note: &advance.note.encode(),
                journal: journal.as_deref().unwrap_or_default(),
                partial_revision: partial_revision.to_string().as_bytes(),
            },
        );
        self.lay_out_state(&mut layout);
        self.lay_out_windows(&mut layout);
        self.lay_out_checks(&mut layout);
        self.lay_out_commands(&mut layout);
        if !self.outgoing.is_empty() {
            layout.sends(|items| self.outgoing.lay_out(items));
        }
        layout.finish()
    }

    /// A command with room for about as much as it will hold.
    fn with_capacity(&self, script: &str) -> Cmd {
        let Self {
            state,
            staged,
            letters,
            outgoing,
            advance,
            ..
        } = self;
        let size = |(key, value): (&Vec<u8>, &Option<Bytes>)| key.len() + value.as_ref().map_or(0, Bytes::len);
        let bytes = state.iter().map(size).sum::<usize>();
        let (windows, keys) = (advance.windows.len() + advance.forgotten.len(), staged.keys.len());
        Cmd::with_capacity(
            40 + 2 * (state.len() + windows) + 4 * keys + staged.arguments + 12 * letters.len() + outgoing.arguments(),
            script.len()
                + bytes
                + staged.bytes
                + letters.bytes()
                + outgoing.bytes()
                + 256 * (4 + windows + keys)
                + 8 * staged.arguments,
        )
    }

    fn lay_out_state(&self, layout: &mut Layout) {
        layout.list(List::Puts, |items| {
            for (key, value) in &self.state {
                if let Some(value) = value {
                    items.push(&key[..]).push(&value[..]);
                }
            }
        });
        layout.list(List::Deletes, |items| {
            for (key, _) in self.state.iter().filter(|(_, value)| value.is_none()) {
                items.push(&key[..]);
            }
        });
    }

    fn lay_out_windows(&self, layout: &mut Layout) {
        layout.list(List::Windows, |items| {
            for (numbering, window) in &self.advance.windows {
                items.push(numbering.to_string()).push(&window.encode()[..]);
            }
        });
        layout.list(List::Forgotten, |items| {
            for numbering in &self.advance.forgotten {
                items.push(numbering.to_string());
            }
        });
    }

    fn lay_out_checks(&self, layout: &mut Layout) {
        layout.list(List::Types, |items| {
            for (probe, key) in self.types() {
                items.push(probe).push(key);
            }
        });
        layout.list(List::Numbers, |items| {
            for read in self.numbers() {
                items.push(read.len());
                for argument in read {
                    items.push(argument);
                }
            }
        });
    }

    fn lay_out_commands(&self, layout: &mut Layout) {
        let mut permissions = Vec::new();
        layout.list(List::Commands, |items| {
            if self.staged.commands.len() > 1 {
                let start = items.next();
                let natives = self.staged.permissions.iter();
                permissions.extend(natives.map(|(first, last)| (start + first, start + last)));
            }
            self.lay_out_natives(items);
            if !self.letters.is_empty() {
                self.lay_out_letters(items, &mut permissions);
            }
        });
        if !permissions.is_empty() {
            layout.list(List::Permissions, |items| {
                for (first, last) in permissions {
                    items.push(first).push(last);
                }
            });
        }
    }

    fn lay_out_natives(&self, items: &mut Items<'_>) {
        let mut commands = self.staged.commands.iter();
        for (length, count) in &self.staged.runs {
            items.push(*length).push(*count);
            for (native, sum) in commands.by_ref().take(*count) {
                for argument in native.args_iter().take(length - usize::from(sum.is_some())) {
                    match argument {
                        Arg::Simple(bytes) => items.push(bytes),
                        _ => items.push("0"),
                    };
                }
                if let Some(sum) = sum {
                    items.push(*sum);
                }
            }
        }
    }

    /// Letters are written by commands in the same list, so that a commit without letters is the
    /// same as if they did not exist.
    fn lay_out_letters(&self, items: &mut Items<'_>, permissions: &mut Vec<(usize, usize)>) {
        for write in self.letters.writes(&self.keys.letters) {
            for (number, arguments) in write.commands().enumerate() {
                let length = 2 + arguments.len();
                items.push(length).push(1);
                if number == 0 {
                    permissions.push((items.next(), items.next() + length - 1));
                }
                items.push(write.verb).push(write.key);
                for argument in arguments {
                    items.push(&argument[..]);
                }
            }
        }
    }

    /// The type that a key must have, as a command that only works on that type, and the key.
    fn types(&self) -> Vec<(&'static str, &[u8])> {
        // Reading the counters of a hash checks its type.
        let unread = self.checked_keys().filter(|(_, usage)| usage.counters.is_empty());
        let natives = unread.filter_map(|(key, usage)| Some((usage.probe?, &key[..])));
        let state = (!self.state.is_empty()).then_some(("HLEN", self.keys.state.as_bytes()));
        let windows = !(self.advance.windows.is_empty() && self.advance.forgotten.is_empty());
        let windows = windows.then_some(("HLEN", self.keys.windows.as_bytes()));
        let mut types: Vec<_> = natives.chain(state).chain(windows).collect();
        if !self.letters.is_empty() {
            types.extend(self.keys.letters.probes());
        }
        types
    }

    /// A single command needs no checks. It is the first write, so nothing was applied if it fails.
    fn checked_keys(&self) -> impl Iterator<Item = (&Vec<u8>, &Use)> {
        let checked = self.staged.commands.len() > 1;
        self.staged.keys.iter().filter(move |_| checked)
    }

    /// Commands that read the values that must be integers.
    fn numbers(&self) -> Vec<Vec<&[u8]>> {
        let (mut reads, mut values): (Vec<Vec<&[u8]>>, Vec<&[u8]>) = Default::default();
        for (key, usage) in self.checked_keys() {
            if usage.counter {
                values.push(key);
            }
            let fields: Vec<&[u8]> = usage.counters.keys().map(Vec::as_slice).collect();
            let begin: [&[u8]; 2] = [b"HMGET", key];
            reads.extend(fields.chunks(COUNTERS).map(|fields| [&begin, fields].concat()));
        }
        let begin: [&[u8]; 1] = [b"MGET"];
        reads.extend(values.chunks(COUNTERS).map(|keys| [&begin, keys].concat()));
        reads
    }

    /// The script replies 1, or the reason for a refusal.
    fn read(&self, reply: Value) -> Result<(), Error> {
        if reply == Value::Int(1) {
            return Ok(());
        }
        let parts: Vec<Vec<u8>> = redis::from_redis_value(reply).unwrap_or_default();
        let text = |at: usize| parts.get(at).map_or(String::new(), |part| printable(part));
        Err(match text(0).as_str() {
            "fenced" => Error::Fenced {
                consumer: self.consumer.clone(),
                expected: self.advance.expected,
            },
            "log" => Error::WrongLog {
                consumer: self.consumer.clone(),
                stored: LogId::from_parts(text(1), Some(&text(2)))
                    .map_err(|error| Error::failed(self.action(), error))?,
                given: self.advance.log.clone(),
            },
            "partial" => partially_applied(&self.consumer, text(1)),
            "position" => self.refused(&format!("HMGET {}", self.keys.position), &text(1)),
            "refused" => self.refused(&text(1), &text(2)),
            "number" => Error::failed(
                self.action(),
                format!(
                    "{:?} in {:?} is incremented, but its value is not an integer; nothing was applied",
                    text(1),
                    text(2)
                ),
            ),
            "outbox" => Error::failed(
                self.action(),
                format!(
                    "key {} does not hold the producer and the next number of an outbox; nothing was applied; delete the \
                     key, and the outbox gets a new producer",
                    text(1)
                ),
            ),
            _ => Error::indeterminate(self.action(), "the script sent an unexpected reply"),
        })
    }

    /// The error for a first write that the server refused, or for a later one that it would have
    /// refused.
    fn refused(&self, what: &str, why: &str) -> Error {
        refused(format!("{} ({what})", self.action()), why)
    }

    fn check_replicas(&self, replicas: Option<RedisResult<u32>>) -> Result<(), Error> {
        let (Some(min), Some(replicas)) = (self.min_replicas(), replicas) else {
            return Ok(());
        };
        let why = match replicas {
            Ok(replicas) if replicas >= min.replicas => return Ok(()),
            Ok(replicas) => format!(
                "the master applied it, but only {replicas} of {} replicas confirmed it within {:?}; a failover may lose it",
                min.replicas, min.timeout
            ),
            Err(error) => format!("the master applied it, but did not report how many replicas have it: {error}"),
        };
        Err(Error::indeterminate(self.action(), why))
    }

    fn action(&self) -> String {
        let consumer = &self.consumer;
        self.link
            .server
            .on(format!("commit a transaction of consumer {consumer}"))
    }
}
