//! memcached's meta commands: `mg`, `ms`, `md`, `ma`, `me` and `mn`.
//!
//! A line is a command, a key and flags of one letter, each perhaps with a token. The flags that only shape the reply stay
//! text: they travel in the [`Shape`] and are walked again when the reply is written, in the client's order.
//!
//! Beyond memcached 1.6.18, as later versions have them: `E` (the new version), `x` with `md` (clear the value), and `N` with
//! `ms` in append mode.

use super::super::{Decoded, Env, Shape, Step, parse_u64, words};
use super::{
    BAD_CHUNK, BAD_FORMAT, ERROR, Found, NO_MEMORY, NOT_A_NUMBER, NOT_DURABLE, QUIET, READ_ONLY, Source, at_line, kind,
    parse_deadline, parse_length,
};
use crate::encoding::{Rope, push_decimal};
use crate::model::{
    Combine, Command, Condition, Deadline, Delete, GetEffects, Increment, ItemView, NewVersion, Op, Put, Removal,
    Reply, UnixMillis, Version,
};
use base64::Engine;
use base64::alphabet::STANDARD;
use base64::engine::{GeneralPurpose, GeneralPurposeConfig};
use std::io::Write;

/// Padding is required; bits behind the last byte do not matter.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new().with_decode_allow_trailing_bits(true),
);

/// The reply of a hit carries the value.
const WITH_VALUE: u32 = 1 << 9;
/// The key came, and goes back, in base64.
const BINARY: u32 = 1 << 10;
/// A missing item is "not stored", also when a version was to be compared.
const MUST_EXIST: u32 = 1 << 11;

/// All flags that any command knows; a command ignores those it has no use for.
const LETTERS: &[u8] = b"bcfhklqstuvxCDEFIJLMNOPRT";
const FLAGS_MAX: usize = 17;
const OPAQUE_BYTES_MAX: usize = 32;

const INVALID_FLAG: &[u8] = b"CLIENT_ERROR invalid flag\r\n";
const DUPLICATE_FLAG: &[u8] = b"CLIENT_ERROR duplicate flag\r\n";
const BAD_TOKEN: &[u8] = b"CLIENT_ERROR bad token in command line format\r\n";
const BAD_MODE_LENGTH: &[u8] = b"CLIENT_ERROR incorrect length for M token\r\n";
const OPAQUE_TOO_LONG: &[u8] = b"CLIENT_ERROR opaque token too long\r\n";
const INVALID_OR_DUPLICATE: &[u8] = b"CLIENT_ERROR invalid or duplicate flag\r\n";

/// The flags of a line that say what to do.
#[derive(Clone, Copy, Debug, Default)]
struct Flags {
    binary: bool,
    quiet: bool,
    value: bool,
    version: bool,
    invalidate: bool,
    clear_value: bool,
    keep_access: bool,
    touch: Option<Deadline>,
    create: Option<Deadline>,
    refresh_below_s: Option<u32>,
    compare: Option<Version>,
    new_version: Option<Version>,
    mode: Option<u8>,
    delta: Option<u64>,
    initial: Option<u64>,
    client_flags: u32,
}

type Refusal = &'static [u8];

impl Flags {
    fn parse(text: &[u8], now: UnixMillis) -> Result<Self, Refusal> {
        let mut seen = 0u128;
        for word in words(text) {
            if !LETTERS.contains(&word[0]) {
                return Err(INVALID_FLAG);
            }
            if seen & 1 << word[0] != 0 {
                return Err(DUPLICATE_FLAG);
            }
            seen |= 1 << word[0];
        }
        let mut flags = Self::default();
        for word in words(text) {
            let (letter, token) = (word[0], &word[1..]);
            match letter {
                b'b' => flags.binary = true,
                b'q' => flags.quiet = true,
                b'v' => flags.value = true,
                b'c' => flags.version = true,
                b'I' => flags.invalidate = true,
                b'x' => flags.clear_value = true,
                b'u' => flags.keep_access = true,
                b'O' if word.len() > OPAQUE_BYTES_MAX => return Err(OPAQUE_TOO_LONG),
                b'T' => flags.touch = Some(parse_deadline(token, now).ok_or(BAD_TOKEN)?),
                b'N' => flags.create = Some(parse_deadline(token, now).ok_or(BAD_TOKEN)?),
                b'R' => flags.refresh_below_s = Some(parse_u64(token).ok_or(BAD_TOKEN)? as u32),
                b'C' => flags.compare = Some(Version(parse_u64(token).ok_or(BAD_TOKEN)?)),
                b'E' => flags.new_version = Some(Version(parse_u64(token).ok_or(BAD_TOKEN)?)),
                b'F' => flags.client_flags = parse_u64(token).ok_or(BAD_FORMAT)? as u32,
                b'M' => match token {
                    [mode] => flags.mode = Some(*mode),
                    _ => return Err(BAD_MODE_LENGTH),
                },
                b'D' => {
                    flags.delta = Some(parse_u64(token).ok_or(&b"CLIENT_ERROR invalid numeric delta value\r\n"[..])?);
                }
                b'J' => {
                    flags.initial =
                        Some(parse_u64(token).ok_or(&b"CLIENT_ERROR invalid numeric initial value\r\n"[..])?);
                }
                // Looked at when the reply is written, or not at all.
                _ => {}
            }
        }
        Ok(flags)
    }

    /// The version for an item that this command writes; `given` when the reply shows it.
    fn new_version(&self) -> NewVersion {
        match self.new_version {
            Some(version) => NewVersion::Exactly(version),
            None if self.version => NewVersion::Now,
            None => NewVersion::OnDemand,
        }
    }

    fn condition(&self) -> Condition {
        self.compare.map_or(Condition::Always, Condition::VersionIs)
    }

    fn code(&self, kind: u32) -> u32 {
        kind | if self.quiet { QUIET } else { 0 }
            | if self.value { WITH_VALUE } else { 0 }
            | if self.binary { BINARY } else { 0 }
    }

    /// The key as the store has it.
    fn key<'a>(&self, word: &'a [u8], env: &Env<'a>) -> Result<&'a [u8], Refusal> {
        if !self.binary {
            return Ok(word);
        }
        let room = env.arena.alloc_slice_fill_copy(word.len(), 0u8);
        let length = BASE64
            .decode_slice(word, room)
            .map_err(|_| &b"CLIENT_ERROR error decoding key\r\n"[..])?;
        Ok(&room[..length])
    }
}

/// Splits `<key> <flags>*`; the flags stay one text.
fn split_key(arguments: &[u8]) -> (&[u8], &[u8]) {
    let arguments = arguments.trim_ascii();
    let end = arguments
        .iter()
        .position(|byte| *byte == b' ')
        .unwrap_or(arguments.len());
    (&arguments[..end], arguments[end..].trim_ascii_start())
}

/// Decodes every meta command but `ms`.
pub(super) fn decode<'a>(verb: &[u8], arguments: &'a [u8], used: usize, env: &Env<'a>) -> Step<'a> {
    let (word, text) = split_key(arguments);
    let decoded = match verb {
        b"mn" => Decoded::Answer(b"MN\r\n"),
        b"me" => debug(word, text, env),
        _ if word.is_empty() => Decoded::Refused(ERROR),
        _ if word.len() > env.key_bytes_max => Decoded::Refused(BAD_FORMAT),
        b"mg" => get(word, text, env).unwrap_or_else(Decoded::Refused),
        // These two name all errors of flags alike.
        _ if words(text).count() > FLAGS_MAX => Decoded::Refused(b"CLIENT_ERROR options flags too long\r\n"),
        b"md" => delete(word, text, env).unwrap_or_else(Decoded::Refused),
        _ => count(word, text, env).unwrap_or_else(Decoded::Refused),
    };
    at_line(decoded, used)
}

fn get<'a>(word: &'a [u8], text: &'a [u8], env: &Env<'a>) -> Result<Decoded<'a>, Refusal> {
    if words(text).count() > FLAGS_MAX {
        return Err(b"CLIENT_ERROR options flags are too long\r\n");
    }
    let flags = Flags::parse(text, env.now)?;
    let key = flags.key(word, env)?;
    let effects = GetEffects {
        touch: flags.touch,
        create: flags.create.map(|deadline| (deadline, flags.new_version())),
        refresh_below_s: flags.refresh_below_s,
        keep_access: flags.keep_access,
    };
    let op = Op::Get {
        version: flags.version,
        // Even without effects of its own a meta get reports, and must not disturb, what was before it.
        effects: Some(effects),
    };
    let code = flags.code(kind::META_GET);
    Ok(Decoded::Command(Command { key, op }, Shape { code, text }))
}

/// `ms <key> <bytes> <flags>*` and its value. `header` is the length of the line.
pub(super) fn set<'a>(arguments: &'a [u8], source: Source<'a>, header: usize, env: &Env<'a>) -> Step<'a> {
    let refused = |answer, swallow| Step {
        swallow,
        ..at_line(Decoded::Refused(answer), header)
    };
    let (word, rest) = split_key(arguments);
    let (length, text) = split_key(rest);
    if word.is_empty() {
        return refused(ERROR, 0);
    }
    let Some(bytes) = parse_length(length).filter(|_| word.len() <= env.key_bytes_max) else {
        return refused(BAD_FORMAT, 0);
    };
    if words(text).count() >= FLAGS_MAX {
        return refused(b"CLIENT_ERROR options flags too long\r\n", 0);
    }
    let parsed =
        Flags::parse(text, env.now).and_then(|flags| Ok((flags, flags.key(word, env)?, store_mode(flags.mode)?)));
    let (flags, key, (combine, presence)) = match parsed {
        Ok(parsed) => parsed,
        Err(answer) => return refused(answer, bytes + 2),
    };
    if bytes > env.value_bytes_max {
        // A client must not go on reading the value that it meant to replace.
        let op = Op::Delete(Delete::default());
        return Step {
            swallow: bytes + 2,
            ..at_line(
                Decoded::Command(Command { key, op }, Shape::code(kind::TOO_LARGE)),
                header,
            )
        };
    }
    let (value, used) = match source.find(bytes, header, false) {
        Found::Whole(value, used) => (value, used),
        Found::Bad(used) => return at_line(Decoded::Refused(BAD_CHUNK), header + used),
        Found::Not(step) => return step,
    };
    let put = Put {
        value,
        flags: flags.client_flags,
        deadline: flags.touch.unwrap_or_default(),
        combine,
        condition: match (presence, flags.compare) {
            (Condition::Absent, _) | (_, None) => presence,
            (_, Some(version)) => Condition::VersionIs(version),
        },
        version: flags.new_version(),
        accept_as_stale: flags.invalidate,
        create: flags.create,
        key_encoded: flags.binary,
    };
    let command = Command { key, op: Op::Put(put) };
    let must_exist = combine != Combine::Replace;
    let code = flags.code(kind::META_SET) | if must_exist { MUST_EXIST } else { 0 };
    at_line(Decoded::Command(command, Shape { code, text }), header + used)
}

fn store_mode(mode: Option<u8>) -> Result<(Combine, Condition), Refusal> {
    match mode {
        None | Some(b'S') => Ok((Combine::Replace, Condition::Always)),
        Some(b'E') => Ok((Combine::Replace, Condition::Absent)),
        Some(b'R') => Ok((Combine::Replace, Condition::Present)),
        Some(b'A') => Ok((Combine::Append, Condition::Always)),
        Some(b'P') => Ok((Combine::Prepend, Condition::Always)),
        Some(_) => Err(b"CLIENT_ERROR invalid mode for ms M token\r\n"),
    }
}

fn delete<'a>(word: &'a [u8], text: &'a [u8], env: &Env<'a>) -> Result<Decoded<'a>, Refusal> {
    let (flags, key) = parse_strictly(word, text, env)?;
    let removal = match (flags.invalidate, flags.clear_value) {
        (true, _) => Removal::MarkStale(flags.touch),
        (false, true) => Removal::ClearValue,
        (false, false) => Removal::Remove,
    };
    let op = Op::Delete(Delete {
        condition: flags.condition(),
        removal,
        // What stays must differ from what was read before, so a version that was given is not kept.
        version: flags.new_version.map_or(NewVersion::OnDemand, NewVersion::Exactly),
    });
    let code = flags.code(kind::META_DELETE);
    Ok(Decoded::Command(Command { key, op }, Shape { code, text }))
}

fn count<'a>(word: &'a [u8], text: &'a [u8], env: &Env<'a>) -> Result<Decoded<'a>, Refusal> {
    let (flags, key) = parse_strictly(word, text, env)?;
    let subtract = match flags.mode {
        None | Some(b'I' | b'+') => false,
        Some(b'D' | b'-') => true,
        Some(_) => return Err(b"CLIENT_ERROR invalid mode for ma M token\r\n"),
    };
    let op = Op::Increment(Increment {
        delta: flags.delta.unwrap_or(1),
        subtract,
        create: flags.create.map(|deadline| (flags.initial.unwrap_or(0), deadline)),
        touch: flags.touch,
        // memcached takes version 0 for "none asked" here.
        condition: match flags.condition() {
            Condition::VersionIs(Version(0)) => Condition::Always,
            condition => condition,
        },
        version: flags.new_version(),
    });
    let code = flags.code(kind::META_COUNT);
    Ok(Decoded::Command(Command { key, op }, Shape { code, text }))
}

/// Flags and key, with the one error that `md` and `ma` know for nearly everything.
fn parse_strictly<'a>(word: &'a [u8], text: &[u8], env: &Env<'a>) -> Result<(Flags, &'a [u8]), Refusal> {
    let parsed = Flags::parse(text, env.now).and_then(|flags| Ok((flags, flags.key(word, env)?)));
    parsed.map_err(|refusal| match refusal {
        OPAQUE_TOO_LONG => refusal,
        _ => INVALID_OR_DUPLICATE,
    })
}

fn debug<'a>(word: &'a [u8], text: &'a [u8], env: &Env<'a>) -> Decoded<'a> {
    if word.is_empty() || word.len() > env.key_bytes_max || words(text).count() > 2 {
        return Decoded::Refused(BAD_FORMAT);
    }
    let flags = Flags {
        binary: words(text).next() == Some(b"b"),
        ..Flags::default()
    };
    match flags.key(word, env) {
        Ok(key) => {
            let code = flags.code(kind::META_DEBUG);
            Decoded::Command(Command { key, op: Op::Inspect }, Shape { code, text })
        }
        Err(_) => Decoded::Refused(BAD_FORMAT),
    }
}

fn push_key(out: &mut Rope, binary: bool, key: &[u8]) {
    if !binary {
        return out.push(key);
    }
    let at = out.flat.len();
    let length = key.len().div_ceil(3) * 4;
    out.flat.resize(at + length, 0);
    BASE64
        .encode_slice(key, &mut out.flat[at..])
        .expect("the length of base64 is known");
}

/// What a reply's flags are filled from.
struct Facts<'a> {
    key: &'a [u8],
    binary: bool,
    now: UnixMillis,
    item: Option<&'a ItemView<'a>>,
    /// Only what `ma` shows of an item.
    counted: bool,
    /// For replies that show a version and no item.
    version: Option<Version>,
}

/// Writes the flags that the client asked back, each behind a blank.
fn push_flags(out: &mut Rope, text: &[u8], facts: &Facts<'_>) {
    let mut touched = false;
    for word in words(text) {
        match (word[0], facts.item) {
            (b's' | b'f' | b'h' | b'l', _) if facts.counted => {}
            (b'k', _) => {
                out.push(b" k");
                push_key(out, facts.binary, facts.key);
                if facts.binary {
                    out.push(b" b");
                }
            }
            (b'O', _) => {
                out.push(b" ");
                out.push(word);
            }
            (b'T', _) => touched = true,
            (b'c', item) => {
                if let Some(version) = item.map(|item| item.version).or(facts.version) {
                    push_number(out, b" c", version.0);
                }
            }
            (b's', Some(item)) => push_number(out, b" s", item.value.bytes().len() as u64),
            (b'f', Some(item)) => push_number(out, b" f", u64::from(item.flags)),
            (b'h', Some(item)) => push_number(out, b" h", u64::from(item.hit_before)),
            (b'l', Some(item)) => {
                push_number(
                    out,
                    b" l",
                    u64::from(facts.now.seconds().saturating_sub(item.accessed_s)),
                );
            }
            (b't', Some(item)) => {
                // Flags act in order: a `t` before the `T` shows what was.
                let deadline = if touched { item.deadline } else { item.deadline_before };
                match deadline.remaining_seconds(facts.now) {
                    None => out.push(b" t-1"),
                    Some(seconds) => push_number(out, b" t", seconds),
                }
            }
            _ => {}
        }
    }
}

fn push_number(out: &mut Rope, name: &[u8], number: u64) {
    out.push(name);
    push_decimal(&mut out.flat, number);
}

/// Encodes the reply to any meta command.
pub(super) fn encode(shape: &Shape<'_>, key: &[u8], reply: &Reply<'_>, now: UnixMillis, out: &mut Rope) {
    let quiet = shape.code & QUIET != 0;
    let kind = shape.code & 0xff;
    let with_value = shape.code & WITH_VALUE != 0;
    let mut facts = Facts {
        key,
        binary: shape.code & BINARY != 0,
        now,
        item: None,
        counted: kind == kind::META_COUNT,
        version: None,
    };
    let code: &[u8] = match (kind, reply) {
        (kind::META_DEBUG, Reply::Found(item)) => return push_debug(out, &facts, item),
        (kind::META_GET, Reply::Found(item)) => return push_item(out, shape.text, with_value, &facts, item),
        (kind::META_COUNT, Reply::Counted(number, item)) => {
            // A number that was created is told even to a quiet client.
            if !quiet || item.won {
                facts.item = Some(item);
                push_counted(out, shape.text, with_value, &facts, *number);
            }
            return;
        }
        (kind::META_GET, Reply::NotFound) if quiet => return,
        (_, Reply::Stored { .. } | Reply::Deleted(_)) if quiet => return,
        (kind::META_GET | kind::META_DEBUG, Reply::NotFound) => b"EN",
        (kind::META_SET, Reply::NotFound) if shape.code & MUST_EXIST != 0 => b"NS",
        (_, Reply::NotFound) => b"NF",
        (kind::META_SET, Reply::Stored { version, .. }) => {
            facts.version = Some(*version);
            b"HD"
        }
        (_, Reply::Stored { .. } | Reply::Deleted(_)) => b"HD",
        (_, Reply::NotStored | Reply::TooLarge) => b"NS",
        (kind, Reply::VersionMismatch) => {
            facts.version = (kind == kind::META_SET).then_some(Version(0));
            b"EX"
        }
        (_, Reply::NotANumber) => return out.push(NOT_A_NUMBER),
        (_, Reply::ReadOnly) => return out.push(READ_ONLY),
        (_, Reply::NotDurable) => return out.push(NOT_DURABLE),
        _ => return out.push(NO_MEMORY),
    };
    out.push(code);
    push_flags(out, shape.text, &facts);
    out.push(b"\r\n");
}

/// A hit shows the key as its writer gave it, unless another protocol wrote one that would end the line or a word of it.
fn shows_encoded(item: &ItemView<'_>, key: &[u8]) -> bool {
    item.key_encoded || key.iter().any(|byte| matches!(byte, b' ' | b'\r' | b'\n'))
}

fn push_item(out: &mut Rope, text: &[u8], with_value: bool, facts: &Facts<'_>, item: &ItemView<'_>) {
    if with_value {
        push_number(out, b"VA ", item.value.bytes().len() as u64);
    } else {
        out.push(b"HD");
    }
    let facts = Facts {
        item: Some(item),
        binary: shows_encoded(item, facts.key),
        ..*facts
    };
    push_flags(out, text, &facts);
    for (holds, mark) in [(item.won_before, b" Z"), (item.stale, b" X"), (item.won, b" W")] {
        if holds {
            out.push(mark);
        }
    }
    out.push(b"\r\n");
    if with_value {
        out.push_value(&item.value);
        out.push(b"\r\n");
    }
}

fn push_counted(out: &mut Rope, text: &[u8], with_value: bool, facts: &Facts<'_>, number: u64) {
    if !with_value {
        out.push(b"HD");
        push_flags(out, text, facts);
        return out.push(b"\r\n");
    }
    let digits = number.checked_ilog10().unwrap_or(0) + 1;
    push_number(out, b"VA ", u64::from(digits));
    push_flags(out, text, facts);
    out.push(b"\r\n");
    push_number(out, b"", number);
    out.push(b"\r\n");
}

fn push_debug(out: &mut Rope, facts: &Facts<'_>, item: &ItemView<'_>) {
    out.push(b"ME ");
    push_key(out, shows_encoded(item, facts.key), facts.key);
    // memcached shows the time since the end, so that what is to come is negative.
    let expires = item
        .deadline
        .remaining_seconds(facts.now)
        .map_or(-1, |seconds| -(seconds as i64));
    let idle = facts.now.seconds().saturating_sub(item.accessed_s);
    let fetched = if item.hit_before { "yes" } else { "no" };
    let (version, bytes) = (item.version.0, item.charged_bytes);
    // Writing to memory does not fail.
    let _ = write!(
        out.flat,
        " exp={expires} la={idle} cas={version} fetch={fetched} cls=1 size={bytes}\r\n"
    );
}
