//! Frames: chunks of files in a compressed layer that can be unpacked for themselves, since each has zstd
//! frames or gzip members of its own.
//!
//! ```text
//! blob   │ other  │ frame │ frame │ frame │ other            as a table of contents says
//! tar    │ header │ content of a file     │ padding, header
//! ```
//!
//! [`Frames`] says which range of the tar which range of the blob unpacks to. Nothing else of the blob
//! is missing once its layer is listed ([`super::packed`]). A frame is fetched as a whole, unpacked in
//! memory, held against its chunk's digest, and only then written: [`Unpack`].

use std::io::Read as _;
use std::ops::Range;

use bytes::{Buf as _, Bytes, BytesMut};

use super::tar::Member;
use crate::digest::Digest;
use crate::manifest::Compression;

/// A chunk is held in memory, packed and unpacked. Tools make them of 64 KiB to 4 MiB.
pub(crate) const MAX_FRAME_BYTES: u64 = 8 * 1024 * 1024;

/// A chunk of a file that can be unpacked for itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Frame {
    /// In the blob.
    pub(crate) packed: Range<u64>,
    /// What it unpacks to: in its file, or, once the layer is listed, in the tar.
    pub(crate) content: Range<u64>,
    /// SHA-256 of that content.
    pub(crate) digest: Option<Digest>,
}

/// What a table of contents says of a layer.
#[derive(Debug)]
pub(crate) struct Contents {
    /// The table's own digest.
    pub(crate) table: Digest,
    /// All but folders, in the tar's order.
    pub(crate) members: Vec<Promised>,
    /// Behind here nothing of the blob belongs to the tar.
    pub(crate) end: u64,
}

/// A member of the tar, as a table of contents says.
#[derive(Debug)]
pub(crate) struct Promised {
    pub(crate) member: Member,
    /// SHA-256 of its content, where it is a file.
    pub(crate) digest: Option<Digest>,
    /// A stored object's link in the layer's ingest folder, which has this content.
    pub(crate) link: Option<String>,
    /// Chunks of its content that are fetched for themselves, one after the other.
    pub(crate) frames: Vec<Frame>,
    /// Other parts, in order, with their SHA-256.
    pub(crate) parts: Vec<(Range<u64>, Digest)>,
}

impl Promised {
    /// Where in the blob the chunks lie.
    pub(crate) fn packed(&self) -> Option<Range<u64>> {
        let (first, last) = (self.frames.first()?, self.frames.last()?);
        Some(first.packed.start..last.packed.end)
    }
}

/// All frames of a layer by their place in the tar, which do not overlap. None, where the layer is not
/// compressed.
#[derive(Debug, Default)]
pub(crate) struct Frames(Vec<Frame>);

impl Frames {
    pub(super) fn push(&mut self, frame: Frame) {
        self.0.push(frame);
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Frame> {
        self.0.iter()
    }

    fn first(&self, at: u64) -> usize {
        self.0.partition_point(|frame| frame.content.end <= at)
    }

    /// `range`, widened to whole frames that lie one behind the other in the blob, too, and narrowed
    /// to `most` bytes where that leaves at least one.
    pub(super) fn whole(&self, range: &Range<u64>, most: u64) -> Range<u64> {
        let first = self.first(range.start);
        let Some(frame) = self.0.get(first) else { return range.clone() };
        let (start, mut packed, mut end) =
            (frame.content.start, frame.packed.end, frame.content.end);
        for next in &self.0[first + 1..] {
            let goes_on = next.content.start == end && next.packed.start == packed;
            if !goes_on || end >= range.end || next.content.end - start > most {
                break;
            }
            (packed, end) = (next.packed.end, next.content.end);
        }
        start..end
    }

    /// What of the blob unpacks to `range`, which is whole frames.
    fn packed(&self, range: &Range<u64>) -> Range<u64> {
        let within = self.within(range);
        let (first, last) = (self.0[within.clone()].first(), self.0[within].last());
        first.map_or(0, |first| first.packed.start)..last.map_or(0, |last| last.packed.end)
    }

    fn within(&self, range: &Range<u64>) -> Range<usize> {
        let end = self.0.partition_point(|frame| frame.content.start < range.end);
        self.first(range.start).min(end)..end
    }
}

/// Unpacks frames that come one after the other.
pub(crate) struct Unpack {
    compression: Compression,
    /// Those that are still to come.
    left: Range<usize>,
    /// What has come of the first of them.
    have: BytesMut,
}

/// A frame that is not what the table of contents says.
#[derive(Debug)]
pub(crate) struct WrongFrame(pub(crate) String);

impl Unpack {
    /// For `range` of the tar, which is whole frames; also the range of the blob to fetch for it.
    pub(super) fn new(
        frames: &Frames,
        compression: Compression,
        range: &Range<u64>,
    ) -> (Self, Range<u64>) {
        let left = frames.within(range);
        let unpack = Self { compression, left, have: BytesMut::new() };
        (unpack, frames.packed(range))
    }

    /// Takes the next bytes of the blob; hands on, in order, the place and content of each that
    /// is whole then and right.
    ///
    /// # Errors
    ///
    /// At the first that is wrong.
    pub(super) fn take(
        &mut self,
        frames: &Frames,
        bytes: &[Bytes],
        mut whole: impl FnMut(u64, Bytes),
    ) -> Result<(), WrongFrame> {
        for bytes in bytes {
            let mut bytes = bytes.clone();
            while !bytes.is_empty()
                && let Some(frame) = frames.0.get(self.left.start).filter(|_| !self.left.is_empty())
            {
                let length = (frame.packed.end - frame.packed.start) as usize;
                let missing = (length - self.have.len()).min(bytes.len());
                self.have.extend_from_slice(&bytes[..missing]);
                bytes.advance(missing);
                if self.have.len() == length {
                    let content = frame.unpack(self.compression, &self.have)?;
                    self.have.clear();
                    self.left.start += 1;
                    whole(frame.content.start, content);
                }
            }
        }
        Ok(())
    }
}

impl Frame {
    /// Its content, once that is known to be right.
    pub(crate) fn unpack(
        &self,
        compression: Compression,
        packed: &[u8],
    ) -> Result<Bytes, WrongFrame> {
        let wrong = |why: String| {
            let Range { start, end } = self.packed;
            WrongFrame(format!(
                "bytes {start} to {end} are not the chunk that they should be: {why}"
            ))
        };
        let length = (self.content.end - self.content.start) as usize;
        let mut content = Vec::with_capacity(length);
        let unpacked = match compression {
            Compression::Zstd => zstd::bulk::Decompressor::new()
                .and_then(|mut decoder| decoder.decompress_to_buffer(packed, &mut content))
                .map(drop),
            // A byte more, so that the member's end is read and checked.
            _ => flate2::read::MultiGzDecoder::new(packed)
                .take(length as u64 + 1)
                .read_to_end(&mut content)
                .map(drop),
        };
        unpacked.map_err(|e| wrong(e.to_string()))?;
        if content.len() != length {
            return Err(wrong(format!("{} bytes come out, not {length}", content.len())));
        }
        if let Some(digest) = self.digest {
            let found = Digest::of(&content);
            if found != digest {
                return Err(wrong(format!("they hash to {found}, not {digest}")));
            }
        }
        Ok(content.into())
    }
}
