//! The one thread that owns the GPU library.
//!
//! ```text
//! GpuProbe::sample ─► History ─► watch channel ─► readers
//!        ▲                │
//!        └── wait: interval, or retry interval while there is nothing to see
//! ```
//!
//! Between two looks it listens every second whether the driver has reported an error; then
//! the next look is at once.
//!
//! A call that hangs holds up this thread alone. It cannot be cancelled, so the
//! thread is left to it at shutdown; the process's end takes it along.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::watch;
use tracing::{info, warn};

use super::history::History;
use super::inventory::{Freshness, Gpu, GpuInventory, HealthState, ProviderState};
use super::nvml::no_devices;
use super::probe::{GpuProbe, ProbeError, Sample};

/// An answer may be this many waits old: one late answer is no reason for alarm.
const MISSED_LOOKS: u32 = 3;

/// How often sick GPUs' NVML is opened afresh: at the retry interval first, then
/// at twice the time each, up to this many times the retry interval. Opening NVML
/// initialises every GPU that is not in persistence mode, which takes seconds.
const MAX_REOPEN_FACTOR: u32 = 64;

/// How often to ask for news between two looks.
const LISTEN: Duration = Duration::from_secs(1);

/// How often to look.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pace {
    pub(super) interval: Duration,
    pub(super) retry_interval: Duration,
}

impl Pace {
    /// What readers see before the first look is over.
    pub(super) fn first(&self) -> GpuInventory {
        let message = "the first look at the GPUs is under way";
        let mut inventory = GpuInventory::none(ProviderState::Stale, message);
        inventory.freshness = Some(Freshness {
            since: Instant::now(),
            lasts: self.interval.saturating_mul(MISSED_LOOKS),
        });
        inventory
    }
}

/// Looks until `stop` is closed; then the library is closed.
pub(super) fn run(
    mut probe: impl GpuProbe,
    pace: Pace,
    inventories: &watch::Sender<Arc<GpuInventory>>,
    stop: &Receiver<()>,
) {
    let mut history = History::default();
    let mut reopen = Reopen::new(pace.retry_interval);
    let mut had_answered = false;
    loop {
        let mut inventory = report(&mut history, probe.sample());
        let answered = inventory.provider.state == ProviderState::Ok;
        // One odd answer, or an upgrade of the driver, hides the GPUs no longer than it must.
        let wait = if answered || had_answered { pace.interval } else { pace.retry_interval };
        had_answered = answered;
        let now = Instant::now();
        inventory.freshness =
            Some(Freshness { since: now, lasts: wait.saturating_mul(MISSED_LOOKS) });
        let sick = inventory.gpus.iter().any(|gpu| gpu.health.is_sick());
        log_changes(&inventories.borrow(), &inventory);
        inventories.send_replace(Arc::new(inventory));

        // NVML counts GPUs when it is opened: only a new start sees one that came,
        // and only a new start proves that a sick one is well.
        let afresh = !answered || reopen.is_due(sick, now);
        if !wait_for_next(&mut probe, wait, stop) {
            return;
        }
        if afresh {
            // Right before the next look: until then the driver's errors are heard.
            probe.close();
        }
    }
}

/// Waits until the next look is due; false: there is to be none.
fn wait_for_next(probe: &mut impl GpuProbe, wait: Duration, stop: &Receiver<()>) -> bool {
    let mut left = wait;
    loop {
        let step = left.min(LISTEN);
        match stop.recv_timeout(step) {
            Err(RecvTimeoutError::Timeout) => {}
            Ok(()) | Err(RecvTimeoutError::Disconnected) => return false,
        }
        left = left.saturating_sub(step);
        if left.is_zero() || probe.has_news() {
            return true;
        }
    }
}

fn report(history: &mut History, looked: Result<Sample, ProbeError>) -> GpuInventory {
    let mut inventory = match looked {
        Err(ProbeError { state, message }) => {
            GpuInventory { generation: history.add_none(), ..GpuInventory::none(state, message) }
        }
        Ok(sample) => {
            let mut inventory = GpuInventory {
                driver_version: sample.driver_version.clone(),
                nvml_version: sample.nvml_version.clone(),
                cuda_driver_version: sample.cuda_driver_version.clone(),
                ..GpuInventory::none(ProviderState::Ok, "")
            };
            if sample.gpus.is_empty() {
                inventory.provider.state = ProviderState::NoDevices;
                inventory.provider.message = no_devices();
            }
            inventory.links.clone_from(&sample.links);
            (inventory.gpus, inventory.generation) = history.add(sample);
            inventory
        }
    };
    inventory.sampled_at = Some(SystemTime::now());
    inventory
}

/// When to open NVML afresh for the sake of sick GPUs.
struct Reopen {
    first_wait: Duration,
    wait: Duration,
    /// `None`: no GPU is sick.
    sick_since: Option<Instant>,
}

impl Reopen {
    fn new(first_wait: Duration) -> Self {
        Self { first_wait, wait: first_wait, sick_since: None }
    }

    fn is_due(&mut self, sick: bool, now: Instant) -> bool {
        if !sick {
            *self = Self::new(self.first_wait);
            return false;
        }
        let since = *self.sick_since.get_or_insert(now);
        if now.saturating_duration_since(since) < self.wait {
            return false;
        }
        self.sick_since = Some(now);
        self.wait =
            self.wait.saturating_mul(2).min(self.first_wait.saturating_mul(MAX_REOPEN_FACTOR));
        true
    }
}

/// A look repeats every few seconds; only what changed is worth a line.
fn log_changes(before: &GpuInventory, after: &GpuInventory) {
    let provider = &after.provider;
    if before.provider.state != provider.state {
        match provider.state {
            ProviderState::Ok => {
                let driver = after.driver_version.as_deref().unwrap_or("unknown");
                info!(gpus = after.gpus.len(), driver, "gpus found");
            }
            // The normal state of a node that has none.
            ProviderState::NoLibrary => info!(message = %provider.message),
            state => warn!(%state, "{}", provider.message),
        }
    }
    for gpu in &after.gpus {
        let old = before.gpus.iter().find(|old| old.uuid == gpu.uuid && old.index == gpu.index);
        let was = old.map_or(HealthState::Ok, |old| old.health.state);
        let (uuid, index) = (name(gpu), gpu.index);
        match gpu.health.state {
            state if state == was => {}
            HealthState::Ok => info!(uuid, index, "gpu is well again"),
            state => {
                let reasons: Vec<_> =
                    gpu.health.reasons.iter().map(|reason| reason.message.as_str()).collect();
                warn!(uuid, index, %state, reasons = reasons.join("; "), "gpu is not well");
            }
        }
    }
}

fn name(gpu: &Gpu) -> &str {
    gpu.uuid.as_deref().unwrap_or("unknown")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nvml_is_opened_afresh_for_a_sick_gpu_at_growing_distances() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut reopen = Reopen::new(Duration::from_secs(60));
        assert!(!reopen.is_due(true, at(0)));
        assert!(!reopen.is_due(true, at(59)));
        assert!(reopen.is_due(true, at(60)));
        assert!(!reopen.is_due(true, at(179)));
        assert!(reopen.is_due(true, at(180)));
        assert!(!reopen.is_due(false, at(190)), "all well");
        assert!(!reopen.is_due(true, at(200)));
        assert!(reopen.is_due(true, at(260)), "the first distance again");
    }
}
