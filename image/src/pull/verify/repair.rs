//! Sound bytes for what is damaged.
//!
//! In come damaged objects, or an image whose records are; each is sound again afterwards, or out of use with its
//! images marked, and the report says which.
//!
//! Only what is damaged is fetched: of an uncompressed layer the file's range, of a compressed one
//! the layer, of which only the damaged files are written. A file is proved by its BLAKE3, so that the
//! rest of its layer is not needed. Who is asked is known from the references to images with
//! that layer, with the node's own credentials.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::mpsc;

use super::{Outcome, Run, VerifyReport};
use crate::digest::{Digest, ObjectId};
use crate::layer::{LayerError, Sifted, Wanted, sift};
use crate::manifest::{Compression, Layer, Manifest};
use crate::pull::arrive::Shown;
use crate::pull::layers::LayerState;
use crate::pull::meter::Meter;
use crate::pull::slots::{Priority, Urgency};
use crate::pull::{Inner, PullError, PullRequest, PullState};
use crate::reference::Reference;
use crate::source::{ManifestName, PullSecret};
use crate::store::{Fault, Repair, Store, StoreError};
use crate::tree::LayerEntry;

/// Chunks between network and disk.
const QUEUE: usize = 64;

/// Where an object's bytes can be had.
#[derive(Clone)]
struct Origin {
    layer: Layer,
    /// In the uncompressed layer.
    offset: u64,
    size: u64,
}

/// Of damaged objects: where they come from, and who needs them.
#[derive(Default)]
struct Owners {
    origins: BTreeMap<ObjectId, Vec<Origin>>,
    images: BTreeMap<ObjectId, Vec<Digest>>,
    /// References to the images with a layer.
    references: BTreeMap<Layer, BTreeSet<String>>,
}

impl Inner {
    /// Repairs damaged objects, or only tells of them.
    pub(super) async fn deal_with(
        self: &Arc<Self>,
        run: &mut Run,
        damaged: BTreeMap<ObjectId, Fault>,
    ) -> Result<(), PullError> {
        if damaged.is_empty() {
            return Ok(());
        }
        let names: BTreeSet<ObjectId> = damaged.keys().copied().collect();
        let owners = self.disk(move |store| owners(store, &names)).await?;
        let mut left: BTreeSet<ObjectId> = damaged.keys().copied().collect();
        let mut repaired = BTreeSet::new();
        let mut message = None;
        if run.options.repair {
            for (object, _) in damaged.iter().filter(|(_, fault)| fault.is_mode) {
                let object = *object;
                if self.disk(move |store| store.restore_mode(&object)).await? {
                    left.remove(&object);
                    repaired.insert(object);
                }
            }
            for (layer, references) in &owners.references {
                for reference in references {
                    let wanted = owners.of_layer(layer, &left);
                    if wanted.is_empty() {
                        break;
                    }
                    match self.fetch_files(reference, *layer, wanted, &mut run.report).await {
                        Ok(sifted) => {
                            for object in sifted.found {
                                left.remove(&object);
                                repaired.insert(object);
                            }
                            message = sifted.why.or(message);
                        }
                        Err(PullError::Store(error)) => return Err(PullError::Store(error)),
                        Err(error) => {
                            tracing::warn!(reference, %error, "repair: asking elsewhere");
                            message = Some(error.to_string());
                        }
                    }
                }
            }
            // What cannot be had alone: out of use, and then the images are pulled again.
            let mut images = BTreeSet::new();
            for object in left.clone() {
                let withdrawn = self
                    .disk(move |store| match store.repair(&object)? {
                        Some(repair) => repair.withdraw(store).map(|()| true),
                        None => Ok(false),
                    })
                    .await?;
                if withdrawn {
                    images.extend(owners.images.get(&object).into_iter().flatten().copied());
                }
            }
            let mut lost = BTreeMap::new();
            for image in images {
                self.disk(move |store| store.mark_damaged(&image)).await?;
                if let (Outcome::Lost, why) = self.pull_again(image).await? {
                    lost.insert(image, why);
                }
            }
            for object in left.clone() {
                let needed = owners.images.get(&object);
                if needed.is_none_or(|images| images.iter().all(|i| !lost.contains_key(i))) {
                    left.remove(&object);
                    repaired.insert(object);
                }
            }
            message = lost.into_values().flatten().next().or(message);
        }
        for (object, fault) in damaged {
            let images = owners.images.get(&object).cloned().unwrap_or_default();
            let path = format!("objects/{}", object.path().display());
            let (outcome, message) = match (run.options.repair, repaired.contains(&object)) {
                (false, _) => (Outcome::Found, None),
                (true, true) => (Outcome::Repaired, None),
                (true, false) => (Outcome::Lost, message.clone()),
            };
            run.note(path, images, fault.why, outcome, message);
        }
        Ok(())
    }

    /// Fetches damaged files of one layer from where `reference` says, and puts them in place.
    async fn fetch_files(
        self: &Arc<Self>,
        reference: &str,
        layer: Layer,
        wanted: Vec<(ObjectId, Origin)>,
        report: &mut VerifyReport,
    ) -> Result<Sifted, PullError> {
        let reference: Reference = reference
            .parse()
            .map_err(|e| StoreError::Corrupt(format!("reference {reference}: {e}")))?;
        let source = self.sources.open(&reference, &PullSecret::none())?;
        let (rights, files) = self
            .disk(move |store| {
                let (mut rights, mut files) = (BTreeMap::<ObjectId, Repair>::new(), Vec::new());
                for (object, Origin { offset, size, .. }) in wanted {
                    if let Some(repair) = store.repair(&object)? {
                        let range = offset..offset + size;
                        files.push(Wanted { object, range, to: repair.staged() });
                        rights.insert(object, repair);
                    }
                }
                Ok((rights, files))
            })
            .await?;
        let ranges = match layer.compression {
            Compression::None => files.iter().map(|file| file.range.clone()).collect(),
            _ => std::iter::once(0..layer.blob.size).collect(),
        };
        let meter = Arc::new(Meter::new(Instant::now()));
        let urgency = Arc::new(Urgency::new(Priority::Prefetch(0)));
        let state = LayerState { meter: Arc::clone(&meter), urgency, shown: Shown::default() };
        let (sender, mut chunks) = mpsc::channel(QUEUE);
        let writing = self
            .tasks
            .spawn_blocking(move || sift(layer.compression, files, || chunks.blocking_recv()));
        let fetched = self.fetcher.fetch(source, layer.blob, ranges, state, sender).await;
        let sifted = match writing.await {
            Ok(Ok(sifted)) => Ok(sifted),
            Ok(Err(LayerError::Store(error))) => Err(error.into()),
            Ok(Err(error)) => {
                Err(PullError::Unpack(format!("layer {}: {error}", layer.blob.digest)))
            }
            Err(panic) => Err(PullError::Unpack(format!("repair died: {panic}"))),
        };
        report.fetched_bytes += meter.read(Instant::now()).fetched_bytes;
        let found: BTreeSet<ObjectId> =
            sifted.iter().flat_map(|sifted| sifted.found.iter().copied()).collect();
        self.disk(move |store| {
            for (object, repair) in rights {
                match found.contains(&object) {
                    true => repair.replace(store)?,
                    false => repair.give_up()?,
                }
            }
            Ok(())
        })
        .await?;
        let sifted = sifted?;
        match fetched {
            // What came is in place; the rest may come from elsewhere.
            Err(error) if sifted.found.is_empty() => Err(error),
            _ => Ok(sifted),
        }
    }

    /// Brings a damaged image in again from where its references say, and mends its tree.
    pub(super) async fn pull_again(
        self: &Arc<Self>,
        image: Digest,
    ) -> Result<(Outcome, Option<String>), PullError> {
        self.disk(move |store| store.mark_damaged(&image)).await?;
        let references = self.disk(move |store| store.references_to(&image)).await?;
        let mut why = format!("image {image}: no reference tells where it came from");
        for name in references {
            let Ok(reference) = name.parse::<Reference>() else { continue };
            let priority = Priority::Prefetch(0);
            let request = PullRequest { priority, ..PullRequest::new(reference) };
            let entry = self.board.enter(&request.reference, priority);
            let outcome = match self.bring_again(&request, image, &entry).await {
                Ok(()) => self.present(&request, image).await,
                Err(error) => Err(error),
            };
            self.board.leave(&entry, &outcome);
            match outcome {
                Ok(_) => return Ok((Outcome::Repaired, None)),
                Err(PullError::Store(error)) if matches!(*error, StoreError::Io { .. }) => {
                    return Err(PullError::Store(error));
                }
                Err(error) => why = error.to_string(),
            }
        }
        Ok((Outcome::Lost, Some(why)))
    }

    async fn bring_again(
        self: &Arc<Self>,
        request: &PullRequest,
        image: Digest,
        entry: &crate::pull::board::Entry,
    ) -> Result<(), PullError> {
        let source = self.sources.open(&request.reference, &request.secret)?;
        let manifest = self.manifest(&*source, &ManifestName::Digest(image)).await?;
        let Manifest::Image(parsed) = Manifest::parse(&manifest)? else {
            return Err(PullError::Mismatch(format!("manifest {image}: is an index")));
        };
        entry.set(|stage| {
            stage.digest = Some(image);
            stage.total_bytes = parsed.download_bytes();
            stage.state = PullState::Pulling;
        });
        let found = crate::pull::run::Resolved { resolved: image, image: parsed, manifest };
        self.bring_image(&source, &found, request, entry).await.map(drop)
    }
}

impl Owners {
    /// What of `left` this layer has, sorted by place, none overlapping.
    fn of_layer(&self, layer: &Layer, left: &BTreeSet<ObjectId>) -> Vec<(ObjectId, Origin)> {
        let mut wanted: Vec<(ObjectId, Origin)> = Vec::new();
        for object in left {
            let origins = self.origins.get(object).into_iter().flatten();
            let origin = origins.into_iter().find(|origin| origin.layer == *layer);
            wanted.extend(origin.map(|origin| (*object, origin.clone())));
        }
        wanted.sort_by_key(|(_, origin)| origin.offset);
        let mut end = 0;
        // Records are not trusted.
        wanted.retain(|(_, origin)| {
            let (start, stop) = (origin.offset, origin.offset.saturating_add(origin.size));
            let within = layer.compression != Compression::None || stop <= layer.blob.size;
            let fits = start >= end && within;
            end = if fits { stop } else { end };
            fits
        });
        wanted
    }
}

fn owners(store: &Store, objects: &BTreeSet<ObjectId>) -> Result<Owners, StoreError> {
    let mut owners = Owners::default();
    for image in store.tree_names()? {
        let Ok(loaded) = store.load_image(&image)? else { continue };
        let references = store.references_to(&image)?;
        let needed: BTreeSet<ObjectId> =
            loaded.tree.files().into_iter().map(|file| file.2).collect();
        for object in objects.intersection(&needed) {
            owners.images.entry(*object).or_default().push(image);
        }
        for (placed, record) in loaded.layers {
            for entry in &record.entries {
                if let LayerEntry::File { object, size: size @ 1.., offset: Some(offset), .. } =
                    entry
                    && objects.contains(object)
                {
                    let origin = Origin { layer: placed.layer, offset: *offset, size: *size };
                    owners.origins.entry(*object).or_default().push(origin);
                    let known = owners.references.entry(placed.layer).or_default();
                    known.extend(references.iter().cloned());
                }
            }
        }
    }
    Ok(owners)
}
