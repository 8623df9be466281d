//! `carport plan`: what pulls would do.

use std::time::Duration;

use carport_image::pull::{Plan, PlannedImage, PullPolicy, PullRequest};
use carport_image::store::{EvictedImage, Room};
use serde::Serialize;

use super::open_puller;
use crate::cli::{Output, PlanArgs};
use crate::config::Config;
use crate::output::{print, size, span, table};

/// A plan as it is printed.
#[derive(Debug, Serialize)]
struct Shown {
    images: Vec<PlannedImage>,
    download_bytes: u64,
    missing_bytes: u64,
    needed_bytes: u64,
    at_least: bool,
    fits: bool,
    eta_seconds: Option<f64>,
    evict: Vec<EvictedImage>,
    room: Room,
}

impl From<Plan> for Shown {
    fn from(plan: Plan) -> Self {
        Self {
            images: plan.images,
            download_bytes: plan.download_bytes,
            missing_bytes: plan.missing_bytes,
            needed_bytes: plan.needed_bytes,
            at_least: plan.at_least,
            fits: plan.fits,
            eta_seconds: plan.eta.map(|eta| eta.as_secs_f64()),
            evict: plan.evict,
            room: plan.room,
        }
    }
}

pub(super) async fn run(
    output: Output,
    mut config: Config,
    arguments: PlanArgs,
) -> anyhow::Result<()> {
    arguments.registry.apply(&mut config);
    let puller = open_puller(&config)?;
    let policy = if arguments.always { PullPolicy::Always } else { PullPolicy::IfNotPresent };
    let requests: Vec<PullRequest> = arguments
        .references
        .into_iter()
        .map(|reference| PullRequest { policy, ..PullRequest::new(reference) })
        .collect();
    let plan = puller.plan(&requests).await?;
    print(output, &Shown::from(plan), |plan| text(plan, &config))
}

fn text(plan: &Shown, config: &Config) -> String {
    let rows = plan.images.iter().map(|image| {
        vec![
            image.reference.to_string(),
            super::ask::short(&image.digest.to_string()),
            if image.present { "ready" } else { "missing" }.into(),
            size(image.download_bytes),
            size(image.missing_bytes),
        ]
    });
    let mut text = table(&["REFERENCE", "DIGEST", "STATE", "SIZE", "TO FETCH"], rows);
    let time = match plan.eta_seconds {
        Some(seconds) if plan.missing_bytes > 0 => {
            let eta = Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX);
            format!(", about {}", span(eta))
        }
        _ => String::new(),
    };
    text += &format!(
        "\n\nto fetch  {} of {}{time}\n",
        size(plan.missing_bytes),
        size(plan.download_bytes)
    );
    let of = match config.store.quota {
        Some(_) => "of the quota of",
        None => "of a file system of",
    };
    text += &format!(
        "to write  {}{}; {} free {of} {}\n",
        if plan.at_least { "at least " } else { "" },
        size(plan.needed_bytes),
        size(plan.room.space.free_bytes),
        size(plan.room.space.limit_bytes)
    );
    for image in &plan.evict {
        let digest = image.digest.to_string();
        let name = image.references.first().unwrap_or(&digest);
        let idle = span(Duration::from_secs(image.idle_seconds));
        text += &format!("evict     {name}: {}, not used for {idle}\n", size(image.freed_bytes));
    }
    text += match (plan.fits, plan.evict.is_empty()) {
        (true, true) => "fits      yes\n",
        (true, false) => "fits      yes, after these evictions\n",
        (false, _) => "fits      no\n",
    };
    text
}
