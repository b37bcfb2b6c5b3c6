use bytes::{Bytes, BytesMut};

/// Copies the bytes of one fetch into a buffer that its records share. That makes one allocation
/// per fetch instead of one per record.
///
/// ```
/// # use essentially_once::backend::FetchBuffer;
/// let mut buffer = FetchBuffer::with_capacity(16);
/// let (key, payload) = (buffer.copy(b"web"), buffer.copy(b"10248"));
/// assert_eq!((&key[..], &payload[..]), (&b"web"[..], &b"10248"[..]));
/// assert_eq!(buffer.copied(), 8); // the capacity for the next fetch
/// ```
#[derive(Debug, Default)]
pub struct FetchBuffer {
    buffer: BytesMut,
    copied: usize,
}

impl FetchBuffer {
    /// A longer value gets its own allocation, so that one small record does not keep large
    /// neighbours in memory.
    const OWN_ALLOCATION: usize = 64 * 1024;

    /// A buffer for that many bytes. It grows if they are more.
    pub fn with_capacity(bytes: usize) -> Self {
        Self {
            buffer: BytesMut::with_capacity(bytes),
            copied: 0,
        }
    }

    /// A copy of `bytes`, mostly in the buffer.
    pub fn copy(&mut self, bytes: &[u8]) -> Bytes {
        if bytes.len() > Self::OWN_ALLOCATION {
            return Bytes::copy_from_slice(bytes);
        }
        self.copied += bytes.len();
        self.buffer.extend_from_slice(bytes);
        self.buffer.split().freeze()
    }

    /// The number of bytes that were copied into the buffer.
    pub const fn copied(&self) -> usize {
        self.copied
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_of_a_fetch_lie_side_by_side_and_large_ones_apart() {
        let mut buffer = FetchBuffer::with_capacity(8);
        let [first, empty, second] = [&b"key"[..], b"", b"value"].map(|bytes| buffer.copy(bytes));
        assert_eq!([&first[..], &empty[..], &second[..]], [&b"key"[..], b"", b"value"]);
        assert_eq!(first.as_ptr().wrapping_add(3), second.as_ptr());

        let large = vec![7; FetchBuffer::OWN_ALLOCATION + 1];
        assert_eq!(buffer.copy(&large), large);
        assert_eq!(buffer.copied(), 8);
        // A full buffer grows, and what it gave out stays.
        assert_eq!(buffer.copy(&[9; 100]), [9; 100][..]);
        assert_eq!((&first[..], buffer.copied()), (&b"key"[..], 108));
    }
}
