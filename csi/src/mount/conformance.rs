//! What every [`Mounter`] does, asked of the fake and of the kernel's.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::fake::FakeMounter;
use super::{ImagePath, KernelMounter, MountError, MountOptions, Mounter, TargetState, Tree};
use crate::testing;

/// A tree of a store, and a folder for targets.
struct World {
    _folder: tempfile::TempDir,
    rootfs: PathBuf,
    pods: PathBuf,
}

impl World {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let rootfs = folder.path().join(format!("trees/{}/rootfs", "a".repeat(64)));
        fs::create_dir_all(rootfs.join("models/base")).unwrap();
        fs::write(rootfs.join("models/base/weights"), "weights").unwrap();
        symlink("/etc", rootfs.join("out")).unwrap();
        symlink("models", rootfs.join("in")).unwrap();
        // With a space, which the kernel's list of mounts writes in octal.
        let pods = folder.path().join("some pods");
        fs::create_dir(&pods).unwrap();
        Self { _folder: folder, rootfs, pods }
    }

    fn tree(&self, path: &str) -> Tree {
        Tree { rootfs: self.rootfs.clone(), path: ImagePath::parse(path).unwrap() }
    }

    fn target(&self, name: &str) -> PathBuf {
        let target = self.pods.join(name);
        fs::create_dir(&target).unwrap();
        target
    }
}

fn suite(mounter: &dyn Mounter) {
    states_of_what_is_not_a_mount(mounter);
    a_tree_is_mounted_and_taken_away(mounter);
    a_folder_inside_is_mounted(mounter);
    only_folders_inside_can_be_named(mounter);
    stacked_mounts_all_go(mounter);
    a_failed_mount_leaves_nothing(mounter);
    listed_is_what_is_at_or_below_the_prefix(mounter);
}

fn states_of_what_is_not_a_mount(mounter: &dyn Mounter) {
    let world = World::new();
    let state = |path: &Path| mounter.state(path).unwrap();
    assert_eq!(state(&world.pods.join("absent")), TargetState::Absent);
    assert_eq!(state(&world.pods.join("absent/too")), TargetState::Absent);
    assert_eq!(state(&world.target("empty")), TargetState::Empty);
    let full = world.target("full");
    fs::write(full.join("file"), "").unwrap();
    assert_eq!(state(&full), TargetState::Occupied("a folder with something in it"));
    assert_eq!(state(&full.join("file")), TargetState::Occupied("a file"));
    let link = world.pods.join("link");
    symlink(&full, &link).unwrap();
    assert_eq!(state(&link), TargetState::Occupied("a symbolic link"));
    mounter.unmount(&full).unwrap();
    mounter.unmount(&world.pods.join("absent")).unwrap();
    assert_eq!(state(&full), TargetState::Occupied("a folder with something in it"));
}

fn a_tree_is_mounted_and_taken_away(mounter: &dyn Mounter) {
    let world = World::new();
    let target = world.target("mount");
    let tree = world.tree("/");
    mounter.mount_tree(&tree, &target, MountOptions::default()).unwrap();
    let id = mounter.identify(&tree).unwrap();
    assert_eq!(mounter.state(&target).unwrap(), TargetState::Mounted { id, read_only: true });
    mounter.unmount(&target).unwrap();
    assert_eq!(mounter.state(&target).unwrap(), TargetState::Empty);
    mounter.unmount(&target).unwrap();
}

fn a_folder_inside_is_mounted(mounter: &dyn Mounter) {
    let world = World::new();
    let target = world.target("mount");
    let tree = world.tree("/models/base");
    mounter.mount_tree(&tree, &target, MountOptions::default()).unwrap();
    let id = mounter.identify(&tree).unwrap();
    assert_ne!(id, mounter.identify(&world.tree("/")).unwrap());
    assert_eq!(mounter.state(&target).unwrap(), TargetState::Mounted { id, read_only: true });
    mounter.unmount(&target).unwrap();
}

fn only_folders_inside_can_be_named(mounter: &dyn Mounter) {
    let world = World::new();
    let target = world.target("mount");
    for (path, expected) in [
        ("/absent", "is not there"),
        ("/models/base/weights", "is not a folder"),
        ("/out", "is reached through a symbolic link"),
        ("/in/base", "is reached through a symbolic link"),
    ] {
        match mounter.mount_tree(&world.tree(path), &target, MountOptions::default()).unwrap_err() {
            MountError::NotInImage { path: named, why } => {
                assert_eq!((named.as_str(), why), (path, expected));
            }
            other => panic!("{path}: {other:?}"),
        }
    }
    let gone = Tree { rootfs: world.pods.join("no-store"), path: None };
    assert!(matches!(mounter.identify(&gone), Err(MountError::TreeGone(_))));
    assert_eq!(mounter.state(&target).unwrap(), TargetState::Empty);
}

fn stacked_mounts_all_go(mounter: &dyn Mounter) {
    let world = World::new();
    let target = world.target("mount");
    mounter.mount_tree(&world.tree("/"), &target, MountOptions::default()).unwrap();
    mounter.mount_tree(&world.tree("/models"), &target, MountOptions::default()).unwrap();
    let id = mounter.identify(&world.tree("/models")).unwrap();
    assert_eq!(mounter.state(&target).unwrap(), TargetState::Mounted { id, read_only: true });
    mounter.unmount(&target).unwrap();
    assert_eq!(mounter.state(&target).unwrap(), TargetState::Empty);
}

fn a_failed_mount_leaves_nothing(mounter: &dyn Mounter) {
    let world = World::new();
    let absent = world.pods.join("absent");
    mounter.mount_tree(&world.tree("/"), &absent, MountOptions::default()).unwrap_err();
    assert_eq!(mounter.state(&absent).unwrap(), TargetState::Absent);
    let file = world.pods.join("file");
    fs::write(&file, "").unwrap();
    mounter.mount_tree(&world.tree("/"), &file, MountOptions::default()).unwrap_err();
    assert_eq!(mounter.under(&world.pods).unwrap(), []);
}

fn listed_is_what_is_at_or_below_the_prefix(mounter: &dyn Mounter) {
    let world = World::new();
    let (a, b, beside) = (world.target("a"), world.target("b"), world.target("ab"));
    for target in [&b, &a, &beside] {
        mounter.mount_tree(&world.tree("/models"), target, MountOptions::default()).unwrap();
    }
    let targets = |prefix: &Path| -> Vec<PathBuf> {
        mounter.under(prefix).unwrap().into_iter().map(|point| point.target).collect()
    };
    assert_eq!(targets(&world.pods), [b.clone(), a.clone(), beside.clone()]);
    assert_eq!(targets(&a), std::slice::from_ref(&a));
    let point = mounter.under(&a).unwrap().remove(0);
    assert!(point.read_only);
    assert_eq!(point.shown_image().unwrap().hex(), "a".repeat(64));
    for target in [&a, &b, &beside] {
        mounter.unmount(target).unwrap();
    }
    assert_eq!(targets(&world.pods), Vec::<PathBuf>::new());
}

#[test]
fn the_fake_conforms() {
    suite(&FakeMounter::default());
}

#[test]
fn the_kernel_conforms() {
    testing::in_mount_namespace("the_kernel_conforms", || suite(&KernelMounter));
}

#[test]
fn a_mounted_tree_refuses_writes_set_user_id_and_devices() {
    testing::in_mount_namespace("a_mounted_tree_refuses_writes", || {
        let world = World::new();
        let target = world.target("mount");
        KernelMounter.mount_tree(&world.tree("/models"), &target, MountOptions::default()).unwrap();
        let file = target.join("base/weights");
        assert_eq!(fs::read_to_string(&file).unwrap(), "weights");
        for result in [
            fs::write(&file, "changed"),
            fs::write(target.join("new"), ""),
            fs::remove_file(&file),
            fs::create_dir(target.join("folder")),
        ] {
            assert_eq!(result.unwrap_err().kind(), std::io::ErrorKind::ReadOnlyFilesystem);
        }
        let options = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
        let line = options.lines().find(|line| line.contains("some\\040pods/mount")).unwrap();
        assert!(line.split(' ').nth(5).unwrap().starts_with("ro,nosuid,nodev"), "{line}");
        assert!(!line.contains("noexec"), "{line}");
        KernelMounter.unmount(&target).unwrap();
    });
}

#[test]
fn where_it_is_asked_for_nothing_can_be_run() {
    testing::in_mount_namespace("nothing_can_be_run", || {
        use std::os::unix::fs::PermissionsExt as _;
        let world = World::new();
        let script = world.rootfs.join("models/run");
        fs::write(&script, "#!/bin/sh\n").unwrap();
        fs::set_permissions(&script, fs::Permissions::from_mode(0o555)).unwrap();
        let target = world.target("mount");
        for noexec in [false, true] {
            let options = MountOptions { noexec };
            KernelMounter.mount_tree(&world.tree("/models"), &target, options).unwrap();
            let run = std::process::Command::new(target.join("run")).status();
            let refused = run.is_err_and(|e| e.kind() == std::io::ErrorKind::PermissionDenied);
            assert_eq!(refused, noexec);
            KernelMounter.unmount(&target).unwrap();
        }
    });
}

#[test]
fn a_target_behind_a_link_in_its_prefix_is_found() {
    testing::in_mount_namespace("a_target_behind_a_link", || {
        let world = World::new();
        world.target("mount");
        let alias = world.pods.parent().unwrap().join("alias");
        symlink(&world.pods, &alias).unwrap();
        let target = alias.join("mount");
        KernelMounter.mount_tree(&world.tree("/"), &target, MountOptions::default()).unwrap();
        let found = KernelMounter.under(&target).unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].target, target);
        KernelMounter.unmount(&target).unwrap();
        assert_eq!(KernelMounter.state(&target).unwrap(), TargetState::Empty);
    });
}

#[test]
fn a_mount_whose_server_died_is_told_and_taken_away() {
    testing::in_mount_namespace("a_mount_whose_server_died", || {
        let world = World::new();
        let target = world.target("mount");
        if !testing::mount_dead_fuse(&target) {
            return;
        }
        assert_eq!(KernelMounter.state(&target).unwrap(), TargetState::Dead);
        assert_eq!(KernelMounter.under(&target).unwrap().len(), 1);
        KernelMounter.unmount(&target).unwrap();
        assert_eq!(KernelMounter.state(&target).unwrap(), TargetState::Empty);
    });
}

/// At the target itself, and below the tree that it shows.
#[test]
fn a_mount_whose_server_never_answers_counts_as_dead_and_is_taken_away() {
    testing::in_mount_namespace("a_mount_whose_server_never_answers", || {
        let world = World::new();
        let (target, shown) = (world.target("mount"), world.target("shown"));
        let Some(server) = testing::mount_hung_fuse(&target) else { return };
        let hung = Tree { rootfs: target.clone(), path: None };
        KernelMounter.mount_tree(&hung, &shown, MountOptions::default()).unwrap();
        let start = Instant::now();
        for target in [&target, &shown] {
            assert_eq!(KernelMounter.state(target).unwrap(), TargetState::Dead);
        }
        assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
        // And from then on without a wait, nor one more thread that waits.
        let start = Instant::now();
        for _ in 0..100 {
            assert_eq!(KernelMounter.state(&target).unwrap(), TargetState::Dead);
        }
        for target in [&target, &shown] {
            KernelMounter.unmount(target).unwrap();
            assert_eq!(KernelMounter.state(target).unwrap(), TargetState::Empty);
        }
        assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
        drop(server);
    });
}
