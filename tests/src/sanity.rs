//! What stands between the public conformance suite for CSI drivers and a driver that has no
//! controller: the suite makes its volumes through one before it calls Node.
//!
//! ```text
//! csi-sanity ─► proxy ── Identity, Node ─► the agent
//!                 └── Controller: a volume is a name and what it was asked for with
//! ```

use std::path::Path;

use carport_proto::client::{ConnectError, connect};
use carport_proto::csi::v1 as csi;
use csi::identity_client::IdentityClient;
use csi::identity_server::{Identity, IdentityServer};
use csi::node_client::NodeClient;
use csi::node_server::{Node, NodeServer};
use csi::plugin_capability::{Service, Type, service};
use tokio::net::UnixListener;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::{Channel, Server};
use tonic::{Request, Response, Status};

/// The Controller service, as far as it is needed.
#[allow(missing_docs, unreachable_pub, reason = "generated")]
#[allow(clippy::all, reason = "generated")]
pub mod controller {
    tonic::include_proto!("csi.v1");
}

use controller::controller_server::{Controller, ControllerServer};

/// A running proxy; ends when dropped.
pub struct Proxy {
    task: JoinHandle<Result<(), tonic::transport::Error>>,
}

impl Proxy {
    /// Serves at `socket` what is served at `driver`, and a controller beside it.
    ///
    /// # Errors
    ///
    /// When nobody serves at `driver`.
    ///
    /// # Panics
    ///
    /// When there can be no socket at `socket`.
    pub async fn start(socket: &Path, driver: &Path) -> Result<Self, ConnectError> {
        let forward = Forward { driver: connect(driver).await? };
        let listener = UnixListener::bind(socket).expect("a socket for the proxy");
        let server = Server::builder()
            .add_service(IdentityServer::new(forward.clone()))
            .add_service(NodeServer::new(forward.clone()))
            .add_service(ControllerServer::new(forward));
        let incoming = UnixListenerStream::new(listener);
        Ok(Self { task: tokio::spawn(server.serve_with_incoming(incoming)) })
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[derive(Clone)]
struct Forward {
    driver: Channel,
}

impl Forward {
    fn node(&self) -> NodeClient<Channel> {
        NodeClient::new(self.driver.clone())
    }

    fn identity(&self) -> IdentityClient<Channel> {
        IdentityClient::new(self.driver.clone())
    }
}

#[tonic::async_trait]
impl Node for Forward {
    async fn node_publish_volume(
        &self,
        request: Request<csi::NodePublishVolumeRequest>,
    ) -> Result<Response<csi::NodePublishVolumeResponse>, Status> {
        self.node().node_publish_volume(request).await
    }

    async fn node_unpublish_volume(
        &self,
        request: Request<csi::NodeUnpublishVolumeRequest>,
    ) -> Result<Response<csi::NodeUnpublishVolumeResponse>, Status> {
        self.node().node_unpublish_volume(request).await
    }

    async fn node_get_volume_stats(
        &self,
        request: Request<csi::NodeGetVolumeStatsRequest>,
    ) -> Result<Response<csi::NodeGetVolumeStatsResponse>, Status> {
        self.node().node_get_volume_stats(request).await
    }

    async fn node_get_capabilities(
        &self,
        request: Request<csi::NodeGetCapabilitiesRequest>,
    ) -> Result<Response<csi::NodeGetCapabilitiesResponse>, Status> {
        self.node().node_get_capabilities(request).await
    }

    async fn node_get_info(
        &self,
        request: Request<csi::NodeGetInfoRequest>,
    ) -> Result<Response<csi::NodeGetInfoResponse>, Status> {
        self.node().node_get_info(request).await
    }
}

#[tonic::async_trait]
impl Identity for Forward {
    async fn get_plugin_info(
        &self,
        request: Request<csi::GetPluginInfoRequest>,
    ) -> Result<Response<csi::GetPluginInfoResponse>, Status> {
        self.identity().get_plugin_info(request).await
    }

    async fn get_plugin_capabilities(
        &self,
        request: Request<csi::GetPluginCapabilitiesRequest>,
    ) -> Result<Response<csi::GetPluginCapabilitiesResponse>, Status> {
        let mut answer = self.identity().get_plugin_capabilities(request).await?;
        let service = Service { r#type: service::Type::ControllerService.into() };
        let capability = csi::PluginCapability { r#type: Some(Type::Service(service)) };
        answer.get_mut().capabilities.push(capability);
        Ok(answer)
    }

    async fn probe(
        &self,
        request: Request<csi::ProbeRequest>,
    ) -> Result<Response<csi::ProbeResponse>, Status> {
        self.identity().probe(request).await
    }
}

#[tonic::async_trait]
impl Controller for Forward {
    async fn controller_get_capabilities(
        &self,
        _: Request<controller::ControllerGetCapabilitiesRequest>,
    ) -> Result<Response<controller::ControllerGetCapabilitiesResponse>, Status> {
        use controller::controller_service_capability::{Rpc, Type, rpc};
        // The suite takes a controller that offers nothing for a broken one.
        let rpc = Rpc { r#type: rpc::Type::CreateDeleteVolume.into() };
        let capability = controller::ControllerServiceCapability { r#type: Some(Type::Rpc(rpc)) };
        Ok(Response::new(controller::ControllerGetCapabilitiesResponse {
            capabilities: vec![capability],
        }))
    }

    async fn create_volume(
        &self,
        request: Request<controller::CreateVolumeRequest>,
    ) -> Result<Response<controller::CreateVolumeResponse>, Status> {
        let request = request.into_inner();
        if request.name.is_empty() {
            return Err(Status::invalid_argument("name: missing"));
        }
        let volume_context = request.parameters;
        let volume = controller::Volume { volume_id: request.name, volume_context };
        Ok(Response::new(controller::CreateVolumeResponse { volume: Some(volume) }))
    }

    async fn delete_volume(
        &self,
        _: Request<controller::DeleteVolumeRequest>,
    ) -> Result<Response<controller::DeleteVolumeResponse>, Status> {
        Ok(Response::new(controller::DeleteVolumeResponse {}))
    }
}
