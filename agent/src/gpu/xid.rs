//! The driver's error numbers (XIDs): which of them end a GPU's use, and what to do.
//!
//! NVIDIA's catalogue has some hundred and fifty. An application's own mistakes are among
//! them (13, 31, 43, 45 …): those say nothing about the GPU. Here are those after which NVIDIA
//! wants the GPU reset, the node restarted or the board looked at. `docs/gpu.md` has the
//! table; a test holds it true.

/// Those that make a GPU unhealthy unless the configuration says otherwise.
pub const FATAL: [u32; 16] =
    [46, 48, 54, 62, 64, 74, 79, 95, 109, 110, 119, 120, 136, 140, 143, 158];

/// What an error number means, in a few words.
pub(crate) fn meaning(xid: u64) -> &'static str {
    match xid {
        13 => "an application's error in graphics or compute",
        31 => "an application read or wrote where it has no memory",
        43 => "an application was stopped",
        45 => "an application's work was cleared away",
        46 => "the GPU stopped processing",
        48 => "a memory error beyond correction",
        54 => "auxiliary power is not connected",
        62 => "the GPU's microcontroller halted",
        63 => "a row of memory is to be replaced at the next reset",
        64 => "a row of memory could not be replaced",
        68 => "an exception in the video processor",
        74 => "an NVLink error",
        79 => "the GPU has fallen off the bus",
        92 => "many memory errors that were corrected",
        94 => "a memory error that was contained in one application",
        95 => "a memory error that was not contained",
        109 => "a switch between applications took too long",
        110 => "a security fault",
        119 => "the GPU's system processor (GSP) does not answer",
        120 => "the GPU's system processor (GSP) failed",
        136 => "an NVLink could not be trained",
        140 => "an uncorrectable error in the GPU's units",
        143 => "the GPU could not be initialised",
        154 => "what the driver wants done has changed",
        158 => "the GPU did not answer in time",
        _ => "see NVIDIA's XID catalogue",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_document_has_the_table() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/gpu.md");
        let document = std::fs::read_to_string(path).unwrap();
        for xid in FATAL {
            let row = format!("| {xid} | {} |", meaning(xid.into()));
            assert!(document.contains(&row), "docs/gpu.md lacks {row}");
        }
        let rows = document.lines().filter(|line| {
            line.split('|').nth(1).is_some_and(|cell| cell.trim().parse::<u32>().is_ok())
        });
        assert_eq!(rows.count(), FATAL.len(), "docs/gpu.md has rows for other numbers");
    }
}
