//! Comments and Markdown keep to 100 columns.
//!
//! Tables, code blocks and URLs are exempt. rustfmt wraps code on its own.

/// The widest line.
const COLUMNS: usize = 100;

/// How many wide lines a complaint names.
const NAMED: usize = 10;

/// What to say about the places of all wide lines, such as `src/lib.rs:7`.
pub(super) fn fault(wide: &[String]) -> Option<String> {
    let named = wide.iter().take(NAMED).map(String::as_str).collect::<Vec<_>>();
    let (count, named) = (wide.len(), named.join(", "));
    (count > 0).then(|| {
        format!(
            "lines of comments or Markdown wider than {COLUMNS} columns: {count}; wrap them, beginning with {named}"
        )
    })
}

/// The numbers of the wide lines in a file with this extension.
pub(super) fn wide_lines(extension: &str, text: &str) -> impl Iterator<Item = usize> {
    let mut block = Block::default();
    let lines = (1..).zip(text.lines());
    lines.filter_map(move |(number, line)| {
        let is_exempt = match prose(extension, line) {
            Some(prose) => block.exempts(prose),
            None => {
                block = Block::default();
                true
            }
        };
        (!is_exempt && width_without_urls(line) > COLUMNS).then_some(number)
    })
}

/// The text of a comment line, or a line of Markdown. `None` for code.
fn prose<'a>(extension: &str, line: &'a str) -> Option<&'a str> {
    let trimmed = line.trim_start();
    match extension {
        "md" => Some(line),
        "rs" => ["///", "//!", "//"]
            .into_iter()
            .find_map(|mark| trimmed.strip_prefix(mark))
            .map(|text| text.strip_prefix(' ').unwrap_or(text)),
        "lua" => trimmed.strip_prefix("--"),
        "toml" => trimmed.strip_prefix('#'),
        _ => None,
    }
}

fn width_without_urls(line: &str) -> usize {
    let urls = line.split_whitespace().filter(|word| word.contains("://"));
    line.chars().count() - urls.map(|url| url.chars().count()).sum::<usize>()
}

/// Where a line is within Markdown.
struct Block {
    is_fenced: bool,
    /// The line before is blank or part of an indented code block.
    may_indent: bool,
}

impl Default for Block {
    fn default() -> Self {
        Self {
            is_fenced: false,
            may_indent: true,
        }
    }
}

impl Block {
    /// Whether the next line is code or part of a table.
    fn exempts(&mut self, line: &str) -> bool {
        let trimmed = line.trim_start();
        let is_fence = trimmed.starts_with("```");
        self.is_fenced ^= is_fence;
        let is_indented = self.may_indent && line.starts_with("    ");
        self.may_indent = trimmed.is_empty() || is_indented;
        is_fence || self.is_fenced || is_indented || trimmed.starts_with('|')
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wide(extension: &str, text: &str) -> Vec<usize> {
        wide_lines(extension, text).collect()
    }

    #[test]
    fn a_comment_may_have_100_columns_and_no_more() {
        let line = |width: usize| format!("    /// {}\n", "ü".repeat(width - 8));
        assert_eq!(wide("rs", &format!("{}{}", line(100), line(101))), [2]);
        let long = "word ".repeat(30);
        for (extension, mark) in [("rs", "//"), ("rs", "//!"), ("toml", "#"), ("lua", "--"), ("md", "")] {
            assert_eq!(wide(extension, &format!("{mark} {long}")), [1], "{mark} in {extension}");
        }
        assert!(
            wide("rs", &format!("let text = \"{long}\"; // {long}")).is_empty(),
            "code is rustfmt's"
        );
    }

    #[test]
    fn tables_urls_and_code_are_exempt() {
        let long = "word ".repeat(30);
        let text = format!(
            "{long}\n| {long} |\n```\n{long}\n```\n\n    {long}\n    {long}\n\n- {long}\n    {long}\n\
             [there](https://example.org/{})\n",
            "x".repeat(100)
        );
        assert_eq!(wide("md", &text), [1, 10, 11]);
        let comment: String = text.lines().map(|line| format!("/// {line}\n")).collect();
        assert_eq!(wide("rs", &comment), [1, 10, 11]);
        assert_eq!(
            wide("md", &format!("{long} https://example.org")),
            [1],
            "a URL excuses only itself"
        );
    }

    #[test]
    fn an_open_fence_ends_with_its_comment() {
        let long = "word ".repeat(30);
        assert_eq!(
            wide("rs", &format!("/// ```\n/// {long}\nfn f() {{}}\n/// {long}\n")),
            [4]
        );
    }

    #[test]
    fn wide_lines_are_counted_and_the_first_ones_named() {
        let places = |count: usize| (1..=count).map(|line| format!("a.rs:{line}")).collect::<Vec<_>>();
        assert_eq!(fault(&[]), None);
        for count in [1, 100] {
            let text = fault(&places(count)).expect("a complaint");
            assert!(
                text.contains(&format!(": {count};")) && text.contains("a.rs:1"),
                "{text}"
            );
            assert!(!text.contains("a.rs:11"), "{text}");
        }
    }
}
