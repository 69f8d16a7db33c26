//! Certificates of both sides, by rustls.

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::connect_info::Connected;
use axum::serve::IncomingStream;
use tokio::net::TcpStream;
use tokio::sync::{Semaphore, mpsc};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::{CryptoProvider, aws_lc_rs};
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::{RootCertStore, ServerConfig};
use tokio_rustls::server::TlsStream;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::settings::Credentials;
use crate::error::{Error, Result};
use crate::listen::Bound;

/// Connections whose handshake is under way at a time; further ones wait in the kernel's backlog.
const HANDSHAKES: usize = 64;
/// How long a handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(10);

fn unusable(path: &Path, reason: impl std::fmt::Display) -> Error {
    Error::Usage(format!("{}: {reason}; `rehearsal certificates DIR HOST` makes new ones", path.display()))
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let all = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<std::result::Result<Vec<_>, _>>);
    match all {
        Ok(all) if !all.is_empty() => Ok(all),
        Ok(_) => Err(unusable(path, "it holds no certificate")),
        Err(e) => Err(unusable(path, e)),
    }
}

impl Credentials {
    /// The coordinator's side, which asks nodes for a certificate of the authority.
    pub fn server(&self) -> Result<ServerConfig> {
        let mut roots = RootCertStore::empty();
        for certificate in certificates(&self.authority)? {
            roots.add(certificate).map_err(|e| unusable(&self.authority, e))?;
        }
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider());
        let verifier = verifier.build().map_err(|e| unusable(&self.authority, e))?;
        let key = PrivateKeyDer::from_pem_file(&self.key).map_err(|e| unusable(&self.key, e))?;
        let config = ServerConfig::builder_with_provider(provider());
        let config = config.with_safe_default_protocol_versions().map_err(|e| unusable(&self.certificate, e))?;
        let config = config.with_client_cert_verifier(verifier);
        config
            .with_single_cert(certificates(&self.certificate)?, key)
            .map_err(|e| unusable(&self.certificate, format!("it does not belong to {}: {e}", self.key.display())))
    }

    /// A node's side.
    pub fn client(&self) -> Result<reqwest::ClientBuilder> {
        let read = |path: &Path| std::fs::read(path).map_err(|e| unusable(path, e));
        let mut own = read(&self.certificate)?;
        own.push(b'\n');
        own.extend(read(&self.key)?);
        let identity = reqwest::Identity::from_pem(&own).map_err(|e| unusable(&self.certificate, e))?;
        let authority =
            reqwest::Certificate::from_pem_bundle(&read(&self.authority)?).map_err(|e| unusable(&self.authority, e))?;
        Ok(reqwest::Client::builder().tls_certs_only(authority).identity(identity).https_only(true))
    }
}

/// Who is at the other end of a connection: its certificate, by hash.
#[derive(Debug, Clone)]
pub struct Peer(pub String);

/// A listener whose connections have shown their certificates. Handshakes are under way side by side.
pub struct TlsListener {
    accepted: mpsc::Receiver<(TlsStream<TcpStream>, SocketAddr)>,
    address: SocketAddr,
    _guard: DropGuard,
}

impl TlsListener {
    pub fn new(bound: Bound, config: ServerConfig) -> io::Result<Self> {
        let (address, acceptor) = (bound.address, TlsAcceptor::from(Arc::new(config)));
        let listener = bound.listener()?;
        let (sender, accepted) = mpsc::channel(HANDSHAKES);
        let (permits, cancel) = (Arc::new(Semaphore::new(HANDSHAKES)), CancellationToken::new());
        let guard = cancel.clone().drop_guard();
        let accepting = async move {
            loop {
                // The semaphore is never closed.
                let Ok(permit) = permits.clone().acquire_owned().await else { return };
                let Ok((stream, from)) = listener.accept().await else {
                    // Too many open files, say: others may close some.
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                };
                let (acceptor, sender) = (acceptor.clone(), sender.clone());
                tokio::spawn(async move {
                    let _ = stream.set_nodelay(true); // slower without, not wrong
                    match tokio::time::timeout(HANDSHAKE, acceptor.accept(stream)).await {
                        Ok(Ok(stream)) => drop(sender.send((stream, from)).await),
                        Ok(Err(e)) => tracing::warn!("a connection to the nodes' address from {from} was refused: {e}"),
                        Err(_) => {
                            tracing::warn!("a connection to the nodes' address from {from} showed no certificate")
                        }
                    }
                    drop(permit);
                });
            }
        };
        tokio::spawn(async move { cancel.run_until_cancelled(accepting).await });
        Ok(Self { accepted, address, _guard: guard })
    }
}

impl axum::serve::Listener for TlsListener {
    type Io = TlsStream<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, SocketAddr) {
        match self.accepted.recv().await {
            Some(accepted) => accepted,
            // The task above ends only with the listener.
            None => std::future::pending().await,
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.address)
    }
}

impl Connected<IncomingStream<'_, TlsListener>> for Peer {
    fn connect_info(stream: IncomingStream<'_, TlsListener>) -> Self {
        let certificate = stream.io().get_ref().1.peer_certificates().and_then(<[_]>::first);
        Self(certificate.map(|c| blake3::hash(c).to_hex().to_string()).unwrap_or_default())
    }
}
