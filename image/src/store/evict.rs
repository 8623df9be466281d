//! Eviction: which images go when there is too little room.
//!
//! ```text
//! unused objects, partial layers ─► sets of images, the cheapest first ─► remove each ─► collect
//! ```
//!
//! Images that share files free them only together. So candidates are not images but *sets*: for
//! every file, the images that hold it. What is lost with a set, for each byte of it that is needed:
//!
//! ```text
//!            sum over its images:  1 h / (1 h + idle)  ×  (2 s + gone / rate)
//!   score =  ----------------------------------------------------------------
//!                          min(bytes that go, bytes needed)
//! ```
//!
//! `gone` is what of the image would have to be fetched again, `rate` what its registry has given
//! lately. The set with the lowest score goes first, until enough would be free; then images that
//! turn out not to be needed for that stay after all.
//!
//! # What always holds
//!
//! - **Nothing that somebody holds goes**: looked at again under the exclusive lock, image by image.
//! - **Nothing goes for nothing**: a set that frees no byte has no score.
//! - **Each step can be the last one.** An image is removed as a whole, by a rename; what a crash leaves
//!   of it the next start or collection finds.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::Duration;

use serde::Serialize;

use super::Store;
use super::collect::Collected;
use super::error::StoreError;
use super::holdings::{Holding, Holdings, Wanted};
use super::told::{size, span};
use crate::crash;
use crate::digest::Digest;

/// After so long without use an image is half as likely to be asked for as at once.
const HALF: Duration = Duration::from_secs(3600);

/// What a pull costs however small the image: asking, resolving, a pod that waits.
const PULL_SECONDS: f64 = 2.0;

/// Sets of images that are looked at; the others hold the least.
const MAX_SETS: usize = 512;

/// Why images were evicted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Reason {
    /// The store was above its high watermark.
    Watermark,
    /// A pull needed the room.
    Pull,
    /// A reservation needed it.
    Reservation,
}

impl Reason {
    /// All there are.
    pub const ALL: [Self; 3] = [Self::Watermark, Self::Pull, Self::Reservation];

    /// One word for metrics and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Watermark => "watermark",
            Self::Pull => "pull",
            Self::Reservation => "reservation",
        }
    }
}

/// What an eviction did.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Evicted {
    /// The images that went.
    pub images: Vec<EvictedImage>,
    /// What that freed, and what nobody had used.
    pub collected: Collected,
}

/// An image that was evicted or would be, and the parts of its score.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct EvictedImage {
    /// The image.
    pub digest: Digest,
    /// What it was called.
    pub references: Vec<String>,
    /// Bytes of it that go: they are its own, or shared with images that go, too.
    pub freed_bytes: u64,
    /// Time since its last use, in seconds.
    pub idle_seconds: u64,
    /// Bytes per second at which its registry would give it again.
    pub bytes_per_second: f64,
    /// Seconds that somebody is expected to wait for it, as likely as its last use makes that.
    pub expected_seconds: f64,
}

/// What evictions of this process have freed since it started, by reason.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EvictionCount {
    /// Images that went.
    pub images: u64,
    /// Bytes that were freed with them.
    pub bytes: u64,
}

/// Shared by the clones of a store.
#[derive(Debug, Default)]
pub(super) struct Evictions(Mutex<BTreeMap<Reason, EvictionCount>>);

impl Evictions {
    fn count(&self, reason: Reason, bytes: u64) {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.entry(reason).or_default();
        count.images += 1;
        count.bytes += bytes;
    }
}

/// What would be evicted.
pub(super) struct Choice {
    pub(super) images: Vec<Chosen>,
    /// Bytes that go with all of them.
    pub(super) freed_bytes: u64,
}

pub(super) struct Chosen {
    pub(super) told: EvictedImage,
    /// Used since then, it stays.
    last_used: Option<std::time::SystemTime>,
}

/// The sets, and which images are to go.
struct Selection<'a> {
    holdings: &'a Holdings,
    sets: Vec<(Vec<usize>, u64)>,
    chosen: Vec<bool>,
}

impl Selection<'_> {
    /// Bytes that go with the chosen images, of all or of one.
    fn freed(&self, chosen: &[bool], of: Option<usize>) -> u64 {
        let whole = self.sets.iter().filter(|(set, _)| {
            set.iter().all(|image| chosen[*image]) && of.is_none_or(|image| set.contains(&image))
        });
        whole.map(|(_, bytes)| bytes).sum()
    }

    /// Seconds that are expected to be lost with an image.
    fn lost(&self, chosen: &[bool], image: usize) -> f64 {
        let Holding { idle, bytes_per_second, .. } = &self.holdings.images[image];
        let again = PULL_SECONDS + self.freed(chosen, Some(image)) as f64 / bytes_per_second;
        again * HALF.as_secs_f64() / (HALF + *idle).as_secs_f64()
    }

    /// The set that costs least for each of the `needed` bytes, added to what is chosen already.
    fn cheapest(&self, needed: u64) -> Option<Vec<bool>> {
        let before = self.freed(&self.chosen, None);
        let mut best: Option<(f64, Vec<bool>)> = None;
        for (set, _) in &self.sets {
            let mut with = self.chosen.clone();
            for image in set {
                with[*image] = true;
            }
            let gain = self.freed(&with, None).saturating_sub(before);
            if gain == 0 {
                continue;
            }
            let added = set.iter().filter(|image| !self.chosen[**image]);
            let lost: f64 = added.map(|image| self.lost(&with, *image)).sum();
            let score = lost / gain.min(needed) as f64;
            if best.as_ref().is_none_or(|(least, _)| score < *least) {
                best = Some((score, with));
            }
        }
        best.map(|(_, with)| with)
    }

    /// Lets images stay that are not needed for `needed` bytes, the dearest first.
    fn prune(&mut self, needed: u64) {
        let mut images: Vec<(f64, usize)> = (0..self.chosen.len())
            .filter(|image| self.chosen[*image])
            .map(|image| (self.lost(&self.chosen, image), image))
            .collect();
        images.sort_by(|a, b| b.0.total_cmp(&a.0));
        for (_, image) in images {
            let mut without = self.chosen.clone();
            without[image] = false;
            if self.freed(&without, None) >= needed {
                self.chosen = without;
            }
        }
    }
}

impl Holdings {
    /// The images that should go so that `needed` bytes are freed, or as many as can be.
    pub(super) fn choose(&self, needed: u64) -> Choice {
        let mut sets: Vec<(Vec<usize>, u64)> = self.sets().into_iter().collect();
        sets.sort_by_key(|(_, bytes)| std::cmp::Reverse(*bytes));
        sets.truncate(MAX_SETS);
        let chosen = vec![false; self.images.len()];
        let mut selection = Selection { holdings: self, sets, chosen };
        let mut freed_bytes = 0;
        while freed_bytes < needed
            && let Some(with) = selection.cheapest(needed - freed_bytes)
        {
            selection.chosen = with;
            freed_bytes = selection.freed(&selection.chosen, None);
        }
        selection.prune(needed.min(freed_bytes));
        let chosen = &selection.chosen;
        let mut images: Vec<Chosen> = (0..chosen.len())
            .filter(|image| chosen[*image])
            .map(|index| {
                let Holding { image, last_used, idle, bytes_per_second, .. } = &self.images[index];
                let told = EvictedImage {
                    digest: image.digest,
                    references: image.references.clone(),
                    freed_bytes: selection.freed(chosen, Some(index)),
                    idle_seconds: idle.as_secs(),
                    bytes_per_second: *bytes_per_second,
                    expected_seconds: selection.lost(chosen, index),
                };
                Chosen { told, last_used: *last_used }
            })
            .collect();
        // Should it be cut short, the cheapest have gone.
        images.sort_by(|a, b| a.told.expected_seconds.total_cmp(&b.told.expected_seconds));
        Choice { images, freed_bytes: selection.freed(chosen, None) }
    }
}

impl Store {
    /// Evicts images down to the low watermark when the store is above the high one; what nobody
    /// uses goes before.
    ///
    /// # Errors
    ///
    /// [`StoreError::Corrupt`] when a record that may keep an image cannot be read.
    pub fn keep_below_watermark(&self) -> Result<Evicted, StoreError> {
        let limits = self.limits();
        if self.space()?.above(limits.high) == 0 {
            return Ok(Evicted::default());
        }
        let _turn = self.admission()?;
        if self.space_now()?.above(limits.high) == 0 {
            return Ok(Evicted::default());
        }
        let collected = self.collect_idle()?;
        let excess = self.space_now()?.above(limits.low);
        if excess == 0 {
            return Ok(Evicted { images: Vec::new(), collected });
        }
        let choice = self.holdings(&Wanted::default())?.choose(excess);
        let mut evicted = self.evict(&choice, Reason::Watermark)?;
        evicted.collected.objects += collected.objects;
        evicted.collected.bytes += collected.bytes;
        Ok(evicted)
    }

    /// Removes what was chosen, but for what somebody has begun to use since, and collects.
    /// Under the admission lock.
    pub(super) fn evict(&self, choice: &Choice, reason: Reason) -> Result<Evicted, StoreError> {
        let mut evicted = Evicted::default();
        for chosen in &choice.images {
            let EvictedImage { digest, freed_bytes, .. } = &chosen.told;
            crash::point("evict: an image is to go");
            let removed = self.remove_unless(digest, || {
                let used = self.last_used(digest) != chosen.last_used;
                let leased = self.leases()?.iter().any(|lease| lease.image == Some(*digest));
                Ok((used || leased).then(|| "in use again".to_owned()))
            });
            match removed {
                Ok(true) => {}
                Ok(false) => continue,
                Err(StoreError::InUse(why)) => {
                    tracing::info!(%why, "not evicted");
                    continue;
                }
                Err(e) => return Err(e),
            }
            self.evictions.count(reason, *freed_bytes);
            let EvictedImage { references, idle_seconds, expected_seconds, .. } = &chosen.told;
            tracing::info!(
                image = %digest,
                ?references,
                reason = reason.as_str(),
                freed = size(*freed_bytes),
                idle = span(Duration::from_secs(*idle_seconds)),
                rate = format!("{}/s", size(chosen.told.bytes_per_second as u64)),
                expected_seconds,
                "image evicted"
            );
            evicted.images.push(chosen.told.clone());
        }
        crash::point("evict: all images are gone");
        evicted.collected = self.collect_idle()?;
        Ok(evicted)
    }

    /// What evictions by this handle and its clones have freed.
    pub fn evictions(&self, reason: Reason) -> EvictionCount {
        let counts = self.evictions.0.lock().unwrap_or_else(PoisonError::into_inner);
        counts.get(&reason).copied().unwrap_or_default()
    }
}

#[cfg(test)]
#[path = "evict_tests.rs"]
mod tests;
