//! The segment that is written: frames are put into blocks of memory, and blocks into the file.
//!
//! Who has the writer decides where it waits for the disk. The thread for files has it when a job is too large for one write, needs
//! another segment, or is to be written without being made safe ([`Writer::append`]); all else the core can send on its way itself,
//! and go on with other things ([`Writer::begin`], [`Writer::end`]).

use super::segments::Segments;
use super::{Place, name};
use crate::disk::{BLOCK_BYTES, Block, File};
use crate::frame::{self, FRAMES_AT, Frame, HEAD_BYTES, SegmentHead};
use crate::wal::Chunk;

/// What is collected before it is written, about; beyond that a unit costs more than one write.
const WRITE_BYTES: usize = 4 << 20;

/// Buffers of blocks that are kept for use, and how large each may be.
const BUFFERS_KEPT_MAX: usize = 2;
const BUFFER_KEPT_BLOCKS_MAX: usize = (1 << 20) / BLOCK_BYTES;

/// See the module's text.
pub struct Writer {
    place: Place,
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
    /// Writes that were begun and not ended.
    under_way: usize,
    /// Buffers to fill next.
    buffers: Vec<Vec<Block>>,
    /// Somebody was told that the next segment will be needed.
    told_of_next: bool,
    /// Why the log takes nothing more.
    failed: Option<String>,
}

impl std::fmt::Debug for Writer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Writer of segment {}", self.head.number)
    }
}

/// A unit in whole blocks, which is being written and made safe. Its bytes stay where they are as long as it lives.
#[derive(Debug)]
pub struct Write {
    blocks: Vec<Block>,
    bytes: usize,
    /// Where in the file they belong.
    offset: u64,
    /// The sequence behind its last frame.
    end: u64,
}

impl Write {
    /// What is to be written.
    pub fn bytes(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.blocks)[..self.bytes]
    }

    /// Where in the file, a multiple of [`BLOCK_BYTES`].
    pub fn offset(&self) -> u64 {
        self.offset
    }
}

impl Writer {
    /// The writer of a log whose first segment was just made.
    pub(super) fn new(place: Place, head: SegmentHead) -> Result<Self, String> {
        let path = name(&place, head.number).path();
        let file = place.disk.open_blocks(&path);
        let file = file.map_err(|error| place.failed("open", &path, &error))?;
        Ok(Self {
            place,
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
            under_way: 0,
            buffers: vec![],
            told_of_next: false,
            failed: None,
        })
    }

    /// The file of the segment.
    pub fn file(&self) -> &dyn File {
        &*self.file
    }

    /// The next segment will be needed soon; true once for each.
    pub fn needs_next(&mut self) -> bool {
        let soon = self.base + self.filled as u64 > self.head.bytes / 4;
        soon && !std::mem::replace(&mut self.told_of_next, true)
    }

    /// Prepares a unit that is to be written at its place and made safe, and then given to [`Writer::end`]. `None` when that is not
    /// enough: see the module's text.
    pub fn begin(&mut self, chunks: &[Chunk], ends: bool) -> Option<Write> {
        if self.under_way > 0 && self.filled > 0 && !self.dirty {
            // The disk has the block that is not full: whoever writes it once more now may be overtaken. Should the rest of this be for
            // somebody else to do, that begins in the next block, too.
            self.base += BLOCK_BYTES as u64;
            self.filled = 0;
        }
        let sizes = chunks.iter().map(|chunk| chunk.effects.len());
        let bytes: usize = sizes.clone().map(|size| size + HEAD_BYTES).sum();
        let fits = self.base + (self.filled + bytes) as u64 <= self.head.bytes && self.filled + bytes <= WRITE_BYTES;
        let one_frame_each = sizes.max().is_some_and(|size| size <= self.body_bytes_max());
        if self.failed.is_some() || self.dirty || self.unsynced || !fits || !one_frame_each {
            return None;
        }
        for (number, chunk) in chunks.iter().enumerate() {
            debug_assert_eq!(chunk.position, self.position, "a gap between chunks");
            let last = number + 1 == chunks.len();
            self.put(chunk, flags(chunk, last, ends), &chunk.effects);
            self.closed = chunk.closed;
        }
        let (offset, bytes) = self.seal();
        let mut next = self.buffers.pop().unwrap_or_default();
        if let Some(last) = self.advance() {
            next.resize(next.len().max(1), Block([0; BLOCK_BYTES]));
            next[0] = self.buffer[last];
        }
        let blocks = std::mem::replace(&mut self.buffer, next);
        self.under_way += 1;
        Some(Write {
            blocks,
            bytes,
            offset,
            end: self.sequence,
        })
    }

    /// The first of those that were begun is safe, or is not known to be: then the log takes nothing more, and all that were begun
    /// later fail as well.
    ///
    /// # Errors
    /// Why it takes nothing more.
    pub fn end(&mut self, write: Write, written: std::io::Result<()>) -> Result<(), String> {
        self.under_way -= 1;
        if let Err(error) = written {
            self.fail("write to", &error);
        }
        if let Some(why) = &self.failed {
            return Err(why.clone());
        }
        self.synced = write.end;
        if self.buffers.len() < BUFFERS_KEPT_MAX && write.blocks.len() <= BUFFER_KEPT_BLOCKS_MAX {
            self.buffers.push(write.blocks);
        }
        Ok(())
    }

    /// Why the log takes nothing more.
    pub fn failed(&self) -> Option<&str> {
        self.failed.as_deref()
    }

    /// Writes a unit: all of it, or, after a crash, nothing. Waits until that is done. When it fails, so does all that follows.
    pub(super) fn append(
        &mut self,
        segments: &mut Segments,
        chunks: &[Chunk],
        sync: bool,
        ends: bool,
    ) -> Result<(), String> {
        debug_assert_eq!(
            self.under_way, 0,
            "the disk is at a block that would be written once more"
        );
        if self.failed.is_none()
            && let Err(why) = self.append_all(segments, chunks, sync, ends)
        {
            self.failed = Some(why);
        }
        self.failed.clone().map_or(Ok(()), Err)
    }

    fn append_all(&mut self, segments: &mut Segments, chunks: &[Chunk], sync: bool, ends: bool) -> Result<(), String> {
        self.unit = (self.sequence, self.position);
        for (number, chunk) in chunks.iter().enumerate() {
            debug_assert_eq!(chunk.position, self.position, "a gap between chunks");
            let last_chunk = number + 1 == chunks.len();
            let mut left = chunk.effects.len();
            for (body, piece) in frame::bodies(&chunk.effects, self.body_bytes_max()) {
                left -= body.len();
                let last = last_chunk && left == 0;
                self.push(segments, chunk, piece | flags(chunk, last, ends), body)?;
            }
            if last_chunk {
                self.unit = (self.sequence, self.position);
                self.closed = chunk.closed;
            }
        }
        self.flush()?;
        if sync {
            self.sync()?;
        }
        Ok(())
    }

    fn why(&self, what: &str, error: &std::io::Error) -> String {
        let path = name(&self.place, self.head.number).path();
        self.place.failed(what, &path, error)
    }

    fn fail(&mut self, what: &str, error: &std::io::Error) {
        if self.failed.is_none() {
            self.failed = Some(self.why(what, error));
        }
    }

    /// What fits into a frame, and with it into a segment.
    fn body_bytes_max(&self) -> usize {
        let room = (self.head.bytes - FRAMES_AT) as usize - HEAD_BYTES;
        frame::BODY_BYTES_MAX.min(room)
    }

    fn push(&mut self, segments: &mut Segments, chunk: &Chunk, flags: u16, body: &[u8]) -> Result<(), String> {
        let needed = HEAD_BYTES + body.len();
        if self.base + (self.filled + needed) as u64 > self.head.bytes {
            self.roll(segments)?;
        } else if self.filled + needed > WRITE_BYTES {
            self.flush()?;
        }
        self.put(chunk, flags, body);
        Ok(())
    }

    /// Adds a frame to the buffer.
    fn put(&mut self, chunk: &Chunk, flags: u16, body: &[u8]) {
        let needed = HEAD_BYTES + body.len();
        let blocks = (self.filled + needed).div_ceil(BLOCK_BYTES);
        if self.buffer.len() < blocks {
            self.buffer.resize(blocks, Block([0; BLOCK_BYTES]));
        }
        let frame = Frame {
            generation: self.place.generation,
            core: self.place.core,
            flags,
            sequence: self.sequence,
            position: self.position,
            epoch: chunk.epoch,
            closed: chunk.closed,
            synced: self.synced,
            time: chunk.time.0,
        };
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut self.buffer);
        self.place.seal.write(&frame, body, &mut bytes[self.filled..]);
        self.filled += needed;
        self.dirty = true;
        self.sequence += 1;
        self.position += body.len() as u64;
    }

    /// Fills the last block with zeros; says where the buffer belongs in the file, and how many bytes of it.
    fn seal(&mut self) -> (u64, usize) {
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut self.buffer);
        let end = self.filled.next_multiple_of(BLOCK_BYTES);
        bytes[self.filled..end].fill(0);
        (self.base, end)
    }

    /// Goes on behind what is in the buffer: in its last block, if that is not full. Then the new buffer is to begin with a copy of
    /// that one, and its number is returned.
    fn advance(&mut self) -> Option<usize> {
        let whole = self.filled / BLOCK_BYTES;
        self.base += (whole * BLOCK_BYTES) as u64;
        self.filled -= whole * BLOCK_BYTES;
        self.dirty = false;
        (self.filled > 0).then_some(whole)
    }

    /// Writes what is in the buffer.
    fn flush(&mut self) -> Result<(), String> {
        if !self.dirty {
            return Ok(());
        }
        let (offset, end) = self.seal();
        let bytes: &[u8] = bytemuck::cast_slice(&self.buffer);
        let written = self.file.write_at(offset, &bytes[..end]);
        written.map_err(|error| self.why("write to", &error))?;
        if let Some(last) = self.advance() {
            self.buffer[0] = self.buffer[last];
        }
        self.unsynced = true;
        Ok(())
    }

    /// Makes what was written safe.
    fn sync(&mut self) -> Result<(), String> {
        if self.unsynced {
            let synced = self.file.sync();
            synced.map_err(|error| self.why("make safe", &error))?;
            self.unsynced = false;
        }
        self.synced = self.sequence;
        Ok(())
    }

    /// Begins the next segment.
    fn roll(&mut self, segments: &mut Segments) -> Result<(), String> {
        self.flush()?;
        self.sync()?;
        let head = SegmentHead {
            number: self.head.number + 1,
            position: self.position,
            sequence: self.sequence,
            unit_sequence: self.unit.0,
            unit_position: self.unit.1,
            closed: self.closed,
            ..self.head
        };
        self.file = segments.begin(&self.place, &head)?;
        self.head = head;
        self.base = FRAMES_AT;
        self.filled = 0;
        self.told_of_next = false;
        Ok(())
    }
}

/// What a frame says of the unit that it belongs to.
fn flags(chunk: &Chunk, last: bool, ends: bool) -> u16 {
    let flag = |on, flag| if on { flag } else { 0 };
    flag(!last, frame::MORE) | flag(chunk.has_parts, frame::HAS_PARTS) | flag(last && ends, frame::END)
}
