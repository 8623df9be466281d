//! Where bytes come from: the edge of the world on the reading side.
//!
//! A [`Source`] is one image repository at one place: a registry repository
//! ([`registry`]), an OCI layout folder ([`layout`]) or an archive; before a registry may stand the
//! node's container runtime ([`crate::runtime`]). A source hands out manifests
//! and ranges of blobs *unverified*; whoever asks checks length and digest.
//! Every implementation passes the same conformance suite.
//!
//! [`Sources`] opens the source that a [`Reference`] names.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::stream::BoxStream;

use crate::digest::Digest;
use crate::reference::{LayoutForm, LayoutReference, Reference};
use crate::runtime::Runtime;
use archive::DockerArchive;
use registry::RegistryClient;
use runtime::RuntimeFirst;

mod archive;
pub mod layout;
mod part;
pub mod registry;
mod runtime;

pub use layout::LayoutSource;
pub use registry::{Credential, PullSecret, RegistryOptions, RegistrySource};

/// The largest manifest or index that is read, in bytes: what the OCI
/// distribution specification tells registries to accept at least.
pub const MAX_MANIFEST_BYTES: u64 = 4 * 1024 * 1024;

/// A repository of one image, at one place.
#[async_trait]
pub trait Source: Send + Sync {
    /// Where the bytes come from, for logs and errors: `registry.example/team/model`.
    fn name(&self) -> String;

    /// The manifest or index that `want` names, at most [`MAX_MANIFEST_BYTES`].
    ///
    /// When `want` is a digest, the answer's digest is *not* yet checked.
    async fn manifest(&self, want: &ManifestName) -> Result<RawManifest, SourceError>;

    /// The digest that `want` points at now, without fetching the manifest where
    /// the source allows that (a HEAD request).
    async fn resolve(&self, want: &ManifestName) -> Result<Digest, SourceError> {
        Ok(self.manifest(want).await?.digest())
    }

    /// Whom the answers so far entitle to what was served. Asked after an answer has come.
    fn audience(&self) -> Audience;

    /// Opens `range` (bytes, end exclusive, not empty) of a blob of `size` bytes.
    ///
    /// A source that cannot serve ranges answers with the blob from its start:
    /// look at [`BlobBody::offset`]. The body may end early or late; the caller counts.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future or the body closes the transfer.
    async fn blob(
        &self,
        digest: &Digest,
        size: u64,
        range: Range<u64>,
    ) -> Result<BlobBody, SourceError>;

    /// Whether its bytes are on this machine's own disks, and cost the network nothing.
    fn is_local(&self) -> bool {
        false
    }

    /// Takes note that a blob turned out wrong: places that served it and are not the
    /// authority are not asked for it again. True when the next request goes elsewhere.
    fn distrust(&self, _blob: &Digest) -> bool {
        false
    }
}

/// Who has a right to what a source has served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Audience {
    /// It has no say in that: a mirror may stand before the registry.
    Nobody,
    /// Who asked, with their credentials.
    Caller,
    /// Everybody: no credentials were needed.
    Everybody,
}

/// A tag or a digest within one repository.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum ManifestName {
    /// A tag, resolved by the source at the moment it is asked.
    Tag(String),
    /// A fixed manifest.
    Digest(Digest),
    /// The one manifest that the place holds; where it holds several, the error lists
    /// them. Only a layout reference without a tag says this.
    Only,
}

/// As it stands behind a repository's name: `:tag`, `@sha256:…`, or nothing.
impl fmt::Display for ManifestName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tag(tag) => write!(f, ":{tag}"),
            Self::Digest(digest) => write!(f, "@{digest}"),
            Self::Only => Ok(()),
        }
    }
}

/// A manifest as it travelled.
#[derive(Debug, Clone)]
pub struct RawManifest {
    /// The media type that the source declared (without parameters); empty when it said nothing.
    pub media_type: String,
    /// The exact bytes, which the digest is over.
    pub bytes: Bytes,
}

impl RawManifest {
    /// SHA-256 over the bytes.
    pub fn digest(&self) -> Digest {
        Digest::of(&self.bytes)
    }
}

/// A blob's bytes on their way.
pub struct BlobBody {
    /// Where in the blob the first byte of `stream` stands: the start of the range
    /// asked for, or 0 where the source does not serve ranges.
    pub offset: u64,
    /// Whether the source serves ranges: the stream then ends where the range does,
    /// else it goes on to the end of the blob.
    pub ranged: bool,
    /// Whether the node had the bytes before, somewhere else than in the store, whatever the source
    /// is: they cost the network nothing, and are not counted as fetched.
    pub is_here: bool,
    /// Chunks of any size, in order.
    pub stream: BoxStream<'static, Result<Bytes, SourceError>>,
}

/// Why a source did not serve. The variants are what a caller does next.
///
/// Each message names the object and the place, and what a person can do.
#[derive(Debug, Clone, thiserror::Error)]
pub enum SourceError {
    /// The source answers, and the object is not there. Do not retry.
    #[error("{0}")]
    NotFound(String),
    /// The source wants other credentials (401, 403). Do not retry.
    #[error("{0}")]
    Denied(String),
    /// The source asks to come back later (429, or 503 with Retry-After).
    #[error("{message}")]
    Throttled {
        /// What was asked for, and where.
        message: String,
        /// How long the source asked to wait, when it said so.
        retry_after: Option<Duration>,
    },
    /// The source could not be reached, broke off, or answered 5xx. Retry.
    #[error("{0}")]
    Unavailable(String),
    /// The source answered something that is no valid answer. Do not retry.
    #[error("{0}")]
    Invalid(String),
}

impl SourceError {
    /// Whether the same request may succeed later.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Throttled { .. } | Self::Unavailable(_))
    }

    /// The same error with another message.
    pub(crate) fn map_message(self, change: impl FnOnce(&str) -> String) -> Self {
        match self {
            Self::NotFound(why) => Self::NotFound(change(&why)),
            Self::Denied(why) => Self::Denied(change(&why)),
            Self::Throttled { message, retry_after } => {
                Self::Throttled { message: change(&message), retry_after }
            }
            Self::Unavailable(why) => Self::Unavailable(change(&why)),
            Self::Invalid(why) => Self::Invalid(change(&why)),
        }
    }
}

/// Opens sources. Holds the HTTP client, whose connections and tokens all pulls share.
#[derive(Clone)]
pub struct Sources {
    registry: RegistryClient,
    runtime: Option<Runtime>,
}

impl Sources {
    /// Makes the client; connects to nothing.
    ///
    /// # Errors
    ///
    /// [`SourceError::Invalid`] when no TLS client can be made, for want of root
    /// certificates for instance.
    pub fn new(options: RegistryOptions) -> Result<Self, SourceError> {
        Ok(Self { registry: RegistryClient::new(options)?, runtime: None })
    }

    /// Takes what the container runtime has from there, before any mirror or registry is asked for it.
    pub fn with_runtime(self, runtime: Runtime) -> Self {
        Self { runtime: Some(runtime), ..self }
    }

    /// The source that holds what `reference` names. Nothing is asked yet: whether it
    /// exists shows at the first request.
    ///
    /// `secret` goes before what docker's `config.json` holds for the registry; a layout
    /// needs neither.
    ///
    /// # Errors
    ///
    /// [`SourceError::Invalid`] when the reference makes no valid address.
    pub fn open(
        &self,
        reference: &Reference,
        secret: &PullSecret,
    ) -> Result<Arc<dyn Source>, SourceError> {
        Ok(match reference {
            Reference::Registry(reference) => {
                let registry = Arc::new(self.registry.pull_from(reference, secret)?);
                match &self.runtime {
                    Some(runtime) => Arc::new(RuntimeFirst::new(runtime.clone(), registry)),
                    None => registry,
                }
            }
            Reference::Layout(reference) => open_local(reference),
        })
    }

    /// Who the node is at the registry of `reference`, by docker's `config.json` and its helpers; a layout
    /// has none.
    ///
    /// # Errors
    ///
    /// As a pull's, for want of a configuration that can be read.
    pub(crate) async fn credential(
        &self,
        reference: &Reference,
    ) -> Result<Credential, SourceError> {
        match reference {
            Reference::Registry(reference) => self.registry.credential(reference).await,
            Reference::Layout(_) => Ok(Credential::Anonymous),
        }
    }

    /// As [`Sources::open`], without runtime and mirrors: the place that decides who may have what.
    ///
    /// # Errors
    ///
    /// As [`Sources::open`].
    pub(crate) fn open_origin(
        &self,
        reference: &Reference,
        secret: &PullSecret,
    ) -> Result<Arc<dyn Source>, SourceError> {
        Ok(match reference {
            Reference::Registry(reference) => Arc::new(self.registry.origin_of(reference, secret)?),
            Reference::Layout(reference) => open_local(reference),
        })
    }

    /// The container runtime, where one is asked.
    pub fn runtime(&self) -> Option<&Runtime> {
        self.runtime.as_ref()
    }

    /// The client that registries are spoken to with.
    pub(crate) fn registry(&self) -> &RegistryClient {
        &self.registry
    }
}

/// The source of a layout, which asks nobody.
fn open_local(reference: &LayoutReference) -> Arc<dyn Source> {
    let path = reference.path();
    match reference.form() {
        LayoutForm::Folder => Arc::new(LayoutSource::new(path)),
        LayoutForm::OciArchive => Arc::new(LayoutSource::in_archive(path)),
        LayoutForm::DockerArchive => Arc::new(DockerArchive::new(path)),
    }
}
