//! What the fake library says, as a JSON file.
//!
//! Every field has a default, so that a scenario names only what it is about.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// NVML's return codes by name, for [`Scenario::errors`] and [`Device::errors`].
pub mod code {
    pub use nvml_wrapper_sys::bindings::{
        nvmlReturn_enum_NVML_ERROR_ARGUMENT_VERSION_MISMATCH as ARGUMENT_VERSION_MISMATCH,
        nvmlReturn_enum_NVML_ERROR_DRIVER_NOT_LOADED as DRIVER_NOT_LOADED,
        nvmlReturn_enum_NVML_ERROR_GPU_IS_LOST as GPU_IS_LOST,
        nvmlReturn_enum_NVML_ERROR_LIB_RM_VERSION_MISMATCH as LIB_RM_VERSION_MISMATCH,
        nvmlReturn_enum_NVML_ERROR_NO_PERMISSION as NO_PERMISSION,
        nvmlReturn_enum_NVML_ERROR_NOT_FOUND as NOT_FOUND,
        nvmlReturn_enum_NVML_ERROR_NOT_SUPPORTED as NOT_SUPPORTED,
        nvmlReturn_enum_NVML_ERROR_OPERATING_SYSTEM as OPERATING_SYSTEM,
        nvmlReturn_enum_NVML_ERROR_RESET_REQUIRED as RESET_REQUIRED,
        nvmlReturn_enum_NVML_ERROR_UNKNOWN as UNKNOWN,
    };
}

/// A node: its driver and its GPUs.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Scenario {
    /// As `nvidia-smi` prints it.
    pub driver_version: String,
    /// NVML's own version: CUDA's major version, then the driver's.
    pub nvml_version: String,
    /// 1000 × major + 10 × minor.
    pub cuda_driver_version: i32,
    /// The GPUs in NVML's order.
    pub devices: Vec<Device>,
    /// Function name → the code that it returns in place of an answer. Covers the
    /// functions of the system and, for every device, those of devices.
    pub errors: BTreeMap<String, u32>,
    /// Function name → how long it blocks before it answers, in milliseconds.
    pub hang_ms: BTreeMap<String, u64>,
}

/// One GPU. `None` answers "not supported".
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Device {
    /// `GPU-` and a UUID.
    pub uuid: String,
    /// The product. U+FFFD in a text stands for a byte that is no UTF-8.
    pub name: String,
    /// The board's serial number.
    pub serial: Option<String>,
    /// The N of `/dev/nvidiaN`.
    pub minor: Option<u32>,
    /// PCI domain, bus and device.
    pub pci: (u32, u32, u32),
    /// `nvmlBrandType_t`.
    pub brand: u32,
    /// `nvmlDeviceArchitecture_t`.
    pub architecture: u32,
    /// Major and minor.
    pub compute_capability: (i32, i32),
    /// Frame buffer.
    pub memory: Option<Memory>,
    /// BAR1 total and used, in bytes.
    pub bar1_bytes: Option<(u64, u64)>,
    /// `None`: the GPU cannot do MIG.
    pub mig: Option<Mig>,
    /// The parts that exist, by slot; seen in MIG mode only.
    pub mig_devices: Vec<MigDevice>,
    /// The sizes of parts that can be made; none where the GPU cannot do MIG.
    pub mig_profiles: Vec<MigProfile>,
    /// The NUMA node, which decides how far two GPUs are from each other.
    pub numa_node: u32,
    /// GPUs with the same number here are below one PCIe switch.
    pub pcie_switch: Option<u32>,
    /// PCIe generation and width now, and at most.
    pub pcie: Option<[u32; 4]>,
    /// Active NVLinks.
    pub nvlinks: Vec<NvLink>,
    /// Of each NVLink and direction, in MB/s.
    pub nvlink_megabytes_per_second: Option<u32>,
    /// Cluster and clique of a completed NVLink network across nodes.
    pub fabric: Option<([u8; 16], u32)>,
    /// Rows remapped for uncorrectable errors, whether some wait, and whether it failed.
    pub remapped_rows: Option<(u32, bool, bool)>,
    /// `nvmlDeviceGpuRecoveryAction_t`.
    pub recovery_action: Option<u32>,
    /// Uncorrectable errors since the driver was loaded.
    pub ecc_uncorrected: Option<u64>,
    /// Bits of `nvmlClocksThrottleReason*`.
    pub throttle_reasons: Option<u64>,
    /// Errors that the driver has reported, in order. A client hears of those that are
    /// added while it listens.
    pub xids: Vec<u64>,
    /// Persistence mode.
    pub persistence: bool,
    /// ECC mode.
    pub ecc: Option<bool>,
    /// GPU and memory controller, in percent.
    pub utilization_percent: Option<(u32, u32)>,
    /// Draw and enforced limit, in milliwatts.
    pub power_milliwatts: Option<(u32, u32)>,
    /// Core temperature.
    pub temperature_celsius: Option<u32>,
    /// Compute processes.
    pub processes: Vec<Process>,
    /// Function name → code, for this GPU only. `*` is every function that takes
    /// a device; `nvmlDeviceGetHandleByIndex_v2` counts as one. With `part:` before the name, for
    /// its parts only.
    pub errors: BTreeMap<String, u32>,
    /// Function name → milliseconds, for this GPU only.
    pub hang_ms: BTreeMap<String, u64>,
}

/// Frame buffer memory in bytes, as `nvmlDeviceGetMemoryInfo_v2` counts it:
/// `total = reserved + used + free`.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Memory {
    /// All of it.
    pub total: u64,
    /// Held by the driver and firmware.
    pub reserved: u64,
    /// Held by processes.
    pub used: u64,
}

/// MIG mode now and after the next reset.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mig {
    /// On now.
    pub current: bool,
    /// On after the next reset.
    pub pending: bool,
}

/// A part of a GPU.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MigDevice {
    /// `MIG-` and a UUID.
    pub uuid: String,
    /// What follows the product's name, such as `MIG 1g.10gb`; empty as on old drivers.
    pub name: String,
    /// GPU instance.
    pub gpu_instance: u32,
    /// Compute instance.
    pub compute_instance: u32,
    /// Slices of processors: of the compute instance, and of its GPU instance.
    pub slices: (u32, u32),
    /// Processors.
    pub multiprocessors: u32,
    /// Its memory.
    pub memory: Memory,
}

/// A size of parts.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MigProfile {
    /// `NVML_GPU_INSTANCE_PROFILE_*`.
    pub index: u32,
    /// The number by which the driver knows it.
    pub id: u32,
    /// Such as `MIG 1g.10gb`.
    pub name: String,
    /// Slices of processors.
    pub slices: u32,
    /// Memory, in MiB.
    pub memory_mib: u64,
    /// How many fit on an empty GPU.
    pub instances: u32,
    /// How many more fit.
    pub remaining: u32,
}

/// Where an NVLink leads.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NvLink {
    /// To the GPU of this index.
    Gpu(u32),
    /// To a switch, by its PCI bus.
    Switch(u32),
}

/// A process on a GPU.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Process {
    /// Its process id.
    pub pid: u32,
    /// `None`: NVML says "not available".
    pub used_bytes: Option<u64>,
}

impl Scenario {
    /// `count` idle and healthy GPUs of one kind.
    pub fn h100s(count: u32) -> Self {
        Self { devices: (0..count).map(Device::h100).collect(), ..Self::default() }
    }

    /// Makes `function` return `code`.
    #[must_use]
    pub fn failing(mut self, function: &str, code: u32) -> Self {
        self.errors.insert(function.into(), code);
        self
    }
}

impl Default for Scenario {
    fn default() -> Self {
        Self {
            driver_version: "550.54.15".into(),
            nvml_version: "12.550.54.15".into(),
            cuda_driver_version: 12040,
            devices: Vec::new(),
            errors: BTreeMap::new(),
            hang_ms: BTreeMap::new(),
        }
    }
}

impl Device {
    /// The GPU number `index` of a node of equal ones.
    pub fn h100(index: u32) -> Self {
        const MIB: u64 = 1 << 20;
        Self {
            uuid: format!("GPU-00000000-0000-4000-8000-{index:012x}"),
            name: "NVIDIA H100 80GB HBM3".into(),
            serial: Some(format!("16550230000{index:02}")),
            minor: Some(index),
            pci: (0, 0x1b + index, 0),
            brand: nvml_wrapper_sys::bindings::nvmlBrandType_enum_NVML_BRAND_NVIDIA,
            architecture: nvml_wrapper_sys::bindings::NVML_DEVICE_ARCH_HOPPER,
            compute_capability: (9, 0),
            memory: Some(Memory { total: 81_559 * MIB, reserved: 551 * MIB, used: 0 }),
            bar1_bytes: Some((131_072 * MIB, MIB)),
            mig: Some(Mig { current: false, pending: false }),
            mig_devices: Vec::new(),
            mig_profiles: vec![
                MigProfile::h100(0, 19, 1, 9_984, 7),
                MigProfile::h100(2, 9, 3, 40_448, 2),
                MigProfile::h100(4, 0, 7, 81_152, 1),
            ],
            numa_node: index / 4,
            pcie_switch: Some(index / 2),
            pcie: Some([5, 16, 5, 16]),
            // Eighteen links, to four switches.
            nvlinks: (0..18).map(|link| NvLink::Switch(0x80 + link % 4)).collect(),
            nvlink_megabytes_per_second: Some(26_562),
            fabric: None,
            remapped_rows: Some((0, false, false)),
            recovery_action: Some(0),
            ecc_uncorrected: Some(0),
            // Idle.
            throttle_reasons: Some(1),
            xids: Vec::new(),
            persistence: true,
            ecc: Some(true),
            utilization_percent: Some((0, 0)),
            power_milliwatts: Some((69_420, 700_000)),
            temperature_celsius: Some(31),
            processes: Vec::new(),
            errors: BTreeMap::new(),
            hang_ms: BTreeMap::new(),
        }
    }

    /// Makes `function` (or `*`) return `code` for this GPU.
    #[must_use]
    pub fn failing(mut self, function: &str, code: u32) -> Self {
        self.errors.insert(function.into(), code);
        self
    }
}

impl MigProfile {
    fn h100(index: u32, id: u32, slices: u32, memory_mib: u64, instances: u32) -> Self {
        let gigabytes = memory_mib / 1_000 + u64::from(slices == 1);
        let name = format!("MIG {slices}g.{}gb", gigabytes / 10 * 10);
        Self { index, id, name, slices, memory_mib, instances, remaining: instances }
    }
}

impl MigDevice {
    /// A `1g.10gb` part in the slot `slot` of the GPU number `gpu`.
    pub fn small(gpu: u32, slot: u32) -> Self {
        const MIB: u64 = 1 << 20;
        Self {
            uuid: format!("MIG-00000000-0000-4000-8000-{gpu:06x}{slot:06x}"),
            name: "MIG 1g.10gb".into(),
            gpu_instance: 7 + slot,
            compute_instance: 0,
            slices: (1, 1),
            multiprocessors: 16,
            memory: Memory { total: 9_984 * MIB, reserved: 0, used: 0 },
        }
    }
}

impl Default for Device {
    fn default() -> Self {
        Self::h100(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scenario_names_only_what_it_is_about() {
        let json = r#"{
            "devices": [{}, {"uuid": "GPU-b", "errors": {"*": 15}}],
            "hang_ms": {"nvmlInit_v2": 5}
        }"#;
        let scenario: Scenario = serde_json::from_str(json).unwrap();
        assert_eq!(scenario.driver_version, "550.54.15");
        assert_eq!(scenario.devices[0].name, "NVIDIA H100 80GB HBM3");
        assert_eq!(scenario.devices[1].uuid, "GPU-b");
        assert_eq!(scenario.devices[1].errors["*"], code::GPU_IS_LOST);
    }

    #[test]
    fn a_misspelt_field_is_refused() {
        let error = serde_json::from_str::<Scenario>(r#"{"device": []}"#).unwrap_err();
        assert!(error.to_string().starts_with("unknown field `device`"), "{error}");
    }
}
