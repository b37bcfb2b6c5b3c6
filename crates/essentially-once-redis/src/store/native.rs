//! Native commands: how the server describes them, and which of them a transaction has staged.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{Arc, Mutex, PoisonError},
};

use essentially_once::Error;
use redis::{Arg, Cmd, Value};

use crate::{
    connection::Link,
    error::{printable, read_failed},
};

/// Lua passes at most 8,000 arguments.
const MAX_ARGUMENTS: usize = 7_000;

/// The server's descriptions of its commands. Each is requested once.
#[derive(Default, Debug)]
pub(crate) struct Catalog {
    commands: Mutex<HashMap<Vec<u8>, Arc<Command>>>,
}

/// The server's description of a command, such as `HSET` or `XGROUP|CREATE`.
#[derive(Debug)]
pub(crate) struct Command {
    name: String,
    /// The number of arguments with the name. A negative number is a minimum.
    arity: i64,
    flags: BTreeSet<String>,
    /// The places of its keys: first, last (negative: from the end), step.
    keys: (usize, i64, usize),
    has_subcommands: bool,
}

impl Catalog {
    pub(crate) async fn find(&self, link: &Link, arguments: &[&[u8]]) -> Result<Arc<Command>, Error> {
        let Some(name) = arguments.first() else {
            return Err(refused(link, "", "it is empty"));
        };
        let command = self.named(link, name.to_ascii_uppercase()).await?;
        match arguments.get(1) {
            Some(sub) if command.has_subcommands => {
                let name = [command.name.as_bytes(), b"|", &sub.to_ascii_uppercase()].concat();
                self.named(link, name).await
            }
            _ => Ok(command),
        }
    }

    async fn named(&self, link: &Link, name: Vec<u8>) -> Result<Arc<Command>, Error> {
        // A panic elsewhere leaves the map whole.
        let known = self
            .commands
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&name)
            .cloned();
        if let Some(command) = known {
            return Ok(command);
        }
        let command = Arc::new(Command::ask(link, &name).await?);
        let mut commands = self.commands.lock().unwrap_or_else(PoisonError::into_inner);
        commands.insert(name, Arc::clone(&command));
        Ok(command)
    }
}

impl Command {
    async fn ask(link: &Link, name: &[u8]) -> Result<Self, Error> {
        let shown = printable(name);
        let mut request = redis::cmd("COMMAND");
        request.arg("INFO").arg(name);
        let answer: Value = ask(link, &shown, &request).await?;
        let info = match answer {
            Value::Array(infos) => infos.into_iter().next(),
            _ => None,
        };
        match info {
            Some(Value::Array(info)) => Self::decode(shown.clone(), info)
                .ok_or_else(|| refused(link, &shown, "the server describes it in an unknown format")),
            _ => Err(refused(link, &shown, "the server has no such command")),
        }
    }

    /// `[name, arity, flags, first key, last key, step, categories, tips, key specifications,
    /// subcommands]`.
    fn decode(name: String, info: Vec<Value>) -> Option<Self> {
        let mut fields = info.into_iter().skip(1);
        let mut number = || match fields.next() {
            Some(Value::Int(number)) => Some(number),
            _ => None,
        };
        let arity = number()?;
        let flags = redis::from_redis_value(fields.next()?).ok()?;
        let mut number = || match fields.next() {
            Some(Value::Int(number)) => Some(number),
            _ => None,
        };
        let keys = (
            usize::try_from(number()?).ok()?,
            number()?,
            usize::try_from(number()?).ok()?.max(1),
        );
        let has_subcommands = matches!(fields.nth(3), Some(Value::Array(subcommands)) if !subcommands.is_empty());
        Some(Self {
            name,
            arity,
            flags,
            keys,
            has_subcommands,
        })
    }

    /// Whether these arguments begin with its name.
    pub(crate) fn is_named(&self, arguments: &[&[u8]]) -> bool {
        !self.has_subcommands
            && arguments
                .first()
                .is_some_and(|name| name.eq_ignore_ascii_case(self.name.as_bytes()))
    }

    fn is(&self, flag: &str) -> bool {
        self.flags.contains(flag)
    }

    /// Refuses a command that cannot be part of a commit.
    pub(crate) fn check_write(&self, link: &Link, arguments: &[&[u8]]) -> Result<(), Error> {
        let why = if self.is("blocking") {
            "it may block, and its reply is discarded: use a command that does not block"
        } else if self.is("noscript") || self.is("admin") || self.name == "MIGRATE" {
            "it cannot run inside a script"
        } else if !self.is("write") && !self.publishes() {
            "it writes nothing: use `query` to read"
        } else if arguments.len() > MAX_ARGUMENTS {
            "it has more than 7,000 arguments: split it"
        } else {
            return self.check_arity(link, arguments);
        };
        Err(refused(link, &self.name, why))
    }

    /// Refuses a command that does not just read.
    pub(crate) fn check_read(&self, link: &Link, arguments: &[&[u8]]) -> Result<(), Error> {
        let why = if !self.is("readonly") {
            "it is not a reading command, and `query` runs it at once, outside the commit: use `command` to write"
        } else if self.is("blocking") {
            "it may block and delay the consumer's commits: use a command that does not block"
        } else {
            return self.check_arity(link, arguments);
        };
        Err(refused(link, &self.name, why))
    }

    fn check_arity(&self, link: &Link, arguments: &[&[u8]]) -> Result<(), Error> {
        let given = arguments.len() as u64;
        let fits = match self.arity {
            least @ ..0 => given >= least.unsigned_abs(),
            exactly => given == exactly.unsigned_abs(),
        };
        match fits {
            true => Ok(()),
            false => Err(refused(
                link,
                &self.name,
                "it has too few or too many arguments: check its syntax",
            )),
        }
    }

    pub(crate) fn publishes(&self) -> bool {
        matches!(self.name.as_str(), "PUBLISH" | "SPUBLISH")
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// The arguments that are keys.
    pub(crate) async fn keys<'a>(&self, link: &Link, arguments: &[&'a [u8]]) -> Result<Vec<Cow<'a, [u8]>>, Error> {
        if self.is("movablekeys") {
            let mut request = redis::cmd("COMMAND");
            request.arg("GETKEYS").arg(arguments);
            let keys: Vec<Vec<u8>> = ask(link, &self.name, &request).await?;
            return Ok(keys.into_iter().map(Into::into).collect());
        }
        let (first, last, step) = self.keys;
        let end = match last {
            from_end @ ..0 => arguments.len().saturating_sub(from_end.unsigned_abs() as usize - 1),
            last => (last as usize + 1).min(arguments.len()),
        };
        match first {
            0 => Ok(Vec::new()),
            first => Ok((first..end).step_by(step).map(|at| arguments[at].into()).collect()),
        }
    }
}

/// The staged commands of a transaction, laid out for the script.
#[derive(Default)]
pub(crate) struct Staged {
    /// The commands. An incrementing command has a sum instead of its last argument.
    pub(crate) commands: Vec<(Cmd, Option<i64>)>,
    /// Runs of commands of equal length: the length, and the number of commands.
    pub(crate) runs: Vec<(usize, usize)>,
    /// The first command of each name: the indices of its first and last argument, from 0.
    pub(crate) permissions: Vec<(usize, usize)>,
    pub(crate) keys: BTreeMap<Vec<u8>, Use>,
    /// The number of arguments that commands and runs take together.
    pub(crate) arguments: usize,
    pub(crate) bytes: usize,
    names: Vec<String>,
}

/// How a transaction uses a key, as far as the script can check it before the first write.
#[derive(Default)]
pub(crate) struct Use {
    /// A reading command that fails unless the key has the type that its first use needs.
    pub(crate) probe: Option<&'static str>,
    /// Whether the value must be an integer.
    pub(crate) counter: bool,
    /// The fields of a hash that must be integers, and the index of the command that increments
    /// each.
    pub(crate) counters: BTreeMap<Vec<u8>, usize>,
    /// The index of the command that increments the value.
    sum: Option<usize>,
    /// Whether a command other than an increment writes it. The script then cannot check its value
    /// beforehand.
    written: bool,
}

impl Staged {
    /// Accounts for a command. Returns whether the caller must add it to `commands`. Repeated
    /// increments of one value are added up into one command, since the result is the same.
    pub(crate) fn note(
        &mut self,
        command: &Command,
        keys: &[Cow<'_, [u8]>],
        arguments: &[&[u8]],
        increment: Option<i64>,
    ) -> bool {
        for key in keys {
            if !self.keys.contains_key(&**key) {
                self.bytes += key.len();
                let probe = probe(&command.name);
                self.keys.insert(
                    key.to_vec(),
                    Use {
                        probe,
                        ..Use::default()
                    },
                );
            }
        }
        if command.name == "SORT" {
            // SORT reads keys that it does not name.
            self.keys.values_mut().for_each(|usage| usage.written = true);
        }
        let new = self.commands.len();
        for key in keys {
            let Some(usage) = self.keys.get_mut(&**key) else {
                continue;
            };
            let before = usage.count(command, arguments, new);
            if let (Some(before), Some(increment)) = (before, increment)
                && let Some((_, Some(sum))) = self.commands.get_mut(before)
                && let Some(more) = sum.checked_add(increment)
            {
                *sum = more;
                return false;
            }
        }
        let length = arguments.len();
        self.bytes += arguments.iter().map(|argument| argument.len()).sum::<usize>();
        match self.runs.last_mut() {
            Some((same, count)) if *same == length => *count += 1,
            _ => {
                self.runs.push((length, 1));
                self.arguments += 2;
            }
        }
        if !self.names.contains(&command.name) {
            self.names.push(command.name.clone());
            self.permissions.push((self.arguments, self.arguments + length - 1));
        }
        self.arguments += length;
        true
    }
}

impl Use {
    /// Notes how a command uses this key, and returns the index of an earlier command that
    /// increments the same value.
    fn count(&mut self, command: &Command, arguments: &[&[u8]], new: usize) -> Option<usize> {
        match (command.name.as_str(), arguments.get(2)) {
            _ if self.written => None,
            ("INCRBY", _) => {
                self.counter = true;
                Some(*self.sum.get_or_insert(new))
            }
            ("INCR" | "DECR" | "DECRBY", _) => {
                self.counter = true;
                None
            }
            ("HINCRBY", Some(field)) => match self.counters.get(*field) {
                Some(before) => Some(*before),
                None => self.counters.insert(field.to_vec(), new),
            },
            _ => {
                self.written = true;
                None
            }
        }
    }
}

/// The increment in the last argument of a command. Refuses one that is not an integer, which the
/// server would only reject in the middle of the commit.
pub(crate) fn increment(link: &Link, command: &Command, arguments: &[&[u8]]) -> Result<Option<i64>, Error> {
    if !matches!(command.name.as_str(), "INCRBY" | "DECRBY" | "HINCRBY") {
        return Ok(None);
    }
    let text = arguments
        .last()
        .and_then(|last| std::str::from_utf8(last).ok())
        .unwrap_or_default();
    match text.parse::<i64>() {
        // The server accepts neither a plus sign nor leading zeros.
        Ok(increment) if increment.to_string() == text => Ok(Some(increment).filter(|_| command.name != "DECRBY")),
        _ => Err(refused(link, &command.name, "the increment is not an integer")),
    }
}

/// A cheap reading command that fails unless the key has the type that this writing command needs.
/// Commands that replace a key, or work on any type, have none.
fn probe(command: &str) -> Option<&'static str> {
    Some(match command {
        "HSET" | "HSETNX" | "HMSET" | "HDEL" | "HINCRBY" | "HINCRBYFLOAT" | "HEXPIRE" | "HPEXPIRE" | "HEXPIREAT"
        | "HPEXPIREAT" | "HPERSIST" | "HSETEX" | "HGETDEL" | "HGETEX" => "HLEN",
        "LPUSH" | "RPUSH" | "LPUSHX" | "RPUSHX" | "LPOP" | "RPOP" | "LSET" | "LINSERT" | "LREM" | "LTRIM" | "LMOVE"
        | "RPOPLPUSH" => "LLEN",
        "SADD" | "SREM" | "SPOP" | "SMOVE" => "SCARD",
        "ZADD" | "ZINCRBY" | "ZREM" | "ZPOPMIN" | "ZPOPMAX" | "ZREMRANGEBYLEX" | "ZREMRANGEBYRANK"
        | "ZREMRANGEBYSCORE" | "GEOADD" => "ZCARD",
        "APPEND" | "INCR" | "DECR" | "INCRBY" | "DECRBY" | "INCRBYFLOAT" | "SETRANGE" | "SETBIT" | "BITFIELD"
        | "GETSET" | "GETDEL" | "GETEX" | "PFADD" => "STRLEN",
        "XADD"
        | "XDEL"
        | "XTRIM"
        | "XACK"
        | "XCLAIM"
        | "XAUTOCLAIM"
        | "XSETID"
        | "XGROUP|CREATE"
        | "XGROUP|SETID"
        | "XGROUP|DESTROY"
        | "XGROUP|CREATECONSUMER"
        | "XGROUP|DELCONSUMER" => "XLEN",
        _ => return None,
    })
}

/// The arguments of a command, its name first.
pub(crate) fn arguments(command: &Cmd) -> Vec<&[u8]> {
    let argument = |argument| match argument {
        Arg::Simple(bytes) => bytes,
        // The placeholder for a cursor: a scan from the start.
        _ => &b"0"[..],
    };
    command.args_iter().map(argument).collect()
}

/// The error for a command that is not staged or run.
pub(crate) fn refused(link: &Link, command: &str, why: impl Into<String>) -> Error {
    Error::failed(link.server.on(format!("accept command {command}")), why.into())
}

/// Asks the server about a command.
async fn ask<T: redis::FromRedisValue>(link: &Link, command: &str, request: &Cmd) -> Result<T, Error> {
    let mut connection = link.connection().await?;
    let answer: redis::RedisResult<T> = request.query_async(&mut connection).await;
    match answer {
        Ok(answer) => Ok(answer),
        Err(error) if error.code() == Some("NOPERM") => Err(refused(
            link,
            command,
            format!(
                "{error}; native commands are checked before they are staged: grant the user `command|info` and `command|getkeys`"
            ),
        )),
        Err(error) => {
            link.check(&error);
            Err(read_failed(
                link.server.on(format!("ask about command {command}")),
                error,
            ))
        }
    }
}
