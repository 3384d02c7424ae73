//! One connection: what it sent and was not yet understood, its replies in the order of its requests, and what waits to be
//! sent.

use crate::encoding::{Rope, touched_bytes};
use crate::gather::Gather;
use crate::interactive::OpenTxn;
use crate::model::Class;
use crate::protocol::{Decoder, Protocol};
use std::collections::VecDeque;

pub(crate) mod pieces;

use pieces::Pieces;

/// A reply that cannot leave yet, or has not come yet.
#[derive(Debug)]
pub(crate) struct Slot {
    /// When the request came, in the engine's nanoseconds.
    pub(crate) arrived_ns: u64,
    /// What the request costs of the link's credit in bytes; 0 when it did not leave this core.
    pub(crate) cost_bytes: u32,
    /// Where its latency counts.
    pub(crate) class: Class,
    /// Another core serves it.
    pub(crate) forwarded: bool,
    state: SlotState,
}

#[derive(Debug)]
enum SlotState {
    /// Another core is at it.
    Waiting,
    /// Its bytes lie in `held`.
    Held { start: usize, length: usize },
    /// Its bytes, with large values among them.
    Whole(Box<Rope>),
    /// Several cores are at it.
    Gathering(Box<Gather>),
}

/// Who is at the other end of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// A socket whose requests are decoded here.
    Client,
    /// A socket whose bytes a handler of the runtime reads and writes.
    Handled,
    /// A handler that makes calls. There is no socket.
    Caller,
    /// The core itself, which reads no answers. There is no socket.
    Core,
}

impl End {
    /// There is a socket.
    pub(crate) fn is_connection(self) -> bool {
        matches!(self, End::Client | End::Handled)
    }
}

/// Why a connection's requests are not begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Blocked {
    /// They are.
    No,
    /// All credit to this core is in use: it stands in that link's queue.
    Credit(u16),
    /// Its own limit, of requests in flight or bytes waiting, is reached.
    Own,
}

/// What a handler of the runtime is to be told of its session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notice {
    /// Nothing.
    Nothing,
    /// It is a new connection of this protocol: a handler is to begin.
    Opened(Protocol),
    /// What the handler waits for may have come.
    Progress,
}

/// A large value on its way in.
#[derive(Debug)]
pub(crate) struct Incoming {
    /// The request line that announced it.
    pub(crate) header: Vec<u8>,
    /// What came of it.
    pub(crate) value: Vec<u8>,
    /// How long it will be. Charged to the memory limit until the request is done.
    pub(crate) bytes: usize,
}

impl Incoming {
    /// How much has not come yet.
    #[inline]
    pub(crate) fn missing_bytes(&self) -> usize {
        self.bytes - self.value.len()
    }
}

/// One connection.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) protocol: Protocol,
    pub(crate) peer: String,
    pub(crate) decoder: Decoder,
    /// Received and not decoded: the start of a request, or requests that must wait.
    pub(crate) input: Vec<u8>,
    pub(crate) incoming: Option<Incoming>,
    /// A transaction that is built up command by command.
    pub(crate) open_txn: Option<Box<OpenTxn>>,
    /// Credit of links that the next request has already, while it waits for more.
    pub(crate) credits: Vec<(u16, u32)>,
    /// How many bytes of input are to be dropped unread.
    pub(crate) swallow: usize,
    /// How many replies that several cores give together are under way.
    gathering: u32,
    /// Bytes of what those have brought so far.
    pub(crate) gathered_bytes: usize,
    /// What is charged to the memory limit for it.
    pub(crate) charged: usize,
    pub(crate) end: End,
    /// The handler at the other end has something to do, and was not told.
    pub(crate) notice: Notice,
    /// That handler waits for room in the output.
    pub(crate) wants_room: bool,
    /// That handler has said all: the client is to be told when it is sent.
    pub(crate) shuts: bool,
    pub(crate) output: Output,
    replies: Replies,
    /// What it sent and is under way.
    pub(crate) pieces: Pieces,
    pub(crate) blocked: Blocked,
    /// The runtime was told not to read.
    pub(crate) paused: bool,
    /// The client sends no more.
    pub(crate) ended: bool,
    /// Nothing more is decoded; the connection closes when its replies are sent.
    pub(crate) closing: bool,
    /// The runtime was told to close it.
    pub(crate) close_told: bool,
    /// The connection broke: nothing can be sent any more.
    pub(crate) gone: bool,
    /// The socket is closed; the session stays until its replies have come from other cores.
    pub(crate) socket_closed: bool,
    /// It stands in the engine's list of sessions to look after.
    pub(crate) listed: bool,
    /// When what is being decoded arrived, in the engine's nanoseconds: while the session is blocked, the oldest of it.
    pub(crate) arrived_ns: u64,
    /// The output waits until the replies before this number have come.
    send_after: Option<u32>,
    pub(crate) last_received_ms: u64,
    /// When the output last got shorter, or became non-empty.
    pub(crate) last_sent_ms: u64,
}

impl Session {
    pub(crate) fn new(protocol: Protocol, peer: String, now_ms: u64) -> Self {
        Self {
            protocol,
            peer,
            decoder: Decoder::new(protocol),
            input: vec![],
            incoming: None,
            open_txn: None,
            credits: vec![],
            swallow: 0,
            gathering: 0,
            gathered_bytes: 0,
            charged: 0,
            end: End::Client,
            notice: Notice::Nothing,
            wants_room: false,
            shuts: false,
            output: Output::default(),
            replies: Replies::default(),
            pieces: Pieces::default(),
            blocked: Blocked::No,
            paused: false,
            ended: false,
            closing: false,
            close_told: false,
            gone: false,
            socket_closed: false,
            listed: false,
            arrived_ns: 0,
            send_after: None,
            last_received_ms: now_ms,
            last_sent_ms: now_ms,
        }
    }

    /// A large value has come whole, and its request waits to be executed.
    #[inline]
    pub(crate) fn has_collected(&self) -> bool {
        self.incoming
            .as_ref()
            .is_some_and(|incoming| incoming.missing_bytes() == 0)
    }

    /// The same as [`Session::buffer_bytes`], nearly, when it does not wait for much.
    #[inline]
    pub(crate) fn front_bytes(&self) -> usize {
        let output = &self.output;
        SESSION_BYTES + self.input.capacity() + output.filling.flat.capacity() + output.sending.flat.capacity()
    }

    /// Replies that are missing, or stand behind a missing one, may take much memory.
    #[inline]
    pub(crate) fn waits_for_much(&self) -> bool {
        self.in_flight() > MANY_REPLIES || self.is_gathering()
    }

    /// Bytes of memory that it takes: its buffers, and itself. Not what is charged by itself (an announced
    /// value, an open transaction), nor large values that the store has, too.
    pub(crate) fn buffer_bytes(&self) -> usize {
        let Replies {
            slots,
            held,
            whole_bytes,
            ..
        } = &self.replies;
        SESSION_BYTES
            + touched_bytes(&self.input)
            + self.output.filling.touched_bytes()
            + self.output.sending.touched_bytes()
            + slots.capacity() * size_of::<Slot>()
            + held.touched_bytes()
            + whole_bytes
            + self.gathered_bytes
            + self.pieces.heap_bytes()
    }

    /// Has the handler told that what it waits for may have come.
    pub(crate) fn tell(&mut self) {
        if self.notice == Notice::Nothing && self.end == End::Handled {
            self.notice = Notice::Progress;
        }
    }

    /// When its client last did something that counts: one that a handler serves may just listen.
    pub(crate) fn last_active_ms(&self) -> u64 {
        match self.end {
            End::Handled => self.last_received_ms.max(self.last_sent_ms),
            _ => self.last_received_ms,
        }
    }

    /// A call is answered, completely.
    pub(crate) fn is_answered(&self) -> bool {
        self.in_flight() == 0 && self.incoming.is_none() && !self.output.filling.is_empty()
    }

    /// How many replies are missing or stand behind a missing one.
    #[inline]
    pub(crate) fn in_flight(&self) -> usize {
        self.replies.slots.len()
    }

    /// The number of the oldest reply that has not left.
    #[inline]
    pub(crate) fn first_reply(&self) -> u32 {
        self.replies.first
    }

    /// The number that the next reply to wait will have.
    #[inline]
    pub(crate) fn next_reply(&self) -> u32 {
        self.replies.first.wrapping_add(self.replies.slots.len() as u32)
    }

    /// Bytes of replies that the client has not taken.
    pub(crate) fn output_bytes(&self) -> usize {
        self.output.len() + self.replies.held.flat.len()
    }

    /// Whether what was answered should be sent now. While replies of other cores are under way it waits for those that were
    /// when it was first asked, so that a pipeline leaves in one piece; later requests do not make it wait longer.
    pub(crate) fn sends_now(&mut self) -> bool {
        if self.output.is_empty() {
            return false;
        }
        let replies = &self.replies;
        if replies.slots.is_empty() || self.output.len() >= OUTPUT_BYTES_WORTH_SENDING {
            self.send_after = None;
            return true;
        }
        let next = self.next_reply();
        let waits_for = *self.send_after.get_or_insert(next);
        let arrived = replies.first.wrapping_sub(waits_for) as i32 >= 0;
        if arrived {
            self.send_after = None;
        }
        arrived
    }

    /// Where the next reply is to be written when it is known now. `None`: replies before it are missing, so it must wait
    /// for them through [`Session::hold`].
    #[inline]
    pub(crate) fn direct(&mut self) -> Option<&mut Rope> {
        self.replies.slots.is_empty().then_some(&mut self.output.filling)
    }

    /// Keeps a reply that is known now until those before it have come. `write` writes it.
    pub(crate) fn hold(&mut self, class: Class, write: impl FnOnce(&mut Rope)) {
        let state = self.replies.keep(write);
        self.replies.slots.push_back(Slot {
            arrived_ns: self.arrived_ns,
            cost_bytes: 0,
            class,
            forwarded: false,
            state,
        });
    }

    /// Makes room for the reply of another core; its number is to be given to [`Session::fill`].
    #[inline]
    pub(crate) fn expect_reply(&mut self, class: Class, cost_bytes: u32) -> u32 {
        self.push_slot(class, cost_bytes, cost_bytes > 0, SlotState::Waiting)
    }

    /// Makes room for a reply that several cores give together.
    pub(crate) fn expect_gathered(&mut self, class: Class, forwarded: bool, gather: Gather) -> u32 {
        self.gathering += 1;
        self.push_slot(class, 0, forwarded, SlotState::Gathering(Box::new(gather)))
    }

    /// A reply that several cores give together is under way: nothing behind it is begun.
    pub(crate) fn is_gathering(&self) -> bool {
        self.gathering > 0
    }

    fn push_slot(&mut self, class: Class, cost_bytes: u32, forwarded: bool, state: SlotState) -> u32 {
        let number = self.next_reply();
        self.replies.slots.push_back(Slot {
            arrived_ns: self.arrived_ns,
            cost_bytes,
            class,
            forwarded,
            state,
        });
        number
    }

    /// Fills the slot `number` with a record of `source`: `flat_len` bytes at `start`, with `splices` large values. Replies
    /// that can leave now go to the output; `left` sees each of them.
    #[inline]
    pub(crate) fn fill(
        &mut self,
        number: u32,
        source: &mut Rope,
        start: usize,
        flat_len: usize,
        splices: usize,
        left: impl FnMut(&Slot),
    ) {
        let index = number.wrapping_sub(self.replies.first) as usize;
        if index == 0 {
            // The usual case: the oldest one. No detour.
            self.output.filling.append_from(source, start, flat_len, splices);
            self.replies.slots[0].state = SlotState::Held { start: 0, length: 0 };
            self.drain(left);
            return;
        }
        let state = self
            .replies
            .keep(|out| out.append_from(source, start, flat_len, splices));
        self.replies.slots[index].state = state;
    }

    /// The gathering at slot `number`; or, of a slot that one core fills, what it costs of its link's credit.
    #[inline]
    pub(crate) fn gather(&mut self, number: u32) -> Result<&mut Gather, u32> {
        let index = number.wrapping_sub(self.replies.first) as usize;
        let slot = &mut self.replies.slots[index];
        match &mut slot.state {
            SlotState::Gathering(gather) => Ok(gather),
            _ => Err(slot.cost_bytes),
        }
    }

    /// Takes what was gathered at slot `number`: the reply is to follow.
    pub(crate) fn take_gathered(&mut self, number: u32) -> Option<Gather> {
        let index = number.wrapping_sub(self.replies.first) as usize;
        let state = &mut self.replies.slots[index].state;
        match std::mem::replace(state, SlotState::Waiting) {
            SlotState::Gathering(gather) => {
                self.gathering -= 1;
                // Nothing else is gathered meanwhile.
                self.gathered_bytes = 0;
                Some(*gather)
            }
            other => {
                *state = other;
                None
            }
        }
    }

    /// Fills the slot of what was gathered.
    pub(crate) fn fill_gathered(&mut self, number: u32, reply: Rope, left: impl FnMut(&Slot)) {
        let index = number.wrapping_sub(self.replies.first) as usize;
        self.replies.whole_bytes += reply.touched_bytes();
        self.replies.slots[index].state = SlotState::Whole(Box::new(reply));
        self.drain(left);
    }

    fn drain(&mut self, mut left: impl FnMut(&Slot)) {
        let replies = &mut self.replies;
        while let Some(slot) = replies.slots.front_mut() {
            match &mut slot.state {
                SlotState::Waiting | SlotState::Gathering(_) => break,
                SlotState::Held { start, length } => {
                    self.output.filling.push(&replies.held.flat[*start..*start + *length]);
                    replies.held_used -= *length;
                }
                SlotState::Whole(rope) => {
                    replies.whole_bytes -= rope.touched_bytes();
                    self.output.filling.append(rope);
                }
            }
            left(slot);
            replies.slots.pop_front();
            replies.first = replies.first.wrapping_add(1);
        }
        if replies.held_used == 0 {
            // An idle connection keeps little.
            replies.held.clear(HELD_BYTES_SLACK);
            if replies.slots.is_empty() && replies.slots.capacity() > SLOTS_KEPT_MAX {
                replies.slots = VecDeque::new();
            }
        }
    }
}

/// Replies in the order of their requests.
#[derive(Debug, Default)]
struct Replies {
    slots: VecDeque<Slot>,
    /// The number of the first slot.
    first: u32,
    /// Bytes of replies that wait behind missing ones; those with large values are elsewhere.
    held: Rope,
    /// How many bytes of `held` a slot still refers to.
    held_used: usize,
    /// Bytes of memory that those elsewhere take.
    whole_bytes: usize,
}

/// Fewer replies than this are not much, be they as large as those that are copied may be.
const MANY_REPLIES: usize = 16;

/// What a session takes beside its buffers: itself, the address of its client, and its places in tables.
const SESSION_BYTES: usize = size_of::<Session>() + 512;

/// From here on a send costs less than waiting for more.
const OUTPUT_BYTES_WORTH_SENDING: usize = 16 * 1024;

/// `held` is compacted when it is longer than this and mostly unused.
const HELD_BYTES_SLACK: usize = 64 * 1024;
/// Room for this many replies is kept when none is missing.
const SLOTS_KEPT_MAX: usize = 64;

impl Replies {
    /// Writes a reply aside.
    fn keep(&mut self, write: impl FnOnce(&mut Rope)) -> SlotState {
        if self.held.flat.len() > HELD_BYTES_SLACK.max(2 * self.held_used) {
            self.compact();
        }
        let start = self.held.flat.len();
        write(&mut self.held);
        let length = self.held.flat.len() - start;
        if self.held.splices.is_empty() {
            self.held_used += length;
            // An empty reply refers to no place: the bytes before it may be gone before it leaves.
            let start = if length == 0 { 0 } else { start };
            return SlotState::Held { start, length };
        }
        // Large values among it: the reply becomes a rope of its own.
        let mut whole = Box::<Rope>::default();
        let splices = self.held.splices.len();
        whole.append_from(&mut self.held, start, length, splices);
        self.held.flat.truncate(start);
        self.whole_bytes += whole.touched_bytes();
        SlotState::Whole(whole)
    }

    #[cold]
    fn compact(&mut self) {
        let mut compacted = Vec::with_capacity(self.held_used);
        for slot in &mut self.slots {
            if let SlotState::Held { start, length } = &mut slot.state {
                let moved = compacted.len();
                compacted.extend_from_slice(&self.held.flat[*start..*start + *length]);
                *start = moved;
            }
        }
        self.held.flat = compacted;
    }
}

/// Bytes on their way to the client: one rope being filled, one being sent.
#[derive(Debug, Default)]
pub(crate) struct Output {
    pub(crate) filling: Rope,
    sending: Rope,
    /// How much of `sending` has been sent: flat bytes, whole splices, and bytes of the splice after those.
    sent_flat: usize,
    sent_splices: usize,
    sent_of_splice: usize,
    unsent: usize,
    /// Bytes that were ever sent.
    taken: u64,
}

impl Output {
    /// Bytes that are not sent.
    #[inline]
    pub(crate) fn len(&self) -> usize {
        self.filling.len() + self.unsent
    }

    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        self.unsent == 0 && self.filling.is_empty()
    }

    /// Bytes that were ever sent.
    #[inline]
    pub(crate) fn taken(&self) -> u64 {
        self.taken
    }

    /// What that will be when all is.
    #[inline]
    pub(crate) fn end(&self) -> u64 {
        self.taken + self.len() as u64
    }

    /// Makes what was filled the next to be sent, when nothing is being sent. The bytes keep their addresses until
    /// [`Output::sent`] has counted all of them.
    #[inline]
    pub(crate) fn start_sending(&mut self) {
        if self.unsent == 0 {
            std::mem::swap(&mut self.filling, &mut self.sending);
            self.unsent = self.sending.len();
        }
    }

    /// What is still to be sent of it, in order.
    pub(crate) fn unsent(&self) -> impl Iterator<Item = &[u8]> {
        let flat = &self.sending.flat;
        let mut at = self.sent_flat;
        let mut skip = self.sent_of_splice;
        let splices = self.sending.splices.iter().skip(self.sent_splices);
        let pieces = splices.flat_map(move |splice| {
            let before = &flat[at..splice.at];
            let value = &splice.bytes[skip..];
            (at, skip) = (splice.at, 0);
            [before, value]
        });
        let tail = match self.sending.splices.back() {
            Some(last) => &flat[last.at.max(self.sent_flat)..],
            None => &flat[self.sent_flat..],
        };
        pieces.chain(std::iter::once(tail)).filter(|piece| !piece.is_empty())
    }

    /// Takes what nobody sends: a handler reads it.
    pub(crate) fn take_filling(&mut self) -> Rope {
        self.taken += self.filling.len() as u64;
        std::mem::take(&mut self.filling)
    }

    /// Counts bytes as sent. When all are, returns the buffer for reuse.
    #[inline]
    pub(crate) fn sent(&mut self, mut bytes: usize) -> Option<Vec<u8>> {
        self.unsent -= bytes;
        self.taken += bytes as u64;
        if self.unsent > 0 {
            while bytes > 0 {
                let (until, splice) = match self.sending.splices.get(self.sent_splices) {
                    Some(splice) => (splice.at, splice.bytes.len()),
                    None => (self.sending.flat.len(), 0),
                };
                let flat = bytes.min(until - self.sent_flat);
                self.sent_flat += flat;
                bytes -= flat;
                let of_splice = bytes.min(splice - self.sent_of_splice);
                self.sent_of_splice += of_splice;
                bytes -= of_splice;
                if splice > 0 && self.sent_of_splice == splice {
                    self.sent_splices += 1;
                    self.sent_of_splice = 0;
                }
            }
            return None;
        }
        (self.sent_flat, self.sent_splices, self.sent_of_splice) = (0, 0, 0);
        self.sending.clear(usize::MAX);
        Some(std::mem::take(&mut self.sending.flat))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;

    /// However a socket takes the bytes, what it is offered next is exactly what it has not taken.
    #[test]
    fn short_sends_lose_nothing() {
        for step in [1, 2, 3, 7, 100] {
            let mut output = Output::default();
            output.filling.push(b"one ");
            output.filling.splice(Bytes::from_static(b"LARGE"));
            output.filling.splice(Bytes::from_static(b"TWICE"));
            output.filling.push(b" two");
            let whole = output.filling.to_vec();
            output.start_sending();
            output.filling.push(b"later");
            let mut taken = vec![];
            loop {
                let offered: Vec<u8> = output.unsent().flatten().copied().collect();
                assert_eq!(offered, whole[taken.len()..]);
                let count = step.min(offered.len());
                taken.extend_from_slice(&offered[..count]);
                if output.sent(count).is_some() {
                    break;
                }
            }
            assert_eq!(taken, whole);
            assert_eq!(output.len(), 5);
        }
    }

    /// Replies that come in any order leave in the order of their requests, also while the space aside is compacted.
    #[test]
    fn replies_leave_in_request_order() {
        let mut session = Session::new(Protocol::Text, String::new(), 0);
        let mut expected = vec![];
        let mut numbers = vec![];
        let mut sent = vec![];
        for round in 0..200u32 {
            let body = vec![b'a' + (round % 26) as u8; 1000];
            expected.extend_from_slice(&body);
            if round % 3 == 0 {
                match session.direct() {
                    Some(out) => out.push(&body),
                    None => session.hold(Class::Get, |out| out.push(&body)),
                }
            } else {
                numbers.push((session.expect_reply(Class::Get, 0), body));
            }
            if round % 2 == 1 && numbers.len() > 3 {
                // The newest first, so that nothing can leave; large values among them.
                let (number, body) = numbers.pop().unwrap();
                let mut source = Rope::default();
                source.push(&body[..500]);
                if round % 4 == 1 {
                    source.splice(Bytes::copy_from_slice(&body[500..]));
                } else {
                    source.push(&body[500..]);
                }
                let (flat, splices) = (source.flat.len(), source.splices.len());
                session.fill(number, &mut source, 0, flat, splices, |_| {});
            }
        }
        for (number, body) in numbers {
            let mut source = Rope::default();
            source.push(&body);
            session.fill(number, &mut source, 0, body.len(), 0, |_| {});
        }
        assert_eq!(session.in_flight(), 0);
        session.output.start_sending();
        session.output.unsent().for_each(|piece| sent.extend_from_slice(piece));
        assert_eq!(sent, expected);
    }
}
