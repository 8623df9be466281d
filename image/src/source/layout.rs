//! An OCI image layout: a folder that holds images as files.
//!
//! ```text
//! <folder>/oci-layout            {"imageLayoutVersion": "1.0.0"}
//!          index.json            manifests, tagged by org.opencontainers.image.ref.name
//!          blobs/sha256/<hex>    manifests, configs and layers
//! ```
//! <https://github.com/opencontainers/image-spec/blob/main/image-layout.md>
//!
//! In comes the folder's path; out go manifests and ranges of blobs, unverified, as
//! [`Source`] says. Nothing is opened before it is asked for, and each question reads
//! `index.json` anew, since `pack` may add to the folder meanwhile.
//!
//! What always holds: no file outside the folder is opened, whatever symlinks lie in it;
//! only regular files are read; a blob's body holds one file descriptor and one chunk.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::StreamExt;
use rustix::fs::{Mode, OFlags, ResolveFlags};
use serde::Deserialize;

use crate::digest::Digest;
use crate::source::{BlobBody, MAX_MANIFEST_BYTES, ManifestName, RawManifest, Source, SourceError};

/// Bytes read at a time: large enough that the hop to a blocking thread does not show.
const CHUNK_BYTES: u64 = 1024 * 1024;

/// In an error, so many tags are listed.
const MAX_TAGS_LISTED: usize = 20;

/// The annotation that tags a manifest in `index.json`.
pub(crate) const REF_NAME: &str = "org.opencontainers.image.ref.name";

/// An OCI layout folder to pull from.
pub struct LayoutSource {
    folder: Arc<Path>,
}

impl LayoutSource {
    /// Names the folder; opens nothing yet.
    pub fn new(folder: &Path) -> Self {
        Self { folder: folder.into() }
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Layout) -> Result<T, SourceError> + Send + 'static,
    ) -> Result<T, SourceError> {
        let folder = self.folder.clone();
        let task = tokio::task::spawn_blocking(move || work(&Layout::open(&folder)?));
        task.await.map_err(|_| SourceError::Unavailable(format!("{}: interrupted", self.name())))?
    }
}

#[async_trait]
impl Source for LayoutSource {
    fn name(&self) -> String {
        format!("oci:{}", self.folder.display())
    }

    async fn manifest(&self, want: &ManifestName) -> Result<RawManifest, SourceError> {
        let want = want.clone();
        self.blocking(move |layout| layout.manifest(&want)).await
    }

    async fn resolve(&self, want: &ManifestName) -> Result<Digest, SourceError> {
        let want = want.clone();
        self.blocking(move |layout| match want {
            ManifestName::Digest(digest) => Ok(digest),
            want => Ok(layout.find(&want)?.digest),
        })
        .await
    }

    async fn blob(
        &self,
        digest: &Digest,
        size: u64,
        range: Range<u64>,
    ) -> Result<BlobBody, SourceError> {
        let blob = *digest;
        let name = format!("blob {digest} of {}", self.name());
        if range.is_empty() || range.end > size {
            return Err(SourceError::Invalid(format!(
                "{name}: no range {}..{} in {size} bytes",
                range.start, range.end
            )));
        }
        let file = self.blocking(move |layout| layout.blob(&blob, size)).await?;
        let offset = range.start;
        let file = Arc::new(file);
        let chunks = futures_util::stream::try_unfold(range, move |left| {
            let (file, name) = (file.clone(), name.clone());
            async move {
                if left.is_empty() {
                    return Ok(None);
                }
                let read = move || read_chunk(&file, &left).map(|chunk| (chunk, left));
                let result = tokio::task::spawn_blocking(read).await;
                let (chunk, left) = result
                    .map_err(|_| SourceError::Unavailable(format!("{name}: interrupted")))?
                    .map_err(|error| SourceError::Unavailable(format!("{name}: {error}")))?;
                let next = left.start + chunk.len() as u64..left.end;
                // At the end of a file that shrank meanwhile, the body ends early.
                Ok(if chunk.is_empty() { None } else { Some((chunk, next)) })
            }
        });
        Ok(BlobBody { offset, ranged: true, stream: chunks.boxed() })
    }
}

fn read_chunk(file: &File, left: &Range<u64>) -> io::Result<Bytes> {
    let length = (left.end - left.start).min(CHUNK_BYTES);
    let mut chunk = Vec::with_capacity(usize::try_from(length).unwrap_or_default());
    let (mut offset, end) = (left.start, left.start + length);
    while offset < end {
        // The kernel writes into fresh memory, so that nothing has to be zeroed before.
        let room = rustix::buffer::spare_capacity(&mut chunk);
        match rustix::io::pread(file, room, offset) {
            Ok(0) => break,
            Ok(count) => offset += count as u64,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(chunk.into())
}

/// An opened layout folder; all methods block.
struct Layout {
    folder: Arc<Path>,
    dir: OwnedFd,
}

#[derive(Deserialize)]
struct Version {
    #[serde(rename = "imageLayoutVersion")]
    version: String,
}

#[derive(Deserialize)]
struct Index {
    #[serde(default)]
    manifests: Vec<Entry>,
}

#[derive(Deserialize, Clone)]
struct Entry {
    #[serde(rename = "mediaType", default)]
    media_type: String,
    digest: Digest,
    #[serde(default)]
    annotations: std::collections::BTreeMap<String, String>,
}

impl Entry {
    fn tag(&self) -> Option<&str> {
        self.annotations.get(REF_NAME).map(String::as_str)
    }
}

impl Layout {
    fn open(folder: &Arc<Path>) -> Result<Self, SourceError> {
        let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
        let dir = rustix::fs::open(folder.as_ref(), flags, Mode::empty()).map_err(|error| {
            let message = format!("layout {}: {}", folder.display(), io::Error::from(error));
            match error {
                rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR => {
                    SourceError::NotFound(message)
                }
                rustix::io::Errno::ACCESS | rustix::io::Errno::PERM => SourceError::Denied(message),
                _ => SourceError::Unavailable(message),
            }
        })?;
        let layout = Self { folder: folder.clone(), dir };
        let version: Version = match layout.read(Path::new("oci-layout")) {
            Ok(text) => layout.parse("oci-layout", &text)?,
            Err(SourceError::NotFound(_)) => {
                return Err(SourceError::NotFound(format!(
                    "layout {}: no OCI layout, it has no file oci-layout; make one with \
                     carport pack, skopeo copy or oras copy",
                    folder.display()
                )));
            }
            Err(error) => return Err(error),
        };
        // 1.0.0 is the only version there is; a 1.1 would keep what we read.
        if !version.version.starts_with("1.") {
            return Err(SourceError::Invalid(format!(
                "layout {}: version {:?} is not supported, 1.0.0 is",
                folder.display(),
                version.version.chars().take(20).collect::<String>()
            )));
        }
        Ok(layout)
    }

    fn manifest(&self, want: &ManifestName) -> Result<RawManifest, SourceError> {
        let (digest, declared) = match want {
            // A manifest of an index is not listed in index.json.
            ManifestName::Digest(digest) => {
                let listed = self.index()?.manifests.into_iter().find(|e| e.digest == *digest);
                (*digest, listed.map(|entry| entry.media_type).unwrap_or_default())
            }
            want => {
                let entry = self.find(want)?;
                (entry.digest, entry.media_type)
            }
        };
        let bytes = Bytes::from(self.read(&blob_path(&digest))?);
        let media_type =
            if declared.is_empty() { media_type_of(&bytes).unwrap_or_default() } else { declared };
        Ok(RawManifest { media_type, bytes })
    }

    fn find(&self, want: &ManifestName) -> Result<Entry, SourceError> {
        let all = self.index()?.manifests;
        let mut fits: Vec<&Entry> = all
            .iter()
            .filter(|entry| match want {
                ManifestName::Tag(tag) => entry.tag() == Some(tag),
                ManifestName::Digest(digest) => entry.digest == *digest,
                ManifestName::Only => true,
            })
            .collect();
        // One manifest may stand there under several tags.
        fits.dedup_by_key(|entry| entry.digest);
        let place = format!("manifest oci:{}{want}", self.folder.display());
        match fits.as_slice() {
            [entry] => Ok((*entry).clone()),
            [] if all.is_empty() => {
                Err(SourceError::NotFound(format!("{place}: the layout holds no manifest")))
            }
            [] => Err(SourceError::NotFound(format!("{place}: not there; {}", listed(&all)))),
            _ if *want == ManifestName::Only => Err(SourceError::Invalid(format!(
                "{place}: the layout holds {} manifests; {}",
                fits.len(),
                listed(&all)
            ))),
            _ => Err(SourceError::Invalid(format!(
                "{place}: {} manifests have this tag; name one by its digest",
                fits.len()
            ))),
        }
    }

    fn index(&self) -> Result<Index, SourceError> {
        let text = self.read(Path::new("index.json"))?;
        self.parse("index.json", &text)
    }

    fn blob(&self, digest: &Digest, size: u64) -> Result<File, SourceError> {
        let path = blob_path(digest);
        let (file, length) = self.open_file(&path)?;
        if length != size {
            return Err(SourceError::Invalid(format!(
                "{} has {length} bytes, the manifest says {size}; copy the layout again",
                self.folder.join(path).display()
            )));
        }
        Ok(file)
    }

    fn parse<T: for<'de> Deserialize<'de>>(
        &self,
        name: &str,
        text: &[u8],
    ) -> Result<T, SourceError> {
        serde_json::from_slice(text).map_err(|error| {
            SourceError::Invalid(format!("{}: {error}", self.folder.join(name).display()))
        })
    }

    fn read(&self, path: &Path) -> Result<Vec<u8>, SourceError> {
        let (file, length) = self.open_file(path)?;
        let full = self.folder.join(path);
        if length > MAX_MANIFEST_BYTES {
            return Err(SourceError::Invalid(format!(
                "{}: {length} bytes are more than the {MAX_MANIFEST_BYTES} allowed",
                full.display()
            )));
        }
        let mut text = Vec::new();
        io::Read::read_to_end(&mut io::Read::take(file, MAX_MANIFEST_BYTES), &mut text)
            .map_err(|error| SourceError::Unavailable(format!("{}: {error}", full.display())))?;
        Ok(text)
    }

    /// Opens a regular file of the folder. A symlink may lead elsewhere within it (build
    /// tools make such layouts), and nowhere else.
    fn open_file(&self, path: &Path) -> Result<(File, u64), SourceError> {
        let full = || self.folder.join(path).display().to_string();
        // Without NONBLOCK, opening a FIFO would wait for its writer.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        let fd = rustix::fs::openat2(&self.dir, path, flags, Mode::empty(), resolve).map_err(
            |error| match error {
                rustix::io::Errno::NOENT => {
                    SourceError::NotFound(format!("{}: not there; the layout lacks it", full()))
                }
                rustix::io::Errno::XDEV | rustix::io::Errno::LOOP => {
                    SourceError::Invalid(format!("{}: leads out of the layout", full()))
                }
                rustix::io::Errno::ACCESS | rustix::io::Errno::PERM => {
                    SourceError::Denied(format!("{}: {}", full(), io::Error::from(error)))
                }
                _ => SourceError::Unavailable(format!("{}: {}", full(), io::Error::from(error))),
            },
        )?;
        let file = File::from(fd);
        match file.metadata() {
            Ok(metadata) if metadata.is_file() => Ok((file, metadata.len())),
            Ok(_) => Err(SourceError::Invalid(format!("{}: no regular file", full()))),
            Err(error) => Err(SourceError::Unavailable(format!("{}: {error}", full()))),
        }
    }
}

/// `blobs/sha256/<hex>`.
pub(crate) fn blob_path(digest: &Digest) -> PathBuf {
    Path::new("blobs/sha256").join(digest.hex())
}

fn media_type_of(manifest: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    struct Typed {
        #[serde(rename = "mediaType")]
        media_type: String,
    }
    serde_json::from_slice(manifest).ok().map(|typed: Typed| typed.media_type)
}

fn listed(entries: &[Entry]) -> String {
    let mut names: Vec<String> = entries
        .iter()
        .take(MAX_TAGS_LISTED)
        .map(|entry| match entry.tag() {
            Some(tag) => format!(":{}", tag.chars().take(255).collect::<String>()),
            None => format!("@{}", entry.digest),
        })
        .collect();
    if entries.len() > MAX_TAGS_LISTED {
        names.push("…".into());
    }
    format!("it holds {}", names.join(", "))
}
