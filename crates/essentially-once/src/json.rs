//! Payloads as JSON. The module needs the feature `json`.
//!
//! - [`NewRecord::json`] makes a record from a value.
//! - [`handler_fn`] makes a handler from a closure that gets the value.
//! - [`decode`] is for everything else, such as a [`Handler`] that gathers records and writes them
//!   in [`flush`](Handler::flush).
//!
//! A payload that cannot be decoded is [rejected](HandlerError::reject): no further try helps, and
//! the consumer stops, skips the record or keeps it as a dead letter.
//!
//! ```
//! use essentially_once::memory::{Memory, MemoryTx};
//! use essentially_once::{Consumer, ConsumerId, KeyValue, Log, NewRecord, Record, json};
//! use serde::{Deserialize, Serialize};
//!
//! #[derive(Serialize, Deserialize)]
//! struct Order {
//!     number: u32,
//!     country: String,
//! }
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), essentially_once::Error> {
//! let memory = Memory::new();
//! let (log, store) = (memory.log("orders")?, memory.store());
//! let order = Order { number: 10248, country: "France".into() };
//! log.append(&[NewRecord::json(&order)?.key("VINET")]).await?;
//!
//! let ship = json::handler_fn(|order: Order, record: &Record, tx: &mut MemoryTx| {
//!     Box::pin(async move {
//!         assert_eq!(record.key.as_deref(), Some(&b"VINET"[..]));
//!         tx.put(order.country.as_bytes(), &order.number.to_be_bytes()).await?;
//!         Ok(())
//!     })
//! });
//! let report = Consumer::essentially_once(ConsumerId::new("shipping")?, log, store, ship)
//!     .accept_volatile() // the in-memory backend loses its data in a crash
//!     .run_until_caught_up()
//!     .await?;
//! assert_eq!(report.handled, 1);
//! # Ok(())
//! # }
//! ```

use std::{any::type_name, fmt, marker::PhantomData};

use async_trait::async_trait;
use serde_core::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::error::Category;

use crate::{Error, Handler, HandlerError, NewRecord, Record, consumer::HandlerFuture};

const CONTENT_TYPE: &str = "content-type";

impl NewRecord {
    /// A record whose payload is this value as JSON (RFC 8259), with the header
    /// `content-type: application/json`. It needs the feature `json`.
    ///
    /// A number that is infinite or not a number becomes `null`, since JSON has neither.
    ///
    /// ```
    /// # use essentially_once::NewRecord;
    /// let record = NewRecord::json(&("VINET", 32.38))?.key("10248");
    /// assert_eq!(record.payload, r#"["VINET",32.38]"#);
    /// # Ok::<(), essentially_once::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Failed`] if the value has no form in JSON, such as a map whose keys are lists, or
    /// if its `Serialize` fails.
    pub fn json<T: Serialize + ?Sized>(value: &T) -> Result<Self, Error> {
        let payload = serde_json::to_vec(value)
            .map_err(|error| Error::failed(format!("write {} as JSON", type_name::<T>()), error))?;
        Ok(Self::new(payload).header(CONTENT_TYPE, "application/json"))
    }
}

/// The payload of a record as a value, which may borrow from it.
///
/// The record's first header `content-type`, in any case of letters, must name JSON:
/// `application/json`, `text/json`, or a type that ends in `+json` (RFC 6839), with or without
/// parameters. A record without the header is accepted.
///
/// ```
/// use essentially_once::{Handler, HandlerError, KeyValue, Record, async_trait, json};
///
/// #[derive(Default)]
/// struct Total {
///     gathered: u64,
/// }
///
/// #[async_trait]
/// impl<Tx: KeyValue> Handler<Tx> for Total {
///     async fn handle(&mut self, record: &Record, _: &mut Tx) -> Result<(), HandlerError> {
///         let cents: u64 = json::decode(record)?;
///         self.gathered += cents;
///         Ok(())
///     }
///
///     async fn flush(&mut self, tx: &mut Tx) -> Result<(), HandlerError> {
///         let before: u64 = match tx.get(b"total").await? {
///             Some(total) => std::str::from_utf8(&total)?.parse()?,
///             None => 0,
///         };
///         let total = before + std::mem::take(&mut self.gathered);
///         tx.put(b"total", total.to_string().as_bytes()).await?;
///         Ok(())
///     }
///
///     async fn reset(&mut self) {
///         self.gathered = 0;
///     }
/// }
/// ```
///
/// # Errors
/// [`HandlerError::reject`] with a [`DecodeError`].
pub fn decode<'a, T: Deserialize<'a>>(record: &'a Record) -> Result<T, HandlerError> {
    decoded(record).map_err(HandlerError::reject)
}

/// Makes a [`Handler`] from a closure that gets the payload as a value, the record, and the
/// transaction. It is [`handler_fn`](crate::handler_fn) otherwise.
///
/// The closure is not called if [`decode`] refuses the record. The [module](self) has an example.
pub fn handler_fn<T, Tx, F>(function: F) -> JsonFn<T, F>
where
    T: DeserializeOwned + Send,
    Tx: Send,
    F: for<'a> FnMut(T, &'a Record, &'a mut Tx) -> HandlerFuture<'a> + Send,
{
    let value = PhantomData;
    JsonFn { function, value }
}

/// A closure as a handler of JSON. See [`handler_fn`].
pub struct JsonFn<T, F> {
    function: F,
    value: PhantomData<fn() -> T>,
}

#[async_trait]
impl<T, Tx, F> Handler<Tx> for JsonFn<T, F>
where
    T: DeserializeOwned + Send,
    Tx: Send,
    F: for<'a> FnMut(T, &'a Record, &'a mut Tx) -> HandlerFuture<'a> + Send,
{
    async fn handle(&mut self, record: &Record, tx: &mut Tx) -> Result<(), HandlerError> {
        (self.function)(decode(record)?, record, tx).await
    }
}

impl<T, F> fmt::Debug for JsonFn<T, F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("JsonFn").field(&type_name::<T>()).finish()
    }
}

/// Why a payload is not the expected value. No text of the payload is part of it.
///
/// [`HandlerError::cause`] returns it, to be downcast.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// The record says that its payload is something else than JSON.
    #[error(
        "the content type is {content_type:?}, which is not JSON; send `application/json`, or handle the record by its type"
    )]
    ContentType {
        /// The first 60 characters of the header's value.
        content_type: String,
    },
    /// The payload is not JSON, or is not a value of the expected type.
    #[error("the payload is not a value of {expected}: {reason} at line {line}, column {column}")]
    Payload {
        /// The type that was expected, as [`type_name`] names it.
        expected: &'static str,
        /// What is wrong.
        reason: &'static str,
        /// The line in the payload, counted from 1.
        line: usize,
        /// The byte in the line, counted from 1; 0 if the line is empty.
        column: usize,
    },
}

fn decoded<'a, T: Deserialize<'a>>(record: &'a Record) -> Result<T, DecodeError> {
    check_content_type(record)?;
    // The error's own text quotes the payload, so only its place and kind are kept.
    serde_json::from_slice(&record.payload).map_err(|error| DecodeError::Payload {
        expected: type_name::<T>(),
        reason: match error.classify() {
            Category::Syntax => "it is not valid JSON",
            Category::Eof => "the JSON ends too early",
            Category::Data => "a value is missing, unknown, or of another type",
            Category::Io => "it cannot be read",
        },
        line: error.line(),
        column: error.column(),
    })
}

fn check_content_type(record: &Record) -> Result<(), DecodeError> {
    let is_content_type = |name: &str| name.eq_ignore_ascii_case(CONTENT_TYPE);
    let Some((_, value)) = record.headers.iter().find(|(name, _)| is_content_type(name)) else {
        return Ok(());
    };
    let value = String::from_utf8_lossy(value);
    if is_json(&value) {
        return Ok(());
    }
    let content_type = value.chars().take(60).collect();
    Err(DecodeError::ContentType { content_type })
}

fn is_json(content_type: &str) -> bool {
    let essence = content_type.split(';').next().unwrap_or_default().trim();
    let Some((kind, subtype)) = essence.split_once('/') else {
        return false;
    };
    let (kind, subtype) = (kind.to_ascii_lowercase(), subtype.to_ascii_lowercase());
    match subtype.as_str() {
        "json" => matches!(&*kind, "application" | "text"),
        _ => subtype.ends_with("+json"),
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, time::SystemTime};

    use serde::{Deserialize, Serialize};

    use super::*;
    use crate::consumer::HandlerErrorKind;

    #[derive(Serialize, Deserialize, PartialEq, Debug)]
    #[serde(deny_unknown_fields)]
    struct Card {
        holder: String,
        number: u64,
    }

    fn record(payload: &str) -> Record {
        Record::new(0.into(), SystemTime::UNIX_EPOCH, payload.to_owned())
    }

    #[test]
    fn a_value_is_decoded_from_the_record_that_was_made_of_it() {
        let card = Card {
            holder: "Ann \"A\"".into(),
            number: u64::MAX,
        };
        let new = NewRecord::json(&card).expect("has a form");
        assert_eq!(new.headers, [("content-type".into(), "application/json".into())]);
        let mut record = record("");
        (record.headers, record.payload) = (new.headers, new.payload);
        assert_eq!(decode::<Card>(&record).expect("decodes"), card);
    }

    #[test]
    fn a_value_may_borrow_from_the_payload() {
        let record = record(r#"["a", "b"]"#);
        let [first, _]: [&str; 2] = decode(&record).expect("decodes");
        assert_eq!(first, "a");
    }

    #[test]
    fn a_value_without_a_form_in_json_is_refused_and_its_type_named() {
        let lists = BTreeMap::from([(vec![1], 2)]);
        let error = NewRecord::json(&lists).expect_err("a list is not a key").to_string();
        assert!(
            error.contains("BTreeMap") && error.contains("key must be a string"),
            "{error}"
        );
    }

    #[test]
    fn a_rejection_names_type_line_and_column_and_nothing_of_the_payload() {
        let misfit = "a value is missing, unknown, or of another type";
        for (payload, reason, line, column) in [
            ("{\"holder\": \"secret\",\n \"number\": \"4111\"}", misfit, 2, 17),
            ("{\"holder\": \"secret\"}", misfit, 1, 20),
            ("{\"secret\": 4111}", misfit, 1, 9),
            ("\"secret\"", misfit, 1, 8),
            ("{\"holder\": secret}", "it is not valid JSON", 1, 12),
            ("secret", "it is not valid JSON", 1, 1),
            (
                "{\"holder\": \"secret\", \"number\": 4111} 4111",
                "it is not valid JSON",
                1,
                38,
            ),
            ("{\"holder\": \"secret", "the JSON ends too early", 1, 18),
            ("", "the JSON ends too early", 1, 0),
        ] {
            let error = decode::<Card>(&record(payload)).expect_err(payload);
            assert_eq!(error.kind(), HandlerErrorKind::Reject);
            let shown = error.to_string();
            assert!(!shown.contains("secret") && !shown.contains("4111"), "{shown}");
            let expected = format!("tests::Card: {reason} at line {line}, column {column}");
            assert!(shown.ends_with(&expected), "{payload}: {shown}");
            assert!(error.cause().is::<DecodeError>());
        }
    }

    #[test]
    fn only_content_types_of_json_are_accepted() {
        let decode = |name: &str, value: &'static [u8]| {
            let mut record = record("1");
            record.headers = vec![("x".into(), "text/csv".into()), (name.into(), value.into())];
            decode::<u8>(&record)
        };
        for good in [
            "application/json",
            "Application/JSON",
            " application/json ; charset=utf-8",
            "text/json",
            "application/cloudevents+json;v=1",
        ] {
            assert_eq!(decode("content-type", good.as_bytes()).expect(good), 1);
        }
        for bad in [
            "",
            "json",
            "text/csv",
            "application/jsonl",
            "image/json",
            "text/csv;application/json",
            "application/json+xml",
        ] {
            for name in ["content-type", "Content-Type"] {
                let error = decode(name, bad.as_bytes()).expect_err(bad);
                assert_eq!(error.kind(), HandlerErrorKind::Reject);
                let shown = error.to_string();
                assert!(shown.contains(&format!("the content type is {bad:?}")), "{shown}");
            }
        }
        assert_eq!(decode("other", b"text/csv").expect("no content type"), 1);
        let long = decode("content-type", &[0xff; 90]).expect_err("not text").to_string();
        assert_eq!(long.matches('\u{fffd}').count(), 60, "{long}");
    }
}
