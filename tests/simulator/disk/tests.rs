//! What the simulated disk does in a crash, and when it fails.

use super::*;
use std::collections::BTreeSet;

const SEEDS: u64 = 300;

fn disk(seed: u64) -> SimDisk {
    SimDisk::new(Random::new(seed))
}

/// A file of so many sectors, each full of `with`, with a safe name.
fn safe_file(disk: &SimDisk, path: &str, sectors: usize, with: u8) -> Box<dyn File> {
    let file = disk.create(path).unwrap();
    file.write_at(0, &vec![with; sectors * SECTOR_BYTES]).unwrap();
    file.sync().unwrap();
    disk.sync_dir(split(path).0).unwrap();
    file
}

/// What crashes leave, over seeds.
fn found<T: Ord>(make: impl Fn(&SimDisk), look: impl Fn(&SimDisk) -> T) -> BTreeSet<T> {
    let crashes = (1..=SEEDS).map(|seed| {
        let disk = disk(seed);
        make(&disk);
        look(&disk.crash())
    });
    crashes.collect()
}

/// The first byte of each sector; each must be one state that the sector had, in one piece.
fn sectors(disk: &SimDisk, path: &str) -> Vec<u8> {
    let bytes = disk.bytes(path).expect("its name is safe");
    let of = |sector: &[u8]| {
        assert!(sector.iter().all(|byte| *byte == sector[0]), "a mix in a sector");
        sector[0]
    };
    bytes.chunks(SECTOR_BYTES).map(of).collect()
}

#[test]
fn writes_are_torn_and_reordered() {
    let found = found(
        |disk| {
            let file = safe_file(disk, "a", 3, 0);
            for with in [1, 2] {
                file.write_at(0, &[with; 3 * SECTOR_BYTES]).unwrap();
            }
            file.write_at(2 * SECTOR_BYTES as u64, &[3; SECTOR_BYTES]).unwrap();
        },
        |disk| sectors(disk, "a"),
    );
    // None, all, a whole write, a torn one, and each sector as old as it likes.
    for left in [
        [0, 0, 0],
        [2, 2, 3],
        [1, 1, 1],
        [1, 0, 1],
        [2, 1, 1],
        [0, 0, 3],
        [0, 2, 1],
        [2, 0, 0],
    ] {
        assert!(found.contains(&left[..]), "{left:?}");
    }
    assert!(
        found
            .iter()
            .all(|left| left.iter().zip([2, 2, 3]).all(|(byte, last)| *byte <= last))
    );
}

#[test]
fn what_was_synced_survives() {
    let found = found(
        |disk| {
            let file = safe_file(disk, "a", 2, 1);
            file.write_at(0, &[2; SECTOR_BYTES]).unwrap();
            file.sync().unwrap();
            // Of another file, and not of this one.
            let other = disk.create("b").unwrap();
            other.write_at(0, &[9; 9]).unwrap();
            file.write_at(SECTOR_BYTES as u64, &[3; SECTOR_BYTES]).unwrap();
            other.sync().unwrap();
        },
        |disk| (sectors(disk, "a"), disk.bytes("b")),
    );
    let expected = [vec![2, 1], vec![2, 3]]
        .into_iter()
        .flat_map(|left| [(left.clone(), None), (left, Some(vec![9; 9]))]);
    assert_eq!(found, expected.collect());
}

/// A second crash finds what the first one left.
#[test]
fn what_was_found_is_safe() {
    for seed in 1..=SEEDS {
        let disk = disk(seed);
        let file = disk.create("a").unwrap();
        file.write_at(0, &[1; 5000]).unwrap();
        let found = disk.crash();
        assert_eq!(found.bytes("a"), found.clone().crash().bytes("a"));
        let error = file.write_at(0, &[2]).unwrap_err();
        assert_eq!(error.to_string(), "the machine has stopped");
    }
}

#[test]
fn names_are_lost_from_the_end() {
    let found = found(
        |disk| {
            disk.make_folder("log").unwrap();
            for name in ["log/a", "log/b"] {
                let file = disk.create(name).unwrap();
                file.write_at(0, name.as_bytes()).unwrap();
                file.sync().unwrap();
            }
            disk.sync_dir("").unwrap();
            disk.rename("log/b", "log/c").unwrap();
            disk.remove("log/a").unwrap();
        },
        |disk| disk.list("log").unwrap(),
    );
    let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
    assert_eq!(
        found,
        [
            names(&[]),
            names(&["a"]),
            names(&["a", "b"]),
            names(&["a", "c"]),
            names(&["c"])
        ]
        .into()
    );
}

/// The names of another folder have an order of their own, and a name without a synced file may be empty.
#[test]
fn a_name_says_nothing_about_bytes_or_other_folders() {
    let found = found(
        |disk| {
            disk.make_folder("log").unwrap();
            disk.create("log/a").unwrap().write_at(0, &[1; 600]).unwrap();
            disk.create("b").unwrap().write_at(0, &[1; 600]).unwrap();
            disk.sync_dir("").unwrap();
        },
        |disk| {
            (
                disk.bytes("log/a").is_some(),
                disk.bytes("b").unwrap().len(),
                disk.bytes("b").unwrap(),
            )
        },
    );
    for a in [false, true] {
        for (length, bytes) in [
            (0, vec![]),
            (600, vec![1; 600]),
            (600, vec![0; 600]),
            (512, vec![1; 512]),
        ] {
            assert!(found.contains(&(a, length, bytes)), "{a} {length}");
        }
    }
}

/// The manifest's way: written anew beside, synced, renamed, synced. At no step is there none, or half of one.
#[test]
fn replaced_by_renaming() {
    let replace = |disk: &SimDisk, with: u8| -> Result<()> {
        let file = disk.create("MANIFEST.new")?;
        file.write_at(0, &[with; 1000])?;
        file.sync()?;
        disk.rename("MANIFEST.new", "MANIFEST")?;
        disk.sync_dir("")
    };
    let mut steps = BTreeSet::new();
    for seed in 1..=SEEDS {
        let disk = disk(seed);
        replace(&disk, 1).unwrap();
        let after = seed % 6;
        disk.set_plan(Plan {
            stops_after: Some(after),
            ..Plan::default()
        });
        let replaced = replace(&disk, 2);
        assert_eq!(replaced.is_ok(), after == 5);
        assert_eq!(disk.has_stopped(), after < 5);
        let bytes = disk.crash().bytes("MANIFEST").unwrap();
        assert!(bytes == [1; 1000] && after < 5 || bytes == [2; 1000] && after > 3);
        steps.insert((after, bytes[0]));
    }
    // After the renaming it may be either.
    assert_eq!(steps.len(), 7);
    // Without the sync before it, there may be half of one.
    let halves = found(
        |disk| {
            safe_file(disk, "a", 2, 1);
            disk.create("new").unwrap().write_at(0, &[2; 2 * SECTOR_BYTES]).unwrap();
            disk.rename("new", "a").unwrap();
        },
        |disk| sectors(disk, "a"),
    );
    for left in [&[][..], &[2, 0], &[0, 2], &[2, 2], &[1, 1]] {
        assert!(halves.contains(left), "{left:?}");
    }
}

#[test]
fn a_file_is_emptied_or_not() {
    let found = found(
        |disk| {
            safe_file(disk, "a", 2, 1);
            disk.create("a").unwrap().write_at(0, &[2; SECTOR_BYTES]).unwrap();
        },
        |disk| sectors(disk, "a"),
    );
    // Never what was before the end of one and after the beginning of the other.
    assert_eq!(found, [vec![], vec![0], vec![1, 1], vec![2]].into());
}

#[test]
fn allocated_room_reads_as_zeros() {
    let disk = disk(1);
    disk.create("a").unwrap().allocate(10_000).unwrap();
    let file = disk.open_blocks("a").unwrap();
    assert_eq!(file.len().unwrap(), 10_000);
    let block = memkv::disk::Block([7; BLOCK_BYTES]);
    file.write_at(BLOCK_BYTES as u64, &block.0).unwrap();
    let mut bytes = vec![1; 10_000];
    assert_eq!(file.read_at(0, &mut bytes).unwrap(), 10_000);
    assert!(bytes[..BLOCK_BYTES].iter().all(|byte| *byte == 0) && bytes[BLOCK_BYTES] == 7);
    assert_eq!(file.read_at(10_000, &mut bytes).unwrap(), 0);
    // Blocks are whole and aligned; what is open for reading is not written; a folder is made before its files.
    for (offset, bytes) in [(1, &block.0[..]), (0, &block.0[..100])] {
        assert_eq!(
            file.write_at(offset, bytes).unwrap_err().kind(),
            ErrorKind::InvalidInput
        );
    }
    let error = disk.open("a").unwrap().write_at(0, &[1]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::PermissionDenied);
    assert_eq!(disk.create("log/a").err().unwrap().kind(), ErrorKind::NotFound);
    assert_eq!(disk.open("b").err().unwrap().kind(), ErrorKind::NotFound);
}

#[test]
fn a_full_disk_has_room_again() {
    let disk = disk(1);
    safe_file(&disk, "a", 4, 1);
    disk.set_plan(Plan {
        room_bytes: Some(3 * SECTOR_BYTES as u64 + 100),
        ..Plan::default()
    });
    let file = disk.create("b").unwrap();
    let kind = |result: Result<()>| result.unwrap_err().kind();
    assert_eq!(kind(file.allocate(5 * SECTOR_BYTES as u64)), ErrorKind::StorageFull);
    assert_eq!(kind(file.write_at(0, &[2; 4 * SECTOR_BYTES])), ErrorKind::StorageFull);
    assert_eq!(disk.bytes("b").unwrap(), [2; 3 * SECTOR_BYTES]);
    // What is there already can be written.
    file.write_at(0, &[3; 3 * SECTOR_BYTES]).unwrap();
    assert_eq!(kind(file.write_at(9000, &[2; SECTOR_BYTES])), ErrorKind::StorageFull);
    disk.remove("a").unwrap();
    file.write_at(0, &[2; 5 * SECTOR_BYTES]).unwrap();
    assert_eq!((disk.tally().failures, disk.tally().full), (3, 3));
}

#[test]
fn calls_fail_as_planned() {
    let mut lengths = BTreeSet::new();
    for seed in 1..=SEEDS {
        let disk = disk(seed);
        disk.set_plan(Plan {
            reads: 1..2,
            writes: 1..3,
            dir_syncs: 0..1,
            short_reads_percent: 50,
            ..Plan::default()
        });
        let file = disk.create("a").unwrap();
        let write = |from: usize| file.write_at((from * SECTOR_BYTES) as u64, &[1; 2 * SECTOR_BYTES]);
        let is_eio = |result: Result<()>| result.unwrap_err().raw_os_error() == Some(5);
        write(0).unwrap();
        assert!(is_eio(write(2)) && is_eio(write(2)));
        lengths.insert(disk.bytes("a").unwrap().len() / SECTOR_BYTES);
        write(2).unwrap();
        let mut buffer = [0; 100];
        let reads: Vec<_> = (0..3).map(|_| file.read_at(0, &mut buffer)).collect();
        assert!(reads[0].is_ok() && reads[1].is_err() && reads[2].is_ok());
        lengths.insert(100 + reads[0].as_ref().unwrap());
        assert!(is_eio(disk.sync_dir("")));
        assert_eq!(disk.tally().failures, 4);
        disk.sync_dir("").unwrap();
    }
    // Of a write that failed none, some or all is there; a read may be short, but not empty.
    assert!([2, 3, 4, 200].iter().all(|length| lengths.contains(length)));
    assert!((101..150).any(|length| lengths.contains(&length)) && !lengths.contains(&100));
}

#[test]
fn what_a_failed_sync_lost_stays_lost() {
    let found = found(
        |disk| {
            let file = safe_file(disk, "a", 2, 1);
            disk.set_plan(Plan {
                syncs: 0..1,
                ..Plan::default()
            });
            file.write_at(0, &[2; 2 * SECTOR_BYTES]).unwrap();
            assert!(file.sync().is_err());
            // It can be read, and nobody says that it is not safe.
            assert_eq!(sectors(disk, "a"), [2, 2]);
            file.write_at(2 * SECTOR_BYTES as u64, &[3; SECTOR_BYTES]).unwrap();
            file.sync().unwrap();
        },
        |disk| sectors(disk, "a"),
    );
    assert_eq!(
        found,
        [vec![1, 1, 3], vec![1, 2, 3], vec![2, 1, 3], vec![2, 2, 3]].into()
    );
    // The same with a file that was growing: what is written and synced later is there.
    let grown = self::found(
        |disk| {
            let file = safe_file(disk, "a", 1, 1);
            disk.set_plan(Plan {
                syncs: 0..1,
                ..Plan::default()
            });
            file.write_at(SECTOR_BYTES as u64, &[2; SECTOR_BYTES]).unwrap();
            assert!(file.sync().is_err());
            file.write_at(0, &[3; SECTOR_BYTES]).unwrap();
            file.sync().unwrap();
        },
        |disk| sectors(disk, "a"),
    );
    assert_eq!(grown, [vec![3, 0], vec![3, 2]].into());
}

#[test]
fn a_program_that_ends_leaves_what_it_wrote() {
    let disk = disk(1);
    let file = disk.create("a").unwrap();
    file.write_at(0, &[1; 700]).unwrap();
    let left = disk.leave();
    assert!(file.sync().is_err());
    assert_eq!(left.bytes("a").unwrap(), [1; 700]);
    // It is no safer than before.
    let lost = (1..=SEEDS).filter(|_| left.crash().bytes("a").is_none()).count();
    assert!(lost > 0 && lost < SEEDS as usize);
}

#[test]
fn damage_stays() {
    for seed in 1..=20 {
        let disk = disk(seed);
        safe_file(&disk, "a", 2, 1);
        disk.damage("a", 700, &[9]);
        let bytes = disk.crash().bytes("a").unwrap();
        assert_eq!((bytes[699], bytes[700], bytes.len()), (1, 9, 2 * SECTOR_BYTES));
    }
}

/// The same seed and the same calls leave the same.
#[test]
fn repeated_by_its_seed() {
    let run = |seed| {
        let disk = disk(seed);
        let file = disk.create("a").unwrap();
        for at in 0..20 {
            file.write_at(at * 300, &[at as u8; 700]).unwrap();
        }
        disk.crash().bytes("a")
    };
    assert!((1..=50).all(|seed| run(seed) == run(seed)));
}
