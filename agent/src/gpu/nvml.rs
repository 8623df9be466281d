//! The real probe: NVML through nvml-wrapper.
//!
//! Device handles live for one look only. They borrow the library, and NVML keeps
//! them, so that asking again costs a table lookup.

use std::error::Error as _;
use std::ffi::OsStr;
use std::path::PathBuf;
use std::time::SystemTime;

use nvml_wrapper::enum_wrappers::device::{EccCounter, MemoryError, TemperatureSensor};
use nvml_wrapper::enums::device::UsedGpuMemory;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::struct_wrappers::device::{PciInfo, ProcessInfo};
use nvml_wrapper::{Device, Nvml, cuda_driver_version_major, cuda_driver_version_minor};
use tracing::warn;

use super::inventory::{
    ComputeCapability, Gpu, GpuMemory, GpuProcess, HealthState, ProviderState, RecoveryAction,
    Telemetry,
};
use super::links::PcieLink;
use super::nvml_events::{Events, Heard, XidEvent};
use super::nvml_links::Links;
use super::nvml_mig::{self as mig, Profiles};
use super::nvml_quirks::{self as quirks, OpenNvml};
use super::nvml_raw as raw;
use super::probe::{GpuProbe, ProbeError, Sample};
use super::sysfs::Sysfs;
use super::xid;

/// What the driver's packages and NVIDIA's container toolkit call it; the loader
/// searches its usual folders.
const LIBRARY: &str = "libnvidia-ml.so.1";

/// More GPUs than any node has; a count above it is nonsense, not a node.
pub(super) const MAX_GPUS: u32 = 256;

/// NVML as a [`GpuProbe`].
#[derive(Debug)]
pub(super) struct NvmlProbe {
    library: Option<PathBuf>,
    sysfs: Sysfs,
    fatal_xids: Vec<u32>,
    open: Option<Session>,
    session: u64,
}

/// One opening of the library, and what is known for as long as it lasts.
#[derive(Debug)]
struct Session {
    nvml: OpenNvml,
    events: Events,
    heard: Heard,
    links: Links,
    profiles: Profiles,
}

impl Session {
    fn new(nvml: Nvml) -> Self {
        let nvml = OpenNvml::new(nvml);
        let events = Events::listen(&nvml);
        let (links, profiles) = (Links::default(), Profiles::default());
        Self { nvml, events, heard: Heard::default(), links, profiles }
    }

    /// Hears what the driver has to say; whether that was anything.
    fn listen(&mut self) -> bool {
        self.events.hear(&self.nvml, &mut self.heard);
        !self.heard.is_empty()
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.events.close(&self.nvml);
    }
}

impl NvmlProbe {
    /// Loads nothing yet. Without a path, the loader looks for
    /// `libnvidia-ml.so.1`.
    pub(super) fn new(library: Option<PathBuf>, sysfs: Sysfs, fatal_xids: Vec<u32>) -> Self {
        Self { library, sysfs, fatal_xids, open: None, session: 0 }
    }

    fn open(&mut self) -> Result<Session, ProbeError> {
        let path = self.library.as_deref().map_or(OsStr::new(LIBRARY), |path| path.as_os_str());
        let nvml = Nvml::builder().lib_path(path).init().map_err(|error| self.refused(&error))?;
        self.session += 1;
        Ok(Session::new(nvml))
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
            NvmlError::NoPermission | NvmlError::OperatingSystem => {
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

    fn look(&self, session: &mut Session) -> Result<Sample, NvmlError> {
        let count = session.nvml.device_count()?.min(MAX_GPUS);
        let mut gpus: Vec<Gpu> = (0..count)
            .map(|index| self.look_at(&session.nvml, index, &mut session.profiles))
            .collect();
        session.listen();
        for (event, at) in session.heard.take() {
            self.suffer(&mut gpus, event, at);
        }
        let links = session.links.between(&session.nvml, &gpus);
        let nvml = &session.nvml;
        Ok(Sample {
            session: self.session,
            driver_version: nvml.sys_driver_version().ok(),
            nvml_version: nvml.sys_nvml_version().ok(),
            cuda_driver_version: nvml.sys_cuda_driver_version().ok().map(|version| {
                let major = cuda_driver_version_major(version);
                format!("{major}.{}", cuda_driver_version_minor(version))
            }),
            gpus,
            links,
        })
    }

    /// An error that the driver reported of one of the GPUs.
    fn suffer(&self, gpus: &mut [Gpu], XidEvent { index, xid }: XidEvent, at: SystemTime) {
        let what = xid::meaning(xid);
        let Some(gpu) = gpus.iter_mut().find(|gpu| Some(gpu.index) == index) else {
            warn!(xid, what, "the driver reports an error of a gpu that it does not name");
            return;
        };
        let uuid = gpu.uuid.as_deref().unwrap_or("unknown");
        warn!(uuid, index, xid, what, "the driver reports an error");
        gpu.faults.last_xid = Some(xid);
        gpu.faults.last_xid_at = Some(at);
        if self.fatal_xids.iter().any(|fatal| u64::from(*fatal) == xid) {
            let message = format!("Xid {xid}: {what}; look for Xid in the kernel log");
            gpu.health.add(HealthState::Unhealthy, &format!("GPU_XID_{xid}"), message);
        }
    }

    fn look_at(&self, nvml: &Nvml, index: u32, profiles: &mut Profiles) -> Gpu {
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
        mig::look(&mut gpu, &device, profiles);
        examine(&mut gpu, &device);
        gpu
    }

    fn identify(&self, gpu: &mut Gpu, device: &Device<'_>) {
        gpu.pci_bus_id = ask(gpu, || device.pci_info()).map(|pci| bus_id(&pci));
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
            gpu.pcie_root = self.sysfs.pcie_root(id);
            gpu.numa_node = self.sysfs.numa_node(id);
            gpu.cpu_list = self.sysfs.cpu_list(id);
        }
    }
}

impl GpuProbe for NvmlProbe {
    fn sample(&mut self) -> Result<Sample, ProbeError> {
        let mut session = match self.open.take() {
            Some(session) => session,
            None => self.open()?,
        };
        let sample = self.look(&mut session).map_err(|error| self.refused(&error))?;
        self.open = Some(session);
        Ok(sample)
    }

    fn has_news(&mut self) -> bool {
        self.open.as_mut().is_some_and(Session::listen)
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
    gpu.persistence_mode = ask(gpu, || device.is_in_persistent_mode());
    gpu.ecc_enabled = ask(gpu, || device.is_ecc_enabled()).map(|ecc| ecc.currently_enabled);
    gpu.processes = ask(gpu, || quirks::processes(device)).map(|processes| {
        let process = |process: ProcessInfo| GpuProcess {
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
        throttle_reasons: ask(gpu, || raw::throttle_reasons(device)).map(throttle_reasons),
    };
    gpu.pcie = PcieLink {
        generation: ask(gpu, || device.current_pcie_link_gen()),
        width: ask(gpu, || device.current_pcie_link_width()),
        max_generation: ask(gpu, || device.max_pcie_link_gen()),
        max_width: ask(gpu, || device.max_pcie_link_width()),
    };
    gpu.fabric = ask(gpu, || raw::fabric(device)).flatten();
}

/// What the GPU has been through, and what that means for its health.
fn examine(gpu: &mut Gpu, device: &Device<'_>) {
    let mut faults = std::mem::take(&mut gpu.faults);
    faults.ecc_uncorrected_volatile =
        ask(gpu, || device.total_ecc_errors(MemoryError::Uncorrected, EccCounter::Volatile));
    let _ = ask(gpu, || raw::remapped_rows(device, &mut faults));
    faults.recovery_action = ask(gpu, || raw::recovery_action(device));
    if faults.remap_failed == Some(true) {
        gpu.health.add(
            HealthState::Unhealthy,
            "GPU_ROW_REMAP_FAILED",
            "a row of memory is bad and there is no spare one left: have the board replaced",
        );
    } else if faults.remap_pending == Some(true) {
        gpu.health.add(
            HealthState::Warning,
            "GPU_ROW_REMAP_PENDING",
            "a row of memory is bad and is replaced at the next reset: drain the node and run \
             `nvidia-smi --gpu-reset` when it suits",
        );
    }
    let (state, what_to_do) = match faults.recovery_action {
        None | Some(RecoveryAction::None) => (HealthState::Ok, String::new()),
        Some(RecoveryAction::GpuReset) => {
            (HealthState::Unhealthy, "a reset: run `nvidia-smi --gpu-reset`".into())
        }
        Some(RecoveryAction::NodeReboot) => {
            (HealthState::Unhealthy, "a restart: drain the node and restart it".into())
        }
        Some(RecoveryAction::DrainP2p | RecoveryAction::DrainAndReset) => (
            HealthState::Unhealthy,
            "a reset without work on it: drain the node and run `nvidia-smi --gpu-reset`".into(),
        ),
        Some(RecoveryAction::Other(code)) => {
            (HealthState::Warning, format!("recovery action {code}: see `nvidia-smi -q`"))
        }
    };
    if state != HealthState::Ok {
        let message = format!("the driver asks for {what_to_do}");
        gpu.health.add(state, "GPU_RECOVERY_ACTION", message);
    }
    gpu.faults = faults;
}

/// `nvmlClocksThrottleReason*` by name; a GPU that is idle or runs at the clocks it was set to
/// is not held down.
fn throttle_reasons(bits: u64) -> Vec<String> {
    const NAMES: [(u64, Option<&str>); 9] = [
        (0x001, None), // idle
        (0x002, None), // application clocks
        (0x004, Some("SW_POWER_CAP")),
        (0x008, Some("HW_SLOWDOWN")),
        (0x010, Some("SYNC_BOOST")),
        (0x020, Some("SW_THERMAL_SLOWDOWN")),
        (0x040, Some("HW_THERMAL_SLOWDOWN")),
        (0x080, Some("HW_POWER_BRAKE_SLOWDOWN")),
        (0x100, None), // display clocks
    ];
    let mut reasons = Vec::new();
    for bit in (0..64).map(|at| 1 << at).filter(|bit| bits & bit != 0) {
        match NAMES.iter().find(|(known, _)| *known == bit) {
            Some((_, name)) => reasons.extend(name.map(str::to_owned)),
            // Newer than this program.
            None => reasons.push(format!("UNKNOWN_{bit:#x}")),
        }
    }
    reasons
}

/// As sysfs writes it. The function is always 0: a GPU's other functions are sound and USB.
pub(super) fn bus_id(pci: &PciInfo) -> String {
    format!("{:04x}:{:02x}:{:02x}.0", pci.domain, pci.bus, pci.device)
}

/// One question. No answer is "not measured"; where the error tells of a sick GPU,
/// the GPU's health says so. A lost GPU is asked no more: each further question
/// may cost a time-out in the driver.
pub(super) fn ask<T>(gpu: &mut Gpu, question: impl FnOnce() -> Result<T, NvmlError>) -> Option<T> {
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
