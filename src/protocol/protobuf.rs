//! The protobuf protocol of `proto/memkv.proto`.
//!
//! The requests and the replies about keys are read and written here, field by field, so that one with a single key
//! allocates nothing and its value is copied once; what is rare goes through [`crate::proto`]. Fields may come in any
//! order, and unknown ones are skipped, as protobuf has it. Two commands in one message, which protobuf would merge, are
//! malformed.
//!
//! A message of [`LARGE_VALUE_BYTES`] and more is collected into memory of its own, of which a single large value stays a
//! part: it is never copied again.

use super::{Decoded, Decoder, Env, NOT_DURABLE, READ_ONLY, ServerFacts, Shape, Step, TxnResults, is_http, is_text};
use crate::encoding::Rope;
use crate::metrics::{Metrics, Report};
use crate::model::{
    Broadcast, Check, Class, Command, Condition, Deadline, Delete, LARGE_VALUE_BYTES, NewVersion, Op, Put, Reply,
    Transaction, TxnEnd, UnixMillis, Value, Version, Wanted,
};
use crate::partition::Partitioner;
use crate::proto::{self, Code, Response};
use bytes::Bytes;
use hdrhistogram::serialization::{Serializer, V2Serializer};
use prost::encoding::{
    DecodeContext, WireType, decode_key, decode_varint, encode_varint, encoded_len_varint, skip_field,
};
use prost::{DecodeError, Message};

/// What a [`Shape`]'s code says, in its low byte. Its text is the request's id field as it came.
mod kind {
    pub(super) const GET: u32 = 0;
    pub(super) const SET: u32 = 1;
    pub(super) const DELETE: u32 = 2;
    pub(super) const TXN: u32 = 3;
    pub(super) const OTHER: u32 = 4;
}
/// Results carry versions.
const WITH_VERSION: u32 = 1 << 8;
/// The request has a condition, so a missing key is one that did not hold.
const CONDITIONAL: u32 = 1 << 9;
/// The reply is one result of several, without what stands before them.
const IN_GROUP: u32 = 1 << 10;

/// The most bytes that the length of a message takes, and that its id field takes.
const LENGTH_BYTES_MAX: usize = 5;
const ID_FIELD_BYTES_MAX: usize = 11;

/// A value stays a part of the message it came in if that holds no more than this, and the key, beside it.
const PINNED_BYTES_MAX: usize = 64;

/// The first bytes of fields: number and wire type.
mod field {
    pub(super) const ID: u8 = 1 << 3;
    pub(super) const CODE: u8 = 1 << 3;
    pub(super) const VALUE: u8 = 2 << 3 | 2;
    pub(super) const FLAGS: u8 = 3 << 3;
    pub(super) const EXPIRES_AT: u8 = 4 << 3;
    pub(super) const VERSION: u8 = 5 << 3;
    pub(super) const RESULT: u8 = 4 << 3 | 2;
    pub(super) const TXN: u8 = 7 << 3 | 2;
    pub(super) const SUCCEEDED: u8 = 1 << 3;
}

/// Why a request is refused.
struct Refusal {
    code: Code,
    reason: String,
}

#[cold]
fn malformed(reason: &str) -> Box<Refusal> {
    Box::new(Refusal {
        code: Code::Malformed,
        reason: reason.to_owned(),
    })
}

#[cold]
fn invalid(reason: String) -> Box<Refusal> {
    Box::new(Refusal {
        code: Code::InvalidArgument,
        reason,
    })
}

impl From<DecodeError> for Box<Refusal> {
    fn from(error: DecodeError) -> Self {
        malformed(&format!("not a Message: {error}"))
    }
}

/// A field's content, as far as the protocol has a use for it.
enum Field<'a> {
    Number(u64),
    Bytes(&'a [u8]),
    /// Of a type that no field of the protocol has.
    Other,
}

/// The fields of a message, one by one.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    #[inline(always)]
    fn next(&mut self) -> Result<Option<(u32, Field<'a>)>, Box<Refusal>> {
        if self.0.is_empty() {
            return Ok(None);
        }
        let key = varint(&mut self.0)?;
        let number = (key >> 3) as u32;
        let field = match key & 7 {
            _ if key < 8 || key > u64::from(u32::MAX) => return Err(malformed("there is no field of that number")),
            VARINT => Field::Number(varint(&mut self.0)?),
            BYTES => {
                let length = varint(&mut self.0)?;
                if length > self.0.len() as u64 {
                    return Err(malformed("a field is longer than its message"));
                }
                let (bytes, rest) = self.0.split_at(length as usize);
                self.0 = rest;
                Field::Bytes(bytes)
            }
            _ => {
                skip(key, &mut self.0)?;
                Field::Other
            }
        };
        Ok(Some((number, field)))
    }
}

const VARINT: u64 = WireType::Varint as u64;
const BYTES: u64 = WireType::LengthDelimited as u64;

/// The varint at the front of `bytes`: most have one byte, or two.
#[inline(always)]
fn varint(bytes: &mut &[u8]) -> Result<u64, DecodeError> {
    match **bytes {
        [first, ref rest @ ..] if first < 0x80 => {
            *bytes = rest;
            Ok(u64::from(first))
        }
        [first, second, ref rest @ ..] if second < 0x80 => {
            *bytes = rest;
            Ok(u64::from(first & 0x7f) | u64::from(second) << 7)
        }
        _ => long_varint(bytes),
    }
}

#[inline(never)]
fn long_varint(bytes: &mut &[u8]) -> Result<u64, DecodeError> {
    decode_varint(bytes)
}

/// Skips the content of a field of a type that is not used here, or finds out that there is no such field.
#[cold]
fn skip(key: u64, bytes: &mut &[u8]) -> Result<(), Box<Refusal>> {
    let mut encoded = vec![];
    encode_varint(key, &mut encoded);
    let (number, wire_type) = decode_key(&mut encoded.as_slice())?;
    Ok(skip_field(wire_type, number, bytes, DecodeContext::default())?)
}

fn at(decoded: Decoded<'_>, used: usize) -> Step<'_> {
    Step {
        decoded,
        used,
        swallow: 0,
        next: Decoder::Protobuf,
    }
}

/// See [`Decoder::step`].
#[inline]
pub(super) fn step<'a>(input: &'a [u8], env: &Env<'a>) -> Step<'a> {
    // A browser's verb is a length here, and a page can choose what follows so that it decodes. No client of this protocol
    // begins a message with a blank three to seven bytes in and an unknown field.
    if input[0].is_ascii_uppercase() && is_http(input) {
        return at(Decoded::Close(b""), input.len());
    }
    let front = &input[..input.len().min(LENGTH_BYTES_MAX)];
    let mut rest = front;
    let length = match varint(&mut rest) {
        Ok(length) if length <= u64::from(u32::MAX) => length as usize,
        Err(_) if front.len() < LENGTH_BYTES_MAX => return at(Decoded::Incomplete, 0),
        _ => {
            let refusal = malformed("the length of a message is no number of 32 bits");
            return at(Decoded::Close(answer(env, &[], &refusal)), input.len());
        }
    };
    let prefix = front.len() - rest.len();
    if length >= LARGE_VALUE_BYTES || length > env.request_bytes_max {
        return long(length, prefix, input, env);
    }
    match input[prefix..].get(..length) {
        None => at(Decoded::Incomplete, 0),
        Some(message) => {
            let mut id: &[u8] = &[];
            let decoded = decode(message, &mut id, None, env);
            at(or_refused(decoded, id, env), prefix + length)
        }
    }
}

/// A message that is to be collected, or is too long for that. Its id, when it comes first as it should, is read now.
fn long<'a>(length: usize, prefix: usize, input: &'a [u8], env: &Env<'a>) -> Step<'a> {
    let message = &input[prefix..];
    let front = &message[..message.len().min(ID_FIELD_BYTES_MAX).min(length)];
    let id = if front.first() == Some(&field::ID) {
        let mut rest = &front[1..];
        match decode_varint(&mut rest) {
            Ok(_) => &front[..front.len() - rest.len()],
            Err(_) if front.len() < ID_FIELD_BYTES_MAX.min(length) => return at(Decoded::Incomplete, 0),
            Err(_) => &[],
        }
    } else if front.is_empty() {
        return at(Decoded::Incomplete, 0);
    } else {
        &[]
    };
    let used = prefix + id.len();
    if length > env.request_bytes_max {
        let refusal = Refusal {
            code: Code::TooLarge,
            reason: format!(
                "the message has {length} bytes, and the most is {}",
                env.request_bytes_max
            ),
        };
        return Step {
            swallow: length - id.len(),
            ..at(Decoded::Refused(answer(env, id, &refusal)), used)
        };
    }
    at(Decoded::Value(length - id.len()), used)
}

/// See [`Decoder::with_value`]: what was collected is the message behind its id.
pub(super) fn with_value<'a>(header: &'a [u8], message: &'a Bytes, env: &Env<'a>) -> Step<'a> {
    let mut id = id_of(header);
    let decoded = decode(message, &mut id, Some(message), env);
    at(or_refused(decoded, id, env), 0)
}

/// See [`Decoder::without_value`]: what was announced is a message, which may be about anything.
pub(super) fn without_memory<'a>(header: &'a [u8], env: &Env<'a>) -> Step<'a> {
    let (id, mut prefix) = (id_of(header), header);
    let length = decode_varint(&mut prefix).unwrap_or_default() as usize;
    let refusal = Refusal {
        code: Code::OutOfMemory,
        reason: format!("no memory for a message of {length} bytes"),
    };
    Step {
        swallow: length.saturating_sub(id.len()),
        ..at(Decoded::Refused(answer(env, id, &refusal)), 0)
    }
}

/// The id field behind the length of a message.
fn id_of(header: &[u8]) -> &[u8] {
    let mut rest = header;
    let _ = decode_varint(&mut rest);
    rest
}

fn or_refused<'a>(decoded: Result<Decoded<'a>, Box<Refusal>>, id: &[u8], env: &Env<'a>) -> Decoded<'a> {
    match decoded {
        Ok(decoded) => decoded,
        Err(refusal) => Decoded::Refused(answer(env, id, &refusal)),
    }
}

/// A response that says no.
fn answer<'a>(env: &Env<'a>, id: &[u8], refusal: &Refusal) -> &'a [u8] {
    let response = Response {
        id: id_number(id),
        code: refusal.code.into(),
        message: refusal.reason.clone(),
        ..Response::default()
    };
    env.arena.alloc_slice_copy(&response.encode_length_delimited_to_vec())
}

/// An id field as the response repeats it: as it came, unless its first byte was spelt out of the ordinary.
#[inline]
fn id_field<'a>(field: &'a [u8], number: u64, env: &Env<'a>) -> &'a [u8] {
    if field[0] == field::ID {
        return field;
    }
    let mut usual = vec![field::ID];
    encode_varint(number, &mut usual);
    env.arena.alloc_slice_copy(&usual)
}

/// The number in an id field.
fn id_number(id: &[u8]) -> u64 {
    decode_varint(&mut id.get(1..).unwrap_or_default()).unwrap_or_default()
}

/// Decodes a message; `id` becomes its id field. `collected` is what the message lies in when that is memory of its own.
#[inline]
fn decode<'a>(
    message: &'a [u8],
    id: &mut &'a [u8],
    collected: Option<&'a Bytes>,
    env: &Env<'a>,
) -> Result<Decoded<'a>, Box<Refusal>> {
    let mut fields = Fields(message);
    let (mut command, mut code) = (None, 0);
    loop {
        let before = fields.0;
        let Some((number, field)) = fields.next()? else { break };
        match (number, field) {
            (1, Field::Number(number)) => *id = id_field(&before[..before.len() - fields.0.len()], number, env),
            (2..=9 | 11, Field::Bytes(body)) if command.is_none() => command = Some((number, body)),
            (2..=9 | 11, Field::Bytes(_)) => return Err(malformed("more than one command in a message")),
            (10, Field::Number(number)) => code = Shape::DURABLE * u32::from(number != 0),
            (1..=11, _) => return Err(malformed("a field of the message is of a wrong type")),
            _ => {}
        }
    }
    let Some((number, body)) = command else {
        return Err(Box::new(Refusal {
            code: Code::UnknownCommand,
            reason: "the message has no command that this server knows".to_owned(),
        }));
    };
    let text = *id;
    let asked = Shape { code, text };
    let other = Shape {
        code: kind::OTHER | code,
        text,
    };
    match number {
        2 => get(body, asked, env),
        3 => set(body, asked, collected, env),
        4 => delete(body, asked, env),
        5 => {
            proto::Metrics::decode(body)?;
            let wanted = Wanted {
                latencies: true,
                ..Wanted::default()
            };
            Ok(Decoded::Broadcast(Broadcast::Metrics(wanted), other))
        }
        6 => {
            proto::Ping::decode(body)?;
            Ok(Decoded::Answer(pong(text, env)))
        }
        7 => {
            let delay_ms = proto::Flush::decode(body)?.delay_ms;
            let at = (delay_ms > 0).then(|| UnixMillis(env.now.0.saturating_add(delay_ms)));
            Ok(Decoded::Broadcast(Broadcast::Flush(at), other))
        }
        9 => transaction(body, asked, env),
        11 => {
            proto::Snapshot::decode(body)?;
            Ok(Decoded::Broadcast(Broadcast::Snapshot, other))
        }
        _ => {
            proto::Topology::decode(body)?;
            Ok(Decoded::About(other))
        }
    }
}

fn pong<'a>(id: &[u8], env: &Env<'a>) -> &'a [u8] {
    // An id field has fewer than 128 bytes, so its length is one byte.
    let pong = env.arena.alloc_slice_fill_copy(1 + id.len(), id.len() as u8);
    pong[1..].copy_from_slice(id);
    pong
}

/// Several commands, or one that needs no list.
struct Commands<'a> {
    first: Option<Command<'a>>,
    all: bumpalo::collections::Vec<'a, Command<'a>>,
}

impl<'a> Commands<'a> {
    fn new(env: &Env<'a>) -> Self {
        Self {
            first: None,
            all: bumpalo::collections::Vec::new_in(env.arena),
        }
    }

    #[inline]
    fn push(&mut self, command: Command<'a>, env: &Env<'a>) -> Result<(), Box<Refusal>> {
        let Some(first) = self.first else {
            self.first = Some(command);
            return Ok(());
        };
        if self.all.is_empty() {
            self.all.push(first);
        }
        if self.all.len() >= env.request_keys_max {
            let most = env.request_keys_max;
            return Err(invalid(format!("more than {most} keys in one message")));
        }
        self.all.push(command);
        Ok(())
    }

    #[inline(always)]
    fn finish(self, code: u32, asked: Shape<'a>, env: &Env<'a>) -> Result<Decoded<'a>, Box<Refusal>> {
        let (code, text) = (code | asked.code, asked.text);
        match (self.first, self.all.is_empty()) {
            (None, _) => Err(invalid("no key".to_owned())),
            (Some(command), true) => {
                let conditional = condition_of(&command) != Condition::Always;
                let code = code | if conditional { CONDITIONAL } else { 0 };
                Ok(Decoded::Command(command, Shape { code, text }))
            }
            (Some(_), false) => Ok(self.together(code | IN_GROUP, text, env)),
        }
    }

    /// Several commands make a transaction. If one has a condition, there is a check for each, so that the reply can tell
    /// which of them did not hold.
    #[inline(never)]
    fn together(self, code: u32, text: &'a [u8], env: &Env<'a>) -> Decoded<'a> {
        let mut checks = bumpalo::collections::Vec::new_in(env.arena);
        let success = self.all.into_bump_slice_mut();
        if success.iter().any(|command| condition_of(command) != Condition::Always) {
            checks.extend(success.iter().map(|command| Check {
                key: command.key,
                condition: condition_of(command),
            }));
            for command in success.iter_mut() {
                match &mut command.op {
                    Op::Put(put) => put.condition = Condition::Always,
                    Op::Delete(delete) => delete.condition = Condition::Always,
                    _ => {}
                }
            }
        }
        let txn = Transaction {
            checks: checks.into_bump_slice(),
            success,
            failure: &[],
        };
        Decoded::Transaction(txn, Shape { code, text })
    }
}

fn condition_of(command: &Command<'_>) -> Condition {
    match &command.op {
        Op::Put(put) => put.condition,
        Op::Delete(delete) => delete.condition,
        _ => Condition::Always,
    }
}

/// Checks a key, the one with this number in its request.
#[inline]
fn check_key(key: &[u8], number: usize, env: &Env<'_>) -> Result<(), Box<Refusal>> {
    if key.is_empty() {
        return Err(invalid(format!("key {number} is empty")));
    }
    if key.len() > env.key_bytes_max {
        let (length, most) = (key.len(), env.key_bytes_max);
        return Err(invalid(format!(
            "key {number} has {length} bytes, and the most is {most}"
        )));
    }
    Ok(())
}

#[inline]
fn get<'a>(body: &'a [u8], asked: Shape<'a>, env: &Env<'a>) -> Result<Decoded<'a>, Box<Refusal>> {
    let mut with_version = false;
    let mut fields = Fields(body);
    let mut commands = Commands::new(env);
    // The version may be asked for behind the keys.
    let mut keys = 0;
    while let Some((number, field)) = fields.next()? {
        match (number, field) {
            (1, Field::Bytes(key)) => {
                keys += 1;
                check_key(key, keys, env)?;
                let op = Op::Get {
                    version: with_version,
                    effects: None,
                };
                commands.push(Command { key, op }, env)?;
            }
            (2, Field::Number(wish)) => with_version = wish != 0,
            (1 | 2, _) => return Err(malformed("a field of Get is of a wrong type")),
            _ => {}
        }
    }
    if !with_version {
        return commands.finish(kind::GET, asked, env);
    }
    for command in commands.first.iter_mut().chain(&mut commands.all) {
        command.op = Op::Get {
            version: true,
            effects: None,
        };
    }
    commands.finish(kind::GET | WITH_VERSION, asked, env)
}

#[inline]
fn set<'a>(
    body: &'a [u8],
    asked: Shape<'a>,
    collected: Option<&'a Bytes>,
    env: &Env<'a>,
) -> Result<Decoded<'a>, Box<Refusal>> {
    let mut fields = Fields(body);
    let mut commands = Commands::new(env);
    let mut code = kind::SET;
    let mut entries = 0;
    while let Some((number, field)) = fields.next()? {
        match (number, field) {
            (1, Field::Bytes(body)) => {
                entries += 1;
                let (command, with_version) = entry(body, entries, env)?;
                if with_version {
                    code |= WITH_VERSION;
                }
                commands.push(command, env)?;
            }
            (1, _) => return Err(malformed("a field of Set is of a wrong type")),
            _ => {}
        }
    }
    if let (Some(collected), Some(Command { op: Op::Put(put), .. }), true) =
        (collected, &mut commands.first, commands.all.is_empty())
        && put.value.bytes().len() >= LARGE_VALUE_BYTES
        && collected.len() - put.value.bytes().len() <= env.key_bytes_max + PINNED_BYTES_MAX
    {
        let part = collected.slice_ref(put.value.bytes());
        put.value = Value::Large(env.large.get_or_init(|| part));
    }
    commands.finish(code, asked, env)
}

/// An entry of a Set, and whether its version is wanted.
#[inline(always)]
fn entry<'a>(body: &'a [u8], number: usize, env: &Env<'a>) -> Result<(Command<'a>, bool), Box<Refusal>> {
    let mut fields = Fields(body);
    let mut key: &[u8] = &[];
    let mut put = Put::new(Value::Small(&[]));
    while let Some((number, field)) = fields.next()? {
        match (number, field) {
            (1, Field::Bytes(bytes)) => key = bytes,
            (2, Field::Bytes(bytes)) => put.value = Value::Small(bytes),
            (3, Field::Number(flags)) => put.flags = flags as u32,
            (4 | 5, Field::Number(0)) => put.deadline = Deadline::Never,
            (4, Field::Number(ttl_ms)) => put.deadline = Deadline::At(UnixMillis(env.now.0.saturating_add(ttl_ms))),
            (5, Field::Number(moment)) => put.deadline = Deadline::At(UnixMillis(moment)),
            (6, Field::Bytes(body)) => put.condition = merge_condition(body, put.condition)?,
            (7, Field::Number(0)) => put.version = NewVersion::OnDemand,
            (7, Field::Number(_)) => put.version = NewVersion::Now,
            (1..=7, _) => return Err(malformed("a field of an Entry is of a wrong type")),
            _ => {}
        }
    }
    check_key(key, number, env)?;
    put.key_encoded = !is_text(key);
    let length = put.value.bytes().len();
    if length > env.value_bytes_max {
        let most = env.value_bytes_max;
        return Err(Box::new(Refusal {
            code: Code::TooLarge,
            reason: format!("the value of entry {number} has {length} bytes, and the most is {most}"),
        }));
    }
    let with_version = put.version != NewVersion::OnDemand;
    let op = Op::Put(put);
    Ok((Command { key, op }, with_version))
}

/// Merges a Condition into what was there before. A kind of condition that this server does not know must not be ignored: what
/// depends on it would be done in any case.
fn merge_condition(body: &[u8], before: Condition) -> Result<Condition, Box<Refusal>> {
    let mut fields = Fields(body);
    let mut condition = before;
    while let Some((number, field)) = fields.next()? {
        condition = match (number, field) {
            (1 | 2, Field::Number(0)) => Condition::Always,
            (1, Field::Number(_)) => Condition::Absent,
            (2, Field::Number(_)) => Condition::Present,
            (3, Field::Number(version)) => Condition::VersionIs(Version(version)),
            (1..=3, _) => return Err(malformed("a field of a Condition is of a wrong type")),
            _ => {
                return Err(invalid(
                    "a condition of a kind that this server does not know".to_owned(),
                ));
            }
        };
    }
    Ok(condition)
}

#[inline]
fn delete<'a>(body: &'a [u8], asked: Shape<'a>, env: &Env<'a>) -> Result<Decoded<'a>, Box<Refusal>> {
    let mut fields = Fields(body);
    let mut commands = Commands::new(env);
    let mut conditions = bumpalo::collections::Vec::new_in(env.arena);
    let mut keys = 0;
    while let Some((number, field)) = fields.next()? {
        match (number, field) {
            (1, Field::Bytes(key)) => {
                keys += 1;
                check_key(key, keys, env)?;
                let op = Op::Delete(Delete::default());
                commands.push(Command { key, op }, env)?;
            }
            (2, Field::Bytes(_)) if conditions.len() >= env.request_keys_max => {
                let most = env.request_keys_max;
                return Err(invalid(format!("more than {most} conditions in one message")));
            }
            (2, Field::Bytes(body)) => conditions.push(merge_condition(body, Condition::Always)?),
            (1 | 2, _) => return Err(malformed("a field of Delete is of a wrong type")),
            _ => {}
        }
    }
    if !conditions.is_empty() {
        if conditions.len() != keys {
            let conditions = conditions.len();
            return Err(invalid(format!(
                "{conditions} conditions for {keys} keys: give none, or one for each"
            )));
        }
        let listed = match commands.all.is_empty() {
            true => commands.first.as_mut_slice(),
            false => &mut commands.all,
        };
        for (command, condition) in listed.iter_mut().zip(conditions) {
            if condition == Condition::Absent {
                return Err(invalid("a delete cannot have its key absent".to_owned()));
            }
            command.op = Op::Delete(Delete {
                condition,
                ..Delete::default()
            });
        }
    }
    commands.finish(kind::DELETE, asked, env)
}

/// A Txn. Its commands stand in the order of the message: keys are numbered through all of it.
#[cold]
fn transaction<'a>(body: &'a [u8], asked: Shape<'a>, env: &Env<'a>) -> Result<Decoded<'a>, Box<Refusal>> {
    let mut fields = Fields(body);
    let mut checks = bumpalo::collections::Vec::new_in(env.arena);
    let mut success = bumpalo::collections::Vec::new_in(env.arena);
    let mut failure = bumpalo::collections::Vec::new_in(env.arena);
    let mut keys = 0;
    while let Some((number, field)) = fields.next()? {
        let body = match (number, field) {
            (1..=3, Field::Bytes(body)) => body,
            (1..=3, _) => return Err(malformed("a field of Txn is of a wrong type")),
            _ => continue,
        };
        keys += 1;
        if keys > env.request_keys_max {
            let most = env.request_keys_max;
            return Err(invalid(format!("more than {most} keys in one message")));
        }
        match number {
            1 => checks.push(compare(body, keys, env)?),
            2 => success.push(operation(body, keys, env)?),
            _ => failure.push(operation(body, keys, env)?),
        }
    }
    if keys == 0 {
        return Err(invalid("neither a comparison nor an operation".to_owned()));
    }
    let txn = Transaction {
        checks: checks.into_bump_slice(),
        success: success.into_bump_slice(),
        failure: failure.into_bump_slice(),
    };
    // Each result says for itself whether it carries a version.
    let code = kind::TXN | IN_GROUP | WITH_VERSION | asked.code;
    let text = asked.text;
    Ok(Decoded::Transaction(txn, Shape { code, text }))
}

fn compare<'a>(body: &'a [u8], number: usize, env: &Env<'a>) -> Result<Check<'a>, Box<Refusal>> {
    let mut fields = Fields(body);
    let (mut key, mut condition): (&[u8], _) = (&[], Condition::Always);
    while let Some((number, field)) = fields.next()? {
        match (number, field) {
            (1, Field::Bytes(bytes)) => key = bytes,
            (2, Field::Bytes(body)) => condition = merge_condition(body, condition)?,
            (1 | 2, _) => return Err(malformed("a field of Compare is of a wrong type")),
            _ => {}
        }
    }
    check_key(key, number, env)?;
    Ok(Check { key, condition })
}

fn operation<'a>(body: &'a [u8], number: usize, env: &Env<'a>) -> Result<Command<'a>, Box<Refusal>> {
    let mut fields = Fields(body);
    let (mut command, mut version) = (None, false);
    while let Some((field_number, field)) = fields.next()? {
        match (field_number, field) {
            (1, Field::Bytes(key)) => {
                let op = Op::Get {
                    version: false,
                    effects: None,
                };
                command = Some(Command { key, op });
            }
            (2, Field::Bytes(body)) => command = Some(entry(body, number, env)?.0),
            (3, Field::Bytes(key)) => {
                let op = Op::Delete(Delete::default());
                command = Some(Command { key, op });
            }
            (4, Field::Number(wish)) => version = wish != 0,
            (1..=4, _) => return Err(malformed("a field of Operation is of a wrong type")),
            _ => {}
        }
    }
    let mut command = command.ok_or_else(|| invalid(format!("operation {number} is none that this server knows")))?;
    check_key(command.key, number, env)?;
    if condition_of(&command) != Condition::Always {
        return Err(invalid(format!(
            "operation {number} has a condition: it belongs to compare"
        )));
    }
    if let Op::Get { version: wish, .. } = &mut command.op {
        *wish = version;
    }
    Ok(command)
}

/// Encodes the reply to a command: a whole response, or one result of a group.
#[inline]
pub(super) fn encode(shape: &Shape<'_>, reply: &Reply<'_>, out: &mut Rope) {
    let mut result = KeyResult {
        code: Code::Ok,
        value: Value::Small(&[]),
        flags: 0,
        expires_at_ms: 0,
        version: 0,
    };
    match reply {
        Reply::Found(item) => {
            result.value = item.value;
            result.flags = item.flags;
            if let Deadline::At(moment) = item.deadline {
                result.expires_at_ms = moment.0;
            }
            result.version = item.version.0;
        }
        Reply::Stored { version, .. } => result.version = version.0,
        Reply::Deleted(_) | Reply::Touched | Reply::Counted(..) => {}
        Reply::NotFound if shape.code & 0xff == kind::SET || shape.code & CONDITIONAL != 0 => {
            result.code = Code::ConditionFailed
        }
        Reply::NotFound => result.code = Code::NotFound,
        Reply::NotStored | Reply::VersionMismatch | Reply::NotANumber => result.code = Code::ConditionFailed,
        Reply::OutOfMemory => result.code = Code::OutOfMemory,
        Reply::TooLarge => result.code = Code::TooLarge,
        Reply::ReadOnly => result.code = Code::ReadOnly,
        Reply::NotDurable => result.code = Code::NotDurable,
    }
    if shape.code & WITH_VERSION == 0 {
        result.version = 0;
    }
    let length = result.encoded_len();
    if shape.code & IN_GROUP == 0 {
        begin_response(shape, 1 + encoded_len_varint(length as u64) + length, out);
    }
    out.flat.push(field::RESULT);
    encode_varint(length as u64, &mut out.flat);
    result.encode(out);
}

/// Encodes that a command was not done durably, or that what it reads may be lost.
pub(super) fn encode_not_durable(shape: &Shape<'_>, out: &mut Rope) {
    if shape.code & IN_GROUP == 0 {
        begin_response(shape, CODE_RESULT_BYTES, out);
    }
    push_code(Code::NotDurable, out);
}

/// Encodes what stands before the fields of a response that are `bytes` long.
#[inline]
fn begin_response(shape: &Shape<'_>, bytes: usize, out: &mut Rope) {
    encode_varint((shape.text.len() + bytes) as u64, &mut out.flat);
    out.push(shape.text);
}

/// Encodes the reply to a request for several keys.
pub(super) fn encode_txn(shape: &Shape<'_>, results: TxnResults, out: &mut Rope) {
    let TxnResults {
        end,
        checks,
        mut replies,
        commands,
    } = results;
    let of_keys = shape.code & 0xff != kind::TXN;
    match end {
        TxnEnd::TooLarge => {
            return push_refusal(shape, Code::TooLarge, "the values are too large for one response", out);
        }
        TxnEnd::OutOfMemory if of_keys => (0..commands).for_each(|_| push_code(Code::OutOfMemory, &mut replies)),
        TxnEnd::OutOfMemory => {
            return push_refusal(shape, Code::OutOfMemory, "the server's memory limit is reached", out);
        }
        TxnEnd::ReadOnly if of_keys => (0..commands).for_each(|_| push_code(Code::ReadOnly, &mut replies)),
        TxnEnd::ReadOnly => return push_refusal(shape, Code::ReadOnly, READ_ONLY, out),
        TxnEnd::NotDurable if of_keys => (0..commands).for_each(|_| push_code(Code::NotDurable, &mut replies)),
        TxnEnd::NotDurable => return push_refusal(shape, Code::NotDurable, NOT_DURABLE, out),
        TxnEnd::Failure if of_keys => {
            for held in checks {
                let code = if held { Code::Aborted } else { Code::ConditionFailed };
                push_code(code, &mut replies);
            }
        }
        TxnEnd::Success | TxnEnd::Failure => {}
    }
    let succeeded: &[u8] = match (of_keys, end) {
        (true, _) => &[],
        (false, TxnEnd::Success) => &[field::TXN, 2, field::SUCCEEDED, 1],
        (false, _) => &[field::TXN, 0],
    };
    begin_response(shape, replies.len() + succeeded.len(), out);
    out.append(&mut replies);
    out.push(succeeded);
}

/// Bytes of a result that is nothing but a code.
const CODE_RESULT_BYTES: usize = 4;

/// A result that is nothing but a code.
fn push_code(code: Code, out: &mut Rope) {
    out.push(&[field::RESULT, 2, field::CODE, code as u8]);
}

/// A KeyResult to write.
struct KeyResult<'a> {
    code: Code,
    value: Value<'a>,
    flags: u32,
    expires_at_ms: u64,
    version: u64,
}

impl KeyResult<'_> {
    fn numbers(&self) -> [(u8, u64); 4] {
        [
            (field::CODE, self.code as u64),
            (field::FLAGS, u64::from(self.flags)),
            (field::EXPIRES_AT, self.expires_at_ms),
            (field::VERSION, self.version),
        ]
    }

    #[inline]
    fn encoded_len(&self) -> usize {
        let value = self.value.bytes().len();
        let mut length = match value {
            0 => 0,
            _ => 1 + encoded_len_varint(value as u64) + value,
        };
        for (_, number) in self.numbers() {
            if number != 0 {
                length += 1 + encoded_len_varint(number);
            }
        }
        length
    }

    #[inline]
    fn encode(&self, out: &mut Rope) {
        for (field, number) in self.numbers() {
            if number != 0 {
                out.flat.push(field);
                encode_varint(number, &mut out.flat);
            }
        }
        let value = self.value.bytes().len();
        if value > 0 {
            out.flat.push(field::VALUE);
            encode_varint(value as u64, &mut out.flat);
            out.push_value(&self.value);
        }
    }
}

fn push_response(shape: &Shape<'_>, response: Response, out: &mut Rope) {
    let response = Response {
        id: id_number(shape.text),
        ..response
    };
    out.push(&response.encode_length_delimited_to_vec());
}

fn push_refusal(shape: &Shape<'_>, code: Code, message: &str, out: &mut Rope) {
    let response = Response {
        code: code.into(),
        message: message.to_owned(),
        ..Response::default()
    };
    push_response(shape, response, out);
}

/// Encodes the reply to a broadcast.
pub(super) fn encode_report(shape: &Shape<'_>, report: &Report, server: &ServerFacts<'_>, out: &mut Rope) {
    let metrics = match report {
        Report::Metrics(cores) => Some(metrics_report(cores.iter().map(|(_, metrics)| metrics), server)),
        Report::ReadOnly => return push_refusal(shape, Code::ReadOnly, READ_ONLY, out),
        Report::NotDurable => return push_refusal(shape, Code::NotDurable, NOT_DURABLE, out),
        _ => None,
    };
    let response = Response {
        metrics,
        ..Response::default()
    };
    push_response(shape, response, out);
}

/// What all cores have counted, as one message.
pub(super) fn metrics_report<'a>(
    cores: impl Iterator<Item = &'a Metrics>,
    server: &ServerFacts<'_>,
) -> proto::MetricsReport {
    let (mut sum, mut snapshot_at_ms) = (Metrics::default(), u64::MAX);
    for metrics in cores {
        sum.merge(metrics);
        snapshot_at_ms = snapshot_at_ms.min(metrics.counters.snapshot_at_ms);
    }
    sum.counters.snapshot_at_ms = snapshot_at_ms;
    let mut counters: std::collections::BTreeMap<String, u64> = sum
        .counters
        .named()
        .map(|(name, value)| (name.to_owned(), value))
        .collect();
    counters.insert("memory_limit_bytes".to_owned(), server.memory_bytes_max);
    counters.insert("resident_bytes".to_owned(), server.process.resident_bytes);
    counters.insert("cpu_user_us".to_owned(), server.process.user_us);
    counters.insert("cpu_system_us".to_owned(), server.process.system_us);
    let places = Class::ALL.into_iter().flat_map(|class| [(class, false), (class, true)]);
    let latencies = places.filter_map(|(class, forwarded)| {
        let recorded = sum.latency(class, forwarded);
        if recorded.is_empty() {
            return None;
        }
        let mut histogram = vec![];
        V2Serializer::new()
            .serialize(recorded, &mut histogram)
            .expect("a histogram of these bounds can be written to memory");
        Some(proto::Latency {
            command: class.name().to_owned(),
            forwarded,
            count: recorded.len(),
            min_ns: recorded.min(),
            p50_ns: recorded.value_at_quantile(0.5),
            p90_ns: recorded.value_at_quantile(0.9),
            p99_ns: recorded.value_at_quantile(0.99),
            p99_9_ns: recorded.value_at_quantile(0.999),
            p99_99_ns: recorded.value_at_quantile(0.9999),
            max_ns: recorded.max(),
            histogram,
        })
    });
    proto::MetricsReport {
        counters,
        latencies: latencies.collect(),
        server_version: env!("CARGO_PKG_VERSION").to_owned(),
        cores: u32::from(server.table.cores()),
    }
}

/// Encodes the answer to a Topology.
pub(super) fn encode_topology(shape: &Shape<'_>, server: &ServerFacts<'_>, out: &mut Rope) {
    use proto::topology_report::TokenFunction;
    let table = server.table;
    let (function, seed) = match table.partitioner() {
        Partitioner::Hashed { seed } => (TokenFunction::Xxh3, seed),
        Partitioner::Ordered { .. } => (TokenFunction::FirstBytes, 0),
    };
    let ranges = (0..table.shards())
        .map(crate::model::ShardId)
        .map(|shard| proto::Range {
            start: table.range(shard).start,
            core: u32::from(table.core_of(shard).0),
        });
    let topology = proto::TopologyReport {
        token_function: function.into(),
        seed,
        ranges: ranges.collect(),
        core_ports: server.core_ports.iter().map(|port| u32::from(*port)).collect(),
        cores: u32::from(table.cores()),
    };
    let response = Response {
        topology: Some(topology),
        ..Response::default()
    };
    push_response(shape, response, out);
}

/// What a connection over the limit is told.
pub(super) fn refusal() -> Vec<u8> {
    last_words(Code::Unavailable, "too many open connections")
}

/// What a connection is told before it is closed because there is no memory for its request.
pub(super) fn out_of_memory() -> Vec<u8> {
    last_words(Code::OutOfMemory, "the server's memory limit is reached")
}

/// A response to no request in particular.
fn last_words(code: Code, message: &str) -> Vec<u8> {
    let response = Response {
        code: code.into(),
        message: message.to_owned(),
        ..Response::default()
    };
    response.encode_length_delimited_to_vec()
}
