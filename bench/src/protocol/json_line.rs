//! The JSON-line protocol of memkv-tpc: `GET key`, `PUT key value`, `DEL key`, each answered by a JSON object in a line.
//!
//! A transaction is `START`, commands, `COMMIT`, sent in one piece; it is answered when the last of its lines is.

use super::{
    BATCH_KEYS_MAX, Entry, Item, KeyList, MultiReply, Op, Parsed, Protocol, Reply, TxnReply, TxnRequest, TxnState,
};
use crate::workload::{Command, Value};
use std::borrow::Cow;
use std::ops::Range;

/// The JSON-line protocol of memkv-tpc.
#[derive(Debug, Clone, Copy)]
pub struct JsonLine;

/// What the server says of a key that it does not have.
const NO_SUCH_KEY: &[u8] = b"there is no such key";
/// How it begins to say that an optimistic transaction failed because another one was quicker.
const CHANGED: &[u8] = b"a key that was read has changed";
/// Longest reply in bytes. One that is longer is none.
const MAX_REPLY: usize = 1 << 30;

impl Protocol for JsonLine {
    type Session = ();

    const NAME: &'static str = "json-line";
    const MULTI_GETS: bool = false;
    const TXN_MAX: usize = BATCH_KEYS_MAX;
    const CHECKED_TXN_MAX: usize = BATCH_KEYS_MAX;
    const TEXT_VALUES: bool = true;

    #[inline(always)]
    fn get(out: &mut Vec<u8>, key: &[u8]) {
        push_line(out, b"GET ", key);
    }

    #[inline(always)]
    fn set(out: &mut Vec<u8>, key: &[u8], value: &Value<'_>) {
        out.extend_from_slice(b"PUT ");
        out.extend_from_slice(key);
        out.push(b' ');
        value.append_to(out);
        out.push(b'\n');
    }

    #[inline(always)]
    fn delete(out: &mut Vec<u8>, key: &[u8]) {
        push_line(out, b"DEL ", key);
    }

    fn multi_get(_out: &mut Vec<u8>, _keys: &KeyList) {
        unreachable!("the protocol has no multi-get");
    }

    #[inline(always)]
    fn reply(command: Command, _key_len: usize, input: &[u8]) -> Parsed<Reply<'_>> {
        let (answer, len) = match answer(input) {
            Parsed::Done(answer, len) => (answer, len),
            Parsed::Incomplete => return Parsed::Incomplete,
            Parsed::Malformed => return Parsed::Malformed,
        };
        let reply = match (command, answer) {
            (Command::Get, Answer::Value(value)) => Reply::Hit {
                key: None,
                value: &input[value],
            },
            (Command::Get, Answer::Error(mesg)) if input[mesg.clone()] == *NO_SUCH_KEY => Reply::Miss,
            (Command::Set, Answer::Done) => Reply::Stored,
            (Command::Delete, Answer::Done) => Reply::Deleted,
            (_, Answer::Error(mesg)) => Reply::Refused(&input[mesg]),
            _ => return Parsed::Malformed,
        };
        Parsed::Done(reply, len)
    }

    fn multi_reply<'a>(_width: usize, _input: &'a [u8], _items: &mut Vec<Item>) -> Parsed<MultiReply<'a>> {
        Parsed::Malformed
    }

    #[inline(always)]
    fn plain(value: &[u8]) -> Cow<'_, [u8]> {
        match memchr::memchr(b'\\', value) {
            None => Cow::Borrowed(value),
            Some(_) => unescaped(value),
        }
    }

    fn txn<'a>(out: &mut Vec<u8>, ops: impl Iterator<Item = Op<'a>> + Clone) {
        out.extend_from_slice(b"START\n");
        for op in ops {
            match op {
                Op::Get(key) => Self::get(out, key),
                Op::Set(entry) => Self::set(out, entry.key, &entry.value),
                Op::Delete(key) => Self::delete(out, key),
            }
        }
        out.extend_from_slice(b"COMMIT\n");
    }

    fn checked_txn<'a>(out: &mut Vec<u8>, entries: impl Iterator<Item = Entry<'a>> + Clone) {
        out.extend_from_slice(b"START CHECKED\n");
        for entry in entries.clone() {
            Self::get(out, entry.key);
        }
        for entry in entries {
            Self::set(out, entry.key, &entry.value);
        }
        out.extend_from_slice(b"COMMIT\n");
    }

    /// Each line is a part.
    fn txn_reply<'a>(
        state: TxnState,
        width: usize,
        command: impl Fn(usize) -> Command,
        input: &'a [u8],
        items: &mut Vec<Item>,
    ) -> Parsed<TxnReply<'a>> {
        items.clear();
        let (answer, len) = match answer(input) {
            Parsed::Done(answer, len) => (answer, len),
            Parsed::Incomplete => return Parsed::Incomplete,
            Parsed::Malformed => return Parsed::Malformed,
        };
        let reads = match state.request {
            TxnRequest::Checked => width,
            _ => 0,
        };
        let last = state.parts == 1 + reads + width;
        let command = match state.parts.checked_sub(1) {
            Some(before) if before < reads => Command::Get,
            Some(before) if !last => command(before - reads),
            // START and COMMIT are answered as a set is.
            _ => Command::Set,
        };
        let mut found = |value| {
            items.push(Item {
                key: 0..0,
                value,
                version: 0,
            });
            TxnReply::Part
        };
        let reply = match (command, answer) {
            (Command::Get, Answer::Value(value)) => found(Some(value)),
            (Command::Get, Answer::Error(mesg)) if input[mesg.clone()] == *NO_SUCH_KEY => found(None),
            (_, Answer::Error(mesg)) => match &input[mesg] {
                mesg if last && mesg.starts_with(CHANGED) => TxnReply::Changed,
                mesg if last => TxnReply::Refused(mesg),
                mesg => TxnReply::Failing(mesg),
            },
            (Command::Set | Command::Delete, Answer::Done) if last => TxnReply::Committed,
            (Command::Set | Command::Delete, Answer::Done) => TxnReply::Part,
            _ => return Parsed::Malformed,
        };
        Parsed::Done(reply, len)
    }
}

#[inline(always)]
fn push_line(out: &mut Vec<u8>, verb: &[u8], key: &[u8]) {
    out.extend_from_slice(verb);
    out.extend_from_slice(key);
    out.push(b'\n');
}

/// One line of the server, with places in it.
enum Answer {
    /// Ok, and nothing else.
    Done,
    /// Ok, and the value between its quotes, escaped.
    Value(Range<usize>),
    /// No, and why, escaped.
    Error(Range<usize>),
}

/// Reads the line at the front of `input`.
#[inline(always)]
fn answer(input: &[u8]) -> Parsed<Answer> {
    match memchr::memchr(b'\n', input) {
        Some(end) => match object(&input[..end]) {
            Some(answer) => Parsed::Done(answer, end + 1),
            None => Parsed::Malformed,
        },
        None if input.first().is_none_or(|first| *first == b'{') && input.len() < MAX_REPLY => Parsed::Incomplete,
        None => Parsed::Malformed,
    }
}

/// Reads a line that is an object of strings. Members come in any order, and unknown ones mean nothing.
#[inline(always)]
fn object(line: &[u8]) -> Option<Answer> {
    let mut scanner = Scanner { line, at: 0 };
    let (mut status, mut result, mut mesg) = (None, None, 0..0);
    scanner.token(b'{')?;
    loop {
        let name = scanner.string()?;
        scanner.token(b':')?;
        let value = scanner.string()?;
        match &line[name] {
            b"status" => status = Some(value),
            b"result" => result = Some(value),
            b"mesg" => mesg = value,
            _ => {}
        }
        if scanner.token(b',').is_none() {
            break;
        }
    }
    scanner.token(b'}')?;
    scanner.blanks();
    match &line[status?] {
        _ if scanner.at < line.len() => None,
        b"Ok" => Some(result.map_or(Answer::Done, Answer::Value)),
        b"Error" => Some(Answer::Error(mesg)),
        _ => None,
    }
}

struct Scanner<'a> {
    line: &'a [u8],
    at: usize,
}

impl Scanner<'_> {
    #[inline(always)]
    fn blanks(&mut self) {
        while matches!(self.line.get(self.at), Some(b' ' | b'\t' | b'\r')) {
            self.at += 1;
        }
    }

    /// Moves behind `token`, if it comes next.
    #[inline(always)]
    fn token(&mut self, token: u8) -> Option<()> {
        self.blanks();
        (self.line.get(self.at) == Some(&token)).then(|| self.at += 1)
    }

    /// Moves behind a string: where it stands, without its quotes.
    #[inline(always)]
    fn string(&mut self) -> Option<Range<usize>> {
        self.token(b'"')?;
        let start = self.at;
        loop {
            let end = self.at + memchr::memchr2(b'"', b'\\', self.line.get(self.at..)?)?;
            if self.line[end] == b'"' {
                self.at = end + 1;
                return Some(start..end);
            }
            // Whatever is escaped does not end the string.
            self.at = end + 2;
        }
    }
}

/// The bytes of a string with escapes; one that is no JSON stays as it is, and is equal to no value.
#[cold]
fn unescaped(value: &[u8]) -> Cow<'_, [u8]> {
    let quoted = [b"\"", value, b"\""].concat();
    match serde_json::from_slice::<String>(&quoted) {
        Ok(text) => Cow::Owned(text.into_bytes()),
        Err(_) => Cow::Borrowed(value),
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{at_all_sizes, txn_at_all_sizes};
    use super::*;

    const OK: &[u8] = b"{\"status\": \"Ok\"}\n";
    const MISSING: &[u8] = b"{\"status\": \"Error\", \"mesg\": \"there is no such key\"}\n";

    #[test]
    fn replies_at_all_fragment_sizes() {
        let get =
            |input: &[u8], value| at_all_sizes::<JsonLine>(Command::Get, 3, input, Reply::Hit { key: None, value });
        get(b"{\"status\": \"Ok\", \"result\": \"3 * 3 = 9\"}\n", b"3 * 3 = 9");
        get(b"{\"status\": \"Ok\", \"result\": \"a\\\"}\\\\\"}\n", b"a\\\"}\\\\");
        get(b"{\"status\": \"Ok\", \"result\": \"\"}\n", b"");
        // In another order, with a member of a later version, and with blanks elsewhere.
        get(b"{\"result\":\"v\" , \"a\":\"b\",\"status\" :\"Ok\" } \r\n", b"v");
        at_all_sizes::<JsonLine>(Command::Get, 1, MISSING, Reply::Miss);
        at_all_sizes::<JsonLine>(Command::Set, 1, OK, Reply::Stored);
        at_all_sizes::<JsonLine>(Command::Delete, 1, OK, Reply::Deleted);
        for command in [Command::Get, Command::Set, Command::Delete] {
            let no = b"{\"status\": \"Error\", \"mesg\": \"no \\\"memory\\\"\"}\n";
            at_all_sizes::<JsonLine>(command, 1, no, Reply::Refused(b"no \\\"memory\\\""));
            at_all_sizes::<JsonLine>(command, 1, b"{\"status\": \"Error\"}\n", Reply::Refused(b""));
        }
    }

    #[test]
    fn transactions_at_all_fragment_sizes() {
        let hit = b"{\"status\": \"Ok\", \"result\": \"v\"}\n";
        let changed = b"{\"status\": \"Error\", \"mesg\": \"a key that was read has changed: nothing was applied\"}\n";
        let no = b"{\"status\": \"Error\", \"mesg\": \"too many\"}\n";
        let ops = [Command::Get, Command::Set, Command::Get, Command::Delete];
        let check = |request, commands: &[Command], lines: &[&[u8]], reply, read: &[_], failing| {
            txn_at_all_sizes::<JsonLine>(request, commands, &lines.concat(), reply, read, failing);
        };
        let (value, missing) = ((Some(&b"v"[..]), 0), (None, 0));
        let done: [&[u8]; 6] = [OK, hit, OK, MISSING, OK, OK];
        check(
            TxnRequest::Plain,
            &ops,
            &done,
            TxnReply::Committed,
            &[value, missing],
            None,
        );
        let failed: [&[u8]; 6] = [OK, hit, no, changed, no, no];
        let refused = TxnReply::Refused(b"too many");
        check(TxnRequest::Plain, &ops, &failed, refused, &[value], Some(b"too many"));
        // Nothing was read there, but the transaction is over all the same.
        let shut: [&[u8]; 3] = [no, no, OK];
        check(
            TxnRequest::Plain,
            &ops[..1],
            &shut,
            TxnReply::Committed,
            &[],
            Some(b"too many"),
        );

        let sets = [Command::Set; 2];
        let done: [&[u8]; 6] = [OK, hit, MISSING, OK, OK, OK];
        check(
            TxnRequest::Checked,
            &sets,
            &done,
            TxnReply::Committed,
            &[value, missing],
            None,
        );
        let lost: [&[u8]; 6] = [OK, hit, MISSING, OK, OK, changed];
        check(
            TxnRequest::Checked,
            &sets,
            &lost,
            TxnReply::Changed,
            &[value, missing],
            None,
        );
    }

    #[test]
    fn values_are_without_escapes() {
        for (escaped, plain) in [
            ("3 * 3", "3 * 3"),
            (r#"\"\\\/"#, "\"\\/"),
            ("\\n\\r\\t\\b\\f\\u0001\u{7f}", "\n\r\t\u{8}\u{c}\u{1}\u{7f}"),
            (r"\u8bf4\u00e9\ud83d\udc18", "说é🐘"),
            // No JSON.
            (r"\ud83d", r"\ud83d"),
            (r"a\q", r"a\q"),
        ] {
            let got = JsonLine::plain(escaped.as_bytes());
            assert_eq!(*got, *plain.as_bytes(), "{escaped}");
        }
    }

    #[test]
    fn nonsense_is_malformed() {
        for input in [
            &b"STORED\r\n"[..],
            b"x",
            b"\n",
            b"{}\n",
            b"{\"status\"}\n",
            b"{\"status\": 1}\n",
            b"{\"status\": \"Ok\"\n",
            b"{\"status\": \"Ok\",}\n",
            b"{\"status\": \"Ok\"} x\n",
            b"{\"status\": \"ok\", \"result\": \"v\"}\n",
            b"{\"result\": \"v\"}\n",
            b"{\"status\": \"Ok\", \"result\": \"v\n",
            b"{\"status\": \"Ok\", \"result\": \"v\\\n",
            b"{\"status\": \"Ok\", \"result\": \"v\\\"}\n",
            OK,
        ] {
            let parsed = JsonLine::reply(Command::Get, 3, input);
            assert_eq!(parsed, Parsed::Malformed, "{}", input.escape_ascii());
        }
        let value = b"{\"status\": \"Ok\", \"result\": \"v\"}\n";
        for command in [Command::Set, Command::Delete] {
            assert_eq!(JsonLine::reply(command, 3, value), Parsed::Malformed);
        }
        // START, a set and COMMIT have no values.
        for parts in 0..3 {
            let state = TxnState {
                request: TxnRequest::Plain,
                parts,
            };
            let parsed = JsonLine::txn_reply(state, 1, |_| Command::Set, value, &mut Vec::new());
            assert_eq!(parsed, Parsed::Malformed);
        }
    }

    #[test]
    fn requests() {
        let mut out = Vec::new();
        JsonLine::get(&mut out, b"k1");
        JsonLine::set(&mut out, b"k2", &Value::plain(b"0 1"));
        JsonLine::delete(&mut out, b"k3");
        assert_eq!(out, b"GET k1\nPUT k2 0 1\nDEL k3\n");
        let entry = |key| Entry {
            key,
            value: Value::plain(b"v"),
        };
        out.clear();
        let ops = [Op::Get(b"a"), Op::Set(entry(b"b")), Op::Delete(b"c")];
        JsonLine::txn(&mut out, ops.into_iter());
        assert_eq!(out, b"START\nGET a\nPUT b v\nDEL c\nCOMMIT\n");
        out.clear();
        JsonLine::checked_txn(&mut out, [entry(b"a"), entry(b"b")].into_iter());
        assert_eq!(out, b"START CHECKED\nGET a\nGET b\nPUT a v\nPUT b v\nCOMMIT\n");
    }
}
