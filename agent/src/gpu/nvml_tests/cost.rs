//! What looking costs. The figures are printed: `cargo test -p carport-agent gpu::nvml_tests::cost
//! -- --nocapture`.

use std::time::Instant;

use super::*;

/// How many cycles of losing a GPU and finding it again.
const CYCLES: u32 = 10_000;

pub(super) fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// CPU time of this thread.
pub(super) fn cpu() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.try_into().unwrap(), time.tv_nsec.try_into().unwrap())
}

#[test]
fn a_look_at_eight_gpus_takes_milliseconds() {
    let fake = FakeNvml::new(&Scenario::h100s(8));
    let mut probe = probe(&fake, Path::new("/nonexistent"));
    let began = Instant::now();
    probe.sample().unwrap();
    let first = began.elapsed();
    let (began, cpu_before) = (Instant::now(), cpu());
    const LOOKS: u32 = 60;
    for _ in 0..LOOKS {
        probe.sample().unwrap();
    }
    let (each, each_cpu) = (began.elapsed() / LOOKS, (cpu() - cpu_before) / LOOKS);
    let share = each_cpu.as_secs_f64() / 10.0 * 100.0;
    println!(
        "8 fake GPUs: first look {first:.2?} with loading, then {each:.2?} ({each_cpu:.2?} CPU, \
         {share:.3} % of a core at one look in 10 s)"
    );
    assert!(first < Duration::from_millis(250), "{first:?} with loading");
    assert!(each < Duration::from_millis(50), "{each:?}");
    // Of a core, at the usual pace.
    assert!(share < 0.2, "{share} %");
}

/// A figure of this process, in KiB or pieces.
fn status(name: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}

#[test]
fn ten_thousand_losses_leave_nothing_behind() {
    let well = Scenario::h100s(2);
    let mut lost = Scenario::h100s(2);
    lost.devices[1] = Device::h100(1).failing("*", code::GPU_IS_LOST);
    let fake = FakeNvml::new(&well);
    let mut probe = probe(&fake, Path::new("/nonexistent"));
    let mut history = super::super::history::History::default();
    let mut cycle = |probe: &mut NvmlProbe| {
        fake.set(&lost);
        let (gpus, _) = history.add(probe.sample().unwrap());
        assert_eq!(gpus[1].health.state, HealthState::Lost);
        // As the owner does for a sick one.
        probe.close();
        fake.set(&well);
        let (gpus, _) = history.add(probe.sample().unwrap());
        assert_eq!((gpus.len(), &gpus[1].health), (2, &Health::ok()));
    };
    let figures = || (descriptors(), status("Threads"), status("VmRSS"));
    // What is allocated once is, by then.
    for _ in 0..100 {
        cycle(&mut probe);
    }
    let (before, began) = (figures(), Instant::now());
    for _ in 0..CYCLES {
        cycle(&mut probe);
    }
    let (took, after) = (began.elapsed(), figures());
    println!(
        "{CYCLES} cycles in {took:.1?}: (descriptors, threads, KiB of memory) {before:?} before, \
         {after:?} after"
    );
    // Other tests of this process open and close their own meanwhile; a leak would be of
    // thousands, and of memory of more than a page a cycle.
    assert!(after.0 < before.0 + 1_000 && after.1 < before.1 + 1_000, "{before:?}, {after:?}");
    assert!(after.2 < before.2 + 400_000, "{before:?}, {after:?}");
}
