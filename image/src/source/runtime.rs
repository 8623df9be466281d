//! The container runtime before a registry: what it has need not be fetched.
//!
//! What a tag means is the registry's to say; only what is named by digest is taken from the runtime.
//! It is never an authority: manifests are checked against their digest here, blobs by who reads them,
//! and whatever the runtime has not, or has wrong, is asked of the source behind it.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use futures_util::{StreamExt as _, TryStreamExt as _};
use serde::Deserialize;
use tokio::sync::OnceCell;

use super::part::{Part, check_range};
use crate::digest::Digest;
use crate::runtime::{Leases, Runtime};
use crate::source::{
    Audience, BlobBody, MAX_MANIFEST_BYTES, ManifestName, RawManifest, Source, SourceError,
};

/// A source with the container runtime before it, for one pull.
pub(super) struct RuntimeFirst {
    runtime: Runtime,
    behind: Arc<dyn Source>,
    // What the runtime had when it was asked first; a pull asks for few blobs.
    blobs: Mutex<HashMap<Digest, Arc<OnceCell<Option<Part>>>>>,
    leases: Leases,
    served_manifest: AtomicBool,
}

impl RuntimeFirst {
    pub(super) fn new(runtime: Runtime, behind: Arc<dyn Source>) -> Self {
        Self {
            runtime,
            behind,
            blobs: Mutex::default(),
            leases: Leases::default(),
            served_manifest: AtomicBool::new(false),
        }
    }

    /// The runtime's file, where it has one.
    async fn part(&self, digest: &Digest) -> Option<Part> {
        let cell = Arc::clone(self.blobs().entry(*digest).or_default());
        let open = || async {
            let found = self.runtime.blob(digest, &self.leases).await?;
            tracing::debug!(blob = %digest, "containerd has it");
            Some(Part { file: Arc::new(found.file), start: 0, length: found.size })
        };
        cell.get_or_init(open).await.clone()
    }

    fn blobs(&self) -> MutexGuard<'_, HashMap<Digest, Arc<OnceCell<Option<Part>>>>> {
        self.blobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn manifest_here(&self, digest: Digest) -> Option<RawManifest> {
        let part = self.part(&digest).await?;
        let name = format!("manifest {digest} in containerd");
        let read = tokio::task::spawn_blocking(move || part.read_all(&name, MAX_MANIFEST_BYTES));
        let bytes = read.await.ok()?.ok()?;
        if Digest::of(&bytes) != digest {
            tracing::warn!(manifest = %digest, "containerd's copy is damaged; asking elsewhere");
            return None;
        }
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Kind {
            #[serde(default)]
            media_type: String,
        }
        // What is no manifest at all is refused by who parses it.
        let media_type = serde_json::from_slice(&bytes).map(|kind: Kind| kind.media_type);
        Some(RawManifest { media_type: media_type.unwrap_or_default(), bytes })
    }
}

#[async_trait]
impl Source for RuntimeFirst {
    fn name(&self) -> String {
        self.behind.name()
    }

    async fn manifest(&self, want: &ManifestName) -> Result<RawManifest, SourceError> {
        if let ManifestName::Digest(digest) = want
            && let Some(raw) = self.manifest_here(*digest).await
        {
            self.served_manifest.store(true, Ordering::Relaxed);
            return Ok(raw);
        }
        self.behind.manifest(want).await
    }

    async fn resolve(&self, want: &ManifestName) -> Result<Digest, SourceError> {
        self.behind.resolve(want).await
    }

    fn audience(&self) -> Audience {
        // That the image lies on the node entitles nobody to it.
        match self.served_manifest.load(Ordering::Relaxed) {
            true => Audience::Nobody,
            false => self.behind.audience(),
        }
    }

    async fn blob(
        &self,
        digest: &Digest,
        size: u64,
        range: Range<u64>,
    ) -> Result<BlobBody, SourceError> {
        match self.part(digest).await {
            Some(part) if part.length == size => {
                let name = format!("blob {digest} of {}", self.name());
                check_range(&name, &range, size)?;
                let (body, runtime) = (part.body(name, range), self.runtime.clone());
                let counted =
                    body.stream.inspect_ok(move |bytes| runtime.count(bytes.len() as u64));
                Ok(BlobBody { is_here: true, stream: counted.boxed(), ..body })
            }
            _ => self.behind.blob(digest, size, range).await,
        }
    }

    fn is_local(&self) -> bool {
        self.behind.is_local()
    }

    fn distrust(&self, blob: &Digest) -> bool {
        // From now on it counts as not there.
        let nothing = Arc::new(OnceCell::new_with(Some(None)));
        let before = self.blobs().insert(*blob, nothing);
        if before.is_some_and(|cell| matches!(cell.get(), Some(Some(_)))) {
            return true;
        }
        self.behind.distrust(blob)
    }
}
