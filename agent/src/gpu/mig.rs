//! How a GPU is split, as plain values.

use serde::Serialize;

use super::allocation::Allocation;
use super::inventory::GpuMemory;

/// Multi-instance mode.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Mig {
    /// Whether the GPU can be partitioned.
    pub capable: bool,
    /// Whether it is in MIG mode now.
    pub enabled: bool,
    /// Whether it will be after the next reset.
    pub pending_enabled: bool,
    /// The parts that exist, by slot.
    pub devices: Vec<MigDevice>,
    /// The sizes of parts that can be made.
    pub profiles: Vec<MigProfile>,
}

/// A part of a GPU that is used like one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MigDevice {
    /// `MIG-…`.
    pub uuid: Option<String>,
    /// NVML's index within the GPU.
    pub slot: u32,
    /// Such as `1g.10gb`.
    pub profile: Option<String>,
    /// The slice of memory and processors that it is cut from.
    pub gpu_instance_id: Option<u32>,
    /// The slice of processors within that.
    pub compute_instance_id: Option<u32>,
    /// Its memory; compute instances of one GPU instance share theirs.
    pub memory: Option<GpuMemory>,
    /// Its processors.
    pub multiprocessor_count: Option<u32>,
    /// Who has been given it.
    pub allocations: Vec<Allocation>,
}

/// A size that a GPU can be cut into.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MigProfile {
    /// Such as `1g.10gb`.
    pub name: String,
    /// Memory of one.
    pub memory_bytes: u64,
    /// How many fit on an empty GPU.
    pub max_instances: u32,
    /// How many more fit beside what exists. `None`: not known, as outside of MIG mode.
    pub remaining_instances: Option<u32>,
}

/// What NVIDIA calls a part: slices of processors and memory in GB, such as `1g.10gb`, or
/// `1c.2g.10gb` where it has not all processors of its GPU instance.
pub(super) fn profile_name(
    compute_slices: u32,
    gpu_slices: u32,
    memory_bytes: u64,
    total_bytes: u64,
) -> String {
    const GIB: u64 = 1 << 30;
    // Memory is cut in eighths; the name has that part of the whole GPU's rounded gigabytes.
    let eighths = (memory_bytes * 8).div_ceil(total_bytes.max(1));
    let whole = total_bytes.div_ceil(GIB);
    let gigabytes = (eighths * whole + 4) / 8;
    let own =
        if compute_slices == gpu_slices { String::new() } else { format!("{compute_slices}c.") };
    format!("{own}{gpu_slices}g.{gigabytes}gb")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_nvidia() {
        let mib = |n: u64| n << 20;
        assert_eq!(profile_name(1, 1, mib(9_984), mib(81_559)), "1g.10gb");
        assert_eq!(profile_name(3, 3, mib(40_448), mib(81_559)), "3g.40gb");
        assert_eq!(profile_name(7, 7, mib(81_152), mib(81_559)), "7g.80gb");
        assert_eq!(profile_name(1, 2, mib(9_984), mib(40_960)), "1c.2g.10gb");
        assert_eq!(profile_name(1, 1, mib(4_864), mib(40_960)), "1g.5gb");
        assert_eq!(profile_name(0, 0, 0, 0), "0g.0gb", "nonsense is no panic");
    }
}
