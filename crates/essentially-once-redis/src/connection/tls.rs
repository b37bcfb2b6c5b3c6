//! Connecting with TLS.
//!
//! The client library's own TLS needs a process-wide cryptography provider, and installs one. This
//! module needs none. It also reads the system's root certificates once instead of once per
//! connection.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use essentially_once::Error;
use redis::{
    AsyncConnectionConfig, ConnectionAddr, ConnectionInfo, ErrorKind, RedisError, RedisResult,
    aio::MultiplexedConnection,
};
use rustls::{
    ClientConfig, RootCertStore,
    crypto::{CryptoProvider, ring},
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _},
};
use tokio::{net::TcpStream, task::JoinSet};
use tokio_rustls::{TlsConnector, client::TlsStream};

use crate::{connection::live::SharedConnection, options::RedisOptions};

/// The TLS settings of a server.
pub(crate) struct Tls {
    connector: TlsConnector,
}

impl Tls {
    pub(crate) fn new(options: &RedisOptions) -> Result<Self, Error> {
        let provider = CryptoProvider::get_default().cloned();
        let provider = provider.unwrap_or_else(|| Arc::new(ring::default_provider()));
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| Error::failed("set up TLS", error))?
            .with_root_certificates(roots(options)?);
        let config = match (&options.client_certificate, &options.client_key) {
            (None, None) => config.with_no_client_auth(),
            (Some(certificate), Some(key)) => config
                .with_client_auth_cert(certificates("client_certificate", certificate)?, private_key(key)?)
                .map_err(|error| invalid("client_certificate", format!("it does not fit `client_key`: {error}")))?,
            (Some(_), None) => return Err(invalid("client_certificate", "it needs `client_key`")),
            (None, Some(_)) => return Err(invalid("client_key", "it needs `client_certificate`")),
        };
        Ok(Self {
            connector: Arc::new(config).into(),
        })
    }

    /// Connects within the limit. Dropping the future closes the connection.
    pub(crate) async fn connect(
        &self,
        node: &ConnectionInfo,
        config: &AsyncConnectionConfig,
        limit: Duration,
    ) -> RedisResult<SharedConnection> {
        let connecting = async {
            let stream = self.stream(node.addr()).await?;
            MultiplexedConnection::new_with_config(node.redis_settings(), stream, config.clone()).await
        };
        let connected = tokio::time::timeout(limit, connecting).await;
        let (connection, driver) = connected.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
        let driver = tokio::spawn(driver);
        Ok(SharedConnection::driven_by(connection, driver.abort_handle()))
    }

    async fn stream(&self, address: &ConnectionAddr) -> RedisResult<TlsStream<TcpStream>> {
        let ConnectionAddr::TcpTls { host, port, .. } = address else {
            return Err(RedisError::from((
                ErrorKind::InvalidClientConfig,
                "the address has no TLS",
            )));
        };
        let name = ServerName::try_from(host.clone()).map_err(io::Error::other)?;
        let stream = dial(host, *port).await?;
        Ok(self.connector.connect(name, stream).await?)
    }
}

/// Connects to the address that answers first, since a host may have some that do not answer.
async fn dial(host: &str, port: u16) -> io::Result<TcpStream> {
    let mut attempts = JoinSet::new();
    for address in tokio::net::lookup_host((host, port)).await? {
        attempts.spawn(TcpStream::connect::<SocketAddr>(address));
    }
    let mut last = io::Error::other("the host name has no address");
    while let Some(attempt) = attempts.join_next().await {
        match attempt? {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// The system's root certificates, and those of the options.
fn roots(options: &RedisOptions) -> Result<RootCertStore, Error> {
    const SETTING: &str = "add_root_certificate";
    let mut roots = RootCertStore::empty();
    if !options.without_system_roots {
        let system = rustls_native_certs::load_native_certs();
        for error in &system.errors {
            tracing::warn!(%error, "cannot read some root certificates of the system");
        }
        roots.add_parsable_certificates(system.certs);
    } else if options.root_certificates.is_empty() {
        return Err(invalid("without_system_roots", "it needs `add_root_certificate`"));
    }
    for pem in &options.root_certificates {
        for certificate in certificates(SETTING, pem)? {
            let added = roots.add(certificate);
            added.map_err(|error| invalid(SETTING, format!("it contains an invalid certificate: {error}")))?;
        }
    }
    Ok(roots)
}

/// At least one certificate. The parser's error may quote the text, so this one replaces it.
fn certificates(setting: &'static str, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, Error> {
    match CertificateDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>() {
        Ok(certificates) if !certificates.is_empty() => Ok(certificates),
        _ => Err(invalid(setting, "it contains no certificate in PEM format")),
    }
}

fn private_key(pem: &[u8]) -> Result<PrivateKeyDer<'static>, Error> {
    let key = PrivateKeyDer::from_pem_slice(pem);
    key.map_err(|_| invalid("client_key", "it contains no private key in PEM format"))
}

fn invalid(setting: &'static str, reason: impl Into<String>) -> Error {
    Error::InvalidSetting {
        setting,
        reason: reason.into(),
    }
}

#[cfg(test)]
mod tests {
    use test_servers::{Authority, Pair};

    use super::*;

    fn refused(options: RedisOptions) -> (&'static str, String) {
        match Tls::new(&options) {
            Err(Error::InvalidSetting { setting, reason }) => (setting, reason),
            Err(error) => panic!("{error}"),
            Ok(_) => panic!("it should be refused"),
        }
    }

    #[test]
    fn settings_are_refused_by_name_and_no_provider_is_installed() {
        let authority = Authority::new(&["localhost"]).expect("an authority");
        let Pair { certificate, key } = &authority.client;
        let options = || RedisOptions::new().add_root_certificate(authority.root.as_str());
        let pair = options()
            .client_certificate(certificate.as_str())
            .client_key(key.as_str());
        assert!(Tls::new(&pair).is_ok());
        for (options, setting, reason) in [
            (
                options().add_root_certificate("x"),
                "add_root_certificate",
                "no certificate",
            ),
            (
                options().client_certificate(certificate.as_str()),
                "client_certificate",
                "`client_key`",
            ),
            (options().client_key(key.as_str()), "client_key", "`client_certificate`"),
            (
                pair.clone().client_certificate("x"),
                "client_certificate",
                "no certificate",
            ),
            (pair.clone().client_key("x"), "client_key", "no private key"),
            (
                pair.client_key(authority.server.key.as_str()),
                "client_certificate",
                "does not fit",
            ),
        ] {
            let (found, why) = refused(options);
            assert_eq!(found, setting, "{why}");
            assert!(why.contains(reason), "{why}");
        }
        assert!(CryptoProvider::get_default().is_none());
    }

    #[test]
    fn an_added_root_certificate_joins_those_of_the_system() {
        let system = roots(&RedisOptions::new()).expect("the system's certificates").len();
        let authority = Authority::new(&["localhost"]).expect("an authority");
        let options = RedisOptions::new().add_root_certificate(authority.root.as_str());
        let options = options.add_root_certificate(Authority::new(&["localhost"]).expect("an authority").root);
        assert_eq!(roots(&options).expect("certificates").len(), system + 2);
        let only_added = options.without_system_roots();
        assert_eq!(roots(&only_added).expect("certificates").len(), 2);
        let (setting, why) = refused(RedisOptions::new().without_system_roots());
        assert_eq!(setting, "without_system_roots", "{why}");
    }
}
