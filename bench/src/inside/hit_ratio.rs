//! A cache that holds a part of the keys: how many requests it serves, beside policies by the book over the same requests,
//! and what eviction costs.
//!
//! Each request is a get and, where it finds nothing, a set (cache-aside). First an engine with room for everything serves
//! them: that is the cost without eviction, and tells what an item takes. Then one with a memory limit of a part of that.
//! The policies get the capacity that the limited engine had at the end, in items, or in bytes of keys and values where values
//! differ in size.

use super::policies::{self, Policy};
use super::{ClockCost, Core, Requests};
use crate::process::thread_cpu_ns;
use crate::report::{grouped, write_table};
use crate::workload::{Command, DistributionSpec, KeyChooser, Population, Rng, SizeSpec};
use clap::{Args, ValueEnum};
use memkv::config::Eviction;
use serde::Serialize;
use std::fmt::{self, Write};
use std::str::FromStr;

/// Values of the workload with mixed sizes, in bytes.
const MIXED: SizeSpec = SizeSpec::Range(50, 2000);

/// What to ask of the caches.
#[derive(Debug, Clone, Args)]
pub struct HitRatio {
    /// Workloads: zipf:THETA, scan:THETA (the same, and every so often a long scan over keys that are never asked for again)
    /// and mixed:THETA (the same with values of 50-2000 bytes)
    #[arg(
        long,
        value_name = "LIST",
        value_delimiter = ',',
        default_value = "zipf:0.99,zipf:0.7,scan:0.99,mixed:0.99"
    )]
    pub workloads: Vec<Workload>,
    /// What the engine does at its memory limit
    #[arg(long, value_enum, default_value_t = Eviction::S3Fifo)]
    pub eviction: Eviction,
    /// Keys
    #[arg(long, value_name = "N", default_value_t = 1_000_000)]
    pub keys: u64,
    /// The share of the keys that the memory limit holds, about
    #[arg(long, value_name = "SHARE", default_value_t = 0.1)]
    pub share: f64,
    /// Requests that are counted
    #[arg(long, value_name = "N", default_value_t = 10_000_000)]
    pub requests: u64,
    /// Requests before them, which fill the caches [default: as many as there are keys]
    #[arg(long, value_name = "N")]
    pub warmup: Option<u64>,
    /// Requests in a turn: gets first, then the sets of what was missing
    #[arg(long, value_name = "N", default_value_t = 16)]
    pub pipeline: usize,
    /// The share of requests that are part of a scan
    #[arg(long, value_name = "SHARE", default_value_t = 0.2)]
    pub scan_share: f64,
    /// Keys of a scan
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    pub scan_length: u64,
    /// Bytes of a key: 16, 10-30, zipf:LOW-HIGH or lognormal:MEDIAN,SIGMA
    #[arg(long, value_name = "SIZE", default_value = "19")]
    pub key_size: SizeSpec,
    /// Bytes of a value, but where they are mixed
    #[arg(long, value_name = "SIZE", default_value = "100")]
    pub value_size: SizeSpec,
    /// Seed of everything random
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
}

/// What kind of requests there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Zipf,
    Scan,
    Mixed,
}

/// What is asked for: kind, and skew of the popular keys.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Workload {
    kind: Kind,
    theta: f64,
}

impl FromStr for Workload {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, theta) = text.split_once(':').unwrap_or((text, "0.99"));
        let kind = match name {
            "zipf" => Some(Kind::Zipf),
            "scan" => Some(Kind::Scan),
            "mixed" => Some(Kind::Mixed),
            _ => None,
        };
        let theta = theta.parse().ok().filter(|theta| (0.0..=5.0).contains(theta));
        match (kind, theta) {
            (Some(kind), Some(theta)) => Ok(Workload { kind, theta }),
            _ => Err(format!(
                "'{text}' is not a workload; write zipf:THETA, scan:THETA or mixed:THETA with THETA from 0 to 5"
            )),
        }
    }
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.kind {
            Kind::Zipf => "zipf",
            Kind::Scan => "scan",
            Kind::Mixed => "mixed",
        };
        write!(f, "{name}:{}", self.theta)
    }
}

/// The keys that are asked for, in order. Keys of scans have numbers from `popular` on.
#[derive(Debug)]
struct Stream {
    keys: Vec<u32>,
    popular: u32,
}

impl Stream {
    /// Scans come evenly: after so many requests for popular keys that the share is kept.
    fn new(config: &HitRatio, workload: Workload, requests: u64) -> Self {
        let chooser = KeyChooser::new(config.keys, DistributionSpec::Zipf(workload.theta));
        let mut rng = Rng::new(config.seed);
        let between = (config.scan_length as f64 * (1.0 / config.scan_share - 1.0)) as u64;
        let mut keys = Vec::with_capacity(requests as usize);
        let mut next = config.keys as u32;
        while (keys.len() as u64) < requests {
            let left = requests - keys.len() as u64;
            if workload.kind != Kind::Scan {
                keys.extend((0..left).map(|_| chooser.pick(&mut rng) as u32));
                continue;
            }
            keys.extend((0..between.min(left)).map(|_| chooser.pick(&mut rng) as u32));
            let scanned = config.scan_length.min(requests - keys.len() as u64) as u32;
            keys.extend(next..next + scanned);
            next += scanned;
        }
        Stream {
            keys,
            popular: config.keys as u32,
        }
    }

    /// How many different keys it may have, popular or not.
    fn numbers(&self) -> u64 {
        let most = self.keys.iter().copied().max().unwrap_or(0);
        u64::from(most.max(self.popular - 1)) + 1
    }
}

/// Requests, and how many of them found their key.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Counted {
    /// Gets.
    pub gets: u64,
    /// Gets that found their key.
    pub hits: u64,
    /// Gets of popular keys: not of a scan.
    pub popular_gets: u64,
    /// Those that found their key.
    pub popular_hits: u64,
}

impl Counted {
    fn add(&mut self, popular: bool, hit: bool) {
        self.gets += 1;
        self.hits += u64::from(hit);
        self.popular_gets += u64::from(popular);
        self.popular_hits += u64::from(popular && hit);
    }

    /// Share of gets that found their key.
    pub fn ratio(&self) -> f64 {
        self.hits as f64 / self.gets.max(1) as f64
    }

    /// The same among the gets of popular keys.
    pub fn popular_ratio(&self) -> f64 {
        self.popular_hits as f64 / self.popular_gets.max(1) as f64
    }
}

/// A policy by the book.
#[derive(Debug, Clone, Serialize)]
pub struct PolicyRow {
    /// Its name.
    pub name: &'static str,
    /// What it found.
    #[serde(flatten)]
    pub counted: Counted,
    /// Share of gets that found their key.
    pub hit_ratio: f64,
}

/// What an engine found, and what it cost.
#[derive(Debug, Clone, Serialize)]
pub struct EngineRow {
    /// What it found.
    #[serde(flatten)]
    pub counted: Counted,
    /// Share of gets that found their key.
    pub hit_ratio: f64,
    /// Sets among the requests that are counted.
    pub sets: u64,
    /// Sets that the engine refused, of the whole run: it says that it is out of memory.
    pub refused: u64,
    /// CPU time of a get, in nanoseconds.
    pub get_cpu_ns: f64,
    /// CPU time of a set, in nanoseconds, of the whole run: with room for everything there are few when the caches are full.
    /// Absent if there were none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub set_cpu_ns: Option<f64>,
    /// CPU time by request: of the get and, where it found nothing, of the set, in nanoseconds.
    pub request_cpu_ns: f64,
    /// Items that it held at the end.
    pub items: u64,
    /// Bytes of their keys and values.
    pub payload_bytes: u64,
    /// Bytes charged to the memory limit at the end.
    pub charged_bytes: u64,
}

/// What was measured of one workload.
#[derive(Debug, Clone, Serialize)]
pub struct WorkloadReport {
    /// The workload.
    pub workload: String,
    /// Different keys that were asked for, or may have been.
    pub keys: u64,
    /// The memory limit, in bytes.
    pub memory_bytes_max: u64,
    /// The engine with this limit.
    pub engine: EngineRow,
    /// The engine with room for everything.
    pub roomy: EngineRow,
    /// What the policies had room for: items, or bytes of keys and values.
    pub capacity: u64,
    /// Whether the capacity is in bytes.
    pub capacity_in_bytes: bool,
    /// The policies.
    pub policies: Vec<PolicyRow>,
}

/// What was measured.
#[derive(Debug, Clone, Serialize)]
pub struct HitRatioReport {
    /// What the engine was told to do at its limit.
    pub eviction: String,
    /// Popular keys.
    pub keys: u64,
    /// The share of them that the memory limit was to hold.
    pub share: f64,
    /// Requests that were counted.
    pub requests: u64,
    /// Requests before them.
    pub warmup: u64,
    /// Requests in a turn.
    pub pipeline: usize,
    /// Bytes of a key.
    pub key_size: String,
    /// Bytes of a value, but where they are mixed.
    pub value_size: String,
    /// The share of requests that are part of a scan, where there are scans.
    pub scan_share: f64,
    /// Keys of a scan.
    pub scan_length: u64,
    /// Seed of everything random.
    pub seed: u64,
    /// By workload.
    pub workloads: Vec<WorkloadReport>,
    /// What the clocks cost; this is taken off the CPU times.
    pub clocks: ClockCost,
}

/// Serves the workloads. `said` is told what is about to happen.
///
/// # Errors
///
/// A sentence naming cause and remedy when the parameters do not fit, or the engine did not answer as it should.
pub fn run(config: &HitRatio, said: &mut dyn FnMut(&str)) -> Result<HitRatioReport, String> {
    let warmup = config.warmup.unwrap_or(config.keys);
    let all = warmup.saturating_add(config.requests);
    if config.requests == 0 || config.pipeline == 0 || config.workloads.is_empty() {
        return Err("--requests, --pipeline and --workloads must be at least 1".to_owned());
    }
    // Scans add a key a request at most.
    if config.keys == 0 || config.keys.saturating_add(all) >= u64::from(u32::MAX) {
        return Err(format!(
            "--keys must be at least 1, and with --warmup and --requests at most {}",
            u32::MAX
        ));
    }
    if !(config.share > 0.0 && config.share <= 1.0) {
        return Err("--share must be above 0 and at most 1".to_owned());
    }
    if !(config.scan_share > 0.0 && config.scan_share < 1.0) || config.scan_length == 0 {
        return Err("--scan-share must be above 0 and below 1, and --scan-length at least 1".to_owned());
    }
    let clocks = ClockCost::measure();
    let mut workloads = Vec::new();
    for &workload in &config.workloads {
        workloads.push(run_workload(config, workload, warmup, clocks, said)?);
    }
    let eviction = config.eviction.to_possible_value();
    Ok(HitRatioReport {
        eviction: eviction.map_or(String::new(), |value| value.get_name().to_owned()),
        keys: config.keys,
        share: config.share,
        requests: config.requests,
        warmup,
        pipeline: config.pipeline,
        key_size: config.key_size.to_string(),
        value_size: config.value_size.to_string(),
        scan_share: config.scan_share,
        scan_length: config.scan_length,
        seed: config.seed,
        workloads,
        clocks,
    })
}

fn run_workload(
    config: &HitRatio,
    workload: Workload,
    warmup: u64,
    clocks: ClockCost,
    said: &mut dyn FnMut(&str),
) -> Result<WorkloadReport, String> {
    let stream = Stream::new(config, workload, warmup + config.requests);
    let mixed = workload.kind == Kind::Mixed;
    let value_size = if mixed { MIXED } else { config.value_size };
    let population = Population::new(stream.numbers(), config.key_size, value_size, config.seed)?;
    let load = Load {
        stream: &stream,
        population: &population,
        warmup: warmup as usize,
        pipeline: config.pipeline,
        clocks,
    };
    said(&format!("{workload}: with room for everything"));
    let roomy = load.serve(Core::new(None, config.eviction))?;
    if roomy.refused > 0 {
        return Err("the engine refused writes without a memory limit; use fewer --keys".to_owned());
    }
    let item = roomy.charged_bytes as f64 / roomy.items.max(1) as f64;
    let memory_bytes_max = (item * config.keys as f64 * config.share) as u64;
    said(&format!("{workload}: with {} bytes", grouped(memory_bytes_max as f64)));
    let engine = load.serve(Core::new(Some(memory_bytes_max), config.eviction))?;
    let (weights, capacity): (Vec<u32>, u64) = if mixed {
        let weights = (0..stream.numbers()).map(|key| load.payload_bytes(key) as u32);
        (weights.collect(), engine.payload_bytes)
    } else {
        (vec![1; stream.numbers() as usize], engine.items)
    };
    let mut rows = Vec::new();
    for mut policy in policies::all(&weights, capacity, &stream.keys, config.seed) {
        said(&format!("{workload}: {}", policy.name()));
        let counted = load.simulate(policy.as_mut());
        rows.push(PolicyRow {
            name: policy.name(),
            counted,
            hit_ratio: counted.ratio(),
        });
    }
    Ok(WorkloadReport {
        workload: workload.to_string(),
        keys: stream.numbers(),
        memory_bytes_max,
        engine,
        roomy,
        capacity,
        capacity_in_bytes: mixed,
        policies: rows,
    })
}

/// CPU time of requests of one kind.
#[derive(Debug, Default)]
struct Spent {
    cpu_ns: f64,
    requests: u64,
}

impl Spent {
    /// `None` of nothing.
    fn each(&self) -> Option<f64> {
        (self.requests > 0).then(|| self.cpu_ns / self.requests as f64)
    }
}

/// The requests, for engines and policies alike.
struct Load<'a> {
    stream: &'a Stream,
    population: &'a Population,
    /// Requests that are not counted, at the beginning.
    warmup: usize,
    pipeline: usize,
    clocks: ClockCost,
}

impl Load<'_> {
    fn payload_bytes(&self, key: u64) -> u64 {
        (self.population.key_len(key) + self.population.value(key).len()) as u64
    }

    /// Turns of the stream, each with the place of its first request. A turn is counted or not, never in part.
    fn turns(&self) -> impl Iterator<Item = (bool, &[u32])> {
        let (before, counted) = self.stream.keys.split_at(self.warmup);
        let of = |keys| <[u32]>::chunks(keys, self.pipeline);
        of(before)
            .map(|turn| (false, turn))
            .chain(of(counted).map(|turn| (true, turn)))
    }

    /// What a policy finds.
    fn simulate(&self, policy: &mut dyn Policy) -> Counted {
        let mut counted = Counted::default();
        let mut missing = Vec::new();
        for (counts, keys) in self.turns() {
            for &key in keys {
                let hit = policy.get(key);
                if !hit {
                    missing.push(key);
                }
                if counts {
                    counted.add(key < self.stream.popular, hit);
                }
            }
            missing.drain(..).for_each(|key| policy.set(key));
        }
        counted
    }

    /// What an engine finds, and what it costs.
    fn serve(&self, mut core: Core) -> Result<EngineRow, String> {
        let (mut gets, mut sets) = (Requests::default(), Requests::default());
        let (mut counted, mut refused) = (Counted::default(), 0);
        let (mut got, mut set, mut all_set) = (Spent::default(), Spent::default(), Spent::default());
        for (counts, keys) in self.turns() {
            gets.clear();
            sets.clear();
            for &key in keys {
                gets.push(Command::Get, u64::from(key), self.population);
            }
            let cpu_ns = self.timed(&mut core, &gets);
            let outcomes = gets.outcomes(core.replies(), self.population)?;
            core.forget_replies();
            let mut missing = outcomes.misses.iter().copied().peekable();
            for (place, &key) in keys.iter().enumerate() {
                let hit = missing.next_if_eq(&place).is_none();
                if !hit {
                    sets.push(Command::Set, u64::from(key), self.population);
                }
                if counts {
                    counted.add(key < self.stream.popular, hit);
                }
            }
            if counts {
                got.cpu_ns += cpu_ns;
                got.requests += gets.len() as u64;
            }
            if sets.is_empty() {
                continue;
            }
            let cpu_ns = self.timed(&mut core, &sets);
            let outcomes = sets.outcomes(core.replies(), self.population)?;
            core.forget_replies();
            refused += outcomes.refused;
            all_set.cpu_ns += cpu_ns;
            all_set.requests += sets.len() as u64;
            if counts {
                set.cpu_ns += cpu_ns;
                set.requests += sets.len() as u64;
            }
        }
        let charged_bytes = core.charged_bytes();
        let (items, payload_bytes) = self.held(&mut core)?;
        Ok(EngineRow {
            counted,
            hit_ratio: counted.ratio(),
            sets: set.requests,
            refused,
            get_cpu_ns: got.each().unwrap_or(0.0),
            set_cpu_ns: all_set.each(),
            request_cpu_ns: (got.cpu_ns + set.cpu_ns) / counted.gets.max(1) as f64,
            items,
            payload_bytes,
            charged_bytes,
        })
    }

    /// One turn with the requests; its CPU time in nanoseconds, without that of reading the clock.
    fn timed(&self, core: &mut Core, requests: &Requests) -> f64 {
        let before = thread_cpu_ns();
        core.turn(requests.pieces(self.pipeline));
        (thread_cpu_ns() - before) as f64 - self.clocks.cpu_ns
    }

    /// How many items the engine holds, and the bytes of their keys and values: by asking for each.
    fn held(&self, core: &mut Core) -> Result<(u64, u64), String> {
        const AT_ONCE: u64 = 64;
        let (mut items, mut payload_bytes) = (0, 0);
        let mut requests = Requests::default();
        let numbers = self.stream.numbers();
        for first in (0..numbers).step_by(AT_ONCE as usize) {
            requests.clear();
            let keys = first..(first + AT_ONCE).min(numbers);
            for key in keys.clone() {
                requests.push(Command::Get, key, self.population);
            }
            core.turn(requests.pieces(AT_ONCE as usize));
            let outcomes = requests.outcomes(core.replies(), self.population)?;
            core.forget_replies();
            let mut missing = outcomes.misses.iter().copied().peekable();
            for (place, key) in keys.enumerate() {
                if missing.next_if_eq(&place).is_none() {
                    items += 1;
                    payload_bytes += self.payload_bytes(key);
                }
            }
        }
        Ok((items, payload_bytes))
    }
}

impl HitRatioReport {
    /// The report as text for people.
    pub fn text(&self) -> String {
        let mut out = String::new();
        // Writing to a string cannot fail.
        let _ = self.write_text(&mut out);
        out
    }

    fn write_text(&self, out: &mut String) -> std::fmt::Result {
        writeln!(
            out,
            "hit ratio: cache-aside, {} keys of {} bytes, values of {} bytes (mixed: {MIXED}), {} requests after {}, {} in a \
             turn; room for about {:.3} of the keys, at the limit: {}; seed {}",
            grouped(self.keys as f64),
            self.key_size,
            self.value_size,
            grouped(self.requests as f64),
            grouped(self.warmup as f64),
            self.pipeline,
            self.share,
            self.eviction,
            self.seed
        )?;
        for workload in &self.workloads {
            self.write_workload(workload, out)?;
        }
        writeln!(
            out,
            "\nfewer misses: of the engine, as a share of the policy's misses\nCPU times are without reading the clock ({:.0} ns \
             each time); request: the get and, where it found nothing, the set; set: over the whole run",
            self.clocks.cpu_ns
        )
    }

    fn write_workload(&self, report: &WorkloadReport, out: &mut String) -> std::fmt::Result {
        let (engine, roomy) = (&report.engine, &report.roomy);
        let scans = engine.counted.popular_gets < engine.counted.gets;
        write!(out, "\n{}", report.workload)?;
        if scans {
            write!(
                out,
                ", {:.0} % of the requests in scans of {} keys",
                self.scan_share * 100.0,
                grouped(self.scan_length as f64)
            )?;
        }
        writeln!(
            out,
            "; memory limit {} bytes; held at the end: {} items, {} bytes of keys and values",
            grouped(report.memory_bytes_max as f64),
            grouped(engine.items as f64),
            grouped(engine.payload_bytes as f64)
        )?;
        let unit = if report.capacity_in_bytes { "bytes" } else { "items" };
        writeln!(
            out,
            "policies by the book have room for {} {unit}",
            grouped(report.capacity as f64)
        )?;
        let mut table = vec![["", "hit ratio", "fewer misses"].map(String::from).to_vec()];
        if scans {
            table[0].push("of popular keys".to_owned());
        }
        let own_misses = 1.0 - engine.hit_ratio;
        let rows = report.policies.iter().map(|row| (row.name, &row.counted));
        for (name, counted) in std::iter::once(("engine", &engine.counted)).chain(rows) {
            let mut cells = vec![name.to_owned(), format!("{:.4}", counted.ratio())];
            let misses = 1.0 - counted.ratio();
            cells.push(match name {
                "engine" => "-".to_owned(),
                _ if misses > 0.0 => format!("{:+.1} %", (misses - own_misses) / misses * 100.0),
                _ => "-".to_owned(),
            });
            if scans {
                cells.push(format!("{:.4}", counted.popular_ratio()));
            }
            table.push(cells);
        }
        write_table(out, &table)?;
        let mut table = vec![
            ["CPU ns", "get", "set", "request", "sets", "refused"]
                .map(String::from)
                .to_vec(),
        ];
        for (name, row) in [("limited", engine), ("room for all", roomy)] {
            table.push(vec![
                name.to_owned(),
                format!("{:.1}", row.get_cpu_ns),
                row.set_cpu_ns.map_or("-".to_owned(), |ns| format!("{ns:.1}")),
                format!("{:.1}", row.request_cpu_ns),
                grouped(row.sets as f64),
                grouped(row.refused as f64),
            ]);
        }
        write_table(out, &table)?;
        if engine.refused > 0 {
            writeln!(
                out,
                "WARNING: the engine refused {} sets because it was out of memory",
                grouped(engine.refused as f64)
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        config: HitRatio,
    }

    fn config(options: &[&str]) -> HitRatio {
        Line::parse_from(std::iter::once(&"hit-ratio").chain(options)).config
    }

    #[test]
    fn workloads_read_and_print() {
        for text in ["zipf:0.99", "scan:0.7", "mixed:1"] {
            assert_eq!(text.parse::<Workload>().unwrap().to_string(), text);
        }
        assert_eq!("zipf".parse::<Workload>().unwrap().theta, 0.99);
        for text in ["", "zapf", "zipf:x", "zipf:9"] {
            assert!(text.parse::<Workload>().unwrap_err().contains("zipf:THETA"), "{text}");
        }
    }

    #[test]
    fn scans_have_their_share_and_never_come_back() {
        let config = config(&["--keys", "100", "--scan-share", "0.25", "--scan-length", "50"]);
        let stream = Stream::new(&config, "scan".parse().unwrap(), 1000);
        let scanned: Vec<u32> = stream.keys.iter().copied().filter(|key| *key >= 100).collect();
        assert!(scanned.iter().copied().eq(100..350), "{scanned:?}");
        assert!(
            stream.keys[150..200].iter().all(|key| *key >= 100),
            "they come at a stretch"
        );
        assert_eq!(stream.numbers(), 350);
        let stream = Stream::new(&config, "zipf".parse().unwrap(), 1000);
        assert_eq!((stream.keys.len(), stream.numbers()), (1000, 100));
    }
}
