//! The client's way to an agent, over real sockets.

use std::os::unix::fs::PermissionsExt as _;

use carport_proto::client::{ConnectError, connect};
use carport_proto::pluginregistration::v1::registration_client::RegistrationClient;
use carport_proto::pluginregistration::v1::registration_server::{
    Registration, RegistrationServer,
};
use carport_proto::pluginregistration::v1::{
    InfoRequest, PluginInfo, RegistrationStatus, RegistrationStatusResponse,
};
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Request, Response, Status};

struct Fixed;

#[tonic::async_trait]
impl Registration for Fixed {
    async fn get_info(&self, _: Request<InfoRequest>) -> Result<Response<PluginInfo>, Status> {
        Ok(Response::new(PluginInfo { name: "csi.carport.dev".into(), ..PluginInfo::default() }))
    }

    async fn notify_registration_status(
        &self,
        _: Request<RegistrationStatus>,
    ) -> Result<Response<RegistrationStatusResponse>, Status> {
        Err(Status::unimplemented("not asked in this test"))
    }
}

#[tokio::test]
async fn a_call_goes_over_the_socket() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("api.sock");
    let listener = UnixListenerStream::new(UnixListener::bind(&path).unwrap());
    let server = tokio::spawn(
        tonic::transport::Server::builder()
            .add_service(RegistrationServer::new(Fixed))
            .serve_with_incoming(listener),
    );
    let mut client = RegistrationClient::new(connect(&path).await.unwrap());
    let info = client.get_info(InfoRequest {}).await.unwrap().into_inner();
    assert_eq!(info.name, "csi.carport.dev");
    server.abort();
}

#[tokio::test]
async fn no_agent_is_told_with_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let absent = folder.path().join("absent.sock");
    let error = connect(&absent).await.unwrap_err();
    assert!(matches!(error, ConnectError::NotRunning { .. }), "{error:?}");
    assert!(error.to_string().contains("start `carport agent`"), "{error}");

    // What a killed agent leaves behind: a socket that nobody listens on.
    let stale = folder.path().join("stale.sock");
    drop(UnixListener::bind(&stale).unwrap());
    let error = connect(&stale).await.unwrap_err();
    assert!(matches!(error, ConnectError::NotRunning { .. }), "{error:?}");
}

#[tokio::test]
async fn a_socket_of_others_is_told_with_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("api.sock");
    let _listener = UnixListener::bind(&path).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
    match connect(&path).await {
        Ok(_) => println!("SKIPPED: root may use every socket"),
        Err(error) => {
            assert!(matches!(error, ConnectError::Denied { .. }), "{error:?}");
            assert!(error.to_string().contains("run as root"), "{error}");
        }
    }
}
