//! A server, or a core, that takes no writes: each protocol says so in its own words, nothing is changed, and the stream
//! stays in step, however the requests are cut into pieces and wherever their keys belong.

#![allow(clippy::unwrap_used, reason = "in a test, the assertion")]

mod support;

use memkv::encoding::Rope;
use memkv::engine::Loaded;
use memkv::model::{Command, Condition, Delete, Op, Put, Transaction, TxnEnd, Value};
use memkv::proto::condition::Is;
use memkv::proto::message::Command as Request;
use memkv::proto::operation::Operation as Of;
use memkv::proto::{self, Code};
use memkv::protocol::Protocol;
use memkv::protocol::call::{self, Outcome};
use support::protobuf::{delete, entry, get, only, only_if, request, responses, results, set};
use support::{Client, World};

/// Sizes of the pieces that requests come in.
const PIECES: [usize; 6] = [usize::MAX, 1000, 100, 10, 3, 1];

/// More keys than one core owns.
const KEYS: usize = 40;

fn key(number: usize) -> String {
    format!("key{number}")
}

fn value(number: usize) -> String {
    // A number, so that there is something to count; every tenth is large.
    format!("{number}").repeat(if number % 10 == 7 { 5000 } else { 1 })
}

/// `cores` cores with these options, and what was loaded into them.
fn loaded(cores: u16, options: &[&str]) -> World {
    let mut world = World::new(cores, options);
    for number in 0..KEYS {
        let (key, value) = (key(number), value(number));
        let engines = world.engines.iter_mut();
        let outcomes = engines.map(|engine| engine.load(key.as_bytes(), value.as_bytes()));
        let stored = outcomes.filter(|outcome| *outcome == Loaded::Stored);
        assert_eq!(stored.count(), 1, "{key} has one owner");
    }
    world
}

/// All there is, with what could have been changed of it.
fn contents(world: &mut World) -> Vec<u8> {
    let client = world.connect(0, Protocol::Memcached);
    let asked = (0..KEYS).map(|number| format!("mg {} v f t s k u\r\n", key(number)));
    let asked: String = asked.collect();
    let contents = world.ask(client, asked.as_bytes());
    assert!(contents.starts_with(b"VA 1 f0 t-1 s1 kkey0\r\n0\r\n"));
    contents
}

fn refusals(world: &World) -> u64 {
    let counters = world.engines.iter().map(|engine| &engine.metrics.counters);
    counters.map(|counters| counters.read_only_refusals).sum()
}

fn send_in_pieces(world: &mut World, client: Client, bytes: &[u8], piece: usize) -> Vec<u8> {
    // Megabytes byte by byte would show nothing that kilobytes do not.
    let piece = if bytes.len() > 20_000 { piece.max(1000) } else { piece };
    for piece in bytes.chunks(piece) {
        world.send(client, piece);
        world.turn();
    }
    world.settle();
    world.take(client)
}

/// Asks all of it, one by one and as one pipeline, on 1 and 2 cores, over a connection to each, in pieces of all sizes: it is
/// answered so, `refused` of it are counted, and nothing is changed.
fn refused_everywhere(protocol: Protocol, conversation: &[(Vec<u8>, Vec<u8>)], refused: u64) {
    let (asked, expected): (Vec<_>, Vec<_>) = conversation.iter().cloned().unzip();
    for (cores, core) in [(1, 0), (2, 0), (2, 1)] {
        for piece in PIECES {
            let mut world = loaded(cores, &["--read-only"]);
            let before = contents(&mut world);
            let client = world.connect(core, protocol);
            for (asked, expected) in conversation {
                let answer = send_in_pieces(&mut world, client, asked, piece);
                assert_eq!(
                    answer.escape_ascii().to_string(),
                    expected.escape_ascii().to_string(),
                    "to {} on core {core} of {cores}, in pieces of {piece}",
                    asked[..asked.len().min(100)].escape_ascii()
                );
            }
            let answer = send_in_pieces(&mut world, client, &asked.concat(), piece);
            assert!(answer == expected.concat(), "as one pipeline, in pieces of {piece}");
            // What was to happen later does not happen either.
            world.advance(60_000);
            assert_eq!(
                refusals(&world),
                2 * refused,
                "core {core} of {cores}, pieces of {piece}"
            );
            assert!(contents(&mut world) == before, "something was changed");
            assert!(world.engines.iter().all(|engine| engine.is_quiet()));
        }
    }
}

fn texts(conversation: &[(&str, &str)]) -> Vec<(Vec<u8>, Vec<u8>)> {
    let bytes = |text: &str| text.as_bytes().to_vec();
    let all = conversation.iter().map(|(asked, answer)| (bytes(asked), bytes(answer)));
    all.collect()
}

#[test]
fn memcached() {
    const NO: &str = "SERVER_ERROR the server is read-only\r\n";
    let refused = [
        "set key1 0 0 1\r\nx\r\n",
        "add new 0 0 1\r\nx\r\n",
        "replace key1 0 0 1\r\nx\r\n",
        "append key1 0 0 1\r\nx\r\n",
        "prepend key1 0 0 1\r\nx\r\n",
        "cas key1 0 0 1 5\r\nx\r\n",
        "delete key1\r\n",
        "delete nothing\r\n",
        "incr key1 1\r\n",
        "decr key2 1\r\n",
        "touch key1 10\r\n",
        "gat 10 key1\r\n",
        // One line, not one for each key, and no END behind it.
        "gat 10 key1 key2 nothing key3\r\n",
        "gats 10 key1 key2 \r\n",
        "gat 10 key1 key2  \n",
        "flush_all\r\n",
        "flush_all 10\r\n",
        "ms key1 1\r\nx\r\n",
        "ms key1 1 q\r\nx\r\n",
        "md key1\r\n",
        "md key1 q\r\n",
        "md key1 I T10\r\n",
        "md key1 x\r\n",
        "ma key1\r\n",
        "ma new N0 J5\r\n",
        "mg key1 v T10\r\n",
        "mg new v N10\r\n",
        "mg key1 v R10\r\n",
    ];
    let mut conversation = texts(&refused.map(|asked| (asked, NO)));
    let silent = [
        "set key1 0 0 1 noreply\r\nx\r\n",
        "delete key1 noreply\r\n",
        "incr key1 1 noreply\r\n",
        "touch key1 1 noreply\r\n",
        "flush_all noreply\r\n",
    ];
    conversation.extend(texts(&silent.map(|asked| (asked, ""))));
    // The values are swallowed: 1,500,000 bytes are over the limit of a value, too.
    for (length, noreply) in [(10_000, false), (10_000, true), (1_500_000, false), (1_500_000, true)] {
        let end = if noreply { " noreply" } else { "" };
        let asked = format!("set key1 0 0 {length}{end}\r\n{}\r\n", "v".repeat(length));
        conversation.extend(texts(&[(&asked, if noreply { "" } else { NO })]));
    }
    for length in [10_000, 1_500_000] {
        let asked = format!("ms key1 {length} c\r\n{}\r\n", "v".repeat(length));
        conversation.extend(texts(&[(&asked, NO)]));
    }
    let count = conversation.len() as u64;
    // `gat` counts key by key.
    let more_keys = 3 + 1 + 1;
    conversation.extend(texts(&[
        ("set key1 0 0 3\r\nxyzab", "CLIENT_ERROR bad data chunk\r\n"),
        (
            "get key1 nothing key3\r\n",
            "VALUE key1 0 1\r\n1\r\nVALUE key3 0 1\r\n3\r\nEND\r\n",
        ),
        ("mg key1 v s f t k\r\n", "VA 1 s1 f0 t-1 kkey1\r\n1\r\n"),
        ("mg nothing v\r\n", "EN\r\n"),
        ("mn\r\n", "MN\r\n"),
        ("gat 10\r\n", "END\r\n"),
        ("gat\r\n", "ERROR\r\n"),
        ("gat 10 \r\n", "END\r\n"),
        ("verbosity 1\r\n", "OK\r\n"),
    ]));
    refused_everywhere(Protocol::Memcached, &conversation, count + more_keys);

    let mut world = loaded(2, &["--read-only"]);
    let client = world.connect(1, Protocol::Memcached);
    let versions = String::from_utf8(world.ask(client, b"gets key1 key2\r\n")).unwrap();
    let numbers: Vec<&str> = versions
        .lines()
        .filter_map(|line| line.strip_prefix("VALUE "))
        .collect();
    assert!(
        numbers.len() == 2 && numbers.iter().all(|line| !line.ends_with(" 0")),
        "{versions}"
    );
    assert_eq!(world.ask(client, b"set key1 0 0 1\r\nx\r\n"), NO.as_bytes());
    for (asked, line) in [
        ("stats\r\n", "STAT read_only_refusals 1\r\n"),
        ("stats\r\n", "STAT curr_items 40\r\n"),
        ("stats settings\r\n", "STAT read_only yes\r\n"),
    ] {
        let told = String::from_utf8(world.ask(client, asked.as_bytes())).unwrap();
        assert!(told.contains(line), "{told}");
    }
    let mut world = World::new(1, &[]);
    let client = world.connect(0, Protocol::Memcached);
    let told = String::from_utf8(world.ask(client, b"stats settings\r\n")).unwrap();
    assert!(told.contains("STAT read_only no\r\n"), "{told}");
}

#[test]
fn text() {
    let large = format!("set key1 10000\r\n{}\r\n", "v".repeat(10_000));
    let refused = texts(&[
        ("set key1 1\r\nx\r\n", "NOT-STORED\r\n"),
        ("set new 1\r\nx\r\n", "NOT-STORED\r\n"),
        (&large, "NOT-STORED\r\n"),
        ("delete\r\n", "INVALID REQUEST\r\n"),
    ]);
    let read = texts(&[
        ("get key1\r\n", "VALUE key1 1 \r\n1\r\nEND\r\n"),
        ("get new\r\n", "VALUE new 0 \r\n\r\nEND\r\n"),
    ]);
    refused_everywhere(Protocol::Text, &[refused.clone(), read].concat(), refused.len() as u64);
}

#[test]
fn json_line() {
    const OK: &str = "{\"status\": \"Ok\"}\n";
    const NO: &str = "{\"status\": \"Error\", \"mesg\": \"the server is read-only\"}\n";
    const NONE: &str = "{\"status\": \"Error\", \"mesg\": \"the server is read-only: nothing was applied\"}\n";
    let found = |number: usize| format!("{{\"status\": \"Ok\", \"result\": \"{}\"}}\n", value(number));
    let large = format!("PUT key1 {}\n", "v".repeat(10_000));
    let refused = texts(&[
        ("PUT key1 x\n", NO),
        ("PUT new x\n", NO),
        (&large, NO),
        ("DEL key1\n", NO),
    ]);
    let commits = texts(&[
        ("START\n", OK),
        ("PUT key1 x\n", OK),
        ("DEL key2\n", OK),
        ("GET key1\n", "{\"status\": \"Ok\", \"result\": \"x\"}\n"),
        ("COMMIT\n", NONE),
        ("START CHECKED\n", OK),
        ("GET key3\n", &found(3)),
        ("PUT key4 x\n", OK),
        ("COMMIT\n", NONE),
    ]);
    let fine = texts(&[
        ("START CHECKED\n", OK),
        ("GET key5\n", &found(5)),
        ("GET key6\n", &found(6)),
        ("COMMIT\n", OK),
        ("START\n", OK),
        ("PUT key1 x\n", OK),
        ("ROLLBACK\n", OK),
        ("START\n", OK),
        ("COMMIT\n", OK),
        ("GET key1\n", &found(1)),
    ]);
    let count = refused.len() as u64 + 2;
    refused_everywhere(Protocol::JsonLine, &[refused, commits, fine].concat(), count);
}

fn response(id: u64, response: proto::Response) -> Vec<u8> {
    use prost::Message;
    proto::Response { id, ..response }.encode_length_delimited_to_vec()
}

#[test]
fn protobuf() {
    let of_keys = |keys: usize| proto::Response {
        results: vec![only(Code::ReadOnly); keys],
        ..proto::Response::default()
    };
    let whole = || proto::Response {
        code: Code::ReadOnly.into(),
        message: "the server is read-only".to_owned(),
        ..proto::Response::default()
    };
    let absent = proto::Entry {
        condition: only_if(Is::Absent(true)),
        ..entry(b"key1", b"x")
    };
    let operation = |operation| proto::Operation {
        operation: Some(operation),
        with_version: false,
    };
    let many: Vec<proto::Entry> = (0..KEYS).map(|number| entry(key(number).as_bytes(), b"x")).collect();
    let keys: Vec<String> = (0..KEYS).map(key).collect();
    let keys: Vec<&[u8]> = keys.iter().map(String::as_bytes).collect();
    let flush = |delay_ms| Request::Flush(proto::Flush { delay_ms });
    // Its comparison does not hold, so that it would only read.
    let txn = proto::Txn {
        compare: vec![proto::Compare {
            key: b"key1".to_vec(),
            condition: only_if(Is::Absent(true)),
        }],
        success: vec![operation(Of::Set(entry(b"key2", b"x")))],
        failure: vec![operation(Of::Get(b"key3".to_vec()))],
    };
    let large = vec![1; 10_000];
    let refused = [
        (set(&[entry(b"key1", b"x")]), of_keys(1)),
        (set(&[entry(b"new", &large)]), of_keys(1)),
        (set(std::slice::from_ref(&absent)), of_keys(1)),
        (set(&many), of_keys(KEYS)),
        (set(&[entry(b"key1", &large), entry(b"key2", &large)]), of_keys(2)),
        (set(&[absent, entry(b"key2", b"x")]), of_keys(2)),
        (delete(&[b"key1"]), of_keys(1)),
        (delete(&[b"nothing"]), of_keys(1)),
        (delete(&keys), of_keys(KEYS)),
        (Request::Txn(txn.clone()), whole()),
        (flush(0), whole()),
        (flush(1000), whole()),
    ];
    let count = refused.len() as u64;
    let found = (0..KEYS).map(|number| support::protobuf::found(value(number).as_bytes()));
    let found: Vec<proto::KeyResult> = found.collect();
    let only_reads = proto::Txn {
        success: txn.failure.clone(),
        ..txn
    };
    let of = |results: &[proto::KeyResult]| proto::Response {
        results: results.to_vec(),
        ..proto::Response::default()
    };
    let read = [
        (get(&keys, false), of(&found)),
        (get(&[b"key7"], false), of(&found[7..8])),
        (
            Request::Txn(only_reads),
            proto::Response {
                txn: Some(proto::TxnReport { succeeded: false }),
                ..of(&found[3..4])
            },
        ),
        (Request::Ping(proto::Ping {}), proto::Response::default()),
    ];
    let conversation: Vec<(Vec<u8>, Vec<u8>)> = (1..)
        .zip(refused.into_iter().chain(read))
        .map(|(id, (asked, answer))| (request(id, asked), response(id, answer)))
        .collect();
    refused_everywhere(Protocol::Protobuf, &conversation, count);
}

/// What this process's own handlers of HTTP and gRPC are told.
#[test]
fn calls() {
    let put = Put::new(Value::Small(b"x"));
    let writes = |key| Command { key, op: Op::Put(put) };
    let reads = |key| Command {
        key,
        op: Op::Get {
            version: false,
            effects: None,
        },
    };
    let deletes = Command {
        key: b"key1",
        op: Op::Delete(Delete::default()),
    };
    for (cores, core) in [(1, 0), (2, 0), (2, 1)] {
        let mut world = loaded(cores, &["--read-only"]);
        let before = contents(&mut world);
        let client = world.connect(core, Protocol::Http);
        let mut ask = |asked: &[u8]| {
            let mut rope = Rope::default();
            rope.push(&world.ask(client, asked));
            rope
        };
        for command in [writes(b"key1"), writes(b"new"), deletes] {
            let mut asked = vec![];
            call::push_request(&mut asked, &command);
            let (answer, rest) = call::read_answer(ask(&asked));
            assert_eq!((answer.outcome, answer.created), (Outcome::ReadOnly, false));
            assert_eq!(rest.len(), 26, "nothing but the answer");
        }
        let mut asked = vec![];
        call::push_announced(&mut asked, b"key1", put, 100_000);
        let (answer, _) = call::read_answer(ask(&asked));
        assert_eq!(answer.outcome, Outcome::ReadOnly, "the value has not come yet");
        let mut asked = vec![1; 100_000];
        call::push_request(&mut asked, &reads(b"key3"));
        let (answer, _) = call::read_answer(ask(&asked));
        assert_eq!((answer.outcome, &answer.value[..]), (Outcome::Done, &b"3"[..]));
        let txn = Transaction {
            checks: &[],
            success: &[reads(b"key1"), writes(b"key2")],
            failure: &[],
        };
        let mut asked = vec![];
        call::push_transaction(&mut asked, &txn);
        let answer = call::read_txn_answer(ask(&asked));
        assert_eq!((answer.end, answer.answers.len()), (TxnEnd::ReadOnly, 0));
        assert_eq!(refusals(&world), 5);
        assert!(contents(&mut world) == before);
    }
}

/// A large value that will be refused is not collected first.
#[test]
fn announced_values_take_no_memory() {
    for (protocol, header) in [
        (Protocol::Memcached, "set key1 0 0 1000000\r\n"),
        (Protocol::Memcached, "ms key1 1000000\r\n"),
        (Protocol::Text, "set key1 1000000\r\n"),
    ] {
        let mut world = loaded(2, &["--read-only"]);
        let charged = |world: &World| world.engines.iter().map(|engine| engine.charged_bytes()).sum::<u64>();
        let client = world.connect(0, protocol);
        let _ = world.ask(client, b"get nothing\r\n");
        let before = charged(&world);
        assert!(!world.ask(client, header.as_bytes()).is_empty(), "refused at once");
        for _ in 0..9 {
            assert!(world.ask(client, &[b'v'; 100_000]).is_empty());
            assert!(charged(&world) < before + 65_536, "{header}");
        }
        let _ = world.ask(client, &[b'v'; 100_000]);
        assert!(world.ask(client, b"\r\n").is_empty());
        assert!(
            !world.ask(client, b"get key1\r\n").is_empty(),
            "and it goes on behind it"
        );
    }
}

/// One core refuses: its keys cannot be written, from wherever; those of the other one can, and what concerns both is refused.
#[test]
fn one_core_of_two() {
    let mut world = loaded(2, &[]);
    let own = |world: &mut World, core: usize| -> Vec<String> {
        let mine = |key: &String| world.engines[core].load(key.as_bytes(), b"0") == Loaded::Stored;
        (0..KEYS).map(key).filter(mine).collect()
    };
    let (healthy, failed) = (own(&mut world, 0), own(&mut world, 1));
    assert!(healthy.len() > 2 && failed.len() > 2);
    world.engines[1].refuse_writes(true);
    let large = "v".repeat(10_000);
    for core in [0, 1] {
        let client = world.connect(core, Protocol::Memcached);
        for (key, answer) in [
            (&healthy[0], "STORED\r\n"),
            (&failed[0], "SERVER_ERROR the server is read-only\r\n"),
        ] {
            for value in ["x", &large] {
                let asked = format!("set {key} 0 0 {}\r\n{value}\r\n", value.len());
                assert_eq!(world.ask(client, asked.as_bytes()), answer.as_bytes(), "{core}, {key}");
            }
        }
        let stored = world.ask(client, format!("set {} 0 0 1\r\n0\r\n", healthy[0]).as_bytes());
        assert_eq!(stored, b"STORED\r\n");
        for flush in ["flush_all\r\n", "flush_all 5\r\n"] {
            let answer = world.ask(client, flush.as_bytes());
            assert_eq!(answer, b"SERVER_ERROR the server is read-only\r\n");
        }
        // Also where half of it could have been done.
        world.advance(10_000);

        let client = world.connect(core, Protocol::Protobuf);
        let mut ask = |command| responses(&world.ask(client, &request(1, command))).remove(0);
        let (a, b) = (healthy[1].as_bytes(), failed[1].as_bytes());
        let both = ask(set(&[entry(a, b"x"), entry(b, b"x")]));
        assert_eq!(results(&both), [only(Code::ReadOnly), only(Code::ReadOnly)]);
        let both = ask(delete(&[a, b]));
        assert_eq!(results(&both), [only(Code::ReadOnly), only(Code::ReadOnly)]);
        // What the failed core only reads may decide about the healthy one.
        let txn = |is| {
            Request::Txn(proto::Txn {
                compare: vec![proto::Compare {
                    key: b.to_vec(),
                    condition: only_if(is),
                }],
                success: vec![proto::Operation {
                    operation: Some(Of::Set(entry(a, b"0"))),
                    with_version: false,
                }],
                failure: vec![],
            })
        };
        assert!(ask(txn(Is::Present(true))).txn.unwrap().succeeded);
        assert!(!ask(txn(Is::Absent(true))).txn.unwrap().succeeded);
        let all: Vec<&[u8]> = healthy.iter().chain(&failed).map(String::as_bytes).collect();
        let found = vec![support::protobuf::found(b"0"); all.len()];
        assert_eq!(results(&ask(get(&all, false))), found);
    }
    // A delayed flush that only the healthy core had noted counts once more when its time comes.
    assert_eq!(refusals(&world), 2 * (2 + 2 + 1 + 2));

    // A flush that was accepted before the core failed is refused at its time; and all is well when it has recovered.
    world.engines[1].refuse_writes(false);
    let client = world.connect(1, Protocol::Memcached);
    assert_eq!(world.ask(client, b"flush_all 5\r\n"), b"OK\r\n");
    world.engines[1].refuse_writes(true);
    world.advance(10_000);
    let all: Vec<&str> = healthy.iter().chain(&failed).map(String::as_str).collect();
    let asked = format!("get {}\r\n", all.join(" "));
    let found = String::from_utf8(world.ask(client, asked.as_bytes())).unwrap();
    assert_eq!(found.matches("VALUE ").count(), all.len());
    world.engines[1].refuse_writes(false);
    let asked = format!("set {} 0 0 1\r\nx\r\nflush_all\r\n{asked}", failed[0]);
    assert_eq!(world.ask(client, asked.as_bytes()), b"STORED\r\nOK\r\nEND\r\n");
    assert!(world.engines.iter().all(|engine| engine.is_quiet()));
}

/// What a command asks for decides, not how its reply is to look.
#[test]
fn what_is_a_write() {
    use memkv::model::{Deadline, GetEffects, NewVersion};
    let asks = |op| Command { key: b"k", op }.asks_for_a_change();
    let get = |effects| asks(Op::Get { version: true, effects });
    let none = GetEffects::default();
    assert!(!get(None) && !get(Some(none)) && !asks(Op::Inspect));
    assert!(!get(Some(GetEffects {
        keep_access: true,
        ..none
    })));
    for effects in [
        GetEffects {
            touch: Some(Deadline::Never),
            ..none
        },
        GetEffects {
            create: Some((Deadline::Never, NewVersion::OnDemand)),
            ..none
        },
        GetEffects {
            refresh_below_s: Some(1),
            ..none
        },
    ] {
        assert!(get(Some(effects)), "{effects:?}");
    }
    assert!(asks(Op::Touch(Deadline::Never)));
    assert!(asks(Op::Put(Put {
        condition: Condition::Absent,
        ..Put::new(Value::Small(b""))
    })));
}
