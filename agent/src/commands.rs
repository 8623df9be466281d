//! The subcommands. Each prints through [`crate::output`] and fails with one error that says what,
//! why, and what to do.

use std::fmt;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use carport_image::{Puller, Store};

use crate::cli::{Cli, Command};
use crate::config::{Config, Log};
use crate::{logging, memory, run};

mod ask;
mod cancel;
mod doctor;
mod du;
pub(crate) mod fuse;
mod gpus;
mod images;
mod locate;
mod mount;
mod pack;
mod pins;
mod plan;
mod prefetch;
mod pull;
mod status;
mod verify;
mod watch;

/// How long threads that hang (in a driver, on a dead disk) may hold up the process's end.
const PATIENCE: Duration = Duration::from_secs(2);

/// Several things failed; each is told on a line of its own.
#[derive(Debug)]
struct Failures(Vec<anyhow::Error>);

impl fmt::Display for Failures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, error) in self.0.iter().enumerate() {
            let start = if index == 0 { "" } else { "\ncarport: " };
            write!(f, "{start}{}", told(error))?;
        }
        Ok(())
    }
}

impl std::error::Error for Failures {}

impl Failures {
    /// Fine where nothing failed.
    fn into_result(mut self) -> anyhow::Result<()> {
        match self.0.len() {
            0 => Ok(()),
            1 => Err(self.0.remove(0)),
            _ => Err(self.into()),
        }
    }
}

/// Does what the command line says; 0, or 1 and one line on standard error.
pub fn main(cli: Cli) -> ExitCode {
    match start(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("carport: {}", told(&error));
            ExitCode::FAILURE
        }
    }
}

/// The error and its causes on one line. A cause that an error has told already, as many do
/// whose cause is the system's, is not told again.
fn told(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if !text.contains(&cause) {
            let colon = if text.is_empty() { "" } else { ": " };
            text = text + colon + &cause;
        }
    }
    text
}

fn start(cli: Cli) -> anyhow::Result<()> {
    let mut config = cli.global.load()?;
    if matches!(cli.command, Command::Agent(_) | Command::Fuse(_)) {
        logging::start(&config.log);
    } else {
        // The file speaks of the daemon's logs. A command tells its errors itself, once.
        let level = cli.global.log_level.clone().unwrap_or_else(|| "error".into());
        logging::start(&Log { level, ..config.log.clone() });
    }
    memory::tune();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("start the runtime")?;
    let output = cli.global.output;
    let result = runtime.block_on(async {
        match cli.command {
            Command::Agent(arguments) => {
                arguments.apply(&mut config);
                config.check()?;
                if arguments.print_config {
                    return print_config(output, &config);
                }
                run::run(config).await
            }
            Command::Pull(arguments) => pull::run(output, config, arguments).await,
            Command::Pack(arguments) => pack::run(output, config, arguments).await,
            Command::Ls => images::ls(output, &config),
            Command::Rm { references } => images::rm(output, &config, &references),
            Command::Verify(arguments) => verify::run(output, config, arguments).await,
            Command::Gc => images::gc(output, &config),
            Command::Doctor(arguments) => doctor::run(output, config, arguments).await,
            Command::Plan(arguments) => plan::run(output, config, arguments).await,
            Command::Du => du::run(output, &config),
            Command::Pin(arguments) => pins::pin(output, &config, &arguments),
            Command::Unpin(arguments) => pins::unpin(output, &config, &arguments),
            Command::Pins => pins::list(output, &config),
            Command::Mount(arguments) => mount::mount(&cli.global, config, arguments).await,
            Command::Fuse(arguments) => fuse::run(config, &arguments).await,
            Command::Umount { target } => mount::umount(output, &config, &target),
            Command::Status(remote) => status::run(output, &config, &remote).await,
            Command::Gpus { topo } => gpus::run(output, topo, &config).await,
            Command::Locate(arguments) => locate::run(output, &config, arguments).await,
            Command::Prefetch(arguments) => prefetch::run(output, &config, arguments).await,
            Command::Cancel(arguments) => cancel::run(output, &config, arguments).await,
            Command::Watch { references, once, remote } => {
                watch::run(output, &config, references, once, &remote).await
            }
        }
    });
    runtime.shutdown_timeout(PATIENCE);
    result
}

fn print_config(output: crate::cli::Output, config: &Config) -> anyhow::Result<()> {
    let yaml = serde_saphyr::to_string(config).context("write the configuration")?;
    crate::output::print(output, config, |_| yaml)
}

fn open_store(config: &Config) -> anyhow::Result<Store> {
    Ok(Store::open(&config.root)?.with_limits(config.limits()))
}

fn open_puller(config: &Config) -> anyhow::Result<Puller> {
    config.check()?;
    let sources = config.sources()?;
    let puller = Puller::new(open_store(config)?, sources, config.pull_options());
    puller.set_bandwidth(config.bandwidth());
    Ok(puller)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_is_told_once() {
        let denied = || std::io::Error::from(std::io::ErrorKind::PermissionDenied);
        let path = "/etc/c.yaml".into();
        let unreadable = crate::config::ConfigError::Unreadable { path, source: denied() };
        let text = told(&unreadable.into());
        assert_eq!(text.matches("permission denied").count(), 1, "{text}");
        let wrapped = anyhow::Error::from(denied()).context("open the door");
        assert_eq!(told(&wrapped), "open the door: permission denied");
        let two = Failures(vec![wrapped, anyhow::anyhow!("no key")]);
        assert_eq!(two.to_string(), "open the door: permission denied\ncarport: no key");
    }
}
