//! What each image holds of the disk, and with whom it shares it.
//!
//! Found by a walk of all trees: an inode with as many names as one image gives it, and the object's
//! own, is that image's alone. Nothing is kept of it; it is true for the moment.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use super::capacity::Held;
use super::error::{Context as _, StoreError};
use super::{RecordKind, Store, StoredImage};
use crate::digest::Digest;

/// Where no pull of an image's registry has been seen: a line of a gigabit.
const USUAL_BYTES_PER_SECOND: f64 = 100e6;

/// All images and the inodes that they are made of.
pub(super) struct Holdings {
    pub(super) images: Vec<Holding>,
    pub(super) inodes: HashMap<u64, Inode>,
}

/// What somebody is about to pull.
#[derive(Debug, Clone, Default)]
pub(crate) struct Wanted {
    pub(crate) images: BTreeSet<Digest>,
    pub(crate) layers: BTreeSet<Digest>,
}

/// An image's part.
pub(super) struct Holding {
    pub(super) image: StoredImage,
    /// As it was when the image was looked at.
    pub(super) last_used: Option<SystemTime>,
    pub(super) idle: Duration,
    /// Of the registry that it came from.
    pub(super) bytes_per_second: f64,
    /// Why it is not to be evicted.
    pub(super) kept: Option<Kept>,
    /// How many names it gives to each inode.
    names: HashMap<u64, u64>,
}

/// Why an image is not to be evicted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kept {
    /// A volume shows it.
    Mounted,
    /// Somebody has pinned it.
    Pinned,
    /// It was used a moment ago, or a pull is at it.
    Recent,
}

/// A file's content on the disk.
pub(super) struct Inode {
    pub(super) bytes: u64,
    links: u64,
    /// A pull under way counts on it.
    leased: bool,
}

/// What an image takes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ImageUsage {
    /// The image.
    pub image: StoredImage,
    /// Disk blocks that nothing else uses: what its removal frees.
    pub unique_bytes: u64,
    /// Disk blocks of files that other images, a pull under way, or the container runtime use, too.
    pub shared_bytes: u64,
    /// Disk blocks that it would take if each of its files were stored for itself.
    pub alone_bytes: u64,
    /// See [`Store::last_used`].
    pub last_used_at: Option<SystemTime>,
}

impl Holdings {
    /// Whether an inode goes with `names` of its names.
    fn goes(inode: &Inode, names: u64) -> bool {
        !inode.leased && names + 1 >= inode.links
    }

    /// What the images hold, each byte once.
    pub(super) fn held(&self) -> Held {
        let mut reasons: HashMap<u64, Kept> = HashMap::new();
        for kept in [Kept::Mounted, Kept::Pinned, Kept::Recent] {
            for holding in self.images.iter().filter(|holding| holding.kept == Some(kept)) {
                for ino in holding.names.keys() {
                    reasons.entry(*ino).or_insert(kept);
                }
            }
        }
        let mut held = Held::default();
        for (ino, kept) in &reasons {
            let bytes = self.inodes.get(ino).map_or(0, |inode| inode.bytes);
            match kept {
                Kept::Mounted => held.mounted_bytes += bytes,
                Kept::Pinned => held.pinned_bytes += bytes,
                Kept::Recent => held.recent_bytes += bytes,
            }
        }
        held.evictable_bytes = self.sets().values().sum();
        held
    }

    /// The bytes that go with each set of images that can be evicted, and with no smaller one.
    pub(super) fn sets(&self) -> BTreeMap<Vec<usize>, u64> {
        let mut holders: HashMap<u64, (Vec<usize>, u64)> = HashMap::new();
        for (index, holding) in self.images.iter().enumerate() {
            if holding.kept.is_some() {
                continue;
            }
            for (ino, names) in &holding.names {
                let (images, count) = holders.entry(*ino).or_default();
                images.push(index);
                *count += names;
            }
        }
        let mut sets: BTreeMap<Vec<usize>, u64> = BTreeMap::new();
        for (ino, (images, names)) in holders {
            if let Some(inode) = self.inodes.get(&ino)
                && inode.bytes > 0
                && Self::goes(inode, names)
            {
                *sets.entry(images).or_default() += inode.bytes;
            }
        }
        sets
    }

    fn usage(&self, holding: &Holding) -> ImageUsage {
        let mut usage = ImageUsage {
            image: holding.image.clone(),
            unique_bytes: 0,
            shared_bytes: 0,
            alone_bytes: 0,
            last_used_at: holding.last_used,
        };
        for (ino, names) in &holding.names {
            let Some(inode) = self.inodes.get(ino) else { continue };
            usage.alone_bytes += inode.bytes * names;
            match Self::goes(inode, *names) {
                true => usage.unique_bytes += inode.bytes,
                false => usage.shared_bytes += inode.bytes,
            }
        }
        usage
    }
}

impl Store {
    /// What each image takes, by digest. Costs a `stat` a file of all images.
    pub fn image_usage(&self) -> Result<Vec<ImageUsage>, StoreError> {
        let holdings = self.holdings(&Wanted::default())?;
        Ok(holdings.images.iter().map(|holding| holdings.usage(holding)).collect())
    }

    /// Looks at all images. What is `wanted` is kept, as by a lease.
    pub(super) fn holdings(&self, wanted: &Wanted) -> Result<Holdings, StoreError> {
        #[derive(Deserialize)]
        struct Holder {
            digest: Digest,
        }
        let volumes = self.records(RecordKind::Volumes).list::<Holder>()?;
        let mounted: BTreeSet<Digest> = volumes.iter().map(|(_, holder)| holder.digest).collect();
        let leases = self.leases()?;
        let coming: BTreeSet<Digest> =
            leases.iter().filter_map(|lease| lease.image).chain(wanted.images.clone()).collect();
        let now = SystemTime::now();

        let mut holdings = Holdings { images: Vec::new(), inodes: HashMap::new() };
        for image in self.images()? {
            let digest = image.digest;
            let last_used = self.last_used(&digest);
            // A time to come is as good as now.
            let idle = now.duration_since(last_used.unwrap_or(image.pulled_at)).unwrap_or_default();
            let kept = if mounted.contains(&digest) {
                Some(Kept::Mounted)
            } else if self.pinned_by(&digest)?.is_some() {
                Some(Kept::Pinned)
            } else if coming.contains(&digest) || idle < self.limits.keep_for {
                Some(Kept::Recent)
            } else {
                None
            };
            let names = self.names(&digest, &mut holdings.inodes)?;
            let bytes_per_second = self.rate_of(&image)?;
            let holding = Holding { image, last_used, idle, bytes_per_second, kept, names };
            holdings.images.push(holding);
        }
        for layer in leases.iter().flat_map(|lease| &lease.layers).chain(&wanted.layers) {
            self.visit_objects(layer, |object| {
                if let Ok(meta) = fs::symlink_metadata(self.object(&object))
                    && let Some(inode) = holdings.inodes.get_mut(&meta.ino())
                {
                    inode.leased = true;
                }
            })?;
        }
        Ok(holdings)
    }

    /// The names that an image and its views give to each inode.
    fn names(
        &self,
        digest: &Digest,
        inodes: &mut HashMap<u64, Inode>,
    ) -> Result<HashMap<u64, u64>, StoreError> {
        let tree = self.tree(digest);
        let mut names = HashMap::new();
        for root in [tree.join("rootfs"), tree.join("views")] {
            for entry in walkdir::WalkDir::new(&root).follow_links(false) {
                let what = || format!("read {}", root.display());
                let meta = entry.and_then(|entry| entry.metadata());
                let meta = match meta.map_err(io::Error::from) {
                    Ok(meta) => meta,
                    // Removed meanwhile, or never there.
                    Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                    Err(e) => return Err(e).context(what),
                };
                if !meta.is_file() {
                    continue;
                }
                *names.entry(meta.ino()).or_default() += 1;
                let bytes = meta.blocks() * 512;
                inodes.insert(meta.ino(), Inode { bytes, links: meta.nlink(), leased: false });
            }
        }
        Ok(names)
    }

    /// The rate at which this image would come again.
    fn rate_of(&self, image: &StoredImage) -> Result<f64, StoreError> {
        for reference in &image.references {
            let Ok(reference) = reference.parse::<crate::reference::Reference>() else { continue };
            if let Some(rate) = self.rate(reference.registry().unwrap_or_default())? {
                return Ok(rate);
            }
        }
        Ok(USUAL_BYTES_PER_SECOND)
    }
}
