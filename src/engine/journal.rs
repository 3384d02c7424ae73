//! How far this core's log is, and who waits for that.
//!
//! What a command does is noted in the log at once ([`crate::wal`]) and is there for every later command. What is told of it, to a
//! client or to another core, may have to wait: with `always` every reply waits that tells of something which is not safe, also of a
//! read, and of a condition that failed. Replies wait in *groups*: what is filled now, and what the disk is at. A request that asks for
//! durability waits for the end of its epoch on all cores, with every `--durability`.
//!
//! Epochs cut time into pieces that are the same on all cores, so that a crash can cut all logs at one moment, between two
//! transactions. A core that is in a later epoch says so to the others; when all have, no part of a transaction that was decided in
//! the earlier one is on its way any more: that epoch is *closed*. `docs/transactions.md` says why that suffices.

use super::images::{Core, Images, backlog_bytes_max};
use super::{Engine, Planned, Target};
use crate::encoding::{Reader, Rope};
use crate::link::{PartRecord, Progress, ReplyStart, Request, Return, ReturnBytes, read_progress};
use crate::metrics::Counters;
use crate::model::Command;
use crate::protocol::{self, Protocol, Shape};
use crate::session::Session;
use crate::txn::{Scope, Vote, push_vote};
use crate::wal::{Done, Durability, Job, Log};
use ahash::AHashSet;
use std::borrow::Cow;
use std::collections::VecDeque;
use std::time::Duration;

/// Where not every write waits for the disk, so many bytes are written at once, or what has come in so many milliseconds.
const WRITE_BYTES: usize = 256 << 10;
const WRITE_MS: u64 = 10;
/// A sync waits no longer than this for the company of others.
const COMPANY_NS_MAX: u64 = 200_000;
/// With `always`, so many writes are under way at once, at most.
const WRITES_MAX: usize = 2;
/// So many replies are worth a sync of their own: fewer wait for others to share it. With fewer a core has more to do for its syncs
/// than for its clients, and with more it waits for the disk: `docs/bench.md`, "Durability".
const SHARED_REPLIES_MIN: usize = 24;
/// How often an epoch ends while there is something to log, when nobody waits for it: after a crash of the process what came later
/// than the last end is lost.
const EPOCH_MS: u64 = 100;
/// Bytes that may wait for the disk. At it, requests of clients and of other cores are not begun until it has taken some.
const WAITING_BYTES_MAX: usize = 16 << 20;

/// A reply that waits.
#[derive(Debug)]
struct HeldReply {
    link: u16,
    protocol: Protocol,
    shape_code: u32,
    text_len: u16,
    /// Of the record, behind the text: flat bytes, and large values.
    flat_len: usize,
    splices: usize,
    /// It is the answer of a part of a transaction.
    is_part: bool,
}

/// Replies that wait for the same.
#[derive(Debug, Default)]
struct Held {
    replies: Vec<HeldReply>,
    /// For each: the shape's text, the record.
    rope: Rope,
}

/// What one write makes safe.
#[derive(Debug, Default)]
struct Group {
    /// The hashes of the keys that were written.
    keys: AHashSet<u64>,
    /// The store was emptied.
    emptied: bool,
    held: Held,
}

impl Group {
    fn concerns(&self, hash: u64) -> bool {
        self.emptied || self.keys.contains(&hash)
    }

    fn is_empty(&self) -> bool {
        !self.emptied && self.keys.is_empty()
    }
}

/// What the disk is at.
#[derive(Debug)]
struct Writing {
    group: Group,
    /// It closes this epoch.
    closed: u64,
    /// When it was handed over.
    since_ns: u64,
}

/// Where a reply waits.
#[derive(Clone, Copy, Debug)]
enum Waits {
    /// For what is filled now.
    Filling,
    /// For this one of what the disk is at.
    UnderWay(usize),
    /// For the end of this epoch everywhere.
    Epoch(u64),
}

/// See the module's text.
#[derive(Debug)]
pub(super) struct Journal {
    durability: Durability,
    sync_interval_ms: u64,
    shared_replies_min: usize,
    filling: Group,
    /// Jobs of the log that are under way, in order.
    under_way: VecDeque<Writing>,
    written_ms: u64,
    /// With `always`: the next sync waits until so many replies wait for it, or until this moment.
    company: usize,
    company_until_ns: u64,
    synced_ms: u64,
    /// Something is written and not synced.
    is_unsynced: bool,
    epoch_began_ms: u64,
    /// Where the log was then.
    epoch_position: u64,
    /// How far the logs of all cores are, this one's among them.
    progress: Vec<Progress>,
    /// Somebody wants this epoch to be safe.
    asked: u64,
    /// Replies that wait for an epoch, the earliest first.
    waiting: VecDeque<(u64, Held)>,
    /// Why the log cannot be written any more.
    failed: Option<String>,
    /// What may have been lost then.
    lost: Group,
    /// No more is to be begun until the disk has taken some.
    is_full: bool,
}

/// A reply that may have to wait, and how to take it back.
struct Told<'a> {
    protocol: Protocol,
    shape: Shape<'a>,
    is_part: bool,
}

impl Held {
    fn add(&mut self, link: usize, told: &Told<'_>, take: impl FnOnce(&mut Rope) -> (usize, usize)) {
        self.rope.push(told.shape.text);
        let (flat_len, splices) = take(&mut self.rope);
        self.replies.push(HeldReply {
            link: link as u16,
            protocol: told.protocol,
            shape_code: told.shape.code,
            text_len: told.shape.text.len() as u16,
            flat_len,
            splices,
            is_part: told.is_part,
        });
    }
}

impl Journal {
    fn new(durability: Durability, sync_interval_ms: u64, cores: u16, now_ms: u64) -> Self {
        Self {
            durability,
            sync_interval_ms,
            shared_replies_min: SHARED_REPLIES_MIN,
            filling: Group::default(),
            under_way: VecDeque::with_capacity(WRITES_MAX),
            written_ms: now_ms,
            company: 0,
            company_until_ns: 0,
            synced_ms: now_ms,
            is_unsynced: false,
            epoch_began_ms: now_ms,
            epoch_position: 0,
            progress: vec![Progress::default(); usize::from(cores)],
            asked: 0,
            waiting: VecDeque::new(),
            failed: None,
            lost: Group::default(),
            is_full: false,
        }
    }

    /// Where a reply waits that tells of this key, or of nothing in particular; `wrote`: the command has noted something.
    fn waits_for(&self, hash: Option<u64>, wrote: bool) -> Option<Waits> {
        let concerns = |group: &Group| hash.map_or(!group.is_empty(), |hash| group.concerns(hash));
        if wrote || concerns(&self.filling) {
            return Some(Waits::Filling);
        }
        let last = self.under_way.iter().rposition(|writing| concerns(&writing.group));
        last.map(Waits::UnderWay)
    }

    /// This key has something that is not safe.
    fn concerns(&self, hash: u64) -> bool {
        let under_way = self.under_way.iter().map(|writing| &writing.group);
        let mut groups = under_way.chain([&self.filling, &self.lost]);
        groups.any(|group| group.concerns(hash))
    }

    /// Somebody waits for this epoch to be safe.
    pub(super) fn ask_for(&mut self, epoch: u64) {
        self.asked = self.asked.max(epoch);
    }

    /// The epoch that is safe on all cores.
    pub(super) fn safe(&self) -> u64 {
        self.progress.iter().map(|progress| progress.safe).min().unwrap_or(0)
    }

    /// It is time to write what waits, or to make safe what was written.
    fn is_due(&self, log: &Log, now_ns: u64, now_ms: u64) -> bool {
        let replies = self.filling.held.replies.len();
        match (self.durability, self.under_way.len()) {
            (Durability::Always, 0) => {
                return log.has_news() && (replies >= self.company || now_ns >= self.company_until_ns);
            }
            (Durability::Always, count) => return count < WRITES_MAX && replies >= self.shared_replies_min,
            (_, 0) => {}
            _ => return false,
        }
        let asks = self.asked > self.safe();
        log.bytes() >= WRITE_BYTES
            || log.has_news() && (asks || now_ms.saturating_sub(self.written_ms) >= WRITE_MS)
            || self.durability == Durability::Interval
                && self.is_unsynced
                && now_ms.saturating_sub(self.synced_ms) >= self.sync_interval_ms
    }
}

impl Engine {
    /// Notes what is done from now on in a log that the runtime writes: [`Engine::disk_job`]. All cores begin in the first epoch.
    pub fn keep_log(&mut self, durability: Durability, sync_interval: Duration) {
        let sync_interval_ms = sync_interval.as_millis() as u64;
        self.shards.log = Some(Log::new(FIRST_EPOCH));
        self.journal = Some(Box::new(Journal::new(
            durability,
            sync_interval_ms,
            self.table.cores(),
            self.now.0,
        )));
        for progress in self.journal.iter_mut().flat_map(|journal| &mut journal.progress) {
            progress.epoch = FIRST_EPOCH;
        }
        self.gates = durability == Durability::Always;
        self.images = Some(Box::new(Images::new(self.table.shards_of(self.core), self.now.0)));
    }

    /// Has so many replies be worth a sync of their own, with `always`. For tests, which have fewer clients than a server.
    #[doc(hidden)]
    pub fn share_syncs_among(&mut self, replies: usize) {
        if let Some(journal) = &mut self.journal {
            journal.shared_replies_min = replies;
        }
    }

    /// Replies wait for the disk.
    #[inline]
    pub(super) fn gates(&self) -> bool {
        self.gates
    }

    /// The log's epoch; 0 without one.
    pub(super) fn log_epoch(&self) -> u64 {
        self.shards.log.as_ref().map_or(0, Log::epoch)
    }

    /// Where the log is; 0 without one.
    pub(super) fn log_position(&self) -> u64 {
        self.shards.log.as_ref().map_or(0, Log::position)
    }

    // ---- commands ----

    /// The reply may have to wait for the disk: the request asks for that, may write, or reads what is not safe.
    #[cold]
    pub(super) fn may_wait(&self, shape: &Shape<'_>, hash: u64, command: &Command<'_>) -> bool {
        let concerned = |journal: &Journal| journal.concerns(hash);
        shape.is_durable() || !command.only_reads() || self.journal.as_deref().is_some_and(concerned)
    }

    /// Executes a request of one of this core's connections whose reply may have to wait.
    #[cold]
    #[inline(never)]
    pub(super) fn run_logged(&mut self, session: &mut Session, id: u32, request: &Planned<'_>) {
        let number = session.expect_reply(request.command.op.class(), 0);
        let to = Return {
            session: id,
            number,
            protocol: session.protocol,
        };
        self.unsettled = true;
        let bytes = to.to_bytes();
        let told = Told {
            protocol: session.protocol,
            shape: request.shape,
            is_part: false,
        };
        let own = usize::from(self.core.0);
        let (shard, hash) = (request.shard, request.place.hash);
        self.execute_logged(own, ReturnBytes(&bytes), &told, shard, hash, &request.command);
    }

    /// The same for a request that came over a link.
    #[cold]
    #[inline(never)]
    pub(super) fn answer_logged(&mut self, link: usize, request: &Request<'_>, command: &Command<'_>) {
        let told = Told {
            protocol: request.protocol,
            shape: request.shape,
            is_part: false,
        };
        self.execute_logged(link, request.to, &told, request.shard, request.hash, command);
    }

    fn execute_logged(
        &mut self,
        link: usize,
        to: ReturnBytes<'_>,
        told: &Told<'_>,
        shard: u16,
        hash: u64,
        command: &Command<'_>,
    ) {
        let start = self.links[link].begin_reply(to);
        let is_lost = match &self.journal {
            None => told.shape.is_durable(),
            Some(journal) => journal.lost.concerns(hash) || journal.failed.is_some() && told.shape.is_durable(),
        };
        if is_lost {
            let out = self.links[link].replies();
            protocol::encode_not_durable(told.protocol, &told.shape, out);
            return self.links[link].finish_reply(start);
        }
        let position = self.log_position();
        let (protocol, shape) = (told.protocol, &told.shape);
        self.execute(shard, hash, command, protocol, shape, Target::Link(link));
        self.links[link].finish_reply(start);
        let wrote = self.log_position() != position;
        if wrote {
            self.note_written(hash);
        }
        self.hold_reply(link, start, told, Some(hash), wrote);
    }

    /// A key was written, of which nobody may hear before it is safe.
    pub(super) fn note_written(&mut self, hash: u64) {
        if self.gates
            && let Some(journal) = &mut self.journal
        {
            journal.filling.keys.insert(hash);
        }
    }

    /// The store was emptied.
    pub(super) fn note_emptied(&mut self) {
        if self.gates
            && let Some(journal) = &mut self.journal
        {
            journal.filling.emptied = true;
        }
    }

    /// Has the reply that was finished last wait, if it must.
    fn hold_reply(&mut self, link: usize, start: ReplyStart, told: &Told<'_>, hash: Option<u64>, wrote: bool) {
        let epoch = self.log_epoch();
        let Some(journal) = &mut self.journal else { return };
        let waits = match (self.gates, told.shape.is_durable()) {
            (true, _) => journal.waits_for(hash, wrote),
            (false, true) => Some(Waits::Epoch(epoch)),
            (false, false) => None,
        };
        let held = match waits {
            None => return,
            Some(Waits::Filling) => &mut journal.filling.held,
            Some(Waits::UnderWay(at)) => &mut journal.under_way[at].group.held,
            Some(Waits::Epoch(epoch)) => {
                journal.asked = journal.asked.max(epoch);
                if journal.waiting.back().is_none_or(|(of, _)| *of < epoch) {
                    journal.waiting.push_back((epoch, Held::default()));
                }
                match journal.waiting.back_mut() {
                    Some((_, held)) => held,
                    None => return,
                }
            }
        };
        self.metrics.counters.held_replies += 1;
        held.add(link, told, |to| self.links[link].hold_reply(start, to));
        if journal.failed.is_some() {
            // A part that had been prepared before. It is executed, as it is elsewhere, and nobody is shown what will be lost.
            self.lose_what_waits();
        }
    }

    /// The same for the answer of a transaction's part, which may tell of anything.
    pub(super) fn hold_part(&mut self, link: usize, start: ReplyStart, shape_code: u32, wrote: bool) {
        let told = Told {
            protocol: Protocol::Text,
            shape: Shape::code(shape_code),
            is_part: true,
        };
        self.hold_reply(link, start, &told, None, wrote);
    }

    /// Why a part is not even tried: it concerns what may have been lost, or asks for a durability that there is not.
    pub(super) fn distrusts(&self, record: &PartRecord<'_>, shape: &Shape<'_>) -> bool {
        let Some(journal) = &self.journal else {
            return shape.is_durable();
        };
        if journal.failed.is_none() && journal.lost.is_empty() {
            return false;
        }
        let is_lost = |hash| journal.lost.concerns(hash);
        shape.is_durable() || record.scope != Scope::Store && super::participant::hashes(record).any(is_lost)
    }

    /// What a transaction wrote here is not known to be safe everywhere; `emptied`: it emptied the store.
    pub(super) fn distrust(&mut self, emptied: bool, hashes: impl Iterator<Item = u64>) {
        if let Some(journal) = &mut self.journal {
            journal.lost.emptied |= emptied;
            journal.lost.keys.extend(hashes);
        }
    }

    /// Lets replies go that waited. The first of `reason` is told in place of the others when it is one.
    fn release(&mut self, mut held: Held, is_safe: bool) {
        let mut at = 0;
        self.unsettled |= !held.replies.is_empty();
        for reply in std::mem::take(&mut held.replies) {
            let link = usize::from(reply.link);
            let record_at = at + usize::from(reply.text_len);
            let end = record_at + reply.flat_len;
            if is_safe {
                let replies = self.links[link].replies();
                replies.append_from(&mut held.rope, record_at, reply.flat_len, reply.splices);
            } else {
                (0..reply.splices).for_each(|_| drop(held.rope.take_splice()));
                let shape = Shape {
                    code: reply.shape_code,
                    text: &held.rope.flat[at..record_at],
                };
                let start = self.links[link].begin_reply(ReturnBytes::of(&held.rope.flat[record_at..end]));
                let out = self.links[link].replies();
                if reply.is_part {
                    push_vote(&mut out.flat, Vote::NotDurable, 0, &[]);
                } else {
                    protocol::encode_not_durable(reply.protocol, &shape, out);
                }
                self.links[link].finish_reply(start);
            }
            at = end;
        }
    }

    // ---- the disk ----

    /// What is to be done with this core's files next. To be asked each turn until there is nothing; each is answered by
    /// [`Engine::disk_done`], those of the log in order.
    pub fn disk_job(&mut self) -> Option<Job> {
        self.log_job().or_else(|| self.image_job())
    }

    fn image_job(&mut self) -> Option<Job> {
        let (position, epoch) = (self.log_position(), self.log_epoch());
        let journal = self.journal.as_mut()?;
        let mut core = Core {
            shards: &mut self.shards,
            journal,
            position,
            epoch,
            now: self.now,
        };
        self.images.as_mut()?.job(&mut core)
    }

    fn log_job(&mut self) -> Option<Job> {
        let (journal, log) = (self.journal.as_mut()?, self.shards.log.as_mut()?);
        let now_ms = self.now.0;
        if journal.failed.is_some() || !journal.is_due(log, self.now_ns, now_ms) {
            return None;
        }
        let chunks = log.take(self.now);
        let closed = log.closed();
        let asks = journal.asked > journal.progress[usize::from(self.core.0)].safe;
        let sync = match journal.durability {
            Durability::Always => true,
            Durability::Interval => asks || now_ms.saturating_sub(journal.synced_ms) >= journal.sync_interval_ms,
            Durability::None => asks,
        };
        journal.under_way.push_back(Writing {
            group: std::mem::take(&mut journal.filling),
            closed,
            since_ns: self.now_ns,
        });
        journal.written_ms = now_ms;
        let counters = &mut self.metrics.counters;
        counters.log_writes += 1;
        counters.log_syncs += u64::from(sync);
        counters.log_bytes += chunks.iter().map(|chunk| chunk.effects.len() as u64).sum::<u64>();
        Some(Job::Log {
            chunks,
            sync,
            ends: false,
        })
    }

    /// The last job. `ends`: no request is under way on any core any more, and nothing will come: the log ends in order. `None` while
    /// another job of the log is under way.
    pub fn end_log(&mut self, ends: bool) -> Option<Job> {
        let (journal, log) = (self.journal.as_mut()?, self.shards.log.as_mut()?);
        if journal.failed.is_some() || !journal.under_way.is_empty() {
            return None;
        }
        journal.under_way.push_back(Writing {
            group: Group::default(),
            closed: log.closed(),
            since_ns: self.now_ns,
        });
        Some(Job::Log {
            chunks: log.take(self.now),
            sync: true,
            ends,
        })
    }

    /// The disk is at nothing that concerns the log.
    pub fn is_log_quiet(&self) -> bool {
        self.journal.as_ref().is_none_or(|journal| journal.under_way.is_empty())
    }

    /// A job came to an end.
    pub fn disk_done(&mut self, done: Done) {
        match done {
            Done::Logged { buffers, synced } => self.logged(buffers, synced),
            Done::Image { buffer, .. } => {
                if let Some(images) = &mut self.images {
                    self.metrics.counters.snapshots += u64::from(images.done(buffer, self.now.0));
                }
                self.see_whether_full();
            }
            Done::Failed { log: true, why } => self.fail_log(why),
            Done::Failed { log: false, .. } => {
                if let Some(images) = &mut self.images {
                    images.failed();
                }
                self.shards.drop_images(self.now);
                self.see_whether_full();
            }
        }
        self.settle();
    }

    fn logged(&mut self, buffers: Vec<Vec<u8>>, synced: bool) {
        let (Some(journal), Some(log)) = (&mut self.journal, &mut self.shards.log) else {
            return;
        };
        log.recycle(buffers);
        let Some(Writing {
            group,
            closed,
            since_ns,
        }) = journal.under_way.pop_front()
        else {
            return;
        };
        journal.is_unsynced = !synced;
        // Those who are answered now are likely to ask again at once. If the next sync waits for them as well, when no other is under
        // way, all share one: else two halves take turns, and each waits for the other's sync before its own. Half of what a sync takes
        // is worth that, if the disk was not held up.
        let under_way = journal.under_way.iter().map(|writing| &writing.group);
        let all = under_way.chain([&journal.filling, &group]);
        let company = all.map(|group| group.held.replies.len()).sum();
        journal.company = if company < 2 * journal.shared_replies_min {
            company
        } else {
            0
        };
        let sync_ns = self.now_ns.saturating_sub(since_ns);
        journal.company_until_ns = self.now_ns + (sync_ns / 2).min(COMPANY_NS_MAX);
        let own = usize::from(self.core.0);
        if synced {
            journal.synced_ms = self.now.0;
            if journal.progress[own].safe < closed {
                journal.progress[own].safe = closed;
                self.tell_progress();
            }
        }
        self.release(group.held, true);
        self.release_safe();
        self.see_whether_full();
    }

    /// Lets replies go that waited for an epoch which is safe now.
    fn release_safe(&mut self) {
        while let Some(journal) = &mut self.journal
            && journal
                .waiting
                .front()
                .is_some_and(|(epoch, _)| *epoch <= journal.safe())
            && let Some((_, held)) = journal.waiting.pop_front()
        {
            self.release(held, true);
        }
    }

    /// The log cannot be written any more: this core takes no writes from now on, and shows nothing that may be lost.
    fn fail_log(&mut self, why: String) {
        self.shards.refuse_writes(true);
        let Some(journal) = &mut self.journal else { return };
        journal.failed.get_or_insert(why);
        journal.progress[usize::from(self.core.0)].failed = true;
        self.lose_what_waits();
        self.tell_progress();
        self.give_up_images();
    }

    /// A log has failed, here or elsewhere: no image can be adopted any more.
    fn give_up_images(&mut self) {
        if let Some(images) = &mut self.images {
            images.give_up();
        }
        self.shards.drop_images(self.now);
        self.see_whether_full();
    }

    /// What is not safe never will be: who waits for it is told so, and so is who asks for it later.
    fn lose_what_waits(&mut self) {
        let Some(journal) = &mut self.journal else { return };
        let under_way = std::mem::take(&mut journal.under_way);
        let filling = std::mem::take(&mut journal.filling);
        let waiting = std::mem::take(&mut journal.waiting);
        for group in under_way.into_iter().map(|writing| writing.group).chain([filling]) {
            if let Some(journal) = &mut self.journal {
                journal.lost.emptied |= group.emptied;
                journal.lost.keys.extend(&group.keys);
            }
            self.release(group.held, false);
        }
        for (_, held) in waiting {
            self.release(held, false);
        }
    }

    /// Why the log of this core, or of another one that has said so, cannot be written any more.
    pub fn log_failure(&self) -> Option<Cow<'_, str>> {
        let journal = self.journal.as_ref()?;
        if let Some(why) = &journal.failed {
            return Some(why.into());
        }
        let core = journal.progress.iter().position(|progress| progress.failed)?;
        Some(format!("the log of core {core} cannot be written").into())
    }

    /// Adds what this core's log and snapshots are like now.
    pub(super) fn count_durability(&self, counters: &mut Counters) {
        counters.log_waiting_bytes = self.shards.log.as_ref().map_or(0, |log| log.bytes() as u64);
        counters.log_failed = u64::from(self.journal.as_ref().is_some_and(|journal| journal.failed.is_some()));
        if let Some(images) = &self.images {
            counters.snapshot_failed = u64::from(images.has_failed);
            counters.snapshot_at_ms = images.finished_ms;
        }
    }

    /// More waits for the disk than may: requests of other cores are to be left where they are.
    pub fn is_log_full(&self) -> bool {
        self.journal.as_ref().is_some_and(|journal| journal.is_full)
    }

    /// Stops beginning requests while too much waits for the disk, and goes on when it has taken that.
    pub(super) fn see_whether_full(&mut self) {
        let (Some(journal), Some(log)) = (&mut self.journal, &self.shards.log) else {
            return;
        };
        let backlog_bytes_max = backlog_bytes_max(self.pool.limit(), self.table.cores());
        let waits = log.bytes() >= WAITING_BYTES_MAX || self.shards.image_backlog_bytes() >= backlog_bytes_max;
        let is_full = waits && journal.failed.is_none();
        if is_full == journal.is_full {
            return;
        }
        journal.is_full = is_full;
        self.see_shortage();
        if !is_full {
            for id in self.sessions.ids() {
                if let Some(mut session) = self.sessions.take(id) {
                    self.resume_own(&mut session, id);
                    self.put_back(id, session);
                }
            }
        }
    }

    /// How long the core may sleep at most before it looks for a job of the disk again; `None`: until something happens.
    pub fn disk_rest(&self) -> Option<Duration> {
        let (journal, log) = (self.journal.as_ref()?, self.shards.log.as_ref()?);
        if journal.failed.is_some() || !journal.under_way.is_empty() {
            return None;
        }
        if self.gates {
            let rest_ns = journal.company_until_ns.saturating_sub(self.now_ns).max(1000);
            return log.has_news().then(|| Duration::from_nanos(rest_ns));
        }
        let until = |since_ms: u64, period_ms: u64| (since_ms + period_ms).saturating_sub(self.now.0).max(1);
        let write = log.has_news().then(|| until(journal.written_ms, WRITE_MS));
        let sync = (journal.durability == Durability::Interval && journal.is_unsynced)
            .then(|| until(journal.synced_ms, journal.sync_interval_ms));
        let has_new = log.position() != journal.epoch_position && self.ends_epochs();
        let epoch = has_new.then(|| until(journal.epoch_began_ms, EPOCH_MS));
        let rest_ms = [write, sync, epoch].into_iter().flatten().min();
        rest_ms.map(Duration::from_millis)
    }

    /// Epochs end by time: a crash is to cut all logs at an end of one.
    fn ends_epochs(&self) -> bool {
        !self.gates && self.table.cores() > 1
    }

    // ---- epochs ----

    /// The epoch that this core wants all to be in, if that is a later one.
    pub fn wanted_epoch(&self) -> Option<u64> {
        let (journal, log) = (self.journal.as_ref()?, self.shards.log.as_ref()?);
        let epoch = log.epoch();
        if log.closed() + 1 < epoch || journal.failed.is_some() {
            return None;
        }
        let is_over = self.ends_epochs()
            && log.position() != journal.epoch_position
            && self.now.0.saturating_sub(journal.epoch_began_ms) >= EPOCH_MS;
        (is_over || journal.asked >= epoch).then_some(epoch + 1)
    }

    /// All cores are to be in this epoch, or are in a later one. To be told each turn, before what the turn brings.
    #[inline]
    pub fn set_epoch(&mut self, epoch: u64) {
        if epoch > self.log_epoch() {
            self.begin_epoch(epoch);
        }
    }

    pub(super) fn begin_epoch(&mut self, epoch: u64) {
        let (Some(journal), Some(log)) = (&mut self.journal, &mut self.shards.log) else {
            return;
        };
        if epoch <= log.epoch() {
            return;
        }
        log.begin_epoch(epoch);
        journal.epoch_began_ms = self.now.0;
        journal.epoch_position = log.position();
        journal.progress[usize::from(self.core.0)].epoch = epoch;
        self.tell_progress();
        self.close_epochs();
    }

    /// Says to the other cores how far this one is.
    fn tell_progress(&mut self) {
        let Some(journal) = &self.journal else { return };
        let own = usize::from(self.core.0);
        let progress = Progress {
            asked: journal.asked,
            ..journal.progress[own]
        };
        for link in (0..self.links.len()).filter(|link| *link != own) {
            self.links[link].push_progress(progress);
        }
    }

    /// Another core says how far it is.
    pub(super) fn progressed(&mut self, link: usize, request: &Request<'_>) {
        let theirs = read_progress(request);
        let Some(journal) = &mut self.journal else { return };
        journal.progress[link] = theirs;
        journal.asked = journal.asked.max(theirs.asked);
        if theirs.failed {
            self.give_up_images();
            if !self.gates {
                return self.give_up_log(link);
            }
        }
        self.begin_epoch(theirs.epoch);
        self.close_epochs();
        self.release_safe();
    }

    /// Another core's log has failed, and epochs are what is brought back: what this one logs from now on could not be.
    fn give_up_log(&mut self, failed: usize) {
        self.shards.refuse_writes(true);
        if let Some(journal) = &mut self.journal {
            let why = || format!("the log of core {failed} cannot be written");
            journal.failed.get_or_insert_with(why);
            self.lose_what_waits();
        }
    }

    /// Notes which epochs no core decides anything in any more.
    fn close_epochs(&mut self) {
        let (Some(journal), Some(log)) = (&self.journal, &mut self.shards.log) else {
            return;
        };
        let earliest = journal.progress.iter().map(|progress| progress.epoch).min();
        let closed = earliest.map_or(0, |epoch| epoch.saturating_sub(1));
        if closed > log.closed() {
            log.close_epoch(closed);
        }
    }

    /// Begins to note what follows as this core's part of a transaction, when others write, too. True when it did.
    pub(super) fn begin_logged_part(&mut self, id: crate::locks::TxnId, epoch: u64, writers: Reader<'_>) -> bool {
        let mut writers = writers;
        let mut cores = smallvec::SmallVec::<[u16; 8]>::new();
        while !writers.0.is_empty() {
            cores.push(writers.u16());
        }
        let Some(log) = &mut self.shards.log else { return false };
        if !cores.contains(&self.core.0) {
            return false;
        }
        log.begin_part(id.core, id.clock, epoch, &cores);
        true
    }

    /// Ends the part.
    pub(super) fn finish_logged_part(&mut self) {
        if let Some(log) = &mut self.shards.log {
            log.finish_part();
        }
    }
}

/// The one in which all cores begin.
const FIRST_EPOCH: u64 = 1;
