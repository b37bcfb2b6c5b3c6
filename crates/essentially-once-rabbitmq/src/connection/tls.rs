//! TLS with rustls, without a provider of cryptography for the whole process.

use std::sync::Arc;

use essentially_once::Error;
use rustls::{
    ClientConfig, RootCertStore,
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
};

use crate::options::RabbitOptions;

/// The configuration of all connections: the system's roots and those of the options.
pub(super) fn config(options: &RabbitOptions) -> Result<Arc<ClientConfig>, Error> {
    // A program may have chosen a provider for itself. If not, this crate uses its own.
    let provider = match CryptoProvider::get_default() {
        Some(chosen) => Arc::clone(chosen),
        None => Arc::new(rustls::crypto::ring::default_provider()),
    };
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| Error::failed("configure TLS", error))?
        .with_root_certificates(roots(options)?);
    let config = match (&options.client_certificate, &options.client_key) {
        (Some(certificate), Some(key)) => {
            let chain = certificates("client_certificate", &certificate.0)?;
            // The parser's error may quote the key, so this one replaces it.
            let key = PrivateKeyDer::from_pem_slice(&key.0)
                .map_err(|_| invalid("client_key", "it contains no private key in PEM format".into()))?;
            builder.with_client_auth_cert(chain, key).map_err(|error| {
                invalid(
                    "client_certificate",
                    format!("it does not belong to `client_key`: {error}"),
                )
            })?
        }
        _ => builder.with_no_client_auth(),
    };
    Ok(Arc::new(config))
}

fn roots(options: &RabbitOptions) -> Result<RootCertStore, Error> {
    let mut roots = RootCertStore::empty();
    if !options.without_system_roots {
        let system = rustls_native_certs::load_native_certs();
        for error in &system.errors {
            tracing::warn!(%error, "cannot read some root certificates of the system");
        }
        roots.add_parsable_certificates(system.certs);
    } else if options.root_certificates.is_empty() {
        return Err(invalid(
            "without_system_roots",
            "it needs `add_root_certificate`".into(),
        ));
    }
    for pem in &options.root_certificates {
        for certificate in certificates("add_root_certificate", &pem.0)? {
            roots.add(certificate).map_err(|error| {
                invalid(
                    "add_root_certificate",
                    format!("it is not a valid certificate: {error}"),
                )
            })?;
        }
    }
    Ok(roots)
}

fn certificates(setting: &'static str, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, Error> {
    match CertificateDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>() {
        Ok(certificates) if !certificates.is_empty() => Ok(certificates),
        _ => Err(invalid(setting, "it contains no certificate in PEM format".into())),
    }
}

fn invalid(setting: &'static str, reason: String) -> Error {
    Error::InvalidSetting { setting, reason }
}

#[cfg(test)]
mod tests {
    use test_servers::{Authority, Pair};

    use super::*;

    /// A key whose line breaks were lost on the way, as in an environment variable.
    #[test]
    fn a_broken_key_is_refused_and_not_quoted() {
        let authority = Authority::new(&["localhost"]).expect("an authority");
        let Pair { certificate, key } = &authority.client;
        let on_one_line = key.replace('\n', " ");
        let options = RabbitOptions::new()
            .client_certificate(certificate.as_str())
            .client_key(on_one_line.as_str());
        match config(&options) {
            // The whole reason, since a quotation may take any form, such as a list of numbers.
            Err(Error::InvalidSetting { setting, reason }) => assert_eq!(
                (setting, reason.as_str()),
                ("client_key", "it contains no private key in PEM format")
            ),
            Err(error) => panic!("{error}"),
            Ok(_) => panic!("it should be refused"),
        }
    }

    #[test]
    fn the_roots_of_the_system_can_be_left_out() {
        let authority = Authority::new(&["localhost"]).expect("an authority");
        let only_added = RabbitOptions::new()
            .add_root_certificate(authority.root.as_str())
            .without_system_roots();
        assert_eq!(roots(&only_added).expect("certificates").len(), 1);
        let none = roots(&RabbitOptions::new().without_system_roots());
        assert!(
            matches!(
                &none,
                Err(Error::InvalidSetting {
                    setting: "without_system_roots",
                    ..
                })
            ),
            "{none:?}"
        );
    }

    /// Some tools write the certificate and its key into one file.
    #[test]
    fn a_bundle_of_certificate_and_key_serves_as_both() {
        let authority = Authority::new(&["localhost"]).expect("an authority");
        let Pair { certificate, key } = &authority.client;
        for bundle in [format!("{certificate}{key}"), format!("{key}{certificate}")] {
            let options = RabbitOptions::new()
                .client_certificate(bundle.as_str())
                .client_key(bundle.as_str());
            assert!(config(&options).is_ok());
        }
    }
}
