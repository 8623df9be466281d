//! A pull's progress in one sentence, for pod events.

use std::time::Duration;

use carport_image::pull::{PullProgress, PullState};

/// `image R: 1.2 GiB of 14.0 GiB (8 %) at 120.0 MiB/s, about 1m 49s left`.
pub(super) fn sentence(progress: &PullProgress) -> String {
    let image = &progress.reference;
    match &progress.state {
        PullState::Resolving => format!("image {image}: asking the registry"),
        PullState::Finishing | PullState::Done => {
            format!("image {image}: all bytes are here and are being put in place")
        }
        PullState::Failed { message: why, .. } => format!("image {image}: {why}"),
        PullState::Pulling if progress.total_bytes == 0 => {
            format!("image {image}: {} fetched", bytes(progress.done_bytes as f64))
        }
        PullState::Pulling => {
            let percent = progress.done_bytes.saturating_mul(100) / progress.total_bytes;
            let mut text = format!(
                "image {image}: {} of {} ({percent} %) at {}/s",
                bytes(progress.done_bytes as f64),
                bytes(progress.total_bytes as f64),
                bytes(progress.bytes_per_second),
            );
            if let Some(left) = progress.eta() {
                text += &format!(", about {} left", duration(left));
            }
            text
        }
    }
}

fn bytes(count: f64) -> String {
    let units = ["KiB", "MiB", "GiB", "TiB"];
    if count < 1024.0 {
        return format!("{count:.0} B");
    }
    let mut value = count / 1024.0;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", units[unit])
}

fn duration(left: Duration) -> String {
    match left.as_secs() {
        seconds @ 0..=59 => format!("{seconds}s"),
        seconds @ 60..=3599 => format!("{}m {}s", seconds / 60, seconds % 60),
        seconds => format!("{}h {}m", seconds / 3600, seconds % 3600 / 60),
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;

    fn progress(state: PullState) -> PullProgress {
        PullProgress {
            reference: "registry.example/model:v1".parse().unwrap(),
            digest: None,
            state,
            priority: carport_image::pull::Priority::Demand,
            done_bytes: 1_288_490_189,
            fetched_bytes: 1_288_490_189,
            total_bytes: 15_032_385_536,
            started_at: SystemTime::UNIX_EPOCH,
            bytes_per_second: 125_829_120.0,
        }
    }

    #[test]
    fn a_pull_tells_how_far_it_is_and_how_long_it_takes() {
        assert_eq!(
            sentence(&progress(PullState::Pulling)),
            "image registry.example/model:v1: 1.2 GiB of 14.0 GiB (8 %) at 120.0 MiB/s, \
             about 1m 49s left"
        );
        assert_eq!(
            sentence(&progress(PullState::Resolving)),
            "image registry.example/model:v1: asking the registry"
        );
        let unknown =
            PullProgress { total_bytes: 0, done_bytes: 12, ..progress(PullState::Pulling) };
        assert_eq!(sentence(&unknown), "image registry.example/model:v1: 12 B fetched");
    }

    #[test]
    fn long_waits_are_told_in_hours() {
        assert_eq!(duration(Duration::from_secs(59)), "59s");
        assert_eq!(duration(Duration::from_secs(7_384)), "2h 3m");
    }
}
