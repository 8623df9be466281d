//! Clients whose `:authority` is the socket's path, before a real tonic server.

#![allow(clippy::unwrap_used)] // a test that cannot go on says where

use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use carport_proto::authority::AnyAuthority;
use carport_proto::pluginregistration::v1::registration_server::{
    Registration, RegistrationServer,
};
use carport_proto::pluginregistration::v1::{
    InfoRequest, PluginInfo, RegistrationStatus, RegistrationStatusResponse,
};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, DuplexStream};
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

/// What grpc-go 1.83.2 sends when it dials a registration socket as the kubelet does: GetInfo twice and
/// NotifyRegistrationStatus, by `tests/clients/grpc-go record`.
const GRPC_GO: &[u8] = include_bytes!("fixtures/grpc-go-1.83.2-registration.bin");

/// What the kubelet 1.37.2 sends to a registration socket `recorded-reg.sock`: GetInfo and NotifyRegistrationStatus, which says
/// that another driver has the name. Recorded between the kubelet and the agent on the cluster of `make cluster`.
const KUBELET: &[u8] = include_bytes!("fixtures/kubelet-1.37.2-registration.bin");

/// The calls that an h2 server makes of the bytes, in reads of `size`: their paths, authorities and user agents.
async fn calls(
    recorded: &'static [u8],
    server: impl AsyncRead + AsyncWrite + Unpin,
    mut client: DuplexStream,
    size: usize,
) -> Vec<Result<[String; 3], Option<h2::Reason>>> {
    let sending = tokio::spawn(async move {
        for bytes in recorded.chunks(size) {
            client.write_all(bytes).await.unwrap();
            tokio::task::yield_now().await;
        }
        client
    });
    let mut connection = h2::server::handshake(server).await.unwrap();
    let (mut calls, mut answers) = (vec![], vec![]);
    for _ in 0..3 {
        let accepted = tokio::time::timeout(Duration::from_secs(1), connection.accept()).await;
        let Ok(Some(accepted)) = accepted else { break };
        calls.push(accepted.map_err(|error| error.reason()).map(|(request, answer)| {
            answers.push(answer);
            let agent = request.headers()["user-agent"].to_str().unwrap().to_owned();
            let authority = request.uri().authority().map(ToString::to_string);
            [request.uri().path().to_owned(), authority.unwrap_or_default(), agent]
        }));
    }
    sending.await.unwrap();
    calls
}

/// All calls are understood through the adapter, in reads of any size, and none without it.
async fn understood(recorded: &'static [u8], socket: &str, agent: &str, methods: &[&str]) {
    let (client, server) = tokio::io::duplex(1 << 16);
    let refused = calls(recorded, server, client, recorded.len()).await;
    assert_eq!(refused, [], "h2 alone refuses all of them");

    let authority = "0".repeat(socket.replace('/', "%2F").len());
    let call = |method: &&str| {
        let path = format!("/pluginregistration.Registration/{method}");
        Ok([path, authority.clone(), agent.to_owned()])
    };
    let expected: Vec<_> = methods.iter().map(call).collect();
    for size in [recorded.len(), 1, 7, 100] {
        let (client, server) = tokio::io::duplex(1 << 16);
        let seen = calls(recorded, AnyAuthority::new(server), client, size).await;
        assert_eq!(seen, expected, "in reads of {size}");
    }
}

#[tokio::test]
async fn the_bytes_of_a_kubelet_are_understood() {
    let socket = "/var/lib/kubelet/plugins_registry/recorded-reg.sock";
    understood(KUBELET, socket, "grpc-go/1.82.1", &["GetInfo", "NotifyRegistrationStatus"]).await;
}

#[tokio::test]
async fn the_bytes_of_grpc_go_that_dials_as_the_kubelet_does_are_understood() {
    let socket = "/var/lib/kubelet/plugins_registry/csi.carport.dev-reg.sock";
    let methods = ["GetInfo", "GetInfo", "NotifyRegistrationStatus"];
    understood(GRPC_GO, socket, "grpc-go/1.83.2", &methods).await;
}

#[tokio::test]
async fn all_bytes_come_through_a_small_buffer_and_the_end_after_them() {
    let mut whole = vec![];
    AnyAuthority::new(GRPC_GO).read_to_end(&mut whole).await.unwrap();
    assert!(whole.len() < GRPC_GO.len());
    for size in [1, 2, 10] {
        let (mut stream, mut read) = (AnyAuthority::new(GRPC_GO), vec![]);
        let mut buffer = vec![0; size];
        loop {
            let now = stream.read(&mut buffer).await.unwrap();
            if now == 0 {
                break;
            }
            read.extend_from_slice(&buffer[..now]);
        }
        assert!(read == whole, "with {size} bytes");
    }
    // A connection that breaks off in a frame.
    let mut broken = vec![];
    AnyAuthority::new(&GRPC_GO[..60]).read_to_end(&mut broken).await.unwrap();
    assert!(broken == GRPC_GO[..60]);
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
