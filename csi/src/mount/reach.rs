//! Whether a mount that is made here is seen by the process that asked for it.
//!
//! The kubelet and the container runtime see a volume only where they share this mount namespace, or
//! where the mount that the target is on is shared with theirs. An agent in a pod has a namespace of
//! its own, so it needs `mountPropagation: Bidirectional`; one that systemd starts on the host does not.

use std::path::{Path, PathBuf};

use super::{MountError, MountPoint, Mounter};

/// The process for which a volume is made, as far as its mount namespace matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Viewer {
    /// This process.
    Myself,
    /// Another one, by its number.
    Process(u32),
    /// One in another PID namespace. It is outside of this container.
    Hidden,
}

impl Viewer {
    /// The process with this number; none where the kernel does not give one.
    pub fn of(pid: Option<u32>) -> Self {
        match pid {
            None => Self::Hidden,
            Some(pid) if pid == std::process::id() => Self::Myself,
            Some(pid) => Self::Process(pid),
        }
    }

    /// Whether it sees every mount that this thread makes, since it is in the same namespace.
    fn shares_namespace(self) -> bool {
        let namespace = |process: &str| {
            rustix::fs::stat(format!("/proc/{process}/ns/mnt"))
                .map(|stat| (stat.st_dev, stat.st_ino))
        };
        match self {
            Self::Myself => true,
            Self::Hidden => false,
            // One that may not be looked at is as one in another namespace: a mount that is shared
            // reaches both.
            Self::Process(pid) => {
                matches!((namespace(&pid.to_string()), namespace("thread-self")), (Ok(a), Ok(b)) if a == b)
            }
        }
    }
}

/// The mount that keeps what is mounted below it in this mount namespace, where `viewer` does not see
/// what is mounted at `target`.
///
/// # Errors
///
/// When the list of mounts cannot be read.
pub fn hidden_by(
    mounter: &dyn Mounter,
    viewer: Viewer,
    target: &Path,
) -> Result<Option<PathBuf>, MountError> {
    if viewer.shares_namespace() {
        return Ok(None);
    }
    let mounts = mounter.under(Path::new("/"))?;
    let real = super::kernel::real_path(target);
    Ok(match over(&mounts, &real) {
        Some(mount) if mount.shared => None,
        Some(mount) => Some(mount.target.clone()),
        None => Some("/".into()),
    })
}

/// The mount that `path` is on. Of several at one place the last one is seen.
pub fn over<'a>(mounts: &'a [MountPoint], path: &Path) -> Option<&'a MountPoint> {
    mounts
        .iter()
        .filter(|mount| path.starts_with(&mount.target))
        .max_by_key(|mount| mount.target.components().count())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(target: &str, shared: bool) -> MountPoint {
        MountPoint {
            target: target.into(),
            root: "/".into(),
            fs_type: "ext4".into(),
            read_only: false,
            shared,
        }
    }

    #[test]
    fn a_path_is_on_the_nearest_mount_above_it_and_the_last_one_there() {
        let mounts = [
            mount("/", true),
            mount("/var/lib", false),
            mount("/var/lib", true),
            mount("/var/lib/kubelet-other", false),
        ];
        assert!(over(&mounts, Path::new("/var/lib/kubelet/pods")).unwrap().shared);
        assert_eq!(over(&mounts, Path::new("/srv")).unwrap().target, Path::new("/"));
        assert!(over(&mounts[1..], Path::new("/srv")).is_none());
    }

    #[test]
    fn a_process_of_the_same_namespace_sees_all_and_a_hidden_one_only_what_is_shared() {
        assert!(Viewer::of(Some(std::process::id())).shares_namespace());
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        assert!(Viewer::of(Some(child.id())).shares_namespace());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!Viewer::of(None).shares_namespace());
    }
}
