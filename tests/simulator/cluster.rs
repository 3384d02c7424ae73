//! Several cores in one thread, which take turns as chance has it, with a mesh between them that is slow and short.
//!
//! Unlike `support::World`, which delivers everything at once, each queue between two cores has a length and each batch a
//! delay; a batch that finds its queue full stays with its engine. Order is kept for each pair of cores and direction, and
//! nowhere else.

use super::files::Files;
use super::mutation::Mutator;
use super::random::Random;
use super::support::{self, BEGAN_MS, Client};
use memkv::engine::Engine;
use memkv::link::{Batch, Direction};
use memkv::model::{CoreId, UnixMillis};
use memkv::protocol::Protocol;
use std::collections::{HashMap, VecDeque};

/// What the cores' surroundings are like.
#[derive(Clone, Debug)]
pub struct Surroundings {
    pub cores: u16,
    pub shards: u16,
    pub options: Vec<String>,
    /// Batches that a queue between two cores holds.
    pub queue_batches: usize,
    /// The longest that a batch usually travels, in turns, and how often in a hundred it takes ten times that.
    pub delay_turns: usize,
    pub slow_percent: usize,
    /// How often a core whose turn it is looks at a queue.
    pub look_percent: usize,
    /// The most bytes that a socket takes at once.
    pub send_bytes_max: usize,
    /// By core: how often its turn comes, against the others'.
    pub speeds: Vec<usize>,
}

#[derive(Default)]
struct Wire {
    received: Vec<u8>,
    closed: bool,
    stalled: bool,
    readable: bool,
}

#[derive(Default)]
struct Queue {
    /// Each with the turn from which on it can be taken.
    batches: VecDeque<(u64, Box<Batch>)>,
}

pub struct Cluster {
    pub engines: Vec<Engine>,
    surroundings: Surroundings,
    /// From core, to core, direction.
    queues: Vec<[Queue; 2]>,
    wires: HashMap<Client, Wire>,
    random: Random,
    mutator: Option<Mutator>,
    pub turns: u64,
    pub now_ms: u64,
    now_ns: u64,
    /// When the server was started.
    began_ms: u64,
    /// The cores' files, if they have any.
    pub files: Option<Files>,
    /// The cores' clocks do not agree to the nanosecond.
    skew_ns: Vec<u64>,
}

const DIRECTIONS: [Direction; 2] = [Direction::Requests, Direction::Replies];

impl Cluster {
    pub fn new(surroundings: Surroundings, random: Random, mutator: Option<Mutator>) -> Self {
        Self::at(0, surroundings, random, mutator)
    }

    /// One that is started so many milliseconds after the simulation began.
    pub fn at(now_ms: u64, surroundings: Surroundings, mut random: Random, mutator: Option<Mutator>) -> Self {
        let options: Vec<&str> = surroundings.options.iter().map(String::as_str).collect();
        let cores = surroundings.cores;
        let (engines, _) = support::engines_at(cores, &options, UnixMillis(BEGAN_MS + now_ms));
        Self {
            engines,
            queues: (0..usize::from(cores).pow(2)).map(|_| Default::default()).collect(),
            skew_ns: (0..cores).map(|_| random.below(20_000) as u64 + 1).collect(),
            surroundings,
            wires: HashMap::new(),
            random,
            mutator,
            turns: 0,
            now_ms,
            now_ns: 0,
            began_ms: now_ms,
            files: None,
        }
    }

    pub fn surroundings(&self) -> &Surroundings {
        &self.surroundings
    }

    /// What the clock of a core shows that began with the server.
    fn now_ns(&self, core: usize) -> u64 {
        self.now_ns + (self.now_ms - self.began_ms) * 1_000_000 + self.skew_ns[core]
    }

    pub fn begin(&mut self, core: usize) {
        self.now_ns += 1 + self.random.below(2000) as u64;
        let now_ns = self.now_ns(core);
        self.engines[core].begin_turn(now_ns, UnixMillis(BEGAN_MS + self.now_ms));
        if let Some(files) = &self.files {
            files.begin(&mut self.engines[core]);
        }
    }

    pub fn end(&mut self, core: usize) {
        let now_ns = self.now_ns(core);
        self.engines[core].end_turn(now_ns + 100);
    }

    pub fn connect(&mut self, core: u16, protocol: Protocol) -> Client {
        let id = self.engines[usize::from(core)].opened(protocol, "simulated".to_owned());
        let client = Client { core, id };
        let wire = Wire {
            readable: true,
            ..Wire::default()
        };
        self.wires.insert(client, wire);
        client
    }

    fn wire(&mut self, client: Client) -> &mut Wire {
        self.wires.get_mut(&client).expect("it was connected")
    }

    /// The engine wants to hear more of it.
    pub fn is_readable(&mut self, client: Client) -> bool {
        let wire = self.wire(client);
        wire.readable && !wire.closed
    }

    pub fn is_closed(&mut self, client: Client) -> bool {
        self.wire(client).closed
    }

    /// Bytes of the client arrive.
    pub fn send(&mut self, client: Client, bytes: &[u8]) {
        let core = usize::from(client.core);
        self.begin(core);
        self.engines[core].received(client.id, bytes);
        self.end(core);
    }

    /// The client has said all it has to say.
    pub fn finish(&mut self, client: Client) {
        let core = usize::from(client.core);
        self.begin(core);
        self.engines[core].ended(client.id);
        self.end(core);
    }

    /// The client is gone.
    pub fn vanish(&mut self, client: Client) {
        let core = usize::from(client.core);
        self.begin(core);
        self.engines[core].failed(client.id);
        self.end(core);
    }

    /// The server is to stop.
    pub fn close_all(&mut self) {
        for core in 0..self.engines.len() {
            self.begin(core);
            self.engines[core].close_all();
            self.end(core);
        }
    }

    /// Whether the client takes what it is sent.
    pub fn stall(&mut self, client: Client, stalled: bool) {
        self.wire(client).stalled = stalled;
        if !stalled && !self.is_closed(client) {
            self.engines[usize::from(client.core)].needs_attention(client.id);
        }
    }

    /// What the client has received since it last looked.
    pub fn take(&mut self, client: Client) -> Vec<u8> {
        std::mem::take(&mut self.wire(client).received)
    }

    /// A core has a turn; which one it was.
    pub fn turn(&mut self) -> usize {
        let speeds = &self.surroundings.speeds;
        let mut at = self.random.below(speeds.iter().sum());
        let mut core = 0;
        while at >= speeds[core] {
            at -= speeds[core];
            core += 1;
        }
        self.turn_of(core);
        core
    }

    fn turn_of(&mut self, core: usize) {
        self.turns += 1;
        self.begin(core);
        if let Some(files) = &mut self.files {
            files.take(core, self.turns, &mut self.engines[core]);
        }
        for (other, direction) in self.in_some_order(core) {
            self.deliver(other, core, direction);
        }
        if self.random.chance(1) {
            self.engines[core].free_spare_buffers();
        }
        self.look_after(core);
        if let Some(files) = &mut self.files {
            files.give(core, self.turns, &mut self.engines[core]);
        }
        for (other, direction) in self.in_some_order(core) {
            self.collect(core, other, direction);
        }
        self.end(core);
        if let Some(files) = &mut self.files {
            files.step(self.turns);
        }
    }

    /// The logs are ended, in order.
    pub fn end_files(&mut self) {
        for core in 0..self.engines.len() {
            self.begin(core);
            if let Some(files) = &mut self.files {
                files.end(core, self.turns, &mut self.engines[core]);
            }
            self.end(core);
        }
    }

    /// Only files are looked after.
    pub fn turn_of_files(&mut self) {
        self.turns += 1;
        if let Some(files) = &mut self.files {
            files.step(self.turns);
            for (core, engine) in self.engines.iter_mut().enumerate() {
                files.take(core, self.turns, engine);
            }
        }
    }

    fn in_some_order(&mut self, core: usize) -> Vec<(usize, usize)> {
        let others = (0..self.engines.len()).filter(|other| *other != core);
        let mut queues: Vec<(usize, usize)> = others.flat_map(|other| [(other, 0), (other, 1)]).collect();
        self.random.shuffle(&mut queues);
        queues
    }

    fn queue(&mut self, from: usize, to: usize, direction: usize) -> &mut Queue {
        let cores = self.engines.len();
        &mut self.queues[from * cores + to][direction]
    }

    fn deliver(&mut self, from: usize, to: usize, direction: usize) {
        let turns = self.turns;
        while self.random.chance(self.surroundings.look_percent) {
            if direction == 0 && self.engines[to].is_log_full() {
                // They wait where they are.
                return;
            }
            let queue = self.queue(from, to, direction);
            if queue.batches.front().is_none_or(|(due, _)| *due > turns) {
                return;
            }
            let Some((_, batch)) = queue.batches.pop_front() else {
                return;
            };
            let from = CoreId(from as u16);
            match DIRECTIONS[direction] {
                Direction::Requests => self.engines[to].requests(from, batch),
                Direction::Replies => self.engines[to].replies(from, batch),
            }
        }
    }

    fn collect(&mut self, from: usize, to: usize, direction: usize) {
        let Surroundings {
            queue_batches,
            look_percent,
            ..
        } = self.surroundings;
        if self.queue(from, to, direction).batches.len() >= queue_batches || !self.random.chance(look_percent) {
            return;
        }
        let Some(mut batch) = self.engines[from].outgoing(CoreId(to as u16), DIRECTIONS[direction]) else {
            return;
        };
        if let Some(mutator) = &mut self.mutator {
            let back = mutator.pass(from, to, DIRECTIONS[direction], &mut batch);
            if let Some((back_direction, injected)) = back {
                self.enqueue(to, from, back_direction, injected);
            }
        }
        if !batch.rope.is_empty() {
            self.enqueue(from, to, DIRECTIONS[direction], batch);
        }
    }

    fn enqueue(&mut self, from: usize, to: usize, direction: Direction, batch: Box<Batch>) {
        let mut delay = self.random.below(self.surroundings.delay_turns + 1);
        if self.random.chance(self.surroundings.slow_percent) {
            delay *= 10;
        }
        let due = self.turns + delay as u64;
        let direction = usize::from(direction == Direction::Replies);
        self.queue(from, to, direction).batches.push_back((due, batch));
    }

    fn look_after(&mut self, core: usize) {
        let mut listed = vec![];
        while let Some(id) = self.engines[core].attention() {
            listed.push(id);
        }
        for id in listed {
            let client = Client { core: core as u16, id };
            let room = 1 + self.random.below(self.surroundings.send_bytes_max);
            let engine = &mut self.engines[core];
            let wants = engine.wants(id);
            let Some(wire) = self.wires.get_mut(&client) else {
                continue;
            };
            if wants.close {
                wire.closed = true;
                engine.closed(id);
                continue;
            }
            wire.readable = wants.read;
            if wants.send && !wire.stalled {
                let mut bytes = engine.unsent(id).collect::<Vec<_>>().concat();
                // A large value would take for ever.
                bytes.truncate(room + bytes.len() / 8);
                engine.sent(id, bytes.len());
                wire.received.extend_from_slice(&bytes);
            }
        }
    }

    pub fn charged_bytes(&self) -> Vec<u64> {
        self.engines.iter().map(Engine::charged_bytes).collect()
    }

    /// Batches between the cores, and what the cores have not handed over.
    pub fn is_empty(&self) -> bool {
        let cores = self.engines.len();
        let no_outgoing = |from: usize| {
            let engine = &self.engines[from];
            (0..cores)
                .flat_map(|to| DIRECTIONS.map(|direction| (to, direction)))
                .all(|(to, direction)| !engine.has_outgoing(CoreId(to as u16), direction))
        };
        self.queues.iter().flatten().all(|queue| queue.batches.is_empty()) && (0..cores).all(no_outgoing)
    }
}
