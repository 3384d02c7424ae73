//! Calls: requests of this process's own HTTP and gRPC handlers, which read their wire formats themselves.
//!
//! A call goes to the engine as a flat record, on a session without a socket, and comes back as one: a [`Reply`] or the
//! results of a transaction with their values still by reference, or a report that is rendered already. Both ends are this
//! process, so nothing is checked.

use super::{Decoded, Decoder, Env, ServerFacts, Shape, Step, TxnResults, exposition, live, protobuf};
use crate::encoding::{Reader, Rope, push_check, push_command, read_check, read_command};
use crate::metrics::Report;
use crate::model::{
    Broadcast, Command, Deadline, Op, Put, Reply, Transaction, TxnEnd, UnixMillis, Value, Version, Wanted,
};
use bytes::Bytes;
use prost::Message;

/// What a request is, in its first byte. The length of what follows stands behind it.
mod kind {
    pub(super) const COMMAND: u8 = 0;
    /// A write whose value follows, announced.
    pub(super) const LARGE: u8 = 1;
    pub(super) const TRANSACTION: u8 = 2;
    pub(super) const REPORT: u8 = 3;
    pub(super) const SNAPSHOT: u8 = 4;
    /// Beside one of these: the answer comes when what it tells is safe.
    pub(super) const DURABLE: u8 = 1 << 7;
}

/// Bytes of kind and length.
const HEAD_BYTES: usize = 5;

/// A text that the server says about itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Text {
    /// Metrics in Prometheus' text format, version 0.0.4.
    Prometheus = 0,
    /// Metrics as OpenMetrics has it.
    OpenMetrics = 1,
    /// What the page shows, as JSON.
    Live = 2,
    /// An encoded [`MetricsReport`](crate::proto::MetricsReport).
    Protobuf = 3,
}

impl Text {
    const ALL: [Text; 4] = [Text::Prometheus, Text::OpenMetrics, Text::Live, Text::Protobuf];
}

fn push_framed(kind: u8, out: &mut Vec<u8>, write: impl FnOnce(&mut Vec<u8>)) {
    out.extend_from_slice(&[kind, 0, 0, 0, 0]);
    let start = out.len();
    write(out);
    let length = (out.len() - start) as u32;
    out[start - 4..start].copy_from_slice(&length.to_le_bytes());
}

fn push_flat(out: &mut Vec<u8>, command: &Command<'_>) {
    let mut command = *command;
    if let Op::Put(Put { value, .. }) = &mut command.op
        && let Value::Large(bytes) = *value
        && !bytes.is_empty()
    {
        *value = Value::Small(bytes);
    }
    let mut rope = Rope::default();
    std::mem::swap(&mut rope.flat, out);
    push_command(&mut rope, &command);
    std::mem::swap(&mut rope.flat, out);
}

/// Appends a request for one key. A large value is copied: announce it instead.
pub fn push_request(out: &mut Vec<u8>, command: &Command<'_>) {
    push_framed(kind::COMMAND, out, |out| push_flat(out, command));
}

/// Appends a write whose value of `value_bytes` follows; the one that `put` has is not looked at.
pub fn push_announced(out: &mut Vec<u8>, key: &[u8], put: Put<'_>, value_bytes: usize) {
    let none = Bytes::new();
    let put = Put {
        value: Value::Large(&none),
        ..put
    };
    push_framed(kind::LARGE, out, |out| {
        out.extend_from_slice(&(value_bytes as u32).to_le_bytes());
        push_flat(out, &Command { key, op: Op::Put(put) });
    });
}

/// Appends a transaction.
pub fn push_transaction(out: &mut Vec<u8>, txn: &Transaction<'_>) {
    push_framed(kind::TRANSACTION, out, |out| {
        for count in [txn.checks.len(), txn.success.len(), txn.failure.len()] {
            out.extend_from_slice(&(count as u32).to_le_bytes());
        }
        txn.checks.iter().for_each(|check| push_check(out, check));
        let commands = txn.success.iter().chain(txn.failure);
        commands.for_each(|command| push_flat(out, command));
    });
}

/// Appends a request for a text.
pub fn push_text_request(out: &mut Vec<u8>, text: Text) {
    push_framed(kind::REPORT, out, |out| out.push(text as u8));
}

/// Appends a request to begin a snapshot.
pub fn push_snapshot_request(out: &mut Vec<u8>) {
    push_framed(kind::SNAPSHOT, out, |_| {});
}

/// Has a request answered when what the answer tells is safe.
pub fn make_durable(request: &mut [u8]) {
    request[0] |= kind::DURABLE;
}

/// See [`Decoder::step`].
#[inline]
pub(super) fn step<'a>(input: &'a [u8], env: &Env<'a>) -> Step<'a> {
    let at = |decoded, used| Step {
        decoded,
        used,
        swallow: 0,
        next: Decoder::Call,
    };
    if input.len() < HEAD_BYTES {
        return at(Decoded::Incomplete, 0);
    }
    let mut reader = Reader(input);
    let kind = reader.u8();
    let length = reader.u32() as usize;
    if reader.0.len() < length {
        return at(Decoded::Incomplete, 0);
    }
    let used = HEAD_BYTES + length;
    let decoded = match kind & !kind::DURABLE {
        kind::COMMAND => Decoded::Command(read_command(&mut reader, None), Shape::code(0)),
        kind::LARGE => Decoded::Value(reader.u32() as usize),
        kind::TRANSACTION => {
            let (checks, success, failure) = (reader.u32(), reader.u32(), reader.u32());
            let checks = env
                .arena
                .alloc_slice_fill_iter((0..checks).map(|_| read_check(&mut reader)));
            let mut commands = |count: u32| {
                let commands = (0..count).map(|_| read_command(&mut reader, None));
                &*env.arena.alloc_slice_fill_iter(commands)
            };
            let txn = Transaction {
                checks,
                success: commands(success),
                failure: commands(failure),
            };
            Decoded::Transaction(txn, Shape::code(0))
        }
        kind::SNAPSHOT => Decoded::Broadcast(Broadcast::Snapshot, Shape::code(0)),
        _ => {
            let text = reader.u8();
            let wanted = Wanted {
                latencies: text == Text::Protobuf as u8,
                hot_keys: text != Text::Protobuf as u8,
                slow_log: text == Text::Live as u8,
            };
            Decoded::Broadcast(Broadcast::Metrics(wanted), Shape::code(u32::from(text)))
        }
    };
    match kind & kind::DURABLE {
        0 => at(decoded, used),
        _ => at(decoded.durable(), used),
    }
}

/// See [`Decoder::with_value`].
pub(super) fn with_value<'a>(header: &'a [u8], value: &'a Bytes) -> Step<'a> {
    let mut reader = Reader(&header[HEAD_BYTES + 4..]);
    let mut command = read_command(&mut reader, Some(value));
    if let Op::Put(put) = &mut command.op {
        put.value = Value::collected(value);
    }
    let decoded = Decoded::Command(command, Shape::code(0));
    Step {
        decoded: match header[0] & kind::DURABLE {
            0 => decoded,
            _ => decoded.durable(),
        },
        used: 0,
        swallow: 0,
        next: Decoder::Call,
    }
}

/// See [`Decoder::without_value`]: the value is not sent after this answer.
pub(super) fn without_value<'a>(header: &'a [u8], why: &Reply<'_>, env: &Env<'a>) -> Step<'a> {
    let mut answer = Rope::default();
    encode(why, &mut answer);
    let mut reader = Reader(&header[HEAD_BYTES..]);
    Step {
        decoded: Decoded::Refused(env.arena.alloc_slice_copy(&answer.flat)),
        used: header.len(),
        swallow: reader.u32() as usize,
        next: Decoder::Call,
    }
}

/// How a command came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Outcome {
    /// It was done; a read found the item.
    Done = 0,
    /// The key has no item.
    NotFound,
    /// No memory within the limit.
    OutOfMemory,
    /// The condition did not hold.
    ConditionFailed,
    /// The result would be too large.
    TooLarge,
    /// The key's owner takes no writes.
    ReadOnly,
    /// It cannot be made durable.
    NotDurable,
}

impl Outcome {
    const ALL: [Outcome; 7] = [
        Outcome::Done,
        Outcome::NotFound,
        Outcome::OutOfMemory,
        Outcome::ConditionFailed,
        Outcome::TooLarge,
        Outcome::ReadOnly,
        Outcome::NotDurable,
    ];
}

/// A [`Reply`] that owns its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// How it came out.
    pub outcome: Outcome,
    /// A write made an item where there was none.
    pub created: bool,
    /// As the item's writer gave them.
    pub flags: u32,
    /// 0 unless the command asked for it.
    pub version: Version,
    /// When the item ends.
    pub deadline: Deadline,
    /// Of a read that found an item.
    pub value: Bytes,
}

/// What came of a transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TxnAnswer {
    /// How it ended.
    pub end: TxnEnd,
    /// Whether its checks held, in their order.
    pub checks: Vec<bool>,
    /// The answers to what was executed, in order.
    pub answers: Vec<Answer>,
}

/// What a call is told that there was no memory to take in.
pub(super) fn out_of_memory() -> Vec<u8> {
    const { assert!(Outcome::OutOfMemory as u8 == TxnEnd::OutOfMemory as u8) };
    let mut answer = Rope::default();
    encode(&Reply::OutOfMemory, &mut answer);
    answer.flat
}

/// Encodes the reply to a command.
#[inline]
pub(super) fn encode(reply: &Reply<'_>, out: &mut Rope) {
    let (outcome, created, version) = match reply {
        Reply::Found(item) => (Outcome::Done, false, item.version),
        Reply::Stored { version, created } => (Outcome::Done, *created, *version),
        Reply::Deleted(version) => (Outcome::Done, false, *version),
        Reply::Touched | Reply::Counted(..) => (Outcome::Done, false, Version(0)),
        Reply::NotFound => (Outcome::NotFound, false, Version(0)),
        Reply::NotStored | Reply::VersionMismatch | Reply::NotANumber => (Outcome::ConditionFailed, false, Version(0)),
        Reply::OutOfMemory => (Outcome::OutOfMemory, false, Version(0)),
        Reply::TooLarge => (Outcome::TooLarge, false, Version(0)),
        Reply::ReadOnly => (Outcome::ReadOnly, false, Version(0)),
        Reply::NotDurable => (Outcome::NotDurable, false, Version(0)),
    };
    let flat = &mut out.flat;
    flat.extend_from_slice(&[outcome as u8, u8::from(created)]);
    flat.extend_from_slice(&version.0.to_le_bytes());
    let Reply::Found(item) = reply else {
        return flat.extend_from_slice(&[0; 16]);
    };
    let deadline_ms = match item.deadline {
        Deadline::Never => 0,
        Deadline::At(moment) => moment.0.max(1),
    };
    flat.extend_from_slice(&item.flags.to_le_bytes());
    flat.extend_from_slice(&deadline_ms.to_le_bytes());
    flat.extend_from_slice(&(item.value.bytes().len() as u32).to_le_bytes());
    out.push_value(&item.value);
}

/// Encodes the reply to a transaction.
pub(super) fn encode_txn(results: TxnResults, out: &mut Rope) {
    let TxnResults {
        end,
        checks,
        mut replies,
        ..
    } = results;
    out.flat.push(end as u8);
    out.flat.extend_from_slice(&(checks.len() as u32).to_le_bytes());
    out.flat.extend(checks.into_iter().map(u8::from));
    out.append(&mut replies);
}

/// Encodes the reply to a broadcast.
pub(super) fn encode_report(shape: &Shape<'_>, report: &Report, server: &ServerFacts<'_>, out: &mut Rope) {
    let cores = match report {
        Report::Metrics(cores) => cores,
        Report::NotDurable => return encode(&Reply::NotDurable, out),
        _ => return encode(&Reply::Touched, out),
    };
    match Text::ALL[shape.code as usize] {
        Text::Prometheus => exposition::prometheus(cores, server, false, &mut out.flat),
        Text::OpenMetrics => exposition::prometheus(cores, server, true, &mut out.flat),
        Text::Live => live::live(cores, server, &mut out.flat),
        Text::Protobuf => {
            let report = protobuf::metrics_report(cores.iter().map(|(_, metrics)| metrics), server);
            out.flat.extend_from_slice(&report.encode_to_vec());
        }
    }
}

/// Reads answers out of a rope, front to back.
#[derive(Debug)]
struct Answers {
    rope: Rope,
    at: usize,
}

impl Answers {
    fn bytes(&mut self, count: usize) -> &[u8] {
        self.at += count;
        &self.rope.flat[self.at - count..self.at]
    }

    fn next(&mut self) -> Answer {
        let mut reader = Reader(self.bytes(26));
        let outcome = Outcome::ALL[usize::from(reader.u8())];
        let created = reader.u8() == 1;
        let version = Version(reader.u64());
        let flags = reader.u32();
        let deadline = match reader.u64() {
            0 => Deadline::Never,
            moment => Deadline::At(UnixMillis(moment)),
        };
        let length = reader.u32() as usize;
        Answer {
            outcome,
            created,
            flags,
            version,
            deadline,
            value: self.value(length),
        }
    }

    /// The value that stands here, by reference when it was written so.
    fn value(&mut self, length: usize) -> Bytes {
        if length == 0 {
            return Bytes::new();
        }
        match self.rope.take_splice_at(self.at) {
            Some(splice) => splice.bytes,
            None => Bytes::copy_from_slice(self.bytes(length)),
        }
    }
}

/// Reads the answer to a request for one key.
pub fn read_answer(rope: Rope) -> (Answer, Vec<u8>) {
    let mut answers = Answers { rope, at: 0 };
    let answer = answers.next();
    (answer, answers.rope.flat)
}

/// Reads the answer to a transaction.
pub fn read_txn_answer(rope: Rope) -> TxnAnswer {
    let mut all = Answers { rope, at: 0 };
    let end = TxnEnd::ALL[usize::from(all.bytes(1)[0])];
    if end == TxnEnd::OutOfMemory {
        // It may be what any call is told: see [`out_of_memory`].
        return TxnAnswer {
            end,
            checks: vec![],
            answers: vec![],
        };
    }
    let checks = Reader(all.bytes(4)).u32() as usize;
    let checks = all.bytes(checks).iter().map(|held| *held == 1).collect();
    let mut answers = vec![];
    while all.at < all.rope.flat.len() {
        answers.push(all.next());
    }
    TxnAnswer { end, checks, answers }
}
