//! Whether a stored object is what a file of a layer will be.
//!
//! Objects of a file's size are candidates; what is known of the file, its digest or samples of it, sorts out those that
//! are others. Blocking, and local reads are bounded by a budget. What is left is a guess.

use std::ops::Range;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use bytes::Bytes;
use sha2::{Digest as _, Sha256};

use super::length;
use crate::digest::{Digest, ObjectId};
use crate::layer::{FileReader, Local};
use crate::pull::toc::TocFile;
use crate::store::{BySize, Candidate, Sizes, Store};

/// Bytes of a sample. One block of a disk; a file of weights that differs at all differs nearly
/// everywhere.
pub(super) const SAMPLE_BYTES: u64 = 4096;

/// Up to here a candidate is rather hashed than sampled over the network.
pub(in crate::pull) const HASHED_BYTES: u64 = 64 * 1024 * 1024;

/// Local bytes that are hashed before a layer is fetched.
pub(in crate::pull) const HASH_BUDGET_BYTES: u64 = 1024 * 1024 * 1024;

/// What a skipped file must save of the blob to be worth its request, and how much more than that
/// it may be: what compresses so well is fetched soon, and bounds what a hostile table makes us read.
const MIN_SAVED_BYTES: u64 = 64 * 1024;
const MOST_COMPRESSED: u64 = 64;

/// The files of a table of contents that are here, linked, with what of the blob they stand for.
pub(super) fn local_files(
    store: &Store,
    files: &[TocFile],
    by_size: &BySize,
    end: u64,
    folder: &Path,
) -> Vec<Local> {
    let (mut locals, mut at, mut budget) = (Vec::new(), 0, HASH_BUDGET_BYTES);
    for file in files {
        // Before each file, and behind the last, there is something else, if only a header.
        if file.range.start <= at || file.range.end >= end || file.range.is_empty() {
            continue;
        }
        let saved = length(&file.range);
        if saved < MIN_SAVED_BYTES || file.size / MOST_COMPRESSED > saved {
            continue;
        }
        let candidates = of_size(by_size, file.size, file.executable)
            .filter(|candidate| is_listed(store, candidate, file, &mut budget))
            .collect();
        if let Some((name, object)) = first_linked(store, candidates, file.size, folder) {
            at = file.range.end;
            let &TocFile { size, again, .. } = file;
            let (executable, object) = (object.executable(), Some(object));
            let range = file.range.clone();
            locals.push(Local { name, object, executable, size, range, again, known: 0 });
        }
    }
    locals
}

pub(in crate::pull) fn first_linked(
    store: &Store,
    candidates: Vec<Candidate>,
    size: u64,
    folder: &Path,
) -> Option<(String, ObjectId)> {
    candidates.into_iter().find_map(|Candidate { object, .. }| {
        match store.link_object(&object, size, folder) {
            Ok(name) => name.map(|name| (name, object)),
            Err(error) => {
                tracing::warn!(%error, "an object cannot be used");
                None
            }
        }
    })
}

pub(in crate::pull) fn of_size(
    by_size: &BySize,
    size: u64,
    executable: bool,
) -> impl Iterator<Item = Candidate> + '_ {
    let all = by_size.get(&size).into_iter().flatten().copied();
    // The mode belongs to the inode.
    all.filter(move |candidate| candidate.object.executable() == executable)
}

/// Whether an object's content may be what a table of contents says of a file.
fn is_listed(store: &Store, candidate: &Candidate, file: &TocFile, budget: &mut u64) -> bool {
    if let Some(known) = candidate.sha256 {
        return known == file.digest;
    }
    let whole = [(0..file.size, file.digest)];
    let parts = if file.chunks.is_empty() { &whole[..] } else { &file.chunks[..] };
    parts.iter().all(|(range, digest)| {
        let Some(left) = budget.checked_sub(length(range)) else { return false };
        *budget = left;
        sha256(store, candidate, file.size, range.clone()) == Some(*digest)
    })
}

/// Whether an object's content has this SHA-256; it is read for that, where nobody did before and the
/// budget allows it.
pub(in crate::pull) fn is_known(
    store: &Store,
    candidate: &Candidate,
    (size, digest): (u64, Digest),
    budget: &mut u64,
    sizes: &Mutex<Sizes>,
) -> bool {
    if let Some(known) = candidate.sha256 {
        return known == digest;
    }
    let Some(left) = budget.checked_sub(size) else { return false };
    *budget = left;
    let found = sha256(store, candidate, size, 0..size);
    if let Some(found) = found {
        sizes.lock().unwrap_or_else(PoisonError::into_inner).learn(candidate.object, found);
    }
    found == Some(digest)
}

pub(in crate::pull) fn is_like(
    store: &Store,
    candidate: &Candidate,
    size: u64,
    known: &[(u64, Bytes)],
) -> bool {
    let Ok(mut file) = FileReader::open(&store.object_path(&candidate.object), size) else {
        return false;
    };
    known.iter().all(|(at, bytes)| {
        let mut same = true;
        let mut left = &bytes[..];
        let read = file.read(*at..*at + bytes.len() as u64, |found| {
            let (expected, rest) = left.split_at(found.len().min(left.len()));
            (same, left) = (same && expected == found, rest);
            same
        });
        read.is_ok() && same
    })
}

fn sha256(store: &Store, candidate: &Candidate, size: u64, range: Range<u64>) -> Option<Digest> {
    let mut hash = Sha256::new();
    let file = FileReader::open(&store.object_path(&candidate.object), size);
    let read = file.and_then(|mut file| {
        file.read(range, |bytes| {
            hash.update(bytes);
            true
        })
    });
    read.ok().map(|()| Digest::from_sha256(hash.finalize().into()))
}

/// Where a file is compared: at its start, its end, and between; more in larger ones, in which more
/// is at stake.
pub(super) fn samples(size: u64) -> Vec<u64> {
    const MIB: u64 = 1024 * 1024;
    let parts = match size / MIB {
        ..16 => 2,
        16..256 => 4,
        _ => 8,
    };
    (0..=parts).map(|part| size.saturating_sub(SAMPLE_BYTES) / parts * part).collect()
}
