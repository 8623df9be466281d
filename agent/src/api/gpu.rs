//! `GpuService`: the last snapshot, as the wire has it.

use std::time::Instant;

use carport_proto::carport::v1;
use carport_proto::carport::v1::gpu_service_server::GpuService;
use tonic::{Request, Response, Status};

use super::convert::{reason, timestamp};
use super::{Api, mask};
use crate::gpu::{
    Allocation, AllocationSource, Faults, Gpu, GpuInventory, GpuLink, GpuMemory, Health,
    HealthState, LinkType, Mig, PcieLink, ProviderState, RecoveryAction,
};

mod read;
#[cfg(test)]
mod tests;

pub use read::from_wire;

/// A generation that this program has no name for; its code travels beside it.
const UNKNOWN_ARCHITECTURE: &str = "unknown";

#[tonic::async_trait]
impl GpuService for Api {
    async fn get_gpu_inventory(
        &self,
        request: Request<v1::GetGpuInventoryRequest>,
    ) -> Result<Response<v1::GpuInventory>, Status> {
        let request = request.into_inner();
        self.is_this_node(&request.node_name)?;
        let gpus = self.state().gpus.as_of(Instant::now());
        let answer = mask::gpu_inventory(inventory(&gpus), request.read_mask.as_ref())?;
        Ok(Response::new(answer))
    }
}

/// All GPUs.
pub fn inventory(gpus: &GpuInventory) -> v1::GpuInventory {
    v1::GpuInventory {
        provider_state: provider_state(gpus.provider.state).into(),
        provider_message: gpus.provider.message.clone(),
        driver_version: gpus.driver_version.clone().unwrap_or_default(),
        nvml_version: gpus.nvml_version.clone().unwrap_or_default(),
        cuda_driver_version: gpus.cuda_driver_version.clone().unwrap_or_default(),
        gpus: gpus.gpus.iter().map(gpu).collect(),
        links: gpus.links.iter().map(link).collect(),
        sample_time: gpus.sampled_at.map(timestamp),
        generation: gpus.generation,
        allocation_source: match gpus.allocation.source {
            AllocationSource::PodResources => v1::AllocationSource::PodResources,
            AllocationSource::ProcessesOnly => v1::AllocationSource::ProcessesOnly,
        }
        .into(),
        allocation_message: gpus.allocation.message.clone(),
    }
}

fn provider_state(state: ProviderState) -> v1::ProviderState {
    match state {
        ProviderState::Ok => v1::ProviderState::Ok,
        ProviderState::NoLibrary => v1::ProviderState::NoLibrary,
        ProviderState::NoDriver => v1::ProviderState::NoDriver,
        ProviderState::NoDevices => v1::ProviderState::NoDevices,
        ProviderState::NoPermission => v1::ProviderState::NoPermission,
        ProviderState::VersionMismatch => v1::ProviderState::VersionMismatch,
        ProviderState::Stale => v1::ProviderState::Stale,
        ProviderState::Disabled => v1::ProviderState::Disabled,
        ProviderState::Error => v1::ProviderState::Error,
    }
}

fn gpu(gpu: &Gpu) -> v1::Gpu {
    let architecture = gpu.architecture.as_ref();
    let fabric = gpu.fabric.as_ref();
    v1::Gpu {
        uuid: gpu.uuid.clone().unwrap_or_default(),
        index: gpu.index,
        minor_number: gpu.minor_number,
        pci_bus_id: gpu.pci_bus_id.clone().unwrap_or_default(),
        pcie_root: gpu.pcie_root.clone().unwrap_or_default(),
        numa_node: gpu.numa_node.and_then(|node| i32::try_from(node).ok()),
        cpu_list: gpu.cpu_list.clone().unwrap_or_default(),
        product: gpu.product.clone().unwrap_or_default(),
        brand: gpu.brand.clone().unwrap_or_default(),
        architecture: architecture
            .map(|a| a.name.clone().unwrap_or_else(|| UNKNOWN_ARCHITECTURE.into()))
            .unwrap_or_default(),
        architecture_code: architecture.map_or(0, |a| a.code),
        compute_capability: gpu.compute_capability.map(|c| c.to_string()).unwrap_or_default(),
        serial: gpu.serial.clone().unwrap_or_default(),
        memory: gpu.memory.map(memory),
        mig: gpu.mig.as_ref().map(|mig| self::mig(mig, &gpu.health)),
        health: Some(health(&gpu.health, &gpu.faults)),
        telemetry: Some(v1::Telemetry {
            utilization_ratio: gpu.telemetry.utilization_ratio,
            memory_bus_utilization_ratio: gpu.telemetry.memory_bus_utilization_ratio,
            power_watts: gpu.telemetry.power_watts,
            power_limit_watts: gpu.telemetry.power_limit_watts,
            temperature_celsius: gpu.telemetry.temperature_celsius,
            throttle_reasons: gpu.telemetry.throttle_reasons.clone().unwrap_or_default(),
            throttle_reasons_unknown: gpu.telemetry.throttle_reasons.is_none(),
        }),
        persistence_mode: gpu.persistence_mode,
        ecc_enabled: gpu.ecc_enabled,
        processes: gpu
            .processes
            .iter()
            .flatten()
            .map(|process| v1::Process {
                pid: process.pid,
                used_memory_bytes: process.used_memory_bytes,
                pod: None,
            })
            .collect(),
        fabric_cluster_uuid: fabric.map(|fabric| fabric.cluster_uuid.clone()).unwrap_or_default(),
        fabric_clique_id: fabric.map(|fabric| fabric.clique_id),
        allocations: gpu.allocations.iter().map(allocation).collect(),
        pcie: (gpu.pcie != PcieLink::default()).then(|| v1::PcieLink {
            generation: gpu.pcie.generation.unwrap_or(0),
            width: gpu.pcie.width.unwrap_or(0),
            max_generation: gpu.pcie.max_generation.unwrap_or(0),
            max_width: gpu.pcie.max_width.unwrap_or(0),
        }),
        allocatable: gpu.allocatable,
        processes_unknown: gpu.processes.is_none(),
    }
}

fn mig(mig: &Mig, of_gpu: &Health) -> v1::MigState {
    let devices = mig.devices.iter().map(|device| v1::MigDevice {
        uuid: device.uuid.clone().unwrap_or_default(),
        slot: device.slot,
        profile: device.profile.clone().unwrap_or_default(),
        gpu_instance_id: device.gpu_instance_id,
        compute_instance_id: device.compute_instance_id,
        memory: device.memory.map(memory),
        multiprocessor_count: device.multiprocessor_count,
        allocations: device.allocations.iter().map(allocation).collect(),
        // A part is as well as the whole.
        health: Some(health(of_gpu, &Faults::default())),
    });
    let profiles = mig.profiles.iter().map(|profile| v1::MigProfile {
        name: profile.name.clone(),
        memory_bytes: profile.memory_bytes,
        max_instances: profile.max_instances,
        remaining_instances: profile.remaining_instances,
    });
    v1::MigState {
        capable: mig.capable,
        enabled: mig.enabled,
        pending_enabled: mig.pending_enabled,
        devices: devices.collect(),
        profiles: profiles.collect(),
    }
}

fn allocation(held: &Allocation) -> v1::Allocation {
    v1::Allocation {
        pod: Some(v1::PodRef {
            namespace: held.pod_namespace.clone(),
            name: held.pod_name.clone(),
            // The kubelet does not tell.
            uid: String::new(),
        }),
        container: held.container.clone(),
        resource_name: held.resource_name.clone().unwrap_or_default(),
        claim_name: held.claim_name.clone().unwrap_or_default(),
        shared: held.shared,
    }
}

fn link(link: &GpuLink) -> v1::GpuLink {
    let kind = match link.kind {
        None => v1::LinkType::Unspecified,
        Some(LinkType::Nvlink) => v1::LinkType::Nvlink,
        Some(LinkType::Nvswitch) => v1::LinkType::Nvswitch,
        Some(LinkType::SameBoard) => v1::LinkType::SameBoard,
        Some(LinkType::Pix) => v1::LinkType::Pix,
        Some(LinkType::Pxb) => v1::LinkType::Pxb,
        Some(LinkType::Phb) => v1::LinkType::Phb,
        Some(LinkType::Node) => v1::LinkType::Node,
        Some(LinkType::Sys) => v1::LinkType::Sys,
    };
    v1::GpuLink {
        uuid_a: link.uuid_a.clone(),
        uuid_b: link.uuid_b.clone(),
        r#type: kind.into(),
        link_count: link.link_count,
        bandwidth_bytes_per_second: link.bandwidth_bytes_per_second,
        p2p_read: link.p2p_read,
        p2p_write: link.p2p_write,
    }
}

fn memory(memory: GpuMemory) -> v1::GpuMemory {
    v1::GpuMemory {
        total_bytes: memory.total_bytes,
        used_bytes: memory.used_bytes,
        free_bytes: memory.free_bytes,
        reserved_bytes: memory.reserved_bytes,
        bar1_total_bytes: memory.bar1_total_bytes,
        bar1_used_bytes: memory.bar1_used_bytes,
    }
}

fn health(health: &Health, faults: &Faults) -> v1::Health {
    let state = match health.state {
        HealthState::Ok => v1::HealthState::Ok,
        HealthState::Unknown => v1::HealthState::Unspecified,
        HealthState::Warning => v1::HealthState::Warning,
        HealthState::Unhealthy => v1::HealthState::Unhealthy,
        HealthState::Lost => v1::HealthState::Lost,
    };
    let action = faults.recovery_action.map(|action| match action {
        RecoveryAction::None => v1::RecoveryAction::None.into(),
        RecoveryAction::GpuReset => v1::RecoveryAction::GpuReset.into(),
        RecoveryAction::NodeReboot => v1::RecoveryAction::NodeReboot.into(),
        RecoveryAction::DrainP2p => v1::RecoveryAction::DrainP2p.into(),
        RecoveryAction::DrainAndReset => v1::RecoveryAction::DrainAndReset.into(),
        // One more than the driver's number; a client that knows it reads it.
        RecoveryAction::Other(code) => i32::try_from(code).map_or(0, |code| code.saturating_add(1)),
    });
    let reasons = health.reasons.iter().map(|why| reason(&why.code, &why.message)).collect();
    v1::Health {
        state: state.into(),
        reasons,
        last_xid: faults.last_xid.and_then(|xid| u32::try_from(xid).ok()),
        last_xid_time: faults.last_xid_at.map(timestamp),
        ecc_uncorrected_volatile: faults.ecc_uncorrected_volatile,
        remapped_rows_uncorrectable: faults.remapped_rows_uncorrectable,
        remap_pending: faults.remap_pending,
        remap_failed: faults.remap_failed,
        recovery_action: action.unwrap_or_default(),
    }
}
