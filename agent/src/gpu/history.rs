//! What earlier looks add to the latest one.
//!
//! A [`Sample`] knows only itself. From one to the next it holds that
//!
//! - **a sick GPU has a name**: where NVML cannot say which GPU sits at an index
//!   any more, the one that sat there lends its identity;
//! - **sickness stays** until NVML has been opened afresh and finds the GPU well: a
//!   GPU that answers again within the same session has proved nothing;
//! - **no GPU goes silently**: one that is no longer enumerated is reported as
//!   lost until it comes back or the agent starts again;
//! - **the last error is remembered**, also when the GPU is well again.

use super::inventory::{Gpu, HealthState, Telemetry};
use super::links::GpuLink;
use super::probe::Sample;

/// GPUs that are gone and still told of: more than were ever in a node.
const MAX_GONE: usize = 64;

/// The GPUs as they were last reported.
#[derive(Debug, Default)]
pub(super) struct History {
    session: u64,
    gpus: Vec<Gpu>,
    links: Vec<GpuLink>,
    generation: u64,
    /// Whether the last report had them.
    reported: bool,
}

impl History {
    /// The GPUs to report for `sample`, and the generation that they are of.
    pub(super) fn add(&mut self, sample: Sample) -> (Vec<Gpu>, u64) {
        let same_session = sample.session == self.session;
        let mut gpus = sample.gpus;
        self.lend_identities(&mut gpus);
        if same_session {
            self.keep_sick(&mut gpus);
        }
        self.keep_last_xid(&mut gpus);
        gpus.extend(self.gone(&gpus));
        let is_as_before = shape(&gpus) == shape(&self.gpus) && sample.links == self.links;
        if !self.reported || !is_as_before {
            self.generation += 1;
        }
        self.reported = true;
        self.links = sample.links;
        self.session = sample.session;
        self.gpus.clone_from(&gpus);
        (gpus, self.generation)
    }

    /// The generation of a report without GPUs, since the library does not answer.
    pub(super) fn add_none(&mut self) -> u64 {
        if std::mem::take(&mut self.reported) {
            self.generation += 1;
        }
        self.generation
    }

    fn lend_identities(&self, gpus: &mut [Gpu]) {
        for at in 0..gpus.len() {
            if gpus[at].uuid.is_some() {
                continue;
            }
            let index = gpus[at].index;
            let sat_there = self.gpus.iter().find(|old| old.index == index && !is_in(old, gpus));
            if let Some(old) = sat_there {
                let health = gpus[at].health.clone();
                let mut faults = gpus[at].faults.clone();
                if faults.last_xid.is_none() {
                    faults.last_xid = old.faults.last_xid;
                    faults.last_xid_at = old.faults.last_xid_at;
                }
                gpus[at] = Gpu { health, faults, ..unmeasured(old) };
            }
        }
    }

    fn keep_sick(&self, gpus: &mut [Gpu]) {
        for gpu in gpus {
            let before = self.gpus.iter().find(|old| match &old.uuid {
                Some(_) => old.uuid == gpu.uuid,
                // It could not say its name then.
                None => old.index == gpu.index,
            });
            if let Some(old) = before.filter(|old| old.health.is_sick()) {
                for reason in &old.health.reasons {
                    gpu.health.add(old.health.state, &reason.code, reason.message.clone());
                }
            }
        }
    }

    fn keep_last_xid(&self, gpus: &mut [Gpu]) {
        for gpu in gpus.iter_mut().filter(|gpu| gpu.faults.last_xid.is_none()) {
            let before = self.gpus.iter().find(|old| old.uuid.is_some() && old.uuid == gpu.uuid);
            if let Some(old) = before {
                gpu.faults.last_xid = old.faults.last_xid;
                gpu.faults.last_xid_at = old.faults.last_xid_at;
            }
        }
    }

    fn gone(&self, gpus: &[Gpu]) -> Vec<Gpu> {
        let gone = self.gpus.iter().filter(|old| old.uuid.is_some() && !is_in(old, gpus));
        gone.take(MAX_GONE)
            .map(|old| {
                let mut gpu = unmeasured(old);
                gpu.health.add(
                HealthState::Lost,
                "GPU_GONE",
                "was here and is no longer enumerated by the driver; look for Xid 79 in the kernel \
                 log, or restart the agent if it was taken out on purpose",
            );
                gpu
            })
            .collect()
    }
}

fn is_in(gpu: &Gpu, gpus: &[Gpu]) -> bool {
    gpus.iter().any(|other| other.uuid == gpu.uuid)
}

/// `gpu` without what was measured of it.
fn unmeasured(gpu: &Gpu) -> Gpu {
    Gpu { memory: None, telemetry: Telemetry::default(), processes: None, ..gpu.clone() }
}

/// What a scheduler plans by, and what a generation is counted for.
#[derive(PartialEq)]
struct Shape<'a> {
    uuid: Option<&'a str>,
    index: u32,
    split: bool,
    parts: Vec<Option<&'a str>>,
    lost: bool,
}

fn shape(gpus: &[Gpu]) -> Vec<Shape<'_>> {
    let of = |gpu| {
        let Gpu { uuid, index, mig, health, .. }: &Gpu = gpu;
        let parts = mig.iter().flat_map(|mig| &mig.devices);
        Shape {
            uuid: uuid.as_deref(),
            index: *index,
            split: mig.as_ref().is_some_and(|mig| mig.enabled),
            parts: parts.map(|part| part.uuid.as_deref()).collect(),
            lost: health.state == HealthState::Lost,
        }
    };
    gpus.iter().map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::super::inventory::Health;
    use super::super::mig::{Mig, MigDevice};
    use super::*;

    fn gpu(index: u32, name: &str) -> Gpu {
        Gpu { uuid: Some(format!("GPU-{name}")), ..Gpu::unknown(index) }
    }

    fn lost(gpu: Gpu) -> Gpu {
        let mut health = Health::ok();
        health.add(HealthState::Lost, "GPU_LOST", "lost");
        Gpu { health, ..gpu }
    }

    fn sample(session: u64, gpus: Vec<Gpu>) -> Sample {
        Sample {
            session,
            driver_version: None,
            nvml_version: None,
            cuda_driver_version: None,
            gpus,
            links: Vec::new(),
        }
    }

    #[test]
    fn a_gpu_that_cannot_say_its_name_any_more_keeps_it() {
        let mut history = History::default();
        history.add(sample(1, vec![gpu(0, "a"), gpu(1, "b")]));
        let (gpus, _) = history.add(sample(1, vec![gpu(0, "a"), lost(Gpu::unknown(1))]));
        assert_eq!(gpus.len(), 2);
        assert_eq!(gpus[1].uuid.as_deref(), Some("GPU-b"));
        assert_eq!(gpus[1].health.state, HealthState::Lost);
    }

    #[test]
    fn a_nameless_gpu_takes_no_name_that_another_one_has() {
        let mut history = History::default();
        history.add(sample(1, vec![gpu(0, "a"), gpu(1, "b")]));
        // After a new start of NVML, "b" is the first.
        let (gpus, _) = history.add(sample(2, vec![gpu(0, "b"), lost(Gpu::unknown(1))]));
        let names: Vec<_> = gpus.iter().map(|gpu| gpu.uuid.as_deref()).collect();
        assert_eq!(names, [Some("GPU-b"), None, Some("GPU-a")]);
        assert_eq!(gpus[2].health.reasons[0].code, "GPU_GONE");
    }

    #[test]
    fn a_lost_gpu_comes_back_only_with_a_new_session() {
        let mut history = History::default();
        history.add(sample(1, vec![lost(gpu(0, "a"))]));
        let (gpus, _) = history.add(sample(1, vec![gpu(0, "a")]));
        assert_eq!(gpus[0].health.state, HealthState::Lost, "the same session proves nothing");
        let (gpus, _) = history.add(sample(2, vec![gpu(0, "a")]));
        assert_eq!(gpus[0].health, Health::ok());
    }

    #[test]
    fn a_gpu_that_is_no_longer_enumerated_stays_listed_as_lost_until_it_is_back() {
        let mut history = History::default();
        history.add(sample(1, vec![gpu(0, "a"), gpu(1, "b")]));
        for session in 2..5 {
            let (gpus, _) = history.add(sample(session, vec![gpu(0, "b")]));
            assert_eq!(gpus.len(), 2);
            assert_eq!(gpus[1].uuid.as_deref(), Some("GPU-a"));
            assert_eq!(gpus[1].health.state, HealthState::Lost);
            assert_eq!(gpus[1].health.reasons.len(), 1);
        }
        let (gpus, _) = history.add(sample(5, vec![gpu(0, "a"), gpu(1, "b")]));
        assert!(gpus.iter().all(|gpu| gpu.health == Health::ok()));
    }

    #[test]
    fn the_generation_counts_changes_of_shape_alone() {
        let mut history = History::default();
        let generation = |history: &mut History, gpus| history.add(sample(1, gpus)).1;
        assert_eq!(generation(&mut history, vec![]), 1);
        assert_eq!(generation(&mut history, vec![gpu(0, "a")]), 2);
        let mut busy = gpu(0, "a");
        busy.telemetry.utilization_ratio = Some(1.0);
        assert_eq!(generation(&mut history, vec![busy]), 2);
        let mig = Some(Mig { capable: true, enabled: true, ..Mig::default() });
        assert_eq!(generation(&mut history, vec![Gpu { mig, ..gpu(0, "a") }]), 3);
        assert_eq!(history.generation, 3);
    }

    #[test]
    fn a_new_part_and_a_new_link_are_changes_of_shape() {
        let mut history = History::default();
        let split = |parts: u32| {
            let part = |slot| MigDevice {
                uuid: Some(format!("MIG-{slot}")),
                slot,
                profile: None,
                gpu_instance_id: None,
                compute_instance_id: None,
                memory: None,
                multiprocessor_count: None,
                allocations: Vec::new(),
            };
            let devices = (0..parts).map(part).collect();
            let mig = Some(Mig { capable: true, enabled: true, devices, ..Mig::default() });
            sample(1, vec![Gpu { mig, ..gpu(0, "a") }])
        };
        assert_eq!(history.add(split(1)).1, 1);
        assert_eq!(history.add(split(1)).1, 1);
        assert_eq!(history.add(split(2)).1, 2);
        let mut linked = split(2);
        linked.links.push(GpuLink {
            uuid_a: "GPU-a".into(),
            uuid_b: "GPU-b".into(),
            kind: None,
            link_count: 0,
            bandwidth_bytes_per_second: None,
            p2p_read: None,
            p2p_write: None,
        });
        assert_eq!(history.add(linked).1, 3);
    }

    #[test]
    fn a_library_that_stops_answering_and_answers_again_is_two_generations() {
        let mut history = History::default();
        assert_eq!(history.add_none(), 0);
        assert_eq!(history.add(sample(1, vec![gpu(0, "a")])).1, 1);
        assert_eq!(history.add_none(), 2, "the GPUs went");
        assert_eq!(history.add_none(), 2);
        assert_eq!(history.add(sample(2, vec![gpu(0, "a")])).1, 3, "and came");
    }

    #[test]
    fn a_gpu_that_never_said_its_name_proves_itself_by_a_new_session_too() {
        let mut sick = Gpu::unknown(0);
        sick.health.add(HealthState::Unhealthy, "GPU_NOT_READABLE", "why");
        let mut history = History::default();
        history.add(sample(1, vec![sick]));
        let (gpus, _) = history.add(sample(1, vec![gpu(0, "a")]));
        assert_eq!(gpus[0].health.state, HealthState::Unhealthy);
        let (gpus, _) = history.add(sample(2, vec![gpu(0, "a")]));
        assert_eq!(gpus[0].health, Health::ok());
    }

    #[test]
    fn gpus_that_are_gone_are_not_counted_for_ever() {
        let mut history = History::default();
        for at in 0..200 {
            history.add(sample(at, vec![gpu(0, &at.to_string())]));
        }
        let (gpus, _) = history.add(sample(200, vec![]));
        assert_eq!(gpus.len(), MAX_GONE);
        assert_eq!(gpus[0].uuid.as_deref(), Some("GPU-199"), "the latest are kept");
    }

    #[test]
    fn the_last_error_is_remembered_after_the_gpu_is_well() {
        let mut history = History::default();
        let mut hit = lost(gpu(0, "a"));
        hit.faults.last_xid = Some(79);
        history.add(sample(1, vec![hit]));
        let (gpus, _) = history.add(sample(1, vec![lost(Gpu::unknown(0))]));
        assert_eq!(gpus[0].faults.last_xid, Some(79), "also where it cannot say its name");
        let (gpus, _) = history.add(sample(2, vec![gpu(0, "a")]));
        assert_eq!((gpus[0].health.state, gpus[0].faults.last_xid), (HealthState::Ok, Some(79)));
    }
}
