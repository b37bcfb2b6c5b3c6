//! The core's root exports what handler authors need, and little more.

/// The most names that the root may export, modules included.
const MOST: usize = 30;

/// What is wrong with the exports of this crate root.
pub(super) fn fault(source: &str) -> Option<String> {
    let names = names(source);
    match names.len() {
        0 => Some("the root is missing, or exports nothing".into()),
        1..=MOST => None,
        count => Some(format!(
            "the root exports {count} names, but at most {MOST} are allowed: move some to a module ({})",
            names.join(", ")
        )),
    }
}

/// The names that a root exports. It must consist of `mod` and `use` items, without globs.
fn names(source: &str) -> Vec<String> {
    let lines = source.lines().filter(|line| !line.trim_start().starts_with("//"));
    let code = lines.collect::<Vec<_>>().join("\n");
    code.split(';')
        .filter_map(|item| item.split_once("pub "))
        .filter(|(attributes, _)| !attributes.contains("doc(hidden)"))
        .flat_map(|(_, item)| {
            let item = item.strip_prefix("use ").or(item.strip_prefix("mod ")).unwrap_or(item);
            item.split(['{', '}', ',']).filter_map(last_name).map(str::to_owned)
        })
        .collect()
}

/// The name that a path such as `log::Log` or `log::Log as Stream` exports.
fn last_name(path: &str) -> Option<&str> {
    let name = path.rsplit("::").next()?.rsplit(" as ").next()?.trim();
    (!name.is_empty()).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOT: &str = "\
//! A crate; with pub use of words.
mod log;
pub mod memory;
pub(crate) mod inner;
/// Documented.
pub use async_trait::async_trait;
#[doc(hidden)]
pub use crate::macros::hidden;
#[cfg(unix)]
pub use crate::{
    log::{Log, LogReader as Reader},
    name::Id,
};
use crate::log::Private;
";

    #[test]
    fn public_names_are_counted() {
        assert_eq!(names(ROOT), ["memory", "async_trait", "Log", "Reader", "Id"]);
    }

    #[test]
    fn one_name_too_many_is_reported() {
        let root = |count: usize| {
            (0..count)
                .map(|n| format!("pub use crate::m::N{n};\n"))
                .collect::<String>()
        };
        assert_eq!(fault(&root(MOST)), None);
        assert!(fault("mod private;").is_some());
        let complaint = fault(&root(MOST + 1)).expect("one too many");
        let (count, last) = (format!("{} names", MOST + 1), format!("N{MOST}"));
        assert!(complaint.contains(&count) && complaint.contains(&last), "{complaint}");
    }
}
