//! The real probe, through nvml-wrapper, against the fake library.

use std::path::Path;
use std::time::Duration;

use fake_nvml::{
    Device, FakeNvml, Memory, Mig as FakeMig, MigDevice as FakePart, NvLink, Process, Scenario,
    code,
};
use tempfile::TempDir;

use super::conformance::{PATIENCE, QUICK, Scene, suite, wait_for};
use super::inventory::*;
use super::links::{Fabric, GpuLink, LinkType, PcieLink};
use super::mig::{Mig, MigDevice, MigProfile};
use super::nvml::NvmlProbe;
use super::probe::{GpuProbe as _, ProbeError, Sample};
use super::sysfs::Sysfs;
use super::{GpuOptions, look_once, start, xid};

mod cost;
mod faults;
mod parts;
mod real;
mod smi;

fn probe(fake: &FakeNvml, sysfs: &Path) -> NvmlProbe {
    NvmlProbe::new(Some(fake.library()), Sysfs::new(sysfs), xid::FATAL.to_vec())
}

fn look(scenario: &Scenario) -> Result<Sample, ProbeError> {
    let fake = FakeNvml::new(scenario);
    probe(&fake, Path::new("/nonexistent")).sample()
}

fn node(devices: Vec<Device>) -> Scenario {
    Scenario { devices, ..Scenario::default() }
}

fn one(device: Device) -> Gpu {
    let sample = look(&node(vec![device])).unwrap();
    sample.gpus.into_iter().next().unwrap()
}

fn quick(fake: &FakeNvml) -> GpuOptions {
    GpuOptions {
        library: Some(fake.library()),
        interval: QUICK.interval,
        retry_interval: QUICK.retry_interval,
        ..GpuOptions::default()
    }
}

fn sysfs_with_module(version: &str) -> TempDir {
    let sysfs = tempfile::tempdir().unwrap();
    let module = sysfs.path().join("module/nvidia");
    std::fs::create_dir_all(&module).unwrap();
    std::fs::write(module.join("version"), format!("{version}\n")).unwrap();
    sysfs
}

#[test]
fn nvml_conforms() {
    let fake = FakeNvml::not_yet_there();
    let mut probe = probe(&fake, Path::new("/nonexistent"));
    let show = |scene| {
        let scenario = match scene {
            Scene::Nothing => return,
            Scene::Gpus(count) => Scenario::h100s(count),
            Scene::OneLost { count, lost } => {
                let mut scenario = Scenario::h100s(count);
                let device = Device::h100(lost).failing("*", code::GPU_IS_LOST);
                scenario.devices[lost as usize] = device;
                scenario
            }
        };
        if fake.library().exists() {
            fake.set(&scenario);
        } else {
            fake.appear(&scenario, &[]);
        }
    };
    suite(&mut probe, &show);
}

#[test]
fn every_field_of_a_gpu_is_read() {
    let sysfs = tempfile::tempdir().unwrap();
    let pci = sysfs.path().join("bus/pci/devices/0000:1b:00.0");
    std::fs::create_dir_all(&pci).unwrap();
    std::fs::write(pci.join("numa_node"), "1\n").unwrap();
    std::fs::write(pci.join("local_cpulist"), "0-31,64-95\n").unwrap();
    let device = Device {
        memory: Some(Memory { total: 85_520_809_984, reserved: 577_765_376, used: 1 << 30 }),
        utilization_percent: Some((37, 5)),
        pcie: Some([1, 16, 5, 16]),
        fabric: Some(([1; 16], 7)),
        remapped_rows: Some((1, false, false)),
        ecc_uncorrected: Some(2),
        throttle_reasons: Some(0x1 | 0x4 | 0x1000),
        processes: vec![
            Process { pid: 4242, used_bytes: Some(1 << 30) },
            Process { pid: 4243, used_bytes: None },
        ],
        ..Device::h100(0)
    };
    let fake = FakeNvml::new(&node(vec![device]));
    let sample = probe(&fake, sysfs.path()).sample().unwrap();
    assert_eq!(sample.driver_version.as_deref(), Some("550.54.15"));
    assert_eq!(sample.nvml_version.as_deref(), Some("12.550.54.15"));
    assert_eq!(sample.cuda_driver_version.as_deref(), Some("12.4"));
    let expected = Gpu {
        uuid: Some("GPU-00000000-0000-4000-8000-000000000000".into()),
        index: 0,
        minor_number: Some(0),
        pci_bus_id: Some("0000:1b:00.0".into()),
        numa_node: Some(1),
        cpu_list: Some("0-31,64-95".into()),
        product: Some("NVIDIA H100 80GB HBM3".into()),
        brand: Some("NVIDIA".into()),
        architecture: Some(Architecture { name: Some("Hopper".into()), code: 9 }),
        compute_capability: Some(ComputeCapability { major: 9, minor: 0 }),
        serial: Some("1655023000000".into()),
        memory: Some(GpuMemory {
            total_bytes: 85_520_809_984,
            used_bytes: 1_073_741_824,
            free_bytes: 83_869_302_784,
            reserved_bytes: Some(577_765_376),
            bar1_total_bytes: Some(137_438_953_472),
            bar1_used_bytes: Some(1_048_576),
        }),
        mig: Some(Mig { capable: true, profiles: parts::profiles(None), ..Mig::default() }),
        fabric: Some(Fabric {
            cluster_uuid: "01010101-0101-0101-0101-010101010101".into(),
            clique_id: 7,
        }),
        faults: Faults {
            last_xid: None,
            last_xid_at: None,
            ecc_uncorrected_volatile: Some(2),
            remapped_rows_uncorrectable: Some(1),
            remap_pending: Some(false),
            remap_failed: Some(false),
            recovery_action: Some(RecoveryAction::None),
        },
        pcie_root: None,
        pcie: PcieLink {
            generation: Some(1),
            width: Some(16),
            max_generation: Some(5),
            max_width: Some(16),
        },
        health: Health { state: HealthState::Ok, reasons: vec![] },
        telemetry: Telemetry {
            utilization_ratio: Some(0.37),
            memory_bus_utilization_ratio: Some(0.05),
            power_watts: Some(69.42),
            power_limit_watts: Some(700.0),
            temperature_celsius: Some(31.0),
            throttle_reasons: Some(vec!["SW_POWER_CAP".into(), "UNKNOWN_0x1000".into()]),
        },
        persistence_mode: Some(true),
        ecc_enabled: Some(true),
        processes: Some(vec![
            GpuProcess { pid: 4242, used_memory_bytes: Some(1_073_741_824) },
            GpuProcess { pid: 4243, used_memory_bytes: None },
        ]),
        allocatable: None,
        allocations: vec![],
    };
    assert_eq!(sample.gpus, [expected]);
}

#[test]
fn eight_gpus_are_eight() {
    let sample = look(&Scenario::h100s(8)).unwrap();
    let buses: Vec<_> = sample.gpus.iter().filter_map(|gpu| gpu.pci_bus_id.as_deref()).collect();
    let expected = [0x1b, 0x1c, 0x1d, 0x1e, 0x1f, 0x20, 0x21, 0x22];
    assert_eq!(buses, expected.map(|bus| format!("0000:{bus:02x}:00.0")));
}

#[test]
fn mig_on_off_and_impossible_are_told_apart() {
    let on = Device { mig: Some(FakeMig { current: true, pending: true }), ..Device::h100(0) };
    let pending = Device { mig: Some(FakeMig { current: false, pending: true }), ..on.clone() };
    let cannot = Device { mig: None, ..on.clone() };
    let mig = |device| {
        let mig = one(device).mig.unwrap();
        (mig.capable, mig.enabled, mig.pending_enabled)
    };
    assert_eq!(mig(on), (true, true, true));
    assert_eq!(mig(pending), (true, false, true));
    assert_eq!(mig(cannot), (false, false, false));
}

#[test]
fn what_a_gpu_does_not_measure_is_none_and_no_sickness() {
    let gpu = one(Device {
        memory: None,
        bar1_bytes: None,
        serial: None,
        minor: None,
        ecc: None,
        utilization_percent: None,
        power_milliwatts: None,
        temperature_celsius: None,
        mig: None,
        pcie: None,
        nvlinks: vec![],
        remapped_rows: None,
        recovery_action: None,
        ecc_uncorrected: None,
        throttle_reasons: None,
        ..Device::h100(0)
    });
    assert_eq!(gpu.health, Health::ok());
    assert_eq!(gpu.faults, Faults::default());
    assert_eq!(gpu.pcie, PcieLink::default());
    assert_eq!(gpu.fabric, None);
    assert_eq!(gpu.memory, None);
    assert_eq!(gpu.serial, None);
    assert_eq!(gpu.minor_number, None);
    assert_eq!(gpu.ecc_enabled, None);
    assert_eq!(gpu.telemetry, Telemetry::default());
    assert_eq!(gpu.processes, Some(vec![]), "none is a measurement");
}

#[test]
fn a_generation_newer_than_this_program_keeps_its_code() {
    let gpu = one(Device { architecture: 12, ..Device::h100(0) });
    assert_eq!(gpu.architecture, Some(Architecture { name: None, code: 12 }));
    assert_eq!(gpu.health, Health::ok());
}

#[test]
fn a_text_that_is_none_is_not_told_and_no_sickness() {
    let odd = Device { name: "NVIDIA \u{fffd}".into(), ..Device::h100(0) };
    let gpu = one(Device { serial: Some("\u{fffd}".into()), ..odd });
    assert_eq!((gpu.product, gpu.serial), (None, None));
    assert_eq!(gpu.health, Health::ok());
    // Without a name of its own it cannot be given to anybody.
    let gpu = one(Device { uuid: "GPU-\u{fffd}".into(), ..Device::h100(0) });
    assert_eq!((gpu.uuid, gpu.health.state), (None, HealthState::Unknown));
}

#[test]
fn the_library_of_an_old_driver_gives_what_it_has() {
    let missing = [
        "nvmlDeviceGetMemoryInfo_v2",
        "nvmlDeviceGetMigMode",
        "nvmlDeviceGetArchitecture",
        "nvmlDeviceGetComputeRunningProcesses_v2",
        "nvmlDeviceGetComputeRunningProcesses_v3",
        "nvmlDeviceGetCurrentClocksEventReasons",
        "nvmlSystemGetCudaDriverVersion_v2",
        "nvmlDeviceGetRemappedRows",
        "nvmlDeviceGetFieldValues",
        "nvmlDeviceGetGpuFabricInfo",
        "nvmlDeviceGetGpuFabricInfoV",
        "nvmlDeviceGetNvLinkState",
        "nvmlEventSetCreate",
    ];
    let fake = FakeNvml::without_symbols(&Scenario::h100s(1), &missing);
    let sample = probe(&fake, Path::new("/nonexistent")).sample().unwrap();
    assert_eq!(sample.cuda_driver_version, None);
    let gpu = &sample.gpus[0];
    assert_eq!(gpu.health, Health::ok());
    assert_eq!(gpu.memory.unwrap().total_bytes, 81_559 << 20);
    assert_eq!(gpu.memory.unwrap().reserved_bytes, None);
    assert_eq!(gpu.architecture, None);
    assert_eq!(gpu.processes, None);
    assert_eq!(gpu.mig, Some(Mig::default()));
}

#[test]
fn one_lost_gpu_among_eight_hides_no_other() {
    let mut scenario = Scenario::h100s(8);
    let healthy = look(&scenario).unwrap();
    // It falls off in the middle of being asked.
    scenario.devices[5] = Device::h100(5).failing("nvmlDeviceGetMemoryInfo_v2", code::GPU_IS_LOST);
    let sample = look(&scenario).unwrap();
    for (at, gpu) in sample.gpus.iter().enumerate() {
        if at != 5 {
            assert_eq!(gpu, &healthy.gpus[at]);
        }
    }
    let lost = &sample.gpus[5];
    assert_eq!(lost.uuid, healthy.gpus[5].uuid);
    assert_eq!(lost.health.state, HealthState::Lost);
    assert_eq!(lost.health.reasons.len(), 1);
    assert_eq!(lost.health.reasons[0].code, "GPU_LOST");
    assert_eq!(lost.memory, None);
    assert_eq!(lost.telemetry, Telemetry::default(), "a lost gpu is asked no more");
}

#[test]
fn each_kind_of_sickness_has_its_code_and_state() {
    let health = |function: &str, code| {
        let health = one(Device::h100(0).failing(function, code)).health;
        (health.state, health.reasons.first().map_or(String::new(), |r| r.code.clone()))
    };
    let open = "nvmlDeviceGetHandleByIndex_v2";
    let power = "nvmlDeviceGetPowerUsage";
    let is = |state, code: &str| (state, code.to_owned());
    assert_eq!(
        health(power, code::RESET_REQUIRED),
        is(HealthState::Unhealthy, "GPU_RESET_REQUIRED")
    );
    assert_eq!(health(power, code::UNKNOWN), is(HealthState::Warning, "GPU_DRIVER_ERROR"));
    assert_eq!(health(power, code::NOT_SUPPORTED), is(HealthState::Ok, ""));
    assert_eq!(health(power, code::NO_PERMISSION), is(HealthState::Ok, ""));
    assert_eq!(health(open, code::UNKNOWN).0, HealthState::Unhealthy);
    assert_eq!(health(open, code::NO_PERMISSION), is(HealthState::Unknown, "GPU_NOT_READABLE"));
    assert_eq!(health("nvmlDeviceGetUUID", 1234), is(HealthState::Unknown, "GPU_NOT_READABLE"));
}

#[test]
fn a_missing_library_is_named_with_what_to_do() {
    let fake = FakeNvml::not_yet_there();
    let error = probe(&fake, Path::new("/nonexistent")).sample().unwrap_err();
    assert_eq!(error.state, ProviderState::NoLibrary);
    let library = fake.library().display().to_string();
    assert!(error.message.starts_with(&format!("load {library}: ")), "{error}");
    assert!(error.message.contains("No such file or directory"), "{error}");
}

#[test]
fn a_file_that_is_not_nvml_is_no_library() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("libnvidia-ml.so.1");
    std::fs::write(&path, "text").unwrap();
    let error =
        NvmlProbe::new(Some(path), Sysfs::new("/nonexistent"), vec![]).sample().unwrap_err();
    assert_eq!(error.state, ProviderState::NoLibrary);

    let other = FakeNvml::without_symbols(&Scenario::default(), &["nvmlInit_v2"]);
    let error = probe(&other, Path::new("/nonexistent")).sample().unwrap_err();
    assert_eq!(error.state, ProviderState::Error);
    assert!(error.message.contains("is not an NVML library"), "{error}");
}

#[test]
fn a_driver_that_is_not_loaded_and_one_out_of_reach_are_told_apart() {
    let fake = FakeNvml::new(&Scenario::default().failing("nvmlInit_v2", code::DRIVER_NOT_LOADED));
    let error = probe(&fake, Path::new("/nonexistent")).sample().unwrap_err();
    assert_eq!(error.state, ProviderState::NoDriver);
    assert!(error.message.starts_with("the nvidia kernel module is not loaded"), "{error}");

    let sysfs = sysfs_with_module("550.54.15");
    let error = probe(&fake, sysfs.path()).sample().unwrap_err();
    assert_eq!(error.state, ProviderState::NoDriver);
    assert!(error.message.contains("550.54.15 is loaded but not in reach"), "{error}");
}

#[test]
fn no_permission_and_version_mismatch_are_told_apart() {
    for refusal in [code::NO_PERMISSION, code::OPERATING_SYSTEM] {
        let error = look(&Scenario::h100s(1).failing("nvmlInit_v2", refusal)).unwrap_err();
        assert_eq!(error.state, ProviderState::NoPermission);
    }

    let scenario = Scenario::h100s(1).failing("nvmlInit_v2", code::LIB_RM_VERSION_MISMATCH);
    let fake = FakeNvml::new(&scenario);
    let sysfs = sysfs_with_module("535.183.01");
    let error = probe(&fake, sysfs.path()).sample().unwrap_err();
    assert_eq!(error.state, ProviderState::VersionMismatch);
    assert!(error.message.contains("kernel module (535.183.01)"), "{error}");
}

#[test]
fn return_codes_newer_than_the_wrapper_are_no_panic() {
    let error = look(&Scenario::h100s(1).failing("nvmlInit_v2", 4711)).unwrap_err();
    assert_eq!(error.state, ProviderState::Error);
    assert!(error.message.starts_with("nvml: nvml error 4711"), "{error}");
    let error = look(&Scenario::h100s(1).failing("nvmlInit_v2", 28)).unwrap_err();
    assert_eq!(error.state, ProviderState::NoDevices);
}

#[test]
fn a_driver_that_goes_away_between_two_looks_closes_the_session() {
    let fake = FakeNvml::new(&Scenario::h100s(1));
    let mut probe = probe(&fake, Path::new("/nonexistent"));
    let first = probe.sample().unwrap();
    fake.set(&Scenario::h100s(1).failing("nvmlDeviceGetCount_v2", code::DRIVER_NOT_LOADED));
    assert_eq!(probe.sample().unwrap_err().state, ProviderState::NoDriver);
    fake.set(&Scenario::h100s(1));
    assert_eq!(probe.sample().unwrap().session, first.session + 1);
}

#[tokio::test]
async fn a_node_without_devices_says_so_and_finds_the_one_that_comes() {
    let fake = FakeNvml::new(&Scenario::h100s(0));
    let handle = start(quick(&fake)).unwrap();
    let reader = handle.reader();
    let none = wait_for(&reader, |it| it.provider.state == ProviderState::NoDevices).await;
    assert_eq!(none.driver_version.as_deref(), Some("550.54.15"));
    assert!(none.sampled_at.is_some());
    fake.set(&Scenario::h100s(1));
    let found = wait_for(&reader, |it| it.provider.state == ProviderState::Ok).await;
    assert_eq!(found.gpus.len(), 1);
    handle.shutdown(PATIENCE).await;
}

#[tokio::test]
async fn a_library_that_is_installed_later_is_found() {
    let fake = FakeNvml::not_yet_there();
    let handle = start(quick(&fake)).unwrap();
    let reader = handle.reader();
    wait_for(&reader, |it| it.provider.state == ProviderState::NoLibrary).await;
    fake.appear(&Scenario::h100s(2), &[]);
    let found = wait_for(&reader, |it| it.provider.state == ProviderState::Ok).await;
    assert_eq!(found.gpus.len(), 2);
    handle.shutdown(PATIENCE).await;
}

#[tokio::test]
async fn an_upgrade_of_the_driver_under_a_running_agent_is_followed() {
    let old = ["nvmlDeviceGetMemoryInfo_v2"];
    let fake = FakeNvml::without_symbols(&Scenario::h100s(1), &old);
    let handle = start(quick(&fake)).unwrap();
    let reader = handle.reader();
    let reserved = |it: &GpuInventory| it.gpus.first().and_then(|gpu| gpu.memory?.reserved_bytes);
    let before = wait_for(&reader, |it| it.provider.state == ProviderState::Ok).await;
    assert_eq!(reserved(&before), None);
    // The module is the new one, the library still the old one.
    let mismatch = code::LIB_RM_VERSION_MISMATCH;
    let upgraded = Scenario { driver_version: "580.65.06".into(), ..Scenario::h100s(1) };
    let between = upgraded.clone().failing("nvmlDeviceGetCount_v2", mismatch);
    let between = between.failing("nvmlInit_v2", mismatch);
    fake.set(&between);
    wait_for(&reader, |it| it.provider.state == ProviderState::VersionMismatch).await;
    fake.appear(&between, &[]);
    fake.set(&upgraded);
    let after = wait_for(&reader, |it| it.provider.state == ProviderState::Ok).await;
    assert_eq!(after.driver_version.as_deref(), Some("580.65.06"));
    assert!(reserved(&after).is_some(), "the library that was loaded is the new one");
    assert!(after.generation > before.generation);
    handle.shutdown(PATIENCE).await;
}

#[tokio::test]
async fn a_driver_call_that_hangs_makes_the_inventory_stale() {
    let fake = FakeNvml::new(&Scenario::h100s(2));
    let mut scenario = Scenario::h100s(2);
    // For longer than the test; the process's end takes the thread along.
    scenario.devices[1].hang_ms.insert("nvmlDeviceGetPowerUsage".into(), 3_600_000);
    turns_stale(&fake, &scenario).await;
}

/// In whatever call it hangs, also in those between two looks and at a fresh start.
#[tokio::test]
async fn a_driver_that_hangs_in_any_call_makes_the_inventory_stale() {
    for function in [
        "nvmlDeviceGetCount_v2",
        "nvmlDeviceGetHandleByIndex_v2",
        "nvmlDeviceGetComputeRunningProcesses_v3",
        "nvmlDeviceGetMigMode",
        "nvmlDeviceGetFieldValues",
        "nvmlEventSetWait_v2",
        "nvmlEventSetFree",
        "nvmlShutdown",
        "nvmlInit_v2",
        "nvmlEventSetCreate",
        "nvmlDeviceRegisterEvents",
    ] {
        let fake = FakeNvml::new(&Scenario::h100s(2));
        let mut scenario = Scenario::h100s(2);
        // For a sick one the library is closed and opened afresh.
        scenario.devices[0] = Device::h100(0).failing("*", code::GPU_IS_LOST);
        scenario.hang_ms.insert(function.into(), 3_600_000);
        scenario.devices[1].hang_ms.insert(function.into(), 3_600_000);
        println!("{function}");
        turns_stale(&fake, &scenario).await;
    }
}

async fn turns_stale(fake: &FakeNvml, scenario: &Scenario) {
    let handle = start(quick(fake)).unwrap();
    let reader = handle.reader();
    wait_for(&reader, |it| it.provider.state == ProviderState::Ok).await;
    fake.set(scenario);
    let stale = async {
        let mut tick = tokio::time::interval(Duration::from_millis(1));
        loop {
            tick.tick().await;
            let inventory = reader.current();
            if inventory.provider.state == ProviderState::Stale {
                return inventory;
            }
        }
    };
    let stale = tokio::time::timeout(PATIENCE, stale).await.expect("never stale");
    assert_eq!(stale.gpus.len(), 2);
    handle.shutdown(Duration::from_millis(1)).await;
}

#[tokio::test]
async fn one_look_is_enough_for_a_command() {
    let fake = FakeNvml::new(&Scenario::h100s(8));
    let inventory = look_once(quick(&fake), PATIENCE).await.unwrap();
    assert_eq!(inventory.provider.state, ProviderState::Ok);
    assert_eq!(inventory.gpus.len(), 8);

    let mut scenario = Scenario::h100s(1);
    scenario.hang_ms.insert("nvmlInit_v2".into(), 3_600_000);
    let fake = FakeNvml::new(&scenario);
    let inventory = look_once(quick(&fake), Duration::from_millis(1)).await.unwrap();
    assert_eq!(inventory.provider.state, ProviderState::Stale);
    assert_eq!(inventory.gpus, []);
}
