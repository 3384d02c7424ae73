//! One core: its connections, its shards, and its links to the other cores. The library's face for everything that moves
//! bytes; it moves none itself.
//!
//! A runtime calls, in each turn of its loop: [`Engine::begin_turn`] with the time; what happened ([`Engine::received`],
//! [`Engine::sent`], [`Engine::requests`], [`Engine::replies`], ...); [`Engine::end_turn`]; and then does what the engine
//! wants: sends batches to other cores ([`Engine::outgoing`]) and looks after the connections in [`Engine::attention`].
//! Nothing here waits, allocates per request, or knows a socket.

use crate::budget::{Pool, Shortage};
use crate::config::{Config, Eviction};
use crate::encoding::{REUSED_BYTES_MAX, Rope};
use crate::link::{Batch, CreditLimits, Direction, Link, Return, cost_bytes};
use crate::locks::{Locks, Target as Lock, TxnId};
use crate::metrics::hot_keys::HotKeys;
use crate::metrics::{Counters, Metrics, Prefixes};
use crate::model::{Broadcast, Class, Command, CoreId, LARGE_VALUE_BYTES, Op, Put, Reply, ShardId, UnixMillis, Value};
use crate::partition::{Place, RangeTable};
use crate::protocol::{self, Decoded, Env, ProcessFacts, Protocol, Shape, Step};
pub use crate::session::Notice;
use crate::session::{Blocked, End, Incoming, Session, Slot};
use crate::sessions::Sessions;
use crate::shards::Shards;
use ahash::AHashMap;
use bumpalo::Bump;
use bytes::Bytes;
pub use calls::{Read, Written};
use std::cell::OnceCell;
use std::sync::Arc;

mod calls;
mod gathered;
mod images;
mod interactive;
mod journal;
mod links;
mod memory;
mod participant;
mod slow;
mod time;

/// How many requests of one connection are decoded before the first is executed, so that the memory that each will need is
/// asked for while the others are decoded.
const WINDOW: usize = 16;
/// Buffers kept for reuse.
const BUFFERS_KEPT_MAX: usize = 256;
/// More room than this for decoded requests is given back.
const ARENA_KEPT_BYTES_MAX: usize = 1 << 20;
/// What a connection needs from the runtime.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wants {
    /// There are bytes to send.
    pub send: bool,
    /// It is to be closed: all is said, or it failed.
    pub close: bool,
    /// It is to be read.
    pub read: bool,
    /// The client is to be told that nothing more will be sent, now that all is. Reading goes on. Said once.
    pub shut: bool,
    /// What its handler is to be told, when it has one.
    pub notice: Notice,
}

impl Wants {
    const NOTHING: Self = Self {
        send: false,
        shut: false,
        close: false,
        read: false,
        notice: Notice::Nothing,
    };
}

/// What came of a row that was to be loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loaded {
    /// It is stored.
    Stored,
    /// Another core owns its key.
    NotMine,
    /// The memory limit does not allow it.
    OutOfMemory,
}

/// One core. See the module's text.
pub struct Engine {
    core: CoreId,
    config: Arc<Config>,
    table: Arc<RangeTable>,
    core_ports: Arc<[u16]>,
    request_bytes_max: usize,
    /// The memory limit of all cores.
    pool: Arc<Pool>,
    shards: Shards,
    sessions: Sessions,
    /// Bytes charged for sessions.
    connection_bytes: usize,
    /// What one of them may have waiting.
    own_limits: memory::OwnLimits,
    links: Vec<Link>,
    /// What this core counts.
    pub metrics: Metrics,
    prefixes: Option<Prefixes>,
    /// Of the keys that it owns.
    hot_keys: HotKeys,
    slow: slow::Slow,
    process: ProcessFacts,
    buffers: Vec<Vec<u8>>,
    #[expect(clippy::vec_box, reason = "batches travel between cores as boxes")]
    batches: Vec<Box<Batch>>,
    arena: Bump,
    now: UnixMillis,
    now_ns: u64,
    started_ns: u64,
    ticked_ms: u64,
    timeouts_checked_ms: u64,
    /// There may be something to do for [`Engine::settle`].
    unsettled: bool,
    /// Links of which a transaction has given credit back.
    freed_links: Vec<u16>,
    /// Sessions that answers may let go on, to be looked at once per batch.
    resumable: Vec<u32>,
    stop_asked: bool,
    /// How far the log is; none without a data directory.
    journal: Option<Box<journal::Journal>>,
    /// Snapshots; none without a data directory.
    images: Option<Box<images::Images>>,
    /// Replies wait for the disk.
    gates: bool,
    /// Who may touch which key while transactions are under way.
    locks: Locks,
    /// By ticket of the lock table.
    waiters: AHashMap<u32, participant::Waiter>,
    /// Parts of transactions on this core that are not decided.
    parts: AHashMap<TxnId, participant::Part>,
    /// The connection and the slot of each transaction that this core coordinates.
    coordinated: AHashMap<TxnId, (u32, u32)>,
    /// The clock of the age that was given last.
    last_age: u64,
    /// When the store is to be emptied; the first core sees to it.
    flush_at: Option<UnixMillis>,
    /// The session that asks for it.
    internal: Option<u32>,
}

/// A request that was decoded and is yet to be executed.
struct Planned<'a> {
    command: Command<'a>,
    shape: Shape<'a>,
    place: Place,
    shard: u16,
    /// The link it goes over; `None` for this core's own.
    link: Option<u16>,
}

impl Engine {
    /// Core `core` of `table.cores()`, empty.
    pub fn new(core: CoreId, table: Arc<RangeTable>, pool: Arc<Pool>, config: Arc<Config>, now: UnixMillis) -> Self {
        let value_bytes_max = usize::try_from(config.limits.item_size_max.0).unwrap_or(usize::MAX);
        let evicts = config.limits.eviction != Eviction::None;
        let mut shards = Shards::new(core, &table, pool.clone(), value_bytes_max, evicts, now);
        shards.refuse_writes(config.read_only);
        let limits = CreditLimits {
            requests_max: config.limits.mesh_requests_max,
            bytes_max: config.limits.mesh_bytes_max.0,
        };
        Self {
            core,
            links: (0..table.cores()).map(|_| Link::new(limits)).collect(),
            pool,
            shards,
            connection_bytes: 0,
            own_limits: memory::OwnLimits::new(&config.limits, Shortage::No),
            table,
            core_ports: Arc::new([]),
            request_bytes_max: usize::try_from(config.limits.request_bytes_max()).unwrap_or(usize::MAX),
            sessions: Sessions::default(),
            metrics: Metrics::default(),
            prefixes: None,
            hot_keys: HotKeys::new(u64::from(core.0) + 1),
            slow: slow::Slow::new(&config),
            process: ProcessFacts::default(),
            buffers: vec![],
            batches: vec![],
            arena: Bump::new(),
            config,
            now,
            now_ns: 0,
            started_ns: 0,
            ticked_ms: now.0,
            timeouts_checked_ms: now.0,
            unsettled: false,
            freed_links: vec![],
            resumable: vec![],
            stop_asked: false,
            journal: None,
            images: None,
            gates: false,
            locks: Locks::default(),
            waiters: AHashMap::new(),
            parts: AHashMap::new(),
            coordinated: AHashMap::new(),
            last_age: 0,
            flush_at: None,
            internal: None,
        }
    }

    /// Starts a turn. `now_ns` is a monotonic clock of the runtime's choice.
    pub fn begin_turn(&mut self, now_ns: u64, now: UnixMillis) {
        if self.started_ns == 0 {
            self.started_ns = now_ns;
        }
        self.begin_time(now_ns);
        self.now_ns = now_ns;
        self.now = now;
        self.metrics.counters.turns += 1;
        if now.0 != self.ticked_ms {
            self.tick();
        }
    }

    /// Frees what is only kept for reuse: for an idle core.
    pub fn free_spare_buffers(&mut self) {
        self.buffers = vec![];
        self.batches = vec![];
        self.arena = Bump::new();
    }

    /// Facts about the process, for statistics.
    pub fn set_process_facts(&mut self, facts: ProcessFacts) {
        self.process = facts;
    }

    /// By core: the port at which it alone serves, for clients that ask.
    pub fn set_core_ports(&mut self, ports: Arc<[u16]>) {
        self.core_ports = ports;
    }

    /// A client asked to stop the server.
    pub fn stop_asked(&self) -> bool {
        self.stop_asked
    }

    /// The turn's time.
    pub fn now(&self) -> UnixMillis {
        self.now
    }

    /// The configuration, to keep.
    pub fn shared_config(&self) -> Arc<Config> {
        self.config.clone()
    }

    /// The configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Sets whether this core refuses every write from now on, whoever sends it. Reads, statistics and [`Engine::load`] go
    /// on. A transaction that writes to a core which refuses is refused as a whole.
    pub fn refuse_writes(&mut self, refuse: bool) {
        self.shards.refuse_writes(refuse);
    }

    /// Stores a row that is loaded before connections are served, if its key is one of this core's.
    pub fn load(&mut self, key: &[u8], value: &[u8]) -> Loaded {
        let place = self.table.place(key);
        let shard = self.table.shard_of(place.token);
        if self.table.core_of(shard) != self.core {
            return Loaded::NotMine;
        }
        let large = (value.len() >= LARGE_VALUE_BYTES).then(|| Bytes::copy_from_slice(value));
        let put = Put::new(large.as_ref().map_or(Value::Small(value), Value::collected));
        let command = Command { key, op: Op::Put(put) };
        // Rows that are loaded are not requests.
        let counters = &mut Counters::default();
        let stored = self
            .shards
            .execute_always(shard.0, place.hash, &command, self.now, counters);
        match stored {
            Reply::Stored { .. } => Loaded::Stored,
            _ => Loaded::OutOfMemory,
        }
    }

    // ---- connections ----

    /// A connection was accepted. The number names it until [`Engine::closed`].
    pub fn opened(&mut self, protocol: Protocol, peer: String) -> u32 {
        self.metrics.counters.connections_opened += 1;
        let mut session = Session::new(protocol, peer, self.now.0);
        if protocol.has_handlers() {
            session.end = End::Handled;
            session.notice = Notice::Opened(protocol);
        }
        self.sessions.add(session)
    }

    /// The connection's socket is closed and no operation on it is under way.
    pub fn closed(&mut self, id: u32) {
        if let Some(session) = self.sessions.take(id) {
            self.end_session(id, session);
        }
    }

    /// Forgets a session as soon as nothing is on its way to it any more.
    fn end_session(&mut self, id: u32, mut session: Box<Session>) {
        session.gone = true;
        session.closing = true;
        self.give_credits_back(&mut session);
        if let Blocked::Credit(link) = std::mem::replace(&mut session.blocked, Blocked::Own) {
            self.links[usize::from(link)].stop_waiting(id);
        }
        session.input = vec![];
        self.release_session(&mut session);
        self.sessions.close(id, session);
        self.settle();
    }

    /// Has the runtime look after a connection whose state it changed itself.
    pub fn needs_attention(&mut self, id: u32) {
        if let Some(session) = self.sessions.take(id) {
            self.put_back(id, session);
        }
    }

    /// Bytes came.
    #[inline]
    pub fn received(&mut self, id: u32, bytes: &[u8]) {
        self.metrics.counters.bytes_received += bytes.len() as u64;
        let Some(mut session) = self.sessions.take(id) else {
            return;
        };
        session.last_received_ms = self.now.0;
        if session.blocked == Blocked::No {
            session.arrived_ns = self.now_ns;
        }
        if session.closing || session.gone {
            self.sessions.restore(id, session);
            return;
        }
        if session.end == End::Handled {
            return self.received_for_handler(id, session, bytes);
        }
        self.take_in(id, session, bytes);
    }

    /// Decodes and executes what came, and keeps what cannot be yet.
    #[inline]
    fn take_in(&mut self, id: u32, mut session: Box<Session>, bytes: &[u8]) {
        self.slow.arrived(&mut session, self.now_ns);
        if session.input.is_empty() {
            let used = self.advance(&mut session, id, bytes, None);
            if used < bytes.len() && !session.closing {
                if session.input.capacity() == 0 {
                    session.input = self.buffers.pop().unwrap_or_default();
                }
                self.keep_input(&mut session, &bytes[used..]);
                self.check_half_sent(&mut session);
            }
        } else {
            self.keep_input(&mut session, bytes);
            self.advance_input(&mut session, id, None);
            self.check_half_sent(&mut session);
        }
        self.put_back(id, session);
        self.settle();
    }

    /// Serves what this core has for itself, and requests that have got their locks, until nothing of either is left.
    #[inline]
    fn settle(&mut self) {
        if self.unsettled {
            self.settle_all();
        }
    }

    fn settle_all(&mut self) {
        loop {
            if let Some(batch) = self.outgoing(self.core, Direction::Requests) {
                self.take_requests(self.core, batch);
            } else if let Some(batch) = self.outgoing(self.core, Direction::Replies) {
                self.take_replies(self.core, batch);
            } else if let Some(ticket) = self.locks.next_granted() {
                self.granted(ticket);
            } else if let Some(id) = self.locks.next_wounded() {
                self.tell_of_wound(id);
            } else if let Some(link) = self.freed_links.pop() {
                self.resume_waiters(link);
            } else {
                self.unsettled = false;
                return;
            }
        }
    }

    /// The client sends no more. What it sent is still answered.
    pub fn ended(&mut self, id: u32) {
        let Some(mut session) = self.sessions.take(id) else {
            return;
        };
        session.ended = true;
        if session.end == End::Handled {
            session.tell();
        } else if session.blocked == Blocked::No {
            session.closing = true;
        }
        self.put_back(id, session);
    }

    /// The connection broke. Nothing more is sent.
    pub fn failed(&mut self, id: u32) {
        let Some(mut session) = self.sessions.take(id) else {
            return;
        };
        session.closing = true;
        session.gone = true;
        session.tell();
        // Bytes that a send is under way with must keep their place until it is done.
        session.output.filling.clear(0);
        self.put_back(id, session);
    }

    /// The socket took bytes of the connection's output.
    #[inline]
    pub fn sent(&mut self, id: u32, bytes: usize) {
        self.metrics.counters.bytes_sent += bytes as u64;
        let Some(mut session) = self.sessions.take(id) else {
            return;
        };
        session.last_sent_ms = self.now.0;
        let mut more = session.closing || session.paused || session.shuts;
        if let Some(buffer) = session.output.sent(bytes) {
            // A large one was charged, and is gone.
            more |= buffer.capacity() > REUSED_BYTES_MAX / 2;
            self.keep_buffer(buffer);
        }
        self.resume_own(&mut session, id);
        if session.wants_room {
            session.wants_room = false;
            session.tell();
            more = true;
        }
        self.slow.follow(&mut session, self.now.0);
        more |= !session.output.is_empty();
        if more {
            self.put_back(id, session);
        } else {
            self.sessions.restore(id, session);
        }
        self.settle();
    }

    fn keep_buffer(&mut self, mut buffer: Vec<u8>) {
        if self.buffers.len() < BUFFERS_KEPT_MAX && buffer.capacity() <= REUSED_BYTES_MAX {
            buffer.clear();
            self.buffers.push(buffer);
        }
    }

    /// Goes on with a session that stood at its own limits, when it is well below them again.
    #[inline]
    fn resume_own(&mut self, session: &mut Session, id: u32) {
        if session.blocked == Blocked::Own && !session.gone && self.is_below_own_limit(session) {
            session.blocked = Blocked::No;
            self.advance_input(session, id, None);
        }
    }

    /// Half the limits: going on for each reply that leaves would take the input apart byte by byte.
    #[inline]
    fn is_below_own_limit(&self, session: &Session) -> bool {
        session.in_flight() <= self.own_limits.in_flight / 2
            && session.output_bytes() <= self.own_limits.output_bytes / 2
            && !session.is_gathering()
    }

    /// Decodes from the session's own input.
    fn advance_input(&mut self, session: &mut Session, id: u32, resumed: Option<u16>) {
        let mut input = std::mem::take(&mut session.input);
        let used = self.advance(session, id, &input, resumed);
        if used == input.len() || session.closing {
            self.keep_buffer(input);
        } else {
            input.drain(..used);
            session.input = input;
        }
        if session.ended && session.blocked == Blocked::No {
            session.closing = true;
        }
    }

    /// Decodes and executes what can be; returns how much of `input` that took. `resumed`: the link whose queue the session
    /// has just left.
    fn advance(&mut self, session: &mut Session, id: u32, input: &[u8], resumed: Option<u16>) -> usize {
        self.ready_output(session);
        self.slow.works_for(session, id);
        let mut arena = std::mem::take(&mut self.arena);
        let mut at = 0;
        while (at < input.len() || session.has_collected()) && session.blocked == Blocked::No && !session.closing {
            let rest = &input[at..];
            if session.swallow > 0 {
                let skipped = session.swallow.min(rest.len());
                session.swallow -= skipped;
                at += skipped;
                continue;
            }
            arena.reset();
            if arena.allocated_bytes() > ARENA_KEPT_BYTES_MAX {
                arena = Bump::new();
            }
            let (used, go_on) = match session.incoming.take() {
                Some(incoming) => self.collect(session, id, incoming, rest, &arena, resumed),
                None => self.window(session, id, rest, &arena, resumed),
            };
            at += used;
            if !go_on {
                break;
            }
        }
        self.arena = arena;
        at
    }

    /// Gives the session a buffer to be answered in, and starts its write time if nothing waits yet.
    #[inline]
    fn ready_output(&mut self, session: &mut Session) {
        if session.output.filling.flat.capacity() == 0 {
            session.output.filling.flat = self.buffers.pop().unwrap_or_default();
        }
        if session.output.is_empty() {
            session.last_sent_ms = self.now.0;
        }
    }

    #[inline]
    fn env<'a>(&self, arena: &'a Bump, large: &'a OnceCell<Bytes>) -> Env<'a> {
        Env {
            now: self.now,
            key_bytes_max: usize::from(self.config.limits.key_size_max),
            value_bytes_max: usize::try_from(self.config.limits.item_size_max.0).unwrap_or(usize::MAX),
            shutdown_enabled: self.config.enable_shutdown,
            request_bytes_max: self.request_bytes_max,
            request_keys_max: self.config.limits.request_keys_max as usize,
            arena,
            large,
        }
    }

    /// Decodes up to [`WINDOW`] requests, asks for the memory they need, and executes them in order. Returns how much of
    /// `input` was used, and whether to go on.
    fn window(
        &mut self,
        session: &mut Session,
        id: u32,
        input: &[u8],
        arena: &Bump,
        resumed: Option<u16>,
    ) -> (usize, bool) {
        let large = OnceCell::new();
        let env = self.env(arena, &large);
        let mut planned = arrayvec::ArrayVec::<Planned<'_>, WINDOW>::new();
        let mut at = 0;
        let mut go_on = true;
        let mut last: Option<Step<'_>> = None;
        let room = self.room_for_requests(session);
        while at < input.len() && !planned.is_full() {
            if planned.len() >= room {
                if planned.is_empty() {
                    session.blocked = Blocked::Own;
                    // What it does not use, others may need.
                    self.give_credits_back(session);
                    go_on = false;
                }
                break;
            }
            let step = session.decoder.step(&input[at..], &env);
            let Decoded::Command(command, shape) = step.decoded else {
                if let Decoded::Incomplete = step.decoded {
                    go_on = false;
                } else {
                    last = Some(step);
                }
                break;
            };
            let place = self.table.place(command.key);
            let shard = self.table.shard_of(place.token).0;
            let link = self.link_of(shard);
            if let Some(link) = link {
                if !self.take_credit(link, cost_bytes(&command, &shape), resumed) {
                    self.block_on(session, id, link, resumed);
                    go_on = false;
                    break;
                }
            } else {
                self.shards.prefetch_bucket(shard, place.hash);
            }
            at += step.used;
            session.decoder = step.next;
            planned.push(Planned {
                command,
                shape,
                place,
                shard,
                link,
            });
            if step.swallow > 0 {
                self.metrics.counters.too_large += 1;
                session.swallow = step.swallow;
                break;
            }
        }
        if planned.len() > 1 {
            for request in planned.iter().filter(|request| request.link.is_none()) {
                self.shards.prefetch_item(request.shard, request.place.hash);
            }
        }
        if let Some(first) = planned.first() {
            let Command { key, op } = &first.command;
            session.pieces.begun(planned.len(), op.class(), key);
        }
        for request in &planned {
            self.run(session, id, request);
        }
        if let Some(step) = last {
            match self.special(session, id, &step, &input[at..], resumed) {
                Outcome::NotYet => go_on = false,
                Outcome::Done => at += step.used,
                Outcome::End => return (at + step.used, false),
            }
        }
        (at, go_on)
    }

    /// The link to the core that owns `shard`; `None` for this core.
    #[inline]
    fn link_of(&self, shard: u16) -> Option<u16> {
        if self.shards.own(shard) {
            return None;
        }
        Some(self.table.core_of(ShardId(shard)).0)
    }

    /// Takes credit for one request; `resumed`: the link whose queue the asking session has just left.
    #[inline]
    fn take_credit(&mut self, link: u16, cost_bytes: u32, resumed: Option<u16>) -> bool {
        self.links[usize::from(link)].take_credit(cost_bytes, resumed == Some(link))
    }

    /// Gives back credit that the session has for a request it does not begin now.
    #[cold]
    fn give_credits_back(&mut self, session: &mut Session) {
        self.unsettled |= !session.credits.is_empty();
        for (link, cost_bytes) in session.credits.drain(..) {
            self.links[usize::from(link)].release_credit(cost_bytes);
            self.freed_links.push(link);
        }
    }

    #[cold]
    fn block_on(&mut self, session: &mut Session, id: u32, link: u16, resumed: Option<u16>) {
        self.metrics.counters.credit_waits += 1;
        session.blocked = Blocked::Credit(link);
        // Who has just left the queue and does not fit yet keeps its place.
        self.links[usize::from(link)].wait(id, resumed == Some(link));
    }

    /// Executes a request here, or sends it to its owner. Credit for that was taken.
    #[inline]
    fn run(&mut self, session: &mut Session, id: u32, request: &Planned<'_>) {
        let class = request.command.op.class();
        let (shape, command) = (&request.shape, &request.command);
        if let Some(link) = request.link {
            let cost_bytes = cost_bytes(command, shape);
            let number = session.expect_reply(class, cost_bytes);
            self.metrics.counters.forwarded += 1;
            let to = Return {
                session: id,
                number,
                protocol: session.protocol,
            };
            self.links[usize::from(link)].push_command(to, request.place, request.shard, shape, command);
            return;
        }
        let shard = request.shard;
        let own = &self.links[usize::from(self.core.0)];
        if !self.locks.is_empty()
            && (self
                .locks
                .blocks(Lock::Key(request.place.hash), participant::mode_of(command))
                || own.has_outgoing(Direction::Requests))
        {
            // It waits where requests of other cores wait, and its reply comes as theirs do. What follows it must not overtake
            // it on the way there.
            let number = session.expect_reply(class, 0);
            let to = Return {
                session: id,
                number,
                protocol: session.protocol,
            };
            self.links[usize::from(self.core.0)].push_command(to, request.place, shard, shape, command);
            self.unsettled = true;
            return;
        }
        if (self.gates || shape.is_durable()) && self.may_wait(shape, request.place.hash, command) {
            return self.run_logged(session, id, request);
        }
        let (protocol, hash, arrived_ns) = (session.protocol, request.place.hash, session.arrived_ns);
        if let Some(out) = session.direct() {
            self.execute(shard, hash, command, protocol, shape, Target::Output(out));
            self.count_direct(class, arrived_ns);
        } else {
            session.hold(class, |out| {
                self.execute(shard, hash, command, protocol, shape, Target::Output(out));
            });
        }
        if protocol::copies_large(protocol) {
            // Replies of megabytes: what they take must be known before the next.
            self.recharge(session);
        }
    }

    /// Executes a command on one of this core's shards and encodes the reply; returns how many bytes of value are in that.
    #[inline]
    fn execute(
        &mut self,
        shard: u16,
        hash: u64,
        command: &Command<'_>,
        protocol: Protocol,
        shape: &Shape<'_>,
        target: Target<'_>,
    ) -> usize {
        if self.hot_keys.is_due() {
            self.hot_keys.count(command.key, hash, !command.only_reads());
        }
        let counters = &mut self.metrics.counters;
        let mut reply = self.shards.execute(shard, hash, command, self.now, counters);
        if let Some(prefixes) = &mut self.prefixes {
            prefixes.count(command, &reply);
        }
        let (out, forwarded) = match target {
            Target::Output(out) => (out, false),
            Target::Link(link) => (self.links[link].replies(), link != usize::from(self.core.0)),
        };
        if protocol::copies_large(protocol) && !memory::has_room_to_copy(&self.pool, protocol, &reply, out) {
            self.metrics.counters.out_of_memory += 1;
            reply = Reply::OutOfMemory;
        }
        self.metrics
            .operations
            .count(protocol as usize, command, &reply, forwarded);
        protocol::encode(protocol, shape, command.key, &reply, self.now, out);
        match reply {
            Reply::Found(item) => item.value.bytes().len(),
            _ => 0,
        }
    }

    /// Writes an answer that needs no shard, in its turn.
    fn answer(&mut self, session: &mut Session, answer: &[u8]) {
        let arrived_ns = session.arrived_ns;
        match session.direct() {
            Some(out) => {
                out.push(answer);
                self.count_direct(Class::Other, arrived_ns);
            }
            None => session.hold(Class::Other, |out| out.push(answer)),
        }
    }

    /// Counts a request that was answered at once; it may have waited for that since an earlier turn.
    #[inline]
    fn count_direct(&mut self, class: Class, arrived_ns: u64) {
        if arrived_ns == self.now_ns {
            self.metrics.answered(class);
        } else {
            self.metrics.answered_later(class, arrived_ns, false);
        }
    }

    fn count_bad(&mut self, session: &Session) {
        self.metrics.counters.bad_requests += 1;
        self.metrics.operations.count_refused(session.protocol as usize);
    }

    /// Does what a step that is no command asks for; `input` begins with its bytes.
    fn special(
        &mut self,
        session: &mut Session,
        id: u32,
        step: &Step<'_>,
        input: &[u8],
        resumed: Option<u16>,
    ) -> Outcome {
        match step.decoded {
            Decoded::Incomplete | Decoded::Command(..) => return Outcome::NotYet,
            Decoded::Nothing => {}
            Decoded::Answer(answer) => self.answer(session, answer),
            Decoded::Refused(answer) => {
                self.count_bad(session);
                self.metrics.counters.too_large += u64::from(step.swallow > 0);
                self.answer(session, answer);
            }
            Decoded::Transaction(txn, shape) => {
                if !self.transact(session, id, &txn, &shape, resumed) {
                    return Outcome::NotYet;
                }
            }
            Decoded::Buffered(command, shape) => match self.buffered(session, id, command, &shape, resumed) {
                Outcome::Done => {}
                other => return other,
            },
            Decoded::Broadcast(Broadcast::Flush(None), shape) => {
                if !self.flush(session, id, &shape, resumed) {
                    return Outcome::NotYet;
                }
                // A delayed one was counted when it was asked for.
                self.metrics.counters.flushes += u64::from(session.end != End::Core);
            }
            Decoded::Broadcast(broadcast, shape) => {
                // One at a time: a report is large, and all cores work for it.
                if session.is_gathering() {
                    session.blocked = Blocked::Own;
                    return Outcome::NotYet;
                }
                self.metrics.counters.flushes += u64::from(matches!(broadcast, Broadcast::Flush(_)));
                if !self.broadcast(session, id, broadcast, &shape, resumed) {
                    return Outcome::NotYet;
                }
                if session.output_bytes() > 0 || session.in_flight() > 0 {
                    session.blocked = Blocked::Own;
                }
            }
            Decoded::About(shape) => {
                let mut about = Rope::default();
                protocol::encode_about(session.protocol, &shape, &self.server_facts(), &mut about);
                self.answer(session, &about.flat);
            }
            Decoded::MemoryLimit(bytes, answer) => {
                self.pool.set_limit(bytes);
                self.answer(session, answer);
            }
            Decoded::Value(bytes) => {
                let header = &input[..step.used];
                if self.config.read_only && bytes >= LARGE_VALUE_BYTES && session.decoder.announces_writes() {
                    // Whoever owns its key will refuse it. Where a single core refuses, that core does.
                    self.metrics.counters.read_only_refusals += 1;
                    self.refuse_announced(session, header, &Reply::ReadOnly);
                    return Outcome::Done;
                }
                let Some(value) = self.announced(bytes) else {
                    self.metrics.counters.out_of_memory += 1;
                    self.refuse_announced(session, header, &Reply::OutOfMemory);
                    return Outcome::Done;
                };
                session.incoming = Some(Incoming {
                    header: header.to_vec(),
                    value,
                    bytes,
                });
                return Outcome::Done;
            }
            Decoded::Close(last_words) => {
                if !last_words.is_empty() {
                    self.count_bad(session);
                    self.answer(session, last_words);
                }
                session.closing = true;
                return Outcome::End;
            }
            Decoded::Shutdown => {
                self.stop_asked = true;
                session.closing = true;
                return Outcome::End;
            }
        }
        slow::begin_special(session, &step.decoded);
        session.decoder = step.next;
        session.swallow = step.swallow;
        Outcome::Done
    }

    /// Answers a request whose announced value is not collected but swallowed.
    #[cold]
    fn refuse_announced(&mut self, session: &mut Session, header: &[u8], why: &Reply<'_>) {
        let (arena, large) = (Bump::new(), OnceCell::new());
        let refused = session.decoder.without_value(header, why, &self.env(&arena, &large));
        if let Decoded::Refused(answer) = refused.decoded {
            self.answer(session, answer);
        }
        session.swallow = refused.swallow;
    }

    /// Goes on with a large value. Returns how much of `input` was used, and whether to go on.
    fn collect(
        &mut self,
        session: &mut Session,
        id: u32,
        mut incoming: Incoming,
        input: &[u8],
        arena: &Bump,
        resumed: Option<u16>,
    ) -> (usize, bool) {
        let taken = input.len().min(incoming.missing_bytes());
        incoming.value.extend_from_slice(&input[..taken]);
        self.shards.budget.mark_present(taken);
        if incoming.value.len() < incoming.bytes {
            session.incoming = Some(incoming);
            return (taken, false);
        }
        let value = Bytes::from(std::mem::take(&mut incoming.value));
        let large = OnceCell::new();
        let env = self.env(arena, &large);
        let step = session
            .decoder
            .with_value(&incoming.header, &value, &input[taken..], &env);
        // The shard charges the item itself.
        self.shards.budget.release(incoming.bytes);
        let outcome = match step.decoded {
            Decoded::Command(command, shape) => {
                let place = self.table.place(command.key);
                let shard = self.table.shard_of(place.token).0;
                let link = self.link_of(shard);
                match link {
                    Some(link) if !self.take_credit(link, cost_bytes(&command, &shape), resumed) => {
                        self.block_on(session, id, link, resumed);
                        Outcome::NotYet
                    }
                    _ => {
                        let planned = Planned {
                            command,
                            shape,
                            place,
                            shard,
                            link,
                        };
                        session.pieces.begun(1, planned.command.op.class(), planned.command.key);
                        self.run(session, id, &planned);
                        session.decoder = step.next;
                        session.swallow = step.swallow;
                        Outcome::Done
                    }
                }
            }
            _ => self.special(session, id, &step, &[], resumed),
        };
        match outcome {
            Outcome::NotYet => {
                self.shards.budget.charge_always(incoming.bytes);
                // Nobody else has the value yet, so this takes it back without copying.
                drop(large);
                incoming.value = Vec::from(value);
                session.incoming = Some(incoming);
                (taken, false)
            }
            Outcome::Done => (taken + step.used, true),
            Outcome::End => (taken + step.used, false),
        }
    }

    // ---- what the runtime does next ----

    /// Ends a turn: what was answered in it was answered now.
    #[inline]
    pub fn end_turn(&mut self, now_ns: u64) {
        self.time_is(now_ns);
        if self.journal.is_some() {
            self.see_whether_full();
        }
        self.metrics.end_turn(self.now_ns, now_ns);
        self.publish_if_much();
    }

    /// The next connection to look after.
    #[inline]
    pub fn attention(&mut self) -> Option<u32> {
        self.sessions.next_attention()
    }

    /// What the connection needs. Says "close" once.
    #[inline]
    pub fn wants(&mut self, id: u32) -> Wants {
        let Some(session) = self.sessions.get_mut(id) else {
            return Wants::NOTHING;
        };
        let notice = std::mem::replace(&mut session.notice, Notice::Nothing);
        if session.end == End::Caller {
            let notice = match session.is_answered() {
                true => Notice::Progress,
                false => Notice::Nothing,
            };
            return Wants {
                notice,
                ..Wants::NOTHING
            };
        }
        if session.close_told {
            return Wants::NOTHING;
        }
        let said_all = session.closing && session.in_flight() == 0 && session.output.is_empty();
        if session.gone || said_all {
            session.close_told = true;
            return Wants {
                close: true,
                notice,
                ..Wants::NOTHING
            };
        }
        let shut = session.shuts && session.output.is_empty();
        session.shuts &= !shut;
        session.paused = session.closing
            || session.ended
            || (session.blocked != Blocked::No || session.end == End::Handled)
                && session.input.len() as u64 >= self.config.limits.input_bytes_max.0;
        Wants {
            send: session.sends_now(),
            shut,
            close: false,
            read: !session.paused,
            notice,
        }
    }

    /// The pieces of output to send now, in order. They stay where they are until [`Engine::sent`] has counted them all;
    /// what is answered meanwhile waits behind them.
    #[inline]
    pub fn unsent(&mut self, id: u32) -> impl Iterator<Item = &[u8]> {
        let session = self.sessions.get_mut(id);
        session.into_iter().flat_map(|session| {
            session.output.start_sending();
            session.output.unsent()
        })
    }

    /// Bytes that this core has charged to the memory limit.
    pub fn charged_bytes(&self) -> u64 {
        self.shards.budget.charged()
    }

    /// Bytes of those that are charged for connections.
    pub fn connection_bytes(&self) -> u64 {
        self.connection_bytes as u64
    }

    /// Open connections.
    pub fn connections(&self) -> u64 {
        self.sessions.connections()
    }

    /// True when no request is under way: nothing is owed to a client or to another core.
    pub fn is_quiet(&self) -> bool {
        self.sessions
            .iter()
            .all(|(_, session)| (session.output_bytes() == 0 || session.end == End::Core) && session.in_flight() == 0)
            && self.links.iter().all(Link::is_quiet)
            && self.locks.is_empty()
            && self.is_log_quiet()
            && self.parts.is_empty()
            && self.coordinated.is_empty()
    }

    /// Closes all connections when what they sent so far is answered.
    pub fn close_all(&mut self) {
        for id in self.sessions.ids() {
            self.ended(id);
        }
    }
}

/// What came of a step.
enum Outcome {
    /// Nothing was done: it waits for more input, for credit, or for replies.
    NotYet,
    /// It is done; the next one may be.
    Done,
    /// It was the connection's last.
    End,
}

/// Where a reply is encoded to.
enum Target<'a> {
    /// A connection's output.
    Output(&'a mut Rope),
    /// The replies to another core.
    Link(usize),
}

fn count_answered(metrics: &mut Metrics, slot: &Slot) {
    metrics.answered_later(slot.class, slot.arrived_ns, slot.forwarded);
}
