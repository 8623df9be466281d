//! `carport verify`.

use std::io::IsTerminal as _;
use std::sync::Arc;
use std::time::Instant;

use anyhow::bail;
use carport_image::pull::{Damage, Outcome, VerifyOptions};
use carport_image::store::VerifyControl;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use super::{images, open_puller};
use crate::cli::{Output, VerifyArgs};
use crate::config::Config;
use crate::output::{print, size};
use crate::progress::TICK;

/// What a verification found.
#[derive(Debug, Serialize)]
struct Verified {
    objects: u64,
    bytes: u64,
    images: u64,
    fetched_bytes: u64,
    seconds: f64,
    sound: bool,
    damage: Vec<Damage>,
}

pub(super) async fn run(
    output: Output,
    mut config: Config,
    arguments: VerifyArgs,
) -> anyhow::Result<()> {
    arguments.registry.apply(&mut config);
    let puller = open_puller(&config)?;
    let find = |name: &String| images::find(puller.store(), name);
    let images = arguments.references.iter().map(find).collect::<anyhow::Result<Vec<_>>>()?;
    let rate = arguments.rate.map_or(0, |rate| rate.bytes_per_second().get());
    let control = Arc::new(VerifyControl::new(rate));
    let options = VerifyOptions { images, repair: !arguments.no_repair, first_part: 0 };
    let began = Instant::now();
    let verifying = puller.verify(options, Arc::clone(&control));
    tokio::pin!(verifying);
    let bar = match output != Output::Json && std::io::stderr().is_terminal() {
        true => ProgressBar::new(0).with_style(style()),
        false => ProgressBar::hidden(),
    };
    let mut tick = tokio::time::interval(TICK);
    let interrupted = tokio::signal::ctrl_c();
    tokio::pin!(interrupted);
    let report = loop {
        tokio::select! {
            report = &mut verifying => break report?,
            _ = &mut interrupted, if !control.is_stopped() => control.stop(),
            _ = tick.tick() => {
                let now = control.progress();
                bar.set_length(now.total_bytes);
                bar.set_position(now.bytes);
                bar.set_message(format!("{} damaged", now.damaged));
            }
        }
    };
    bar.finish_and_clear();
    let sound = report.is_sound();
    let verified = Verified {
        objects: report.objects,
        bytes: report.bytes,
        images: report.images,
        fetched_bytes: report.fetched_bytes,
        seconds: began.elapsed().as_secs_f64(),
        sound,
        damage: report.damage,
    };
    print(output, &verified, told)?;
    if !report.complete {
        bail!("interrupted; what is told above was found before");
    }
    if !sound {
        bail!("the store is damaged; see above");
    }
    Ok(())
}

fn told(verified: &Verified) -> String {
    let mut text = String::new();
    for damage in &verified.damage {
        let outcome = match damage.outcome {
            Outcome::Found => "damaged",
            Outcome::Repaired => "repaired",
            Outcome::Lost => "lost",
        };
        text += &format!("{outcome}: {} {}\n", damage.path, damage.why);
        for image in &damage.images {
            text += &format!("  of image {image}\n");
        }
        if let Some(message) = &damage.message {
            text += &format!("  not repaired: {message}\n");
        }
    }
    let repaired = verified.damage.iter().any(|damage| damage.outcome == Outcome::Repaired);
    if repaired {
        text += "pods that have a repaired file open read the old bytes until they open it again: start \
                 them again\n";
    }
    if verified.damage.iter().any(|damage| damage.outcome == Outcome::Lost) {
        text += "images with lost files are pulled again when they are next asked for; pods that use \
                 them should be started again\n";
    }
    text + &format!(
        "{} read in {} files, {} images; {} fetched for repair; {}",
        size(verified.bytes),
        verified.objects,
        verified.images,
        size(verified.fetched_bytes),
        if verified.sound { "all is sound" } else { "not all is sound" },
    )
}

fn style() -> ProgressStyle {
    ProgressStyle::with_template("{bar:30} {bytes}/{total_bytes} {bytes_per_sec} {eta} {msg}")
        .unwrap_or_else(|_| ProgressStyle::default_bar())
}
