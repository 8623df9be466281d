//! The file system itself: a tree of the store, read-only, without a kernel.
//!
//! Knows inodes, names, handles and bytes, and nothing of FUSE; [`super::adapter`]
//! translates. Each error has its errno, chosen here once.
//!
//! # What always holds
//!
//! - **Nothing is ever written**, whatever the caller's rights are.
//! - **Nothing outside the tree is opened**: files are opened by their path beneath the
//!   root, through no symbolic link.
//! - **Bytes are right or there are none**: a stored file that is not as it was at the
//!   start is an I/O error, and so is a layer that turns out wrong while it arrives. Until
//!   then nobody knows of that layer.
//! - **No wait is endless**: bytes that do not arrive in time are an I/O error.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use carport_image::pull::{Arriving, ArrivingFile};
use rustix::fs::{Access, FileType, OFlags};
use rustix::io::Errno;
use tokio_util::sync::CancellationToken;

use super::read::{Buffers, MAX_READ, OpenFile, Reading};
use super::table::{Attributes, Content, Kind, Node, Place, Table, open_beneath, size};

/// What is answered instead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FsError {
    /// No such name in this folder.
    NotFound,
    /// No such inode, and never was one.
    Stale,
    NotFolder,
    IsFolder,
    /// The file may not be executed.
    Denied,
    ReadOnly,
    /// A handle that is not open.
    BadHandle,
    /// What the call cannot mean: the text of a link that is none, an endless read.
    Invalid,
    /// Too many files are open in this process.
    TooManyOpen,
    /// The store is damaged or its disk is.
    Damaged,
    /// The bytes have not arrived, or turned out to be wrong.
    NotArrived,
}

impl FsError {
    /// What the system call gives.
    pub(super) fn errno(self) -> i32 {
        match self {
            Self::NotFound => libc::ENOENT,
            Self::Stale => libc::ESTALE,
            Self::NotFolder => libc::ENOTDIR,
            Self::IsFolder => libc::EISDIR,
            Self::Denied => libc::EACCES,
            Self::ReadOnly => libc::EROFS,
            Self::BadHandle => libc::EBADF,
            Self::Invalid => libc::EINVAL,
            Self::TooManyOpen => libc::ENFILE,
            Self::Damaged | Self::NotArrived => libc::EIO,
        }
    }
}

/// A name in a folder.
#[derive(Debug, Clone, Copy)]
pub(super) struct Entry<'a> {
    pub(super) name: &'a OsStr,
    pub(super) attributes: &'a Attributes,
    /// Where a listing goes on behind this entry.
    pub(super) next: u64,
}

/// What the file system holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Statistics {
    pub(super) bytes: u64,
    pub(super) inodes: u64,
}

/// A tree that can be looked at.
#[derive(Debug)]
pub(super) struct Fs {
    root: OwnedFd,
    table: Table,
    handles: Mutex<Handles>,
    buffers: Arc<Buffers>,
    complaints: AtomicU32,
    /// How long a read waits for bytes on their way.
    patience: Duration,
    /// Ends all such waits.
    stop: CancellationToken,
}

/// Damage that is logged. A reader that tries for ever must not fill the disk with log.
const MAX_COMPLAINTS: u32 = 100;

#[derive(Debug, Default)]
struct Handles {
    last: u64,
    open: HashMap<u64, Arc<OpenFile>>,
}

impl Fs {
    /// Reads the list of all there is. Blocks: 10,000 files take some 20 ms.
    ///
    /// # Errors
    ///
    /// With the path, relative to `root`, that could not be read.
    pub(super) fn load(root: OwnedFd) -> Result<Self, (PathBuf, io::Error)> {
        let table = Table::load(root.as_fd())?;
        Ok(Self::new(root, table, Duration::ZERO, CancellationToken::new()))
    }

    /// Shows the folder `path` of an image that arrives. `objects` is the store's folder of objects, for
    /// files that are here already. A read waits for `patience` at most, and until `stop`.
    ///
    /// # Errors
    ///
    /// With what is no folder of the image.
    pub(super) fn arriving(
        image: &Arriving,
        path: Option<&Path>,
        objects: OwnedFd,
        patience: Duration,
        stop: CancellationToken,
    ) -> Result<Self, (PathBuf, io::Error)> {
        Ok(Self::new(objects, Table::arriving(image, path)?, patience, stop))
    }

    fn new(root: OwnedFd, table: Table, patience: Duration, stop: CancellationToken) -> Self {
        Self {
            root,
            table,
            handles: Mutex::default(),
            buffers: Arc::default(),
            complaints: AtomicU32::new(0),
            patience,
            stop,
        }
    }

    fn node(&self, inode: u64) -> Result<&Node, FsError> {
        self.table.get(inode).ok_or(FsError::Stale)
    }

    /// What is called `name` in the folder `parent`.
    pub(super) fn lookup(&self, parent: u64, name: &OsStr) -> Result<&Attributes, FsError> {
        let folder = self.node(parent)?;
        let Content::Folder { parent: above, children } = &folder.content else {
            return Err(FsError::NotFolder);
        };
        let inode = match name.as_encoded_bytes() {
            b"." => parent,
            b".." => *above,
            _ => {
                let index = children.binary_search_by(|child| (*child.name).cmp(name));
                children[index.map_err(|_| FsError::NotFound)?].inode
            }
        };
        self.attributes(inode)
    }

    pub(super) fn attributes(&self, inode: u64) -> Result<&Attributes, FsError> {
        self.node(inode).map(|node| &node.attributes)
    }

    /// The text of a symbolic link, which the reader resolves where it is.
    pub(super) fn link_text(&self, inode: u64) -> Result<&OsStr, FsError> {
        match &self.node(inode)?.content {
            Content::Link(text) => Ok(text),
            Content::Folder { .. } | Content::File(_) => Err(FsError::Invalid),
        }
    }

    /// The entries of a folder from `offset` on: 0, or [`Entry::next`] of one before.
    pub(super) fn entries(
        &self,
        folder: u64,
        offset: u64,
    ) -> Result<impl Iterator<Item = Entry<'_>> + Send, FsError> {
        let Content::Folder { parent, children } = &self.node(folder)?.content else {
            return Err(FsError::NotFolder);
        };
        let dots = [(OsStr::new("."), folder), (OsStr::new(".."), *parent)];
        let all = dots.into_iter().chain(children.iter().map(|child| (&*child.name, child.inode)));
        let skipped = usize::try_from(offset).unwrap_or(usize::MAX);
        let entries = all.zip(1..).skip(skipped).filter_map(|((name, inode), next)| {
            let attributes = self.attributes(inode).ok()?;
            Some(Entry { name, attributes, next })
        });
        Ok(entries)
    }

    /// Whether `wanted` is possible at all, for whoever asks: who may what is the
    /// kernel's to judge, from the attributes.
    pub(super) fn access(&self, inode: u64, wanted: Access) -> Result<(), FsError> {
        let attributes = self.attributes(inode)?;
        if wanted.contains(Access::WRITE_OK) {
            return Err(FsError::ReadOnly);
        }
        if wanted.contains(Access::EXEC_OK)
            && attributes.kind == Kind::File
            && attributes.permissions & 0o111 == 0
        {
            return Err(FsError::Denied);
        }
        Ok(())
    }

    /// Opens a file to read it.
    pub(super) fn open(&self, inode: u64, to_write: bool) -> Result<u64, FsError> {
        let node = self.node(inode)?;
        if to_write {
            return Err(FsError::ReadOnly);
        }
        let size = node.attributes.size;
        let file = match &node.content {
            Content::File(Place::Stored(path)) => self.open_stored(path, size)?,
            Content::File(Place::Arriving(path, file)) => self.open_arriving(path, file, size)?,
            Content::File(Place::Empty) => OpenFile { file: None, size, arriving: None },
            Content::Folder { .. } => return Err(FsError::IsFolder),
            Content::Link(_) => return Err(FsError::Invalid),
        };
        let mut handles = self.handles();
        handles.last += 1;
        let handle = handles.last;
        handles.open.insert(handle, Arc::new(file));
        Ok(handle)
    }

    fn open_stored(&self, path: &Path, expected: u64) -> Result<OpenFile, FsError> {
        let damaged = |why: String| self.damaged(path, &why);
        let file = match open_beneath(self.root.as_fd(), path, OFlags::empty()) {
            Ok(file) => file,
            Err(Errno::MFILE | Errno::NFILE) => return Err(FsError::TooManyOpen),
            Err(error) => return Err(damaged(error.to_string())),
        };
        let stat = rustix::fs::fstat(&file).map_err(|error| damaged(error.to_string()))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile || size(&stat) != expected
        {
            return Err(damaged(format!("not the file of {expected} bytes that it was")));
        }
        Ok(OpenFile { file: Some(file), size: expected, arriving: None })
    }

    fn open_arriving(
        &self,
        path: &Path,
        file: &ArrivingFile,
        size: u64,
    ) -> Result<OpenFile, FsError> {
        // What turned out wrong is not opened any more; what is missing may still come.
        file.has(0..0).map_err(|why| self.not_arrived(path, &why.to_string()))?;
        match file.open() {
            Ok(opened) => {
                let arriving = Some(file.clone());
                Ok(OpenFile { file: Some(opened.into()), size, arriving })
            }
            Err(error) if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE)) => {
                Err(FsError::TooManyOpen)
            }
            Err(error) => Err(self.damaged(path, &error.to_string())),
        }
    }

    /// Waits until the bytes of `reading`, of the file `inode`, have arrived.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future gives up the wait.
    pub(super) async fn arrival(&self, inode: u64, reading: &Reading) -> Result<(), FsError> {
        let arrived = tokio::time::timeout(self.patience, reading.arrival());
        let arrived = tokio::select! {
            arrived = arrived => arrived,
            () = self.stop.cancelled() => return Err(FsError::NotArrived),
        };
        match arrived {
            Ok(Ok(())) => Ok(()),
            Ok(Err(why)) => Err(self.not_arrived(self.path(inode), &why.to_string())),
            Err(_) => {
                let why = format!("its bytes did not come within {:?}", self.patience);
                Err(self.not_arrived(self.path(inode), &why))
            }
        }
    }

    fn not_arrived(&self, path: &Path, why: &str) -> FsError {
        if self.complaints.fetch_add(1, Ordering::Relaxed) < MAX_COMPLAINTS {
            tracing::error!(path = %path.display(), why, "gave a reader an error");
        }
        FsError::NotArrived
    }

    /// Tells people that `path` is not readable as it was, and the caller that it is not.
    pub(super) fn damaged(&self, path: &Path, why: &str) -> FsError {
        if self.complaints.fetch_add(1, Ordering::Relaxed) < MAX_COMPLAINTS {
            let path = path.display();
            tracing::error!(%path, why, "read no stored file; the store or its disk is damaged");
        }
        FsError::Damaged
    }

    /// Where the file is beneath the root or in the image; for messages.
    pub(super) fn path(&self, inode: u64) -> &Path {
        match self.table.get(inode).map(|node| &node.content) {
            Some(Content::File(Place::Stored(path) | Place::Arriving(path, _))) => path,
            _ => Path::new("?"),
        }
    }

    /// Starts a read of at most `size` bytes; fewer only where the file ends.
    pub(super) fn read(&self, handle: u64, offset: u64, size: u32) -> Result<Reading, FsError> {
        let file = self.handles().open.get(&handle).cloned().ok_or(FsError::BadHandle)?;
        let size = usize::try_from(size).ok().filter(|&size| size <= MAX_READ);
        let size = size.ok_or(FsError::Invalid)?;
        Ok(Reading::new(file, offset, size, &self.buffers))
    }

    /// Closes a file. Reads under way end as they would have.
    pub(super) fn release(&self, handle: u64) -> Result<(), FsError> {
        self.handles().open.remove(&handle).map(drop).ok_or(FsError::BadHandle)
    }

    /// Any change of anything.
    pub(super) fn change<T>(&self) -> Result<T, FsError> {
        Err(FsError::ReadOnly)
    }

    pub(super) fn statistics(&self) -> Statistics {
        Statistics { bytes: self.table.bytes(), inodes: self.table.len() }
    }

    fn handles(&self) -> MutexGuard<'_, Handles> {
        self.handles.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
