//! The protocols the generator speaks, one file each.
//!
//! A protocol is two halves: functions that append a request to a connection's send buffer, and functions that read the
//! reply at the front of what was received. Neither keeps state, because a connection knows which request the next
//! reply belongs to. Where the wire has a state of its own, and replies come in any order, a [`Session`] for each connection
//! stands between the two halves and the wire. A further protocol is one more file that implements [`Protocol`] and one more
//! line in [`ProtocolName`] and in [`with_protocol!`](crate::with_protocol).

pub mod grpc;
pub mod http;
pub mod json_line;
pub mod memcached;
pub mod protobuf;
pub mod resp;
pub mod text;

use crate::workload::{Command, Value};
use std::borrow::Cow;
use std::ops::Range;

/// What a server said to one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reply<'a> {
    /// The value was stored.
    Stored,
    /// The server declined to store the value.
    NotStored,
    /// The key was found.
    Hit {
        /// The key as the server echoed it, in protocols that do.
        key: Option<&'a [u8]>,
        /// The value as the reply writes it; [`Protocol::plain`] tells its bytes.
        value: &'a [u8],
    },
    /// The key was found, and the reply has its value in chunks as HTTP writes them; [`http::joined`] tells its bytes.
    Chunked(&'a [u8]),
    /// The key was not found by a get.
    Miss,
    /// The key was removed.
    Deleted,
    /// The key to remove was not found.
    NotFound,
    /// The server said that it failed, or that the request was wrong; its words.
    Refused(&'a [u8]),
}

/// The outcome of reading a reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Parsed<T> {
    /// More bytes are needed.
    Incomplete,
    /// The bytes are no reply to this kind of request. The connection is out of step and of no further use.
    Malformed,
    /// A reply, and its length in bytes.
    Done(T, usize),
}

/// One key of the reply to a multi-get or to the reads of a transaction, as places in the bytes given to the parser.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    /// Where the echoed key is; empty in protocols that answer by position.
    pub key: Range<usize>,
    /// Where the value is, as the reply writes it; `None` for a key that was not found.
    pub value: Option<Range<usize>>,
    /// The version of what was found, where it was asked for; else 0.
    pub version: u64,
}

/// The reply to a multi-get: the items were listed, or the server refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MultiReply<'a> {
    /// The items are in the list given to the parser.
    Items,
    /// The server said that it failed; its words.
    Refused(&'a [u8]),
}

/// A key and the value to write to it.
#[derive(Debug, Clone, Copy)]
pub struct Entry<'a> {
    /// The key.
    pub key: &'a [u8],
    /// The value.
    pub value: Value<'a>,
}

/// One operation of a transaction.
#[derive(Debug, Clone, Copy)]
pub enum Op<'a> {
    /// Reads this key.
    Get(&'a [u8]),
    /// Writes a value.
    Set(Entry<'a>),
    /// Removes this key.
    Delete(&'a [u8]),
}

/// What a request of a transaction asks for, as far as its reply depends on it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum TxnRequest {
    /// All operations.
    #[default]
    Plain,
    /// An optimistic transaction: all of it, or, in protocols that take two requests for it, its reads.
    Checked,
    /// The writes of an optimistic transaction, whose reads were answered.
    Writes,
}

/// What a request of a transaction asks for, and how much of its reply has been read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TxnState {
    /// What is asked for.
    pub request: TxnRequest,
    /// Parts of the reply that have been read.
    pub parts: usize,
}

/// The reply to a request of a transaction, or a part of it. What it tells of values that were read is in the list given to
/// the parser.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TxnReply<'a> {
    /// This part is good, and there is more to come.
    Part,
    /// The server said in this part that it failed, its words, and there is more to come.
    Failing(&'a [u8]),
    /// It was done.
    Committed,
    /// It was read, with versions; the writes are to be asked for.
    Read,
    /// Nothing was done: a key has changed since it was read.
    Changed,
    /// The server said that it failed; its words.
    Refused(&'a [u8]),
}

/// The most keys that memkv-tpc takes in one request or transaction, unless it was told otherwise.
pub const BATCH_KEYS_MAX: usize = 10_000;
/// The same for the bytes of its keys and values.
pub const BATCH_BYTES_MAX: u64 = 16 << 20;

/// Keys of one request, back to back.
#[derive(Debug, Default, Clone)]
pub struct KeyList {
    bytes: Vec<u8>,
    ends: Vec<usize>,
}

impl KeyList {
    /// Forgets all keys.
    pub fn clear(&mut self) {
        self.bytes.clear();
        self.ends.clear();
    }

    /// Adds a key.
    pub fn push(&mut self, key: &[u8]) {
        self.bytes.extend_from_slice(key);
        self.ends.push(self.bytes.len());
    }

    /// The number of keys.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there are no keys.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// The keys in the order they were added.
    pub fn iter(&self) -> impl Iterator<Item = &[u8]> + Clone {
        let mut start = 0;
        self.ends
            .iter()
            .map(move |&end| &self.bytes[std::mem::replace(&mut start, end)..end])
    }
}

/// What a frame that was received means for the requests of its connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// Nothing yet.
    Nothing,
    /// The request with this place has been answered: [`Session::answer`] tells how.
    Answered(usize),
    /// The server is about to close the connection: [`Session::closing`] tells why.
    Closing,
}

/// What a connection has to know beside its requests in flight: nothing, unless replies may come in any order.
///
/// A request in flight has a place below the number that the session was made with, which nobody else has at the time.
pub trait Session: std::fmt::Debug + Send + Sized {
    /// Whether replies come in any order, so that the session tells which request each belongs to.
    const MULTIPLEXED: bool;

    /// The session of a new connection, with places for so many requests, a power of two. Appends what it has to say first.
    fn open(places: usize, out: &mut Vec<u8>) -> Self;

    /// Gives the request that begins at `start` and ends `out` a place. What the wire does not take yet is kept, and
    /// appended once it does.
    fn requested(&mut self, place: usize, command: Command, out: &mut Vec<u8>, start: usize);

    /// Whether the connection can bear no more requests; why.
    fn spent(&self) -> Option<&'static str>;

    /// Reads the frame at the front of `input`, and appends what it demands to `out`. Only called if the session is
    /// multiplexed, as all that follows.
    fn read(&mut self, input: &[u8], out: &mut Vec<u8>) -> Parsed<Event>;

    /// What was said to the request with this place: bytes for [`Protocol::reply`], or, of one that failed, words. There
    /// until the place is taken anew.
    fn answer(&self, place: usize) -> Result<&[u8], &[u8]>;

    /// Why the server is about to close the connection.
    fn closing(&self) -> &str;

    /// Exchanges the requests with these places.
    fn swap(&mut self, one: usize, other: usize);
}

/// Replies come in the order of the requests, and say everything themselves.
impl Session for () {
    const MULTIPLEXED: bool = false;

    #[inline(always)]
    fn open(_places: usize, _out: &mut Vec<u8>) -> Self {}

    #[inline(always)]
    fn requested(&mut self, _place: usize, _command: Command, _out: &mut Vec<u8>, _start: usize) {}

    #[inline(always)]
    fn spent(&self) -> Option<&'static str> {
        None
    }

    fn read(&mut self, _input: &[u8], _out: &mut Vec<u8>) -> Parsed<Event> {
        Parsed::Malformed
    }

    fn answer(&self, _place: usize) -> Result<&[u8], &[u8]> {
        Err(b"")
    }

    fn closing(&self) -> &str {
        ""
    }

    fn swap(&mut self, _one: usize, _other: usize) {}
}

/// A wire protocol.
pub trait Protocol: Copy + Send + std::fmt::Debug + 'static {
    /// What a connection has to know beside its requests in flight.
    type Session: Session;

    /// The name on the command line.
    const NAME: &'static str;
    /// Whether keys can be removed.
    const DELETES: bool = true;
    /// Whether several keys can be asked for with one request.
    const MULTI_GETS: bool = true;
    /// The most entries that can be written with one request.
    const MULTI_SET_MAX: usize = 1;
    /// The most operations of a transaction; 0 where there are no transactions.
    const TXN_MAX: usize = 0;
    /// The most keys of an optimistic transaction; 0 where there are none.
    const CHECKED_TXN_MAX: usize = 0;
    /// The longest key the protocol allows, in bytes.
    const MAX_KEY: usize = usize::MAX;
    /// Whether values are text: not empty, UTF-8, without line feeds, and without blanks and CRs at their ends.
    const TEXT_VALUES: bool = false;
    /// Whether `set` obeys [`Value::expires_s`].
    const EXPIRY: bool = false;

    /// Appends a request to read `key`.
    fn get(out: &mut Vec<u8>, key: &[u8]);

    /// Appends a request to write `value` under `key`.
    fn set(out: &mut Vec<u8>, key: &[u8], value: &Value<'_>);

    /// Appends a request to remove `key`. Never called unless [`DELETES`](Self::DELETES).
    fn delete(out: &mut Vec<u8>, key: &[u8]);

    /// Appends a request to read all of `keys`. Never called unless [`MULTI_GETS`](Self::MULTI_GETS).
    fn multi_get(out: &mut Vec<u8>, keys: &KeyList);

    /// Reads the reply to a get, set or delete at the front of `input`. `key_len` is the length of the key in bytes,
    /// which saves the search for its end where the server echoes it.
    fn reply(command: Command, key_len: usize, input: &[u8]) -> Parsed<Reply<'_>>;

    /// Reads the reply to a multi-get of `width` keys at the front of `input` and lists its items in `items`, which is
    /// cleared first and means nothing unless the outcome is [`MultiReply::Items`].
    fn multi_reply<'a>(width: usize, input: &'a [u8], items: &mut Vec<Item>) -> Parsed<MultiReply<'a>>;

    /// The bytes of a value that a reply writes as `value`.
    #[inline(always)]
    fn plain(value: &[u8]) -> Cow<'_, [u8]> {
        Cow::Borrowed(value)
    }

    /// Appends a request to write all of `entries`. Never called unless [`MULTI_SET_MAX`](Self::MULTI_SET_MAX) allows it.
    fn multi_set<'a>(_out: &mut Vec<u8>, _entries: impl Iterator<Item = Entry<'a>> + Clone) {
        unreachable!("the protocol has no multi-set");
    }

    /// Reads the reply to a multi-set of `width` entries at the front of `input`.
    fn multi_set_reply(_width: usize, _input: &[u8]) -> Parsed<Reply<'_>> {
        Parsed::Malformed
    }

    /// Appends a transaction of `ops`. Never called unless [`TXN_MAX`](Self::TXN_MAX) allows it.
    fn txn<'a>(_out: &mut Vec<u8>, _ops: impl Iterator<Item = Op<'a>> + Clone) {
        unreachable!("the protocol has no transactions");
    }

    /// Appends an optimistic transaction, which reads the keys of `entries` and then writes `entries`, or, in protocols that
    /// take two requests for it, its reads. Never called unless [`CHECKED_TXN_MAX`](Self::CHECKED_TXN_MAX) allows it.
    fn checked_txn<'a>(_out: &mut Vec<u8>, _entries: impl Iterator<Item = Entry<'a>> + Clone) {
        unreachable!("the protocol has no optimistic transactions");
    }

    /// Appends the second request of an optimistic transaction: write `entries` if their keys still are as they were
    /// `read`, in the same order. Never called unless a reply was [`TxnReply::Read`].
    fn checked_writes<'a>(_out: &mut Vec<u8>, _entries: impl Iterator<Item = Entry<'a>> + Clone, _read: &[Item]) {
        unreachable!("the protocol takes one request for a transaction");
    }

    /// Reads the next part of the reply to a request of a transaction at the front of `input` and lists in `items`, which is
    /// cleared first, what was read, in order. There are `width` operations with these commands; in an optimistic
    /// transaction they are the sets.
    fn txn_reply<'a>(
        _state: TxnState,
        _width: usize,
        _command: impl Fn(usize) -> Command,
        _input: &'a [u8],
        _items: &mut Vec<Item>,
    ) -> Parsed<TxnReply<'a>> {
        Parsed::Malformed
    }
}

/// The protocols by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, clap::ValueEnum, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ProtocolName {
    /// The text protocol of memcached.
    Memcached,
    /// A simpler text protocol: `set KEY BYTES`, `get KEY`.
    Text,
    /// The protocol of Redis.
    #[value(alias = "redis")]
    #[serde(alias = "redis")]
    Resp,
    /// The protobuf protocol of memkv-tpc.
    Protobuf,
    /// The JSON-line protocol of memkv-tpc.
    JsonLine,
    /// HTTP/1.1, with a resource for each key.
    Http,
    /// gRPC over HTTP/2 without TLS.
    Grpc,
}

impl ProtocolName {
    /// The name on the command line.
    pub fn name(self) -> &'static str {
        crate::with_protocol!(self, P => <P as Protocol>::NAME)
    }
}

/// Evaluates an expression with a type name bound to the protocol that a [`ProtocolName`] stands for.
#[macro_export]
macro_rules! with_protocol {
    ($name:expr, $p:ident => $body:expr) => {
        match $name {
            $crate::protocol::ProtocolName::Memcached => {
                type $p = $crate::protocol::memcached::Memcached;
                $body
            }
            $crate::protocol::ProtocolName::Text => {
                type $p = $crate::protocol::text::Text;
                $body
            }
            $crate::protocol::ProtocolName::Resp => {
                type $p = $crate::protocol::resp::Resp;
                $body
            }
            $crate::protocol::ProtocolName::Protobuf => {
                type $p = $crate::protocol::protobuf::Protobuf;
                $body
            }
            $crate::protocol::ProtocolName::JsonLine => {
                type $p = $crate::protocol::json_line::JsonLine;
                $body
            }
            $crate::protocol::ProtocolName::Http => {
                type $p = $crate::protocol::http::Http;
                $body
            }
            $crate::protocol::ProtocolName::Grpc => {
                type $p = $crate::protocol::grpc::Grpc;
                $body
            }
        }
    };
}

/// Appends `n` in decimal.
#[inline(always)]
fn push_decimal(out: &mut Vec<u8>, n: usize) {
    let mut digits = [0u8; 20];
    let (mut rest, mut at) = (n, digits.len());
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

/// Reads a decimal number at `at`; the number and the place behind its last digit. `None` for no digits or too many.
#[inline(always)]
fn decimal(input: &[u8], at: usize) -> Option<(usize, usize)> {
    let (mut n, mut end) = (0usize, at);
    while let Some(digit) = input.get(end).map(|b| b.wrapping_sub(b'0')).filter(|&d| d < 10) {
        n = n * 10 + usize::from(digit);
        end += 1;
        if end - at > 10 {
            return None;
        }
    }
    (end > at).then_some((n, end))
}

/// The line at the front of `input` without its CRLF, if it is complete.
fn line(input: &[u8]) -> Option<&[u8]> {
    input.windows(2).position(|w| w == b"\r\n").map(|end| &input[..end])
}

/// What to say when `input` does not have all of `expected` at `at`: the rest of it is missing, or something else is
/// there.
#[cold]
fn cut_short<T>(input: &[u8], at: usize, expected: &[u8]) -> Parsed<T> {
    let there = input.get(at..).unwrap_or_default();
    if expected.starts_with(there) {
        Parsed::Incomplete
    } else {
        Parsed::Malformed
    }
}

/// The longest line a reply may begin with, in bytes, before it counts as malformed.
const MAX_LINE: usize = 128 << 10;

/// What to say of an input whose first line is no expected reply: it may be incomplete, one of the errors that
/// `is_error` knows, or malformed.
#[cold]
fn unexpected<'a>(input: &'a [u8], is_error: impl Fn(&[u8]) -> bool) -> Parsed<Reply<'a>> {
    match line(input) {
        Some(text) if is_error(text) => Parsed::Done(Reply::Refused(text), text.len() + 2),
        None if input.len() < MAX_LINE => Parsed::Incomplete,
        _ => Parsed::Malformed,
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Cuts `input` after every byte: a proper prefix must be incomplete, the whole must be `expected`, and bytes of
    /// the next reply must not change it.
    pub(crate) fn at_all_sizes<P: Protocol>(command: Command, key_len: usize, input: &[u8], expected: Reply<'_>) {
        for cut in 0..input.len() {
            let got = P::reply(command, key_len, &input[..cut]);
            assert_eq!(got, Parsed::Incomplete, "{} of {} bytes", cut, input.len());
        }
        assert_eq!(P::reply(command, key_len, input), Parsed::Done(expected, input.len()));
        let more = [input, input].concat();
        assert_eq!(P::reply(command, key_len, &more), Parsed::Done(expected, input.len()));
    }

    /// The same for a multi-get; `expected` are keys and values.
    pub(crate) fn multi_at_all_sizes<P: Protocol>(width: usize, input: &[u8], expected: &[(&[u8], Option<&[u8]>)]) {
        let mut items = Vec::new();
        for cut in 0..input.len() {
            let got = P::multi_reply(width, &input[..cut], &mut items);
            assert_eq!(got, Parsed::Incomplete, "{} of {} bytes", cut, input.len());
        }
        let more = [input, input].concat();
        assert_eq!(
            P::multi_reply(width, &more, &mut items),
            Parsed::Done(MultiReply::Items, input.len())
        );
        let got: Vec<_> = items
            .iter()
            .map(|i| (&more[i.key.clone()], i.value.clone().map(|v| &more[v])))
            .collect();
        assert_eq!(got, expected);
    }

    /// The same for a request of a transaction, all parts of its reply; `expected` are values and versions of what it read,
    /// and `failing` is what a part but the last said.
    pub(crate) fn txn_at_all_sizes<P: Protocol>(
        request: TxnRequest,
        commands: &[Command],
        input: &[u8],
        reply: TxnReply<'_>,
        expected: &[(Option<&[u8]>, u64)],
        failing: Option<&[u8]>,
    ) {
        let more = [input, input].concat();
        for cut in (0..input.len()).chain([more.len()]) {
            let input = &more[..cut];
            let (mut at, mut read, mut failed, mut items) = (0, Vec::new(), None, Vec::new());
            let end = loop {
                let parts = TxnState {
                    request,
                    parts: read.len(),
                };
                let rest = &input[at..];
                let part = P::txn_reply(parts, commands.len(), |i| commands[i], rest, &mut items);
                let Parsed::Done(part, len) = part else { break part };
                let values = items.iter().map(|i| (i.value.clone().map(|v| &rest[v]), i.version));
                read.push(values.collect::<Vec<_>>());
                at += len;
                match part {
                    TxnReply::Part => {}
                    TxnReply::Failing(text) => failed = failed.or(Some(text)),
                    end => break Parsed::Done(end, at),
                }
            };
            if cut < more.len() {
                assert_eq!(end, Parsed::Incomplete, "{cut} bytes");
            } else {
                assert_eq!(end, Parsed::Done(reply, more.len() / 2));
                assert_eq!((read.concat(), failed), (expected.to_vec(), failing));
            }
        }
    }

    #[test]
    fn limits_are_the_servers() {
        let config = memkv::config::Config::default();
        let limits = config.limits;
        let keys = [limits.request_keys_max, limits.txn_ops_max];
        assert_eq!(keys, [BATCH_KEYS_MAX as u32; 2]);
        let bytes = [
            limits.txn_bytes_max.0,
            limits.request_bytes_max(),
            limits.response_bytes_max(),
        ];
        assert_eq!(bytes, [BATCH_BYTES_MAX; 3]);
    }

    #[test]
    fn decimals() {
        for n in [0, 7, 10, 12_345, 4_294_967_296] {
            let mut out = Vec::new();
            push_decimal(&mut out, n);
            assert_eq!(out, n.to_string().as_bytes());
            assert_eq!(decimal(&out, 0), Some((n, out.len())));
        }
        assert_eq!(decimal(b"x", 0), None);
        assert_eq!(decimal(b"12345678901", 0), None);
        assert_eq!(decimal(b"", 0), None);
    }

    #[test]
    fn key_lists() {
        let mut keys = KeyList::default();
        keys.push(b"a");
        keys.push(b"");
        keys.push(b"bc");
        assert_eq!(keys.iter().collect::<Vec<_>>(), [&b"a"[..], b"", b"bc"]);
        keys.clear();
        assert!(keys.is_empty());
    }
}
