//! Files of keys. [`Keys::from_file`] describes the format.

use std::{
    fmt,
    fs::File,
    io::{self, Read as _},
    path::Path,
};

use super::keys::{Key, Keys};
use crate::Error;

/// Far more than all keys of a system take.
const LIMIT: u64 = 64 * 1024;

const HOW: &str = "write `<id> = <key>` to it, with a key from `openssl rand -hex 32`, and make it readable only for its \
                   owner (`chmod 600`)";

pub(super) fn read(path: &Path) -> Result<Keys, Error> {
    let failed = |error: io::Error| {
        let action = format!("read signing keys from {}", path.display());
        match error.kind() {
            io::ErrorKind::NotFound => Error::failed(action, format!("there is no such file; {HOW}")),
            _ => Error::failed(action, error),
        }
    };
    let file = File::open(path).map_err(failed)?;
    // Asked of the open file, so that nobody can exchange it in between.
    let metadata = file.metadata().map_err(failed)?;
    if metadata.is_dir() {
        return Err(invalid(path, "is a folder; name a file in it"));
    }
    check_rights(&metadata).map_err(|reason| invalid(path, reason))?;
    let mut text = Vec::new();
    file.take(LIMIT + 1).read_to_end(&mut text).map_err(failed)?;
    if text.len() as u64 > LIMIT {
        let reason = format!("has more than {} KiB; is it a file of keys?", LIMIT / 1024);
        return Err(invalid(path, reason));
    }
    parse(&text).map_err(|fault| match fault {
        Fault::Empty => invalid(path, format!("has no key; {HOW}")),
        Fault::Line(line, reason) => invalid(path, format!("has an invalid line {line}: {reason}")),
    })
}

fn invalid(path: &Path, reason: impl fmt::Display) -> Error {
    Error::InvalidSetting {
        setting: "signing keys",
        reason: format!("{} {reason}", path.display()),
    }
}

#[cfg(unix)]
fn check_rights(metadata: &std::fs::Metadata) -> Result<(), String> {
    use std::os::unix::fs::PermissionsExt as _;

    let mode = metadata.permissions().mode() & 0o777;
    match mode & 0o077 {
        0 => Ok(()),
        _ => Err(format!(
            "has the mode {mode:03o}, so others than its owner have rights to it; run `chmod 600` on it, and replace the \
             keys if somebody may have read them"
        )),
    }
}

/// Other systems have no mode to check.
#[cfg(not(unix))]
fn check_rights(_: &std::fs::Metadata) -> Result<(), String> {
    Ok(())
}

#[derive(Debug)]
enum Fault {
    Empty,
    /// The line, counted from 1, and what is wrong with it.
    Line(usize, String),
}

fn parse(text: &[u8]) -> Result<Keys, Fault> {
    let mut keys: Option<Keys> = None;
    for (number, line) in (1..).zip(text.split(|byte| *byte == b'\n')) {
        let Some(key) = parse_line(line).map_err(|reason| Fault::Line(number, reason))? else {
            continue;
        };
        match &mut keys {
            None => keys = Some(Keys::of(key)),
            Some(keys) if keys.find(&key.id).is_some() => {
                let reason = "an earlier line has the same id; give each key an id of its own";
                return Err(Fault::Line(number, reason.into()));
            }
            Some(keys) => keys.push(key),
        }
    }
    keys.ok_or(Fault::Empty)
}

/// The key of a line, unless it is empty or a comment. A reason never repeats the line, which may
/// hold a key in an unexpected place.
fn parse_line(line: &[u8]) -> Result<Option<Key>, String> {
    let line = str::from_utf8(line)
        .map_err(|_| "it is not UTF-8 text; write `<id> = <key>`")?
        .trim();
    if line.is_empty() || line.starts_with('#') {
        return Ok(None);
    }
    let (id, digits) = line.split_once('=').ok_or("it has no `=`; write `<id> = <key>`")?;
    let key = base16ct::mixed::decode_vec(digits.trim())
        .map_err(|_| "the key is not an even number of hexadecimal digits; make one with `openssl rand -hex 32`")?;
    Key::new(id.trim(), &key).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: &str = "4fd0eb4cb2ea83d97d6d22a1d07d4e4b8b1b5ed4d9f38f8ea9d6d1d4dd2bb5a7";
    const NEW: &str = "E6B59D3BBF1F35A4DD4BC0E2AB62D2D4C9AC9F85A07AB1EE46FCEA6F33BA4D85";

    /// What `read` makes of a file with this text and mode.
    fn read_file(text: impl AsRef<[u8]>, mode: u32) -> Result<Keys, String> {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("keys");
        std::fs::write(&path, text).expect("write");
        set_mode(&path, mode);
        let place = path.display().to_string();
        read(&path).map_err(|error| {
            let error = error.to_string();
            assert!(error.contains(&place), "it names the file: {error}");
            for key in [OLD, NEW] {
                let shown = (0..=key.len() - 8).any(|at| error.contains(&key[at..at + 8]));
                assert!(!shown, "it shows a part of a key: {error}");
            }
            error.replace(&place, "keys")
        })
    }

    #[cfg(unix)]
    fn set_mode(path: &Path, mode: u32) {
        use std::os::unix::fs::PermissionsExt as _;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).expect("chmod");
    }

    #[cfg(not(unix))]
    fn set_mode(_: &Path, _: u32) {}

    #[test]
    fn the_first_key_signs_and_the_others_are_accepted() {
        let text = format!("# Keys of orders\n\n  2026-12={NEW}\r\n\t# old\n 2026-11 = {OLD} \nb = {NEW}{OLD}");
        for mode in [0o600, 0o400] {
            let keys = read_file(&text, mode).expect("valid");
            assert_eq!(
                format!("{keys:?}"),
                "Keys { signing: \"2026-12\", accepted: [\"2026-11\", \"b\"] }"
            );
        }
        let bytes = base16ct::mixed::decode_vec(NEW).expect("hexadecimal");
        let record = || {
            let producer = crate::ProducerId::new("web").expect("name");
            crate::NewRecord::new("x").origin(crate::Origin::new(producer, crate::Epoch::STABLE, 1))
        };
        let signed = |keys| {
            let signer = crate::signed::Signer::new("orders", keys).expect("name");
            signer.sign(record()).expect("signs")
        };
        let given = Keys::new("2026-12", bytes).expect("a key");
        assert_eq!(signed(read_file(&text, 0o600).expect("valid")), signed(given));
    }

    #[test]
    fn a_line_that_breaks_a_rule_is_named_and_not_repeated() {
        let good = format!("a = {OLD}\n");
        let hex = "line 2: the key is not an even number of hexadecimal digits";
        for (line, reason) in [
            (NEW.to_owned(), "line 2: it has no `=`"),
            (format!("{NEW} = b"), hex),
            (format!("{NEW} = {OLD}"), "line 2: the id of the key is invalid"),
            (format!(" = {NEW}"), "line 2: the id of the key is invalid"),
            (format!("a b = {NEW}"), "line 2: the id of the key is invalid"),
            (format!("b = {}", &NEW[..62]), "line 2: the key has 31 bytes"),
            ("b =".into(), "line 2: the key has 0 bytes"),
            (format!("b = {}", &NEW[1..]), hex),
            (format!("b = {NEW} # new"), hex),
            (format!("b = \"{NEW}\""), hex),
            (format!("a = {NEW}"), "line 2: an earlier line has the same id"),
        ] {
            let error = read_file(format!("{good}{line}\n"), 0o600).expect_err(reason);
            assert!(
                error.starts_with("signing keys: keys ") && error.contains(reason),
                "{error}"
            );
        }
        let error = read_file([good.as_bytes(), b"# \xff\n"].concat(), 0o600).expect_err("not text");
        assert!(error.contains("line 2: it is not UTF-8"), "{error}");
    }

    #[test]
    fn a_file_without_keys_is_refused() {
        for text in ["", "\n", "# a = b\n"] {
            let error = read_file(text, 0o600).expect_err("empty");
            assert!(error.contains("has no key") && error.contains("openssl"), "{error}");
        }
        let folder = tempfile::tempdir().expect("a folder");
        let missing = read(&folder.path().join("none")).expect_err("missing").to_string();
        assert!(
            missing.contains("no such file") && missing.contains("openssl"),
            "{missing}"
        );
        let error = read(folder.path()).expect_err("a folder").to_string();
        assert!(error.ends_with("is a folder; name a file in it"), "{error}");
        let error = read_file(vec![b'#'; LIMIT as usize + 1], 0o600).expect_err("too long");
        assert!(error.contains("more than 64 KiB"), "{error}");
    }

    #[cfg(unix)]
    #[test]
    fn a_file_that_group_or_others_have_rights_to_is_refused() {
        for mode in [0o640, 0o604, 0o620, 0o602, 0o644, 0o601, 0o610] {
            let error = read_file(format!("a = {OLD}\n"), mode).expect_err("too open");
            assert!(
                error.contains(&format!("mode {mode:03o}")) && error.contains("chmod 600"),
                "{error}"
            );
        }
    }
}
