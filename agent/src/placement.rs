//! How well this node suits: present and missing bytes, time, room, a score.
//!
//! Plain values in, plain values out; which GPUs match is in [`gpus`], the wire in [`crate::api`].

use std::time::{Duration, SystemTime};

use carport_image::pull::{PullProgress, PullState};
use carport_image::runtime::RuntimeImage;
use carport_image::store::{Fits, Held, Promised, Room, StoredImage};
use carport_image::{Digest, Reference};

use crate::state::{NodeState, Rates, host, in_flight};

pub mod gpus;

/// After so long the score has fallen to 1/e: a pod that waits half a minute for its model
/// waits about as long as its server needs for imports and CUDA.
const SCORE_TIME_CONSTANT: Duration = Duration::from_secs(30);

/// A model as a caller names it; at least one of the two is there.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Wanted {
    /// As a pod writes it.
    pub reference: Option<Reference>,
    /// The platform's manifest; wins over the reference.
    pub digest: Option<Digest>,
}

/// What this node knows of a wanted model.
#[derive(Debug)]
pub struct Model<'a> {
    /// What was asked for.
    pub wanted: &'a Wanted,
    /// What it means here, when that is known.
    pub digest: Option<Digest>,
    /// The complete image.
    pub image: Option<&'a StoredImage>,
    /// The pull of it that is under way, or failed lately; never set where the image is complete.
    pub pull: Option<&'a PullProgress>,
    /// The container runtime's complete image.
    pub runtime: Option<&'a RuntimeImage>,
}

impl<'a> Model<'a> {
    /// Looks `wanted` up.
    pub fn find(wanted: &'a Wanted, state: &'a NodeState, pulls: &'a [PullProgress]) -> Self {
        let by_reference = || wanted.reference.as_ref().and_then(|name| state.resolve(name));
        let digest = wanted.digest.or_else(by_reference);
        let image = digest.and_then(|digest| state.images.get(&digest)).map(AsRef::as_ref);
        let same = |pull: &&PullProgress| {
            (digest.is_some() && pull.digest == digest)
                || wanted.reference.as_ref() == Some(&pull.reference)
        };
        let pull = if image.is_some() {
            None
        } else {
            // A new attempt says more than an old failure.
            let mut found = pulls.iter().filter(same);
            found.clone().find(|pull| in_flight(pull)).or_else(|| found.next_back())
        };
        let digest = digest.or_else(|| pull.and_then(|pull| pull.digest));
        let runtime = state.in_runtime(digest, wanted.reference.as_ref());
        let digest = digest.or_else(|| runtime.map(|image| image.digest));
        Self { wanted, digest, image, pull, runtime }
    }

    fn is_same(&self, other: &Self) -> bool {
        match (self.digest, other.digest) {
            (None, None) => self.wanted.reference == other.wanted.reference,
            (ours, theirs) => ours == theirs,
        }
    }

    /// Whether the node has ever heard of it.
    pub fn is_known(&self) -> bool {
        self.is_here() || self.pull.is_some_and(|pull| pull.digest.is_some())
    }

    /// Whether it is complete on this node: in the store, or in the container runtime while nobody
    /// waits for it to come into the store.
    pub fn is_here(&self) -> bool {
        self.image.is_some() || (self.runtime.is_some() && !self.pull.is_some_and(in_flight))
    }

    /// Bytes that are not here. `None`: its size is not known.
    ///
    /// Of a pull under way as they travel; models hardly compress.
    pub fn missing_bytes(&self) -> Option<u64> {
        match self.pull {
            _ if self.is_here() => Some(0),
            Some(pull) if in_flight(pull) => remaining(pull),
            _ => None,
        }
    }
}

/// What the node would have to do for a set of models.
#[derive(Debug, Clone, PartialEq)]
pub struct Evaluation {
    /// Bytes that are not here, a model named twice counted once. `None`: not known.
    pub missing_bytes: Option<u64>,
    /// Median time until all are here. `None`: not known.
    pub eta: Option<Duration>,
    /// The same, met in nine of ten cases.
    pub eta_p90: Option<Duration>,
    /// Whether there is room. `None` where the missing bytes are not known.
    pub fit: Option<Fit>,
}

/// Whether something fits on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fit {
    /// Perhaps after removing what nobody uses.
    pub fits: bool,
    /// As it is.
    pub fits_without_eviction: bool,
    /// Free now.
    pub free_bytes: u64,
    /// Held by what could be removed.
    pub reclaimable_bytes: u64,
    /// Promised to pulls of other models, and to reservations.
    pub reserved_bytes: u64,
}

/// Evaluates `models` together.
pub fn evaluate(models: &[Model<'_>], state: &NodeState, pulls: &[PullProgress]) -> Evaluation {
    // A handful: comparing them costs less than a set.
    let mut distinct: Vec<&Model<'_>> = Vec::with_capacity(models.len());
    for model in models {
        if !distinct.iter().any(|other| other.is_same(model)) {
            distinct.push(model);
        }
    }
    let missing_bytes = distinct.iter().map(|model| model.missing_bytes()).sum::<Option<u64>>();
    let longest = |pick: fn(Eta) -> Duration| {
        let each = distinct.iter().map(|model| match model.is_here() {
            true => Some(Duration::ZERO),
            false => model.pull.and_then(|pull| eta(pull, pulls, &state.rates)).map(pick),
        });
        each.collect::<Option<Vec<_>>>().map(|all| all.into_iter().max().unwrap_or_default())
    };
    let fit = missing_bytes.map(|missing| fit(missing, &distinct, state, pulls));
    Evaluation { missing_bytes, eta: longest(|eta| eta.p50), eta_p90: longest(|eta| eta.p90), fit }
}

/// 0 to 100: how soon everything is here.
pub fn score(eta: Option<Duration>) -> u32 {
    let Some(eta) = eta else { return 0 };
    let score = 100.0 * (-eta.as_secs_f64() / SCORE_TIME_CONSTANT.as_secs_f64()).exp();
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0 to 100")]
    {
        score.round() as u32
    }
}

/// What pulls under way, also those of other processes, have still to bring, as far as known, and what is reserved but
/// for `ours`. A pull has taken its reservation over.
pub fn promised(
    state: &NodeState,
    pulls: &[PullProgress],
    ours: impl Fn(&Reference) -> bool,
) -> Promised {
    let now = SystemTime::now();
    let taken_over = |name: &Reference| {
        ours(name) || pulls.iter().any(|pull| in_flight(pull) && pull.reference == *name)
    };
    let reserved = state
        .reservations
        .iter()
        .filter(|one| one.expires_at > now && !one.reference.as_ref().is_some_and(taken_over));
    Promised {
        // Those that are let in have leases, whosever they are; those that are not yet, progress.
        pulls_bytes: pulls_bytes(pulls).max(state.room.taken.pulls_bytes),
        reserved_bytes: reserved.fold(0, |sum, one| sum.saturating_add(one.bytes)),
    }
}

/// Bytes that pulls under way have still to bring, as far as known.
pub fn pulls_bytes(pulls: &[PullProgress]) -> u64 {
    pulls.iter().filter(|pull| in_flight(pull)).filter_map(remaining).sum()
}

fn fit(missing: u64, models: &[&Model<'_>], state: &NodeState, pulls: &[PullProgress]) -> Fit {
    let now = SystemTime::now();
    // What is asked for together must not go for each other.
    let idle = models.iter().filter_map(|model| model.digest).filter(|d| state.is_idle(d, now));
    let kept: u64 = idle.filter_map(|digest| state.evictable.get(&digest)).sum();
    let evictable_bytes = state.evictable_bytes.saturating_sub(kept);
    let ours = |name: &Reference| models.iter().any(|m| m.wanted.reference.as_ref() == Some(name));
    let mut taken = promised(state, pulls, ours);
    taken.pulls_bytes = taken.pulls_bytes.saturating_sub(missing);
    let room = Room { taken, held: Held { evictable_bytes, ..state.room.held }, ..state.room };
    let fits = room.fits(missing, &state.limits);
    Fit {
        fits: fits != Fits::No,
        fits_without_eviction: fits == Fits::AsItIs,
        free_bytes: room.space.free_bytes,
        reclaimable_bytes: evictable_bytes.saturating_add(room.unused_bytes),
        reserved_bytes: taken.pulls_bytes.saturating_add(taken.reserved_bytes),
    }
}

/// When a pull will be done.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Eta {
    /// In half of the cases.
    pub p50: Duration,
    /// In nine of ten.
    pub p90: Duration,
}

/// When `pull` will be done: what it and the pulls before it have still to bring, at the rate
/// that their registry gave lately; before there is such a rate, the pull's own.
pub fn eta(pull: &PullProgress, pulls: &[PullProgress], rates: &Rates) -> Option<Eta> {
    if !in_flight(pull) {
        return None;
    }
    let own = remaining(pull)?;
    let ahead = pulls.iter().filter(|other| {
        in_flight(other)
            && other.reference != pull.reference
            && host(other) == host(pull)
            && other.started_at < pull.started_at
    });
    let bytes = own + ahead.filter_map(remaining).sum::<u64>();
    if bytes == 0 {
        return Some(Eta { p50: Duration::ZERO, p90: Duration::ZERO });
    }
    match rates.of(host(pull)) {
        Some(rate) => Some(Eta {
            p50: at_rate(bytes, rate.p50_bytes_per_second)?,
            p90: at_rate(bytes, rate.p10_bytes_per_second)?,
        }),
        None => at_rate(bytes, pull.bytes_per_second).map(|eta| Eta { p50: eta, p90: eta }),
    }
}

/// Bytes that `pull` has still to bring. `None`: its manifest is not read yet.
pub fn remaining(pull: &PullProgress) -> Option<u64> {
    match pull.state {
        PullState::Resolving if pull.total_bytes == 0 => None,
        // All layers may have been here already.
        _ => Some(pull.total_bytes.saturating_sub(pull.done_bytes)),
    }
}

fn at_rate(bytes: u64, bytes_per_second: f64) -> Option<Duration> {
    #[allow(clippy::cast_precision_loss)]
    let seconds = bytes as f64 / bytes_per_second;
    // Also for a rate of nothing, and for more than a year: both say nothing to a scheduler.
    (seconds.is_finite() && seconds < 3.0e7).then(|| Duration::from_secs_f64(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::fixtures::{image, node, pin, pull, volume};
    use carport_image::store::{Reservation, Space};
    use std::sync::Arc;
    use std::time::UNIX_EPOCH;

    fn wanted(text: &str) -> Wanted {
        Wanted { reference: Some(text.parse().unwrap()), digest: None }
    }

    fn ask(texts: &[&str], state: &NodeState, pulls: &[PullProgress]) -> Evaluation {
        let wanted: Vec<Wanted> = texts.iter().map(|text| wanted(text)).collect();
        let models: Vec<_> = wanted.iter().map(|w| Model::find(w, state, pulls)).collect();
        evaluate(&models, state, pulls)
    }

    #[test]
    fn the_score_falls_with_the_time() {
        let seconds = |s| Some(Duration::from_secs(s));
        assert_eq!(score(seconds(0)), 100);
        assert_eq!(score(seconds(30)), 37);
        assert_eq!(score(seconds(60)), 14);
        assert_eq!(score(seconds(600)), 0);
        assert_eq!(score(None), 0);
    }

    #[test]
    fn what_is_here_needs_no_time_even_on_a_full_disk() {
        let mut state = node(vec![image("r/a:1", 500)]);
        state.room.space.free_bytes = 0;
        let answer = ask(&["r/a:1"], &state, &[]);
        assert_eq!((answer.missing_bytes, answer.eta), (Some(0), Some(Duration::ZERO)));
        assert!(answer.fit.unwrap().fits_without_eviction);
    }

    #[test]
    fn what_the_runtime_has_is_here_unless_a_pull_brings_it_or_the_runtime_is_away() {
        use carport_image::runtime::{Inventory, RuntimeImage};
        let digest = Digest::of(b"x");
        let name = "r/a:1".parse::<Reference>().unwrap().to_string();
        let (references, layers) = (vec![name.clone()], Vec::new());
        let image = RuntimeImage { digest, references, bytes: 9, unpacked: true, layers };
        let mut inventory = Inventory { connected: true, ..Inventory::default() };
        inventory.references.insert(name, digest);
        inventory.images.insert(digest, Arc::new(image));
        let mut state = node(vec![]);
        state.runtime = Arc::new(inventory.clone());
        let answer = ask(&["r/a:1"], &state, &[]);
        assert_eq!((answer.missing_bytes, answer.eta), (Some(0), Some(Duration::ZERO)));
        let by_tag = wanted("r/a:1");
        assert_eq!(Model::find(&by_tag, &state, &[]).digest, Some(digest));
        // Who waits for it in the store waits for the rest of it.
        let answer = ask(&["r/a:1"], &state, &[pull("r/a:1", 1, 10)]);
        assert_eq!(answer.missing_bytes, Some(9));
        inventory.connected = false;
        state.runtime = Arc::new(inventory);
        assert!(!Model::find(&by_tag, &state, &[]).is_known());
    }

    #[test]
    fn of_what_was_never_heard_of_nothing_is_claimed() {
        let state = node(vec![]);
        let answer = ask(&["r/a:1"], &state, &[]);
        assert_eq!(answer, Evaluation { missing_bytes: None, eta: None, eta_p90: None, fit: None });
    }

    #[test]
    fn a_model_named_twice_is_counted_once() {
        let state = node(vec![]);
        let pulls = [pull("r/a:1", 100, 400), pull("r/b:1", 0, 50)];
        assert_eq!(ask(&["r/a:1", "r/a:1", "r/b:1"], &state, &pulls).missing_bytes, Some(350));
        // By tag and by digest, too.
        let mut known = pulls[0].clone();
        known.digest = Some(Digest::of(b"x"));
        let by_digest = Wanted { reference: None, digest: known.digest };
        let (by_tag, pulls) = (wanted("r/a:1"), [known]);
        let models =
            [Model::find(&by_tag, &state, &pulls), Model::find(&by_digest, &state, &pulls)];
        assert_eq!(evaluate(&models, &state, &pulls).missing_bytes, Some(300));
    }

    #[test]
    fn the_time_is_reckoned_from_what_the_registry_gave_and_what_goes_before() {
        let mut state = node(vec![]);
        let mut rates = Rates::default();
        for second in 0..10_u32 {
            let mut sample = pull("r:5000/z:1", 0, 1);
            sample.bytes_per_second = if second == 0 { 5.0 } else { 10.0 };
            rates.sample(&[sample], SystemTime::now());
        }
        state.rates = Arc::new(rates);
        let first = pull("r:5000/a:1", 0, 100);
        let mut second = pull("r:5000/b:1", 50, 150);
        second.started_at = UNIX_EPOCH + Duration::from_secs(1);
        let pulls = [first, second];
        let answer = ask(&["r:5000/b:1"], &state, &pulls);
        assert_eq!(answer.eta, Some(Duration::from_secs(20)));
        assert_eq!(answer.eta_p90, Some(Duration::from_secs(20)));
        assert_eq!(ask(&["r:5000/a:1"], &state, &pulls).eta, Some(Duration::from_secs(10)));
    }

    #[test]
    fn without_a_measured_rate_the_pull_s_own_serves() {
        let state = node(vec![]);
        let mut running = pull("r/a:1", 0, 100);
        assert_eq!(ask(&["r/a:1"], &state, &[running.clone()]).eta, None);
        running.bytes_per_second = 50.0;
        assert_eq!(ask(&["r/a:1"], &state, &[running]).eta, Some(Duration::from_secs(2)));
    }

    #[test]
    fn room_is_what_is_free_then_what_nobody_uses() {
        let state = node(vec![image("r/idle:1", 300)]);
        let fit = |missing| ask(&["r/a:1"], &state, &[pull("r/a:1", 0, missing)]).fit.unwrap();
        assert!(fit(600).fits_without_eviction);
        assert!(fit(900).fits && !fit(900).fits_without_eviction);
        assert!(!fit(901).fits);
        assert_eq!(fit(1).reclaimable_bytes, 300);
        // Nor is a pinned image, and what somebody has reserved.
        let mut pinned = state.clone();
        let pin = pin(image("r/idle:1", 300).digest, Some(Duration::from_secs(60)));
        pinned.pins.insert(pin.image, vec![pin.clone()]);
        pinned.reckon();
        let pulls = [pull("r/a:1", 0, 601)];
        assert!(!ask(&["r/a:1"], &pinned, &pulls).fit.unwrap().fits);
        pinned.pins.get_mut(&pin.image).unwrap()[0].expires_at = Some(UNIX_EPOCH);
        pinned.reckon();
        assert!(ask(&["r/a:1"], &pinned, &pulls).fit.unwrap().fits);
        // What is shared with others goes with them, and what has gone is not to be had again.
        pinned.images.clear();
        pinned.reckon();
        assert!(!ask(&["r/a:1"], &pinned, &pulls).fit.unwrap().fits);
        // A mounted image is not to be had.
        let digest = image("r/idle:1", 300).digest;
        let mut mounted = state.clone();
        mounted.volumes.insert(digest, vec![volume(digest)]);
        mounted.reckon();
        let pulls = [pull("r/a:1", 0, 601)];
        assert!(!ask(&["r/a:1"], &mounted, &pulls).fit.unwrap().fits);
    }

    #[test]
    fn what_is_asked_for_together_does_not_go_for_each_other() {
        let state = node(vec![image("r/idle:1", 300)]);
        let pulls = [pull("r/a:1", 0, 700)];
        assert!(ask(&["r/a:1"], &state, &pulls).fit.unwrap().fits);
        let both = ask(&["r/a:1", "r/idle:1"], &state, &pulls).fit.unwrap();
        assert_eq!((both.fits, both.reclaimable_bytes), (false, 0));
    }

    #[test]
    fn the_watermark_says_what_goes_without_eviction_and_what_nobody_uses_is_room() {
        let mut state = node(vec![image("r/idle:1", 300)]);
        state.limits.high = 0.9;
        let fit = |state: &NodeState, missing| {
            ask(&["r/a:1"], state, &[pull("r/a:1", 0, missing)]).fit.unwrap()
        };
        assert!(fit(&state, 500).fits_without_eviction);
        assert!(fit(&state, 501).fits && !fit(&state, 501).fits_without_eviction);
        state.room.unused_bytes = 50;
        assert!(fit(&state, 550).fits_without_eviction);
        assert!(fit(&state, 950).fits && !fit(&state, 951).fits);
        // The quota is full before the disk is.
        state.room.space = Space { limit_bytes: 400, used_bytes: 390, free_bytes: 10 };
        assert!(!fit(&state, 361).fits && fit(&state, 360).fits);
        assert_eq!(fit(&state, 1).free_bytes, 10);
    }

    #[test]
    fn a_reservation_is_for_its_pull_until_its_time_is_over() {
        let mut state = node(vec![]);
        let hour = Duration::from_secs(3600);
        let for_a = Reservation {
            id: "job".into(),
            owner: "scheduler".parse().unwrap(),
            bytes: 300,
            reference: Some("r/a:1".parse().unwrap()),
            expires_at: SystemTime::now() + hour,
        };
        state.reservations = vec![for_a.clone()];
        let pulls = [pull("r/a:1", 0, 400), pull("r/b:1", 0, 200)];
        let fit = |state: &NodeState, name: &str, pulls: &[PullProgress]| {
            let Fit { reserved_bytes, fits, .. } = ask(&[name], state, pulls).fit.unwrap();
            (reserved_bytes, fits)
        };
        assert_eq!(fit(&state, "r/b:1", &pulls[1..]), (300, true));
        assert_eq!(fit(&state, "r/b:1", &pulls), (400, true), "its pull has taken it over");
        assert_eq!(fit(&state, "r/a:1", &pulls[..1]), (0, true), "it is for this one");
        let large = [pull("r/b:1", 0, 301)];
        assert_eq!(fit(&state, "r/b:1", &large), (300, false));
        state.reservations[0].expires_at = SystemTime::now() - hour;
        assert_eq!(fit(&state, "r/b:1", &large), (0, true));
        // Another process pulls, too.
        state.room.taken.pulls_bytes = 600;
        assert_eq!(fit(&state, "r/b:1", &large), (299, true));
        state.room.taken.pulls_bytes = 601;
        assert_eq!(fit(&state, "r/b:1", &large), (300, false));
    }

    #[test]
    fn room_is_promised_to_other_pulls_first() {
        let state = node(vec![]);
        let pulls = [pull("r/a:1", 0, 300), pull("r/b:1", 0, 400)];
        let fit = ask(&["r/a:1"], &state, &pulls).fit.unwrap();
        assert_eq!((fit.reserved_bytes, fit.fits), (400, false));
    }

    #[test]
    fn a_failed_pull_is_known_and_has_no_time() {
        let state = node(vec![]);
        let mut failed = pull("r/a:1", 10, 100);
        failed.state = PullState::Failed { reason: "denied", message: "denied".into() };
        let wanted = wanted("r/a:1");
        let pulls = [failed];
        let model = Model::find(&wanted, &state, &pulls);
        assert!(model.pull.is_some() && model.missing_bytes().is_none());
    }
}
