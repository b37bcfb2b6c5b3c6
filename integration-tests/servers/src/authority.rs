//! Certificates.

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};

use crate::Error;

/// A certificate and its key, as PEM.
pub struct Pair {
    /// The certificate.
    pub certificate: String,
    /// Its private key.
    pub key: String,
}

/// An authority that nobody else knows, and what it signed.
pub struct Authority {
    /// Its own certificate, as PEM.
    pub root: String,
    /// For a server.
    pub server: Pair,
    /// For a client.
    pub client: Pair,
}

impl Authority {
    /// With new keys; the server's certificate is for these names.
    ///
    /// # Errors
    /// The library's.
    pub fn new(server_names: &[&str]) -> Result<Self, Error> {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params
            .distinguished_name
            .push(DnType::CommonName, "authority of a test");
        let key = KeyPair::generate()?;
        let root = params.self_signed(&key)?.pem();
        let issuer = Issuer::new(params, key);
        let signed = |names: &[&str]| {
            let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
            let key = KeyPair::generate()?;
            let certificate = CertificateParams::new(names)?.signed_by(&key, &issuer)?.pem();
            let key = key.serialize_pem();
            Ok::<_, Error>(Pair { certificate, key })
        };
        Ok(Self {
            server: signed(server_names)?,
            client: signed(&["client"])?,
            root,
        })
    }
}
