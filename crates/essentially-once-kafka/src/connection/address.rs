//! URLs.

use std::fmt;

use essentially_once::Error;

/// The parts of a URL.
#[derive(Clone)]
pub(crate) struct Address {
    /// As the client library takes them: `host:port,host:port`.
    pub(crate) brokers: String,
    pub(crate) user: Option<(String, String)>,
    pub(crate) tls: bool,
    /// Properties of the client library.
    pub(crate) settings: Vec<(String, String)>,
}

impl Address {
    /// Parses a URL. No message quotes it, because it may hold a password.
    pub(crate) fn parse(url: &str) -> Result<Self, Error> {
        let invalid = |reason: &str| Error::InvalidSetting {
            setting: "Kafka URL",
            reason: format!(
                "{reason}; expected kafka://[user:password@]host[:port][,host[:port]..][?property=value[&..]], or \
                 kafkas:// for TLS"
            ),
        };
        let (scheme, rest) = url.split_once("://").ok_or_else(|| invalid("it has no scheme"))?;
        let tls = match scheme {
            "kafka" => false,
            "kafkas" if cfg!(feature = "tls") => true,
            "kafkas" => {
                return Err(invalid(
                    "this build does not support TLS: enable the crate's feature `tls`",
                ));
            }
            _ => return Err(invalid("it does not begin with kafka://")),
        };
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let settings = query.split('&').filter(|setting| !setting.is_empty()).map(|setting| {
            let (name, value) = setting.split_once('=')?;
            decode(name).zip(decode(value))
        });
        let settings: Option<Vec<_>> = settings.collect();
        let settings = settings.ok_or_else(|| invalid("what follows the `?` is not `property=value`"))?;
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        let (user, hosts) = match rest.rsplit_once('@') {
            Some((user, hosts)) => {
                let (name, password) = user
                    .split_once(':')
                    .ok_or_else(|| invalid("the user has no password"))?;
                let decoded = decode(name).zip(decode(password));
                (
                    Some(decoded.ok_or_else(|| invalid("the user or password has a wrong % escape"))?),
                    hosts,
                )
            }
            None => (None, rest),
        };
        let brokers: Result<Vec<String>, Error> = hosts.split(',').map(|host| broker(host).map_err(invalid)).collect();
        Ok(Self {
            brokers: brokers?.join(","),
            user,
            tls,
            settings,
        })
    }
}

/// A host with a port.
fn broker(host: &str) -> Result<String, &'static str> {
    // The colons of an IPv6 address are in brackets.
    let after = host.rfind(']').map_or(0, |end| end + 1);
    let (name, port) = match host[after..].rfind(':') {
        Some(place) => (&host[..after + place], &host[after + place + 1..]),
        None => (host, "9092"),
    };
    let is_odd = |c: char| c.is_whitespace() || c.is_control() || matches!(c, '/' | '?' | '#' | '@');
    if name.is_empty() || name.contains(is_odd) {
        return Err("a host is missing or has characters that no host has");
    }
    match port.parse::<u16>() {
        Ok(port) if port > 0 => Ok(format!("{name}:{port}")),
        _ => Err("a port is not a number from 1 to 65535"),
    }
}

/// Decodes the percent escapes of RFC 3986, section 2.1.
fn decode(text: &str) -> Option<String> {
    let mut bytes = Vec::new();
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => {
                let digit = |byte: Option<u8>| char::from(byte?).to_digit(16);
                (digit(rest.next())? * 16 + digit(rest.next())?) as u8
            }
            byte => byte,
        });
    }
    String::from_utf8(bytes).ok()
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Kafka {}", self.brokers)
    }
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_parsed_and_shown_without_the_password() {
        for (url, brokers) in [
            ("kafka://h", "h:9092"),
            ("kafka://h:1/", "h:1"),
            ("kafka://a,b:2", "a:9092,b:2"),
            ("kafka://[::1]", "[::1]:9092"),
            ("kafka://[::1]:3", "[::1]:3"),
            ("kafka://shop:se%40cret@h", "h:9092"),
            ("kafka://shop:secret@h/?sasl.mechanism=SCRAM-SHA-512", "h:9092"),
            ("kafka://h?", "h:9092"),
        ] {
            let address = Address::parse(url).expect(url);
            assert_eq!(address.brokers, brokers);
            assert_eq!(
                format!("{address} {address:?}"),
                format!("Kafka {brokers} Kafka {brokers}")
            );
        }
        let address = Address::parse("kafka://shop:se%40cret@h").expect("valid");
        assert_eq!(address.user, Some(("shop".into(), "se@cret".into())));
        let address = Address::parse("kafka://h?client.rack=a%26b&ssl.ca.location=/ca.pem").expect("valid");
        let expected = [("client.rack", "a&b"), ("ssl.ca.location", "/ca.pem")];
        let settings = address.settings.iter();
        assert!(settings.eq(&expected.map(|(name, value)| (name.to_owned(), value.to_owned()))));
    }

    #[test]
    fn a_refused_url_is_not_quoted() {
        for url in [
            "",
            "secret",
            "redis://shop:secret@h",
            "kafka://",
            "kafka://secret@h",
            "kafka://shop:secret%4@h",
            "kafka://shop:secret%ff@h",
            "kafka://shop:secret@",
            "kafka://shop:secret@h:port",
            "kafka://shop:secret@h:0",
            "kafka://shop:secret@h,,i",
            "kafka://shop:secret@h/orders",
            "kafka://shop:secret@h?secret",
            "kafka://shop:se?cret@h",
        ] {
            let error = Address::parse(url).expect_err(url).to_string();
            assert!(error.contains("kafka://[user") && !error.contains("secret"), "{error}");
        }
    }
}
