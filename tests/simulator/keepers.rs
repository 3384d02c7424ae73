//! The threads that the cores have for their files, as turns of the simulation.
//!
//! A core hands its jobs over in each turn ([`Keepers::give`]) and takes back what came of them ([`Keepers::take`]). In between,
//! each job waits for as long as chance has it, on its way, before it is run and before the core hears of it: in order for each
//! core, and in no order among cores. A write that goes to the disk without the thread is under way for as long again, and others
//! with it. A crash is the end of all of them: jobs that were not run are lost, and so is the news of those that were.

use super::random::Random;
use memkv::wal::{Done, Job};
use std::collections::VecDeque;

/// Who does the jobs of one core.
pub trait Keep {
    fn run(&mut self, job: Job) -> Done;

    /// Sends a job to the disk and does not wait, or gives it back: then it is to be run when nothing is under way.
    fn begin(&mut self, job: Job) -> Result<(), Job> {
        Err(job)
    }

    /// Waits for the first of those that were begun.
    fn finish(&mut self) -> Option<Done> {
        None
    }

    /// Prepares a piece of what will be needed; false when there is nothing left to prepare.
    fn idle(&mut self) -> bool;
}

/// How fast the disks are.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// The longest that a job usually waits, in turns, and the news of it again.
    pub delay_turns: usize,
    /// How often in a hundred it takes thirty times that.
    pub slow_percent: usize,
}

struct Keeper<K> {
    keep: K,
    /// Each with the turn from which on it is run.
    jobs: VecDeque<(u64, Job)>,
    /// For each job that was begun, the turn from which on it is finished.
    under_way: VecDeque<u64>,
    /// Each with the turn from which on it is told.
    news: VecDeque<(u64, Done)>,
}

/// See the module's text.
pub struct Keepers<K> {
    keepers: Vec<Keeper<K>>,
    pace: Pace,
    random: Random,
    /// A bug: of each part of the log it is said that it was written, before it is.
    says_so_early: bool,
}

impl<K: Keep> Keepers<K> {
    /// One for each core.
    pub fn new(keeps: impl IntoIterator<Item = K>, pace: Pace, random: Random) -> Self {
        let keepers = keeps.into_iter().map(|keep| Keeper {
            keep,
            jobs: VecDeque::new(),
            under_way: VecDeque::new(),
            news: VecDeque::new(),
        });
        Self {
            keepers: keepers.collect(),
            pace,
            random,
            says_so_early: false,
        }
    }

    /// From now on they say of each part of the log that it was written, before it is.
    pub fn say_so_early(&mut self) {
        self.says_so_early = true;
    }

    fn due(&mut self, turn: u64) -> u64 {
        let mut delay = self.random.below(self.pace.delay_turns + 1);
        if self.random.chance(self.pace.slow_percent) {
            delay *= 30;
        }
        turn + delay as u64
    }

    /// A core hands over a job.
    pub fn give(&mut self, core: usize, turn: u64, job: Job) {
        let due = self.due(turn);
        let keeper = &mut self.keepers[core];
        if self.says_so_early
            && let Job::Log { sync: synced, .. } = job
        {
            let buffers = vec![];
            keeper.news.push_back((turn, Done::Logged { buffers, synced }));
        }
        keeper.jobs.push_back((due, job));
    }

    /// One of the keepers may begin, run or finish a job, or prepare something.
    pub fn step(&mut self, turn: u64) {
        let core = self.random.below(self.keepers.len());
        let (told, finished) = (self.due(turn), self.due(turn));
        let finishes = self.random.chance(50);
        let says_so_early = self.says_so_early;
        let keeper = &mut self.keepers[core];
        let mut tell = |done: Done| {
            if !(says_so_early && matches!(done, Done::Logged { .. })) {
                keeper.news.push_back((told, done));
            }
        };
        let has_job = keeper.jobs.front().is_some_and(|(due, _)| *due <= turn);
        if keeper.under_way.front().is_some_and(|due| *due <= turn) && (finishes || !has_job) {
            keeper.under_way.pop_front();
            keeper.keep.finish().into_iter().for_each(tell);
        } else if has_job && let Some((due, job)) = keeper.jobs.pop_front() {
            match keeper.keep.begin(job) {
                Ok(()) => keeper.under_way.push_back(finished),
                // The thread has an image's jobs, whatever the disk is at.
                Err(job) if keeper.under_way.is_empty() || !matches!(job, Job::Log { .. }) => {
                    tell(keeper.keep.run(job))
                }
                Err(job) => keeper.jobs.push_front((due, job)),
            }
        } else if keeper.jobs.is_empty() {
            keeper.keep.idle();
        }
    }

    /// What a core hears of the jobs that it gave.
    pub fn take(&mut self, core: usize, turn: u64) -> Option<Done> {
        let news = &mut self.keepers[core].news;
        news.front().filter(|(due, _)| *due <= turn)?;
        news.pop_front().map(|(_, done)| done)
    }

    /// Who does the jobs of each core.
    pub fn keeps(&self) -> impl Iterator<Item = &K> {
        self.keepers.iter().map(|keeper| &keeper.keep)
    }

    /// Nothing is to be done or told.
    pub fn is_empty(&self) -> bool {
        let mut keepers = self.keepers.iter();
        keepers.all(|keeper| keeper.jobs.is_empty() && keeper.under_way.is_empty() && keeper.news.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::super::disk::{Plan, SimDisk};
    use super::*;
    use memkv::disk::{Disk, File};
    use memkv::model::UnixMillis;
    use memkv::wal::{Durability, Log};
    use std::cell::RefCell;
    use std::collections::BTreeSet;
    use std::rc::Rc;

    /// Writes keys one behind the other into a file of its own. `order` has the cores whose jobs were run.
    struct Writer {
        core: usize,
        file: Box<dyn File>,
        order: Rc<RefCell<Vec<usize>>>,
    }

    impl Writer {
        fn new(core: usize, disk: &SimDisk, order: &Rc<RefCell<Vec<usize>>>) -> Self {
            let file = disk.create(&core.to_string()).unwrap();
            disk.sync_dir("").unwrap();
            let order = order.clone();
            Self { core, file, order }
        }
    }

    impl Keep for Writer {
        fn run(&mut self, job: Job) -> Done {
            self.order.borrow_mut().push(self.core);
            let Job::Log { chunks, sync, .. } = job else {
                unreachable!("only the log is used")
            };
            let write = || {
                for chunk in &chunks {
                    self.file.write_at(chunk.position, &chunk.effects)?;
                }
                if sync { self.file.sync() } else { Ok(()) }
            };
            match write() {
                Ok(()) => Done::Logged {
                    buffers: vec![],
                    synced: sync,
                },
                Err(error) => Done::Failed {
                    log: true,
                    why: error.to_string(),
                },
            }
        }

        fn idle(&mut self) -> bool {
            false
        }
    }

    /// How a run went: by core, the position up to which it was told that all is safe, and what was written; what is found; and
    /// the cores in the order of their jobs.
    struct Ran {
        safe: Vec<usize>,
        written: Vec<Vec<u8>>,
        found: Vec<Vec<u8>>,
        order: Vec<usize>,
        failed: bool,
    }

    const CORES: usize = 3;

    fn run(seed: u64, durability: Durability, stops_after: Option<u64>) -> Ran {
        let mut random = Random::new(seed);
        let disk = SimDisk::new(random.fork());
        let order = Rc::default();
        let keeps: Vec<Writer> = (0..CORES).map(|core| Writer::new(core, &disk, &order)).collect();
        let pace = Pace {
            delay_turns: 5,
            slow_percent: 10,
        };
        let mut keepers = Keepers::new(keeps, pace, random.fork());
        disk.set_plan(Plan {
            stops_after,
            ..Plan::default()
        });
        let mut logs: Vec<Log> = (0..CORES).map(|_| Log::new(0)).collect();
        let mut given: Vec<VecDeque<usize>> = vec![VecDeque::new(); CORES];
        let (mut safe, mut written) = (vec![0; CORES], vec![vec![]; CORES]);
        let (mut turn, mut failed) = (0, false);
        while turn < 60 || !keepers.is_empty() && !disk.has_stopped() {
            turn += 1;
            let core = random.below(CORES);
            if turn < 60 && random.chance(50) {
                logs[core].delete(turn.to_string().as_bytes());
                let chunks = logs[core].take(UnixMillis(turn));
                chunks
                    .iter()
                    .for_each(|chunk| written[core].extend_from_slice(&chunk.effects));
                given[core].push_back(logs[core].position() as usize);
                let job = Job::Log {
                    chunks,
                    sync: durability == Durability::Always,
                    ends: false,
                };
                keepers.give(core, turn, job);
            }
            keepers.step(turn);
            while let Some(done) = keepers.take(core, turn) {
                let position = given[core].pop_front().expect("one for each");
                match done {
                    Done::Logged { synced: true, .. } => safe[core] = position,
                    Done::Logged { .. } => {}
                    _ => failed = true,
                }
            }
        }
        let found = disk.crash();
        let found = (0..CORES).map(|core| found.bytes(&core.to_string()).unwrap());
        Ran {
            safe,
            written,
            found: found.collect(),
            order: order.take(),
            failed,
        }
    }

    /// Each core hears of each job, in order, and what it was told to be safe is there, whenever the machine stops.
    #[test]
    fn what_is_said_to_be_safe_is() {
        let mut lost = 0;
        for seed in 1..=30 {
            let whole = run(seed, Durability::Always, None);
            assert!(!whole.failed);
            let lengths: Vec<usize> = whole.written.iter().map(Vec::len).collect();
            assert_eq!((whole.safe, whole.found), (lengths, whole.written));
            for stops_after in 0..40 {
                let Ran {
                    safe, written, found, ..
                } = run(seed, Durability::Always, Some(stops_after));
                for core in 0..CORES {
                    let safe = safe[core];
                    assert_eq!(
                        found[core].get(..safe),
                        Some(&written[core][..safe]),
                        "{seed} {stops_after}"
                    );
                    lost += usize::from(found[core] != written[core]);
                }
            }
        }
        assert!(lost > 100, "{lost}");
    }

    #[test]
    fn nothing_is_said_to_be_safe_without_a_sync() {
        let runs = (1..=30).map(|seed| run(seed, Durability::None, None));
        let lost = runs.filter(|ran| {
            assert_eq!(ran.safe, [0; CORES]);
            ran.found != ran.written
        });
        assert!(lost.count() > 10);
    }

    /// The same seed runs the same way, others in other orders.
    #[test]
    fn cores_overtake_each_other() {
        let order = |seed| run(seed, Durability::Always, None).order;
        assert_eq!(order(1), order(1));
        let orders: BTreeSet<Vec<usize>> = (1..=20).map(order).collect();
        assert_eq!(orders.len(), 20);
    }
}
