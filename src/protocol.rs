//! What all wire protocols share: the seam between bytes on a connection and the command model.
//!
//! A codec is a pure function pair. [`Decoder::step`] turns the front of a connection's input into one [`Step`]; an
//! `encode` turns a [`Reply`] into bytes. What the codec must remember between the two travels with the command as a
//! [`Shape`], opaque to everything in between, so the core that owns a key encodes the reply, wherever the connection is.

pub mod call;
mod exposition;
pub mod json_line;
mod live;
pub mod memcached;
pub mod protobuf;
pub mod text;

use crate::encoding::Rope;
use crate::metrics::Report;
use crate::model::{Broadcast, Command, Reply, Transaction, TxnEnd, UnixMillis};
use crate::partition::RangeTable;
use bumpalo::Bump;
use bytes::Bytes;
use std::cell::OnceCell;

/// The protocols that connections speak.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Protocol {
    /// memcached's text protocol, classic and meta commands.
    Memcached = 0,
    /// The simple text protocol: set, get, delete.
    Text = 1,
    /// The protobuf protocol of `proto/memkv.proto`.
    Protobuf = 2,
    /// The JSON-line protocol: commands as lines, answers as JSON, transactions built up command by command.
    JsonLine = 3,
    /// HTTP: its handlers make calls.
    Http = 4,
    /// gRPC: the same.
    Grpc = 5,
}

impl Protocol {
    /// All protocols, in the order of their numbers.
    pub const ALL: [Protocol; 6] = [
        Protocol::Memcached,
        Protocol::Text,
        Protocol::Protobuf,
        Protocol::JsonLine,
        Protocol::Http,
        Protocol::Grpc,
    ];

    /// Handlers of the runtime read and write its bytes, and make calls.
    #[inline]
    pub fn has_handlers(self) -> bool {
        matches!(self, Protocol::Http | Protocol::Grpc)
    }

    /// The name in options, logs and statistics.
    pub fn name(self) -> &'static str {
        ["memcached", "text", "protobuf", "json-line", "http", "grpc"][self as usize]
    }
}

/// How a reply is to be written: made by a decoder, read by the same protocol's encoder.
#[derive(Clone, Copy, Debug)]
pub struct Shape<'a> {
    /// Meaning private to the protocol.
    pub code: u32,
    /// Text of the request that the reply repeats.
    pub text: &'a [u8],
}

impl Shape<'_> {
    /// In the code of every protocol: the reply comes when what it tells is safe.
    pub(crate) const DURABLE: u32 = 1 << 31;

    /// A shape without text.
    pub fn code(code: u32) -> Self {
        Self { code, text: &[] }
    }

    /// The reply comes when what it tells is safe.
    #[inline]
    pub(crate) fn is_durable(&self) -> bool {
        self.code & Self::DURABLE != 0
    }
}

/// What a decoder knows of its surroundings.
#[derive(Clone, Copy, Debug)]
pub struct Env<'a> {
    /// The turn's time.
    pub now: UnixMillis,
    /// The longest key, in bytes.
    pub key_bytes_max: usize,
    /// The largest value, in bytes.
    pub value_bytes_max: usize,
    /// Clients may stop the server.
    pub shutdown_enabled: bool,
    /// The longest request of a protocol that frames its requests, in bytes.
    pub request_bytes_max: usize,
    /// The most keys of one request.
    pub request_keys_max: usize,
    /// Room for bytes that are not in the input as they are needed, such as decoded keys. Emptied with every batch.
    pub arena: &'a Bump,
    /// Room for the one large value that is a part of what was collected.
    pub large: &'a OnceCell<Bytes>,
}

/// What the front of the input means.
#[derive(Clone, Copy, Debug)]
pub enum Decoded<'a> {
    /// Nothing yet: more bytes are needed.
    Incomplete,
    /// Input that asks for nothing and is answered by nothing.
    Nothing,
    /// A request for one key.
    Command(Command<'a>, Shape<'a>),
    /// A request for all shards.
    Broadcast(Broadcast, Shape<'a>),
    /// A request for several keys, executed at one instant. Not empty.
    Transaction(Transaction<'a>, Shape<'a>),
    /// A command of a transaction that the connection builds up.
    Buffered(Buffered<'a>, Shape<'a>),
    /// An answer that needs no shard.
    Answer(&'a [u8]),
    /// A refused request: the answer, counted as a bad request.
    Refused(&'a [u8]),
    /// The used bytes announce a value (or a long rest of a request) of this many bytes, which is to be collected into memory
    /// of its own. When it is whole, the decoder is asked again through [`Decoder::with_value`].
    Value(usize),
    /// The answer needs no shard, but facts about the server.
    About(Shape<'a>),
    /// A new memory limit, in bytes, with the answer.
    MemoryLimit(u64, &'static [u8]),
    /// The client ends the connection, or the protocol does: nothing is answered behind these last words.
    Close(&'a [u8]),
    /// The client ends the server.
    Shutdown,
}

impl Decoded<'_> {
    /// The same, answered when what the answer tells is safe.
    #[cold]
    pub(crate) fn durable(mut self) -> Self {
        if let Decoded::Command(_, shape)
        | Decoded::Transaction(_, shape)
        | Decoded::Broadcast(Broadcast::Flush(None), shape) = &mut self
        {
            shape.code |= Shape::DURABLE;
        }
        self
    }
}

/// What a connection does with a transaction that it builds up command by command.
#[derive(Clone, Copy, Debug)]
pub enum Buffered<'a> {
    /// Begins it; checked: what it reads must not have changed when it is committed.
    Begin {
        /// It is.
        checked: bool,
    },
    /// Keeps a write.
    Put {
        /// To this key.
        key: &'a [u8],
        /// Its value.
        value: &'a [u8],
    },
    /// Keeps a delete.
    Delete {
        /// Of this key.
        key: &'a [u8],
    },
    /// Reads: what the transaction wrote, else what is committed.
    Get {
        /// This key.
        key: &'a [u8],
        /// The transaction is checked.
        checked: bool,
    },
    /// Does all of it.
    Commit,
    /// Forgets all of it.
    Rollback,
}

/// The front of the input, decoded.
#[derive(Clone, Copy, Debug)]
pub struct Step<'a> {
    /// What it means.
    pub decoded: Decoded<'a>,
    /// How many bytes of input it took.
    pub used: usize,
    /// How many bytes behind those are to be skipped unread: the value of a refused request.
    pub swallow: usize,
    /// Where the decoder stands afterwards.
    pub next: Decoder,
}

/// Where a connection's decoder stands between two requests. Small and copied: to take a request back, keep the old one.
#[derive(Clone, Copy, Debug)]
pub enum Decoder {
    /// See [`memcached`].
    Memcached(memcached::State),
    /// See [`text`].
    Text(text::State),
    /// See [`protobuf`]: what is left of a request stands in the input.
    Protobuf,
    /// See [`json_line`].
    JsonLine(json_line::State),
    /// See [`call`].
    Call,
}

impl Decoder {
    /// The state of a fresh connection.
    pub fn new(protocol: Protocol) -> Self {
        match protocol {
            Protocol::Memcached => Decoder::Memcached(memcached::State::default()),
            Protocol::Text => Decoder::Text(text::State::default()),
            Protocol::Protobuf => Decoder::Protobuf,
            Protocol::JsonLine => Decoder::JsonLine(json_line::State::default()),
            Protocol::Http | Protocol::Grpc => Decoder::Call,
        }
    }

    /// Decodes the front of `input`, which is not empty.
    #[inline]
    pub fn step<'a>(self, input: &'a [u8], env: &Env<'a>) -> Step<'a> {
        match self {
            Decoder::Memcached(state) => memcached::step(state, input, env),
            Decoder::Text(state) => text::step(state, input, env),
            Decoder::Protobuf => protobuf::step(input, env),
            Decoder::JsonLine(state) => json_line::step(state, input, env),
            Decoder::Call => call::step(input, env),
        }
    }

    /// Decodes a request whose value was announced by `header` (the bytes that [`Decoded::Value`] used) and has come
    /// whole; `rest` is the input behind it.
    pub fn with_value<'a>(self, header: &'a [u8], value: &'a Bytes, rest: &'a [u8], env: &Env<'a>) -> Step<'a> {
        match self {
            Decoder::Memcached(_) => memcached::with_value(header, value, rest, env),
            Decoder::Text(_) => text::with_value(header, value, rest, env),
            Decoder::Protobuf => protobuf::with_value(header, value, env),
            Decoder::Call => call::with_value(header, value),
            Decoder::JsonLine(_) => unreachable!("its lines announce no values"),
        }
    }

    /// What [`Decoded::Value`] announces is always the value of a write, not a request that is only long.
    pub fn announces_writes(self) -> bool {
        !matches!(self, Decoder::Protobuf)
    }

    /// Refuses a request whose announced value is not collected: the value is to be swallowed. `why` is
    /// [`Reply::OutOfMemory`], or, for what [announces a write](Decoder::announces_writes), [`Reply::ReadOnly`].
    pub fn without_value<'a>(self, header: &'a [u8], why: &Reply<'_>, env: &Env<'a>) -> Step<'a> {
        match self {
            Decoder::Memcached(_) => memcached::without_value(header, why, env),
            Decoder::Text(_) => text::without_value(header),
            Decoder::Protobuf => protobuf::without_memory(header, env),
            Decoder::Call => call::without_value(header, why, env),
            Decoder::JsonLine(_) => unreachable!("its lines announce no values"),
        }
    }
}

/// Facts about the process, kept fresh by the runtime.
#[derive(Clone, Copy, Debug, Default)]
pub struct ProcessFacts {
    /// Process id.
    pub pid: u32,
    /// CPU time in user mode, microseconds.
    pub user_us: u64,
    /// CPU time in kernel mode, microseconds.
    pub system_us: u64,
    /// Resident memory, bytes.
    pub resident_bytes: u64,
}

/// What encoders of reports know of the server.
#[derive(Clone, Copy, Debug)]
pub struct ServerFacts<'a> {
    /// The configuration as it was started with.
    pub config: &'a crate::config::Config,
    /// About the process.
    pub process: ProcessFacts,
    /// The turn's time.
    pub now: UnixMillis,
    /// The memory limit now in force.
    pub memory_bytes_max: u64,
    /// Which core owns what.
    pub table: &'a RangeTable,
    /// By core: the port at which it alone serves. Empty when there are none.
    pub core_ports: &'a [u16],
}

/// Encodes [`Reply::NotDurable`]: without [`encode`], which is compiled into the one place where commands are executed.
#[cold]
pub(crate) fn encode_not_durable(protocol: Protocol, shape: &Shape<'_>, out: &mut Rope) {
    match protocol {
        Protocol::Memcached => memcached::encode_not_durable(shape, out),
        Protocol::Text => text::encode(shape, &[], &Reply::NotDurable, out),
        Protocol::Protobuf => protobuf::encode_not_durable(shape, out),
        Protocol::JsonLine => json_line::encode(shape, &Reply::NotDurable, out),
        Protocol::Http | Protocol::Grpc => call::encode(&Reply::NotDurable, out),
    }
}

/// Encodes the reply to a command.
#[inline]
pub fn encode(protocol: Protocol, shape: &Shape<'_>, key: &[u8], reply: &Reply<'_>, now: UnixMillis, out: &mut Rope) {
    match protocol {
        Protocol::Memcached => memcached::encode(shape, key, reply, now, out),
        Protocol::Text => text::encode(shape, key, reply, out),
        Protocol::Protobuf => protobuf::encode(shape, reply, out),
        Protocol::JsonLine => json_line::encode(shape, reply, out),
        Protocol::Http | Protocol::Grpc => call::encode(reply, out),
    }
}

/// What came of a transaction.
#[derive(Debug)]
pub struct TxnResults {
    /// How it ended.
    pub end: TxnEnd,
    /// Whether its checks held, in their order.
    pub checks: Vec<bool>,
    /// The replies to what was executed, in order and one behind the other, as [`encode`] wrote them.
    pub replies: Rope,
    /// How many commands there were for success.
    pub commands: usize,
}

impl TxnResults {
    /// Nothing of it was done. `commands`: how many there were for success.
    pub fn refused(end: TxnEnd, commands: usize) -> Self {
        Self {
            end,
            checks: vec![],
            replies: Rope::default(),
            commands,
        }
    }
}

/// Encodes the reply to a transaction.
pub fn encode_txn(protocol: Protocol, shape: &Shape<'_>, results: TxnResults, out: &mut Rope) {
    match protocol {
        Protocol::Memcached | Protocol::Text => {}
        Protocol::Protobuf => protobuf::encode_txn(shape, results, out),
        Protocol::JsonLine => json_line::encode_txn(shape, results, out),
        Protocol::Http | Protocol::Grpc => call::encode_txn(results, out),
    }
}

/// The reply to this read begins with the version, for the transaction that reads.
pub fn carries_version(protocol: Protocol, shape: &Shape<'_>) -> bool {
    protocol == Protocol::JsonLine && json_line::carries_version(shape)
}

/// Encodes that a command of [`Decoded::Buffered`] was done, or why not.
pub fn encode_done(protocol: Protocol, done: Result<(), &str>, out: &mut Rope) {
    if let Protocol::JsonLine = protocol {
        json_line::encode_done(done, out);
    }
}

/// Encodes the answer to a read of what the transaction itself wrote; `None` stands for a delete.
pub fn encode_own(protocol: Protocol, written: Option<&[u8]>, out: &mut Rope) {
    if let Protocol::JsonLine = protocol {
        json_line::encode_own(written, out);
    }
}

/// Encodes the reply to a broadcast.
pub fn encode_report(protocol: Protocol, shape: &Shape<'_>, report: &Report, server: &ServerFacts<'_>, out: &mut Rope) {
    match protocol {
        Protocol::Memcached => memcached::encode_report(shape, report, server, out),
        Protocol::Text => text::encode_report(report, out),
        Protocol::Protobuf => protobuf::encode_report(shape, report, server, out),
        Protocol::JsonLine => {}
        Protocol::Http | Protocol::Grpc => call::encode_report(shape, report, server, out),
    }
}

/// Encodes the answer to [`Decoded::About`].
pub fn encode_about(protocol: Protocol, shape: &Shape<'_>, server: &ServerFacts<'_>, out: &mut Rope) {
    match protocol {
        Protocol::Memcached => memcached::encode_settings(server, out),
        Protocol::Text | Protocol::JsonLine | Protocol::Http | Protocol::Grpc => {}
        Protocol::Protobuf => protobuf::encode_topology(shape, server, out),
    }
}

/// Replies of this protocol copy values of any size; those of others refer to large ones.
#[inline]
pub fn copies_large(protocol: Protocol) -> bool {
    protocol == Protocol::JsonLine
}

/// How many bytes a reply takes that copies a large value, at the most.
pub fn copied_bytes(protocol: Protocol, value: &[u8]) -> usize {
    match protocol {
        Protocol::JsonLine => json_line::copied_bytes(value),
        _ => value.len(),
    }
}

/// What a client is told of a write that a core refuses because it takes none, where the protocol has room for words.
pub(crate) const READ_ONLY: &str = "the server is read-only";
/// What a client is told that wants something durable, or has written, or reads what was not made durable in time.
pub(crate) const NOT_DURABLE: &str =
    "not durable: the server has no log, or cannot write to it; what was written may be lost or come back";

/// What a client is told that wants something durable of a server that has nothing to make it so.
pub(crate) const NO_LOG: &str = "not durable: the server has no --data-dir; nothing was done";

/// What a connection is told before it is closed because there is no memory for its request.
pub fn out_of_memory(protocol: Protocol) -> Vec<u8> {
    match protocol {
        Protocol::Memcached => memcached::out_of_memory().to_vec(),
        Protocol::Text => text::out_of_memory().to_vec(),
        Protocol::Protobuf => protobuf::out_of_memory(),
        Protocol::JsonLine => json_line::error(json_line::NO_MEMORY),
        Protocol::Http | Protocol::Grpc => call::out_of_memory(),
    }
}

/// What a connection over the limit is told before it is closed.
pub fn refusal(protocol: Protocol) -> Vec<u8> {
    match protocol {
        Protocol::Memcached => b"ERROR Too many open connections\r\n".to_vec(),
        Protocol::Text => vec![],
        Protocol::Protobuf => protobuf::refusal(),
        Protocol::JsonLine => json_line::error("too many open connections"),
        Protocol::Http => {
            let problem = r#"{"type":"about:blank","title":"Service Unavailable","status":503,"detail":"too many open connections"}"#;
            let length = problem.len();
            format!(
                "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/problem+json\r\ncontent-length: {length}\r\n\
                 connection: close\r\n\r\n{problem}"
            )
            .into_bytes()
        }
        Protocol::Grpc => vec![],
    }
}

/// A request line of a text protocol that has no end within this many bytes closes its connection.
pub(crate) const LINE_BYTES_MAX: usize = 2048;

/// The next line of a text protocol.
pub(crate) enum Line<'a> {
    /// Without its end (LF or CRLF), and its length with it.
    Whole(&'a [u8], usize),
    /// Its end has not come yet.
    Incomplete,
    /// Its end cannot come any more.
    TooLong,
}

/// Finds the end of the line at the front of `input`. The verdict does not depend on how the bytes were fragmented.
#[inline]
pub(crate) fn line(input: &[u8]) -> Line<'_> {
    let window = &input[..input.len().min(LINE_BYTES_MAX)];
    match memchr::memchr(b'\n', window) {
        Some(end) => {
            let line = &input[..end];
            Line::Whole(line.strip_suffix(b"\r").unwrap_or(line), end + 1)
        }
        None if window.len() == LINE_BYTES_MAX => Line::TooLong,
        None => Line::Incomplete,
    }
}

/// The blank-separated words of a line.
#[inline]
pub(crate) fn words(line: &[u8]) -> impl Iterator<Item = &[u8]> + Clone {
    line.split(|byte| *byte == b' ').filter(|word| !word.is_empty())
}

/// A key that protocols of lines can express. They show another one as memcached's clients write it: in base64.
#[inline]
pub(crate) fn is_text(key: &[u8]) -> bool {
    // Without a branch per byte, for nearly all keys are so.
    let odd = key.iter().fold(false, |odd, byte| odd | !(b'!'..=b'~').contains(byte));
    !odd || key.iter().all(|byte| *byte > b' ' && *byte != 0x7f) && std::str::from_utf8(key).is_ok()
}

/// A key, or the start of one, as one word of printable characters: other bytes, and the percent sign, as percent and two
/// hexadecimal digits.
pub(crate) fn escaped(key: &[u8]) -> String {
    let mut word = String::with_capacity(key.len());
    for byte in key {
        if byte.is_ascii_graphic() && *byte != b'%' {
            word.push(char::from(*byte));
        } else {
            // Writing to memory does not fail.
            let _ = std::fmt::Write::write_fmt(&mut word, format_args!("%{byte:02X}"));
        }
    }
    word
}

/// A decimal number of 64 bits, perhaps with a plus sign, nothing else.
#[inline]
pub(crate) fn parse_u64(word: &[u8]) -> Option<u64> {
    let digits = word.strip_prefix(b"+").unwrap_or(word);
    if digits.is_empty() {
        return None;
    }
    let mut number = 0u64;
    for byte in digits {
        let digit = byte.wrapping_sub(b'0');
        if digit > 9 {
            return None;
        }
        number = number.checked_mul(10)?.checked_add(u64::from(digit))?;
    }
    Some(number)
}

/// A decimal number that may be negative.
pub(crate) fn parse_i64(word: &[u8]) -> Option<i64> {
    match word.strip_prefix(b"-") {
        Some([b'+', ..]) => None,
        Some(digits) => 0i64.checked_sub_unsigned(parse_u64(digits)?),
        None => parse_u64(word)?.try_into().ok(),
    }
}

/// True when a line is a browser's (or a page's) request: answering it could let a web page talk to a local server.
pub(crate) fn is_http(line: &[u8]) -> bool {
    const VERBS: [&[u8]; 9] = [
        b"GET ",
        b"POST ",
        b"PUT ",
        b"HEAD ",
        b"DELETE ",
        b"OPTIONS ",
        b"PATCH ",
        b"CONNECT ",
        b"TRACE ",
    ];
    VERBS.iter().any(|verb| line.starts_with(verb))
}
