//! Metrics as text, for Prometheus and what reads the same: its text format 0.0.4, and OpenMetrics 1.0.
//!
//! Both are lines: of a family its kind and what it means, then its samples. They differ in how they name a counter's family
//! (only Prometheus' ends in `_total`, as its samples do in both), and in what only OpenMetrics has: units, the kind `info`
//! and a last line. Every series has the label `core` where cores count apart, so a sum over it is the server's.

use super::{Protocol, ServerFacts, escaped};
use crate::metrics::latency::Durations;
use crate::metrics::operations::{Outcome, PROTOCOLS_MAX};
use crate::metrics::{Counters, Metrics};
use crate::model::{Class, CoreId};
use std::fmt::{self, Display};
use std::io::Write;

const _: () = assert!(Protocol::ALL.len() <= PROTOCOLS_MAX);

/// A label's name and its value.
type Label<'a> = (&'a str, &'a str);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Counter,
    Gauge,
    Histogram,
    /// Facts, in labels.
    Info,
}

/// A family whose series are counters or gauges of each core.
struct Family {
    /// Without `_total`. In a family of seconds the numbers are nanoseconds.
    name: &'static str,
    kind: Kind,
    help: &'static str,
    series: &'static [Series],
}

type Series = (&'static [Label<'static>], fn(&Counters) -> u64);

const fn counter(name: &'static str, help: &'static str, series: &'static [Series]) -> Family {
    let kind = Kind::Counter;
    Family {
        name,
        kind,
        help,
        series,
    }
}

const fn gauge(name: &'static str, help: &'static str, series: &'static [Series]) -> Family {
    let kind = Kind::Gauge;
    Family {
        name,
        kind,
        help,
        series,
    }
}

const FAMILIES: &[Family] = &[
    counter(
        "memkv_requests",
        "Requests answered to connections of this core, by any core.",
        &[(&[], |c| c.requests)],
    ),
    counter(
        "memkv_requests_forwarded",
        "Requests of connections of this core that went to another core.",
        &[(&[], |c| c.forwarded)],
    ),
    counter(
        "memkv_requests_served_for_others",
        "Requests that this core served for other cores.",
        &[(&[], |c| c.served_for_others)],
    ),
    counter(
        "memkv_lookups",
        "Looks for an item, by what looked and whether it was there. Reads that change the deadline count as touch, too.",
        &[
            (&[("command", "get"), ("result", "hit")], |c| c.get_hits),
            (&[("command", "get"), ("result", "miss")], |c| c.get_misses),
            (&[("command", "delete"), ("result", "hit")], |c| c.delete_hits),
            (&[("command", "delete"), ("result", "miss")], |c| c.delete_misses),
            (&[("command", "increment"), ("result", "hit")], |c| c.increment_hits),
            (&[("command", "increment"), ("result", "miss")], |c| c.increment_misses),
            (&[("command", "decrement"), ("result", "hit")], |c| c.decrement_hits),
            (&[("command", "decrement"), ("result", "miss")], |c| c.decrement_misses),
            (&[("command", "touch"), ("result", "hit")], |c| c.touch_hits),
            (&[("command", "touch"), ("result", "miss")], |c| c.touch_misses),
        ],
    ),
    counter(
        "memkv_get_expired",
        "Reads among the misses that met an item whose time was over.",
        &[(&[], |c| c.get_expired)],
    ),
    counter(
        "memkv_version_conditions",
        "Conditions on a version, by whether they held, met no item, or met another version.",
        &[
            (&[("result", "hit")], |c| c.version_hits),
            (&[("result", "miss")], |c| c.version_misses),
            (&[("result", "mismatch")], |c| c.version_mismatches),
        ],
    ),
    counter(
        "memkv_writes",
        "Writes asked for, whatever came of them.",
        &[(&[], |c| c.sets)],
    ),
    counter("memkv_items_written", "Items written.", &[(&[], |c| c.items_written)]),
    counter(
        "memkv_writes_refused",
        "Requests refused because of the memory limit or the value limit.",
        &[
            (&[("reason", "out_of_memory")], |c| c.out_of_memory),
            (&[("reason", "too_large")], |c| c.too_large),
        ],
    ),
    counter(
        "memkv_flushes",
        "How often the store was to be emptied.",
        &[(&[], |c| c.flushes)],
    ),
    gauge("memkv_items", "Items.", &[(&[], |c| c.items)]),
    gauge(
        "memkv_payload_bytes",
        "Bytes of keys and values.",
        &[(&[], |c| c.payload_bytes)],
    ),
    gauge(
        "memkv_item_bytes",
        "Bytes of the slots that hold items, and of values that items refer to.",
        &[(&[], |c| c.item_bytes)],
    ),
    gauge(
        "memkv_memory_charged_bytes",
        "Bytes charged to the memory limit: every kind of memory but other.",
        &[(&[], |c| c.charged_bytes)],
    ),
    counter(
        "memkv_expired",
        "Items removed because their time was over.",
        &[(&[], |c| c.expired)],
    ),
    counter(
        "memkv_evictions",
        "Items evicted: new ones were read at most once in the time that new items have, old ones more often.",
        &[
            (&[("reason", "new")], |c| c.evicted_new),
            (&[("reason", "old")], |c| c.evicted_old),
        ],
    ),
    counter(
        "memkv_evictions_unread",
        "Items evicted that were never read since they were written.",
        &[(&[], |c| c.evicted_unread)],
    ),
    counter(
        "memkv_evictions_ahead",
        "Items evicted ahead of need, to have memory ready for large values, other cores and connections.",
        &[(&[], |c| c.evicted_ahead)],
    ),
    counter(
        "memkv_evictions_by_idle_time",
        "Items evicted, by the longest time since their last use.",
        &[
            (&[("idle", "2m")], |c| c.evicted_within_2m),
            (&[("idle", "1h")], |c| c.evicted_within_1h),
            (&[("idle", "1d")], |c| c.evicted_within_1d),
            (&[("idle", "longer")], |c| c.evicted_later),
        ],
    ),
    gauge("memkv_connections", "Open connections.", &[(&[], |c| c.connections)]),
    counter(
        "memkv_connection_attempts",
        "Connections accepted, or refused because of a limit.",
        &[
            (&[("outcome", "accepted")], |c| c.connections_opened),
            (&[("outcome", "refused")], |c| c.connections_refused),
        ],
    ),
    counter(
        "memkv_connections_timed_out",
        "Connections closed because they were idle, or did not read, for too long.",
        &[(&[], |c| c.connections_timed_out)],
    ),
    counter(
        "memkv_network_bytes",
        "Bytes received from clients and sent to them.",
        &[
            (&[("direction", "received")], |c| c.bytes_received),
            (&[("direction", "sent")], |c| c.bytes_sent),
        ],
    ),
    counter(
        "memkv_receive_buffers_exhausted",
        "How often the kernel had no buffer left to receive into.",
        &[(&[], |c| c.receive_buffers_exhausted)],
    ),
    gauge(
        "memkv_mesh_credit_requests",
        "Requests to other cores that are not answered.",
        &[(&[], |c| c.mesh_requests)],
    ),
    gauge(
        "memkv_mesh_credit_bytes",
        "What those requests cost of the credit in bytes.",
        &[(&[], |c| c.mesh_bytes)],
    ),
    gauge(
        "memkv_mesh_waiting",
        "Connections that wait for credit to another core.",
        &[(&[], |c| c.mesh_waiting)],
    ),
    counter(
        "memkv_mesh_credit_waits",
        "How often a connection had to wait because all credit to another core was in use.",
        &[(&[], |c| c.credit_waits)],
    ),
    counter(
        "memkv_transactions",
        "Transactions and requests for several keys that were finished.",
        &[(&[], |c| c.txns)],
    ),
    counter(
        "memkv_transaction_retries",
        "How often one of them locked anew, because an older request wanted what it had locked.",
        &[(&[], |c| c.txn_retries)],
    ),
    counter(
        "memkv_lock_waits",
        "Requests that waited for a transaction to end.",
        &[(&[], |c| c.lock_waits)],
    ),
    counter(
        "memkv_held_replies",
        "Replies that waited until what they tell was safe on disk.",
        &[(&[], |c| c.held_replies)],
    ),
    counter(
        "memkv_log_writes",
        "Writes to the log, each of everything that waited.",
        &[(&[], |c| c.log_writes)],
    ),
    counter(
        "memkv_log_syncs",
        "How often the log was made safe.",
        &[(&[], |c| c.log_syncs)],
    ),
    counter(
        "memkv_log_bytes",
        "Bytes of effects written to the log.",
        &[(&[], |c| c.log_bytes)],
    ),
    gauge(
        "memkv_log_waiting_bytes",
        "Bytes of effects that wait to be written to the log.",
        &[(&[], |c| c.log_waiting_bytes)],
    ),
    gauge(
        "memkv_log_failed",
        "1: the log cannot be written any more, and writes are refused.",
        &[(&[], |c| c.log_failed)],
    ),
    counter(
        "memkv_snapshots",
        "Snapshots of all of the core's shards that were finished.",
        &[(&[], |c| c.snapshots)],
    ),
    gauge(
        "memkv_snapshot_failed",
        "1: the last snapshot was given up; the older one and the log are in force.",
        &[(&[], |c| c.snapshot_failed)],
    ),
    gauge(
        "memkv_snapshot_last_success_timestamp_seconds",
        "When the last snapshot was finished, in seconds since the Unix epoch; 0: none since the start.",
        &[(&[], |c| c.snapshot_at_ms * 1_000_000)],
    ),
    counter("memkv_turns", "Turns of the event loop.", &[(&[], |c| c.turns)]),
    counter(
        "memkv_core_idle_seconds",
        "Time spent waiting for work.",
        &[(&[], |c| c.idle_ns)],
    ),
    gauge(
        "memkv_core_uptime_seconds",
        "Time since the core started.",
        &[(&[], |c| c.uptime_ns)],
    ),
];

/// Bytes of memory that cores charge, by kind. What each has charged beyond these is in transit.
/// Reads one of the counters.
type Counter = fn(&Counters) -> u64;

const MEMORY: &[(&str, Counter)] = &[
    ("items", |c| c.item_resident_bytes),
    ("index", |c| c.index_bytes),
    ("order", |c| c.order_bytes),
    ("images", |c| c.image_bytes),
    ("lingering", |c| c.lingering_bytes),
    ("connections", |c| c.connection_bytes),
];

/// The places in a decade of [`crate::metrics::latency::BOUNDS_NS`] that are shown: 1, 2 and 5.
const SHOWN_MANTISSAS: [usize; 3] = [0, 3, 7];
/// How the bounds that are shown are written: OpenMetrics has one way for each number.
const SHOWN_BOUNDS: [&str; 22] = [
    "1e-06", "2e-06", "5e-06", "1e-05", "2e-05", "5e-05", "0.0001", "0.0002", "0.0005", "0.001", "0.002", "0.005",
    "0.01", "0.02", "0.05", "0.1", "0.2", "0.5", "1.0", "2.0", "5.0", "10.0",
];

/// Nanoseconds, written in seconds.
struct Seconds(u64);

impl Display for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{:09}", self.0 / 1_000_000_000, self.0 % 1_000_000_000)
    }
}

/// The text as it grows.
struct Exposition<'a> {
    out: &'a mut Vec<u8>,
    open_metrics: bool,
    /// The family that is being written.
    family: &'static str,
    /// What its samples' names have behind its own.
    suffix: &'static str,
}

impl Exposition<'_> {
    /// Begins a family.
    fn family(&mut self, name: &'static str, kind: Kind, help: &'static str) {
        (self.family, self.suffix) = match kind {
            Kind::Counter => (name, "_total"),
            Kind::Info => (name, "_info"),
            Kind::Gauge | Kind::Histogram => (name, ""),
        };
        let (suffix, kind) = match (self.open_metrics, kind) {
            (true, Kind::Counter) => ("", "counter"),
            (false, Kind::Counter) => ("_total", "counter"),
            (true, Kind::Info) => ("", "info"),
            (false, Kind::Info) => ("_info", "gauge"),
            (_, Kind::Gauge) => ("", "gauge"),
            (_, Kind::Histogram) => ("", "histogram"),
        };
        // Writing to memory does not fail.
        let _ = writeln!(self.out, "# HELP {name}{suffix} {help}");
        let _ = writeln!(self.out, "# TYPE {name}{suffix} {kind}");
        let unit = ["seconds", "bytes"].into_iter().find(|unit| name.ends_with(unit));
        if let Some(unit) = unit.filter(|_| self.open_metrics) {
            let _ = writeln!(self.out, "# UNIT {name} {unit}");
        }
    }

    /// One line of the family, with what is to stand behind its name.
    fn line<'b>(&mut self, suffix: &str, labels: impl IntoIterator<Item = Label<'b>>, value: impl Display) {
        let _ = write!(self.out, "{}{suffix}", self.family);
        let mut between = b'{';
        for (name, value) in labels {
            self.out.push(between);
            between = b',';
            let _ = write!(self.out, "{name}=\"");
            push_escaped(self.out, value);
            self.out.push(b'"');
        }
        if between == b',' {
            self.out.push(b'}');
        }
        let _ = writeln!(self.out, " {value}");
    }

    fn sample<'b>(&mut self, labels: impl IntoIterator<Item = Label<'b>>, value: impl Display) {
        self.line(self.suffix, labels, value);
    }

    fn histogram(&mut self, labels: &[Label<'_>], durations: &Durations) {
        let mut shown = SHOWN_BOUNDS.iter();
        for (place, (_, count)) in durations.cumulative().enumerate() {
            if SHOWN_MANTISSAS.contains(&(place % 10))
                && let Some(bound) = shown.next()
            {
                self.line("_bucket", labels.iter().copied().chain([("le", *bound)]), count);
            }
        }
        let count = durations.count();
        self.line("_bucket", labels.iter().copied().chain([("le", "+Inf")]), count);
        self.line("_sum", labels.iter().copied(), Seconds(durations.sum_ns()));
        self.line("_count", labels.iter().copied(), count);
    }
}

/// Appends a label's value.
fn push_escaped(out: &mut Vec<u8>, value: &str) {
    for byte in value.bytes() {
        match byte {
            b'\\' => out.extend_from_slice(b"\\\\"),
            b'"' => out.extend_from_slice(b"\\\""),
            b'\n' => out.extend_from_slice(b"\\n"),
            byte => out.push(byte),
        }
    }
}

fn path(forwarded: bool) -> &'static str {
    if forwarded { "forwarded" } else { "local" }
}

/// Appends everything that the cores count.
pub(super) fn prometheus(cores: &[(CoreId, Metrics)], server: &ServerFacts<'_>, open_metrics: bool, out: &mut Vec<u8>) {
    let mut to = Exposition {
        out,
        open_metrics,
        family: "",
        suffix: "",
    };
    let cores: Vec<(String, &Metrics)> = cores
        .iter()
        .map(|(core, metrics)| (core.0.to_string(), metrics))
        .collect();
    about_server(server, &mut to);
    about_process(&cores, server, &mut to);
    for family in FAMILIES {
        to.family(family.name, family.kind, family.help);
        let in_seconds = family.name.ends_with("_seconds");
        for (core, metrics) in &cores {
            for (labels, value) in family.series {
                let labels = labels.iter().copied().chain([("core", core.as_str())]);
                match value(&metrics.counters) {
                    ns if in_seconds => to.sample(labels, Seconds(ns)),
                    number => to.sample(labels, number),
                }
            }
        }
    }
    about_memory(&cores, server, &mut to);
    about_mesh(&cores, server, &mut to);
    about_operations(&cores, &mut to);
    about_durations(&cores, &mut to);
    about_hot_keys(&cores, &mut to);
    if open_metrics {
        to.out.extend_from_slice(b"# EOF\n");
    }
}

fn about_server(server: &ServerFacts<'_>, to: &mut Exposition<'_>) {
    to.family("memkv_build", Kind::Info, "The version of the server.");
    to.sample([("version", env!("CARGO_PKG_VERSION"))], 1);
    to.family(
        "memkv_connections_limit",
        Kind::Gauge,
        "The most connections that may be open at a time.",
    );
    to.sample([], server.config.limits.connections_max);
}

fn about_process(cores: &[(String, &Metrics)], server: &ServerFacts<'_>, to: &mut Exposition<'_>) {
    to.family(
        "process_resident_memory_bytes",
        Kind::Gauge,
        "Resident memory of the process.",
    );
    to.sample([], server.process.resident_bytes);
    to.family(
        "process_cpu_seconds",
        Kind::Counter,
        "CPU time of the process, in user and kernel mode.",
    );
    // One core has it for all.
    let us: u64 = cores.iter().map(|(_, metrics)| metrics.counters.process_cpu_us).sum();
    to.sample([], Seconds(us * 1000));
}

fn about_memory(cores: &[(String, &Metrics)], server: &ServerFacts<'_>, to: &mut Exposition<'_>) {
    to.family(
        "memkv_memory_limit_bytes",
        Kind::Gauge,
        "The memory limit now in force.",
    );
    to.sample([], server.memory_bytes_max);
    to.family(
        "memkv_memory_bytes",
        Kind::Gauge,
        "Memory by what it is for. In transit: announced values, open transactions, batches between cores. Other, which is \
         the process's and no core's: what is resident and not charged.",
    );
    for (core, metrics) in cores {
        let counters = &metrics.counters;
        let mut transit = counters.charged_bytes;
        for (kind, value) in MEMORY {
            let bytes = value(counters);
            transit = transit.saturating_sub(bytes);
            to.sample([("kind", *kind), ("core", core)], bytes);
        }
        to.sample([("kind", "transit"), ("core", core)], transit);
    }
    let other: u64 = cores.iter().map(|(_, metrics)| metrics.counters.other_bytes).sum();
    to.sample([("kind", "other")], other);
}

fn about_mesh(cores: &[(String, &Metrics)], server: &ServerFacts<'_>, to: &mut Exposition<'_>) {
    let (limits, links) = (&server.config.limits, cores.len().saturating_sub(1) as u64);
    to.family(
        "memkv_mesh_credit_requests_limit",
        Kind::Gauge,
        "Requests that may be on their way from this core to all others.",
    );
    for (core, _) in cores {
        to.sample([("core", core.as_str())], u64::from(limits.mesh_requests_max) * links);
    }
    to.family(
        "memkv_mesh_credit_limit_bytes",
        Kind::Gauge,
        "What they may cost of the credit in bytes.",
    );
    for (core, _) in cores {
        to.sample([("core", core.as_str())], limits.mesh_bytes_max.0.saturating_mul(links));
    }
}

fn about_operations(cores: &[(String, &Metrics)], to: &mut Exposition<'_>) {
    to.family(
        "memkv_operations",
        Kind::Counter,
        "Commands for one key that this core executed, each key of a request for several included; forwarded: for \
         connections of another core.",
    );
    for (core, metrics) in cores {
        for protocol in Protocol::ALL {
            for class in Class::ALL {
                for (outcome, forwarded) in Outcome::ALL.into_iter().flat_map(|o| [(o, false), (o, true)]) {
                    let count = metrics
                        .operations
                        .executed(protocol as usize, class, outcome, forwarded);
                    if count > 0 {
                        let labels = [
                            ("protocol", protocol.name()),
                            ("command", class.name()),
                            ("outcome", outcome.name()),
                            ("path", path(forwarded)),
                            ("core", core),
                        ];
                        to.sample(labels, count);
                    }
                }
            }
        }
    }
    to.family(
        "memkv_bad_requests",
        Kind::Counter,
        "Requests that the protocol does not understand, or refuses.",
    );
    for (core, metrics) in cores {
        for protocol in Protocol::ALL {
            let count = metrics.operations.refused(protocol as usize);
            to.sample([("protocol", protocol.name()), ("core", core)], count);
        }
    }
}

fn about_durations(cores: &[(String, &Metrics)], to: &mut Exposition<'_>) {
    to.family(
        "memkv_request_duration_seconds",
        Kind::Histogram,
        "From the completion that carried a request's last byte to the turn's end, when its reply is queued for sending. \
         Forwarded: by the core that has the connection.",
    );
    for (core, metrics) in cores {
        for class in Class::ALL {
            for forwarded in [false, true] {
                let durations = metrics.durations(class, forwarded);
                if durations.count() > 0 {
                    let labels = [("command", class.name()), ("path", path(forwarded)), ("core", core)];
                    to.histogram(&labels, durations);
                }
            }
        }
    }
    to.family(
        "memkv_turn_duration_seconds",
        Kind::Histogram,
        "How long turns of the event loop took, without waiting for work and without the system call that sends and collects.",
    );
    for (core, metrics) in cores {
        to.histogram(&[("core", core)], metrics.turns());
    }
}

/// Of each core so many of the hottest keys are shown: every key is a series for whoever keeps them.
const HOT_KEYS_SHOWN: usize = 10;

fn about_hot_keys(cores: &[(String, &Metrics)], to: &mut Exposition<'_>) {
    to.family(
        "memkv_hot_key_requests_per_second",
        Kind::Gauge,
        "An estimate of how often the hottest keys of a core were asked for in the last seconds. In the key, blanks, % and bytes \
         that are not printable ASCII are escaped as %XX.",
    );
    for (core, metrics) in cores {
        for hot in metrics.hot_keys.iter().take(HOT_KEYS_SHOWN) {
            to.sample([("key", escaped(&hot.key).as_str()), ("core", core)], hot.per_second);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::metrics::hot_keys::HotKey;
    use crate::metrics::latency::BOUNDS_NS;
    use crate::model::{Command, Op, Reply, UnixMillis};
    use crate::partition::RangeTable;
    use crate::protocol::ProcessFacts;
    use std::collections::{BTreeMap, BTreeSet};

    /// Two cores, of which the first has counted something of every kind that has series of its own.
    fn rendered(open_metrics: bool) -> String {
        let mut first = Metrics::default();
        first.counters.get_hits = 7;
        first.counters.idle_ns = 1_500_000_000;
        first.hot_keys.push(HotKey {
            key: b"a \"b\"".to_vec(),
            per_second: 12,
            writes_per_second: 0,
            share_ppm: 1000,
            error_ppm: 10,
        });
        first.counters.process_cpu_us = 2_000_001;
        first.counters.other_bytes = 1000;
        (first.counters.charged_bytes, first.counters.index_bytes) = (100, 60);
        let get = Command {
            key: b"k",
            op: Op::Get {
                version: false,
                effects: None,
            },
        };
        first
            .operations
            .count(Protocol::Text as usize, &get, &Reply::NotFound, true);
        first.operations.count_refused(Protocol::JsonLine as usize);
        for (turn_ns, requests) in [(900, 2), (3_000, 1), (30_000_000_000, 1)] {
            (0..requests).for_each(|_| first.answered(Class::Get));
            first.end_turn(0, turn_ns);
        }
        let (config, table) = (Config::default(), RangeTable::even(7, 2, 2));
        let server = ServerFacts {
            config: &config,
            process: ProcessFacts::default(),
            now: UnixMillis(0),
            memory_bytes_max: 1 << 30,
            table: &table,
            core_ports: &[],
        };
        let cores = [(CoreId(0), first), (CoreId(1), Metrics::without_latencies())];
        let mut out = vec![];
        prometheus(&cores, &server, open_metrics, &mut out);
        String::from_utf8(out).unwrap()
    }

    fn name_of(sample: &str) -> &str {
        sample.split(['{', ' ']).next().unwrap()
    }

    /// The samples of each family, by its name; their lines stand behind the family's own, and no series is there twice.
    fn families(text: &str) -> BTreeMap<String, (String, Vec<String>)> {
        let mut families: BTreeMap<String, (String, Vec<String>)> = BTreeMap::new();
        let mut described = None;
        let mut present = String::new();
        let mut series = BTreeSet::new();
        for line in text.lines().filter(|line| *line != "# EOF") {
            if let Some(rest) = line.strip_prefix("# HELP ") {
                let (name, help) = rest.split_once(' ').unwrap();
                assert!(!help.is_empty() && !help.contains(['\\', '"', '\n']), "{line}");
                described = Some(name.to_owned());
            } else if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').unwrap();
                assert_eq!(described.take().as_deref(), Some(name));
                let before = families.insert(name.to_owned(), (kind.to_owned(), vec![]));
                assert!(before.is_none(), "{name} is there twice");
                present = name.to_owned();
            } else if let Some(rest) = line.strip_prefix("# UNIT ") {
                let (name, unit) = rest.split_once(' ').unwrap();
                assert_eq!(name, present);
                assert!(name.ends_with(&format!("_{unit}")), "{line}");
            } else {
                let (labelled, value) = line.rsplit_once(' ').unwrap();
                value.parse::<f64>().unwrap();
                assert!(series.insert(labelled.to_owned()), "{labelled} is there twice");
                assert!(name_of(line).starts_with(&present), "{line} stands under {present}");
                families.get_mut(&present).unwrap().1.push(line.to_owned());
            }
        }
        families
    }

    #[test]
    fn samples_stand_with_their_families() {
        for open_metrics in [false, true] {
            let text = rendered(open_metrics);
            assert_eq!(text.ends_with("\n# EOF\n"), open_metrics);
            assert_eq!(text.contains("# UNIT"), open_metrics);
            let families = families(&text);
            for (name, (kind, samples)) in &families {
                for sample in samples {
                    let suffix = &name_of(sample)[name.len()..];
                    let fits = match (kind.as_str(), open_metrics) {
                        ("counter", true) => suffix == "_total",
                        ("counter", false) => suffix.is_empty() && name.ends_with("_total"),
                        ("gauge", _) => suffix.is_empty() && !name.ends_with("_total"),
                        ("info", true) => suffix == "_info",
                        ("histogram", _) => ["_bucket", "_sum", "_count"].contains(&suffix),
                        _ => false,
                    };
                    assert!(fits, "{sample} in a {kind}");
                }
            }
        }
    }

    /// OpenMetrics forbids names of samples that could belong to two families.
    #[test]
    fn no_family_has_the_name_of_anothers_sample() {
        let families = families(&rendered(true));
        for (name, (kind, _)) in &families {
            let suffixes: &[&str] = match kind.as_str() {
                "counter" => &["_total", "_created"],
                "info" => &["_info"],
                "histogram" => &["_bucket", "_sum", "_count", "_created"],
                _ => &[],
            };
            for suffix in suffixes {
                assert!(!families.contains_key(&format!("{name}{suffix}")), "{name}{suffix}");
            }
        }
    }

    #[test]
    fn both_formats_tell_the_same() {
        let samples = |text: &str| -> Vec<String> {
            let lines = text.lines().filter(|line| !line.starts_with('#'));
            lines.map(str::to_owned).collect()
        };
        assert_eq!(samples(&rendered(false)), samples(&rendered(true)));
    }

    #[test]
    fn numbers_stand_where_they_belong() {
        let text = rendered(false);
        for line in [
            "# TYPE memkv_lookups_total counter",
            "memkv_lookups_total{command=\"get\",result=\"hit\",core=\"0\"} 7",
            "memkv_lookups_total{command=\"get\",result=\"hit\",core=\"1\"} 0",
            "memkv_core_idle_seconds_total{core=\"0\"} 1.500000000",
            "process_cpu_seconds_total 2.000001000",
            "memkv_memory_bytes{kind=\"index\",core=\"0\"} 60",
            "memkv_memory_bytes{kind=\"transit\",core=\"0\"} 40",
            "memkv_memory_bytes{kind=\"other\"} 1000",
            "memkv_memory_limit_bytes 1073741824",
            "memkv_bad_requests_total{protocol=\"json-line\",core=\"0\"} 1",
            "memkv_requests_total{core=\"0\"} 4",
            r#"memkv_hot_key_requests_per_second{key="a%20\"b\"",core="0"} 12"#,
            "memkv_mesh_credit_requests_limit{core=\"1\"} 4096",
        ] {
            assert!(text.lines().any(|other| other == line), "{line} is missing in {text}");
        }
        let operations = text.lines().filter(|line| line.starts_with("memkv_operations_total"));
        assert_eq!(
            operations.collect::<Vec<_>>(),
            [
                "memkv_operations_total{protocol=\"text\",command=\"get\",outcome=\"not_found\",path=\"forwarded\",core=\"0\"} 1"
            ]
        );
        assert!(rendered(true).contains("\n# TYPE memkv_build info\nmemkv_build_info{version=\""));
        assert!(text.contains("\n# TYPE memkv_build_info gauge\nmemkv_build_info{version=\""));
    }

    #[test]
    fn histograms_are_cumulative() {
        let text = rendered(false);
        let family = "memkv_request_duration_seconds";
        let series: Vec<&str> = text.lines().filter(|line| line.starts_with(family)).collect();
        assert_eq!(
            series.len(),
            SHOWN_BOUNDS.len() + 3,
            "only of what was asked: {series:?}"
        );
        let with = |le: &str| format!("{family}_bucket{{command=\"get\",path=\"local\",core=\"0\",le=\"{le}\"}}");
        for (le, count) in [("1e-06", 2), ("2e-06", 2), ("5e-06", 3), ("10.0", 3), ("+Inf", 4)] {
            assert!(
                series.contains(&format!("{} {count}", with(le)).as_str()),
                "{le} {count}: {series:?}"
            );
        }
        let labels = "{command=\"get\",path=\"local\",core=\"0\"}";
        assert!(
            series.contains(&format!("{family}_sum{labels} 30.000004800").as_str()),
            "{series:?}"
        );
        assert!(
            series.contains(&format!("{family}_count{labels} 4").as_str()),
            "{series:?}"
        );
    }

    #[test]
    fn bounds_are_written_as_they_are() {
        let places = (0..BOUNDS_NS.len()).filter(|place| SHOWN_MANTISSAS.contains(&(place % 10)));
        let bounds: Vec<f64> = places.map(|place| BOUNDS_NS[place] as f64 / 1e9).collect();
        let written: Vec<f64> = SHOWN_BOUNDS.iter().map(|bound| bound.parse().unwrap()).collect();
        assert_eq!(written, bounds);
    }

    #[test]
    fn values_of_labels_are_escaped() {
        let mut out = vec![];
        let mut to = Exposition {
            out: &mut out,
            open_metrics: false,
            family: "",
            suffix: "",
        };
        to.family("memkv_x", Kind::Gauge, "X.");
        to.sample([("key", "a\\b\"c\nd{}é")], 1);
        let want = "memkv_x{key=\"a\\\\b\\\"c\\nd{}é\"} 1\n";
        assert!(String::from_utf8(out).unwrap().ends_with(want));
    }

    #[test]
    fn every_metric_is_documented() {
        let documented = include_str!("../../docs/operations.md");
        for name in families(&rendered(false)).keys() {
            assert!(
                documented.contains(&format!("`{name}`")),
                "{name} is not in docs/operations.md"
            );
        }
    }

    /// Every expression of a dashboard, wherever it stands.
    fn expressions(json: &serde_json::Value, found: &mut Vec<String>) {
        match json {
            serde_json::Value::Array(values) => values.iter().for_each(|value| expressions(value, found)),
            serde_json::Value::Object(fields) => {
                for (name, value) in fields {
                    match value.as_str() {
                        Some(text) if ["expr", "query", "definition"].contains(&name.as_str()) => {
                            found.push(text.to_owned());
                        }
                        _ => expressions(value, found),
                    }
                }
            }
            _ => {}
        }
    }

    /// The dashboard asks for nothing that is not there, neither for a name nor for a label of it.
    #[test]
    fn the_dashboard_knows_the_names() {
        let text = rendered(false);
        let mut labels: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let of_name = labels.entry(name_of(line)).or_default();
            let (_, rest) = line.split_once('{').unwrap_or(("", ""));
            of_name.extend(
                rest.split("\",")
                    .filter_map(|label| label.split_once('='))
                    .map(|(name, _)| name),
            );
        }
        let dashboard = include_str!("../../docs/grafana-dashboard.json");
        let mut asked = vec![];
        expressions(&serde_json::from_str(dashboard).unwrap(), &mut asked);
        let mut names = BTreeSet::new();
        for expression in &asked {
            for (at, _) in expression
                .match_indices("memkv_")
                .chain(expression.match_indices("process_"))
            {
                let rest = &expression[at..];
                let end = rest
                    .find(|c: char| !c.is_ascii_lowercase() && c != '_')
                    .unwrap_or(rest.len());
                let (name, rest) = rest.split_at(end);
                let known = labels.get(name);
                assert!(known.is_some(), "there is no {name}: {expression}");
                names.insert(name);
                let conditions = rest.strip_prefix('{').and_then(|rest| rest.split_once('}'));
                for condition in conditions.map_or("", |(conditions, _)| conditions).split(',') {
                    let label = condition.split(['=', '!']).next().unwrap().trim();
                    // Prometheus adds these itself.
                    let is_known = ["", "instance", "job"].contains(&label) || known.unwrap().contains(label);
                    assert!(is_known, "{name} has no {label}: {expression}");
                }
            }
        }
        assert!(names.len() > 20, "{names:?}");
    }
}
