//! HTTP/1.1: a resource for each key, `/keys/KEY`, whose representation is the value.
//!
//! Connections stay open and are pipelined. What a server says about its values beside their bytes is passed over.

use super::{Item, KeyList, MultiReply, Parsed, Protocol, Reply, cut_short, decimal, push_decimal};
use crate::workload::{Command, Value};
use memchr::memchr;
use std::ops::Range;

/// HTTP/1.1.
#[derive(Debug, Clone, Copy)]
pub struct Http;

/// What follows the target of each request. The host has to be named, and nobody looks at it.
const BEHIND_TARGET: &[u8] = b" HTTP/1.1\r\nHost: localhost\r\n";

/// Longest head of a response in bytes: status line and fields. One that is longer is none.
const HEAD_MAX: usize = 64 << 10;
/// Longest body in bytes.
const BODY_MAX: usize = 1 << 30;
/// Longest line before a chunk, and after the last, in bytes.
const CHUNK_LINE_MAX: usize = 8 << 10;

/// Appends the beginning of a request: all but what its body demands.
#[inline(always)]
fn begin(out: &mut Vec<u8>, method_and_path: &[u8], key: &[u8]) {
    out.extend_from_slice(method_and_path);
    push_encoded(out, key);
    out.extend_from_slice(BEHIND_TARGET);
}

/// Whether a byte may stand for itself in a path segment, wherever it is there.
const UNRESERVED: [bool; 256] = {
    let mut table = [false; 256];
    let mut byte = 0;
    while byte < 256 {
        let b = byte as u8;
        table[byte] = b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_' | b'~');
        byte += 1;
    }
    table
};

/// Appends `key` as one segment of a path.
#[inline(always)]
fn push_encoded(out: &mut Vec<u8>, key: &[u8]) {
    // Segments of dots only are steps in a path, and cannot be written otherwise.
    let plain = key.iter().all(|&b| UNRESERVED[usize::from(b)]) && key != b"." && key != b"..";
    if plain {
        return out.extend_from_slice(key);
    }
    push_escaped(out, key);
}

#[cold]
fn push_escaped(out: &mut Vec<u8>, key: &[u8]) {
    const HEX: &[u8; 16] = b"0123456789ABCDEF";
    for &b in key {
        if UNRESERVED[usize::from(b)] && b != b'.' {
            out.push(b);
        } else {
            out.extend_from_slice(&[b'%', HEX[usize::from(b >> 4)], HEX[usize::from(b & 15)]]);
        }
    }
}

impl Protocol for Http {
    type Session = ();

    const NAME: &'static str = "http";
    const MULTI_GETS: bool = false;

    #[inline(always)]
    fn get(out: &mut Vec<u8>, key: &[u8]) {
        begin(out, b"GET /keys/", key);
        out.extend_from_slice(b"\r\n");
    }

    #[inline(always)]
    fn set(out: &mut Vec<u8>, key: &[u8], value: &Value<'_>) {
        begin(out, b"PUT /keys/", key);
        out.extend_from_slice(b"Content-Length: ");
        push_decimal(out, value.len());
        out.extend_from_slice(b"\r\n\r\n");
        value.append_to(out);
    }

    #[inline(always)]
    fn delete(out: &mut Vec<u8>, key: &[u8]) {
        begin(out, b"DELETE /keys/", key);
        out.extend_from_slice(b"\r\n");
    }

    fn multi_get(_out: &mut Vec<u8>, _keys: &KeyList) {
        unreachable!("the protocol has no multi-get");
    }

    #[inline(always)]
    fn reply(command: Command, _key_len: usize, input: &[u8]) -> Parsed<Reply<'_>> {
        let (response, len) = match response(input) {
            Parsed::Done(response, len) => (response, len),
            Parsed::Incomplete => return Parsed::Incomplete,
            Parsed::Malformed => return Parsed::Malformed,
        };
        let reply = match (command, response.status) {
            (Command::Get | Command::MultiGet, 200) => match response.body {
                Body::Whole(value) => Reply::Hit { key: None, value },
                Body::Chunks(chunks) => Reply::Chunked(chunks),
            },
            (Command::Get | Command::MultiGet, 404) => Reply::Miss,
            (Command::Set, 200 | 201 | 204) => Reply::Stored,
            (Command::Set, 412) => Reply::NotStored,
            (Command::Delete, 200 | 204) => Reply::Deleted,
            (Command::Delete, 404) => Reply::NotFound,
            _ => Reply::Refused(response.status_line),
        };
        Parsed::Done(reply, len)
    }

    fn multi_reply<'a>(_width: usize, _input: &'a [u8], _items: &mut Vec<Item>) -> Parsed<MultiReply<'a>> {
        Parsed::Malformed
    }
}

/// The bytes of a body that came in `chunks`, which were read before.
pub fn joined(chunks: &[u8]) -> Vec<u8> {
    let (mut bytes, mut at) = (Vec::with_capacity(chunks.len()), 0);
    while let Parsed::Done(Some(chunk), end) = chunk(chunks, at) {
        bytes.extend_from_slice(&chunks[chunk]);
        at = end;
    }
    bytes
}

struct Response<'a> {
    status: usize,
    /// Without its end.
    status_line: &'a [u8],
    body: Body<'a>,
}

enum Body<'a> {
    /// In one piece.
    Whole(&'a [u8]),
    /// In several chunks, with what stands around them.
    Chunks(&'a [u8]),
}

/// How the end of a body is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Framing {
    /// It ends with the connection.
    Unknown,
    Bytes(usize),
    Chunked,
}

struct Head<'a> {
    status: usize,
    status_line: &'a [u8],
    framing: Framing,
}

/// Reads the response at the front of `input`, and interim ones before it.
#[inline(always)]
fn response(input: &[u8]) -> Parsed<Response<'_>> {
    let mut from = 0;
    let (head, start) = loop {
        match head(input, from) {
            // Switching to another protocol was not asked for.
            Parsed::Done(head, _) if head.status == 101 => return Parsed::Malformed,
            Parsed::Done(head, end) if head.status < 200 => from = end,
            Parsed::Done(head, end) => break (head, end),
            Parsed::Incomplete => return Parsed::Incomplete,
            Parsed::Malformed => return Parsed::Malformed,
        }
    };
    let (body, end) = match head.framing {
        _ if matches!(head.status, 204 | 304) => (Body::Whole(b""), start),
        Framing::Bytes(len) => match input.get(start..start + len) {
            Some(bytes) => (Body::Whole(bytes), start + len),
            None => return Parsed::Incomplete,
        },
        Framing::Chunked => match chunked(input, start) {
            Parsed::Done(body, end) => (body, end),
            Parsed::Incomplete => return Parsed::Incomplete,
            Parsed::Malformed => return Parsed::Malformed,
        },
        // Then no other reply can follow.
        Framing::Unknown => return Parsed::Malformed,
    };
    let response = Response {
        status: head.status,
        status_line: head.status_line,
        body,
    };
    Parsed::Done(response, end)
}

/// Reads the status line and the fields that begin at `start`; where the body begins.
#[inline(always)]
fn head(input: &[u8], start: usize) -> Parsed<Head<'_>> {
    const VERSION: &[u8] = b"HTTP/1.";
    if !input[start..].starts_with(VERSION) {
        return cut_short(input, start, VERSION);
    }
    let Some(mut at) = line_end(input, start) else {
        return unended(input, start, HEAD_MAX);
    };
    let status_line = trimmed(&input[start..at]);
    // HTTP/1.1 200, and perhaps words.
    let status = match (status_line.get(8), status_line.get(9..12), status_line.get(12)) {
        (Some(b' '), Some(digits), None | Some(b' ')) => decimal(digits, 0),
        _ => None,
    };
    let Some((status @ 100..=999, 3)) = status else {
        return Parsed::Malformed;
    };
    let mut framing = Framing::Unknown;
    loop {
        let Some(end) = line_end(input, at) else {
            return unended(input, start, HEAD_MAX);
        };
        let line = trimmed(&input[at..end]);
        at = end;
        if at - start > HEAD_MAX {
            return Parsed::Malformed;
        }
        match line.first() {
            None => break,
            Some(b'c' | b'C') => {
                let Some(value) = value_of(line, b"content-length") else {
                    continue;
                };
                let len = decimal(value, 0).filter(|&(len, end)| end == value.len() && len <= BODY_MAX);
                match (len, framing) {
                    (Some((len, _)), Framing::Unknown) => framing = Framing::Bytes(len),
                    // Chunks go before a length; two lengths have to be one.
                    (Some(_), Framing::Chunked) => {}
                    (Some((len, _)), Framing::Bytes(before)) if len == before => {}
                    _ => return Parsed::Malformed,
                }
            }
            Some(b't' | b'T') => match value_of(line, b"transfer-encoding") {
                None => {}
                Some(coding) if coding.eq_ignore_ascii_case(b"chunked") => framing = Framing::Chunked,
                Some(coding) if coding.eq_ignore_ascii_case(b"identity") => {}
                Some(_) => return Parsed::Malformed,
            },
            Some(_) => {}
        }
    }
    let head = Head {
        status,
        status_line,
        framing,
    };
    Parsed::Done(head, at)
}

/// The value of the field in `line` if it has this name, which is given in lower case.
#[inline(always)]
fn value_of<'a>(line: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    let named = line.get(name.len()) == Some(&b':') && line[..name.len()].eq_ignore_ascii_case(name);
    named.then(|| line[name.len() + 1..].trim_ascii())
}

/// Where the line that begins at `start` ends, with its LF.
#[inline(always)]
fn line_end(input: &[u8], start: usize) -> Option<usize> {
    memchr(b'\n', &input[start..]).map(|len| start + len + 1)
}

/// A line without its LF or CRLF.
#[inline(always)]
fn trimmed(line: &[u8]) -> &[u8] {
    let line = line.strip_suffix(b"\n").unwrap_or(line);
    line.strip_suffix(b"\r").unwrap_or(line)
}

/// What to say of lines from `start` that have not ended.
#[cold]
fn unended<T>(input: &[u8], start: usize, most: usize) -> Parsed<T> {
    if input.len() - start <= most {
        Parsed::Incomplete
    } else {
        Parsed::Malformed
    }
}

/// Reads the chunks that begin at `start`, and the fields behind them.
#[cold]
fn chunked(input: &[u8], start: usize) -> Parsed<Body<'_>> {
    let (mut at, mut count, mut only) = (start, 0, 0..0);
    loop {
        match chunk(input, at) {
            Parsed::Done(Some(chunk), end) => {
                (at, count, only) = (end, count + 1, chunk);
                if at - start > BODY_MAX {
                    return Parsed::Malformed;
                }
            }
            Parsed::Done(None, end) => {
                at = end;
                break;
            }
            Parsed::Incomplete => return Parsed::Incomplete,
            Parsed::Malformed => return Parsed::Malformed,
        }
    }
    let trailers = at;
    loop {
        let Some(end) = line_end(input, at) else {
            return unended(input, trailers, HEAD_MAX);
        };
        let last = trimmed(&input[at..end]).is_empty();
        at = end;
        if at - trailers > HEAD_MAX {
            return Parsed::Malformed;
        }
        if last {
            break;
        }
    }
    let body = match count {
        0 | 1 => Body::Whole(&input[only]),
        _ => Body::Chunks(&input[start..at]),
    };
    Parsed::Done(body, at)
}

/// Reads the chunk that begins at `start`: the place of its bytes, `None` for the last one, which has none; and where the
/// next one begins.
fn chunk(input: &[u8], start: usize) -> Parsed<Option<Range<usize>>> {
    let Some(data) = line_end(input, start) else {
        return unended(input, start, CHUNK_LINE_MAX);
    };
    // Extensions behind a semicolon mean nothing here.
    let line = trimmed(&input[start..data]);
    let size = line.split(|&b| b == b';').next().unwrap_or_default().trim_ascii();
    let hex = |size: usize, &b: &u8| Some(size << 4 | char::from(b).to_digit(16)? as usize);
    let size = match size {
        [] => None,
        digits if digits.len() > 8 => None,
        digits => digits.iter().try_fold(0, hex),
    };
    match size {
        None => Parsed::Malformed,
        Some(0) => Parsed::Done(None, data),
        Some(size) if size > BODY_MAX => Parsed::Malformed,
        Some(size) => match input.get(data + size..data + size + 2) {
            Some(b"\r\n") => Parsed::Done(Some(data..data + size), data + size + 2),
            _ => cut_short(input, data + size, b"\r\n"),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::at_all_sizes;
    use super::*;

    fn hit(value: &[u8]) -> Reply<'_> {
        Reply::Hit { key: None, value }
    }

    #[test]
    fn replies_at_all_fragment_sizes() {
        for (command, input, expected) in [
            (
                Command::Get,
                &b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n12\r\n5"[..],
                hit(b"12\r\n5"),
            ),
            (
                Command::Get,
                b"HTTP/1.0 200\r\nDate: x\r\nCONTENT-length:  0 \r\nContent-Type: a/b\r\n\r\n",
                hit(b""),
            ),
            (Command::Get, b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\nno", Reply::Miss),
            (
                Command::Get,
                b"HTTP/1.1 404 Not Found\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nno\r\n1\r\n!\r\n0\r\n\r\n",
                Reply::Miss,
            ),
            (Command::Set, b"HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n", Reply::Stored),
            (Command::Set, b"HTTP/1.1 204 No Content\r\n\r\n", Reply::Stored),
            // No body follows, whatever the length says.
            (Command::Set, b"HTTP/1.1 204 No Content\r\nContent-Length: 7\r\n\r\n", Reply::Stored),
            (Command::Set, b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", Reply::Stored),
            (
                Command::Set,
                b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Hints\r\nLink: a\r\n\r\nHTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n",
                Reply::Stored,
            ),
            (
                Command::Set,
                b"HTTP/1.1 412 Precondition Failed\r\nContent-Length: 0\r\n\r\n",
                Reply::NotStored,
            ),
            (Command::Delete, b"HTTP/1.1 204 No Content\r\n\r\n", Reply::Deleted),
            (Command::Delete, b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", Reply::NotFound),
            (
                Command::Set,
                b"HTTP/1.1 507 Insufficient Storage\r\nContent-Length: 4\r\n\r\nfull",
                Reply::Refused(b"HTTP/1.1 507 Insufficient Storage"),
            ),
        ] {
            at_all_sizes::<Http>(command, 3, input, expected);
        }
        // Lines may end without a CR.
        at_all_sizes::<Http>(Command::Get, 3, b"HTTP/1.1 200 OK\nContent-Length: 1\n\nx", hit(b"x"));
    }

    #[test]
    fn chunks_at_all_fragment_sizes() {
        let head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: Chunked\r\n\r\n";
        for (chunks, value) in [
            (&b"5\r\n12\r\n5\r\n0\r\n\r\n"[..], &b"12\r\n5"[..]),
            (b"0\r\n\r\n", b""),
            (
                b"A;name=\"v\"\r\n0123456789\r\n000\r\nTrailer: x\r\n\r\n",
                b"0123456789",
            ),
        ] {
            let input = [&head[..], chunks].concat();
            at_all_sizes::<Http>(Command::Get, 3, &input, hit(value));
        }
        let chunks = b"2\r\nab\r\n3;x\r\n\r\n0\r\n01\r\nc\r\n0\r\nA: b\r\n\r\n";
        let input = [&head[..], chunks].concat();
        at_all_sizes::<Http>(Command::Get, 3, &input, Reply::Chunked(chunks));
        assert_eq!(joined(chunks), b"ab\r\n0c");
        assert_eq!(joined(b"0\r\n\r\n"), b"");
    }

    #[test]
    fn nonsense_is_malformed() {
        for input in [
            &b"END\r\n"[..],
            b"HTTP/2 200\r\n\r\n",
            b"HTTP/1.1 20 OK\r\n\r\n",
            b"HTTP/1.1 2000\r\n\r\n",
            b"HTTP/1.1 099 x\r\n\r\n",
            b"HTTP/1.1  200 OK\r\n\r\n",
            // Nothing tells where it ends.
            b"HTTP/1.1 200 OK\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: 1 2\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\ncontent-length: 2\r\n\r\nab",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
            b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nab\r\n",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfffffffff\r\n",
        ] {
            let got = Http::reply(Command::Get, 3, input);
            assert_eq!(got, Parsed::Malformed, "{}", input.escape_ascii());
        }
        let endless = [&b"HTTP/1.1 200 OK\r\n"[..], &b"a: b\r\n".repeat(HEAD_MAX / 6)].concat();
        assert_eq!(Http::reply(Command::Get, 3, &endless), Parsed::Malformed);
        let endless = [&b"HTTP/1.1 200 "[..], &[b'x'; HEAD_MAX]].concat();
        assert_eq!(Http::reply(Command::Get, 3, &endless), Parsed::Malformed);
    }

    #[test]
    fn requests() {
        let mut out = Vec::new();
        Http::get(&mut out, b"k1");
        Http::set(&mut out, b"a/b \xff%~", &Value::plain(b"0123456789"));
        Http::delete(&mut out, b"..");
        assert_eq!(
            out.escape_ascii().to_string(),
            b"GET /keys/k1 HTTP/1.1\r\nHost: localhost\r\n\r\n\
              PUT /keys/a%2Fb%20%FF%25~ HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n0123456789\
              DELETE /keys/%2E%2E HTTP/1.1\r\nHost: localhost\r\n\r\n"
                .escape_ascii()
                .to_string()
        );
    }
}
