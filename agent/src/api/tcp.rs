//! The API over TCP: TLS always, and never without knowing who calls.
//!
//! ```text
//! listener ─► TLS and HTTP/2's first bytes, bounded in number and time ─► connections for the server
//! files ─► looked at every few seconds ─► new connections get what they say now
//! ```
//!
//! Certificates and tokens are mounted secrets that change under the agent. A new content that
//! makes no sense changes nothing, and is told.

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::pin::Pin;
use std::sync::{Arc, PoisonError, RwLock};
use std::task::{Context, Poll};
use std::time::Duration;

use anyhow::Context as _;
use futures_util::Stream;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Connected;

use super::access::{Authenticator, Certificates, Guard, TokenFile};
use crate::config::Tcp as Config;
use crate::listen::{self, LimitedListener, Limits, Slot, Slots};
use crate::metrics::ConnectionMetrics;

/// As in logs and metrics.
const NAME: &str = "api_tcp";

/// Who takes longer means no good, or is not there.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Connections at a time that have shown who they are, as far as TLS asks for that.
const MAX_CONNECTIONS: usize = 1_024;
/// Connections at a time that have not yet. Apart from the others, so that who says nothing keeps out nobody who is served.
const MAX_HANDSHAKES: usize = 256;
/// What a client sends first: <https://www.rfc-editor.org/rfc/rfc9113#section-3.4>.
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// How often the files are looked at.
const RELOAD: Duration = Duration::from_secs(10);

/// A TCP listener that is not served yet.
pub struct Tcp {
    address: SocketAddr,
    listener: TcpListener,
    secrets: Arc<Secrets>,
    guard: Guard,
}

struct Secrets {
    config: Config,
    tls: RwLock<Arc<ServerConfig>>,
    tokens: Option<Arc<TokenFile>>,
}

impl Tcp {
    /// Reads what is needed and listens; nothing where no address is configured.
    ///
    /// # Errors
    ///
    /// When a file is missing or wrong, or the address is taken.
    pub fn bind(config: &Config) -> anyhow::Result<Option<Self>> {
        let Some(address) = config.listen else { return Ok(None) };
        let tls = RwLock::new(Arc::new(server_config(config)?));
        let tokens = match &config.tokens {
            None => None,
            Some(path) => Some(Arc::new(
                TokenFile::open(path).map_err(anyhow::Error::msg).context("api.tcp.tokens")?,
            )),
        };
        let who: Arc<dyn Authenticator> = match &tokens {
            Some(tokens) => tokens.clone(),
            None => Arc::new(Certificates),
        };
        let listener = listen::bind(address)
            .with_context(|| format!("listen on {address} for the API (api.tcp.listen)"))?;
        Ok(Some(Self {
            address: listener.local_addr().context("ask for the API's address")?,
            listener,
            secrets: Arc::new(Secrets { config: config.clone(), tls, tokens }),
            guard: Guard::Known { who, writes: config.writes },
        }))
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub(super) fn guard(&self) -> Guard {
        self.guard.clone()
    }

    /// Accepts until `stop`; the connections come out of the stream.
    pub(super) fn incoming(
        self,
        metrics: ConnectionMetrics,
        stop: CancellationToken,
    ) -> impl Stream<Item = io::Result<Connection>> {
        let (sender, receiver) = mpsc::channel(1);
        tokio::spawn(async move {
            let reload = self.secrets.clone().follow(stop.clone());
            tokio::join!(reload, self.accept(sender, metrics, stop));
        });
        tokio_stream::wrappers::ReceiverStream::new(receiver)
    }

    async fn accept(
        self,
        sender: mpsc::Sender<io::Result<Connection>>,
        metrics: ConnectionMetrics,
        stop: CancellationToken,
    ) {
        let served = Arc::new(Slots::new(Limits::within(MAX_CONNECTIONS, 4)));
        let handshakes = Limits::within(MAX_HANDSHAKES, 16);
        let mut listener = LimitedListener::new(NAME, self.listener, handshakes, metrics.clone());
        while let Some((stream, peer, slot)) = stop.run_until_cancelled(listener.accept()).await {
            let tls = self.secrets.tls.read().unwrap_or_else(PoisonError::into_inner).clone();
            let (sender, stop, served) = (sender.clone(), stop.clone(), Arc::clone(&served));
            let metrics = metrics.clone();
            tokio::spawn(async move {
                let done = tokio::time::timeout(HANDSHAKE, handshake(tls, stream));
                let stream = match stop.run_until_cancelled(done).await {
                    Some(Ok(Ok(stream))) => stream,
                    Some(Ok(Err(error))) => {
                        return tracing::info!(%peer, %error, "no TLS and HTTP/2 with a caller");
                    }
                    Some(Err(_)) => {
                        return tracing::info!(%peer, "no TLS and HTTP/2 with a caller in time");
                    }
                    None => return,
                };
                match served.take_for(&slot) {
                    Ok(place) => {
                        drop(slot);
                        let _ = sender.send(Ok(Connection::new(stream, place))).await;
                    }
                    Err(why) => {
                        metrics.refused(NAME, why);
                        tracing::info!(%peer, reason = why.name(), "too many connections to the API");
                    }
                }
            });
        }
    }
}

/// TLS, and the first bytes of HTTP/2: from then on the server's keepalive finds out who is gone.
async fn handshake(tls: Arc<ServerConfig>, stream: TcpStream) -> io::Result<TlsStream<TcpStream>> {
    let mut stream = TlsAcceptor::from(tls).accept(stream).await?;
    let mut first = [0; PREFACE.len()];
    stream.read_exact(&mut first).await?;
    match first == *PREFACE {
        true => Ok(stream),
        false => {
            Err(io::Error::new(io::ErrorKind::InvalidData, "the caller does not speak HTTP/2"))
        }
    }
}

impl Secrets {
    async fn follow(self: Arc<Self>, stop: CancellationToken) {
        let mut failed = false;
        while stop.run_until_cancelled(tokio::time::sleep(RELOAD)).await.is_some() {
            let own = Arc::clone(&self);
            let read = move || {
                let tls = Arc::new(server_config(&own.config)?);
                *own.tls.write().unwrap_or_else(PoisonError::into_inner) = tls;
                match &own.tokens {
                    Some(tokens) => tokens.reload().map_err(anyhow::Error::msg),
                    None => Ok(()),
                }
            };
            let result = tokio::task::spawn_blocking(read).await;
            let error = match result {
                Ok(Ok(())) => None,
                Ok(Err(error)) => Some(format!("{error:#}")),
                Err(error) => Some(error.to_string()),
            };
            // Told once, not every few seconds.
            if let (Some(error), false) = (&error, failed) {
                tracing::error!(
                    error,
                    "certificates or tokens of the API; the last good ones hold"
                );
            }
            failed = error.is_some();
        }
    }
}

/// What a handshake needs, as the files say now.
fn server_config(config: &Config) -> anyhow::Result<ServerConfig> {
    let (Some(certificate), Some(key)) = (&config.certificate, &config.key) else {
        anyhow::bail!("api.tcp: certificate and key are needed");
    };
    let chain = certificates(certificate).context("api.tcp.certificate")?;
    let shown = || format!("api.tcp.key: read {}", key.display());
    let key = PrivateKeyDer::from_pem_file(key).with_context(shown)?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])?;
    let builder = match &config.client_ca {
        None => builder.with_no_client_auth(),
        Some(ca) => {
            let mut roots = RootCertStore::empty();
            for certificate in certificates(ca).context("api.tcp.clientCa")? {
                roots.add(certificate).context("api.tcp.clientCa")?;
            }
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
            builder.with_client_cert_verifier(verifier.build().context("api.tcp.clientCa")?)
        }
    };
    let mut tls = builder.with_single_cert(chain, key).context("api.tcp.certificate and key")?;
    tls.alpn_protocols = vec![b"h2".to_vec()];
    Ok(tls)
}

fn certificates(path: &Path) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let all = read.with_context(|| format!("read {}", path.display()))?;
    anyhow::ensure!(!all.is_empty(), "{}: no certificate in it", path.display());
    Ok(all)
}

/// A connection whose handshake is done.
pub(super) struct Connection {
    stream: TlsStream<TcpStream>,
    /// What was read already, and is still to be read by the server.
    preface: &'static [u8],
    _place: Slot,
}

impl Connection {
    fn new(stream: TlsStream<TcpStream>, place: Slot) -> Self {
        Self { stream, preface: PREFACE, _place: place }
    }
}

impl Connected for Connection {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

impl AsyncRead for Connection {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.preface.is_empty() {
            return Pin::new(&mut this.stream).poll_read(context, buffer);
        }
        let (now, later) = this.preface.split_at(this.preface.len().min(buffer.remaining()));
        buffer.put_slice(now);
        this.preface = later;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(context, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(context)
    }
}
