//! The node's GPUs: what there is, and how it is.
//!
//! NVML goes in, plain [`GpuInventory`] values come out.
//!
//! ```text
//! libnvidia-ml.so.1 ─► NvmlProbe ─► History ─► watch ─┐
//!        (one owner thread: `owner`)                  ├─► GpuReader ─► API, status
//! kubelet ─► `pod_resources` ─► Allocations ─► watch ─┘
//! ```
//!
//! # What always holds
//!
//! - **No GPU is an answer, not an error.** The agent serves on without library,
//!   driver or device; the inventory says which of them is missing and what to do,
//!   and a driver that comes later is found without a restart.
//! - **Reading never waits.** A call that hangs in the driver holds up the owner
//!   thread; readers get the last answer, and when that is too old it says so.
//! - **One GPU's trouble is its own.** The others are reported as if it were well.
//! - **Nothing is made up.** What could not be measured is `None`.
//!
//! What NVML is to the wire is the business of the API; which GPUs are free, of
//! [`crate::placement::gpus`].

mod allocation;
mod history;
mod inventory;
mod links;
mod mig;
mod nvml;
mod nvml_events;
mod nvml_links;
mod nvml_mig;
mod nvml_quirks;
mod nvml_raw;
mod owner;
mod pod_resources;
mod probe;
mod sysfs;
pub mod table;
pub mod topo;
pub mod xid;

#[cfg(test)]
mod conformance;
#[cfg(test)]
mod nvml_tests;

use std::path::PathBuf;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::{oneshot, watch};
use tokio::task::AbortHandle;
use tracing::{error, warn};

use self::allocation::Allocations;
pub use self::allocation::{Allocation, AllocationSource, AllocationState};
pub use self::inventory::{
    Architecture, ComputeCapability, Faults, Gpu, GpuInventory, GpuMemory, GpuProcess, Health,
    HealthState, Provider, ProviderState, Reason, RecoveryAction, Telemetry,
};
pub use self::links::{Fabric, GpuLink, LinkType, PcieLink};
pub use self::mig::{Mig, MigDevice, MigProfile};
use self::nvml::NvmlProbe;
use self::owner::Pace;
use self::probe::GpuProbe;
use self::sysfs::Sysfs;

/// How to look at the GPUs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GpuOptions {
    /// Off: no library is loaded, the inventory says `disabled`.
    pub enabled: bool,
    /// The NVML library. `None`: the loader looks for `libnvidia-ml.so.1`.
    pub library: Option<PathBuf>,
    /// From one look to the next.
    pub interval: Duration,
    /// The same while there is no GPU to see, and the least time between two fresh
    /// starts of NVML for a sick GPU.
    pub retry_interval: Duration,
    /// The mounted sysfs.
    pub sysfs: PathBuf,
    /// The kubelet's PodResources socket.
    pub pod_resources: PathBuf,
    /// Errors of the driver (XIDs) that make a GPU unhealthy.
    pub fatal_xids: Vec<u32>,
}

impl Default for GpuOptions {
    fn default() -> Self {
        Self {
            enabled: true,
            library: None,
            // A look costs a few milliseconds of the driver's time.
            interval: Duration::from_secs(10),
            retry_interval: Duration::from_secs(60),
            sysfs: "/sys".into(),
            fatal_xids: xid::FATAL.to_vec(),
            pod_resources: "/var/lib/kubelet/pod-resources/kubelet.sock".into(),
        }
    }
}

/// Starts looking, in a thread of its own, and returns at once. Called within a runtime,
/// unless switched off.
///
/// # Errors
///
/// When the thread cannot be started. Whatever is wrong with the GPUs is in the
/// inventory.
pub fn start(options: GpuOptions) -> std::io::Result<GpuHandle> {
    if !options.enabled {
        let message = "switched off by configuration";
        return Ok(idle(GpuInventory::none(ProviderState::Disabled, message)));
    }
    let pace = Pace { interval: options.interval, retry_interval: options.retry_interval };
    let sysfs = Sysfs::new(options.sysfs);
    let probe = NvmlProbe::new(options.library, sysfs, options.fatal_xids);
    let mut handle = start_with(probe, pace)?;
    let allocations = handle.allocations.clone();
    let (socket, patience) = (options.pod_resources, pod_resources::PATIENCE);
    let follow = pod_resources::follow(socket, options.interval, patience, allocations);
    handle.asking = Some(tokio::spawn(follow).abort_handle());
    Ok(handle)
}

/// Looks once, and waits for it no longer than `patience`: for a command that runs
/// without the agent. Where the driver hangs, the inventory says `stale`.
///
/// # Errors
///
/// As for [`start`].
pub async fn look_once(options: GpuOptions, patience: Duration) -> std::io::Result<GpuInventory> {
    let handle = start(options)?;
    let mut reader = handle.reader();
    let started = Instant::now();
    let both = async {
        // Switched off, both are as they will stay.
        if handle.owner.is_some() {
            let _ = reader.latest.wait_for(|inventory| inventory.sampled_at.is_some()).await;
        }
        if handle.asking.is_some() {
            let _ = reader.allocations.wait_for(|said| !said.is_not_asked()).await;
        }
    };
    // Out of patience is what the inventory then says.
    let _ = tokio::time::timeout(patience, both).await;
    // As it was when it was looked at: waiting for the kubelet makes it no older.
    let mut inventory = GpuInventory::clone(&reader.latest.borrow());
    reader.allocations.borrow().join(&mut inventory);
    handle.shutdown(patience.saturating_sub(started.elapsed())).await;
    Ok(inventory)
}

fn start_with(probe: impl GpuProbe + 'static, pace: Pace) -> std::io::Result<GpuHandle> {
    let (inventories, latest) = watch::channel(Arc::new(pace.first()));
    let (stop, stopped) = mpsc::channel();
    let (done, is_done) = oneshot::channel();
    let thread = std::thread::Builder::new().name("carport-gpus".into()).spawn(move || {
        // Dropped last, also when the thread panics.
        let _done: oneshot::Sender<()> = done;
        owner::run(probe, pace, &inventories, &stopped);
    })?;
    let owner = Owner { stop, thread, is_done };
    Ok(GpuHandle::new(latest, Some(owner), None))
}

fn idle(inventory: GpuInventory) -> GpuHandle {
    let (sender, latest) = watch::channel(Arc::new(inventory));
    GpuHandle::new(latest, None, Some(sender))
}

/// The running look at the GPUs. Dropping it stops it too, without waiting.
#[derive(Debug)]
pub struct GpuHandle {
    reader: GpuReader,
    owner: Option<Owner>,
    /// Where what the kubelet says is published.
    allocations: watch::Sender<Arc<Allocations>>,
    /// The task that asks the kubelet.
    asking: Option<AbortHandle>,
    /// Keeps the channel of a switched-off inventory open.
    _idle: Option<watch::Sender<Arc<GpuInventory>>>,
}

#[derive(Debug)]
struct Owner {
    /// Closed to stop the thread.
    stop: mpsc::Sender<()>,
    thread: JoinHandle<()>,
    /// Resolves when the thread has left its work.
    is_done: oneshot::Receiver<()>,
}

impl GpuHandle {
    fn new(
        latest: watch::Receiver<Arc<GpuInventory>>,
        owner: Option<Owner>,
        idle: Option<watch::Sender<Arc<GpuInventory>>>,
    ) -> Self {
        let not_asked = Arc::new(Allocations::none(pod_resources::NOT_ASKED));
        let (allocations, seen) = watch::channel(not_asked);
        let reader = GpuReader { latest, allocations: seen };
        Self { reader, owner, allocations, asking: None, _idle: idle }
    }

    /// A view of the inventory, for as many readers as there are.
    pub fn reader(&self) -> GpuReader {
        self.reader.clone()
    }

    /// Closes NVML and joins the thread. A thread that hangs in the driver for
    /// longer than `patience` is left behind: it ends with the process.
    pub async fn shutdown(mut self, patience: Duration) {
        let Some(Owner { stop, thread, is_done }) = self.owner.take() else { return };
        drop(stop);
        if tokio::time::timeout(patience, is_done).await.is_err() {
            let waited_ms = patience.as_millis();
            warn!(waited_ms, "leave the gpu thread behind: a call into the driver hangs");
        } else if thread.join().is_err() {
            error!("the gpu thread had panicked; its inventory was stale since");
        }
    }
}

impl Drop for GpuHandle {
    fn drop(&mut self) {
        if let Some(asking) = &self.asking {
            asking.abort();
        }
    }
}

/// Reads the inventory; cheap to clone, never waits for the driver or the kubelet.
#[derive(Clone, Debug)]
pub struct GpuReader {
    latest: watch::Receiver<Arc<GpuInventory>>,
    allocations: watch::Receiver<Arc<Allocations>>,
}

impl GpuReader {
    /// The last answer; [`ProviderState::Stale`] if it is too old.
    pub fn current(&self) -> Arc<GpuInventory> {
        let latest = self.latest.borrow().clone();
        self.joined(&latest)
    }

    fn joined(&self, latest: &Arc<GpuInventory>) -> Arc<GpuInventory> {
        let mut inventory = latest.as_of(Instant::now());
        self.allocations.borrow().join(Arc::make_mut(&mut inventory));
        inventory
    }

    /// Waits for an answer that this reader has not seen. Answers come at every
    /// look, whether or not they differ, and when pods come and go; compare
    /// [`generation`](GpuInventory::generation) for changes of shape. Turning
    /// stale is no answer and wakes nobody. After the shutdown it waits for ever.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future loses no answer.
    pub async fn changed(&mut self) -> Arc<GpuInventory> {
        tokio::select! {
            changed = self.latest.changed() => {
                if changed.is_err() {
                    std::future::pending::<()>().await;
                }
            }
            // Its end is that of the other one.
            Ok(()) = self.allocations.changed() => {}
        }
        self.allocations.mark_unchanged();
        let latest = self.latest.borrow_and_update().clone();
        self.joined(&latest)
    }
}
