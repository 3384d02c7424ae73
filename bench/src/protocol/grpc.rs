//! gRPC: unary calls of the service `memkv.KV`, over HTTP/2 without TLS and without asking for it first.
//!
//! The messages are those of `proto/kv.proto`, written and read by hand as in [`protobuf`](super::protobuf). The connection
//! below them is in [`http2`].

mod hpack;
mod http2;

use super::protobuf::{Content, field_len, next_field, push_bytes, push_field};
use super::{Item, KeyList, MultiReply, Parsed, Protocol, Reply};
use crate::workload::{Command, Value};
use http2::{Http2, ROOM};

/// gRPC.
#[derive(Debug, Clone, Copy)]
pub struct Grpc;

/// Fields of requests: the key of all of them, and the value of a Put.
const KEY: u8 = 1;
const VALUE: u8 = 2;

/// What stands before a message: whether it is compressed, and its length.
const PREFIX: usize = 5;

/// Appends what stands before a message of `len` bytes.
#[inline(always)]
fn begin(out: &mut Vec<u8>, len: usize) {
    out.extend_from_slice(&[0; ROOM]);
    out.push(0);
    out.extend_from_slice(&(len as u32).to_be_bytes());
}

#[inline(always)]
fn push_key_request(out: &mut Vec<u8>, key: &[u8]) {
    begin(out, field_len(key.len()));
    push_bytes(out, KEY, key);
}

impl Protocol for Grpc {
    type Session = Http2;

    const NAME: &'static str = "grpc";
    const MULTI_GETS: bool = false;

    #[inline(always)]
    fn get(out: &mut Vec<u8>, key: &[u8]) {
        push_key_request(out, key);
    }

    #[inline(always)]
    fn set(out: &mut Vec<u8>, key: &[u8], value: &Value<'_>) {
        // Bytes that are empty are left out, as encoders do.
        let value_len = if value.is_empty() { 0 } else { field_len(value.len()) };
        begin(out, field_len(key.len()) + value_len);
        push_bytes(out, KEY, key);
        if !value.is_empty() {
            push_field(out, VALUE, value.len());
            value.append_to(out);
        }
    }

    #[inline(always)]
    fn delete(out: &mut Vec<u8>, key: &[u8]) {
        push_key_request(out, key);
    }

    fn multi_get(_out: &mut Vec<u8>, _keys: &KeyList) {
        unreachable!("the protocol has no multi-get");
    }

    /// Reads the body of a response, which is one message.
    #[inline(always)]
    fn reply(command: Command, _key_len: usize, input: &[u8]) -> Parsed<Reply<'_>> {
        let Some((prefix, _)) = input.split_first_chunk::<PREFIX>() else {
            return Parsed::Incomplete;
        };
        let [compressed, len @ ..] = *prefix;
        if compressed != 0 {
            // Nobody said that this client understands it.
            return Parsed::Malformed;
        }
        let end = PREFIX + u32::from_be_bytes(len) as usize;
        let Some(message) = input.get(..end) else {
            return Parsed::Incomplete;
        };
        // The first field of all responses says what became of the key.
        let (mut at, mut first, mut value) = (PREFIX, false, 0..0);
        while at < end {
            match next_field(message, &mut at) {
                Some((1, Content::Number(n))) => first = n != 0,
                Some((2, Content::Bytes(bytes))) if command == Command::Get => value = bytes,
                None | Some((1, _)) => return Parsed::Malformed,
                Some((2, _)) if command == Command::Get => return Parsed::Malformed,
                Some(_) => {}
            }
        }
        let reply = match (command, first) {
            (Command::Get, true) => Reply::Hit {
                key: None,
                value: &message[value],
            },
            (Command::Get, false) => Reply::Miss,
            (Command::Delete, true) => Reply::Deleted,
            (Command::Delete, false) => Reply::NotFound,
            // Whether the key was new does not matter.
            _ => Reply::Stored,
        };
        Parsed::Done(reply, end)
    }

    fn multi_reply<'a>(_width: usize, _input: &'a [u8], _items: &mut Vec<Item>) -> Parsed<MultiReply<'a>> {
        Parsed::Malformed
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::at_all_sizes;
    use super::*;

    /// A message of fields, with its prefix.
    fn body(fields: &[u8]) -> Vec<u8> {
        [&[0], &(fields.len() as u32).to_be_bytes()[..], fields].concat()
    }

    #[test]
    fn replies_at_all_fragment_sizes() {
        let hit = |value| Reply::Hit { key: None, value };
        for (command, fields, expected) in [
            (Command::Get, &b"\x08\x01\x12\x02ab"[..], hit(b"ab")),
            (Command::Get, b"\x08\x01", hit(b"")),
            // In another order, with flags, a version, and a field of a later version.
            (
                Command::Get,
                b"\x28\x80\x01\x12\x02ab\x18\x07\x3a\x01x\x08\x01",
                hit(b"ab"),
            ),
            (Command::Get, b"", Reply::Miss),
            (Command::Set, b"", Reply::Stored),
            (Command::Set, b"\x08\x01\x10\x09", Reply::Stored),
            (Command::Delete, b"\x08\x01", Reply::Deleted),
            (Command::Delete, b"", Reply::NotFound),
        ] {
            at_all_sizes::<Grpc>(command, 3, &body(fields), expected);
        }
        let long = [&b"\x08\x01\x12\xac\x02"[..], &[b'v'; 300]].concat();
        at_all_sizes::<Grpc>(Command::Get, 3, &body(&long), hit(&[b'v'; 300]));
    }

    #[test]
    fn nonsense_is_malformed() {
        let mut compressed = body(b"\x08\x01");
        compressed[0] = 1;
        for input in [
            compressed,
            body(b"\x08"),
            body(b"\x0a\x01x"),
            body(b"\x10\x01"),
            body(b"\x12\x05x"),
        ] {
            assert_eq!(Grpc::reply(Command::Get, 3, &input), Parsed::Malformed, "{input:?}");
        }
    }

    #[test]
    fn requests() {
        let with_room = |fields: &[u8]| [&[0; ROOM][..], &body(fields)].concat();
        let mut out = Vec::new();
        Grpc::get(&mut out, b"k1");
        assert_eq!(out, with_room(b"\x0a\x02k1"));
        out.clear();
        Grpc::set(&mut out, b"k2", &Value::plain(b"012"));
        assert_eq!(out, with_room(b"\x0a\x02k2\x12\x03012"));
        out.clear();
        Grpc::set(&mut out, b"k2", &Value::plain(b""));
        Grpc::delete(&mut out, b"k3");
        assert_eq!(out, [with_room(b"\x0a\x02k2"), with_room(b"\x0a\x02k3")].concat());
    }
}
