//! Verifying what is stored, and repairing it.
//!
//! ```text
//! 256 parts of objects ─► damaged? ─► the file's bytes from a registry ─► in the damaged one's place
//!                                       └─ not to be had: name withdrawn, images marked ─► pulled again
//! records and trees    ─► damaged? ─► mended from objects, else pulled again
//! ```
//!
//! Only what is damaged is fetched: of an uncompressed layer the file's range, of a compressed one
//! the layer, of which only the damaged files are written. A file is proved by its BLAKE3, so that the
//! rest of its layer is not needed. Who is asked is known from the references to images with
//! that layer, with the node's own credentials.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Instant;

use serde::Serialize;
use tokio::sync::mpsc;

use super::arrive::Shown;
use super::layers::LayerState;
use super::meter::Meter;
use super::slots::{Priority, Urgency};
use super::{Inner, PullError, PullRequest, Puller};
use crate::digest::{Digest, ObjectId};
use crate::layer::{Sifted, Wanted, sift};
use crate::manifest::{Compression, Layer, Manifest};
use crate::reference::Reference;
use crate::source::{ManifestName, PullSecret};
use crate::store::{Checker, Fault, Part, Repair, Store, StoreError, TreeFault, VerifyControl};
use crate::tree::{LayerEntry, Tree};

/// Chunks between network and disk.
const QUEUE: usize = 64;

/// More damage than this is counted, and not listed.
const MAX_LISTED: usize = 10_000;

/// What to verify.
#[derive(Debug, Clone, Default)]
pub struct VerifyOptions {
    /// These images and their objects; empty for all that is stored.
    pub images: Vec<Digest>,
    /// Whether damage is repaired; else it is told, and nothing is changed.
    pub repair: bool,
    /// Begin with this of the 256 parts, where an earlier run stopped.
    pub first_part: u8,
}

/// What a verification found.
#[derive(Debug, Clone, Default, Serialize)]
pub struct VerifyReport {
    /// Files read.
    pub objects: u64,
    /// Bytes read.
    pub bytes: u64,
    /// Images whose records and trees were looked at.
    pub images: u64,
    /// Bytes that came from registries for repair.
    pub fetched_bytes: u64,
    /// What is or was damaged, at most 10,000 things.
    pub damage: Vec<Damage>,
    /// Whether all was read; false where it was stopped.
    pub complete: bool,
}

/// Something that is or was damaged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Damage {
    /// Below the store's directory.
    pub path: String,
    /// The images that it belongs to.
    pub images: Vec<Digest>,
    /// What is wrong with it.
    pub why: String,
    /// What became of it.
    pub outcome: Outcome,
    /// Why it could not be repaired.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

/// What became of damage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// It is there still: repairing was not asked for, or is not for this program.
    Found,
    /// It is sound again. Who had it open goes on with the old bytes until they open it again.
    Repaired,
    /// Nothing sound was to be had: its images count as absent, and the next pull of one mends it.
    Lost,
}

impl VerifyReport {
    /// Whether all is sound now.
    pub fn is_sound(&self) -> bool {
        self.damage.iter().all(|damage| damage.outcome == Outcome::Repaired)
    }
}

/// A verification under way.
struct Run {
    options: VerifyOptions,
    control: Arc<VerifyControl>,
    report: VerifyReport,
}

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

impl Puller {
    /// Reads what is stored, tells what is damaged, and repairs it where that is asked for.
    ///
    /// `control` steers and shows it meanwhile. Pods that have a damaged file open keep it as it was
    /// until they open it again.
    ///
    /// # Errors
    ///
    /// When the store cannot be read or written. Damage is no error, nor is a registry that is away.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future stops it soon; each repair is done or not begun.
    pub async fn verify(
        &self,
        options: VerifyOptions,
        control: Arc<VerifyControl>,
    ) -> Result<VerifyReport, PullError> {
        let stop = StopOnDrop(Arc::clone(&control));
        let run = Run { options, control, report: VerifyReport::default() };
        let report = self.inner.verify(run).await;
        drop(stop);
        report
    }
}

/// Blocking reads end when nobody waits for them any more.
struct StopOnDrop(Arc<VerifyControl>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.stop();
    }
}

impl Inner {
    async fn verify(self: &Arc<Self>, mut run: Run) -> Result<VerifyReport, PullError> {
        let chosen = run.options.images.clone();
        let (images, objects) = self
            .disk(move |store| {
                let mut images = store.tree_names()?;
                if chosen.is_empty() {
                    return Ok((images, None));
                }
                images.retain(|image| chosen.contains(image));
                let mut objects = BTreeSet::new();
                for image in &images {
                    if let Ok(loaded) = store.load_image(image)? {
                        let files = loaded.tree.files().into_iter();
                        objects.extend(files.filter(|file| file.1 > 0).map(|file| file.2));
                    }
                }
                Ok((images, Some(objects)))
            })
            .await?;
        let objects = Arc::new(objects);
        let first = run.options.first_part;
        let (expected, control) = (Arc::clone(&objects), Arc::clone(&run.control));
        self.disk(move |store| {
            for part in first..=u8::MAX {
                for (_, size) in chosen_of(store, part, &expected)?.objects {
                    control.expect(size);
                }
            }
            Ok(())
        })
        .await?;
        for part in first..=u8::MAX {
            run.control.begin(part);
            let (chosen, control) = (Arc::clone(&objects), Arc::clone(&run.control));
            let (damaged, strangers) = self
                .disk(move |store| {
                    let Part { objects, strangers } = chosen_of(store, part, &chosen)?;
                    let mut checker = Checker::new(&control);
                    let mut damaged = BTreeMap::new();
                    for (object, _) in objects {
                        if let Some(fault) = store.check_object(&object, &mut checker)? {
                            damaged.insert(object, fault);
                        }
                    }
                    Ok((damaged, strangers))
                })
                .await?;
            self.deal_with(&mut run, damaged).await?;
            for name in strangers {
                let why = "is no object: remove it".to_owned();
                run.note(format!("objects/{name}"), Vec::new(), why, Outcome::Found, None);
            }
            if self.is_over(&run) {
                return Ok(run.finish(false));
            }
        }
        for image in images {
            self.verify_image(&mut run, image).await?;
            if self.is_over(&run) {
                return Ok(run.finish(false));
            }
        }
        Ok(run.finish(true))
    }

    fn is_over(&self, run: &Run) -> bool {
        run.control.is_stopped() || self.stop.is_cancelled()
    }

    /// An image's records and its tree.
    async fn verify_image(self: &Arc<Self>, run: &mut Run, image: Digest) -> Result<(), PullError> {
        run.report.images += 1;
        let path = format!("trees/{}", image.hex());
        let control = Arc::clone(&run.control);
        let checked = self
            .disk(move |store| {
                if store.damaged_images()?.contains(&image) {
                    return Ok(Some(Err("waits for a pull that mends it".to_owned())));
                }
                let outcome = match store.load_image(&image)? {
                    Err(why) => Err(why),
                    Ok(loaded) => {
                        let mut checker = Checker::new(&control);
                        let faults = store.check_tree(&image, &loaded.tree, &mut checker)?;
                        Ok((loaded, faults))
                    }
                };
                // Removed meanwhile: nothing is wrong with what is not there.
                Ok(store.tree_names()?.contains(&image).then_some(outcome))
            })
            .await?;
        let (loaded, faults) = match checked {
            None => return Ok(()),
            Some(Ok((loaded, faults))) => (loaded, faults),
            Some(Err(why)) => {
                let (outcome, message) = match run.options.repair {
                    false => (Outcome::Found, None),
                    true => self.pull_again(image).await?,
                };
                run.note(path, vec![image], why, outcome, message);
                return Ok(());
            }
        };
        if faults.is_empty() || run.control.is_stopped() {
            return Ok(());
        }
        let outcome = match run.options.repair {
            false => Outcome::Found,
            true => self.mend(run, image, loaded.tree, &faults).await?,
        };
        for fault in faults {
            let path = format!("{path}/rootfs/{}", fault.path);
            run.note(path, vec![image], fault.why, outcome, None);
        }
        Ok(())
    }

    /// Mends a tree whose records are sound.
    async fn mend(
        self: &Arc<Self>,
        run: &mut Run,
        image: Digest,
        tree: Tree,
        faults: &[TreeFault],
    ) -> Result<Outcome, PullError> {
        let lacks: BTreeSet<ObjectId> = faults.iter().filter_map(|fault| fault.lacks).collect();
        // What the tree still has gets its name back; what is then still lacking is fetched.
        let missing = self
            .disk(move |store| {
                store.rename_lost(&image, &tree)?;
                let missing = lacks.into_iter().filter(|object| !store.is_named(object));
                Ok(missing.map(|object| (object, Fault::content("is missing".into()))).collect())
            })
            .await?;
        self.deal_with(run, missing).await?;
        self.disk(move |store| {
            if store.damaged_images()?.contains(&image) {
                return Ok(Outcome::Lost);
            }
            match store.load_image(&image)? {
                Err(_) => Ok(Outcome::Lost),
                Ok(loaded) => {
                    store.mend_tree(&image, loaded.tree.root()).map(|()| Outcome::Repaired)
                }
            }
        })
        .await
    }

    /// Repairs damaged objects, or only tells of them.
    async fn deal_with(
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
            Ok(Err(crate::layer::LayerError::Store(error))) => Err(error.into()),
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
    async fn pull_again(
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
        entry: &super::board::Entry,
    ) -> Result<(), PullError> {
        let source = self.sources.open(&request.reference, &request.secret)?;
        let manifest = self.manifest(&*source, &ManifestName::Digest(image)).await?;
        let Manifest::Image(parsed) = Manifest::parse(&manifest)? else {
            return Err(PullError::Mismatch(format!("manifest {image}: is an index")));
        };
        entry.set(|stage| {
            stage.digest = Some(image);
            stage.total_bytes = parsed.download_bytes();
            stage.state = super::PullState::Pulling;
        });
        let found = super::run::Resolved { resolved: image, image: parsed, manifest };
        self.bring_image(&source, &found, request, entry).await.map(drop)
    }
}

impl Run {
    fn note(
        &mut self,
        path: String,
        images: Vec<Digest>,
        why: String,
        outcome: Outcome,
        message: Option<String>,
    ) {
        self.control.found();
        let shown = images.iter().map(Digest::short).collect::<Vec<_>>().join(" ");
        match outcome {
            Outcome::Repaired => {
                self.control.repaired();
                tracing::warn!(path, why, images = shown, "repaired damage in the store");
            }
            Outcome::Found => {
                tracing::error!(path, why, images = shown, "found damage in the store");
            }
            Outcome::Lost => tracing::error!(
                path,
                why,
                images = shown,
                reason = message.as_deref().unwrap_or_default(),
                "damage in the store could not be repaired; its images must be pulled again, and pods \
                 that use them started again"
            ),
        }
        if self.report.damage.len() < MAX_LISTED {
            self.report.damage.push(Damage { path, images, why, outcome, message });
        }
    }

    fn finish(mut self, complete: bool) -> VerifyReport {
        let progress = self.control.progress();
        self.report.objects = progress.objects;
        self.report.bytes = progress.bytes;
        self.report.complete = complete;
        self.report
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

fn chosen_of(
    store: &Store,
    part: u8,
    chosen: &Option<BTreeSet<ObjectId>>,
) -> Result<Part, StoreError> {
    let mut part = store.objects_of_part(part)?;
    if let Some(chosen) = chosen {
        part.objects.retain(|(object, _)| chosen.contains(object));
        part.strangers.clear();
    }
    Ok(part)
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

#[cfg(test)]
#[path = "verify_tests.rs"]
mod tests;
