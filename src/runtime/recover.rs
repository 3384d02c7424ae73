//! The data directory of a server: opening it, and bringing back what is in it.
//!
//! Every core reads for itself what concerns its own shards, a piece at a time, between which its other work goes on: who asks by HTTP
//! how the server is gets an answer.

use super::disk::Folder;
use super::filer::Filer;
use super::mesh::Peer;
use super::{StartError, host};
use crate::config::{Config, DurabilityChoice, Recover};
use crate::data_dir::{DataDir, Problem, Restorer, SEGMENT_BYTES, Wanted};
use crate::engine::Engine;
use crate::model::CoreId;
use crate::partition::RangeTable;
use crate::wal::Durability;
use indicatif::{ProgressBar, ProgressStyle};
use std::sync::Arc;
use std::time::{Duration, Instant};

impl From<Problem> for StartError {
    fn from(problem: Problem) -> Self {
        StartError(problem.to_string())
    }
}

/// How safe a write is to be.
fn durability(config: &Config) -> Durability {
    match config.durability {
        DurabilityChoice::None => Durability::None,
        DurabilityChoice::Interval => Durability::Interval,
        DurabilityChoice::Always => Durability::Always,
    }
}

/// A server's data directory.
#[derive(Debug)]
pub(super) struct Data {
    dir: DataDir,
    table: Option<Arc<RangeTable>>,
    name: String,
    durability: Durability,
    sync_interval: Duration,
    /// That the process may use.
    cpus: Vec<usize>,
}

impl Data {
    /// Opens the directory that the options name; `None` when they name none.
    pub(super) fn open(config: &Config) -> Result<Option<Self>, StartError> {
        let Some(path) = &config.data_dir else {
            return Ok(None);
        };
        let folder = Folder::take(path)?;
        let name = path.display().to_string();
        let wanted = Wanted {
            name: name.clone(),
            partitioner: config.partitioner,
            boundaries: config.boundaries.clone(),
            shards: config.shards,
            seed: config.token_seed,
            random: [host::random(), host::random()],
            segment_bytes: SEGMENT_BYTES,
            salvage: config.recover == Recover::Salvage,
        };
        let dir = DataDir::open(Arc::new(folder), wanted)?;
        for warning in dir.warnings() {
            log::warn!("{warning}");
        }
        Ok(Some(Self {
            dir,
            table: None,
            name,
            durability: durability(config),
            sync_interval: config.sync_interval,
            cpus: host::allowed_cpus()?,
        }))
    }

    /// Which core owns what.
    pub(super) fn table(&self, cores: u16) -> Result<RangeTable, StartError> {
        Ok(self.dir.table(cores)?)
    }

    /// Begins to write. A file is not loaded where there is data.
    pub(super) fn begin(&mut self, table: &Arc<RangeTable>, config: &mut Config) -> Result<(), StartError> {
        if let Some(path) = &config.load
            && self.dir.holds_data()
            && !config.load_again
        {
            let (path, name) = (path.display(), &self.name);
            log::info!("{path} is not loaded: {name} holds data (--load-again loads it all the same)");
            config.load = None;
        }
        self.dir.begin_generation(table, self.durability)?;
        self.table = Some(table.clone());
        Ok(())
    }

    /// Gives a core its log, and what is to be brought back of its shards.
    pub(super) fn core(
        &self,
        engine: &mut Engine,
        core: CoreId,
        peers: &Arc<Vec<Peer>>,
    ) -> Result<(Filer, Restoring), StartError> {
        let keeper = self.dir.keeper(core.0)?;
        let peers = peers.clone();
        let bell = Box::new(move || peers[usize::from(core.0)].ring());
        let filer = Filer::start(core.0, keeper, self.cpus.clone(), bell)
            .map_err(|error| StartError(format!("no thread for the files of core {}: {error}", core.0)))?;
        engine.keep_log(self.durability, self.sync_interval);
        let table = self.table.as_ref().ok_or_else(|| StartError("no shards".to_owned()))?;
        let restoring = Restoring::begin(&self.dir, &self.name, core, table)?;
        Ok((filer, restoring))
    }
}

/// Brings back what is there of a core's shards, a piece at a time. The first core shows how far all are, nearly: they have about as
/// much to read.
pub(super) struct Restoring {
    restorer: Restorer,
    bar: ProgressBar,
    began: Instant,
    core: CoreId,
    name: String,
}

impl Restoring {
    fn begin(dir: &DataDir, name: &str, core: CoreId, table: &RangeTable) -> Result<Self, StartError> {
        let mut own = table.shards_of(core).map(|shard| shard.0);
        let first = own.next().unwrap_or(0);
        let end = own.last().map_or(first, |last| last) + u16::from(table.shards_of(core).next().is_some());
        let restorer = dir.restorer(first..end, table.clone());
        let (_, total) = restorer.progress();
        let bar = if core == CoreId(0) && total > 0 {
            ProgressBar::new(total)
        } else {
            ProgressBar::hidden()
        };
        let style = "restoring {bar:40} {percent}% of {total_bytes}, {bytes_per_sec}, {eta} left";
        bar.set_style(ProgressStyle::with_template(style).map_err(|error| StartError(error.to_string()))?);
        Ok(Self {
            restorer,
            bar,
            began: Instant::now(),
            core,
            name: name.to_owned(),
        })
    }

    /// Brings back a piece. True when that was the last.
    pub(super) fn step(&mut self, engine: &mut Engine) -> Result<bool, StartError> {
        let name = &self.name;
        let more = self.restorer.step(&mut |restored| match engine.restore(
            restored.shard,
            restored.place.hash,
            &restored.effect,
        ) {
            true => Ok(()),
            false => Err(Problem {
                file: name.clone(),
                offset: None,
                cause: "what is in it does not fit into memory".to_owned(),
                remedy: "raise --max-memory, or let items make place: --eviction s3-fifo".to_owned(),
            }),
        })?;
        let (done, total) = self.restorer.progress();
        self.bar.set_position(done);
        if !more {
            self.bar.finish_and_clear();
            if total > 0 {
                log::info!(
                    "core {}: restored from {name}, {total} bytes, in {:?}",
                    self.core.0,
                    self.began.elapsed()
                );
            }
        }
        Ok(!more)
    }
}
