//! Writes latencies as an HdrHistogram log, one histogram per interval and command, for other tools to read.

use crate::driver::Outcome;
use crate::report::intervals;
use crate::workload::Command;
use hdrhistogram::serialization::V2DeflateSerializer;
use hdrhistogram::serialization::interval_log::{IntervalLogWriterBuilder, Tag};
use std::io::{self, Write};
use std::time::Duration;

/// Writes the log. Latencies are in nanoseconds; the plain-text maximum of each line is in milliseconds, as the readers
/// of this format expect. Times count from the beginning of the measured window.
///
/// # Errors
///
/// When `out` cannot be written.
pub fn write_log(outcome: &Outcome, out: &mut impl Write) -> io::Result<()> {
    let failed = |e: &dyn std::fmt::Display| io::Error::other(e.to_string());
    let mut serializer = V2DeflateSerializer::new();
    let mut log = IntervalLogWriterBuilder::new()
        .add_comment("[Latencies in nanoseconds; logged by memkv-bench]")
        .add_comment("[Histogram log format version 1.3]")
        .with_start_time(outcome.started)
        .with_base_time(outcome.started)
        .with_max_value_divisor(1e6)
        .begin_log_with(out, &mut serializer)?;
    let all = intervals(outcome);
    let zero = all.first().map_or(0, |i| i.0);
    for (start, end, latencies) in &all {
        for command in Command::ALL {
            let histogram = &latencies[command as usize];
            if histogram.is_empty() {
                continue;
            }
            let (from, length) = (Duration::from_nanos(start - zero), Duration::from_nanos(end - start));
            log.write_histogram(histogram, from, length, Tag::new(command.name()))
                .map_err(|e| failed(&e))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::CpuShares;
    use crate::stats::{CpuTime, Errors, Interval, WorkerSummary, histograms};
    use hdrhistogram::Histogram;
    use hdrhistogram::serialization::Deserializer;
    use hdrhistogram::serialization::interval_log::{IntervalLogIterator, LogEntry};
    use std::time::SystemTime;

    fn outcome() -> Outcome {
        let interval = |start_ns: u64, latency_ns: u64| {
            let mut latencies = histograms();
            for i in 0..1000 {
                latencies[Command::Get as usize].record(latency_ns + i).unwrap();
            }
            latencies[Command::Set as usize].record(7_000_000).unwrap();
            Interval {
                start_ns,
                end_ns: start_ns + 1_000_000_000,
                latencies,
            }
        };
        let worker = |latency_ns| WorkerSummary {
            start_ns: 5_000_000_000,
            end_ns: 7_000_000_000,
            cpu: CpuTime::default(),
            recorded: 2002,
            hits: 2000,
            misses: 0,
            received: 0,
            retries: 0,
            retries_max: 0,
            answered: Vec::new(),
            waited_ns: 0,
            errors: Errors::default(),
            intervals: vec![interval(5_000_000_000, latency_ns), interval(6_000_000_000, latency_ns)],
        };
        Outcome {
            workers: vec![worker(100_000), worker(300_000)],
            operations: 4004,
            elapsed: Duration::from_secs(2),
            started: SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000),
            errors: Errors::default(),
            server: None,
            txns: None,
            machine: CpuShares {
                cpus: 1,
                busy: 0.0,
                stolen: 0.0,
            },
            cut: None,
        }
    }

    #[test]
    fn the_log_reads_back() {
        let outcome = outcome();
        let mut bytes = Vec::new();
        write_log(&outcome, &mut bytes).unwrap();
        let text = std::str::from_utf8(&bytes).unwrap();
        assert!(text.starts_with("#[Latencies"), "{text}");

        let mut deserializer = Deserializer::new();
        let mut seen = Vec::new();
        let mut start = None;
        for entry in IntervalLogIterator::new(&bytes) {
            match entry.unwrap() {
                LogEntry::StartTime(at) => start = Some(at.as_secs()),
                LogEntry::BaseTime(_) => {}
                LogEntry::Interval(interval) => {
                    let encoded = interval.encoded_histogram();
                    let raw = decode_base64(encoded);
                    let histogram: Histogram<u64> = deserializer.deserialize(&mut raw.as_slice()).unwrap();
                    let tag = interval.tag().unwrap().as_str().to_string();
                    seen.push((tag, interval.start_timestamp().as_secs(), histogram));
                    assert_eq!(interval.duration().as_secs(), 1);
                }
            }
        }
        assert_eq!(start, Some(1_700_000_000));
        let names: Vec<_> = seen.iter().map(|(tag, at, _)| (tag.as_str(), *at)).collect();
        assert_eq!(names, [("get", 0), ("set", 0), ("get", 1), ("set", 1)]);
        let mut expected = histograms()[0].clone();
        for i in 0..1000 {
            expected.record(100_000 + i).unwrap();
            expected.record(300_000 + i).unwrap();
        }
        assert_eq!(seen[0].2, expected);
        assert_eq!(seen[1].2.len(), 2);
    }

    fn decode_base64(text: &str) -> Vec<u8> {
        let alphabet = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        let (mut out, mut bits, mut held) = (Vec::new(), 0u32, 0);
        for byte in text.bytes().filter(|&b| b != b'=') {
            bits = bits << 6 | alphabet.iter().position(|&a| a == byte).unwrap() as u32;
            held += 6;
            if held >= 8 {
                held -= 8;
                out.push((bits >> held) as u8);
                bits &= (1 << held) - 1;
            }
        }
        out
    }
}
