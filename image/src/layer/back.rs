//! The last thread's part: what the blob unpacks to is hashed and written.

use std::sync::mpsc;

use sha2::digest::common::hazmat::SerializableState as _;
use sha2::{Digest as _, Sha256};

use super::front::{Mark, Step, hash_local};
use super::inflate::Broken;
use super::plan::{Local, Told};
use super::unpack::{Unpacked, Unpacker};
use super::{Checkpoint, LayerError};
use crate::digest::Digest;
use crate::store::Ingest;

/// What came of a layer, and its diff_id where the blob is compressed.
type Finished = (Unpacked, Option<Digest>);

pub(super) struct Unpacking<'a> {
    pub(super) ingest: &'a Ingest,
    /// Whether all of the blob goes through the first thread's hash.
    pub(super) sees_blob: bool,
    pub(super) told: Told,
    pub(super) unpacker: Unpacker,
    /// Over what comes; absent where the blob is the same bytes.
    pub(super) hash: Option<Sha256>,
    /// Bytes that come next and were taken from a local file already.
    pub(super) again: u64,
}

impl From<Broken<LayerError>> for LayerError {
    fn from(broken: Broken<LayerError>) -> Self {
        match broken {
            Broken::Input(why) => Self::Refused(why),
            Broken::Sink(error) => error,
        }
    }
}

impl Unpacking<'_> {
    pub(super) fn run<B: AsRef<[u8]>>(
        mut self,
        steps: &mpsc::Receiver<Step<B>>,
    ) -> Result<Finished, LayerError> {
        for step in steps {
            match step {
                Step::Bytes(bytes) => self.take(bytes.as_ref())?,
                Step::Local(local) => self.local(&local)?,
                // What was taken from a local file is not of the decoder's state.
                Step::Mark(_) if self.again > 0 => {}
                Step::Mark(mark) => self.save(mark)?,
                Step::Verified => return self.finish(),
                Step::Failed(error) => return Err(error),
            }
        }
        Err(LayerError::Stopped(0))
    }

    fn take(&mut self, bytes: &[u8]) -> Result<(), LayerError> {
        let known = usize::try_from(self.again).map_or(bytes.len(), |n| n.min(bytes.len()));
        self.again -= known as u64;
        let bytes = &bytes[known..];
        if let Some(hash) = &mut self.hash {
            hash.update(bytes);
        }
        self.unpacker.write(bytes, self.ingest)
    }

    fn save(&mut self, mark: Mark) -> Result<(), LayerError> {
        let Mark { offset, sha256, midway } = mark;
        let unpacked_sha256 = self.hash.as_ref().map(|hash| hex::encode(hash.serialize()));
        let sees_blob = self.sees_blob;
        let progress = self.unpacker.checkpoint(self.ingest)?;
        let checkpoint =
            Checkpoint { offset, sha256, unpacked_sha256, sees_blob, midway, progress };
        Ok(self.ingest.save_checkpoint(&checkpoint)?)
    }

    /// Takes a local file. The blob's bytes behind it begin with a frame or member of their own.
    fn local(&mut self, local: &Local) -> Result<(), LayerError> {
        if self.again > 0 {
            return Err(LayerError::Mismatch("its table of contents is wrong".to_owned()));
        }
        if let Some(hash) = &mut self.hash
            && !hash_local(|bytes| hash.update(bytes), local, self.ingest, &self.told)?
        {
            return Err(LayerError::Stopped(0));
        }
        self.unpacker.local(local)?;
        self.again = local.again;
        Ok(())
    }

    fn finish(self) -> Result<Finished, LayerError> {
        let diff_id = self.hash.map(|hash| Digest::from_sha256(hash.finalize().into()));
        Ok((self.unpacker.finish(self.ingest)?, diff_id))
    }
}
