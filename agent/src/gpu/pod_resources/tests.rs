//! Against a real gRPC server on a real socket.

use std::sync::Mutex;

use carport_proto::podresources::v1::pod_resources_lister_server::{
    PodResourcesLister, PodResourcesListerServer,
};
use fake_nvml::{Device, FakeNvml, Mig, MigDevice, Scenario};
use tempfile::TempDir;
use tokio::net::UnixListener;
use tokio::task::AbortHandle;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;
use tonic::{Request, Response};

use super::super::allocation::AllocationSource;
use super::super::conformance::{PATIENCE as LONG, QUICK};
use super::super::inventory::GpuInventory;
use super::super::{GpuHandle, GpuOptions, GpuReader, start};
use super::*;

/// What the kubelet has to say, and how.
#[derive(Clone, Default)]
struct Script {
    listed: v1::ListPodResourcesResponse,
    allocatable: Option<v1::AllocatableResourcesResponse>,
    /// The feature gate of the question before it is off.
    gate_is_off: bool,
    hangs: bool,
}

#[derive(Clone)]
struct Kubelet(Arc<Mutex<Script>>);

impl Kubelet {
    async fn say(&self) -> Script {
        let script = self.0.lock().unwrap().clone();
        if script.hangs {
            std::future::pending::<()>().await;
        }
        script
    }
}

#[tonic::async_trait]
impl PodResourcesLister for Kubelet {
    async fn list(
        &self,
        _request: Request<v1::ListPodResourcesRequest>,
    ) -> Result<Response<v1::ListPodResourcesResponse>, Status> {
        Ok(Response::new(self.say().await.listed))
    }

    async fn get_allocatable_resources(
        &self,
        _request: Request<v1::AllocatableResourcesRequest>,
    ) -> Result<Response<v1::AllocatableResourcesResponse>, Status> {
        let Script { allocatable, gate_is_off, .. } = self.say().await;
        if gate_is_off {
            return Err(Status::unknown("PodResources API GetAllocatableResources disabled"));
        }
        allocatable.map(Response::new).ok_or_else(|| Status::unimplemented("an old kubelet"))
    }
}

/// A node's kubelet, which can stop and start again.
struct Node {
    folder: TempDir,
    script: Arc<Mutex<Script>>,
    fake: FakeNvml,
    server: Option<AbortHandle>,
}

impl Node {
    fn new(scenario: &Scenario) -> Self {
        let fake = FakeNvml::new(scenario);
        Self { folder: tempfile::tempdir().unwrap(), script: Arc::default(), fake, server: None }
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("kubelet.sock")
    }

    fn serve(&mut self) {
        let _ = std::fs::remove_file(self.socket());
        let listener = UnixListener::bind(self.socket()).unwrap();
        let service = PodResourcesListerServer::new(Kubelet(Arc::clone(&self.script)));
        let server = Server::builder().add_service(service);
        let serving = server.serve_with_incoming(UnixListenerStream::new(listener));
        self.server = Some(tokio::spawn(serving).abort_handle());
    }

    /// Away with the socket; connections that are open go with their runtime's tasks.
    fn stop(&mut self) {
        self.server.take().unwrap().abort();
        std::fs::remove_file(self.socket()).unwrap();
    }

    fn say(&self, change: impl FnOnce(&mut Script)) {
        change(&mut self.script.lock().unwrap());
    }

    fn look(&self) -> (GpuHandle, GpuReader) {
        let handle = start(GpuOptions {
            library: Some(self.fake.library()),
            interval: QUICK.interval,
            retry_interval: QUICK.retry_interval,
            pod_resources: self.socket(),
            ..GpuOptions::default()
        });
        let handle = handle.unwrap();
        let reader = handle.reader();
        (handle, reader)
    }
}

async fn eventually(
    reader: &mut GpuReader,
    wanted: impl Fn(&GpuInventory) -> bool,
) -> Arc<GpuInventory> {
    let found = async {
        loop {
            let now = reader.current();
            if wanted(&now) {
                return now;
            }
            reader.changed().await;
        }
    };
    tokio::time::timeout(LONG, found).await.expect("no such answer in time")
}

fn uuid(index: u32) -> String {
    format!("GPU-00000000-0000-4000-8000-{index:012x}")
}

fn devices(resource_name: &str, ids: &[String]) -> v1::ContainerDevices {
    v1::ContainerDevices { resource_name: resource_name.into(), device_ids: ids.to_vec() }
}

fn pod(name: &str, container: v1::ContainerResources) -> v1::PodResources {
    v1::PodResources {
        name: name.into(),
        namespace: "team".into(),
        containers: vec![v1::ContainerResources { name: "server".into(), ..container }],
    }
}

fn with_devices(name: &str, given: Vec<v1::ContainerDevices>) -> v1::PodResources {
    pod(name, v1::ContainerResources { devices: given, ..Default::default() })
}

fn with_claim(name: &str, resource: v1::ClaimResource) -> v1::PodResources {
    let claim = v1::DynamicResource {
        claim_name: "one-gpu".into(),
        claim_namespace: "team".into(),
        claim_resources: vec![resource],
    };
    pod(name, v1::ContainerResources { dynamic_resources: vec![claim], ..Default::default() })
}

/// Who holds each GPU.
fn holders(inventory: &GpuInventory) -> Vec<Vec<&str>> {
    let gpus = inventory.gpus.iter();
    gpus.map(|gpu| gpu.allocations.iter().map(|held| held.pod_name.as_str()).collect()).collect()
}

#[tokio::test]
async fn a_pod_that_has_not_started_work_holds_its_gpu() {
    let mut node = Node::new(&Scenario::h100s(4));
    node.say(|script| {
        script.listed.pod_resources = vec![
            with_devices("a", vec![devices("nvidia.com/gpu", &[uuid(1), uuid(2)])]),
            // Network cards of the same vendor are not for here.
            with_devices("b", vec![devices("nvidia.com/hostdev", &["0000:81:00.0".into()])]),
        ];
        let all = devices("nvidia.com/gpu", &[uuid(0), uuid(1), uuid(2)]);
        script.allocatable = Some(v1::AllocatableResourcesResponse { devices: vec![all] });
    });
    node.serve();
    let (handle, mut reader) = node.look();
    let inventory = eventually(&mut reader, |it| {
        it.allocation.source == AllocationSource::PodResources && it.gpus.len() == 4
    })
    .await;
    assert_eq!(holders(&inventory), [vec![], vec!["a"], vec!["a"], vec![]]);
    assert_eq!(inventory.allocation.message, "");
    let held = &inventory.gpus[1].allocations[0];
    assert_eq!((held.pod_namespace.as_str(), held.container.as_str()), ("team", "server"));
    assert_eq!(held.resource_name.as_deref(), Some("nvidia.com/gpu"));
    let allocatable: Vec<_> = inventory.gpus.iter().map(|gpu| gpu.allocatable).collect();
    assert_eq!(allocatable, [Some(true), Some(true), Some(true), Some(false)]);
    let free: Vec<_> = inventory.gpus.iter().map(crate::placement::gpus::is_free).collect();
    assert_eq!(free, [true, false, false, false], "free is unallocated, offered and well");

    node.say(|script| script.listed.pod_resources.clear());
    let inventory = eventually(&mut reader, |it| it.gpus[1].allocations.is_empty()).await;
    assert!(crate::placement::gpus::is_free(&inventory.gpus[1]));
    handle.shutdown(LONG).await;
}

#[tokio::test]
async fn claims_and_parts_are_found() {
    let mut scenario = Scenario::h100s(3);
    // The minor number is not the index.
    scenario.devices[0].minor = Some(1);
    scenario.devices[1].minor = Some(0);
    scenario.devices[2] = Device {
        mig: Some(Mig { current: true, pending: true }),
        mig_devices: vec![MigDevice::small(2, 0), MigDevice::small(2, 1)],
        ..Device::h100(2)
    };
    let part = scenario.devices[2].mig_devices[1].uuid.clone();
    let mut node = Node::new(&scenario);
    node.say(|script| {
        script.gate_is_off = true;
        script.listed.pod_resources = vec![
            with_claim(
                "by-claim",
                v1::ClaimResource {
                    driver_name: "gpu.nvidia.com".into(),
                    pool_name: "node".into(),
                    device_name: "gpu-0".into(),
                    ..Default::default()
                },
            ),
            with_claim(
                "by-cdi",
                v1::ClaimResource {
                    cdi_devices: vec![v1::CdiDevice {
                        name: "k8s.gpu.nvidia.com/claim=0a1b-gpu-1".into(),
                    }],
                    ..Default::default()
                },
            ),
            with_claim(
                "channel",
                v1::ClaimResource {
                    driver_name: "compute-domain.nvidia.com".into(),
                    device_name: "channel-0".into(),
                    ..Default::default()
                },
            ),
            with_devices("in-part", vec![devices("nvidia.com/mig-1g.10gb", &[part])]),
        ];
    });
    node.serve();
    let (handle, mut reader) = node.look();
    let inventory = eventually(&mut reader, |it| {
        it.allocation.source == AllocationSource::PodResources && it.gpus.len() == 3
    })
    .await;
    assert_eq!(holders(&inventory), [vec!["by-cdi"], vec!["by-claim"], vec![]]);
    assert_eq!(inventory.gpus[1].allocations[0].claim_name.as_deref(), Some("one-gpu"));
    let parts = &inventory.gpus[2].mig.as_ref().unwrap().devices;
    assert!(parts[0].allocations.is_empty());
    assert_eq!(parts[1].allocations[0].pod_name, "in-part");
    // An old kubelet does not tell what there is to give.
    assert!(inventory.gpus.iter().all(|gpu| gpu.allocatable.is_none()));
    handle.shutdown(LONG).await;
}

#[tokio::test]
async fn without_a_socket_processes_serve_and_a_kubelet_that_comes_is_found() {
    let mut node = Node::new(&Scenario::h100s(1));
    let (handle, mut reader) = node.look();
    let inventory =
        eventually(&mut reader, |it| it.allocation.message.starts_with("connect to ")).await;
    assert_eq!(inventory.allocation.source, AllocationSource::ProcessesOnly);
    let message = &inventory.allocation.message;
    assert!(message.contains("No such file or directory"), "{message}");

    node.say(|script| {
        script.listed.pod_resources =
            vec![with_devices("a", vec![devices("nvidia.com/gpu", &[uuid(0)])])];
    });
    node.serve();
    let given = |it: &GpuInventory| it.gpus.iter().any(|gpu| !gpu.allocations.is_empty());
    eventually(&mut reader, given).await;

    // A restart of the kubelet frees nothing.
    node.stop();
    node.say(|script| script.hangs = true);
    let gone = eventually(&mut reader, |it| !it.allocation.message.is_empty()).await;
    assert_eq!(gone.allocation.source, AllocationSource::PodResources);
    let message = &gone.allocation.message;
    assert!(message.starts_with("allocations are of the kubelet's last answer: "), "{message}");
    assert!(given(&gone));

    // Nor does something else on its socket.
    let _ = std::fs::remove_file(node.socket());
    let other = UnixListener::bind(node.socket()).unwrap();
    let babble = tokio::spawn(async move {
        while let Ok((mut stream, _)) = other.accept().await {
            let _ = tokio::io::AsyncWriteExt::write_all(&mut stream, &[0xff; 4096]).await;
        }
    });
    let strange = eventually(&mut reader, |it| {
        !it.allocation.message.contains("connect to ") && !it.allocation.message.is_empty()
    })
    .await;
    assert!(given(&strange), "{:?}", strange.allocation);
    babble.abort();

    // When it is back, its word counts again.
    node.say(|script| *script = Script::default());
    node.serve();
    let back = eventually(&mut reader, |it| it.allocation.message.is_empty()).await;
    assert!(!given(&back));
    handle.shutdown(LONG).await;
}

/// Shared GPUs have a name for each copy.
#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_devices_keep_no_reader_waiting() {
    let mut node = Node::new(&Scenario::h100s(16));
    let copies = |from: u32| -> Vec<String> {
        (from..from + 5_000).map(|n| format!("{}::{n}", uuid(n % 16))).collect()
    };
    node.say(|script| {
        // One container that has thousands, thousands of containers, and GPUs that are not here.
        let mut pods =
            vec![with_devices("all", vec![devices("nvidia.com/gpu.shared", &copies(0))])];
        pods.extend(copies(5_000).into_iter().enumerate().map(|(n, copy)| {
            with_devices(&format!("pod-{n}"), vec![devices("nvidia.com/gpu.shared", &[copy])])
        }));
        let strange: Vec<String> = (100..5_100).map(uuid).collect();
        pods.push(with_devices("strange", vec![devices("nvidia.com/gpu", &strange)]));
        script.listed.pod_resources = pods;
        let all = [copies(0), copies(5_000)].concat();
        let all = devices("nvidia.com/gpu.shared", &all);
        script.allocatable = Some(v1::AllocatableResourcesResponse { devices: vec![all] });
    });
    node.serve();
    let (handle, mut reader) = node.look();
    let inventory = eventually(&mut reader, |it| {
        it.allocation.source == AllocationSource::PodResources && it.gpus.len() == 16
    })
    .await;
    for gpu in &inventory.gpus {
        let of_all = gpu.allocations.iter().filter(|held| held.pod_name == "all").count();
        assert_eq!(of_all, 1, "a container counts once");
        assert!(gpu.allocations.len() > 300, "{}", gpu.allocations.len());
        assert_eq!(gpu.allocatable, Some(true));
    }
    let message = &inventory.allocation.message;
    assert!(message.contains(&uuid(100)) && message.ends_with(" and others"), "{message}");
    let began = std::time::Instant::now();
    reader.current();
    let took = began.elapsed();
    println!("15,000 devices joined with 16 GPUs in {took:.1?}");
    assert!(took < Duration::from_millis(500), "{took:?}");

    // More than any kubelet has is no answer.
    node.say(|script| {
        let nonsense: Vec<String> = (0..70_000).map(|n| format!("GPU-{n}")).collect();
        script.listed.pod_resources =
            vec![with_devices("all", vec![devices("nvidia.com/gpu", &nonsense)])];
    });
    let strange =
        eventually(&mut reader, |it| it.allocation.message.contains("more than 65536")).await;
    assert_eq!(strange.gpus[0].allocations, inventory.gpus[0].allocations, "the last one stands");
    handle.shutdown(LONG).await;
}

#[tokio::test]
async fn a_kubelet_that_hangs_is_given_up_in_time() {
    let mut node = Node::new(&Scenario::h100s(1));
    node.say(|script| script.hangs = true);
    node.serve();
    let (allocations, mut seen) = watch::channel(Arc::new(Allocations::none(NOT_ASKED)));
    let (patience, interval) = (Duration::from_millis(20), Duration::from_secs(10));
    let asking = tokio::spawn(follow(node.socket(), interval, patience, allocations));
    tokio::time::timeout(LONG, seen.changed()).await.unwrap().unwrap();
    let trouble = seen.borrow().trouble.clone();
    assert!(trouble.ends_with("kubelet.sock: no answer within 20ms"), "{trouble}");
    asking.abort();
}
