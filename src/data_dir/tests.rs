use super::*;
use crate::disk::memory::MemoryDisk;
use crate::effect::{Effect, Image};
use crate::frame::HEAD_BYTES;
use crate::model::{Deadline, ShardId, UnixMillis};
use crate::wal::{Done, Job, Log};
use proptest::prelude::*;
use std::collections::BTreeMap;

const SEGMENT: u64 = 64 << 10;

type Items = BTreeMap<Vec<u8>, (Vec<u8>, Deadline, u8)>;

fn wanted() -> Wanted {
    Wanted {
        name: "data".to_owned(),
        partitioner: None,
        boundaries: vec![],
        shards: Some(8),
        seed: None,
        random: [u64::MAX, u64::MAX - 1],
        segment_bytes: SEGMENT,
        salvage: false,
    }
}

fn open(disk: &MemoryDisk) -> Result<DataDir, Problem> {
    DataDir::open(Arc::new(disk.clone()), wanted())
}

fn salvage(disk: &MemoryDisk) -> DataDir {
    let wanted = Wanted {
        salvage: true,
        ..wanted()
    };
    DataDir::open(Arc::new(disk.clone()), wanted).unwrap()
}

/// What the directory holds, read by so many cores.
fn restore(dir: &DataDir, cores: u16) -> Result<Items, Problem> {
    let table = dir.table(cores)?;
    let mut items = Items::new();
    for core in 0..cores {
        let shards: Vec<u16> = table
            .shards_of(crate::model::CoreId(core))
            .map(|shard| shard.0)
            .collect();
        let Some((first, last)) = shards.first().zip(shards.last()) else {
            continue;
        };
        let mut restorer = dir.restorer(*first..last + 1, table.clone());
        while restorer.step(&mut |restored| {
            assert!(shards.contains(&restored.shard));
            match restored.effect {
                Effect::Put(image) => {
                    assert_eq!(restored.place, table.place(image.key));
                    items.insert(image.key.to_vec(), (image.value.to_vec(), image.deadline, image.state));
                }
                Effect::Delete(key) => drop(items.remove(key)),
                Effect::Amend { key, deadline, state } => {
                    if let Some(item) = items.get_mut(key) {
                        (item.1, item.2) = (deadline, state);
                    }
                }
                Effect::Empty => items.retain(|key, _| table.shard_of(table.place(key).token).0 != restored.shard),
                Effect::Part(_) => panic!("a part came as a part"),
            }
            Ok(())
        })? {}
        let (done, total) = restorer.progress();
        assert_eq!(done, total, "core {core}");
    }
    Ok(items)
}

/// A run of the server, as far as its files see it.
struct Run {
    table: RangeTable,
    keepers: Vec<Keeper>,
    logs: Vec<Log>,
    /// For each shard, where its image is in this run.
    images: Vec<u64>,
}

impl Run {
    fn begin(dir: &mut DataDir, cores: u16, durability: Durability) -> Self {
        let table = dir.table(cores).unwrap();
        dir.begin_generation(&table, durability).unwrap();
        Self {
            keepers: (0..cores).map(|core| dir.keeper(core).unwrap()).collect(),
            logs: (0..cores).map(|_| Log::new(1)).collect(),
            images: vec![0; usize::from(table.shards())],
            table,
        }
    }

    fn core_of(&self, key: &[u8]) -> usize {
        usize::from(self.table.core_of(self.table.shard_of(self.table.place(key).token)).0)
    }

    fn put(&mut self, key: &[u8], value: &[u8]) {
        let core = self.core_of(key);
        self.logs[core].put(&image(key, &(value.to_vec(), Deadline::Never, 0)));
    }

    fn write(&mut self, core: usize, sync: bool, ends: bool) -> Done {
        let chunks = self.logs[core].take(UnixMillis(5));
        self.keepers[core].run(Job::Log { chunks, sync, ends })
    }

    fn write_all(&mut self, sync: bool, ends: bool) {
        for core in 0..self.keepers.len() {
            let done = self.write(core, sync, ends);
            assert!(matches!(done, Done::Logged { .. }), "{done:?}");
        }
    }

    fn image(&mut self, shard: u16, items: &Items) {
        let of = |key: &[u8]| self.table.shard_of(self.table.place(key).token);
        let core = usize::from(self.table.core_of(ShardId(shard)).0);
        let mut effects = vec![];
        let mut count = 0;
        for (key, item) in items.iter().filter(|(key, _)| of(key).0 == shard) {
            crate::effect::push_put(&mut effects, &image(key, item));
            count += 1;
        }
        self.images[usize::from(shard)] = self.logs[core].position();
        let of_core = self.table.shards_of(crate::model::CoreId(core as u16));
        let log_needed_from = of_core.map(|shard| self.images[usize::from(shard.0)]).min().unwrap();
        let jobs = [
            Job::BeginImage {
                shard,
                position: self.logs[core].position(),
                epoch: 1,
                time: UnixMillis(5),
            },
            Job::Image { effects, items: count },
            Job::EndImage,
            Job::AdoptImage { log_needed_from },
        ];
        for job in jobs {
            let done = self.keepers[core].run(job);
            assert!(matches!(done, Done::Image { .. }), "{done:?}");
        }
        while self.keepers[core].idle() {}
    }
}

fn image<'a>(key: &'a [u8], item: &'a (Vec<u8>, Deadline, u8)) -> Image<'a> {
    Image {
        key,
        value: &item.0,
        flags: 0,
        deadline: item.1,
        state: item.2,
    }
}

#[derive(Clone, Debug)]
enum Op {
    Put(u8, usize),
    Delete(u8),
    Amend(u8, u64),
    Empty,
    Write(bool),
    Epoch,
    Image(u16),
    Restart { cores: u16, in_order: bool },
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        12 => (any::<u8>(), 0..3000usize).prop_map(|(key, length)| Op::Put(key, length)),
        1 => (any::<u8>(), 60_000..200_000usize).prop_map(|(key, length)| Op::Put(key, length)),
        4 => any::<u8>().prop_map(Op::Delete),
        2 => (any::<u8>(), any::<u64>()).prop_map(|(key, moment)| Op::Amend(key, moment)),
        1 => Just(Op::Empty),
        6 => any::<bool>().prop_map(Op::Write),
        2 => Just(Op::Epoch),
        3 => (0..8u16).prop_map(Op::Image),
        1 => (1..5u16, any::<bool>()).prop_map(|(cores, in_order)| Op::Restart { cores, in_order }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever is done, in however many runs with however many cores: what comes back is what a map has.
    #[test]
    fn what_is_written_comes_back(ops in prop::collection::vec(op(), 1..150)) {
        let disk = MemoryDisk::default();
        let mut items = Items::new();
        let mut dir = open(&disk).unwrap();
        let mut run = Run::begin(&mut dir, 2, Durability::Always);
        for (number, op) in ops.into_iter().chain([Op::Restart { cores: 3, in_order: false }]).enumerate() {
            match op {
                Op::Put(key, length) => {
                    let value = vec![number as u8; length];
                    run.put(&[key], &value);
                    items.insert(vec![key], (value, Deadline::Never, 0));
                }
                Op::Delete(key) => {
                    let core = run.core_of(&[key]);
                    run.logs[core].delete(&[key]);
                    items.remove(&vec![key]);
                }
                Op::Amend(key, moment) => {
                    if let Some(item) = items.get_mut(&vec![key]) {
                        (item.1, item.2) = (Deadline::At(UnixMillis(moment)), 3);
                        let core = run.core_of(&[key]);
                        run.logs[core].amend(&[key], item.1, item.2);
                    }
                }
                Op::Empty => {
                    run.logs.iter_mut().for_each(Log::empty);
                    items.clear();
                }
                Op::Write(sync) => run.write_all(sync, false),
                Op::Epoch => for log in &mut run.logs {
                    log.close_epoch(log.epoch());
                    log.begin_epoch(log.epoch() + 1);
                },
                Op::Image(shard) => run.image(shard, &items),
                Op::Restart { cores, in_order } => {
                    run.write_all(true, in_order);
                    drop(run);
                    dir = open(&disk).unwrap();
                    prop_assert_eq!(dir.warnings().iter().filter(|warning| warning.contains("cut")).count(), 0);
                    prop_assert_eq!(&restore(&dir, cores).unwrap(), &items);
                    prop_assert_eq!(&restore(&salvage(&disk), 1).unwrap(), &items);
                    run = Run::begin(&mut dir, cores, Durability::Always);
                    // What was resolved is read as it was written down.
                    prop_assert_eq!(&restore(&open(&disk).unwrap(), 2).unwrap(), &items);
                }
            }
        }
    }
}

/// A directory of one core, and what it had after each unit; every second one is made safe.
fn units() -> (MemoryDisk, Vec<Items>) {
    let disk = MemoryDisk::default();
    let mut dir = open(&disk).unwrap();
    let mut run = Run::begin(&mut dir, 1, Durability::Always);
    let mut states = vec![Items::new()];
    for unit in 0..12u8 {
        let mut items = states.last().unwrap().clone();
        for key in 0..unit % 4 {
            let value = vec![unit; usize::from(unit) * 37];
            run.put(&[key], &value);
            items.insert(vec![key], (value, Deadline::Never, 0));
        }
        run.logs[0].begin_epoch(u64::from(unit) + 2);
        run.put(b"both", &[unit]);
        items.insert(b"both".to_vec(), (vec![unit], Deadline::Never, 0));
        run.write_all(unit % 2 == 1, false);
        states.push(items);
    }
    (disk, states)
}

const FIRST: &str = "log/00000001-0000-00000000.log";

/// The same with units of which every second and third were under way together, so the third begins in a block of its own.
fn side_by_side() -> (MemoryDisk, Vec<Items>) {
    let disk = MemoryDisk::default();
    let mut dir = open(&disk).unwrap();
    let mut run = Run::begin(&mut dir, 1, Durability::Always);
    let mut states = vec![Items::new()];
    for unit in 0..9u8 {
        let mut items = states.last().unwrap().clone();
        run.put(&[unit], &[unit; 300]);
        items.insert(vec![unit], (vec![unit; 300], Deadline::Never, 0));
        states.push(items);
        match unit % 3 {
            0 => run.write_all(true, false),
            1 => {}
            _ => {
                let mut writer = run.keepers[0].lend().unwrap();
                let mut chunks = run.logs[0].take(UnixMillis(5));
                let mut second = chunks[0].clone();
                let half = second.effects.len() / 2;
                second.effects.drain(..half);
                second.position += half as u64;
                chunks[0].effects.truncate(half);
                let writes = [&chunks, &vec![second]].map(|chunks| writer.begin(chunks, false).unwrap());
                for write in writes.iter().rev() {
                    writer.file().write_at(write.offset(), write.bytes()).unwrap();
                }
                writes.into_iter().for_each(|write| writer.end(write, Ok(())).unwrap());
                run.keepers[0].give_back(writer);
                run.put(b"behind", &[unit]);
                let mut items = states.last().unwrap().clone();
                items.insert(b"behind".to_vec(), (vec![unit], Deadline::Never, 0));
                states.push(items);
                run.write_all(true, false);
            }
        }
    }
    (disk, states)
}

/// Where each frame of a segment begins, with the sequence before which all were known to be safe, and at last where they end.
fn frames(disk: &MemoryDisk) -> Vec<(usize, u64)> {
    let bytes = disk.get(FIRST).unwrap();
    let read = |at: usize| Seal::new(u64::MAX - 1).read(&bytes[at..]).ok();
    let (mut at, mut found) = (4096usize, vec![]);
    loop {
        let next = at.next_multiple_of(4096);
        if read(at).is_none() && read(next).is_some() {
            at = next;
        }
        let Some((frame, length)) = read(at) else { break };
        found.push((at, frame.synced));
        at += HEAD_BYTES + length;
    }
    found.push((at, 0));
    found
}

/// A frame that is gone was safe if a later one says so.
fn was_safe(frames: &[(usize, u64)], frame: usize) -> bool {
    frames[frame + 1..].iter().any(|(_, synced)| *synced > frame as u64)
}

#[test]
fn a_write_that_is_gone_is_damage_if_it_was_safe() {
    for (disk, states) in [units(), side_by_side()] {
        let whole = disk.get(FIRST).unwrap();
        let frames = frames(&disk);
        for (frame, pair) in frames.windows(2).enumerate() {
            let disk = disk.copy();
            let mut bytes = whole.clone();
            bytes[pair[0].0..pair[1].0].fill(0);
            disk.put(FIRST, &bytes);
            match open(&disk) {
                Ok(dir) => {
                    assert!(!was_safe(&frames, frame), "frame {frame}");
                    assert!(states.contains(&restore(&dir, 1).unwrap()));
                }
                Err(problem) => assert!(was_safe(&frames, frame), "frame {frame}: {problem}"),
            }
        }
    }
}

/// Nothing is read where nothing was written: what is there does not matter.
#[test]
fn what_is_left_out_may_be_anything() {
    let (disk, states) = side_by_side();
    let mut bytes = disk.get(FIRST).unwrap();
    let frames = frames(&disk);
    let mut left_out = 0;
    for pair in frames.windows(2) {
        let length = u32::from_le_bytes(bytes[pair[0].0 + 8..][..4].try_into().unwrap());
        let end = pair[0].0 + HEAD_BYTES + length as usize;
        bytes[end..pair[1].0].fill(b'x');
        left_out += usize::from(end < pair[1].0);
    }
    assert_eq!(left_out, 3);
    disk.put(FIRST, &bytes);
    assert_eq!(restore(&open(&disk).unwrap(), 1).unwrap(), *states.last().unwrap());
}

#[test]
fn wherever_the_last_segment_ends_units_are_whole() {
    let (disk, states) = units();
    let whole = disk.get(FIRST).unwrap();
    let frames = frames(&disk);
    let end = frames.last().unwrap().0;
    assert!(frames.len() > 12);
    let mut reached = 0;
    for cut in (4096..end + 100).step_by(7).chain(frames.iter().map(|(at, _)| *at)) {
        for zeros in [false, true] {
            let disk = disk.copy();
            let mut bytes = whole.clone();
            match zeros {
                true => bytes[cut..].fill(0),
                false => bytes.truncate(cut),
            }
            disk.put(FIRST, &bytes);
            let items = restore(&open(&disk).unwrap(), 2).unwrap();
            let place = states.iter().position(|state| *state == items);
            let place = place.unwrap_or_else(|| panic!("cut at {cut}: a part of a unit"));
            reached = reached.max(place);
            assert!(cut < end || place + 1 == states.len());
        }
    }
    assert_eq!(reached + 1, states.len());
}

#[test]
fn a_flipped_bit_cuts_what_was_not_safe_and_is_damage_elsewhere() {
    let (disk, states) = units();
    let whole = disk.get(FIRST).unwrap();
    let frames = frames(&disk);
    let end = frames.last().unwrap().0;
    let (mut cut, mut damaged) = (0, 0);
    for at in (4096..end).step_by(5) {
        let disk = disk.copy();
        let mut bytes = whole.clone();
        bytes[at] ^= 4;
        disk.put(FIRST, &bytes);
        let frame = frames.iter().rposition(|(begin, _)| *begin <= at).unwrap();
        let was_safe = frames[frame + 1..].iter().any(|(_, synced)| *synced > frame as u64);
        match open(&disk) {
            Ok(dir) => {
                assert!(!was_safe, "byte {at}");
                assert!(states.contains(&restore(&dir, 1).unwrap()));
                // But for a flip that makes it look as if nothing had been there.
                let magic = at < frames[frame].0 + 4;
                assert!(
                    magic || dir.warnings().iter().any(|warning| warning.contains("it is cut")),
                    "byte {at}"
                );
                cut += 1;
            }
            Err(problem) => {
                assert!(was_safe, "byte {at}: {problem}");
                assert_eq!(problem.file, format!("data/{FIRST}"));
                assert_eq!(problem.offset, Some(frames[frame].0 as u64));
                assert!(problem.to_string().contains("--recover salvage"), "{problem}");
                let dir = salvage(&disk);
                assert!(!dir.warnings().is_empty());
                assert!(states.contains(&restore(&dir, 1).unwrap()));
                damaged += 1;
            }
        }
    }
    assert!(cut > 0 && damaged > 0);
}

proptest! {
    /// Whatever bytes there are, reading them ends, and nothing comes out that nobody wrote.
    #[test]
    fn any_bytes_are_read(data in prop::collection::vec(any::<u8>(), 0..400)) {
        fuzz::log(&data);
        fuzz::image(&data);
    }
}

/// Two cores, with what each wrote in epochs 2 and 3: a part of one transaction each, and a key of its own.
struct Two {
    disk: MemoryDisk,
    run: Run,
    /// A key of each core.
    keys: [Vec<u8>; 2],
}

impl Two {
    fn begin(durability: Durability) -> Self {
        let disk = MemoryDisk::default();
        let mut dir = open(&disk).unwrap();
        let run = Run::begin(&mut dir, 2, durability);
        let key = |core| {
            (0..=255)
                .map(|key| vec![key])
                .find(|key| run.core_of(key) == core)
                .unwrap()
        };
        let keys = [key(0), key(1)];
        Self { disk, run, keys }
    }

    fn part(&mut self, core: usize, clock: u64, epoch: u64, value: &[u8]) {
        let log = &mut self.run.logs[core];
        log.begin_part(0, clock, epoch, &[0, 1]);
        log.put(&image(&self.keys[core], &(value.to_vec(), Deadline::Never, 0)));
        log.finish_part();
    }

    fn epoch(&mut self, core: usize) {
        let log = &mut self.run.logs[core];
        log.close_epoch(log.epoch());
        log.begin_epoch(log.epoch() + 1);
    }

    /// The values of the two keys, and the warnings.
    fn values(&self) -> ([Option<Vec<u8>>; 2], Vec<String>) {
        let mut dir = open(&self.disk).unwrap();
        let value = |items: &Items| [0, 1].map(|core| items.get(&self.keys[core]).map(|item| item.0.clone()));
        let items = restore(&dir, 3).unwrap();
        let table = dir.table(4).unwrap();
        dir.begin_generation(&table, Durability::None).unwrap();
        // Written down, it is the same, also when more happens.
        let again = restore(&open(&self.disk).unwrap(), 1).unwrap();
        assert_eq!(items, again);
        (value(&items), dir.warnings().to_vec())
    }
}

#[test]
fn a_transaction_counts_when_all_its_writers_have_it() {
    for has_it in [false, true] {
        let mut two = Two::begin(Durability::Always);
        two.part(0, 7, 1, b"first");
        two.part(1, 7, 1, b"first");
        two.run.write_all(true, false);
        two.part(0, 8, 1, b"second");
        two.run.write(0, true, false);
        if has_it {
            two.part(1, 8, 1, b"second");
            two.run.write(1, true, false);
        }
        let (values, warnings) = two.values();
        let expected = if has_it { b"second".to_vec() } else { b"first".to_vec() };
        assert_eq!(values, [Some(expected.clone()), Some(expected)]);
        assert_eq!(
            warnings.iter().any(|warning| warning.contains("1 transactions")),
            !has_it,
            "{warnings:?}"
        );
    }
}

#[test]
fn with_an_interval_what_all_cores_have_closed_counts() {
    for durability in [Durability::None, Durability::Interval] {
        let mut two = Two::begin(durability);
        two.part(0, 7, 1, b"first");
        two.part(1, 7, 1, b"first");
        two.epoch(0);
        two.epoch(1);
        two.run.write_all(true, false);
        // Epoch 2, in which core 0 is alone when the machine stops; a part of epoch 1 comes late.
        two.part(0, 8, 2, b"second");
        two.epoch(0);
        let key = two.keys[0].clone();
        two.run.put(&key, b"third");
        two.run.write(0, true, false);
        let (values, warnings) = two.values();
        assert_eq!(values, [Some(b"first".to_vec()), Some(b"first".to_vec())]);
        assert!(warnings[0].contains("after epoch 1"), "{warnings:?}");
    }
    // When both ended in order, everything counts.
    let mut two = Two::begin(Durability::Interval);
    let key = two.keys[0].clone();
    two.run.put(&key, b"third");
    two.run.write_all(true, true);
    let (values, warnings) = two.values();
    assert_eq!((values, warnings), ([Some(b"third".to_vec()), None], vec![]));
}

#[test]
fn what_the_options_say_must_be_what_the_directory_has() {
    let disk = MemoryDisk::default();
    drop(open(&disk).unwrap());
    let differs = |change: &dyn Fn(&mut Wanted)| {
        let mut wanted = wanted();
        change(&mut wanted);
        let opened = DataDir::open(Arc::new(disk.clone()), wanted);
        opened.unwrap_err().to_string()
    };
    let told = differs(&|wanted| wanted.shards = Some(9));
    assert!(told.contains("--shards 8") && told.contains("--shards 9"), "{told}");
    let told = differs(&|wanted| wanted.seed = Some(5));
    assert!(
        told.contains("--token-seed 18446744073709551615") && told.contains("--token-seed 5"),
        "{told}"
    );
    let told = differs(&|wanted| wanted.partitioner = Some(PartitionerChoice::Ordered));
    assert!(told.contains("hashed") && told.contains("ordered"), "{told}");
    let told = differs(&|wanted| wanted.boundaries = vec!["m".to_owned()]);
    assert!(told.contains("--boundaries m"), "{told}");
}

#[test]
fn a_manifest_that_cannot_be_read_is_told() {
    let disk = MemoryDisk::default();
    drop(open(&disk).unwrap());
    let text = String::from_utf8(disk.get("MANIFEST").unwrap()).unwrap();
    let told = |text: &str| {
        disk.put("MANIFEST", text.as_bytes());
        open(&disk).unwrap_err().to_string()
    };
    let newer = told(&text.replace("format = 1", "format = 2"));
    assert!(
        newer.contains("format version 2") && newer.contains("newer program"),
        "{newer}"
    );
    let edited = told(&text.replace("shards = 8", "shards = 9"));
    assert!(edited.contains("checksum"), "{edited}");
    assert!(told("").contains("no format version"));
    disk.remove("MANIFEST").unwrap();
    disk.put(FIRST, b"");
    let missing = open(&disk).unwrap_err().to_string();
    assert!(
        missing.contains("data/MANIFEST: it is missing, but there is log/"),
        "{missing}"
    );
}

#[test]
fn a_missing_log_is_damage_and_inspection_says_what_is_there() {
    let (disk, _) = units();
    let shared: Arc<dyn Disk> = Arc::new(disk.clone());
    let describe = || {
        let mut lines = vec![];
        let damages = describe(&shared, "data", true, &mut |line| lines.push(line.to_owned())).unwrap();
        (damages, lines.join("\n"))
    };
    let (damages, text) = describe();
    assert_eq!(damages, 0, "{text}");
    assert!(text.contains("put 'both' '\\x0b' (1 bytes"), "{text}");
    assert!(text.ends_with("nothing is damaged"), "{text}");
    let mut bytes = disk.get(FIRST).unwrap();
    bytes[4096 + 80] ^= 1;
    disk.put(FIRST, &bytes);
    let (damages, text) = describe();
    assert_eq!(damages, 1, "{text}");
    assert!(
        text.contains(&format!("data/{FIRST}, offset 4096: frame 0 is damaged")),
        "{text}"
    );
    disk.remove(FIRST).unwrap();
    let missing = open(&disk).unwrap_err().to_string();
    assert!(
        missing.contains("the log of core 0 in generation 1 is missing"),
        "{missing}"
    );
    assert!(describe().0 > 0);
}
