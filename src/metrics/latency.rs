//! Durations in buckets: small enough to be copied whenever somebody asks, where a histogram to three digits is not.

use crate::encoding::Reader;

/// The bounds' mantissas, in hundredths: ten per decade, as far from each other as round numbers allow.
const MANTISSAS: [u64; 10] = [100, 125, 160, 200, 250, 315, 400, 500, 630, 800];
/// Of 10 nanoseconds each: a hundred of them are the lowest bound, a microsecond.
const DECADES: usize = 7;
const BOUNDS: usize = MANTISSAS.len() * DECADES + 1;

/// The highest duration of each bucket but the last, in nanoseconds: from a microsecond to ten seconds.
pub const BOUNDS_NS: [u64; BOUNDS] = {
    let mut bounds = [0; BOUNDS];
    let (mut place, mut scale) = (0, 10);
    while place < BOUNDS {
        bounds[place] = MANTISSAS[place % MANTISSAS.len()] * scale;
        place += 1;
        if place.is_multiple_of(MANTISSAS.len()) {
            scale *= 10;
        }
    }
    bounds
};

/// How many durations fell between two bounds, and what they take together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Durations {
    counts: [u64; BOUNDS + 1],
    sum_ns: u64,
}

/// The bucket that a duration falls into.
#[inline]
pub(super) fn bucket_of(ns: u64) -> usize {
    BOUNDS_NS.partition_point(|bound| *bound < ns)
}

impl Default for Durations {
    fn default() -> Self {
        Self {
            counts: [0; BOUNDS + 1],
            sum_ns: 0,
        }
    }
}

impl Durations {
    /// Records `count` durations of `ns` nanoseconds.
    #[inline]
    pub fn record(&mut self, ns: u64, count: u64) {
        self.record_in(bucket_of(ns), ns, count);
    }

    /// The same where the bucket is known.
    #[inline]
    pub(super) fn record_in(&mut self, bucket: usize, ns: u64, count: u64) {
        self.counts[bucket] += count;
        self.sum_ns += ns * count;
    }

    /// How many there are.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// What they take together, in nanoseconds.
    pub fn sum_ns(&self) -> u64 {
        self.sum_ns
    }

    /// For each of [`BOUNDS_NS`], how many are not longer.
    pub fn cumulative(&self) -> impl Iterator<Item = (u64, u64)> {
        let mut sum = 0;
        BOUNDS_NS.iter().zip(&self.counts).map(move |(bound, count)| {
            sum += count;
            (*bound, sum)
        })
    }

    /// Adds another core's.
    pub fn merge(&mut self, other: &Durations) {
        for (ours, theirs) in self.counts.iter_mut().zip(&other.counts) {
            *ours += theirs;
        }
        self.sum_ns += other.sum_ns;
    }

    pub(super) fn push(&self, out: &mut Vec<u8>) {
        super::push_numbers(out, &self.counts);
        super::push_numbers(out, &[self.sum_ns]);
    }

    pub(super) fn read(&mut self, reader: &mut Reader<'_>) {
        super::read_numbers(reader, &mut self.counts);
        self.sum_ns = reader.u64();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_rise_from_a_microsecond_to_ten_seconds() {
        assert!(BOUNDS_NS.is_sorted());
        assert_eq!(BOUNDS_NS[..3], [1_000, 1_250, 1_600]);
        assert_eq!(BOUNDS_NS[10..12], [10_000, 12_500]);
        assert_eq!(BOUNDS_NS[69..], [8_000_000_000, 10_000_000_000]);
    }

    /// A duration that is exactly at a bound is not longer than it.
    #[test]
    fn each_bucket_holds_its_bound() {
        let mut durations = Durations::default();
        for (ns, count) in [
            (0, 1),
            (1_000, 2),
            (1_001, 4),
            (10_000_000_000, 8),
            (10_000_000_001, 16),
        ] {
            durations.record(ns, count);
        }
        let cumulative: Vec<(u64, u64)> = durations.cumulative().collect();
        assert_eq!(cumulative[..2], [(1_000, 3), (1_250, 7)]);
        assert_eq!(cumulative[69..], [(8_000_000_000, 7), (10_000_000_000, 15)]);
        assert_eq!(durations.count(), 31);
        assert_eq!(durations.sum_ns(), 2 * 1_000 + 4 * 1_001 + 24 * 10_000_000_000 + 16);
    }
}
