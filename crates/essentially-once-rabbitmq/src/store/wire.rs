//! The encoding of numbers, byte strings and names in entries and snapshots: big-endian, and byte
//! strings after their length as a u32.

use bytes::{BufMut as _, Bytes};
use essentially_once::{
    Offset,
    backend::{LogId, Numbering, Revision, Window},
};

/// A decoded value, or why it cannot be decoded.
pub(super) type Decoded<T> = Result<T, &'static str>;

const CUT_SHORT: &str = "it is cut short";

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
    rest: Bytes,
}

impl Reader {
    pub(super) fn new(bytes: Bytes) -> Self {
        Self { rest: bytes }
    }

    fn take(&mut self, length: usize) -> Decoded<Bytes> {
        if length > self.rest.len() {
            return Err(CUT_SHORT);
        }
        Ok(self.rest.split_to(length))
    }

    fn array<const N: usize>(&mut self) -> Decoded<[u8; N]> {
        let (array, _) = self.rest.split_first_chunk::<N>().ok_or(CUT_SHORT)?;
        let array = *array;
        self.take(N)?;
        Ok(array)
    }

    pub(super) fn u8(&mut self) -> Decoded<u8> {
        self.array().map(u8::from_be_bytes)
    }

    pub(super) fn u32(&mut self) -> Decoded<u32> {
        self.array().map(u32::from_be_bytes)
    }

    pub(super) fn u64(&mut self) -> Decoded<u64> {
        self.array().map(u64::from_be_bytes)
    }

    pub(super) fn u128(&mut self) -> Decoded<u128> {
        self.array().map(u128::from_be_bytes)
    }

    pub(super) fn bytes(&mut self) -> Decoded<Bytes> {
        let length = self.u32()?;
        self.take(length as usize)
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
        let log = LogId::new(text(&name)?).map_err(|_| BROKEN)?;
        match text(&incarnation)? {
            "" => Ok(log),
            incarnation => log.with_incarnation(incarnation).map_err(|_| BROKEN),
        }
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

    pub(super) fn rest(self) -> Bytes {
        self.rest
    }

    pub(super) fn finish(self) -> Decoded<()> {
        if self.rest.is_empty() {
            Ok(())
        } else {
            Err("bytes follow its end")
        }
    }
}
