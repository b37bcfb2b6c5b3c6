//! The encoding of numbers, byte strings and names in entries and snapshots: big-endian, and byte
//! strings after their length as a u32.

use std::ops::{Deref, DerefMut};

use bytes::{BufMut as _, Bytes};
use essentially_once::{
    Offset,
    backend::{ByteReader, LogId, Numbering, Revision, Window},
};

/// A decoded value, or why it cannot be decoded.
pub(super) type Decoded<T> = Result<T, &'static str>;

pub(super) fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    // The limits keep every length far below 4 GiB.
    out.put_u32(bytes.len() as u32);
    out.put_slice(bytes);
}

pub(super) fn put_log(out: &mut Vec<u8>, log: &LogId) {
    put_bytes(out, log.name().as_bytes());
    // An incarnation is never empty.
    put_bytes(out, log.incarnation().unwrap_or_default().as_bytes());
}

pub(super) fn put_offset(out: &mut Vec<u8>, offset: Offset) {
    out.put_u64(offset.hi());
    out.put_u64(offset.lo());
}

pub(super) fn put_revision(out: &mut Vec<u8>, revision: Revision) {
    out.put_u64(revision.epoch());
    out.put_u64(revision.count());
}

pub(super) fn put_numbering(out: &mut Vec<u8>, numbering: &Numbering) {
    put_bytes(out, numbering.to_string().as_bytes());
}

pub(super) fn put_window(out: &mut Vec<u8>, numbering: &Numbering, window: &Window) {
    put_numbering(out, numbering);
    put_bytes(out, &window.encode());
}

/// Bytes of a window in version 1, where no length preceded it.
const WINDOW_1: usize = 169;

/// Decodes from the front. Byte strings share the memory of the whole.
pub(super) struct Reader {
    bytes: ByteReader,
}

impl Deref for Reader {
    type Target = ByteReader;

    fn deref(&self) -> &ByteReader {
        &self.bytes
    }
}

impl DerefMut for Reader {
    fn deref_mut(&mut self) -> &mut ByteReader {
        &mut self.bytes
    }
}

impl Reader {
    pub(super) fn new(bytes: Bytes) -> Self {
        Self {
            bytes: ByteReader::new(bytes),
        }
    }

    pub(super) fn numbering(&mut self) -> Decoded<Numbering> {
        let name = self.bytes()?;
        let name = str::from_utf8(&name).map_err(|_| "a producer's name is not UTF-8")?;
        name.parse().map_err(|_| "a producer's name breaks the rule for names")
    }

    /// A revision; version 1 had no epochs.
    pub(super) fn revision(&mut self, version: u8) -> Decoded<Revision> {
        let epoch = if version == 1 { 0 } else { self.u64()? };
        Ok(Revision::new(epoch, self.u64()?))
    }

    pub(super) fn log(&mut self) -> Decoded<LogId> {
        const BROKEN: &str = "a log's name breaks the rule for names";
        let (name, incarnation) = (self.bytes()?, self.bytes()?);
        let text = |bytes| str::from_utf8(bytes).map_err(|_| BROKEN);
        let incarnation = Some(text(&incarnation)?).filter(|incarnation| !incarnation.is_empty());
        LogId::from_parts(text(&name)?, incarnation).map_err(|_| BROKEN)
    }

    pub(super) fn offset(&mut self) -> Decoded<Offset> {
        Ok(Offset::new(self.u64()?, self.u64()?))
    }

    pub(super) fn window(&mut self, version: u8) -> Decoded<(Numbering, Window)> {
        let numbering = self.numbering()?;
        let bytes = if version == 1 {
            self.take(WINDOW_1)?
        } else {
            self.bytes()?
        };
        let window = Window::decode(&bytes).map_err(|_| "a window of an unknown version")?;
        Ok((numbering, window))
    }

    /// A count, then that many items. Nothing is reserved for them, since the count may be wrong.
    pub(super) fn list<T>(&mut self, mut item: impl FnMut(&mut Self) -> Decoded<T>) -> Decoded<Vec<T>> {
        let count = self.u32()?;
        (0..count).map(|_| item(self)).collect()
    }

    pub(super) fn finish(self) -> Decoded<()> {
        if self.is_empty() {
            Ok(())
        } else {
            Err("bytes follow its end")
        }
    }
}
