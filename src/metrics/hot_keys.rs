//! Which keys are asked for most, now: a sketch of fixed size on each core.
//!
//! Of the requests that a core executes, some are counted: the first [`EXACT_PER_PERIOD`] of each second all, so that a quiet
//! core knows exactly, and of the others one in [`MEAN_GAP`], with that weight, at random distances, so that no rhythm of
//! requests hides a key or flatters it. What is counted goes through Filtered Space-Saving (N. Homem and J. P. Carvalho, "Finding
//! top-k elements in data streams", 2010): [`KEYS`] keys are monitored, each with its count and by how much that may be too
//! high; the others share cells by their hash, and one whose cell outgrows the smallest count takes its place. All numbers are
//! halved every [`HALF_LIFE_NS`], and the time they stand for with them, so old requests fade and rates stay right.

use super::{push_text, read_text};
use crate::encoding::Reader;

/// A key that is asked for often.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HotKey {
    /// The whole key.
    pub key: Vec<u8>,
    /// Requests for it per second, recently: an estimate.
    pub per_second: u64,
    /// Those among them that write.
    pub writes_per_second: u64,
    /// Its share of the requests that its core executed recently, in millionths: an estimate.
    pub share_ppm: u32,
    /// By how much the share may be off: what the sketch cannot tell apart, and two standard deviations of the sampling.
    pub error_ppm: u32,
}

impl HotKey {
    pub(super) fn push(&self, out: &mut Vec<u8>) {
        push_text(out, &self.key);
        out.extend_from_slice(&self.per_second.to_le_bytes());
        out.extend_from_slice(&self.writes_per_second.to_le_bytes());
        out.extend_from_slice(&self.share_ppm.to_le_bytes());
        out.extend_from_slice(&self.error_ppm.to_le_bytes());
    }

    pub(super) fn read(reader: &mut Reader<'_>) -> Self {
        Self {
            key: read_text(reader),
            per_second: reader.u64(),
            writes_per_second: reader.u64(),
            share_ppm: reader.u32(),
            error_ppm: reader.u32(),
        }
    }
}

/// Keys that are monitored. With the cells below, a key with a thousandth of the requests stays among them on any skew.
const KEYS: usize = 64;
/// Cells that the other keys share: 16 KiB.
const CELLS: usize = 4096;
/// Of this many requests one is counted, on average, beyond the exact ones: a few instructions per request.
const MEAN_GAP: u32 = 64;
/// Requests that are all counted, of each period.
const EXACT_PER_PERIOD: u32 = 1000;
const EXACT_PERIOD_NS: u64 = 1_000_000_000;
/// What was counted this long ago counts half. Short enough to show what is hot now, long enough for rates that stand still.
const HALF_LIFE_NS: u64 = 5_000_000_000;
/// One request, in the fixed-point numbers of the sketch: halving leaves something of a few.
const ONE: u32 = 16;
/// Only a key with at least this share of its core's requests, in millionths, is called hot.
const SHARE_PPM_MIN: u64 = 1000;

/// What is known of a monitored key beside its count.
#[derive(Debug, Default)]
struct Monitored {
    key: Vec<u8>,
    /// By how much its count may be too high.
    error: u64,
    /// What of the count came from samples that stand for [`MEAN_GAP`] requests.
    sampled: u64,
    /// What of it came from writes.
    writes: u64,
}

/// The sketch. See the module's text.
#[derive(Debug)]
pub struct HotKeys {
    /// Requests until the next one that is counted.
    gap: u32,
    /// For how many that one stands.
    weight: u32,
    exact_left: u32,
    exact_since_ns: u64,
    random: u64,
    /// By place: the hash and the count of a monitored key, and the rest of it.
    hashes: Vec<u64>,
    counts: Vec<u64>,
    monitored: Vec<Monitored>,
    /// No count is smaller.
    count_min: u64,
    cells: Vec<u32>,
    /// All that was counted, monitored or not.
    total: u64,
    /// The time in which it was, halved as it is, until `aged_ns`.
    window_ns: u64,
    /// When all was halved last; 0 before the first look at the clock.
    aged_ns: u64,
}

impl HotKeys {
    /// Nothing is counted yet. `seed`: of the random distances.
    pub fn new(seed: u64) -> Self {
        Self {
            gap: 1,
            weight: 1,
            exact_left: EXACT_PER_PERIOD,
            exact_since_ns: 0,
            random: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
            hashes: Vec::with_capacity(KEYS),
            counts: Vec::with_capacity(KEYS),
            monitored: Vec::with_capacity(KEYS),
            count_min: 0,
            cells: vec![0; CELLS],
            total: 0,
            window_ns: 0,
            aged_ns: 0,
        }
    }

    /// Whether this request is to be [counted](Self::count). To be asked once for each.
    #[inline(always)]
    pub fn is_due(&mut self) -> bool {
        self.gap -= 1;
        self.gap == 0
    }

    /// Counts a request for `key`, whose hash is `hash`.
    #[cold]
    #[inline(never)]
    pub fn count(&mut self, key: &[u8], hash: u64, writes: bool) {
        let (weight, sampled) = (u64::from(self.weight * ONE), self.weight > 1);
        self.draw_gap();
        self.total += weight;
        let place = match self.hashes.iter().position(|other| *other == hash) {
            Some(place) if self.monitored[place].key == key => place,
            // Another key of the same 64 bits: there is none, nearly, and it may go without.
            Some(_) => return,
            None => match self.admit(key, hash, weight) {
                Some(place) => place,
                None => return,
            },
        };
        self.counts[place] += weight;
        let monitored = &mut self.monitored[place];
        monitored.sampled += if sampled { weight } else { 0 };
        monitored.writes += if writes { weight } else { 0 };
    }

    /// Decides which request is counted next.
    fn draw_gap(&mut self) {
        if self.exact_left > 0 {
            self.exact_left -= 1;
            (self.gap, self.weight) = (1, 1);
            return;
        }
        // Xorshift, by G. Marsaglia.
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        // From 1 to twice the mean less 1, all alike.
        let choices = u64::from(2 * MEAN_GAP - 1);
        self.gap = 1 + (((self.random >> 32) * choices) >> 32) as u32;
        self.weight = MEAN_GAP;
    }

    /// Finds a place for a key that is not monitored, with what it may have been counted before; or counts it in its cell.
    fn admit(&mut self, key: &[u8], hash: u64, weight: u64) -> Option<usize> {
        let cell = hash as usize % CELLS;
        let before = u64::from(self.cells[cell]);
        let place = if self.counts.len() < KEYS {
            self.hashes.push(0);
            self.counts.push(0);
            self.monitored.push(Monitored::default());
            self.count_min = 0;
            self.counts.len() - 1
        } else if let Some(place) = self.outgrown(before + weight) {
            place
        } else {
            self.cells[cell] = self.cells[cell].saturating_add(weight as u32);
            return None;
        };
        self.hashes[place] = hash;
        self.counts[place] = before;
        let monitored = &mut self.monitored[place];
        let mut kept = std::mem::take(&mut monitored.key);
        kept.clear();
        // Exactly: no key may take twice what keys may take.
        kept.reserve_exact(key.len());
        kept.extend_from_slice(key);
        *monitored = Monitored {
            key: kept,
            error: before,
            sampled: 0,
            writes: 0,
        };
        Some(place)
    }

    /// The place of the monitored key with the smallest count, if that is smaller than `count`. That key goes on in its cell.
    fn outgrown(&mut self, count: u64) -> Option<usize> {
        if count <= self.count_min {
            return None;
        }
        let all = self.counts.iter().copied().enumerate();
        let (place, smallest) = all.min_by_key(|(_, count)| *count)?;
        self.count_min = smallest;
        if count <= smallest {
            return None;
        }
        let cell = &mut self.cells[self.hashes[place] as usize % CELLS];
        *cell = (*cell).max(u32::try_from(smallest).unwrap_or(u32::MAX));
        Some(place)
    }

    /// Lets time pass. To be called often, also when nothing is asked for.
    #[inline]
    pub fn age(&mut self, now_ns: u64) {
        if now_ns.saturating_sub(self.exact_since_ns) >= EXACT_PERIOD_NS {
            self.exact_since_ns = now_ns;
            self.exact_left = EXACT_PER_PERIOD;
        }
        if self.aged_ns == 0 {
            self.aged_ns = now_ns;
        }
        let periods = now_ns.saturating_sub(self.aged_ns) / HALF_LIFE_NS;
        if periods > 0 {
            self.aged_ns += periods * HALF_LIFE_NS;
            self.halve(periods.min(63) as u32);
        }
    }

    #[cold]
    fn halve(&mut self, times: u32) {
        for _ in 0..times {
            self.window_ns = (self.window_ns + HALF_LIFE_NS) / 2;
        }
        self.total >>= times;
        self.count_min = 0;
        for cell in &mut self.cells {
            *cell = cell.checked_shr(times).unwrap_or(0);
        }
        for count in &mut self.counts {
            *count >>= times;
        }
        for monitored in &mut self.monitored {
            monitored.error >>= times;
            monitored.sampled >>= times;
            monitored.writes >>= times;
        }
        for place in (0..self.counts.len()).rev() {
            // Less than half a request is nothing.
            if self.counts[place] < u64::from(ONE / 2) {
                self.hashes.swap_remove(place);
                self.counts.swap_remove(place);
                self.monitored.swap_remove(place);
            }
        }
    }

    /// Forgets everything.
    pub fn clear(&mut self, now_ns: u64) {
        *self = Self {
            random: self.random,
            aged_ns: now_ns,
            exact_since_ns: now_ns,
            ..Self::new(0)
        };
    }

    /// The hottest keys, hottest first: those whose share is surely no smaller than a thousandth.
    pub fn hottest(&mut self, now_ns: u64) -> Vec<HotKey> {
        self.age(now_ns);
        let window_ns = self.window_ns + now_ns.saturating_sub(self.aged_ns);
        let per_second = |count: u64| {
            let seconds = window_ns.max(1_000_000) as f64 / 1e9;
            (count as f64 / f64::from(ONE) / seconds).round() as u64
        };
        let ppm = |count: u64| (u128::from(count) * 1_000_000 / u128::from(self.total.max(1))) as u64;
        let mut found: Vec<(u64, HotKey)> = vec![];
        for (count, monitored) in self.counts.iter().zip(&self.monitored) {
            // Of n requests, each counted with the chance 1/g and the weight g, the standard deviation is nearly √(g n).
            let requests = monitored.sampled as f64 / f64::from(ONE);
            let deviation = (requests * f64::from(MEAN_GAP)).sqrt() * f64::from(ONE);
            let error = monitored.error + (2.0 * deviation) as u64;
            if ppm(count.saturating_sub(error)) < SHARE_PPM_MIN {
                continue;
            }
            // Of what it may have been before it was monitored, nobody knows what wrote.
            let seen = count - monitored.error;
            let writes = (u128::from(*count) * u128::from(monitored.writes) / u128::from(seen.max(1))) as u64;
            let hot = HotKey {
                key: monitored.key.clone(),
                per_second: per_second(*count),
                writes_per_second: per_second(writes.min(*count)),
                share_ppm: ppm(*count) as u32,
                error_ppm: ppm(error) as u32,
            };
            found.push((*count, hot));
        }
        found.sort_by(|(a, first), (b, second)| b.cmp(a).then_with(|| first.key.cmp(&second.key)));
        found.into_iter().map(|(_, hot)| hot).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND_NS: u64 = 1_000_000_000;

    /// SplitMix64.
    fn mix(seed: u64) -> u64 {
        let mut mixed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn name(rank: usize) -> Vec<u8> {
        format!("key-{rank}").into_bytes()
    }

    /// A core that is asked for keys at an even pace.
    struct Core {
        hot: HotKeys,
        now_ns: u64,
        drawn: u64,
    }

    impl Core {
        fn new(seed: u64) -> Self {
            let mut hot = HotKeys::new(seed);
            hot.age(1);
            Self {
                hot,
                now_ns: 1,
                drawn: seed << 32,
            }
        }

        fn random(&mut self) -> u64 {
            self.drawn += 1;
            mix(self.drawn)
        }

        /// `requests` in `seconds`; each a key that `draw` makes of a random number, and whether it writes.
        fn ask(&mut self, requests: u64, seconds: u64, draw: impl Fn(u64) -> (Vec<u8>, bool)) {
            let began_ns = self.now_ns;
            for request in 1..=requests {
                self.now_ns = began_ns + request * seconds * SECOND_NS / requests;
                self.hot.age(self.now_ns);
                let random = self.random();
                if self.hot.is_due() {
                    let (key, writes) = draw(random);
                    let hash = key.iter().fold(7, |hash, byte| mix(hash ^ u64::from(*byte)));
                    self.hot.count(&key, hash, writes);
                }
            }
        }

        fn hottest(&mut self) -> Vec<HotKey> {
            self.hot.hottest(self.now_ns)
        }
    }

    /// The shares of the first ranks of Zipf's law, and a function that draws ranks by it.
    fn zipf(keys: usize, exponent: f64) -> (Vec<f64>, impl Fn(u64) -> usize) {
        let weights: Vec<f64> = (1..=keys).map(|rank| (rank as f64).powf(-exponent)).collect();
        let sum: f64 = weights.iter().sum();
        let mut up_to = 0.0;
        let sums: Vec<f64> = weights
            .iter()
            .map(|weight| {
                up_to += weight / sum;
                up_to
            })
            .collect();
        let shares = weights.iter().take(20).map(|weight| weight / sum).collect();
        let draw = move |random: u64| {
            let at = (random >> 11) as f64 / (1u64 << 53) as f64;
            sums.partition_point(|sum| *sum <= at).min(sums.len() - 1)
        };
        (shares, draw)
    }

    /// The ten keys that are asked for most are the first ten, and their shares and rates are within the error that is told.
    #[test]
    fn the_hottest_of_a_skewed_stream_are_found() {
        for (keys, exponent, requests) in [
            (1_000, 1.2, 600_000),
            (100_000, 0.99, 2_000_000),
            (1_000_000, 1.0, 3_000_000),
        ] {
            let (shares, draw) = zipf(keys, exponent);
            for seed in 1..=3 {
                let mut core = Core::new(seed);
                core.ask(requests, 10, |random| (name(draw(random)), random % 4 == 0));
                let found = core.hottest();
                let places: Vec<Option<usize>> = (0..10)
                    .map(|rank| found.iter().position(|hot| hot.key == name(rank)))
                    .collect();
                // Neighbours in rank are close: sampling may swap them, but none of the ten is far from its place.
                assert!(
                    places.iter().all(|place| place.is_some_and(|place| place < 16)),
                    "{keys} keys, exponent {exponent}, seed {seed}: {places:?}"
                );
                assert_eq!(places[0], Some(0));
                let mut outside = 0;
                for (rank, share) in shares.iter().enumerate().take(10) {
                    let Some(hot) = places[rank].map(|place| &found[place]) else {
                        continue;
                    };
                    let off = (f64::from(hot.share_ppm) - share * 1e6).abs();
                    // Two standard deviations are kept to in 95 of a hundred cases.
                    outside += u32::from(off > f64::from(hot.error_ppm) + 100.0);
                    assert!(
                        off < 2.5 * f64::from(hot.error_ppm) + 100.0,
                        "rank {rank}: {hot:?}, is {share}"
                    );
                    let per_second = share * requests as f64 / 10.0;
                    assert!(
                        (hot.per_second as f64 / per_second - 1.0).abs() < 0.5,
                        "{hot:?}, is {per_second}"
                    );
                    let writes = hot.writes_per_second as f64 / hot.per_second as f64;
                    assert!((writes - 0.25).abs() < 0.15, "{hot:?}");
                }
                assert!(outside <= 2, "{outside} of ten are outside the error");
            }
        }
    }

    /// When all ask for something else, the old favourite fades, and what is hot now stands first.
    #[test]
    fn what_was_hot_disappears() {
        let mut core = Core::new(5);
        let mostly = |favourite: &'static [u8]| {
            move |random: u64| match random % 2 {
                0 => (favourite.to_vec(), false),
                _ => (name(random as usize % 10_000), false),
            }
        };
        core.ask(1_000_000, 10, mostly(b"old"));
        assert_eq!(core.hottest()[0].key, b"old");
        core.ask(1_000_000, 10, mostly(b"new"));
        assert_eq!(core.hottest()[0].key, b"new");
        core.ask(5_000_000, 50, mostly(b"new"));
        let found = core.hottest();
        assert_eq!(found[0].key, b"new");
        assert!((480_000..520_000).contains(&found[0].share_ppm), "{found:?}");
        assert!(!found.iter().any(|hot| hot.key == b"old"), "{found:?}");
        // And when nothing is asked for at all, nothing is hot.
        core.now_ns += 600 * SECOND_NS;
        assert_eq!(core.hottest(), []);
    }

    /// Keys that come once take no more memory than the sketch has places, and none of them is called hot.
    #[test]
    fn keys_that_come_once_take_bounded_memory() {
        let mut core = Core::new(9);
        core.ask(2_000_000, 10, |random| {
            let mut key = vec![b'k'; 900 + (random % 100) as usize];
            key[..8].copy_from_slice(&random.to_le_bytes());
            (key, true)
        });
        let hot = &core.hot;
        assert_eq!(hot.monitored.len(), KEYS);
        let bytes: usize = hot.monitored.iter().map(|monitored| monitored.key.capacity()).sum();
        assert!(bytes <= KEYS * 1000, "{bytes}");
        assert_eq!(hot.cells.len(), CELLS);
        assert_eq!(core.hottest(), []);
    }

    /// Few requests are counted exactly.
    #[test]
    fn a_quiet_core_knows_exactly() {
        let mut core = Core::new(1);
        core.ask(100, 2, |random| (name(random as usize % 2), true));
        core.ask(300, 2, |_| (b"third".to_vec(), false));
        let found = core.hottest();
        let of = |key: &[u8]| found.iter().find(|hot| hot.key == key).cloned();
        let third = HotKey {
            key: b"third".to_vec(),
            per_second: 75,
            writes_per_second: 0,
            share_ppm: 750_000,
            error_ppm: 0,
        };
        assert_eq!((found.len(), of(b"third")), (3, Some(third)));
        let first = of(&name(0)).unwrap();
        assert_eq!(first.per_second, first.writes_per_second);
        assert_eq!(first.share_ppm + of(&name(1)).unwrap().share_ppm, 250_000);
        core.hot.clear(core.now_ns);
        assert_eq!(core.hottest(), []);
        core.ask(10, 1, |_| (b"again".to_vec(), false));
        assert_eq!(core.hottest()[0].share_ppm, 1_000_000);
    }
}
