//! What registries have given this node lately.
//!
//! While pulls are under way, one sample a second and registry is taken: the bytes per second of
//! all its pulls together. The last [`WINDOW`] samples answer "how fast, usually" and "how
//! fast, in nine of ten cases".

use std::collections::BTreeMap;
use std::collections::VecDeque;
use std::time::SystemTime;

use carport_image::pull::{PullProgress, PullState};

/// Samples kept for one registry: the last five minutes of pulling.
const WINDOW: usize = 300;

/// Registries remembered. A node speaks to a handful; references of users must not grow a map.
const MAX_HOSTS: usize = 64;

/// Rates by registry host; the empty host stands for folders on this machine.
#[derive(Debug, Clone, Default)]
pub struct Rates {
    hosts: BTreeMap<String, Samples>,
}

#[derive(Debug, Clone)]
struct Samples {
    bytes_per_second: VecDeque<f64>,
    last: SystemTime,
}

/// What one registry gave.
#[derive(Debug, Clone, PartialEq)]
pub struct Rate {
    /// `registry.example:5000`; empty for folders on this machine.
    pub host: String,
    /// Half of the samples were slower.
    pub p50_bytes_per_second: f64,
    /// One sample in ten was slower.
    pub p10_bytes_per_second: f64,
    /// How many samples.
    pub samples: usize,
    /// When the last one was taken.
    pub last: SystemTime,
}

impl Rates {
    /// Takes one sample of each registry that is being pulled from.
    pub fn sample(&mut self, pulls: &[PullProgress], now: SystemTime) {
        let mut sums: BTreeMap<&str, f64> = BTreeMap::new();
        for pull in pulls {
            // A pull that has just begun has no rate; counting it as 0 would slander the registry.
            if pull.state == PullState::Pulling && pull.bytes_per_second > 0.0 {
                *sums.entry(host(pull)).or_default() += pull.bytes_per_second;
            }
        }
        for (host, rate) in sums {
            if !self.hosts.contains_key(host) && self.hosts.len() >= MAX_HOSTS {
                self.forget_oldest();
            }
            let samples = self.hosts.entry(host.to_string()).or_insert_with(|| Samples {
                bytes_per_second: VecDeque::with_capacity(16),
                last: now,
            });
            if samples.bytes_per_second.len() == WINDOW {
                samples.bytes_per_second.pop_front();
            }
            samples.bytes_per_second.push_back(rate);
            samples.last = now;
        }
    }

    /// The figures of one registry, where it was ever pulled from.
    pub fn of(&self, host: &str) -> Option<Rate> {
        let samples = self.hosts.get(host)?;
        let mut sorted: Vec<f64> = samples.bytes_per_second.iter().copied().collect();
        sorted.sort_by(f64::total_cmp);
        let at = |part: usize| sorted.get(sorted.len() * part / 100).copied();
        Some(Rate {
            host: host.to_string(),
            p50_bytes_per_second: at(50)?,
            p10_bytes_per_second: at(10)?,
            samples: sorted.len(),
            last: samples.last,
        })
    }

    /// All figures, by host.
    pub fn all(&self) -> Vec<Rate> {
        self.hosts.keys().filter_map(|host| self.of(host)).collect()
    }

    fn forget_oldest(&mut self) {
        let oldest = self.hosts.iter().min_by_key(|(_, samples)| samples.last);
        if let Some(host) = oldest.map(|(host, _)| host.clone()) {
            self.hosts.remove(&host);
        }
    }
}

/// The registry that `pull` takes its bytes from; empty for a folder.
pub fn host(pull: &PullProgress) -> &str {
    pull.reference.registry().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, UNIX_EPOCH};

    use carport_image::pull::Priority;

    fn pull(reference: &str, bytes_per_second: f64) -> PullProgress {
        PullProgress {
            reference: reference.parse().unwrap(),
            digest: None,
            state: PullState::Pulling,
            priority: Priority::Demand,
            done_bytes: 0,
            fetched_bytes: 0,
            total_bytes: 0,
            started_at: UNIX_EPOCH,
            bytes_per_second,
        }
    }

    #[test]
    fn pulls_from_one_registry_add_up() {
        let mut rates = Rates::default();
        let pulls = [pull("r:5000/a:1", 100.0), pull("r:5000/b:1", 50.0), pull("s:5000/c:1", 7.0)];
        rates.sample(&pulls, UNIX_EPOCH);
        assert_eq!(rates.of("r:5000").unwrap().p50_bytes_per_second, 150.0);
        assert_eq!(rates.of("s:5000").unwrap().p50_bytes_per_second, 7.0);
        assert_eq!(rates.of("t:5000"), None);
    }

    #[test]
    fn slow_times_show_in_the_lower_figure_and_old_ones_are_forgotten() {
        let mut rates = Rates::default();
        for second in 0..1000_u32 {
            let rate = if second % 5 == 0 { 10.0 } else { 100.0 };
            rates.sample(&[pull("r:5000/a:1", rate)], UNIX_EPOCH);
        }
        let rate = rates.of("r:5000").unwrap();
        assert_eq!((rate.p50_bytes_per_second, rate.p10_bytes_per_second), (100.0, 10.0));
        assert_eq!(rate.samples, WINDOW);
    }

    #[test]
    fn many_registries_do_not_grow_the_map() {
        let mut rates = Rates::default();
        for n in 0..200 {
            let now = UNIX_EPOCH + Duration::from_secs(n);
            rates.sample(&[pull(&format!("r{n}:5000/a:1"), 1.0)], now);
        }
        assert_eq!(rates.all().len(), MAX_HOSTS);
        assert!(rates.of("r199:5000").is_some() && rates.of("r0:5000").is_none());
    }
}
