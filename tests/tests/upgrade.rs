//! A rolling update, as pods see it: the agent goes, another comes, and they read on.
#![allow(clippy::unwrap_used)] // a test that cannot go on says where

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use carport_tests::carport::binary;
use carport_tests::images::{Image, Tar, noise};
use carport_tests::node::{Namespace, Node, eventually};
use carport_tests::scripted::Gate;

/// A pod that reads all the time: a file that it has held open from the start, and the same one by its name.
struct Reader {
    rounds: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    // The pod's own mount namespace.
    _pod: Namespace,
}

impl Reader {
    fn start(node: &Node, path: &Path, content: Vec<u8>) -> Self {
        let pod = node.private_namespace();
        let path: PathBuf = pod.inside(path);
        let held = File::open(&path).unwrap();
        let (rounds, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let thread = {
            let (rounds, stop) = (Arc::clone(&rounds), Arc::clone(&stop));
            std::thread::spawn(move || {
                let mut buffer = vec![0; content.len()];
                while !stop.load(Ordering::Relaxed) {
                    held.read_exact_at(&mut buffer, 0).unwrap();
                    assert!(buffer == content, "the open file");
                    assert!(fs::read(&path).unwrap() == content, "by its name");
                    rounds.fetch_add(1, Ordering::Relaxed);
                }
            })
        };
        Self { rounds, stop, thread: Some(thread), _pod: pod }
    }

    /// Until it has read all of it once more from here on.
    async fn reads_on(&self) {
        let seen = self.rounds.load(Ordering::Relaxed);
        eventually("a pod reads", async || {
            assert!(!self.thread.as_ref().unwrap().is_finished(), "its reads failed");
            // The round that was under way, and a whole one.
            self.rounds.load(Ordering::Relaxed) >= seen + 2
        })
        .await;
    }

    fn end(mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_read_on_while_one_agent_follows_another_over_an_older_store() {
    let content = noise(4 * 1024 * 1024, 1);
    let image = Image::of(&[Tar::default().file("models/w.bin", &content).end()]);
    let server = image.serve(&Gate::closed_at(u64::MAX)).await;
    let Some(mut node) = Node::start(binary(), &[&server.host()]) else { return };
    let name = format!("{}/team/m:v1", server.host());
    let pod = node.pod("runs");
    node.publish(&pod, &name).await.unwrap();
    let requests = server.requests().len();
    let reader = Reader::start(&node, &pod.target.join("models/w.bin"), content);
    reader.reads_on().await;

    // As Kubernetes does it: SIGTERM, nobody for a while, then the next one.
    assert!(node.stop_agent().success());
    reader.reads_on().await;
    assert!(!node.registration_socket().exists(), "the kubelet asks nobody meanwhile");
    // What the first stores had not.
    for folder in ["access", "pins", "reservations", "rates"] {
        fs::remove_dir_all(node.root().join(folder)).unwrap();
    }
    fs::remove_file(node.root().join("admission")).unwrap();
    node.start_agent();
    reader.reads_on().await;

    // It knows what there is, and goes on with it.
    assert_eq!(node.json(&["status"])["models"][0]["mount_count"], 1);
    let late = node.pod("late");
    node.publish(&late, &name).await.unwrap();
    // Who may have the image is not known of such a store, and is asked; nothing is fetched again.
    let asked = &server.requests()[requests..];
    assert!(asked.iter().all(|request| !request.target.contains("/blobs/")), "{asked:?}");
    reader.reads_on().await;
    reader.end();
    for pod in [&pod, &late] {
        node.unpublish(pod).await.unwrap();
        assert!(!node.inside(&pod.target).exists());
    }
}

/// A downgrade over a store that is too new for it.
#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_cannot_read_the_store_says_what_to_do_and_pods_read_on() {
    let content = noise(1024 * 1024, 2);
    let image = Image::of(&[Tar::default().file("models/w.bin", &content).end()]);
    let server = image.serve(&Gate::closed_at(u64::MAX)).await;
    let Some(mut node) = Node::start(binary(), &[&server.host()]) else { return };
    let pod = node.pod("runs");
    node.publish(&pod, &format!("{}/team/m:v1", server.host())).await.unwrap();
    let reader = Reader::start(&node, &pod.target.join("models/w.bin"), content);
    assert!(node.stop_agent().success());
    let format = fs::read_to_string(node.root().join("format")).unwrap();
    fs::write(node.root().join("format"), "carport store 9\n").unwrap();

    let output = node.agent_command().output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    let last = said.lines().last().unwrap();
    for part in ["carport store 9", "carport store 1", "run the version that made it", "--root"] {
        assert!(last.contains(part), "{last}");
    }
    // The doctor, too, which somebody asks then.
    let output = node.carport().args(["doctor", "-o", "json"]).output().unwrap();
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let checks = report["checks"].as_array().unwrap();
    let store = checks.iter().find(|check| check["name"] == "store").unwrap();
    assert_eq!(store["level"], "fail");
    assert!(store["message"].as_str().unwrap().contains("carport store 9"), "{store}");
    reader.reads_on().await;

    fs::write(node.root().join("format"), format).unwrap();
    node.start_agent();
    reader.reads_on().await;
    reader.end();
    node.unpublish(&pod).await.unwrap();
    assert!(!node.inside(&pod.target).exists());
}
