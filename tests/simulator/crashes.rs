//! One seed with files: a server that ends in some way and comes back, several times, each time with as many cores as chance has it.

use super::checker::Checked;
use super::client::{Common, Habits};
use super::cluster::{Cluster, Surroundings};
use super::disk::{Plan, SimDisk};
use super::files::{Fault, Files, Options};
use super::keepers::Pace;
use super::lives::{End, Kept, Life, check_lives};
use super::model::Call;
use super::mutation::{Mutation, Mutator};
use super::random::Random;
use super::run::{Simulation, Verdict, keys, surroundings};
use memkv::disk::Disk;
use memkv::protocol::Protocol;
use memkv::wal::Durability;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::mem::take;

/// Requests under way before a crash, at most: whether each was done is for the checker to guess.
const UNDER_WAY_MAX: usize = 12;

/// Times that a server is started with a disk that fails before it gets one that does not.
const STARTS_MAX: usize = 3;

/// Rounds after which all that was done is safe where that is a matter of time: an epoch ends, all know that it is closed, that is
/// written, and made safe.
const CALM_ROUNDS: usize = 8;

/// What goes wrong on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bug {
    Nothing,
    OfFiles(Fault),
    OfMesh(Mutation),
}

/// A seed that was run.
pub struct Ran {
    pub verdict: Verdict,
    pub lives: Vec<Life>,
    pub story: String,
    /// How often things happened that a simulation should see.
    pub met: BTreeMap<&'static str, u64>,
}

/// How a life is to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ending {
    /// The machine stops after some step, or some change of the disk.
    Crash,
    /// The process does, and the machine goes on.
    Kill,
    /// The server stops in order.
    Stop,
}

/// A server with files, its disk, and what happened to it.
struct Lives {
    simulation: Simulation,
    disk: SimDisk,
    options: Options,
    bug: Option<Bug>,
    random: Random,
    lives: Vec<Life>,
    story: String,
    met: BTreeMap<&'static str, u64>,
    /// The first client of this life.
    first: usize,
    /// Something cannot be written any more in this life.
    fails: bool,
}

fn habits(random: &mut Random, tame: bool, limited: bool) -> Habits {
    Habits {
        large_percent: if tame { 0 } else { random.pick(&[0, 20, 60]) },
        ends_percent: random.pick(&[0, 0, 10, 40]),
        flush_percent: random.pick(&[0, 0, 3, 8]),
        reads_percent: random.pick(&[20, 40, 60]),
        condition_percent: random.pick(&[10, 40, 80]),
        several_percent: random.pick(&[30, 60, 95]),
        keys_max: random.between(2, 5),
        tight: false,
        limited,
        durable_percent: random.pick(&[0, 10, 30]),
        failing: false,
    }
}

impl Lives {
    fn new(seed: u64, bug: Option<Bug>) -> Self {
        // Other numbers than those of the seed without files.
        let mut random = Random::new(seed ^ 0xf11e_5000_0000_0000);
        let tame = bug.is_some();
        let (mut surroundings, _, limited) = surroundings(&mut random, tame, false);
        surroundings.shards = surroundings.shards.max(random.between(1, 6) as u16);
        surroundings.options[0] = format!("--shards={}", surroundings.shards);
        if random.chance(20) {
            // A snapshot's backlog is a part of this.
            surroundings.options.push("--max-memory=12m".to_owned());
        }
        if random.chance(30) {
            surroundings.options.push("--snapshot-interval=300ms".to_owned());
        }
        let durability = random.pick(&[
            Durability::Always,
            Durability::Always,
            Durability::Interval,
            Durability::None,
        ]);
        let mut options = Options {
            durability,
            sync_interval_ms: random.pick(&[20, 100, 1000]),
            segment_bytes: random.pick(&[16, 24, 64]) << 10,
            shards: surroundings.shards,
            pace: Pace {
                delay_turns: random.pick(&[0, 3, 20]),
                slow_percent: random.pick(&[0, 5, 20]),
            },
            fault: match bug {
                Some(Bug::OfFiles(fault)) => Some(fault),
                _ => None,
            },
        };
        let mut habits = habits(&mut random, tame, limited);
        if let Some(Bug::OfMesh(_)) = bug {
            // It only shows where one core is long done and another is not, and somebody looks just then.
            options.durability = Durability::Always;
            (options.pace.delay_turns, options.pace.slow_percent) = (20, 50);
            (habits.several_percent, habits.reads_percent, habits.keys_max) = (60, 60, 2);
            (habits.flush_percent, habits.condition_percent) = (0, 10);
        }
        let common = Common::new(keys(&mut random), habits, random.fork());
        let cluster = Cluster::new(surroundings, random.fork(), None);
        let mut simulation = Simulation::of(cluster, common, random.fork());
        simulation.tick_percent = random.pick(&[2, 5, 15]);
        Self {
            story: format!(
                "seed {seed}: {:?}, {}, synced every {} ms, segments of {} bytes, {:?}\n",
                options.durability,
                simulation.cluster.surroundings().options.join(" "),
                options.sync_interval_ms,
                options.segment_bytes,
                options.pace,
            ),
            simulation,
            disk: SimDisk::new(random.fork()),
            options,
            bug,
            random,
            lives: vec![],
            met: BTreeMap::new(),
            first: 0,
            fails: false,
        }
    }

    fn meet(&mut self, what: &'static str, times: u64) {
        *self.met.entry(what).or_default() += times;
    }

    fn tell(&mut self, text: std::fmt::Arguments<'_>) {
        let (step, ms) = (self.simulation.step, self.simulation.cluster.now_ms);
        let _ = writeln!(self.story, "  {step} ({ms} ms): {text}");
    }

    /// A disk that fails in some way.
    fn bad_disk(&mut self) -> Plan {
        let random = &mut self.random;
        let from = random.below(40) as u64;
        let range = match random.chance(50) {
            true => from..from + 1,
            false => from..u64::MAX,
        };
        let mut plan = Plan::default();
        match random.below(5) {
            0 => plan.writes = range,
            1 => plan.syncs = range,
            2 => plan.dir_syncs = range.start / 8..range.end,
            3 => plan.stops_after = Some(random.below(60) as u64),
            _ => plan.room_bytes = Some(random.below(300_000) as u64),
        }
        plan
    }

    // ---- starting ----

    /// Starts the server on what is on the disk, and reads what it has. The disk may fail meanwhile, some times.
    fn start(&mut self) -> Result<(), Verdict> {
        for attempt in 0.. {
            let mut plan = Plan {
                short_reads_percent: self.random.pick(&[0, 0, 30]),
                ..Plan::default()
            };
            let may_fail = attempt < STARTS_MAX && self.bug.is_none() && self.random.chance(25);
            if may_fail {
                plan = self.bad_disk();
            }
            let fails_to_sync = !plan.syncs.is_empty() || !plan.dir_syncs.is_empty();
            self.disk.set_plan(plan.clone());
            self.begin_anew();
            let mut random = self.random.fork();
            let engines = &mut self.simulation.cluster.engines;
            match Files::open(&self.disk, &self.options, engines, &mut random) {
                Ok(files) => {
                    for warning in &files.warnings {
                        let _ = writeln!(self.story, "    {warning}");
                    }
                    self.simulation.cluster.files = Some(files);
                }
                Err(problem) if !may_fail => return Err(Verdict::NotRecovered(problem.to_string())),
                Err(problem) => {
                    self.meet("starts_failed", 1);
                    self.tell(format_args!("does not start with {plan:?}: {problem}"));
                    self.end_machine(!self.disk.has_stopped() && !fails_to_sync);
                    continue;
                }
            }
            self.simulation.common.habits.failing = may_fail;
            match self.find() {
                Some(found) => {
                    self.disk.set_plan(Plan::default());
                    self.fails = may_fail && self.disk_failed();
                    if let Some(life) = self.lives.last_mut()
                        && let Some(end) = &mut life.end
                    {
                        end.found = found;
                    }
                    return Ok(());
                }
                None if self.disk.has_stopped() => {
                    self.meet("stopped_at_start", 1);
                    self.end_machine(false);
                }
                None => return Err(Verdict::Stuck(self.simulation.unanswered())),
            }
        }
        unreachable!("the last start is with a good disk")
    }

    /// Empty cores, with the disk.
    fn begin_anew(&mut self) {
        let before = self.simulation.cluster.surroundings().clone();
        let cores = self.random.between(1, usize::from(self.options.shards).min(5));
        let surroundings = Surroundings {
            cores: cores as u16,
            speeds: (0..cores).map(|_| self.random.pick(&[1, 4, 10])).collect(),
            ..before
        };
        self.simulation.cluster.now_ms += self.random.pick(&[1, 1, 20, 500]);
        let mutator = match self.bug {
            Some(Bug::OfMesh(mutation)) => Some(Mutator::new(mutation, self.random.fork())),
            _ => None,
        };
        let now_ms = self.simulation.cluster.now_ms;
        self.simulation.cluster = Cluster::at(now_ms, surroundings, self.random.fork(), mutator);
        let now = self.simulation.now();
        self.simulation.clock = vec![now];
        self.simulation.later.clear();
        self.tell(format_args!("starts with {cores} cores"));
    }

    /// The first call of a life: what there is of all keys. `None`: no answer came.
    fn find(&mut self) -> Option<Call> {
        let simulation = &mut self.simulation;
        let core = self.random.below(simulation.cluster.engines.len()) as u16;
        let finder = simulation.connect(core, Protocol::Protobuf);
        simulation.actors[finder].find_all(&simulation.common);
        simulation.begin_calls(finder);
        let done = |simulation: &Simulation| simulation.is_done() || has_stopped(simulation);
        let came = simulation.until(Simulation::finish_sending, done);
        let found = take(&mut simulation.history).pop()?;
        if came.is_none() || !found.answered() {
            simulation.leave_nothing(finder);
            return None;
        }
        self.first = simulation.actors.len();
        Some(found)
    }

    fn disk_failed(&self) -> bool {
        let engines = &self.simulation.cluster.engines;
        engines.iter().any(|engine| engine.log_failure().is_some())
    }

    // ---- a life ----

    fn connect_clients(&mut self) {
        let random = &mut self.random;
        let count = random.between(2, 5);
        let requests = random.between(6, 40);
        let cores = self.simulation.cluster.engines.len();
        for _ in 0..count {
            let core = random.below(cores) as u16;
            let actor = self.simulation.connect_any(core);
            let actor = &mut self.simulation.actors[actor];
            actor.depth = random.pick(&[1, 2, 4]).min(UNDER_WAY_MAX / count);
            actor.left = actor.lines() * requests / count;
        }
    }

    fn act(simulation: &mut Simulation) {
        if simulation.random.chance(1) {
            for core in 0..simulation.cluster.engines.len() {
                simulation.cluster.begin(core);
                simulation.cluster.engines[core].snapshot();
                simulation.cluster.end(core);
            }
        } else {
            // Clients that are gone are not asked.
            simulation.act();
        }
    }

    /// One life, from the first request to its end.
    fn live(&mut self) -> Result<(), Verdict> {
        self.connect_clients();
        let mut ending = self
            .random
            .pick(&[Ending::Crash, Ending::Crash, Ending::Kill, Ending::Stop]);
        if let Some(Bug::OfMesh(_)) = self.bug {
            ending = Ending::Crash;
        }
        let mut plan = Plan::default();
        if self.bug.is_none() && !self.fails && self.random.chance(25) {
            plan = self.bad_disk();
        } else if ending == Ending::Crash && self.random.chance(50) {
            plan.stops_after = Some(self.random.below(150) as u64);
        }
        let fails_to_sync = !plan.syncs.is_empty() || !plan.dir_syncs.is_empty();
        if fails_to_sync || plan.stops_after.is_some() {
            // A system that takes for clean what it could not write shows it to whoever comes next.
            ending = Ending::Crash;
        }
        self.disk.set_plan(plan.clone());
        self.simulation.common.habits.failing = self.fails || plan_fails(&plan);
        let most = self.random.pick(&[50, 300, 1000, 3000]);
        let last = self.simulation.cluster.turns + self.random.between(1, most) as u64;
        let mut keeps_before = 0;
        self.until(|simulation| simulation.cluster.turns >= last || simulation.is_done())?;
        let is_calm = plan_is_good(&plan) && !self.fails && self.random.chance(50);
        if is_calm && self.options.durability == Durability::Interval && !self.disk.has_stopped() {
            keeps_before = self.calm()?;
            self.meet("calms", 1);
        } else if ending == Ending::Crash && self.simulation.is_done() && !self.disk.has_stopped() {
            // Something of what is to be written may still be.
            let last = self.simulation.cluster.turns + self.random.below(300) as u64;
            self.until(|simulation| simulation.cluster.turns >= last)?;
        }
        let in_order = ending == Ending::Stop && !self.disk.has_stopped() && self.stop()?;
        let durability = self.options.durability;
        let failed = self.disk_failed();
        let kept = match durability {
            Durability::Always => Kept::All,
            _ if in_order && !failed => Kept::All,
            _ => Kept::Prefix { keeps_before },
        };
        let tally = self.disk.tally();
        self.meet("disk_failures", tally.failures);
        self.meet("full", tally.full);
        self.meet("logs_failed", u64::from(failed));
        self.meet("stopped_in_order", u64::from(in_order));
        self.meet("machines_stopped", u64::from(self.disk.has_stopped()));
        self.count();
        let mut failures = self
            .simulation
            .cluster
            .files
            .as_mut()
            .map(|files| take(&mut files.failures));
        for failures in failures.iter_mut() {
            failures.truncate(5);
        }
        for failure in failures.into_iter().flatten() {
            self.tell(format_args!("{failure}"));
        }
        let machine_goes_on = !self.disk.has_stopped()
            && !fails_to_sync
            && (ending == Ending::Kill || in_order && self.random.chance(50));
        self.tell(format_args!(
            "{ending:?} with {plan:?}, {}, {kept:?}",
            if machine_goes_on {
                "the machine goes on"
            } else {
                "the machine stops"
            }
        ));
        self.meet(if machine_goes_on { "kills" } else { "crashes" }, 1);
        self.end_life(kept);
        self.end_machine(machine_goes_on);
        Ok(())
    }

    /// Lets things happen until `done` or the machine stops.
    fn until(&mut self, done: impl Fn(&Simulation) -> bool) -> Result<(), Verdict> {
        let done = |simulation: &Simulation| done(simulation) || has_stopped(simulation);
        match self.simulation.until(Self::act, done) {
            Some(()) => Ok(()),
            None => Err(Verdict::Stuck(self.simulation.unanswered())),
        }
    }

    /// Time passes until everything that was answered is safe; says from which step on it may not be.
    fn calm(&mut self) -> Result<u64, Verdict> {
        let (began, _) = self.simulation.now();
        for _ in 0..CALM_ROUNDS {
            self.simulation.pass(self.options.sync_interval_ms.max(100) + 10);
            for _ in 0..self.simulation.cluster.engines.len() * 20 {
                self.simulation.turn();
            }
            let idle = |simulation: &Simulation| {
                let files = simulation.cluster.files.as_ref();
                simulation.cluster.is_empty() && files.is_none_or(Files::is_idle)
            };
            if self.simulation.until(Simulation::turn, idle).is_none() {
                return Err(Verdict::Stuck("the cores do not come to rest".to_owned()));
            }
        }
        Ok(began)
    }

    /// The server stops in order: what has arrived is answered, the connections are closed, and the logs ended. False when the
    /// machine stopped first.
    fn stop(&mut self) -> Result<bool, Verdict> {
        for at in self.first..self.simulation.actors.len() {
            let client = self.simulation.actors[at].client;
            if !self.simulation.actors[at].gone {
                self.simulation.cluster.stall(client, false);
            }
        }
        self.simulation.cluster.close_all();
        let quiet =
            |simulation: &Simulation| simulation.is_quiet() && simulation.is_deserted() || has_stopped(simulation);
        if self.simulation.until(Simulation::turn, quiet).is_none() {
            let mut text = "the cores do not come to rest without clients:".to_owned();
            for (core, engine) in self.simulation.cluster.engines.iter().enumerate() {
                let (quiet, connections, log) = (engine.is_quiet(), engine.connections(), engine.is_log_quiet());
                let _ = write!(
                    text,
                    " core {core}: quiet {quiet}, its log {log}, {connections} connections;"
                );
            }
            let _ = write!(text, "\n{}", self.simulation.unanswered());
            return Err(Verdict::Stuck(text));
        }
        if self.disk.has_stopped() {
            return Ok(false);
        }
        let cluster = &mut self.simulation.cluster;
        cluster.end_files();
        let idle = |simulation: &Simulation| {
            has_stopped(simulation) || simulation.cluster.files.as_ref().is_none_or(Files::is_idle)
        };
        if self.simulation.until(Simulation::turn_of_files, idle).is_none() {
            return Err(Verdict::Stuck("the files are not ended".to_owned()));
        }
        Ok(!self.disk.has_stopped())
    }

    fn count(&mut self) {
        let mut sums = BTreeMap::<&str, u64>::new();
        for engine in &self.simulation.cluster.engines {
            let counters = &engine.metrics.counters;
            *sums.entry("txns").or_default() += counters.txns;
            *sums.entry("held_replies").or_default() += counters.held_replies;
            *sums.entry("flushes").or_default() += counters.flushes;
            *sums.entry("expired").or_default() += counters.expired;
        }
        for (name, count) in sums {
            *self.met.entry(name).or_default() += count;
        }
        let files = self.simulation.cluster.files.as_ref();
        let (beside, overtook) = files.map_or((0, 0), Files::beside_and_overtook);
        self.meet("writes_beside_others", beside);
        self.meet("overtaken_writes", overtook);
        let (logs, images) = [("log"), ("images")]
            .map(|folder| self.disk.list(folder).unwrap_or_default())
            .into();
        let spares = logs.iter().filter(|name| name.starts_with("spare")).count();
        let first = logs.iter().filter(|name| name.ends_with("-00000000.log")).count();
        self.meet("spare_segments", spares as u64);
        self.meet("later_segments", (logs.len() - spares - first) as u64);
        self.meet("images", images.len() as u64);
    }

    /// All connections are broken, and what is not answered never will be.
    fn end_life(&mut self, kept: Kept) {
        let simulation = &mut self.simulation;
        for at in self.first..simulation.actors.len() {
            if !simulation.actors[at].gone {
                simulation.leave(at);
            }
        }
        let mut calls = take(&mut simulation.history);
        calls.retain(|call| call.invoked != u64::MAX);
        calls.retain(|call| call.answered() || !call.op.only_reads());
        let flushes = simulation.flushes_by_time(&calls, false);
        calls.extend(flushes);
        let found = Call::nothing();
        let unanswered = calls.iter().filter(|call| !call.answered()).count();
        self.meet("unanswered", unanswered as u64);
        self.meet("calls", calls.len() as u64);
        let durable = self.lives_durable(&calls);
        self.meet("durable", durable);
        self.lives.push(Life {
            calls,
            end: Some(End { kept, found }),
        });
    }

    fn lives_durable(&self, calls: &[Call]) -> u64 {
        calls.iter().filter(|call| call.durable && call.answered()).count() as u64
    }

    /// What the next start finds on the disk.
    fn end_machine(&mut self, goes_on: bool) {
        let simulation = &mut self.simulation;
        for actor in &mut simulation.actors {
            actor.gone = true;
        }
        simulation.cluster.files = None;
        self.disk = match goes_on {
            true => self.disk.leave(),
            false => self.disk.crash(),
        };
        self.fails = false;
    }

    /// All of it; what went wrong, if anything.
    fn run(&mut self) -> Option<Verdict> {
        for _ in 0..self.random.between(1, 4) {
            if let Err(verdict) = self.start().and_then(|()| self.live()) {
                return Some(verdict);
            }
        }
        self.start().err()
    }
}

fn has_stopped(simulation: &Simulation) -> bool {
    simulation
        .cluster
        .files
        .as_ref()
        .is_some_and(|files| files.disk.has_stopped())
}

fn plan_fails(plan: &Plan) -> bool {
    !plan.writes.is_empty() || !plan.syncs.is_empty() || !plan.dir_syncs.is_empty() || plan.room_bytes.is_some()
}

fn plan_is_good(plan: &Plan) -> bool {
    !plan_fails(plan) && plan.stops_after.is_none()
}

/// Runs a seed.
pub fn run(seed: u64, bug: Option<Bug>) -> Ran {
    let mut lives = Lives::new(seed, bug);
    let wrong = lives.run();
    let verdict = wrong.unwrap_or_else(|| match check_lives(&lives.lives) {
        Checked::Serializable => Verdict::Good,
        Checked::Not(why) => Verdict::NotSerializable(why),
        Checked::GaveUp => Verdict::Undecided,
    });
    Ran {
        verdict,
        lives: lives.lives,
        story: lives.story,
        met: lives.met,
    }
}
