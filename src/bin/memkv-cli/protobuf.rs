//! The commands over the protobuf protocol.

use crate::Command;
use crate::failure::Failure;
use crate::screen::Screen;
use memkv::client::{self, Expiry, Options, Put, Topology};
use memkv::partition::Partitioner;
use memkv::proto::MetricsReport;
use std::os::unix::ffi::OsStrExt;
use std::time::Duration;

/// What the protocol does not have.
pub(crate) fn check(command: &Command) -> Result<(), String> {
    match command {
        Command::Incr(_)
        | Command::Decr(_)
        | Command::Touch { .. }
        | Command::Stats { .. }
        | Command::Hotkeys
        | Command::Slowlog => Err(format!(
            "{} needs the memcached protocol: --server HOST:PORT, by default port 11211",
            command.name()
        )),
        _ => Ok(()),
    }
}

/// Asks one server, over a connection that is opened when it is needed.
pub(crate) struct Client {
    server: String,
    options: Options,
    client: Option<client::Client>,
}

impl Client {
    pub(crate) fn new(server: String, timeout: Duration) -> Self {
        let options = Options {
            connect_timeout: timeout,
            timeout,
            ..Options::default()
        };
        Self {
            server,
            options,
            client: None,
        }
    }

    /// Connects, if it is not yet done.
    pub(crate) fn connect(&mut self) -> Result<&mut client::Client, Failure> {
        let client = match self.client.take() {
            Some(client) => client,
            None => self.options.connect(self.server.as_str())?,
        };
        Ok(self.client.insert(client))
    }

    /// Carries a command out and shows its result. False: a key was not found.
    pub(crate) fn run(&mut self, command: &Command, screen: &Screen) -> Result<bool, Failure> {
        check(command).map_err(Failure::Unclear)?;
        let client = self.connect()?;
        let mut all = true;
        match command {
            Command::Get { keys } => {
                let bytes: Vec<&[u8]> = keys.iter().map(|key| key.as_bytes()).collect();
                for (key, item) in keys.iter().zip(client.get_many(&bytes)?) {
                    all &= screen.answer(key, item.as_ref().map(|item| item.value.as_ref()))?;
                }
            }
            Command::Set { key, value, ttl, flags } => {
                let put = Put {
                    flags: *flags,
                    expiry: match ttl {
                        0 => Expiry::Never,
                        seconds => Expiry::In(Duration::from_secs(*seconds)),
                    },
                    ..Put::new(key.as_bytes(), value.as_bytes())
                };
                client.set_with(put)?.stored()?;
                screen.show(b"STORED")?;
            }
            Command::Delete { keys } => {
                let bytes: Vec<&[u8]> = keys.iter().map(|key| key.as_bytes()).collect();
                for (key, is_deleted) in keys.iter().zip(client.delete_many(&bytes)?) {
                    all &= screen.answer(key, is_deleted.then_some(b"DELETED"))?;
                }
            }
            Command::Flush => {
                client.flush(Duration::ZERO)?;
                screen.show(b"OK")?;
            }
            Command::Snapshot => {
                client.snapshot()?;
                screen.show(b"OK")?;
            }
            Command::Version => _ = screen.show(client.metrics()?.server_version.as_bytes())?,
            Command::Metrics => show_metrics(&client.metrics()?, screen)?,
            Command::Topology => show_topology(&client.topology()?, screen)?,
            // Refused above.
            Command::Incr(_)
            | Command::Decr(_)
            | Command::Touch { .. }
            | Command::Stats { .. }
            | Command::Hotkeys
            | Command::Slowlog => {}
        }
        Ok(all)
    }
}

fn row(cells: &[&dyn std::fmt::Display]) -> Vec<String> {
    cells.iter().map(ToString::to_string).collect()
}

/// Counters, and below them the latencies.
fn show_metrics(report: &MetricsReport, screen: &Screen) -> Result<(), Failure> {
    let mut rows = vec![
        row(&[&"server_version", &report.server_version]),
        row(&[&"cores", &report.cores]),
    ];
    rows.extend(report.counters.iter().map(|(name, count)| row(&[name, count])));
    screen.table(&rows)?;
    if report.latencies.is_empty() {
        return Ok(());
    }
    let heads = [
        "latency", "core", "count", "min", "p50", "p90", "p99", "p99.9", "p99.99", "max",
    ];
    let mut rows = vec![heads.map(str::to_owned).to_vec()];
    for latency in &report.latencies {
        let core = if latency.forwarded { "another" } else { "own" };
        let mut cells = row(&[&latency.command, &core, &latency.count]);
        let times = [
            latency.min_ns,
            latency.p50_ns,
            latency.p90_ns,
            latency.p99_ns,
            latency.p99_9_ns,
            latency.p99_99_ns,
            latency.max_ns,
        ];
        cells.extend(times.map(readable));
        rows.push(cells);
    }
    screen.show(b"")?;
    screen.table(&rows)?;
    Ok(())
}

/// How keys become tokens, and below it the ranges of tokens with their owners.
fn show_topology(topology: &Topology, screen: &Screen) -> Result<(), Failure> {
    let mut rows = match topology.partitioner {
        Some(Partitioner::Hashed { seed }) => vec![row(&[&"partitioner", &"hashed"]), row(&[&"seed", &seed])],
        Some(Partitioner::Ordered { seed }) => vec![row(&[&"partitioner", &"ordered"]), row(&[&"seed", &seed])],
        None => vec![row(&[&"partitioner", &"unknown"])],
    };
    rows.push(row(&[&"cores", &topology.cores]));
    screen.table(&rows)?;
    screen.show(b"")?;
    let heads = ["first token", "last token", "core", "port"];
    let mut rows = vec![heads.map(str::to_owned).to_vec()];
    for range in &topology.ranges {
        let port = topology.core_ports.get(usize::from(range.core.0));
        let port = port.map_or_else(|| "-".to_owned(), u16::to_string);
        let (first, last) = (range.tokens.start, range.tokens.end);
        rows.push(row(&[
            &format!("{first:016x}"),
            &format!("{last:016x}"),
            &range.core.0,
            &port,
        ]));
    }
    screen.table(&rows)?;
    Ok(())
}

/// A time in three digits.
pub(crate) fn readable(ns: u64) -> String {
    let units = [(1e9, "s"), (1e6, "ms"), (1e3, "us")];
    // What would be rounded up to a thousand belongs to the next unit.
    let unit = units.iter().find(|(factor, _)| ns as f64 >= factor * 0.9995);
    let Some((factor, unit)) = unit else {
        return format!("{ns}ns");
    };
    let time = ns as f64 / factor;
    let decimals = match time {
        ..9.995 => 2,
        ..99.95 => 1,
        _ => 0,
    };
    format!("{time:.decimals$}{unit}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_three_digits() {
        for (ns, text) in [
            (0, "0ns"),
            (999, "999ns"),
            (1_000, "1.00us"),
            (9_994, "9.99us"),
            (9_996, "10.0us"),
            (99_960, "100us"),
            (999_400, "999us"),
            (999_600, "1.00ms"),
            (12_345_678, "12.3ms"),
            (60_000_000_000, "60.0s"),
        ] {
            assert_eq!(readable(ns), text);
        }
    }
}
