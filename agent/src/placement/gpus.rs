//! Which of a node's GPUs are free, and which meet a requirement.

use regex::{Regex, RegexBuilder};

use crate::gpu::{ComputeCapability, Gpu, GpuMemory, HealthState};

/// What a pod needs of GPUs, read and checked.
#[derive(Debug, Clone)]
pub struct Requirement {
    /// How many.
    pub count: u32,
    /// Free on each.
    pub free_memory_bytes: u64,
    /// At least this.
    pub min_compute_capability: Option<ComputeCapability>,
    /// Found anywhere in the product's name.
    pub product: Option<Regex>,
    /// All on one NUMA node.
    pub same_numa_node: bool,
}

/// How the GPUs meet it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Match {
    /// Well, given to nobody and used by nobody.
    pub free_count: u32,
    /// Of those, such as are asked for.
    pub matching_count: u32,
    /// Their UUIDs.
    pub candidates: Vec<String>,
}

impl Requirement {
    /// A pattern of a caller's, bounded so that it cannot eat the agent's memory.
    ///
    /// # Errors
    ///
    /// When it is no regular expression, or a huge one.
    pub fn product_pattern(text: &str) -> Result<Regex, String> {
        RegexBuilder::new(text)
            .size_limit(1 << 18)
            .dfa_size_limit(1 << 18)
            .build()
            .map_err(|_| format!("{text:?} is no regular expression, or too large a one"))
    }

    /// Looks for GPUs among `gpus`.
    pub fn find(&self, gpus: &[Gpu]) -> Match {
        let free: Vec<&Gpu> = gpus.iter().filter(|gpu| is_free(gpu)).collect();
        let mut fitting: Vec<&Gpu> = free.iter().copied().filter(|gpu| self.fits(gpu)).collect();
        if self.same_numa_node {
            fitting = largest_numa_group(&fitting);
        }
        let number = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        Match {
            free_count: number(free.len()),
            matching_count: number(fitting.len()),
            candidates: fitting.iter().filter_map(|gpu| gpu.uuid.clone()).collect(),
        }
    }

    /// Whether `found` is enough.
    pub fn is_met(&self, found: &Match) -> bool {
        found.matching_count >= self.count
    }

    fn fits(&self, gpu: &Gpu) -> bool {
        let memory = gpu.memory.map_or(0, |memory| memory.free_bytes);
        let product = gpu.product.as_deref().unwrap_or_default();
        memory >= self.free_memory_bytes
            && self.min_compute_capability.is_none_or(|least| {
                gpu.compute_capability.is_some_and(|capability| capability >= least)
            })
            && self.product.as_ref().is_none_or(|pattern| pattern.is_match(product))
    }
}

/// More memory than an idle GPU's driver counts as used, and less than the smallest CUDA
/// context takes.
const IDLE_BYTES: u64 = 256 << 20;

/// Well, given to nobody and used by nobody.
///
/// Who has been given it is the kubelet's to say; where it does not tell, and for work beside
/// Kubernetes, processes do, and memory: the driver hides processes from those in another
/// process namespace. A GPU that the kubelet does not have to give is nobody's, and not free
/// either.
pub fn is_free(gpu: &Gpu) -> bool {
    // A GPU cut into MIG devices takes no whole-GPU work.
    let whole = gpu.mig.as_ref().is_none_or(|mig| !mig.enabled);
    let usable = matches!(gpu.health.state, HealthState::Ok | HealthState::Warning);
    let little = |memory: GpuMemory| memory.used_bytes < IDLE_BYTES;
    let idle = match &gpu.processes {
        Some(processes) if !processes.is_empty() => false,
        // The kubelet knows of all pods; where the host's memory is the GPU's, others may be in it.
        Some(_) if gpu.allocatable == Some(true) => true,
        Some(_) => gpu.memory.is_none_or(|memory| {
            // Old drivers count their own memory as used.
            little(memory) || memory.reserved_bytes.is_none()
        }),
        None => gpu.memory.is_some_and(little),
    };
    let to_give = gpu.allocatable != Some(false) && gpu.allocations.is_empty();
    whole && usable && idle && to_give
}

/// GPUs by health, for metrics.
pub fn by_health(gpus: &[Gpu]) -> Vec<(HealthState, usize)> {
    let all = [
        HealthState::Ok,
        HealthState::Unknown,
        HealthState::Warning,
        HealthState::Unhealthy,
        HealthState::Lost,
    ];
    let of = |state| gpus.iter().filter(|gpu| gpu.health.state == state).count();
    all.into_iter().map(|state| (state, of(state))).collect()
}

/// Reads `9.0`.
///
/// # Errors
///
/// Says what a compute capability looks like.
pub fn parse_compute_capability(text: &str) -> Result<ComputeCapability, String> {
    let parsed = text.split_once('.').and_then(|(major, minor)| {
        Some(ComputeCapability { major: major.parse().ok()?, minor: minor.parse().ok()? })
    });
    parsed.ok_or_else(|| format!("{text:?} is no compute capability; write one such as 9.0"))
}

fn largest_numa_group<'a>(gpus: &[&'a Gpu]) -> Vec<&'a Gpu> {
    let group = |gpu: &Gpu| gpus.iter().filter(|other| other.numa_node == gpu.numa_node).count();
    // Of equals the first; `max_by_key` would take the last.
    let best = gpus.iter().rev().max_by_key(|gpu| group(gpu));
    let Some(best) = best else { return Vec::new() };
    gpus.iter().copied().filter(|gpu| gpu.numa_node == best.numa_node).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::{Allocation, GpuProcess, Mig};

    fn gpu(index: u32, product: &str, free_gb: u64, capability: (u32, u32)) -> Gpu {
        Gpu {
            uuid: Some(format!("GPU-{index}")),
            numa_node: Some(index / 2),
            product: Some(product.into()),
            compute_capability: Some(ComputeCapability {
                major: capability.0,
                minor: capability.1,
            }),
            memory: Some(GpuMemory {
                total_bytes: free_gb << 30,
                used_bytes: 0,
                free_bytes: free_gb << 30,
                reserved_bytes: None,
                bar1_total_bytes: None,
                bar1_used_bytes: None,
            }),
            mig: Some(Mig { capable: true, ..Mig::default() }),
            processes: Some(Vec::new()),
            ..Gpu::unknown(index)
        }
    }

    fn any(count: u32) -> Requirement {
        Requirement {
            count,
            free_memory_bytes: 0,
            min_compute_capability: None,
            product: None,
            same_numa_node: false,
        }
    }

    #[test]
    fn taken_sick_and_split_gpus_are_not_free() {
        let mut gpus: Vec<Gpu> = (0..5).map(|n| gpu(n, "NVIDIA H100", 80, (9, 0))).collect();
        gpus[0].processes = Some(vec![GpuProcess { pid: 1, used_memory_bytes: None }]);
        gpus[1].health.state = HealthState::Lost;
        gpus[2].mig = Some(Mig { capable: true, enabled: true, ..Mig::default() });
        gpus[3].processes = None;
        let found = any(2).find(&gpus);
        assert_eq!(found.free_count, 2);
        assert_eq!(found.candidates, ["GPU-3", "GPU-4"]);
        assert!(any(2).is_met(&found) && !any(3).is_met(&found));
    }

    #[test]
    fn memory_tells_of_processes_that_cannot_be_seen() {
        let with = |used_bytes: u64, change: fn(&mut Gpu)| {
            let mut gpu = gpu(0, "NVIDIA H100", 80, (9, 0));
            let memory = gpu.memory.as_mut().unwrap();
            (memory.used_bytes, memory.reserved_bytes) = (used_bytes, Some(551 << 20));
            change(&mut gpu);
            is_free(&gpu)
        };
        // What a driver counts as used on an idle H100, and what a CUDA context takes.
        let (idle, context) = (4 << 20, 500 << 20);
        assert!(with(idle, |_| {}));
        assert!(!with(context, |_| {}), "of another process namespace");
        assert!(with(context, |gpu| gpu.allocatable = Some(true)), "the kubelet knows");
        assert!(with(context, |gpu| gpu.memory.as_mut().unwrap().reserved_bytes = None));
        assert!(with(idle, |gpu| gpu.processes = None));
        assert!(!with(context, |gpu| gpu.processes = None));
        assert!(!with(0, |gpu| (gpu.processes, gpu.memory) = (None, None)), "nothing is known");
    }

    #[test]
    fn a_gpu_that_a_pod_holds_is_not_free_before_it_works_on_it() {
        let mut gpus: Vec<Gpu> = (0..3).map(|n| gpu(n, "NVIDIA H100", 80, (9, 0))).collect();
        gpus[0].allocations.push(Allocation {
            pod_namespace: "default".into(),
            pod_name: "a".into(),
            container: "main".into(),
            resource_name: Some("nvidia.com/gpu".into()),
            claim_name: None,
            shared: false,
        });
        gpus[1].allocatable = Some(false);
        gpus[2].allocatable = Some(true);
        assert_eq!(any(1).find(&gpus).candidates, ["GPU-2"]);
    }

    #[test]
    fn each_wish_rules_out() {
        let gpus = [
            gpu(0, "NVIDIA L4", 24, (8, 9)),
            gpu(1, "NVIDIA A100-SXM4-80GB", 80, (8, 0)),
            gpu(2, "NVIDIA H100 80GB HBM3", 80, (9, 0)),
            gpu(3, "NVIDIA B200", 180, (10, 0)),
        ];
        let candidates = |wish: Requirement| wish.find(&gpus).candidates;
        let memory = Requirement { free_memory_bytes: 80 << 30, ..any(1) };
        assert_eq!(candidates(memory), ["GPU-1", "GPU-2", "GPU-3"]);
        let least = parse_compute_capability("9.0").unwrap();
        let capability = Requirement { min_compute_capability: Some(least), ..any(1) };
        assert_eq!(candidates(capability), ["GPU-2", "GPU-3"], "10.0 is more than 9.0");
        let pattern = Requirement::product_pattern("^NVIDIA (A|H)100").unwrap();
        let product = Requirement { product: Some(pattern), ..any(1) };
        assert_eq!(candidates(product), ["GPU-1", "GPU-2"]);
        let together = Requirement { same_numa_node: true, free_memory_bytes: 80 << 30, ..any(2) };
        assert_eq!(candidates(together), ["GPU-2", "GPU-3"]);
    }

    #[test]
    fn what_cannot_be_read_is_refused() {
        for text in ["9", "a.b", "9.", ""] {
            assert!(parse_compute_capability(text).is_err(), "{text}");
        }
        assert!(Requirement::product_pattern("(").is_err());
        assert!(Requirement::product_pattern(r"(\w{1000}){1000}").is_err());
    }
}
