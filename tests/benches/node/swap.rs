//! Turning a running pod native, while it opens and reads as fast as it can.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Read as _};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use anyhow::{Context as _, ensure};
use carport_csi::fuse::FuseMount;
use carport_csi::mount::native::{Turned, turn};
use carport_csi::mount::{Device, Tree};
use rustix::mount::UnmountFlags;

use crate::report::{Figure, Report};

/// Tells this program that it is a pod, and which file it reads.
const POD: &str = "CARPORT_BENCH_POD";

const RUNS: usize = 20;
const OPENERS: usize = 2;
/// The pod is at work before it is turned, and goes on after it.
const OPENS_AROUND: u64 = 500;

pub(crate) fn run(report: &mut Report) -> anyhow::Result<()> {
    let folder = tempfile::Builder::new().prefix("carport-bench").tempdir()?;
    let (rootfs, target) = (folder.path().join("rootfs"), folder.path().join("mount"));
    fs::create_dir_all(rootfs.join("models"))?;
    fs::create_dir(&target)?;
    fs::write(rootfs.join("models/weights"), vec![1; 1 << 20])?;
    let (mut seconds, mut failed, mut opens) = (Vec::new(), 0, 0);
    for _ in 0..RUNS {
        let tree = Tree { rootfs: rootfs.clone(), path: None };
        let session = FuseMount::mount(&tree, &target).context("run the bench as root")?;
        let device = Device::mounted_at(&target)?.context("nothing is mounted")?;
        let result = turn_under_load(device, &rootfs, &target);
        // What is there by now is the kernel's mount.
        rustix::mount::unmount(&target, UnmountFlags::DETACH)?;
        drop(session);
        let (turned, new_opens, new_failed) = result?;
        // Here and in the pod; other processes may have made copies meanwhile.
        ensure!(turned.remaining.is_empty() && turned.turned.len() >= 2, "{turned:?}");
        seconds.extend(turned.turned.iter().map(|mount| mount.took.as_secs_f64()));
        opens += new_opens;
        failed += new_failed;
    }
    println!("{opens} opens while {RUNS} pods were turned native");
    report.add(Figure {
        name: "stream_swap_failed_opens",
        unit: "opens",
        values: vec![failed as f64],
        peer: None,
        setup: "open and read by two threads of a pod in a mount namespace of its own, turned native \
                20 times, all opens",
    })?;
    report.add(Figure {
        name: "stream_swap_seconds_p50",
        unit: "s",
        values: seconds,
        peer: None,
        setup: "from the kernel mount beneath to the end of the FUSE mount, at the host's target and \
                in the pod's namespace, the same",
    })
}

/// Answers what was turned, how many opens there were, and how many failed.
fn turn_under_load(
    device: Device,
    rootfs: &Path,
    target: &Path,
) -> anyhow::Result<(Turned, u64, u64)> {
    // Another process than the server: one that waits for itself cannot be killed.
    let mut pod = Command::new("unshare")
        .args(["--mount", "--propagation", "private"])
        .arg(std::env::current_exe()?)
        .env(POD, target.join("models/weights"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("start a pod")?;
    let mut lines = BufReader::new(pod.stdout.take().context("no pipe")?).lines();
    let started = lines.next().context("the pod ended at once")??;
    ensure!(started == "ready", "the pod says {started}");
    let turned = turn(device, rootfs);
    drop(pod.stdin.take());
    let counts = lines.next().context("the pod ended early")??;
    ensure!(pod.wait()?.success(), "the pod failed");
    let (opens, failed) = counts.split_once(' ').context("no counts")?;
    Ok((turned?, opens.parse()?, failed.parse()?))
}

/// The file that this process reads, where it is a pod.
pub(crate) fn pod() -> Option<OsString> {
    std::env::var_os(POD)
}

/// Opens and reads `file` until its input ends; says how often, and how often that failed.
pub(crate) fn run_pod(file: &Path) -> anyhow::Result<()> {
    let (opens, failed, stop) = (AtomicU64::new(0), AtomicU64::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        for _ in 0..OPENERS {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let mut bytes = [0; 4096];
                    let read =
                        File::open(file).and_then(|file| file.read_exact_at(&mut bytes, 8192));
                    let wrong = read.is_err() || bytes != [1; 4096];
                    failed.fetch_add(u64::from(wrong), Ordering::Relaxed);
                    opens.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let more = || {
            let goal = opens.load(Ordering::Relaxed) + OPENS_AROUND;
            while opens.load(Ordering::Relaxed) < goal {
                std::thread::yield_now();
            }
        };
        more();
        println!("ready");
        let ended = std::io::stdin().read_to_end(&mut Vec::new());
        more();
        stop.store(true, Ordering::Relaxed);
        ended
    })?;
    println!("{} {}", opens.into_inner(), failed.into_inner());
    Ok(())
}
