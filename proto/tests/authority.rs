//! Clients whose `:authority` is the socket's path, before a real tonic server.

use std::path::Path;
use std::process::{Command, Output};

use carport_proto::authority::AnyAuthority;
use carport_proto::pluginregistration::v1::registration_server::{
    Registration, RegistrationServer,
};
use carport_proto::pluginregistration::v1::{
    InfoRequest, PluginInfo, RegistrationStatus, RegistrationStatusResponse,
};
use tokio::net::UnixListener;
use tokio_stream::StreamExt as _;
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

/// curl, saying `authority`, calls GetInfo with a message of no bytes.
async fn curl(socket: &Path, authority: &str) -> Option<Output> {
    let body = socket.with_file_name("body");
    std::fs::write(&body, [0; 5]).unwrap();
    let mut command = Command::new("curl");
    command
        .args(["--silent", "--show-error", "--max-time", "20", "--http2-prior-knowledge"])
        .args(["--header", "content-type: application/grpc", "--header", "te: trailers"])
        .args(["--header", &format!("Host: {authority}"), "--output", "-", "--unix-socket"])
        .arg(socket)
        .args(["--data-binary", &format!("@{}", body.display())])
        .arg("http://x/pluginregistration.Registration/GetInfo");
    match tokio::task::spawn_blocking(move || command.output()).await.unwrap() {
        Ok(output) if output.status.code() == Some(1) || output.status.code() == Some(2) => {
            eprintln!("SKIPPED: curl without HTTP/2: {}", String::from_utf8_lossy(&output.stderr));
            None
        }
        Ok(output) => Some(output),
        Err(error) => {
            eprintln!("SKIPPED: curl: {error}");
            None
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn curl_is_answered_whatever_authority_it_names() {
    let folder = tempfile::tempdir().unwrap();
    let router = || tonic::transport::Server::builder().add_service(RegistrationServer::new(Fixed));

    // As it is without the adapter.
    let bare = folder.path().join("bare.sock");
    let incoming = UnixListenerStream::new(UnixListener::bind(&bare).unwrap());
    let serving = tokio::spawn(router().serve_with_incoming(incoming));
    let Some(refused) = curl(&bare, "%2Fvar%2Flib%2Fx.sock").await else { return };
    let error = String::from_utf8_lossy(&refused.stderr);
    assert!(error.contains("PROTOCOL_ERROR"), "{error}");
    serving.abort();

    let path = folder.path().join("any.sock");
    let incoming = UnixListenerStream::new(UnixListener::bind(&path).unwrap());
    let incoming = incoming.map(|accepted| accepted.map(AnyAuthority::new));
    let serving = tokio::spawn(router().serve_with_incoming(incoming));
    for authority in ["%2Fvar%2Flib%2Fx.sock", "/var/lib/x.sock", "a:b:c", "%", "localhost", "x:1"]
    {
        let Some(answer) = curl(&path, authority).await else { return };
        assert!(answer.status.success(), "{authority}: {answer:?}");
        let message = String::from_utf8_lossy(&answer.stdout);
        assert!(message.contains("csi.carport.dev"), "{authority}: {message:?}");
    }
    serving.abort();
}
