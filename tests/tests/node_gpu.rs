//! GPUs through the whole agent, with a library that answers like NVIDIA's.

#![allow(clippy::unwrap_used)] // a test that cannot go on says where

use carport_tests::carport::binary;
use carport_tests::images::{Image, Tar};
use carport_tests::node::{Node, Setup, eventually};
use carport_tests::scripted::{Gate, Scripted};
use fake_nvml::{Device, FakeNvml, Process, Scenario, code};
use serde_json::Value;

/// A node with these GPUs and one model, ready.
async fn node(fake: &FakeNvml) -> Option<(Scripted, Node, String)> {
    let image = Image::of(&[Tar::default().file("models/w.bin", b"weights").end()]);
    let server = image.serve(&Gate::closed_at(u64::MAX)).await;
    let setup = Setup {
        gpu_library: Some(fake.library()),
        config: Some("gpu: {interval: 100ms}\n".into()),
        ..Setup::plain_http(&[&server.host()])
    };
    let node = Node::set_up(binary(), setup)?;
    let name = format!("{}/team/model:v1", server.host());
    node.json(&["pull", &name]);
    eventually("the model is known", async || {
        node.json(&["locate", &name])[0]["missing_bytes"] == 0
    })
    .await;
    eventually("the GPUs have been looked at", async || {
        node.json(&["gpus"])["provider"]["state"] != "stale"
    })
    .await;
    Some((server, node, name))
}

fn uuid(index: usize) -> String {
    format!("GPU-00000000-0000-4000-8000-{index:012x}")
}

#[tokio::test(flavor = "multi_thread")]
async fn eight_gpus_are_listed_and_free_ones_are_offered() {
    let mut scenario = Scenario::h100s(8);
    scenario.devices[5].processes = vec![Process { pid: 4242, used_bytes: Some(10 << 30) }];
    scenario.devices[5].memory.as_mut().unwrap().used = 10 << 30;
    let fake = FakeNvml::new(&scenario);
    let Some((_server, node, name)) = node(&fake).await else { return };

    let inventory = node.json(&["gpus"]);
    assert_eq!(inventory["provider"]["state"], "ok");
    assert_eq!(inventory["driver_version"], "550.54.15");
    assert_eq!(inventory["cuda_driver_version"], "12.4");
    let gpus = inventory["gpus"].as_array().unwrap();
    assert_eq!(gpus.len(), 8);
    for (index, gpu) in gpus.iter().enumerate() {
        assert_eq!(gpu["index"], index);
        assert_eq!(gpu["uuid"], uuid(index));
        assert_eq!(gpu["product"], "NVIDIA H100 80GB HBM3");
        assert_eq!(gpu["memory"]["total_bytes"], 81_559_u64 << 20);
        assert_eq!(gpu["health"]["state"], "ok");
    }
    assert_eq!(gpus[5]["processes"][0]["pid"], 4242);
    let text = node.carport().arg("gpus").output().unwrap();
    let text = String::from_utf8(text.stdout).unwrap();
    assert!(text.starts_with("Driver 550.54.15, NVML 12.550.54.15, CUDA 12.4\n"), "{text}");
    assert_eq!(text.matches("NVIDIA H100 80GB HBM3").count(), 8, "{text}");
    assert_eq!(node.json(&["status"])["gpus"]["gpus"].as_array().unwrap().len(), 8);
    node.metric_becomes("carport_gpus{state=\"ok\"}", 8.0).await;
    node.metric_becomes("carport_gpu_provider{state=\"ok\"}", 1.0).await;

    let ask = |more: &[&str]| {
        let mut arguments = vec!["locate", name.as_str()];
        arguments.extend(more);
        node.json(&arguments)[0].clone()
    };
    let suits = ask(&["--gpus", "7", "--gpu-memory", "80GB"]);
    assert_eq!((&suits["score"], &suits["gpu"]["free_count"]), (&100.into(), &7.into()));
    let candidates = suits["gpu"]["candidate_uuids"].as_array().unwrap();
    assert!(!candidates.contains(&Value::from(uuid(5))), "the busy one is not offered");
    for more in [
        &["--gpus", "8"][..],
        &["--gpus", "1", "--gpu-memory", "90GB"],
        &["--gpus", "1", "--compute-capability", "10.0"],
        &["--gpus", "1", "--gpu-product", "B200"],
    ] {
        let node = ask(more);
        assert_eq!(node["score"], 0, "{more:?}");
        assert_eq!(node["reasons"][0]["code"], "GPU_MISMATCH", "{more:?}");
        assert_eq!(node["missing_bytes"], 0, "the model is here all the same");
    }
    for more in [
        &["--gpus", "1", "--compute-capability", "9.0"][..],
        &["--gpus", "2", "--gpu-product", "H[12]00"],
    ] {
        assert_eq!(ask(more)["score"], 100, "{more:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_gpu_does_not_hide_the_others() {
    let fake = FakeNvml::new(&Scenario::h100s(4));
    let Some((_server, node, name)) = node(&fake).await else { return };
    assert_eq!(node.json(&["locate", &name, "--gpus", "4"])[0]["score"], 100);

    let mut scenario = Scenario::h100s(4);
    scenario.devices[2] = Device::h100(2).failing("*", code::GPU_IS_LOST);
    fake.set(&scenario);
    node.metric_becomes("carport_gpus{state=\"lost\"}", 1.0).await;
    node.metric_becomes("carport_gpus{state=\"ok\"}", 3.0).await;
    let inventory = node.json(&["gpus"]);
    let gpus = inventory["gpus"].as_array().unwrap();
    assert_eq!(gpus.len(), 4, "the lost one is still told of: {inventory}");
    let states: Vec<&str> =
        gpus.iter().map(|gpu| gpu["health"]["state"].as_str().unwrap()).collect();
    assert_eq!(states.iter().filter(|state| **state == "ok").count(), 3, "{states:?}");
    let lost = gpus.iter().find(|gpu| gpu["health"]["state"] == "lost").unwrap();
    assert_eq!(lost["health"]["reasons"][0]["code"], "GPU_LOST");
    assert_eq!(lost["uuid"], uuid(2), "which one it was is remembered");
    let three = &node.json(&["locate", &name, "--gpus", "3"])[0];
    assert_eq!((&three["score"], &three["gpu"]["free_count"]), (&100.into(), &3.into()));
    assert_eq!(node.json(&["locate", &name, "--gpus", "4"])[0]["score"], 0);
    // Volumes do not care.
    let pod = node.pod("pod-a");
    node.publish(&pod, &name).await.unwrap();
    node.unpublish(&pod).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_driver_that_hangs_or_is_not_there_keeps_nobody_waiting() {
    let absent = FakeNvml::not_yet_there();
    let Some((_server, node_without, name)) = node(&absent).await else { return };
    let inventory = node_without.json(&["gpus"]);
    assert_eq!(inventory["provider"]["state"], "no_library");
    let library = absent.library();
    let message = inventory["provider"]["message"].as_str().unwrap();
    assert!(message.contains(library.to_str().unwrap()), "{message}");
    assert_eq!(node_without.json(&["locate", &name])[0]["score"], 100);
    drop(node_without);

    let fake = FakeNvml::new(&Scenario::h100s(2));
    let Some((_server, node_after, name)) = node(&fake).await else { return };
    assert_eq!(node_after.json(&["locate", &name, "--gpus", "1"])[0]["score"], 100);
    let mut scenario = Scenario::h100s(2);
    scenario.hang_ms.insert("nvmlEventSetWait_v2".into(), 600_000);
    fake.set(&scenario);
    eventually("it is stale", async || node_after.json(&["gpus"])["provider"]["state"] == "stale")
        .await;
    assert_eq!(node_after.json(&["gpus"])["gpus"].as_array().unwrap().len(), 2);
    let asked = node_after.json(&["locate", &name, "--gpus", "1"])[0].clone();
    assert_eq!((&asked["score"], &asked["gpu"]["free_count"]), (&0.into(), &0.into()), "{asked}");
    let why = asked["reasons"][0]["message"].as_str().unwrap();
    assert!(why.contains("nvml has not answered for "), "{why}");
    drop(node_after);

    let mut scenario = Scenario::h100s(1);
    scenario.hang_ms.insert("nvmlInit_v2".into(), 600_000);
    let hanging = FakeNvml::new(&scenario);
    let Some(mut node) = Node::start_with(binary(), &[], Some(&hanging.library())) else { return };
    let inventory = node.json(&["gpus"]);
    assert_eq!(inventory["provider"]["state"], "stale", "{inventory}");
    node.register(None).await;
    assert_eq!(node.page("/readyz").await.0, 200);
    let began = std::time::Instant::now();
    assert!(node.stop_agent().success());
    assert!(began.elapsed().as_secs() < 10, "{:?}", began.elapsed());
}
