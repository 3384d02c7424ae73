//! What a server keeps in a directory, over restarts and kills, as its users meet it: real servers and their files.

#![allow(clippy::unwrap_used, reason = "in a test, the assertion")]

mod support;

use memkv::client::{Client, Error, Expiry, Item, Options, Put};
use memkv::config::{Config, DurabilityChoice, Listen};
use memkv::encoding::Rope;
use memkv::model::{Command as Asked, Condition, Delete, Op, Transaction, TxnEnd, Value};
use memkv::proto::message::Command as Request;
use memkv::proto::operation::Operation as Of;
use memkv::proto::{self, Code};
use memkv::protocol::Protocol;
use memkv::protocol::call::{self, Outcome};
use memkv::runtime::Server;
use memkv::wal::{Done, Durability};
use prost::Message;
use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use support::World;
use support::protobuf::{delete, entry, get, only, request, responses, results, set};

/// A server, or a file, that does not come fails the test instead of hanging it.
const PATIENCE: Duration = Duration::from_secs(60);

fn config(folder: &Path, cores: u16, durability: DurabilityChoice) -> Config {
    Config {
        cores: Some(cores),
        memcached: "127.0.0.1:0".parse().unwrap(),
        text: Some("127.0.0.1:0".parse().unwrap()),
        protobuf: "127.0.0.1:0".parse().unwrap(),
        json_line: Listen::Off,
        http: "127.0.0.1:0".parse().unwrap(),
        grpc: Listen::Off,
        data_dir: Some(folder.join("data")),
        durability,
        ..Config::default()
    }
}

fn start(folder: &Path, cores: u16, durability: DurabilityChoice) -> Server {
    Server::start(config(folder, cores, durability)).unwrap()
}

fn start_error(config: Config) -> String {
    Server::start(config).unwrap_err().to_string()
}

fn client_of(address: SocketAddr) -> Client {
    let options = Options {
        timeout: PATIENCE,
        ..Options::default()
    };
    options.connect(address).unwrap()
}

fn client(server: &Server) -> Client {
    client_of(server.address(Protocol::Protobuf).unwrap())
}

fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// The answer of one line over memcached's protocol.
fn line(address: SocketAddr, asked: &str) -> String {
    let mut stream = connect(address);
    stream.write_all(asked.as_bytes()).unwrap();
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).unwrap();
    line
}

/// Status and body of a request over HTTP.
fn http(address: SocketAddr, method: &str, target: &str, body: &str) -> (u16, String) {
    let mut stream = connect(address);
    let length = body.len();
    write!(
        stream,
        "{method} {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n\
         Content-Length: {length}\r\n\r\n{body}"
    )
    .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
}

/// The values of a metric, by core.
fn metric(address: SocketAddr, name: &str) -> Vec<u64> {
    let (status, text) = http(address, "GET", "/metrics", "");
    assert_eq!(status, 200);
    let values = text
        .lines()
        .filter_map(|line| line.strip_prefix(name)?.rsplit(' ').next());
    values.map(|value| value.parse().unwrap()).collect()
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < PATIENCE, "never: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn names(folder: &Path, of: &str) -> BTreeSet<String> {
    let entries = std::fs::read_dir(folder.join("data").join(of)).unwrap();
    entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect()
}

/// The built program, on ports that the system chooses.
struct Process {
    child: Child,
    addresses: Vec<(String, SocketAddr)>,
}

fn program(folder: &Path, options: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_memkv-tpc"));
    command.env_remove("SERVER_PORT").env_remove("KV_DATA_FILE_PATH");
    for listener in ["--memcached", "--protobuf", "--http"] {
        command.args([listener, "127.0.0.1:0"]);
    }
    for listener in ["--text", "--json-line", "--grpc"] {
        command.args([listener, "off"]);
    }
    command.arg("--data-dir").arg(folder.join("data")).args(options);
    command.stdout(Stdio::piped()).stderr(Stdio::null());
    command
}

impl Process {
    fn start(folder: &Path, options: &[&str]) -> Self {
        let mut child = program(folder, options).spawn().unwrap();
        let mut addresses = vec![];
        for line in BufReader::new(child.stdout.take().unwrap()).lines() {
            let line = line.unwrap();
            match line.split(' ').collect::<Vec<_>>()[..] {
                ["listening", protocol, address] => addresses.push((protocol.to_owned(), address.parse().unwrap())),
                ["ready"] => return Self { child, addresses },
                _ => {}
            }
        }
        panic!("it does not start: {:?}", child.wait());
    }

    fn address(&self, protocol: &str) -> SocketAddr {
        self.addresses.iter().find(|(of, _)| of == protocol).unwrap().1
    }

    fn signal(&self, name: &str) {
        let kill = Command::new("kill").args([name, &self.child.id().to_string()]).status();
        assert!(kill.unwrap().success());
    }

    /// Ends it as a crash would.
    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may be gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn bytes(item: Option<Item>) -> Option<Vec<u8>> {
    item.map(|item| item.value.to_vec())
}

/// Everything that an item is outlives the server, whichever protocol wrote it and whatever number of cores it comes back to.
#[test]
fn items_outlive_the_server() {
    for durability in [
        DurabilityChoice::None,
        DurabilityChoice::Interval,
        DurabilityChoice::Always,
    ] {
        let folder = tempfile::tempdir().unwrap();
        let large = vec![b'x'; 300_000];
        let server = start(folder.path(), 1, durability);
        let mut to = client(&server);
        for number in 0..500 {
            to.set(format!("key{number}"), format!("value {number}")).unwrap();
        }
        to.set("large", large.clone()).unwrap();
        let written = to.set_with(Put {
            flags: 77,
            expiry: Expiry::In(Duration::from_secs(3600)),
            with_version: true,
            ..Put::new("full", "of facts")
        });
        let version = written.unwrap().stored().unwrap().unwrap();
        let full = to.get_versioned("full").unwrap().unwrap();
        assert!(to.delete("key7").unwrap());
        let memcached = server.address(Protocol::Memcached).unwrap();
        assert_eq!(line(memcached, "set count 5 0 2\r\n41\r\n"), "STORED\r\n");
        assert_eq!(line(memcached, "incr count 1\r\n"), "42\r\n");
        assert_eq!(line(memcached, "append key8 0 0 5\r\n more\r\n"), "STORED\r\n");
        server.stop();

        for cores in [3, 2, 1] {
            let server = start(folder.path(), cores, durability);
            let mut to = client(&server);
            for number in (0..500).filter(|number| ![7, 8].contains(number)) {
                let found = bytes(to.get(format!("key{number}")).unwrap());
                assert_eq!(
                    found,
                    Some(format!("value {number}").into_bytes()),
                    "{durability:?} {cores}"
                );
            }
            assert_eq!(to.get("key7").unwrap(), None);
            assert_eq!(bytes(to.get("key8").unwrap()), Some(b"value 8 more".to_vec()));
            assert_eq!(bytes(to.get("large").unwrap()), Some(large.clone()));
            let item = to.get_versioned("full").unwrap().unwrap();
            assert_ne!(item.version, Some(version), "versions are of one life");
            assert_eq!(
                Item {
                    version: full.version,
                    ..item
                },
                full
            );
            assert_eq!(bytes(to.get("count").unwrap()), Some(b"42".to_vec()));
            // Each life adds something that the next one reads.
            assert_eq!(to.get(format!("cores{}", cores + 1)).unwrap().is_some(), cores < 3);
            to.set(format!("cores{cores}"), "were there").unwrap();
            server.stop();
        }

        let server = start(folder.path(), 2, durability);
        client(&server).flush(Duration::ZERO).unwrap();
        server.stop();
        let server = start(folder.path(), 3, durability);
        assert_eq!(client(&server).get("large").unwrap(), None, "emptied for good");
        assert_eq!(
            metric(server.address(Protocol::Http).unwrap(), "memkv_items{"),
            [0, 0, 0]
        );
        server.stop();
    }
}

/// With `always`, what was acknowledged is there after the process was killed, whenever that was.
#[test]
fn what_was_acknowledged_survives_a_kill() {
    const WRITERS: usize = 4;
    let folder = tempfile::tempdir().unwrap();
    // By writer: the number of its last write that was acknowledged.
    let acknowledged: Vec<AtomicUsize> = (0..WRITERS).map(|_| AtomicUsize::new(0)).collect();
    let all = || -> usize { acknowledged.iter().map(|number| number.load(Ordering::SeqCst)).sum() };
    for (life, cores) in ["2", "1", "3"].into_iter().enumerate() {
        let server = Process::start(folder.path(), &["--cores", cores, "--durability", "always"]);
        let address = server.address("protobuf");
        let wanted = all() + 400 * (life + 1);
        std::thread::scope(|scope| {
            for (writer, last) in acknowledged.iter().enumerate() {
                scope.spawn(move || {
                    let mut to = client_of(address);
                    for number in last.load(Ordering::SeqCst) + 1.. {
                        // Two keys, perhaps of two cores, at one instant.
                        let value = number.to_string();
                        let puts = [format!("a{writer}"), format!("b{writer}")].map(|key| Put::new(key, value.clone()));
                        let kept = Put::new(format!("{writer}:{number}"), value.clone());
                        let written = to.set_many(puts).and_then(|_| to.set_many([kept]));
                        match written {
                            Ok(_) => last.store(number, Ordering::SeqCst),
                            Err(_) => break,
                        }
                    }
                });
            }
            until("enough writes", || all() >= wanted);
            server.kill();
        });
        let server = start(folder.path(), 2, DurabilityChoice::Always);
        let mut to = client(&server);
        for (writer, last) in acknowledged.iter().enumerate() {
            let last = last.load(Ordering::SeqCst);
            for number in 1..=last {
                assert!(
                    to.get(format!("{writer}:{number}")).unwrap().is_some(),
                    "{writer}:{number} of {last}"
                );
            }
            let [a, b] = [format!("a{writer}"), format!("b{writer}")].map(|key| bytes(to.get(key).unwrap()).unwrap());
            assert_eq!(a, b, "written at one instant");
            let number: usize = String::from_utf8(a).unwrap().parse().unwrap();
            assert!(
                (last..=last + 1).contains(&number),
                "{number} was written, {last} acknowledged"
            );
        }
        server.stop();
    }
}

/// Without `always`, a kill takes the end of what was written, and nothing before that: of each client's writes, one after the other
/// and on all cores, a beginning is there, which has what was answered before a durable request was made.
#[test]
fn a_kill_cuts_at_one_moment() {
    const WRITERS: usize = 4;
    const KEYS: usize = 8;
    for durability in ["none", "interval"] {
        let folder = tempfile::tempdir().unwrap();
        let options = ["--cores", "3", "--durability", durability, "--sync-interval", "50ms"];
        // What a writer's keys had when its last life ended.
        let mut had = [[0; KEYS]; WRITERS];
        for _ in 0..3 {
            let server = Process::start(folder.path(), &options);
            let address = server.address("protobuf");
            // By writer: its last round that was acknowledged, and what that was when the durable request was made.
            let rounds: Vec<AtomicUsize> = had.iter().map(|had| AtomicUsize::new(had[0])).collect();
            let mut safe = [0; WRITERS];
            std::thread::scope(|scope| {
                for (writer, (had, last)) in had.iter().zip(&rounds).enumerate() {
                    scope.spawn(move || {
                        let mut to = client_of(address);
                        for round in had[0] + 1.. {
                            for key in 0..KEYS {
                                let (key, value) = (format!("{writer}:{key}"), round.to_string());
                                // Every other one by a transaction over two cores, perhaps.
                                let twin = Put::new(format!("twin {key}"), value.clone());
                                let puts = [Put::new(key, value), twin];
                                let written = to.set_many(puts.into_iter().take(1 + round % 2));
                                if written.is_err() {
                                    return;
                                }
                            }
                            last.store(round, Ordering::SeqCst);
                        }
                    });
                }
                let all = |by: usize| {
                    let mut passed = rounds.iter().zip(&had);
                    passed.all(|(round, had)| round.load(Ordering::SeqCst) >= had[0] + by)
                };
                until("enough writes", || all(100));
                safe = std::array::from_fn(|writer| rounds[writer].load(Ordering::SeqCst));
                let durable = Options {
                    durable: true,
                    timeout: PATIENCE,
                    ..Options::default()
                };
                durable.connect(address).unwrap().set("this", "is safe").unwrap();
                until("more writes", || all(300));
                server.kill();
            });
            let server = Process::start(folder.path(), &options);
            let mut to = client_of(server.address("protobuf"));
            for (writer, had) in had.iter_mut().enumerate() {
                let mut number = |key: String| -> usize {
                    let found = bytes(to.get(key).unwrap()).unwrap_or_else(|| b"0".to_vec());
                    String::from_utf8(found).unwrap().parse().unwrap()
                };
                let found: [usize; KEYS] = std::array::from_fn(|key| number(format!("{writer}:{key}")));
                let twins: [usize; KEYS] = std::array::from_fn(|key| number(format!("twin {writer}:{key}")));
                assert!(
                    found.is_sorted_by(|first, second| first >= second),
                    "{durability}: {found:?}"
                );
                assert!(found[0] - found[KEYS - 1] <= 1, "{durability}: {found:?}");
                for (found, twin) in found.iter().zip(twins) {
                    let odd = found - usize::from(found % 2 == 0 && *found > 0);
                    assert_eq!(twin, odd, "{durability}: written at one instant");
                }
                assert!(
                    found[KEYS - 1] >= safe[writer],
                    "{durability}: {} was safe, {found:?}",
                    safe[writer]
                );
                *had = found;
            }
            server.kill();
        }
    }
}

/// What asked to be durable is safe when it is answered, also where nothing else waits for the disk.
#[test]
fn durable_requests_survive_a_kill() {
    let folder = tempfile::tempdir().unwrap();
    let options = ["--cores", "2", "--durability", "none"];
    let server = Process::start(folder.path(), &options);
    let durable = Options {
        durable: true,
        timeout: PATIENCE,
        ..Options::default()
    };
    let mut to = durable.connect(server.address("protobuf")).unwrap();
    let web = server.address("http");
    for number in 0..20 {
        to.set(format!("set{number}"), "1").unwrap();
        to.set_many((0..5).map(|key| Put::new(format!("many{key}"), number.to_string())))
            .unwrap()
            .into_iter()
            .for_each(|written| assert!(written.stored().is_ok()));
        let target = format!("/keys/put{number}?durable=true");
        assert_eq!(http(web, "PUT", &target, "put"), (201, String::new()));
    }
    let value = "x".repeat(100_000);
    assert_eq!(http(web, "PUT", "/keys/large?durable=true&ttl=1h", &value).0, 201);
    let operations =
        r#""operations": [{"op": "put", "key": "p", "value": "1"}, {"op": "put", "key": "q", "value": "2"}]"#;
    let (status, _) = http(
        web,
        "POST",
        "/keys:batch",
        &format!(r#"{{"durable": true, {operations}}}"#),
    );
    assert_eq!(status, 200);
    assert!(to.delete("set3").unwrap());
    assert_eq!(http(web, "DELETE", "/keys/put3?durable=true", "").0, 204);
    // A read that waits makes safe what it has read.
    assert_eq!(http(web, "PUT", "/keys/read", "this").0, 201);
    assert_eq!(
        http(web, "GET", "/keys/read?durable=true", ""),
        (200, "this".to_owned())
    );
    assert_eq!(http(web, "GET", "/keys/read?durable=maybe", "").0, 400);
    assert!(metric(web, "memkv_held_replies_total{").iter().sum::<u64>() > 40);
    server.kill();

    let server = Process::start(folder.path(), &options);
    let mut to = client_of(server.address("protobuf"));
    for number in 0..20 {
        assert_eq!(
            to.get(format!("set{number}")).unwrap().is_some(),
            number != 3,
            "set{number}"
        );
        assert_eq!(
            to.get(format!("put{number}")).unwrap().is_some(),
            number != 3,
            "put{number}"
        );
    }
    for key in 0..5 {
        assert_eq!(bytes(to.get(format!("many{key}")).unwrap()), Some(b"19".to_vec()));
    }
    assert_eq!(bytes(to.get("large").unwrap()), Some(value.into_bytes()));
    for (key, value) in [("p", "1"), ("q", "2"), ("read", "this")] {
        assert_eq!(bytes(to.get(key).unwrap()), Some(value.as_bytes().to_vec()));
    }
    server.kill();
}

/// A server that is stopped in the middle of writes, while the disk is at some of them, has them all when it starts again,
/// whatever the durability.
#[test]
fn a_stop_in_order_loses_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let mut wrote = [0; 3];
    for round in 0..12 {
        let durability = [
            DurabilityChoice::Interval,
            DurabilityChoice::None,
            DurabilityChoice::Always,
        ][round % 3];
        let server = start(folder.path(), 2, durability);
        let address = server.address(Protocol::Protobuf).unwrap();
        let writers: Vec<_> = (0..wrote.len())
            .map(|writer| {
                let from = wrote[writer];
                std::thread::spawn(move || {
                    let mut to = client_of(address);
                    let numbers = from..;
                    numbers
                        .into_iter()
                        .find(|number| to.set(format!("{writer} {number}"), "value").is_err())
                })
            })
            .collect();
        std::thread::sleep(Duration::from_millis(150));
        server.stop();
        let before = wrote;
        for (writer, thread) in writers.into_iter().enumerate() {
            wrote[writer] = thread.join().unwrap().unwrap();
        }
        let server = start(folder.path(), 1 + round as u16 % 3, DurabilityChoice::None);
        let mut to = client(&server);
        for (writer, count) in wrote.into_iter().enumerate() {
            let keys = (before[writer]..count).map(|number| format!("{writer} {number}"));
            let missing = keys.filter(|key| to.get(key).unwrap().is_none()).count();
            assert_eq!(missing, 0, "{durability:?} in round {round}: of {count}");
        }
        server.stop();
    }
    assert!(wrote.iter().all(|count| *count > 100), "{wrote:?}");
}

/// A server without a directory does nothing of what is to be durable, and says so in the words of the protocol.
#[test]
fn without_a_directory_nothing_is_durable() {
    for cores in [1, 3] {
        let mut world = World::new(cores, &[]);
        let to = world.connect(0, Protocol::Protobuf);
        let plain = [entry(b"a", b"1"), entry(b"b", b"2")];
        assert_eq!(
            results(&responses(&world.ask(to, &request(1, set(&plain))))[0]),
            [only(Code::Ok), only(Code::Ok)]
        );
        let durable = |command: Request| {
            let message = proto::Message {
                id: 7,
                command: Some(command),
                durable: true,
            };
            message.encode_length_delimited_to_vec()
        };
        let txn = Request::Txn(proto::Txn {
            success: vec![proto::Operation {
                operation: Some(Of::Delete(b"a".to_vec())),
                ..proto::Operation::default()
            }],
            ..proto::Txn::default()
        });
        for command in [
            set(&[entry(b"a", b"new")]),
            set(&[entry(b"a", b"new"), entry(b"b", b"new")]),
            set(&[entry(b"a", &[b'x'; 10_000])]),
            get(&[b"a"], false),
            get(&[b"a", b"b"], false),
            delete(&[b"a"]),
            delete(&[b"a", b"b"]),
            txn,
            Request::Flush(proto::Flush::default()),
        ] {
            let answer = responses(&world.ask(to, &durable(command.clone()))).remove(0);
            let codes: Vec<Code> = answer.results.iter().map(proto::KeyResult::code).collect();
            let refused = answer.code() == Code::NotDurable || !codes.is_empty();
            assert!(
                refused && codes.iter().all(|code| *code == Code::NotDurable),
                "{command:?}: {answer:?}"
            );
            assert_eq!(answer.id, 7);
        }
        assert_eq!(
            responses(&world.ask(to, &request(2, Request::Snapshot(proto::Snapshot {}))))[0].code(),
            Code::NotDurable
        );

        // What handlers of HTTP and gRPC ask.
        for protocol in [Protocol::Http, Protocol::Grpc] {
            let op = |op| {
                let mut asked = vec![];
                call::push_request(&mut asked, &Asked { key: b"a", op });
                asked
            };
            let put = memkv::model::Put::new(Value::Small(b"new"));
            let mut announced = vec![];
            call::push_announced(&mut announced, b"a", put, 5000);
            let effects = None;
            for (mut asked, value) in [
                (op(Op::Put(put)), &[][..]),
                (
                    op(Op::Get {
                        version: false,
                        effects,
                    }),
                    &[],
                ),
                (op(Op::Delete(Delete::default())), &[]),
                (announced, &[b'x'; 5000]),
            ] {
                call::make_durable(&mut asked);
                let to = world.connect(cores - 1, protocol);
                world.send(to, &asked);
                let answer = world.ask(to, value);
                let (answer, _) = call::read_answer(rope(answer));
                assert_eq!(answer.outcome, Outcome::NotDurable);
            }
            let commands = [b"a", b"b"].map(|key| Asked { key, op: Op::Put(put) });
            let txn = Transaction {
                checks: &[],
                success: &commands,
                failure: &[],
            };
            let mut asked = vec![];
            call::push_transaction(&mut asked, &txn);
            call::make_durable(&mut asked);
            let to = world.connect(cores - 1, protocol);
            assert_eq!(
                call::read_txn_answer(rope(world.ask(to, &asked))).end,
                TxnEnd::NotDurable
            );
            let mut asked = vec![];
            call::push_snapshot_request(&mut asked);
            let to = world.connect(0, protocol);
            assert_eq!(
                call::read_answer(rope(world.ask(to, &asked))).0.outcome,
                Outcome::NotDurable
            );
        }
        let memcached = world.connect(0, Protocol::Memcached);
        assert_eq!(
            world.ask(memcached, b"snapshot\r\nsnapshot noreply\r\nget a b\r\n"),
            b"SERVER_ERROR no snapshot: the server has no --data-dir, or cannot write to its log\r\n\
              VALUE a 0 1\r\n1\r\nVALUE b 0 1\r\n2\r\nEND\r\n",
            "nothing was changed"
        );
    }
}

fn rope(flat: Vec<u8>) -> Rope {
    let mut rope = Rope::default();
    rope.flat = flat;
    rope
}

/// The same over HTTP, whose status says it.
#[test]
fn http_without_a_directory() {
    let folder = tempfile::tempdir().unwrap();
    let server = Server::start(Config {
        data_dir: None,
        ..config(folder.path(), 2, DurabilityChoice::Interval)
    });
    let server = server.unwrap();
    let web = server.address(Protocol::Http).unwrap();
    assert_eq!(http(web, "PUT", "/keys/a", "1").0, 201);
    let batch = r#"{"operations": [{"op": "delete", "key": "a"}], "durable": true}"#;
    let plain = batch.replace("true", "false");
    for (method, target, body) in [
        ("PUT", "/keys/a?durable=true", "2"),
        ("GET", "/keys/a?durable=true", ""),
        ("DELETE", "/keys/a?durable=true", ""),
        ("POST", "/keys:batch", batch),
        ("POST", "/keys:batch?durable=true", &plain),
    ] {
        let (status, problem) = http(web, method, target, body);
        assert_eq!(status, 409, "{method} {target}: {problem}");
        assert!(problem.contains("--data-dir"), "{problem}");
    }
    let (status, problem) = http(web, "POST", "/snapshot", "");
    assert!(status == 409 && problem.contains("--data-dir"), "{status} {problem}");
    assert_eq!(http(web, "GET", "/keys/a", ""), (200, "1".to_owned()));
    assert_eq!(http(web, "POST", "/keys:batch", &plain).0, 200);
    assert_eq!(http(web, "GET", "/readyz", "").0, 200);
    server.stop();
}

fn cli(server: &str, arguments: &[&str]) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_memkv-cli"));
    let output = command.args(["--server", server]).args(arguments).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// Whoever asks for a snapshot gets one: of all shards, and the log of the server's earlier life goes.
#[test]
fn snapshots_on_request() {
    let folder = tempfile::tempdir().unwrap();
    let server = start(folder.path(), 2, DurabilityChoice::Interval);
    let mut to = client(&server);
    for number in 0..1000 {
        to.set(format!("key{number}"), "before the first snapshot").unwrap();
    }
    server.stop();

    let server = Process::start(folder.path(), &["--cores", "2"]);
    let (protobuf, memcached, web) = (
        server.address("protobuf"),
        server.address("memcached"),
        server.address("http"),
    );
    let mut to = client_of(protobuf);
    let ways: [(&str, &dyn Fn()); 6] = [
        ("SIGUSR1", &|| server.signal("-USR1")),
        ("HTTP", &|| {
            assert_eq!(
                http(web, "POST", "/snapshot", ""),
                (202, r#"{"snapshot":"begun"}"#.to_owned())
            )
        }),
        ("memcached", &|| assert_eq!(line(memcached, "snapshot\r\n"), "OK\r\n")),
        ("protobuf", &|| client_of(protobuf).snapshot().unwrap()),
        ("memkv-cli", &|| {
            assert_eq!(cli(&memcached.to_string(), &["snapshot"]), "OK\n")
        }),
        ("memkv-cli", &|| {
            assert_eq!(cli(&format!("protobuf://{protobuf}"), &["snapshot"]), "OK\n")
        }),
    ];
    assert!(
        names(folder.path(), "log")
            .iter()
            .any(|name| name.starts_with("00000001-"))
    );
    let mut images = BTreeSet::new();
    for (round, (way, ask)) in (1..).zip(ways) {
        to.set(format!("round{round}"), way).unwrap();
        ask();
        until(way, || {
            metric(web, "memkv_snapshots_total{")
                .iter()
                .all(|rounds| *rounds >= round)
        });
        assert_eq!(
            metric(web, "memkv_snapshots_total{"),
            [round, round],
            "{way} asks for one"
        );
        let now = names(folder.path(), "images");
        assert_eq!(now.len(), 64, "one of each shard, and no other: {now:?}");
        assert_ne!(now, images, "{way} makes new ones");
        images = now;
        let log = names(folder.path(), "log");
        assert!(!log.iter().any(|name| name.starts_with("00000001-")), "{log:?}");
    }
    let stats = cli(&memcached.to_string(), &["stats"]);
    let stat = |name: &str| {
        let row = stats.lines().find(|row| row.split_whitespace().next() == Some(name));
        row.unwrap().split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()
    };
    assert_eq!(
        (stat("snapshots"), stat("snapshot_failed"), stat("log_failed")),
        (12, 0, 0)
    );
    assert!(stat("snapshot_at") > 1_600_000_000);
    let report = to.metrics().unwrap();
    assert_eq!(report.counters["snapshot_at_ms"] / 1000, stat("snapshot_at"));
    assert_eq!(metric(web, "memkv_snapshot_failed{"), [0, 0]);
    for (method, header, expected) in [("GET", "", 405), ("POST", "Origin: http://elsewhere.example\r\n", 403)] {
        let mut stream = connect(web);
        write!(
            stream,
            "{method} /snapshot HTTP/1.1\r\nHost: localhost\r\n{header}Connection: close\r\n\r\n"
        )
        .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with(&format!("HTTP/1.1 {expected} ")), "{answer}");
    }
    server.kill();

    let server = start(folder.path(), 3, DurabilityChoice::Interval);
    let mut to = client(&server);
    for number in 0..1000 {
        assert!(to.get(format!("key{number}")).unwrap().is_some(), "key{number}");
    }
    // The last write came before the last image of its shard was begun.
    for round in 1..=6 {
        assert!(to.get(format!("round{round}")).unwrap().is_some(), "round{round}");
    }
    server.stop();
}

/// Rows are loaded into an empty directory only, unless somebody insists.
#[test]
fn loading_into_a_directory() {
    let folder = tempfile::tempdir().unwrap();
    let rows = folder.path().join("rows");
    std::fs::write(&rows, "a from the file\nb from the file\n").unwrap();
    let loading = Config {
        load: Some(rows),
        ..config(folder.path(), 2, DurabilityChoice::Interval)
    };
    let server = Server::start(loading.clone()).unwrap();
    assert_eq!(server.loaded().unwrap().rows, 2);
    let mut to = client(&server);
    to.set("a", "by a client").unwrap();
    assert!(to.delete("b").unwrap());
    server.stop();

    let server = Server::start(loading.clone()).unwrap();
    assert!(server.loaded().is_none());
    let mut to = client(&server);
    assert_eq!(bytes(to.get("a").unwrap()), Some(b"by a client".to_vec()));
    assert_eq!(to.get("b").unwrap(), None);
    server.stop();

    let again = Config {
        load_again: true,
        ..loading
    };
    let server = Server::start(again).unwrap();
    assert_eq!(server.loaded().unwrap().rows, 2);
    assert_eq!(
        bytes(client(&server).get("a").unwrap()),
        Some(b"from the file".to_vec())
    );
    server.stop();
    let server = start(folder.path(), 1, DurabilityChoice::Interval);
    assert!(
        client(&server).get("b").unwrap().is_some(),
        "what was loaded was logged"
    );
    server.stop();
}

/// A server that takes no writes shows what the directory has.
#[test]
fn read_only_with_a_directory() {
    let folder = tempfile::tempdir().unwrap();
    let server = start(folder.path(), 2, DurabilityChoice::Always);
    client(&server).set("a", "1").unwrap();
    server.stop();
    let read_only = Config {
        read_only: true,
        ..config(folder.path(), 3, DurabilityChoice::Always)
    };
    let server = Server::start(read_only).unwrap();
    let mut to = client(&server);
    assert_eq!(bytes(to.get("a").unwrap()), Some(b"1".to_vec()));
    let refused = to.set("a", "2");
    assert!(
        matches!(
            refused,
            Err(Error::Refused {
                code: Code::ReadOnly,
                ..
            })
        ),
        "{refused:?}"
    );
    server.stop();
}

/// What does not fit ends the start with a message that says what and why, and changes nothing.
#[test]
fn directories_that_do_not_fit() {
    let folder = tempfile::tempdir().unwrap();
    let fits = config(folder.path(), 2, DurabilityChoice::Interval);
    let server = Server::start(fits.clone()).unwrap();
    client(&server).set("a", "1").unwrap();
    let data = fits.data_dir.clone().unwrap();
    let error = start_error(fits.clone());
    for word in [
        &data.display().to_string(),
        "in use",
        &std::process::id().to_string(),
        "another directory",
    ] {
        assert!(error.contains(word), "{error}");
    }
    // Another process is told the same.
    let output = program(folder.path(), &["--cores", "1"])
        .stderr(Stdio::piped())
        .output()
        .unwrap();
    let told = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(
        told.contains("in use") && told.contains(&std::process::id().to_string()),
        "{told}"
    );
    server.stop();

    let wrong = [
        (
            "--shards",
            Config {
                shards: Some(7),
                ..fits.clone()
            },
        ),
        (
            "--token-seed",
            Config {
                token_seed: Some(1),
                ..fits.clone()
            },
        ),
        (
            "--partitioner",
            Config {
                partitioner: Some(memkv::config::PartitionerChoice::Ordered),
                ..fits.clone()
            },
        ),
    ];
    for (option, config) in wrong {
        let error = start_error(config);
        assert!(
            error.contains("MANIFEST") && error.contains(&format!("leave {option} out")),
            "{error}"
        );
    }

    let file = folder.path().join("file");
    std::fs::write(&file, "not a folder").unwrap();
    for (path, words) in [
        (file.clone(), "is not a directory"),
        (file.join("below"), "name a directory"),
    ] {
        let error = start_error(Config {
            data_dir: Some(path.clone()),
            ..fits.clone()
        });
        assert!(
            error.contains(&path.display().to_string()) && error.contains(words),
            "{error}"
        );
    }

    let manifest = data.join("MANIFEST");
    let good = std::fs::read_to_string(&manifest).unwrap();
    for (bad, words) in [
        (good.replacen("format = 1", "format = 2", 1), "format version 2"),
        (good.replacen("shards = 64", "shards = 65", 1), "checksum is wrong"),
        (String::new(), "no format version"),
    ] {
        assert_ne!(bad, good);
        std::fs::write(&manifest, bad).unwrap();
        let error = start_error(fits.clone());
        assert!(error.contains("MANIFEST") && error.contains(words), "{error}");
    }
    std::fs::write(&manifest, good).unwrap();
    let server = Server::start(fits).unwrap();
    assert_eq!(bytes(client(&server).get("a").unwrap()), Some(b"1".to_vec()));
    server.stop();
}

/// Who may not write to the directory, or not read what is in it, is told what to do.
#[test]
fn a_directory_of_somebody_else() {
    use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
    use std::os::unix::process::CommandExt;
    const NOBODY: u32 = 65_534;
    let folder = tempfile::tempdir().unwrap();
    let set = |path: &Path, mode| std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
    let data = folder.path().join("data");
    let server = start(folder.path(), 1, DurabilityChoice::Always);
    client(&server).set("a", "1").unwrap();
    server.stop();
    // Root may do everything, so the server is then somebody else's, who can reach a copy of the program.
    let is_root = std::fs::metadata(&data).unwrap().uid() == 0;
    let copy = folder.path().join("memkv-tpc");
    std::fs::copy(env!("CARGO_BIN_EXE_memkv-tpc"), &copy).unwrap();
    set(folder.path(), 0o755);
    let told = || {
        let mut command = Command::new(&copy);
        command.args(["--cores", "1", "--memcached", "127.0.0.1:0", "--data-dir"]);
        command.arg(&data);
        for listener in ["--text", "--protobuf", "--json-line", "--http", "--grpc"] {
            command.args([listener, "off"]);
        }
        if is_root {
            command.uid(NOBODY).gid(NOBODY);
        }
        let output = command.output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8(output.stderr).unwrap()
    };
    // Read, but not written; then not even read; then a file in it that is not.
    for (path, mode) in [
        (data.clone(), 0o555),
        (data.clone(), 0o000),
        (data.join("MANIFEST"), 0o000),
    ] {
        let before = std::fs::metadata(&path).unwrap().mode();
        if is_root && path != data {
            for path in [&data, &data.join("LOCK"), &data.join("log"), &data.join("images")] {
                chown(path, Some(NOBODY), None).unwrap();
            }
        }
        set(&path, mode);
        let told = told();
        assert!(told.contains("ermission denied"), "{told}");
        assert!(told.contains(&data.display().to_string()), "{told}");
        assert!(told.contains("own the directory"), "{told}");
        set(&path, before & 0o777);
    }
}

/// What describes a directory ends with 0 when it is good, and with 1 when something is damaged or it is none.
#[test]
fn what_inspect_ends_with() {
    let folder = tempfile::tempdir().unwrap();
    let server = start(folder.path(), 1, DurabilityChoice::Always);
    client(&server).set("the key", "1").unwrap();
    server.stop();
    let inspect = |options: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_memkv-tpc"));
        command.arg("inspect").arg(folder.path().join("data")).args(options);
        let output = command.output().unwrap();
        (output.status.code(), String::from_utf8(output.stdout).unwrap())
    };
    let (code, told) = inspect(&["--records"]);
    assert!(code == Some(0) && told.contains("put 'the key' '1'"), "{told}");
    assert!(!inspect(&[]).1.contains("the key"));
    let log = folder.path().join("data/log");
    let segment = log.join(names(folder.path(), "log").pop_first().unwrap());
    let mut bytes = std::fs::read(&segment).unwrap();
    let place = bytes.windows(7).position(|bytes| bytes == b"the key").unwrap();
    bytes[place] ^= 1;
    std::fs::write(&segment, bytes).unwrap();
    let (code, told) = inspect(&[]);
    assert!(code == Some(1) && told.contains("damaged: "), "{told}");
    std::fs::remove_file(folder.path().join("data/MANIFEST")).unwrap();
    assert_eq!(inspect(&[]).0, Some(1));
}

/// When the log cannot be written any more, writes are refused, reads of what is safe go on, and everybody who asks is told.
#[test]
fn a_log_that_fails() {
    let folder = tempfile::tempdir().unwrap();
    let server = start(folder.path(), 2, DurabilityChoice::Always);
    let web = server.address(Protocol::Http).unwrap();
    let mut to = client(&server);
    to.set("safe", "1").unwrap();
    assert_eq!(http(web, "GET", "/readyz", "").0, 200);
    assert_eq!(metric(web, "memkv_log_failed{"), [0, 0]);
    // What is open stays so; the next file of the log cannot be made.
    let (log, away) = (folder.path().join("data/log"), folder.path().join("away"));
    std::fs::rename(&log, &away).unwrap();
    let value = vec![b'x'; 1 << 20];
    let mut acknowledged = vec![];
    let refused = (0..400).find_map(|number| match to.set(format!("large{number}"), value.clone()) {
        Ok(()) => {
            acknowledged.push(number);
            None
        }
        Err(error) => Some((number, error)),
    });
    let (refused, error) = refused.expect("400 MiB do not fit into the files that are there");
    assert!(
        matches!(
            error,
            Error::Refused {
                code: Code::NotDurable,
                ..
            }
        ),
        "{error}"
    );
    let (status, problem) = http(web, "GET", "/readyz", "");
    assert!(status == 503 && problem.contains("log"), "{status} {problem}");
    assert_eq!(http(web, "GET", "/healthz", "").0, 200);
    assert!(metric(web, "memkv_log_failed{").contains(&1));
    let (status, problem) = http(web, "POST", "/snapshot", "");
    assert!(status == 409 && problem.contains("log"), "{status} {problem}");
    assert_eq!(http(web, "GET", "/keys/safe", "").1, "1");
    let shown = to.get(format!("large{refused}"));
    assert!(
        matches!(
            shown,
            Err(Error::Refused {
                code: Code::NotDurable,
                ..
            })
        ),
        "nobody sees what may be lost"
    );
    let again = to.set_with(Put {
        condition: Condition::Always,
        ..Put::new(format!("large{refused}"), "small")
    });
    assert!(matches!(again, Err(Error::Refused { .. })), "{again:?}");
    server.stop();

    std::fs::rename(&away, &log).unwrap();
    let server = start(folder.path(), 2, DurabilityChoice::Always);
    let mut to = client(&server);
    assert_eq!(bytes(to.get("safe").unwrap()), Some(b"1".to_vec()));
    for number in acknowledged {
        assert_eq!(
            bytes(to.get(format!("large{number}")).unwrap()),
            Some(value.clone()),
            "large{number}"
        );
    }
    to.set("afterwards", "2").unwrap();
    server.stop();
}

/// A snapshot that is under way when the log fails can never be adopted: the core does not go on looking whether it can, and rests.
#[test]
fn nobody_waits_for_a_snapshot_when_the_log_has_failed() {
    let (mut engines, _) = support::engines(1, &[]);
    let engine = &mut engines[0];
    engine.keep_log(Durability::Always, Duration::from_secs(1));
    engine.begin_turn(1, engine.now());
    assert!(engine.snapshot() && engine.has_background_work());
    let why = "no room".to_owned();
    engine.disk_done(Done::Failed { log: true, why });
    assert!(!engine.has_background_work());
    assert!(!engine.snapshot());
}

/// What the page is told of the log, and that it is told nothing of one that is not there.
#[test]
fn the_page_is_told_of_the_log() {
    let told = |web: SocketAddr| {
        let mut stream = connect(web);
        write!(stream, "GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
        let lines = BufReader::new(stream).lines().map(Result::unwrap);
        let event = lines
            .into_iter()
            .find_map(|line| line.strip_prefix("data: ").map(str::to_owned));
        serde_json::from_str::<serde_json::Value>(&event.unwrap()).unwrap()
    };
    let folder = tempfile::tempdir().unwrap();
    let server = start(folder.path(), 2, DurabilityChoice::Always);
    let web = server.address(Protocol::Http).unwrap();
    client(&server).set("a", "1").unwrap();
    let before = told(web);
    assert!(before["totals"]["log_bytes"].as_u64() > Some(0), "{before}");
    let log = serde_json::json!({"waiting": 0, "failed": 0, "snapshots_failed": 0, "snapshot_at_ms": 0});
    assert_eq!(before["log"], log);
    assert_eq!(http(web, "POST", "/snapshot", "").0, 202);
    until("a snapshot", || told(web)["log"]["snapshot_at_ms"].as_u64() > Some(0));
    server.stop();

    let without = Config {
        data_dir: None,
        ..config(folder.path(), 1, DurabilityChoice::Always)
    };
    let server = Server::start(without).unwrap();
    assert_eq!(told(server.address(Protocol::Http).unwrap()).get("log"), None);
    server.stop();
}
