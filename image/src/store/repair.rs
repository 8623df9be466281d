//! Repair: a sound object takes a damaged one's place, in the store and in all trees.
//!
//! ```text
//! staged, verified, synced ─► repair.json ─► object renamed ─► each link to the old inode renamed over
//!                                  └── from here on a crash is finished by `recover`
//! ```
//!
//! Nothing is written in place. A pod that has the damaged file open or mapped keeps the old inode,
//! with the bytes as they were, until it opens the file again; whoever opens it from now on gets
//! the new one. In-place writing would change bytes under a running model, and half of them at
//! a crash.
//!
//! Where nothing sound is to be had, the object loses its name, so that no new image links it, and the
//! images with it are marked: they count as absent until a pull has mended them. Their trees stay
//! where they are, for the pods that read them.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::error::{Context as _, StoreError};
use super::ingest::{Ingest, remove_tree};
use super::record::{self, Lock};
use super::trees::{EPOCH, normal_folder};
use super::verify::{Checker, VerifyControl, is_normal};
use super::{Store, object_mode};
use crate::crash;
use crate::digest::{Digest, ObjectId};
use crate::tree::{Node, Tree};

const DECISION: &str = "repair.json";
const STAGED: &str = "sound";
/// A name for the damaged inode, so that its number means nothing else meanwhile.
const OLD: &str = "damaged";
const LINK: &str = "link";
/// In a tree's folder: the image counts as absent.
const MARK: &str = "damaged";

/// The right to repair one object; nobody else in any process has it at the same time.
#[derive(Debug)]
pub(crate) struct Repair {
    ingest: Ingest,
    object: ObjectId,
}

#[derive(Serialize, Deserialize)]
struct Decision {
    object: ObjectId,
    /// Of the damaged file, which may have no name any more.
    inode: Option<u64>,
    /// Else the object loses its name.
    replace: bool,
}

impl Store {
    /// Takes the right to repair `object`; `None` while another worker has it.
    pub(crate) fn repair(&self, object: &ObjectId) -> Result<Option<Repair>, StoreError> {
        let right = Digest::of(format!("repair {object}").as_bytes());
        let Some(ingest) = self.ingest(&right)? else { return Ok(None) };
        if !Repair::finish(self, &ingest)? {
            ingest.clear()?;
        }
        Ok(Some(Repair { ingest, object: *object }))
    }

    /// Marks an image: it counts as absent until a pull has mended its tree.
    pub(crate) fn mark_damaged(&self, image: &Digest) -> Result<(), StoreError> {
        let tree = self.tree(image);
        match tree.exists() {
            true => record::write(&tree.join(MARK), b""),
            false => Ok(()),
        }
    }

    pub(super) fn is_marked(&self, image: &Digest) -> bool {
        self.tree(image).join(MARK).exists()
    }

    pub(super) fn unmark(&self, image: &Digest) -> Result<(), StoreError> {
        let tree = self.tree(image);
        match fs::remove_file(tree.join(MARK)) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(e) => Err(e).context(|| format!("remove {}", tree.join(MARK).display())),
            Ok(()) => record::sync_dir(&tree),
        }
    }

    /// Images that are damaged and wait for a pull to mend them.
    ///
    /// # Errors
    ///
    /// The disk's.
    pub fn damaged_images(&self) -> Result<Vec<Digest>, StoreError> {
        let mut marked = self.tree_digests()?;
        marked.retain(|image| self.is_marked(image));
        marked.sort_unstable();
        Ok(marked)
    }

    /// Makes the files of a tree what they must be, one by one, each by a rename. Objects that it needs
    /// must be there. Who reads the tree meanwhile sees each file as it was or as it must be.
    pub(crate) fn mend_tree(
        &self,
        image: &Digest,
        expected: &BTreeMap<String, Node>,
    ) -> Result<(), StoreError> {
        let right = Digest::of(format!("mend {image}").as_bytes());
        let ingest = loop {
            match self.ingest(&right)? {
                Some(ingest) => break ingest,
                None => std::thread::sleep(std::time::Duration::from_millis(10)),
            }
        };
        ingest.clear()?;
        let control = VerifyControl::default();
        let mended = self.mend_folder(
            &self.rootfs(image),
            expected,
            &mut Checker::new(&control),
            ingest.folder(),
        );
        let synced = mended.and_then(|()| self.sync());
        ingest.discard()?;
        synced
    }

    fn mend_folder(
        &self,
        folder: &Path,
        expected: &BTreeMap<String, Node>,
        checker: &mut Checker<'_>,
        staging: &Path,
    ) -> Result<(), StoreError> {
        let what = || format!("mend {}", folder.display());
        let mut touched = !is_normal(folder).unwrap_or(false);
        if !fs::symlink_metadata(folder).is_ok_and(|meta| meta.is_dir()) {
            remove_any(folder)?;
            fs::create_dir(folder).context(what)?;
        }
        for entry in fs::read_dir(folder).context(what)? {
            let entry = entry.context(what)?;
            if entry.file_name().to_str().is_none_or(|name| !expected.contains_key(name)) {
                remove_any(&entry.path())?;
                touched = true;
            }
        }
        for (name, node) in expected {
            let at = folder.join(name);
            if let Node::Directory(children) = node {
                touched |= !fs::symlink_metadata(&at).is_ok_and(|meta| meta.is_dir());
                self.mend_folder(&at, children, checker, staging)?;
                continue;
            }
            let Some((_, lacks)) = self.node_fault(&at, node, checker)? else { continue };
            if let Some(object) = lacks {
                return Err(StoreError::Corrupt(format!(
                    "object {object} of {} is missing: pull the image again",
                    at.display()
                )));
            }
            let link = staging.join(LINK);
            remove_any(&link)?;
            match node {
                Node::Symlink(target) => {
                    std::os::unix::fs::symlink(target, &link).context(what)?;
                }
                Node::File { size: 0, object } => fresh(&link, object).context(what)?,
                Node::File { object, .. } => {
                    link_or_copy(&self.object(object), &link, object).context(what)?;
                }
                Node::Directory(_) => {}
            }
            if fs::symlink_metadata(&at).is_ok_and(|meta| meta.is_dir()) {
                remove_any(&at)?;
            }
            fs::rename(&link, &at).context(|| format!("replace {}", at.display()))?;
            crash::point("mend: an entry is replaced");
            touched = true;
        }
        if touched {
            normal_folder(folder).context(what)?;
        }
        Ok(())
    }

    /// Gives objects that have lost their names, and that the image's tree still has, their names back.
    pub(crate) fn rename_lost(&self, image: &Digest, tree: &Tree) -> Result<(), StoreError> {
        let control = VerifyControl::default();
        let mut checker = Checker::new(&control);
        let rootfs = self.rootfs(image);
        for (path, size, object) in tree.files() {
            let at = rootfs.join(path);
            if size == 0 || self.is_named(&object) || !at.exists() {
                continue;
            }
            let fault = checker.fault(&at, &object).context(|| format!("read {}", at.display()))?;
            if fault.is_none() {
                let to = self.object(&object);
                rustix::fs::linkat(CWD, &at, CWD, &to, AtFlags::empty())
                    .context(|| format!("link {}", to.display()))?;
            }
        }
        Ok(())
    }

    fn sync(&self) -> Result<(), StoreError> {
        let root = fs::File::open(self.root()).context(|| format!("open {:?}", self.root()))?;
        rustix::fs::syncfs(&root).context(|| format!("sync {}", self.root().display()))
    }

    /// Removes marked images that no volume shows. Under the exclusive lock.
    pub(super) fn drop_damaged_images(&self) -> Result<Vec<PathBuf>, StoreError> {
        let mut detached = Vec::new();
        for image in self.damaged_images()? {
            if self.volume_of(&image)?.is_some() {
                continue;
            }
            detached.extend(super::trees::detach(self, &image)?);
            for (name, record) in self.ref_records().list::<super::RefRecord>()? {
                if record.image == image {
                    self.ref_records().remove(&name)?;
                }
            }
        }
        Ok(detached)
    }
}

impl Repair {
    /// Where the sound file goes, verified and synced.
    pub(crate) fn staged(&self) -> PathBuf {
        self.ingest.folder().join(STAGED)
    }

    /// The staged file becomes the object, and takes the damaged one's place in every tree and view.
    pub(crate) fn replace(self, store: &Store) -> Result<(), StoreError> {
        self.decide(store, true)
    }

    /// The object loses its name, and the images with it are marked.
    pub(crate) fn withdraw(self, store: &Store) -> Result<(), StoreError> {
        self.decide(store, false)
    }

    /// Nothing is changed.
    pub(crate) fn give_up(self) -> Result<(), StoreError> {
        self.ingest.discard()
    }

    fn decide(self, store: &Store, replace: bool) -> Result<(), StoreError> {
        let at = store.object(&self.object);
        let inode = match fs::symlink_metadata(&at) {
            Ok(meta) => {
                let old = self.ingest.folder().join(OLD);
                match rustix::fs::linkat(CWD, &at, CWD, &old, AtFlags::empty()) {
                    // As many names as it can have keep its number just as well.
                    Ok(()) | Err(Errno::MLINK | Errno::EXIST) => {}
                    Err(e) => return Err(e).context(|| format!("link {}", at.display())),
                }
                Some(meta.ino())
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => None,
            Err(e) => return Err(e).context(|| format!("read {}", at.display())),
        };
        let decision = Decision { object: self.object, inode, replace };
        let path = self.ingest.folder().join(DECISION);
        let bytes = serde_json::to_vec(&decision)
            .map_err(|e| StoreError::Corrupt(format!("{}: {e}", path.display())))?;
        crash::point("repair: before the decision");
        record::write(&path, &bytes)?;
        crash::point("repair: decided");
        decision.apply(store, self.ingest.folder())?;
        self.ingest.discard()
    }

    /// Does what is left to do of a repair that was decided; false where none was.
    pub(super) fn finish(store: &Store, ingest: &Ingest) -> Result<bool, StoreError> {
        let decision = match record::read::<Decision>(&ingest.folder().join(DECISION)) {
            Ok(Some(decision)) => decision,
            Ok(None) => return Ok(false),
            Err(StoreError::Corrupt(why)) => {
                tracing::warn!(%why, "a repair that was cut off has to begin again");
                return Ok(false);
            }
            Err(e) => return Err(e),
        };
        decision.apply(store, ingest.folder())?;
        ingest.clear()?;
        Ok(true)
    }
}

impl Decision {
    /// Can be done again at any point.
    fn apply(&self, store: &Store, folder: &Path) -> Result<(), StoreError> {
        let object = store.object(&self.object);
        let _shared = Lock::shared(&store.path("lock"))?;
        if self.replace {
            let staged = folder.join(STAGED);
            match fs::rename(&staged, &object) {
                // It has its name already.
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                renamed => renamed.context(|| format!("replace {}", object.display()))?,
            }
            crash::point("repair: the object is replaced");
        }
        if let Some(inode) = self.inode {
            // Links from before the rename only: each is either in `ingest/` or, behind it, in
            // `trees/`. A view may be made of a tree's link that is not replaced yet: hence again.
            while self.relink(store, &store.path("ingest"), inode, folder)?
                | self.relink(store, &store.path("trees"), inode, folder)?
            {}
        }
        if !self.replace {
            // Only now: until here the next verification would have found it by itself.
            let is_damaged =
                fs::symlink_metadata(&object).is_ok_and(|meta| Some(meta.ino()) == self.inode);
            if is_damaged {
                fs::remove_file(&object).context(|| format!("remove {}", object.display()))?;
            }
        }
        store.sync()?;
        crash::point("repair: done");
        Ok(())
    }

    /// Deals with each link to `inode` below `from`; true where a link was replaced.
    fn relink(
        &self,
        store: &Store,
        from: &Path,
        inode: u64,
        folder: &Path,
    ) -> Result<bool, StoreError> {
        let object = store.object(&self.object);
        let mut replaced = false;
        let mut marked: Option<PathBuf> = None;
        for entry in walkdir::WalkDir::new(from).follow_links(false) {
            let entry = match entry {
                Ok(entry) => entry,
                // Removed or renamed meanwhile.
                Err(e) if e.io_error().is_some_and(|e| e.kind() == io::ErrorKind::NotFound) => {
                    continue;
                }
                Err(e) => {
                    return Err(io::Error::from(e)).context(|| format!("read {}", from.display()));
                }
            };
            use walkdir::DirEntryExt as _;
            let at = entry.path();
            if entry.ino() != inode || entry.file_type().is_dir() || at.parent() == Some(folder) {
                continue;
            }
            if !self.replace {
                // `<root>/trees/<image>/…`; what is still in `ingest/` finds no object to link.
                let image = at.strip_prefix(from).ok().and_then(|inside| inside.iter().next());
                let Some(image) = image.and_then(|name| Digest::from_hex(name.to_str()?).ok())
                else {
                    continue;
                };
                let tree = store.tree(&image);
                if from.ends_with("trees") && marked.as_deref() != Some(&tree) {
                    store.mark_damaged(&image)?;
                    crash::point("repair: an image is marked");
                    marked = Some(tree);
                }
                continue;
            }
            let link = folder.join(LINK);
            remove_any(&link)?;
            let what = || format!("replace {}", at.display());
            link_or_copy(&object, &link, &self.object).context(what)?;
            match fs::rename(&link, at) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                renamed => renamed.context(what)?,
            }
            crash::point("repair: a link is replaced");
            if let Some(parent) = at.parent() {
                normal_folder(parent).context(what)?;
            }
            replaced = true;
        }
        Ok(replaced)
    }
}

/// One more name for an object, or a copy where it has as many as it can have.
fn link_or_copy(from: &Path, to: &Path, object: &ObjectId) -> io::Result<()> {
    match rustix::fs::linkat(CWD, from, CWD, to, AtFlags::empty()) {
        Err(Errno::MLINK) => {
            let mut source = fs::File::open(from)?;
            let mut copy = fs::File::create_new(to)?;
            io::copy(&mut source, &mut copy)?;
            attributes(&copy, object)
        }
        other => Ok(other?),
    }
}

fn fresh(to: &Path, object: &ObjectId) -> io::Result<()> {
    attributes(&fs::File::create_new(to)?, object)
}

fn attributes(file: &fs::File, object: &ObjectId) -> io::Result<()> {
    rustix::fs::fchmod(file, Mode::from_raw_mode(object_mode(object.executable()).as_raw_mode()))?;
    Ok(rustix::fs::futimens(file, &EPOCH)?)
}

fn remove_any(path: &Path) -> Result<(), StoreError> {
    if fs::symlink_metadata(path).is_ok_and(|meta| meta.is_dir()) {
        return remove_tree(path);
    }
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(e).context(|| format!("remove {}", path.display()))
        }
        _ => Ok(()),
    }
}
