//! What the page shows, as JSON: totals since the start, of which the page takes differences, and what is at this moment.

use super::{Protocol, ServerFacts};
use crate::metrics::Metrics;
use crate::metrics::latency::{BOUNDS_NS, Durations};
use crate::metrics::operations::Outcome;
use crate::model::{Class, CoreId};
use crate::partition::Partitioner;
use serde::Serialize;

/// More ranges are told by core: a strip that is drawn on a screen shows no more.
const RANGES_MAX: usize = 256;

#[derive(Serialize)]
struct Live<'a> {
    version: &'a str,
    now_ms: u64,
    uptime_ms: u64,
    memory: Memory,
    items: u64,
    connections: u64,
    totals: Totals,
    latency: Latency,
    cores: Vec<Core>,
    partitioning: &'a str,
    ranges: Vec<Range>,
    operations: Vec<Operation>,
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
    other: u64,
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
                other: c.other_bytes,
            },
        },
        items: c.items,
        connections: c.connections,
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
