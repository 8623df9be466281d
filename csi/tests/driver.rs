//! The driver as the kubelet meets it: over its sockets, a connection for each call,
//! with real mounts in a private mount namespace.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::collections::HashMap;
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use carport_csi::driver::ServeError;
use carport_csi::mount::KernelMounter;
use carport_csi::volume::LayoutFolders;
use carport_csi::{
    BindError, Call, Driver, DriverConfig, KubeletStatus, RegistrationState, Volumes, code_name,
};
use carport_proto::client::{ConnectError, connect};
use carport_proto::csi::v1::identity_client::IdentityClient;
use carport_proto::csi::v1::node_client::NodeClient;
use carport_proto::csi::v1::node_service_capability::{Type, rpc};
use carport_proto::csi::v1::volume_capability::access_mode::Mode;
use carport_proto::csi::v1::volume_capability::{AccessMode, AccessType, MountVolume};
use carport_proto::csi::v1::volume_usage::Unit;
use carport_proto::csi::v1::{
    GetPluginCapabilitiesRequest, GetPluginInfoRequest, NodeGetCapabilitiesRequest,
    NodeGetInfoRequest, NodeGetVolumeStatsRequest, NodeGetVolumeStatsResponse,
    NodePublishVolumeRequest, NodeUnpublishVolumeRequest, ProbeRequest, VolumeCapability,
};
use carport_proto::pluginregistration::v1::registration_client::RegistrationClient;
use carport_proto::pluginregistration::v1::{InfoRequest, RegistrationStatus};
use rustix::mount::MountPropagationFlags;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use tonic::{Code, Request, Status};

#[path = "driver/dead.rs"]
mod dead;
#[path = "driver/registration.rs"]
mod registration;
#[path = "../src/testing.rs"]
mod testing;

use testing::{GatedRegistry, World};

const NAME: &str = "csi.carport.dev";

/// A driver that serves, and what the kubelet would do to it.
struct Node {
    config: DriverConfig,
    shutdown: Option<oneshot::Sender<()>>,
    served: JoinHandle<Result<(), ServeError>>,
    calls: Arc<Mutex<Vec<Call>>>,
    kubelet: watch::Receiver<KubeletStatus>,
}

fn config(world: &World) -> DriverConfig {
    DriverConfig::in_kubelet_folder(NAME, "node-1", &world.folder.path().join("kubelet")).unwrap()
}

fn volumes(world: &World) -> Volumes {
    let layouts = LayoutFolders::new([world.folder.path()]);
    Volumes::new(world.puller.clone(), Arc::new(KernelMounter), layouts)
}

impl Node {
    fn start(world: &World) -> Self {
        let config = config(world);
        let calls = Arc::new(Mutex::new(Vec::new()));
        let heard = Arc::clone(&calls);
        let driver = Driver::new(config.clone(), volumes(world))
            .observed_by(move |call| heard.lock().unwrap().push(*call));
        let bound = driver.bind().unwrap();
        let kubelet = bound.kubelet();
        let (shutdown, asked) = oneshot::channel();
        let served = tokio::spawn(bound.serve(async move {
            let _ = asked.await;
        }));
        Self { config, shutdown: Some(shutdown), served, calls, kubelet }
    }

    /// How far the registration is, and what the kubelet said where it refused.
    fn registration(&self) -> (&'static str, Option<String>) {
        match &self.kubelet.borrow().registration {
            RegistrationState::NotCalled { .. } => ("not called", None),
            RegistrationState::NotUnderstood { .. } => ("not understood", None),
            RegistrationState::Asked { .. } => ("asked", None),
            RegistrationState::Registered { .. } => ("registered", None),
            RegistrationState::Refused { why, .. } => ("refused", Some(why.clone())),
        }
    }

    async fn stop(mut self) {
        self.shutdown.take().unwrap().send(()).unwrap();
        self.served.await.unwrap().unwrap();
    }

    /// The publishes and unpublishes so far, and how they ended.
    fn calls(&self) -> Vec<(&'static str, &'static str)> {
        let calls = self.calls.lock().unwrap();
        calls.iter().map(|call| (call.operation.name(), code_name(call.code))).collect()
    }

    async fn node(&self) -> NodeClient<tonic::transport::Channel> {
        NodeClient::new(connect(self.config.endpoint()).await.unwrap())
    }

    async fn publish(&self, request: NodePublishVolumeRequest) -> Result<(), Status> {
        self.node().await.node_publish_volume(request).await.map(|_| ())
    }

    async fn unpublish(&self, id: &str, target: &Path) -> Result<(), Status> {
        let request =
            NodeUnpublishVolumeRequest { volume_id: id.into(), target_path: text(target) };
        self.node().await.node_unpublish_volume(request).await.map(|_| ())
    }

    async fn stats(&self, id: &str, path: &str) -> Result<NodeGetVolumeStatsResponse, Status> {
        let request = NodeGetVolumeStatsRequest {
            volume_id: id.into(),
            volume_path: path.into(),
            staging_target_path: String::new(),
        };
        Ok(self.node().await.node_get_volume_stats(request).await?.into_inner())
    }
}

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

/// As the kubelet asks for an inline volume: as if for writing.
fn request(id: &str, target: &Path, image: &str) -> NodePublishVolumeRequest {
    let context = [
        ("image", image),
        ("path", "/models"),
        ("csi.storage.k8s.io/pod.name", "server-0"),
        ("csi.storage.k8s.io/pod.namespace", "llm"),
        ("csi.storage.k8s.io/pod.uid", "1234"),
        ("csi.storage.k8s.io/serviceAccount.name", "default"),
        ("csi.storage.k8s.io/ephemeral", "true"),
    ];
    NodePublishVolumeRequest {
        volume_id: id.into(),
        target_path: text(target),
        volume_capability: Some(VolumeCapability {
            access_type: Some(AccessType::Mount(MountVolume::default())),
            access_mode: Some(AccessMode { mode: Mode::SingleNodeWriter.into() }),
        }),
        readonly: false,
        volume_context: HashMap::from(context.map(|(key, value)| (key.into(), value.into()))),
        ..NodePublishVolumeRequest::default()
    }
}

fn code<T: std::fmt::Debug>(result: Result<T, Status>) -> Code {
    result.unwrap_err().code()
}

#[test]
fn the_kubelet_registers_the_driver_and_runs_pods_with_it() {
    testing::in_mount_namespace_async("the_kubelet_registers_the_driver", || async {
        let world = World::new(None);
        let image = world.pack("v1", &[("weights", "weights"), ("config.json", "{}")]).await;
        let node = Node::start(&world);

        // It finds the socket, and calls CSI before it says how the registration went.
        let registry = world.folder.path().join("kubelet/plugins_registry");
        let found = wait_for(&registry.join("csi.carport.dev-reg.sock")).await;
        assert_eq!(node.registration(), ("not called", None));
        let mut registration = RegistrationClient::new(connect(&found).await.unwrap());
        let info = registration.get_info(InfoRequest {}).await.unwrap().into_inner();
        assert_eq!((&*info.r#type, &*info.name), ("CSIPlugin", NAME));
        assert_eq!(info.supported_versions, ["1.0.0"]);
        assert_eq!(info.endpoint, text(node.config.endpoint()));
        let mut client = node.node().await;
        let answer = client.node_get_info(NodeGetInfoRequest {}).await.unwrap().into_inner();
        assert_eq!((&*answer.node_id, answer.max_volumes_per_node), ("node-1", 0));
        assert_eq!(node.registration(), ("asked", None));
        let info_at = node.kubelet.borrow().node_info;
        assert!(info_at.is_some_and(|at| at.elapsed().unwrap() < Duration::from_secs(60)));
        let refused = RegistrationStatus { plugin_registered: false, error: "taken".into() };
        registration.notify_registration_status(refused).await.unwrap();
        assert_eq!(node.registration(), ("refused", Some("taken".into())));
        let status = RegistrationStatus { plugin_registered: true, error: String::new() };
        registration.notify_registration_status(status).await.unwrap();
        assert_eq!(node.registration(), ("registered", None));

        let capabilities = client.node_get_capabilities(NodeGetCapabilitiesRequest {}).await;
        let capabilities: Vec<rpc::Type> = capabilities
            .unwrap()
            .into_inner()
            .capabilities
            .iter()
            .map(|capability| match &capability.r#type {
                Some(Type::Rpc(rpc)) => rpc.r#type(),
                None => panic!("an empty capability"),
            })
            .collect();
        assert_eq!(capabilities, [rpc::Type::GetVolumeStats, rpc::Type::VolumeCondition]);

        let (a, b) = (world.target("a"), world.target("b"));
        for (id, target) in [("csi-a", &a), ("csi-b", &b)] {
            node.publish(request(id, target, &image)).await.unwrap();
            assert_eq!(fs::read_to_string(target.join("weights")).unwrap(), "weights");
            let denied = fs::write(target.join("weights"), "changed").unwrap_err();
            assert_eq!(denied.kind(), ErrorKind::ReadOnlyFilesystem);
        }
        let inode = |target: &Path| {
            let meta = fs::metadata(target.join("weights")).unwrap();
            (meta.dev(), meta.ino())
        };
        assert_eq!(inode(&a), inode(&b), "two pods do not share the bytes");

        let stats = node.stats("csi-a", &text(&a)).await.unwrap();
        let condition = stats.volume_condition.unwrap();
        assert!(!condition.abnormal, "{}", condition.message);
        let usage: Vec<_> = stats.usage.iter().map(|u| (u.unit(), u.total, u.used)).collect();
        assert_eq!(usage, [(Unit::Bytes, 9, 9), (Unit::Inodes, 2, 2)]);

        node.unpublish("csi-a", &a).await.unwrap();
        assert!(!a.exists());
        assert_eq!(fs::read_to_string(b.join("weights")).unwrap(), "weights");
        node.unpublish("csi-b", &b).await.unwrap();
        assert_eq!(world.records(), Vec::<PathBuf>::new());
        node.stop().await;
    });
}

/// Waits for a path to appear.
async fn wait_for(path: &Path) -> PathBuf {
    while !path.exists() {
        tokio::task::yield_now().await;
    }
    path.to_owned()
}

#[test]
fn identity_says_who_it_is() {
    testing::in_mount_namespace_async("identity_says_who_it_is", || async {
        let world = World::new(None);
        let node = Node::start(&world);
        let mut client = IdentityClient::new(connect(node.config.endpoint()).await.unwrap());
        let info = client.get_plugin_info(GetPluginInfoRequest {}).await.unwrap().into_inner();
        assert_eq!((&*info.name, &*info.vendor_version), (NAME, env!("CARGO_PKG_VERSION")));
        let request = GetPluginCapabilitiesRequest {};
        let capabilities = client.get_plugin_capabilities(request).await.unwrap().into_inner();
        assert_eq!(capabilities.capabilities, []);
        let probe = client.probe(ProbeRequest {}).await.unwrap().into_inner();
        assert_eq!(probe.ready, Some(true));
        node.stop().await;
    });
}

#[test]
fn each_wrong_call_has_the_code_that_the_conformance_suite_expects() {
    testing::in_mount_namespace_async("each_wrong_call_has_the_code", || async {
        let world = World::new(None);
        let image = world.pack("v1", &[("weights", "weights")]).await;
        let node = Node::start(&world);
        let target = world.target("a");
        let good = request("csi-a", &target, &image);

        let wrong = NodePublishVolumeRequest { volume_id: String::new(), ..good.clone() };
        assert_eq!(code(node.publish(wrong).await), Code::InvalidArgument);
        let wrong = NodePublishVolumeRequest { target_path: String::new(), ..good.clone() };
        assert_eq!(code(node.publish(wrong).await), Code::InvalidArgument);
        let wrong = NodePublishVolumeRequest { volume_capability: None, ..good.clone() };
        assert_eq!(code(node.publish(wrong).await), Code::InvalidArgument);
        let mut wrong = good.clone();
        wrong.volume_context.insert("pullPolice".into(), "Always".into());
        let status = node.publish(wrong).await.unwrap_err();
        assert_eq!(
            status.message(),
            r#"volume attribute "pullPolice": unknown; did you mean "pullPolicy"?"#
        );

        assert_eq!(code(node.unpublish("", &target).await), Code::InvalidArgument);
        assert_eq!(code(node.unpublish("csi-a", Path::new("")).await), Code::InvalidArgument);
        node.unpublish("csi-unknown", &target).await.unwrap();

        assert_eq!(code(node.stats("", &text(&target)).await), Code::InvalidArgument);
        assert_eq!(code(node.stats("csi-a", "").await), Code::InvalidArgument);
        assert_eq!(code(node.stats("csi-a", &text(&target)).await), Code::NotFound);
        node.publish(good).await.unwrap();
        assert_eq!(code(node.stats("csi-a", "/some/other/path").await), Code::NotFound);
        assert_eq!(code(node.stats("csi-b", &text(&target)).await), Code::NotFound);
        node.unpublish("csi-a", &target).await.unwrap();
        assert!(!target.exists());

        let elsewhere = request("csi-a", &target, "oci:/etc:v1");
        let status = node.publish(elsewhere).await.unwrap_err();
        assert_eq!(status.code(), Code::PermissionDenied);
        let message = status.message();
        assert!(message.contains("/etc") && message.contains("csi.layoutFolders"), "{message}");
        assert!(!target.exists());

        let (wrong, done) = ("INVALID_ARGUMENT", "OK");
        let mut calls = vec![("publish", wrong); 4];
        calls.extend([("unpublish", wrong); 2]);
        calls.extend([("unpublish", done), ("publish", done), ("unpublish", done)]);
        calls.push(("publish", "PERMISSION_DENIED"));
        assert_eq!(node.calls(), calls);
        node.stop().await;
    });
}

#[test]
fn calls_that_are_not_served_are_unimplemented() {
    testing::in_mount_namespace_async("calls_that_are_not_served", || async {
        let world = World::new(None);
        let node = Node::start(&world);
        for path in ["/csi.v1.Node/NodeStageVolume", "/csi.v1.Controller/CreateVolume"] {
            let mut client =
                tonic::client::Grpc::new(connect(node.config.endpoint()).await.unwrap());
            client.ready().await.unwrap();
            let codec = tonic_prost::ProstCodec::<ProbeRequest, ProbeRequest>::default();
            let path = tonic::codegen::http::uri::PathAndQuery::from_static(path);
            let answer = client.unary(Request::new(ProbeRequest {}), path, codec).await;
            assert_eq!(code(answer), Code::Unimplemented);
        }
        node.stop().await;
    });
}

#[test]
fn ten_publishes_make_one_mount_and_one_unpublish_takes_it() {
    testing::in_mount_namespace_async("ten_publishes_make_one_mount", || async {
        let world = World::new(None);
        let image = world.pack("v1", &[("weights", "weights")]).await;
        let node = Node::start(&world);
        let target = world.target("a");
        for _ in 0..10 {
            node.publish(request("csi-a", &target, &image)).await.unwrap();
        }
        let mounts = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
        assert_eq!(mounts.matches(&text(&target)).count(), 1);
        node.unpublish("csi-a", &target).await.unwrap();
        assert!(!target.exists());
        node.stop().await;
    });
}

/// Its id is the PersistentVolume's handle, the same for every pod, and it may say what it likes of
/// readers and writers.
#[test]
fn pods_share_a_persistent_volume_in_every_access_mode() {
    testing::in_mount_namespace_async("pods_share_a_persistent_volume", || async {
        let world = World::new(None);
        let image = world.pack("v1", &[("weights", "weights")]).await;
        let node = Node::start(&world);
        let modes = [
            (Mode::MultiNodeReaderOnly, true),
            (Mode::SingleNodeReaderOnly, true),
            (Mode::MultiNodeMultiWriter, false),
        ];
        let mut targets = Vec::new();
        for (n, (mode, readonly)) in modes.into_iter().enumerate() {
            let target = world.target(&format!("pod-{n}"));
            let mut request = request("models-pv", &target, &image);
            request.volume_capability.as_mut().unwrap().access_mode =
                Some(AccessMode { mode: mode.into() });
            request.readonly = readonly;
            request.volume_context.remove("csi.storage.k8s.io/ephemeral");
            node.publish(request).await.unwrap();
            let denied = fs::write(target.join("weights"), "changed").unwrap_err();
            assert_eq!(denied.kind(), ErrorKind::ReadOnlyFilesystem, "{mode:?}");
            targets.push(target);
        }
        while let Some(target) = targets.pop() {
            node.unpublish("models-pv", &target).await.unwrap();
            assert!(!target.exists());
            for left in &targets {
                let stats = node.stats("models-pv", &text(left)).await.unwrap();
                assert!(!stats.volume_condition.unwrap().abnormal);
            }
        }
        node.stop().await;
    });
}

/// It looks through the folder of sockets again, and at each volume of each pod.
#[test]
fn a_kubelet_that_restarts_registers_and_publishes_again() {
    testing::in_mount_namespace_async("a_kubelet_that_restarts", || async {
        let world = World::new(None);
        let image = world.pack("v1", &[("weights", "weights")]).await;
        let node = Node::start(&world);
        let socket = wait_for(node.config.registration().unwrap()).await;
        let target = world.target("a");
        for _ in 0..3 {
            let mut kubelet = RegistrationClient::new(connect(&socket).await.unwrap());
            kubelet.get_info(InfoRequest {}).await.unwrap();
            node.node().await.node_get_info(NodeGetInfoRequest {}).await.unwrap();
            let status = RegistrationStatus { plugin_registered: true, error: String::new() };
            kubelet.notify_registration_status(status).await.unwrap();
            assert_eq!(node.registration(), ("registered", None));
            for _ in 0..4 {
                let request = NodeGetCapabilitiesRequest {};
                node.node().await.node_get_capabilities(request).await.unwrap();
            }
            node.publish(request("csi-a", &target, &image)).await.unwrap();
            let mounts = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
            assert_eq!(mounts.matches(&text(&target)).count(), 1);
        }
        node.unpublish("csi-a", &target).await.unwrap();
        node.stop().await;
    });
}

#[test]
fn a_long_pull_is_answered_before_the_deadline_and_again_when_it_is_done() {
    testing::in_mount_namespace_async("a_long_pull_is_answered", || async {
        let registry = GatedRegistry::start().await;
        let world = World::new(Some(&registry));
        let node = Node::start(&world);
        let target = world.target("a");
        let image = registry.reference();
        let mut hasty = Request::new(request("csi-a", &target, &image));
        let timeout = Duration::from_secs(2);
        hasty.set_timeout(timeout);
        let began = Instant::now();
        let status = node.node().await.node_publish_volume(hasty).await.unwrap_err();
        assert_eq!(status.code(), Code::DeadlineExceeded);
        let message = status.message();
        assert!(message.starts_with(&format!("image {image}: 0 B of ")), "{message}");
        assert!(message.ends_with("the pull goes on, publish again to wait for it"), "{message}");
        assert!(began.elapsed() < timeout, "the answer came after the caller had given up");
        assert!(!target.exists());

        let (published, ()) =
            tokio::join!(node.publish(request("csi-a", &target, &image)), async {
                registry.open();
            });
        published.unwrap();
        assert!(target.join("weights").exists());
        assert_eq!(registry.layers_asked_for(), 1);
        node.unpublish("csi-a", &target).await.unwrap();
        node.stop().await;
    });
}

#[test]
fn a_pods_pull_secret_opens_the_registry() {
    testing::in_mount_namespace_async("a_pods_pull_secret", || async {
        let registry = GatedRegistry::start_with_login(Some("Basic dXNlcjpodW50ZXIy")).await;
        registry.open();
        let world = World::new(Some(&registry));
        let node = Node::start(&world);
        let target = world.target("a");
        let mut request = request("csi-a", &target, &registry.reference());
        let status = node.publish(request.clone()).await.unwrap_err();
        assert_eq!(status.code(), Code::PermissionDenied, "{}", status.message());
        assert!(!target.exists());

        let config = registry.docker_config("dXNlcjpodW50ZXIy");
        request.secrets.insert(".dockerconfigjson".into(), config);
        node.publish(request).await.unwrap();
        node.unpublish("csi-a", &target).await.unwrap();
        node.stop().await;
    });
}

#[test]
fn the_copy_in_another_mount_namespace_is_not_writable() {
    testing::in_mount_namespace("the_copy_in_another_mount_namespace", || {
        let world = World::new(None);
        // The kubelet's side: a folder whose mounts propagate to and from the agent's pod.
        testing::mount_tmpfs(&world.pods);
        testing::propagate(&world.pods, MountPropagationFlags::SHARED);
        let target = world.target("a");
        std::thread::scope(|scope| {
            let agent = scope.spawn(|| {
                testing::leave_mount_namespace().unwrap();
                let runtime = tokio::runtime::Builder::new_multi_thread()
                    .worker_threads(1)
                    .enable_all()
                    .build()
                    .unwrap();
                runtime.block_on(async {
                    let image = world.pack("v1", &[("weights", "weights")]).await;
                    let node = Node::start(&world);
                    node.publish(request("csi-a", &target, &image)).await.unwrap();
                    node.stop().await;
                });
            });
            agent.join().unwrap();
        });
        assert_eq!(fs::read_to_string(target.join("weights")).unwrap(), "weights");
        for denied in [
            fs::write(target.join("weights"), "changed"),
            fs::write(target.join("new"), ""),
            fs::remove_file(target.join("weights")),
        ] {
            assert_eq!(denied.unwrap_err().kind(), ErrorKind::ReadOnlyFilesystem);
        }
    });
}

#[test]
fn a_restart_finds_the_volumes_and_shows_its_sockets_again() {
    testing::in_mount_namespace_async("a_restart_finds_the_volumes", || async {
        let world = World::new(None);
        let image = world.pack("v1", &[("weights", "weights")]).await;
        let target = world.target("a");
        let node = Node::start(&world);
        node.publish(request("csi-a", &target, &image)).await.unwrap();
        let config = node.config.clone();
        let registration = wait_for(config.registration().unwrap()).await;

        // While it serves, a second one must not take its place.
        let second = Driver::new(config.clone(), volumes(&world)).bind();
        assert!(matches!(second, Err(BindError::InUse(_))));
        node.stop().await;
        assert!(!config.endpoint().exists() && !registration.exists());
        assert_eq!(fs::read_to_string(target.join("weights")).unwrap(), "weights");
        let gone = connect(config.endpoint()).await.unwrap_err();
        assert!(matches!(gone, ConnectError::NotRunning { .. }));

        // What a kill leaves: sockets that nobody serves.
        drop(UnixListener::bind(config.endpoint()).unwrap());
        drop(UnixListener::bind(&registration).unwrap());
        let found = volumes(&world).reconcile(&world.pods).await.unwrap();
        assert_eq!((found.mounted, found.dropped, found.unknown), (1, 0, 0));
        let node = Node::start(&world);
        node.publish(request("csi-a", &target, &image)).await.unwrap();
        node.unpublish("csi-a", &target).await.unwrap();
        assert!(!target.exists());
        node.stop().await;
    });
}

#[test]
fn a_stop_ends_waiting_publishes_with_an_uncertain_code() {
    testing::in_mount_namespace_async("a_stop_ends_waiting_publishes", || async {
        let registry = GatedRegistry::start().await;
        let world = World::new(Some(&registry));
        let node = Node::start(&world);
        let target = world.target("a");
        let mut client = node.node().await;
        let waiting = client.node_publish_volume(request("csi-a", &target, &registry.reference()));
        let (published, ()) = tokio::join!(waiting, async {
            registry.asked_for_a_layer().await;
            node.stop().await;
        });
        assert_eq!(code(published), Code::Unavailable);
        assert!(!target.exists());
    });
}
