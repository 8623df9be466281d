//! `carport fuse`: the process that serves streaming volumes, and how the agent starts it.

use std::fs::{self, DirBuilder, File, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::process::Stdio;
use std::sync::Arc;

use anyhow::Context as _;
use carport_csi::stream::{ServeOptions, Starter, serve};
use rustix::process::{Resource, Rlimit};
use tokio::signal::unix::{SignalKind, signal};

use super::open_puller;
use crate::cli::FuseArgs;
use crate::config::Config;
use crate::memory;

pub(super) async fn run(mut config: Config, arguments: &FuseArgs) -> anyhow::Result<()> {
    if arguments.check {
        let folder = config.stream_folder();
        let answer = carport_csi::stream::check(&folder).await;
        return answer.with_context(|| format!("ask the process that serves {}", folder.display()));
    }
    arguments.registry.apply(&mut config);
    if arguments.until_idle {
        // What is done to the agent's group of processes is not for this one. It fails where that is so already.
        let _ = rustix::process::setsid();
        std::env::set_current_dir("/").context("leave the current folder")?;
    }
    let told = told_to_end()?;
    if let Err(error) = raise_open_files() {
        tracing::warn!(%error, "left the limit of open files as it is");
    }
    let options = ServeOptions {
        folder: config.stream_folder(),
        read_timeout: config.stream.read_timeout,
        until_idle: arguments.until_idle,
        pull_grace: config.pull.grace_period,
    };
    let puller = open_puller(&config)?;
    tokio::select! {
        served = serve(puller.clone(), options, told) => Ok(served?),
        never = memory::give_back(&puller) => match never {},
    }
}

/// Starts such a process with this configuration, detached: it goes on when the agent ends. `None` where
/// that is somebody else's to do.
pub(crate) fn starter(config: &Config) -> Option<Starter> {
    let config = config.clone();
    config.stream.start.then(|| -> Starter { Arc::new(move || start(&config)) })
}

fn start(config: &Config) -> io::Result<()> {
    let folder = config.stream_folder();
    DirBuilder::new().recursive(true).mode(0o700).create(&folder)?;
    // As the agent has it, whatever its flags and environment say.
    let yaml = serde_saphyr::to_string(config).map_err(io::Error::other)?;
    let (path, new) = (folder.join("config.yaml"), folder.join(".config.yaml"));
    let mut file =
        File::options().create(true).write(true).truncate(true).mode(0o600).open(&new)?;
    file.set_permissions(Permissions::from_mode(0o600))?;
    file.write_all(yaml.as_bytes())?;
    fs::rename(&new, &path)?;
    let mut command = tokio::process::Command::new(std::env::current_exe()?);
    command.arg("--config").arg(&path).args(["fuse", "--until-idle"]);
    for (name, _) in std::env::vars_os() {
        if name.as_encoded_bytes().starts_with(b"CARPORT_") {
            command.env_remove(name);
        }
    }
    // Dropped without being waited for: the runtime does that.
    command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().map(drop)
}

/// Ends when this process is told to.
pub(super) fn told_to_end() -> anyhow::Result<impl Future<Output = ()>> {
    let on = |kind| signal(kind).context("wait for signals");
    let mut terminate = on(SignalKind::terminate())?;
    let mut interrupt = on(SignalKind::interrupt())?;
    let mut hangup = on(SignalKind::hangup())?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            _ = hangup.recv() => {}
        }
    })
}

/// Each file that a reader has open is one of ours; the usual 1024 is a shell's measure.
pub(super) fn raise_open_files() -> rustix::io::Result<()> {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    rustix::process::setrlimit(Resource::Nofile, raised)
}
