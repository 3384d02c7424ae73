//! What is asked of the server: which keys, which values, which commands, in which proportion.
//!
//! Everything here is a pure function of a key's number and the seed, so that no table of keys or values is needed: a
//! reply can be checked against the key it belongs to at any time, by any thread, and two runs with the same seed ask
//! for the same things.

use std::collections::HashSet;
use std::fmt;
use std::str::FromStr;

/// A command of the workload. The discriminants index the per-command statistics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Command {
    /// Reads one key.
    Get = 0,
    /// Writes one key.
    Set = 1,
    /// Removes one key.
    Delete = 2,
    /// Reads several keys with one request.
    MultiGet = 3,
    /// Writes several keys with one request.
    MultiSet = 4,
    /// A transaction.
    Txn = 5,
}

impl Command {
    /// All commands, in the order of their discriminants.
    pub const ALL: [Command; 6] = [
        Command::Get,
        Command::Set,
        Command::Delete,
        Command::MultiGet,
        Command::MultiSet,
        Command::Txn,
    ];

    /// The name used in tables and files.
    pub fn name(self) -> &'static str {
        match self {
            Command::Get => "get",
            Command::Set => "set",
            Command::Delete => "delete",
            Command::MultiGet => "multi-get",
            Command::MultiSet => "multi-set",
            Command::Txn => "txn",
        }
    }
}

/// Mixes the bits of `x` so that neighbouring numbers share nothing.
#[inline(always)]
pub fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// A small, fast generator of random numbers: a Weyl sequence, mixed.
#[derive(Debug, Clone)]
pub struct Rng(u64);

impl Rng {
    /// A generator whose sequence depends on `seed` alone.
    pub fn new(seed: u64) -> Self {
        Rng(mix(seed ^ 0x5851_f42d_4c95_7f2d))
    }

    /// The next 64 random bits.
    #[inline(always)]
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number below `n`, by multiplication instead of division.
    #[inline(always)]
    pub fn below(&mut self, n: u64) -> u64 {
        scale(self.next_u64(), n)
    }

    /// A number in `[0, 1)`.
    pub fn unit(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// Maps 64 random bits to `[0, n)`.
#[inline(always)]
fn scale(bits: u64, n: u64) -> u64 {
    ((u128::from(bits) * u128::from(n)) >> 64) as u64
}

/// The proportion of gets, sets and deletes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ratio {
    /// Weight of gets.
    pub get: u32,
    /// Weight of sets.
    pub set: u32,
    /// Weight of deletes.
    pub delete: u32,
}

impl FromStr for Ratio {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let parts: Result<Vec<u32>, _> = s.split(':').map(str::parse).collect();
        let parts = parts.map_err(|_| format!("'{s}' is not get:set:delete; write whole numbers such as 10:1:0"))?;
        let (get, set, delete) = match parts[..] {
            [get, set] => (get, set, 0),
            [get, set, delete] => (get, set, delete),
            _ => {
                return Err(format!(
                    "'{s}' has {} parts; write get:set or get:set:delete, as in 10:1:0",
                    parts.len()
                ));
            }
        };
        let sum = u64::from(get) + u64::from(set) + u64::from(delete);
        if sum == 0 || sum > 1_000_000 {
            return Err(format!("the parts of '{s}' must add up to 1 to 1000000"));
        }
        Ok(Ratio { get, set, delete })
    }
}

impl fmt::Display for Ratio {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.get, self.set, self.delete)
    }
}

/// What every request is, if requests are transactions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TxnSpec {
    /// Operations, each on a key of its own.
    pub operations: usize,
    /// Optimistic: all keys are read, and then written if none has changed.
    pub checked: bool,
}

/// How sizes in bytes are spread over keys.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum SizeSpec {
    /// Always the same size.
    Fixed(u32),
    /// Every size from the first to the second, equally often.
    Range(u32, u32),
    /// Sizes in the range, the k-th smallest with a weight of 1/k: many small ones, a long tail.
    Zipf(u32, u32),
    /// The logarithm of the size is normally distributed: median in bytes, and sigma.
    LogNormal(f64, f64),
}

/// The largest size a [`SizeSpec`] may name, in bytes.
pub const MAX_SIZE: u32 = 64 << 20;

impl FromStr for SizeSpec {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let usage = || {
            format!(
                "'{s}' is not a size; write bytes (100), a range (50-2000), zipf:50-2000 or lognormal:MEDIAN,SIGMA, at \
                 most {MAX_SIZE}"
            )
        };
        let size = |t: &str| {
            t.trim()
                .parse::<u32>()
                .ok()
                .filter(|&n| n <= MAX_SIZE)
                .ok_or_else(usage)
        };
        let range = |t: &str| {
            let (low, high) = t.split_once('-').ok_or_else(usage)?;
            let (low, high) = (size(low)?, size(high)?);
            if low > high {
                return Err(format!("the range '{t}' is backwards; write the smaller size first"));
            }
            Ok((low, high))
        };
        if let Some(rest) = s.strip_prefix("zipf:") {
            range(rest).map(|(low, high)| SizeSpec::Zipf(low, high))
        } else if let Some(rest) = s.strip_prefix("lognormal:") {
            let (median, sigma) = rest.split_once(',').ok_or_else(usage)?;
            let median: f64 = median.trim().parse().map_err(|_| usage())?;
            let sigma: f64 = sigma.trim().parse().map_err(|_| usage())?;
            let sane = (1.0..=f64::from(MAX_SIZE)).contains(&median) && (0.0..=4.0).contains(&sigma);
            if sane {
                Ok(SizeSpec::LogNormal(median, sigma))
            } else {
                Err(format!(
                    "'{s}': the median must be 1 to {MAX_SIZE} bytes and sigma 0 to 4"
                ))
            }
        } else if s.contains('-') {
            range(s).map(|(low, high)| SizeSpec::Range(low, high))
        } else {
            size(s).map(SizeSpec::Fixed)
        }
    }
}

impl fmt::Display for SizeSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SizeSpec::Fixed(n) => write!(f, "{n}"),
            SizeSpec::Range(low, high) => write!(f, "{low}-{high}"),
            SizeSpec::Zipf(low, high) => write!(f, "zipf:{low}-{high}"),
            SizeSpec::LogNormal(median, sigma) => write!(f, "lognormal:{median},{sigma}"),
        }
    }
}

/// Sizes drawn from a [`SizeSpec`] by hash, from a table of quantiles: one load instead of logarithms per request.
#[derive(Debug, Clone)]
pub struct Sizes(Box<[u32]>);

/// Slices of equal probability in the table of sizes.
const SIZE_SLOTS: usize = 4096;

impl Sizes {
    /// Builds the table.
    pub fn new(spec: SizeSpec) -> Self {
        let quantile = |i: usize| (i as f64 + 0.5) / SIZE_SLOTS as f64;
        let table: Box<[u32]> = match spec {
            SizeSpec::Fixed(n) => Box::new([n]),
            SizeSpec::Range(low, high) => (0..SIZE_SLOTS)
                .map(|i| low + (quantile(i) * (f64::from(high - low) + 1.0)) as u32)
                .map(|n| n.min(high))
                .collect(),
            SizeSpec::Zipf(low, high) => {
                let mut ranks = ZipfSlices::new(u64::from(high - low) + 1, 1.0, SIZE_SLOTS);
                ranks.0.pop();
                ranks
                    .0
                    .iter()
                    .map(|&rank| low + rank as u32)
                    .map(|n| n.min(high))
                    .collect()
            }
            SizeSpec::LogNormal(median, sigma) => (0..SIZE_SLOTS)
                .map(|i| (median.ln() + sigma * normal_quantile(quantile(i))).exp())
                .map(|n| n.round().clamp(1.0, f64::from(MAX_SIZE)) as u32)
                .collect(),
        };
        Sizes(table)
    }

    /// The size that belongs to `hash`, in bytes.
    #[inline(always)]
    pub fn pick(&self, hash: u64) -> usize {
        self.0[scale(hash, self.0.len() as u64) as usize] as usize
    }

    /// The smallest size, in bytes.
    pub fn min(&self) -> usize {
        self.0.iter().min().map_or(0, |&n| n as usize)
    }

    /// The largest size, in bytes.
    pub fn max(&self) -> usize {
        self.0.iter().max().map_or(0, |&n| n as usize)
    }

    /// The mean size, in bytes.
    pub fn mean(&self) -> f64 {
        self.0.iter().map(|&n| f64::from(n)).sum::<f64>() / self.0.len() as f64
    }
}

/// The standard normal quantile of `p`, by bisection on a series for the distribution function; only used at start-up.
fn normal_quantile(p: f64) -> f64 {
    let cdf = |x: f64| {
        // Phi(x) = 1/2 + phi(x) * (x + x^3/3 + x^5/(3*5) + ...)
        let (mut term, mut sum, mut k) = (x, x, 1.0);
        while term.abs() > 1e-17 && k < 400.0 {
            k += 2.0;
            term *= x * x / k;
            sum += term;
        }
        0.5 + sum * (-x * x / 2.0).exp() / std::f64::consts::TAU.sqrt()
    };
    let (mut low, mut high) = (-8.0, 8.0);
    for _ in 0..60 {
        let middle = (low + high) / 2.0;
        if cdf(middle) < p { low = middle } else { high = middle }
    }
    (low + high) / 2.0
}

/// The bounds, on the axis of ranks counted from 0, of slices that are equally probable under Zipf's law.
///
/// Rank k (from 0) owns the interval `[k, k + 1)` and a mass of `(k + 1)^-theta`, spread evenly over it. A slice that
/// ends inside a rank therefore ends at a fraction. To draw: pick a slice, then a point in it, evenly. With many more
/// slices than it takes to single out the hot ranks this differs from the exact law by less than the mass of one slice
/// per rank, and it needs no power or logarithm per draw.
#[derive(Debug, Clone)]
struct ZipfSlices(Vec<f64>);

impl ZipfSlices {
    fn new(n: u64, theta: f64, slices: usize) -> Self {
        // Ranks one by one up to here, then as a continuous density: over such ranks the two agree to many digits.
        let exact = n.min(1 << 20);
        let tail_mass = |from: f64, to: f64| {
            if (theta - 1.0).abs() < 1e-9 {
                (to / from).ln()
            } else {
                (to.powf(1.0 - theta) - from.powf(1.0 - theta)) / (1.0 - theta)
            }
        };
        let tail_point = |from: f64, mass: f64| {
            if (theta - 1.0).abs() < 1e-9 {
                from * mass.exp()
            } else {
                (from.powf(1.0 - theta) + (1.0 - theta) * mass).powf(1.0 / (1.0 - theta))
            }
        };
        let weights: Vec<f64> = (0..exact).map(|k| zipf_weight(k, theta)).collect();
        // The density (x + 1/2)^-theta at the middle of each rank; x counts from 0.
        let (tail_from, tail_to) = (exact as f64 + 0.5, n as f64 + 0.5);
        let tail = if n > exact { tail_mass(tail_from, tail_to) } else { 0.0 };
        let point = |mass| (tail_point(tail_from, mass) - 0.5).min(n as f64);
        Self::cut(&weights, tail, point, n, slices)
    }

    /// The same for things with these weights, the n-th with the n-th.
    fn of_weights(weights: &[f64], slices: usize) -> Self {
        let n = weights.len() as u64;
        Self::cut(weights, 0.0, |_| n as f64, n, slices)
    }

    /// Cuts the weights of the first ranks, and behind them a tail of this mass, in which `point` finds the end of a mass.
    fn cut(weights: &[f64], tail: f64, point: impl Fn(f64) -> f64, n: u64, slices: usize) -> Self {
        let total = weights.iter().sum::<f64>() + tail;
        let mut bounds = Vec::with_capacity(slices + 1);
        let (mut rank, mut before) = (0usize, 0.0);
        for i in 0..slices {
            let target = total * i as f64 / slices as f64;
            while rank < weights.len() && before + weights[rank] <= target {
                before += weights[rank];
                rank += 1;
            }
            bounds.push(match weights.get(rank) {
                Some(weight) => rank as f64 + (target - before) / weight,
                None => point(target - before),
            });
        }
        bounds.push(n as f64);
        ZipfSlices(bounds)
    }
}

/// The weight of a rank, counted from 0, under Zipf's law.
fn zipf_weight(rank: u64, theta: f64) -> f64 {
    ((rank + 1) as f64).powf(-theta)
}

/// How often which key is asked for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum DistributionSpec {
    /// Every key equally often.
    Uniform,
    /// The k-th most popular key with a weight of `k^-theta`.
    Zipf(f64),
}

impl FromStr for DistributionSpec {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        if s == "uniform" {
            return Ok(DistributionSpec::Uniform);
        }
        let theta = match s.strip_prefix("zipf") {
            Some("") => Some(0.99),
            Some(rest) => rest.strip_prefix(':').and_then(|t| t.parse().ok()),
            None => None,
        };
        match theta {
            Some(theta) if (0.0..=5.0).contains(&theta) => Ok(DistributionSpec::Zipf(theta)),
            _ => Err(format!(
                "'{s}' is not a distribution; write uniform or zipf:THETA with THETA from 0 to 5"
            )),
        }
    }
}

impl fmt::Display for DistributionSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DistributionSpec::Uniform => f.write_str("uniform"),
            DistributionSpec::Zipf(theta) => write!(f, "zipf:{theta}"),
        }
    }
}

/// Slices in the table that Zipf draws use; 128 KiB, which stays in the second-level cache.
const ZIPF_SLICES: usize = 1 << 14;

/// Draws for a key that is not taken before the next one by popularity is used instead.
const DRAWS: usize = 16;

/// Draws the number of a key.
#[derive(Debug, Clone)]
pub struct KeyChooser {
    keys: u64,
    /// What it draws by; 0 is the uniform distribution.
    theta: f64,
    zipf: Option<ZipfSlices>,
    /// Multiplier that spreads popular ranks over the key space, coprime to the number of keys.
    spread: u64,
    /// The keys, the most popular one first; without it, all numbers below `keys`.
    own: Option<Box<[u32]>>,
}

impl KeyChooser {
    /// A chooser among `keys` keys.
    pub fn new(keys: u64, spec: DistributionSpec) -> Self {
        let theta = match spec {
            DistributionSpec::Zipf(theta) => theta,
            DistributionSpec::Uniform => 0.0,
        };
        KeyChooser {
            keys,
            theta,
            zipf: (theta > 0.0).then(|| ZipfSlices::new(keys, theta, ZIPF_SLICES)),
            spread: spread(keys),
            own: None,
        }
    }

    /// Choosers among the keys that `part` puts into each of `parts` parts; `None` for a part without keys. Within its part
    /// a key is drawn as often, by comparison with the others, as this chooser draws it.
    pub fn split(&self, parts: usize, mut part: impl FnMut(u64) -> usize) -> Vec<Option<KeyChooser>> {
        let mut ranks: Vec<Vec<u32>> = vec![Vec::new(); parts];
        for rank in 0..self.keys {
            ranks[part(self.key_of_rank(rank))].push(rank as u32);
        }
        let chooser = |mut ranks: Vec<u32>| {
            let zipf = (self.theta > 0.0).then(|| {
                let weights: Vec<f64> = ranks.iter().map(|&r| zipf_weight(u64::from(r), self.theta)).collect();
                ZipfSlices::of_weights(&weights, ZIPF_SLICES)
            });
            for rank in &mut ranks {
                *rank = self.key_of_rank(u64::from(*rank)) as u32;
            }
            KeyChooser {
                keys: ranks.len() as u64,
                theta: self.theta,
                zipf,
                spread: spread(ranks.len() as u64),
                own: Some(ranks.into()),
            }
        };
        let all = ranks.into_iter();
        all.map(|ranks| (!ranks.is_empty()).then(|| chooser(ranks))).collect()
    }

    /// How many keys there are to choose from.
    pub fn keys(&self) -> u64 {
        self.keys
    }

    /// The key for these random bits.
    #[inline(always)]
    pub fn pick(&self, rng: &mut Rng) -> u64 {
        self.key_of_rank(self.rank(rng))
    }

    /// A key that is not among `taken`, which it joins. There must be one left.
    pub fn pick_another(&self, rng: &mut Rng, taken: &mut HashSet<u64>) -> u64 {
        // When the popular keys are all taken, draws would find one of the others next to never.
        for _ in 0..DRAWS {
            let key = self.pick(rng);
            if taken.insert(key) {
                return key;
            }
        }
        let start = self.rank(rng);
        let ranks = (start..self.keys).chain(0..start);
        let mut keys = ranks.map(|rank| self.key_of_rank(rank));
        keys.find(|key| taken.insert(*key)).expect("a key is left")
    }

    /// The key that has this rank.
    #[inline(always)]
    fn key_of_rank(&self, rank: u64) -> u64 {
        match (&self.own, &self.zipf) {
            (Some(own), _) => u64::from(own[rank as usize]),
            (None, Some(_)) => (rank * self.spread) % self.keys,
            (None, None) => rank,
        }
    }

    /// The key to write at this place of the preload, which has as many places as there are keys.
    #[inline(always)]
    pub fn preloaded(&self, place: u64) -> u64 {
        match (&self.own, &self.zipf) {
            (None, _) => place,
            // These keys are in the order of their popularity.
            (Some(own), Some(_)) => u64::from(own[((place * self.spread) % self.keys) as usize]),
            (Some(own), None) => u64::from(own[place as usize]),
        }
    }

    /// A rank, 0 being the most popular; equal to the key's number when keys are uniform.
    #[inline(always)]
    pub fn rank(&self, rng: &mut Rng) -> u64 {
        let bits = rng.next_u64();
        match &self.zipf {
            None => scale(bits, self.keys),
            Some(slices) => {
                let slice = (bits >> 50) as usize;
                let within = (bits & ((1 << 50) - 1)) as f64 / (1u64 << 50) as f64;
                let (low, high) = (slices.0[slice], slices.0[slice + 1]);
                ((low + within * (high - low)) as u64).min(self.keys - 1)
            }
        }
    }
}

/// A multiplier that is coprime to `keys` and large.
///
/// The preload writes keys in the order of their numbers. Without the spread the popular ones would lie side by side in the
/// server's memory, which no real popularity does.
fn spread(keys: u64) -> u64 {
    let mut spread = 2_147_483_647u64;
    while gcd(spread, keys) != 1 {
        spread -= 2;
    }
    spread
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// A value in two parts: eight bytes that belong to one key alone, and a body cut from a pool.
///
/// The head tells a wrong value from the right one at the price of one comparison.
#[derive(Debug, Clone, Copy)]
pub struct Value<'a> {
    head: [u8; 8],
    head_len: usize,
    body: &'a [u8],
    expires_s: u32,
}

impl<'a> Value<'a> {
    /// A value that is exactly these bytes.
    pub fn plain(bytes: &'a [u8]) -> Self {
        Value {
            head: [0; 8],
            head_len: 0,
            body: bytes,
            expires_s: 0,
        }
    }

    /// When the item is to expire, in Unix seconds; 0: never.
    #[inline(always)]
    pub fn expires_s(&self) -> u32 {
        self.expires_s
    }

    /// Length in bytes.
    #[inline(always)]
    pub fn len(&self) -> usize {
        self.head_len + self.body.len()
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Appends the bytes to `out`.
    #[inline(always)]
    pub fn append_to(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.head[..self.head_len]);
        out.extend_from_slice(self.body);
    }

    /// Whether `bytes` begin as this value does; the length is not compared.
    #[inline(always)]
    pub fn head_matches(&self, bytes: &[u8]) -> bool {
        match bytes.first_chunk::<8>() {
            Some(head) if self.head_len == 8 => *head == self.head,
            _ => bytes.get(..self.head_len) == Some(&self.head[..self.head_len]),
        }
    }

    /// Whether `bytes` are this value.
    pub fn matches(&self, bytes: &[u8]) -> bool {
        self.head_matches(bytes) && bytes[self.head_len..] == *self.body
    }
}

/// The distinct places in the pool where a body may begin.
const POOL_OFFSETS: u64 = 16 << 10;

/// The keys and values of a run, computed from key numbers.
#[derive(Debug, Clone)]
pub struct Population {
    keys: u64,
    digits: usize,
    seed: u64,
    key_sizes: Sizes,
    value_sizes: Sizes,
    template: Box<[u8]>,
    pool: Box<[u8]>,
    expires_s: u32,
}

impl Population {
    /// Keys numbered from 0 to `keys - 1`, with sizes as given.
    ///
    /// # Errors
    ///
    /// When the keys are too short to be told apart, or when there are none.
    pub fn new(keys: u64, key_size: SizeSpec, value_size: SizeSpec, seed: u64) -> Result<Self, String> {
        if keys == 0 || keys > 1 << 32 {
            return Err(format!("--keys {keys}: the number of keys must be 1 to {}", 1u64 << 32));
        }
        let digits = (keys - 1).max(1).ilog10() as usize + 1;
        let (key_sizes, value_sizes) = (Sizes::new(key_size), Sizes::new(value_size));
        if key_sizes.min() < digits {
            return Err(format!(
                "--key-size {key_size}: {keys} keys cannot be told apart in {} bytes; use at least {digits} or fewer keys",
                key_sizes.min()
            ));
        }
        if key_sizes.max() > 64 << 10 {
            return Err(format!(
                "--key-size {key_size}: keys of more than 65536 bytes are not supported"
            ));
        }
        let mut template = vec![b'0'; key_sizes.max()].into_boxed_slice();
        if key_sizes.min() >= digits + 3 {
            template[..3].copy_from_slice(b"key");
        }
        // Letters and digits: no protocol has to escape them.
        let alphabet = b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ";
        let mut rng = Rng::new(seed);
        let pool = (0..POOL_OFFSETS as usize + value_sizes.max())
            .map(|_| alphabet[rng.below(alphabet.len() as u64) as usize])
            .collect();
        Ok(Population {
            keys,
            digits,
            seed: mix(seed),
            key_sizes,
            value_sizes,
            template,
            pool,
            expires_s: 0,
        })
    }

    /// The same, all of which is to expire at this Unix second.
    #[must_use]
    pub fn expiring(self, expires_s: u32) -> Self {
        Self { expires_s, ..self }
    }

    /// How many keys there are.
    pub fn keys(&self) -> u64 {
        self.keys
    }

    /// Length of the shortest and of the longest value, in bytes.
    pub fn value_size_range(&self) -> (usize, usize) {
        (self.value_sizes.min(), self.value_sizes.max())
    }

    /// Mean length of a value, in bytes.
    pub fn mean_value_size(&self) -> f64 {
        self.value_sizes.mean()
    }

    /// Length of the longest key, in bytes.
    pub fn max_key_size(&self) -> usize {
        self.key_sizes.max()
    }

    #[inline(always)]
    fn hash(&self, id: u64) -> u64 {
        mix(id.wrapping_add(self.seed))
    }

    /// Length of key `id`, in bytes.
    #[inline(always)]
    pub fn key_len(&self, id: u64) -> usize {
        // The sizes of a key and of its value must not depend on one another.
        self.key_sizes.pick(self.hash(id).rotate_left(32))
    }

    /// Writes key `id` over `scratch` and returns it.
    #[inline(always)]
    pub fn key<'s>(&self, id: u64, scratch: &'s mut Vec<u8>) -> &'s [u8] {
        let len = self.key_len(id);
        scratch.clear();
        scratch.extend_from_slice(&self.template[..len]);
        let mut rest = id;
        for place in scratch[len - self.digits..].iter_mut().rev() {
            *place = b'0' + (rest % 10) as u8;
            rest /= 10;
        }
        scratch
    }

    /// The value that belongs to key `id`.
    #[inline(always)]
    pub fn value(&self, id: u64) -> Value<'_> {
        let hash = self.hash(id);
        let len = self.value_sizes.pick(hash);
        // Eight letters from 32 bits of the hash; four bits each are enough to tell values apart.
        let mut head = 0u64;
        let mut bits = mix(hash);
        for _ in 0..8 {
            head = (head << 8) | (u64::from(b'a') + (bits & 15));
            bits >>= 4;
        }
        let head_len = len.min(8);
        let offset = (bits % POOL_OFFSETS) as usize;
        Value {
            head: head.to_ne_bytes(),
            head_len,
            body: &self.pool[offset..offset + len - head_len],
            expires_s: self.expires_s,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_differ_and_have_their_length() {
        let population = Population::new(1000, SizeSpec::Range(3, 20), SizeSpec::Fixed(100), 1).unwrap();
        let mut scratch = Vec::new();
        let mut seen = std::collections::HashSet::new();
        for id in 0..1000 {
            let key = population.key(id, &mut scratch).to_vec();
            assert_eq!(key.len(), population.key_len(id));
            assert!((3..=20).contains(&key.len()));
            assert!(seen.insert(key));
        }
    }

    #[test]
    fn keys_that_cannot_differ_are_refused() {
        let refused = Population::new(1001, SizeSpec::Fixed(3), SizeSpec::Fixed(1), 1).unwrap_err();
        assert!(refused.contains("at least 4"), "{refused}");
        assert!(Population::new(1000, SizeSpec::Fixed(3), SizeSpec::Fixed(1), 1).is_ok());
        assert!(Population::new(1, SizeSpec::Fixed(1), SizeSpec::Fixed(0), 1).is_ok());
    }

    #[test]
    fn values_belong_to_one_key() {
        let population = Population::new(10_000, SizeSpec::Fixed(8), SizeSpec::Range(0, 50), 7).unwrap();
        let mut heads = std::collections::HashSet::new();
        for id in 0..10_000 {
            let value = population.value(id);
            let mut bytes = Vec::new();
            value.append_to(&mut bytes);
            assert_eq!(bytes.len(), value.len());
            assert!(value.matches(&bytes));
            assert!(bytes.iter().all(u8::is_ascii_alphanumeric));
            if bytes.len() > 12 {
                assert!(heads.insert(bytes[..8].to_vec()), "two values share a head");
                bytes[11] ^= 1;
                assert!(value.head_matches(&bytes) && !value.matches(&bytes));
                bytes[3] ^= 1;
                assert!(!value.head_matches(&bytes));
            }
        }
    }

    #[test]
    fn size_specs_read_and_print() {
        for text in ["100", "50-2000", "zipf:50-2000", "lognormal:200,0.5"] {
            assert_eq!(text.parse::<SizeSpec>().unwrap().to_string(), text);
        }
        for text in [
            "",
            "x",
            "9-3",
            "zipf:",
            "lognormal:1",
            "lognormal:0,1",
            "lognormal:5,9",
            "-1",
            "99999999999",
        ] {
            assert!(text.parse::<SizeSpec>().is_err(), "{text}");
        }
    }

    #[test]
    fn size_distributions_are_what_they_say() {
        let range = Sizes::new(SizeSpec::Range(50, 2000));
        assert_eq!((range.min(), range.max()), (50, 2000));
        assert!((range.mean() - 1025.0).abs() < 1.0, "{}", range.mean());

        let normal = Sizes::new(SizeSpec::LogNormal(200.0, 0.5));
        let mut sorted: Vec<u32> = normal.0.to_vec();
        sorted.sort_unstable();
        assert!((sorted[SIZE_SLOTS / 2] as i64 - 200).abs() <= 1);
        // The mean of a log-normal distribution is median * exp(sigma^2 / 2).
        assert!(
            (normal.mean() - 200.0 * (0.125f64).exp()).abs() < 1.0,
            "{}",
            normal.mean()
        );

        let zipf = Sizes::new(SizeSpec::Zipf(50, 2000));
        assert!(zipf.min() >= 50 && zipf.max() <= 2000);
        // H(1951) = 8.15: the smallest size has one part in 8.15.
        let smallest = zipf.0.iter().filter(|&&n| n == 50).count() as f64 / SIZE_SLOTS as f64;
        assert!((smallest - 1.0 / 8.153).abs() < 0.002, "{smallest}");
    }

    #[test]
    fn zipf_follows_the_law() {
        for (keys, theta) in [(1000u64, 0.99), (1000, 1.0), (4_000_000, 0.99), (1000, 2.0), (10, 0.5)] {
            let chooser = KeyChooser::new(keys, DistributionSpec::Zipf(theta));
            let total: f64 = (1..=keys).map(|k| (k as f64).powf(-theta)).sum();
            let mut rng = Rng::new(3);
            let draws = 400_000;
            let mut counts = vec![0u32; keys as usize];
            for _ in 0..draws {
                counts[chooser.rank(&mut rng) as usize] += 1;
            }
            for k in [1usize, 2, 3, 10] {
                let expected = (k as f64).powf(-theta) / total;
                let got = f64::from(counts[k - 1]) / f64::from(draws);
                let tolerance = 5.0 * (expected / f64::from(draws)).sqrt() + 1e-4;
                assert!(
                    (got - expected).abs() < tolerance,
                    "n {keys} theta {theta} rank {k}: {got} for {expected}"
                );
            }
            let half = keys as usize / 2;
            let expected: f64 = (1..=half).map(|k| (k as f64).powf(-theta)).sum::<f64>() / total;
            let got = counts[..half].iter().map(|&c| f64::from(c)).sum::<f64>() / f64::from(draws);
            assert!(
                (got - expected).abs() < 0.005,
                "n {keys} theta {theta} first half: {got} for {expected}"
            );
        }
    }

    #[test]
    fn popular_ranks_are_spread_over_distinct_keys() {
        let chooser = KeyChooser::new(1_000_000, DistributionSpec::Zipf(0.99));
        assert_eq!(gcd(chooser.spread, 1_000_000), 1);
        let seen: std::collections::HashSet<u64> = (0..1000).map(|r| (r * chooser.spread) % chooser.keys).collect();
        assert_eq!(seen.len(), 1000);
    }

    /// The parts have all keys, each in one of them, for the preload and for draws; and within a part popularity is what it
    /// was.
    #[test]
    fn split_choosers_share_the_keys() {
        const KEYS: u64 = 999;
        for spec in [DistributionSpec::Uniform, DistributionSpec::Zipf(0.99)] {
            let whole = KeyChooser::new(KEYS, spec);
            let parts = whole.split(4, |key| (key % 3) as usize);
            assert!(parts[3].is_none());
            let mut rng = Rng::new(5);
            for (number, part) in parts[..3].iter().enumerate() {
                let part = part.as_ref().unwrap();
                assert_eq!(part.keys(), KEYS / 3);
                let preloaded: std::collections::BTreeSet<u64> = (0..part.keys()).map(|p| part.preloaded(p)).collect();
                assert!(preloaded.into_iter().eq((0..KEYS).skip(number).step_by(3)));
                let draws = 200_000;
                let mut counts = vec![0u32; KEYS as usize];
                for _ in 0..draws {
                    counts[part.pick(&mut rng) as usize] += 1;
                }
                let weight = |rank: u64| match spec {
                    DistributionSpec::Uniform => 1.0,
                    DistributionSpec::Zipf(theta) => zipf_weight(rank, theta),
                };
                let own = |rank: &u64| whole.key_of_rank(*rank) % 3 == number as u64;
                let total: f64 = (0..KEYS).filter(own).map(weight).sum();
                for rank in (0..KEYS).filter(own) {
                    let expected = weight(rank) / total;
                    let got = f64::from(counts[whole.key_of_rank(rank) as usize]) / f64::from(draws);
                    let tolerance = 6.0 * (expected / f64::from(draws)).sqrt() + 1e-4;
                    assert!(
                        (got - expected).abs() < tolerance,
                        "{spec} rank {rank}: {got} for {expected}"
                    );
                }
                assert!(
                    (0..KEYS)
                        .filter(|key| key % 3 != number as u64)
                        .all(|key| counts[key as usize] == 0)
                );
            }
        }
    }

    /// Also where most keys are drawn next to never, and down to the last key.
    #[test]
    fn other_keys_are_found() {
        for spec in [DistributionSpec::Uniform, DistributionSpec::Zipf(5.0)] {
            let chooser = KeyChooser::new(500, spec);
            let (mut rng, mut taken) = (Rng::new(1), HashSet::new());
            let mut keys: Vec<u64> = (0..500).map(|_| chooser.pick_another(&mut rng, &mut taken)).collect();
            keys.sort_unstable();
            assert!(keys.into_iter().eq(0..500), "{spec}");
        }
    }

    #[test]
    fn uniform_touches_everything_evenly() {
        let chooser = KeyChooser::new(100, DistributionSpec::Uniform);
        let mut rng = Rng::new(1);
        let mut counts = [0u32; 100];
        for _ in 0..100_000 {
            counts[chooser.pick(&mut rng) as usize] += 1;
        }
        assert!(counts.iter().all(|&c| (800..1200).contains(&c)));
    }

    #[test]
    fn ratios_read() {
        assert_eq!(
            "10:1:0".parse::<Ratio>().unwrap(),
            Ratio {
                get: 10,
                set: 1,
                delete: 0
            }
        );
        assert_eq!(
            "1:1".parse::<Ratio>().unwrap(),
            Ratio {
                get: 1,
                set: 1,
                delete: 0
            }
        );
        for text in ["", "0:0:0", "1", "1:2:3:4", "a:b:c", "-1:1:0"] {
            assert!(text.parse::<Ratio>().is_err(), "{text}");
        }
    }
}
