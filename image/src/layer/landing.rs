//! A layer whose bytes come in any order, each straight to its place.
//!
//! [`Landing`] knows which bytes are here, which are under way, and what is asked for next; [`super::spool`]
//! has them on the disk. [`Verifier`] reads the layer in its own order, as far as it has come, through
//! SHA-256 and each file through BLAKE3.
//!
//! All places are those of the uncompressed layer. Of a compressed one that has a table of contents all that
//! is not here comes as frames, which unpack to a part of a file each ([`super::frames`]).
//!
//! # What always holds
//!
//! - **A byte is here once it is written**, and not before: who waits for it may read it then.
//! - **It is written once**: what the verifier has read does not change any more.
//! - **What is not synced does not survive**: [`Landing::save`] takes note of what is here, syncs
//!   it, and only then records it.
//! - **Nothing has a name in the store before the digest over the whole layer is right.**
//! - **Who waits is told of the end**, whatever it is.
//!
//! Bytes go through the page cache, other than in an ordinary pull: whoever streams reads them at
//! once, and so does the verifier.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd as _;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use tokio::sync::watch;

use super::frames::{Frames, Unpack, WrongFrame};
use super::ranges::Ranges;
use super::spool::{REST, Spool};
use crate::digest::{Digest, ObjectId};
use crate::manifest::Compression;
use crate::store::{EPOCH, Ingest, Staged, StoreError, object_mode};

/// Bytes of one request. An asked-for byte may have to wait for all pieces that are under way.
const PIECE_BYTES: u64 = 4 * 1024 * 1024;

/// Files up to here come before the larger ones, and of larger ones as much: headers of safetensors
/// and GGUF stand there.
const HEAD_BYTES: u64 = 1024 * 1024;

/// Bytes that are read at once to be hashed.
const READ_BYTES: usize = 1024 * 1024;

/// What is recorded of a landing for the next pull.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Landed {
    pub(crate) here: Ranges,
    /// The table of contents that its frames were held against: by another one they may be wrong.
    pub(crate) table: Option<Digest>,
}

/// What became of a landing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum End {
    /// All is here and right.
    Verified,
    /// Nothing more will come; what is here may be right.
    Stopped(String),
    /// What is here is wrong.
    Wrong(String),
}

/// Why a piece is fetched, the most urgent first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Want {
    /// Somebody waits for it.
    Asked,
    /// It is what comes in that file next, for who reads on.
    Follows,
    /// It belongs to the layer.
    InOrder,
}

/// Bytes to fetch next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) range: Range<u64>,
    pub(crate) want: Want,
    /// See [`Landing::give_back`].
    pub(crate) round: u64,
}

/// A layer on its way, for those who bring it and those who read it.
#[derive(Debug)]
pub(crate) struct Landing {
    spool: Spool,
    frames: Frames,
    table: Option<Digest>,
    /// What comes when nobody asks.
    order: Vec<Range<u64>>,
    state: Mutex<State>,
    /// Held while bytes are written; what belongs to another round is not.
    round: RwLock<u64>,
    /// Changes when bytes have come, and at the end.
    arrivals: watch::Sender<u64>,
    /// Changes when somebody asks.
    questions: watch::Sender<u64>,
}

#[derive(Debug)]
struct State {
    here: Ranges,
    /// Here or under way.
    taken: Ranges,
    asked: VecDeque<Range<u64>>,
    /// Who has read up to here probably goes on.
    follow: Range<u64>,
    /// Of the order, what is taken.
    ordered: usize,
    unsaved: u64,
    /// Why nothing comes at present.
    trouble: Option<String>,
    end: Option<End>,
}

impl Landing {
    /// `here`: bytes that have been written. `names`: the files' paths, in the layer's order. `packed`: of a
    /// compressed layer the frames, and the digest of the table that they are of.
    pub(crate) fn new(
        spool: Spool,
        mut here: Ranges,
        names: &[String],
        packed: Option<(Frames, Digest)>,
    ) -> Self {
        let (frames, table) = match packed {
            Some((frames, table)) => (frames, Some(table)),
            None => (Frames::default(), None),
        };
        for frame in frames.iter() {
            // It comes as a whole, and no byte is written twice.
            if !here.covers(&frame.content) {
                here.remove(frame.content.clone());
            }
        }
        let mut large: Vec<_> =
            spool.files.iter().zip(names).filter(|(file, _)| file.length() > HEAD_BYTES).collect();
        large.sort_by_key(|(_, name)| *name);
        // Everything but the larger files' bodies, in the blob's order; then these by name.
        let (mut order, mut at) = (Vec::new(), 0);
        for file in spool.files.iter().filter(|file| file.length() > HEAD_BYTES) {
            order.push(at..file.range.start + HEAD_BYTES);
            at = file.range.end;
        }
        order.push(at..spool.size);
        order.extend(large.iter().map(|(file, _)| file.range.clone()));
        let taken = here.clone();
        let state = State {
            here,
            taken,
            asked: VecDeque::new(),
            follow: 0..0,
            ordered: 0,
            unsaved: 0,
            trouble: None,
            end: None,
        };
        Self {
            spool,
            frames,
            table,
            order,
            state: Mutex::new(state),
            round: RwLock::new(0),
            arrivals: watch::Sender::new(0),
            questions: watch::Sender::new(0),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Whole after each statement; a panic elsewhere does not spoil it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes bytes that came in this round; `chunks` are the layer's from `at` on. Blocks on the disk.
    pub(crate) fn land<'a>(
        &self,
        round: u64,
        at: u64,
        chunks: impl IntoIterator<Item = &'a Bytes>,
    ) -> io::Result<()> {
        let now = self.round.read().unwrap_or_else(PoisonError::into_inner);
        if *now != round {
            return Err(io::Error::other("came too late"));
        }
        let mut end = at;
        for chunk in chunks {
            self.spool.write(end, chunk)?;
            end += chunk.len() as u64;
        }
        let mut state = self.lock();
        state.here.insert(at..end);
        state.unsaved += end - at;
        state.trouble = None;
        drop(state);
        self.arrivals.send_modify(|n| *n += 1);
        Ok(())
    }

    /// How a piece comes, where it comes as frames, and what of the blob to fetch for it.
    pub(crate) fn unpack(
        &self,
        range: &Range<u64>,
        compression: Compression,
    ) -> (Unpack, Range<u64>) {
        Unpack::new(&self.frames, compression, range)
    }

    /// As [`Landing::land`], of frames: `chunks` are the blob's behind those that `unpack` has taken.
    ///
    /// # Errors
    ///
    /// Also where a frame is not what it should be; those before it have landed.
    pub(crate) fn land_frames(
        &self,
        round: u64,
        unpack: &mut Unpack,
        chunks: &[Bytes],
    ) -> Result<(), Unlanded> {
        let (mut at, mut whole) = (None, Vec::new());
        let taken = unpack.take(&self.frames, chunks, |start, content| {
            at.get_or_insert(start);
            whole.push(content);
        });
        if let Some(at) = at {
            self.land(round, at, &whole).map_err(Unlanded::Disk)?;
        }
        taken.map_err(|WrongFrame(why)| Unlanded::Wrong(why))
    }

    /// What of the blob the frames travel in that are not here.
    pub(crate) fn missing_frames_bytes(&self) -> u64 {
        let state = self.lock();
        let missing = self.frames.iter().filter(|frame| !state.here.covers(&frame.content));
        missing.map(|frame| frame.packed.end - frame.packed.start).sum()
    }

    /// What to fetch next, which is under way from then on; with `asked_only` what somebody waits for.
    pub(crate) fn next(&self, asked_only: bool) -> Option<Piece> {
        let round = *self.round.read().unwrap_or_else(PoisonError::into_inner);
        let mut state = self.lock();
        let state = &mut *state;
        while let Some(wanted) = state.asked.front() {
            let Some(gap) = state.taken.gap(wanted) else {
                state.asked.pop_front();
                continue;
            };
            // A little more than was asked for, but nothing of another file.
            let file = self.spool.place(gap.start).map_or(gap.end, |file| file.range.end);
            let ahead = gap.start..file.min(gap.start + PIECE_BYTES);
            let range = self.frames.whole(&state.taken.gap(&ahead).unwrap_or(gap), PIECE_BYTES);
            state.follow = range.end..file;
            state.taken.insert(range.clone());
            return Some(Piece { range, want: Want::Asked, round });
        }
        if asked_only {
            return None;
        }
        let follows = state.taken.gap(&state.follow).map(|gap| (gap, Want::Follows));
        let (gap, want) = follows.or_else(|| {
            loop {
                match state.taken.gap(self.order.get(state.ordered)?) {
                    Some(gap) => return Some((gap, Want::InOrder)),
                    None => state.ordered += 1,
                }
            }
        })?;
        let range = gap.start..gap.end.min(gap.start + PIECE_BYTES);
        let range = self.frames.whole(&range, PIECE_BYTES);
        state.taken.insert(range.clone());
        Some(Piece { range, want, round })
    }

    /// Begins a new round: what is under way will not land any more, and is to be fetched again. Blocks
    /// while something is being written, so that no byte is written after somebody has read it.
    pub(crate) fn give_back(&self, why: &str) {
        let mut round = self.round.write().unwrap_or_else(PoisonError::into_inner);
        *round += 1;
        let mut state = self.lock();
        state.taken = state.here.clone();
        (state.ordered, state.follow) = (0, 0..0);
        state.trouble = Some(why.to_owned());
        drop((state, round));
        // Who waits asks again.
        self.arrivals.send_modify(|n| *n += 1);
    }

    /// Why nothing comes at present, where something went wrong that may pass.
    pub(crate) fn trouble(&self) -> Option<String> {
        self.lock().trouble.clone()
    }

    /// Waits until somebody has asked for something, since `seen`.
    pub(crate) fn questions(&self) -> watch::Receiver<u64> {
        self.questions.subscribe()
    }

    /// Whether `range` of the blob can be read.
    pub(crate) fn has(&self, range: &Range<u64>) -> Result<bool, End> {
        let state = self.lock();
        match &state.end {
            Some(end @ End::Wrong(_)) => Err(end.clone()),
            _ if state.here.covers(range) => Ok(true),
            Some(end) => Err(end.clone()),
            None => Ok(false),
        }
    }

    /// Asks for `range` of the blob and waits until it is here.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future gives up the wait; what was asked for comes all the same.
    pub(crate) async fn wait(&self, range: &Range<u64>) -> Result<(), End> {
        let mut arrivals = self.arrivals.subscribe();
        if self.has(range)? {
            return Ok(());
        }
        loop {
            self.ask(range);
            // The sender is this landing's own.
            let _ = arrivals.changed().await;
            if self.has(range)? {
                return Ok(());
            }
        }
    }

    fn ask(&self, range: &Range<u64>) {
        let mut state = self.lock();
        if state.taken.covers(range) {
            // It is under way; what comes behind it is wanted soon.
            let end = self.spool.place(range.start).map_or(range.end, |file| file.range.end);
            state.follow = range.end.min(end)..end;
            return;
        }
        if state.asked.contains(range) {
            return;
        }
        state.asked.push_back(range.clone());
        drop(state);
        self.questions.send_modify(|n| *n += 1);
    }

    /// Waits until all is here.
    pub(crate) async fn whole(&self) {
        let mut arrivals = self.arrivals.subscribe();
        while self.lock().here.end_of_run(0) < self.spool.size {
            let _ = arrivals.changed().await;
        }
    }

    /// Up to where all from `at` on is here.
    pub(crate) fn end_of_run(&self, at: u64) -> u64 {
        self.lock().here.end_of_run(at)
    }

    /// Waits until the byte at `at` is here, and tells up to where all is then.
    pub(crate) async fn run_from(&self, at: u64) -> u64 {
        let mut arrivals = self.arrivals.subscribe();
        loop {
            let end = self.lock().here.end_of_run(at);
            if end > at || at == self.spool.size {
                return end;
            }
            let _ = arrivals.changed().await;
        }
    }

    /// Waits until so many bytes are here that are in no record.
    pub(crate) async fn unsaved(&self, bytes: u64) {
        let mut arrivals = self.arrivals.subscribe();
        while self.lock().unsaved < bytes {
            let _ = arrivals.changed().await;
        }
    }

    /// Waits until at most so many bytes are here that are in no record.
    pub(crate) async fn settled(&self, bytes: u64) {
        let mut arrivals = self.arrivals.subscribe();
        while self.lock().unsaved > bytes {
            let _ = arrivals.changed().await;
        }
    }

    /// Puts what is here on the disk, and records it for the next pull. Blocks.
    pub(crate) fn save(&self, ingest: &Ingest) -> Result<(), StoreError> {
        let (here, unsaved) = {
            let state = self.lock();
            (state.here.clone(), state.unsaved)
        };
        self.spool.sync().map_err(|e| disk(&self.spool, e))?;
        ingest.save_landed(&Landed { here, table: self.table })?;
        let mut state = self.lock();
        // Another save, that was given up, may have counted the same.
        state.unsaved = state.unsaved.saturating_sub(unsaved);
        drop(state);
        self.arrivals.send_modify(|n| *n += 1);
        Ok(())
    }

    /// Tells everybody that this is the end. The first one counts.
    pub(crate) fn end(&self, end: End) {
        self.lock().end.get_or_insert(end);
        self.arrivals.send_modify(|n| *n += 1);
    }

    /// Bytes of the layer, uncompressed.
    pub(crate) fn size(&self) -> u64 {
        self.spool.size
    }

    /// Of these, bytes that are here.
    pub(crate) fn here_bytes(&self) -> u64 {
        self.lock().here.total()
    }

    /// Opens the file that begins at `begins` of the blob, to read it. Blocks.
    pub(crate) fn open(&self, begins: u64) -> io::Result<File> {
        let file = self.spool.place(begins).map_err(|_| io::ErrorKind::NotFound)?;
        match File::open(self.spool.folder.join(file.name())) {
            // It has its name by now.
            Err(e) if e.kind() == io::ErrorKind::NotFound => match file.object.get() {
                Some(object) => File::open(object),
                None => Err(e),
            },
            opened => opened,
        }
    }
}

fn disk(spool: &Spool, source: io::Error) -> StoreError {
    StoreError::io(format!("write below {}", spool.folder.display()), source)
}

/// Why bytes of a blob did not land.
#[derive(Debug)]
pub(crate) enum Unlanded {
    /// They are others than they should be.
    Wrong(String),
    /// The disk.
    Disk(io::Error),
}

/// Reads a landing in the layer's order.
pub(crate) struct Verifier {
    at: u64,
    hash: Sha256,
    content: blake3::Hasher,
    objects: Vec<ObjectId>,
    buffer: Vec<u8>,
}

impl Verifier {
    pub(crate) fn new() -> Self {
        Self {
            at: 0,
            hash: Sha256::new(),
            content: blake3::Hasher::new(),
            objects: Vec::new(),
            buffer: Vec::new(),
        }
    }

    /// Bytes read so far.
    pub(crate) fn at(&self) -> u64 {
        self.at
    }

    /// Reads on up to `end`, all of which is here. Blocks.
    pub(crate) fn read(&mut self, landing: &Landing, end: u64) -> io::Result<()> {
        let spool = &landing.spool;
        self.buffer.resize(READ_BYTES, 0);
        while self.at < end {
            let (file, name, begins, until) = match spool.place(self.at) {
                Ok(file) => (Some(file), file.name(), file.range.start, file.range.end),
                Err(until) => (None, REST.to_owned(), 0, until),
            };
            let source = File::open(spool.folder.join(name))?;
            while self.at < until.min(end) {
                let length = (until.min(end) - self.at).min(READ_BYTES as u64) as usize;
                let bytes = &mut self.buffer[..length];
                source.read_exact_at(bytes, self.at - begins)?;
                self.hash.update(&*bytes);
                if file.is_some() {
                    self.content.update(bytes);
                }
                self.at += length as u64;
            }
            if let Some(file) = file
                && self.at == until
            {
                self.objects.push(ObjectId::new(self.content.finalize(), file.executable));
                self.content.reset();
            }
        }
        Ok(())
    }

    /// The blob's digest.
    pub(crate) fn digest(&self) -> Digest {
        Digest::from_sha256(self.hash.clone().finalize().into())
    }

    /// Makes the files ready for their names: all is on the disk afterwards. Blocks.
    pub(crate) fn finish(self, landing: &Landing, root: &Path) -> Result<Vec<Staged>, StoreError> {
        let spool = &landing.spool;
        let mut staged = Vec::new();
        for (file, object) in spool.files.iter().zip(self.objects) {
            let made = || {
                let made = File::open(spool.folder.join(file.name()))?;
                rustix::fs::fchmod(made.as_fd(), object_mode(file.executable))?;
                rustix::fs::futimens(made.as_fd(), &EPOCH)?;
                file.dirty.store(true, Ordering::Release);
                io::Result::Ok(())
            };
            made().map_err(|e| disk(spool, e))?;
            // Known before the rename, so that who opens it finds it under one name or the other.
            let _ = file.object.set(root.join("objects").join(object.path()));
            staged.push(Staged { name: file.name(), object, size: file.length() });
        }
        spool.sync().map_err(|e| disk(spool, e))?;
        Ok(staged)
    }
}

#[cfg(test)]
#[path = "landing_tests.rs"]
mod tests;
