//! Runs against memkv-tpc inside the test, and against the server of this package that stores nothing.

// In a test, an unwrap is the assertion.
#![allow(clippy::unwrap_used)]

use memkv::client::Client;
use memkv::config::{Config, Listen};
use memkv::protocol::Protocol;
use memkv::runtime::Server;
use memkv_bench::driver::{self, RunConfig};
use memkv_bench::echo;
use memkv_bench::io::Engine;
use memkv_bench::protocol::ProtocolName;
use memkv_bench::report::Report;
use memkv_bench::verify::{VerifyConfig, VerifyReport, verify};
use memkv_bench::worker::VerifyValues;
use memkv_bench::workload::{DistributionSpec, SizeSpec, TxnSpec};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::time::Duration;

/// The server, and where it speaks protobuf.
fn server(core_ports: Option<u16>) -> (Server, SocketAddr) {
    let server = Server::start(Config {
        cores: Some(2),
        memcached: Listen::Off,
        text: Some(Listen::Off),
        protobuf: "127.0.0.1:0".parse().unwrap(),
        json_line: "127.0.0.1:0".parse().unwrap(),
        http: "127.0.0.1:0".parse().unwrap(),
        grpc: "127.0.0.1:0".parse().unwrap(),
        core_ports,
        ..Config::default()
    })
    .unwrap();
    let address = server.address(Protocol::Protobuf).unwrap();
    (server, address)
}

/// Requests so far about keys of the core that received them, and about those of others.
fn local_and_forwarded(address: SocketAddr) -> (u64, u64) {
    let report = Client::connect(address).unwrap().metrics().unwrap();
    let count = |forwarded| {
        let keys = |l: &&memkv::proto::Latency| l.forwarded == forwarded && l.command != "other";
        report.latencies.iter().filter(keys).map(|l| l.count).sum()
    };
    (count(false), count(true))
}

fn config(protocol: ProtocolName, target: SocketAddr) -> RunConfig {
    RunConfig {
        protocol,
        target,
        route: false,
        connections: 7,
        pipeline: 8,
        threads: 3,
        engine: Engine::Auto,
        cpus: Vec::new(),
        ratio: "10:2:0".parse().unwrap(),
        multi_get: 1,
        multi_set: 1,
        txn: None,
        keys: 2000,
        key_size: SizeSpec::Range(4, 20),
        value_size: SizeSpec::Range(0, 3000),
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
        server_pid: None,
        interval: Duration::from_millis(100),
        timeout: Duration::from_secs(5),
        spin: false,
    }
}

fn run(config: &RunConfig) -> Report {
    let outcome = driver::run(config, &mut |_| {}).unwrap();
    Report::new(config, &outcome)
}

fn check(protocol: ProtocolName, target: SocketAddr, route: bool) -> Result<VerifyReport, String> {
    verify(&VerifyConfig {
        protocol,
        target,
        route,
        clients: 50,
        rounds: 5,
        max_key: 30,
        max_value: 1000,
        printable: false,
        seed: 1,
        timeout: Duration::from_secs(5),
    })
}

#[test]
fn routed_requests_reach_the_owner() {
    let (server, address) = server(Some(0));
    let zipf = DistributionSpec::Zipf(0.99);
    for (distribution, multi_get, rate) in [
        (DistributionSpec::Uniform, 1, None),
        (DistributionSpec::Uniform, 10, None),
        (zipf, 5, Some(5000.0)),
    ] {
        let report = run(&RunConfig {
            route: true,
            distribution,
            multi_get,
            rate,
            ..config(ProtocolName::Protobuf, address)
        });
        assert!(report.is_clean() && report.operations > 100, "{}", report.text());
        assert_eq!(report.hit_rate, Some(1.0), "every key was preloaded: {}", report.text());
        assert!(report.workload.contains("owns its key"));
    }
    let report = check(ProtocolName::Protobuf, address, true).unwrap();
    assert!(report.is_clean() && report.gets == 250, "{}", report.text());
    let (local, forwarded) = local_and_forwarded(address);
    assert!(
        local > 6000 && forwarded == 0,
        "{local} local and {forwarded} forwarded"
    );

    let report = run(&RunConfig {
        ratio: "5:1:2".parse().unwrap(),
        ..config(ProtocolName::Protobuf, address)
    });
    assert!(report.is_clean() && report.misses > 0, "{}", report.text());
    assert!(
        local_and_forwarded(address).1 > 100,
        "without routes half of all is forwarded"
    );
    server.stop();
}

#[test]
fn what_cannot_be_routed_is_explained() {
    let (server, address) = server(None);
    let checked = |route| check(ProtocolName::Protobuf, address, route);
    assert!(checked(false).unwrap().is_clean());
    assert!(checked(true).unwrap_err().contains("--core-ports BASE"));
    let routed = |protocol, target| {
        let config = RunConfig {
            route: true,
            ..config(protocol, target)
        };
        driver::run(&config, &mut |_| {}).unwrap_err()
    };
    assert!(routed(ProtocolName::Memcached, address).contains("--protocol protobuf"));
    assert!(routed(ProtocolName::Protobuf, address).contains("--core-ports BASE"));
    server.stop();
    assert!(routed(ProtocolName::Protobuf, address).contains("cannot ask"));
}

#[test]
fn routed_connections_reach_all_cores() {
    let (server, address) = server(Some(0));
    let few = RunConfig {
        route: true,
        connections: 1,
        threads: 1,
        ..config(ProtocolName::Protobuf, address)
    };
    let message = driver::run(&few, &mut |_| {}).unwrap_err();
    assert!(message.contains("at least one for each"), "{message}");
    // A single key has a single owner, so one connection is enough.
    let report = run(&RunConfig { keys: 1, ..few });
    assert!(report.is_clean() && report.operations > 10, "{}", report.text());
    server.stop();
}

/// Keys and values of a size that all of the server's protocols take.
fn small(protocol: ProtocolName, target: SocketAddr) -> RunConfig {
    RunConfig {
        value_size: SizeSpec::Range(1, 300),
        ..config(protocol, target)
    }
}

#[test]
fn json_line_gets_what_it_wrote() {
    let (server, _) = server(None);
    let address = server.address(Protocol::JsonLine).unwrap();
    // Values of all kinds of characters, which the replies escape.
    let report = check(ProtocolName::JsonLine, address, false).unwrap();
    assert!(report.is_clean() && report.gets == 250, "{}", report.text());
    let report = run(&RunConfig {
        ratio: "5:2:1".parse().unwrap(),
        ..small(ProtocolName::JsonLine, address)
    });
    assert!(report.is_clean() && report.operations > 100, "{}", report.text());
    assert!(report.hits > 0 && report.misses > 0, "{}", report.text());
    server.stop();
}

#[test]
fn http_and_grpc_get_what_they_wrote() {
    let (server, _) = server(None);
    for (protocol, own) in [
        (ProtocolName::Http, Protocol::Http),
        (ProtocolName::Grpc, Protocol::Grpc),
    ] {
        let address = server.address(own).unwrap();
        // Keys and values of any bytes.
        let report = check(protocol, address, false).unwrap();
        assert!(report.is_clean() && report.gets == 250, "{}", report.text());
        for engine in [Engine::Epoll, Engine::Auto] {
            for pipeline in [1, 8, 200] {
                let report = run(&RunConfig {
                    ratio: "5:2:1".parse().unwrap(),
                    engine,
                    pipeline,
                    ..config(protocol, address)
                });
                assert!(report.is_clean() && report.operations > 50, "{}", report.text());
                assert!(report.hits > 0 && report.misses > 0, "{}", report.text());
            }
        }
        // Larger than the window of a stream, and than any frame.
        let report = run(&RunConfig {
            value_size: SizeSpec::Fixed(300_000),
            keys: 50,
            ..config(protocol, address)
        });
        assert!(report.is_clean() && report.hit_rate == Some(1.0), "{}", report.text());
    }
    server.stop();
}

#[test]
fn several_entries_are_set_at_once() {
    let (server, address) = server(Some(0));
    let mut written = 0;
    for route in [false, true] {
        let report = run(&RunConfig {
            ratio: "0:1:0".parse().unwrap(),
            multi_set: 10,
            preload: false,
            expires_s: 0,
            route,
            ..small(ProtocolName::Protobuf, address)
        });
        assert!(report.is_clean() && report.operations > 10, "{}", report.text());
        assert_eq!(report.commands[0].command, "multi-set");
        let counters = Client::connect(address).unwrap().metrics().unwrap().counters;
        let now = counters["items_written"];
        assert!(now - written >= 10 * report.operations, "{}", report.text());
        written = now;
        // Those with the keys of one core are requests for several keys, too.
        assert!(
            report.server_txns.unwrap().txns >= report.operations,
            "{}",
            report.text()
        );
    }
    // What they wrote is what belongs to the keys.
    let report = run(&RunConfig {
        preload: false,
        expires_s: 0,
        ..small(ProtocolName::Protobuf, address)
    });
    assert!(report.is_clean() && report.hits > 0, "{}", report.text());
    assert_eq!(report.server_txns, None, "nothing is asked for several keys");
    server.stop();
}

#[test]
fn transactions_are_committed() {
    let (server, protobuf) = server(None);
    let json_line = server.address(Protocol::JsonLine).unwrap();
    for (protocol, address) in [(ProtocolName::Protobuf, protobuf), (ProtocolName::JsonLine, json_line)] {
        for (operations, checked, rate) in [
            (1, false, None),
            (8, false, None),
            (8, false, Some(1000.0)),
            (8, true, None),
        ] {
            let report = run(&RunConfig {
                ratio: "3:3:1".parse().unwrap(),
                txn: Some(TxnSpec { operations, checked }),
                rate,
                count: Some(200),
                duration: Duration::from_secs(60),
                ..small(protocol, address)
            });
            assert!(report.is_clean() && report.hits > 0, "{}", report.text());
            let txn = report.txn.as_ref().unwrap();
            assert!(
                txn.committed >= 200 && txn.committed == report.operations,
                "{}",
                report.text()
            );
            assert!(checked || txn.retries == 0, "{}", report.text());
            match report.server_txns {
                Some(counts) => assert!(counts.txns >= txn.committed, "{}", report.text()),
                None => assert_eq!(protocol, ProtocolName::JsonLine, "{}", report.text()),
            }
        }
    }
    server.stop();
}

/// Two transactions at once on the same keys of one connection: between the reads and the writes of one, something of the
/// other is executed, so one of them fails each time.
#[test]
fn transactions_on_the_same_keys_are_tried_again() {
    let (server, address) = server(None);
    let report = run(&RunConfig {
        txn: Some(TxnSpec {
            operations: 4,
            checked: true,
        }),
        keys: 4,
        connections: 1,
        threads: 1,
        pipeline: 2,
        preload: false,
        expires_s: 0,
        count: Some(200),
        duration: Duration::from_secs(60),
        ..small(ProtocolName::Protobuf, address)
    });
    assert!(report.is_clean(), "{}", report.text());
    let txn = report.txn.as_ref().unwrap();
    assert!(
        txn.committed >= 200 && txn.retries > 10 && txn.retries_max > 0,
        "{}",
        report.text()
    );
    // Their attempts are not the server's: nothing that was asked of it had to start over.
    assert_eq!(report.server_txns.unwrap().txn_retries, 0, "{}", report.text());
    server.stop();
}

/// Serves values of this size while `test` runs, then asks the server to stop.
fn with_echo(value_size: usize, test: impl FnOnce(SocketAddr)) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let thread = std::thread::spawn(move || echo::run(listener, value_size, theirs.as_fd()));
    test(address);
    ours.write_all(b".").unwrap();
    thread.join().unwrap().unwrap();
    assert!(TcpStream::connect(address).is_err());
}

#[test]
fn the_echo_answers_the_generator() {
    with_echo(100, |address| {
        for multi_get in [1, 10] {
            let report = run(&RunConfig {
                verify: VerifyValues::Off,
                multi_get,
                ..config(ProtocolName::Memcached, address)
            });
            assert!(report.is_clean() && report.hit_rate == Some(1.0), "{}", report.text());
        }
        let report = run(&config(ProtocolName::Memcached, address));
        assert!(!report.is_clean(), "its values are not those that were written");
    });
}

#[test]
fn the_echo_stands_slow_rude_and_busy_clients() {
    const SIZE: usize = 1 << 20;
    with_echo(SIZE, |address| {
        let one = SIZE + format!("VALUE k 0 {SIZE}\r\n\r\nEND\r\n").len();
        // Thirty megabytes do not fit into the buffers of a socket, so sends are cut short. The client has said all it will
        // say before it reads.
        let mut slow = TcpStream::connect(address).unwrap();
        slow.write_all(&b"get k\r\n".repeat(30)).unwrap();
        slow.shutdown(Shutdown::Write).unwrap();
        // Ends while replies are on their way to it.
        let mut rude = TcpStream::connect(address).unwrap();
        rude.write_all(&b"get k\r\n".repeat(30)).unwrap();
        rude.read_exact(&mut [0; 100]).unwrap();
        drop(rude);
        // Never reads, and asks for more than is kept for it.
        let mut greedy = TcpStream::connect(address).unwrap();
        let _ = greedy.write_all(&b"get k\r\n".repeat(200));
        greedy.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let mut sink = vec![0; one];
        let end = (0..200).find(|_| greedy.read_exact(&mut sink).is_err());
        assert!(end.is_some_and(|whole| whole < 200), "it was cut off");

        std::thread::sleep(Duration::from_millis(100));
        let mut all = Vec::new();
        slow.read_to_end(&mut all).unwrap();
        assert_eq!(all.len(), 30 * one);
        assert!(
            all.chunks(one)
                .all(|reply| reply.starts_with(b"VALUE k 0 ") && reply.ends_with(b"v\r\nEND\r\n"))
        );
        // Stopping does not wait for a client that does not read.
        let mut stuck = TcpStream::connect(address).unwrap();
        stuck.write_all(&b"get k\r\n".repeat(30)).unwrap();
        stuck.read_exact(&mut [0; 1]).unwrap();
        std::mem::forget(stuck);
    });
}

#[test]
fn the_echo_program_ends_when_asked() {
    for signal in ["TERM", "INT"] {
        let mut child = Command::new(env!("CARGO_BIN_EXE_memkv-bench"))
            .args(["echo", "--listen", "127.0.0.1:0", "--value-size", "5"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = String::new();
        let mut stdout = child.stdout.take().unwrap();
        while !said.ends_with('\n') {
            let mut byte = [0];
            stdout.read_exact(&mut byte).unwrap();
            said.push(char::from(byte[0]));
        }
        let address = said.trim().strip_prefix("listening on ").unwrap();
        let mut client = TcpStream::connect(address).unwrap();
        client.write_all(b"get a\r\n").unwrap();
        let mut reply = [0; 25];
        client.read_exact(&mut reply).unwrap();
        assert_eq!(&reply, b"VALUE a 0 5\r\nvvvvv\r\nEND\r\n");
        let kill = Command::new("kill")
            .args([format!("-{signal}"), child.id().to_string()])
            .status();
        assert!(kill.unwrap().success());
        assert!(child.wait().unwrap().success());
    }
}
