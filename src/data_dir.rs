//! A data directory: what it is, what was safe in it when the last run of the server ended, and who has which of its files now.
//!
//! [`DataDir::open`] reads the manifest, finds the end of every core's log, and decides what of the last *generation* (run of the
//! server) counts. [`DataDir::begin_generation`] writes that down together with the new generation. Then each core has a
//! [`Keeper`] for its own new files, and a [`Restorer`] that reads what earlier generations left of its shards.

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzz;
mod inspect;
mod manifest;
mod recovery;
mod restore;

pub use inspect::describe;
pub use restore::{Restored, Restorer};

use crate::config::PartitionerChoice;
use crate::disk::Disk;
use crate::frame::{Seal, SegmentHead, SegmentName, spare_parts};
use crate::keeper::{self, Keeper, Place};
use crate::partition::RangeTable;
use crate::wal::Durability;
use manifest::{Generation, Layout, Manifest};
use recovery::{Past, Search};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

/// The segment's length unless somebody says otherwise: long enough that the next one is rarely needed, short enough that what is
/// not needed any more is soon used again.
pub const SEGMENT_BYTES: u64 = 32 << 20;

/// Shards of a new directory, unless somebody says otherwise: they outlive a change of the number of cores.
pub const SHARDS: u16 = 64;

/// Something about the directory that keeps the server from starting.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Which file or folder.
    pub file: String,
    /// Where in it.
    pub offset: Option<u64>,
    /// What is wrong.
    pub cause: String,
    /// What can be done.
    pub remedy: String,
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.file)?;
        if let Some(offset) = self.offset {
            write!(f, ", offset {offset}")?;
        }
        write!(f, ": {}", self.cause)?;
        if !self.remedy.is_empty() {
            write!(f, ": {}", self.remedy)?;
        }
        Ok(())
    }
}

impl std::error::Error for Problem {}

/// What is done about damage.
const SALVAGE: &str =
    "restore the directory from a copy, or start once with --recover salvage to keep what is readable";

/// The names of files, as people see them.
#[derive(Clone, Debug)]
struct Names(Arc<str>);

impl Names {
    fn problem(&self, path: &str, offset: Option<u64>, cause: impl Into<String>, remedy: &str) -> Problem {
        let file = match path {
            "" => self.0.to_string(),
            path => format!("{}/{path}", self.0),
        };
        Problem {
            file,
            offset,
            cause: cause.into(),
            remedy: remedy.to_owned(),
        }
    }

    fn damage(&self, path: &str, offset: u64, cause: impl Into<String>) -> Problem {
        self.problem(path, Some(offset), cause, SALVAGE)
    }

    fn io<'a>(&'a self, what: &'a str, path: &'a str) -> impl Fn(std::io::Error) -> Problem + 'a {
        move |error| self.problem(path, None, format!("cannot {what}: {error}"), "")
    }
}

/// What the options say about the directory.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// The name of the directory, for messages.
    pub name: String,
    /// How keys are spread, where it was said.
    pub partitioner: Option<PartitionerChoice>,
    /// The first keys of the second and all later shards; none where they were not given.
    pub boundaries: Vec<String>,
    /// How many shards there are to be, where it was said.
    pub shards: Option<u16>,
    /// The seed of the hash, where it was said.
    pub seed: Option<u64>,
    /// Two numbers that nobody can guess: the seed of a new directory, and its own number.
    pub random: [u64; 2],
    /// How long the new segments are to be.
    pub segment_bytes: u64,
    /// What is damaged is left out, with a warning.
    pub salvage: bool,
}

/// See the module's text.
pub struct DataDir {
    disk: Arc<dyn Disk>,
    names: Names,
    manifest: Arc<Mutex<Manifest>>,
    layout: Layout,
    seal: Seal,
    segment_bytes: u64,
    is_new: bool,
    past: Arc<Past>,
    warnings: Vec<String>,
    /// The heads of the new generation's first segments.
    begun: Vec<SegmentHead>,
    /// For each shard, the generation of its image; 0 for none.
    images: Arc<Mutex<Vec<u32>>>,
}

impl std::fmt::Debug for DataDir {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "DataDir {}", self.names.0)
    }
}

impl DataDir {
    /// Opens a directory, or makes an empty folder one. Nobody else may have it open.
    ///
    /// # Errors
    /// When it cannot be read or written, does not fit the options, was written by a later program, or is damaged.
    pub fn open(disk: Arc<dyn Disk>, wanted: Wanted) -> Result<Self, Problem> {
        let names = Names(wanted.name.as_str().into());
        for folder in ["log", "images"] {
            disk.make_folder(folder).map_err(names.io("make the folder", folder))?;
        }
        let found = manifest::read(&*disk, &names)?;
        let is_new = found.is_none();
        let manifest = match found {
            Some(manifest) => manifest,
            None => {
                nothing_is_there(&*disk, &names)?;
                let manifest = Manifest::new(&wanted);
                manifest.write(&*disk, &names)?;
                manifest
            }
        };
        manifest.layout.check(&wanted, &names)?;
        let mut search = Search::new(&disk, &names, &manifest, wanted.salvage);
        let past = Past::find(&mut search, &manifest)?;
        let warnings = search.warnings;
        let images = past
            .images
            .iter()
            .map(|image| image.map_or(0, |image| image.generation));
        Ok(Self {
            seal: Seal::new(manifest.directory.0),
            layout: manifest.layout.clone(),
            images: Arc::new(Mutex::new(images.collect())),
            manifest: Arc::new(Mutex::new(manifest)),
            segment_bytes: wanted.segment_bytes,
            past: Arc::new(past),
            begun: vec![],
            disk,
            names,
            is_new,
            warnings,
        })
    }

    /// It was made just now.
    pub fn is_new(&self) -> bool {
        self.is_new
    }

    /// An earlier run of the server wrote to it.
    pub fn holds_data(&self) -> bool {
        !self.past.generations.is_empty() || self.past.images.iter().any(Option::is_some)
    }

    /// What people should know about the end of the last run.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Where keys belong, with this many cores.
    ///
    /// # Errors
    /// When the manifest's boundaries make no sense.
    pub fn table(&self, cores: u16) -> Result<RangeTable, Problem> {
        self.layout.table(cores, &self.names)
    }

    /// Begins a new run, and writes down how the last one ended.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn begin_generation(&mut self, table: &RangeTable, durability: Durability) -> Result<u32, Problem> {
        let mut manifest = self.manifest.lock().unwrap_or_else(PoisonError::into_inner).clone();
        for (generation, resolution) in manifest.generations.iter_mut().zip(self.past.resolutions()) {
            generation.resolution = Some(resolution);
        }
        self.make_past_safe()?;
        let number = manifest.present + 1;
        let generation = Generation::begin(number, table, durability);
        self.remove_strays(&manifest, table.cores())?;
        self.begun.clear();
        for (core, (first_shard, shards)) in generation.runs.iter().enumerate() {
            let head = SegmentHead {
                core: core as u16,
                cores: table.cores(),
                durability: manifest::durability_byte(durability),
                directory: manifest.directory.0,
                generation: number,
                first_shard: *first_shard,
                shards: *shards,
                bytes: self.segment_bytes,
                ..SegmentHead::default()
            };
            let made = keeper::create_segment(&self.place(number, core as u16), &head, None);
            made.map_err(|why| self.names.problem("log", None, why, ""))?;
            self.begun.push(head);
        }
        manifest.present = number;
        manifest.generations.push(generation);
        manifest.write(&*self.disk, &self.names)?;
        *self.manifest.lock().unwrap_or_else(PoisonError::into_inner) = manifest;
        Ok(number)
    }

    /// Makes safe what was found and is going to be built upon. When only the process had ended, and not the machine, what it had written
    /// and not made safe was found all the same, and a crash could still take it away.
    fn make_past_safe(&self) -> Result<(), Problem> {
        for folder in ["", "log", "images"] {
            let safe = self.disk.sync_dir(folder);
            safe.map_err(self.names.io("make safe the folder", folder))?;
        }
        let unresolved = self
            .past
            .generations
            .iter()
            .filter(|old| old.described.resolution.is_none());
        // The segments before the last were made safe before it was begun.
        for last in unresolved
            .flat_map(|old| &old.logs)
            .filter_map(|log| log.segments.last())
        {
            let safe = self.disk.open(&last.path).and_then(|file| file.sync());
            safe.map_err(self.names.io("make safe", &last.path))?;
        }
        Ok(())
    }

    /// Removes what no manifest speaks of: left from a start, an image or a segment that was not finished.
    fn remove_strays(&self, manifest: &Manifest, cores: u16) -> Result<(), Problem> {
        let known = |name: &SegmentName| manifest.generations.iter().any(|known| known.number == name.generation);
        for folder in ["log", "images"] {
            let found = self.disk.list(folder).map_err(self.names.io("list", folder))?;
            for name in found {
                let stray = name.ends_with(".new")
                    || SegmentName::parse(&name).is_some_and(|name| !known(&name))
                    || spare_parts(&name).is_some_and(|(core, _)| core >= cores);
                if stray {
                    let path = format!("{folder}/{name}");
                    self.disk.remove(&path).map_err(self.names.io("remove", &path))?;
                }
            }
        }
        Ok(())
    }

    fn place(&self, generation: u32, core: u16) -> Place {
        let manifest = self.manifest.lock().unwrap_or_else(PoisonError::into_inner);
        Place {
            disk: self.disk.clone(),
            name: self.names.0.clone(),
            seal: self.seal,
            directory: manifest.directory.0,
            generation,
            core,
        }
    }

    /// The keeper of a core's files in the generation that was begun.
    ///
    /// # Errors
    /// When no generation was begun with so many cores, or a file cannot be opened.
    pub fn keeper(&self, core: u16) -> Result<Keeper, Problem> {
        let head = self.begun.get(usize::from(core)).copied();
        let head = head.ok_or_else(|| self.names.problem("", None, format!("core {core} has no log"), ""))?;
        let (disk, names) = (self.disk.clone(), self.names.clone());
        let (manifest, images) = (self.manifest.clone(), self.images.clone());
        let adopted = move |shard: u16| {
            let oldest = {
                let mut images = images.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some(of) = images.get_mut(usize::from(shard)) {
                    *of = head.generation;
                }
                images.iter().copied().min().unwrap_or(0)
            };
            let mut manifest = manifest.lock().unwrap_or_else(PoisonError::into_inner);
            let forgotten = forget(&*disk, &names, &mut manifest, oldest);
            forgotten.map_err(|problem| problem.to_string())
        };
        let keeper = Keeper::new(self.place(head.generation, core), head, Box::new(adopted));
        keeper.map_err(|why| self.names.problem("log", None, why, ""))
    }

    /// Reads what earlier generations left of these shards.
    pub fn restorer(&self, shards: Range<u16>, table: RangeTable) -> Restorer {
        Restorer::new(
            self.disk.clone(),
            self.names.clone(),
            self.seal,
            self.past.clone(),
            shards,
            table,
        )
    }
}

/// A folder without a manifest is made a data directory only if it holds nothing that looks like one.
fn nothing_is_there(disk: &dyn Disk, names: &Names) -> Result<(), Problem> {
    for folder in ["log", "images"] {
        let found = disk.list(folder).map_err(names.io("list", folder))?;
        if let Some(name) = found.first() {
            return Err(names.problem(
                "MANIFEST",
                None,
                format!("it is missing, but there is {folder}/{name}"),
                "restore the directory from a copy, or use an empty one",
            ));
        }
    }
    Ok(())
}

/// All shards have images of this generation or later ones: the logs of those before it are not needed any more.
fn forget(disk: &dyn Disk, names: &Names, manifest: &mut Manifest, oldest: u32) -> Result<(), Problem> {
    if manifest
        .generations
        .iter()
        .all(|generation| generation.number >= oldest)
    {
        return Ok(());
    }
    let mut next = manifest.clone();
    next.generations.retain(|generation| generation.number >= oldest);
    // First the manifest: files that it does not speak of are removed by the next start, if not now.
    next.write(disk, names)?;
    *manifest = next;
    for name in disk.list("log").map_err(names.io("list", "log"))? {
        if let Some(segment) = SegmentName::parse(&name)
            && segment.generation < oldest
        {
            let path = segment.path();
            disk.remove(&path).map_err(names.io("remove", &path))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
