//! Tar archives of images, as `skopeo copy`, `docker save` and `podman save` write them.
//!
//! ```text
//! oci-archive:     an OCI layout in a tar             ─► read as a layout, see `layout`
//! docker-archive:  manifest.json, configs and layers  ─► `docker`, which makes manifests of them
//! ```
//!
//! In comes the file's path; out go its members, each a [`Part`] of the file. The headers are
//! walked once: after that a blob is read where it lies, and nothing is unpacked beside it. A file
//! that was replaced meanwhile is walked again.
//!
//! What always holds: only a regular file is read; links in the archive lead to members of it and
//! nowhere else; what is kept of the archive is bounded, whatever it says.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::OFlags;

use super::SourceError;
use super::part::Part;
use crate::layer::tar::{Event, Member, MemberKind, Parser};

mod docker;

pub(super) use docker::DockerArchive;

const BLOCK: usize = 512;

/// More members than the layers of all images that anybody saves into one file.
const MAX_MEMBERS: usize = 100_000;

/// Bytes of all their names together.
const MAX_NAME_BYTES: usize = 16 * 1024 * 1024;

/// Links that lead to links: `docker save` made one.
const MAX_LINKS: usize = 4;

/// An archive by name, walked when it is first needed.
pub(super) struct ArchiveFile {
    path: PathBuf,
    walked: Mutex<Option<Arc<Archive>>>,
}

/// An open archive and where its members are.
pub(super) struct Archive {
    path: PathBuf,
    version: Version,
    file: Arc<File>,
    members: BTreeMap<String, Found>,
}

/// What changes when a file is replaced or written.
#[derive(Debug, PartialEq, Eq)]
struct Version {
    device: u64,
    inode: u64,
    length: u64,
    modified: (i64, i64),
}

enum Found {
    File { start: u64, length: u64 },
    Link { target: String },
}

impl ArchiveFile {
    pub(super) fn new(path: &Path) -> Self {
        Self { path: path.to_owned(), walked: Mutex::default() }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Opens and walks the archive where that is not done yet. Blocks.
    pub(super) fn open(&self) -> Result<Arc<Archive>, SourceError> {
        let what = || format!("archive {}", self.path.display());
        // Without NONBLOCK, opening a FIFO would wait for its writer.
        let flags = OFlags::NONBLOCK.bits().cast_signed();
        let file = File::options().read(true).custom_flags(flags).open(&self.path);
        let file = file.map_err(|error| {
            let message = format!("{}: {error}", what());
            match error.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => {
                    SourceError::NotFound(message)
                }
                io::ErrorKind::PermissionDenied => SourceError::Denied(message),
                _ => SourceError::Unavailable(message),
            }
        })?;
        let unavailable = |error| SourceError::Unavailable(format!("{}: {error}", what()));
        let metadata = file.metadata().map_err(unavailable)?;
        if !metadata.is_file() {
            return Err(SourceError::Invalid(format!("{}: no regular file", what())));
        }
        let version = Version {
            device: metadata.dev(),
            inode: metadata.ino(),
            length: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
        };
        let mut walked = self.walked.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(archive) = walked.as_ref().filter(|archive| archive.version == version) {
            return Ok(Arc::clone(archive));
        }
        let members = walk(&file, version.length)
            .map_err(|why| SourceError::Invalid(format!("{}: {why}", what())))?;
        let file = Arc::new(file);
        let archive = Arc::new(Archive { path: self.path.clone(), version, file, members });
        *walked = Some(Arc::clone(&archive));
        Ok(archive)
    }
}

impl Archive {
    /// The member at `path`, which may be a link to another.
    ///
    /// # Errors
    ///
    /// [`SourceError::NotFound`] when it is not there.
    pub(super) fn part(&self, path: &str) -> Result<Part, SourceError> {
        let mut at = path;
        for _ in 0..=MAX_LINKS {
            match self.members.get(at) {
                Some(Found::File { start, length }) => {
                    let file = Arc::clone(&self.file);
                    return Ok(Part { file, start: *start, length: *length });
                }
                Some(Found::Link { target }) => at = target,
                None => {
                    return Err(SourceError::NotFound(format!(
                        "{}: not there; the archive lacks it",
                        self.full(at)
                    )));
                }
            }
        }
        Err(SourceError::Invalid(format!("{}: a chain of links", self.full(path))))
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether there is a member of this name.
    pub(super) fn has(&self, path: &str) -> bool {
        self.members.contains_key(path)
    }

    /// A member's name, for errors.
    pub(super) fn full(&self, path: &str) -> String {
        format!("{} in {}", path, self.path.display())
    }
}

/// Reads all headers, and nothing else.
fn walk(file: &File, length: u64) -> Result<BTreeMap<String, Found>, String> {
    let mut members = BTreeMap::new();
    let mut name_bytes = 0;
    let mut parser = Parser::new();
    let mut block = [0; BLOCK];
    while !parser.is_done() {
        let at = parser.offset();
        let mut block = match read_block(file, &mut block, at).map_err(|e| e.to_string())? {
            [] => break,
            block => block,
        };
        if at == 0 {
            refuse_compressed(block)?;
        }
        loop {
            let (used, event) = parser.next(block).map_err(|e| e.to_string())?;
            block = &block[used..];
            let member = match event {
                Event::More => break,
                Event::Member(member) => member,
                Event::Data(_) | Event::End => continue,
            };
            let start = parser.offset();
            parser.skip();
            let Some((path, found)) = found(member, start, length)? else { continue };
            name_bytes += path.len();
            if members.len() >= MAX_MEMBERS || name_bytes > MAX_NAME_BYTES {
                return Err(format!(
                    "more than {MAX_MEMBERS} members, or names longer than allowed"
                ));
            }
            members.insert(path, found);
        }
    }
    parser.finish().map_err(|e| e.to_string())?;
    Ok(members)
}

fn found(member: Member, start: u64, length: u64) -> Result<Option<(String, Found)>, String> {
    let Member { path, kind } = member;
    let found = match kind {
        MemberKind::File { size, .. } => {
            if start.checked_add(size).is_none_or(|end| end > length) {
                return Err(format!("ends in the middle of {path:?}: copy it again"));
            }
            Found::File { start, length: size }
        }
        MemberKind::Hardlink { target } => Found::Link { target },
        MemberKind::Symlink { target } => match resolve(&path, &target) {
            Some(target) => Found::Link { target },
            None => return Err(format!("the link {path:?} leads out of it")),
        },
        MemberKind::Directory => return Ok(None),
    };
    Ok(Some((path, found)))
}

/// Where a symbolic link at `path` leads, by its text; nothing where that is outside.
fn resolve(path: &str, target: &str) -> Option<String> {
    if target.starts_with('/') {
        return None;
    }
    let mut names: Vec<&str> = path.split('/').collect();
    names.pop();
    for name in target.split('/') {
        match name {
            "" | "." => {}
            ".." => {
                names.pop()?;
            }
            name => names.push(name),
        }
    }
    Some(names.join("/"))
}

fn refuse_compressed(start: &[u8]) -> Result<(), String> {
    let what = match start {
        [0x1f, 0x8b, ..] => "gzip",
        [0x28, 0xb5, 0x2f, 0xfd, ..] => "zstd",
        [b'B', b'Z', b'h', ..] => "bzip2",
        [0xfd, b'7', b'z', b'X', b'Z', ..] => "xz",
        _ => return Ok(()),
    };
    Err(format!("is compressed with {what}: its blobs are read in place, decompress it first"))
}

/// The block at `offset`, shorter only where the file ends.
fn read_block<'a>(file: &File, block: &'a mut [u8], offset: u64) -> io::Result<&'a [u8]> {
    let mut have = 0;
    while have < block.len() {
        match file.read_at(&mut block[have..], offset.saturating_add(have as u64)) {
            Ok(0) => break,
            Ok(count) => have += count,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(&block[..have])
}

#[cfg(test)]
#[path = "archive/tests.rs"]
mod tests;
