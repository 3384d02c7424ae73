//! The files of a cluster's cores: what brings back what an earlier run left, and what each core does with its thread for files
//! in a turn, as the runtime does.

use super::disk::SimDisk;
use super::keepers::{Keep, Keepers, Pace};
use super::random::Random;
use super::support::TOKEN_SEED;
use memkv::data_dir::{DataDir, Problem, Wanted};
use memkv::effect::{self, Effect};
use memkv::engine::Engine;
use memkv::keeper::{Keeper, Write, Writer};
use memkv::wal::{Chunk, Done, Durability, Job};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

/// A bug in what has to do with files, made on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// What was written is said to be safe, and is not.
    ClaimSync,
    /// Replies do not wait until what they tell is written.
    ReplyEarly,
    /// A core's part of a transaction is not in its log.
    LosePart,
    /// A crash cuts no log where the others end: each core comes back as far as it was.
    IgnoreClosed,
    /// An image takes the place of the log before its epoch is safe on all cores.
    AdoptEarly,
}

/// What a server is started with.
#[derive(Clone, Debug)]
pub struct Options {
    pub durability: Durability,
    pub sync_interval_ms: u64,
    pub segment_bytes: u64,
    pub shards: u16,
    pub pace: Pace,
    pub fault: Option<Fault>,
}

/// The keeper of a core's files, perhaps with a bug.
struct Faulty {
    keeper: Keeper,
    /// Of the keeper, while writes of it are under way.
    writer: Option<Box<Writer>>,
    /// These, and how each went that has come to the disk: one may overtake another.
    writes: VecDeque<(Write, Option<std::io::Result<()>>)>,
    /// How often one was begun while another was under way, and how often it was done before that.
    beside: u64,
    overtook: u64,
    fault: Option<Fault>,
    random: Random,
}

impl Keep for Faulty {
    fn run(&mut self, job: Job) -> Done {
        match (self.fault, job) {
            (
                Some(Fault::ClaimSync),
                Job::Log {
                    chunks,
                    sync: true,
                    ends,
                },
            ) => {
                let sync = false;
                match self.keeper.run(Job::Log { chunks, sync, ends }) {
                    Done::Logged { buffers, .. } => Done::Logged { buffers, synced: true },
                    done => done,
                }
            }
            (
                Some(fault @ (Fault::LosePart | Fault::IgnoreClosed)),
                Job::Log {
                    mut chunks, sync, ends, ..
                },
            ) => {
                for chunk in &mut chunks {
                    match fault {
                        Fault::LosePart if self.random.chance(30) => lose_parts(chunk),
                        Fault::IgnoreClosed => chunk.closed = u64::MAX / 2,
                        _ => {}
                    }
                }
                self.keeper.run(Job::Log { chunks, sync, ends })
            }
            (Some(Fault::AdoptEarly), Job::EndImage) => match self.keeper.run(Job::EndImage) {
                Done::Image { .. } => self.keeper.run(Job::AdoptImage { log_needed_from: 0 }),
                done => done,
            },
            (Some(Fault::AdoptEarly), Job::AdoptImage { .. }) => Done::Image {
                buffer: vec![],
                bytes: 0,
            },
            (_, job) => self.keeper.run(job),
        }
    }

    fn begin(&mut self, job: Job) -> Result<(), Job> {
        let Job::Log {
            chunks,
            sync: true,
            ends,
        } = &job
        else {
            return Err(job);
        };
        if self.fault.is_some() {
            return Err(job);
        }
        let Some(mut writer) = self.writer.take().or_else(|| self.keeper.lend()) else {
            return Err(job);
        };
        let write = writer.begin(chunks, *ends);
        self.beside += u64::from(write.is_some() && !self.writes.is_empty());
        let begun = write.map(|write| self.writes.push_back((write, None)));
        if begun.is_some() && writer.needs_next() {
            self.keeper.need_next();
        }
        self.put_back(writer);
        for at in (0..self.writes.len())
            .rev()
            .filter(|_| self.random.chance(50))
            .collect::<Vec<_>>()
        {
            self.write(at);
        }
        begun.ok_or(job)
    }

    fn finish(&mut self) -> Option<Done> {
        self.write(0);
        let (write, written) = self.writes.pop_front()?;
        let mut writer = self.writer.take()?;
        let ended = writer.end(write, written?.and_then(|()| writer.file().sync()));
        self.put_back(writer);
        let (buffers, synced) = (vec![], true);
        Some(match ended {
            Ok(()) => Done::Logged { buffers, synced },
            Err(why) => Done::Failed { log: true, why },
        })
    }

    fn idle(&mut self) -> bool {
        self.keeper.idle()
    }
}

impl Faulty {
    /// One of the writes that are under way comes to the disk.
    fn write(&mut self, at: usize) {
        if let (Some(writer), Some((write, written @ None))) = (&self.writer, self.writes.get_mut(at)) {
            *written = Some(writer.file().write_at(write.offset(), write.bytes()));
            self.overtook += u64::from(self.writes.range(..at).any(|(_, written)| written.is_none()));
        }
    }

    fn put_back(&mut self, writer: Box<Writer>) {
        if self.writes.is_empty() {
            self.keeper.give_back(writer);
        } else {
            self.writer = Some(writer);
        }
    }
}

/// Writes the deletion of a key that nobody has over each part of a transaction.
fn lose_parts(chunk: &mut Chunk) {
    let length = chunk.effects.len();
    let mut parts = vec![];
    let mut rest = chunk.effects.as_slice();
    while let Ok(effect) = effect::read(&mut rest) {
        if let Effect::Part(part) = effect {
            let end = length - rest.len();
            parts.push(end - part.effects.len()..end);
        }
    }
    let head = 4;
    for part in parts.into_iter().filter(|part| part.len() > head) {
        let mut lost = vec![];
        effect::push_delete(&mut lost, &vec![b'-'; part.len() - head]);
        chunk.effects[part].copy_from_slice(&lost);
    }
}

/// See the module's text.
pub struct Files {
    pub disk: SimDisk,
    keepers: Keepers<Faulty>,
    /// In which all cores are to be.
    epoch: u64,
    /// What was said when the directory was opened.
    pub warnings: Vec<String>,
    /// News that something could not be done.
    pub failures: Vec<String>,
}

impl Files {
    /// Opens the directory that is the whole disk, gives each engine its log, and brings back what there is.
    pub fn open(
        disk: &SimDisk,
        options: &Options,
        engines: &mut [Engine],
        random: &mut Random,
    ) -> Result<Self, Problem> {
        let wanted = Wanted {
            name: "dir".to_owned(),
            partitioner: None,
            boundaries: vec![],
            shards: Some(options.shards),
            seed: Some(TOKEN_SEED),
            random: [1, 2].map(|number| random.below(1 << 40) as u64 + number),
            segment_bytes: options.segment_bytes,
            salvage: false,
        };
        let cores = engines.len() as u16;
        let mut dir = DataDir::open(Arc::new(disk.clone()), wanted)?;
        let table = dir.table(cores)?;
        dir.begin_generation(&table, options.durability)?;
        let mut keepers = vec![];
        for (core, engine) in (0..).zip(&mut *engines) {
            keepers.push(Faulty {
                keeper: dir.keeper(core)?,
                writer: None,
                writes: VecDeque::new(),
                beside: 0,
                overtook: 0,
                fault: options.fault,
                random: random.fork(),
            });
            engine.keep_log(options.durability, Duration::from_millis(options.sync_interval_ms));
            engine.share_syncs_among(1 + random.below(3));
        }
        for (core, engine) in (0..).map(memkv::model::CoreId).zip(engines) {
            let own: Vec<u16> = table.shards_of(core).map(|shard| shard.0).collect();
            let first = own.first().copied().unwrap_or(0);
            let mut restorer = dir.restorer(first..first + own.len() as u16, table.clone());
            while restorer.step(&mut |restored| {
                assert!(
                    engine.restore(restored.shard, restored.place.hash, &restored.effect),
                    "there is memory for what was there"
                );
                Ok(())
            })? {}
        }
        let mut keepers = Keepers::new(keepers, options.pace, random.fork());
        if options.fault == Some(Fault::ReplyEarly) {
            keepers.say_so_early();
        }
        Ok(Self {
            disk: disk.clone(),
            keepers,
            epoch: 0,
            warnings: dir.warnings().to_vec(),
            failures: vec![],
        })
    }

    /// Before anything that a turn brings.
    pub fn begin(&self, engine: &mut Engine) {
        engine.set_epoch(self.epoch);
    }

    /// Tells a core what became of its files.
    pub fn take(&mut self, core: usize, turn: u64, engine: &mut Engine) {
        while let Some(done) = self.keepers.take(core, turn) {
            if let Done::Failed { why, .. } = &done {
                self.failures.push(format!("core {core}: {why}"));
            }
            engine.disk_done(done);
        }
    }

    /// Does what a core wants of its files.
    pub fn give(&mut self, core: usize, turn: u64, engine: &mut Engine) {
        if let Some(epoch) = engine.wanted_epoch() {
            self.epoch = self.epoch.max(epoch);
            engine.set_epoch(epoch);
        }
        while let Some(job) = engine.disk_job() {
            self.keepers.give(core, turn, job);
        }
    }

    /// Hands over the last job of a core, if there is one.
    pub fn end(&mut self, core: usize, turn: u64, engine: &mut Engine) {
        if let Some(job) = engine.end_log(true) {
            self.keepers.give(core, turn, job);
        }
    }

    pub fn step(&mut self, turn: u64) {
        if !self.disk.has_stopped() {
            self.keepers.step(turn);
        }
    }

    /// How often a write was begun beside another one, and how often one was done before an earlier one.
    pub fn beside_and_overtook(&self) -> (u64, u64) {
        let counts = self.keepers.keeps().map(|keep| (keep.beside, keep.overtook));
        counts.fold((0, 0), |sum, count| (sum.0 + count.0, sum.1 + count.1))
    }

    /// Nothing is to be done or told.
    pub fn is_idle(&self) -> bool {
        self.keepers.is_empty()
    }
}
