//! GPUs that pods hold, through the whole agent: a kubelet's PodResources socket beside it, and
//! a library that answers like NVIDIA's.

#![allow(clippy::unwrap_used)] // a test that cannot go on says where

use std::sync::{Arc, Mutex};

use carport_proto::podresources::v1;
use carport_proto::podresources::v1::pod_resources_lister_server::{
    PodResourcesLister, PodResourcesListerServer,
};
use carport_tests::carport::binary;
use carport_tests::images::{Image, Tar};
use carport_tests::node::{Node, Setup, eventually};
use carport_tests::scripted::Gate;
use fake_nvml::{FakeNvml, Scenario};
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;
use tonic::{Request, Response, Status};

/// Which GPU each pod was given, as a kubelet tells it.
#[derive(Clone, Default)]
struct Kubelet(Arc<Mutex<Vec<(String, String)>>>);

impl Kubelet {
    fn give(&self, pod: &str, uuid: &str) {
        self.0.lock().unwrap().push((pod.into(), uuid.into()));
    }

    fn take_all(&self) {
        self.0.lock().unwrap().clear();
    }
}

#[tonic::async_trait]
impl PodResourcesLister for Kubelet {
    async fn list(
        &self,
        _request: Request<v1::ListPodResourcesRequest>,
    ) -> Result<Response<v1::ListPodResourcesResponse>, Status> {
        let given = self.0.lock().unwrap();
        let pod = |(pod, uuid): &(String, String)| v1::PodResources {
            name: pod.clone(),
            namespace: "team".into(),
            containers: vec![v1::ContainerResources {
                name: "server".into(),
                devices: vec![v1::ContainerDevices {
                    resource_name: "nvidia.com/gpu".into(),
                    device_ids: vec![uuid.clone()],
                }],
                ..Default::default()
            }],
        };
        let pod_resources = given.iter().map(pod).collect();
        Ok(Response::new(v1::ListPodResourcesResponse { pod_resources }))
    }

    async fn get_allocatable_resources(
        &self,
        _request: Request<v1::AllocatableResourcesRequest>,
    ) -> Result<Response<v1::AllocatableResourcesResponse>, Status> {
        Ok(Response::new(v1::AllocatableResourcesResponse::default()))
    }
}

fn uuid(index: usize) -> String {
    format!("GPU-00000000-0000-4000-8000-{index:012x}")
}

fn printed(node: &Node, arguments: &[&str]) -> String {
    let output = node.carport().args(arguments).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gpu_that_a_pod_was_given_is_offered_to_no_other() {
    let fake = FakeNvml::new(&Scenario::h100s(4));
    let image = Image::of(&[Tar::default().file("models/w.bin", b"weights").end()]);
    let server = image.serve(&Gate::closed_at(u64::MAX)).await;
    let setup = Setup {
        gpu_library: Some(fake.library()),
        config: Some("gpu: {interval: 100ms}\n".into()),
        ..Setup::plain_http(&[&server.host()])
    };
    let Some(node) = Node::set_up(binary(), setup) else { return };
    let name = format!("{}/team/model:v1", server.host());
    node.json(&["pull", &name]);
    let free = || node.json(&["locate", &name, "--gpus", "1"])[0]["gpu"]["free_count"].clone();
    eventually("all are free", async || free() == 4).await;
    let before = node.json(&["gpus"]);
    assert_eq!(before["allocation"]["source"], "processes_only");
    let text = printed(&node, &["gpus"]);
    assert!(text.contains("Allocations by processes only: connect to "), "{text}");

    let kubelet = Kubelet::default();
    kubelet.give("llama-0", &uuid(2));
    let folder = node.kubelet().join("pod-resources");
    std::fs::create_dir_all(&folder).unwrap();
    let listener = UnixListener::bind(folder.join("kubelet.sock")).unwrap();
    let service = PodResourcesListerServer::new(kubelet.clone());
    let serving = Server::builder().add_service(service);
    let serving = tokio::spawn(serving.serve_with_incoming(UnixListenerStream::new(listener)));

    eventually("one is taken", async || free() == 3).await;
    let offered = node.json(&["locate", &name, "--gpus", "3"])[0].clone();
    assert_eq!(offered["score"], 100);
    let candidates = offered["gpu"]["candidate_uuids"].as_array().unwrap();
    assert!(!candidates.contains(&uuid(2).into()), "{offered}");
    assert_eq!(node.json(&["locate", &name, "--gpus", "4"])[0]["score"], 0);
    let inventory = node.json(&["gpus"]);
    assert_eq!(inventory["allocation"]["source"], "pod_resources");
    assert_eq!(inventory["allocation"]["message"], "");
    let held = &inventory["gpus"][2]["allocations"][0];
    assert_eq!((&held["pod_namespace"], &held["pod_name"]), (&"team".into(), &"llama-0".into()));
    let row = printed(&node, &["gpus", "-o", "wide"]);
    assert!(row.lines().any(|line| line.contains("team/llama-0")), "{row}");
    node.metric_becomes("carport_gpu_pods_known", 1.0).await;
    node.metric_becomes(&format!("carport_gpu_free{{gpu=\"2\",UUID=\"{}\"}}", uuid(2)), 0.0).await;

    let topo = printed(&node, &["gpus", "--topo"]);
    assert!(topo.starts_with("      GPU0  GPU1  GPU2  GPU3  NUMA"), "{topo}");
    assert!(topo.contains("\nGPU1  NV18  X     NV18  NV18  "), "{topo}");

    kubelet.take_all();
    eventually("all are free again", async || free() == 4).await;
    serving.abort();
}
