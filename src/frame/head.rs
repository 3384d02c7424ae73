//! The header block of a file.

use crate::disk::{BLOCK_BYTES, Block};

/// How a kind of file begins.
struct Kind {
    magic: &'static [u8; 8],
    /// The version of its format that is written, and the newest that is read.
    version: u16,
}

/// In version 1 no rest of a block is left out. Else it is the same.
const LOG: Kind = Kind {
    magic: b"memkvlog",
    version: 2,
};
const IMAGE: Kind = Kind {
    magic: b"memkvimg",
    version: 1,
};

/// What the first block of a segment of the log says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SegmentHead {
    /// The core whose log it is.
    pub core: u16,
    /// How many cores there were.
    pub cores: u16,
    /// 0 none, 1 interval, 2 always.
    pub durability: u8,
    /// The number of the data directory.
    pub directory: u64,
    /// The run of the server.
    pub generation: u32,
    /// The first of the shards that the core had.
    pub first_shard: u16,
    /// How many it had.
    pub shards: u16,
    /// The segment's number, from 0, of its core in its generation.
    pub number: u64,
    /// The position at which its effects begin.
    pub position: u64,
    /// The sequence of its first frame.
    pub sequence: u64,
    /// The position at which the unit began that was under way then; `position` when none was.
    pub unit_position: u64,
    /// The sequence of that unit's first frame; `sequence` when none was.
    pub unit_sequence: u64,
    /// What the last frame before that unit said.
    pub closed: u64,
    /// How long the file is.
    pub bytes: u64,
}

/// What the first block of an image says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ImageHead {
    /// The shard it is of.
    pub shard: u16,
    /// The core that had it.
    pub core: u16,
    /// The number of the data directory.
    pub directory: u64,
    /// The run of the server.
    pub generation: u32,
    /// The position in that core's log at which the shard was like this.
    pub position: u64,
    /// The epoch of that moment.
    pub epoch: u64,
    /// That moment, in milliseconds of Unix time.
    pub time: u64,
}

/// Why a block is not the header it should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bad {
    /// The file is shorter than a block.
    Short,
    /// It begins with something else.
    Magic,
    /// It was written by a later program, and this one reads up to the second version.
    Version(u16, u16),
    /// Its checksum is wrong.
    Checksum,
}

impl std::fmt::Display for Bad {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Bad::Short => f.write_str("it is too short to have a header"),
            Bad::Magic => f.write_str("it does not begin as such a file does"),
            Bad::Version(version, newest) => write!(
                f,
                "it has format version {version}, and this program reads version {newest}: use the newer program"
            ),
            Bad::Checksum => f.write_str("the checksum of its header is wrong"),
        }
    }
}

/// Numbers behind each other.
struct Writer(Vec<u8>);

impl Writer {
    fn new(kind: &Kind) -> Self {
        let mut bytes = kind.magic.to_vec();
        bytes.extend_from_slice(&kind.version.to_le_bytes());
        Self(bytes)
    }

    fn short(&mut self, number: u16) -> &mut Self {
        self.0.extend_from_slice(&number.to_le_bytes());
        self
    }

    fn word(&mut self, number: u32) -> &mut Self {
        self.0.extend_from_slice(&number.to_le_bytes());
        self
    }

    fn long(&mut self, number: u64) -> &mut Self {
        self.0.extend_from_slice(&number.to_le_bytes());
        self
    }

    /// The block, with the checksum behind what was written.
    fn finish(&mut self) -> Block {
        let sum = crc32c::crc32c(&self.0);
        self.word(sum);
        let mut block = Block([0; BLOCK_BYTES]);
        block.0[..self.0.len()].copy_from_slice(&self.0);
        block
    }
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    /// Of a header of so many bytes before its checksum.
    fn new(block: &'a [u8], kind: &Kind, bytes: usize) -> Result<Self, Bad> {
        let (head, _) = block.split_at_checked(BLOCK_BYTES).ok_or(Bad::Short)?;
        let (fields, behind) = head.split_at(bytes);
        if fields[..8] != *kind.magic {
            return Err(Bad::Magic);
        }
        let mut reader = Self(&fields[8..]);
        let version = reader.short();
        if version > kind.version {
            return Err(Bad::Version(version, kind.version));
        }
        if behind[..4] != crc32c::crc32c(fields).to_le_bytes() || version == 0 {
            return Err(Bad::Checksum);
        }
        Ok(reader)
    }

    /// The headers' lengths are constants, so the bytes are there.
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let (taken, rest) = self.0.split_at(N);
        self.0 = rest;
        let mut bytes = [0; N];
        bytes.copy_from_slice(taken);
        bytes
    }

    fn short(&mut self) -> u16 {
        u16::from_le_bytes(self.take())
    }

    fn word(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }

    fn long(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }
}

impl SegmentHead {
    const BYTES: usize = 88;

    /// As a block.
    pub fn write(&self) -> Block {
        let mut out = Writer::new(&LOG);
        out.short(self.core).short(self.cores).short(u16::from(self.durability));
        out.long(self.directory).word(self.generation);
        out.short(self.first_shard).short(self.shards).long(self.number);
        out.long(self.position).long(self.sequence);
        out.long(self.unit_position).long(self.unit_sequence);
        out.long(self.closed).long(self.bytes).finish()
    }

    /// From the first block of a file.
    pub fn read(block: &[u8]) -> Result<Self, Bad> {
        let mut from = Reader::new(block, &LOG, Self::BYTES)?;
        Ok(Self {
            core: from.short(),
            cores: from.short(),
            durability: from.short() as u8,
            directory: from.long(),
            generation: from.word(),
            first_shard: from.short(),
            shards: from.short(),
            number: from.long(),
            position: from.long(),
            sequence: from.long(),
            unit_position: from.long(),
            unit_sequence: from.long(),
            closed: from.long(),
            bytes: from.long(),
        })
    }
}

impl ImageHead {
    const BYTES: usize = 56;

    /// As a block.
    pub fn write(&self) -> Block {
        let mut out = Writer::new(&IMAGE);
        out.short(self.shard).short(self.core).short(0);
        out.long(self.directory).word(self.generation).word(0);
        out.long(self.position).long(self.epoch).long(self.time).finish()
    }

    /// From the first block of a file.
    pub fn read(block: &[u8]) -> Result<Self, Bad> {
        let mut from = Reader::new(block, &IMAGE, Self::BYTES)?;
        let (shard, core, _) = (from.short(), from.short(), from.short());
        let (directory, generation, _) = (from.long(), from.word(), from.word());
        Ok(Self {
            shard,
            core,
            directory,
            generation,
            position: from.long(),
            epoch: from.long(),
            time: from.long(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_come_back_and_every_flipped_bit_is_noticed() {
        let segment = SegmentHead {
            core: 1,
            cores: 2,
            durability: 2,
            directory: 3,
            generation: 4,
            first_shard: 5,
            shards: 6,
            number: 7,
            position: 8,
            sequence: 9,
            unit_position: 10,
            unit_sequence: 11,
            closed: 12,
            bytes: 13,
        };
        let image = ImageHead {
            shard: 1,
            core: 2,
            directory: 3,
            generation: 4,
            position: 5,
            epoch: 6,
            time: 7,
        };
        let (mut log, mut img) = (segment.write().0, image.write().0);
        assert_eq!(SegmentHead::read(&log), Ok(segment));
        assert_eq!(ImageHead::read(&img), Ok(image));
        assert_eq!(SegmentHead::read(&img), Err(Bad::Magic));
        assert_eq!(SegmentHead::read(&log[..4095]), Err(Bad::Short));
        for bit in 0..(SegmentHead::BYTES + 4) * 8 {
            log[bit / 8] ^= 1 << (bit % 8);
            assert!(SegmentHead::read(&log).is_err(), "bit {bit}");
            log[bit / 8] ^= 1 << (bit % 8);
        }
        for bit in 0..(ImageHead::BYTES + 4) * 8 {
            img[bit / 8] ^= 1 << (bit % 8);
            assert!(ImageHead::read(&img).is_err(), "bit {bit}");
            img[bit / 8] ^= 1 << (bit % 8);
        }
        log[8] = 3;
        assert_eq!(SegmentHead::read(&log), Err(Bad::Version(3, 2)));
        // The first version is read, too.
        log[8] = 1;
        let sum = crc32c::crc32c(&log[..SegmentHead::BYTES]);
        log[SegmentHead::BYTES..][..4].copy_from_slice(&sum.to_le_bytes());
        assert_eq!(SegmentHead::read(&log), Ok(segment));
    }
}
