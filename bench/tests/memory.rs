//! Memory compared among servers inside the test. How much it is is not judged, only what follows from it.

// In a test, an unwrap is the assertion.
#![allow(clippy::unwrap_used)]

use memkv::config::{Config, Listen};
use memkv::protocol::Protocol;
use memkv::runtime::Server;
use memkv_bench::driver::RunConfig;
use memkv_bench::io::Engine;
use memkv_bench::memory::{MemoryPlan, compare_memory, memory_mib};
use memkv_bench::protocol::ProtocolName;
use memkv_bench::servers::ServerSpec;
use memkv_bench::worker::VerifyValues;
use memkv_bench::workload::{DistributionSpec, SizeSpec};
use std::net::SocketAddr;
use std::time::Duration;

/// A server with one core and one listener, and where it listens.
fn server(protocol: Protocol, max_memory: &str) -> (Server, SocketAddr) {
    let listen = |of| match of == protocol {
        true => "127.0.0.1:0".parse().unwrap(),
        false => Listen::Off,
    };
    let mut config = Config {
        cores: Some(1),
        memcached: listen(Protocol::Memcached),
        text: Some(listen(Protocol::Text)),
        protobuf: listen(Protocol::Protobuf),
        json_line: listen(Protocol::JsonLine),
        http: Listen::Off,
        grpc: Listen::Off,
        ..Config::default()
    };
    config.limits.max_memory = Some(max_memory.parse().unwrap());
    let server = Server::start(config).unwrap();
    let address = server.address(protocol).unwrap();
    (server, address)
}

/// Keys and values of many sizes.
fn plan(keys: u64, value_size: SizeSpec) -> MemoryPlan {
    MemoryPlan {
        base: RunConfig {
            protocol: ProtocolName::Memcached,
            target: "127.0.0.1:0".parse().unwrap(),
            route: false,
            connections: 7,
            pipeline: 8,
            threads: 1,
            engine: Engine::Auto,
            cpus: Vec::new(),
            ratio: "10:2:0".parse().unwrap(),
            multi_get: 1,
            multi_set: 1,
            txn: None,
            keys,
            key_size: SizeSpec::Range(4, 20),
            value_size,
            distribution: DistributionSpec::Uniform,
            preload: false,
            expires_s: 0,
            verify: VerifyValues::Off,
            warmup: Duration::from_secs(60),
            duration: Duration::from_millis(1),
            count: None,
            rate: None,
            seed: 1,
            sequence: 0,
            server_pid: None,
            interval: Duration::from_millis(100),
            timeout: Duration::from_secs(5),
            spin: false,
        },
        server_cpus: Vec::new(),
        steady: Duration::from_millis(30),
    }
}

/// A server of this process, as a file of targets describes one that runs already.
fn spec(protocol: ProtocolName, address: SocketAddr) -> ServerSpec {
    ServerSpec {
        name: format!("own-{}", protocol.name()),
        protocol,
        also: Vec::new(),
        command: None,
        address: Some(address.to_string()),
        pid: Some(std::process::id()),
        route: false,
        verify_values: None,
    }
}

#[test]
fn memory_is_compared() {
    let (protobuf, at) = server(Protocol::Protobuf, "1g");
    let (json_line, json_line_at) = server(Protocol::JsonLine, "1g");
    let specs = [
        spec(ProtocolName::Protobuf, at),
        spec(ProtocolName::JsonLine, json_line_at),
    ];
    let plan = plan(2000, SizeSpec::Range(1, 300));
    let mut said = Vec::new();
    let comparison = compare_memory(&specs, &plan, &mut |what| said.push(what.to_owned())).unwrap();
    let text = comparison.text();
    let found: Vec<_> = comparison
        .rows
        .iter()
        .map(|row| (row.server.as_str(), row.items))
        .collect();
    assert_eq!(found, [("own-protobuf", Some(2000)), ("own-json-line", None)]);
    assert!(comparison.rows.iter().all(|row| row.sampled >= 2000), "{text}");
    // Keys of 4 to 20 and values of 1 to 300 bytes; a server and a generator in one process take far more.
    assert!((11.0..13.0).contains(&comparison.key_bytes), "{text}");
    assert!((145.0..155.0).contains(&comparison.value_bytes), "{text}");
    for row in &comparison.rows {
        let overhead = row.bytes_per_item - comparison.key_bytes - comparison.value_bytes;
        assert!(
            (row.overhead_per_item - overhead).abs() < 1e-6 && overhead > 0.0,
            "{text}"
        );
        assert!(row.growth_per_item < row.bytes_per_item, "{text}");
    }
    assert!(text.contains("own-protobuf: counts 2,000 items"), "{text}");
    assert_eq!(said.len(), 8);

    // It has them now, which is not what is to be measured.
    let message = compare_memory(&specs, &plan, &mut |_| {}).unwrap_err();
    assert!(
        message.contains("own-protobuf") && message.contains("holds 2000 items"),
        "{message}"
    );
    let unknown = ServerSpec {
        pid: None,
        ..specs[0].clone()
    };
    let message = compare_memory(&[unknown], &plan, &mut |_| {}).unwrap_err();
    assert!(message.contains("give the pid"), "{message}");
    protobuf.stop();
    json_line.stop();
}

/// A server that refuses some of the keys is not compared, and it is said why.
#[test]
fn a_server_that_is_full_has_no_memory_to_compare() {
    let (server, address) = server(Protocol::Memcached, "32m");
    let plan = plan(10_000, SizeSpec::Fixed(3000));
    assert_eq!(memory_mib(&plan.base, 4096), Ok(4096));
    assert!(memory_mib(&plan.base, 1).unwrap() > 30);
    let message = compare_memory(&[spec(ProtocolName::Memcached, address)], &plan, &mut |_| {}).unwrap_err();
    assert!(
        message.contains("refused") && message.contains("out of memory"),
        "{message}"
    );
    server.stop();
}
