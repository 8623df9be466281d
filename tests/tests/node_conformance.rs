//! The driver before the public conformance suite for CSI drivers, where that is at hand, and
//! before the same questions as this project asks them, everywhere.

#![allow(clippy::unwrap_used)] // a test that cannot go on says where

use std::path::{Path, PathBuf};
use std::process::Command;

use carport_image::source::PullSecret;
use carport_proto::client::connect;
use carport_proto::csi::v1 as csi;
use carport_tests::carport::binary;
use carport_tests::models::{Model, sources};
use carport_tests::node::{Node, Setup};
use carport_tests::sanity::Proxy;
use carport_tests::sanity::controller::controller_client::ControllerClient;
use carport_tests::sanity::controller::{
    ControllerGetCapabilitiesRequest, CreateVolumeRequest, DeleteVolumeRequest,
};
use csi::identity_client::IdentityClient;
use csi::node_client::NodeClient;
use csi::plugin_capability::{Type, service};
use tonic::{Code, Request};

/// A node, an image that it may show, and the proxy's socket.
struct Bench {
    node: Node,
    image: String,
    socket: PathBuf,
    _proxy: Proxy,
    folder: tempfile::TempDir,
}

async fn bench() -> Option<Bench> {
    let folder = tempfile::tempdir().unwrap();
    let image = format!("oci:{}:v1", folder.path().join("layout").display());
    Model::new().pack(&image, &PullSecret::none(), &sources(&[])).await.unwrap();
    let setup = Setup { layout_folders: vec![folder.path().to_owned()], ..Setup::default() };
    let node = Node::set_up(binary(), setup)?;
    let socket = folder.path().join("proxy.sock");
    let _proxy = Proxy::start(&socket, &node.csi_socket()).await.unwrap();
    Some(Bench { node, image, socket, _proxy, folder })
}

/// csi-sanity: named by `CSI_SANITY`, else built where Go can reach its modules and
/// `CSI_SANITY_INSTALL` asks for it, as `make test-conformance` does.
fn csi_sanity(folder: &Path) -> Option<PathBuf> {
    if let Some(named) = std::env::var_os("CSI_SANITY").filter(|named| !named.is_empty()) {
        return Some(named.into());
    }
    if std::env::var_os("CSI_SANITY_INSTALL").is_some() {
        let module = "github.com/kubernetes-csi/csi-test/v5/cmd/csi-sanity@latest";
        let built = Command::new("go").args(["install", module]).env("GOBIN", folder).output();
        match built {
            Ok(output) if output.status.success() => return Some(folder.join("csi-sanity")),
            Ok(output) => {
                let said = String::from_utf8_lossy(&output.stderr);
                eprintln!("go install {module}: {}", said.trim());
            }
            Err(error) => eprintln!("go: {error}"),
        }
    }
    eprintln!(
        "SKIPPED: no csi-sanity: name the binary in CSI_SANITY, or run `make test-conformance`"
    );
    None
}

#[tokio::test(flavor = "multi_thread")]
async fn the_public_conformance_suite_finds_no_fault() {
    let tools = tempfile::tempdir().unwrap();
    let Some(suite) = csi_sanity(tools.path()) else { return };
    let Some(bench) = bench().await else { return };
    let parameters = bench.folder.path().join("parameters.yaml");
    std::fs::write(&parameters, format!("image: {:?}\n", bench.image)).unwrap();
    let mut command = bench.node.within(&suite);
    command
        .arg(format!("--csi.endpoint={}", bench.socket.display()))
        .arg(format!("--csi.testvolumeparameters={}", parameters.display()))
        .arg(format!("--csi.mountdir={}", bench.folder.path().join("mount").display()))
        .arg(format!("--csi.stagingdir={}", bench.folder.path().join("staging").display()))
        // The driver has no controller; the proxy's is there for Node's sake.
        .args([
            "--ginkgo.skip=Controller Server|GroupController|SnapshotMetadata",
            "--ginkgo.no-color",
        ]);
    let output = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}\n{}", String::from_utf8_lossy(&output.stderr));
    println!("{}", said.lines().rfind(|line| line.contains("Passed")).unwrap_or(&said));
    assert_eq!(bench.node.mounts_below(bench.folder.path()), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_proxy_adds_a_controller_and_hands_on_the_rest() {
    let Some(bench) = bench().await else { return };
    let channel = connect(&bench.socket).await.unwrap();
    let mut controller = ControllerClient::new(channel.clone());
    let (mut identity, mut node) =
        (IdentityClient::new(channel.clone()), NodeClient::new(channel.clone()));

    let info = identity.get_plugin_info(csi::GetPluginInfoRequest {}).await.unwrap();
    assert_eq!(info.into_inner().name, "csi.carport.dev");
    assert_eq!(identity.probe(csi::ProbeRequest {}).await.unwrap().into_inner().ready, Some(true));
    let offered = identity.get_plugin_capabilities(csi::GetPluginCapabilitiesRequest {}).await;
    let offered = offered.unwrap().into_inner().capabilities;
    let [csi::PluginCapability { r#type: Some(Type::Service(offered)) }] = &offered[..] else {
        panic!("{offered:?}")
    };
    assert_eq!(offered.r#type(), service::Type::ControllerService);
    let can = controller.controller_get_capabilities(ControllerGetCapabilitiesRequest {}).await;
    assert_eq!(can.unwrap().into_inner().capabilities.len(), 1);
    assert_eq!(
        node.node_get_info(csi::NodeGetInfoRequest {}).await.unwrap().into_inner().node_id,
        "node-1"
    );

    let parameters = [("image".to_owned(), bench.image.clone())].into();
    let volume = CreateVolumeRequest { name: "sanity-1".into(), parameters };
    let volume = controller.create_volume(volume).await.unwrap().into_inner().volume.unwrap();
    assert_eq!(volume.volume_id, "sanity-1");
    assert_eq!(volume.volume_context["image"], bench.image);
    let unnamed = controller.create_volume(CreateVolumeRequest::default()).await.unwrap_err();
    assert_eq!(unnamed.code(), Code::InvalidArgument);

    // As the suite: not for reading only, no deadline, ten times, and once away.
    let target = bench.folder.path().join("target");
    let place = target.to_str().unwrap().to_owned();
    let publish = csi::NodePublishVolumeRequest {
        volume_id: volume.volume_id.clone(),
        target_path: place.clone(),
        volume_capability: Some(csi::VolumeCapability {
            access_type: Some(csi::volume_capability::AccessType::Mount(Default::default())),
            access_mode: Some(csi::volume_capability::AccessMode { mode: 1 }),
        }),
        volume_context: volume.volume_context.clone(),
        ..Default::default()
    };
    for _ in 0..10 {
        node.node_publish_volume(publish.clone()).await.unwrap();
    }
    assert_eq!(bench.node.mounts_below(&target).len(), 1);
    let stats = csi::NodeGetVolumeStatsRequest {
        volume_id: volume.volume_id.clone(),
        volume_path: place.clone(),
        ..Default::default()
    };
    let usage = node.node_get_volume_stats(stats.clone()).await.unwrap().into_inner().usage;
    assert_eq!(usage.len(), 2);
    // A deadline comes through the proxy, too.
    let mut late = Request::new(publish.clone());
    late.set_timeout(std::time::Duration::from_secs(60));
    node.node_publish_volume(late).await.unwrap();
    let unpublish = csi::NodeUnpublishVolumeRequest {
        volume_id: volume.volume_id.clone(),
        target_path: place.clone(),
    };
    node.node_unpublish_volume(unpublish).await.unwrap();
    assert!(!bench.node.inside(&target).exists());
    controller.delete_volume(DeleteVolumeRequest { volume_id: volume.volume_id }).await.unwrap();

    // The table of codes that the suite expects.
    let code = |answer: Result<_, tonic::Status>| answer.map(drop).unwrap_err().code();
    let wrong = |change: fn(&mut csi::NodePublishVolumeRequest)| {
        let mut request = publish.clone();
        change(&mut request);
        request
    };
    for request in [
        wrong(|request| request.volume_id.clear()),
        wrong(|request| request.target_path.clear()),
        wrong(|request| request.volume_capability = None),
    ] {
        let answer = node.node_publish_volume(request).await.map(drop);
        assert_eq!(code(answer), Code::InvalidArgument);
    }
    for (id, path) in [("", &*place), ("sanity-1", "")] {
        let request =
            csi::NodeUnpublishVolumeRequest { volume_id: id.into(), target_path: path.into() };
        let answer = node.node_unpublish_volume(request).await.map(drop);
        assert_eq!(code(answer), Code::InvalidArgument);
        let request = csi::NodeGetVolumeStatsRequest {
            volume_id: id.into(),
            volume_path: path.into(),
            ..Default::default()
        };
        let answer = node.node_get_volume_stats(request).await.map(drop);
        assert_eq!(code(answer), Code::InvalidArgument);
    }
    for path in [&*place, "some/path", "/some/path"] {
        let request = csi::NodeGetVolumeStatsRequest { volume_path: path.into(), ..stats.clone() };
        let answer = node.node_get_volume_stats(request).await.map(drop);
        assert_eq!(code(answer), Code::NotFound, "{path}");
    }
}
