//! How the kubelet gets to know the driver: it finds a socket in its
//! `plugins_registry` folder, asks who is there, and says how it went.
//!
//! A kubelet that starts looks through the folder again. What takes the socket away meanwhile
//! (somebody who cleans up, a folder that is made anew) would take the driver with it, until the
//! agent's next start: so the folder is watched, and the socket shown again when it is gone.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use notify::{RecursiveMode, Watcher as _};
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use carport_proto::pluginregistration::v1::registration_server::{
    Registration, RegistrationServer,
};
use carport_proto::pluginregistration::v1::{
    InfoRequest, PluginInfo, RegistrationStatus, RegistrationStatusResponse,
};
use tonic::transport::Server;
use tonic::{Request, Response, Status};

use crate::driver::{DriverConfig, Ended, ServeError, start};
use crate::socket::Socket;

/// What the kubelet calls a CSI driver.
const TYPE: &str = "CSIPlugin";

/// The CSI versions that the driver speaks.
const VERSIONS: [&str; 1] = ["1.0.0"];

/// The socket is looked at after so long, whatever the watch says: a folder that was replaced
/// tells nothing any more.
const SAFETY_NET: Duration = Duration::from_secs(30);

/// The registration calls are answered at once; who stays connected is cut off after this.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(1);

/// What the kubelet has made of the driver.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RegistrationState {
    /// It has not said anything yet, or the socket it knew the driver by was taken away.
    Waiting,
    /// It sends volumes.
    Registered,
    /// It does not, and why.
    Failed(String),
}

/// A registration socket that is served and can be seen. Dropping it takes it away.
pub(crate) struct Registered {
    config: Arc<DriverConfig>,
    told: watch::Sender<RegistrationState>,
    socket: Socket,
    servers: JoinSet<Ended>,
    stop: CancellationToken,
}

impl Registered {
    /// Serves the socket, then shows it. `told` hears what the kubelet says.
    pub(crate) fn show(
        config: &Arc<DriverConfig>,
        told: &watch::Sender<RegistrationState>,
        mut socket: Socket,
    ) -> Result<Self, ServeError> {
        let (mut servers, stop) = (JoinSet::new(), CancellationToken::new());
        let service = RegistrationService { config: Arc::clone(config), told: told.clone() };
        let router = Server::builder().add_service(RegistrationServer::new(service));
        start(&mut servers, "registration", router, &mut socket, &stop)?;
        // Before anybody can see the socket: what was said of an earlier one is over.
        told.send_replace(RegistrationState::Waiting);
        socket.show()?;
        Ok(Self { config: Arc::clone(config), told: told.clone(), socket, servers, stop })
    }

    /// Keeps the socket in its place until `hide` is cancelled; then it is gone.
    pub(crate) async fn keep(mut self, hide: CancellationToken) {
        let changed = Arc::new(Notify::new());
        let mut watcher = watch(self.socket.path(), &changed);
        loop {
            // Looked at after each start of a watch: what was before it is not told.
            let shown_again = !self.socket.is_in_place() && self.show_again();
            if shown_again {
                // The folder may be another one now.
                watcher = watch(self.socket.path(), &changed);
                continue;
            }
            tokio::select! {
                () = hide.cancelled() => break,
                () = changed.notified() => {}
                () = tokio::time::sleep(SAFETY_NET) => {}
            }
        }
        drop(watcher);
        let Self { socket, mut servers, stop, .. } = self;
        drop(socket);
        stop.cancel();
        let drained = async { while servers.join_next().await.is_some() {} };
        if tokio::time::timeout(DRAIN_TIMEOUT, drained).await.is_err() {
            tracing::debug!("a registration call was cut off");
        }
    }

    /// Whether it could be done; else the next look tries again.
    fn show_again(&mut self) -> bool {
        let socket = self.socket.path().to_owned();
        // The kubelet's folder is the kubelet's to make.
        if socket.parent().is_some_and(|folder| !folder.is_dir()) {
            tracing::warn!(socket = %socket.display(), "the registration folder is gone");
            return false;
        }
        let shown = Socket::bind(&socket).map_err(ServeError::from);
        match shown.and_then(|socket| Self::show(&self.config, &self.told, socket)) {
            Ok(new) => {
                std::mem::replace(self, new).stop.cancel();
                tracing::info!(socket = %socket.display(), "showed the registration socket again");
                true
            }
            // A successor may be there already.
            Err(error) => {
                tracing::warn!(%error, "cannot show the registration socket again");
                false
            }
        }
    }
}

/// Tells of changes in the folder of `path`, for as long as the watcher lives.
fn watch(path: &Path, changed: &Arc<Notify>) -> Option<notify::RecommendedWatcher> {
    let folder = path.parent()?;
    let notified = Arc::clone(changed);
    let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        // Who connects opens and closes the socket; that is no news.
        if !event.is_ok_and(|event| event.kind.is_access()) {
            notified.notify_one();
        }
    });
    let watched = watcher.and_then(|mut watcher| {
        watcher.watch(folder, RecursiveMode::NonRecursive)?;
        Ok(watcher)
    });
    let seen = watched.inspect_err(|error| {
        tracing::warn!(
            folder = %folder.display(), %error,
            "cannot watch the registration folder; changes are seen within half a minute"
        );
    });
    seen.ok()
}

/// The adapter from gRPC to the driver's configuration.
pub(crate) struct RegistrationService {
    pub(crate) config: Arc<DriverConfig>,
    pub(crate) told: watch::Sender<RegistrationState>,
}

#[tonic::async_trait]
impl Registration for RegistrationService {
    async fn get_info(&self, _: Request<InfoRequest>) -> Result<Response<PluginInfo>, Status> {
        Ok(Response::new(PluginInfo {
            r#type: TYPE.to_owned(),
            name: self.config.name().to_owned(),
            endpoint: self.config.endpoint().to_string_lossy().into_owned(),
            supported_versions: VERSIONS.map(str::to_owned).to_vec(),
        }))
    }

    async fn notify_registration_status(
        &self,
        request: Request<RegistrationStatus>,
    ) -> Result<Response<RegistrationStatusResponse>, Status> {
        let status = request.into_inner();
        // Comes again whenever the kubelet restarts.
        if status.plugin_registered {
            tracing::info!(driver = self.config.name(), "registered with the kubelet");
            self.told.send_replace(RegistrationState::Registered);
        } else {
            tracing::error!(
                driver = self.config.name(),
                why = status.error,
                "the kubelet did not register the driver; see whether its name is taken"
            );
            self.told.send_replace(RegistrationState::Failed(status.error));
        }
        Ok(Response::new(RegistrationStatusResponse {}))
    }
}
