//! `carport mount` and `carport umount`.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use carport_csi::fuse;
use carport_csi::mount::{
    ImagePath, KernelMounter, MountOptions, MountPoint, Mounter, TargetState, Tree,
};
use carport_image::store::{Owner, PinRequest};
use carport_image::{Digest, Reference};
use serde::{Deserialize, Serialize};

use super::pull::pull_one;
use super::{open_puller, open_store};
use crate::cli::{Global, MountArgs, Output};
use crate::config::Config;
use crate::output::print;

mod claim;
mod served;

pub(super) use claim::served_at;

#[derive(Debug, Serialize, Deserialize)]
struct Mounted {
    reference: String,
    digest: String,
    target: PathBuf,
    /// Not all of it was here when it was mounted.
    arriving: bool,
    /// Layers that had to be complete before.
    waited_for: usize,
}

impl Mounted {
    fn new(reference: &Reference, digest: &Digest, target: PathBuf) -> Self {
        let (reference, digest) = (reference.to_string(), digest.to_string());
        Self { reference, digest, target, arriving: false, waited_for: 0 }
    }

    fn print(&self, output: Output) -> anyhow::Result<()> {
        print(output, self, |m| {
            let arriving = if m.arriving { ", arriving" } else { "" };
            let mut text =
                format!("{} on {} (read-only{arriving})", m.reference, m.target.display());
            if m.waited_for > 0 {
                text += &format!(
                    "; {} of its layers cannot be read before they are complete, and were waited for",
                    m.waited_for
                );
            }
            text
        })
    }
}

pub(super) async fn mount(
    global: &Global,
    mut config: Config,
    arguments: MountArgs,
) -> anyhow::Result<()> {
    arguments.registry.apply(&mut config);
    config.check()?;
    let target = std::path::absolute(&arguments.target).context("find the current folder")?;
    let path = match ImagePath::parse(&arguments.path) {
        Ok(path) => path,
        Err(why) => bail!("--path {:?} {why}; name a folder of the image", arguments.path),
    };
    let is_root = rustix::process::geteuid().is_root();
    if !is_root || arguments.serve.is_some() {
        return served::mount(global, config, arguments, target, path).await;
    }
    let puller = open_puller(&config)?;
    if arguments.stream && puller.store().lookup(&arguments.reference)?.is_none() {
        drop(puller);
        return served::mount(global, config, arguments, target, path).await;
    }
    if arguments.foreground && !arguments.stream {
        bail!("--foreground: for ordinary users; a mount of root's needs no process to stay");
    }
    let pulled = pull_one(global.output, &puller, &arguments.reference).await?;
    let (store, reference) = (puller.store().clone(), arguments.reference.clone());
    let target = tokio::task::spawn_blocking(move || {
        let rootfs = store.rootfs(&pulled.digest);
        // No volume's record tells of this mount, so a pin keeps the image from being evicted.
        let pin = PinRequest { owner: mount_owner(&target)?, expires_at: None };
        if store.pin(&pulled.digest, Some(&reference), &pin)?.is_none() {
            bail!("{reference}: removed from the store meanwhile; run it again");
        }
        mount_kernel(&KernelMounter, &Tree { rootfs, path }, &target).map(|()| target)
    });
    let target = target.await.context("mount")??;
    Mounted::new(&arguments.reference, &pulled.digest, target).print(global.output)
}

/// Who pins the image that is mounted on `target`.
fn mount_owner(target: &Path) -> anyhow::Result<Owner> {
    let name = Digest::of(target.as_os_str().as_encoded_bytes());
    Ok(format!("mount:{}", name.short()).parse()?)
}

/// Mounts once; a second call for the same folder changes nothing.
fn mount_kernel(mounter: &dyn Mounter, tree: &Tree, target: &Path) -> anyhow::Result<()> {
    let shown = target.display();
    match mounter.state(target)? {
        TargetState::Absent => {
            std::fs::create_dir_all(target).with_context(|| format!("make {shown}"))?;
        }
        TargetState::Empty => {}
        TargetState::Occupied(what) => bail!("mount on {shown}: {what}; choose an empty folder"),
        TargetState::Mounted { id, read_only } => {
            if read_only && id == mounter.identify(tree)? {
                return Ok(());
            }
            bail!(
                "mount on {shown}: something else is mounted there; `carport umount {shown}` first"
            );
        }
        TargetState::Dead => mounter.unmount(target)?,
    }
    Ok(mounter.mount_tree(tree, target, MountOptions::default())?)
}

#[derive(Debug, Serialize)]
struct Unmounted {
    target: PathBuf,
    unmounted: bool,
    still_open: bool,
}

pub(super) fn umount(output: Output, config: &Config, target: &Path) -> anyhow::Result<()> {
    let target = std::path::absolute(target).context("find the current folder")?;
    let shown = target.display();
    // Only what carport mounted: as root this command must not take /home away.
    let mounts = KernelMounter.under(&target)?;
    let mount = mounts.iter().rfind(|mount| mount.target == target);
    let served = mount.is_some_and(|mount| mount.fs_type == fuse::FS_TYPE);
    if !served && mount.is_none_or(|mount| mount.shown_image().is_none()) {
        bail!("umount {shown}: no image is mounted there");
    }
    let mut still_open = false;
    if served {
        fuse::unmount(&target)?;
        still_open = !served::wait_for_end(config, &target)?;
    } else {
        KernelMounter.unmount(&target)?;
        // Only where that store is; it may have been mounted from another one.
        if let Some(digest) = mount.and_then(MountPoint::shown_image)
            && config.root.join("format").exists()
        {
            open_store(config)?.unpin(&digest, &mount_owner(&target)?)?;
        }
    }
    let unmounted = Unmounted { target: target.clone(), unmounted: true, still_open };
    print(output, &unmounted, |u| match u.still_open {
        false => format!("unmounted {shown}"),
        true => format!("unmounted {shown}; files of it are still open, and served until closed"),
    })
}
