//! The link to one other core: what goes there, what it costs, and who waits because too much is there already.
//!
//! Two flat formats travel over it, both without gaps and both inside one process only:
//!
//! ```text
//! request   0 length u32   4 session u32   8 number u32   12 hash u64   20 shard u16   22 protocol u8   23 kind u8
//!          24 shape code u32   28 shape text length u16   30 unused u16   32 shape text, then the command, the broadcast,
//!          or how far a log is:  0 epoch u64   8 safe epoch u64   16 asked u64   24 failed u8
//!          or what concerns a transaction:  0 clock u64   8 coordinator u16   and then what is decided u8, in which epoch u64, and
//!          the cores that write u16 each, or the attempt u32 that is in the way, or a part:  10 scope u8, and then its members, each:  0 length of the rest u32   4 role u8   5 hash u64   13 shard u16
//!                                       15 what is checked, or the command
//! reply     0 session u32   4 number u32   8 length u32   12 large values u16   14 unused u16   16 what to send
//! ```

use crate::encoding::{
    Reader, Rope, only_reads, push_broadcast, push_check, push_command, read_check, read_command, reads_large,
};
use crate::locks::TxnId;
use crate::model::{Broadcast, Check, Command, Op, Value};
use crate::partition::Place;
use crate::protocol::{Protocol, Shape};
use crate::txn::{Decision, Role, Scope};
use bytes::Bytes;
use std::collections::VecDeque;

/// What travels between two cores in one turn: records without a gap, and the large values they refer to.
#[derive(Debug, Default)]
pub struct Batch {
    /// The records.
    pub rope: Rope,
    /// What is charged to the memory limit for it, by the core that has it.
    pub(crate) charged_bytes: usize,
}

impl Batch {
    /// Bytes of memory that it takes, and will take: replies are there twice, before they are only with the connections. Large
    /// values in requests are nobody else's; those in replies the store charges.
    #[inline]
    pub(crate) fn weight(&self, direction: Direction) -> usize {
        match direction {
            Direction::Requests => self.rope.flat.capacity() + self.rope.spliced_bytes(),
            Direction::Replies => 2 * self.rope.flat.len(),
        }
    }
}

/// The kinds of batches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Requests to the owner of a key.
    Requests,
    /// Replies to the core that has the connection.
    Replies,
}

/// How much of a link one core may use at a time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CreditLimits {
    /// Requests that are not answered.
    pub(crate) requests_max: u32,
    /// What they cost, in bytes. One request is let through whatever it costs.
    pub(crate) bytes_max: u64,
}

/// Traffic with one other core, as far as this core sends it.
#[derive(Debug)]
pub(crate) struct Link {
    limits: CreditLimits,
    requests: Box<Batch>,
    replies: Box<Batch>,
    /// Requests sent, or about to be, and not answered; and what they cost in bytes.
    used_requests: u32,
    used_bytes: u64,
    /// Sessions that wait for credit, the longest waiting first.
    waiters: VecDeque<u32>,
}

impl Link {
    pub(crate) fn new(limits: CreditLimits) -> Self {
        Self {
            limits,
            requests: Box::default(),
            replies: Box::default(),
            used_requests: 0,
            used_bytes: 0,
            waiters: VecDeque::new(),
        }
    }

    /// What is to be sent, as far as it is there.
    #[inline]
    pub(crate) fn batch(&mut self, direction: Direction) -> &mut Box<Batch> {
        match direction {
            Direction::Requests => &mut self.requests,
            Direction::Replies => &mut self.replies,
        }
    }

    /// There is something to send.
    #[inline]
    pub(crate) fn has_outgoing(&self, direction: Direction) -> bool {
        match direction {
            Direction::Requests => !self.requests.rope.is_empty(),
            Direction::Replies => !self.replies.rope.is_empty(),
        }
    }

    /// What is to be sent, with `empty` in its place.
    #[inline]
    pub(crate) fn take_outgoing(&mut self, direction: Direction, empty: Box<Batch>) -> Box<Batch> {
        std::mem::replace(self.batch(direction), empty)
    }

    /// Takes credit for one request; false when all is in use, or others wait for it and `first` does not say that the
    /// asker is the one whose turn it is.
    #[inline]
    pub(crate) fn take_credit(&mut self, cost_bytes: u32, first: bool) -> bool {
        let free = self.used_requests < self.limits.requests_max
            && (self.used_requests == 0 || self.used_bytes + u64::from(cost_bytes) <= self.limits.bytes_max)
            && (first || self.waiters.is_empty());
        if free {
            self.used_requests += 1;
            self.used_bytes += u64::from(cost_bytes);
        }
        free
    }

    /// Gives the credit of one request back.
    #[inline]
    pub(crate) fn release_credit(&mut self, cost_bytes: u32) {
        self.used_requests -= 1;
        self.used_bytes -= u64::from(cost_bytes);
    }

    /// Credit in use, in requests and in bytes.
    pub(crate) fn used_credit(&self) -> (u32, u64) {
        (self.used_requests, self.used_bytes)
    }

    /// A session waits for credit from now on, before all others if it is `first`.
    pub(crate) fn wait(&mut self, session: u32, first: bool) {
        if first {
            self.waiters.push_front(session);
        } else {
            self.waiters.push_back(session);
        }
    }

    /// A session does not wait any more.
    pub(crate) fn stop_waiting(&mut self, session: u32) {
        self.waiters.retain(|waiter| *waiter != session);
    }

    /// How many wait.
    pub(crate) fn waiting(&self) -> usize {
        self.waiters.len()
    }

    /// The session whose turn it is, when there may be credit for it.
    pub(crate) fn next_waiter(&mut self) -> Option<u32> {
        let exhausted = self.used_requests >= self.limits.requests_max
            || (self.used_requests > 0 && self.used_bytes >= self.limits.bytes_max);
        if exhausted { None } else { self.waiters.pop_front() }
    }

    /// No request is under way and no reply is owed.
    pub(crate) fn is_quiet(&self) -> bool {
        self.used_requests == 0 && self.replies.rope.is_empty()
    }

    /// Adds a command for one of the other core's shards.
    #[inline]
    pub(crate) fn push_command(
        &mut self,
        to: Return,
        place: Place,
        shard: u16,
        shape: &Shape<'_>,
        command: &Command<'_>,
    ) {
        let rope = &mut self.requests.rope;
        let start = push_header(rope, to, COMMAND, place.hash, shard, shape);
        push_command(rope, command);
        finish(rope, start);
    }

    /// Adds a request for all of the other core's shards.
    pub(crate) fn push_broadcast(&mut self, to: Return, broadcast: Broadcast) {
        let rope = &mut self.requests.rope;
        let start = push_header(rope, to, BROADCAST, 0, 0, &Shape::code(0));
        push_broadcast(&mut rope.flat, broadcast);
        finish(rope, start);
    }

    /// Begins this core's part of a transaction; with `prepare` there are other parts, and a decision follows. Members
    /// follow, then [`Link::finish_part`].
    pub(crate) fn begin_part(&mut self, to: Return, shape_code: u32, prepare: bool, id: TxnId, scope: Scope) -> usize {
        let kind = if prepare { PREPARE } else { WHOLE };
        let rope = &mut self.requests.rope;
        let start = push_header(rope, to, kind, 0, 0, &Shape::code(shape_code));
        push_id(rope, id);
        rope.push(&[scope as u8]);
        start
    }

    /// Adds what one key is asked for to the part that was begun last.
    #[inline]
    pub(crate) fn push_member(&mut self, hash: u64, shard: u16, wish: &Wish<'_>) {
        let rope = &mut self.requests.rope;
        let start = rope.flat.len();
        let mut header = [0; MEMBER_HEADER_BYTES];
        header[4] = wish.role() as u8;
        header[5..13].copy_from_slice(&hash.to_le_bytes());
        header[13..].copy_from_slice(&shard.to_le_bytes());
        rope.push(&header);
        match wish {
            Wish::Check(check) => push_check(&mut rope.flat, check),
            Wish::Execute(_, command) => push_command(rope, command),
        }
        let length = (rope.flat.len() - start - 4) as u32;
        rope.flat[start..start + 4].copy_from_slice(&length.to_le_bytes());
    }

    /// Ends the part that began at `start`.
    pub(crate) fn finish_part(&mut self, start: usize) {
        finish(&mut self.requests.rope, start);
    }

    /// Adds what was decided of a transaction, in this epoch, and which cores it has write. It needs no credit: its preparation
    /// holds it still, or, where it is settled, it is one record more for a transaction that has ended.
    pub(crate) fn push_decision(&mut self, to: Return, shape_code: u32, id: TxnId, decided: &Decided<'_>) {
        let rope = &mut self.requests.rope;
        let start = push_header(rope, to, DECIDE, 0, 0, &Shape::code(shape_code));
        push_id(rope, id);
        rope.push(&[decided.decision as u8]);
        rope.push(&decided.epoch.to_le_bytes());
        for core in decided.writers {
            rope.push(&core.to_le_bytes());
        }
        finish(rope, start);
    }

    /// Adds how far this core's log is. It needs no credit: there is one for each epoch, and one when that is safe.
    pub(crate) fn push_progress(&mut self, progress: Progress) {
        let rope = &mut self.requests.rope;
        let start = push_header(rope, Return::NOBODY, PROGRESS, 0, 0, &Shape::code(0));
        rope.push(&progress.epoch.to_le_bytes());
        rope.push(&progress.safe.to_le_bytes());
        rope.push(&progress.asked.to_le_bytes());
        rope.push(&[u8::from(progress.failed)]);
        finish(rope, start);
    }

    /// Adds that a transaction is in the way of an older request, since it was told to prepare for the `attempt`th time. It
    /// needs no credit: there is at most one for each time it prepares.
    pub(crate) fn push_wound(&mut self, id: TxnId, attempt: u32) {
        let rope = &mut self.requests.rope;
        let start = push_header(rope, Return::NOBODY, WOUND, 0, 0, &Shape::code(0));
        push_id(rope, id);
        rope.push(&attempt.to_le_bytes());
        finish(rope, start);
    }

    /// Begins a reply: what follows it in the rope is its content, until [`Link::finish_reply`].
    #[inline]
    pub(crate) fn begin_reply(&mut self, to: ReturnBytes<'_>) -> ReplyStart {
        let rope = &mut self.replies.rope;
        let start = ReplyStart {
            flat: rope.flat.len(),
            splices: rope.splices.len(),
        };
        rope.flat.extend_from_slice(to.0);
        rope.flat.extend_from_slice(&[0; REPLY_HEADER_BYTES - RETURN_BYTES]);
        start
    }

    /// Where replies are written.
    #[inline]
    pub(crate) fn replies(&mut self) -> &mut Rope {
        &mut self.replies.rope
    }

    /// Moves the reply that began at `start` and was finished elsewhere, to wait there. Returns how much that was: flat bytes, and
    /// large values.
    pub(crate) fn hold_reply(&mut self, start: ReplyStart, to: &mut Rope) -> (usize, usize) {
        self.replies.rope.move_tail(start.flat, start.splices, to)
    }

    /// Ends the reply that began at `start`.
    #[inline]
    pub(crate) fn finish_reply(&mut self, start: ReplyStart) {
        let rope = &mut self.replies.rope;
        let length = (rope.flat.len() - start.flat - REPLY_HEADER_BYTES) as u32;
        let splices = (rope.splices.len() - start.splices) as u16;
        let header = &mut rope.flat[start.flat..start.flat + REPLY_HEADER_BYTES];
        header[8..12].copy_from_slice(&length.to_le_bytes());
        header[12..14].copy_from_slice(&splices.to_le_bytes());
    }
}

/// Whom a reply goes back to: a slot of a session.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Return {
    pub(crate) session: u32,
    pub(crate) number: u32,
    pub(crate) protocol: Protocol,
}

impl Return {
    /// Nothing is answered.
    const NOBODY: Self = Self {
        session: 0,
        number: 0,
        protocol: Protocol::Text,
    };

    /// As [`ReturnBytes`] has it.
    pub(crate) fn to_bytes(self) -> [u8; RETURN_BYTES] {
        let mut bytes = [0; RETURN_BYTES];
        bytes[..4].copy_from_slice(&self.session.to_le_bytes());
        bytes[4..].copy_from_slice(&self.number.to_le_bytes());
        bytes
    }
}

/// What was decided of a transaction.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Decided<'a> {
    pub(crate) decision: Decision,
    /// The coordinator's epoch.
    pub(crate) epoch: u64,
    /// The cores that it has write.
    pub(crate) writers: &'a [u16],
}

/// How far a core's log is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Progress {
    /// It is in this epoch: it decides nothing any more in an earlier one.
    pub(crate) epoch: u64,
    /// What belongs to this epoch, and to earlier ones, is as safe as it is to be.
    pub(crate) safe: u64,
    /// Somebody waits for this epoch to be safe on all cores.
    pub(crate) asked: u64,
    /// The log cannot be written any more.
    pub(crate) failed: bool,
}

/// The same as the core that replies sees it: bytes to give back.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ReturnBytes<'a>(pub(crate) &'a [u8]);

impl<'a> ReturnBytes<'a> {
    /// Those of a reply.
    pub(crate) fn of(reply: &'a [u8]) -> Self {
        Self(&reply[..RETURN_BYTES])
    }
}

/// Where a reply began.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ReplyStart {
    flat: usize,
    splices: usize,
}

const REQUEST_HEADER_BYTES: usize = 32;
const MEMBER_HEADER_BYTES: usize = 15;
const REPLY_HEADER_BYTES: usize = 16;
const RETURN_BYTES: usize = 8;
const COMMAND: u8 = 0;
const BROADCAST: u8 = 1;
const WHOLE: u8 = 2;
const PREPARE: u8 = 3;
const DECIDE: u8 = 4;
const WOUND: u8 = 5;
const PROGRESS: u8 = 6;

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// One command.
    Command,
    /// Something of all shards.
    Broadcast,
    /// A transaction that needs no other core.
    Whole,
    /// A part of a transaction: a [`Decision`] follows.
    Prepare,
    /// A [`Decision`].
    Decide,
    /// To the coordinator: the transaction is in the way of an older request.
    Wound,
    /// How far a core's log is.
    Progress,
}

fn push_id(rope: &mut Rope, id: TxnId) {
    rope.push(&id.clock.to_le_bytes());
    rope.push(&id.core.to_le_bytes());
}

/// A transaction's part, or all of it, as the core reads it that takes part.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PartRecord<'a> {
    pub(crate) id: TxnId,
    pub(crate) scope: Scope,
    /// The [`Member`]s.
    pub(crate) members: Reader<'a>,
}

impl<'a> PartRecord<'a> {
    /// What a [`Kind::Whole`] or [`Kind::Prepare`] says.
    pub(crate) fn read(request: &Request<'a>) -> Self {
        let mut body = request.body;
        Self {
            id: read_id(&mut body),
            scope: Scope::from_number(body.u8()),
            members: body,
        }
    }
}

/// What a [`Kind::Decide`] says: of which transaction, what, in which epoch; then the writing cores follow, two bytes each.
pub(crate) fn read_decision<'a>(request: &Request<'a>) -> (TxnId, Decision, u64, Reader<'a>) {
    let mut body = request.body;
    let (id, decision) = (read_id(&mut body), Decision::from_number(body.u8()));
    (id, decision, body.u64(), body)
}

/// What a [`Kind::Progress`] says.
pub(crate) fn read_progress(request: &Request<'_>) -> Progress {
    let mut body = request.body;
    Progress {
        epoch: body.u64(),
        safe: body.u64(),
        asked: body.u64(),
        failed: body.u8() == 1,
    }
}

/// What a [`Kind::Wound`] says: the transaction, and the attempt.
pub(crate) fn read_wound(request: &Request<'_>) -> (TxnId, u32) {
    let mut body = request.body;
    (read_id(&mut body), body.u32())
}

fn read_id(body: &mut Reader<'_>) -> TxnId {
    TxnId {
        clock: body.u64(),
        core: body.u16(),
    }
}

/// What a command takes of a link's credit: its record, nearly, and its value.
#[inline]
pub(crate) fn cost_bytes(command: &Command<'_>, shape: &Shape<'_>) -> u32 {
    let value = match &command.op {
        Op::Put(put) => put.value.bytes().len(),
        _ => 0,
    };
    (2 * REQUEST_HEADER_BYTES + command.key.len() + shape.text.len() + value) as u32
}

/// What a broadcast takes of each link's credit.
pub(crate) const BROADCAST_COST_BYTES: u32 = 2 * REQUEST_HEADER_BYTES as u32;

#[inline]
fn push_header(rope: &mut Rope, to: Return, kind: u8, hash: u64, shard: u16, shape: &Shape<'_>) -> usize {
    let start = rope.flat.len();
    let mut header = [0; REQUEST_HEADER_BYTES];
    header[4..8].copy_from_slice(&to.session.to_le_bytes());
    header[8..12].copy_from_slice(&to.number.to_le_bytes());
    header[12..20].copy_from_slice(&hash.to_le_bytes());
    header[20..22].copy_from_slice(&shard.to_le_bytes());
    header[22] = to.protocol as u8;
    header[23] = kind;
    header[24..28].copy_from_slice(&shape.code.to_le_bytes());
    header[28..30].copy_from_slice(&(shape.text.len() as u16).to_le_bytes());
    rope.push(&header);
    rope.push(shape.text);
    start
}

#[inline]
fn finish(rope: &mut Rope, start: usize) {
    let length = (rope.flat.len() - start) as u32;
    rope.flat[start..start + 4].copy_from_slice(&length.to_le_bytes());
}

/// One request as the other core reads it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Request<'a> {
    pub(crate) to: ReturnBytes<'a>,
    pub(crate) protocol: Protocol,
    pub(crate) hash: u64,
    pub(crate) shard: u16,
    pub(crate) shape: Shape<'a>,
    pub(crate) kind: Kind,
    /// The whole record.
    pub(crate) record: &'a [u8],
    /// What follows the header.
    pub(crate) body: Reader<'a>,
}

impl<'a> Request<'a> {
    /// The next request.
    #[inline]
    pub(crate) fn read(records: &mut Reader<'a>) -> Self {
        let length = { *records }.u32() as usize;
        let record = records.bytes(length);
        let (header, rest) = record.split_at(REQUEST_HEADER_BYTES);
        let to = ReturnBytes(&header[4..4 + RETURN_BYTES]);
        let mut reader = Reader(&header[4 + RETURN_BYTES..]);
        let (hash, shard) = (reader.u64(), reader.u16());
        let protocol = Protocol::ALL[usize::from(reader.u8())];
        let kind = match reader.u8() {
            COMMAND => Kind::Command,
            BROADCAST => Kind::Broadcast,
            WHOLE => Kind::Whole,
            PREPARE => Kind::Prepare,
            DECIDE => Kind::Decide,
            WOUND => Kind::Wound,
            _ => Kind::Progress,
        };
        let (code, text_len) = (reader.u32(), usize::from(reader.u16()));
        let (text, body) = rest.split_at(text_len);
        Self {
            to,
            protocol,
            hash,
            shard,
            shape: Shape { code, text },
            kind,
            record,
            body: Reader(body),
        }
    }
}

/// What a transaction asks of one key.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Wish<'a> {
    Check(&'a Check<'a>),
    /// With its role, which is not [`Role::Check`].
    Execute(Role, &'a Command<'a>),
}

impl Wish<'_> {
    pub(crate) fn role(&self) -> Role {
        match self {
            Wish::Check(_) => Role::Check,
            Wish::Execute(role, _) => *role,
        }
    }

    /// It may change something.
    pub(crate) fn writes(&self) -> bool {
        matches!(self, Wish::Execute(_, command) if !command.only_reads())
    }

    /// What it takes of a link's credit: its record, nearly, and its value.
    pub(crate) fn cost_bytes(&self) -> u32 {
        match self {
            Wish::Check(check) => (2 * REQUEST_HEADER_BYTES + check.key.len()) as u32,
            Wish::Execute(_, command) => cost_bytes(command, &Shape::code(0)),
        }
    }

    /// Bytes of it that are copied on its way.
    pub(crate) fn copied_bytes(&self) -> usize {
        let referenced = match self {
            Wish::Execute(_, command) => match &command.op {
                Op::Put(put) if matches!(put.value, Value::Large(_)) => put.value.bytes().len(),
                _ => 0,
            },
            Wish::Check(_) => 0,
        };
        self.cost_bytes() as usize - referenced
    }
}

/// The same as the core reads it that owns the key.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Member<'a> {
    pub(crate) role: Role,
    pub(crate) hash: u64,
    pub(crate) shard: u16,
    body: Reader<'a>,
}

impl<'a> Member<'a> {
    /// The next member.
    #[inline]
    pub(crate) fn read(members: &mut Reader<'a>) -> Self {
        let length = members.u32() as usize;
        let mut body = Reader(members.bytes(length));
        Self {
            role: Role::from_number(body.u8()),
            hash: body.u64(),
            shard: body.u16(),
            body,
        }
    }

    /// It changes nothing.
    #[inline]
    pub(crate) fn only_reads(&self) -> bool {
        self.role == Role::Check || only_reads(&self.body)
    }

    /// Its value is among the large ones of the record.
    #[inline]
    pub(crate) fn reads_large(&self) -> bool {
        self.role != Role::Check && reads_large(&self.body)
    }

    /// What is checked, of a member of that role.
    pub(crate) fn check(mut self) -> Check<'a> {
        read_check(&mut self.body)
    }

    /// What is executed, of a member of another role; `large` is its value when that is a large one.
    #[inline]
    pub(crate) fn command(mut self, large: Option<&'a Bytes>) -> Command<'a> {
        read_command(&mut self.body, large)
    }
}

/// One reply as the core that asked reads it: `length` flat bytes at `at`, with the next `splices` large values.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ReplyRecord {
    pub(crate) session: u32,
    pub(crate) number: u32,
    pub(crate) at: usize,
    pub(crate) length: usize,
    pub(crate) splices: usize,
}

impl ReplyRecord {
    /// The reply at `at`, and where the next one is.
    #[inline]
    pub(crate) fn read(flat: &[u8], at: usize) -> (Self, usize) {
        let mut header = Reader(&flat[at..at + REPLY_HEADER_BYTES]);
        let (session, number) = (header.u32(), header.u32());
        let (length, splices) = (header.u32() as usize, usize::from(header.u16()));
        let at = at + REPLY_HEADER_BYTES;
        let record = Self {
            session,
            number,
            at,
            length,
            splices,
        };
        (record, at + length)
    }
}
