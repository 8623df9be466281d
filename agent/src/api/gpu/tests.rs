//! What travels, and what comes back.

use std::time::{Duration, SystemTime};

use super::*;
use crate::gpu::{
    AllocationState, Architecture, ComputeCapability, Fabric, GpuProcess, MigDevice, MigProfile,
    Provider, Telemetry,
};

fn held(pod: &str) -> Allocation {
    Allocation {
        pod_namespace: "team".into(),
        pod_name: pod.into(),
        container: "server".into(),
        resource_name: Some("nvidia.com/gpu".into()),
        claim_name: Some("one".into()),
        shared: true,
    }
}

fn some_memory() -> GpuMemory {
    GpuMemory {
        total_bytes: 6,
        used_bytes: 1,
        free_bytes: 2,
        reserved_bytes: Some(3),
        bar1_total_bytes: Some(4),
        bar1_used_bytes: Some(5),
    }
}

/// A GPU in which each field has a value of its own.
fn full(index: u32) -> Gpu {
    let at = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
    let mut health = Health::ok();
    health.add(HealthState::Unhealthy, "GPU_XID_48", "look");
    Gpu {
        uuid: Some(format!("GPU-{index}")),
        index,
        minor_number: Some(7),
        pci_bus_id: Some("0000:1b:00.0".into()),
        pcie_root: Some("0000:16".into()),
        pcie: PcieLink {
            generation: Some(1),
            width: Some(8),
            max_generation: Some(5),
            max_width: Some(16),
        },
        numa_node: Some(1),
        cpu_list: Some("0-31".into()),
        product: Some("NVIDIA H100".into()),
        brand: Some("NVIDIA".into()),
        architecture: Some(Architecture { name: Some("Hopper".into()), code: 9 }),
        compute_capability: Some(ComputeCapability { major: 9, minor: 0 }),
        serial: Some("165".into()),
        memory: Some(some_memory()),
        mig: Some(Mig {
            capable: true,
            enabled: true,
            pending_enabled: true,
            devices: vec![MigDevice {
                uuid: Some("MIG-a".into()),
                slot: 1,
                profile: Some("1g.10gb".into()),
                gpu_instance_id: Some(8),
                compute_instance_id: Some(2),
                memory: Some(some_memory()),
                multiprocessor_count: Some(16),
                allocations: vec![held("b")],
            }],
            profiles: vec![MigProfile {
                name: "1g.10gb".into(),
                memory_bytes: 10,
                max_instances: 7,
                remaining_instances: Some(0),
            }],
        }),
        fabric: Some(Fabric { cluster_uuid: "ab".into(), clique_id: 0 }),
        health,
        faults: Faults {
            last_xid: Some(48),
            last_xid_at: Some(at),
            ecc_uncorrected_volatile: Some(2),
            remapped_rows_uncorrectable: Some(3),
            remap_pending: Some(true),
            remap_failed: Some(false),
            recovery_action: Some(RecoveryAction::DrainAndReset),
        },
        telemetry: Telemetry {
            utilization_ratio: Some(0.5),
            memory_bus_utilization_ratio: Some(0.25),
            power_watts: Some(69.5),
            power_limit_watts: Some(700.0),
            temperature_celsius: Some(31.0),
            throttle_reasons: Some(vec!["SW_POWER_CAP".into()]),
        },
        persistence_mode: Some(true),
        ecc_enabled: Some(false),
        processes: Some(vec![GpuProcess { pid: 1, used_memory_bytes: Some(2) }]),
        allocatable: Some(false),
        allocations: vec![held("a")],
    }
}

#[test]
fn nothing_is_lost_on_the_way() {
    let mut sent = GpuInventory::none(ProviderState::Ok, "");
    sent.provider = Provider { state: ProviderState::Stale, message: "old".into() };
    sent.driver_version = Some("550".into());
    sent.nvml_version = Some("12.550".into());
    sent.cuda_driver_version = Some("12.4".into());
    sent.gpus = vec![full(0), full(1)];
    sent.links = vec![GpuLink {
        uuid_a: "GPU-0".into(),
        uuid_b: "GPU-1".into(),
        kind: Some(LinkType::Nvswitch),
        link_count: 18,
        bandwidth_bytes_per_second: Some(9),
        p2p_read: Some(true),
        p2p_write: Some(false),
    }];
    sent.allocation =
        AllocationState { source: AllocationSource::PodResources, message: "of then".into() };
    sent.sampled_at = Some(SystemTime::UNIX_EPOCH);
    sent.generation = 4;
    assert_eq!(from_wire(&inventory(&sent)), sent);
}

#[test]
fn what_was_not_measured_arrives_as_that() {
    let mut gpu = Gpu::unknown(3);
    let part = MigDevice {
        uuid: Some("MIG-a".into()),
        slot: 0,
        profile: None,
        gpu_instance_id: None,
        compute_instance_id: None,
        memory: None,
        multiprocessor_count: None,
        allocations: vec![],
    };
    gpu.mig = Some(Mig { devices: vec![part], ..Mig::default() });
    let mut sent = GpuInventory::none(ProviderState::Ok, "");
    sent.gpus = vec![gpu];
    assert_eq!(from_wire(&inventory(&sent)), sent);
}

#[test]
fn each_kind_of_link_and_action_has_a_number() {
    use LinkType::{Node, Nvlink, Nvswitch, Phb, Pix, Pxb, SameBoard, Sys};
    for kind in [Nvlink, Nvswitch, SameBoard, Pix, Pxb, Phb, Node, Sys].map(Some) {
        let sent = GpuLink {
            uuid_a: "a".into(),
            uuid_b: "b".into(),
            kind,
            link_count: 0,
            bandwidth_bytes_per_second: None,
            p2p_read: None,
            p2p_write: None,
        };
        let mut whole = GpuInventory::none(ProviderState::Ok, "");
        whole.links = vec![sent.clone()];
        assert_eq!(from_wire(&inventory(&whole)).links, [sent]);
    }
    use RecoveryAction::{DrainAndReset, DrainP2p, GpuReset, NodeReboot, Other};
    let nothing = RecoveryAction::None;
    for action in [nothing, GpuReset, NodeReboot, DrainP2p, DrainAndReset, Other(5), Other(77)] {
        let mut gpu = Gpu::unknown(0);
        gpu.faults.recovery_action = Some(action);
        let mut whole = GpuInventory::none(ProviderState::Ok, "");
        whole.gpus = vec![gpu];
        let back = from_wire(&inventory(&whole));
        assert_eq!(back.gpus[0].faults.recovery_action, Some(action));
    }
}
