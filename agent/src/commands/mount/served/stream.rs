//! Serving an image while it arrives: the pull and the mount in one process.
//!
//! When the pull is over the mount goes on, from the store or, where the pull failed, with what came of it.
//! When the mount is over the pull stops where it can be gone on from.

use std::time::Duration;

use anyhow::{Context as _, bail};
use carport_csi::fuse::FuseMount;
use carport_image::pull::PullRequest;

use super::{Claims, Mounted, PATIENCE, Wanted, record};
use crate::cli::Output;
use crate::commands::fuse::{raise_open_files, told_to_end};
use crate::commands::open_puller;
use crate::config::Config;

/// Mounts as soon as the image's files are known, and serves in this process.
pub(super) async fn serve(
    output: Output,
    config: &Config,
    wanted: Wanted,
    name: String,
    patience: Duration,
) -> anyhow::Result<()> {
    let told = told_to_end()?;
    tokio::pin!(told);
    if let Err(error) = raise_open_files() {
        tracing::warn!(%error, "left the limit of open files as it is");
    }
    let puller = open_puller(config)?;
    let store = puller.store().clone();
    let reference = wanted.reference.clone();
    let pull = puller.start(PullRequest { stream: true, ..PullRequest::new(reference.clone()) });
    let arriving = tokio::select! {
        arriving = pull.arriving() => arriving,
        () = &mut told => {
            puller.shutdown().await;
            bail!("interrupted; run the same command again to go on where it stopped");
        }
    };
    let Some(arriving) = arriving else {
        // Complete in the meantime, or an error.
        let digest = pull.wait().await?.digest;
        return super::serve(output, store, digest, wanted, name).await;
    };
    let digest = arriving.digest();
    let mounted = Mounted {
        arriving: true,
        waited_for: arriving.waited_for(),
        ..Mounted::new(&reference, &digest, wanted.target.clone())
    };
    let (claim, mount) = tokio::task::spawn_blocking(move || {
        let files = arriving.tree().files();
        let size = (files.iter().map(|(_, size, _)| size).sum(), files.len() as u64);
        let record = record(&wanted, digest, size, &name)?;
        let claim = Claims::of(&store).claim_arriving(&name, &record)?;
        let path = wanted.path.as_ref();
        let mount = FuseMount::mount_arriving(&arriving, &store, path, patience, &wanted.target)?;
        anyhow::Ok((claim, mount))
    })
    .await
    .context("mount")??;
    mounted.print(output)?;

    let mut pulling = true;
    loop {
        tokio::select! {
            () = mount.ended() => break,
            () = &mut told => {
                mount.end_waits();
                // New readers find an empty folder; who is in the middle of a file may finish.
                tokio::task::block_in_place(|| mount.unmount())?;
                let _ = tokio::time::timeout(PATIENCE, mount.ended()).await;
                break;
            }
            ended = pull.wait(), if pulling => {
                pulling = false;
                match ended {
                    Ok(_) => tracing::info!(%reference, "complete"),
                    Err(error) => tracing::error!(
                        %reference, %error,
                        "the image will not be complete: reads of what is missing or wrong are errors; \
                         unmount it, and mount it again to go on"
                    ),
                }
            }
        }
    }
    mount.end_waits();
    puller.shutdown().await;
    tokio::task::block_in_place(|| {
        drop(mount);
        drop(claim);
    });
    Ok(())
}
