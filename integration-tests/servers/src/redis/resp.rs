//! The part of the protocol that administration needs: one command, one reply.

use std::{
    io::{BufRead, BufReader, Read as _, Write as _},
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

use crate::Error;

/// A server's reply. Its errors are `Err`.
#[derive(Clone, Debug, PartialEq)]
pub enum Reply {
    /// No value, for example of a missing key.
    Nil,
    /// A number.
    Int(i64),
    /// A status or a string. Bytes that are not UTF-8 are replaced.
    Text(String),
    /// Several replies.
    List(Vec<Reply>),
}

impl Reply {
    /// The text. Empty for other kinds of replies.
    pub fn text(&self) -> &str {
        match self {
            Self::Text(text) => text,
            _ => "",
        }
    }

    /// The replies of a list. Empty for other kinds of replies.
    pub fn list(&self) -> &[Reply] {
        match self {
            Self::List(list) => list,
            _ => &[],
        }
    }

    /// The value after a name in a flat list of names and values, as in the replies to `SENTINEL
    /// MASTER` and `XINFO`.
    pub fn field(&self, name: &str) -> Option<&Reply> {
        let (pairs, _) = self.list().as_chunks::<2>();
        pairs.iter().find(|[key, _]| key.text() == name).map(|[_, value]| value)
    }

    /// The value in a text of `name:value` lines, as in the replies to `INFO` and `CLUSTER INFO`.
    pub fn line(&self, name: &str) -> Option<&str> {
        self.text()
            .lines()
            .find_map(|line| line.split_once(':').filter(|(key, _)| *key == name))
            .map(|(_, value)| value)
    }
}

/// A connection to a server's socket.
pub(super) struct Client(BufReader<UnixStream>);

impl Client {
    pub(super) fn connect(socket: &Path, limit: Duration) -> Result<Self, Error> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(limit))?;
        stream.set_write_timeout(Some(limit))?;
        Ok(Self(BufReader::new(stream)))
    }

    pub(super) fn command<A: AsRef<[u8]>>(&mut self, arguments: &[A]) -> Result<Reply, Error> {
        let mut request = format!("*{}\r\n", arguments.len()).into_bytes();
        for argument in arguments.iter().map(AsRef::as_ref) {
            request.extend(format!("${}\r\n", argument.len()).bytes());
            request.extend(argument);
            request.extend(b"\r\n");
        }
        self.0.get_mut().write_all(&request)?;
        self.reply()
    }

    fn reply(&mut self) -> Result<Reply, Error> {
        let mut line = String::new();
        self.0.read_line(&mut line)?;
        let Some(line) = line.strip_suffix("\r\n").filter(|line| !line.is_empty()) else {
            return Err("the server closed the connection".into());
        };
        let (kind, rest) = line.split_at_checked(1).ok_or("the server's reply is not RESP")?;
        match kind {
            "+" => Ok(Reply::Text(rest.to_owned())),
            "-" => Err(rest.into()),
            ":" => Ok(Reply::Int(rest.parse()?)),
            "$" | "*" if rest.starts_with('-') => Ok(Reply::Nil),
            "$" => {
                let mut bytes = vec![0; rest.parse::<usize>()? + 2];
                self.0.read_exact(&mut bytes)?;
                bytes.truncate(bytes.len() - 2);
                Ok(Reply::Text(String::from_utf8_lossy(&bytes).into_owned()))
            }
            "*" => (0..rest.parse::<usize>()?)
                .map(|_| self.reply())
                .collect::<Result<_, _>>()
                .map(Reply::List),
            _ => Err(format!("the server's reply begins with {kind:?}, which is not RESP").into()),
        }
    }
}
