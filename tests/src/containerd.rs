//! containerd of a test's own: its root, state and socket are in a temporary folder.

use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context as _, bail};
use rustix::process::{Pid, Signal};

use crate::registry::installed;

/// A containerd without CRI; killed when dropped.
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
        if !installed("containerd") || !installed("ctr") {
            return Ok(None);
        }
        if !rustix::process::geteuid().is_root() {
            eprintln!("SKIPPED: containerd needs root");
            return Ok(None);
        }
        let folder = tempfile::tempdir_in(parent)?;
        let path = folder.path().display();
        let config = format!(
            "version = 2\nroot = \"{path}/root\"\nstate = \"{path}/state\"\noom_score = 0\n\
             disabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n\
             [grpc]\n  address = \"{path}/containerd.sock\"\n{more}"
        );
        std::fs::write(folder.path().join("config.toml"), config)?;
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
        let output = Command::new("containerd").arg("--version").output()?;
        let text = String::from_utf8_lossy(&output.stdout);
        Ok(text.split_whitespace().nth(2).unwrap_or("unknown").to_owned())
    }

    /// `ctr` for it, in `namespace`.
    pub fn ctr(&self, namespace: &str, arguments: &[&str]) -> Command {
        let mut ctr = Command::new("ctr");
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
        for _ in 0..100 {
            if self.ctr("default", &["version"]).output()?.status.success() {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        bail!("containerd does not answer after 10 s")
    }
}

fn spawn(folder: &Path) -> anyhow::Result<Child> {
    let mut command = Command::new("containerd");
    command.arg("--config").arg(folder.join("config.toml"));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
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
