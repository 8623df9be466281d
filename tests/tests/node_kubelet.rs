//! What keeps a kubelet from using the node's volumes is found, said where people look, and undone where
//! the agent can.

#![allow(clippy::unwrap_used)] // a test that cannot go on says where

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use carport_image::source::PullSecret;
use carport_tests::carport::binary;
use carport_tests::models::{Model, sources};
use carport_tests::node::{Node, Setup, eventually};
use serde_json::Value;
use tonic::Code;

/// A model in a layout that pods may mount, and how a node is set up for it.
struct Bench {
    image: String,
    folder: tempfile::TempDir,
}

impl Bench {
    async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let image = format!("oci:{}:v1", folder.path().join("layout").display());
        Model::new().pack(&image, &PullSecret::none(), &sources(&[])).await.unwrap();
        Self { image, folder }
    }

    fn setup(&self) -> Setup {
        let config = "gpu: {enabled: false}\n".to_owned();
        let layout_folders = vec![self.folder.path().to_owned()];
        Setup { layout_folders, config: Some(config), ..Setup::default() }
    }
}

/// The checks of `carport doctor` with this name, (level, message), and whether it is satisfied.
fn doctor(node: &Node, name: &str) -> (bool, Vec<(String, String)>) {
    // It reads the file alone, where the agent has been given flags.
    let config = tempfile::NamedTempFile::new().unwrap();
    let kubelet = node.kubelet();
    let text = format!("csi: {{kubeletDir: {}}}\ngpu: {{enabled: false}}\n", kubelet.display());
    fs::write(config.path(), text).unwrap();
    let mut command = node.within(binary());
    command.args(["doctor", "-o", "json"]).env("CARPORT_CONFIG", config.path());
    let output = command.output().unwrap();
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["healthy"], output.status.success(), "{report:#}");
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let checks = report["checks"].as_array().unwrap().iter().filter(|check| check["name"] == name);
    let checks = checks.map(|check| (text(&check["level"]), text(&check["message"])));
    (output.status.success(), checks.collect())
}

/// The reasons in `carport status`.
fn reasons(node: &Node) -> Vec<(String, String)> {
    let status = node.json(&["status"]);
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let reasons = status["reasons"].as_array().unwrap().iter();
    reasons.map(|reason| (text(&reason["code"]), text(&reason["message"]))).collect()
}

async fn until(what: &str, limit: Duration, mut is_so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < limit, "{what}: not within {limit:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A connection that the server ends before a call: whatever made a kubelet's calls unintelligible to it.
async fn connect_without_a_call(socket: &Path) {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let mut stream = tokio::net::UnixStream::connect(socket).await.unwrap();
    // HTTP/2's first bytes, and a frame that breaks its rules: DATA on stream 0.
    let _ = stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await;
    let _ = stream.write_all(b"\0\0\x01\0\0\0\0\0\0x").await;
    let _ = stream.read_to_end(&mut Vec::new()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kubelet_that_is_not_understood_is_named_by_readyz_doctor_log_and_metrics() {
    let bench = Bench::new().await;
    let Some(node) = Node::set_up(binary(), bench.setup()) else { return };
    let socket = node.registration_socket();
    eventually("the registration socket", async || socket.exists()).await;
    // Nobody has called.
    let (status, why) = node.page("/readyz").await;
    assert!(status == 503 && why.contains("has not called the registration socket"), "{why}");
    assert!(why.contains("csi.kubeletDir"), "{why}");
    // For a kubelet that starts right now this is no fault yet.
    let (_, found) = doctor(&node, "registration");
    assert_eq!(found[0].0, "warn", "{found:?}");
    let state = |state: &str| format!("carport_kubelet_registration{{state=\"{state}\"}}");
    assert_eq!(node.metric(&state("not_called")).await, 1.0);
    assert_eq!(node.metric(&state("disabled")).await, 0.0);
    assert_eq!(node.metric("carport_kubelet_last_call_timestamp_seconds").await, 0.0);

    for _ in 0..2 {
        connect_without_a_call(&socket).await;
    }
    let me = format!("(process {})", std::process::id());
    eventually("both connections are told", async || {
        let (status, why) = node.page("/readyz").await;
        status == 503 && why.contains("no call is understood: 2 since") && why.contains(&me)
    })
    .await;
    assert_eq!(node.metric(&state("not_understood")).await, 1.0);
    let (healthy, found) = doctor(&node, "registration");
    assert!(!healthy);
    assert_eq!(found.len(), 1);
    assert!(found[0].0 == "fail" && found[0].1.contains("no call is understood"), "{found:?}");
    let warned = "ended without a call that was understood";
    assert_eq!(node.log().matches(warned).count(), 1, "once: {}", node.log());

    node.register(None).await;
    assert_eq!(node.page("/readyz").await.0, 200);
    let (_, found) = doctor(&node, "registration");
    assert!(found[0].0 == "ok" && found[0].1.contains("the kubelet registered it at 20"));
    assert_eq!(node.metric(&state("registered")).await, 1.0);
    assert_eq!(node.metric(&state("not_understood")).await, 0.0);
    let about = carport_proto::csi::v1::NodeGetInfoRequest {};
    node.csi().await.node_get_info(about).await.unwrap();
    let called = node.metric("carport_kubelet_last_call_timestamp_seconds").await;
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    assert!((now.as_secs_f64() - called).abs() < 60.0, "{called}");

    node.register(Some("plugin name is taken")).await;
    let (healthy, found) = doctor(&node, "registration");
    assert!(!healthy && found[0].1.contains("plugin name is taken"), "{found:?}");
    eventually("the node's state has it", async || {
        reasons(&node)
            .iter()
            .any(|(code, why)| code == "KUBELET_NOT_REGISTERED" && why.contains("taken"))
    })
    .await;
}

/// Nobody may hold a node back by removing a file, and a call that is under way goes on.
#[tokio::test(flavor = "multi_thread")]
async fn each_socket_that_is_removed_is_there_again_within_seconds() {
    let bench = Bench::new().await;
    let Some(node) = Node::set_up(binary(), bench.setup()) else { return };
    eventually("the registration socket", async || node.registration_socket().exists()).await;
    node.register(None).await;
    let mut locality = node.locality().await;
    let sockets = [
        ("csi", node.csi_socket()),
        ("api", node.socket()),
        ("registration", node.registration_socket()),
    ];
    for (name, socket) in sockets {
        fs::remove_file(&socket).unwrap();
        until(name, Duration::from_secs(5), || socket.exists()).await;
        let metric = format!("carport_sockets_recreated_total{{socket=\"{name}\"}}");
        node.metric_becomes(&metric, 1.0).await;
        // Those who were connected still are.
        locality.get_node(carport_proto::carport::v1::GetNodeRequest::default()).await.unwrap();
    }
    // Of a new socket the kubelet has to hear first.
    assert_eq!(node.page("/readyz").await.0, 503);
    node.register(None).await;
    assert_eq!(node.page("/readyz").await.0, 200);
    let pod = node.pod("pod-a");
    node.publish(&pod, &bench.image).await.unwrap();
    node.unpublish(&pod).await.unwrap();

    // What cannot be put back is told.
    let plugin = node.csi_socket().parent().unwrap().to_owned();
    fs::remove_dir_all(&plugin).unwrap();
    fs::write(&plugin, "in the way").unwrap();
    eventually("readyz says that the socket is missing", async || {
        let (status, why) = node.page("/readyz").await;
        status == 503 && why.contains("csi.sock is gone and cannot be created again")
    })
    .await;
    eventually("the node's state has it", async || reasons(&node)[0].0 == "SOCKET_MISSING").await;
    fs::remove_file(&plugin).unwrap();
    eventually("it is back", async || node.csi_socket().exists()).await;
    eventually("ready again", async || node.page("/readyz").await.0 == 200).await;
}

/// The sessions' socket as well, while a process of its own serves them.
#[tokio::test(flavor = "multi_thread")]
async fn the_socket_of_the_sessions_comes_back() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    let mut sessions = Command::new(binary())
        .args(["fuse"])
        .env("CARPORT_ROOT", folder.path().join("store"))
        .env("CARPORT_SOCKET", run.join("carport.sock"))
        .spawn()
        .unwrap();
    let find = || {
        let mut files = walkdir::WalkDir::new(folder.path()).into_iter().flatten();
        files.find(|file| file.file_name() == "fuse.sock").map(walkdir::DirEntry::into_path)
    };
    until("the socket", Duration::from_secs(60), || find().is_some()).await;
    let socket = find().unwrap();
    fs::remove_file(&socket).unwrap();
    until("the socket is back", Duration::from_secs(5), || socket.exists()).await;
    std::os::unix::net::UnixStream::connect(&socket).unwrap();
    sessions.kill().unwrap();
    sessions.wait().unwrap();
}

/// An agent in a container whose mounts stay in there: a pod would see an empty folder.
#[tokio::test(flavor = "multi_thread")]
async fn a_publish_whose_mount_the_kubelet_would_not_see_is_refused_and_leaves_nothing() {
    let bench = Bench::new().await;
    let private = "mount --bind $KUBELET/pods $KUBELET/pods && mount --make-private $KUBELET/pods";
    let setup = Setup { prepare: Some(private.into()), ..bench.setup() };
    let Some(node) = Node::set_up(binary(), setup) else { return };
    eventually("the registration socket", async || node.registration_socket().exists()).await;
    node.register(None).await;
    let pod = node.pod("pod-a");
    let mounts = node.mounts_below(&node.kubelet());
    let refused = node.publish(&pod, &bench.image).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{}", refused.message());
    for part in ["mountPropagation: Bidirectional", "mount --make-rshared", "kubelet/pods"] {
        assert!(refused.message().contains(part), "{part}: {}", refused.message());
    }
    assert!(!node.inside(&pod.target).exists());
    assert_eq!(node.mounts_below(&node.kubelet()), mounts);
    assert_eq!(fs::read_dir(node.root().join("volumes")).unwrap().count(), 0);
    assert_eq!(node.metric("carport_pull_bytes_total").await, 0.0, "nothing is pulled for it");
    let (status, why) = node.page("/readyz").await;
    assert!(status == 503 && why.contains("do not reach the kubelet"), "{why}");
    eventually("the node's state has it", async || {
        reasons(&node).iter().any(|(code, _)| code == "MOUNTS_NOT_SHARED")
    })
    .await;
    let (healthy, found) = doctor(&node, "agent");
    assert!(
        !healthy
            && found
                .iter()
                .any(|(level, why)| level == "fail" && why.contains("MOUNTS_NOT_SHARED"))
    );
    node.unpublish(&pod).await.unwrap();

    // A caller in the agent's own mount namespace, as on a machine whose agent systemd starts, sees all
    // of it: another agent there is asked.
    let made_shared =
        node.within("mount").args(["--make-shared"]).arg(node.kubelet().join("pods")).status();
    assert!(made_shared.unwrap().success());
    node.publish(&pod, &bench.image).await.unwrap();
    assert_eq!(node.page("/readyz").await.0, 200);
    node.unpublish(&pod).await.unwrap();
}

/// A kernel without the calls of Linux 5.12, played by strace.
#[tokio::test(flavor = "multi_thread")]
async fn without_the_new_mount_calls_a_publish_is_refused_before_anything_is_pulled() {
    if Command::new("strace").arg("--version").output().is_err() {
        eprintln!("SKIPPED: strace is not installed");
        return;
    }
    for call in ["open_tree", "mount_setattr", "move_mount"] {
        let bench = Bench::new().await;
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("carport");
        let script = format!(
            "#!/bin/sh\nexec strace --daemonize --follow-forks --quiet=all --output={} --trace={call} \
             --inject={call}:error=ENOSYS {} \"$@\"\n",
            folder.path().join("calls").display(),
            binary().display()
        );
        fs::write(&program, script).unwrap();
        fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let Some(mut node) = Node::set_up(&program, bench.setup()) else { return };
        eventually("the registration socket", async || node.registration_socket().exists()).await;
        // The kubelet registers it all the same: a pod's event then says why, instead of that there is no driver.
        node.register(None).await;
        let pod = node.pod("pod-a");
        let refused = node.publish(&pod, &bench.image).await.unwrap_err();
        assert_eq!(refused.code(), Code::FailedPrecondition, "{}", refused.message());
        for part in
            ["this node cannot mount images: Linux ", "Function not implemented", "Linux 5.12"]
        {
            assert!(refused.message().contains(part), "{call}: {part}: {}", refused.message());
        }
        assert!(!node.inside(&pod.target).exists());
        assert_eq!(fs::read_dir(node.root().join("volumes")).unwrap().count(), 0);
        assert_eq!(
            fs::read_dir(node.root().join("trees")).unwrap().count(),
            0,
            "nothing is pulled"
        );
        let (status, why) = node.page("/readyz").await;
        assert!(status == 503 && why.contains("Linux 5.12"), "{why}");
        eventually("the node's state has it", async || reasons_by(&node)[0].0 == "CANNOT_MOUNT")
            .await;
        node.unpublish(&pod).await.unwrap();
        node.stop_agent();
    }
}

/// As [`reasons`], by a program that strace does not follow.
fn reasons_by(node: &Node) -> Vec<(String, String)> {
    let output = node.within(binary()).args(["status", "-o", "json"]).output().unwrap();
    let status: Value = serde_json::from_slice(&output.stdout).unwrap();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let reasons = status["reasons"].as_array().unwrap().iter();
    let mut all: Vec<_> =
        reasons.map(|reason| (text(&reason["code"]), text(&reason["message"]))).collect();
    all.push(Default::default());
    all
}
