//! Skip before download: which parts of a layer the store has already.
//!
//! ```text
//! layer, what the store has by size ─► scout: a few small reads ─► Plan ─► fetch what is missing
//! ```
//!
//! What is looked at depends on the layer:
//!
//! - *an uncompressed tar*: its headers one after the other; where a stored object has a file's
//!   size, a few samples of both are compared; and where the container runtime has the layer unpacked,
//!   the file of that path and size is taken for it;
//! - *zstd:chunked and eStargz* ([`toc`]): the table of contents, whose digests are compared with
//!   those of stored objects;
//! - *a raw file*: objects of its size, by SHA-256 where that is known or cheap, and by samples;
//! - anything else has no places to look at, and is fetched.
//!
//! # What always holds
//!
//! - **Nothing here is trusted.** A plan is a guess, which the digest over the whole layer proves or
//!   refutes ([`crate::layer::Plan`]). Whatever a source says here costs at most a plain fetch.
//! - **Looking costs less than it can save**: where the store has nothing of a fitting size nothing
//!   is asked, and requests, bytes, and local reads are bounded.
//! - **No byte is fetched twice**: what came while looking becomes part of the plan.

use std::collections::{BTreeMap, HashSet};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use bytes::{Bytes, BytesMut};
use futures_util::future::join_all;
use sha2::{Digest as _, Sha256};
use tokio_util::sync::CancellationToken;

use super::Inner;
use super::arrive::Shown;
use super::layers::LayerState;
use super::meter::Meter;
use super::slots::{Priority, Urgency};
use super::toc::{self, TocFile};
use crate::digest::{Digest, ObjectId};
use crate::layer::tar::{Event, MemberKind, Parser};
use crate::layer::{FileReader, Local, Outset, Plan, Told, overlaps};
use crate::manifest::{Compression, Content, Layer, PlacedLayer};
use crate::runtime::{Snapshot, chain_ids};
use crate::source::Source;
use crate::store::{BySize, Candidate, MIN_FILE_BYTES, Sizes, Store};

/// Bytes of a sample. One block of a disk; a file of weights that differs at all differs nearly
/// everywhere.
const SAMPLE_BYTES: u64 = 4096;

/// What is read at a header: the header with its extensions, and the first sample behind it.
const PROBE_BYTES: u64 = 2 * SAMPLE_BYTES;

/// What is read where members are small, so that one read shows many.
const WIDE_PROBE_BYTES: u64 = 64 * 1024;

/// Up to here a candidate is rather hashed than sampled over the network.
pub(super) const HASHED_BYTES: u64 = 64 * 1024 * 1024;

/// Local bytes that are hashed before a layer is fetched.
pub(super) const HASH_BUDGET_BYTES: u64 = 1024 * 1024 * 1024;

/// What a skipped file must save of the blob to be worth its request, and how much more than that
/// it may be: what compresses so well is fetched soon, and bounds what a hostile table makes us read.
const MIN_SAVED_BYTES: u64 = 64 * 1024;
const MOST_COMPRESSED: u64 = 64;

/// Layers that are looked at side by side, before any is begun.
const LOOKS: usize = 4;

/// What a plan is made for.
pub(super) struct Subject {
    pub(super) source: Arc<dyn Source>,
    pub(super) layer: Layer,
    pub(super) diff_id: Option<Digest>,
    /// What the container runtime calls the layer over those below it.
    pub(super) chain: Option<Digest>,
    pub(super) outset: Outset,
    pub(super) state: LayerState,
}

impl Inner {
    /// Where the layer's bytes are to come from: the network alone, if need be.
    ///
    /// # Cancel safety
    ///
    /// Ends at once when `stop` is cancelled, with the plan as it is then.
    pub(super) async fn plan(&self, subject: Subject, stop: &CancellationToken) -> Plan {
        let Subject { source, layer, diff_id, chain, outset, state } = subject;
        let rest = outset.offset..layer.blob.size;
        if rest.end - rest.start < MIN_FILE_BYTES {
            return Plan::plain(rest);
        }
        let snapshot = match (layer.content, layer.compression, chain, self.sources.runtime()) {
            (Content::Tar, Compression::None, Some(chain), Some(runtime)) => {
                runtime.snapshot(&chain, &self.store).await.map(Arc::new)
            }
            _ => None,
        };
        let by_size = match self.by_size(&layer).await {
            Some(by_size) => by_size,
            None if snapshot.is_some() => Arc::default(),
            None => return Plan::plain(rest),
        };
        let mut scout = Scout {
            inner: self,
            source,
            layer,
            folder: Arc::new(outset.folder),
            by_size,
            snapshot,
            state: state.clone(),
            held: Vec::new(),
            locals: Vec::new(),
            requests: 0,
            end: rest.end,
        };
        let looking = async {
            match (layer.content, layer.compression, outset.parser) {
                (Content::Tar, Compression::None, Some(parser)) => {
                    scout.walk(parser, outset.begun).await
                }
                (Content::Tar, Compression::Gzip | Compression::Zstd, _) if diff_id.is_some() => {
                    scout.table(rest.start).await
                }
                (Content::File, Compression::None, _) if rest.start == 0 => scout.raw(false).await,
                _ => Ok(()),
            }
        };
        let looked = tokio::select! {
            () = stop.cancelled() => Ok(()),
            looked = looking => looked,
        };
        if let Err(why) = looked {
            tracing::debug!(layer = %layer.blob.digest, why, "looking no further for what is here");
        }
        let Scout { held, locals, end, snapshot, .. } = scout;
        // A look that was cut off may have it still.
        if let Some(snapshot) = snapshot.and_then(Arc::into_inner) {
            snapshot.end().await;
        }
        // Only with local files can the rest of the blob be left out.
        let end = if locals.is_empty() { rest.end } else { end };
        let known: u64 = overlaps(&(end..rest.end), &held).map(|(part, _)| length(&part)).sum();
        state.meter.skip(rest.end - end - known);
        if !locals.is_empty() {
            let bytes: u64 = locals.iter().map(|local| local.size).sum();
            tracing::info!(layer = %layer.blob.digest, files = locals.len(), bytes, "found here already");
        }
        let stop = stop.clone();
        let told: Told = Arc::new(move |bytes| {
            state.meter.skip(bytes);
            !stop.is_cancelled()
        });
        Plan::of(rest.start..end, locals, &held, told)
    }

    /// What the store has by size; nothing where it has nothing, or cannot tell.
    pub(super) async fn by_size(&self, layer: &Layer) -> Option<Arc<BySize>> {
        let sizes = Arc::clone(&self.sizes);
        let by_size = self.disk(move |store| {
            store.refresh(&mut sizes.lock().unwrap_or_else(PoisonError::into_inner))
        });
        match by_size.await {
            Ok(by_size) => Some(by_size).filter(|by_size| !by_size.is_empty()),
            Err(error) => {
                tracing::warn!(layer = %layer.blob.digest, %error, "not looking for what is here");
                None
            }
        }
    }

    /// The object that a raw layer is, by its SHA-256, linked into `folder`.
    pub(super) async fn known_raw(
        &self,
        source: &Arc<dyn Source>,
        layer: Layer,
        folder: &std::path::Path,
        state: &LayerState,
    ) -> Option<(String, ObjectId)> {
        if layer.blob.size < MIN_FILE_BYTES {
            return None;
        }
        let mut scout = Scout {
            inner: self,
            source: Arc::clone(source),
            layer,
            folder: Arc::new(folder.to_owned()),
            by_size: self.by_size(&layer).await?,
            snapshot: None,
            state: state.clone(),
            held: Vec::new(),
            locals: Vec::new(),
            requests: 0,
            end: layer.blob.size,
        };
        if let Err(why) = scout.raw(true).await {
            tracing::debug!(layer = %layer.blob.digest, why, "not looking for what is here");
        }
        scout.locals.pop().and_then(|local| Some((local.name, local.object?)))
    }

    /// Lowers what `coming` says of missing layers to what would be fetched of each, where the store
    /// has the rest. Nothing is kept of it but the figure.
    ///
    /// # Cancel safety
    ///
    /// What has not been looked at keeps its figure.
    pub(super) async fn lower(
        &self,
        source: &Arc<dyn Source>,
        layers: &[PlacedLayer],
        coming: &mut BTreeMap<String, u64>,
    ) {
        let chains = chains(layers);
        let mut missing: Vec<_> = layers.iter().map(PlacedLayer::key).zip(chains).collect();
        missing.sort_unstable();
        missing.dedup_by_key(|(key, _)| *key);
        missing.retain(|((layer, _), _)| coming.contains_key(&layer.record_name()));
        for some in missing.chunks(LOOKS) {
            let mut looks = Vec::new();
            for (key, chain) in some {
                looks.push(self.would_fetch(source, *key, *chain));
            }
            for (((layer, _), _), bytes) in some.iter().zip(join_all(looks).await) {
                if let (Some(figure), Some(bytes)) = (coming.get_mut(&layer.record_name()), bytes) {
                    *figure = bytes.min(*figure);
                }
            }
        }
    }

    /// What of a layer would be fetched, if it were begun now; `None` where that cannot be told.
    async fn would_fetch(
        &self,
        source: &Arc<dyn Source>,
        (layer, diff_id): (Layer, Option<Digest>),
        chain: Option<Digest>,
    ) -> Option<u64> {
        // Candidates are linked, so that they stay while they are looked at.
        let folder = self.disk(Store::scratch).await.ok()?;
        let outset = Outset {
            folder: folder.path().to_owned(),
            offset: 0,
            parser: (layer.content == Content::Tar).then(Parser::new),
            begun: None,
        };
        let state = LayerState {
            meter: Arc::new(Meter::new(Instant::now())),
            urgency: Arc::new(Urgency::new(Priority::Demand)),
            shown: Shown::default(),
        };
        let source = Arc::clone(source);
        let subject = Subject { source, layer, diff_id, chain, outset, state };
        let plan = self.plan(subject, &CancellationToken::new()).await;
        // What is taken over counts towards a quota, though it costs the disk nothing.
        let has_quota = self.store.limits().quota_bytes.is_some();
        let adopted = plan.locals().filter(|local| has_quota && local.object.is_none());
        let adopted_bytes: u64 = adopted.map(|local| local.size).sum();
        let network_bytes: u64 = plan.network().iter().map(length).sum();
        let bytes = network_bytes + plan.held() + adopted_bytes;
        // Removing it is disk work, too; a failure leaves it to the next start.
        let removed = move |_: &Store| {
            drop(folder);
            Ok(())
        };
        let _ = self.disk(removed).await;
        Some(bytes)
    }

    /// After a plan turned out wrong: takes away those of its objects that are damaged, since a
    /// layer that brings them again could not replace them.
    pub(super) async fn suspect(&self, objects: HashSet<ObjectId>) {
        for object in objects {
            match self.disk(move |store| store.drop_if_damaged(&object)).await {
                Ok(true) => tracing::error!(
                    %object,
                    "an object is damaged on the disk and is fetched again; images that were made \
                     of it keep it"
                ),
                Ok(false) => {}
                Err(error) => tracing::warn!(%object, %error, "cannot look at an object"),
            }
        }
    }
}

/// What the container runtime calls each layer over those below it, where the image says what they
/// unpack to.
pub(super) fn chains(layers: &[PlacedLayer]) -> Vec<Option<Digest>> {
    let diff_ids: Option<Vec<Digest>> = layers.iter().map(|placed| placed.diff_id).collect();
    match diff_ids {
        Some(diff_ids) => chain_ids(diff_ids).into_iter().map(Some).collect(),
        None => vec![None; layers.len()],
    }
}

/// Looks for what of one layer is here.
struct Scout<'a> {
    inner: &'a Inner,
    source: Arc<dyn Source>,
    layer: Layer,
    folder: Arc<std::path::PathBuf>,
    by_size: Arc<BySize>,
    /// The layer as the container runtime has it unpacked.
    snapshot: Option<Arc<Snapshot>>,
    state: LayerState,
    /// What came meanwhile, by its place in the blob, in order, without overlaps.
    held: Vec<(u64, Bytes)>,
    locals: Vec<Local>,
    requests: u64,
    /// Where what must be read of the blob ends.
    end: u64,
}

/// Why nothing more is looked for.
type Halt = String;

impl Scout<'_> {
    /// A tar: from header to header.
    async fn walk(&mut self, mut parser: Parser, begun: Option<(u64, bool)>) -> Result<(), Halt> {
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
    async fn raw(&mut self, surely: bool) -> Result<(), Halt> {
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
    async fn table(&mut self, start: u64) -> Result<(), Halt> {
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

/// The files of a table of contents that are here, linked, with what of the blob they stand for.
fn local_files(
    store: &Store,
    files: &[TocFile],
    by_size: &BySize,
    end: u64,
    folder: &std::path::Path,
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

pub(super) fn first_linked(
    store: &Store,
    candidates: Vec<Candidate>,
    size: u64,
    folder: &std::path::Path,
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

pub(super) fn of_size(
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
pub(super) fn is_known(
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

pub(super) fn is_like(
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
fn samples(size: u64) -> Vec<u64> {
    const MIB: u64 = 1024 * 1024;
    let parts = match size / MIB {
        ..16 => 2,
        16..256 => 4,
        _ => 8,
    };
    (0..=parts).map(|part| size.saturating_sub(SAMPLE_BYTES) / parts * part).collect()
}

fn length(range: &Range<u64>) -> u64 {
    range.end.saturating_sub(range.start)
}

#[cfg(test)]
#[path = "skip/tests.rs"]
mod tests;
