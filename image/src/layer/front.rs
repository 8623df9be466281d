//! The first thread's part: the blob is put together, hashed, and handed on.

use std::sync::mpsc;

use bytes::Bytes;
use sha2::digest::common::hazmat::SerializableState as _;
use sha2::{Digest as _, Sha256};

use super::gzip::Midway;
use super::plan::{Local, Plan, Segment, Told};
use super::{CHECKPOINT_BYTES, Chunk, FileReader, LayerError};
use crate::digest::{Digest, ObjectId};
use crate::manifest::{Compression, Layer};
use crate::store::{Ingest, StoreError};

/// Bytes that are fetched on, after a layer turned out unreadable, to learn whether it was altered.
const VERDICT_BYTES: u64 = 64 * 1024 * 1024;

/// What goes from thread to thread, `B` being how bytes are held.
pub(super) enum Step<B> {
    Bytes(B),
    /// A stored object in place of the next bytes.
    Local(Local),
    /// Where all before this is done, the layer can go on from here.
    Mark(Mark),
    /// The blob is complete and is what its digest names.
    Verified,
    /// There will be no more.
    Failed(LayerError),
}

/// Bytes of the blob.
pub(super) struct Packed<C> {
    pub(super) bytes: Bytes,
    /// Where in the blob they begin.
    pub(super) at: u64,
    /// State of the hash over all before them, of a compressed blob.
    pub(super) before: Option<Sha256>,
    /// Held for them.
    _credit: Option<C>,
}

impl<C> AsRef<[u8]> for Packed<C> {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

/// A place to go on from.
pub(super) struct Mark {
    /// In the blob.
    pub(super) offset: u64,
    /// The state of the hash over all before it, in hex.
    pub(super) sha256: String,
    /// Of the decoder, where it is in the middle of something.
    pub(super) midway: Option<Midway>,
}

impl Mark {
    pub(super) fn new(offset: u64, hash: &Sha256, midway: Option<Midway>) -> Self {
        Self { offset, sha256: hex::encode(hash.serialize()), midway }
    }
}

/// The first thread's part.
pub(super) struct Front<'a, C> {
    /// Over the blob, as far as it is seen.
    pub(super) hash: &'a mut Sha256,
    pub(super) offset: u64,
    pub(super) layer: Layer,
    pub(super) sender: mpsc::SyncSender<Step<Packed<C>>>,
    /// The last place to go on from.
    pub(super) marked: u64,
}

impl<C> Front<'_, C> {
    /// Only of an uncompressed layer can a place to go on from be anywhere; of others the next thread
    /// finds them.
    fn anywhere(&self) -> bool {
        self.layer.compression == Compression::None
    }

    pub(super) fn feed(
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
                            if self.anywhere() {
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
                Segment::Local(mut local) => {
                    // Of a compressed blob the other thread has the hash.
                    if self.anywhere() {
                        let mut hash = self.hash.clone();
                        let mut name = local.object.is_none().then(blake3::Hasher::new);
                        let take = |bytes: &[u8]| {
                            hash.update(bytes);
                            name.as_mut().map(|name| name.update(bytes));
                        };
                        if !hash_local(take, &local, ingest, &plan.told)? {
                            self.mark()?;
                            return Err(LayerError::Stopped(self.offset));
                        }
                        if let Some(name) = name {
                            // Who wrote it need not have waited for the disk.
                            sync(&ingest.folder().join(&local.name))?;
                            local.object = Some(ObjectId::new(name.finalize(), local.executable));
                        }
                        *self.hash = hash;
                    }
                    self.offset = local.range.end;
                    let large = local.size >= CHECKPOINT_BYTES;
                    self.send(Step::Local(local))?;
                    if self.anywhere() && large {
                        self.mark()?;
                    }
                }
            }
        }
        Ok(())
    }

    fn bytes(&mut self, bytes: Bytes, credit: Option<C>) -> Result<(), LayerError> {
        let (at, before) = (self.offset, (!self.anywhere()).then(|| self.hash.clone()));
        self.hash.update(&bytes);
        self.offset += bytes.len() as u64;
        self.send(Step::Bytes(Packed { bytes, at, before, _credit: credit }))?;
        match self.anywhere() && self.offset - self.marked >= CHECKPOINT_BYTES {
            true => self.mark(),
            false => Ok(()),
        }
    }

    fn mark(&mut self) -> Result<(), LayerError> {
        self.marked = self.offset;
        self.send(Step::Mark(Mark::new(self.offset, self.hash, None)))
    }

    /// The other thread is gone only with an error of its own. When that was about the bytes, the
    /// digest tells whether they were altered on their way; worth the rest of the blob if that is short.
    fn send(&self, step: Step<Packed<C>>) -> Result<(), LayerError> {
        match self.sender.send(step) {
            Err(_) if self.layer.blob.size - self.offset > VERDICT_BYTES => {
                Err(LayerError::Stopped(0))
            }
            _ => Ok(()),
        }
    }

    pub(super) fn verify(&mut self, sees_blob: bool) -> Result<(), LayerError> {
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

fn sync(path: &std::path::Path) -> Result<(), LayerError> {
    let synced = std::fs::File::open(path).and_then(|file| file.sync_all());
    Ok(synced.map_err(|e| StoreError::io(format!("sync {}", path.display()), e))?)
}

/// Gives the bytes of a local file to `take`; false where it was told to stop.
pub(super) fn hash_local(
    mut take: impl FnMut(&[u8]),
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
                take(bytes);
                let before = share(read);
                read += bytes.len() as u64;
                goes_on = told(share(read) - before);
                goes_on
            })
        });
    match result {
        Ok(()) => Ok(goes_on),
        Err(e) => Err(LayerError::Mismatch(format!("{} is unreadable: {e}", local.name))),
    }
}
