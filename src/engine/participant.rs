//! What other cores' requests do to this core's shards while transactions are under way: who waits, and each part of a
//! transaction from its preparation to its end. The core's own transactions come the same way, over the link to itself.

use super::{Engine, Target, WINDOW};
use crate::encoding::{REUSED_BYTES_MAX, Reader, Rope, read_command};
use crate::link::{Direction, Kind, Member, PartRecord, Request, read_decision};
use crate::locks::{Entered, Mode, Target as Lock, TxnId, Who};
use crate::model::{Command, LARGE_VALUE_BYTES};
use crate::shard::Price;
use crate::txn::{Decision, Role, Scope, Vote, amend_vote, begin_result, finish_result, push_vote};
use arrayvec::ArrayVec;
use bytes::Bytes;

/// A request that waits or has locks, in memory of its own.
#[derive(Debug)]
pub(super) struct Parked {
    /// The link it came over.
    link: usize,
    /// The record, with its large values.
    record: Rope,
    /// What is charged to the memory limit for it while it waits.
    charged_bytes: usize,
}

impl Parked {
    /// Moves a record, with its next `splices` large values, into memory of its own.
    fn new(link: usize, record: &[u8], splices: usize, large: &mut Rope) -> Self {
        let mut own = Rope::default();
        own.push(record);
        for _ in 0..splices {
            if let Some(splice) = large.take_splice() {
                own.splice(splice.bytes);
            }
        }
        Self {
            link,
            record: own,
            charged_bytes: 0,
        }
    }

    fn large_values(&self) -> Vec<Bytes> {
        self.record.splices.iter().map(|splice| splice.bytes.clone()).collect()
    }
}

/// Who waits for locks.
#[derive(Debug)]
pub(super) enum Waiter {
    /// A request that is executed as soon as it has them.
    Instant(Parked),
    /// A part of a transaction, in the table of those.
    Part(TxnId),
}

/// A part of a transaction that is not decided.
#[derive(Debug)]
pub(super) struct Part {
    parked: Parked,
    /// Its place in the lock table.
    ticket: u32,
    /// How often it was told to prepare again.
    attempt: u32,
    /// It has its locks, and has said so.
    voted: bool,
    /// Bytes set aside for its writes.
    reserved: usize,
    /// It was executed, and what it wrote stays locked until it is safe on all cores.
    settles: bool,
}

/// What is known of a part before it is executed.
struct Survey {
    /// Which checks hold.
    checks: Vec<bool>,
    /// What success costs, and what failure.
    prices: [Price; 2],
    /// Bytes of values that either copies into its reply.
    copied_bytes: [usize; 2],
}

/// What a command needs of its key.
pub(super) fn mode_of(command: &Command<'_>) -> Mode {
    mode(command.only_reads())
}

fn mode(only_reads: bool) -> Mode {
    if only_reads { Mode::Shared } else { Mode::Exclusive }
}

/// The hashes of the keys of a part.
pub(super) fn hashes<'a>(record: &PartRecord<'a>) -> impl Iterator<Item = u64> + use<'a> {
    members(record.members).map(|member| member.hash)
}

fn members(mut body: Reader<'_>) -> impl Iterator<Item = Member<'_>> {
    std::iter::from_fn(move || (!body.0.is_empty()).then(|| Member::read(&mut body)))
}

/// The members of a part, each with its large value, taken from `large` in turn.
fn with_large<'a>(body: Reader<'a>, large: &'a [Bytes]) -> impl Iterator<Item = (Member<'a>, Option<&'a Bytes>)> {
    let mut large = large.iter();
    members(body).map(move |member| (member, member.reads_large().then(|| large.next()).flatten()))
}

/// What the members of a part want to lock.
fn wants(record: &PartRecord<'_>) -> impl Iterator<Item = (Lock, Mode)> {
    let store = (record.scope == Scope::Store).then_some((Lock::Store, Mode::Exclusive));
    let keys = members(record.members).map(|member| (Lock::Key(member.hash), mode(member.only_reads())));
    store.into_iter().chain(keys)
}

impl Engine {
    /// Serves a part of a transaction, or all of one that needs no other core.
    pub(super) fn serve_part(&mut self, link: usize, request: &Request<'_>, large: &mut Rope) {
        self.unsettled = true;
        let record = PartRecord::read(request);
        let splices = members(record.members).filter(Member::reads_large).count();
        let parked = Parked::new(link, request.record, splices, large);
        if request.kind == Kind::Prepare {
            let part = Part {
                parked: self.charge_parked(parked),
                ticket: 0,
                attempt: 0,
                voted: false,
                reserved: 0,
                settles: false,
            };
            return self.prepare(record.id, part);
        }
        if self.locks.is_empty() || !wants(&record).any(|(target, mode)| self.locks.blocks(target, mode)) {
            self.execute_whole(&parked);
        } else {
            self.wait_for_locks(wants(&record).collect(), parked);
        }
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
        let parked = Parked {
            link,
            record,
            charged_bytes: 0,
        };
        self.wait_for_locks(vec![(target, mode)], parked);
        true
    }

    /// Charges what waits. It is there already.
    fn charge_parked(&mut self, mut parked: Parked) -> Parked {
        parked.charged_bytes = parked.record.touched_bytes() + parked.record.spliced_bytes();
        self.shards.budget.charge_always(parked.charged_bytes);
        parked
    }

    /// Enters a request that is executed as soon as it has its locks. It does not have them now, unless those that are in its
    /// way are younger, on a core whose clock runs ahead, and cannot use them yet.
    fn wait_for_locks(&mut self, wants: Vec<(Lock, Mode)>, parked: Parked) {
        self.metrics.counters.lock_waits += 1;
        self.unsettled = true;
        let age = self.next_age();
        let parked = self.charge_parked(parked);
        match self.locks.enter(Who::Instant(age), wants) {
            Entered::Waiting(ticket) => {
                self.waiters.insert(ticket, Waiter::Instant(parked));
            }
            Entered::Granted(ticket) => self.execute_instant(parked, ticket),
        }
    }

    /// Goes on with a request that waited and has its locks now.
    pub(super) fn granted(&mut self, ticket: u32) {
        match self.waiters.remove(&ticket) {
            None => {}
            Some(Waiter::Part(id)) => {
                if let Some(mut part) = self.parts.remove(&id) {
                    self.vote(&mut part);
                    self.parts.insert(id, part);
                }
            }
            Some(Waiter::Instant(parked)) => self.execute_instant(parked, ticket),
        }
    }

    fn execute_instant(&mut self, mut parked: Parked, ticket: u32) {
        self.shards.budget.release_when_measured(parked.charged_bytes);
        let flat = std::mem::take(&mut parked.record.flat);
        let request = Request::read(&mut Reader(&flat));
        if request.kind == Kind::Command {
            let value = parked.record.take_splice().map(|splice| splice.bytes);
            let command = read_command(&mut { request.body }, value.as_ref());
            self.answer_command(parked.link, &request, &command);
        } else {
            parked.record.flat = flat;
            self.execute_whole(&parked);
        }
        self.locks.leave(ticket);
    }

    /// Executes a transaction that needs no other core.
    fn execute_whole(&mut self, parked: &Parked) {
        let request = Request::read(&mut Reader(&parked.record.flat));
        let record = PartRecord::read(&request);
        if let Some(why) = self.refusal(&request, &record) {
            return self.answer_refusal(parked.link, &request, why);
        }
        if record.scope == Scope::Reads {
            return self.answer_reads(parked.link, &request, &record, Vote::Done);
        }
        let large = parked.large_values();
        let Survey {
            checks,
            prices,
            copied_bytes,
        } = self.survey(&record, &large);
        let (role, price, copied_bytes) = if checks.iter().all(|held| *held) {
            (Role::Success, prices[0], copied_bytes[0])
        } else {
            (Role::Failure, prices[1], copied_bytes[1])
        };
        let vote = match self.afford(price, copied_bytes) {
            Vote::Prepared => Vote::Done,
            refusal => refusal,
        };
        let start = self.links[parked.link].begin_reply(request.to);
        let replies = &mut self.links[parked.link].replies().flat;
        push_vote(replies, vote, price.read_bytes, &checks);
        let position = self.log_position();
        if vote == Vote::Done {
            self.execute_members(parked.link, &request, &record, &large, role, price.charged_bytes);
        }
        self.links[parked.link].finish_reply(start);
        let wrote = self.log_position() != position;
        self.hold_part(parked.link, start, request.shape.code, wrote);
    }

    /// Why this core does nothing of a part: it takes no writes, and the part has one, whether it would come to that or not; or it
    /// cannot vouch for what the part concerns.
    fn refusal(&self, request: &Request<'_>, record: &PartRecord<'_>) -> Option<Vote> {
        let writes = || record.scope == Scope::Store || members(record.members).any(|member| !member.only_reads());
        if self.distrusts(record, &request.shape) {
            Some(Vote::NotDurable)
        } else if self.shards.refuses_writes() && writes() {
            Some(Vote::ReadOnly)
        } else {
            None
        }
    }

    fn answer_refusal(&mut self, link: usize, request: &Request<'_>, why: Vote) {
        let start = self.links[link].begin_reply(request.to);
        push_vote(&mut self.links[link].replies().flat, why, 0, &[]);
        self.links[link].finish_reply(start);
    }

    /// Sets memory aside for what is to be executed, or says why it cannot be.
    fn afford(&mut self, price: Price, copied_bytes: usize) -> Vote {
        if price.read_bytes > self.config.limits.response_bytes_max() {
            return Vote::TooLarge;
        }
        let has_room = self.has_room_for_reply(copied_bytes);
        let counters = &mut self.metrics.counters;
        if !has_room || !self.shards.reserve(price.charged_bytes, self.now, counters) {
            self.metrics.counters.out_of_memory += 1;
            return Vote::NoMemory;
        }
        Vote::Prepared
    }

    /// Locks what a part needs, or says why not yet.
    fn prepare(&mut self, id: TxnId, mut part: Part) {
        let request = Request::read(&mut Reader(&part.parked.record.flat));
        let record = PartRecord::read(&request);
        match self.locks.enter(Who::Transaction(id), wants(&record).collect()) {
            Entered::Granted(ticket) => {
                part.ticket = ticket;
                self.vote(&mut part);
            }
            Entered::Waiting(ticket) => {
                part.ticket = ticket;
                self.metrics.counters.lock_waits += 1;
                self.waiters.insert(ticket, Waiter::Part(id));
            }
        }
        self.parts.insert(id, part);
    }

    /// A part that has its locks is in the way of an older request: its coordinator is told.
    pub(super) fn tell_of_wound(&mut self, id: TxnId) {
        if let Some(part) = self.parts.get(&id).filter(|part| part.voted && !part.settles) {
            self.links[usize::from(id.core)].push_wound(id, part.attempt);
        }
    }

    fn unlock(&mut self, part: &Part) {
        if !part.voted {
            self.waiters.remove(&part.ticket);
        }
        self.locks.leave(part.ticket);
    }

    /// A part has its locks: evaluates its checks, sets memory aside, and says so; or reads what it is to read.
    fn vote(&mut self, part: &mut Part) {
        part.voted = true;
        let link = part.parked.link;
        let request = Request::read(&mut Reader(&part.parked.record.flat));
        let record = PartRecord::read(&request);
        if let Some(why) = self.refusal(&request, &record) {
            return self.answer_refusal(link, &request, why);
        }
        if record.scope == Scope::Reads {
            return self.answer_reads(link, &request, &record, Vote::Prepared);
        }
        let large = part.parked.large_values();
        let Survey {
            checks,
            prices,
            copied_bytes,
        } = self.survey(&record, &large);
        // Which of the two will be executed is not known here.
        let price = Price {
            charged_bytes: prices[0].charged_bytes.max(prices[1].charged_bytes),
            read_bytes: prices[0].read_bytes.max(prices[1].read_bytes),
        };
        let vote = self.afford(price, copied_bytes[0].max(copied_bytes[1]));
        if vote == Vote::Prepared {
            part.reserved = price.charged_bytes;
        }
        let start = self.links[link].begin_reply(request.to);
        push_vote(&mut self.links[link].replies().flat, vote, price.read_bytes, &checks);
        self.links[link].finish_reply(start);
        if !checks.is_empty() {
            // When one does not hold, that may be all that the client is told.
            self.hold_part(link, start, 0, false);
        }
    }

    /// Does with a part what its coordinator decided.
    pub(super) fn decide(&mut self, link: usize, request: &Request<'_>) {
        let (id, decision, epoch, writers) = read_decision(request);
        self.begin_epoch(epoch);
        let Some(mut part) = self.parts.remove(&id) else { return };
        self.unsettled = true;
        if part.settles {
            return self.settle_part(&part, decision);
        }
        let reserved = std::mem::take(&mut part.reserved);
        let executed = match decision {
            Decision::Again | Decision::Release | Decision::Settle | Decision::Distrust => None,
            Decision::Success => Some(Role::Success),
            Decision::Failure => Some(Role::Failure),
        };
        if let Some(role) = executed {
            let large = part.parked.large_values();
            let prepared = Request::read(&mut Reader(&part.parked.record.flat));
            let record = PartRecord::read(&prepared);
            let start = self.links[link].begin_reply(request.to);
            push_vote(&mut self.links[link].replies().flat, Vote::Done, 0, &[]);
            let position = self.log_position();
            let is_shared = self.begin_logged_part(id, epoch, writers);
            self.execute_members(link, &prepared, &record, &large, role, reserved);
            if is_shared {
                self.finish_logged_part();
            }
            self.links[link].finish_reply(start);
            let wrote = self.log_position() != position;
            self.hold_part(link, start, prepared.shape.code, wrote);
            if is_shared && self.gates() {
                part.settles = true;
                self.parts.insert(id, part);
                return;
            }
        } else {
            self.shards.budget.release(reserved);
        }
        self.unlock(&part);
        if decision == Decision::Again {
            part.attempt += 1;
            part.voted = false;
            self.prepare(id, part);
        } else {
            self.shards.budget.release_when_measured(part.parked.charged_bytes);
        }
    }

    /// What a part wrote is safe on all cores, or is known not to be: whoever waits for its keys goes on.
    fn settle_part(&mut self, part: &Part, decision: Decision) {
        if decision == Decision::Distrust {
            let request = Request::read(&mut Reader(&part.parked.record.flat));
            let record = PartRecord::read(&request);
            self.distrust(record.scope == Scope::Store, hashes(&record));
        }
        self.unlock(part);
        self.shards.budget.release_when_measured(part.parked.charged_bytes);
    }

    /// The next members; what they need is on its way into the cache.
    fn look_ahead<'a>(
        &self,
        members: &mut impl Iterator<Item = (Member<'a>, Option<&'a Bytes>)>,
    ) -> ArrayVec<(Member<'a>, Option<&'a Bytes>), WINDOW> {
        let window: ArrayVec<_, WINDOW> = members.take(WINDOW).collect();
        for (member, _) in &window {
            self.shards.prefetch_bucket(member.shard, member.hash);
        }
        for (member, _) in &window {
            self.shards.prefetch_item(member.shard, member.hash);
        }
        window
    }

    /// Evaluates the checks of a part, and what its commands may cost.
    fn survey(&self, record: &PartRecord<'_>, large: &[Bytes]) -> Survey {
        let mut survey = Survey {
            checks: vec![],
            prices: [Price::default(); 2],
            copied_bytes: [0; 2],
        };
        let mut members = with_large(record.members, large);
        loop {
            let window = self.look_ahead(&mut members);
            if window.is_empty() {
                return survey;
            }
            for (member, value) in window {
                let of = match member.role {
                    Role::Check => {
                        let held = self.shards.holds(member.shard, member.hash, &member.check(), self.now);
                        survey.checks.push(held);
                        continue;
                    }
                    Role::Success => 0,
                    Role::Failure => 1,
                };
                let price = self.shards.price(member.shard, member.hash, &member.command(value));
                survey.prices[of] += price;
                if price.read_bytes < LARGE_VALUE_BYTES as u64 {
                    survey.copied_bytes[of] += price.read_bytes as usize;
                }
            }
        }
    }

    /// Answers with what a part reads that does nothing else, unless it is too much.
    fn answer_reads(&mut self, link: usize, request: &Request<'_>, record: &PartRecord<'_>, vote: Vote) {
        let start = self.links[link].begin_reply(request.to);
        let replies = self.links[link].replies();
        let vote_at = replies.flat.len();
        push_vote(&mut replies.flat, vote, 0, &[]);
        let flat = replies.flat.len();
        let (refusal, read_bytes) = self.read_members(link, request, record);
        let replies = self.links[link].replies();
        if refusal.is_some() {
            replies.truncate(flat);
        }
        amend_vote(&mut replies.flat, vote_at, refusal.unwrap_or(vote), read_bytes);
        self.links[link].finish_reply(start);
        self.hold_part(link, start, request.shape.code, false);
    }

    /// Reads what a part asks for, and adds it to the reply. Returns why it stopped, if it did, and how many bytes of values it read.
    fn read_members(&mut self, link: usize, request: &Request<'_>, record: &PartRecord<'_>) -> (Option<Vote>, u64) {
        let bytes_max = self.config.limits.response_bytes_max();
        let start = self.links[link].replies().flat.len();
        let (mut read_bytes, mut charged_bytes) = (0, 0);
        let mut members = with_large(record.members, &[]);
        loop {
            let window = self.look_ahead(&mut members);
            if window.is_empty() {
                return (None, read_bytes);
            }
            read_bytes += self.execute_window(link, request, window);
            if read_bytes > bytes_max {
                self.release_unsent(link, charged_bytes);
                return (Some(Vote::TooLarge), read_bytes);
            }
            let replies = self.links[link].replies();
            let copied_bytes = replies.flat.len() - start;
            let has_grown = copied_bytes <= REUSED_BYTES_MAX || replies.try_reserve(WINDOW * LARGE_VALUE_BYTES);
            if !has_grown || !self.charge_reply(link, copied_bytes, &mut charged_bytes) {
                self.release_unsent(link, charged_bytes);
                self.metrics.counters.out_of_memory += 1;
                return (Some(Vote::NoMemory), read_bytes);
            }
        }
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
            self.note_emptied();
            return;
        }
        // It was looked at when the part was prepared. Now others may have executed theirs.
        let refuses = self.shards.refuses_writes();
        self.shards.refuse_writes(false);
        self.shards.budget.use_reserved(reserved);
        self.shards.budget.set_unlimited(true);
        let mut members = with_large(record.members, large).filter(|(member, _)| member.role == role);
        loop {
            let window = self.look_ahead(&mut members);
            if window.is_empty() {
                break;
            }
            self.execute_window(link, request, window);
        }
        self.shards.budget.set_unlimited(false);
        self.shards.refuse_writes(refuses);
        self.charge_batch(link, Direction::Replies);
    }

    /// Executes commands and adds their results to the reply. Returns how many bytes of values are in those.
    fn execute_window<'a>(
        &mut self,
        link: usize,
        request: &Request<'_>,
        window: ArrayVec<(Member<'a>, Option<&'a Bytes>), WINDOW>,
    ) -> u64 {
        let mut read_bytes = 0;
        for (member, value) in window {
            let start = begin_result(self.links[link].replies());
            let command = member.command(value);
            let (protocol, shape) = (request.protocol, &request.shape);
            let target = Target::Link(link);
            let position = self.log_position();
            read_bytes += self.execute(member.shard, member.hash, &command, protocol, shape, target) as u64;
            // Who waits for a key of which nothing is logged would wait for a write that does not come.
            if self.log_position() != position {
                self.note_written(member.hash);
            }
            finish_result(self.links[link].replies(), start);
        }
        read_bytes
    }
}
