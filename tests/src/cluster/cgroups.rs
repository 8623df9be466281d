//! The control groups of a cluster: one group below the caller's in every cgroup v1 hierarchy, or one of
//! the unified hierarchy.
//!
//! Every process of the cluster is in them, containers included, so a cluster is stopped by killing what they list.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};

/// How long killed processes may take to exit.
const KILL_TIMEOUT: Duration = Duration::from_secs(20);

/// The groups of one cluster.
#[derive(Debug, Clone)]
pub(super) struct Cgroups {
    /// Absolute, as this machine's mounts show them.
    folders: Vec<PathBuf>,
    /// What `node.sh` mounts: `memory`, `cpu,cpuacct`, `name=systemd` …; `v2` alone for the unified hierarchy.
    hierarchies: Vec<String>,
}

impl Cgroups {
    /// Makes an empty group `name` in every hierarchy.
    ///
    /// # Errors
    ///
    /// When a hierarchy is not mounted, or the group cannot be made.
    pub(super) fn make(name: &str) -> anyhow::Result<Self> {
        let own = fs::read_to_string("/proc/self/cgroup")?;
        let mounts = fs::read_to_string("/proc/self/mountinfo")?;
        let v1: Vec<(&str, &str)> = own
            .lines()
            .filter_map(|line| {
                let (_, rest) = line.split_once(':')?;
                rest.split_once(':').filter(|(controllers, _)| !controllers.is_empty())
            })
            .collect();
        if v1.iter().any(|(controllers, _)| controllers.split(',').any(|one| one == "memory")) {
            return Self::make_v1(name, &v1, &mounts);
        }
        Self::make_v2(name, &mounts)
    }

    fn make_v1(name: &str, own: &[(&str, &str)], mounts: &str) -> anyhow::Result<Self> {
        let mut made = Self { folders: Vec::new(), hierarchies: Vec::new() };
        for (controllers, path) in own {
            let (root, mounted) = mount_point(mounts, "cgroup", controllers)
                .with_context(|| format!("the cgroup v1 hierarchy {controllers} is not mounted"))?;
            let below = Path::new(path)
                .strip_prefix(&root)
                .with_context(|| format!("own cgroup {path} of {controllers} is not visible"))?;
            let parent = mounted.join(below);
            let folder = parent.join(name);
            fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
            if controllers.split(',').any(|one| one == "cpuset") {
                // These are empty in a new group, and no process can join a group without them.
                for file in ["cpuset.cpus", "cpuset.mems"] {
                    fs::copy(parent.join(file), folder.join(file))
                        .map(drop)
                        .or_else(|_| fs::write(folder.join(file), fs::read(parent.join(file))?))?;
                }
            }
            made.folders.push(folder);
            made.hierarchies.push((*controllers).to_owned());
        }
        Ok(made)
    }

    /// At the top: only there may a group have both processes and children with controllers.
    fn make_v2(name: &str, mounts: &str) -> anyhow::Result<Self> {
        let (_, top) = mount_point(mounts, "cgroup2", "").context("no cgroups are mounted")?;
        let offered = fs::read_to_string(top.join("cgroup.controllers"))?;
        for needed in ["cpu", "cpuset", "io", "memory", "pids"] {
            ensure!(
                offered.split_whitespace().any(|one| one == needed),
                "the cgroup v2 hierarchy {} has no controller {needed}, which the kubelet needs",
                top.display()
            );
            fs::write(top.join("cgroup.subtree_control"), format!("+{needed}")).with_context(
                || format!("{}: enable {needed} for children; in a container, run it with --cgroupns=host", top.display()),
            )?;
        }
        let folder = top.join(name);
        fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
        Ok(Self { folders: vec![folder], hierarchies: vec!["v2".to_owned()] })
    }

    /// What [`Cgroups::parse`] reads.
    pub(super) fn to_text(&self) -> String {
        let lines = self.folders.iter().zip(&self.hierarchies);
        lines.map(|(folder, name)| format!("{name} {}\n", folder.display())).collect()
    }

    /// The groups that [`Cgroups::to_text`] wrote down.
    pub(super) fn parse(text: &str) -> Self {
        let (hierarchies, folders) = text
            .lines()
            .filter_map(|line| line.split_once(' '))
            .map(|(name, folder)| (name.to_owned(), PathBuf::from(folder)))
            .unzip();
        Self { folders, hierarchies }
    }

    /// For `node.sh`.
    pub(super) fn hierarchies(&self) -> String {
        self.hierarchies.join(" ")
    }

    fn is_v2(&self) -> bool {
        self.hierarchies == ["v2"]
    }

    /// The files through which a process joins before the cgroup namespace is made.
    pub(super) fn roots(&self) -> Vec<PathBuf> {
        self.folders.iter().map(|folder| folder.join("cgroup.procs")).collect()
    }

    /// The files through which a process joins a node that runs.
    pub(super) fn joins(&self) -> Vec<PathBuf> {
        if self.is_v2() {
            return self.folders.iter().map(|folder| folder.join("node/cgroup.procs")).collect();
        }
        self.roots()
    }

    /// Every process in the groups and below.
    pub(super) fn processes(&self) -> BTreeSet<i32> {
        let folders = self
            .folders
            .iter()
            .flat_map(|folder| walkdir::WalkDir::new(folder).into_iter().filter_map(Result::ok));
        folders
            .filter(|entry| entry.file_type().is_dir())
            .filter_map(|entry| fs::read_to_string(entry.path().join("cgroup.procs")).ok())
            .flat_map(|text| text.lines().filter_map(|line| line.parse().ok()).collect::<Vec<_>>())
            .collect()
    }

    /// Kills every process in them, and removes them.
    ///
    /// # Errors
    ///
    /// When a process does not exit or a group cannot be removed; the error names it.
    pub(super) fn remove(&self) -> anyhow::Result<()> {
        let deadline = Instant::now() + KILL_TIMEOUT;
        loop {
            let left = self.processes();
            for pid in left.iter().filter_map(|pid| Pid::from_raw(*pid)) {
                let _ = kill_process(pid, Signal::KILL);
            }
            reap();
            if left.is_empty() && self.remove_folders().is_ok() {
                return Ok(());
            }
            if Instant::now() > deadline {
                let names = left.iter().map(|pid| {
                    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
                    format!("{pid} {}", name.trim())
                });
                let names: Vec<_> = names.collect();
                let folders = self
                    .remove_folders()
                    .map_or_else(|error| error.to_string(), |()| String::new());
                bail!(
                    "processes that cannot be killed: {names:?}; cgroups that cannot be removed: {folders}"
                );
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn remove_folders(&self) -> anyhow::Result<()> {
        for folder in self.folders.iter().filter(|folder| folder.exists()) {
            for entry in walkdir::WalkDir::new(folder).contents_first(true) {
                let entry = entry?;
                if entry.file_type().is_dir() {
                    fs::remove_dir(entry.path())
                        .with_context(|| entry.path().display().to_string())?;
                }
            }
        }
        Ok(())
    }
}

/// Waits for children that have exited. machine.rs makes this process the subreaper of the cluster's orphans.
pub(super) fn reap() {
    while let Ok(Some(_)) = waitpid(None, WaitOptions::NOHANG) {}
}

/// Root and mount point of the first mount of this type that has all these controllers in its options.
fn mount_point(mounts: &str, kind: &str, controllers: &str) -> Option<(PathBuf, PathBuf)> {
    mounts.lines().find_map(|line| {
        let (place, source) = line.split_once(" - ")?;
        let mut source = source.split(' ');
        let (found, options) = (source.next()?, source.nth(1)?);
        let has = |wanted: &str| options.split(',').any(|option| option == wanted);
        if found != kind || !controllers.split(',').all(|one| one.is_empty() || has(one)) {
            return None;
        }
        let mut place = place.split(' ').skip(3);
        Some((place.next()?.into(), place.next()?.into()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hierarchy_is_found_by_its_controllers() {
        let mounts = "\
            30 25 0:26 / /sys/fs/cgroup/cpu rw,relatime shared:9 - cgroup cgroup rw,cpu\n\
            31 25 0:27 /docker/1 /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n\
            32 25 0:28 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd\n\
            33 25 0:29 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw,nsdelegate\n";
        let found = |kind, controllers| mount_point(mounts, kind, controllers);
        let pair = |root: &str, at: &str| Some((PathBuf::from(root), PathBuf::from(at)));
        assert_eq!(found("cgroup", "cpu"), pair("/", "/sys/fs/cgroup/cpu"));
        assert_eq!(found("cgroup", "cpu,cpuacct"), pair("/docker/1", "/sys/fs/cgroup/cpu,cpuacct"));
        assert_eq!(found("cgroup", "name=systemd"), pair("/", "/sys/fs/cgroup/systemd"));
        assert_eq!(found("cgroup2", ""), pair("/", "/sys/fs/cgroup/unified"));
        assert_eq!(found("cgroup", "memory"), None);
    }

    #[test]
    fn groups_are_written_down_and_read_again() {
        let text = "memory /sys/fs/cgroup/memory/a\nname=systemd /sys/fs/cgroup/systemd/a\n";
        let groups = Cgroups::parse(text);
        assert_eq!(groups.to_text(), text);
        assert_eq!(groups.hierarchies(), "memory name=systemd");
        assert_eq!(groups.joins()[0], Path::new("/sys/fs/cgroup/memory/a/cgroup.procs"));
        let unified = Cgroups::parse("v2 /sys/fs/cgroup/a\n");
        assert_eq!(unified.roots(), [Path::new("/sys/fs/cgroup/a/cgroup.procs")]);
        assert_eq!(unified.joins(), [Path::new("/sys/fs/cgroup/a/node/cgroup.procs")]);
    }
}
