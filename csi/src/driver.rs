//! The CSI driver as a process sees it: configure, bind, serve, stop.
//!
//! ```text
//! DriverConfig ─► Driver::bind ─► BoundDriver::serve(shutdown)
//!                  CSI socket       serve CSI ─► show the registration socket
//!                  listens,         … shutdown:
//!                  shown            hide registration ─► end waits ─► drain ─► remove the CSI socket
//! ```
//!
//! The kubelet calls the CSI socket as soon as it sees the registration socket, and that
//! has to answer within a second: so it is shown last, and goes first. In between both are created
//! again whenever somebody removes them: see [`crate::socket`].

use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use carport_proto::authority::AnyAuthority;
use carport_proto::csi::v1::identity_server::IdentityServer;
use carport_proto::csi::v1::node_server::NodeServer;
use carport_proto::pluginregistration::v1::registration_server::RegistrationServer;
use futures_util::TryStreamExt as _;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use tonic::transport::server::Router;
use tonic::{Request, Status};

use crate::call::{Call, Observer};
use crate::identity::IdentityService;
use crate::kubelet::{Kubelet, KubeletStatus};
use crate::node::NodeService;
use crate::registration::RegistrationService;
use crate::socket::{BindError, Caller, Modes, Serving, Socket, Sockets};
use crate::volume::Volumes;

/// Calls that do not end by themselves when the driver stops are cut off after this;
/// waits for images have been ended before.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);

/// The registration calls are answered at once; who stays connected is cut off after this.
const REGISTRATION_DRAIN_TIMEOUT: Duration = Duration::from_secs(1);

/// The CSI specification's limits, in bytes.
const MAX_NAME_BYTES: usize = 63;
const MAX_NODE_ID_BYTES: usize = 192;

/// What a driver is called and where it serves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DriverConfig {
    name: String,
    node_id: String,
    endpoint: PathBuf,
    registration: Option<PathBuf>,
    logins: Vec<TokenLogin>,
}

/// Registries that take a pod's service-account token as a password.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenLogin {
    /// `registry.example`, or `*.registry.example`.
    pub registry: String,
    /// Whom the token is for. One of the audiences in the CSIDriver's `tokenRequests`.
    pub audience: String,
    /// What the registry wants to hear as the name.
    pub username: String,
}

/// Why a configuration is not usable.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct InvalidConfig(String);

impl DriverConfig {
    /// A driver that serves CSI at `endpoint` and registers nowhere.
    ///
    /// # Errors
    ///
    /// When `name` or `node_id` is not what the CSI specification asks for.
    pub fn new(
        name: impl Into<String>,
        node_id: impl Into<String>,
        endpoint: impl Into<PathBuf>,
    ) -> Result<Self, InvalidConfig> {
        let (name, node_id) = (name.into(), node_id.into());
        let edge = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
        let bytes = name.as_bytes();
        if bytes.len() > MAX_NAME_BYTES
            || !edge(bytes.first())
            || !edge(bytes.last())
            || !bytes.iter().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.'))
        {
            return Err(InvalidConfig(format!(
                "driver name {name:?}: use a domain name such as csi.carport.dev: at most \
                 {MAX_NAME_BYTES} letters, digits, `-` and `.`, a letter or digit at both ends"
            )));
        }
        if node_id.is_empty() || node_id.len() > MAX_NODE_ID_BYTES {
            return Err(InvalidConfig(format!(
                "node id {node_id:?}: must have 1 to {MAX_NODE_ID_BYTES} bytes; use the node's name"
            )));
        }
        Ok(Self {
            name,
            node_id,
            endpoint: endpoint.into(),
            registration: None,
            logins: Vec::new(),
        })
    }

    /// A driver at the usual places below `kubelet`, usually `/var/lib/kubelet`:
    /// `plugins/<name>/csi.sock` and `plugins_registry/<name>-reg.sock`.
    ///
    /// # Errors
    ///
    /// As for [`DriverConfig::new`].
    pub fn in_kubelet_folder(
        name: impl Into<String>,
        node_id: impl Into<String>,
        kubelet: &Path,
    ) -> Result<Self, InvalidConfig> {
        let mut config = Self::new(name, node_id, PathBuf::new())?;
        config.endpoint = kubelet.join("plugins").join(&config.name).join("csi.sock");
        Ok(config.registered_in(kubelet.join("plugins_registry")))
    }

    /// Logs in with the pods' service-account tokens where their secrets say nothing.
    pub fn with_logins(self, logins: Vec<TokenLogin>) -> Self {
        Self { logins, ..self }
    }

    pub(crate) fn logins(&self) -> &[TokenLogin] {
        &self.logins
    }

    /// Registers with the kubelet that watches `folder`. The kubelet must see the
    /// endpoint under the same path.
    pub fn registered_in(mut self, folder: impl Into<PathBuf>) -> Self {
        self.registration = Some(folder.into().join(format!("{}-reg.sock", self.name)));
        self
    }

    /// The driver's name, as in a pod's `csi.driver`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The node's name, as in CSINode.
    pub fn node_id(&self) -> &str {
        &self.node_id
    }

    /// The socket that serves CSI.
    pub fn endpoint(&self) -> &Path {
        &self.endpoint
    }

    /// The socket that the kubelet finds the driver by.
    pub fn registration(&self) -> Option<&Path> {
        self.registration.as_deref()
    }
}

/// Why serving ended before it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A socket could not be shown or listened on.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The transport failed.
    #[error("serve {what}: {source}")]
    Transport {
        /// Which of the sockets.
        what: &'static str,
        /// What went wrong.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// A driver that is not bound yet.
pub struct Driver {
    config: Arc<DriverConfig>,
    volumes: Volumes,
    observer: Observer,
    sockets: Sockets,
}

impl Driver {
    /// A driver for `volumes`.
    pub fn new(config: DriverConfig, volumes: Volumes) -> Self {
        let (observer, sockets) = (Arc::new(|_: &Call| {}), Sockets::default());
        Self { config: Arc::new(config), volumes, observer, sockets }
    }

    /// Tells `observer` of each publish and unpublish when it has ended. It must not wait.
    pub fn observed_by(mut self, observer: impl Fn(&Call) + Send + Sync + 'static) -> Self {
        self.observer = Arc::new(observer);
        self
    }

    /// Reports to `sockets` what happens to the driver's.
    pub fn with_sockets(self, sockets: Sockets) -> Self {
        Self { sockets, ..self }
    }

    /// Binds the sockets. A caller may connect to CSI from now on and waits until it is
    /// served; the kubelet does not learn of it yet.
    ///
    /// # Errors
    ///
    /// See [`BindError`].
    pub fn bind(self) -> Result<BoundDriver, BindError> {
        let bind = |path: &Path| Socket::bind(path, Modes::ROOT);
        let mut csi = bind(self.config.endpoint())?;
        let registration = self.config.registration().map(bind).transpose()?;
        csi.show()?;
        let Self { config, volumes, observer, sockets } = self;
        let kubelet = Kubelet::new();
        Ok(BoundDriver { config, volumes, observer, sockets, csi, registration, kubelet })
    }
}

/// A driver whose sockets listen. Dropping it removes them.
pub struct BoundDriver {
    config: Arc<DriverConfig>,
    volumes: Volumes,
    observer: Observer,
    sockets: Sockets,
    csi: Socket,
    registration: Option<Socket>,
    kubelet: Kubelet,
}

impl BoundDriver {
    /// What the kubelet has called and said, from now on. Of one that registers nowhere nothing is
    /// ever heard.
    pub fn kubelet(&self) -> watch::Receiver<KubeletStatus> {
        self.kubelet.subscribe()
    }

    /// Serves until `shutdown` ends; then removes the sockets, ends waiting publishes with
    /// Unavailable and leaves all mounts in place.
    ///
    /// # Errors
    ///
    /// When serving ends without being asked to.
    pub async fn serve(self, shutdown: impl Future<Output = ()>) -> Result<(), ServeError> {
        let Self { config, volumes, observer, sockets, csi, registration, kubelet } = self;
        let (stop, hide) = (CancellationToken::new(), CancellationToken::new());
        let mut servers = JoinSet::new();

        let called = {
            let kubelet = kubelet.clone();
            move |request: Request<()>| {
                understood(&request);
                kubelet.called();
                Ok::<_, Status>(request)
            }
        };
        let identity = IdentityService { config: Arc::clone(&config) };
        let node = NodeService {
            config: Arc::clone(&config),
            volumes: volumes.clone(),
            observer,
            kubelet: kubelet.clone(),
        };
        let router = Server::builder()
            .add_service(IdentityServer::with_interceptor(identity, called.clone()))
            .add_service(NodeServer::with_interceptor(node, called));
        start(&mut servers, router, csi, Serving::new("csi", sockets.clone()), &stop)?;
        let mut registrars = JoinSet::new();
        if let Some(mut socket) = registration {
            // Before anybody can see the socket.
            kubelet.socket_shown();
            socket.show()?;
            let (shown, unheard) = (kubelet.clone(), kubelet.clone());
            let serving = Serving {
                // The kubelet's folder is the kubelet's to make.
                make_folder: false,
                before_shown: Arc::new(move || shown.socket_shown()),
                not_understood: Arc::new(move |caller| unheard.not_understood(caller)),
                ..Serving::new("registration", sockets)
            };
            let service = RegistrationService { config: Arc::clone(&config), kubelet };
            let heard = |request: Request<()>| {
                understood(&request);
                Ok::<_, Status>(request)
            };
            let router =
                Server::builder().add_service(RegistrationServer::with_interceptor(service, heard));
            start(&mut registrars, router, socket, serving, &hide)?;
        }
        tracing::info!(driver = config.name(), endpoint = %config.endpoint().display(),
            registered_at = config.registration().map(|p| tracing::field::display(p.display())),
            "serving CSI");

        let ended = tokio::select! {
            () = shutdown => None,
            ended = servers.join_next() => ended,
            Some(ended) = registrars.join_next() => Some(ended),
        };
        hide.cancel();
        let hidden = async { while registrars.join_next().await.is_some() {} };
        if tokio::time::timeout(REGISTRATION_DRAIN_TIMEOUT, hidden).await.is_err() {
            tracing::debug!("a registration call was cut off");
        }
        volumes.stop();
        stop.cancel();
        let drained = tokio::time::timeout(DRAIN_TIMEOUT, async {
            while servers.join_next().await.is_some() {}
        });
        if drained.await.is_err() {
            tracing::warn!(calls_cut_off_after_s = DRAIN_TIMEOUT.as_secs(), "stopped serving CSI");
        }
        match ended {
            None => Ok(()),
            Some(Ok((what, Ok(())))) => {
                Err(ServeError::Transport { what, source: "ended without being asked to".into() })
            }
            Some(Ok((what, Err(error)))) => {
                Err(ServeError::Transport { what, source: error.into() })
            }
            Some(Err(error)) => Err(ServeError::Transport { what: "csi", source: error.into() }),
        }
    }
}

type Ended = (&'static str, Result<(), tonic::transport::Error>);

/// Whoever called has made itself understood.
fn understood(request: &Request<()>) {
    if let Some(caller) = request.extensions().get::<Caller>() {
        caller.is_understood();
    }
}

fn start(
    servers: &mut JoinSet<Ended>,
    router: Router,
    socket: Socket,
    serving: Serving,
    stop: &CancellationToken,
) -> Result<(), ServeError> {
    let what = serving.name;
    let incoming = socket
        .serve(serving, stop.clone())
        .map_err(|error| ServeError::Transport { what, source: error.into() })?;
    let stopped = stop.clone().cancelled_owned();
    servers.spawn(async move {
        let incoming = incoming.map_ok(AnyAuthority::new);
        (what, router.serve_with_incoming_shutdown(incoming, stopped).await)
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked() {
        let name = |name: &str| DriverConfig::new(name, "node", "/csi.sock");
        assert!(name("csi.carport.dev").is_ok());
        assert!(name("a").is_ok());
        for wrong in ["", ".", "csi.", "-csi", "csi/carport", "csi_carport", &"a".repeat(64)] {
            let error = name(wrong).unwrap_err().to_string();
            assert!(error.contains("use a domain name"), "{error}");
        }
        let error = DriverConfig::new("csi.carport.dev", "", "/csi.sock").unwrap_err();
        assert_eq!(
            error.to_string(),
            r#"node id "": must have 1 to 192 bytes; use the node's name"#
        );
    }

    #[test]
    fn the_kubelet_finds_the_sockets_where_it_looks() {
        let kubelet = Path::new("/var/lib/kubelet");
        let config = DriverConfig::in_kubelet_folder("csi.carport.dev", "node", kubelet).unwrap();
        assert_eq!(
            config.endpoint(),
            Path::new("/var/lib/kubelet/plugins/csi.carport.dev/csi.sock")
        );
        assert_eq!(
            config.registration().unwrap(),
            Path::new("/var/lib/kubelet/plugins_registry/csi.carport.dev-reg.sock")
        );
    }
}
