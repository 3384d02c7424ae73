//! What the page shows, as JSON: totals since the start, of which the page takes differences, and what is at this moment.

use super::{Protocol, ServerFacts};
use crate::metrics::Metrics;
use crate::metrics::hot_keys::HotKey;
use crate::metrics::latency::{BOUNDS_NS, Durations};
use crate::metrics::operations::Outcome;
use crate::metrics::slow_log::SlowRequest;
use crate::model::{Class, CoreId};
use crate::partition::Partitioner;
use serde::Serialize;

/// More ranges are told by core: a strip that is drawn on a screen shows no more.
const RANGES_MAX: usize = 256;
/// Of the cores' hottest keys and slow requests together, so many are told: more than this nobody reads while they change.
const HOT_KEYS_MAX: usize = 12;
const SLOW_REQUESTS_MAX: usize = 12;
/// So much of a long key is told.
const KEY_BYTES_MAX: usize = 160;

#[derive(Serialize)]
struct Live<'a> {
    version: &'a str,
    now_ms: u64,
    uptime_ms: u64,
    memory: Memory,
    items: u64,
    connections: u64,
    /// With a data directory.
    #[serde(skip_serializing_if = "Option::is_none")]
    log: Option<Log>,
    totals: Totals,
    latency: Latency,
    cores: Vec<Core>,
    partitioning: &'a str,
    ranges: Vec<Range>,
    operations: Vec<Operation>,
    hot_keys: Vec<Hot>,
    slow_threshold_us: u64,
    slow_log: Vec<Slow<'a>>,
}

/// In bytes.
#[derive(Serialize)]
struct Memory {
    limit: u64,
    resident: u64,
    payload: u64,
    kinds: Kinds,
}

/// What the memory limit is used for.
#[derive(Serialize)]
struct Kinds {
    items: u64,
    index: u64,
    order: u64,
    lingering: u64,
    connections: u64,
    images: u64,
    other: u64,
}

/// What is written down of all this.
#[derive(Serialize)]
struct Log {
    /// Bytes that wait.
    waiting: u64,
    /// Cores whose log cannot be written any more, or whose last snapshot was given up.
    failed: u64,
    snapshots_failed: u64,
    /// When the last snapshot of all cores was finished; 0: none since the start.
    snapshot_at_ms: u64,
}

#[derive(Serialize)]
struct Totals {
    requests: u64,
    forwarded: u64,
    bad_requests: u64,
    hits: u64,
    misses: u64,
    sets: u64,
    evictions: u64,
    expired: u64,
    out_of_memory: u64,
    transactions: u64,
    log_bytes: u64,
    bytes_received: u64,
    bytes_sent: u64,
    connections_opened: u64,
    connections_refused: u64,
}

/// How many requests took not longer than each bound, and longer than the one before it; one number more for those beyond all.
#[derive(Serialize)]
struct Latency {
    bounds_us: Vec<f64>,
    local: Vec<u64>,
    forwarded: Vec<u64>,
}

#[derive(Serialize)]
struct Core {
    core: u16,
    requests: u64,
    forwarded: u64,
    served_for_others: u64,
    idle_ns: u64,
    uptime_ns: u64,
    items: u64,
    charged: u64,
    connections: u64,
}

#[derive(Serialize)]
struct Range {
    /// Its first token, in 16 hexadecimal digits: a number of 64 bits is more than a page can hold exactly.
    start: String,
    core: u16,
}

#[derive(Serialize)]
struct Operation {
    protocol: &'static str,
    command: &'static str,
    count: u64,
    /// Those among them that found no item.
    misses: u64,
}

/// Of a core's recent requests: estimates.
#[derive(Serialize)]
struct Hot {
    key: String,
    core: u16,
    per_second: u64,
    writes_per_second: u64,
    share: f64,
}

/// Requests that came together and took too long.
#[derive(Serialize)]
struct Slow<'a> {
    at_ms: u64,
    protocol: &'a str,
    client: &'a str,
    command: &'static str,
    key: String,
    core: u16,
    requests: u32,
    queue_us: u64,
    hop_us: u64,
    execute_us: u64,
    flush_us: u64,
}

/// Writes it.
pub(super) fn live(cores: &[(CoreId, Metrics)], server: &ServerFacts<'_>, out: &mut Vec<u8>) {
    let mut sum = Metrics::without_latencies();
    cores.iter().for_each(|(_, metrics)| sum.merge(metrics));
    let c = &sum.counters;
    let live = Live {
        version: env!("CARGO_PKG_VERSION"),
        now_ms: server.now.0,
        // Of one core, and always of the same: each has its own idea of now.
        uptime_ms: cores.first().map_or(0, |(_, core)| core.counters.uptime_ns / 1_000_000),
        memory: Memory {
            limit: server.memory_bytes_max,
            resident: server.process.resident_bytes,
            payload: c.payload_bytes,
            kinds: Kinds {
                items: c.item_resident_bytes,
                index: c.index_bytes,
                order: c.order_bytes,
                lingering: c.lingering_bytes,
                connections: c.connection_bytes,
                images: c.image_bytes,
                other: c.other_bytes,
            },
        },
        items: c.items,
        connections: c.connections,
        log: server.config.data_dir.as_ref().map(|_| Log {
            waiting: c.log_waiting_bytes,
            failed: c.log_failed,
            snapshots_failed: c.snapshot_failed,
            snapshot_at_ms: snapshot_at_ms(cores),
        }),
        totals: Totals {
            requests: c.requests,
            forwarded: c.forwarded,
            bad_requests: c.bad_requests,
            hits: c.get_hits,
            misses: c.get_misses,
            sets: c.sets,
            evictions: c.evictions(),
            expired: c.expired,
            out_of_memory: c.out_of_memory,
            transactions: c.txns,
            log_bytes: c.log_bytes,
            bytes_received: c.bytes_received,
            bytes_sent: c.bytes_sent,
            connections_opened: c.connections_opened,
            connections_refused: c.connections_refused,
        },
        latency: Latency {
            bounds_us: BOUNDS_NS.iter().map(|ns| *ns as f64 / 1e3).collect(),
            local: buckets(&sum, false),
            forwarded: buckets(&sum, true),
        },
        cores: cores.iter().map(core).collect(),
        partitioning: match server.table.partitioner() {
            Partitioner::Hashed { .. } => "hashed",
            Partitioner::Ordered { .. } => "ordered",
        },
        ranges: ranges(server),
        operations: operations(&sum),
        hot_keys: hot_keys(cores),
        slow_threshold_us: server.config.slow_log_threshold.as_micros() as u64,
        slow_log: slow_log(cores),
    };
    serde_json::to_writer(out, &live).expect("all of it can be written to memory as JSON");
}

fn core((core, metrics): &(CoreId, Metrics)) -> Core {
    let c = &metrics.counters;
    Core {
        core: core.0,
        requests: c.requests,
        forwarded: c.forwarded,
        served_for_others: c.served_for_others,
        idle_ns: c.idle_ns,
        uptime_ns: c.uptime_ns,
        items: c.items,
        charged: c.charged_bytes,
        connections: c.connections,
    }
}

/// When the last snapshot of all cores was finished.
fn snapshot_at_ms(cores: &[(CoreId, Metrics)]) -> u64 {
    let finished = cores.iter().map(|(_, core)| core.counters.snapshot_at_ms);
    finished.min().unwrap_or(0)
}

/// How many requests fell into each bucket.
fn buckets(sum: &Metrics, forwarded: bool) -> Vec<u64> {
    let mut all = Durations::default();
    for class in Class::ALL {
        all.merge(sum.durations(class, forwarded));
    }
    let mut before = 0;
    let ends = all.cumulative().map(|(_, count)| count).chain([all.count()]);
    ends.map(|end| end - std::mem::replace(&mut before, end)).collect()
}

fn ranges(server: &ServerFacts<'_>) -> Vec<Range> {
    let table = server.table;
    let all = (0..table.shards()).map(crate::model::ShardId);
    let mut ranges: Vec<Range> = all
        .map(|shard| Range {
            start: format!("{:016x}", table.range(shard).start),
            core: table.core_of(shard).0,
        })
        .collect();
    if ranges.len() > RANGES_MAX {
        ranges.dedup_by_key(|range| range.core);
    }
    ranges
}

/// What was executed at all.
fn operations(sum: &Metrics) -> Vec<Operation> {
    let mut operations = vec![];
    for protocol in Protocol::ALL {
        for class in Class::ALL {
            let ended = |outcome| {
                let executed = |forwarded| sum.operations.executed(protocol as usize, class, outcome, forwarded);
                executed(false) + executed(true)
            };
            let count = Outcome::ALL.into_iter().map(ended).sum();
            if count > 0 {
                operations.push(Operation {
                    protocol: protocol.name(),
                    command: class.name(),
                    count,
                    misses: ended(Outcome::NotFound),
                });
            }
        }
    }
    operations
}

/// The hottest of all cores' keys.
fn hot_keys(cores: &[(CoreId, Metrics)]) -> Vec<Hot> {
    let mut all: Vec<(CoreId, &HotKey)> = vec![];
    for (core, metrics) in cores {
        all.extend(metrics.hot_keys.iter().map(|hot| (*core, hot)));
    }
    all.sort_by_key(|(_, hot)| std::cmp::Reverse(hot.per_second));
    all.truncate(HOT_KEYS_MAX);
    all.into_iter()
        .map(|(core, hot)| Hot {
            key: readable(&hot.key, hot.key.len()),
            core: core.0,
            per_second: hot.per_second,
            writes_per_second: hot.writes_per_second,
            share: f64::from(hot.share_ppm) / 1e6,
        })
        .collect()
}

/// The newest of all cores' slow requests.
fn slow_log(cores: &[(CoreId, Metrics)]) -> Vec<Slow<'_>> {
    let mut all: Vec<(CoreId, &SlowRequest)> = vec![];
    for (core, metrics) in cores {
        all.extend(metrics.slow_log.iter().map(|slow| (*core, slow)));
    }
    all.sort_by_key(|(_, slow)| std::cmp::Reverse(slow.at_ms));
    all.truncate(SLOW_REQUESTS_MAX);
    all.into_iter()
        .map(|(core, slow)| Slow {
            at_ms: slow.at_ms,
            protocol: &slow.protocol,
            client: &slow.client,
            command: slow.class.name(),
            key: readable(&slow.key, slow.key_bytes as usize),
            core: core.0,
            requests: slow.requests,
            queue_us: slow.queue_us,
            hop_us: slow.hop_us,
            execute_us: slow.execute_us,
            flush_us: slow.flush_us,
        })
        .collect()
}

/// A key as text, of which `key` is the start and `length` the whole length: characters that can be seen as they are, others
/// and bytes that are no text escaped, so that different keys never look the same.
fn readable(key: &[u8], length: usize) -> String {
    let start = &key[..key.len().min(KEY_BYTES_MAX)];
    let mut text = String::new();
    for chunk in start.utf8_chunks() {
        // Quotes need no escape here. Behind each backslash that escapes one stands a quote, and the others come in pairs.
        let escaped = chunk.valid().escape_debug().to_string();
        text.push_str(&escaped.replace("\\\"", "\"").replace("\\'", "'"));
        for byte in chunk.invalid() {
            text.push_str(&format!("\\x{byte:02x}"));
        }
    }
    if start.len() < length {
        text.push('…');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_readable_and_told_apart() {
        let readable = |key: &[u8]| super::readable(key, key.len());
        assert_eq!(readable(b"user:1"), "user:1");
        assert_eq!(readable("käse <b>\u{1f9c0}</b>".as_bytes()), "käse <b>\u{1f9c0}</b>");
        assert_eq!(readable(b"\"it's\""), "\"it's\"");
        assert_eq!(readable(b"a\\\"b"), "a\\\\\"b");
        assert_eq!(readable(b"a\0\n\xff\xfe"), r"a\0\n\xff\xfe");
        assert_eq!(readable(br"a\xff"), r"a\\xff");
        // What would turn the direction of the text around.
        assert_eq!(readable("a\u{202e}b".as_bytes()), r"a\u{202e}b");
        assert_eq!(super::readable(b"sta", 5), "sta…");
        assert_eq!(readable(&[b'x'; 500]), format!("{}…", "x".repeat(KEY_BYTES_MAX)));
    }
}
