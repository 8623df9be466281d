//! Volumes over a real store and mounts in memory.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use carport_image::PullError;
use carport_image::source::{PullSecret, SourceError};
use carport_image::store::StoreError;
use tokio::time::Instant;

use super::*;
use crate::mount::fake::FakeMounter;
use crate::mount::{MountError, TargetState};
use crate::testing::{GatedRegistry, World};

mod waiting;

struct Bench {
    world: World,
    mounter: Arc<FakeMounter>,
    volumes: Volumes,
}

impl Bench {
    fn new(registry: Option<&GatedRegistry>) -> Self {
        let world = World::new(registry);
        let mounter = Arc::new(FakeMounter::default());
        let layouts = LayoutFolders::new([world.folder.path()]);
        let volumes = Volumes::new(world.puller.clone(), mounter.clone(), layouts);
        Self { world, mounter, volumes }
    }

    /// With an image, and its reference.
    async fn with_image() -> (Self, String) {
        let bench = Self::new(None);
        let image = bench.world.pack("v1", &[("weights", "w"), ("base/config", "c")]).await;
        (bench, image)
    }

    fn mounts(&self) -> Vec<PathBuf> {
        let mounts = self.mounter.under(&self.world.pods).unwrap();
        mounts.into_iter().map(|mount| mount.target).collect()
    }

    async fn publish(&self, id: &str, target: &Path, image: &str) -> Result<bool, PublishError> {
        self.publish_with(id, target, &[("image", image)]).await
    }

    async fn publish_with(
        &self,
        id: &str,
        target: &Path,
        attributes: &[(&str, &str)],
    ) -> Result<bool, PublishError> {
        let request = request(id, target, attributes, Duration::from_secs(60));
        self.volumes.publish(request).await.map(|published| published.already)
    }

    async fn unpublish(&self, id: &str, target: &Path) -> Result<(), UnpublishError> {
        let deadline = Instant::now() + Duration::from_secs(60);
        let taken = self.volumes.unpublish(&volume_id(id), &target_path(target), deadline).await;
        taken.map(drop)
    }

    /// As after a restart whose configuration allows no layouts.
    fn without_layouts(&self) -> Volumes {
        let puller = self.world.puller.clone();
        Volumes::new(puller, self.mounter.clone(), LayoutFolders::default())
    }

    async fn condition(&self, id: &str, target: &Path) -> Condition {
        self.volumes.stats(&volume_id(id), &target_path(target)).await.unwrap().condition
    }

    /// Until no pull is under way.
    async fn until_quiet(&self) {
        let mut changes = self.world.puller.changes();
        while !self.world.puller.pulls().is_empty() {
            changes.changed().await.unwrap();
        }
    }

    fn assert_nothing_left(&self, target: &Path) {
        assert!(!target.exists(), "{} is still there", target.display());
        assert_eq!(self.world.records(), Vec::<PathBuf>::new());
        assert_eq!(self.mounts(), Vec::<PathBuf>::new());
    }
}

fn volume_id(id: &str) -> VolumeId {
    VolumeId::parse(id).unwrap()
}

fn target_path(target: &Path) -> TargetPath {
    TargetPath::parse(target.to_str().unwrap()).unwrap()
}

fn request(
    id: &str,
    target: &Path,
    attributes: &[(&str, &str)],
    timeout: Duration,
) -> PublishRequest {
    PublishRequest {
        volume_id: volume_id(id),
        target: target_path(target),
        attributes: VolumeAttributes::parse(attributes.iter().copied()).unwrap(),
        secret: PullSecret::none(),
        viewer: Viewer::Myself,
        deadline: Instant::now() + timeout,
    }
}

#[tokio::test]
async fn publish_mounts_with_a_record_and_unpublish_takes_both_away() {
    let (bench, image) = Bench::with_image().await;
    let target = bench.world.target("a");
    let mut changes = bench.volumes.changes();
    assert!(!bench.publish("csi-a", &target, &image).await.unwrap());
    assert_eq!(bench.mounts(), std::slice::from_ref(&target));
    let records = bench.volumes.list().await.unwrap();
    assert_eq!(records.len(), 1);
    assert_eq!(records[0].volume_id, volume_id("csi-a"));
    assert_eq!(records[0].image.to_string(), image);
    assert_eq!((records[0].files, records[0].bytes), (2, 2));
    assert!(changes.has_changed().unwrap());
    changes.mark_unchanged();

    bench.unpublish("csi-a", &target).await.unwrap();
    bench.assert_nothing_left(&target);
    assert!(changes.has_changed().unwrap());
}

#[tokio::test]
async fn publish_again_is_done_at_once_and_asks_no_source() {
    let (bench, image) = Bench::with_image().await;
    let target = bench.world.target("a");
    bench.publish("csi-a", &target, &image).await.unwrap();
    fs::remove_dir_all(bench.world.folder.path().join("layout")).unwrap();
    for _ in 0..10 {
        let again = [("image", &*image), ("pullPolicy", "Always")];
        assert!(bench.publish_with("csi-a", &target, &again).await.unwrap());
    }
    assert_eq!(bench.mounts().len(), 1);
    bench.unpublish("csi-a", &target).await.unwrap();
    bench.assert_nothing_left(&target);
}

#[tokio::test]
async fn a_folder_of_the_image_is_published() {
    let (bench, image) = Bench::with_image().await;
    let target = bench.world.target("a");
    let attributes = [("image", &*image), ("path", "/models/base")];
    bench.publish_with("csi-a", &target, &attributes).await.unwrap();
    let mount = bench.mounter.under(&target).unwrap().remove(0);
    assert!(mount.root.ends_with("rootfs/models/base"), "{mount:?}");

    let other = bench.world.target("b");
    let attributes = [("image", &*image), ("path", "/models/absent")];
    let error = bench.publish_with("csi-b", &other, &attributes).await.unwrap_err();
    assert!(matches!(error, PublishError::Mount(MountError::NotInImage { .. })), "{error:?}");
    assert!(error.to_string().starts_with("image folder /models/absent: is not there"), "{error}");
    assert!(!other.exists());
    assert_eq!(bench.world.records().len(), 1);
}

#[tokio::test]
async fn only_the_files_that_are_asked_for_are_shown() {
    let bench = Bench::new(None);
    let files = [("config", "c"), ("w.safetensors", "ww"), ("original/w.pth", "www")];
    let image = bench.world.pack("v1", &files).await;
    let chosen = |include, exclude| {
        [("image", &*image), ("path", "/models"), ("include", include), ("exclude", exclude)]
    };
    let (a, b) = (bench.world.target("a"), bench.world.target("b"));
    bench.publish_with("csi-a", &a, &chosen("", "original")).await.unwrap();
    bench.publish_with("csi-b", &b, &chosen("", "original")).await.unwrap();
    assert!(bench.publish_with("csi-a", &a, &chosen("", "original")).await.unwrap(), "again");
    let error = bench.publish_with("csi-a", &a, &chosen("", "")).await.unwrap_err();
    assert!(matches!(error, PublishError::Incompatible { .. }), "{error}");

    let records = bench.volumes.list().await.unwrap();
    assert!(records.iter().all(|record| (record.files, record.bytes) == (2, 3)));
    let shown = |record: &VolumeRecord| {
        bench.world.store.view_rootfs(&record.digest, record.view.as_ref().unwrap())
    };
    let rootfs = shown(&records[0]);
    assert_eq!(shown(&records[1]), rootfs, "one view for both");
    let mut names: Vec<_> =
        fs::read_dir(&rootfs).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["config", "w.safetensors"]);
    let mounts = bench.mounter.under(&bench.world.pods).unwrap();
    assert!(mounts.iter().all(|mount| mount.root == rootfs));
    assert_eq!(mounts[0].shown_image(), Some(records[0].digest));
    use std::os::unix::fs::MetadataExt as _;
    let inode = |path: &Path| fs::metadata(path).unwrap().ino();
    let original = bench.world.store.rootfs(&records[0].digest).join("models/w.safetensors");
    assert_eq!(inode(&rootfs.join("w.safetensors")), inode(&original), "the same file");

    // It stays as long as one volume shows it.
    bench.unpublish("csi-a", &a).await.unwrap();
    bench.world.store.collect().unwrap();
    assert!(rootfs.exists());
    bench.unpublish("csi-b", &b).await.unwrap();
    bench.world.store.collect().unwrap();
    assert!(!rootfs.exists() && original.exists());
}

#[tokio::test]
async fn a_choice_that_leaves_nothing_is_an_error_and_leaves_nothing() {
    let (bench, image) = Bench::with_image().await;
    let target = bench.world.target("a");
    for (name, value, says) in
        [("include", "*.nothing", "leave no file"), ("exclude", "models", "leave no file")]
    {
        let attributes = [("image", &*image), (name, value)];
        let error = bench.publish_with("csi-a", &target, &attributes).await.unwrap_err();
        assert!(error.to_string().contains(says), "{error}");
        bench.assert_nothing_left(&target);
    }
    let attributes = [("image", &*image), ("path", "/nowhere"), ("include", "*")];
    let error = bench.publish_with("csi-a", &target, &attributes).await.unwrap_err();
    assert!(matches!(&error, PublishError::Mount(MountError::NotInImage { .. })), "{error}");
    bench.assert_nothing_left(&target);
}

#[tokio::test]
async fn unpublish_of_what_is_not_there_is_fine() {
    let (bench, image) = Bench::with_image().await;
    let target = bench.world.target("a");
    bench.unpublish("csi-unknown", &target).await.unwrap();
    bench.unpublish("csi-unknown", &bench.world.pods.join("no/such/pod")).await.unwrap();
    bench.publish("csi-a", &target, &image).await.unwrap();
    for _ in 0..3 {
        bench.unpublish("csi-a", &target).await.unwrap();
    }
    bench.assert_nothing_left(&target);
}

#[tokio::test]
async fn unpublish_needs_neither_image_nor_source() {
    let (bench, image) = Bench::with_image().await;
    let target = bench.world.target("a");
    bench.publish("csi-a", &target, &image).await.unwrap();
    fs::remove_dir_all(bench.world.folder.path().join("layout")).unwrap();
    fs::remove_dir_all(bench.world.store.root().join("trees")).unwrap();
    bench.unpublish("csi-a", &target).await.unwrap();
    bench.assert_nothing_left(&target);
}

#[tokio::test]
async fn an_empty_and_a_dead_target_are_published_over() {
    let (bench, image) = Bench::with_image().await;
    let empty = bench.world.target("empty");
    fs::create_dir(&empty).unwrap();
    bench.publish("csi-empty", &empty, &image).await.unwrap();

    let dead = bench.world.target("dead");
    bench.publish("csi-dead", &dead, &image).await.unwrap();
    bench.mounter.kill(&dead);
    assert!(matches!(bench.condition("csi-dead", &dead).await, Condition::Abnormal(_)));
    assert!(!bench.publish("csi-dead", &dead, &image).await.unwrap());
    assert_eq!(bench.condition("csi-dead", &dead).await, Condition::Normal);
    assert_eq!(bench.mounts().len(), 2);
}

#[tokio::test]
async fn what_belongs_to_others_is_neither_covered_nor_removed() {
    let (bench, image) = Bench::with_image().await;
    let full = bench.world.target("full");
    fs::create_dir(&full).unwrap();
    fs::write(full.join("data"), "mine").unwrap();
    let error = bench.publish("csi-full", &full, &image).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "target {}: a folder with something in it is there already; remove it, or publish \
             elsewhere",
            full.display()
        )
    );
    bench.unpublish("csi-full", &full).await.unwrap();
    assert_eq!(fs::read_to_string(full.join("data")).unwrap(), "mine");

    let foreign = bench.world.target("foreign");
    fs::create_dir(&foreign).unwrap();
    bench.mounter.mount_foreign(&foreign);
    let error = bench.publish("csi-foreign", &foreign, &image).await.unwrap_err();
    assert!(matches!(error, PublishError::Occupied { what: "another mount", .. }), "{error:?}");
    bench.unpublish("csi-foreign", &foreign).await.unwrap();
    assert_eq!(bench.mounts(), [foreign]);
    assert_eq!(bench.world.records(), Vec::<PathBuf>::new());
}

#[tokio::test]
async fn a_volume_that_shows_something_else_is_not_replaced() {
    let (bench, image) = Bench::with_image().await;
    let other = bench.world.pack("v2", &[("weights", "other")]).await;
    let target = bench.world.target("a");
    bench.publish("csi-a", &target, &image).await.unwrap();
    let error = bench.publish("csi-a", &target, &other).await.unwrap_err();
    assert!(matches!(error, PublishError::Incompatible { .. }), "{error:?}");
    let attributes = [("image", &*image), ("path", "/models")];
    let error = bench.publish_with("csi-a", &target, &attributes).await.unwrap_err();
    assert!(matches!(error, PublishError::Incompatible { .. }), "{error:?}");
    assert_eq!(bench.condition("csi-a", &target).await, Condition::Normal);
}

#[tokio::test]
async fn a_failed_mount_leaves_nothing_and_the_next_try_succeeds() {
    let (bench, image) = Bench::with_image().await;
    let target = bench.world.target("a");
    for method in ["identify", "mount_tree"] {
        bench.mounter.fail(method, ErrorKind::OutOfMemory);
        let error = bench.publish("csi-a", &target, &image).await.unwrap_err();
        assert!(matches!(error, PublishError::Mount(MountError::Io { .. })), "{error:?}");
        bench.mounter.heal();
        bench.assert_nothing_left(&target);
    }
    bench.publish("csi-a", &target, &image).await.unwrap();
}

#[tokio::test]
async fn a_failed_unmount_is_an_error_and_is_tried_again() {
    let (bench, image) = Bench::with_image().await;
    let target = bench.world.target("a");
    bench.publish("csi-a", &target, &image).await.unwrap();
    bench.mounter.fail("unmount", ErrorKind::OutOfMemory);
    let error = bench.unpublish("csi-a", &target).await.unwrap_err();
    assert!(matches!(error, UnpublishError::Mount(_)), "{error:?}");
    assert_eq!(bench.world.records().len(), 1);
    bench.mounter.heal();
    bench.unpublish("csi-a", &target).await.unwrap();
    bench.assert_nothing_left(&target);
}

#[tokio::test]
async fn a_final_pull_error_cleans_what_a_crash_left() {
    let (bench, image) = Bench::with_image().await;
    let target = bench.world.target("a");
    bench.publish("csi-a", &target, &image).await.unwrap();
    // As after a reboot: record and folder are there, the mount and the image are not.
    bench.mounter.unmount(&target).unwrap();
    fs::remove_dir_all(bench.world.folder.path().join("layout")).unwrap();
    let attributes = [("image", &*image), ("pullPolicy", "Always")];
    let error = bench.publish_with("csi-a", &target, &attributes).await.unwrap_err();
    let PublishError::Pull(PullError::Source(SourceError::NotFound(_))) = error else {
        panic!("{error:?}");
    };
    bench.assert_nothing_left(&target);
}

#[tokio::test]
async fn a_layout_elsewhere_is_refused_stored_or_not_and_leaves_nothing() {
    let (bench, image) = Bench::with_image().await;
    let target = bench.world.target("a");
    let volumes = bench.without_layouts();
    let publish = async || {
        let request = request("csi-a", &target, &[("image", &image)], Duration::from_secs(60));
        volumes.publish(request).await
    };
    let error = publish().await.unwrap_err();
    assert!(matches!(error, PublishError::LayoutRefused { .. }), "{error:?}");
    assert_eq!(bench.world.store.images().unwrap(), []);
    bench.assert_nothing_left(&target);

    bench.publish("csi-a", &target, &image).await.unwrap();
    // In place: nothing is read any more.
    assert!(publish().await.unwrap().already);
    // After a reboot it would have to be mounted anew.
    bench.mounter.unmount(&target).unwrap();
    let error = publish().await.unwrap_err();
    assert!(matches!(error, PublishError::LayoutRefused { .. }), "{error:?}");
    bench.assert_nothing_left(&target);
}

#[tokio::test]
async fn an_unpublish_says_what_it_took_away() {
    let (bench, image) = Bench::with_image().await;
    let target = bench.world.target("a");
    let request = request("csi-a", &target, &[("image", &image)], Duration::from_secs(60));
    let digest = bench.volumes.publish(request).await.unwrap().digest;
    let deadline = Instant::now() + Duration::from_secs(60);
    let (id, place) = (volume_id("csi-a"), target_path(&target));
    let taken = bench.volumes.unpublish(&id, &place, deadline).await.unwrap().unwrap();
    assert_eq!((taken.digest, taken.volume_id), (digest, id.clone()));
    assert_eq!(bench.volumes.unpublish(&id, &place, deadline).await.unwrap(), None);
}

#[tokio::test]
async fn an_image_stays_while_a_volume_shows_it() {
    let (bench, image) = Bench::with_image().await;
    let target = bench.world.target("a");
    let request = request("csi-a", &target, &[("image", &image)], Duration::from_secs(60));
    let digest = bench.volumes.publish(request).await.unwrap().digest;
    let store = &bench.world.store;
    assert!(matches!(store.remove(&digest), Err(StoreError::InUse(_))));
    let used = store.rootfs(&digest).with_file_name("used");
    std::fs::remove_file(&used).expect("the publish has noted it");
    bench.unpublish("csi-a", &target).await.unwrap();
    assert!(store.last_used(&digest).is_some(), "it was in use until now");
    assert!(store.remove(&digest).unwrap());
}

#[tokio::test]
async fn pods_that_share_a_volume_id_come_and_go_apart() {
    let (bench, image) = Bench::with_image().await;
    let (a, b) = (bench.world.target("a"), bench.world.target("b"));
    bench.publish("pv", &a, &image).await.unwrap();
    bench.publish("pv", &b, &image).await.unwrap();
    bench.unpublish("pv", &a).await.unwrap();
    assert_eq!(bench.mounts(), std::slice::from_ref(&b));
    assert_eq!(bench.condition("pv", &b).await, Condition::Normal);
    // Another volume's name does not take it away.
    bench.unpublish("other", &b).await.unwrap();
    assert_eq!(bench.mounts(), std::slice::from_ref(&b));
}

#[tokio::test]
async fn a_mount_that_lost_its_record_gets_one_again_or_goes() {
    let (bench, image) = Bench::with_image().await;
    let target = bench.world.target("a");
    for last in ["publish", "unpublish"] {
        bench.publish("csi-a", &target, &image).await.unwrap();
        fs::remove_file(&bench.world.records()[0]).unwrap();
        if last == "publish" {
            assert!(!bench.publish("csi-a", &target, &image).await.unwrap());
            assert_eq!(bench.mounts().len(), 1);
            assert_eq!(bench.world.records().len(), 1);
        }
        bench.unpublish("csi-a", &target).await.unwrap();
        bench.assert_nothing_left(&target);
    }
}

#[tokio::test]
async fn a_damaged_record_holds_up_nothing() {
    let (bench, image) = Bench::with_image().await;
    let target = bench.world.target("a");
    for _ in 0..2 {
        bench.publish("csi-a", &target, &image).await.unwrap();
        fs::write(&bench.world.records()[0], "{").unwrap();
        bench.publish("csi-a", &target, &image).await.unwrap();
        assert_eq!(bench.volumes.list().await.unwrap().len(), 1);
        fs::write(&bench.world.records()[0], "{").unwrap();
        bench.unpublish("csi-a", &target).await.unwrap();
        bench.assert_nothing_left(&target);
    }
}

#[tokio::test]
async fn stats_are_of_one_volume_at_one_target() {
    let (bench, image) = Bench::with_image().await;
    let target = bench.world.target("a");
    bench.publish("csi-a", &target, &image).await.unwrap();
    let stats = bench.volumes.stats(&volume_id("csi-a"), &target_path(&target)).await.unwrap();
    assert_eq!(stats, VolumeStats { bytes: 2, files: 2, condition: Condition::Normal });
    for (id, path) in [("csi-b", &target), ("csi-a", &bench.world.pods)] {
        let error = bench.volumes.stats(&volume_id(id), &target_path(path)).await.unwrap_err();
        assert!(matches!(error, StatsError::NotFound { .. }), "{error:?}");
    }
    bench.mounter.unmount(&target).unwrap();
    let Condition::Abnormal(why) = bench.condition("csi-a", &target).await else { panic!() };
    assert!(why.starts_with("nothing is mounted at "), "{why}");
}

#[tokio::test]
async fn a_start_finds_out_what_became_of_the_volumes() {
    let (bench, image) = Bench::with_image().await;
    let target = |name| bench.world.target(name);
    for name in ["mounted", "rebooted", "gone", "dead", "unknown"] {
        bench.publish(&format!("csi-{name}"), &target(name), &image).await.unwrap();
    }
    let unknown = bench.volumes.list().await.unwrap();
    let unknown = unknown.iter().find(|record| record.volume_id == volume_id("csi-unknown"));
    let name = record::record_name(&unknown.unwrap().volume_id, &unknown.unwrap().target);
    fs::remove_file(bench.world.store.root().join(format!("volumes/{name}.json"))).unwrap();
    bench.mounter.unmount(&target("rebooted")).unwrap();
    bench.mounter.unmount(&target("gone")).unwrap();
    fs::remove_dir_all(bench.world.pods.join("gone")).unwrap();
    bench.mounter.kill(&target("dead"));

    let again = bench.without_layouts();
    let found = again.reconcile(&bench.world.pods).await.unwrap();
    let expected = Reconciled { mounted: 1, waiting: 1, dead: 1, dropped: 1, unknown: 1 };
    assert_eq!(found, expected);
    assert_eq!(bench.world.records().len(), 3);
    // What has no record may be somebody's: it stays.
    let state = bench.mounter.state(&target("unknown")).unwrap();
    assert!(matches!(state, TargetState::Mounted { .. }));
    let expected = Reconciled { dropped: 0, ..expected };
    assert_eq!(again.reconcile(&bench.world.pods).await.unwrap(), expected);
}

#[tokio::test]
async fn a_pin_keeps_the_image_for_a_time_after_the_last_volume() {
    let (bench, image) = Bench::with_image().await;
    let target = bench.world.target("a");
    let pinned = |time| [("image", image.as_str()), ("pin", time)];
    let refused = bench.publish_with("a", &target, &pinned("24h")).await.unwrap_err();
    assert!(matches!(refused, PublishError::PinRefused(_)), "{refused}");
    bench.assert_nothing_left(&target);

    let volumes = bench.volumes.clone().with_max_pin(Duration::from_secs(86_400));
    let bench = Bench { volumes, ..bench };
    let refused = bench.publish_with("a", &target, &pinned("2days")).await.unwrap_err();
    assert!(refused.to_string().contains("2days is more than the 1day"), "{refused}");

    let store = bench.world.puller.store();
    bench.publish_with("a", &target, &pinned("24h")).await.unwrap();
    assert_eq!(store.pins().unwrap(), [], "the volume keeps it");
    let before = std::time::SystemTime::now();
    bench.unpublish("a", &target).await.unwrap();
    let [pin] = &store.pins().unwrap()[..] else { panic!("one pin") };
    assert_eq!(pin.owner.as_str(), "volumes");
    let end = pin.expires_at.unwrap();
    let left = end.duration_since(before).unwrap();
    assert!((86_400..86_460).contains(&left.as_secs()), "{left:?}");

    // One that asks for less does not cut it short.
    bench.publish_with("b", &target, &pinned("1h")).await.unwrap();
    bench.unpublish("b", &target).await.unwrap();
    assert_eq!(store.pins().unwrap()[0].expires_at, Some(end));
    let kept = store.remove(&store.pins().unwrap()[0].image).unwrap_err();
    assert!(kept.to_string().contains("pinned"), "{kept}");
}
