//! What every [`GpuProbe`] does, and a probe of a few lines that does it.

use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use super::inventory::{Gpu, Health, HealthState, ProviderState};
use super::owner::Pace;
use super::probe::{GpuProbe, ProbeError, Sample};
use super::start_with;

/// What a probe has before it.
#[derive(Clone, Copy, Debug)]
pub(super) enum Scene {
    /// No library.
    Nothing,
    /// So many healthy GPUs.
    Gpus(u32),
    /// So many, of which the one at the index is lost.
    OneLost { count: u32, lost: u32 },
}

/// Runs the suite. `show` changes what `probe` has before it.
pub(super) fn suite(probe: &mut dyn GpuProbe, show: &dyn Fn(Scene)) {
    show(Scene::Nothing);
    probe.close();
    let error = probe.sample().unwrap_err();
    assert_eq!(error.state, ProviderState::NoLibrary, "{error}");
    assert!(!error.message.is_empty(), "an error says what to do");

    show(Scene::Gpus(0));
    let nothing = probe.sample().expect("what came since is found");
    assert_eq!(nothing.gpus, []);

    show(Scene::Gpus(3));
    probe.close();
    let three = probe.sample().unwrap();
    assert_ne!(three.session, nothing.session, "closing ends a session");
    assert_eq!(three.gpus.iter().map(|gpu| gpu.index).collect::<Vec<_>>(), [0, 1, 2]);
    assert!(three.gpus.iter().all(|gpu| gpu.uuid.is_some() && gpu.health == Health::ok()));
    assert_eq!(probe.sample().unwrap(), three, "the same scene is the same sample");

    show(Scene::OneLost { count: 3, lost: 1 });
    let lost = probe.sample().unwrap();
    assert_eq!(lost.session, three.session, "one gpu's trouble ends no session");
    assert_eq!(lost.gpus.len(), 3);
    assert_eq!(lost.gpus[0], three.gpus[0], "the others are as they were");
    assert_eq!(lost.gpus[2], three.gpus[2], "the others are as they were");
    assert_eq!(lost.gpus[1].index, 1);
    assert_eq!(lost.gpus[1].health.state, HealthState::Lost);
    assert_eq!(lost.gpus[1].health.reasons[0].code, "GPU_LOST");

    probe.close();
    probe.close();
}

/// A probe that says what it is told to.
struct FakeProbe {
    scene: Arc<Mutex<Scene>>,
    open: bool,
    session: u64,
}

impl FakeProbe {
    fn new(scene: Scene) -> (Self, impl Fn(Scene)) {
        let shared = Arc::new(Mutex::new(scene));
        let scene = Arc::clone(&shared);
        let show = move |scene| *shared.lock().unwrap_or_else(PoisonError::into_inner) = scene;
        (Self { scene, open: false, session: 0 }, show)
    }
}

impl GpuProbe for FakeProbe {
    fn sample(&mut self) -> Result<Sample, ProbeError> {
        let scene = *self.scene.lock().unwrap();
        let (count, lost) = match scene {
            Scene::Nothing => {
                self.open = false;
                let message = "no library: install one".into();
                return Err(ProbeError { state: ProviderState::NoLibrary, message });
            }
            Scene::Gpus(count) => (count, None),
            Scene::OneLost { count, lost } => (count, Some(lost)),
        };
        if !self.open {
            self.open = true;
            self.session += 1;
        }
        let gpu = |index| {
            let mut gpu = Gpu::unknown(index);
            if lost == Some(index) {
                gpu.health.add(HealthState::Lost, "GPU_LOST", "lost");
            } else {
                gpu.uuid = Some(format!("GPU-{index}"));
            }
            gpu
        };
        Ok(Sample {
            session: self.session,
            driver_version: Some("1".into()),
            nvml_version: None,
            cuda_driver_version: None,
            gpus: (0..count).map(gpu).collect(),
            links: Vec::new(),
        })
    }

    fn close(&mut self) {
        self.open = false;
    }
}

/// A pace at which a test need not wait.
pub(super) const QUICK: Pace =
    Pace { interval: Duration::from_millis(5), retry_interval: Duration::from_millis(20) };

/// Longer than anything here takes.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);

/// Waits for an answer that is as `wanted` says.
pub(super) async fn wait_for(
    reader: &super::GpuReader,
    wanted: impl Fn(&super::GpuInventory) -> bool,
) -> Arc<super::GpuInventory> {
    let mut latest = reader.latest.clone();
    let found = latest.wait_for(|inventory| wanted(inventory));
    let found = tokio::time::timeout(PATIENCE, found).await.expect("no such answer in time");
    Arc::clone(&found.expect("the owner has gone"))
}

#[test]
fn the_fake_conforms() {
    let (mut probe, show) = FakeProbe::new(Scene::Nothing);
    suite(&mut probe, &show);
}

#[tokio::test]
async fn a_library_that_comes_later_is_found_without_a_restart() {
    let (probe, show) = FakeProbe::new(Scene::Nothing);
    let handle = start_with(probe, QUICK).unwrap();
    let reader = handle.reader();
    let none = wait_for(&reader, |it| it.provider.state == ProviderState::NoLibrary).await;
    assert_eq!(none.provider.message, "no library: install one");
    assert_eq!(none.gpus, []);

    show(Scene::Gpus(2));
    let found = wait_for(&reader, |it| it.provider.state == ProviderState::Ok).await;
    assert_eq!(found.gpus.len(), 2);
    assert_eq!(found.provider.message, "");
    assert!(found.generation > none.generation);

    show(Scene::Gpus(0));
    let empty = wait_for(&reader, |it| it.gpus.iter().all(|gpu| gpu.health.is_sick())).await;
    assert_eq!(empty.gpus.len(), 2, "gpus do not go silently");
    handle.shutdown(PATIENCE).await;
}

#[tokio::test]
async fn a_lost_gpu_keeps_its_name_and_comes_back_after_a_new_start_of_the_library() {
    let (probe, show) = FakeProbe::new(Scene::Gpus(3));
    let handle = start_with(probe, QUICK).unwrap();
    let reader = handle.reader();
    wait_for(&reader, |it| it.gpus.len() == 3).await;

    show(Scene::OneLost { count: 3, lost: 1 });
    let lost = wait_for(&reader, |it| it.gpus[1].health.state == HealthState::Lost).await;
    assert_eq!(lost.provider.state, ProviderState::Ok);
    assert_eq!(lost.gpus[1].uuid.as_deref(), Some("GPU-1"));
    assert_eq!(lost.gpus[0].health, Health::ok());
    assert_eq!(lost.gpus[2].health, Health::ok());

    show(Scene::Gpus(3));
    let well = wait_for(&reader, |it| it.gpus.iter().all(|gpu| gpu.health == Health::ok())).await;
    assert_eq!(well.gpus.len(), 3);
    handle.shutdown(PATIENCE).await;
}

/// Answers once, then hangs until the test lets go.
struct HangingProbe {
    first: FakeProbe,
    answered: bool,
    hangs: mpsc::Sender<()>,
    let_go: mpsc::Receiver<()>,
}

impl GpuProbe for HangingProbe {
    fn sample(&mut self) -> Result<Sample, ProbeError> {
        if self.answered {
            self.hangs.send(()).unwrap();
            let _ = self.let_go.recv();
        }
        self.answered = true;
        self.first.sample()
    }

    fn close(&mut self) {}
}

#[tokio::test]
async fn a_hanging_call_makes_the_answer_stale_and_no_reader_slow() {
    let (hangs, is_hanging) = mpsc::channel();
    let (release, let_go) = mpsc::channel();
    let (first, _show) = FakeProbe::new(Scene::Gpus(1));
    let pace = Pace { interval: Duration::from_millis(5), ..QUICK };
    let probe = HangingProbe { first, answered: false, hangs, let_go };
    let handle = start_with(probe, pace).unwrap();
    let reader = handle.reader();
    wait_for(&reader, |it| it.provider.state == ProviderState::Ok).await;
    tokio::task::spawn_blocking(move || is_hanging.recv_timeout(PATIENCE).unwrap()).await.unwrap();

    let stale = reader.latest.borrow().as_of(Instant::now() + Duration::from_secs(60));
    assert_eq!(stale.provider.state, ProviderState::Stale);
    assert!(stale.provider.message.starts_with("nvml has not answered for 60 s"), "{stale:?}");
    assert_eq!(stale.gpus.len(), 1, "what was known stays");

    let before = Instant::now();
    for _ in 0..1000 {
        reader.current();
    }
    assert!(before.elapsed() < Duration::from_secs(1), "reading waits for nobody");
    handle.shutdown(Duration::ZERO).await;
    drop(release);
}

#[tokio::test]
async fn switched_off_is_said_and_nothing_is_loaded() {
    let options = super::GpuOptions { enabled: false, ..super::GpuOptions::default() };
    let handle = super::start(options).unwrap();
    let inventory = handle.reader().current();
    assert_eq!(inventory.provider.state, ProviderState::Disabled);
    assert_eq!(inventory.provider.message, "switched off by configuration");
    handle.shutdown(PATIENCE).await;
}

/// Has news from the second look on.
struct NewsProbe {
    first: FakeProbe,
    looks: mpsc::Sender<()>,
}

impl GpuProbe for NewsProbe {
    fn sample(&mut self) -> Result<Sample, ProbeError> {
        let _ = self.looks.send(());
        self.first.sample()
    }

    fn has_news(&mut self) -> bool {
        true
    }

    fn close(&mut self) {}
}

#[tokio::test]
async fn news_of_the_driver_do_not_wait_for_the_next_look() {
    let (first, _show) = FakeProbe::new(Scene::Gpus(1));
    let (looks, looked) = mpsc::channel();
    let hour = Duration::from_secs(3600);
    let pace = Pace { interval: hour, retry_interval: hour };
    let handle = start_with(NewsProbe { first, looks }, pace).unwrap();
    for _ in 0..2 {
        looked.recv_timeout(PATIENCE).expect("a look");
    }
    handle.shutdown(PATIENCE).await;
}

/// Tells the order of what is asked of it. Its GPU is sick, and one look fails.
struct WatchedProbe {
    first: FakeProbe,
    looks: u32,
    failing_look: u32,
    calls: mpsc::Sender<&'static str>,
}

impl GpuProbe for WatchedProbe {
    fn sample(&mut self) -> Result<Sample, ProbeError> {
        let _ = self.calls.send("look");
        self.looks += 1;
        if self.looks == self.failing_look {
            return Err(ProbeError { state: ProviderState::Error, message: "odd".into() });
        }
        let mut sample = self.first.sample()?;
        sample.gpus[0].health.add(HealthState::Unhealthy, "GPU_XID_79", "sick");
        Ok(sample)
    }

    fn has_news(&mut self) -> bool {
        let _ = self.calls.send("listen");
        false
    }

    fn close(&mut self) {
        let _ = self.calls.send("close");
    }
}

fn watched(pace: Pace, failing_look: u32) -> (super::GpuHandle, mpsc::Receiver<&'static str>) {
    let (first, _show) = FakeProbe::new(Scene::Gpus(1));
    let (calls, called) = mpsc::channel();
    let handle = start_with(WatchedProbe { first, looks: 0, failing_look, calls }, pace);
    (handle.unwrap(), called)
}

fn heard(called: &mpsc::Receiver<&'static str>, count: usize) -> Vec<&'static str> {
    (0..count).map(|_| called.recv_timeout(PATIENCE).expect("a call")).collect()
}

#[tokio::test]
async fn errors_are_heard_until_the_library_is_opened_afresh() {
    let pace = Pace { interval: Duration::from_millis(1100), retry_interval: Duration::ZERO };
    let (handle, called) = watched(pace, 0);
    assert_eq!(heard(&called, 4), ["look", "listen", "close", "look"]);
    handle.shutdown(PATIENCE).await;
}

#[tokio::test]
async fn one_failure_does_not_hide_the_gpus_for_long() {
    let hour = Duration::from_secs(3600);
    let pace = Pace { interval: Duration::from_millis(1), retry_interval: hour };
    let (handle, called) = watched(pace, 2);
    assert_eq!(heard(&called, 4), ["look", "look", "close", "look"]);
    handle.shutdown(PATIENCE).await;
}

/// Answers once, then panics.
struct PanickingProbe {
    first: FakeProbe,
    answered: bool,
}

impl GpuProbe for PanickingProbe {
    fn sample(&mut self) -> Result<Sample, ProbeError> {
        assert!(!self.answered, "this panic is the test's");
        self.answered = true;
        self.first.sample()
    }

    fn close(&mut self) {}
}

#[tokio::test]
async fn a_panic_in_the_library_costs_the_answers_and_not_the_agent() {
    let (first, _show) = FakeProbe::new(Scene::Gpus(1));
    let handle = start_with(PanickingProbe { first, answered: false }, QUICK).unwrap();
    let reader = handle.reader();
    let mut latest = reader.latest.clone();
    let gone = async { while latest.changed().await.is_ok() {} };
    tokio::time::timeout(PATIENCE, gone).await.expect("the owner goes");

    let later = reader.latest.borrow().as_of(Instant::now() + Duration::from_secs(60));
    assert_eq!(later.provider.state, ProviderState::Stale);
    assert_eq!(later.gpus.len(), 1);
    handle.shutdown(PATIENCE).await;
}
