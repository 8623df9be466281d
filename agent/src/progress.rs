//! What a person sees while images are pulled by a command.
//!
//! On a terminal a bar a pull (bytes, rate, time left) and one for all; elsewhere one line when a
//! pull starts and one, with figures, when it ends; nothing where JSON was asked for. All
//! of it goes to standard error.

use std::io::IsTerminal as _;
use std::time::Duration;

use carport_image::pull::{PullProgress, PullState, Pulled};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use crate::cli::Output;
use crate::output::{size, span};

/// Often enough for the eye, and no load.
pub const TICK: Duration = Duration::from_millis(100);

/// How the progress of some pulls is shown.
pub enum Progress {
    /// Bars, one a pull in the order they were given, then one for all.
    Bars {
        /// One a pull.
        each: Vec<ProgressBar>,
        /// The sum; hidden where there is one pull.
        total: ProgressBar,
        /// What draws them.
        screen: MultiProgress,
    },
    /// Lines at start and end.
    Lines,
    /// Nothing.
    Silent,
}

impl Progress {
    /// Fitting for where standard error goes; announces each of `names`.
    pub fn start(output: Output, names: &[String]) -> Self {
        if output == Output::Json {
            return Self::Silent;
        }
        if !std::io::stderr().is_terminal() {
            for name in names {
                eprintln!("pulling {name}");
            }
            return Self::Lines;
        }
        let screen = MultiProgress::new();
        let each = names
            .iter()
            .map(|name| {
                let bar = screen.add(ProgressBar::no_length().with_style(waiting()));
                bar.set_prefix(name.clone());
                bar.enable_steady_tick(TICK);
                bar
            })
            .collect();
        let total = match names {
            [] | [_] => ProgressBar::hidden(),
            _ => screen.add(ProgressBar::no_length().with_style(counting())),
        };
        total.set_prefix("total");
        Self::Bars { each, total, screen }
    }

    /// Shows where all pulls are; `pulls` in the order of the names.
    pub fn update(&self, pulls: &[PullProgress]) {
        let Self::Bars { each, total, .. } = self else { return };
        for (bar, pull) in each.iter().zip(pulls).filter(|(bar, _)| !bar.is_finished()) {
            if pull.total_bytes > 0 && bar.length().is_none() {
                bar.set_style(counting());
            }
            if pull.total_bytes > 0 {
                bar.set_length(pull.total_bytes);
                bar.set_position(pull.done_bytes);
            }
            bar.set_message(phase(&pull.state));
        }
        total.set_length(pulls.iter().map(|pull| pull.total_bytes).sum());
        total.set_position(pulls.iter().map(|pull| pull.done_bytes).sum());
    }

    /// Says that pull number `index` is done.
    pub fn done(&self, index: usize, name: &str, pulled: &Pulled, elapsed: Duration) {
        let line = summary(name, pulled, elapsed);
        match self {
            Self::Bars { each, screen, .. } => {
                each[index].finish_and_clear();
                // A screen that cannot be written to is no reason to fail a pull.
                let _ = screen.println(line);
            }
            Self::Lines => eprintln!("{line}"),
            Self::Silent => {}
        }
    }

    /// Takes a failed pull's bar away; the error itself is the caller's to print.
    pub fn failed(&self, index: usize) {
        if let Self::Bars { each, .. } = self {
            each[index].finish_and_clear();
        }
    }

    /// Leaves the screen as it found it.
    pub fn finish(&self) {
        if let Self::Bars { each, total, .. } = self {
            each.iter().for_each(ProgressBar::finish_and_clear);
            total.finish_and_clear();
        }
    }
}

fn summary(name: &str, pulled: &Pulled, elapsed: Duration) -> String {
    let digest = pulled.digest.short();
    let unpacked = size(pulled.image.unpacked_bytes);
    if pulled.already_present {
        return format!("present {name}: {digest}, {unpacked}");
    }
    #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let rate = (pulled.fetched_bytes as f64 / elapsed.as_secs_f64().max(0.001)) as u64;
    format!(
        "pulled {name}: {digest}, {unpacked}; {} fetched, {} written in {} ({}/s)",
        size(pulled.fetched_bytes),
        size(pulled.written_bytes),
        span(elapsed),
        size(rate)
    )
}

fn phase(state: &PullState) -> &'static str {
    match state {
        PullState::Resolving => "resolving",
        PullState::Pulling => "",
        PullState::Finishing => "finishing",
        PullState::Done => "done",
        PullState::Failed { .. } => "failed",
    }
}

fn waiting() -> ProgressStyle {
    style("{spinner} {prefix} {msg}")
}

/// Bytes, rate and time left.
pub fn counting() -> ProgressStyle {
    style(
        "{prefix} {wide_bar} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta} {msg}",
    )
}

fn style(template: &str) -> ProgressStyle {
    // Templates are constants of this file; the test below reads them all.
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn templates_are_valid() {
        for style in [waiting(), counting()] {
            ProgressBar::hidden().with_style(style).tick();
        }
        assert!(ProgressStyle::with_template("{prefix} {wide_bar} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta} {msg}").is_ok());
    }
}
