//! An image that can be looked at while it arrives.
//!
//! Comes from a pull that was asked to stream ([`super::PullRequest::stream`]), as soon as all layers that
//! are not here have shown their list, or have come in where they show none before.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use super::arrive::Arrival;
use super::layers::{LayerFlight, LayerState};
use super::{Inner, PullError};
use crate::digest::{Digest, ObjectId};
use crate::layer::End;
use crate::manifest::PlacedLayer;
use crate::store::StoreError;
use crate::tree::Tree;

/// An image on its way: all names and sizes, and the bytes that have come.
#[derive(Debug)]
pub struct Arriving {
    digest: Digest,
    tree: Tree,
    files: HashMap<ObjectId, ArrivingFile>,
    arrivals: Vec<Arc<Arrival>>,
    waited_for: usize,
}

/// A file that may not be here yet. Clones are the same file.
#[derive(Debug, Clone)]
pub struct ArrivingFile {
    arrival: Arc<Arrival>,
    /// In the uncompressed layer.
    range: Range<u64>,
}

/// Why bytes cannot be had, and will not.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct NotComing(String);

impl Arriving {
    /// The image's manifest.
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// All that is in it. Objects of files that are on their way stand for themselves only: they are
    /// keys of [`Arriving::file`], and no content's names.
    pub fn tree(&self) -> &Tree {
        &self.tree
    }

    /// The file of this object, where it was not in the store from the start.
    pub fn file(&self, object: &ObjectId) -> Option<&ArrivingFile> {
        self.files.get(object)
    }

    /// Why nothing comes at present of one of its layers, where that may pass: a registry that is away, a full
    /// disk. It is tried again, after a minute at most and as soon as somebody waits.
    pub fn trouble(&self) -> Option<String> {
        self.arrivals.iter().find_map(|arrival| arrival.landing.trouble())
    }

    /// Layers that had to come in whole first, since they cannot be read out of order.
    pub fn waited_for(&self) -> usize {
        self.waited_for
    }
}

impl ArrivingFile {
    /// Opens it, to read bytes that are here. Others read as zeros, so ask before each read. Blocks
    /// on the disk.
    ///
    /// # Errors
    ///
    /// The disk's, and `NotFound` where the pull has ended and nothing was kept.
    pub fn open(&self) -> io::Result<File> {
        self.arrival.landing.open(self.range.start)
    }

    /// Whether these bytes of the file are here; behind its end there are none to wait for.
    ///
    /// # Errors
    ///
    /// When they will not come, or when all of the layer turned out to be wrong.
    pub fn has(&self, range: Range<u64>) -> Result<bool, NotComing> {
        told(self.arrival.landing.has(&self.of_layer(range)))
    }

    /// Has these bytes of the file fetched next, and waits until they are here.
    ///
    /// # Errors
    ///
    /// As [`ArrivingFile::has`]. It waits for ever where a source does not answer and is asked again.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future gives up the wait; the bytes come all the same.
    pub async fn wait(&self, range: Range<u64>) -> Result<(), NotComing> {
        told(self.arrival.landing.wait(&self.of_layer(range)).await)
    }

    fn of_layer(&self, range: Range<u64>) -> Range<u64> {
        let place = |at: u64| self.range.start.saturating_add(at).min(self.range.end);
        place(range.start)..place(range.end)
    }
}

fn told<T>(result: Result<T, End>) -> Result<T, NotComing> {
    result.map_err(|end| match end {
        End::Stopped(why) | End::Wrong(why) => NotComing(why),
        End::Verified => NotComing("not part of the file".to_owned()),
    })
}

impl Inner {
    /// Puts together what can be seen of an image whose missing layers are in `flights`.
    pub(super) async fn look_ahead(
        &self,
        digest: Digest,
        layers: &[PlacedLayer],
        flights: &[LayerFlight],
    ) -> Result<Arriving, PullError> {
        let (mut tree, mut files) = (Tree::default(), HashMap::new());
        let (mut arrivals, mut waited_for) = (Vec::new(), 0);
        for placed in layers {
            let (layer, diff_id) = placed.key();
            let flight = flights.iter().find(|flight| *flight.key() == (layer, diff_id));
            let arrival = match flight {
                Some(flight) => seen(flight).await,
                None => None,
            };
            let entries = if let Some(arrival) = arrival {
                for file in arrival.listing.files() {
                    let range = file.offset..file.offset + file.size;
                    let arriving = ArrivingFile { arrival: Arc::clone(&arrival), range };
                    files.insert(arrival.listing.stand_in(file), arriving);
                }
                let entries = arrival.listing.entries(|file| arrival.listing.stand_in(file));
                arrivals.push(arrival);
                entries
            } else {
                waited_for += usize::from(flight.is_some());
                let record = self.disk(move |store| store.layer_as(&layer, diff_id.as_ref()));
                let record = record.await?.ok_or_else(|| {
                    StoreError::Corrupt(format!("layer {} is gone again", layer.blob.digest))
                })?;
                record.entries
            };
            placed
                .place
                .lay(&mut tree, &entries)
                .map_err(|why| PullError::Unpack(format!("layer {}: {why}", layer.blob.digest)))?;
        }
        Ok(Arriving { digest, tree, files, arrivals, waited_for })
    }
}

/// What a layer shows of itself, or nothing once it has ended.
async fn seen(flight: &LayerFlight) -> Option<Arc<Arrival>> {
    let LayerState { shown, .. } = &flight.state;
    let mut shown = shown.subscribe();
    tokio::select! {
        // First, since a small layer may be complete already.
        biased;
        seen = shown.wait_for(Option::is_some) => seen.ok()?.clone(),
        // A failure is the pull's to tell.
        _ = flight.wait() => None,
    }
}
