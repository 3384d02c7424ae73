//! How effects lie in a file: headers and frames, written and checked.
//!
//! A segment of the log and an image of a shard are built alike: a block with a header, then *frames* one behind the other, or, in
//! a segment, at the beginning of the next block. A frame is a header of 72 bytes and a body of at most 1 MiB, under one checksum. `docs/format.md` has the tables.
//!
//! Nothing here trusts a byte before its checksum is right, and nothing believes a length that the file does not have.

mod head;
mod names;

pub use head::{Bad as BadHead, ImageHead, SegmentHead};
pub use names::{ImageName, SegmentName, spare_name, spare_parts};

use crate::disk::{BLOCK_BYTES, File};
use crate::effect;

/// Where the first frame is: behind the header's block.
pub const FRAMES_AT: u64 = BLOCK_BYTES as u64;

/// Bytes of a frame before its body.
pub const HEAD_BYTES: usize = 72;

/// The largest body. A reader needs room for one.
pub const BODY_BYTES_MAX: usize = 1 << 20;

/// The unit goes on in the next frame: without that, it does not count.
pub const MORE: u16 = 1;
/// Parts of transactions are among the effects.
pub const HAS_PARTS: u16 = 2;
/// Nothing follows: the server ended in order, or the image is complete.
pub const END: u16 = 4;
/// The body's only effect goes on in the next frame.
pub const GOES_ON: u16 = 8;
/// The body goes on with an effect that began in an earlier frame.
pub const CONTINUES: u16 = 16;

const MAGIC: [u8; 4] = *b"mkvf";
/// The checksum covers everything behind it.
const SUMMED_FROM: usize = 8;

/// What a frame says beside its body.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Frame {
    /// The run of the server.
    pub generation: u32,
    /// The core that wrote it.
    pub core: u16,
    /// [`MORE`] and the others.
    pub flags: u16,
    /// Its number, from 0, of its core in its generation; of an image, in the image.
    pub sequence: u64,
    /// How many bytes of effects came before.
    pub position: u64,
    /// The epoch of its effects.
    pub epoch: u64,
    /// No part of a transaction that was decided in this epoch, or before, is behind this frame.
    pub closed: u64,
    /// All frames before this sequence were known to be safe when this one was written.
    pub synced: u64,
    /// When, in milliseconds of Unix time.
    pub time: u64,
}

/// Why bytes are no frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bad {
    /// So many bytes would be needed.
    Short(usize),
    /// Zeros, where its first bytes would be.
    Blank,
    /// It does not begin like a frame.
    Magic,
    /// It claims a body that is too long.
    Length(u32),
    /// Its checksum is wrong.
    Checksum,
}

impl std::fmt::Display for Bad {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Bad::Short(needed) => write!(f, "the file ends inside a frame of {needed} bytes"),
            Bad::Blank => f.write_str("zeros where a frame should be"),
            Bad::Magic => f.write_str("bytes that are no frame where a frame should be"),
            Bad::Length(length) => write!(f, "a frame that claims {length} bytes, more than there can be"),
            Bad::Checksum => f.write_str("a frame whose checksum is wrong"),
        }
    }
}

/// Writes and checks the frames of one data directory: its number goes into every checksum, so that a file of another directory,
/// or bytes that a client sent, are not taken for this one's.
#[derive(Clone, Copy, Debug)]
pub struct Seal(u32);

impl Seal {
    /// That of the directory with this number.
    pub fn new(directory: u64) -> Self {
        Self(crc32c::crc32c(&directory.to_le_bytes()))
    }

    /// Writes a frame to the front of `out`, which has room for it.
    pub fn write(self, frame: &Frame, body: &[u8], out: &mut [u8]) {
        let (head, rest) = out.split_at_mut(HEAD_BYTES);
        rest[..body.len()].copy_from_slice(body);
        head[..4].copy_from_slice(&MAGIC);
        let mut at = SUMMED_FROM;
        let mut put = |bytes: &[u8]| {
            head[at..at + bytes.len()].copy_from_slice(bytes);
            at += bytes.len();
        };
        put(&(body.len() as u32).to_le_bytes());
        put(&frame.generation.to_le_bytes());
        put(&frame.core.to_le_bytes());
        put(&frame.flags.to_le_bytes());
        put(&[0; 4]);
        for number in [
            frame.sequence,
            frame.position,
            frame.epoch,
            frame.closed,
            frame.synced,
            frame.time,
        ] {
            put(&number.to_le_bytes());
        }
        let sum = crc32c::crc32c_append(self.0, &out[SUMMED_FROM..HEAD_BYTES + body.len()]);
        out[4..SUMMED_FROM].copy_from_slice(&sum.to_le_bytes());
    }

    /// The frame at the front of `bytes`, and how long its body is.
    pub fn read(self, bytes: &[u8]) -> Result<(Frame, usize), Bad> {
        let (frame, length) = peek(bytes)?;
        let whole = bytes.get(..HEAD_BYTES + length);
        let whole = whole.ok_or(Bad::Short(HEAD_BYTES + length))?;
        let sum = crc32c::crc32c_append(self.0, &whole[SUMMED_FROM..]);
        if whole[4..SUMMED_FROM] != sum.to_le_bytes() {
            return Err(Bad::Checksum);
        }
        Ok((frame, length))
    }
}

/// What the bytes claim to be, before their checksum is looked at.
fn peek(bytes: &[u8]) -> Result<(Frame, usize), Bad> {
    let Some((head, _)) = bytes.split_first_chunk::<HEAD_BYTES>() else {
        let begins = bytes.starts_with(&MAGIC) || MAGIC.starts_with(bytes);
        return Err(if begins { Bad::Short(HEAD_BYTES) } else { Bad::Magic });
    };
    if head[..4] != MAGIC {
        let blank = head.iter().all(|byte| *byte == 0);
        return Err(if blank { Bad::Blank } else { Bad::Magic });
    }
    let short = |at: usize| u16::from_le_bytes([head[at], head[at + 1]]);
    let word = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
    let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
    let length = word(8);
    if length as usize > BODY_BYTES_MAX {
        return Err(Bad::Length(length));
    }
    let frame = Frame {
        generation: word(12),
        core: short(16),
        flags: short(18),
        sequence: long(24),
        position: long(32),
        epoch: long(40),
        closed: long(48),
        synced: long(56),
        time: long(64),
    };
    Ok((frame, length as usize))
}

/// A frame that was found in a file.
#[derive(Clone, Copy, Debug)]
pub struct Found<'a> {
    /// What it says.
    pub frame: Frame,
    /// Its effects.
    pub body: &'a [u8],
    /// Where it is.
    pub offset: u64,
}

/// How much is read at once. Two bodies fit, so at least half of what is read is new.
const WINDOW_BYTES: usize = 2 * (BODY_BYTES_MAX + HEAD_BYTES);

/// Reads the frames of a file, one behind the other, with large reads.
pub struct Reader {
    file: Box<dyn File>,
    seal: Seal,
    buffer: Vec<u8>,
    /// What is in the buffer and was not read yet.
    start: usize,
    end: usize,
    /// Where in the file `start` is.
    offset: u64,
    /// The file has nothing behind what is in the buffer.
    at_end: bool,
}

impl std::fmt::Debug for Reader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reader").field("offset", &self.offset).finish()
    }
}

impl Reader {
    /// A reader of this file, from the first frame on. The buffer is one that [`Reader::into_buffer`] gave back, or empty.
    pub fn new(file: Box<dyn File>, seal: Seal, buffer: Vec<u8>) -> Self {
        Self {
            file,
            seal,
            buffer,
            start: 0,
            end: 0,
            offset: FRAMES_AT,
            at_end: false,
        }
    }

    /// Gives the buffer back.
    pub fn into_buffer(self) -> Vec<u8> {
        self.buffer
    }

    /// Where the next frame would be.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Tries to have so many bytes in the buffer; says whether there are.
    fn fill(&mut self, needed: usize) -> std::io::Result<bool> {
        if self.end - self.start >= needed {
            return Ok(true);
        }
        self.buffer.resize(WINDOW_BYTES, 0);
        self.buffer.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        while self.end < needed && !self.at_end {
            let at = self.offset + self.end as u64;
            let count = self.file.read_at(at, &mut self.buffer[self.end..])?;
            self.end += count;
            self.at_end = count == 0;
        }
        Ok(self.end >= needed)
    }

    fn advance(&mut self, bytes: usize) {
        self.start += bytes;
        self.offset += bytes as u64;
    }

    /// Leaves out the rest of a block, if the next one begins like a frame.
    fn skip_rest(&mut self) -> std::io::Result<()> {
        let rest = (self.offset.next_multiple_of(BLOCK_BYTES as u64) - self.offset) as usize;
        if self.fill(rest + MAGIC.len())? && self.buffer[self.start + rest..self.end].starts_with(&MAGIC) {
            self.advance(rest);
        }
        Ok(())
    }

    /// The next frame, or why there is none; then the reader stays where it is, or where the next block begins.
    pub fn read(&mut self) -> std::io::Result<Result<Found<'_>, Bad>> {
        self.fill(HEAD_BYTES)?;
        if !self.buffer[self.start..self.end].starts_with(&MAGIC) {
            self.skip_rest()?;
            self.fill(HEAD_BYTES)?;
        }
        let length = match peek(&self.buffer[self.start..self.end]) {
            Ok((_, length)) => length,
            Err(bad) => return Ok(Err(bad)),
        };
        self.fill(HEAD_BYTES + length)?;
        let read = self.seal.read(&self.buffer[self.start..self.end]);
        let (frame, length) = match read {
            Ok(read) => read,
            Err(bad) => return Ok(Err(bad)),
        };
        let (body, offset) = (self.start + HEAD_BYTES, self.offset);
        self.advance(HEAD_BYTES + length);
        Ok(Ok(Found {
            frame,
            body: &self.buffer[body..body + length],
            offset,
        }))
    }

    /// Looks for a frame for which `wanted` holds from this place on, at any offset.
    pub fn search(&mut self, wanted: impl Fn(&Frame) -> bool) -> std::io::Result<Option<(u64, Frame)>> {
        // Bytes that pretend to be wanted frames, one in another, must not take for ever.
        let mut budget = 64 * (1u64 << 25);
        while self.fill(HEAD_BYTES)? && budget > 0 {
            let Some(place) = memchr::memmem::find(&self.buffer[self.start..self.end], &MAGIC) else {
                self.advance(self.end - self.start - (MAGIC.len() - 1));
                continue;
            };
            self.advance(place);
            self.fill(HEAD_BYTES)?;
            if let Ok((frame, length)) = peek(&self.buffer[self.start..self.end])
                && wanted(&frame)
                && self.fill(HEAD_BYTES + length)?
            {
                budget = budget.saturating_sub((HEAD_BYTES + length) as u64);
                if self.seal.read(&self.buffer[self.start..self.end]).is_ok() {
                    return Ok(Some((self.offset, frame)));
                }
            }
            self.advance(1);
        }
        Ok(None)
    }
}

/// Puts an effect together that is longer than a frame.
#[derive(Debug, Default)]
pub struct Pieces {
    bytes: Vec<u8>,
    position: u64,
    under_way: bool,
}

impl Pieces {
    /// Whole effects and the position of the first, once there are any. A frame that goes on with something whose beginning was
    /// not read is left out.
    pub fn add<'a>(&'a mut self, frame: &Frame, body: &'a [u8]) -> Option<(u64, &'a [u8])> {
        let (continues, goes_on) = (frame.flags & CONTINUES != 0, frame.flags & GOES_ON != 0);
        match (continues, goes_on) {
            (false, false) => {
                self.under_way = false;
                return Some((frame.position, body));
            }
            (false, true) => {
                self.bytes.clear();
                self.position = frame.position;
                self.under_way = true;
            }
            (true, _) if !self.under_way => return None,
            (true, _) => {}
        }
        self.bytes.extend_from_slice(body);
        self.under_way = goes_on;
        (!goes_on).then_some((self.position, &self.bytes))
    }
}

/// Cuts effects into bodies of at most so many bytes, between effects where that is possible, each with the flags that say where
/// not. There is at least one body, also of nothing.
pub fn bodies(effects: &[u8], bytes_max: usize) -> impl Iterator<Item = (&[u8], u16)> {
    let mut rest = Some(effects);
    // Of an effect that is cut.
    let mut left = 0;
    std::iter::from_fn(move || {
        let bytes = rest?;
        let (length, flags) = if left > 0 {
            let length = bytes_max.min(left);
            left -= length;
            (length, CONTINUES | if left > 0 { GOES_ON } else { 0 })
        } else if bytes.len() <= bytes_max {
            (bytes.len(), 0)
        } else {
            let (whole, next) = whole_effects(bytes, bytes_max);
            if whole > 0 {
                (whole, 0)
            } else {
                left = next - bytes_max;
                (bytes_max, GOES_ON)
            }
        };
        let (body, behind) = bytes.split_at(length);
        rest = (!behind.is_empty()).then_some(behind);
        Some((body, flags))
    })
}

/// How many bytes of whole effects fit, and where the first that does not fit ends.
fn whole_effects(bytes: &[u8], bytes_max: usize) -> (usize, usize) {
    let mut rest = bytes;
    let mut whole = 0;
    loop {
        let end = match effect::read(&mut rest) {
            Ok(_) => bytes.len() - rest.len(),
            Err(_) => bytes.len(),
        };
        if end > bytes_max {
            return (whole, end);
        }
        whole = end;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::Disk;
    use crate::disk::memory::MemoryDisk;
    use proptest::prelude::*;

    fn reader_of(bytes: &[u8]) -> Reader {
        let disk = MemoryDisk::default();
        let file = disk.create("x").unwrap();
        file.write_at(FRAMES_AT, bytes).unwrap();
        Reader::new(disk.open("x").unwrap(), Seal::new(1), vec![])
    }

    fn frame(sequence: u64, flags: u16) -> Frame {
        Frame {
            generation: 3,
            core: 2,
            flags,
            sequence,
            position: 5,
            epoch: 6,
            closed: 7,
            synced: sequence.saturating_sub(1),
            time: 9,
        }
    }

    #[test]
    fn a_frame_comes_back_and_every_flipped_bit_is_noticed() {
        let mut bytes = vec![0; HEAD_BYTES + 5];
        Seal::new(1).write(&frame(4, MORE), b"hello", &mut bytes);
        let mut reader = reader_of(&bytes);
        let found = reader.read().unwrap().unwrap();
        assert_eq!(
            (found.frame, found.body, found.offset),
            (frame(4, MORE), &b"hello"[..], 4096)
        );
        assert_eq!(reader.read().unwrap().err(), Some(Bad::Short(HEAD_BYTES)));
        assert_eq!(Seal::new(2).read(&bytes), Err(Bad::Checksum));
        for bit in 0..bytes.len() * 8 {
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(Seal::new(1).read(&bytes).is_err(), "bit {bit}");
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
    }

    #[test]
    fn a_frame_is_found_behind_garbage_larger_than_the_window() {
        let mut bytes = vec![b'm'; WINDOW_BYTES + 1234];
        let place = bytes.len();
        bytes.resize(place + HEAD_BYTES + 3, 0);
        Seal::new(1).write(&frame(8, 0), b"abc", &mut bytes[place..]);
        let found = reader_of(&bytes).search(|frame| frame.synced > 6).unwrap();
        assert_eq!(found, Some((FRAMES_AT + place as u64, frame(8, 0))));
        assert_eq!(reader_of(&bytes).search(|frame| frame.synced > 7).unwrap(), None);
    }

    proptest! {
        /// However effects are cut, together they are what they were, and every body without flags holds whole effects.
        #[test]
        fn bodies_and_pieces(lengths in prop::collection::vec(0..200usize, 0..30), bytes_max in 20..300usize) {
            let mut effects = vec![];
            for length in &lengths {
                effect::push_delete(&mut effects, &vec![7; *length]);
            }
            let mut pieces = Pieces::default();
            let (mut back, mut position) = (vec![], 0);
            for (body, flags) in bodies(&effects, bytes_max) {
                prop_assert!(body.len() <= bytes_max);
                let frame = Frame { flags, position, ..frame(0, 0) };
                position += body.len() as u64;
                if let Some((at, whole)) = pieces.add(&frame, body) {
                    prop_assert_eq!(at, back.len() as u64);
                    back.extend_from_slice(whole);
                    let mut rest = whole;
                    while !rest.is_empty() {
                        prop_assert!(effect::read(&mut rest).is_ok());
                    }
                }
            }
            prop_assert_eq!(back, effects);
        }
    }
}
