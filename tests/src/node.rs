//! A node in small: the real agent in a mount namespace of its own, spoken to as a kubelet
//! and a scheduler would.
//!
//! The agent's mounts are seen through `/proc/<pid>/root`, so nothing of them shows on the
//! machine that runs the test, and all of them go with the namespace.

use std::collections::HashMap;
use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use carport_proto::carport::v1 as api;
use carport_proto::client::connect;
use carport_proto::csi::v1 as csi;
use tempfile::TempDir;
use tonic::transport::Channel;

/// How long anything on this machine may take at most; only failures wait so long.
const PATIENCE: Duration = Duration::from_secs(60);

/// The driver's name in these tests.
const DRIVER: &str = "csi.carport.dev";

/// A running agent and the folders it works in. Killed, if it still runs, when dropped.
pub struct Node {
    folder: TempDir,
    binary: PathBuf,
    plain_http: Vec<String>,
    gpu_library: Option<PathBuf>,
    /// Keeps the mount namespace while the agent is down.
    namespace: Child,
    agent: Option<Child>,
    log: mpsc::Receiver<String>,
    http: String,
}

/// A pod that uses one volume.
#[derive(Debug, Clone)]
pub struct Pod {
    /// What the kubelet names an inline volume.
    pub volume_id: String,
    /// Where the kubelet wants it.
    pub target: PathBuf,
}

impl Node {
    /// Starts a node whose agent speaks plain HTTP with `plain_http`. Nothing, and a word
    /// about it, where no mount namespace can be made (root only).
    ///
    /// # Panics
    ///
    /// When the agent does not come up; its log is printed.
    pub fn start(binary: &Path, plain_http: &[&str]) -> Option<Self> {
        Self::start_with(binary, plain_http, None)
    }

    /// As [`Node::start`], with the NVML library at `gpu_library`.
    ///
    /// # Panics
    ///
    /// As [`Node::start`].
    pub fn start_with(
        binary: &Path,
        plain_http: &[&str],
        gpu_library: Option<&Path>,
    ) -> Option<Self> {
        let namespace = Command::new("unshare")
            .args(["--mount", "--propagation", "private", "sh", "-c"])
            // Says that it is there, then waits for the end of its input.
            .arg("echo ready; read _")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn();
        let mut namespace = match namespace {
            Ok(namespace) => namespace,
            Err(error) => {
                eprintln!("SKIPPED: unshare (util-linux): {error}");
                return None;
            }
        };
        let mut ready = String::new();
        let said = namespace.stdout.take().map(|out| BufReader::new(out).read_line(&mut ready));
        if !matches!(said, Some(Ok(6))) {
            let _ = namespace.wait();
            eprintln!("SKIPPED: no mount namespace can be made: run as root");
            return None;
        }
        let (_, log) = mpsc::channel();
        let mut node = Self {
            folder: tempfile::tempdir().expect("a temporary folder"),
            binary: binary.to_owned(),
            plain_http: plain_http.iter().map(|host| (*host).to_owned()).collect(),
            gpu_library: gpu_library.map(Path::to_owned),
            namespace,
            agent: None,
            log,
            http: String::new(),
        };
        node.start_agent();
        Some(node)
    }

    /// Starts the agent (again), and waits until it serves.
    ///
    /// # Panics
    ///
    /// When it does not come up; its log is printed.
    pub fn start_agent(&mut self) {
        assert!(self.agent.is_none(), "the agent runs already");
        let mut agent = Command::new("nsenter");
        agent
            .arg(format!("--mount=/proc/{}/ns/mnt", self.namespace.id()))
            .arg(&self.binary)
            .args(["agent", "--node-name", "node-1", "--http-listen", "127.0.0.1:0"])
            .args(["--log-level", "info", "--log-format", "json"])
            .args(["--csi-driver-name", DRIVER])
            .arg("--root")
            .arg(self.root())
            .arg("--socket")
            .arg(self.socket())
            .arg("--kubelet-dir")
            .arg(self.kubelet());
        if !self.plain_http.is_empty() {
            agent.arg("--plain-http").arg(self.plain_http.join(","));
        }
        if let Some(library) = &self.gpu_library {
            agent.arg("--gpu-library").arg(library);
        }
        let mut agent = agent
            .env("DOCKER_CONFIG", "/nonexistent")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("start nsenter");
        let lines = BufReader::new(agent.stderr.take().expect("a pipe")).lines();
        let (sender, log) = mpsc::channel();
        std::thread::spawn(move || {
            // To its end, so that the agent never waits for a reader.
            for line in lines.map_while(Result::ok) {
                let _ = sender.send(line);
            }
        });
        self.agent = Some(agent);
        self.log = log;
        let serving = self.wait_for_log("serving");
        self.http = serving["http"].as_str().unwrap_or_default().to_owned();
    }

    /// Waits for a log event with this message, and returns its fields.
    ///
    /// # Panics
    ///
    /// When it does not come within a minute, or the agent ends.
    pub fn wait_for_log(&self, message: &str) -> serde_json::Value {
        let mut seen = Vec::new();
        loop {
            let Ok(line) = self.log.recv_timeout(PATIENCE) else {
                panic!("no log event {message:?}; the log says:\n{}", seen.join("\n"));
            };
            let event: serde_json::Value = serde_json::from_str(&line).unwrap_or_default();
            let fields = event.get("fields").unwrap_or(&event);
            if fields["message"] == message {
                return fields.clone();
            }
            seen.push(line);
        }
    }

    /// The agent's process.
    ///
    /// # Panics
    ///
    /// When it has been stopped.
    pub fn pid(&self) -> u32 {
        self.agent.as_ref().expect("the agent runs").id()
    }

    /// Asks the agent to stop (SIGTERM), and waits for it.
    ///
    /// # Panics
    ///
    /// When it does not run.
    pub fn stop_agent(&mut self) -> ExitStatus {
        self.signal("TERM");
        self.agent.take().expect("the agent runs").wait().expect("wait for the agent")
    }

    /// Kills the agent (SIGKILL).
    ///
    /// # Panics
    ///
    /// When it does not run.
    pub fn kill_agent(&mut self) {
        let mut agent = self.agent.take().expect("the agent runs");
        agent.kill().expect("kill the agent");
        let status = agent.wait().expect("wait for the agent");
        assert_eq!(status.signal(), Some(9));
    }

    fn signal(&self, name: &str) {
        let sent =
            Command::new("kill").arg(format!("-{name}")).arg(self.pid().to_string()).status();
        assert!(sent.is_ok_and(|status| status.success()), "kill -{name}");
    }

    /// The store's root.
    pub fn root(&self) -> PathBuf {
        self.folder.path().join("store")
    }

    /// The agent's API.
    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("run/carport.sock")
    }

    /// What stands for `/var/lib/kubelet`.
    pub fn kubelet(&self) -> PathBuf {
        self.folder.path().join("kubelet")
    }

    /// The CSI socket.
    pub fn csi_socket(&self) -> PathBuf {
        self.kubelet().join("plugins").join(DRIVER).join("csi.sock")
    }

    /// The registration socket.
    pub fn registration_socket(&self) -> PathBuf {
        self.kubelet().join("plugins_registry").join(format!("{DRIVER}-reg.sock"))
    }

    /// Where metrics and health are served: `127.0.0.1:<port>`.
    pub fn http(&self) -> &str {
        &self.http
    }

    /// A path as the node's processes see it, mounts included.
    pub fn inside(&self, path: &Path) -> PathBuf {
        let relative = path.strip_prefix("/").expect("an absolute path");
        PathBuf::from(format!("/proc/{}/root", self.namespace.id())).join(relative)
    }

    /// A `carport` command on this node's store and daemon, to be completed and run.
    pub fn carport(&self) -> Command {
        let mut command = Command::new(&self.binary);
        command
            .env("CARPORT_ROOT", self.root())
            .env("CARPORT_SOCKET", self.socket())
            .env("CARPORT_PLAIN_HTTP", self.plain_http.join(","))
            .env("DOCKER_CONFIG", "/nonexistent");
        command
    }

    /// A new pod's inline volume; the kubelet has made the folder above its target.
    ///
    /// # Panics
    ///
    /// When that cannot be made.
    pub fn pod(&self, uid: &str) -> Pod {
        let folder = self.kubelet().join("pods").join(uid).join("volumes/kubernetes.io~csi/model");
        std::fs::create_dir_all(&folder).expect("a pod's folder");
        Pod { volume_id: format!("csi-{uid}"), target: folder.join("mount") }
    }

    /// A client of the Node service.
    ///
    /// # Panics
    ///
    /// When nothing listens.
    pub async fn csi(&self) -> csi::node_client::NodeClient<Channel> {
        let channel = connect(&self.csi_socket()).await.expect("the CSI socket");
        csi::node_client::NodeClient::new(channel)
    }

    /// A client of the locality API.
    ///
    /// # Panics
    ///
    /// When nothing listens.
    pub async fn locality(&self) -> api::locality_service_client::LocalityServiceClient<Channel> {
        let channel = connect(&self.socket()).await.expect("the agent's socket");
        api::locality_service_client::LocalityServiceClient::new(channel)
    }

    /// Publishes `image` to `pod`, as the kubelet does for an inline volume.
    ///
    /// # Errors
    ///
    /// The driver's answer.
    ///
    /// # Panics
    ///
    /// When nothing listens.
    pub async fn publish(&self, pod: &Pod, image: &str) -> Result<(), tonic::Status> {
        let request = publish_request(pod, &[("image", image)]);
        self.csi().await.node_publish_volume(request).await.map(drop)
    }

    /// Unpublishes.
    ///
    /// # Errors
    ///
    /// The driver's answer.
    ///
    /// # Panics
    ///
    /// When nothing listens.
    pub async fn unpublish(&self, pod: &Pod) -> Result<(), tonic::Status> {
        let request = csi::NodeUnpublishVolumeRequest {
            volume_id: pod.volume_id.clone(),
            target_path: pod.target.display().to_string(),
        };
        self.csi().await.node_unpublish_volume(request).await.map(drop)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(mut agent) = self.agent.take() {
            let _ = agent.kill();
            let _ = agent.wait();
        }
        // The namespace, and every mount in it, goes with its last process.
        let _ = self.namespace.kill();
        let _ = self.namespace.wait();
    }
}

/// The request that the kubelet sends for an inline volume with these attributes.
pub fn publish_request(pod: &Pod, attributes: &[(&str, &str)]) -> csi::NodePublishVolumeRequest {
    use csi::volume_capability::{AccessMode, AccessType, MountVolume, access_mode};
    let pod_info = [
        ("csi.storage.k8s.io/ephemeral", "true"),
        ("csi.storage.k8s.io/pod.name", pod.volume_id.as_str()),
        ("csi.storage.k8s.io/pod.namespace", "default"),
        ("csi.storage.k8s.io/pod.uid", pod.volume_id.as_str()),
        ("csi.storage.k8s.io/serviceAccount.name", "default"),
    ];
    let volume_context: HashMap<_, _> = attributes
        .iter()
        .chain(&pod_info)
        .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
        .collect();
    csi::NodePublishVolumeRequest {
        volume_id: pod.volume_id.clone(),
        target_path: pod.target.display().to_string(),
        volume_capability: Some(csi::VolumeCapability {
            access_mode: Some(AccessMode { mode: access_mode::Mode::SingleNodeWriter.into() }),
            access_type: Some(AccessType::Mount(MountVolume::default())),
        }),
        readonly: false,
        volume_context,
        ..Default::default()
    }
}
