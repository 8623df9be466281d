//! The same, against the library of this machine's driver, where there is one.

use std::process::Command;

use super::*;

/// Set by `make test-gpu`: without a GPU the test then fails instead of skipping.
const REQUIRED: &str = "CARPORT_TEST_GPU";

#[tokio::test]
async fn the_real_library_tells_what_nvidia_smi_tells() {
    let inventory = look_once(GpuOptions::default(), PATIENCE).await.unwrap();
    if inventory.provider.state != ProviderState::Ok {
        let why = format!("{}: {}", inventory.provider.state, inventory.provider.message);
        assert!(std::env::var_os(REQUIRED).is_none(), "no GPU to test with: {why}");
        eprintln!("skipped: no GPU here: {why}");
        return;
    }
    println!("{}", serde_json::to_string_pretty(&inventory).unwrap());
    for gpu in &inventory.gpus {
        assert!(gpu.uuid.as_ref().is_some_and(|uuid| uuid.starts_with("GPU-")), "{gpu:?}");
        let memory = gpu.memory.expect("memory");
        let parts = memory.used_bytes + memory.free_bytes + memory.reserved_bytes.unwrap_or(0);
        assert!(parts <= memory.total_bytes && memory.total_bytes > 0, "{memory:?}");
        assert!(gpu.compute_capability.is_some() && gpu.architecture.is_some(), "{gpu:?}");
    }
    let pairs = inventory.gpus.len() * (inventory.gpus.len() - 1) / 2;
    assert_eq!(inventory.links.len(), pairs, "one a pair");

    let fields = "index,uuid,name,driver_version,memory.total,compute_cap";
    let smi = Command::new("nvidia-smi")
        .args([&format!("--query-gpu={fields}"), "--format=csv,noheader,nounits"])
        .output();
    let Ok(smi) = smi else {
        eprintln!("skipped: no nvidia-smi to compare with");
        return;
    };
    let ours: Vec<String> = inventory
        .gpus
        .iter()
        .map(|gpu| {
            let text = |text: &Option<String>| text.clone().unwrap_or_default();
            let memory = gpu.memory.map_or(0, |memory| memory.total_bytes >> 20);
            let capability = gpu.compute_capability.map(|c| c.to_string());
            [
                gpu.index.to_string(),
                text(&gpu.uuid),
                text(&gpu.product),
                text(&inventory.driver_version),
                memory.to_string(),
                text(&capability),
            ]
            .join(", ")
        })
        .collect();
    let theirs = String::from_utf8(smi.stdout).unwrap();
    assert_eq!(ours, theirs.lines().collect::<Vec<_>>());
}
