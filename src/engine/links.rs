//! What comes from other cores and goes to them. What a core has for itself takes the same way.

use super::{Engine, Target, WINDOW, count_answered};
use crate::encoding::{REUSED_BYTES_MAX, Reader, Rope, read_broadcast, read_command, reads_large};
use crate::gather::Gathered;
use crate::link::{Batch, Direction, Kind, ReplyRecord, Request};
use crate::model::{Command, CoreId};
use crate::protocol;
use crate::session::{Blocked, Session};

impl Engine {
    /// Requests came from core `from`. The batch is emptied.
    pub fn requests(&mut self, from: CoreId, batch: Box<Batch>) {
        self.take_requests(from, batch);
        self.settle();
    }

    pub(super) fn take_requests(&mut self, from: CoreId, mut batch: Box<Batch>) {
        let link = usize::from(from.0);
        self.take_over(&batch);
        let flat = std::mem::take(&mut batch.rope.flat);
        let mut reader = Reader(&flat);
        while !reader.0.is_empty() {
            // Look ahead over a window, so that the memory of its requests is on its way before the first is executed.
            let mut window = arrayvec::ArrayVec::<Request<'_>, WINDOW>::new();
            while !window.is_full() && !reader.0.is_empty() {
                let request = Request::read(&mut reader);
                if request.kind == Kind::Command {
                    self.shards.prefetch_bucket(request.shard, request.hash);
                }
                window.push(request);
            }
            if window.len() > 1 {
                for request in window.iter().filter(|request| request.kind == Kind::Command) {
                    self.shards.prefetch_item(request.shard, request.hash);
                }
            }
            for request in window {
                self.serve(link, request, &mut batch.rope);
            }
        }
        batch.rope.flat = flat;
        self.recycle(batch);
    }

    /// Executes a request of another core; its large values, when it has some, are the next of `large`.
    #[inline]
    fn serve(&mut self, link: usize, request: Request<'_>, large: &mut Rope) {
        self.metrics.counters.served_for_others += u64::from(link != usize::from(self.core.0));
        match request.kind {
            Kind::Command => {
                // A spliced value belongs to the record whose command says so, and records are read in order.
                let splice = if reads_large(&request.body) {
                    large.take_splice()
                } else {
                    None
                };
                let value = splice.map(|splice| splice.bytes);
                let command = read_command(&mut { request.body }, value.as_ref());
                if self.locks.is_empty() || !self.parks(link, &request, &command, value.as_ref()) {
                    self.answer_command(link, &request, &command);
                }
            }
            Kind::Broadcast => {
                let start = self.links[link].begin_reply(request.to);
                let report = self.answer_broadcast(read_broadcast(&mut { request.body }));
                report.push(&mut self.links[link].replies().flat);
                self.links[link].finish_reply(start);
            }
            Kind::Whole | Kind::Prepare => self.serve_part(link, &request, large),
            Kind::Decide => self.decide(link, &request),
            Kind::Wound => self.wounded(link, &request),
            Kind::Progress => self.progressed(link, &request),
        }
    }

    /// Executes a command of another core and encodes the reply for it.
    #[inline(always)]
    pub(super) fn answer_command(&mut self, link: usize, request: &Request<'_>, command: &Command<'_>) {
        if (self.gates || request.shape.is_durable()) && self.may_wait(&request.shape, request.hash, command) {
            return self.answer_logged(link, request, command);
        }
        let start = self.links[link].begin_reply(request.to);
        let Request {
            hash, shard, protocol, ..
        } = *request;
        self.execute(shard, hash, command, protocol, &request.shape, Target::Link(link));
        self.links[link].finish_reply(start);
        if protocol::copies_large(protocol) {
            self.charge_copies(link);
        }
    }

    /// Replies came from core `from`. The batch is emptied, sessions that waited go on.
    pub fn replies(&mut self, from: CoreId, batch: Box<Batch>) {
        self.take_replies(from, batch);
        self.settle();
    }

    pub(super) fn take_replies(&mut self, from: CoreId, mut batch: Box<Batch>) {
        self.take_over(&batch);
        let mut at = 0;
        while at < batch.rope.flat.len() {
            let began = at;
            let (mut record, mut next) = ReplyRecord::read(&batch.rope.flat, at);
            let id = record.session;
            let mut session = self
                .sessions
                .take(id)
                .expect("a session stays until all its replies have come");
            self.ready_output(&mut session);
            // Those of one pipeline stand side by side.
            loop {
                self.reply(from, &mut session, id, record, &mut batch.rope);
                at = next;
                if at >= batch.rope.flat.len() {
                    break;
                }
                (record, next) = ReplyRecord::read(&batch.rope.flat, at);
                if record.session != id {
                    break;
                }
            }
            self.release_replies(&mut batch, at - began);
            if session.gone {
                session.output.filling.clear(0);
            }
            if session.blocked == Blocked::Own && self.resumable.last() != Some(&id) {
                self.resumable.push(id);
            }
            self.put_back(id, session);
        }
        self.recycle(batch);
        while let Some(id) = self.resumable.pop() {
            if let Some(mut session) = self.sessions.take(id) {
                self.resume_own(&mut session, id);
                self.put_back(id, session);
            }
        }
        self.resume_waiters(from.0);
    }

    #[inline]
    fn reply(&mut self, from: CoreId, session: &mut Session, id: u32, record: ReplyRecord, rope: &mut Rope) {
        let ReplyRecord {
            number,
            at,
            length,
            splices,
            ..
        } = record;
        let link = &mut self.links[usize::from(from.0)];
        match session.gather(number) {
            Ok(gather) => {
                if let Gathered::Report { cost_bytes, .. } = gather.of {
                    link.release_credit(cost_bytes);
                }
                gather.take(from.0, rope, at, length, splices);
                session.gathered_bytes += length;
                self.gathered(session, id, number);
            }
            Err(cost_bytes) => {
                if from != self.core {
                    link.release_credit(cost_bytes);
                }
                let metrics = &mut self.metrics;
                session.fill(number, rope, at, length, splices, |slot| count_answered(metrics, slot));
            }
        }
    }

    /// Lets sessions go on that wait for credit, the longest waiting first, while there is credit.
    pub(super) fn resume_waiters(&mut self, link: u16) {
        for _ in 0..self.links[usize::from(link)].waiting() {
            let Some(id) = self.links[usize::from(link)].next_waiter() else {
                break;
            };
            let Some(mut session) = self.sessions.take(id) else {
                continue;
            };
            session.blocked = Blocked::No;
            self.advance_input(&mut session, id, Some(link));
            let still_waits = session.blocked == Blocked::Credit(link);
            self.put_back(id, session);
            if still_waits {
                break;
            }
        }
    }

    fn recycle(&mut self, mut batch: Box<Batch>) {
        self.release_batch(&mut batch);
        if self.batches.len() < 2 * self.links.len() {
            batch.rope.clear(REUSED_BYTES_MAX);
            self.batches.push(batch);
        }
    }

    /// What is to be sent to core `to` now; `None` when there is nothing. Called only when there is room for it: what is not
    /// fetched stays and grows, and credit bounds how far.
    #[inline]
    pub fn outgoing(&mut self, to: CoreId, direction: Direction) -> Option<Box<Batch>> {
        let link = usize::from(to.0);
        if !self.links[link].has_outgoing(direction) {
            return None;
        }
        self.charge_batch(link, direction);
        let batch = self.links[link].take_outgoing(direction, self.batches.pop().unwrap_or_default());
        self.hand_over(&batch);
        Some(batch)
    }

    /// There is something to send to core `to`.
    #[inline]
    pub fn has_outgoing(&self, to: CoreId, direction: Direction) -> bool {
        self.links[usize::from(to.0)].has_outgoing(direction)
    }
}
