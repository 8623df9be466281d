//! The main job on a whole node: an image comes once, stands once, and is seen read-only by
//! every pod that asks; and whoever asks about it is told the same by every door.

#![allow(clippy::unwrap_used)] // a test that cannot go on says where

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;

use carport_image::source::PullSecret;
use carport_proto::carport::v1 as api;
use carport_proto::carport::v1::cache_service_client::CacheServiceClient;
use carport_proto::client::connect;
use carport_proto::csi::v1 as csi;
use carport_proto::pluginregistration::v1 as registration;
use carport_tests::carport::binary;
use carport_tests::images::{Image, Tar, noise};
use carport_tests::models::{Model, WEIGHTS_BYTES, sources, weights};
use carport_tests::node::{Node, Pod, Setup, eventually, publish_request};
use carport_tests::registry::Registry;
use carport_tests::scripted::Gate;
use serde_json::Value;
use tonic::Code;

/// A real registry with one small model, and a node that may pull it.
async fn node_with_model() -> Option<(Registry, Node, String)> {
    let registry = Registry::start()?;
    let node = Node::start(binary(), &[registry.host()])?;
    let image = format!("{}/team/tiny-llama:v1", registry.host());
    let sources = sources(&[registry.host()]);
    Model::new().pack(&image, &PullSecret::none(), &sources).await.unwrap();
    Some((registry, node, image))
}

fn named(reference: &str) -> api::ModelRef {
    api::ModelRef { reference: reference.into(), ..Default::default() }
}

fn inode(path: &Path) -> (u64, u64) {
    let meta = fs::metadata(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    (meta.dev(), meta.ino())
}

/// The system's number of the error that an attempt to write ends with.
fn write_errno(path: &Path) -> Option<i32> {
    fs::write(path, "x").unwrap_err().raw_os_error()
}

const READ_ONLY: Option<i32> = Some(rustix::io::Errno::ROFS.raw_os_error());

async fn stats(
    node: &Node,
    volume_id: &str,
    path: &Path,
) -> Result<csi::NodeGetVolumeStatsResponse, tonic::Status> {
    let request = csi::NodeGetVolumeStatsRequest {
        volume_id: volume_id.into(),
        volume_path: path.display().to_string(),
        ..Default::default()
    };
    node.csi().await.node_get_volume_stats(request).await.map(tonic::Response::into_inner)
}

#[tokio::test(flavor = "multi_thread")]
async fn fifty_pods_that_ask_at_once_get_one_pull_and_one_copy() {
    let content = noise(8 << 20, 1);
    let layers = [
        Tar::default().file("models/config.json", b"{}").end(),
        Tar::default().file("models/weights.bin", &content).end(),
    ];
    let image = Image::of(&layers);
    // Half of it comes; all wait.
    let gate = Gate::closed_at(4 << 20);
    let server = image.serve(&gate).await;
    let Some(node) = Node::start(binary(), &[&server.host()]) else { return };
    let name = format!("{}/team/model:v1", server.host());

    // Every other one is a volume of the same PV: one handle, a target for each pod.
    let pods: Vec<Pod> = (0..50)
        .map(|n| {
            let pod = node.pod(&format!("pod-{n}"));
            if n % 2 == 0 { pod } else { Pod { volume_id: "pv-shared-model".into(), ..pod } }
        })
        .collect();
    let publishing = pods.iter().map(|pod| node.publish(pod, &name));
    let publishing = futures_util::future::join_all(publishing);
    let opening = async {
        gate.reached(4 << 20).await;
        eventually("one pull under way", async || {
            node.metric("carport_pulls_in_flight").await == 1.0
        })
        .await;
        assert_eq!(node.mounts_below(&node.kubelet()).len(), 0, "nothing is shown by halves");
        gate.open();
    };
    let (published, ()) = tokio::join!(publishing, opening);
    for (pod, result) in pods.iter().zip(published) {
        result.unwrap_or_else(|error| panic!("{}: {error}", pod.target.display()));
    }

    assert_eq!(gate.served(), image.layer_bytes(), "each byte travels once");
    let asked = server.requests();
    let count = |part: &str| asked.iter().filter(|request| request.target.contains(part)).count();
    assert_eq!(count("/manifests/"), 1);
    assert_eq!(count(&image.layers[0].to_string()), 1);

    assert_eq!(node.mounts_below(&node.kubelet()).len(), 50);
    let first = inode(&node.inside(&pods[0].target).join("models/weights.bin"));
    for pod in &pods {
        let target = node.inside(&pod.target);
        assert_eq!(inode(&target.join("models/weights.bin")), first);
        assert_eq!(write_errno(&target.join("models/config.json")), READ_ONLY);
        assert_eq!(write_errno(&target.join("new")), READ_ONLY);
    }
    let last = node.inside(&pods[49].target).join("models/weights.bin");
    assert!(fs::read(&last).unwrap() == content);

    node.metric_becomes("carport_volumes", 50.0).await;
    node.metric_becomes("carport_pulls_total{result=\"done\"}", 1.0).await;
    node.metric_becomes("carport_pulls_in_flight", 0.0).await;
    node.metric_becomes("carport_images", 1.0).await;
    node.metric_becomes("carport_store_objects", 2.0).await;
    #[allow(clippy::cast_precision_loss)]
    node.metric_becomes("carport_pull_bytes_total", image.layer_bytes() as f64).await;
    assert_eq!(node.metric("carport_pulls_total{result=\"failed\"}").await, 0.0);
    assert_eq!(node.metric("carport_pull_seconds_count").await, 1.0);
    for pod in [&pods[0], &pods[1]] {
        let stats = stats(&node, &pod.volume_id, &pod.target).await.unwrap();
        let bytes = (8 << 20) + 2;
        assert_eq!(
            (stats.usage[0].used, stats.usage[0].total, stats.usage[0].available),
            (bytes, bytes, 0)
        );
        assert_eq!(stats.usage[1].used, 2);
        assert!(!stats.volume_condition.unwrap().abnormal);
    }

    // In an order of its own; who is left reads on.
    let (mut left, mut order) = (pods.clone(), Vec::new());
    while !left.is_empty() {
        order.push(left.swap_remove(left.len() * 7 / 11));
    }
    for (n, pod) in order.iter().enumerate() {
        node.unpublish(pod).await.unwrap();
        assert!(!node.inside(&pod.target).exists());
        assert_eq!(node.mounts_below(&node.kubelet()).len(), 49 - n);
        if let Some(other) = order.get(n + 1) {
            assert_eq!(inode(&node.inside(&other.target).join("models/weights.bin")), first);
        }
        // Again, as a kubelet does that was restarted.
        node.unpublish(pod).await.unwrap();
    }
    assert_eq!(fs::read_dir(node.root().join("volumes")).unwrap().count(), 0);
    node.metric_becomes("carport_volumes", 0.0).await;
    assert_eq!(node.json(&["rm", &name])[0]["removed"], true);
    assert_eq!(node.json(&["gc"])["objects"], 2);
    assert_eq!(fs::read_dir(node.root().join("ingest")).unwrap().count(), 0);
}

/// A kubelet that shares its mounts with the agent's container gets a copy of each one; its
/// copy is what pods see, and it must be read-only by itself.
#[tokio::test(flavor = "multi_thread")]
async fn the_kubelets_copy_of_a_mount_is_read_only_too_and_goes_with_it() {
    let content = noise(1 << 20, 2);
    let image = Image::of(&[Tar::default().file("models/w.bin", &content).end()]);
    let gate = Gate::closed_at(u64::MAX);
    let server = image.serve(&gate).await;
    let setup = Setup {
        prepare: Some(
            "mount --bind $KUBELET/pods $KUBELET/pods; mount --make-rshared $KUBELET/pods".into(),
        ),
        ..Setup::plain_http(&[&server.host()])
    };
    let Some(node) = Node::set_up(binary(), setup) else { return };
    let kubelet = node.copied_namespace();
    let name = format!("{}/team/model:v1", server.host());
    let pod = node.pod("pod-a");
    node.publish(&pod, &name).await.unwrap();

    let copies = [node.inside(&pod.target), kubelet.inside(&pod.target)];
    for copy in &copies {
        assert!(fs::read(copy.join("models/w.bin")).unwrap() == content, "{}", copy.display());
        assert_eq!(write_errno(&copy.join("models/w.bin")), READ_ONLY, "{}", copy.display());
        assert_eq!(write_errno(&copy.join("new")), READ_ONLY);
        assert_eq!(
            fs::remove_file(copy.join("models/w.bin")).unwrap_err().raw_os_error(),
            READ_ONLY
        );
        let mode = fs::Permissions::from_mode(0o666);
        let error = fs::set_permissions(copy.join("models/w.bin"), mode).unwrap_err();
        assert_eq!(error.raw_os_error(), READ_ONLY);
    }
    // What a container runtime does with the volume: a bind mount of the kubelet's copy.
    let container = kubelet.inside(&node.kubelet()).join("container");
    fs::create_dir(&container).unwrap();
    let pid = copies[1].components().nth(2).unwrap().as_os_str().to_str().unwrap().to_owned();
    let bound = std::process::Command::new("nsenter")
        .arg(format!("--mount=/proc/{pid}/ns/mnt"))
        .args(["mount", "--bind"])
        .arg(&pod.target)
        .arg(node.kubelet().join("container"))
        .status()
        .unwrap();
    assert!(bound.success());
    assert_eq!(write_errno(&container.join("models/w.bin")), READ_ONLY);

    node.unpublish(&pod).await.unwrap();
    assert!(!node.inside(&pod.target).exists());
    assert!(!kubelet.inside(&pod.target).exists(), "gone there, too");
    // The container, which has not ended yet, reads on.
    assert!(fs::read(container.join("models/w.bin")).unwrap() == content);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_may_show_one_folder_of_an_image() {
    let tar = Tar::default()
        .file("models/llama/w.bin", b"weights")
        .file("etc/secret", b"elsewhere")
        .symlink("way-out", "/etc")
        .symlink("inside", "models/llama");
    let image = Image::of(&[tar.end()]);
    let server = image.serve(&Gate::closed_at(u64::MAX)).await;
    let Some(node) = Node::start(binary(), &[&server.host()]) else { return };
    let name = format!("{}/team/model:v1", server.host());
    let publish = async |pod: &Pod, path: &str| {
        let request = publish_request(pod, &[("image", &name), ("path", path)]);
        node.csi().await.node_publish_volume(request).await
    };

    let pod = node.pod("pod-a");
    publish(&pod, "/models/llama").await.unwrap();
    let shown = node.inside(&pod.target);
    assert_eq!(fs::read(shown.join("w.bin")).unwrap(), b"weights");
    assert_eq!(fs::read_dir(&shown).unwrap().count(), 1, "nothing beside it");
    assert_eq!(write_errno(&shown.join("w.bin")), READ_ONLY);
    // The same again is fine, another folder at the same target is not.
    publish(&pod, "models/llama/").await.unwrap();
    assert_eq!(publish(&pod, "/models").await.unwrap_err().code(), Code::AlreadyExists);

    for (path, code, part) in [
        ("/models/mistral", Code::NotFound, "models/mistral"),
        // A file is no folder to mount; a link of the image is never followed on the host.
        ("/models/llama/w.bin", Code::NotFound, "models/llama/w.bin"),
        ("/way-out", Code::NotFound, "way-out"),
        ("/inside", Code::NotFound, "inside"),
        ("/models/../etc", Code::InvalidArgument, ".."),
    ] {
        let other = node.pod("pod-b");
        let status = publish(&other, path).await.unwrap_err();
        assert_eq!(status.code(), code, "{path}: {}", status.message());
        assert!(status.message().contains(part), "{path}: {}", status.message());
        assert!(!node.inside(&other.target).exists(), "{path}: nothing is left after a final code");
    }
    assert_eq!(node.mounts_below(&node.kubelet()).len(), 1);
    assert_eq!(fs::read_dir(node.root().join("volumes")).unwrap().count(), 1);
    node.unpublish(&pod).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_kubelet_finds_the_driver_and_its_calls_are_answered_as_csi_wants() {
    let Some((_registry, node, image)) = node_with_model().await else { return };
    let socket = node.registration_socket();
    eventually("the registration socket", async || socket.exists()).await;
    let channel = connect(&socket).await.unwrap();
    let mut registrar = registration::registration_client::RegistrationClient::new(channel);
    let info = registrar.get_info(registration::InfoRequest {}).await.unwrap().into_inner();
    assert_eq!((info.r#type.as_str(), info.name.as_str()), ("CSIPlugin", "csi.carport.dev"));
    assert_eq!(Path::new(&info.endpoint), node.csi_socket());
    assert_eq!(info.supported_versions, ["1.0.0"]);
    // The node is ready when the kubelet sends it volumes, and says why while it does not.
    let (status, why) = node.page("/readyz").await;
    assert!(status == 503 && why.contains("has not reported the outcome"), "{why}");
    for error in [None, None, Some("plugin name is taken")] {
        node.register(error).await;
        let (status, why) = node.page("/readyz").await;
        assert_eq!(status, if error.is_none() { 200 } else { 503 }, "{why}");
        assert!(error.is_none_or(|error| why.contains(error)), "{why}");
        assert_eq!(node.page("/healthz").await.0, 200, "a restart would not help");
    }

    let channel = connect(Path::new(&info.endpoint)).await.unwrap();
    let mut identity = csi::identity_client::IdentityClient::new(channel);
    let plugin = identity.get_plugin_info(csi::GetPluginInfoRequest {}).await.unwrap().into_inner();
    assert_eq!(plugin.name, "csi.carport.dev");
    let probe = identity.probe(csi::ProbeRequest {}).await.unwrap().into_inner();
    assert_eq!(probe.ready, Some(true));
    let mut driver = node.csi().await;
    let about = driver.node_get_info(csi::NodeGetInfoRequest {}).await.unwrap().into_inner();
    assert_eq!((about.node_id.as_str(), about.max_volumes_per_node), ("node-1", 0));

    // csi-sanity's table.
    let pod = node.pod("pod-a");
    let good = publish_request(&pod, &[("image", &image)]);
    for wrong in [
        csi::NodePublishVolumeRequest { volume_id: String::new(), ..good.clone() },
        csi::NodePublishVolumeRequest { target_path: String::new(), ..good.clone() },
        csi::NodePublishVolumeRequest { volume_capability: None, ..good.clone() },
    ] {
        let status = driver.node_publish_volume(wrong).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{}", status.message());
    }
    for (volume_id, target_path) in [("", "/x"), ("x", "")] {
        let wrong = csi::NodeUnpublishVolumeRequest {
            volume_id: volume_id.into(),
            target_path: target_path.into(),
        };
        let status = driver.node_unpublish_volume(wrong).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
        let status = stats(&node, volume_id, Path::new(target_path)).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
    }
    // Ten times is once; two at a time are one.
    for _ in 0..5 {
        let mut second = node.csi().await;
        let (one, two) = tokio::join!(
            driver.node_publish_volume(good.clone()),
            second.node_publish_volume(good.clone())
        );
        one.unwrap();
        two.unwrap();
    }
    assert_eq!(node.mounts_below(&node.kubelet()).len(), 1);
    for (volume_id, path) in [("unknown", pod.target.as_path()), (&pod.volume_id, Path::new("/x"))]
    {
        assert_eq!(stats(&node, volume_id, path).await.unwrap_err().code(), Code::NotFound);
    }
    // Another volume's unpublish takes nothing of this one.
    let stranger = Pod { volume_id: "csi-stranger".into(), ..pod.clone() };
    node.unpublish(&stranger).await.unwrap();
    assert!(node.inside(&pod.target).join("models/config.json").exists());
    node.unpublish(&pod).await.unwrap();
    assert!(!node.inside(&pod.target).exists());
    assert_eq!(node.mounts_below(&node.kubelet()).len(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_with_something_on_it_is_left_as_it_is() {
    let Some((_registry, node, image)) = node_with_model().await else { return };
    let publish = async |pod: &Pod| node.publish(pod, &image).await;
    // A folder that is there and empty will do, as after a reboot.
    let empty = node.pod("empty");
    fs::create_dir(&empty.target).unwrap();
    publish(&empty).await.unwrap();
    node.unpublish(&empty).await.unwrap();

    let full = node.pod("full");
    fs::create_dir(&full.target).unwrap();
    fs::write(full.target.join("mine"), "x").unwrap();
    let file = node.pod("file");
    fs::write(&file.target, "x").unwrap();
    let link = node.pod("link");
    std::os::unix::fs::symlink(node.root(), &link.target).unwrap();
    for pod in [&full, &file, &link] {
        let status = publish(pod).await.unwrap_err();
        assert_eq!(status.code(), Code::FailedPrecondition, "{}", status.message());
        assert!(status.message().contains(pod.target.to_str().unwrap()), "{}", status.message());
        // What is not ours stays, and holds no pod.
        node.unpublish(pod).await.unwrap();
    }
    assert_eq!(fs::read(full.target.join("mine")).unwrap(), b"x");
    assert_eq!(fs::read(&file.target).unwrap(), b"x");
    assert!(fs::symlink_metadata(&link.target).unwrap().is_symlink());
    assert!(node.root().join("format").exists());

    // Without the folder that the kubelet makes there is nothing to mount on.
    let nowhere = Pod { volume_id: "x".into(), target: node.kubelet().join("pods/none/x/mount") };
    let status = publish(&nowhere).await.unwrap_err();
    assert_eq!(status.code(), Code::Internal, "{}", status.message());
    assert!(status.message().contains("pods/none/x/mount"), "{}", status.message());

    // Somebody else's mount.
    let mounted = node.pod("mounted");
    fs::create_dir(&mounted.target).unwrap();
    let tmpfs = node.within("mount").args(["-t", "tmpfs", "none"]).arg(&mounted.target).status();
    assert!(tmpfs.unwrap().success());
    let status = publish(&mounted).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition, "{}", status.message());
    node.unpublish(&mounted).await.unwrap();
    assert_eq!(node.mounts_below(&mounted.target).len(), 1, "left alone");
    assert_eq!(fs::read_dir(node.root().join("volumes")).unwrap().count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_door_tells_the_same_of_a_model() {
    let Some((_registry, node, image)) = node_with_model().await else { return };
    node.register(None).await;
    for path in ["/healthz", "/readyz"] {
        assert_eq!(node.page(path).await.0, 200, "{path}");
    }
    let before = node.json(&["locate", &image]);
    assert_eq!(before[0]["score"], 0);
    assert_eq!(before[0]["missing_bytes"], Value::Null);
    assert_eq!(before[0]["models"][0]["state"], "absent");
    assert_eq!(node.json(&["ls"]), serde_json::json!([]));

    let pods = [node.pod("pod-a"), node.pod("pod-b")];
    for pod in &pods {
        node.publish(pod, &image).await.unwrap();
    }
    node.metric_becomes("carport_volumes", 2.0).await;
    let listed = node.json(&["ls"]);
    let status = node.json(&["status"]);
    let located = node.json(&["locate", &image]);
    let bytes = WEIGHTS_BYTES as u64 + 38 + 7;
    let digest = &listed[0]["digest"];
    assert_eq!(listed.as_array().unwrap().len(), 1);
    assert_eq!(listed[0]["references"], serde_json::json!([image]));
    assert_eq!(listed[0]["unpacked_bytes"], bytes);
    assert_eq!(listed[0]["files"], 3);
    let by_digest = node.json(&["locate", digest.as_str().unwrap()]);
    for (door, model) in [
        ("status", &status["models"][0]),
        ("locate", &located[0]["models"][0]),
        ("locate by digest", &by_digest[0]["models"][0]),
    ] {
        assert_eq!(&model["digest"], digest, "{door}");
        assert_eq!(model["state"], "ready", "{door}");
        assert_eq!(model["total_bytes"], bytes, "{door}");
        assert_eq!(model["present_bytes"], bytes, "{door}");
        assert_eq!(model["mount_count"], 2, "{door}");
        assert_eq!(model["error"], Value::Null, "{door}");
    }
    for answer in [&located[0], &by_digest[0]] {
        assert_eq!(answer["node_name"], "node-1");
        assert_eq!(answer["score"], 100);
        assert_eq!(answer["missing_bytes"], 0);
        assert_eq!(answer["eta_seconds"], 0.0);
        assert_eq!(answer["fits_without_eviction"], true);
        assert_eq!(answer["state"], status["state"]);
    }
    assert_eq!(status["node_name"], "node-1");
    assert_eq!(status["store"]["mounted_bytes"], bytes);
    #[allow(clippy::cast_precision_loss)]
    let used = status["store"]["used_bytes"].as_u64().unwrap() as f64;
    node.metric_becomes("carport_store_used_bytes", used).await;
    #[allow(clippy::cast_precision_loss)]
    node.metric_becomes("carport_store_image_bytes", bytes as f64).await;
    // What is mounted is not taken away, however it is asked for.
    for name in [image.as_str(), digest.as_str().unwrap()] {
        let refused = node.carport().args(["rm", name]).output().unwrap();
        assert_eq!(refused.status.code(), Some(1));
    }
    assert!(
        fs::read(node.inside(&pods[0].target).join("models/model.safetensors")).unwrap()
            == weights()
    );
    node.unpublish(&pods[0]).await.unwrap();
    node.unpublish(&pods[1]).await.unwrap();
    node.json(&["rm", &image]);
    eventually("the removed model is absent", async || {
        node.json(&["locate", &image])[0]["models"][0]["state"] == "absent"
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prefetched_model_is_published_without_its_registry() {
    let Some((registry, node, image)) = node_with_model().await else { return };
    let mut cache = CacheServiceClient::new(connect(&node.socket()).await.unwrap());
    let mut locality = node.locality().await;
    let prefetch = api::PrefetchRequest { model: Some(named(&image)), ..Default::default() };
    cache.prefetch(prefetch).await.unwrap();
    let question =
        api::EvaluatePlacementRequest { models: vec![named(&image)], ..Default::default() };
    eventually("the model is here", async || {
        let mut locality = locality.clone();
        let answer = locality.evaluate_placement(question.clone()).await.unwrap().into_inner();
        // A score of 100 may come a moment earlier: with the last byte.
        answer.nodes[0].models[0].state() == api::ModelState::Ready
    })
    .await;
    drop(registry);
    let pod = node.pod("pod-a");
    let began = std::time::Instant::now();
    node.publish(&pod, &image).await.unwrap();
    assert!(began.elapsed().as_secs_f64() < 2.0, "at once: {:?}", began.elapsed());
    assert!(node.inside(&pod.target).join("models/config.json").exists());
    // `Always` cannot do without the registry, and says so.
    let always = node.pod("pod-b");
    let request = publish_request(&always, &[("image", &image), ("pullPolicy", "Always")]);
    let mut driver = node.csi().await;
    let mut request = tonic::Request::new(request);
    request.set_timeout(std::time::Duration::from_secs(3));
    let code = driver.node_publish_volume(request).await.unwrap_err().code();
    assert!(
        matches!(code, Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled),
        "{code:?}"
    );
    // `Never` can.
    let never = node.pod("pod-c");
    let request = publish_request(&never, &[("image", &image), ("pullPolicy", "Never")]);
    driver.node_publish_volume(request).await.unwrap();

    // Up to 32 models are asked for at once.
    let mut many: Vec<_> = (0..31).map(|n| named(&format!("nowhere.example/m{n}:v1"))).collect();
    many.push(named(&image));
    let ask = |models| api::EvaluatePlacementRequest { models, ..Default::default() };
    let answer = locality.evaluate_placement(ask(many.clone())).await.unwrap().into_inner();
    assert_eq!(answer.nodes[0].models.len(), 32);
    assert_eq!(answer.nodes[0].models[31].state(), api::ModelState::Ready);
    assert_eq!(answer.unresolved.len(), 31);
    assert_eq!((answer.nodes[0].score, answer.nodes[0].missing_bytes), (0, None));
    many.push(named(&image));
    let status = locality.evaluate_placement(ask(many)).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().contains("32"), "{}", status.message());
}

#[tokio::test(flavor = "multi_thread")]
async fn tools_find_their_way_by_reflection_and_health() {
    use tonic_health::pb::health_client::HealthClient;
    use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus};
    use tonic_reflection::pb::v1::ServerReflectionRequest;
    use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
    use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
    use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;

    let Some(node) = Node::start(binary(), &[]) else { return };
    let mode = fs::metadata(node.socket()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o660, "not for everybody");
    assert_eq!(fs::metadata(node.csi_socket()).unwrap().permissions().mode() & 0o777, 0o600);
    let services =
        ["carport.v1.CacheService", "carport.v1.GpuService", "carport.v1.LocalityService"];
    let channel = connect(&node.socket()).await.unwrap();
    let mut health = HealthClient::new(channel.clone());
    for service in services.into_iter().chain([""]) {
        let request = HealthCheckRequest { service: service.into() };
        let answer = health.check(request).await.unwrap().into_inner();
        assert_eq!(answer.status(), ServingStatus::Serving, "{service:?}");
    }
    let request = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut reflection = ServerReflectionClient::new(channel);
    let mut answers =
        reflection.server_reflection_info(tokio_stream::once(request)).await.unwrap().into_inner();
    let answer = answers.message().await.unwrap().unwrap().message_response.unwrap();
    let MessageResponse::ListServicesResponse(list) = answer else { panic!("{answer:?}") };
    let found: Vec<&str> = list.service.iter().map(|service| service.name.as_str()).collect();
    for service in services.into_iter().chain(["grpc.health.v1.Health"]) {
        assert!(found.contains(&service), "{service} is not in {found:?}");
    }
}
