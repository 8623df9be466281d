//! The inventory as text for `carport gpus`.

use comfy_table::{CellAlignment, Table, presets};

use super::inventory::{Gpu, GpuInventory, ProviderState};

/// What is written where nothing was measured.
const UNKNOWN: &str = "-";

/// The inventory as a table, with a line above it about the driver, a line below
/// for every reason why a GPU is not well, and, where there is no current answer,
/// the reason for that. Ends with a newline.
pub fn render(inventory: &GpuInventory) -> String {
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
    text += &table(&inventory.gpus);
    for gpu in &inventory.gpus {
        for reason in &gpu.health.reasons {
            let uuid = or_unknown(gpu.uuid.as_deref());
            text += &format!("GPU {} ({uuid}): {}: {}\n", gpu.index, reason.code, reason.message);
        }
    }
    text
}

fn table(gpus: &[Gpu]) -> String {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    table.set_header([
        "INDEX",
        "PRODUCT",
        "PCI",
        "NUMA",
        "MEMORY USED",
        "TOTAL",
        "UTIL",
        "POWER",
        "TEMP",
        "MIG",
        "HEALTH",
        "UUID",
    ]);
    for gpu in gpus {
        table.add_row(row(gpu));
    }
    for (at, column) in table.column_iter_mut().enumerate() {
        column.set_padding((0, 2));
        if (4..=8).contains(&at) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table.lines().map(|line| format!("{}\n", line.trim_end())).collect()
}

fn row(gpu: &Gpu) -> [String; 12] {
    let memory = gpu.memory;
    let telemetry = gpu.telemetry;
    let mig = gpu.mig.map(|mig| match (mig.capable, mig.enabled) {
        (_, true) => "on",
        (true, false) => "off",
        (false, false) => "no",
    });
    [
        gpu.index.to_string(),
        or_unknown(gpu.product.as_deref()),
        or_unknown(gpu.pci_bus_id.as_deref()),
        or_unknown(gpu.numa_node),
        or_unknown(memory.map(|memory| gib(memory.used_bytes))),
        or_unknown(memory.map(|memory| gib(memory.total_bytes))),
        or_unknown(telemetry.utilization_ratio.map(|ratio| format!("{:.0} %", ratio * 100.0))),
        or_unknown(telemetry.power_watts.map(|watts| format!("{watts:.0} W"))),
        or_unknown(telemetry.temperature_celsius.map(|celsius| format!("{celsius:.0} °C"))),
        or_unknown(mig),
        gpu.health.state.to_string(),
        or_unknown(gpu.uuid.as_deref()),
    ]
}

fn gib(bytes: u64) -> String {
    format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30))
}

fn or_unknown(value: Option<impl ToString>) -> String {
    value.map_or_else(|| UNKNOWN.to_owned(), |value| value.to_string())
}

#[cfg(test)]
mod tests {
    use super::super::inventory::{GpuMemory, HealthState, Mig, Telemetry};
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
            mig: Some(Mig { capable: true, enabled: false, pending_enabled: false }),
            telemetry: Telemetry {
                utilization_ratio: Some(0.07),
                power_watts: Some(69.42),
                temperature_celsius: Some(31.0),
                ..Telemetry::default()
            },
            ..Gpu::unknown(0)
        };
        let mut lost = Gpu::unknown(1);
        lost.health.add(HealthState::Lost, "GPU_LOST", "fell off the bus");
        let mut inventory = GpuInventory::none(ProviderState::Ok, "");
        inventory.driver_version = Some("550.54.15".into());
        inventory.gpus = vec![well, lost];
        let expected = "\
Driver 550.54.15, NVML -, CUDA -
INDEX  PRODUCT                PCI           NUMA  MEMORY USED     TOTAL  UTIL  POWER   TEMP  MIG  HEALTH  UUID
0      NVIDIA H100 80GB HBM3  0000:1b:00.0  0         1.5 GiB  80.0 GiB   7 %   69 W  31 °C  off  ok      GPU-a
1      -                      -             -               -         -     -      -      -  -    lost    -
GPU 1 (-): GPU_LOST: fell off the bus
";
        assert_eq!(render(&inventory), expected);
    }
}
