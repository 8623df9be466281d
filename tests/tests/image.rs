//! The container image holds all that the binary needs, and comes out the same each time.
#![allow(clippy::unwrap_used)] // a test that cannot go on says where

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::LazyLock;

use carport_tests::carport::{binary, workspace};
use carport_tests::registry::installed;
use fake_nvml::{FakeNvml, Scenario};
use serde_json::{Value, json};

fn build(program: &Path, archive: &Path, epoch: &str) {
    let mut command = Command::new("python3");
    command.arg(workspace().join("deploy/image/build.py")).arg(program).arg(archive);
    done(command.arg("0.1.0").env("SOURCE_DATE_EPOCH", epoch));
}

/// The image of the agent, built once: a debug binary takes its time to compress.
fn archive() -> PathBuf {
    static BUILT: LazyLock<PathBuf> = LazyLock::new(|| {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("carport-image.tar");
        build(binary(), &path, "1000000000");
        path
    });
    BUILT.clone()
}

fn done(command: &mut Command) -> Output {
    let output = command.output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {errors}");
    output
}

fn untar(archive: &Path, folder: &Path) {
    fs::create_dir_all(folder).unwrap();
    done(Command::new("tar").arg("-xf").arg(archive).arg("-C").arg(folder));
}

fn document(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

fn blob(layout: &Path, descriptor: &Value) -> PathBuf {
    let digest = descriptor["digest"].as_str().unwrap();
    layout.join("blobs").join(digest.replace(':', "/"))
}

/// Unpacked as a container runtime would: the root folder and the image's configuration.
fn unpack(dir: &Path) -> (PathBuf, Value) {
    let (layout, rootfs) = (dir.join("layout"), dir.join("rootfs"));
    untar(&archive(), &layout);
    let index = document(&layout.join("index.json"));
    let manifest = document(&blob(&layout, &index["manifests"][0]));
    let layers = manifest["layers"].as_array().unwrap();
    assert_eq!(layers.len(), 1);
    untar(&blob(&layout, &layers[0]), &rootfs);
    (rootfs, document(&blob(&layout, &manifest["config"])))
}

/// Runs the image's own program, with nothing of this machine but the kernel.
fn inside(rootfs: &Path, config: &Value, arguments: &[&str]) -> Output {
    let path = config["config"]["Env"][0].as_str().unwrap();
    let path = path.strip_prefix("PATH=").unwrap();
    let program = config["config"]["Cmd"][0].as_str().unwrap();
    let mut command = Command::new("chroot");
    command.arg(rootfs).arg(format!("{path}/{program}")).args(arguments);
    command.env_clear();
    // chroot itself is found on this machine.
    command.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("HOME", "/root");
    done(&mut command)
}

fn can_run() -> bool {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: chroot needs root");
        return false;
    }
    ["python3", "ldd", "tar", "chroot"].into_iter().all(installed)
}

#[test]
fn the_same_input_makes_the_same_image() {
    if !["python3", "ldd"].into_iter().all(installed) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let paths = ["a", "b", "c"].map(|name| dir.path().join(name));
    for (path, epoch) in paths.iter().zip(["1000000000", "1000000000", "1000000001"]) {
        // Any program does.
        build(Path::new("/usr/bin/env"), path, epoch);
    }
    let [a, b, c] = paths.map(|path| fs::read(path).unwrap());
    assert!(a == b, "the same time");
    assert!(a != c, "another time");
}

#[test]
fn the_agent_in_the_image_packs_and_pulls() {
    if !can_run() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (rootfs, config) = unpack(dir.path());
    assert_eq!(config["config"]["Cmd"], json!(["carport", "agent"]));
    assert_eq!(config["created"], "2001-09-09T01:46:40Z");
    let mounts = rootfs.join("usr/bin/fusermount3");
    assert!(mounts.is_file(), "for streaming volumes");
    let mut helper = Command::new("chroot");
    done(helper.arg(&rootfs).args(["/usr/bin/fusermount3", "--version"]));
    let text = inside(&rootfs, &config, &["--version"]).stdout;
    assert_eq!(
        String::from_utf8(text).unwrap(),
        format!("carport {}\n", env!("CARGO_PKG_VERSION"))
    );

    let model = rootfs.join("tmp/model");
    fs::create_dir_all(&model).unwrap();
    fs::write(model.join("config.json"), "{}").unwrap();
    inside(&rootfs, &config, &["pack", "/tmp/model", "oci:/tmp/image:v1"]);
    inside(&rootfs, &config, &["pull", "oci:/tmp/image:v1"]);
    let listed = inside(&rootfs, &config, &["ls", "-o", "json"]).stdout;
    let listed: Value = serde_json::from_slice(&listed).unwrap();
    assert_eq!(listed[0]["references"][0], "oci:/tmp/image:v1");
    assert_eq!(listed[0]["files"], 1);
    // The default store, as the DaemonSet mounts it.
    assert!(rootfs.join("var/lib/carport/format").exists());
}

/// Where NVIDIA's container runtime puts the driver's library.
fn put_nvml(rootfs: &Path, fake: &FakeNvml) {
    let folder = format!("usr/lib/{}-linux-gnu", std::env::consts::ARCH);
    let library = rootfs.join(folder).join("libnvidia-ml.so.1");
    fs::copy(fake.library(), &library).unwrap();
    fs::copy(fake.scenario(), library.with_file_name("libnvidia-ml.so.1.json")).unwrap();
}

/// NVIDIA's container runtime puts the library into the image's folder for libraries.
#[test]
fn the_driver_s_library_is_loaded_in_the_image() {
    if !can_run() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (rootfs, config) = unpack(dir.path());
    let asked = ["gpus", "-o", "json"];
    let gpus = |output: Output| -> Value { serde_json::from_slice(&output.stdout).unwrap() };
    let without = gpus(inside(&rootfs, &config, &asked));
    assert_eq!(without["provider"]["state"], "no_library");

    put_nvml(&rootfs, &FakeNvml::new(&Scenario::h100s(1)));
    let found = gpus(inside(&rootfs, &config, &asked));
    assert_eq!(found["provider"]["state"], "ok", "{found:#}");
    assert_eq!(found["gpus"].as_array().unwrap().len(), 1);
}

/// Runs the image's program as a container of the DaemonSet does: a root of its own that cannot be written, the
/// host's devices, and of its folders those that are shared, at the same paths, with their mounts going both ways.
const CONTAINER: &str = r#"#!/bin/sh
set -eu
if [ -n "${KUBELET:-}" ] && ! mountpoint -q "$KUBELET"; then
    mount --bind "$KUBELET" "$KUBELET"
    # A peer group of its own: a peer of the machine's root would have each mount of a pod there, too.
    mount --make-private "$KUBELET"
    mount --make-shared "$KUBELET"
fi
exec unshare --mount --propagation unchanged sh -euc '
    # What is mounted here is nobody else'"'"'s business.
    mount --make-private "$(findmnt -no TARGET -T "$1")"
    mount --bind "$1" "$1"
    mount --make-private "$1"
    for folder in dev proc sys; do mount --rbind "/$folder" "$1/$folder"; done
    mount --rbind "$2" "$1$2"
    mount -o remount,bind,ro "$1"
    root=$1; shift 2
    exec chroot "$root" /usr/bin/carport "$@"
' sh "ROOTFS" "SHARED" "$@"
"#;

/// `make demo`, with the image's program in the image's root.
#[test]
fn the_agent_in_the_image_does_the_main_job_and_sees_gpus() {
    if !can_run() || !["docker-registry", "findmnt", "unshare"].into_iter().all(installed) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (rootfs, config) = unpack(dir.path());
    let fake = FakeNvml::new(&Scenario::h100s(2));
    put_nvml(&rootfs, &fake);

    let shared = tempfile::tempdir().unwrap();
    fs::create_dir_all(rootfs.join(shared.path().strip_prefix("/").unwrap())).unwrap();
    let program = dir.path().join("carport");
    let script = CONTAINER.replace("ROOTFS", rootfs.to_str().unwrap());
    fs::write(&program, script.replace("SHARED", shared.path().to_str().unwrap())).unwrap();
    done(Command::new("chmod").arg("+x").arg(&program));

    let mut demo = Command::new(env!("CARGO_BIN_EXE_carport-demo"));
    let output = done(demo.arg(&program).env("TMPDIR", shared.path()));
    let printed = String::from_utf8(output.stdout).unwrap();
    for (number, step) in (1..).zip([
        "pack", "agent", "publish", "publish", "read", "share", "disk", "locate", "gpus", "stop",
        "clean",
    ]) {
        assert!(printed.contains(&format!("{number:>2}  {step:<8} ")), "{step}: {printed}");
    }
    let name = "NVIDIA H100 80GB HBM3";
    assert!(printed.contains(&format!("gpus     2: {name}, {name}\n")), "{printed}");
    // Nothing was written into the root, nor is anything mounted there from here.
    assert_eq!(fs::read_dir(rootfs.join("var/lib")).unwrap().count(), 0);
    assert_eq!(fs::read_dir(rootfs.join("dev")).unwrap().count(), 0);
    assert_eq!(config["config"]["Env"], json!(["PATH=/usr/bin"]));
}

/// TLS to a registry fails without them, however good its certificate is.
#[test]
fn the_image_has_authorities_and_folders_to_mount_on() {
    if !can_run() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (rootfs, _) = unpack(dir.path());
    let bundle = fs::read_to_string(rootfs.join("etc/ssl/certs/ca-certificates.crt")).unwrap();
    assert!(bundle.matches("BEGIN CERTIFICATE").count() > 50);
    for folder in ["dev", "proc", "sys", "run", "tmp", "var/lib"] {
        assert!(rootfs.join(folder).is_dir(), "{folder}");
    }
    for absent in ["bin/sh", "usr/bin/sh", "usr/bin/apt"] {
        assert!(!rootfs.join(absent).exists(), "{absent}");
    }
}
