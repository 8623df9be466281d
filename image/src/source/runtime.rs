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
use crate::runtime::{ApiBlob, Found, Leases, Runtime};
use crate::source::{
    Audience, BlobBody, MAX_MANIFEST_BYTES, ManifestName, RawManifest, Source, SourceError,
};

type Blobs = Arc<Mutex<HashMap<Digest, Arc<OnceCell<Option<Here>>>>>>;

/// How a blob of the runtime's is read.
#[derive(Clone)]
enum Here {
    File(Part),
    Api(ApiBlob),
}

impl Here {
    fn size(&self) -> u64 {
        match self {
            Self::File(part) => part.length,
            Self::Api(blob) => blob.size,
        }
    }
}

/// A source with the container runtime before it, for one pull.
pub(super) struct RuntimeFirst {
    runtime: Runtime,
    behind: Arc<dyn Source>,
    // What the runtime had when it was asked first; a pull asks for few blobs.
    blobs: Blobs,
    leases: Leases,
    served_manifest: AtomicBool,
}

impl RuntimeFirst {
    pub(super) fn new(runtime: Runtime, behind: Arc<dyn Source>) -> Self {
        Self {
            runtime,
            behind,
            blobs: Blobs::default(),
            leases: Leases::default(),
            served_manifest: AtomicBool::new(false),
        }
    }

    /// What the runtime has of it, if anything.
    async fn here(&self, digest: &Digest) -> Option<Here> {
        let cell = Arc::clone(lock(&self.blobs).entry(*digest).or_default());
        let open = || async {
            let found = self.runtime.blob(digest, &self.leases).await?;
            tracing::debug!(blob = %digest, "containerd has it");
            Some(match found {
                Found::File(found) => {
                    Here::File(Part { file: Arc::new(found.file), start: 0, length: found.size })
                }
                Found::Api(blob) => Here::Api(blob),
            })
        };
        cell.get_or_init(open).await.clone()
    }

    async fn manifest_here(&self, digest: Digest) -> Option<RawManifest> {
        let name = format!("manifest {digest} in containerd");
        let bytes = match self.here(&digest).await? {
            Here::File(part) => {
                let read = move || part.read_all(&name, MAX_MANIFEST_BYTES);
                tokio::task::spawn_blocking(read).await.ok()?.ok()?
            }
            Here::Api(blob) if blob.size <= MAX_MANIFEST_BYTES => blob.read_all().await.ok()?,
            Here::Api(_) => return None,
        };
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
        let here = match self.here(digest).await {
            Some(here) if here.size() == size => here,
            _ => return self.behind.blob(digest, size, range).await,
        };
        let name = format!("blob {digest} of {}", self.name());
        check_range(&name, &range, size)?;
        let body = match here {
            Here::File(part) => part.body(name, range),
            Here::Api(blob) => {
                let (blobs, digest, offset) = (Arc::clone(&self.blobs), *digest, range.start);
                // The next try is then the source's behind.
                let stream = blob.read(range).map_err(move |why| {
                    forget(&blobs, digest);
                    SourceError::Unavailable(format!("{name}: {why}"))
                });
                BlobBody { offset, ranged: true, is_here: true, stream: stream.boxed() }
            }
        };
        let runtime = self.runtime.clone();
        let counted = body.stream.inspect_ok(move |bytes| runtime.count(bytes.len() as u64));
        Ok(BlobBody { is_here: true, stream: counted.boxed(), ..body })
    }

    fn is_local(&self) -> bool {
        self.behind.is_local()
    }

    fn distrust(&self, blob: &Digest) -> bool {
        forget(&self.blobs, *blob) || self.behind.distrust(blob)
    }
}

/// From now on it counts as not there; whether it was.
fn forget(blobs: &Blobs, blob: Digest) -> bool {
    let nothing = Arc::new(OnceCell::new_with(Some(None)));
    let before = lock(blobs).insert(blob, nothing);
    before.is_some_and(|cell| matches!(cell.get(), Some(Some(_))))
}

fn lock(blobs: &Blobs) -> MutexGuard<'_, HashMap<Digest, Arc<OnceCell<Option<Here>>>>> {
    blobs.lock().unwrap_or_else(PoisonError::into_inner)
}
