//! The simple text protocol.
//!
//! ```text
//! set <key> <bytes>\r\n<value>\r\n    STORED\r\n, or NOT-STORED\r\n: no memory, or the value is too large
//! get <key>\r\n                       VALUE <key> <bytes> \r\n<value>\r\nEND\r\n, with 0 bytes for a missing key
//! delete\r\n                          DELETED\r\n: the whole store is empty now
//! ```
//! A server that takes no writes answers `NOT-STORED\r\n` to `set` and `INVALID REQUEST\r\n` to `delete`.
//! Anything else is answered `INVALID REQUEST\r\n`. Blanks between and behind words do not matter; a line may end in LF.
//! A value that CRLF does not follow is invalid, and the next request is looked for behind the next LF.

use super::{Decoded, Decoder, Env, Line, Shape, Step, is_http, line, parse_u64, words};
use crate::encoding::{Rope, push_decimal};
use crate::metrics::Report;
use crate::model::{Broadcast, Command, LARGE_VALUE_BYTES, Op, Put, Reply, Value};
use bytes::Bytes;

/// Where a connection stands.
#[derive(Clone, Copy, Debug, Default)]
pub enum State {
    /// At the start of a line.
    #[default]
    Line,
    /// Behind a bad value: everything up to the next LF is to be skipped.
    Skip,
}

const INVALID: &[u8] = b"INVALID REQUEST\r\n";
const NOT_STORED: &[u8] = b"NOT-STORED\r\n";

fn at_line(decoded: Decoded<'_>, used: usize) -> Step<'_> {
    Step {
        decoded,
        used,
        swallow: 0,
        next: Decoder::Text(State::Line),
    }
}

/// See [`Decoder::step`].
pub(super) fn step<'a>(state: State, input: &'a [u8], env: &Env<'a>) -> Step<'a> {
    if let State::Skip = state {
        return skip(Decoded::Nothing, input);
    }
    let (line, used) = match line(input) {
        Line::Whole(line, used) => (line, used),
        Line::Incomplete => return at_line(Decoded::Incomplete, 0),
        Line::TooLong => return at_line(Decoded::Close(b""), 0),
    };
    if is_http(line) {
        return at_line(Decoded::Close(b""), used);
    }
    let mut words = words(line);
    match (words.next(), words.next(), words.next(), words.next()) {
        (Some(b"get"), Some(key), None, None) if key.len() <= env.key_bytes_max => {
            let op = Op::Get {
                version: false,
                effects: None,
            };
            at_line(Decoded::Command(Command { key, op }, Shape::code(0)), used)
        }
        (Some(b"delete"), None, None, None) => {
            at_line(Decoded::Broadcast(Broadcast::Flush(None), Shape::code(0)), used)
        }
        (Some(b"set"), Some(key), Some(bytes), None) => match parse_u64(bytes).and_then(|n| usize::try_from(n).ok()) {
            Some(bytes) => set(key, bytes, used, &input[used..], env),
            None => at_line(Decoded::Refused(INVALID), used),
        },
        _ => at_line(Decoded::Refused(INVALID), used),
    }
}

fn set<'a>(key: &'a [u8], bytes: usize, header: usize, rest: &'a [u8], env: &Env<'a>) -> Step<'a> {
    let refused = if key.len() > env.key_bytes_max {
        Some(INVALID)
    } else if bytes > env.value_bytes_max {
        Some(NOT_STORED)
    } else {
        None
    };
    if let Some(answer) = refused {
        return Step {
            swallow: bytes.saturating_add(2),
            ..at_line(Decoded::Refused(answer), header)
        };
    }
    if bytes >= LARGE_VALUE_BYTES || rest.len() < bytes + 2 {
        return at_line(Decoded::Value(bytes), header);
    }
    let (value, rest) = rest.split_at(bytes);
    let step = stored(key, Value::Small(value), rest);
    Step {
        used: header + bytes + step.used,
        ..step
    }
}

/// A set whose value is whole; `rest` starts where the value's CRLF should be and is long enough to tell.
fn stored<'a>(key: &'a [u8], value: Value<'a>, rest: &'a [u8]) -> Step<'a> {
    if !rest.starts_with(b"\r\n") {
        return skip(Decoded::Refused(INVALID), rest);
    }
    let put = Put::new(value);
    let command = Command { key, op: Op::Put(put) };
    at_line(Decoded::Command(command, Shape::code(0)), 2)
}

/// Skips up to and including the next LF, or all of `input` when that has none.
fn skip<'a>(decoded: Decoded<'a>, input: &[u8]) -> Step<'a> {
    match memchr::memchr(b'\n', input) {
        Some(end) => at_line(decoded, end + 1),
        None => Step {
            next: Decoder::Text(State::Skip),
            ..at_line(decoded, input.len())
        },
    }
}

/// See [`Decoder::with_value`].
pub(super) fn with_value<'a>(header: &'a [u8], value: &'a Bytes, rest: &'a [u8], _env: &Env<'a>) -> Step<'a> {
    match (rest.first(), rest.get(1)) {
        (None, _) | (Some(b'\r'), None) => at_line(Decoded::Incomplete, 0),
        _ => stored(words(header).nth(1).unwrap_or_default(), Value::collected(value), rest),
    }
}

/// What a connection is told before it is closed because there is no memory for its request.
pub(super) fn out_of_memory() -> &'static [u8] {
    b"NOT-STORED\r\n"
}

/// See [`Decoder::without_value`]: the answer does not tell why.
pub(super) fn without_value<'a>(header: &'a [u8]) -> Step<'a> {
    let header = header.trim_ascii_end();
    let bytes = words(header).nth(2).and_then(parse_u64).unwrap_or_default();
    Step {
        swallow: bytes as usize + 2,
        ..at_line(Decoded::Refused(NOT_STORED), 0)
    }
}

/// Encodes the reply to a command.
pub(super) fn encode(_shape: &Shape<'_>, key: &[u8], reply: &Reply<'_>, out: &mut Rope) {
    let value = match reply {
        Reply::Found(item) => item.value,
        Reply::NotFound => Value::Small(&[]),
        Reply::Stored { .. } => return out.push(b"STORED\r\n"),
        _ => return out.push(NOT_STORED),
    };
    out.push(b"VALUE ");
    out.push(key);
    out.push(b" ");
    push_decimal(&mut out.flat, value.bytes().len() as u64);
    out.push(b" \r\n");
    out.push_value(&value);
    out.push(b"\r\nEND\r\n");
}

/// Encodes the reply to the only broadcast there is.
pub(super) fn encode_report(report: &Report, out: &mut Rope) {
    out.push(match report {
        Report::ReadOnly | Report::NotDurable => INVALID,
        _ => b"DELETED\r\n",
    });
}
