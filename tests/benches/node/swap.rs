//! Turning a running pod native, while it opens and reads as fast as it can.
#![allow(unsafe_code, reason = "a mount namespace of its own is a raw system call")]

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::{Child, Command};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;

use anyhow::{Context as _, ensure};
use carport_csi::fuse::FuseMount;
use carport_csi::mount::native::{Turned, turn};
use carport_csi::mount::{Device, Tree};
use rustix::mount::{MountPropagationFlags, UnmountFlags};
use rustix::thread::UnshareFlags;

use crate::report::{Figure, Report};

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
    let (opens, failed, stop) = (AtomicU64::new(0), AtomicU64::new(0), AtomicBool::new(false));
    let turned = std::thread::scope(|scope| {
        let (ready, pod) = mpsc::channel();
        scope.spawn(|| {
            let ready = ready;
            let started = enter_pod();
            let is_up = started.is_ok();
            // The other side waits for it.
            let _ = ready.send(started);
            std::thread::scope(|scope| {
                for _ in 0..if is_up { OPENERS } else { 0 } {
                    scope.spawn(|| {
                        while !stop.load(Ordering::Relaxed) {
                            let mut bytes = [0; 4096];
                            let read = File::open(target.join("models/weights"))
                                .and_then(|file| file.read_exact_at(&mut bytes, 8192));
                            let wrong = read.is_err() || bytes != [1; 4096];
                            failed.fetch_add(u64::from(wrong), Ordering::Relaxed);
                            opens.fetch_add(1, Ordering::Relaxed);
                        }
                    });
                }
            });
        });
        let mut pod = pod.recv().context("the pod's thread has gone")??;
        let more = || {
            let goal = opens.load(Ordering::Relaxed) + OPENS_AROUND;
            while opens.load(Ordering::Relaxed) < goal {
                std::thread::yield_now();
            }
        };
        more();
        let turned = turn(device, rootfs);
        more();
        stop.store(true, Ordering::Relaxed);
        pod.kill()?;
        pod.wait()?;
        anyhow::Ok(turned?)
    })?;
    Ok((turned, opens.into_inner(), failed.into_inner()))
}

/// Gives the calling thread a pod's mounts: copies, on which nothing that happens outside has an
/// effect. A process shows that they are there.
fn enter_pod() -> anyhow::Result<Child> {
    // SAFETY: descriptors stay shared; only the mounts of this thread, and of those that it
    // starts, are its own.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS)? };
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", private)?;
    Command::new("sleep").arg("600").spawn().context("start a process in the pod")
}
