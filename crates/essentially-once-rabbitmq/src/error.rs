//! Sorts lapin's errors: did it happen, and is it worth trying again?

use essentially_once::Error;
use lapin::{
    ErrorKind,
    protocol::{AMQPErrorKind, AMQPHardError, AMQPSoftError},
};

/// The failure of an action that changes nothing, or that did not begin.
pub(crate) fn not_done(action: String, error: lapin::Error) -> Error {
    match lasting(&error) {
        Some(advice) => Error::failed(action, explained(&error, advice)),
        None => Error::unavailable(action, error),
    }
}

/// The failure of an action that may have happened.
pub(crate) fn in_doubt(action: String, error: lapin::Error) -> Error {
    Error::indeterminate(action, error)
}

/// Whether the broker says that a queue of that name does not exist.
pub(crate) fn is_not_found(error: &lapin::Error) -> bool {
    match error.kind() {
        ErrorKind::ProtocolError(reply) => {
            *reply.kind() == AMQPErrorKind::Soft(AMQPSoftError::NOTFOUND) && !is_down(reply.get_message().as_str())
        }
        _ => false,
    }
}

/// The broker's largest message, if it closed the channel because of a larger one.
pub(crate) fn message_limit(error: &lapin::Error) -> Option<usize> {
    match error.kind() {
        ErrorKind::ProtocolError(reply) => limit_in(reply.get_message().as_str()),
        _ => None,
    }
}

/// Reads "message size 300000 is larger than configured max size 200000". The broker omits
/// "configured" if the limit is the highest possible one.
fn limit_in(message: &str) -> Option<usize> {
    let (_, behind) = message.split_once("is larger than ")?;
    let (_, limit) = behind.split_once("max size ")?;
    let digits = limit.find(|c: char| !c.is_ascii_digit()).unwrap_or(limit.len());
    limit[..digits].parse().ok()
}

/// What a user can do about an error that does not pass on its own. An unknown error is assumed to
/// pass: trying again is better than giving up.
fn lasting(error: &lapin::Error) -> Option<&'static str> {
    match error.kind() {
        ErrorKind::ProtocolError(reply) => lasting_reply(reply.kind(), reply.get_message().as_str()),
        #[cfg(feature = "tls")]
        ErrorKind::IOError(error) => tls(error),
        ErrorKind::InvalidProtocolVersion(_) => Some("connect to RabbitMQ 3.9 or later, by AMQP 0-9-1"),
        ErrorKind::AuthProviderError(_) => Some("check the URL's user, password and `auth_mechanism`"),
        ErrorKind::SerialisationError(_) => Some("a name or an argument is longer than AMQP allows"),
        _ => None,
    }
}

/// As [`lasting`], for a reply of the broker.
fn lasting_reply(kind: &AMQPErrorKind, message: &str) -> Option<&'static str> {
    // The text decides before the code. An unreachable leader, for instance, is "not found" or
    // "precondition failed".
    if passes(message) {
        return None;
    }
    match kind {
        AMQPErrorKind::Soft(AMQPSoftError::ACCESSREFUSED) => {
            Some("check the URL's user, password and virtual host, and the user's rights (configure, write, read)")
        }
        AMQPErrorKind::Soft(AMQPSoftError::NOTFOUND) => Some("it does not exist, or was deleted"),
        AMQPErrorKind::Soft(AMQPSoftError::PRECONDITIONFAILED) => {
            Some("it exists with other arguments; use the same ones, or choose another name")
        }
        AMQPErrorKind::Soft(AMQPSoftError::CONTENTTOOLARGE) => {
            Some("raise `max_message_size` of the broker, or send smaller messages")
        }
        AMQPErrorKind::Hard(AMQPHardError::NOTALLOWED | AMQPHardError::INVALIDPATH) => {
            Some("check the URL's virtual host and the user's rights to it")
        }
        AMQPErrorKind::Hard(AMQPHardError::NOTIMPLEMENTED) => Some("streams need RabbitMQ 3.9 or later"),
        _ => None,
    }
}

/// Whether the broker's text describes a temporary state.
fn passes(message: &str) -> bool {
    is_down(message)
        || [
            // Limits of connections, channels or queues, per node, virtual host or user. Others
            // come and go.
            "is reached",
            "has reached",
            // The broker ends a channel without acknowledgements after a while. A new channel
            // works.
            "delivery acknowledgement",
            "unknown delivery tag",
        ]
        .iter()
        .any(|passing| message.contains(passing))
}

/// Certificate errors last, except for those about dates. Other TLS errors may pass.
#[cfg(feature = "tls")]
fn tls(error: &std::io::Error) -> Option<&'static str> {
    use rustls::{AlertDescription as Alert, CertificateError, Error, InvalidMessage, pki_types::InvalidDnsNameError};
    let error = error.get_ref()?;
    if error.is::<InvalidDnsNameError>() {
        return Some("no certificate can name the URL's host; name the broker in the URL as its certificate does");
    }
    match error.downcast_ref()? {
        // Clocks get set and certificates renewed while services run.
        Error::InvalidCertificate(
            CertificateError::Expired
            | CertificateError::ExpiredContext { .. }
            | CertificateError::NotValidYet
            | CertificateError::NotValidYetContext { .. },
        ) => None,
        Error::InvalidCertificate(_) => Some(
            "set `add_root_certificate` to the authority (PEM) that signed the broker's certificate, and name the \
             broker in the URL as its certificate does",
        ),
        Error::AlertReceived(
            Alert::CertificateRequired
            | Alert::BadCertificate
            | Alert::UnsupportedCertificate
            | Alert::CertificateRevoked
            | Alert::CertificateExpired
            | Alert::CertificateUnknown
            | Alert::UnknownCA
            | Alert::HandshakeFailure,
        ) => Some("the broker may demand a certificate of an authority that it trusts: set `client_certificate`"),
        Error::InvalidMessage(InvalidMessage::InvalidContentType) => {
            Some("this port does not speak TLS; use the broker's TLS port, or amqp://")
        }
        _ => None,
    }
}

/// Whether the queue exists but a node that it needs does not run, or not yet.
fn is_down(message: &str) -> bool {
    [
        "down or inaccessible",
        "is down",
        "stopped by supervisor",
        "not available",
        "replica on the local node",
        "running local replica",
        "crashed and failed to restart",
        "stopping or being demoted",
        "due to timeout",
        "timeout occurred",
        "oordinator unavailable",
    ]
    .iter()
    .any(|down| message.contains(down))
}

fn explained(error: &lapin::Error, advice: &str) -> String {
    match error.kind() {
        ErrorKind::ProtocolError(reply) => format!("{}; {advice}", reply.get_message()),
        _ => format!("{error}; {advice}"),
    }
}

#[cfg(test)]
mod tests {
    use std::{io, sync::Arc};

    use lapin::{ChannelState, ConnectionState, protocol::AMQPError};

    use super::*;

    fn reply(kind: impl Into<AMQPErrorKind>, message: &str) -> lapin::Error {
        ErrorKind::ProtocolError(AMQPError::new(kind.into(), message.into())).into()
    }

    /// Covers every reply code, every kind of error that lapin has, and those texts of RabbitMQ
    /// that decide.
    #[test]
    fn every_error_is_sorted_by_whether_it_passes() {
        use AMQPHardError as Hard;
        use AMQPSoftError as Soft;

        let io = |kind: io::ErrorKind| lapin::Error::from(io::Error::from(kind));
        let passing = [
            reply(
                Hard::NOTALLOWED,
                "access to vhost '/' refused for user 'shop': connection limit (5) is reached",
            ),
            reply(
                Hard::NOTALLOWED,
                "connection refused for user 'shop': user connection limit (5) is reached",
            ),
            reply(
                Hard::NOTALLOWED,
                "connection refused: node connection limit (500) is reached",
            ),
            reply(
                Hard::NOTALLOWED,
                "number of channels opened (9) has reached the negotiated channel_max (9)",
            ),
            reply(
                Hard::NOTALLOWED,
                "number of channels opened for user 'shop' has reached the maximum allowed user limit of (9)",
            ),
            reply(
                Hard::INTERNALERROR,
                "access to vhost '/' refused for user 'shop': vhost '/' is down",
            ),
            reply(
                Hard::NOTALLOWED,
                "access to vhost '/' refused for user 'shop': vhost '/' is down",
            ),
            reply(
                Hard::INTERNALERROR,
                "Cannot declare a queue 'queue 'orders' in vhost '/'' on node 'a': {error,timeout}",
            ),
            reply(
                Hard::CONNECTIONFORCED,
                "broker forced connection closure with reason 'shutdown'",
            ),
            reply(Hard::CONNECTIONFORCED, "user 'shop' was deleted"),
            reply(Hard::RESOURCEERROR, "no file handles"),
            // The connection lost its place. The next one starts fresh.
            reply(Hard::FRAMEERROR, "type 3, first 16 octets"),
            reply(Hard::SYNTAXERROR, ""),
            reply(Hard::COMMANDINVALID, "unimplemented method"),
            reply(Hard::CHANNELERROR, "expected 'channel.open'"),
            reply(Hard::UNEXPECTEDFRAME, "expected content header"),
            reply(
                Soft::NOTFOUND,
                "home node 'a@b' of durable queue 'orders' in vhost '/' is down or inaccessible",
            ),
            reply(
                Soft::NOTFOUND,
                "queue 'orders' in vhost '/' process is stopped by supervisor",
            ),
            reply(
                Soft::NOTFOUND,
                "queue 'orders' in vhost '/' has crashed and failed to restart",
            ),
            reply(
                Soft::NOTFOUND,
                "failed to perform operation on queue 'orders' in vhost '/' due to timeout",
            ),
            reply(
                Soft::NOTFOUND,
                "failed to perform operation on queue 'orders' in vhost '/': its master replica <1> may be stopping or \
                 being demoted",
            ),
            reply(
                Soft::PRECONDITIONFAILED,
                "queue 'orders' in vhost '/' does not have a replica on the local node",
            ),
            reply(
                Soft::PRECONDITIONFAILED,
                "queue 'orders' in vhost '/' does not have a running local replica",
            ),
            reply(
                Soft::PRECONDITIONFAILED,
                "queue 'orders' in vhost '/' timeout occurred during consume operation",
            ),
            reply(
                Soft::PRECONDITIONFAILED,
                "Stream coordinator unavailable for queue 'orders' in vhost '/'",
            ),
            reply(Soft::PRECONDITIONFAILED, "stream not available"),
            reply(
                Soft::PRECONDITIONFAILED,
                "delivery acknowledgement on channel 1 timed out. Timeout value used: 8000 ms",
            ),
            reply(Soft::PRECONDITIONFAILED, "unknown delivery tag 7"),
            reply(
                Soft::PRECONDITIONFAILED,
                "cannot declare queue 'orders': queue limit in vhost '/' (9) is reached",
            ),
            reply(
                Soft::RESOURCELOCKED,
                "cannot obtain exclusive access to locked queue 'orders' in vhost '/'",
            ),
            reply(Soft::NOCONSUMERS, ""),
            ErrorKind::ChannelsLimitReached.into(),
            ErrorKind::InvalidChannel(7).into(),
            ErrorKind::InvalidChannelState(ChannelState::Closed, "closed").into(),
            ErrorKind::InvalidConnectionState(ConnectionState::Closed).into(),
            ErrorKind::MissingHeartbeatError.into(),
            ErrorKind::FutureCompleted.into(),
            ErrorKind::RuntimeShutdownError(Arc::new(io::ErrorKind::Other.into())).into(),
            io(io::ErrorKind::ConnectionRefused),
            io(io::ErrorKind::ConnectionReset),
            io(io::ErrorKind::ConnectionAborted),
            io(io::ErrorKind::TimedOut),
            // No such host: the name server may be down, or may not know the host yet.
            io::Error::other("failed to lookup address information: Name or service not known").into(),
        ];
        for error in passing {
            let shown = error.to_string();
            let error = not_done("read stream orders".into(), error);
            assert!(matches!(error, Error::Unavailable { .. }), "it may pass: {shown}");
        }
        let lasting = [
            (
                reply(
                    Soft::ACCESSREFUSED,
                    "Login was refused using authentication mechanism PLAIN.",
                ),
                "password",
            ),
            (
                reply(
                    Soft::ACCESSREFUSED,
                    "access to queue 'orders' in vhost '/' refused for user 'shop'",
                ),
                "rights",
            ),
            (
                reply(Soft::NOTFOUND, "no queue 'orders' in vhost '/'"),
                "does not exist",
            ),
            (
                reply(
                    Soft::PRECONDITIONFAILED,
                    "inequivalent arg 'x-max-age' for queue 'orders' in vhost '/': received none but current is '1h'",
                ),
                "other arguments",
            ),
            (reply(Soft::CONTENTTOOLARGE, ""), "max_message_size"),
            (
                reply(Hard::NOTALLOWED, "access to vhost '/' refused for user 'shop'"),
                "rights",
            ),
            (reply(Hard::NOTALLOWED, "vhost none not found"), "virtual host"),
            (reply(Hard::INVALIDPATH, ""), "virtual host"),
            (reply(Hard::NOTIMPLEMENTED, ""), "3.9"),
            (ErrorKind::AuthProviderError("none".into()).into(), "auth_mechanism"),
        ];
        for (error, advice) in lasting {
            let shown = error.to_string();
            let error = not_done("read stream orders".into(), error);
            let words = error.to_string();
            assert!(
                matches!(error, Error::Failed { .. }) && words.contains(advice),
                "it lasts: {shown}: {words}"
            );
        }
    }

    #[test]
    fn the_broker_names_its_limit() {
        for (message, limit) in [
            (
                "PRECONDITION_FAILED - message size 300000 is larger than configured max size 200000",
                Some(200_000),
            ),
            (
                "PRECONDITION_FAILED - message size 600000000 is larger than max size 536870912",
                Some(536_870_912),
            ),
            (
                "PRECONDITION_FAILED - inequivalent arg 'x-max-age' for queue 'max size 7'",
                None,
            ),
            ("is larger than max size ", None),
        ] {
            assert_eq!(limit_in(message), limit, "{message}");
        }
    }
}
