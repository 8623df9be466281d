//! A part of a local file: what a blob is, in a layout folder and in an archive.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::StreamExt;

use super::{BlobBody, MAX_MANIFEST_BYTES, SourceError};

/// Bytes read at a time: large enough that the hop to a blocking thread does not show.
const CHUNK_BYTES: u64 = 1024 * 1024;

/// `length` bytes of a file, from `start` on. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Part {
    pub(super) file: Arc<File>,
    pub(super) start: u64,
    pub(super) length: u64,
}

impl Part {
    /// Opens `range` of the part as a blob called `name`, as [`super::Source::blob`] says. The body
    /// holds the file and one chunk.
    pub(super) fn body(self, name: String, range: Range<u64>) -> BlobBody {
        let offset = range.start;
        let chunks = futures_util::stream::try_unfold(range, move |left| {
            let (part, name) = (self.clone(), name.clone());
            async move {
                if left.is_empty() {
                    return Ok(None);
                }
                let read = move || part.read(&left).map(|chunk| (chunk, left));
                let result = tokio::task::spawn_blocking(read).await;
                let (chunk, left) = result
                    .map_err(|_| SourceError::Unavailable(format!("{name}: interrupted")))?
                    .map_err(|error| SourceError::Unavailable(format!("{name}: {error}")))?;
                let next = left.start + chunk.len() as u64..left.end;
                // At the end of a file that shrank meanwhile, the body ends early.
                Ok(if chunk.is_empty() { None } else { Some((chunk, next)) })
            }
        });
        BlobBody { offset, ranged: true, is_here: false, stream: chunks.boxed() }
    }

    /// A chunk of `range`, from its start; empty only where the file ends. Blocks.
    pub(super) fn read(&self, range: &Range<u64>) -> io::Result<Bytes> {
        let end = range.end.min(self.length);
        let length = end.saturating_sub(range.start).min(CHUNK_BYTES);
        let mut chunk = Vec::with_capacity(usize::try_from(length).unwrap_or_default());
        let (mut offset, end) = (self.start + range.start, self.start + range.start + length);
        while offset < end {
            // The kernel writes into fresh memory, so that nothing has to be zeroed before.
            let room = rustix::buffer::spare_capacity(&mut chunk);
            match rustix::io::pread(&self.file, room, offset) {
                Ok(0) => break,
                Ok(count) => offset += count as u64,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        // The allocator may give more room than was asked for.
        chunk.truncate(usize::try_from(length).unwrap_or_default());
        Ok(chunk.into())
    }

    /// All of it, `most` bytes at most; `name` is for errors. Blocks.
    pub(super) fn read_all(&self, name: &str, most: u64) -> Result<Bytes, SourceError> {
        if self.length > most {
            return Err(SourceError::Invalid(format!(
                "{name}: {} bytes are more than the {most} allowed",
                self.length
            )));
        }
        let mut text = Vec::new();
        while (text.len() as u64) < self.length {
            let chunk = self
                .read(&(text.len() as u64..self.length))
                .map_err(|error| SourceError::Unavailable(format!("{name}: {error}")))?;
            if chunk.is_empty() {
                break;
            }
            text.extend_from_slice(&chunk);
        }
        Ok(text.into())
    }

    /// As [`Part::read_all`], of a manifest or an index.
    pub(super) fn read_document(&self, name: &str) -> Result<Bytes, SourceError> {
        self.read_all(name, MAX_MANIFEST_BYTES)
    }
}

/// Refuses a range that is empty or not in a blob of `size` bytes.
pub(super) fn check_range(name: &str, range: &Range<u64>, size: u64) -> Result<(), SourceError> {
    if range.is_empty() || range.end > size {
        return Err(SourceError::Invalid(format!(
            "{name}: no range {}..{} in {size} bytes",
            range.start, range.end
        )));
    }
    Ok(())
}
