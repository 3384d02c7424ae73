//! Traffic between cores under pressure: nothing lost, nothing out of order, nobody stuck, also when a link has room for one
//! request only; and a connection that does not read bounds what it can hold.

#![allow(clippy::unwrap_used, reason = "in a test, the assertion")]

mod support;

use memkv::protocol::Protocol;
use support::World;

/// A random number generator that a seed repeats.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit as u64) as usize
    }
}

/// Many clients on all cores pipeline sets and gets of their own keys, in pieces, some slow to read. Each must get exactly
/// its own answers in its own order.
fn soak(seed: u64, cores: u16, options: &[&str], rounds: usize) {
    let mut random = Random(seed);
    let mut world = World::new(cores, options);
    world.send_bytes_max = 100;
    let clients: Vec<_> = (0..30)
        .map(|number| world.connect(number % cores, Protocol::Memcached))
        .collect();
    let mut expected: Vec<Vec<u8>> = vec![vec![]; clients.len()];
    let mut received: Vec<Vec<u8>> = vec![vec![]; clients.len()];
    let mut pending: Vec<Vec<u8>> = vec![vec![]; clients.len()];
    for round in 0..rounds {
        for (number, client) in clients.iter().enumerate() {
            for _ in 0..random.below(6) {
                let key = format!("{number}:{}", random.below(50));
                // Some values are large enough to travel by reference.
                let length = [10, 100, 5000][random.below(3)];
                let value = format!("{key}/{round}/")
                    .into_bytes()
                    .into_iter()
                    .cycle()
                    .take(length)
                    .collect::<Vec<u8>>();
                pending[number].extend_from_slice(format!("set {key} 0 0 {length}\r\n").as_bytes());
                pending[number].extend_from_slice(&value);
                pending[number].extend_from_slice(format!("\r\nget {key} {key}\r\n").as_bytes());
                expected[number].extend_from_slice(b"STORED\r\n");
                for _ in 0..2 {
                    expected[number].extend_from_slice(format!("VALUE {key} 0 {length}\r\n").as_bytes());
                    expected[number].extend_from_slice(&value);
                    expected[number].extend_from_slice(b"\r\n");
                }
                expected[number].extend_from_slice(b"END\r\n");
            }
            let piece = random.below(4000).min(pending[number].len());
            // A runtime stops reading a connection when the engine asks for it.
            if world.is_readable(*client) {
                let bytes: Vec<u8> = pending[number].drain(..piece).collect();
                world.send(*client, &bytes);
            }
            world.stall(*client, random.below(5) == 0);
        }
        for _ in 0..random.below(3) {
            world.turn();
        }
    }
    for _ in 0..1_000_000 {
        for (number, client) in clients.iter().enumerate() {
            world.stall(*client, false);
            if world.is_readable(*client) && !pending[number].is_empty() {
                let piece = pending[number].len().min(4000);
                let bytes: Vec<u8> = pending[number].drain(..piece).collect();
                world.send(*client, &bytes);
            }
        }
        let any = world.turn();
        for (number, client) in clients.iter().enumerate() {
            received[number].extend(world.take(*client));
        }
        if !any && pending.iter().all(Vec::is_empty) {
            break;
        }
    }
    for number in 0..clients.len() {
        assert!(
            received[number] == expected[number],
            "seed {seed}, client {number}: {} bytes of {} came as they should",
            received[number]
                .iter()
                .zip(&expected[number])
                .take_while(|(a, b)| a == b)
                .count(),
            expected[number].len()
        );
    }
    assert!(
        world.engines.iter().all(memkv::engine::Engine::is_quiet),
        "seed {seed}: something is still owed"
    );
}

#[test]
fn soak_at_capacity_one() {
    for seed in 1..=10 {
        soak(seed, 4, &["--mesh-requests-max", "1"], 30);
    }
}

#[test]
fn soak_at_one_byte_of_credit() {
    for seed in 1..=10 {
        soak(seed, 3, &["--mesh-bytes-max", "1"], 30);
    }
}

#[test]
fn soak_with_narrow_connections() {
    let options = [
        "--requests-in-flight-max",
        "2",
        "--output-bytes-max",
        "4096",
        "--input-bytes-max",
        "4096",
    ];
    for seed in 1..=10 {
        soak(seed, 2, &options, 30);
    }
}

#[test]
fn soak_at_default_limits() {
    for seed in 1..=10 {
        soak(seed, 5, &[], 60);
    }
}

/// A client that asks and never reads is held at the output limit: its requests wait unread, memory stays bounded, others are
/// served, and when it reads again it gets everything.
#[test]
fn a_client_that_does_not_read_is_bounded() {
    let mut world = World::new(2, &["--output-bytes-max", "64k", "--input-bytes-max", "16k"]);
    let (deaf, other) = (
        world.connect(0, Protocol::Memcached),
        world.connect(0, Protocol::Memcached),
    );
    let value = vec![b'v'; 3000];
    let mut set = b"set key 0 0 3000\r\n".to_vec();
    set.extend_from_slice(&value);
    set.extend_from_slice(b"\r\n");
    assert_eq!(world.ask(other, &set), b"STORED\r\n");
    world.stall(deaf, true);
    let mut asked = 0;
    while world.is_readable(deaf) {
        world.send(deaf, &b"get key\r\n".repeat(100));
        world.settle();
        asked += 100;
        assert!(asked < 100_000, "it is read for ever");
    }
    assert_eq!(world.ask(other, b"mn\r\n"), b"MN\r\n");
    world.stall(deaf, false);
    world.settle();
    let reply = 3000 + b"VALUE key 0 3000\r\n\r\nEND\r\n".len();
    assert_eq!(world.take(deaf).len(), asked * reply);
    assert!(world.is_readable(deaf));
}

/// Connections that vanish with requests on the way leave nothing behind: no credit, no memory, no session.
#[test]
fn vanished_connections_leave_nothing() {
    let mut world = World::new(3, &["--mesh-requests-max", "4"]);
    let before = world
        .engines
        .iter()
        .map(|engine| engine.metrics.counters.charged_bytes)
        .sum::<u64>();
    for round in 0..200u32 {
        let client = world.connect((round % 3) as u16, Protocol::Memcached);
        // A pipeline, a half request, and an announced value that never comes.
        world.send(
            client,
            format!("get a{round} b{round} c{round} d\r\nset x{round} 0 0 1\r\ny\r\n")
                .repeat(5)
                .as_bytes(),
        );
        world.send(
            client,
            if round % 2 == 0 {
                b"get half"
            } else {
                b"set big 0 0 900000\r\nabc"
            },
        );
        world.drop_connection(client);
        if round % 5 == 0 {
            world.settle();
        }
    }
    world.settle();
    assert!(
        world
            .engines
            .iter()
            .all(|engine| engine.connections() == 0 && engine.is_quiet())
    );
    let client = world.connect(0, Protocol::Memcached);
    world.ask(client, b"flush_all\r\n");
    let stats = String::from_utf8(world.ask(client, b"stats\r\n")).unwrap();
    let stat = |name: &str| -> u64 {
        let line = stats
            .lines()
            .find(|line| line.starts_with(&format!("STAT {name} ")))
            .unwrap();
        line.rsplit(' ').next().unwrap().parse().unwrap()
    };
    assert_eq!(stat("bytes"), 0);
    assert_eq!(
        stat("bytes_charged") - stat("bytes_connections"),
        stat("hash_bytes"),
        "something is charged that nobody holds"
    );
    assert_eq!(before, 0);
}

/// A value counts against the memory limit from its announcement, whatever its size, and no longer when its client is gone.
#[test]
fn announced_values_are_charged() {
    let mut world = World::new(1, &[]);
    let empty = world.charged();
    for bytes in [100, 5000, 1_000_000] {
        let client = world.connect(0, Protocol::Memcached);
        world.send(client, format!("set key 0 0 {bytes}\r\nabc").as_bytes());
        world.settle();
        assert_eq!(world.charged(), empty + bytes);
        world.drop_connection(client);
        world.settle();
        assert_eq!(world.charged(), empty);
    }
}

/// A large value that is being sent stays what it was when it was read, though it is overwritten and deleted meanwhile.
#[test]
fn a_value_being_sent_stays_what_it_was() {
    for cores in [1, 3] {
        let mut world = World::new(cores, &[]);
        world.send_bytes_max = 1000;
        let (reader, writer) = (
            world.connect(0, Protocol::Memcached),
            world.connect(0, Protocol::Memcached),
        );
        let set = |byte: u8| [&b"set key 0 0 50000\r\n"[..], &vec![byte; 50_000], b"\r\n"].concat();
        world.ask(writer, &set(b'1'));
        world.stall(reader, true);
        world.send(reader, b"get key\r\n");
        world.settle();
        world.ask(writer, &set(b'2'));
        world.ask(writer, b"delete key\r\n");
        world.stall(reader, false);
        world.settle();
        let reply = world.take(reader);
        assert_eq!(reply.len(), 50_000 + b"VALUE key 0 50000\r\n\r\nEND\r\n".len());
        assert_eq!(reply.iter().filter(|byte| **byte == b'1').count(), 50_000);
    }
}
