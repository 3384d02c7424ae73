//! The engine of one core inside this process, without network and kernel: what a server's thread does from received bytes
//! to bytes to send, and nothing else.
//!
//! [`Core`] drives an engine as the server's runtime does, turn by turn, with one connection that speaks memcached's text
//! protocol. What is put on it: [`growth`] (each insertion by itself), [`lookup`] (the cost of an operation by the number of
//! keys, with and without looking ahead) and [`hit_ratio`] (a cache that holds a part of the keys, beside [`policies`]).

use crate::process::thread_cpu_ns;
use crate::protocol::memcached::Memcached;
use crate::protocol::{Parsed, Protocol as _, Reply};
use crate::workload::{Command, Population};
use memkv::budget::Pool;
use memkv::config::{Bytes, Config, Eviction};
use memkv::engine::Engine;
use memkv::model::{CoreId, UnixMillis};
use memkv::partition::RangeTable;
use memkv::protocol::Protocol;
use serde::Serialize;
use std::hint::black_box;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

pub mod growth;
pub mod hit_ratio;
pub mod lookup;
pub mod policies;

/// Of the hash that spreads keys: fixed, so that runs can be compared.
const TOKEN_SEED: u64 = 7;

/// Requests that the preload puts into one piece.
const PRELOAD_PIPELINE: usize = 64;

/// An engine with one core and one connection.
pub struct Core {
    engine: Engine,
    connection: u32,
    began: Instant,
    began_ms: u64,
    replies: Vec<u8>,
}

impl Core {
    /// An empty engine with a memory limit in bytes; `None` for no limit. `eviction` is what it is to do at the limit.
    pub fn new(memory_bytes_max: Option<u64>, eviction: Eviction) -> Self {
        let mut config = Config::default();
        config.limits.eviction = eviction;
        config.limits.max_memory = memory_bytes_max.map(Bytes);
        let wall = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let began_ms = wall.unwrap_or_default().as_millis() as u64;
        let mut engine = Engine::new(
            CoreId(0),
            Arc::new(RangeTable::even(TOKEN_SEED, 1, 1)),
            Pool::new(memory_bytes_max.unwrap_or(u64::MAX)),
            Arc::new(config),
            UnixMillis(began_ms),
        );
        let connection = engine.opened(Protocol::Memcached, "inside".to_owned());
        Core {
            engine,
            connection,
            began: Instant::now(),
            began_ms,
            replies: Vec::new(),
        }
    }

    /// One turn, in which the connection receives these pieces, one by one. The replies are appended to
    /// [`replies`](Self::replies), which stands for the kernel's copy of what is sent.
    #[inline]
    pub fn turn<'a>(&mut self, pieces: impl Iterator<Item = &'a [u8]>) {
        // Never 0, which the engine takes for "not begun".
        let now_ns = self.began.elapsed().as_nanos() as u64 + 1;
        self.engine
            .begin_turn(now_ns, UnixMillis(self.began_ms + now_ns / 1_000_000));
        for piece in pieces {
            self.engine.received(self.connection, piece);
        }
        while let Some(id) = self.engine.attention() {
            if !self.engine.wants(id).send {
                continue;
            }
            let before = self.replies.len();
            for piece in self.engine.unsent(id) {
                self.replies.extend_from_slice(piece);
            }
            self.engine.sent(id, self.replies.len() - before);
        }
        self.engine.end_turn(self.began.elapsed().as_nanos() as u64 + 1);
        // A server asks before it sleeps.
        black_box(self.engine.has_background_work());
    }

    /// What was answered since [`forget_replies`](Self::forget_replies).
    pub fn replies(&self) -> &[u8] {
        &self.replies
    }

    /// Drops the replies.
    pub fn forget_replies(&mut self) {
        self.replies.clear();
    }

    /// Bytes charged to the memory limit.
    pub fn charged_bytes(&self) -> u64 {
        self.engine.charged_bytes()
    }

    /// A number of the statistics that a client is told (`stats`); `None` if there is none of this name.
    pub fn statistic(&mut self, name: &str) -> Option<u64> {
        self.forget_replies();
        self.turn([&b"stats\r\n"[..]].into_iter());
        let text = String::from_utf8_lossy(&self.replies);
        let value = crate::server_counts::statistic(&text, name);
        self.forget_replies();
        value
    }

    /// Writes keys of the population.
    ///
    /// # Errors
    ///
    /// A sentence that says what the engine answered when it did not store them all.
    pub fn preload(&mut self, population: &Population, keys: Range<u64>) -> Result<(), String> {
        let mut requests = Requests::default();
        for first in keys.clone().step_by(PRELOAD_PIPELINE) {
            requests.clear();
            for key in first..(first + PRELOAD_PIPELINE as u64).min(keys.end) {
                requests.push(Command::Set, key, population);
            }
            self.turn(requests.pieces(PRELOAD_PIPELINE));
            requests.outcomes(&self.replies, population)?.all_stored(first)?;
            self.forget_replies();
        }
        Ok(())
    }
}

/// Requests, back to back, made before any clock runs.
#[derive(Debug, Default)]
pub struct Requests {
    bytes: Vec<u8>,
    ends: Vec<usize>,
    asked: Vec<(Command, u64)>,
    scratch: Vec<u8>,
}

/// What came of requests.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Outcomes {
    /// Values stored.
    pub stored: u64,
    /// Values not stored.
    pub refused: u64,
    /// What the engine said to the first of these; empty if there was none.
    pub refusal: String,
    /// Keys found.
    pub hits: u64,
    /// By place among the requests: gets that found nothing.
    pub misses: Vec<usize>,
}

impl Outcomes {
    /// Whether nothing was refused of what was written, the keys from `first` on.
    ///
    /// # Errors
    ///
    /// A sentence that says what the engine answered, and what to do.
    fn all_stored(&self, first: u64) -> Result<(), String> {
        if self.refused == 0 {
            return Ok(());
        }
        let (refused, words) = (self.refused, &self.refusal);
        Err(format!(
            "the engine did not store {refused} of the keys from {first} on: {words}; use fewer --keys"
        ))
    }
}

impl Requests {
    /// Forgets all.
    pub fn clear(&mut self) {
        self.bytes.clear();
        self.ends.clear();
        self.asked.clear();
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.asked.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.asked.is_empty()
    }

    /// Adds one: a get, or a set of the value that belongs to the key.
    pub fn push(&mut self, command: Command, key: u64, population: &Population) {
        let name = population.key(key, &mut self.scratch);
        match command {
            Command::Set => Memcached::set(&mut self.bytes, name, &population.value(key)),
            _ => Memcached::get(&mut self.bytes, name),
        }
        self.ends.push(self.bytes.len());
        self.asked.push((command, key));
    }

    /// The bytes, so many requests in a piece.
    #[inline]
    pub fn pieces(&self, requests: usize) -> impl ExactSizeIterator<Item = &[u8]> {
        let mut start = 0;
        self.ends.chunks(requests).map(move |ends| {
            let end = ends[ends.len() - 1];
            &self.bytes[std::mem::replace(&mut start, end)..end]
        })
    }

    /// What the replies to all of them say.
    ///
    /// # Errors
    ///
    /// A sentence when they are not one reply for each request, in order, with the right values.
    pub fn outcomes(&self, replies: &[u8], population: &Population) -> Result<Outcomes, String> {
        let (mut outcomes, mut at) = (Outcomes::default(), 0);
        for (place, &(command, key)) in self.asked.iter().enumerate() {
            let rest = &replies[at..];
            let (reply, length) = match Memcached::reply(command, population.key_len(key), rest) {
                Parsed::Done(reply, length) => (reply, length),
                _ => {
                    let start = rest[..rest.len().min(80)].escape_ascii();
                    return Err(format!("the engine's reply to key {key} is none: '{start}'"));
                }
            };
            at += length;
            match reply {
                Reply::Stored => outcomes.stored += 1,
                Reply::Hit { value, .. } if population.value(key).matches(value) => outcomes.hits += 1,
                Reply::Hit { .. } => return Err(format!("the engine found another value under key {key}")),
                Reply::Miss => outcomes.misses.push(place),
                other => {
                    if let (0, Reply::Refused(words)) = (outcomes.refused, other) {
                        outcomes.refusal = words.escape_ascii().to_string();
                    }
                    outcomes.refused += 1;
                }
            }
        }
        if at < replies.len() {
            return Err("the engine answered more than it was asked".to_owned());
        }
        Ok(outcomes)
    }
}

/// What it costs to read the clocks here.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct ClockCost {
    /// The monotonic clock, in nanoseconds.
    pub wall_ns: f64,
    /// The CPU time of a thread, in nanoseconds of CPU time.
    pub cpu_ns: f64,
}

impl ClockCost {
    /// Reads them many times.
    pub fn measure() -> Self {
        const READS: u32 = 20_000;
        let before = thread_cpu_ns();
        for _ in 0..READS {
            black_box(Instant::now());
        }
        let between = thread_cpu_ns();
        for _ in 0..READS {
            black_box(thread_cpu_ns());
        }
        let each = |ns: u64| ns as f64 / f64::from(READS);
        ClockCost {
            wall_ns: each(between - before),
            cpu_ns: each(thread_cpu_ns() - between),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::workload::SizeSpec;

    /// Keys of 19 bytes.
    pub(crate) fn population(keys: u64, value_size: SizeSpec) -> Population {
        Population::new(keys, SizeSpec::Fixed(19), value_size, 1).unwrap()
    }

    #[test]
    fn a_core_answers() {
        let population = population(1000, SizeSpec::Range(0, 6000));
        let mut core = Core::new(None, Eviction::None);
        core.preload(&population, 0..500).unwrap();
        assert_eq!(core.statistic("curr_items"), Some(500));
        assert_eq!(core.statistic("nonsense"), None);
        let mut requests = Requests::default();
        for key in [3, 499, 500, 7] {
            requests.push(Command::Get, key, &population);
        }
        requests.push(Command::Set, 500, &population);
        for in_a_piece in [1, 2, 16] {
            core.turn(requests.pieces(in_a_piece));
            let outcomes = requests.outcomes(core.replies(), &population).unwrap();
            let missing = if in_a_piece == 1 { vec![2] } else { vec![] };
            let found = 4 - missing.len() as u64;
            assert_eq!((outcomes.stored, outcomes.hits, outcomes.misses), (1, found, missing));
            core.forget_replies();
        }
        assert!(core.charged_bytes() > 0);
    }

    #[test]
    fn what_is_no_answer_is_seen() {
        let population = population(10, SizeSpec::Fixed(20));
        let mut requests = Requests::default();
        requests.push(Command::Get, 1, &population);
        let message = requests.outcomes(b"END\r\nEND\r\n", &population).unwrap_err();
        assert!(message.contains("more than"), "{message}");
        let other = b"VALUE key0000000000000001 0 20\r\n00000000000000000000\r\nEND\r\n";
        assert!(requests.outcomes(other, &population).is_err());
        assert!(requests.outcomes(b"", &population).is_err());
    }

    #[test]
    fn a_full_core_is_told_of() {
        let population = population(100_000, SizeSpec::Fixed(100));
        let mut core = Core::new(Some(2 << 20), Eviction::None);
        let message = core.preload(&population, 0..100_000).unwrap_err();
        assert!(message.contains("out of memory"), "{message}");
    }

    #[test]
    fn pieces_are_cut_between_requests() {
        let population = population(10, SizeSpec::Fixed(20));
        let mut requests = Requests::default();
        for key in 0..5 {
            requests.push(Command::Get, key, &population);
        }
        let pieces: Vec<_> = requests.pieces(2).collect();
        assert_eq!(pieces.iter().map(|p| p.len() / 25).collect::<Vec<_>>(), [2, 2, 1]);
        assert_eq!(pieces.concat(), requests.bytes);
    }
}
