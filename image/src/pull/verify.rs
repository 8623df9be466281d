//! Verifying what is stored, and repairing it.
//!
//! ```text
//! 256 parts of objects ─► damaged? ─► the file's bytes from a registry ─► in the damaged one's place
//!                                       └─ not to be had: name withdrawn, images marked ─► pulled again
//! records and trees    ─► damaged? ─► mended from objects, else pulled again
//! ```
//!
//! Here things are looked at, and trees mended; where sound bytes come from is `repair`'s to know.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde::Serialize;

use super::{Inner, PullError, Puller};
use crate::digest::{Digest, ObjectId};
use crate::store::{Checker, Fault, Part, Store, StoreError, TreeFault, VerifyControl};
use crate::tree::Tree;

mod repair;

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

#[cfg(test)]
#[path = "verify_tests.rs"]
mod tests;
