//! All that a table of contents says of a layer, for who reads the layer while it arrives.
//!
//! What it says of chunks is checked as far as it can be without the blob: they follow each other, in
//! the file and in the blob, and are small enough to be held. What does not fit is an error, since a
//! reader must not be shown half a list; the layer is waited for then.

use std::ops::Range;

use super::{Entry, Fold, Footer, read};
use crate::digest::Digest;
use crate::layer::tar::{Member, MemberKind};
use crate::layer::{
    Contents, Frame, JUMP_BYTES, MAX_FRAME_BYTES, Promised, clean_path, is_estargz,
};

/// Memory that a table may take, unpacked: some 600,000 chunks, 40 GB of zstd:chunked.
const MAX_HELD_BYTES: u64 = 64 * 1024 * 1024;

/// What an entry costs beside its names.
const ENTRY_BYTES: u64 = 100;

/// Reads the table that `footer` speaks of; `said` is its digest, where the manifest says it.
pub(in crate::pull) fn contents(
    footer: &Footer,
    packed: &[u8],
    said: Option<Digest>,
) -> Result<Contents, String> {
    let (all, found) = read::<All>(footer, packed)?;
    if let Some(said) = said
        && said != found
    {
        return Err(format!("its table of contents hashes to {found}, the manifest says {said}"));
    }
    let mut at = 0;
    for run in all.members.iter().filter_map(Promised::packed) {
        // Before each is a header, if nothing else.
        if run.start <= at || run.end >= footer.end.min(footer.toc.start) {
            return Err("chunks in its table of contents overlap, or lie behind its end".to_owned());
        }
        at = run.end;
    }
    Ok(Contents { table: found, members: all.members, end: footer.end })
}

#[derive(Default)]
struct All {
    members: Vec<Promised>,
    open: Option<OpenFile>,
    held_bytes: u64,
}

/// A file whose chunks are being read.
struct OpenFile {
    member: Member,
    size: u64,
    digest: Option<Digest>,
    /// Where its last chunk ends in the blob; 0 where nothing says it.
    end: u64,
    listed: Vec<Listed>,
}

/// A chunk as it is listed.
struct Listed {
    offset: u64,
    inner_offset: u64,
    at: u64,
    /// 0 for all the rest.
    size: u64,
    digest: Option<Digest>,
}

impl Listed {
    fn of(entry: &Entry) -> Self {
        Self {
            offset: entry.offset,
            inner_offset: entry.inner_offset,
            at: entry.chunk_offset,
            size: entry.chunk_size,
            digest: digest(entry.chunk_digest.as_deref()),
        }
    }
}

fn digest(text: Option<&str>) -> Option<Digest> {
    text.and_then(|text| text.parse().ok())
}

impl Fold for All {
    fn take(&mut self, entry: Entry) -> Result<(), String> {
        let names = entry.name.len() + entry.link_name.len();
        self.held_bytes += ENTRY_BYTES + names as u64;
        if self.held_bytes > MAX_HELD_BYTES {
            return Err("more than can be held in memory".to_owned());
        }
        if entry.kind == "chunk" {
            if let Some(open) = &mut self.open {
                open.listed.push(Listed::of(&entry));
            }
            return Ok(());
        }
        self.end()?;
        let path = clean_path(entry.name.as_bytes()).map_err(|e| e.to_string())?;
        let kind = match entry.kind.as_str() {
            "dir" => return Ok(()),
            "reg" => MemberKind::File { size: entry.size, executable: entry.mode & 0o111 != 0 },
            "symlink" => MemberKind::Symlink { target: entry.link_name.clone() },
            "hardlink" => {
                let target = clean_path(entry.link_name.as_bytes()).map_err(|e| e.to_string())?;
                MemberKind::Hardlink { target }
            }
            other => return Err(format!("{path:?} is of kind {other:?}")),
        };
        if is_estargz(&path) {
            return Ok(());
        }
        let member = Member { path, kind };
        if let MemberKind::File { size: 1.., .. } = member.kind {
            self.open = Some(OpenFile {
                member,
                size: entry.size,
                digest: digest(entry.digest.as_deref()),
                end: entry.end_offset,
                listed: vec![Listed::of(&entry)],
            });
        } else {
            let (frames, parts) = (Vec::new(), Vec::new());
            self.members.push(Promised { member, digest: None, link: None, frames, parts });
        }
        Ok(())
    }

    fn end(&mut self) -> Result<(), String> {
        if let Some(open) = self.open.take() {
            self.members.push(open.close()?);
        }
        Ok(())
    }
}

impl OpenFile {
    fn close(self) -> Result<Promised, String> {
        let wrong = |why: &str| format!("{:?} in its table of contents: {why}", self.member.path);
        let (mut chunks, mut at) = (Vec::new(), 0);
        for (n, listed) in self.listed.iter().enumerate() {
            let content = match listed.size {
                0 => listed.at..self.size,
                size => listed.at..listed.at.saturating_add(size),
            };
            if content.start != at || content.is_empty() || content.end > self.size {
                return Err(wrong("its chunks do not follow each other"));
            }
            if length(&content) > MAX_FRAME_BYTES {
                return Err(wrong("a chunk of it is too large to be held"));
            }
            at = content.end;
            let end = match self.listed.get(n + 1) {
                Some(next) if next.inner_offset == 0 => next.offset,
                // It shares its member or frame with this one.
                Some(_) => 0,
                None => self.end,
            };
            let alone = listed.inner_offset == 0 && end > 0;
            let packed = listed.offset..if alone { end } else { listed.offset };
            if alone && (packed.is_empty() || length(&packed) > most_packed(length(&content))) {
                return Err(wrong("a chunk of it is longer than its content"));
            }
            let digest = listed.digest.or(self.digest.filter(|_| self.listed.len() == 1));
            chunks.push(Frame { packed, content, digest });
        }
        if at != self.size {
            return Err(wrong("its chunks are not all of it"));
        }
        let run = longest_run(&chunks);
        let part = |chunk: &Frame| Some((chunk.content.clone(), chunk.digest?));
        let parts = match (run.is_empty(), self.digest) {
            (true, Some(digest)) => vec![(0..self.size, digest)],
            _ => {
                let (before, after) = (&chunks[..run.start], &chunks[run.end..]);
                before.iter().chain(after).filter_map(part).collect()
            }
        };
        let frames = chunks.drain(run).collect();
        Ok(Promised { member: self.member, digest: self.digest, link: None, frames, parts })
    }
}

/// The chunks that are worth to be fetched for themselves: those that have frames or members of
/// their own, one after the other.
fn longest_run(chunks: &[Frame]) -> Range<usize> {
    let bytes = |run: &Range<usize>| -> u64 {
        chunks[run.clone()].iter().map(|chunk| length(&chunk.packed)).sum()
    };
    let (mut longest, mut start) = (0..0, 0);
    for end in 0..=chunks.len() {
        if chunks.get(end).is_none_or(|chunk| chunk.packed.is_empty()) {
            if bytes(&(start..end)) > bytes(&longest) {
                longest = start..end;
            }
            start = end + 1;
        }
    }
    if bytes(&longest) < JUMP_BYTES { 0..0 } else { longest }
}

/// What does not compress is a little longer as it travels.
fn most_packed(content: u64) -> u64 {
    content + content / 8 + 4096
}

fn length(range: &Range<u64>) -> u64 {
    range.end.saturating_sub(range.start)
}
