//! Arrays and strings of MessagePack, as the server's `cmsgpack` writes and reads them.
//!
//! Readers get the entries of a stream in this form. A plain reply has 13 protocol values per
//! entry, and takes the client library several times as long. Dead letters are stored in this form,
//! so that a script can unpack them.

use bytes::Bytes;
use essentially_once::backend::FetchBuffer;

/// The bytes that have not been read.
pub(crate) struct Packed<'a>(&'a [u8]);

impl<'a> Packed<'a> {
    pub(crate) fn new(packed: &'a [u8]) -> Self {
        Self(packed)
    }

    /// The length of the next array.
    pub(crate) fn array(&mut self) -> Option<usize> {
        match self.byte()? {
            head @ 0x90..=0x9f => Some(usize::from(head & 0x0f)),
            0xdc => self.number::<2>(),
            0xdd => self.number::<4>(),
            _ => None,
        }
    }

    /// The next string.
    pub(crate) fn string(&mut self) -> Option<&'a [u8]> {
        let length = match self.byte()? {
            head @ 0xa0..=0xbf => usize::from(head & 0x1f),
            0xd9 | 0xc4 => self.number::<1>()?,
            0xda | 0xc5 => self.number::<2>()?,
            0xdb | 0xc6 => self.number::<4>()?,
            _ => return None,
        };
        let (string, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(string)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    fn number<const BYTES: usize>(&mut self) -> Option<usize> {
        let (bytes, rest) = self.0.split_at_checked(BYTES)?;
        self.0 = rest;
        Some(bytes.iter().fold(0, |number, byte| number << 8 | usize::from(*byte)))
    }
}

/// Packed bytes, of which parts are to be kept.
pub(crate) struct Chunk(pub(crate) Bytes);

impl Chunk {
    /// Copies a part, unless it is most of the chunk. A slice keeps the whole chunk in memory.
    pub(crate) fn take(&self, part: &[u8], copies: &mut FetchBuffer) -> Bytes {
        match part.len() > self.0.len() / 2 {
            true => self.0.slice_ref(part),
            false => copies.copy(part),
        }
    }
}

/// Writes the head of an array, or a string, as the server does.
pub(crate) mod pack {
    #[cfg(test)]
    pub(crate) fn array(packed: &mut Vec<u8>, length: usize) {
        match length {
            0..16 => packed.push(0x90 | length as u8),
            16..0x1_0000 => packed.extend([&[0xdc][..], &(length as u16).to_be_bytes()].concat()),
            _ => packed.extend([&[0xdd][..], &(length as u32).to_be_bytes()].concat()),
        }
    }

    pub(crate) fn string(packed: &mut Vec<u8>, string: &[u8]) {
        match string.len() {
            length @ 0..32 => packed.push(0xa0 | length as u8),
            length @ 32..0x100 => packed.extend([0xd9, length as u8]),
            length @ 0x100..0x1_0000 => packed.extend([&[0xda][..], &(length as u16).to_be_bytes()].concat()),
            length => packed.extend([&[0xdb][..], &(length as u32).to_be_bytes()].concat()),
        }
        packed.extend(string);
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    #[test]
    fn every_length_is_read_back() {
        for length in [0, 1, 15, 16, 31, 32, 255, 256, 65_535, 65_536, 100_000] {
            let string = vec![b'x'; length];
            let mut packed = Vec::new();
            pack::array(&mut packed, length);
            pack::string(&mut packed, &string);
            let mut reading = Packed::new(&packed);
            assert_eq!((reading.array(), reading.string()), (Some(length), Some(&string[..])));
            assert!(reading.is_empty());
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in vec(any::<u8>(), 0..40), arrays in any::<u64>()) {
            let mut reading = Packed::new(&bytes);
            for n in 0..64 {
                let read = match arrays >> n & 1 {
                    0 => reading.string().map(drop),
                    _ => reading.array().map(drop),
                };
                if read.is_none() {
                    break;
                }
            }
        }
    }
}
