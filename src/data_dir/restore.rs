//! Reads what earlier generations left of some shards: their images, then every log that had one of them, the oldest first.
//!
//! Each new core reads for itself, so all read at once. A log that several of them need is read by each; what belongs to others is
//! found out by a hash and left.

use super::recovery::{ImageReader, LogReader, Old, Past, malformed};
use super::{Names, Problem};
use crate::disk::Disk;
use crate::effect::{self, Effect, Part};
use crate::frame::{self, Frame, ImageName, Pieces, Seal};
use crate::partition::{Place, RangeTable};
use std::ops::Range;
use std::sync::Arc;

/// How much is read in one step, about: long enough to be fast, short enough that progress is seen and a stop heard.
const STEP_BYTES: u64 = 1 << 20;

/// Something that is to be done to a shard again.
#[derive(Clone, Copy, Debug)]
pub struct Restored<'a> {
    /// Which shard.
    pub shard: u16,
    /// Where the key belongs; nothing in it means anything for [`Effect::Empty`].
    pub place: Place,
    /// What to do. Never [`Effect::Part`]: it comes as what is in it. [`Effect::Empty`] is for this shard alone.
    pub effect: Effect<'a>,
}

/// What is read.
#[derive(Clone, Copy, Debug)]
enum Source {
    Image(ImageName),
    /// Of this generation and core (their places in what was found), from this segment on.
    Log(usize, usize, usize),
}

#[derive(Debug)]
enum Current {
    Image(ImageReader),
    Log(usize, usize, LogReader),
}

/// See the module's text.
pub struct Restorer {
    disk: Arc<dyn Disk>,
    names: Names,
    seal: Seal,
    past: Arc<Past>,
    sieve: Sieve,
    /// With how many bytes there are to read.
    sources: std::vec::IntoIter<(Source, u64)>,
    current: Option<Current>,
    pieces: Pieces,
    buffer: Vec<u8>,
    /// Bytes before the current source, of the current source so far, of all.
    before: u64,
    within: u64,
    of_current: u64,
    total: u64,
}

impl std::fmt::Debug for Restorer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Restorer of {:?}, {:?}", self.sieve.shards, self.progress())
    }
}

/// Lets through what concerns the shards, and was not in their images.
#[derive(Debug)]
struct Sieve {
    shards: Range<u16>,
    table: RangeTable,
    /// For each of the shards, the generation and position from which on it needs the log.
    from: Vec<(u32, u64)>,
}

impl Sieve {
    fn needs(&self, shard: u16, at: (u32, u64)) -> bool {
        self.shards.contains(&shard) && at >= self.from[usize::from(shard - self.shards.start)]
    }

    /// An effect that is no part.
    #[inline]
    fn one(
        &self,
        at: (u32, u64),
        run: (u16, u16),
        effect: Effect<'_>,
        apply: &mut dyn FnMut(Restored<'_>) -> Result<(), Problem>,
    ) -> Result<(), Problem> {
        let key = match effect {
            Effect::Put(image) => image.key,
            Effect::Delete(key) | Effect::Amend { key, .. } => key,
            Effect::Empty | Effect::Part(_) => {
                let place = Place { token: 0, hash: 0 };
                let emptied = run.0..run.0.saturating_add(run.1);
                for shard in emptied.filter(|shard| self.needs(*shard, at)) {
                    let effect = Effect::Empty;
                    apply(Restored { shard, place, effect })?;
                }
                return Ok(());
            }
        };
        let place = self.table.place(key);
        let shard = self.table.shard_of(place.token).0;
        if self.needs(shard, at) {
            apply(Restored { shard, place, effect })?;
        }
        Ok(())
    }
}

impl Old {
    /// A part counts.
    fn counts(&self, part: &Part<'_>) -> bool {
        let always = self.described.is_always();
        match self.closed {
            Some(closed) if part.epoch > closed => always && !self.dropped.contains(&(part.core, part.clock)),
            _ => true,
        }
    }

    /// Only parts can count of what is in this frame.
    fn is_late(&self, frame: &Frame) -> bool {
        !self.described.is_always() && self.closed.is_some_and(|closed| frame.epoch > closed)
    }
}

impl Restorer {
    pub(super) fn new(
        disk: Arc<dyn Disk>,
        names: Names,
        seal: Seal,
        past: Arc<Past>,
        shards: Range<u16>,
        table: RangeTable,
    ) -> Self {
        let from = |shard: u16| {
            let image = past.images.get(usize::from(shard)).copied().flatten();
            image.map_or((0, 0), |image| (image.generation, image.position))
        };
        let from: Vec<(u32, u64)> = shards.clone().map(from).collect();
        let mut sources = vec![];
        for shard in shards.clone() {
            if let Some(Some(image)) = past.images.get(usize::from(shard)) {
                // That it cannot be opened is told when it is read.
                let bytes = disk.open(&image.path()).and_then(|file| file.len()).unwrap_or(0);
                sources.push((Source::Image(*image), bytes));
            }
        }
        for (number, old) in past.generations.iter().enumerate() {
            for (core, log) in old.logs.iter().enumerate() {
                let (first, count) = old.described.runs[core];
                let run = first..first.saturating_add(count);
                let generation = old.described.number;
                let needed = shards.clone().zip(&from).filter(|(shard, _)| run.contains(shard));
                let needed = needed.filter_map(|(_, (image, position))| match generation.cmp(image) {
                    std::cmp::Ordering::Less => None,
                    std::cmp::Ordering::Equal => Some(*position),
                    std::cmp::Ordering::Greater => Some(0),
                });
                let Some(needed) = needed.min() else {
                    continue;
                };
                let begins = log.segments.iter().rposition(|segment| segment.head.position <= needed);
                let begins = begins.unwrap_or(0);
                if let Some(segment) = log.segments.get(begins) {
                    let bytes = log.end.1.saturating_sub(segment.head.position);
                    sources.push((Source::Log(number, core, begins), bytes));
                }
            }
        }
        Self {
            total: sources.iter().map(|(_, bytes)| bytes).sum(),
            sources: sources.into_iter(),
            sieve: Sieve { shards, table, from },
            current: None,
            pieces: Pieces::default(),
            buffer: vec![],
            before: 0,
            within: 0,
            of_current: 0,
            disk,
            names,
            seal,
            past,
        }
    }

    /// Bytes that were read, and bytes that there are to read.
    pub fn progress(&self) -> (u64, u64) {
        (self.before + self.within.min(self.of_current), self.total)
    }

    /// Reads a piece; false when there was nothing left.
    ///
    /// # Errors
    /// When something is damaged or cannot be read, or `apply` says so.
    pub fn step(&mut self, apply: &mut dyn FnMut(Restored<'_>) -> Result<(), Problem>) -> Result<bool, Problem> {
        let mut read = 0;
        while read < STEP_BYTES {
            let buffer = &mut self.buffer;
            let current = match &mut self.current {
                Some(current) => current,
                None => {
                    let Some((source, bytes)) = self.sources.next() else {
                        return Ok(false);
                    };
                    let buffer = std::mem::take(buffer);
                    (self.within, self.of_current) = (0, bytes);
                    self.pieces = Pieces::default();
                    self.current.insert(match source {
                        Source::Image(name) => Current::Image(ImageReader::new(name, buffer)),
                        Source::Log(number, core, from) => Current::Log(number, core, LogReader::new(from, buffer)),
                    })
                }
            };
            let (disk, names, seal) = (&*self.disk, &self.names, self.seal);
            let bytes = match current {
                Current::Image(reader) => {
                    let items = image_frame(
                        reader,
                        disk,
                        names,
                        seal,
                        &self.past,
                        &self.sieve,
                        &mut self.pieces,
                        apply,
                    )?;
                    items.map(|(items, bytes)| {
                        reader.count(items);
                        bytes
                    })
                }
                Current::Log(number, core, reader) => {
                    let old = &self.past.generations[*number];
                    log_frame(
                        reader,
                        disk,
                        names,
                        seal,
                        old,
                        *core,
                        &self.sieve,
                        &mut self.pieces,
                        apply,
                    )?
                }
            };
            match bytes {
                Some(bytes) => {
                    read += bytes + frame::HEAD_BYTES as u64;
                    self.within += bytes;
                }
                None => {
                    if let Some(Current::Image(reader)) = &self.current {
                        reader.check_count(names)?;
                    }
                    self.before += self.of_current;
                    (self.within, self.of_current) = (0, 0);
                    self.buffer = match self.current.take() {
                        Some(Current::Image(reader)) => reader.into_buffer(),
                        Some(Current::Log(_, _, reader)) => reader.into_buffer(),
                        None => vec![],
                    };
                }
            }
        }
        Ok(true)
    }
}

/// One frame of an image: how many items it had, and how long it was; nothing at the end.
#[expect(clippy::too_many_arguments, reason = "the pieces of one value, borrowed apart")]
fn image_frame(
    reader: &mut ImageReader,
    disk: &dyn Disk,
    names: &Names,
    seal: Seal,
    past: &Past,
    sieve: &Sieve,
    pieces: &mut Pieces,
    apply: &mut dyn FnMut(Restored<'_>) -> Result<(), Problem>,
) -> Result<Option<(u64, u64)>, Problem> {
    let name = reader.name();
    let of = name.shard;
    let Some(found) = reader.next(disk, names, seal, past.directory)? else {
        return Ok(None);
    };
    let (offset, bytes) = (found.offset, found.body.len() as u64);
    let Some((_, mut effects)) = pieces.add(&found.frame, found.body) else {
        return Ok(Some((0, bytes)));
    };
    let mut items = 0;
    while !effects.is_empty() {
        let Ok(effect @ Effect::Put(image)) = effect::read(&mut effects) else {
            return Err(malformed(names, &name.path(), offset));
        };
        let place = sieve.table.place(image.key);
        let shard = sieve.table.shard_of(place.token).0;
        if shard != of {
            let cause = format!("an item of shard {shard} is in an image of shard {of}");
            return Err(names.damage(&name.path(), offset, cause));
        }
        items += 1;
        apply(Restored { shard, place, effect })?;
    }
    Ok(Some((items, bytes)))
}

/// One frame of a log: how long it was; nothing at the end.
#[expect(clippy::too_many_arguments, reason = "the pieces of one value, borrowed apart")]
fn log_frame(
    reader: &mut LogReader,
    disk: &dyn Disk,
    names: &Names,
    seal: Seal,
    old: &Old,
    core: usize,
    sieve: &Sieve,
    pieces: &mut Pieces,
    apply: &mut dyn FnMut(Restored<'_>) -> Result<(), Problem>,
) -> Result<Option<u64>, Problem> {
    let log = &old.logs[core];
    let Some(found) = reader.next(disk, names, seal, log)? else {
        return Ok(None);
    };
    let (frame, offset, bytes) = (found.frame, found.offset, found.body.len() as u64);
    let late = old.is_late(&frame);
    if late && frame.flags & frame::HAS_PARTS == 0 {
        return Ok(Some(bytes));
    }
    let Some((position, effects)) = pieces.add(&frame, found.body) else {
        return Ok(Some(bytes));
    };
    let generation = old.described.number;
    let run = old.described.runs[core];
    let mut rest = effects;
    while !rest.is_empty() {
        let at = (generation, position + (effects.len() - rest.len()) as u64);
        let Ok(effect) = effect::read(&mut rest) else {
            return Err(malformed(names, log.path(frame.sequence), offset));
        };
        match effect {
            Effect::Part(part) if old.counts(&part) => {
                let mut inside = part.effects;
                while !inside.is_empty() {
                    match effect::read(&mut inside) {
                        Ok(Effect::Part(_)) | Err(_) => return Err(malformed(names, log.path(frame.sequence), offset)),
                        Ok(effect) => sieve.one(at, run, effect, apply)?,
                    }
                }
            }
            Effect::Part(_) => {}
            effect if !late => sieve.one(at, run, effect, apply)?,
            _ => {}
        }
    }
    Ok(Some(bytes))
}
