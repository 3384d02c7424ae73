//! What connections take of the memory limit, and how they get by when it runs out.

#![allow(clippy::unwrap_used, reason = "in a test, the assertion")]

mod support;

use memkv::budget::Shortage;
use memkv::partition::RangeTable;
use memkv::proto::{Code, KeyResult};
use memkv::protocol::Protocol;
use support::protobuf::{ask as ask_protobuf, entry, get, request, responses, results, set};
use support::{Client, TOKEN_SEED, World};

const RESERVE: u64 = 2 << 20;
const OPTIONS: &[&str] = &["--max-memory", "64m"];
const NO_MEMORY: &str = "{\"status\": \"Error\", \"mesg\": \"the server's memory limit is reached\"}\n";
const OK: &str = "{\"status\": \"Ok\"}\n";

/// Cores with a reserve for connections, of which one has used a good part: its client reads nothing.
fn besieged(cores: u16, options: &[&str]) -> World {
    let mut world = World::new(cores, &[OPTIONS, options].concat());
    world.pool.keep_for_connections(RESERVE);
    let hog = world.connect(0, Protocol::Memcached);
    world.ask(hog, &stored(b"k", 3000));
    world.stall(hog, true);
    world.send(hog, &b"get k\r\n".repeat(300));
    world.advance(1000);
    world
}

fn stored(key: &[u8], bytes: usize) -> Vec<u8> {
    let head = format!("set {} 0 0 {bytes}\r\n", String::from_utf8_lossy(key));
    [head.as_bytes(), &vec![b'v'; bytes], b"\r\n"].concat()
}

/// Has only `bytes` be left of the memory limit, and nothing with the cores.
fn leave(world: &mut World, bytes: u64) {
    world.pool.set_other(world.pool.limit());
    world.advance(1);
    let pool = &world.pool;
    pool.set_other(pool.limit() + RESERVE - pool.missing() - bytes);
    // The cores see it in their next turn of another millisecond.
    world.pass(1);
}

#[test]
fn connections_are_charged() {
    for cores in [1, 2] {
        let mut world = World::new(cores, OPTIONS);
        let charged = |world: &World| -> u64 { world.engines.iter().map(|engine| engine.connection_bytes()).sum() };
        assert_eq!(charged(&world), 0);
        let client = world.connect(0, Protocol::Memcached);
        let values: Vec<Vec<u8>> = (0..100).map(|number| format!("k{number}").into_bytes()).collect();
        for key in &values {
            assert_eq!(world.ask(client, &stored(key, 4000)), b"STORED\r\n");
        }
        world.advance(1000);
        let idle = charged(&world);
        assert!((500..20_000).contains(&idle), "{idle}");
        // A value that is sent by reference is nobody's copy.
        world.ask(client, &stored(b"large", 500_000));
        world.stall(client, true);
        world.send(client, b"get large\r\n");
        world.advance(1000);
        assert!(charged(&world) < idle + 100_000, "{}", charged(&world));
        world.send(
            client,
            &[b"get ".to_vec(), values.join(&b' '), b"\r\n".to_vec()].concat(),
        );
        world.advance(1000);
        assert!((400_000..1_000_000).contains(&charged(&world)), "{}", charged(&world));
        let request = world.connect(0, Protocol::JsonLine);
        world.send(request, &[b'x'; 100_000]);
        world.settle();
        assert!(charged(&world) > 500_000);
        world.stall(client, false);
        world.drop_connection(request);
        world.advance(1000);
        assert!(charged(&world) < 100_000, "{}", charged(&world));
        assert_eq!(world.take(client).len(), 902_024);
        world.drop_connection(client);
        world.settle();
        assert_eq!(charged(&world), 0);
    }
}

/// At a shortage a connection begins nothing while replies wait, and all is answered in the end.
#[test]
fn replies_that_wait_are_few() {
    for cores in [1, 2] {
        let mut world = besieged(cores, &[]);
        assert_eq!(world.pool.shortage(), Shortage::No);
        let client = world.connect(0, Protocol::Memcached);
        world.ask(client, b"get missing\r\n");
        for (left, shortage, most) in [
            (RESERVE / 3, Shortage::Some, 40_000),
            (RESERVE / 10, Shortage::Severe, 8_000),
        ] {
            leave(&mut world, left);
            assert_eq!(world.pool.shortage(), shortage);
            assert!(world.engines[0].refuses_connections(), "new connections are refused");
            world.advance(1000);
            let before = world.engines[0].connection_bytes();
            world.stall(client, true);
            world.send(client, &b"get k\r\n".repeat(100));
            world.advance(1000);
            let grown = world.engines[0].connection_bytes() - before;
            assert!((3000..most).contains(&grown), "{grown} bytes for {most}");
            world.stall(client, false);
            world.settle();
            let reply = b"VALUE k 0 3000\r\n".len() + 3000 + b"\r\nEND\r\n".len();
            assert_eq!(world.take(client).len(), 100 * reply);
            world.pool.set_other(0);
        }
        assert!(!world.engines[0].refuses_connections());
    }
}

#[test]
fn requests_in_flight_are_few() {
    let mut world = besieged(2, &[]);
    let table = RangeTable::even(TOKEN_SEED, 2, 2);
    let far = (0..)
        .map(|number| format!("key{number}"))
        .find(|key| table.core_of(table.shard_of(table.place(key.as_bytes()).token)).0 == 1)
        .unwrap();
    let client = world.connect(0, Protocol::Memcached);
    let requests = format!("get {far}\r\n").repeat(100);
    for (left, most) in [(RESERVE, 100), (RESERVE / 3, 16), (RESERVE / 10, 1)] {
        leave(&mut world, left);
        let before = world.engines[0].metrics.counters.forwarded;
        world.send(client, requests.as_bytes());
        assert_eq!(world.engines[0].metrics.counters.forwarded - before, most);
        world.settle();
        assert_eq!(world.take(client), b"END\r\n".repeat(100));
    }
}

/// Values that are copied need room, and it is known how much before they are all there; large ones do not.
#[test]
fn wide_reads_need_room() {
    for cores in [1, 2] {
        let mut world = besieged(cores, &[]);
        let client = world.connect(0, Protocol::Protobuf);
        let keys: Vec<Vec<u8>> = (0..1000).map(|number| format!("wide{number}").into_bytes()).collect();
        let names: Vec<&[u8]> = keys.iter().map(Vec::as_slice).collect();
        for some in keys.chunks(100) {
            let entries: Vec<_> = some.iter().map(|key| entry(key, &[7; 4000])).collect();
            let answers = ask_protobuf(&mut world, client, &request(1, set(&entries)), 0);
            assert!(results(&answers[0]).iter().all(|result| result.code() == Code::Ok));
        }
        let large = [entry(b"large0", &[8; 1_000_000]), entry(b"large1", &[9; 1_000_000])];
        for large in &large {
            ask_protobuf(&mut world, client, &request(1, set(std::slice::from_ref(large))), 0);
        }
        let codes = |world: &mut World, names: &[&[u8]]| -> Vec<Code> {
            let answers = ask_protobuf(world, client, &request(2, get(names, false)), 0);
            results(&answers[0]).iter().map(KeyResult::code).collect()
        };
        for left in [RESERVE, RESERVE / 3, RESERVE / 10] {
            leave(&mut world, left);
            assert_eq!(codes(&mut world, &names[..300]), vec![Code::OutOfMemory; 300], "{left}");
            assert_eq!(codes(&mut world, &[b"large0", b"large1"]), [Code::Ok; 2], "{left}");
            assert_eq!(codes(&mut world, &names[..2]).len(), 2);
        }
        leave(&mut world, RESERVE);
        assert_eq!(
            codes(&mut world, &names[..20]),
            [Code::Ok; 20],
            "for these there is room"
        );
        world.pool.set_other(0);
        assert_eq!(codes(&mut world, &names), vec![Code::Ok; 1000]);
    }
}

/// So do requests of many small values, which are copied on their way.
#[test]
fn wide_writes_need_room() {
    for cores in [1, 2] {
        let mut world = besieged(cores, &[]);
        let client = world.connect(0, Protocol::Protobuf);
        let entries: Vec<_> = (0..1000u32)
            .map(|number| entry(&number.to_le_bytes(), &[7; 3000]))
            .collect();
        // The request itself is collected into what is left to data.
        leave(&mut world, RESERVE + (7 << 19));
        let answers = ask_protobuf(&mut world, client, &request(1, set(&entries)), 0);
        let codes: Vec<Code> = results(&answers[0]).iter().map(KeyResult::code).collect();
        assert_eq!(codes, vec![Code::OutOfMemory; 1000]);
        world.pool.set_other(0);
        let answers = ask_protobuf(&mut world, client, &request(1, set(&entries)), 0);
        assert!(results(&answers[0]).iter().all(|result| result.code() == Code::Ok));
    }
}

/// A line that does not end is not kept for ever when memory is short.
#[test]
fn half_sent_requests() {
    let mut world = besieged(1, &[]);
    let half = |world: &mut World, bytes: usize| -> Client {
        let client = world.connect(0, Protocol::JsonLine);
        world.send(client, &[b"PUT key ".to_vec(), vec![b'x'; bytes]].concat());
        world.settle();
        client
    };
    let before = [
        half(&mut world, 10_000),
        half(&mut world, 50_000),
        half(&mut world, 100_000),
    ];
    for (left, closed) in [(RESERVE / 3, 1), (RESERVE / 10, 2)] {
        leave(&mut world, left);
        // Those that are silent are looked at now and then.
        world.advance(600);
        world.settle();
        let (kept, ended) = before.split_at(3 - closed);
        assert!(kept.iter().all(|client| !world.is_closed(*client)));
        for client in ended {
            assert!(world.is_closed(*client));
            let said = world.take(*client);
            assert!(said.is_empty() || said == NO_MEMORY.as_bytes());
        }
        let next = half(&mut world, 100_000);
        assert_eq!((world.take(next), world.is_closed(next)), (NO_MEMORY.into(), true));
    }
    world.pool.set_other(0);
    assert_eq!(world.ask(before[0], b"\nGET key\n").len(), OK.len() + 10_000 + 31);
    let next = half(&mut world, 100_000);
    assert_eq!(world.ask(next, b"\n"), OK.as_bytes());
}

/// The JSON-line protocol copies values of any size: each needs room, also what several requests of one turn copy together.
#[test]
fn large_values_in_json_need_room() {
    for cores in [1, 2] {
        let mut world = besieged(cores, &[]);
        let client = world.connect(0, Protocol::JsonLine);
        // In JSON, twice as long.
        let put = format!("PUT key {}\n", "\"".repeat(200_000));
        assert_eq!(world.ask(client, put.as_bytes()), OK.as_bytes());
        let answer = world.ask(client, b"GET key\n");
        assert_eq!(answer.len(), 400_000 + 31);
        world.stall(client, true);
        leave(&mut world, RESERVE);
        world.send(client, &b"GET key\n".repeat(16));
        world.settle();
        world.stall(client, false);
        world.pool.set_other(0);
        world.settle();
        let answers = world.take(client);
        let refused = answers
            .split_inclusive(|byte| *byte == b'\n')
            .filter(|line| *line == NO_MEMORY.as_bytes())
            .count();
        assert!((8..16).contains(&refused), "{refused} of 16");
        assert_eq!(answers.len(), (16 - refused) * answer.len() + refused * NO_MEMORY.len());
    }
}

/// An announced value that there is no memory for is refused in its protocol, and the connection goes on.
#[test]
fn announced_values_need_memory() {
    let mut world = besieged(1, &[]);
    let client = world.connect(0, Protocol::Memcached);
    leave(&mut world, RESERVE);
    assert_eq!(
        world.ask(client, &[stored(b"big", 100_000), b"mn\r\n".to_vec()].concat()),
        b"SERVER_ERROR out of memory storing object\r\nMN\r\n"
    );
    let protobuf = world.connect(0, Protocol::Protobuf);
    let large = request(7, set(&[entry(b"big", &[1; 100_000])]));
    world.send(protobuf, &large);
    world.settle();
    let answers = responses(&world.take(protobuf));
    assert_eq!((answers[0].id, answers[0].code()), (7, Code::OutOfMemory));
}
