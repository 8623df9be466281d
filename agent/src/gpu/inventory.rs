//! What is known about the node's GPUs, as plain values.
//!
//! Nothing of NVML and nothing of the wire is in here. `None` says "not
//! measured", never "zero". Units are in the names; the JSON of `-o json` has the
//! same names.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use serde::{Serialize, Serializer};

use super::allocation::{Allocation, AllocationSource, AllocationState};
use super::links::{Fabric, GpuLink, PcieLink};
use super::mig::Mig;

/// One look at the node's GPUs.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct GpuInventory {
    /// Whether there was an answer, and if not, why and what to do.
    pub provider: Provider,
    /// The driver, as `nvidia-smi` prints it.
    pub driver_version: Option<String>,
    /// The NVML library.
    pub nvml_version: Option<String>,
    /// The newest CUDA that the driver serves, such as `12.4`.
    pub cuda_driver_version: Option<String>,
    /// The GPUs: first those that NVML enumerates, in its order, then those that
    /// it no longer does.
    pub gpus: Vec<Gpu>,
    /// How the GPUs reach each other, one a pair.
    pub links: Vec<GpuLink>,
    /// What is known of who holds them.
    pub allocation: AllocationState,
    /// When the look was over, by the node's clock. `None`: there was none yet.
    #[serde(serialize_with = "humantime_serde::option::serialize")]
    pub sampled_at: Option<SystemTime>,
    /// Goes up whenever a GPU comes, goes, changes its index, its MIG mode or parts, or
    /// its links.
    pub generation: u64,
    /// When this stops to be the truth. `None`: never.
    #[serde(skip)]
    pub(super) freshness: Option<Freshness>,
}

/// Counted by the monotonic clock: a step of the wall clock makes nothing stale.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Freshness {
    pub(super) since: Instant,
    pub(super) lasts: Duration,
}

/// The state of NVML on this node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Provider {
    /// For programs.
    pub state: ProviderState,
    /// For people: what is the matter, and what to do. Empty when all is well.
    pub message: String,
}

/// Why there are GPUs in the inventory, or none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ProviderState {
    /// NVML answered and there are GPUs.
    Ok,
    /// The NVML library cannot be loaded.
    NoLibrary,
    /// The library is there, the kernel driver is not loaded.
    NoDriver,
    /// The driver is loaded and has no GPU.
    NoDevices,
    /// NVML may not talk to the driver from here.
    NoPermission,
    /// The library and the loaded driver are of different versions.
    VersionMismatch,
    /// The last answer is too old: a call into the driver does not return.
    Stale,
    /// Switched off by configuration.
    Disabled,
    /// NVML failed in another way.
    Error,
}

/// One GPU, sick or well.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Gpu {
    /// `GPU-…`. `None` only for a GPU that was never in reach.
    pub uuid: Option<String>,
    /// NVML's index; of a GPU that is gone, the last one it had.
    pub index: u32,
    /// The N of `/dev/nvidiaN`.
    pub minor_number: Option<u32>,
    /// As in sysfs: `0000:1b:00.0`.
    pub pci_bus_id: Option<String>,
    /// The root of its PCI tree, such as `0000:16`; GPUs with the same root share its
    /// lanes.
    pub pcie_root: Option<String>,
    /// Its link to the host.
    pub pcie: PcieLink,
    /// The NUMA node that the GPU hangs on.
    pub numa_node: Option<u32>,
    /// The CPUs near to it, such as `0-31,64-95`.
    pub cpu_list: Option<String>,
    /// Such as `NVIDIA H100 80GB HBM3`.
    pub product: Option<String>,
    /// Such as `NVIDIA` or `GeForce RTX`.
    pub brand: Option<String>,
    /// The chip's generation.
    pub architecture: Option<Architecture>,
    /// What CUDA code it runs.
    pub compute_capability: Option<ComputeCapability>,
    /// The board's serial number.
    pub serial: Option<String>,
    /// `None` also on chips that share the host's memory.
    pub memory: Option<GpuMemory>,
    /// `None`: unknown, not incapable.
    pub mig: Option<Mig>,
    /// Its place in an NVLink network across nodes. `None` where there is none.
    pub fabric: Option<Fabric>,
    /// Whether work may be sent to it.
    pub health: Health,
    /// What it has been through.
    pub faults: Faults,
    /// What it does now.
    pub telemetry: Telemetry,
    /// Whether the driver keeps it initialised without clients.
    pub persistence_mode: Option<bool>,
    /// Whether its memory corrects errors.
    pub ecc_enabled: Option<bool>,
    /// Compute processes that hold a context, as the driver numbers them.
    pub processes: Option<Vec<GpuProcess>>,
    /// Whether the kubelet has it to give. `None`: not known.
    pub allocatable: Option<bool>,
    /// Who has been given the whole GPU, as far as
    /// [`AllocationSource`](super::AllocationSource) can tell.
    pub allocations: Vec<Allocation>,
}

/// What a GPU has been through, and what the driver asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Faults {
    /// The number of the last error that the driver reported since the agent started.
    pub last_xid: Option<u64>,
    /// When that was.
    #[serde(serialize_with = "humantime_serde::option::serialize")]
    pub last_xid_at: Option<SystemTime>,
    /// Memory errors beyond correction since the driver was loaded.
    pub ecc_uncorrected_volatile: Option<u64>,
    /// Rows of memory replaced because of an error beyond correction.
    pub remapped_rows_uncorrectable: Option<u32>,
    /// Rows wait for a reset to be replaced.
    pub remap_pending: Option<bool>,
    /// There was no spare row left.
    pub remap_failed: Option<bool>,
    /// What the driver wants done.
    pub recovery_action: Option<RecoveryAction>,
}

/// What the driver wants done with a GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum RecoveryAction {
    /// Nothing.
    None,
    /// Reset it.
    GpuReset,
    /// Restart the node.
    NodeReboot,
    /// Stop work that uses its peers, then reset.
    DrainP2p,
    /// Let work end and send no more, then reset.
    DrainAndReset,
    /// Something newer than this program.
    Other(u32),
}

/// A chip generation; the code keeps one that is newer than this program.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Architecture {
    /// Such as `Hopper`; `None` for a generation unknown here.
    pub name: Option<String>,
    /// `nvmlDeviceArchitecture_t`.
    pub code: u32,
}

/// A compute capability; ordered as CUDA orders them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ComputeCapability {
    /// The generation.
    pub major: u32,
    /// The revision in it.
    pub minor: u32,
}

/// A GPU's memory. `total = reserved + used + free`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct GpuMemory {
    /// All of it.
    pub total_bytes: u64,
    /// Held by processes; on old drivers also what is reserved.
    pub used_bytes: u64,
    /// Held by nobody.
    pub free_bytes: u64,
    /// Held by the driver and firmware. `None`: the driver counts it as used.
    pub reserved_bytes: Option<u64>,
    /// The window through which the host sees the memory.
    pub bar1_total_bytes: Option<u64>,
    /// How much of the window is mapped.
    pub bar1_used_bytes: Option<u64>,
}

/// Whether a GPU can be used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Health {
    /// The worst of all reasons.
    pub state: HealthState,
    /// Empty when all is well.
    pub reasons: Vec<Reason>,
}

/// How bad it is; ordered from good to bad.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum HealthState {
    /// Nothing is known against it.
    Ok,
    /// It could not be asked, which need not be its fault.
    Unknown,
    /// It works, and someone should look.
    Warning,
    /// It needs a hand before it is used again.
    Unhealthy,
    /// It cannot be reached.
    Lost,
}

/// Why a GPU is not well.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Reason {
    /// For programs, such as `GPU_LOST`.
    pub code: String,
    /// For people.
    pub message: String,
}

/// Readings of one moment.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Telemetry {
    /// Part of the last sampling period in which a kernel ran, 0 to 1.
    pub utilization_ratio: Option<f64>,
    /// Part of it in which memory was read or written, 0 to 1.
    pub memory_bus_utilization_ratio: Option<f64>,
    /// Draw of the board.
    pub power_watts: Option<f64>,
    /// The limit in force.
    pub power_limit_watts: Option<f64>,
    /// The core's temperature.
    pub temperature_celsius: Option<f64>,
    /// Why its clocks are held down, such as `SW_POWER_CAP`. Empty: they are not.
    pub throttle_reasons: Option<Vec<String>>,
}

/// A process on a GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct GpuProcess {
    /// In the process-id namespace of the agent, where the driver can tell.
    pub pid: u32,
    /// GPU memory that it holds.
    pub used_memory_bytes: Option<u64>,
}

impl GpuInventory {
    /// An inventory without GPUs, for the reason given.
    pub fn none(state: ProviderState, message: impl Into<String>) -> Self {
        Self {
            provider: Provider { state, message: message.into() },
            driver_version: None,
            nvml_version: None,
            cuda_driver_version: None,
            gpus: Vec::new(),
            links: Vec::new(),
            allocation: AllocationState {
                source: AllocationSource::ProcessesOnly,
                message: String::new(),
            },
            sampled_at: None,
            generation: 0,
            freshness: None,
        }
    }

    /// How old the answer is at `now`; before the first answer, how long it has
    /// been waited for. `None`: it does not age.
    pub fn age(&self, now: Instant) -> Option<Duration> {
        self.freshness.map(|fresh| now.saturating_duration_since(fresh.since))
    }

    /// This inventory as it has to be understood at `now`: an answer that is older
    /// than it may be keeps its GPUs and becomes [`ProviderState::Stale`].
    pub fn as_of(self: &Arc<Self>, now: Instant) -> Arc<Self> {
        match (self.freshness, self.age(now)) {
            (Some(fresh), Some(age)) if age > fresh.lasts => {
                let mut stale = Self::clone(self);
                stale.provider = Provider {
                    state: ProviderState::Stale,
                    message: format!(
                        "nvml has not answered for {} s: a call into the driver hangs; look for \
                         NVRM and Xid in the kernel log, and restart the node if it stays so",
                        age.as_secs()
                    ),
                };
                Arc::new(stale)
            }
            _ => Arc::clone(self),
        }
    }
}

impl Gpu {
    /// GPU number `index`, of which nothing is known yet.
    pub fn unknown(index: u32) -> Self {
        Self {
            uuid: None,
            index,
            minor_number: None,
            pci_bus_id: None,
            pcie_root: None,
            pcie: PcieLink::default(),
            numa_node: None,
            cpu_list: None,
            product: None,
            brand: None,
            architecture: None,
            compute_capability: None,
            serial: None,
            memory: None,
            mig: None,
            fabric: None,
            health: Health::ok(),
            faults: Faults::default(),
            telemetry: Telemetry::default(),
            persistence_mode: None,
            ecc_enabled: None,
            processes: None,
            allocatable: None,
            allocations: Vec::new(),
        }
    }
}

impl Health {
    /// Nothing is the matter.
    pub fn ok() -> Self {
        Self { state: HealthState::Ok, reasons: Vec::new() }
    }

    /// Adds a reason; the state only gets worse. The same code is kept once: a
    /// lost GPU answers every question in the same way.
    pub fn add(&mut self, state: HealthState, code: &str, message: impl Into<String>) {
        self.state = self.state.max(state);
        if self.reasons.iter().all(|reason| reason.code != code) {
            self.reasons.push(Reason { code: code.into(), message: message.into() });
        }
    }

    /// Whether nothing may be sent there until NVML has been opened afresh.
    pub fn is_sick(&self) -> bool {
        self.state >= HealthState::Unhealthy
    }
}

impl fmt::Display for ProviderState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ok => "ok",
            Self::NoLibrary => "no library",
            Self::NoDriver => "no driver",
            Self::NoDevices => "no devices",
            Self::NoPermission => "no permission",
            Self::VersionMismatch => "version mismatch",
            Self::Stale => "stale",
            Self::Disabled => "disabled",
            Self::Error => "error",
        })
    }
}

impl fmt::Display for HealthState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ok => "ok",
            Self::Unknown => "unknown",
            Self::Warning => "warning",
            Self::Unhealthy => "unhealthy",
            Self::Lost => "lost",
        })
    }
}

impl fmt::Display for Architecture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.name {
            Some(name) => f.write_str(name),
            None => write!(f, "unknown ({})", self.code),
        }
    }
}

impl fmt::Display for ComputeCapability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

impl Serialize for ComputeCapability {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_turns_stale_with_its_age_and_keeps_its_gpus() {
        let since = Instant::now();
        let mut inventory = GpuInventory::none(ProviderState::Ok, "");
        inventory.gpus.push(Gpu::unknown(0));
        inventory.freshness = Some(Freshness { since, lasts: Duration::from_secs(30) });
        let inventory = Arc::new(inventory);

        let fresh = inventory.as_of(since + Duration::from_secs(30));
        assert!(Arc::ptr_eq(&fresh, &inventory), "reading a fresh answer copies nothing");

        let stale = inventory.as_of(since + Duration::from_secs(95));
        assert_eq!(stale.provider.state, ProviderState::Stale);
        assert!(stale.provider.message.starts_with("nvml has not answered for 95 s: "));
        assert_eq!(stale.gpus, inventory.gpus);
    }

    #[test]
    fn what_does_not_age_is_never_stale() {
        let inventory = Arc::new(GpuInventory::none(ProviderState::Disabled, "switched off"));
        let later = inventory.as_of(Instant::now() + Duration::from_secs(1_000_000));
        assert_eq!(later.provider.state, ProviderState::Disabled);
    }

    #[test]
    fn health_is_the_worst_reason_and_names_each_once() {
        let mut health = Health::ok();
        health.add(HealthState::Lost, "GPU_LOST", "first");
        health.add(HealthState::Lost, "GPU_LOST", "again");
        health.add(HealthState::Warning, "GPU_INFOROM_CORRUPT", "second");
        assert_eq!(health.state, HealthState::Lost);
        let codes: Vec<_> = health.reasons.iter().map(|reason| reason.code.as_str()).collect();
        assert_eq!(codes, ["GPU_LOST", "GPU_INFOROM_CORRUPT"]);
    }

    #[test]
    fn json_has_units_in_its_names_and_null_for_what_was_not_measured() {
        let mut gpu = Gpu::unknown(3);
        gpu.compute_capability = Some(ComputeCapability { major: 9, minor: 0 });
        let json = serde_json::to_value(&gpu).unwrap();
        assert_eq!(json["compute_capability"], "9.0");
        assert_eq!(json["memory"], serde_json::Value::Null);
        assert_eq!(json["telemetry"]["power_watts"], serde_json::Value::Null);
        assert_eq!(json["health"]["state"], "ok");

        let mut inventory = GpuInventory::none(ProviderState::NoLibrary, "why");
        inventory.sampled_at = Some(SystemTime::UNIX_EPOCH);
        let json = serde_json::to_value(&inventory).unwrap();
        assert_eq!(json["provider"]["state"], "no_library");
        assert_eq!(json["sampled_at"], "1970-01-01T00:00:00Z");
    }
}
