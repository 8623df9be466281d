//! `carport pull`.

use std::time::Instant;

use anyhow::bail;
use carport_image::pull::{PullHandle, PullPolicy, PullRequest, Pulled};
use carport_image::{PullError, Puller, Reference};
use futures_util::stream::{FuturesUnordered, StreamExt as _};
use serde::Serialize;

use super::{Failures, open_puller};
use crate::cli::{Output, PullArgs};
use crate::config::Config;
use crate::output::print;
use crate::progress::{Progress, TICK};

/// What a pull did.
#[derive(Debug, Serialize)]
struct Done {
    reference: String,
    digest: String,
    packaging: String,
    unpacked_bytes: u64,
    files: u64,
    fetched_bytes: u64,
    written_bytes: u64,
    already_present: bool,
    seconds: f64,
}

pub(super) async fn run(
    output: Output,
    mut config: Config,
    arguments: PullArgs,
) -> anyhow::Result<()> {
    arguments.registry.apply(&mut config);
    config.check()?;
    let puller = open_puller(&config)?;
    let policy = if arguments.always { PullPolicy::Always } else { PullPolicy::IfNotPresent };
    let mut references = arguments.references;
    let mut seen = std::collections::HashSet::new();
    references.retain(|reference| seen.insert(reference.clone()));
    let results = pull_all(output, &puller, &references, policy).await?;
    let (mut done, mut failures) = (Vec::new(), Failures(Vec::new()));
    for (reference, (result, seconds)) in references.iter().zip(results) {
        match result {
            Ok(pulled) => done.push(Done {
                reference: reference.to_string(),
                digest: pulled.digest.to_string(),
                packaging: pulled.image.packaging.to_string(),
                unpacked_bytes: pulled.image.unpacked_bytes,
                files: pulled.image.files,
                fetched_bytes: pulled.fetched_bytes,
                written_bytes: pulled.written_bytes,
                already_present: pulled.already_present,
                seconds,
            }),
            Err(error) => failures.0.push(error.into()),
        }
    }
    print(output, &done, |done| {
        done.iter().map(|one| format!("{} {}\n", one.digest, one.reference)).collect()
    })?;
    failures.into_result()
}

/// One image for a command that needs it, with the same progress.
pub(super) async fn pull_one(
    output: Output,
    puller: &Puller,
    reference: &Reference,
) -> anyhow::Result<Pulled> {
    let references = std::slice::from_ref(reference);
    let mut results = pull_all(output, puller, references, PullPolicy::IfNotPresent).await?;
    Ok(results.remove(0).0?)
}

type Timed = (Result<Pulled, PullError>, f64);

/// Pulls all of `references`; the results in their order, with seconds.
async fn pull_all(
    output: Output,
    puller: &Puller,
    references: &[Reference],
    policy: PullPolicy,
) -> anyhow::Result<Vec<Timed>> {
    let names: Vec<String> = references.iter().map(ToString::to_string).collect();
    let progress = Progress::start(output, &names);
    let started = Instant::now();
    let handles: Vec<PullHandle> = references
        .iter()
        .map(|reference| {
            puller.start(PullRequest { policy, ..PullRequest::new(reference.clone()) })
        })
        .collect();
    let mut waits: FuturesUnordered<_> = handles
        .iter()
        .enumerate()
        .map(|(n, handle)| async move { (n, handle.wait().await) })
        .collect();
    let mut results: Vec<Option<Timed>> = handles.iter().map(|_| None).collect();
    let mut tick = tokio::time::interval(TICK);
    let interrupted = tokio::signal::ctrl_c();
    tokio::pin!(interrupted);
    loop {
        tokio::select! {
            ended = waits.next() => match ended {
                None => break,
                Some((index, result)) => {
                    let elapsed = started.elapsed();
                    match &result {
                        Ok(pulled) => progress.done(index, &names[index], pulled, elapsed),
                        Err(_) => progress.failed(index),
                    }
                    results[index] = Some((result, elapsed.as_secs_f64()));
                }
            },
            _ = tick.tick() => {
                let now: Vec<_> = handles.iter().map(PullHandle::progress).collect();
                progress.update(&now);
            }
            _ = &mut interrupted => {
                progress.finish();
                puller.shutdown().await;
                bail!("interrupted; run the same command again to go on where it stopped");
            }
        }
    }
    progress.finish();
    Ok(results.into_iter().flatten().collect())
}
