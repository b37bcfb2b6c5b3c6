use std::fmt;

use bytes::Bytes;

/// Reads numbers and byte strings from the front of stored bytes. The byte strings share the memory
/// of the whole.
///
/// It never panics, whatever the bytes contain, and never allocates memory by a length that it
/// reads.
#[derive(Clone, Debug)]
pub struct ByteReader {
    rest: Bytes,
}

/// The bytes end before the value does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CutShort;

impl ByteReader {
    /// A reader at the first byte.
    pub const fn new(bytes: Bytes) -> Self {
        Self { rest: bytes }
    }

    /// The next `length` bytes.
    ///
    /// # Errors
    /// [`CutShort`]. The reader does not move then. The same holds for every other method.
    pub fn take(&mut self, length: usize) -> Result<Bytes, CutShort> {
        if length > self.rest.len() {
            return Err(CutShort);
        }
        Ok(self.rest.split_to(length))
    }

    /// The next `N` bytes.
    ///
    /// # Errors
    /// [`CutShort`].
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], CutShort> {
        let (array, _) = self.rest.split_first_chunk::<N>().ok_or(CutShort)?;
        let array = *array;
        self.take(N)?;
        Ok(array)
    }

    /// One byte.
    ///
    /// # Errors
    /// [`CutShort`].
    pub fn u8(&mut self) -> Result<u8, CutShort> {
        self.array().map(u8::from_be_bytes)
    }

    /// A big-endian number of 4 bytes.
    ///
    /// # Errors
    /// [`CutShort`].
    pub fn u32(&mut self) -> Result<u32, CutShort> {
        self.array().map(u32::from_be_bytes)
    }

    /// A big-endian number of 8 bytes.
    ///
    /// # Errors
    /// [`CutShort`].
    pub fn u64(&mut self) -> Result<u64, CutShort> {
        self.array().map(u64::from_be_bytes)
    }

    /// A big-endian number of 16 bytes.
    ///
    /// # Errors
    /// [`CutShort`].
    pub fn u128(&mut self) -> Result<u128, CutShort> {
        self.array().map(u128::from_be_bytes)
    }

    /// A byte string with its length in front, a big-endian number of 4 bytes.
    ///
    /// # Errors
    /// [`CutShort`].
    pub fn bytes(&mut self) -> Result<Bytes, CutShort> {
        let (length, after) = self.rest.split_first_chunk::<4>().ok_or(CutShort)?;
        let length = u32::from_be_bytes(*length) as usize;
        if length > after.len() {
            return Err(CutShort);
        }
        self.take(4)?;
        self.take(length)
    }

    /// Whether everything has been read.
    pub fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    /// The unread bytes.
    pub fn rest(&self) -> &Bytes {
        &self.rest
    }
}

impl fmt::Display for CutShort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("it is cut short")
    }
}

impl std::error::Error for CutShort {}

impl From<CutShort> for &'static str {
    fn from(_: CutShort) -> Self {
        "it is cut short"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_read_in_order_and_a_cut_takes_nothing() {
        let mut bytes = vec![7];
        bytes.extend(1_u32.to_be_bytes());
        bytes.extend(2_u64.to_be_bytes());
        bytes.extend(3_u128.to_be_bytes());
        bytes.extend([0, 0, 0, 2, b'a', b'b', 0, 0, 0, 9, b'c']);
        let mut reader = ByteReader::new(bytes.into());
        assert_eq!(reader.u8(), Ok(7));
        assert_eq!(reader.u32(), Ok(1));
        assert_eq!(reader.u64(), Ok(2));
        assert_eq!(reader.u128(), Ok(3));
        assert_eq!(reader.bytes().as_deref(), Ok(&b"ab"[..]));
        assert_eq!(reader.bytes(), Err(CutShort));
        assert_eq!(reader.u64(), Err(CutShort));
        assert_eq!(reader.take(6), Err(CutShort));
        assert_eq!(reader.rest()[..], [0, 0, 0, 9, b'c']);
        assert_eq!(reader.take(5).map(|rest| rest.len()), Ok(5));
        assert!(reader.is_empty());
    }
}
