//! Everything at once: callers that go away, pods that come and go, images that are removed
//! under them, and clients that do not speak the language.

#![allow(clippy::unwrap_used)] // a test that cannot go on says where

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use carport_image::Store;
use carport_image::store::StoreError;
use carport_proto::client::connect;
use carport_proto::csi::v1 as csi;
use carport_tests::carport::binary;
use carport_tests::images::{Image, Tar, noise};
use carport_tests::node::{Node, Pod, eventually, publish_request};
use carport_tests::scripted::Gate;
use tonic::Code;

const MIB: u64 = 1 << 20;

fn image_of(files: usize, bytes: usize, seed: u64) -> Image {
    let tar = (0..files).fold(Tar::default(), |tar, n| {
        tar.file(&format!("models/{n}"), &noise(bytes, seed * 1000 + n as u64))
    });
    Image::of(&[tar.end()])
}

/// A publish that is given up after `patience`, as the kubelet gives up after two minutes.
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

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_pull_outlives_its_callers_and_no_byte_is_asked_for_twice() {
    let image = image_of(4, 8 << 20, 1);
    let gate = Gate::closed_at(5 * MIB);
    let server = image.serve(&gate).await;
    let Some(node) = Node::start(binary(), &[&server.host()]) else { return };
    let name = format!("{}/team/slow:v1", server.host());
    let pod = node.pod("pod-a");
    for _ in 0..2 {
        let status = publish_within(&node, &pod, &name, Duration::from_secs(2)).await.unwrap_err();
        assert_eq!(status.code(), Code::DeadlineExceeded, "{}", status.message());
        assert!(status.message().contains("the pull goes on"), "{}", status.message());
        assert!(status.message().contains(&name), "{}", status.message());
        assert!(!node.inside(&pod.target).exists());
    }
    gate.move_to(20 * MIB);
    // A caller who hangs up in the middle.
    {
        let mut driver = node.csi().await;
        let publishing = driver.node_publish_volume(publish_request(&pod, &[("image", &name)]));
        tokio::select! {
            answer = publishing => panic!("{answer:?}"),
            () = gate.reached(20 * MIB) => {}
        }
    }
    gate.open();
    publish_within(&node, &pod, &name, Duration::from_secs(60)).await.unwrap();
    assert_eq!(gate.served(), image.layer_bytes());
    assert_eq!(fs::read_dir(node.inside(&pod.target).join("models")).unwrap().count(), 4);
    node.unpublish(&pod).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_is_deleted_while_its_image_comes_is_let_go_at_once() {
    let image = image_of(1, 8 << 20, 2);
    let gate = Gate::closed_at(4 * MIB);
    let server = image.serve(&gate).await;
    let Some(node) = Node::start(binary(), &[&server.host()]) else { return };
    let name = format!("{}/team/slow:v1", server.host());
    let pod = node.pod("pod-a");
    let publishing = publish_within(&node, &pod, &name, Duration::from_secs(60));
    let deleting = async {
        gate.reached(4 * MIB).await;
        let began = Instant::now();
        node.unpublish(&pod).await.unwrap();
        assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    };
    let (published, ()) = tokio::join!(publishing, deleting);
    assert_eq!(published.unwrap_err().code(), Code::Aborted);
    assert!(!node.inside(&pod.target).exists());
    assert_eq!(fs::read_dir(node.root().join("volumes")).unwrap().count(), 0);
    // Nobody waits for it any more.
    node.metric_becomes("carport_pulls_in_flight", 0.0).await;
    gate.open();
    node.publish(&pod, &name).await.unwrap();
    node.unpublish(&pod).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_that_come_and_go_at_the_same_targets_leave_nothing() {
    let image = image_of(3, 10_000, 3);
    let server = image.serve(&Gate::closed_at(u64::MAX)).await;
    let Some(node) = Node::start(binary(), &[&server.host()]) else { return };
    let name = format!("{}/team/model:v1", server.host());
    let pods: Vec<Pod> = (0..4).map(|n| node.pod(&format!("pod-{n}"))).collect();
    node.publish(&pods[0], &name).await.unwrap();
    let calls = (0..160_usize).map(|n| {
        let (node, name, pod) = (&node, &name, &pods[n % 4]);
        async move {
            if n * 7 % 3 == 0 {
                // Never an error: the kubelet would hold the pod for ever.
                node.unpublish(pod).await.unwrap_or_else(|status| panic!("{status:?}"));
            } else if let Err(status) = node.publish(pod, name).await {
                assert_eq!(status.code(), Code::Aborted, "{}", status.message());
            }
        }
    });
    futures_util::future::join_all(calls).await;
    for pod in &pods {
        // Mounts are never stacked.
        assert!(node.mounts_below(&pod.target).len() <= 1);
        node.publish(pod, &name).await.unwrap();
        assert_eq!(node.mounts_below(&pod.target).len(), 1);
        node.unpublish(pod).await.unwrap();
        assert!(!node.inside(&pod.target).exists());
    }
    assert_eq!(node.mounts_below(&node.kubelet()), [""; 0]);
    assert_eq!(fs::read_dir(node.root().join("volumes")).unwrap().count(), 0);
}

/// A person who cleans up while pods start: what is shown is whole, or there is an error.
#[tokio::test(flavor = "multi_thread")]
async fn images_that_are_removed_while_pods_start_are_never_shown_by_halves() {
    const FILES: usize = 30;
    let image = image_of(FILES, 300, 4);
    let server = image.serve(&Gate::closed_at(u64::MAX)).await;
    let Some(node) = Node::start(binary(), &[&server.host()]) else { return };
    let name = format!("{}/team/model:v1", server.host());
    let over = Arc::new(AtomicBool::new(false));
    // What `carport rm` and `carport gc` do, as fast as it goes.
    let (root, digest, stop) = (node.root(), image.digest(), Arc::clone(&over));
    let cleaning = tokio::task::spawn_blocking(move || {
        let store = Store::open(root).unwrap();
        let mut removed = 0;
        while !stop.load(Ordering::Relaxed) {
            match store.remove(&digest) {
                Ok(gone) => removed += usize::from(gone),
                Err(StoreError::InUse(_)) => {}
                Err(error) => panic!("{error}"),
            }
            store.collect().unwrap();
        }
        removed
    });
    let starting = async {
        let mut shown = 0;
        for round in 0..20 {
            let pod = node.pod(&format!("pod-{round}"));
            match node.publish(&pod, &name).await {
                Ok(()) => {
                    for n in 0..FILES {
                        let path = node.inside(&pod.target).join(format!("models/{n}"));
                        let content =
                            fs::read(&path).unwrap_or_else(|e| panic!("{round}, {n}: {e}"));
                        assert!(content == noise(300, 4000 + n as u64), "{round}, {n}");
                    }
                    shown += 1;
                }
                Err(status) => {
                    println!("{:?}: {}", status.code(), status.message());
                    let is_fine = matches!(
                        status.code(),
                        Code::Unavailable
                            | Code::Aborted
                            | Code::FailedPrecondition
                            | Code::Internal
                    );
                    assert!(is_fine, "{status:?}");
                }
            }
            node.unpublish(&pod).await.unwrap();
            assert!(!node.inside(&pod.target).exists());
        }
        over.store(true, Ordering::Relaxed);
        shown
    };
    let (removed, shown) = tokio::join!(cleaning, starting);
    let removed = removed.unwrap();
    println!("removed {removed} times, shown {shown} of 20 times");
    // Where the two met at all, each way it went was a sound one; and now it is quiet.
    assert!(removed > 0);
    let pod = node.pod("after");
    node.publish(&pod, &name).await.unwrap();
    node.unpublish(&pod).await.unwrap();
    assert_eq!(fs::read_dir(node.root().join("ingest")).unwrap().count(), 0);
    assert_eq!(fs::read_dir(node.root().join("volumes")).unwrap().count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_that_talk_nonsense_or_nothing_harm_nobody() {
    let image = image_of(1, 100, 5);
    let server = image.serve(&Gate::closed_at(u64::MAX)).await;
    let Some(mut node) = Node::start(binary(), &[&server.host()]) else { return };
    let name = format!("{}/team/model:v1", server.host());
    let registration = node.registration_socket();
    eventually("the registration socket", async || registration.exists()).await;
    let mut idle = Vec::new();
    for socket in [node.socket(), node.csi_socket(), registration] {
        for nonsense in
            [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0xff; 4096], b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"]
        {
            let mut stream = UnixStream::connect(&socket).unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            let _ = stream.write_all(nonsense);
            let _ = stream.read(&mut [0; 1024]);
        }
        idle.extend((0..64).map(|_| UnixStream::connect(&socket).unwrap()));
    }
    let scraper = std::net::TcpStream::connect(node.http()).unwrap();
    (&scraper).write_all(b"GET /metr").unwrap();

    let mut driver = csi::node_client::NodeClient::new(connect(&node.csi_socket()).await.unwrap());
    let pod = node.pod("pod-a");
    // Huge, and with everything that may be in a path or a name.
    let mut huge = publish_request(&pod, &[("image", &name)]);
    huge.volume_context.insert("x".into(), "y".repeat(5 << 20));
    let status = driver.node_publish_volume(huge).await.unwrap_err();
    assert_eq!(status.code(), Code::OutOfRange, "{}", status.message().len());
    for (volume_id, target) in [
        ("x".repeat(5000), pod.target.display().to_string()),
        ("x".into(), "/".into()),
        ("x".into(), "relative/mount".into()),
        ("x".into(), format!("{}/../../mount", pod.target.display())),
        ("x".into(), "/a\0b".into()),
    ] {
        let publish = csi::NodePublishVolumeRequest {
            volume_id: volume_id.clone(),
            target_path: target.clone(),
            ..publish_request(&pod, &[("image", &name)])
        };
        let status = driver.node_publish_volume(publish).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{target:?}: {}", status.message());
        let unpublish = csi::NodeUnpublishVolumeRequest { volume_id, target_path: target.clone() };
        let status = driver.node_unpublish_volume(unpublish).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{target:?}: {}", status.message());
    }
    // Ids are any text: slashes, dots, line breaks.
    for volume_id in ["../../escape", "a/b", ".", "new\nline", "ü😀"] {
        let odd = Pod { volume_id: volume_id.into(), ..pod.clone() };
        node.publish(&odd, &name)
            .await
            .unwrap_or_else(|status| panic!("{volume_id:?}: {status:?}"));
        node.unpublish(&odd).await.unwrap();
        assert!(!node.inside(&pod.target).exists());
    }
    assert!(node.log().lines().all(|line| line.starts_with('{')), "one event a line");
    assert_eq!(fs::read_dir(node.root().join("volumes")).unwrap().count(), 0);
    assert_eq!(node.page("/healthz").await.0, 200);
    assert!(!node.log().contains("panicked"));
    // Nor do they hold up the end.
    let began = Instant::now();
    assert!(node.stop_agent().success());
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
    println!("the end took {:?}", began.elapsed());
    drop((idle, scraper));
}
