//! A set of bytes of a blob, as ranges.

use std::collections::BTreeMap;
use std::ops::Range;

use serde::{Deserialize, Serialize};

/// Ranges that neither overlap nor touch, so that a blob that has come in order is one.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Vec<(u64, u64)>", into = "Vec<(u64, u64)>")]
pub(crate) struct Ranges {
    /// End by start.
    ends: BTreeMap<u64, u64>,
}

impl Ranges {
    pub(crate) fn insert(&mut self, range: Range<u64>) {
        let Range { mut start, mut end } = range;
        if start >= end {
            return;
        }
        // The last one that may touch comes first.
        while let Some((&from, &to)) = self.ends.range(..=end).next_back()
            && to >= start
        {
            self.ends.remove(&from);
            start = start.min(from);
            end = end.max(to);
        }
        self.ends.insert(start, end);
    }

    pub(crate) fn remove(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        while let Some((&from, &to)) = self.ends.range(..range.end).next_back()
            && to > range.start
        {
            self.ends.remove(&from);
            self.insert(from..range.start.min(to));
            self.insert(range.end.max(from)..to);
        }
    }

    pub(crate) fn covers(&self, range: &Range<u64>) -> bool {
        range.is_empty() || self.end_of_run(range.start) >= range.end
    }

    /// Up to where everything from `at` on is in the set; `at` where that byte is not.
    pub(crate) fn end_of_run(&self, at: u64) -> u64 {
        self.ends.range(..=at).next_back().map_or(at, |(_, &end)| end.max(at))
    }

    /// The first part of `within` that is not in the set.
    pub(crate) fn gap(&self, within: &Range<u64>) -> Option<Range<u64>> {
        let start = self.end_of_run(within.start);
        let next = self.ends.range(start..).next().map_or(u64::MAX, |(&start, _)| start);
        let gap = start..next.min(within.end);
        (!gap.is_empty()).then_some(gap)
    }

    /// Number of bytes.
    pub(crate) fn total(&self) -> u64 {
        self.ends.iter().map(|(start, end)| end - start).sum()
    }
}

impl From<Vec<(u64, u64)>> for Ranges {
    fn from(pairs: Vec<(u64, u64)>) -> Self {
        let mut ranges = Self::default();
        for (start, end) in pairs {
            ranges.insert(start..end);
        }
        ranges
    }
}

impl From<Ranges> for Vec<(u64, u64)> {
    fn from(ranges: Ranges) -> Self {
        ranges.ends.into_iter().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SIZE: u64 = 24;

    proptest! {
        #[test]
        fn it_is_as_a_naive_set_of_bytes(
            steps in prop::collection::vec((any::<bool>(), 0..SIZE, 0..SIZE), 0..40),
            (from, to) in (0..SIZE, 0..SIZE),
        ) {
            let (mut ranges, mut naive) = (Ranges::default(), [false; SIZE as usize]);
            for (add, start, end) in steps {
                if add { ranges.insert(start..end) } else { ranges.remove(start..end) }
                (start..end).for_each(|at| naive[at as usize] = add);
            }
            let has = |at: u64| naive.get(at as usize).copied().unwrap_or(false);
            prop_assert_eq!(ranges.total(), (0..SIZE).filter(|at| has(*at)).count() as u64);
            prop_assert_eq!(ranges.covers(&(from..to)), (from..to).all(has));
            prop_assert_eq!(ranges.end_of_run(from), (from..).find(|at| !has(*at)).unwrap());
            let start = (from..to).find(|at| !has(*at));
            let gap = start.map(|start| start..(start..to).find(|at| has(*at)).unwrap_or(to));
            prop_assert_eq!(ranges.gap(&(from..to)), gap);
            let pairs = Vec::from(ranges.clone());
            prop_assert!(pairs.windows(2).all(|two| two[0].1 < two[1].0), "{:?}", pairs);
            prop_assert_eq!(Ranges::from(pairs), ranges);
        }
    }
}
