//! What an error of the client library says about whether a request ran.

use std::fmt;

use essentially_once::{ConsumerId, Error};
use redis::{ErrorKind, RedisError};

/// The server's error replies, with advice for the user. The request did not run.
///
/// The flag says whether the condition can pass without a change to this service: on its own, or
/// because somebody repairs or reconfigures the server. The same request may then succeed later.
const ANSWERS: [(&str, bool, &str); 28] = [
    ("LOADING", true, "the server is loading its data"),
    ("MASTERDOWN", true, "the replica has lost its master"),
    ("CLUSTERDOWN", true, "no node of the cluster serves this key now"),
    ("TRYAGAIN", true, "the key is moving between cluster nodes"),
    ("MOVED", true, "the key moved to another cluster node"),
    ("ASK", true, "the key is moving to another cluster node"),
    ("REDIRECT", true, "the server is handing over to another one"),
    (
        "READONLY",
        true,
        "the server is a replica now: use Sentinel, or the address of the master",
    ),
    (
        "UNBLOCKED",
        true,
        "the server became a replica while a reader was waiting",
    ),
    (
        "OOM",
        true,
        "the server has reached `maxmemory`: raise it, or trim logs",
    ),
    ("MISCONF", true, "the server cannot save to its disk: see its log"),
    (
        "NOREPLICAS",
        true,
        "fewer replicas are connected than `min-replicas-to-write` requires",
    ),
    ("BUSY", true, "another client's script keeps the server busy"),
    ("NOSCRIPT", true, "the server no longer has the script"),
    ("EXECABORT", true, "the server dropped a transaction before it ran"),
    (
        MAX_CLIENTS,
        true,
        "raise the server's `maxclients`, or close connections",
    ),
    ("NOPERM", false, GRANT),
    (NO_RIGHT_IN_SCRIPT, false, GRANT),
    (NO_RIGHT_IN_SCRIPT_7_0, false, GRANT),
    (
        "NOAUTH",
        false,
        "the server requires a user or password: put them into the URL",
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
        "the server does not support RESP3: add `?protocol=resp2` to the URL",
    ),
    (
        "CROSSSLOT",
        false,
        "in a cluster, all keys of a transaction must hash to one slot: see `RedisTx::hash_tag`",
    ),
    (
        "WRONGTYPE",
        false,
        "the key holds another type: choose another name, or rename that key",
    ),
    (NO_SUCH_COMMAND, false, "use Redis 7.0 or later, or Valkey"),
    (NO_SUCH_DATABASE, false, "check the database number in the URL"),
    (
        PROTOCOL,
        false,
        "a value may exceed the server's `proto-max-bulk-len` or `client-query-buffer-limit`",
    ),
];

const GRANT: &str = "grant the user access to this command and these keys (ACL SETUSER)";

/// Replies whose code is only `ERR`, recognized by the start of their text.
const NO_RIGHT_IN_SCRIPT: &str = "ACL failure in script";
const NO_RIGHT_IN_SCRIPT_7_0: &str = "The user executing the script can't";
const MAX_CLIENTS: &str = "max number of clients";
const NO_SUCH_COMMAND: &str = "unknown command";
const NO_SUCH_DATABASE: &str = "DB index is out of range";
const PROTOCOL: &str = "Protocol error";

/// The failure of a request that may have changed data.
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

/// A failure to connect. No request was sent. `tls` says whether the URL asks for TLS.
pub(crate) fn connect_failed(action: String, error: RedisError, tls: bool) -> Error {
    let text = error.to_string();
    let lasting = match error.kind() {
        ErrorKind::AuthenticationFailed => Some("check the URL's user and password"),
        ErrorKind::Parse if tls => Some("it does not speak the Redis protocol: check host and port"),
        ErrorKind::Parse => {
            Some("it does not speak the Redis protocol: check host and port, or use rediss:// if the port is for TLS")
        }
        ErrorKind::InvalidClientConfig => Some("check the URL"),
        // The library reports TLS failures as I/O errors. Another attempt does not help with these.
        ErrorKind::Io if text.contains("InvalidContentType") => {
            Some("it does not speak TLS: use redis://, or the server's TLS port")
        }
        ErrorKind::Io if text.contains("ertificate") => Some(
            "add the authority that signed the server's certificate with `add_root_certificate`, use the host name in that \
             certificate, and set `client_certificate` and `client_key` if the server requires them",
        ),
        _ => None,
    };
    if let Some(advice) = lasting {
        return Error::failed(action, format!("{error}; {advice}"));
    }
    if answer(&error).is_some() {
        return read_failed(action, error);
    }
    // A server that gets the wrong protocol closes the connection or stays silent, and so does a
    // server that is starting.
    let advice = match tls {
        true if error.is_timeout() || error.is_connection_dropped() => Some("if the port is not for TLS, use redis://"),
        false if error.is_connection_dropped() => {
            Some("if the port is for TLS, use rediss://; if the server has reached its `maxclients`, raise that")
        }
        _ => None,
    };
    let advice = advice.filter(|_| !error.is_connection_refusal());
    match advice {
        Some(advice) => Error::unavailable(action, format!("{error}; {advice}")),
        None => Error::unavailable(action, error),
    }
}

/// Whether the server speaks only the older protocol.
pub(crate) fn lacks_resp3(error: &RedisError) -> bool {
    error.kind() == ErrorKind::RESP3NotSupported || error.code() == Some("NOPROTO")
}

/// The error reply that a script received from the server, as a code and text. Nothing was applied.
pub(crate) fn refused(action: String, reply: &str) -> Error {
    let (code, rest) = reply.split_once(' ').unwrap_or((reply, ""));
    answer_of(code, rest).into_error(action, reply)
}

/// The error that blocks a consumer until somebody has repaired the data.
pub(crate) fn partially_applied(consumer: &ConsumerId, done: String) -> Error {
    Error::PartiallyApplied {
        consumer: consumer.clone(),
        done,
        remedy: "undo the commands that were applied, then call `RedisStore::resolve_partial` for the consumer".into(),
    }
}

/// The first 1,000 bytes as text without control characters.
pub(crate) fn printable(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(&bytes[..bytes.len().min(1_000)]);
    text.replace(char::is_control, "\u{fffd}")
}

/// Whether the connection must not get another request: it is closed, silent, or leads to the wrong
/// server.
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

/// Whether the server could not parse the request, for instance because a value exceeds
/// `proto-max-bulk-len`. The server closes the connection after this reply.
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

/// The server's reply; `None` if it did not reply.
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

    /// Error replies, and whether a later attempt may succeed.
    const SAID: [(&str, bool); 32] = [
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
            "ERR ACL failure in script: User app has no permissions to run the 'hgetall' command script: on @user_script:11.",
            false,
        ),
        (
            "ERR The user executing the script can't run this command or subcommand script: on @user_script:11.",
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
            for error in [
                write_failed("write".into(), error.clone()),
                read_failed("read".into(), error.clone()),
                connect_failed("connect".into(), error.clone(), false),
                refused("commit".into(), said),
            ] {
                assert_eq!(error.is_transient(), passes, "{said}: {error}");
                assert!(!matches!(error, Error::Indeterminate { .. }), "{said}: {error}");
                assert!(error.to_string().contains(rest), "{error}");
            }
            let known = answer_of(code, rest).advice.is_some();
            assert_eq!(known, !said.contains("tomorrow") && !said.contains("integer"), "{said}");
        }
        // The cases above cover every known reply.
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
