//! A table that grows: every insertion is measured by itself, so that the one which waits for the table is seen.

use super::{ClockCost, Core, Requests};
use crate::process::{CpuSample, resident_bytes, thread_cpu_ns};
use crate::report::{grouped, write_table};
use crate::stats::{CpuTime, MAX_LATENCY_NS};
use crate::workload::{Command, Population, SizeSpec};
use clap::Args;
use hdrhistogram::Histogram;
use memkv::config::Eviction;
use serde::Serialize;
use std::fmt::Write;
use std::time::Instant;

/// A request that took longer than this counts as slow: its CPU time is looked at, too.
const SLOW_NS: u64 = 200_000;
/// What no request should take.
const TOO_SLOW_NS: u64 = 1_000_000;
/// Slow requests that are listed.
const LISTED: usize = 10;
/// Requests that are made at once, outside of what is measured. A divisor of the steps that people ask for.
const MADE: u64 = 250;

/// What to insert.
#[derive(Debug, Clone, Args)]
pub struct Growth {
    /// Keys to insert, one request a turn
    #[arg(long, value_name = "N", default_value_t = 20_000_000)]
    pub keys: u64,
    /// Bytes of a key: 16, 10-30, zipf:LOW-HIGH or lognormal:MEDIAN,SIGMA
    #[arg(long, value_name = "SIZE", default_value = "19")]
    pub key_size: SizeSpec,
    /// Bytes of a value: 100, 50-2000, zipf:LOW-HIGH or lognormal:MEDIAN,SIGMA
    #[arg(long, value_name = "SIZE", default_value = "32")]
    pub value_size: SizeSpec,
    /// Insert this many per second, spinning in between [default: as fast as possible]
    #[arg(long, value_name = "PER_SECOND")]
    pub rate: Option<f64>,
    /// Note the memory, and the slow requests, after each so many items
    #[arg(long, value_name = "N", default_value_t = 1_000_000)]
    pub step: u64,
    /// Seed of keys and values
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
}

/// A slow request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Slow {
    /// Items that were there before.
    pub items: u64,
    /// What it took, in nanoseconds.
    pub wall_ns: u64,
    /// CPU time of the thread meanwhile, in nanoseconds. What is missing is time in which something else had the CPU.
    pub cpu_ns: u64,
}

/// The memory at some size, and the slow requests on the way there.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Step {
    /// Items.
    pub items: u64,
    /// What the resident memory of the process grew by since the engine was empty, in bytes.
    pub resident_bytes: u64,
    /// What the engine charges to the memory limit, in bytes.
    pub charged_bytes: u64,
    /// Requests of more than 200 us of wall time since the step before.
    pub slow: u64,
    /// Those of them of more than 200 us of CPU time.
    pub slow_by_cpu: u64,
    /// The most CPU time of one of them, in nanoseconds; 0 if there was none.
    pub max_cpu_ns: u64,
}

/// What was measured.
#[derive(Debug, Clone, Serialize)]
pub struct GrowthReport {
    /// Keys inserted.
    pub keys: u64,
    /// Bytes of a key.
    pub key_size: String,
    /// Bytes of a value.
    pub value_size: String,
    /// Insertions per second that were asked for; absent when as fast as possible.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate: Option<f64>,
    /// Seed of keys and values.
    pub seed: u64,
    /// Length in seconds, with the making of requests.
    pub elapsed_s: f64,
    /// Wall time of a request, in nanoseconds: mean.
    pub mean_ns: f64,
    /// Half of the requests took at most this, in nanoseconds.
    pub p50_ns: u64,
    /// 99 of a hundred.
    pub p99_ns: u64,
    /// 999 of a thousand.
    pub p99_9_ns: u64,
    /// 9,999 of ten thousand.
    pub p99_99_ns: u64,
    /// The slowest.
    pub max_ns: u64,
    /// Requests of more than 200 us of wall time; the CPU time of these is known.
    pub slow: u64,
    /// Requests of more than 1 ms of wall time.
    pub over_1ms_wall: u64,
    /// Requests of more than 1 ms of CPU time.
    pub over_1ms_cpu: u64,
    /// The most CPU time of a slow request, in nanoseconds; absent if none was slow.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_cpu_ns: Option<u64>,
    /// The slowest by wall time.
    pub slowest_by_wall: Vec<Slow>,
    /// The slowest by CPU time.
    pub slowest_by_cpu: Vec<Slow>,
    /// Time that the thread was ready to run while something else had its CPU, in nanoseconds, in all.
    pub queued_ns: u64,
    /// Share of time that the hypervisor took from this machine's CPUs.
    pub stolen_share: f64,
    /// Resident memory of this process before the engine was made, in bytes.
    pub resident_empty_bytes: u64,
    /// The memory by number of items; the last one is the end.
    pub steps: Vec<Step>,
    /// What the clocks cost.
    pub clocks: ClockCost,
}

/// The slow requests, counted and the worst of them kept.
#[derive(Debug, Default)]
struct SlowRequests {
    count: u64,
    over_wall: u64,
    over_cpu: u64,
    by_wall: Vec<Slow>,
    by_cpu: Vec<Slow>,
    /// Of the present step: how many, how many by CPU time, and the most CPU time.
    step: (u64, u64, u64),
}

impl SlowRequests {
    #[cold]
    fn add(&mut self, slow: Slow) {
        self.count += 1;
        let (count, by_cpu, max_cpu_ns) = self.step;
        self.step = (
            count + 1,
            by_cpu + u64::from(slow.cpu_ns > SLOW_NS),
            max_cpu_ns.max(slow.cpu_ns),
        );
        self.over_wall += u64::from(slow.wall_ns > TOO_SLOW_NS);
        self.over_cpu += u64::from(slow.cpu_ns > TOO_SLOW_NS);
        let keep = |list: &mut Vec<Slow>, by: fn(&Slow) -> u64| {
            let at = list.partition_point(|other| by(other) >= by(&slow));
            list.insert(at, slow);
            list.truncate(LISTED);
        };
        keep(&mut self.by_wall, |slow| slow.wall_ns);
        keep(&mut self.by_cpu, |slow| slow.cpu_ns);
    }
}

/// Inserts the keys. `said` is told now and then how far it is.
///
/// # Errors
///
/// A sentence naming cause and remedy when the parameters do not fit, or the engine did not store all.
pub fn run(config: &Growth, said: &mut dyn FnMut(&str)) -> Result<GrowthReport, String> {
    let population = Population::new(config.keys, config.key_size, config.value_size, config.seed)?;
    if config.rate.is_some_and(|rate| !(rate > 0.0 && rate <= 1e9)) {
        return Err("--rate must be above 0 and at most 1000000000 requests per second".to_owned());
    }
    if config.step == 0 {
        return Err("--step must be at least 1".to_owned());
    }
    let clocks = ClockCost::measure();
    let mut latencies = Histogram::<u64>::new_with_bounds(1, MAX_LATENCY_NS, 3).expect("the bounds are valid");
    let mut slow = SlowRequests::default();
    let mut steps: Vec<Step> = Vec::new();
    let mut requests = Requests::default();
    let resident = || resident_bytes(std::process::id()).unwrap_or(0);
    let resident_empty_bytes = resident();
    let mut core = Core::new(None, Eviction::None);
    let (queued_before, cpus_before) = (CpuTime::of_this_thread().queued_ns, CpuSample::take());
    let began = Instant::now();
    for first in (0..config.keys).step_by(MADE as usize) {
        requests.clear();
        let end = (first + MADE).min(config.keys);
        for key in first..end {
            requests.push(Command::Set, key, &population);
        }
        for (items, request) in (first..end).zip(requests.pieces(1)) {
            if let Some(rate) = config.rate {
                while began.elapsed().as_secs_f64() < items as f64 / rate {
                    std::hint::spin_loop();
                }
            }
            // Read before every request, and after the slow ones only.
            let cpu_ns = thread_cpu_ns();
            let start = Instant::now();
            core.turn(std::iter::once(request));
            let wall_ns = start.elapsed().as_nanos() as u64;
            if wall_ns > SLOW_NS {
                let cpu_ns = thread_cpu_ns() - cpu_ns;
                slow.add(Slow { items, wall_ns, cpu_ns });
            }
            latencies.saturating_record(wall_ns);
        }
        requests.outcomes(core.replies(), &population)?.all_stored(first)?;
        core.forget_replies();
        if first / config.step < end / config.step || end == config.keys {
            let (count, slow_by_cpu, max_cpu_ns) = std::mem::take(&mut slow.step);
            steps.push(Step {
                items: end,
                resident_bytes: resident().saturating_sub(resident_empty_bytes),
                charged_bytes: core.charged_bytes(),
                slow: count,
                slow_by_cpu,
                max_cpu_ns,
            });
            said(&format!("{} keys", grouped(end as f64)));
        }
    }
    let elapsed_s = began.elapsed().as_secs_f64();
    let items = core.statistic("curr_items");
    if items != Some(config.keys) {
        return Err(format!(
            "the engine says that it has {items:?} items, not {}",
            config.keys
        ));
    }
    Ok(GrowthReport {
        keys: config.keys,
        key_size: config.key_size.to_string(),
        value_size: config.value_size.to_string(),
        rate: config.rate,
        seed: config.seed,
        elapsed_s,
        mean_ns: latencies.mean(),
        p50_ns: latencies.value_at_quantile(0.5),
        p99_ns: latencies.value_at_quantile(0.99),
        p99_9_ns: latencies.value_at_quantile(0.999),
        p99_99_ns: latencies.value_at_quantile(0.9999),
        max_ns: latencies.max(),
        slow: slow.count,
        over_1ms_wall: slow.over_wall,
        over_1ms_cpu: slow.over_cpu,
        max_cpu_ns: slow.by_cpu.first().map(|slow| slow.cpu_ns),
        slowest_by_wall: slow.by_wall,
        slowest_by_cpu: slow.by_cpu,
        queued_ns: CpuTime::of_this_thread().queued_ns.saturating_sub(queued_before),
        stolen_share: cpus_before.until(&CpuSample::take()).stolen,
        resident_empty_bytes,
        steps,
        clocks,
    })
}

impl GrowthReport {
    /// The report as text for people.
    pub fn text(&self) -> String {
        let mut out = String::new();
        // Writing to a string cannot fail.
        let _ = self.write_text(&mut out);
        out
    }

    fn write_text(&self, out: &mut String) -> std::fmt::Result {
        let pace = self.rate.map_or("as fast as possible".to_owned(), |rate| {
            format!("{} per second", grouped(rate))
        });
        writeln!(
            out,
            "growth: {} keys of {} bytes, values of {} bytes, one request a turn, {pace}; seed {}; {:.1} s",
            grouped(self.keys as f64),
            self.key_size,
            self.value_size,
            self.seed,
            self.elapsed_s
        )?;
        let ClockCost { wall_ns, cpu_ns } = self.clocks;
        writeln!(
            out,
            "reading a clock costs {wall_ns:.0} ns (wall time; once in each figure) or {cpu_ns:.0} ns (CPU time; before each \
             request, outside of its wall time)\n"
        )?;
        writeln!(out, "wall time of a request")?;
        writeln!(out, "  mean    {:>15.0} ns", self.mean_ns)?;
        for (name, ns) in [
            ("p50", self.p50_ns),
            ("p99", self.p99_ns),
            ("p99.9", self.p99_9_ns),
            ("p99.99", self.p99_99_ns),
            ("max", self.max_ns),
        ] {
            writeln!(out, "  {name:<8}{:>15} ns", grouped(ns as f64))?;
        }
        let ms = |ns: u64| format!("{:.3} ms", ns as f64 / 1e6);
        writeln!(
            out,
            "\nover 1 ms: {} by wall time (longest {}), {} by CPU time (longest {})",
            self.over_1ms_wall,
            ms(self.max_ns),
            self.over_1ms_cpu,
            self.max_cpu_ns.map_or("at most 0.200 ms".to_owned(), ms)
        )?;
        writeln!(
            out,
            "over 200 us of wall time: {}; the thread waited {} in all for its CPU, which something else had",
            self.slow,
            ms(self.queued_ns)
        )?;
        if self.stolen_share > 0.0 {
            let percent = self.stolen_share * 100.0;
            writeln!(
                out,
                "the hypervisor took {percent:.1} % of the CPUs' time; the CPU times may include some of it"
            )?;
        }
        for (by, list) in [("wall", &self.slowest_by_wall), ("CPU", &self.slowest_by_cpu)] {
            if list.is_empty() {
                continue;
            }
            writeln!(out, "\nlongest by {by} time")?;
            let mut table = vec![["", "wall us", "CPU us", "at items"].map(String::from).to_vec()];
            for slow in list {
                let us = |ns: u64| format!("{:.1}", ns as f64 / 1e3);
                let items = grouped(slow.items as f64);
                table.push(vec![String::new(), us(slow.wall_ns), us(slow.cpu_ns), items]);
            }
            write_table(out, &table)?;
        }
        writeln!(
            out,
            "\nby size: bytes per item, without the {:.1} MiB resident before; requests of more than 200 us since the row above",
            self.resident_empty_bytes as f64 / f64::from(1 << 20)
        )?;
        let heads = ["items", "resident", "charged", "by wall", "by CPU", "max CPU us"];
        let mut table = vec![heads.map(String::from).to_vec()];
        for step in &self.steps {
            let each = |bytes: u64| format!("{:.1}", bytes as f64 / step.items as f64);
            table.push(vec![
                grouped(step.items as f64),
                each(step.resident_bytes),
                each(step.charged_bytes),
                grouped(step.slow as f64),
                grouped(step.slow_by_cpu as f64),
                format!("{:.1}", step.max_cpu_ns as f64 / 1e3),
            ]);
        }
        write_table(out, &table)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_are_kept_in_order() {
        let mut slow = SlowRequests::default();
        for i in 0..30u64 {
            slow.add(Slow {
                items: i,
                wall_ns: 900_000 + (i * 7 % 30) * 10_000,
                cpu_ns: 2_000_000 - i * 50_000,
            });
        }
        assert_eq!((slow.count, slow.over_wall, slow.over_cpu), (30, 19, 20));
        assert_eq!(slow.step, (30, 30, 2_000_000));
        assert_eq!((slow.by_wall.len(), slow.by_cpu.len()), (LISTED, LISTED));
        assert!(slow.by_wall.is_sorted_by(|a, b| a.wall_ns >= b.wall_ns));
        assert_eq!(slow.by_wall[0].wall_ns, 1_190_000);
        assert_eq!(slow.by_cpu.iter().map(|slow| slow.items).max(), Some(9));
    }
}
