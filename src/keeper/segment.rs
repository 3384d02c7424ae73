//! The log of one core on disk: the segment that is written, those before it that are still needed, and the ones that wait.

use super::Place;
use crate::disk::{BLOCK_BYTES, Block, File};
use crate::frame::{self, FRAMES_AT, Frame, HEAD_BYTES, SegmentHead, SegmentName};
use crate::wal::Chunk;
use std::collections::VecDeque;

/// Segments that wait to be used, at most: what an image sets free at once is needed again while the next one is made.
const SPARES_MAX: usize = 4;

/// What is collected before it is written, about; beyond that a unit costs more than one write.
const WRITE_BYTES: usize = 4 << 20;

/// What is zeroed in one go while there is nothing else to do. It delays the next job by that much.
const PREPARE_BYTES: usize = 1 << 20;

const PREPARING: &str = ".new";

/// See the module's text.
pub(super) struct Log {
    /// The segment that is written.
    head: SegmentHead,
    file: Box<dyn File>,
    /// What is not written yet, from `base` of the file on; the first block may have been written in part.
    buffer: Vec<Block>,
    /// Bytes in the buffer.
    filled: usize,
    base: u64,
    /// Something in the buffer was not written.
    dirty: bool,
    /// Something was written and is not safe.
    unsynced: bool,
    /// Of the next frame.
    sequence: u64,
    position: u64,
    /// Frames before this sequence are safe.
    synced: u64,
    /// Where the unit under way began, or the next one will, and what the last frame before it said.
    unit: (u64, u64),
    closed: u64,
    /// The segments that are there, with the position at which each begins; the last is the one that is written.
    segments: VecDeque<(u64, u64)>,
    /// Numbers of those that wait.
    spares: Vec<usize>,
    preparing: Option<Preparing>,
    /// One could not be prepared: not again before it is needed.
    cannot_prepare: bool,
}

struct Preparing {
    file: Box<dyn File>,
    path: String,
    done: u64,
}

fn free_spare(spares: &[usize]) -> Option<usize> {
    (0..SPARES_MAX).find(|number| !spares.contains(number))
}

fn name(place: &Place, number: u64) -> SegmentName {
    SegmentName {
        generation: place.generation,
        core: place.core,
        number,
    }
}

/// Makes the file of a segment and its header safe, under another name, and then gives it its name.
pub(crate) fn create_segment(place: &Place, head: &SegmentHead, spare: Option<&str>) -> Result<(), String> {
    let path = name(place, head.number).path();
    let disk = &place.disk;
    let made = match spare {
        Some(spare) => spare.to_owned(),
        None => format!("{path}{PREPARING}"),
    };
    let failed = |error| place.failed("begin the segment", &path, &error);
    if spare.is_none() {
        let file = disk.create(&made).map_err(failed)?;
        if let Err(error) = file.allocate(head.bytes) {
            drop(file);
            // It takes room that others may need.
            let _ = disk.remove(&made);
            return Err(failed(error));
        }
    }
    let file = disk.open_blocks(&made).map_err(failed)?;
    let block = [head.write()];
    file.write_at(0, bytemuck::cast_slice(&block)).map_err(failed)?;
    file.sync().map_err(failed)?;
    drop(file);
    disk.rename(&made, &path).map_err(failed)?;
    disk.sync_dir("log").map_err(failed)
}

impl Log {
    /// The log whose first segment was just made.
    pub(super) fn new(place: &Place, head: SegmentHead) -> Result<Self, String> {
        let path = name(place, head.number).path();
        let file = place.disk.open_blocks(&path);
        let file = file.map_err(|error| place.failed("open", &path, &error))?;
        let mut log = Self {
            head,
            file,
            buffer: vec![],
            filled: 0,
            base: FRAMES_AT,
            dirty: false,
            unsynced: false,
            sequence: head.sequence,
            position: head.position,
            synced: head.sequence,
            unit: (head.unit_sequence, head.unit_position),
            closed: head.closed,
            segments: VecDeque::from([(head.number, head.position)]),
            spares: vec![],
            preparing: None,
            cannot_prepare: false,
        };
        log.find_spares(place)?;
        Ok(log)
    }

    /// What an earlier run of the server left, if it fits.
    fn find_spares(&mut self, place: &Place) -> Result<(), String> {
        let disk = &place.disk;
        let names = disk.list("log").map_err(|error| place.failed("list", "log", &error))?;
        for (core, number) in names.iter().filter_map(|name| frame::spare_parts(name)) {
            if core != place.core {
                continue;
            }
            let path = frame::spare_name(core, number);
            let length = disk.open(&path).and_then(|file| file.len());
            if number < SPARES_MAX && length.is_ok_and(|length| length == self.head.bytes) {
                self.spares.push(number);
            } else {
                disk.remove(&path)
                    .map_err(|error| place.failed("remove", &path, &error))?;
            }
        }
        Ok(())
    }

    /// Writes a unit: all of it, or, after a crash, nothing.
    pub(super) fn append(&mut self, place: &Place, chunks: &[Chunk], sync: bool, ends: bool) -> Result<(), String> {
        self.unit = (self.sequence, self.position);
        let room = (self.head.bytes - FRAMES_AT) as usize - HEAD_BYTES;
        let bytes_max = frame::BODY_BYTES_MAX.min(room);
        for (number, chunk) in chunks.iter().enumerate() {
            debug_assert_eq!(chunk.position, self.position, "a gap between chunks");
            let last_chunk = number + 1 == chunks.len();
            let mut left = chunk.effects.len();
            for (body, flags) in frame::bodies(&chunk.effects, bytes_max) {
                left -= body.len();
                let last = last_chunk && left == 0;
                let flag = |on, flag| if on { flag } else { 0 };
                let flags = flags
                    | flag(!last, frame::MORE)
                    | flag(chunk.has_parts, frame::HAS_PARTS)
                    | flag(last && ends, frame::END);
                self.push(place, chunk, flags, body)?;
            }
            if last_chunk {
                self.unit = (self.sequence, self.position);
                self.closed = chunk.closed;
            }
        }
        self.flush(place)?;
        if sync {
            self.sync(place)?;
        }
        Ok(())
    }

    fn push(&mut self, place: &Place, chunk: &Chunk, flags: u16, body: &[u8]) -> Result<(), String> {
        let needed = HEAD_BYTES + body.len();
        if self.base + (self.filled + needed) as u64 > self.head.bytes {
            self.roll(place)?;
        } else if self.filled + needed > WRITE_BYTES {
            self.flush(place)?;
        }
        let blocks = (self.filled + needed).div_ceil(BLOCK_BYTES);
        if self.buffer.len() < blocks {
            self.buffer.resize(blocks, Block([0; BLOCK_BYTES]));
        }
        let frame = Frame {
            generation: place.generation,
            core: place.core,
            flags,
            sequence: self.sequence,
            position: self.position,
            epoch: chunk.epoch,
            closed: chunk.closed,
            synced: self.synced,
            time: chunk.time.0,
        };
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut self.buffer);
        place.seal.write(&frame, body, &mut bytes[self.filled..]);
        self.filled += needed;
        self.dirty = true;
        self.sequence += 1;
        self.position += body.len() as u64;
        Ok(())
    }

    /// Writes what is in the buffer.
    fn flush(&mut self, place: &Place) -> Result<(), String> {
        if !self.dirty {
            return Ok(());
        }
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut self.buffer);
        let end = self.filled.next_multiple_of(BLOCK_BYTES);
        bytes[self.filled..end].fill(0);
        let written = self.file.write_at(self.base, &bytes[..end]);
        written.map_err(|error| place.failed("write to", &name(place, self.head.number).path(), &error))?;
        let whole = self.filled / BLOCK_BYTES;
        if whole > 0 && !self.filled.is_multiple_of(BLOCK_BYTES) {
            self.buffer[0] = self.buffer[whole];
        }
        self.base += (whole * BLOCK_BYTES) as u64;
        self.filled -= whole * BLOCK_BYTES;
        self.dirty = false;
        self.unsynced = true;
        Ok(())
    }

    /// Makes what was written safe.
    fn sync(&mut self, place: &Place) -> Result<(), String> {
        if self.unsynced {
            let synced = self.file.sync();
            synced.map_err(|error| place.failed("make safe", &name(place, self.head.number).path(), &error))?;
            self.unsynced = false;
        }
        self.synced = self.sequence;
        Ok(())
    }

    /// Begins the next segment.
    fn roll(&mut self, place: &Place) -> Result<(), String> {
        self.flush(place)?;
        self.sync(place)?;
        let head = SegmentHead {
            number: self.head.number + 1,
            position: self.position,
            sequence: self.sequence,
            unit_sequence: self.unit.0,
            unit_position: self.unit.1,
            closed: self.closed,
            ..self.head
        };
        let spare = self.spares.pop().map(|number| frame::spare_name(place.core, number));
        create_segment(place, &head, spare.as_deref())?;
        let path = name(place, head.number).path();
        let file = place.disk.open_blocks(&path);
        self.file = file.map_err(|error| place.failed("open", &path, &error))?;
        self.head = head;
        self.base = FRAMES_AT;
        self.filled = 0;
        self.cannot_prepare = false;
        self.segments.push_back((head.number, head.position));
        Ok(())
    }

    /// Sets segments free that have nothing at or behind this position.
    pub(super) fn forget_before(&mut self, place: &Place, needed_from: u64) -> Result<(), String> {
        let mut found = vec![];
        while self.segments.len() > 1 && self.segments[1].1 <= needed_from {
            let Some((number, _)) = self.segments.pop_front() else {
                break;
            };
            let path = name(place, number).path();
            let preparing = usize::from(self.preparing.is_some());
            if self.spares.len() + found.len() + preparing < SPARES_MAX
                && let Some(spare) = free_spare(&[&self.spares[..], &found[..]].concat())
            {
                let renamed = place.disk.rename(&path, &frame::spare_name(place.core, spare));
                renamed.map_err(|error| place.failed("rename", &path, &error))?;
                found.push(spare);
            } else {
                let removed = place.disk.remove(&path);
                removed.map_err(|error| place.failed("remove", &path, &error))?;
            }
        }
        if !found.is_empty() {
            // Before another header is written to one: else its old name might come back with it.
            let synced = place.disk.sync_dir("log");
            synced.map_err(|error| place.failed("make safe", "log", &error))?;
            self.spares.append(&mut found);
        }
        Ok(())
    }

    /// Writes zeros to the next segment, when this one is getting full and none waits; false when nothing is left to do. A file
    /// system that has to note which bytes were written needs longer for each sync.
    pub(super) fn prepare_spare(&mut self, place: &Place) -> bool {
        let soon = self.base + self.filled as u64 > self.head.bytes / 4;
        if !self.spares.is_empty() || !soon || self.cannot_prepare {
            return false;
        }
        // That there is none is told when one is needed.
        self.cannot_prepare = self.prepare_piece(place).is_err();
        if self.cannot_prepare
            && let Some(given_up) = self.preparing.take()
        {
            drop(given_up.file);
            let _ = place.disk.remove(&given_up.path);
        }
        self.preparing.is_some()
    }

    fn prepare_piece(&mut self, place: &Place) -> std::io::Result<()> {
        let disk = &place.disk;
        let Some(preparing) = &mut self.preparing else {
            let path = format!("{}{PREPARING}", frame::spare_name(place.core, 0));
            let file = disk.create(&path)?;
            // From here on it is there, and is removed when this fails.
            let preparing = self.preparing.insert(Preparing { file, path, done: 0 });
            preparing.file.allocate(self.head.bytes)?;
            preparing.file = disk.open_blocks(&preparing.path)?;
            return Ok(());
        };
        let left = (self.head.bytes - preparing.done) as usize;
        if left > 0 {
            let zeros = vec![Block([0; BLOCK_BYTES]); left.min(PREPARE_BYTES) / BLOCK_BYTES];
            let zeros: &[u8] = bytemuck::cast_slice(&zeros);
            preparing.file.write_at(preparing.done, zeros)?;
            preparing.done += zeros.len() as u64;
            return Ok(());
        }
        preparing.file.sync()?;
        // An image may have set some free meanwhile.
        let number = free_spare(&self.spares).unwrap_or(SPARES_MAX - 1);
        disk.rename(&preparing.path, &frame::spare_name(place.core, number))?;
        self.preparing = None;
        self.spares.push(number);
        Ok(())
    }
}
