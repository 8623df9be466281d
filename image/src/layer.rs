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
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use sha2::digest::common::hazmat::{SerializableState, SerializedState};
use sha2::{Digest as _, Sha256};

use crate::digest::Digest;
use crate::manifest::{Compression, Layer};
use crate::store::{Ingest, LayerRecord, StoreError};

mod file;
mod sift;
pub(crate) mod tar;
mod unpack;

pub(crate) use file::Buffer;
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
                    return Ok(Self { ingest, layer, diff_id, blob_hash, unpacker, offset });
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

    /// Unpacks the chunks that `next` gives until the blob is whole, verifies and commits it.
    ///
    /// Blocks. When `next` ends early, what came is kept for the next pull.
    pub(crate) fn unpack<C: Clone + Send>(
        self,
        mut next: impl FnMut() -> Option<Chunk<C>>,
    ) -> Result<Done, LayerError> {
        let Self { ingest, layer, diff_id, mut blob_hash, unpacker, offset } = self;
        let size = layer.blob.size;
        let (sender, receiver) = mpsc::sync_channel::<Step<C>>(QUEUE);
        let marks = Marks::default();
        let outcome = std::thread::scope(|scope| {
            let (ingest, marks) = (&ingest, &marks);
            let unpacking =
                scope.spawn(move || Unpacking::new(ingest, layer, unpacker)?.run(&receiver, marks));
            let hashed = hash_blob(&mut blob_hash, offset, layer, &mut next, &sender, marks);
            drop(sender);
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
            size_bytes: size,
            diff_id: found,
            entries: unpacked.entries,
        };
        ingest.commit(layer.record_name(), record, unpacked.staged)?;
        Ok(Done { written_bytes: unpacked.written_bytes })
    }
}

/// What goes from the hashing thread to the unpacking thread.
enum Step<C> {
    Chunk(Chunk<C>),
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

fn hash_blob<C: Clone>(
    hash: &mut Sha256,
    mut offset: u64,
    layer: Layer,
    next: &mut impl FnMut() -> Option<Chunk<C>>,
    sender: &mpsc::SyncSender<Step<C>>,
    marks: &Marks,
) -> Result<(), LayerError> {
    let size = layer.blob.size;
    let resumable = layer.compression == Compression::None;
    // The other thread is gone only with an error of its own. When that was about the bytes, the
    // digest tells whether they were altered on their way; worth the rest of the blob if that is short.
    let send = |step, left: u64| match sender.send(step) {
        Err(_) if left > VERDICT_BYTES => Err(LayerError::Stopped(0)),
        _ => Ok(()),
    };
    while offset < size {
        let Some(mut chunk) = next() else {
            if resumable {
                send(Step::Mark(hex::encode(hash.serialize())), size)?;
            }
            return Err(LayerError::Stopped(offset));
        };
        let length = chunk.bytes.len() as u64;
        if length > size - offset {
            return Err(LayerError::Mismatch(format!(
                "is longer than the {size} bytes it should have"
            )));
        }
        let mark = marks.wanted();
        if resumable && offset < mark && mark < offset + length {
            let bytes = chunk.bytes.split_to((mark - offset) as usize);
            hash.update(&bytes);
            offset = mark;
            send(Step::Chunk(Chunk { bytes, _credit: chunk._credit.clone() }), size - offset)?;
            send(Step::Mark(hex::encode(hash.serialize())), size - offset)?;
        }
        hash.update(&chunk.bytes);
        offset += chunk.bytes.len() as u64;
        send(Step::Chunk(chunk), size - offset)?;
    }
    let found = Digest::from_sha256(hash.clone().finalize().into());
    if found != layer.blob.digest {
        return Err(LayerError::Mismatch(format!(
            "its {size} bytes hash to {found}: the source altered them"
        )));
    }
    send(Step::Verified, 0)
}

/// The second thread's part.
struct Unpacking<'a> {
    ingest: &'a Ingest,
    decoder: Decoder<'a>,
}

/// Decompression, pushed from the front.
enum Decoder<'a> {
    None(Body<'a>),
    Gzip(Box<flate2::write::MultiGzDecoder<Body<'a>>>),
    Zstd(zstd::stream::write::Decoder<'static, Body<'a>>),
}

/// What comes out of the decoder.
struct Body<'a> {
    ingest: &'a Ingest,
    unpacker: Unpacker,
    /// Over what comes out; absent where the blob is the same bytes.
    hash: Option<Sha256>,
    /// `Write` can only fail with an `io::Error`; the reason waits here.
    error: Option<LayerError>,
}

impl Write for Body<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Some(hash) = &mut self.hash {
            hash.update(bytes);
        }
        match self.unpacker.write(bytes, self.ingest) {
            Ok(()) => Ok(bytes.len()),
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
    fn new(ingest: &'a Ingest, layer: Layer, unpacker: Unpacker) -> Result<Self, LayerError> {
        let compressed = layer.compression != Compression::None;
        let body = Body { ingest, unpacker, hash: compressed.then(Sha256::new), error: None };
        let decoder = match layer.compression {
            Compression::None => Decoder::None(body),
            Compression::Gzip => Decoder::Gzip(Box::new(flate2::write::MultiGzDecoder::new(body))),
            Compression::Zstd => {
                let decoder = zstd::stream::write::Decoder::new(body)
                    .map_err(|e| LayerError::Refused(format!("zstd: {e}")))?;
                Decoder::Zstd(decoder)
            }
        };
        Ok(Self { ingest, decoder })
    }

    fn run<C>(
        mut self,
        steps: &mpsc::Receiver<Step<C>>,
        marks: &Marks,
    ) -> Result<Finished, LayerError> {
        let mut saved = self.offset();
        for step in steps {
            match step {
                Step::Chunk(chunk) => {
                    let written = match &mut self.decoder {
                        Decoder::None(body) => body.write_all(&chunk.bytes),
                        Decoder::Gzip(decoder) => decoder.write_all(&chunk.bytes),
                        Decoder::Zstd(decoder) => decoder.write_all(&chunk.bytes),
                    };
                    written.map_err(|e| self.reason(&e))?;
                    if let Decoder::None(Body { unpacker, .. }) = &self.decoder
                        && unpacker.offset() > marks.wanted()
                    {
                        let soon = unpacker.offset() + LEAD_BYTES;
                        marks.want(unpacker.settles_at(soon.max(saved + CHECKPOINT_BYTES)));
                    }
                }
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

    fn finish(mut self) -> Result<Finished, LayerError> {
        let flushed = match &mut self.decoder {
            Decoder::None(_) => Ok(()),
            Decoder::Gzip(decoder) => decoder.try_finish(),
            Decoder::Zstd(decoder) => decoder.flush(),
        };
        flushed.map_err(|e| self.reason(&e))?;
        let ingest = self.ingest;
        let body = match self.decoder {
            Decoder::None(body) => body,
            Decoder::Gzip(decoder) => {
                decoder.finish().map_err(|e| LayerError::Refused(format!("gzip: {e}")))?
            }
            Decoder::Zstd(decoder) => decoder.into_inner(),
        };
        let diff_id = body.hash.map(|hash| Digest::from_sha256(hash.finalize().into()));
        Ok((body.unpacker.finish(ingest)?, diff_id))
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
