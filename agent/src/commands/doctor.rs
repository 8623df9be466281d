//! `carport doctor`: what this node, its configuration and its registries lack, and what to do.
//!
//! ```text
//! Config ─► node: kernel, clock, store, kubelet, list, GPUs ─┐
//!        ─► sockets: who serves what                         ├─► checks ─► a line each, exit status
//! REF…   ─► registries: credentials, a HEAD request each    ─┘
//! ```
//!
//! Nothing is changed, but for a file that is written into the store and into a snapshot of
//! containerd's, and removed again. It may run beside an agent, in its pod, or on a bare machine.

use std::fmt;

use anyhow::bail;
use carport_image::source::Sources;
use serde::Serialize;

use crate::cli::{DoctorArgs, Output};
use crate::config::Config;
use crate::output::print;

mod clock;
mod node;
mod registries;
mod sockets;

/// How a check ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Level {
    /// As it should be.
    Ok,
    /// It works, with something missing.
    Warn,
    /// Something that is wanted does not work.
    Fail,
}

/// As wide for all, so that they stand in a column.
impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ok => "ok  ",
            Self::Warn => "warn",
            Self::Fail => "fail",
        })
    }
}

/// One thing that was looked at.
#[derive(Debug, Serialize)]
struct Check {
    /// What: a small, fixed set.
    name: &'static str,
    level: Level,
    /// What was seen.
    message: String,
    /// What to do about it; null where nothing is to be done.
    advice: Option<String>,
}

impl Check {
    fn ok(name: &'static str, message: impl Into<String>) -> Self {
        Self { name, level: Level::Ok, message: message.into(), advice: None }
    }

    fn warn(name: &'static str, message: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { name, level: Level::Warn, message: message.into(), advice: Some(advice.into()) }
    }

    fn fail(name: &'static str, message: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { name, level: Level::Fail, message: message.into(), advice: Some(advice.into()) }
    }
}

/// All checks.
#[derive(Debug, Serialize)]
struct Report {
    /// Nothing failed.
    healthy: bool,
    checks: Vec<Check>,
}

pub(super) async fn run(
    output: Output,
    mut config: Config,
    arguments: DoctorArgs,
) -> anyhow::Result<()> {
    arguments.registry.apply(&mut config);
    let mut checks = Vec::new();
    // The file alone was read without an error, else nobody would be here.
    checks.push(match config.check() {
        Ok(()) => Check::ok("configuration", "makes sense"),
        Err(error) => {
            Check::fail("configuration", error.to_string(), "correct it; the agent does not start")
        }
    });
    checks.extend(node::kernel(&config));
    checks.push(clock::look());
    checks.extend(node::store(&config));
    checks.extend(node::runtime(&config).await);
    checks.extend(node::kubelet(&config)?);
    let (agent, more) = sockets::look(&config).await;
    checks.extend(more);
    checks.extend(sockets::http(&config, agent));
    checks.extend(node::list(&config));
    checks.extend(registries::credentials(&config));
    match Sources::new(config.registry_options()) {
        Ok(sources) => {
            for reference in &arguments.references {
                checks.push(registries::reach(&sources, reference, &config).await);
            }
        }
        Err(error) => checks.push(Check::fail(
            "registry",
            error.to_string(),
            "correct the certificates or the proxy that it names",
        )),
    }
    checks.push(node::gpus(&config).await?);

    let healthy = checks.iter().all(|check| check.level != Level::Fail);
    print(output, &Report { healthy, checks }, told)?;
    if !healthy {
        bail!("something is wrong; see above");
    }
    Ok(())
}

fn told(report: &Report) -> String {
    let width = report.checks.iter().map(|check| check.name.len()).max().unwrap_or_default();
    let mut text = String::new();
    for Check { name, level, message, advice } in &report.checks {
        text += &format!("{level}  {name:width$}  {message}\n");
        if let Some(advice) = advice {
            text += &format!("      {:width$}  → {advice}\n", "");
        }
    }
    text
}
