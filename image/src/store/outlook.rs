//! What an admission would do, without doing it.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::MetadataExt;

use super::capacity::{Held, Room};
use super::error::StoreError;
use super::evict::EvictedImage;
use super::holdings::Wanted;
use super::{LayerRecord, Store};
use crate::digest::{Digest, ObjectId};
use crate::reference::Reference;

/// Whether something would fit.
#[derive(Debug, Clone)]
pub(crate) struct Outlook {
    /// Bytes that would be written, at least.
    pub(crate) needed_bytes: u64,
    /// How things stand before.
    pub(crate) room: Room,
    /// What would be evicted, the cheapest first.
    pub(crate) evict: Vec<EvictedImage>,
    /// Whether there is room, after the evictions.
    pub(crate) fits: bool,
}

/// What the images hold, as a walk of all trees finds it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Survey {
    /// What images hold.
    pub held: Held,
    /// Objects and partial layers that nobody uses.
    pub unused_bytes: u64,
    /// Images that can be evicted, with the bytes of `held.evictable_bytes` that could not go without
    /// them: what several such images share counts for each.
    pub evictable: BTreeMap<Digest, u64>,
}

impl Store {
    /// How much room there is, what was promised, and what the images hold of it.
    ///
    /// Costs a `stat` for each object and for each file of all images.
    pub fn room(&self) -> Result<Room, StoreError> {
        let wanted = Wanted::default();
        let (_, taken) = self.promised(|_| false)?;
        Ok(Room {
            space: self.space_now()?,
            taken,
            held: self.holdings(&wanted)?.held(),
            unused_bytes: self.unused_bytes(&wanted)?,
        })
    }

    /// What the images hold, and which of it could go. With [`Store::standing`] that is [`Store::room`], for
    /// who looks again and again.
    ///
    /// Costs a `stat` for each object and for each file of all images.
    pub fn survey(&self) -> Result<Survey, StoreError> {
        let wanted = Wanted::default();
        let holdings = self.holdings(&wanted)?;
        let mut evictable = BTreeMap::new();
        for (images, bytes) in holdings.sets() {
            for image in images {
                *evictable.entry(holdings.images[image].image.digest).or_default() += bytes;
            }
        }
        let unused_bytes = self.unused_bytes(&wanted)?;
        Ok(Survey { held: holdings.held(), unused_bytes, evictable })
    }

    /// What pulls of `references`, of which these layers are `missing`, would find.
    pub(crate) fn outlook(
        &self,
        wanted: &Wanted,
        references: &BTreeSet<Reference>,
        missing: &BTreeMap<String, u64>,
    ) -> Result<Outlook, StoreError> {
        let ours = |reference: &Reference| references.contains(reference);
        let (others, taken) = self.promised(|one| one.reference.as_ref().is_some_and(ours))?;
        let mut own = missing.clone();
        own.retain(|name, _| !others.contains_key(name));
        let needed_bytes = self.to_write(&own)?;
        let holdings = self.holdings(wanted)?;
        let room = Room {
            space: self.space_now()?,
            taken,
            held: holdings.held(),
            unused_bytes: self.unused_bytes(wanted)?,
        };
        let coming = match own.is_empty() {
            true => 0,
            false => taken.total().saturating_add(needed_bytes),
        };
        let after = room.space.with_freed(room.unused_bytes);
        let choice = match coming {
            0 => Vec::new(),
            coming => {
                let choice = holdings.choose(after.excess(coming, self.limits.high));
                let fits = after.with_freed(choice.freed_bytes).free_bytes >= coming;
                if !fits {
                    return Ok(Outlook { needed_bytes, room, evict: Vec::new(), fits });
                }
                choice.images
            }
        };
        let evict = choice.into_iter().map(|chosen| chosen.told).collect();
        Ok(Outlook { needed_bytes, room, evict, fits: true })
    }

    /// What making room would free before any image: objects that no tree and no pull uses, and layers that
    /// no pull goes on with.
    fn unused_bytes(&self, wanted: &Wanted) -> Result<u64, StoreError> {
        let mut layers = self.young_layers()?;
        layers.extend(&wanted.layers);
        layers.extend(self.leases()?.into_iter().flat_map(|lease| lease.layers));
        let mut kept = BTreeSet::new();
        for layer in &layers {
            self.visit_objects(layer, |object| {
                kept.insert(object.to_string());
            })?;
        }
        let mut bytes = 0;
        self.walk_objects(|path, meta| {
            let name = path.file_name().and_then(|name| name.to_str());
            if meta.nlink() == 1 && name.is_none_or(|name| !kept.contains(name)) {
                bytes += meta.blocks() * 512;
            }
            Ok(())
        })?;
        let partial = self.partial_bytes()?.into_iter();
        let idle = partial
            .filter(|(name, _)| Digest::from_hex(name).is_ok_and(|layer| !layers.contains(&layer)));
        Ok(bytes + idle.map(|(_, bytes)| bytes).sum::<u64>())
    }

    /// The objects of all that a layer was read as.
    pub(super) fn visit_objects(
        &self,
        layer: &Digest,
        mut visit: impl FnMut(ObjectId),
    ) -> Result<(), StoreError> {
        let records = self.layer_records();
        let start = layer.hex();
        for name in records.names()?.iter().filter(|name| name.starts_with(&start)) {
            let Some(record) = records.get_sound::<LayerRecord>(name)? else { continue };
            for (object, _) in record.objects() {
                visit(object);
            }
        }
        Ok(())
    }
}
