//! Bytes with large values spliced in ([`Rope`]), and the flat form of commands that travels between cores.
//!
//! The flat form stays inside one process and one version, so it is little-endian, unversioned and unchecked: what one
//! core writes, another core of the same build reads.

use crate::model::{
    Broadcast, Check, Combine, Command, Condition, Deadline, Delete, GetEffects, Increment, NewVersion, Op, Put,
    Removal, UnixMillis, Value, Version, Wanted,
};
use bytes::Bytes;
use std::collections::VecDeque;

/// A large value that belongs at a place in a [`Rope`]'s flat bytes.
#[derive(Clone, Debug)]
pub struct Splice {
    /// Offset in the flat bytes before which the value is to be read.
    pub at: usize,
    /// The value.
    pub bytes: Bytes,
}

/// Room for this many large values is kept.
const SPLICES_KEPT_MAX: usize = 64;

/// Bytes to send: flat ones, and large values by reference between them.
///
/// Everything that encodes, encodes into one of these, so a value of [`crate::model::LARGE_VALUE_BYTES`] and more is
/// never copied on its way out, also across cores.
#[derive(Clone, Debug, Default)]
pub struct Rope {
    /// All bytes that are not large values, in order.
    pub flat: Vec<u8>,
    /// The large values, in order of their place.
    pub splices: VecDeque<Splice>,
    spliced_bytes: usize,
}

/// Bytes of memory that a buffer takes. What a large one has not used yet was never touched: the system has not given it. If it
/// counted, the buffer would grow without anybody seeing it.
pub fn touched_bytes(buffer: &Vec<u8>) -> usize {
    if buffer.capacity() > REUSED_BYTES_MAX {
        buffer.len()
    } else {
        buffer.capacity()
    }
}

/// Larger buffers are not used again by others.
pub const REUSED_BYTES_MAX: usize = 64 * 1024;

impl Rope {
    /// Adds bytes by copying them.
    #[inline]
    pub fn push(&mut self, bytes: &[u8]) {
        self.flat.extend_from_slice(bytes);
    }

    /// Adds a value: small ones are copied, large ones referenced.
    #[inline]
    pub fn push_value(&mut self, value: &Value<'_>) {
        match value {
            Value::Small(bytes) => self.flat.extend_from_slice(bytes),
            Value::Large(bytes) => self.splice((*bytes).clone()),
        }
    }

    /// Adds a value by reference.
    pub fn splice(&mut self, bytes: Bytes) {
        self.spliced_bytes += bytes.len();
        self.splices.push_back(Splice {
            at: self.flat.len(),
            bytes,
        });
    }

    /// Takes the first large value out; its place in the flat bytes is with it.
    pub fn take_splice(&mut self) -> Option<Splice> {
        let splice = self.splices.pop_front()?;
        self.spliced_bytes -= splice.bytes.len();
        Some(splice)
    }

    /// The same, but only if it stands at `at`.
    pub fn take_splice_at(&mut self, at: usize) -> Option<Splice> {
        match self.splices.front() {
            Some(splice) if splice.at == at => self.take_splice(),
            _ => None,
        }
    }

    /// Bytes of the values that were added by reference.
    #[inline]
    pub fn spliced_bytes(&self) -> usize {
        self.spliced_bytes
    }

    /// Bytes of memory that it takes, without the values that were added by reference.
    pub fn touched_bytes(&self) -> usize {
        touched_bytes(&self.flat) + self.splices.capacity() * size_of::<Splice>()
    }

    /// Makes room for so many more bytes, and perhaps for others; false when there is no memory for them.
    pub fn try_reserve(&mut self, bytes: usize) -> bool {
        self.flat.try_reserve(bytes).is_ok()
    }

    /// Makes room for so many more bytes, and no others; false when there is no memory for them.
    pub fn try_reserve_exact(&mut self, bytes: usize) -> bool {
        self.flat.try_reserve_exact(bytes).is_ok()
    }

    /// All bytes, spliced ones included.
    #[inline]
    pub fn len(&self) -> usize {
        self.flat.len() + self.spliced_bytes
    }

    /// True when there is nothing in it.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Empties it and keeps its memory, unless that is more than `keep_bytes_max`.
    pub fn clear(&mut self, keep_bytes_max: usize) {
        self.flat.clear();
        if self.flat.capacity() > keep_bytes_max {
            self.flat.shrink_to(keep_bytes_max);
        }
        if !self.splices.is_empty() {
            self.splices.clear();
        }
        if self.splices.capacity() > SPLICES_KEPT_MAX {
            self.splices = VecDeque::new();
        }
        self.spliced_bytes = 0;
    }

    /// Adds `flat_len` bytes at `start` of `source`, with the next `splices` splices of it, which must lie there.
    #[inline]
    pub fn append_from(&mut self, source: &mut Rope, start: usize, flat_len: usize, splices: usize) {
        if splices == 0 {
            self.flat.extend_from_slice(&source.flat[start..start + flat_len]);
            return;
        }
        let mut copied = start;
        for _ in 0..splices {
            let splice = source.take_splice().expect("the record counted its splices");
            self.flat.extend_from_slice(&source.flat[copied..splice.at]);
            copied = splice.at;
            self.splice(splice.bytes);
        }
        self.flat.extend_from_slice(&source.flat[copied..start + flat_len]);
    }

    /// Adds everything of `other`, emptying it.
    pub fn append(&mut self, other: &mut Rope) {
        if self.is_empty() && other.flat.len() > self.flat.capacity() {
            // Megabytes need not be copied.
            std::mem::swap(self, other);
            return;
        }
        let (flat, splices) = (other.flat.len(), other.splices.len());
        self.append_from(other, 0, flat, splices);
        other.clear(usize::MAX);
    }

    /// Moves what lies behind the first `flat_len` flat bytes and the first `splices` splices to another one. Returns how much that
    /// was: flat bytes, and splices.
    pub fn move_tail(&mut self, flat_len: usize, splices: usize, to: &mut Rope) -> (usize, usize) {
        let base = to.flat.len();
        let tail = self.splices.split_off(splices.min(self.splices.len()));
        let moved = (self.flat.len() - flat_len, tail.len());
        to.flat.extend_from_slice(&self.flat[flat_len..]);
        self.flat.truncate(flat_len);
        for splice in tail {
            self.spliced_bytes -= splice.bytes.len();
            to.spliced_bytes += splice.bytes.len();
            to.splices.push_back(Splice {
                at: base + splice.at - flat_len,
                bytes: splice.bytes,
            });
        }
        moved
    }

    /// Drops what lies behind the first `flat_len` flat bytes.
    pub fn truncate(&mut self, flat_len: usize) {
        self.flat.truncate(flat_len);
        while self.splices.back().is_some_and(|splice| splice.at >= flat_len) {
            self.spliced_bytes -= self.splices.pop_back().map_or(0, |splice| splice.bytes.len());
        }
    }

    /// Everything as one vector, for tests and cold paths.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut whole = Vec::with_capacity(self.len());
        let mut copied = 0;
        for splice in &self.splices {
            whole.extend_from_slice(&self.flat[copied..splice.at]);
            whole.extend_from_slice(&splice.bytes);
            copied = splice.at;
        }
        whole.extend_from_slice(&self.flat[copied..]);
        whole
    }
}

/// Appends an unsigned number in decimal.
#[inline]
pub fn push_decimal(out: &mut Vec<u8>, number: u64) {
    let mut digits = [0u8; 20];
    let mut at = digits.len();
    let mut rest = number;
    loop {
        at -= 1;
        digits[at] = b'0' + (rest % 10) as u8;
        rest /= 10;
        if rest == 0 {
            break;
        }
    }
    out.extend_from_slice(&digits[at..]);
}

/// Reads flat bytes front to back. Its methods panic past the end: the writer was this same program.
#[derive(Clone, Copy, Debug)]
pub struct Reader<'a>(pub &'a [u8]);

impl<'a> Reader<'a> {
    /// The next `count` bytes.
    #[inline]
    pub fn bytes(&mut self, count: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(count);
        self.0 = rest;
        taken
    }

    #[inline]
    fn array<const N: usize>(&mut self) -> [u8; N] {
        let (taken, rest) = self.0.split_first_chunk::<N>().expect("a whole record");
        self.0 = rest;
        *taken
    }

    /// The next byte.
    #[inline]
    pub fn u8(&mut self) -> u8 {
        self.array::<1>()[0]
    }

    /// The next two bytes.
    #[inline]
    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    /// The next four bytes.
    #[inline]
    pub fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    /// The next eight bytes.
    #[inline]
    pub fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }

    fn option<T>(&mut self, read: impl FnOnce(&mut Self) -> T) -> Option<T> {
        (self.u8() == 1).then(|| read(self))
    }

    fn deadline(&mut self) -> Deadline {
        match self.u64() {
            0 => Deadline::Never,
            moment => Deadline::At(UnixMillis(moment)),
        }
    }

    fn new_version(&mut self) -> NewVersion {
        match self.u8() {
            0 => NewVersion::OnDemand,
            1 => NewVersion::Now,
            _ => NewVersion::Exactly(Version(self.u64())),
        }
    }

    fn condition(&mut self) -> Condition {
        match self.u8() {
            0 => Condition::Always,
            1 => Condition::Absent,
            2 => Condition::Present,
            _ => Condition::VersionIs(Version(self.u64())),
        }
    }
}

fn push_option<T>(out: &mut Vec<u8>, value: Option<T>, push: impl FnOnce(&mut Vec<u8>, T)) {
    match value {
        None => out.push(0),
        Some(value) => {
            out.push(1);
            push(out, value);
        }
    }
}

fn push_u64(out: &mut Vec<u8>, number: u64) {
    out.extend_from_slice(&number.to_le_bytes());
}

fn push_deadline(out: &mut Vec<u8>, deadline: Deadline) {
    // The first millisecond of all stands for "never": as the end of an item, it is as long past as the second.
    push_u64(
        out,
        match deadline {
            Deadline::Never => 0,
            Deadline::At(moment) => moment.0.max(1),
        },
    );
}

fn push_new_version(out: &mut Vec<u8>, version: NewVersion) {
    match version {
        NewVersion::OnDemand => out.push(0),
        NewVersion::Now => out.push(1),
        NewVersion::Exactly(version) => {
            out.push(2);
            push_u64(out, version.0);
        }
    }
}

fn push_condition(out: &mut Vec<u8>, condition: Condition) {
    match condition {
        Condition::Always => out.push(0),
        Condition::Absent => out.push(1),
        Condition::Present => out.push(2),
        Condition::VersionIs(version) => {
            out.push(3);
            push_u64(out, version.0);
        }
    }
}

const GET: u8 = 0;
const GET_VERSION: u8 = 1;
const GET_EFFECTS: u8 = 2;
const PUT: u8 = 3;
const PUT_GENERAL: u8 = 4;
const DELETE: u8 = 5;
const INCREMENT: u8 = 6;
const TOUCH: u8 = 7;
const INSPECT: u8 = 8;
const PUT_LARGE: u8 = 9;
const PUT_GENERAL_LARGE: u8 = 10;

/// Appends `command`; a large value goes to the rope's splices.
#[inline]
pub fn push_command(out: &mut Rope, command: &Command<'_>) {
    let key_len = (command.key.len() as u16).to_le_bytes();
    let flat = &mut out.flat;
    let mut head = |kind: u8| {
        flat.extend_from_slice(&[kind, key_len[0], key_len[1]]);
        flat.extend_from_slice(command.key);
    };
    match &command.op {
        Op::Get { version, effects: None } => head(if *version { GET_VERSION } else { GET }),
        Op::Get {
            version,
            effects: Some(effects),
        } => {
            head(GET_EFFECTS);
            flat.push(u8::from(*version) | u8::from(effects.keep_access) << 1);
            push_option(flat, effects.touch, push_deadline);
            push_option(flat, effects.create, |out, (deadline, version)| {
                push_deadline(out, deadline);
                push_new_version(out, version);
            });
            push_option(flat, effects.refresh_below_s, |out, seconds| {
                push_u64(out, u64::from(seconds))
            });
        }
        Op::Put(put) => {
            let plain = put.combine == Combine::Replace
                && put.condition == Condition::Always
                && put.version == NewVersion::OnDemand
                && !put.accept_as_stale
                && put.create.is_none()
                && !put.key_encoded;
            head(match (plain, put.value) {
                (true, Value::Small(_)) => PUT,
                (true, Value::Large(_)) => PUT_LARGE,
                (false, Value::Small(_)) => PUT_GENERAL,
                (false, Value::Large(_)) => PUT_GENERAL_LARGE,
            });
            if !plain {
                flat.push(put.combine as u8 | u8::from(put.accept_as_stale) << 4 | u8::from(put.key_encoded) << 5);
                push_condition(flat, put.condition);
                push_new_version(flat, put.version);
                push_option(flat, put.create, push_deadline);
            }
            flat.extend_from_slice(&put.flags.to_le_bytes());
            push_deadline(flat, put.deadline);
            match put.value {
                Value::Small(bytes) => {
                    flat.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
                    flat.extend_from_slice(bytes);
                }
                Value::Large(bytes) => out.splice(bytes.clone()),
            }
        }
        Op::Delete(delete) => {
            head(DELETE);
            push_condition(flat, delete.condition);
            push_new_version(flat, delete.version);
            match delete.removal {
                Removal::Remove => flat.push(0),
                Removal::ClearValue => flat.push(1),
                Removal::MarkStale(deadline) => {
                    flat.push(2);
                    push_option(flat, deadline, push_deadline);
                }
            }
        }
        Op::Increment(increment) => {
            head(INCREMENT);
            push_u64(flat, increment.delta);
            flat.push(u8::from(increment.subtract));
            push_option(flat, increment.create, |out, (initial, deadline)| {
                push_u64(out, initial);
                push_deadline(out, deadline);
            });
            push_option(flat, increment.touch, push_deadline);
            push_condition(flat, increment.condition);
            push_new_version(flat, increment.version);
        }
        Op::Touch(deadline) => {
            head(TOUCH);
            push_deadline(flat, *deadline);
        }
        Op::Inspect => head(INSPECT),
    }
}

/// Appends `check`.
pub fn push_check(out: &mut Vec<u8>, check: &Check<'_>) {
    out.extend_from_slice(&(check.key.len() as u16).to_le_bytes());
    out.extend_from_slice(check.key);
    push_condition(out, check.condition);
}

/// Reads what [`push_check`] wrote.
pub fn read_check<'a>(reader: &mut Reader<'a>) -> Check<'a> {
    let key_len = usize::from(reader.u16());
    Check {
        key: reader.bytes(key_len),
        condition: reader.condition(),
    }
}

/// True when the command that `reader` stands at changes nothing: [`Command::only_reads`] without reading all of it.
#[inline]
pub fn only_reads(reader: &Reader<'_>) -> bool {
    matches!(reader.0[0], GET | GET_VERSION | INSPECT)
}

/// True when the command that `reader` stands at has its value among the splices.
#[inline]
pub fn reads_large(reader: &Reader<'_>) -> bool {
    matches!(reader.0[0], PUT_LARGE | PUT_GENERAL_LARGE)
}

/// Reads what [`push_command`] wrote; `large` is the value that was spliced, when one was.
#[inline]
pub fn read_command<'a>(reader: &mut Reader<'a>, large: Option<&'a Bytes>) -> Command<'a> {
    let kind = reader.u8();
    let key_len = usize::from(reader.u16());
    let key = reader.bytes(key_len);
    let op = match kind {
        GET | GET_VERSION => Op::Get {
            version: kind == GET_VERSION,
            effects: None,
        },
        GET_EFFECTS => {
            let bits = reader.u8();
            Op::Get {
                version: bits & 1 != 0,
                effects: Some(GetEffects {
                    touch: reader.option(Reader::deadline),
                    create: reader.option(|reader| (reader.deadline(), reader.new_version())),
                    refresh_below_s: reader.option(|reader| reader.u64() as u32),
                    keep_access: bits & 2 != 0,
                }),
            }
        }
        PUT | PUT_GENERAL | PUT_LARGE | PUT_GENERAL_LARGE => {
            let mut put = Put::new(Value::Small(&[]));
            if matches!(kind, PUT_GENERAL | PUT_GENERAL_LARGE) {
                let bits = reader.u8();
                put.combine = match bits & 0xf {
                    0 => Combine::Replace,
                    1 => Combine::Append,
                    _ => Combine::Prepend,
                };
                put.accept_as_stale = bits & 0x10 != 0;
                put.key_encoded = bits & 0x20 != 0;
                put.condition = reader.condition();
                put.version = reader.new_version();
                put.create = reader.option(Reader::deadline);
            }
            put.flags = reader.u32();
            put.deadline = reader.deadline();
            put.value = match kind {
                PUT | PUT_GENERAL => {
                    let bytes = reader.u32() as usize;
                    Value::Small(reader.bytes(bytes))
                }
                _ => Value::Large(large.expect("the value was spliced")),
            };
            Op::Put(put)
        }
        DELETE => Op::Delete(Delete {
            condition: reader.condition(),
            version: reader.new_version(),
            removal: match reader.u8() {
                0 => Removal::Remove,
                1 => Removal::ClearValue,
                _ => Removal::MarkStale(reader.option(Reader::deadline)),
            },
        }),
        INCREMENT => Op::Increment(Increment {
            delta: reader.u64(),
            subtract: reader.u8() == 1,
            create: reader.option(|reader| (reader.u64(), reader.deadline())),
            touch: reader.option(Reader::deadline),
            condition: reader.condition(),
            version: reader.new_version(),
        }),
        TOUCH => Op::Touch(reader.deadline()),
        _ => Op::Inspect,
    };
    Command { key, op }
}

/// Appends a request for every shard.
pub fn push_broadcast(out: &mut Vec<u8>, broadcast: Broadcast) {
    match broadcast {
        Broadcast::Flush(at) => {
            out.push(0);
            push_option(out, at, |out, at| push_u64(out, at.0));
        }
        Broadcast::Metrics(wanted) => {
            out.push(1);
            let Wanted {
                latencies,
                hot_keys,
                slow_log,
            } = wanted;
            out.extend([latencies, hot_keys, slow_log].map(u8::from));
        }
        Broadcast::ResetMetrics => out.push(2),
        Broadcast::Connections => out.push(3),
        Broadcast::PrefixStats(on) => out.push(4 + u8::from(on)),
        Broadcast::PrefixDump => out.push(6),
        Broadcast::Snapshot => out.push(7),
    }
}

/// Reads what [`push_broadcast`] wrote.
pub fn read_broadcast(reader: &mut Reader<'_>) -> Broadcast {
    match reader.u8() {
        0 => Broadcast::Flush(reader.option(|reader| UnixMillis(reader.u64()))),
        1 => Broadcast::Metrics(Wanted {
            latencies: reader.u8() == 1,
            hot_keys: reader.u8() == 1,
            slow_log: reader.u8() == 1,
        }),
        2 => Broadcast::ResetMetrics,
        3 => Broadcast::Connections,
        4 => Broadcast::PrefixStats(false),
        5 => Broadcast::PrefixStats(true),
        6 => Broadcast::PrefixDump,
        _ => Broadcast::Snapshot,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every field of every operation arrives as it was sent: a forgotten one would only show across cores.
    #[test]
    fn commands_survive_the_trip() {
        let large = Bytes::from(vec![7; 5000]);
        let at = Deadline::At(UnixMillis(123));
        let put = Put {
            flags: 7,
            deadline: at,
            ..Put::new(Value::Small(b"value"))
        };
        let mut ops = vec![
            Op::Get {
                version: false,
                effects: None,
            },
            Op::Get {
                version: true,
                effects: None,
            },
            Op::Get {
                version: true,
                effects: Some(GetEffects {
                    touch: Some(Deadline::Never),
                    create: Some((at, NewVersion::Exactly(Version(8)))),
                    refresh_below_s: Some(30),
                    keep_access: true,
                }),
            },
            Op::Put(put),
            Op::Put(Put {
                value: Value::Large(&large),
                ..put
            }),
            Op::Put(Put {
                version: NewVersion::Exactly(Version(9)),
                accept_as_stale: true,
                create: Some(at),
                key_encoded: true,
                ..put
            }),
            Op::Increment(Increment {
                delta: 5,
                subtract: true,
                create: Some((6, at)),
                touch: Some(Deadline::Never),
                condition: Condition::VersionIs(Version(4)),
                version: NewVersion::Exactly(Version(3)),
            }),
            Op::Touch(at),
            Op::Inspect,
        ];
        for combine in [Combine::Append, Combine::Prepend] {
            ops.push(Op::Put(Put { combine, ..put }));
        }
        for condition in [Condition::Absent, Condition::Present, Condition::VersionIs(Version(1))] {
            ops.push(Op::Put(Put { condition, ..put }));
        }
        for removal in [
            Removal::Remove,
            Removal::ClearValue,
            Removal::MarkStale(None),
            Removal::MarkStale(Some(at)),
        ] {
            ops.push(Op::Delete(Delete {
                condition: Condition::VersionIs(Version(5)),
                removal,
                version: NewVersion::Now,
            }));
        }
        for op in ops {
            let command = Command { key: b"key", op };
            let mut rope = Rope::default();
            push_command(&mut rope, &command);
            let large = rope.splices.front().map(|splice| splice.bytes.clone());
            let mut reader = Reader(&rope.flat);
            let read = read_command(&mut reader, large.as_ref());
            assert!(reader.0.is_empty());
            assert_eq!(format!("{command:?}"), format!("{read:?}"));
        }
    }

    #[test]
    fn ranges_take_their_splices_along() {
        let mut source = Rope::default();
        source.push(b"skip");
        source.push(b"head ");
        source.splice(Bytes::from_static(b"LARGE"));
        source.push(b" tail");
        source.splice(Bytes::from_static(b"!"));
        let mut target = Rope::default();
        target.push(b"> ");
        target.append_from(&mut source, 4, 10, 2);
        assert_eq!(target.to_vec(), b"> head LARGE tail!");
        assert_eq!(target.len(), 18);
        assert_eq!(source.len(), 14);
    }

    #[test]
    fn decimals() {
        for number in [0, 9, 10, 12345, u64::MAX] {
            let mut out = vec![];
            push_decimal(&mut out, number);
            assert_eq!(out, number.to_string().into_bytes());
        }
    }
}
