//! What the server tells of itself: operations are counted where they are executed, by protocol and outcome, and told in
//! the text that Prometheus reads.

#![allow(clippy::unwrap_used, reason = "in a test, the assertion")]

mod support;

use memkv::protocol::Protocol;
use memkv::protocol::call::{Text, push_text_request};
use std::collections::HashMap;
use support::{World, engines};

/// What a scrape by way of a core says: by the name of a series with its labels.
fn scrape(world: &mut World, core: u16, text: Text) -> HashMap<String, f64> {
    let caller = world.connect(core, Protocol::Http);
    let mut request = vec![];
    push_text_request(&mut request, text);
    let answer = String::from_utf8(world.ask(caller, &request)).unwrap();
    world.drop_connection(caller);
    let samples = answer.lines().filter(|line| !line.starts_with('#'));
    let samples = samples.map(|line| line.rsplit_once(' ').unwrap());
    samples
        .map(|(name, value)| (name.to_owned(), value.parse().unwrap()))
        .collect()
}

/// The sum of a name's series that have all these labels.
fn sum(samples: &HashMap<String, f64>, name: &str, labels: &[&str]) -> f64 {
    let of_name = samples
        .iter()
        .filter(|(series, _)| series.split('{').next() == Some(name));
    let chosen = of_name.filter(|(series, _)| labels.iter().all(|label| series.contains(label)));
    chosen.map(|(_, value)| value).sum()
}

/// Keys of which each of two cores owns some.
const KEYS: usize = 40;

/// How many of the keys core 1 owns.
fn keys_of_core_1() -> f64 {
    let mut engines = engines(2, &[]).0;
    let own = (0..KEYS).filter(|n| {
        let loaded = engines[1].load(format!("key-{n}").as_bytes(), b"x");
        loaded == memkv::engine::Loaded::Stored
    });
    own.count() as f64
}

#[test]
fn operations_are_counted_where_they_are_executed() {
    let theirs = keys_of_core_1();
    let all = KEYS as f64;
    assert!(theirs > 0.0 && theirs < all);
    let mut world = World::new(2, &[]);
    let client = world.connect(0, Protocol::Memcached);
    for n in 0..KEYS {
        assert_eq!(
            world.ask(client, format!("set key-{n} 0 0 1\r\nx\r\n").as_bytes()),
            b"STORED\r\n"
        );
        assert_eq!(
            world.ask(client, format!("add key-{n} 0 0 1\r\nx\r\n").as_bytes()),
            b"NOT_STORED\r\n"
        );
        assert_eq!(
            world.ask(client, format!("get key-{n}\r\n").as_bytes()),
            format!("VALUE key-{n} 0 1\r\nx\r\nEND\r\n").as_bytes()
        );
        world.ask(client, format!("incr key-{n} 1\r\n").as_bytes());
        assert_eq!(
            world.ask(client, format!("delete key-{n}\r\n").as_bytes()),
            b"DELETED\r\n"
        );
        assert_eq!(world.ask(client, format!("get key-{n}\r\n").as_bytes()), b"END\r\n");
    }
    let other = world.connect(1, Protocol::Text);
    world.ask(other, b"get key-0\r\nnonsense\r\n");
    for text in [Text::Prometheus, Text::OpenMetrics] {
        let samples = scrape(&mut world, 0, text);
        let operations = |labels: &[&str]| sum(&samples, "memkv_operations_total", labels);
        for (command, outcome) in [
            ("set", "done"),
            ("set", "condition_failed"),
            ("get", "done"),
            ("get", "not_found"),
            ("count", "error"),
            ("delete", "done"),
        ] {
            let (command, outcome) = (format!("command=\"{command}\""), format!("outcome=\"{outcome}\""));
            let place = |path, core| operations(&["protocol=\"memcached\"", &command, &outcome, path, core]);
            assert_eq!(
                place("path=\"local\"", "core=\"0\""),
                all - theirs,
                "{command} {outcome}"
            );
            assert_eq!(place("path=\"forwarded\"", "core=\"1\""), theirs, "{command} {outcome}");
            assert_eq!(
                operations(&["protocol=\"memcached\"", &command, &outcome]),
                all,
                "{command} {outcome}"
            );
        }
        assert_eq!(operations(&["protocol=\"text\""]), 1.0);
        assert_eq!(operations(&["protocol=\"http\""]), 0.0);
        assert_eq!(
            sum(
                &samples,
                "memkv_bad_requests_total",
                &["protocol=\"text\"", "core=\"1\""]
            ),
            1.0
        );
        assert_eq!(sum(&samples, "memkv_bad_requests_total", &[]), 1.0);
        let lookups = |labels: &[&str]| sum(&samples, "memkv_lookups_total", labels);
        assert_eq!(lookups(&["command=\"get\"", "result=\"hit\""]), all);
        assert_eq!(lookups(&["command=\"get\"", "result=\"miss\""]), all + 1.0);
        let durations = |labels: &[&str]| sum(&samples, "memkv_request_duration_seconds_count", labels);
        assert_eq!(
            durations(&["command=\"delete\"", "path=\"local\"", "core=\"0\""]),
            all - theirs
        );
        assert_eq!(
            durations(&["command=\"delete\"", "path=\"forwarded\"", "core=\"0\""]),
            theirs
        );
        assert_eq!(durations(&["command=\"delete\"", "core=\"1\""]), 0.0);
        assert_eq!(
            sum(
                &samples,
                "memkv_request_duration_seconds_bucket",
                &["command=\"delete\"", "le=\"+Inf\""]
            ),
            all
        );
        assert!(sum(&samples, "memkv_turn_duration_seconds_count", &["core=\"1\""]) > 0.0);
        assert_eq!(
            sum(&samples, "memkv_turn_duration_seconds_count", &[]),
            sum(&samples, "memkv_turn_duration_seconds_bucket", &["le=\"+Inf\""])
        );
    }
    // A reset leaves nothing, neither what was executed nor what was refused.
    world.ask(client, b"stats reset\r\n");
    let samples = scrape(&mut world, 0, Text::Prometheus);
    assert_eq!(sum(&samples, "memkv_operations_total", &[]), 0.0);
    assert_eq!(sum(&samples, "memkv_bad_requests_total", &[]), 0.0);
}

/// The commands of a transaction are counted one by one, where each is executed.
#[test]
fn transactions_are_counted_by_their_commands() {
    let theirs = keys_of_core_1();
    let mut world = World::new(2, &[]);
    let client = world.connect(0, Protocol::JsonLine);
    world.ask(client, b"START\n");
    for n in 0..KEYS {
        world.ask(client, format!("PUT key-{n} x\n").as_bytes());
    }
    world.ask(client, b"COMMIT\n");
    let samples = scrape(&mut world, 0, Text::Prometheus);
    let sets = |path| {
        let labels = ["protocol=\"json-line\"", "command=\"set\"", "outcome=\"done\"", path];
        sum(&samples, "memkv_operations_total", &labels)
    };
    assert_eq!(sets("path=\"forwarded\",core=\"1\""), theirs);
    assert_eq!(sets("path=\"local\",core=\"0\""), KEYS as f64 - theirs);
    assert_eq!(sum(&samples, "memkv_transactions_total", &[]), 1.0);
    assert_eq!(sum(&samples, "memkv_items", &[]), KEYS as f64);
}

/// A scrape sees the credit that is in use at that moment, and who waits for some.
#[test]
fn credit_in_use_is_told() {
    let mut world = World::new(2, &["--mesh-requests-max", "4"]);
    let client = world.connect(0, Protocol::Memcached);
    let gets: Vec<u8> = (0..KEYS)
        .flat_map(|n| format!("get key-{n}\r\n").into_bytes())
        .collect();
    // What goes to core 1 is not answered yet when core 1 asks.
    world.send(client, &gets);
    let samples = scrape(&mut world, 1, Text::Prometheus);
    let of_core_0 = |name| sum(&samples, name, &["core=\"0\""]);
    assert_eq!(of_core_0("memkv_mesh_credit_requests"), 4.0);
    assert!(of_core_0("memkv_mesh_credit_bytes") > 4.0 * "key-0".len() as f64);
    assert_eq!(of_core_0("memkv_mesh_waiting"), 1.0);
    assert_eq!(of_core_0("memkv_mesh_credit_waits_total"), 1.0);
    assert_eq!(of_core_0("memkv_mesh_credit_requests_limit"), 4.0);
    // The scrape itself takes credit of the core that it came to.
    let samples = scrape(&mut world, 1, Text::Prometheus);
    let requests = |core| sum(&samples, "memkv_mesh_credit_requests", &[core]);
    assert_eq!((requests("core=\"0\""), requests("core=\"1\"")), (0.0, 1.0));
    assert_eq!(sum(&samples, "memkv_mesh_waiting", &[]), 0.0);
}
