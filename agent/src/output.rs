//! What goes to standard output: a table or lines for people, or one JSON value.
//!
//! Field names of the JSON are part of the interface: `--help` of each command lists them.

use std::io::Write as _;
use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use bytesize::ByteSize;
use serde::{Serialize, Serializer};

use crate::cli::Output;

/// Writes `value` as JSON, or what `text` makes of it.
///
/// # Errors
///
/// When standard output is closed.
pub fn print<T: Serialize + ?Sized>(
    output: Output,
    value: &T,
    text: impl FnOnce(&T) -> String,
) -> anyhow::Result<()> {
    let mut rendered = match output {
        Output::Json => serde_json::to_string_pretty(value).context("write json")?,
        Output::Text | Output::Wide => text(value),
    };
    if !rendered.is_empty() && !rendered.ends_with('\n') {
        rendered.push('\n');
    }
    let mut out = std::io::stdout().lock();
    match out.write_all(rendered.as_bytes()).and_then(|()| out.flush()) {
        // `carport ls | head` is no failure.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        result => result.context("write to standard output"),
    }
}

/// A table without lines between, as kubectl's.
pub fn table(header: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut table = comfy_table::Table::new();
    table.load_preset(comfy_table::presets::NOTHING);
    table.set_header(header.to_vec());
    table.add_rows(rows);
    // A row is a line, however long, so that a pipe can read it.
    table.set_content_arrangement(comfy_table::ContentArrangement::Disabled);
    let columns = table.column_count();
    for (index, column) in table.column_iter_mut().enumerate() {
        column.set_padding((0, if index + 1 == columns { 0 } else { 2 }));
    }
    table.trim_fmt()
}

/// `1.5 GiB`.
pub fn size(bytes: u64) -> String {
    ByteSize(bytes).display().iec().to_string()
}

/// `1.5 GiB`, or `-` where it is not known.
pub fn size_or_dash(bytes: Option<u64>) -> String {
    bytes.map_or_else(|| "-".into(), size)
}

/// `3.2s`, `4m 10s`.
pub fn span(duration: Duration) -> String {
    if duration < Duration::from_secs(60) {
        return format!("{:.1}s", duration.as_secs_f64());
    }
    humantime::format_duration(Duration::from_secs(duration.as_secs())).to_string()
}

/// `2026-01-31T10:00:00Z`.
pub fn time(at: SystemTime) -> String {
    humantime::format_rfc3339_seconds(at).to_string()
}

/// Writes a time as [`time`] does.
///
/// # Errors
///
/// The serializer's.
pub fn write_time<S: Serializer>(at: &SystemTime, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(&time(*at))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_a_line() {
        let rows = vec![vec!["a".into(), "1".into()], vec!["bbb".into(), "2".into()]];
        assert_eq!(table(&["NAME", "N"], rows), "NAME  N\na     1\nbbb   2");
    }

    #[test]
    fn figures_read_well() {
        assert_eq!(size(3 << 29), "1.5 GiB");
        assert_eq!(span(Duration::from_millis(3210)), "3.2s");
        assert_eq!(span(Duration::from_secs(250)), "4m 10s");
        assert_eq!(time(SystemTime::UNIX_EPOCH), "1970-01-01T00:00:00Z");
    }
}
