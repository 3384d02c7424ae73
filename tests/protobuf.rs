//! The protobuf protocol against its own definition: what a generated client sends and understands, however the bytes are
//! cut into pieces and however many cores share the keys.

#![allow(clippy::unwrap_used, reason = "in a test, the assertion")]

mod support;

use memkv::proto::condition::Is;
use memkv::proto::entry::Expiry;
use memkv::proto::message::Command;
use memkv::proto::{
    Code, Condition, Delete, Entry, Flush, Get, KeyResult, Message as Request, Metrics, Ping, Response, Set, Topology,
};
use memkv::protocol::Protocol;
use prost::Message;
use support::{BEGAN_MS, Client, World};

/// Sizes of the pieces that requests arrive in; 0 stands for all at once.
const PIECES: [usize; 7] = [0, 4096, 1000, 100, 10, 3, 1];

fn request(id: u64, command: impl Into<Option<Command>>) -> Vec<u8> {
    let command = command.into();
    Request { id, command }.encode_length_delimited_to_vec()
}

fn get(keys: &[&[u8]], with_version: bool) -> Command {
    let keys = keys.iter().map(|key| key.to_vec()).collect();
    Command::Get(Get { keys, with_version })
}

fn entry(key: &[u8], value: &[u8]) -> Entry {
    Entry {
        key: key.to_vec(),
        value: value.to_vec(),
        ..Entry::default()
    }
}

fn set(entries: &[Entry]) -> Command {
    let entries = entries.to_vec();
    Command::Set(Set { entries })
}

fn delete(keys: &[&[u8]]) -> Command {
    let keys = keys.iter().map(|key| key.to_vec()).collect();
    let conditions = vec![];
    Command::Delete(Delete { keys, conditions })
}

fn only_if(is: Is) -> Option<Condition> {
    Some(Condition { is: Some(is) })
}

fn found(value: &[u8]) -> KeyResult {
    KeyResult {
        value: value.to_vec().into(),
        ..KeyResult::default()
    }
}

fn only(code: Code) -> KeyResult {
    KeyResult {
        code: code.into(),
        ..KeyResult::default()
    }
}

/// Every response in `bytes`, which must end with one.
fn responses(bytes: &[u8]) -> Vec<Response> {
    let mut rest = bytes;
    let mut all = vec![];
    while !rest.is_empty() {
        all.push(Response::decode_length_delimited(&mut rest).unwrap());
    }
    all
}

/// Sends in pieces and returns the responses.
fn ask(world: &mut World, client: Client, bytes: &[u8], piece: usize) -> Vec<Response> {
    for piece in bytes.chunks(if piece == 0 { bytes.len() } else { piece }) {
        world.send(client, piece);
        if bytes.len() < 10_000 {
            world.settle();
        }
    }
    world.settle();
    responses(&world.take(client))
}

/// Plays a conversation over worlds of 1 and 3 cores and all sizes of pieces, each time from the start.
fn everywhere(options: &[&str], conversation: impl Fn(&mut dyn FnMut(&[u8]) -> Vec<Response>)) {
    for cores in [1, 3] {
        for piece in PIECES {
            let mut world = World::new(cores, options);
            let client = world.connect(0, Protocol::Protobuf);
            conversation(&mut |bytes| ask(&mut world, client, bytes, piece));
            for engine in &world.engines {
                assert!(engine.is_quiet(), "{cores} cores, pieces of {piece}");
            }
        }
    }
}

fn results(response: &Response) -> &[KeyResult] {
    assert_eq!((response.code(), response.message.as_str()), (Code::Ok, ""));
    &response.results
}

#[test]
fn single_keys() {
    everywhere(&[], |ask| {
        for number in 0..20u8 {
            // Keys and values of any bytes: zeros, line ends, and what protobuf itself uses.
            let key = [0, b'\r', b'\n', b' ', 0xff, number];
            let value: Vec<u8> = (0..=number).rev().collect();
            let id = u64::MAX - u64::from(number);
            let pipeline = [
                request(id, get(&[&key], false)),
                request(id - 1, set(&[entry(&key, &value)])),
                request(id - 2, get(&[&key], false)),
                request(0, delete(&[&key])),
                request(5, delete(&[&key])),
            ];
            let answers = ask(&pipeline.concat());
            let ids: Vec<u64> = answers.iter().map(|answer| answer.id).collect();
            assert_eq!(ids, [id, id - 1, id - 2, 0, 5]);
            let expected = [
                only(Code::NotFound),
                only(Code::Ok),
                found(&value),
                only(Code::Ok),
                only(Code::NotFound),
            ];
            for (answer, expected) in answers.iter().zip(expected) {
                assert_eq!(results(answer), [expected]);
            }
        }
    });
}

#[test]
fn many_keys_answer_in_order() {
    everywhere(&[], |ask| {
        let keys: Vec<Vec<u8>> = (0..100).map(|number| format!("key{number}").into_bytes()).collect();
        let entries: Vec<Entry> = keys.iter().map(|key| entry(key, &key.repeat(5))).collect();
        let asked: Vec<&[u8]> = keys.iter().map(Vec::as_slice).chain([b"none".as_slice()]).collect();
        let gone: Vec<&[u8]> = keys[10..20]
            .iter()
            .map(Vec::as_slice)
            .chain([b"none".as_slice()])
            .collect();
        let answers = ask(&[
            request(1, set(&entries)),
            request(2, get(&asked, false)),
            request(3, delete(&gone)),
            request(4, get(&asked[8..12], false)),
            request(5, get(&asked[..1], false)),
        ]
        .concat());
        assert_eq!(results(&answers[0]), vec![only(Code::Ok); 100]);
        let mut expected: Vec<KeyResult> = keys.iter().map(|key| found(&key.repeat(5))).collect();
        expected.push(only(Code::NotFound));
        assert_eq!(results(&answers[1]), expected);
        let mut deleted = vec![only(Code::Ok); 10];
        deleted.push(only(Code::NotFound));
        assert_eq!(results(&answers[2]), deleted);
        let missing = only(Code::NotFound);
        assert_eq!(
            results(&answers[3]),
            [expected[8].clone(), expected[9].clone(), missing.clone(), missing]
        );
        assert_eq!(results(&answers[4]), &expected[..1]);
    });
}

#[test]
fn a_key_twice_in_one_set_keeps_the_later_value() {
    everywhere(&[], |ask| {
        let twice = set(&[entry(b"k", b"1"), entry(b"other", b"x"), entry(b"k", b"2")]);
        let answers = ask(&[request(1, twice), request(2, get(&[b"k"], false))].concat());
        assert_eq!(results(&answers[1]), [found(b"2")]);
    });
}

#[test]
fn flags_expiry_and_versions() {
    everywhere(&[], |ask| {
        let moment = BEGAN_MS + 60_000;
        let full = Entry {
            flags: u32::MAX,
            expiry: Some(Expiry::ExpiresAtMs(moment)),
            with_version: true,
            ..entry(b"full", b"value")
        };
        let at_once = Entry {
            expiry: Some(Expiry::TtlMs(0)),
            ..entry(b"at once", b"value")
        };
        let soon = Entry {
            expiry: Some(Expiry::TtlMs(5_000)),
            ..entry(b"soon", b"value")
        };
        let answers = ask(&[
            request(1, set(&[full])),
            request(2, get(&[b"full"], true)),
            request(3, get(&[b"full"], false)),
            request(4, set(&[at_once, soon])),
            request(5, get(&[b"at once", b"soon"], false)),
        ]
        .concat());
        let version = results(&answers[0])[0].version;
        assert_ne!(version, 0);
        let full = KeyResult {
            flags: u32::MAX,
            expires_at_ms: moment,
            version,
            ..found(b"value")
        };
        assert_eq!(results(&answers[1]), std::slice::from_ref(&full));
        assert_eq!(results(&answers[2]), [KeyResult { version: 0, ..full }]);
        let soon = KeyResult {
            expires_at_ms: BEGAN_MS + 5_000,
            ..found(b"value")
        };
        assert_eq!(results(&answers[4]), [only(Code::NotFound), soon]);
    });
}

#[test]
fn conditions() {
    everywhere(&[], |ask| {
        let conditional = |key: &[u8], value: &[u8], is| Entry {
            condition: only_if(is),
            with_version: true,
            ..entry(key, value)
        };
        let (failed, ok) = (only(Code::ConditionFailed), only(Code::Ok));
        let one = |answers: &[Response]| results(&answers[0])[0].clone();
        assert_eq!(
            one(&ask(&request(1, set(&[conditional(b"k", b"1", Is::Present(true))])))),
            failed
        );
        assert_eq!(
            one(&ask(&request(2, set(&[conditional(b"k", b"1", Is::Version(77))])))),
            failed
        );
        let stored = one(&ask(&request(3, set(&[conditional(b"k", b"1", Is::Absent(true))]))));
        assert_eq!((stored.code(), stored.version > 0), (Code::Ok, true));
        assert_eq!(
            one(&ask(&request(4, set(&[conditional(b"k", b"2", Is::Absent(true))])))),
            failed
        );
        let newer = one(&ask(&request(
            5,
            set(&[conditional(b"k", b"2", Is::Version(stored.version))]),
        )));
        assert_eq!((newer.code(), newer.version > stored.version), (Code::Ok, true));
        assert_eq!(
            one(&ask(&request(
                6,
                set(&[conditional(b"k", b"3", Is::Version(stored.version))])
            ))),
            failed
        );
        // False asks for nothing.
        let indifferent = Entry {
            condition: only_if(Is::Absent(false)),
            ..entry(b"other", b"x")
        };
        let both = set(&[indifferent.clone(), indifferent]);
        assert_eq!(results(&ask(&request(7, both))[0]), [ok.clone(), ok.clone()]);

        let deleting = |keys: &[&[u8]], conditions: &[Is]| {
            let conditions = conditions.iter().map(|is| Condition { is: Some(*is) }).collect();
            let keys = keys.iter().map(|key| key.to_vec()).collect();
            request(8, Command::Delete(Delete { keys, conditions }))
        };
        let old = [Is::Version(stored.version), Is::Present(true)];
        assert_eq!(
            results(&ask(&deleting(&[b"k", b"none"], &old))[0]),
            [failed, only(Code::NotFound)]
        );
        let new = [Is::Version(newer.version), Is::Present(true)];
        assert_eq!(results(&ask(&deleting(&[b"k", b"other"], &new))[0]), [ok.clone(), ok]);
        for (wrong, reason) in [
            (deleting(&[b"k", b"other"], &new[..1]), "1 conditions for 2 keys"),
            (deleting(&[b"k"], &[Is::Absent(true)]), "absent"),
        ] {
            let refused = &ask(&wrong)[0];
            assert_eq!((refused.id, refused.code()), (8, Code::InvalidArgument));
            assert!(refused.message.contains(reason), "{}", refused.message);
        }
    });
}

#[test]
fn large_values_alone_and_among_others() {
    for cores in [1, 3] {
        for piece in [0, 8192, 1000] {
            let mut world = World::new(cores, &[]);
            let client = world.connect(0, Protocol::Protobuf);
            for (size, number) in [(4000, 1u8), (4090, 2), (4096, 3), (20_000, 4), (1 << 20, 5)] {
                let value: Vec<u8> = (0..size).map(|at: u32| (at as u8).wrapping_mul(number)).collect();
                let keys = [[b'a', number], [b'b', number], [b'c', number]];
                let alone = request(u64::MAX, set(&[entry(&keys[0], &value)]));
                let among = request(300, set(&[entry(&keys[1], &value), entry(&keys[2], &value[1..])]));
                let keys = keys.each_ref().map(|key| key.as_slice());
                let bytes = [
                    alone,
                    among,
                    request(3, get(&keys, false)),
                    request(4, get(&keys[..1], false)),
                ]
                .concat();
                let answers = ask(&mut world, client, &bytes, piece);
                assert_eq!((answers[0].id, results(&answers[0]).len()), (u64::MAX, 1));
                assert_eq!((answers[1].id, results(&answers[1]).len()), (300, 2));
                assert!(
                    results(&answers[2]) == [found(&value), found(&value), found(&value[1..])],
                    "{size}"
                );
                assert!(results(&answers[3]) == [found(&value)], "{size}");
            }
            assert!(world.engines.iter().all(|engine| engine.is_quiet()));
        }
    }
}

#[test]
fn refused_requests_leave_the_stream_in_step() {
    let options = [
        "--item-size-max",
        "10k",
        "--request-bytes-max",
        "30k",
        "--request-keys-max",
        "3",
    ];
    everywhere(&options, |ask| {
        let mut unknown = vec![];
        Request { id: 9, command: None }.encode(&mut unknown).unwrap();
        prost::encoding::bytes::encode(99, &b"of later".to_vec(), &mut unknown);
        let mut framed = vec![unknown.len() as u8];
        framed.extend_from_slice(&unknown);
        let two_commands = [
            request(9, Command::Ping(Ping {})),
            request(9, Command::Metrics(Metrics {})),
        ];
        let mut two = vec![(two_commands[0].len() + two_commands[1].len() - 2) as u8];
        two_commands
            .iter()
            .for_each(|command| two.extend_from_slice(&command[1..]));
        let keys: [&[u8]; 4] = [b"1", b"2", b"3", b"4"];
        let long_key = vec![b'k'; 251];
        for (wrong, id, code, reason) in [
            (request(9, None), 9, Code::UnknownCommand, "no command"),
            (vec![0], 0, Code::UnknownCommand, "no command"),
            (framed, 9, Code::UnknownCommand, "no command"),
            (two, 9, Code::Malformed, "more than one command"),
            (vec![3, 0xff, 0xff, 0xff], 0, Code::Malformed, "not a Message"),
            (vec![4, 8, 9, 0x12, 50], 9, Code::Malformed, "longer than its message"),
            (vec![4, 8, 9, 0x10, 50], 9, Code::Malformed, "wrong type"),
            (vec![5, 8, 9, 0x12, 1, 0x08], 9, Code::Malformed, "not a Message"),
            (request(9, get(&[], false)), 9, Code::InvalidArgument, "no key"),
            (
                request(9, get(&[b"k", b""], false)),
                9,
                Code::InvalidArgument,
                "key 2 is empty",
            ),
            (
                request(9, get(&[&long_key], false)),
                9,
                Code::InvalidArgument,
                "251 bytes, and the most is 250",
            ),
            (
                request(9, set(&[entry(b"", b"v")])),
                9,
                Code::InvalidArgument,
                "key 1 is empty",
            ),
            (request(9, set(&[])), 9, Code::InvalidArgument, "no key"),
            (request(9, delete(&[b""])), 9, Code::InvalidArgument, "key 1 is empty"),
            (
                request(9, get(&keys, false)),
                9,
                Code::InvalidArgument,
                "more than 3 keys",
            ),
            (
                request(9, set(&[entry(b"k", b"v"), entry(b"l", &[0; 10_241])])),
                9,
                Code::TooLarge,
                "entry 2 has 10241 bytes",
            ),
            (
                request(9, set(&[entry(b"k", &[0; 40_000])])),
                9,
                Code::TooLarge,
                "the most is 30720",
            ),
        ] {
            let bytes = [
                request(1, Command::Ping(Ping {})),
                wrong,
                request(2, get(&[b"k", b"l"], false)),
            ]
            .concat();
            let answers = ask(&bytes);
            assert_eq!((answers[0].id, answers[0].code()), (1, Code::Ok), "{reason}");
            assert_eq!((answers[1].id, answers[1].code()), (id, code), "{reason}");
            assert!(answers[1].message.contains(reason), "{}", answers[1].message);
            assert_eq!(answers[2].id, 2);
            assert_eq!(
                results(&answers[2]),
                [only(Code::NotFound), only(Code::NotFound)],
                "{reason}"
            );
        }
    });
}

/// What cannot be told apart from the next request ends the connection, behind the answers to what came before.
#[test]
fn a_stream_out_of_step_is_closed() {
    for piece in PIECES {
        let mut world = World::new(2, &[]);
        for (bytes, words) in [
            (&[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1, 2, 3][..], 1),
            (&[0x80, 0x80, 0x80, 0x80, 0x80, 0x01], 1),
            (
                b"GET / HTTP/1.1\r\nHost: localhost:7001\r\nUser-Agent: a browser of these days\r\n\r\n",
                0,
            ),
            (
                b"POST / HTTP/1.1\r\nHost: localhost:7001\r\nUser-Agent: a browser\r\nContent-Length: 10\r\n\r\n",
                0,
            ),
        ] {
            let client = world.connect(0, Protocol::Protobuf);
            let ping = request(7, Command::Ping(Ping {}));
            let answers = ask(&mut world, client, &[&ping, bytes].concat(), piece);
            assert_eq!((answers[0].id, answers[0].code()), (7, Code::Ok));
            assert_eq!(answers.len(), 1 + words, "{}", bytes.escape_ascii());
            assert!(answers[1..].iter().all(|answer| answer.code() == Code::Malformed));
            assert!(world.is_closed(client));
        }
    }
}

#[test]
fn no_memory_is_told_and_the_stream_goes_on() {
    everywhere(&["--max-memory", "3m", "--shards", "1"], |ask| {
        let large = vec![1; 900_000];
        let mut refused = 0;
        for number in 0..6u8 {
            let answers = ask(&[
                request(70, set(&[entry(&[b'k', number], &large)])),
                request(71, Command::Ping(Ping {})),
            ]
            .concat());
            assert_eq!((answers[0].id, answers[1].id), (70, 71));
            let of_key = answers[0].results.first().map_or(Code::Ok, KeyResult::code);
            refused += u32::from(answers[0].code() == Code::OutOfMemory || of_key == Code::OutOfMemory);
        }
        assert!((1..6).contains(&refused), "{refused}");
    });
}

#[test]
fn flush_empties_all_cores() {
    everywhere(&[], |ask| {
        let keys: [&[u8]; 4] = [b"1", b"2", b"3", b"4"];
        let entries = keys.map(|key| entry(key, b"v"));
        let flush = |delay_ms| request(2, Command::Flush(Flush { delay_ms }));
        let answers = ask(&[request(1, set(&entries)), flush(0), request(3, get(&keys, false))].concat());
        assert_eq!((answers[1].id, results(&answers[1]).len()), (2, 0));
        assert_eq!(results(&answers[2]), vec![only(Code::NotFound); 4]);
        let answers = ask(&[request(4, set(&entries)), flush(1000), request(5, get(&keys, false))].concat());
        assert_eq!(results(&answers[2]), vec![found(b"v"); 4]);
    });
    let mut world = World::new(3, &[]);
    let client = world.connect(1, Protocol::Protobuf);
    let delayed = [
        request(1, set(&[entry(b"k", b"v")])),
        request(2, Command::Flush(Flush { delay_ms: 1000 })),
    ];
    ask(&mut world, client, &delayed.concat(), 0);
    world.advance(1001);
    let answers = ask(&mut world, client, &request(3, get(&[b"k"], false)), 0);
    assert_eq!(results(&answers[0]), [only(Code::NotFound)]);
}

#[test]
fn metrics_are_merged() {
    let mut world = World::new(3, &[]);
    let client = world.connect(0, Protocol::Protobuf);
    for number in 0..50u8 {
        let key = [b'k', number];
        ask(&mut world, client, &request(1, set(&[entry(&key, b"v")])), 0);
        ask(&mut world, client, &request(2, get(&[&key], false)), 0);
    }
    ask(&mut world, client, &request(2, get(&[b"missing"], false)), 0);
    let answers = ask(&mut world, client, &request(3, Command::Metrics(Metrics {})), 0);
    let metrics = answers[0].metrics.as_ref().unwrap();
    assert_eq!((answers[0].id, metrics.cores), (3, 3));
    for (name, value) in [
        ("get_hits", 50),
        ("get_misses", 1),
        ("sets", 50),
        ("items", 50),
        ("requests", 101),
    ] {
        assert_eq!(metrics.counters[name], value, "{name}");
    }
    let mut gets = 0;
    for latency in &metrics.latencies {
        let mut encoded = latency.histogram.as_slice();
        let histogram: hdrhistogram::Histogram<u64> = hdrhistogram::serialization::Deserializer::new()
            .deserialize(&mut encoded)
            .unwrap();
        assert_eq!((histogram.len(), histogram.max()), (latency.count, latency.max_ns));
        assert_eq!(histogram.value_at_quantile(0.99), latency.p99_ns);
        gets += if latency.command == "get" { latency.count } else { 0 };
    }
    assert_eq!(gets, 51);
    // Some keys belong to this core, and some do not.
    for forwarded in [false, true] {
        assert!(metrics.latencies.iter().any(|latency| latency.forwarded == forwarded));
    }
}

#[test]
fn topology_covers_all_tokens() {
    for (cores, shards) in [(1, "1"), (3, "3"), (3, "8")] {
        let mut world = World::new(cores, &["--shards", shards]);
        world.engines[0].set_core_ports(std::sync::Arc::new([7101, 7102]));
        let client = world.connect(0, Protocol::Protobuf);
        let answers = ask(&mut world, client, &request(6, Command::Topology(Topology {})), 0);
        let topology = answers[0].topology.as_ref().unwrap();
        assert_eq!((answers[0].id, topology.cores, topology.seed), (6, u32::from(cores), 7));
        assert_eq!(topology.core_ports, [7101, 7102]);
        assert_eq!(topology.ranges.len().to_string(), shards);
        assert_eq!(topology.ranges[0].start, 0);
        assert!(
            topology
                .ranges
                .windows(2)
                .all(|pair| pair[0].start < pair[1].start && pair[0].core <= pair[1].core)
        );
        assert_eq!(topology.ranges.last().unwrap().core, u32::from(cores) - 1);
    }
}

/// Groups, commands and broadcasts of several clients between cores whose links have room for next to nothing.
#[test]
fn narrow_links_lose_nothing() {
    for options in [
        ["--mesh-requests-max", "1"],
        ["--mesh-bytes-max", "1"],
        ["--requests-in-flight-max", "1"],
    ] {
        let mut world = World::new(3, &options);
        let clients: Vec<Client> = (0..6)
            .map(|number| world.connect(number % 3, Protocol::Protobuf))
            .collect();
        let key = |client: usize, number: usize| format!("client{client}key{number}").into_bytes();
        for (number, client) in clients.iter().enumerate() {
            let mut bytes = vec![];
            for round in 0..20 {
                let entries: Vec<Entry> = (0..8).map(|at| entry(&key(number, at), &key(round, at))).collect();
                let keys: Vec<Vec<u8>> = (0..8).map(|at| key(number, at)).collect();
                let keys: Vec<&[u8]> = keys.iter().map(Vec::as_slice).collect();
                bytes.extend(request(round as u64, set(&entries)));
                bytes.extend(request(round as u64, get(&keys[..1], false)));
                bytes.extend(request(round as u64, Command::Metrics(Metrics {})));
                bytes.extend(request(round as u64, get(&keys, false)));
            }
            world.send(*client, &bytes);
        }
        world.settle();
        for client in &clients {
            let answers = responses(&world.take(*client));
            assert_eq!(answers.len(), 80, "{options:?}");
            for (round, answers) in answers.chunks(4).enumerate() {
                assert!(answers.iter().all(|answer| answer.id == round as u64));
                assert_eq!(results(&answers[1]), [found(&key(round, 0))]);
                let expected: Vec<KeyResult> = (0..8).map(|at| found(&key(round, at))).collect();
                assert_eq!(results(&answers[3]), expected);
            }
        }
        assert!(world.engines.iter().all(|engine| engine.is_quiet()), "{options:?}");
    }
}

/// A client that goes away in the middle of everything leaves nothing behind.
#[test]
fn clients_that_vanish() {
    for sent in [1, 10, 1000, 5000, 9000] {
        let mut world = World::new(3, &[]);
        let client = world.connect(0, Protocol::Protobuf);
        let charged = |world: &World| world.engines.iter().map(|engine| engine.connections()).sum::<u64>();
        let entries: Vec<Entry> = (0..30u8).map(|number| entry(&[number], &[number; 50])).collect();
        let keys: Vec<[u8; 1]> = (0..30u8).map(|number| [number]).collect();
        let keys: Vec<&[u8]> = keys.iter().map(<[u8; 1]>::as_slice).collect();
        let large = request(2, set(&[entry(b"large", &[7; 6000])]));
        let bytes = [request(1, set(&entries)), request(1, get(&keys, true)), large].concat();
        world.send(client, &bytes[..sent.min(bytes.len())]);
        world.drop_connection(client);
        world.settle();
        assert_eq!(charged(&world), 0);
        assert!(world.engines.iter().all(|engine| engine.is_quiet()));
        let next = world.connect(0, Protocol::Protobuf);
        assert_eq!(ask(&mut world, next, &request(3, Command::Ping(Ping {})), 0)[0].id, 3);
    }
}
