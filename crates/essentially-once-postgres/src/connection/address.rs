//! URLs.

use std::str::FromStr as _;

use essentially_once::Error;
use tokio_postgres::{
    Config,
    config::{Host, SslMode, TargetSessionAttrs},
};

use crate::options::PgOptions;

/// Parses a URL. The library's message may quote it with its password, so this one replaces it.
pub(crate) fn parse(url: &str, options: &PgOptions) -> Result<Config, Error> {
    let invalid = |reason: &str| {
        Err(Error::InvalidSetting {
            setting: "PostgreSQL URL",
            reason: format!(
                "{reason}; expected postgres://[user[:password]@]host[:port][,host[:port]..][/database], and \
                 ?sslmode=require for TLS"
            ),
        })
    };
    if !url.starts_with("postgres://") && !url.starts_with("postgresql://") {
        return invalid("it does not begin with postgres://");
    }
    let Ok(mut config) = Config::from_str(url) else {
        return invalid("it cannot be parsed");
    };
    if config.get_hosts().is_empty() {
        return invalid("it has no host");
    }
    // The library's default would fall back to plain text without a word.
    if config.get_ssl_mode() == SslMode::Prefer {
        config.ssl_mode(SslMode::Disable);
    }
    match config.get_ssl_mode() {
        SslMode::Disable if options.has_certificates() => {
            return invalid("certificates are set, so it must have `sslmode=require`");
        }
        SslMode::Disable => {}
        _ if cfg!(not(feature = "tls")) => {
            return invalid("this build does not support TLS: enable the crate's feature `tls`");
        }
        _ => {}
    }
    config.target_session_attrs(TargetSessionAttrs::ReadWrite);
    config.connect_timeout(options.timeout);
    if config.get_application_name().is_none() {
        config.application_name("essentially-once");
    }
    Ok(config)
}

/// Hosts, ports and database, without user and password.
pub(crate) fn shown(config: &Config) -> String {
    let port = |place: usize| match config.get_ports() {
        [] => 5432,
        [port] => *port,
        ports => ports.get(place).copied().unwrap_or(5432),
    };
    let hosts = config.get_hosts().iter().enumerate().map(|(place, host)| match host {
        Host::Tcp(host) if host.contains(':') => format!("[{host}]:{}", port(place)),
        Host::Tcp(host) => format!("{host}:{}", port(place)),
        #[cfg(unix)]
        Host::Unix(path) => path.display().to_string(),
    });
    let hosts: Vec<_> = hosts.collect();
    let database = config.get_dbname().or(config.get_user()).unwrap_or_default();
    format!("PostgreSQL {}/{database}", hosts.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_url_is_not_quoted_and_a_shown_one_has_no_password() {
        let options = PgOptions::new();
        for url in [
            "",
            "redis://shop:secret@h",
            "host=h password=secret",
            "postgres://shop:secret@h:port/x",
            "postgres://shop:secret@h/x?sslmode=verify",
            "postgres://shop:secret@h/x?nonsense=secret",
            "postgres:///shop?password=secret",
        ] {
            let error = parse(url, &options).expect_err(url).to_string();
            assert!(
                error.contains("postgres://[user") && !error.contains("secret"),
                "{error}"
            );
        }
        for (url, expected) in [
            ("postgres://shop:secret@h/x", "PostgreSQL h:5432/x"),
            ("postgresql://shop:secret@h:1,[::1]:2/", "PostgreSQL h:1,[::1]:2/shop"),
        ] {
            assert_eq!(shown(&parse(url, &options).expect(url)), expected);
        }
    }

    #[cfg(feature = "tls")]
    #[test]
    fn certificates_need_a_url_with_tls() {
        let options = PgOptions::new().without_system_roots();
        let error = parse("postgres://h/x", &options).expect_err("no TLS").to_string();
        assert!(error.contains("sslmode=require"), "{error}");
        assert!(parse("postgres://h/x?sslmode=require", &options).is_ok());
    }
}
