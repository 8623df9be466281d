//! Reading a published volume beside reading a file that nobody put anywhere; and many pods at once.
#![allow(unsafe_code, reason = "a mapping is a raw system call")]

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context as _, ensure};
use carport_tests::node::{Node, Pod, Setup};
use rustix::fs::Advice;
use rustix::mm::{MapFlags, ProtFlags};

use crate::report::{Figure, Report};

const FILE_BYTES: usize = 512 * 1024 * 1024;
const READ_BYTES: usize = 1024 * 1024;
const VOLUMES: usize = 8;
const PODS: usize = 200;
const RUNS: usize = 7;
/// Of reads from memory, which take a tenth of a second and differ by more than a mount costs.
const HOT_RUNS: usize = 40;

pub(crate) async fn run(carport: &Path, report: &mut Report) -> anyhow::Result<()> {
    let folder = tempfile::Builder::new().prefix("carport-bench").tempdir()?;
    let model = folder.path().join("model");
    fs::create_dir_all(&model)?;
    let native = model.join("weights.bin");
    let mut random = File::open("/dev/urandom")?;
    let mut file = File::create(&native)?;
    std::io::copy(&mut std::io::Read::take(&mut random, FILE_BYTES as u64), &mut file)?;
    file.sync_all()?;
    let layout = format!("oci:{}:v1", folder.path().join("layout").display());
    let packed = Command::new(carport).arg("pack").arg(&model).arg(&layout).output()?;
    ensure!(packed.status.success(), "pack: {}", String::from_utf8_lossy(&packed.stderr));
    let setup = Setup { layout_folders: vec![folder.path().to_owned()], ..Setup::default() };
    let node = Node::set_up(carport, setup).context("run the bench as root")?;
    let pods: Vec<Pod> = (0..VOLUMES).map(|n| node.pod(&format!("pod-{n}"))).collect();
    let mut shown: Vec<PathBuf> = Vec::new();
    for pod in &pods {
        node.publish(pod, &layout).await?;
        shown.push(node.inside(&pod.target).join("models/weights.bin"));
    }

    reads(&shown[0], &native, report)?;
    page_cache(&shown, report)?;
    for pod in &pods {
        node.unpublish(pod).await?;
    }
    at_once(&node, &layout, report).await
}

/// Bytes a second of the volume, and of the file beside it, in turns: who comes second finds the
/// processor's caches and clock as the first left them, so each is the second as often as the other.
fn reads(volume: &Path, native: &Path, report: &mut Report) -> anyhow::Result<()> {
    type Read = fn(&File) -> anyhow::Result<f64>;
    // Cold first: then both files came into the page cache in the same way, by reading.
    let figures: [(&str, Read, usize, &str); 3] = [
        ("read_cold_ratio", cold, RUNS, "one file of 512 MiB, dropped from the page cache before"),
        (
            "read_hot_ratio",
            hot,
            HOT_RUNS,
            "the same file in the page cache, read in pieces of 1 MiB; of CPU time",
        ),
        (
            "mmap_hot_ratio",
            mapped,
            HOT_RUNS,
            "the same file in the page cache, mapped, each cache line; of CPU time",
        ),
    ];
    for (name, read, runs, setup) in figures {
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        // The first round is not counted.
        for round in 0..=runs {
            let (volume, native) = (File::open(volume)?, File::open(native)?);
            let (our, their);
            if round % 2 == 0 {
                (our, their) = (read(&volume)?, read(&native)?);
            } else {
                their = read(&native)?;
                our = read(&volume)?;
            }
            if round > 0 {
                ours.push(our);
                theirs.push(their);
            }
        }
        let peer = Some(("native", theirs));
        report.add(Figure { name, unit: "bytes/s", values: ours, peer, setup })?;
    }
    Ok(())
}

// From memory nothing is waited for, and CPU time is what it takes; the time of day counts what
// others do on the machine, too.

fn hot(file: &File) -> anyhow::Result<f64> {
    read_all(file)?;
    let start = cpu_seconds();
    read_all(file)?;
    Ok(FILE_BYTES as f64 / (cpu_seconds() - start))
}

fn cold(file: &File) -> anyhow::Result<f64> {
    forget(file)?;
    let start = Instant::now();
    read_all(file)?;
    Ok(FILE_BYTES as f64 / start.elapsed().as_secs_f64())
}

/// Of this thread.
fn cpu_seconds() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

fn forget(file: &File) -> anyhow::Result<()> {
    Ok(rustix::fs::fadvise(file, 0, None, Advice::DontNeed)?)
}

fn read_all(file: &File) -> anyhow::Result<()> {
    let (mut buffer, mut at) = (vec![0; READ_BYTES], 0);
    while at < FILE_BYTES as u64 {
        let count = file.read_at(&mut buffer, at)?;
        ensure!(count > 0, "the file ends at {at}");
        at += count as u64;
    }
    Ok(())
}

fn mapped(file: &File) -> anyhow::Result<f64> {
    read_all(file)?;
    let start = cpu_seconds();
    // SAFETY: a fresh mapping at a place that the kernel chooses, of a file that nobody
    // changes or cuts while the bench runs; it is gone after `munmap`, and so is the slice.
    let sum = unsafe {
        let place = std::ptr::null_mut();
        let at = rustix::mm::mmap(place, FILE_BYTES, ProtFlags::READ, MapFlags::SHARED, file, 0)?;
        let bytes = std::slice::from_raw_parts(at.cast::<u8>(), FILE_BYTES);
        let sum = bytes.iter().step_by(64).fold(0_u64, |sum, byte| sum + u64::from(*byte));
        rustix::mm::munmap(at, FILE_BYTES)?;
        sum
    };
    std::hint::black_box(sum);
    Ok(FILE_BYTES as f64 / (cpu_seconds() - start))
}

/// What seven more volumes of the same image add to the page cache, in parts of the image.
fn page_cache(volumes: &[PathBuf], report: &mut Report) -> anyhow::Result<()> {
    let files: Vec<File> = volumes.iter().map(File::open).collect::<Result<_, _>>()?;
    let mut values = Vec::new();
    for _ in 0..RUNS {
        forget(&files[0])?;
        read_all(&files[0])?;
        let one = cached_bytes()?;
        for file in &files[1..] {
            read_all(file)?;
        }
        values.push((cached_bytes()? - one).max(0.0) / FILE_BYTES as f64);
    }
    report.add(Figure {
        name: "page_cache_extra_ratio",
        unit: "bytes/byte",
        values,
        peer: None,
        setup: "growth of the page cache when 7 more volumes of one image of 512 MiB are read",
    })
}

fn cached_bytes() -> anyhow::Result<f64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("Cached:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")).context("no Cached")?;
    Ok(kib.trim().parse::<f64>()? * 1024.0)
}

/// From the first call to the last answer.
async fn at_once(node: &Node, image: &str, report: &mut Report) -> anyhow::Result<()> {
    let pods: Vec<Pod> = (0..PODS).map(|n| node.pod(&format!("at-once-{n}"))).collect();
    let mut values = Vec::new();
    for round in 0..=RUNS {
        let start = Instant::now();
        let published = pods.iter().map(|pod| node.publish(pod, image));
        for answer in futures_util::future::join_all(published).await {
            answer?;
        }
        if round > 0 {
            values.push(start.elapsed().as_secs_f64());
        }
        for pod in &pods {
            node.unpublish(pod).await?;
        }
        print!("\rpublishes at once: round {round} of {RUNS} ");
        std::io::stdout().flush()?;
    }
    println!();
    report.add(Figure {
        name: "publish_at_once_seconds",
        unit: "s",
        values,
        peer: None,
        setup: "200 NodePublishVolume calls of one stored image at once, each on its own connection",
    })
}
