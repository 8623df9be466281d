//! A tar reader that is fed instead of reading.
//!
//! Bytes come in as they arrive, events go out; the state between two calls is
//! a small plain value. That is what lets a layer be hashed and unpacked in one
//! pass, stopped at any byte, saved, and gone on with after a crash.
//!
//! Header fields are decoded by the `tar` crate; here are the order of blocks,
//! the extensions that matter for content (pax, GNU long names), and refusals:
//! a layer with devices, sparse files or names that leave the root has no place
//! among model weights, and is an error rather than a guess.

use serde::{Deserialize, Serialize};

use super::unpack::is_marker;
use crate::tree::Attributes;

const BLOCK: usize = 512;

/// Long names and pax records are at most a few KiB; the rest is an attack.
const MAX_EXTENSION_BYTES: u64 = 1024 * 1024;

/// PATH_MAX and NAME_MAX of Linux, which the tree is made on.
const MAX_PATH_BYTES: usize = 4096;
const MAX_NAME_BYTES: usize = 255;
/// All names of a layer together, which its record and its tree hold: a hundred bytes for each of
/// more files than any model has, and not four thousand for each of a million.
const MAX_NAMES_BYTES: u64 = 64 * 1024 * 1024;

/// No file is larger, and sums of offsets and sizes stay far from what a `u64` holds.
const MAX_FILE_BYTES: u64 = 1 << 60;

/// Deep enough for any packaging, and shallow enough for recursion.
const MAX_DEPTH: usize = 128;

/// What is wrong with a tar.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum TarError {
    #[error("at byte {offset}: {why}")]
    Broken { offset: u64, why: String },
    #[error("entry {path:?}: {why}")]
    Refused { path: String, why: String },
    #[error("ends in the middle of {path:?}")]
    Truncated { path: String },
}

/// One member of the archive, with a path that is relative, clean and below the root.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Member {
    /// Empty for the root itself.
    pub(crate) path: String,
    pub(crate) kind: MemberKind,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum MemberKind {
    Directory,
    File {
        size: u64,
        executable: bool,
    },
    /// The target is kept as it is: the reader of the volume resolves it, never the host.
    Symlink {
        target: String,
    },
    /// The target is a path like a member's own.
    Hardlink {
        target: String,
    },
}

/// What the bytes up to here mean.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Event<'a> {
    /// All input is used up and nothing is complete yet.
    More,
    /// A member begins. A file's content follows as [`Event::Data`], `size` bytes
    /// in all; after the last of them, or at once for an empty file, comes [`Event::End`].
    Member(Member),
    /// Content of the file that began last.
    Data(&'a [u8]),
    /// That file is complete.
    End,
}

/// The parser. Its state can be saved between any two calls.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Parser {
    offset: u64,
    state: State,
    /// From extension headers, for the next member.
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    #[serde(default)]
    owner: Owner,
    /// The path of the member that began last, for errors.
    current: String,
    /// Of the names of all members so far.
    #[serde(default)]
    names_bytes: u64,
    /// Of all members so far.
    #[serde(default)]
    attributes: Attributes,
}

/// What pax records say of the next member's owner and attributes.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Owner {
    user: Option<u64>,
    group: Option<u64>,
    extended: bool,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
enum State {
    Header {
        have: Vec<u8>,
    },
    Extension {
        kind: Extension,
        have: Vec<u8>,
        left: u64,
    },
    Data {
        left: u64,
        padding: u64,
    },
    /// A file's content is complete, which has not been said yet.
    EndOfData {
        padding: u64,
    },
    Padding {
        left: u64,
    },
    /// Behind the end marker anything may follow, and means nothing.
    Done,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Extension {
    Pax,
    /// Global pax records: read over.
    PaxGlobal,
    GnuPath,
    GnuLink,
}

impl Parser {
    pub(crate) fn new() -> Self {
        Self {
            offset: 0,
            state: State::Header { have: Vec::new() },
            path: None,
            link: None,
            size: None,
            owner: Owner::default(),
            current: String::new(),
            names_bytes: 0,
            attributes: Attributes::Kept,
        }
    }

    /// Whether what the members say of owners, modes and attributes is what a tree shows.
    pub(crate) fn attributes(&self) -> &Attributes {
        &self.attributes
    }

    /// Bytes consumed so far.
    pub(crate) fn offset(&self) -> u64 {
        self.offset
    }

    /// Bytes of the current file's content that are still to come.
    pub(crate) fn data_left(&self) -> u64 {
        match self.state {
            State::Data { left, .. } => left,
            _ => 0,
        }
    }

    /// Whether the end marker was read.
    pub(crate) fn is_done(&self) -> bool {
        matches!(self.state, State::Done)
    }

    /// Goes behind the content of the member that began last, which the caller does not need: the
    /// next byte to give is the one at [`Parser::offset`].
    pub(crate) fn skip(&mut self) {
        let skipped = match self.state {
            State::Data { left, padding } => left.saturating_add(padding),
            State::Padding { left } => left,
            _ => return,
        };
        self.offset = self.offset.saturating_add(skipped);
        self.state = State::Header { have: Vec::new() };
    }

    /// Goes behind the content of the file that began last, which came another way; its padding is
    /// still to be given. False where that file has not `size` bytes to come.
    pub(crate) fn pass_content(&mut self, size: u64) -> bool {
        self.data_left() == size && self.pass(size)
    }

    /// As [`Parser::pass_content`], for the next part of that content. False where it has not so
    /// many bytes to come.
    pub(crate) fn pass(&mut self, bytes: u64) -> bool {
        let State::Data { left, padding } = self.state else { return false };
        let Some(left) = left.checked_sub(bytes) else { return false };
        self.offset = self.offset.saturating_add(bytes);
        self.state = match (left, padding) {
            (0, 0) => State::Header { have: Vec::new() },
            (0, left) => State::Padding { left },
            (left, padding) => State::Data { left, padding },
        };
        true
    }

    /// Consumes a part of `input`; returns how much, and what it means.
    ///
    /// Call again with the rest until it answers [`Event::More`].
    pub(crate) fn next<'a>(&mut self, input: &'a [u8]) -> Result<(usize, Event<'a>), TarError> {
        let mut used = 0;
        loop {
            let (step, event) = self.step(&input[used..])?;
            used += step;
            self.offset += step as u64;
            match event {
                Some(event) => return Ok((used, event)),
                None if used == input.len() && !matches!(self.state, State::EndOfData { .. }) => {
                    return Ok((used, Event::More));
                }
                None => {}
            }
        }
    }

    /// Says that no more bytes will come.
    pub(crate) fn finish(&self) -> Result<(), TarError> {
        match &self.state {
            State::Done => Ok(()),
            // Tars without an end marker are common enough that every tool reads them.
            State::Header { have } if have.is_empty() => Ok(()),
            State::Padding { .. } => Ok(()),
            _ => Err(TarError::Truncated { path: self.current.clone() }),
        }
    }

    fn step<'a>(&mut self, input: &'a [u8]) -> Result<(usize, Option<Event<'a>>), TarError> {
        match &mut self.state {
            State::Done => Ok((input.len(), None)),
            State::Padding { left } => {
                let take = clamp(*left, input.len());
                *left -= take as u64;
                if *left == 0 {
                    self.state = State::Header { have: Vec::new() };
                }
                Ok((take, None))
            }
            State::Data { left, padding } => {
                let take = clamp(*left, input.len());
                *left -= take as u64;
                if *left == 0 {
                    self.state = State::EndOfData { padding: *padding };
                }
                let event = (take > 0).then(|| Event::Data(&input[..take]));
                Ok((take, event))
            }
            State::EndOfData { padding } => {
                self.state = State::Padding { left: *padding };
                Ok((0, Some(Event::End)))
            }
            State::Extension { kind, have, left } => {
                let padded = left.next_multiple_of(BLOCK as u64);
                let take = clamp(padded - have.len() as u64, input.len());
                have.extend_from_slice(&input[..take]);
                if have.len() as u64 == padded {
                    let (kind, length) = (*kind, *left as usize);
                    let mut body = std::mem::take(have);
                    body.truncate(length);
                    self.state = State::Header { have: Vec::new() };
                    // Whatever the cut, an error names the same place: where its block begins.
                    let at = self.offset + take as u64 - padded;
                    self.extension(kind, body, at)?;
                }
                Ok((take, None))
            }
            State::Header { have } => {
                let take = input.len().min(BLOCK - have.len());
                have.extend_from_slice(&input[..take]);
                if have.len() < BLOCK {
                    return Ok((take, None));
                }
                let block = std::mem::take(have);
                let at = self.offset + take as u64 - BLOCK as u64;
                let event = self.header(&block, at)?;
                Ok((take, event))
            }
        }
    }

    fn header(&mut self, block: &[u8], at: u64) -> Result<Option<Event<'static>>, TarError> {
        if block.iter().all(|b| *b == 0) {
            self.state = State::Done;
            return Ok(None);
        }
        let header = tar::Header::from_byte_slice(block);
        let sum: u32 = block
            .iter()
            .enumerate()
            .map(|(at, b)| if (148..156).contains(&at) { 32 } else { u32::from(*b) })
            .sum();
        if header.cksum().ok() != Some(sum) {
            return Err(broken(at, "header checksum does not match: not a tar, or damaged"));
        }
        let size = header.entry_size().map_err(|_| broken(at, "unreadable size in header"))?;
        let kind = header.entry_type();

        if let Some(kind) = extension(kind) {
            if size > MAX_EXTENSION_BYTES {
                return Err(broken(at, "extension header longer than 1 MiB"));
            }
            self.state = State::Extension { kind, have: Vec::new(), left: size };
            return Ok(None);
        }

        let raw_path = self.path.take().unwrap_or_else(|| header.path_bytes().into_owned());
        let raw_link =
            self.link.take().or_else(|| header.link_name_bytes().map(std::borrow::Cow::into_owned));
        let size = self.size.take().unwrap_or(size);
        if size > MAX_FILE_BYTES {
            return Err(broken(at, "a size of more than an exbibyte in header"));
        }
        let path = clean_path(&raw_path)?;
        self.current.clone_from(&path);
        let link_bytes = raw_link.as_ref().map_or(0, Vec::len);
        self.names_bytes = self.names_bytes.saturating_add((path.len() + link_bytes) as u64);
        if self.names_bytes > MAX_NAMES_BYTES {
            return Err(broken(at, "names of more than 64 MiB together"));
        }
        let refuse = |why: String| TarError::Refused { path: path.clone(), why };
        let link = |what: &str| {
            let link = raw_link.as_deref().unwrap_or_default();
            match std::str::from_utf8(link) {
                _ if link.is_empty() => Err(refuse(format!("{what} without a target"))),
                Ok(text) if link.len() < MAX_PATH_BYTES && !link.contains(&0) => {
                    Ok(text.to_owned())
                }
                _ => Err(refuse(format!("{what} target is not UTF-8 or too long"))),
            }
        };

        let kind = match kind {
            // Version 7 tars mark directories by the slash alone.
            tar::EntryType::Regular if raw_path.ends_with(b"/") => MemberKind::Directory,
            tar::EntryType::Regular | tar::EntryType::Continuous => {
                if path.is_empty() {
                    return Err(refuse("a file in place of the root".into()));
                }
                let mode = header.mode().map_err(|_| refuse("unreadable mode in header".into()))?;
                MemberKind::File { size, executable: mode & 0o111 != 0 }
            }
            tar::EntryType::Directory => MemberKind::Directory,
            tar::EntryType::Symlink => MemberKind::Symlink { target: link("symlink")? },
            tar::EntryType::Link => {
                MemberKind::Hardlink { target: clean_path(link("hard link")?.as_bytes())? }
            }
            tar::EntryType::Char | tar::EntryType::Block => {
                return Err(refuse("device nodes are not allowed in a model image".into()));
            }
            tar::EntryType::Fifo => {
                return Err(refuse("pipes are not allowed in a model image".into()));
            }
            tar::EntryType::GNUSparse => {
                return Err(refuse("sparse files are not supported".into()));
            }
            other => {
                return Err(refuse(format!("unknown entry type {:?}", other.as_byte() as char)));
            }
        };
        if path.is_empty() && kind != MemberKind::Directory {
            return Err(refuse("a link in place of the root".into()));
        }
        let owner = std::mem::take(&mut self.owner);
        if self.attributes == Attributes::Kept
            && !is_marker(&path)
            && let Some(why) = change(&kind, header, &owner)
        {
            self.attributes = Attributes::Changed(format!("/{path} {why}"));
        }
        // Links and directories have no content, whatever their size field says;
        // what is not a file's content is read over.
        self.state = match kind {
            MemberKind::File { size: 0, .. } => State::EndOfData { padding: 0 },
            MemberKind::File { size, .. } => State::Data { left: size, padding: padding(size) },
            MemberKind::Directory => State::Padding { left: size.saturating_add(padding(size)) },
            _ => State::Header { have: Vec::new() },
        };
        if let State::Padding { left: 0 } = self.state {
            self.state = State::Header { have: Vec::new() };
        }
        Ok(Some(Event::Member(Member { path, kind })))
    }

    fn extension(&mut self, kind: Extension, body: Vec<u8>, at: u64) -> Result<(), TarError> {
        let until_nul = |mut body: Vec<u8>| {
            if let Some(end) = body.iter().position(|b| *b == 0) {
                body.truncate(end);
            }
            body
        };
        match kind {
            Extension::PaxGlobal => {}
            Extension::GnuPath => self.path = Some(until_nul(body)),
            Extension::GnuLink => self.link = Some(until_nul(body)),
            Extension::Pax => {
                for record in tar::PaxExtensions::new(&body) {
                    let record = record.map_err(|_| broken(at, "malformed pax record"))?;
                    match record.key_bytes() {
                        b"path" => self.path = Some(record.value_bytes().to_vec()),
                        b"linkpath" => self.link = Some(record.value_bytes().to_vec()),
                        b"size" => {
                            let size = record.value().ok().and_then(|v| v.parse().ok());
                            self.size = Some(
                                size.ok_or_else(|| broken(at, "malformed size in pax record"))?,
                            );
                        }
                        b"uid" => self.owner.user = Some(number(record.value_bytes())),
                        b"gid" => self.owner.group = Some(number(record.value_bytes())),
                        key if ATTRIBUTES.iter().any(|prefix| key.starts_with(prefix)) => {
                            self.owner.extended = true;
                        }
                        key if key.starts_with(b"GNU.sparse.") => {
                            return Err(broken(at, "sparse files are not supported"));
                        }
                        // Times are dropped by design, as owners and xattrs are.
                        _ => {}
                    }
                }
            }
        }
        Ok(())
    }
}

/// Pax records that stand for extended attributes and ACLs.
const ATTRIBUTES: [&[u8]; 3] = [b"SCHILY.xattr.", b"SCHILY.acl.", b"LIBARCHIVE.xattr."];

/// What cannot be read is nobody's.
fn number(text: &[u8]) -> u64 {
    std::str::from_utf8(text).ok().and_then(|text| text.parse().ok()).unwrap_or(u64::MAX)
}

/// What of a member a tree shows otherwise.
fn change(kind: &MemberKind, header: &tar::Header, owner: &Owner) -> Option<String> {
    let user = owner.user.or(header.uid().ok()).unwrap_or(u64::MAX);
    let group = owner.group.or(header.gid().ok()).unwrap_or(u64::MAX);
    if (user, group) != (0, 0) {
        return Some(format!("belongs to {user}:{group}"));
    }
    if owner.extended {
        return Some("has extended attributes".to_owned());
    }
    let mode = header.mode().unwrap_or(u32::MAX) & 0o7777;
    let shown = match kind {
        MemberKind::Symlink { .. } => true,
        MemberKind::Directory => mode == 0o755,
        MemberKind::File { .. } | MemberKind::Hardlink { .. } => {
            [0o444, 0o555].contains(&(mode & !0o200))
        }
    };
    (!shown).then(|| format!("has the mode {mode:04o}"))
}

fn broken(at: u64, why: &str) -> TarError {
    TarError::Broken { offset: at, why: why.to_owned() }
}

fn extension(kind: tar::EntryType) -> Option<Extension> {
    match kind {
        tar::EntryType::XHeader => Some(Extension::Pax),
        tar::EntryType::XGlobalHeader => Some(Extension::PaxGlobal),
        tar::EntryType::GNULongName => Some(Extension::GnuPath),
        tar::EntryType::GNULongLink => Some(Extension::GnuLink),
        _ => None,
    }
}

fn padding(size: u64) -> u64 {
    (BLOCK as u64 - size % BLOCK as u64) % BLOCK as u64
}

fn clamp(left: u64, have: usize) -> usize {
    usize::try_from(left).map_or(have, |left| left.min(have))
}

/// `./models//a/` → `models/a`; refuses what leaves the root or cannot be a path.
pub(crate) fn clean_path(raw: &[u8]) -> Result<String, TarError> {
    let shown = || String::from_utf8_lossy(&raw[..raw.len().min(200)]).into_owned();
    let refuse = |why: &str| TarError::Refused { path: shown(), why: why.to_owned() };
    let text = std::str::from_utf8(raw).map_err(|_| refuse("the name is not UTF-8"))?;
    if text.len() >= MAX_PATH_BYTES {
        return Err(refuse("the path is longer than 4096 bytes"));
    }
    if text.contains('\0') {
        return Err(refuse("the name holds a NUL byte"));
    }
    if text.starts_with('/') {
        return Err(refuse("absolute names are not allowed in a layer"));
    }
    let mut clean = Vec::new();
    for name in text.split('/') {
        match name {
            "" | "." => {}
            ".." => return Err(refuse("climbs out with \"..\"")),
            name if name.len() > MAX_NAME_BYTES => {
                return Err(refuse("a name is longer than 255 bytes"));
            }
            name => clean.push(name),
        }
    }
    if clean.len() > MAX_DEPTH {
        return Err(refuse("more than 128 folders deep"));
    }
    Ok(clean.join("/"))
}

#[cfg(test)]
#[path = "tar_tests.rs"]
mod tests;
