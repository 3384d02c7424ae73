//! What the page at `/` is told: JSON that a call brings, of several cores.

#![allow(clippy::unwrap_used, reason = "in a test, the assertion")]

mod support;

use memkv::protocol::Protocol;
use memkv::protocol::call::{Text, push_text_request};
use serde_json::Value;
use support::{Client, World};

fn live(world: &mut World, client: Client) -> Value {
    let mut request = vec![];
    push_text_request(&mut request, Text::Live);
    serde_json::from_slice(&world.ask(client, &request)).expect("the page is told JSON")
}

fn sum(numbers: &Value) -> u64 {
    numbers.as_array().unwrap().iter().filter_map(Value::as_u64).sum()
}

/// Each number is of what was done, and of nothing else.
#[test]
fn the_page_is_told_what_was_done() {
    let mut world = World::new(2, &["--shards=6"]);
    let memcached = world.connect(0, Protocol::Memcached);
    let text = world.connect(1, Protocol::Text);
    let page = world.connect(0, Protocol::Http);
    let before = live(&mut world, page);
    assert_eq!(before["items"], 0);
    assert_eq!(before["operations"], Value::Array(vec![]));
    for n in 0..100 {
        let answer = world.ask(memcached, format!("set k{n} 0 0 3\r\nabc\r\n").as_bytes());
        assert_eq!(answer, b"STORED\r\n");
    }
    for n in 0..100 {
        world.ask(text, format!("get k{}\r\n", n * 2).as_bytes());
    }
    world.advance(2_000);
    let after = live(&mut world, page);

    assert_eq!(after["items"], 100);
    let totals = &after["totals"];
    assert_eq!(
        (&totals["hits"], &totals["misses"], &totals["sets"]),
        (&50.into(), &50.into(), &100.into())
    );
    assert_eq!(
        after["operations"],
        serde_json::json!([
            { "protocol": "memcached", "command": "set", "count": 100, "misses": 0 },
            { "protocol": "text", "command": "get", "count": 100, "misses": 50 },
        ])
    );
    assert_eq!(
        after["uptime_ms"].as_u64().unwrap() - before["uptime_ms"].as_u64().unwrap(),
        2_000
    );

    // Each request has a latency, of those that were forwarded and of others.
    let latency = &after["latency"];
    let bounds = latency["bounds_us"].as_array().unwrap();
    assert_eq!((bounds[0].as_f64(), bounds[1].as_f64()), (Some(1.0), Some(1.25)));
    for path in ["local", "forwarded"] {
        assert_eq!(latency[path].as_array().unwrap().len(), bounds.len() + 1);
    }
    let (local, forwarded) = (sum(&latency["local"]), sum(&latency["forwarded"]));
    assert_eq!(local + forwarded, totals["requests"].as_u64().unwrap());
    assert!(forwarded >= totals["forwarded"].as_u64().unwrap() && local > 0 && forwarded > 0);

    // The cores' numbers make up the whole.
    let cores = after["cores"].as_array().unwrap();
    let all = |name: &str| cores.iter().map(|core| core[name].as_u64().unwrap()).sum::<u64>();
    assert_eq!(cores.len(), 2);
    assert_eq!(
        (all("items"), all("connections")),
        (100, after["connections"].as_u64().unwrap())
    );
    assert_eq!(all("requests"), totals["requests"].as_u64().unwrap());
    // Collecting these very numbers is something that one core does for another, too.
    assert!(all("served_for_others") >= all("forwarded"));

    // The kinds of memory are what is charged.
    let kinds = after["memory"]["kinds"].as_object().unwrap();
    let kinds: u64 = kinds.values().filter_map(Value::as_u64).sum();
    assert!(kinds >= 100 * 5 && kinds <= after["memory"]["limit"].as_u64().unwrap());
    assert_eq!(
        after["memory"]["payload"],
        (0..100).map(|n| format!("k{n}").len() + 3).sum::<usize>()
    );

    let ranges = after["ranges"].as_array().unwrap();
    assert_eq!(ranges.len(), 6);
    assert_eq!(ranges[0], serde_json::json!({ "start": "0000000000000000", "core": 0 }));
    assert_eq!(ranges[3], serde_json::json!({ "start": "8000000000000000", "core": 1 }));
}

/// More ranges than anybody can see are told as one for each core.
#[test]
fn many_ranges_are_put_together() {
    let mut world = World::new(2, &["--shards=300"]);
    let page = world.connect(1, Protocol::Http);
    let told = live(&mut world, page);
    let cores: Vec<u64> = told["ranges"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|range| range["core"].as_u64())
        .collect();
    assert_eq!(cores, [0, 1]);
    assert_eq!(told["ranges"][1]["start"], "8000000000000000");
}

/// Keys that are asked for often, whatever bytes they are of.
#[test]
fn hot_keys_are_told_as_text() {
    let mut world = World::new(2, &[]);
    let memcached = world.connect(0, Protocol::Memcached);
    let page = world.connect(1, Protocol::Http);
    for n in 0..600 {
        world.ask(memcached, b"get <b>x</b>\r\nset \xff\"' 0 0 1\r\n1\r\n");
        if n % 3 == 0 {
            world.ask(memcached, b"get third\r\n");
        }
    }
    world.advance(1_000);
    let told = live(&mut world, page);
    let hot = told["hot_keys"].as_array().unwrap();
    let keys: Vec<&str> = hot.iter().filter_map(|hot| hot["key"].as_str()).collect();
    assert_eq!((keys.len(), keys[2]), (3, "third"));
    let of = |key: &str| hot.iter().find(|hot| hot["key"] == key).unwrap();
    let (read, written) = (of("<b>x</b>"), of("\\xff\"'"));
    assert_eq!(read["writes_per_second"], 0);
    assert_eq!(written["writes_per_second"], written["per_second"]);
    assert!(read["per_second"].as_u64() > Some(0) && read["share"].as_f64() > Some(0.3));
}
