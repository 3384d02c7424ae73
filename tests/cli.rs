//! The client as its users meet it: the built program, against a real server or against something that is none.

#![allow(clippy::unwrap_used, reason = "in a test, the assertion")]

use memkv::config::{Config, Listen};
use memkv::protocol::Protocol;
use memkv::runtime::Server;
use socket2::{Domain, Socket, Type};
use std::fmt::Display;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc;
use std::time::{Duration, SystemTime};

fn start() -> (Server, SocketAddr) {
    start_with(Config::default())
}

fn start_with(config: Config) -> (Server, SocketAddr) {
    let config = Config {
        cores: Some(1),
        memcached: "127.0.0.1:0".parse().unwrap(),
        text: Some(Listen::Off),
        protobuf: "127.0.0.1:0".parse().unwrap(),
        json_line: "127.0.0.1:0".parse().unwrap(),
        http: "127.0.0.1:0".parse().unwrap(),
        grpc: "127.0.0.1:0".parse().unwrap(),
        ..config
    };
    let server = Server::start(config).unwrap();
    let address = server.address(Protocol::Memcached).unwrap();
    (server, address)
}

/// A server of two cores, each with a port of its own, as `--server` names it.
fn start_protobuf() -> (Server, String) {
    let config = Config {
        cores: Some(2),
        memcached: Listen::Off,
        text: Some(Listen::Off),
        protobuf: "127.0.0.1:0".parse().unwrap(),
        json_line: "127.0.0.1:0".parse().unwrap(),
        http: "127.0.0.1:0".parse().unwrap(),
        grpc: "127.0.0.1:0".parse().unwrap(),
        core_ports: Some(0),
        token_seed: Some(77),
        ..Config::default()
    };
    let server = Server::start(config).unwrap();
    let address = server.address(Protocol::Protobuf).unwrap();
    (server, format!("protobuf://{address}"))
}

fn client(address: impl Display) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_memkv-cli"));
    command.arg("--server").arg(address.to_string()).stdin(Stdio::null());
    command
}

fn run(address: impl Display, arguments: &[&str]) -> Output {
    client(address).args(arguments).output().unwrap()
}

fn open_pipe(address: impl Display) -> Child {
    client(address)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

fn pipe(address: impl Display, lines: impl AsRef<[u8]>) -> Output {
    let mut child = open_pipe(address);
    // A client that has given up reads no further.
    let _ = child.stdin.take().unwrap().write_all(lines.as_ref());
    child.wait_with_output().unwrap()
}

/// Exit code, standard output, standard error.
fn parts(output: &Output) -> (i32, String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (
        output.status.code().expect("it must not be killed by a signal"),
        text(&output.stdout),
        text(&output.stderr),
    )
}

#[track_caller]
fn expect_out(output: &Output, out: &str) {
    assert_eq!(parts(output), (0, out.to_owned(), String::new()));
}

#[track_caller]
fn expect_error(output: &Output, code: i32, words: &[&str]) {
    let (found, out, err) = parts(output);
    assert_eq!((found, out.as_str()), (code, ""), "{err}");
    assert!(!err.contains("panicked"), "{err}");
    for word in words {
        assert!(err.contains(word), "{word:?} is missing in: {err}");
    }
}

/// Something that is no memkv-tpc: for each connection it reads a line, answers the next of `answers`, and closes.
fn impostor(answers: &'static [&'static [u8]]) -> (SocketAddr, mpsc::Receiver<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let (closed, is_closed) = mpsc::channel();
    std::thread::spawn(move || {
        for answer in answers {
            let (mut stream, _) = listener.accept().unwrap();
            BufReader::new(stream.try_clone().unwrap())
                .read_line(&mut String::new())
                .unwrap();
            // The client may have read enough already. Dropping is not enough to close: a child that another test is just
            // starting may hold a copy.
            let _ = stream.write_all(answer);
            let _ = stream.shutdown(Shutdown::Both);
            let _ = closed.send(());
        }
    });
    (address, is_closed)
}

#[test]
fn values_come_back() {
    // A script stores a value, reads it back byte by byte, changes it and deletes it.
    let (server, address) = start();
    expect_out(&run(address, &["set", "a", " two  words "]), "STORED\n");
    expect_out(&run(address, &["get", "a"]), " two  words ");
    expect_out(&run(address, &["set", "empty", ""]), "STORED\n");
    expect_out(&run(address, &["get", "empty"]), "");
    expect_out(&run(address, &["set", "minus", "-5"]), "STORED\n");
    expect_out(&run(address, &["get", "minus", "a"]), "-5\n two  words \n");
    expect_out(&run(address, &["delete", "a", "minus"]), "DELETED\nDELETED\n");
    expect_out(
        &run(address, &["set", "n", "7", "--ttl", "60", "--flags", "3"]),
        "STORED\n",
    );
    expect_out(&run(address, &["incr", "n"]), "8\n");
    expect_out(&run(address, &["decr", "n", "10"]), "0\n");
    expect_out(&run(address, &["touch", "n", "0"]), "TOUCHED\n");
    let mut stream = TcpStream::connect(address).unwrap();
    stream.write_all(b"get n\r\nquit\r\n").unwrap();
    let mut seen = String::new();
    stream.read_to_string(&mut seen).unwrap();
    assert!(seen.starts_with("VALUE n 3 "), "the flags are kept: {seen}");
    server.stop();
}

#[test]
fn times_over_a_month_are_from_now() {
    // Whoever keeps a value for forty days finds it there, though the protocol takes that number for a day in 1970.
    let (server, address) = start();
    let forty_days = (40 * 24 * 3600).to_string();
    expect_out(&run(address, &["set", "a", "1", "--ttl", &forty_days]), "STORED\n");
    expect_out(&run(address, &["touch", "a", &forty_days]), "TOUCHED\n");
    expect_out(&run(address, &["get", "a"]), "1");
    expect_out(&run(address, &["set", "b", "1", "--ttl", "1"]), "STORED\n");
    std::thread::sleep(Duration::from_millis(2100));
    expect_error(&run(address, &["get", "b"]), 1, &["(not found)"]);
    expect_error(&run(address, &["touch", "a", "99999999999"]), 2, &["2038"]);
    server.stop();
}

#[test]
fn a_missing_key_is_an_exit_code() {
    // A script learns from the exit code that a key is not there, and never takes a note for a value.
    let (server, address) = start();
    for arguments in [
        ["get", "none"].as_slice(),
        &["delete", "none"],
        &["incr", "none"],
        &["touch", "none", "5"],
    ] {
        expect_error(&run(address, arguments), 1, &["none (not found)"]);
    }
    run(address, &["set", "there", "x"]);
    let (code, out, err) = parts(&run(address, &["get", "none", "there"]));
    assert_eq!((code, out.as_str()), (1, "x\n"), "{err}");
    server.stop();
}

#[test]
fn an_operator_looks_and_empties() {
    // An operator reads the statistics as columns, and empties the server.
    let (server, address) = start();
    run(address, &["set", "a", "1"]);
    for arguments in [
        ["stats"].as_slice(),
        &["stats", "general"],
        &["stats", "settings"],
        &["stats", "items"],
        &["stats", "conns"],
        &["stats", "latency"],
        &["stats", "cores"],
    ] {
        let (code, out, err) = parts(&run(address, arguments));
        assert_eq!((code, err.as_str()), (0, ""), "{arguments:?}");
        let columns: Vec<usize> = out
            .lines()
            .map(|line| line.rfind("  ").expect("two columns") + 2)
            .collect();
        assert!(!columns.is_empty(), "{arguments:?}");
        assert!(columns.iter().all(|column| *column == columns[0]), "{out}");
    }
    let (_, out, _) = parts(&run(address, &["stats"]));
    assert!(
        out.lines().any(|line| line.split_whitespace().eq(["curr_items", "1"])),
        "{out}"
    );
    expect_out(&run(address, &["stats", "reset"]), "RESET\n");
    expect_out(&run(address, &["flush"]), "OK\n");
    expect_error(&run(address, &["get", "a"]), 1, &["(not found)"]);
    let (code, out, err) = parts(&run(address, &["version"]));
    assert_eq!((code, err.as_str(), out.lines().count()), (0, "", 1));
    assert!(out.starts_with(|first: char| first.is_ascii_digit()), "{out}");
    server.stop();
}

#[test]
fn the_server_has_the_word_when_it_refuses() {
    // What the server refuses is told in its words, and is a failure.
    let (server, address) = start();
    expect_error(&run(address, &["stats", "nonsense"]), 1, &["ERROR"]);
    run(address, &["set", "text", "abc"]);
    expect_error(&run(address, &["incr", "text"]), 1, &["CLIENT_ERROR cannot increment"]);
    let mut large = b"set large ".to_vec();
    large.resize(large.len() + (1 << 20) + 1, b'x');
    large.extend_from_slice(b"\nget text\n");
    let (code, out, err) = parts(&pipe(address, large));
    assert_eq!((code, out.as_str()), (1, "abc\n"), "{err}");
    assert!(
        err.contains("line 1: the server answered SERVER_ERROR object too large"),
        "{err}"
    );
    server.stop();
}

#[test]
fn hot_keys_and_slow_requests_are_tables() {
    // Each request is slow.
    let config = Config {
        slow_log_threshold: Duration::from_nanos(1),
        ..Config::default()
    };
    let (server, address) = start_with(config);
    expect_out(&run(address, &["set", "hot", "value"]), "STORED\n");
    expect_out(&run(address, &["get", "hot"]), "value");
    let table = |what: &str| {
        let (code, out, err) = parts(&run(address, &[what]));
        assert_eq!((code, err.as_str()), (0, ""), "{out}");
        let cells = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        out.lines().map(cells).collect::<Vec<_>>()
    };
    let hot = table("hotkeys");
    assert_eq!(hot[0][..2], ["key", "core"]);
    assert_eq!(
        (hot[1][0].as_str(), hot[1][4].as_str(), hot.len()),
        ("hot", "100.00%", 2),
        "{hot:?}"
    );
    let slow = table("slowlog");
    assert_eq!(slow[0][..3], ["key", "command", "requests"]);
    for command in ["set", "get"] {
        assert!(slow.iter().any(|row| row[..3] == ["hot", command, "1"]), "{slow:?}");
    }
    for what in ["hotkeys", "slowlog"] {
        let refused = run(format!("protobuf://{address}"), &[what]);
        expect_error(&refused, 2, &[what, "needs the memcached protocol"]);
    }
    server.stop();
}

#[test]
fn a_bad_key_is_never_sent() {
    // A key that the protocol would take for two words or two commands is refused before anything is sent.
    let long = "k".repeat(251);
    let nobody = SocketAddr::from(([127, 0, 0, 1], 9));
    for (key, word) in [
        ("a b", "blanks"),
        ("a\r\nflush_all", "control"),
        ("", "0 bytes"),
        (&long, "251 bytes"),
    ] {
        expect_error(&run(nobody, &["get", key]), 2, &[word]);
        expect_error(&run(nobody, &["set", key, "value"]), 2, &[word]);
    }
    let (server, address) = start();
    expect_out(&run(address, &["set", &long[1..], "longest"]), "STORED\n");
    expect_error(&pipe(address, "get \"a b\"\n"), 1, &["line 1", "blanks"]);
    server.stop();
}

#[test]
fn lines_say_what_arguments_say() {
    // A pipe, or a person at the prompt, writes values with blanks, quotes and bytes of any kind.
    let (server, address) = start();
    for (lines, out) in [
        ("set k  two  words \nget k\n", "STORED\ntwo  words\n"),
        ("set k say \"hi\"\nget k\r\n", "STORED\nsay \"hi\"\n"),
        (r#"set k " \"a\\\n\x41" "#, "STORED\n"),
        ("get k", " \"a\\\nA\n"),
        ("set k \"\"\nget k\n", "STORED\n\n"),
        ("set --ttl 100 k v --ttl 5\nget k\n", "STORED\nv --ttl 5\n"),
        ("set k \"v\" --flags 5\nget k\n", "STORED\nv\n"),
        ("set k -- v\nget k\n", "STORED\n-- v\n"),
        ("set -- -k v\nget -- -k\n", "STORED\nv\n"),
        (
            "\n  \nset n 5\nincr n\ndecr n 2\ndelete n k\n",
            "STORED\n6\n4\nDELETED\nDELETED\n",
        ),
        ("set k v\nexit\nget k\n", "STORED\n"),
    ] {
        let output = pipe(address, lines);
        assert_eq!(parts(&output), (0, out.to_owned(), String::new()), "{lines:?}");
    }
    for (line, word) in [
        ("set k \"v", "not closed"),
        ("set k \"a\"b", "closing quote"),
        ("set k \"a\" b", "only options"),
        ("set k \"\\q\"", "escape"),
        ("set k \"\\x4\"", "hexadecimal"),
        ("set k", "VALUE"),
        ("get", "KEY"),
        ("sett k v", "sett"),
    ] {
        expect_error(&pipe(address, line), 1, &["line 1: ", word]);
    }
    let binary = pipe(address, b"set \"\\xff\" \"\\x00\\xff\"\nget \xff\n");
    assert_eq!(binary.stdout, b"STORED\n\x00\xff\n");
    let (code, out, _) = parts(&pipe(address, "help\n"));
    assert_eq!(code, 0);
    assert!(
        out.contains("incr") && out.contains("exit") && out.contains("rest of the line"),
        "{out}"
    );
    server.stop();
}

#[test]
fn a_pipe_goes_on_after_a_failure() {
    // A long script is not cut off by one bad line, and its exit code tells that there was one.
    let (server, address) = start();
    let (code, out, err) = parts(&pipe(address, "set a 1\nnonsense\nget none\nget a\n"));
    assert_eq!((code, out.as_str()), (1, "STORED\n1\n"), "{err}");
    assert!(err.contains("line 2: unrecognized"), "{err}");
    assert!(err.contains("none (not found)"), "{err}");
    server.stop();
}

#[test]
fn nobody_listens() {
    // Who forgot to start the server is told where it was looked for and what to do.
    // Bound, so that no other test gets the port, but not listening.
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    let address = socket.local_addr().unwrap().as_socket().unwrap();
    let words = [&*address.to_string(), "refused", "start memkv-tpc", "--server"];
    expect_error(&run(address, &["version"]), 1, &words);
    let (code, _, err) = parts(&pipe(address, "version\nversion\n"));
    assert_eq!((code, err.lines().count()), (1, 1), "{err}");
}

#[test]
fn wrong_arguments() {
    // Arguments that make no sense are told apart from a server that fails.
    let nobody = SocketAddr::from(([127, 0, 0, 1], 9));
    for arguments in [
        ["get"].as_slice(),
        &["nonsense"],
        &["set", "k"],
        &["set", "k", "v", "w"],
        &["incr", "k", "-1"],
        &["set", "k", "v", "--ttl", "soon"],
        &["--server", "nowhere", "version"],
        &["--server", "http://localhost:80", "version"],
        &["--server", "protobuf://7001", "version"],
        &["--timeout", "0", "version"],
        &["--timeout", "never", "version"],
    ] {
        expect_error(&run(nobody, arguments), 2, &["error: "]);
    }
}

#[test]
fn a_server_that_is_none() {
    // A wrong port, with something else behind it, is a clear message and never a panic or an endless wait.
    let long_line: &'static [u8] = Box::leak(vec![b'x'; 100_000].into_boxed_slice());
    let cases: &[(&[u8], &[&str])] = &[
        (
            b"HTTP/1.1 400 Bad Request\r\n\r\n",
            &["does not speak", "HTTP/1.1 400", "port"],
        ),
        (b"", &["closed the connection"]),
        (b"VALUE k 0 5\r\nab", &["closed the connection"]),
        (b"VALUE k 0 99999999999999999999\r\n", &["does not speak"]),
        (b"VALUE k 0 18446744073709551615\r\n", &["does not speak"]),
        (b"VALUE k 0 1000000000\r\n", &["closed the connection"]),
        (b"VALUE k 0 -1\r\n", &["does not speak"]),
        (b"VALUE k\r\n", &["does not speak"]),
        (b"VALUE other 0 1\r\nx\r\nEND\r\n", &["does not speak"]),
        (b"VALUE k 0 1\r\nxyz\r\nEND\r\n", &["does not speak"]),
        (b"VALUE k 0 1\r\nx\r\nmore\r\n", &["does not speak"]),
        (b"\r\n", &["does not speak"]),
        (b"\xff\x1b[2J\n", &["does not speak", "\\xff\\x1b[2J"]),
        (b"SERVER_ERROR on fire\r\n", &["SERVER_ERROR on fire"]),
        (b"ERROR Too many open connections\r\n", &["Too many open connections"]),
    ];
    for (answer, words) in cases {
        let (address, _) = impostor(Box::leak(Box::new([*answer])));
        expect_error(&run(address, &["get", "k"]), 1, words);
    }
    for arguments in [
        ["stats"].as_slice(),
        &["flush"],
        &["incr", "k"],
        &["version"],
        &["set", "k", "v"],
    ] {
        for answer in [long_line, b"220 mail ready\r\n", b"STAT"] {
            let (address, _) = impostor(Box::leak(Box::new([answer])));
            expect_error(&run(address, arguments), 1, &[&*address.to_string()]);
        }
    }
}

#[test]
fn a_server_that_hangs() {
    // A server that accepts and says nothing does not hold a script longer than the timeout.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let output = run(address, &["--timeout", "200ms", "version"]);
    expect_error(&output, 1, &["did not answer in time", "--timeout"]);
}

#[test]
fn a_lost_connection_is_made_anew() {
    // A server that restarts between two commands of a prompt costs a note, and no command is lost or sent twice.
    let (address, is_closed) = impostor(&[b"VERSION 1\r\n", b"VERSION 2\r\n"]);
    let mut child = open_pipe(address);
    let mut input = child.stdin.take().unwrap();
    input.write_all(b"version\n").unwrap();
    is_closed.recv_timeout(Duration::from_secs(10)).unwrap();
    input.write_all(b"version\n").unwrap();
    drop(input);
    let (code, out, err) = parts(&child.wait_with_output().unwrap());
    assert_eq!((code, out.as_str()), (0, "1\n2\n"), "{err}");
    assert!(err.contains("connected to") && err.contains("again"), "{err}");
}

#[test]
fn whoever_reads_may_stop() {
    // `memkv-cli ... | head -1` ends without a complaint.
    let (server, address) = start();
    let mut child = open_pipe(address);
    drop(child.stdout.take());
    let _ = child.stdin.take().unwrap().write_all(b"version\nversion\n");
    let (code, _, err) = parts(&child.wait_with_output().unwrap());
    assert_eq!((code, err.as_str()), (0, ""));
    server.stop();
}

#[test]
fn values_come_back_over_protobuf() {
    // The same script as over memcached, with the same output, and with keys that only this protocol knows.
    let (server, address) = start_protobuf();
    expect_out(&run(&address, &["set", "a", " two  words "]), "STORED\n");
    expect_out(&run(&address, &["get", "a"]), " two  words ");
    expect_out(&run(&address, &["set", "--", "-- a key\n", ""]), "STORED\n");
    expect_out(&run(&address, &["get", "--", "-- a key\n", "a"]), "\n two  words \n");
    expect_out(
        &run(&address, &["delete", "a", "--", "-- a key\n"]),
        "DELETED\nDELETED\n",
    );
    for arguments in [["get", "none"], ["delete", "none"]] {
        expect_error(&run(&address, &arguments), 1, &["none (not found)"]);
    }
    let century_s = 100 * 365 * 24 * 3600u64;
    expect_out(
        &run(
            &address,
            &["set", "n", "7", "--ttl", &century_s.to_string(), "--flags", "3"],
        ),
        "STORED\n",
    );
    let url = address.strip_prefix("protobuf://").unwrap();
    let item = memkv::client::Client::connect(url).unwrap().get("n").unwrap().unwrap();
    let left = item.expires_at.unwrap().duration_since(SystemTime::now()).unwrap();
    // A core's clock and this one's may differ by a moment.
    assert_eq!((item.flags, left.as_secs().abs_diff(century_s) < 60), (3, true));
    expect_out(&run(&address, &["set", "b", "1", "--ttl", "1"]), "STORED\n");
    std::thread::sleep(Duration::from_millis(1100));
    expect_error(&run(&address, &["get", "b"]), 1, &["(not found)"]);
    expect_out(&run(&address, &["flush"]), "OK\n");
    let (code, out, _) = parts(&run(&address, &["get", "n"]));
    assert_eq!((code, out.as_str()), (1, ""));
    expect_out(&run(&address, &["version"]), concat!(env!("CARGO_PKG_VERSION"), "\n"));

    let lines = b"set \"a b\\n\\xff\" \"\\x00\\xff\"\nget \"a b\\n\\xff\"\nget none\nset k  v w \nget k\n";
    let output = pipe(&address, lines);
    assert_eq!(output.stdout, b"STORED\n\x00\xff\nSTORED\nv w\n");
    let (code, _, err) = parts(&output);
    assert_eq!((code, err.as_str()), (0, "memkv-cli: none (not found)\n"));
    server.stop();
}

#[test]
fn an_operator_sees_latencies_and_ranges() {
    // The counters, what latencies were, and which core has what: readable, and in columns.
    let (server, address) = start_protobuf();
    let sets: String = (0..50).map(|number| format!("set {number} x\n")).collect();
    pipe(&address, sets);
    let (code, out, err) = parts(&run(&address, &["metrics"]));
    assert_eq!((code, err.as_str()), (0, ""));
    let (counters, latencies) = out.split_once("\n\n").expect("an empty line between");
    let has = |table: &str, cells: [&str; 2]| table.lines().any(|line| line.split_whitespace().eq(cells));
    assert!(has(counters, ["cores", "2"]) && has(counters, ["sets", "50"]), "{out}");
    assert!(has(counters, ["server_version", env!("CARGO_PKG_VERSION")]), "{out}");
    let mut lines = latencies.lines();
    let heads = "latency core count min p50 p90 p99 p99.9 p99.99 max";
    assert_eq!(
        lines.next().unwrap().split_whitespace().collect::<Vec<_>>().join(" "),
        heads
    );
    let mut count = 0;
    let mut length = None;
    for line in lines {
        assert_eq!(*length.get_or_insert(line.len()), line.len(), "{out}");
        let cells: Vec<&str> = line.split_whitespace().collect();
        assert!(["own", "another"].contains(&cells[1]), "{out}");
        assert!(
            cells[3..].iter().all(|time| time.ends_with('s') && time.len() <= 6),
            "{out}"
        );
        if cells[0] == "set" {
            count += cells[2].parse::<u64>().unwrap();
        }
    }
    assert_eq!(count, 50, "{out}");

    let ports = server.core_ports();
    let expected = format!(
        "partitioner  hashed
seed         77
cores        2

first token       last token        core   port
0000000000000000  7fffffffffffffff     0  {:5}
8000000000000000  ffffffffffffffff     1  {:5}
",
        ports[0], ports[1]
    );
    expect_out(&run(&address, &["topology"]), &expected);
    server.stop();
}

#[test]
fn each_protocol_has_its_commands() {
    // Who asks for what the protocol does not have is told which one has it, before anything is sent.
    let nobody = "protobuf://127.0.0.1:9";
    for arguments in [
        ["stats"].as_slice(),
        &["incr", "k"],
        &["decr", "k"],
        &["touch", "k", "5"],
    ] {
        expect_error(
            &run(nobody, arguments),
            2,
            &[arguments[0], "needs the memcached protocol", "--server HOST:PORT"],
        );
    }
    for command in ["metrics", "topology"] {
        let words = [command, "needs the protobuf protocol", "--server protobuf://HOST:PORT"];
        expect_error(&run("127.0.0.1:9", &[command]), 2, &words);
        expect_error(&run("memcached://127.0.0.1:9", &[command]), 2, &words);
    }
    let (server, address) = start();
    let memcached = format!("memcached://{address}");
    expect_out(&run(&memcached, &["set", "k", "v"]), "STORED\n");
    expect_error(&pipe(&memcached, "topology\n"), 1, &["line 1: topology needs"]);
    server.stop();
    let (server, address) = start_protobuf();
    let (code, out, err) = parts(&pipe(&address, "incr k\nset k v\nget k\n"));
    assert_eq!((code, out.as_str()), (1, "STORED\nv\n"));
    assert!(err.contains("line 1: incr needs"), "{err}");
    server.stop();
}

#[test]
fn what_fails_over_protobuf() {
    // Refusals, a server that is none, one that hangs, and nobody at all: a clear message each.
    let (server, address) = start_protobuf();
    expect_error(&run(&address, &["get", ""]), 1, &["INVALID_ARGUMENT", "empty"]);
    let mut large = b"set large ".to_vec();
    large.resize(large.len() + (1 << 20) + 1, b'x');
    large.extend_from_slice(b"\nset k v\n");
    let (code, out, err) = parts(&pipe(&address, large));
    assert_eq!((code, out.as_str()), (1, "STORED\n"), "{err}");
    assert!(err.contains("line 1: the server answered TOO_LARGE"), "{err}");
    server.stop();
    let (code, _, err) = parts(&pipe(&address, "version\nversion\n"));
    assert_eq!((code, err.lines().count()), (1, 1), "{err}");
    let words = ["refused", "start memkv-tpc", "--server protobuf://"];
    expect_error(&run(&address, &["version"]), 1, &words);

    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("protobuf://{}", listener.local_addr().unwrap());
    let words = ["did not answer within 200ms", "--timeout", "right port"];
    expect_error(&run(&address, &["--timeout", "200ms", "version"]), 1, &words);

    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("protobuf://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let _ = stream.read(&mut [0; 64]);
        let _ = stream.write_all(&b"HTTP/1.1 400 Bad Request\r\n".repeat(10));
        let _ = stream.shutdown(Shutdown::Both);
    });
    let words = ["does not speak the protobuf protocol", "HTTP/1.1 400", "right port"];
    expect_error(&run(&address, &["version"]), 1, &words);
}

/// A server that takes no writes: its words are shown, over both protocols.
#[test]
fn a_read_only_server() {
    let config = Config {
        cores: Some(1),
        memcached: "127.0.0.1:0".parse().unwrap(),
        text: Some(Listen::Off),
        protobuf: "127.0.0.1:0".parse().unwrap(),
        json_line: Listen::Off,
        http: Listen::Off,
        grpc: Listen::Off,
        read_only: true,
        ..Config::default()
    };
    let server = Server::start(config).unwrap();
    let memcached = server.address(Protocol::Memcached).unwrap().to_string();
    let protobuf = format!("protobuf://{}", server.address(Protocol::Protobuf).unwrap());
    for address in [&memcached, &protobuf] {
        for arguments in [["set", "k", "v"].as_slice(), &["delete", "k"], &["flush"]] {
            expect_error(&run(address, arguments), 1, &["the server is read-only"]);
        }
    }
    for arguments in [["incr", "k"].as_slice(), &["touch", "k", "5"]] {
        expect_error(
            &run(&memcached, arguments),
            1,
            &["SERVER_ERROR the server is read-only"],
        );
    }
    server.stop();
}
