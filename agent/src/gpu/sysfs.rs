//! What the kernel says about a GPU where NVML does not.

use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};

/// A mounted sysfs.
#[derive(Clone, Debug)]
pub(super) struct Sysfs {
    root: PathBuf,
}

impl Sysfs {
    /// The sysfs at `root`, usually `/sys`.
    pub(super) fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The NUMA node of a PCI device; the kernel's -1 is `None`.
    pub(super) fn numa_node(&self, pci_bus_id: &str) -> Option<u32> {
        self.device(pci_bus_id, "numa_node")?.parse().ok()
    }

    /// The CPUs near to a PCI device, such as `0-31,64-95`.
    pub(super) fn cpu_list(&self, pci_bus_id: &str) -> Option<String> {
        self.device(pci_bus_id, "local_cpulist").filter(|list| !list.is_empty())
    }

    /// The root of the PCI tree that a device hangs on, such as `0000:16`.
    pub(super) fn pcie_root(&self, pci_bus_id: &str) -> Option<String> {
        let link = self.root.join("bus/pci/devices").join(pci_bus_id);
        // A link to devices/pci0000:16/0000:16:01.0/…
        let path = std::fs::canonicalize(link).ok()?;
        let root = path.iter().filter_map(|part| part.to_str()?.strip_prefix("pci")).next()?;
        root.contains(':').then(|| root.to_owned())
    }

    /// The version of the loaded NVIDIA kernel module; `None`: it is not loaded.
    pub(super) fn driver_version(&self) -> Option<String> {
        read_line(&self.root.join("module/nvidia/version"))
    }

    fn device(&self, pci_bus_id: &str, attribute: &str) -> Option<String> {
        read_line(&self.root.join("bus/pci/devices").join(pci_bus_id).join(attribute))
    }
}

/// A sysfs attribute is at most a page.
fn read_line(path: &Path) -> Option<String> {
    let mut text = String::new();
    File::open(path).ok()?.take(4096).read_to_string(&mut text).ok()?;
    Some(text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_read_and_minus_one_is_no_node() {
        let root = tempfile::tempdir().unwrap();
        let device = |id: &str, node: &str, cpus: &str| {
            let folder = root.path().join("bus/pci/devices").join(id);
            std::fs::create_dir_all(&folder).unwrap();
            std::fs::write(folder.join("numa_node"), node).unwrap();
            std::fs::write(folder.join("local_cpulist"), cpus).unwrap();
        };
        device("0000:1b:00.0", "1\n", "32-63,96-127\n");
        device("0000:1c:00.0", "-1\n", "\n");
        let sysfs = Sysfs::new(root.path());
        assert_eq!(sysfs.numa_node("0000:1b:00.0"), Some(1));
        assert_eq!(sysfs.cpu_list("0000:1b:00.0").as_deref(), Some("32-63,96-127"));
        assert_eq!(sysfs.numa_node("0000:1c:00.0"), None);
        assert_eq!(sysfs.cpu_list("0000:1c:00.0"), None);
        assert_eq!(sysfs.numa_node("0000:1d:00.0"), None);
        assert_eq!(sysfs.driver_version(), None);
        assert_eq!(sysfs.pcie_root("0000:1b:00.0"), None);
    }

    #[test]
    fn a_devices_place_in_the_tree_names_its_root() {
        let root = tempfile::tempdir().unwrap();
        let device = root.path().join("devices/pci0000:16/0000:16:01.0/0000:1b:00.0");
        std::fs::create_dir_all(&device).unwrap();
        let devices = root.path().join("bus/pci/devices");
        std::fs::create_dir_all(&devices).unwrap();
        std::os::unix::fs::symlink(&device, devices.join("0000:1b:00.0")).unwrap();
        let sysfs = Sysfs::new(root.path());
        assert_eq!(sysfs.pcie_root("0000:1b:00.0").as_deref(), Some("0000:16"));
    }
}
