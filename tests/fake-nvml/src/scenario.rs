//! What the fake library says, as a JSON file.
//!
//! Every field has a default, so that a scenario names only what it is about.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// NVML's return codes by name, for [`Scenario::errors`] and [`Device::errors`].
pub mod code {
    pub use nvml_wrapper_sys::bindings::{
        nvmlReturn_enum_NVML_ERROR_DRIVER_NOT_LOADED as DRIVER_NOT_LOADED,
        nvmlReturn_enum_NVML_ERROR_GPU_IS_LOST as GPU_IS_LOST,
        nvmlReturn_enum_NVML_ERROR_LIB_RM_VERSION_MISMATCH as LIB_RM_VERSION_MISMATCH,
        nvmlReturn_enum_NVML_ERROR_NO_PERMISSION as NO_PERMISSION,
        nvmlReturn_enum_NVML_ERROR_NOT_SUPPORTED as NOT_SUPPORTED,
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
    /// The product.
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
    /// a device; `nvmlDeviceGetHandleByIndex_v2` counts as one.
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
