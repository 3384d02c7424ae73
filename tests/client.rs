//! The library's client, against real servers and against servers that misbehave.

#![allow(clippy::unwrap_used, reason = "in a test, the assertion")]

use memkv::client::{Client, Deleted, Error, Expiry, Options, Put, Written};
use memkv::config::{Config, Listen, PartitionerChoice};
use memkv::model::Condition;
use memkv::partition::Partitioner;
use memkv::proto::{self, Code, Response, message::Command};
use memkv::protocol::Protocol;
use memkv::runtime::Server;
use prost::Message;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc;
use std::time::{Duration, Instant, SystemTime};

fn config(cores: u16, core_ports: bool) -> Config {
    Config {
        cores: Some(cores),
        memcached: Listen::Off,
        text: Some(Listen::Off),
        protobuf: "127.0.0.1:0".parse().unwrap(),
        json_line: "127.0.0.1:0".parse().unwrap(),
        http: "127.0.0.1:0".parse().unwrap(),
        grpc: "127.0.0.1:0".parse().unwrap(),
        core_ports: core_ports.then_some(0),
        ..Config::default()
    }
}

fn start(config: Config) -> (Server, SocketAddr) {
    let server = Server::start(config).unwrap();
    let address = server.address(Protocol::Protobuf).unwrap();
    (server, address)
}

fn routed() -> Options {
    Options {
        route: true,
        ..Options::default()
    }
}

/// So that a test of a timeout is short.
fn hasty() -> Options {
    Options {
        timeout: Duration::from_millis(300),
        ..Options::default()
    }
}

fn value(client: &mut Client, key: &str) -> Option<Vec<u8>> {
    client.get(key).unwrap().map(|item| item.value.to_vec())
}

/// One connection to a server that is none.
struct Fake(BufReader<TcpStream>);

impl Fake {
    fn request(&mut self) -> proto::Message {
        let mut length = 0;
        for shift in (0..).step_by(7) {
            let mut byte = [0];
            self.0.read_exact(&mut byte).unwrap();
            length |= usize::from(byte[0] & 0x7f) << shift;
            if byte[0] < 0x80 {
                break;
            }
        }
        let mut message = vec![0; length];
        self.0.read_exact(&mut message).unwrap();
        proto::Message::decode(message.as_slice()).unwrap()
    }

    fn send(&mut self, bytes: &[u8]) {
        // The client may have read enough and gone.
        let _ = self.0.get_mut().write_all(bytes);
    }

    fn answer(&mut self, response: &Response) {
        self.send(&response.encode_length_delimited_to_vec());
    }

    /// Answers a request with results of these codes.
    fn results(&mut self, codes: &[i32]) -> Command {
        let request = self.request();
        let results = codes.iter().map(|code| proto::KeyResult {
            code: *code,
            ..Default::default()
        });
        self.answer(&Response {
            id: request.id,
            results: results.collect(),
            ..Default::default()
        });
        request.command.unwrap()
    }

    /// Ends when the client does.
    fn wait(&mut self) {
        let _ = self.0.fill_buf();
    }
}

type Script = Box<dyn FnOnce(&mut Fake) + Send>;

/// Carries out one script for each connection, and then closes it.
fn fake(scripts: Vec<Script>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for script in scripts {
            let (stream, _) = listener.accept().unwrap();
            let mut fake = Fake(BufReader::new(stream));
            script(&mut fake);
            let _ = fake.0.get_ref().shutdown(Shutdown::Both);
        }
    });
    address
}

/// The same, with one script for all of `count` connections.
fn fakes(count: usize, script: fn(&mut Fake)) -> SocketAddr {
    fake((0..count).map(|_| Box::new(script) as Script).collect())
}

#[track_caller]
fn expect_foreign<T: std::fmt::Debug>(result: Result<T, Error>, word: &str) {
    let error = result.unwrap_err();
    assert!(matches!(error, Error::Foreign { .. }), "{error:?}");
    assert!(error.to_string().contains(word), "{word:?} is missing in: {error}");
}

/// A program stores, reads, changes under a condition and deletes, whatever the server's cores and ports.
#[test]
fn values_come_back() {
    for (cores, core_ports, options) in [
        (1, false, Options::default()),
        (1, true, routed()),
        (2, false, Options::default()),
        (2, false, routed()),
        (2, true, Options::default()),
        (2, true, routed()),
    ] {
        let (server, address) = start(config(cores, core_ports));
        let mut client = options.connect(address).unwrap();
        client.ping().unwrap();
        for number in 0..50 {
            client.set(format!("key {number}\n"), vec![number; 10]).unwrap();
        }
        for number in 0..50 {
            assert_eq!(value(&mut client, &format!("key {number}\n")), Some(vec![number; 10]));
        }
        let keys: Vec<String> = (48..52).map(|number| format!("key {number}\n")).collect();
        let items = client.get_many(&keys).unwrap();
        let found: Vec<bool> = items.iter().map(Option::is_some).collect();
        assert_eq!(found, [true, true, false, false]);
        assert_eq!(items[1].as_ref().unwrap().value, [49; 10].as_slice());
        assert_eq!(client.delete_many(&keys).unwrap(), found);
        assert!(!client.delete(keys[0].as_str()).unwrap());
        assert_eq!(client.get_many(&[] as &[&str]).unwrap(), []);
        assert_eq!(client.set_many([]).unwrap(), []);
        assert!(client.delete_many(&[] as &[&str]).unwrap().is_empty());

        let large = vec![7; 1 << 20];
        let written = client.set_many([Put::new("large", large.clone()), Put::new([0, 255], "")]);
        assert_eq!(written.unwrap(), [Written::Stored(None); 2]);
        assert_eq!(value(&mut client, "large").unwrap(), large);
        assert_eq!(client.get([0, 255]).unwrap().unwrap().value, "");

        client.flush(Duration::from_secs(1000)).unwrap();
        assert_eq!(value(&mut client, "large").unwrap(), large);
        client.flush(Duration::ZERO).unwrap();
        assert_eq!(value(&mut client, "large"), None);
        server.stop();
    }
}

/// Flags, ends and versions come back as they were given, and conditions hold a write back.
#[test]
fn particulars_of_a_write() {
    let (server, address) = start(config(2, true));
    let mut client = routed().connect(address).unwrap();
    let put = Put {
        flags: u32::MAX,
        expiry: Expiry::In(Duration::from_secs(100)),
        condition: Condition::Absent,
        with_version: true,
        ..Put::new("key", "one")
    };
    let Written::Stored(Some(version)) = client.set_with(put.clone()).unwrap() else {
        panic!("it must be stored with a version");
    };
    assert_eq!(client.set_with(put).unwrap(), Written::ConditionFailed);
    let item = client.get_versioned("key").unwrap().unwrap();
    assert_eq!((item.flags, item.version), (u32::MAX, Some(version)));
    let left = item.expires_at.unwrap().duration_since(SystemTime::now()).unwrap();
    assert!((90..=100).contains(&left.as_secs()), "{left:?}");
    let items = client.get_many_versioned(&["key", "none"]).unwrap();
    assert_eq!(items, [Some(item), None]);

    let moment = SystemTime::UNIX_EPOCH + Duration::from_millis(4_000_000_000_123);
    let put = |key: &str, condition| Put {
        expiry: Expiry::At(moment),
        condition,
        ..Put::new(key, "two")
    };
    let outcomes = client.set_many([
        put("key", Condition::VersionIs(version)),
        put("key", Condition::VersionIs(version)),
        put("key", Condition::Present),
        put("none", Condition::VersionIs(version)),
    ]);
    let (stored, failed) = (Written::Stored(None), Written::ConditionFailed);
    assert_eq!(
        outcomes.unwrap(),
        [Written::Aborted, Written::Aborted, Written::Aborted, failed]
    );
    let outcomes = client.set_many([
        put("key", Condition::VersionIs(version)),
        put("key", Condition::Present),
        put("other", Condition::Absent),
    ]);
    assert_eq!(outcomes.unwrap(), [stored; 3]);
    let item = client.get("key").unwrap().unwrap();
    assert_eq!((item.expires_at, item.version), (Some(moment), None));
    for expiry in [Expiry::In(Duration::ZERO), Expiry::At(SystemTime::UNIX_EPOCH)] {
        let put = Put {
            expiry,
            ..Put::new("gone", "at once")
        };
        assert_eq!(client.set_with(put).unwrap(), stored);
        assert_eq!(value(&mut client, "gone"), None);
    }

    let delete = client.delete_if("key", Condition::VersionIs(version));
    assert_eq!(delete.unwrap(), Deleted::ConditionFailed);
    assert_eq!(
        client.delete_if("none", Condition::Present).unwrap(),
        Deleted::ConditionFailed
    );
    assert_eq!(client.delete_if("none", Condition::Always).unwrap(), Deleted::NotFound);
    assert_eq!(client.delete_if("key", Condition::Present).unwrap(), Deleted::Deleted);
    server.stop();
}

/// What the server refuses is told in its words, and the connection goes on.
#[test]
fn refusals() {
    let (server, address) = start(config(1, false));
    let mut client = Client::connect(address).unwrap();
    for (result, code, word) in [
        (client.set("", "x"), Code::InvalidArgument, "empty"),
        (client.set(vec![b'k'; 251], "x"), Code::InvalidArgument, "251"),
        (client.set("k", vec![0; (1 << 20) + 1]), Code::TooLarge, "TOO_LARGE: "),
        (client.set("k", vec![0; 20 << 20]), Code::TooLarge, "bytes"),
    ] {
        let error = result.unwrap_err();
        assert!(
            matches!(&error, Error::Refused { code: found, .. } if *found == code),
            "{error:?}"
        );
        assert!(error.to_string().contains(word), "{error}");
    }
    let opened = client.metrics().unwrap().counters["connections_opened"];
    assert_eq!(opened, 1, "a refusal must not cost the connection");
    server.stop();

    let mut config = config(1, false);
    config.limits.max_memory = Some("512m".parse().unwrap());
    let (server, address) = start(config);
    let mut client = Client::connect(address).unwrap();
    // The limit is that of the whole process, in which other tests run.
    let put = |number: u32| Put::new(number.to_string(), vec![0; 1 << 20]);
    assert_eq!(client.set_with(put(0)).unwrap(), Written::Stored(None));
    let refused = (1..512).find(|number| client.set_with(put(*number)).unwrap() == Written::OutOfMemory);
    assert!(refused.is_some());
    // Another test may have ended in between, and left room for some more.
    let error = (0..512).find_map(|number| client.set(format!("more{number}"), vec![0; 1 << 20]).err());
    let error = error.unwrap();
    let out_of_memory = Code::OutOfMemory;
    assert!(
        matches!(error, Error::Refused { code, .. } if code == out_of_memory),
        "{error:?}"
    );
    server.stop();
}

/// A server that takes no writes says so, of one key and of many; its reads go on.
#[test]
fn a_read_only_server() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rows");
    std::fs::write(&path, "a 1\nb 2\n").unwrap();
    let (server, address) = start(Config {
        read_only: true,
        load: Some(path),
        ..config(2, false)
    });
    assert_eq!(server.loaded().unwrap().rows, 2);
    let mut client = Client::connect(address).unwrap();
    for error in [
        client.set("a", "x").unwrap_err(),
        client.set("new", vec![0; 100_000]).unwrap_err(),
        client.set_many([Put::new("a", "x"), Put::new("b", "x")]).unwrap_err(),
        client.delete("a").unwrap_err(),
        client.delete_many(&["a", "b"]).unwrap_err(),
        client.flush(Duration::ZERO).unwrap_err(),
        client.flush(Duration::from_secs(1)).unwrap_err(),
    ] {
        assert!(
            matches!(
                &error,
                Error::Refused {
                    code: Code::ReadOnly,
                    ..
                }
            ),
            "{error:?}"
        );
        assert!(error.to_string().contains("the server is read-only"), "{error}");
    }
    assert_eq!(value(&mut client, "a"), Some(b"1".to_vec()));
    assert_eq!(value(&mut client, "b"), Some(b"2".to_vec()));
    assert_eq!(value(&mut client, "new"), None);
    let counters = client.metrics().unwrap().counters;
    assert_eq!((counters["read_only_refusals"], counters["items"]), (7, 2));
    assert_eq!(
        counters["connections_opened"], 1,
        "a refusal must not cost the connection"
    );
    server.stop();
}

/// An operator's program reads counters, percentiles and whole histograms.
#[test]
fn metrics_of_all_cores() {
    let (server, address) = start(config(2, false));
    let mut client = Client::connect(address).unwrap();
    for number in 0..100 {
        client.set(number.to_string(), "x").unwrap();
    }
    let metrics = client.metrics().unwrap();
    assert_eq!((metrics.cores, metrics.counters["sets"]), (2, 100));
    assert_eq!(metrics.server_version, env!("CARGO_PKG_VERSION"));
    let sets = metrics.latencies.iter().filter(|latency| latency.command == "set");
    let mut count = 0;
    for latency in sets {
        let histogram = latency.decode_histogram().unwrap();
        assert_eq!(histogram.len(), latency.count);
        assert!(histogram.max() >= latency.p99_ns, "{latency:?}");
        count += latency.count;
    }
    assert_eq!(count, 100);
    server.stop();
}

/// With a port for each core and a client that routes, no request travels between cores; without, some do.
#[test]
fn requests_go_to_the_owner() {
    for ordered in [false, true] {
        let mut config = config(2, true);
        if ordered {
            config.partitioner = Some(PartitionerChoice::Ordered);
            config.boundaries = vec!["key 5".to_owned()];
        }
        let (server, address) = start(config);
        let mut forwarded = vec![];
        for options in [routed(), Options::default()] {
            let mut client = options.connect(address).unwrap();
            let topology = client.topology().unwrap();
            assert_eq!(
                (topology.cores, topology.core_ports.as_slice()),
                (2, server.core_ports())
            );
            let is_ordered = matches!(topology.partitioner, Some(Partitioner::Ordered { .. }));
            assert_eq!(is_ordered, ordered);
            let mut owners = [0; 2];
            for number in 0..100 {
                let key = format!("key {number}");
                owners[usize::from(topology.owner(key.as_bytes()).unwrap().0)] += 1;
                client.set(key.as_str(), "x").unwrap();
                assert!(client.get(&key).unwrap().is_some());
            }
            assert!(owners.iter().all(|keys| *keys > 20), "{owners:?}");
            if !ordered {
                let tagged = ["{a}1", "{a}2", "x{a}", "{a"];
                let owner = |key: &str| topology.owner(key.as_bytes());
                assert!(tagged[..3].iter().all(|key| owner(key) == owner("a")), "{topology:?}");
                tagged.iter().for_each(|key| client.set(*key, "x").unwrap());
                client.get_many(&tagged[..3]).unwrap();
            }
            forwarded.push(client.metrics().unwrap().counters["forwarded"]);
        }
        assert_eq!(forwarded[0], 0);
        assert!(forwarded[1] > 20, "{forwarded:?}");
        server.stop();
    }
}

/// A server comes back on the same address with other cores, ports and seed: the program goes on, and is routed anew.
#[test]
fn a_server_that_restarts() {
    let (server, address) = start(config(2, true));
    let mut plain = Client::connect(address).unwrap();
    // One that has used its connections, and one that has only learned of the cores.
    let mut clients = [routed().connect(address).unwrap(), routed().connect(address).unwrap()];
    for number in 0..20 {
        clients[0].set(number.to_string(), "x").unwrap();
    }
    plain.ping().unwrap();
    let before = plain.topology().unwrap();
    server.stop();
    for client in clients.iter_mut().chain([&mut plain]) {
        let error = client.set("0", "y").unwrap_err();
        assert!(matches!(error, Error::Connect { .. }), "{error:?}");
    }
    let mut config = config(2, true);
    config.protobuf = Listen::At(address);
    let (server, _) = start(config);
    for client in clients.iter_mut().chain([&mut plain]) {
        client.set("0", "y").unwrap();
        assert_eq!(value(client, "0"), Some(b"y".to_vec()));
    }
    let after = plain.topology().unwrap();
    assert_ne!(before.partitioner, after.partitioner);
    let forwarded = plain.metrics().unwrap().counters["forwarded"];
    for client in &mut clients {
        for number in 0..50 {
            client.get(number.to_string()).unwrap();
        }
    }
    // To ask for the metrics is to ask all cores.
    let more = plain.metrics().unwrap().counters["forwarded"] - forwarded;
    assert!(more <= 1, "{more} requests were not routed");
    server.stop();

    // Between two requests, unseen.
    let mut config = self::config(1, false);
    config.protobuf = Listen::At(address);
    let (server, _) = start(config);
    for client in clients.iter_mut().chain([&mut plain]) {
        client.set("0", "z").unwrap();
    }
    server.stop();
}

/// Who names the wrong address is told which one.
#[test]
fn nobody_listens() {
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let error = Client::connect(address).unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, Error::Connect { .. }), "{error:?}");
    assert!(
        text.contains(&address.to_string()) && text.contains("refused"),
        "{text}"
    );
    assert!(matches!(Client::connect("127.0.0.1").unwrap_err(), Error::Lookup(_)));
    assert!(matches!(Client::connect([].as_slice()).unwrap_err(), Error::Lookup(_)));
}

/// A server that closes without a word is asked once more and not forever.
#[test]
fn a_server_that_closes_at_once() {
    let address = fakes(100, |_| {});
    let mut client = Client::connect(address).unwrap();
    let error = client.get("key").unwrap_err();
    assert!(matches!(error, Error::Lost { .. }), "{error:?}");
    let error = client.set("key", "value").unwrap_err();
    assert!(matches!(error, Error::Unknown { .. } | Error::Lost { .. }), "{error:?}");
}

/// A read whose connection breaks is asked again; a write is not, and its error says why.
#[test]
fn what_breaks_while_it_is_asked() {
    for half in [b"".as_slice(), b"\x05", b"\x85", b"\x05\x08\x01"] {
        let (seen, requests) = mpsc::channel();
        let seen_later = seen.clone();
        let address = fake(vec![
            Box::new(move |fake| {
                seen.send(fake.request().command.unwrap()).unwrap();
                fake.send(half);
            }),
            Box::new(move |fake| {
                seen_later.send(fake.results(&[0])).unwrap();
                seen_later.send(fake.request().command.unwrap()).unwrap();
                fake.send(half);
            }),
            Box::new(|fake| _ = fake.results(&[0])),
        ]);
        let mut client = Client::connect(address).unwrap();
        assert!(client.get("key").unwrap().is_some());
        let error = client.set("key", "value").unwrap_err();
        assert!(matches!(error, Error::Unknown { .. }), "{error:?}");
        let text = error.to_string();
        assert!(
            text.contains("may have been executed") && text.contains("closed"),
            "{text}"
        );
        client.set("key", "value").unwrap();
        let requests: Vec<Command> = requests.iter().collect();
        assert!(
            matches!(requests[..], [Command::Get(_), Command::Get(_), Command::Set(_)]),
            "{requests:?}"
        );
    }
}

/// A write that could not be sent to its end cannot have been executed, and is sent again.
#[test]
fn a_write_that_was_half_sent() {
    let address = fake(vec![
        // What it leaves unread makes the system reset the connection.
        Box::new(|fake| fake.0.read_exact(&mut [0]).unwrap()),
        Box::new(|fake| _ = fake.results(&[0])),
    ]);
    let mut client = Client::connect(address).unwrap();
    client.set("key", vec![0; 64 << 20]).unwrap();
}

/// A server that hangs holds nobody longer than the timeout, and what it says too late is not taken for the next answer.
#[test]
fn a_server_that_never_answers() {
    let late = |fake: &mut Fake| {
        let id = fake.request().id;
        std::thread::sleep(Duration::from_millis(500));
        let results = vec![proto::KeyResult::default()];
        let response = Response {
            id: id + 1,
            results,
            ..Default::default()
        };
        fake.answer(&response);
    };
    let address = fake(vec![
        Box::new(late),
        Box::new(late),
        Box::new(|fake| _ = fake.results(&[Code::NotFound as i32])),
    ]);
    let mut client = hasty().connect(address).unwrap();
    let begun = Instant::now();
    let error = client.get("key").unwrap_err();
    assert!(begun.elapsed() < Duration::from_secs(3));
    assert!(error.to_string().contains("did not answer within 300ms"), "{error}");
    assert!(
        matches!(&error, Error::Lost { cause, .. } if cause.kind() == ErrorKind::TimedOut),
        "{error:?}"
    );
    let error = client.set("key", "value").unwrap_err();
    assert!(
        matches!(&error, Error::Unknown { cause, .. } if cause.kind() == ErrorKind::TimedOut),
        "{error:?}"
    );
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(value(&mut client, "key"), None);
}

/// Neither does one that goes on answering byte by byte, nor one that does not read.
#[test]
fn a_server_that_is_slow() {
    let address = fakes(1, |fake| {
        fake.request();
        fake.send(b"\x7f\x08\x01");
        for _ in 0..50 {
            std::thread::sleep(Duration::from_millis(50));
            fake.send(b"\x08");
        }
    });
    let begun = Instant::now();
    let error = hasty().connect(address).unwrap().get("key").unwrap_err();
    assert!(begun.elapsed() < Duration::from_secs(2));
    assert!(error.to_string().contains("it began with \"\\x7f\\x08\\x01"), "{error}");

    let address = fakes(1, |fake| {
        std::thread::sleep(Duration::from_secs(1));
        fake.wait();
    });
    let error = hasty()
        .connect(address)
        .unwrap()
        .set("key", vec![0; 64 << 20])
        .unwrap_err();
    assert!(matches!(error, Error::Lost { .. }), "{error:?}");
    assert!(error.to_string().contains("did not take the request"), "{error}");
}

/// Something that is no memkv-tpc is told apart, with what it said.
#[test]
fn a_server_that_is_none() {
    let cases: &[(&[u8], &str)] = &[
        (
            b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain; charset=utf-8\r\nConnection: close\r\n\r\n400",
            "HTTP/1.1 400",
        ),
        // More than is taken, and more than there is memory.
        (b"\x81\x80\x80\x80\x04", "more than 1073741824 bytes"),
        (b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", "more than"),
        (b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", "more than"),
        (b"\x02\xff\xff", "no Response"),
        // The right thing, of another request.
        (b"\x02\x08\x63", "answered request 99 where 1 was asked"),
        (b"\x00", "answered request 0"),
        // Codes that are none.
        (b"\x04\x08\x01\x10\x63", "code 99"),
        (b"\x06\x08\x01\x22\x02\x08\x63", "result with the code 99"),
        (b"\x06\x08\x01\x22\x02\x08\x05", "result with the code 5"),
        // Not as many results as keys.
        (b"\x02\x08\x01", "0 results for 1 keys"),
        (b"\x06\x08\x01\x22\x00\x22\x00", "2 results for 1 keys"),
    ];
    for (answer, word) in cases {
        let address = fake(vec![
            Box::new(|fake| {
                fake.request();
                fake.send(answer);
                fake.wait();
            }),
            Box::new(|fake| _ = fake.results(&[0])),
        ]);
        let mut client = Client::connect(address).unwrap();
        expect_foreign(client.get("key"), word);
        if !word.contains("code 99") {
            client.set("key", "value").unwrap();
        }
    }
    // A short answer of another protocol is shown, though it may yet become the right one.
    let address = fakes(1, |fake| {
        fake.request();
        fake.send(b"ERROR\r\n");
        fake.wait();
    });
    let error = hasty().connect(address).unwrap().get("key").unwrap_err();
    assert!(error.to_string().contains("\"ERROR\\r\\n\""), "{error}");
    for answer in [b"\x02\x08\x01".as_slice(), b"\x04\x08\x01\x2a\x00"] {
        let script = move |fake: &mut Fake| {
            fake.request();
            fake.send(answer);
            fake.wait();
        };
        let address = fake(vec![Box::new(script), Box::new(script)]);
        let result = Client::connect(address).unwrap().metrics();
        assert_eq!(result.is_ok(), answer.len() > 3, "{result:?}");
    }
}

/// A server that has no room says so, asked or not, and is asked again on a new connection.
#[test]
fn a_server_without_room() {
    let full = |fake: &mut Fake| {
        fake.answer(&Response {
            code: Code::Unavailable.into(),
            message: "no connection is free".to_owned(),
            ..Default::default()
        });
        fake.wait();
    };
    let address = fake(vec![
        Box::new(|fake| _ = fake.results(&[0])),
        Box::new(full),
        Box::new(move |fake| {
            fake.request();
            full(fake);
        }),
        Box::new(|fake| _ = fake.results(&[0])),
    ]);
    let mut client = Client::connect(address).unwrap();
    // Reads: they are repeated where the end of the connection before them is seen late.
    client.get("key").unwrap();
    for _ in 0..2 {
        let error = client.get("key").unwrap_err();
        assert!(
            matches!(
                error,
                Error::Refused {
                    code: Code::Unavailable,
                    ..
                }
            ),
            "{error:?}"
        );
        assert!(
            error.to_string().contains("UNAVAILABLE: no connection is free"),
            "{error}"
        );
    }
    client.get("key").unwrap();
}

/// A topology that cannot be is an error and never a wrong turn.
#[test]
fn topologies_that_make_no_sense() {
    let range = |start, core| proto::Range { start, core };
    let good = proto::TopologyReport {
        ranges: vec![range(0, 0), range(1 << 63, 1)],
        cores: 2,
        ..Default::default()
    };
    let bad = [
        proto::TopologyReport::default(),
        proto::TopologyReport {
            cores: 1,
            ..good.clone()
        },
        proto::TopologyReport {
            cores: 1 << 16,
            ..good.clone()
        },
        proto::TopologyReport {
            ranges: vec![],
            ..good.clone()
        },
        proto::TopologyReport {
            ranges: vec![range(1, 0)],
            ..good.clone()
        },
        proto::TopologyReport {
            ranges: vec![range(0, 0), range(5, 1), range(5, 0)],
            ..good.clone()
        },
        proto::TopologyReport {
            core_ports: vec![7001],
            ..good.clone()
        },
        proto::TopologyReport {
            core_ports: vec![7001, 0],
            ..good.clone()
        },
        proto::TopologyReport {
            core_ports: vec![7001, 1 << 16],
            ..good.clone()
        },
    ];
    let serve = |report: proto::TopologyReport| {
        fake(vec![Box::new(move |fake: &mut Fake| {
            let id = fake.request().id;
            let response = Response {
                id,
                topology: Some(report),
                ..Default::default()
            };
            fake.answer(&response);
            fake.results(&[0]);
        })])
    };
    for report in bad {
        expect_foreign(routed().connect(serve(report)), "a topology");
    }
    // A way to make tokens that is not known yet: nothing is routed, and everything works.
    for token_function in [0, 7] {
        let report = proto::TopologyReport {
            token_function,
            core_ports: if token_function == 7 { vec![1, 2] } else { vec![] },
            ..good.clone()
        };
        let mut client = routed().connect(serve(report)).unwrap();
        client.set("key", "value").unwrap();
    }
}

/// A core's port that takes no connection is named.
#[test]
fn a_core_that_cannot_be_reached() {
    let address = fakes(2, |fake| {
        let id = fake.request().id;
        fake.answer(&Response {
            id,
            topology: Some(proto::TopologyReport {
                ranges: vec![proto::Range::default()],
                core_ports: vec![1],
                cores: 1,
                ..Default::default()
            }),
            ..Default::default()
        });
        fake.wait();
    });
    let error = routed().connect(address).unwrap().get("key").unwrap_err();
    assert!(matches!(error, Error::Connect { .. }), "{error:?}");
    assert!(
        error.to_string().contains(":1: ") && error.to_string().contains("core 0"),
        "{error}"
    );
}
