//! TLS: which authorities to trust, and the client's certificate.

use std::sync::Arc;

use essentially_once::Error;
use rustls::{
    ClientConfig, RootCertStore,
    crypto::{CryptoProvider, ring},
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
};
use tokio_postgres_rustls::MakeRustlsConnect;

use crate::options::PgOptions;

/// Reads the certificates.
pub(crate) fn connector(options: &PgOptions) -> Result<MakeRustlsConnect, Error> {
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
    Ok(MakeRustlsConnect::new(config))
}

/// The system's root certificates, and those of the options.
fn roots(options: &PgOptions) -> Result<RootCertStore, Error> {
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
