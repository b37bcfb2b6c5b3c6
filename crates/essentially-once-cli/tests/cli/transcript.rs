//! The transcript in docs/operating.md, as the program prints it.
//!
//! To update it, set `ESSENTIALLY_ONCE_WRITE_TRANSCRIPT=1`.

use std::{env, fmt::Write as _, fs, path::Path};

use crate::support::Shop;

const BEGIN: &str = "<!-- transcript -->\n";
const END: &str = "<!-- end of transcript -->";

#[test]
fn the_transcript_in_the_documentation_is_what_the_program_prints() {
    let shop = Shop::new();
    let mut transcript = String::new();
    shop.place(&[
        ("Chile", "32.38"),
        ("Chile", "11,61"),
        ("Peru", "65.83"),
        ("Chile", "4.99"),
    ]);
    shop.consume(false);
    let mut say = |text: &str| writeln!(transcript, "{text}\n").expect("write");
    let show = |arguments: &[&str]| {
        let called = shop.call(arguments);
        assert_eq!(called.status, Some(0), "{arguments:?}: {}", called.error);
        let quoted = arguments.iter().map(|argument| match argument.contains(' ') {
            true => format!("'{argument}'"),
            false => (*argument).to_owned(),
        });
        let line = quoted.collect::<Vec<_>>().join(" ");
        format!(
            "```console\n$ essentially-once {line}\n{}```",
            at_a_fixed_time(&called.output)
        )
    };
    say(
        "An order with a decimal comma arrives, and the handler rejects it. The later order of the same\nkey waits behind it:",
    );
    say(&show(&["status"]));
    say(&show(&["dead-letters", "list"]));
    say("What is in it, and why was it set aside?");
    say(&show(&["dead-letters", "show", "1"]));
    say("The handler is mended, and the new version runs. It tries the letter, and then the one behind it:");
    say(&show(&[
        "dead-letters",
        "retry",
        "1",
        "--because",
        "decimal commas are read now",
    ]));
    assert_eq!(shop.consume(true).handled, 2);
    say(&show(&["status"]));
    say(&show(&["journal"]));
    compare(transcript.trim_end());
}

/// Every time becomes the same one.
fn at_a_fixed_time(output: &str) -> String {
    const FIXED: &str = "2026-03-02T09:30:00.125Z";
    let mut fixed = String::new();
    for line in output.split_inclusive('\n') {
        for piece in line.split_inclusive(' ') {
            let text = piece.trim_end();
            match text.parse::<jiff::Timestamp>() {
                Ok(_) => fixed += &format!("{FIXED}{}", &piece[text.len()..]),
                Err(_) => fixed += piece,
            }
        }
    }
    fixed
}

fn compare(transcript: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/operating.md");
    let page = fs::read_to_string(&path).expect("read");
    let (before, rest) = page.split_once(BEGIN).expect("the marker");
    let (written, after) = rest.split_once(END).expect("the other marker");
    if env::var_os("ESSENTIALLY_ONCE_WRITE_TRANSCRIPT").is_some() {
        let page = format!("{before}{BEGIN}\n{transcript}\n\n{END}{after}");
        return fs::write(&path, page).expect("write");
    }
    assert_eq!(
        written.trim(),
        transcript,
        "docs/operating.md is out of date; see the head of this file"
    );
}
