//! The orders to ship, from a file or generated.

use std::{fs, path::Path};

use crate::order::Format;

/// The number of the first order: that of its line in the file, behind the header.
pub(crate) const FIRST_LINE: u32 = 2;

/// The longest line, in bytes: half the size of a record that a log accepts by default.
const LONGEST_LINE: usize = 8 * 1024 * 1024;

/// The lines, and how to read them.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Input {
    pub(crate) format: Format,
    pub(crate) lines: Vec<String>,
}

impl Input {
    /// Reads a CSV file with one order per line.
    ///
    /// # Errors
    /// The reason why the file as a whole is invalid. The shipping worker deals with a line that is
    /// not a valid order.
    pub(crate) fn read(path: &Path) -> Result<Self, String> {
        let bytes = fs::read(path).map_err(|error| format!("cannot read {}: {error}", path.display()))?;
        Self::parse(&bytes).map_err(|error| format!("{}: {error}", path.display()))
    }

    fn parse(bytes: &[u8]) -> Result<Self, String> {
        let text = std::str::from_utf8(bytes).map_err(|error| {
            let line = 1 + bytes[..error.valid_up_to()]
                .iter()
                .filter(|byte| **byte == b'\n')
                .count();
            format!("line {line} is not UTF-8: convert the file to UTF-8")
        })?;
        let mut lines = text.strip_prefix('\u{feff}').unwrap_or(text).lines().map(str::to_owned);
        let header = lines
            .next()
            .ok_or("the file is empty: it needs a header with a column `freight`")?;
        let format = Format::of(&header)?;
        let lines: Vec<String> = lines.collect();
        if let Some(index) = lines.iter().position(|line| line.len() > LONGEST_LINE) {
            let (line, bytes) = (index + 2, lines[index].len());
            return Err(format!(
                "line {line} has {bytes} bytes, the most is {LONGEST_LINE}: put one order on each line"
            ));
        }
        if lines.is_empty() {
            return Err("no orders follow the header".into());
        }
        Ok(Self { format, lines })
    }

    /// Generates orders, of which about one in a thousand is malformed. The same seed generates the
    /// same orders.
    pub(crate) fn made_up(orders: usize, seed: u64) -> Self {
        let mut rng = fastrand::Rng::with_seed(seed);
        Self {
            // The columns of `made_up_line`: orderID, customerID, orderDate, freight, shipName,
            // shipCountry.
            format: Format {
                fields: 6,
                freight: 3,
                mended: false,
            },
            lines: (0..orders)
                .map(|index| made_up_line(&mut rng, 10_001 + index))
                .collect(),
        }
    }
}

fn made_up_line(rng: &mut fastrand::Rng, id: usize) -> String {
    const CUSTOMERS: [(&str, &str, &str); 6] = [
        ("ALDER", "Alder & Sons", "Ireland"),
        ("BRISA", "Brisa do Mar", "Portugal"),
        ("KAIEN", "Kaien Trading", "Japan"),
        ("LUMEN", "Atelier Lumen", "France"),
        ("NORDK", "Nordkai Handel", "Germany"),
        ("PUENT", "El Puente", "Chile"),
    ];
    let (customer, name, country) = CUSTOMERS[rng.usize(..CUSTOMERS.len())];
    let (month, day) = (rng.u32(1..=12), rng.u32(1..=28));
    let freight = f64::from(rng.u32(..50_000)) / 100.0;
    let (id, freight, name) = match rng.u32(..4_000) {
        0 => (String::new(), freight.to_string(), name.to_owned()),
        1 => (id.to_string(), format!("-{}", freight + 0.01), name.to_owned()),
        2 => (id.to_string(), "NaN".into(), name.to_owned()),
        // A comma that should have been quoted.
        3 => (id.to_string(), freight.to_string(), format!("{name}, Ltd.")),
        _ => (id.to_string(), freight.to_string(), name.to_owned()),
    };
    format!("{id},{customer},2026-{month:02}-{day:02},{freight},{name},{country}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn line_ends_and_byte_order_mark_are_stripped_and_blank_lines_kept() {
        let input = Input::parse("\u{feff}id,freight\r\n1,2\r\n\r\n3,4".as_bytes()).expect("valid");
        assert_eq!((input.format.fields, input.format.freight), (2, 1));
        assert_eq!(input.lines, ["1,2", "", "3,4"]);
    }

    #[test]
    fn unusable_files_are_refused_with_a_reason() {
        for (bytes, reason) in [
            (&b""[..], "empty"),
            (b"\xef\xbb\xbf", "empty"),
            (b"id,freight\n", "no orders"),
            (b"id,weight\n1,2\n", "only: id, weight"),
            (b"id,freight\n1,2\n\xff,3\n", "line 3 is not UTF-8"),
            (
                &[b"id,freight\n1,2\n", &vec![b'3'; LONGEST_LINE + 1][..]].concat(),
                "line 3 has 8388609 bytes",
            ),
        ] {
            let error = Input::parse(bytes).expect_err(reason);
            assert!(error.contains(reason), "{error}");
        }
    }

    #[test]
    fn a_seed_repeats_the_made_up_orders_and_a_few_are_malformed() {
        let input = Input::made_up(4_000, 1);
        assert_eq!(input, Input::made_up(4_000, 1));
        assert_ne!(input, Input::made_up(4_000, 2));
        let malformed = input
            .lines
            .iter()
            .filter(|line| input.format.parse(line).is_err())
            .count();
        assert!((1..=12).contains(&malformed), "{malformed}");
    }
}
