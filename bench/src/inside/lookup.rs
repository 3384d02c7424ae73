//! What a lookup costs by the number of keys, and what looking ahead across a pipeline saves.
//!
//! The engine looks ahead by itself over the requests that it receives in one piece. A pipeline that it receives *apart*, a
//! request a piece in the same turn, is the same work of the protocol, but there is nothing to look ahead to. What receiving
//! more pieces costs by itself shows where all memory is in the CPU's caches: at a few thousand keys.

use super::{ClockCost, Core, Requests};
use crate::process::{CpuSample, available_bytes, thread_cpu_ns};
use crate::report::{grouped, write_table};
use crate::stats::CpuTime;
use crate::workload::{Command, DistributionSpec, KeyChooser, Population, Rng, SizeSpec};
use clap::Args;
use memkv::config::Eviction;
use serde::Serialize;
use std::fmt::Write;
use std::time::Instant;

/// Requests that are made before the clocks are read, about.
const MADE: usize = 512;
/// What an item takes besides its key and value, at most, in bytes: to see beforehand whether there is memory enough.
const BESIDE: f64 = 32.0;

/// What to look up.
#[derive(Debug, Clone, Args)]
pub struct Lookup {
    /// Numbers of keys to compare
    #[arg(
        long,
        value_name = "LIST",
        value_delimiter = ',',
        default_value = "10000,1000000,50000000"
    )]
    pub keys: Vec<u64>,
    /// Requests in a turn
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "1,16")]
    pub pipelines: Vec<usize>,
    /// Measure each pipeline also apart: each request in a piece of its own, so that nothing is looked ahead to
    #[arg(long)]
    pub apart: bool,
    /// Lookups for each figure and round
    #[arg(long, value_name = "N", default_value_t = 2_000_000)]
    pub count: u64,
    /// Rounds; the table shows medians
    #[arg(long, value_name = "N", default_value_t = 5)]
    pub rounds: usize,
    /// Bytes of a key: 16, 10-30, zipf:LOW-HIGH or lognormal:MEDIAN,SIGMA
    #[arg(long, value_name = "SIZE", default_value = "19")]
    pub key_size: SizeSpec,
    /// Bytes of a value: 100, 50-2000, zipf:LOW-HIGH or lognormal:MEDIAN,SIGMA
    #[arg(long, value_name = "SIZE", default_value = "32")]
    pub value_size: SizeSpec,
    /// Seed of everything random
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
}

/// What one kind of lookup costs.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// Keys there are.
    pub keys: u64,
    /// Requests in a turn.
    pub pipeline: usize,
    /// Whether each came in a piece of its own.
    pub apart: bool,
    /// CPU time of a lookup, in nanoseconds; the median of the rounds.
    pub cpu_ns: f64,
    /// The lowest and the highest of the rounds.
    pub cpu_ns_range: (f64, f64),
    /// Wall time of a lookup, in nanoseconds; the median of the rounds.
    pub wall_ns: f64,
    /// CPU time by that of the same lookup among the fewest keys.
    pub by_fewest_keys: f64,
    /// CPU time by that of the same pipeline apart, if that was measured: below 1, looking ahead saves.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub by_apart: Option<f64>,
}

/// What was measured.
#[derive(Debug, Clone, Serialize)]
pub struct LookupReport {
    /// Bytes of a key.
    pub key_size: String,
    /// Bytes of a value.
    pub value_size: String,
    /// Lookups for each figure and round.
    pub count: u64,
    /// Rounds.
    pub rounds: usize,
    /// Seed of everything random.
    pub seed: u64,
    /// By number of keys, pipeline, and whether apart.
    pub rows: Vec<Row>,
    /// Share of the wall time of the measured lookups in which the thread was ready to run and something else had its CPU.
    pub queued_share: f64,
    /// Share of time that the hypervisor took from this machine's CPUs.
    pub stolen_share: f64,
    /// What the clocks cost.
    pub clocks: ClockCost,
}

/// One kind of lookup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Kind {
    pipeline: usize,
    apart: bool,
}

/// CPU and wall time of a lookup in one round, in nanoseconds.
#[derive(Debug, Clone, Copy)]
struct Times {
    cpu_ns: f64,
    wall_ns: f64,
}

/// Looks keys up. `said` is told what is about to happen.
///
/// # Errors
///
/// A sentence naming cause and remedy when the parameters do not fit, there is not enough memory, or the engine did not
/// answer as it should.
pub fn run(config: &Lookup, said: &mut dyn FnMut(&str)) -> Result<LookupReport, String> {
    let mut sizes = config.keys.clone();
    sizes.sort_unstable();
    sizes.dedup();
    let most = sizes.last().copied().unwrap_or(0);
    let population = Population::new(most, config.key_size, config.value_size, config.seed)?;
    if sizes[0] == 0 || config.pipelines.is_empty() || config.pipelines.contains(&0) {
        return Err("--keys and --pipelines must be at least 1".to_owned());
    }
    if config.rounds == 0 || config.count == 0 {
        return Err("--rounds and --count must be at least 1".to_owned());
    }
    let item = population.max_key_size() as f64 + population.mean_value_size() + BESIDE;
    if let Some(available) = available_bytes().filter(|&bytes| most as f64 * item > bytes as f64) {
        return Err(format!(
            "--keys {most}: they take up to {:.0} bytes each, and only {:.1} GiB of memory are free; use fewer",
            item,
            available as f64 / f64::from(1 << 30)
        ));
    }
    let mut kinds = Vec::new();
    for &pipeline in &config.pipelines {
        kinds.push(Kind { pipeline, apart: false });
        if config.apart && pipeline > 1 {
            kinds.push(Kind { pipeline, apart: true });
        }
    }
    let clocks = ClockCost::measure();
    let mut core = Core::new(None, Eviction::None);
    let cpus_before = CpuSample::take();
    let (mut present, mut queued_ns, mut wall_ns) = (0, 0, 0.0);
    let mut rows: Vec<Row> = Vec::new();
    for &keys in &sizes {
        said(&format!("writing keys up to {}", grouped(keys as f64)));
        core.preload(&population, present..keys)?;
        present = keys;
        let chooser = KeyChooser::new(keys, DistributionSpec::Uniform);
        let mut rounds: Vec<Vec<Times>> = vec![Vec::new(); kinds.len()];
        for round in 0..config.rounds {
            said(&format!(
                "round {} of {}, {} keys",
                round + 1,
                config.rounds,
                grouped(keys as f64)
            ));
            let queued_before = CpuTime::of_this_thread().queued_ns;
            for (number, (kind, times)) in kinds.iter().zip(&mut rounds).enumerate() {
                // Other keys each time: what one kind has brought into the caches must not serve the next.
                let mut rng = Rng::new(config.seed ^ (round as u64) << 32 ^ (number as u64) << 48);
                let time = measure(&mut core, &population, &chooser, &mut rng, *kind, config.count)?;
                wall_ns += time.wall_ns * config.count as f64;
                times.push(time);
            }
            queued_ns += CpuTime::of_this_thread().queued_ns.saturating_sub(queued_before);
        }
        for (kind, times) in kinds.iter().zip(&rounds) {
            rows.push(row(keys, *kind, times));
        }
    }
    relate(&mut rows);
    Ok(LookupReport {
        key_size: config.key_size.to_string(),
        value_size: config.value_size.to_string(),
        count: config.count,
        rounds: config.rounds,
        seed: config.seed,
        rows,
        queued_share: queued_ns as f64 / wall_ns.max(1.0),
        stolen_share: cpus_before.until(&CpuSample::take()).stolen,
        clocks,
    })
}

/// One round of one kind of lookup. Requests are made, and replies compared, while the clocks stand.
fn measure(
    core: &mut Core,
    population: &Population,
    chooser: &KeyChooser,
    rng: &mut Rng,
    kind: Kind,
    count: u64,
) -> Result<Times, String> {
    let turns = MADE.div_ceil(kind.pipeline);
    let mut requests = Requests::default();
    let (mut done, mut cpu_ns, mut wall_ns) = (0, 0, 0);
    while done < count {
        requests.clear();
        for _ in 0..turns * kind.pipeline {
            requests.push(Command::Get, chooser.pick(rng), population);
        }
        core.forget_replies();
        let (start, cpu_start) = (Instant::now(), thread_cpu_ns());
        if kind.apart {
            let mut pieces = requests.pieces(1);
            while pieces.len() > 0 {
                core.turn(pieces.by_ref().take(kind.pipeline));
            }
        } else {
            for piece in requests.pieces(kind.pipeline) {
                core.turn(std::iter::once(piece));
            }
        }
        cpu_ns += thread_cpu_ns() - cpu_start;
        wall_ns += start.elapsed().as_nanos() as u64;
        let hits = requests.outcomes(core.replies(), population)?.hits;
        if hits < requests.len() as u64 {
            return Err("the engine did not find a key that was written; this is a bug".to_owned());
        }
        done += hits;
    }
    core.forget_replies();
    let each = |ns: u64| ns as f64 / done as f64;
    Ok(Times {
        cpu_ns: each(cpu_ns),
        wall_ns: each(wall_ns),
    })
}

fn row(keys: u64, kind: Kind, times: &[Times]) -> Row {
    let mut cpu: Vec<f64> = times.iter().map(|times| times.cpu_ns).collect();
    cpu.sort_by(f64::total_cmp);
    let of = |f: fn(&Times) -> f64| crate::report::median(times.iter().map(f)).unwrap_or(0.0);
    Row {
        keys,
        pipeline: kind.pipeline,
        apart: kind.apart,
        cpu_ns: of(|times| times.cpu_ns),
        cpu_ns_range: (cpu[0], cpu[cpu.len() - 1]),
        wall_ns: of(|times| times.wall_ns),
        by_fewest_keys: 1.0,
        by_apart: None,
    }
}

/// Fills in the ratios.
fn relate(rows: &mut [Row]) {
    let before = rows.to_vec();
    for row in rows {
        let same = |other: &&Row| other.pipeline == row.pipeline;
        let mut alike = before.iter().filter(same).filter(|other| other.apart == row.apart);
        row.by_fewest_keys = alike.next().map_or(1.0, |fewest| row.cpu_ns / fewest.cpu_ns);
        let mut apart = before
            .iter()
            .filter(same)
            .filter(|other| other.keys == row.keys && other.apart);
        row.by_apart = apart
            .next()
            .filter(|_| !row.apart)
            .map(|apart| row.cpu_ns / apart.cpu_ns);
    }
}

impl LookupReport {
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
            "lookup: uniform gets, keys of {} bytes, values of {} bytes, {} a figure, medians of {} rounds; seed {}\n",
            self.key_size,
            self.value_size,
            grouped(self.count as f64),
            self.rounds,
            self.seed
        )?;
        let heads = [
            "keys",
            "pipeline",
            "pieces",
            "CPU ns/op",
            "lowest-highest",
            "wall ns/op",
            "by fewest keys",
            "by apart",
        ];
        let mut table = vec![heads.map(String::from).to_vec()];
        for row in &self.rows {
            table.push(vec![
                grouped(row.keys as f64),
                row.pipeline.to_string(),
                if row.apart { "apart" } else { "one" }.to_owned(),
                format!("{:.1}", row.cpu_ns),
                format!("{:.1}-{:.1}", row.cpu_ns_range.0, row.cpu_ns_range.1),
                format!("{:.1}", row.wall_ns),
                format!("{:.2}", row.by_fewest_keys),
                row.by_apart.map_or("-".to_owned(), |ratio| format!("{ratio:.2}")),
            ]);
        }
        write_table(out, &table)?;
        writeln!(
            out,
            "\nby fewest keys, by apart: ratios of CPU time; apart: each request in a piece of its own, so that nothing is \
             looked ahead to\neach turn reads the wall clock twice, as a server does: {:.0} ns each time",
            self.clocks.wall_ns
        )?;
        if self.queued_share > 0.01 {
            let percent = self.queued_share * 100.0;
            writeln!(
                out,
                "WARNING: the thread waited {percent:.0} % of the time for its CPU, which something else used"
            )?;
        }
        if self.stolen_share > 0.02 {
            let percent = self.stolen_share * 100.0;
            writeln!(out, "WARNING: the hypervisor took {percent:.0} % of the CPUs' time")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_related_to_their_like() {
        let kind = |pipeline, apart| Kind { pipeline, apart };
        let times = |cpu_ns| {
            [3.0, 1.0, 2.0].map(|factor| Times {
                cpu_ns: cpu_ns * factor / 2.0,
                wall_ns: 7.0,
            })
        };
        let mut rows = vec![
            row(10, kind(1, false), &times(100.0)),
            row(10, kind(16, false), &times(50.0)),
            row(10, kind(16, true), &times(60.0)),
            row(90, kind(1, false), &times(400.0)),
            row(90, kind(16, false), &times(75.0)),
            row(90, kind(16, true), &times(300.0)),
        ];
        relate(&mut rows);
        assert_eq!(rows[3].cpu_ns_range, (200.0, 600.0));
        let ratios: Vec<_> = rows.iter().map(|row| (row.by_fewest_keys, row.by_apart)).collect();
        let expected = [
            (1.0, None),
            (1.0, Some(50.0 / 60.0)),
            (1.0, None),
            (4.0, None),
            (1.5, Some(0.25)),
            (5.0, None),
        ];
        assert_eq!(ratios, expected);
    }
}
