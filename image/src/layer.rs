//! A layer's way from the wire into the store, in one pass.
//!
//! ```text
//!              this thread          one, if need be               a thread of its own
//! chunks ─► SHA-256 (digest) ─────► decompress ─────► SHA-256 (diff_id) ─► tar ─► BLAKE3, disk
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
//! Chunks of the blob come in, in order; files land in the layer's [`Ingest`] folder, and are named only
//! after both digests match. Hashing a blob and unpacking it cost about the same, and to decompress gzip
//! costs as much as all else together: so each has a thread.
//!
//! # Going on after a stop
//!
//! A checkpoint is saved every [`CHECKPOINT_BYTES`] or so: hash states, tar state, and what is on the
//! disk. [`Resumed`] picks it up. Of a compressed layer it is behind a zstd frame or gzip member
//! ([`inflate`]), or between two blocks of a member, with the decoder's state ([`gzip`]). That of a zstd
//! decoder cannot be had: what was compressed into one frame starts again.
//!
//! A layer that somebody reads while it arrives goes another way ([`landing`]), since its bytes
//! come out of order.

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, mpsc};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use sha2::digest::common::hazmat::{SerializableState, SerializedState};
use sha2::{Digest as _, Sha256};

use crate::digest::Digest;
use crate::manifest::{Compression, Layer};
use crate::store::{Ingest, LayerRecord, StoreError};

mod back;
mod decode;
mod file;
mod frames;
mod front;
mod gzip;
mod inflate;
mod landing;
mod listing;
mod packed;
mod plan;
mod ranges;
mod sift;
mod spool;
pub(crate) mod tar;
mod unpack;

use back::Unpacking;
use decode::Decoding;
pub(crate) use file::{Buffer, FileReader};
pub(crate) use frames::{Contents, Frame, MAX_FRAME_BYTES, Promised};
use front::Front;
use gzip::Midway;
use inflate::Inflater;
pub(crate) use landing::{End, Landed, Landing, Piece, Unlanded, Verifier, Want};
pub(crate) use listing::{JUMP_BYTES, Lister, Listing};
pub(crate) use packed::PackedLister;
pub(crate) use plan::{Local, Plan, Told, overlaps};
pub(crate) use ranges::Ranges;
pub(crate) use sift::{Sifted, Wanted, sift};
pub(crate) use tar::clean_path;
pub(crate) use unpack::is_estargz;
use unpack::{Progress, Unpacker};

/// Bytes between two checkpoints: what a crash costs at most, beside what is on the wire. Each
/// costs a flush of the disk's cache, so much smaller would be felt.
const CHECKPOINT_BYTES: u64 = 32 * 1024 * 1024;

/// Chunks behind the first thread: enough to even out their pace, few enough to count for nothing.
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
    at: Place,
    plan: Plan,
}

/// How far a layer is.
struct Place {
    /// Bytes of the blob that need not come again.
    offset: u64,
    /// Over them.
    blob_hash: Sha256,
    /// Over what they unpack to; absent where that is the same.
    unpacked_hash: Option<Sha256>,
    /// Whether all of them went through `blob_hash`.
    sees_blob: bool,
    /// The decoder, where it is in the middle of something.
    midway: Option<Inflater>,
    unpacker: Unpacker,
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
    /// The same over what they unpack to, of a compressed blob.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    unpacked_sha256: Option<String>,
    /// False where local files stood in for a part of them.
    #[serde(default = "yes")]
    sees_blob: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    midway: Option<Midway>,
    progress: P,
}

fn yes() -> bool {
    true
}

fn hash_state(text: &str) -> io::Result<Sha256> {
    let state = hex::decode(text).map_err(io::Error::other)?;
    let state = SerializedState::<Sha256>::try_from(state.as_slice()).map_err(io::Error::other)?;
    Sha256::deserialize(&state).map_err(io::Error::other)
}

impl Resumed {
    /// Picks up what an earlier pull left in `ingest`, or begins at 0. Blocks on the disk.
    pub(crate) fn open(
        ingest: Ingest,
        layer: Layer,
        diff_id: Option<Digest>,
    ) -> Result<Self, StoreError> {
        if let Some(checkpoint) = ingest.checkpoint::<Checkpoint<Progress>>() {
            match Place::pick_up(&ingest, &layer, checkpoint) {
                Ok(at) => {
                    let plan = Plan::plain(at.offset..layer.blob.size);
                    return Ok(Self { ingest, layer, diff_id, at, plan });
                }
                Err(why) => {
                    tracing::warn!(layer = %layer.blob.digest, %why, "starting the layer again");
                }
            }
        }
        ingest.clear()?;
        let at = Place {
            offset: 0,
            blob_hash: Sha256::new(),
            unpacked_hash: (layer.compression != Compression::None).then(Sha256::new),
            sees_blob: true,
            midway: None,
            unpacker: Unpacker::new(&layer),
        };
        let plan = Plan::plain(0..layer.blob.size);
        Ok(Self { ingest, layer, diff_id, at, plan })
    }

    /// Where in the blob the first chunk must start, in bytes.
    pub(crate) fn offset(&self) -> u64 {
        self.at.offset
    }

    /// As [`Resumed::offset`], and more.
    pub(crate) fn outset(&self) -> Outset {
        let parser = self.at.unpacker.parser().cloned();
        let folder = self.ingest.folder().to_owned();
        Outset { folder, offset: self.at.offset, parser, begun: self.at.unpacker.begun() }
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
    pub(crate) fn unpack<C: Send>(
        self,
        mut next: impl FnMut() -> Option<Chunk<C>>,
    ) -> Result<Done, LayerError> {
        let Self { ingest, layer, diff_id, at, plan } = self;
        let Place { offset, mut blob_hash, unpacked_hash, sees_blob, midway, unpacker } = at;
        // Else the diff_id is the proof.
        let sees_blob =
            sees_blob && (layer.compression == Compression::None || plan.locals().next().is_none());
        let inflater = match (layer.compression, midway) {
            (Compression::None, _) => None,
            (_, Some(inflater)) => Some(Ok(inflater)),
            (compression, None) => Some(Inflater::new(compression)),
        };
        let inflater = inflater.transpose().map_err(LayerError::Refused)?;
        let (sender, packed) = mpsc::sync_channel(QUEUE);
        let outcome = std::thread::scope(|scope| {
            let told = Arc::clone(&plan.told);
            let (ingest, hash) = (&ingest, unpacked_hash);
            let unpacking = Unpacking { ingest, sees_blob, told, unpacker, hash, again: 0 };
            let (decoding, unpacking) = match inflater {
                None => (None, scope.spawn(move || unpacking.run(&packed))),
                Some(inflater) => {
                    let (sender, unpacked) = mpsc::channel();
                    let decoding = Decoding::new(inflater, offset, sender);
                    (
                        Some(scope.spawn(move || decoding.run(&packed))),
                        scope.spawn(move || unpacking.run(&unpacked)),
                    )
                }
            };
            let mut front = Front { hash: &mut blob_hash, offset, layer, sender, marked: offset };
            let fed = front.feed(plan, ingest, &mut next);
            let hashed = fed.and_then(|()| front.verify(sees_blob));
            drop(front);
            let decoded = decoding.map_or(Ok(()), std::thread::ScopedJoinHandle::join);
            let died = |_| Err(LayerError::Refused("the unpacking thread died".to_owned()));
            let unpacked = unpacking.join().unwrap_or_else(died);
            let unpacked = decoded.map_or_else(died, |()| unpacked);
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
            Err(e @ LayerError::Stopped(1..)) if ingest.has_checkpoint() => return Err(e),
            // Bytes that are wrong stay wrong, a full disk wants its room back, and what has no place
            // to go on from starts again.
            Err(e) => {
                if let LayerError::Stopped(1..) = e {
                    tracing::info!(layer = %layer.blob.digest, "in one piece: it will start again");
                }
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
            attributes: unpacked.attributes,
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

impl Place {
    fn pick_up(
        ingest: &Ingest,
        layer: &Layer,
        checkpoint: Checkpoint<Progress>,
    ) -> io::Result<Self> {
        let Checkpoint { offset, sha256, unpacked_sha256, sees_blob, midway, progress } =
            checkpoint;
        let unpacker = Unpacker::resume(progress, layer, ingest)?;
        let unpacked_hash = unpacked_sha256.as_deref().map(hash_state).transpose()?;
        let sound = match layer.compression {
            Compression::None => {
                unpacked_hash.is_none() && midway.is_none() && unpacker.offset() == offset
            }
            Compression::Gzip => unpacked_hash.is_some(),
            Compression::Zstd => unpacked_hash.is_some() && midway.is_none(),
        };
        if !sound {
            return Err(io::Error::other("the checkpoint is of something else"));
        }
        let blob_hash = hash_state(&sha256)?;
        let midway = midway.as_ref().map(Inflater::take_up).transpose();
        let midway = midway.map_err(io::Error::other)?;
        Ok(Self { offset, blob_hash, unpacked_hash, sees_blob, midway, unpacker })
    }
}

#[cfg(test)]
#[path = "layer/tests.rs"]
mod tests;
