//! Reads directories that arbitrary bytes made: nothing may panic, and nothing may come out that nobody wrote.

use super::{DataDir, Wanted, describe};
use crate::disk::Disk;
use crate::disk::memory::MemoryDisk;
use crate::effect::{self, Effect, Image};
use crate::frame::{FRAMES_AT, Frame, HEAD_BYTES, ImageHead, ImageName, Seal, SegmentHead};
use crate::model::Deadline;
use crate::wal::{Durability, Job, Log};
use std::sync::Arc;

const DIRECTORY: u64 = 2;
const SEGMENT: &str = "log/00000001-0000-00000000.log";
const VALUE: &[u8] = b"the value";

fn open(disk: &MemoryDisk, salvage: bool) -> Option<DataDir> {
    let wanted = Wanted {
        name: "data".to_owned(),
        partitioner: None,
        boundaries: vec![],
        shards: Some(1),
        seed: None,
        random: [1, DIRECTORY],
        segment_bytes: 64 << 10,
        salvage,
    };
    DataDir::open(Arc::new(disk.clone()), wanted).ok()
}

/// A directory of one core and one shard, with some units in its log.
fn directory() -> MemoryDisk {
    let disk = MemoryDisk::default();
    let begun = open(&disk, false).and_then(|mut dir| {
        let table = dir.table(1).ok()?;
        dir.begin_generation(&table, Durability::Always).ok()?;
        dir.keeper(0).ok()
    });
    let mut log = Log::new(1);
    let mut unit = |number: u8| {
        log.put(&Image {
            key: &[number],
            value: VALUE,
            flags: 0,
            deadline: Deadline::Never,
            state: 0,
        });
        log.take(Default::default())
    };
    if let Some(mut keeper) = begun {
        let job = |chunks, sync| Job::Log {
            chunks,
            sync,
            ends: false,
        };
        for number in 0..7 {
            keeper.run(job(unit(number), number % 2 == 0));
        }
        // Two that are under way together: the second begins in a block of its own.
        if let Some(mut writer) = keeper.lend() {
            let writes = [unit(7), unit(8)].map(|chunks| writer.begin(&chunks, false));
            for write in writes.into_iter().flatten() {
                let written = writer.file().write_at(write.offset(), write.bytes());
                let _ = writer.end(write, written);
            }
            keeper.give_back(writer);
        }
        keeper.run(job(unit(9), true));
    }
    disk
}

/// Opens, restores and describes it in every way. `known` says whether all that comes out must have been written.
fn read_all(disk: &MemoryDisk, known: bool) {
    let shared: Arc<dyn Disk> = Arc::new(disk.clone());
    let _ = describe(&shared, "data", true, &mut |_| {});
    for salvage in [false, true] {
        let Some((dir, table)) = open(disk, salvage).and_then(|dir| dir.table(1).ok().map(|table| (dir, table))) else {
            continue;
        };
        let mut restorer = dir.restorer(0..1, table);
        let mut apply = |restored: super::Restored<'_>| {
            match restored.effect {
                Effect::Put(image) if known => assert!(image.value == VALUE && image.key.len() == 1),
                _ if known => panic!("nobody wrote {restored:?}"),
                _ => {}
            }
            Ok(())
        };
        while let Ok(true) = restorer.step(&mut apply) {}
    }
}

/// Frames with right checksums, and with what `data` says in them.
fn sealed(mut data: &[u8], ends: bool) -> Vec<u8> {
    let mut frames = vec![];
    let (mut sequence, mut position) = (0, 0);
    while let Some((&[flags, length, epoch, jump], rest)) = data.split_first_chunk() {
        let (body, rest) = rest.split_at(rest.len().min(usize::from(length)));
        data = rest;
        let frame = Frame {
            generation: 1,
            flags: u16::from(flags),
            // Mostly the right one.
            sequence: sequence + u64::from(jump / 250),
            position,
            epoch: u64::from(epoch),
            ..Frame::default()
        };
        let at = frames.len();
        frames.resize(at + HEAD_BYTES + body.len(), 0);
        Seal::new(DIRECTORY).write(&frame, body, &mut frames[at..]);
        sequence += 1;
        position += body.len() as u64;
    }
    if ends {
        let frame = Frame {
            generation: 1,
            flags: crate::frame::END,
            sequence,
            position,
            ..Frame::default()
        };
        let at = frames.len();
        frames.resize(at + HEAD_BYTES + 8, 0);
        Seal::new(DIRECTORY).write(&frame, &[0; 8], &mut frames[at..]);
    }
    frames
}

/// Overwrites bytes: each three bytes of `data` are a place and what to put there.
fn damage(bytes: &mut [u8], data: &[u8]) {
    for edit in data.chunks_exact(3) {
        let place = usize::from(u16::from_le_bytes([edit[0], edit[1]]));
        if let Some(byte) = bytes.get_mut(place) {
            *byte ^= edit[2];
        }
    }
}

/// See `crate::fuzzing`. The first byte says in which way the rest is used.
pub(crate) fn log(data: &[u8]) {
    let Some((way, data)) = data.split_first() else {
        return;
    };
    let disk = directory();
    let mut segment = disk.get(SEGMENT).unwrap_or_default();
    match way % 3 {
        0 => {
            damage(&mut segment, data);
            disk.put(SEGMENT, &segment);
            read_all(&disk, true);
        }
        1 => {
            disk.put(SEGMENT, data);
            read_all(&disk, true);
        }
        _ => {
            segment.truncate(FRAMES_AT as usize);
            segment.extend_from_slice(&sealed(data, false));
            disk.put(SEGMENT, &segment);
            read_all(&disk, false);
        }
    }
    // A header that is right, of a segment that says what it likes.
    if let Some((numbers, frames)) = data.split_first_chunk::<4>() {
        let [position, sequence, unit, closed] = numbers.map(u64::from);
        let head = SegmentHead {
            cores: 1,
            durability: 2,
            directory: DIRECTORY,
            generation: 1,
            shards: 1,
            position,
            sequence,
            unit_position: unit,
            unit_sequence: unit,
            closed,
            ..SegmentHead::default()
        };
        let mut segment = head.write().0.to_vec();
        segment.extend_from_slice(&sealed(frames, false));
        disk.put(SEGMENT, &segment);
        read_all(&disk, false);
    }
}

/// See `crate::fuzzing`. The first byte says in which way the rest is used.
pub(crate) fn image(data: &[u8]) {
    let Some((way, data)) = data.split_first() else {
        return;
    };
    let disk = directory();
    let name = ImageName {
        shard: 0,
        generation: 1,
        position: 0,
    };
    let head = ImageHead {
        directory: DIRECTORY,
        generation: 1,
        ..ImageHead::default()
    };
    let mut bytes = head.write().0.to_vec();
    match way % 3 {
        0 => {
            let mut body = vec![];
            let image = Image {
                key: b"k",
                value: VALUE,
                flags: 0,
                deadline: Deadline::Never,
                state: 0,
            };
            effect::push_put(&mut body, &image);
            let mut items = vec![0, body.len() as u8, 0, 0];
            items.extend_from_slice(&body);
            bytes.extend_from_slice(&sealed(&items, true));
            damage(&mut bytes, data);
        }
        1 => bytes = data.to_vec(),
        _ => bytes.extend_from_slice(&sealed(data, way % 2 == 0)),
    }
    disk.put(&name.path(), &bytes);
    read_all(&disk, way % 3 != 2);
}
