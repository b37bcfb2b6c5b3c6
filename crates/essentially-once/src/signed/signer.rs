//! Signs and verifies single records.

use std::{fmt, sync::Arc};

use bytes::Bytes;
use hmac::Mac as _;

use super::keys::{Key, KeyedMac, Keys, is_key_id};
use crate::{Error, NewRecord, Origin, Record, backend::Header, name::validate};

/// The name of the header that holds a record's signature.
pub const SIGNATURE_HEADER: &str = "eo-signature";

/// The version of the header and of the signed bytes.
const VERSION: &str = "1";

/// Begins the signed bytes, so that no other use of a key signs the same ones.
const CONTEXT: &str = "essentially-once signature 1";

const MAC_BYTES: usize = 32;

/// Keys, and the log for which they sign. Clones share the keys.
///
/// [`Signed`](super::Signed) signs with it whatever is appended to a log. [`sign`](Self::sign)
/// signs a record that goes to its log by another way.
#[derive(Clone)]
pub struct Signer {
    audience: Arc<str>,
    keys: Arc<Keys>,
}

impl Signer {
    /// Signs with the keys, for the log or topic of this name. Senders and consumers state the same
    /// name. See [the module](super#the-audience).
    ///
    /// # Errors
    /// [`Error::InvalidName`] if `audience` breaks the rule for names, which is that of
    /// [`ConsumerId`](crate::ConsumerId).
    pub fn new(audience: impl AsRef<str>, keys: Keys) -> Result<Self, Error> {
        Ok(Self {
            audience: validate("audience", audience.as_ref())?,
            keys: Arc::new(keys),
        })
    }

    /// The record with its signature as one more header.
    ///
    /// Append it to a log that is *not* wrapped, or send it in a transaction whose records a relay
    /// takes to such a log.
    ///
    /// ```
    /// use essentially_once::signed::{Keys, SIGNATURE_HEADER, Signer};
    /// use essentially_once::{Epoch, NewRecord, Origin, ProducerId};
    ///
    /// # let secret = [7; 32];
    /// let signer = Signer::new("orders", Keys::new("2026-11", secret)?)?;
    /// let origin = Origin::new(ProducerId::new("billing")?, Epoch::STABLE, 1);
    /// let record = signer.sign(NewRecord::new("32.38").origin(origin))?;
    /// assert_eq!(record.headers[0].0, SIGNATURE_HEADER);
    /// # Ok::<(), essentially_once::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Failed`] if the record has no origin, or has a header of that name.
    pub fn sign(&self, record: NewRecord) -> Result<NewRecord, Error> {
        self.signed(record)
            .map_err(|reason| Error::failed(format!("sign a record for {}", self.audience), reason))
    }

    /// The record with its signature, or why it cannot be signed.
    pub(super) fn signed(&self, mut record: NewRecord) -> Result<NewRecord, String> {
        let origin = record.origin.as_ref().ok_or(
            "it has no origin, and only records with one are signed; set it with `NewRecord::origin`, or append the \
             record to a log without signatures",
        )?;
        if record.headers.iter().any(|(name, _)| name == SIGNATURE_HEADER) {
            return Err(format!(
                "it has a header `{SIGNATURE_HEADER}`, which is the signature's; rename or remove the header, or append \
                 a record that is signed already to the log without its wrapper"
            ));
        }
        let key = self.keys.signing();
        let content = Content {
            origin,
            key: record.key.as_ref(),
            headers: &record.headers,
            payload: &record.payload,
        };
        let mac = content.mac(key, &self.audience).finalize().into_bytes();
        let mac = base16ct::lower::encode_string(&mac);
        let signature = format!("{VERSION}:{}:{mac}", key.id);
        record.headers.push((SIGNATURE_HEADER.into(), signature.into()));
        Ok(record)
    }

    /// Checks the signature of a record whose headers no longer contain it. The error is the reason
    /// for an operator.
    pub(super) fn verify(&self, record: &Record, signature: &Bytes) -> Result<(), String> {
        let (id, mac) = parse(signature)?;
        let origin = record
            .origin
            .as_ref()
            .ok_or("the record has no origin, and all signed records have one")?;
        let key = self.keys.find(id).ok_or_else(|| {
            format!("the key {id:?} is unknown; add it to the keys if you trust it, and retry the record")
        })?;
        let content = Content {
            origin,
            key: record.key.as_ref(),
            headers: &record.headers,
            payload: &record.payload,
        };
        content.mac(key, &self.audience).verify_slice(&mac).map_err(|_| {
            format!(
                "the record was changed, or signed for another audience than {:?}, or with another key {id:?}",
                self.audience
            )
        })
    }
}

impl fmt::Debug for Signer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Signer")
            .field("audience", &self.audience)
            .field("keys", &self.keys)
            .finish()
    }
}

/// The key's id and the MAC in the value of a header. Every signature has one spelling, so that a
/// change of the header is detected too.
fn parse(signature: &[u8]) -> Result<(&str, [u8; MAC_BYTES]), String> {
    let invalid = || format!("the header `{SIGNATURE_HEADER}` is not `{VERSION}:<key id>:<64 hexadecimal digits>`");
    let text = str::from_utf8(signature).map_err(|_| invalid())?;
    let (version, rest) = text.split_once(':').ok_or_else(invalid)?;
    if version != VERSION {
        let is_number = (1..=3).contains(&version.len()) && version.bytes().all(|digit| digit.is_ascii_digit());
        return Err(match is_number {
            true => {
                format!("version {version} of the header `{SIGNATURE_HEADER}` is unknown; upgrade essentially-once")
            }
            false => invalid(),
        });
    }
    let (id, digits) = rest.split_once(':').ok_or_else(invalid)?;
    let mut mac = [0; MAC_BYTES];
    let decoded = base16ct::lower::decode(digits, &mut mac).map_err(|_| invalid())?;
    if decoded.len() != MAC_BYTES || !is_key_id(id) {
        return Err(invalid());
    }
    Ok((id, mac))
}

/// What is signed of a record.
struct Content<'a> {
    origin: &'a Origin,
    key: Option<&'a Bytes>,
    headers: &'a [Header],
    payload: &'a Bytes,
}

impl Content<'_> {
    /// The MAC over the bytes that the module's documentation describes. No two records have the
    /// same bytes, because the length of each part precedes it.
    fn mac(&self, key: &Key, audience: &str) -> KeyedMac {
        let mut mac = key.mac.clone();
        put(&mut mac, CONTEXT);
        put(&mut mac, &*key.id);
        put(&mut mac, audience);
        let numbering = &self.origin.numbering;
        put(&mut mac, numbering.producer().as_str());
        put_number(&mut mac, numbering.epoch().get());
        put_number(&mut mac, self.origin.sequence);
        mac.update(&[self.key.is_some().into()]);
        if let Some(key) = self.key {
            put(&mut mac, key);
        }
        put_number(&mut mac, self.headers.len() as u64);
        for (name, value) in self.headers {
            put(&mut mac, name);
            put(&mut mac, value);
        }
        put(&mut mac, self.payload);
        mac
    }
}

fn put(mac: &mut KeyedMac, bytes: impl AsRef<[u8]>) {
    let bytes = bytes.as_ref();
    put_number(mac, bytes.len() as u64);
    mac.update(bytes);
}

fn put_number(mac: &mut KeyedMac, number: u64) {
    mac.update(&number.to_be_bytes());
}
