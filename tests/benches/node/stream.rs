//! Reading an image while it arrives over a link of 100 MB/s.

use std::fs::{self, File};
use std::io::Read as _;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context as _, ensure};
use carport_tests::registry::Registry;

use crate::pull::{fresh, write_model};
use crate::report::{Figure, Report};

const FILES: usize = 2;
const FILE_BYTES: usize = 256 * 1024 * 1024;
const LINK_BYTES_PER_SECOND: f64 = 100e6;
const READ_BYTES: usize = 1024 * 1024;
const RUNS: usize = 5;

pub(crate) fn run(carport: &Path, report: &mut Report) -> anyhow::Result<()> {
    let registry =
        Registry::start().context("docker-registry is not installed: run `make setup`")?;
    let folder = tempfile::Builder::new().prefix("carport-bench").tempdir()?;
    let model = folder.path().join("model");
    write_model(&model, FILES, FILE_BYTES)?;
    let reference = format!("{}/bench/stream:v1", registry.host());
    let mut pack = Command::new(carport);
    pack.args(["pack", "--plain-http", registry.host()]).arg(&model).arg(&reference);
    done(&mut pack)?;
    fs::remove_dir_all(&model)?;
    let config = folder.path().join("carport.yaml");
    fs::write(&config, "pull:\n  bandwidth: 100MB/s\n")?;
    let (root, target) = (folder.path().join("store"), folder.path().join("mount"));

    let (mut first, mut through) = (Vec::new(), Vec::new());
    for _ in 0..RUNS {
        for all in [false, true] {
            let start = Instant::now();
            let mut mount = Command::new(carport);
            mount.arg("--config").arg(&config).arg("--root").arg(&root);
            mount.args(["mount", "--stream", "--plain-http", registry.host()]);
            done(mount.arg(&reference).arg(&target))?;
            let shown = target.join("models");
            if all {
                read_through(&shown)?;
                let link = (FILES * FILE_BYTES) as f64 / LINK_BYTES_PER_SECOND;
                through.push(start.elapsed().as_secs_f64() / link);
            } else {
                let last = File::open(shown.join(format!("model-{FILES:05}.safetensors")))?;
                last.read_exact_at(&mut [0], FILE_BYTES as u64 / 2)?;
                first.push(start.elapsed().as_secs_f64());
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
        name: "stream_read_through_ratio",
        unit: "s/s",
        values: through,
        peer: None,
        setup: "from the start of `carport mount --stream` until both files have been read, one after \
                the other, ÷ what their bytes take at 100 MB/s",
    })
}

fn read_through(folder: &Path) -> anyhow::Result<()> {
    let mut buffer = vec![0; READ_BYTES];
    for n in 1..=FILES {
        let mut file = File::open(folder.join(format!("model-{n:05}.safetensors")))?;
        let mut left = FILE_BYTES;
        while left > 0 {
            let count = file.read(&mut buffer)?;
            ensure!(count > 0, "file {n} ends {left} bytes early");
            left -= count;
        }
    }
    Ok(())
}

/// Runs it to its end; what it leaves in the background keeps none of its pipes.
fn done(command: &mut Command) -> anyhow::Result<()> {
    let status = command.stdin(Stdio::null()).stdout(Stdio::null()).status()?;
    ensure!(status.success(), "{command:?}: {status}");
    Ok(())
}
