//! The log of one core, as far as it is in memory: what was done since its thread for files took the last of it.
//!
//! A shard appends an effect when it has had it ([`Log::put`] and its sisters). When it is time the engine hands everything over as
//! one [`Job::Log`], which is written and made safe in one go: however many requests it holds, they cost one write and one sync. It
//! comes back after a crash whole or not at all, so what one call did to several keys of a core needs no mark of its own.
//!
//! A *position* counts the bytes of effects of this core since the server started. An *epoch* is a stretch of time that all cores
//! begin together; the words for it are in `docs/transactions.md`. A [`Chunk`] belongs to one epoch.

use crate::effect::{self, Image};
use crate::model::{Deadline, UnixMillis};

/// Effects of one epoch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chunk {
    /// The position of its first byte.
    pub position: u64,
    /// The epoch in which they were had.
    pub epoch: u64,
    /// No part of a transaction that was decided in this epoch, or in one before it, is behind this chunk.
    pub closed: u64,
    /// When the last of them was.
    pub time: UnixMillis,
    /// Parts of transactions are among them.
    pub has_parts: bool,
    /// The effects, one behind the other; none where only the epoch is to be told.
    pub effects: Vec<u8>,
}

/// What is to be done with a core's files: jobs of the log in order, and those of images in order.
#[derive(Debug, PartialEq, Eq)]
pub enum Job {
    /// Write this to the log, all or nothing.
    Log {
        /// In order, without a gap.
        chunks: Vec<Chunk>,
        /// Return when it, and everything before it, is safe.
        sync: bool,
        /// Nothing follows: the server ends, and no transaction is under way.
        ends: bool,
    },
    /// Begin an image of a shard as it is at this position. At most one is under way.
    BeginImage {
        /// Which.
        shard: u16,
        /// What the log says of the shard from here on is not in it.
        position: u64,
        /// The epoch of that moment.
        epoch: u64,
        /// That moment.
        time: UnixMillis,
    },
    /// More items of it, as effects.
    Image {
        /// [`effect::push_put`] of each.
        effects: Vec<u8>,
        /// How many.
        items: u64,
    },
    /// That was all: make it safe, but do not put it in the place of the older one yet.
    EndImage,
    /// It is not to be finished.
    DropImage,
    /// The image that was ended last takes the older one's place, and what the log says before the oldest position that is still
    /// needed is forgotten: it is in the images of all of the core's shards.
    AdoptImage {
        /// That position.
        log_needed_from: u64,
    },
}

/// What came of a job. One for each: those of the log in order, and those of images in order.
#[derive(Debug)]
pub enum Done {
    /// Of [`Job::Log`], with its buffers, to be used again.
    Logged {
        /// The chunks' effects.
        buffers: Vec<Vec<u8>>,
        /// It is safe.
        synced: bool,
    },
    /// Of the jobs that concern an image, with its buffer.
    Image {
        /// To be used again.
        buffer: Vec<u8>,
        /// Bytes of the image so far, in its file.
        bytes: u64,
    },
    /// The job failed. After one of [`Job::Log`] the log takes nothing more; the image, in the other case, is given up.
    Failed {
        /// It was the log.
        log: bool,
        /// What, and why, for people.
        why: String,
    },
}

/// How safe what is logged is, and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// It is written, and the system decides when it is safe.
    None,
    /// It is made safe at an interval.
    Interval,
    /// Nobody is told of it, or sees it, before it is safe.
    Always,
}

/// See the module's text.
#[derive(Debug)]
pub struct Log {
    /// Chunks of earlier epochs, and the one that is filled.
    full: Vec<Chunk>,
    open: Chunk,
    /// Buffers to fill next.
    buffers: Vec<Vec<u8>>,
    /// Bytes of effects in `full`.
    full_bytes: usize,
    /// Where the effects are put until the part that they belong to is complete.
    part: Option<usize>,
    /// The open chunk tells something that was not told, with or without effects.
    news: bool,
}

/// Buffers that are kept for use, and how large each may be.
const BUFFERS_KEPT_MAX: usize = 2;
const BUFFER_KEPT_BYTES_MAX: usize = 8 << 20;

impl Log {
    /// An empty one, in this epoch.
    pub fn new(epoch: u64) -> Self {
        Self {
            full: vec![],
            open: Chunk {
                epoch,
                closed: epoch.saturating_sub(1),
                ..Chunk::default()
            },
            buffers: vec![],
            full_bytes: 0,
            part: None,
            news: false,
        }
    }

    /// Where the next effect will be.
    #[inline]
    pub fn position(&self) -> u64 {
        self.open.position + self.open.effects.len() as u64
    }

    /// The present epoch.
    pub fn epoch(&self) -> u64 {
        self.open.epoch
    }

    /// The last epoch of which no part of a transaction comes any more.
    pub fn closed(&self) -> u64 {
        self.open.closed
    }

    /// Bytes that wait to be taken.
    #[inline]
    pub fn bytes(&self) -> usize {
        self.full_bytes + self.open.effects.len()
    }

    /// There is something to be taken.
    #[inline]
    pub fn has_news(&self) -> bool {
        self.news || !self.open.effects.is_empty() || !self.full.is_empty()
    }

    /// An item was written.
    #[inline]
    pub fn put(&mut self, image: &Image<'_>) {
        effect::push_put(&mut self.open.effects, image);
    }

    /// A key has nothing any more.
    #[inline]
    pub fn delete(&mut self, key: &[u8]) {
        effect::push_delete(&mut self.open.effects, key);
    }

    /// An item has another deadline and state.
    pub fn amend(&mut self, key: &[u8], deadline: Deadline, state: u8) {
        effect::push_amend(&mut self.open.effects, key, deadline, state);
    }

    /// All shards of the core were emptied.
    pub fn empty(&mut self) {
        effect::push_empty(&mut self.open.effects);
    }

    /// What follows, until [`Log::finish_part`], is this core's part of a transaction that the `writers` write to.
    pub fn begin_part(&mut self, core: u16, clock: u64, epoch: u64, writers: &[u16]) {
        self.open.has_parts = true;
        self.part = Some(effect::begin_part(&mut self.open.effects, core, clock, epoch, writers));
    }

    /// Ends the part.
    pub fn finish_part(&mut self) {
        if let Some(length_at) = self.part.take() {
            effect::finish_part(&mut self.open.effects, length_at);
        }
    }

    /// A later epoch begins.
    pub fn begin_epoch(&mut self, epoch: u64) {
        let next = Chunk {
            position: self.position(),
            epoch,
            closed: self.open.closed,
            time: self.open.time,
            has_parts: false,
            effects: self.buffers.pop().unwrap_or_default(),
        };
        let before = std::mem::replace(&mut self.open, next);
        if before.effects.is_empty() {
            self.buffers.push(before.effects);
        } else {
            self.full_bytes += before.effects.len();
            self.full.push(before);
        }
    }

    /// No part of a transaction of this epoch, or an earlier one, comes any more.
    pub fn close_epoch(&mut self, epoch: u64) {
        self.open.closed = epoch;
        self.news = true;
    }

    /// Takes everything, for [`Job::Log`]. `time` is now.
    pub fn take(&mut self, time: UnixMillis) -> Vec<Chunk> {
        let next = Chunk {
            position: self.position(),
            effects: self.buffers.pop().unwrap_or_default(),
            has_parts: false,
            ..self.open
        };
        let mut chunks = std::mem::take(&mut self.full);
        self.full_bytes = 0;
        self.news = false;
        chunks.push(std::mem::replace(&mut self.open, next));
        for chunk in &mut chunks {
            chunk.time = time;
        }
        chunks
    }

    /// Takes back what [`Done::Logged`] brings.
    pub fn recycle(&mut self, buffers: Vec<Vec<u8>>) {
        for mut buffer in buffers {
            if self.buffers.len() < BUFFERS_KEPT_MAX && buffer.capacity() <= BUFFER_KEPT_BYTES_MAX {
                buffer.clear();
                self.buffers.push(buffer);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Positions go on from chunk to chunk, and every byte is taken once, in its epoch.
    #[test]
    fn chunks_have_no_gap() {
        let mut log = Log::new(3);
        assert!(!log.has_news());
        log.delete(b"one");
        log.begin_epoch(4);
        log.delete(b"two");
        log.close_epoch(3);
        let first = log.take(UnixMillis(7));
        log.delete(b"three");
        log.begin_epoch(5);
        log.begin_epoch(6);
        let second = log.take(UnixMillis(8));
        let chunks: Vec<&Chunk> = first.iter().chain(&second).collect();
        let epochs: Vec<(u64, u64)> = chunks.iter().map(|chunk| (chunk.epoch, chunk.closed)).collect();
        assert_eq!(epochs, [(3, 2), (4, 3), (4, 3), (6, 3)]);
        let mut position = 0;
        for chunk in chunks {
            assert_eq!(chunk.position, position);
            position += chunk.effects.len() as u64;
        }
        assert_eq!(position, log.position());
        assert!(!log.has_news());
    }
}
