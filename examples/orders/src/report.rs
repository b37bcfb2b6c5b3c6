//! Shows what was counted.

use serde::Serialize;

use crate::{
    Failure,
    letters::Letter,
    tally::{Mended, Tally},
};

/// One line per delivery and one for the mended orders, below a heading. Then the bus, and the dead
/// letters.
pub(crate) fn table(tallies: &[Tally], mended: Option<&Mended>) -> String {
    let mut table = String::from(
        "delivery          placed  packed  shipped once  twice or more   never  confirmed  rejected  kills  seconds\n",
    );
    let rows = tallies.iter().map(|tally| (tally.delivery.to_string(), tally));
    for (name, tally) in rows.chain(mended.map(|mended| ("  then mended".to_owned(), &mended.tally))) {
        let known = |number: Option<u64>| number.map_or_else(|| "-".into(), |number| number.to_string());
        table += &format!(
            "{name:16}{:>8}{:>8}{:>14}{:>15}{:>8}{:>11}{:>10}{:>7}{:>9.2}\n",
            tally.placed,
            known(tally.packed),
            tally.shipped_once,
            tally.shipped_more,
            tally.never_shipped,
            known(tally.confirmed),
            tally.rejected,
            tally.kills,
            tally.seconds
        );
    }
    table +=
        "\nOnly essentially-once ships in a transaction, and has an outbox for what it reports to the order service.\n";
    for tally in tallies {
        let Some(altered) = tally.tampered_rejected else {
            continue;
        };
        table += &format!(
            "On the bus, {} replies were lost and {altered} records altered, each of which is a dead letter. A relay \
             that was killed soon after one of these met it again. The relays sent {} records again. {} orders were \
             reported as shipped before an intact `packing` arrived.\n",
            tally.lost_replies, tally.duplicates_on_bus, tally.early_reports
        );
    }
    for tally in tallies.iter().filter(|tally| !tally.dead_letters.is_empty()) {
        let letters = &tally.dead_letters;
        table += &format!(
            "\nRejected lines among the dead letters of {}: {}\n{}",
            tally.delivery,
            letters.len(),
            few(letters)
        );
        table += &match mended {
            None => "`--mend` retries them with a parser that accepts an unquoted comma before a space.\n".to_owned(),
            Some(Mended { tally, .. }) => {
                let left = &tally.dead_letters;
                let shipped = letters.len().saturating_sub(left.len());
                let few = few(left);
                format!(
                    "Retried with a mended parser: {shipped} shipped, {} left\n{few}",
                    left.len()
                )
            }
        };
    }
    table
}

/// A few of the letters, two lines for each.
fn few(letters: &[Letter]) -> String {
    const FEW: usize = 3;
    const LONGEST: usize = 100;
    let mut list = String::new();
    for letter in letters.iter().take(FEW) {
        let line = letter.line.map_or_else(|| "?".into(), |line| line.to_string());
        // A terminal must not obey a control character of the file.
        let shown = letter.text.chars().take(LONGEST);
        let shown: String = shown.map(|char| if char.is_control() { ' ' } else { char }).collect();
        list += &format!(
            "  offset {}, line {line}: {}\n    {shown}\n",
            letter.offset, letter.reason
        );
    }
    match letters.len().saturating_sub(FEW) {
        0 => {}
        more => list += &format!("  and {more} more\n"),
    }
    list
}

/// One object with a list `deliveries`, and with `mended` if dead letters were retried.
pub(crate) fn json(tallies: &[Tally], mended: Option<&Mended>) -> Result<String, Failure> {
    #[derive(Serialize)]
    struct Report<'a> {
        deliveries: &'a [Tally],
        #[serde(skip_serializing_if = "Option::is_none")]
        mended: Option<&'a Mended>,
    }
    let mut json = serde_json::to_string(&Report {
        deliveries: tallies,
        mended,
    })?;
    json.push('\n');
    Ok(json)
}
