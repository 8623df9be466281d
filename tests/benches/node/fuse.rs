//! What the process takes that serves streaming volumes: while nothing arrives, and while something does.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::Context as _;
use carport_csi::fuse;
use carport_tests::node::{Node, Setup, eventually};
use rustix::process::Pid;

use crate::measure::resident;
use crate::model::Model;
use crate::report::{Figure, Report};

const FILES: usize = 2;
const FILE_BYTES: usize = 512 << 20;
const POLL: Duration = Duration::from_millis(20);
/// What was freed has gone back by then.
const IDLE: Duration = Duration::from_secs(70);

pub(crate) async fn run(carport: &Path, report: &mut Report) -> anyhow::Result<()> {
    let model = Model::pack(carport, FILES, FILE_BYTES)?;
    let setup = Setup {
        config: Some("{stream: {start: false}, pull: {bandwidth: 100MB/s}}".into()),
        ..Setup::plain_http(&[model.registry.host()])
    };
    let node = Node::set_up(carport, setup).context("run the bench as root")?;
    let mut fuse = tokio::process::Command::from(node.within(carport));
    let fuse = fuse.arg("fuse").stdout(Stdio::null()).kill_on_drop(true).spawn()?;
    let pid =
        fuse.id().and_then(|pid| Pid::from_raw(pid.try_into().ok()?)).context("no process")?;
    let socket = node.socket().with_file_name("stream").join("fuse.sock");
    let listens = async || std::os::unix::net::UnixStream::connect(&socket).is_ok();
    eventually("`carport fuse` serves", listens).await;
    tokio::time::sleep(IDLE).await;
    let before = resident(pid)?;

    let pod = node.pod("pod");
    node.publish_with(&pod, &[("image", &model.reference), ("mode", "stream")]).await?;
    let shown = node.inside(&pod.target).join("models");
    // What is wanted last comes first, so that both ends of the image are under way.
    let reader = tokio::task::spawn_blocking(move || {
        for n in (1..=FILES).rev() {
            let file = std::fs::File::open(shown.join(format!("model-{n:05}.safetensors")));
            std::io::copy(&mut file?, &mut std::io::sink())?;
        }
        std::io::Result::Ok(())
    });
    let mut while_it_arrives = Vec::new();
    while !reader.is_finished() {
        while_it_arrives.push(resident(pid)?);
        tokio::time::sleep(POLL).await;
    }
    reader.await??;
    let streams = async || {
        let mounts = node.mounts_below(&pod.target);
        mounts.last().is_some_and(|mount| mount.contains(fuse::FS_TYPE))
    };
    eventually("the volume is native", async || !streams().await).await;
    node.unpublish(&pod).await?;
    tokio::time::sleep(IDLE).await;
    let after = resident(pid)?;
    drop(fuse);
    let peak = while_it_arrives.into_iter().fold(0.0, f64::max);
    for (name, bytes, setup) in [
        (
            "fuse_idle_memory_bytes",
            before,
            "resident memory of `carport fuse` that has served nothing yet",
        ),
        (
            "fuse_stream_memory_bytes",
            peak,
            "its most while a pod reads an image of two files of 512 MiB that arrives at 100 MB/s",
        ),
        ("fuse_idle_again_memory_bytes", after, "a minute after that has ended"),
    ] {
        report.add(Figure { name, unit: "B", values: vec![bytes], peer: None, setup })?;
    }
    Ok(())
}
