//! Between `fuse3` and [`Fs`]: translates requests and answers, and decides nothing but
//! how the kernel may cache and batch.
//!
//! A request that needs the disk and is not a read is served in line: what it needs is
//! the metadata of one stored file, and a thread of its own would cost it five times as much.

use std::ffi::OsStr;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use fuse3::raw::prelude::*;
use fuse3::{Errno, Inode, Result, Timestamp};
use futures_util::stream::{self, Stream};
use rustix::fs::Access;

use super::fs::{Entry, Fs, FsError};
use super::read::{MAX_READ, Progress};
use super::table::{Attributes, Kind};

/// Attributes and names never change, so the kernel need not ask again within any
/// sensible time. An hour, not for ever: a wrong answer would end some day.
const TTL: Duration = Duration::from_secs(3600);

/// Requests that the kernel sends ahead of their readers. With its default of 12 a
/// few readers that wait for the disk hold up all others.
const MAX_BACKGROUND: u16 = 64;

/// Of `open`: pages stay cached when the file is opened again.
/// <https://docs.kernel.org/filesystems/fuse/fuse-io.html>
const FOPEN_KEEP_CACHE: u32 = 1 << 1;

const BLOCK_BYTES: u32 = 4096;

/// An [`Fs`] as `fuse3` wants it.
#[derive(Debug)]
pub(super) struct Adapter(pub(super) Arc<Fs>);

impl From<FsError> for Errno {
    fn from(error: FsError) -> Self {
        error.errno().into()
    }
}

fn kind(kind: Kind) -> FileType {
    match kind {
        Kind::Folder => FileType::Directory,
        Kind::File => FileType::RegularFile,
        Kind::Link => FileType::Symlink,
    }
}

fn file_attr(attributes: &Attributes) -> FileAttr {
    let time = Timestamp::new(attributes.modified.0, attributes.modified.1);
    FileAttr {
        ino: attributes.inode,
        size: attributes.size,
        blocks: attributes.blocks,
        atime: time,
        mtime: time,
        ctime: time,
        kind: kind(attributes.kind),
        perm: attributes.permissions,
        nlink: attributes.links,
        uid: attributes.uid,
        gid: attributes.gid,
        rdev: 0,
        blksize: BLOCK_BYTES,
    }
}

fn reply_entry(attributes: &Attributes) -> ReplyEntry {
    ReplyEntry { ttl: TTL, attr: file_attr(attributes), generation: 0 }
}

fn directory_entry(entry: Entry<'_>) -> Result<DirectoryEntry> {
    Ok(DirectoryEntry {
        inode: entry.attributes.inode,
        kind: kind(entry.attributes.kind),
        name: entry.name.to_owned(),
        offset: entry.next.cast_signed(),
    })
}

fn directory_entry_plus(entry: Entry<'_>) -> Result<DirectoryEntryPlus> {
    Ok(DirectoryEntryPlus {
        inode: entry.attributes.inode,
        generation: 0,
        kind: kind(entry.attributes.kind),
        name: entry.name.to_owned(),
        offset: entry.next.cast_signed(),
        attr: file_attr(entry.attributes),
        entry_ttl: TTL,
        attr_ttl: TTL,
    })
}

impl Adapter {
    fn damaged(&self, inode: Inode, error: impl std::fmt::Display) -> Errno {
        self.0.damaged(self.0.path(inode), &error.to_string()).into()
    }
}

impl Filesystem for Adapter {
    async fn init(&self, _: Request) -> Result<ReplyInit> {
        let max_write = const { NonZeroU32::new(MAX_READ as u32).unwrap() };
        let mut reply = ReplyInit::new(max_write);
        reply.max_background = Some(MAX_BACKGROUND);
        reply.congestion_threshold = Some(MAX_BACKGROUND);
        Ok(reply)
    }

    async fn destroy(&self, _: Request) {}

    async fn lookup(&self, _: Request, parent: Inode, name: &OsStr) -> Result<ReplyEntry> {
        Ok(reply_entry(self.0.lookup(parent, name)?))
    }

    async fn getattr(&self, _: Request, inode: Inode, _: Option<u64>, _: u32) -> Result<ReplyAttr> {
        Ok(ReplyAttr { ttl: TTL, attr: file_attr(self.0.attributes(inode)?) })
    }

    async fn readlink(&self, _: Request, inode: Inode) -> Result<ReplyData> {
        let text = self.0.link_text(inode)?.as_encoded_bytes();
        Ok(Bytes::copy_from_slice(text).into())
    }

    async fn access(&self, _: Request, inode: Inode, mask: u32) -> Result<()> {
        Ok(self.0.access(inode, Access::from_bits_truncate(mask))?)
    }

    async fn open(&self, _: Request, inode: Inode, flags: u32) -> Result<ReplyOpen> {
        let flags = flags.cast_signed();
        let to_write = flags & libc::O_ACCMODE != libc::O_RDONLY || flags & libc::O_TRUNC != 0;
        Ok(ReplyOpen { fh: self.0.open(inode, to_write)?, flags: FOPEN_KEEP_CACHE })
    }

    async fn read(
        &self,
        _: Request,
        inode: Inode,
        fh: u64,
        offset: u64,
        size: u32,
    ) -> Result<ReplyData> {
        let mut reading = self.0.read(fh, offset, size)?;
        let read = loop {
            match reading.now() {
                Ok(Progress::Ready(data)) => break Ok(data),
                Ok(Progress::Waiting(reading)) => {
                    let read = tokio::task::spawn_blocking(move || reading.wait());
                    break read.await.map_err(|error| self.damaged(inode, error))?;
                }
                Ok(Progress::Missing(missing)) => {
                    self.0.arrival(inode, &missing).await?;
                    reading = missing;
                }
                Err(error) => break Err(error),
            }
        };
        Ok(read.map_err(|error| self.damaged(inode, error))?.into())
    }

    async fn release(&self, _: Request, _: Inode, fh: u64, _: u32, _: u64, _: bool) -> Result<()> {
        Ok(self.0.release(fh)?)
    }

    // `flush`, `opendir`, `lseek` and what is about extended attributes keep the answer
    // ENOSYS of the trait: the kernel asks once and does without from then on.

    async fn readdir<'a>(
        &'a self,
        _: Request,
        parent: Inode,
        _: u64,
        offset: i64,
    ) -> Result<ReplyDirectory<impl Stream<Item = Result<DirectoryEntry>> + Send + 'a>> {
        let entries = self.0.entries(parent, offset.cast_unsigned())?;
        Ok(ReplyDirectory { entries: stream::iter(entries.map(directory_entry)) })
    }

    async fn readdirplus<'a>(
        &'a self,
        _: Request,
        parent: Inode,
        _: u64,
        offset: u64,
        _: u64,
    ) -> Result<ReplyDirectoryPlus<impl Stream<Item = Result<DirectoryEntryPlus>> + Send + 'a>>
    {
        let entries = self.0.entries(parent, offset)?;
        Ok(ReplyDirectoryPlus { entries: stream::iter(entries.map(directory_entry_plus)) })
    }

    async fn statfs(&self, _: Request, _: Inode) -> Result<ReplyStatFs> {
        let held = self.0.statistics();
        Ok(ReplyStatFs {
            blocks: held.bytes.div_ceil(BLOCK_BYTES.into()),
            bfree: 0,
            bavail: 0,
            files: held.inodes,
            ffree: 0,
            bsize: BLOCK_BYTES,
            namelen: 255,
            frsize: BLOCK_BYTES,
        })
    }

    // The mount is read-only, so the kernel sends none of these; unless root remounts it.

    async fn setattr(&self, _: Request, _: Inode, _: Option<u64>, _: SetAttr) -> Result<ReplyAttr> {
        Ok(self.0.change()?)
    }

    async fn symlink(&self, _: Request, _: Inode, _: &OsStr, _: &OsStr) -> Result<ReplyEntry> {
        Ok(self.0.change()?)
    }

    async fn mknod(&self, _: Request, _: Inode, _: &OsStr, _: u32, _: u32) -> Result<ReplyEntry> {
        Ok(self.0.change()?)
    }

    async fn mkdir(&self, _: Request, _: Inode, _: &OsStr, _: u32, _: u32) -> Result<ReplyEntry> {
        Ok(self.0.change()?)
    }

    async fn unlink(&self, _: Request, _: Inode, _: &OsStr) -> Result<()> {
        Ok(self.0.change()?)
    }

    async fn rmdir(&self, _: Request, _: Inode, _: &OsStr) -> Result<()> {
        Ok(self.0.change()?)
    }

    async fn rename(&self, _: Request, _: Inode, _: &OsStr, _: Inode, _: &OsStr) -> Result<()> {
        Ok(self.0.change()?)
    }

    async fn rename2(
        &self,
        _: Request,
        _: Inode,
        _: &OsStr,
        _: Inode,
        _: &OsStr,
        _: u32,
    ) -> Result<()> {
        Ok(self.0.change()?)
    }

    async fn link(&self, _: Request, _: Inode, _: Inode, _: &OsStr) -> Result<ReplyEntry> {
        Ok(self.0.change()?)
    }

    async fn create(
        &self,
        _: Request,
        _: Inode,
        _: &OsStr,
        _: u32,
        _: u32,
    ) -> Result<ReplyCreated> {
        Ok(self.0.change()?)
    }

    async fn write(
        &self,
        _: Request,
        _: Inode,
        _: u64,
        _: u64,
        _: &[u8],
        _: u32,
        _: u32,
    ) -> Result<ReplyWrite> {
        Ok(self.0.change()?)
    }

    async fn setxattr(
        &self,
        _: Request,
        _: Inode,
        _: &OsStr,
        _: &[u8],
        _: u32,
        _: u32,
    ) -> Result<()> {
        Ok(self.0.change()?)
    }

    async fn removexattr(&self, _: Request, _: Inode, _: &OsStr) -> Result<()> {
        Ok(self.0.change()?)
    }

    async fn fallocate(&self, _: Request, _: Inode, _: u64, _: u64, _: u64, _: u32) -> Result<()> {
        Ok(self.0.change()?)
    }
}
