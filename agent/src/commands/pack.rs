//! `carport pack`.

use std::io::IsTerminal as _;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context as _;
use carport_image::pack::{PackOptions, PackPhase, pack};
use indicatif::ProgressBar;
use serde::Serialize;

use crate::cli::{Output, PackArgs};
use crate::config::Config;
use crate::output::{print, size, span};
use crate::progress::counting;

#[derive(Debug, Serialize)]
struct Done {
    destination: String,
    digest: String,
    layers: usize,
    bytes: u64,
}

pub(super) async fn run(
    output: Output,
    mut config: Config,
    arguments: PackArgs,
) -> anyhow::Result<()> {
    arguments.registry.apply(&mut config);
    config.check()?;
    // With the node's containerd, where the base may be.
    let sources = config.sources()?;
    let source = std::path::absolute(&arguments.source).context("find the current folder")?;
    let destination = arguments.destination;
    let quiet = output == Output::Json;
    let bar = (!quiet && std::io::stderr().is_terminal())
        .then(|| ProgressBar::no_length().with_style(counting()));
    if bar.is_none() && !quiet {
        eprintln!("packing {} to {destination}", source.display());
    }
    let mut options = PackOptions {
        title: arguments.title,
        base: arguments.base,
        platform: arguments.platform.unwrap_or_default(),
        ..Default::default()
    };
    if let Some(bar) = &bar {
        let bar = bar.clone();
        options.progress = Some(Arc::new(move |progress| {
            bar.set_prefix(match progress.phase {
                PackPhase::Hashing => "hash",
                PackPhase::Writing => "write",
            });
            bar.set_length(progress.total_bytes);
            bar.set_position(progress.done_bytes);
        }));
    }
    let started = Instant::now();
    let packed = tokio::select! {
        packed = pack(&source, &destination, options, &sources) => packed,
        _ = tokio::signal::ctrl_c() => anyhow::bail!("pack {}: interrupted", source.display()),
    };
    if let Some(bar) = &bar {
        bar.finish_and_clear();
    }
    let packed = packed?;
    if !quiet {
        let (bytes, elapsed) = (size(packed.bytes), span(started.elapsed()));
        eprintln!("packed {destination}: {} layers, {bytes} in {elapsed}", packed.layers);
    }
    let done = Done {
        destination: destination.to_string(),
        digest: packed.digest.to_string(),
        layers: packed.layers,
        bytes: packed.bytes,
    };
    print(output, &done, |done| format!("{} {}", done.digest, done.destination))
}
