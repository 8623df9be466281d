//! The way back, for a client that prints what an agent told it.

use std::time::SystemTime;

use carport_proto::carport::v1;

use super::UNKNOWN_ARCHITECTURE;
use crate::gpu::{
    Allocation, AllocationSource, AllocationState, Architecture, Fabric, Faults, Gpu, GpuInventory,
    GpuLink, GpuMemory, GpuProcess, Health, HealthState, LinkType, Mig, MigDevice, MigProfile,
    PcieLink, ProviderState, Reason, RecoveryAction, Telemetry,
};
use crate::placement::gpus::parse_compute_capability;

/// The inventory that an agent sent. What the wire has no word for is what it was not told.
pub fn from_wire(message: &v1::GpuInventory) -> GpuInventory {
    let mut inventory = GpuInventory::none(
        match message.provider_state() {
            v1::ProviderState::Ok => ProviderState::Ok,
            v1::ProviderState::NoLibrary => ProviderState::NoLibrary,
            v1::ProviderState::NoDriver => ProviderState::NoDriver,
            v1::ProviderState::NoDevices => ProviderState::NoDevices,
            v1::ProviderState::NoPermission => ProviderState::NoPermission,
            v1::ProviderState::VersionMismatch => ProviderState::VersionMismatch,
            v1::ProviderState::Stale => ProviderState::Stale,
            v1::ProviderState::Disabled => ProviderState::Disabled,
            v1::ProviderState::Unspecified | v1::ProviderState::Error => ProviderState::Error,
        },
        message.provider_message.clone(),
    );
    inventory.driver_version = text(&message.driver_version);
    inventory.nvml_version = text(&message.nvml_version);
    inventory.cuda_driver_version = text(&message.cuda_driver_version);
    inventory.sampled_at = message.sample_time.and_then(|at| SystemTime::try_from(at).ok());
    inventory.generation = message.generation;
    inventory.gpus = message.gpus.iter().map(gpu).collect();
    inventory.links = message.links.iter().map(link).collect();
    inventory.allocation = AllocationState {
        source: match message.allocation_source() {
            v1::AllocationSource::PodResources => AllocationSource::PodResources,
            v1::AllocationSource::Unspecified | v1::AllocationSource::ProcessesOnly => {
                AllocationSource::ProcessesOnly
            }
        },
        message: message.allocation_message.clone(),
    };
    inventory
}

/// An empty text is none.
fn text(text: &str) -> Option<String> {
    (!text.is_empty()).then(|| text.to_string())
}

fn gpu(gpu: &v1::Gpu) -> Gpu {
    let telemetry = gpu.telemetry.clone().unwrap_or_default();
    Gpu {
        uuid: text(&gpu.uuid),
        index: gpu.index,
        minor_number: gpu.minor_number,
        pci_bus_id: text(&gpu.pci_bus_id),
        pcie_root: text(&gpu.pcie_root),
        pcie: gpu.pcie.map_or_else(PcieLink::default, |pcie| {
            let known = |number: u32| (number > 0).then_some(number);
            PcieLink {
                generation: known(pcie.generation),
                width: known(pcie.width),
                max_generation: known(pcie.max_generation),
                max_width: known(pcie.max_width),
            }
        }),
        numa_node: gpu.numa_node.and_then(|node| u32::try_from(node).ok()),
        cpu_list: text(&gpu.cpu_list),
        product: text(&gpu.product),
        brand: text(&gpu.brand),
        architecture: text(&gpu.architecture).map(|name| Architecture {
            name: (name != UNKNOWN_ARCHITECTURE).then_some(name),
            code: gpu.architecture_code,
        }),
        compute_capability: parse_compute_capability(&gpu.compute_capability).ok(),
        serial: text(&gpu.serial),
        memory: gpu.memory.as_ref().map(memory),
        mig: gpu.mig.as_ref().map(mig),
        fabric: gpu
            .fabric_clique_id
            .map(|clique_id| Fabric { cluster_uuid: gpu.fabric_cluster_uuid.clone(), clique_id }),
        health: health(gpu.health.as_ref()),
        faults: gpu.health.as_ref().map(faults).unwrap_or_default(),
        telemetry: Telemetry {
            utilization_ratio: telemetry.utilization_ratio,
            memory_bus_utilization_ratio: telemetry.memory_bus_utilization_ratio,
            power_watts: telemetry.power_watts,
            power_limit_watts: telemetry.power_limit_watts,
            temperature_celsius: telemetry.temperature_celsius,
            throttle_reasons: Some(telemetry.throttle_reasons)
                .filter(|_| !telemetry.throttle_reasons_unknown),
        },
        persistence_mode: gpu.persistence_mode,
        ecc_enabled: gpu.ecc_enabled,
        processes: Some(
            gpu.processes
                .iter()
                .map(|process| GpuProcess {
                    pid: process.pid,
                    used_memory_bytes: process.used_memory_bytes,
                })
                .collect(),
        )
        .filter(|_: &Vec<_>| !gpu.processes_unknown),
        allocatable: gpu.allocatable,
        allocations: gpu.allocations.iter().map(allocation).collect(),
    }
}

fn memory(memory: &v1::GpuMemory) -> GpuMemory {
    GpuMemory {
        total_bytes: memory.total_bytes,
        used_bytes: memory.used_bytes,
        free_bytes: memory.free_bytes,
        reserved_bytes: memory.reserved_bytes,
        bar1_total_bytes: memory.bar1_total_bytes,
        bar1_used_bytes: memory.bar1_used_bytes,
    }
}

fn mig(mig: &v1::MigState) -> Mig {
    let devices = mig.devices.iter().map(|device| MigDevice {
        uuid: text(&device.uuid),
        slot: device.slot,
        profile: text(&device.profile),
        gpu_instance_id: device.gpu_instance_id,
        compute_instance_id: device.compute_instance_id,
        memory: device.memory.as_ref().map(memory),
        multiprocessor_count: device.multiprocessor_count,
        allocations: device.allocations.iter().map(allocation).collect(),
    });
    let profiles = mig.profiles.iter().map(|profile| MigProfile {
        name: profile.name.clone(),
        memory_bytes: profile.memory_bytes,
        max_instances: profile.max_instances,
        remaining_instances: profile.remaining_instances,
    });
    Mig {
        capable: mig.capable,
        enabled: mig.enabled,
        pending_enabled: mig.pending_enabled,
        devices: devices.collect(),
        profiles: profiles.collect(),
    }
}

fn allocation(held: &v1::Allocation) -> Allocation {
    let pod = held.pod.clone().unwrap_or_default();
    Allocation {
        pod_namespace: pod.namespace,
        pod_name: pod.name,
        container: held.container.clone(),
        resource_name: text(&held.resource_name),
        claim_name: text(&held.claim_name),
        shared: held.shared,
    }
}

fn link(link: &v1::GpuLink) -> GpuLink {
    GpuLink {
        uuid_a: link.uuid_a.clone(),
        uuid_b: link.uuid_b.clone(),
        kind: match link.r#type() {
            v1::LinkType::Unspecified => None,
            v1::LinkType::Nvlink => Some(LinkType::Nvlink),
            v1::LinkType::Nvswitch => Some(LinkType::Nvswitch),
            v1::LinkType::SameBoard => Some(LinkType::SameBoard),
            v1::LinkType::Pix => Some(LinkType::Pix),
            v1::LinkType::Pxb => Some(LinkType::Pxb),
            v1::LinkType::Phb => Some(LinkType::Phb),
            v1::LinkType::Node => Some(LinkType::Node),
            v1::LinkType::Sys => Some(LinkType::Sys),
        },
        link_count: link.link_count,
        bandwidth_bytes_per_second: link.bandwidth_bytes_per_second,
        p2p_read: link.p2p_read,
        p2p_write: link.p2p_write,
    }
}

fn faults(health: &v1::Health) -> Faults {
    Faults {
        last_xid: health.last_xid.map(u64::from),
        last_xid_at: health.last_xid_time.and_then(|at| SystemTime::try_from(at).ok()),
        ecc_uncorrected_volatile: health.ecc_uncorrected_volatile,
        remapped_rows_uncorrectable: health.remapped_rows_uncorrectable,
        remap_pending: health.remap_pending,
        remap_failed: health.remap_failed,
        recovery_action: match v1::RecoveryAction::try_from(health.recovery_action) {
            Ok(v1::RecoveryAction::Unspecified) => None,
            Ok(v1::RecoveryAction::None) => Some(RecoveryAction::None),
            Ok(v1::RecoveryAction::GpuReset) => Some(RecoveryAction::GpuReset),
            Ok(v1::RecoveryAction::NodeReboot) => Some(RecoveryAction::NodeReboot),
            Ok(v1::RecoveryAction::DrainP2p) => Some(RecoveryAction::DrainP2p),
            Ok(v1::RecoveryAction::DrainAndReset) => Some(RecoveryAction::DrainAndReset),
            Ok(v1::RecoveryAction::RecoverImexDomain) | Err(_) => {
                u32::try_from(health.recovery_action - 1).ok().map(RecoveryAction::Other)
            }
        },
    }
}

fn health(health: Option<&v1::Health>) -> Health {
    let state = match health.map_or(v1::HealthState::Unspecified, v1::Health::state) {
        v1::HealthState::Ok => HealthState::Ok,
        v1::HealthState::Unspecified => HealthState::Unknown,
        v1::HealthState::Warning => HealthState::Warning,
        v1::HealthState::Unhealthy => HealthState::Unhealthy,
        v1::HealthState::Lost => HealthState::Lost,
    };
    let reasons = health.into_iter().flat_map(|health| &health.reasons);
    let reasons = reasons
        .map(|why| Reason { code: why.code.clone(), message: why.message.clone() })
        .collect();
    Health { state, reasons }
}
