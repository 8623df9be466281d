//! Publishing an image that is here: the driver's answer, as the kubelet sees it.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context as _, ensure};
use carport_proto::csi::v1 as csi;
use carport_tests::node::{Node, Setup, publish_request};

use crate::report::{Figure, Report, quantile};

const PUBLISHES: usize = 500;
const RUNS: usize = 5;

pub(crate) async fn run(carport: &Path, report: &mut Report) -> anyhow::Result<()> {
    for (files, setup) in [
        (
            20,
            "NodePublishVolume of a stored image of 20 files, 500 publishes a run, one after the other",
        ),
        (10_000, "NodePublishVolume of a stored image of 10,000 files, 500 publishes a run"),
    ] {
        let folder = tempfile::tempdir()?;
        let model = folder.path().join("model");
        for n in 0..files {
            let path = model.join(format!("part-{}", n / 500));
            fs::create_dir_all(&path)?;
            fs::write(path.join(format!("{n}.bin")), format!("file {n}"))?;
        }
        let layout = format!("oci:{}:v1", folder.path().join("layout").display());
        let packed = Command::new(carport).arg("pack").arg(&model).arg(&layout).output()?;
        ensure!(packed.status.success(), "pack: {}", String::from_utf8_lossy(&packed.stderr));

        let node_setup =
            Setup { layout_folders: vec![folder.path().to_owned()], ..Setup::default() };
        let node = Node::set_up(carport, node_setup).context("run the bench as root")?;
        let pod = node.pod("pod");
        node.publish(&pod, &layout).await?;
        node.unpublish(&pod).await?;
        let mut client = node.csi().await;
        let request = publish_request(&pod, &[("image", layout.as_str())]);
        let unpublish = csi::NodeUnpublishVolumeRequest {
            volume_id: pod.volume_id.clone(),
            target_path: pod.target.display().to_string(),
        };
        let mut p99s = Vec::new();
        for _ in 0..RUNS {
            let mut seconds = Vec::with_capacity(PUBLISHES);
            for _ in 0..PUBLISHES {
                let start = Instant::now();
                client.node_publish_volume(request.clone()).await?;
                seconds.push(start.elapsed().as_secs_f64());
                client.node_unpublish_volume(unpublish.clone()).await?;
            }
            p99s.push(quantile(seconds, 0.99));
        }
        report.add(Figure {
            name: "publish_cached_seconds_p99",
            unit: "s",
            values: p99s,
            peer: None,
            setup,
        })?;
    }
    Ok(())
}
