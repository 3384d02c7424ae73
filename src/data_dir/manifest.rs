//! The manifest: what does not change in the life of a data directory, and which generations are still needed.

use super::{Names, Problem, SHARDS, Wanted};
use crate::config::PartitionerChoice;
use crate::disk::Disk;
use crate::model::{CoreId, ShardId};
use crate::partition::RangeTable;
use crate::wal::Durability;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

pub(super) const PATH: &str = "MANIFEST";
const NEW_PATH: &str = "MANIFEST.new";

/// The version of the format that is written, and the newest that is read.
const VERSION: u16 = 1;

/// A manifest is not longer than this, whatever the file says.
const BYTES_MAX: usize = 64 << 20;

/// What the first lines of a manifest tell people.
const INTRODUCTION: &str =
    "# The manifest of a data directory of memkv-tpc. The last line is a checksum: do not edit.\n";
const SUM: &str = "# crc32c ";

/// A number that may be too large for the integers of the file's language, so it is written as text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Number(pub(super) u64);

impl Serialize for Number {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for Number {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map(Self).map_err(serde::de::Error::custom)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Manifest {
    /// The version of the format.
    pub(super) format: u16,
    /// The number of the directory: in every file's header, and in every checksum.
    pub(super) directory: Number,
    /// The generation that was begun last; 0 when none was.
    pub(super) present: u32,
    pub(super) layout: Layout,
    /// Those that are still needed, the oldest first.
    #[serde(default, rename = "generation")]
    pub(super) generations: Vec<Generation>,
}

/// Where keys belong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Layout {
    pub(super) token_seed: Number,
    pub(super) partitioner: String,
    pub(super) shards: u16,
    pub(super) boundaries: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Generation {
    pub(super) number: u32,
    pub(super) durability: String,
    /// For each core its first shard and how many it had.
    pub(super) runs: Vec<(u16, u16)>,
    /// How it ended; nothing as long as it is the last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) resolution: Option<Resolution>,
}

/// What counts of a generation.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Resolution {
    /// The last epoch that all cores had whole; nothing when all have all of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) closed: Option<Number>,
    /// For each core, before which sequence and which position its log counts.
    pub(super) ends: Vec<(Number, Number)>,
    /// Parts that do not count, by the coordinator's core and clock.
    pub(super) dropped: Vec<(u16, Number)>,
}

pub(super) fn durability_byte(durability: Durability) -> u8 {
    match durability {
        Durability::None => 0,
        Durability::Interval => 1,
        Durability::Always => 2,
    }
}

fn durability_name(durability: Durability) -> &'static str {
    match durability {
        Durability::None => "none",
        Durability::Interval => "interval",
        Durability::Always => "always",
    }
}

impl Generation {
    pub(super) fn begin(number: u32, table: &RangeTable, durability: Durability) -> Self {
        let mut runs = vec![(0, 0); usize::from(table.cores())];
        for shard in (0..table.shards()).rev().map(ShardId) {
            let CoreId(core) = table.core_of(shard);
            let (first, count) = &mut runs[usize::from(core)];
            *first = shard.0;
            *count += 1;
        }
        Self {
            number,
            durability: durability_name(durability).to_owned(),
            runs,
            resolution: None,
        }
    }

    pub(super) fn is_always(&self) -> bool {
        self.durability == durability_name(Durability::Always)
    }

    /// The core that had a shard.
    pub(super) fn core_of(&self, shard: u16) -> Option<u16> {
        let has = |(first, count): &(u16, u16)| shard >= *first && shard - first < *count;
        self.runs.iter().position(has).map(|core| core as u16)
    }
}

fn choice(name: &str) -> Option<PartitionerChoice> {
    match name {
        "hashed" => Some(PartitionerChoice::Hashed),
        "ordered" => Some(PartitionerChoice::Ordered),
        _ => None,
    }
}

fn choice_name(choice: PartitionerChoice) -> &'static str {
    match choice {
        PartitionerChoice::Hashed => "hashed",
        PartitionerChoice::Ordered => "ordered",
    }
}

impl Layout {
    fn new(wanted: &Wanted) -> Self {
        let partitioner = wanted.partitioner.unwrap_or(PartitionerChoice::Hashed);
        let shards = match partitioner {
            PartitionerChoice::Hashed => SHARDS,
            // As many as the boundaries make.
            PartitionerChoice::Ordered => wanted.boundaries.len() as u16 + 1,
        };
        Self {
            token_seed: Number(wanted.seed.unwrap_or(wanted.random[0])),
            partitioner: choice_name(partitioner).to_owned(),
            shards: wanted.shards.unwrap_or(shards),
            boundaries: wanted.boundaries.clone(),
        }
    }

    /// What the options say is what the directory has.
    pub(super) fn check(&self, wanted: &Wanted, names: &Names) -> Result<(), Problem> {
        let differs = |option: &str, here: &dyn std::fmt::Display, asked: &dyn std::fmt::Display| {
            let cause = format!("this data was written with {option} {here}, and {option} {asked} is asked for");
            let remedy = format!("leave {option} out, or use another directory");
            Err(names.problem(PATH, None, cause, &remedy))
        };
        if let Some(shards) = wanted.shards
            && shards != self.shards
        {
            return differs("--shards", &self.shards, &shards);
        }
        if let Some(seed) = wanted.seed
            && seed != self.token_seed.0
        {
            return differs("--token-seed", &self.token_seed.0, &seed);
        }
        if let Some(asked) = wanted.partitioner
            && choice_name(asked) != self.partitioner
        {
            return differs("--partitioner", &self.partitioner, &choice_name(asked));
        }
        if !wanted.boundaries.is_empty() && wanted.boundaries != self.boundaries {
            let (here, asked) = (self.boundaries.join(","), wanted.boundaries.join(","));
            return differs("--boundaries", &here, &asked);
        }
        self.table(1, names).map(|_| ())
    }

    pub(super) fn table(&self, cores: u16, names: &Names) -> Result<RangeTable, Problem> {
        let seed = self.token_seed.0;
        let problem = |cause: String| names.problem(PATH, None, cause, "");
        if self.shards == 0 {
            return Err(problem("there are no shards".to_owned()));
        }
        match choice(&self.partitioner) {
            Some(PartitionerChoice::Hashed) => Ok(RangeTable::even(seed, self.shards, cores)),
            Some(PartitionerChoice::Ordered) => {
                let boundaries: Vec<Vec<u8>> = self.boundaries.iter().map(|key| key.clone().into_bytes()).collect();
                let table = RangeTable::ordered(seed, &boundaries, self.shards, cores);
                table.map_err(|error| problem(error.to_string()))
            }
            None => Err(problem(format!("there is no partitioner '{}'", self.partitioner))),
        }
    }
}

impl Manifest {
    pub(super) fn new(wanted: &Wanted) -> Self {
        Self {
            format: VERSION,
            directory: Number(wanted.random[1]),
            present: 0,
            layout: Layout::new(wanted),
            generations: vec![],
        }
    }

    fn text(&self) -> Result<String, toml::ser::Error> {
        let mut text = format!("{INTRODUCTION}{}", toml::to_string(self)?);
        let sum = crc32c::crc32c(text.as_bytes());
        text.push_str(&format!("{SUM}{sum:08x}\n"));
        Ok(text)
    }

    /// Puts it in the place of the one before, whole or not at all.
    pub(super) fn write(&self, disk: &dyn Disk, names: &Names) -> Result<(), Problem> {
        let text = self
            .text()
            .map_err(|error| names.problem(PATH, None, error.to_string(), ""))?;
        let write = || {
            let file = disk.create(NEW_PATH)?;
            file.write_at(0, text.as_bytes())?;
            file.sync()?;
            drop(file);
            disk.rename(NEW_PATH, PATH)?;
            disk.sync_dir("")
        };
        write().map_err(names.io("write", PATH))
    }
}

/// What a manifest says; why it cannot be used is for people.
pub(super) fn parse(text: &str) -> Result<Manifest, (String, &'static str)> {
    const COPY: &str = "restore the directory from a copy";
    // The version comes first: a later program may do all else in another way.
    let table: Result<toml::Table, _> = text.parse();
    let table = table.map_err(|error| (format!("it is damaged: {}", error.message()), COPY))?;
    match table.get("format").and_then(toml::Value::as_integer) {
        Some(version) if version > i64::from(VERSION) => {
            let cause = format!("the directory has format version {version}, and this program reads version {VERSION}");
            return Err((cause, "use the newer program"));
        }
        Some(version) if version == i64::from(VERSION) => {}
        _ => return Err(("it is damaged: it has no format version".to_owned(), COPY)),
    }
    let (body, sum) = text.rsplit_once(SUM).unwrap_or((text, ""));
    if sum.trim_end() != format!("{:08x}", crc32c::crc32c(body.as_bytes())) {
        let cause = "its checksum is wrong: it is damaged, or was edited";
        return Err((cause.to_owned(), COPY));
    }
    table
        .try_into()
        .map_err(|error: toml::de::Error| (format!("it is damaged: {}", error.message()), COPY))
}

/// The manifest, if there is one.
pub(super) fn read(disk: &dyn Disk, names: &Names) -> Result<Option<Manifest>, Problem> {
    let there = disk.list("").map_err(names.io("list", ""))?;
    if !there.iter().any(|name| name == PATH) {
        return Ok(None);
    }
    let bytes = disk.open(PATH).and_then(|file| file.read_front(BYTES_MAX));
    let bytes = bytes.map_err(names.io("read", PATH))?;
    let manifest = parse(&String::from_utf8_lossy(&bytes));
    let manifest = manifest.map_err(|(cause, remedy)| names.problem(PATH, None, cause, remedy))?;
    let generations = manifest.generations.iter();
    let ascending = generations.is_sorted_by(|first, second| first.number < second.number);
    let last = manifest.generations.last().map_or(0, |generation| generation.number);
    if !ascending || last != manifest.present {
        return Err(names.problem(PATH, None, "its generations make no sense", ""));
    }
    Ok(Some(manifest))
}
