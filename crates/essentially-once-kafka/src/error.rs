//! What an error of the client library says about whether records were appended.

use std::fmt;

use essentially_once::Error;
use rdkafka::error::{KafkaError, RDKafkaErrorCode as Code};

use crate::connection::Complaint;

/// An error of the client library, and what the client last complained about.
#[derive(Debug)]
pub(crate) struct Fault {
    error: Option<KafkaError>,
    complaint: Option<Complaint>,
}

impl Fault {
    pub(crate) fn new(error: KafkaError, complaint: Option<Complaint>) -> Self {
        Self {
            error: Some(error),
            complaint,
        }
    }

    /// The runtime that should have asked is shutting down.
    pub(crate) fn ended() -> Self {
        Self {
            error: None,
            complaint: Some(Complaint {
                code: None,
                reason: "the runtime is shutting down".into(),
            }),
        }
    }

    pub(crate) fn code(&self) -> Option<Code> {
        self.error.as_ref().and_then(KafkaError::rdkafka_error_code)
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let complaint = self.complaint.as_ref().map(|complaint| &complaint.reason);
        match (&self.error, complaint) {
            (Some(error), Some(complaint)) => write!(f, "{error}; the client reported: {complaint}"),
            (Some(error), None) => write!(f, "{error}"),
            (None, Some(complaint)) => write!(f, "{complaint}"),
            (None, None) => write!(f, "no answer"),
        }
    }
}

/// What a broker or the client refuses, and why.
struct Refusal {
    is_transient: bool,
    advice: Option<&'static str>,
}

/// The codes with which a request is refused as a whole, so that it has had no effect.
fn refusal(code: Code) -> Option<Refusal> {
    let refused = |is_transient, advice| Some(Refusal { is_transient, advice });
    match code {
        Code::TopicAuthorizationFailed => refused(false, Some("grant the user Read, Write and Describe on the topic")),
        Code::GroupAuthorizationFailed => refused(false, Some("grant the user Read on the group `essentially-once`")),
        Code::ClusterAuthorizationFailed => refused(false, Some("grant the user IdempotentWrite on the cluster")),
        Code::TransactionalIdAuthorizationFailed => refused(
            false,
            Some("grant the user Write and Describe on the transactional ids that begin with `essentially-once-`"),
        ),
        Code::SaslAuthenticationFailed | Code::UnsupportedSASLMechanism | Code::Authentication => {
            refused(false, Some("check the URL's user and password, and `sasl.mechanism`"))
        }
        Code::SSL => refused(
            false,
            Some(
                "check `ssl.ca.location` and the client's certificate; the URL of a port without TLS begins with kafka://",
            ),
        ),
        Code::UnknownTopicOrPartition | Code::UnknownTopic | Code::UnknownPartition => {
            refused(false, Some("the topic or the partition does not exist: create it"))
        }
        Code::MessageSizeTooLarge | Code::MessageBatchTooLarge => refused(
            false,
            Some("raise `max.message.bytes` of the topic, or lower `KafkaOptions::record_limit`"),
        ),
        Code::TopicAlreadyExists => refused(true, None),
        Code::PolicyViolation | Code::InvalidTopic | Code::InvalidRecord | Code::InvalidConfig => refused(false, None),
        Code::NotEnoughReplicas => refused(
            true,
            Some("fewer replicas are in sync than the topic's `min.insync.replicas` requires"),
        ),
        Code::PurgeQueue | Code::QueueFull => refused(true, None),
        _ => None,
    }
}

/// Whether this error says that the record was not appended.
pub(crate) fn is_refused(error: &KafkaError) -> bool {
    error.rdkafka_error_code().and_then(refusal).is_some()
}

/// The failure to connect. A client whose password or certificate is refused tries again until its
/// time is up, and only its complaint says why.
pub(crate) fn not_connected(action: String, fault: Fault) -> Error {
    let (code, reason) = match &fault.complaint {
        // The client does not always see that this is about TLS.
        Some(Complaint { reason, .. }) if reason.contains("certificate verify failed") => (Some(Code::SSL), &**reason),
        Some(Complaint { code, reason }) => (*code, &**reason),
        None => (None, ""),
    };
    if let Some(refusal) = code.and_then(refusal) {
        return refusal.into_error(action, &fault);
    }
    // A broker closes the connection of a client that does not speak TLS, or that must say who it
    // is. How the client notices depends on who is faster.
    let closed = ["Disconnected", "Send failed", "Receive failed"];
    let advice = if reason.contains("PLAINTEXT") {
        "the URL of a port without TLS begins with kafka://"
    } else if closed.iter().any(|closed| reason.contains(closed)) {
        "if the port requires TLS or a user, name them in the URL: kafkas:// or user:password@; if it requires the \
         client's certificate, set `ssl.certificate.location` and `ssl.key.location`"
    } else {
        return read_failed(action, fault);
    };
    Error::unavailable(action, format!("{fault}; {advice}"))
}

/// The failure of a request that changes nothing.
pub(crate) fn read_failed(action: String, fault: Fault) -> Error {
    match fault.code().and_then(refusal) {
        Some(refusal) => refusal.into_error(action, &fault),
        None => Error::unavailable(action, fault.to_string()),
    }
}

/// The failure of a request that may have appended or removed records.
pub(crate) fn write_failed(action: String, fault: Fault) -> Error {
    match fault.code().and_then(refusal) {
        Some(refusal) => refusal.into_error(action, &fault),
        None => Error::indeterminate(action, fault.to_string()),
    }
}

impl Refusal {
    fn into_error(self, action: String, fault: &Fault) -> Error {
        let source = match self.advice {
            Some(advice) => format!("{fault}; {advice}"),
            None => fault.to_string(),
        };
        match self.is_transient {
            true => Error::unavailable(action, source),
            false => Error::failed(action, source),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_refused_is_certain() {
        let fault = |code| Fault::new(KafkaError::MessageProduction(code), None);
        for code in [
            Code::MessageTimedOut,
            Code::NotEnoughReplicasAfterAppend,
            Code::OperationTimedOut,
            Code::PurgeInflight,
        ] {
            assert!(
                matches!(write_failed("append".into(), fault(code)), Error::Indeterminate { .. }),
                "{code:?}"
            );
            assert!(read_failed("read".into(), fault(code)).is_transient(), "{code:?}");
        }
        for (code, is_transient) in [
            (Code::TopicAuthorizationFailed, false),
            (Code::MessageSizeTooLarge, false),
            (Code::NotEnoughReplicas, true),
        ] {
            let error = write_failed("append".into(), fault(code));
            assert!(!matches!(error, Error::Indeterminate { .. }), "{error}");
            assert_eq!(error.is_transient(), is_transient, "{error}");
        }
    }
}
