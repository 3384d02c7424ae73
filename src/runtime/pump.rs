//! The loop of one core.
//!
//! A turn: submit and collect (one system call), take in what other cores sent, hand completions to the engine, send batches
//! to other cores, queue sends. When a turn brought nothing the core polls for a while, if it may, and then sleeps in its
//! network ring: one system call submits what is queued and waits for whatever comes first. The pump is the executor's only
//! task; one that brings others (see decision 1) must let glommio's reactor share the sleep. Futures of connections that a
//! library serves are polled by the pump itself: see [`super::gateway`].

use super::filer::Filer;
use super::gateway::Gateway;
use super::memory::Watch;
use super::mesh::{Handoff, Mesh};
use super::net::{self, Accepted, Net};
use super::{Shared, Starting, allocator, host};
use crate::engine::Engine;
use crate::model::{CoreId, UnixMillis};
use crate::protocol;
use crate::wal::Done;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime};

/// The monotonic clock, and the wall clock as it was when last asked plus what has passed since.
#[derive(Clone, Copy, Debug)]
pub(super) struct Clock {
    began: Instant,
    began_wall: UnixMillis,
}

fn wall_ms() -> u64 {
    let wall = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    wall.unwrap_or_default().as_millis() as u64
}

impl Clock {
    pub(super) fn start() -> Self {
        Self {
            began: Instant::now(),
            began_wall: UnixMillis(wall_ms()),
        }
    }

    /// Nanoseconds since the start, never 0.
    fn now_ns(&self) -> u64 {
        self.began.elapsed().as_nanos() as u64 + 1
    }

    fn instant_at(&self, now_ns: u64) -> Instant {
        self.began + Duration::from_nanos(now_ns)
    }

    /// Asks the wall clock again: it may have been set, or the machine may have slept.
    fn follow_wall(&mut self) {
        self.began_wall = UnixMillis(wall_ms().saturating_sub(self.now_ns() / 1_000_000));
    }

    fn wall_at(&self, now_ns: u64) -> UnixMillis {
        UnixMillis(self.began_wall.0 + now_ns / 1_000_000)
    }

    pub(super) fn wall(&self) -> UnixMillis {
        self.wall_at(self.now_ns())
    }
}

/// How long to poll before sleeping: as long as it has paid lately.
struct Spin {
    max_ns: u64,
    now_ns: u64,
}

impl Spin {
    /// Work came while polling, or would have within the most there is to poll.
    fn paid(&mut self) {
        self.now_ns = self.max_ns;
    }

    fn did_not_pay(&mut self) {
        self.now_ns /= 2;
    }
}

/// Lets go of freed memory when a core has nothing to do after it had, or is asked to. Not more often: it looks at much of the heap.
#[derive(Default)]
struct Tidier {
    /// How often it was asked to when it last did, and when it may again.
    asked: u32,
    rests_until_ns: u64,
    /// Bytes received and sent when it last did, and at the last look.
    tidied_bytes: u64,
    seen_bytes: u64,
    idle_since_ns: u64,
}

impl Tidier {
    /// Traffic of less than this leaves nothing worth looking for.
    const TRAFFIC_BYTES_MIN: u64 = 1 << 20;
    const IDLE_NS_MIN: u64 = 1_000_000_000;
    /// It takes no more than this part of a core's time, however often it is asked for.
    const REST_FACTOR: u64 = 20;

    fn idle(&mut self, engine: &mut Engine, now_ns: u64) {
        let counters = &engine.metrics.counters;
        let bytes = counters.bytes_received + counters.bytes_sent + counters.served_for_others;
        if bytes != self.seen_bytes {
            (self.seen_bytes, self.idle_since_ns) = (bytes, now_ns);
        }
        let had_traffic = bytes.wrapping_sub(self.tidied_bytes) >= Self::TRAFFIC_BYTES_MIN;
        if had_traffic && now_ns - self.idle_since_ns >= Self::IDLE_NS_MIN {
            self.tidied_bytes = bytes;
            engine.free_spare_buffers();
            allocator::let_go();
        }
    }

    fn asked(&mut self, by: &Watch, engine: &mut Engine, clock: &Clock) {
        let began_ns = clock.now_ns();
        if began_ns < self.rests_until_ns {
            return;
        }
        self.asked = by.asked();
        engine.free_spare_buffers();
        allocator::let_go();
        by.let_go();
        let took_ns = clock.now_ns() - began_ns;
        self.rests_until_ns = began_ns + took_ns * Self::REST_FACTOR;
    }
}

/// How often a core that has nothing else to do goes on with work that needs no request. It does not do so all the time:
/// somebody else may need the CPU.
const BACKGROUND_PERIOD: Duration = Duration::from_millis(1);

/// How often the process looks at its own CPU time and memory, for statistics.
const PROCESS_FACTS_PERIOD_NS: u64 = 1_000_000_000;

/// Tells the engine what became of its files.
fn take_done(engine: &mut Engine, files: &mut Option<Filer>, net: &mut Net) {
    while let Some(done) = files.as_mut().and_then(|filer| filer.poll(net)) {
        if let Done::Failed { why, .. } = &done {
            log::error!("{why}");
        }
        engine.disk_done(done);
    }
}

/// Does what the engine wants of its files.
fn give_jobs(engine: &mut Engine, files: &mut Option<Filer>, net: &mut Net, shared: &Shared) {
    let Some(filer) = files else { return };
    if let Some(epoch) = engine.wanted_epoch() {
        shared.epoch.fetch_max(epoch, Ordering::SeqCst);
        engine.set_epoch(epoch);
    }
    while let Some(job) = engine.disk_job() {
        filer.submit(job, net);
    }
    // What could not even be begun.
    take_done(engine, files, net);
}

/// Writes the end of the log. `all_quiet`: no core has anything under way any more, but for what its disk is at.
fn end_files(engine: &mut Engine, mut files: Option<Filer>, net: &mut Net, all_quiet: bool) {
    finish_jobs(engine, &mut files, net);
    let in_order = all_quiet && engine.is_quiet();
    if let Some(filer) = &mut files
        && let Some(job) = engine.end_log(in_order)
    {
        filer.submit(job, net);
        finish_jobs(engine, &mut files, net);
    }
}

fn finish_jobs(engine: &mut Engine, files: &mut Option<Filer>, net: &mut Net) {
    while files.as_ref().is_some_and(|filer| filer.pending() > 0) {
        net.collect_written();
        take_done(engine, files, net);
    }
}

/// Runs a core until the server stops.
#[expect(
    clippy::too_many_arguments,
    reason = "the parts of a core, each of which somebody else makes"
)]
pub(super) async fn run(
    engine: Engine,
    mut net: Net,
    mut mesh: Mesh,
    shared: Arc<Shared>,
    mut clock: Clock,
    may_spin: bool,
    starting: Starting,
    mut files: Option<Filer>,
) {
    let max_ns = if may_spin {
        u64::from(engine.config().spin_us) * 1000
    } else {
        0
    };
    let mut spin = Spin { max_ns, now_ns: max_ns };
    let mut facts_at_ns = 0;
    let mut tidier = Tidier::default();
    let mut starting = Some(starting);
    let mut stopping: Option<Stopping> = None;
    let mut snapshots = shared.snapshots.load(Ordering::Relaxed);
    let mut gateway = Gateway::new(engine, shared.clone());
    let cell = gateway.engine();
    loop {
        let now_ns;
        {
            let mut engine = cell.borrow_mut();
            // What a wait has brought is served first; it has submitted all there was, too.
            if !net.has_completed() {
                net.turn();
            }
            now_ns = clock.now_ns();
            engine.begin_turn(now_ns, clock.wall_at(now_ns));
            if files.is_some() {
                // Before anything that the turn brings: what was answered in an earlier epoch was asked for before this one began.
                engine.set_epoch(shared.epoch.load(Ordering::SeqCst));
            }
            net.arm_listeners(now_ns);
            mesh.receive(&mut engine, &shared.epoch, |engine, handoff| {
                net.adopt(engine, handoff.socket, handoff.protocol);
            });
            net.dispatch(
                &mut engine,
                now_ns,
                || clock.now_ns(),
                |engine, net, accepted| {
                    accept(engine, net, &mut mesh, &shared, accepted);
                },
            );
            if files.is_some() {
                take_done(&mut engine, &mut files, &mut net);
            }
            mesh.send(&mut engine);
            net.look_after(&mut engine, &mut gateway);
        }
        while gateway.run(clock.instant_at(now_ns)) {
            let mut engine = cell.borrow_mut();
            mesh.send(&mut engine);
            net.look_after(&mut engine, &mut gateway);
        }
        {
            let mut engine = cell.borrow_mut();
            if files.is_some() {
                give_jobs(&mut engine, &mut files, &mut net, &shared);
                mesh.send(&mut engine);
                net.look_after(&mut engine, &mut gateway);
                let asked = shared.snapshots.load(Ordering::Relaxed);
                if asked != snapshots && starting.is_none() {
                    snapshots = asked;
                    engine.snapshot();
                }
            }
            engine.end_turn(clock.now_ns());
            let closed = net.take_closed();
            if closed > 0 {
                shared.connections.fetch_sub(closed, Ordering::Relaxed);
                mesh.me().connections.fetch_sub(closed, Ordering::Relaxed);
            }

            if let Some(start) = &mut starting
                && stopping.is_none()
            {
                start.step(&mut engine);
                if shared.ready.load(Ordering::Acquire) {
                    net.serve_all();
                    // It may sleep before the next turn.
                    net.arm_listeners(now_ns);
                    starting = None;
                }
            }
            if engine.stop_asked() && !shared.stop.load(Ordering::Relaxed) {
                shared.stop();
            }
            if stopping.is_none() && shared.stop.load(Ordering::Relaxed) {
                net.stop_accepting();
                stopping = Some(Stopping::new());
            }
            if let Some(stopping) = &mut stopping
                && stopping.is_done(&mut engine, &mut net, &mut gateway, &shared)
            {
                let all_quiet = usize::from(shared.quiet_cores.load(Ordering::SeqCst)) == shared.peers.len();
                end_files(&mut engine, files, &mut net, all_quiet);
                break;
            }
            shared.memory.look(now_ns);
            if shared.memory.asked() != tidier.asked {
                tidier.asked(&shared.memory, &mut engine, &clock);
            }
            if now_ns >= facts_at_ns {
                facts_at_ns = now_ns + PROCESS_FACTS_PERIOD_NS;
                clock.follow_wall();
                engine.set_process_facts(host::process_facts(shared.memory.resident_bytes()));
            }
        }
        glommio::yield_if_needed().await;
        {
            let mut engine = cell.borrow_mut();
            let is_loading = starting.as_ref().is_some_and(Starting::is_loading);
            if !is_loading && is_quiet(&mut net, &mesh, &engine) {
                let idle_since_ns = clock.now_ns();
                let mut quiet = true;
                while quiet && spin.now_ns > 0 && clock.now_ns() - idle_since_ns < spin.now_ns {
                    net.turn();
                    quiet = is_quiet(&mut net, &mesh, &engine);
                }
                if quiet {
                    tidier.idle(&mut engine, now_ns);
                    mesh.fall_asleep();
                    if is_quiet(&mut net, &mesh, &engine) && stopping.is_none() {
                        let background = engine.has_background_work().then_some(BACKGROUND_PERIOD);
                        net.wait(
                            [background, engine.disk_rest(), gateway.sleep_max()]
                                .into_iter()
                                .flatten()
                                .min(),
                        );
                    }
                    mesh.wake_up();
                }
                let idle_ns = clock.now_ns() - idle_since_ns;
                engine.metrics.counters.idle_ns += idle_ns;
                if !quiet || idle_ns < 2 * spin.max_ns {
                    spin.paid();
                } else {
                    spin.did_not_pay();
                }
            }
        }
    }
}

fn is_quiet(net: &mut Net, mesh: &Mesh, engine: &Engine) -> bool {
    net.is_quiet() && mesh.is_quiet(engine)
}

/// Gives a new connection to the core that has the fewest, unless it came to this one's own port; or refuses it.
fn accept(engine: &mut Engine, net: &mut Net, mesh: &mut Mesh, shared: &Shared, accepted: Accepted) {
    let limit = engine.config().limits.connections_max;
    if shared.connections.fetch_add(1, Ordering::Relaxed) >= limit || engine.refuses_connections() {
        shared.connections.fetch_sub(1, Ordering::Relaxed);
        engine.metrics.counters.connections_refused += 1;
        return net::refuse(&accepted.socket, &protocol::refusal(accepted.protocol));
    }
    let Accepted {
        socket,
        protocol,
        stays,
    } = accepted;
    let me = usize::from(mesh.core().0);
    let peers = mesh.peers();
    let target = if stays {
        me
    } else {
        least_busy(peers.iter().map(|peer| peer.connections.load(Ordering::Relaxed)), me)
    };
    peers[target].connections.fetch_add(1, Ordering::Relaxed);
    if target == me {
        return net.adopt(engine, socket, protocol);
    }
    if let Err(handoff) = mesh.hand_off(CoreId(target as u16), Handoff { socket, protocol }) {
        let peers = mesh.peers();
        peers[target].connections.fetch_sub(1, Ordering::Relaxed);
        peers[me].connections.fetch_add(1, Ordering::Relaxed);
        net.adopt(engine, handoff.socket, handoff.protocol);
    }
}

/// The place of the smallest number; `me` among equals.
fn least_busy(connections: impl Iterator<Item = u32>, me: usize) -> usize {
    connections
        .enumerate()
        .min_by_key(|(core, count)| (*count, *core != me))
        .map_or(me, |(core, _)| core)
}

/// The end of a server: answer what has been received, then close.
struct Stopping {
    deadline: Instant,
    turns: u32,
    closing: bool,
    said_quiet: bool,
}

/// How long a stopping server goes on answering what it has received.
const STOP_TIME_MAX: Duration = Duration::from_secs(4);
/// Turns in which requests that were on their way when the server was stopped are still read.
const STOP_TURNS: u32 = 20;

impl Stopping {
    fn new() -> Self {
        Self {
            deadline: Instant::now() + STOP_TIME_MAX,
            turns: 0,
            closing: false,
            said_quiet: false,
        }
    }

    fn is_done(&mut self, engine: &mut Engine, net: &mut Net, gateway: &mut Gateway, shared: &Shared) -> bool {
        let late = Instant::now() >= self.deadline;
        let listeners_closed = net.close_listeners();
        self.turns += 1;
        // Other cores may need this one for their last requests, so each goes on until all have nothing left.
        std::thread::yield_now();
        if self.turns > STOP_TURNS {
            // Each turn: a socket that another core handed over may come late.
            self.closing = true;
            gateway.stop();
            engine.close_all();
        }
        if self.closing && !self.said_quiet && (late || net.open() == 0 && engine.is_quiet()) {
            self.said_quiet = true;
            shared.quiet_cores.fetch_add(1, Ordering::SeqCst);
        }
        let all_quiet = usize::from(shared.quiet_cores.load(Ordering::SeqCst)) == shared.peers.len();
        late || self.said_quiet && all_quiet && listeners_closed
    }
}
