//! The second thread's part: bytes are unpacked, hashed, and written.

use std::sync::mpsc;

use sha2::digest::common::hazmat::SerializableState as _;
use sha2::{Digest as _, Sha256};

use super::front::{Marks, Step, hash_local};
use super::inflate::{Broken, Inflater};
use super::plan::{Local, Told};
use super::unpack::{Unpacked, Unpacker};
use super::{CHECKPOINT_BYTES, Checkpoint, LayerError};
use crate::digest::Digest;
use crate::manifest::Compression;
use crate::store::Ingest;

/// How far behind the hashing thread the unpacking one can be: the queue, in chunks of a MiB, and
/// some. A place that is nearer may have been passed already.
const LEAD_BYTES: u64 = 12 * 1024 * 1024;

/// What came of a layer, and its diff_id where the blob is compressed.
type Finished = (Unpacked, Option<Digest>);

pub(super) struct Unpacking<'a> {
    ingest: &'a Ingest,
    /// Whether all of a compressed blob goes through the other thread's hash.
    sees_blob: bool,
    told: Told,
    inflater: Inflater,
    body: Body<'a>,
    /// Bytes of the blob up to the last checkpoint.
    saved: u64,
}

/// What comes out of the decoder.
struct Body<'a> {
    ingest: &'a Ingest,
    unpacker: Unpacker,
    /// Over what comes out; absent where the blob is the same bytes.
    hash: Option<Sha256>,
    /// Bytes that come out next and were taken from a local file already.
    again: u64,
}

impl Body<'_> {
    fn take(&mut self, bytes: &[u8]) -> Result<(), LayerError> {
        let known = usize::try_from(self.again).map_or(bytes.len(), |n| n.min(bytes.len()));
        self.again -= known as u64;
        let bytes = &bytes[known..];
        if let Some(hash) = &mut self.hash {
            hash.update(bytes);
        }
        self.unpacker.write(bytes, self.ingest)
    }
}

impl From<Broken<LayerError>> for LayerError {
    fn from(broken: Broken<LayerError>) -> Self {
        match broken {
            Broken::Input(why) => Self::Refused(why),
            Broken::Sink(error) => error,
        }
    }
}

impl<'a> Unpacking<'a> {
    /// Goes on from `offset` of the blob, with `hash` over what came out before.
    pub(super) fn new(
        ingest: &'a Ingest,
        compression: Compression,
        (unpacker, hash): (Unpacker, Option<Sha256>),
        (offset, sees_blob): (u64, bool),
        told: Told,
    ) -> Result<Self, LayerError> {
        let inflater = Inflater::new(compression).map_err(LayerError::Refused)?;
        let body = Body { ingest, unpacker, hash, again: 0 };
        Ok(Self { ingest, sees_blob, told, inflater, body, saved: offset })
    }

    pub(super) fn run<C>(
        mut self,
        steps: &mpsc::Receiver<Step<C>>,
        marks: &Marks,
    ) -> Result<Finished, LayerError> {
        for step in steps {
            match step {
                Step::Bytes { bytes, before: None, .. } => {
                    self.body.take(&bytes)?;
                    let unpacker = &self.body.unpacker;
                    if unpacker.offset() > marks.wanted() {
                        let soon = unpacker.offset() + LEAD_BYTES;
                        marks.want(unpacker.settles_at(soon.max(self.saved + CHECKPOINT_BYTES)));
                    }
                }
                Step::Bytes { bytes, before: Some(before), at, .. } => {
                    self.inflate(&bytes, at, &before)?;
                }
                Step::Local(local) => self.local(&local)?,
                Step::Mark(sha256) => self.save(self.body.unpacker.offset(), sha256)?,
                Step::Verified => return self.finish(),
            }
        }
        Err(LayerError::Stopped(0))
    }

    /// Unpacks bytes of the blob from `at` on, `before` being the hash over what comes before them.
    fn inflate(&mut self, bytes: &[u8], at: u64, before: &Sha256) -> Result<(), LayerError> {
        let mut done = 0;
        while done < bytes.len() {
            let fed = self.inflater.feed(&bytes[done..], |out| self.body.take(out))?;
            done += fed.bytes;
            let offset = at + done as u64;
            if fed.border && self.is_due(offset) {
                let mut hash = before.clone();
                hash.update(&bytes[..done]);
                self.save(offset, hex::encode(hash.serialize()))?;
            }
        }
        Ok(())
    }

    /// Whether a checkpoint is worth its price at this border: the end of a file, if there is one
    /// in time, since a part of a buffer is written twice.
    fn is_due(&self, offset: u64) -> bool {
        let passed = offset - self.saved;
        let settled = self.body.unpacker.is_settled();
        self.body.again == 0
            && (passed >= CHECKPOINT_BYTES && settled || passed >= 2 * CHECKPOINT_BYTES)
    }

    fn save(&mut self, offset: u64, sha256: String) -> Result<(), LayerError> {
        let unpacked_sha256 = self.body.hash.as_ref().map(|hash| hex::encode(hash.serialize()));
        let progress = self.body.unpacker.checkpoint(self.ingest)?;
        let sees_blob = self.sees_blob;
        let checkpoint = Checkpoint { offset, sha256, unpacked_sha256, sees_blob, progress };
        self.ingest.save_checkpoint(&checkpoint)?;
        self.saved = offset;
        Ok(())
    }

    /// Takes a local file. The blob's bytes behind it begin with a frame or member of their own.
    fn local(&mut self, local: &Local) -> Result<(), LayerError> {
        self.inflater.finish().map_err(LayerError::Refused)?;
        if self.body.again > 0 {
            return Err(LayerError::Mismatch("its table of contents is wrong".to_owned()));
        }
        if let Some(hash) = &mut self.body.hash
            && !hash_local(|bytes| hash.update(bytes), local, self.ingest, &self.told)?
        {
            return Err(LayerError::Stopped(0));
        }
        self.body.unpacker.local(local)?;
        self.body.again = local.again;
        Ok(())
    }

    fn finish(self) -> Result<Finished, LayerError> {
        self.inflater.finish().map_err(LayerError::Refused)?;
        let Body { ingest, unpacker, hash, .. } = self.body;
        let diff_id = hash.map(|hash| Digest::from_sha256(hash.finalize().into()));
        Ok((unpacker.finish(ingest)?, diff_id))
    }
}
