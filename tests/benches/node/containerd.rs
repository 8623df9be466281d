//! containerd as a peer: a daemon of our own, on a root of its own, pulled into by `ctr`.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, bail};
use carport_tests::registry::installed;
use rustix::process::Pid;

use crate::measure::{self, Cost};

/// A containerd that serves only this bench; killed when dropped.
pub(crate) struct Containerd {
    folder: tempfile::TempDir,
    process: Child,
}

impl Containerd {
    /// Nothing, and a word about it, where containerd is not installed.
    pub(crate) fn start(parent: &Path) -> anyhow::Result<Option<Self>> {
        if !installed("containerd") || !installed("ctr") {
            return Ok(None);
        }
        let folder = tempfile::tempdir_in(parent)?;
        let path = folder.path().display();
        let config = format!(
            "version = 2\nroot = \"{path}/root\"\nstate = \"{path}/state\"\n\
             disabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n\
             [grpc]\n  address = \"{path}/containerd.sock\"\n"
        );
        let file = folder.path().join("config.toml");
        std::fs::write(&file, config)?;
        let process = Command::new("containerd")
            .arg("--config")
            .arg(&file)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("start containerd")?;
        let containerd = Self { folder, process };
        for _ in 0..100 {
            if containerd.ctr(&["version"]).output()?.status.success() {
                return Ok(Some(containerd));
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        bail!("containerd does not answer after 10 s")
    }

    /// Its version, for the setup's description.
    pub(crate) fn version(&self) -> anyhow::Result<String> {
        let output = Command::new("containerd").arg("--version").output()?;
        let text = String::from_utf8_lossy(&output.stdout);
        Ok(text.split_whitespace().nth(2).unwrap_or("unknown").to_owned())
    }

    /// Pulls and unpacks an image; both the client's and the daemon's costs count.
    pub(crate) fn pull(&self, reference: &str) -> anyhow::Result<Cost> {
        let pid = Pid::from_child(&self.process);
        let before = measure::accounts(pid)?;
        let mut cost = measure::run(&mut self.ctr(&["images", "pull", "--plain-http", reference]))?;
        let after = measure::accounts(pid)?;
        cost.cpu_seconds += after.0 - before.0;
        cost.written_bytes += after.1 - before.1;
        Ok(cost)
    }

    /// Removes the image, its blobs and snapshots.
    pub(crate) fn remove(&self, reference: &str) -> anyhow::Result<()> {
        let output = self.ctr(&["images", "rm", "--sync", reference]).output()?;
        if !output.status.success() {
            bail!("ctr images rm: {}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(())
    }

    fn ctr(&self, arguments: &[&str]) -> Command {
        let mut ctr = Command::new("ctr");
        ctr.arg("--address").arg(self.folder.path().join("containerd.sock")).args(arguments);
        ctr
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
