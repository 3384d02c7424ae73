//! One core's counters and latency histograms: plain numbers, written by that core alone and merged when somebody asks. Beside
//! them, [which keys are hot](hot_keys) and [which requests were slow](slow_log).

pub mod hot_keys;
pub mod latency;
pub mod operations;
pub mod slow_log;

use crate::encoding::Reader;
use crate::model::{Class, Command, CoreId, Op, Reply};
use ahash::AHashMap;
use hdrhistogram::Histogram;
use hdrhistogram::serialization::{Deserializer, Serializer, V2Serializer};
use hot_keys::HotKey;
use latency::{Durations, bucket_of};
use operations::Operations;
use slow_log::SlowRequest;

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// What a core counts. Merging adds; gauges (marked so) are of the moment they were collected.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct Counters { $($(#[$doc])* pub $name: u64,)* }

        impl Counters {
            /// Adds another core's.
            pub fn merge(&mut self, other: &Counters) {
                $(self.$name += other.$name;)*
            }

            /// Each with its name.
            pub fn named(&self) -> impl Iterator<Item = (&'static str, u64)> {
                [$((stringify!($name), self.$name)),*].into_iter()
            }

            fn push(&self, out: &mut Vec<u8>) {
                $(out.extend_from_slice(&self.$name.to_le_bytes());)*
            }

            fn read(reader: &mut Reader<'_>) -> Self {
                Self { $($name: reader.u64(),)* }
            }
        }
    };
}

counters! {
    /// Reads that found an item.
    get_hits,
    /// Reads that found none.
    get_misses,
    /// Reads (among the misses) that met an item whose time was over.
    get_expired,
    /// Writes asked for, whatever came of them.
    sets,
    /// Items written.
    items_written,
    /// Deletes that found an item.
    delete_hits,
    /// Deletes that found none.
    delete_misses,
    /// Additions to a number that was there.
    increment_hits,
    /// Additions without an item.
    increment_misses,
    /// Subtractions from a number that was there.
    decrement_hits,
    /// Subtractions without an item.
    decrement_misses,
    /// Deadline changes that found an item, reads with a new deadline included.
    touch_hits,
    /// Deadline changes without an item.
    touch_misses,
    /// Conditions on a version that held.
    version_hits,
    /// Conditions on a version without an item.
    version_misses,
    /// Conditions on a version that another write had changed.
    version_mismatches,
    /// Items removed because their time was over.
    expired,
    /// Items evicted that were read at most once in the time that new items have.
    evicted_new,
    /// Items evicted that had been read more often, and then no more for as long as a round takes.
    evicted_old,
    /// Items evicted (among both) that were never read since they were written.
    evicted_unread,
    /// Items evicted (among both) ahead of need, to have memory ready for large values, other cores and connections.
    evicted_ahead,
    /// Items evicted (among both) within two minutes, nearly, of their last use.
    evicted_within_2m,
    /// Later than that, and within an hour of it.
    evicted_within_1h,
    /// Later than that, and within a day of it.
    evicted_within_1d,
    /// Later than that.
    evicted_later,
    /// How often the store was to be emptied.
    flushes,
    /// Writes refused because of the memory limit.
    out_of_memory,
    /// Writes refused because of the value limit.
    too_large,
    /// Writes refused because a core takes none. A transaction counts once, and none of its writes is counted elsewhere.
    read_only_refusals,
    /// Requests that no protocol understands, or that it refuses.
    bad_requests,
    /// Requests served for connections of this core, by any core.
    requests,
    /// Requests of this core's connections that went to another core.
    forwarded,
    /// Requests served for other cores.
    served_for_others,
    /// Transactions and requests for several keys that were finished.
    txns,
    /// How often one of them locked anew, because an older request wanted what it had locked.
    txn_retries,
    /// Requests that waited for a transaction to end.
    lock_waits,
    /// Replies that waited until what they tell was safe on disk.
    held_replies,
    /// Writes to the log, each of everything that waited.
    log_writes,
    /// How often the log was made safe.
    log_syncs,
    /// Bytes of effects written to the log.
    log_bytes,
    /// Bytes of effects that wait to be written to it (gauge).
    log_waiting_bytes,
    /// 1 when the log cannot be written any more, so that writes are refused (gauge).
    log_failed,
    /// Snapshots of all of the core's shards that were finished.
    snapshots,
    /// 1 when the last one was given up, which leaves the older one and the log in force (gauge).
    snapshot_failed,
    /// When the last one was finished, in milliseconds since the Unix epoch; 0: none yet (gauge, of one core: the sum of several means
    /// nothing, so reports of the whole server have the earliest).
    snapshot_at_ms,
    /// How often a request waited because all credits to its owner were in use.
    credit_waits,
    /// Connections accepted.
    connections_opened,
    /// Connections refused because of the limit.
    connections_refused,
    /// Connections closed because they were idle, or did not read, for too long.
    connections_timed_out,
    /// Bytes received.
    bytes_received,
    /// Bytes sent.
    bytes_sent,
    /// How often the kernel had no buffer left to receive into.
    receive_buffers_exhausted,
    /// Turns of the event loop.
    turns,
    /// Nanoseconds spent waiting for work.
    idle_ns,
    /// Nanoseconds since the core started (gauge).
    uptime_ns,
    /// Open connections (gauge).
    connections,
    /// Items (gauge).
    items,
    /// Bytes of keys and values (gauge).
    payload_bytes,
    /// Bytes of the slots that hold items, and of values that items refer to (gauge).
    item_bytes,
    /// Bytes charged for items: whole pages of slots, free ones included, and values that items refer to (gauge).
    item_resident_bytes,
    /// Bytes charged for indexes (gauge).
    index_bytes,
    /// Bytes charged for the order in which items expire and are evicted (gauge).
    order_bytes,
    /// Bytes charged for snapshots that are being made (gauge).
    image_bytes,
    /// Bytes charged for values that are no longer stored, but still being sent (gauge).
    lingering_bytes,
    /// Bytes charged for what connections have received, and for replies that they have not taken (gauge).
    connection_bytes,
    /// Bytes charged to the memory limit for everything (gauge).
    charged_bytes,
    /// Bytes of the process that are resident and that nobody has charged, on the first core (gauge).
    other_bytes,
    /// Microseconds of CPU time that the process has used, on the first core (gauge). Cores look at it at different times,
    /// so that only the same core's never goes back.
    process_cpu_us,
    /// Requests to other cores that are not answered (gauge).
    mesh_requests,
    /// What they cost of the links' credit, in bytes (gauge).
    mesh_bytes,
    /// Connections that wait for credit (gauge).
    mesh_waiting,
}

impl Counters {
    /// Items evicted.
    pub fn evictions(&self) -> u64 {
        self.evicted_new + self.evicted_old
    }
}

/// A latency from 100 ns to a minute, to three digits.
fn new_histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(LATENCY_NS_MIN, LATENCY_NS_MAX, 3).expect("constant bounds are valid")
}

const LATENCY_NS_MIN: u64 = 100;
const LATENCY_NS_MAX: u64 = 60_000_000_000;
const CLASSES: usize = Class::ALL.len();

/// Requests of one class that arrived in the same turn and were answered in the same turn.
#[derive(Clone, Copy, Debug)]
struct Answered {
    arrived_ns: u64,
    class: Class,
    forwarded: bool,
    count: u32,
}

/// One core's counters and histograms, or the sum of several cores'.
#[derive(Debug)]
pub struct Metrics {
    /// The plain numbers.
    pub counters: Counters,
    /// What came of commands that this core executed.
    pub operations: Operations,
    /// By class, and whether they were forwarded: how long requests took.
    durations: [[Durations; CLASSES]; 2],
    /// How long turns took, without the waiting between them.
    turns: Durations,
    /// Of a report, if they were wanted: one core's hottest keys, hottest first. Not merged.
    pub hot_keys: Vec<HotKey>,
    /// Of a report, if they were wanted: one core's last slow requests, newest first. Not merged.
    pub slow_log: Vec<SlowRequest>,
    /// By class: latency in nanoseconds of requests served by the core that received them, and of forwarded ones.
    local: Vec<Histogram<u64>>,
    forwarded: Vec<Histogram<u64>>,
    /// Served locally in this turn, by class.
    local_answered: [u32; CLASSES],
    /// The others answered in this turn, in runs.
    later_answered: Vec<Answered>,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            counters: Counters::default(),
            operations: Operations::default(),
            durations: Default::default(),
            turns: Durations::default(),
            hot_keys: vec![],
            slow_log: vec![],
            local: (0..CLASSES).map(|_| new_histogram()).collect(),
            forwarded: (0..CLASSES).map(|_| new_histogram()).collect(),
            local_answered: [0; CLASSES],
            later_answered: Vec::with_capacity(64),
        }
    }
}

impl Metrics {
    /// Counts a request that was received and answered in this turn.
    #[inline]
    pub fn answered(&mut self, class: Class) {
        self.local_answered[class as usize] += 1;
    }

    /// Counts a request that came in an earlier turn, or went to another core, and is answered in this turn.
    #[inline]
    pub fn answered_later(&mut self, class: Class, arrived_ns: u64, forwarded: bool) {
        match self.later_answered.last_mut() {
            Some(last) if (last.arrived_ns, last.class, last.forwarded) == (arrived_ns, class, forwarded) => {
                last.count += 1;
            }
            _ => self.later_answered.push(Answered {
                arrived_ns,
                class,
                forwarded,
                count: 1,
            }),
        }
    }

    /// Records what this turn answered: from the completion that carried a request's last byte (`turn_began_ns` for local
    /// ones) to the submission of its reply (`now_ns`).
    #[inline]
    pub fn end_turn(&mut self, turn_began_ns: u64, now_ns: u64) {
        let turn_ns = now_ns - turn_began_ns;
        let mut bucket = bucket_of(turn_ns);
        self.turns.record_in(bucket, turn_ns, 1);
        for (class, count) in self.local_answered.iter_mut().enumerate() {
            if *count > 0 {
                self.local[class].saturating_record_n(turn_ns, u64::from(*count));
                self.durations[0][class].record_in(bucket, turn_ns, u64::from(*count));
                self.counters.requests += u64::from(*count);
                *count = 0;
            }
        }
        // Most of what is answered in a turn came in the same.
        let mut before_ns = turn_ns;
        for answered in self.later_answered.drain(..) {
            let latency_ns = now_ns.saturating_sub(answered.arrived_ns);
            if latency_ns != before_ns {
                (before_ns, bucket) = (latency_ns, bucket_of(latency_ns));
            }
            let histograms = if answered.forwarded {
                &mut self.forwarded
            } else {
                &mut self.local
            };
            let (class, count) = (answered.class as usize, u64::from(answered.count));
            histograms[class].saturating_record_n(latency_ns, count);
            self.durations[usize::from(answered.forwarded)][class].record_in(bucket, latency_ns, count);
            self.counters.requests += count;
        }
    }

    /// It carries histograms to three digits.
    pub fn has_latencies(&self) -> bool {
        !self.local.is_empty()
    }

    /// Without histograms to three digits; everything else is zero.
    pub fn without_latencies() -> Self {
        Self {
            counters: Counters::default(),
            operations: Operations::default(),
            durations: Default::default(),
            turns: Durations::default(),
            hot_keys: vec![],
            slow_log: vec![],
            local: vec![],
            forwarded: vec![],
            local_answered: [0; CLASSES],
            later_answered: vec![],
        }
    }

    /// A copy to give away; the histograms to three digits, which are large, only when they are asked for.
    pub fn snapshot(&self, latencies: bool) -> Self {
        let mut copy = Self::without_latencies();
        copy.counters = self.counters;
        copy.operations.clone_from(&self.operations);
        copy.durations.clone_from(&self.durations);
        copy.turns.clone_from(&self.turns);
        if latencies {
            copy.local.clone_from(&self.local);
            copy.forwarded.clone_from(&self.forwarded);
        }
        copy
    }

    /// Sets everything to zero, but the time that was spent idle: it belongs to the time since the start.
    pub fn reset(&mut self) {
        self.counters = Counters {
            idle_ns: self.counters.idle_ns,
            ..Counters::default()
        };
        self.operations = Operations::default();
        self.durations = Default::default();
        self.turns = Durations::default();
        self.local
            .iter_mut()
            .chain(&mut self.forwarded)
            .for_each(Histogram::reset);
    }

    /// Adds another core's, or a snapshot of it.
    pub fn merge(&mut self, other: &Metrics) {
        self.counters.merge(&other.counters);
        self.operations.merge(&other.operations);
        for (ours, theirs) in self.all_durations_mut().zip(other.all_durations()) {
            ours.merge(theirs);
        }
        let ours = self.local.iter_mut().chain(&mut self.forwarded);
        for (ours, theirs) in ours.zip(other.local.iter().chain(&other.forwarded)) {
            ours.add(theirs).expect("all histograms have the same bounds");
        }
    }

    /// The latencies of a class, in nanoseconds, of requests served where they were received, or of forwarded ones.
    pub fn latency(&self, class: Class, forwarded: bool) -> &Histogram<u64> {
        let histograms = if forwarded { &self.forwarded } else { &self.local };
        &histograms[class as usize]
    }

    /// How long requests of a class took, served where they were received, or forwarded.
    pub fn durations(&self, class: Class, forwarded: bool) -> &Durations {
        &self.durations[usize::from(forwarded)][class as usize]
    }

    /// How long turns took.
    pub fn turns(&self) -> &Durations {
        &self.turns
    }

    fn all_durations(&self) -> impl Iterator<Item = &Durations> {
        self.durations.iter().flatten().chain([&self.turns])
    }

    fn all_durations_mut(&mut self) -> impl Iterator<Item = &mut Durations> {
        self.durations.iter_mut().flatten().chain([&mut self.turns])
    }

    /// Appends everything: the numbers, each histogram in HDR's V2 encoding behind its length, hot keys, slow requests.
    pub fn push(&self, out: &mut Vec<u8>) {
        self.counters.push(out);
        self.operations.push(out);
        self.all_durations().for_each(|durations| durations.push(out));
        out.push(u8::from(!self.local.is_empty()));
        for histogram in self.local.iter().chain(&self.forwarded) {
            let at = out.len();
            out.extend_from_slice(&[0; 4]);
            V2Serializer::new()
                .serialize(histogram, out)
                .expect("a histogram of these bounds can be written to memory");
            let length = (out.len() - at - 4) as u32;
            out[at..at + 4].copy_from_slice(&length.to_le_bytes());
        }
        out.extend_from_slice(&(self.hot_keys.len() as u32).to_le_bytes());
        self.hot_keys.iter().for_each(|hot| hot.push(out));
        out.extend_from_slice(&(self.slow_log.len() as u32).to_le_bytes());
        self.slow_log.iter().for_each(|slow| slow.push(out));
    }

    /// Reads what [`Metrics::push`] wrote in this same process.
    pub fn read(reader: &mut Reader<'_>) -> Self {
        let mut metrics = Self::without_latencies();
        metrics.counters = Counters::read(reader);
        metrics.operations.read(reader);
        metrics.all_durations_mut().for_each(|durations| durations.read(reader));
        if reader.u8() == 1 {
            metrics.local = (0..CLASSES).map(|_| new_histogram()).collect();
            metrics.forwarded = metrics.local.clone();
        }
        for histogram in metrics.local.iter_mut().chain(&mut metrics.forwarded) {
            let length = reader.u32() as usize;
            let mut encoded = reader.bytes(length);
            *histogram = Deserializer::new()
                .deserialize(&mut encoded)
                .expect("written by the same library");
        }
        metrics.hot_keys = (0..reader.u32()).map(|_| HotKey::read(reader)).collect();
        metrics.slow_log = (0..reader.u32()).map(|_| SlowRequest::read(reader)).collect();
        metrics
    }
}

/// What the cores know, put together for a [`crate::model::Broadcast`].
#[derive(Debug)]
pub enum Report {
    /// It is done; there is nothing to tell.
    Done,
    /// It was not done: a core takes no writes.
    ReadOnly,
    /// A core's log cannot be written: what was done may be lost, or come back.
    NotDurable,
    /// Each core's metrics.
    Metrics(Vec<(CoreId, Metrics)>),
    /// Each connection.
    Connections(Vec<ConnectionFacts>),
    /// Each key prefix.
    Prefixes(Vec<(Vec<u8>, PrefixCounts)>),
}

/// What is known of a connection.
#[derive(Clone, Debug)]
pub struct ConnectionFacts {
    /// The core that serves it.
    pub core: CoreId,
    /// Its number on that core.
    pub number: u32,
    /// The protocol it speaks.
    pub protocol: String,
    /// The client's address.
    pub peer: String,
    /// Seconds since it last sent something.
    pub idle_s: u64,
}

/// What is counted per key prefix.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct PrefixCounts {
    /// Reads.
    pub gets: u64,
    /// Reads that found an item.
    pub hits: u64,
    /// Writes.
    pub sets: u64,
    /// Deletes.
    pub deletes: u64,
}

/// Key prefixes that one core tells apart; further ones are not counted.
const PREFIXES_MAX: usize = 1000;

/// What is counted per key prefix, the part of a key before its first colon.
#[derive(Debug, Default)]
pub struct Prefixes(AHashMap<Vec<u8>, PrefixCounts>);

impl Prefixes {
    /// Counts a command that was executed.
    pub fn count(&mut self, command: &Command<'_>, reply: &Reply<'_>) {
        let Some(end) = memchr::memchr(b':', command.key) else {
            return;
        };
        let prefix = &command.key[..end];
        if !self.0.contains_key(prefix) {
            if self.0.len() >= PREFIXES_MAX {
                return;
            }
            self.0.insert(prefix.to_vec(), PrefixCounts::default());
        }
        let Some(counts) = self.0.get_mut(prefix) else { return };
        match command.op {
            Op::Get { .. } => {
                counts.gets += 1;
                counts.hits += u64::from(matches!(reply, Reply::Found(_)));
            }
            Op::Put(_) => counts.sets += 1,
            Op::Delete(_) => counts.deletes += 1,
            _ => {}
        }
    }

    /// All of them.
    pub fn counts(&self) -> Vec<(Vec<u8>, PrefixCounts)> {
        self.0
            .iter()
            .map(|(prefix, counts)| (prefix.clone(), *counts))
            .collect()
    }
}

fn push_numbers(out: &mut Vec<u8>, numbers: &[u64]) {
    out.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
}

fn read_numbers(reader: &mut Reader<'_>, numbers: &mut [u64]) {
    numbers.iter_mut().for_each(|number| *number = reader.u64());
}

fn push_text(out: &mut Vec<u8>, text: &[u8]) {
    out.extend_from_slice(&(text.len() as u32).to_le_bytes());
    out.extend_from_slice(text);
}

fn read_text(reader: &mut Reader<'_>) -> Vec<u8> {
    let length = reader.u32() as usize;
    reader.bytes(length).to_vec()
}

impl Report {
    /// Adds another core's part, of the same kind.
    pub fn merge(&mut self, other: Report) {
        match (self, other) {
            (ours, refusal @ (Report::ReadOnly | Report::NotDurable)) => *ours = refusal,
            (Report::Metrics(ours), Report::Metrics(theirs)) => {
                ours.extend(theirs);
                ours.sort_by_key(|(core, _)| *core);
            }
            (Report::Connections(ours), Report::Connections(theirs)) => ours.extend(theirs),
            (Report::Prefixes(ours), Report::Prefixes(theirs)) => {
                for (prefix, counts) in theirs {
                    match ours.iter_mut().find(|(known, _)| *known == prefix) {
                        None => ours.push((prefix, counts)),
                        Some((_, sum)) => {
                            sum.gets += counts.gets;
                            sum.hits += counts.hits;
                            sum.sets += counts.sets;
                            sum.deletes += counts.deletes;
                        }
                    }
                }
                ours.sort();
            }
            _ => {}
        }
    }

    /// Appends its flat form, for another core of this process.
    pub fn push(&self, out: &mut Vec<u8>) {
        let head = |out: &mut Vec<u8>, kind: u8, count: usize| {
            out.push(kind);
            out.extend_from_slice(&(count as u32).to_le_bytes());
        };
        match self {
            Report::Done => head(out, 0, 0),
            Report::ReadOnly => head(out, 4, 0),
            Report::NotDurable => head(out, 5, 0),
            Report::Metrics(cores) => {
                head(out, 1, cores.len());
                for (core, metrics) in cores {
                    out.extend_from_slice(&core.0.to_le_bytes());
                    metrics.push(out);
                }
            }
            Report::Connections(connections) => {
                head(out, 2, connections.len());
                for facts in connections {
                    out.extend_from_slice(&facts.core.0.to_le_bytes());
                    out.extend_from_slice(&facts.number.to_le_bytes());
                    push_text(out, facts.protocol.as_bytes());
                    push_text(out, facts.peer.as_bytes());
                    out.extend_from_slice(&facts.idle_s.to_le_bytes());
                }
            }
            Report::Prefixes(prefixes) => {
                head(out, 3, prefixes.len());
                for (prefix, counts) in prefixes {
                    push_text(out, prefix);
                    for count in [counts.gets, counts.hits, counts.sets, counts.deletes] {
                        out.extend_from_slice(&count.to_le_bytes());
                    }
                }
            }
        }
    }

    /// Reads what [`Report::push`] wrote.
    pub fn read(reader: &mut Reader<'_>) -> Self {
        let (kind, count) = (reader.u8(), reader.u32());
        match kind {
            1 => Report::Metrics(
                (0..count)
                    .map(|_| (CoreId(reader.u16()), Metrics::read(reader)))
                    .collect(),
            ),
            2 => Report::Connections(
                (0..count)
                    .map(|_| ConnectionFacts {
                        core: CoreId(reader.u16()),
                        number: reader.u32(),
                        protocol: String::from_utf8_lossy(&read_text(reader)).into_owned(),
                        peer: String::from_utf8_lossy(&read_text(reader)).into_owned(),
                        idle_s: reader.u64(),
                    })
                    .collect(),
            ),
            3 => Report::Prefixes(
                (0..count)
                    .map(|_| {
                        let prefix = read_text(reader);
                        let (gets, hits, sets, deletes) = (reader.u64(), reader.u64(), reader.u64(), reader.u64());
                        (
                            prefix,
                            PrefixCounts {
                                gets,
                                hits,
                                sets,
                                deletes,
                            },
                        )
                    })
                    .collect(),
            ),
            4 => Report::ReadOnly,
            5 => Report::NotDurable,
            _ => Report::Done,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::operations::Outcome;
    use super::*;

    /// Merged over the wire form, nothing is lost or counted twice.
    #[test]
    fn merging_adds() {
        let mut core = Metrics::default();
        core.counters.get_hits = 3;
        core.answered(Class::Get);
        core.answered(Class::Get);
        core.answered_later(Class::Set, 500, true);
        core.end_turn(1_000, 11_000);
        let get = Command {
            key: b"k",
            op: Op::Get {
                version: false,
                effects: None,
            },
        };
        core.operations.count(2, &get, &Reply::NotFound, true);
        core.hot_keys = vec![HotKey {
            key: b"hot".to_vec(),
            per_second: 5,
            writes_per_second: 4,
            share_ppm: 3,
            error_ppm: 2,
        }];
        let mut sum = Metrics::default();
        for _ in 0..2 {
            let mut wire = vec![];
            core.push(&mut wire);
            let mut reader = Reader(&wire);
            let read = Metrics::read(&mut reader);
            assert_eq!(read.hot_keys, core.hot_keys);
            sum.merge(&read);
            assert!(reader.0.is_empty());
        }
        assert_eq!((sum.counters.get_hits, sum.counters.requests), (6, 6));
        let gets = sum.latency(Class::Get, false);
        assert_eq!((gets.len(), gets.max() / 100), (4, 100));
        assert_eq!(sum.latency(Class::Set, true).len(), 2);
        assert_eq!(sum.latency(Class::Set, false).len(), 0);
        let gets = sum.durations(Class::Get, false);
        assert_eq!((gets.count(), gets.sum_ns()), (4, 40_000));
        assert_eq!(sum.durations(Class::Set, true).sum_ns(), 21_000);
        assert_eq!((sum.turns().count(), sum.turns().sum_ns()), (2, 20_000));
        let missed = sum.operations.executed(2, Class::Get, Outcome::NotFound, true);
        assert_eq!(missed, 2);
        core.reset();
        assert_eq!(
            (core.turns().count(), core.durations(Class::Get, false).count()),
            (0, 0)
        );
        assert_eq!(core.operations.executed(2, Class::Get, Outcome::NotFound, true), 0);
    }
}
