//! memcached's text protocol: the classic commands here, the meta commands in [`meta`].
//!
//! Source: the `protocol.txt` of memcached 1.6. Where that text leaves a reply open, Debian's memcached 1.6.18 was asked;
//! `tests/golden/memcached` holds its answers. Not served, and answered as memcached does without them: the binary
//! protocol, UDP, `watch`, `slabs`, `lru`, `lru_crawler`, `extstore`.

mod meta;

use super::{
    Decoded, Decoder, Env, Line, ServerFacts, Shape, Step, escaped, is_http, line, parse_i64, parse_u64, words,
};
use crate::config::Eviction;
use crate::encoding::{Rope, push_decimal};
use crate::metrics::{Counters, Metrics, Report};
use crate::model::{
    Broadcast, Class, Combine, Command, Condition, CoreId, Deadline, Delete, GetEffects, Increment, LARGE_VALUE_BYTES,
    NewVersion, Op, Put, Reply, UnixMillis, Value, Version, Wanted,
};
use bytes::Bytes;
use std::io::Write;

/// Where a connection stands.
#[derive(Clone, Copy, Debug, Default)]
pub enum State {
    /// At the start of a line.
    #[default]
    Line,
    /// Inside the line of a `get`, `gets`, `gat` or `gats`, whose keys are served one by one.
    Keys {
        /// The reply carries the version.
        version: bool,
        /// The keys' new deadline.
        touch: Option<Deadline>,
        /// No key has come yet.
        first: bool,
    },
    /// Behind a bad key: the rest of the line is to be skipped.
    Skip,
}

/// The version of memcached whose protocol this is: clients choose their commands by it.
macro_rules! version {
    () => {
        "1.6.18"
    };
}

const ERROR: &[u8] = b"ERROR\r\n";
const BAD_FORMAT: &[u8] = b"CLIENT_ERROR bad command line format\r\n";
const BAD_EXPTIME: &[u8] = b"CLIENT_ERROR invalid exptime argument\r\n";
const BAD_DELTA: &[u8] = b"CLIENT_ERROR invalid numeric delta argument\r\n";
const BAD_CHUNK: &[u8] = b"CLIENT_ERROR bad data chunk\r\n";
const TOO_LARGE: &[u8] = b"SERVER_ERROR object too large for cache\r\n";
const NO_MEMORY: &[u8] = b"SERVER_ERROR out of memory storing object\r\n";
const READ_ONLY: &[u8] = b"SERVER_ERROR the server is read-only\r\n";
const NOT_DURABLE: &[u8] = b"SERVER_ERROR not durable: the log cannot be written\r\n";
const NO_SNAPSHOT: &[u8] = b"SERVER_ERROR no snapshot: the server has no --data-dir, or cannot write to its log\r\n";
const NOT_A_NUMBER: &[u8] = b"CLIENT_ERROR cannot increment or decrement non-numeric value\r\n";
const END: &[u8] = b"END\r\n";
const OK: &[u8] = b"OK\r\n";

/// What a [`Shape`]'s code says, in its low byte.
mod kind {
    pub(super) const VALUE: u32 = 0;
    pub(super) const STORE: u32 = 1;
    pub(super) const DELETE: u32 = 2;
    pub(super) const COUNT: u32 = 3;
    pub(super) const TOUCH: u32 = 4;
    /// A value over the limit took the old one away.
    pub(super) const TOO_LARGE: u32 = 5;
    pub(super) const META_GET: u32 = 6;
    pub(super) const META_SET: u32 = 7;
    pub(super) const META_DELETE: u32 = 8;
    pub(super) const META_COUNT: u32 = 9;
    pub(super) const META_DEBUG: u32 = 10;
    pub(super) const DONE: u32 = 11;
    pub(super) const STATS: u32 = 12;
    pub(super) const STATS_ITEMS: u32 = 13;
    pub(super) const STATS_LATENCY: u32 = 14;
    pub(super) const STATS_CORES: u32 = 15;
    pub(super) const STATS_CONNECTIONS: u32 = 16;
    pub(super) const PREFIXES: u32 = 17;
    pub(super) const RESET: u32 = 18;
    pub(super) const STATS_HOT_KEYS: u32 = 19;
    pub(super) const STATS_SLOW_LOG: u32 = 20;
    pub(super) const SNAPSHOT: u32 = 21;
}
/// The client wants no reply.
const QUIET: u32 = 1 << 8;
/// A value's line ends with its version.
const WITH_VERSION: u32 = 1 << 9;
/// The last key of its line: END follows.
const LAST: u32 = 1 << 10;

/// An exptime up to this is relative, in seconds; a greater one is a Unix time.
const RELATIVE_EXPTIME_S_MAX: i64 = 60 * 60 * 24 * 30;

fn deadline(exptime: i64, now: UnixMillis) -> Deadline {
    match exptime {
        0 => Deadline::Never,
        ..0 => Deadline::At(UnixMillis(0)),
        1..=RELATIVE_EXPTIME_S_MAX => Deadline::At(now.plus_seconds(exptime as u64)),
        _ => Deadline::At(UnixMillis(exptime as u64 * 1000)),
    }
}

fn parse_deadline(word: &[u8], now: UnixMillis) -> Option<Deadline> {
    // memcached keeps the low 32 bits.
    let exptime = parse_i64(word)? as i32;
    Some(deadline(i64::from(exptime), now))
}

#[inline]
fn at<'a>(next: State, decoded: Decoded<'a>, used: usize) -> Step<'a> {
    Step {
        decoded,
        used,
        swallow: 0,
        next: Decoder::Memcached(next),
    }
}

#[inline]
fn at_line(decoded: Decoded<'_>, used: usize) -> Step<'_> {
    at(State::Line, decoded, used)
}

/// See [`Decoder::step`].
#[inline]
pub(super) fn step<'a>(state: State, input: &'a [u8], env: &Env<'a>) -> Step<'a> {
    match state {
        State::Line => {
            if input.starts_with(b"get ") {
                return get(false, 4, input, env);
            }
            other_line(input, env)
        }
        State::Keys { version, touch, first } => keys(version, touch, first, input, 0, env),
        State::Skip => match memchr::memchr(b'\n', input) {
            Some(end) => at_line(Decoded::Nothing, end + 1),
            None => at(State::Skip, Decoded::Nothing, input.len()),
        },
    }
}

/// A line that begins with `get ` or `gets ` (`verb` bytes): refused as a whole when a key is too long, so it is looked
/// through before its first key is served, unless it is longer than any other line may be.
#[inline]
fn get<'a>(version: bool, verb: usize, input: &'a [u8], env: &Env<'a>) -> Step<'a> {
    match line(input) {
        Line::Whole(line, used)
            if line.len() > env.key_bytes_max && words(line).any(|key| key.len() > env.key_bytes_max) =>
        {
            at_line(Decoded::Refused(BAD_FORMAT), used)
        }
        Line::Incomplete => at_line(Decoded::Incomplete, 0),
        _ => keys(version, None, true, input, verb, env),
    }
}

/// The next key of a line of keys, from `start` on.
#[inline]
fn keys<'a>(
    version: bool,
    touch: Option<Deadline>,
    first: bool,
    input: &'a [u8],
    start: usize,
    env: &Env<'a>,
) -> Step<'a> {
    let state = State::Keys { version, touch, first };
    let mut from = start;
    while input.get(from) == Some(&b' ') {
        from += 1;
    }
    let wait = |used| {
        at(
            state,
            if used > 0 {
                Decoded::Nothing
            } else {
                Decoded::Incomplete
            },
            used,
        )
    };
    let Some(length) = memchr::memchr2(b' ', b'\n', &input[from..]) else {
        if input.len() - from > env.key_bytes_max + 1 {
            return at(State::Skip, Decoded::Refused(BAD_FORMAT), input.len());
        }
        return wait(from);
    };
    let mut end = from + length;
    let mut key = &input[from..end];
    if touch.is_some() {
        end += bytes_to_line_end(&input[end..]).unwrap_or(0);
    }
    let ends_line = input[end] == b'\n';
    if ends_line {
        if end == from + length {
            key = key.strip_suffix(b"\r").unwrap_or(key);
        }
        if key.is_empty() {
            let decoded = match first {
                // `gat 0` without keys is an empty answer to memcached, not an error.
                true if touch.is_none() => Decoded::Refused(ERROR),
                _ => Decoded::Answer(END),
            };
            return at_line(decoded, end + 1);
        }
    }
    if key.len() > env.key_bytes_max {
        let next = if ends_line { State::Line } else { State::Skip };
        return at(next, Decoded::Refused(BAD_FORMAT), end + 1);
    }
    let effects = touch.map(|deadline| GetEffects {
        touch: Some(deadline),
        ..GetEffects::default()
    });
    let mut code = kind::VALUE | if version { WITH_VERSION } else { 0 };
    let mut next = State::Keys {
        version,
        touch,
        first: false,
    };
    if ends_line {
        code |= LAST;
        next = State::Line;
    }
    let op = Op::Get { version, effects };
    at(next, Decoded::Command(Command { key, op }, Shape::code(code)), end + 1)
}

/// How many blanks, and perhaps a CR, stand before the line's end, if nothing else does. The last key of a `gat` must be known
/// to be that when it is executed, for an error may take the place of END.
fn bytes_to_line_end(rest: &[u8]) -> Option<usize> {
    let blanks = rest.iter().take_while(|byte| **byte == b' ').count();
    match rest[blanks..] {
        [b'\n', ..] => Some(blanks),
        [b'\r', b'\n', ..] => Some(blanks + 1),
        _ => None,
    }
}

fn other_line<'a>(input: &'a [u8], env: &Env<'a>) -> Step<'a> {
    if input.starts_with(b"gets ") {
        return get(true, 5, input, env);
    }
    // memcached ignores blanks before a command.
    if input[0] == b' ' {
        let blanks = input.iter().take_while(|byte| **byte == b' ').count();
        // With more blanks than this, the line must have an end like any other.
        let too_long = blanks > GET_BLANKS_MAX && matches!(line(input), Line::TooLong);
        let step = match &input[blanks..] {
            _ if too_long => return at_line(Decoded::Close(b""), 0),
            [] => return at_line(Decoded::Incomplete, 0),
            rest => step(State::Line, rest, env),
        };
        let used = if step.used == 0 { 0 } else { step.used + blanks };
        return Step { used, ..step };
    }
    let (line, used) = match line(input) {
        Line::Whole(line, used) => (line, used),
        Line::Incomplete => return at_line(Decoded::Incomplete, 0),
        Line::TooLong => return at_line(Decoded::Close(b""), 0),
    };
    let rest = &input[used..];
    let verb_length = line.iter().position(|byte| *byte == b' ').unwrap_or(line.len());
    let (verb, arguments) = line.split_at(verb_length);
    match verb {
        b"bget" => keys(false, None, true, input, verb_length, env),
        b"set" => storage(
            Combine::Replace,
            Condition::Always,
            line,
            Source::Input(rest),
            used,
            env,
        ),
        b"add" => storage(
            Combine::Replace,
            Condition::Absent,
            line,
            Source::Input(rest),
            used,
            env,
        ),
        b"replace" => storage(
            Combine::Replace,
            Condition::Present,
            line,
            Source::Input(rest),
            used,
            env,
        ),
        b"append" => storage(Combine::Append, Condition::Always, line, Source::Input(rest), used, env),
        b"prepend" => storage(
            Combine::Prepend,
            Condition::Always,
            line,
            Source::Input(rest),
            used,
            env,
        ),
        b"cas" => storage(Combine::Replace, CAS, line, Source::Input(rest), used, env),
        b"gat" => get_and_touch(false, arguments, used, env),
        b"gats" => get_and_touch(true, arguments, used, env),
        b"ms" => meta::set(arguments, Source::Input(rest), used, env),
        b"mg" | b"md" | b"ma" | b"me" | b"mn" => meta::decode(verb, arguments, used, env),
        _ if is_http(line) => at_line(Decoded::Close(b""), used),
        _ => at_line(short_command(verb, arguments, env), used),
    }
}

/// How many blanks may stand before a `get` whose line is longer than others may be.
const GET_BLANKS_MAX: usize = 100;

/// Stands for the condition that a `cas` line names.
const CAS: Condition = Condition::VersionIs(Version(0));

/// Where a request's value is to be found.
#[derive(Clone, Copy)]
enum Source<'a> {
    /// In the input, behind the line.
    Input(&'a [u8]),
    /// Collected; the input goes on behind it.
    Collected(&'a Bytes, &'a [u8]),
    /// Nowhere: it is not taken. With what the client is told.
    Refused(&'static [u8]),
}

/// A value with the line end that must follow it.
enum Found<'a> {
    /// The value, and how many bytes of input it and its line end took.
    Whole(Value<'a>, usize),
    /// The bytes behind the value are not a line end; the value and two bytes are to be skipped.
    Bad(usize),
    /// Something else is to be done first.
    Not(Step<'a>),
}

impl<'a> Source<'a> {
    /// The value of `bytes` bytes that a line of `header` bytes announced.
    fn find(self, bytes: usize, header: usize, quiet: bool) -> Found<'a> {
        match self {
            // A value that is kept by reference gets its own memory now, also when it is all there.
            Source::Input(_) if bytes >= LARGE_VALUE_BYTES => Found::Not(at_line(Decoded::Value(bytes), header)),
            Source::Input(rest) => match rest.get(..bytes + 2) {
                Some(data) if data.ends_with(b"\r\n") => Found::Whole(Value::Small(&data[..bytes]), bytes + 2),
                Some(_) => Found::Bad(bytes + 2),
                None => Found::Not(at_line(Decoded::Value(bytes), header)),
            },
            Source::Collected(value, rest) => match rest.get(..2) {
                Some(b"\r\n") => Found::Whole(Value::collected(value), 2),
                Some(_) => Found::Bad(2),
                None => Found::Not(at_line(Decoded::Incomplete, 0)),
            },
            Source::Refused(answer) => Found::Not(Step {
                swallow: bytes + 2,
                ..at_line(Decoded::Refused(if quiet { b"" } else { answer }), header)
            }),
        }
    }
}

/// `<verb> <key> <flags> <exptime> <bytes> [<cas>] [noreply]` and its value. `header` is the length of the line.
fn storage<'a>(
    combine: Combine,
    mut condition: Condition,
    line: &'a [u8],
    source: Source<'a>,
    header: usize,
    env: &Env<'a>,
) -> Step<'a> {
    let refused = |answer| at_line(Decoded::Refused(answer), header);
    let is_cas = condition == CAS;
    let mut fields = words(line).skip(1);
    let (Some(key), Some(flags), Some(exptime), Some(bytes)) =
        (fields.next(), fields.next(), fields.next(), fields.next())
    else {
        return refused(ERROR);
    };
    let version = if is_cas {
        match fields.next() {
            None => return refused(ERROR),
            version => version,
        }
    } else {
        None
    };
    if fields.nth(1).is_some() {
        return refused(ERROR);
    }
    let quiet = line.trim_ascii_end().ends_with(b" noreply");
    let or_silence = |answer: &'static [u8]| if quiet { b"" } else { answer };
    if key.len() > env.key_bytes_max {
        return refused(or_silence(BAD_FORMAT));
    }
    let (Some(flags), Some(deadline), Some(bytes)) =
        (parse_u64(flags), parse_deadline(exptime, env.now), parse_length(bytes))
    else {
        return refused(or_silence(BAD_FORMAT));
    };
    if let Some(version) = version {
        match parse_u64(version) {
            Some(version) => condition = Condition::VersionIs(Version(version)),
            None => return refused(or_silence(BAD_FORMAT)),
        }
    }
    let reply = if quiet { QUIET } else { 0 };
    if bytes > env.value_bytes_max {
        let swallow = bytes + 2;
        // A client must not go on reading the value that it meant to replace.
        let decoded = if combine == Combine::Replace && condition == Condition::Always {
            let op = Op::Delete(Delete::default());
            Decoded::Command(Command { key, op }, Shape::code(kind::TOO_LARGE | reply))
        } else {
            Decoded::Refused(or_silence(TOO_LARGE))
        };
        return Step {
            swallow,
            ..at_line(decoded, header)
        };
    }
    let (value, used) = match source.find(bytes, header, quiet) {
        Found::Whole(value, used) => (value, used),
        Found::Bad(used) => {
            return at_line(Decoded::Refused(or_silence(BAD_CHUNK)), header + used);
        }
        Found::Not(step) => return step,
    };
    let put = Put {
        // memcached keeps the low 32 bits.
        flags: flags as u32,
        deadline,
        combine,
        condition,
        ..Put::new(value)
    };
    let command = Command { key, op: Op::Put(put) };
    at_line(
        Decoded::Command(command, Shape::code(kind::STORE | reply)),
        header + used,
    )
}

/// A value's length: of the number's low 32 bits, as memcached reads it, and nothing negative or near the end.
fn parse_length(word: &[u8]) -> Option<usize> {
    let bytes = parse_i64(word)? as i32;
    (0..=i32::MAX - 2).contains(&bytes).then_some(bytes as usize)
}

/// See [`Decoder::with_value`].
pub(super) fn with_value<'a>(header: &'a [u8], value: &'a Bytes, rest: &'a [u8], env: &Env<'a>) -> Step<'a> {
    from_source(header, Source::Collected(value, rest), env)
}

/// See [`Decoder::without_value`].
pub(super) fn without_value<'a>(header: &'a [u8], why: &Reply<'_>, env: &Env<'a>) -> Step<'a> {
    let answer = match why {
        Reply::ReadOnly => READ_ONLY,
        _ => NO_MEMORY,
    };
    from_source(header, Source::Refused(answer), env)
}

fn from_source<'a>(header: &'a [u8], source: Source<'a>, env: &Env<'a>) -> Step<'a> {
    let line = header.strip_suffix(b"\n").unwrap_or(header);
    let line = line.strip_suffix(b"\r").unwrap_or(line).trim_ascii_start();
    let (combine, condition) = match words(line).next() {
        Some(b"ms") => return meta::set(&line[2..], source, 0, env),
        Some(b"add") => (Combine::Replace, Condition::Absent),
        Some(b"replace") => (Combine::Replace, Condition::Present),
        Some(b"append") => (Combine::Append, Condition::Always),
        Some(b"prepend") => (Combine::Prepend, Condition::Always),
        Some(b"cas") => (Combine::Replace, CAS),
        _ => (Combine::Replace, Condition::Always),
    };
    storage(combine, condition, line, source, 0, env)
}

/// `gat <exptime> <key>*`: only the exptime is read here, the keys one by one.
fn get_and_touch<'a>(version: bool, arguments: &'a [u8], used: usize, env: &Env<'a>) -> Step<'a> {
    let Some(exptime) = words(arguments).next() else {
        return at_line(Decoded::Refused(ERROR), used);
    };
    let Some(deadline) = parse_deadline(exptime, env.now) else {
        return at_line(Decoded::Refused(BAD_EXPTIME), used);
    };
    if words(arguments).skip(1).any(|key| key.len() > env.key_bytes_max) {
        return at_line(Decoded::Refused(BAD_FORMAT), used);
    }
    let verb = if version { 4 } else { 3 };
    let blanks = arguments.iter().take_while(|byte| **byte == b' ').count();
    let next = State::Keys {
        version,
        touch: Some(deadline),
        first: true,
    };
    at(next, Decoded::Nothing, verb + blanks + exptime.len())
}

/// Commands of one line without a value.
fn short_command<'a>(verb: &'a [u8], arguments: &'a [u8], env: &Env<'a>) -> Decoded<'a> {
    let fields = words(arguments);
    let count = fields.clone().count();
    let mut fields = fields;
    let mut field = || fields.next().unwrap_or_default();
    let quiet = words(arguments).last() == Some(b"noreply");
    let reply = if quiet { QUIET } else { 0 };
    let answer = |answer: &'static [u8]| {
        if quiet {
            Decoded::Nothing
        } else {
            Decoded::Answer(answer)
        }
    };
    let refuse = |answer: &'static [u8]| Decoded::Refused(if quiet { b"" } else { answer });
    let key_is_bad = |key: &[u8]| key.len() > env.key_bytes_max;
    match (verb, count) {
        (b"delete", 1..=3) => {
            let (key, second) = (field(), field());
            let reply = if count > 1 { reply } else { 0 };
            let valid = match count {
                1 => true,
                2 => second == b"0" || quiet,
                _ => second == b"0" && quiet,
            };
            if !valid {
                return refuse(b"CLIENT_ERROR bad command line format.  Usage: delete <key> [noreply]\r\n");
            }
            if key_is_bad(key) {
                return refuse(BAD_FORMAT);
            }
            let op = Op::Delete(Delete::default());
            Decoded::Command(Command { key, op }, Shape::code(kind::DELETE | reply))
        }
        (b"incr" | b"decr", 2..=3) => {
            let (key, delta) = (field(), field());
            if key_is_bad(key) {
                return refuse(BAD_FORMAT);
            }
            let Some(delta) = parse_u64(delta) else {
                return refuse(BAD_DELTA);
            };
            let op = Op::Increment(Increment {
                delta,
                subtract: verb == b"decr",
                create: None,
                touch: None,
                condition: Condition::Always,
                version: NewVersion::OnDemand,
            });
            Decoded::Command(Command { key, op }, Shape::code(kind::COUNT | reply))
        }
        (b"touch", 2..=3) => {
            let (key, exptime) = (field(), field());
            if key_is_bad(key) {
                return refuse(BAD_FORMAT);
            }
            let Some(deadline) = parse_deadline(exptime, env.now) else {
                return refuse(BAD_EXPTIME);
            };
            let op = Op::Touch(deadline);
            Decoded::Command(Command { key, op }, Shape::code(kind::TOUCH | reply))
        }
        (b"flush_all", 0..=2) => {
            let delay = field();
            let at = match (count, quiet) {
                (0, _) | (1, true) => None,
                _ => match parse_deadline(delay, env.now) {
                    None => return refuse(BAD_EXPTIME),
                    Some(Deadline::At(moment)) if moment > env.now => Some(moment),
                    Some(_) => None,
                },
            };
            Decoded::Broadcast(Broadcast::Flush(at), Shape::code(kind::DONE | reply))
        }
        (b"snapshot", 0..=1) => Decoded::Broadcast(Broadcast::Snapshot, Shape::code(kind::SNAPSHOT | reply)),
        (b"version", _) => Decoded::Answer(concat!("VERSION ", version!(), "\r\n").as_bytes()),
        (b"quit", _) => Decoded::Close(b""),
        (b"verbosity", 1..=2) => match parse_u64(field()) {
            // Accepted, for scripts that send it; the log's level is set at start.
            Some(_) => answer(OK),
            None => refuse(BAD_FORMAT),
        },
        (b"cache_memlimit", 1..=2) => match parse_u64(field()) {
            None => Decoded::Refused(ERROR),
            Some(0..8) => refuse(b"MEMLIMIT_TOO_SMALL cannot set maxbytes to less than 8m\r\n"),
            Some(megabytes) => Decoded::MemoryLimit(megabytes.saturating_mul(1 << 20), if quiet { b"" } else { OK }),
        },
        (b"shutdown", _) if env.shutdown_enabled => Decoded::Shutdown,
        (b"shutdown", _) => Decoded::Refused(b"ERROR: shutdown not enabled\r\n"),
        (b"stats", _) => stats(field(), field(), field()),
        (b"slabs", 3) if field() == b"reassign" => Decoded::Refused(b"CLIENT_ERROR slab reassignment disabled\r\n"),
        (b"watch", _) => Decoded::Refused(b"CLIENT_ERROR watch commands not allowed\r\n"),
        (b"lru_crawler", 1..) => Decoded::Refused(b"CLIENT_ERROR lru crawler disabled\r\n"),
        (b"refresh_certs", _) => Decoded::Refused(b"Error TLS not enabled\r\n"),
        // A browser, or a page that talks to a local port.
        _ if words(arguments).last().unwrap_or(verb).starts_with(b"HTTP/") => Decoded::Close(b""),
        _ => Decoded::Refused(ERROR),
    }
}

fn stats(what: &[u8], argument: &[u8], second: &[u8]) -> Decoded<'static> {
    let none = Wanted::default();
    let metrics = Broadcast::Metrics(none);
    let collect = |broadcast, code| Decoded::Broadcast(broadcast, Shape::code(code));
    match (what, argument) {
        (b"", _) => collect(metrics, kind::STATS),
        (b"settings", _) => Decoded::About(Shape::code(0)),
        (b"items", _) => collect(metrics, kind::STATS_ITEMS),
        (b"latency", _) => {
            let wanted = Wanted {
                latencies: true,
                ..none
            };
            collect(Broadcast::Metrics(wanted), kind::STATS_LATENCY)
        }
        (b"hotkeys", _) => {
            let wanted = Wanted { hot_keys: true, ..none };
            collect(Broadcast::Metrics(wanted), kind::STATS_HOT_KEYS)
        }
        (b"slowlog", _) => {
            let wanted = Wanted { slow_log: true, ..none };
            collect(Broadcast::Metrics(wanted), kind::STATS_SLOW_LOG)
        }
        (b"cores", _) => collect(metrics, kind::STATS_CORES),
        (b"conns", _) => collect(Broadcast::Connections, kind::STATS_CONNECTIONS),
        (b"reset", _) => collect(Broadcast::ResetMetrics, kind::RESET),
        (b"detail", b"on") => collect(Broadcast::PrefixStats(true), kind::DONE),
        (b"detail", b"off") => collect(Broadcast::PrefixStats(false), kind::DONE),
        (b"detail", b"dump") => collect(Broadcast::PrefixDump, kind::PREFIXES),
        (b"detail", _) => Decoded::Refused(b"CLIENT_ERROR usage: stats detail on|off|dump\r\n"),
        (b"extstore", _) => Decoded::Answer(END),
        (b"sizes", _) => Decoded::Answer(b"STAT sizes_status disabled\r\nEND\r\n"),
        // There are no slab classes, so none has items to list.
        (b"cachedump", _) if second.is_empty() => Decoded::Refused(b"CLIENT_ERROR bad command line\r\n"),
        (b"cachedump", class) => match (parse_u64(class), parse_u64(second)) {
            (None, _) | (_, None) => Decoded::Refused(BAD_FORMAT),
            (Some(0..=63), _) => Decoded::Answer(END),
            _ => Decoded::Refused(b"CLIENT_ERROR Illegal slab id\r\n"),
        },

        (b"slabs", _) => Decoded::Answer(b"STAT active_slabs 0\r\nSTAT total_malloced 0\r\nEND\r\n"),
        _ => Decoded::Refused(ERROR),
    }
}

/// Encodes that a command was not done durably, or that what it reads may be lost.
pub(super) fn encode_not_durable(shape: &Shape<'_>, out: &mut Rope) {
    let is_told = match shape.code & 0xff {
        // One line ends the answer to several keys.
        kind::VALUE => shape.code & LAST != 0,
        kind::META_GET | kind::META_SET | kind::META_DELETE | kind::META_COUNT | kind::META_DEBUG => true,
        _ => shape.code & QUIET == 0,
    };
    if is_told {
        out.push(NOT_DURABLE);
    }
}

/// Encodes the reply to a command.
#[inline]
pub(super) fn encode(shape: &Shape<'_>, key: &[u8], reply: &Reply<'_>, now: UnixMillis, out: &mut Rope) {
    if shape.code & 0xff == kind::VALUE {
        return encode_value(shape.code, key, reply, out);
    }
    match shape.code & 0xff {
        kind::META_GET | kind::META_SET | kind::META_DELETE | kind::META_COUNT | kind::META_DEBUG => {
            meta::encode(shape, key, reply, now, out);
        }
        _ if shape.code & QUIET != 0 => {}
        // The old value is still there, so the client must not be told that it is not.
        kind::TOO_LARGE if !matches!(reply, Reply::ReadOnly) => out.push(TOO_LARGE),
        kind => encode_line(kind, reply, out),
    }
}

#[inline]
fn encode_value(code: u32, key: &[u8], reply: &Reply<'_>, out: &mut Rope) {
    if let Reply::Found(item) = reply {
        let value = item.value.bytes();
        let flat = &mut out.flat;
        // The longest line around key and value: four words, three numbers, two line ends and END.
        flat.reserve(key.len() + value.len().min(LARGE_VALUE_BYTES) + 80);
        flat.extend_from_slice(b"VALUE ");
        flat.extend_from_slice(key);
        flat.push(b' ');
        push_decimal(flat, u64::from(item.flags));
        flat.push(b' ');
        push_decimal(flat, value.len() as u64);
        if code & WITH_VERSION != 0 {
            flat.push(b' ');
            push_decimal(flat, item.version.0);
        }
        flat.extend_from_slice(b"\r\n");
        out.push_value(&item.value);
        out.push(b"\r\n");
    }
    if code & LAST != 0 {
        // One line ends the answer, also where each of several keys was refused its new deadline.
        out.push(if let Reply::ReadOnly = reply { READ_ONLY } else { END });
    }
}

/// A reply of one line that carries nothing of the item.
fn encode_line(kind: u32, reply: &Reply<'_>, out: &mut Rope) {
    if let Reply::Counted(number, _) = reply {
        push_decimal(&mut out.flat, *number);
    }
    out.push(match reply {
        Reply::Counted(..) => b"\r\n",
        Reply::Stored { .. } => b"STORED\r\n",
        Reply::NotStored => b"NOT_STORED\r\n",
        Reply::VersionMismatch => b"EXISTS\r\n",
        Reply::NotFound => b"NOT_FOUND\r\n",
        Reply::Deleted(_) => b"DELETED\r\n",
        Reply::Touched | Reply::Found(_) => b"TOUCHED\r\n",
        Reply::NotANumber => NOT_A_NUMBER,
        // Only appending meets the limit here, and this is what memcached says then.
        Reply::TooLarge => b"NOT_STORED\r\n",
        Reply::ReadOnly => READ_ONLY,
        Reply::NotDurable => NOT_DURABLE,
        Reply::OutOfMemory if kind == kind::COUNT => b"SERVER_ERROR out of memory in incr\r\n",
        Reply::OutOfMemory => NO_MEMORY,
    });
}

fn stat(out: &mut Rope, name: impl std::fmt::Display, value: impl std::fmt::Display) {
    // Writing to memory does not fail.
    let _ = write!(out.flat, "STAT {name} {value}\r\n");
}

/// Encodes the reply to a broadcast.
pub(super) fn encode_report(shape: &Shape<'_>, report: &Report, server: &ServerFacts<'_>, out: &mut Rope) {
    match (shape.code & 0xff, report) {
        (kind::RESET, _) => return out.push(b"RESET\r\n"),
        (_, Report::Done | Report::ReadOnly | Report::NotDurable) if shape.code & QUIET != 0 => return,
        (_, Report::Done) => return out.push(OK),
        (_, Report::ReadOnly) => return out.push(READ_ONLY),
        (kind::SNAPSHOT, Report::NotDurable) => return out.push(NO_SNAPSHOT),
        (_, Report::NotDurable) => return out.push(NOT_DURABLE),
        (kind::STATS_ITEMS, Report::Metrics(cores)) => stats_items(&sum(cores), out),
        (kind::STATS_LATENCY, Report::Metrics(cores)) => stats_latency(&sum(cores), out),
        (kind::STATS_CORES, Report::Metrics(cores)) => stats_cores(cores, out),
        (kind::STATS_HOT_KEYS, Report::Metrics(cores)) => stats_hot_keys(cores, out),
        (kind::STATS_SLOW_LOG, Report::Metrics(cores)) => stats_slow_log(cores, out),
        (_, Report::Metrics(cores)) => stats_general(cores, server, out),
        (_, Report::Connections(connections)) => {
            for facts in connections {
                // Connection numbers are per core; together they are one number per connection.
                let id = u64::from(facts.number) * u64::from(server.table.cores()) + u64::from(facts.core.0);
                stat(out, format_args!("{id}:addr"), format_args!("tcp:{}", facts.peer));
                stat(out, format_args!("{id}:state"), "conn_read");
                stat(out, format_args!("{id}:protocol"), &facts.protocol);
                stat(out, format_args!("{id}:core"), facts.core.0);
                stat(out, format_args!("{id}:secs_since_last_cmd"), facts.idle_s);
            }
        }
        (_, Report::Prefixes(prefixes)) => {
            for (prefix, counts) in prefixes {
                out.push(b"PREFIX ");
                // Another protocol's key may hold anything, line ends too.
                let _ = write!(out.flat, "{}", prefix.escape_ascii());
                let (gets, hits, sets, deletes) = (counts.gets, counts.hits, counts.sets, counts.deletes);
                let _ = write!(out.flat, " get {gets} hit {hits} set {sets} del {deletes}\r\n");
            }
        }
    }
    out.push(END);
}

fn sum(cores: &[(CoreId, Metrics)]) -> Metrics {
    let latencies = cores.iter().all(|(_, metrics)| metrics.has_latencies());
    let mut sum = if latencies {
        Metrics::default()
    } else {
        Metrics::without_latencies()
    };
    cores.iter().for_each(|(_, metrics)| sum.merge(metrics));
    sum
}

fn stats_general(cores: &[(CoreId, Metrics)], server: &ServerFacts<'_>, out: &mut Rope) {
    let sum = sum(cores);
    let c = &sum.counters;
    let uptime_ns = cores.iter().map(|(_, core)| core.counters.uptime_ns).max().unwrap_or(0);
    let seconds = |us: u64| format!("{}.{:06}", us / 1_000_000, us % 1_000_000);
    stat(out, "pid", server.process.pid);
    stat(out, "uptime", uptime_ns / 1_000_000_000);
    stat(out, "time", server.now.seconds());
    stat(out, "version", version!());
    stat(out, "memkv_version", env!("CARGO_PKG_VERSION"));
    stat(out, "pointer_size", usize::BITS);
    stat(out, "rusage_user", seconds(server.process.user_us));
    stat(out, "rusage_system", seconds(server.process.system_us));
    for (name, value) in [
        ("max_connections", u64::from(server.config.limits.connections_max)),
        ("curr_connections", c.connections),
        ("total_connections", c.connections_opened),
        ("rejected_connections", c.connections_refused),
        ("idle_kicks", c.connections_timed_out),
        ("cmd_get", c.get_hits + c.get_misses),
        ("cmd_set", c.sets),
        ("cmd_flush", c.flushes),
        ("cmd_touch", c.touch_hits + c.touch_misses),
        ("get_hits", c.get_hits),
        ("get_misses", c.get_misses),
        ("get_expired", c.get_expired),
        ("get_flushed", 0),
        ("delete_misses", c.delete_misses),
        ("delete_hits", c.delete_hits),
        ("incr_misses", c.increment_misses),
        ("incr_hits", c.increment_hits),
        ("decr_misses", c.decrement_misses),
        ("decr_hits", c.decrement_hits),
        ("cas_misses", c.version_misses),
        ("cas_hits", c.version_hits),
        ("cas_badval", c.version_mismatches),
        ("touch_hits", c.touch_hits),
        ("touch_misses", c.touch_misses),
        ("store_too_large", c.too_large),
        ("store_no_memory", c.out_of_memory),
        ("read_only_refusals", c.read_only_refusals),
        ("bytes_read", c.bytes_received),
        ("bytes_written", c.bytes_sent),
        ("limit_maxbytes", server.memory_bytes_max),
        ("accepting_conns", 1),
        ("threads", u64::from(server.table.cores())),
        ("hash_bytes", c.index_bytes),
        ("bytes", c.item_bytes),
        ("curr_items", c.items),
        ("total_items", c.items_written),
        ("expired", c.expired),
        ("evictions", evictions(c)),
        ("evicted_unfetched", c.evicted_unread),
        ("evicted_new", c.evicted_new),
        ("evicted_old", c.evicted_old),
        ("evicted_ahead", c.evicted_ahead),
        ("evicted_within_2m", c.evicted_within_2m),
        ("evicted_within_1h", c.evicted_within_1h),
        ("evicted_within_1d", c.evicted_within_1d),
        ("evicted_later", c.evicted_later),
        ("bytes_payload", c.payload_bytes),
        ("bytes_items_resident", c.item_resident_bytes),
        ("bytes_index", c.index_bytes),
        ("bytes_order", c.order_bytes),
        ("bytes_images", c.image_bytes),
        ("bytes_lingering", c.lingering_bytes),
        ("bytes_connections", c.connection_bytes),
        ("bytes_charged", c.charged_bytes),
        ("bytes_other", c.other_bytes),
        ("bytes_resident", server.process.resident_bytes),
        ("requests", c.requests),
        ("requests_forwarded", c.forwarded),
        ("requests_bad", c.bad_requests),
        ("credit_waits", c.credit_waits),
        ("txns", c.txns),
        ("txn_retries", c.txn_retries),
        ("lock_waits", c.lock_waits),
        ("held_replies", c.held_replies),
        ("log_writes", c.log_writes),
        ("log_syncs", c.log_syncs),
        ("log_bytes", c.log_bytes),
        ("log_waiting_bytes", c.log_waiting_bytes),
        ("log_failed", c.log_failed),
        ("snapshots", c.snapshots),
        ("snapshot_failed", c.snapshot_failed),
        ("snapshot_at", earliest_snapshot_ms(cores) / 1000),
        ("receive_buffers_exhausted", c.receive_buffers_exhausted),
    ] {
        stat(out, name, value);
    }
    let item_bytes = c.item_resident_bytes + c.index_bytes + c.order_bytes;
    let overhead = item_bytes.saturating_sub(c.payload_bytes) as f64 / c.items.max(1) as f64;
    stat(out, "overhead_per_item", format_args!("{overhead:.1}"));
    let fragmentation = c.item_resident_bytes as f64 / c.item_bytes.max(1) as f64;
    stat(out, "fragmentation", format_args!("{fragmentation:.3}"));
    stat(out, "hit_ratio", format_args!("{:.4}", hit_ratio(c)));
}

/// When the last snapshot of all cores was finished; 0 while one has none.
fn earliest_snapshot_ms(cores: &[(CoreId, Metrics)]) -> u64 {
    let finished = cores.iter().map(|(_, core)| core.counters.snapshot_at_ms);
    finished.min().unwrap_or(0)
}

fn evictions(counters: &Counters) -> u64 {
    counters.evicted_new + counters.evicted_old
}

fn hit_ratio(counters: &Counters) -> f64 {
    counters.get_hits as f64 / (counters.get_hits + counters.get_misses).max(1) as f64
}

fn stats_items(sum: &Metrics, out: &mut Rope) {
    let c = &sum.counters;
    if c.items == 0 {
        return;
    }
    // One class holds everything.
    for (name, value) in [
        ("number", c.items),
        ("mem_requested", c.item_bytes),
        ("evicted", evictions(c)),
        ("evicted_unfetched", c.evicted_unread),
        ("outofmemory", c.out_of_memory),
        ("reclaimed", c.expired),
    ] {
        stat(out, format_args!("items:1:{name}"), value);
    }
}

fn stats_latency(sum: &Metrics, out: &mut Rope) {
    for class in Class::ALL {
        for (forwarded, place) in [(false, "local"), (true, "forwarded")] {
            let histogram = sum.latency(class, forwarded);
            if histogram.is_empty() {
                continue;
            }
            let name = |what| format!("{}:{place}:{what}", class.name());
            stat(out, name("count"), histogram.len());
            for (what, quantile) in [("p50_us", 0.5), ("p90_us", 0.9), ("p99_us", 0.99), ("p99.9_us", 0.999)] {
                let us = histogram.value_at_quantile(quantile) as f64 / 1000.0;
                stat(out, name(what), format_args!("{us:.1}"));
            }
            stat(
                out,
                name("max_us"),
                format_args!("{:.1}", histogram.max() as f64 / 1000.0),
            );
        }
    }
}

fn stats_cores(cores: &[(CoreId, Metrics)], out: &mut Rope) {
    for (core, metrics) in cores {
        let c = &metrics.counters;
        let id = core.0;
        for (name, value) in [
            ("operations", c.requests),
            ("connections", c.connections),
            ("forwarded", c.forwarded),
            ("served_for_others", c.served_for_others),
            ("credit_waits", c.credit_waits),
            ("items", c.items),
            ("bytes", c.item_bytes),
            ("item_resident_bytes", c.item_resident_bytes),
            ("index_bytes", c.index_bytes),
            ("order_bytes", c.order_bytes),
            ("lingering_bytes", c.lingering_bytes),
            ("connection_bytes", c.connection_bytes),
            ("charged_bytes", c.charged_bytes),
            ("evictions", evictions(c)),
            ("turns", c.turns),
        ] {
            stat(out, format_args!("{id}:{name}"), value);
        }
        let idle = c.idle_ns as f64 / c.uptime_ns.max(1) as f64;
        stat(out, format_args!("{id}:idle_share"), format_args!("{idle:.4}"));
        stat(out, format_args!("{id}:hit_ratio"), format_args!("{:.4}", hit_ratio(c)));
    }
}

fn stats_hot_keys(cores: &[(CoreId, Metrics)], out: &mut Rope) {
    let share = |ppm: u32| format!("{:.4}", f64::from(ppm) / 1e6);
    for (core, metrics) in cores {
        for (rank, hot) in (1..).zip(&metrics.hot_keys) {
            let name = |what| format!("{}:{rank}:{what}", core.0);
            stat(out, name("key"), escaped(&hot.key));
            stat(out, name("per_second"), hot.per_second);
            stat(out, name("writes_per_second"), hot.writes_per_second);
            stat(out, name("share"), share(hot.share_ppm));
            stat(out, name("share_error"), share(hot.error_ppm));
        }
    }
}

fn stats_slow_log(cores: &[(CoreId, Metrics)], out: &mut Rope) {
    for (core, metrics) in cores {
        for (rank, slow) in (1..).zip(&metrics.slow_log) {
            let name = |what| format!("{}:{rank}:{what}", core.0);
            stat(out, name("at_ms"), slow.at_ms);
            stat(out, name("protocol"), &slow.protocol);
            if !slow.client.is_empty() {
                stat(out, name("client"), &slow.client);
            }
            stat(out, name("command"), slow.class.name());
            if slow.key_bytes > 0 {
                stat(out, name("key"), escaped(&slow.key));
                stat(out, name("key_bytes"), slow.key_bytes);
            }
            stat(out, name("requests"), slow.requests);
            stat(out, name("total_us"), slow.total_us());
            stat(out, name("queue_us"), slow.queue_us);
            stat(out, name("execute_us"), slow.execute_us);
            stat(out, name("hop_us"), slow.hop_us);
            stat(out, name("flush_us"), slow.flush_us);
        }
    }
}

/// What a connection is told before it is closed because there is no memory for its request.
pub(super) fn out_of_memory() -> &'static [u8] {
    b"SERVER_ERROR out of memory reading request\r\n"
}

/// Encodes `stats settings`.
pub(super) fn encode_settings(server: &ServerFacts<'_>, out: &mut Rope) {
    let (config, limits) = (server.config, &server.config.limits);
    let (address, port) = match config.memcached {
        crate::config::Listen::At(address) => (address.ip().to_string(), address.port()),
        crate::config::Listen::Off => ("off".to_owned(), 0),
    };
    stat(out, "maxbytes", server.memory_bytes_max);
    stat(out, "maxconns", limits.connections_max);
    stat(out, "tcpport", port);
    stat(out, "udpport", 0);
    stat(out, "inter", address);
    let evicts = limits.eviction != Eviction::None;
    stat(out, "evictions", if evicts { "on" } else { "off" });
    stat(out, "eviction_policy", limits.eviction);
    stat(
        out,
        "shutdown_command",
        if config.enable_shutdown { "yes" } else { "no" },
    );
    stat(out, "read_only", if config.read_only { "yes" } else { "no" });
    stat(out, "num_threads", server.table.cores());
    stat(out, "cas_enabled", "yes");
    stat(out, "tcp_backlog", limits.backlog);
    stat(out, "item_size_max", limits.item_size_max.0);
    stat(out, "key_size_max", limits.key_size_max);
    stat(out, "idle_timeout", limits.idle_timeout.as_secs());
    stat(out, "write_timeout", limits.write_timeout.as_secs());
    stat(out, "requests_in_flight_max", limits.requests_in_flight_max);
    stat(out, "input_bytes_max", limits.input_bytes_max.0);
    stat(out, "output_bytes_max", limits.output_bytes_max.0);
    stat(out, "mesh_requests_max", limits.mesh_requests_max);
    stat(out, "mesh_bytes_max", limits.mesh_bytes_max.0);
    stat(out, "spin_us", config.spin_us);
    stat(out, "slow_log_threshold_us", config.slow_log_threshold.as_micros());
    stat(out, "slow_log_len", config.slow_log_len);
    out.push(END);
}
