//! The agent ends, is killed, comes back: pods go on reading, and nothing is half of anything.

#![allow(clippy::unwrap_used)] // a test that cannot go on says where

use std::fs;
use std::path::Path;
use std::process::Stdio;

use carport_tests::carport::binary;
use carport_tests::images::{Image, Tar, noise};
use carport_tests::node::{Node, Pod, Setup, eventually};
use carport_tests::scripted::Gate;
use rustix::process::Signal;
use serde_json::Value;
use tonic::Code;

const MIB: u64 = 1 << 20;

/// One large file in one layer, and a small one beside it.
fn large_image(size: u64) -> (Image, Vec<u8>) {
    let content = noise(usize::try_from(size).unwrap(), size);
    let layers = [
        Tar::default().file("models/w.bin", &content).end(),
        Tar::default().file("models/config.json", b"{}").end(),
    ];
    (Image::of(&layers), content)
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Whatever happened: each tree is whole, each object is what its name says, and no file is
/// linked from elsewhere.
fn assert_sound(node: &Node) {
    use std::os::unix::fs::MetadataExt as _;
    for tree in names(&node.root().join("trees")) {
        let path = node.root().join("trees").join(&tree);
        assert_eq!(
            names(&path),
            ["config.json", "manifest.json", "rootfs", "tree.json", "used"],
            "{tree}"
        );
    }
    for entry in walkdir::WalkDir::new(node.root().join("objects")) {
        let entry = entry.unwrap();
        if entry.file_type().is_file() {
            let name = entry.file_name().to_str().unwrap();
            let meta = entry.metadata().unwrap();
            assert_eq!(meta.mode() & 0o222, 0, "{name} can be written to");
            let content = fs::read(entry.path()).unwrap();
            let found = blake3::hash(&content).to_hex().to_string();
            assert_eq!(found, name.trim_end_matches(".x"), "an object is what its name says");
        }
    }
}

/// How many bytes of the pull under way have come, as the agent says.
fn arrived(node: &Node) -> u64 {
    let status = node.json(&["status"]);
    let models = status["models"].as_array().unwrap();
    models.iter().find_map(|model| model["pull"]["done_bytes"].as_u64()).unwrap_or(0)
}

#[tokio::test(flavor = "multi_thread")]
async fn after_sigterm_in_the_middle_of_a_pull_the_next_agent_goes_on_where_it_was() {
    let (image, content) = large_image(96 * MIB);
    let (small, _) = large_image(MIB);
    let gate = Gate::closed_at(80 * MIB);
    let server = image.serve(&gate).await;
    let other = small.serve(&Gate::closed_at(u64::MAX)).await;
    let hosts = [server.host(), other.host()];
    let Some(mut node) = Node::start(binary(), &[&hosts[0], &hosts[1]]) else { return };
    let name = format!("{}/team/large:v1", server.host());
    let (mounted, waiting) = (node.pod("mounted"), node.pod("waiting"));
    node.publish(&mounted, &format!("{}/team/small:v1", other.host())).await.unwrap();
    let before = node.mounts_below(&node.kubelet());

    let config = fs::read(node.inside(&mounted.target).join("models/config.json")).unwrap();
    let publishing = node.publish(&waiting, &name);
    let stopping = async {
        eventually("80 MiB have come", async || arrived(&node) >= 80 * MIB).await;
        node.signal(Signal::TERM);
    };
    let (published, ()) = tokio::join!(publishing, stopping);
    let status = published.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{}", status.message());
    assert!(status.message().contains("the agent is stopping"), "{}", status.message());
    assert!(node.wait_for_agent().success());

    assert!(!node.socket().exists() && !node.csi_socket().exists());
    assert!(!node.registration_socket().exists());
    assert_eq!(names(&node.kubelet().join("plugins_registry")), [""; 0]);
    assert_eq!(node.mounts_below(&node.kubelet()), before, "mounts stay as they are");
    let still = fs::read(node.inside(&mounted.target).join("models/config.json")).unwrap();
    assert_eq!(still, config);
    assert_eq!(names(&node.root().join("trees")).len(), 1);
    assert!(!node.inside(&waiting.target).exists());
    assert_sound(&node);

    let fetched = gate.served();
    gate.open();
    node.start_agent();
    node.publish(&waiting, &name).await.unwrap();
    // 16 MiB had not come yet. What had come out of order is lost, and no more than that.
    let again = gate.served() - fetched;
    assert!(again <= 48 * MIB, "fetched after the restart: {again} bytes");
    assert!(fs::read(node.inside(&waiting.target).join("models/w.bin")).unwrap() == content);
    assert_eq!(names(&node.root().join("ingest")), [""; 0]);
    assert_sound(&node);
    for pod in [&mounted, &waiting] {
        node.unpublish(pod).await.unwrap();
        assert!(!node.inside(&pod.target).exists());
    }
}

/// Kills the agent at one moment after another of the same pull, the moments told by bytes.
#[tokio::test(flavor = "multi_thread")]
async fn killed_at_any_moment_of_a_pull_the_next_start_is_sound() {
    let (image, content) = large_image(72 * MIB);
    let gate = Gate::closed_at(0);
    let server = image.serve(&gate).await;
    let Some(mut node) = Node::start(binary(), &[&server.host()]) else { return };
    let name = format!("{}/team/large:v1", server.host());
    let pod = node.pod("pod-a");
    let total = image.layer_bytes();
    let moments = [
        0,
        1,
        512,
        MIB,
        16 * MIB,
        31 * MIB,
        33 * MIB,
        40 * MIB,
        64 * MIB + 512,
        70 * MIB,
        72 * MIB,
        u64::MAX,
    ];
    for (round, &moment) in moments.iter().enumerate() {
        let served = gate.served();
        gate.move_to(moment);
        let publishing = node.publish(&pod, &name);
        let killing = async {
            if moment == u64::MAX {
                // Everything has come; it is being made a tree of, or has been, or is mounted.
                gate.reached(served + 1).await;
            } else if moment > 0 {
                // As much as there was not before, or nothing new: the checkpoint was further.
                let new = (moment + 512 <= total).then_some(served + 1);
                let moved = async { gate.reached(new.unwrap_or(served)).await };
                let arrived = async {
                    eventually("the bytes have come", async || {
                        arrived(&node) >= moment.min(72 * MIB)
                    })
                    .await;
                };
                tokio::select! { () = moved, if round % 2 == 0 => {}, () = arrived => {} }
            } else {
                eventually("the pull has begun", async || {
                    server.requests().iter().any(|request| request.target.contains("/blobs/"))
                })
                .await;
            }
            node.signal(Signal::KILL);
        };
        let (published, ()) = tokio::join!(publishing, killing);
        assert!(!node.wait_for_agent().success());
        assert_sound(&node);
        let trees = names(&node.root().join("trees"));
        if published.is_ok() {
            assert_eq!(trees.len(), 1);
        }
        node.start_agent();
        assert_sound(&node);
        let listed = node.json(&["ls"]);
        assert_eq!(listed.as_array().unwrap().len(), names(&node.root().join("trees")).len());
    }
    gate.open();
    node.publish(&pod, &name).await.unwrap();
    assert!(fs::read(node.inside(&pod.target).join("models/w.bin")).unwrap() == content);
    assert_eq!(names(&node.root().join("ingest")), [""; 0]);
    assert_sound(&node);
    // Twelve kills cost less than twelve pulls: each start went on from a checkpoint.
    assert!(gate.served() < 6 * total, "{} bytes of {total}", gate.served());
    node.unpublish(&pod).await.unwrap();
    node.json(&["rm", &name]);
    node.json(&["gc"]);
    // How fast the registry was is known on.
    let mut left = node.store_listing();
    left.retain(|line| !line.ends_with('/') && !line.starts_with("rates/"));
    assert_eq!(left, ["admission 0 1", "format 16 1", "lock 0 1"], "nothing is left of it");
}

#[tokio::test(flavor = "multi_thread")]
async fn gc_frees_what_a_killed_pull_left() {
    let (image, _) = large_image(80 * MIB);
    let gate = Gate::closed_at(72 * MIB);
    let server = image.serve(&gate).await;
    let Some(mut node) = Node::start(binary(), &[&server.host()]) else { return };
    let name = format!("{}/team/large:v1", server.host());
    let pod = node.pod("pod-a");
    let killing = async {
        eventually("a checkpoint", async || {
            walkdir::WalkDir::new(node.root().join("ingest"))
                .into_iter()
                .flatten()
                .any(|entry| entry.file_name() == "checkpoint.json")
        })
        .await;
        node.signal(Signal::KILL);
    };
    let (published, ()) = tokio::join!(node.publish(&pod, &name), killing);
    published.unwrap_err();
    node.wait_for_agent();
    node.start_agent();
    // The small layer came whole, and no image uses it; of the large one there is a part.
    let freed = node.json(&["gc"]);
    assert_eq!(freed["objects"], 1);
    assert!(freed["bytes"].as_u64().unwrap() > 30 * MIB, "{freed}");
    assert_eq!(names(&node.root().join("ingest")), [""; 0]);
    gate.open();
    node.publish(&pod, &name).await.unwrap();
    assert_eq!(names(&node.root().join("ingest")), [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_agent_knows_the_mounts_of_the_old_one() {
    let (image, _) = large_image(MIB);
    let server = image.serve(&Gate::closed_at(u64::MAX)).await;
    let Some(mut node) = Node::start(binary(), &[&server.host()]) else { return };
    let name = format!("{}/team/m:v1", server.host());
    let pods: Vec<Pod> = (0..4).map(|n| node.pod(&format!("pod-{n}"))).collect();
    for pod in &pods {
        node.publish(pod, &name).await.unwrap();
    }
    drop(server);
    node.kill_agent();
    assert!(node.csi_socket().exists(), "a killed agent removes nothing");
    // Pods that went while nobody was there to unpublish: forced, and with their folder.
    let unmounted = node.within("umount").arg(&pods[2].target).status().unwrap();
    assert!(unmounted.success());
    let unmounted = node.within("umount").arg(&pods[3].target).status().unwrap();
    assert!(unmounted.success());
    fs::remove_dir_all(node.kubelet().join("pods/pod-3")).unwrap();

    node.start_agent();
    assert!(
        node.log().contains("mounted: 2, waiting: 1, dead: 0, dropped: 1, unknown: 0"),
        "{}",
        node.log()
    );
    node.metric_becomes("carport_volumes", 3.0).await;
    let status = node.json(&["status"]);
    assert_eq!(status["models"][0]["mount_count"], 3);
    // As the kubelet does after its own restart.
    node.publish(&pods[0], &name).await.unwrap();
    node.publish(&pods[2], &name).await.unwrap();
    assert_eq!(node.mounts_below(&node.kubelet()).len(), 3);
    for pod in &pods {
        node.unpublish(pod).await.unwrap();
        assert!(!node.inside(&pod.target).exists());
    }
    assert_eq!(node.mounts_below(&node.kubelet()), [""; 0]);
    assert_eq!(names(&node.root().join("volumes")), [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_reboot_volumes_are_published_again_or_taken_away() {
    let (image, content) = large_image(MIB);
    let server = image.serve(&Gate::closed_at(u64::MAX)).await;
    let Some(mut node) = Node::start(binary(), &[&server.host()]) else { return };
    let name = format!("{}/team/m:v1", server.host());
    let (back, gone) = (node.pod("back"), node.pod("gone"));
    for pod in [&back, &gone] {
        node.publish(pod, &name).await.unwrap();
    }
    let requests = server.requests().len();
    node.reboot();
    assert_eq!(node.mounts_below(&node.kubelet()), [""; 0]);
    assert_eq!(names(&node.inside(&back.target)), [""; 0], "an empty folder under no mount");
    let refused = node.carport().args(["rm", &name]).output().unwrap();
    assert!(!refused.status.success(), "its pods are still known");
    node.publish(&back, &name).await.unwrap();
    assert!(fs::read(node.inside(&back.target).join("models/w.bin")).unwrap() == content);
    assert_eq!(server.requests().len(), requests, "nothing is asked for again");
    for pod in [&back, &gone] {
        node.unpublish(pod).await.unwrap();
        assert!(!node.inside(&pod.target).exists());
    }
    assert_eq!(names(&node.root().join("volumes")), [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_agent_is_refused_and_leaves_the_first_alone() {
    let (image, _) = large_image(MIB);
    let server = image.serve(&Gate::closed_at(u64::MAX)).await;
    let Some(node) = Node::start(binary(), &[&server.host()]) else { return };
    let name = format!("{}/team/m:v1", server.host());
    let pod = node.pod("pod-a");
    node.publish(&pod, &name).await.unwrap();
    let before = node.store_listing();

    // The same in all: a rollout that starts the new one too early.
    let same = node.agent_command().output().unwrap();
    // Another socket for the API: the kubelet's sockets are taken.
    let other_socket = node.root().with_file_name("other.sock");
    let same_driver = node.agent_command().env("CARPORT_SOCKET", &other_socket).output().unwrap();
    for (output, part) in [
        (same, node.socket().display().to_string()),
        (same_driver, node.csi_socket().display().to_string()),
    ] {
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{text}");
        let errors: Vec<&str> = text.lines().filter(|line| line.starts_with("carport: ")).collect();
        assert_eq!(errors.len(), 1, "{text}");
        assert!(errors[0].contains(&part), "{text}");
        assert!(errors[0].contains("another"), "{text}");
    }
    assert!(!other_socket.exists());

    assert_eq!(node.store_listing(), before);
    node.metric_becomes("carport_volumes", 1.0).await;
    assert_eq!(node.json(&["status"])["models"][0]["mount_count"], 1);
    assert!(node.registration_socket().exists());
    let second = node.pod("pod-b");
    node.publish(&second, &name).await.unwrap();
    node.unpublish(&second).await.unwrap();
    node.unpublish(&pod).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_by_hand_beside_the_agent_shares_its_bytes() {
    let (image, content) = large_image(48 * MIB);
    let gate = Gate::closed_at(20 * MIB);
    let server = image.serve(&gate).await;
    let Some(node) = Node::start(binary(), &[&server.host()]) else { return };
    let name = format!("{}/team/m:v1", server.host());
    let pod = node.pod("pod-a");
    let publishing = node.publish(&pod, &name);
    let by_hand = async {
        gate.reached(20 * MIB).await;
        let command = node
            .carport()
            .args(["pull", "-o", "json", &name])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        eventually("both have asked", async || {
            let requests = server.requests();
            requests.iter().filter(|r| r.target.contains("/manifests/")).count() == 2
        })
        .await;
        gate.open();
        tokio::task::spawn_blocking(move || command.wait_with_output().unwrap()).await.unwrap()
    };
    let (published, output) = tokio::join!(publishing, by_hand);
    published.unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let pulled: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(pulled[0]["digest"], image.digest().to_string());
    assert_eq!(gate.served(), image.layer_bytes(), "each byte travels once for both");
    assert!(fs::read(node.inside(&pod.target).join("models/w.bin")).unwrap() == content);
    assert_eq!(names(&node.root().join("ingest")), [""; 0]);
    assert_eq!(names(&node.root().join("leases")), [""; 0]);
    assert_sound(&node);
    node.unpublish(&pod).await.unwrap();
}

/// A store that somebody tampered with, or a disk that lost something.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_damaged_in_the_store_is_said_or_made_good() {
    let (image, content) = large_image(MIB);
    let server = image.serve(&Gate::closed_at(u64::MAX)).await;
    let setup = Setup::plain_http(&[&server.host()]);
    let Some(mut node) = Node::set_up(binary(), setup) else { return };
    let name = format!("{}/team/m:v1", server.host());
    let pod = node.pod("pod-a");
    node.publish(&pod, &name).await.unwrap();
    node.kill_agent();
    // Empty files are what a power cut leaves of what was not synced.
    let volumes = names(&node.root().join("volumes"));
    fs::write(node.root().join("volumes").join(&volumes[0]), "").unwrap();
    let refs = names(&node.root().join("refs"));
    fs::write(node.root().join("refs").join(&refs[0]), "{").unwrap();
    for layer in names(&node.root().join("layers")) {
        fs::write(node.root().join("layers").join(layer), "").unwrap();
    }
    node.start_agent();
    let again = node.pod("pod-b");
    node.publish(&again, &name).await.unwrap();
    assert!(fs::read(node.inside(&again.target).join("models/w.bin")).unwrap() == content);
    for pod in [&pod, &again] {
        node.unpublish(pod).await.unwrap();
        assert!(!node.inside(&pod.target).exists());
    }

    // A format of the future.
    node.kill_agent();
    fs::write(node.root().join("format"), "carport store 9\n").unwrap();
    let before = node.store_listing();
    let output = node.agent_command().output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("carport store 9") && text.contains("--root"), "{text}");
    assert_eq!(node.store_listing(), before);
    fs::write(node.root().join("format"), "carport store 1\n").unwrap();
    node.start_agent();
}
