//! What a child process costs.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use rustix::process::{Pid, WaitId, WaitIdOptions, waitid};

/// How often a running process's memory is looked at; its peak is a high-water mark, so little is missed.
const MEMORY_POLL: Duration = Duration::from_millis(10);

/// One run of one command.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Cost {
    pub(crate) wall_seconds: f64,
    pub(crate) cpu_seconds: f64,
    pub(crate) written_bytes: f64,
    pub(crate) peak_memory_bytes: f64,
}

impl Cost {
    /// Both, one after the other.
    pub(crate) fn then(self, other: Self) -> Self {
        Self {
            wall_seconds: self.wall_seconds + other.wall_seconds,
            cpu_seconds: self.cpu_seconds + other.cpu_seconds,
            written_bytes: self.written_bytes + other.written_bytes,
            peak_memory_bytes: self.peak_memory_bytes.max(other.peak_memory_bytes),
        }
    }
}

/// Runs `command` to its end.
pub(crate) fn run(command: &mut Command) -> anyhow::Result<Cost> {
    run_to(command, Stdio::null())
}

/// As [`run`], with what it says on its standard output sent to `stdout`: no pipe, which nobody
/// would read meanwhile.
pub(crate) fn run_to(command: &mut Command, stdout: Stdio) -> anyhow::Result<Cost> {
    command.stdin(Stdio::null()).stdout(stdout).stderr(Stdio::piped());
    let start = Instant::now();
    let mut child = command.spawn().with_context(|| format!("run {command:?}"))?;
    let pid = Pid::from_child(&child);
    let peak_memory_bytes = std::thread::scope(|scope| {
        let watch = scope.spawn(|| peak_memory(pid));
        // Not reaped yet: its accounts can still be read.
        waitid(WaitId::Pid(pid), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT)?;
        anyhow::Ok(watch.join().unwrap_or_default())
    })?;
    let wall_seconds = start.elapsed().as_secs_f64();
    let (cpu_seconds, written_bytes) = accounts(pid)?;
    reap(&mut child, command)?;
    Ok(Cost { wall_seconds, cpu_seconds, written_bytes, peak_memory_bytes })
}

/// CPU seconds and bytes written so far by a process and its ended threads.
pub(crate) fn accounts(pid: Pid) -> anyhow::Result<(f64, f64)> {
    let folder = format!("/proc/{}", pid.as_raw_nonzero());
    let folder = Path::new(&folder);
    let stat = std::fs::read_to_string(folder.join("stat"))?;
    // The name in parentheses may hold anything; user and system time are fields 14 and 15.
    let fields: Vec<&str> =
        stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_whitespace().collect();
    let ticks: f64 = fields.iter().skip(11).take(2).filter_map(|t| t.parse::<f64>().ok()).sum();
    let io = std::fs::read_to_string(folder.join("io"))?;
    let written = io.lines().find_map(|line| line.strip_prefix("write_bytes: "));
    let written = written.context("no write_bytes in /proc/<pid>/io")?.parse()?;
    Ok((ticks / rustix::param::clock_ticks_per_second() as f64, written))
}

fn reap(child: &mut Child, command: &Command) -> anyhow::Result<()> {
    let mut said = String::new();
    if let Some(stderr) = &mut child.stderr {
        std::io::Read::read_to_string(stderr, &mut said)?;
    }
    let status = child.wait()?;
    ensure!(status.success(), "{command:?}: {status}: {}", said.trim());
    Ok(())
}

fn peak_memory(pid: Pid) -> f64 {
    let mut peak = 0.0;
    while let Ok(bytes) = memory(pid, "VmHWM:") {
        peak = bytes;
        std::thread::sleep(MEMORY_POLL);
    }
    peak
}

/// Resident memory of a process, in bytes.
pub(crate) fn resident(pid: Pid) -> anyhow::Result<f64> {
    memory(pid, "VmRSS:")
}

fn memory(pid: Pid, field: &str) -> anyhow::Result<f64> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", pid.as_raw_nonzero()))?;
    let line = status.lines().find_map(|line| line.strip_prefix(field));
    let kib = line.with_context(|| format!("no {field} in /proc/<pid>/status"))?;
    Ok(kib.trim().trim_end_matches(" kB").parse::<f64>()? * 1024.0)
}
