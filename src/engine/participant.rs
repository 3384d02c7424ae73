//! What other cores' requests do to this core's shards while transactions are under way: who waits, and each part of a
//! transaction from its preparation to its end. The core's own transactions come the same way, over the link to itself.

use super::{Engine, Target, WINDOW};
use crate::encoding::{Reader, Rope, read_command, reads_large};
use crate::link::{Kind, Member, PartRecord, Request, read_decision};
use crate::locks::{Entered, Mode, Target as Lock, TxnId};
use crate::model::{Command, Reply};
use crate::shard::Price;
use crate::txn::{Decision, Role, Scope, Vote, begin_result, finish_result, push_vote};
use bytes::Bytes;

/// A request that waits or has locks, in memory of its own.
#[derive(Debug)]
pub(super) struct Parked {
    /// The link it came over.
    link: usize,
    /// The record, with its large values.
    record: Rope,
}

/// Whose a ticket of the lock table is.
#[derive(Debug)]
pub(super) enum Holder {
    /// A request that is executed as soon as it has its locks.
    Instant(Parked),
    /// A part of a transaction, in the table of those.
    Part(TxnId),
}

/// A part of a transaction that is not decided.
#[derive(Debug)]
pub(super) struct Part {
    parked: Parked,
    /// Its place in the lock table, unless it was refused one.
    ticket: Option<u32>,
    /// Bytes set aside for its writes.
    reserved: usize,
}

/// What a command needs of its key.
pub(super) fn mode_of(command: &Command<'_>) -> Mode {
    if command.only_reads() {
        Mode::Shared
    } else {
        Mode::Exclusive
    }
}

/// The members of a part with their commands, large values taken from `large` in turn.
fn members<'a>(
    mut body: Reader<'a>,
    large: impl IntoIterator<Item = &'a Bytes>,
) -> impl Iterator<Item = (Member<'a>, Command<'a>)> {
    let mut large = large.into_iter();
    std::iter::from_fn(move || {
        if body.0.is_empty() {
            return None;
        }
        let member = Member::read(&mut body);
        let value = if reads_large(&member.command) {
            large.next()
        } else {
            None
        };
        Some((member, read_command(&mut { member.command }, value)))
    })
}

fn large_values(record: &Rope) -> Vec<Bytes> {
    record.splices.iter().map(|splice| splice.bytes.clone()).collect()
}

impl Engine {
    /// Serves a part of a transaction, or all of one that needs no other core.
    pub(super) fn serve_part(&mut self, link: usize, request: &Request<'_>, large: &mut Rope) {
        let PartRecord { id, scope, members } = PartRecord::read(request);
        let splices = members_large(members);
        if request.kind == Kind::Whole && self.locks.is_empty() {
            let values: Vec<Bytes> = (0..splices)
                .filter_map(|_| large.take_splice())
                .map(|splice| splice.bytes)
                .collect();
            self.execute_whole(link, request, &values);
            return;
        }
        let parked = park(link, request.record, splices, large);
        if request.kind == Kind::Whole {
            self.wait_for_locks(wants(members, scope), parked);
            return;
        }
        let part = Part {
            parked,
            ticket: None,
            reserved: 0,
        };
        self.parts.insert(id, part);
        self.prepare(id);
    }

    /// Has a single command wait if it must; true when it does.
    #[cold]
    pub(super) fn parks(
        &mut self,
        link: usize,
        request: &Request<'_>,
        command: &Command<'_>,
        large: Option<&Bytes>,
    ) -> bool {
        let (target, mode) = (Lock::Key(request.hash), mode_of(command));
        if !self.locks.blocks(target, mode) {
            return false;
        }
        let mut record = Rope::default();
        record.push(request.record);
        if let Some(value) = large {
            record.splice(value.clone());
        }
        self.wait_for_locks(vec![(target, mode)], Parked { link, record });
        true
    }

    /// Enters a request that is executed as soon as it has its locks.
    fn wait_for_locks(&mut self, wants: Vec<(Lock, Mode)>, parked: Parked) {
        self.metrics.counters.lock_waits += 1;
        match self.locks.enter(None, wants) {
            Entered::Granted(ticket) => {
                self.holders.insert(ticket, Holder::Instant(parked));
                self.granted(ticket);
            }
            Entered::Waiting(ticket) => {
                self.holders.insert(ticket, Holder::Instant(parked));
            }
            Entered::Refused => unreachable!("only transactions are refused"),
        }
    }

    /// Goes on with a request that has its locks now.
    pub(super) fn granted(&mut self, ticket: u32) {
        match self.holders.get(&ticket) {
            None => {}
            Some(Holder::Part(id)) => self.vote(*id),
            Some(Holder::Instant(_)) => {
                let Some(Holder::Instant(mut parked)) = self.holders.remove(&ticket) else {
                    return;
                };
                let flat = std::mem::take(&mut parked.record.flat);
                let request = Request::read(&mut Reader(&flat));
                if request.kind == Kind::Command {
                    let value = parked.record.take_splice().map(|splice| splice.bytes);
                    let command = read_command(&mut { request.body }, value.as_ref());
                    self.answer_command(parked.link, &request, &command);
                } else {
                    let values = large_values(&parked.record);
                    self.execute_whole(parked.link, &request, &values);
                }
                self.locks.leave(ticket);
            }
        }
    }

    /// Executes a transaction that needs no other core.
    fn execute_whole(&mut self, link: usize, request: &Request<'_>, large: &[Bytes]) {
        let record = PartRecord::read(request);
        let checks = self.check(record.members, large);
        let role = if checks.iter().all(|held| *held) {
            Role::Success
        } else {
            Role::Failure
        };
        let price = self.price(record.members, large, role);
        let vote = match self.afford(price) {
            Vote::Prepared => Vote::Done,
            refusal => refusal,
        };
        let start = self.links[link].begin_reply(request.to);
        push_vote(&mut self.links[link].replies().flat, vote, price.read_bytes, &checks);
        if vote == Vote::Done {
            self.execute_members(link, request, &record, large, role, price.charged_bytes);
        }
        self.links[link].finish_reply(start);
    }

    /// Sets memory aside for what is to be executed, or says why it cannot be.
    fn afford(&mut self, price: Price) -> Vote {
        if price.read_bytes > self.config.limits.response_bytes_max() {
            return Vote::TooLarge;
        }
        if !self
            .shards
            .reserve(price.charged_bytes, self.now, &mut self.metrics.counters)
        {
            self.metrics.counters.out_of_memory += 1;
            return Vote::NoMemory;
        }
        Vote::Prepared
    }

    /// Locks what a part needs, or says why not yet.
    fn prepare(&mut self, id: TxnId) {
        let Some(part) = self.parts.get_mut(&id) else { return };
        let request = Request::read(&mut Reader(&part.parked.record.flat));
        let record = PartRecord::read(&request);
        match self.locks.enter(Some(id), wants(record.members, record.scope)) {
            Entered::Granted(ticket) => {
                part.ticket = Some(ticket);
                self.holders.insert(ticket, Holder::Part(id));
                self.vote(id);
            }
            Entered::Waiting(ticket) => {
                part.ticket = Some(ticket);
                self.holders.insert(ticket, Holder::Part(id));
            }
            Entered::Refused => {
                let link = &mut self.links[part.parked.link];
                let start = link.begin_reply(request.to);
                push_vote(&mut link.replies().flat, Vote::Refused, 0, &[]);
                link.finish_reply(start);
            }
        }
    }

    /// A part has its locks: evaluates its checks, sets memory aside, and says so.
    fn vote(&mut self, id: TxnId) {
        let Some(mut part) = self.parts.remove(&id) else { return };
        let request = Request::read(&mut Reader(&part.parked.record.flat));
        let record = PartRecord::read(&request);
        let values = large_values(&part.parked.record);
        let checks = self.check(record.members, &values);
        // Which of the two will be executed is not known here.
        let prices = [Role::Success, Role::Failure].map(|role| self.price(record.members, &values, role));
        let price = Price {
            charged_bytes: prices[0].charged_bytes.max(prices[1].charged_bytes),
            read_bytes: prices[0].read_bytes.max(prices[1].read_bytes),
        };
        let vote = self.afford(price);
        if vote == Vote::Prepared {
            part.reserved = price.charged_bytes;
        }
        let link = part.parked.link;
        let start = self.links[link].begin_reply(request.to);
        push_vote(&mut self.links[link].replies().flat, vote, price.read_bytes, &checks);
        if record.scope == Scope::Reads && vote == Vote::Prepared {
            self.execute_members(link, &request, &record, &values, Role::Success, 0);
        }
        self.links[link].finish_reply(start);
        self.parts.insert(id, part);
    }

    /// Does with a part what its coordinator decided.
    pub(super) fn decide(&mut self, link: usize, request: &Request<'_>) {
        let (id, decision) = read_decision(request);
        let Some(mut part) = self.parts.remove(&id) else { return };
        let ticket = part.ticket.take();
        let executed = match decision {
            Decision::Again | Decision::Release => None,
            Decision::Success => Some(Role::Success),
            Decision::Failure => Some(Role::Failure),
        };
        if let Some(role) = executed {
            let values = large_values(&part.parked.record);
            let prepared = Request::read(&mut Reader(&part.parked.record.flat));
            let record = PartRecord::read(&prepared);
            let start = self.links[link].begin_reply(request.to);
            push_vote(&mut self.links[link].replies().flat, Vote::Done, 0, &[]);
            self.execute_members(link, &prepared, &record, &values, role, part.reserved);
            self.links[link].finish_reply(start);
        } else {
            self.shards.budget.release(part.reserved);
        }
        part.reserved = 0;
        if let Some(ticket) = ticket {
            self.holders.remove(&ticket);
            self.locks.leave(ticket);
        }
        if decision == Decision::Again {
            self.parts.insert(id, part);
            self.prepare(id);
        }
    }

    /// Which checks hold.
    fn check(&mut self, body: Reader<'_>, large: &[Bytes]) -> Vec<bool> {
        let mut held = vec![];
        for (member, command) in members(body, large).filter(|(member, _)| member.role == Role::Check) {
            let (now, counters) = (self.now, &mut self.metrics.counters);
            let reply = self.shards.execute(member.shard, member.hash, &command, now, counters);
            held.push(matches!(reply, Reply::Checked(true)));
        }
        held
    }

    /// What the commands of one role may cost.
    fn price(&self, body: Reader<'_>, large: &[Bytes], role: Role) -> Price {
        let mut sum = Price::default();
        for (member, command) in members(body, large).filter(|(member, _)| member.role == role) {
            let price = self.shards.price(member.shard, member.hash, &command);
            sum.charged_bytes += price.charged_bytes;
            sum.read_bytes += price.read_bytes;
        }
        sum
    }

    /// Executes the commands of one role, for which `reserved` bytes were set aside, and adds their results to the reply.
    fn execute_members(
        &mut self,
        link: usize,
        request: &Request<'_>,
        record: &PartRecord<'_>,
        large: &[Bytes],
        role: Role,
        reserved: usize,
    ) {
        if record.scope == Scope::Store {
            self.flush_at = None;
            self.shards.flush(self.now, &mut self.metrics.counters);
            return;
        }
        self.shards.budget.use_reserved(reserved);
        self.shards.budget.set_unlimited(true);
        let mut window = arrayvec::ArrayVec::<(Member<'_>, Command<'_>), WINDOW>::new();
        let mut members = members(record.members, large)
            .filter(|(member, _)| member.role == role)
            .peekable();
        while members.peek().is_some() {
            window.extend(members.by_ref().take(WINDOW));
            for (member, _) in &window {
                self.shards.prefetch_bucket(member.shard, member.hash);
            }
            for (member, _) in &window {
                self.shards.prefetch_item(member.shard, member.hash);
            }
            for (member, command) in window.drain(..) {
                let start = begin_result(self.links[link].replies());
                let (protocol, shape) = (request.protocol, &request.shape);
                self.execute(member.shard, member.hash, &command, protocol, shape, Target::Link(link));
                finish_result(self.links[link].replies(), start);
            }
        }
        self.shards.budget.set_unlimited(false);
    }
}

/// How many large values the members of a part have.
fn members_large(mut body: Reader<'_>) -> usize {
    let mut count = 0;
    while !body.0.is_empty() {
        count += usize::from(reads_large(&Member::read(&mut body).command));
    }
    count
}

/// What the members of a part want to lock.
fn wants(mut body: Reader<'_>, scope: Scope) -> Vec<(Lock, Mode)> {
    if scope == Scope::Store {
        return vec![(Lock::Store, Mode::Exclusive)];
    }
    let mut wants = vec![];
    let nothing = Bytes::new();
    while !body.0.is_empty() {
        let member = Member::read(&mut body);
        let command = read_command(&mut { member.command }, Some(&nothing));
        wants.push((Lock::Key(member.hash), mode_of(&command)));
    }
    wants
}

/// Moves a record, with its next `splices` large values, into memory of its own.
fn park(link: usize, record: &[u8], splices: usize, large: &mut Rope) -> Parked {
    let mut own = Rope::default();
    own.push(record);
    for _ in 0..splices {
        if let Some(splice) = large.take_splice() {
            own.splice(splice.bytes);
        }
    }
    Parked { link, record: own }
}
