//! One seed, from its number to its verdict.

use super::checker::{self, CALLS_MAX, Checked};
use super::client::{Actor, Asked, Common, Habits};
use super::cluster::{Cluster, Surroundings};
use super::model::{Act, Call, Held, KEYS_MAX, Op, Outcome, Said};
use super::mutation::{Mutation, Mutator};
use super::random::Random;
use super::support::TOKEN_SEED;
use memkv::engine::Engine;
use memkv::metrics::Counters;
use memkv::partition::RangeTable;
use memkv::protocol::Protocol;
use std::fmt::Write;

/// A seed is stuck when in so many steps nothing was answered.
const STEPS_MAX: usize = 20_000;

/// No more is asked when a history has so many calls. One request may be several, and there are reads and flushes at the end.
const CALLS_ASKED_MAX: usize = CALLS_MAX - 5 * KEYS_MAX;

/// Clients that vanish, and what each leaves unanswered, at most. Whether that was done is for the checker to guess, and each
/// guess doubles its work.
const VANISHING_MAX: usize = 2;
const UNANSWERED_MAX: usize = 4;

/// From here on, numbers of clients stand for the server itself.
pub const NOBODY: usize = 100;

/// What was found out about a seed.
#[derive(Debug)]
pub enum Verdict {
    Good,
    /// Some requests are never answered.
    Stuck(String),
    /// The answers contradict each other.
    NotSerializable(String),
    /// All was answered, and yet something is left.
    Left(String),
    /// The history is too tangled to be judged.
    Undecided,
    /// The server does not start again with what it left.
    NotRecovered(String),
}

/// A seed that was run.
pub struct Ran {
    pub verdict: Verdict,
    pub history: Vec<Call>,
    /// What it was like.
    pub story: String,
    pub counted: Counted,
}

/// How often things happened that a simulation should see.
#[derive(Clone, Debug, Default)]
pub struct Counted {
    pub calls: u64,
    pub steps: u64,
    pub unanswered: u64,
    pub refused: u64,
    pub vanished: u64,
    pub txns: u64,
    pub txn_retries: u64,
    pub lock_waits: u64,
    pub credit_waits: u64,
    pub expired: u64,
    pub flushes: u64,
    pub forwarded: u64,
    /// COMMITs of what was read, of the JSON-line protocol.
    pub checked_commits: u64,
    /// Of these, those that failed because a key had changed.
    pub changed: u64,
}

impl Counted {
    pub fn fields(&self) -> [(&'static str, u64); 14] {
        [
            ("calls", self.calls),
            ("steps", self.steps),
            ("unanswered", self.unanswered),
            ("refused", self.refused),
            ("vanished", self.vanished),
            ("txns", self.txns),
            ("txn_retries", self.txn_retries),
            ("lock_waits", self.lock_waits),
            ("credit_waits", self.credit_waits),
            ("expired", self.expired),
            ("flushes", self.flushes),
            ("forwarded", self.forwarded),
            ("checked_commits", self.checked_commits),
            ("changed", self.changed),
        ]
    }

    pub fn add(&mut self, other: &Counted) {
        self.calls += other.calls;
        self.steps += other.steps;
        self.unanswered += other.unanswered;
        self.refused += other.refused;
        self.vanished += other.vanished;
        self.txns += other.txns;
        self.txn_retries += other.txn_retries;
        self.lock_waits += other.lock_waits;
        self.credit_waits += other.credit_waits;
        self.expired += other.expired;
        self.flushes += other.flushes;
        self.forwarded += other.forwarded;
        self.checked_commits += other.checked_commits;
        self.changed += other.changed;
    }
}

/// A flush that was asked for before its time.
pub(super) struct Later {
    delay_ms: u64,
    invoked: (u64, u64),
    responded: (u64, u64),
}

pub(super) struct Simulation {
    pub(super) cluster: Cluster,
    pub(super) actors: Vec<Actor>,
    pub(super) common: Common,
    pub(super) random: Random,
    pub(super) history: Vec<Call>,
    pub(super) later: Vec<Later>,
    /// The step of each change of the clock, with what it shows since.
    pub(super) clock: Vec<(u64, u64)>,
    pub(super) step: u64,
    idle_steps: usize,
    fragments: Fragments,
    pub(super) tick_percent: usize,
    pub(super) tick_ms: usize,
    vanished: u64,
}

/// How clients' bytes are cut.
#[derive(Clone, Copy, Debug)]
enum Fragments {
    Whole,
    Some,
    Small,
}

/// What the seed is like; requests may be refused for lack of room; transactions for their size or their silence.
pub(super) fn surroundings(random: &mut Random, tame: bool, may_be_tight: bool) -> (Surroundings, bool, bool) {
    let cores = if tame {
        random.between(2, 4)
    } else {
        random.between(1, 5)
    };
    let shards = cores * random.between(1, 3);
    let mut options = vec![format!("--shards={shards}"), "--write-timeout=0".to_owned()];
    let mut limit = |random: &mut Random, name: &str, values: &[&str]| {
        if random.chance(40) {
            options.push(format!("--{name}={}", random.pick(values)));
        }
    };
    limit(random, "mesh-requests-max", &["1", "1", "2", "5"]);
    limit(random, "mesh-bytes-max", &["1", "200", "1000"]);
    limit(random, "requests-in-flight-max", &["1", "2", "4"]);
    limit(random, "output-bytes-max", &["1", "100", "4096"]);
    limit(random, "input-bytes-max", &["1", "100", "4096"]);
    let limited = random.chance(15);
    if limited {
        options.push(
            random
                .pick(&["--txn-ops-max=2", "--txn-bytes-max=300", "--txn-idle-timeout=20ms"])
                .to_owned(),
        );
    }
    let tight = may_be_tight && random.chance(25);
    if tight {
        // What empty cores are charged, and a little: for connections, and for data.
        let names: Vec<&str> = options.iter().map(String::as_str).collect();
        let (engines, _) = super::support::engines(cores as u16, &names);
        let empty: u64 = engines.iter().map(Engine::charged_bytes).sum();
        options.push(format!("--max-memory={}", empty as usize + random.between(100, 40_000)));
        if random.chance(50) {
            options.push(format!("--response-bytes-max={}", random.between(20, 6000)));
        }
    }
    let surroundings = Surroundings {
        cores: cores as u16,
        shards: shards as u16,
        options,
        queue_batches: random.pick(&[1, 1, 2, 16]),
        delay_turns: random.pick(&[0, 3, 10, 40]),
        slow_percent: random.pick(&[0, 0, 5, 20]),
        look_percent: random.pick(&[30, 60, 95]),
        send_bytes_max: random.pick(&[20, 1000, 100_000]),
        speeds: (0..cores).map(|_| random.pick(&[1, 4, 10])).collect(),
    };
    (surroundings, tight, limited)
}

/// Keys that differ from seed to seed, so that they lie elsewhere. Some share a core by their tag.
pub(super) fn keys(random: &mut Random) -> Vec<Vec<u8>> {
    let count = random.pick(&[2, 2, 3, 3, 4, 5, 6, KEYS_MAX]);
    let tagged = random.chance(20);
    let name = |key: usize, random: &mut Random| match tagged && key < 2 {
        true => format!("{{tag}}{key}"),
        false => format!("k{key}-{}", random.below(1000)),
    };
    (0..count).map(|key| name(key, random).into_bytes()).collect()
}

impl Simulation {
    fn new(seed: u64, mutation: Option<Mutation>) -> Self {
        let mut random = Random::new(seed);
        let tame = mutation.is_some();
        let (surroundings, tight, limited) = surroundings(&mut random, tame, !tame);
        let habits = Habits {
            large_percent: if tame { 0 } else { random.pick(&[0, 0, 20]) },
            ends_percent: random.pick(&[0, 0, 10, 40]),
            flush_percent: random.pick(&[0, 0, 3, 8]),
            reads_percent: random.pick(&[30, 50, 70]),
            condition_percent: random.pick(&[10, 40, 80]),
            several_percent: random.pick(&[30, 60, 95]),
            keys_max: random.between(2, 5),
            tight,
            // Lack of room is one more reason why a transaction cannot be committed.
            limited: limited || tight,
            durable_percent: 0,
            failing: false,
        };
        let common = Common::new(keys(&mut random), habits, random.fork());
        let mutator = mutation.map(|mutation| Mutator::new(mutation, random.fork()));
        let cluster = Cluster::new(surroundings.clone(), random.fork(), mutator);
        let mut simulation = Self::of(cluster, common, random);
        let count = simulation.random.between(2, 6);
        let requests = simulation.random.between(12, 80);
        let mut vanishing = 0;
        for _ in 0..count {
            let core = simulation.random.below(usize::from(surroundings.cores)) as u16;
            let actor = simulation.connect_any(core);
            let random = &mut simulation.random;
            let actor = &mut simulation.actors[actor];
            actor.depth = random.pick(&[1, 2, 4, 10]);
            actor.left = actor.lines() * requests / count;
            if vanishing < VANISHING_MAX && random.chance(15) {
                vanishing += 1;
                actor.vanishes_at = Some(random.below(actor.left));
                actor.depth = actor.depth.min(UNANSWERED_MAX);
            }
            actor.finishes = random.chance(20);
        }
        simulation
    }

    /// Without clients.
    pub(super) fn of(cluster: Cluster, common: Common, mut random: Random) -> Self {
        Self {
            cluster,
            actors: vec![],
            common,
            history: vec![],
            later: vec![],
            clock: vec![(0, 0)],
            step: 0,
            idle_steps: 0,
            fragments: random.pick(&[Fragments::Whole, Fragments::Some, Fragments::Small]),
            tick_percent: random.pick(&[0, 1, 5]),
            tick_ms: random.pick(&[1, 5, 30]),
            vanished: 0,
            random,
        }
    }

    /// A client of some protocol.
    pub(super) fn connect_any(&mut self, core: u16) -> usize {
        let protocol = self.random.pick(&[
            Protocol::Protobuf,
            Protocol::Protobuf,
            Protocol::Memcached,
            Protocol::JsonLine,
        ]);
        self.connect(core, protocol)
    }

    pub(super) fn connect(&mut self, core: u16, protocol: Protocol) -> usize {
        // The connection may get the number of one that is closed.
        for actor in &mut self.actors {
            actor.gone = actor.gone || self.cluster.is_closed(actor.client);
        }
        let number = self.actors.len();
        let client = self.cluster.connect(core, protocol);
        self.actors.push(Actor::new(number, client, protocol));
        number
    }

    pub(super) fn now(&mut self) -> (u64, u64) {
        self.step += 1;
        (self.step, self.cluster.now_ms)
    }

    /// Something happens.
    pub(super) fn act(&mut self) {
        match self.random.below(100) {
            0..55 => self.turn(),
            at if at < 55 + self.tick_percent => {
                let ms = match self.random.chance(2) {
                    true => 1000,
                    false => 1 + self.random.below(self.tick_ms) as u64,
                };
                self.pass(ms);
            }
            _ => {
                let actor = self.random.below(self.actors.len());
                self.act_as(actor);
            }
        }
    }

    pub(super) fn pass(&mut self, ms: u64) {
        self.cluster.now_ms += ms;
        let now = self.now();
        self.clock.push(now);
    }

    pub(super) fn turn(&mut self) {
        let core = self.cluster.turn();
        for actor in 0..self.actors.len() {
            if usize::from(self.actors[actor].client.core) == core {
                self.hear(actor);
            }
        }
    }

    /// Takes what the actor was sent.
    pub(super) fn hear(&mut self, actor: usize) {
        if self.actors[actor].gone {
            return;
        }
        let bytes = self.cluster.take(self.actors[actor].client);
        self.actors[actor].received(&bytes);
        while let Some((asked, said)) = self.actors[actor].answered(&mut self.common) {
            self.idle_steps = 0;
            let now = self.now();
            self.note(&asked, now);
            for ((call, op), said) in asked.calls.iter().zip(asked.ops).zip(said) {
                let number = *call;
                let call = &mut self.history[number];
                call.op = op;
                if said == Said::Nothing {
                    // Nobody knows whether it was done; what its client asked behind it does not wait for it.
                    call.client = NOBODY * NOBODY + number;
                    continue;
                }
                // Nothing was done that could be safe.
                call.durable &= said != Said::Refused;
                if asked.invoked.is_none() {
                    assert_eq!(said, Said::Refused, "an answer came before its question");
                    (call.invoked, call.invoked_ms) = now;
                }
                (call.said, call.responded, call.responded_ms) = (said, now.0, now.1);
            }
        }
    }

    /// A flush was asked for, and is to come later.
    fn note(&mut self, asked: &Asked, responded: (u64, u64)) {
        if let (Some(delay_ms), Some(invoked)) = (asked.flushes_in, asked.invoked) {
            self.later.push(Later {
                delay_ms,
                invoked,
                responded,
            });
        }
    }

    fn act_as(&mut self, at: usize) {
        let actor = &mut self.actors[at];
        if actor.gone {
            return;
        }
        if actor.vanishes_at.is_some_and(|left| actor.left <= left) && self.random.chance(30) {
            self.vanish(at);
            return;
        }
        if self.random.chance(if actor.stalled { 30 } else { 3 }) {
            actor.stalled = !actor.stalled;
            let (client, stalled) = (actor.client, actor.stalled);
            self.cluster.stall(client, stalled);
            return;
        }
        if !actor.outbox.is_empty() && self.random.chance(70) {
            self.send(at);
            return;
        }
        while self.actors[at].left > 0
            && self.actors[at].asked.len() < self.actors[at].depth
            && self.history.len() < CALLS_ASKED_MAX
        {
            self.actors[at].ask(&mut self.common);
            self.begin_calls(at);
            if self.random.chance(30) {
                break;
            }
        }
        if self.history.len() >= CALLS_ASKED_MAX {
            self.actors[at].left = 0;
        }
        if !self.actors[at].outbox.is_empty() && self.random.chance(50) {
            self.send(at);
        }
        let actor = &mut self.actors[at];
        if actor.finishes && actor.left == 0 && actor.outbox.is_empty() {
            actor.finishes = false;
            let client = actor.client;
            self.cluster.finish(client);
        }
    }

    /// The history gets what the actor has asked and it does not have.
    pub(super) fn begin_calls(&mut self, at: usize) {
        let asked = self.actors[at].asked.iter_mut();
        for asked in asked.filter(|asked| asked.calls.is_empty()) {
            for op in &asked.ops {
                asked.calls.push(self.history.len());
                self.history.push(Call {
                    client: at,
                    op: op.clone(),
                    said: Said::Nothing,
                    invoked: u64::MAX,
                    responded: u64::MAX,
                    invoked_ms: u64::MAX,
                    responded_ms: u64::MAX,
                    may_be_refused: self.common.habits.tight,
                    durable: asked.durable,
                });
            }
        }
    }

    /// Some bytes of the actor arrive.
    fn send(&mut self, at: usize) {
        let client = self.actors[at].client;
        if !self.cluster.is_readable(client) {
            return;
        }
        let now = self.now();
        let actor = &mut self.actors[at];
        let length = match self.fragments {
            Fragments::Whole => actor.outbox.len(),
            Fragments::Some => 1 + self.random.below(actor.outbox.len()),
            // A large value would take for ever.
            Fragments::Small => (1 + self.random.below(30) + actor.outbox.len() / 10).min(actor.outbox.len()),
        };
        let bytes: Vec<u8> = actor.outbox.drain(..length).collect();
        actor.sent_bytes += length as u64;
        for asked in &mut actor.asked {
            if asked.invoked.is_none() && asked.begins_at < actor.sent_bytes {
                asked.invoked = Some(now);
                for call in &asked.calls {
                    (self.history[*call].invoked, self.history[*call].invoked_ms) = now;
                }
            }
        }
        self.cluster.send(client, &bytes);
    }

    fn vanish(&mut self, at: usize) {
        self.hear(at);
        self.vanished += 1;
        self.leave(at);
        let client = self.actors[at].client;
        if !self.cluster.is_closed(client) {
            self.cluster.vanish(client);
        }
    }

    /// A client hears nothing more: what it has asked was done or not.
    pub(super) fn leave(&mut self, at: usize) {
        let actor = &mut self.actors[at];
        actor.gone = true;
        let asked = actor.leave(&self.common);
        for asked in asked {
            self.note(&asked, (u64::MAX, u64::MAX));
            for (call, op) in asked.calls.into_iter().zip(asked.ops) {
                self.history[call].op = op;
                self.history[call].may_be_refused |= asked.may_be_refused;
            }
        }
    }

    pub(super) fn is_done(&self) -> bool {
        self.actors.iter().all(Actor::is_done)
    }

    pub(super) fn is_quiet(&self) -> bool {
        self.cluster.is_empty() && self.cluster.engines.iter().all(Engine::is_quiet)
    }

    pub(super) fn is_deserted(&self) -> bool {
        self.cluster.engines.iter().all(|engine| engine.connections() == 0)
    }

    /// Lets things happen until `done`; `None` when they do not come to it.
    pub(super) fn until(&mut self, act: fn(&mut Self), done: impl Fn(&Self) -> bool) -> Option<()> {
        self.idle_steps = 0;
        while self.idle_steps < STEPS_MAX {
            if done(self) {
                return Some(());
            }
            self.idle_steps += 1;
            act(self);
        }
        None
    }

    pub(super) fn finish_sending(&mut self) {
        for at in 0..self.actors.len() {
            if !self.actors[at].gone && !self.actors[at].outbox.is_empty() {
                self.send(at);
            }
        }
        self.turn();
    }

    /// Time passes until nothing is left that it will bring.
    fn pass_all(&mut self) -> Option<()> {
        for ms in [100, 1000, 2000] {
            self.pass(ms);
            for _ in 0..self.cluster.engines.len() * 20 {
                self.turn();
            }
            self.until(Self::turn, Self::is_quiet)?;
        }
        // Memory comes back a piece at a time.
        for _ in 0..100_000 {
            if !self.cluster.engines.iter().any(Engine::has_background_work) {
                break;
            }
            self.pass(1);
            self.turn();
        }
        Some(())
    }

    /// All of it; what went wrong, if anything.
    fn run(&mut self) -> Option<Verdict> {
        let empty = self.cluster.charged_bytes();
        if self.until(Self::act, Self::is_done).is_none() {
            return Some(Verdict::Stuck(self.unanswered()));
        }
        if self.until(Self::turn, Self::is_quiet).is_none() || self.pass_all().is_none() {
            return Some(Verdict::Stuck(
                "all is answered, and yet the cores do not come to rest".to_owned(),
            ));
        }
        // What is there in the end.
        for protocol in [Protocol::Protobuf, Protocol::Memcached, Protocol::JsonLine] {
            let core = self.random.below(self.cluster.engines.len()) as u16;
            let actor = self.connect(core, protocol);
            self.actors[actor].ask_all(&self.common);
            self.begin_calls(actor);
            if self.until(Self::finish_sending, Self::is_done).is_none() {
                return Some(Verdict::Stuck(self.unanswered()));
            }
        }
        self.left_over(&empty)
    }

    /// Empties the store, sends everybody home, and looks for what is left.
    fn left_over(&mut self, empty: &[u64]) -> Option<Verdict> {
        let recorded = self.history.len();
        let core = self.random.below(self.cluster.engines.len()) as u16;
        let actor = self.connect(core, Protocol::Protobuf);
        let at_once = self.random.chance(50);
        self.actors[actor].ask_to_empty(&self.common, at_once);
        self.begin_calls(actor);
        if self.until(Self::finish_sending, Self::is_done).is_none() {
            return Some(Verdict::Stuck(self.unanswered()));
        }
        self.history.truncate(recorded);
        let stops = self.random.chance(50);
        for at in 0..self.actors.len() {
            let client = self.actors[at].client;
            if !self.actors[at].gone && !self.cluster.is_closed(client) {
                self.cluster.stall(client, false);
                if !stops {
                    self.cluster.vanish(client);
                }
            }
        }
        if stops {
            self.cluster.close_all();
        }
        if self.pass_all().is_none() {
            return Some(Verdict::Stuck(
                "the cores do not come to rest without clients".to_owned(),
            ));
        }
        if self.until(Self::turn, Self::is_deserted).is_none() {
            return Some(Verdict::Left("a connection is open".to_owned()));
        }
        let charged = self.cluster.charged_bytes();
        if charged != empty {
            return Some(Verdict::Left(format!(
                "by core, {charged:?} bytes are charged, and {empty:?} were before"
            )));
        }
        None
    }

    pub(super) fn unanswered(&self) -> String {
        let mut text = "these are not answered:\n".to_owned();
        for call in self.history.iter().filter(|call| !call.answered()) {
            if self.actors.get(call.client).is_some_and(|actor| !actor.gone) {
                let _ = writeln!(text, "    {call}");
            }
        }
        text
    }

    /// Forgets a client that asked for nothing that matters.
    pub(super) fn leave_nothing(&mut self, at: usize) {
        self.actors[at].gone = true;
        self.history.clear();
    }

    /// A core has a turn; nobody hears of it.
    pub(super) fn turn_of_files(&mut self) {
        self.step += 1;
        self.cluster.turn_of_files();
    }

    /// Flushes that came by themselves, as calls of nobody.
    pub(super) fn flushes_by_time(&self, history: &[Call], they_come: bool) -> Vec<Call> {
        let immediate = history.iter().filter(|call| call.op.flushes());
        let all: Vec<(u64, u64)> = immediate
            .map(|call| (call.invoked, call.responded))
            .chain(self.later.iter().map(|later| (later.invoked.0, later.responded.0)))
            .collect();
        let mut calls = vec![];
        for later in &self.later {
            let due = later.invoked.1.saturating_add(later.delay_ms);
            let Some((invoked, invoked_ms)) = self.clock.iter().copied().find(|(_, ms)| *ms >= due) else {
                continue;
            };
            // Another one may have taken its place, unless that was over before.
            let others = all
                .iter()
                .filter(|(_, responded)| *responded >= later.invoked.0)
                .count();
            let must = they_come && later.responded.0 != u64::MAX && others == 1;
            let end = *self.clock.last().expect("it has a beginning");
            calls.push(Call {
                // Of nobody's session.
                client: NOBODY + calls.len(),
                op: Op::of(Act::Flush),
                said: match must {
                    true => Said::Done {
                        held: Held::All(true),
                        outcomes: vec![Outcome::Flushed],
                    },
                    false => Said::Nothing,
                },
                invoked,
                invoked_ms,
                responded: if must { end.0 + 1 } else { u64::MAX },
                responded_ms: if must { end.1 } else { u64::MAX },
                may_be_refused: false,
                durable: false,
            });
        }
        calls
    }

    fn counted(&self, history: &[Call]) -> Counted {
        let mut sum = Counted {
            calls: history.len() as u64,
            steps: self.step,
            unanswered: history.iter().filter(|call| !call.answered()).count() as u64,
            refused: history.iter().filter(|call| call.said == Said::Refused).count() as u64,
            vanished: self.vanished,
            ..Counted::default()
        };
        for call in history.iter().filter(|call| call.depends_on_values()) {
            sum.checked_commits += 1;
            sum.changed += u64::from(matches!(
                call.said,
                Said::Done {
                    held: Held::All(false),
                    ..
                }
            ));
        }
        for engine in &self.cluster.engines {
            let counters: &Counters = &engine.metrics.counters;
            sum.txns += counters.txns;
            sum.txn_retries += counters.txn_retries;
            sum.lock_waits += counters.lock_waits;
            sum.credit_waits += counters.credit_waits;
            sum.expired += counters.expired;
            sum.flushes += counters.flushes;
            sum.forwarded += counters.forwarded;
        }
        sum
    }
}

/// Runs a seed.
pub fn run(seed: u64, mutation: Option<Mutation>) -> Ran {
    let mut simulation = Simulation::new(seed, mutation);
    let story = story(seed, &simulation);
    let wrong = simulation.run();
    let mut history: Vec<Call> = simulation.history.clone();
    history.retain(|call| call.invoked != u64::MAX);
    // A read that was not answered says nothing.
    history.retain(|call| call.answered() || !call.op.only_reads());
    history.extend(simulation.flushes_by_time(&history, true));
    let counted = simulation.counted(&history);
    let verdict = wrong.unwrap_or_else(|| match checker::check(&history) {
        Checked::Serializable => Verdict::Good,
        Checked::Not(why) => Verdict::NotSerializable(why),
        Checked::GaveUp => Verdict::Undecided,
    });
    Ran {
        verdict,
        history,
        story,
        counted,
    }
}

fn story(seed: u64, simulation: &Simulation) -> String {
    let surroundings = simulation.cluster.surroundings();
    let cores = surroundings.cores;
    let table = RangeTable::even(TOKEN_SEED, surroundings.shards, cores);
    let mut text = format!("seed {seed}: {cores} cores, {}\n", surroundings.options.join(" "));
    for (key, name) in simulation.common.keys.iter().enumerate() {
        let core = table.core_of(table.shard_of(table.place(name).token)).0;
        let _ = write!(text, "  k{key} is {:?} on core {core}", String::from_utf8_lossy(name));
    }
    text.push('\n');
    for actor in &simulation.actors {
        let _ = write!(text, "  client {} on core {}", actor.number, actor.client.core);
    }
    text.push('\n');
    text
}
