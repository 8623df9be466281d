//! Figures in messages for people.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytesize::ByteSize;

/// The last second that RFC 3339 can write; what a record says may lie behind it.
const LAST_SECOND: u64 = 253_402_300_799;

/// `1.5 GiB`.
pub(super) fn size(bytes: u64) -> String {
    ByteSize(bytes).display().iec().to_string()
}

/// `2026-01-31T10:00:00Z`.
pub(super) fn date(at: SystemTime) -> String {
    let seconds = at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let at = UNIX_EPOCH + Duration::from_secs(seconds.min(LAST_SECOND));
    humantime::format_rfc3339_seconds(at).to_string()
}

/// `2h 5m`, in whole seconds.
pub(super) fn span(time: Duration) -> String {
    humantime::format_duration(Duration::from_secs(time.as_secs())).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_that_nobody_can_write_is_told_as_the_nearest_one() {
        assert_eq!(date(UNIX_EPOCH + Duration::from_secs(1 << 50)), "9999-12-31T23:59:59Z");
        assert_eq!(date(UNIX_EPOCH - Duration::from_secs(5)), "1970-01-01T00:00:00Z");
    }
}
