//! What one generator thread does between the sockets: it fills send buffers with requests and checks the replies.
//!
//! Nothing here touches a socket; [`crate::io`] moves the bytes.

mod multiplexed;
mod txn;

use crate::protocol::{Entry, Item, KeyList, MultiReply, Parsed, Protocol, Reply, Session, TxnState, http};
use crate::stats::{ErrorKind, Tally};
use crate::workload::{Command, KeyChooser, Population, Ratio, Rng, TxnSpec};
use std::collections::HashSet;
use std::net::TcpStream;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};

/// Requests a connection keeps in flight at least while it preloads, so that preloading is quick at pipeline 1 too.
const PRELOAD_WINDOW: usize = 64;
/// A preloading connection stops filling its send buffer at this many bytes.
const PRELOAD_BYTES: usize = 64 << 10;

/// Nanoseconds of the monotonic clock.
#[inline(always)]
pub fn now_ns() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a valid timespec on the stack; the clock exists on every Linux.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// The stages of a run, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Phase {
    /// Every key is written once.
    Preload = 0,
    /// The workload runs and is not measured.
    WarmUp = 1,
    /// The workload runs and is measured.
    Measure = 2,
    /// Nothing new is sent; replies under way are awaited.
    Drain = 3,
}

/// What a worker tells the thread that watches over the run; only the worker writes.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct Progress {
    /// Replies received since the start, whatever they said.
    pub replies: AtomicU64,
    /// Requests answered in the measured window.
    pub measured: AtomicU64,
    /// Set once the worker's part of the preload is done.
    pub preloaded: AtomicBool,
    /// Set once the worker has ended.
    pub ended: AtomicBool,
}

/// What all threads of a run share.
#[derive(Debug)]
pub struct Shared {
    phase: AtomicU8,
    /// One per worker.
    pub progress: Box<[Progress]>,
}

impl Shared {
    /// State for this many workers, in the first phase.
    pub fn new(workers: usize) -> Self {
        Shared {
            phase: AtomicU8::new(Phase::Preload as u8),
            progress: (0..workers).map(|_| Progress::default()).collect(),
        }
    }

    /// The current phase.
    pub fn phase(&self) -> Phase {
        match self.phase.load(Ordering::Acquire) {
            0 => Phase::Preload,
            1 => Phase::WarmUp,
            2 => Phase::Measure,
            _ => Phase::Drain,
        }
    }

    /// Moves all workers on to `phase`.
    pub fn enter(&self, phase: Phase) {
        self.phase.store(phase as u8, Ordering::Release);
    }
}

/// How strictly values are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VerifyValues {
    /// The length and the first eight bytes, which no other key's value has.
    Prefix,
    /// Every byte.
    Full,
    /// Nothing: for a server that does not keep values.
    Off,
}

/// What a worker needs to know of the run.
#[derive(Debug, Clone)]
pub struct WorkerConfig {
    /// Requests in flight per connection.
    pub pipeline: usize,
    /// The mix of commands.
    pub ratio: Ratio,
    /// Keys per get; 1 for plain gets.
    pub multi_get: usize,
    /// Entries per set; 1 for plain sets.
    pub multi_set: usize,
    /// What the transactions are, if every request is one.
    pub txn: Option<TxnSpec>,
    /// How strictly values are compared.
    pub verify: VerifyValues,
    /// Whether to write every key before the workload.
    pub preload: bool,
    /// Seed of the sequence of requests.
    pub seed: u64,
    /// Open loop: requests per second of this worker, and the offset of its first request in nanoseconds.
    pub rate: Option<(f64, f64)>,
    /// Answered requests in the measured window after which the worker stops.
    pub count: Option<u64>,
    /// Length of the intervals that statistics are kept for, in nanoseconds.
    pub interval_ns: u64,
    /// Whether to look for replies all the time instead of sleeping until they come.
    pub spin: bool,
}

/// A command and a key: the command in the top eight bits, the key below.
#[derive(Debug, Clone, Copy, Default)]
struct Tag(u64);

const TAG_SHIFT: u32 = 56;

impl Tag {
    #[inline(always)]
    fn new(command: Command, key: u64) -> Self {
        Tag((command as u64) << TAG_SHIFT | key)
    }

    #[inline(always)]
    fn command(self) -> Command {
        Command::ALL[(self.0 >> TAG_SHIFT) as usize]
    }

    #[inline(always)]
    fn key(self) -> u64 {
        self.0 & ((1 << TAG_SHIFT) - 1)
    }
}

/// A request that was sent, or queued for sending, and not answered.
#[derive(Debug, Clone, Copy, Default)]
struct Flight {
    /// When latency begins: the moment it was queued, or the moment the open loop meant to send it.
    start_ns: u64,
    /// The command, and the key unless there are several.
    tag: Tag,
}

impl Flight {
    #[inline(always)]
    fn new(command: Command, key: u64, start_ns: u64) -> Self {
        Flight {
            start_ns,
            tag: Tag::new(command, key),
        }
    }
}

/// What a request in flight is about, if it is about several keys.
#[derive(Debug, Default)]
struct Batch {
    /// Its operations, each on one key.
    operations: Vec<Tag>,
    /// Which request of a transaction it is.
    state: TxnState,
    /// Operations before this one have been read, or read nothing.
    unread: usize,
    /// A part of the reply said that the transaction failed, or was wrong; this has been counted.
    failed: bool,
    /// How often the transaction failed before because a key had changed.
    retries: u64,
}

/// One connection: its socket, its requests in flight, what is to be sent and what was received in part.
#[derive(Debug)]
pub struct Connection<P: Protocol> {
    /// The socket, non-blocking; `None` once lost.
    pub socket: Option<TcpStream>,
    /// Bytes to send.
    pub out: Vec<u8>,
    /// The front of a reply whose rest has not arrived.
    carry: Vec<u8>,
    /// A ring; its length is a power of two.
    flights: Box<[Flight]>,
    head: usize,
    len: usize,
    /// Which of the worker's choosers draws the keys.
    chooser: usize,
    /// The batches in flight, one for each place in the ring; none if all requests are about one key.
    batches: Box<[Batch]>,
    /// What the protocol keeps beside all this; the places in it are those in the ring.
    session: P::Session,
    /// Good replies in the measured window.
    pub(crate) answered: u64,
}

impl<P: Protocol> Connection<P> {
    /// A connection over `socket` with room for what `config` keeps in flight, for the keys of chooser number `chooser`.
    pub fn new(socket: TcpStream, chooser: usize, config: &WorkerConfig) -> Self {
        let room = if config.preload {
            config.pipeline.max(PRELOAD_WINDOW)
        } else {
            config.pipeline
        };
        let ring = room.next_power_of_two();
        let batches = if config.multi_get > 1 || config.multi_set > 1 || config.txn.is_some() {
            ring
        } else {
            0
        };
        let mut out = Vec::with_capacity(4096);
        Connection {
            socket: Some(socket),
            session: P::Session::open(ring, &mut out),
            out,
            carry: Vec::new(),
            flights: vec![Flight::default(); ring].into(),
            head: 0,
            len: 0,
            chooser,
            batches: (0..batches).map(|_| Batch::default()).collect(),
            answered: 0,
        }
    }

    /// Requests without an answer.
    pub fn in_flight(&self) -> usize {
        self.len
    }

    #[inline(always)]
    fn front(&self) -> Option<(usize, Flight)> {
        (self.len > 0).then(|| (self.head, self.flights[self.head]))
    }

    #[inline(always)]
    fn pop(&mut self) {
        self.head = (self.head + 1) & (self.flights.len() - 1);
        self.len -= 1;
    }

    /// Adds a request and returns its place in the ring.
    #[inline(always)]
    fn push(&mut self, flight: Flight) -> usize {
        let at = (self.head + self.len) & (self.flights.len() - 1);
        self.flights[at] = flight;
        self.len += 1;
        at
    }
}

/// Where the next request comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    /// The worker's part of the keys is written.
    Preload,
    /// The mix, whenever a reply makes room.
    Closed,
    /// The mix, by the clock.
    Open,
    /// Nothing is sent.
    Nothing,
}

/// What a worker wants of the loop that moves the bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Carry on.
    Continue,
    /// Let every connection refill and send: there is a new source of requests.
    Kick,
    /// End.
    Stop,
}

/// Why a connection is of no further use.
#[derive(Debug)]
pub struct OutOfStep;

/// What a reply means for its request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    /// It was done.
    Good,
    /// It failed, which was counted.
    Bad,
    /// There is more of this reply to come.
    Part,
    /// A transaction goes on with a further request.
    GoesOn,
}

impl From<bool> for Verdict {
    #[inline(always)]
    fn from(good: bool) -> Self {
        if good { Verdict::Good } else { Verdict::Bad }
    }
}

/// Replies with the same command and the same start, which share a latency.
#[derive(Debug, Clone, Copy, Default)]
struct Run {
    start_ns: u64,
    count: u64,
}

/// The state of one generator thread.
#[derive(Debug)]
pub struct Worker<'a, P> {
    config: WorkerConfig,
    population: &'a Population,
    choosers: &'a [KeyChooser],
    /// By chooser: the places of its preload that are this worker's, and to be written yet.
    preload: Vec<Range<u64>>,
    shared: &'a Shared,
    index: usize,
    rng: Rng,
    phase: Phase,
    source: Source,
    recording: bool,
    replies: u64,
    runs: [Run; Command::ALL.len()],
    scratch: Vec<u8>,
    keys: KeyList,
    taken: HashSet<u64>,
    items: Vec<Item>,
    drain_until: u64,
    due_ns: f64,
    next_connection: usize,
    /// Statistics, by interval.
    pub tally: Tally,
    protocol: std::marker::PhantomData<P>,
}

impl<'a, P: Protocol> Worker<'a, P> {
    /// Worker number `index`, which writes the keys at the places `preload` of each of `choosers` first.
    pub fn new(
        config: WorkerConfig,
        population: &'a Population,
        choosers: &'a [KeyChooser],
        shared: &'a Shared,
        index: usize,
        preload: Vec<Range<u64>>,
    ) -> Self {
        let source = if config.preload {
            Source::Preload
        } else {
            Source::Nothing
        };
        Worker {
            rng: Rng::new(config.seed.wrapping_add((index as u64) << 32)),
            tally: Tally::new(config.interval_ns),
            config,
            population,
            choosers,
            preload,
            shared,
            index,
            phase: Phase::Preload,
            source,
            recording: false,
            replies: 0,
            runs: Default::default(),
            scratch: Vec::with_capacity(population.max_key_size()),
            keys: KeyList::default(),
            taken: HashSet::new(),
            items: Vec::new(),
            drain_until: u64::MAX,
            due_ns: 0.0,
            next_connection: 0,
            protocol: std::marker::PhantomData,
        }
    }

    fn progress(&self) -> &'a Progress {
        &self.shared.progress[self.index]
    }

    /// Whether requests are sent by the clock at the moment.
    #[inline(always)]
    pub fn is_open(&self) -> bool {
        self.source == Source::Open
    }

    /// Publishes progress and follows the phases. To be called once per turn of the loop.
    pub fn step(&mut self, now: u64, connections: &[Connection<P>]) -> Step {
        self.progress().replies.store(self.replies, Ordering::Relaxed);
        let phase = self.shared.phase();
        let idle = || connections.iter().all(|c| c.in_flight() == 0);
        match self.phase {
            _ if connections.iter().all(|c| c.socket.is_none()) => {
                self.finish(now);
                return Step::Stop;
            }
            Phase::Preload if phase == Phase::Preload => {
                let written = |c: &Connection<P>| c.socket.is_none() || self.preload[c.chooser].is_empty();
                let done = self.source != Source::Preload || (connections.iter().all(written) && idle());
                if done && !self.progress().preloaded.load(Ordering::Relaxed) {
                    self.source = Source::Nothing;
                    self.progress().preloaded.store(true, Ordering::Release);
                }
            }
            Phase::Preload if phase < Phase::Drain => {
                self.source = Source::Closed;
                if let Some((rate, offset)) = self.config.rate {
                    self.source = Source::Open;
                    self.due_ns = now as f64 + offset * 1e9 / rate;
                }
                self.phase = Phase::WarmUp;
                return Step::Kick;
            }
            Phase::WarmUp if phase == Phase::Measure => {
                self.phase = Phase::Measure;
                self.recording = true;
                self.tally.begin(now);
            }
            Phase::Measure if phase == Phase::Measure => {
                self.flush_runs(now);
                self.tally.rotate(now);
                let measured = self.tally.measured();
                self.progress().measured.store(measured, Ordering::Relaxed);
                if self.config.count.is_some_and(|count| measured >= count) {
                    self.start_drain(now);
                }
            }
            Phase::Drain if idle() || now >= self.drain_until => {
                let lost: usize = connections.iter().map(Connection::in_flight).sum();
                self.tally.error(ErrorKind::Unanswered, lost as u64, b"");
                self.finish(now);
                return Step::Stop;
            }
            Phase::Drain => {}
            _ if phase == Phase::Drain => self.start_drain(now),
            _ => {}
        }
        Step::Continue
    }

    fn start_drain(&mut self, now: u64) {
        self.finish(now);
        self.phase = Phase::Drain;
        self.source = Source::Nothing;
        // Long enough for any reply that is merely late, short enough not to keep anybody waiting for a dead server.
        self.drain_until = now + 2_000_000_000;
    }

    fn finish(&mut self, now: u64) {
        if self.recording {
            self.flush_runs(now);
            self.recording = false;
            self.tally.end(now);
            self.progress().measured.store(self.tally.measured(), Ordering::Relaxed);
        }
    }

    /// Records the failure of a connection; its requests in flight will stay without an answer.
    pub fn lost(&mut self, connection: &mut Connection<P>, kind: ErrorKind, detail: &str) {
        let Some(socket) = connection.socket.take() else { return };
        // Not only closed: an io_uring instance holds on to registered sockets, and the peer must learn of the end.
        drop(socket.shutdown(std::net::Shutdown::Both));
        self.tally.error(kind, 1, detail.as_bytes());
        self.tally
            .error(ErrorKind::Unanswered, connection.in_flight() as u64, b"");
        connection.len = 0;
        connection.out.clear();
    }

    /// Whether the loop must not sleep.
    #[inline(always)]
    pub fn spins(&self) -> bool {
        self.config.spin
    }

    /// Notes time that a loop which does not sleep spent waiting, in nanoseconds.
    #[inline(always)]
    pub fn waited(&mut self, ns: u64) {
        if self.recording {
            self.tally.waited(ns);
        }
    }

    /// When the loop has to be awake again, in nanoseconds of the monotonic clock, whatever happens on the sockets.
    #[inline(always)]
    pub fn wake_at(&self, now: u64) -> u64 {
        let regular = now + 50_000_000;
        if self.is_open() {
            regular.min(self.due_ns as u64)
        } else {
            regular
        }
    }

    /// Whether the connection can bear no more requests. It is given up when those in flight have been answered.
    #[inline(always)]
    fn spent(&mut self, connection: &mut Connection<P>) -> bool {
        let Some(why) = connection.session.spent() else {
            return false;
        };
        if connection.len == 0 {
            self.lost(connection, ErrorKind::Broken, why);
        }
        true
    }

    /// Queues requests until the connection has as many in flight as it should.
    #[inline(always)]
    pub fn refill(&mut self, connection: &mut Connection<P>, now: u64) {
        if connection.socket.is_none() {
            return;
        }
        match self.source {
            Source::Closed => {
                while connection.len < self.config.pipeline && !self.spent(connection) {
                    self.push_random(connection, now);
                }
            }
            Source::Preload => self.push_preload(connection, now),
            Source::Open | Source::Nothing => {}
        }
    }

    /// Open loop: queues the requests that are due, on connections with room, and calls `touched` with each of these.
    /// A request that finds no room stays due, so that its latency includes the wait.
    pub fn queue_due(&mut self, connections: &mut [Connection<P>], now: u64, mut touched: impl FnMut(usize)) {
        let Some((rate, _)) = self.config.rate.filter(|_| self.is_open()) else {
            return;
        };
        let gap_ns = 1e9 / rate;
        while self.due_ns <= now as f64 {
            let mut tried = 0;
            let at = loop {
                let at = self.next_connection;
                self.next_connection = if at + 1 == connections.len() { 0 } else { at + 1 };
                let connection = &mut connections[at];
                if connection.socket.is_some() && connection.len < self.config.pipeline && !self.spent(connection) {
                    break at;
                }
                tried += 1;
                if tried == connections.len() {
                    return;
                }
            };
            self.push_random(&mut connections[at], self.due_ns as u64);
            self.due_ns += gap_ns;
            touched(at);
        }
    }

    #[inline(always)]
    fn push_random(&mut self, connection: &mut Connection<P>, start_ns: u64) {
        if let Some(txn) = self.config.txn {
            return self.push_txn(connection, txn, start_ns);
        }
        let command = self.draw_command();
        let key = self.choosers[connection.chooser].pick(&mut self.rng);
        match command {
            Command::Get if self.config.multi_get > 1 => self.push_multi_get(connection, key, start_ns),
            Command::Set if self.config.multi_set > 1 => self.push_multi_set(connection, key, start_ns),
            _ => self.push_one(connection, command, key, start_ns),
        }
    }

    /// Queues a get, set or delete of one key.
    #[inline(always)]
    fn push_one(&mut self, connection: &mut Connection<P>, command: Command, key: u64, start_ns: u64) {
        let start = connection.out.len();
        let name = self.population.key(key, &mut self.scratch);
        match command {
            Command::Get => P::get(&mut connection.out, name),
            Command::Set => P::set(&mut connection.out, name, &self.population.value(key)),
            _ => P::delete(&mut connection.out, name),
        }
        let place = connection.push(Flight::new(command, key, start_ns));
        connection.session.requested(place, command, &mut connection.out, start);
    }

    /// A get, a set or a delete, by the ratio.
    #[inline(always)]
    fn draw_command(&mut self) -> Command {
        let ratio = self.config.ratio;
        let draw = self
            .rng
            .below(u64::from(ratio.get) + u64::from(ratio.set) + u64::from(ratio.delete)) as u32;
        if draw < ratio.get {
            Command::Get
        } else if draw < ratio.get + ratio.set {
            Command::Set
        } else {
            Command::Delete
        }
    }

    fn push_multi_get(&mut self, connection: &mut Connection<P>, first: u64, start_ns: u64) {
        let at = connection.push(Flight::new(Command::MultiGet, first, start_ns));
        self.draw_batch(connection, at, Command::Get, self.config.multi_get);
        P::multi_get(&mut connection.out, &self.keys);
    }

    fn push_multi_set(&mut self, connection: &mut Connection<P>, first: u64, start_ns: u64) {
        let at = connection.push(Flight::new(Command::MultiSet, first, start_ns));
        self.draw_batch(connection, at, Command::Set, self.config.multi_set);
        P::multi_set(
            &mut connection.out,
            entries(self.population, &connection.batches[at], &self.keys),
        );
    }

    /// Draws `width` keys for the batch at a place in the ring, and lists them in `keys`.
    fn draw_batch(&mut self, connection: &mut Connection<P>, at: usize, command: Command, width: usize) {
        let chooser = &self.choosers[connection.chooser];
        let batch = &mut connection.batches[at].operations;
        batch.clear();
        self.keys.clear();
        for _ in 0..width {
            let key = chooser.pick(&mut self.rng);
            batch.push(Tag::new(command, key));
            self.keys.push(self.population.key(key, &mut self.scratch));
        }
    }

    fn push_preload(&mut self, connection: &mut Connection<P>, now: u64) {
        loop {
            let full = connection.len >= connection.flights.len()
                || connection.len >= PRELOAD_WINDOW.max(self.config.pipeline)
                || connection.out.len() >= PRELOAD_BYTES;
            if full {
                break;
            }
            let Some(place) = self.preload[connection.chooser].next() else {
                break;
            };
            let key = self.choosers[connection.chooser].preloaded(place);
            self.push_one(connection, Command::Set, key, now);
        }
    }

    /// Checks the replies in `data`, which arrived at `now`.
    ///
    /// # Errors
    ///
    /// When the bytes are no reply to the requests in flight; the connection must be closed.
    #[inline(always)]
    pub fn received(&mut self, connection: &mut Connection<P>, data: &[u8], now: u64) -> Result<(), OutOfStep> {
        if connection.carry.is_empty() {
            let used = self.consume(connection, data, now)?;
            if used < data.len() {
                connection.carry.extend_from_slice(&data[used..]);
            }
        } else {
            let mut carry = std::mem::take(&mut connection.carry);
            carry.extend_from_slice(data);
            let used = self.consume(connection, &carry, now)?;
            carry.copy_within(used.., 0);
            carry.truncate(carry.len() - used);
            connection.carry = carry;
        }
        Ok(())
    }

    #[inline(always)]
    fn consume(&mut self, connection: &mut Connection<P>, data: &[u8], now: u64) -> Result<usize, OutOfStep> {
        if P::Session::MULTIPLEXED {
            return self.consume_frames(connection, data, now);
        }
        let mut used = 0;
        while used < data.len() {
            let rest = &data[used..];
            let Some((at, flight)) = connection.front() else {
                self.tally.error(ErrorKind::Malformed, 1, &rest[..rest.len().min(40)]);
                return Err(OutOfStep);
            };
            let (command, key) = (flight.tag.command(), flight.tag.key());
            let parsed = match command {
                Command::MultiGet => self.multi_reply(&connection.batches[at].operations, rest),
                Command::Txn => self.txn_reply(&mut connection.batches[at], rest),
                _ => {
                    let parsed = match command {
                        Command::MultiSet => P::multi_set_reply(connection.batches[at].operations.len(), rest),
                        _ => P::reply(command, self.population.key_len(key), rest),
                    };
                    match parsed {
                        Parsed::Done(reply, len) => Parsed::Done(self.check(key, reply).into(), len),
                        Parsed::Incomplete => Parsed::Incomplete,
                        Parsed::Malformed => Parsed::Malformed,
                    }
                }
            };
            match parsed {
                Parsed::Done(verdict, len) => {
                    used += len;
                    if verdict == Verdict::Part {
                        continue;
                    }
                    connection.pop();
                    self.replies += 1;
                    if verdict == Verdict::GoesOn {
                        self.go_on(connection, at, flight.start_ns);
                    } else if verdict == Verdict::Good {
                        self.good(connection, flight, now);
                    }
                }
                Parsed::Incomplete => break,
                Parsed::Malformed => {
                    self.tally.error(ErrorKind::Malformed, 1, &rest[..rest.len().min(40)]);
                    return Err(OutOfStep);
                }
            }
        }
        self.end_batch(used, now);
        Ok(used)
    }

    /// Records the latency of a request that got a good reply.
    #[inline(always)]
    fn good(&mut self, connection: &mut Connection<P>, flight: Flight, now: u64) {
        if !self.recording {
            return;
        }
        connection.answered += 1;
        let command = flight.tag.command();
        let run = &mut self.runs[command as usize];
        if run.start_ns == flight.start_ns {
            run.count += 1;
        } else {
            self.tally.record(command, now.saturating_sub(run.start_ns), run.count);
            *run = Run {
                start_ns: flight.start_ns,
                count: 1,
            };
        }
    }

    /// Notes the end of what arrived at `now`.
    #[inline(always)]
    fn end_batch(&mut self, used: usize, now: u64) {
        if self.recording {
            // The runs end with the batch: the next one arrives at another time.
            self.tally.bytes_received(used as u64);
            self.flush_runs(now);
        }
    }

    #[inline(always)]
    fn flush_runs(&mut self, now: u64) {
        for command in Command::ALL {
            let run = std::mem::take(&mut self.runs[command as usize]);
            if run.count > 0 {
                self.tally.record(command, now.saturating_sub(run.start_ns), run.count);
            }
        }
    }

    /// Whether the reply is a good one for `key`; counts it otherwise.
    #[inline(always)]
    fn check(&mut self, key: u64, reply: Reply<'_>) -> bool {
        match reply {
            Reply::Hit { key: echoed, value } => {
                if let Some(echoed) = echoed
                    && self.population.key(key, &mut self.scratch) != echoed
                {
                    self.tally.error(ErrorKind::WrongKey, 1, echoed);
                    return false;
                }
                self.check_value(key, value)
            }
            Reply::Chunked(chunks) => self.check_value(key, &http::joined(chunks)),
            Reply::Miss => {
                self.tally.misses(self.recording as u64);
                true
            }
            Reply::Stored | Reply::Deleted | Reply::NotFound => true,
            Reply::NotStored => {
                self.tally.error(ErrorKind::NotStored, 1, b"");
                false
            }
            Reply::Refused(text) => {
                self.tally.error(ErrorKind::Refused, 1, text);
                false
            }
        }
    }

    /// Whether `value`, as a reply writes it, is that of `key`; counts it otherwise.
    #[inline(always)]
    fn check_value(&mut self, key: u64, value: &[u8]) -> bool {
        if self.config.verify == VerifyValues::Off {
            self.tally.hits(self.recording as u64);
            return true;
        }
        let value = &*P::plain(value);
        let expected = self.population.value(key);
        let kind = if value.len() != expected.len() {
            ErrorKind::WrongLength
        } else if !expected.head_matches(value)
            || (self.config.verify == VerifyValues::Full && !expected.matches(value))
        {
            ErrorKind::WrongValue
        } else {
            self.tally.hits(self.recording as u64);
            return true;
        };
        let detail = format!("{} bytes instead of {}", value.len(), expected.len());
        self.tally.error(kind, 1, detail.as_bytes());
        false
    }

    fn multi_reply(&mut self, gets: &[Tag], rest: &[u8]) -> Parsed<Verdict> {
        let mut items = std::mem::take(&mut self.items);
        let parsed = match P::multi_reply(gets.len(), rest, &mut items) {
            Parsed::Done(MultiReply::Items, len) => {
                // Servers answer in the order of the request, with or without a place for keys they do not have.
                let (mut good, mut position, mut found) = (true, 0, 0);
                for item in &items {
                    let echoed = &rest[item.key.clone()];
                    while !echoed.is_empty()
                        && gets
                            .get(position)
                            .is_some_and(|get| self.population.key(get.key(), &mut self.scratch) != echoed)
                    {
                        position += 1;
                    }
                    let Some(get) = gets.get(position) else {
                        self.tally.error(ErrorKind::WrongKey, 1, echoed);
                        good = false;
                        break;
                    };
                    position += 1;
                    if let Some(value) = &item.value {
                        good &= self.check_value(get.key(), &rest[value.clone()]);
                        found += 1;
                    }
                }
                if good && self.recording {
                    self.tally.misses(gets.len() as u64 - found);
                }
                Parsed::Done(good.into(), len)
            }
            Parsed::Done(MultiReply::Refused(text), len) => {
                self.tally.error(ErrorKind::Refused, 1, text);
                Parsed::Done(Verdict::Bad, len)
            }
            Parsed::Incomplete => Parsed::Incomplete,
            Parsed::Malformed => Parsed::Malformed,
        };
        self.items = items;
        parsed
    }
}

/// The keys in `keys`, which are those of the batch, with their values.
fn entries<'k>(
    population: &'k Population,
    batch: &'k Batch,
    keys: &'k KeyList,
) -> impl Iterator<Item = Entry<'k>> + Clone {
    let tags = batch.operations.iter().zip(keys.iter());
    tags.map(|(tag, key)| Entry {
        key,
        value: population.value(tag.key()),
    })
}
