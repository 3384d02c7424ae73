//! The files of one core: what its thread for files does with a [`Job`].
//!
//! The log is a row of segments of a fixed size. Frames are collected in a buffer of blocks and written together; the last block is
//! rarely full, so it is kept and written once more with what follows. A segment that is left behind is made safe before anything
//! goes to the next one, so only the last segment can end in something torn.
//!
//! A write or a sync of the log that failed is not tried again: what the file system then says about the same bytes is worth nothing.
//! The log takes nothing more, and the next start finds what was safe.

mod image;
mod segment;

use crate::disk::Disk;
use crate::frame::Seal;
use crate::wal::{Done, Job};
use image::Images;
use segment::Log;
use std::sync::Arc;

pub(crate) use segment::create_segment;

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

/// See the module's text.
pub struct Keeper {
    place: Place,
    log: Log,
    images: Images,
    /// Why the log takes nothing more.
    log_failed: Option<String>,
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
            log: Log::new(&place, first)?,
            images: Images::default(),
            log_failed: None,
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
        let failed = match &self.log_failed {
            Some(why) => Err(why.clone()),
            None => self.log.append(&self.place, &chunks, sync, ends),
        };
        match failed {
            Ok(()) => Done::Logged {
                buffers: chunks
                    .into_iter()
                    .map(|chunk| {
                        let mut buffer = chunk.effects;
                        buffer.clear();
                        buffer
                    })
                    .collect(),
                synced: sync,
            },
            Err(why) => {
                self.log_failed = Some(why.clone());
                Done::Failed { log: true, why }
            }
        }
    }

    fn run_image(&mut self, job: Job) -> Result<Done, String> {
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
                if self.log_failed.is_none() {
                    self.log.forget_before(place, log_needed_from)?;
                }
                (vec![], bytes)
            }
        };
        Ok(Done::Image { buffer, bytes })
    }

    /// Prepares what will be needed, a piece of it; false when there is nothing left to prepare.
    pub fn idle(&mut self) -> bool {
        self.log_failed.is_none() && self.log.prepare_spare(&self.place)
    }
}

#[cfg(test)]
mod tests;
