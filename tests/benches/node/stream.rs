//! Reading an image while it arrives over a link of 100 MB/s, and once it has arrived.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Read as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context as _, ensure};
use rustix::fs::Advice;
use rustix::process::Pid;

use crate::measure::accounts;
use crate::model::Model;
use crate::pull::fresh;
use crate::report::{Figure, Report};

const FILES: usize = 2;
const FILE_BYTES: usize = 256 * 1024 * 1024;
const LINK_BYTES_PER_SECOND: f64 = 100e6;
const READ_BYTES: usize = 1024 * 1024;
const RUNS: usize = 5;

/// What is read of the image that arrives.
#[derive(Clone, Copy)]
enum Read {
    OneByte,
    LastFile,
    All,
}

pub(crate) fn run(carport: &Path, report: &mut Report) -> anyhow::Result<()> {
    let Model { registry, folder, reference } = Model::pack(carport, FILES, FILE_BYTES)?;
    let config = folder.path().join("carport.yaml");
    fs::write(&config, "pull:\n  bandwidth: 100MB/s\n")?;
    let (root, target) = (folder.path().join("store"), folder.path().join("mount"));

    let (mut first, mut last_file, mut through) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..RUNS {
        for read in [Read::OneByte, Read::LastFile, Read::All] {
            let start = Instant::now();
            let mut mount = Command::new(carport);
            mount.arg("--config").arg(&config).arg("--root").arg(&root);
            mount.args(["mount", "--stream", "--plain-http", registry.host()]);
            done(mount.arg(&reference).arg(&target))?;
            let shown = target.join("models");
            match read {
                Read::OneByte => {
                    let last = File::open(file(&shown, FILES))?;
                    last.read_exact_at(&mut [0], FILE_BYTES as u64 / 2)?;
                    first.push(start.elapsed().as_secs_f64());
                }
                Read::LastFile => {
                    read_file(&file(&shown, FILES))?;
                    let link = FILE_BYTES as f64 / LINK_BYTES_PER_SECOND;
                    last_file.push(start.elapsed().as_secs_f64() / link);
                }
                Read::All => {
                    for n in 1..=FILES {
                        read_file(&file(&shown, n))?;
                    }
                    let link = (FILES * FILE_BYTES) as f64 / LINK_BYTES_PER_SECOND;
                    through.push(start.elapsed().as_secs_f64() / link);
                }
            }
            done(Command::new(carport).arg("--root").arg(&root).arg("umount").arg(&target))?;
            fresh(&root)?;
        }
    }
    report.add(Figure {
        name: "stream_first_byte_seconds",
        unit: "s",
        values: first,
        peer: None,
        setup: "from the start of `carport mount --stream` to a byte in the middle of the last of two \
                files of 256 MiB, pulling held to 100 MB/s",
    })?;
    report.add(Figure {
        name: "stream_last_file_ratio",
        unit: "s/s",
        values: last_file,
        peer: None,
        setup: "from the start of `carport mount --stream` until the last of the files has been read, and no \
                other, ÷ what its bytes take at 100 MB/s",
    })?;
    report.add(Figure {
        name: "stream_read_through_ratio",
        unit: "s/s",
        values: through,
        peer: None,
        setup: "from the start of `carport mount --stream` until both files have been read, one after \
                the other, ÷ what their bytes take at 100 MB/s",
    })
}

/// Reads what has arrived, through the mount that it arrived under and beside it in the store.
pub(crate) fn local(carport: &Path, report: &mut Report) -> anyhow::Result<()> {
    let Model { registry, folder, reference } = Model::pack(carport, FILES, FILE_BYTES)?;
    let (root, target) = (folder.path().join("store"), folder.path().join("mount"));
    let base = |command: &str| {
        let mut carport = Command::new(carport);
        carport.arg("--root").arg(&root).arg(command);
        carport
    };
    let mut mount = base("mount");
    mount.args(["--stream", "--foreground", "--plain-http", registry.host()]);
    mount.arg(&reference).arg(&target).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut serving = mount.spawn()?;
    // It says so when the mount stands.
    let said = serving.stdout.take().context("no pipe")?;
    BufReader::new(said).read_line(&mut String::new())?;
    // Waits for what the other process brings.
    done(base("pull").args(["--plain-http", registry.host()]).arg(&reference))?;
    let native = stored(&root)?;
    let streamed = file(&target.join("models"), 1);
    let (mut ours, mut theirs, mut cpu) = (Vec::new(), Vec::new(), Vec::new());
    let pids = [Pid::from_child(&serving), rustix::process::getpid()];
    for round in 0..=RUNS {
        // Only what the mount has in the page cache goes: the next read is its first again.
        rustix::fs::fadvise(File::open(&streamed)?, 0, None, Advice::DontNeed)?;
        let before = cpu_seconds(&pids)?;
        let start = Instant::now();
        read_file(&streamed)?;
        let (took, after) = (start.elapsed().as_secs_f64(), cpu_seconds(&pids)?);
        let start = Instant::now();
        read_file(&native)?;
        if round > 0 {
            ours.push(FILE_BYTES as f64 / took);
            theirs.push(FILE_BYTES as f64 / start.elapsed().as_secs_f64());
            cpu.push((after - before) / (FILE_BYTES as f64 / 1e9));
        }
    }
    done(base("umount").arg(&target))?;
    ensure!(serving.wait()?.success(), "the mount's process");
    report.add(Figure {
        name: "stream_local_read_ratio",
        unit: "bytes/s",
        values: ours,
        peer: Some(("native", theirs)),
        setup: "a first read of a file of 256 MiB that has arrived, through the mount, in pieces of 1 MiB; and \
                of the stored file, both in the page cache",
    })?;
    report.add(Figure {
        name: "stream_local_read_cpu_seconds",
        unit: "s/GB",
        values: cpu,
        peer: None,
        setup: "CPU time of the reader and of the mount's process for that read",
    })
}

/// A large file in the store.
fn stored(root: &Path) -> anyhow::Result<PathBuf> {
    for fan in fs::read_dir(root.join("objects"))? {
        for object in fs::read_dir(fan?.path())? {
            let object = object?;
            if object.metadata()?.len() == FILE_BYTES as u64 {
                return Ok(object.path());
            }
        }
    }
    anyhow::bail!("the store has no file of {FILE_BYTES} bytes")
}

fn cpu_seconds(pids: &[Pid]) -> anyhow::Result<f64> {
    pids.iter().map(|pid| Ok(accounts(*pid)?.0)).sum()
}

fn file(folder: &Path, n: usize) -> PathBuf {
    folder.join(format!("model-{n:05}.safetensors"))
}

fn read_file(path: &Path) -> anyhow::Result<()> {
    let (mut file, mut buffer) = (File::open(path)?, vec![0; READ_BYTES]);
    let mut left = FILE_BYTES;
    while left > 0 {
        let count = file.read(&mut buffer)?;
        ensure!(count > 0, "{} ends {left} bytes early", path.display());
        left -= count;
    }
    Ok(())
}

/// Runs it to its end; what it leaves in the background keeps none of its pipes.
fn done(command: &mut Command) -> anyhow::Result<()> {
    let status = command.stdin(Stdio::null()).stdout(Stdio::null()).status()?;
    ensure!(status.success(), "{command:?}: {status}");
    Ok(())
}
