//! How the kubelet gets to know the driver: it finds a socket in its
//! `plugins_registry` folder, asks who is there, and says how it went.
//!
//! A kubelet that starts looks through the folder again. One that sees the socket's file go takes the
//! driver off its list until there is another one: [`crate::socket`] puts it back.

use std::sync::Arc;

use carport_proto::pluginregistration::v1::registration_server::Registration;
use carport_proto::pluginregistration::v1::{
    InfoRequest, PluginInfo, RegistrationStatus, RegistrationStatusResponse,
};
use tonic::{Request, Response, Status};

use crate::driver::DriverConfig;
use crate::kubelet::Kubelet;

/// What the kubelet calls a CSI driver.
const TYPE: &str = "CSIPlugin";

/// The CSI versions that the driver speaks.
const VERSIONS: [&str; 1] = ["1.0.0"];

/// The adapter from gRPC to the driver's configuration.
pub(crate) struct RegistrationService {
    pub(crate) config: Arc<DriverConfig>,
    pub(crate) kubelet: Kubelet,
}

#[tonic::async_trait]
impl Registration for RegistrationService {
    async fn get_info(&self, _: Request<InfoRequest>) -> Result<Response<PluginInfo>, Status> {
        self.kubelet.asked();
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
            self.kubelet.told(None);
        } else {
            tracing::error!(
                driver = self.config.name(),
                why = status.error,
                "the kubelet did not register the driver; see whether its name is taken"
            );
            self.kubelet.told(Some(status.error));
        }
        Ok(Response::new(RegistrationStatusResponse {}))
    }
}
