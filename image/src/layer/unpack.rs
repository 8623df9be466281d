//! From the bytes of a tar, or of one file, to staged files and the entries of a layer.

use std::io;

use serde::{Deserialize, Serialize};

use super::LayerError;
use super::file::{Buffer, FileWriter};
use super::plan::Local;
use super::tar::{Event, Member, MemberKind, Parser};
use crate::digest::ObjectId;
use crate::manifest::{Compression, Content, Layer};
use crate::store::{Ingest, Staged, StoreError};
use crate::tree::{Attributes, LayerEntry};

const WHITEOUT: &str = ".wh.";
const OPAQUE: &str = ".wh..wh..opq";

/// What eStargz adds to a tar for programs that read it lazily: the table of contents, and where
/// prefetching ends. No files of the image.
/// <https://github.com/containerd/stargz-snapshotter/blob/main/docs/estargz.md>
const ESTARGZ: [&str; 3] = ["stargz.index.json", ".prefetch.landmark", ".no.prefetch.landmark"];

/// Whether a member of this path is of eStargz's own.
pub(crate) fn is_estargz(path: &str) -> bool {
    ESTARGZ.contains(&path)
}

/// A layer of more entries would make records that nobody can hold in memory.
const MAX_ENTRIES: usize = 1_000_000;

/// Beyond what was asked for, so much may be written before the room is looked at again.
const GRANT_BYTES: u64 = 32 * 1024 * 1024;

/// Up to here each file is synced by itself; a layer of more small files is synced by one flush of
/// the file system, since each sync costs a commit of the journal.
pub(super) const SYNC_EACH: usize = 128;

/// Takes a layer's uncompressed bytes, writes its files into an ingest folder.
pub(crate) struct Unpacker {
    progress: Progress,
    writer: Option<FileWriter>,
    buffer: Buffer,
    /// Bytes of content for which there is known to be room.
    granted: u64,
}

/// All that must be known to go on after a crash, but for the bytes on the disk.
#[derive(Serialize, Deserialize)]
pub(super) struct Progress {
    reader: Reader,
    entries: Vec<LayerEntry>,
    staged: Vec<Staged>,
    /// The file that is being written.
    open: Option<OpenFile>,
    written_bytes: u64,
}

/// How the bytes are read, and how far.
#[derive(Serialize, Deserialize)]
enum Reader {
    Tar(Parser),
    /// All bytes are one file; its size is known before where it is not compressed.
    File {
        size: Option<u64>,
        taken: u64,
    },
}

#[derive(Serialize, Deserialize)]
struct OpenFile {
    member: Member,
    /// Bytes known to be on the disk; right only in a checkpoint.
    synced: u64,
    /// Where in the uncompressed layer its first byte is.
    #[serde(default)]
    offset: Option<u64>,
}

/// What a layer came to.
pub(crate) struct Unpacked {
    pub(crate) entries: Vec<LayerEntry>,
    pub(crate) staged: Vec<Staged>,
    pub(crate) attributes: Attributes,
    /// Bytes of content written.
    pub(crate) written_bytes: u64,
}

impl Unpacker {
    pub(super) fn new(layer: &Layer) -> Self {
        let uncompressed = layer.compression == Compression::None;
        let reader = match layer.content {
            Content::Tar => Reader::Tar(Parser::new()),
            Content::File => {
                Reader::File { size: uncompressed.then_some(layer.blob.size), taken: 0 }
            }
        };
        let progress = Progress {
            reader,
            entries: Vec::new(),
            staged: Vec::new(),
            open: None,
            written_bytes: 0,
        };
        Self::with(progress, layer)
    }

    fn with(progress: Progress, layer: &Layer) -> Self {
        // As much was known of it when its pull was let in.
        let granted = layer.blob.size.max(progress.written_bytes);
        Self { progress, writer: None, buffer: Buffer::new(), granted }
    }

    /// Goes on from a checkpoint.
    ///
    /// # Errors
    ///
    /// When the checkpoint is of another kind of layer, or the disk does not hold what it says.
    pub(super) fn resume(progress: Progress, layer: &Layer, ingest: &Ingest) -> io::Result<Self> {
        match (&progress.reader, layer.content) {
            (Reader::Tar(_), Content::Tar) | (Reader::File { .. }, Content::File) => {}
            _ => return Err(io::Error::other("it was read as something else")),
        }
        for staged in &progress.staged {
            let path = ingest.folder().join(&staged.name);
            if std::fs::metadata(&path)?.len() != staged.size {
                return Err(io::Error::other(format!("{} has another length", path.display())));
            }
        }
        let mut unpacker = Self::with(progress, layer);
        // A file of which nothing came yet is made when its first bytes come.
        if let Some(open) = &unpacker.progress.open
            && open.synced > 0
            && let MemberKind::File { size, executable } = open.member.kind
        {
            let path = ingest.folder().join(unpacker.next_name());
            let synced = open.synced;
            unpacker.writer =
                Some(FileWriter::resume(&path, size, executable, synced, &mut unpacker.buffer)?);
        }
        Ok(unpacker)
    }

    /// Uncompressed bytes taken so far.
    pub(super) fn offset(&self) -> u64 {
        match &self.progress.reader {
            Reader::Tar(parser) => parser.offset(),
            Reader::File { taken, .. } => *taken,
        }
    }

    /// The tar's reader, where it is one.
    pub(super) fn parser(&self) -> Option<&Parser> {
        match &self.progress.reader {
            Reader::Tar(parser) => Some(parser),
            Reader::File { .. } => None,
        }
    }

    /// Size and mode of the open file, where nothing of it has come yet.
    pub(super) fn begun(&self) -> Option<(u64, bool)> {
        match self.progress.open.as_ref()?.member.kind {
            MemberKind::File { size, executable } if self.data_left() == size => {
                Some((size, executable))
            }
            _ => None,
        }
    }

    /// Bytes of the open file that are still to come.
    fn data_left(&self) -> u64 {
        match &self.progress.reader {
            Reader::Tar(parser) => parser.data_left(),
            Reader::File { size, taken } => size.unwrap_or(0).saturating_sub(*taken),
        }
    }

    pub(super) fn write(&mut self, mut input: &[u8], ingest: &Ingest) -> Result<(), LayerError> {
        loop {
            match &mut self.progress.reader {
                Reader::Tar(parser) => {
                    let (used, event) = parser.next(input)?;
                    input = &input[used..];
                    match event {
                        Event::More => return Ok(()),
                        Event::Member(member) => self.begin(member)?,
                        Event::Data(bytes) => self.data(bytes, ingest)?,
                        Event::End => self.end()?,
                    }
                }
                Reader::File { size, taken } => {
                    if input.is_empty() {
                        return Ok(());
                    }
                    let size = size.unwrap_or(0);
                    *taken += input.len() as u64;
                    if self.progress.open.is_none() {
                        self.open(String::new(), size, false, 0);
                    }
                    return self.data(input, ingest);
                }
            }
        }
    }

    fn data(&mut self, bytes: &[u8], ingest: &Ingest) -> Result<(), LayerError> {
        // What no file waits for is the content of a marker.
        let Some(OpenFile { member, .. }) = &self.progress.open else { return Ok(()) };
        if self.writer.is_none()
            && let MemberKind::File { size, executable } = member.kind
        {
            let path = ingest.folder().join(self.next_name());
            self.grant(size, ingest)?;
            let writer = FileWriter::create(&path, size, executable);
            self.writer = Some(writer.map_err(|e| self.disk(e))?);
        }
        self.grant(bytes.len() as u64, ingest)?;
        let Some(writer) = &mut self.writer else { return Ok(()) };
        self.progress.written_bytes += bytes.len() as u64;
        writer.write(bytes, &mut self.buffer).map_err(|e| self.disk(e))
    }

    /// Sees to it that so many more bytes fit into the store: what a compressed layer becomes, nobody knew
    /// before.
    fn grant(&mut self, bytes: u64, ingest: &Ingest) -> Result<(), LayerError> {
        let needed = self.progress.written_bytes.saturating_add(bytes);
        if needed > self.granted {
            ingest.make_room(needed - self.granted)?;
            self.granted = needed.saturating_add(GRANT_BYTES);
        }
        Ok(())
    }

    /// Takes a stored object for the whole content of the file that has just begun. What was hashed
    /// in its place is the caller's to know.
    ///
    /// # Errors
    ///
    /// [`LayerError::Mismatch`] where no such file has begun: the plan was wrong.
    pub(super) fn local(&mut self, local: &Local) -> Result<(), LayerError> {
        let wrong = || LayerError::Mismatch(format!("no file like {} there", local.name));
        let object = local.object.ok_or_else(wrong)?;
        match &mut self.progress.reader {
            Reader::Tar(parser) => {
                if !parser.pass_content(local.size) {
                    return Err(wrong());
                }
            }
            Reader::File { size, taken } => {
                if *taken > 0 || *size != Some(local.size) {
                    return Err(wrong());
                }
                *taken = local.size;
                self.open(String::new(), local.size, false, 0);
            }
        }
        let kind = MemberKind::File { size: local.size, executable: local.executable };
        match &self.progress.open {
            Some(open) if open.member.kind == kind && self.writer.is_none() => {}
            _ => return Err(wrong()),
        }
        self.complete(local.name.clone(), object);
        Ok(())
    }

    /// Puts everything on the disk and tells how to go on from here.
    pub(super) fn checkpoint(&mut self, ingest: &Ingest) -> Result<&Progress, LayerError> {
        let synced = match &mut self.writer {
            Some(writer) => Some(writer.sync(&mut self.buffer)),
            None => None,
        };
        let synced = synced.transpose().map_err(|e| self.disk(e))?.unwrap_or(0);
        if let Some(open) = &mut self.progress.open {
            open.synced = synced;
        }
        if self.progress.staged.len() > SYNC_EACH {
            self.sync_all(ingest)?;
        }
        Ok(&self.progress)
    }

    pub(super) fn finish(mut self, ingest: &Ingest) -> Result<Unpacked, LayerError> {
        match &self.progress.reader {
            Reader::Tar(parser) => parser.finish()?,
            Reader::File { taken: 0, .. } => {
                self.progress.entries.push(empty_file(String::new(), false));
            }
            Reader::File { taken, .. } => {
                let taken = *taken;
                if let Some(OpenFile { member, .. }) = &mut self.progress.open {
                    member.kind = MemberKind::File { size: taken, executable: false };
                }
                self.end()?;
            }
        }
        if self.progress.staged.len() > SYNC_EACH {
            self.sync_all(ingest)?;
        }
        let parser = self.parser();
        let attributes = parser.map(|parser| parser.attributes().clone()).unwrap_or_default();
        let Progress { entries, staged, written_bytes, .. } = self.progress;
        Ok(Unpacked { entries, staged, attributes, written_bytes })
    }

    fn begin(&mut self, member: Member) -> Result<(), LayerError> {
        room_for_more(self.progress.entries.len())?;
        match Meaning::of(member)? {
            Meaning::Nothing => {}
            Meaning::Entry(entry) => self.progress.entries.push(entry),
            Meaning::File { path, size, executable } => {
                // Its header has just been read.
                let offset = self.offset();
                self.open(path, size, executable, offset);
            }
        }
        Ok(())
    }

    /// Notes the file that the next bytes go to. It is made when they come: they may also be here
    /// already.
    fn open(&mut self, path: String, size: u64, executable: bool, offset: u64) {
        let member = Member { path, kind: MemberKind::File { size, executable } };
        self.progress.open = Some(OpenFile { member, synced: 0, offset: Some(offset) });
    }

    fn end(&mut self) -> Result<(), LayerError> {
        // Empty files and markers have none open.
        let Some(writer) = self.writer.take() else { return Ok(()) };
        let durable = self.progress.staged.len() < SYNC_EACH;
        let name = self.next_name();
        let object = writer.finish(&mut self.buffer, durable).map_err(|e| self.disk(e))?;
        self.complete(name, object);
        Ok(())
    }

    /// Enters the open file, whose content is in the ingest folder under `name`.
    fn complete(&mut self, name: String, object: ObjectId) {
        if let Some(OpenFile { member, offset, .. }) = self.progress.open.take()
            && let MemberKind::File { size, .. } = member.kind
        {
            let path = member.path;
            self.progress.entries.push(LayerEntry::File { path, size, object, offset });
            self.progress.staged.push(Staged { name, object, size });
        }
    }

    /// Files are numbered in the order of the tar; a name of the image never reaches the disk here.
    fn next_name(&self) -> String {
        format!("{:07}", self.progress.staged.len())
    }

    fn sync_all(&self, ingest: &Ingest) -> Result<(), LayerError> {
        let folder = std::fs::File::open(ingest.folder()).map_err(|e| self.disk(e))?;
        rustix::fs::syncfs(&folder).map_err(|e| self.disk(e.into()))
    }

    fn disk(&self, source: io::Error) -> LayerError {
        let path = self.progress.open.as_ref().map_or("", |open| open.member.path.as_str());
        LayerError::Store(StoreError::io(format!("write {path:?} into the store"), source))
    }
}

/// Whether a member is nothing that a tree shows.
pub(super) fn is_marker(path: &str) -> bool {
    let name = path.rsplit('/').next().unwrap_or_default();
    name.starts_with(WHITEOUT) || ESTARGZ.contains(&path)
}

/// What a member of a tar is to a layer.
pub(super) enum Meaning {
    /// Nothing of the image.
    Nothing,
    Entry(LayerEntry),
    /// A file with content, which comes next.
    File {
        path: String,
        size: u64,
        executable: bool,
    },
}

impl Meaning {
    pub(super) fn of(member: Member) -> Result<Self, LayerError> {
        let Member { path, kind } = member;
        if is_estargz(&path) {
            return Ok(Self::Nothing);
        }
        let (folder, name) = path.rsplit_once('/').unwrap_or(("", &path));
        if name == OPAQUE {
            return Ok(Self::Entry(LayerEntry::Opaque { path: folder.to_owned() }));
        }
        if let Some(hidden) = name.strip_prefix(WHITEOUT) {
            if hidden.starts_with(WHITEOUT) {
                // AUFS's own bookkeeping, which some old images carry.
                return Ok(Self::Nothing);
            }
            if hidden.is_empty() || hidden == "." || hidden == ".." {
                return Err(LayerError::Refused(format!("entry {path:?}: a whiteout of nothing")));
            }
            let path =
                if folder.is_empty() { hidden.to_owned() } else { format!("{folder}/{hidden}") };
            return Ok(Self::Entry(LayerEntry::Whiteout { path }));
        }
        Ok(Self::Entry(match kind {
            MemberKind::Directory if path.is_empty() => return Ok(Self::Nothing),
            MemberKind::Directory => LayerEntry::Directory { path },
            MemberKind::Symlink { target } => LayerEntry::Symlink { path, target },
            MemberKind::Hardlink { target } => LayerEntry::Hardlink { path, target },
            MemberKind::File { size: 0, executable } => empty_file(path, executable),
            MemberKind::File { size, executable } => {
                return Ok(Self::File { path, size, executable });
            }
        }))
    }
}

/// Refuses one entry more than a layer may have.
pub(super) fn room_for_more(entries: usize) -> Result<(), LayerError> {
    match entries {
        MAX_ENTRIES.. => Err(LayerError::Refused(format!("more than {MAX_ENTRIES} entries"))),
        _ => Ok(()),
    }
}

pub(super) fn empty_file(path: String, executable: bool) -> LayerEntry {
    let object = ObjectId::new(blake3::hash(b""), executable);
    LayerEntry::File { path, size: 0, object, offset: None }
}
