//! A client's way to the agent: a gRPC channel over its unix socket, or over TCP with TLS.

use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use std::sync::Arc;

use hyper_util::rt::TokioIo;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsConnector;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};

/// Why there is no channel to the agent. Each message says what to do.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// There is no such socket, or nobody serves it.
    #[error(
        "connect to {}: {why}; the agent does not run there: start `carport agent`, or name its \
         socket", path.display()
    )]
    NotRunning {
        /// The socket asked for.
        path: PathBuf,
        /// What the kernel said.
        why: io::Error,
    },
    /// The socket is there and this user may not use it.
    #[error(
        "connect to {}: permission denied; run as root, or as a user or group that the agent's \
         socket is open to", path.display()
    )]
    Denied {
        /// The socket asked for.
        path: PathBuf,
    },
    /// Anything else.
    #[error("connect to {}: {why}", path.display())]
    Io {
        /// The socket asked for.
        path: PathBuf,
        /// What the kernel said.
        why: io::Error,
    },
}

impl ConnectError {
    fn new(path: &Path, why: io::Error) -> Self {
        let path = path.to_owned();
        match why.kind() {
            ErrorKind::NotFound | ErrorKind::ConnectionRefused => Self::NotRunning { path, why },
            ErrorKind::PermissionDenied => Self::Denied { path },
            _ => Self::Io { path, why },
        }
    }
}

/// A channel to whoever serves the unix socket at `path`.
///
/// The channel connects again by itself when the agent restarts; a call made
/// meanwhile fails with `Unavailable`.
///
/// # Errors
///
/// When nobody answers there now; nothing is sent yet.
pub async fn connect(path: &Path) -> Result<Channel, ConnectError> {
    // Asked once by hand: tonic buries the kernel's answer under its own errors.
    drop(UnixStream::connect(path).await.map_err(|why| ConnectError::new(path, why))?);
    Ok(dial(path))
}

/// A channel to whoever will serve the unix socket at `path`: connects when it is first
/// used, and again after a loss. A call made meanwhile fails with `Unavailable`. Called
/// within a runtime.
pub fn dial(path: &Path) -> Channel {
    let path = path.to_owned();
    let dial = tower::service_fn(move |_| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    });
    // The URI only names the authority; "localhost" is what the kubelet sends, too.
    Endpoint::from_static("http://localhost").connect_with_connector_lazy(dial)
}

/// What TLS to an agent needs. Files are PEM.
#[derive(Debug, Clone)]
pub struct Tls {
    /// The authorities that the agent's certificate must come from.
    pub ca: PathBuf,
    /// The caller's certificate chain and key, where the agent asks for one.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// The name in the agent's certificate; absent: the host that is connected to.
    pub server_name: Option<String>,
}

/// Why there is no channel over TCP.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file of [`Tls`] cannot be read, or is not what it must be.
    #[error("{}: {why}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// The address is none, or the certificates do not go together.
    #[error("connect to {address}: {why}")]
    Address {
        /// As it was given.
        address: String,
        /// What is wrong.
        why: String,
    },
}

/// A channel to the agent at `address`, `HOST:PORT`: connects when it is first used, and again after
/// a loss. Called within a runtime.
///
/// # Errors
///
/// When a file cannot be used; nothing is sent yet.
pub fn connect_tls(address: &str, tls: &Tls) -> Result<Channel, TlsError> {
    let wrong = |why: String| TlsError::Address { address: address.to_owned(), why };
    let (host, _) = address.rsplit_once(':').ok_or_else(|| wrong("write HOST:PORT".into()))?;
    let name = tls.server_name.clone().unwrap_or_else(|| host.trim_matches(['[', ']']).to_owned());
    let name = ServerName::try_from(name).map_err(|why| wrong(why.to_string()))?;
    let mut roots = RootCertStore::empty();
    for certificate in certificates(&tls.ca)? {
        roots.add(certificate).map_err(|why| file(&tls.ca, why))?;
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|why| wrong(why.to_string()))?
        .with_root_certificates(roots);
    let mut config = match &tls.identity {
        None => builder.with_no_client_auth(),
        Some((chain, key_path)) => {
            let key = PrivateKeyDer::from_pem_file(key_path).map_err(|why| file(key_path, why))?;
            builder
                .with_client_auth_cert(certificates(chain)?, key)
                .map_err(|why| file(chain, why))?
        }
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    let connector = TlsConnector::from(Arc::new(config));
    let target = address.to_owned();
    let dial = tower::service_fn(move |_| {
        let (target, connector, name) = (target.clone(), connector.clone(), name.clone());
        async move {
            let stream = TcpStream::connect(target).await?;
            stream.set_nodelay(true)?;
            connector.connect(name, stream).await.map(TokioIo::new)
        }
    });
    // TLS is the connector's; the URI only names the authority.
    let endpoint = Endpoint::from_shared(format!("http://{address}"));
    Ok(endpoint.map_err(|why| wrong(why.to_string()))?.connect_with_connector_lazy(dial))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|why| file(path, why))
}

fn file(path: &Path, why: impl std::fmt::Display) -> TlsError {
    TlsError::File { path: path.to_owned(), why: why.to_string() }
}

/// Sends a token with each call: `LocalityServiceClient::with_interceptor(channel, bearer)`.
#[derive(Clone)]
pub struct Bearer(MetadataValue<Ascii>);

impl Bearer {
    /// `None`: what cannot be sent, such as a token with a line break.
    pub fn new(token: &str) -> Option<Self> {
        let mut value: MetadataValue<Ascii> = format!("Bearer {token}").parse().ok()?;
        value.set_sensitive(true);
        Some(Self(value))
    }
}

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        request.metadata_mut().insert("authorization", self.0.clone());
        Ok(request)
    }
}
