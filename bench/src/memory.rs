//! What servers take for the same items: resident memory empty and full, one server after the other.

use crate::driver::{self, RunConfig};
use crate::process::resident_bytes;
use crate::report::{grouped, write_table};
use crate::server_counts::items;
use crate::servers::{Server, ServerSpec};
use crate::worker::VerifyValues;
use crate::workload::{DistributionSpec, Population, Ratio};
use serde::Serialize;
use std::fmt::Write;
use std::time::{Duration, Instant};

/// The longest wait for memory that does not change any more.
const STEADY_WAIT_MAX: Duration = Duration::from_secs(60);
/// Memory that changes by less than this share is steady, and by less than so many bytes: the kernel counts no finer.
const STEADY_SHARE: f64 = 0.001;
const STEADY_BYTES: u64 = 256 << 10;
/// Keys that are read back, drawn at random: if one in a thousand were missing, it would be a wonder not to meet any.
const SAMPLE: u64 = 50_000;

/// How memory is compared.
#[derive(Debug, Clone)]
pub struct MemoryPlan {
    /// Keys and values, connections, pipeline and the generator's CPUs; the rest is not used.
    pub base: RunConfig,
    /// CPUs for the servers; empty for any.
    pub server_cpus: Vec<usize>,
    /// For how long memory must not have changed before it is noted.
    pub steady: Duration,
}

/// What one server takes.
#[derive(Debug, Clone, Serialize)]
pub struct MemoryRow {
    /// The server.
    pub server: String,
    /// Its protocol.
    pub protocol: &'static str,
    /// Items that it says it holds; absent where it cannot be asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub items: Option<u64>,
    /// Keys that were read back, all of which it had.
    pub sampled: u64,
    /// Resident memory before the first key, in bytes.
    pub resident_empty_bytes: u64,
    /// Resident memory with all keys, in bytes.
    pub resident_full_bytes: u64,
    /// Whether the memory had come to rest when it was noted.
    pub steady: bool,
    /// Resident memory with all keys by the number of keys.
    pub bytes_per_item: f64,
    /// What the resident memory grew by, by the number of keys.
    pub growth_per_item: f64,
    /// Bytes per item in all without its key and value.
    pub overhead_per_item: f64,
}

/// What all of them take.
#[derive(Debug, Clone, Serialize)]
pub struct MemoryComparison {
    /// Keys that were written.
    pub keys: u64,
    /// Bytes of a key.
    pub key_size: String,
    /// Bytes of a value.
    pub value_size: String,
    /// The mean of the keys' sizes, in bytes.
    pub key_bytes: f64,
    /// The mean of the values' sizes, in bytes.
    pub value_bytes: f64,
    /// By server, in the order given.
    pub rows: Vec<MemoryRow>,
}

/// Memory that memcached must be allowed for such items, in MiB, generously: what it takes besides is at most as much again
/// and a hundred bytes an item. At least `least`.
///
/// # Errors
///
/// A sentence naming cause and remedy when there can be no such keys.
pub fn memory_mib(config: &RunConfig, least: u64) -> Result<u64, String> {
    let population = Population::new(config.keys, config.key_size, config.value_size, config.seed)?;
    let payload = population.max_key_size() as f64 + population.mean_value_size();
    let bytes = config.keys as f64 * (2.0 * payload + 100.0);
    Ok(least.max((bytes / f64::from(1 << 20)) as u64 + 1))
}

/// Starts each server, fills it, notes its memory, and ends it. `said` is told what is about to happen.
///
/// # Errors
///
/// A sentence naming cause and remedy when a server could not be started or asked for its memory, was not empty, or did not
/// hold all keys.
pub fn compare_memory(
    specs: &[ServerSpec],
    plan: &MemoryPlan,
    said: &mut dyn FnMut(&str),
) -> Result<MemoryComparison, String> {
    let base = &plan.base;
    let population = Population::new(base.keys, base.key_size, base.value_size, base.seed)?;
    let (mut key_bytes, mut value_bytes) = (0, 0);
    for key in 0..base.keys {
        key_bytes += population.key_len(key);
        value_bytes += population.value(key).len();
    }
    let mean = |sum: usize| sum as f64 / base.keys as f64;
    let (key_bytes, value_bytes) = (mean(key_bytes), mean(value_bytes));
    let mut rows = Vec::new();
    for spec in specs {
        let row = measure(spec, plan, key_bytes + value_bytes, said);
        rows.push(row.map_err(|e| format!("server '{}': {e}", spec.name))?);
    }
    Ok(MemoryComparison {
        keys: base.keys,
        key_size: base.key_size.to_string(),
        value_size: base.value_size.to_string(),
        key_bytes,
        value_bytes,
        rows,
    })
}

/// One server from its start to its end.
fn measure(
    spec: &ServerSpec,
    plan: &MemoryPlan,
    payload_bytes: f64,
    said: &mut dyn FnMut(&str),
) -> Result<MemoryRow, String> {
    let keys = plan.base.keys;
    let fill = RunConfig {
        protocol: spec.protocol,
        route: spec.route,
        ratio: Ratio {
            get: 1,
            set: 0,
            delete: 0,
        },
        multi_get: 1,
        multi_set: 1,
        txn: None,
        distribution: DistributionSpec::Uniform,
        rate: None,
        preload: true,
        warmup: Duration::ZERO,
        // The preload is what is wanted; a run measures something behind it.
        count: Some(1),
        // However long it takes; one that stops answering is noticed by the timeout.
        duration: Duration::from_secs(24 * 3600),
        ..plan.base.clone()
    };
    driver::check(&fill)?;
    let server = Server::launch(spec, &plan.server_cpus)?;
    let pid = server
        .pid
        .ok_or("its process is unknown; give the pid in the file of targets")?;
    let fill = RunConfig {
        target: server.address,
        server_pid: Some(pid),
        ..fill
    };
    let before = items(server.protocol, server.address);
    if before.is_some_and(|items| items > 0) {
        return Err(format!(
            "it holds {} items before anything is written; empty it first",
            before.unwrap_or(0)
        ));
    }
    said(&format!("{}: empty", spec.name));
    let (resident_empty_bytes, _) = steady(pid, plan.steady)?;
    said(&format!("{}: writing {} keys", spec.name, grouped(keys as f64)));
    run(&fill)?;
    said(&format!("{}: full", spec.name));
    let (resident_full_bytes, steady) = steady(pid, plan.steady)?;
    let held = items(server.protocol, server.address);
    if let Some(held) = held.filter(|&held| held != keys) {
        return Err(format!(
            "it says that it holds {} items after {} keys were written; if it has refused or evicted some, give it more \
             memory or use fewer --keys",
            grouped(held as f64),
            grouped(keys as f64)
        ));
    }
    said(&format!("{}: reading back", spec.name));
    let sampled = SAMPLE.min(keys);
    let found = run(&RunConfig {
        preload: false,
        verify: spec.verify_values.unwrap_or(VerifyValues::Full),
        count: Some(sampled),
        ..fill
    })?;
    let (hits, misses) = found;
    if misses > 0 || hits == 0 {
        return Err(format!(
            "it did not have {misses} of {} keys that were read back; if it has refused or evicted some, give it more memory \
             or use fewer --keys",
            hits + misses
        ));
    }
    let each = |bytes: u64| bytes as f64 / keys as f64;
    let bytes_per_item = each(resident_full_bytes);
    Ok(MemoryRow {
        server: spec.name.clone(),
        protocol: spec.protocol.name(),
        items: held,
        sampled: hits,
        resident_empty_bytes,
        resident_full_bytes,
        steady,
        bytes_per_item,
        growth_per_item: each(resident_full_bytes.saturating_sub(resident_empty_bytes)),
        overhead_per_item: bytes_per_item - payload_bytes,
    })
}

/// Runs to the end, and well; keys found and not found.
fn run(config: &RunConfig) -> Result<(u64, u64), String> {
    let outcome = driver::run(config, &mut |_| {})?;
    if let Some((kind, count, example)) = outcome.errors.seen().next() {
        return Err(format!(
            "{count} x {}: {example}; if it is out of memory, give it more or use fewer --keys",
            kind.name()
        ));
    }
    if outcome.cut.is_some() {
        return Err("it stopped answering; see whether it has memory enough".to_owned());
    }
    let sum = |f: fn(&crate::stats::WorkerSummary) -> u64| outcome.workers.iter().map(f).sum();
    Ok((sum(|worker| worker.hits), sum(|worker| worker.misses)))
}

/// Waits until the resident memory of a process has not changed for so long; what it is then, in bytes, and whether it has come
/// to rest.
fn steady(pid: u32, steady: Duration) -> Result<(u64, bool), String> {
    let now =
        || resident_bytes(pid).ok_or_else(|| format!("cannot read the memory of process {pid}; it may have ended"));
    let began = Instant::now();
    let mut since = (now()?, began);
    loop {
        std::thread::sleep((steady / 10).max(Duration::from_millis(5)));
        let (bytes, at) = (now()?, Instant::now());
        let room = STEADY_BYTES.max((since.0 as f64 * STEADY_SHARE) as u64);
        if bytes.abs_diff(since.0) > room {
            since = (bytes, at);
        }
        if at - since.1 >= steady {
            return Ok((bytes, true));
        }
        if at - began >= STEADY_WAIT_MAX {
            return Ok((bytes, false));
        }
    }
}

impl MemoryComparison {
    /// The comparison as text for people.
    pub fn text(&self) -> String {
        let mut out = String::new();
        // Writing to a string cannot fail.
        let _ = self.write_text(&mut out);
        out
    }

    fn write_text(&self, out: &mut String) -> std::fmt::Result {
        writeln!(
            out,
            "resident memory with {} keys of {} bytes, values of {} bytes: {:.1} bytes of key and value an item\n",
            grouped(self.keys as f64),
            self.key_size,
            self.value_size,
            self.key_bytes + self.value_bytes
        )?;
        let heads = [
            "server",
            "empty KiB",
            "full KiB",
            "bytes/item",
            "growth/item",
            "overhead/item",
        ];
        let mut table = vec![heads.map(String::from).to_vec()];
        for row in &self.rows {
            let kib = |bytes: u64| grouped(bytes as f64 / 1024.0);
            let figures = [row.bytes_per_item, row.growth_per_item, row.overhead_per_item];
            let sizes = [kib(row.resident_empty_bytes), kib(row.resident_full_bytes)];
            let cells = std::iter::once(row.server.clone()).chain(sizes);
            table.push(cells.chain(figures.map(|bytes| format!("{bytes:.1}"))).collect());
        }
        write_table(out, &table)?;
        writeln!(
            out,
            "\nbytes/item: full by the number of keys; growth/item: full less empty; overhead/item: bytes/item less key and value"
        )?;
        for row in &self.rows {
            let (server, sampled) = (&row.server, grouped(row.sampled as f64));
            match row.items {
                Some(items) => writeln!(
                    out,
                    "{server}: counts {} items, had all {sampled} keys that were read back",
                    grouped(items as f64)
                )?,
                None => writeln!(out, "{server}: had all {sampled} keys that were read back")?,
            }
            if !row.steady {
                writeln!(
                    out,
                    "WARNING: {server}: its memory still changed after {} seconds",
                    STEADY_WAIT_MAX.as_secs()
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
    fn memory_is_waited_for() {
        let (bytes, at_rest) = steady(std::process::id(), Duration::from_millis(20)).unwrap();
        assert!(bytes > 0 && at_rest);
        assert!(steady(u32::MAX / 2, Duration::ZERO).unwrap_err().contains("ended"));
    }
}
