//! How much room there is, and who is let in.
//!
//! ```text
//!                 ┌─ used ──────────────────────────┬─ promised ─┬─ reserved ─┬─ free ─┐
//!   quota, or     │ objects, layers on their way    │ to pulls   │ to others  │        │
//!   file system   └─────────────────────────────────┴────────────┴────────────┴────────┘
//!                            low ▲            high ▲
//! ```
//!
//! A pull is admitted before it downloads: its lease says what is still to come, and admissions
//! come one after the other (`admission`, an flock), so that two pulls never count on the same room. What
//! is missing for staying below the high watermark is evicted; what then exceeds the limit itself
//! is refused.
//!
//! # What always holds
//!
//! - **Figures that decide are fresh.** Between walks of `objects/` a running figure says only that there
//!   is plenty; nothing is evicted or refused on its word.
//! - **An unpacked size is known "at least".** Of a compressed layer the bytes as they travel count, until
//!   more of them are on the disk.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;

use super::Store;
use super::error::{Context as _, StoreError};
use super::evict::Reason;
use super::holdings::Wanted;
use super::lease::{Lease, Leased};
use super::record::Lock;
use super::reservations::Reservation;
use super::told::{size, span};
use crate::digest::Digest;
use crate::manifest::Layer;
use crate::reference::Reference;

/// The running figure is counted anew after so long: other processes share the store.
const COUNT_LASTS: Duration = Duration::from_secs(60);

/// Kept free of the file system, for trees and records: this, or a part of a small one.
const MARGIN_BYTES: u64 = 64 << 20;
const MARGIN_PART: u64 = 64;

/// How often room is made before what others take meanwhile counts as a refusal.
const ROUNDS: u32 = 3;

/// Blocks of the usual file systems.
const BLOCK_BYTES: u64 = 4096;

/// How much the store may take, and when it makes room.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limits {
    /// What the store may take; absent: what its file system has.
    pub quota_bytes: Option<u64>,
    /// The part of the quota, or of the file system, above which images are evicted.
    pub high: f64,
    /// The part down to which they are.
    pub low: f64,
    /// An image that was used so short ago is not evicted.
    pub keep_for: Duration,
}

impl Default for Limits {
    /// Whatever the file system has, and nothing is evicted before it is needed.
    fn default() -> Self {
        Self { quota_bytes: None, high: 1.0, low: 1.0, keep_for: Duration::from_secs(300) }
    }
}

/// Disk blocks of all objects, as far as they are known without a walk.
#[derive(Debug, Default)]
pub(super) struct Counted(Mutex<Option<(u64, Instant)>>);

impl Counted {
    /// A walk has found so much.
    pub(super) fn set(&self, bytes: u64) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some((bytes, Instant::now()));
    }

    /// An object of `size` bytes has come.
    pub(super) fn add(&self, size: u64) {
        if let Some((bytes, _)) = &mut *self.0.lock().unwrap_or_else(PoisonError::into_inner) {
            *bytes += size.next_multiple_of(BLOCK_BYTES);
        }
    }

    fn recent(&self) -> Option<u64> {
        let counted = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        counted.filter(|(_, at)| at.elapsed() < COUNT_LASTS).map(|(bytes, _)| bytes)
    }
}

/// Sum of figures that manifests, records and callers name: they may say anything.
fn total(bytes: impl Iterator<Item = u64>) -> u64 {
    bytes.fold(0, u64::saturating_add)
}

/// What there is of it, at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Space {
    /// What the store may take: the quota, or the file system's size.
    pub limit_bytes: u64,
    /// The store's share of the quota; without one, all that is taken of the file system.
    pub used_bytes: u64,
    /// What can still be written before the quota or the file system is full.
    pub free_bytes: u64,
}

impl Space {
    /// What must go so that `coming` bytes fit below `part` of the limit.
    pub(super) fn excess(&self, coming: u64, part: f64) -> u64 {
        let over = Self { used_bytes: self.used_bytes.saturating_add(coming), ..*self }.above(part);
        over.max(coming.saturating_sub(self.free_bytes))
    }

    /// As it will be when so much has gone.
    pub(super) fn with_freed(&self, bytes: u64) -> Self {
        Self {
            used_bytes: self.used_bytes.saturating_sub(bytes),
            free_bytes: self.free_bytes.saturating_add(bytes),
            ..*self
        }
    }

    /// What is used above `part` of the limit.
    pub(super) fn above(&self, part: f64) -> u64 {
        self.used_bytes.saturating_sub((self.limit_bytes as f64 * part) as u64)
    }
}

/// Room that others were promised.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Promised {
    /// What pulls under way have still to bring, at least.
    pub pulls_bytes: u64,
    /// What reservations keep free.
    pub reserved_bytes: u64,
}

impl Promised {
    pub(super) fn total(&self) -> u64 {
        self.pulls_bytes.saturating_add(self.reserved_bytes)
    }
}

impl Store {
    /// This handle and its clones keep to `limits`.
    #[must_use]
    pub fn with_limits(self, limits: Limits) -> Self {
        Self { limits, ..self }
    }

    /// What the store keeps to.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// How much room there is. With a quota that costs a walk of all objects when the last one is
    /// more than a minute ago, else a few system calls.
    pub fn space(&self) -> Result<Space, StoreError> {
        self.measure(self.counted.recent())
    }

    /// The figures that move with each byte of a pull: how much room there is, and what of it is
    /// promised. Costs what [`Store::space`] does, and a few small files a pull.
    pub fn standing(&self) -> Result<(Space, Promised), StoreError> {
        let (_, promised) = self.promised(|_| false)?;
        Ok((self.space()?, promised))
    }

    /// As [`Store::space`], counted anew.
    pub(super) fn space_now(&self) -> Result<Space, StoreError> {
        self.measure(None)
    }

    fn measure(&self, object_bytes: Option<u64>) -> Result<Space, StoreError> {
        let disk = rustix::fs::statvfs(self.root())
            .context(|| format!("statvfs {}", self.root().display()))?;
        let capacity = disk.f_blocks.saturating_mul(disk.f_frsize);
        let available = disk.f_bavail.saturating_mul(disk.f_frsize);
        let writable = available.saturating_sub(MARGIN_BYTES.min(capacity / MARGIN_PART));
        let Some(quota) = self.limits.quota_bytes else {
            // As `df` has it: what is kept for root is neither.
            let used_bytes = capacity.saturating_sub(disk.f_bfree.saturating_mul(disk.f_frsize));
            let limit_bytes = used_bytes.saturating_add(available);
            return Ok(Space { limit_bytes, used_bytes, free_bytes: writable });
        };
        let object_bytes = match object_bytes {
            Some(bytes) => bytes,
            None => self.count_objects()?,
        };
        let coming: u64 = self.partial_bytes()?.values().sum();
        let used_bytes = object_bytes + coming;
        let free_bytes = quota.saturating_sub(used_bytes).min(writable);
        Ok(Space { limit_bytes: quota, used_bytes, free_bytes })
    }

    fn count_objects(&self) -> Result<u64, StoreError> {
        let mut bytes = 0;
        self.walk_objects(|_, meta| {
            bytes += meta.blocks() * 512;
            Ok(())
        })?;
        self.counted.set(bytes);
        Ok(bytes)
    }

    /// Disk blocks of what lies in `ingest/`, by folder.
    pub(super) fn partial_bytes(&self) -> Result<BTreeMap<String, u64>, StoreError> {
        let ingest = self.path("ingest");
        let what = || format!("read {}", ingest.display());
        let mut found = BTreeMap::new();
        for entry in fs::read_dir(&ingest).context(what)? {
            let entry = entry.context(what)?;
            let (Ok(name), Ok(files)) =
                (entry.file_name().into_string(), fs::read_dir(entry.path()))
            else {
                continue;
            };
            // Commits and removals of others go on meanwhile: what has gone takes nothing.
            // And what is linked from there counts where it is.
            let own = files.flatten().filter_map(|file| file.metadata().ok());
            let own = own.filter(|meta| meta.nlink() == 1);
            found.insert(name, own.map(|meta| meta.blocks() * 512).sum());
        }
        Ok(found)
    }

    /// What was promised, but for the reservations that `ours` says are the caller's own.
    pub(super) fn promised(
        &self,
        ours: impl Fn(&Reservation) -> bool,
    ) -> Result<(BTreeMap<String, u64>, Promised), StoreError> {
        let leases = self.leases()?;
        let mut coming = BTreeMap::new();
        let mut pulled = BTreeSet::new();
        for lease in leases {
            coming.extend(lease.coming);
            pulled.extend(lease.reference);
        }
        let mut reservations = self.reservations()?;
        // A pull that is under way has taken its reservation over.
        reservations.retain(|one| {
            !ours(one) && one.reference.as_ref().is_none_or(|name| !pulled.contains(name))
        });
        let promised = Promised {
            pulls_bytes: self.to_write(&coming)?,
            reserved_bytes: total(reservations.iter().map(|one| one.bytes)),
        };
        Ok((coming, promised))
    }

    /// Bytes of those of `layers` (with what the image says that they unpack to) that are not here,
    /// at least, by the names of their records.
    pub(crate) fn missing(
        &self,
        layers: &BTreeSet<(Layer, Option<Digest>)>,
    ) -> Result<BTreeMap<String, u64>, StoreError> {
        let mut missing = BTreeMap::new();
        for (layer, diff_id) in layers {
            if self.layer_as(layer, diff_id.as_ref())?.is_none() {
                missing.insert(layer.record_name(), layer.blob.size);
            }
        }
        Ok(missing)
    }

    /// What of `missing` has still to be written, beside what an interrupted pull has left.
    pub(crate) fn to_write(&self, missing: &BTreeMap<String, u64>) -> Result<u64, StoreError> {
        if missing.is_empty() {
            return Ok(0);
        }
        // Before the partial layers: one that is committed meanwhile is then counted as what it is.
        let partial = self.partial_bytes()?;
        let records: BTreeSet<String> = self.layer_records().names()?.into_iter().collect();
        let came = |name: &String| {
            let as_other = format!("{name}.as-");
            records.contains(name)
                || records
                    .range(as_other.clone()..)
                    .next()
                    .is_some_and(|n| n.starts_with(&as_other))
        };
        let left = missing.iter().filter(|(name, _)| !came(name)).map(|(name, bytes)| {
            let digest = name.split('.').next().unwrap_or(name);
            bytes.saturating_sub(partial.get(digest).copied().unwrap_or_default())
        });
        Ok(total(left))
    }

    /// Waits until nobody else admits or evicts. Before any other lock.
    pub(super) fn admission(&self) -> Result<Lock, StoreError> {
        Lock::exclusive(&self.path("admission"))
    }

    /// Leases the layers of a pull when there is room for what is coming, and makes some where `evict`
    /// says so; `None` where it does not, and there is less than plenty.
    ///
    /// # Errors
    ///
    /// [`StoreError::NoSpace`] with the numbers when none can be made: nothing was evicted then,
    /// unless somebody took what was freed.
    pub(crate) fn admit(&self, pull: &Admission, evict: bool) -> Result<Option<Lease>, StoreError> {
        let Admission { image, reference, layers, coming } = pull;
        let _turn = self.admission()?;
        let (others, _) = self.promised(|_| true)?;
        // Before anything is evicted: what is here of this image must not go with another.
        let lease = self.lease(&Leased {
            layers: layers.clone(),
            image: Some(*image),
            reference: Some(reference.clone()),
            coming: coming.clone(),
        })?;
        // A layer that another pull brings was promised to that one.
        let mut own = coming.clone();
        own.retain(|name, _| !others.contains_key(name));
        let demand = || {
            let needed = self.to_write(&own)?;
            let (_, mut taken) = self.promised(|one| one.reference.as_ref() == Some(reference))?;
            taken.pulls_bytes = taken.pulls_bytes.saturating_sub(needed);
            Ok((needed, taken))
        };
        if own.is_empty() || self.is_plenty(demand)? {
            return Ok(Some(lease));
        }
        if !evict {
            return Ok(None);
        }
        self.make_room(&format!("pull {reference}"), Reason::Pull, demand)?;
        Ok(Some(lease))
    }

    /// Evicts where `bytes` more than all that was promised do not fit. For who has the right to a layer,
    /// which is taken after the admission lock otherwise: nobody waits for such a right.
    ///
    /// # Errors
    ///
    /// [`StoreError::NoSpace`] with the numbers, as [`Store::admit`] has them.
    pub(super) fn make_room_for(&self, what: &str, bytes: u64) -> Result<(), StoreError> {
        let _turn = self.admission()?;
        self.make_room(what, Reason::Pull, || Ok((bytes, self.promised(|_| false)?.1)))
    }

    /// Whether what `demand` asks for fits below the high watermark.
    fn is_plenty(
        &self,
        demand: impl Fn() -> Result<(u64, Promised), StoreError>,
    ) -> Result<bool, StoreError> {
        let fits = |space: Space| {
            let (needed, taken) = demand()?;
            Ok(space.excess(taken.total().saturating_add(needed), self.limits.high) == 0)
        };
        Ok(fits(self.space()?)? || fits(self.space_now()?)?)
    }

    /// The room that a pull of this reference had reserved is used up now.
    pub(crate) fn use_up_reservations(&self, reference: &Reference) -> Result<(), StoreError> {
        for one in self.reservations()? {
            if one.reference.as_ref() == Some(reference) {
                self.release(&one.id)?;
            }
        }
        Ok(())
    }

    /// Sees to it that what `demand` asks for fits: bytes, beside those that others were promised.
    /// Under the admission lock.
    pub(super) fn make_room(
        &self,
        what: &str,
        reason: Reason,
        demand: impl Fn() -> Result<(u64, Promised), StoreError>,
    ) -> Result<(), StoreError> {
        let coming = |(needed, taken): (u64, Promised)| taken.total().saturating_add(needed);
        let high = self.limits.high;
        if self.is_plenty(&demand)? {
            return Ok(());
        }
        // What nobody uses goes before any image.
        self.collect_idle()?;
        let mut rounds = 0;
        loop {
            let (needed, taken) = demand()?;
            let coming = coming((needed, taken));
            let space = self.space_now()?;
            let excess = space.excess(coming, high);
            if excess == 0 {
                return Ok(());
            }
            let holdings = self.holdings(&Wanted::default())?;
            let choice = holdings.choose(excess);
            let lacking = coming.saturating_sub(space.free_bytes);
            // Above the watermark with nothing to evict is no reason to refuse; beyond the limit is.
            let vain = choice.images.is_empty() || choice.freed_bytes < lacking;
            if vain || rounds == ROUNDS {
                if lacking == 0 {
                    return Ok(());
                }
                let room = Room { space, taken, held: holdings.held(), unused_bytes: 0 };
                return Err(StoreError::NoSpace { what: room.refusal(what, needed, &self.limits) });
            }
            self.evict(&choice, reason)?;
            rounds += 1;
        }
    }
}

/// A pull that wants to be let in.
#[derive(Debug, Clone)]
pub(crate) struct Admission {
    /// What it brings.
    pub(crate) image: Digest,
    /// As it was asked for.
    pub(crate) reference: Reference,
    /// All of its layers.
    pub(crate) layers: BTreeSet<Digest>,
    /// Those of them that are missing, as [`Store::missing`] has them.
    pub(crate) coming: BTreeMap<String, u64>,
}

/// What the images hold of the disk; each byte counts once, under the first reason that holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Held {
    /// Of images that volumes show.
    pub mounted_bytes: u64,
    /// Of images that are pinned.
    pub pinned_bytes: u64,
    /// Of images that were used a moment ago, and of pulls under way.
    pub recent_bytes: u64,
    /// Of images that can be evicted.
    pub evictable_bytes: u64,
}

/// All that an admission looks at.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Room {
    /// The disk.
    #[serde(flatten)]
    pub space: Space,
    /// What others were promised.
    #[serde(flatten)]
    pub taken: Promised,
    /// What images hold.
    #[serde(flatten)]
    pub held: Held,
    /// Objects and partial layers that nobody uses.
    pub unused_bytes: u64,
}

/// How something that is still to come would be let in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fits {
    /// It would be refused.
    No,
    /// Images would be evicted for it.
    AfterEviction,
    /// No image would go.
    AsItIs,
}

impl Room {
    /// How a pull of `needed` bytes would be let in, beside what others were promised: [`Store`]'s
    /// admission, reckoned from these figures alone.
    pub fn fits(&self, needed: u64, limits: &Limits) -> Fits {
        if needed == 0 {
            return Fits::AsItIs;
        }
        let coming = self.taken.total().saturating_add(needed);
        // What nobody uses goes before any image.
        let space = self.space.with_freed(self.unused_bytes);
        let lacking = coming.saturating_sub(space.free_bytes);
        if lacking > self.held.evictable_bytes {
            Fits::No
        } else if space.excess(coming, limits.high) == 0 || self.held.evictable_bytes == 0 {
            Fits::AsItIs
        } else {
            Fits::AfterEviction
        }
    }

    fn refusal(&self, what: &str, needed: u64, limits: &Limits) -> String {
        let Self { space, taken, held, .. } = self;
        let of = match limits.quota_bytes {
            Some(_) => format!("the quota of {}", size(space.limit_bytes)),
            None => format!("a file system of {}", size(space.limit_bytes)),
        };
        let mut text = format!(
            "{what}: needs at least {}, and {} is free of {of}; {} could be evicted",
            size(needed),
            size(space.free_bytes),
            size(held.evictable_bytes),
        );
        let recent = format!("used in the last {}", span(limits.keep_for));
        for (bytes, what) in [
            (held.mounted_bytes, "mounted"),
            (held.pinned_bytes, "pinned"),
            (held.recent_bytes, recent.as_str()),
            (taken.pulls_bytes, "promised to pulls under way"),
            (taken.reserved_bytes, "reserved"),
        ] {
            if bytes > 0 {
                text += &format!(", {} is {what}", size(bytes));
            }
        }
        text += ": unpin or remove images, wait for pulls to end";
        text += match limits.quota_bytes {
            Some(_) => ", or raise store.quota",
            None => ", or enlarge the disk",
        };
        text
    }
}

#[cfg(test)]
#[path = "capacity_tests.rs"]
mod tests;
