//! Several servers under the same load, in turn and repeatedly, and what they need for it.

use crate::driver::{self, RunConfig};
use crate::report::{DISTURBED, ErrorReport, Report, grouped};
use crate::servers::Server;
use serde::Serialize;
use std::fmt::Write;
use std::time::Duration;

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
    /// Good replies per second.
    pub operations_per_second: f64,
    /// The lowest and the highest of the rounds.
    pub operations_per_second_range: (f64, f64),
    /// Throughput by that of the best other server; above 1 is better.
    pub throughput_ratio: Option<f64>,
    /// CPU time of the server per operation, in microseconds.
    pub server_cpu_us_per_operation: Option<f64>,
    /// CPU time per operation by that of the best other server; below 1 is better.
    pub cpu_ratio: Option<f64>,
    /// Unused part of the cores the server worked on.
    pub server_idle_share: Option<f64>,
    /// Resident memory of the server in bytes.
    pub server_resident_bytes: Option<f64>,
    /// Median latency in microseconds.
    pub p50_us: f64,
    /// 99th percentile in microseconds.
    pub p99_us: f64,
    /// 99.9th percentile in microseconds.
    pub p99_9_us: f64,
    /// CPU time by wall time of the busiest generator thread.
    pub generator_busiest_share: f64,
    /// Whether the generator set the pace in any round.
    pub generator_was_bottleneck: bool,
    /// Cores that other processes used meanwhile; the most of all rounds.
    pub others_cores: f64,
    /// Errors in all rounds, by kind.
    pub errors: Vec<ErrorReport>,
    /// Whether any round ended early.
    pub cut: bool,
}

/// A finished comparison.
#[derive(Debug, Serialize)]
pub struct Comparison {
    /// The workload in words.
    pub workload: String,
    /// Connections.
    pub connections: usize,
    /// By pipeline depth, then by server in the order given.
    pub rows: Vec<Row>,
}

/// Compares `servers`. The first run against each preloads it if `base` says so. `said` is told what is about to run.
///
/// While one server is measured, the others that this program started are stopped.
///
/// # Errors
///
/// A sentence naming cause and remedy when a run could not begin.
pub fn compare(
    servers: &[Server],
    base: &RunConfig,
    pipelines: &[usize],
    rounds: usize,
    said: &mut dyn FnMut(&str),
) -> Result<Comparison, String> {
    for server in servers {
        server.pause();
    }
    // By pipeline, then by server.
    let mut reports: Vec<Vec<Vec<Report>>> = pipelines
        .iter()
        .map(|_| servers.iter().map(|_| Vec::new()).collect())
        .collect();
    let mut preloaded = vec![false; servers.len()];
    for round in 0..rounds {
        for (depth, &pipeline) in pipelines.iter().enumerate() {
            for turn in 0..servers.len() {
                // Another one goes first in every round, so that no server always has the same predecessor.
                let which = (turn + round) % servers.len();
                let server = &servers[which];
                said(&format!(
                    "round {} of {rounds}, pipeline {pipeline}: {}",
                    round + 1,
                    server.name
                ));
                server.resume();
                // A process that was stopped has timers to catch up with.
                std::thread::sleep(Duration::from_millis(100));
                let config = RunConfig {
                    protocol: server.protocol,
                    target: server.address,
                    pipeline,
                    server_pid: server.pid,
                    preload: base.preload && !preloaded[which],
                    sequence: round as u64,
                    ..base.clone()
                };
                let result = driver::run(&config, &mut |_| {});
                server.pause();
                let report = Report::new(&config, &result.map_err(|e| format!("{}: {e}", server.name))?);
                preloaded[which] = true;
                reports[depth][which].push(report);
            }
        }
    }
    let mut rows = Vec::new();
    for (depth, &pipeline) in pipelines.iter().enumerate() {
        let first = rows.len();
        for (server, reports) in servers.iter().zip(&reports[depth]) {
            rows.push(row(server, pipeline, reports));
        }
        ratios(&mut rows[first..]);
    }
    let workload = reports
        .first()
        .and_then(|r| r.first()?.first())
        .map(|r| r.workload.clone())
        .unwrap_or_default();
    Ok(Comparison {
        workload,
        connections: base.connections,
        rows,
    })
}

/// The median; `None` of nothing.
fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        n if n % 2 == 1 => Some(values[middle]),
        _ => Some((values[middle - 1] + values[middle]) / 2.0),
    }
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
    let throughput = || reports.iter().map(|r| r.operations_per_second);
    Row {
        server: server.name.clone(),
        protocol: server.protocol.name(),
        pipeline,
        rounds: reports.len(),
        operations_per_second: of(&|r| r.operations_per_second),
        operations_per_second_range: (throughput().fold(f64::MAX, f64::min), throughput().fold(0.0, f64::max)),
        throughput_ratio: None,
        server_cpu_us_per_operation: of_server(&|s| s.cpu_us_per_operation),
        cpu_ratio: None,
        server_idle_share: of_server(&|s| Some(s.idle_share)),
        server_resident_bytes: of_server(&|s| Some(s.resident_bytes as f64)),
        p50_us: latency(&|l| l.p50_us),
        p99_us: latency(&|l| l.p99_us),
        p99_9_us: latency(&|l| l.p99_9_us),
        generator_busiest_share: of(&|r| r.generator.busiest_thread_share),
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

/// Fills in the ratios of each row to the best of the others.
fn ratios(rows: &mut [Row]) {
    let throughput: Vec<f64> = rows.iter().map(|r| r.operations_per_second).collect();
    let cpu: Vec<Option<f64>> = rows.iter().map(|r| r.server_cpu_us_per_operation).collect();
    for (i, row) in rows.iter_mut().enumerate() {
        let others = |j: &usize| *j != i;
        let best = (0..throughput.len())
            .filter(others)
            .map(|j| throughput[j])
            .fold(0.0, f64::max);
        row.throughput_ratio = (best > 0.0).then(|| throughput[i] / best);
        let least = (0..cpu.len())
            .filter(others)
            .filter_map(|j| cpu[j])
            .fold(f64::MAX, f64::min);
        row.cpu_ratio = cpu[i]
            .filter(|_| least > 0.0 && least < f64::MAX)
            .map(|own| own / least);
    }
}

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
        let width = self.rows.iter().map(|r| r.server.len()).max().unwrap_or(0).max(6);
        let mut pipeline = None;
        for row in &self.rows {
            if pipeline.replace(row.pipeline) != Some(row.pipeline) {
                writeln!(out, "\npipeline {}", row.pipeline)?;
                writeln!(
                    out,
                    "{:<width$} {:>12} {:>25} {:>7} {:>9} {:>7} {:>6} {:>9} {:>9} {:>9} {:>9} {:>6}",
                    "server",
                    "operations/s",
                    "lowest-highest",
                    "ratio",
                    "CPU us/op",
                    "ratio",
                    "idle",
                    "MiB",
                    "p50 us",
                    "p99 us",
                    "p99.9 us",
                    "gen."
                )?;
            }
            let (low, high) = row.operations_per_second_range;
            let or_dash = |value: Option<f64>, digits: usize| value.map_or("-".into(), |v| format!("{v:.digits$}"));
            let percent = |value: Option<f64>| value.map_or("-".into(), |v| format!("{:.0} %", v * 100.0));
            writeln!(
                out,
                "{:<width$} {:>12} {:>25} {:>7} {:>9} {:>7} {:>6} {:>9} {:>9.1} {:>9.1} {:>9.1} {:>6}",
                row.server,
                grouped(row.operations_per_second),
                format!("{}-{}", grouped(low), grouped(high)),
                or_dash(row.throughput_ratio, 2),
                or_dash(row.server_cpu_us_per_operation, 3),
                or_dash(row.cpu_ratio, 2),
                percent(row.server_idle_share),
                or_dash(row.server_resident_bytes.map(|b| b / f64::from(1 << 20)), 1),
                row.p50_us,
                row.p99_us,
                row.p99_9_us,
                percent(Some(row.generator_busiest_share)),
            )?;
        }
        writeln!(
            out,
            "\nratio: by the best of the others (throughput: more is better; CPU: less is better); idle: unused part of \
             the cores the server worked on; gen.: CPU share of the busiest generator thread"
        )?;
        for row in &self.rows {
            let (server, pipeline) = (&row.server, row.pipeline);
            if row.generator_was_bottleneck {
                writeln!(
                    out,
                    "WARNING: {server}, pipeline {pipeline}: the generator was the bottleneck"
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

    #[test]
    fn medians() {
        assert_eq!(median([].into_iter()), None);
        assert_eq!(median([3.0, 1.0, 2.0].into_iter()), Some(2.0));
        assert_eq!(median([4.0, 1.0, 2.0, 3.0].into_iter()), Some(2.5));
    }

    #[test]
    fn ratios_are_to_the_best_other() {
        let row = |name: &str, throughput: f64, cpu: Option<f64>| Row {
            server: name.into(),
            protocol: "text",
            pipeline: 1,
            rounds: 1,
            operations_per_second: throughput,
            operations_per_second_range: (throughput, throughput),
            throughput_ratio: None,
            server_cpu_us_per_operation: cpu,
            cpu_ratio: None,
            server_idle_share: None,
            server_resident_bytes: None,
            p50_us: 1.0,
            p99_us: 1.0,
            p99_9_us: 1.0,
            generator_busiest_share: 0.5,
            generator_was_bottleneck: false,
            others_cores: 0.0,
            errors: Vec::new(),
            cut: false,
        };
        let mut rows = [
            row("a", 300.0, Some(1.0)),
            row("b", 200.0, Some(2.0)),
            row("c", 100.0, None),
        ];
        ratios(&mut rows);
        assert_eq!(rows[0].throughput_ratio, Some(1.5));
        assert_eq!(rows[1].throughput_ratio, Some(200.0 / 300.0));
        assert_eq!(rows[0].cpu_ratio, Some(0.5));
        assert_eq!(rows[1].cpu_ratio, Some(2.0));
        assert_eq!(rows[2].cpu_ratio, None);
        let mut alone = [row("a", 300.0, Some(1.0))];
        ratios(&mut alone);
        assert_eq!((alone[0].throughput_ratio, alone[0].cpu_ratio), (None, None));
        let text = Comparison {
            workload: "w".into(),
            connections: 1,
            rows: rows.to_vec(),
        }
        .text();
        assert!(text.contains("pipeline 1") && text.contains("1.50"), "{text}");
    }
}
