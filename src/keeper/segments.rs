//! The files of one core's log: the segment that is written, those before it that are still needed, and the ones that wait.

use super::{Place, name};
use crate::disk::{BLOCK_BYTES, Block, File};
use crate::frame::{self, SegmentHead};
use std::collections::VecDeque;

/// Segments that wait to be used, at most: what an image sets free at once is needed again while the next one is made.
const SPARES_MAX: usize = 4;

/// What is zeroed in one go while there is nothing else to do. It delays the next job by that much.
const PREPARE_BYTES: usize = 1 << 20;

const PREPARING: &str = ".new";

/// See the module's text.
pub(super) struct Segments {
    /// The length of each.
    bytes: u64,
    /// Those that are needed, with the position at which each begins; the last is the one that is written.
    there: VecDeque<(u64, u64)>,
    /// Numbers of those that wait.
    spares: Vec<usize>,
    preparing: Option<Preparing>,
    /// One more is to wait. One that could not be prepared is not tried again before it is needed.
    needs_next: bool,
}

struct Preparing {
    file: Box<dyn File>,
    path: String,
    done: u64,
}

fn free_spare(spares: &[usize]) -> Option<usize> {
    (0..SPARES_MAX).find(|number| !spares.contains(number))
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

impl Segments {
    /// Those of a log whose first segment was just made.
    pub(super) fn new(place: &Place, head: &SegmentHead) -> Result<Self, String> {
        let mut segments = Self {
            bytes: head.bytes,
            there: VecDeque::from([(head.number, head.position)]),
            spares: vec![],
            preparing: None,
            needs_next: false,
        };
        segments.find_spares(place)?;
        Ok(segments)
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
            if number < SPARES_MAX && length.is_ok_and(|length| length == self.bytes) {
                self.spares.push(number);
            } else {
                disk.remove(&path)
                    .map_err(|error| place.failed("remove", &path, &error))?;
            }
        }
        Ok(())
    }

    /// Begins the next segment, and opens it.
    pub(super) fn begin(&mut self, place: &Place, head: &SegmentHead) -> Result<Box<dyn File>, String> {
        let spare = self.spares.pop().map(|number| frame::spare_name(place.core, number));
        create_segment(place, head, spare.as_deref())?;
        let path = name(place, head.number).path();
        let file = place.disk.open_blocks(&path);
        let file = file.map_err(|error| place.failed("open", &path, &error))?;
        self.needs_next = false;
        self.there.push_back((head.number, head.position));
        Ok(file)
    }

    /// The next segment will be needed soon.
    pub(super) fn need_next(&mut self) {
        self.needs_next = true;
    }

    /// Sets segments free that have nothing at or behind this position.
    pub(super) fn forget_before(&mut self, place: &Place, needed_from: u64) -> Result<(), String> {
        let mut found = vec![];
        while self.there.len() > 1 && self.there[1].1 <= needed_from {
            let Some((number, _)) = self.there.pop_front() else {
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

    /// Writes zeros to the next segment, when it will be needed and none waits; false when nothing is left to do. A file system that
    /// has to note which bytes were written needs longer for each sync.
    pub(super) fn prepare_spare(&mut self, place: &Place) -> bool {
        if !self.spares.is_empty() || !self.needs_next {
            return false;
        }
        // That there is none is told when one is needed.
        if self.prepare_piece(place).is_err() {
            self.needs_next = false;
            if let Some(given_up) = self.preparing.take() {
                drop(given_up.file);
                let _ = place.disk.remove(&given_up.path);
            }
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
            preparing.file.allocate(self.bytes)?;
            preparing.file = disk.open_blocks(&preparing.path)?;
            return Ok(());
        };
        let left = (self.bytes - preparing.done) as usize;
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
