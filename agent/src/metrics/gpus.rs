//! Each GPU by itself, under the labels that NVIDIA's dcgm-exporter uses, so that the two
//! join: `carport_gpu_free * on(UUID) group_left() DCGM_FI_DEV_GPU_UTIL`.

use std::sync::atomic::AtomicU64;

use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use crate::gpu::{AllocationSource, Gpu, GpuInventory, HealthState};
use crate::placement::gpus::is_free;

/// `gpu` (the index) and `UUID`.
type Labels = Vec<(&'static str, String)>;
type Float = Gauge<f64, AtomicU64>;

/// Gauges of each GPU, as the last look had them; what was not measured has no line.
#[derive(Debug)]
pub(super) struct GpuMetrics {
    each: Vec<(Family<Labels, Float>, Reading)>,
    pods_known: Gauge,
}

type Reading = fn(&Gpu) -> Option<f64>;

/// Name, meaning, and how it is read.
const READINGS: [(&str, &str, Reading); 11] = [
    ("gpu_healthy", "1 while the GPU can be given work", |gpu| {
        Some(f64::from(matches!(gpu.health.state, HealthState::Ok | HealthState::Warning)))
    }),
    ("gpu_free", "1 while the GPU is well, given to nobody and used by nobody", |gpu| {
        Some(f64::from(is_free(gpu)))
    }),
    ("gpu_allocations", "Containers that have been given the GPU or a part of it", |gpu| {
        let parts = gpu.mig.iter().flat_map(|mig| &mig.devices);
        let of_parts: usize = parts.map(|part| part.allocations.len()).sum();
        number(gpu.allocations.len() + of_parts)
    }),
    ("gpu_memory_total_bytes", "The GPU's memory", |gpu| {
        gpu.memory.map(|memory| bytes(memory.total_bytes))
    }),
    ("gpu_memory_used_bytes", "Of that, held by processes", |gpu| {
        gpu.memory.map(|memory| bytes(memory.used_bytes))
    }),
    ("gpu_utilization_ratio", "Part of the last sampling period in which a kernel ran", |gpu| {
        gpu.telemetry.utilization_ratio
    }),
    ("gpu_power_watts", "Draw of the board", |gpu| gpu.telemetry.power_watts),
    ("gpu_temperature_celsius", "The core's temperature", |gpu| gpu.telemetry.temperature_celsius),
    ("gpu_processes", "Compute processes on the GPU", |gpu| {
        gpu.processes.as_ref().and_then(|processes| number(processes.len()))
    }),
    ("gpu_last_xid", "The last error that the driver reported since the agent started", |gpu| {
        gpu.faults.last_xid.map(bytes)
    }),
    (
        "gpu_ecc_uncorrected_errors",
        "Memory errors beyond correction since the driver was loaded",
        |gpu| gpu.faults.ecc_uncorrected_volatile.map(bytes),
    ),
];

#[allow(clippy::cast_precision_loss, reason = "exact up to 8 PiB")]
fn bytes(number: u64) -> f64 {
    number as f64
}

fn number(count: usize) -> Option<f64> {
    u32::try_from(count).ok().map(f64::from)
}

impl GpuMetrics {
    pub(super) fn new(registry: &mut Registry) -> Self {
        let each = READINGS.map(|(name, help, reading)| {
            let family = Family::<Labels, Float>::default();
            registry.register(name, help, family.clone());
            (family, reading)
        });
        let pods_known = Gauge::default();
        registry.register(
            "gpu_pods_known",
            "1 while the kubelet tells which pods hold GPUs; 0 while only processes do",
            pods_known.clone(),
        );
        Self { each: each.into(), pods_known }
    }

    pub(super) fn read(&self, inventory: &GpuInventory) {
        let known = inventory.allocation.source == AllocationSource::PodResources;
        self.pods_known.set(known.into());
        for (family, reading) in &self.each {
            family.clear();
            for gpu in &inventory.gpus {
                let (Some(uuid), Some(value)) = (&gpu.uuid, reading(gpu)) else { continue };
                let labels = vec![("gpu", gpu.index.to_string()), ("UUID", uuid.clone())];
                family.get_or_create(&labels).set(value);
            }
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::gpu::{GpuMemory, GpuProcess, ProviderState};
    use crate::metrics::Metrics;
    use crate::state::fixtures::node;

    /// A GPU of which everything is known.
    pub(crate) fn one_gpu() -> Arc<GpuInventory> {
        let mut gpu = Gpu { uuid: Some("GPU-a".into()), ..Gpu::unknown(3) };
        gpu.memory = Some(GpuMemory {
            total_bytes: 80 << 30,
            used_bytes: 1 << 30,
            free_bytes: 79 << 30,
            reserved_bytes: None,
            bar1_total_bytes: None,
            bar1_used_bytes: None,
        });
        gpu.telemetry.utilization_ratio = Some(0.25);
        gpu.telemetry.power_watts = Some(69.5);
        gpu.telemetry.temperature_celsius = Some(31.0);
        gpu.processes = Some(vec![GpuProcess { pid: 1, used_memory_bytes: None }]);
        gpu.faults.last_xid = Some(31);
        gpu.faults.ecc_uncorrected_volatile = Some(0);
        let mut inventory = GpuInventory::none(ProviderState::Ok, "");
        inventory.gpus.push(gpu);
        Arc::new(inventory)
    }

    #[test]
    fn a_gpus_lines_join_with_those_of_dcgm_and_go_with_it() {
        let metrics = Metrics::default();
        let mut state = node(vec![]);
        state.gpus = one_gpu();
        let text = metrics.encode(&state, Default::default()).unwrap();
        for line in [
            "carport_gpu_healthy{gpu=\"3\",UUID=\"GPU-a\"} 1.0",
            "carport_gpu_free{gpu=\"3\",UUID=\"GPU-a\"} 0.0",
            "carport_gpu_utilization_ratio{gpu=\"3\",UUID=\"GPU-a\"} 0.25",
            "carport_gpu_memory_used_bytes{gpu=\"3\",UUID=\"GPU-a\"} 1073741824.0",
            "carport_gpu_last_xid{gpu=\"3\",UUID=\"GPU-a\"} 31.0",
            "carport_gpu_pods_known 0",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in {text}");
        }
        state.gpus = Arc::new(GpuInventory::none(ProviderState::NoDevices, "none"));
        let text = metrics.encode(&state, Default::default()).unwrap();
        assert!(!text.contains("GPU-a"), "{text}");
    }
}
