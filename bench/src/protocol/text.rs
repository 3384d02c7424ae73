//! A simple text protocol: `set <key> <bytes>` with the value on the next line, and `get <key>`.
//!
//! A get always answers with a block, and a missing key with an empty one, so an empty value cannot be told from a
//! missing key. There is a space before the end of the reply's first line.

use super::{
    Item, KeyList, MAX_LINE, MultiReply, Parsed, Protocol, Reply, cut_short, decimal, line, push_decimal, unexpected,
};
use crate::workload::{Command, Value};

/// The simple text protocol.
#[derive(Debug, Clone, Copy)]
pub struct Text;

impl Protocol for Text {
    type Session = ();

    const NAME: &'static str = "text";
    const DELETES: bool = false;
    const MULTI_GETS: bool = false;

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
        out.push(b' ');
        push_decimal(out, value.len());
        out.extend_from_slice(b"\r\n");
        value.append_to(out);
        out.extend_from_slice(b"\r\n");
    }

    fn delete(_out: &mut Vec<u8>, _key: &[u8]) {
        unreachable!("the protocol has no delete");
    }

    fn multi_get(_out: &mut Vec<u8>, _keys: &KeyList) {
        unreachable!("the protocol has no multi-get");
    }

    #[inline(always)]
    fn reply(command: Command, key_len: usize, input: &[u8]) -> Parsed<Reply<'_>> {
        match command {
            Command::Get => block(key_len, input),
            _ if input.starts_with(b"STORED\r\n") => Parsed::Done(Reply::Stored, 8),
            _ if input.starts_with(b"NOT-STORED\r\n") => Parsed::Done(Reply::NotStored, 12),
            _ => unexpected(input, is_error),
        }
    }

    fn multi_reply<'a>(_width: usize, _input: &'a [u8], _items: &mut Vec<Item>) -> Parsed<MultiReply<'a>> {
        Parsed::Malformed
    }
}

/// Reads `VALUE <key> <bytes> \r\n<data>\r\nEND\r\n`.
#[inline(always)]
fn block(key_len: usize, input: &[u8]) -> Parsed<Reply<'_>> {
    const WORD: &[u8] = b"VALUE ";
    if !input.starts_with(WORD) {
        return if WORD.starts_with(input) {
            Parsed::Incomplete
        } else {
            unexpected(input, is_error)
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
    let header = decimal(input, key_end + 1).filter(|&(_, end)| input.get(end..end + 3) == Some(b" \r\n"));
    let Some((bytes, header_end)) = header else {
        return if line(input).is_none() && input.len() < MAX_LINE {
            Parsed::Incomplete
        } else {
            Parsed::Malformed
        };
    };
    let start = header_end + 3;
    let end = start + bytes;
    match input.get(end..end + 7) {
        Some(b"\r\nEND\r\n") if bytes == 0 => Parsed::Done(Reply::Miss, end + 7),
        Some(b"\r\nEND\r\n") => Parsed::Done(
            Reply::Hit {
                key: Some(&input[WORD.len()..key_end]),
                value: &input[start..end],
            },
            end + 7,
        ),
        _ => cut_short(input, end, b"\r\nEND\r\n"),
    }
}

fn is_error(line: &[u8]) -> bool {
    // The protocol's errors are lines that begin with the word, in capitals, with or without a reason.
    line.starts_with(b"ERROR") || line.starts_with(b"SERVER_ERROR") || line.starts_with(b"CLIENT_ERROR")
}

#[cfg(test)]
mod tests {
    use super::super::tests::at_all_sizes;
    use super::*;

    #[test]
    fn replies_at_all_fragment_sizes() {
        let hit = Reply::Hit {
            key: Some(b"abc"),
            value: b"12\r\n5",
        };
        at_all_sizes::<Text>(Command::Get, 3, b"VALUE abc 5 \r\n12\r\n5\r\nEND\r\n", hit);
        at_all_sizes::<Text>(Command::Get, 2, b"VALUE abc 5 \r\n12\r\n5\r\nEND\r\n", hit);
        at_all_sizes::<Text>(Command::Get, 3, b"VALUE abc 0 \r\n\r\nEND\r\n", Reply::Miss);
        at_all_sizes::<Text>(Command::Set, 3, b"STORED\r\n", Reply::Stored);
        at_all_sizes::<Text>(Command::Set, 3, b"NOT-STORED\r\n", Reply::NotStored);
        at_all_sizes::<Text>(Command::Get, 3, b"ERROR no\r\n", Reply::Refused(b"ERROR no"));
    }

    #[test]
    fn nonsense_is_malformed() {
        for input in [
            &b"VALUE abc 5\r\n"[..],
            b"VALUE abc 1 \r\nabEND\r\n",
            b"END\r\n",
            b"VALUE  5 \r\n",
        ] {
            assert_eq!(
                Text::reply(Command::Get, 3, input),
                Parsed::Malformed,
                "{}",
                input.escape_ascii()
            );
        }
        assert_eq!(Text::reply(Command::Set, 3, b"VALUE\r\n"), Parsed::Malformed);
    }

    #[test]
    fn requests() {
        let mut out = Vec::new();
        Text::get(&mut out, b"k1");
        Text::set(&mut out, b"k2", &Value::plain(b"012"));
        assert_eq!(out, b"get k1\r\nset k2 3\r\n012\r\n");
    }
}
