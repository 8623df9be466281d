//! Volumes that come and go, many times: nothing grows.

#![allow(clippy::unwrap_used)] // a test that cannot go on says where

use std::fs;

use carport_image::source::PullSecret;
use carport_proto::csi::v1 as csi;
use carport_tests::carport::binary;
use carport_tests::models::{Model, sources};
use carport_tests::node::{Node, Pod, Setup, publish_request};
use csi::node_client::NodeClient;
use tonic::transport::Channel;

const TARGETS: usize = 50;

/// `make soak` asks for more.
const CYCLES: &str = "CARPORT_SOAK_CYCLES";
const CYCLES_IN_EVERY_RUN: usize = 5_000;
const WARM_UP: usize = 2_000;

/// What allocators, caches and thread pools may take more after the warm-up: two kilobytes a
/// cycle in every run, 170 bytes where 50,000 are asked for.
const MAX_GROWTH: u64 = 8 << 20;

fn descriptors(node: &Node) -> usize {
    fs::read_dir(format!("/proc/{}/fd", node.pid())).unwrap().count()
}

fn resident_bytes(node: &Node) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", node.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

fn records(node: &Node) -> usize {
    fs::read_dir(node.root().join("volumes")).unwrap().count()
}

/// Each target is published and unpublished, all at once and in no order.
async fn cycles(client: &NodeClient<Channel>, pods: &[Pod], image: &str, count: usize) {
    let mut tasks = tokio::task::JoinSet::new();
    for (n, pod) in pods.iter().enumerate() {
        let (mut client, pod, image) = (client.clone(), pod.clone(), image.to_owned());
        let share = count / TARGETS + usize::from(n < count % TARGETS);
        tasks.spawn(async move {
            for _ in 0..share {
                let request = publish_request(&pod, &[("image", &image)]);
                client.node_publish_volume(request).await.unwrap();
                let request = csi::NodeUnpublishVolumeRequest {
                    volume_id: pod.volume_id.clone(),
                    target_path: pod.target.display().to_string(),
                };
                client.node_unpublish_volume(request).await.unwrap();
            }
        });
    }
    while let Some(ended) = tasks.join_next().await {
        ended.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn volumes_that_come_and_go_leave_no_mount_record_descriptor_or_memory() {
    let count = std::env::var(CYCLES).ok().and_then(|count| count.parse().ok());
    let count = count.unwrap_or(CYCLES_IN_EVERY_RUN);
    let folder = tempfile::tempdir().unwrap();
    let image = format!("oci:{}:v1", folder.path().join("layout").display());
    Model::new().pack(&image, &PullSecret::none(), &sources(&[])).await.unwrap();
    let setup = Setup {
        layout_folders: vec![folder.path().to_owned()],
        log_level: Some("warn,carport_agent=info".into()),
        ..Setup::default()
    };
    let Some(node) = Node::set_up(binary(), setup) else { return };
    let pods: Vec<Pod> = (0..TARGETS).map(|n| node.pod(&format!("pod-{n}"))).collect();
    let client = node.csi().await;

    cycles(&client, &pods, &image, WARM_UP).await;
    let (open, resident) = (descriptors(&node), resident_bytes(&node));
    let store = node.store_listing();
    cycles(&client, &pods, &image, count).await;

    assert_eq!(node.mounts_below(&node.kubelet()), Vec::<String>::new());
    assert_eq!(records(&node), 0);
    assert_eq!(node.store_listing(), store);
    assert!(pods.iter().all(|pod| !node.inside(&pod.target).exists()));
    assert!(descriptors(&node) <= open, "{} after {open}", descriptors(&node));
    let grown = resident_bytes(&node).saturating_sub(resident);
    println!("{count} cycles: {grown} bytes more resident after {resident}");
    assert!(grown <= MAX_GROWTH, "{grown} bytes more resident after {count} cycles");
}
