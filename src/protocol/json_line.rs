//! The JSON-line protocol: commands are lines, answers are JSON objects, one per line, and transactions are built up command
//! by command.
//!
//! ```text
//! PUT key value       {"status": "Ok"}
//! GET key             {"status": "Ok", "result": "value"}, or an Error for a missing key
//! DEL key             {"status": "Ok"}, also for a missing key
//! START [CHECKED]     {"status": "Ok"}: what follows is kept until
//! COMMIT              {"status": "Ok"}: all of it happened at one instant; an Error: nothing did
//! ROLLBACK            {"status": "Ok"}: nothing did
//! ```
//! Verbs in any case; blanks matter only inside a value; lines end in LF or CRLF and are UTF-8. What a client typed wrong is
//! answered with an Error and a `mesg`, and an open transaction stays as it is.

use super::{Buffered, Decoded, Decoder, Env, NOT_DURABLE, READ_ONLY, Shape, Step, TxnResults};
use crate::encoding::Rope;
use crate::model::{Command, Delete, Op, Put, Reply, TxnEnd, Value};

/// Where a connection stands.
#[derive(Clone, Copy, Debug, Default)]
pub struct State {
    /// How much of the input is known to hold no line end.
    scanned: usize,
    /// Everything up to the next line end is to be skipped.
    skip: bool,
    /// A transaction is open; true: what it reads must not change before it is committed.
    open: Option<bool>,
}

/// What a [`Shape`]'s code says.
mod kind {
    pub(super) const PUT: u32 = 0;
    pub(super) const GET: u32 = 1;
    pub(super) const DELETE: u32 = 2;
    pub(super) const COMMIT: u32 = 3;
    /// The value's version stands before the line.
    pub(super) const CHECKED_GET: u32 = 4;
}

/// What stands behind the version of a checked read.
pub(super) const NOT_FOUND: u8 = 0;
/// See [`NOT_FOUND`].
pub(super) const FOUND: u8 = 1;
const NOT_READ: u8 = 2;

const OK: &[u8] = b"{\"status\": \"Ok\"}\n";
const TOO_LONG: &str = "the line is too long";
const NO_SUCH_KEY: &str = "there is no such key";
pub(super) const NO_MEMORY: &str = "the server's memory limit is reached";
/// Room in a line beside key and value: the verb, and blanks.
const LINE_SLACK_BYTES: usize = 1024;

fn at(decoded: Decoded<'_>, used: usize, next: State) -> Step<'_> {
    Step {
        decoded,
        used,
        swallow: 0,
        next: Decoder::JsonLine(next),
    }
}

fn refused<'a>(mesg: &str, env: &Env<'a>) -> Decoded<'a> {
    Decoded::Refused(env.arena.alloc_slice_copy(&error(mesg)))
}

/// An answer that says no.
pub(super) fn error(mesg: &str) -> Vec<u8> {
    let mut out = b"{\"status\": \"Error\", \"mesg\": ".to_vec();
    push_json_string(&mut out, mesg);
    out.extend_from_slice(b"}\n");
    out
}

/// See [`Decoder::step`].
pub(super) fn step<'a>(state: State, input: &'a [u8], env: &Env<'a>) -> Step<'a> {
    let resting = State { scanned: 0, ..state };
    let line_bytes_max = env.key_bytes_max + env.value_bytes_max + LINE_SLACK_BYTES;
    let Some(length) = memchr::memchr(b'\n', &input[state.scanned..]).map(|end| state.scanned + end) else {
        if state.skip {
            return at(Decoded::Nothing, input.len(), resting);
        }
        if input.len() > line_bytes_max {
            let next = State { skip: true, ..resting };
            return at(refused(TOO_LONG, env), input.len(), next);
        }
        if state.scanned == input.len() {
            return at(Decoded::Incomplete, 0, state);
        }
        let scanned = input.len();
        return at(Decoded::Nothing, 0, State { scanned, ..state });
    };
    let used = length + 1;
    let next = State { skip: false, ..resting };
    if state.skip {
        return at(Decoded::Nothing, used, next);
    }
    if length > line_bytes_max {
        return at(refused(TOO_LONG, env), used, next);
    }
    let line = input[..length].strip_suffix(b"\r").unwrap_or(&input[..length]);
    let line = trim(line);
    if line.is_empty() {
        return at(Decoded::Nothing, used, next);
    }
    let (verb, rest) = word(line);
    // `GET / HTTP/1.1`: a browser, or a page that talks to a local port. More words are a value that ends like that.
    let (_, version) = word(rest);
    if version.starts_with(b"HTTP/") && !version.contains(&b' ') && HTTP_VERBS.contains(&verb) {
        return at(Decoded::Close(b""), used, next);
    }
    if std::str::from_utf8(line).is_err() {
        return at(refused("the line is not UTF-8", env), used, next);
    }
    let (decoded, open) = command(verb, rest, state.open, env);
    at(decoded, used, State { open, ..next })
}

const HTTP_VERBS: [&[u8]; 9] = [
    b"GET", b"POST", b"PUT", b"HEAD", b"DELETE", b"OPTIONS", b"PATCH", b"CONNECT", b"TRACE",
];

fn trim(line: &[u8]) -> &[u8] {
    let start = line.iter().position(|byte| *byte != b' ').unwrap_or(line.len());
    let end = line
        .iter()
        .rposition(|byte| *byte != b' ')
        .map_or(start, |last| last + 1);
    &line[start..end]
}

/// The first word of a trimmed line, and the trimmed rest.
fn word(line: &[u8]) -> (&[u8], &[u8]) {
    let end = memchr::memchr(b' ', line).unwrap_or(line.len());
    (&line[..end], trim(&line[end..]))
}

/// What a command means, and whether a transaction is open behind it.
fn command<'a>(verb: &[u8], rest: &'a [u8], open: Option<bool>, env: &Env<'a>) -> (Decoded<'a>, Option<bool>) {
    let no = |mesg: &str| (refused(mesg, env), open);
    let is = |name: &str| verb.eq_ignore_ascii_case(name.as_bytes());
    if is("PUT") || is("GET") || is("DEL") {
        let (key, value) = word(rest);
        if key.is_empty() {
            return no("the key is missing");
        }
        if key.len() > env.key_bytes_max {
            return no(&format!(
                "the key has {} bytes, and the most is {}",
                key.len(),
                env.key_bytes_max
            ));
        }
        if is("PUT") {
            return match value.len() {
                0 => no("the value is missing"),
                length if length > env.value_bytes_max => no(&format!(
                    "the value has {length} bytes, and the most is {}",
                    env.value_bytes_max
                )),
                _ => (put(key, value, open), open),
            };
        }
        if !value.is_empty() {
            return no("there is something behind the key");
        }
        return (if is("GET") { get(key, open) } else { delete(key, open) }, open);
    }
    let shape = Shape::code(kind::COMMIT);
    let checked = rest.eq_ignore_ascii_case(b"CHECKED");
    if is("START") {
        return match open {
            Some(_) => no("a transaction is open already"),
            None if !rest.is_empty() && !checked => no("START takes nothing, or CHECKED"),
            None => (Decoded::Buffered(Buffered::Begin { checked }, shape), Some(checked)),
        };
    }
    let end = if is("COMMIT") {
        Buffered::Commit
    } else if is("ROLLBACK") {
        Buffered::Rollback
    } else {
        return no("unknown command: there are PUT, GET, DEL, START, COMMIT and ROLLBACK");
    };
    match open {
        _ if !rest.is_empty() => no("there is something behind the command"),
        None => no("no transaction is open"),
        Some(_) => (Decoded::Buffered(end, shape), None),
    }
}

fn put<'a>(key: &'a [u8], value: &'a [u8], open: Option<bool>) -> Decoded<'a> {
    let shape = Shape::code(kind::PUT);
    match open {
        Some(_) => Decoded::Buffered(Buffered::Put { key, value }, shape),
        None => {
            let op = Op::Put(Put::new(Value::Small(value)));
            Decoded::Command(Command { key, op }, shape)
        }
    }
}

fn get(key: &[u8], open: Option<bool>) -> Decoded<'_> {
    let code = match open {
        Some(true) => kind::CHECKED_GET,
        _ => kind::GET,
    };
    let version = open == Some(true);
    let op = Op::Get { version, effects: None };
    // The key comes back with the version.
    let text = if version { key } else { &[] };
    let shape = Shape { code, text };
    match open {
        Some(checked) => Decoded::Buffered(Buffered::Get { key, checked }, shape),
        None => Decoded::Command(Command { key, op }, shape),
    }
}

fn delete(key: &[u8], open: Option<bool>) -> Decoded<'_> {
    let shape = Shape::code(kind::DELETE);
    match open {
        Some(_) => Decoded::Buffered(Buffered::Delete { key }, shape),
        None => {
            let op = Op::Delete(Delete::default());
            Decoded::Command(Command { key, op }, shape)
        }
    }
}

/// Encodes the reply to a command.
pub(super) fn encode(shape: &Shape<'_>, reply: &Reply<'_>, out: &mut Rope) {
    if shape.code == kind::COMMIT {
        // One line answers all of a transaction.
        return;
    }
    if shape.code == kind::CHECKED_GET {
        let version = match reply {
            Reply::Found(item) => item.version.0,
            _ => 0,
        };
        out.push(&version.to_le_bytes());
        out.push(&[match reply {
            Reply::Found(_) => FOUND,
            Reply::NotFound => NOT_FOUND,
            _ => NOT_READ,
        }]);
    }
    match reply {
        Reply::Found(item) => push_value(item.value.bytes(), out),
        Reply::Stored { .. } | Reply::Deleted(_) => out.push(OK),
        Reply::NotFound if shape.code == kind::DELETE => out.push(OK),
        Reply::NotFound => out.push(&error(NO_SUCH_KEY)),
        Reply::OutOfMemory => out.push(&error(NO_MEMORY)),
        Reply::ReadOnly => out.push(&error(READ_ONLY)),
        Reply::NotDurable => out.push(&error(NOT_DURABLE)),
        _ => out.push(&error("it could not be done")),
    }
}

/// How many bytes the reply takes that a value is in, at the most.
pub(super) fn copied_bytes(value: &[u8]) -> usize {
    LINE_SLACK_BYTES + value.iter().map(|byte| escaped_bytes(*byte)).sum::<usize>()
}

/// How many bytes a byte of UTF-8 takes in a JSON string, at the most: six for each unit of UTF-16 that it begins, or goes on to
/// a second one.
fn escaped_bytes(byte: u8) -> usize {
    match byte {
        b'"' | b'\\' => 2,
        b' '..=b'~' => 1,
        // Behind the first of a character.
        0x80..0xc0 => 0,
        0xf0.. => 12,
        _ => 6,
    }
}

/// Encodes the answer to a read of what the transaction itself wrote.
pub(super) fn encode_own(written: Option<&[u8]>, out: &mut Rope) {
    match written {
        Some(value) => push_value(value, out),
        None => out.push(&error(NO_SUCH_KEY)),
    }
}

fn push_value(value: &[u8], out: &mut Rope) {
    match std::str::from_utf8(value) {
        Ok(text) => {
            out.push(b"{\"status\": \"Ok\", \"result\": ");
            push_json_string(&mut out.flat, text);
            out.push(b"}\n");
        }
        Err(_) => out.push(&error(
            "the value is not UTF-8: another protocol wrote it, and can read it",
        )),
    }
}

/// The reply begins with the version.
pub(super) fn carries_version(shape: &Shape<'_>) -> bool {
    shape.code == kind::CHECKED_GET
}

/// Encodes the reply to what a transaction reads or does.
pub(super) fn encode_txn(shape: &Shape<'_>, mut results: TxnResults, out: &mut Rope) {
    match results.end {
        TxnEnd::Success if shape.code == kind::COMMIT => out.push(OK),
        TxnEnd::Success => out.append(&mut results.replies),
        TxnEnd::Failure => out.push(&error("a key that was read has changed: nothing was applied")),
        TxnEnd::OutOfMemory => out.push(&error("the server's memory limit is reached: nothing was applied")),
        TxnEnd::TooLarge => out.push(&error("the value is too large for one response")),
        TxnEnd::ReadOnly => out.push(&error("the server is read-only: nothing was applied")),
        TxnEnd::NotDurable => out.push(&error(NOT_DURABLE)),
    }
}

/// Says yes, or no and why.
pub(super) fn encode_done(done: Result<(), &str>, out: &mut Rope) {
    match done {
        Ok(()) => out.push(OK),
        Err(mesg) => out.push(&error(mesg)),
    }
}

/// Appends a JSON string of nothing but ASCII.
fn push_json_string(out: &mut Vec<u8>, text: &str) {
    out.push(b'"');
    let mut units = [0u16; 2];
    for character in text.chars() {
        let short = match character {
            '"' => b'"',
            '\\' => b'\\',
            '\n' => b'n',
            '\r' => b'r',
            '\t' => b't',
            '\u{8}' => b'b',
            '\u{c}' => b'f',
            ' '..='~' => {
                out.push(character as u8);
                continue;
            }
            _ => {
                for unit in character.encode_utf16(&mut units) {
                    let digit = |shift: u16| b"0123456789abcdef"[usize::from(*unit >> shift & 0xf)];
                    out.extend_from_slice(&[b'\\', b'u', digit(12), digit(8), digit(4), digit(0)]);
                }
                continue;
            }
        };
        out.extend_from_slice(&[b'\\', short]);
    }
    out.push(b'"');
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As Python's `json.dumps` writes it.
    #[test]
    fn strings() {
        for (text, json) in [
            ("3 * 3 = 9", r#""3 * 3 = 9""#),
            ("\"\\/", r#""\"\\/""#),
            ("\n\r\t\u{8}\u{c}\u{1}~\u{7f}", r#""\n\r\t\b\f\u0001~\u007f""#),
            ("说é", r#""\u8bf4\u00e9""#),
            ("🐘", r#""\ud83d\udc18""#),
        ] {
            let mut out = vec![];
            push_json_string(&mut out, text);
            let foreseen: usize = text.bytes().map(escaped_bytes).sum();
            assert!(out.len() - 2 <= foreseen, "{text:?}");
            assert_eq!(String::from_utf8(out).unwrap(), json);
        }
    }
}
