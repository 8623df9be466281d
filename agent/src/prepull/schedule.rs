//! At which times an entry may be pulled: windows of the week, in a time zone of their own.
//!
//! A window that ends before it begins goes over midnight and belongs to the day it begins on.
//! Only the wall clock is asked, and afresh each time: a clock that jumps opens and closes windows
//! as it says, and nothing is remembered that could be wrong then.

use jiff::civil::{Time, Weekday};
use jiff::tz::TimeZone;
use jiff::{Timestamp, ToSpan as _};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer};

/// A time of the week.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Window {
    /// On which days it begins. Empty: on all.
    #[serde(default)]
    pub days: Vec<Day>,
    /// Its first minute.
    #[serde(deserialize_with = "time")]
    pub from: Time,
    /// The minute when it is over; the same as `from` is a whole day.
    #[serde(deserialize_with = "time")]
    pub to: Time,
    /// Whose clock; UTC by default.
    #[serde(default = "utc", deserialize_with = "zone")]
    pub time_zone: TimeZone,
}

/// A day of the week.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs, reason = "they are what they are called")]
pub enum Day {
    Mon,
    Tue,
    Wed,
    Thu,
    Fri,
    Sat,
    Sun,
}

impl From<Day> for Weekday {
    fn from(day: Day) -> Self {
        match day {
            Day::Mon => Self::Monday,
            Day::Tue => Self::Tuesday,
            Day::Wed => Self::Wednesday,
            Day::Thu => Self::Thursday,
            Day::Fri => Self::Friday,
            Day::Sat => Self::Saturday,
            Day::Sun => Self::Sunday,
        }
    }
}

impl Window {
    /// Whether `now` lies in it.
    pub fn is_open(&self, now: Timestamp) -> bool {
        let local = now.to_zoned(self.time_zone.clone());
        let today = local.weekday();
        let time = local.time();
        if self.from < self.to {
            return self.begins_on(today) && (self.from..self.to).contains(&time);
        }
        let yesterday = today.previous();
        (self.begins_on(today) && time >= self.from)
            || (self.begins_on(yesterday) && time < self.to)
    }

    fn begins_on(&self, day: Weekday) -> bool {
        self.days.is_empty() || self.days.iter().any(|own| Weekday::from(*own) == day)
    }
}

/// Whether one of the windows is open; without any it always is.
pub fn is_open(windows: &[Window], now: Timestamp) -> bool {
    windows.is_empty() || windows.iter().any(|window| window.is_open(now))
}

/// When one of the windows opens next, to the minute, for people; looks a week ahead.
pub fn next_open(windows: &[Window], now: Timestamp) -> Option<Timestamp> {
    // Minute by minute would be 10,080 looks a window; each opens only at its own `from`.
    let opening = |window: &Window| {
        let local = now.to_zoned(window.time_zone.clone());
        (0..=7).find_map(|day| {
            let date = local.date().checked_add(day.days()).ok()?;
            let at = date.to_datetime(window.from).to_zoned(window.time_zone.clone()).ok()?;
            let at = at.timestamp();
            (at > now && window.is_open(at)).then_some(at)
        })
    };
    windows.iter().filter_map(opening).min()
}

fn utc() -> TimeZone {
    TimeZone::UTC
}

fn time<'de, D: Deserializer<'de>>(from: D) -> Result<Time, D::Error> {
    let text = String::deserialize(from)?;
    let parsed = text.split_once(':').and_then(|(hour, minute)| {
        let digits = |part: &str| part.len() <= 2 && part.bytes().all(|b| b.is_ascii_digit());
        (digits(hour) && digits(minute))
            .then(|| Time::new(hour.parse().ok()?, minute.parse().ok()?, 0, 0).ok())?
    });
    parsed.ok_or_else(|| D::Error::custom(format!("{text:?}: write a time such as \"22:30\"")))
}

fn zone<'de, D: Deserializer<'de>>(from: D) -> Result<TimeZone, D::Error> {
    let text = String::deserialize(from)?;
    TimeZone::get(&text).map_err(|_| {
        D::Error::custom(format!("{text:?}: write a time zone such as UTC or Europe/Berlin"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn windows(text: &str) -> Vec<Window> {
        serde_saphyr::from_str(text).unwrap()
    }

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    #[test]
    fn a_window_is_open_from_its_first_minute_to_before_its_last() {
        let day = windows("[{from: '08:00', to: '09:30'}]");
        for (time, open) in
            [("07:59:59", false), ("08:00:00", true), ("09:29:59", true), ("09:30:00", false)]
        {
            assert_eq!(is_open(&day, at(&format!("2026-03-02T{time}Z"))), open, "{time}");
        }
        assert!(is_open(&[], at("2026-03-02T00:00:00Z")));
    }

    #[test]
    fn a_night_belongs_to_the_day_it_begins_on() {
        // 2026-03-06 is a Friday.
        let night = windows("[{days: [fri], from: '22:00', to: '06:00'}]");
        for (time, open) in [
            ("2026-03-06T05:00:00Z", false),
            ("2026-03-06T22:00:00Z", true),
            ("2026-03-07T05:59:00Z", true),
            ("2026-03-07T06:00:00Z", false),
            ("2026-03-07T22:30:00Z", false),
        ] {
            assert_eq!(is_open(&night, at(time)), open, "{time}");
        }
        assert_eq!(next_open(&night, at("2026-03-07T05:00:00Z")), Some(at("2026-03-13T22:00:00Z")));
        let whole = windows("[{days: [sun], from: '00:00', to: '00:00'}]");
        assert!(is_open(&whole, at("2026-03-08T23:59:59Z")));
        assert!(!is_open(&whole, at("2026-03-09T00:00:00Z")));
    }

    #[test]
    fn a_zone_s_summer_time_counts() {
        let berlin = windows("[{from: '22:00', to: '23:00', timeZone: Europe/Berlin}]");
        assert!(is_open(&berlin, at("2026-01-15T21:30:00Z")));
        assert!(!is_open(&berlin, at("2026-01-15T20:30:00Z")));
        assert!(is_open(&berlin, at("2026-07-15T20:30:00Z")));
    }
}
