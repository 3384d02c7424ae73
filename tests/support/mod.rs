//! Several cores in one thread: engines, the channels between them, a clock that a test moves, and connections that are
//! plain byte vectors. No sockets, no threads, no waiting.

#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    reason = "shared by tests, each of which uses its part"
)]

pub mod protobuf;

use clap::Parser;
use memkv::budget::Pool;
use memkv::config::Config;
use memkv::engine::{Engine, Notice};
use memkv::link::Direction;
use memkv::model::{CoreId, UnixMillis};
use memkv::partition::RangeTable;
use memkv::protocol::Protocol;
use std::collections::HashMap;
use std::sync::Arc;

/// One client's connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Client {
    pub core: u16,
    pub id: u32,
}

#[derive(Default)]
struct Wire {
    received: Vec<u8>,
    closed: bool,
    /// The client takes nothing while this is set.
    stalled: bool,
    /// The engine wants to read it.
    readable: bool,
    /// There is no socket: requests are calls.
    calls: bool,
}

pub struct World {
    pub engines: Vec<Engine>,
    pub pool: Arc<Pool>,
    wires: HashMap<Client, Wire>,
    now_ms: u64,
    /// How many bytes a socket takes at once.
    pub send_bytes_max: usize,
    /// Batches between two cores wait for this many turns.
    pub turns: u64,
}

/// The moment at which every world begins.
pub const BEGAN_MS: u64 = 1_700_000_000_000;

/// Of the hash that spreads keys.
pub const TOKEN_SEED: u64 = 7;

/// `cores` engines with the options of a command line, and the memory limit they share.
pub fn engines(cores: u16, options: &[&str]) -> (Vec<Engine>, Arc<Pool>) {
    engines_at(cores, options, UnixMillis(BEGAN_MS))
}

/// The same, of a server that starts at another moment.
pub fn engines_at(cores: u16, options: &[&str], now: UnixMillis) -> (Vec<Engine>, Arc<Pool>) {
    let config = Config::parse_from(std::iter::once(&"memkv-tpc").chain(options));
    let table = Arc::new(RangeTable::even(TOKEN_SEED, config.shards.unwrap_or(cores), cores));
    let pool = Pool::new(config.limits.max_memory.map_or(1 << 30, |limit| limit.0));
    let config = Arc::new(config);
    let engine = |core| Engine::new(CoreId(core), table.clone(), pool.clone(), config.clone(), now);
    ((0..cores).map(engine).collect(), pool.clone())
}

impl World {
    /// `cores` cores with the options of a command line.
    pub fn new(cores: u16, options: &[&str]) -> Self {
        let (engines, pool) = engines(cores, options);
        Self {
            engines,
            pool,
            wires: HashMap::new(),
            now_ms: BEGAN_MS,
            send_bytes_max: usize::MAX,
            turns: 0,
        }
    }

    /// What is charged to the memory limit, but for connections.
    pub fn charged(&self) -> u64 {
        let charged = |engine: &Engine| engine.charged_bytes() - engine.connection_bytes();
        self.engines.iter().map(charged).sum()
    }

    /// A connection; of a protocol that has handlers, a handler that makes calls.
    pub fn connect(&mut self, core: u16, protocol: Protocol) -> Client {
        let engine = &mut self.engines[usize::from(core)];
        let calls = protocol.has_handlers();
        let id = match calls {
            true => engine.open_call(protocol, None),
            false => engine.opened(protocol, "test".to_owned()),
        };
        let client = Client { core, id };
        self.wires.insert(
            client,
            Wire {
                readable: true,
                calls,
                ..Wire::default()
            },
        );
        client
    }

    pub fn advance(&mut self, ms: u64) {
        self.pass(ms);
        self.settle();
    }

    /// Time passes. The cores see it in their next turn.
    pub fn pass(&mut self, ms: u64) {
        self.now_ms += ms;
    }

    /// The client sends bytes. Nothing happens until the next turn but their arrival.
    pub fn send(&mut self, client: Client, bytes: &[u8]) {
        let now = (self.now_ms - BEGAN_MS) * 1_000_000 + 1;
        let engine = &mut self.engines[usize::from(client.core)];
        engine.begin_turn(now, UnixMillis(self.now_ms));
        match &self.wires[&client] {
            Wire { closed: true, .. } => {}
            Wire { calls: true, .. } => engine.call(client.id, bytes),
            _ => engine.received(client.id, bytes),
        }
        engine.end_turn(now + 1000);
    }

    /// The same, but the bytes wait for so long before they are looked at, and work for them takes so long.
    pub fn send_slowly(&mut self, client: Client, bytes: &[u8], queue_ms: u64, execute_ms: u64) {
        let now = |world: &Self| (world.now_ms - BEGAN_MS) * 1_000_000 + 1;
        let (came, came_ms) = (now(self), self.now_ms);
        self.pass(queue_ms);
        let looked_at = now(self);
        self.pass(execute_ms);
        let ended = now(self);
        let engine = &mut self.engines[usize::from(client.core)];
        engine.begin_turn(came, UnixMillis(came_ms));
        engine.time_is(looked_at);
        engine.received(client.id, bytes);
        engine.end_turn(ended);
    }

    pub fn end(&mut self, client: Client) {
        self.engines[usize::from(client.core)].ended(client.id);
    }

    pub fn stall(&mut self, client: Client, stalled: bool) {
        self.wires.get_mut(&client).unwrap().stalled = stalled;
        if !stalled {
            self.engines[usize::from(client.core)].needs_attention(client.id);
        }
    }

    /// What the client has received since it last looked.
    pub fn take(&mut self, client: Client) -> Vec<u8> {
        std::mem::take(&mut self.wires.get_mut(&client).unwrap().received)
    }

    pub fn is_closed(&self, client: Client) -> bool {
        self.wires[&client].closed
    }

    pub fn is_readable(&self, client: Client) -> bool {
        self.wires[&client].readable
    }

    /// The client goes away without a word.
    pub fn drop_connection(&mut self, client: Client) {
        self.engines[usize::from(client.core)].failed(client.id);
    }

    /// One turn of every core; true when anything happened.
    pub fn turn(&mut self) -> bool {
        self.turns += 1;
        let mut any = false;
        for core in 0..self.engines.len() {
            any |= self.exchange(core);
            let now = (self.now_ms - BEGAN_MS) * 1_000_000 + 1;
            let engine = &mut self.engines[core];
            engine.begin_turn(now, UnixMillis(self.now_ms));
            any |= self.look_after(core);
            self.engines[core].end_turn(now + 1000);
        }
        any
    }

    /// Turns until nothing happens any more. Work that goes on by itself takes milliseconds, which pass.
    pub fn settle(&mut self) {
        for _ in 0..1_000_000 {
            if self.turn() {
                continue;
            }
            if !self.engines.iter().any(Engine::has_background_work) {
                return;
            }
            self.pass(1);
        }
        panic!("the cores do not come to rest");
    }

    /// Delivers what the other cores have for this one.
    fn exchange(&mut self, to: usize) -> bool {
        let mut any = false;
        for from in 0..self.engines.len() {
            if from == to {
                continue;
            }
            let (source, target) = (CoreId(from as u16), CoreId(to as u16));
            for direction in [Direction::Requests, Direction::Replies] {
                if let Some(batch) = self.engines[from].outgoing(target, direction) {
                    any = true;
                    match direction {
                        Direction::Requests => self.engines[to].requests(source, batch),
                        Direction::Replies => self.engines[to].replies(source, batch),
                    }
                }
            }
        }
        any
    }

    fn look_after(&mut self, core: usize) -> bool {
        let mut any = false;
        while let Some(id) = self.engines[core].attention() {
            let client = Client { core: core as u16, id };
            let wire = self.wires.get_mut(&client).unwrap();
            let engine = &mut self.engines[core];
            let wants = engine.wants(id);
            if wants.close {
                wire.closed = true;
                engine.closed(id);
                any = true;
                continue;
            }
            wire.readable = wants.read;
            if wants.notice == Notice::Progress
                && let Some(answer) = engine.take_answer(id)
            {
                wire.received.extend_from_slice(&answer.to_vec());
                any = true;
            }
            if wants.send && !wire.stalled {
                let mut bytes = vec![];
                for piece in engine.unsent(id) {
                    let room = self.send_bytes_max.saturating_sub(bytes.len());
                    bytes.extend_from_slice(&piece[..piece.len().min(room)]);
                }
                engine.sent(id, bytes.len());
                wire.received.extend_from_slice(&bytes);
                any = true;
            }
        }
        any
    }

    /// Sends, settles, and returns what came back.
    pub fn ask(&mut self, client: Client, bytes: &[u8]) -> Vec<u8> {
        self.send(client, bytes);
        self.settle();
        self.take(client)
    }
}
