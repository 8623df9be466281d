//! A layer as a stream of tar bytes.
//!
//! In comes a [`LayerPlan`]; out go chunks of at most 1 MiB, the same whenever
//! the files are the same. Size is known before the first byte is read, which is what a
//! registry wants to know. All of it blocks.

use std::collections::{BTreeSet, VecDeque};
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use tar::{Builder, EntryType, Header};

use super::PackError;
use super::plan::{FilePlan, FileState, LayerPlan};

/// Large enough that a chunk's overhead does not show, small enough to hold a few.
const CHUNK_BYTES: usize = 1024 * 1024;

const BLOCK: u64 = 512;

/// Two blocks of zeros end an archive.
const TRAILER: usize = 1024;

/// Reads a layer's tar bytes. One pass; make another to read again.
pub(super) struct LayerReader {
    plan: Arc<LayerPlan>,
    parts: VecDeque<Part>,
    size: u64,
    open: Option<Open>,
}

enum Part {
    Bytes(Bytes),
    /// The file of this number in the plan.
    File(usize),
}

struct Open {
    file: File,
    path: PathBuf,
    state: FileState,
    left: u64,
}

impl LayerReader {
    /// Opens nothing yet.
    pub(super) fn new(plan: &Arc<LayerPlan>) -> Result<Self, PackError> {
        let mut parts = VecDeque::new();
        let mut folders = BTreeSet::new();
        let mut size = 0;
        for (number, file) in plan.files.iter().enumerate() {
            // The zeros that end the file before come with this file's headers.
            let mut header = vec![0; padding(size)];
            header.extend(headers(file, &mut folders)?);
            size += header.len() as u64 + file.state.size;
            parts.push_back(Part::Bytes(header.into()));
            parts.push_back(Part::File(number));
        }
        let end = vec![0; padding(size) + TRAILER];
        size += end.len() as u64;
        parts.push_back(Part::Bytes(end.into()));
        Ok(Self { plan: plan.clone(), parts, size, open: None })
    }

    /// Bytes that will be read in all.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// The next bytes; nothing at the end.
    pub(super) fn next_chunk(&mut self) -> Result<Option<Bytes>, PackError> {
        loop {
            if let Some(open) = &mut self.open {
                if open.left > 0 {
                    return open.read().map(Some);
                }
                open.check()?;
                self.open = None;
            }
            match self.parts.pop_front() {
                None => return Ok(None),
                Some(Part::Bytes(bytes)) if bytes.is_empty() => {}
                Some(Part::Bytes(bytes)) => return Ok(Some(bytes)),
                Some(Part::File(number)) => self.open = Some(Open::new(&self.plan.files[number])?),
            }
        }
    }
}

impl Open {
    fn new(plan: &FilePlan) -> Result<Self, PackError> {
        let path = plan.source.clone();
        let file = File::open(&path).map_err(|source| io_error(&path, source))?;
        let open = Self { file, path, state: plan.state, left: plan.state.size };
        open.check()?;
        Ok(open)
    }

    fn read(&mut self) -> Result<Bytes, PackError> {
        let length = usize::try_from(self.left).map_or(CHUNK_BYTES, |left| left.min(CHUNK_BYTES));
        let mut chunk = Vec::with_capacity(length);
        (&mut self.file)
            .take(length as u64)
            .read_to_end(&mut chunk)
            .map_err(|source| io_error(&self.path, source))?;
        if chunk.len() < length {
            return Err(PackError::Changed(self.path.clone()));
        }
        self.left -= length as u64;
        Ok(chunk.into())
    }

    /// The file is as it was when the folder was read: its size is in a header already.
    fn check(&self) -> Result<(), PackError> {
        let metadata = self.file.metadata().map_err(|source| io_error(&self.path, source))?;
        if FileState::of(&metadata) == self.state {
            Ok(())
        } else {
            Err(PackError::Changed(self.path.clone()))
        }
    }
}

fn io_error(path: &Path, source: io::Error) -> PackError {
    PackError::Io { path: path.to_owned(), source }
}

fn padding(size: u64) -> usize {
    // Less than 512.
    usize::try_from((BLOCK - size % BLOCK) % BLOCK).unwrap_or_default()
}

/// The file's header, behind those of its folders that this layer has not named yet.
fn headers(file: &FilePlan, folders: &mut BTreeSet<PathBuf>) -> Result<Vec<u8>, PackError> {
    let mut builder = Builder::new(Vec::new());
    let name = Path::new(&file.name);
    let mut append = |path: &Path, kind: EntryType, size: u64, mode: u32| {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(size);
        header.set_mode(mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        // Also writes the extra header that a long name needs, and the checksum.
        builder.append_data(&mut header, path, io::empty()).map_err(|source| io_error(path, source))
    };
    let mut parents: Vec<&Path> =
        name.ancestors().skip(1).filter(|path| !path.as_os_str().is_empty()).collect();
    parents.reverse();
    for parent in parents {
        if folders.insert(parent.to_owned()) {
            // With the slash that tar programs write behind a folder's name.
            append(&parent.join(""), EntryType::Directory, 0, 0o755)?;
        }
    }
    let mode = if file.executable { 0o555 } else { 0o444 };
    append(name, EntryType::Regular, file.state.size, mode)?;
    // The builder's own end, two zero blocks, would come next.
    Ok(std::mem::take(builder.get_mut()))
}
