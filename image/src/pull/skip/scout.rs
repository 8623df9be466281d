//! Looking for what of one layer is here: small reads of it, compared with what the store has.
//!
//! A [`Scout`] knows a layer and what the store has by size; it leaves the local files that it found, linked into
//! the layer's folder, and the bytes that came meanwhile. One that ends early leaves what it found until then.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use futures_util::future::join_all;

use super::alike::{
    HASH_BUDGET_BYTES, HASHED_BYTES, SAMPLE_BYTES, first_linked, is_known, is_like, local_files,
    of_size, samples,
};
use super::length;
use crate::digest::ObjectId;
use crate::layer::tar::{Event, MemberKind, Parser};
use crate::layer::{Local, overlaps};
use crate::manifest::Layer;
use crate::pull::layers::LayerState;
use crate::pull::{Inner, toc};
use crate::runtime::Snapshot;
use crate::source::Source;
use crate::store::{BySize, Candidate, MIN_FILE_BYTES, Store};

/// What is read at a header: the header with its extensions, and the first sample behind it.
const PROBE_BYTES: u64 = 2 * SAMPLE_BYTES;

/// What is read where members are small, so that one read shows many.
const WIDE_PROBE_BYTES: u64 = 64 * 1024;

/// Why nothing more is looked for.
pub(super) type Halt = String;

/// Looks for what of one layer is here.
pub(super) struct Scout<'a> {
    inner: &'a Inner,
    source: Arc<dyn Source>,
    layer: Layer,
    folder: Arc<PathBuf>,
    by_size: Arc<BySize>,
    /// The layer as the container runtime has it unpacked.
    pub(super) snapshot: Option<Arc<Snapshot>>,
    state: LayerState,
    /// What came meanwhile, by its place in the blob, in order, without overlaps.
    pub(super) held: Vec<(u64, Bytes)>,
    pub(super) locals: Vec<Local>,
    requests: u64,
    /// Where what must be read of the blob ends.
    pub(super) end: u64,
}

impl<'a> Scout<'a> {
    /// Nothing is found yet, and all of the blob must be read.
    pub(super) fn new(
        inner: &'a Inner,
        source: Arc<dyn Source>,
        layer: Layer,
        folder: PathBuf,
        by_size: Arc<BySize>,
        state: LayerState,
    ) -> Self {
        Self {
            inner,
            source,
            layer,
            folder: Arc::new(folder),
            by_size,
            snapshot: None,
            state,
            held: Vec::new(),
            locals: Vec::new(),
            requests: 0,
            end: layer.blob.size,
        }
    }

    /// A tar: from header to header.
    pub(super) async fn walk(
        &mut self,
        mut parser: Parser,
        begun: Option<(u64, bool)>,
    ) -> Result<(), Halt> {
        let size = self.layer.blob.size;
        let smallest = match &self.snapshot {
            Some(_) => MIN_FILE_BYTES,
            None => self.by_size.keys().next().copied().unwrap_or(u64::MAX),
        };
        let mut probe = PROBE_BYTES;
        if let Some((length, executable)) = begun {
            self.member(None, parser.offset(), length, executable).await?;
        }
        parser.skip();
        while !parser.is_done() && size.saturating_sub(parser.offset()) > smallest {
            if self.requests > self.allowance() {
                return Err("its members are too small to look at each".to_owned());
            }
            let at = parser.offset();
            let bytes = self.read(at..(at + probe).min(size)).await?;
            let mut input = &bytes[..];
            probe = WIDE_PROBE_BYTES;
            while !input.is_empty() {
                let (used, event) = parser.next(input).map_err(|e| e.to_string())?;
                input = &input[used..];
                let Event::Member(member) = event else { continue };
                let begins = parser.offset();
                if let MemberKind::File { size: length, executable } = member.kind {
                    self.member(Some(member.path), begins, length, executable).await?;
                    probe = if length < MIN_FILE_BYTES { WIDE_PROBE_BYTES } else { PROBE_BYTES };
                }
                parser.skip();
                let skipped = usize::try_from(parser.offset() - begins).unwrap_or(usize::MAX);
                input = input.get(skipped..).unwrap_or_default();
            }
        }
        Ok(())
    }

    /// Looks whether a tar's file, whose content begins there, is here: in the store, or in the layer's
    /// snapshot under its `path`.
    async fn member(
        &mut self,
        path: Option<String>,
        begins: u64,
        size: u64,
        executable: bool,
    ) -> Result<(), Halt> {
        let end = begins.saturating_add(size);
        if end > self.layer.blob.size {
            return Err("a file in it is longer than the layer".to_owned());
        }
        let candidates = self.candidates(size, executable);
        let range = begins..end;
        if let Some((name, object)) = self.sampled(candidates, begins, size).await? {
            let object = Some(object);
            self.found(Local { name, object, executable, size, range, again: 0, known: 0 });
        } else if let (Some(snapshot), Some(path)) = (&self.snapshot, path)
            && size >= MIN_FILE_BYTES
        {
            let name = format!("adopted-{begins}");
            let (snapshot, to) = (Arc::clone(snapshot), self.folder.join(&name));
            if self.disk(move |_| snapshot.link(&path, size, executable, &to)).await? {
                let object = None;
                self.found(Local { name, object, executable, size, range, again: 0, known: 0 });
            }
        }
        Ok(())
    }

    /// Requests that a walk may take: each costs a round trip, which must be small beside what is
    /// fetched or saved.
    fn allowance(&self) -> u64 {
        const MIB: u64 = 1024 * 1024;
        let found: u64 = self.locals.iter().map(|local| local.size).sum();
        16 + self.layer.blob.size / (64 * MIB) + found / (4 * MIB)
    }

    /// A raw file: an object of its size, and of its very digest where that costs little. Samples are
    /// taken in any case: a file's digest may be known to who has no right to the file, and the
    /// source is to show that it has what it names. With `surely` samples alone do not do.
    pub(super) async fn raw(&mut self, surely: bool) -> Result<(), Halt> {
        let (size, wanted) = (self.layer.blob.size, self.layer.blob.digest);
        let mut candidates = self.candidates(size, false);
        candidates.retain(|candidate| candidate.sha256.is_none_or(|known| known == wanted));
        candidates.sort_by_key(|candidate| candidate.sha256.is_none());
        if candidates.first().is_some_and(|first| first.sha256.is_none())
            && (surely || size <= HASHED_BYTES)
        {
            let (sizes, mut budget) = (Arc::clone(&self.inner.sizes), HASH_BUDGET_BYTES);
            let hashed = self.disk(move |store| {
                candidates.into_iter().find(|candidate| {
                    is_known(store, candidate, (size, wanted), &mut budget, &sizes)
                })
            });
            candidates = hashed.await?.into_iter().collect();
        } else if surely {
            candidates.retain(|candidate| candidate.sha256.is_some());
        }
        if let Some((name, object)) = self.sampled(candidates, 0, size).await? {
            let (object, range) = (Some(object), 0..size);
            self.found(Local { name, object, executable: false, size, range, again: 0, known: 0 });
        }
        Ok(())
    }

    /// A compressed tar with a table of contents.
    pub(super) async fn table(&mut self, start: u64) -> Result<(), Halt> {
        let size = self.layer.blob.size;
        let tail = self.read(size.saturating_sub(toc::TAIL_BYTES)..size).await?;
        let footer = toc::footer(&tail, size, self.layer.compression)
            .ok_or_else(|| "it has no table of contents".to_owned())?;
        let bytes = self.read(footer.toc.clone()).await?;
        let (by_size, folder) = (Arc::clone(&self.by_size), Arc::clone(&self.folder));
        let end = footer.end;
        let found = self.disk(move |store| {
            let files = toc::parse(&footer, &bytes)?;
            Ok::<_, Halt>(local_files(store, &files, &by_size, end, &folder))
        });
        self.locals = found.await??;
        // What an interrupted pull has is not taken once more.
        self.locals.retain(|local| local.range.start >= start);
        self.end = end;
        Ok(())
    }

    fn candidates(&self, size: u64, executable: bool) -> Vec<Candidate> {
        of_size(&self.by_size, size, executable).collect()
    }

    /// One of the candidates, of `size`, whose samples are those of the blob at `begins`; its link.
    async fn sampled(
        &mut self,
        mut candidates: Vec<Candidate>,
        begins: u64,
        size: u64,
    ) -> Result<Option<(String, ObjectId)>, Halt> {
        let places = samples(size);
        // The first is in memory already, and most others show there that they are others.
        for places in [&places[..1], &places[1..]] {
            if candidates.is_empty() {
                return Ok(None);
            }
            let ranges: Vec<_> =
                places.iter().map(|at| begins + at..begins + at + SAMPLE_BYTES).collect();
            self.fetch(&ranges).await?;
            let mut known = Vec::new();
            for (at, range) in places.iter().zip(&ranges) {
                known.push((*at, self.at_hand(range)?));
            }
            let same = self.disk(move |store| {
                candidates.retain(|candidate| is_like(store, candidate, size, &known));
                candidates
            });
            candidates = same.await?;
        }
        let folder = Arc::clone(&self.folder);
        self.disk(move |store| first_linked(store, candidates, size, &folder)).await
    }

    fn found(&mut self, local: Local) {
        self.locals.push(local);
    }

    /// A range of the blob.
    async fn read(&mut self, range: Range<u64>) -> Result<Bytes, Halt> {
        self.fetch(std::slice::from_ref(&range)).await?;
        self.at_hand(&range)
    }

    /// Fetches what of `ranges` has not come yet, side by side.
    async fn fetch(&mut self, ranges: &[Range<u64>]) -> Result<(), Halt> {
        let mut missing = Vec::new();
        for range in ranges {
            let mut at = range.start;
            for (part, _) in overlaps(range, &self.held) {
                missing.push(at..part.start);
                at = part.end;
            }
            missing.push(at..range.end);
        }
        missing.retain(|range| !range.is_empty());
        self.requests += missing.len() as u64;
        let reads = missing.iter().map(|range| {
            let (source, state) = (Arc::clone(&self.source), self.state.clone());
            self.inner.fetcher.read(source, self.layer.blob, range.clone(), state)
        });
        let mut outcome = Ok(());
        for (range, read) in missing.iter().zip(join_all(reads).await) {
            match read {
                Ok(Some(bytes)) => self.held.push((range.start, bytes)),
                Ok(None) => outcome = Err(format!("{} serves no ranges", self.source.name())),
                Err(error) => outcome = Err(error.to_string()),
            }
        }
        self.held.sort_by_key(|(start, _)| *start);
        outcome
    }

    /// A range that has come.
    fn at_hand(&self, range: &Range<u64>) -> Result<Bytes, Halt> {
        let mut parts: Vec<Bytes> = overlaps(range, &self.held).map(|(_, bytes)| bytes).collect();
        let bytes = match parts.len() {
            1 => parts.swap_remove(0),
            _ => parts.iter().flatten().copied().collect::<BytesMut>().freeze(),
        };
        if bytes.len() as u64 == length(range) {
            Ok(bytes)
        } else {
            Err("it ended early".to_owned())
        }
    }

    async fn disk<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Store) -> T + Send + 'static,
    ) -> Result<T, Halt> {
        self.inner.disk(move |store| Ok(work(store))).await.map_err(|e| e.to_string())
    }
}
