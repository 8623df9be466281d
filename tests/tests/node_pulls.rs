//! Pulls that nobody needs any more, and slow ones that somebody waits for: as pods, `carport cancel` and the
//! pod's events see them.

#![allow(clippy::unwrap_used)] // a test that cannot go on says where

use std::time::{Duration, Instant};

use carport_tests::carport::binary;
use carport_tests::images::{Image, Tar, noise};
use carport_tests::node::{Node, Pod, publish_request};
use carport_tests::scripted::Gate;
use serde_json::{Value, json};
use tonic::Code;

const MIB: u64 = 1 << 20;

fn image_of(mebibytes: usize) -> Image {
    let tar = Tar::default().file("models/weights", &noise(mebibytes << 20, 7));
    Image::of(&[tar.end()])
}

/// A publish that is given up after `patience`, once.
async fn publish_within(
    node: &Node,
    pod: &Pod,
    image: &str,
    patience: Duration,
) -> Result<(), tonic::Status> {
    let mut request = tonic::Request::new(publish_request(pod, &[("image", image)]));
    request.set_timeout(patience);
    node.csi().await.node_publish_volume(request).await.map(drop)
}

/// What `carport cancel` prints, with its exit status and what it writes to standard error.
fn cancel(node: &Node, arguments: &[&str]) -> (Value, Option<i32>, String) {
    let output = node.carport().args(["-o", "json", "cancel"]).args(arguments).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    (serde_json::from_slice(&output.stdout).unwrap(), output.status.code(), said)
}

fn answer(image: &str, stopped: bool) -> Value {
    json!([{ "reference": image, "cancelled": stopped, "stopped": stopped }])
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_that_a_pod_left_is_cancelled_by_name_and_resumes_later() {
    let image = image_of(64);
    let gate = Gate::closed_at(40 * MIB);
    let server = image.serve(&gate).await;
    let Some(node) = Node::start(binary(), &[&server.host()]) else { return };
    let name = format!("{}/team/slow:v1", server.host());
    let pod = node.pod("pod-a");
    let late = publish_within(&node, &pod, &name, Duration::from_secs(5)).await.unwrap_err();
    assert_eq!(late.code(), Code::DeadlineExceeded, "{}", late.message());
    gate.reached(40 * MIB).await;
    node.metric_becomes("carport_pulls_in_flight", 1.0).await;

    assert_eq!(cancel(&node, &[&name]), (answer(&name, true), Some(0), String::new()));
    node.metric_becomes("carport_pulls_in_flight", 0.0).await;
    assert_eq!(node.metric("carport_pulls_total{result=\"cancelled\"}").await, 1.0);
    assert_eq!(cancel(&node, &[&name]), (answer(&name, false), Some(0), String::new()));

    gate.open();
    node.publish(&pod, &name).await.unwrap();
    let again = gate.served() - image.layer_bytes();
    assert!(again < 40 * MIB, "{again} bytes were downloaded again");
    node.unpublish(&pod).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_that_a_pod_waits_for_is_cancelled_by_force_only() {
    let image = image_of(8);
    let gate = Gate::closed_at(4 * MIB);
    let server = image.serve(&gate).await;
    let Some(node) = Node::start(binary(), &[&server.host()]) else { return };
    let name = format!("{}/team/slow:v1", server.host());
    let pod = node.pod("pod-a");
    let publishing = publish_within(&node, &pod, &name, Duration::from_secs(60));
    let cancelling = async {
        gate.reached(4 * MIB).await;
        let (answer, status, said) = tokio::task::block_in_place(|| cancel(&node, &[&name]));
        assert_eq!((answer, status), (json!([]), Some(1)), "{said}");
        let why = format!("the pull of {name} goes on: a pod waits for it: delete the pod");
        assert!(said.contains(&why) && said.contains("force"), "{said}");
        let forced = tokio::task::block_in_place(|| cancel(&node, &["--force", &name]));
        assert_eq!(forced, (self::answer(&name, true), Some(0), String::new()));
    };
    let (published, ()) = tokio::join!(publishing, cancelling);
    // Uncertain: the kubelet asks again, and unpublishes when the pod goes.
    assert_eq!(published.unwrap_err().code(), Code::Unavailable);
    gate.open();
    node.publish(&pod, &name).await.unwrap();
    node.unpublish(&pod).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_stops_when_its_pod_is_deleted_between_two_calls_of_the_kubelet() {
    let image = image_of(8);
    let gate = Gate::closed_at(4 * MIB);
    let server = image.serve(&gate).await;
    let Some(node) = Node::start(binary(), &[&server.host()]) else { return };
    let name = format!("{}/team/slow:v1", server.host());
    let pod = node.pod("pod-a");
    let late = publish_within(&node, &pod, &name, Duration::from_secs(5)).await.unwrap_err();
    assert_eq!(late.code(), Code::DeadlineExceeded, "{}", late.message());
    node.metric_becomes("carport_pulls_in_flight", 1.0).await;
    node.unpublish(&pod).await.unwrap();
    node.metric_becomes("carport_pulls_in_flight", 0.0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_pull_says_early_how_far_it_is_and_ends_with_its_last_byte() {
    let image = image_of(8);
    let gate = Gate::closed_at(4 * MIB);
    let server = image.serve(&gate).await;
    let Some(node) = Node::start(binary(), &[&server.host()]) else { return };
    let name = format!("{}/team/slow:v1", server.host());
    let pod = node.pod("pod-a");
    let began = Instant::now();
    let early = publish_within(&node, &pod, &name, Duration::from_secs(120)).await.unwrap_err();
    let waited = began.elapsed();
    assert_eq!(early.code(), Code::DeadlineExceeded);
    assert!((8..20).contains(&waited.as_secs()), "{waited:?}");
    let message = early.message();
    assert!(message.contains(&format!("image {name}: ")), "{message}");
    assert!(message.contains(" of 8.0 MiB ("), "{message}");

    // As the kubelet: it asks again, and is answered when the image is complete.
    let (published, ()) =
        tokio::join!(publish_within(&node, &pod, &name, Duration::from_secs(120)), async {
            tokio::time::sleep(waited + Duration::from_secs(1)).await;
            gate.open();
        });
    published.unwrap();
    node.unpublish(&pod).await.unwrap();
}
