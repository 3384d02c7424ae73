//! The files of one core: what its thread for files does with a [`Job`].
//!
//! The log is a row of segments of a fixed size. Frames are collected in a buffer of blocks and written together; the last block is
//! rarely full, so it is kept and written once more with what follows. A segment that is left behind is made safe before anything
//! goes to the next one, so only the last segment can end in something torn. The [`Writer`] of the segment can be lent to somebody
//! who has another way to write to it.
//!
//! A write or a sync of the log that failed is not tried again: what the file system then says about the same bytes is worth nothing.
//! The log takes nothing more, and the next start finds what was safe.

mod image;
mod segments;
mod writer;

use crate::disk::Disk;
use crate::frame::{Seal, SegmentName};
use crate::wal::{Done, Job};
use image::Images;
use segments::Segments;
use std::sync::Arc;

pub(crate) use segments::create_segment;
pub use writer::{Write, Writer};

/// What is called when an image of this shard has taken its place.
pub type Adopted = Box<dyn FnMut(u16) -> Result<(), String> + Send>;

/// What a keeper needs to know.
#[derive(Clone)]
pub(crate) struct Place {
    pub(crate) disk: Arc<dyn Disk>,
    /// The name of the folder, for messages.
    pub(crate) name: Arc<str>,
    pub(crate) seal: Seal,
    pub(crate) directory: u64,
    pub(crate) generation: u32,
    pub(crate) core: u16,
}

impl Place {
    /// What went wrong with a file, for people.
    fn failed(&self, what: &str, path: &str, error: &std::io::Error) -> String {
        let remedy = match error.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
                "; make room on this file system, then start the server again"
            }
            _ => "",
        };
        format!("cannot {what} {}/{path}: {error}{remedy}", self.name)
    }
}

fn name(place: &Place, number: u64) -> SegmentName {
    SegmentName {
        generation: place.generation,
        core: place.core,
        number,
    }
}

/// See the module's text.
pub struct Keeper {
    place: Place,
    segments: Segments,
    /// Nothing while it is lent.
    writer: Option<Box<Writer>>,
    images: Images,
    adopted: Adopted,
}

impl std::fmt::Debug for Keeper {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Place { generation, core, .. } = self.place;
        write!(f, "Keeper of core {core} in generation {generation}")
    }
}

impl Keeper {
    /// The keeper of a generation that begins: its first segment is there.
    pub(crate) fn new(place: Place, first: crate::frame::SegmentHead, adopted: Adopted) -> Result<Self, String> {
        Ok(Self {
            segments: Segments::new(&place, &first)?,
            writer: Some(Box::new(Writer::new(place.clone(), first)?)),
            images: Images::default(),
            adopted,
            place,
        })
    }

    /// Does it, and says what came of it.
    pub fn run(&mut self, job: Job) -> Done {
        match job {
            Job::Log { chunks, sync, ends } => self.run_log(chunks, sync, ends),
            other => match self.run_image(other) {
                Ok(done) => done,
                Err(why) => {
                    self.images.give_up(&self.place);
                    Done::Failed { log: false, why }
                }
            },
        }
    }

    fn run_log(&mut self, chunks: Vec<crate::wal::Chunk>, sync: bool, ends: bool) -> Done {
        let written = match &mut self.writer {
            None => Err("the log is written elsewhere".to_owned()),
            Some(writer) => {
                let written = writer.append(&mut self.segments, &chunks, sync, ends);
                if writer.needs_next() {
                    self.segments.need_next();
                }
                written
            }
        };
        match written {
            Ok(()) => Done::Logged {
                buffers: chunks.into_iter().map(|chunk| chunk.effects).collect(),
                synced: sync,
            },
            Err(why) => Done::Failed { log: true, why },
        }
    }

    fn run_image(&mut self, job: Job) -> Result<Done, String> {
        let has_failed = self.has_failed();
        let (place, images) = (&self.place, &mut self.images);
        let (buffer, bytes) = match job {
            Job::Log { .. } => (vec![], 0),
            Job::BeginImage {
                shard,
                position,
                epoch,
                time,
            } => (vec![], images.begin(place, shard, position, epoch, time)?),
            Job::Image { mut effects, items } => {
                let bytes = images.add(place, &effects, items)?;
                effects.clear();
                (effects, bytes)
            }
            Job::EndImage => (vec![], images.end(place)?),
            Job::DropImage => {
                images.give_up(place);
                (vec![], 0)
            }
            Job::AdoptImage { log_needed_from } => {
                let (shard, bytes) = images.adopt(place)?;
                (self.adopted)(shard)?;
                if !has_failed {
                    self.segments.forget_before(place, log_needed_from)?;
                }
                (vec![], bytes)
            }
        };
        Ok(Done::Image { buffer, bytes })
    }

    /// Prepares what will be needed, a piece of it; false when there is nothing left to prepare.
    pub fn idle(&mut self) -> bool {
        !self.has_failed() && self.segments.prepare_spare(&self.place)
    }

    /// The log takes nothing more, as far as that is known here.
    fn has_failed(&self) -> bool {
        self.writer.as_ref().is_some_and(|writer| writer.failed().is_some())
    }

    /// Lends the writer. A job of the log needs it back: [`Keeper::give_back`].
    pub fn lend(&mut self) -> Option<Box<Writer>> {
        self.writer.take()
    }

    /// Takes back what was lent.
    pub fn give_back(&mut self, writer: Box<Writer>) {
        self.writer = Some(writer);
    }

    /// Who has the writer says that the next segment will be needed soon: [`Writer::needs_next`].
    pub fn need_next(&mut self) {
        self.segments.need_next();
    }
}

#[cfg(test)]
mod tests;
