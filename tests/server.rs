//! Real servers on real sockets: starting, serving many clients, limits that only sockets show, stopping.

#![allow(clippy::unwrap_used, reason = "in a test, the assertion")]

use memkv::config::{Config, Listen, PartitionerChoice};
use memkv::proto;
use memkv::protocol::Protocol;
use memkv::runtime::Server;
use prost::Message;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

fn config(cores: u16) -> Config {
    Config {
        cores: Some(cores),
        memcached: "127.0.0.1:0".parse().unwrap(),
        text: Some("127.0.0.1:0".parse().unwrap()),
        protobuf: "127.0.0.1:0".parse().unwrap(),
        json_line: "127.0.0.1:0".parse().unwrap(),
        http: "127.0.0.1:0".parse().unwrap(),
        grpc: "127.0.0.1:0".parse().unwrap(),
        ..Config::default()
    }
}

fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).unwrap();
    // A server that does not answer fails the test instead of hanging it.
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    stream
}

fn ask(stream: &mut TcpStream, request: &[u8], reply_bytes: usize) -> Vec<u8> {
    stream.write_all(request).unwrap();
    let mut reply = vec![0; reply_bytes];
    stream.read_exact(&mut reply).unwrap();
    reply
}

/// A number sequence that is different for every seed.
fn random(seed: &mut u64) -> u64 {
    *seed = seed
        .wrapping_mul(6_364_136_223_846_793_005)
        .wrapping_add(1_442_695_040_888_963_407);
    *seed >> 33
}

/// A request to write, and the answer to it.
fn set_request(protocol: Protocol, key: &str, value: &[u8]) -> (Vec<u8>, Vec<u8>) {
    let header = match protocol {
        Protocol::Memcached => format!("set {key} 0 0 {}\r\n", value.len()),
        Protocol::Text => format!("set {key} {}\r\n", value.len()),
        Protocol::JsonLine => {
            let request = format!("PUT {key} {}\n", hex(value));
            return (request.into_bytes(), b"{\"status\": \"Ok\"}\n".to_vec());
        }
        Protocol::Protobuf => {
            let entry = proto::Entry {
                key: key.into(),
                value: value.to_vec().into(),
                ..proto::Entry::default()
            };
            let entries = vec![entry];
            return protobuf(
                proto::message::Command::Set(proto::Set { entries }),
                proto::KeyResult::default(),
            );
        }
        Protocol::Http | Protocol::Grpc => unreachable!("they have tests of their own"),
    };
    let request = [header.as_bytes(), value, b"\r\n"].concat();
    (request, b"STORED\r\n".to_vec())
}

/// A request to read, and the answer to it.
fn get_request(protocol: Protocol, key: &str, value: &[u8]) -> (Vec<u8>, Vec<u8>) {
    let header = match protocol {
        Protocol::Memcached => format!("VALUE {key} 0 {}\r\n", value.len()),
        Protocol::Text => format!("VALUE {key} {} \r\n", value.len()),
        Protocol::JsonLine => {
            let expected = format!("{{\"status\": \"Ok\", \"result\": \"{}\"}}\n", hex(value));
            return (format!("GET {key}\n").into_bytes(), expected.into_bytes());
        }
        Protocol::Protobuf => {
            let keys = vec![key.into()];
            let get = proto::Get {
                keys,
                with_version: false,
            };
            let found = proto::KeyResult {
                value: value.to_vec().into(),
                ..proto::KeyResult::default()
            };
            return protobuf(proto::message::Command::Get(get), found);
        }
        Protocol::Http | Protocol::Grpc => unreachable!("they have tests of their own"),
    };
    let expected = [header.as_bytes(), value, b"\r\nEND\r\n"].concat();
    (format!("get {key}\r\n").into_bytes(), expected)
}

/// The JSON-line protocol carries text.
fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn protobuf(command: proto::message::Command, result: proto::KeyResult) -> (Vec<u8>, Vec<u8>) {
    let id = 300;
    let request = proto::Message {
        id,
        command: Some(command),
        durable: false,
    };
    let response = proto::Response {
        id,
        results: vec![result],
        ..proto::Response::default()
    };
    (
        request.encode_length_delimited_to_vec(),
        response.encode_length_delimited_to_vec(),
    )
}

/// A thousand clients at once each set a random key (to 30 bytes) and value (to 1,000 bytes), and find what they wrote.
#[test]
fn a_thousand_clients_find_what_they_wrote() {
    let server = Server::start(config(2)).unwrap();
    for protocol in [
        Protocol::Memcached,
        Protocol::Text,
        Protocol::Protobuf,
        Protocol::JsonLine,
    ] {
        let address = server.address(protocol).unwrap();
        let workers: Vec<_> = (0..20u64)
            .map(|worker| {
                std::thread::spawn(move || {
                    let mut clients: Vec<TcpStream> = (0..50).map(|_| connect(address)).collect();
                    let mut seed = worker;
                    let mut wrote = vec![];
                    // All of them set before any of them gets, so that all are open together.
                    for (number, client) in clients.iter_mut().enumerate() {
                        let length = random(&mut seed) as usize % 20;
                        let key = format!("{worker}:{number}:{}", "k".repeat(length));
                        let bytes = random(&mut seed) as usize % 1000 + 1;
                        let value: Vec<u8> = (0..bytes).map(|_| random(&mut seed) as u8).collect();
                        let (request, expected) = set_request(protocol, &key, &value);
                        assert_eq!(ask(client, &request, expected.len()), expected);
                        wrote.push((key, value));
                    }
                    for (client, (key, value)) in clients.iter_mut().zip(&wrote) {
                        let (request, expected) = get_request(protocol, key, value);
                        assert_eq!(ask(client, &request, expected.len()), expected);
                    }
                })
            })
            .collect();
        workers.into_iter().for_each(|worker| worker.join().unwrap());
    }
    server.stop();
}

/// More cores than CPUs: it works, whatever the machine has.
#[test]
fn more_cores_than_cpus() {
    let server = Server::start(config(8)).unwrap();
    let address = server.address(Protocol::Memcached).unwrap();
    let mut clients: Vec<TcpStream> = (0..16).map(|_| connect(address)).collect();
    for number in 0..400 {
        let client = &mut clients[number % 16];
        let request = format!("set key{number} 0 0 3\r\nabc\r\n");
        assert_eq!(ask(client, request.as_bytes(), 8), b"STORED\r\n");
    }
    for number in 0..400 {
        let client = &mut clients[(number + 7) % 16];
        let expected = format!("VALUE key{number} 0 3\r\nabc\r\nEND\r\n").into_bytes();
        assert_eq!(
            ask(client, format!("get key{number}\r\n").as_bytes(), expected.len()),
            expected
        );
    }
    server.stop();
}

/// Connections are spread over the cores, also when there are few.
#[test]
fn connections_are_spread() {
    let server = Server::start(config(2)).unwrap();
    let address = server.address(Protocol::Memcached).unwrap();
    let mut clients: Vec<TcpStream> = (0..4).map(|_| connect(address)).collect();
    for client in &mut clients {
        assert_eq!(ask(client, b"mn\r\n", 4), b"MN\r\n");
    }
    clients[0].write_all(b"stats cores\r\n").unwrap();
    let mut reader = BufReader::new(&clients[0]);
    let mut spread = vec![];
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        if line == "END\r\n" {
            break;
        }
        if line.contains(":connections ") {
            spread.push(line.trim().rsplit(' ').next().unwrap().parse::<u32>().unwrap());
        }
    }
    assert_eq!(spread, [2, 2]);
    server.stop();
}

/// A value of a megabyte, in both directions and across cores, while small requests go on.
#[test]
fn large_values() {
    let server = Server::start(config(2)).unwrap();
    let address = server.address(Protocol::Memcached).unwrap();
    let mut client = connect(address);
    for number in 0..20u8 {
        let value = vec![number; 1 << 20];
        let request = [
            format!("set big{number} 0 0 {}\r\n", value.len()).as_bytes(),
            &value,
            b"\r\n",
        ]
        .concat();
        assert_eq!(ask(&mut client, &request, 8), b"STORED\r\n");
    }
    let mut other = connect(address);
    for number in 0..20u8 {
        let expected = [
            format!("VALUE big{number} 0 {}\r\n", 1 << 20).as_bytes(),
            &vec![number; 1 << 20],
            b"\r\nEND\r\n",
        ]
        .concat();
        assert!(ask(&mut other, format!("get big{number}\r\n").as_bytes(), expected.len()) == expected);
    }
    server.stop();
}

/// Thousands of connections opened and dropped, some in the middle of a request: the server goes on, and forgets them.
#[test]
fn connections_opened_and_dropped() {
    let server = Server::start(config(2)).unwrap();
    let address = server.address(Protocol::Memcached).unwrap();
    for round in 0..20 {
        let clients: Vec<TcpStream> = (0..250)
            .map(|number| {
                let mut client = connect(address);
                match (round + number) % 4 {
                    0 => client.write_all(b"get a b").unwrap(),
                    1 => client.write_all(b"set big 0 0 1000000\r\nabc").unwrap(),
                    2 => client.write_all(&b"get missing\r\n".repeat(100)).unwrap(),
                    _ => {}
                }
                client
            })
            .collect();
        drop(clients);
    }
    let mut client = connect(address);
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let count = stat(&mut client, "curr_connections");
        if count == 1 {
            break;
        }
        assert!(Instant::now() < deadline, "{count} connections are still counted");
        std::thread::sleep(Duration::from_millis(50));
    }
    let [charged, index, connections] = stats(&mut client, ["bytes_charged", "hash_bytes", "bytes_connections"]);
    assert_eq!(charged, index + connections);
    server.stop();
}

fn stat(client: &mut TcpStream, name: &str) -> u64 {
    stats(client, [name])[0]
}

fn stats<const N: usize>(client: &mut TcpStream, names: [&str; N]) -> [u64; N] {
    client.write_all(b"stats\r\n").unwrap();
    let mut reader = BufReader::new(&mut *client);
    let mut found = [None; N];
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        if line == "END\r\n" {
            return found.map(Option::unwrap);
        }
        for (name, found) in names.iter().zip(&mut found) {
            if let Some(value) = line.strip_prefix(&format!("STAT {name} ")) {
                *found = value.trim().parse().ok();
            }
        }
    }
}

/// One connection more than the limit is told so; when one ends there is room again.
#[test]
fn the_limit_of_connections() {
    let mut config = config(2);
    config.limits.connections_max = 3;
    let server = Server::start(config).unwrap();
    let address = server.address(Protocol::Memcached).unwrap();
    let mut clients: Vec<TcpStream> = (0..3).map(|_| connect(address)).collect();
    for client in &mut clients {
        assert_eq!(ask(client, b"mn\r\n", 4), b"MN\r\n");
    }
    let mut said = String::new();
    connect(address).read_to_string(&mut said).unwrap();
    assert_eq!(said, "ERROR Too many open connections\r\n");
    clients.pop();
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let mut client = connect(address);
        let mut reply = [0; 4];
        if client.write_all(b"mn\r\n").is_ok() && client.read_exact(&mut reply).is_ok() && &reply == b"MN\r\n" {
            break;
        }
        assert!(Instant::now() < deadline, "there is no room again");
    }
    server.stop();
}

/// A silent connection is closed after the idle time, and one that speaks is not.
#[test]
fn idle_connections_are_closed() {
    let mut config = config(1);
    config.limits.idle_timeout = Duration::from_millis(700);
    let server = Server::start(config).unwrap();
    let address = server.address(Protocol::Memcached).unwrap();
    let (mut silent, mut speaking) = (connect(address), connect(address));
    let began = Instant::now();
    while began.elapsed() < Duration::from_millis(2500) {
        assert_eq!(ask(&mut speaking, b"mn\r\n", 4), b"MN\r\n");
        std::thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(silent.read(&mut [0; 10]).unwrap(), 0);
    server.stop();
}

/// A client that asks and never reads is closed after the write time, others are served meanwhile, and its memory comes back.
#[test]
fn clients_that_do_not_read_are_closed() {
    let mut config = config(2);
    config.limits.write_timeout = Duration::from_millis(700);
    let server = Server::start(config).unwrap();
    let address = server.address(Protocol::Memcached).unwrap();
    let mut other = connect(address);
    let value = vec![b'v'; 500_000];
    let request = [&b"set big 0 0 500000\r\n"[..], &value, b"\r\n"].concat();
    assert_eq!(ask(&mut other, &request, 8), b"STORED\r\n");
    let mut deaf = connect(address);
    assert_eq!(ask(&mut deaf, b"mn\r\n", 4), b"MN\r\n");
    deaf.write_all(&b"get big\r\n".repeat(200)).unwrap();
    let deadline = Instant::now() + Duration::from_secs(15);
    while stat(&mut other, "curr_connections") > 1 {
        assert!(Instant::now() < deadline, "it is still open");
        assert_eq!(ask(&mut other, b"mn\r\n", 4), b"MN\r\n");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(stat(&mut other, "idle_kicks"), 1);
    server.stop();
}

/// A client that reads slowly, but reads, is not closed by the write time, however much it asked for.
#[test]
fn slow_readers_are_not_closed() {
    let mut config = config(1);
    config.limits.write_timeout = Duration::from_millis(600);
    config.limits.item_size_max = "32m".parse().unwrap();
    let server = Server::start(config).unwrap();
    let mut client = connect(server.address(Protocol::Memcached).unwrap());
    let value = vec![b'v'; 20 << 20];
    let header = format!("set big 0 0 {}\r\n", value.len());
    assert_eq!(
        ask(&mut client, &[header.as_bytes(), &value, b"\r\n"].concat(), 8),
        b"STORED\r\n"
    );
    client.write_all(b"get big\r\n").unwrap();
    let expected = value.len() + format!("VALUE big 0 {}\r\n\r\nEND\r\n", value.len()).len();
    let (mut read, mut room) = (0, vec![0; 1 << 18]);
    while read < expected {
        let bytes = client.read(&mut room).unwrap();
        assert!(bytes > 0, "closed after {read} of {expected} bytes");
        read += bytes;
        std::thread::sleep(Duration::from_millis(15));
    }
    server.stop();
}

/// A pipeline of requests for statistics, which all cores work for, does not keep others waiting for the whole of it.
#[test]
fn statistics_do_not_starve_others() {
    let server = Server::start(config(2)).unwrap();
    let address = server.address(Protocol::Memcached).unwrap();
    let (mut greedy, mut other) = (connect(address), connect(address));
    assert_eq!(ask(&mut other, b"mn\r\n", 4), b"MN\r\n");
    greedy.write_all(&b"stats latency\r\n".repeat(1000)).unwrap();
    greedy.write_all(b"quit\r\n").unwrap();
    for _ in 0..20 {
        assert_eq!(ask(&mut other, b"get a b c d e\r\n", 5), b"END\r\n");
    }
    let mut replies = String::new();
    greedy.read_to_string(&mut replies).unwrap();
    assert_eq!(replies.matches("END\r\n").count(), 1000);
    server.stop();
}

/// Receives that find no buffer: nothing is lost.
#[test]
fn receives_without_a_buffer() {
    let mut config = config(1);
    config.limits.receive_buffers = 2;
    let server = Server::start(config).unwrap();
    let address = server.address(Protocol::Memcached).unwrap();
    let mut clients: Vec<TcpStream> = (0..50).map(|_| connect(address)).collect();
    let requests = b"get missing\r\n".repeat(5000);
    for client in &mut clients {
        client.write_all(&requests).unwrap();
    }
    for client in &mut clients {
        let mut replies = vec![0; 5000 * 5];
        client.read_exact(&mut replies).unwrap();
        assert!(replies == b"END\r\n".repeat(5000));
    }
    assert!(
        stat(&mut clients[0], "receive_buffers_exhausted") > 0,
        "the case did not happen"
    );
    server.stop();
}

/// A client that closes its sending side still gets all its answers, then the end.
#[test]
fn half_closed_connections_are_answered() {
    for cores in [1, 2] {
        let server = Server::start(config(cores)).unwrap();
        let mut client = connect(server.address(Protocol::Memcached).unwrap());
        let requests: String = (0..1000)
            .map(|number| format!("set k{number} 0 0 1\r\nx\r\nget k{number}\r\n"))
            .collect();
        client.write_all(requests.as_bytes()).unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        let mut replies = String::new();
        client.read_to_string(&mut replies).unwrap();
        assert_eq!(replies.matches("STORED\r\n").count(), 1000);
        assert_eq!(replies.matches("END\r\n").count(), 1000);
        server.stop();
    }
}

/// What was received before a stop is answered.
#[test]
fn a_stop_answers_what_was_received() {
    let server = Server::start(config(2)).unwrap();
    let mut client = connect(server.address(Protocol::Memcached).unwrap());
    assert_eq!(ask(&mut client, b"mn\r\n", 4), b"MN\r\n");
    client
        .write_all("get missing\r\nset a 0 0 1\r\nx\r\n".repeat(200).as_bytes())
        .unwrap();
    let began = Instant::now();
    server.stop();
    assert!(began.elapsed() < Duration::from_secs(5));
    let mut replies = String::new();
    let _ = client.read_to_string(&mut replies);
    assert_eq!(replies.matches("END\r\n").count(), 200);
    assert_eq!(replies.matches("STORED\r\n").count(), 200);
}

/// A taken port, and options that do not fit, are told in one message that names them.
#[test]
fn what_does_not_fit_is_told() {
    let server = Server::start(config(1)).unwrap();
    let taken = server.address(Protocol::Memcached).unwrap();
    let second = Config {
        memcached: Listen::At(taken),
        ..config(1)
    };
    let error = Server::start(second).unwrap_err().to_string();
    assert!(
        error.contains(&taken.to_string()) && error.contains("another process"),
        "{error}"
    );
    server.stop();

    let boundaries = Config {
        partitioner: Some(PartitionerChoice::Ordered),
        boundaries: vec!["m".to_owned(), "g".to_owned()],
        shards: Some(3),
        ..config(1)
    };
    let error = Server::start(boundaries).unwrap_err().to_string();
    assert!(error.contains("'m' and 'g'"), "{error}");

    let mut little = config(2);
    little.limits.max_memory = Some("8m".parse().unwrap());
    let error = Server::start(little).unwrap_err().to_string();
    for name in ["--max-memory 8m", "2 cores", "--receive-buffers", "--item-size-max 1m"] {
        assert!(error.contains(name), "{error}");
    }

    let load = Config {
        load: Some("/nonexistent/words".into()),
        ..config(2)
    };
    let error = Server::start(load).unwrap_err().to_string();
    assert!(error.contains("/nonexistent/words"), "{error}");
}

/// Rows are loaded before the first client is served; malformed ones are counted, or end a strict start.
#[test]
fn loading_rows() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rows");
    let rows: String = (0..5000)
        .map(|number| format!("key{number} value of {number}\n"))
        .collect();
    std::fs::write(&path, format!("{rows}malformed\nkey7 the later row wins\r\n\n")).unwrap();
    for partitioner in [PartitionerChoice::Hashed, PartitionerChoice::Ordered] {
        let ordered = partitioner == PartitionerChoice::Ordered;
        let loading = Config {
            load: Some(path.clone()),
            partitioner: Some(partitioner),
            boundaries: if ordered {
                vec!["key2".to_owned(), "key5".to_owned()]
            } else {
                vec![]
            },
            ..config(3)
        };
        let server = Server::start(loading.clone()).unwrap();
        let report = server.loaded().unwrap();
        assert_eq!((report.rows, report.malformed), (5001, 1));
        let mut client = connect(server.address(Protocol::Memcached).unwrap());
        assert_eq!(stat(&mut client, "curr_items"), 5000);
        let expected = b"VALUE key7 0 18\r\nthe later row wins\r\nEND\r\n";
        assert_eq!(ask(&mut client, b"get key7\r\n", expected.len()), expected);
        let expected = b"VALUE key4999 0 13\r\nvalue of 4999\r\nEND\r\n";
        assert_eq!(ask(&mut client, b"get key4999\r\n", expected.len()), expected);
        server.stop();
        let strict = Config {
            load_strict: true,
            ..loading
        };
        let error = Server::start(strict).unwrap_err().to_string();
        assert!(error.contains("row 5001"), "{error}");
    }
}

/// While there is more to load, supervisors are told so by HTTP; when all is loaded, they are told that.
#[test]
fn health_while_loading() {
    // HTTP's answer to a request, on a connection of its own.
    let http = |address: &str, path: &str| {
        let mut stream = connect(address.parse().unwrap());
        let request = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    };
    let status = |answer: &str| answer.split(' ').nth(1).unwrap().to_owned();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rows");
    std::fs::write(&path, "a 1\nb 2\n").unwrap();
    let server = Server::start(Config {
        load: Some(path.clone()),
        ..config(2)
    })
    .unwrap();
    let address = server.address(Protocol::Http).unwrap().to_string();
    for path in ["/healthz", "/readyz", "/keys/a"] {
        assert_eq!(status(&http(&address, path)), "200", "{path}");
    }
    server.stop();

    // A row so long that nobody will ever see its end; it takes no room on the disk.
    let rows = std::fs::OpenOptions::new().append(true).open(&path).unwrap();
    rows.set_len(1 << 40).unwrap();
    let mut server = Command::new(env!("CARGO_BIN_EXE_memkv-tpc"))
        .args([
            "--cores",
            "2",
            "--memcached",
            "127.0.0.1:0",
            "--text",
            "off",
            "--protobuf",
            "off",
        ])
        .args(["--json-line", "off", "--http", "127.0.0.1:0", "--grpc", "off", "--load"])
        .arg(&path)
        .env("RUST_LOG", "info")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let log = BufReader::new(server.stderr.take().unwrap());
    let told = log
        .lines()
        .map(Result::unwrap)
        .find(|line| line.contains("/readyz"))
        .unwrap();
    let address = told.split("http://").nth(1).unwrap().split('/').next().unwrap();
    for _ in 0..3 {
        assert_eq!(status(&http(address, "/healthz")), "200");
        for path in ["/readyz", "/keys/a"] {
            let answer = http(address, path);
            assert_eq!(status(&answer), "503", "{path}");
            assert!(answer.contains("still loading"), "{answer}");
        }
        // All cores turn: each has a part in this.
        assert_eq!(status(&http(address, "/metrics")), "200");
    }
    server.kill().unwrap();
    server.wait().unwrap();
    let mut out = String::new();
    server.stdout.take().unwrap().read_to_string(&mut out).unwrap();
    assert_eq!(out, "", "it never said that it was ready");
}

/// The binary: says where it listens and when it is ready, ends with 0 on SIGTERM, with 1 when it cannot start, with 2 for
/// options that make no sense, and never with a panic.
#[test]
fn the_binary_and_its_exit_codes() {
    let run = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_memkv-tpc"));
        command.args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.env_remove("SERVER_PORT").env_remove("KV_DATA_FILE_PATH");
        command
    };
    let mut child = run(&[
        "--cores",
        "1",
        "--memcached",
        "127.0.0.1:0",
        "--text",
        "off",
        "--protobuf",
        "off",
        "--json-line",
        "off",
        "--http",
        "off",
        "--grpc",
        "off",
    ])
    .spawn()
    .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let listening = lines.next().unwrap().unwrap();
    let address: SocketAddr = listening.strip_prefix("listening memcached ").unwrap().parse().unwrap();
    assert_eq!(lines.next().unwrap().unwrap(), "ready");
    let mut client = connect(address);
    assert_eq!(ask(&mut client, b"mn\r\n", 4), b"MN\r\n");
    let taken = run(&[
        "--cores",
        "1",
        "--memcached",
        &address.to_string(),
        "--text",
        "off",
        "--protobuf",
        "off",
        "--json-line",
        "off",
        "--http",
        "off",
        "--grpc",
        "off",
    ])
    .output()
    .unwrap();
    assert_eq!(taken.status.code(), Some(1));
    let said = String::from_utf8(taken.stderr).unwrap();
    assert!(
        said.contains(&address.to_string()) && !said.contains("panicked"),
        "{said}"
    );
    let kill = Command::new("kill")
        .args(["-TERM", &child.id().to_string()])
        .status()
        .unwrap();
    assert!(kill.success());
    assert_eq!(child.wait().unwrap().code(), Some(0));

    // Out of descriptors: who is connected is served, and who waits is served when there is room again.
    let mut limited = Command::new("sh");
    limited.args([
        "-c",
        "ulimit -n 60; exec \"$0\" --cores 1 --memcached 127.0.0.1:0 --text off --protobuf off --json-line off --http off --grpc off",
    ]);
    limited
        .arg(env!("CARGO_BIN_EXE_memkv-tpc"))
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    let mut child = limited.spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let listening = lines.next().unwrap().unwrap();
    let address: SocketAddr = listening.strip_prefix("listening memcached ").unwrap().parse().unwrap();
    let mut clients: Vec<TcpStream> = (0..80).map(|_| connect(address)).collect();
    assert_eq!(ask(&mut clients[0], b"mn\r\n", 4), b"MN\r\n");
    let mut waiting = clients.split_off(60);
    drop(clients);
    for client in &mut waiting {
        assert_eq!(ask(client, b"mn\r\n", 4), b"MN\r\n");
    }
    assert!(
        Command::new("kill")
            .args(["-INT", &child.id().to_string()])
            .status()
            .unwrap()
            .success()
    );
    assert_eq!(child.wait().unwrap().code(), Some(0));

    let nonsense = run(&["--cores", "none"]).output().unwrap();
    assert_eq!(nonsense.status.code(), Some(2));
    let mut port = run(&["--memcached", "off"]);
    let port = port.env("SERVER_PORT", "none").output().unwrap();
    assert_eq!(port.status.code(), Some(1));
    assert!(
        String::from_utf8(port.stderr)
            .unwrap()
            .contains("SERVER_PORT is 'none'")
    );
}
