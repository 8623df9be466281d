//! Writing one file of a layer: hashed and written in the same pass.
//!
//! Large files go to the disk directly (`O_DIRECT`) from one aligned buffer:
//! a quarter of the CPU time of the page cache's way, and the pages that a
//! running model uses stay where they are. Small ones, and file systems that
//! refuse, go through the page cache.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{FallocateFlags, OFlags};
use rustix::io::Errno;

use crate::digest::ObjectId;
use crate::store::{EPOCH, object_mode};

/// Bytes gathered before a write. Larger gains nothing; smaller costs requests to the disk.
const BUFFER_BYTES: usize = 4 * 1024 * 1024;

/// The strictest alignment that file systems ask of `O_DIRECT`.
const ALIGNMENT: usize = 4096;

/// Below this, `O_DIRECT`'s wait for the disk costs more than the page cache does.
const DIRECT_FROM_BYTES: u64 = 1024 * 1024;

/// A buffer whose start is aligned; used again for file after file.
pub(crate) struct Buffer {
    memory: Vec<u8>,
    start: usize,
    filled: usize,
}

impl Buffer {
    pub(crate) fn new() -> Self {
        let memory = vec![0; BUFFER_BYTES + ALIGNMENT];
        let start = memory.as_ptr().align_offset(ALIGNMENT);
        Self { memory, start, filled: 0 }
    }

    fn filled(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.filled]
    }

    /// The filled part and zeros behind it up to the next aligned length.
    fn padded(&mut self) -> &[u8] {
        let padded = self.filled.next_multiple_of(ALIGNMENT);
        self.memory[self.start + self.filled..self.start + padded].fill(0);
        &self.memory[self.start..self.start + padded]
    }

    /// All of it, to read into directly; what was in it is lost.
    pub(crate) fn room_for_read(&mut self) -> &mut [u8] {
        self.filled = 0;
        &mut self.memory[self.start..self.start + BUFFER_BYTES]
    }

    fn room(&self) -> usize {
        BUFFER_BYTES - self.filled
    }

    /// Keeps only what is behind the last whole block; returns the length of the rest.
    fn drop_blocks(&mut self) -> usize {
        let whole = self.filled - self.filled % ALIGNMENT;
        self.memory.copy_within(self.start + whole..self.start + self.filled, self.start);
        self.filled -= whole;
        whole
    }

    fn push(&mut self, bytes: &[u8]) {
        let at = self.start + self.filled;
        self.memory[at..at + bytes.len()].copy_from_slice(bytes);
        self.filled += bytes.len();
    }
}

/// A file that is being written: of a known size, or of size 0 for one that is not known.
pub(crate) struct FileWriter {
    file: File,
    direct: bool,
    size: u64,
    executable: bool,
    hasher: blake3::Hasher,
    /// Bytes written to the file; the buffer's come behind them.
    written: u64,
}

impl FileWriter {
    /// Creates the file and reserves its bytes, so that a full disk is known before they are fetched.
    pub(crate) fn create(path: &Path, size: u64, executable: bool) -> io::Result<Self> {
        let mut options = File::options();
        options.write(true).create(true).truncate(true).mode(0o600);
        let (file, direct) = open(&mut options, path, size)?;
        if size > 0 {
            match rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, size) {
                // Not every file system can reserve; then the write itself will tell.
                Ok(()) | Err(Errno::OPNOTSUPP | Errno::INVAL) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(Self { file, direct, size, executable, hasher: blake3::Hasher::new(), written: 0 })
    }

    /// Goes on with a file of which `done` bytes are known to be on the disk: these are hashed again.
    pub(crate) fn resume(
        path: &Path,
        size: u64,
        executable: bool,
        done: u64,
        buffer: &mut Buffer,
    ) -> io::Result<Self> {
        let mut hasher = blake3::Hasher::new();
        let read = File::open(path)?;
        let mut at = 0;
        buffer.filled = 0;
        // The part behind the last full buffer goes back into it: writes stay aligned.
        while at < done {
            let want = (done - at).min(BUFFER_BYTES as u64) as usize;
            let start = buffer.start;
            let chunk = &mut buffer.memory[start..start + want];
            read.read_exact_at(chunk, at)?;
            hasher.update(chunk);
            if want == BUFFER_BYTES {
                at += want as u64;
            } else {
                buffer.filled = want;
                break;
            }
        }
        let mut options = File::options();
        options.write(true);
        let (file, direct) = open(&mut options, path, size)?;
        Ok(Self { file, direct, size, executable, hasher, written: at })
    }

    /// Takes the next bytes of the content.
    pub(crate) fn write(&mut self, mut bytes: &[u8], buffer: &mut Buffer) -> io::Result<()> {
        self.hasher.update(bytes);
        while !bytes.is_empty() {
            let take = bytes.len().min(buffer.room());
            buffer.push(&bytes[..take]);
            bytes = &bytes[take..];
            if buffer.room() == 0 {
                self.file.write_all_at(buffer.filled(), self.written)?;
                self.written += buffer.filled as u64;
                buffer.filled = 0;
            }
        }
        Ok(())
    }

    /// Puts all bytes taken so far on the disk and returns their number.
    pub(crate) fn sync(&mut self, buffer: &mut Buffer) -> io::Result<u64> {
        self.flush(buffer)?;
        self.file.sync_data()?;
        // The last bytes stay in the buffer, too: what follows begins with a whole block again.
        self.written += buffer.drop_blocks() as u64;
        Ok(self.written + buffer.filled as u64)
    }

    fn flush(&mut self, buffer: &mut Buffer) -> io::Result<()> {
        if buffer.filled > 0 {
            let bytes = if self.direct { buffer.padded() } else { buffer.filled() };
            self.file.write_all_at(bytes, self.written)?;
        }
        Ok(())
    }

    /// Completes the file: its mode, its times, and its name among objects.
    ///
    /// The bytes are on the disk when `durable`, else with the caller's next sync of the file system.
    pub(crate) fn finish(mut self, buffer: &mut Buffer, durable: bool) -> io::Result<ObjectId> {
        self.flush(buffer)?;
        buffer.filled = 0;
        if self.direct && !self.size.is_multiple_of(ALIGNMENT as u64) {
            self.file.set_len(self.size)?;
        }
        rustix::fs::fchmod(self.file.as_fd(), object_mode(self.executable))?;
        rustix::fs::futimens(self.file.as_fd(), &EPOCH)?;
        if durable {
            self.file.sync_data()?;
        }
        Ok(ObjectId::new(self.hasher.finalize(), self.executable))
    }
}

/// Reads a stored file past the page cache: neither do its bytes push out those of a running model,
/// nor are pages dropped that one uses.
pub(crate) struct FileReader {
    file: File,
    size: u64,
    buffer: Buffer,
}

impl FileReader {
    /// # Errors
    ///
    /// Also where the file has not `size` bytes.
    pub(crate) fn open(path: &Path, size: u64) -> io::Result<Self> {
        let (file, _) = open(File::options().read(true), path, size)?;
        if file.metadata()?.len() != size {
            return Err(io::Error::other(format!("{} has another length", path.display())));
        }
        Ok(Self { file, size, buffer: Buffer::new() })
    }

    /// Hands the bytes of `range` to `take`, in order, until it answers false.
    pub(crate) fn read(
        &mut self,
        range: std::ops::Range<u64>,
        mut take: impl FnMut(&[u8]) -> bool,
    ) -> io::Result<()> {
        let end = range.end.min(self.size);
        let mut at = range.start;
        while at < end {
            // Whole blocks, whatever is wanted of them.
            let from = at - at % ALIGNMENT as u64;
            let length = (end - from).next_multiple_of(ALIGNMENT as u64).min(BUFFER_BYTES as u64);
            let start = self.buffer.start;
            let memory = &mut self.buffer.memory[start..start + length as usize];
            let count =
                rustix::io::retry_on_intr(|| rustix::io::pread(&self.file, &mut *memory, from))?;
            let wanted = (at - from) as usize..count.min((end - from) as usize);
            if wanted.is_empty() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            at += wanted.len() as u64;
            if !take(&memory[wanted]) {
                return Ok(());
            }
        }
        Ok(())
    }
}

fn open(options: &mut std::fs::OpenOptions, path: &Path, size: u64) -> io::Result<(File, bool)> {
    if size >= DIRECT_FROM_BYTES {
        options.custom_flags(OFlags::DIRECT.bits().cast_signed());
        match options.open(path) {
            Ok(file) => return Ok((file, true)),
            Err(e) if e.kind() == io::ErrorKind::InvalidInput => {}
            Err(e) => return Err(e),
        }
        options.custom_flags(0);
    }
    Ok((options.open(path)?, false))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    fn content(size: usize) -> Vec<u8> {
        (0..size).map(|n| (n / 7 + n % 251) as u8).collect()
    }

    #[test]
    fn a_file_of_any_size_comes_out_as_it_went_in() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let mut buffer = Buffer::new();
        for size in
            [1, 4095, 1 << 20, (1 << 20) + 1, BUFFER_BYTES, BUFFER_BYTES + 513, 2 * BUFFER_BYTES]
        {
            let content = content(size);
            let mut writer = FileWriter::create(&path, size as u64, size % 2 == 1).unwrap();
            for chunk in content.chunks(300_007) {
                writer.write(chunk, &mut buffer).unwrap();
            }
            let id = writer.finish(&mut buffer, true).unwrap();
            assert_eq!(id, ObjectId::new(blake3::hash(&content), size % 2 == 1));
            assert!(std::fs::read(&path).unwrap() == content, "content of {size} bytes");
            let meta = std::fs::metadata(&path).unwrap();
            assert_eq!(meta.mode() & 0o7777, if size % 2 == 1 { 0o555 } else { 0o444 });
            assert_eq!(meta.mtime(), 0);
            std::fs::remove_file(&path).unwrap();
        }
    }

    #[test]
    fn a_file_goes_on_from_what_was_synced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let content = content(BUFFER_BYTES * 2 + 77);
        let size = content.len() as u64;
        for stop in [1, 5000, BUFFER_BYTES, BUFFER_BYTES + 4097, content.len()] {
            let mut buffer = Buffer::new();
            let mut writer = FileWriter::create(&path, size, false).unwrap();
            writer.write(&content[..stop], &mut buffer).unwrap();
            assert_eq!(writer.sync(&mut buffer).unwrap(), stop as u64);
            drop(writer);

            let mut buffer = Buffer::new();
            let mut writer =
                FileWriter::resume(&path, size, false, stop as u64, &mut buffer).unwrap();
            writer.write(&content[stop..], &mut buffer).unwrap();
            let id = writer.finish(&mut buffer, true).unwrap();
            assert_eq!(id, ObjectId::new(blake3::hash(&content), false), "stopped at {stop}");
            assert!(std::fs::read(&path).unwrap() == content, "stopped at {stop}");
            std::fs::remove_file(&path).unwrap();
        }
    }

    #[test]
    fn going_on_after_a_sync_loses_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let content = content(BUFFER_BYTES + 100_000);
        let mut buffer = Buffer::new();
        let mut writer = FileWriter::create(&path, content.len() as u64, false).unwrap();
        for chunk in content.chunks(777_777) {
            writer.write(chunk, &mut buffer).unwrap();
            writer.sync(&mut buffer).unwrap();
            assert!(buffer.filled < ALIGNMENT, "no more than a block is written twice");
        }
        writer.finish(&mut buffer, true).unwrap();
        assert!(std::fs::read(&path).unwrap() == content);
    }
}
