//! Records with a signature, so that a reader notices what somebody changed in the log's backend.
//!
//! [`Signed`] wraps a log. It signs the records that it appends and verifies those that it reads. A
//! record whose signature is missing or wrong is [`malformed`](Record::malformed): no handler gets
//! it, and the consumer stops at it, skips it or keeps it as a dead letter. The module needs the
//! feature `signed`.
//!
//! ```
//! use essentially_once::backend::LogReader;
//! use essentially_once::memory::Memory;
//! use essentially_once::signed::{Keys, Signed, Signer};
//! use essentially_once::{Epoch, Log, NewRecord, Offset, Origin, ProducerId};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), essentially_once::Error> {
//! # let secret = [7; 32];
//! let backend = Memory::new().log("orders")?;
//! let signer = Signer::new("orders", Keys::new("2026-11", secret)?)?;
//! let orders = Signed::new(backend.clone(), signer);
//! let web = ProducerId::new("web")?;
//! let order = NewRecord::new("32.38").origin(Origin::new(web, Epoch::fresh(), 1));
//! orders.append(&[order.clone()]).await?;
//! backend.append(&[order]).await?; // somebody without the key
//!
//! let records = orders.read(Offset::ZERO).await?.next(10).await?;
//! assert_eq!(records[0].malformed, None);
//! let reason = records[1].malformed.as_deref();
//! assert_eq!(reason, Some("signature refused: the record has no header `eo-signature`"));
//! # Ok(())
//! # }
//! ```
//!
//! # What a signature detects
//!
//! | detected | not detected |
//! |---|---|
//! | a change of the payload, the key, a header, the order of headers, or the origin | a change of the append time or the offset, which the log assigns |
//! | a record inserted by somebody without a key | a record deleted, held back, or put in another order |
//! | a record moved from a log of another audience | a record moved between logs of one audience |
//!
//! The wrapper accepts a copy of a signed record. The consumer drops it as a duplicate, for as long
//! as it [remembers the producer](crate::Consumer::forget_producers_after).
//!
//! All who have a key can sign. Signatures do not show which of them did, and payloads are not
//! encrypted. A signature does not repair a record either: if the append was acknowledged, only the
//! sender can send the record again.
//!
//! Only records with an [`Origin`](crate::Origin) are signed. Without it, a copy would have as good
//! a signature as the first one.
//!
//! # The audience
//!
//! The audience is the name of the log for which records are meant, such as `orders`. It is part of
//! what is signed. It is not sent, so both sides state it. A record may pass other logs on its way:
//! a relay that copies records with their headers between logs that are not wrapped needs no key,
//! and leaves the signature intact. Use [`Signer::sign`] for records that first go somewhere else,
//! for example into an outbox. Systems that share keys, such as production and staging, need
//! different audiences.
//!
//! # Keys
//!
//! [`Keys`] hold one key that signs, and any number of others that are accepted. To replace the key
//! that signs:
//!
//! 1. Add the new key everywhere as an accepted one, and restart.
//! 2. Make it the key that signs wherever records are appended.
//! 3. Remove the old key, once every consumer has passed a record of *every sender* that was signed
//!    with the new one, and no outbox, relay or dead letter holds a record that was signed with the
//!    old one.
//!
//! A consumer compares the last record that it handled with the log when it starts. If the key of
//! that record is gone, it ends with [`Error::LogChanged`]. A `seek` to an earlier place meets
//! records of removed keys as malformed ones, and refuses if one of them is a dead letter. Keep old
//! keys as accepted ones for as long as somebody may read that far back.
//!
//! A record whose key is gone is malformed, even if it is a copy of one that was handled.
//!
//! A record that arrives before its key is malformed. With
//! [dead letters](crate::Consumer::dead_letters), restart the consumer with the key, and
//! [retry](crate::consumer::dead_letters::retry) the letter: it is verified again and handled.
//!
//! # Signatures for a log that has none
//!
//! 1. Wrap the log in all consumers, with
//!    [`unsigned_below(Offset::MAX)`](Signed::unsigned_below). Now they accept signed records and
//!    unsigned ones.
//! 2. Wrap the log in all senders. Their records need origins.
//! 3. Set `unsigned_below` to the log's [end](crate::backend::Bounds::end), and never change it
//!    again, except to lower it if the log is deleted and created again. Below that offset, anybody
//!    can still alter or insert records: a record whose signature was removed is accepted there.
//!    Its origin counts too, so a forged one makes consumers take later records of that producer
//!    for duplicates. They warn when they drop one.
//!
//! A consumer that reads signed records from the bare log hands the header `eo-signature` to its
//! handler. If it is wrapped later, it ends once with [`Error::LogChanged`], since the record that
//! it handled last had that header. `seek` it as the error says.
//!
//! Operators pass the wrapped log to [`skip`](crate::skip) and [`seek`](crate::seek). An edited
//! letter is handled without its signature, since the store says who edited it, but a relay must
//! not pass it on.
//!
//! # The format
//!
//! The signature is one more header, `eo-signature`, behind the others. It is text:
//! `1:<key id>:<MAC>`, where 1 is the version and the MAC has 64 lower-case hexadecimal digits. It
//! adds 79 bytes and the key's id to the record, and counts towards the record limit of the wrapped
//! log.
//!
//! The MAC is HMAC-SHA256 (RFC 2104, FIPS 180-4) over these values. Numbers have 8 bytes, the most
//! significant first. Texts and byte strings follow their length, a number.
//!
//! 1. The text `essentially-once signature 1`.
//! 2. The key's id and the audience.
//! 3. The origin: producer, epoch, sequence. The stable epoch is 0.
//! 4. A byte that is 1 if the record has a key, and then the key; otherwise 0.
//! 5. The number of headers without the signature, and the name and value of each in order.
//! 6. The payload.

mod key_file;
mod keys;
mod signer;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use async_trait::async_trait;

pub use self::{
    keys::Keys,
    signer::{SIGNATURE_HEADER, Signer},
};
use crate::{Bounds, Durability, Error, Log, LogId, LogReader, NewRecord, Offset, Record};

/// How the reason begins if this wrapper refused a record. [`Log::decode`] finds by it whether the
/// wrapped log or the wrapper made a record malformed. Dead letters keep it, so it never changes.
const REFUSED: &str = "signature refused: ";

/// A log that signs the records that it appends, and verifies those that it reads. See the
/// [module](self).
///
/// - A record that it accepts is yielded without the signature's header.
/// - A record that it refuses is yielded with the reason in [`malformed`](Record::malformed). Its
///   key, headers (the signature's too), origin and payload are as the wrapped log yielded them,
///   and must not be trusted.
/// - A record that the wrapped log could not decode passes unchanged.
///
/// [`Log::decode`] verifies a refused record again, with the keys and the bound of now.
///
/// Do not wrap a log twice. The inner wrapper refuses the header of the outer one.
#[derive(Clone, Debug)]
pub struct Signed<L> {
    log: L,
    verifier: Verifier,
}

impl<L: Log> Signed<L> {
    /// The log with signatures.
    pub fn new(log: L, signer: Signer) -> Self {
        let unsigned_below = Offset::ZERO;
        Self {
            log,
            verifier: Verifier { signer, unsigned_below },
        }
    }

    /// Accepts records without a signature below this offset; none by default. A record with a
    /// wrong signature is refused everywhere.
    ///
    /// It is for a log that is older than its signatures. Set it once, to the log's end at the time
    /// when the last sender began to sign. See
    /// [the module](self#signatures-for-a-log-that-has-none).
    #[must_use]
    pub fn unsigned_below(mut self, offset: Offset) -> Self {
        self.verifier.unsigned_below = offset;
        self
    }
}

#[async_trait]
impl<L: Log> Log for Signed<L> {
    fn id(&self) -> &LogId {
        self.log.id()
    }

    /// Signs the records and appends them to the wrapped log.
    ///
    /// # Errors
    /// - [`Error::Failed`] if a record has no origin, or has a header `eo-signature`. No record was
    ///   appended.
    /// - [`Error::TooLarge`] if a record is over the limit *with* its signature.
    /// - The errors of the wrapped log otherwise.
    async fn append(&self, records: &[NewRecord]) -> Result<Option<Offset>, Error> {
        let refused = |place: usize, reason: String| {
            let (log, count) = (self.id(), records.len());
            Error::failed(format!("sign record {place} of {count} for log {log}"), reason)
        };
        let signed: Result<Vec<_>, _> = (1..)
            .zip(records)
            .map(|(place, record)| {
                let signed = self.verifier.signer.signed(record.clone());
                signed.map_err(|reason| refused(place, reason))
            })
            .collect();
        self.log.append(&signed?).await
    }

    async fn read(&self, from: Offset) -> Result<Box<dyn LogReader>, Error> {
        Ok(Box::new(SignedReader {
            reader: self.log.read(from).await?,
            verifier: self.verifier.clone(),
        }))
    }

    async fn bounds(&self) -> Result<Bounds, Error> {
        self.log.bounds().await
    }

    async fn readable_end(&self) -> Result<Offset, Error> {
        self.log.readable_end().await
    }

    async fn count_from(&self, from: Offset) -> Result<Option<u64>, Error> {
        self.log.count_from(from).await
    }

    async fn tail(&self, count: u64) -> Result<Option<Offset>, Error> {
        self.log.tail(count).await
    }

    /// Verifies a record again that the wrapper refused. If the wrapped log could not decode the
    /// record, it decodes it again first.
    fn decode(&self, malformed: &Record) -> Option<Record> {
        let reason = malformed.malformed.as_deref()?;
        let decoded = if reason.starts_with(REFUSED) {
            let mut decoded = malformed.clone();
            decoded.malformed = None;
            decoded
        } else {
            self.log.decode(malformed)?
        };
        let verified = self.verifier.verify(decoded);
        if let Some(reason) = &verified.malformed {
            tracing::warn!(log = %self.id(), offset = %verified.offset, %reason, "a record still cannot be decoded");
            return None;
        }
        Some(verified)
    }

    async fn remove_before(&self, offset: Offset) -> Result<u64, Error> {
        self.log.remove_before(offset).await
    }

    async fn durability(&self) -> Result<Durability, Error> {
        self.log.durability().await
    }
}

struct SignedReader {
    reader: Box<dyn LogReader>,
    verifier: Verifier,
}

#[async_trait]
impl LogReader for SignedReader {
    async fn next(&mut self, max: usize) -> Result<Vec<Record>, Error> {
        // No await follows, so a dropped call loses no record.
        let records = self.reader.next(max).await?;
        Ok(records.into_iter().map(|record| self.verifier.verify(record)).collect())
    }
}

/// Decides which records are accepted.
#[derive(Clone, Debug)]
struct Verifier {
    signer: Signer,
    unsigned_below: Offset,
}

impl Verifier {
    /// The record without its signature if it is accepted, and as it is with the reason otherwise.
    fn verify(&self, mut record: Record) -> Record {
        if record.malformed.is_none()
            && let Err(reason) = self.accept(&mut record)
        {
            record.malformed = Some(Arc::from(format!("{REFUSED}{reason}")));
        }
        record
    }

    /// Takes the signature from a record, unless it is refused.
    fn accept(&self, record: &mut Record) -> Result<(), String> {
        let is_signature = |(name, _): &(String, _)| name == SIGNATURE_HEADER;
        let Some(place) = record.headers.iter().position(is_signature) else {
            return match record.offset < self.unsigned_below {
                true => Ok(()),
                false => Err(format!("the record has no header `{SIGNATURE_HEADER}`")),
            };
        };
        // A second one would stay among the headers, and the MAC would not match. This reason says
        // more.
        if record.headers[place + 1..].iter().any(is_signature) {
            return Err(format!("the record has more than one header `{SIGNATURE_HEADER}`"));
        }
        let header = record.headers.remove(place);
        let verified = self.signer.verify(record, &header.1);
        if verified.is_err() {
            record.headers.insert(place, header);
        }
        verified
    }
}
