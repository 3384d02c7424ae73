//! The data directory of a server: opening it, and bringing back what is in it.
//!
//! Every core reads for itself what concerns its own shards, a piece at a time, between which its other work goes on: who asks by HTTP
//! how the server is gets an answer.

use super::disk::FolderDisk;
use super::{StartError, host};
use crate::config::{Config, DurabilityChoice, Recover};
use crate::data_dir::{DataDir, Problem, Restorer, SEGMENT_BYTES, Wanted};
use crate::engine::Engine;
use crate::model::CoreId;
use crate::partition::RangeTable;
use crate::wal::Durability;
use indicatif::{ProgressBar, ProgressStyle};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

impl From<Problem> for StartError {
    fn from(problem: Problem) -> Self {
        StartError(problem.to_string())
    }
}

/// How safe a write is to be.
pub(super) fn durability(config: &Config) -> Durability {
    match config.durability {
        DurabilityChoice::None => Durability::None,
        DurabilityChoice::Interval => Durability::Interval,
        DurabilityChoice::Always => Durability::Always,
    }
}

/// Opens the directory that the options name.
pub(super) fn open(config: &Config, path: &Path) -> Result<DataDir, StartError> {
    let disk = FolderDisk::open(path)?;
    let wanted = Wanted {
        name: path.display().to_string(),
        partitioner: config.partitioner,
        boundaries: config.boundaries.clone(),
        shards: config.shards,
        seed: config.token_seed,
        random: [host::random(), host::random()],
        segment_bytes: SEGMENT_BYTES,
        salvage: config.recover == Recover::Salvage,
    };
    let dir = DataDir::open(Arc::new(disk), wanted)?;
    for warning in dir.warnings() {
        log::warn!("{warning}");
    }
    Ok(dir)
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
    pub(super) fn begin(dir: &DataDir, name: &Path, core: CoreId, table: &RangeTable) -> Result<Self, StartError> {
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
            name: name.display().to_string(),
        })
    }

    /// Brings back a piece. True when that was the last.
    pub(super) fn step(&mut self, engine: &mut Engine) -> Result<bool, StartError> {
        let name = &self.name;
        let more = self.restorer.step(&mut |restored| {
            match engine.restore(restored.shard, restored.place.hash, &restored.effect) {
                true => Ok(()),
                false => Err(Problem {
                    file: name.clone(),
                    offset: None,
                    cause: "what is in it does not fit into memory".to_owned(),
                    remedy: "raise --max-memory, or let items make place: --eviction s3-fifo".to_owned(),
                }),
            }
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
