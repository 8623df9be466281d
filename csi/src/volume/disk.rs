//! The half of volumes that touches records and mounts. All of it blocks.
//!
//! ```text
//! publish:    record ─► look at the tree ─► make the target ─► mount
//! unpublish:  unmount ─► remove the target ─► remove the record
//! ```
//!
//! The record comes first and goes last: a crash at any point leaves a record that
//! unpublish or the next start finds, and while it is there the image stays.

use std::collections::HashSet;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use std::{fs, io};

use carport_image::pull::Pulled;
use carport_image::store::{Owner, PinRequest, RecordKind, Records, StoreError};
use carport_image::{Digest, Reference, Store};
use rustix::fs::{AtFlags, Mode, OFlags, StatxFlags};
use rustix::io::Errno;

use super::error::{PublishError, StatsError, UnpublishError};
use super::record::{VolumeRecord, record_name};
use super::{Condition, Reconciled, TargetPath, VolumeAttributes, VolumeId};
use crate::crash;
use crate::fuse::FS_TYPE;
use crate::mount::{
    Device, FolderId, ImagePath, MountError, MountOptions, MountPoint, Mounter, TargetState, Tree,
    Viewer, hidden_by,
};
use crate::stream::Shown;

/// What the kubelet gives the folders of volumes that it makes itself. Hidden by the mount.
const TARGET_MODE: u32 = 0o750;

/// Which volume, where, showing what.
#[derive(Debug, Clone)]
pub(super) struct Wanted {
    pub(super) volume_id: VolumeId,
    pub(super) target: TargetPath,
    pub(super) attributes: VolumeAttributes,
}

/// What stands at a target before a publish.
#[derive(Debug)]
pub(super) enum Standing {
    /// The volume is there as wanted.
    Published(Box<VolumeRecord>),
    /// It has to be made.
    Open,
}

/// What a streaming volume's target is.
#[derive(Debug, Clone)]
pub(super) enum Mounted {
    /// A mount of this FUSE file system, alive or dead.
    Fuse(Arc<Pin>),
    /// Another mount.
    Native,
    /// None.
    Nothing,
}

/// Holds a file system, so that its number stays its own: the kernel gives numbers that are free to the
/// next one at once.
#[derive(Debug)]
pub(super) struct Pin {
    pub(super) device: Device,
    _root: OwnedFd,
}

impl Pin {
    /// Of what is mounted at `target`. Asks no server of files.
    fn of(target: &Path) -> Result<Option<Self>, MountError> {
        let error = |e: Errno| MountError::new(format!("look at {}", target.display()), e);
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let root = match rustix::fs::open(target, flags, Mode::empty()) {
            Ok(root) => root,
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(None),
            Err(e) => return Err(error(e)),
        };
        let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
        let stat = rustix::fs::statx(&root, "", flags, StatxFlags::TYPE).map_err(error)?;
        let device = Device { major: stat.stx_dev_major, minor: stat.stx_dev_minor };
        Ok(Some(Self { device, _root: root }))
    }
}

/// Records and mounts.
#[derive(Debug, Clone)]
pub(super) struct Disk {
    store: Store,
    records: Records,
    mounter: Arc<dyn Mounter>,
}

impl Disk {
    pub(super) fn new(store: Store, mounter: Arc<dyn Mounter>) -> Self {
        let records = store.records(RecordKind::Volumes);
        Self { store, records, mounter }
    }

    /// Looks whether there is anything to do, or anything in the way.
    pub(super) fn check(&self, wanted: &Wanted) -> Result<Standing, PublishError> {
        let name = record_name(&wanted.volume_id, &wanted.target);
        let record = self.record(&name)?;
        match (self.mounter.state(wanted.target.as_path())?, record) {
            (TargetState::Occupied(what), record) => {
                // Not mounted, so the record is of a volume that is gone.
                if record.is_some() {
                    self.records.remove(&name)?;
                }
                Err(occupied(&wanted.target, what))
            }
            (TargetState::Mounted { id, read_only }, Some(record)) => {
                let shown = self.mounter.identify(&self.tree(&record));
                // A tree that is gone from the store is still there in the mount, and what arrives
                // is not in the store.
                if !read_only || (!record.stream && shown.is_ok_and(|shown| shown != id)) {
                    return Err(occupied(&wanted.target, "another mount"));
                }
                let asked = &wanted.attributes;
                if record.image != asked.image
                    || record.path != asked.path
                    || record.filter != asked.filter
                    || record.options != asked.options
                {
                    return Err(PublishError::Incompatible {
                        target: wanted.target.to_string(),
                        volume: wanted.volume_id.to_string(),
                        image: record.image.to_string(),
                    });
                }
                Ok(Standing::Published(Box::new(record)))
            }
            // A mount without record is judged by `show`, which knows the tree.
            (
                TargetState::Absent
                | TargetState::Empty
                | TargetState::Dead
                | TargetState::Mounted { .. },
                _,
            ) => Ok(Standing::Open),
        }
    }

    /// Refuses a target at which `viewer` would not see the mount.
    pub(super) fn check_reach(
        &self,
        target: &TargetPath,
        viewer: Viewer,
    ) -> Result<(), PublishError> {
        match hidden_by(&*self.mounter, viewer, target.as_path())? {
            None => Ok(()),
            Some(mount) => Err(PublishError::NotSeen {
                target: target.to_string(),
                mount: mount.display().to_string(),
            }),
        }
    }

    /// Records and mounts a volume whose image is here; undoes all of it when that fails.
    pub(super) fn commit(&self, wanted: &Wanted, pulled: &Pulled) -> Result<(), PublishError> {
        let asked = &wanted.attributes;
        let mut record = VolumeRecord {
            filter: asked.filter.clone(),
            view: asked.filter.as_ref().map(|filter| filter.name(asked.path.as_ref())),
            bytes: pulled.image.unpacked_bytes,
            files: pulled.image.files,
            ..record_of(wanted, pulled.digest)
        };
        let done = self.put_and_show(&mut record);
        done.map_err(|error| self.after_failure(wanted, error))
    }

    /// The same for an image that arrives, of its session's mount.
    pub(super) fn commit_arriving(
        &self,
        wanted: &Wanted,
        shown: &Shown,
    ) -> Result<(), PublishError> {
        let record = VolumeRecord {
            stream: true,
            bytes: shown.bytes,
            files: shown.files,
            ..record_of(wanted, shown.digest)
        };
        let done = || {
            self.records.put(&record_name(&record.volume_id, &record.target), &record)?;
            crash::point("publish: recorded");
            let tree = Tree { rootfs: shown.mount.clone(), path: record.path.clone() };
            self.show(&tree, &record.target, record.options)?;
            // The session may have ended in between, which leaves an empty folder.
            match self.mount_at(record.target.as_path())? {
                Some(mount) if mount.fs_type == FS_TYPE => Ok(()),
                _ => {
                    self.mounter.unmount(record.target.as_path())?;
                    Err(MountError::TreeGone(tree.rootfs).into())
                }
            }
        };
        done().map_err(|error| self.after_failure(wanted, error))
    }

    /// The volumes that stream, and the FUSE mount that each one is; none where a kernel mount has
    /// taken its place, or nothing is there.
    pub(super) fn streaming(&self) -> Result<Vec<(VolumeRecord, Mounted)>, StoreError> {
        let records = self.list()?.into_iter().filter(|record| record.stream);
        let look = |record: VolumeRecord| {
            let mounted = self.mounted(record.target.as_path()).unwrap_or_else(|error| {
                tracing::warn!(target = %record.target, %error, "cannot look at a volume");
                Mounted::Nothing
            });
            (record, mounted)
        };
        Ok(records.map(look).collect())
    }

    fn mounted(&self, target: &Path) -> Result<Mounted, MountError> {
        let held = Pin::of(target)?;
        let Some(mount) = self.mount_at(target)? else { return Ok(Mounted::Nothing) };
        Ok(match held {
            Some(pin) if mount.fs_type == FS_TYPE => match Device::mounted_at(target)? {
                Some(device) if device == pin.device => Mounted::Fuse(Arc::new(pin)),
                // It has just changed.
                _ => Mounted::Nothing,
            },
            _ if mount.fs_type == FS_TYPE => Mounted::Nothing,
            _ => Mounted::Native,
        })
    }

    /// Where the image's tree is; nothing while it is not complete.
    pub(super) fn rootfs(&self, digest: &Digest) -> Result<Option<PathBuf>, StoreError> {
        Ok(self.store.image(digest)?.map(|_| self.store.rootfs(digest)))
    }

    /// Remembers that a volume does not stream any more. Its turn must be held.
    pub(super) fn now_native(&self, record: &VolumeRecord) -> Result<(), StoreError> {
        let name = record_name(&record.volume_id, &record.target);
        match self.record(&name)? {
            // Another one by now, or none.
            Some(mut now) if now.stream && now.digest == record.digest => {
                now.stream = false;
                self.records.put(&name, &now)
            }
            _ => Ok(()),
        }
    }

    /// Whether a session's mount is to be seen here.
    pub(super) fn sees(&self, shown: &Shown) -> Result<bool, PublishError> {
        Ok(self.mount_at(&shown.mount)?.is_some_and(|mount| mount.fs_type == FS_TYPE))
    }

    /// Whether an image that this names is here.
    pub(super) fn has(&self, image: &Reference) -> Result<bool, StoreError> {
        self.store.lookup(image).map(|found| found.is_some())
    }

    /// The topmost mount at a path. Asks no server of files.
    fn mount_at(&self, path: &Path) -> Result<Option<MountPoint>, MountError> {
        Ok(self.mounter.under(path)?.into_iter().rfind(|mount| mount.target == path))
    }

    fn put_and_show(&self, record: &mut VolumeRecord) -> Result<(), PublishError> {
        let name = record_name(&record.volume_id, &record.target);
        // From here on the store removes neither the tree nor the view.
        self.records.put(&name, record)?;
        crash::point("publish: recorded");
        if let (Some(filter), Some(view)) = (&record.filter, &record.view) {
            // Says what is wrong with the path, which must have no link in it.
            let all = Tree { rootfs: self.store.rootfs(&record.digest), path: record.path.clone() };
            self.mounter.identify(&all)?;
            let path = record.path.as_ref().map_or(Path::new(""), ImagePath::as_path);
            let view = self.store.view(&record.digest, view, path, |file| filter.shows(file))?;
            if view.files == 0 {
                return Err(PublishError::NothingShown(record.image.to_string()));
            }
            (record.bytes, record.files) = (view.bytes, view.files);
            self.records.put(&name, record)?;
        }
        self.show(&self.tree(record), &record.target, record.options)
    }

    /// Removes what a publish leaves that did not get as far as a mount, and hands the
    /// error on: the kubelet sends no unpublish after a final one.
    pub(super) fn after_failure(&self, wanted: &Wanted, error: PublishError) -> PublishError {
        let remove_target = match fs::remove_dir(wanted.target.as_path()) {
            // A mount, or something with content: never ours.
            Err(e) if e.kind() == io::ErrorKind::ResourceBusy => Ok(()),
            Err(e) if e.kind() == io::ErrorKind::DirectoryNotEmpty => Ok(()),
            Err(e) if e.kind() == io::ErrorKind::NotADirectory => Ok(()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(e) => Err(format!("remove {}: {e}", wanted.target)),
            Ok(()) => Ok(()),
        };
        let name = record_name(&wanted.volume_id, &wanted.target);
        let remove_record = self.records.remove(&name).map_err(|e| e.to_string());
        match remove_target.and(remove_record) {
            Ok(_) => error,
            Err(undo) => PublishError::Unclean { error: Box::new(error), undo },
        }
    }

    /// Takes a volume away. Nothing when there was no such volume, or its record is damaged.
    pub(super) fn take_away(
        &self,
        volume_id: &VolumeId,
        target: &TargetPath,
    ) -> Result<Option<VolumeRecord>, UnpublishError> {
        let name = record_name(volume_id, target);
        let (record, known) = match self.records.get::<VolumeRecord>(&name) {
            Ok(record) => (record.clone(), record.is_some()),
            // Unreadable, but it was there.
            Err(StoreError::Corrupt(_)) => (None, true),
            Err(e) => return Err(e.into()),
        };
        if !known && !self.may_be_taken(target)? {
            return Ok(None);
        }
        self.mounter.unmount(target.as_path())?;
        crash::point("unpublish: unmounted");
        match fs::remove_dir(target.as_path()) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => match e.kind() {
                // An error here would hold the pod for ever, and the content is not ours.
                io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::NotADirectory => {
                    tracing::warn!(%target, why = %e, "left the target of an unpublished volume");
                }
                _ => return Err(MountError::new(format!("remove {target}"), e).into()),
            },
        }
        crash::point("unpublish: the target is gone");
        if let Some(record) = &record {
            self.let_go(record);
        }
        self.records.remove(&name)?;
        crash::point("unpublish: no record");
        Ok(record)
    }

    /// What a volume does for its image when it goes, while the record still keeps that.
    fn let_go(&self, record: &VolumeRecord) {
        // It must not look idle since the pod began.
        self.store.touch(&record.digest);
        let Some(time) = record.pin_seconds.map(Duration::from_secs) else { return };
        if let Err(error) = self.pin(record, time) {
            // No reason to hold the pod.
            tracing::warn!(volume = %record.volume_id, image = %record.image, %error, "cannot pin");
        }
    }

    /// One owner a namespace: the replicas of a server come and go under ever new names.
    fn pin(&self, record: &VolumeRecord, time: Duration) -> Result<(), StoreError> {
        let owner = match &record.pod {
            Some(pod) => format!("volumes/{}", pod.namespace),
            None => "volumes".to_owned(),
        };
        let owner: Owner = owner.parse().map_err(|e| StoreError::Corrupt(format!("{e}")))?;
        let mut expires_at = SystemTime::now().checked_add(time);
        let mut pins = self.store.pins()?.into_iter();
        // What another volume asked for is not cut short.
        if let Some(pin) = pins.find(|pin| pin.image == record.digest && pin.owner == owner) {
            expires_at = pin.expires_at.and_then(|end| expires_at.map(|own| own.max(end)));
        }
        let request = PinRequest { owner, expires_at };
        self.store.pin(&record.digest, Some(&record.image), &request).map(drop)
    }

    /// Whether a target without record may be cleaned: nothing there, or only mounts
    /// that show a store's trees or are dead. Their record may have been lost.
    fn may_be_taken(&self, target: &TargetPath) -> Result<bool, UnpublishError> {
        let records: Vec<(String, VolumeRecord)> = self.records.list()?;
        if let Some((_, other)) = records.iter().find(|(_, record)| record.target == *target) {
            tracing::warn!(%target, volume = %other.volume_id, "left another volume's target");
            return Ok(false);
        }
        let path = target.as_path();
        let mounts = self.mounter.under(path)?;
        let foreign = mounts.iter().find(|mount| {
            mount.target == path && mount.shown_image().is_none() && mount.fs_type != FS_TYPE
        });
        match foreign {
            Some(mount) if self.mounter.state(path)? != TargetState::Dead => {
                tracing::warn!(%target, fs_type = mount.fs_type, "left a mount that is not ours");
                Ok(false)
            }
            _ => Ok(true),
        }
    }

    /// Whether a streaming volume's mount is there. Whether its session is well its own process tells:
    /// nothing here asks it.
    pub(super) fn streaming_condition(&self, target: &TargetPath) -> Condition {
        let what = match self.mount_at(target.as_path()) {
            Ok(Some(mount)) if mount.read_only => return Condition::Normal,
            Ok(Some(_)) => "another mount is",
            Ok(None) => "nothing is mounted",
            Err(error) => return Condition::Abnormal(error.to_string()),
        };
        Condition::Abnormal(format!(
            "{what} at {target}; delete the pod to have the image mounted again"
        ))
    }

    /// Whether a volume's mount is there.
    pub(super) fn condition(&self, target: &TargetPath) -> Condition {
        let what = match self.mounter.state(target.as_path()) {
            Ok(TargetState::Mounted { read_only: true, .. }) => return Condition::Normal,
            Ok(TargetState::Mounted { read_only: false, .. }) => "another mount is",
            Ok(TargetState::Dead) => "a dead mount is",
            Ok(TargetState::Absent | TargetState::Empty | TargetState::Occupied(_)) => {
                "nothing is mounted"
            }
            Err(error) => return Condition::Abnormal(error.to_string()),
        };
        Condition::Abnormal(format!(
            "{what} at {target}; delete the pod to have the image mounted again"
        ))
    }

    /// The record of a published volume.
    pub(super) fn published(
        &self,
        volume_id: &VolumeId,
        target: &TargetPath,
    ) -> Result<VolumeRecord, StatsError> {
        self.records.get(&record_name(volume_id, target))?.ok_or_else(|| StatsError::NotFound {
            volume: volume_id.to_string(),
            target: target.to_string(),
        })
    }

    /// All records.
    pub(super) fn list(&self) -> Result<Vec<VolumeRecord>, StoreError> {
        Ok(self.records.list()?.into_iter().map(|(_, record)| record).collect())
    }

    /// Compares records with mounts after a start.
    pub(super) fn reconcile(&self, pods: &Path) -> Result<Reconciled, StoreError> {
        let mut outcome = Reconciled::default();
        let records: Vec<(String, VolumeRecord)> = self.records.list()?;
        let targets: HashSet<&Path> =
            records.iter().map(|(_, record)| record.target.as_path()).collect();
        for (name, record) in &records {
            let target = record.target.as_path();
            if record.stream && self.mount_at(target).is_ok_and(|mount| mount.is_some()) {
                // Its session may be dead or alive; that is looked after all the time.
                outcome.mounted += 1;
                continue;
            }
            match self.mounter.state(target) {
                Ok(TargetState::Mounted { .. }) => outcome.mounted += 1,
                Ok(TargetState::Dead) => {
                    outcome.dead += 1;
                    tracing::warn!(volume = %record.volume_id, target = %record.target,
                        "a volume's mount is dead; its pod must be deleted");
                }
                // The kubelet publishes or unpublishes again, as it finds the pod.
                Ok(TargetState::Absent | TargetState::Empty | TargetState::Occupied(_))
                    if target.parent().is_some_and(Path::exists) =>
                {
                    outcome.waiting += 1;
                }
                Ok(_) => {
                    self.let_go(record);
                    self.records.remove(name)?;
                    outcome.dropped += 1;
                }
                Err(error) => {
                    tracing::warn!(volume = %record.volume_id, %error, "cannot tell a volume's state");
                    outcome.waiting += 1;
                }
            }
        }
        match self.mounter.under(pods) {
            Ok(mounts) => {
                for mount in mounts {
                    let Some(digest) = mount.shown_image() else { continue };
                    if !targets.contains(mount.target.as_path()) {
                        outcome.unknown += 1;
                        tracing::warn!(target = %mount.target.display(), %digest,
                            "a mounted image has no volume record; left alone");
                    }
                }
            }
            Err(error) => tracing::warn!(%error, "cannot list the mounts of pods"),
        }
        Ok(outcome)
    }

    fn show(
        &self,
        tree: &Tree,
        target: &TargetPath,
        options: MountOptions,
    ) -> Result<(), PublishError> {
        let path = target.as_path();
        let wanted: FolderId = self.mounter.identify(tree)?;
        let state = self.mounter.state(path)?;
        match state {
            TargetState::Mounted { id, read_only: true } if id == wanted => return Ok(()),
            TargetState::Mounted { .. } => return Err(occupied(target, "another mount")),
            TargetState::Occupied(what) => return Err(occupied(target, what)),
            TargetState::Dead => self.mounter.unmount(path)?,
            TargetState::Absent => fs::DirBuilder::new()
                .mode(TARGET_MODE)
                .create(path)
                .map_err(|e| MountError::new(format!("create the target folder {target}"), e))?,
            TargetState::Empty => {}
        }
        crash::point("publish: the target is there");
        self.mounter.mount_tree(tree, path, options)?;
        crash::point("publish: mounted");
        Ok(())
    }

    fn tree(&self, record: &VolumeRecord) -> Tree {
        match &record.view {
            Some(view) => Tree { rootfs: self.store.view_rootfs(&record.digest, view), path: None },
            None => Tree { rootfs: self.store.rootfs(&record.digest), path: record.path.clone() },
        }
    }

    /// A record that is damaged counts as lost: what it said is found out again.
    fn record(&self, name: &str) -> Result<Option<VolumeRecord>, StoreError> {
        match self.records.get(name) {
            Err(StoreError::Corrupt(why)) => {
                tracing::warn!(%why, "a volume's record is damaged; it is written anew");
                Ok(None)
            }
            other => other,
        }
    }
}

/// Of a volume that shows all of `path`.
fn record_of(wanted: &Wanted, digest: Digest) -> VolumeRecord {
    let asked = &wanted.attributes;
    VolumeRecord {
        volume_id: wanted.volume_id.clone(),
        target: wanted.target.clone(),
        image: asked.image.clone(),
        digest,
        path: asked.path.clone(),
        filter: None,
        view: None,
        options: asked.options,
        stream: false,
        bytes: 0,
        files: 0,
        pin_seconds: asked.pin.map(|time| time.as_secs()),
        pod: asked.pod.clone(),
        published_at: SystemTime::now(),
    }
}

fn occupied(target: &TargetPath, what: &'static str) -> PublishError {
    PublishError::Occupied { target: target.to_string(), what }
}
