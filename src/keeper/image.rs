//! The images of one core's shards: the one that is written, and the one that waits to take its place.

use super::Place;
use crate::disk::File;
use crate::frame::{self, FRAMES_AT, Frame, HEAD_BYTES, ImageHead, ImageName};
use crate::model::UnixMillis;

/// What is written of an image before it is made safe. Without that, all of it would be at the end, and the log would have to wait.
const SYNC_BYTES: u64 = 8 << 20;

const UNDER_WAY: &str = ".new";

#[derive(Default)]
pub(super) struct Images {
    current: Option<Current>,
    /// It waits to be adopted; with its length.
    ended: Option<(ImageName, u64)>,
    buffer: Vec<u8>,
}

struct Current {
    name: ImageName,
    file: Box<dyn File>,
    /// Where the next frame will be.
    offset: u64,
    synced: u64,
    items: u64,
    /// Of the next frame.
    frame: Frame,
}

fn path(name: &ImageName) -> String {
    format!("{}{UNDER_WAY}", name.path())
}

const NONE: &str = "there is no image under way";

impl Images {
    pub(super) fn begin(
        &mut self,
        place: &Place,
        shard: u16,
        position: u64,
        epoch: u64,
        time: UnixMillis,
    ) -> Result<u64, String> {
        self.give_up(place);
        let head = ImageHead {
            shard,
            core: place.core,
            directory: place.directory,
            generation: place.generation,
            position,
            epoch,
            time: time.0,
        };
        let name = ImageName {
            shard,
            generation: place.generation,
            position,
        };
        let path = path(&name);
        let failed = |error| place.failed("begin the image", &path, &error);
        let file = place.disk.create(&path).map_err(failed)?;
        let frame = Frame {
            generation: place.generation,
            core: place.core,
            epoch,
            time: time.0,
            ..Frame::default()
        };
        let current = self.current.insert(Current {
            name,
            file,
            offset: FRAMES_AT,
            synced: 0,
            items: 0,
            frame,
        });
        current.file.write_at(0, &head.write().0).map_err(failed)?;
        Ok(FRAMES_AT)
    }

    pub(super) fn add(&mut self, place: &Place, effects: &[u8], items: u64) -> Result<u64, String> {
        if effects.is_empty() {
            return Ok(self.current.as_ref().ok_or(NONE)?.offset);
        }
        for (body, flags) in frame::bodies(effects, frame::BODY_BYTES_MAX) {
            self.push(place, flags, body)?;
        }
        let current = self.current.as_mut().ok_or(NONE)?;
        current.items += items;
        Ok(current.offset)
    }

    fn push(&mut self, place: &Place, flags: u16, body: &[u8]) -> Result<(), String> {
        let current = self.current.as_mut().ok_or(NONE)?;
        let failed = |error| place.failed("write to the image", &path(&current.name), &error);
        let length = HEAD_BYTES + body.len();
        if self.buffer.len() < length {
            self.buffer.resize(length, 0);
        }
        let frame = Frame { flags, ..current.frame };
        place.seal.write(&frame, body, &mut self.buffer);
        let written = current.file.write_at(current.offset, &self.buffer[..length]);
        written.map_err(failed)?;
        current.frame.sequence += 1;
        current.frame.position += body.len() as u64;
        current.offset += length as u64;
        if current.offset - current.synced >= SYNC_BYTES {
            current.file.sync().map_err(failed)?;
            current.synced = current.offset;
        }
        Ok(())
    }

    pub(super) fn end(&mut self, place: &Place) -> Result<u64, String> {
        let items = self.current.as_ref().ok_or(NONE)?.items;
        self.push(place, frame::END, &items.to_le_bytes())?;
        let current = self.current.as_ref().ok_or(NONE)?;
        let synced = current.file.sync();
        synced.map_err(|error| place.failed("make safe the image", &path(&current.name), &error))?;
        let (name, bytes) = (current.name, current.offset);
        self.current = None;
        self.ended = Some((name, bytes));
        Ok(bytes)
    }

    /// The one that is under way, or waits, is not wanted any more.
    pub(super) fn give_up(&mut self, place: &Place) {
        let current = self.current.take().map(|current| current.name);
        let ended = self.ended.take().map(|(name, _)| name);
        for name in current.into_iter().chain(ended) {
            // One that stays is removed by the next start.
            let _ = place.disk.remove(&path(&name));
        }
    }

    /// The one that waits takes the place of those before it; says which shard's it is, and how long it is.
    pub(super) fn adopt(&mut self, place: &Place) -> Result<(u16, u64), String> {
        let (name, bytes) = self.ended.ok_or(NONE)?;
        let disk = &place.disk;
        let final_path = name.path();
        let failed = |error| place.failed("adopt the image", &final_path, &error);
        disk.rename(&path(&name), &final_path).map_err(failed)?;
        self.ended = None;
        disk.sync_dir("images").map_err(failed)?;
        for other in disk.list("images").map_err(failed)? {
            if let Some(older) = ImageName::parse(&other)
                && older.shard == name.shard
                && older < name
            {
                disk.remove(&older.path()).map_err(failed)?;
            }
        }
        Ok((name.shard, bytes))
    }
}
