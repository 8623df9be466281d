//! Reads of stored files, and the buffers for them.
//!
//! ```text
//! Reading ─ now() ─┬─► Ready(bytes)              what the page cache had
//!                  ├─► Waiting(Reading) ─ wait() ─► bytes, on a thread that may block
//!                  └─► Missing(Reading) ─ arrival() ─► again, once the pull has brought them
//! ```
//!
//! A buffer goes back to its pool when the kernel has its bytes. It stays initialised
//! all that time: zeroing a megabyte before each read would cost as much as the copy.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use carport_image::pull::ArrivingFile;
use rustix::io::{Errno, ReadWriteFlags};

/// The largest read that the kernel sends: 256 pages, the most that FUSE negotiates.
pub(super) const MAX_READ: usize = 1 << 20;

/// Buffers kept while idle. More are made when more reads are in flight.
const IDLE_BUFFERS: usize = 16;

/// A file of the tree that somebody has open.
#[derive(Debug)]
pub(super) struct OpenFile {
    /// Absent for a file without bytes that is stored nowhere yet.
    pub(super) file: Option<OwnedFd>,
    /// Its bytes; what is stored never grows or shrinks.
    pub(super) size: u64,
    /// Knows which of them are here, where not all were from the start.
    pub(super) arriving: Option<ArrivingFile>,
}

/// A pool of buffers of [`MAX_READ`] bytes.
#[derive(Debug, Default)]
pub(super) struct Buffers {
    idle: Mutex<Vec<Box<[u8]>>>,
}

impl Buffers {
    fn take(self: &Arc<Self>) -> Buffer {
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        // Fresh zeroes come from the kernel page by page, so small reads stay cheap.
        let bytes = idle.unwrap_or_else(|| vec![0; MAX_READ].into_boxed_slice());
        Buffer { bytes, filled: 0, pool: self.clone() }
    }
}

#[derive(Debug)]
struct Buffer {
    bytes: Box<[u8]>,
    filled: usize,
    pool: Arc<Buffers>,
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        &self.bytes[..self.filled]
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let mut idle = self.pool.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.len() < IDLE_BUFFERS {
            idle.push(std::mem::take(&mut self.bytes));
        }
    }
}

/// A read under way.
#[derive(Debug)]
pub(super) struct Reading {
    file: Arc<OpenFile>,
    offset: u64,
    wanted: usize,
    buffer: Buffer,
}

/// How far a read came without waiting for the disk.
#[derive(Debug)]
pub(super) enum Progress {
    Ready(Bytes),
    /// The disk has them.
    Waiting(Reading),
    /// They have not come.
    Missing(Reading),
}

impl Reading {
    /// A read of at most `size` bytes at `offset`, less where the file ends.
    pub(super) fn new(
        file: Arc<OpenFile>,
        offset: u64,
        size: usize,
        buffers: &Arc<Buffers>,
    ) -> Self {
        let rest = usize::try_from(file.size.saturating_sub(offset)).unwrap_or(usize::MAX);
        let wanted = size.min(rest).min(MAX_READ);
        Self { file, offset, wanted, buffer: buffers.take() }
    }

    /// Reads what is in the page cache; never waits for the disk.
    pub(super) fn now(mut self) -> io::Result<Progress> {
        if let Some(arriving) = &self.file.arriving
            && !arriving.has(self.range()).map_err(io::Error::other)?
        {
            return Ok(Progress::Missing(self));
        }
        match self.fill(ReadWriteFlags::NOWAIT) {
            Ok(()) => Ok(Progress::Ready(self.done())),
            // OPNOTSUPP: a file system that cannot tell whether it would wait.
            Err(Errno::AGAIN | Errno::OPNOTSUPP) => Ok(Progress::Waiting(self)),
            Err(error) => Err(error.into()),
        }
    }

    fn range(&self) -> std::ops::Range<u64> {
        self.offset..self.offset.saturating_add(self.wanted as u64)
    }

    /// Has what it wants fetched, and waits until it is here.
    ///
    /// # Errors
    ///
    /// When it will not come.
    pub(super) async fn arrival(&self) -> io::Result<()> {
        match &self.file.arriving {
            Some(arriving) => arriving.wait(self.range()).await.map_err(io::Error::other),
            None => Ok(()),
        }
    }

    /// Reads the rest. Blocks on the disk.
    pub(super) fn wait(mut self) -> io::Result<Bytes> {
        self.fill(ReadWriteFlags::empty())?;
        Ok(self.done())
    }

    fn fill(&mut self, flags: ReadWriteFlags) -> Result<(), Errno> {
        while self.buffer.filled < self.wanted {
            let at = self.offset + self.buffer.filled as u64;
            let space = &mut self.buffer.bytes[self.buffer.filled..self.wanted];
            let mut space = [IoSliceMut::new(space)];
            let Some(file) = &self.file.file else { return Err(Errno::IO) };
            match rustix::io::preadv2(file.as_fd(), &mut space, at, flags) {
                // Shorter than it was: the store is damaged, and zeroes would be a lie.
                Ok(0) => return Err(Errno::IO),
                Ok(count) => self.buffer.filled += count,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn done(self) -> Bytes {
        Bytes::from_owner(self.buffer)
    }
}
