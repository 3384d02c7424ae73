//! Runs against a server inside the test, which can be told to misbehave.

// In a test, and in what only tests use, an unwrap is the assertion.
#![allow(clippy::unwrap_used)]

use memkv_bench::compare::{Pace, Plan, compare};
use memkv_bench::driver::{self, Cut, Outcome, RunConfig};
use memkv_bench::io::Engine;
use memkv_bench::protocol::ProtocolName;
use memkv_bench::report::{Report, total};
use memkv_bench::servers::{Server, ServerSpec, known};
use memkv_bench::stats::ErrorKind;
use memkv_bench::verify::{VerifyConfig, VerifyReport, verify};
use memkv_bench::worker::VerifyValues;
use memkv_bench::workload::{Command, DistributionSpec, SizeSpec, TxnSpec};
use std::collections::{HashMap, HashSet};
use std::io::{BufRead, BufReader, BufWriter, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// What a toy server does wrong, by the number of requests it has served.
#[derive(Clone, Copy, PartialEq)]
enum Fault {
    None,
    /// Closes all connections and the listener at this request.
    DieAt(u64),
    /// Answers nothing from this request on, and keeps the connections.
    FallSilentAt(u64),
    /// Changes the first byte of every n-th value it reads back.
    CorruptEvery(u64),
    /// Refuses every set.
    Refuse,
    /// Does nothing for half a second at this request.
    SleepAt(u64),
    /// Takes its time for each commit, and says of all optimistic ones but every n-th that a key has changed.
    CommitEvery(u64, Duration),
    /// Says so of all of one connection.
    Starve,
}

struct Toy {
    protocol: ProtocolName,
    fault: Fault,
    served: AtomicU64,
    commits: AtomicU64,
    values: Mutex<HashMap<Vec<u8>, Vec<u8>>>,
    sockets: Mutex<Vec<TcpStream>>,
}

impl Toy {
    fn start(protocol: ProtocolName, fault: Fault) -> SocketAddr {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let toy = Arc::new(Toy {
            protocol,
            fault,
            served: AtomicU64::new(0),
            commits: AtomicU64::new(0),
            values: Mutex::default(),
            sockets: Mutex::default(),
        });
        std::thread::spawn(move || {
            for (number, socket) in listener.incoming().flatten().enumerate() {
                toy.sockets.lock().unwrap().push(socket.try_clone().unwrap());
                let toy = toy.clone();
                std::thread::spawn(move || toy.serve(number, socket));
            }
        });
        address
    }

    /// Serves one connection until either side is done with it.
    fn serve(&self, number: usize, socket: TcpStream) -> Option<()> {
        socket.set_nodelay(true).unwrap();
        let mut input = BufReader::new(socket.try_clone().unwrap());
        let mut out = BufWriter::new(socket);
        let mut open = None;
        loop {
            if input.buffer().is_empty() {
                out.flush().ok()?;
            }
            let words = match self.protocol {
                ProtocolName::Resp => self.read_array(&mut input)?,
                _ => read_line(&mut input)?
                    .split(|&b| b == b' ')
                    .map(<[u8]>::to_vec)
                    .collect(),
            };
            let served = self.served.fetch_add(1, Ordering::Relaxed) + 1;
            match self.fault {
                Fault::DieAt(n) if served >= n => {
                    for socket in self.sockets.lock().unwrap().iter() {
                        let _ = socket.shutdown(Shutdown::Both);
                    }
                    return None;
                }
                Fault::FallSilentAt(n) if served >= n => {
                    let _ = std::io::copy(&mut input, &mut std::io::sink());
                    return None;
                }
                Fault::SleepAt(n) if served == n => {
                    // Everybody has to wait: this server has one core.
                    let _all = self.values.lock().unwrap();
                    std::thread::sleep(Duration::from_millis(500));
                }
                _ => {}
            }
            let command = words[0].to_ascii_lowercase();
            match self.protocol {
                ProtocolName::Resp => self.resp(&command, &words[1..], served, &mut out)?,
                ProtocolName::JsonLine => {
                    let answer = self.json_line(number, &command, &words[1..], served, &mut open);
                    out.write_all(format!("{answer}\n").as_bytes()).ok()?;
                }
                _ => self.text(&command, &words[1..], served, &mut input, &mut out)?,
            }
        }
    }

    fn read_array(&self, input: &mut impl BufRead) -> Option<Vec<Vec<u8>>> {
        let number = |line: Vec<u8>| std::str::from_utf8(&line[1..]).ok()?.parse::<usize>().ok();
        let n = number(read_line(input)?)?;
        (0..n)
            .map(|_| number(read_line(input)?).and_then(|len| read_block(input, len)))
            .collect()
    }

    fn get(&self, key: &[u8], served: u64) -> Option<Vec<u8>> {
        let mut value = self.values.lock().unwrap().get(key).cloned()?;
        if matches!(self.fault, Fault::CorruptEvery(n) if served.is_multiple_of(n)) {
            value[0] ^= 1;
        }
        Some(value)
    }

    fn text(
        &self,
        command: &[u8],
        words: &[Vec<u8>],
        served: u64,
        input: &mut impl BufRead,
        out: &mut impl Write,
    ) -> Option<()> {
        let simple = self.protocol == ProtocolName::Text;
        match command {
            b"set" => {
                let len = std::str::from_utf8(words.last()?).ok()?.parse().ok()?;
                let value = read_block(input, len)?;
                if self.fault == Fault::Refuse {
                    return out.write_all(b"SERVER_ERROR out of memory\r\n").ok();
                }
                self.values.lock().unwrap().insert(words[0].clone(), value);
                out.write_all(b"STORED\r\n").ok()
            }
            b"get" => {
                for key in words {
                    let found = self.get(key, served);
                    if found.is_none() && !simple {
                        continue;
                    }
                    let value = found.unwrap_or_default();
                    let shown = String::from_utf8_lossy(key).into_owned();
                    let zero = if simple { "" } else { "0 " };
                    let space = if simple { " " } else { "" };
                    write!(out, "VALUE {shown} {zero}{}{space}\r\n", value.len()).ok()?;
                    out.write_all(&value).ok()?;
                    out.write_all(b"\r\n").ok()?;
                }
                out.write_all(b"END\r\n").ok()
            }
            _ => {
                let removed = self.values.lock().unwrap().remove(&words[0]).is_some();
                out.write_all(if removed { b"DELETED\r\n" } else { b"NOT_FOUND\r\n" })
                    .ok()
            }
        }
    }

    fn json_line(
        &self,
        number: usize,
        command: &[u8],
        words: &[Vec<u8>],
        served: u64,
        open: &mut Option<OpenTxn>,
    ) -> serde_json::Value {
        let ok = serde_json::json!({"status": "Ok"});
        let no = |mesg: &str| serde_json::json!({"status": "Error", "mesg": mesg});
        if let (Some(open), Some(key)) = (&mut *open, words.first()) {
            let again = open.checked && command == b"put";
            assert!(open.keys.insert((again, key.clone())), "a key comes twice");
            assert!(
                !again || open.keys.contains(&(false, key.clone())),
                "a key was not read"
            );
        }
        let write = match command {
            b"get" => {
                return match self.get(&words[0], served) {
                    Some(value) => serde_json::json!({"status": "Ok", "result": String::from_utf8(value).unwrap()}),
                    None => no("there is no such key"),
                };
            }
            b"start" => {
                assert!(open.is_none(), "a transaction inside another one");
                let checked = !words.is_empty();
                *open = Some(OpenTxn {
                    checked,
                    ..OpenTxn::default()
                });
                return ok;
            }
            b"commit" => {
                let OpenTxn { writes, checked, .. } = open.take().expect("no transaction is open");
                let nth = self.commits.fetch_add(1, Ordering::Relaxed) + 1;
                let changed = match self.fault {
                    Fault::CommitEvery(n, time) => {
                        std::thread::sleep(time);
                        !nth.is_multiple_of(n)
                    }
                    Fault::Starve => number == 0,
                    _ => false,
                };
                if self.fault == Fault::Refuse {
                    return no("the server's memory limit is reached: nothing was applied");
                }
                if changed && checked {
                    return no("a key that was read has changed: nothing was applied");
                }
                let mut values = self.values.lock().unwrap();
                for (key, value) in writes {
                    match value {
                        Some(value) => values.insert(key, value),
                        None => values.remove(&key),
                    };
                }
                return ok;
            }
            b"put" => (words[0].clone(), Some(words[1..].join(&b' '))),
            _ => (words[0].clone(), None),
        };
        match (open, write) {
            (Some(open), write) => open.writes.push(write),
            (None, (key, Some(value))) => drop(self.values.lock().unwrap().insert(key, value)),
            (None, (key, None)) => drop(self.values.lock().unwrap().remove(&key)),
        }
        ok
    }

    fn resp(&self, command: &[u8], words: &[Vec<u8>], served: u64, out: &mut impl Write) -> Option<()> {
        match command {
            b"set" if self.fault == Fault::Refuse => out.write_all(b"-OOM out of memory\r\n").ok(),
            b"set" => {
                self.values.lock().unwrap().insert(words[0].clone(), words[1].clone());
                out.write_all(b"+OK\r\n").ok()
            }
            b"del" => {
                let removed = self.values.lock().unwrap().remove(&words[0]).is_some();
                out.write_all(if removed { b":1\r\n" } else { b":0\r\n" }).ok()
            }
            _ => {
                if command == b"mget" {
                    write!(out, "*{}\r\n", words.len()).ok()?;
                }
                for key in words {
                    match self.get(key, served) {
                        Some(value) => {
                            write!(out, "${}\r\n", value.len()).ok()?;
                            out.write_all(&value).ok()?;
                            out.write_all(b"\r\n").ok()?;
                        }
                        None => out.write_all(b"$-1\r\n").ok()?,
                    }
                }
                Some(())
            }
        }
    }
}

/// A transaction that a connection has not ended.
#[derive(Default)]
struct OpenTxn {
    checked: bool,
    /// Keys and what to write to them; `None` stands for a delete.
    writes: Vec<(Vec<u8>, Option<Vec<u8>>)>,
    /// The keys of its commands; true: of the writes of an optimistic one, which has read them before.
    keys: HashSet<(bool, Vec<u8>)>,
}

/// A line without its LF or CRLF.
fn read_line(input: &mut impl BufRead) -> Option<Vec<u8>> {
    let mut line = Vec::new();
    input.read_until(b'\n', &mut line).ok()?;
    let line = line.strip_suffix(b"\n")?;
    Some(line.strip_suffix(b"\r").unwrap_or(line).to_vec())
}

/// `len` bytes and the CRLF behind them.
fn read_block(input: &mut impl Read, len: usize) -> Option<Vec<u8>> {
    let mut block = vec![0; len + 2];
    input.read_exact(&mut block).ok()?;
    block.truncate(len);
    Some(block)
}

/// The protocols of the toy server.
const ALL: [ProtocolName; 4] = [
    ProtocolName::Memcached,
    ProtocolName::Text,
    ProtocolName::Resp,
    ProtocolName::JsonLine,
];

fn config(protocol: ProtocolName, target: SocketAddr) -> RunConfig {
    RunConfig {
        protocol,
        target,
        route: false,
        connections: 4,
        pipeline: 8,
        threads: 1,
        engine: Engine::Auto,
        cpus: Vec::new(),
        ratio: "10:1:0".parse().unwrap(),
        multi_get: 1,
        multi_set: 1,
        txn: None,
        keys: 1000,
        key_size: SizeSpec::Range(4, 20),
        value_size: SizeSpec::Range(1, 3000),
        distribution: DistributionSpec::Uniform,
        preload: true,
        expires_s: 0,
        verify: VerifyValues::Full,
        warmup: Duration::from_millis(20),
        duration: Duration::from_millis(200),
        count: None,
        rate: None,
        seed: 1,
        sequence: 0,
        server_pid: Some(std::process::id()),
        interval: Duration::from_millis(100),
        timeout: Duration::from_secs(5),
        spin: false,
    }
}

fn run(config: &RunConfig) -> (Outcome, Report) {
    let outcome = driver::run(config, &mut |_| {}).unwrap();
    let report = Report::new(config, &outcome);
    (outcome, report)
}

#[test]
fn every_protocol_on_every_engine() {
    for protocol in ALL {
        for engine in [Engine::Epoll, Engine::Uring] {
            if engine == Engine::Uring && Engine::Auto.resolve() != Engine::Uring {
                continue;
            }
            let config = RunConfig {
                engine,
                threads: 2,
                ..config(protocol, Toy::start(protocol, Fault::None))
            };
            let (outcome, report) = run(&config);
            assert!(report.is_clean(), "{}", report.text());
            assert_eq!(report.hit_rate, Some(1.0), "every key was preloaded");
            assert!(outcome.operations > 100);
            let latencies = total(&outcome);
            let (gets, sets) = (latencies[0].len() as f64, latencies[1].len() as f64);
            assert_eq!(gets as u64 + sets as u64, outcome.operations);
            assert!(
                (5.0..20.0).contains(&(gets / sets)),
                "{gets} gets and {sets} sets are not 10:1"
            );
            assert!(report.server.is_some() && report.series.len() >= 2);
            assert!(report.text().contains("throughput"));
            assert!(memkv_bench::plot::svg(&report, &outcome).ends_with("</svg>\n"));
        }
    }
}

#[test]
fn deletes_and_multi_gets() {
    for protocol in [ProtocolName::Memcached, ProtocolName::Resp] {
        let config = RunConfig {
            ratio: "5:1:5".parse().unwrap(),
            multi_get: 10,
            distribution: DistributionSpec::Zipf(0.9),
            ..config(protocol, Toy::start(protocol, Fault::None))
        };
        let (outcome, report) = run(&config);
        assert!(report.is_clean(), "{}", report.text());
        let latencies = total(&outcome);
        let count = |c: Command| latencies[c as usize].len();
        assert!(count(Command::MultiGet) > 10 && count(Command::Delete) > 10 && count(Command::Get) == 0);
        assert_eq!(report.hits + report.misses, 10 * count(Command::MultiGet));
        assert!(report.misses > 0, "keys were deleted");
    }
}

fn transactions(operations: usize, checked: bool, fault: Fault) -> RunConfig {
    RunConfig {
        txn: Some(TxnSpec { operations, checked }),
        ratio: "2:2:1".parse().unwrap(),
        value_size: SizeSpec::Range(1, 200),
        ..config(ProtocolName::JsonLine, Toy::start(ProtocolName::JsonLine, fault))
    }
}

#[test]
fn transactions_are_counted() {
    // All keys there are: each of them once, and many by force where popularity is uneven.
    for (operations, keys) in [(1, 1000), (10, 1000), (50, 50)] {
        let config = RunConfig {
            keys,
            distribution: DistributionSpec::Zipf(2.0),
            count: Some(500),
            duration: Duration::from_secs(60),
            ..transactions(operations, false, Fault::None)
        };
        let (outcome, report) = run(&config);
        assert!(report.is_clean(), "{}", report.text());
        let txn = report.txn.as_ref().unwrap();
        assert_eq!((txn.committed, txn.operations), (outcome.operations, operations));
        assert!(txn.committed >= 500 && txn.retries == 0, "{}", report.text());
        assert_eq!(total(&outcome)[Command::Txn as usize].len(), txn.committed);
        let reads = (report.hits + report.misses) as f64 / (txn.committed * operations as u64) as f64;
        assert!((0.3..0.5).contains(&reads), "two operations of five are gets: {reads}");
        assert!(report.misses > 0, "keys were deleted");
        let sum: u64 = outcome.workers.iter().flat_map(|w| &w.answered).sum();
        assert_eq!(sum, txn.committed);
        assert!(report.text().contains("transactions/s"), "{}", report.text());
    }
}

#[test]
fn transactions_that_failed_are_tried_again() {
    // Half of all attempts fail, and each is one of a transaction that is committed in the end.
    let config = RunConfig {
        count: Some(200),
        duration: Duration::from_secs(60),
        ..transactions(5, true, Fault::CommitEvery(2, Duration::ZERO))
    };
    let (outcome, report) = run(&config);
    assert!(report.is_clean(), "{}", report.text());
    let txn = report.txn.as_ref().unwrap();
    assert!(txn.committed >= 200, "{}", report.text());
    // At both ends of the window attempts may be cut off from their ends.
    let edge = 2 * (config.connections * config.pipeline) as u64;
    assert!(txn.retries.abs_diff(txn.committed) <= edge, "{}", report.text());
    assert!(txn.retries_max >= 1 && report.text().contains("because a key had changed"));
    let attempts = txn.committed + txn.retries;
    assert!(report.hits.abs_diff(5 * attempts) <= 5 * edge, "{}", report.text());
    assert!(report.misses == 0 && outcome.errors.total() == 0, "{}", report.text());

    // Without --checked nothing of the kind happens.
    let (_, report) = run(&transactions(5, false, Fault::CommitEvery(2, Duration::ZERO)));
    assert!(
        report.is_clean() && report.txn.as_ref().unwrap().retries == 0,
        "{}",
        report.text()
    );
}

#[test]
fn latency_lasts_until_the_commit() {
    let time = Duration::from_millis(2);
    let (_, report) = run(&RunConfig {
        connections: 1,
        pipeline: 1,
        count: Some(20),
        duration: Duration::from_secs(60),
        ..transactions(3, true, Fault::CommitEvery(4, time))
    });
    assert!(report.is_clean(), "{}", report.text());
    let txn = report.txn.as_ref().unwrap();
    // The first one may have been on its way when the window began.
    let missing = 3 * txn.committed - txn.retries;
    assert!(
        txn.committed >= 20 && missing <= 3 && txn.retries_max == 3,
        "{}",
        report.text()
    );
    let fairness = report.per_connection;
    assert_eq!((fairness.fewest, fairness.most), (txn.committed, txn.committed));
    // No sleep is shorter than it was to be; a histogram rounds by a thousandth.
    assert!(report.commands[0].latency.min_us > 7990.0, "{}", report.text());
}

#[test]
fn starvation_is_visible() {
    let (_, report) = run(&RunConfig {
        connections: 2,
        count: Some(100),
        duration: Duration::from_secs(60),
        ..transactions(2, true, Fault::Starve)
    });
    assert!(report.is_clean(), "{}", report.text());
    let fairness = report.per_connection;
    let committed = report.txn.as_ref().unwrap().committed;
    assert!(committed >= 100, "{}", report.text());
    assert_eq!((fairness.fewest, fairness.most), (0, committed), "{}", report.text());
    assert!(report.text().contains("fairness    0 to 1"), "{}", report.text());
}

#[test]
fn wrong_values_and_refusals_in_transactions_are_counted() {
    for checked in [false, true] {
        let (outcome, report) = run(&transactions(5, checked, Fault::CorruptEvery(10)));
        assert!(outcome.errors.count(ErrorKind::WrongValue) > 10, "{}", report.text());
        let (outcome, report) = run(&transactions(5, checked, Fault::Refuse));
        let refused = outcome.errors.count(ErrorKind::Refused);
        assert!(refused > 10 && outcome.operations == 0, "{}", report.text());
        assert!(report.text().contains("memory limit"), "{}", report.text());
    }
}

#[test]
fn transactions_that_cannot_be_are_explained() {
    let nobody = SocketAddr::from((Ipv4Addr::LOCALHOST, 1));
    let base = |protocol| RunConfig {
        txn: Some(TxnSpec {
            operations: 10,
            checked: false,
        }),
        ..config(protocol, nobody)
    };
    let json = || base(ProtocolName::JsonLine);
    let of = |operations, checked| Some(TxnSpec { operations, checked });
    let empty = SizeSpec::Range(0, 10);
    for (config, words) in [
        (base(ProtocolName::Memcached), "has no transactions"),
        (base(ProtocolName::Resp), "has no transactions"),
        (base(ProtocolName::Text), "has no transactions"),
        (
            RunConfig {
                txn: of(0, false),
                ..json()
            },
            "at least 1",
        ),
        (
            RunConfig {
                txn: of(1001, false),
                ..json()
            },
            "only 1000",
        ),
        (
            RunConfig {
                txn: of(10_001, false),
                keys: 100_000,
                ..json()
            },
            "at most 10000",
        ),
        (
            RunConfig {
                txn: of(5001, true),
                keys: 100_000,
                ..base(ProtocolName::Protobuf)
            },
            "at most 5000",
        ),
        (
            RunConfig {
                route: true,
                ..base(ProtocolName::Protobuf)
            },
            "leave --route out",
        ),
        (
            RunConfig {
                multi_set: 2,
                ..base(ProtocolName::Protobuf)
            },
            "leave --multi-get and --multi-set out",
        ),
        (
            RunConfig {
                value_size: SizeSpec::Fixed(2 << 20),
                ..json()
            },
            "bytes",
        ),
        (RunConfig { multi_set: 2, ..json() }, "no multi-set"),
        (
            RunConfig {
                txn: None,
                multi_set: 2,
                ..base(ProtocolName::Memcached)
            },
            "no multi-set",
        ),
        (
            RunConfig {
                txn: None,
                multi_set: 0,
                ..base(ProtocolName::Protobuf)
            },
            "at least 1",
        ),
        (
            RunConfig {
                txn: None,
                multi_set: 10_001,
                ..base(ProtocolName::Protobuf)
            },
            "at most 10000",
        ),
        (
            RunConfig {
                txn: None,
                multi_get: 2,
                ..json()
            },
            "no multi-get",
        ),
        (
            RunConfig {
                txn: None,
                value_size: empty,
                ..json()
            },
            "no empty values",
        ),
    ] {
        // Nobody listens there, so that is what a configuration without a fault ends with.
        let message = driver::run(&config, &mut |_| {}).unwrap_err();
        assert!(message.contains(words), "{message}");
    }
    let message = driver::run(&json(), &mut |_| {}).unwrap_err();
    assert!(message.contains("check that the server is running"), "{message}");
}

#[test]
fn values_larger_than_any_buffer() {
    for engine in [Engine::Epoll, Engine::Auto] {
        let config = RunConfig {
            engine,
            value_size: SizeSpec::Fixed(1_000_000),
            keys: 20,
            pipeline: 4,
            ..config(ProtocolName::Resp, Toy::start(ProtocolName::Resp, Fault::None))
        };
        let (outcome, report) = run(&config);
        assert!(report.is_clean() && outcome.operations > 5, "{}", report.text());
    }
}

#[test]
fn a_count_ends_the_run() {
    let toy = Toy::start(ProtocolName::Memcached, Fault::None);
    let config = RunConfig {
        count: Some(2000),
        duration: Duration::from_secs(60),
        threads: 2,
        ..config(ProtocolName::Memcached, toy)
    };
    let (outcome, report) = run(&config);
    assert!(report.is_clean(), "{}", report.text());
    assert!(
        (2000..2000 + 500).contains(&outcome.operations),
        "{}",
        outcome.operations
    );
}

#[test]
fn an_open_loop_keeps_its_rate_and_counts_the_wait() {
    let base = |fault| RunConfig {
        rate: Some(2000.0),
        duration: Duration::from_secs(1),
        preload: false,
        pipeline: 64,
        ..config(ProtocolName::Memcached, Toy::start(ProtocolName::Memcached, fault))
    };
    let (outcome, report) = run(&RunConfig {
        spin: true,
        ..base(Fault::None)
    });
    assert!(report.is_clean() && report.rate_kept == Some(true), "{}", report.text());
    assert!(report.generator.spinning_cores > 0.1, "{}", report.text());
    assert!((1800..2200).contains(&outcome.operations), "{}", outcome.operations);

    // Half a second of silence in one second at an even pace: a quarter of all requests waits for 250 ms or more. A
    // closed loop would see a few slow requests only.
    let (_, report) = run(&base(Fault::SleepAt(500)));
    assert!(report.is_clean(), "{}", report.text());
    let latency = &report.commands.last().unwrap().latency;
    assert!(latency.p90_us > 200_000.0, "{latency:?}");
    assert!((400_000.0..900_000.0).contains(&latency.max_us), "{latency:?}");
}

#[test]
fn wrong_values_and_refusals_are_counted() {
    let toy = Toy::start(ProtocolName::Memcached, Fault::CorruptEvery(10));
    let (outcome, report) = run(&config(ProtocolName::Memcached, toy));
    assert!(
        outcome.errors.count(ErrorKind::WrongValue) > 10 && !report.is_clean(),
        "{}",
        report.text()
    );
    assert!(report.text().contains("wrong value"), "{}", report.text());

    let toy = Toy::start(ProtocolName::Resp, Fault::Refuse);
    let (outcome, report) = run(&config(ProtocolName::Resp, toy));
    assert!(
        outcome.errors.count(ErrorKind::Refused) >= 1000 && report.text().contains("OOM"),
        "{}",
        report.text()
    );
}

#[test]
fn a_server_that_goes_away_ends_the_run() {
    for engine in [Engine::Epoll, Engine::Auto] {
        let toy = Toy::start(ProtocolName::Memcached, Fault::DieAt(5000));
        let config = RunConfig {
            engine,
            duration: Duration::from_secs(60),
            ..config(ProtocolName::Memcached, toy)
        };
        let (outcome, report) = run(&config);
        assert_eq!(outcome.cut, Some(Cut::ServerGone));
        assert_eq!(
            outcome.errors.count(ErrorKind::Closed) + outcome.errors.count(ErrorKind::Broken),
            4
        );
        assert!(outcome.errors.count(ErrorKind::Unanswered) > 0);
        assert!(
            outcome.operations > 1000,
            "what was measured is kept: {}",
            outcome.operations
        );
        assert!(
            !report.is_clean() && report.text().contains("ENDED EARLY"),
            "{}",
            report.text()
        );
    }
}

#[test]
fn a_server_that_falls_silent_ends_the_run() {
    let toy = Toy::start(ProtocolName::Memcached, Fault::FallSilentAt(3000));
    let config = RunConfig {
        duration: Duration::from_secs(60),
        timeout: Duration::from_millis(300),
        ..config(ProtocolName::Memcached, toy)
    };
    let (outcome, report) = run(&config);
    assert_eq!(outcome.cut, Some(Cut::Stalled));
    assert_eq!(outcome.errors.count(ErrorKind::Unanswered), 4 * 8);
    assert!(!report.is_clean() && outcome.operations > 0);
}

#[test]
fn no_server_is_explained() {
    let nobody = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
        .unwrap()
        .local_addr()
        .unwrap();
    let message = driver::run(&config(ProtocolName::Text, nobody), &mut |_| {}).unwrap_err();
    assert!(message.contains("check that the server is running"), "{message}");
}

fn check(protocol: ProtocolName, fault: Fault) -> VerifyReport {
    let config = VerifyConfig {
        protocol,
        target: Toy::start(protocol, fault),
        route: false,
        clients: 100,
        rounds: 5,
        max_key: 30,
        max_value: 1000,
        printable: false,
        seed: 1,
        timeout: Duration::from_secs(5),
    };
    verify(&config).unwrap()
}

#[test]
fn verify_passes_an_honest_server() {
    for protocol in ALL {
        let report = check(protocol, Fault::None);
        assert!(report.is_clean(), "{}", report.text());
        assert_eq!((report.sets, report.gets), (500, 500));
    }
}

#[test]
fn verify_finds_what_is_wrong() {
    let report = check(ProtocolName::Memcached, Fault::CorruptEvery(7));
    assert!(report.mismatches > 0 && !report.is_clean());
    assert!(report.mismatches < report.gets);
    let report = check(ProtocolName::Text, Fault::DieAt(300));
    assert!(!report.is_clean() && report.gets < 500, "{}", report.text());
    let report = check(ProtocolName::Resp, Fault::Refuse);
    assert_eq!((report.sets, report.mismatches), (0, 500));
}

#[test]
fn servers_are_compared() {
    let specs = [ProtocolName::Memcached, ProtocolName::Resp].map(|protocol| ServerSpec {
        name: format!("toy-{}", protocol.name()),
        protocol,
        also: Vec::new(),
        command: None,
        address: Some(Toy::start(protocol, Fault::None).to_string()),
        pid: Some(std::process::id()),
        route: false,
        verify_values: None,
    });
    let servers: Vec<_> = specs.iter().map(|spec| Server::launch(spec, &[]).unwrap()).collect();
    let base = RunConfig {
        duration: Duration::from_millis(100),
        ..config(ProtocolName::Memcached, servers[0].address)
    };
    let mut plan = Plan {
        pipelines: vec![1, 4],
        rounds: 2,
        pace: Pace::Closed,
        against: None,
    };
    let mut steps = Vec::new();
    let comparison = compare(&servers, &base, &plan, &mut |step| steps.push(step.to_string())).unwrap();
    assert!(comparison.is_clean(), "{}", comparison.text());
    let rows: Vec<_> = comparison
        .rows
        .iter()
        .map(|r| (r.pipeline, r.server.as_str()))
        .collect();
    assert_eq!(
        rows,
        [
            (1, "toy-memcached"),
            (1, "toy-resp"),
            (4, "toy-memcached"),
            (4, "toy-resp")
        ]
    );
    for pair in comparison.rows.chunks(2) {
        let product = pair[0].throughput_ratio.unwrap() * pair[1].throughput_ratio.unwrap();
        assert!(
            (product - 1.0).abs() < 1e-9,
            "one is as much better as the other is worse"
        );
    }
    assert_eq!(steps.len(), 8);
    assert!(
        steps[0].contains("memcached") && steps[4].contains("resp"),
        "the order changes: {steps:?}"
    );

    plan.pace = "toy-resp:0.2".parse().unwrap();
    plan.against = Some("toy-resp".into());
    let comparison = compare(&servers, &base, &plan, &mut |_| {}).unwrap();
    assert!(comparison.is_clean(), "{}", comparison.text());
    let peaks = &comparison.rate_of.as_ref().unwrap().operations_per_second;
    for pair in comparison.rows.chunks(2) {
        let (_, peak) = peaks
            .iter()
            .find(|(pipeline, _)| *pipeline == pair[0].pipeline)
            .unwrap();
        assert!(
            pair.iter().all(|row| row.rate == Some(peak * 0.2)),
            "{}",
            comparison.text()
        );
        assert_eq!(pair[1].p99_9_ratio, Some(1.0));
    }
    // One of them has no transactions, which is said before anything runs.
    let base_txn = RunConfig {
        txn: Some(TxnSpec {
            operations: 2,
            checked: false,
        }),
        ..base.clone()
    };
    let message = compare(&servers, &base_txn, &plan, &mut |step| panic!("{step}")).unwrap_err();
    assert!(message.contains("toy-memcached: --txn 2"), "{message}");
    plan.against = Some("nobody".into());
    let message = compare(&servers, &base, &plan, &mut |_| {}).unwrap_err();
    assert!(message.contains("toy-memcached, toy-resp"), "{message}");
}

#[test]
fn a_server_started_here_ends_here() {
    // Needs a real program; where there is none, there is nothing to test.
    let Ok(spec) = known("memcached", 64) else { return };
    let server = Server::launch(&spec, &[]).unwrap();
    let (address, pid) = (server.address, server.pid.unwrap());
    assert!(std::path::Path::new(&format!("/proc/{pid}")).exists());
    server.pause();
    drop(server);
    assert!(TcpStream::connect(address).is_err());
    assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
}

#[test]
fn the_program_ends_with_the_right_code() {
    let program = |arguments: &[&str]| {
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_memkv-bench"))
            .args(arguments)
            .output()
            .unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    };
    let honest = Toy::start(ProtocolName::Text, Fault::None).to_string();
    let short = [
        "--keys",
        "500",
        "--warmup",
        "10ms",
        "--duration",
        "100ms",
        "--preload",
        "--protocol",
        "text",
    ];
    let run = |more: &[&str]| program(&[&["run"], &short[..], more].concat());

    let (code, out, err) = run(&["--target", &honest, "--json"]);
    assert_eq!((code, err.as_str()), (Some(0), ""));
    let json: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert!(json["operations_per_second"].as_f64().unwrap() > 0.0);
    assert!(json["commands"][0]["latency"]["p99_9_us"].as_f64().unwrap() > 0.0);
    assert!(json["per_connection"]["most"].as_u64() >= json["per_connection"]["fewest"].as_u64());

    let json_line = Toy::start(ProtocolName::JsonLine, Fault::CommitEvery(2, Duration::ZERO)).to_string();
    let optimistic = ["--protocol", "json-line", "--txn", "3", "--checked", "--json"];
    let enough = ["--count", "200", "--duration", "1m"];
    let (code, out, err) = program(&[&["run"], &short[..4], &enough, &optimistic, &["--target", &json_line]].concat());
    assert_eq!((code, err.as_str()), (Some(0), ""));
    let json: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert!(json["txn"]["committed"].as_u64() > Some(0) && json["txn"]["retries"].as_u64() > Some(0));
    let latency = &json["commands"][0]["latency"];
    assert!(latency["min_us"].as_f64() > Some(0.0) && latency["min_us"].as_f64() <= latency["p50_us"].as_f64());

    let dying = Toy::start(ProtocolName::Text, Fault::DieAt(100)).to_string();
    let (code, out, _) = run(&["--target", &dying]);
    assert_eq!(code, Some(2), "{out}");
    let corrupt = Toy::start(ProtocolName::Text, Fault::CorruptEvery(3)).to_string();
    let (code, out, _) = program(&["verify", "--protocol", "text", "--clients", "20", "--target", &corrupt]);
    assert_eq!(code, Some(2), "{out}");

    for (arguments, words) in [
        (vec!["--target", "nonsense"], "HOST:PORT"),
        (vec!["--target", &honest, "--ratio", "1:1:1"], "no delete"),
        (vec!["--target", &honest, "--multi-get", "4"], "no multi-get"),
        (vec!["--target", &honest, "--multi-set", "4"], "no multi-set"),
        (vec!["--target", &honest, "--txn", "4"], "no transactions"),
        (vec!["--target", &honest, "--checked"], "--txn"),
        (
            vec!["--target", &honest, "--txn", "4", "--checked", "--ratio", "1:1"],
            "--ratio",
        ),
        (vec!["--target", &honest, "--ratio", "x"], "10:1:0"),
        (vec!["--target", &honest, "--value-size", "9-1"], "backwards"),
        (vec!["--target", &honest, "--key-size", "2"], "cannot be told apart"),
        (
            vec!["--target", &honest, "--connections", "1", "--threads", "2"],
            "no more threads",
        ),
        (vec!["--target", &honest, "--cpus", "900"], "CPU"),
        (
            vec!["--target", &honest, "--server-pid", "999999999"],
            "running process",
        ),
        (vec!["--target", &honest, "--hdr", "/nonexistent/file"], "cannot write"),
    ] {
        let (code, _, err) = run(&arguments);
        assert_eq!(code, Some(1), "{arguments:?}");
        assert!(err.contains(words), "{arguments:?}: {err}");
    }
    let (code, _, err) = program(&["compare", "--with", "nonsense"]);
    assert!(code == Some(1) && err.contains("memcached, redis,"), "{err}");
    assert_eq!(program(&["--help"]).0, Some(0));
}
