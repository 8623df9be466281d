//! What a compressed layer with a table of contents holds, before it is here.
//!
//! ```text
//! blob   │ between │ frames of a file │ between │ frames of a file │ between │ table │
//!          read      jumped over        read
//! ```
//!
//! What lies between the frames is read and unpacked: the tar's headers and small files. So the list
//! is the tar's own, as that of an uncompressed layer ([`super::listing`]), and so are all places:
//! from then on the layer is bytes of a tar, of which some come as frames.
//!
//! The table must say the same, member by member but for folders, and what it says of the content of
//! small files must be so. Who knows its digest from the manifest knows then that all of it holds.
//! Else nothing is known before the diff_id is.

use std::collections::VecDeque;
use std::ops::Range;
use std::path::Path;

use sha2::{Digest as _, Sha256};

use super::LayerError;
use super::frames::{Contents, Frame, Frames, Promised};
use super::inflate::Inflater;
use super::landing::Landing;
use super::listing::{Listed, ListedFile, Listing};
use super::ranges::Ranges;
use super::spool::Spool;
use super::tar::{Event, Member, MemberKind, Parser};
use super::unpack::{Meaning, is_estargz, room_for_more};
use crate::digest::Digest;
use crate::manifest::Layer;
use crate::store::StoreError;

/// A layer that unpacks to more than so many times its size, and then some, is not looked into: what
/// is said of its files takes room on the disk before it is known to be true.
const MOST_UNPACKED: u64 = 64;
const UNPACKED_ANYWAY: u64 = 1024 * 1024;

/// Lists one layer.
pub(crate) struct PackedLister {
    layer: Layer,
    table: Digest,
    inflater: Inflater,
    body: Body,
    /// What is still to be read of the blob.
    between: VecDeque<Range<u64>>,
}

/// What comes out of the decoder.
struct Body {
    parser: Parser,
    spool: Spool,
    listed: Vec<Listed>,
    promised: std::vec::IntoIter<Promised>,
    frames: Frames,
    here: Ranges,
    /// Bytes of the tar so far.
    at: u64,
    most: u64,
    open: Option<OpenFile>,
}

/// The file whose content comes next.
struct OpenFile {
    path: String,
    /// Bytes of its content so far.
    at: u64,
    frames: Vec<Frame>,
    parts: VecDeque<(Range<u64>, Digest)>,
    hash: Sha256,
}

fn wrong(why: &str) -> LayerError {
    LayerError::Refused(format!("its table of contents is wrong: {why}"))
}

impl PackedLister {
    /// `here` is what an earlier pull left in `folder`. Blocks.
    pub(crate) fn new(
        folder: &Path,
        layer: Layer,
        contents: Contents,
        here: Ranges,
    ) -> Result<Self, LayerError> {
        let spool = Spool::open(folder, None);
        let spool =
            spool.map_err(|e| StoreError::io(format!("write below {}", folder.display()), e))?;
        let (mut between, mut at) = (VecDeque::new(), 0);
        for frames in contents.members.iter().filter_map(Promised::packed) {
            between.push_back(at..frames.start);
            at = frames.end;
        }
        between.push_back(at..contents.end);
        let body = Body {
            parser: Parser::new(),
            spool,
            listed: Vec::new(),
            promised: contents.members.into_iter(),
            frames: Frames::default(),
            here,
            at: 0,
            most: layer.blob.size.saturating_mul(MOST_UNPACKED).saturating_add(UNPACKED_ANYWAY),
            open: None,
        };
        let inflater = Inflater::new(layer.compression).map_err(LayerError::Refused)?;
        Ok(Self { layer, table: contents.table, inflater, body, between })
    }

    /// What of the blob to give, in order.
    pub(crate) fn reads(&self) -> impl Iterator<Item = Range<u64>> {
        self.between.iter().cloned()
    }

    /// Takes the next bytes of [`PackedLister::reads`], which are of one of these ranges. Blocks on the
    /// disk.
    ///
    /// # Errors
    ///
    /// Where they are not what the table of contents says.
    pub(crate) fn take(&mut self, bytes: &[u8]) -> Result<(), LayerError> {
        let Some(range) = self.between.front_mut() else { return Ok(()) };
        range.start += bytes.len() as u64;
        let is_read = range.is_empty();
        self.inflater.feed(bytes, |out| self.body.take(out))?;
        if is_read {
            self.between.pop_front();
            self.inflater.finish().map_err(LayerError::Refused)?;
            if !self.between.is_empty() {
                self.body.jump()?;
            }
        }
        Ok(())
    }

    /// The list, and the layer as far as it is here.
    ///
    /// # Errors
    ///
    /// Where the table of contents says of more than there is.
    pub(crate) fn finish(self) -> Result<(Listing, Landing), LayerError> {
        let Body { parser, mut spool, listed, mut promised, frames, here, at, .. } = self.body;
        let attributes = parser.attributes().clone();
        parser.finish()?;
        if promised.next().is_some() {
            return Err(wrong("it has more files than the layer"));
        }
        spool.ends_at(at);
        let listing = Listing::new(self.layer.blob.digest, listed, attributes);
        let landing = Landing::new(spool, here, &listing.names(), Some((frames, self.table)));
        Ok((listing, landing))
    }
}

impl Body {
    fn take(&mut self, bytes: &[u8]) -> Result<(), LayerError> {
        let mut left = bytes;
        loop {
            let (used, event) = self.parser.next(left)?;
            left = &left[used..];
            match event {
                Event::More => break,
                Event::Member(member) => self.member(member)?,
                Event::Data(content) => {
                    if let Some(open) = &mut self.open {
                        open.take(content)?;
                    }
                }
                Event::End => self.open = None,
            }
        }
        self.goes_on(bytes.len() as u64)?;
        let at = self.at - bytes.len() as u64;
        self.spool.write(at, bytes).map_err(disk)?;
        self.here.insert(at..self.at);
        Ok(())
    }

    fn goes_on(&mut self, bytes: u64) -> Result<(), LayerError> {
        self.at = self.at.saturating_add(bytes);
        match self.at > self.most {
            true => Err(LayerError::Refused("unpacks to far more than it is".to_owned())),
            false => Ok(()),
        }
    }

    fn member(&mut self, member: Member) -> Result<(), LayerError> {
        room_for_more(self.listed.len())?;
        self.open = None;
        let mut link = None;
        if member.kind != MemberKind::Directory && !is_estargz(&member.path) {
            let promised = self.promised.next().ok_or_else(|| wrong("it lacks files"))?;
            if promised.member != member {
                return Err(wrong(&format!("it has {:?} for {member:?}", promised.member)));
            }
            link = promised.link;
            self.open = Some(OpenFile {
                path: member.path.clone(),
                at: 0,
                frames: promised.frames,
                parts: promised.parts.into(),
                hash: Sha256::new(),
            });
        }
        let offset = self.parser.offset();
        match Meaning::of(member)? {
            Meaning::Nothing => {}
            Meaning::Entry(entry) => self.listed.push(Listed::Entry(entry)),
            Meaning::File { path, size, executable } => {
                let end = offset.saturating_add(size);
                if end > self.most {
                    return Err(wrong(&format!("{path:?} is far larger than the layer")));
                }
                if let Some(link) = link {
                    self.spool.add_link(offset..end, executable, link).map_err(disk)?;
                    self.here.insert(offset..end);
                } else if !self.spool.add(offset..end, executable).map_err(disk)? {
                    self.here.remove(offset..end);
                }
                self.listed.push(Listed::File(ListedFile { path, size, executable, offset }));
            }
        }
        Ok(())
    }

    /// Goes behind the frames of the open file.
    fn jump(&mut self) -> Result<(), LayerError> {
        let frames = self.open.as_mut().map(|open| (std::mem::take(&mut open.frames), open.at));
        let Some((frames, begun)) = frames.filter(|(frames, _)| !frames.is_empty()) else {
            return Err(wrong("chunks are not where their file is"));
        };
        if frames[0].content.start != begun {
            return Err(wrong("chunks are not where their file is"));
        }
        for frame in frames {
            let start = self.at;
            let length = frame.content.end - frame.content.start;
            if !self.parser.pass(length) {
                return Err(wrong("chunks are longer than their file"));
            }
            self.goes_on(length)?;
            if let Some(open) = &mut self.open {
                open.at += length;
            }
            self.frames.push(Frame { content: start..self.at, ..frame });
        }
        Ok(())
    }
}

impl OpenFile {
    fn take(&mut self, mut content: &[u8]) -> Result<(), LayerError> {
        while !content.is_empty() {
            let Some((range, digest)) = self.parts.front() else { break };
            let is_in = self.at >= range.start;
            let end = if is_in { range.end } else { range.start };
            let length =
                usize::try_from(end - self.at).map_or(content.len(), |n| n.min(content.len()));
            let (now, later) = content.split_at(length);
            self.at += now.len() as u64;
            content = later;
            if is_in {
                self.hash.update(now);
            }
            if is_in && self.at == range.end {
                let found = Digest::from_sha256(self.hash.finalize_reset().into());
                if found != *digest {
                    return Err(wrong(&format!("{:?} hashes to {found}, not {digest}", self.path)));
                }
                self.parts.pop_front();
            }
        }
        self.at += content.len() as u64;
        Ok(())
    }
}

fn disk(source: std::io::Error) -> LayerError {
    LayerError::Store(StoreError::io("write what came of a layer".to_owned(), source))
}
