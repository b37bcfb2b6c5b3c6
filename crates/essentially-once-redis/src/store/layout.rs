//! The arguments of `commit.lua`: fields, lists, and the bounds of each list.
//!
//! A commit that sends records has one more list. Its bounds follow those of the others, and a mark
//! follows them. All other commits are the same as if this list did not exist.
//!
//! This module alone knows their places. It writes the arguments and the bounds, and it generates
//! the start of the script, which reads them into named variables. So Rust and Lua cannot disagree
//! about where a list ends.

use std::fmt::Write as _;

use redis::{Cmd, ToSingleRedisArg};

/// The fields, one argument each. The script has them in variables of the same names.
#[derive(Clone, Copy, Default)]
pub(crate) struct Fields<'a> {
    /// The revision that must be stored.
    pub(crate) expected: &'a [u8],
    /// The revision after the commit.
    pub(crate) next_revision: &'a [u8],
    /// The log's name.
    pub(crate) log_name: &'a [u8],
    /// The log's incarnation; empty if unknown.
    pub(crate) log_incarnation: &'a [u8],
    /// The next offset.
    pub(crate) offset: &'a [u8],
    /// The owner; empty for none.
    pub(crate) owner: &'a [u8],
    /// The note of the position; empty for none.
    pub(crate) note: &'a [u8],
    /// The journal behind a byte that makes it differ from none; empty to keep the stored one.
    pub(crate) journal: &'a [u8],
    /// The revision after a partially applied commit.
    pub(crate) partial_revision: &'a [u8],
}

impl<'a> Fields<'a> {
    /// Names and values, in order.
    fn named(self) -> [(&'static str, &'a [u8]); 9] {
        [
            ("expected", self.expected),
            ("next_revision", self.next_revision),
            ("log_name", self.log_name),
            ("log_incarnation", self.log_incarnation),
            ("offset", self.offset),
            ("owner", self.owner),
            ("note", self.note),
            ("journal", self.journal),
            ("partial_revision", self.partial_revision),
        ]
    }
}

/// A list of arguments. The script has its bounds in variables, such as `puts_first` and
/// `puts_last`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum List {
    /// State to set: key, value.
    Puts,
    /// State to delete: key.
    Deletes,
    /// Windows to set: producer, window.
    Windows,
    /// Windows to delete: producer.
    Forgotten,
    /// Types to check: a command that only works on this type, key.
    Types,
    /// Numbers to check: length, a command that reads them with its arguments.
    Numbers,
    /// Native commands, and those that write letters, in runs of equal length: length, number of
    /// commands, the commands.
    Commands,
    /// Permissions to check: the indices of the first and last argument of one of these commands.
    Permissions,
}

impl List {
    const ALL: [Self; 8] = [
        Self::Puts,
        Self::Deletes,
        Self::Windows,
        Self::Forgotten,
        Self::Types,
        Self::Numbers,
        Self::Commands,
        Self::Permissions,
    ];

    const fn name(self) -> &'static str {
        match self {
            Self::Puts => "puts",
            Self::Deletes => "deletes",
            Self::Windows => "windows",
            Self::Forgotten => "forgotten",
            Self::Types => "types",
            Self::Numbers => "numbers",
            Self::Commands => "commands",
            Self::Permissions => "permissions",
        }
    }
}

/// The mark behind the bounds of the records to send. Otherwise a number is the last argument.
const SENDS: &str = "sends";

/// The start of the script, which names the fields and the bounds.
pub(crate) fn prologue() -> String {
    let mut lua = String::from("local ARGV = ARGV\n");
    // A string takes everything that is written to it.
    for ((name, _), index) in Fields::default().named().into_iter().zip(1..) {
        let _ = writeln!(lua, "local {name} = ARGV[{index}]");
    }
    let _ = writeln!(
        lua,
        "local bounds_end, sends_first, sends_last = #ARGV, 1, 0\n\
         if ARGV[bounds_end] == '{SENDS}' then\n\
         \x20 bounds_end, sends_first, sends_last =\n\
         \x20   bounds_end - 3, tonumber(ARGV[bounds_end - 2]), tonumber(ARGV[bounds_end - 1])\n\
         end"
    );
    // The bounds come last, two for each list.
    for (list, before_end) in List::ALL.into_iter().zip((0..List::ALL.len()).rev()) {
        let (name, last) = (list.name(), 2 * before_end);
        let _ = writeln!(
            lua,
            "local {name}_first, {name}_last = tonumber(ARGV[bounds_end - {}]), tonumber(ARGV[bounds_end - {last}])",
            last + 1
        );
    }
    lua
}

/// The arguments as they are written.
pub(crate) struct Layout {
    command: Cmd,
    /// The number of arguments so far, which is the index of the last one, as Lua counts.
    written: usize,
    /// The first and last index of each list. An empty list ends before it begins.
    bounds: [(usize, usize); List::ALL.len()],
    sends: Option<(usize, usize)>,
}

impl Layout {
    /// Continues a command that holds the script and its keys.
    pub(crate) fn new(mut command: Cmd, fields: Fields<'_>) -> Self {
        let fields = fields.named();
        for (_, value) in fields {
            command.arg(value);
        }
        Self {
            command,
            written: fields.len(),
            bounds: [(1, 0); List::ALL.len()],
            sends: None,
        }
    }

    /// Writes a list, which consists of the arguments that `write` pushes.
    pub(crate) fn list(&mut self, list: List, write: impl FnOnce(&mut Items<'_>)) {
        let first = self.written + 1;
        write(&mut Items { layout: self });
        self.bounds[list as usize] = (first, self.written);
    }

    /// Writes the list of records to send.
    pub(crate) fn sends(&mut self, write: impl FnOnce(&mut Items<'_>)) {
        let first = self.written + 1;
        write(&mut Items { layout: self });
        self.sends = Some((first, self.written));
    }

    /// Writes the bounds.
    pub(crate) fn finish(mut self) -> Cmd {
        for (first, last) in self.bounds {
            self.command.arg(first).arg(last);
        }
        if let Some((first, last)) = self.sends {
            self.command.arg(first).arg(last).arg(SENDS);
        }
        self.command
    }
}

/// Pushes the arguments of a list.
pub(crate) struct Items<'a> {
    layout: &'a mut Layout,
}

impl Items<'_> {
    /// The index of the next argument, as Lua counts.
    pub(crate) fn next(&self) -> usize {
        self.layout.written + 1
    }

    pub(crate) fn push(&mut self, argument: impl ToSingleRedisArg) -> &mut Self {
        self.layout.command.arg(argument);
        self.layout.written += 1;
        self
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::{collection::vec, option, prelude::*, sample::subsequence};
    use redis::Arg;

    use super::*;

    fn fields() -> Fields<'static> {
        Fields {
            expected: b"1",
            next_revision: b"2",
            log_name: b"orders",
            log_incarnation: b"a1",
            offset: b"7",
            owner: b"web",
            note: b"digest",
            journal: b"=entries",
            partial_revision: b"3",
        }
    }

    /// The value of each variable that the prologue declares, for these arguments.
    fn variables(arguments: &[String]) -> HashMap<String, String> {
        let mut variables = HashMap::new();
        let sends = arguments.last().is_some_and(|last| last == SENDS);
        let bounds_end = arguments.len() - if sends { 3 } else { 0 };
        for line in prologue().lines().skip(1) {
            let assignment = line.strip_prefix("local ").and_then(|line| line.split_once(" = "));
            let Some((names, values)) = assignment.filter(|(names, _)| !names.contains("bounds_end")) else {
                continue;
            };
            for (name, value) in names.split(", ").zip(values.split(", ")) {
                let index = value.trim_start_matches("tonumber(").trim_start_matches("ARGV[");
                let index = index.trim_end_matches(')').trim_end_matches(']');
                let index = match index.strip_prefix("bounds_end - ") {
                    Some(before_end) => bounds_end - before_end.parse::<usize>().expect("a number"),
                    None => index.parse().expect("a number"),
                };
                variables.insert(name.to_owned(), arguments[index - 1].clone());
            }
        }
        variables
    }

    proptest! {
        #[test]
        fn the_script_finds_the_lists_that_were_written(
            lists in subsequence(List::ALL.to_vec(), 0..=List::ALL.len()).prop_shuffle(),
            lengths in vec(0_usize..5, List::ALL.len()),
            sends in option::of(1_usize..5),
        ) {
            let mut layout = Layout::new(Cmd::new(), fields());
            for list in &lists {
                layout.list(*list, |items| {
                    for number in 0..lengths[*list as usize] {
                        items.push(format!("{} {number}", list.name()));
                    }
                });
            }
            if let Some(sends) = sends {
                layout.sends(|items| {
                    for number in 0..sends {
                        items.push(format!("sends {number}"));
                    }
                });
            }
            let command = layout.finish();
            let arguments: Vec<String> = command
                .args_iter()
                .map(|argument| match argument {
                    Arg::Simple(bytes) => String::from_utf8_lossy(bytes).into_owned(),
                    _ => String::new(),
                })
                .collect();
            let variables = variables(&arguments);
            let bounds = 2 * List::ALL.len();
            match sends {
                Some(sends) => {
                    let [.., first, last, _] = &arguments[..] else { panic!("too short") };
                    let (first, last): (usize, usize) = (first.parse().expect("a number"), last.parse().expect("a number"));
                    let written: Vec<String> = (0..sends).map(|number| format!("sends {number}")).collect();
                    prop_assert_eq!(&arguments[first - 1..last], written);
                }
                None => {
                    let items: usize = lists.iter().map(|list| lengths[*list as usize]).sum();
                    prop_assert_eq!(arguments.len(), fields().named().len() + items + bounds);
                }
            }
            for (name, value) in fields().named() {
                prop_assert_eq!(variables[name].as_bytes(), value);
            }
            for list in List::ALL {
                let bound = |end: &str| variables[&format!("{}_{end}", list.name())].parse::<usize>().expect("a number");
                let (first, last) = (bound("first"), bound("last"));
                let found: Vec<&String> = (first..=last).map(|index| &arguments[index - 1]).collect();
                let length = if lists.contains(&list) { lengths[list as usize] } else { 0 };
                let written: Vec<String> = (0..length).map(|number| format!("{} {number}", list.name())).collect();
                prop_assert_eq!(found, written.iter().collect::<Vec<_>>());
            }
        }
    }
}
