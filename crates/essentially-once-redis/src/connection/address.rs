//! Addresses: URLs, and the addresses that servers report.

use std::{net::Ipv6Addr, ops::RangeInclusive};

use essentially_once::Error;
use redis::{ConnectionAddr, ConnectionInfo, ProtocolVersion, Value};

use crate::options::RedisOptions;

/// Parses a URL. The library's message may quote the URL with its password, so this one replaces
/// it.
pub(crate) fn parse(url: &str, options: &RedisOptions) -> Result<ConnectionInfo, Error> {
    let invalid = |reason: &str| Error::InvalidSetting {
        setting: "Redis URL",
        reason: format!(
            "{reason}; expected redis://[user:password@]host[:port][/database], rediss:// for TLS, or redis+unix:///path"
        ),
    };
    let parsed = redis::parse_redis_url(url).ok_or_else(|| invalid("it cannot be parsed"))?;
    let names_protocol = parsed.query_pairs().any(|(name, _)| name == "protocol");
    let info = redis::IntoConnectionInfo::into_connection_info(parsed).map_err(|_| invalid("it cannot be parsed"))?;
    let info = match names_protocol {
        true => info,
        false => {
            let settings = info.redis_settings().clone().set_protocol(ProtocolVersion::RESP3);
            info.set_redis_settings(settings)
        }
    };
    match info.addr() {
        addr if !addr.is_supported() => Err(invalid(
            "this build does not support TLS or Unix sockets: enable the crate's feature `tls`",
        )),
        ConnectionAddr::TcpTls { insecure: true, .. } => Err(invalid("`#insecure` is not supported")),
        ConnectionAddr::TcpTls { .. } => Ok(info),
        _ if options.has_certificates() => Err(invalid("certificates are set, so it must begin with rediss://")),
        _ => Ok(info),
    }
}

/// The same settings at another address; TLS stays on or off.
pub(crate) fn at(settings: &ConnectionInfo, host: Option<String>, port: u16) -> ConnectionInfo {
    let addr = match settings.addr().clone() {
        ConnectionAddr::TcpTls {
            host: old,
            insecure,
            tls_params,
            ..
        } => ConnectionAddr::TcpTls {
            host: host.unwrap_or(old),
            port,
            insecure,
            tls_params,
        },
        ConnectionAddr::Tcp(old, _) => ConnectionAddr::Tcp(host.unwrap_or(old), port),
        _ => ConnectionAddr::Tcp(host.unwrap_or_else(|| "127.0.0.1".into()), port),
    };
    settings.clone().set_addr(addr)
}

/// The number of slots of a cluster.
pub(crate) const SLOTS: usize = 16_384;

/// Host and port of the master, if this range of `CLUSTER SLOTS` contains the slot.
pub(crate) fn master_of(range: &[Value], slot: u64) -> Option<(String, u16)> {
    let (slots, master) = slots_of(range)?;
    slots.contains(&slot).then_some(master)
}

/// The slots of a range of `CLUSTER SLOTS`, and host and port of their master: `[first, last,
/// [host, port, …], replicas…]`.
pub(crate) fn slots_of(range: &[Value]) -> Option<(RangeInclusive<u64>, (String, u16))> {
    let number = |value: &Value| match value {
        Value::Int(number) => u64::try_from(*number).ok(),
        _ => None,
    };
    let [first, last, Value::Array(master), ..] = range else {
        return None;
    };
    let host = match master.first()? {
        Value::BulkString(host) => String::from_utf8_lossy(host).into_owned(),
        Value::SimpleString(host) => host.clone(),
        _ => String::new(),
    };
    let port = u16::try_from(number(master.get(1)?)?).ok()?;
    Some((number(first)?..=number(last)?, (host, port)))
}

pub(crate) fn is_tls(node: &ConnectionInfo) -> bool {
    matches!(node.addr(), ConnectionAddr::TcpTls { .. })
}

pub(crate) fn shown(addr: &ConnectionAddr) -> String {
    match addr {
        ConnectionAddr::Tcp(host, port) | ConnectionAddr::TcpTls { host, port, .. } => match host.parse::<Ipv6Addr>() {
            Ok(_) => format!("[{host}]:{port}"),
            Err(_) => format!("{host}:{port}"),
        },
        ConnectionAddr::Unix(path) => path.display().to_string(),
        _ => "an unknown kind of address".into(),
    }
}
