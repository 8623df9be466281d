//! Of what a layer's blob is put together: bytes from the network, and files that are here already.
//!
//! ```text
//! blob      │ header │ model-1 ............ │ header │ model-2 ............ │ end │
//! segments  │ Held   │ Local (object)       │ Held   │ Network              │     │
//! ```
//!
//! The segments are in the blob's order. A plan is a guess: what it took for a stored file may be
//! another one. Therefore everything goes through one SHA-256 in order, the bytes of local files in
//! place of those that were not fetched, and only the right digest gives the layer its names.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;

use crate::digest::ObjectId;

/// A part of the blob.
pub(crate) enum Segment {
    /// Bytes that the fetch brings.
    Network(Range<u64>),
    /// Bytes that came while the plan was made.
    Held(Bytes),
    /// A file's content, which a stored object has.
    Local(Local),
}

/// A stored object, or a file that may become one, in place of a part of the blob.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Local {
    /// Its hard link in the layer's ingest folder.
    pub(crate) name: String,
    /// `None` for a file that is not the store's yet: hashing it shows.
    pub(crate) object: Option<ObjectId>,
    pub(crate) executable: bool,
    /// Its length.
    pub(crate) size: u64,
    /// What of the blob need not be fetched: the content, as it is packed there.
    pub(crate) range: Range<u64>,
    /// So many bytes at the content's end come again with the next segment, where a compressed
    /// blob can only be read from a place before them.
    pub(crate) again: u64,
    /// Bytes of `range` that were fetched nevertheless, to find this out.
    pub(crate) known: u64,
}

/// Told of bytes of the blob that a local file stood in for; answers whether to go on.
pub(crate) type Told = Arc<dyn Fn(u64) -> bool + Send + Sync>;

/// All segments of a blob from some place on.
pub(crate) struct Plan {
    pub(crate) segments: Vec<Segment>,
    pub(crate) told: Told,
}

impl Plan {
    /// Everything from the network.
    pub(crate) fn plain(range: Range<u64>) -> Self {
        Self { segments: vec![Segment::Network(range)], told: Arc::new(|_| true) }
    }

    /// Puts together `range` of a blob: `locals`, ascending, and around them what is in `held`, by
    /// its start in the blob, and else the network.
    pub(crate) fn of(
        range: Range<u64>,
        locals: Vec<Local>,
        held: &[(u64, Bytes)],
        told: Told,
    ) -> Self {
        let (mut segments, mut at) = (Vec::new(), range.start);
        for mut local in locals {
            fill(&mut segments, at..local.range.start, held);
            at = local.range.end;
            local.known = overlaps(&local.range, held).map(|(part, _)| part.end - part.start).sum();
            segments.push(Segment::Local(local));
        }
        fill(&mut segments, at..range.end, held);
        Self { segments, told }
    }

    /// What is to be fetched.
    pub(crate) fn network(&self) -> Vec<Range<u64>> {
        let ranges = self.segments.iter().filter_map(|segment| match segment {
            Segment::Network(range) if !range.is_empty() => Some(range.clone()),
            _ => None,
        });
        ranges.collect()
    }

    /// Bytes that came while it was made, and are of use.
    pub(crate) fn held(&self) -> u64 {
        let held = self.segments.iter().filter_map(|segment| match segment {
            Segment::Held(bytes) => Some(bytes.len() as u64),
            _ => None,
        });
        held.sum()
    }

    /// The stored objects that it counts on.
    pub(crate) fn locals(&self) -> impl Iterator<Item = &Local> {
        self.segments.iter().filter_map(|segment| match segment {
            Segment::Local(local) => Some(local),
            _ => None,
        })
    }
}

/// The parts of `range` that are in `held`, with their bytes.
pub(crate) fn overlaps<'a>(
    range: &Range<u64>,
    held: &'a [(u64, Bytes)],
) -> impl Iterator<Item = (Range<u64>, Bytes)> + use<'a> {
    let range = range.clone();
    held.iter().filter_map(move |(start, bytes)| {
        let end = start + bytes.len() as u64;
        let part = range.start.max(*start)..range.end.min(end);
        let inside = || (part.start - start) as usize..(part.end - start) as usize;
        (!part.is_empty()).then(|| (part.clone(), bytes.slice(inside())))
    })
}

fn fill(segments: &mut Vec<Segment>, range: Range<u64>, held: &[(u64, Bytes)]) {
    let mut at = range.start;
    for (part, bytes) in overlaps(&range, held) {
        if at < part.start {
            segments.push(Segment::Network(at..part.start));
        }
        at = part.end;
        segments.push(Segment::Held(bytes));
    }
    if at < range.end {
        segments.push(Segment::Network(at..range.end));
    }
}
