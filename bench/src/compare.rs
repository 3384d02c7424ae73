//! Several servers under the same load, in turn and repeatedly, and what they need for it.

use crate::driver::{self, RunConfig};
use crate::report::{DISTURBED, ErrorReport, QUEUED, Report, describe, grouped, median, write_table};
use crate::servers::Server;
use serde::Serialize;
use std::fmt::Write;
use std::str::FromStr;
use std::time::Duration;

/// How requests are paced.
#[derive(Debug, Clone, PartialEq)]
pub enum Pace {
    /// By the replies: each server at its peak.
    Closed,
    /// An open loop at this rate.
    Rate(f64),
    /// An open loop at this share of the peak of one of the servers, which is measured first.
    Of {
        /// The server.
        server: String,
        /// The share; 1 is all of it.
        share: f64,
    },
}

/// Reads `NAME:SHARE`.
impl FromStr for Pace {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts = text
            .rsplit_once(':')
            .and_then(|(server, share)| Some((server, share.parse().ok()?)));
        match parts {
            Some((server, share)) if !server.is_empty() && share > 0.0 && share <= 1.0 => Ok(Pace::Of {
                server: server.to_string(),
                share,
            }),
            _ => Err(format!(
                "'{text}' is not the share of a server's rate; write NAME:SHARE with a share above 0 and at most 1, such as \
                 memcached:0.6"
            )),
        }
    }
}

/// What is compared with what, and how.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Pipeline depths to compare at.
    pub pipelines: Vec<usize>,
    /// Rounds, of which the medians are taken.
    pub rounds: usize,
    /// How requests are paced.
    pub pace: Pace,
    /// The server that ratios are to; the best of the others if there is none.
    pub against: Option<String>,
}

/// What one server achieved at one pipeline depth: medians over the rounds.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// The server.
    pub server: String,
    /// Its protocol.
    pub protocol: &'static str,
    /// Requests in flight per connection.
    pub pipeline: usize,
    /// Rounds that the medians are of.
    pub rounds: usize,
    /// Requests per second that were asked for; absent in a closed loop.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate: Option<f64>,
    /// Whether every round answered as many requests as were asked for, but for a fiftieth.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate_kept: Option<bool>,
    /// Good replies per second.
    pub operations_per_second: f64,
    /// The lowest and the highest of the rounds.
    pub operations_per_second_range: (f64, f64),
    /// Throughput by that of the best other server, or of the one named; above 1 is better. So are all ratios.
    pub throughput_ratio: Option<f64>,
    /// CPU time of the server per operation, in microseconds.
    pub server_cpu_us_per_operation: Option<f64>,
    /// CPU time per operation by that of the other; below 1 is better.
    pub cpu_ratio: Option<f64>,
    /// Unused part of the cores the server worked on.
    pub server_idle_share: Option<f64>,
    /// Resident memory of the server in bytes.
    pub server_resident_bytes: Option<f64>,
    /// Median latency in microseconds.
    pub p50_us: f64,
    /// The same by that of the other; below 1 is better.
    pub p50_ratio: Option<f64>,
    /// 99th percentile in microseconds.
    pub p99_us: f64,
    /// The same by that of the other.
    pub p99_ratio: Option<f64>,
    /// 99.9th percentile in microseconds.
    pub p99_9_us: f64,
    /// The same by that of the other.
    pub p99_9_ratio: Option<f64>,
    /// The lowest and the highest 99.9th percentile of the rounds.
    pub p99_9_us_range: (f64, f64),
    /// CPU time by wall time of the busiest generator thread.
    pub generator_busiest_share: f64,
    /// Time that a generator thread waited for a CPU by wall time; the most of all rounds.
    pub generator_queued_share: f64,
    /// The same of a thread of the server.
    pub server_queued_share: f64,
    /// Whether the generator set the pace in any round.
    pub generator_was_bottleneck: bool,
    /// Cores that other processes used meanwhile; the most of all rounds.
    pub others_cores: f64,
    /// Errors in all rounds, by kind.
    pub errors: Vec<ErrorReport>,
    /// Whether any round ended early.
    pub cut: bool,
}

/// The peak rates of the server that others are compared at a share of.
#[derive(Debug, Serialize)]
pub struct Peaks {
    /// The server.
    pub server: String,
    /// The share of its peak.
    pub share: f64,
    /// By pipeline depth: operations per second in a closed loop, the median of the rounds.
    pub operations_per_second: Vec<(usize, f64)>,
}

/// A finished comparison.
#[derive(Debug, Serialize)]
pub struct Comparison {
    /// The workload in words.
    pub workload: String,
    /// Connections.
    pub connections: usize,
    /// The server that ratios are to; the best of the others if there is none.
    pub against: Option<String>,
    /// Whose peak rates were measured first, if an open loop runs at a share of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate_of: Option<Peaks>,
    /// By pipeline depth, then by server in the order given.
    pub rows: Vec<Row>,
}

/// Compares `servers`. The first run against each preloads it if `base` says so. `said` is told what is about to run.
///
/// While one server is measured, the other processes that this program started are stopped.
///
/// # Errors
///
/// A sentence naming cause and remedy when a run could not begin.
pub fn compare(
    servers: &[Server],
    base: &RunConfig,
    plan: &Plan,
    said: &mut dyn FnMut(&str),
) -> Result<Comparison, String> {
    let (pipelines, rounds) = (&plan.pipelines, plan.rounds);
    let place_of = |name: &str, option: &str| {
        servers.iter().position(|s| s.name == name).ok_or_else(|| {
            let names: Vec<_> = servers.iter().map(|s| s.name.as_str()).collect();
            format!(
                "{option} {name}: there is no such server here; take one of {}",
                names.join(", ")
            )
        })
    };
    let against = plan
        .against
        .as_ref()
        .map(|name| place_of(name, "--against"))
        .transpose()?;
    let config_of = |server: &Server| RunConfig {
        protocol: server.protocol,
        target: server.address,
        route: server.route,
        verify: server.verify_values.unwrap_or(base.verify),
        server_pid: server.pid,
        ..base.clone()
    };
    // One that cannot be asked for this would end the comparison after the others have been measured.
    for server in servers {
        driver::check(&config_of(server)).map_err(|e| format!("{}: {e}", server.name))?;
    }
    for server in servers {
        server.pause();
    }
    let mut preloaded = Vec::new();
    let mut run = |which: usize, pipeline: usize, rate: Option<f64>, round: usize, what: &str| {
        let server = &servers[which];
        let name = &server.name;
        said(&format!(
            "{what}round {} of {rounds}, pipeline {pipeline}: {name}",
            round + 1
        ));
        server.resume();
        // A process that was stopped has timers to catch up with.
        std::thread::sleep(Duration::from_millis(100));
        let config = RunConfig {
            pipeline,
            rate,
            // What was written by one protocol of a process is there for the others.
            preload: base.preload
                && !preloaded
                    .iter()
                    .any(|&before| before == which || server.is_one_with(&servers[before])),
            sequence: round as u64,
            ..config_of(server)
        };
        let result = driver::run(&config, &mut |_| {});
        server.pause();
        preloaded.push(which);
        Ok::<_, String>(Report::new(&config, &result.map_err(|e| format!("{name}: {e}"))?))
    };

    let mut rate_of = None;
    let rates: Vec<Option<f64>> = match &plan.pace {
        Pace::Closed => vec![None; pipelines.len()],
        Pace::Rate(rate) => vec![Some(*rate); pipelines.len()],
        Pace::Of { server, share } => {
            let which = place_of(server, "--rate-of")?;
            let mut peaks = Vec::new();
            for &pipeline in pipelines {
                let rounds: Result<Vec<_>, String> = (0..rounds)
                    .map(|round| run(which, pipeline, None, round, "peak, "))
                    .collect();
                let rates = rounds?.into_iter().map(|r| r.operations_per_second);
                let peak = median(rates).filter(|&peak| peak > 0.0);
                peaks.push((
                    pipeline,
                    peak.ok_or(format!("--rate-of {server}: it answered nothing"))?,
                ));
            }
            let rates = peaks.iter().map(|(_, peak)| Some(peak * share)).collect();
            rate_of = Some(Peaks {
                server: server.clone(),
                share: *share,
                operations_per_second: peaks,
            });
            rates
        }
    };

    // By pipeline, then by server.
    let mut reports: Vec<Vec<Vec<Report>>> = pipelines
        .iter()
        .map(|_| servers.iter().map(|_| Vec::new()).collect())
        .collect();
    for round in 0..rounds {
        for (depth, &pipeline) in pipelines.iter().enumerate() {
            for turn in 0..servers.len() {
                // Another one goes first in every round, so that no server always has the same predecessor.
                let which = (turn + round) % servers.len();
                reports[depth][which].push(run(which, pipeline, rates[depth], round, "")?);
            }
        }
    }
    let mut rows = Vec::new();
    for (depth, &pipeline) in pipelines.iter().enumerate() {
        let first = rows.len();
        for (server, reports) in servers.iter().zip(&reports[depth]) {
            rows.push(row(server, pipeline, reports));
        }
        ratios(&mut rows[first..], against);
    }
    Ok(Comparison {
        workload: describe(base),
        connections: base.connections,
        against: plan.against.clone(),
        rate_of,
        rows,
    })
}

fn row(server: &Server, pipeline: usize, reports: &[Report]) -> Row {
    let of = |f: &dyn Fn(&Report) -> f64| median(reports.iter().map(f)).unwrap_or(0.0);
    let of_server = |f: &dyn Fn(&crate::process::ServerUse) -> Option<f64>| {
        median(reports.iter().filter_map(|r| r.server.as_ref().and_then(f)))
    };
    // The last row of a report is all commands together.
    let latency = |f: &dyn Fn(&crate::report::Latency) -> f64| {
        median(reports.iter().filter_map(|r| r.commands.last().map(|c| f(&c.latency)))).unwrap_or(0.0)
    };
    let range = |f: &dyn Fn(&Report) -> f64| {
        let values = || reports.iter().map(f);
        (values().fold(f64::MAX, f64::min), values().fold(0.0, f64::max))
    };
    Row {
        server: server.name.clone(),
        protocol: server.protocol.name(),
        pipeline,
        rounds: reports.len(),
        rate: reports.first().and_then(|r| r.rate),
        rate_kept: reports
            .iter()
            .map(|r| r.rate_kept)
            .reduce(|a, b| Some(a? && b?))
            .flatten(),
        operations_per_second: of(&|r| r.operations_per_second),
        operations_per_second_range: range(&|r| r.operations_per_second),
        throughput_ratio: None,
        server_cpu_us_per_operation: of_server(&|s| s.cpu_us_per_operation),
        cpu_ratio: None,
        server_idle_share: of_server(&|s| Some(s.idle_share)),
        server_resident_bytes: of_server(&|s| Some(s.resident_bytes as f64)),
        p50_us: latency(&|l| l.p50_us),
        p50_ratio: None,
        p99_us: latency(&|l| l.p99_us),
        p99_ratio: None,
        p99_9_us: latency(&|l| l.p99_9_us),
        p99_9_ratio: None,
        p99_9_us_range: range(&|r| r.commands.last().map_or(0.0, |c| c.latency.p99_9_us)),
        generator_busiest_share: of(&|r| r.generator.busiest_thread_share),
        generator_queued_share: range(&|r| r.generator.queued_share).1,
        server_queued_share: range(&|r| r.server.as_ref().map_or(0.0, |s| s.queued_share)).1,
        generator_was_bottleneck: reports.iter().any(|r| r.generator.was_bottleneck),
        others_cores: reports.iter().filter_map(|r| r.others_cores).fold(0.0, f64::max),
        errors: errors(reports),
        cut: reports.iter().any(|r| r.cut.is_some()),
    }
}

fn errors(reports: &[Report]) -> Vec<ErrorReport> {
    let mut sum: Vec<ErrorReport> = Vec::new();
    for error in reports.iter().flat_map(|r| &r.errors) {
        match sum.iter_mut().find(|e| e.kind == error.kind) {
            Some(known) => known.count += error.count,
            None => sum.push(error.clone()),
        }
    }
    sum
}

/// Fills in the ratios of each row to the one at `against`, or to the best of the others.
fn ratios(rows: &mut [Row], against: Option<usize>) {
    let before = rows.to_vec();
    for (i, row) in rows.iter_mut().enumerate() {
        let others = || {
            before
                .iter()
                .enumerate()
                .filter(|(j, _)| against.map_or(*j != i, |a| *j == a))
        };
        let to = |value: &dyn Fn(&Row) -> Option<f64>, best: &dyn Fn(f64, f64) -> f64| {
            let other = others().filter_map(|(_, row)| value(row)).reduce(best)?;
            value(&before[i]).filter(|_| other > 0.0).map(|own| own / other)
        };
        row.throughput_ratio = to(&|r| Some(r.operations_per_second), &f64::max);
        row.cpu_ratio = to(&|r| r.server_cpu_us_per_operation, &f64::min);
        row.p50_ratio = to(&|r| Some(r.p50_us), &f64::min);
        row.p99_ratio = to(&|r| Some(r.p99_us), &f64::min);
        row.p99_9_ratio = to(&|r| Some(r.p99_9_us), &f64::min);
    }
}

/// A column of the table: its heading, and what it says of a row.
type Column = (&'static str, fn(&Row) -> String);

fn or_dash(value: Option<f64>, digits: usize) -> String {
    value.map_or("-".into(), |v| format!("{v:.digits$}"))
}

fn percent(value: Option<f64>) -> String {
    value.map_or("-".into(), |v| format!("{:.0} %", v * 100.0))
}

fn from_to(range: (f64, f64), show: impl Fn(f64) -> String) -> String {
    format!("{}-{}", show(range.0), show(range.1))
}

/// What matters of servers at their peaks.
const CLOSED: [Column; 11] = [
    ("operations/s", |r| grouped(r.operations_per_second)),
    ("lowest-highest", |r| from_to(r.operations_per_second_range, grouped)),
    ("ratio", |r| or_dash(r.throughput_ratio, 2)),
    ("CPU us/op", |r| or_dash(r.server_cpu_us_per_operation, 3)),
    ("ratio", |r| or_dash(r.cpu_ratio, 2)),
    ("idle", |r| percent(r.server_idle_share)),
    ("MiB", |r| {
        or_dash(r.server_resident_bytes.map(|b| b / f64::from(1 << 20)), 1)
    }),
    ("p50 us", |r| or_dash(Some(r.p50_us), 1)),
    ("p99 us", |r| or_dash(Some(r.p99_us), 1)),
    ("p99.9 us", |r| or_dash(Some(r.p99_9_us), 1)),
    ("gen.", |r| percent(Some(r.generator_busiest_share))),
];

/// What matters of servers at the same rate.
const OPEN: [Column; 12] = [
    ("operations/s", |r| grouped(r.operations_per_second)),
    ("p50 us", |r| or_dash(Some(r.p50_us), 1)),
    ("ratio", |r| or_dash(r.p50_ratio, 2)),
    ("p99 us", |r| or_dash(Some(r.p99_us), 1)),
    ("ratio", |r| or_dash(r.p99_ratio, 2)),
    ("p99.9 us", |r| or_dash(Some(r.p99_9_us), 1)),
    ("lowest-highest", |r| from_to(r.p99_9_us_range, |us| format!("{us:.1}"))),
    ("ratio", |r| or_dash(r.p99_9_ratio, 2)),
    ("CPU us/op", |r| or_dash(r.server_cpu_us_per_operation, 3)),
    ("ratio", |r| or_dash(r.cpu_ratio, 2)),
    ("idle", |r| percent(r.server_idle_share)),
    ("gen.", |r| percent(Some(r.generator_busiest_share))),
];

impl Comparison {
    /// Whether every run went as it should.
    pub fn is_clean(&self) -> bool {
        self.rows.iter().all(|r| r.errors.is_empty() && !r.cut)
    }

    /// The comparison as text for people.
    pub fn text(&self) -> String {
        let mut out = String::new();
        // Writing to a string cannot fail.
        let _ = self.write_text(&mut out);
        out
    }

    fn write_text(&self, out: &mut String) -> std::fmt::Result {
        writeln!(out, "{}; {} connections; medians", self.workload, self.connections)?;
        for rows in self.rows.chunk_by(|a, b| a.pipeline == b.pipeline) {
            let (pipeline, rate) = (rows[0].pipeline, rows[0].rate);
            write!(out, "\npipeline {pipeline}")?;
            if let Some(rate) = rate {
                write!(out, ", open loop at {} requests/s", grouped(rate))?;
            }
            if let Some(peaks) = &self.rate_of
                && let Some((_, peak)) = peaks.operations_per_second.iter().find(|(p, _)| *p == pipeline)
            {
                let (share, server) = (peaks.share * 100.0, &peaks.server);
                write!(out, ", {share:.0} % of {server}'s peak of {}", grouped(*peak))?;
            }
            writeln!(out)?;
            let columns: &[Column] = if rate.is_some() { &OPEN } else { &CLOSED };
            let names = columns.iter().map(|(name, _)| name.to_string());
            let mut table = vec![std::iter::once("server".to_string()).chain(names).collect::<Vec<_>>()];
            for row in rows {
                let cells = columns.iter().map(|(_, cell)| cell(row));
                table.push(std::iter::once(row.server.clone()).chain(cells).collect());
            }
            write_table(out, &table)?;
        }
        let other = self.against.as_deref().unwrap_or("the best of the others");
        writeln!(
            out,
            "\nratio: by {other} (throughput: more is better; CPU, latency: less is better); idle: unused part of the \
             cores the server worked on; gen.: CPU share of the busiest generator thread"
        )?;
        for row in &self.rows {
            let (server, pipeline) = (&row.server, row.pipeline);
            if row.generator_was_bottleneck {
                writeln!(
                    out,
                    "WARNING: {server}, pipeline {pipeline}: the generator was the bottleneck"
                )?;
            }
            for (whose, share) in [
                ("generator", row.generator_queued_share),
                ("server", row.server_queued_share),
            ] {
                if share > QUEUED {
                    writeln!(
                        out,
                        "WARNING: {server}, pipeline {pipeline}: a thread of the {whose} waited up to {:.0} % of the time for \
                         its CPU, which something else used",
                        share * 100.0
                    )?;
                }
            }
            if row.rate_kept == Some(false) {
                writeln!(
                    out,
                    "WARNING: {server}, pipeline {pipeline}: fewer requests were answered than asked for, so its latencies \
                     grew with the length of a run"
                )?;
            }
            if row.others_cores > DISTURBED {
                let cores = row.others_cores;
                writeln!(
                    out,
                    "WARNING: {server}, pipeline {pipeline}: other processes used up to {cores:.2} cores meanwhile"
                )?;
            }
            if row.cut {
                writeln!(out, "WARNING: {server}, pipeline {pipeline}: a run ended early")?;
            }
            for error in &row.errors {
                let (count, kind, example) = (grouped(error.count as f64), error.kind, &error.example);
                writeln!(
                    out,
                    "WARNING: {server}, pipeline {pipeline}: {count} x {kind} {example}"
                )?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(name: &str, throughput: f64, cpu: Option<f64>, p99_9_us: f64) -> Row {
        Row {
            server: name.into(),
            protocol: "text",
            pipeline: 1,
            rounds: 1,
            rate: None,
            rate_kept: None,
            operations_per_second: throughput,
            operations_per_second_range: (throughput, throughput),
            throughput_ratio: None,
            server_cpu_us_per_operation: cpu,
            cpu_ratio: None,
            server_idle_share: None,
            server_resident_bytes: None,
            p50_us: 1.0,
            p50_ratio: None,
            p99_us: 1.0,
            p99_ratio: None,
            p99_9_us,
            p99_9_ratio: None,
            p99_9_us_range: (p99_9_us, p99_9_us),
            generator_busiest_share: 0.5,
            generator_queued_share: 0.0,
            server_queued_share: 0.0,
            generator_was_bottleneck: false,
            others_cores: 0.0,
            errors: Vec::new(),
            cut: false,
        }
    }

    fn comparison(rows: &[Row], against: Option<&str>) -> Comparison {
        Comparison {
            workload: "w".into(),
            connections: 1,
            against: against.map(str::to_string),
            rate_of: None,
            rows: rows.to_vec(),
        }
    }

    #[test]
    fn ratios_are_to_the_best_other() {
        let mut rows = [
            row("a", 300.0, Some(1.0), 10.0),
            row("b", 200.0, Some(2.0), 20.0),
            row("c", 100.0, None, 40.0),
        ];
        ratios(&mut rows, None);
        assert_eq!(rows[0].throughput_ratio, Some(1.5));
        assert_eq!(rows[1].throughput_ratio, Some(200.0 / 300.0));
        assert_eq!(rows[0].cpu_ratio, Some(0.5));
        assert_eq!(rows[1].cpu_ratio, Some(2.0));
        assert_eq!(rows[2].cpu_ratio, None);
        assert_eq!((rows[0].p99_9_ratio, rows[2].p99_9_ratio), (Some(0.5), Some(4.0)));
        let text = comparison(&rows, None).text();
        assert!(text.contains("pipeline 1") && text.contains("1.50"), "{text}");
        let mut alone = [row("a", 300.0, Some(1.0), 10.0)];
        ratios(&mut alone, None);
        assert_eq!((alone[0].throughput_ratio, alone[0].cpu_ratio), (None, None));
    }

    #[test]
    fn ratios_are_to_the_one_that_is_named() {
        let mut rows = [
            row("a", 300.0, None, 10.0),
            row("b", 200.0, None, 20.0),
            row("c", 100.0, None, 40.0),
        ];
        for row in &mut rows {
            (row.rate, row.rate_kept) = (Some(300.0), Some(row.operations_per_second == 300.0));
        }
        ratios(&mut rows, Some(1));
        let of = |f: fn(&Row) -> Option<f64>| rows.iter().map(f).collect::<Vec<_>>();
        assert_eq!(of(|r| r.throughput_ratio), [Some(1.5), Some(1.0), Some(0.5)]);
        assert_eq!(of(|r| r.p99_9_ratio), [Some(0.5), Some(1.0), Some(2.0)]);
        let text = comparison(&rows, Some("b")).text();
        assert!(
            text.contains("open loop at 300") && text.contains("ratio: by b"),
            "{text}"
        );
        assert!(text.contains("WARNING: c") && !text.contains("WARNING: a"), "{text}");
    }

    #[test]
    fn paces_read() {
        let pace = Pace::Of {
            server: "a:b".into(),
            share: 0.6,
        };
        assert_eq!("a:b:0.6".parse(), Ok(pace));
        for text in ["memcached", "memcached:", ":0.6", "a:0", "a:1.1", "a:x", "a:nan"] {
            assert!(text.parse::<Pace>().unwrap_err().contains("memcached:0.6"), "{text}");
        }
    }
}
