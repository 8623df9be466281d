//! Who holds which GPU: the kubelet's names for devices, joined with the inventory.
//!
//! ```text
//! kubelet ─► pod_resources ─► Allocations ─┐
//! owner thread ─► GpuInventory ────────────┴─► join ─► the same, with allocations
//! ```
//!
//! The join is made when somebody reads, so that neither side waits for the other: a
//! driver that hangs leaves the allocations current, and the other way round.
//!
//! # What always holds
//!
//! - **No answer frees nothing.** When the kubelet stops answering, its last answer
//!   stands, and the message says so.
//! - **A name that matches no GPU is told of**, not dropped; of many, the first few.
//! - **A join takes milliseconds**, whatever the kubelet said: it is made for each reader.
//!
//! Whether a GPU is free for a pod is decided in [`crate::placement::gpus`].

use std::fmt;

use serde::Serialize;

use super::inventory::{Gpu, GpuInventory};
use super::mig::MigDevice;

/// What is known of allocations as a whole.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct AllocationState {
    /// What "allocated" was learned from.
    pub source: AllocationSource,
    /// Why allocations are not known, not current or not complete. Empty: they are.
    pub message: String,
}

/// What allocations are learned from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum AllocationSource {
    /// The kubelet told who holds what.
    PodResources,
    /// Only processes on the GPU are seen: a pod that has not started work yet is not.
    ProcessesOnly,
}

impl fmt::Display for AllocationSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::PodResources => "by the kubelet",
            Self::ProcessesOnly => "by processes only",
        })
    }
}

/// A GPU, or a part of one, in a container's hands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Allocation {
    /// The pod's namespace.
    pub pod_namespace: String,
    /// The pod's name.
    pub pod_name: String,
    /// The container's name.
    pub container: String,
    /// Such as `nvidia.com/gpu`. `None`: through a claim.
    pub resource_name: Option<String>,
    /// The resource claim, where one was used.
    pub claim_name: Option<String>,
    /// Whether others may hold it at the same time.
    pub shared: bool,
}

/// What the kubelet said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Allocations {
    /// The last answer. `None`: there was none yet.
    pub(super) answer: Option<Answer>,
    /// Why there is none, or no current one. Empty: the answer is current.
    pub(super) trouble: String,
}

/// One answer of the kubelet's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Answer {
    pub(super) held: Vec<Held>,
    /// Devices of NVIDIA's plugin that there are to give; empty where it does not serve.
    pub(super) allocatable: Vec<DeviceName>,
    /// Names of GPUs that could not be read.
    pub(super) unread: Names,
}

/// Names for a message: the first few, each once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Names {
    first: Vec<String>,
    are_more: bool,
}

/// As many as a person reads.
const MAX_NAMES: usize = 8;

/// The longest name that is told in full; a UUID has forty letters.
const MAX_NAME_LETTERS: usize = 80;

/// A device in a container's hands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Held {
    pub(super) device: DeviceName,
    pub(super) allocation: Allocation,
}

/// A name that means a GPU, or a part of one.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct DeviceName {
    gpu: GpuName,
    part: Option<Part>,
    /// As the kubelet wrote it, as far as it can be printed.
    text: String,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum GpuName {
    Uuid(String),
    /// NVML's index.
    Index(u32),
    /// The N of `/dev/nvidiaN`.
    Minor(u32),
    /// The GPU that has the part.
    OfPart,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    Uuid(String),
    Slot(u32),
    Instance {
        gpu_instance: u32,
        compute_instance: Option<u32>,
    },
    /// A part that no name of NVML's matches; the GPU has to serve.
    Unknown,
}

impl Allocations {
    /// Nobody has been asked.
    pub(super) fn none(trouble: impl Into<String>) -> Self {
        Self { answer: None, trouble: trouble.into() }
    }

    /// Whether the first question is still open.
    pub(super) fn is_not_asked(&self) -> bool {
        self.answer.is_none() && self.trouble == super::pod_resources::NOT_ASKED
    }

    /// Writes into `inventory` who holds what.
    pub(super) fn join(&self, inventory: &mut GpuInventory) {
        let Some(answer) = &self.answer else {
            let message = self.trouble.clone();
            inventory.allocation =
                AllocationState { source: AllocationSource::ProcessesOnly, message };
            return;
        };
        let mut strange = answer.unread.clone();
        for held in &answer.held {
            if !give(&mut inventory.gpus, held) {
                strange.add(&held.device.text);
            }
        }
        // A plugin that serves none of these GPUs says nothing about them.
        if answer.allocatable.iter().any(|name| inventory.gpus.iter().any(|gpu| name.is(gpu))) {
            for gpu in &mut inventory.gpus {
                gpu.allocatable = Some(answer.allocatable.iter().any(|name| name.is(gpu)));
            }
        }
        let mut message = Vec::new();
        if !self.trouble.is_empty() {
            message.push(format!("allocations are of the kubelet's last answer: {}", self.trouble));
        }
        // Without GPUs to compare with, any name is strange.
        if !strange.is_empty() && !inventory.gpus.is_empty() {
            message.push(format!("allocated, and no GPU seen here: {strange}"));
        }
        let message = message.join("; ");
        inventory.allocation = AllocationState { source: AllocationSource::PodResources, message };
    }
}

/// Notes the allocation at its GPU or part; false if there is none of that name.
fn give(gpus: &mut [Gpu], held: &Held) -> bool {
    let Some(gpu) = gpus.iter_mut().find(|gpu| held.device.is(gpu)) else { return false };
    let list = match &held.device.part {
        None | Some(Part::Unknown) => &mut gpu.allocations,
        Some(part) => {
            let devices = gpu.mig.iter_mut().flat_map(|mig| &mut mig.devices);
            match { devices }.find(|device| part.is(device)) {
                Some(device) => &mut device.allocations,
                // Of a GPU that was cut anew or cannot be asked any more.
                None => &mut gpu.allocations,
            }
        }
    };
    // What one container holds is told in one go, so that a repetition follows at once.
    if list.last() != Some(&held.allocation) {
        list.push(held.allocation.clone());
    }
    true
}

impl Names {
    pub(super) fn is_empty(&self) -> bool {
        self.first.is_empty()
    }

    /// Adds one as the kubelet wrote it.
    pub(super) fn add(&mut self, name: &str) {
        let name = printable(name);
        if self.first.contains(&name) {
            return;
        }
        self.are_more = self.first.len() == MAX_NAMES;
        if !self.are_more {
            self.first.push(name);
        }
    }
}

impl fmt::Display for Names {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let others = if self.are_more { " and others" } else { "" };
        write!(f, "{}{others}", self.first.join(", "))
    }
}

/// Fit for a log and a terminal.
fn printable(text: &str) -> String {
    let printable = |char: char| if char.is_control() { '\u{fffd}' } else { char };
    text.chars().take(MAX_NAME_LETTERS).map(printable).collect()
}

impl DeviceName {
    /// Reads the name that a device plugin gave to a device; also says whether others
    /// may hold it.
    ///
    /// NVIDIA's plugin uses UUIDs or, where told to, indices; GKE's the device nodes'
    /// names. Copies for sharing have a suffix.
    pub(super) fn of_plugin(text: &str) -> Option<(Self, bool)> {
        let (name, shared) = match text.split_once("::").or_else(|| text.split_once("/vgpu")) {
            Some((name, _copy)) => (name, true),
            None => (text, false),
        };
        let (gpu, part) = if let Some(parts) = name.strip_prefix("MIG-GPU-") {
            // Before driver 470: the GPU's UUID and the instances' ids.
            let mut parts = parts.split('/');
            let uuid = format!("GPU-{}", parts.next()?);
            let gpu_instance = parts.next()?.parse().ok()?;
            let compute_instance = Some(parts.next()?.parse().ok()?);
            (GpuName::Uuid(uuid), Some(Part::Instance { gpu_instance, compute_instance }))
        } else if name.starts_with("MIG-") {
            (GpuName::OfPart, Some(Part::Uuid(name.into())))
        } else if name.starts_with("GPU-") {
            (GpuName::Uuid(name.into()), None)
        } else if let Some(node) = name.strip_prefix("nvidia") {
            match node.split_once("/gi") {
                Some((minor, instance)) => {
                    let gpu_instance = instance.parse().ok()?;
                    let part = Part::Instance { gpu_instance, compute_instance: None };
                    (GpuName::Minor(minor.parse().ok()?), Some(part))
                }
                None => (GpuName::Minor(node.parse().ok()?), None),
            }
        } else {
            match name.split_once(':') {
                Some((index, slot)) => {
                    (GpuName::Index(index.parse().ok()?), Some(Part::Slot(slot.parse().ok()?)))
                }
                None => (GpuName::Index(name.parse().ok()?), None),
            }
        };
        Some((Self { gpu, part, text: printable(text) }, shared))
    }

    /// Reads a name of NVIDIA's DRA driver: `gpu-0`, where 0 is the minor number, or
    /// `gpu-0-mig-19-4-1` (profile and place); the same behind a claim's id in CDI names.
    pub(super) fn of_claim(text: &str) -> Option<Self> {
        let of = |gpu, part| Some(Self { gpu, part, text: printable(text) });
        let name = text.rsplit_once('=').map_or(text, |(_, name)| name);
        if let Some(at) = name.find("GPU-") {
            return of(GpuName::Uuid(name[at..].into()), None);
        }
        if let Some(at) = name.find("MIG-") {
            return of(GpuName::OfPart, Some(Part::Uuid(name[at..].into())));
        }
        let behind = &name[name.rfind("gpu-")? + "gpu-".len()..];
        let (minor, part) = match behind.split_once("-mig-") {
            Some((minor, _place)) => (minor, Some(Part::Unknown)),
            None => (behind, None),
        };
        of(GpuName::Minor(minor.parse().ok()?), part)
    }

    /// The GPU or part alone, without how it was written.
    pub(super) fn plain(self) -> Self {
        Self { text: String::new(), ..self }
    }

    fn is(&self, gpu: &Gpu) -> bool {
        match &self.gpu {
            GpuName::Uuid(uuid) => gpu.uuid.as_ref() == Some(uuid),
            GpuName::Index(index) => gpu.index == *index,
            GpuName::Minor(minor) => gpu.minor_number == Some(*minor),
            GpuName::OfPart => self.part.as_ref().is_some_and(|part| {
                gpu.mig.iter().flat_map(|mig| &mig.devices).any(|device| part.is(device))
            }),
        }
    }
}

impl Part {
    fn is(&self, device: &MigDevice) -> bool {
        match self {
            Self::Uuid(uuid) => device.uuid.as_ref() == Some(uuid),
            Self::Slot(slot) => device.slot == *slot,
            Self::Instance { gpu_instance, compute_instance } => {
                device.gpu_instance_id == Some(*gpu_instance)
                    && (compute_instance.is_none()
                        || device.compute_instance_id == *compute_instance)
            }
            Self::Unknown => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::inventory::ProviderState;
    use super::super::mig::Mig;
    use super::*;

    fn allocation(pod: &str) -> Allocation {
        Allocation {
            pod_namespace: "default".into(),
            pod_name: pod.into(),
            container: "main".into(),
            resource_name: Some("nvidia.com/gpu".into()),
            claim_name: None,
            shared: false,
        }
    }

    fn part(slot: u32) -> MigDevice {
        MigDevice {
            uuid: Some(format!("MIG-{slot}")),
            slot,
            profile: None,
            gpu_instance_id: Some(7 + slot),
            compute_instance_id: Some(0),
            memory: None,
            multiprocessor_count: None,
            allocations: Vec::new(),
        }
    }

    /// Two whole GPUs, whose minor numbers are not their indices, and one in two parts.
    fn inventory() -> GpuInventory {
        let gpu = |index: u32, minor| Gpu {
            uuid: Some(format!("GPU-{index}")),
            minor_number: Some(minor),
            ..Gpu::unknown(index)
        };
        let mig = Mig { capable: true, enabled: true, ..Mig::default() };
        let mut inventory = GpuInventory::none(ProviderState::Ok, "");
        inventory.gpus = vec![gpu(0, 1), gpu(1, 0), gpu(2, 2)];
        inventory.gpus[2].mig = Some(Mig { devices: vec![part(0), part(1)], ..mig });
        inventory
    }

    fn joined(answer: Answer) -> GpuInventory {
        let mut inventory = inventory();
        Allocations { answer: Some(answer), trouble: String::new() }.join(&mut inventory);
        inventory
    }

    /// Where an allocation by this name ends up: the GPU's index, and the part's slot.
    fn place(device: DeviceName) -> Option<(u32, Option<u32>)> {
        let held = vec![Held { device, allocation: allocation("a") }];
        let inventory = joined(Answer { held, ..Answer::default() });
        inventory.gpus.iter().find_map(|gpu| {
            let parts = gpu.mig.iter().flat_map(|mig| &mig.devices);
            let part = { parts }.find(|part| !part.allocations.is_empty()).map(|part| part.slot);
            (part.is_some() || !gpu.allocations.is_empty()).then_some((gpu.index, part))
        })
    }

    #[test]
    fn names_of_plugins_find_their_gpu() {
        for (text, expected, is_shared) in [
            ("GPU-1", (1, None), false),
            ("GPU-1::3", (1, None), true),
            ("MIG-1", (2, Some(1)), false),
            ("MIG-1::0", (2, Some(1)), true),
            ("MIG-GPU-2/8/0", (2, Some(1)), false),
            ("0", (0, None), false),
            ("2:1", (2, Some(1)), false),
            ("nvidia0", (1, None), false),
            ("nvidia0/vgpu1", (1, None), true),
            ("nvidia2/gi7", (2, Some(0)), false),
        ] {
            let (name, shared) = DeviceName::of_plugin(text).unwrap();
            assert_eq!((place(name), shared), (Some(expected), is_shared), "{text}");
        }
        for text in ["", "x", "MIG-GPU-1", "nvidia", "nvidia-x", "1:b", "0000:81:00.0"] {
            assert_eq!(DeviceName::of_plugin(text), None, "{text}");
        }
    }

    #[test]
    fn names_of_claims_find_their_gpu() {
        for (text, expected) in [
            ("gpu-0", (1, None)),
            ("k8s.gpu.nvidia.com/device=gpu-1", (0, None)),
            ("k8s.gpu.nvidia.com/claim=5c7b6d1e-gpu-0", (1, None)),
            ("nvidia.com/gpu=GPU-0", (0, None)),
            ("nvidia.com/gpu=MIG-0", (2, Some(0))),
            // Which part it is cannot be told, which GPU can.
            ("gpu-2-mig-19-4-1", (2, None)),
        ] {
            let name = DeviceName::of_claim(text).unwrap();
            assert_eq!(place(name), Some(expected), "{text}");
        }
        for text in ["nvidia.com/gpu=all", "channel-0", "gpu-", "gpu-x", "gpu-vfio-0"] {
            assert_eq!(DeviceName::of_claim(text), None, "{text}");
        }
    }

    #[test]
    fn one_container_counts_once_and_two_pods_twice() {
        let name = |text: &str| DeviceName::of_plugin(text).unwrap().0;
        let held = |text, pod| Held { device: name(text), allocation: allocation(pod) };
        let held = vec![held("GPU-0::0", "a"), held("GPU-0::1", "a"), held("GPU-0::2", "b")];
        let inventory = joined(Answer { held, ..Answer::default() });
        let pods: Vec<_> = inventory.gpus[0].allocations.iter().map(|a| &a.pod_name).collect();
        assert_eq!(pods, ["a", "b"]);
        assert_eq!(inventory.allocation.source, AllocationSource::PodResources);
        assert_eq!(inventory.allocation.message, "");
    }

    #[test]
    fn what_is_to_give_is_told_only_where_the_plugin_serves() {
        let name = |text: &str| DeviceName::of_plugin(text).unwrap().0;
        let allocatable = vec![name("GPU-0"), name("MIG-0")];
        let inventory = joined(Answer { allocatable, ..Answer::default() });
        let given: Vec<_> = inventory.gpus.iter().map(|gpu| gpu.allocatable).collect();
        assert_eq!(given, [Some(true), Some(false), Some(true)]);
        let inventory = joined(Answer::default());
        assert!(inventory.gpus.iter().all(|gpu| gpu.allocatable.is_none()));
    }

    #[test]
    fn a_name_without_a_gpu_and_an_old_answer_are_told_of() {
        let device = DeviceName::of_plugin("GPU-gone").unwrap().0;
        let held = vec![Held { device, allocation: allocation("a") }];
        let mut answer = Answer { held, ..Answer::default() };
        answer.unread.add("odd\u{1b}[31m");
        let mut inventory = inventory();
        let trouble = "connect to /kubelet.sock: refused".to_owned();
        Allocations { answer: Some(answer), trouble }.join(&mut inventory);
        assert_eq!(
            inventory.allocation.message,
            "allocations are of the kubelet's last answer: connect to /kubelet.sock: refused; \
             allocated, and no GPU seen here: odd\u{fffd}[31m, GPU-gone"
        );
    }

    #[test]
    fn of_many_strange_names_the_first_few_are_told() {
        let held = (0..10_000).map(|n| {
            let device = DeviceName::of_plugin(&format!("GPU-{n}-{:0200}", 0)).unwrap().0;
            Held { device, allocation: allocation("a") }
        });
        let answer = Answer { held: held.collect(), ..Answer::default() };
        let message = joined(answer).allocation.message;
        assert!(message.ends_with(" and others"), "{message}");
        assert!(message.len() < 1000, "{message}");
    }

    #[test]
    fn without_an_answer_processes_have_to_serve() {
        let mut inventory = inventory();
        Allocations::none("no socket").join(&mut inventory);
        let expected = AllocationState {
            source: AllocationSource::ProcessesOnly,
            message: "no socket".into(),
        };
        assert_eq!(inventory.allocation, expected);
    }
}
