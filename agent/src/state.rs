//! What this node is, as one value behind a watch.
//!
//! ```text
//! puller's changes ─┐
//! store directories ┼─► Keeper ─► read the store (blocking thread) ─► NodeState ─► watch ─► api, http
//! GPU snapshots ────┤                                                   │
//! a second's tick ──┘                                                   └─ revision + 1
//! ```
//!
//! # What always holds
//!
//! - **Readers never wait.** A reader borrows the newest value; disk, registry and NVML are asked
//!   by the keeper alone.
//! - **The revision tells.** Two values of one epoch with the same sequence are equal but for
//!   the bytes of pulls under way, which are read live from the puller, and for readings: rates,
//!   temperatures. That a pull begins, comes to another stage, or ends is a change.
//! - **Changes are gathered.** However many events come, the store is read for a quarter of the time at
//!   most, and its objects and trees are walked for a tenth of it, beside that.
//!
//! Other processes (`carport pull` on the same root) change the store, too: its directories
//! are watched, and read again once a minute in case a watch was not to be had.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use carport_csi::volume::VolumeRecord;
use carport_image::pull::{PullProgress, PullState};
use carport_image::runtime::{Inventory, RuntimeImage};
use carport_image::store::{
    Limits, Pin, RecordKind, Reservation, Room, Space, Store, StoreError, StoredImage, Usage,
};
use carport_image::{Digest, Reference};

use crate::gpu::GpuInventory;
use crate::page_cache::Sample;
use crate::prepull;

mod keeper;
mod rates;

pub use keeper::Keeper;
pub use rates::{Rate, Rates, host};

/// A point in this node's history.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Revision {
    /// Another one at each start of the agent.
    pub epoch: Arc<str>,
    /// Grows by one with each change.
    pub sequence: u64,
}

/// Something that is wrong with the node: a fixed code, and a sentence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trouble {
    /// `STORE_UNREADABLE`, `DISK_PRESSURE`, `PREPULL_LIST_INVALID`, `PREPULL_NO_ROOM`, and those of
    /// [`Kubelet::findings`](crate::kubelet::Kubelet::findings).
    pub code: &'static str,
    /// What is wrong, and what to do.
    pub message: String,
}

/// The node, at one moment.
#[derive(Debug, Clone)]
pub struct NodeState {
    /// Which moment.
    pub revision: Revision,
    /// When this was last known to be true.
    pub observed_at: SystemTime,
    /// Complete images.
    pub images: BTreeMap<Digest, Arc<StoredImage>>,
    /// What each reference means here, in canonical form.
    pub references: HashMap<String, Digest>,
    /// Published volumes, by image.
    pub volumes: HashMap<Digest, Vec<VolumeRecord>>,
    /// Wishes that images stay, by image.
    pub pins: HashMap<Digest, Vec<Pin>>,
    /// Room that is kept free for somebody.
    pub reservations: Vec<Reservation>,
    /// What an admission would look at. What there is and what is promised is as new as this state; what images
    /// hold, as the last walk of them.
    pub room: Room,
    /// Images that could be evicted at that walk, with what could not go without them.
    pub evictable: Arc<BTreeMap<Digest, u64>>,
    /// What of it could go still: what is in use, pinned or gone by now cannot.
    pub evictable_bytes: u64,
    /// What the store keeps to.
    pub limits: Limits,
    /// The disk.
    pub usage: Usage,
    /// Pulls in flight when last looked at; [`NodeState::pulls`] has them as they are now.
    pulls: Vec<PullProgress>,
    /// What of each image is in memory, as far as it was looked at. A reading: no change of it is news.
    pub page_cache: Arc<HashMap<Digest, Sample>>,
    /// The GPUs as last seen; read them with `as_of`, which knows when that is too long ago.
    pub gpus: Arc<GpuInventory>,
    /// What registries gave lately.
    pub rates: Arc<Rates>,
    /// The pre-pull list.
    pub prepull: Arc<prepull::Report>,
    /// What the container runtime has, with its age.
    pub runtime: Arc<Inventory>,
    /// What is wrong. Empty: the node is well.
    pub troubles: Vec<Trouble>,
}

/// What is read from the store in one go.
#[derive(Debug, PartialEq)]
struct Contents {
    images: BTreeMap<Digest, Arc<StoredImage>>,
    references: HashMap<String, Digest>,
    volumes: HashMap<Digest, Vec<VolumeRecord>>,
    pins: HashMap<Digest, Vec<Pin>>,
    reservations: Vec<Reservation>,
}

impl Contents {
    /// Blocking: reads one small file an image and a volume; of images only where `before` is not
    /// true any more.
    fn read(store: &Store, before: Option<&Known>) -> Result<(Self, Known), StoreError> {
        let now = ImagesAt::look(store);
        let mut contents = Self {
            images: BTreeMap::new(),
            references: HashMap::new(),
            volumes: HashMap::new(),
            pins: HashMap::new(),
            reservations: store.reservations()?,
        };
        for pin in store.pins()? {
            contents.pins.entry(pin.image).or_default().push(pin);
        }
        match before.filter(|before| before.at.holds(&now)) {
            Some(before) => contents.images.clone_from(&before.images),
            None => {
                for image in store.images()? {
                    contents.images.insert(image.digest, Arc::new(image));
                }
            }
        }
        for image in contents.images.values() {
            for reference in &image.references {
                contents.references.insert(reference.clone(), image.digest);
            }
        }
        for (_, volume) in store.records(RecordKind::Volumes).list::<VolumeRecord>()? {
            contents.volumes.entry(volume.digest).or_default().push(volume);
        }
        let known = Known { at: now, images: contents.images.clone() };
        Ok((contents, known))
    }
}

/// Images as they were read, and of when that is true.
#[derive(Debug)]
struct Known {
    at: ImagesAt,
    images: BTreeMap<Digest, Arc<StoredImage>>,
}

/// When the folders that images are read from were looked at, and had last changed: trees and
/// references come, change and go by rename, which a folder's time tells.
#[derive(Debug, PartialEq, Eq)]
struct ImagesAt {
    looked: SystemTime,
    changed: [Option<SystemTime>; 2],
}

impl ImagesAt {
    fn look(store: &Store) -> Self {
        let changed = ["trees", "refs"].map(|name| {
            std::fs::metadata(store.root().join(name)).and_then(|meta| meta.modified()).ok()
        });
        Self { looked: SystemTime::now(), changed }
    }

    /// Whether what was read then is what `now` is there. A change within the clock's step after the look has
    /// the same time as one before it, so a folder that had just changed is read again.
    fn holds(&self, now: &Self) -> bool {
        let quiet = |changed: &Option<SystemTime>| {
            changed.is_some_and(|changed| {
                self.looked.duration_since(changed).is_ok_and(|age| age > CLOCK_STEP)
            })
        };
        self.changed == now.changed && self.changed.iter().all(quiet)
    }
}

/// Longer than the clock of any file system stands still.
const CLOCK_STEP: Duration = Duration::from_millis(100);

impl NodeState {
    /// A node that holds nothing yet.
    fn empty(gpus: Arc<GpuInventory>) -> Self {
        Self {
            revision: Revision { epoch: epoch(), sequence: 0 },
            observed_at: SystemTime::now(),
            images: BTreeMap::new(),
            references: HashMap::new(),
            volumes: HashMap::new(),
            pins: HashMap::new(),
            reservations: Vec::new(),
            room: Room::default(),
            evictable: Arc::default(),
            evictable_bytes: 0,
            limits: Limits::default(),
            usage: Usage::default(),
            pulls: Vec::new(),
            page_cache: Arc::default(),
            gpus,
            rates: Arc::default(),
            prepull: Arc::default(),
            runtime: Arc::default(),
            troubles: Vec::new(),
        }
    }

    /// The complete image in the container runtime that a digest or a reference names; none while
    /// the runtime does not tell of changes.
    pub fn in_runtime(
        &self,
        digest: Option<Digest>,
        reference: Option<&Reference>,
    ) -> Option<&RuntimeImage> {
        self.runtime.connected.then(|| self.runtime.find(digest, reference)).flatten()
    }

    /// The digest that `reference` means on this node: its own, or what the store recorded.
    pub fn resolve(&self, reference: &Reference) -> Option<Digest> {
        let recorded = || self.references.get(&reference.to_string()).copied();
        reference.digest().or_else(recorded)
    }

    /// The pulls that go with this state: `now`, the puller's list, and what has just left it. A
    /// pull that is over is finishing until the state has its image, never absent for a moment.
    pub fn pulls(&self, mut now: Vec<PullProgress>) -> Vec<PullProgress> {
        for pull in &self.pulls {
            if !now.iter().any(|other| same_pull(other, pull)) {
                let (state, done_bytes) = (PullState::Finishing, pull.total_bytes);
                now.push(PullProgress { state, done_bytes, ..pull.clone() });
            }
        }
        now
    }

    /// Published volumes of `digest`.
    pub fn mounts(&self, digest: &Digest) -> u32 {
        let count = self.volumes.get(digest).map_or(0, Vec::len);
        u32::try_from(count).unwrap_or(u32::MAX)
    }

    /// Whether no volume uses `digest` and nobody has wished at `now` that it stays.
    pub fn is_idle(&self, digest: &Digest, now: SystemTime) -> bool {
        !self.volumes.contains_key(digest) && !self.is_pinned(digest, now)
    }

    /// Sums up what every question asks for. After each change of images, volumes and pins, and each walk. What is
    /// in use, pinned or gone since the walk cannot go any more; what became idle since shows with the next one.
    pub(crate) fn reckon(&mut self) {
        let now = SystemTime::now();
        let stays =
            |digest: &Digest| !self.images.contains_key(digest) || !self.is_idle(digest, now);
        let kept: u64 =
            self.evictable.iter().filter(|(digest, _)| stays(digest)).map(|(_, bytes)| bytes).sum();
        self.evictable_bytes = self.room.held.evictable_bytes.saturating_sub(kept);
    }

    /// Whether pulls to come are likely to have images removed.
    pub fn is_full(&self) -> bool {
        let Space { limit_bytes, used_bytes, free_bytes } = self.room.space;
        #[allow(clippy::cast_precision_loss)]
        let part = used_bytes as f64 / limit_bytes.max(1) as f64;
        part >= self.limits.high || free_bytes < limit_bytes / 20
    }

    /// What could be removed at once: images that nobody uses or has pinned, and what belongs to no image.
    pub fn reclaimable_bytes(&self) -> u64 {
        self.evictable_bytes.saturating_add(self.room.unused_bytes)
    }

    /// Whether somebody has wished at `now` that `digest` stays.
    pub fn is_pinned(&self, digest: &Digest, now: SystemTime) -> bool {
        let pins = self.pins.get(digest).into_iter().flatten();
        pins.into_iter().any(|pin| pin.expires_at.is_none_or(|end| end > now))
    }

    /// Unpacked bytes of images that somebody has pinned.
    pub fn pinned_bytes(&self) -> u64 {
        let now = SystemTime::now();
        let pinned = self.pins.keys().filter(|digest| self.is_pinned(digest, now));
        let pinned = pinned.filter_map(|digest| self.images.get(digest));
        pinned.map(|image| image.unpacked_bytes).sum()
    }

    /// Unpacked bytes of images that published volumes use.
    pub fn mounted_bytes(&self) -> u64 {
        let mounted = self.volumes.keys().filter_map(|digest| self.images.get(digest));
        mounted.map(|image| image.unpacked_bytes).sum()
    }
}

/// Whether a pull is still on its way.
pub fn in_flight(pull: &PullProgress) -> bool {
    !matches!(pull.state, PullState::Done | PullState::Failed { .. })
}

/// Whether two looks saw the same pull.
pub fn same_pull(a: &PullProgress, b: &PullProgress) -> bool {
    a.started_at == b.started_at && a.reference == b.reference
}

/// Another text at each start, also when a container gives each start the same process id.
fn epoch() -> Arc<str> {
    let nanoseconds = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
    format!("{nanoseconds:x}-{:x}", std::process::id()).into()
}

#[cfg(test)]
mod tests {
    use super::fixtures::{image, node, pull};
    use super::*;

    #[test]
    fn a_pull_that_has_just_ended_is_finishing_until_its_image_is_seen() {
        let mut state = node(vec![]);
        state.pulls = vec![pull("r/a:1", 40, 100), pull("r/b:1", 1, 10)];
        let pulls = state.pulls(vec![pull("r/b:1", 5, 10)]);
        assert_eq!(pulls[0], pull("r/b:1", 5, 10));
        assert_eq!(pulls[1].state, PullState::Finishing);
        assert_eq!((pulls[1].done_bytes, pulls.len()), (100, 2));
    }

    #[test]
    fn images_are_read_again_when_a_folder_has_changed_or_had_just_changed() {
        let at = |seconds: f64| UNIX_EPOCH + Duration::from_secs_f64(seconds);
        let look = |looked, trees, refs| ImagesAt {
            looked: at(looked),
            changed: [trees, refs].map(|changed: Option<f64>| changed.map(at)),
        };
        let now = look(20.0, Some(5.0), Some(6.0));
        assert!(look(10.0, Some(5.0), Some(6.0)).holds(&now));
        for before in [
            look(10.0, Some(5.0), Some(5.9)),
            look(6.05, Some(5.0), Some(6.0)),
            // A clock that was set back.
            look(4.0, Some(5.0), Some(6.0)),
        ] {
            assert!(!before.holds(&now), "{before:?}");
        }
        assert!(!look(10.0, None, Some(6.0)).holds(&look(20.0, None, Some(6.0))));
    }

    #[test]
    fn a_reference_means_its_own_digest_or_what_was_recorded() {
        let state = node(vec![image("r/a:1", 1)]);
        let digest = image("r/a:1", 1).digest;
        assert_eq!(state.resolve(&"r/a:1".parse().unwrap()), Some(digest));
        assert_eq!(state.resolve(&"r/a:2".parse().unwrap()), None);
        let other = Digest::of(b"other");
        assert_eq!(state.resolve(&format!("r/a:1@{other}").parse().unwrap()), Some(other));
    }
}

#[cfg(test)]
pub(crate) mod fixtures {
    use super::*;
    use carport_csi::mount::MountOptions;
    use carport_csi::volume::{TargetPath, VolumeId};
    use carport_image::manifest::Packaging;
    use carport_image::pull::Priority;

    /// A stored image named by `reference`, with the digest of its name.
    pub(crate) fn image(reference: &str, unpacked_bytes: u64) -> StoredImage {
        StoredImage {
            digest: Digest::of(reference.as_bytes()),
            references: vec![reference.parse::<Reference>().unwrap().to_string()],
            packaging: Packaging::OciImage,
            unpacked_bytes,
            files: 1,
            layers: Vec::new(),
            pulled_at: UNIX_EPOCH,
        }
    }

    /// A node with `images`, all of them evictable, 1,000 bytes of disk and 600 of them free.
    pub(crate) fn node(images: Vec<StoredImage>) -> NodeState {
        let mut state = NodeState::empty(no_gpus());
        for image in images {
            for reference in &image.references {
                state.references.insert(reference.clone(), image.digest);
            }
            state.images.insert(image.digest, Arc::new(image));
        }
        let evictable: BTreeMap<Digest, u64> =
            state.images.values().map(|image| (image.digest, image.unpacked_bytes)).collect();
        state.room.held.evictable_bytes = evictable.values().sum();
        state.evictable = Arc::new(evictable);
        state.reckon();
        state.room.space = Space { limit_bytes: 1_000, used_bytes: 400, free_bytes: 600 };
        state.usage.capacity_bytes = 1_000;
        state.usage.free_bytes = 600;
        state
    }

    /// The inventory of a node where nobody looks.
    pub(crate) fn no_gpus() -> Arc<GpuInventory> {
        let options = crate::gpu::GpuOptions { enabled: false, ..Default::default() };
        crate::gpu::start(options).unwrap().reader().current()
    }

    /// A published volume.
    pub(crate) fn volume(digest: Digest) -> VolumeRecord {
        VolumeRecord {
            volume_id: VolumeId::parse("v").unwrap(),
            target: TargetPath::parse("/pods/1/mount").unwrap(),
            image: "r/a:1".parse().unwrap(),
            digest,
            path: None,
            filter: None,
            view: None,
            stream: false,
            options: MountOptions::default(),
            bytes: 1,
            files: 1,
            pin_seconds: None,
            pod: None,
            published_at: UNIX_EPOCH,
        }
    }

    /// Somebody's wish, which ends so long from now or not at all.
    pub(crate) fn pin(image: Digest, ttl: Option<Duration>) -> Pin {
        Pin {
            owner: "somebody".parse().unwrap(),
            image,
            reference: None,
            created_at: UNIX_EPOCH,
            expires_at: ttl.map(|ttl| SystemTime::now() + ttl),
        }
    }

    /// A pull under way.
    pub(crate) fn pull(reference: &str, done_bytes: u64, total_bytes: u64) -> PullProgress {
        PullProgress {
            reference: reference.parse().unwrap(),
            digest: None,
            state: PullState::Pulling,
            priority: Priority::Demand,
            done_bytes,
            fetched_bytes: done_bytes,
            total_bytes,
            started_at: UNIX_EPOCH,
            bytes_per_second: 0.0,
        }
    }
}
