//! A disk in memory that forgets what was not made safe, as a crash would have it, and that fails when it is told to.
//!
//! What a crash may leave:
//!
//! - Of each sector of a file any state that it had since the file was last synced, in one piece: what was written later may
//!   be there without what was written earlier, of one write or of several.
//! - Any length that the file had since then, or one on the way from one to the next. What is beyond it is gone, and what is
//!   within it without having been written reads as zeros. A file that was emptied is as it was before, or was emptied.
//! - Of the names of each folder those after some number of the operations since it was last synced: a journal keeps their
//!   order. A name says nothing about the bytes of its file.
//!
//! Which of these it is, chance says, for all files of a disk in one manner: nothing was kept, everything, all up to a
//! moment, or each sector by itself.

use super::random::Random;
use memkv::disk::{BLOCK_BYTES, Disk, File};
use std::collections::BTreeMap;
use std::io::{Error, ErrorKind, Result};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

/// What a disk writes whole or not at all.
pub const SECTOR_BYTES: usize = 512;

type Sector = [u8; SECTOR_BYTES];

/// When a disk fails. Calls of a kind are counted from 0, from the moment at which the plan is made.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// These reads fail.
    pub reads: Range<u64>,
    /// These writes fail, and have written none, some or all of their sectors.
    pub writes: Range<u64>,
    /// These syncs of files fail. Each sector that they should have made safe is safe or never will be, although it can be
    /// read and a later sync succeeds: the system takes a page for clean when it could not write it.
    pub syncs: Range<u64>,
    /// These syncs of folders fail, and make nothing safe.
    pub dir_syncs: Range<u64>,
    /// Files may grow by so many bytes, all together, until the disk is full. What is removed makes room.
    pub room_bytes: Option<u64>,
    /// After so many changes everything fails and nothing changes: the machine has stopped.
    pub stops_after: Option<u64>,
    /// In a hundred reads, so many return fewer bytes than there are.
    pub short_reads_percent: usize,
}

/// How often what was planned has happened, and what else was done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    pub reads: u64,
    pub writes: u64,
    pub syncs: u64,
    pub dir_syncs: u64,
    /// All that changes anything: what [`Plan::stops_after`] counts.
    pub changes: u64,
    /// Calls that failed because they were to.
    pub failures: u64,
    /// Of these, those that found the disk full.
    pub full: u64,
}

/// Bytes of a file since it was last synced, or emptied.
#[derive(Clone, Debug, Default)]
struct Layer {
    /// Those that are safe.
    safe: Vec<u8>,
    /// By sector: what was in it after each write, with the number of the change.
    sectors: BTreeMap<usize, Vec<(u64, Box<Sector>)>>,
    /// Its lengths, likewise.
    lengths: Vec<(u64, usize)>,
}

/// The bytes of a file.
#[derive(Clone, Debug, Default)]
struct Content {
    /// What a reader sees.
    cached: Vec<u8>,
    before: Layer,
    /// One for each time that it was emptied since the last sync, with the number of the change.
    emptied: Vec<(u64, Layer)>,
}

#[derive(Clone, Debug)]
enum NameChange {
    Create(String, u64),
    Rename(String, String),
    Remove(String),
}

#[derive(Clone, Debug, Default)]
struct Folder {
    names: BTreeMap<String, u64>,
    safe: BTreeMap<String, u64>,
    changes: Vec<(u64, NameChange)>,
}

#[derive(Debug)]
struct Inner {
    folders: BTreeMap<String, Folder>,
    contents: BTreeMap<u64, Content>,
    next_file: u64,
    plan: Plan,
    tally: Tally,
    stopped: bool,
    random: Random,
}

/// See the module's text. Clones are the same disk.
#[derive(Clone, Debug)]
pub struct SimDisk(Arc<Mutex<Inner>>);

/// What is left of what was not safe.
#[derive(Clone, Copy, Debug)]
enum Left {
    Nothing,
    All,
    /// What was changed before this one; and of this one, each sector by chance.
    Until(u64),
    /// So much in a hundred, in any order.
    Some(usize),
}

impl Left {
    fn any(random: &mut Random, changes: u64) -> Self {
        match random.below(10) {
            0 => Left::Nothing,
            1 => Left::All,
            2..6 => Left::Until(random.below(changes as usize + 1) as u64 + 1),
            _ => Left::Some(random.pick(&[10, 50, 90])),
        }
    }

    /// How many of some changes of one thing took place, given their numbers.
    fn count(self, random: &mut Random, numbers: impl Iterator<Item = u64>) -> usize {
        let numbers: Vec<u64> = numbers.collect();
        match self {
            Left::Nothing => 0,
            Left::All => numbers.len(),
            Left::Until(last) => {
                let before = numbers.iter().filter(|number| **number < last).count();
                let torn = numbers.contains(&last) && random.chance(50);
                before + usize::from(torn)
            }
            Left::Some(percent) if random.chance(percent) && random.chance(50) => numbers.len(),
            Left::Some(percent) if random.chance(percent) => random.below(numbers.len() + 1),
            Left::Some(_) => 0,
        }
    }
}

impl Layer {
    /// What a crash leaves of it.
    fn found(&self, left: Left, random: &mut Random) -> Vec<u8> {
        let mut lengths = vec![self.safe.len()];
        lengths.extend(self.lengths.iter().map(|(_, length)| *length));
        let kept = left.count(random, self.lengths.iter().map(|(number, _)| *number));
        let mut length = lengths[kept];
        if let (Left::Some(_) | Left::Until(_), Some(next)) = (left, lengths.get(kept + 1))
            && *next > length
            && random.chance(50)
        {
            // It was growing.
            let sectors = (next - length) / SECTOR_BYTES;
            length += random.below(sectors + 1) * SECTOR_BYTES;
        }
        let mut found = self.safe.clone();
        found.resize(lengths.into_iter().max().unwrap_or(0), 0);
        for (at, versions) in &self.sectors {
            let kept = left.count(random, versions.iter().map(|(number, _)| *number));
            if let Some((_, sector)) = kept.checked_sub(1).map(|last| &versions[last]) {
                put_sector(&mut found, *at, sector);
            }
        }
        found.truncate(length);
        found
    }
}

/// Puts in as much of a sector as there is room for.
fn put_sector(bytes: &mut [u8], at: usize, sector: &Sector) {
    let start = at * SECTOR_BYTES;
    let end = bytes.len().min(start + SECTOR_BYTES);
    if start < end {
        bytes[start..end].copy_from_slice(&sector[..end - start]);
    }
}

impl Content {
    /// The layer that is written to.
    fn layer(&mut self) -> &mut Layer {
        self.emptied.last_mut().map_or(&mut self.before, |(_, layer)| layer)
    }

    fn set_length(&mut self, length: usize, number: u64) {
        self.cached.resize(length, 0);
        let layer = self.layer();
        let known = layer.lengths.last().map_or(layer.safe.len(), |(_, length)| *length);
        if known != length {
            layer.lengths.push((number, length));
        }
    }

    fn write(&mut self, offset: usize, bytes: &[u8], number: u64) {
        if bytes.is_empty() {
            return;
        }
        let end = offset + bytes.len();
        self.set_length(self.cached.len().max(end), number);
        self.cached[offset..end].copy_from_slice(bytes);
        for at in offset / SECTOR_BYTES..end.div_ceil(SECTOR_BYTES) {
            let mut sector = Box::new([0; SECTOR_BYTES]);
            let whole = at * SECTOR_BYTES..self.cached.len().min((at + 1) * SECTOR_BYTES);
            sector[..whole.len()].copy_from_slice(&self.cached[whole]);
            self.layer().sectors.entry(at).or_default().push((number, sector));
        }
    }

    fn empty(&mut self, number: u64) {
        self.cached.clear();
        self.emptied.push((number, Layer::default()));
    }

    fn sync(&mut self) {
        let mut layer = self
            .emptied
            .pop()
            .map_or(std::mem::take(&mut self.before), |last| last.1);
        layer.safe = layer.found(Left::All, &mut Random::new(0));
        self.before = Layer {
            safe: layer.safe,
            ..Layer::default()
        };
        self.emptied.clear();
    }

    /// What a crash leaves.
    fn found(&self, left: Left, random: &mut Random) -> Vec<u8> {
        let layers = left.count(random, self.emptied.iter().map(|(number, _)| *number));
        let layer = layers.checked_sub(1).map_or(&self.before, |last| &self.emptied[last].1);
        layer.found(left, random)
    }

    /// Nothing of what is not safe will ever be, or it is now.
    fn fail_to_sync(&mut self, left: Left, random: &mut Random) {
        let safe = self.found(left, random);
        self.before = Layer {
            safe,
            ..Layer::default()
        };
        self.emptied.clear();
    }

    fn safe(bytes: Vec<u8>) -> Self {
        Self {
            cached: bytes.clone(),
            before: Layer {
                safe: bytes,
                ..Layer::default()
            },
            emptied: vec![],
        }
    }
}

impl NameChange {
    fn apply(&self, names: &mut BTreeMap<String, u64>) {
        match self {
            NameChange::Create(name, file) => {
                names.insert(name.clone(), *file);
            }
            NameChange::Rename(from, to) => {
                let file = names.remove(from).expect("it was there, and earlier changes are");
                names.insert(to.clone(), file);
            }
            NameChange::Remove(name) => {
                names.remove(name);
            }
        }
    }
}

fn not_found(path: &str) -> Error {
    Error::new(ErrorKind::NotFound, format!("{path}: there is no such file"))
}

fn invalid(why: &str) -> Error {
    Error::new(ErrorKind::InvalidInput, why)
}

/// What Linux says: `EIO`.
fn failure() -> Error {
    Error::from_raw_os_error(5)
}

/// A path's folder and name.
fn split(path: &str) -> (&str, &str) {
    path.rsplit_once('/').unwrap_or(("", path))
}

impl Inner {
    fn new(random: Random) -> Self {
        Self {
            folders: BTreeMap::from([(String::new(), Folder::default())]),
            contents: BTreeMap::new(),
            next_file: 0,
            plan: Plan::default(),
            tally: Tally::default(),
            stopped: false,
            random,
        }
    }

    /// Anything at all is asked for.
    fn begin(&self) -> Result<()> {
        match self.stopped {
            true => Err(Error::other("the machine has stopped")),
            false => Ok(()),
        }
    }

    /// Something is to change: the number of the change.
    fn begin_change(&mut self) -> Result<u64> {
        if self.plan.stops_after.is_some_and(|after| self.tally.changes >= after) {
            self.stopped = true;
        }
        self.begin()?;
        self.tally.changes += 1;
        Ok(self.tally.changes)
    }

    fn fail(&mut self) -> Error {
        self.tally.failures += 1;
        failure()
    }

    fn folder(&mut self, folder: &str) -> Result<&mut Folder> {
        self.folders.get_mut(folder).ok_or_else(|| not_found(folder))
    }

    fn file_of(&mut self, path: &str) -> Result<u64> {
        let (folder, name) = split(path);
        self.folder(folder)?
            .names
            .get(name)
            .copied()
            .ok_or_else(|| not_found(path))
    }

    fn content(&mut self, file: u64) -> &mut Content {
        self.contents.entry(file).or_default()
    }

    fn change_names(&mut self, folder: &str, number: u64, change: NameChange) -> Result<()> {
        let folder = self.folder(folder)?;
        change.apply(&mut folder.names);
        folder.changes.push((number, change));
        Ok(())
    }

    /// The length that a file can grow to.
    fn length_max(&mut self, file: u64) -> usize {
        let length = self.content(file).cached.len();
        let room = self.plan.room_bytes.unwrap_or(u64::MAX);
        length.saturating_add(room as usize)
    }

    /// A file is going to be so long, if it is not longer, for which there is room.
    fn take_room(&mut self, file: u64, length: usize) {
        let growth = length.saturating_sub(self.content(file).cached.len());
        if let Some(room) = &mut self.plan.room_bytes {
            *room -= growth as u64;
        }
    }

    fn full(&mut self) -> Error {
        self.tally.failures += 1;
        self.tally.full += 1;
        ErrorKind::StorageFull.into()
    }

    fn give_back(&mut self, bytes: usize) {
        if let Some(room) = &mut self.plan.room_bytes {
            *room += bytes as u64;
        }
    }

    fn crash(&mut self) -> Inner {
        let mut found = Inner::new(self.random.fork());
        let mut random = self.random.fork();
        let left = Left::any(&mut random, self.tally.changes);
        for (name, folder) in &self.folders {
            let kept = left.count(&mut random, folder.changes.iter().map(|(number, _)| *number));
            let mut names = folder.safe.clone();
            folder.changes[..kept]
                .iter()
                .for_each(|(_, change)| change.apply(&mut names));
            for file in names.values() {
                let content = self.contents.get(file).map(|content| content.found(left, &mut random));
                found.contents.insert(*file, Content::safe(content.unwrap_or_default()));
            }
            let folder = Folder {
                safe: names.clone(),
                names,
                changes: vec![],
            };
            found.folders.insert(name.clone(), folder);
        }
        found.next_file = self.next_file;
        self.stopped = true;
        found
    }
}

impl SimDisk {
    /// An empty one. `random` decides what its crashes leave.
    pub fn new(random: Random) -> Self {
        Self(Arc::new(Mutex::new(Inner::new(random))))
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().expect("nobody panics while holding it")
    }

    /// From now on it fails so, and counts anew.
    pub fn set_plan(&self, plan: Plan) {
        let mut inner = self.inner();
        inner.plan = plan;
        // Numbers of changes must go on while some are not safe.
        let changes = inner.tally.changes;
        if let Some(after) = &mut inner.plan.stops_after {
            *after += changes;
        }
        inner.tally = Tally {
            changes,
            ..Tally::default()
        };
    }

    pub fn tally(&self) -> Tally {
        self.inner().tally
    }

    /// It has stopped as was planned, or crashed.
    pub fn has_stopped(&self) -> bool {
        self.inner().stopped
    }

    /// The machine stops. What may be found on the disk when it is there again, in good order and without a plan.
    pub fn crash(&self) -> SimDisk {
        let found = self.inner().crash();
        Self(Arc::new(Mutex::new(found)))
    }

    /// The program ends, and the machine goes on: what was written is there. Its files can no longer be used.
    pub fn leave(&self) -> SimDisk {
        let mut inner = self.inner();
        let random = inner.random.fork();
        let left = Inner {
            folders: inner.folders.clone(),
            contents: inner.contents.clone(),
            next_file: inner.next_file,
            plan: Plan::default(),
            tally: Tally {
                changes: inner.tally.changes,
                ..Tally::default()
            },
            stopped: false,
            random,
        };
        inner.stopped = true;
        Self(Arc::new(Mutex::new(left)))
    }

    /// What a reader sees in a file.
    pub fn bytes(&self, path: &str) -> Option<Vec<u8>> {
        let mut inner = self.inner();
        let file = inner.file_of(path).ok()?;
        Some(inner.content(file).cached.clone())
    }

    /// A file goes bad: these bytes are in it from `offset` on, for readers now and after every crash.
    pub fn damage(&self, path: &str, offset: usize, bytes: &[u8]) {
        let mut inner = self.inner();
        let file = inner.file_of(path).expect("a file to be damaged");
        let content = inner.content(file);
        content.sync();
        let mut damaged = content.cached.clone();
        damaged[offset..offset + bytes.len()].copy_from_slice(bytes);
        *content = Content::safe(damaged);
    }
}

/// What an open file is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Use {
    Reading,
    Writing,
    Blocks,
}

#[derive(Debug)]
struct SimFile {
    disk: SimDisk,
    file: u64,
    used_for: Use,
}

impl SimFile {
    fn boxed(disk: &SimDisk, file: u64, used_for: Use) -> Box<dyn File> {
        let disk = disk.clone();
        Box::new(Self { disk, file, used_for })
    }

    fn may_write(&self) -> Result<()> {
        match self.used_for {
            Use::Reading => Err(Error::new(ErrorKind::PermissionDenied, "it was opened for reading")),
            _ => Ok(()),
        }
    }
}

impl Disk for SimDisk {
    fn list(&self, folder: &str) -> Result<Vec<String>> {
        let inner = self.inner();
        inner.begin()?;
        let names = inner.folders.get(folder).map(|folder| folder.names.keys().cloned());
        Ok(names.map_or(vec![], Iterator::collect))
    }

    fn make_folder(&self, folder: &str) -> Result<()> {
        let mut inner = self.inner();
        inner.begin_change()?;
        inner.folders.entry(folder.to_owned()).or_default();
        Ok(())
    }

    fn open(&self, path: &str) -> Result<Box<dyn File>> {
        let mut inner = self.inner();
        inner.begin()?;
        let file = inner.file_of(path)?;
        Ok(SimFile::boxed(self, file, Use::Reading))
    }

    fn create(&self, path: &str) -> Result<Box<dyn File>> {
        let mut inner = self.inner();
        let number = inner.begin_change()?;
        let (folder, name) = split(path);
        if name.is_empty() {
            return Err(invalid("a file must have a name"));
        }
        let file = match inner.file_of(path) {
            Ok(file) => {
                let bytes = inner.content(file).cached.len();
                inner.give_back(bytes);
                inner.content(file).empty(number);
                file
            }
            Err(_) => {
                let file = inner.next_file;
                inner.change_names(folder, number, NameChange::Create(name.to_owned(), file))?;
                inner.next_file += 1;
                file
            }
        };
        Ok(SimFile::boxed(self, file, Use::Writing))
    }

    fn open_blocks(&self, path: &str) -> Result<Box<dyn File>> {
        let mut inner = self.inner();
        inner.begin()?;
        let file = inner.file_of(path)?;
        Ok(SimFile::boxed(self, file, Use::Blocks))
    }

    fn rename(&self, from: &str, to: &str) -> Result<()> {
        let mut inner = self.inner();
        let number = inner.begin_change()?;
        inner.file_of(from)?;
        let ((folder, name), (other, new_name)) = (split(from), split(to));
        if folder != other {
            // Which of two journals has it would be one more thing to simulate.
            return Err(invalid("a simulated disk renames within a folder"));
        }
        if name == new_name {
            return Ok(());
        }
        if let Ok(replaced) = inner.file_of(to) {
            let bytes = inner.content(replaced).cached.len();
            inner.give_back(bytes);
        }
        inner.change_names(folder, number, NameChange::Rename(name.to_owned(), new_name.to_owned()))
    }

    fn remove(&self, path: &str) -> Result<()> {
        let mut inner = self.inner();
        let number = inner.begin_change()?;
        let file = inner.file_of(path)?;
        let bytes = inner.content(file).cached.len();
        inner.give_back(bytes);
        let (folder, name) = split(path);
        inner.change_names(folder, number, NameChange::Remove(name.to_owned()))
    }

    fn sync_dir(&self, folder: &str) -> Result<()> {
        let mut inner = self.inner();
        inner.begin_change()?;
        let at = inner.tally.dir_syncs;
        inner.tally.dir_syncs += 1;
        if inner.plan.dir_syncs.contains(&at) {
            return Err(inner.fail());
        }
        let folder = inner.folder(folder)?;
        folder.safe = folder.names.clone();
        folder.changes.clear();
        Ok(())
    }
}

impl File for SimFile {
    fn len(&self) -> Result<u64> {
        let mut inner = self.disk.inner();
        inner.begin()?;
        Ok(inner.content(self.file).cached.len() as u64)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<usize> {
        let mut inner = self.disk.inner();
        inner.begin()?;
        let at = inner.tally.reads;
        inner.tally.reads += 1;
        if inner.plan.reads.contains(&at) {
            return Err(inner.fail());
        }
        let short_percent = inner.plan.short_reads_percent;
        let is_short = inner.random.chance(short_percent);
        let there = inner.content(self.file).cached.len().saturating_sub(offset as usize);
        let mut count = there.min(buffer.len());
        if is_short && count > 1 {
            count = inner.random.between(1, count);
        }
        let offset = offset as usize;
        if count > 0 {
            buffer[..count].copy_from_slice(&inner.content(self.file).cached[offset..offset + count]);
        }
        Ok(count)
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.may_write()?;
        let mut inner = self.disk.inner();
        let number = inner.begin_change()?;
        let aligned = |number: usize| number.is_multiple_of(BLOCK_BYTES);
        if self.used_for == Use::Blocks
            && !(aligned(offset as usize) && aligned(bytes.len()) && aligned(bytes.as_ptr() as usize))
        {
            return Err(invalid("blocks must be aligned"));
        }
        let at = inner.tally.writes;
        inner.tally.writes += 1;
        let offset = offset as usize;
        let mut written = bytes.len();
        let mut failed = Ok(());
        if inner.plan.writes.contains(&at) {
            let sectors = bytes.len().div_ceil(SECTOR_BYTES);
            written = (inner.random.below(sectors + 1) * SECTOR_BYTES).min(bytes.len());
            failed = Err(inner.fail());
        }
        let length_max = inner.length_max(self.file);
        if offset + written > length_max {
            written = length_max.saturating_sub(offset);
            written -= written % SECTOR_BYTES;
            failed = Err(inner.full());
        }
        if written > 0 {
            inner.take_room(self.file, offset + written);
        }
        inner.content(self.file).write(offset, &bytes[..written], number);
        failed
    }

    fn allocate(&self, bytes: u64) -> Result<()> {
        self.may_write()?;
        let mut inner = self.disk.inner();
        let number = inner.begin_change()?;
        let length = inner.content(self.file).cached.len().max(bytes as usize);
        if length > inner.length_max(self.file) {
            return Err(inner.full());
        }
        inner.take_room(self.file, length);
        inner.content(self.file).set_length(length, number);
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        let mut inner = self.disk.inner();
        inner.begin_change()?;
        let at = inner.tally.syncs;
        inner.tally.syncs += 1;
        if inner.plan.syncs.contains(&at) {
            let mut random = inner.random.fork();
            let left = Left::any(&mut random, inner.tally.changes);
            inner.content(self.file).fail_to_sync(left, &mut random);
            return Err(inner.fail());
        }
        inner.content(self.file).sync();
        Ok(())
    }
}

#[cfg(test)]
mod tests;
