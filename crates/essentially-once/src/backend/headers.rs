//! Headers as bytes, for stores that keep them in one column.

use bytes::Bytes;

use super::{ByteReader, Header};

const HEADERS_VERSION: u8 = 1;

/// Encodes headers as a version byte and then, for each header, the name and the value, each after
/// its length as a big-endian u32. Returns `None` for no headers.
pub fn encode_headers(headers: &[Header]) -> Option<Vec<u8>> {
    if headers.is_empty() {
        return None;
    }
    let size: usize = headers.iter().map(|(name, value)| 8 + name.len() + value.len()).sum();
    let mut bytes = Vec::with_capacity(1 + size);
    bytes.push(HEADERS_VERSION);
    for (name, value) in headers {
        for part in [name.as_bytes(), value] {
            // The record limit keeps every length far below 4 GiB.
            bytes.extend_from_slice(&(part.len() as u32).to_be_bytes());
            bytes.extend_from_slice(part);
        }
    }
    Some(bytes)
}

/// Decodes the output of [`encode_headers`] without copying the values.
///
/// # Errors
/// What is wrong with the bytes.
pub fn decode_headers(bytes: &Bytes) -> Result<Vec<Header>, &'static str> {
    if bytes.first() != Some(&HEADERS_VERSION) {
        return Err("headers of an unknown version");
    }
    let cut_short = |_| "headers are cut short";
    let mut rest = ByteReader::new(bytes.slice(1..));
    let mut headers = Vec::new();
    while !rest.is_empty() {
        let name = rest.bytes().map_err(cut_short)?;
        let name = str::from_utf8(&name).map_err(|_| "a header's name is not UTF-8")?;
        headers.push((name.to_owned(), rest.bytes().map_err(cut_short)?));
    }
    Ok(headers)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn headers_round_trip(headers in prop::collection::vec((".{0,20}", prop::collection::vec(any::<u8>(), 0..40)), 1..8)) {
            let headers: Vec<Header> = headers.into_iter().map(|(name, value)| (name, value.into())).collect();
            let bytes = Bytes::from(encode_headers(&headers).expect("some"));
            prop_assert_eq!(decode_headers(&bytes).expect("decodes"), headers);
        }

        #[test]
        fn foreign_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..60)) {
            let _ = decode_headers(&bytes.clone().into());
            let versioned = [vec![HEADERS_VERSION, 0, 0, 0], bytes].concat();
            let _ = decode_headers(&versioned.into());
        }
    }

    #[test]
    fn a_cut_anywhere_is_seen() {
        let bytes = Bytes::from(encode_headers(&[("name".into(), "value".into())]).expect("some"));
        for cut in 2..bytes.len() {
            assert!(decode_headers(&bytes.slice(..cut)).is_err(), "{cut}");
        }
        assert!(encode_headers(&[]).is_none());
    }
}
