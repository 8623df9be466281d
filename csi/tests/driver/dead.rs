//! Mounts that do not answer: whose server is gone, and whose server is there and does nothing.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use carport_csi::fuse::{self, FuseMount};
use carport_csi::mount::Tree;
use futures_util::future::join_all;
use rustix::mount::UnmountFlags;
use tonic::Code;

use super::testing::{self, World};
use super::{Node, request, text};

/// More than there are threads without them.
const CALLS: usize = 50;

const TREE: &str = "CARPORT_TEST_TREE";
const TARGET: &str = "CARPORT_TEST_TARGET";

#[test]
fn a_dead_mount_is_reported_and_published_over() {
    testing::in_mount_namespace_async("a_dead_mount_is_reported", || async {
        let world = World::new(None);
        let image = world.pack("v1", &[("weights", "weights")]).await;
        let node = Node::start(&world);
        let target = world.target("a");
        node.publish(request("csi-a", &target, &image)).await.unwrap();
        if !testing::mount_dead_fuse(&target) {
            return;
        }
        let condition = node.stats("csi-a", &text(&target)).await.unwrap().volume_condition;
        let condition = condition.unwrap();
        assert!(condition.abnormal);
        assert!(condition.message.starts_with("a dead mount is at "), "{}", condition.message);
        node.publish(request("csi-a", &target, &image)).await.unwrap();
        assert_eq!(fs::read_to_string(target.join("weights")).unwrap(), "weights");
        assert!(testing::mount_dead_fuse(&target));
        node.unpublish("csi-a", &target).await.unwrap();
        assert!(!target.exists());
        node.stop().await;
    });
}

/// As a streaming volume whose session is alive and does nothing.
#[test]
fn a_hung_mount_holds_up_neither_stats_nor_publish_nor_unpublish() {
    if let Err(error) = fuse::check() {
        println!("SKIPPED: {error}");
        return;
    }
    testing::in_mount_namespace_async("a_hung_mount_holds_up_nothing", || async {
        let world = World::new(None);
        let image = world.pack("v1", &[("weights", "weights")]).await;
        let node = Node::start(&world);
        let target = world.target("a");
        node.publish(request("csi-a", &target, &image)).await.unwrap();
        let server = StoppedServer::start(&world.folder.path().join("store"));
        let began = Instant::now();
        server.mount_at(&target);
        for _ in 0..3 {
            let stats = node.stats("csi-a", &text(&target)).await.unwrap();
            assert_eq!(stats.usage.len(), 2, "usage is told all the same");
            let condition = stats.volume_condition.unwrap();
            assert!(condition.abnormal);
            assert!(condition.message.starts_with("a dead mount is at "), "{condition:?}");
        }
        // After a restart of the kubelet.
        node.publish(request("csi-a", &target, &image)).await.unwrap();
        assert_eq!(fs::read_to_string(target.join("weights")).unwrap(), "weights");

        server.mount_at(&target);
        node.unpublish("csi-a", &target).await.unwrap();
        assert!(!target.exists());
        assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
        node.stop().await;
    });
}

#[test]
fn a_hung_disk_of_records_holds_up_no_stats_and_one_thread() {
    testing::in_mount_namespace_async("a_hung_disk_of_records", || async {
        let world = World::new(None);
        let image = world.pack("v1", &[("weights", "weights")]).await;
        let node = Node::start(&world);
        let target = world.target("a");
        node.publish(request("csi-a", &target, &image)).await.unwrap();
        let records = world.store.root().join("volumes");
        let Some(disk) = testing::mount_hung_fuse(&records) else { return };
        let (path, began) = (text(&target), Instant::now());
        for answer in join_all((0..CALLS).map(|_| node.stats("csi-a", &path))).await {
            let error = answer.unwrap_err();
            assert_eq!(error.code(), Code::Unavailable, "{error}");
            assert!(error.message().contains("did not answer for 5 s"), "{error}");
        }
        assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
        // Those of this test alone are in its namespace.
        let threads = fs::read_dir("/proc/self/task").unwrap();
        let namespaces = threads.filter_map(|thread| namespace(&thread.unwrap().path()));
        let here = namespace(Path::new("/proc/thread-self"));
        let threads = namespaces.filter(|one| here.as_ref() == Some(one)).count();
        assert!(threads < CALLS / 2, "{threads} threads after {CALLS} calls");
        // It answers again.
        drop(disk);
        rustix::mount::unmount(&records, UnmountFlags::DETACH).unwrap();
        node.stats("csi-a", &path).await.unwrap();
        node.unpublish("csi-a", &target).await.unwrap();
        node.stop().await;
    });
}

fn namespace(thread: &Path) -> Option<PathBuf> {
    fs::read_link(thread.join("ns/mnt")).ok()
}

/// A session in a process of its own, which is stopped while it serves.
struct StoppedServer {
    process: std::process::Child,
    folder: tempfile::TempDir,
}

impl StoppedServer {
    fn start(tree: &Path) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "dead::serve", "--nocapture"])
            .env(TREE, tree)
            .env(TARGET, folder.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(process.stdout.take().unwrap()).lines();
        assert!(lines.any(|line| line.unwrap().ends_with("serving")), "the server ended");
        let id = rustix::process::Pid::from_child(&process);
        rustix::process::kill_process(id, rustix::process::Signal::STOP).unwrap();
        Self { process, folder }
    }

    fn mount_at(&self, target: &Path) {
        rustix::mount::mount_bind(self.folder.path(), target).unwrap();
    }
}

impl Drop for StoppedServer {
    fn drop(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
        fuse::unmount(self.folder.path()).unwrap();
    }
}

/// No test of its own: what a [`StoppedServer`] runs.
#[test]
fn serve() {
    let (Some(tree), Some(target)) = (std::env::var_os(TREE), std::env::var_os(TARGET)) else {
        return;
    };
    let tree = Tree { rootfs: tree.into(), path: None };
    let _mount = FuseMount::mount(&tree, Path::new(&target)).unwrap();
    println!("serving");
    std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
}
