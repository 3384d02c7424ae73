//! Hot keys and the slow log, as clients are told of them: what is counted on which core, and where the time of slow requests
//! went. Time passes only when a test says so.

#![allow(clippy::unwrap_used, reason = "in a test, the assertion")]

mod support;

use memkv::proto::message::Command;
use memkv::protocol::Protocol;
use std::collections::BTreeMap;
use support::protobuf::{entry, get, request, set};
use support::{Client, World};

/// What `stats hotkeys` or `stats slowlog` says, by core and rank.
fn told(world: &mut World, client: Client, what: &str) -> BTreeMap<(u16, u32), BTreeMap<String, String>> {
    let answer = world.ask(client, format!("stats {what}\r\n").as_bytes());
    let answer = String::from_utf8(answer).unwrap();
    let rows = answer.strip_suffix("END\r\n").unwrap();
    let mut told: BTreeMap<_, BTreeMap<_, _>> = BTreeMap::new();
    for row in rows.lines() {
        let (name, value) = row.strip_prefix("STAT ").unwrap().split_once(' ').unwrap();
        let [core, rank, what] = name.split(':').collect::<Vec<_>>().try_into().unwrap();
        let entry = told.entry((core.parse().unwrap(), rank.parse().unwrap())).or_default();
        entry.insert(what.to_owned(), value.to_owned());
    }
    told
}

/// The slow requests of one core, newest first: command, key, how many, and the milliseconds in the queue, in execution, at
/// other cores, and on their way out.
fn slow(world: &mut World, client: Client) -> Vec<(String, String, u32, [u64; 4])> {
    let told = told(world, client, "slowlog");
    let ms = |entry: &BTreeMap<String, String>| {
        let us = |what: &str| entry[what].parse::<u64>().unwrap();
        let parts = ["queue_us", "execute_us", "hop_us", "flush_us"].map(us);
        assert_eq!(us("total_us"), parts.iter().sum::<u64>());
        parts.map(|us| (us + 500) / 1000)
    };
    let of_core = told.iter().filter(|((core, _), _)| *core == client.core);
    of_core
        .map(|(_, entry)| {
            let key = entry.get("key").cloned().unwrap_or_default();
            (
                entry["command"].clone(),
                key,
                entry["requests"].parse().unwrap(),
                ms(entry),
            )
        })
        .collect()
}

fn entry_of(command: &str, key: &str, requests: u32, ms: [u64; 4]) -> (String, String, u32, [u64; 4]) {
    (command.to_owned(), key.to_owned(), requests, ms)
}

/// A key that this core owns.
fn key_of(world: &mut World, core: u16) -> String {
    let asking = world.connect(core, Protocol::Memcached);
    let forwarded = |world: &World| world.engines[usize::from(core)].metrics.counters.forwarded;
    (0..)
        .map(|number| format!("key{number}"))
        .find(|key| {
            let before = forwarded(world);
            world.ask(asking, format!("get {key}\r\n").as_bytes());
            forwarded(world) == before
        })
        .unwrap()
}

/// A key counts on the core that owns it, whoever asks; reads and writes apart; in parts of transactions too.
#[test]
fn hot_keys_are_told_by_their_owners() {
    let mut world = World::new(2, &[]);
    let keys = [key_of(&mut world, 0), key_of(&mut world, 1)];
    let clients = [0, 1].map(|core| world.connect(core, Protocol::Memcached));
    world.ask(clients[0], b"stats reset\r\n");
    assert!(told(&mut world, clients[0], "hotkeys").is_empty());
    for client in clients {
        for _ in 0..10 {
            world.ask(client, format!("get {}\r\n", keys[0]).as_bytes());
            world.ask(client, format!("set {} 0 0 1\r\nx\r\n", keys[1]).as_bytes());
        }
    }
    // Both at one instant, and one with bytes that no word has.
    let protobuf = world.connect(0, Protocol::Protobuf);
    let both = get(&[keys[0].as_bytes(), keys[1].as_bytes()], false);
    world.ask(protobuf, &request(1, both));
    let binary = set(&[entry(b"two words\n", b"x")]);
    (0..3).for_each(|_| _ = world.ask(protobuf, &request(2, binary.clone())));
    world.advance(1000);
    let told = told(&mut world, clients[1], "hotkeys");
    let of = |key: &str| {
        let (place, entry) = told.iter().find(|(_, entry)| entry["key"] == key).unwrap();
        let number = |what: &str| entry[what].parse::<u64>().unwrap();
        (place.0, number("per_second"), number("writes_per_second"))
    };
    assert_eq!(of(&keys[0]), (0, 21, 0));
    let (core, per_second, writes) = of(&keys[1]);
    // What wrote is known of all that was asked for.
    assert_eq!((core, per_second, writes), (1, 21, 20));
    assert_eq!(of("two%20words%0A").1, 3);
    assert_eq!(told[&(0, 1)]["key"], keys[0]);
    assert_eq!(told[&(1, 1)]["key"], keys[1]);
    world.advance(120_000);
    assert!(self::told(&mut world, clients[0], "hotkeys").is_empty());
}

/// A pipeline that waits and is worked for is one entry; what is fast has none.
#[test]
fn a_slow_turn_is_told() {
    let mut world = World::new(1, &[]);
    let client = world.connect(0, Protocol::Memcached);
    world.send_slowly(client, b"get fast\r\n", 4, 5);
    world.settle();
    world.take(client);
    assert_eq!(slow(&mut world, client), []);
    world.send_slowly(client, b"set first 0 0 1\r\nx\r\nget later\r\ntouch later 5\r\n", 3, 20);
    world.settle();
    world.take(client);
    let mut expected = vec![entry_of("set", "first", 3, [3, 20, 0, 0])];
    assert_eq!(slow(&mut world, client), expected);
    // No reply at all, and no key.
    world.send_slowly(client, b"set quiet 0 0 1 noreply\r\nx\r\n", 0, 30);
    world.settle();
    world.send_slowly(client, b"version\r\n", 12, 0);
    world.settle();
    world.take(client);
    expected.insert(0, entry_of("set", "quiet", 1, [0, 30, 0, 0]));
    expected.insert(0, entry_of("other", "", 1, [12, 0, 0, 0]));
    assert_eq!(slow(&mut world, client), expected);
    let told = told(&mut world, client, "slowlog");
    let first = &told[&(0, 3)];
    assert_eq!(
        (first["protocol"].as_str(), first["client"].as_str()),
        ("memcached", "test")
    );
    // It came after the nine milliseconds of the fast one.
    assert_eq!(first["at_ms"], (support::BEGAN_MS + 9).to_string());
    world.ask(client, b"stats reset\r\n");
    assert_eq!(slow(&mut world, client), []);
}

/// Time that passes while a client does not read is the client's.
#[test]
fn a_client_that_does_not_read_is_told() {
    let mut world = World::new(1, &[]);
    let [client, watcher] = [0, 0].map(|core| world.connect(core, Protocol::Memcached));
    world.ask(client, &[b"set k 0 0 1000\r\n", &[b'x'; 1000][..], b"\r\n"].concat());
    world.stall(client, true);
    world.send(client, b"get k\r\nget k\r\n");
    world.settle();
    world.advance(40);
    // Sent while the first still waits: its own piece, with its own time.
    world.send(client, b"get other\r\n");
    world.settle();
    world.advance(15);
    assert_eq!(slow(&mut world, watcher), []);
    world.stall(client, false);
    // Piece by piece.
    world.send_bytes_max = 500;
    world.settle();
    let told = slow(&mut world, watcher);
    assert_eq!(told.len(), 2, "{told:?}");
    assert_eq!(told[1], entry_of("get", "k", 2, [0, 0, 0, 55]));
    assert_eq!(told[0], entry_of("get", "other", 1, [0, 0, 0, 15]));
}

/// A request that another core is slow to answer says so, on the core that has the connection; one that waits for credit
/// waits in the queue.
#[test]
fn a_slow_hop_is_told() {
    let mut world = World::new(2, &["--mesh-requests-max", "2"]);
    let far = key_of(&mut world, 1);
    let [client, watcher] = [0, 0].map(|core| world.connect(core, Protocol::Memcached));
    world.send(client, format!("get {far}\r\nget near\r\n").as_bytes());
    world.pass(30);
    world.settle();
    world.take(client);
    let mut expected = vec![entry_of("get", &far, 2, [0, 0, 30, 0])];
    assert_eq!(slow(&mut world, watcher), expected);
    // Two of the three have credit.
    world.send(client, format!("gets {far}\r\n").repeat(3).as_bytes());
    world.pass(25);
    world.turn();
    world.pass(50);
    world.settle();
    world.take(client);
    let told = slow(&mut world, watcher);
    assert_eq!(told.len(), 2, "{told:?}");
    let (command, key, requests, [queue, execute, hop, flush]) = told[0].clone();
    assert_eq!((command.as_str(), key, requests), ("get", far.clone(), 3));
    assert_eq!((queue + hop, execute, flush), (75, 0, 0));
    assert!(queue >= 25, "{told:?}");
    expected.insert(0, told[0].clone());
    // The other core has no connection that was slow.
    let other = world.connect(1, Protocol::Memcached);
    assert_eq!(slow(&mut world, other), []);
    assert_eq!(slow(&mut world, watcher), expected);
}

/// Transactions and requests to all cores count too.
#[test]
fn requests_to_several_cores_are_told() {
    let mut world = World::new(2, &[]);
    let keys = [key_of(&mut world, 0), key_of(&mut world, 1)];
    let watcher = world.connect(0, Protocol::Memcached);
    let protobuf = world.connect(0, Protocol::Protobuf);
    let entries = keys.each_ref().map(|key| entry(key.as_bytes(), b"x"));
    world.send(protobuf, &request(1, set(&entries)));
    world.pass(20);
    world.settle();
    world.take(protobuf);
    let mut expected = vec![entry_of("set", &keys[0], 1, [0, 0, 20, 0])];
    assert_eq!(slow(&mut world, watcher), expected);
    world.send(protobuf, &request(2, Command::Metrics(memkv::proto::Metrics {})));
    world.pass(11);
    world.settle();
    world.take(protobuf);
    expected.insert(0, entry_of("other", "", 1, [0, 0, 11, 0]));
    assert_eq!(slow(&mut world, watcher), expected);
    // Behind it, while it is under way, another: it waits.
    world.send(
        protobuf,
        &[request(3, set(&entries)), request(4, get(&[keys[1].as_bytes()], false))].concat(),
    );
    world.pass(15);
    world.turn();
    world.pass(15);
    world.settle();
    world.take(protobuf);
    let told = slow(&mut world, watcher);
    assert_eq!(told.len(), 3, "{told:?}");
    assert_eq!((told[0].1.as_str(), told[0].2), (keys[0].as_str(), 2));
    let [queue, execute, hop, flush] = told[0].3;
    assert_eq!((queue + hop, execute, flush), (30, 0, 0), "{told:?}");
}

/// A value that comes slowly is not slow, however large; when it is whole, time counts.
#[test]
fn slow_arrival_is_not_slow() {
    let mut world = World::new(2, &[]);
    let client = world.connect(0, Protocol::Memcached);
    for bytes in [100, 100_000] {
        let value = vec![b'x'; bytes];
        for piece in [
            &format!("set k 0 0 {bytes}\r").into_bytes()[..],
            b"\n",
            &value[..50],
            &value[50..],
        ] {
            world.send(client, piece);
            world.advance(1000);
        }
        assert_eq!(world.ask(client, b"\r\n"), b"STORED\r\n");
    }
    assert_eq!(slow(&mut world, client), []);
    world.send(client, b"set k 0 0 100000\r\n");
    world.send(client, &vec![b'x'; 100_000]);
    world.settle();
    world.pass(1000);
    world.send_slowly(client, b"\r\n", 11, 0);
    world.settle();
    world.take(client);
    assert_eq!(slow(&mut world, client), [entry_of("set", "k", 1, [11, 0, 0, 0])]);
}

#[test]
fn options_of_the_slow_log() {
    for (options, expected) in [
        (&["--slow-log-threshold", "0"][..], &[][..]),
        (&["--slow-log-threshold", "1s"], &[]),
        (&["--slow-log-threshold", "25ms", "--slow-log-len", "2"], &["c", "b"]),
    ] {
        let mut world = World::new(1, options);
        let client = world.connect(0, Protocol::Memcached);
        for key in ["a", "b", "c"] {
            world.send_slowly(client, format!("get {key}\r\n").as_bytes(), 0, 25);
            world.settle();
            world.take(client);
            world.ask(client, b"get fast\r\n");
        }
        let keys: Vec<String> = slow(&mut world, client).into_iter().map(|(_, key, ..)| key).collect();
        assert_eq!(keys, expected, "{options:?}");
    }
}
