//! Figures: a median each, in a file and a table.

use std::fs::File;
use std::io::Write as _;
use std::path::Path;

use anyhow::Context as _;
use serde_json::json;

/// One figure: what carport took, and what a peer took for the same.
pub(crate) struct Figure<'a> {
    pub(crate) name: &'a str,
    pub(crate) unit: &'a str,
    /// A value a run.
    pub(crate) values: Vec<f64>,
    /// A peer's name, and its values.
    pub(crate) peer: Option<(&'a str, Vec<f64>)>,
    /// What was measured, in words.
    pub(crate) setup: &'a str,
}

pub(crate) struct Report {
    file: File,
    rows: Vec<[String; 5]>,
}

impl Report {
    pub(crate) fn open(path: &Path) -> anyhow::Result<Self> {
        std::fs::create_dir_all(path.parent().unwrap_or(Path::new(".")))?;
        let file = File::options().create(true).append(true).open(path);
        let file = file.with_context(|| format!("open {}", path.display()))?;
        println!("Figures go to {}.", path.display());
        Ok(Self { file, rows: Vec::new() })
    }

    pub(crate) fn add(&mut self, figure: Figure<'_>) -> anyhow::Result<()> {
        let runs = figure.values.len();
        let value = median(figure.values);
        let peer = figure.peer.map(|(name, values)| (name, median(values)));
        let ratio = peer.map(|(_, peer)| value / peer);
        let line = json!({
            "name": figure.name, "value": value, "unit": figure.unit,
            "peer": peer.map(|(name, _)| name), "peer_value": peer.map(|(_, value)| value),
            "ratio": ratio, "runs": runs, "setup": figure.setup,
        });
        writeln!(self.file, "{line}")?;
        self.rows.push([
            figure.name.to_owned(),
            format!("{} {}", short(value), figure.unit),
            peer.map_or_else(String::new, |(name, value)| format!("{name} {}", short(value))),
            ratio.map_or_else(String::new, |ratio| format!("{ratio:.2}")),
            format!("{runs}"),
        ]);
        Ok(())
    }

    pub(crate) fn table(&self) {
        println!("{:<32} {:>20} {:>28} {:>6} {:>5}", "figure", "carport", "peer", "ratio", "runs");
        for [name, value, peer, ratio, runs] in &self.rows {
            println!("{name:<32} {value:>20} {peer:>28} {ratio:>6} {runs:>5}");
        }
    }
}

/// The middle one, or the mean of the two middle ones.
pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => values[middle],
        _ => f64::midpoint(values[middle - 1], values[middle]),
    }
}

/// The value below which `part` of all values lie.
pub(crate) fn quantile(mut values: Vec<f64>, part: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let at = (values.len() as f64 * part).ceil() as usize;
    values.get(at.saturating_sub(1)).copied().unwrap_or(f64::NAN)
}

fn short(value: f64) -> String {
    match value.abs() {
        v if v >= 1e6 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        v if v >= 0.1 => format!("{value:.3}"),
        _ => format!("{value:.5}"),
    }
}
