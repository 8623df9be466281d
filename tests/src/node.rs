//! A node in small: the real agent in a mount namespace of its own, spoken to as a kubelet
//! and a scheduler would.
//!
//! The agent's mounts are seen through `/proc/<pid>/root`, so nothing of them shows on the
//! machine that runs the test, and all of them go with the namespace.

use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use carport_proto::carport::v1 as api;
use carport_proto::client::connect;
use carport_proto::csi::v1 as csi;
use carport_proto::pluginregistration::v1 as registration;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tonic::transport::Channel;

mod namespace;
mod request;

pub use namespace::Namespace;
pub use request::publish_request;

use namespace::{machine, new_namespace, seen_by};

/// How long anything on this machine may take at most; only failures wait so long.
const PATIENCE: Duration = Duration::from_secs(60);

/// The driver's name in these tests.
const DRIVER: &str = "csi.carport.dev";

/// A running agent and the folders it works in. Killed, if it still runs, when dropped.
pub struct Node {
    folder: TempDir,
    binary: PathBuf,
    setup: Setup,
    /// Keeps the mount namespace while the agent is down.
    namespace: Child,
    agent: Option<Child>,
    log: mpsc::Receiver<String>,
    /// All that every agent of this node said.
    said: Arc<Mutex<Vec<String>>>,
    http: String,
}

/// What a node is like.
#[derive(Debug, Clone, Default)]
pub struct Setup {
    /// Registries that are spoken to over plain HTTP.
    pub plain_http: Vec<String>,
    /// The NVML library.
    pub gpu_library: Option<PathBuf>,
    /// What is logged; `info` where nothing is said.
    pub log_level: Option<String>,
    /// Folders in which a pod's image may be an OCI layout.
    pub layout_folders: Vec<PathBuf>,
    /// A folder of `<registry>/hosts.toml`; none where nothing is said, whatever this machine has.
    pub hosts_dir: Option<PathBuf>,
    /// The agent's configuration file.
    pub config: Option<String>,
    /// A shell script that prepares the mount namespace: `$ROOT` is the store's folder,
    /// `$KUBELET` the kubelet's, `$RUN` the sockets'. All are there.
    pub prepare: Option<String>,
}

impl Setup {
    /// A node that speaks plain HTTP with `hosts`.
    pub fn plain_http(hosts: &[&str]) -> Self {
        let plain_http = hosts.iter().map(|host| (*host).to_owned()).collect();
        Self { plain_http, ..Self::default() }
    }
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
        let gpu_library = gpu_library.map(Path::to_owned);
        Self::set_up(binary, Setup { gpu_library, ..Setup::plain_http(plain_http) })
    }

    /// As [`Node::start`], set up as said.
    ///
    /// # Panics
    ///
    /// As [`Node::start`], and when the namespace cannot be prepared.
    pub fn set_up(binary: &Path, setup: Setup) -> Option<Self> {
        let namespace = machine()?;
        let (_, log) = mpsc::channel();
        let mut node = Self {
            folder: tempfile::tempdir().expect("a temporary folder"),
            binary: binary.to_owned(),
            setup,
            namespace,
            agent: None,
            log,
            said: Arc::default(),
            http: String::new(),
        };
        node.prepare();
        node.start_agent();
        Some(node)
    }

    /// Ends the agent and takes every mount away, as a machine does that goes down, and starts
    /// it again.
    ///
    /// # Panics
    ///
    /// When the agent does not come up.
    pub fn reboot(&mut self) {
        self.kill_agent();
        let _ = self.namespace.kill();
        let _ = self.namespace.wait();
        self.namespace = machine().expect("a mount namespace, as before");
        self.prepare();
        self.start_agent();
    }

    fn prepare(&self) {
        let run = self.folder.path().join("run");
        for folder in [self.root(), self.kubelet().join("pods"), run] {
            std::fs::create_dir_all(folder).expect("a node's folder");
        }
        if let Some(config) = &self.setup.config {
            std::fs::write(self.config_file(), config).expect("a node's configuration");
        }
        if let Some(script) = &self.setup.prepare {
            let prepared = self.within("sh").args(["-euc", script]).status();
            assert!(prepared.is_ok_and(|status| status.success()), "{script}");
        }
    }

    fn config_file(&self) -> PathBuf {
        self.folder.path().join("config.yaml")
    }

    /// A program in the node's mount namespace, to be completed and run.
    pub fn within(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--mount=/proc/{}/ns/mnt", self.namespace.id()))
            .arg(program)
            .env("ROOT", self.root())
            .env("KUBELET", self.kubelet())
            .env("RUN", self.folder.path().join("run"))
            .stdin(Stdio::null());
        self.settings(&mut command);
        command
    }

    /// A mount namespace that gets a copy of this one's mounts, and of those to come: the
    /// kubelet's, of a node whose agent lives in a container.
    ///
    /// # Panics
    ///
    /// When it cannot be made.
    pub fn copied_namespace(&self) -> Namespace {
        self.namespace_with("unchanged")
    }

    /// A mount namespace that gets a copy of this one's mounts, and none of those to come: a
    /// pod's, as it is by default.
    ///
    /// # Panics
    ///
    /// When it cannot be made.
    pub fn private_namespace(&self) -> Namespace {
        self.namespace_with("private")
    }

    fn namespace_with(&self, propagation: &str) -> Namespace {
        let mut unshare = self.within("unshare");
        unshare.args(["--propagation", propagation]);
        Namespace(new_namespace(&mut unshare, "true").expect("a mount namespace, as before"))
    }

    /// Starts the agent (again), and waits until it serves.
    ///
    /// # Panics
    ///
    /// When it does not come up; its log is printed.
    pub fn start_agent(&mut self) {
        assert!(self.agent.is_none(), "the agent runs already");
        let mut agent = self
            .agent_command()
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("start nsenter");
        let lines = BufReader::new(agent.stderr.take().expect("a pipe")).lines();
        let (sender, log) = mpsc::channel();
        let said = Arc::clone(&self.said);
        std::thread::spawn(move || {
            // To its end, so that the agent never waits for a reader.
            for line in lines.map_while(Result::ok) {
                said.lock().unwrap_or_else(PoisonError::into_inner).push(line.clone());
                let _ = sender.send(line);
            }
        });
        self.agent = Some(agent);
        self.log = log;
        let serving = self.wait_for_log("serving");
        self.http = serving["http"].as_str().unwrap_or_default().to_owned();
    }

    /// The agent as it is started here, to be run another time or with other flags.
    pub fn agent_command(&self) -> Command {
        let mut agent = self.within(&self.binary);
        agent
            .args(["agent", "--node-name", "node-1", "--http-listen", "127.0.0.1:0"])
            .args(["--log-level", self.setup.log_level.as_deref().unwrap_or("info")])
            .args(["--log-format", "json", "--csi-driver-name", DRIVER])
            .arg("--kubelet-dir")
            .arg(self.kubelet());
        for folder in &self.setup.layout_folders {
            agent.arg("--csi-layout-folders").arg(folder);
        }
        if let Some(library) = &self.setup.gpu_library {
            agent.arg("--gpu-library").arg(library);
        }
        agent
    }

    /// All that the agents of this node have logged so far.
    pub fn log(&self) -> String {
        self.said.lock().unwrap_or_else(PoisonError::into_inner).join("\n")
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
        self.signal(Signal::TERM);
        self.wait_for_agent()
    }

    /// Waits for the end of an agent that has been told to end.
    ///
    /// # Panics
    ///
    /// When it does not run.
    pub fn wait_for_agent(&mut self) -> ExitStatus {
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

    /// Sends the agent a signal.
    ///
    /// # Panics
    ///
    /// When it does not run.
    pub fn signal(&self, signal: Signal) {
        send(self.pid(), signal);
    }

    /// The process that serves this node's streaming volumes, as long as it lives.
    pub fn sessions(&self) -> Option<u32> {
        let said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        let ours = self.folder.path().display().to_string();
        let pids = said.iter().rev().filter_map(|line| {
            let event: serde_json::Value = serde_json::from_str(line).ok()?;
            let fields = event.get("fields").unwrap_or(&event);
            (fields["message"] == "serving sessions").then(|| fields["pid"].as_u64())?
        });
        pids.filter_map(|pid| u32::try_from(pid).ok()).find(|pid| {
            // The number may be another process's by now; what is dead has no command line.
            std::fs::read_to_string(format!("/proc/{pid}/cmdline"))
                .is_ok_and(|line| line.contains(&ours))
        })
    }

    /// Sends that process a signal, and waits for its end.
    ///
    /// # Panics
    ///
    /// When there is none, or it does not end within a minute.
    pub fn end_sessions(&self, signal: Signal) {
        let pid = self.sessions().expect("a process with sessions");
        send(pid, signal);
        let start = Instant::now();
        while self.sessions() == Some(pid) {
            assert!(start.elapsed() < PATIENCE, "the sessions do not end");
            std::thread::sleep(Duration::from_millis(5));
        }
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
        seen_by(&self.namespace, path)
    }

    /// A `carport` command on this node's store and daemon, to be completed and run.
    pub fn carport(&self) -> Command {
        let mut command = Command::new(&self.binary);
        self.settings(&mut command);
        command
    }

    fn settings(&self, command: &mut Command) {
        command
            .env("CARPORT_ROOT", self.root())
            .env("CARPORT_SOCKET", self.socket())
            .env("DOCKER_CONFIG", "/nonexistent")
            .env(
                "CARPORT_HOSTS_DIR",
                self.setup.hosts_dir.as_deref().unwrap_or(Path::new("/nonexistent")),
            );
        if !self.setup.plain_http.is_empty() {
            command.env("CARPORT_PLAIN_HTTP", self.setup.plain_http.join(","));
        }
        if self.setup.config.is_some() {
            command.env("CARPORT_CONFIG", self.config_file());
        }
    }

    /// What a `carport` command prints as JSON.
    ///
    /// # Panics
    ///
    /// When it fails.
    pub fn json(&self, arguments: &[&str]) -> serde_json::Value {
        let output = self.within(&self.binary).args(arguments).args(["-o", "json"]).output();
        let output = output.expect("run carport");
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {errors}");
        serde_json::from_slice(&output.stdout).expect("JSON on standard output")
    }

    /// Status and body of a page over HTTP.
    ///
    /// # Panics
    ///
    /// When there is no answer.
    pub async fn page(&self, path: &str) -> (u16, String) {
        let mut stream = tokio::net::TcpStream::connect(&self.http).await.expect("the HTTP port");
        let request = format!("GET {path} HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.expect("a request");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.expect("an answer");
        let status = answer.split(' ').nth(1).and_then(|status| status.parse().ok());
        (status.expect("a status"), answer)
    }

    /// The value of a metric, named with its labels.
    ///
    /// # Panics
    ///
    /// When there is no such metric.
    pub async fn metric(&self, name: &str) -> f64 {
        let (_, page) = self.page("/metrics").await;
        let line = page.lines().find(|line| line.rsplit_once(' ').is_some_and(|(n, _)| n == name));
        let value = line.and_then(|line| line.rsplit(' ').next()?.parse().ok());
        value.unwrap_or_else(|| panic!("no metric {name} in {page}"))
    }

    /// Waits until a metric has a value: they follow what happens after a moment.
    ///
    /// # Panics
    ///
    /// When it has not within a minute.
    pub async fn metric_becomes(&self, name: &str, value: f64) {
        let start = Instant::now();
        loop {
            let found = self.metric(name).await;
            if found == value {
                return;
            }
            assert!(start.elapsed() < PATIENCE, "{name} is {found}, and does not become {value}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// The mounts at or below `path` in the node's namespace, from mountinfo.
    ///
    /// # Panics
    ///
    /// When the mount table cannot be read.
    pub fn mounts_below(&self, path: &Path) -> Vec<String> {
        let table = std::fs::read_to_string(format!("/proc/{}/mountinfo", self.namespace.id()));
        let table = table.expect("a mount table");
        let below = |line: &&str| {
            line.split(' ').nth(4).is_some_and(|target| Path::new(target).starts_with(path))
        };
        table.lines().filter(below).map(str::to_owned).collect()
    }

    /// Every path of the store with its length and number of links, but for locks.
    ///
    /// # Panics
    ///
    /// When the store cannot be read.
    pub fn store_listing(&self) -> Vec<String> {
        use std::os::unix::fs::MetadataExt as _;
        let root = self.inside(&self.root());
        let entries = walkdir::WalkDir::new(&root).sort_by_file_name().into_iter();
        let line = |entry: walkdir::DirEntry| {
            let meta = entry.metadata().expect("a path of the store");
            let path = entry.path().strip_prefix(&root).expect("below the root").display();
            match meta.is_file() {
                true => format!("{path} {} {}", meta.len(), meta.nlink()),
                false => format!("{path}/"),
            }
        };
        entries.map(|entry| line(entry.expect("the store"))).collect()
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

    /// Says to the driver how its registration went, as the kubelet does; an `error` is that it did not.
    ///
    /// # Panics
    ///
    /// When nothing listens.
    pub async fn register(&self, error: Option<&str>) {
        let channel = connect(&self.registration_socket()).await.expect("the registration socket");
        let status = registration::RegistrationStatus {
            plugin_registered: error.is_none(),
            error: error.unwrap_or_default().to_owned(),
        };
        let mut driver = registration::registration_client::RegistrationClient::new(channel);
        driver.notify_registration_status(status).await.expect("an answer");
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
        self.publish_with(pod, &[("image", image)]).await
    }

    /// As [`Node::publish`], with all of the volume's attributes. As the kubelet does it calls again while
    /// the pull goes on.
    ///
    /// # Errors
    ///
    /// The driver's answer.
    ///
    /// # Panics
    ///
    /// When nothing listens.
    pub async fn publish_with(
        &self,
        pod: &Pod,
        attributes: &[(&str, &str)],
    ) -> Result<(), tonic::Status> {
        loop {
            let request = publish_request(pod, attributes);
            let answer = self.csi().await.node_publish_volume(request).await.map(drop);
            match answer {
                Err(status) if status.code() == tonic::Code::DeadlineExceeded => {}
                answer => return answer,
            }
        }
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

fn send(pid: u32, signal: Signal) {
    let process = i32::try_from(pid).ok().and_then(Pid::from_raw).expect("a process's number");
    kill_process(process, signal)
        .unwrap_or_else(|error| panic!("send {signal:?} to {pid}: {error}"));
}

/// Looks until it is so: for what nobody tells of.
///
/// # Panics
///
/// When it is not so within a minute.
pub async fn eventually(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let start = Instant::now();
    while !is_so().await {
        assert!(start.elapsed() < PATIENCE, "{what}: not within {PATIENCE:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(mut agent) = self.agent.take() {
            let _ = agent.kill();
            let _ = agent.wait();
        }
        if self.sessions().is_some() {
            self.end_sessions(Signal::KILL);
        }
        // The namespace, and every mount in it, goes with its last process.
        let _ = self.namespace.kill();
        let _ = self.namespace.wait();
    }
}
