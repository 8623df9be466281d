//! The gRPC API over its socket.

use carport_proto::carport::v1;
use carport_proto::carport::v1::cache_service_client::CacheServiceClient;
use carport_proto::carport::v1::gpu_service_client::GpuServiceClient;
use carport_proto::carport::v1::locality_service_client::LocalityServiceClient;
use carport_proto::client::connect;
use carport_proto::csi::v1 as csi;
use carport_proto::csi::v1::node_client::NodeClient;
use tonic::Code;
use tonic::transport::Channel;
use tonic_types::StatusExt as _;

use crate::support::{Agent, Home, comes, is_root};

async fn channel(home: &Home) -> Channel {
    connect(&home.socket()).await.unwrap()
}

fn named(reference: &str) -> v1::ModelRef {
    v1::ModelRef { reference: reference.into(), ..Default::default() }
}

async fn list(client: &mut LocalityServiceClient<Channel>) -> v1::ListModelsResponse {
    client.list_models(v1::ListModelsRequest::default()).await.unwrap().into_inner()
}

/// Asks until the list is as wanted.
async fn until(
    client: &mut LocalityServiceClient<Channel>,
    wanted: impl Fn(&[v1::ModelLocality]) -> bool,
) -> v1::ListModelsResponse {
    let look = async || Some(list(client).await).filter(|answer| wanted(&answer.models));
    comes("the list is as wanted", look).await
}

async fn stop(agent: Agent) {
    tokio::task::spawn_blocking(move || agent.terminate()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prefetched_model_becomes_ready_and_scores_100() {
    let home = Home::new();
    let reference = home.image("a", &[("w.bin", "12345")]);
    let agent = home.agent(&[]);
    let mut locality = LocalityServiceClient::new(channel(&home).await);
    let mut cache = CacheServiceClient::new(channel(&home).await);

    let question =
        v1::EvaluatePlacementRequest { models: vec![named(&reference)], ..Default::default() };
    let before = locality.evaluate_placement(question.clone()).await.unwrap().into_inner();
    assert_eq!(before.unresolved, [named(&reference)]);
    assert_eq!(before.nodes[0].score, 0);
    assert_eq!(before.nodes[0].missing_bytes, None);
    assert_eq!(before.nodes[0].models[0].state(), v1::ModelState::Absent);
    assert_eq!(before.nodes[0].reasons[0].code, "MODEL_UNKNOWN");

    let mut prefetch = v1::PrefetchRequest { model: Some(named(&reference)), ..Default::default() };
    prefetch.validate_only = true;
    let answer = cache.prefetch(prefetch.clone()).await.unwrap().into_inner();
    assert_eq!(answer.model.unwrap().state(), v1::ModelState::Absent);
    assert!(list(&mut locality).await.models.is_empty(), "asking whether does nothing");
    prefetch.validate_only = false;
    cache.prefetch(prefetch.clone()).await.unwrap();
    cache.prefetch(prefetch).await.unwrap();

    let is_ready = |models: &[v1::ModelLocality]| {
        models.len() == 1 && models[0].state() == v1::ModelState::Ready
    };
    let listed = until(&mut locality, is_ready).await;
    assert_eq!(listed.models[0].total_bytes, Some(5));
    assert!(listed.revision.unwrap().sequence > 0);

    let after = locality.evaluate_placement(question).await.unwrap().into_inner();
    assert!(after.unresolved.is_empty());
    let node = &after.nodes[0];
    assert_eq!((node.node_name.as_str(), node.score), ("node-1", 100));
    assert_eq!(node.state(), v1::NodeState::Ready);
    assert_eq!(node.missing_bytes, Some(0));
    assert!(node.fit.as_ref().unwrap().fits_without_eviction);
    assert!(!node.models[0].model.as_ref().unwrap().digest.is_empty());
    stop(agent).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_pull_is_told_with_its_reason() {
    let home = Home::new();
    let reference = format!("oci:{}:v1", home.path("absent").display());
    let agent = home.agent(&[]);
    let mut cache = CacheServiceClient::new(channel(&home).await);
    let mut locality = LocalityServiceClient::new(channel(&home).await);
    let prefetch = v1::PrefetchRequest { model: Some(named(&reference)), ..Default::default() };
    cache.prefetch(prefetch).await.unwrap();
    let failed = |models: &[v1::ModelLocality]| {
        models.len() == 1 && models[0].state() == v1::ModelState::Failed
    };
    let listed = until(&mut locality, failed).await;
    let error = listed.models[0].last_error.as_ref().unwrap();
    assert_eq!(error.code, "PULL_NOT_FOUND");
    assert!(error.message.contains("absent"), "{}", error.message);
    stop(agent).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_another_process_pulls_or_removes_is_seen() {
    let home = Home::new();
    let (a, b) = (home.image("a", &[("w", "1")]), home.image("b", &[("w", "2")]));
    let agent = home.agent(&[]);
    let mut client = LocalityServiceClient::new(channel(&home).await);
    let first = list(&mut client).await.revision.unwrap();
    home.json(&["pull", &a, &b]);
    let two = until(&mut client, |models| models.len() == 2).await.revision.unwrap();
    assert_eq!(first.epoch, two.epoch);
    assert!(two.sequence > first.sequence);
    home.json(&["rm", &a]);
    let one = until(&mut client, |models| models.len() == 1).await;
    assert_eq!(one.models[0].model.as_ref().unwrap().reference, b);
    stop(agent).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_request_is_told_which_field_is_wrong() {
    let home = Home::new();
    let agent = home.agent(&[]);
    let mut client = LocalityServiceClient::new(channel(&home).await);
    let ask =
        |models: Vec<v1::ModelRef>| v1::EvaluatePlacementRequest { models, ..Default::default() };
    let bad_digest = v1::ModelRef { digest: "sha256:1".into(), ..Default::default() };
    let gpu = v1::GpuRequirement { product_regex: "(".into(), ..Default::default() };
    let mask = prost_types::FieldMask { paths: vec!["scores".into()] };
    let fine = || ask(vec![named("r:5000/a:1")]);
    for (question, field) in [
        (ask(vec![]), "models"),
        (ask(vec![named("r:5000/a:1"); 33]), "models"),
        (ask(vec![named("r:5000/a:1"), named("Not A Ref")]), "models[1].reference"),
        (ask(vec![bad_digest]), "models[0].digest"),
        (ask(vec![v1::ModelRef::default()]), "models[0]"),
        (v1::EvaluatePlacementRequest { gpu: Some(gpu), ..fine() }, "gpu.product_regex"),
        (v1::EvaluatePlacementRequest { read_mask: Some(mask), ..fine() }, "read_mask"),
    ] {
        let status = client.evaluate_placement(question).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
        let details = status.get_error_details();
        let violations = &details.bad_request().unwrap().field_violations;
        assert_eq!(violations[0].field, field);
    }
    let elsewhere = v1::GetNodeRequest { node_name: "node-2".into(), ..Default::default() };
    let status = client.get_node(elsewhere).await.unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
    assert_eq!(status.get_error_details().resource_info().unwrap().resource_name, "node-2");
    let huge = ask(vec![named(&"x".repeat(2 << 20))]);
    assert_eq!(client.evaluate_placement(huge).await.unwrap_err().code(), Code::OutOfRange);
    stop(agent).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_without_the_gpus_is_ruled_out_with_a_reason() {
    let home = Home::new();
    let reference = home.image("a", &[("w", "1")]);
    home.json(&["pull", &reference]);
    let agent = home.agent(&[]);
    let mut client = LocalityServiceClient::new(channel(&home).await);
    let question = v1::EvaluatePlacementRequest {
        models: vec![named(&reference)],
        gpu: Some(v1::GpuRequirement { count: 1, ..Default::default() }),
        ..Default::default()
    };
    let node = client.evaluate_placement(question).await.unwrap().into_inner().nodes.remove(0);
    assert_eq!((node.score, node.missing_bytes), (0, Some(0)));
    assert_eq!(node.reasons[0].code, "GPU_MISMATCH");
    assert_eq!(node.gpu.unwrap().matching_count, 0);
    let mut gpus = GpuServiceClient::new(channel(&home).await);
    let inventory = gpus.get_gpu_inventory(v1::GetGpuInventoryRequest::default()).await.unwrap();
    assert_eq!(inventory.into_inner().provider_state(), v1::ProviderState::Disabled);
    stop(agent).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn health_and_reflection_name_each_service() {
    use tonic_health::pb::health_client::HealthClient;
    use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus};
    use tonic_reflection::pb::v1::ServerReflectionRequest;
    use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
    use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
    use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;

    let home = Home::new();
    let agent = home.agent(&[]);
    let services =
        ["carport.v1.CacheService", "carport.v1.GpuService", "carport.v1.LocalityService"];
    let mut health = HealthClient::new(channel(&home).await);
    for service in services {
        let question = HealthCheckRequest { service: service.into() };
        let answer = health.check(question).await.unwrap().into_inner();
        assert_eq!(answer.status(), ServingStatus::Serving, "{service}");
    }
    let question = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut reflection = ServerReflectionClient::new(channel(&home).await);
    let mut answers =
        reflection.server_reflection_info(tokio_stream::once(question)).await.unwrap().into_inner();
    let answer = answers.message().await.unwrap().unwrap().message_response.unwrap();
    let MessageResponse::ListServicesResponse(list) = answer else { panic!("{answer:?}") };
    for service in services {
        assert!(list.service.iter().any(|found| found.name == service), "{service}");
    }
    drop(answers);
    stop(agent).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_print_what_the_agent_says() {
    let home = Home::new();
    let reference = home.image("a", &[("w.bin", "12345")]);
    home.json(&["pull", &reference]);
    let agent = home.agent(&[]);
    let located = home.json(&["locate", &reference]);
    assert_eq!(located[0]["score"], 100);
    assert_eq!(located[0]["missing_bytes"], 0);
    assert_eq!(located[0]["models"][0]["state"], "ready");
    let status = home.json(&["status"]);
    assert_eq!(status["node_name"], "node-1");
    assert_eq!(status["state"], "ready");
    assert_eq!(status["gpus"]["provider"]["state"], "disabled");
    assert!(status["store"]["capacity_bytes"].as_u64().unwrap() > 0);
    assert_eq!(home.json(&["gpus"])["provider"]["state"], "disabled");
    for (arguments, part) in [
        (&["locate", &reference][..], "node-1: score 100, ready; local now, 0 B missing; fits, "),
        (&["status"], "node node-1: ready, agent "),
    ] {
        let text = crate::support::stdout(&home.run(arguments));
        assert!(text.contains(part) && text.contains(&reference), "{text}");
    }
    let prefetched = home.json(&["prefetch", &reference, "--pin", "1h"]);
    assert_eq!(
        (&prefetched[0]["state"], &prefetched[0]["total_bytes"]),
        (&"ready".into(), &5.into())
    );
    assert_eq!(home.json(&["prefetch", "--cancel", "oci:/absent:v1"])[0]["state"], "not under way");
    let watched = crate::support::stdout(&home.run(&["watch", "--once", "-o", "json"]));
    let lines: Vec<serde_json::Value> =
        watched.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let events: Vec<_> = lines.iter().map(|line| line["event"].as_str().unwrap()).collect();
    assert_eq!(events, ["node", "gpus", "model", "synced"]);
    assert_eq!(lines[2]["model"]["reference"], reference.as_str());
    assert!(lines[3]["sequence"].is_u64());
    let text = crate::support::stdout(&home.run(&["watch", "--once", &reference]));
    assert!(text.contains(&format!("model    {reference} ready, 5 B\n")), "{text}");
    assert!(home.fails(&["locate", "Not A Ref"]).contains("models[0].reference"));
    stop(agent).await;
}

/// As the kubelet asks for an inline volume of `reference`.
fn publish(reference: &str, target: &std::path::Path) -> csi::NodePublishVolumeRequest {
    use csi::volume_capability::{AccessMode, AccessType, MountVolume, access_mode::Mode};
    let context = [
        ("image", reference),
        ("csi.storage.k8s.io/pod.name", "server-0"),
        ("csi.storage.k8s.io/pod.namespace", "models"),
        ("csi.storage.k8s.io/pod.uid", "1234"),
        ("csi.storage.k8s.io/ephemeral", "true"),
    ];
    csi::NodePublishVolumeRequest {
        volume_id: "csi-1".into(),
        target_path: target.to_str().unwrap().into(),
        volume_capability: Some(csi::VolumeCapability {
            access_mode: Some(AccessMode { mode: Mode::SingleNodeWriter.into() }),
            access_type: Some(AccessType::Mount(MountVolume::default())),
        }),
        volume_context: context.map(|(key, value)| (key.into(), value.into())).into(),
        ..Default::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_published_volume_is_counted_with_its_pod_and_keeps_its_image() {
    if !is_root() || !std::path::Path::new("/usr/bin/unshare").exists() {
        eprintln!("SKIPPED: mounting needs root and unshare");
        return;
    }
    let home = Home::new();
    let reference = home.image("a", &[("w.bin", "12345")]);
    let kubelet = home.path("kubelet");
    let volume = kubelet.join("pods/1234/volumes/kubernetes.io~csi/model");
    std::fs::create_dir_all(&volume).unwrap();
    let images = home.path("images");
    let mut arguments = vec!["--csi", "true", "--kubelet-dir", kubelet.to_str().unwrap()];
    arguments.extend(["--csi-layout-folders", images.to_str().unwrap()]);
    let agent = home.agent_alone(&arguments);
    let driver = connect(&kubelet.join("plugins/csi.carport.dev/csi.sock")).await.unwrap();
    let mut node = NodeClient::new(driver);
    let mut locality = LocalityServiceClient::new(channel(&home).await);

    let target = volume.join("mount");
    node.node_publish_volume(publish(&reference, &target)).await.unwrap();
    let listed = until(&mut locality, |m| m.len() == 1 && m[0].mount_count == 1).await;
    let digest = listed.models[0].model.as_ref().unwrap().digest.clone();
    assert!(listed.models[0].pods.is_empty(), "pods only when they are asked for");
    assert!(listed.models[0].last_use_time.is_some());
    let question = v1::ListModelsRequest {
        read_mask: Some(prost_types::FieldMask { paths: vec!["pods".into()] }),
        ..Default::default()
    };
    let answer = locality.list_models(question).await.unwrap().into_inner();
    let pod = &answer.models[0].pods[0];
    assert_eq!((pod.namespace.as_str(), pod.name.as_str()), ("models", "server-0"));
    let whole = locality.get_node(v1::GetNodeRequest::default()).await.unwrap().into_inner();
    assert_eq!(whole.store.unwrap().mounted_bytes, 5);
    assert_eq!(agent.metric("carport_volumes"), Some(1.0));
    home.fails(&["rm", &reference]);

    let unpublish = csi::NodeUnpublishVolumeRequest {
        volume_id: "csi-1".into(),
        target_path: target.to_str().unwrap().into(),
    };
    node.node_unpublish_volume(unpublish).await.unwrap();
    until(&mut locality, |m| m.len() == 1 && m[0].mount_count == 0).await;
    home.json(&["rm", &reference]);
    until(&mut locality, <[_]>::is_empty).await;

    let elsewhere = format!("oci:{}:v1", home.path("elsewhere").display());
    let refused = node.node_publish_volume(publish(&elsewhere, &target)).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied, "{refused:?}");
    assert!(!target.exists());
    let line = agent.event("publish volume");
    assert_eq!((&line["result"], &line["pod"]), (&"OK".into(), &"models/server-0".into()));
    assert_eq!(line["digest"], digest.as_str());
    let line = agent.event("unpublish volume");
    assert_eq!((&line["result"], &line["pod"]), (&"OK".into(), &"models/server-0".into()));
    assert_eq!((&line["volume"], &line["digest"]), (&"csi-1".into(), &digest.as_str().into()));
    let line = agent.event("publish volume");
    assert_eq!((&line["level"], &line["result"]), (&"WARN".into(), &"PERMISSION_DENIED".into()));
    assert!(line["why"].as_str().unwrap().contains("csi.layoutFolders"), "{line}");
    let count = |operation, code| {
        let labels = format!("{{operation=\"{operation}\",code=\"{code}\"}}");
        agent.metric(&format!("carport_volume_calls_total{labels}")).unwrap()
    };
    assert_eq!((count("publish", "OK"), count("unpublish", "OK")), (1.0, 1.0));
    assert_eq!(count("publish", "PERMISSION_DENIED"), 1.0);
    stop(agent).await;
}
