//! What an error of the client library says about whether the request ran.

use std::fmt;

use essentially_once::Error;
use redis::{ErrorKind, RedisError};

/// What the server answered instead of a result, and what a user can do about it. The request did not run.
///
/// Whether it is worth trying again is the flag: a server that loads, fails over or is out of memory may take the same request later.
const ANSWERS: [(&str, bool, &str); 17] = [
    ("LOADING", true, "the server is loading its data"),
    ("MASTERDOWN", true, "the replica has lost its master"),
    ("CLUSTERDOWN", true, "the cluster has no node for this key now"),
    ("TRYAGAIN", true, "the key is moving between cluster nodes"),
    ("MOVED", true, "the key moved to another cluster node"),
    ("ASK", true, "the key is moving to another cluster node"),
    (
        "READONLY",
        true,
        "the server is a replica now; use Sentinel or the address of the master",
    ),
    ("UNBLOCKED", true, "the server became a replica while a reader waited"),
    ("OOM", true, "the server is at `maxmemory`: raise it, or trim logs"),
    ("MISCONF", true, "the server cannot save to its disk: see its log"),
    (
        "NOREPLICAS",
        true,
        "fewer replicas are connected than `min-replicas-to-write` asks",
    ),
    ("BUSY", true, "another client's script keeps the server busy"),
    ("NOSCRIPT", true, "the server forgot a script"),
    (
        "NOPERM",
        false,
        "grant the user this command and these keys (ACL SETUSER)",
    ),
    (
        "NOAUTH",
        false,
        "the server wants a user or password: put them into the URL",
    ),
    (
        "CROSSSLOT",
        false,
        "in a cluster, all keys of a transaction must be in one slot: see `RedisTx::hash_tag`",
    ),
    (
        "WRONGTYPE",
        false,
        "the key holds another type: choose another name, or move that key away",
    ),
];

/// The failure of a request that may have changed something.
pub(crate) fn write_failed(action: String, error: RedisError) -> Error {
    match answer(&error) {
        Some(answer) => answer.into_error(action, error),
        None => Error::indeterminate(action, error),
    }
}

/// The failure of a request that changes nothing.
pub(crate) fn read_failed(action: String, error: RedisError) -> Error {
    match answer(&error) {
        Some(answer) => answer.into_error(action, error),
        None => Error::unavailable(action, error),
    }
}

/// The failure to connect: nothing was asked yet.
pub(crate) fn connect_failed(action: String, error: RedisError) -> Error {
    let lasting = matches!(
        error.kind(),
        ErrorKind::AuthenticationFailed | ErrorKind::InvalidClientConfig | ErrorKind::RESP3NotSupported
    );
    // The library passes on what TLS says as an I/O error, and no trying again makes a certificate trusted.
    if lasting || error.to_string().contains("ertificate") {
        return Error::failed(action, error);
    }
    read_failed(action, error)
}

/// What a script was told instead of a result, as a code and words; nothing was applied.
pub(crate) fn refused(action: String, told: &str) -> Error {
    let code = told.split(' ').next().unwrap_or_default();
    answer_of(code).into_error(action, told)
}

/// Whether the connection cannot be trusted with another request: it is gone, silent, or leads to the wrong server.
pub(crate) fn spoils_connection(error: &RedisError) -> bool {
    match error.code() {
        _ if is_protocol_error(error) => true,
        Some(code) => matches!(
            code,
            "READONLY" | "MOVED" | "ASK" | "CLUSTERDOWN" | "MASTERDOWN" | "NOAUTH"
        ),
        None => true,
    }
}

/// Whether the server could not take the request, such as one with a value over `proto-max-bulk-len`. It
/// closes the connection after this answer.
pub(crate) fn is_protocol_error(error: &RedisError) -> bool {
    error.code() == Some("ERR") && error.detail().is_some_and(|detail| detail.contains("Protocol error"))
}

struct Answer {
    transient: bool,
    advice: Option<&'static str>,
}

impl Answer {
    fn into_error(self, action: String, error: impl fmt::Display) -> Error {
        let source = match self.advice {
            Some(advice) => format!("{error}; {advice}"),
            None => error.to_string(),
        };
        match self.transient {
            true => Error::unavailable(action, source),
            false => Error::failed(action, source),
        }
    }
}

/// What the server answered; `None` if no answer came.
fn answer(error: &RedisError) -> Option<Answer> {
    error.code().map(answer_of)
}

fn answer_of(code: &str) -> Answer {
    let known = ANSWERS.iter().find(|(known, ..)| *known == code);
    Answer {
        transient: known.is_some_and(|(_, transient, _)| *transient),
        advice: known.map(|(.., advice)| *advice),
    }
}
