//! The inventory as text for `carport gpus`.

use comfy_table::{CellAlignment, Table, presets};

use super::allocation::Allocation;
use super::inventory::{Gpu, GpuInventory, GpuMemory, ProviderState};
use super::links::PcieLink;
use super::mig::MigDevice;

/// What is written where nothing was measured.
const UNKNOWN: &str = "-";

/// The inventory as a table, with a line above it about the driver, a line below
/// for every reason why a GPU is not well, and, where there is no current answer,
/// the reason for that. Ends with a newline.
pub fn render(inventory: &GpuInventory) -> String {
    text(inventory, false)
}

/// The same with more columns, and the parts of split GPUs.
pub fn render_wide(inventory: &GpuInventory) -> String {
    text(inventory, true)
}

fn text(inventory: &GpuInventory, wide: bool) -> String {
    let mut text = String::new();
    let provider = &inventory.provider;
    if provider.state != ProviderState::Ok {
        text += &format!("GPUs: {}: {}\n", provider.state, provider.message);
    }
    if inventory.gpus.is_empty() {
        return text;
    }
    text += &format!(
        "Driver {}, NVML {}, CUDA {}\n",
        or_unknown(inventory.driver_version.as_deref()),
        or_unknown(inventory.nvml_version.as_deref()),
        or_unknown(inventory.cuda_driver_version.as_deref()),
    );
    text += &table(&inventory.gpus, wide);
    for gpu in &inventory.gpus {
        for reason in &gpu.health.reasons {
            let uuid = or_unknown(gpu.uuid.as_deref());
            text += &format!("GPU {} ({uuid}): {}: {}\n", gpu.index, reason.code, reason.message);
        }
    }
    let allocation = &inventory.allocation;
    if !allocation.message.is_empty() {
        text += &format!("Allocations {}: {}\n", allocation.source, allocation.message);
    }
    text
}

/// A column: its name, whether figures stand in it, and what stands there for a GPU and for
/// a part of one.
struct Column {
    name: &'static str,
    figures: bool,
    wide: bool,
    gpu: fn(&Gpu) -> String,
    part: fn(&Gpu, &MigDevice) -> String,
}

const fn column(
    name: &'static str,
    gpu: fn(&Gpu) -> String,
    part: fn(&Gpu, &MigDevice) -> String,
) -> Column {
    Column { name, figures: false, wide: false, gpu, part }
}

impl Column {
    const fn figures(self) -> Self {
        Self { figures: true, ..self }
    }

    const fn wide(self) -> Self {
        Self { wide: true, ..self }
    }
}

/// Nothing that a part has of its own.
fn none(_: &Gpu, _: &MigDevice) -> String {
    String::new()
}

const COLUMNS: [Column; 21] = [
    column("INDEX", |gpu| gpu.index.to_string(), |gpu, p| format!("{}:{}", gpu.index, p.slot)),
    column("MINOR", |gpu| or_unknown(gpu.minor_number), none).wide(),
    column(
        "PRODUCT",
        |gpu| or_unknown(gpu.product.as_deref()),
        |_, part| format!("MIG {}", or_unknown(part.profile.as_deref())),
    ),
    column("ARCH", |gpu| or_unknown(gpu.architecture.as_ref()), none).wide(),
    column("CC", |gpu| or_unknown(gpu.compute_capability), none).wide(),
    column("PCI", |gpu| or_unknown(gpu.pci_bus_id.as_deref()), none),
    column("LINK", |gpu| pcie(gpu.pcie), none).wide(),
    column("NUMA", |gpu| or_unknown(gpu.numa_node), none),
    column("CPUS", |gpu| or_unknown(gpu.cpu_list.as_deref()), none).wide(),
    column("MEMORY USED", |gpu| used(gpu.memory), |_, part| used(part.memory)).figures(),
    column("TOTAL", |gpu| total(gpu.memory), |_, part| total(part.memory)).figures(),
    column("UTIL", utilization, none).figures(),
    column("POWER", power, none).figures(),
    column("TEMP", temperature, none).figures(),
    column("THROTTLED", |gpu| throttled(gpu.telemetry.throttle_reasons.as_deref()), none).wide(),
    column("ECC", |gpu| or_unknown(gpu.faults.ecc_uncorrected_volatile), none).figures().wide(),
    column("XID", |gpu| or_unknown(gpu.faults.last_xid), none).figures().wide(),
    column("MIG", mig, none),
    column("HEALTH", |gpu| gpu.health.state.to_string(), none),
    column("PODS", |gpu| pods(&gpu.allocations), |_, part| pods(&part.allocations)),
    column(
        "UUID",
        |gpu| or_unknown(gpu.uuid.as_deref()),
        |_, part| or_unknown(part.uuid.as_deref()),
    ),
];

fn table(gpus: &[Gpu], wide: bool) -> String {
    let columns: Vec<&Column> = COLUMNS.iter().filter(|column| wide || !column.wide).collect();
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    table.set_header(columns.iter().map(|column| column.name));
    for gpu in gpus {
        table.add_row(columns.iter().map(|column| (column.gpu)(gpu)));
        let parts = gpu.mig.iter().flat_map(|mig| &mig.devices).filter(|_| wide);
        for part in parts {
            table.add_row(columns.iter().map(|column| (column.part)(gpu, part)));
        }
    }
    for (column, made) in columns.iter().zip(table.column_iter_mut()) {
        made.set_padding((0, 2));
        if column.figures {
            made.set_cell_alignment(CellAlignment::Right);
        }
    }
    table.lines().map(|line| format!("{}\n", line.trim_end())).collect()
}

fn utilization(gpu: &Gpu) -> String {
    let ratio = gpu.telemetry.utilization_ratio;
    or_unknown(ratio.map(|ratio| format!("{:.0} %", ratio * 100.0)))
}

fn power(gpu: &Gpu) -> String {
    or_unknown(gpu.telemetry.power_watts.map(|watts| format!("{watts:.0} W")))
}

fn temperature(gpu: &Gpu) -> String {
    or_unknown(gpu.telemetry.temperature_celsius.map(|celsius| format!("{celsius:.0} °C")))
}

fn mig(gpu: &Gpu) -> String {
    or_unknown(gpu.mig.as_ref().map(|mig| match (mig.capable, mig.enabled) {
        (_, true) => "on",
        (true, false) => "off",
        (false, false) => "no",
    }))
}

/// `gen5 x16`.
fn pcie(link: PcieLink) -> String {
    or_unknown(
        link.generation
            .zip(link.width)
            .map(|(generation, width)| format!("gen{generation} x{width}")),
    )
}

fn throttled(reasons: Option<&[String]>) -> String {
    or_unknown(reasons.map(|reasons| match reasons {
        [] => "no".to_owned(),
        some => some.join(","),
    }))
}

/// Each pod once, though several of its containers may hold the GPU.
fn pods(allocations: &[Allocation]) -> String {
    let mut names: Vec<String> = Vec::new();
    for held in allocations {
        let name = format!("{}/{}", held.pod_namespace, held.pod_name);
        if !names.contains(&name) {
            names.push(name);
        }
    }
    if names.is_empty() { UNKNOWN.into() } else { names.join(",") }
}

fn used(memory: Option<GpuMemory>) -> String {
    or_unknown(memory.map(|memory| gib(memory.used_bytes)))
}

fn total(memory: Option<GpuMemory>) -> String {
    or_unknown(memory.map(|memory| gib(memory.total_bytes)))
}

fn gib(bytes: u64) -> String {
    format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30))
}

fn or_unknown(value: Option<impl ToString>) -> String {
    value.map_or_else(|| UNKNOWN.to_owned(), |value| value.to_string())
}

#[cfg(test)]
mod tests {
    use super::super::inventory::{GpuMemory, HealthState, Telemetry};
    use super::super::mig::Mig;
    use super::*;

    #[test]
    fn a_node_without_gpus_says_why() {
        let inventory = GpuInventory::none(ProviderState::NoDriver, "the module is not loaded");
        assert_eq!(render(&inventory), "GPUs: no driver: the module is not loaded\n");
    }

    #[test]
    fn each_gpu_is_a_line_and_each_reason_one_below() {
        let well = Gpu {
            uuid: Some("GPU-a".into()),
            product: Some("NVIDIA H100 80GB HBM3".into()),
            pci_bus_id: Some("0000:1b:00.0".into()),
            numa_node: Some(0),
            memory: Some(GpuMemory {
                total_bytes: 80 << 30,
                used_bytes: 3 << 29,
                free_bytes: 157 << 29,
                reserved_bytes: None,
                bar1_total_bytes: None,
                bar1_used_bytes: None,
            }),
            mig: Some(Mig { capable: true, ..Mig::default() }),
            telemetry: Telemetry {
                utilization_ratio: Some(0.07),
                power_watts: Some(69.42),
                temperature_celsius: Some(31.0),
                ..Telemetry::default()
            },
            allocations: vec![allocation("a"), allocation("a")],
            ..Gpu::unknown(0)
        };
        let mut lost = Gpu::unknown(1);
        lost.health.add(HealthState::Lost, "GPU_LOST", "fell off the bus");
        let mut inventory = GpuInventory::none(ProviderState::Ok, "");
        inventory.driver_version = Some("550.54.15".into());
        inventory.gpus = vec![well, lost];
        inventory.allocation.message = "no kubelet here".into();
        let expected = "\
Driver 550.54.15, NVML -, CUDA -
INDEX  PRODUCT                PCI           NUMA  MEMORY USED     TOTAL  UTIL  POWER   TEMP  MIG  HEALTH  PODS    UUID
0      NVIDIA H100 80GB HBM3  0000:1b:00.0  0         1.5 GiB  80.0 GiB   7 %   69 W  31 °C  off  ok      team/a  GPU-a
1      -                      -             -               -         -     -      -      -  -    lost    -       -
GPU 1 (-): GPU_LOST: fell off the bus
Allocations by processes only: no kubelet here
";
        assert_eq!(render(&inventory), expected);
    }

    #[test]
    fn wide_has_a_line_for_each_part() {
        let mut gpu = Gpu { uuid: Some("GPU-a".into()), ..Gpu::unknown(0) };
        let part = MigDevice {
            uuid: Some("MIG-b".into()),
            slot: 1,
            profile: Some("1g.10gb".into()),
            gpu_instance_id: None,
            compute_instance_id: None,
            memory: None,
            multiprocessor_count: None,
            allocations: vec![allocation("b")],
        };
        gpu.mig = Some(Mig { capable: true, enabled: true, devices: vec![part], ..Mig::default() });
        let mut inventory = GpuInventory::none(ProviderState::Ok, "");
        inventory.gpus = vec![gpu];
        let wide = render_wide(&inventory);
        let rows: Vec<Vec<&str>> =
            wide.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(rows[1][..4], ["INDEX", "MINOR", "PRODUCT", "ARCH"]);
        assert_eq!(rows[3], ["0:1", "MIG", "1g.10gb", "-", "-", "team/b", "MIG-b"]);
        assert!(!render(&inventory).contains("MIG-b"));
    }

    fn allocation(pod: &str) -> Allocation {
        Allocation {
            pod_namespace: "team".into(),
            pod_name: pod.into(),
            container: "main".into(),
            resource_name: None,
            claim_name: None,
            shared: false,
        }
    }
}
