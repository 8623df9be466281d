//! What the machine has: kernel, store and disk, the kubelet's folders, the list, GPUs.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Duration;

use carport_csi::mount::{KernelMounter, Mounter as _, Processes, over};
use carport_image::Store;
use carport_image::runtime::PublishError;

use super::Check;
use crate::config::Config;
use crate::gpu::{HealthState, ProviderState, look_once};
use crate::output::size;
use crate::page_cache;
use crate::prepull::List;

/// As `carport gpus` waits.
const PATIENCE: Duration = Duration::from_secs(30);
/// Less of the disk free than this is what the agent calls pressure.
const PRESSURE: f64 = 0.05;

pub(super) fn kernel(config: &Config) -> Vec<Check> {
    let uname = rustix::system::uname();
    let release = uname.release().to_string_lossy();
    let mut checks = Vec::new();
    // Any folder does: the clone is thrown away.
    let root = rustix::process::geteuid().is_root();
    match KernelMounter.rehearse(Path::new("/")) {
        Ok(()) => checks.push(Check::ok("mounts", format!("Linux {release} clones and seals them"))),
        Err(error) if config.csi.enabled => checks.push(Check::fail(
            "mounts",
            format!("Linux {release}: {error}"),
            "use Linux 5.12 or newer, as root with CAP_SYS_ADMIN: in Kubernetes a privileged container",
        )),
        Err(_) if !root => {}
        Err(error) => checks.push(Check::warn(
            "mounts",
            format!("Linux {release}: {error}"),
            "only `carport mount` wants it here, since csi.enabled is false",
        )),
    }
    checks.push(fuse(root));
    if config.csi.enabled && root {
        checks.push(native(&release));
    }
    checks.push(match page_cache::try_kernel() {
        Ok(()) => Check::ok("cachestat", "the kernel tells what is in the page cache"),
        Err(error) => Check::warn(
            "cachestat",
            format!("Linux {release} does not tell what is in the page cache: {error}"),
            "nothing depends on it but page_cache_bytes; Linux 6.5 has it, where seccomp allows it",
        ),
    });
    checks
}

/// What ordinary users mount with, and everybody who streams.
fn fuse(root: bool) -> Check {
    let device = File::options().read(true).write(true).open("/dev/fuse");
    let path = std::env::var_os("PATH").unwrap_or_default();
    let helper = std::env::split_paths(&path).any(|folder| folder.join("fusermount3").exists());
    let what = match root {
        true => "`carport mount --stream`",
        false => "`carport mount`",
    };
    match (device, helper) {
        (Ok(_), true) => {
            Check::ok("fuse", format!("/dev/fuse and fusermount3 are there for {what}"))
        }
        (Err(error), _) => Check::warn(
            "fuse",
            format!("/dev/fuse: {error}"),
            format!("{what} does not work for this user; load the kernel module fuse"),
        ),
        (Ok(_), false) => Check::warn(
            "fuse",
            "fusermount3 is not in PATH",
            format!("{what} does not work for this user; install the package fuse3"),
        ),
    }
}

/// Whether streaming volumes can be turned into kernel mounts in pods that run.
fn native(release: &str) -> Check {
    let until = "until then volumes that stream stay FUSE until their pods go";
    if let Err(error) = mounts_beneath() {
        return Check::warn(
            "native",
            format!("Linux {release} does not mount beneath another mount: {error}"),
            format!("use Linux 6.5 or newer; {until}"),
        );
    }
    let works = "volumes that stream become kernel mounts in pods that run";
    match Processes::seen() {
        Processes::OfMachine => Check::ok("native", works),
        Processes::OfNode => Check::ok(
            "native",
            format!(
                "{works}; this node is a container itself (kind, k3d), and hostPID shows the processes of \
                 its pods"
            ),
        ),
        Processes::OfContainer => Check::warn(
            "native",
            "the processes of pods are not seen from here",
            format!("set hostPID: true in the agent's pod; {until}"),
        ),
    }
}

/// Moves nothing: there is no such mount. A kernel that does not know the flag says so before it looks.
fn mounts_beneath() -> rustix::io::Result<()> {
    use rustix::fs::CWD;
    let flag = rustix::mount::MoveMountFlags::MOVE_MOUNT_BENEATH;
    match rustix::mount::move_mount(CWD, "/proc/self/absent", CWD, "/", flag) {
        Ok(()) | Err(rustix::io::Errno::NOENT) => Ok(()),
        Err(error) => Err(error),
    }
}

pub(super) fn store(config: &Config) -> Vec<Check> {
    let root = &config.root;
    if !root.join("format").exists() {
        return vec![future_store(root)];
    }
    let store = match Store::open(root) {
        Ok(store) => store.with_limits(config.limits()),
        Err(error) => {
            return vec![Check::fail(
                "store",
                error.to_string(),
                "no image can be pulled or mounted",
            )];
        }
    };
    let mut checks = Vec::new();
    checks.push(match links(root) {
        Ok(()) => {
            let images = store.images().map(|images| images.len()).unwrap_or_default();
            Check::ok("store", format!("{}: {images} images", root.display()))
        }
        Err(error) => Check::fail(
            "store",
            format!("{}: write and link a file: {error}", root.display()),
            "the store needs a local file system with hard links (ext4, XFS, btrfs), and to be writable",
        ),
    });
    checks.extend(disk(config, &store));
    checks
}

/// There is none yet: whether one could be made.
fn future_store(root: &Path) -> Check {
    let there = root.ancestors().find(|folder| folder.exists()).unwrap_or(Path::new("/"));
    let shown = root.display();
    if there == root {
        let stranger = fs::read_dir(root)
            .ok()
            .and_then(|entries| entries.flatten().find(|entry| entry.file_name() != "lost+found"));
        if let Some(entry) = stranger {
            return Check::fail(
                "store",
                format!("{shown} is no store, and holds {:?}", entry.file_name()),
                "name an empty folder, or one that does not exist, in `root`",
            );
        }
    }
    match rustix::fs::access(there, rustix::fs::Access::WRITE_OK) {
        Ok(()) => Check::ok("store", format!("{shown} is made when it is first used")),
        Err(error) => Check::fail(
            "store",
            match there == root {
                true => format!("{shown} cannot be used: {error}"),
                false => format!("{shown}: {} cannot be written: {error}", there.display()),
            },
            "mount a writable folder there, or name another one in `root`",
        ),
    }
}

/// Whether files can be shared with containerd; nothing where there is none, or no store yet.
pub(super) async fn runtime(config: &Config) -> Option<Check> {
    let socket = &config.runtime.containerd.socket;
    if !config.runtime.containerd.enabled
        || !socket.exists()
        || !config.root.join("format").exists()
    {
        return None;
    }
    let (sources, store) = (config.sources().ok()?, Store::open(&config.root).ok()?);
    Some(match sources.runtime()?.shares_files_with(&store).await {
        Ok(()) => Check::ok("containerd", format!("{} shares its files", socket.display())),
        Err(error) if error.is_read_only_mount() => Check::ok(
            "containerd",
            format!(
                "{}: its images are read, and its files copied, since its folder is mounted read-only \
                 here; to share files, use the overlay shared-with-containerd",
                socket.display()
            ),
        ),
        Err(PublishError::NotPossible(why)) => Check::warn(
            "containerd",
            format!("{}: {why}", socket.display()),
            "its files are copied: let one mount reach both, as docs/runtime.md shows",
        ),
        Err(error) => Check::warn(
            "containerd",
            format!("{}: {error}", socket.display()),
            "images are fetched from their registries until it answers",
        ),
    })
}

/// A file and a second name for it, and both gone again.
fn links(root: &Path) -> std::io::Result<()> {
    let name = |what: &str| root.join(format!(".doctor-{}-{what}", std::process::id()));
    let (file, link) = (name("file"), name("link"));
    let made = File::create_new(&file).and_then(|_| fs::hard_link(&file, &link));
    let gone = fs::remove_file(&file);
    let _ = fs::remove_file(&link);
    made.and(gone)
}

fn disk(config: &Config, store: &Store) -> Vec<Check> {
    let (usage, room) = match store.usage().and_then(|usage| Ok((usage, store.room()?))) {
        Ok(both) => both,
        Err(error) => return vec![Check::fail("disk", error.to_string(), "look at the disk")],
    };
    let figures = format!(
        "{} free of {}; images could make room for {} more",
        size(room.space.free_bytes),
        size(room.space.limit_bytes),
        size(room.held.evictable_bytes),
    );
    if let Some(quota) = config.store.quota
        && quota.as_u64() > usage.capacity_bytes
    {
        let message =
            format!("store.quota is {quota}, the disk has {}", size(usage.capacity_bytes));
        let advice = "the disk would be full before the quota; write less, or use a larger disk";
        return vec![Check::warn("disk", message, advice)];
    }
    #[allow(clippy::cast_precision_loss)]
    let free = usage.free_bytes as f64 / usage.capacity_bytes.max(1) as f64;
    if free < PRESSURE {
        let advice =
            "remove images (`carport rm`, `carport gc`), take pins away, or enlarge the disk";
        return vec![Check::warn("disk", figures, advice)];
    }
    vec![Check::ok("disk", figures)]
}

pub(super) fn kubelet(config: &Config) -> anyhow::Result<Vec<Check>> {
    if !config.csi.enabled {
        return Ok(vec![Check::ok("kubelet", "no volumes are served (csi.enabled: false)")]);
    }
    let kubelet = &config.csi.kubelet_dir;
    let pods = kubelet.join("pods");
    for folder in [&pods, &kubelet.join("plugins_registry")] {
        if !folder.is_dir() {
            return Ok(vec![Check::fail(
                "kubelet",
                format!("{}: no such folder", folder.display()),
                "name the kubelet's --root-dir in csi.kubeletDir, and mount it into the agent's pod \
                 under the same path",
            )]);
        }
    }
    let mut checks =
        vec![Check::ok("kubelet", format!("its folders are in {}", kubelet.display()))];
    let real = pods.canonicalize().unwrap_or_else(|_| pods.clone());
    let mounts = KernelMounter.under(Path::new("/"))?;
    checks.push(match over(&mounts, &real) {
        Some(mount) if mount.shared => {
            Check::ok("propagation", format!("mounts below {} reach the host", pods.display()))
        }
        mount => Check::fail(
            "propagation",
            format!(
                "mounts made in {} stay in this mount namespace: {} is not shared, and pods would find \
                 empty folders",
                pods.display(),
                mount.map_or(Path::new("/"), |mount| &mount.target).display(),
            ),
            "in a pod: mountPropagation: Bidirectional; on the host: mount --make-rshared /",
        ),
    });
    for folder in &config.csi.layout_folders {
        if !folder.is_dir() {
            checks.push(Check::warn(
                "layouts",
                format!("{} of csi.layoutFolders: no such folder", folder.display()),
                "mount it into the agent's pod under the same path, or take it off the list",
            ));
        }
    }
    Ok(checks)
}

pub(super) fn list(config: &Config) -> Vec<Check> {
    let Some(path) = &config.prepull.list else { return Vec::new() };
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let shown = path.display();
            let message =
                format!("there is none at {shown}: nothing is pulled before pods ask for it");
            return vec![Check::ok("list", message)];
        }
        Err(error) => {
            let message = format!("{}: {error}", path.display());
            let advice = "write the list there (`images: []` is one), or take prepull.list away";
            return vec![Check::fail("list", message, advice)];
        }
    };
    vec![match List::parse(path, &text) {
        Ok(list) => Check::ok("list", format!("{}: {} images", path.display(), list.images.len())),
        Err(error) => {
            Check::fail("list", error.to_string(), "correct it; until then the last good one holds")
        }
    }]
}

pub(super) async fn gpus(config: &Config) -> anyhow::Result<Check> {
    let inventory = look_once(config.gpu_options(), PATIENCE).await?;
    let provider = &inventory.provider;
    let message = provider.message.clone();
    // The kernel's side of NVIDIA's driver, whatever the container has of the rest.
    let driver = PathBuf::from("/proc/driver/nvidia/version").exists();
    Ok(match provider.state {
        ProviderState::Ok => {
            let version = inventory.driver_version.as_deref().unwrap_or("unknown");
            let n = inventory.gpus.len();
            let found = format!("{n} through NVML, driver {version}");
            let ill = inventory.gpus.iter().filter(|gpu| gpu.health.state != HealthState::Ok);
            match ill.count() {
                0 => Check::ok("gpus", found),
                ill => Check::warn(
                    "gpus",
                    format!("{found}; {ill} not well"),
                    "`carport gpus` says why",
                ),
            }
        }
        ProviderState::Disabled => Check::ok("gpus", message),
        ProviderState::NoLibrary if !driver => {
            Check::ok("gpus", "none: neither NVIDIA's driver nor its library is here")
        }
        ProviderState::NoLibrary => Check::fail(
            "gpus",
            message,
            "the driver is loaded: give the pod runtimeClassName nvidia, or name the library in gpu.library",
        ),
        ProviderState::NoDriver | ProviderState::NoDevices => Check::warn(
            "gpus",
            message,
            "load the driver where there should be GPUs; else set gpu.enabled to false",
        ),
        ProviderState::NoPermission
        | ProviderState::VersionMismatch
        | ProviderState::Stale
        | ProviderState::Error => {
            Check::fail("gpus", message, "docs/gpu.md, \"States of the provider\", says what to do")
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_gpu_that_is_not_well_is_told_of() {
        let mut scenario = fake_nvml::Scenario::h100s(2);
        let fake = fake_nvml::FakeNvml::new(&scenario);
        let mut config = Config::default();
        config.gpu.library = Some(fake.library());
        assert_eq!(gpus(&config).await.unwrap().message, "2 through NVML, driver 550.54.15");
        scenario.devices[1].remapped_rows = Some((1, true, true));
        fake.set(&scenario);
        let check = gpus(&config).await.unwrap();
        assert_eq!(check.message, "2 through NVML, driver 550.54.15; 1 not well");
        assert!(matches!(check.level, super::super::Level::Warn));
    }

    #[test]
    fn nothing_is_left_of_the_link_that_is_tried() {
        let dir = tempfile::tempdir().unwrap();
        links(dir.path()).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        assert!(links(&dir.path().join("absent")).is_err());
    }
}
