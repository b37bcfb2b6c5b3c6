//! What an error of the client library says about whether the request ran.

use std::fmt;

use essentially_once::Error;
use redis::{ErrorKind, RedisError};

/// What the server answers instead of a result, and what a user can do about it. The request did
/// not run.
///
/// The flag says whether the condition can pass by itself, or by what others do to the server or
/// around it: then the same request may be taken later.
const ANSWERS: [(&str, bool, &str); 26] = [
    ("LOADING", true, "the server is loading its data"),
    ("MASTERDOWN", true, "the replica has lost its master"),
    ("CLUSTERDOWN", true, "the cluster has no node for this key now"),
    ("TRYAGAIN", true, "the key is moving between cluster nodes"),
    ("MOVED", true, "the key moved to another cluster node"),
    ("ASK", true, "the key is moving to another cluster node"),
    ("REDIRECT", true, "the server hands over to another one"),
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
    ("EXECABORT", true, "the server dropped a transaction before it ran"),
    (
        MAX_CLIENTS,
        true,
        "raise the server's `maxclients`, or close connections",
    ),
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
        "WRONGPASS",
        false,
        "authentication failed: check the URL's user and password",
    ),
    (
        "DENIED",
        false,
        "the server is in protected mode: set a password, or bind it to this network",
    ),
    (
        "NOPROTO",
        false,
        "the server does not speak RESP3: put `?protocol=resp2` into the URL",
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
    (NO_SUCH_COMMAND, false, "use Redis 7.0 or later, or Valkey"),
    (NO_SUCH_DATABASE, false, "check the database number in the URL"),
    (
        PROTOCOL,
        false,
        "a value may be over the server's `proto-max-bulk-len` or `client-query-buffer-limit`",
    ),
];

/// Answers whose code is only `ERR`, by how their text begins.
const MAX_CLIENTS: &str = "max number of clients";
const NO_SUCH_COMMAND: &str = "unknown command";
const NO_SUCH_DATABASE: &str = "DB index is out of range";
const PROTOCOL: &str = "Protocol error";

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

/// The failure to connect: nothing was asked yet. `tls` says whether the URL asks for it.
pub(crate) fn connect_failed(action: String, error: RedisError, tls: bool) -> Error {
    let text = error.to_string();
    let lasting = match error.kind() {
        ErrorKind::AuthenticationFailed => Some("check the URL's user and password"),
        ErrorKind::Parse if tls => Some("it does not speak Redis' protocol: check host and port"),
        ErrorKind::Parse => {
            Some("it does not speak Redis' protocol: check host and port, or use rediss:// if the port is for TLS")
        }
        ErrorKind::InvalidClientConfig => Some("check the URL and the certificates"),
        // The library passes on what TLS says as an I/O error, and no trying again changes these.
        ErrorKind::Io if text.contains("InvalidContentType") => {
            Some("it does not speak TLS: use redis://, or the server's port for TLS")
        }
        ErrorKind::Io if text.contains("ertificate") => Some(
            "set `root_certificate` to that of the authority that signed the server's certificate, name the server as its \
             certificate does, and set `client_certificate` if it wants one",
        ),
        _ => None,
    };
    if let Some(advice) = lasting {
        return Error::failed(action, format!("{error}; {advice}"));
    }
    if answer(&error).is_some() {
        return read_failed(action, error);
    }
    // A server that is addressed in the wrong manner closes the connection or says nothing, as one
    // that is starting does.
    let advice = match tls {
        true if error.is_timeout() || error.is_connection_dropped() => Some("if the port is not for TLS, use redis://"),
        false if error.is_connection_dropped() => Some(
            "if the port is for TLS, use rediss://; if the server has no room for more clients, raise its `maxclients`",
        ),
        _ => None,
    };
    let advice = advice.filter(|_| !error.is_connection_refusal());
    match advice {
        Some(advice) => Error::unavailable(action, format!("{error}; {advice}")),
        None => Error::unavailable(action, error),
    }
}

/// Whether the server speaks the older protocol only.
pub(crate) fn lacks_resp3(error: &RedisError) -> bool {
    error.kind() == ErrorKind::RESP3NotSupported || error.code() == Some("NOPROTO")
}

/// What a script was told instead of a result, as a code and words; nothing was applied.
pub(crate) fn refused(action: String, told: &str) -> Error {
    let (code, rest) = told.split_once(' ').unwrap_or((told, ""));
    answer_of(code, rest).into_error(action, told)
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
    error.code() == Some("ERR") && error.detail().is_some_and(|detail| detail.contains(PROTOCOL))
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
    let code = error.code()?;
    Some(answer_of(code, error.detail().unwrap_or_default()))
}

fn answer_of(code: &str, rest: &str) -> Answer {
    let is_it = |known: &str| match code {
        "ERR" => rest.starts_with(known),
        code => code == known,
    };
    let known = ANSWERS.iter().find(|(known, ..)| is_it(known));
    Answer {
        transient: known.is_some_and(|(_, transient, _)| *transient),
        advice: known.map(|(.., advice)| *advice),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the server says, and whether it may say otherwise later.
    const SAID: [(&str, bool); 30] = [
        ("LOADING Redis is loading the dataset in memory", true),
        (
            "BUSY Redis is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE.",
            true,
        ),
        ("TRYAGAIN Multiple keys request during rehashing of slot", true),
        ("CLUSTERDOWN The cluster is down", true),
        ("CLUSTERDOWN Hash slot not served", true),
        (
            "MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.",
            true,
        ),
        ("MOVED 3999 127.0.0.1:6381", true),
        ("ASK 3999 127.0.0.1:6381", true),
        ("REDIRECT 127.0.0.1:6381", true),
        ("READONLY You can't write against a read only replica.", true),
        (
            "UNBLOCKED force unblock from blocking operation, instance state changed (master -> replica?)",
            true,
        ),
        ("NOREPLICAS Not enough good replicas to write.", true),
        ("MISCONF Errors writing to the AOF file: No space left on device", true),
        ("OOM command not allowed when used memory > 'maxmemory'.", true),
        ("NOSCRIPT No matching script. Please use EVAL.", true),
        ("EXECABORT Transaction discarded because of previous errors.", true),
        ("ERR max number of clients reached", true),
        ("ERR max number of clients + cluster connections reached", true),
        ("NOAUTH Authentication required.", false),
        (
            "NOAUTH HELLO must be called with the client already authenticated",
            false,
        ),
        ("WRONGPASS invalid username-password pair or user is disabled.", false),
        (
            "NOPERM this user has no permissions to run the 'evalsha' command",
            false,
        ),
        (
            "WRONGTYPE Operation against a key holding the wrong kind of value",
            false,
        ),
        ("CROSSSLOT Keys in request don't hash to the same slot", false),
        ("DENIED Redis is running in protected mode", false),
        ("NOPROTO unsupported protocol version", false),
        ("ERR Protocol error: invalid bulk length", false),
        ("ERR unknown command 'EVAL_RO', with args beginning with:", false),
        ("ERR value is not an integer or out of range", false),
        ("WHATEVER a server of tomorrow says", false),
    ];

    #[test]
    fn what_can_pass_by_itself_is_worth_another_try() {
        for (said, passes) in SAID {
            let (code, rest) = said.split_once(' ').expect("words");
            let reply = redis::parse_redis_value(format!("-{said}\r\n").as_bytes());
            let error = reply.and_then(redis::Value::extract_error).expect_err(said);
            for told in [
                write_failed("write".into(), error.clone()),
                read_failed("read".into(), error.clone()),
                connect_failed("connect".into(), error.clone(), false),
                refused("commit".into(), said),
            ] {
                assert_eq!(told.is_transient(), passes, "{said}: {told}");
                assert!(!matches!(told, Error::Indeterminate { .. }), "{said}: {told}");
                assert!(told.to_string().contains(rest), "{told}");
            }
            let known = answer_of(code, rest).advice.is_some();
            assert_eq!(known, !said.contains("tomorrow") && !said.contains("integer"), "{said}");
        }
        // Each of them is asked about.
        for (known, ..) in ANSWERS {
            let is_said = |(said, _): &(&str, bool)| said.strip_prefix("ERR ").unwrap_or(said).starts_with(known);
            assert!(SAID.iter().any(is_said) || known == NO_SUCH_DATABASE, "{known}");
        }
    }

    #[test]
    fn without_an_answer_only_a_write_is_in_doubt() {
        let lost = || RedisError::from(std::io::Error::from(std::io::ErrorKind::BrokenPipe));
        assert!(matches!(
            write_failed("write".into(), lost()),
            Error::Indeterminate { .. }
        ));
        assert!(matches!(read_failed("read".into(), lost()), Error::Unavailable { .. }));
        assert!(matches!(
            connect_failed("connect".into(), lost(), false),
            Error::Unavailable { .. }
        ));
        assert!(spoils_connection(&lost()));
    }
}
