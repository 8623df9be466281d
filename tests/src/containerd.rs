//! containerd of a test's own: its root, state and socket are in a temporary folder.
//!
//! `CARPORT_TEST_CONTAINERD` names another `containerd` than the installed one; `ctr` and the shim are taken
//! from beside it, where they are there.

use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use rustix::process::{Pid, Signal};

use crate::registry::installed;

/// Which containerd to run.
const BINARY: &str = "CARPORT_TEST_CONTAINERD";

/// How long it may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// A containerd, without CRI where nothing else is said; killed when dropped.
pub struct Containerd {
    folder: tempfile::TempDir,
    process: Child,
}

impl Containerd {
    /// Starts one whose data is in `parent`. Nothing, and a word about it, where containerd or root's
    /// rights are missing.
    ///
    /// # Errors
    ///
    /// When it does not come up within ten seconds.
    pub fn start(parent: &Path) -> anyhow::Result<Option<Self>> {
        Self::start_with(parent, "")
    }

    /// As [`Containerd::start`], with `more` at the end of its configuration.
    ///
    /// # Errors
    ///
    /// As [`Containerd::start`].
    pub fn start_with(parent: &Path, more: &str) -> anyhow::Result<Option<Self>> {
        let config = |path: &Path| {
            let path = path.display();
            format!(
                "version = 2\nroot = \"{path}/root\"\nstate = \"{path}/state\"\noom_score = 0\n\
                 disabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n\
                 [grpc]\n  address = \"{path}/containerd.sock\"\n{more}"
            )
        };
        Self::configured(parent, config)
    }

    /// Starts one with CRI, whose registries are as `<folder>/certs.d` says; `plain_http` are spoken to without
    /// TLS. `more` stands in the section of CRI.
    ///
    /// # Errors
    ///
    /// As [`Containerd::start`].
    pub fn start_with_cri(
        parent: &Path,
        plain_http: &[&str],
        more: &str,
    ) -> anyhow::Result<Option<Self>> {
        let config = |path: &Path| {
            let path = path.display();
            let cri = "[plugins.\"io.containerd.grpc.v1.cri\"]\n  restrict_oom_score_adj = true\n";
            format!(
                "version = 2\nroot = \"{path}/root\"\nstate = \"{path}/state\"\noom_score = 0\n\
                 [grpc]\n  address = \"{path}/containerd.sock\"\n{cri}{more}\n\
                 [plugins.\"io.containerd.grpc.v1.cri\".registry]\n  config_path = \"{path}/certs.d\"\n"
            )
        };
        let Some(containerd) = Self::configured(parent, config)? else { return Ok(None) };
        for host in plain_http {
            // Read at each pull.
            let folder = containerd.folder.path().join("certs.d").join(host);
            std::fs::create_dir_all(&folder)?;
            let hosts = format!("server = \"http://{host}\"\n[host.\"http://{host}\"]\n");
            std::fs::write(folder.join("hosts.toml"), hosts)?;
        }
        Ok(Some(containerd))
    }

    fn configured(parent: &Path, config: impl Fn(&Path) -> String) -> anyhow::Result<Option<Self>> {
        let named = std::env::var_os(BINARY).is_some();
        if !named && (!installed("containerd") || !installed("ctr")) {
            return Ok(None);
        }
        if !rustix::process::geteuid().is_root() {
            eprintln!("SKIPPED: containerd needs root");
            return Ok(None);
        }
        let folder = tempfile::tempdir_in(parent)?;
        std::fs::write(folder.path().join("config.toml"), config(folder.path()))?;
        let process = spawn(folder.path())?;
        let containerd = Self { folder, process };
        containerd.wait()?;
        Ok(Some(containerd))
    }

    /// Its gRPC socket.
    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("containerd.sock")
    }

    /// The file of a blob, `sha256:<hex>`.
    pub fn blob(&self, digest: &str) -> PathBuf {
        let hex = digest.trim_start_matches("sha256:");
        self.content().join("blobs/sha256").join(hex)
    }

    /// Its content store.
    pub fn content(&self) -> PathBuf {
        self.folder.path().join("root/io.containerd.content.v1.content")
    }

    /// Its process.
    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.process)
    }

    /// Makes it hang, or go on.
    ///
    /// # Errors
    ///
    /// When it is gone.
    pub fn hang(&self, hang: bool) -> anyhow::Result<()> {
        let signal = if hang { Signal::STOP } else { Signal::CONT };
        Ok(rustix::process::kill_process(self.pid(), signal)?)
    }

    /// Kills it; what it stored stays.
    ///
    /// # Errors
    ///
    /// When it cannot be waited for.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        self.process.kill()?;
        self.process.wait()?;
        Ok(())
    }

    /// Starts it again after [`Containerd::kill`].
    ///
    /// # Errors
    ///
    /// As [`Containerd::start`].
    pub fn restart(&mut self) -> anyhow::Result<()> {
        self.process = spawn(self.folder.path())?;
        self.wait()
    }

    /// Its version.
    ///
    /// # Errors
    ///
    /// When it cannot be run.
    pub fn version(&self) -> anyhow::Result<String> {
        let output = Command::new(program("containerd")).arg("--version").output()?;
        let text = String::from_utf8_lossy(&output.stdout);
        Ok(text.split_whitespace().nth(2).unwrap_or("unknown").to_owned())
    }

    /// `ctr` for it, in `namespace`.
    pub fn ctr(&self, namespace: &str, arguments: &[&str]) -> Command {
        let mut ctr = Command::new(program("ctr"));
        ctr.arg("--address").arg(self.socket()).args(["--namespace", namespace]).args(arguments);
        ctr
    }

    /// Runs `ctr` in `namespace`; its output.
    ///
    /// # Errors
    ///
    /// When it fails.
    pub fn run(&self, namespace: &str, arguments: &[&str]) -> anyhow::Result<String> {
        let Output { status, stdout, stderr } = self.ctr(namespace, arguments).output()?;
        if !status.success() {
            bail!("ctr {arguments:?}: {}", String::from_utf8_lossy(&stderr));
        }
        Ok(String::from_utf8_lossy(&stdout).into_owned())
    }

    fn wait(&self) -> anyhow::Result<()> {
        let start = Instant::now();
        while let Err(error) = self.run("default", &["version"]) {
            if start.elapsed() > PATIENCE {
                return Err(
                    error.context(format!("containerd does not answer within {PATIENCE:?}"))
                );
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}

/// Where `name` is: beside the containerd that is to be run, else as it is installed.
fn program(name: &str) -> PathBuf {
    match std::env::var_os(BINARY).map(PathBuf::from) {
        Some(containerd) if name == "containerd" => containerd,
        Some(containerd) => {
            let beside = containerd.with_file_name(name);
            if beside.exists() { beside } else { name.into() }
        }
        None => name.into(),
    }
}

fn spawn(folder: &Path) -> anyhow::Result<Child> {
    let mut command = Command::new(program("containerd"));
    command.arg("--config").arg(folder.join("config.toml"));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    if let Some(beside) = program("containerd").parent().filter(|folder| folder.is_absolute()) {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let path = std::iter::once(beside.to_owned()).chain(std::env::split_paths(&path));
        command.env("PATH", std::env::join_paths(path)?);
    }
    // A signal to the test's group must not reach it before it is told to end.
    command.process_group(0);
    command.spawn().context("start containerd")
}

impl Drop for Containerd {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
