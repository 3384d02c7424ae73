//! The client's end of an HTTP/2 connection, as far as unary calls need it: a stream for each request, both sides' flow
//! control, and nothing that costs more than a request itself.
//!
//! Requests leave in the order of their making. One that finds no room, in the server's windows or in its number of streams,
//! waits, and those behind it with it. No request leaves before the server has told its settings.

use super::hpack::{INDEXED_BLOCK, Requests, Responses};
use crate::protocol::{Event, Parsed, Session};
use crate::workload::Command;
use std::collections::VecDeque;
use std::fmt::Write;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Bytes of what stands before a frame's payload.
const FRAME_HEADER: usize = 9;
/// What a request leaves free at its beginning, for the frame of its header block and the beginning of that of its message.
pub(super) const ROOM: usize = FRAME_HEADER + INDEXED_BLOCK + FRAME_HEADER;

/// Kinds of frames.
mod kind {
    pub(super) const DATA: u8 = 0;
    pub(super) const HEADERS: u8 = 1;
    pub(super) const RST_STREAM: u8 = 3;
    pub(super) const SETTINGS: u8 = 4;
    pub(super) const PUSH_PROMISE: u8 = 5;
    pub(super) const PING: u8 = 6;
    pub(super) const GOAWAY: u8 = 7;
    pub(super) const WINDOW_UPDATE: u8 = 8;
    pub(super) const CONTINUATION: u8 = 9;
}

mod flag {
    pub(super) const END_STREAM: u8 = 0x1;
    pub(super) const ACK: u8 = 0x1;
    pub(super) const END_HEADERS: u8 = 0x4;
    pub(super) const PADDED: u8 = 0x8;
    pub(super) const PRIORITY: u8 = 0x20;
}

/// Numbers of settings.
mod setting {
    pub(super) const HEADER_TABLE_SIZE: u16 = 1;
    pub(super) const ENABLE_PUSH: u16 = 2;
    pub(super) const MAX_CONCURRENT_STREAMS: u16 = 3;
    pub(super) const INITIAL_WINDOW_SIZE: u16 = 4;
    pub(super) const MAX_FRAME_SIZE: u16 = 5;
}

/// Names of error codes, in the order of their numbers.
const ERRORS: [&str; 14] = [
    "NO_ERROR",
    "PROTOCOL_ERROR",
    "INTERNAL_ERROR",
    "FLOW_CONTROL_ERROR",
    "SETTINGS_TIMEOUT",
    "STREAM_CLOSED",
    "FRAME_SIZE_ERROR",
    "REFUSED_STREAM",
    "CANCEL",
    "COMPRESSION_ERROR",
    "CONNECT_ERROR",
    "ENHANCE_YOUR_CALM",
    "INADEQUATE_SECURITY",
    "HTTP_1_1_REQUIRED",
];
const CANCEL: u32 = 8;

/// What a side takes before it says something else.
const DEFAULT_WINDOW: i64 = 65_535;
const DEFAULT_FRAME: usize = 16 << 10;
/// No window may be larger.
const WINDOW_MAX: i64 = (1 << 31) - 1;
/// What this side takes on a stream, and on the connection until it says that it takes more: so much that flow control never
/// holds up a server, as no response is longer.
const WINDOW: u32 = 1 << 30;
/// Longest header block of a response in bytes.
const BLOCK_MAX: usize = 64 << 10;
/// Stream numbers are odd and below this one.
const IDS_END: u32 = 1 << 31;

/// Appends what stands before a frame's payload.
#[inline(always)]
fn push_frame(out: &mut Vec<u8>, len: usize, kind: u8, flags: u8, stream: u32) {
    out.extend_from_slice(&frame_header(len, kind, flags, stream));
}

#[inline(always)]
fn frame_header(len: usize, kind: u8, flags: u8, stream: u32) -> [u8; FRAME_HEADER] {
    let [_, a, b, c] = (len as u32).to_be_bytes();
    let [d, e, f, g] = stream.to_be_bytes();
    [a, b, c, kind, flags, d, e, f, g]
}

/// The number at the front of `bytes`, without the bit that has no meaning.
#[inline(always)]
fn number(bytes: &[u8]) -> Option<u32> {
    bytes
        .first_chunk()
        .map(|four| u32::from_be_bytes(*four) & (IDS_END - 1))
}

/// Appends the name of an error code.
fn push_error(out: &mut String, code: u32) {
    // Writing to a string cannot fail.
    let _ = match ERRORS.get(code as usize) {
        Some(name) => out.write_str(name),
        None => write!(out, "error {code}"),
    };
}

/// A request that was not answered, or the answer to it.
#[derive(Debug, Default)]
struct Call {
    /// Bytes of the response's body.
    body: Vec<u8>,
    /// The response has begun.
    begun: bool,
    /// What made it fail, in words; empty if nothing did.
    failure: String,
}

/// A request that waits for room, or has left in part.
#[derive(Debug)]
struct Waiting {
    stream: u32,
    command: Command,
    message: Vec<u8>,
    /// Its header block has left, and so many bytes of the message.
    sent: Option<usize>,
    /// How many bytes the server takes on this stream yet, once it has begun.
    window: i64,
}

/// What the server has said that it takes.
#[derive(Debug)]
struct Peer {
    streams: usize,
    frame: usize,
    /// On each new stream.
    window: i64,
}

/// The client's end of a connection.
#[derive(Debug)]
pub struct Http2 {
    /// By place: the stream of the request that has it, or 0.
    streams: Box<[u32]>,
    calls: Box<[Call]>,
    /// The stream of the next request.
    next: u32,
    /// Streams that have begun and not ended.
    open: usize,
    /// The server has told its settings.
    settled: bool,
    peer: Peer,
    /// How many bytes the server takes on the connection yet.
    window: i64,
    waiting: VecDeque<Waiting>,
    /// Bytes received that the server has not been told of.
    taken: u32,
    requests: Requests,
    responses: Responses,
    /// A header block whose end has not come: its stream, and whether that ends with it.
    unfinished: Option<(u32, bool)>,
    block: Vec<u8>,
    /// The latest stream that this side gave up. What the server still says there means nothing.
    cancelled: u32,
    why: String,
}

impl Session for Http2 {
    const MULTIPLEXED: bool = true;

    fn open(places: usize, out: &mut Vec<u8>) -> Self {
        out.extend_from_slice(PREFACE);
        push_frame(out, 12, kind::SETTINGS, 0, 0);
        for (setting, value) in [(setting::ENABLE_PUSH, 0), (setting::INITIAL_WINDOW_SIZE, WINDOW)] {
            out.extend_from_slice(&setting.to_be_bytes());
            out.extend_from_slice(&value.to_be_bytes());
        }
        push_frame(out, 4, kind::WINDOW_UPDATE, 0, 0);
        out.extend_from_slice(&(WINDOW - DEFAULT_WINDOW as u32).to_be_bytes());
        Http2 {
            streams: vec![0; places].into(),
            calls: (0..places).map(|_| Call::default()).collect(),
            next: 1,
            open: 0,
            settled: false,
            peer: Peer {
                streams: usize::MAX,
                frame: DEFAULT_FRAME,
                window: DEFAULT_WINDOW,
            },
            window: DEFAULT_WINDOW,
            waiting: VecDeque::new(),
            taken: 0,
            requests: Requests::new(),
            responses: Responses::new(),
            unfinished: None,
            block: Vec::new(),
            cancelled: 0,
            why: String::new(),
        }
    }

    #[inline(always)]
    fn requested(&mut self, place: usize, command: Command, out: &mut Vec<u8>, start: usize) {
        let stream = self.next;
        self.next += 2;
        self.streams[place] = stream;
        let call = &mut self.calls[place];
        call.body.clear();
        call.failure.clear();
        call.begun = false;
        let len = out.len() - start - ROOM;
        let room = (self.window.min(self.peer.window).max(0) as usize).min(self.peer.frame);
        let now = self.settled && self.waiting.is_empty() && self.open < self.peer.streams && len <= room;
        match (self.requests.indexed(command), out[start..].first_chunk_mut::<ROOM>()) {
            (Some(block), Some(free)) if now => {
                let (first, rest) = free.split_at_mut(FRAME_HEADER);
                let (middle, last) = rest.split_at_mut(INDEXED_BLOCK);
                first.copy_from_slice(&frame_header(INDEXED_BLOCK, kind::HEADERS, flag::END_HEADERS, stream));
                middle.copy_from_slice(block);
                last.copy_from_slice(&frame_header(len, kind::DATA, flag::END_STREAM, stream));
                self.open += 1;
                self.window -= len as i64;
            }
            _ => self.put_off(stream, command, out, start),
        }
    }

    #[inline(always)]
    fn spent(&self) -> Option<&'static str> {
        (self.next >= IDS_END).then_some(
            "a connection has no more than 1,073,741,824 streams, which have been used; use more connections, or a shorter run",
        )
    }

    #[inline(always)]
    fn read(&mut self, input: &[u8], out: &mut Vec<u8>) -> Parsed<Event> {
        let Some((header, _)) = input.split_first_chunk::<FRAME_HEADER>() else {
            return Parsed::Incomplete;
        };
        let [a, b, c, kind, flags, stream @ ..] = *header;
        let len = u32::from_be_bytes([0, a, b, c]) as usize;
        let stream = u32::from_be_bytes(stream) & (IDS_END - 1);
        // This side has not said that it takes longer ones.
        if len > DEFAULT_FRAME {
            return Parsed::Malformed;
        }
        let Some(payload) = input.get(FRAME_HEADER..FRAME_HEADER + len) else {
            return Parsed::Incomplete;
        };
        let out_of_turn = !self.settled && (kind != kind::SETTINGS || flags & flag::ACK != 0)
            || self.unfinished.is_some() != (kind == kind::CONTINUATION);
        let event = match kind {
            _ if out_of_turn => None,
            kind::DATA => self.data(stream, flags, payload, out),
            kind::HEADERS => self.headers(stream, flags, payload, out),
            _ => self.other(stream, kind, flags, payload, out),
        };
        match event {
            Some(event) => Parsed::Done(event, FRAME_HEADER + len),
            None => Parsed::Malformed,
        }
    }

    #[inline(always)]
    fn answer(&self, place: usize) -> Result<&[u8], &[u8]> {
        let call = &self.calls[place];
        match call.failure.is_empty() {
            true => Ok(&call.body),
            false => Err(call.failure.as_bytes()),
        }
    }

    fn closing(&self) -> &str {
        &self.why
    }

    #[inline(always)]
    fn swap(&mut self, one: usize, other: usize) {
        self.streams.swap(one, other);
        self.calls.swap(one, other);
    }
}

/// What reading a frame returns: `None` when it breaks the rules.
type Outcome = Option<Event>;

impl Http2 {
    /// The place of the request with this stream.
    #[inline(always)]
    fn place(&self, stream: u32) -> Option<usize> {
        // Places are taken in turn, and given back about in turn.
        let likely = (stream >> 1) as usize & (self.streams.len() - 1);
        let place = match self.streams[likely] == stream {
            true => Some(likely),
            false => self.streams.iter().position(|&s| s == stream),
        };
        place.filter(|_| self.has_begun(stream))
    }

    /// Whether anything of this stream has left. There is nothing to say to a request that has not.
    #[inline(always)]
    fn has_begun(&self, stream: u32) -> bool {
        let end = match self.waiting.front() {
            None => self.next,
            Some(front) if front.sent.is_some() => front.stream + 2,
            Some(front) => front.stream,
        };
        stream % 2 == 1 && stream < end
    }

    /// What to make of a frame for a stream without a request.
    fn nobody(&self, stream: u32) -> Outcome {
        (stream % 2 == 1 && stream <= self.cancelled).then_some(Event::Nothing)
    }

    fn data(&mut self, stream: u32, flags: u8, payload: &[u8], out: &mut Vec<u8>) -> Outcome {
        self.taken += payload.len() as u32;
        if self.taken >= WINDOW / 2 {
            push_frame(out, 4, kind::WINDOW_UPDATE, 0, 0);
            out.extend_from_slice(&self.taken.to_be_bytes());
            self.taken = 0;
        }
        let payload = without_padding(flags, payload)?;
        let Some(place) = self.place(stream) else {
            return self.nobody(stream);
        };
        let call = &mut self.calls[place];
        if !call.begun || call.body.len() + payload.len() > WINDOW as usize {
            return None;
        }
        call.body.extend_from_slice(payload);
        if flags & flag::END_STREAM == 0 {
            return Some(Event::Nothing);
        }
        if call.failure.is_empty() {
            call.failure.push_str("the response has no grpc-status");
        }
        Some(self.ended(place, stream, out))
    }

    #[inline(always)]
    fn headers(&mut self, stream: u32, flags: u8, payload: &[u8], out: &mut Vec<u8>) -> Outcome {
        let mut block = without_padding(flags, payload)?;
        if flags & flag::PRIORITY != 0 {
            block = block.get(5..)?;
        }
        let end = flags & flag::END_STREAM != 0;
        if flags & flag::END_HEADERS != 0 {
            return self.block(stream, end, block, out);
        }
        self.block.clear();
        self.block.extend_from_slice(block);
        self.unfinished = Some((stream, end));
        Some(Event::Nothing)
    }

    fn continuation(&mut self, stream: u32, flags: u8, payload: &[u8], out: &mut Vec<u8>) -> Outcome {
        let (_, end) = self.unfinished.filter(|(unfinished, _)| *unfinished == stream)?;
        self.block.extend_from_slice(payload);
        if self.block.len() > BLOCK_MAX {
            return None;
        }
        if flags & flag::END_HEADERS == 0 {
            return Some(Event::Nothing);
        }
        self.unfinished = None;
        let block = std::mem::take(&mut self.block);
        let event = self.block(stream, end, &block, out);
        self.block = block;
        event
    }

    /// A header block has come: the beginning of a response, or its end, or both.
    #[inline(always)]
    fn block(&mut self, stream: u32, end: bool, block: &[u8], out: &mut Vec<u8>) -> Outcome {
        // Whatever becomes of it, the blocks after it depend on it.
        let said = self.responses.read(block)?;
        let Some(place) = self.place(stream) else {
            return self.nobody(stream);
        };
        let call = &mut self.calls[place];
        if call.begun && !end {
            return None;
        }
        if !call.begun && !end && (100..200).contains(&said.http) {
            return Some(Event::Nothing);
        }
        // Writing to a string cannot fail.
        if !call.begun && said.http != 200 {
            let _ = write!(call.failure, "HTTP status {}", said.http);
        }
        call.begun = true;
        match said.grpc {
            Some(0) => {}
            _ if !call.failure.is_empty() => {}
            Some(status) => {
                let words = String::from_utf8_lossy(self.responses.message());
                let _ = write!(call.failure, "grpc-status {status}: {words}");
            }
            None if end => call.failure.push_str("the response has no grpc-status"),
            None => {}
        }
        Some(match end {
            true => self.ended(place, stream, out),
            false => Event::Nothing,
        })
    }

    /// The server has said all it will say on this stream.
    #[inline(always)]
    fn ended(&mut self, place: usize, stream: u32, out: &mut Vec<u8>) -> Event {
        self.streams[place] = 0;
        self.open -= 1;
        if !self.waiting.is_empty() {
            if self.waiting.front().is_some_and(|front| front.stream == stream) {
                // It did not want the rest of the request.
                self.waiting.pop_front();
                self.cancelled = stream;
                push_frame(out, 4, kind::RST_STREAM, 0, stream);
                out.extend_from_slice(&CANCEL.to_be_bytes());
            }
            self.send_waiting(out);
        }
        Event::Answered(place)
    }

    /// Frames that do not come with each response.
    fn other(&mut self, stream: u32, kind: u8, flags: u8, payload: &[u8], out: &mut Vec<u8>) -> Outcome {
        match kind {
            kind::CONTINUATION => return self.continuation(stream, flags, payload, out),
            kind::RST_STREAM => {
                let code = number(payload).filter(|_| payload.len() == 4)?;
                let Some(place) = self.place(stream) else {
                    // One that was answered does not mind.
                    return self.has_begun(stream).then_some(Event::Nothing);
                };
                if self.waiting.front().is_some_and(|front| front.stream == stream) {
                    self.waiting.pop_front();
                }
                let failure = &mut self.calls[place].failure;
                failure.clear();
                failure.push_str("RST_STREAM: ");
                push_error(failure, code);
                return Some(self.ended(place, stream, out));
            }
            kind::SETTINGS if stream != 0 => return None,
            kind::SETTINGS if flags & flag::ACK != 0 => {}
            kind::SETTINGS => {
                self.settings(payload)?;
                push_frame(out, 0, kind::SETTINGS, flag::ACK, 0);
                self.send_waiting(out);
            }
            kind::PUSH_PROMISE => return None,
            kind::PING if stream != 0 || payload.len() != 8 => return None,
            kind::PING if flags & flag::ACK == 0 => {
                push_frame(out, 8, kind::PING, flag::ACK, 0);
                out.extend_from_slice(payload);
            }
            kind::GOAWAY => {
                number(payload)?;
                let code = number(payload.get(4..)?)?;
                self.why = "GOAWAY: ".to_string();
                push_error(&mut self.why, code);
                let words = &payload[8..];
                if !words.is_empty() {
                    self.why += ", ";
                    self.why += &String::from_utf8_lossy(words);
                }
                return Some(Event::Closing);
            }
            kind::WINDOW_UPDATE => {
                let more = i64::from(number(payload).filter(|&n| n > 0 && payload.len() == 4)?);
                let window = match (stream, self.waiting.front_mut()) {
                    (0, _) => &mut self.window,
                    (_, Some(front)) if front.stream == stream && front.sent.is_some() => &mut front.window,
                    // That of a request that has left does not matter any more.
                    _ => return self.has_begun(stream).then_some(Event::Nothing),
                };
                *window += more;
                if *window > WINDOW_MAX {
                    return None;
                }
                self.send_waiting(out);
            }
            // Priorities, and frames of a later version.
            _ => {}
        }
        Some(Event::Nothing)
    }

    fn settings(&mut self, payload: &[u8]) -> Option<()> {
        if !payload.len().is_multiple_of(6) {
            return None;
        }
        for entry in payload.chunks_exact(6) {
            let value = u32::from_be_bytes([entry[2], entry[3], entry[4], entry[5]]);
            match u16::from_be_bytes([entry[0], entry[1]]) {
                setting::HEADER_TABLE_SIZE => self.requests.table_size(value),
                setting::MAX_CONCURRENT_STREAMS => self.peer.streams = value as usize,
                setting::INITIAL_WINDOW_SIZE => {
                    let window = Some(i64::from(value)).filter(|&window| window <= WINDOW_MAX)?;
                    let change = window - self.peer.window;
                    self.peer.window = window;
                    if let Some(front) = self.waiting.front_mut() {
                        front.window += change;
                    }
                }
                setting::MAX_FRAME_SIZE => {
                    let frame = value as usize;
                    self.peer.frame = Some(frame).filter(|frame| (DEFAULT_FRAME..1 << 24).contains(frame))?;
                }
                _ => {}
            }
        }
        self.settled = true;
        Some(())
    }

    /// Keeps the request at the end of `out` until there is room for it.
    #[cold]
    fn put_off(&mut self, stream: u32, command: Command, out: &mut Vec<u8>, start: usize) {
        self.waiting.push_back(Waiting {
            stream,
            command,
            message: out[start + ROOM..].to_vec(),
            sent: None,
            window: 0,
        });
        out.truncate(start);
        self.send_waiting(out);
    }

    /// Appends what there is room for of the requests that wait.
    #[cold]
    fn send_waiting(&mut self, out: &mut Vec<u8>) {
        while let Some(front) = self.waiting.front_mut() {
            let mut sent = match front.sent {
                Some(sent) => sent,
                None if !self.settled || self.open >= self.peer.streams => return,
                None => {
                    let start = out.len();
                    push_frame(out, 0, 0, 0, 0);
                    self.requests.append(front.command, out);
                    let len = out.len() - start - FRAME_HEADER;
                    let header = frame_header(len, kind::HEADERS, flag::END_HEADERS, front.stream);
                    out[start..start + FRAME_HEADER].copy_from_slice(&header);
                    self.open += 1;
                    front.window = self.peer.window;
                    0
                }
            };
            loop {
                let rest = &front.message[sent..];
                let room = self.window.min(front.window).max(0) as usize;
                let len = rest.len().min(room).min(self.peer.frame);
                let end = len == rest.len();
                if len == 0 && !end {
                    front.sent = Some(sent);
                    return;
                }
                let flags = if end { flag::END_STREAM } else { 0 };
                push_frame(out, len, kind::DATA, flags, front.stream);
                out.extend_from_slice(&rest[..len]);
                sent += len;
                self.window -= len as i64;
                front.window -= len as i64;
                if end {
                    break;
                }
            }
            self.waiting.pop_front();
        }
    }
}

/// The payload of a frame without what was added to its length.
#[inline(always)]
fn without_padding(flags: u8, payload: &[u8]) -> Option<&[u8]> {
    if flags & flag::PADDED == 0 {
        return Some(payload);
    }
    let (&padding, rest) = payload.split_first()?;
    rest.get(..rest.len().checked_sub(usize::from(padding))?)
}

#[cfg(test)]
mod tests;
