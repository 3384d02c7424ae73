//! The text protocol of memcached.

use super::{
    Item, KeyList, MAX_LINE, MultiReply, Parsed, Protocol, Reply, cut_short, decimal, line, push_decimal, unexpected,
};
use crate::workload::{Command, Value};
use std::ops::Range;

/// The text protocol of memcached.
#[derive(Debug, Clone, Copy)]
pub struct Memcached;

impl Protocol for Memcached {
    type Session = ();

    const NAME: &'static str = "memcached";
    const MAX_KEY: usize = 250;
    const EXPIRY: bool = true;

    #[inline(always)]
    fn get(out: &mut Vec<u8>, key: &[u8]) {
        out.extend_from_slice(b"get ");
        out.extend_from_slice(key);
        out.extend_from_slice(b"\r\n");
    }

    #[inline(always)]
    fn set(out: &mut Vec<u8>, key: &[u8], value: &Value<'_>) {
        out.extend_from_slice(b"set ");
        out.extend_from_slice(key);
        out.extend_from_slice(b" 0 ");
        push_decimal(out, value.expires_s() as usize);
        out.push(b' ');
        push_decimal(out, value.len());
        out.extend_from_slice(b"\r\n");
        value.append_to(out);
        out.extend_from_slice(b"\r\n");
    }

    #[inline(always)]
    fn delete(out: &mut Vec<u8>, key: &[u8]) {
        out.extend_from_slice(b"delete ");
        out.extend_from_slice(key);
        out.extend_from_slice(b"\r\n");
    }

    fn multi_get(out: &mut Vec<u8>, keys: &KeyList) {
        out.extend_from_slice(b"get");
        for key in keys.iter() {
            out.push(b' ');
            out.extend_from_slice(key);
        }
        out.extend_from_slice(b"\r\n");
    }

    #[inline(always)]
    fn reply(command: Command, key_len: usize, input: &[u8]) -> Parsed<Reply<'_>> {
        match command {
            Command::Get | Command::MultiGet => match value_block(key_len, input) {
                Parsed::Done((key, value), end) => match input.get(end..end + 5) {
                    Some(b"END\r\n") => Parsed::Done(
                        Reply::Hit {
                            key: Some(&input[key]),
                            value: &input[value],
                        },
                        end + 5,
                    ),
                    _ => cut_short(input, end, b"END\r\n"),
                },
                Parsed::Incomplete => Parsed::Incomplete,
                Parsed::Malformed if input.starts_with(b"END\r\n") => Parsed::Done(Reply::Miss, 5),
                Parsed::Malformed => unexpected(input, is_error),
            },
            Command::Set if input.starts_with(b"STORED\r\n") => Parsed::Done(Reply::Stored, 8),
            Command::Set if input.starts_with(b"NOT_STORED\r\n") => Parsed::Done(Reply::NotStored, 12),
            Command::Delete if input.starts_with(b"DELETED\r\n") => Parsed::Done(Reply::Deleted, 9),
            Command::Delete if input.starts_with(b"NOT_FOUND\r\n") => Parsed::Done(Reply::NotFound, 11),
            _ => unexpected(input, is_error),
        }
    }

    fn multi_reply<'a>(_width: usize, input: &'a [u8], items: &mut Vec<Item>) -> Parsed<MultiReply<'a>> {
        items.clear();
        let mut at = 0;
        loop {
            match value_block(0, &input[at..]) {
                Parsed::Done((key, value), len) => {
                    let place = |r: Range<usize>| r.start + at..r.end + at;
                    items.push(Item {
                        key: place(key),
                        value: Some(place(value)),
                        version: 0,
                    });
                    at += len;
                }
                Parsed::Incomplete => return Parsed::Incomplete,
                Parsed::Malformed if input[at..].starts_with(b"END\r\n") => {
                    return Parsed::Done(MultiReply::Items, at + 5);
                }
                Parsed::Malformed => {
                    return match unexpected(&input[at..], is_error) {
                        Parsed::Done(Reply::Refused(text), len) => Parsed::Done(MultiReply::Refused(text), at + len),
                        Parsed::Incomplete => Parsed::Incomplete,
                        _ => Parsed::Malformed,
                    };
                }
            }
        }
    }
}

/// Reads `VALUE <key> <flags> <bytes>[ <cas>]\r\n<data>\r\n`: the places of key and data, and the length of it all.
/// Malformed when `input` begins with anything else.
#[inline(always)]
fn value_block(key_len: usize, input: &[u8]) -> Parsed<(Range<usize>, Range<usize>)> {
    const WORD: &[u8] = b"VALUE ";
    if !input.starts_with(WORD) {
        return if WORD.starts_with(input) {
            Parsed::Incomplete
        } else {
            Parsed::Malformed
        };
    }
    let mut key_end = WORD.len() + key_len;
    if key_len == 0 || input.get(key_end) != Some(&b' ') {
        match input[WORD.len()..].iter().position(|&b| b == b' ' || b == b'\r') {
            Some(len) if len > 0 => key_end = WORD.len() + len,
            None if input.len() < MAX_LINE => return Parsed::Incomplete,
            _ => return Parsed::Malformed,
        }
    }
    let header = || {
        let (_flags, flags_end) = decimal(input, key_end + 1)?;
        let (bytes, bytes_end) = (input.get(flags_end) == Some(&b' ')).then(|| decimal(input, flags_end + 1))??;
        match input.get(bytes_end..bytes_end + 2) {
            Some(b"\r\n") => Some((bytes, bytes_end + 2)),
            _ => {
                let (_cas, cas_end) =
                    (input.get(bytes_end) == Some(&b' ')).then(|| decimal(input, bytes_end + 1))??;
                (input.get(cas_end..cas_end + 2) == Some(b"\r\n")).then_some((bytes, cas_end + 2))
            }
        }
    };
    let Some((bytes, start)) = header() else {
        return if line(input).is_none() && input.len() < MAX_LINE {
            Parsed::Incomplete
        } else {
            Parsed::Malformed
        };
    };
    let end = start + bytes;
    match input.get(end..end + 2) {
        Some(b"\r\n") => Parsed::Done((WORD.len()..key_end, start..end), end + 2),
        _ => cut_short(input, end, b"\r\n"),
    }
}

fn is_error(line: &[u8]) -> bool {
    line == b"ERROR" || line.starts_with(b"SERVER_ERROR") || line.starts_with(b"CLIENT_ERROR")
}

#[cfg(test)]
mod tests {
    use super::super::tests::{at_all_sizes, multi_at_all_sizes};
    use super::*;

    #[test]
    fn replies_at_all_fragment_sizes() {
        let hit = Reply::Hit {
            key: Some(b"abc"),
            value: b"12\r\n5",
        };
        at_all_sizes::<Memcached>(Command::Get, 3, b"VALUE abc 0 5\r\n12\r\n5\r\nEND\r\n", hit);
        at_all_sizes::<Memcached>(Command::Get, 9, b"VALUE abc 77 5 123\r\n12\r\n5\r\nEND\r\n", hit);
        let empty = Reply::Hit {
            key: Some(b"k"),
            value: b"",
        };
        at_all_sizes::<Memcached>(Command::Get, 1, b"VALUE k 0 0\r\n\r\nEND\r\n", empty);
        at_all_sizes::<Memcached>(Command::Get, 1, b"END\r\n", Reply::Miss);
        at_all_sizes::<Memcached>(Command::Set, 1, b"STORED\r\n", Reply::Stored);
        at_all_sizes::<Memcached>(Command::Set, 1, b"NOT_STORED\r\n", Reply::NotStored);
        at_all_sizes::<Memcached>(Command::Delete, 1, b"DELETED\r\n", Reply::Deleted);
        at_all_sizes::<Memcached>(Command::Delete, 1, b"NOT_FOUND\r\n", Reply::NotFound);
        for command in [Command::Get, Command::Set, Command::Delete] {
            at_all_sizes::<Memcached>(command, 1, b"ERROR\r\n", Reply::Refused(b"ERROR"));
            let text = b"SERVER_ERROR out of memory";
            at_all_sizes::<Memcached>(command, 1, b"SERVER_ERROR out of memory\r\n", Reply::Refused(text));
        }
    }

    #[test]
    fn multi_replies_at_all_fragment_sizes() {
        let input = b"VALUE a 0 1\r\nx\r\nVALUE ccc 0 2\r\nyz\r\nEND\r\n";
        multi_at_all_sizes::<Memcached>(3, input, &[(b"a", Some(b"x")), (b"ccc", Some(b"yz"))]);
        multi_at_all_sizes::<Memcached>(3, b"END\r\n", &[]);
    }

    #[test]
    fn nonsense_is_malformed() {
        let malformed = |command, input: &[u8]| {
            assert_eq!(
                Memcached::reply(command, 3, input),
                Parsed::Malformed,
                "{}",
                input.escape_ascii()
            );
        };
        malformed(Command::Get, b"STORED\r\n");
        malformed(Command::Get, b"VALUE abc 0 x\r\n");
        malformed(Command::Get, b"VALUE abc\r\n");
        malformed(Command::Get, b"VALUE abc 0 2\r\nabcd");
        malformed(Command::Get, b"VALUE abc 0 2\r\nab\r\nVALUE");
        malformed(Command::Set, b"END\r\n");
        malformed(Command::Set, b"OK\r\n");
        malformed(Command::Delete, b"STORED\r\n");
    }

    #[test]
    fn requests() {
        let mut out = Vec::new();
        Memcached::get(&mut out, b"k1");
        Memcached::set(&mut out, b"k2", &Value::plain(b"0123456789"));
        Memcached::delete(&mut out, b"k3");
        let mut keys = KeyList::default();
        keys.push(b"a");
        keys.push(b"b");
        Memcached::multi_get(&mut out, &keys);
        assert_eq!(
            out,
            b"get k1\r\nset k2 0 0 10\r\n0123456789\r\ndelete k3\r\nget a b\r\n"
        );
    }
}
