//! Damage on the disk of a whole node: found, repaired under pods that read, or put out of use.

#![allow(clippy::unwrap_used)] // a test that cannot go on says where

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use carport_tests::carport::binary;
use carport_tests::images::{Image, Tar, noise};
use carport_tests::node::{Node, Setup};
use carport_tests::scripted::{Answer, Scripted};
use tonic::Code;

const SIZE: usize = 8 << 20;

/// A registry with one image, that can go away.
async fn registry(image: Image, away: Arc<AtomicBool>) -> Scripted {
    Scripted::start(move |request| match away.load(Ordering::SeqCst) {
        true => Answer::status(503),
        false => image.answer(request),
    })
    .await
}

/// The object of `content`, as this machine's root reaches it.
fn object(node: &Node, content: &[u8]) -> PathBuf {
    let name = carport_image::ObjectId::new(blake3::hash(content), false);
    node.inside(&node.root()).join("objects").join(name.path())
}

/// What a bad disk does: it asks nobody.
fn flip(path: &Path, at: u64) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
    file.sync_all().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mounted_image_is_repaired_under_its_reader_or_put_out_of_use() {
    let weights = noise(SIZE, 1);
    let image = Image::of(&[
        Tar::default()
            .file("models/config.json", b"{}")
            .file("models/other", &noise(SIZE, 2))
            .end(),
        Tar::default().file("models/w.bin", &weights).end(),
    ]);
    let away = Arc::new(AtomicBool::new(false));
    let server = registry(image, Arc::clone(&away)).await;
    let config = Some("pull: {attempts: 2}\n".into());
    let setup = Setup { config, ..Setup::plain_http(&[&server.host()]) };
    let Some(node) = Node::set_up(binary(), setup) else { return };
    let name = format!("{}/team/model:v1", server.host());
    let pod = node.pod("running");
    node.publish(&pod, &name).await.unwrap();
    let sound = node.json(&["verify"]);
    assert_eq!((&sound["sound"], &sound["objects"]), (&true.into(), &3.into()));

    let target = node.inside(&pod.target).join("models");
    let open = File::open(target.join("w.bin")).unwrap();
    let object = object(&node, &weights);
    flip(&object, 5_000_000);
    assert!(
        fs::read(target.join("w.bin")).unwrap() != weights,
        "the pod reads what the disk gives"
    );

    // Told, and nothing is changed.
    let output = node.carport().args(["verify", "--no-repair"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.starts_with("damaged: objects/"), "{text}");
    assert!(fs::read(&object).unwrap() != weights);

    let repaired = node.json(&["verify", "--rate", "500MB/s", &name]);
    assert_eq!(repaired["sound"], true, "{repaired}");
    assert_eq!(repaired["damage"][0]["outcome"], "repaired");
    assert_eq!(repaired["fetched_bytes"], SIZE, "that file and no more");
    assert!(fs::read(target.join("w.bin")).unwrap() == weights, "a new open gets sound bytes");
    let inode = fs::metadata(target.join("w.bin")).unwrap().ino();
    assert_eq!(inode, fs::metadata(&object).unwrap().ino());
    let mut byte = [0];
    open.read_exact_at(&mut byte, 5_000_000).unwrap();
    assert_eq!(byte[0] ^ 1, weights[5_000_000], "who had it open has it as it was");

    // The registry is away: out of use, and loudly.
    away.store(true, Ordering::SeqCst);
    flip(&object, 77);
    let output = node.carport().args(["verify", "-o", "json"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["damage"][0]["outcome"], "lost", "{report}");
    assert!(!object.exists());
    assert!(target.join("w.bin").exists(), "a pod that runs is left alone");
    assert_eq!(node.json(&["ls"]).as_array().unwrap().len(), 0);
    let refused = node.publish(&node.pod("second"), &name).await.unwrap_err();
    assert!(matches!(refused.code(), Code::Unavailable | Code::DeadlineExceeded), "{refused}");

    // It is back: the next pod brings the rest, and the first one's volume is whole again.
    away.store(false, Ordering::SeqCst);
    node.publish(&node.pod("third"), &name).await.unwrap();
    for pod in ["running", "third"] {
        let file = node.inside(&node.pod(pod).target).join("models/w.bin");
        assert!(fs::read(file).unwrap() == weights, "{pod}");
    }
    assert_eq!(node.json(&["verify"])["damage"].as_array().unwrap().len(), 0);
}
