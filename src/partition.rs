//! From a key to the core that owns it: token, range, shard, core.

use crate::model::{CoreId, ShardId};
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// How keys become tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Partitioner {
    /// The seeded XXH3 of the key, or of its `{hash tag}`: keys spread evenly whatever they look like.
    Hashed {
        /// Seed of the hash. Fixed for the life of a data set.
        seed: u64,
    },
    /// The key's first eight bytes, big-endian: neighbours stay neighbours, and the user says where ranges end.
    Ordered {
        /// Seed of the hash inside a shard.
        seed: u64,
    },
}

/// Where a key belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Position on the line of tokens; decides the shard.
    pub token: u64,
    /// Hash of the whole key; decides the place inside the shard's index.
    pub hash: u64,
}

impl Partitioner {
    /// The place of `key`.
    #[inline]
    pub fn place(&self, key: &[u8]) -> Place {
        match *self {
            Partitioner::Hashed { seed } => {
                let hash = xxh3_64_with_seed(key, seed);
                let token = match hash_tag(key) {
                    None => hash,
                    Some(tag) => xxh3_64_with_seed(tag, seed),
                };
                Place { token, hash }
            }
            Partitioner::Ordered { seed } => Place {
                token: ordered_token(key),
                hash: xxh3_64_with_seed(key, seed),
            },
        }
    }
}

/// The first eight bytes of a key as a big-endian number; a shorter key counts as if zeros followed it.
pub fn ordered_token(key: &[u8]) -> u64 {
    let mut bytes = [0; 8];
    let length = key.len().min(8);
    bytes[..length].copy_from_slice(&key[..length]);
    u64::from_be_bytes(bytes)
}

/// The part of a key between its first `{` and the next `}`, when there is something between them: keys that share it
/// live on one shard. The rule is Redis Cluster's.
#[inline]
fn hash_tag(key: &[u8]) -> Option<&[u8]> {
    let open = memchr::memchr(b'{', key)?;
    let close = memchr::memchr(b'}', &key[open + 1..])?;
    (close > 0).then(|| &key[open + 1..open + 1 + close])
}

/// Why a list of boundaries cannot be used.
#[derive(Debug, PartialEq, Eq)]
pub enum BoundariesError {
    /// There must be one boundary fewer than shards.
    Count {
        /// How many came.
        given: usize,
        /// How many shards there are to be.
        shards: usize,
    },
    /// Two neighbours in the list are equal, out of order, or share their first eight bytes.
    NotAscending {
        /// The earlier one.
        first: Vec<u8>,
        /// The later one.
        second: Vec<u8>,
        /// True when the keys themselves are in order and only their first eight bytes are equal.
        same_token: bool,
    },
    /// The first boundary has token 0, which leaves nothing below it.
    Empty {
        /// The boundary.
        boundary: Vec<u8>,
    },
}

impl std::fmt::Display for BoundariesError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            BoundariesError::Count { given, shards } => write!(
                f,
                "{given} boundaries for {shards} shards: give {} (one fewer than shards), or change --shards",
                shards.saturating_sub(1)
            ),
            BoundariesError::NotAscending {
                first,
                second,
                same_token,
            } => {
                let (first, second) = (first.escape_ascii(), second.escape_ascii());
                if *same_token {
                    write!(
                        f,
                        "boundaries '{first}' and '{second}' are the same token (their first 8 bytes agree): the range \
                         between them would be empty"
                    )
                } else {
                    write!(
                        f,
                        "boundaries '{first}' and '{second}' are not in ascending order: sort them and remove repetitions"
                    )
                }
            }
            BoundariesError::Empty { boundary } => {
                let boundary = boundary.escape_ascii();
                write!(f, "boundary '{boundary}' is token 0: no key lies below it")
            }
        }
    }
}

/// Contiguous tokens `[start, end]`, both inclusive so that the last range can end at `u64::MAX`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenRange {
    /// First token.
    pub start: u64,
    /// Last token.
    pub end: u64,
}

/// Sorted boundaries: token -> shard -> core. Immutable once built and shared by all cores.
#[derive(Clone, Debug)]
pub struct RangeTable {
    partitioner: Partitioner,
    /// First token of each shard; `starts[0]` is 0.
    starts: Vec<u64>,
    /// The shards divide the tokens evenly, so a multiplication finds one.
    even: bool,
    cores: u16,
}

impl RangeTable {
    /// Even ranges, for hashed tokens.
    pub fn even(seed: u64, shards: u16, cores: u16) -> Self {
        let starts = (0..u128::from(shards))
            .map(|shard| ((shard << 64).div_ceil(u128::from(shards))) as u64)
            .collect();
        Self {
            partitioner: Partitioner::Hashed { seed },
            starts,
            even: true,
            cores,
        }
    }

    /// Ranges between user-given keys. `boundaries` are the first keys of the second and all later shards.
    pub fn ordered(seed: u64, boundaries: &[Vec<u8>], shards: u16, cores: u16) -> Result<Self, BoundariesError> {
        if boundaries.len() + 1 != usize::from(shards) {
            return Err(BoundariesError::Count {
                given: boundaries.len(),
                shards: usize::from(shards),
            });
        }
        for pair in boundaries.windows(2) {
            if ordered_token(&pair[0]) >= ordered_token(&pair[1]) {
                return Err(BoundariesError::NotAscending {
                    same_token: pair[0] < pair[1],
                    first: pair[0].clone(),
                    second: pair[1].clone(),
                });
            }
        }
        if let Some(first) = boundaries.first()
            && ordered_token(first) == 0
        {
            return Err(BoundariesError::Empty {
                boundary: first.clone(),
            });
        }
        let starts = std::iter::once(0)
            .chain(boundaries.iter().map(|key| ordered_token(key)))
            .collect();
        Ok(Self {
            partitioner: Partitioner::Ordered { seed },
            starts,
            even: false,
            cores,
        })
    }

    /// The place of `key`.
    #[inline]
    pub fn place(&self, key: &[u8]) -> Place {
        self.partitioner.place(key)
    }

    /// How keys become tokens here.
    pub fn partitioner(&self) -> Partitioner {
        self.partitioner
    }

    /// How many shards there are.
    pub fn shards(&self) -> u16 {
        self.starts.len() as u16
    }

    /// How many cores share them.
    pub fn cores(&self) -> u16 {
        self.cores
    }

    /// The shard that owns `token`.
    #[inline]
    pub fn shard_of(&self, token: u64) -> ShardId {
        if self.even {
            return ShardId(((u128::from(token) * self.starts.len() as u128) >> 64) as u16);
        }
        ShardId((self.starts.partition_point(|start| *start <= token) - 1) as u16)
    }

    /// The core that owns `shard`: contiguous runs, as even as possible.
    #[inline]
    pub fn core_of(&self, shard: ShardId) -> CoreId {
        CoreId((u32::from(shard.0) * u32::from(self.cores) / self.starts.len() as u32) as u16)
    }

    /// The tokens that `shard` owns.
    pub fn range(&self, shard: ShardId) -> TokenRange {
        let index = usize::from(shard.0);
        TokenRange {
            start: self.starts[index],
            end: self.starts.get(index + 1).map_or(u64::MAX, |next| next - 1),
        }
    }

    /// The shards that `core` owns, in order; empty when there are fewer shards than cores.
    pub fn shards_of(&self, core: CoreId) -> impl Iterator<Item = ShardId> + '_ {
        (0..self.shards())
            .map(ShardId)
            .filter(move |shard| self.core_of(*shard) == core)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every token belongs to exactly the shard whose range holds it, also at the edges.
    #[test]
    fn even_ranges_cover_all_tokens_once() {
        for shards in [1u16, 2, 3, 7, 64, 1000] {
            let table = RangeTable::even(1, shards, shards.min(5));
            assert_eq!(table.range(ShardId(0)).start, 0);
            assert_eq!(table.range(ShardId(shards - 1)).end, u64::MAX);
            for shard in 0..shards {
                let range = table.range(ShardId(shard));
                for token in [range.start, range.end, range.start / 2 + range.end / 2] {
                    assert_eq!(table.shard_of(token), ShardId(shard), "{shards} shards, token {token}");
                }
            }
        }
    }

    /// Each core owns one contiguous run of shards and all runs together are all shards, for any two counts.
    #[test]
    fn cores_own_contiguous_runs() {
        for (shards, cores) in [(1, 1), (2, 2), (64, 8), (64, 5), (2, 8), (7, 3)] {
            let table = RangeTable::even(1, shards, cores);
            let all: Vec<ShardId> = (0..cores).flat_map(|core| table.shards_of(CoreId(core))).collect();
            assert_eq!(all, (0..shards).map(ShardId).collect::<Vec<_>>());
        }
    }

    #[test]
    fn ordered_ranges_follow_the_keys() {
        let boundaries = [b"g".to_vec(), b"n".to_vec()];
        let table = RangeTable::ordered(1, &boundaries, 3, 3).unwrap();
        for (key, shard) in [("a", 0), ("fz", 0), ("g", 1), ("m", 1), ("n", 2), ("zebra", 2)] {
            assert_eq!(
                table.shard_of(table.place(key.as_bytes()).token),
                ShardId(shard),
                "{key}"
            );
        }
    }

    #[test]
    fn bad_boundaries_name_the_two() {
        let error = |keys: &[&str], shards| {
            let keys: Vec<Vec<u8>> = keys.iter().map(|key| key.as_bytes().to_vec()).collect();
            RangeTable::ordered(1, &keys, shards, 1).unwrap_err().to_string()
        };
        assert!(error(&["n", "g"], 3).contains("'n' and 'g' are not in ascending order"));
        assert!(error(&["g", "g"], 3).contains("'g' and 'g'"));
        assert!(error(&["customer1", "customer2"], 3).contains("same token"));
        assert!(error(&["g"], 3).contains("1 boundaries for 3 shards"));
        assert!(error(&[""], 2).contains("token 0"));
    }

    #[test]
    fn keys_with_one_tag_share_a_token_but_not_a_hash() {
        let table = RangeTable::even(9, 16, 4);
        let (a, b) = (table.place(b"{user1}:name"), table.place(b"{user1}:mail"));
        assert_eq!(a.token, b.token);
        assert_ne!(a.hash, b.hash);
        // An empty tag is no tag.
        assert_eq!(table.place(b"{}x").token, table.place(b"{}x").hash);
    }
}
