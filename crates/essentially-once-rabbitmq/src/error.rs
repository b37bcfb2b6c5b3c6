//! What an error of the client library says about what happened.

use essentially_once::Error;
use lapin::{
    ErrorKind,
    protocol::{AMQPErrorKind, AMQPHardError, AMQPSoftError},
};

/// The failure of something that changes nothing, or that was not begun.
pub(crate) fn not_done(action: String, error: lapin::Error) -> Error {
    match lasting(&error) {
        Some(advice) => Error::failed(action, explained(&error, advice)),
        None => Error::unavailable(action, error),
    }
}

/// The failure of something that may have been done.
pub(crate) fn in_doubt(action: String, error: lapin::Error) -> Error {
    Error::indeterminate(action, error)
}

/// Whether the broker knows no queue of that name.
pub(crate) fn is_not_found(error: &lapin::Error) -> bool {
    match error.kind() {
        ErrorKind::ProtocolError(told) => {
            *told.kind() == AMQPErrorKind::Soft(AMQPSoftError::NOTFOUND) && !is_down(told.get_message().as_str())
        }
        _ => false,
    }
}

/// The largest message that the broker takes, if it closed the channel because of a larger one.
pub(crate) fn message_limit(error: &lapin::Error) -> Option<usize> {
    match error.kind() {
        ErrorKind::ProtocolError(told) => limit_in(told.get_message().as_str()),
        _ => None,
    }
}

/// Reads "message size 300000 is larger than configured max size 200000"; the broker leaves out "configured" where the
/// limit is the largest that it knows.
fn limit_in(message: &str) -> Option<usize> {
    let (_, behind) = message.split_once("is larger than ")?;
    let (_, limit) = behind.split_once("max size ")?;
    let digits = limit.find(|c: char| !c.is_ascii_digit()).unwrap_or(limit.len());
    limit[..digits].parse().ok()
}

/// What a user can do about it, if it will not go away by itself.
fn lasting(error: &lapin::Error) -> Option<&'static str> {
    let told = match error.kind() {
        ErrorKind::ProtocolError(told) => told,
        #[cfg(feature = "tls")]
        ErrorKind::IOError(error) => return tls(error),
        _ => return None,
    };
    match told.kind() {
        AMQPErrorKind::Soft(AMQPSoftError::ACCESSREFUSED) => {
            Some("check the URL's user, password and virtual host, and the user's rights (configure, write, read)")
        }
        // A stream whose nodes are down is `not found` too, until they are up again.
        AMQPErrorKind::Soft(AMQPSoftError::NOTFOUND) if is_down(told.get_message().as_str()) => None,
        AMQPErrorKind::Soft(AMQPSoftError::NOTFOUND) => Some("it does not exist, or was deleted"),
        // So says a node whose streams are not up yet.
        AMQPErrorKind::Soft(AMQPSoftError::PRECONDITIONFAILED) if is_down(told.get_message().as_str()) => None,
        // So ends a channel on which too long nothing was acknowledged; another one is as good as new.
        AMQPErrorKind::Soft(AMQPSoftError::PRECONDITIONFAILED)
            if told.get_message().as_str().contains("delivery acknowledgement") =>
        {
            None
        }
        AMQPErrorKind::Soft(AMQPSoftError::PRECONDITIONFAILED) => {
            Some("it exists with other arguments: ask for the same ones, or choose another name")
        }
        AMQPErrorKind::Hard(AMQPHardError::NOTALLOWED) => {
            Some("check the URL's virtual host and the user's rights to it")
        }
        AMQPErrorKind::Hard(AMQPHardError::NOTIMPLEMENTED) => Some("streams need RabbitMQ 3.9 or later"),
        _ => None,
    }
}

/// What is wrong with certificates does not pass; other failures of TLS may.
#[cfg(feature = "tls")]
fn tls(error: &std::io::Error) -> Option<&'static str> {
    use rustls::{AlertDescription as Alert, Error, InvalidMessage, pki_types::pem};
    let error = error.get_ref()?;
    let no_pair = Some("check `client_certificate`: it takes a certificate and its own key, in PEM format");
    if error.is::<pem::Error>() {
        return no_pair;
    }
    match error.downcast_ref()? {
        Error::InvalidCertificate(_) => Some(
            "set `root_certificate` to the authority's (PEM) that signed the broker's certificate, and name the broker in the URL as its \
             certificate does",
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
        Error::NoCertificatesPresented | Error::InconsistentKeys(_) => no_pair,
        Error::InvalidMessage(InvalidMessage::InvalidContentType) => {
            Some("what answers does not speak TLS: use the broker's port for TLS, or amqp://")
        }
        _ => None,
    }
}

fn is_down(message: &str) -> bool {
    [
        "down or inaccessible",
        "stopped by supervisor",
        "not available",
        "replica on the local node",
    ]
    .iter()
    .any(|down| message.contains(down))
}

fn explained(error: &lapin::Error, advice: &str) -> String {
    match error.kind() {
        ErrorKind::ProtocolError(told) => format!("{}; {advice}", told.get_message()),
        _ => format!("{error}; {advice}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
