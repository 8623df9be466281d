//! A model of random files, a layer each, in a registry of our own.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, ensure};
use carport_tests::containerd::Containerd;
use carport_tests::registry::Registry;

use crate::pull::{blobs, pull, write_model};

/// Where it is in the registry.
pub(crate) const REPOSITORY: &str = "bench/model";

pub(crate) struct Model {
    pub(crate) registry: Registry,
    /// For what a bench writes; all of it goes with this value.
    pub(crate) folder: tempfile::TempDir,
    pub(crate) reference: String,
}

impl Model {
    /// `files` files of `bytes` bytes, packed and pushed; only the registry keeps them.
    pub(crate) fn pack(carport: &Path, files: usize, bytes: usize) -> anyhow::Result<Self> {
        let registry =
            Registry::start().context("docker-registry is not installed: run `make setup`")?;
        let folder = tempfile::Builder::new().prefix("carport-bench").tempdir()?;
        let model = folder.path().join("model");
        write_model(&model, files, bytes)?;
        let reference = format!("{}/{REPOSITORY}:v1", registry.host());
        let pack = ["pack", "--plain-http", registry.host()];
        let packed = Command::new(carport).args(pack).arg(&model).arg(&reference).output()?;
        ensure!(packed.status.success(), "pack: {}", String::from_utf8_lossy(&packed.stderr));
        fs::remove_dir_all(&model)?;
        Ok(Self { registry, folder, reference })
    }

    /// The store that [`Model::pull`] pulls into.
    pub(crate) fn root(&self) -> PathBuf {
        self.folder.path().join("store")
    }

    pub(crate) fn pull(&self, carport: &Path) -> Command {
        pull(carport, &self.registry, &self.root(), &self.reference)
    }

    /// A pull that asks containerd first.
    pub(crate) fn pull_beside(
        &self,
        containerd: &Containerd,
        carport: &Path,
    ) -> anyhow::Result<Command> {
        let config = self.folder.path().join("config.yaml");
        let socket = containerd.socket();
        let text =
            format!("runtime: {{containerd: {{enabled: true, socket: {}}}}}\n", socket.display());
        fs::write(&config, text)?;
        let mut pull = self.pull(carport);
        pull.arg("--config").arg(&config);
        Ok(pull)
    }

    /// The digests of its layers.
    pub(crate) fn blobs(&self) -> anyhow::Result<Vec<String>> {
        blobs(&self.registry, REPOSITORY, &self.reference)
    }
}
