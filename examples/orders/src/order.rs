//! Parses orders.

use serde::{Deserialize, Serialize};

/// The header that names the order a record is about: the number of its line in the file.
pub(crate) const ORDER_HEADER: &str = "order";

/// The format of a file's lines.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct Format {
    /// The number of fields in every line.
    pub(crate) fields: usize,
    /// The index of the freight field.
    pub(crate) freight: usize,
    /// Whether a comma that should have been quoted is accepted. See [`rejoin`].
    pub(crate) mended: bool,
}

#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Order {
    pub(crate) id: String,
    pub(crate) freight: f64,
}

impl Format {
    /// Reads the header of a file.
    ///
    /// # Errors
    /// The columns found, if none of them is `freight`.
    pub(crate) fn of(header: &str) -> Result<Self, String> {
        let columns = fields(header)?;
        let freight = columns
            .iter()
            .position(|name| name.trim().eq_ignore_ascii_case("freight"))
            .ok_or_else(|| {
                let found: Vec<&str> = columns.iter().collect();
                format!("the header has no column `freight`, only: {}", found.join(", "))
            })?;
        Ok(Self {
            fields: columns.len(),
            freight,
            mended: false,
        })
    }

    /// Reads one order.
    ///
    /// # Errors
    /// Why the line is not a valid order.
    pub(crate) fn parse(&self, line: &str) -> Result<Order, String> {
        let mut fields = fields(line)?;
        if self.mended && fields.len() > self.fields {
            fields = rejoin(&fields);
        }
        let id = fields.iter().next().unwrap_or_default().trim();
        if id.is_empty() {
            return Err("no order id".into());
        }
        if fields.len() != self.fields {
            return Err(format!("{} fields, but the header has {}", fields.len(), self.fields));
        }
        let freight = fields.get(self.freight).unwrap_or_default().trim();
        match freight.parse::<f64>() {
            Err(_) => Err(format!("freight {freight:?} is not a number")),
            Ok(number) if !number.is_finite() => Err(format!("freight {freight:?} is not a finite number")),
            Ok(number) if number < 0.0 => Err(format!("freight {freight:?} is negative")),
            Ok(number) => Ok(Order {
                id: id.into(),
                freight: number,
            }),
        }
    }
}

/// The first field of a line, unless it is blank. It identifies the order.
pub(crate) fn key(line: &str) -> Option<String> {
    let id = fields(line).ok()?.get(0)?.trim().to_owned();
    (!id.is_empty()).then_some(id)
}

/// Joins each field that begins with a space to the one before, as in `Alder, Finch & Sons`. Never
/// joins anything to the id, because a wrong id would be worse than a rejected line.
fn rejoin(fields: &csv::StringRecord) -> csv::StringRecord {
    let mut joined: Vec<String> = Vec::new();
    for field in fields {
        match joined.len() {
            2.. if field.starts_with(' ') => {
                let text = joined.pop().unwrap_or_default();
                joined.push(format!("{text},{field}"));
            }
            _ => joined.push(field.to_owned()),
        }
    }
    joined.into()
}

fn fields(line: &str) -> Result<csv::StringRecord, String> {
    // The reader skips blank lines.
    if line.is_empty() {
        return Ok(csv::StringRecord::new());
    }
    // Adds a second line, which an unclosed quote swallows.
    let text = format!("{line}\n.");
    let reader = csv::ReaderBuilder::new()
        .has_headers(false)
        .flexible(true)
        // A reader lives for only one line.
        .buffer_capacity(text.len())
        .from_reader(text.as_bytes());
    let records: Result<Vec<csv::StringRecord>, csv::Error> = reader.into_records().collect();
    match records.map_err(|error| error.to_string())?.as_slice() {
        [first, _] => Ok(first.clone()),
        [_] => Err("a quote is not closed: an order must fit on one line".into()),
        _ => Err("the line contains a carriage return".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FORMAT: Format = Format {
        fields: 3,
        freight: 1,
        mended: false,
    };

    #[test]
    fn the_freight_column_is_found_by_its_name() {
        assert_eq!(Format::of("id, Freight ,name"), Ok(FORMAT));
        assert_eq!(Format::of("\"FREIGHT\"").map(|format| format.freight), Ok(0));
        let error = Format::of("id,weight").expect_err("no freight");
        assert!(error.contains("id, weight"), "{error}");
        assert!(Format::of("").is_err());
    }

    #[test]
    fn valid_orders_are_read() {
        for (line, id, freight) in [
            ("1,32.38,Ann", "1", 32.38),
            (" 2 , 0 ,", "2", 0.0),
            ("3,1e2,\"Smith, Ann\"", "3", 100.0),
            ("\"4\"\"b\",.5,x", "4\"b", 0.5),
        ] {
            let id = id.to_owned();
            assert_eq!(FORMAT.parse(line), Ok(Order { id, freight }), "{line}");
        }
    }

    #[test]
    fn malformed_lines_are_reported_with_a_reason() {
        for (line, reason) in [
            ("", "no order id"),
            ("   ", "no order id"),
            (",1,Ann", "no order id"),
            ("1", "1 fields, but the header has 3"),
            ("1,2,Smith, Ann", "4 fields, but the header has 3"),
            ("1,-0.01,Ann", "negative"),
            ("1,NaN,Ann", "not a finite number"),
            ("1,inf,Ann", "not a finite number"),
            ("1,1e999,Ann", "not a finite number"),
            ("1,NULL,Ann", "not a number"),
            ("1,,Ann", "not a number"),
            ("1,\"2,Ann", "a quote is not closed"),
            ("1,2,\"Ann", "a quote is not closed"),
            ("1,2,Ann\r2,3,Bob", "carriage return"),
        ] {
            let error = FORMAT.parse(line).expect_err(line);
            assert!(error.contains(reason), "{line:?}: {error}");
        }
    }

    #[test]
    fn the_mended_parser_accepts_an_unquoted_comma_in_a_text() {
        let mended = Format { mended: true, ..FORMAT };
        for line in ["1,2,Ann", "1, 2,Ann", "1,2,Smith, Ann", "1,2,Smith, Ann, Ltd."] {
            let id = "1".to_owned();
            assert_eq!(mended.parse(line), Ok(Order { id, freight: 2.0 }), "{line}");
        }
        let late = Format { freight: 2, ..mended };
        let order = Order {
            id: "1".into(),
            freight: 2.0,
        };
        assert_eq!(late.parse("1,Smith, Ann,2"), Ok(order));
        for line in ["1, 5,2,Ann", "1,2, 5,Ann", "1,2,5,Ann", "1,x,Smith, Ann", "1,2"] {
            assert!(mended.parse(line).is_err(), "{line}");
        }
    }

    #[test]
    fn a_line_without_an_id_has_no_key() {
        assert_eq!(key("10248,VINET"), Some("10248".into()));
        assert_eq!(key(",VINET"), None);
        assert_eq!(key(""), None);
    }
}
