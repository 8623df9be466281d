//! A client's way to the agent: a gRPC channel over its unix socket.

use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};

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
