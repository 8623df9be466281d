//! `make bench`: carport beside its peers, in one run, interleaved.
//!
//! Prints a table, and appends one JSON object a figure to `target/bench/results.jsonl`. Ratio is
//! carport ÷ peer for costs. Peers that are not installed are left out, and said so.
//!
//! What is measured of a process is the kernel's own account: wall time, CPU time of all its
//! threads, bytes it caused to be written, peak of its resident memory. The registry's share is
//! its own process, and not counted.

use std::path::{Path, PathBuf};

use anyhow::Context as _;

mod containerd;
mod finetune;
mod fuse;
mod ingest;
mod links;
mod locality;
mod measure;
mod model;
mod packed;
mod podman;
mod publish;
mod pull;
mod report;
mod resume;
mod stream;
mod swap;
mod volume;

use report::Report;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    if let Some(file) = swap::pod() {
        return swap::run_pod(Path::new(&file));
    }
    // Cargo's own flags for benches mean nothing here; one that is no flag chooses figures by name.
    let only = std::env::args().skip(1).find(|argument| !argument.starts_with('-'));
    let wanted = |name: &str| only.as_deref().is_none_or(|only| name.contains(only));
    let carport = carport_tests::carport::binary();
    let mut report = Report::open(&target().join("bench/results.jsonl"))?;
    if wanted("pull") {
        pull::run(carport, &mut report).await.context("bench of pulls")?;
    }
    if wanted("packed") {
        packed::run(carport, &mut report).await.context("bench of compressed images")?;
    }
    if wanted("resume") {
        resume::run(carport, &mut report).await.context("bench of interrupted pulls")?;
    }
    if wanted("finetune") {
        finetune::run(carport, &mut report).context("bench of a fine-tune's pull")?;
    }
    if wanted("ingest") {
        ingest::run(carport, &mut report).context("bench of what containerd has")?;
    }
    if wanted("links") {
        links::run(carport, &mut report).await.context("bench of files shared with containerd")?;
    }
    if wanted("publish") {
        publish::run(carport, &mut report).await.context("bench of publishes")?;
    }
    if wanted("volume") {
        volume::run(carport, &mut report).await.context("bench of volumes")?;
    }
    if wanted("locality") {
        locality::run(carport, &mut report).await.context("bench of the API")?;
    }
    if wanted("fuse") {
        fuse::run(carport, &mut report).await.context("bench of the sessions' process")?;
    }
    if wanted("stream") {
        stream::run(carport, &mut report).context("bench of streaming")?;
    }
    if wanted("stream_swap") {
        swap::run(&mut report).context("bench of turning native")?;
    }
    if wanted("stream_local") {
        stream::local(carport, &mut report).context("bench of what has arrived")?;
    }
    report.table();
    Ok(())
}

fn target() -> PathBuf {
    let this = std::env::current_exe().unwrap_or_default();
    // <target>/release/deps/<bench>
    this.ancestors().nth(3).unwrap_or(Path::new("target")).to_owned()
}
