//! What an uncompressed layer holds, before it is here: from a few reads of its blob.
//!
//! [`Lister::next_read`] says what to read next, [`Lister::take`] takes it; nothing that was read is lost,
//! since it lands where it belongs ([`super::landing`]). Of a tar that is header after header, of a raw
//! layer one read, which shows that its source serves ranges.
//!
//! Nothing here is trusted: the digest over the whole layer, headers included, proves or refutes it.

use std::ops::Range;
use std::path::Path;

use bytes::Bytes;

use super::LayerError;
use super::landing::Landing;
use super::ranges::Ranges;
use super::spool::Spool;
use super::tar::{Event, MemberKind, Parser};
use super::unpack::{Meaning, room_for_more};
use crate::digest::{Digest, ObjectId};
use crate::manifest::{Content, Layer};
use crate::store::StoreError;
use crate::tree::{Attributes, LayerEntry};

/// What is read behind a large file: the next header with its extensions, and some.
const PROBE_BYTES: u64 = 8 * 1024;

/// What is read at once where files are small.
const MAX_PROBE_BYTES: u64 = 4 * 1024 * 1024;

/// Content up to here is rather read than jumped over: it must come anyway, and a request costs more.
pub(crate) const JUMP_BYTES: u64 = 1024 * 1024;

/// A file of a layer that may not be here yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ListedFile {
    pub(crate) path: String,
    pub(crate) size: u64,
    pub(crate) executable: bool,
    /// Where in the uncompressed layer its content begins.
    pub(crate) offset: u64,
}

#[derive(Debug, Clone)]
pub(super) enum Listed {
    Entry(LayerEntry),
    File(ListedFile),
}

/// A layer's entries, before its files' objects are known.
#[derive(Debug, Clone)]
pub(crate) struct Listing {
    layer: Digest,
    listed: Vec<Listed>,
    attributes: Attributes,
}

impl Listing {
    pub(super) fn new(layer: Digest, listed: Vec<Listed>, attributes: Attributes) -> Self {
        Self { layer, listed, attributes }
    }

    /// What its headers say of owners and modes.
    pub(crate) fn attributes(&self) -> Attributes {
        self.attributes.clone()
    }

    /// Files with content, in the layer's order.
    pub(crate) fn files(&self) -> impl Iterator<Item = &ListedFile> {
        self.listed.iter().filter_map(|listed| match listed {
            Listed::File(file) => Some(file),
            Listed::Entry(_) => None,
        })
    }

    pub(super) fn names(&self) -> Vec<String> {
        self.files().map(|file| file.path.clone()).collect()
    }

    /// What stands in a tree for a file while its object is not known: a name that is no content's.
    pub(crate) fn stand_in(&self, file: &ListedFile) -> ObjectId {
        let name = format!("{} at {}", self.layer, file.offset);
        ObjectId::new(blake3::hash(name.as_bytes()), file.executable)
    }

    /// The entries, each file's object as `object` says.
    pub(crate) fn entries(
        &self,
        mut object: impl FnMut(&ListedFile) -> ObjectId,
    ) -> Vec<LayerEntry> {
        let entry = |listed: &Listed| match listed {
            Listed::Entry(entry) => entry.clone(),
            Listed::File(file) => LayerEntry::File {
                path: file.path.clone(),
                size: file.size,
                object: object(file),
                offset: Some(file.offset),
            },
        };
        self.listed.iter().map(entry).collect()
    }
}

/// Lists one layer.
pub(crate) struct Lister {
    layer: Layer,
    /// Absent for a raw layer.
    parser: Option<Parser>,
    spool: Spool,
    listed: Vec<Listed>,
    here: Ranges,
    /// Up to where it has been read without a jump.
    read: u64,
    probe: u64,
}

impl Lister {
    /// For an uncompressed layer; `here` is what an earlier pull left in `folder`. `link` is a stored
    /// object's link there, which a raw layer is. Blocks.
    pub(crate) fn new(
        folder: &Path,
        layer: Layer,
        here: Ranges,
        link: Option<String>,
    ) -> Result<Self, StoreError> {
        let what = || format!("write below {}", folder.display());
        let spool =
            Spool::open(folder, Some(layer.blob.size)).map_err(|e| StoreError::io(what(), e))?;
        let parser = (layer.content == Content::Tar).then(Parser::new);
        let (listed, probe) = (Vec::new(), 8 * PROBE_BYTES);
        let mut lister = Self { layer, parser, spool, listed, here, read: 0, probe };
        if lister.parser.is_none() {
            let size = layer.blob.size;
            let file = ListedFile { path: String::new(), size, executable: false, offset: 0 };
            lister.file(file, link).map_err(|e| StoreError::io(what(), e))?;
        }
        Ok(lister)
    }

    /// What of the blob to give next; nothing more once it is listed.
    pub(crate) fn next_read(&self) -> Option<Range<u64>> {
        let size = self.layer.blob.size;
        let (from, to) = match &self.parser {
            None if self.read > 0 => return None,
            None => (0, self.probe),
            Some(parser) if parser.is_done() || parser.offset() >= size => return None,
            Some(parser) if parser.offset() - self.read > JUMP_BYTES => {
                (parser.offset(), parser.offset() + PROBE_BYTES)
            }
            Some(parser) => {
                (self.read, (self.read + self.probe).max(parser.offset() + PROBE_BYTES))
            }
        };
        Some(from..to.min(size))
    }

    /// Takes the bytes of [`Lister::next_read`]. Blocks on the disk.
    ///
    /// # Errors
    ///
    /// Where they are not what a layer can begin with.
    pub(crate) fn take(&mut self, at: u64, bytes: &Bytes) -> Result<(), LayerError> {
        let end = at + bytes.len() as u64;
        self.probe = match at == self.read {
            true => (self.probe * 2).min(MAX_PROBE_BYTES),
            false => 8 * PROBE_BYTES,
        };
        self.read = end;
        while let Some(parser) = &mut self.parser
            && parser.offset() < end
            && !parser.is_done()
        {
            let place = usize::try_from(parser.offset().saturating_sub(at)).unwrap_or(usize::MAX);
            let (_, event) = parser.next(bytes.get(place..).unwrap_or_default())?;
            let Event::Member(member) = event else { continue };
            let offset = parser.offset();
            if let MemberKind::File { size, .. } = member.kind {
                parser.pass_content(size);
            }
            room_for_more(self.listed.len())?;
            match Meaning::of(member)? {
                Meaning::Nothing => {}
                Meaning::Entry(entry) => self.listed.push(Listed::Entry(entry)),
                Meaning::File { path, size, executable } => {
                    if offset.saturating_add(size) > self.layer.blob.size {
                        return Err(LayerError::Refused(format!("ends in the middle of {path:?}")));
                    }
                    let file = ListedFile { path, size, executable, offset };
                    self.file(file, None).map_err(|e| self.disk(e))?;
                }
            }
        }
        self.spool.write(at, bytes).map_err(|e| self.disk(e))?;
        self.here.insert(at..end);
        Ok(())
    }

    fn file(&mut self, file: ListedFile, link: Option<String>) -> std::io::Result<()> {
        let range = file.offset..file.offset + file.size;
        if let Some(link) = link {
            self.spool.add_link(range.clone(), file.executable, link)?;
            self.here.insert(range);
        } else if !self.spool.add(range.clone(), file.executable)? {
            self.here.remove(range);
        }
        self.listed.push(Listed::File(file));
        Ok(())
    }

    fn disk(&self, source: std::io::Error) -> LayerError {
        let what = format!("write what came of layer {}", self.layer.blob.digest);
        LayerError::Store(StoreError::io(what, source))
    }

    /// The list, and the layer as far as it is here.
    ///
    /// # Errors
    ///
    /// Where the layer ends too early.
    pub(crate) fn finish(self) -> Result<(Listing, Landing), LayerError> {
        if let Some(parser) = &self.parser {
            parser.finish()?;
        }
        let attributes = self.parser.as_ref().map(|parser| parser.attributes().clone());
        let attributes = attributes.unwrap_or_default();
        let listing = Listing::new(self.layer.blob.digest, self.listed, attributes);
        let landing = Landing::new(self.spool, self.here, &listing.names(), None);
        Ok((listing, landing))
    }
}
