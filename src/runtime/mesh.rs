//! Channels between cores: for each pair and direction one queue of requests, one of replies, one of sockets.
//!
//! What is in a queue is a batch: all that one core has for another in one turn. A queue is short and never lost from: what
//! finds it full stays with the engine, grows there, and is bounded by the engine's credits. Nobody waits: a core looks at
//! its queues in each turn, and before it sleeps it says so, so that a sender knows to ring.

use crate::engine::Engine;
use crate::link::{Batch, Direction};
use crate::model::CoreId;
use crate::protocol::Protocol;
use rtrb::{Consumer, Producer, RingBuffer};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};

/// Batches that a queue holds. One is enough to be correct; some more keep a core from waiting for its peer's turn.
const QUEUE_BATCHES: usize = 16;
/// Accepted sockets on their way to another core. When there is no room they stay where they were accepted.
const QUEUE_SOCKETS: usize = 64;

/// What other cores see of a core.
#[derive(Debug)]
pub(super) struct Peer {
    sleeping: AtomicBool,
    /// An eventfd: written to when the core must wake.
    doorbell: OwnedFd,
    /// Connections it serves, to spread new ones.
    pub(super) connections: AtomicU32,
}

impl Peer {
    pub(super) fn new() -> std::io::Result<Self> {
        Ok(Self {
            sleeping: AtomicBool::new(false),
            doorbell: super::net::new_eventfd()?,
            connections: AtomicU32::new(0),
        })
    }

    /// Another descriptor of the doorbell.
    pub(super) fn doorbell(&self) -> std::io::Result<OwnedFd> {
        self.doorbell.try_clone()
    }

    /// Wakes the core whether it says that it sleeps or not.
    pub(super) fn ring(&self) {
        super::net::signal_eventfd(&self.doorbell);
    }

    fn ring_if_sleeping(&self) {
        // Pairs with the fence in `Mesh::fall_asleep`: either this sees the flag, or the sleeper sees what was queued.
        fence(Ordering::SeqCst);
        if self.sleeping.load(Ordering::Relaxed) {
            self.ring();
        }
    }
}

/// A socket accepted by one core for another.
#[derive(Debug)]
pub(super) struct Handoff {
    pub(super) socket: OwnedFd,
    pub(super) protocol: Protocol,
}

/// The ends of a queue of batches. `wants_room`: the sender found it full and asks to be woken when it is not.
struct Sender {
    queue: Producer<Box<Batch>>,
    wants_room: Arc<AtomicBool>,
}

struct Receiver {
    queue: Consumer<Box<Batch>>,
    wants_room: Arc<AtomicBool>,
}

fn queue() -> (Sender, Receiver) {
    let (producer, consumer) = RingBuffer::new(QUEUE_BATCHES);
    let wants_room = Arc::new(AtomicBool::new(false));
    let sender = Sender {
        queue: producer,
        wants_room: wants_room.clone(),
    };
    let receiver = Receiver {
        queue: consumer,
        wants_room,
    };
    (sender, receiver)
}

/// Everything between this core and one other.
struct Port {
    requests_out: Sender,
    replies_out: Sender,
    sockets_out: Producer<Handoff>,
    requests_in: Receiver,
    replies_in: Receiver,
    sockets_in: Consumer<Handoff>,
}

/// One core's ports to all others.
pub(super) struct Mesh {
    core: CoreId,
    /// `None` at the core's own place.
    ports: Vec<Option<Port>>,
    peers: Arc<Vec<Peer>>,
}

/// The ports of all cores, connected.
#[expect(clippy::needless_range_loop, reason = "each pair of places is filled from both ends")]
pub(super) fn build(peers: &Arc<Vec<Peer>>) -> Vec<Mesh> {
    let cores = peers.len();
    let mut ports: Vec<Vec<Option<Port>>> = (0..cores).map(|_| (0..cores).map(|_| None).collect()).collect();
    for first in 0..cores {
        for second in first + 1..cores {
            let ((requests_a, requests_b), (replies_a, replies_b)) = (queue(), queue());
            let ((requests_c, requests_d), (replies_c, replies_d)) = (queue(), queue());
            let (sockets_a, sockets_b) = RingBuffer::new(QUEUE_SOCKETS);
            let (sockets_c, sockets_d) = RingBuffer::new(QUEUE_SOCKETS);
            ports[first][second] = Some(Port {
                requests_out: requests_a,
                replies_out: replies_a,
                sockets_out: sockets_a,
                requests_in: requests_d,
                replies_in: replies_d,
                sockets_in: sockets_d,
            });
            ports[second][first] = Some(Port {
                requests_out: requests_c,
                replies_out: replies_c,
                sockets_out: sockets_c,
                requests_in: requests_b,
                replies_in: replies_b,
                sockets_in: sockets_b,
            });
        }
    }
    ports
        .into_iter()
        .enumerate()
        .map(|(core, ports)| Mesh {
            core: CoreId(core as u16),
            ports,
            peers: peers.clone(),
        })
        .collect()
}

impl Mesh {
    /// Gives the engine all that other cores sent, and `adopt` the sockets. `epoch`: that of all cores' logs.
    pub(super) fn receive(
        &mut self,
        engine: &mut Engine,
        epoch: &AtomicU64,
        mut adopt: impl FnMut(&mut Engine, Handoff),
    ) {
        for (core, port) in self.ports.iter_mut().enumerate() {
            let Some(port) = port else { continue };
            let peer = &self.peers[core];
            let core = CoreId(core as u16);
            // They wait where they are while too much waits for the disk.
            while !engine.is_log_full()
                && let Ok(batch) = port.requests_in.queue.pop()
            {
                engine.requests(core, batch);
                port.requests_in.tell_room(peer);
            }
            while let Ok(batch) = port.replies_in.queue.pop() {
                // It may tell of an epoch that has begun since this turn did. Requests need no such care: who sends them has said
                // before, on the same queue, which epoch it is in.
                engine.set_epoch(epoch.load(Ordering::SeqCst));
                engine.replies(core, batch);
                port.replies_in.tell_room(peer);
            }
            while let Ok(handoff) = port.sockets_in.pop() {
                adopt(engine, handoff);
            }
        }
    }

    /// Sends what the engine has for other cores, as far as there is room.
    pub(super) fn send(&mut self, engine: &mut Engine) {
        for (core, port) in self.ports.iter_mut().enumerate() {
            let Some(port) = port else { continue };
            let to = CoreId(core as u16);
            let requests = port.requests_out.send(engine, to, Direction::Requests);
            let replies = port.replies_out.send(engine, to, Direction::Replies);
            if requests || replies {
                self.peers[core].ring_if_sleeping();
            }
        }
    }

    /// Hands a socket to another core; gives it back when there is no room.
    pub(super) fn hand_off(&mut self, to: CoreId, handoff: Handoff) -> Result<(), Handoff> {
        let Some(port) = &mut self.ports[usize::from(to.0)] else {
            return Err(handoff);
        };
        port.sockets_out.push(handoff).map_err(|error| match error {
            rtrb::PushError::Full(handoff) => handoff,
        })?;
        self.peers[usize::from(to.0)].ring_if_sleeping();
        Ok(())
    }

    /// Nothing has come, and nothing could be sent that was not.
    pub(super) fn is_quiet(&self, engine: &Engine) -> bool {
        self.ports.iter().enumerate().all(|(core, port)| {
            let Some(port) = port else { return true };
            let to = CoreId(core as u16);
            (port.requests_in.queue.is_empty() || engine.is_log_full())
                && port.replies_in.queue.is_empty()
                && port.sockets_in.is_empty()
                && (port.requests_out.queue.is_full() || !engine.has_outgoing(to, Direction::Requests))
                && (port.replies_out.queue.is_full() || !engine.has_outgoing(to, Direction::Replies))
        })
    }

    /// Says that this core sleeps from now on. It may only do so if it [`Mesh::is_quiet`] afterwards.
    pub(super) fn fall_asleep(&self) {
        self.me().sleeping.store(true, Ordering::Relaxed);
        // Pairs with the fence in `Peer::ring_if_sleeping`.
        fence(Ordering::SeqCst);
    }

    /// Says that this core is awake.
    pub(super) fn wake_up(&self) {
        self.me().sleeping.store(false, Ordering::Relaxed);
    }

    /// What cores see of each other.
    pub(super) fn peers(&self) -> &[Peer] {
        &self.peers
    }

    /// What other cores see of this one.
    pub(super) fn me(&self) -> &Peer {
        &self.peers[usize::from(self.core.0)]
    }

    /// This core.
    pub(super) fn core(&self) -> CoreId {
        self.core
    }
}

impl Sender {
    fn send(&mut self, engine: &mut Engine, to: CoreId, direction: Direction) -> bool {
        if !engine.has_outgoing(to, direction) {
            return false;
        }
        if self.queue.is_full() {
            self.wants_room.store(true, Ordering::Relaxed);
            // Pairs with the fence in `tell_room`: either the receiver sees the wish, or this sees the room.
            fence(Ordering::SeqCst);
            if self.queue.is_full() {
                return false;
            }
        }
        let Some(batch) = engine.outgoing(to, direction) else {
            return false;
        };
        self.queue
            .push(batch)
            .expect("there was room, and only this end fills it");
        true
    }
}

impl Receiver {
    fn tell_room(&self, peer: &Peer) {
        fence(Ordering::SeqCst);
        if self.wants_room.load(Ordering::Relaxed) && self.wants_room.swap(false, Ordering::Relaxed) {
            peer.ring_if_sleeping();
        }
    }
}
