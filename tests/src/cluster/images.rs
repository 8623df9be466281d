//! The container images of a cluster: busybox for pods and their sandboxes, and carport's own. They are imported, so no
//! registry is needed.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, ensure};
use carport_image::Digest;
use serde_json::{Value, json};
use tar::{Builder, EntryType, Header};

use super::{BUSYBOX, PAUSE};
use crate::carport::workspace;

/// The programs that pods of the tests call.
const PROGRAMS: [&str; 14] = [
    "cat",
    "dd",
    "find",
    "grep",
    "head",
    "ls",
    "sh",
    "sha256sum",
    "sleep",
    "sort",
    "stat",
    "touch",
    "wget",
    "xargs",
];

/// Writes an archive for `ctr images import` that has busybox under each of the names.
///
/// # Errors
///
/// When Debian's busybox-static is not installed, or the archive cannot be written.
pub fn busybox(archive: &Path) -> anyhow::Result<()> {
    let program = fs::read("/bin/busybox").context("/bin/busybox: install busybox-static")?;
    let mut layer = Builder::new(Vec::new());
    add(&mut layer, "bin/busybox", 0o755, &program)?;
    for name in PROGRAMS {
        let mut header = Header::new_ustar();
        header.set_entry_type(EntryType::Symlink);
        header.set_mode(0o777);
        header.set_size(0);
        layer.append_link(&mut header, format!("bin/{name}"), "busybox")?;
    }
    for folder in ["etc/", "tmp/", "models/"] {
        let mut header = Header::new_ustar();
        header.set_entry_type(EntryType::Directory);
        header.set_mode(0o755);
        header.set_size(0);
        layer.append_data(&mut header, folder, std::io::empty())?;
    }
    let layer = layer.into_inner()?;

    let mut layout = Builder::new(File::create(archive)?);
    let mut blob = |media: &str, bytes: &[u8]| -> anyhow::Result<Value> {
        let digest = Digest::of(bytes);
        add(&mut layout, &format!("blobs/sha256/{}", digest.hex()), 0o644, bytes)?;
        Ok(json!({"mediaType": media, "digest": digest, "size": bytes.len()}))
    };
    let packed = blob("application/vnd.oci.image.layer.v1.tar", &layer)?;
    let config = json!({
        "architecture": architecture(), "os": "linux",
        "config": {"Env": ["PATH=/bin"], "Cmd": ["sleep", "infinity"]},
        "rootfs": {"type": "layers", "diff_ids": [Digest::of(&layer)]},
    });
    let config = blob("application/vnd.oci.image.config.v1+json", config.to_string().as_bytes())?;
    let media = "application/vnd.oci.image.manifest.v1+json";
    let manifest =
        json!({"schemaVersion": 2, "mediaType": media, "config": config, "layers": [packed]});
    let manifest = blob(media, manifest.to_string().as_bytes())?;
    let named = [BUSYBOX, PAUSE].map(|name| {
        let mut named = manifest.clone();
        named["annotations"] = json!({"io.containerd.image.name": name});
        named
    });
    let index = json!({"schemaVersion": 2, "manifests": named}).to_string();
    add(&mut layout, "index.json", 0o644, index.as_bytes())?;
    add(&mut layout, "oci-layout", 0o644, br#"{"imageLayoutVersion":"1.0.0"}"#)?;
    layout.into_inner()?.flush()?;
    Ok(())
}

fn add<W: std::io::Write>(
    tar: &mut Builder<W>,
    name: &str,
    mode: u32,
    content: &[u8],
) -> std::io::Result<()> {
    let mut header = Header::new_ustar();
    header.set_mode(mode);
    header.set_size(content.len() as u64);
    tar.append_data(&mut header, name, content)
}

fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// carport's container image, made of this binary by `deploy/image/build.py` as `make image` does. It is kept in
/// `folder` and rebuilt only when the binary has changed.
///
/// # Errors
///
/// When it cannot be made.
pub fn carport(binary: &Path, folder: &Path) -> anyhow::Result<PathBuf> {
    let script = workspace().join("deploy/image/build.py");
    let mut made_of = Vec::new();
    File::open(binary)?.read_to_end(&mut made_of)?;
    made_of.extend(fs::read(&script)?);
    let made_of = Digest::of(&made_of).to_string();
    let (archive, stamp) = (folder.join("carport.tar"), folder.join("carport.tar.stamp"));
    if archive.exists() && fs::read_to_string(&stamp).is_ok_and(|stamp| stamp == made_of) {
        return Ok(archive);
    }
    // Debug information is most of an unoptimised binary and would take long to compress.
    let stripped = folder.join("carport.stripped");
    let strip =
        Command::new("strip").arg("-o").arg(&stripped).arg(binary).output().context("strip")?;
    ensure!(strip.status.success(), "strip: {}", String::from_utf8_lossy(&strip.stderr));
    let mut python = Command::new("python3");
    let packed =
        python.arg(&script).arg(&stripped).arg(&archive).arg(env!("CARGO_PKG_VERSION")).output();
    let packed = packed.context("python3")?;
    ensure!(packed.status.success(), "build.py: {}", String::from_utf8_lossy(&packed.stderr));
    fs::remove_file(&stripped)?;
    fs::write(&stamp, made_of)?;
    Ok(archive)
}
