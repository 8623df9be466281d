//! How fast registries have been for this node: `rates/<hash of the host>.json`.
//!
//! Pulls note what they saw; eviction and plans ask how long an image would take to come again. A
//! record that is lost costs an estimate, nothing else.

use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use super::error::StoreError;
use super::{Records, Store, ref_name};

/// A pull of less says more of the round trips than of the rate.
const WORTH_NOTING_BYTES: u64 = 8 << 20;

/// How much a new pull counts against all before it.
const WEIGHT: f64 = 0.3;

/// Registries remembered. A node speaks to a handful; what pods write must not fill a folder.
const MAX_HOSTS: usize = 64;

#[derive(Debug, Serialize, Deserialize)]
struct RateRecord {
    /// `registry.example:5000`; empty for folders of this machine.
    host: String,
    bytes_per_second: f64,
    noted_at: SystemTime,
}

impl Store {
    /// Notes what a pull of `bytes` from `host` took; empty for folders of this machine.
    pub(crate) fn note_rate(
        &self,
        host: &str,
        bytes: u64,
        took: Duration,
    ) -> Result<(), StoreError> {
        if bytes < WORTH_NOTING_BYTES {
            return Ok(());
        }
        let seen = bytes as f64 / took.as_secs_f64().max(0.001);
        let records = self.rate_records();
        let name = ref_name(host);
        let bytes_per_second = match self.rate(host)? {
            Some(known) => known + WEIGHT * (seen - known),
            None => seen,
        };
        self.forget_rates_beyond(MAX_HOSTS - 1, &name)?;
        let noted_at = SystemTime::now();
        records.put(&name, &RateRecord { host: host.to_owned(), bytes_per_second, noted_at })
    }

    /// Bytes per second that pulls from `host` have had lately, where there were any.
    pub fn rate(&self, host: &str) -> Result<Option<f64>, StoreError> {
        let record: Option<RateRecord> = self.rate_records().get_sound(&ref_name(host))?;
        let rate = record.map(|record| record.bytes_per_second);
        Ok(rate.filter(|rate| rate.is_finite() && *rate >= 1.0))
    }

    fn forget_rates_beyond(&self, most: usize, keep: &str) -> Result<(), StoreError> {
        let records = self.rate_records();
        let mut others = records.names()?;
        others.retain(|name| name != keep);
        if others.len() <= most {
            return Ok(());
        }
        let mut known: Vec<(String, RateRecord)> = records.list()?;
        known.retain(|(name, _)| name != keep);
        known.sort_by_key(|(_, record)| record.noted_at);
        for (name, _) in known.iter().take(others.len() - most) {
            records.remove(name)?;
        }
        Ok(())
    }

    fn rate_records(&self) -> Records {
        Records::new(self.path("rates"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::store;

    const MIB: u64 = 1 << 20;

    #[test]
    fn a_rate_follows_the_pulls_and_small_ones_say_nothing() {
        let (_dir, store) = store();
        assert_eq!(store.rate("r").unwrap(), None);
        store.note_rate("r", MIB, Duration::from_secs(1)).unwrap();
        assert_eq!(store.rate("r").unwrap(), None);
        store.note_rate("r", 100 * MIB, Duration::from_secs(1)).unwrap();
        store.note_rate("r", 200 * MIB, Duration::from_secs(1)).unwrap();
        assert_eq!(store.rate("r").unwrap(), Some(130.0 * MIB as f64));
        assert_eq!(store.rate("").unwrap(), None, "folders are another source");
    }

    #[test]
    fn registries_are_bounded_and_the_oldest_are_forgotten() {
        let (_dir, store) = store();
        for n in 0..=MAX_HOSTS {
            store.note_rate(&format!("r{n}"), 100 * MIB, Duration::from_secs(1)).unwrap();
        }
        assert_eq!(store.rate_records().names().unwrap().len(), MAX_HOSTS);
        assert_eq!(store.rate("r0").unwrap(), None);
        assert!(store.rate(&format!("r{MAX_HOSTS}")).unwrap().is_some());
    }
}
