//! Between plain values and the wire of `carport.v1`.

use std::time::{Duration, SystemTime};

use carport_csi::RegistrationState;
use carport_csi::volume::PodInfo;
use carport_image::pull::{PullProgress, PullState};
use carport_image::runtime::Inventory;
use carport_image::store::{Pin, StoredImage};
use carport_image::{Digest, Reference};
use carport_proto::carport::v1;
use prost_types::Timestamp;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::kubelet::KubeletReport;
use crate::placement::gpus::{self, Match, Requirement};
use crate::placement::{self, Fit, Model, Wanted};
use crate::state::{NodeState, Rates, Revision, Trouble, in_flight};

/// Whose error codes they are, in `google.rpc.ErrorInfo`.
pub const DOMAIN: &str = "carport.dev";

/// A request that is wrong whatever the node's state: names the field.
pub fn invalid(field: &str, why: impl std::fmt::Display) -> Status {
    let why = why.to_string();
    let details = ErrorDetails::with_bad_request_violation(field, &why);
    Status::with_error_details(Code::InvalidArgument, format!("{field}: {why}"), details)
}

/// Reads a model's name.
pub fn wanted(model: &v1::ModelRef, field: &str) -> Result<Wanted, Status> {
    let reference: Option<Reference> = match model.reference.as_str() {
        "" => None,
        text => Some(text.parse().map_err(|why| invalid(&format!("{field}.reference"), why))?),
    };
    let digest: Option<Digest> = match model.digest.as_str() {
        "" => None,
        text => Some(text.parse().map_err(|why| invalid(&format!("{field}.digest"), why))?),
    };
    if reference.is_none() && digest.is_none() {
        return Err(invalid(field, "write a reference or a digest"));
    }
    if !model.platform.is_empty() {
        let why = "only the node's own platform is served; leave it empty";
        return Err(invalid(&format!("{field}.platform"), why));
    }
    Ok(Wanted { reference, digest })
}

/// Reads what is wanted of GPUs.
pub fn requirement(wish: &v1::GpuRequirement) -> Result<Requirement, Status> {
    if wish.allow_mig {
        return Err(invalid("gpu.allow_mig", "MIG devices are not looked at; leave it false"));
    }
    if wish.same_nvlink_domain {
        let why = "NVLink domains are not looked at; leave it false";
        return Err(invalid("gpu.same_nvlink_domain", why));
    }
    let min_compute_capability = match wish.min_compute_capability.as_str() {
        "" => None,
        text => Some(
            gpus::parse_compute_capability(text)
                .map_err(|why| invalid("gpu.min_compute_capability", why))?,
        ),
    };
    let product = match wish.product_regex.as_str() {
        "" => None,
        text => Some(
            Requirement::product_pattern(text).map_err(|why| invalid("gpu.product_regex", why))?,
        ),
    };
    Ok(Requirement {
        count: wish.count,
        free_memory_bytes: wish.free_memory_bytes_each,
        min_compute_capability,
        product,
        same_numa_node: wish.same_numa_node,
    })
}

/// One model, as this node has it.
pub fn model(
    model: &Model<'_>,
    state: &NodeState,
    pulls: &[PullProgress],
    with_pods: bool,
) -> v1::ModelLocality {
    let reference = match (&model.wanted.reference, model.image) {
        (Some(reference), _) => reference.to_string(),
        (None, Some(image)) => image.references.first().cloned().unwrap_or_default(),
        (None, None) => {
            let pulled = model.pull.map(|pull| pull.reference.to_string());
            let named = || model.runtime.and_then(|image| image.references.first().cloned());
            pulled.or_else(named).unwrap_or_default()
        }
    };
    let digest = model.digest.map(|digest| digest.to_string()).unwrap_or_default();
    let mut answer = v1::ModelLocality {
        model: Some(v1::ModelRef { reference, digest, platform: String::new() }),
        state: model_state(model).into(),
        ..Default::default()
    };
    if let Some(image) = model.image {
        answer.total_bytes = Some(image.unpacked_bytes);
        answer.present_bytes = image.unpacked_bytes;
        answer.download_bytes = Some(0);
        if let Some(sample) = state.page_cache.get(&image.digest) {
            answer.page_cache_bytes = Some(sample.bytes);
            answer.sample_time = Some(timestamp(sample.at));
        }
        let now = SystemTime::now();
        let pins = state.pins.get(&image.digest).into_iter().flatten();
        let longest = pins
            .filter(|pin| pin.expires_at.is_none_or(|end| end > now))
            .max_by_key(|pin| (pin.expires_at.is_none(), pin.expires_at));
        answer.pin = longest.map(pin);
        answer.eviction_risk = eviction_risk(image, state, now).into();
    }
    // Volumes that stream show an image that is not complete.
    if let Some(digest) = &model.digest {
        answer.mount_count = state.mounts(digest);
        let volumes = || state.volumes.get(digest).into_iter().flatten();
        answer.last_use_time = volumes().map(|volume| volume.published_at).max().map(timestamp);
        if with_pods {
            answer.pods = volumes().filter_map(|volume| volume.pod.as_ref()).map(pod).collect();
        }
    }
    if let Some(pull) = model.pull {
        if in_flight(pull) {
            answer.download_bytes = placement::remaining(pull);
            answer.pull = Some(pull_message(pull, pulls, &state.rates));
        }
        answer.last_error = pull_failure(&pull.state);
    }
    if model.is_here() {
        answer.download_bytes = Some(0);
    }
    let places = [
        model.image.map(|_| v1::Place::Store.into()),
        model.runtime.map(|_| v1::Place::Runtime.into()),
    ];
    answer.places = places.into_iter().flatten().collect();
    answer
}

/// The pin that lasts longest speaks for all.
pub(super) fn pin(pin: &Pin) -> v1::Pin {
    v1::Pin { owner: pin.owner.to_string(), expire_time: pin.expires_at.map(timestamp) }
}

fn eviction_risk(image: &StoredImage, state: &NodeState, now: SystemTime) -> v1::EvictionRisk {
    let kept = state.mounts(&image.digest) > 0 || state.is_pinned(&image.digest, now);
    if kept {
        v1::EvictionRisk::None
    } else if state.is_full() {
        v1::EvictionRisk::High
    } else {
        v1::EvictionRisk::Low
    }
}

fn model_state(model: &Model<'_>) -> v1::ModelState {
    match model.pull.map(|pull| &pull.state) {
        _ if model.is_here() => v1::ModelState::Ready,
        None | Some(PullState::Done) => v1::ModelState::Absent,
        Some(PullState::Resolving) => v1::ModelState::Queued,
        Some(PullState::Pulling) => v1::ModelState::Pulling,
        Some(PullState::Finishing) => v1::ModelState::Verifying,
        Some(PullState::Failed { .. }) => v1::ModelState::Failed,
    }
}

/// A pull under way.
pub(super) fn pull_message(pull: &PullProgress, pulls: &[PullProgress], rates: &Rates) -> v1::Pull {
    let source = match pull.reference {
        Reference::Registry(_) => v1::Source::Registry,
        Reference::Layout(_) => v1::Source::Local,
    };
    v1::Pull {
        done_bytes: pull.done_bytes,
        total_bytes: (pull.total_bytes > 0).then_some(pull.total_bytes),
        rate_bytes_per_second: pull.bytes_per_second,
        // Pulls share the line instead of queueing for it.
        queue_position: 0,
        start_time: Some(timestamp(pull.started_at)),
        source: source.into(),
        attempt: 1,
        eta: placement::eta(pull, pulls, rates).map(|eta| duration(eta.p50)),
    }
}

fn pod(pod: &PodInfo) -> v1::PodRef {
    v1::PodRef { namespace: pod.namespace.clone(), name: pod.name.clone(), uid: pod.uid.clone() }
}

/// The container runtime; nothing before it has answered.
pub fn runtime(inventory: &Inventory) -> Option<v1::Runtime> {
    Some(v1::Runtime {
        connected: inventory.connected,
        image_count: count(inventory.images.len()),
        list_time: Some(timestamp(inventory.listed_at?)),
    })
}

/// Whether it fits.
pub fn fit(fit: Fit) -> v1::Fit {
    v1::Fit {
        fits: fit.fits,
        fits_without_eviction: fit.fits_without_eviction,
        free_bytes: fit.free_bytes,
        reclaimable_bytes: fit.reclaimable_bytes,
        reserved_bytes: fit.reserved_bytes,
    }
}

/// Which GPUs do.
pub fn gpu_match(found: Match) -> v1::GpuMatch {
    v1::GpuMatch {
        free_count: found.free_count,
        matching_count: found.matching_count,
        candidate_uuids: found.candidates,
        best_group_bandwidth_bytes_per_second: None,
    }
}

/// The disk.
pub fn store(state: &NodeState, pulls: &[PullProgress]) -> v1::Store {
    let usage = &state.usage;
    let promised = placement::promised(state, pulls, |_| false);
    v1::Store {
        capacity_bytes: state.room.space.limit_bytes,
        used_bytes: usage.object_bytes,
        free_bytes: state.room.space.free_bytes,
        pinned_bytes: state.pinned_bytes(),
        mounted_bytes: state.mounted_bytes(),
        reclaimable_bytes: state.reclaimable_bytes(),
        dedupe_saved_bytes: usage
            .image_bytes
            .saturating_sub(usage.object_bytes.saturating_sub(usage.unused_bytes)),
        reserved_bytes: promised.pulls_bytes.saturating_add(promised.reserved_bytes),
    }
}

/// The network.
pub fn bandwidth(state: &NodeState, pulls: &[PullProgress]) -> v1::Bandwidth {
    let active = pulls.iter().filter(|pull| in_flight(pull));
    v1::Bandwidth {
        registries: state
            .rates
            .all()
            .into_iter()
            .filter(|rate| !rate.host.is_empty())
            .map(|rate| v1::RegistryRate {
                host: rate.host,
                p50_bytes_per_second: rate.p50_bytes_per_second,
                p10_bytes_per_second: rate.p10_bytes_per_second,
                sample_count: count(rate.samples),
                last_sample_time: Some(timestamp(rate.last)),
            })
            .collect(),
        disk_read_bytes_per_second: None,
        active_pulls: count(active.count()),
        queued_pulls: 0,
        queued_bytes: placement::pulls_bytes(pulls),
    }
}

/// What the kubelet has done so far.
pub fn kubelet(report: &KubeletReport) -> v1::Kubelet {
    let registration = match report.status.registration {
        RegistrationState::NotCalled { .. } => v1::KubeletRegistration::NotCalled,
        RegistrationState::NotUnderstood { .. } => v1::KubeletRegistration::NotUnderstood,
        RegistrationState::Asked { .. } => v1::KubeletRegistration::Asked,
        RegistrationState::Registered { .. } => v1::KubeletRegistration::Registered,
        RegistrationState::Refused { .. } => v1::KubeletRegistration::Refused,
    };
    v1::Kubelet {
        registration: registration.into(),
        since: Some(timestamp(report.since)),
        message: report.message.clone().unwrap_or_default(),
        node_info_time: report.status.node_info.map(timestamp),
        last_call_time: report.status.last_call.map(timestamp),
    }
}

/// What is wrong with the node.
pub fn reasons(troubles: &[Trouble]) -> Vec<v1::Reason> {
    troubles.iter().map(|trouble| reason(trouble.code, &trouble.message)).collect()
}

/// Why a pull failed: `PULL_DENIED`, `PULL_NO_SPACE`, …
pub fn pull_failure(state: &PullState) -> Option<v1::Reason> {
    let PullState::Failed { reason: word, message } = state else { return None };
    Some(reason(&format!("PULL_{}", word.to_ascii_uppercase()), message))
}

/// A reason of our own.
pub fn reason(code: &str, message: &str) -> v1::Reason {
    v1::Reason { code: code.into(), message: message.into() }
}

/// A point in this node's history.
pub fn revision(revision: &Revision) -> v1::Revision {
    v1::Revision { epoch: revision.epoch.to_string(), sequence: revision.sequence }
}

/// A time of this node's clock.
pub fn timestamp(at: SystemTime) -> Timestamp {
    Timestamp::from(at)
}

/// A length of time; what the wire cannot say is cut to what it can.
pub fn duration(length: Duration) -> prost_types::Duration {
    prost_types::Duration::try_from(length)
        .unwrap_or(prost_types::Duration { seconds: i64::MAX, nanos: 0 })
}

pub(super) fn count(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}
