//! What a run measured, for people and for programs.

use crate::driver::{Cut, Outcome, RunConfig};
use crate::process::ServerUse;
use crate::server_counts::TxnCounts;
use crate::stats::{ErrorKind, Histograms, WorkerSummary, histograms};
use crate::workload::Command;
use hdrhistogram::Histogram;
use serde::Serialize;
use std::fmt::Write;

/// Latency percentiles in microseconds.
#[derive(Debug, Clone, Serialize)]
pub struct Latency {
    /// Arithmetic mean.
    pub mean_us: f64,
    /// The quickest.
    pub min_us: f64,
    /// Half of the requests were at least this quick.
    pub p50_us: f64,
    /// Nine of ten.
    pub p90_us: f64,
    /// 99 of a hundred.
    pub p99_us: f64,
    /// 999 of a thousand.
    pub p99_9_us: f64,
    /// 9,999 of ten thousand.
    pub p99_99_us: f64,
    /// The slowest.
    pub max_us: f64,
}

impl Latency {
    /// Reads a histogram of nanoseconds.
    pub fn of(histogram: &Histogram<u64>) -> Self {
        let at = |quantile: f64| histogram.value_at_quantile(quantile) as f64 / 1000.0;
        Latency {
            mean_us: histogram.mean() / 1000.0,
            min_us: histogram.min() as f64 / 1000.0,
            p50_us: at(0.5),
            p90_us: at(0.9),
            p99_us: at(0.99),
            p99_9_us: at(0.999),
            p99_99_us: at(0.9999),
            max_us: histogram.max() as f64 / 1000.0,
        }
    }
}

/// One row of the table of commands.
#[derive(Debug, Clone, Serialize)]
pub struct CommandReport {
    /// Name of the command, or `all`.
    pub command: String,
    /// Good replies in the measured window.
    pub operations: u64,
    /// The same per second.
    pub operations_per_second: f64,
    /// Latency of these.
    pub latency: Latency,
}

/// Errors of one kind.
#[derive(Debug, Clone, Serialize)]
pub struct ErrorReport {
    /// What went wrong.
    pub kind: &'static str,
    /// How often.
    pub count: u64,
    /// The first words seen.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub example: String,
}

/// What came of transactions.
#[derive(Debug, Clone, Serialize)]
pub struct TxnReport {
    /// Operations of each.
    pub operations: usize,
    /// Whether they were optimistic.
    pub checked: bool,
    /// Transactions committed in the measured window.
    pub committed: u64,
    /// The same per second.
    pub committed_per_second: f64,
    /// Attempts that failed in the window because a key had changed, each of which was tried again at once.
    pub retries: u64,
    /// The most of these that one transaction made.
    pub retries_max: u64,
}

/// How evenly connections were served.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Fairness {
    /// The fewest good replies that any connection got in the measured window.
    pub fewest: u64,
    /// The most.
    pub most: u64,
}

/// What the generator itself used.
#[derive(Debug, Clone, Serialize)]
pub struct GeneratorReport {
    /// CPU time of all threads by wall time: 1 is one core used up.
    pub cores_used: f64,
    /// The part of it in user mode.
    pub user_cores: f64,
    /// The part of it in the kernel.
    pub system_cores: f64,
    /// The part of it in which threads spun and waited for replies.
    pub spinning_cores: f64,
    /// CPU time without spinning by wall time, of the thread that used most.
    pub busiest_thread_share: f64,
    /// Time that threads were ready to run while something else had their CPU by wall time, of the thread that waited most.
    pub queued_share: f64,
    /// CPU time without spinning per operation, in microseconds.
    pub cpu_us_per_operation: Option<f64>,
    /// Whether the generator set the pace, not the server.
    pub was_bottleneck: bool,
}

/// A point of the time series.
#[derive(Debug, Clone, Serialize)]
pub struct Point {
    /// Since the measured window began, in seconds; the middle of the interval.
    pub at_s: f64,
    /// Good replies per second.
    pub operations_per_second: f64,
    /// Median latency in microseconds.
    pub p50_us: f64,
    /// 99.9th percentile in microseconds.
    pub p99_9_us: f64,
}

/// The result of a run.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The protocol.
    pub protocol: &'static str,
    /// The server's address.
    pub target: String,
    /// The workload in words.
    pub workload: String,
    /// Connections.
    pub connections: usize,
    /// Requests in flight per connection.
    pub pipeline: usize,
    /// Generator threads.
    pub threads: usize,
    /// How the generator moved bytes.
    pub io: &'static str,
    /// Requests per second that were asked for; absent in a closed loop.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate: Option<f64>,
    /// Whether as many requests were answered as were asked for, but for a fiftieth.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate_kept: Option<bool>,
    /// Length of the measured window in seconds.
    pub elapsed_s: f64,
    /// Good replies.
    pub operations: u64,
    /// Good replies per second.
    pub operations_per_second: f64,
    /// Keys found by gets.
    pub hits: u64,
    /// Keys not found by gets.
    pub misses: u64,
    /// Share of keys found; absent if none were asked for.
    pub hit_rate: Option<f64>,
    /// Bytes of replies per second.
    pub received_bytes_per_second: f64,
    /// Per command, and all of them together at the end.
    pub commands: Vec<CommandReport>,
    /// Transactions, if every request was one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub txn: Option<TxnReport>,
    /// Good replies by connection.
    pub per_connection: Fairness,
    /// Errors by kind.
    pub errors: Vec<ErrorReport>,
    /// What the generator used.
    pub generator: GeneratorReport,
    /// What the server used.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub server: Option<ServerUse>,
    /// What the server counted of requests for several keys; from the beginning of the window to the last reply.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub server_txns: Option<TxnCounts>,
    /// CPU time that neither server nor generator used, by wall time; known if the server's process is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub others_cores: Option<f64>,
    /// Share of time that the hypervisor took from this machine's CPUs.
    pub stolen_share: f64,
    /// Why the run ended early.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cut: Option<&'static str>,
    /// Whether every key was written before.
    pub preloaded: bool,
    /// Statistics over time.
    pub series: Vec<Point>,
}

/// Cores used by others above which a run counts as disturbed.
pub const DISTURBED: f64 = 0.15;

/// Share of the time waiting for a CPU above which a thread counts as disturbed.
pub const QUEUED: f64 = 0.05;

/// A thread above this share of a core has nothing left.
const FULL: f64 = 0.95;

impl Report {
    /// Sums an outcome up.
    pub fn new(config: &RunConfig, outcome: &Outcome) -> Self {
        let seconds = outcome.elapsed.as_secs_f64().max(1e-9);
        let latencies = total(outcome);
        let row = |command: &str, histogram: &Histogram<u64>| CommandReport {
            command: command.to_string(),
            operations: histogram.len(),
            operations_per_second: histogram.len() as f64 / seconds,
            latency: Latency::of(histogram),
        };
        let used: Vec<_> = Command::ALL
            .into_iter()
            .filter(|&c| !latencies[c as usize].is_empty())
            .collect();
        let mut commands: Vec<_> = used.iter().map(|&c| row(c.name(), &latencies[c as usize])).collect();
        if commands.len() > 1 {
            commands.push(row("all", &together(&latencies)));
        }
        let replies = outcome.operations + outcome.errors.total();
        let rate_kept = config.rate.map(|rate| replies as f64 >= 0.98 * rate * seconds);
        let generator = generator(outcome, rate_kept == Some(true));
        let hits: u64 = outcome.workers.iter().map(|w| w.hits).sum();
        let misses: u64 = outcome.workers.iter().map(|w| w.misses).sum();
        let received: u64 = outcome.workers.iter().map(|w| w.received).sum();
        let answered = || outcome.workers.iter().flat_map(|w| w.answered.iter().copied());
        Report {
            protocol: config.protocol.name(),
            target: config.target.to_string(),
            workload: describe(config),
            connections: config.connections,
            pipeline: config.pipeline,
            threads: config.threads,
            io: config.engine.name(),
            rate: config.rate,
            rate_kept,
            elapsed_s: outcome.elapsed.as_secs_f64(),
            operations: outcome.operations,
            operations_per_second: outcome.operations as f64 / seconds,
            hits,
            misses,
            hit_rate: (hits + misses > 0).then(|| hits as f64 / (hits + misses) as f64),
            received_bytes_per_second: received as f64 / seconds,
            commands,
            txn: config.txn.map(|txn| TxnReport {
                operations: txn.operations,
                checked: txn.checked,
                committed: outcome.operations,
                committed_per_second: outcome.operations as f64 / seconds,
                retries: outcome.workers.iter().map(|w| w.retries).sum(),
                retries_max: outcome.workers.iter().map(|w| w.retries_max).max().unwrap_or(0),
            }),
            per_connection: Fairness {
                fewest: answered().min().unwrap_or(0),
                most: answered().max().unwrap_or(0),
            },
            errors: outcome
                .errors
                .seen()
                .map(|(kind, count, example)| ErrorReport {
                    kind: kind.name(),
                    count,
                    example: example.to_string(),
                })
                .collect(),
            others_cores: outcome.server.as_ref().map(|server| {
                let busy = outcome.machine.busy * outcome.machine.cpus as f64;
                (busy - server.cores_used - generator.cores_used).max(0.0)
            }),
            stolen_share: outcome.machine.stolen,
            generator,
            server: outcome.server.clone(),
            server_txns: outcome.txns,
            cut: outcome.cut.as_ref().map(|cut| match cut {
                Cut::ServerGone => "the server went away",
                Cut::Stalled => "the server stopped answering",
            }),
            preloaded: config.preload,
            series: series(outcome),
        }
    }

    /// Whether everything went as it should.
    pub fn is_clean(&self) -> bool {
        self.cut.is_none() && self.errors.is_empty()
    }

    /// The report as text for people.
    pub fn text(&self) -> String {
        let mut out = String::new();
        // Writing to a string cannot fail.
        let _ = self.write_text(&mut out);
        out
    }

    fn write_text(&self, out: &mut String) -> std::fmt::Result {
        writeln!(out, "{} at {}: {}", self.protocol, self.target, self.workload)?;
        write!(
            out,
            "{} connections, pipeline {}, {} thread(s)",
            self.connections, self.pipeline, self.threads
        )?;
        match self.rate {
            Some(rate) => writeln!(out, ", open loop at {} requests/s", grouped(rate))?,
            None => writeln!(out, ", closed loop")?,
        }
        if let Some(cut) = self.cut {
            writeln!(out, "THE RUN ENDED EARLY: {cut}; this is what was measured until then")?;
        }
        writeln!(out)?;
        let unit = if self.txn.is_some() {
            "transactions"
        } else {
            "operations"
        };
        write!(out, "throughput  {} {unit}/s", grouped(self.operations_per_second))?;
        writeln!(
            out,
            "  ({} in {:.2} s)",
            grouped(self.operations as f64),
            self.elapsed_s
        )?;
        match self.hit_rate {
            Some(rate) => {
                let keys = (self.hits + self.misses) as f64 / self.elapsed_s.max(1e-9);
                writeln!(out, "hit rate    {:.2} % of {} keys/s", rate * 100.0, grouped(keys))?;
            }
            None => writeln!(out, "hit rate    - (no good replies to gets)")?,
        }
        if let Some(txn) = self.txn.as_ref().filter(|txn| txn.checked) {
            let each = txn.retries as f64 / txn.committed.max(1) as f64;
            let (retries, most) = (grouped(txn.retries as f64), txn.retries_max);
            writeln!(
                out,
                "retries     {retries} because a key had changed ({each:.3} per transaction committed, at most {most})"
            )?;
        }
        let Fairness { fewest, most } = self.per_connection;
        let (fewest, most) = (grouped(fewest as f64), grouped(most as f64));
        writeln!(out, "fairness    {fewest} to {most} {unit} per connection")?;
        writeln!(out)?;
        write!(out, "{:<10}{:>14}", "latency", format!("{unit}/s"))?;
        for name in ["mean", "min", "p50", "p90", "p99", "p99.9", "p99.99", "max"] {
            write!(out, "{name:>11}")?;
        }
        writeln!(out, "   (microseconds)")?;
        for row in &self.commands {
            write!(out, "{:<10}{:>14}", row.command, grouped(row.operations_per_second))?;
            let l = &row.latency;
            for value in [
                l.mean_us,
                l.min_us,
                l.p50_us,
                l.p90_us,
                l.p99_us,
                l.p99_9_us,
                l.p99_99_us,
                l.max_us,
            ] {
                write!(out, "{value:>11.1}")?;
            }
            writeln!(out)?;
        }
        writeln!(out)?;
        if self.errors.is_empty() {
            writeln!(out, "errors      none")?;
        }
        for error in &self.errors {
            write!(out, "errors      {} x {}", grouped(error.count as f64), error.kind)?;
            let example = if error.example.is_empty() {
                String::new()
            } else {
                format!(": {}", error.example)
            };
            writeln!(out, "{example}")?;
        }
        let of_other_run = [ErrorKind::WrongLength, ErrorKind::WrongValue].map(ErrorKind::name);
        if !self.preloaded && self.errors.iter().any(|e| of_other_run.contains(&e.kind)) {
            writeln!(
                out,
                "            the server may hold values of a run with another --value-size, --keys or --seed; add --preload"
            )?;
        }
        let g = &self.generator;
        writeln!(
            out,
            "generator   {:.2} cores (user {:.2}, system {:.2}), busiest thread {:.0} %, {} us CPU/operation",
            g.cores_used,
            g.user_cores,
            g.system_cores,
            g.busiest_thread_share * 100.0,
            g.cpu_us_per_operation.map_or("-".into(), |us| format!("{us:.3}")),
        )?;
        if g.spinning_cores > 0.0 {
            writeln!(
                out,
                "            of which {:.2} cores spun and waited",
                g.spinning_cores
            )?;
        }
        if let Some(server) = &self.server {
            writeln!(
                out,
                "server      {:.2} cores, busiest thread {:.0} %, idle {:.0} %, {} us CPU/operation, resident {:.1} MiB",
                server.cores_used,
                server.busiest_thread_share * 100.0,
                server.idle_share * 100.0,
                server.cpu_us_per_operation.map_or("-".into(), |us| format!("{us:.3}")),
                server.resident_bytes as f64 / (1 << 20) as f64,
            )?;
        }
        if let Some(counts) = &self.server_txns {
            writeln!(
                out,
                "counted     by the server: {} requests for several keys, {} times that one locked anew, {} waits for locks",
                grouped(counts.txns as f64),
                grouped(counts.txn_retries as f64),
                grouped(counts.lock_waits as f64),
            )?;
        }
        if let Some(others) = self.others_cores.filter(|&cores| cores > DISTURBED) {
            writeln!(
                out,
                "WARNING: other processes used {others:.2} cores meanwhile and may have taken them from server or generator"
            )?;
        }
        if self.stolen_share > 0.02 {
            writeln!(
                out,
                "WARNING: the hypervisor took {:.0} % of the CPUs' time",
                self.stolen_share * 100.0
            )?;
        }
        if self.rate_kept == Some(false) {
            writeln!(
                out,
                "WARNING: fewer requests were answered than --rate asks for, so waiting times grew with the length of the \
                 run; lower --rate, or allow more --connections or --pipeline if the server had time left"
            )?;
        }
        let server = self.server.as_ref().map_or(0.0, |server| server.queued_share);
        for (whose, share) in [("generator", g.queued_share), ("server", server)] {
            if share > QUEUED {
                writeln!(
                    out,
                    "WARNING: a thread of the {whose} waited {:.0} % of the time for its CPU, which something else used; \
                     latencies include that",
                    share * 100.0
                )?;
            }
        }
        if g.was_bottleneck {
            let why = match &self.server {
                Some(_) => "while the server had time left",
                None => "and the server's use is unknown (give --server-pid)",
            };
            writeln!(
                out,
                "WARNING: the generator had no CPU time left {why}: these figures are the generator's, not the server's; \
                 give it more --threads and --cpus"
            )?;
        }
        Ok(())
    }
}

/// The workload in words.
pub(crate) fn describe(config: &RunConfig) -> String {
    let what = match config.txn {
        Some(txn) if txn.checked => format!("optimistic transactions that read and write {} keys", txn.operations),
        Some(txn) => format!(
            "transactions of {} operations, get:set:delete {}",
            txn.operations, config.ratio
        ),
        None => format!("get:set:delete {}", config.ratio),
    };
    let mut text = format!(
        "{what}, {} keys of {} bytes ({}), values of {} bytes",
        grouped(config.keys as f64),
        config.key_size,
        config.distribution,
        config.value_size
    );
    if config.multi_get > 1 {
        text += &format!(", {} keys per get", config.multi_get);
    }
    if config.multi_set > 1 {
        text += &format!(", {} entries per set", config.multi_set);
    }
    if config.route {
        text += ", each request to the core that owns its key";
    }
    text
}

fn generator(outcome: &Outcome, kept_pace: bool) -> GeneratorReport {
    let wall = |w: &WorkerSummary| w.end_ns.saturating_sub(w.start_ns).max(1) as f64;
    let sum = |f: &dyn Fn(&WorkerSummary) -> f64| outcome.workers.iter().map(f).sum::<f64>();
    let user_cores = sum(&|w| w.cpu.user_ns as f64 / wall(w));
    let system_cores = sum(&|w| w.cpu.system_ns as f64 / wall(w));
    let working = |w: &WorkerSummary| w.cpu.total_ns().saturating_sub(w.waited_ns) as f64;
    let most = |f: &dyn Fn(&WorkerSummary) -> f64| outcome.workers.iter().map(f).fold(0.0, f64::max);
    let queued = |w: &WorkerSummary| w.cpu.queued_ns as f64;
    let spent = sum(&working);
    GeneratorReport {
        cores_used: user_cores + system_cores,
        user_cores,
        system_cores,
        spinning_cores: sum(&|w| w.waited_ns as f64 / wall(w)),
        busiest_thread_share: most(&|w| working(w) / wall(w)),
        queued_share: most(&|w| queued(w) / wall(w)),
        cpu_us_per_operation: (outcome.operations > 0).then(|| spent / 1000.0 / outcome.operations as f64),
        // An open loop that kept its pace had enough, however little was left.
        was_bottleneck: most(&|w| (working(w) + queued(w)) / wall(w)) > FULL
            && !kept_pace
            && !outcome.server.as_ref().is_some_and(ServerUse::saturated),
    }
}

/// Latencies of the whole measured window, all threads together.
pub fn total(outcome: &Outcome) -> Histograms {
    let mut sum = histograms();
    for interval in outcome.workers.iter().flat_map(|w| &w.intervals) {
        for (sum, part) in sum.iter_mut().zip(&interval.latencies) {
            merge(sum, part);
        }
    }
    sum
}

/// All commands in one histogram.
pub fn together(latencies: &Histograms) -> Histogram<u64> {
    let mut sum = histograms()[0].clone();
    for part in latencies {
        merge(&mut sum, part);
    }
    sum
}

/// Adds `part` to `sum`; both have the same bounds.
pub fn merge(sum: &mut Histogram<u64>, part: &Histogram<u64>) {
    if !part.is_empty() {
        sum.add(part).expect("histograms of this program share their bounds");
    }
}

/// Intervals of all threads, the n-th of each together: start and end in nanoseconds, and the latencies.
pub fn intervals(outcome: &Outcome) -> Vec<(u64, u64, Histograms)> {
    let n = outcome.workers.iter().map(|w| w.intervals.len()).max().unwrap_or(0);
    let mut all = Vec::with_capacity(n);
    for i in 0..n {
        let parts: Vec<_> = outcome.workers.iter().filter_map(|w| w.intervals.get(i)).collect();
        let start = parts.iter().map(|p| p.start_ns).min().unwrap_or(0);
        let end = parts.iter().map(|p| p.end_ns).max().unwrap_or(0);
        let mut sum = histograms();
        for part in parts {
            for (sum, part) in sum.iter_mut().zip(&part.latencies) {
                merge(sum, part);
            }
        }
        all.push((start, end, sum));
    }
    all
}

fn series(outcome: &Outcome) -> Vec<Point> {
    let all = intervals(outcome);
    let zero = all.first().map_or(0, |i| i.0);
    all.iter()
        // A sliver at the end would say little and look like a dip or a spike.
        .filter(|(start, end, _)| end - start > 50_000_000 || all.len() == 1)
        .map(|(start, end, latencies)| {
            let sum = together(latencies);
            Point {
                at_s: ((start + end) / 2 - zero) as f64 / 1e9,
                operations_per_second: sum.len() as f64 / ((end - start).max(1) as f64 / 1e9),
                p50_us: sum.value_at_quantile(0.5) as f64 / 1000.0,
                p99_9_us: sum.value_at_quantile(0.999) as f64 / 1000.0,
            }
        })
        .collect()
}

/// The median; `None` of nothing.
pub fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        n if n % 2 == 1 => Some(values[middle]),
        _ => Some((values[middle - 1] + values[middle]) / 2.0),
    }
}

/// Writes rows of cells under their headings, all of the same length, each column as wide as it needs to be; the first is
/// flush left.
///
/// # Errors
///
/// None: writing to a string cannot fail.
pub fn write_table(out: &mut String, table: &[Vec<String>]) -> std::fmt::Result {
    for cells in table {
        for (i, cell) in cells.iter().enumerate() {
            let width = table.iter().map(|row| row[i].len()).max().unwrap_or(0);
            match i {
                0 => write!(out, "{cell:<width$}")?,
                _ => write!(out, "  {cell:>width$}")?,
            }
        }
        writeln!(out)?;
    }
    Ok(())
}

/// A whole number with commas between groups of three digits.
pub fn grouped(n: f64) -> String {
    let digits = format!("{:.0}", n.abs());
    let mut out = String::from(if n < 0.0 { "-" } else { "" });
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i) % 3 == 0 {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::CpuShares;
    use crate::stats::{CpuTime, Errors};
    use std::time::{Duration, SystemTime};

    /// One generator thread that ran, waited in vain for a CPU and spun for these shares of a second, against a server that
    /// was idle for this share of it.
    fn bottleneck(ran: f64, queued: f64, spun: f64, server_idle: Option<f64>, kept_pace: bool) -> bool {
        let ns = |share: f64| (share * 1e9) as u64;
        let worker = WorkerSummary {
            start_ns: 7,
            end_ns: 7 + ns(1.0),
            cpu: CpuTime {
                user_ns: ns(ran) / 2,
                system_ns: ns(ran) / 2,
                queued_ns: ns(queued),
            },
            recorded: 1,
            hits: 0,
            misses: 0,
            received: 0,
            retries: 0,
            retries_max: 0,
            answered: Vec::new(),
            waited_ns: ns(spun),
            errors: Errors::default(),
            intervals: Vec::new(),
        };
        let server = server_idle.map(|idle_share| ServerUse {
            pid: 1,
            cpu_us_per_operation: None,
            cores_used: 1.0 - idle_share,
            busiest_thread_share: 1.0 - idle_share,
            queued_share: 0.0,
            idle_share,
            resident_bytes: 0,
        });
        let outcome = Outcome {
            workers: vec![worker],
            operations: 1,
            elapsed: Duration::from_secs(1),
            started: SystemTime::UNIX_EPOCH,
            errors: Errors::default(),
            server,
            txns: None,
            machine: CpuShares {
                cpus: 2,
                busy: 1.0,
                stolen: 0.0,
            },
            cut: None,
        };
        generator(&outcome, kept_pace).was_bottleneck
    }

    #[test]
    fn the_bottleneck_is_who_has_nothing_left() {
        assert!(bottleneck(0.99, 0.0, 0.0, Some(0.5), false));
        assert!(
            bottleneck(0.99, 0.0, 0.0, None, false),
            "nothing is known of the server"
        );
        assert!(
            !bottleneck(0.99, 0.0, 0.0, Some(0.02), false),
            "the server had nothing left either"
        );
        assert!(
            !bottleneck(0.99, 0.0, 0.0, Some(0.5), true),
            "an open loop that kept its pace"
        );
        assert!(!bottleneck(0.99, 0.0, 0.5, Some(0.5), false), "it spun");
        assert!(!bottleneck(0.5, 0.0, 0.0, Some(0.5), false));
        assert!(bottleneck(0.5, 0.48, 0.0, Some(0.5), false), "others had its CPU");
    }

    #[test]
    fn medians() {
        assert_eq!(median([].into_iter()), None);
        assert_eq!(median([3.0, 1.0, 2.0].into_iter()), Some(2.0));
        assert_eq!(median([4.0, 1.0, 2.0, 3.0].into_iter()), Some(2.5));
    }

    #[test]
    fn numbers_are_grouped() {
        assert_eq!(grouped(0.0), "0");
        assert_eq!(grouped(999.4), "999");
        assert_eq!(grouped(1000.0), "1,000");
        assert_eq!(grouped(1_234_567.0), "1,234,567");
        assert_eq!(grouped(-1234.0), "-1,234");
    }
}
