//! The agent is killed between any two steps of a publish and of an unpublish: the next one,
//! and the kubelet who asks again, make everything right. Real mounts, real deaths.

use std::process::Command;
use std::time::Duration;

use carport_image::source::PullSecret;
use tokio::time::Instant;

use super::*;
use crate::mount::KernelMounter;
use crate::testing::{self, World};

const CHILD: &str = "CARPORT_CRASH_VOLUME";

/// What the process does that is killed.
#[derive(Clone, Copy)]
struct Deed {
    /// `publish` or `unpublish`.
    what: &'static str,
    /// The attribute `exclude`.
    exclude: &'static str,
}

fn volumes(store: &Path) -> Volumes {
    let store = carport_image::Store::open(store).unwrap();
    let sources = carport_image::source::Sources::new(Default::default()).unwrap();
    let layouts = LayoutFolders::new([store.root().parent().unwrap()]);
    let puller = Puller::new(store, sources, Default::default());
    Volumes::new(puller, Arc::new(KernelMounter), layouts)
}

async fn act(volumes: &Volumes, what: &str, target: &Path, image: &str, exclude: &str) {
    let volume_id = VolumeId::parse("csi-1").unwrap();
    let target = TargetPath::parse(target.to_str().unwrap()).unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    if what == "unpublish" {
        volumes.unpublish(&volume_id, &target, deadline).await.unwrap();
        return;
    }
    let attributes = [("image", image), ("exclude", exclude)];
    let attributes = VolumeAttributes::parse(attributes).unwrap();
    let secret = PullSecret::none();
    let viewer = Viewer::Myself;
    let request = PublishRequest { volume_id, target, attributes, secret, viewer, deadline };
    volumes.publish(request).await.unwrap();
}

/// Runs in a process of its own, in the parent's mount namespace, which `crash::point` ends.
#[test]
fn crash_child() {
    let Ok(arguments) = std::env::var(CHILD) else { return };
    let [store, what, target, image, exclude] =
        arguments.split('\n').collect::<Vec<_>>().try_into().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(act(&volumes(Path::new(store)), what, Path::new(target), image, exclude));
}

/// Whether the process died before it was done.
fn killed_at(step: u32, deed: Deed, world: &World, target: &Path, image: &str) -> bool {
    let store = world.store.root().to_str().unwrap();
    let arguments = [store, deed.what, target.to_str().unwrap(), image, deed.exclude].join("\n");
    let status = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "volume::crash_tests::crash_child", "--nocapture"])
        .env(CHILD, arguments)
        .env("CARPORT_CRASH_AT", step.to_string())
        .output()
        .unwrap()
        .status;
    use std::os::unix::process::ExitStatusExt as _;
    assert!(status.success() || status.signal() == Some(9), "{status}");
    !status.success()
}

fn mounts(world: &World) -> usize {
    KernelMounter.under(&world.pods).unwrap().len()
}

fn assert_shown(world: &World, target: &Path) {
    assert_eq!(fs_text(&target.join("models/weights")), "w");
    assert_eq!(mounts(world), 1);
    assert_eq!(world.records().len(), 1);
}

fn assert_nothing_left(world: &World, target: &Path) {
    assert!(!target.exists());
    assert_eq!((mounts(world), world.records().len()), (0, 0));
}

fn fs_text(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap()
}

async fn scenario(deed: Deed) {
    let world = World::new(None);
    let image = world.pack("v1", &[("weights", "w"), ("base/config", "c")]).await;
    let target = world.target("a");
    let mut deaths = 0;
    for step in 1.. {
        let mut killed = false;
        // The kubelet tells again what it told before, or the pod is gone meanwhile.
        for next in ["publish", "unpublish"] {
            let store = world.store.root().to_owned();
            let before = volumes(&store);
            if deed.what == "unpublish" {
                act(&before, "publish", &target, &image, deed.exclude).await;
            }
            killed = killed_at(step, deed, &world, &target, &image);

            let volumes = volumes(&store);
            volumes.reconcile(&world.pods).await.unwrap();
            act(&volumes, next, &target, &image, deed.exclude).await;
            if next == "publish" {
                assert_shown(&world, &target);
                act(&volumes, "unpublish", &target, &image, deed.exclude).await;
            }
            assert_nothing_left(&world, &target);
        }
        if !killed {
            break;
        }
        deaths += 1;
    }
    assert_eq!(deaths, 3, "steps that were died at");
    // Nothing is held for ever, and nothing was lost.
    world.store.collect().unwrap();
    for digest in world.store.images().unwrap().iter().map(|image| image.digest) {
        let tree = world.store.rootfs(&digest).parent().unwrap().to_owned();
        let views = std::fs::read_dir(tree.join("views")).map(Iterator::count);
        assert_eq!(views.unwrap_or(0), 0);
        assert!(world.store.remove(&digest).unwrap());
    }
}

#[test]
fn killed_between_any_two_steps_of_a_publish() {
    testing::in_mount_namespace_async("killed_between_steps_of_a_publish", || async {
        scenario(Deed { what: "publish", exclude: "" }).await;
        scenario(Deed { what: "publish", exclude: "base" }).await;
    });
}

#[test]
fn killed_between_any_two_steps_of_an_unpublish() {
    testing::in_mount_namespace_async("killed_between_steps_of_an_unpublish", || async {
        scenario(Deed { what: "unpublish", exclude: "" }).await;
        scenario(Deed { what: "unpublish", exclude: "base" }).await;
    });
}
