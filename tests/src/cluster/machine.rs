//! The outside of a cluster: its namespaces, cgroups and folder; how to enter it and how to remove it.
//!
//! ```text
//! target/cluster/bin/        the programs, built by tests/cluster/build.sh
//! target/cluster/NAME.lock   flock of the process that makes or removes the cluster NAME
//! target/cluster/NAME/       its folder, $STATE of node.sh
//!     cgroups  holder  made   what `down` needs: written before the first process starts
//!     logs/                  a file for each component
//!     node/                  /var/lib/{kubelet,containerd,carport} and /var/log of the node
//! ```

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use rustix::fs::{FlockOperation, flock};

use super::NODE;
use super::cgroups::Cgroups;
use crate::carport::workspace;

/// How long namespaces, mounts and network may take.
const SETUP_TIMEOUT: Duration = Duration::from_secs(20);

/// Cargo's target folder.
pub fn target() -> PathBuf {
    let named = std::env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into());
    workspace().join(named)
}

/// Where clusters and their programs are: `target/cluster`.
pub fn folder() -> PathBuf {
    target().join("cluster")
}

/// The machine that a cluster runs on, made of namespaces.
#[derive(Debug)]
pub struct Machine {
    state: PathBuf,
    cgroups: Cgroups,
    holder: i32,
    /// Keeps other processes from making or removing a cluster of this name.
    _lock: File,
}

impl Machine {
    /// Makes the cluster `name`'s machine; removes a leftover of the same name first.
    ///
    /// # Errors
    ///
    /// When another process uses that name, or something cannot be made.
    pub fn make(name: &str) -> anyhow::Result<Self> {
        if let Some(leftover) = Self::open(name)? {
            eprintln!("cluster: removing a cluster that an earlier run has left");
            leftover.remove()?;
        }
        let lock = lock(name)?;
        let state = folder().join(name);
        fs::create_dir_all(state.join("logs"))?;
        super::config::write(&state)?;
        // The name depends on the path, so that two checkouts can run clusters on one machine.
        let id = carport_image::Digest::of(state.as_os_str().as_encoded_bytes());
        let cgroups = Cgroups::make(&format!("carport-cluster-{}", &id.hex()[..8]))?;
        fs::write(state.join("cgroups"), cgroups.to_text())?;
        // Orphaned container processes become children of this process, which can wait for them; init might be slow.
        let _ = rustix::process::set_child_subreaper(Some(rustix::process::getpid()));

        let log = File::create(state.join("logs/machine.log"))?;
        let mut holder = joining(&cgroups.roots());
        holder.args(["unshare", "-m", "-n", "-u", "-i", "-C", "--propagation", "unchanged"]);
        holder.arg(workspace().join("tests/cluster/node.sh")).arg(&state);
        let binary = std::env::current_exe()?;
        let beside = binary.parent().context("a program in a folder")?;
        holder.args([workspace(), beside, &folder().join("bin")]);
        holder.env("CGROUPS", cgroups.hierarchies()).env("NODE", NODE);
        let mut holder = holder.stdout(log.try_clone()?).stderr(log).spawn()?;
        let pid = i32::try_from(holder.id())?;
        fs::write(state.join("holder"), pid.to_string())?;
        let made = Self { state, cgroups, holder: pid, _lock: lock };

        let deadline = Instant::now() + SETUP_TIMEOUT;
        while !made.state.join("ready").exists() {
            let ended = holder.try_wait()?;
            if ended.is_some() || Instant::now() > deadline {
                let log = fs::read_to_string(made.state.join("logs/machine.log"))?;
                let _ = made.remove();
                bail!("tests/cluster/node.sh did not make the node ({ended:?}):\n{log}");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        fs::write(made.state.join("made"), made.namespaces().join("\n"))?;
        Ok(made)
    }

    /// The cluster `name`, if there is one, or what is left of it.
    ///
    /// # Errors
    ///
    /// When another process uses that name.
    pub fn open(name: &str) -> anyhow::Result<Option<Self>> {
        let lock = lock(name)?;
        let state = folder().join(name);
        let Ok(cgroups) = fs::read_to_string(state.join("cgroups")) else {
            if state.exists() {
                fs::remove_dir_all(&state)?;
            }
            return Ok(None);
        };
        let holder = fs::read_to_string(state.join("holder")).unwrap_or_default();
        let holder = holder.parse().unwrap_or(0);
        Ok(Some(Self { state, cgroups: Cgroups::parse(&cgroups), holder, _lock: lock }))
    }

    /// Its folder.
    pub fn state(&self) -> &Path {
        &self.state
    }

    /// A program that runs inside, to be completed.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = joining(&self.cgroups.joins());
        command.args([
            "nsenter",
            "-t",
            &self.holder.to_string(),
            "-m",
            "-n",
            "-u",
            "-i",
            "-C",
            "--",
        ]);
        command.arg(program);
        super::environment(&mut command, &self.state);
        command
    }

    /// Whether its node runs.
    pub fn runs(&self) -> bool {
        self.cgroups.processes().contains(&self.holder)
    }

    /// `KIND:[NUMBER]` of the namespaces that were made for it.
    fn namespaces(&self) -> Vec<String> {
        ["mnt", "net", "uts", "ipc", "cgroup"]
            .iter()
            .filter_map(|kind| fs::read_link(format!("/proc/{}/ns/{kind}", self.holder)).ok())
            .map(|link| link.display().to_string())
            .collect()
    }

    /// Kills all of it and removes what it was made of.
    ///
    /// # Errors
    ///
    /// When a process, cgroup, mount, namespace or file is left.
    pub fn remove(self) -> anyhow::Result<()> {
        let namespaces = fs::read_to_string(self.state.join("made")).unwrap_or_default();
        let inside = held_namespaces();
        self.cgroups.remove()?;
        // The mounts below it disappeared with the mount namespace.
        fs::remove_dir_all(&self.state).with_context(|| self.state.display().to_string())?;
        super::cgroups::reap();
        // The kernel reuses the numbers: a process that was not in the namespace before is in another one.
        let held: Vec<_> = held_namespaces()
            .into_iter()
            .filter(|held| namespaces.lines().any(|ours| ours == held.0) && inside.contains(held))
            .collect();
        ensure!(
            held.is_empty(),
            "namespaces that are still in use, and by which process: {held:?}"
        );
        let mounts = fs::read_to_string("/proc/self/mountinfo")?;
        let state = self.state.display().to_string();
        let left: Vec<_> = mounts.lines().filter(|line| line.contains(&state)).collect();
        ensure!(left.is_empty(), "mounts that stayed: {left:?}");
        Ok(())
    }
}

/// A shell that joins these cgroups and becomes the program that is given as arguments.
fn joining(files: &[PathBuf]) -> Command {
    let joins: String =
        files.iter().map(|file| format!("echo $$ >'{}' || exit 125\n", file.display())).collect();
    let mut command = Command::new("sh");
    command.args(["-c", &format!("{joins}exec \"$@\""), "sh"]).stdin(Stdio::null());
    command
}

fn lock(name: &str) -> anyhow::Result<File> {
    fs::create_dir_all(folder())?;
    let path = folder().join(format!("{name}.lock"));
    let file = File::create(&path)?;
    flock(&file, FlockOperation::NonBlockingLockExclusive)
        .with_context(|| format!("{}: another process uses this cluster", path.display()))?;
    Ok(file)
}

/// Each namespace that a process of this machine is in, and that process.
fn held_namespaces() -> BTreeSet<(String, String)> {
    let Ok(processes) = fs::read_dir("/proc") else { return BTreeSet::new() };
    processes
        .filter_map(Result::ok)
        .filter(|entry| entry.file_name().as_encoded_bytes().iter().all(u8::is_ascii_digit))
        .flat_map(|entry| {
            let pid = entry.file_name().display().to_string();
            let links = fs::read_dir(entry.path().join("ns")).into_iter().flatten();
            links
                .filter_map(Result::ok)
                .filter_map(|link| fs::read_link(link.path()).ok())
                .map(move |link| (link.display().to_string(), pid.clone()))
                .collect::<Vec<_>>()
        })
        .collect()
}
