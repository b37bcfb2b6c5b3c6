//! Creates certificates.

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};

use crate::Error;

/// A certificate and its key, as PEM.
pub struct Pair {
    /// The certificate.
    pub certificate: String,
    /// Its private key.
    pub key: String,
}

/// A certificate authority that nobody else trusts, and the certificates that it signed.
pub struct Authority {
    /// The authority's own certificate, as PEM.
    pub root: String,
    /// The server's certificate.
    pub server: Pair,
    /// The client's certificate.
    pub client: Pair,
}

impl Authority {
    /// Creates all of them with new keys. The server's certificate is valid for these names.
    ///
    /// # Errors
    /// Those of the library.
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
