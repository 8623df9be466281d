//! `carport ls`, `rm` and `gc`: the store itself.

use std::path::Path;

use anyhow::{Context as _, bail};
use carport_csi::mount::{KernelMounter, Mounter as _};
use carport_image::store::StoredImage;
use carport_image::{Digest, Reference, Store};
use serde::Serialize;

use super::{Failures, open_store};
use crate::cli::Output;
use crate::config::Config;
use crate::output::{print, size, table, time, write_time};

/// An image as `ls` prints it.
#[derive(Debug, Serialize)]
struct Image {
    digest: String,
    references: Vec<String>,
    packaging: String,
    unpacked_bytes: u64,
    files: u64,
    layers: Vec<Layer>,
    #[serde(serialize_with = "write_time")]
    pulled_at: std::time::SystemTime,
}

#[derive(Debug, Serialize)]
struct Layer {
    digest: String,
    size_bytes: u64,
    diff_id: String,
}

impl From<StoredImage> for Image {
    fn from(image: StoredImage) -> Self {
        let layers = image.layers.into_iter().map(|layer| Layer {
            digest: layer.digest.to_string(),
            size_bytes: layer.size_bytes,
            diff_id: layer.diff_id.to_string(),
        });
        Self {
            digest: image.digest.to_string(),
            references: image.references,
            packaging: image.packaging.to_string(),
            unpacked_bytes: image.unpacked_bytes,
            files: image.files,
            layers: layers.collect(),
            pulled_at: image.pulled_at,
        }
    }
}

pub(super) fn ls(output: Output, config: &Config) -> anyhow::Result<()> {
    let images: Vec<Image> = open_store(config)?.images()?.into_iter().map(Image::from).collect();
    print(output, &images, |images| {
        let rows = images.iter().flat_map(|image| {
            let unnamed = ["-".to_string()];
            let names = if image.references.is_empty() { &unnamed[..] } else { &image.references };
            let row = |name: &String| {
                vec![
                    name.clone(),
                    super::ask::short(&image.digest),
                    image.packaging.clone(),
                    size(image.unpacked_bytes),
                    image.files.to_string(),
                    time(image.pulled_at),
                ]
            };
            names.iter().map(row).collect::<Vec<_>>()
        });
        table(&["REFERENCE", "DIGEST", "PACKAGING", "SIZE", "FILES", "PULLED"], rows)
    })
}

/// What `rm` did.
#[derive(Debug, Serialize)]
struct Removed {
    reference: String,
    digest: String,
    removed: bool,
}

pub(super) fn rm(output: Output, config: &Config, names: &[String]) -> anyhow::Result<()> {
    let store = open_store(config)?;
    let (mut removed, mut failures) = (Vec::new(), Failures(Vec::new()));
    for name in names {
        match remove(&store, name) {
            Ok(one) => removed.push(one),
            Err(error) => failures.0.push(error),
        }
    }
    print(output, &removed, |removed| {
        removed.iter().map(|one| format!("removed {} ({})\n", one.reference, one.digest)).collect()
    })?;
    failures.into_result()
}

fn remove(store: &Store, name: &str) -> anyhow::Result<Removed> {
    let digest = find(store, name)?;
    refuse_mounted(store, &digest)?;
    let removed = store.remove(&digest)?;
    Ok(Removed { reference: name.into(), digest: digest.to_string(), removed })
}

/// The image that `name` means: a reference, a digest, or the start of one.
pub(super) fn find(store: &Store, name: &str) -> anyhow::Result<Digest> {
    let hex = name.strip_prefix("sha256:").unwrap_or(name);
    if hex.len() >= 6 && hex.len() <= 64 && hex.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        let stored = store.images()?.into_iter().map(|image| image.digest);
        // Damaged ones can be taken out, too.
        let mut found =
            stored.chain(store.damaged_images()?).filter(|image| image.hex().starts_with(hex));
        match (found.next(), found.next()) {
            (Some(image), None) => return Ok(image),
            (Some(_), Some(_)) => bail!("{name}: more than one image starts so; write more of it"),
            (None, _) => {}
        }
    }
    let reference: Reference = name.parse()?;
    let digest = store.lookup(&reference)?;
    digest.with_context(|| format!("{reference}: not in the store; `carport ls` shows what is"))
}

/// Volumes of pods are on record in the store; what people mounted by hand is seen here.
fn refuse_mounted(store: &Store, digest: &Digest) -> anyhow::Result<()> {
    if let Some(target) = super::mount::served_at(store, digest)? {
        let target = target.display();
        bail!("{digest}: mounted at {target}; `carport umount {target}` and close its files first");
    }
    let rootfs = store.rootfs(digest);
    // Without a mount table to read there is nothing to refuse.
    let mounts = KernelMounter.under(Path::new("/")).unwrap_or_default();
    let of_image = mounts.iter().find(|mount| {
        mount.shown_image() == Some(*digest) && rootfs.ends_with(suffix(&mount.root))
    });
    match of_image {
        Some(mount) => {
            let target = mount.target.display();
            bail!("{digest}: mounted at {target}; `carport umount {target}` first");
        }
        None => Ok(()),
    }
}

/// `trees/<digest>/rootfs` of a mount's root, whatever file system it is on.
fn suffix(root: &Path) -> std::path::PathBuf {
    let parts: Vec<_> = root.components().collect();
    let at = parts.iter().position(|part| part.as_os_str() == "trees").unwrap_or(parts.len());
    parts.iter().skip(at).take(3).collect()
}

#[derive(Debug, Serialize)]
struct Collected {
    objects: u64,
    bytes: u64,
}

pub(super) fn gc(output: Output, config: &Config) -> anyhow::Result<()> {
    let collected = open_store(config)?.collect()?;
    let collected = Collected { objects: collected.objects, bytes: collected.bytes };
    print(output, &collected, |c| format!("{} freed in {} objects", size(c.bytes), c.objects))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_of_an_image_is_known_by_the_end_of_its_root() {
        let root = Path::new("/lib/carport/trees/ab/rootfs/models");
        assert_eq!(suffix(root), Path::new("trees/ab/rootfs"));
        assert_eq!(suffix(Path::new("/x")), Path::new(""));
    }
}
