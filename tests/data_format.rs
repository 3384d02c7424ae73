//! Data directories that earlier versions wrote can be read for ever. `tests/golden/data` has one for each thing that can be in
//! one; they are never written anew, and a new version of the format adds new ones.
//!
//! `cargo test --test data_format -- --ignored` makes those that are missing.

#![allow(clippy::unwrap_used, reason = "in a test, the assertion")]

use memkv::data_dir::{DataDir, Wanted};
use memkv::disk::Disk;
use memkv::effect::{Effect, Image, push_put};
use memkv::keeper::Keeper;
use memkv::model::{CoreId, Deadline, ShardId, UnixMillis};
use memkv::partition::RangeTable;
use memkv::runtime::{Folder, inspect};
use memkv::wal::{Done, Durability, Job, Log};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Small, so that the files are.
const SEGMENT: u64 = 16 << 10;

const NAMES: [&str; 6] = [
    "v1-log",
    "v1-image-and-log",
    "v1-torn-tail",
    "v1-two-generations",
    "v2-side-by-side",
    "v2-overtaken",
];

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden/data")
        .join(name)
}

fn open(folder: &Path) -> DataDir {
    let disk: Arc<dyn Disk> = Arc::new(Folder::take(folder).unwrap());
    let wanted = Wanted {
        name: folder.display().to_string(),
        partitioner: None,
        boundaries: vec![],
        shards: Some(4),
        seed: Some(0x5eed_5eed_5eed_5eed),
        random: [1, 0xd1_d1_d1],
        segment_bytes: SEGMENT,
        salvage: false,
    };
    DataDir::open(disk, wanted).unwrap()
}

/// As people can compare it: `key = value`, with what is not usual behind.
fn content(dir: &DataDir, cores: u16) -> String {
    let table = dir.table(cores).unwrap();
    let mut items: BTreeMap<Vec<u8>, (Vec<u8>, u32, Deadline, u8)> = BTreeMap::new();
    for core in 0..cores {
        let shards: Vec<u16> = table.shards_of(CoreId(core)).map(|shard| shard.0).collect();
        let mut restorer = dir.restorer(shards[0]..shards[shards.len() - 1] + 1, table.clone());
        let mut apply = |restored: memkv::data_dir::Restored<'_>| {
            match restored.effect {
                Effect::Put(Image {
                    key,
                    value,
                    flags,
                    deadline,
                    state,
                }) => drop(items.insert(key.to_vec(), (value.to_vec(), flags, deadline, state))),
                Effect::Delete(key) => drop(items.remove(key)),
                Effect::Amend { key, deadline, state } => {
                    let item = items.get_mut(key).unwrap();
                    (item.2, item.3) = (deadline, state);
                }
                Effect::Empty => items.retain(|key, _| table.shard_of(table.place(key).token).0 != restored.shard),
                Effect::Part(_) => panic!("a part is never handed out"),
            }
            Ok(())
        };
        while restorer.step(&mut apply).unwrap() {}
    }
    let line = |(key, (value, flags, deadline, state)): (&Vec<u8>, &(Vec<u8>, u32, Deadline, u8))| {
        let mut line = match value.len() > 100 {
            true => format!(
                "{} = {} bytes of '{}'",
                key.escape_ascii(),
                value.len(),
                value[..1].escape_ascii()
            ),
            false => format!("{} = {}", key.escape_ascii(), value.escape_ascii()),
        };
        if *flags != 0 {
            line += &format!(" flags {flags}");
        }
        if let Deadline::At(moment) = deadline {
            line += &format!(" until {}", moment.0);
        }
        if *state != 0 {
            line += &format!(" state {state}");
        }
        line + "\n"
    };
    items.iter().map(line).collect()
}

/// The folder is copied: reading one that nobody ended takes its lock.
fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        match entry.file_type().unwrap().is_dir() {
            true => copy(&entry.path(), &target),
            false => drop(std::fs::copy(entry.path(), target).unwrap()),
        }
    }
}

#[test]
fn every_version_that_was_is_read() {
    let folder = tempfile::tempdir().unwrap();
    for name in NAMES {
        let here = folder.path().join(name);
        copy(&golden(name), &here);
        let expected = std::fs::read_to_string(here.join("content.txt")).unwrap();
        assert!(!expected.is_empty());
        for cores in 1..=4 {
            assert_eq!(content(&open(&here), cores), expected, "{name}, {cores} cores");
        }
        let mut lines = vec![];
        let damages = inspect(&here, true, &mut |line| lines.push(line.to_owned())).unwrap();
        assert_eq!(damages, 0, "{name}: {lines:#?}");
        let cut = lines.iter().any(|line| line.contains("it is cut"));
        assert_eq!(cut, name == "v1-torn-tail", "{name}: {lines:#?}");
        // The transaction that one of two cores has.
        assert!(
            lines.iter().any(|line| line.contains("does not count")),
            "{name}: {lines:#?}"
        );
        // And the next run begins on it.
        let mut dir = open(&here);
        let table = dir.table(3).unwrap();
        dir.begin_generation(&table, Durability::None).unwrap();
        drop(dir);
        assert_eq!(content(&open(&here), 2), expected, "{name}, after another start");
    }
}

/// A run of the server.
struct Run {
    table: RangeTable,
    keepers: Vec<Keeper>,
    logs: Vec<Log>,
}

impl Run {
    fn begin(folder: &Path, cores: u16) -> Self {
        let mut dir = open(folder);
        let table = dir.table(cores).unwrap();
        dir.begin_generation(&table, Durability::Always).unwrap();
        Self {
            keepers: (0..cores).map(|core| dir.keeper(core).unwrap()).collect(),
            logs: (0..cores).map(|_| Log::new(1)).collect(),
            table,
        }
    }

    fn shard(&self, key: &[u8]) -> ShardId {
        self.table.shard_of(self.table.place(key).token)
    }

    fn log(&mut self, key: &[u8]) -> &mut Log {
        let core = self.table.core_of(self.shard(key));
        &mut self.logs[usize::from(core.0)]
    }

    fn put(&mut self, key: &[u8], value: &[u8]) {
        self.log(key).put(&plain(key, value));
    }

    fn write(&mut self) {
        for (keeper, log) in self.keepers.iter_mut().zip(&mut self.logs) {
            let chunks = log.take(UnixMillis(1_800_000_000_000));
            let done = keeper.run(Job::Log {
                chunks,
                sync: true,
                ends: false,
            });
            assert!(matches!(done, Done::Logged { .. }), "{done:?}");
        }
    }

    /// Writes of which each is under way when the next is begun: they share no block. The first of them may be missing.
    fn write_side_by_side(&mut self, skipped: usize) {
        for (keeper, log) in self.keepers.iter_mut().zip(&mut self.logs) {
            let mut writer = keeper.lend().unwrap();
            let mut writes = vec![];
            // The second fills a block to its last byte.
            for (name, length) in [(b"side 1", 10), (b"side 2", 4010), (b"side 3", 0)] {
                log.put(&plain(name, &vec![b's'; length]));
                let chunks = log.take(UnixMillis(1_800_000_000_002));
                let write = writer.begin(&chunks, false).unwrap();
                if writes.len() >= skipped {
                    writer.file().write_at(write.offset(), write.bytes()).unwrap();
                }
                writes.push(write);
            }
            writer.file().sync().unwrap();
            writes.into_iter().for_each(|write| writer.end(write, Ok(())).unwrap());
            keeper.give_back(writer);
        }
    }

    /// One of everything that can be in a log.
    fn fill(&mut self) {
        for number in 0..12u8 {
            self.put(format!("key {number}").as_bytes(), &[b'0' + number]);
        }
        self.write();
        let key = b"key 1";
        self.log(key).put(&Image {
            flags: 77,
            deadline: Deadline::At(UnixMillis(1_900_000_000_000)),
            state: 2,
            ..plain(key, b"\0\xff")
        });
        self.log(b"key 2").delete(b"key 2");
        self.log(b"key 3")
            .amend(b"key 3", Deadline::At(UnixMillis(1_900_000_000_001)), 1);
        self.logs.iter_mut().for_each(|log| {
            log.close_epoch(1);
            log.begin_epoch(2);
        });
        // Longer than a segment, so it is in several frames.
        self.put(b"long", &[b'l'; 14_000]);
        self.write();
    }

    /// A transaction that both cores have, and one that only the first has.
    fn parts(&mut self) {
        let key = |core: u16, run: &Self| {
            let keys = (0..100).map(|number| format!("part {number}").into_bytes());
            keys.into_iter()
                .find(|key| run.table.core_of(run.shard(key)) == CoreId(core))
                .unwrap()
        };
        for core in 0..2 {
            let key = key(core, self);
            let log = self.log(&key);
            log.begin_part(0, 11, 2, &[0, 1]);
            log.put(&plain(&key, b"both"));
            log.finish_part();
        }
        self.write();
        let key = key(0, self);
        let log = self.log(&key);
        log.begin_part(1, 12, 2, &[0, 1]);
        log.put(&plain(&key, b"one"));
        log.finish_part();
        self.write();
    }

    fn images(&mut self) {
        let items: Vec<(Vec<u8>, Vec<u8>)> = (0..40u8)
            .map(|number| (format!("image {number}").into_bytes(), vec![number]))
            .collect();
        for (key, value) in &items {
            self.put(key, value);
        }
        self.write();
        for shard in 0..4 {
            let core = usize::from(self.table.core_of(ShardId(shard)).0);
            let mut effects = vec![];
            let mut count = 0;
            for (key, value) in items.iter().filter(|(key, _)| self.shard(key).0 == shard) {
                push_put(&mut effects, &plain(key, value));
                count += 1;
            }
            let jobs = [
                Job::BeginImage {
                    shard,
                    position: self.logs[core].position(),
                    epoch: 1,
                    time: UnixMillis(1_800_000_000_001),
                },
                Job::Image { effects, items: count },
                Job::EndImage,
                Job::AdoptImage { log_needed_from: 0 },
            ];
            for job in jobs {
                let done = self.keepers[core].run(job);
                assert!(matches!(done, Done::Image { .. }), "{done:?}");
            }
        }
    }
}

fn plain<'a>(key: &'a [u8], value: &'a [u8]) -> Image<'a> {
    Image {
        key,
        value,
        flags: 0,
        deadline: Deadline::Never,
        state: 0,
    }
}

/// Cuts into the last frame of the second core.
fn tear(folder: &Path) {
    let log = std::fs::read_dir(folder.join("log")).unwrap();
    let paths = log.map(|entry| entry.unwrap().path());
    let last = paths
        .filter(|path| path.to_string_lossy().contains("-0001-"))
        .max()
        .unwrap();
    let mut bytes = std::fs::read(&last).unwrap();
    let end = bytes.iter().rposition(|byte| *byte != 0).unwrap();
    assert!(end > 4096 + 72);
    bytes[end - 3..].fill(0);
    std::fs::write(&last, bytes).unwrap();
}

#[test]
#[ignore = "makes the golden directories that are missing"]
fn make_missing() {
    for name in NAMES {
        let folder = golden(name);
        if folder.exists() {
            continue;
        }
        let mut run = Run::begin(&folder, 2);
        match name {
            "v1-image-and-log" => run.images(),
            "v1-two-generations" => {
                run.fill();
                run.parts();
                drop(run);
                run = Run::begin(&folder, 3);
                run.logs.iter_mut().for_each(Log::empty);
            }
            _ => {}
        }
        if name == "v2-side-by-side" {
            run.write_side_by_side(0);
        }
        if name == "v2-overtaken" {
            // Not longer than a segment, so that what was overtaken is in the last one.
            run.parts();
            run.write_side_by_side(1);
        } else {
            run.fill();
            run.parts();
        }
        drop(run);
        if name == "v1-torn-tail" {
            tear(&folder);
        }
        std::fs::remove_file(folder.join("LOCK")).unwrap();
        let elsewhere = tempfile::tempdir().unwrap();
        copy(&folder, elsewhere.path());
        std::fs::write(folder.join("content.txt"), content(&open(elsewhere.path()), 1)).unwrap();
    }
}
