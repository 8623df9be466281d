//! Checking what is stored: objects by their content, trees and records by what they must be.
//!
//! ```text
//! objects/ab/…        BLAKE3 = name, regular file, mode, times
//! trees/<image>/      manifest.json = <image>, config.json = what the manifest says, tree.json readable
//!               rootfs/   what the layers' records add up to, each file its object's inode
//! ```
//!
//! Objects are read past the page cache (`O_DIRECT`), so that what running models have in memory
//! stays there, and so that the disk is looked at and not the memory. File systems that refuse are
//! read plainly. Reading keeps to the rate of a [`VerifyControl`].
//!
//! A file of a tree that is not its object's inode is right if its content is: ext4 allows 65,000
//! names for an inode, and behind them trees have copies. Empty files are never shared.
//!
//! Nothing is changed here; that is `repair.rs`.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::fs::OFlags;

use super::error::{Context as _, StoreError};
use super::{LayerRecord, Store, object_mode};
use crate::digest::{Digest, ObjectId};
use crate::layer::Buffer;
use crate::manifest::{Manifest, PlacedLayer};
use crate::source::RawManifest;
use crate::tree::{Node, Tree};

/// A reader that must wait looks this often whether it is to stop, or the rate is another one.
const STEP: Duration = Duration::from_millis(100);

/// Lets others steer and watch a verification under way.
#[derive(Debug, Default)]
pub struct VerifyControl {
    /// Bytes a second; 0 for no limit.
    rate: AtomicU64,
    stop: AtomicBool,
    part: AtomicU8,
    objects: AtomicU64,
    bytes: AtomicU64,
    total_bytes: AtomicU64,
    damaged: AtomicU64,
    repaired: AtomicU64,
}

/// How far a verification is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct VerifyProgress {
    /// The part of the store that is being read, of 256; a later run may begin with it.
    pub part: u8,
    /// Files read.
    pub objects: u64,
    /// Bytes read.
    pub bytes: u64,
    /// Bytes of all that is to be read.
    pub total_bytes: u64,
    /// Damaged files and records found.
    pub damaged: u64,
    /// Of these, repaired.
    pub repaired: u64,
}

impl VerifyControl {
    /// Reads at `bytes_per_second`; 0 sets no limit.
    pub fn new(bytes_per_second: u64) -> Self {
        Self { rate: AtomicU64::new(bytes_per_second), ..Self::default() }
    }

    /// Changes the rate, also of what is under way.
    pub fn set_rate(&self, bytes_per_second: u64) {
        self.rate.store(bytes_per_second, Ordering::Relaxed);
    }

    /// Ends the verification soon; it then returns what it has found so far.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Whether it was told to end.
    pub fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Where it stands.
    pub fn progress(&self) -> VerifyProgress {
        let get = |n: &AtomicU64| n.load(Ordering::Relaxed);
        VerifyProgress {
            part: self.part.load(Ordering::Relaxed),
            objects: get(&self.objects),
            bytes: get(&self.bytes),
            total_bytes: get(&self.total_bytes),
            damaged: get(&self.damaged),
            repaired: get(&self.repaired),
        }
    }

    pub(crate) fn begin(&self, part: u8) {
        self.part.store(part, Ordering::Relaxed);
    }

    pub(crate) fn expect(&self, bytes: u64) {
        self.total_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(crate) fn found(&self) {
        self.damaged.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn repaired(&self) {
        self.repaired.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts bytes that were read, and waits until the rate allows for them.
    fn took(&self, bytes: u64) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        let began = Instant::now();
        while !self.is_stopped() {
            let rate = self.rate.load(Ordering::Relaxed);
            if rate == 0 {
                return;
            }
            let price = Duration::from_secs_f64((bytes as f64 / rate as f64).min(3600.0));
            let left = price.saturating_sub(began.elapsed());
            if left.is_zero() {
                return;
            }
            std::thread::sleep(left.min(STEP));
        }
    }
}

/// Reads files for [`Store::check_object`] and its like.
pub(crate) struct Checker<'a> {
    control: &'a VerifyControl,
    buffer: Buffer,
}

/// What is in one of the 256 folders of objects, sorted.
pub(crate) struct Part {
    /// With their lengths in bytes.
    pub(crate) objects: Vec<(ObjectId, u64)>,
    /// What has no object's name there.
    pub(crate) strangers: Vec<String>,
}

/// An image's records, all sound, and what they say its tree is.
pub(crate) struct Loaded {
    pub(crate) layers: Vec<(PlacedLayer, LayerRecord)>,
    pub(crate) tree: Tree,
}

/// What is wrong with an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) why: String,
    /// Its bytes are right.
    pub(crate) is_mode: bool,
}

impl Fault {
    pub(crate) fn content(why: String) -> Self {
        Self { why, is_mode: false }
    }
}

/// What is wrong with a tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TreeFault {
    /// Relative to the image's root.
    pub(crate) path: String,
    pub(crate) why: String,
    /// An object that has to be brought in before this can be mended.
    pub(crate) lacks: Option<ObjectId>,
}

impl<'a> Checker<'a> {
    pub(crate) fn new(control: &'a VerifyControl) -> Self {
        Self { control, buffer: Buffer::new() }
    }

    /// What is wrong with the file at `path`, which must be `object`. `None`: nothing, or the check
    /// was stopped.
    ///
    /// # Errors
    ///
    /// When it cannot be told: the file is gone, or this process may not read it.
    pub(super) fn fault(&mut self, path: &Path, object: &ObjectId) -> io::Result<Option<Fault>> {
        let content = |why: String| Ok(Some(Fault::content(why)));
        let meta = fs::symlink_metadata(path)?;
        if !meta.is_file() {
            return content("is no regular file".to_owned());
        }
        let hash = match self.hash(path) {
            Ok(Some(hash)) => hash,
            Ok(None) => return Ok(None),
            Err(e) if is_medium(&e) => return content(format!("cannot be read: {e}")),
            Err(e) => return Err(e),
        };
        self.control.objects.fetch_add(1, Ordering::Relaxed);
        let found = ObjectId::new(hash, object.executable());
        if found != *object {
            return content(format!(
                "its {} bytes have the BLAKE3 {}",
                meta.len(),
                found.to_string().trim_end_matches(".x")
            ));
        }
        let (mode, must) = (meta.mode() & 0o7777, object_mode(object.executable()).as_raw_mode());
        // An adopted file may have kept its owner's write bit, which is of no use below a read-only mount.
        if mode & !0o200 != must {
            let why = format!("has the mode {mode:04o} instead of {must:04o}");
            return Ok(Some(Fault { why, is_mode: true }));
        }
        Ok(None)
    }

    fn hash(&mut self, path: &Path) -> io::Result<Option<blake3::Hash>> {
        let mut direct = true;
        let mut file = match open(path, OFlags::DIRECT) {
            Err(e) if e.kind() == io::ErrorKind::InvalidInput => {
                direct = false;
                open(path, OFlags::empty())?
            }
            opened => opened?,
        };
        let mut hasher = blake3::Hasher::new();
        let mut at = 0;
        loop {
            if self.control.is_stopped() {
                return Ok(None);
            }
            let room = self.buffer.room_for_read();
            let count = match file.read_at(room, at) {
                Ok(0) => return Ok(Some(hasher.finalize())),
                Ok(count) => count,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                // Behind an end that is not aligned, and where only the first read shows it.
                Err(e) if direct && e.kind() == io::ErrorKind::InvalidInput => {
                    direct = false;
                    file = open(path, OFlags::empty())?;
                    continue;
                }
                Err(e) => return Err(e),
            };
            hasher.update(&room[..count]);
            at += count as u64;
            self.control.took(count as u64);
        }
    }
}

/// Whether a folder of a tree looks as all do.
pub(super) fn is_normal(folder: &Path) -> io::Result<bool> {
    let meta = fs::symlink_metadata(folder)?;
    Ok(meta.mode() & 0o7777 == 0o755 && meta.mtime() == 0)
}

fn open(path: &Path, more: OFlags) -> io::Result<File> {
    let flags = (OFlags::NOFOLLOW | more).bits().cast_signed();
    File::options().read(true).custom_flags(flags).open(path)
}

/// Whether the disk or the file system lost the bytes, rather than this process the means to read.
fn is_medium(error: &io::Error) -> bool {
    use rustix::io::Errno;
    let errno = error.raw_os_error().map(Errno::from_raw_os_error);
    // EUCLEAN and EBADMSG are how ext4, xfs and btrfs tell of blocks whose checksum is wrong.
    [Errno::IO, Errno::UCLEAN, Errno::BADMSG, Errno::ILSEQ, Errno::NODATA]
        .iter()
        .any(|known| errno == Some(*known))
}

impl Store {
    /// One of the 256 parts.
    pub(crate) fn objects_of_part(&self, part: u8) -> Result<Part, StoreError> {
        let folder = self.path("objects").join(format!("{part:02x}"));
        let what = || format!("read {}", folder.display());
        let (mut objects, mut strangers) = (Vec::new(), Vec::new());
        for entry in fs::read_dir(&folder).context(what)? {
            let entry = entry.context(what)?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let size = match fs::symlink_metadata(entry.path()) {
                Ok(meta) => meta.len(),
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                Err(_) => 0,
            };
            match name.parse::<ObjectId>() {
                Ok(id) if id.path().starts_with(format!("{part:02x}")) => objects.push((id, size)),
                _ => strangers.push(format!("{part:02x}/{name}")),
            }
        }
        objects.sort_unstable();
        strangers.sort_unstable();
        Ok(Part { objects, strangers })
    }

    /// What is wrong with an object; `None` also when it has gone meanwhile.
    pub(crate) fn check_object(
        &self,
        object: &ObjectId,
        checker: &mut Checker<'_>,
    ) -> Result<Option<Fault>, StoreError> {
        let path = self.object(object);
        match checker.fault(&path, object) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            outcome => outcome.context(|| format!("read {}", path.display())),
        }
    }

    /// Gives an object whose content is right its mode; false where the file has names elsewhere, too, and
    /// its mode is not ours to set.
    pub(crate) fn restore_mode(&self, object: &ObjectId) -> Result<bool, StoreError> {
        let path = self.object(object);
        let what = || format!("chmod {}", path.display());
        let meta = fs::symlink_metadata(&path).context(what)?;
        let is_it = |entry: &walkdir::DirEntry| {
            use walkdir::DirEntryExt as _;
            entry.ino() == meta.ino() && entry.file_type().is_file()
        };
        let names = ["trees", "ingest"].map(|own| {
            walkdir::WalkDir::new(self.path(own)).into_iter().flatten().filter(is_it).count()
        });
        if meta.nlink() > 1 + names.iter().map(|names| *names as u64).sum::<u64>() {
            return Ok(false);
        }
        rustix::fs::chmod(&path, object_mode(object.executable())).context(what)?;
        Ok(true)
    }

    /// The references that mean `image`, sorted.
    pub(crate) fn references_to(&self, image: &Digest) -> Result<Vec<String>, StoreError> {
        let records = self.refs()?.into_iter().filter(|record| record.image == *image);
        let mut references: Vec<String> = records.map(|record| record.reference).collect();
        references.sort_unstable();
        Ok(references)
    }

    /// Whether there is something of this object's name.
    pub(crate) fn is_named(&self, object: &ObjectId) -> bool {
        fs::symlink_metadata(self.object(object)).is_ok_and(|meta| meta.is_file())
    }

    /// All images, those marked as damaged and those with unreadable records included.
    pub(crate) fn tree_names(&self) -> Result<Vec<Digest>, StoreError> {
        let mut digests = self.tree_digests()?;
        digests.sort_unstable();
        Ok(digests)
    }

    /// The image's records, or which of them is damaged.
    pub(crate) fn load_image(&self, digest: &Digest) -> Result<Result<Loaded, String>, StoreError> {
        let folder = self.tree(digest);
        match super::record::read::<super::trees::TreeRecord>(&folder.join("tree.json")) {
            Ok(Some(_)) => {}
            Ok(None) => return Ok(Err("tree.json is missing".to_owned())),
            Err(StoreError::Corrupt(why)) => return Ok(Err(why)),
            Err(e) => return Err(e),
        }
        let read = |name: &str| match fs::read(folder.join(name)) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(e) if e.kind() == io::ErrorKind::NotFound || is_medium(&e) => Ok(None),
            Err(e) => Err(e).context(|| format!("read {}", folder.join(name).display())),
        };
        let Some(manifest) = read("manifest.json")? else {
            return Ok(Err("manifest.json is missing or unreadable".to_owned()));
        };
        let raw = RawManifest { media_type: String::new(), bytes: manifest.into() };
        if raw.digest() != *digest {
            return Ok(Err("manifest.json is not the image's manifest".to_owned()));
        }
        let image = match Manifest::parse(&raw) {
            Ok(Manifest::Image(image)) => image,
            Ok(Manifest::Index(_)) => return Ok(Err("manifest.json is an index".to_owned())),
            Err(e) => return Ok(Err(e.to_string())),
        };
        let Some(config) = read("config.json")? else {
            return Ok(Err("config.json is missing or unreadable".to_owned()));
        };
        if Digest::of(&config) != image.config.digest {
            return Ok(Err("config.json is not the config that the manifest names".to_owned()));
        }
        let placed = match image.layers_with(&config) {
            Ok(placed) => placed,
            Err(e) => return Ok(Err(e.to_string())),
        };
        let (mut tree, mut layers) = (Tree::default(), Vec::new());
        for placed in placed {
            let name = placed.layer.record_name();
            let Some(record) = self.layer_records().get_sound::<LayerRecord>(&name)? else {
                return Ok(Err(format!("the record layers/{name}.json is missing or damaged")));
            };
            if let Err(why) = placed.place.lay(&mut tree, &record.entries) {
                return Ok(Err(format!("the record layers/{name}.json: {why}")));
            }
            layers.push((placed, record));
        }
        Ok(Ok(Loaded { layers, tree }))
    }

    /// Compares an image's files with what its records say. Its objects have been checked before.
    pub(crate) fn check_tree(
        &self,
        digest: &Digest,
        tree: &Tree,
        checker: &mut Checker<'_>,
    ) -> Result<Vec<TreeFault>, StoreError> {
        let mut faults = Vec::new();
        self.check_folder(&self.rootfs(digest), tree.root(), "", checker, &mut faults)?;
        Ok(faults)
    }

    fn check_folder(
        &self,
        folder: &Path,
        expected: &BTreeMap<String, Node>,
        prefix: &str,
        checker: &mut Checker<'_>,
        faults: &mut Vec<TreeFault>,
    ) -> Result<(), StoreError> {
        let what = || format!("read {}", folder.display());
        let fault = |why: &str| TreeFault {
            path: prefix.trim_end_matches('/').to_owned(),
            why: why.to_owned(),
            lacks: None,
        };
        let entries = match fs::read_dir(folder) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound || is_medium(&e) => {
                faults.push(fault("is missing or cannot be read"));
                return Ok(());
            }
            Err(e) => return Err(e).context(what),
        };
        if !is_normal(folder).context(what)? {
            faults.push(fault("has another mode or time than folders of images have"));
        }
        for entry in entries {
            let name = entry.context(what)?.file_name();
            if name.to_str().is_none_or(|name| !expected.contains_key(name)) {
                let path = format!("{prefix}{}", name.to_string_lossy());
                let why = "does not belong to the image".to_owned();
                faults.push(TreeFault { path, why, lacks: None });
            }
        }
        for (name, node) in expected {
            let (at, path) = (folder.join(name), format!("{prefix}{name}"));
            match self.node_fault(&at, node, checker)? {
                Some((why, lacks)) => faults.push(TreeFault { path, why, lacks }),
                None => {
                    if let Node::Directory(children) = node {
                        self.check_folder(&at, children, &format!("{path}/"), checker, faults)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// What is wrong with one entry of a tree, whatever is below it.
    pub(super) fn node_fault(
        &self,
        at: &Path,
        node: &Node,
        checker: &mut Checker<'_>,
    ) -> Result<Option<(String, Option<ObjectId>)>, StoreError> {
        let meta = match fs::symlink_metadata(at) {
            Ok(meta) => Some(meta),
            Err(e) if e.kind() == io::ErrorKind::NotFound => None,
            Err(e) if is_medium(&e) => None,
            Err(e) => return Err(e).context(|| format!("read {}", at.display())),
        };
        let fault = |why: &str| Ok(Some((why.to_owned(), None)));
        match (node, meta) {
            (Node::Directory(_), Some(meta)) if meta.is_dir() => Ok(None),
            (Node::Directory(_), _) => fault("is no folder"),
            (Node::Symlink(target), Some(meta)) if meta.is_symlink() => {
                let found = fs::read_link(at).context(|| format!("read {}", at.display()))?;
                match found.as_os_str() == target.as_str() {
                    true => Ok(None),
                    false => fault("is a symbolic link to something else"),
                }
            }
            (Node::Symlink(_), _) => fault("is no symbolic link"),
            (Node::File { size: 0, object }, Some(meta)) => {
                let mode = object_mode(object.executable()).as_raw_mode();
                match meta.is_file() && meta.len() == 0 && meta.mode() & 0o7777 == mode {
                    true => Ok(None),
                    false => fault("is not the empty file that it was"),
                }
            }
            (Node::File { size: 0, .. }, None) => fault("is missing"),
            (Node::File { object, size }, meta) => {
                let named = fs::symlink_metadata(self.object(object)).ok();
                if let (Some(meta), Some(named)) = (&meta, &named)
                    && meta.ino() == named.ino()
                    && meta.len() == *size
                {
                    return Ok(None);
                }
                // Not the object's inode: a copy, whose content counts.
                let sound = match &meta {
                    Some(meta) if meta.len() == *size => match checker.fault(at, object) {
                        Err(e) if e.kind() == io::ErrorKind::NotFound => false,
                        fault => fault.context(|| format!("read {}", at.display()))?.is_none(),
                    },
                    _ => false,
                };
                let lacks = named.is_none().then_some(*object);
                match (sound, &named) {
                    (true, Some(_)) => Ok(None),
                    (true, None) => Ok(Some(("its object has lost its name".to_owned(), lacks))),
                    (false, _) if meta.is_none() => Ok(Some(("is missing".to_owned(), lacks))),
                    (false, _) => Ok(Some(("is not the file that it was".to_owned(), lacks))),
                }
            }
        }
    }
}
