//! `GpuService`: the last snapshot, as the wire has it.

use std::time::{Instant, SystemTime};

use carport_proto::carport::v1;
use carport_proto::carport::v1::gpu_service_server::GpuService;
use tonic::{Request, Response, Status};

use super::convert::{reason, timestamp};
use super::{Api, mask};
use crate::gpu::{
    Architecture, Gpu, GpuInventory, GpuMemory, GpuProcess, Health, HealthState, Mig,
    ProviderState, Reason, Telemetry,
};
use crate::placement::gpus::parse_compute_capability;

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
        links: Vec::new(),
        sample_time: gpus.sampled_at.map(timestamp),
        generation: gpus.generation,
        allocation_source: v1::AllocationSource::ProcessesOnly.into(),
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
    v1::Gpu {
        uuid: gpu.uuid.clone().unwrap_or_default(),
        index: gpu.index,
        minor_number: gpu.minor_number,
        pci_bus_id: gpu.pci_bus_id.clone().unwrap_or_default(),
        pcie_root: String::new(),
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
        mig: gpu.mig.map(|mig| v1::MigState {
            capable: mig.capable,
            enabled: mig.enabled,
            pending_enabled: mig.pending_enabled,
            devices: Vec::new(),
            profiles: Vec::new(),
        }),
        health: Some(health(&gpu.health)),
        telemetry: Some(v1::Telemetry {
            utilization_ratio: gpu.telemetry.utilization_ratio,
            memory_bus_utilization_ratio: gpu.telemetry.memory_bus_utilization_ratio,
            power_watts: gpu.telemetry.power_watts,
            power_limit_watts: gpu.telemetry.power_limit_watts,
            temperature_celsius: gpu.telemetry.temperature_celsius,
            throttle_reasons: Vec::new(),
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
        ..Default::default()
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

fn health(health: &Health) -> v1::Health {
    let state = match health.state {
        HealthState::Ok => v1::HealthState::Ok,
        HealthState::Unknown => v1::HealthState::Unspecified,
        HealthState::Warning => v1::HealthState::Warning,
        HealthState::Unhealthy => v1::HealthState::Unhealthy,
        HealthState::Lost => v1::HealthState::Lost,
    };
    let reasons = health.reasons.iter().map(|why| reason(&why.code, &why.message)).collect();
    v1::Health { state: state.into(), reasons, ..Default::default() }
}

/// The way back, for a client that prints what an agent told it.
pub fn from_wire(message: &v1::GpuInventory) -> GpuInventory {
    let text = |text: &str| (!text.is_empty()).then(|| text.to_string());
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
    inventory.gpus = message.gpus.iter().map(gpu_from_wire).collect();
    inventory
}

fn gpu_from_wire(gpu: &v1::Gpu) -> Gpu {
    let text = |text: &str| (!text.is_empty()).then(|| text.to_string());
    let telemetry = gpu.telemetry.clone().unwrap_or_default();
    Gpu {
        uuid: text(&gpu.uuid),
        index: gpu.index,
        minor_number: gpu.minor_number,
        pci_bus_id: text(&gpu.pci_bus_id),
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
        memory: gpu.memory.as_ref().map(|memory| GpuMemory {
            total_bytes: memory.total_bytes,
            used_bytes: memory.used_bytes,
            free_bytes: memory.free_bytes,
            reserved_bytes: memory.reserved_bytes,
            bar1_total_bytes: memory.bar1_total_bytes,
            bar1_used_bytes: memory.bar1_used_bytes,
        }),
        mig: gpu.mig.as_ref().map(|mig| Mig {
            capable: mig.capable,
            enabled: mig.enabled,
            pending_enabled: mig.pending_enabled,
        }),
        health: health_from_wire(gpu.health.as_ref()),
        telemetry: Telemetry {
            utilization_ratio: telemetry.utilization_ratio,
            memory_bus_utilization_ratio: telemetry.memory_bus_utilization_ratio,
            power_watts: telemetry.power_watts,
            power_limit_watts: telemetry.power_limit_watts,
            temperature_celsius: telemetry.temperature_celsius,
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
        ),
    }
}

fn health_from_wire(health: Option<&v1::Health>) -> Health {
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
