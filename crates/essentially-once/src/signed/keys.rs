//! Keys by id.

use std::{fmt, path::Path, sync::Arc};

use hmac::{Hmac, KeyInit as _};
use sha2::Sha256;

use super::key_file;
use crate::Error;

pub(super) type KeyedMac = Hmac<Sha256>;

/// The fewest bytes of a key: those of a MAC. RFC 2104 discourages shorter ones.
const MIN_BYTES: usize = 32;

/// A hexadecimal key has at least 64 digits, so no key is a valid id.
const MAX_ID_BYTES: usize = 32;

/// The keys of a [`Signer`](super::Signer), each with an id: one that signs, and others that are
/// accepted.
///
/// A signature names its key by the id. An id has 1 to 32 ASCII letters, digits, `.`, `_` or `-`.
/// Do not use an id for another key later. A key has at least 32 bytes, which must come from a
/// random source. Neither `Debug` nor an error shows the bytes of a key.
///
/// [The module](super#keys) describes how to replace a key.
///
/// ```
/// use essentially_once::signed::Keys;
///
/// # let (old, new) = ([7; 32], [8; 32]);
/// let keys = Keys::new("2026-12", new)?.accept("2026-11", old)?;
/// assert_eq!(format!("{keys:?}"), r#"Keys { signing: "2026-12", accepted: ["2026-11"] }"#);
/// # Ok::<(), essentially_once::Error>(())
/// ```
#[derive(Clone)]
pub struct Keys {
    signing: Key,
    accepted: Vec<Key>,
}

/// A key, ready to compute a MAC.
#[derive(Clone)]
pub(super) struct Key {
    pub(super) id: Arc<str>,
    pub(super) mac: KeyedMac,
}

impl Keys {
    /// One key, which signs and is accepted.
    ///
    /// # Errors
    /// [`Error::InvalidSetting`] if the id or the key breaks a rule.
    pub fn new(id: impl AsRef<str>, key: impl AsRef<[u8]>) -> Result<Self, Error> {
        let signing = Key::new(id.as_ref(), key.as_ref()).map_err(invalid)?;
        Ok(Self::of(signing))
    }

    /// Also accepts signatures of this key.
    ///
    /// # Errors
    /// [`Error::InvalidSetting`] if the id or the key breaks a rule, or if another key has this id.
    pub fn accept(mut self, id: impl AsRef<str>, key: impl AsRef<[u8]>) -> Result<Self, Error> {
        let key = Key::new(id.as_ref(), key.as_ref()).map_err(invalid)?;
        if self.find(&key.id).is_some() {
            return Err(invalid(format!(
                "two keys have the id {:?}; give each key an id of its own",
                key.id
            )));
        }
        self.accepted.push(key);
        Ok(self)
    }

    /// Reads keys from a text file. The first one signs, and the others are accepted. The call
    /// blocks while it reads the file.
    ///
    /// Each line is `<id> = <key>`, where the key has at least 64 hexadecimal digits, as
    /// `openssl rand -hex 32` prints them. Empty lines and lines that begin with `#` are skipped.
    /// White space around an id and a key does not count.
    ///
    /// ```
    /// use essentially_once::signed::Keys;
    ///
    /// # let folder = tempfile::tempdir()?;
    /// # let path = folder.path().join("signing-keys");
    /// # #[cfg(unix)]
    /// # use std::os::unix::fs::OpenOptionsExt as _;
    /// # let mut options = std::fs::OpenOptions::new();
    /// # #[cfg(unix)]
    /// # options.mode(0o600);
    /// # let file = options.write(true).create_new(true).open(&path)?;
    /// let text = "\
    /// ## The first key signs.
    /// 2026-12 = e6b59d3bbf1f35a4dd4bc0e2ab62d2d4c9ac9f85a07ab1ee46fcea6f33ba4d85
    /// 2026-11 = 4fd0eb4cb2ea83d97d6d22a1d07d4e4b8b1b5ed4d9f38f8ea9d6d1d4dd2bb5a7
    /// ";
    /// # std::io::Write::write_all(&mut &file, text.as_bytes())?;
    /// let keys = Keys::from_file(&path)?;
    /// assert_eq!(format!("{keys:?}"), r#"Keys { signing: "2026-12", accepted: ["2026-11"] }"#);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// - [`Error::Failed`] if the file cannot be read.
    /// - [`Error::InvalidSetting`] if its group or others have any right to the file (on Unix), if
    ///   it is over 64 KiB, if it has no key, or if a line breaks a rule. The text names the file
    ///   and the line. It never repeats what the line says.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self, Error> {
        key_file::read(path.as_ref())
    }

    pub(super) fn of(signing: Key) -> Self {
        let accepted = Vec::new();
        Self { signing, accepted }
    }

    /// Adds an accepted key whose id no other key has.
    pub(super) fn push(&mut self, key: Key) {
        self.accepted.push(key);
    }

    /// The key that signs.
    pub(super) fn signing(&self) -> &Key {
        &self.signing
    }

    /// The key with this id.
    pub(super) fn find(&self, id: &str) -> Option<&Key> {
        std::iter::once(&self.signing)
            .chain(&self.accepted)
            .find(|key| &*key.id == id)
    }
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let accepted: Vec<_> = self.accepted.iter().map(|key| &key.id).collect();
        f.debug_struct("Keys")
            .field("signing", &self.signing.id)
            .field("accepted", &accepted)
            .finish()
    }
}

impl Key {
    /// The key, or the rule that it breaks. The reason repeats neither the id nor the key, since a
    /// caller may have exchanged them.
    pub(super) fn new(id: &str, key: &[u8]) -> Result<Self, String> {
        if !is_key_id(id) {
            return Err(format!(
                "the id of the key is invalid; use 1 to {MAX_ID_BYTES} ASCII letters, digits, `.`, `_` or `-`"
            ));
        }
        if key.len() < MIN_BYTES {
            return Err(format!(
                "the key has {} bytes, and fewer than {MIN_BYTES} are not safe; make one with `openssl rand -hex 32`",
                key.len()
            ));
        }
        // HMAC takes keys of any length.
        let mac = KeyedMac::new_from_slice(key).map_err(|error| error.to_string())?;
        Ok(Self { id: id.into(), mac })
    }
}

/// Whether this is how a key may be called.
pub(super) fn is_key_id(id: &str) -> bool {
    let is_allowed = |c: u8| c.is_ascii_alphanumeric() || b"._-".contains(&c);
    (1..=MAX_ID_BYTES).contains(&id.len()) && id.bytes().all(is_allowed)
}

fn invalid(reason: String) -> Error {
    Error::InvalidSetting {
        setting: "signing key",
        reason,
    }
}
