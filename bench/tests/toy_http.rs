//! Runs over HTTP/1.1 and gRPC against servers inside the test, which can be told to misbehave. The HTTP/2 of the second is
//! another's work.

// In a test, and in what only tests use, an unwrap is the assertion.
#![allow(clippy::unwrap_used)]

use bytes::Bytes;
use h2::server::SendResponse;
use h2::{Reason, RecvStream};
use memkv_bench::compare::{Pace, Plan, compare};
use memkv_bench::driver::{self, Cut, Outcome, RunConfig};
use memkv_bench::io::Engine;
use memkv_bench::protocol::ProtocolName;
use memkv_bench::report::Report;
use memkv_bench::servers::{Server, ServerSpec};
use memkv_bench::stats::ErrorKind;
use memkv_bench::verify::{VerifyConfig, VerifyReport, verify};
use memkv_bench::worker::VerifyValues;
use memkv_bench::workload::{DistributionSpec, SizeSpec};
use prost::Message;
use std::collections::HashMap;
use std::io::{BufRead, BufReader, BufWriter, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// What a toy server does wrong, or otherwise than most.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Way {
    Straight,
    /// HTTP: some responses come in chunks, and each comes in many small pieces. gRPC: what was asked later may be answered
    /// earlier, and the server takes little at a time.
    Odd,
    /// Changes the first byte of every n-th value it reads back.
    CorruptEvery(u64),
    /// Refuses every write.
    Refuse,
    /// Answers every n-th request with something that is no answer to it.
    NonsenseEvery(u64),
    /// Closes the connection at this request, after saying so where there are words for it.
    CloseAt(u64),
    /// Refuses a write to a key that there is.
    WriteOnce,
    /// gRPC: does not do what every n-th request asks for.
    ResetEvery(u64),
}

struct Store {
    way: Way,
    served: AtomicU64,
    values: Mutex<HashMap<Vec<u8>, Vec<u8>>>,
}

impl Store {
    fn new(way: Way) -> Arc<Self> {
        Arc::new(Store {
            way,
            served: AtomicU64::new(0),
            values: Mutex::default(),
        })
    }

    fn next(&self) -> u64 {
        self.served.fetch_add(1, Ordering::Relaxed) + 1
    }

    fn get(&self, key: &[u8], served: u64) -> Option<Vec<u8>> {
        let mut value = self.values.lock().unwrap().get(key).cloned()?;
        if matches!(self.way, Way::CorruptEvery(n) if served.is_multiple_of(n)) {
            value[0] ^= 1;
        }
        Some(value)
    }

    /// Whether the key is new; `None` when the write is refused.
    fn put(&self, key: Vec<u8>, value: Vec<u8>) -> Option<bool> {
        let mut values = self.values.lock().unwrap();
        match self.way {
            Way::Refuse => None,
            Way::WriteOnce if values.contains_key(&key) => None,
            _ => Some(values.insert(key, value).is_none()),
        }
    }

    fn delete(&self, key: &[u8]) -> bool {
        self.values.lock().unwrap().remove(key).is_some()
    }
}

fn start(protocol: ProtocolName, way: Way) -> SocketAddr {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    let store = Store::new(way);
    std::thread::spawn(move || serve(protocol, &store, listener));
    address
}

fn serve(protocol: ProtocolName, store: &Arc<Store>, listener: TcpListener) {
    if protocol == ProtocolName::Grpc {
        return serve_grpc(store, listener);
    }
    for socket in listener.incoming().flatten() {
        let store = store.clone();
        std::thread::spawn(move || serve_http(&store, socket));
    }
}

/// Serves one connection until either side is done with it.
fn serve_http(store: &Store, socket: TcpStream) -> Option<()> {
    socket.set_nodelay(true).unwrap();
    let mut input = BufReader::new(socket.try_clone().unwrap());
    let mut out = BufWriter::new(socket);
    let mut line = String::new();
    loop {
        if input.buffer().is_empty() {
            out.flush().ok()?;
        }
        line.clear();
        input.read_line(&mut line).ok().filter(|&n| n > 0)?;
        let [method, path, "HTTP/1.1"] = line.split_whitespace().collect::<Vec<_>>()[..] else {
            panic!("{line:?} is no request");
        };
        let (method, key) = (method.to_string(), decoded(path.strip_prefix("/keys/").unwrap()));
        let (mut len, mut hosts) = (0, 0);
        loop {
            line.clear();
            input.read_line(&mut line).ok().filter(|&n| n > 0)?;
            let Some((name, value)) = line.trim_end().split_once(": ") else {
                break;
            };
            match name {
                "Content-Length" => len = value.parse().unwrap(),
                "Host" => hosts += 1,
                _ => panic!("{line:?} is not expected"),
            }
        }
        assert_eq!(hosts, 1);
        let mut body = vec![0; len];
        input.read_exact(&mut body).ok()?;
        let served = store.next();
        match store.way {
            Way::CloseAt(n) if served >= n => return None,
            Way::NonsenseEvery(n) if served.is_multiple_of(n) => {
                out.write_all(b"SERVED\r\n").ok()?;
                continue;
            }
            _ => {}
        }
        let (status, body) = match method.as_str() {
            "GET" => match store.get(&key, served) {
                Some(value) => ("200 OK", value),
                None => ("404 Not Found", b"there is no such key\n".to_vec()),
            },
            "PUT" => match store.put(key, body) {
                None => ("507 Insufficient Storage", vec![]),
                Some(true) => ("201 Created", vec![]),
                Some(false) => ("204 No Content", vec![]),
            },
            _ => match store.delete(&key) {
                true => ("200 OK", b"gone\n".to_vec()),
                false => ("404 Not Found", vec![]),
            },
        };
        respond(store.way, served, status, &body, &mut out).ok()?;
    }
}

fn respond(way: Way, served: u64, status: &str, body: &[u8], out: &mut impl Write) -> std::io::Result<()> {
    let mut bytes = format!("HTTP/1.1 {status}\r\nDate: Thu, 01 Jan 1970 00:00:00 GMT\r\n").into_bytes();
    if way == Way::Odd && served.is_multiple_of(2) && !status.starts_with("204") {
        bytes.extend_from_slice(b"Transfer-Encoding: chunked\r\n\r\n");
        // One chunk, or several.
        let size = if served.is_multiple_of(4) {
            body.len().max(1)
        } else {
            100
        };
        for chunk in body.chunks(size) {
            bytes.extend_from_slice(format!("{:x}\r\n", chunk.len()).as_bytes());
            bytes.extend_from_slice(chunk);
            bytes.extend_from_slice(b"\r\n");
        }
        bytes.extend_from_slice(b"0\r\n\r\n");
    } else {
        if !status.starts_with("204") {
            bytes.extend_from_slice(format!("content-length: {}\r\n", body.len()).as_bytes());
        }
        bytes.extend_from_slice(b"\r\n");
        bytes.extend_from_slice(body);
    }
    if way != Way::Odd {
        return out.write_all(&bytes);
    }
    for piece in bytes.chunks(1 + (served % 97) as usize) {
        out.write_all(piece)?;
        out.flush()?;
    }
    Ok(())
}

fn decoded(segment: &str) -> Vec<u8> {
    let (mut bytes, mut rest) = (Vec::new(), segment.as_bytes());
    while let [first, behind @ ..] = rest {
        rest = behind;
        if *first == b'%' {
            let hex = std::str::from_utf8(&rest[..2]).unwrap();
            bytes.push(u8::from_str_radix(hex, 16).unwrap());
            rest = &rest[2..];
        } else {
            assert!(first.is_ascii_alphanumeric() || b"-._~".contains(first));
            bytes.push(*first);
        }
    }
    bytes
}

/// All requests: those about a key alone have no value.
#[derive(Clone, PartialEq, prost::Message)]
struct Request {
    #[prost(bytes = "vec", tag = "1")]
    key: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    value: Vec<u8>,
}

/// All responses, whose first field says what became of the key.
#[derive(Clone, PartialEq, prost::Message)]
struct Response {
    #[prost(bool, tag = "1")]
    happened: bool,
    #[prost(bytes = "vec", tag = "2")]
    value: Vec<u8>,
}

fn serve_grpc(store: &Arc<Store>, listener: TcpListener) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()
        .unwrap();
    let tasks = tokio::task::LocalSet::new();
    tasks.block_on(&runtime, async {
        listener.set_nonblocking(true).unwrap();
        let listener = tokio::net::TcpListener::from_std(listener).unwrap();
        while let Ok((socket, _)) = listener.accept().await {
            tokio::task::spawn_local(serve_connection(store.clone(), socket));
        }
    });
}

async fn serve_connection(store: Arc<Store>, socket: tokio::net::TcpStream) {
    socket.set_nodelay(true).unwrap();
    let mut builder = h2::server::Builder::new();
    if store.way == Way::Odd {
        builder.max_concurrent_streams(3).initial_window_size(700);
    }
    let Ok(mut connection) = builder.handshake::<_, Bytes>(socket).await else {
        return;
    };
    while let Some(Ok((request, respond))) = connection.accept().await {
        let served = store.next();
        if matches!(store.way, Way::CloseAt(n) if served >= n) {
            connection.abrupt_shutdown(Reason::ENHANCE_YOUR_CALM);
            continue;
        }
        tokio::task::spawn_local(serve_call(store.clone(), served, request, respond));
    }
}

async fn serve_call(
    store: Arc<Store>,
    served: u64,
    request: http::Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
) -> Option<()> {
    assert_eq!(request.method(), "POST");
    assert_eq!(request.headers()["content-type"], "application/grpc");
    assert_eq!(request.headers()["te"], "trailers");
    let method = request.uri().path().strip_prefix("/memkv.KV/").unwrap().to_string();
    let mut stream = request.into_body();
    let mut body = Vec::new();
    while let Some(data) = stream.data().await {
        let data = data.ok()?;
        body.extend_from_slice(&data);
        stream.flow_control().release_capacity(data.len()).unwrap();
    }
    let (prefix, message) = body.split_first_chunk::<5>().unwrap();
    assert_eq!(
        *prefix,
        (message.len() as u64).to_be_bytes()[3..],
        "a plain message of this length"
    );
    let request = Request::decode(message).unwrap();
    if matches!(store.way, Way::ResetEvery(n) if served.is_multiple_of(n)) {
        respond.send_reset(Reason::REFUSED_STREAM);
        return None;
    }
    let mut response = Response::default();
    let head = http::Response::builder().header("content-type", "application/grpc");
    match method.as_str() {
        "Get" => {
            let found = store.get(&request.key, served);
            response.happened = found.is_some();
            response.value = found.unwrap_or_default();
        }
        "Put" => match store.put(request.key, request.value) {
            Some(new) => response.happened = new,
            None => {
                let head = head.header("grpc-status", "8").header("grpc-message", "out of memory");
                respond.send_response(head.body(()).unwrap(), true).ok()?;
                return None;
            }
        },
        "Delete" => response.happened = store.delete(&request.key),
        _ => panic!("{method} is not expected"),
    }
    if store.way == Way::Odd {
        for _ in 0..served % 5 {
            tokio::task::yield_now().await;
        }
    }
    let message = match store.way {
        Way::NonsenseEvery(n) if served.is_multiple_of(n) => b"\x0fnonsense".to_vec(),
        _ => response.encode_to_vec(),
    };
    let mut body = vec![0];
    body.extend_from_slice(&(message.len() as u32).to_be_bytes());
    body.extend_from_slice(&message);
    let mut stream = respond.send_response(head.body(()).unwrap(), false).ok()?;
    stream.send_data(body.into(), false).ok()?;
    let mut trailers = http::HeaderMap::new();
    trailers.insert("grpc-status", http::HeaderValue::from_static("0"));
    stream.send_trailers(trailers).ok()
}

const BOTH: [ProtocolName; 2] = [ProtocolName::Http, ProtocolName::Grpc];

fn config(protocol: ProtocolName, way: Way) -> RunConfig {
    RunConfig {
        protocol,
        target: start(protocol, way),
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
        keys: 500,
        key_size: SizeSpec::Range(4, 20),
        value_size: SizeSpec::Range(1, 3000),
        distribution: DistributionSpec::Uniform,
        preload: true,
        expires_s: 0,
        verify: VerifyValues::Full,
        warmup: Duration::ZERO,
        duration: Duration::from_secs(60),
        count: Some(2000),
        rate: None,
        seed: 1,
        sequence: 0,
        server_pid: None,
        interval: Duration::from_millis(100),
        timeout: Duration::from_secs(20),
        spin: false,
    }
}

fn run(config: &RunConfig) -> (Outcome, Report) {
    let outcome = driver::run(config, &mut |_| {}).unwrap();
    let report = Report::new(config, &outcome);
    (outcome, report)
}

#[test]
fn what_was_written_is_found() {
    for protocol in BOTH {
        for way in [Way::Straight, Way::Odd] {
            for (engine, pipeline) in [(Engine::Epoll, 1), (Engine::Auto, 8), (Engine::Auto, 100)] {
                let (outcome, report) = run(&RunConfig {
                    engine,
                    pipeline,
                    threads: 2,
                    ..config(protocol, way)
                });
                assert!(report.is_clean(), "{way:?}: {}", report.text());
                assert_eq!(report.hit_rate, Some(1.0), "every key was preloaded");
                assert!(outcome.operations >= 2000);
            }
        }
    }
}

#[test]
fn deletes_misses_and_an_open_loop() {
    for protocol in BOTH {
        let (_, report) = run(&RunConfig {
            ratio: "5:1:5".parse().unwrap(),
            rate: Some(20_000.0),
            ..config(protocol, Way::Odd)
        });
        assert!(
            report.is_clean() && report.hits > 0 && report.misses > 0,
            "{}",
            report.text()
        );
        let named: Vec<_> = report.commands.iter().map(|c| c.command.clone()).collect();
        assert_eq!(named, ["get", "set", "delete", "all"]);
    }
}

#[test]
fn values_larger_than_any_buffer() {
    for protocol in BOTH {
        for way in [Way::Straight, Way::Odd] {
            // A server that takes 700 bytes at a time takes long for a megabyte.
            let size = if way == Way::Odd { 100_000 } else { 1_000_000 };
            let (_, report) = run(&RunConfig {
                value_size: SizeSpec::Fixed(size),
                keys: 20,
                key_size: SizeSpec::Fixed(300),
                count: Some(50),
                ..config(protocol, way)
            });
            assert!(report.is_clean(), "{way:?}: {}", report.text());
        }
    }
}

#[test]
fn wrong_values_are_counted() {
    for protocol in BOTH {
        let (outcome, report) = run(&config(protocol, Way::CorruptEvery(10)));
        let wrong = outcome.errors.count(ErrorKind::WrongValue);
        assert!(wrong > 10 && wrong == outcome.errors.total(), "{}", report.text());
    }
}

#[test]
fn refusals_are_counted() {
    for (protocol, words) in [
        (ProtocolName::Http, "507 Insufficient Storage"),
        (ProtocolName::Grpc, "grpc-status 8: out of memory"),
    ] {
        let (outcome, report) = run(&config(protocol, Way::Refuse));
        assert!(outcome.errors.count(ErrorKind::Refused) >= 500, "{}", report.text());
        assert!(report.text().contains(words), "{}", report.text());
    }
    let (outcome, report) = run(&config(ProtocolName::Grpc, Way::ResetEvery(10)));
    assert!(outcome.errors.count(ErrorKind::Refused) >= 200, "{}", report.text());
    assert!(report.text().contains("REFUSED_STREAM"), "{}", report.text());
    assert!(outcome.cut.is_none());
}

#[test]
fn nonsense_is_counted() {
    // Behind nonsense nobody knows where the next response begins.
    let (outcome, report) = run(&RunConfig {
        count: None,
        ..config(ProtocolName::Http, Way::NonsenseEvery(700))
    });
    assert_eq!(outcome.errors.count(ErrorKind::Malformed), 4, "{}", report.text());
    assert_eq!(outcome.cut, Some(Cut::ServerGone));
    // A message that is none does not keep others from being read.
    let (outcome, report) = run(&config(ProtocolName::Grpc, Way::NonsenseEvery(100)));
    let malformed = outcome.errors.count(ErrorKind::Malformed);
    assert!(
        malformed >= 20 && malformed == outcome.errors.total(),
        "{}",
        report.text()
    );
    assert_eq!(outcome.cut, None);
    // HTTP/2 is not what a server of HTTP/1.1 expects.
    let (outcome, report) = run(&RunConfig {
        target: start(ProtocolName::Grpc, Way::Straight),
        ..config(ProtocolName::Http, Way::Straight)
    });
    assert_eq!(outcome.cut, Some(Cut::ServerGone), "{}", report.text());
    assert_eq!(outcome.errors.count(ErrorKind::Malformed), 4, "{}", report.text());
}

#[test]
fn a_server_that_closes_ends_the_run() {
    for protocol in BOTH {
        let (outcome, report) = run(&config(protocol, Way::CloseAt(1500)));
        assert_eq!(outcome.cut, Some(Cut::ServerGone), "{}", report.text());
        assert!(outcome.errors.count(ErrorKind::Unanswered) > 0, "{}", report.text());
        if protocol == ProtocolName::Grpc {
            assert!(report.text().contains("GOAWAY: ENHANCE_YOUR_CALM"), "{}", report.text());
        }
    }
}

fn check(protocol: ProtocolName, way: Way) -> VerifyReport {
    let config = VerifyConfig {
        protocol,
        target: start(protocol, way),
        route: false,
        clients: 50,
        rounds: 5,
        max_key: 30,
        max_value: 2000,
        printable: false,
        seed: 1,
        timeout: Duration::from_secs(20),
    };
    verify(&config).unwrap()
}

#[test]
fn verify_passes_honest_servers_and_finds_what_is_wrong() {
    for protocol in BOTH {
        for way in [Way::Straight, Way::Odd] {
            let report = check(protocol, way);
            assert!(report.is_clean(), "{way:?}: {}", report.text());
            assert_eq!((report.sets, report.gets), (250, 250));
        }
        let report = check(protocol, Way::CorruptEvery(7));
        assert!(
            report.mismatches > 0 && report.mismatches < report.gets,
            "{}",
            report.text()
        );
        let report = check(protocol, Way::Refuse);
        assert_eq!((report.sets, report.mismatches), (0, 250), "{}", report.text());
        let report = check(protocol, Way::CloseAt(100));
        assert!(!report.is_clean() && report.gets < 250, "{}", report.text());
    }
}

/// Not a test: the process that the next one compares the protocols of.
#[test]
#[ignore = "a server, started by a test"]
fn two_protocols() {
    let listener = |name| {
        let port = std::env::var(name).ok()?.parse().unwrap();
        Some(TcpListener::bind((Ipv4Addr::LOCALHOST, port)).unwrap())
    };
    let (Some(http), Some(grpc)) = (listener("PORT"), listener("PORT_GRPC")) else {
        return;
    };
    let store = Store::new(Way::WriteOnce);
    std::thread::scope(|scope| {
        scope.spawn(|| serve(ProtocolName::Http, &store, http));
        scope.spawn(|| serve(ProtocolName::Grpc, &store, grpc));
    });
}

#[test]
fn the_protocols_of_one_process_are_compared() {
    let program = std::env::current_exe().unwrap();
    let program = program.display();
    let spec = ServerSpec {
        name: "toy".into(),
        protocol: ProtocolName::Http,
        also: vec![ProtocolName::Grpc],
        command: Some(format!(
            "env PORT={{port}} PORT_GRPC={{port-grpc}} '{program}' --ignored --exact two_protocols"
        )),
        address: None,
        pid: None,
        route: false,
        verify_values: None,
    };
    let servers = Server::launch_all(&spec, &[]).unwrap();
    assert!(servers[0].is_one_with(&servers[1]) && servers[0].address != servers[1].address);
    let base = RunConfig {
        // Only the preload writes, and what is written a second time is refused.
        ratio: "1:0:0".parse().unwrap(),
        count: None,
        duration: Duration::from_millis(200),
        ..config(ProtocolName::Http, Way::Straight)
    };
    let plan = Plan {
        pipelines: vec![1, 8],
        rounds: 2,
        pace: Pace::Closed,
        against: Some("toy/http".into()),
    };
    let comparison = compare(&servers, &base, &plan, &mut |_| {}).unwrap();
    assert!(comparison.is_clean(), "{}", comparison.text());
    let rows: Vec<_> = comparison
        .rows
        .iter()
        .map(|row| (row.pipeline, &*row.server, row.protocol))
        .collect();
    let expected = [1, 8].map(|pipeline| [(pipeline, "toy/http", "http"), (pipeline, "toy/grpc", "grpc")]);
    assert_eq!(rows, expected.concat());
    for pair in comparison.rows.chunks(2) {
        assert_eq!(pair[0].cpu_ratio, Some(1.0), "{}", comparison.text());
        assert!(
            pair[1].cpu_ratio.is_some_and(|ratio| ratio > 0.0),
            "{}",
            comparison.text()
        );
    }
    // What one protocol wrote is there for the other.
    for server in &servers {
        server.resume();
        let (_, report) = run(&RunConfig {
            protocol: server.protocol,
            target: server.address,
            preload: false,
            ..base.clone()
        });
        assert!(report.is_clean() && report.hit_rate == Some(1.0), "{}", report.text());
    }
    let addresses: Vec<_> = servers.iter().map(|server| server.address).collect();
    drop(servers);
    assert!(addresses.iter().all(|address| TcpStream::connect(address).is_err()));
}
