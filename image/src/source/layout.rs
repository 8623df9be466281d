//! An OCI image layout: a folder that holds images as files, or a tar of one.
//!
//! ```text
//! <folder>/oci-layout            {"imageLayoutVersion": "1.0.0"}
//!          index.json            manifests, tagged by org.opencontainers.image.ref.name
//!          blobs/sha256/<hex>    manifests, configs and layers
//! ```
//! <https://github.com/opencontainers/image-spec/blob/main/image-layout.md>
//!
//! In comes the folder's or archive's path; out go manifests and ranges of blobs, unverified, as
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
use rustix::fs::{Mode, OFlags, ResolveFlags};
use serde::Deserialize;

use super::archive::{Archive, ArchiveFile};
use super::part::{Part, check_range};
use crate::digest::Digest;
use crate::source::{Audience, BlobBody, ManifestName, RawManifest, Source, SourceError};

/// In an error, so many tags are listed.
const MAX_TAGS_LISTED: usize = 20;

/// The annotation that tags a manifest in `index.json`.
pub(crate) const REF_NAME: &str = "org.opencontainers.image.ref.name";

/// An OCI layout to pull from.
pub struct LayoutSource {
    place: Place,
}

/// Where the layout is.
#[derive(Clone)]
enum Place {
    Folder(Arc<Path>),
    Archive(Arc<ArchiveFile>),
}

impl LayoutSource {
    /// Names the folder; opens nothing yet.
    pub fn new(folder: &Path) -> Self {
        Self { place: Place::Folder(folder.into()) }
    }

    /// Names a tar of a layout; opens nothing yet.
    pub(super) fn in_archive(path: &Path) -> Self {
        Self { place: Place::Archive(Arc::new(ArchiveFile::new(path))) }
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Layout) -> Result<T, SourceError> + Send + 'static,
    ) -> Result<T, SourceError> {
        let place = self.place.clone();
        let task = tokio::task::spawn_blocking(move || work(&Layout::open(&place)?));
        task.await.map_err(|_| SourceError::Unavailable(format!("{}: interrupted", self.name())))?
    }
}

#[async_trait]
impl Source for LayoutSource {
    fn name(&self) -> String {
        self.place.name()
    }

    fn is_local(&self) -> bool {
        true
    }

    fn audience(&self) -> Audience {
        Audience::Everybody
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
        check_range(&name, &range, size)?;
        let part = self.blocking(move |layout| layout.blob(&blob, size)).await?;
        Ok(part.body(name, range))
    }
}

impl Place {
    fn name(&self) -> String {
        match self {
            Self::Folder(folder) => format!("oci:{}", folder.display()),
            Self::Archive(archive) => format!("oci-archive:{}", archive.path().display()),
        }
    }
}

/// An opened layout; all methods block.
struct Layout {
    /// For errors: `layout /x`, `archive /x.tar`.
    what: String,
    /// The source's name.
    name: String,
    files: Files,
}

enum Files {
    Folder(Arc<Path>, OwnedFd),
    Archive(Arc<Archive>),
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
    fn open(place: &Place) -> Result<Self, SourceError> {
        let layout = match place {
            Place::Folder(folder) => Self::open_folder(folder)?,
            Place::Archive(archive) => {
                let archive = archive.open()?;
                let what = format!("archive {}", archive.path().display());
                Self { what, name: place.name(), files: Files::Archive(archive) }
            }
        };
        let version: Version = match layout.read(Path::new("oci-layout")) {
            Ok(text) => layout.parse("oci-layout", &text)?,
            Err(SourceError::NotFound(_)) => {
                return Err(SourceError::NotFound(format!(
                    "{}: no OCI layout, it has no file oci-layout; {}",
                    layout.what,
                    layout.hint()
                )));
            }
            Err(error) => return Err(error),
        };
        // 1.0.0 is the only version there is; a 1.1 would keep what we read.
        if !version.version.starts_with("1.") {
            return Err(SourceError::Invalid(format!(
                "{}: version {:?} is not supported, 1.0.0 is",
                layout.what,
                version.version.chars().take(20).collect::<String>()
            )));
        }
        Ok(layout)
    }

    /// What to do where there is no layout.
    fn hint(&self) -> &'static str {
        match &self.files {
            Files::Archive(archive) if archive.has("manifest.json") => {
                "as docker-archive: it can be read"
            }
            Files::Archive(_) => "make one with skopeo copy",
            Files::Folder(..) => "make one with carport pack, skopeo copy or oras copy",
        }
    }

    fn open_folder(folder: &Arc<Path>) -> Result<Self, SourceError> {
        let what = format!("layout {}", folder.display());
        let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
        let dir = rustix::fs::open(folder.as_ref(), flags, Mode::empty()).map_err(|error| {
            let message = format!("{what}: {}", io::Error::from(error));
            match error {
                rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR => {
                    SourceError::NotFound(message)
                }
                rustix::io::Errno::ACCESS | rustix::io::Errno::PERM => SourceError::Denied(message),
                _ => SourceError::Unavailable(message),
            }
        })?;
        let name = format!("oci:{}", folder.display());
        Ok(Self { what, name, files: Files::Folder(Arc::clone(folder), dir) })
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
        let bytes = self.read(&blob_path(&digest))?;
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
        let place = format!("manifest {}{want}", self.name);
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

    fn blob(&self, digest: &Digest, size: u64) -> Result<Part, SourceError> {
        let path = blob_path(digest);
        let part = self.open_file(&path)?;
        if part.length != size {
            return Err(SourceError::Invalid(format!(
                "{} has {} bytes, the manifest says {size}; copy the layout again",
                self.full(&path),
                part.length
            )));
        }
        Ok(part)
    }

    fn parse<T: for<'de> Deserialize<'de>>(
        &self,
        name: &str,
        text: &[u8],
    ) -> Result<T, SourceError> {
        serde_json::from_slice(text).map_err(|error| {
            SourceError::Invalid(format!("{}: {error}", self.full(Path::new(name))))
        })
    }

    fn read(&self, path: &Path) -> Result<Bytes, SourceError> {
        self.open_file(path)?.read_document(&self.full(path))
    }

    fn full(&self, path: &Path) -> String {
        match &self.files {
            Files::Folder(folder, _) => folder.join(path).display().to_string(),
            Files::Archive(archive) => archive.full(&path.display().to_string()),
        }
    }

    fn open_file(&self, path: &Path) -> Result<Part, SourceError> {
        match &self.files {
            Files::Folder(_, dir) => self.open_in_folder(dir, path),
            Files::Archive(archive) => archive.part(&path.display().to_string()),
        }
    }

    /// Opens a regular file of the folder. A symlink may lead elsewhere within it (build
    /// tools make such layouts), and nowhere else.
    fn open_in_folder(&self, dir: &OwnedFd, path: &Path) -> Result<Part, SourceError> {
        let full = || self.full(path);
        // Without NONBLOCK, opening a FIFO would wait for its writer.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        let fd =
            rustix::fs::openat2(dir, path, flags, Mode::empty(), resolve).map_err(|error| {
                match error {
                    rustix::io::Errno::NOENT => {
                        SourceError::NotFound(format!("{}: not there; the layout lacks it", full()))
                    }
                    rustix::io::Errno::XDEV | rustix::io::Errno::LOOP => {
                        SourceError::Invalid(format!("{}: leads out of the layout", full()))
                    }
                    rustix::io::Errno::ACCESS | rustix::io::Errno::PERM => {
                        SourceError::Denied(format!("{}: {}", full(), io::Error::from(error)))
                    }
                    _ => {
                        SourceError::Unavailable(format!("{}: {}", full(), io::Error::from(error)))
                    }
                }
            })?;
        let file = File::from(fd);
        match file.metadata() {
            Ok(metadata) if metadata.is_file() => {
                Ok(Part { file: Arc::new(file), start: 0, length: metadata.len() })
            }
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
