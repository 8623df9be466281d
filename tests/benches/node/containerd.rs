//! containerd as a peer: a daemon of our own, on a root of its own, pulled into by `ctr`.

use std::path::Path;

use crate::measure::{self, Cost};

/// The namespace of what the peer pulls.
pub(crate) const NAMESPACE: &str = "k8s.io";

/// A containerd that serves only this bench; killed when dropped.
pub(crate) struct Containerd {
    daemon: carport_tests::containerd::Containerd,
}

impl Containerd {
    /// Nothing, and a word about it, where containerd is not installed.
    pub(crate) fn start(parent: &Path) -> anyhow::Result<Option<Self>> {
        let daemon = carport_tests::containerd::Containerd::start(parent)?;
        Ok(daemon.map(|daemon| Self { daemon }))
    }

    /// Its version, for the setup's description.
    pub(crate) fn version(&self) -> anyhow::Result<String> {
        self.daemon.version()
    }

    /// Pulls and unpacks an image; both the client's and the daemon's costs count.
    pub(crate) fn pull(&self, reference: &str) -> anyhow::Result<Cost> {
        let pid = self.daemon.pid();
        let before = measure::accounts(pid)?;
        let pull = &["images", "pull", "--plain-http", reference];
        let mut cost = measure::run(&mut self.daemon.ctr(NAMESPACE, pull))?;
        let after = measure::accounts(pid)?;
        cost.cpu_seconds += after.0 - before.0;
        cost.written_bytes += after.1 - before.1;
        Ok(cost)
    }

    /// Removes the image, its blobs and snapshots.
    pub(crate) fn remove(&self, reference: &str) -> anyhow::Result<()> {
        self.daemon.run(NAMESPACE, &["images", "rm", "--sync", reference])?;
        Ok(())
    }
}
