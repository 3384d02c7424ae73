//! The protobuf protocol against its own definition: what a generated client sends and understands, however the bytes are
//! cut into pieces and however many cores share the keys.

#![allow(clippy::unwrap_used, reason = "in a test, the assertion")]

mod support;

use memkv::proto::condition::Is;
use memkv::proto::entry::Expiry;
use memkv::proto::message::Command;
use memkv::proto::{
    Code, Condition, Delete, Entry, Flush, KeyResult, Message as Request, Metrics, Ping, Response, Topology,
};
use memkv::protocol::Protocol;
use prost::Message;
use support::protobuf::{
    PIECES, ask, delete, entry, everywhere, found, get, only, only_if, request, responses, results, set,
};
use support::{BEGAN_MS, Client, World};

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
            expiry: Some(Expiry::ExpiresAtMs(1)),
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
            [failed.clone(), failed]
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
        Request {
            id: 9,
            ..Request::default()
        }
        .encode(&mut unknown)
        .unwrap();
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
            (b"GET / HTTP/1.0\r\n\r\n", 0),
            // Without its verb this is a Flush among fields of later versions.
            (
                b"OPTIONS /abc:BPxPxPxPxPxPxPxPxPxPxPxPxPxPxPxPxPxPxPxPxPxPxPxPxPxPxPxPxPx HTTP/1.1\r\n\r\n",
                0,
            ),
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
                // Long enough to be collected first, alone and among others.
                let large = vec![round as u8; 5000];
                bytes.extend(request(round as u64, set(&[entry(&key(number, 9), &large)])));
                let both = [entry(&key(number, 10), &large), entry(&key(number, 11), b"")];
                bytes.extend(request(round as u64, set(&both)));
            }
            world.send(*client, &bytes);
            // What was sent before the end is answered all the same.
            world.end(*client);
        }
        world.settle();
        for client in &clients {
            let answers = responses(&world.take(*client));
            assert_eq!(answers.len(), 120, "{options:?}");
            for (round, answers) in answers.chunks(6).enumerate() {
                assert!(answers.iter().all(|answer| answer.id == round as u64));
                assert_eq!(results(&answers[1]), [found(&key(round, 0))]);
                let expected: Vec<KeyResult> = (0..8).map(|at| found(&key(round, at))).collect();
                assert_eq!(results(&answers[3]), expected);
            }
        }
        assert!(world.engines.iter().all(|engine| engine.is_quiet()), "{options:?}");
    }
}

/// A client that goes away in the middle of everything leaves nothing behind: no session, no credit, no charge.
#[test]
fn clients_that_vanish() {
    let entries: Vec<Entry> = (0..30u8).map(|number| entry(&[number], &[number; 50])).collect();
    let keys: Vec<[u8; 1]> = (0..30u8).map(|number| [number]).collect();
    let keys: Vec<&[u8]> = keys.iter().map(<[u8; 1]>::as_slice).collect();
    let large = request(2, set(&[entry(b"large", &[7; 6000]), entry(b"other", &[8; 6000])]));
    let bytes = [request(1, set(&entries)), request(1, get(&keys, true)), large].concat();
    for options in [&[][..], &["--mesh-requests-max", "1"]] {
        for sent in [1, 10, 1000, 5000, 9000, bytes.len()] {
            for turns in 0..8 {
                let mut world = World::new(3, options);
                let clients: Vec<Client> = (0..3).map(|core| world.connect(core, Protocol::Protobuf)).collect();
                let before = world.charged();
                for client in &clients {
                    world.send(*client, &bytes[..sent.min(bytes.len())]);
                }
                for _ in 0..turns {
                    world.turn();
                }
                for client in &clients {
                    world.drop_connection(*client);
                }
                world.settle();
                assert!(
                    world
                        .engines
                        .iter()
                        .all(|engine| engine.connections() == 0 && engine.is_quiet())
                );
                let next = world.connect(0, Protocol::Protobuf);
                let flush = request(3, Command::Flush(Flush { delay_ms: 0 }));
                assert_eq!(ask(&mut world, next, &flush, 0)[0].id, 3);
                world.settle();
                assert_eq!(before, world.charged(), "{sent} bytes, {turns} turns");
            }
        }
    }
}

/// Whatever one client asks for, what is kept for it has a bound that an option names.
#[test]
fn bounds_of_one_request() {
    let options = ["--response-bytes-max", "100k", "--request-keys-max", "50"];
    everywhere(&options, |ask| {
        let values: Vec<Entry> = (0..6u8).map(|number| entry(&[number], &[number; 30_000])).collect();
        for value in &values {
            assert_eq!(
                results(&ask(&request(1, set(std::slice::from_ref(value))))[0]),
                [only(Code::Ok)]
            );
        }
        let keys: Vec<&[u8]> = values.iter().map(|entry| entry.key.as_slice()).collect();
        let refused = &ask(&request(7, get(&keys, false)))[0];
        assert_eq!(
            (refused.id, refused.code(), refused.results.len()),
            (7, Code::TooLarge, 0)
        );
        assert_eq!(results(&ask(&request(8, get(&keys[..3], false)))[0]).len(), 3);
        let conditions = vec![Condition::default(); 51];
        let keys = vec![b"k".to_vec()];
        let refused = &ask(&request(9, Command::Delete(Delete { keys, conditions })))[0];
        assert_eq!(refused.code(), Code::InvalidArgument);
        assert!(
            refused.message.contains("more than 50 conditions"),
            "{}",
            refused.message
        );
    });
}

/// Where protobuf leaves an encoding to the client, each is understood alike.
#[test]
fn unusual_encodings() {
    let frame = |message: &[u8]| [&[message.len() as u8][..], message].concat();
    everywhere(&[], |ask| {
        // The number of field 1 in two bytes.
        for command in [&[0x32, 0][..], &[0x12, 3, 0x0a, 1, b'k'], &[0x42, 0], &[0x12, 0]] {
            let answer = &ask(&frame(&[&[0x88, 0x00, 0x07], command].concat()))[0];
            assert_eq!(answer.id, 7, "{command:?}");
        }
        // The id last, and twice: the last one counts.
        let answer = &ask(&frame(&[0x08, 5, 0x32, 0, 0x08, 6]))[0];
        assert_eq!((answer.id, answer.code()), (6, Code::Ok));
        // Two pieces of one Condition are merged: absent, and nothing.
        ask(&request(1, set(&[entry(b"k", b"v")])));
        let with_condition = |condition: &[u8]| {
            let mut of = vec![];
            entry(b"k", b"w").encode(&mut of).unwrap();
            of.extend_from_slice(condition);
            frame(&[&[0x1a, of.len() as u8 + 2, 0x0a, of.len() as u8], of.as_slice()].concat())
        };
        let merged = with_condition(&[0x32, 2, 0x08, 1, 0x32, 0]);
        assert_eq!(results(&ask(&merged)[0]), [only(Code::ConditionFailed)]);
        // A condition of a later version must not be taken for none.
        let later = with_condition(&[0x32, 2, 0x20, 1]);
        assert_eq!(ask(&later)[0].code(), Code::InvalidArgument);
        assert_eq!(results(&ask(&request(1, get(&[b"k"], false)))[0]), [found(b"v")]);
    });
}
