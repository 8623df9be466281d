//! Where the bytes of a layer lie that come in any order: written and read by their place in the
//! uncompressed layer.
//!
//! ```text
//! layer         │ header │ model-1 .......... │ header │ model-2 .......... │ end │
//! on the disk   │ rest   │ at-…200            │ rest   │ here-… (a link)    │ rest│
//! ```
//!
//! Each file is a file in the ingest folder, named by where it begins; all other bytes lie in `rest`,
//! sparse. A file that the store has is a link to its object, which nothing is written to.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use super::unpack::SYNC_EACH;

pub(super) const REST: &str = "rest";

/// Where a layer's bytes lie.
#[derive(Debug)]
pub(crate) struct Spool {
    pub(super) folder: PathBuf,
    pub(super) size: u64,
    /// By where they begin; they do not overlap.
    pub(super) files: Vec<SpoolFile>,
    rest_dirty: AtomicBool,
}

#[derive(Debug)]
pub(super) struct SpoolFile {
    pub(super) range: Range<u64>,
    pub(super) executable: bool,
    /// The link to a stored object that is this file, which nothing writes to.
    link: Option<String>,
    /// Written since the last sync.
    pub(super) dirty: AtomicBool,
    /// Where it is once it has its name.
    pub(super) object: OnceLock<PathBuf>,
}

impl SpoolFile {
    pub(super) fn name(&self) -> String {
        self.link.clone().unwrap_or_else(|| own_name(&self.range))
    }

    pub(super) fn length(&self) -> u64 {
        self.range.end - self.range.start
    }
}

fn own_name(range: &Range<u64>) -> String {
    format!("at-{:016x}", range.start)
}

impl Spool {
    /// For a layer of `size` bytes, if that is known already; `rest` is made where it is not there.
    /// Blocks, as all here.
    pub(crate) fn open(folder: &Path, size: Option<u64>) -> io::Result<Self> {
        let rest = folder.join(REST);
        let rest =
            File::options().create(true).truncate(false).write(true).mode(0o600).open(rest)?;
        if let Some(size) = size {
            rest.set_len(size)?;
        }
        let size = size.unwrap_or(u64::MAX);
        let (folder, files) = (folder.to_owned(), Vec::new());
        Ok(Self { folder, size, files, rest_dirty: AtomicBool::new(false) })
    }

    /// So long is the layer.
    pub(crate) fn ends_at(&mut self, size: u64) {
        self.size = size;
    }

    /// A file at `range`, behind all others. False where nothing of it was here before.
    pub(crate) fn add(&mut self, range: Range<u64>, executable: bool) -> io::Result<bool> {
        let (dirty, object) = (AtomicBool::new(false), OnceLock::new());
        let file = SpoolFile { range, executable, link: None, dirty, object };
        let (path, length) = (self.folder.join(file.name()), file.length());
        self.files.push(file);
        if std::fs::symlink_metadata(&path).is_ok_and(|meta| meta.is_file() && meta.len() == length)
        {
            return Ok(true);
        }
        let made =
            File::options().create(true).truncate(true).write(true).mode(0o600).open(&path)?;
        match rustix::fs::fallocate(&made, FallocateFlags::empty(), 0, length) {
            // Not every file system can reserve; then the writes will tell.
            Err(Errno::OPNOTSUPP | Errno::INVAL) => made.set_len(length)?,
            reserved => reserved?,
        }
        Ok(false)
    }

    /// As [`Spool::add`], of a file that a stored object is, all of which is here.
    pub(crate) fn add_link(
        &mut self,
        range: Range<u64>,
        executable: bool,
        link: String,
    ) -> io::Result<()> {
        // What an earlier pull began must not be taken for whole when the object is gone.
        match std::fs::remove_file(self.folder.join(own_name(&range))) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let (dirty, object) = (AtomicBool::new(false), OnceLock::new());
        self.files.push(SpoolFile { range, executable, link: Some(link), dirty, object });
        Ok(())
    }

    /// The file that has the byte at `at`, or else where the next one begins.
    pub(super) fn place(&self, at: u64) -> Result<&SpoolFile, u64> {
        let next = self.files.partition_point(|file| file.range.start <= at);
        match self.files[..next].last().filter(|file| at < file.range.end) {
            Some(file) => Ok(file),
            None => Err(self.files.get(next).map_or(self.size, |file| file.range.start)),
        }
    }

    /// Writes `bytes`, which are the blob's from `at` on.
    pub(crate) fn write(&self, mut at: u64, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let (path, end, begins, dirty) = match self.place(at) {
                Ok(file) => (
                    file.link.is_none().then(|| file.name()),
                    file.range.end,
                    file.range.start,
                    &file.dirty,
                ),
                Err(end) => (Some(REST.to_owned()), end, 0, &self.rest_dirty),
            };
            let length = usize::try_from(end.saturating_sub(at)).unwrap_or(usize::MAX);
            if length == 0 {
                return Err(io::Error::other("bytes behind the blob's end"));
            }
            let (now, later) = bytes.split_at(length.min(bytes.len()));
            if let Some(path) = path {
                let file = File::options().write(true).open(self.folder.join(path))?;
                file.write_all_at(now, at - begins)?;
                dirty.store(true, Ordering::Release);
            }
            at += now.len() as u64;
            bytes = later;
        }
        Ok(())
    }

    pub(super) fn sync(&self) -> io::Result<()> {
        let dirty: Vec<_> =
            self.files.iter().filter(|file| file.dirty.swap(false, Ordering::AcqRel)).collect();
        if dirty.len() > SYNC_EACH {
            self.rest_dirty.store(false, Ordering::Release);
            return Ok(rustix::fs::syncfs(File::open(&self.folder)?)?);
        }
        for file in dirty {
            File::open(self.folder.join(file.name()))?.sync_data()?;
        }
        if self.rest_dirty.swap(false, Ordering::AcqRel) {
            File::open(self.folder.join(REST))?.sync_data()?;
        }
        Ok(())
    }
}
