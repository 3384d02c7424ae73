//! The protocol of Redis: GET, SET, DEL and MGET.

use super::{
    Item, KeyList, MAX_LINE, MultiReply, Parsed, Protocol, Reply, cut_short, decimal, line, push_decimal, unexpected,
};
use crate::workload::{Command, Value};
use std::ops::Range;

/// The protocol of Redis.
#[derive(Debug, Clone, Copy)]
pub struct Resp;

#[inline(always)]
fn bulk(out: &mut Vec<u8>, bytes: &[u8]) {
    out.push(b'$');
    push_decimal(out, bytes.len());
    out.extend_from_slice(b"\r\n");
    out.extend_from_slice(bytes);
    out.extend_from_slice(b"\r\n");
}

impl Protocol for Resp {
    type Session = ();

    const NAME: &'static str = "resp";
    const EXPIRY: bool = true;

    #[inline(always)]
    fn get(out: &mut Vec<u8>, key: &[u8]) {
        out.extend_from_slice(b"*2\r\n$3\r\nGET\r\n");
        bulk(out, key);
    }

    #[inline(always)]
    fn set(out: &mut Vec<u8>, key: &[u8], value: &Value<'_>) {
        let expires = value.expires_s() > 0;
        out.extend_from_slice(if expires { b"*5" } else { b"*3" });
        out.extend_from_slice(b"\r\n$3\r\nSET\r\n");
        bulk(out, key);
        out.push(b'$');
        push_decimal(out, value.len());
        out.extend_from_slice(b"\r\n");
        value.append_to(out);
        out.extend_from_slice(b"\r\n");
        if expires {
            bulk(out, b"EXAT");
            bulk(out, value.expires_s().to_string().as_bytes());
        }
    }

    #[inline(always)]
    fn delete(out: &mut Vec<u8>, key: &[u8]) {
        out.extend_from_slice(b"*2\r\n$3\r\nDEL\r\n");
        bulk(out, key);
    }

    fn multi_get(out: &mut Vec<u8>, keys: &KeyList) {
        out.push(b'*');
        push_decimal(out, keys.len() + 1);
        out.extend_from_slice(b"\r\n$4\r\nMGET\r\n");
        for key in keys.iter() {
            bulk(out, key);
        }
    }

    #[inline(always)]
    fn reply(command: Command, _key_len: usize, input: &[u8]) -> Parsed<Reply<'_>> {
        match command {
            Command::Get | Command::MultiGet => match bulk_string(input) {
                Parsed::Done(Some(value), len) => Parsed::Done(
                    Reply::Hit {
                        key: None,
                        value: &input[value],
                    },
                    len,
                ),
                Parsed::Done(None, len) => Parsed::Done(Reply::Miss, len),
                Parsed::Incomplete => Parsed::Incomplete,
                Parsed::Malformed if matches!(input[0], b'$' | b'_') => Parsed::Malformed,
                Parsed::Malformed => unexpected(input, is_error),
            },
            Command::Set if input.starts_with(b"+OK\r\n") => Parsed::Done(Reply::Stored, 5),
            Command::Delete if input.starts_with(b":1\r\n") => Parsed::Done(Reply::Deleted, 4),
            Command::Delete if input.starts_with(b":0\r\n") => Parsed::Done(Reply::NotFound, 4),
            _ => unexpected(input, is_error),
        }
    }

    fn multi_reply<'a>(width: usize, input: &'a [u8], items: &mut Vec<Item>) -> Parsed<MultiReply<'a>> {
        items.clear();
        if input.first() != Some(&b'*') {
            return match unexpected(input, is_error) {
                Parsed::Done(Reply::Refused(text), len) => Parsed::Done(MultiReply::Refused(text), len),
                Parsed::Incomplete => Parsed::Incomplete,
                _ => Parsed::Malformed,
            };
        }
        let Some(first) = line(input) else {
            return if input.len() < MAX_LINE {
                Parsed::Incomplete
            } else {
                Parsed::Malformed
            };
        };
        if decimal(first, 1) != Some((width, first.len())) {
            return Parsed::Malformed;
        }
        let mut at = first.len() + 2;
        for _ in 0..width {
            match bulk_string(&input[at..]) {
                Parsed::Done(value, len) => {
                    items.push(Item {
                        key: 0..0,
                        value: value.map(|v| v.start + at..v.end + at),
                        version: 0,
                    });
                    at += len;
                }
                Parsed::Incomplete => return Parsed::Incomplete,
                Parsed::Malformed => return Parsed::Malformed,
            }
        }
        Parsed::Done(MultiReply::Items, at)
    }
}

/// Reads a bulk string or one of the two forms of nil. Malformed when `input` begins with anything else.
#[inline(always)]
fn bulk_string(input: &[u8]) -> Parsed<Option<Range<usize>>> {
    match input.first() {
        None => return Parsed::Incomplete,
        Some(b'$') => {}
        Some(b'_') => return fixed(input, b"_\r\n"),
        Some(_) => return Parsed::Malformed,
    }
    let header = decimal(input, 1).filter(|&(_, end)| input.get(end..end + 2) == Some(b"\r\n"));
    let Some((bytes, header_end)) = header else {
        return match input.get(1) {
            Some(b'-') => fixed(input, b"$-1\r\n"),
            _ if line(input).is_none() && input.len() < 16 => Parsed::Incomplete,
            _ => Parsed::Malformed,
        };
    };
    let start = header_end + 2;
    let end = start + bytes;
    match input.get(end..end + 2) {
        Some(b"\r\n") => Parsed::Done(Some(start..end), end + 2),
        _ => cut_short(input, end, b"\r\n"),
    }
}

fn fixed(input: &[u8], nil: &[u8]) -> Parsed<Option<Range<usize>>> {
    if input.starts_with(nil) {
        Parsed::Done(None, nil.len())
    } else if nil.starts_with(input) {
        Parsed::Incomplete
    } else {
        Parsed::Malformed
    }
}

fn is_error(line: &[u8]) -> bool {
    line.starts_with(b"-")
}

#[cfg(test)]
mod tests {
    use super::super::tests::{at_all_sizes, multi_at_all_sizes};
    use super::*;
    use crate::workload::{Population, SizeSpec};

    #[test]
    fn replies_at_all_fragment_sizes() {
        let hit = Reply::Hit {
            key: None,
            value: b"12\r\n5",
        };
        at_all_sizes::<Resp>(Command::Get, 3, b"$5\r\n12\r\n5\r\n", hit);
        at_all_sizes::<Resp>(Command::Get, 3, b"$0\r\n\r\n", Reply::Hit { key: None, value: b"" });
        at_all_sizes::<Resp>(Command::Get, 3, b"$-1\r\n", Reply::Miss);
        at_all_sizes::<Resp>(Command::Get, 3, b"_\r\n", Reply::Miss);
        at_all_sizes::<Resp>(Command::Set, 3, b"+OK\r\n", Reply::Stored);
        at_all_sizes::<Resp>(Command::Delete, 3, b":1\r\n", Reply::Deleted);
        at_all_sizes::<Resp>(Command::Delete, 3, b":0\r\n", Reply::NotFound);
        for command in [Command::Get, Command::Set, Command::Delete] {
            at_all_sizes::<Resp>(command, 3, b"-OOM too much\r\n", Reply::Refused(b"-OOM too much"));
        }
    }

    #[test]
    fn expiry_is_asked_for() {
        let value = Population::new(1, SizeSpec::Fixed(1), SizeSpec::Fixed(3), 1)
            .unwrap()
            .expiring(77);
        let mut out = Vec::new();
        Resp::set(&mut out, b"k", &value.value(0));
        assert!(out.starts_with(b"*5\r\n$3\r\nSET\r\n$1\r\nk\r\n$3\r\n"));
        assert!(out.ends_with(b"\r\n$4\r\nEXAT\r\n$2\r\n77\r\n"));
    }

    #[test]
    fn multi_replies_at_all_fragment_sizes() {
        let input = b"*3\r\n$1\r\nx\r\n$-1\r\n$2\r\nyz\r\n";
        multi_at_all_sizes::<Resp>(3, input, &[(b"", Some(b"x")), (b"", None), (b"", Some(b"yz"))]);
        let mut items = Vec::new();
        assert_eq!(Resp::multi_reply(2, input, &mut items), Parsed::Malformed);
        let refused = Parsed::Done(MultiReply::Refused(b"-ERR"), 6);
        assert_eq!(Resp::multi_reply(2, b"-ERR\r\n", &mut items), refused);
    }

    #[test]
    fn nonsense_is_malformed() {
        for input in [
            &b"+OK\r\n"[..],
            b"$x\r\n",
            b"$2\r\nabcd",
            b"$-2\r\n",
            b"$99999999999999999999",
        ] {
            assert_eq!(
                Resp::reply(Command::Get, 3, input),
                Parsed::Malformed,
                "{}",
                input.escape_ascii()
            );
        }
        assert_eq!(Resp::reply(Command::Set, 3, b"$-1\r\n"), Parsed::Malformed);
        assert_eq!(Resp::reply(Command::Delete, 3, b"+OK\r\n"), Parsed::Malformed);
    }

    #[test]
    fn requests() {
        let mut out = Vec::new();
        Resp::get(&mut out, b"k1");
        Resp::set(&mut out, b"k2", &Value::plain(b"012"));
        Resp::delete(&mut out, b"k3");
        assert_eq!(
            out,
            b"*2\r\n$3\r\nGET\r\n$2\r\nk1\r\n*3\r\n$3\r\nSET\r\n$2\r\nk2\r\n$3\r\n012\r\n*2\r\n$3\r\nDEL\r\n$2\r\nk3\r\n"
        );
        let mut keys = KeyList::default();
        keys.push(b"a");
        keys.push(b"bb");
        out.clear();
        Resp::multi_get(&mut out, &keys);
        assert_eq!(out, b"*3\r\n$4\r\nMGET\r\n$1\r\na\r\n$2\r\nbb\r\n");
    }
}
