//! Mount namespaces that live as long as a process, which ends when its input does.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use super::Node;

/// A mount namespace, for as long as the value lives.
pub struct Namespace(pub(super) Child);

impl Namespace {
    /// A program of the node in this namespace, to be completed and run.
    pub fn within(&self, node: &Node, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--mount=/proc/{}/ns/mnt", self.0.id())).arg(program);
        command.stdin(Stdio::null());
        node.settings(&mut command);
        command
    }

    /// A path as it is seen there.
    pub fn inside(&self, path: &Path) -> PathBuf {
        seen_by(&self.0, path)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The mount namespace of a machine: nothing of it is seen outside, and inside all mounts are
/// shared, as systemd makes them.
pub(super) fn machine() -> Option<Child> {
    let mut unshare = Command::new("unshare");
    new_namespace(unshare.args(["--propagation", "private"]), "mount --make-rshared /")
}

/// A process that keeps a mount namespace, prepared by a command, until its input ends. Nothing, and
/// a word about it, where none can be made.
pub(super) fn new_namespace(unshare: &mut Command, prepare: &str) -> Option<Child> {
    let namespace = unshare
        .args(["--mount", "sh", "-c"])
        // Says that it is there, then waits for the end of its input.
        .arg(format!("{prepare} && echo ready; read _"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn();
    let mut namespace = match namespace {
        Ok(namespace) => namespace,
        Err(error) => {
            eprintln!("SKIPPED: unshare (util-linux): {error}");
            return None;
        }
    };
    let mut ready = String::new();
    let said = namespace.stdout.take().map(|out| BufReader::new(out).read_line(&mut ready));
    if !matches!(said, Some(Ok(6))) {
        let _ = namespace.wait();
        eprintln!("SKIPPED: no mount namespace can be made: run as root");
        return None;
    }
    Some(namespace)
}

pub(super) fn seen_by(process: &Child, path: &Path) -> PathBuf {
    let relative = path.strip_prefix("/").expect("an absolute path");
    PathBuf::from(format!("/proc/{}/root", process.id())).join(relative)
}
