//! podman as a peer, on a store of its own.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::ensure;
use carport_tests::registry::installed;

use crate::measure::{self, Cost};

/// Where this bench's podman keeps what it pulls.
pub(crate) struct Podman {
    folder: PathBuf,
}

impl Podman {
    /// Nothing, and a word about it, where podman is not installed.
    pub(crate) fn new(parent: &Path) -> Option<Self> {
        installed("podman").then(|| Self { folder: parent.join("podman") })
    }

    /// Pulls an image into an empty store, and removes it again.
    pub(crate) fn pull(&self, reference: &str) -> anyhow::Result<Cost> {
        let cost =
            measure::run(self.podman().args(["pull", "--quiet", "--tls-verify=false", reference]))?;
        let output = self.podman().args(["rmi", "--force", reference]).output()?;
        ensure!(output.status.success(), "rmi: {}", String::from_utf8_lossy(&output.stderr));
        Ok(cost)
    }

    fn podman(&self) -> Command {
        let mut podman = Command::new("podman");
        podman.arg("--root").arg(self.folder.join("root"));
        podman.arg("--runroot").arg(self.folder.join("run")).args(["--storage-driver", "overlay"]);
        podman
    }
}

impl Drop for Podman {
    fn drop(&mut self) {
        // What podman leaves mounted would keep the folder from being removed.
        let _ = Command::new("umount").arg(self.folder.join("root/overlay")).output();
    }
}
