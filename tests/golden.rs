//! Golden transcripts: what clients send and what they get, to the byte, however the bytes are cut into pieces and however
//! many cores share the keys. The format is described in `tests/golden/README.md`; `tests/foreign` replays the same files
//! against real servers.

#![allow(clippy::unwrap_used, reason = "in a test, the assertion")]

mod support;

use memkv::protocol::Protocol;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use support::World;

#[derive(Debug)]
enum Step {
    Send(Vec<u8>),
    /// As written, so that captured numbers can be put in and compared.
    Expect(Vec<u8>),
    Pass(u64),
    Closed,
    Reconnect,
}

/// The bytes that a line of a transcript writes. `{{name}}` stays as it is.
fn unescape(text: &str) -> Vec<u8> {
    let mut out = vec![];
    let bytes = text.as_bytes();
    let mut at = 0;
    while at < bytes.len() {
        if bytes[at] != b'\\' {
            out.push(bytes[at]);
            at += 1;
            continue;
        }
        at += 2;
        match bytes[at - 1] {
            b'r' => out.push(b'\r'),
            b'n' => out.push(b'\n'),
            b't' => out.push(b'\t'),
            b'0' => out.push(0),
            b'\\' => out.push(b'\\'),
            b'x' => {
                out.push(u8::from_str_radix(&text[at..at + 2], 16).unwrap());
                at += 2;
            }
            b'{' => {
                let end = at + text[at..].find('}').unwrap();
                let (what, count) = text[at..end].rsplit_once('*').unwrap();
                out.extend(unescape(what).repeat(count.parse().unwrap()));
                at = end + 1;
            }
            other => panic!("unknown escape \\{}", other as char),
        }
    }
    out
}

fn parse(text: &str) -> Vec<Step> {
    let mut steps: Vec<Step> = vec![];
    for line in text.lines() {
        let (mark, rest) = line.split_at(line.len().min(2));
        match (mark, steps.last_mut()) {
            ("> ", Some(Step::Send(bytes))) | ("< ", Some(Step::Expect(bytes))) => bytes.extend(unescape(rest)),
            ("> ", _) => steps.push(Step::Send(unescape(rest))),
            ("< ", _) => steps.push(Step::Expect(unescape(rest))),
            ("~ ", _) => {
                let seconds: f64 = rest.trim().trim_end_matches('s').parse().unwrap();
                steps.push(Step::Pass((seconds * 1000.0) as u64));
            }
            ("! ", _) => steps.push(if rest.trim() == "close" {
                Step::Closed
            } else {
                Step::Reconnect
            }),
            _ => assert!(line.is_empty() || line.starts_with('#'), "what is this: {line}"),
        }
    }
    steps
}

/// Puts captured numbers into what is sent.
fn substitute(bytes: &[u8], numbers: &HashMap<Vec<u8>, Vec<u8>>) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for (name, number) in numbers {
        let pattern = [b"{{", &name[..], b"}}"].concat();
        while let Some(at) = bytes.windows(pattern.len()).position(|window| window == pattern) {
            bytes.splice(at..at + pattern.len(), number.iter().copied());
        }
    }
    bytes
}

/// Compares, capturing numbers; returns the length of `actual` that the expectation covers.
fn matches(expected: &[u8], actual: &[u8], numbers: &mut HashMap<Vec<u8>, Vec<u8>>) -> bool {
    let (mut e, mut a) = (0, 0);
    while e < expected.len() {
        if expected[e..].starts_with(b"{{") {
            let end = e + expected[e..].windows(2).position(|window| window == b"}}").unwrap();
            let name = expected[e + 2..end].to_vec();
            let digits = actual[a.min(actual.len())..]
                .iter()
                .take_while(|byte| byte.is_ascii_digit())
                .count();
            let number = actual[a..a + digits].to_vec();
            if digits == 0 || (name != b"_" && *numbers.entry(name).or_insert(number.clone()) != number) {
                return false;
            }
            (e, a) = (end + 2, a + digits);
        } else if actual.get(a) == Some(&expected[e]) {
            (e, a) = (e + 1, a + 1);
        } else {
            return false;
        }
    }
    a == actual.len()
}

fn replay(path: &Path, protocol: Protocol, cores: u16, fragment: usize) {
    let text = std::fs::read_to_string(path).unwrap();
    let mut world = World::new(cores, &[]);
    let mut client = world.connect(cores - 1, protocol);
    let mut numbers = HashMap::new();
    for (number, step) in parse(&text).iter().enumerate() {
        let context = || {
            format!(
                "{}, step {number}, {cores} cores, fragments of {fragment}",
                path.display()
            )
        };
        match step {
            Step::Send(bytes) => {
                // Megabytes byte by byte would show nothing that kilobytes do not.
                let fragment = if bytes.len() > 50_000 {
                    fragment.max(1000)
                } else {
                    fragment
                };
                for piece in substitute(bytes, &numbers).chunks(fragment) {
                    world.send(client, piece);
                    world.turn();
                }
                world.settle();
            }
            Step::Expect(expected) => {
                let actual = world.take(client);
                assert!(
                    matches(expected, &actual, &mut numbers),
                    "{}\nexpected {}\n     got {}",
                    context(),
                    expected.escape_ascii(),
                    actual.escape_ascii()
                );
            }
            Step::Pass(ms) => world.advance(*ms),
            Step::Closed => {
                let rest = world.take(client);
                assert!(
                    rest.is_empty(),
                    "{}: before the close came {}",
                    context(),
                    rest.escape_ascii()
                );
                assert!(world.is_closed(client), "{}: the connection is open", context());
            }
            Step::Reconnect => client = world.connect(cores - 1, protocol),
        }
    }
    let rest = world.take(client);
    assert!(
        rest.is_empty(),
        "{}: unexpected {}",
        path.display(),
        rest.escape_ascii()
    );
}

/// The transcripts of one protocol.
fn transcripts(folder: &str) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(folder);
    let mut paths: Vec<PathBuf> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "txt"));
    paths.sort();
    assert!(paths.len() >= 3, "the transcripts are missing");
    paths
}

fn replay_all(folder: &str, protocol: Protocol) {
    let mut failures = vec![];
    for path in transcripts(folder) {
        for cores in [1, 3] {
            for fragment in [usize::MAX, 1000, 100, 10, 5, 2, 1] {
                let result = std::panic::catch_unwind(|| replay(&path, protocol, cores, fragment));
                if let Err(error) = result {
                    let message = error.downcast_ref::<String>().cloned().unwrap_or_default();
                    failures.push(message);
                    break;
                }
            }
        }
    }
    assert!(
        failures.is_empty(),
        "{} transcripts differ:\n{}",
        failures.len(),
        failures.join("\n")
    );
}

#[test]
fn memcached() {
    replay_all("memcached", Protocol::Memcached);
}

#[test]
fn text() {
    replay_all("text", Protocol::Text);
}

#[test]
fn json_line() {
    replay_all("json_line", Protocol::JsonLine);
}
