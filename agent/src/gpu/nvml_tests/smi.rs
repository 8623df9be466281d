//! What the inventory says beside what `nvidia-smi -q` says, field by field.

use std::fmt::Write as _;

use super::*;

/// `nvidia-smi -q`, read.
#[derive(Debug)]
pub(super) struct Smi {
    /// Of the machine.
    general: Values,
    /// Of each GPU.
    gpus: Vec<Values>,
}

/// A field's place, such as `PCI / Bus Id`, and what stands there.
#[derive(Debug, Default)]
struct Values(Vec<(String, String)>);

impl Smi {
    pub(super) fn read(text: &str) -> Self {
        let mut smi = Self { general: Values::default(), gpus: Vec::new() };
        let mut above: Vec<&str> = Vec::new();
        for line in text.lines().filter(|line| !line.trim().is_empty()) {
            let depth = line.len() - line.trim_start().len();
            // Four spaces a level.
            above.truncate(depth / 4);
            let (key, value) = match line.split_once(" : ") {
                Some((key, value)) => (key.trim(), Some(value.trim())),
                None => (line.trim(), None),
            };
            if depth == 0 && key.starts_with("GPU ") {
                smi.gpus.push(Values::default());
                // Its own line is a level without a name.
                above = vec![""];
                continue;
            }
            above.push(key);
            let place: Vec<&str> = above.iter().copied().filter(|key| !key.is_empty()).collect();
            if let Some(value) = value {
                let of = match smi.gpus.last_mut() {
                    Some(gpu) if depth > 0 => gpu,
                    _ => &mut smi.general,
                };
                of.0.push((place.join(" / "), value.to_owned()));
            }
        }
        smi
    }
}

impl Values {
    /// The first of `places` that there is; drivers have renamed some.
    fn get(&self, places: &[&str]) -> Option<&str> {
        places.iter().find_map(|place| {
            self.0.iter().find(|(known, _)| known == place).map(|(_, value)| value.as_str())
        })
    }
}

/// Whether a difference is a fault.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Rule {
    Same,
    /// It moves from one moment to the next, or is worded in another way.
    Shown,
}

/// A field, where `nvidia-smi` has it, and as it would write ours.
type Row = (&'static str, Rule, &'static [&'static str], fn(&Gpu) -> Option<String>);

const ROWS: [Row; 33] = [
    ("uuid", Rule::Same, &["GPU UUID"], |gpu| gpu.uuid.clone()),
    ("product", Rule::Same, &["Product Name"], |gpu| gpu.product.clone()),
    ("brand", Rule::Shown, &["Product Brand"], |gpu| gpu.brand.clone()),
    ("architecture", Rule::Shown, &["Product Architecture"], |gpu| {
        gpu.architecture.as_ref()?.name.clone()
    }),
    ("serial", Rule::Same, &["Serial Number"], |gpu| gpu.serial.clone()),
    ("minor_number", Rule::Same, &["Minor Number"], |gpu| text(gpu.minor_number)),
    ("pci_bus_id", Rule::Same, &["PCI / Bus Id"], |gpu| {
        let (domain, rest) = gpu.pci_bus_id.as_ref()?.split_once(':')?;
        Some(format!("{domain:0>8}:{rest}").to_uppercase())
    }),
    ("persistence_mode", Rule::Same, &["Persistence Mode"], |gpu| mode(gpu.persistence_mode)),
    ("ecc_enabled", Rule::Same, &["ECC Mode / Current"], |gpu| mode(gpu.ecc_enabled)),
    ("mig.enabled", Rule::Same, &["MIG Mode / Current"], |gpu| {
        gpu.mig.as_ref().filter(|mig| mig.capable).and_then(|mig| mode(Some(mig.enabled)))
    }),
    ("mig.pending_enabled", Rule::Same, &["MIG Mode / Pending"], |gpu| {
        gpu.mig.as_ref().filter(|mig| mig.capable).and_then(|mig| mode(Some(mig.pending_enabled)))
    }),
    ("memory.total_bytes", Rule::Same, &["FB Memory Usage / Total"], |gpu| {
        mib(gpu.memory?.total_bytes)
    }),
    ("memory.reserved_bytes", Rule::Shown, &["FB Memory Usage / Reserved"], |gpu| {
        mib(gpu.memory?.reserved_bytes?)
    }),
    ("memory.used_bytes", Rule::Shown, &["FB Memory Usage / Used"], |gpu| {
        mib(gpu.memory?.used_bytes)
    }),
    ("memory.free_bytes", Rule::Shown, &["FB Memory Usage / Free"], |gpu| {
        mib(gpu.memory?.free_bytes)
    }),
    ("memory.bar1_total_bytes", Rule::Same, &["BAR1 Memory Usage / Total"], |gpu| {
        mib(gpu.memory?.bar1_total_bytes?)
    }),
    ("memory.bar1_used_bytes", Rule::Shown, &["BAR1 Memory Usage / Used"], |gpu| {
        mib(gpu.memory?.bar1_used_bytes?)
    }),
    ("pcie.max_generation", Rule::Same, &["PCI / GPU Link Info / PCIe Generation / Max"], |gpu| {
        text(gpu.pcie.max_generation)
    }),
    ("pcie.generation", Rule::Shown, &["PCI / GPU Link Info / PCIe Generation / Current"], |gpu| {
        text(gpu.pcie.generation)
    }),
    ("pcie.max_width", Rule::Same, &["PCI / GPU Link Info / Link Width / Max"], |gpu| {
        Some(format!("{}x", gpu.pcie.max_width?))
    }),
    ("pcie.width", Rule::Shown, &["PCI / GPU Link Info / Link Width / Current"], |gpu| {
        Some(format!("{}x", gpu.pcie.width?))
    }),
    (
        "telemetry.utilization_ratio",
        Rule::Shown,
        &["Utilization / GPU", "Utilization / Gpu"],
        |gpu| percent(gpu.telemetry.utilization_ratio),
    ),
    ("telemetry.memory_bus_utilization_ratio", Rule::Shown, &["Utilization / Memory"], |gpu| {
        percent(gpu.telemetry.memory_bus_utilization_ratio)
    }),
    ("telemetry.temperature_celsius", Rule::Shown, &["Temperature / GPU Current Temp"], |gpu| {
        Some(format!("{} C", gpu.telemetry.temperature_celsius?))
    }),
    (
        "telemetry.power_watts",
        Rule::Shown,
        &[
            "GPU Power Readings / Power Draw",
            "GPU Power Readings / Average Power Draw",
            "Power Readings / Power Draw",
        ],
        |gpu| watts(gpu.telemetry.power_watts),
    ),
    (
        "telemetry.power_limit_watts",
        Rule::Shown,
        &["GPU Power Readings / Current Power Limit", "Power Readings / Enforced Power Limit"],
        |gpu| watts(gpu.telemetry.power_limit_watts),
    ),
    (
        "faults.ecc_uncorrected_volatile",
        Rule::Shown,
        &["ECC Errors / Volatile / DRAM Uncorrectable"],
        |gpu| text(gpu.faults.ecc_uncorrected_volatile),
    ),
    (
        "faults.remapped_rows_uncorrectable",
        Rule::Same,
        &["Remapped Rows / Uncorrectable Error"],
        |gpu| text(gpu.faults.remapped_rows_uncorrectable),
    ),
    ("faults.remap_pending", Rule::Same, &["Remapped Rows / Pending"], |gpu| {
        yes(gpu.faults.remap_pending)
    }),
    ("faults.remap_failed", Rule::Same, &["Remapped Rows / Remapping Failure Occurred"], |gpu| {
        yes(gpu.faults.remap_failed)
    }),
    ("faults.recovery_action", Rule::Shown, &["GPU Recovery Action"], |gpu| {
        Some(format!("{:?}", gpu.faults.recovery_action?))
    }),
    ("fabric.clique_id", Rule::Shown, &["Fabric / CliqueId", "Fabric / Clique ID"], |gpu| {
        text(Some(gpu.fabric.as_ref()?.clique_id))
    }),
    (
        "fabric.cluster_uuid",
        Rule::Shown,
        &["Fabric / ClusterUUID", "Fabric / Cluster UUID"],
        |gpu| Some(gpu.fabric.as_ref()?.cluster_uuid.clone()),
    ),
];

/// As `nvidia-smi` calls the bits of which the inventory tells.
const THROTTLES: [(&str, &str); 6] = [
    ("SW Power Cap", "SW_POWER_CAP"),
    ("HW Slowdown", "HW_SLOWDOWN"),
    ("HW Slowdown / HW Thermal Slowdown", "HW_THERMAL_SLOWDOWN"),
    ("HW Slowdown / HW Power Brake Slowdown", "HW_POWER_BRAKE_SLOWDOWN"),
    ("Sync Boost", "SYNC_BOOST"),
    ("SW Thermal Slowdown", "SW_THERMAL_SLOWDOWN"),
];

fn text(value: Option<impl ToString>) -> Option<String> {
    value.map(|value| value.to_string())
}

fn mode(on: Option<bool>) -> Option<String> {
    on.map(|on| if on { "Enabled" } else { "Disabled" }.to_owned())
}

fn yes(is: Option<bool>) -> Option<String> {
    is.map(|is| if is { "Yes" } else { "No" }.to_owned())
}

fn mib(bytes: u64) -> Option<String> {
    Some(format!("{} MiB", bytes >> 20))
}

fn percent(ratio: Option<f64>) -> Option<String> {
    ratio.map(|ratio| format!("{:.0} %", ratio * 100.0))
}

fn watts(watts: Option<f64>) -> Option<String> {
    watts.map(|watts| format!("{watts:.2} W"))
}

/// A Markdown table for each GPU, and the differences that are faults.
pub(super) fn beside(inventory: &GpuInventory, smi: &Smi) -> (String, Vec<String>) {
    let (mut table, mut faults) = (String::new(), Vec::new());
    let mut row = |field: &str, rule: Rule, ours: Option<String>, theirs: Option<&str>| {
        // How it says that a GPU has it not; a field that it does not know is none either.
        let told = theirs.filter(|told| {
            !["N/A", "[N/A]", "Requested functionality has been deprecated"].contains(told)
        });
        let verdict = match (&ours, theirs) {
            (_, None) => "not told by nvidia-smi",
            (None, Some(_)) if told.is_none() => "neither",
            (Some(ours), Some(theirs)) if ours == theirs => "same",
            _ if rule == Rule::Shown => "shown",
            _ => "**differs**",
        };
        let (ours, theirs) = (ours.as_deref().unwrap_or("null"), theirs.unwrap_or("-"));
        if verdict == "**differs**" {
            faults.push(format!("{field}: {ours}, and nvidia-smi says {theirs}"));
        }
        let _ = writeln!(table, "| `{field}` | {ours} | {theirs} | {verdict} |");
    };
    row(
        "driver_version",
        Rule::Same,
        inventory.driver_version.clone(),
        smi.general.get(&["Driver Version"]),
    );
    row(
        "cuda_driver_version",
        Rule::Same,
        inventory.cuda_driver_version.clone(),
        smi.general.get(&["CUDA Version"]),
    );
    for gpu in &inventory.gpus {
        let of_it = |theirs: &&Values| theirs.get(&["GPU UUID"]) == gpu.uuid.as_deref();
        let Some(theirs) = smi.gpus.iter().find(of_it) else {
            row("uuid", Rule::Same, gpu.uuid.clone(), Some("nothing of it"));
            continue;
        };
        for (field, rule, places, ours) in ROWS {
            row(field, rule, ours(gpu), theirs.get(places));
        }
        let active: Vec<&str> = THROTTLES
            .iter()
            .filter(|(name, _)| {
                let places =
                    ["Event", "Throttle"].map(|word| format!("Clocks {word} Reasons / {name}"));
                theirs.get(&places.each_ref().map(String::as_str)) == Some("Active")
            })
            .map(|(_, code)| *code)
            .collect();
        let ours = gpu.telemetry.throttle_reasons.as_ref().map(|reasons| reasons.join(" "));
        row("telemetry.throttle_reasons", Rule::Shown, ours, Some(&active.join(" ")));
    }
    (format!("| Field | carport | nvidia-smi -q | |\n|---|---|---|---|\n{table}"), faults)
}

/// What `nvidia-smi` of driver 550 prints of an idle H100, shortened.
const H100: &str = "
==============NVSMI LOG==============

Timestamp                                 : Tue Nov 24 16:00:00 2026
Driver Version                            : 550.54.15
CUDA Version                              : 12.4

Attached GPUs                             : 1
GPU 00000000:1B:00.0
    Product Name                          : NVIDIA H100 80GB HBM3
    Product Brand                         : NVIDIA
    Product Architecture                  : Hopper
    Persistence Mode                      : Enabled
    MIG Mode
        Current                           : Disabled
        Pending                           : Disabled
    Serial Number                         : 1655023000000
    GPU UUID                              : GPU-00000000-0000-4000-8000-000000000000
    Minor Number                          : 0
    PCI
        Bus                               : 0x1B
        Bus Id                            : 00000000:1B:00.0
        GPU Link Info
            PCIe Generation
                Max                       : 5
                Current                   : 5
            Link Width
                Max                       : 16x
                Current                   : 16x
    Clocks Event Reasons
        Idle                              : Active
        SW Power Cap                      : Not Active
        HW Slowdown                       : Not Active
            HW Thermal Slowdown           : Not Active
    FB Memory Usage
        Total                             : 81559 MiB
        Reserved                          : 551 MiB
        Used                              : 0 MiB
        Free                              : 81008 MiB
    BAR1 Memory Usage
        Total                             : 131072 MiB
        Used                              : 1 MiB
    Utilization
        Gpu                               : 0 %
        Memory                            : 0 %
    ECC Mode
        Current                           : Enabled
    ECC Errors
        Volatile
            DRAM Uncorrectable            : 0
    Remapped Rows
        Correctable Error                 : 0
        Uncorrectable Error               : 0
        Pending                           : No
        Remapping Failure Occurred        : No
    Temperature
        GPU Current Temp                  : 31 C
    GPU Power Readings
        Power Draw                        : 69.42 W
        Current Power Limit               : 700.00 W
    Fabric
        State                             : N/A
        Status                            : N/A
    Processes                             : None
";

fn inventory(scenario: &Scenario) -> GpuInventory {
    let sample = look(scenario).unwrap();
    let mut inventory = GpuInventory::none(ProviderState::Ok, "");
    inventory.driver_version = sample.driver_version;
    inventory.cuda_driver_version = sample.cuda_driver_version;
    inventory.gpus = sample.gpus;
    inventory
}

#[test]
fn a_gpu_and_its_nvidia_smi_agree() {
    let (table, faults) = beside(&inventory(&Scenario::h100s(1)), &Smi::read(H100));
    assert_eq!(faults, [""; 0], "{table}");
    for line in [
        "| `driver_version` | 550.54.15 | 550.54.15 | same |",
        "| `pci_bus_id` | 00000000:1B:00.0 | 00000000:1B:00.0 | same |",
        "| `pcie.max_width` | 16x | 16x | same |",
        "| `memory.total_bytes` | 81559 MiB | 81559 MiB | same |",
        "| `telemetry.power_limit_watts` | 700.00 W | 700.00 W | same |",
        "| `faults.recovery_action` | None | - | not told by nvidia-smi |",
        "| `fabric.clique_id` | null | - | not told by nvidia-smi |",
        "| `telemetry.throttle_reasons` |  |  | same |",
    ] {
        assert!(table.lines().any(|found| found == line), "{line} is not in\n{table}");
    }
    assert_eq!(table.matches("| same |").count(), 33, "{table}");
}

#[test]
fn a_difference_that_matters_is_a_fault_and_others_are_shown() {
    let other = H100
        .replace("81559 MiB", "81920 MiB")
        .replace("31 C", "32 C")
        .replace(
            "Pending                           : No",
            "Pending                           : N/A",
        )
        .replace(
            "SW Power Cap                      : Not Active",
            "SW Power Cap                      : Active",
        );
    let (table, faults) = beside(&inventory(&Scenario::h100s(1)), &Smi::read(&other));
    assert_eq!(
        faults,
        [
            "memory.total_bytes: 81559 MiB, and nvidia-smi says 81920 MiB",
            "faults.remap_pending: No, and nvidia-smi says N/A"
        ]
    );
    assert!(table.contains("| `telemetry.temperature_celsius` | 31 C | 32 C | shown |"), "{table}");
    assert!(
        table.contains("| `telemetry.throttle_reasons` |  | SW_POWER_CAP | shown |"),
        "{table}"
    );

    let two = inventory(&Scenario::h100s(2));
    let (_, faults) = beside(&two, &Smi::read(H100));
    assert_eq!(faults.len(), 1, "{faults:?}");
    assert!(faults[0].ends_with("nvidia-smi says nothing of it"), "{faults:?}");
}
