//! Tables of contents: what zstd:chunked and eStargz say of the files in a layer.
//!
//! ```text
//! zstd:chunked  │ frames: headers, content of files ... │ TOC │ tar-split │ footer │  skippable frames
//! eStargz       │ members: headers, content of files ... │ TOC, end of the tar │ footer │
//! ```
//!
//! Both are JSON of the same form: entries in the tar's order, and behind an entry of a file one for
//! each further chunk of it. Where a file's content ends they differ. zstd:chunked says so, and
//! what follows has a frame of its own. eStargz does not: padding and the next headers stand in the
//! member of the last chunk, which therefore is read again, from its beginning.
//!
//! - <https://github.com/containers/storage/blob/main/docs/containers-storage-zstd-chunked.md>
//! - <https://github.com/containerd/stargz-snapshotter/blob/main/docs/estargz.md>
//!
//! They are read twice over: here for files that may be skipped, in [`contents`] for all that a stream
//! must know.
//!
//! Everything is bounded, and nothing trusted: what is wrong here ends in a plain fetch.

use std::fmt;
use std::io::{self, BufReader, Read};
use std::ops::Range;

use serde::Deserialize;
use serde::de::{Deserializer, Error as _, SeqAccess, Visitor};
use sha2::{Digest as _, Sha256};

use super::skip::HASHED_BYTES;
use crate::digest::Digest;
use crate::manifest::Compression;
use crate::store::MIN_FILE_BYTES;

mod contents;

pub(super) use contents::contents;

/// What is read of a blob's end: a footer, and the table where that is short.
pub(super) const TAIL_BYTES: u64 = 4096;

/// A table as it travels is held in memory. 16 MiB list the chunks of some 20 GB of zstd:chunked,
/// and of much more eStargz.
const MAX_TOC_BYTES: u64 = 16 * 1024 * 1024;

/// A table unpacked is read as a stream; this bounds the time.
const MAX_UNPACKED_BYTES: u64 = 512 * 1024 * 1024;

/// Files that are remembered of one table; smaller ones than [`MIN_FILE_BYTES`] are not.
const MAX_FILES: usize = 20_000;

/// The footers of zstd:chunked by their last bytes, and their lengths without the header of the
/// skippable frame. The second was written before there was a tar-split.
const ZSTD_FOOTERS: [(&[u8], usize); 2] = [(b"GNUlInUx", 64), (b"GnUlInUx", 40)];
const FRAME_HEADER_BYTES: u64 = 8;

/// The footer of eStargz: an empty gzip member with the table's place in its extra field.
const ESTARGZ_FOOTER_BYTES: usize = 51;
const ESTARGZ_NAME: &str = "stargz.index.json";

/// Where a blob's table is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Footer {
    compression: Compression,
    /// The table as it travels.
    pub(super) toc: Range<u64>,
    /// Behind here nothing belongs to the tar.
    pub(super) end: u64,
}

/// A file that may be skipped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct TocFile {
    pub(super) size: u64,
    pub(super) executable: bool,
    /// SHA-256 of its content.
    pub(super) digest: Digest,
    /// SHA-256 of its first and last chunk and where they are in it, where it has several.
    pub(super) chunks: Vec<(Range<u64>, Digest)>,
    /// What of the blob need not be read.
    pub(super) range: Range<u64>,
    /// So many bytes at the end of its content come again behind that.
    pub(super) again: u64,
}

/// Looks for a footer at the end of a blob of `size` bytes.
pub(super) fn footer(tail: &[u8], size: u64, compression: Compression) -> Option<Footer> {
    let (toc, end) = match compression {
        Compression::None => return None,
        Compression::Zstd => {
            let (_, magic) = tail.split_at_checked(tail.len().checked_sub(8)?)?;
            let (_, length) = ZSTD_FOOTERS.iter().find(|(known, _)| magic == *known)?;
            let footer = tail.get(tail.len().checked_sub(*length)?..)?;
            let number =
                |at: usize| footer.get(at..at + 8)?.try_into().ok().map(u64::from_le_bytes);
            let (start, length, kind) = (number(0)?, number(8)?, number(24)?);
            if kind != 1 {
                return None;
            }
            (start..start.checked_add(length)?, start.checked_sub(FRAME_HEADER_BYTES)?)
        }
        Compression::Gzip => {
            let footer = tail.get(tail.len().checked_sub(ESTARGZ_FOOTER_BYTES)?..)?;
            // A gzip header with an extra field of 26 bytes, in it a subfield SG of 22.
            let is_ours = footer.get(..4)? == [0x1f, 0x8b, 8, 4]
                && footer.get(10..16)? == [26, 0, b'S', b'G', 22, 0]
                && footer.get(32..38)? == b"STARGZ";
            let start = std::str::from_utf8(footer.get(16..32)?).ok()?;
            let start = u64::from_str_radix(start, 16).ok().filter(|_| is_ours)?;
            (start..size.checked_sub(ESTARGZ_FOOTER_BYTES as u64)?, size)
        }
    };
    let length = toc.end.checked_sub(toc.start)?;
    let fits = (1..=MAX_TOC_BYTES).contains(&length) && toc.end <= size;
    fits.then_some(Footer { compression, toc, end })
}

/// Reads the table that `footer` speaks of: the files in it that are worth a look, in order.
pub(super) fn parse(footer: &Footer, packed: &[u8]) -> Result<Vec<TocFile>, String> {
    Ok(read::<Files>(footer, packed)?.0.files)
}

/// For fuzzing: `json` as the table of a blob of zstd:chunked, then as the end of blobs, with a footer if
/// it has one.
///
/// # Panics
///
/// When something is accepted that does not lie in the blob.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn read_table(json: &[u8]) {
    const BEFORE: u64 = 1 << 20;
    let Ok(packed) = zstd::bulk::compress(json, 1) else { return };
    let toc = BEFORE..BEFORE + packed.len() as u64;
    let footer = Footer { compression: Compression::Zstd, toc, end: BEFORE - FRAME_HEADER_BYTES };
    let _ = parse(&footer, &packed);
    if let Ok(contents) = contents(&footer, &packed, None) {
        assert_eq!(contents.table, Digest::of(&packed));
        let mut at = 0;
        for run in contents.members.iter().filter_map(crate::layer::Promised::packed) {
            assert!(at < run.start && run.start < run.end && run.end < footer.end, "{run:?}");
            at = run.end;
        }
    }
    let size = json.len() as u64;
    for compression in [Compression::Zstd, Compression::Gzip] {
        if let Some(footer) = self::footer(json, size, compression) {
            assert!(footer.toc.end <= size && footer.end <= size, "{footer:?}");
            let packed = &json[footer.toc.start as usize..footer.toc.end as usize];
            let _ = (parse(&footer, packed), self::contents(&footer, packed, None));
        }
    }
}

/// Folds a table's entries; also what annotations call its digest: of zstd:chunked over what
/// travels, of eStargz over the JSON.
fn read<F: Fold>(footer: &Footer, packed: &[u8]) -> Result<(F, Digest), String> {
    match footer.compression {
        Compression::Zstd => {
            let unpacked = zstd::stream::read::Decoder::new(packed).map_err(|e| e.to_string())?;
            Ok((read_json(unpacked)?.0, Digest::of(packed)))
        }
        _ => {
            let unpacked = flate2::read::MultiGzDecoder::new(packed).take(MAX_UNPACKED_BYTES);
            let mut archive = tar::Archive::new(unpacked);
            let first = archive.entries().map_err(|e| e.to_string())?.next();
            let entry = first.ok_or("an empty table of contents")?.map_err(|e| e.to_string())?;
            if entry.path().map_err(|e| e.to_string())?.to_str() != Some(ESTARGZ_NAME) {
                return Err("no table of contents where the footer says".to_owned());
            }
            read_json(entry)
        }
    }
}

/// All of it is read, since no document may have anything behind it.
fn read_json<F: Fold>(text: impl Read) -> Result<(F, Digest), String> {
    let mut hashed = Hashed { text: text.take(MAX_UNPACKED_BYTES), hash: Sha256::new() };
    let document: Document<F> =
        serde_json::from_reader(BufReader::new(&mut hashed)).map_err(|e| e.to_string())?;
    Ok((document.entries.0, Digest::from_sha256(hashed.hash.finalize().into())))
}

struct Hashed<R> {
    text: R,
    hash: Sha256,
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.text.read(buffer)?;
        self.hash.update(&buffer[..count]);
        Ok(count)
    }
}

/// What entries are folded to while they are read: there may be millions of chunks.
trait Fold: Default {
    fn take(&mut self, entry: Entry) -> Result<(), String>;

    /// There are no more.
    fn end(&mut self) -> Result<(), String>;
}

#[derive(Deserialize)]
#[serde(bound = "F: Fold")]
struct Document<F> {
    entries: Folded<F>,
}

struct Folded<F>(F);

/// An entry, as far as it matters.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Entry {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    name: String,
    #[serde(default)]
    link_name: String,
    #[serde(default)]
    size: u64,
    #[serde(default)]
    mode: i64,
    digest: Option<String>,
    #[serde(default)]
    offset: u64,
    /// Of zstd:chunked only.
    #[serde(default)]
    end_offset: u64,
    /// Where in a gzip member or zstd frame the chunk begins.
    #[serde(default)]
    inner_offset: u64,
    #[serde(default)]
    chunk_offset: u64,
    #[serde(default)]
    chunk_size: u64,
    chunk_digest: Option<String>,
}

/// Files that may be skipped.
#[derive(Default)]
struct Files {
    files: Vec<TocFile>,
    open: Option<OpenFile>,
}

/// A file whose chunks are being read.
struct OpenFile {
    size: u64,
    executable: bool,
    digest: Digest,
    start: u64,
    /// 0 where nothing says it.
    end: u64,
    /// The last chunk that begins with its member: its place in the blob and in the file.
    restart: (u64, u64),
    first: Option<(Range<u64>, Digest)>,
    last: Option<(Range<u64>, Digest)>,
}

impl Fold for Files {
    fn take(&mut self, entry: Entry) -> Result<(), String> {
        if entry.kind == "chunk" {
            if let Some(open) = &mut self.open {
                open.chunk(&entry);
            }
            return Ok(());
        }
        self.close();
        let digest = entry.digest.as_deref().and_then(|digest| digest.parse().ok());
        if let Some(digest) = digest
            && entry.kind == "reg"
            && entry.size >= MIN_FILE_BYTES
            && entry.inner_offset == 0
            && self.files.len() < MAX_FILES
        {
            let mut open = OpenFile {
                size: entry.size,
                executable: entry.mode & 0o111 != 0,
                digest,
                start: entry.offset,
                end: entry.end_offset,
                restart: (entry.offset, 0),
                first: None,
                last: None,
            };
            open.first = open.digest_of(&entry);
            self.open = Some(open);
        }
        Ok(())
    }

    fn end(&mut self) -> Result<(), String> {
        self.close();
        Ok(())
    }
}

impl Files {
    fn close(&mut self) {
        if let Some(file) = self.open.take().and_then(OpenFile::close) {
            self.files.push(file);
        }
    }
}

impl OpenFile {
    fn chunk(&mut self, entry: &Entry) {
        self.end = self.end.max(entry.end_offset);
        if entry.inner_offset == 0 && entry.offset > self.restart.0 {
            self.restart = (entry.offset, entry.chunk_offset);
        }
        self.last = self.digest_of(entry);
    }

    fn digest_of(&self, entry: &Entry) -> Option<(Range<u64>, Digest)> {
        let digest = entry.chunk_digest.as_deref()?.parse().ok()?;
        let end = match entry.chunk_size {
            0 => self.size,
            size => entry.chunk_offset.checked_add(size)?,
        };
        let fits = entry.chunk_offset < end && end <= self.size;
        (fits && end - entry.chunk_offset <= HASHED_BYTES)
            .then_some((entry.chunk_offset..end, digest))
    }

    fn close(self) -> Option<TocFile> {
        let (end, again) = if self.end > self.start {
            (self.end, 0)
        } else {
            (self.restart.0, self.size.checked_sub(self.restart.1)?)
        };
        // One chunk is the whole file, whose digest is there already.
        let chunks = match (self.first, self.last) {
            (Some(first), Some(last)) => vec![first, last],
            _ => Vec::new(),
        };
        let Self { size, executable, digest, start, .. } = self;
        Some(TocFile { size, executable, digest, chunks, range: start..end, again })
    }
}

impl<'de, F: Fold> Deserialize<'de> for Folded<F> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Folding<F>(F);
        impl<'de, F: Fold> Visitor<'de> for Folding<F> {
            type Value = F;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("entries of a table of contents")
            }

            fn visit_seq<A: SeqAccess<'de>>(mut self, mut entries: A) -> Result<F, A::Error> {
                while let Some(entry) = entries.next_element::<Entry>()? {
                    self.0.take(entry).map_err(A::Error::custom)?;
                }
                self.0.end().map_err(A::Error::custom)?;
                Ok(self.0)
            }
        }
        deserializer.deserialize_seq(Folding(F::default())).map(Self)
    }
}
