//! Packing: a folder of model files becomes a modelcar.
//!
//! In comes a folder; out comes an OCI image, in an OCI layout folder or a
//! registry:
//!
//! ```text
//! folder ─► plan: files, sorted ─► layers ─► tar streams ─┬► layout: read once, hashed while written
//!                                                         └► registry: hashed, asked for, then uploaded
//! ```
//!
//! A file has a layer to itself, so that images which share a file share a layer;
//! files below 1 MiB share one, and beyond [`MAX_LAYERS`] neighbours do, too.
//! Layers are plain tar: weights hardly compress, and plain layers can be read in
//! ranges. In the image the folder's content stands below `/models`, where KServe
//! looks for it.
//!
//! With a base the model's layers stand on another image's, which stay what they are (`pack/base.rs`): KServe's sidecar
//! runs `sh`, `ln` and `sleep` from a modelcar.
//!
//! # What always holds
//!
//! - **Same files, same digest.** Sorted, owner 0, time 0, modes 0444 and 0555 (0755 for
//!   folders), no time of packing anywhere. The title is the folder's name unless given.
//! - **A symlink to a file is that file**, also where it leads out of the folder: Hugging Face's
//!   cache is made of such links. Who packs a folder packs what its links show. Links to
//!   folders, sockets, FIFOs and devices are refused by name. Empty folders are left out.
//! - **All or nothing.** The name (in `index.json`, or the tag) is written last. What was written
//!   before a failure is unnamed blobs, which the next run finds and uses.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::digest::Digest;
use crate::manifest::Platform;
use crate::reference::{LayoutForm, Reference};
use crate::source::{PullSecret, SourceError, Sources};

mod base;
mod document;
mod layout;
mod plan;
mod push;
mod tar;

use base::Base;
pub use plan::MAX_LAYERS;

/// How to pack. The default packs for this machine's platform and pushes with docker's credentials.
#[derive(Clone, Default)]
pub struct PackOptions {
    /// What the image says it is for. Model files run nowhere, but runtimes ask.
    pub platform: Platform,
    /// `org.opencontainers.image.title`; the folder's name where not given.
    pub title: Option<String>,
    /// Credentials for a push, and for the base.
    pub secret: PullSecret,
    /// An image of this platform to append the model to.
    pub base: Option<Reference>,
    /// Called about once a MiB, from any thread; must not block.
    pub progress: Option<Arc<dyn Fn(PackProgress) + Send + Sync>>,
}

impl fmt::Debug for PackOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PackOptions")
            .field("platform", &self.platform)
            .field("title", &self.title)
            .field("secret", &self.secret)
            .field("base", &self.base)
            .finish_non_exhaustive()
    }
}

/// How far a pack is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PackProgress {
    /// What is done with the bytes now.
    pub phase: PackPhase,
    /// Bytes of layers behind us in this phase.
    pub done_bytes: u64,
    /// Bytes of all layers.
    pub total_bytes: u64,
}

/// A layout is written in one phase, a push has two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PackPhase {
    /// Files are read and hashed, to ask the registry what it has already.
    Hashing,
    /// Layers are written or uploaded; those that are there already count as done.
    Writing,
}

/// What was packed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packed {
    /// The manifest's digest.
    pub digest: Digest,
    /// How many layers the image has.
    pub layers: usize,
    /// The layers' bytes together.
    pub bytes: u64,
}

/// Why a folder was not packed.
#[derive(Debug, thiserror::Error)]
pub enum PackError {
    /// The folder holds what cannot be packed, or nothing.
    #[error("pack {}: {why}", path.display())]
    Unfit {
        /// The folder or the file in it.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// A file changed between two looks at it.
    #[error("pack {}: changed while it was packed; pack again when nobody writes to it", .0.display())]
    Changed(PathBuf),
    /// The destination cannot be written to under that name.
    #[error("pack to {destination}: {why}")]
    Destination {
        /// As the caller named it.
        destination: String,
        /// What is wrong with it, and what to do.
        why: String,
    },
    /// The model cannot be appended to that image.
    #[error("base {base}: {why}")]
    Base {
        /// As the caller named it.
        base: String,
        /// What is wrong with it, and what to do.
        why: String,
    },
    /// A file could not be read or written.
    #[error("pack: {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The registry refused.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The caller gave up, or the process is stopping.
    #[error("pack: interrupted")]
    Interrupted,
}

/// Packs `folder` and writes the image to `destination`: a layout folder (made where it is
/// missing, added to where it is one) or a registry's repository. A tag that is there moves.
///
/// # Errors
///
/// See [`PackError`]; nothing has the destination's name then that had it not before.
///
/// # Cancel safety
///
/// Dropping the future stops the work within a MiB of bytes and leaves the name untouched.
pub async fn pack(
    folder: &Path,
    destination: &Reference,
    options: PackOptions,
    sources: &Sources,
) -> Result<Packed, PackError> {
    if destination.digest().is_some() {
        return Err(PackError::Destination {
            destination: destination.to_string(),
            why: "what is packed gets a digest of its own; name a tag".into(),
        });
    }
    let stop = StopOnDrop(Arc::default());
    let root = folder.to_owned();
    let base = match &options.base {
        Some(reference) => Some(Arc::new(Base::read(reference, &options, sources).await?)),
        None => None,
    };
    let room = base.as_ref().map_or(MAX_LAYERS, |base| base.room().min(MAX_LAYERS));
    let plan = Arc::new(blocking(move || plan::scan(&root, room)).await?);
    let mut annotations = annotations(folder, options.title.clone());
    if let Some(base) = &base {
        let mut know = |key: &str, value: String| {
            annotations.insert(format!("org.opencontainers.image.base.{key}"), value);
        };
        know("name", base.reference.to_string());
        know("digest", base.digest.to_string());
    }
    match destination {
        Reference::Layout(reference) if reference.form() != LayoutForm::Folder => {
            Err(PackError::Destination {
                destination: destination.to_string(),
                why: "an archive cannot be packed into; pack into a folder, oci:/folder:tag".into(),
            })
        }
        Reference::Layout(reference) => {
            let (path, tag) = (reference.path().to_owned(), destination.tag().map(str::to_owned));
            let stopped = stop.0.clone();
            blocking(move || {
                let what = layout::What { plan: &plan, base: base.as_deref(), annotations };
                layout::write(&path, tag.as_deref(), what, &options, &stopped)
            })
            .await
        }
        Reference::Registry(reference) => {
            let upload = sources.registry().push_to(reference, &options.secret)?;
            let what = push::What { plan, base, annotations };
            push::push(&upload, destination, what, &options, &stop.0).await
        }
    }
}

/// Tells the blocking side that nobody waits any more.
struct StopOnDrop(Arc<AtomicBool>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, PackError> + Send + 'static,
) -> Result<T, PackError> {
    tokio::task::spawn_blocking(work).await.map_err(|_| PackError::Interrupted)?
}

/// Counts bytes for the progress callback, and stops when nobody waits. Cheap to clone.
#[derive(Clone)]
struct Meter {
    report: Option<Arc<dyn Fn(PackProgress) + Send + Sync>>,
    stopped: Arc<AtomicBool>,
    phase: PackPhase,
    done_bytes: Arc<AtomicU64>,
    total_bytes: u64,
}

impl Meter {
    fn new(
        options: &PackOptions,
        stopped: &Arc<AtomicBool>,
        phase: PackPhase,
        total_bytes: u64,
    ) -> Self {
        Self {
            report: options.progress.clone(),
            stopped: stopped.clone(),
            phase,
            done_bytes: Arc::default(),
            total_bytes,
        }
    }

    fn add(&self, bytes: u64) -> Result<(), PackError> {
        self.set(self.done_bytes.load(Ordering::Relaxed).saturating_add(bytes))
    }

    fn set(&self, done_bytes: u64) -> Result<(), PackError> {
        self.done_bytes.store(done_bytes, Ordering::Relaxed);
        if let Some(report) = &self.report {
            // An upload that starts over, after a token has expired, counts twice until it ends.
            let done_bytes = done_bytes.min(self.total_bytes);
            report(PackProgress { phase: self.phase, done_bytes, total_bytes: self.total_bytes });
        }
        if self.stopped.load(Ordering::Relaxed) { Err(PackError::Interrupted) } else { Ok(()) }
    }
}

/// What is known of the folder, in the image specification's words.
///
/// A snapshot in Hugging Face's cache tells more than its name, which is a hash:
/// `models--<owner>--<name>/snapshots/<revision>`.
fn annotations(folder: &Path, title: Option<String>) -> BTreeMap<String, String> {
    // `.` and the like have no name; the folder that they mean has.
    let full = folder.canonicalize().unwrap_or_else(|_| folder.to_owned());
    let name = |path: Option<&Path>| Some(path?.file_name()?.to_str()?.to_owned());
    let mut known = BTreeMap::new();
    let mut know = |key: &str, value: String| {
        known.insert(format!("org.opencontainers.image.{key}"), value);
    };
    let revision = name(Some(&full));
    let snapshots = full.parent();
    let repository = name(snapshots.and_then(Path::parent))
        .filter(|_| name(snapshots).as_deref() == Some("snapshots"))
        .and_then(|cache| Some(cache.strip_prefix("models--")?.replacen("--", "/", 1)));
    match (repository, revision) {
        (Some(repository), Some(revision)) => {
            know("source", format!("https://huggingface.co/{repository}"));
            know("revision", revision);
            know("title", title.unwrap_or(repository));
        }
        (None, folder_name) => {
            if let Some(title) = title.or(folder_name) {
                know("title", title);
            }
        }
        (Some(_), None) => {}
    }
    known
}

#[cfg(test)]
mod tests;
