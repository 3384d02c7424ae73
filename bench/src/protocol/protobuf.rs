//! The protobuf protocol of memkv-tpc, as `proto/memkv.proto` defines it: messages behind their lengths.
//!
//! Written and read by hand, so that a request costs the generator no more here than in the other protocols. Every request
//! has the same id, of two bytes: a client that counts its requests sends as many bytes, and as replies come in the order
//! of their requests nothing depends on the number.

use super::{
    BATCH_KEYS_MAX, Entry, Item, KeyList, MultiReply, Op, Parsed, Protocol, Reply, TxnReply, TxnRequest, TxnState,
};
use crate::workload::{Command, Value};
use std::ops::Range;

/// The protobuf protocol of memkv-tpc.
#[derive(Debug, Clone, Copy)]
pub struct Protobuf;

/// The id of every request: the middle one of those that take two bytes.
const ID: u64 = 8192;
/// Its field in a message.
const ID_FIELD: [u8; 3] = [1 << 3, ID as u8 & 127 | 128, (ID >> 7) as u8];

/// Numbers of fields.
mod field {
    pub(super) const GET: u8 = 2;
    pub(super) const SET: u8 = 3;
    pub(super) const DELETE: u8 = 4;
    pub(super) const TXN: u8 = 9;
    /// The keys of a get and of a delete, the entries of a set, the key of an entry and of a comparison.
    pub(super) const FIRST: u8 = 1;
    /// The value of an entry.
    pub(super) const VALUE: u8 = 2;
    /// Of a get: versions are wanted.
    pub(super) const WITH_VERSION: u8 = 2;
    /// A comparison of a transaction, and an operation for success.
    pub(super) const COMPARE: u8 = 1;
    pub(super) const SUCCESS: u8 = 2;
    /// The condition of a comparison.
    pub(super) const CONDITION: u8 = 2;
    /// Conditions: there is no item, or it has this version.
    pub(super) const ABSENT: u8 = 1;
    pub(super) const VERSION: u8 = 3;
    /// What an operation is.
    pub(super) const OP_GET: u8 = 1;
    pub(super) const OP_SET: u8 = 2;
    pub(super) const OP_DELETE: u8 = 3;
}

/// Longest reply in bytes. One that is said to be longer is none.
const MAX_REPLY: u64 = 1 << 30;

/// Codes of responses and results.
mod code {
    pub(super) const OK: u64 = 0;
    pub(super) const NOT_FOUND: u64 = 1;
    pub(super) const CONDITION_FAILED: u64 = 2;
    /// In the order of their numbers.
    pub(super) const NAMES: [&str; 12] = [
        "OK",
        "NOT_FOUND",
        "CONDITION_FAILED",
        "INVALID_ARGUMENT",
        "TOO_LARGE",
        "OUT_OF_MEMORY",
        "MALFORMED",
        "UNKNOWN_COMMAND",
        "UNAVAILABLE",
        "ABORTED",
        "READ_ONLY",
        "NOT_DURABLE",
    ];

    pub(super) fn name(code: u64) -> &'static [u8] {
        let name = usize::try_from(code).ok().and_then(|code| NAMES.get(code));
        name.unwrap_or(&"a code without a name").as_bytes()
    }
}

/// Appends `n` as a varint.
#[inline(always)]
pub(super) fn push_varint(out: &mut Vec<u8>, mut n: usize) {
    while n >= 128 {
        out.push(n as u8 | 128);
        n >>= 7;
    }
    out.push(n as u8);
}

/// How many bytes `n` takes as a varint.
#[inline(always)]
fn varint_len(n: usize) -> usize {
    (n.max(1).ilog2() / 7 + 1) as usize
}

/// How many bytes a field of `len` bytes takes, with its number and length.
#[inline(always)]
pub(super) fn field_len(len: usize) -> usize {
    1 + varint_len(len) + len
}

/// Appends what stands before the `len` bytes of field `number`.
#[inline(always)]
pub(super) fn push_field(out: &mut Vec<u8>, number: u8, len: usize) {
    out.push(number << 3 | 2);
    push_varint(out, len);
}

/// Appends what stands before the `len` bytes of a command.
#[inline(always)]
fn push_command(out: &mut Vec<u8>, command: u8, len: usize) {
    push_varint(out, ID_FIELD.len() + field_len(len));
    out.extend_from_slice(&ID_FIELD);
    push_field(out, command, len);
}

#[inline(always)]
fn push_key_command(out: &mut Vec<u8>, command: u8, key: &[u8]) {
    push_command(out, command, field_len(key.len()));
    push_bytes(out, field::FIRST, key);
}

/// How many bytes an entry takes.
#[inline(always)]
fn entry_len(key: &[u8], value: &Value<'_>) -> usize {
    // Bytes that are empty are left out, as encoders do.
    let value_len = if value.is_empty() { 0 } else { field_len(value.len()) };
    field_len(key.len()) + value_len
}

/// Appends an entry as field `number`.
#[inline(always)]
fn push_entry(out: &mut Vec<u8>, number: u8, key: &[u8], value: &Value<'_>) {
    push_field(out, number, entry_len(key, value));
    push_bytes(out, field::FIRST, key);
    if !value.is_empty() {
        push_field(out, field::VALUE, value.len());
        value.append_to(out);
    }
}

/// Appends `bytes` as field `number`.
#[inline(always)]
pub(super) fn push_bytes(out: &mut Vec<u8>, number: u8, bytes: &[u8]) {
    push_field(out, number, bytes.len());
    out.extend_from_slice(bytes);
}

/// The condition that a key still is as it was read: a field with a number.
fn unchanged(read: &Item) -> (u8, usize) {
    match read.value {
        Some(_) => (field::VERSION, read.version as usize),
        None => (field::ABSENT, 1),
    }
}

impl Protocol for Protobuf {
    type Session = ();

    const NAME: &'static str = "protobuf";
    const MULTI_SET_MAX: usize = BATCH_KEYS_MAX;
    const TXN_MAX: usize = BATCH_KEYS_MAX;
    // Its second request names each key twice, in a comparison and in an operation.
    const CHECKED_TXN_MAX: usize = BATCH_KEYS_MAX / 2;

    #[inline(always)]
    fn get(out: &mut Vec<u8>, key: &[u8]) {
        push_key_command(out, field::GET, key);
    }

    #[inline(always)]
    fn set(out: &mut Vec<u8>, key: &[u8], value: &Value<'_>) {
        push_command(out, field::SET, field_len(entry_len(key, value)));
        push_entry(out, field::FIRST, key, value);
    }

    #[inline(always)]
    fn delete(out: &mut Vec<u8>, key: &[u8]) {
        push_key_command(out, field::DELETE, key);
    }

    fn multi_get(out: &mut Vec<u8>, keys: &KeyList) {
        push_command(out, field::GET, keys.iter().map(|key| field_len(key.len())).sum());
        for key in keys.iter() {
            push_bytes(out, field::FIRST, key);
        }
    }

    #[inline(always)]
    fn reply(command: Command, _key_len: usize, input: &[u8]) -> Parsed<Reply<'_>> {
        let (mut results, mut first) = (0, KeyResult::default());
        let (outcome, len) = match response(input, |result| {
            if results == 0 {
                first = result;
            }
            results += 1;
        }) {
            Parsed::Done(outcome, len) => (outcome, len),
            Parsed::Incomplete => return Parsed::Incomplete,
            Parsed::Malformed => return Parsed::Malformed,
        };
        let reply = match (outcome, command, first.code) {
            (Outcome::Refused(text), ..) => Reply::Refused(text),
            (Outcome::Executed { .. }, ..) if results != 1 => return Parsed::Malformed,
            (_, Command::Get | Command::MultiGet, code::OK) => Reply::Hit {
                key: None,
                value: &input[first.value],
            },
            (_, Command::Get | Command::MultiGet, code::NOT_FOUND) => Reply::Miss,
            (_, Command::Set, code::OK) => Reply::Stored,
            (_, Command::Set, code::CONDITION_FAILED) => Reply::NotStored,
            (_, Command::Delete, code::OK) => Reply::Deleted,
            (_, Command::Delete, code::NOT_FOUND) => Reply::NotFound,
            (.., code) => Reply::Refused(code::name(code)),
        };
        Parsed::Done(reply, len)
    }

    fn multi_reply<'a>(width: usize, input: &'a [u8], items: &mut Vec<Item>) -> Parsed<MultiReply<'a>> {
        match batch((0..width).map(|_| Command::Get), input, items) {
            Parsed::Done(Batch::Refused(text), len) => Parsed::Done(MultiReply::Refused(text), len),
            Parsed::Done(Batch::Executed { results, .. }, len) if results == width => {
                Parsed::Done(MultiReply::Items, len)
            }
            Parsed::Incomplete => Parsed::Incomplete,
            _ => Parsed::Malformed,
        }
    }

    fn multi_set<'a>(out: &mut Vec<u8>, entries: impl Iterator<Item = Entry<'a>> + Clone) {
        let lens = entries.clone().map(|e| field_len(entry_len(e.key, &e.value)));
        push_command(out, field::SET, lens.sum());
        for entry in entries {
            push_entry(out, field::FIRST, entry.key, &entry.value);
        }
    }

    fn multi_set_reply(width: usize, input: &[u8]) -> Parsed<Reply<'_>> {
        match batch((0..width).map(|_| Command::Set), input, &mut Vec::new()) {
            Parsed::Done(Batch::Refused(text), len) => Parsed::Done(Reply::Refused(text), len),
            Parsed::Done(Batch::Executed { results, .. }, len) if results == width => Parsed::Done(Reply::Stored, len),
            Parsed::Incomplete => Parsed::Incomplete,
            _ => Parsed::Malformed,
        }
    }

    fn txn<'a>(out: &mut Vec<u8>, ops: impl Iterator<Item = Op<'a>> + Clone) {
        let op_len = |op: Op<'a>| match op {
            Op::Get(key) | Op::Delete(key) => field_len(key.len()),
            Op::Set(entry) => field_len(entry_len(entry.key, &entry.value)),
        };
        push_command(out, field::TXN, ops.clone().map(|op| field_len(op_len(op))).sum());
        for op in ops {
            push_field(out, field::SUCCESS, op_len(op));
            match op {
                Op::Get(key) => push_bytes(out, field::OP_GET, key),
                Op::Set(entry) => push_entry(out, field::OP_SET, entry.key, &entry.value),
                Op::Delete(key) => push_bytes(out, field::OP_DELETE, key),
            }
        }
    }

    fn checked_txn<'a>(out: &mut Vec<u8>, entries: impl Iterator<Item = Entry<'a>> + Clone) {
        let keys: usize = entries.clone().map(|entry| field_len(entry.key.len())).sum();
        push_command(out, field::GET, keys + 2);
        for entry in entries {
            push_bytes(out, field::FIRST, entry.key);
        }
        out.extend_from_slice(&[field::WITH_VERSION << 3, 1]);
    }

    fn checked_writes<'a>(out: &mut Vec<u8>, entries: impl Iterator<Item = Entry<'a>> + Clone, read: &[Item]) {
        let condition_len = |item: &Item| 1 + varint_len(unchanged(item).1);
        let compare_len = |key: &[u8], item: &Item| field_len(key.len()) + field_len(condition_len(item));
        let set_len = |entry: &Entry<'_>| field_len(entry_len(entry.key, &entry.value));
        let lens = entries
            .clone()
            .zip(read)
            .map(|(entry, item)| field_len(compare_len(entry.key, item)) + field_len(set_len(&entry)));
        push_command(out, field::TXN, lens.sum());
        for (entry, item) in entries.clone().zip(read) {
            push_field(out, field::COMPARE, compare_len(entry.key, item));
            push_bytes(out, field::FIRST, entry.key);
            push_field(out, field::CONDITION, condition_len(item));
            let (kind, number) = unchanged(item);
            out.push(kind << 3);
            push_varint(out, number);
        }
        for entry in entries {
            push_field(out, field::SUCCESS, set_len(&entry));
            push_entry(out, field::OP_SET, entry.key, &entry.value);
        }
    }

    fn txn_reply<'a>(
        state: TxnState,
        width: usize,
        command: impl Fn(usize) -> Command,
        input: &'a [u8],
        items: &mut Vec<Item>,
    ) -> Parsed<TxnReply<'a>> {
        let request = state.request;
        let commands = (0..width).map(|i| match request {
            TxnRequest::Checked => Command::Get,
            _ => command(i),
        });
        match batch(commands, input, items) {
            Parsed::Done(Batch::Refused(text), len) => Parsed::Done(TxnReply::Refused(text), len),
            Parsed::Done(Batch::Executed { results, txn }, len) => match (request, txn) {
                (TxnRequest::Checked, None) if results == width => Parsed::Done(TxnReply::Read, len),
                (TxnRequest::Plain | TxnRequest::Writes, Some(true)) if results == width => {
                    Parsed::Done(TxnReply::Committed, len)
                }
                (TxnRequest::Writes, Some(false)) if results == 0 => Parsed::Done(TxnReply::Changed, len),
                _ => Parsed::Malformed,
            },
            Parsed::Incomplete => Parsed::Incomplete,
            Parsed::Malformed => Parsed::Malformed,
        }
    }
}

/// The reply to a request for several keys.
enum Batch<'a> {
    /// It was done, and has so many results.
    Executed {
        results: usize,
        /// As in [`Outcome::Executed`].
        txn: Option<bool>,
    },
    /// The server refused all of it, or what one key was to get; its words, or the code's name.
    Refused(&'a [u8]),
}

/// Reads a response with a result for each of `commands`, or none, and lists in `items` what was read.
fn batch<'a>(mut commands: impl Iterator<Item = Command>, input: &'a [u8], items: &mut Vec<Item>) -> Parsed<Batch<'a>> {
    items.clear();
    let (mut results, mut failed) = (0, None);
    let parsed = response(input, |result| {
        results += 1;
        let value = match (commands.next(), result.code) {
            (Some(Command::Get), code::OK) => Some(result.value),
            (Some(Command::Get), code::NOT_FOUND) => None,
            (Some(Command::Set | Command::Delete), code::OK) | (Some(Command::Delete), code::NOT_FOUND) => return,
            (_, other) => {
                failed = failed.or(Some(other));
                return;
            }
        };
        items.push(Item {
            key: 0..0,
            value,
            version: result.version,
        });
    });
    match (parsed, failed) {
        (Parsed::Done(Outcome::Refused(text), len), _) => Parsed::Done(Batch::Refused(text), len),
        // More results than there were keys.
        (Parsed::Done(..), Some(code::OK)) => Parsed::Malformed,
        (Parsed::Done(Outcome::Executed { .. }, len), Some(code)) => {
            Parsed::Done(Batch::Refused(code::name(code)), len)
        }
        (Parsed::Done(Outcome::Executed { txn }, len), None) => Parsed::Done(Batch::Executed { results, txn }, len),
        (Parsed::Incomplete, _) => Parsed::Incomplete,
        (Parsed::Malformed, _) => Parsed::Malformed,
    }
}

/// How a request came out as a whole.
#[derive(Debug, PartialEq, Eq)]
enum Outcome<'a> {
    /// There are results.
    Executed {
        /// Of a transaction: whether its comparisons held.
        txn: Option<bool>,
    },
    /// The server refused the request; its words.
    Refused(&'a [u8]),
}

/// What came of one key.
#[derive(Debug, Default)]
struct KeyResult {
    code: u64,
    /// Where the value is.
    value: Range<usize>,
    version: u64,
}

/// The content of a field.
pub(super) enum Content {
    Number(u64),
    Bytes(Range<usize>),
    /// Of another type; none that is known here has it.
    Other,
}

/// Reads a varint at `*at`, which moves behind it. `None` when it does not end, within `input` or at all.
#[inline(always)]
fn varint(input: &[u8], at: &mut usize) -> Option<u64> {
    let first = *input.get(*at)?;
    *at += 1;
    if first < 128 {
        return Some(u64::from(first));
    }
    let mut n = u64::from(first & 127);
    for shift in (7..64).step_by(7) {
        let byte = *input.get(*at)?;
        *at += 1;
        n |= u64::from(byte & 127) << shift;
        if byte < 128 {
            return Some(n);
        }
    }
    None
}

/// Reads the field at `*at` of the message that ends `input`, and moves behind it: its number and content. `None` when the
/// bytes are no field.
#[inline(always)]
pub(super) fn next_field(input: &[u8], at: &mut usize) -> Option<(u64, Content)> {
    let tag = varint(input, at)?;
    let (len, content) = match tag & 7 {
        0 => return Some((tag >> 3, Content::Number(varint(input, at)?))),
        1 => (8, false),
        2 => (usize::try_from(varint(input, at)?).ok()?, true),
        5 => (4, false),
        _ => return None,
    };
    let start = *at;
    *at = start.checked_add(len).filter(|end| *end <= input.len())?;
    let content = if content {
        Content::Bytes(start..*at)
    } else {
        Content::Other
    };
    Some((tag >> 3, content))
}

/// Reads the response at the front of `input` and calls `each` with its results, in order; the values are places in
/// `input`. Fields come in any order, and unknown ones mean nothing.
#[inline(always)]
fn response(input: &[u8], each: impl FnMut(KeyResult)) -> Parsed<Outcome<'_>> {
    let mut start = 0;
    let end = match varint(&input[..input.len().min(5)], &mut start) {
        Some(len) if len <= MAX_REPLY => start + len as usize,
        None if input.len() < 5 => return Parsed::Incomplete,
        _ => return Parsed::Malformed,
    };
    match input.get(..end) {
        None => Parsed::Incomplete,
        Some(message) => match fields(message, start, each) {
            Some(outcome) => Parsed::Done(outcome, end),
            None => Parsed::Malformed,
        },
    }
}

/// Reads the fields of a response that begins at `start` and ends `message`.
#[inline(always)]
fn fields(message: &[u8], start: usize, mut each: impl FnMut(KeyResult)) -> Option<Outcome<'_>> {
    let (mut at, mut id, mut code, mut text, mut txn) = (start, 0, code::OK, 0..0, None);
    while at < message.len() {
        match next_field(message, &mut at)? {
            (1, Content::Number(n)) => id = n,
            (2, Content::Number(n)) => code = n,
            (3, Content::Bytes(bytes)) => text = bytes,
            (4, Content::Bytes(bytes)) => each(key_result(&message[..bytes.end], bytes.start)?),
            (7, Content::Bytes(bytes)) => txn = Some(txn_report(&message[..bytes.end], bytes.start)?),
            (1..=4 | 7, _) => return None,
            _ => {}
        }
    }
    match code {
        code::OK if id == ID => Some(Outcome::Executed { txn }),
        code::OK => None,
        code if text.is_empty() => Some(Outcome::Refused(code::name(code))),
        _ => Some(Outcome::Refused(&message[text])),
    }
}

/// Reads the result that begins at `start` and ends `input`.
#[inline(always)]
fn key_result(input: &[u8], start: usize) -> Option<KeyResult> {
    let (mut at, mut result) = (start, KeyResult::default());
    while at < input.len() {
        match next_field(input, &mut at)? {
            (1, Content::Number(n)) => result.code = n,
            (2, Content::Bytes(bytes)) => result.value = bytes,
            (5, Content::Number(n)) => result.version = n,
            (1 | 2 | 5, _) => return None,
            _ => {}
        }
    }
    Some(result)
}

/// Reads the report on a transaction that begins at `start` and ends `input`: whether it succeeded.
fn txn_report(input: &[u8], start: usize) -> Option<bool> {
    let (mut at, mut succeeded) = (start, false);
    while at < input.len() {
        match next_field(input, &mut at)? {
            (1, Content::Number(n)) => succeeded = n != 0,
            (1, _) => return None,
            _ => {}
        }
    }
    Some(succeeded)
}

#[cfg(test)]
mod tests {
    use super::super::tests::{at_all_sizes, multi_at_all_sizes, txn_at_all_sizes};
    use super::*;
    use memkv::proto::{self, Code, message};
    use prost::Message;

    fn result(code: Code, value: &'static [u8]) -> proto::KeyResult {
        proto::KeyResult {
            code: code.into(),
            value: value.into(),
            ..Default::default()
        }
    }

    fn response(results: Vec<proto::KeyResult>) -> Vec<u8> {
        let response = proto::Response {
            id: ID,
            results,
            ..Default::default()
        };
        response.encode_length_delimited_to_vec()
    }

    fn refusal(code: Code, text: &str) -> Vec<u8> {
        let response = proto::Response {
            code: code.into(),
            message: text.into(),
            ..Default::default()
        };
        response.encode_length_delimited_to_vec()
    }

    #[test]
    fn replies_at_all_fragment_sizes() {
        // One whose length takes one byte, and one whose lengths take two.
        for value in [&b"12\r\n5"[..], &[b'v'; 300]] {
            let hit = Reply::Hit { key: None, value };
            at_all_sizes::<Protobuf>(Command::Get, 3, &response(vec![result(Code::Ok, value)]), hit);
        }
        let empty = Reply::Hit { key: None, value: b"" };
        for (command, code, expected) in [
            (Command::Get, Code::Ok, empty),
            (Command::Get, Code::NotFound, Reply::Miss),
            (Command::Set, Code::Ok, Reply::Stored),
            (Command::Set, Code::ConditionFailed, Reply::NotStored),
            (Command::Set, Code::OutOfMemory, Reply::Refused(b"OUT_OF_MEMORY")),
            (Command::Delete, Code::ReadOnly, Reply::Refused(b"READ_ONLY")),
            (Command::Delete, Code::Ok, Reply::Deleted),
            (Command::Delete, Code::NotFound, Reply::NotFound),
        ] {
            at_all_sizes::<Protobuf>(command, 3, &response(vec![result(code, b"")]), expected);
        }
        for command in [Command::Get, Command::Set, Command::Delete] {
            let (said, silent) = (refusal(Code::TooLarge, "too long"), refusal(Code::Unavailable, ""));
            at_all_sizes::<Protobuf>(command, 3, &said, Reply::Refused(b"too long"));
            at_all_sizes::<Protobuf>(command, 3, &silent, Reply::Refused(b"UNAVAILABLE"));
        }
    }

    #[test]
    fn multi_replies_at_all_fragment_sizes() {
        let input = response(vec![
            result(Code::Ok, b"x"),
            result(Code::NotFound, b""),
            result(Code::Ok, b"yz"),
        ]);
        multi_at_all_sizes::<Protobuf>(3, &input, &[(b"", Some(b"x")), (b"", None), (b"", Some(b"yz"))]);
        let mut items = Vec::new();
        assert_eq!(Protobuf::multi_reply(2, &input, &mut items), Parsed::Malformed);
        let input = refusal(Code::InvalidArgument, "too many");
        let refused = Parsed::Done(MultiReply::Refused(b"too many"), input.len());
        assert_eq!(Protobuf::multi_reply(3, &input, &mut items), refused);
        let input = response(vec![result(Code::Ok, b"x"), result(Code::OutOfMemory, b"")]);
        let refused = Parsed::Done(MultiReply::Refused(b"OUT_OF_MEMORY"), input.len());
        assert_eq!(Protobuf::multi_reply(2, &input, &mut items), refused);
    }

    #[test]
    fn multi_sets_at_all_fragment_sizes() {
        let reply = |codes: &[Code]| response(codes.iter().map(|code| result(*code, b"")).collect());
        let full = reply(&[Code::Ok, Code::OutOfMemory]);
        for (input, expected) in [
            (reply(&[Code::Ok; 2]), Reply::Stored),
            (full, Reply::Refused(b"OUT_OF_MEMORY")),
            (refusal(Code::TooLarge, "too long"), Reply::Refused(b"too long")),
        ] {
            for cut in 0..input.len() {
                assert_eq!(Protobuf::multi_set_reply(2, &input[..cut]), Parsed::Incomplete);
            }
            let more = [&input[..], &input].concat();
            let parsed = Protobuf::multi_set_reply(2, &more);
            assert_eq!(parsed, Parsed::Done(expected, input.len()));
        }
        for codes in [&[Code::Ok][..], &[Code::Ok; 3]] {
            assert_eq!(Protobuf::multi_set_reply(2, &reply(codes)), Parsed::Malformed);
        }
    }

    #[test]
    fn transactions_at_all_fragment_sizes() {
        let txn = |succeeded, results| {
            let response = proto::Response {
                id: ID,
                results,
                txn: Some(proto::TxnReport { succeeded }),
                ..Default::default()
            };
            response.encode_length_delimited_to_vec()
        };
        let versioned = |value, version| proto::KeyResult {
            version,
            ..result(Code::Ok, value)
        };
        let (missing, done) = (result(Code::NotFound, b""), result(Code::Ok, b""));
        let ops = [Command::Get, Command::Set, Command::Get, Command::Delete];
        let input = txn(
            true,
            vec![result(Code::Ok, b"v"), done.clone(), missing.clone(), missing.clone()],
        );
        let read = [(Some(&b"v"[..]), 0), (None, 0)];
        txn_at_all_sizes::<Protobuf>(TxnRequest::Plain, &ops, &input, TxnReply::Committed, &read, None);
        let no = TxnReply::Refused(b"too many");
        let input = refusal(Code::InvalidArgument, "too many");
        txn_at_all_sizes::<Protobuf>(TxnRequest::Plain, &ops, &input, no, &[], None);

        let sets = [Command::Set; 2];
        let input = response(vec![versioned(b"v", u64::MAX), missing]);
        let read = [(Some(&b"v"[..]), u64::MAX), (None, 0)];
        txn_at_all_sizes::<Protobuf>(TxnRequest::Checked, &sets, &input, TxnReply::Read, &read, None);
        let input = txn(true, vec![done.clone(), done]);
        txn_at_all_sizes::<Protobuf>(TxnRequest::Writes, &sets, &input, TxnReply::Committed, &[], None);
        let failed = txn(false, vec![]);
        txn_at_all_sizes::<Protobuf>(TxnRequest::Writes, &sets, &failed, TxnReply::Changed, &[], None);

        // A transaction without conditions cannot fail, nor can results be fewer or more; and a Get is no transaction.
        fn parse(request: TxnRequest, input: &[u8]) -> Parsed<TxnReply<'_>> {
            let state = TxnState { request, parts: 0 };
            Protobuf::txn_reply(state, 2, |_| Command::Set, input, &mut Vec::new())
        }
        assert_eq!(parse(TxnRequest::Plain, &failed), Parsed::Malformed);
        assert_eq!(parse(TxnRequest::Checked, &input), Parsed::Malformed);
        for results in [1, 3] {
            let results = || vec![result(Code::Ok, b""); results];
            assert_eq!(parse(TxnRequest::Writes, &txn(true, results())), Parsed::Malformed);
            assert_eq!(parse(TxnRequest::Checked, &response(results())), Parsed::Malformed);
        }
        assert_eq!(
            parse(TxnRequest::Writes, &response(vec![result(Code::Ok, b""); 2])),
            Parsed::Malformed
        );
    }

    /// Fields in another order, fields of a later version of every wire type, a varint with needless bytes.
    #[test]
    fn fields_may_come_in_any_order() {
        let result = [0x12, 1, b'v', 0x31, 1, 2, 3, 4, 5, 6, 7, 8, 0x08, 0x80, 0x00];
        let mut body = vec![0x22, result.len() as u8];
        body.extend_from_slice(&result);
        body.extend_from_slice(&[0x7d, 1, 2, 3, 4]);
        body.extend_from_slice(&[0x82, 0x7d, 2, 0xff, 0xff]);
        body.extend_from_slice(&[0x78, 0x96, 0x01]);
        body.extend_from_slice(&ID_FIELD);
        let input = [&[body.len() as u8][..], &body].concat();
        let hit = Reply::Hit { key: None, value: b"v" };
        at_all_sizes::<Protobuf>(Command::Get, 3, &input, hit);
    }

    #[test]
    fn nonsense_is_malformed() {
        let other_id = proto::Response {
            id: ID + 1,
            results: vec![result(Code::Ok, b"")],
            ..Default::default()
        };
        for input in [
            response(vec![]),
            response(vec![result(Code::Ok, b""), result(Code::Ok, b"")]),
            other_id.encode_length_delimited_to_vec(),
            // Longer than any reply, and a length without an end.
            b"\xff\xff\xff\xff\x7f".to_vec(),
            b"\xff\xff\xff\xff\xff".to_vec(),
            // A group, a field that ends behind its message, one of a wrong type, and a cut varint.
            b"\x01\x0b".to_vec(),
            b"\x02\x22\x05".to_vec(),
            b"\x02\x20\x05".to_vec(),
            b"\x02\x08\x80".to_vec(),
        ] {
            let parsed = Protobuf::reply(Command::Get, 3, &input);
            assert_eq!(parsed, Parsed::Malformed, "{}", input.escape_ascii());
        }
    }

    /// What is written here is, byte by byte, what the generated encoder writes.
    #[test]
    fn requests_are_those_of_the_generated_encoder() {
        let generated = |command| {
            let message = proto::Message {
                id: ID,
                command: Some(command),
                durable: false,
            };
            message.encode_length_delimited_to_vec()
        };
        for key_len in [1, 16, 118, 119, 120, 127, 128, 250, 20_000] {
            let key = vec![b'k'; key_len];
            let get = |keys: &[&[u8]]| proto::Get {
                keys: keys.iter().map(|key| key.to_vec()).collect(),
                with_version: false,
            };
            let mut out = Vec::new();
            Protobuf::get(&mut out, &key);
            assert_eq!(out, generated(message::Command::Get(get(&[&key]))));
            out.clear();
            Protobuf::delete(&mut out, &key);
            let delete = proto::Delete {
                keys: vec![key.clone()],
                conditions: vec![],
            };
            assert_eq!(out, generated(message::Command::Delete(delete)));
            for value_len in [0, 1, 100, 127, 128, 16_383, 16_384, 3_000_000] {
                let value = vec![b'v'; value_len];
                out.clear();
                Protobuf::set(&mut out, &key, &Value::plain(&value));
                let entry = proto::Entry {
                    key: key.clone(),
                    value: value.into(),
                    ..Default::default()
                };
                let set = proto::Set { entries: vec![entry] };
                assert!(
                    out == generated(message::Command::Set(set)),
                    "{key_len} and {value_len} bytes"
                );
            }
            let mut keys = KeyList::default();
            keys.push(b"a");
            keys.push(&key);
            out.clear();
            Protobuf::multi_get(&mut out, &keys);
            assert_eq!(out, generated(message::Command::Get(get(&[b"a", &key]))));
        }
    }

    #[test]
    fn transactions_are_those_of_the_generated_encoder() {
        use proto::{condition::Is, operation::Operation};
        let generated = |command| {
            let message = proto::Message {
                id: ID,
                command: Some(command),
                durable: false,
            };
            message.encode_length_delimited_to_vec()
        };
        for (len, version) in [(1, 1), (100, 127), (127, 128), (300, 1 << 40), (20_000, u64::MAX)] {
            let (key, value) = (vec![b'k'; len], vec![b'v'; len]);
            let entries = [(&b"a"[..], &b""[..]), (&key, &value)].map(|(key, value)| Entry {
                key,
                value: Value::plain(value),
            });
            let known = [(&b"a"[..], &b""[..]), (&key, &value)].map(|(key, value)| proto::Entry {
                key: key.into(),
                value: value.to_vec().into(),
                ..Default::default()
            });
            let mut out = Vec::new();
            Protobuf::multi_set(&mut out, entries.into_iter());
            let set = proto::Set {
                entries: known.to_vec(),
            };
            assert!(out == generated(message::Command::Set(set)), "{len} bytes");

            let operation = |operation| proto::Operation {
                operation: Some(operation),
                with_version: false,
            };
            let ops = [
                Op::Get(&key),
                Op::Set(entries[0]),
                Op::Set(entries[1]),
                Op::Delete(b"d"),
            ];
            let success = vec![
                operation(Operation::Get(key.clone())),
                operation(Operation::Set(known[0].clone())),
                operation(Operation::Set(known[1].clone())),
                operation(Operation::Delete(b"d".to_vec())),
            ];
            let txn = proto::Txn {
                success,
                ..Default::default()
            };
            out.clear();
            Protobuf::txn(&mut out, ops.into_iter());
            assert!(out == generated(message::Command::Txn(txn)), "{len} bytes");

            out.clear();
            Protobuf::checked_txn(&mut out, entries.into_iter());
            let get = proto::Get {
                keys: vec![b"a".to_vec(), key.clone()],
                with_version: true,
            };
            assert!(out == generated(message::Command::Get(get)), "{len} bytes");

            let read = [(None, 0), (Some(0..0), version)].map(|(value, version)| Item {
                key: 0..0,
                value,
                version,
            });
            let compare = |key: &[u8], is| proto::Compare {
                key: key.into(),
                condition: Some(proto::Condition { is: Some(is) }),
            };
            let txn = proto::Txn {
                compare: vec![compare(b"a", Is::Absent(true)), compare(&key, Is::Version(version))],
                success: known.map(|entry| operation(Operation::Set(entry))).to_vec(),
                failure: vec![],
            };
            out.clear();
            Protobuf::checked_writes(&mut out, entries.into_iter(), &read);
            assert!(
                out == generated(message::Command::Txn(txn)),
                "{len} bytes, version {version}"
            );
        }
    }

    #[test]
    fn codes_have_the_names_of_the_definition() {
        for (number, name) in code::NAMES.iter().enumerate() {
            let code = Code::try_from(number as i32).unwrap();
            assert_eq!(code.as_str_name(), format!("CODE_{name}"));
        }
        assert!(Code::try_from(code::NAMES.len() as i32).is_err());
        assert_eq!(code::name(99), b"a code without a name");
    }
}
