//! The store against a model: random commands on few keys, and after each the same answer as from a `HashMap` that knows
//! nothing of buckets, segments, budgets and sweeps.

#![allow(clippy::unwrap_used, reason = "in a test, the assertion")]

mod support;

use memkv::protocol::Protocol;
use proptest::prelude::*;
use std::collections::HashMap;
use support::World;

/// What a model item is.
#[derive(Clone, Debug)]
struct Item {
    value: Vec<u8>,
    flags: u32,
    /// Milliseconds since the world began.
    ends_ms: Option<u64>,
}

#[derive(Clone, Debug)]
enum Action {
    Get(u8),
    Set(u8, Vec<u8>, u32, Option<u16>),
    Add(u8, Vec<u8>),
    Replace(u8, Vec<u8>),
    Append(u8, Vec<u8>),
    Prepend(u8, Vec<u8>),
    Delete(u8),
    Increment(u8, u64),
    Decrement(u8, u64),
    Touch(u8, u16),
    Compare(u8, Vec<u8>),
    Flush,
    Pass(u16),
}

fn value() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        3 => prop::collection::vec(any::<u8>(), 0..200),
        2 => any::<u64>().prop_map(|number| number.to_string().into_bytes()),
        // Around the size from which values are kept by reference.
        1 => (4090usize..4100, any::<u8>()).prop_map(|(length, byte)| vec![byte; length]),
    ]
}

fn action() -> impl Strategy<Value = Action> {
    let key = 0u8..20;
    prop_oneof![
        4 => key.clone().prop_map(Action::Get),
        4 => (key.clone(), value(), any::<u32>(), prop::option::of(1u16..100))
            .prop_map(|(key, value, flags, ttl)| Action::Set(key, value, flags, ttl)),
        1 => (key.clone(), value()).prop_map(|(key, value)| Action::Add(key, value)),
        1 => (key.clone(), value()).prop_map(|(key, value)| Action::Replace(key, value)),
        1 => (key.clone(), value()).prop_map(|(key, value)| Action::Append(key, value)),
        1 => (key.clone(), value()).prop_map(|(key, value)| Action::Prepend(key, value)),
        2 => key.clone().prop_map(Action::Delete),
        1 => (key.clone(), any::<u64>()).prop_map(|(key, delta)| Action::Increment(key, delta)),
        1 => (key.clone(), any::<u64>()).prop_map(|(key, delta)| Action::Decrement(key, delta)),
        1 => (key.clone(), 1u16..100).prop_map(|(key, ttl)| Action::Touch(key, ttl)),
        1 => (key, value()).prop_map(|(key, value)| Action::Compare(key, value)),
        1 => Just(Action::Flush),
        2 => (1u16..60_000).prop_map(Action::Pass),
    ]
}

struct Model {
    items: HashMap<String, Item>,
    now_ms: u64,
}

impl Model {
    fn live(&mut self, key: &str) -> Option<&mut Item> {
        let now_ms = self.now_ms;
        self.items
            .get_mut(key)
            .filter(|item| item.ends_ms.is_none_or(|end| end > now_ms))
    }

    fn deadline(&self, ttl_s: Option<u16>) -> Option<u64> {
        ttl_s.map(|seconds| self.now_ms + u64::from(seconds) * 1000)
    }
}

fn storage(verb: &str, key: &str, value: &[u8], flags: u32, ttl: u16, rest: &str) -> Vec<u8> {
    let mut request = format!("{verb} {key} {flags} {ttl} {}{rest}\r\n", value.len()).into_bytes();
    request.extend_from_slice(value);
    request.extend_from_slice(b"\r\n");
    request
}

fn shown(key: &str, item: Option<&Item>) -> Vec<u8> {
    let Some(item) = item else { return b"END\r\n".to_vec() };
    let mut reply = format!("VALUE {key} {} {}\r\n", item.flags, item.value.len()).into_bytes();
    reply.extend_from_slice(&item.value);
    reply.extend_from_slice(b"\r\nEND\r\n");
    reply
}

/// What the model answers, having done it; and the request that asks the server for the same.
fn step(model: &mut Model, world: &mut World, client: support::Client, action: &Action) -> (Vec<u8>, Vec<u8>) {
    let name = |key: &u8| format!("key{key}");
    let stored = |done: bool| {
        if done {
            b"STORED\r\n".to_vec()
        } else {
            b"NOT_STORED\r\n".to_vec()
        }
    };
    match action {
        Action::Get(key) => {
            let key = name(key);
            let expected = shown(&key, model.live(&key).as_deref());
            (format!("get {key}\r\n").into_bytes(), expected)
        }
        Action::Set(key, value, flags, ttl) => {
            let key = name(key);
            let item = Item {
                value: value.clone(),
                flags: *flags,
                ends_ms: model.deadline(*ttl),
            };
            model.items.insert(key.clone(), item);
            (storage("set", &key, value, *flags, ttl.unwrap_or(0), ""), stored(true))
        }
        Action::Add(key, value) | Action::Replace(key, value) => {
            let key = name(key);
            let add = matches!(action, Action::Add(..));
            let does = model.live(&key).is_none() == add;
            if does {
                model.items.insert(
                    key.clone(),
                    Item {
                        value: value.clone(),
                        flags: 0,
                        ends_ms: None,
                    },
                );
            }
            (
                storage(if add { "add" } else { "replace" }, &key, value, 0, 0, ""),
                stored(does),
            )
        }
        Action::Append(key, value) | Action::Prepend(key, value) => {
            let key = name(key);
            let append = matches!(action, Action::Append(..));
            let does = match model.live(&key) {
                None => false,
                Some(item) if append => {
                    item.value.extend_from_slice(value);
                    true
                }
                Some(item) => {
                    item.value.splice(0..0, value.iter().copied());
                    true
                }
            };
            (
                storage(if append { "append" } else { "prepend" }, &key, value, 9, 9, ""),
                stored(does),
            )
        }
        Action::Delete(key) => {
            let key = name(key);
            let was = model.live(&key).is_some();
            model.items.remove(&key);
            let expected = if was { &b"DELETED\r\n"[..] } else { b"NOT_FOUND\r\n" };
            (format!("delete {key}\r\n").into_bytes(), expected.to_vec())
        }
        Action::Increment(key, delta) | Action::Decrement(key, delta) => {
            let key = name(key);
            let up = matches!(action, Action::Increment(..));
            let expected = match model.live(&key) {
                None => b"NOT_FOUND\r\n".to_vec(),
                Some(item) => {
                    let text = std::str::from_utf8(&item.value).ok();
                    let number = text.and_then(|text| {
                        text.trim_start()
                            .split([' ', '\t', '\n', '\r', '\x0c', '\0'])
                            .next()?
                            .parse::<u64>()
                            .ok()
                    });
                    match number.filter(|_| item.value.len() <= 64) {
                        None => b"CLIENT_ERROR cannot increment or decrement non-numeric value\r\n".to_vec(),
                        Some(number) => {
                            let result = if up {
                                number.wrapping_add(*delta)
                            } else {
                                number.saturating_sub(*delta)
                            };
                            let length = item.value.len();
                            item.value = format!("{result:<length$}").into_bytes();
                            format!("{result}\r\n").into_bytes()
                        }
                    }
                }
            };
            (
                format!("{} {key} {delta}\r\n", if up { "incr" } else { "decr" }).into_bytes(),
                expected,
            )
        }
        Action::Touch(key, ttl) => {
            let key = name(key);
            let deadline = model.deadline(Some(*ttl));
            let expected = match model.live(&key) {
                None => &b"NOT_FOUND\r\n"[..],
                Some(item) => {
                    item.ends_ms = deadline;
                    b"TOUCHED\r\n"
                }
            };
            (format!("touch {key} {ttl}\r\n").into_bytes(), expected.to_vec())
        }
        Action::Compare(key, value) => {
            // The version that the server gives, at once used: it must hold exactly when the item is there.
            let key = name(key);
            let shown = world.ask(client, format!("gets {key}\r\n").as_bytes());
            let line = String::from_utf8_lossy(shown.split(|byte| *byte == b'\r').next().unwrap()).into_owned();
            let version = line
                .strip_prefix("VALUE ")
                .and_then(|rest| rest.split(' ').nth(3))
                .unwrap_or("1")
                .to_owned();
            let expected = match model.live(&key) {
                None => &b"NOT_FOUND\r\n"[..],
                Some(item) => {
                    *item = Item {
                        value: value.clone(),
                        flags: 3,
                        ends_ms: None,
                    };
                    b"STORED\r\n"
                }
            };
            (
                storage("cas", &key, value, 3, 0, &format!(" {version}")),
                expected.to_vec(),
            )
        }
        Action::Flush => {
            model.items.clear();
            (b"flush_all\r\n".to_vec(), b"OK\r\n".to_vec())
        }
        Action::Pass(ms) => {
            model.now_ms += u64::from(*ms);
            world.advance(u64::from(*ms));
            (b"mn\r\n".to_vec(), b"MN\r\n".to_vec())
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    /// Whatever clients do, in whatever order, time passing: the store answers as the model, on one core and on several.
    #[test]
    fn answers_as_the_model(actions in prop::collection::vec(action(), 1..150), cores in 1u16..4) {
        let mut world = World::new(cores, &[]);
        let client = world.connect(cores - 1, Protocol::Memcached);
        let mut model = Model { items: HashMap::new(), now_ms: 0 };
        for action in &actions {
            let (request, expected) = step(&mut model, &mut world, client, action);
            let actual = world.ask(client, &request);
            prop_assert_eq!(
                expected.escape_ascii().to_string(),
                actual.escape_ascii().to_string(),
                "{:?}", action
            );
        }
    }
}
