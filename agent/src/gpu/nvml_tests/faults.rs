//! What makes a GPU sick, and what makes it well.

use super::*;

/// `count` GPUs, of which one has reported errors.
fn hit(count: u32, at: usize, xids: &[u64]) -> Scenario {
    let mut scenario = Scenario::h100s(count);
    scenario.devices[at].xids = xids.to_vec();
    scenario
}

fn codes(gpu: &Gpu) -> Vec<&str> {
    gpu.health.reasons.iter().map(|reason| reason.code.as_str()).collect()
}

#[test]
fn a_fatal_error_makes_its_gpu_sick_and_no_other() {
    let fake = FakeNvml::new(&Scenario::h100s(3));
    let mut probe = probe(&fake, Path::new("/nonexistent"));
    probe.sample().unwrap();
    assert!(!probe.has_news());
    fake.set(&hit(3, 1, &[13, 48]));
    assert!(probe.has_news());
    let sample = probe.sample().unwrap();
    assert_eq!(sample.gpus[1].health.state, HealthState::Unhealthy);
    assert_eq!(codes(&sample.gpus[1]), ["GPU_XID_48"]);
    let message = &sample.gpus[1].health.reasons[0].message;
    assert!(message.starts_with("Xid 48: a memory error beyond correction; "), "{message}");
    assert_eq!(sample.gpus[1].faults.last_xid, Some(48));
    assert!(sample.gpus[1].faults.last_xid_at.is_some());
    for well in [0, 2] {
        assert_eq!(sample.gpus[well].health, Health::ok());
        assert_eq!(sample.gpus[well].faults.last_xid, None);
    }
    assert!(!probe.has_news(), "it is told once");
}

#[test]
fn an_applications_error_is_noted_and_no_sickness() {
    let fake = FakeNvml::new(&Scenario::h100s(1));
    let mut probe = probe(&fake, Path::new("/nonexistent"));
    probe.sample().unwrap();
    fake.set(&hit(1, 0, &[31]));
    let gpu = &probe.sample().unwrap().gpus[0];
    assert_eq!((gpu.health.state, gpu.faults.last_xid), (HealthState::Ok, Some(31)));
}

#[test]
fn a_flood_of_errors_of_one_gpu_hides_no_other_ones() {
    let fake = FakeNvml::new(&Scenario::h100s(2));
    let mut probe = probe(&fake, Path::new("/nonexistent"));
    probe.sample().unwrap();
    // NVML tells them in the order of the GPUs, here.
    let mut scenario = hit(2, 0, &[31; 100_000]);
    scenario.devices[0].xids.push(13);
    scenario.devices[1].xids = vec![79];
    fake.set(&scenario);
    let mut looks = 0;
    let sample = loop {
        let sample = probe.sample().unwrap();
        looks += 1;
        if sample.gpus[1].health.is_sick() {
            break sample;
        }
    };
    assert!(looks <= 12, "at a look a second {looks} are long");
    assert_eq!(codes(&sample.gpus[1]), ["GPU_XID_79"]);
    assert_eq!(sample.gpus[0].faults.last_xid, Some(13));
    assert!(!probe.has_news());
}

#[test]
fn which_errors_are_fatal_is_configured() {
    let fake = FakeNvml::new(&Scenario::h100s(1));
    let mut probe = NvmlProbe::new(Some(fake.library()), Sysfs::new("/nonexistent"), vec![31]);
    probe.sample().unwrap();
    fake.set(&hit(1, 0, &[79, 31]));
    assert_eq!(codes(&probe.sample().unwrap().gpus[0]), ["GPU_XID_31"]);
}

#[test]
fn an_error_of_a_gpu_that_is_lost_finds_it() {
    let fake = FakeNvml::new(&Scenario::h100s(2));
    let mut probe = probe(&fake, Path::new("/nonexistent"));
    probe.sample().unwrap();
    let mut scenario = hit(2, 1, &[79]);
    scenario.devices[1].errors.insert("*".into(), code::GPU_IS_LOST);
    fake.set(&scenario);
    let sample = probe.sample().unwrap();
    assert_eq!(sample.gpus[1].uuid, None, "it does not tell its name any more");
    assert_eq!(codes(&sample.gpus[1]), ["GPU_LOST", "GPU_XID_79"]);
    assert_eq!(sample.gpus[0].health, Health::ok());
}

#[tokio::test]
async fn a_sick_gpu_is_well_only_after_a_new_start_of_the_library() {
    let fake = FakeNvml::new(&Scenario::h100s(2));
    let handle = start(quick(&fake)).unwrap();
    let reader = handle.reader();
    wait_for(&reader, |it| it.gpus.len() == 2).await;
    // A new start hears no old errors; while the driver asks for a reset, it proves nothing.
    let mut scenario = hit(2, 1, &[95]);
    scenario.devices[1].recovery_action = Some(1);
    fake.set(&scenario);
    let sick = wait_for(&reader, |it| it.gpus[1].faults.last_xid == Some(95)).await;
    assert_eq!(sick.gpus[1].health.state, HealthState::Unhealthy);
    assert_eq!(sick.gpus[1].faults.recovery_action, Some(RecoveryAction::GpuReset));
    let still = wait_for(&reader, |it| codes(&it.gpus[1]) == ["GPU_RECOVERY_ACTION"]).await;
    assert_eq!(still.gpus[1].health.state, HealthState::Unhealthy);
    assert_eq!(still.gpus[0].health, Health::ok());

    scenario.devices[1].recovery_action = Some(0);
    fake.set(&scenario);
    let well = wait_for(&reader, |it| it.gpus[1].health == Health::ok()).await;
    assert_eq!(well.gpus[1].faults.last_xid, Some(95), "what it has been through is remembered");
    handle.shutdown(PATIENCE).await;
}

#[test]
fn rows_that_were_not_replaced_are_told_apart() {
    let health = |pending, failed| {
        let gpu = one(Device { remapped_rows: Some((1, pending, failed)), ..Device::h100(0) });
        (gpu.health.state, codes(&gpu).first().map(|code| (*code).to_owned()))
    };
    let is = |state, code: &str| (state, Some(code.to_owned()));
    assert_eq!(health(false, false), (HealthState::Ok, None));
    assert_eq!(health(true, false), is(HealthState::Warning, "GPU_ROW_REMAP_PENDING"));
    assert_eq!(health(true, true), is(HealthState::Unhealthy, "GPU_ROW_REMAP_FAILED"));
}

#[test]
fn what_the_driver_asks_for_decides() {
    let gpu = |code| one(Device { recovery_action: Some(code), ..Device::h100(0) });
    for (code, action, state) in [
        (0, RecoveryAction::None, HealthState::Ok),
        (1, RecoveryAction::GpuReset, HealthState::Unhealthy),
        (2, RecoveryAction::NodeReboot, HealthState::Unhealthy),
        (3, RecoveryAction::DrainP2p, HealthState::Unhealthy),
        (4, RecoveryAction::DrainAndReset, HealthState::Unhealthy),
        (9, RecoveryAction::Other(9), HealthState::Warning),
    ] {
        let gpu = gpu(code);
        assert_eq!((gpu.faults.recovery_action, gpu.health.state), (Some(action), state));
    }
}

#[test]
fn a_gpu_without_events_is_no_worse_for_it() {
    let scenario = Scenario::h100s(1).failing("nvmlDeviceRegisterEvents", code::NOT_SUPPORTED);
    let fake = FakeNvml::new(&scenario);
    let mut probe = probe(&fake, Path::new("/nonexistent"));
    assert_eq!(probe.sample().unwrap().gpus[0].health, Health::ok());
    assert!(!probe.has_news());
}

#[test]
fn a_library_without_the_end_of_events_is_closed_without_a_panic() {
    let missing = ["nvmlEventSetFree"];
    let fake = FakeNvml::without_symbols(&Scenario::h100s(1), &missing);
    let mut probe = probe(&fake, Path::new("/nonexistent"));
    probe.sample().unwrap();
    assert!(!probe.has_news());
    probe.close();
    assert_eq!(probe.sample().unwrap().gpus.len(), 1);
}

#[test]
fn an_older_driver_tells_the_fabric_in_the_older_way() {
    let device = Device { fabric: Some(([0xab; 16], 3)), ..Device::h100(0) };
    let missing = ["nvmlDeviceGetGpuFabricInfoV"];
    let fake = FakeNvml::without_symbols(&node(vec![device]), &missing);
    let mut sample = probe(&fake, Path::new("/nonexistent")).sample().unwrap();
    let fabric = sample.gpus.remove(0).fabric.unwrap();
    assert_eq!(fabric.cluster_uuid, "abababab-abab-abab-abab-abababababab");
    assert_eq!(fabric.clique_id, 3);
}

#[test]
fn a_driver_that_does_not_know_a_structs_version_is_asked_in_the_older_way() {
    let mismatch = code::ARGUMENT_VERSION_MISMATCH;
    let device = Device { fabric: Some(([0xab; 16], 3)), ..Device::h100(0) }
        .failing("nvmlDeviceGetGpuFabricInfoV", mismatch)
        .failing("nvmlDeviceGetGpuInstanceProfileInfoV", mismatch)
        .failing("nvmlDeviceGetMemoryInfo_v2", mismatch);
    let gpu = one(device);
    assert_eq!(gpu.fabric.unwrap().clique_id, 3);
    assert_eq!(gpu.mig.unwrap().profiles.len(), 3);
    assert_eq!(gpu.memory.unwrap().reserved_bytes, None);
    assert_eq!(gpu.health, Health::ok());
}

#[test]
fn gpus_on_the_switches_of_one_node_are_in_no_network_across_nodes() {
    let fabric = |uuid| one(Device { fabric: Some((uuid, 0)), ..Device::h100(0) }).fabric;
    assert_eq!(fabric([0; 16]), None);
    assert!(fabric([1; 16]).is_some());
}

#[test]
fn an_older_driver_tells_processes_and_throttling_in_the_older_way() {
    let device = Device {
        throttle_reasons: Some(0x4),
        processes: vec![Process { pid: 4242, used_bytes: Some(1 << 30) }],
        ..Device::h100(0)
    };
    let missing =
        ["nvmlDeviceGetComputeRunningProcesses_v3", "nvmlDeviceGetCurrentClocksEventReasons"];
    let fake = FakeNvml::without_symbols(&node(vec![device]), &missing);
    let mut sample = probe(&fake, Path::new("/nonexistent")).sample().unwrap();
    let gpu = sample.gpus.remove(0);
    assert_eq!(gpu.processes.unwrap()[0].pid, 4242);
    assert_eq!(gpu.telemetry.throttle_reasons.unwrap(), ["SW_POWER_CAP"]);
}
