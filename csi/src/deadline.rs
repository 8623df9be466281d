//! Until when a call may take: the caller's deadline, less the time to answer.

use std::time::Duration;

use tokio::time::Instant;
use tonic::metadata::MetadataMap;

/// For callers that set none. Below the two minutes that the kubelet waits, should a
/// proxy have lost the header.
const WITHOUT_DEADLINE: Duration = Duration::from_secs(110);

/// An answer must be there before the deadline; this is enough on a loaded node, and
/// a tenth of the whole is where that is shorter.
const TO_ANSWER: Duration = Duration::from_secs(1);

/// When to answer a call that arrived now.
pub(crate) fn deadline(metadata: &MetadataMap) -> Instant {
    let header = metadata.get("grpc-timeout").and_then(|value| value.to_str().ok());
    Instant::now() + budget(header.and_then(parse))
}

fn budget(timeout: Option<Duration>) -> Duration {
    match timeout {
        None => WITHOUT_DEADLINE,
        Some(timeout) => timeout - TO_ANSWER.min(timeout / 10),
    }
}

/// `grpc-timeout`: up to 8 digits and a unit.
/// <https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md>
fn parse(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let count: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(count * 3600)),
        "M" => Some(Duration::from_secs(count * 60)),
        "S" => Some(Duration::from_secs(count)),
        "m" => Some(Duration::from_millis(count)),
        "u" => Some(Duration::from_micros(count)),
        "n" => Some(Duration::from_nanos(count)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_is_read() {
        assert_eq!(parse("120S"), Some(Duration::from_secs(120)));
        assert_eq!(parse("119999990u"), None);
        assert_eq!(parse("99999990u"), Some(Duration::from_micros(99_999_990)));
        assert_eq!(parse("2M"), Some(Duration::from_secs(120)));
        assert_eq!(parse("1H"), Some(Duration::from_secs(3600)));
        assert_eq!(parse("5m"), Some(Duration::from_millis(5)));
        assert_eq!(parse("7n"), Some(Duration::from_nanos(7)));
        for wrong in ["", "S", "1", "1s", "-1S", "+1S", "1 S", "1é"] {
            assert_eq!(parse(wrong), None, "{wrong:?}");
        }
    }

    #[test]
    fn the_answer_goes_out_before_the_deadline() {
        assert_eq!(budget(Some(Duration::from_secs(120))), Duration::from_secs(119));
        assert_eq!(budget(Some(Duration::from_secs(1))), Duration::from_millis(900));
        assert_eq!(budget(Some(Duration::ZERO)), Duration::ZERO);
        assert_eq!(budget(None), Duration::from_secs(110));
    }
}
