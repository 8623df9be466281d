//! A layer's way from the wire into the store, in one pass.
//!
//! ```text
//!              this thread                     a thread of its own
//! chunks ─► SHA-256 (digest) ─► decompress ─► SHA-256 (diff_id) ─► tar ─► BLAKE3, disk
//! ```
//!
//! A raw layer is one file and goes past the tar reader; its record has one entry without a path,
//! since its name is the manifest's to give. Artifacts need not say a diff_id: the digest of the
//! blob then answers for all that comes out of it.
//!
//! A part of the blob may be here already, as an object: a [`Plan`] says so, and that object's bytes
//! are hashed in place of those that are not fetched. The digest over everything is the proof: that
//! of the blob where the blob is uncompressed, else the diff_id, since of a compressed blob not all
//! bytes are seen then. What only the diff_id proves is kept under both names
//! ([`Layer::record_name_as`]).
//!
//! Chunks of the blob come in, in order; files land in the layer's [`Ingest`]
//! folder, and are named only after both digests match. Two threads, because
//! hashing the blob and unpacking it cost about the same.
//!
//! # Going on after a stop
//!
//! Of an uncompressed layer a checkpoint is saved every [`CHECKPOINT_BYTES`] or so:
//! hash state, tar state, and what is on the disk. [`Resumed`] picks it up. The
//! unpacking thread chooses the places ([`Marks`]): there, nothing waits in its
//! buffer, so that no byte is written twice.
//! A compressed layer starts again: its decoder's state cannot be saved.

use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use sha2::digest::common::hazmat::{SerializableState, SerializedState};
use sha2::{Digest as _, Sha256};

use crate::digest::Digest;
use crate::manifest::{Compression, Layer};
use crate::store::{Ingest, LayerRecord, StoreError};

mod file;
mod plan;
mod sift;
pub(crate) mod tar;
mod unpack;

pub(crate) use file::{Buffer, FileReader};
pub(crate) use plan::{Local, Plan, Segment, Told, overlaps};
pub(crate) use sift::{Sifted, Wanted, sift};
pub(crate) use tar::clean_path;
use unpack::{Progress, Unpacker};

/// Bytes between two checkpoints: what a crash costs at most, beside what is on the wire. Each
/// costs a flush of the disk's cache, so much smaller would be felt.
const CHECKPOINT_BYTES: u64 = 32 * 1024 * 1024;

/// How far behind the hashing thread the unpacking one can be: the queue, in chunks of a MiB, and
/// some. A place that is nearer may have been passed already.
const LEAD_BYTES: u64 = 12 * 1024 * 1024;

/// Bytes that are fetched on, after a layer turned out unreadable, to learn whether it was altered.
const VERDICT_BYTES: u64 = 64 * 1024 * 1024;

/// Chunks between the two threads: enough to even out their pace, few enough to count for nothing.
const QUEUE: usize = 8;

/// Why a layer did not come in.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LayerError {
    /// Other bytes than the manifest names.
    #[error("{0}")]
    Mismatch(String),
    /// Bytes that match, and must not or cannot be unpacked.
    #[error("{0}")]
    Refused(String),
    /// The disk.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The chunks ended early: the fetch failed, or was stopped. What came is kept where it can be.
    #[error("stopped after {0} bytes")]
    Stopped(u64),
}

impl From<tar::TarError> for LayerError {
    fn from(error: tar::TarError) -> Self {
        Self::Refused(error.to_string())
    }
}

/// A chunk of the blob. `_credit` is let go when the chunk has been dealt with.
pub(crate) struct Chunk<C> {
    pub(crate) bytes: Bytes,
    pub(crate) _credit: C,
}

/// What came of a layer.
pub(crate) struct Done {
    /// Bytes of content written to the disk.
    pub(crate) written_bytes: u64,
}

/// A layer that is ready to take chunks from [`Resumed::offset`] on.
pub(crate) struct Resumed {
    ingest: Ingest,
    layer: Layer,
    diff_id: Option<Digest>,
    blob_hash: Sha256,
    unpacker: Unpacker,
    offset: u64,
    plan: Plan,
}

/// Where a layer's bytes go on, for who plans where they come from.
#[derive(Clone)]
pub(crate) struct Outset {
    /// The layer's ingest folder.
    pub(crate) folder: PathBuf,
    /// Bytes of the blob that need not come again.
    pub(crate) offset: u64,
    /// As it stands there, of a tar.
    pub(crate) parser: Option<tar::Parser>,
    /// The size of the file that has begun there, and whether it is executable, where nothing of it
    /// has come.
    pub(crate) begun: Option<(u64, bool)>,
}

/// `P` is [`Progress`], or a reference to it for writing.
#[derive(Serialize, Deserialize)]
struct Checkpoint<P> {
    /// Bytes of the blob that need not be fetched again.
    offset: u64,
    /// State of the SHA-256 over them, in hex.
    sha256: String,
    progress: P,
}

impl Resumed {
    /// Picks up what an earlier pull left in `ingest`, or begins at 0. Blocks on the disk.
    pub(crate) fn open(
        ingest: Ingest,
        layer: Layer,
        diff_id: Option<Digest>,
    ) -> Result<Self, StoreError> {
        if layer.compression == Compression::None
            && let Some(checkpoint) = ingest.checkpoint::<Checkpoint<Progress>>()
        {
            match Self::pick_up(&ingest, &layer, checkpoint) {
                Ok((blob_hash, unpacker, offset)) => {
                    let plan = Plan::plain(offset..layer.blob.size);
                    return Ok(Self { ingest, layer, diff_id, blob_hash, unpacker, offset, plan });
                }
                Err(why) => {
                    tracing::warn!(layer = %layer.blob.digest, %why, "starting the layer again");
                }
            }
        }
        ingest.clear()?;
        Ok(Self {
            ingest,
            layer,
            diff_id,
            blob_hash: Sha256::new(),
            unpacker: Unpacker::new(&layer),
            offset: 0,
            plan: Plan::plain(0..layer.blob.size),
        })
    }

    fn pick_up(
        ingest: &Ingest,
        layer: &Layer,
        checkpoint: Checkpoint<Progress>,
    ) -> io::Result<(Sha256, Unpacker, u64)> {
        let state = hex::decode(&checkpoint.sha256).map_err(io::Error::other)?;
        let state =
            SerializedState::<Sha256>::try_from(state.as_slice()).map_err(io::Error::other)?;
        let hash = Sha256::deserialize(&state).map_err(io::Error::other)?;
        let unpacker = Unpacker::resume(checkpoint.progress, layer, ingest)?;
        if unpacker.offset() != checkpoint.offset {
            return Err(io::Error::other("the checkpoint contradicts itself"));
        }
        Ok((hash, unpacker, checkpoint.offset))
    }

    /// Where in the blob the first chunk must start, in bytes.
    pub(crate) fn offset(&self) -> u64 {
        self.offset
    }

    /// As [`Resumed::offset`], and more.
    pub(crate) fn outset(&self) -> Outset {
        let parser = self.unpacker.parser().cloned();
        let folder = self.ingest.folder().to_owned();
        Outset { folder, offset: self.offset, parser, begun: self.unpacker.begun() }
    }

    /// Has the blob put together as `plan` says. A plan with local files for a compressed blob needs
    /// a diff_id.
    pub(crate) fn follow(&mut self, plan: Plan) {
        self.plan = plan;
    }

    /// Unpacks the chunks that `next` gives, those of the plan's network segments, until the blob is
    /// whole, verifies and commits it.
    ///
    /// Blocks. When `next` ends early, what came is kept for the next pull.
    pub(crate) fn unpack<C: Clone + Send>(
        self,
        mut next: impl FnMut() -> Option<Chunk<C>>,
    ) -> Result<Done, LayerError> {
        let Self { ingest, layer, diff_id, mut blob_hash, unpacker, offset, plan } = self;
        // Else the diff_id is the proof.
        let sees_blob = layer.compression == Compression::None || plan.locals().next().is_none();
        let (sender, receiver) = mpsc::sync_channel::<Step<C>>(QUEUE);
        let marks = Marks::default();
        let outcome = std::thread::scope(|scope| {
            let (ingest, marks) = (&ingest, &marks);
            let told = Arc::clone(&plan.told);
            let unpacking = scope.spawn(move || {
                Unpacking::new(ingest, layer, unpacker, told)?.run(&receiver, marks)
            });
            let mut front = Front { hash: &mut blob_hash, offset, layer, sender, marks };
            let fed = front.feed(plan, ingest, &mut next);
            let hashed = fed.and_then(|()| front.verify(sees_blob));
            drop(front);
            let unpacked = unpacking.join().unwrap_or_else(|_| {
                Err(LayerError::Refused("the unpacking thread died".to_owned()))
            });
            // Of two errors the deeper one tells why: when unpacking ends, hashing only finds a
            // closed queue. But bytes that do not match explain whatever unpacking made of them.
            match (hashed, unpacked) {
                (Err(e @ LayerError::Mismatch(_)), _) => Err(e),
                (Err(e @ LayerError::Stopped(_)), Err(LayerError::Stopped(_))) => Err(e),
                (_, Err(e)) => Err(e),
                (Err(e), _) => Err(e),
                (Ok(()), Ok(unpacked)) => Ok(unpacked),
            }
        });
        let (unpacked, found_diff_id) = match outcome {
            Ok(finished) => finished,
            Err(e @ LayerError::Stopped(1..)) if layer.compression == Compression::None => {
                return Err(e);
            }
            // Bytes that are wrong stay wrong, a full disk wants its room back, and a decoder's
            // state cannot be saved.
            Err(e) => {
                ingest.discard()?;
                return Err(e);
            }
        };
        // Uncompressed bytes are their own content.
        let found = found_diff_id.unwrap_or(layer.blob.digest);
        if let Some(diff_id) = diff_id
            && found != diff_id
        {
            ingest.discard()?;
            return Err(LayerError::Mismatch(format!(
                "unpacks to {found}, but the image's config says diff_id {diff_id}: the image is \
                 broken, build and push it again"
            )));
        }
        let record = LayerRecord {
            digest: layer.blob.digest,
            size_bytes: layer.blob.size,
            diff_id: found,
            entries: unpacked.entries,
        };
        let name = match sees_blob {
            true => layer.record_name(),
            false if diff_id.is_some() => layer.record_name_as(&found),
            false => {
                ingest.discard()?;
                return Err(LayerError::Mismatch("nothing says what it unpacks to".to_owned()));
            }
        };
        ingest.commit(name, record, unpacked.staged)?;
        Ok(Done { written_bytes: unpacked.written_bytes })
    }
}

/// What goes from the hashing thread to the unpacking thread.
enum Step<C> {
    /// Bytes of the blob, and what is held for them.
    Bytes(Bytes, Option<C>),
    /// A stored object in place of the next bytes.
    Local(Local),
    /// Everything before this is hashed to this state: a place to go on from.
    Mark(String),
    /// The blob is complete and is what its digest names.
    Verified,
}

/// Where in the blob the unpacking thread wants the next [`Step::Mark`]; 0 for nowhere.
#[derive(Default)]
struct Marks(AtomicU64);

impl Marks {
    fn wanted(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    fn want(&self, offset: u64) {
        self.0.store(offset, Ordering::Relaxed);
    }
}

/// The first thread's part.
struct Front<'a, C> {
    /// Over the blob, as far as it is seen.
    hash: &'a mut Sha256,
    offset: u64,
    layer: Layer,
    sender: mpsc::SyncSender<Step<C>>,
    marks: &'a Marks,
}

impl<C: Clone> Front<'_, C> {
    /// Only an uncompressed layer can be gone on with.
    fn resumable(&self) -> bool {
        self.layer.compression == Compression::None
    }

    fn feed(
        &mut self,
        plan: Plan,
        ingest: &Ingest,
        next: &mut impl FnMut() -> Option<Chunk<C>>,
    ) -> Result<(), LayerError> {
        for segment in plan.segments {
            match segment {
                Segment::Network(range) => {
                    while self.offset < range.end {
                        let Some(chunk) = next() else {
                            if self.resumable() {
                                self.mark()?;
                            }
                            return Err(LayerError::Stopped(self.offset));
                        };
                        if chunk.bytes.len() as u64 > range.end - self.offset {
                            return Err(LayerError::Mismatch(format!(
                                "is longer than the {} bytes it should have",
                                self.layer.blob.size
                            )));
                        }
                        self.bytes(chunk.bytes, Some(chunk._credit))?;
                    }
                }
                Segment::Held(bytes) => self.bytes(bytes, None)?,
                Segment::Local(local) => {
                    // Of a compressed blob the other thread has the hash.
                    if self.resumable() {
                        let mut hash = self.hash.clone();
                        if !hash_local(&mut hash, &local, ingest, &plan.told)? {
                            self.mark()?;
                            return Err(LayerError::Stopped(self.offset));
                        }
                        *self.hash = hash;
                    }
                    self.offset = local.range.end;
                    let large = local.size >= CHECKPOINT_BYTES;
                    self.send(Step::Local(local))?;
                    if self.resumable() && large {
                        self.mark()?;
                    }
                }
            }
        }
        Ok(())
    }

    fn bytes(&mut self, mut bytes: Bytes, credit: Option<C>) -> Result<(), LayerError> {
        let mark = self.marks.wanted();
        if self.resumable() && self.offset < mark && mark < self.offset + bytes.len() as u64 {
            let before = bytes.split_to((mark - self.offset) as usize);
            self.hash.update(&before);
            self.offset = mark;
            self.send(Step::Bytes(before, credit.clone()))?;
            self.mark()?;
        }
        self.hash.update(&bytes);
        self.offset += bytes.len() as u64;
        self.send(Step::Bytes(bytes, credit))
    }

    fn mark(&mut self) -> Result<(), LayerError> {
        self.send(Step::Mark(hex::encode(self.hash.serialize())))
    }

    /// The other thread is gone only with an error of its own. When that was about the bytes, the
    /// digest tells whether they were altered on their way; worth the rest of the blob if that is short.
    fn send(&self, step: Step<C>) -> Result<(), LayerError> {
        match self.sender.send(step) {
            Err(_) if self.layer.blob.size - self.offset > VERDICT_BYTES => {
                Err(LayerError::Stopped(0))
            }
            _ => Ok(()),
        }
    }

    fn verify(&mut self, sees_blob: bool) -> Result<(), LayerError> {
        let found = Digest::from_sha256(self.hash.clone().finalize().into());
        if sees_blob && found != self.layer.blob.digest {
            return Err(LayerError::Mismatch(format!(
                "its {} bytes hash to {found}: the source altered them",
                self.layer.blob.size
            )));
        }
        self.send(Step::Verified)
    }
}

/// Adds the bytes of a local file to `hash`; false where it was told to stop.
fn hash_local(
    hash: &mut Sha256,
    local: &Local,
    ingest: &Ingest,
    told: &Told,
) -> Result<bool, LayerError> {
    // As the blob's bytes are counted, of which the file may be a multiple.
    let unknown = (local.range.end - local.range.start).saturating_sub(local.known);
    let share =
        |read: u64| (u128::from(unknown) * u128::from(read) / u128::from(local.size.max(1))) as u64;
    let (mut read, mut goes_on) = (0, true);
    let result =
        FileReader::open(&ingest.folder().join(&local.name), local.size).and_then(|mut file| {
            file.read(0..local.size, |bytes| {
                hash.update(bytes);
                let before = share(read);
                read += bytes.len() as u64;
                goes_on = told(share(read) - before);
                goes_on
            })
        });
    match result {
        Ok(()) => Ok(goes_on),
        Err(e) => Err(LayerError::Mismatch(format!("object {} is unreadable: {e}", local.object))),
    }
}

/// The second thread's part.
struct Unpacking<'a> {
    ingest: &'a Ingest,
    compression: Compression,
    told: Told,
    decoder: Decoder<'a>,
}

/// Decompression, pushed from the front.
enum Decoder<'a> {
    None(Body<'a>),
    Gzip(Box<flate2::write::MultiGzDecoder<Body<'a>>>),
    Zstd(zstd::stream::write::Decoder<'static, Body<'a>>),
}

impl<'a> Decoder<'a> {
    fn start(compression: Compression, body: Body<'a>) -> Result<Self, LayerError> {
        Ok(match compression {
            Compression::None => Self::None(body),
            Compression::Gzip => Self::Gzip(Box::new(flate2::write::MultiGzDecoder::new(body))),
            Compression::Zstd => {
                let decoder = zstd::stream::write::Decoder::new(body);
                Self::Zstd(decoder.map_err(|e| LayerError::Refused(format!("zstd: {e}")))?)
            }
        })
    }
}

/// What comes out of the decoder.
struct Body<'a> {
    ingest: &'a Ingest,
    unpacker: Unpacker,
    /// Over what comes out; absent where the blob is the same bytes.
    hash: Option<Sha256>,
    /// Bytes that come out next and were taken from a local file already.
    again: u64,
    /// `Write` can only fail with an `io::Error`; the reason waits here.
    error: Option<LayerError>,
}

impl Write for Body<'_> {
    fn write(&mut self, all: &[u8]) -> io::Result<usize> {
        let known = usize::try_from(self.again).map_or(all.len(), |again| again.min(all.len()));
        self.again -= known as u64;
        let bytes = &all[known..];
        if let Some(hash) = &mut self.hash {
            hash.update(bytes);
        }
        match self.unpacker.write(bytes, self.ingest) {
            Ok(()) => Ok(all.len()),
            Err(e) => {
                self.error = Some(e);
                Err(io::Error::other("layer refused"))
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

type Finished = (unpack::Unpacked, Option<Digest>);

impl<'a> Unpacking<'a> {
    fn new(
        ingest: &'a Ingest,
        layer: Layer,
        unpacker: Unpacker,
        told: Told,
    ) -> Result<Self, LayerError> {
        let Layer { compression, .. } = layer;
        let hash = (compression != Compression::None).then(Sha256::new);
        let body = Body { ingest, unpacker, hash, again: 0, error: None };
        let decoder = Decoder::start(compression, body)?;
        Ok(Self { ingest, compression, told, decoder })
    }

    fn run<C>(
        mut self,
        steps: &mpsc::Receiver<Step<C>>,
        marks: &Marks,
    ) -> Result<Finished, LayerError> {
        let mut saved = self.offset();
        for step in steps {
            match step {
                Step::Bytes(bytes, _credit) => {
                    let written = match &mut self.decoder {
                        Decoder::None(body) => body.write_all(&bytes),
                        Decoder::Gzip(decoder) => decoder.write_all(&bytes),
                        Decoder::Zstd(decoder) => decoder.write_all(&bytes),
                    };
                    written.map_err(|e| self.reason(&e))?;
                    if let Decoder::None(Body { unpacker, .. }) = &self.decoder
                        && unpacker.offset() > marks.wanted()
                    {
                        let soon = unpacker.offset() + LEAD_BYTES;
                        marks.want(unpacker.settles_at(soon.max(saved + CHECKPOINT_BYTES)));
                    }
                }
                Step::Local(local) => self = self.local(&local)?,
                Step::Mark(sha256) => {
                    self.save(sha256)?;
                    saved = self.offset();
                }
                Step::Verified => return self.finish(),
            }
        }
        Err(LayerError::Stopped(0))
    }

    /// Uncompressed bytes taken so far.
    fn offset(&self) -> u64 {
        match &self.decoder {
            Decoder::None(body) => body.unpacker.offset(),
            Decoder::Gzip(decoder) => decoder.get_ref().unpacker.offset(),
            Decoder::Zstd(decoder) => decoder.get_ref().unpacker.offset(),
        }
    }

    fn save(&mut self, sha256: String) -> Result<(), LayerError> {
        let Decoder::None(body) = &mut self.decoder else { return Ok(()) };
        let offset = body.unpacker.offset();
        let progress = body.unpacker.checkpoint(self.ingest)?;
        self.ingest.save_checkpoint(&Checkpoint { offset, sha256, progress })?;
        Ok(())
    }

    /// Takes a local file. The blob's bytes behind it begin with a frame or member of their own.
    fn local(self, local: &Local) -> Result<Self, LayerError> {
        let Self { ingest, compression, ref told, .. } = self;
        let told = Arc::clone(told);
        let mut body = self.end()?;
        if body.again > 0 {
            return Err(LayerError::Mismatch("its table of contents is wrong".to_owned()));
        }
        if let Some(hash) = &mut body.hash
            && !hash_local(hash, local, ingest, &told)?
        {
            return Err(LayerError::Stopped(0));
        }
        body.unpacker.local(local)?;
        body.again = local.again;
        let decoder = Decoder::start(compression, body)?;
        Ok(Self { ingest, compression, told, decoder })
    }

    fn finish(self) -> Result<Finished, LayerError> {
        let ingest = self.ingest;
        let body = self.end()?;
        let diff_id = body.hash.map(|hash| Digest::from_sha256(hash.finalize().into()));
        Ok((body.unpacker.finish(ingest)?, diff_id))
    }

    /// Ends the decoder, which must have come to a whole number of frames or members.
    fn end(mut self) -> Result<Body<'a>, LayerError> {
        let flushed = match &mut self.decoder {
            Decoder::None(_) => Ok(()),
            Decoder::Gzip(decoder) => decoder.try_finish(),
            Decoder::Zstd(decoder) => decoder.flush(),
        };
        flushed.map_err(|e| self.reason(&e))?;
        match self.decoder {
            Decoder::None(body) => Ok(body),
            Decoder::Gzip(decoder) => {
                decoder.finish().map_err(|e| LayerError::Refused(format!("gzip: {e}")))
            }
            Decoder::Zstd(decoder) => Ok(decoder.into_inner()),
        }
    }

    fn reason(&mut self, error: &io::Error) -> LayerError {
        let (body, what) = match &mut self.decoder {
            Decoder::None(body) => (body, "tar"),
            Decoder::Gzip(decoder) => (decoder.get_mut(), "gzip"),
            Decoder::Zstd(decoder) => (decoder.get_mut(), "zstd"),
        };
        body.error.take().unwrap_or_else(|| LayerError::Refused(format!("{what}: {error}")))
    }
}

#[cfg(test)]
#[path = "layer/tests.rs"]
mod tests;
