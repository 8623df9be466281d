//! The real probe: NVML through nvml-wrapper.
//!
//! Device handles live for one look only. They borrow the library, and NVML keeps
//! them, so that asking again costs a table lookup.

use std::error::Error as _;
use std::ffi::OsStr;
use std::path::PathBuf;

use nvml_wrapper::enum_wrappers::device::TemperatureSensor;
use nvml_wrapper::enums::device::UsedGpuMemory;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::{Device, Nvml, cuda_driver_version_major, cuda_driver_version_minor};

use super::inventory::{
    ComputeCapability, Gpu, GpuMemory, GpuProcess, HealthState, Mig, ProviderState, Telemetry,
};
use super::nvml_quirks::{self as quirks, OpenNvml};
use super::probe::{GpuProbe, ProbeError, Sample};
use super::sysfs::Sysfs;

/// What the driver's packages and NVIDIA's container toolkit call it; the loader
/// searches its usual folders.
const LIBRARY: &str = "libnvidia-ml.so.1";

/// More GPUs than any node has; a count above it is nonsense, not a node.
const MAX_GPUS: u32 = 256;

/// NVML as a [`GpuProbe`].
#[derive(Debug)]
pub(super) struct NvmlProbe {
    library: Option<PathBuf>,
    sysfs: Sysfs,
    open: Option<OpenNvml>,
    session: u64,
}

impl NvmlProbe {
    /// Loads nothing yet. Without a path, the loader looks for
    /// `libnvidia-ml.so.1`.
    pub(super) fn new(library: Option<PathBuf>, sysfs: Sysfs) -> Self {
        Self { library, sysfs, open: None, session: 0 }
    }

    fn open(&mut self) -> Result<OpenNvml, ProbeError> {
        let path = self.library.as_deref().map_or(OsStr::new(LIBRARY), |path| path.as_os_str());
        let nvml = Nvml::builder().lib_path(path).init().map_err(|error| self.refused(&error))?;
        self.session += 1;
        Ok(OpenNvml::new(nvml))
    }

    /// What it means that NVML as a whole does not answer.
    fn refused(&self, error: &NvmlError) -> ProbeError {
        let library = self.library.as_deref().unwrap_or(LIBRARY.as_ref()).display();
        let said = quirks::describe(error);
        let module = self.sysfs.driver_version();
        let (state, message) = match error {
            NvmlError::LibloadingError(_) => {
                let said = error.source().map_or(said, ToString::to_string);
                let message = format!(
                    "load {library}: {said}; right on a node without NVIDIA GPUs, otherwise install \
                     the driver, or give the pod runtimeClassName nvidia or the library's path"
                );
                (ProviderState::NoLibrary, message)
            }
            NvmlError::LibraryNotFound => {
                let message = format!(
                    "start {library}: {said}; the driver's libraries are incomplete, or this is the \
                     CUDA toolkit's stub: use the driver's own library"
                );
                (ProviderState::NoLibrary, message)
            }
            NvmlError::DriverNotLoaded => {
                let message = match module {
                    None => "the nvidia kernel module is not loaded: run `nvidia-smi` on the node \
                             and reinstall the driver if that fails too"
                        .to_owned(),
                    Some(version) => format!(
                        "the nvidia kernel module {version} is loaded but not in reach: give the \
                         container /dev/nvidiactl and the GPUs' devices"
                    ),
                };
                (ProviderState::NoDriver, message)
            }
            NvmlError::NoPermission => {
                let message = format!(
                    "{said}: the agent may not open /dev/nvidiactl; run it as root and give the \
                     container the NVIDIA devices"
                );
                (ProviderState::NoPermission, message)
            }
            NvmlError::LibRmVersionMismatch => {
                let module = module.map_or(String::new(), |version| format!(" ({version})"));
                let message = format!(
                    "{library} is of another version than the loaded kernel module{module}: the \
                     driver was upgraded; restart the agent's pod if the module is the new one, \
                     otherwise drain the node and restart it"
                );
                (ProviderState::VersionMismatch, message)
            }
            error if quirks::is_no_gpu(error) => (ProviderState::NoDevices, no_devices()),
            NvmlError::FailedToLoadSymbol(_) => {
                let message = format!("{library} is not an NVML library: {said}");
                (ProviderState::Error, message)
            }
            _ => {
                let message = format!(
                    "nvml: {said}; run `nvidia-smi` on the node: if it works there, the container \
                     lacks the NVIDIA devices, otherwise look for NVRM in the kernel log"
                );
                (ProviderState::Error, message)
            }
        };
        ProbeError { state, message }
    }

    fn look(&self, nvml: &Nvml) -> Result<Sample, NvmlError> {
        let count = nvml.device_count()?.min(MAX_GPUS);
        Ok(Sample {
            session: self.session,
            driver_version: nvml.sys_driver_version().ok(),
            nvml_version: nvml.sys_nvml_version().ok(),
            cuda_driver_version: nvml.sys_cuda_driver_version().ok().map(|version| {
                let major = cuda_driver_version_major(version);
                format!("{major}.{}", cuda_driver_version_minor(version))
            }),
            gpus: (0..count).map(|index| self.look_at(nvml, index)).collect(),
        })
    }

    fn look_at(&self, nvml: &Nvml, index: u32) -> Gpu {
        let mut gpu = Gpu::unknown(index);
        let device = match nvml.device_by_index(index) {
            Ok(device) => device,
            Err(error) => {
                note(&mut gpu, &error);
                not_readable(&mut gpu, &error);
                return gpu;
            }
        };
        match device.uuid() {
            Ok(uuid) => gpu.uuid = Some(uuid),
            Err(error) => {
                note(&mut gpu, &error);
                not_readable(&mut gpu, &error);
            }
        }
        self.identify(&mut gpu, &device);
        measure(&mut gpu, &device);
        gpu
    }

    fn identify(&self, gpu: &mut Gpu, device: &Device<'_>) {
        // The function is always 0: a GPU's other functions are sound and USB.
        gpu.pci_bus_id = ask(gpu, || device.pci_info())
            .map(|pci| format!("{:04x}:{:02x}:{:02x}.0", pci.domain, pci.bus, pci.device));
        gpu.minor_number = ask(gpu, || device.minor_number());
        gpu.product = ask(gpu, || device.name());
        gpu.brand = ask(gpu, || quirks::brand(device));
        gpu.architecture = ask(gpu, || quirks::architecture(device));
        gpu.compute_capability = ask(gpu, || device.cuda_compute_capability()).and_then(|cuda| {
            let (major, minor) = (cuda.major.try_into().ok()?, cuda.minor.try_into().ok()?);
            Some(ComputeCapability { major, minor })
        });
        gpu.serial = ask(gpu, || device.serial());
        if let Some(id) = &gpu.pci_bus_id {
            gpu.numa_node = self.sysfs.numa_node(id);
            gpu.cpu_list = self.sysfs.cpu_list(id);
        }
    }
}

impl GpuProbe for NvmlProbe {
    fn sample(&mut self) -> Result<Sample, ProbeError> {
        let nvml = match self.open.take() {
            Some(nvml) => nvml,
            None => self.open()?,
        };
        let sample = self.look(&nvml).map_err(|error| self.refused(&error))?;
        self.open = Some(nvml);
        Ok(sample)
    }

    fn close(&mut self) {
        self.open = None;
    }
}

/// The message for a driver that has no GPU.
pub(super) fn no_devices() -> String {
    "the driver is loaded and has no GPU: check `lspci -d 10de:` and the container's devices"
        .to_owned()
}

fn measure(gpu: &mut Gpu, device: &Device<'_>) {
    gpu.memory = ask(gpu, || quirks::memory(device));
    let bar1 = ask(gpu, || device.bar1_memory_info());
    if let (Some(memory), Some(bar1)) = (&mut gpu.memory, bar1) {
        let (total, used) = (Some(bar1.total), Some(bar1.used));
        *memory = GpuMemory { bar1_total_bytes: total, bar1_used_bytes: used, ..*memory };
    }
    gpu.mig = ask(gpu, || match device.mig_mode() {
        Ok(mode) => Ok(Mig {
            capable: true,
            enabled: mode.current == 1,
            pending_enabled: mode.pending == 1,
        }),
        // How a GPU says that it cannot, and a driver that it is older than MIG.
        Err(NvmlError::NotSupported | NvmlError::FailedToLoadSymbol(_)) => {
            Ok(Mig { capable: false, enabled: false, pending_enabled: false })
        }
        Err(error) => Err(error),
    });
    gpu.persistence_mode = ask(gpu, || device.is_in_persistent_mode());
    gpu.ecc_enabled = ask(gpu, || device.is_ecc_enabled()).map(|ecc| ecc.currently_enabled);
    gpu.processes = ask(gpu, || device.running_compute_processes()).map(|processes| {
        let process = |process: nvml_wrapper::struct_wrappers::device::ProcessInfo| GpuProcess {
            pid: process.pid,
            used_memory_bytes: match process.used_gpu_memory {
                UsedGpuMemory::Used(bytes) => Some(bytes),
                UsedGpuMemory::Unavailable => None,
            },
        };
        processes.into_iter().map(process).collect()
    });

    let utilization = ask(gpu, || device.utilization_rates());
    let watts = |milliwatts: u32| f64::from(milliwatts) / 1000.0;
    gpu.telemetry = Telemetry {
        utilization_ratio: utilization.as_ref().map(|rates| f64::from(rates.gpu) / 100.0),
        memory_bus_utilization_ratio: utilization.map(|rates| f64::from(rates.memory) / 100.0),
        power_watts: ask(gpu, || device.power_usage()).map(watts),
        power_limit_watts: ask(gpu, || device.enforced_power_limit()).map(watts),
        temperature_celsius: ask(gpu, || device.temperature(TemperatureSensor::Gpu)).map(f64::from),
    };
}

/// One question. No answer is "not measured"; where the error tells of a sick GPU,
/// the GPU's health says so. A lost GPU is asked no more: each further question
/// may cost a time-out in the driver.
fn ask<T>(gpu: &mut Gpu, question: impl FnOnce() -> Result<T, NvmlError>) -> Option<T> {
    if gpu.health.state == HealthState::Lost {
        return None;
    }
    question().inspect_err(|error| note(gpu, error)).ok()
}

/// The GPU does not even say who it is.
fn not_readable(gpu: &mut Gpu, error: &NvmlError) {
    let said = quirks::describe(error);
    match error {
        // A GPU whose initialisation failed.
        NvmlError::Unknown => gpu.health.add(
            HealthState::Unhealthy,
            "GPU_NOT_READABLE",
            format!("{said}: look for NVRM and Xid in the kernel log"),
        ),
        _ if gpu.health.is_sick() => {}
        _ => gpu.health.add(
            HealthState::Unknown,
            "GPU_NOT_READABLE",
            format!("{said}: check that the container has this GPU's device"),
        ),
    }
}

/// What an error says about the GPU, as opposed to the question.
fn note(gpu: &mut Gpu, error: &NvmlError) {
    let (state, code, what_to_do) = match error {
        NvmlError::GpuLost => {
            (HealthState::Lost, "GPU_LOST", "look for Xid 79 in the kernel log; restart the node")
        }
        NvmlError::ResetRequired => (
            HealthState::Unhealthy,
            "GPU_RESET_REQUIRED",
            "drain the node and run `nvidia-smi --gpu-reset`",
        ),
        NvmlError::InsufficientPower => {
            (HealthState::Unhealthy, "GPU_INSUFFICIENT_POWER", "check the board's power cables")
        }
        NvmlError::IrqIssue => {
            (HealthState::Unhealthy, "GPU_IRQ_ISSUE", "look for NVRM in the kernel log")
        }
        // One odd answer does not condemn a GPU that answers the rest.
        NvmlError::Unknown => {
            (HealthState::Warning, "GPU_DRIVER_ERROR", "look for NVRM and Xid in the kernel log")
        }
        NvmlError::CorruptedInfoROM => {
            (HealthState::Warning, "GPU_INFOROM_CORRUPT", "have the board replaced")
        }
        _ => return,
    };
    gpu.health.add(state, code, format!("{}: {what_to_do}", quirks::describe(error)));
}
