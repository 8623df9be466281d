//! Runs one program inside a machine with a time limit, and collects the logs of the components.

use std::fs;
use std::path::Path;
use std::process::ExitStatus;
use std::time::Duration;

use anyhow::bail;

use super::Machine;

/// Lines of each component's log that are shown.
const LOG_LINES: usize = 25;

/// Runs this program again with these arguments, inside.
///
/// # Errors
///
/// When it cannot be started, does not exit within `limit`, or this process gets SIGINT or SIGTERM. The caller removes
/// the machine.
pub async fn run(
    machine: &Machine,
    arguments: &[&str],
    limit: Duration,
) -> anyhow::Result<ExitStatus> {
    let mut command = machine.command(std::env::current_exe()?);
    command.args(arguments);
    let mut child = tokio::process::Command::from(command).spawn()?;
    let mut terminated = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    tokio::select! {
        status = child.wait() => Ok(status?),
        () = tokio::time::sleep(limit) => bail!("no end within {limit:?}"),
        _ = tokio::signal::ctrl_c() => bail!("interrupted"),
        _ = terminated.recv() => bail!("terminated"),
    }
}

/// The last lines of each component's log.
pub fn logs(state: &Path) -> String {
    let Ok(logs) = fs::read_dir(state.join("logs")) else { return String::new() };
    let mut paths: Vec<_> = logs.filter_map(Result::ok).map(|entry| entry.path()).collect();
    paths.sort();
    let mut text = String::new();
    for path in paths {
        let Ok(log) = fs::read(&path) else { continue };
        let log = String::from_utf8_lossy(&log);
        let lines: Vec<_> = log.lines().collect();
        let name = path.file_name().unwrap_or_default().display();
        text.push_str(&format!("==> {name}: the last of {} lines\n", lines.len()));
        for line in &lines[lines.len().saturating_sub(LOG_LINES)..] {
            let end = line.char_indices().nth(600).map_or(line.len(), |(at, _)| at);
            text.push_str(&line[..end]);
            text.push('\n');
        }
    }
    text
}
