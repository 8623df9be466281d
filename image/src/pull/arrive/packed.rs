//! Compressed layers with a table of contents: listed by it and by what lies between the frames that
//! it names, fetched frame by frame.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use futures_util::stream::{self, StreamExt as _};

use super::{Arrival, Origin, arrives, left, unlisted};
use crate::digest::Digest;
use crate::layer::{LayerError, PackedLister, Piece, Unlanded, overlaps};
use crate::pull::{Inner, PullError, toc};
use crate::store::{Ingest, StoreError};

/// What is read at once of what lies between frames.
const READ_BYTES: u64 = 1024 * 1024;

impl Inner {
    /// Lists a compressed layer; `None` where it has no table of contents that can be used.
    pub(super) async fn list_packed(
        &self,
        ingest: &Arc<Ingest>,
        from: Origin<'_>,
        diff_id: Digest,
    ) -> Result<Option<Arc<Arrival>>, PullError> {
        let Origin { source, layer, state } = from;
        let (blob, digest) = (layer.blob, layer.blob.digest);
        let read = |range| self.read_listed(from, range);
        let tail = blob.size.saturating_sub(toc::TAIL_BYTES)..blob.size;
        let Some(bytes) = read(tail.clone()).await? else { return Ok(None) };
        let Some(footer) = toc::footer(&bytes, blob.size, layer.compression) else {
            return Ok(None);
        };
        let mut held = vec![(tail.start, bytes)];
        // It may begin before what has come, and end in it.
        let before = footer.toc.start..footer.toc.end.min(tail.start);
        if !before.is_empty() {
            let Some(bytes) = read(before.clone()).await? else { return Ok(None) };
            held.insert(0, (before.start, bytes));
        }
        let parts: Vec<Bytes> = overlaps(&footer.toc, &held).map(|(_, bytes)| bytes).collect();
        let listing = self.disk(move |_| Ok(toc::contents(&footer, &parts.concat(), layer.toc)));
        let mut contents = match listing.await? {
            Ok(contents) => contents,
            Err(why) => return unlisted(digest, LayerError::Refused(why)),
        };
        let folder = Arc::clone(ingest);
        let table = Some(contents.table);
        let here = self.disk(move |_| left(&folder, table)).await?;
        let linked = self.link_known(&mut contents, ingest.folder(), source, layer, state).await;
        let folder = Arc::clone(ingest);
        let lister =
            self.disk(move |_| Ok(PackedLister::new(folder.folder(), layer, contents, here)));
        let mut lister = match lister.await? {
            Ok(lister) => lister,
            Err(error) => return unlisted(digest, error),
        };
        let reads: Vec<_> = lister.reads().flat_map(|range| cut(&range, &held)).collect();
        let mut reads = stream::iter(reads)
            .map(|(range, held)| async {
                match held {
                    Some(bytes) => Ok(Some(bytes)),
                    None => read(range).await,
                }
            })
            .buffered(self.fetcher.connections);
        while let Some(bytes) = reads.next().await {
            let Some(bytes) = bytes? else { return Ok(None) };
            let taken = self.disk(move |_| Ok(lister.take(&bytes).map(|()| lister)));
            lister = match taken.await? {
                Ok(lister) => lister,
                Err(error) => return unlisted(digest, error),
            };
        }
        arrives(digest, lister.finish(), diff_id, linked)
    }

    /// Fetches a piece that is whole frames. Those that are not what they should be are fetched once
    /// more, from another place where there is one.
    pub(super) async fn bring_frames(
        &self,
        arrival: &Arc<Arrival>,
        from: Origin<'_>,
        piece: Piece,
    ) -> Result<(), PullError> {
        let Origin { source, layer, state } = from;
        let (digest, compression) = (layer.blob.digest, layer.compression);
        let Piece { mut range, want, round } = piece;
        let mut again = false;
        loop {
            let (unpack, packed) = arrival.landing.unpack(&range, compression);
            let memory = (packed.end - packed.start) + (range.end - range.start);
            let unpack = Arc::new(Mutex::new(unpack));
            let land = |_, chunks: Vec<Bytes>| {
                let (arrival, unpack) = (Arc::clone(arrival), Arc::clone(&unpack));
                let landed = self.disk(move |_| {
                    // A panic elsewhere ends the piece.
                    let mut unpack = unpack.lock().unwrap_or_else(PoisonError::into_inner);
                    match arrival.landing.land_frames(round, &mut unpack, &chunks) {
                        Ok(()) => Ok(Ok(())),
                        Err(Unlanded::Wrong(why)) => Ok(Err(why)),
                        Err(Unlanded::Disk(e)) => {
                            Err(StoreError::io(format!("write layer {digest}"), e))
                        }
                    }
                });
                async {
                    let wrong = |why| PullError::Mismatch(format!("layer {digest}: {why}"));
                    landed.await?.map_err(wrong)
                }
            };
            let packed = Piece { range: packed, want, round };
            match self.fetcher.piece(source, layer.blob, packed, memory, state, land).await {
                Err(PullError::Mismatch(why)) if !again => {
                    again = true;
                    let elsewhere = source.distrust(&digest);
                    tracing::warn!(layer = %digest, why, elsewhere, "fetching a chunk again");
                    range.start = arrival.landing.end_of_run(range.start);
                }
                brought => return brought,
            }
        }
    }
}

/// `range` in parts to read, and what of it has come already.
fn cut(range: &Range<u64>, held: &[(u64, Bytes)]) -> Vec<(Range<u64>, Option<Bytes>)> {
    let (mut parts, mut at) = (Vec::new(), range.start);
    let missing = |parts: &mut Vec<_>, range: Range<u64>| {
        for start in range.clone().step_by(READ_BYTES as usize) {
            parts.push((start..range.end.min(start + READ_BYTES), None));
        }
    };
    for (part, bytes) in overlaps(range, held) {
        missing(&mut parts, at..part.start);
        at = part.end;
        parts.push((part, Some(bytes)));
    }
    missing(&mut parts, at..range.end);
    parts
}

#[cfg(test)]
#[path = "packed_tests.rs"]
mod tests;
