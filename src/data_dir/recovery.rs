//! What counts of what was written: the end of each core's log, and what of the last generation all cores had whole.
//!
//! A segment is made safe before the next one begins, so what is missing in any but the last is damage. In the last one a frame is
//! missing where the log ends: that is damage only if something behind it says that it had been safe; otherwise it is what was
//! being written when the machine stopped, and is cut. `docs/format.md` has the rules.

use super::manifest::{Generation, Manifest, Number, Resolution};
use super::{Names, Problem, SALVAGE};
use crate::disk::{BLOCK_BYTES, Disk};
use crate::effect::{self, Effect};
use crate::frame::{self, Bad, Found, Frame, ImageHead, ImageName, Pieces, Reader, Seal, SegmentHead, SegmentName};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

/// A sequence and a position: a place between two frames of a core.
pub(super) type Place = (u64, u64);

/// A segment that is there.
#[derive(Clone, Debug)]
pub(super) struct Segment {
    pub(super) path: String,
    pub(super) head: SegmentHead,
    /// The file's length.
    pub(super) bytes: u64,
}

/// What is there of the log of one core in one generation.
#[derive(Clone, Debug, Default)]
pub(super) struct CoreLog {
    pub(super) segments: Vec<Segment>,
    /// What is here and behind does not count.
    pub(super) end: Place,
}

impl CoreLog {
    /// The segment that has this frame.
    pub(super) fn path(&self, sequence: u64) -> &str {
        let has = |segment: &&Segment| segment.head.sequence <= sequence;
        self.segments.iter().rfind(has).map_or("", |segment| &segment.path)
    }
}

/// A generation that ended.
#[derive(Clone, Debug)]
pub(super) struct Old {
    pub(super) described: Generation,
    /// The last epoch that all cores had whole; nothing when everything counts.
    pub(super) closed: Option<u64>,
    /// Parts that do not count.
    pub(super) dropped: HashSet<(u16, u64)>,
    /// Of each core.
    pub(super) logs: Vec<CoreLog>,
}

/// Everything that is there to be restored.
#[derive(Debug)]
pub(super) struct Past {
    /// The number of the directory.
    pub(super) directory: u64,
    pub(super) generations: Vec<Old>,
    /// The image of each shard.
    pub(super) images: Vec<Option<ImageName>>,
}

/// What all searching needs.
pub(super) struct Search<'a> {
    pub(super) disk: &'a Arc<dyn Disk>,
    pub(super) names: &'a Names,
    pub(super) seal: Seal,
    pub(super) directory: u64,
    pub(super) salvage: bool,
    pub(super) warnings: Vec<String>,
    /// How often something was damaged.
    pub(super) damages: usize,
}

/// Where a log ends.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ended {
    pub(super) end: Place,
    /// What the last frame said; nothing when the server ended in order.
    pub(super) closed: Option<u64>,
    /// Something that had been safe is missing behind it.
    pub(super) damaged: bool,
}

impl Past {
    /// Looks through the directory.
    pub(super) fn find(search: &mut Search<'_>, manifest: &Manifest) -> Result<Self, Problem> {
        let numbers = segment_numbers(&**search.disk, search.names)?;
        let mut generations = vec![];
        for described in &manifest.generations {
            generations.push(search.generation(described, &numbers)?);
        }
        let images = search.images(manifest.layout.shards)?;
        let past = Self {
            directory: manifest.directory.0,
            generations,
            images,
        };
        past.check_coverage(search)?;
        Ok(past)
    }

    /// How each generation ended.
    pub(super) fn resolutions(&self) -> impl Iterator<Item = Resolution> {
        self.generations.iter().map(|old| {
            let end = |log: &CoreLog| (Number(log.end.0), Number(log.end.1));
            let mut dropped: Vec<_> = old
                .dropped
                .iter()
                .map(|(core, clock)| (*core, Number(*clock)))
                .collect();
            dropped.sort_unstable();
            Resolution {
                closed: old.closed.map(Number),
                ends: old.logs.iter().map(end).collect(),
                dropped,
            }
        })
    }

    /// From its image on, nothing of a shard is missing.
    fn check_coverage(&self, search: &mut Search<'_>) -> Result<(), Problem> {
        let names = search.names;
        for (shard, image) in (0..).zip(&self.images) {
            let first = self.generations.first().map_or(1, |old| old.described.number);
            let (generation, position) = image.map_or((1, 0), |image| (image.generation, image.position));
            if generation < first || (image.is_none() && first > 1) {
                let cause =
                    format!("there is no image of shard {shard}, and the log does not reach back to its beginning");
                search.damaged(names.problem("images", None, cause, SALVAGE))?;
            }
            for old in &self.generations {
                let number = old.described.number;
                let Some(core) = old.described.core_of(shard) else {
                    continue;
                };
                if number < generation {
                    continue;
                }
                let needed = if number == generation { position } else { 0 };
                let there = old.logs[usize::from(core)].segments.first();
                if there.is_none_or(|segment| segment.head.position > needed) {
                    let cause = format!(
                        "segments of core {core} in generation {number} are missing, from position {needed} on: shard {shard} \
                         needs them"
                    );
                    search.damaged(names.problem("log", None, cause, SALVAGE))?;
                }
            }
        }
        Ok(())
    }
}

/// The numbers of the segments that are there, by generation and core.
pub(super) type Numbers = BTreeMap<(u32, u16), Vec<u64>>;

pub(super) fn segment_numbers(disk: &dyn Disk, names: &Names) -> Result<Numbers, Problem> {
    let mut numbers = Numbers::new();
    let there = disk.list("log").map_err(names.io("list", "log"))?;
    for name in there.iter().filter_map(|name| SegmentName::parse(name)) {
        let of = numbers.entry((name.generation, name.core)).or_default();
        of.push(name.number);
    }
    numbers.values_mut().for_each(|numbers| numbers.sort_unstable());
    Ok(numbers)
}

impl<'a> Search<'a> {
    pub(super) fn new(disk: &'a Arc<dyn Disk>, names: &'a Names, manifest: &Manifest, salvage: bool) -> Self {
        Self {
            disk,
            names,
            seal: Seal::new(manifest.directory.0),
            directory: manifest.directory.0,
            salvage,
            warnings: vec![],
            damages: 0,
        }
    }

    /// Damage was found: it ends the search, or is only told.
    fn damaged(&mut self, problem: Problem) -> Result<(), Problem> {
        if !self.salvage {
            return Err(problem);
        }
        self.damages += 1;
        self.warnings.push(
            Problem {
                remedy: String::new(),
                ..problem
            }
            .to_string(),
        );
        Ok(())
    }

    /// What is there of a generation, and what counts of it.
    fn generation(&mut self, described: &Generation, numbers: &Numbers) -> Result<Old, Problem> {
        let mut logs = vec![];
        let mut closed: Option<u64> = None;
        let mut damaged = HashSet::new();
        let known = described.resolution.as_ref();
        for core in 0..described.runs.len() as u16 {
            let there = numbers.get(&(described.number, core)).map_or(&[][..], Vec::as_slice);
            let mut log = self.core_log(described, core, there)?;
            let stored = known.and_then(|known| known.ends.get(usize::from(core)));
            let stored = stored.map(|(sequence, position)| (sequence.0, position.0));
            match stored {
                Some(end) if !self.salvage => log.end = end,
                _ => {
                    // Those before the last were complete before the next began, so the end is in the last.
                    let from = if self.salvage {
                        0
                    } else {
                        log.segments.len().saturating_sub(1)
                    };
                    let ended = self.end_of(&log, from, stored)?;
                    log.end = ended.end;
                    if ended.damaged || log.segments.is_empty() {
                        damaged.insert(core);
                    } else if let Some(here) = ended.closed {
                        closed = Some(closed.map_or(here, |closed| closed.min(here)));
                    }
                }
            }
            logs.push(log);
        }
        let mut old = Old {
            described: described.clone(),
            closed,
            dropped: HashSet::new(),
            logs,
        };
        if let Some(known) = known {
            old.closed = known.closed.map(|closed| closed.0);
            old.dropped = known.dropped.iter().map(|(core, clock)| (*core, clock.0)).collect();
            return Ok(old);
        }
        if described.runs.len() == 1 {
            old.closed = None;
        }
        if !damaged.is_empty() && described.runs.len() > 1 {
            self.warnings.push(format!(
                "generation {}: transactions over several cores may be there in part",
                described.number
            ));
        }
        if let Some(closed) = old.closed {
            if described.is_always() {
                old.dropped = self.undecided(&old, closed, &damaged)?;
                if !old.dropped.is_empty() {
                    let (count, number) = (old.dropped.len(), described.number);
                    self.warnings.push(format!(
                        "generation {number}: {count} transactions over several cores that were not safe on all of them when the \
                         server stopped do not count"
                    ));
                }
            } else {
                self.warnings.push(format!(
                    "generation {}: the server was not stopped in order; what was done after epoch {closed} was not safe on all \
                     cores and does not count",
                    described.number
                ));
            }
        }
        Ok(old)
    }

    /// The segments of a core: the last ones without a gap. Older ones before a gap were about to be removed.
    fn core_log(&mut self, described: &Generation, core: u16, numbers: &[u64]) -> Result<CoreLog, Problem> {
        let gaps = (1..numbers.len()).rev().find(|at| numbers[at - 1] + 1 != numbers[*at]);
        let mut log = CoreLog::default();
        for number in &numbers[gaps.unwrap_or(0)..] {
            let name = SegmentName {
                generation: described.number,
                core,
                number: *number,
            };
            match self.segment(described, &name) {
                Ok(segment) => log.segments.push(segment),
                Err(problem) => {
                    self.damaged(problem)?;
                    break;
                }
            }
        }
        if log.segments.is_empty() {
            let cause = format!("the log of core {core} in generation {} is missing", described.number);
            self.damaged(self.names.problem("log", None, cause, SALVAGE))?;
        }
        Ok(log)
    }

    pub(super) fn segment(&self, described: &Generation, name: &SegmentName) -> Result<Segment, Problem> {
        let path = name.path();
        let read = || {
            let file = self.disk.open(&path)?;
            Ok((file.read_front(BLOCK_BYTES)?, file.len()?))
        };
        let (block, bytes) = read().map_err(self.names.io("read", &path))?;
        let head = SegmentHead::read(&block);
        let head = head.map_err(|bad| match bad {
            frame::BadHead::Version(..) => self.names.problem(&path, Some(0), bad.to_string(), ""),
            _ => self.names.damage(&path, 0, bad.to_string()),
        })?;
        let run = described.runs.get(usize::from(name.core)).copied();
        let fits = head.directory == self.directory
            && (head.generation, head.core, head.number) == (name.generation, name.core, name.number)
            && run == Some((head.first_shard, head.shards));
        match fits {
            true => Ok(Segment { path, head, bytes }),
            false => Err(self.names.damage(&path, 0, "its header is that of another file")),
        }
    }

    /// Where the log ends, reading from this segment on. `stored` is where it was found to end before.
    pub(super) fn end_of(&mut self, log: &CoreLog, from: usize, stored: Option<Place>) -> Result<Ended, Problem> {
        let Some(head) = log.segments.get(from).map(|segment| segment.head) else {
            return Ok(Ended {
                end: (0, 0),
                closed: Some(0),
                damaged: true,
            });
        };
        let mut ended = Ended {
            end: (head.unit_sequence, head.unit_position),
            closed: Some(head.closed),
            damaged: false,
        };
        let mut next = (head.sequence, head.position);
        let last = stored.map_or(u64::MAX, |(sequence, _)| sequence);
        let mut buffer = vec![];
        for (number, segment) in log.segments.iter().enumerate().skip(from) {
            let path = &segment.path;
            let io = self.names.io("read", path);
            if next != (segment.head.sequence, segment.head.position) {
                let cause = "it does not go on where the segment before it ends";
                self.damaged(self.names.damage(path, 0, cause))?;
                ended.damaged = true;
                break;
            }
            let following = log.segments.get(number + 1).map(|following| following.head.sequence);
            let limit = following.unwrap_or(u64::MAX).min(last);
            let file = self.disk.open(path).map_err(&io)?;
            let mut reader = Reader::new(file, self.seal, buffer);
            let stopped = walk(&mut reader, &segment.head, limit, &mut next, &mut ended).map_err(&io)?;
            let Some((offset, bad)) = stopped else {
                buffer = reader.into_buffer();
                continue;
            };
            let missing = next.0;
            let here = |frame: &Frame| (frame.generation, frame.core) == (segment.head.generation, segment.head.core);
            let proof = if limit != u64::MAX {
                Some("it had been safe".to_owned())
            } else {
                let proves = |frame: &Frame| here(frame) && frame.sequence > missing && frame.synced > missing;
                let later = match bad {
                    Stop::Other(frame) if proves(&frame) => Some((offset, frame)),
                    _ => reader.search(proves).map_err(&io)?,
                };
                later.map(|(offset, frame)| {
                    format!("frame {} at offset {offset} says that it had been safe", frame.sequence)
                })
            };
            if let Some(proof) = proof {
                let cause = format!("frame {missing} is damaged: {bad}; {proof}");
                self.damaged(self.names.damage(path, offset, cause))?;
                ended.damaged = true;
                break;
            }
            let something = matches!(bad, Stop::Bad(Bad::Checksum | Bad::Length(_) | Bad::Short(_)))
                && offset + frame::HEAD_BYTES as u64 <= segment.bytes;
            if something || next.0 != ended.end.0 {
                self.warnings.push(format!(
                    "{}/{path}, offset {offset}: the log ends with something that was not written completely; it is cut",
                    self.names.0
                ));
            }
            buffer = reader.into_buffer();
        }
        Ok(ended)
    }

    /// Parts that were decided after this epoch and are not in the logs of all that write.
    fn undecided(&self, old: &Old, closed: u64, damaged: &HashSet<u16>) -> Result<HashSet<(u16, u64)>, Problem> {
        // Who writes, and who has it.
        let mut found: HashMap<(u16, u64), (Vec<u16>, HashSet<u16>)> = HashMap::new();
        for (core, log) in (0..).zip(&old.logs) {
            let mut frames = LogReader::new(self.first_with_parts_after(log, closed)?, vec![]);
            let mut pieces = Pieces::default();
            while let Some(read) = frames.next(&**self.disk, self.names, self.seal, log)? {
                let (frame, offset) = (read.frame, read.offset);
                let Some((_, mut effects)) = pieces.add(&frame, read.body) else {
                    continue;
                };
                if frame.flags & frame::HAS_PARTS == 0 {
                    continue;
                }
                while !effects.is_empty() {
                    let effect = effect::read(&mut effects);
                    let effect = effect.map_err(|_| malformed(self.names, log.path(frame.sequence), offset))?;
                    if let Effect::Part(part) = effect
                        && part.epoch > closed
                    {
                        let of = found.entry((part.core, part.clock)).or_default();
                        of.0 = part.writers().collect();
                        of.1.insert(core);
                    }
                }
            }
        }
        let has_all = |writers: &[u16], has: &HashSet<u16>| {
            writers.iter().all(|core| has.contains(core) || damaged.contains(core))
        };
        found.retain(|_, (writers, has)| !has_all(writers, has));
        Ok(found.into_keys().collect())
    }

    /// The last segment that begins in this epoch or before: no part that was decided later is in those before it.
    fn first_with_parts_after(&self, log: &CoreLog, closed: u64) -> Result<usize, Problem> {
        for (number, segment) in log.segments.iter().enumerate().rev() {
            let io = self.names.io("read", &segment.path);
            let file = self.disk.open(&segment.path).map_err(&io)?;
            let mut reader = Reader::new(file, self.seal, vec![]);
            if let Ok(first) = reader.read().map_err(&io)?
                && first.frame.sequence == segment.head.sequence
                && first.frame.epoch <= closed
            {
                return Ok(number);
            }
        }
        Ok(0)
    }

    /// The image of each shard that is to be used.
    fn images(&mut self, shards: u16) -> Result<Vec<Option<ImageName>>, Problem> {
        let there = self.disk.list("images").map_err(self.names.io("list", "images"))?;
        let mut there: Vec<ImageName> = there.iter().filter_map(|name| ImageName::parse(name)).collect();
        there.sort_unstable();
        let mut images = vec![None; usize::from(shards)];
        let mut buffer = vec![];
        // The newest of a shard comes last, and takes the place of the others.
        for name in there {
            let Some(image) = images.get_mut(usize::from(name.shard)) else {
                continue;
            };
            if self.salvage {
                let mut reader = ImageReader::new(name, buffer);
                let whole = loop {
                    match reader.next(&**self.disk, self.names, self.seal, self.directory) {
                        Ok(Some(_)) => {}
                        Ok(None) => break Ok(()),
                        Err(problem) => break Err(problem),
                    }
                };
                buffer = reader.into_buffer();
                if let Err(problem) = whole {
                    self.damaged(problem)?;
                    continue;
                }
            }
            *image = Some(name);
        }
        Ok(images)
    }
}

/// Why reading ended at a place where a frame should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stop {
    Bad(Bad),
    /// It is a frame, but not the one.
    Other(Frame),
}

impl std::fmt::Display for Stop {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Stop::Bad(bad) => bad.fmt(f),
            Stop::Other(frame) => write!(
                f,
                "frame {} of another place or time where it should be",
                frame.sequence
            ),
        }
    }
}

fn is_next(frame: &Frame, head: &SegmentHead, next: Place) -> bool {
    (frame.generation, frame.core) == (head.generation, head.core) && (frame.sequence, frame.position) == next
}

/// Reads frames up to a sequence; returns where and why it could not.
fn walk(
    reader: &mut Reader,
    head: &SegmentHead,
    limit: u64,
    next: &mut Place,
    ended: &mut Ended,
) -> std::io::Result<Option<(u64, Stop)>> {
    while next.0 < limit {
        let offset = reader.offset();
        let found = match reader.read()? {
            Ok(found) => found,
            Err(bad) => return Ok(Some((offset, Stop::Bad(bad)))),
        };
        let Found { frame, body, offset } = found;
        if !is_next(&frame, head, *next) {
            return Ok(Some((offset, Stop::Other(frame))));
        }
        *next = (next.0 + 1, next.1 + body.len() as u64);
        if frame.flags & frame::MORE == 0 {
            ended.end = *next;
            ended.closed = (frame.flags & frame::END == 0).then_some(frame.closed);
        }
    }
    Ok(None)
}

pub(super) fn malformed(names: &Names, path: &str, offset: u64) -> Problem {
    names.damage(path, offset, "the frame is whole, but what is in it is no effect")
}

/// Reads what counts of a core's log.
#[derive(Debug)]
pub(super) struct LogReader {
    /// The segment that is read.
    number: usize,
    reader: Option<Reader>,
    next: Place,
    buffer: Vec<u8>,
}

impl LogReader {
    /// From the beginning of this segment on.
    pub(super) fn new(number: usize, buffer: Vec<u8>) -> Self {
        Self {
            number,
            reader: None,
            next: (0, 0),
            buffer,
        }
    }

    pub(super) fn into_buffer(self) -> Vec<u8> {
        self.reader.map_or(self.buffer, Reader::into_buffer)
    }

    /// The next frame that counts.
    pub(super) fn next(
        &mut self,
        disk: &dyn Disk,
        names: &Names,
        seal: Seal,
        log: &CoreLog,
    ) -> Result<Option<Found<'_>>, Problem> {
        let segment = loop {
            let Some(segment) = log.segments.get(self.number) else {
                return Ok(None);
            };
            if self.reader.is_none() {
                let file = disk.open(&segment.path).map_err(names.io("open", &segment.path))?;
                self.reader = Some(Reader::new(file, seal, std::mem::take(&mut self.buffer)));
                self.next = (segment.head.sequence, segment.head.position);
            }
            if self.next.0 >= log.end.0 {
                return Ok(None);
            }
            let following = log.segments.get(self.number + 1);
            if following.is_none_or(|following| following.head.sequence != self.next.0) {
                break segment;
            }
            if let Some(done) = self.reader.take() {
                self.buffer = done.into_buffer();
            }
            self.number += 1;
        };
        let Some(reader) = &mut self.reader else {
            return Ok(None);
        };
        let offset = reader.offset();
        let stop = match reader.read().map_err(names.io("read", &segment.path))? {
            Ok(found) if is_next(&found.frame, &segment.head, self.next) => {
                self.next = (self.next.0 + 1, self.next.1 + found.body.len() as u64);
                return Ok(Some(found));
            }
            Ok(other) => Stop::Other(other.frame),
            Err(bad) => Stop::Bad(bad),
        };
        let cause = format!("frame {} is damaged: {stop}; it had been safe", self.next.0);
        Err(names.damage(&segment.path, offset, cause))
    }
}

/// Reads an image, and checks that it is whole.
#[derive(Debug)]
pub(super) struct ImageReader {
    name: ImageName,
    path: String,
    reader: Option<Reader>,
    next: Place,
    items: u64,
    buffer: Vec<u8>,
    /// How many items the end says there are.
    ended: Option<u64>,
}

impl ImageReader {
    pub(super) fn new(name: ImageName, buffer: Vec<u8>) -> Self {
        Self {
            path: name.path(),
            name,
            reader: None,
            next: (0, 0),
            items: 0,
            buffer,
            ended: None,
        }
    }

    pub(super) fn name(&self) -> ImageName {
        self.name
    }

    pub(super) fn offset(&self) -> u64 {
        self.reader.as_ref().map_or(0, Reader::offset)
    }

    pub(super) fn into_buffer(self) -> Vec<u8> {
        self.reader.map_or(self.buffer, Reader::into_buffer)
    }

    /// So many items were in it.
    pub(super) fn count(&mut self, items: u64) {
        self.items += items;
    }

    /// The header.
    pub(super) fn open(
        &mut self,
        disk: &dyn Disk,
        names: &Names,
        seal: Seal,
        directory: u64,
    ) -> Result<ImageHead, Problem> {
        let io = names.io("read", &self.path);
        let file = disk.open(&self.path).map_err(&io)?;
        let block = file.read_front(BLOCK_BYTES).map_err(&io)?;
        let head = ImageHead::read(&block).map_err(|bad| names.damage(&self.path, 0, bad.to_string()))?;
        let name = ImageName {
            shard: head.shard,
            generation: head.generation,
            position: head.position,
        };
        if name != self.name || head.directory != directory {
            return Err(names.damage(&self.path, 0, "its header is that of another file"));
        }
        self.reader = Some(Reader::new(file, seal, std::mem::take(&mut self.buffer)));
        Ok(head)
    }

    /// The next frame with items, until it has ended.
    pub(super) fn next(
        &mut self,
        disk: &dyn Disk,
        names: &Names,
        seal: Seal,
        directory: u64,
    ) -> Result<Option<Found<'_>>, Problem> {
        if self.reader.is_none() {
            self.open(disk, names, seal, directory)?;
        }
        let (Some(reader), None) = (&mut self.reader, self.ended) else {
            return Ok(None);
        };
        let offset = reader.offset();
        let found = reader.read().map_err(names.io("read", &self.path))?;
        let found = found.map_err(|bad| names.damage(&self.path, offset, format!("the image is damaged: {bad}")))?;
        let Found { frame, body, .. } = found;
        let expected =
            (frame.generation, frame.sequence, frame.position) == (self.name.generation, self.next.0, self.next.1);
        if !expected {
            return Err(names.damage(
                &self.path,
                offset,
                "a frame of another place where the next one should be",
            ));
        }
        if frame.flags & frame::END == 0 {
            self.next = (self.next.0 + 1, self.next.1 + body.len() as u64);
            return Ok(Some(found));
        }
        let count = body.try_into().map(u64::from_le_bytes);
        let count = count.map_err(|_| names.damage(&self.path, offset, "the end of the image has no count"))?;
        self.ended = Some(count);
        Ok(None)
    }

    /// It ended, and had as many items as its end says.
    pub(super) fn check_count(&self, names: &Names) -> Result<(), Problem> {
        let (has, says) = (self.items, self.ended.unwrap_or(0));
        match has == says {
            true => Ok(()),
            false => Err(names.damage(
                &self.path,
                self.offset(),
                format!("the image has {has} items, and its end says {says}"),
            )),
        }
    }
}
