//! Snapshots: images of this core's shards, one after the other, so that the log can begin anew.
//!
//! An image is begun at a moment, and made a piece at a time while the shard goes on changing. It takes the place of the older one,
//! and of the log before that moment, when the epoch of that moment is safe on all cores: then nothing that is in it can be cut away
//! by a crash.

use super::Engine;
use super::journal::Journal;
use crate::effect::Effect;
use crate::model::{ShardId, UnixMillis};
use crate::shards::Shards;
use crate::wal::Job;
use std::collections::VecDeque;

/// A piece of an image, once in a millisecond: so many stripes of some 16 items, and about so many bytes.
const STRIPES: usize = 64;
const PIECE_BYTES: usize = 128 << 10;
/// What is handed over at once, and how many times that may be under way.
const HANDED_BYTES: usize = 256 << 10;
const UNDER_WAY_MAX: usize = 2;
/// Bytes of items that were saved from being overwritten and that the disk has not taken: at it, requests are not begun. Where that
/// is more, a part of the memory limit, divided among the cores.
const BACKLOG_BYTES_MAX: usize = 16 << 20;
const BACKLOG_SHARE: u64 = 256;

/// That limit.
pub(super) fn backlog_bytes_max(memory_bytes: u64, cores: u16) -> usize {
    let share = usize::try_from(memory_bytes / BACKLOG_SHARE / u64::from(cores));
    share.unwrap_or(BACKLOG_BYTES_MAX).min(BACKLOG_BYTES_MAX)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Its beginning is to be told.
    Begin,
    /// Items are written down.
    Walk,
    /// All are, and the file is made safe.
    End,
    /// It is, and waits for its epoch.
    Safe,
    /// It takes the older one's place.
    Adopt,
}

/// The image that is under way.
#[derive(Debug)]
struct Current {
    shard: u16,
    position: u64,
    epoch: u64,
    stage: Stage,
    /// Items that are not handed over yet.
    effects: Vec<u8>,
    items: u64,
    /// The last is among them.
    is_whole: bool,
}

/// See the module's text.
#[derive(Debug, Default)]
pub(super) struct Images {
    /// Shards whose turn is still to come.
    queue: VecDeque<u16>,
    current: Option<Current>,
    /// Jobs that are under way.
    under_way: usize,
    /// What they come back with, to be used again.
    buffer: Vec<u8>,
    /// By shard of this core: where the log was when its last image was begun, 0 without one.
    positions: Vec<u64>,
    first: u16,
    stepped_ms: u64,
    /// Where the log was, and when it was, when a round began last.
    round_position: u64,
    round_ms: u64,
    /// Begin one more round when this one ends.
    again: bool,
    /// When the last round ended, 0 if none has; and that one has failed since.
    pub(super) finished_ms: u64,
    pub(super) has_failed: bool,
}

impl Images {
    pub(super) fn new(shards: impl Iterator<Item = ShardId>, now_ms: u64) -> Self {
        let shards: Vec<u16> = shards.map(|shard| shard.0).collect();
        Self {
            positions: vec![0; shards.len()],
            first: shards.first().copied().unwrap_or(0),
            round_ms: now_ms,
            ..Self::default()
        }
    }

    fn is_idle(&self) -> bool {
        self.current.is_none() && self.queue.is_empty()
    }

    /// Where the log is needed from once a shard has an image of this position: what is before that is in images.
    fn log_needed_from(&self, shard: u16, position: u64) -> u64 {
        let of = |(number, had): (u16, &u64)| if number == shard { position } else { *had };
        (self.first..).zip(&self.positions).map(of).min().unwrap_or(0)
    }

    /// Begins a round of all shards; while one is under way, another one when that ends.
    pub(super) fn begin_round(&mut self, position: u64, now_ms: u64) {
        if !self.is_idle() {
            self.again = true;
            return;
        }
        (self.round_position, self.round_ms) = (position, now_ms);
        self.queue = (self.first..).take(self.positions.len()).collect();
    }

    /// The next job, if there is one now.
    pub(super) fn job(&mut self, core: &mut Core<'_>) -> Option<Job> {
        if self.current.is_none() {
            if self.under_way > 0 {
                return None;
            }
            let shard = self.queue.front().copied()?;
            if !core.shards.begin_image(shard, core.now) {
                // There is no memory now: later.
                return None;
            }
            self.queue.pop_front();
            self.current = Some(Current {
                shard,
                position: core.position,
                epoch: core.epoch,
                stage: Stage::Begin,
                effects: std::mem::take(&mut self.buffer),
                items: 0,
                is_whole: false,
            });
        }
        let current = self.current.as_mut()?;
        let job = match current.stage {
            Stage::Begin => {
                current.stage = Stage::Walk;
                Job::BeginImage {
                    shard: current.shard,
                    position: current.position,
                    epoch: current.epoch,
                    time: core.now,
                }
            }
            Stage::Walk => {
                if self.under_way >= UNDER_WAY_MAX {
                    return None;
                }
                if !current.is_whole && current.effects.len() < HANDED_BYTES {
                    if self.stepped_ms == core.now.0 {
                        return None;
                    }
                    self.stepped_ms = core.now.0;
                    match core
                        .shards
                        .image_step(current.shard, STRIPES, PIECE_BYTES, &mut current.effects, core.now)
                    {
                        Some(step) => {
                            current.items += step.items;
                            current.is_whole = step.done;
                        }
                        // The shard was emptied meanwhile.
                        None => return Some(self.begin_anew()),
                    }
                }
                if current.effects.len() < HANDED_BYTES && !current.is_whole {
                    return None;
                }
                if current.effects.is_empty() {
                    current.stage = Stage::End;
                    Job::EndImage
                } else {
                    Job::Image {
                        effects: std::mem::replace(&mut current.effects, std::mem::take(&mut self.buffer)),
                        items: std::mem::take(&mut current.items),
                    }
                }
            }
            Stage::Safe if core.journal.safe() >= current.epoch => {
                current.stage = Stage::Adopt;
                let (shard, position) = (current.shard, current.position);
                Job::AdoptImage {
                    log_needed_from: self.log_needed_from(shard, position),
                }
            }
            Stage::Safe => {
                core.journal.ask_for(current.epoch);
                return None;
            }
            Stage::End | Stage::Adopt => return None,
        };
        self.under_way += 1;
        Some(job)
    }

    /// Gives up the image that is under way, and begins it once more.
    fn begin_anew(&mut self) -> Job {
        if let Some(current) = self.current.take() {
            self.queue.push_front(current.shard);
        }
        self.under_way += 1;
        Job::DropImage
    }

    /// A job has come back. True when it was the last one of a round.
    pub(super) fn done(&mut self, mut buffer: Vec<u8>, now_ms: u64) -> bool {
        self.under_way -= 1;
        buffer.clear();
        self.buffer = buffer;
        let Some(current) = &mut self.current else {
            return false;
        };
        match current.stage {
            Stage::End if self.under_way == 0 => current.stage = Stage::Safe,
            Stage::Adopt => {
                self.positions[usize::from(current.shard - self.first)] = current.position;
                self.current = None;
                if self.queue.is_empty() {
                    self.finished_ms = now_ms;
                    self.has_failed = false;
                    return true;
                }
            }
            _ => {}
        }
        false
    }

    /// A job has failed: the round ends here.
    pub(super) fn failed(&mut self) {
        self.under_way -= 1;
        self.give_up();
        self.has_failed = true;
    }

    /// No epoch will be safe any more: what is under way never takes its place, and there is nothing to wait for.
    pub(super) fn give_up(&mut self) {
        self.has_failed |= !self.is_idle();
        self.current = None;
        self.queue.clear();
    }

    /// There is a piece to do in a millisecond.
    pub(super) fn is_walking(&self) -> bool {
        !self.is_idle()
    }
}

/// What an image is made from.
pub(super) struct Core<'a> {
    pub(super) shards: &'a mut Shards,
    pub(super) journal: &'a mut Journal,
    /// Where the log is.
    pub(super) position: u64,
    pub(super) epoch: u64,
    pub(super) now: UnixMillis,
}

impl Engine {
    /// Does again what an earlier server did to one of this core's shards, before connections are served; nothing of it is noted.
    /// `hash` is the key's. False: there is no memory for it.
    pub fn restore(&mut self, shard: u16, hash: u64, effect: &Effect<'_>) -> bool {
        let counters = &mut self.metrics.counters;
        if let Effect::Empty = effect {
            self.shards.empty(shard, self.now, counters);
            return true;
        }
        self.shards.restore(shard, hash, effect, self.now, counters)
    }

    /// Begins a snapshot of this core's shards, or one more when the one that is under way ends. False without a data directory, and
    /// when the log cannot be written any more: no image would ever be known to be safe.
    pub fn snapshot(&mut self) -> bool {
        let (position, now_ms) = (self.log_position(), self.now.0);
        if self.log_failure().is_some() {
            return false;
        }
        let Some(images) = &mut self.images else { return false };
        images.begin_round(position, now_ms);
        true
    }

    /// Begins a snapshot when the log has become long, or when it is time.
    pub(super) fn snapshot_when_due(&mut self) {
        let (position, now_ms) = (self.log_position(), self.now.0);
        if self.images.as_ref().is_none_or(|images| !images.is_idle()) || self.log_failure().is_some() {
            return;
        }
        let Some(images) = &mut self.images else { return };
        let written = position - images.round_position;
        let bytes_max = self.config.snapshot_log_bytes.0 / u64::from(self.table.cores());
        let period_ms = self.config.snapshot_interval.as_millis() as u64;
        let is_long = bytes_max > 0 && written >= bytes_max;
        let is_time = period_ms > 0 && written > 0 && now_ms.saturating_sub(images.round_ms) >= period_ms;
        if is_long || is_time || std::mem::take(&mut images.again) {
            images.begin_round(position, now_ms);
        }
    }
}
