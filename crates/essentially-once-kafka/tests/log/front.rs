//! What stands before a broker that knows neither TLS nor passwords.

use std::{net::Ipv4Addr, sync::Arc};

use essentially_once::backend::Source;
use rustls::{
    RootCertStore, ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    server::WebPkiClientVerifier,
};
use test_servers::{Authority, Pair};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    task::JoinSet,
};
use tokio_rustls::TlsAcceptor;

/// The numbers of the requests that it answers itself.
const API_VERSIONS: i16 = 18;
const SASL_HANDSHAKE: i16 = 17;
const SASL_AUTHENTICATE: i16 = 36;

const UNSUPPORTED_SASL_MECHANISM: i16 = 33;
const UNSUPPORTED_VERSION: i16 = 35;
const SASL_AUTHENTICATION_FAILED: i16 = 58;

/// What a client must do before its requests reach the broker.
#[derive(Clone, Default)]
pub(crate) struct Rules {
    pub(crate) tls: Option<Arc<ServerConfig>>,
    /// A user and a password, which are sent by the mechanism `PLAIN`.
    pub(crate) user: Option<(&'static str, &'static str)>,
}

/// A port of 127.0.0.1 at which these rules hold. Dropping it closes its connections.
pub(crate) struct Front {
    pub(crate) port: u16,
    _connections: JoinSet<()>,
}

impl Front {
    /// Passes requests on to the broker at that port.
    pub(crate) async fn start(broker: u16, rules: Rules) -> Result<Self, Source> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let port = listener.local_addr()?.port();
        let mut connections = JoinSet::new();
        connections.spawn(async move {
            let mut serving = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                let rules = rules.clone();
                let passage = Passage { broker, port };
                // A client whose connection ends hears nothing more from a broker either.
                serving.spawn(async move { drop(passage.open(client, rules).await) });
            }
        });
        Ok(Self {
            port,
            _connections: connections,
        })
    }
}

/// The server's side of TLS. Clients show a certificate of this authority if they must.
pub(crate) fn tls(authority: &Authority, clients_too: bool) -> Result<Arc<ServerConfig>, Source> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(Arc::clone(&provider)).with_safe_default_protocol_versions()?;
    let config = match clients_too {
        false => config.with_no_client_auth(),
        true => {
            let mut roots = RootCertStore::empty();
            roots.add(CertificateDer::from_pem_slice(authority.root.as_bytes())?)?;
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build()?;
            config.with_client_cert_verifier(verifier)
        }
    };
    let Pair { certificate, key } = &authority.server;
    let certificate = CertificateDer::from_pem_slice(certificate.as_bytes())?;
    let key = PrivateKeyDer::from_pem_slice(key.as_bytes())?;
    Ok(Arc::new(config.with_single_cert(vec![certificate], key)?))
}

/// One connection's way to the broker.
struct Passage {
    broker: u16,
    /// The port that replies name instead of the broker's.
    port: u16,
}

impl Passage {
    async fn open(&self, client: TcpStream, Rules { tls, user }: Rules) -> Result<(), Source> {
        client.set_nodelay(true)?;
        match tls {
            None => self.pass(client, user).await,
            Some(tls) => self.pass(TlsAcceptor::from(tls).accept(client).await?, user).await,
        }
    }

    /// Answers one request after the other.
    async fn pass(
        &self,
        mut client: impl AsyncRead + AsyncWrite + Unpin,
        user: Option<(&str, &str)>,
    ) -> Result<(), Source> {
        let mut broker = TcpStream::connect((Ipv4Addr::LOCALHOST, self.broker)).await?;
        broker.set_nodelay(true)?;
        let mut is_known = user.is_none();
        loop {
            let request = read_frame(&mut client).await?;
            let (mut header, number) = (&request[..], &request[4..8]);
            let (kind, version) = (header.read_i16().await?, header.read_i16().await?);
            let mut reply = number.to_vec();
            match (kind, user) {
                // Clients ask again in version 0 (KIP-511), which is easy to add to.
                (API_VERSIONS, Some(_)) if version > 0 => {
                    reply.extend(UNSUPPORTED_VERSION.to_be_bytes());
                    reply.extend(0_i32.to_be_bytes());
                }
                (API_VERSIONS, Some(_)) => {
                    reply = self.ask(&mut broker, &request).await?;
                    let count = i32::from_be_bytes(reply[6..10].try_into()?) + 2;
                    reply[6..10].copy_from_slice(&count.to_be_bytes());
                    for number in [SASL_HANDSHAKE, 0, 1, SASL_AUTHENTICATE, 0, 0] {
                        reply.extend(number.to_be_bytes());
                    }
                }
                (SASL_HANDSHAKE, Some(_)) => {
                    let error = match request.ends_with(b"\x00\x05PLAIN") {
                        true => 0,
                        false => UNSUPPORTED_SASL_MECHANISM,
                    };
                    reply.extend(error.to_be_bytes());
                    reply.extend(b"\x00\x00\x00\x01\x00\x05PLAIN");
                }
                (SASL_AUTHENTICATE, Some((name, password))) => {
                    // RFC 4616.
                    is_known = request.ends_with(format!("\0{name}\0{password}").as_bytes());
                    let error = if is_known { 0 } else { SASL_AUTHENTICATION_FAILED };
                    reply.extend(error.to_be_bytes());
                    // As Kafka answers: a text, and no bytes. From version 1 on, also that the
                    // session has no end.
                    let text = if is_known {
                        ""
                    } else {
                        "Authentication failed: Invalid username or password"
                    };
                    reply.extend(u16::try_from(text.len())?.to_be_bytes());
                    reply.extend(text.as_bytes());
                    reply.extend([0; 4]);
                    reply.extend(&[0; 8][..if version > 0 { 8 } else { 0 }]);
                }
                _ if is_known => reply = self.ask(&mut broker, &request).await?,
                _ => return Err("a request of a client that is not known".into()),
            }
            client.write_all(&u32::try_from(reply.len())?.to_be_bytes()).await?;
            client.write_all(&reply).await?;
            client.flush().await?;
        }
    }

    /// The broker's reply, with this port instead of its own.
    async fn ask(&self, broker: &mut TcpStream, request: &[u8]) -> Result<Vec<u8>, Source> {
        broker.write_all(&u32::try_from(request.len())?.to_be_bytes()).await?;
        broker.write_all(request).await?;
        let mut reply = read_frame(broker).await?;
        let [from, to] = [self.broker, self.port].map(|port| {
            let port = u32::from(port).to_be_bytes();
            [&b"127.0.0.1"[..], &port].concat()
        });
        for place in 0..reply.len() {
            if reply[place..].starts_with(&from) {
                reply[place..place + to.len()].copy_from_slice(&to);
            }
        }
        Ok(reply)
    }
}

/// A request or a reply, which begins with its length.
async fn read_frame(stream: &mut (impl AsyncRead + Unpin)) -> Result<Vec<u8>, Source> {
    let length = stream.read_u32().await?;
    let mut frame = vec![0; length as usize];
    stream.read_exact(&mut frame).await?;
    match frame.len() {
        ..8 => Err("a frame without a header".into()),
        _ => Ok(frame),
    }
}
